"""What the Triton kernels of newton_schulz are launched with: the tuner's problem.

Matrices with few rows are iterated by a kernel that has a whole one. Of others each product is a kernel, in square
tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tune import csp

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
POWERS = tuple(1 << n for n in range(18))


class Tile(NamedTuple):
    """Of a product: its rows and columns, how far it sums at once, warps, and stages of its loads."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": 255}


class Whole(NamedTuple):
    """Of a kernel that has a matrix with at most `rows` rows, and of its columns as many at a time."""

    rows: int
    columns: int
    warps: int

    def options(self) -> dict[str, Any]:
        return {"num_warps": self.warps, "num_stages": 1, "maxnreg": min(255, 65536 // (32 * self.warps))}


INTERPRETED = Tile(32, 32, 32, 4, 1)
HALVES = (Tile(64, 64, 64, 4, 3), Tile(128, 128, 32, 8, 4))
SHAPES = {
    "bfloat16": HALVES,
    "float16": HALVES,
    "float32": (Tile(64, 64, 32, 8, 3),),
    "float64": (Tile(32, 32, 16, 8, 1),),
}
WHOLE_HALVES = (Whole(16, 64, 4), Whole(32, 64, 4), Whole(64, 64, 8))
WHOLE = {
    "bfloat16": WHOLE_HALVES,
    "float16": WHOLE_HALVES,
    "float32": (Whole(16, 32, 4), Whole(32, 32, 4), Whole(64, 16, 8)),
    "float64": (Whole(16, 16, 4), Whole(32, 16, 8)),
}
MOST_COLUMNS = 16  # of a matrix that one program has, for each row


def shape(dtype: str, rows: int) -> Tile:
    """The one of tiles of `rows` rows."""
    of = {each.rows: each for each in SHAPES[dtype]}
    if rows not in of:
        exist = ", ".join(map(str, of))
        raise RuntimeError(f"newton_schulz.triton: no kernel of {rows} rows for {dtype}; rows that exist: {exist}")
    return of[rows]


def whole(dtype: str, rows: int, columns: int) -> Whole | None:
    """The least one for matrices with so many rows, if there is one, and the columns are not too many for a program."""
    found = next((each for each in WHOLE[dtype] if each.rows >= rows), None)
    return None if found is None or columns > MOST_COLUMNS * found.rows else found


# ---- the choice

CACHE_BYTES = 64  # a clock and processor from the second cache
START_CYCLES = 1500  # of a program before its first product, and after its last, by estimate


def problem(device: Any, key: Any) -> csp.Problem:
    """Rows of a tile, and the time in microseconds of one step of n matrices [m, N].

    A program sums tiles of two operands; it waits for its multiplications, or for its operands from the second cache.
    """
    count, m, N = key["n"], key["M"], key["N"]
    size, backward = SIZES[key.dtype], ".backward." in key.kernel
    rate = {2: device.fma_bf16, 4: device.fma_bf16 / 6, 8: device.fma_f32 / 2}[size]  # of tf32 a product is three

    p = csp.Problem(str(key))
    rows = p.int("rows", values=tuple(each.rows for each in SHAPES[key.dtype]))
    costs = []
    for each in SHAPES[key.dtype]:
        wide, high = -(-N // each.columns), -(-m // each.rows)
        triangle = high * (high + 1) // 2
        # Programs, and how far each sums: A, its polynomial, the step; and twice all of that for the adjoint.
        products = [(triangle, N), (triangle, m), (high * wide, m)]
        products += [(programs, 2 * length) for programs, length in products] if backward else []
        work = each.rows * each.columns / rate
        loaded = (each.rows + each.columns) * size / CACHE_BYTES
        cycles = 0.0
        for programs, length in products:
            waves = -(-count * programs // device.processors)
            cycles += waves * (START_CYCLES + length * max(work, loaded))
        costs.append((each.rows, cycles / (1e3 * device.clock_ghz)))
    cost = sum((csp.where(rows == which, value, 0) for which, value in costs), start=0 * rows)
    p.minimize(cost + (6 if backward else 3) * device.launch_us, then=(rows,))
    return p
