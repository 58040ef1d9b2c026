"""Cases of block_diffusion_attention, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py, T both halves together, S positions of a block. The peer beside those of
that file:

* `SDPA of halves` is what is written in plain PyTorch: the noisy rows over all keys, and the clean rows over the clean
  keys, two calls of SDPA with their masks. It leaves out the quarter that nothing sees.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.attention_peers import DENSE, FLEX, Shape, dense, make_case, positions
from bench.harness import FORWARD, TRAINING, Case

HALVES = "SDPA of halves"


def ours(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> Tensor:
    import seqops

    return seqops.block_diffusion_attention(q, k, v, block_size)[0]


def visible(half: int, block_size: int, b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    of_query, of_key = i % half // block_size, j % half // block_size
    noisy = (i < half) & (((j < half) & (of_query == of_key)) | ((j >= half) & (of_key < of_query)))
    return noisy | ((i >= half) & (j >= half) & (of_key <= of_query))


def mask(steps: int, device: str, block_size: int) -> Tensor:
    return visible(steps // 2, block_size, None, None, *positions(steps, device))


def halves(q: Tensor, k: Tensor, v: Tensor, block_size: int) -> Tensor:
    half = q.shape[1] // 2
    block = torch.arange(half, device=q.device) // block_size
    own, before = block[:, None] == block, block < block[:, None]
    noisy = dense(q[:, :half], k, v, torch.cat([own, before], 1))
    return torch.cat([noisy, dense(q[:, half:], k[:, half:], v[:, half:], own | before)], 1)


def count_pairs(steps: int, block_size: int) -> int:
    """L^2 + L S where the last block is full."""
    half = steps // 2
    sizes = [min(block_size, half - first) for first in range(0, half, block_size)]
    # Noisy and clean rows of a block see as many keys.
    return sum(2 * size * (first * block_size + size) for first, size in enumerate(sizes))


def case(shape: Shape, block_size: int, *words: str, gpu: bool = False) -> Case:
    both = (FORWARD, TRAINING)
    return make_case(
        "block_diffusion_attention",
        shape,
        partial(mask, block_size=block_size),
        count_pairs(shape.T, block_size),
        ours=partial(ours, block_size=block_size),
        words=(f"S{block_size}", *words),
        peers={HALVES: partial(halves, block_size=block_size)},
        visible=partial(visible, shape.T // 2, block_size) if gpu else None,
        goals={(DENSE, mode): 3.0 for mode in both} | ({(FLEX, mode): 1.2 for mode in both} if gpu else {}),
        devices=("cuda",) if gpu else ("cpu",),
    )


CPU_CASES = [
    case(Shape(1, 4096, 8, 64), 32),
    case(Shape(1, 4096, 8, 64), 256),
    case(Shape(1, 4000, 8, 64, Hk=2), 32, "a shorter last block"),
    case(Shape(1, 4096, 8, 64, dtype=torch.bfloat16), 32),
]
GPU_CASES = [
    case(Shape(B, T, 16, D, dtype=torch.bfloat16), S, "GPU", gpu=True)
    for B, T, D, S in ((8, 4096, 128, 32), (4, 8192, 64, 256))
]
CASES = [*CPU_CASES, *GPU_CASES]
