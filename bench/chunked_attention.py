"""Cases of chunked_attention, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py, C positions of a chunk. The peer beside those of that file:

* `SDPA of chunks` reshapes [B, T, H, D] to chunks as rows of a batch, without a copy, and calls SDPA; the shorter last
  chunk, where there is one, is a second call and their results are joined.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.attention_peers import DENSE, FLEX, Shape, dense, make_case, positions, triangle
from bench.harness import FORWARD, TRAINING, Case

CHUNKS = "SDPA of chunks"


def ours(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, causal: bool) -> Tensor:
    import seqops

    return seqops.chunked_attention(q, k, v, chunk_size, causal=causal)[0]


def chunks_as_rows(q: Tensor, k: Tensor, v: Tensor, chunk_size: int, causal: bool) -> Tensor:
    steps = q.shape[1]
    whole = steps - steps % chunk_size
    parts = []
    if whole:
        rows = (x[:, :whole].unflatten(1, (-1, chunk_size)).flatten(0, 1) for x in (q, k, v))
        parts.append(dense(*rows, causal=causal).unflatten(0, (q.shape[0], -1)).flatten(1, 2))
    if whole < steps:
        parts.append(dense(*(x[:, whole:] for x in (q, k, v)), causal=causal))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def visible(chunk_size: int, causal: bool, b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    same = i // chunk_size == j // chunk_size
    return same & (j <= i) if causal else same


def mask(steps: int, device: str, chunk_size: int, causal: bool) -> Tensor:
    return visible(chunk_size, causal, None, None, *positions(steps, device))


def count_pairs(steps: int, chunk_size: int, causal: bool) -> int:
    inside = triangle if causal else lambda size: size * size
    return steps // chunk_size * inside(chunk_size) + inside(steps % chunk_size)


def case(shape: Shape, chunk_size: int, *words: str, causal: bool = True, gpu: bool = False) -> Case:
    options = {"chunk_size": chunk_size, "causal": causal}
    both = (FORWARD, TRAINING)
    # Without a shorter last chunk, SDPA computes nothing that ours does not.
    goals = {(CHUNKS, mode): 1.0 for mode in both} if shape.T % chunk_size == 0 else {}
    goals |= {(DENSE, mode): 3.0 for mode in both} | ({(FLEX, mode): 1.2 for mode in both} if gpu else {})
    return make_case(
        "chunked_attention",
        shape,
        partial(mask, **options),
        count_pairs(shape.T, **options),
        ours=partial(ours, **options),
        words=(f"C{chunk_size}", "" if causal else "not causal", *words),
        peers={CHUNKS: partial(chunks_as_rows, **options)},
        visible=partial(visible, chunk_size, causal) if gpu else None,
        goals=goals if shape.T >= 4096 else {},
        devices=("cuda",) if gpu else ("cpu",),
    )


CPU_CASES = [
    case(Shape(2, 4096, 8, 64), 256),
    case(Shape(2, 4096, 8, 64), 256, causal=False),
    case(Shape(2, 4096, 8, 64, dtype=torch.bfloat16), 256),
    case(Shape(2, 4000, 8, 64), 256, "a shorter last chunk"),
    case(Shape(2, 4096, 8, 64), 16),
    case(Shape(2, 4096, 8, 64, Hk=2), 256),
]
GPU_CASES = [
    case(Shape(B, T, 16, D, dtype=torch.bfloat16), C, "GPU", gpu=True)
    for B, T, D, C in ((8, 8192, 64, 512), (4, 16384, 128, 2048), (8, 8192, 64, 64))
]
CASES = [*CPU_CASES, *GPU_CASES]
