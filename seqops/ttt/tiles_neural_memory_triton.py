"""What the Triton kernels of neural_memory are launched with (triton_kernels_neural_memory.py): the tuner's problem.

A program walks the chunks of a head. Its products are of tiles of `rows` tokens by `columns` channels; the programs of
a linear memory own `owned` rows of the weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tune import csp

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
POWERS = tuple(1 << n for n in range(18))
PAIRS = (16, 32, 64, 128)  # columns that one program of the coefficients takes


class Shape(NamedTuple):
    rows: int  # tokens of a tile
    owned: int  # rows of a tile of weights
    columns: int  # channels of a tile
    inner: int  # channels that a product sums at a time
    warps: int


def shapes(direction: str, dtype: str) -> tuple[Shape, ...]:
    """Those that spill nothing, the shortest tiles first. The backward, of many products, has no registers to spare."""
    if SIZES[dtype] == 8:
        return (Shape(16, 16, 16, 16, 8 if direction == "backward" else 4),)
    if SIZES[dtype] == 4:
        return (Shape(16, 32, 32, 16, 4),)
    if direction == "backward" or dtype == "float16":
        return (Shape(16, 32, 32, 32, 8),)
    return Shape(16, 64, 64, 64, 8), Shape(64, 32, 32, 32, 8)


def shape(direction: str, dtype: str, rows: int) -> Shape:
    """The one of tiles of `rows` tokens."""
    of = {each.rows: each for each in shapes(direction, dtype)}
    if rows not in of:
        exist = ", ".join(map(str, of))
        raise RuntimeError(f"neural_memory.triton: no kernel of {rows} tokens for {dtype}; tokens that exist: {exist}")
    return of[rows]


# ---- the choice

STEP_CYCLES = 700  # a tile's loads from the second cache, its product, and barriers, by estimate


def problem(device: Any, key: Any) -> csp.Problem:
    """Tokens of a tile, and the time in microseconds of the chunks of one head: C tokens, D and F channels."""
    backward = ".backward." in key.kernel
    chunk, channels, hidden = key["C"], key["D"], key["F"]
    every = shapes("backward" if backward else "forward", key.dtype)
    p = csp.Problem(str(key))
    rows = p.int("rows", values=tuple(each.rows for each in every))
    rate = device.fma_bf16 if SIZES[key.dtype] == 2 else device.fma_f32
    costs = []
    for each in every:
        tiles = -(-chunk // each.rows)
        wide, narrow = -(-hidden // each.columns), -(-channels // each.columns)
        deep, flat = -(-hidden // each.inner), -(-channels // each.inner)
        # Products of tokens with weights, of tokens with tokens, and what weights receive.
        steps = tiles * (wide * flat * 3 + narrow * deep * 2 + tiles * (wide + narrow + deep + flat))
        steps += (2 if hidden else 1) * tiles * max(wide, 1) * narrow * max(each.columns // each.owned, 1)
        if not hidden:
            steps += tiles * 2 * narrow * flat
        work = each.rows * each.columns * each.inner / rate
        costs.append((each.rows, steps * (STEP_CYCLES + work) / (1e3 * device.clock_ghz)))
    cost = sum((csp.where(rows == which, value, 0) for which, value in costs), start=0 * rows)
    p.minimize(cost * (3 if backward else 1) + device.launch_us, then=(rows,))
    return p
