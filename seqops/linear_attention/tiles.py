"""What the Triton kernels of linear attention are launched with (triton_kernels.py): the tuner's problem.

A program walks the steps of a row in chunks and holds a block of the state, `inner` by `outer` channels. Rows are
whole sequences where these fill the device, and else spans of them: a first walk finds what each adds to the state, one
kernel joins these in their order, and a second walk gives the outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tune import csp

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
DECAYS = ("none", "step", "channel")
POWERS = tuple(1 << n for n in range(18))
ALIGNMENT = 16  # elements and bytes: what wide accesses need of strides, sizes and addresses


class Shape(NamedTuple):
    steps: int  # of a chunk
    inner: int  # channels of a program
    outer: int
    warps: int
    exact: bool = False  # step by step, without products of blocks
    architectures: tuple[int, ...] = ()  # that it spills nothing on; none: on any


class Kind(NamedTuple):
    """What decides which shapes fit the registers."""

    dtype: str
    channel: bool  # whether each channel has its decay
    aligned: bool  # wide accesses

    def shapes(self, single: bool = False) -> tuple[Shape, ...]:
        """Those that spill nothing, the longest chunks first. single: for one step."""
        size = SIZES[self.dtype]
        if size == 8 or single:
            return (Shape(16, 32, 16 if size == 8 else 32, 4, True),)
        if size == 4:
            return (Shape(16, 32, 16, 4),)
        if self.channel or not self.aligned:
            return (Shape(16, 64, 32, 4),)
        return Shape(64, 64, 32, 8, architectures=(80, 90, 100)), Shape(16, 64, 32, 4)

    def shape(self, steps: int, single: bool = False) -> Shape:
        """The one of chunks of `steps`."""
        of = {each.steps: each for each in self.shapes(single)}
        if steps not in of:
            exist = ", ".join(map(str, of))
            text = f"linear_attention.triton: no kernel of {steps} steps for {self}; steps that exist: {exist}"
            raise RuntimeError(text)
        return of[steps]


# ---- the choice

SPANS = (256, 512, 1024, 2048)  # steps between states that are written: these are as large as 100 steps and more
STEP_CYCLES = 60  # one step of a walk without products, by estimate
CHUNK_CYCLES = 1500  # a chunk's loads, products one after the other, and barriers, by estimate


def problem(device: Any, key: Any) -> csp.Problem:
    """Steps of a chunk and of a row, 0 for whole sequences, and the time in microseconds of B H rows of T steps."""
    decay, aligned = key.flags[0], "aligned" in key.flags
    kind = Kind(key.dtype, decay == "channel", aligned)
    backward = ".backward." in key.kernel
    size, time, width = SIZES[key.dtype], key["T"], max(key["K"], key["V"])
    shapes = {each.steps: each for each in kind.shapes(time == 1) if fits(each, device.arch)}

    p = csp.Problem(str(key))
    steps = p.int("steps", values=tuple(shapes))
    # Gradients of decays are differences of sums, which begin anew at every row.
    whole = () if backward and decay != "none" and time > SPANS[0] else (0,)
    span = p.int("span", values=(*whole, *(each for each in SPANS if each < time)))
    length = csp.where(span == 0, time, span)
    rows = p.define("rows", csp.ceildiv(time, csp.max_(length, 1)) * (key["B"] * key["H"]))

    costs = []
    for shape in shapes.values():
        blocks = -(-key["K"] // shape.inner) * -(-key["V"] // shape.outer)
        resident = device.processors * max(1, device.registers_per_processor // (256 * 32 * shape.warps))
        cycles = CHUNK_CYCLES + (multiplications(shape) / device.fma_f32 if size == 4 else 0)
        if shape.exact:
            cycles = STEP_CYCLES * shape.steps
        waves = csp.ceildiv(rows * blocks, resident)
        costs.append((shape.steps, waves * csp.ceildiv(length, shape.steps) * (cycles / (1e3 * device.clock_ghz))))
    walk = sum((csp.where(steps == which, cost, 0) for which, cost in costs), start=0 * steps)
    moved = key["B"] * key["H"] * time * 4 * width * size / device.bandwidth
    states = rows * (key["K"] * key["V"] * 4 * 3 / device.bandwidth)
    walks = 3 if backward else 1
    once = csp.max_(walk, moved)
    reduced = csp.where(span == 0, 0, (once + states + 3 * device.launch_us) * (2 if backward else 1))
    p.minimize(walks * (once + 2 * device.launch_us) + reduced, then=(-steps, -span))
    return p


def fits(shape: Shape, arch: int) -> bool:
    """Compute capabilities 8.6 and 8.9 have the instructions of 8.0."""
    return not shape.architectures or arch in shape.architectures or 80 <= arch < 90


def multiplications(shape: Shape) -> int:
    """Multiplications of a chunk."""
    return shape.steps * (shape.steps * (shape.inner + shape.outer) + 2 * shape.inner * shape.outer)
