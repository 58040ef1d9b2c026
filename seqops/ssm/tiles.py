"""What the tuner solves for the Triton kernels of ssm_kernel and cauchy_kernel: the sizes of a program's tile.

Letters: H heads, N modes of a head, L length or nodes.
"""

from __future__ import annotations

from typing import Any

from ..tune import csp

POWERS = tuple(1 << i for i in range(18))
COLUMNS, ROWS = (32, 64, 128), (8, 16, 32)
BLOCKS = (64, 128, 256, 512)
WARPS = 4  # of a program
TILES = {4: 2048, 8: 1024}  # numbers of the largest tile, by their bytes: 16, or 8 doubles, a thread
HEADS = 8  # of which gradients of nodes are one sum


def problem(device: Any, key: Any) -> csp.Problem:
    """`columns` and `rows` of a tile of ssm_kernel, for the least estimated time in microseconds."""
    heads, modes, length = key["H"], key["N"], key["L"]
    size = 8 if key.dtype == "complex128" else 4
    backward = ".backward" in key.kernel
    p = csp.Problem(str(key))
    columns = p.int("columns", values=COLUMNS)
    rows = p.int("rows", values=ROWS)
    p.add(columns * rows <= TILES[size], "a tile fits into registers")
    tiles = p.define("tiles", csp.ceildiv(length, columns * rows) * heads)

    cycle = 1e-3 / device.clock_ghz
    # Of a mode and a tile: two products, or four with their sums; and what loads rows and columns, and waits.
    work = columns * rows * ((10 if backward else 2) * (2 if size == 8 else 1) / (32 * WARPS)) + 60
    waves = csp.ceildiv(tiles, 4 * device.processors)
    product = waves * work * (4 * modes * cycle)
    # Tables: a hundred operations in double for a number of each.
    tables = (columns + csp.ceildiv(length, columns)) * (heads * modes * (100 * cycle / (32 * device.processors)))
    p.minimize(product + tables + 3 * device.launch_us, then=columns)
    return p


def problem_of_cauchy(device: Any, key: Any) -> csp.Problem:
    """`block`, the nodes of a program, for the least estimated time in microseconds."""
    heads, modes, nodes = key["H"], key["N"], key["L"]
    double = key.dtype == "complex128"
    backward = ".backward" in key.kernel
    p = csp.Problem(str(key))
    block = p.int("block", values=BLOCKS)
    together = HEADS if backward else 1
    programs = csp.ceildiv(nodes, block) * (-(-heads // together) if backward else heads)
    cycle = 1e-3 / device.clock_ghz
    work = block * ((70 if backward else 40) * (4 if double else 1) / (32 * WARPS)) + (200 if backward else 60)
    waves = csp.ceildiv(programs, 4 * device.processors)
    p.minimize(waves * work * (4 * modes * together * cycle) + device.launch_us, then=block)
    return p
