"""How the Triton kernels of grid_scan divide the grid: the tuner's problem.

A program has `width` channels of a head and walks the grid in strips of `rows` rows, one lane a row, all on an
antidiagonal: more rows are fewer steps, and more threads.
"""

from __future__ import annotations

from typing import Any

from ..tune import csp
from .tiles import TRITON_SIZES, overlapping

ROWS, WIDTHS = (1, 2, 4, 8, 32), (8, 32, 64)
ELEMENTS = 64  # of a block, for each warp: twice as many take more than 255 registers a thread
SHAPES = tuple((rows, width) for rows in ROWS for width in WIDTHS if rows * width in (ELEMENTS, 4 * ELEMENTS))


def depth(gates: bool) -> int:
    """Steps that a lane reads ahead, as many as registers hold: a step is seven values, ten with gradients of gates."""
    return 2 if gates else 4


def warps(rows: int, width: int, dtype: str) -> int:
    """Of a program; doubles take twice the registers, and are spread over twice the threads."""
    return rows * width // ELEMENTS * (2 if dtype == "float64" else 1)


def problem_in_triton(device: Any, key: Any) -> csp.Problem:
    """Rows of a strip and channels of a program, and the time in microseconds, for N heads of X x Y nodes."""
    size, backward = TRITON_SIZES[key.dtype], key.kernel.partition(".")[2].startswith("backward")
    heads, X, Y, D = (key[name] for name in "NXYD")
    tensors, gates = (6, 8) if backward else (4, 4)

    p = csp.Problem(str(key))
    rows, width = p.int("rows", values=ROWS), p.int("width", values=WIDTHS)
    p.add((rows * width == ELEMENTS) | (rows * width == 4 * ELEMENTS), "one warp, or four")
    programs = p.define("programs", heads * csp.ceildiv(D, width))
    strips = csp.ceildiv(X, rows)
    # Warps that are there at once: each lane holds what it reads ahead in registers.
    resident = device.processors * min(device.blocks_per_processor, device.registers_per_processor // (32 * 256))
    waves = csp.ceildiv(programs * rows * width, resident * ELEMENTS)
    steps = strips * (Y + rows - 1)
    # Where a strip has several rows, its lanes hand on through shared memory or shuffles.
    step_us = 2 * device.memory_latency_us / depth(backward) + csp.where(
        rows == 1, 0, device.sync_cycles * 1e-3 / device.clock_ghz
    )
    nodes = heads * X * Y
    moved = nodes * (tensors * D + gates) * size / device.bandwidth
    # A row between strips is written and read again, at about twice the memory's rate; short rows waste of each sector.
    between = strips * (heads * Y * D * 8 / (2 * device.bandwidth))
    waste = csp.max_(1, 32 / (width * size))
    p.minimize(device.launch_us + overlapping(waves * steps * step_us, moved * waste + between), then=(-width, rows))
    return p
