"""Cases of gathered_attention.

Letters: those of bench/attention_peers.py, K lists, w entries of each. Lists are those of `cluster_assign` in causal
mode from random centroids: of about T / K tokens, with pads up to w; every token is in one list. Peers, plain PyTorch:

* `gathered lists`: rows gathered to [B, H K, w, D], SDPA with a mask of pads and of time, and results added up by
  `scatter_add` and divided by their number, as code that attends inside buckets has it.
* `SDPA, dense mask`: all tokens, with a mask of those that share a list. It is the float64 reference, too. Made
  beforehand, as everything about the lists is.

Operations are those of the visible pairs in lists of equal size.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_peers import DENSE, Shape, draw
from bench.harness import CPU, FORWARD, OURS, REFERENCE, TRAINING, Case, Contender
from bench.routing_attention import GATHERED, by_head, draw_centroids, take


def make_lists(shape: Shape, clusters: int, size: int, steps: int, device: str) -> Tensor:
    """index [B, H, K, w] of the first `steps` tokens, in ascending order, pads -1 at the end."""
    import seqops

    x = draw(shape, steps, torch.float32, device)["q"].detach()
    return seqops.cluster_assign(x, draw_centroids(shape, clusters, torch.float32, device), size, mode="causal")[0]


def ours(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    import seqops

    return seqops.gathered_attention(q, k, v, index, index, causal=True)[0]


def gathered_lists(q: Tensor, k: Tensor, v: Tensor, index: Tensor) -> Tensor:
    heads, live = q.shape[2], index >= 0
    q, k, v = (by_head(x, heads) for x in (q, k, v))
    places = index.clamp(min=0).long()
    mask = (index.unsqueeze(-2) <= index.unsqueeze(-1)) & live.unsqueeze(-2)
    rows = (take(x, places).flatten(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(*rows, attn_mask=(mask | ~live.unsqueeze(-1)).flatten(1, 2))
    o = o.unflatten(1, (heads, -1)) * live.unsqueeze(-1)
    at = places.flatten(2).unsqueeze(-1)
    total = torch.zeros_like(q).scatter_add(2, at.expand(-1, -1, -1, q.shape[-1]), o.flatten(2, 3))
    number = torch.zeros_like(q[..., :1]).scatter_add(2, at, live.flatten(2).unsqueeze(-1).to(q.dtype))
    return (total / number.clamp(min=1)).transpose(1, 2)


def make_mask(index: Tensor, steps: int) -> Tensor:
    """[B, H, T, T]: key j is not later than query i, and both are in one list, of which every token has at most one."""
    listed = torch.arange(index.shape[2], device=index.device).view(1, 1, -1, 1).expand_as(index)
    of = torch.full((*index.shape[:2], steps + 1), -1, device=index.device)
    of.scatter_(2, torch.where(index >= 0, index, steps).flatten(2).long(), listed.flatten(2))
    of = of[..., :steps]
    causal = torch.ones(steps, steps, dtype=torch.bool, device=index.device).tril()
    return (of.unsqueeze(-1) == of.unsqueeze(-2)) & (of >= 0).unsqueeze(-1) & causal


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    grouped = q.shape[2] != k.shape[2]
    blind = ~mask.any(-1, keepdim=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = scaled_dot_product_attention(q, k, v, mask | blind, enable_gqa=grouped)
    return o.masked_fill(blind, 0.0).transpose(1, 2)


def build(
    shape: Shape, clusters: int, size: int, name: str, dtype: torch.dtype, steps: int, device: str = CPU
) -> Contender:
    leaves, index = draw(shape, steps, dtype, device), make_lists(shape, clusters, size, steps, device)
    if name == DENSE:
        mask = make_mask(index, steps)
        return Contender(lambda: {"o": dense(**leaves, mask=mask)}, leaves)
    function = ours if name == OURS else gathered_lists
    return Contender(lambda: {"o": function(**leaves, index=index)}, leaves)


def case(shape: Shape, clusters: int, size: int, *words: str) -> Case:
    made = partial(build, shape, clusters, size)
    modes, letters = (FORWARD, TRAINING), shape.letters | {"K": clusters, "w": size}
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{value}" for letter, value in letters.items())
    pairs = shape.T * min(size, shape.T // clusters) // 2
    return Case(
        op="gathered_attention",
        name=" ".join(part for part in ("gathered_attention", precision, sizes, *words) if part),
        shape=letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders={
            GATHERED: partial(made, GATHERED, shape.dtype),
            DENSE: partial(made, DENSE, shape.dtype),
            OURS: partial(made, OURS, shape.dtype),
            REFERENCE: partial(made, DENSE, torch.float64),
        },
        flops={mode: shape.count_flops(pairs, mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        check_steps=512 if shape.T > 512 else None,
    )


CASES = [
    case(Shape(1, 4096, 8, 64), 16, 384),
    case(Shape(1, 4096, 8, 64, Hk=2), 16, 384),
    case(Shape(1, 4096, 8, 64, dtype=torch.bfloat16), 16, 384),
]
