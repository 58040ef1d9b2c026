"""Cases of range_attention: a pattern of two ranges a query, the first keys and a window, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py. The ranges, like the mask of the peers, are made beforehand.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.attention_peers import DENSE, FLEX, Shape, build, make_case, positions
from bench.harness import FORWARD, OURS, TRAINING, Case, Contender

SINKS, WINDOW = 16, 256


def make_ranges(steps: int, device: str) -> Tensor:
    """[1, 1, 2, 2, T]: the first keys, and the last WINDOW that are not among them."""
    t = torch.arange(steps, device=device)
    end = t + 1
    start = torch.clamp(end - WINDOW, min=0)
    split = torch.clamp(start, min=SINKS).minimum(end)
    sinks = torch.stack([torch.zeros_like(t), end.clamp(max=SINKS)])
    return torch.stack([sinks, torch.stack([split, end])]).to(torch.int32)[None, None]


def visible(b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    return (j <= i) & ((j < SINKS) | (i - j < WINDOW))


def mask(steps: int, device: str) -> Tensor:
    return visible(None, None, *positions(steps, device))


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> Tensor:
    import seqops

    return seqops.range_attention(q, k, v, ranges)[0]


def build_ours(shape: Shape, steps: int, device: str = "cpu") -> Contender:
    return build(shape, partial(attend, ranges=make_ranges(steps, device)), shape.dtype, steps, device)


def count_pairs(steps: int) -> int:
    return sum(min(i + 1, SINKS) + max(i + 1 - max(SINKS, i + 1 - WINDOW), 0) for i in range(steps))


def case(shape: Shape, *words: str, gpu: bool = False) -> Case:
    modes = (FORWARD, TRAINING)
    return make_case(
        "range_attention",
        shape,
        mask,
        count_pairs(shape.T),
        words=(f"window {WINDOW}, {SINKS} first", *words),
        visible=visible if gpu else None,
        builders={OURS: partial(build_ours, shape)},
        goals={(DENSE, mode): 3.0 for mode in modes} | ({(FLEX, mode): 1.2 for mode in modes} if gpu else {}),
        devices=("cuda",) if gpu else ("cpu",),
    )


CPU_CASES = [
    case(Shape(2, 4096, 8, 64)),
    case(Shape(2, 4096, 8, 64, dtype=torch.bfloat16)),
    case(Shape(2, 4001, 8, 64, Hk=2)),
]
GPU_CASES = [case(Shape(8, 8192, 16, D, dtype=torch.bfloat16), "GPU", gpu=True) for D in (64, 128)]
CASES = [*CPU_CASES, *GPU_CASES]
