"""What the Triton kernels around the transforms of fft_conv are launched with: the tuner's problem."""

from __future__ import annotations

from typing import Any

from ..tune import csp

POWERS = tuple(1 << n for n in range(22))
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
TIMES = (32, 64, 128)  # steps of a tile
WIDTHS = (8, 16, 32, 64)  # channels of a tile
MOST_OF_TILE = 2048  # numbers: 16 a thread; with 32 the reading kernel spills
SECTOR, LINE = 32, 128  # bytes that memory gives at once, and likes to
# Arrays of a block that pass between kernels: numbers, their transforms, the product and what comes back.
ARRAYS = {"forward": 4, "backward": 8}
LAUNCHES = {"forward": 7, "backward": 14}


def problem(device: Any, key: Any) -> csp.Problem:
    """`time` and `width` of a tile, `rows` transformed together, and the time in microseconds.

    The cost is that of R rows of T steps through transforms of F numbers: bytes of the sequences, with what tiles waste
    of a sector; bytes of everything between the kernels, from the second cache where a block fits half of it, else
    from memory; and launches, of which every block has as many.
    """
    direction = key.kernel.split(".")[1]
    size, real = SIZES[key.dtype], max(SIZES[key.dtype], 4)
    rows, time, numbers = key["R"], key["T"], key["F"]

    p = csp.Problem(str(key))
    steps = p.int("time", values=TIMES)
    width = p.int("width", values=WIDTHS)
    together = p.int("rows", values=[n for n in POWERS if n <= max(rows, 8)])
    shared = p.define("shared", steps * width * real)
    p.add(steps * width <= MOST_OF_TILE, "numbers of a thread")
    p.add(shared <= device.shared_per_block, "shared memory of a block")
    p.add(together >= width, "rows for a tile")
    blocks = p.define("blocks", csp.ceildiv(rows, together))
    block_bytes = together * (ARRAYS[direction] * numbers * real)
    p.add((block_bytes <= 2 * device.l2_bytes) | (together == WIDTHS[0]), "memory of a block")

    sequences = (2 if direction == "forward" else 4) * rows * time * size / device.bandwidth
    waste = csp.max_(1, SECTOR / (width * size)) + csp.max_(0, LINE - width * size) / (4 * LINE)
    turned = csp.max_(1, SECTOR / (steps * real))
    between = 3 * ARRAYS[direction] * rows * numbers * real / device.bandwidth
    far = csp.where(block_bytes * 2 <= device.l2_bytes, between / 3, between)
    # A block with fewer numbers than threads leaves processors idle, in each of its launches.
    full = device.processors * 1024
    idle = csp.max_(1, full / (together * numbers))
    p.minimize(
        sequences * waste + far * turned * idle + blocks * (LAUNCHES[direction] * device.launch_us),
        then=(together, width, steps),
    )
    return p


def fast_length(least: int) -> int:
    """The smallest even number from `least` on that is a power of two times 1, 3, 5, 9 or 15."""
    lengths = []
    for odd in (1, 3, 5, 9, 15):
        length = 2 * odd
        while length < least:
            length *= 2
        lengths.append(length)
    return min(lengths)
