"""Cases of grid_scan, on the CPU and on a GPU.

Letters: B batch, X and Y sides of the grid, H heads, D values of a head.

Peers compute the same result in plain torch:

* `node loop` is the recurrence as it is written, node after node, each a few operations over B, H and D.
* `antidiagonals` takes all nodes of an antidiagonal at once, after one copy that puts them side by side.

`same bytes` is so many additions and clones of tensors as large as x_r that together they move the bytes of the pass;
it makes new outputs, as an operator does. Bytes count each tensor once for each pass that has to read or write it. The
float64 reference goes by antidiagonals too; the operator's tests hold it to a loop and to a system of equations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import BACKWARD, FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

SAME_BYTES = "same bytes"
LOOP = "node loop"
DIAGONALS = "antidiagonals"
GATES = ("t_rl", "t_ru", "t_dl", "t_du")
# Tensors as large as x_r, and as large as a gate, that a pass reads or writes.
TENSORS = {FORWARD: (4, 4), BACKWARD: (6, 8), TRAINING: (10, 12), INFERENCE: (4, 4)}
# Operations for each value: two products and two sums of each state; backwards as many again for the gates.
FLOPS = {FORWARD: 8, BACKWARD: 16, TRAINING: 24, INFERENCE: 8}


@dataclass(frozen=True)
class Shape:
    B: int
    X: int
    Y: int
    H: int
    D: int
    dtype: torch.dtype = torch.float32
    directional: bool = False  # without t_ru

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "X": self.X, "Y": self.Y, "H": self.H, "D": self.D}

    @property
    def values(self) -> int:
        return math.prod(self.letters.values())

    def count_bytes(self, mode: str) -> int:
        large, small = TENSORS[mode]
        return (large * self.values + small * self.values // self.D) * self.dtype.itemsize


# ---- inputs and implementations


def draw(shape: Shape, rows: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`; gates that share out 0.98 of what there is."""
    generator = torch.Generator(device).manual_seed(0)
    nodes = (shape.B, rows, shape.Y, shape.H)
    tensors = {n: torch.randn(*nodes, shape.D, generator=generator, device=device) for n in ("x_r", "x_d")}
    for here, there in (("t_rl", "t_dl"), ("t_ru", "t_du")):
        share = torch.rand(nodes, generator=generator, device=device) * 0.98
        tensors |= {here: share, there: 0.98 - share}
    if shape.directional:
        del tensors["t_ru"]
    return {name: t.to(shape.dtype).to(dtype).requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)

    def run() -> dict[str, Tensor]:
        return dict(zip("rd", function(**{"t_ru": None, **leaves}), strict=True))

    return Contender(run, leaves)


