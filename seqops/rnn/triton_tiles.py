"""What the Triton kernels of the recurrent operators are launched with (triton_kernels.py): the tuner's problem.

A program of `rows` batch rows holds a head's weights where they leave registers enough for the rest, and walks all
steps. Wider heads are walked with the weights in the second cache, by one program up to 128 units, beyond that by one
launch a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tune import csp

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
SEQUENCES = {  # a unit and step: what the forward reads and, in training, writes; what the backward does
    "lstm": (10, 11),
    "gru": (8, 10),
    "slstm": (12, 12),
    "elman": (2, 3),
}
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}

WIDTHS = (16, 32, 64, 128)  # units of a block, padded
HEADS = tuple(1 << n for n in range(11))
BATCHES = tuple(1 << n for n in range(4, 13))


class Kernel(NamedTuple):
    """A kernel of one cell in one dtype. `units`: D, padded to one of WIDTHS; 0: beyond them."""

    op: str
    direction: str
    dtype: str
    units: int

    @staticmethod
    def of(key: Any) -> Kernel:
        op, direction, _ = key.kernel.split(".")
        return Kernel(op, direction, key.dtype, key["D"])

    @property
    def name(self) -> str:
        return f"{self.op}.{self.direction}"

    @property
    def narrow(self) -> bool:
        return SIZES[self.dtype] == 2

    @property
    def holds(self) -> bool:
        """Whether a program holds the weights. Wider ones spill registers, by the compiler."""
        most = 64 if self.narrow or (self.direction == "forward" and self.op != "slstm") else 32
        return 0 < self.units <= (128 if self.op == "elman" and self.narrow else most)

    def shapes(self) -> list[Shape]:
        """What does not spill; the first has the fewest rows.

        But for one: in training the sLSTM of 64 units spills a few words on some architectures where sizes or addresses
        are no multiples of 16.
        """
        if self.holds:
            rows = (16, 32) if self.narrow and self.units == 16 else (16,)
            return [Shape(each, self.units, self.units, self.warps(each), 1) for each in rows]
        return [Shape(16, 32, 32, 8, 2) if self.narrow else Shape(16, 32, 16, 8, 1)]

    def warps(self, rows: int) -> int:
        """8 units each, what one mma makes; of 16 rows each where that leaves few warps. Without mma twice as many.

        Twice as many again where the sLSTM would spill its addresses if rows are not aligned: 16 units in 16 bits, and
        the backward of 32 in float32.
        """
        if self.narrow:
            twice = 2 if self.op == "slstm" and self.units == 16 else 1
            return self.units // 8 * (rows // 16 if self.units < 64 else 1) * twice
        return 16 if (self.op, self.direction, self.units) == ("slstm", "backward", 32) else min(self.units // 4, 8)


class Shape(NamedTuple):
    rows: int
    units: int  # of a program
    depth: int  # inputs of the product at a time
    warps: int
    stages: int  # of loads on their way, where weights are not held


def padded(units: int) -> int:
    return next((width for width in WIDTHS if units <= width), 0)


# ---- the choice

PLANE_CYCLES = 80  # a block of one sequence changes its layout between memory and the product, by estimate
POINTWISE_CYCLES = 200  # a cell, by estimate


def problem(device: Any, key: Any) -> csp.Problem:
    """Rows of a program, and the time in microseconds of one step of B rows of H heads."""
    kernel = Kernel.of(key)
    shape = kernel.shapes()[0]
    p = csp.Problem(str(key))
    rows = p.int("rows", values=[each.rows for each in kernel.shapes()])
    tiles = rows / 16
    units = kernel.units or shape.units
    multiplied = GATES[kernel.op] * units * units * 16
    if kernel.narrow:
        product = tiles * max(multiplied / 2048 / 4 * device.mma_issue_cycles, units / 16 * device.mma_cycles)
    else:
        product = tiles * (multiplied / device.fma_f32)
    planes = SEQUENCES[kernel.op][kernel.direction == "backward"]
    cell = (POINTWISE_CYCLES + planes * PLANE_CYCLES) * (1 + tiles) / 2
    waves = csp.ceildiv(key["H"] * csp.ceildiv(key["B"], rows), device.processors)
    p.minimize(waves * (product + cell) / (1e3 * device.clock_ghz), then=rows)
    return p


def shape(kernel: Kernel, rows: int) -> Shape:
    """The one of `rows`, which may have been forced on a kernel that has none."""
    found = {each.rows: each for each in kernel.shapes()}
    if rows not in found:
        where = f"for {kernel.dtype} and {f'D up to {kernel.units}' if kernel.units else f'D above {WIDTHS[-1]}'}"
        exist = ", ".join(map(str, found))
        raise RuntimeError(f"{kernel.name}.triton has no kernel of {rows} rows {where}; rows that exist: {exist}")
    return found[rows]
