"""Cases of prob_sparse_attention, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py, U samples of a query and as many selected queries, 5 ln T rounded up.

Peers:

* `published form` is the operator as it is usually written: the sampled keys as a tensor [B, H, T, U, D], products with
  them, `topk`, full attention of the selected queries, and rows written into the mean or the running sum of v.
* `SDPA, all queries` attends with every query. It computes something else, and is what the selection saves.

The reference is the published form in float64.
"""

from functools import partial

import torch
from torch import Tensor

from bench.attention_peers import Shape, build, dense, triangle
from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

PUBLISHED = "published form"
FULL = "SDPA, all queries"


def draw_samples(steps: int, samples: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, steps, (steps, samples), generator=generator).to(device)


def ours(q: Tensor, k: Tensor, v: Tensor, samples: Tensor, causal: bool) -> Tensor:
    import seqops

    return seqops.prob_sparse_attention(q, k, v, samples, samples.shape[1], causal=causal)


def published(q: Tensor, k: Tensor, v: Tensor, samples: Tensor, causal: bool) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    B, H, T, D = q.shape
    top = min(samples.shape[1], T)
    with torch.no_grad():
        sampled = k.unsqueeze(2).expand(B, H, T, T, D)[:, :, torch.arange(T).unsqueeze(1), samples]
        products = (q.unsqueeze(3) @ sampled.mT).squeeze(3)
        measure = products.max(-1).values - products.sum(-1) / T
        chosen = measure.topk(top, sorted=False).indices
    rows = (torch.arange(B)[:, None, None], torch.arange(H)[:, None], chosen)
    scores = q[rows] @ k.mT * D**-0.5
    if causal:
        scores = scores.masked_fill(torch.arange(T, device=q.device) > chosen.unsqueeze(3), -torch.inf)
        context = v.cumsum(2)
    else:
        context = v.mean(2, keepdim=True).expand(B, H, T, D).clone()
    return context.index_put(rows, scores.softmax(-1) @ v).transpose(1, 2)


def build_sampled(
    shape: Shape, samples: int, function: object, causal: bool, dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    index = draw_samples(steps, samples, device)
    return build(shape, partial(function, samples=index, causal=causal), dtype, steps, device)


def build_full(shape: Shape, causal: bool, steps: int, device: str = "cpu") -> Contender:
    return build(shape, partial(dense, causal=causal), shape.dtype, steps, device)


def count_flops(shape: Shape, samples: int, causal: bool, mode: str) -> int:
    """Products with samples, which have no gradient; and the attention of the selected queries, causal half of it."""
    pairs = samples * (triangle(shape.T) / shape.T if causal else shape.T)
    attention = shape.count_flops(int(pairs), mode)
    return attention + 2 * shape.B * shape.H * shape.T * samples * shape.D


def case(shape: Shape, samples: int, *words: str, causal: bool = False, devices: tuple[str, ...] = ("cpu",)) -> Case:
    modes = (FORWARD, TRAINING)
    names = ("prob_sparse_attention", *(f"{letter}{size}" for letter, size in shape.letters.items()), f"U{samples}")
    return Case(
        op="prob_sparse_attention",
        name=" ".join((*names, *(("causal",) if causal else ()), *words)),
        shape=shape.letters | {"U": samples},
        dtype=shape.dtype,
        steps=shape.T,
        builders={
            PUBLISHED: partial(build_sampled, shape, samples, published, causal, shape.dtype),
            OURS: partial(build_sampled, shape, samples, ours, causal, shape.dtype),
            REFERENCE: partial(build_sampled, shape, samples, published, causal, torch.float64),
        },
        flops={mode: count_flops(shape, samples, causal, mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(PUBLISHED, mode): 3.0 for mode in modes},
        check_steps=300 if shape.T > 300 else None,
        devices=devices,
        yardsticks={(FULL, mode): partial(build_full, shape, causal) for mode in modes},
    )


CPU_CASES = [
    case(Shape(2, 1024, 8, 64), 35),
    case(Shape(2, 1024, 8, 64), 35, causal=True),
    case(Shape(8, 96, 8, 64), 25),
]
GPU_CASES = [case(Shape(32, T, 8, 64), U, "GPU", devices=("cuda",)) for T, U in ((1024, 35), (4096, 45))]
CASES = [*CPU_CASES, *GPU_CASES]