def call_ours(**inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    import seqops

    return seqops.grid_scan(**inputs)


def node_loop(
    x_r: Tensor, x_d: Tensor, t_rl: Tensor, t_ru: Tensor | None, t_dl: Tensor, t_du: Tensor
) -> tuple[Tensor, Tensor]:
    B, X, Y, H, D = x_r.shape
    zeros = x_r.new_zeros(B, H, D)
    row = [zeros] * Y
    rows_r, rows_d = [], []
    for x in range(X):
        u, row_d = zeros, []
        for y in range(Y):
            left = row[y]
            r = t_rl[:, x, y, :, None] * left + x_r[:, x, y]
            if t_ru is not None:
                r = r + t_ru[:, x, y, :, None] * u
            u = t_dl[:, x, y, :, None] * left + t_du[:, x, y, :, None] * u + x_d[:, x, y]
            row[y] = r
            row_d.append(u)
        rows_r.append(torch.stack(row, 1))
        rows_d.append(torch.stack(row_d, 1))
    return torch.stack(rows_r, 1), torch.stack(rows_d, 1)


def antidiagonals(
    x_r: Tensor, x_d: Tensor, t_rl: Tensor, t_ru: Tensor | None, t_dl: Tensor, t_du: Tensor
) -> tuple[Tensor, Tensor]:
    """Row x of the grid is lane x, and column y its step x + y."""
    B, X, Y, H, D = x_r.shape
    lane, step = torch.arange(X, device=x_r.device)[None], torch.arange(X + Y - 1, device=x_r.device)[:, None]
    column = step - lane
    inside = ((column >= 0) & (column < Y))[None, :, :, None]
    column = column.clamp(0, Y - 1)

    def slanted(gate: Tensor) -> tuple[Tensor, ...]:
        return torch.where(inside, gate[:, lane, column], 0.0)[..., None].unbind(1)

    def slanted_values(x: Tensor) -> tuple[Tensor, ...]:
        return torch.where(inside[..., None], x[:, lane, column], 0.0).unbind(1)

    gates = [None if gate is None else slanted(gate) for gate in (t_rl, t_ru, t_dl, t_du)]
    r, d = x_r.new_zeros(B, X, H, D), x_r.new_zeros(B, X, H, D)
    first, all_r, all_d = x_r.new_zeros(B, 1, H, D), [], []
    for k, (new_r, new_d) in enumerate(zip(slanted_values(x_r), slanted_values(x_d), strict=True)):
        rl, ru, dl, du = (None if gate is None else gate[k] for gate in gates)
        left = torch.cat((first, r[:, :-1]), 1)
        r = rl * left + new_r if ru is None else rl * left + ru * d + new_r
        d = dl * left + du * d + new_d
        all_r.append(r)
        all_d.append(d)
    lane, column = lane.T, torch.arange(Y, device=x_r.device)[None]
    return tuple(torch.stack(values, 1)[:, lane + column, lane] for values in (all_r, all_d))


def build_same_bytes(shape: Shape, mode: str, steps: int, device: str = "cpu") -> Contender:
    """torch.add moves three tensors, a clone two."""
    sizes = (shape.B, steps, shape.Y, shape.H, shape.D)
    first, second = (torch.ones(sizes, dtype=shape.dtype, device=device) for _ in range(2))
    adds, clones = {4: (0, 2), 6: (2, 0), 10: (2, 2)}[TENSORS[mode][0]]

    def run() -> dict[str, Tensor]:
        for _ in range(adds):
            first + second
        for _ in range(clones):
            first.clone()
        return {}

    return Contender(run, {})


# ---- the table


def make_case(
    shape: Shape,
    note: str = "",
    peers: tuple[str, ...] = (LOOP, DIAGONALS),
    modes: tuple[str, ...] = (FORWARD, BACKWARD, TRAINING),
    goals: Mapping[tuple[str, str], float] | None = None,
    devices: tuple[str, ...] = ("cpu",),
    check_steps: int | None = None,
) -> Case:
    functions = {LOOP: node_loop, DIAGONALS: antidiagonals}
    builders = {name: partial(build, shape, functions[name], shape.dtype) for name in peers}
    builders |= {
        OURS: partial(build, shape, call_ours, shape.dtype),
        REFERENCE: partial(build, shape, antidiagonals, torch.float64),
    }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    directional = "directional" if shape.directional else ""
    return Case(
        op="grid_scan",
        name=" ".join(part for part in ("grid_scan", precision, sizes, directional, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.X,
        builders=builders,
        flops={mode: FLOPS[mode] * shape.values for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(LOOP, mode): 20 for mode in (FORWARD, TRAINING) if mode in modes} if goals is None else goals,
        check_steps=check_steps if check_steps and check_steps < shape.X else None,
        devices=devices,
        yardsticks={(SAME_BYTES, mode): partial(build_same_bytes, shape, mode) for mode in modes if mode != INFERENCE},
    )


# As for the other scans. Where tensors fit into the last cache, what moves the same bytes stays in a smaller one.
NEAR_MEMORY = {(SAME_BYTES, FORWARD): 0.8, (SAME_BYTES, BACKWARD): 0.8, (SAME_BYTES, TRAINING): 1 / 1.3}

CPU_CASES = [
    make_case(Shape(8, 14, 14, 6, 32)),
    make_case(Shape(8, 14, 14, 6, 32, torch.bfloat16)),
    make_case(Shape(8, 14, 14, 6, 32, directional=True)),
    make_case(Shape(1, 64, 64, 4, 64), "one picture", check_steps=16),
    make_case(Shape(2, 64, 64, 1, 16), "few channels", check_steps=16),
    # Larger than caches. A loop over its nodes would take a second a call.
    make_case(Shape(4, 64, 64, 8, 64), "in memory", peers=(DIAGONALS,), goals=NEAR_MEMORY, check_steps=16),
]

# Goals are for the loop, of which a GPU runs as many kernels as the grid has nodes.
GPU_CASES = [
    make_case(shape, "GPU", modes=(FORWARD, BACKWARD), goals={(LOOP, FORWARD): 20}, devices=("cuda",), check_steps=16)
    for dtype in (torch.float32, torch.bfloat16)
    for shape in (Shape(64, 14, 14, 6, 64, dtype), Shape(8, 64, 64, 8, 64, dtype), Shape(1, 128, 128, 1, 64, dtype))
]

CASES = [*CPU_CASES, *GPU_CASES]
