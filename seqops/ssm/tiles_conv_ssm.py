"""What the tuner solves for conv_ssm's Triton kernel: whether it pays to join scan and products.

The joined kernel moves no states through memory but walks time step by step, all pixels side by side: it needs many
pixels. Apart, cuBLAS and the parallel scan fill a GPU whatever the shape, and move every state four times.

Letters: M pixels of the batch (B Y X), T time, U channels of a frame, P complex channels of the state.
"""

from __future__ import annotations

from typing import Any

from ..tune import csp

ROWS = (16,)  # pixels of a program: the least that tensor cores take; with 32 the compiler spills
WIDTHS = (16, 32, 64)  # channels of a block of the state
POWERS = tuple(1 << i for i in range(21))
FLOATS = {"forward": 3, "recall": 5, "backward": 5}  # numbers a state that a step holds, each of two floats
THREAD = 128  # floats of a thread in them, of 255 registers


def blocks(width: int) -> tuple[int, int]:
    """NP and BP for P channels: a power of two of blocks, so that few kernels exist."""
    wide = next((each for each in WIDTHS if width <= each), WIDTHS[-1])
    return 1 << max(-(-width // wide) - 1, 0).bit_length(), wide


def warps(width: int) -> int:
    """Each has 8 channels of a block of the state, the least that a tensor core takes, or several times as many."""
    return max(blocks(width)[1] // 8, 4)


def fits(walk: str, rows: int, width: int) -> bool:
    """Whether what a step holds leaves registers for the products."""
    count, wide = blocks(width)
    return FLOATS[walk] * 2 * rows * count * wide <= THREAD * 32 * warps(width)


def problem(device: Any, key: Any) -> csp.Problem:
    """`joined` 1 or 0, and `rows`, for the least estimated time in microseconds."""
    walk = key.kernel.split(".")[1]
    pixels, time, channels, width = key["M"], key["T"], key["U"], key["P"]
    given = "given" in key.flags
    p = csp.Problem(str(key))
    joined = p.int("joined", values=(0, 1))
    rows = p.int("rows", values=ROWS)
    for each in ROWS:
        if not fits(walk, each, width):
            p.add((joined == 0) | (rows != each), f"states of {each} pixels fit into registers")

    # The input product, the output product and that of d; of a product of parts two.
    macs = width * channels * (2 if given else 4) + channels * channels
    weights = 4 * macs
    clock = device.clock_ghz * 1e3  # cycles a microsecond
    passes = {"forward": 4, "backward": 6}[walk]  # over all states, where each operator stands by itself
    moved = pixels * time * 8.0 * width / device.bandwidth
    apart = passes * moved + pixels * time * macs / (device.fma_f32 * device.processors * clock) + 4 * device.launch_us
    # Three products of tf32 halves, each at half the rate of bfloat16; weights from L2, 64 bytes a cycle.
    tensor = rows * (macs * 6 / (device.fma_bf16 * clock))
    step = csp.max_(tensor, weights / (64 * clock)) + 4 * device.l2_hit_us
    waves = csp.ceildiv(csp.ceildiv(pixels, rows), device.processors)
    stored = {"forward": 1 if given else 0, "backward": 2}[walk] * moved
    together = csp.max_(waves * step * time, stored) + device.launch_us
    p.minimize(csp.where(joined == 1, together, apart), then=rows)
    return p
