"""Cases of routing_attention, and of the assignment to clusters that it begins with.

Letters: those of bench/attention_peers.py, K clusters, w their size. q and k are random, so clusters are of about T / K
tokens. Peers, plain PyTorch as models that route write it:

* `gathered lists`, not causal: scores by einsum, `topk`, sorted lists, gathers to [B, H K, w, D], SDPA, scatter-add of
  results and of their number, division.
* `lists, softmax`: the same with the scores of each list as a tensor, as published code has it.
* `padded clusters`, causal: arg-max, a stable sort by cluster, gathers to [B, H K, largest cluster, D] (the host waits
  for its size), SDPA with a mask of pads, of time and of `size`, and a gather back.
* `einsum`: scores of all tokens, `argmax` or `topk`, and lists by sorting.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_peers import Shape, draw
from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

GATHERED, SOFTMAX, PADDED, EINSUM = "gathered lists", "lists, softmax", "padded clusters", "einsum"


def draw_centroids(shape: Shape, clusters: int, dtype: torch.dtype, device: str) -> Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return torch.randn(shape.H, clusters, shape.D, generator=generator, device=device).to(shape.dtype).to(dtype)


def build(
    shape: Shape, clusters: int, function: Callable[..., Tensor], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)
    centroids = draw_centroids(shape, clusters, dtype, device)
    return Contender(lambda: {"o": function(**leaves, centroids=centroids)}, leaves)


def ours(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, size: int, causal: bool) -> Tensor:
    import seqops

    return seqops.routing_attention(q, k, v, centroids, size, causal=causal)[0]


def by_head(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hk, D] as [B, H, T, D]."""
    return x.transpose(1, 2).repeat_interleave(heads // x.shape[2], 1)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B, H, T, D] at index [B, H, K, w]."""
    rows = index.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, rows).unflatten(2, index.shape[2:])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def gathered_lists(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    size: int,
    attend: Callable[..., Tensor] = scaled_dot_product_attention,
) -> Tensor:
    heads = q.shape[2]
    q, k, v = (by_head(x, heads) for x in (q, k, v))
    size = min(size, q.shape[2])
    with torch.no_grad():
        lists = [torch.einsum("bhtd,hkd->bhkt", x, centroids).topk(size, -1).indices.sort(-1).values for x in (q, k)]
    rows = [take(x, index).flatten(1, 2) for x, index in ((q, lists[0]), (k, lists[1]), (v, lists[1]))]
    o = attend(*rows).unflatten(1, (heads, -1)).flatten(2, 3)
    places = lists[0].flatten(2).unsqueeze(-1)
    total = torch.zeros_like(q).scatter_add(2, places.expand_as(o), o)
    number = torch.zeros_like(q[..., :1]).scatter_add(2, places, torch.ones_like(o[..., :1]))
    return (total / number.clamp(min=1)).transpose(1, 2)


def padded_clusters(q: Tensor, k: Tensor, v: Tensor, centroids: Tensor, size: int) -> Tensor:
    (steps, heads), clusters = q.shape[1:3], centroids.shape[1]
    q, k, v = (by_head(x, heads) for x in (q, k, v))
    t = torch.arange(steps, device=q.device)
    with torch.no_grad():
        lists, ranks = [], []
        for x in (q, k):
            nearest = torch.einsum("bhtd,hkd->bhtk", x, centroids).argmax(-1)
            counts = torch.nn.functional.one_hot(nearest, clusters).sum(2)
            order = nearest.argsort(dim=-1, stable=True)
            starts = counts.cumsum(-1) - counts
            place = torch.empty_like(order).scatter_(2, order, t.expand_as(order))
            most = int(counts.max())
            entries = starts.unsqueeze(-1) + torch.arange(most, device=q.device)
            index = order.gather(2, entries.clamp(max=steps - 1).flatten(2)).unflatten(2, entries.shape[2:])
            inside = torch.arange(most, device=q.device) < counts.unsqueeze(-1)
            lists.append((index, inside))
            ranks.append((nearest, place - starts.gather(2, nearest), most))
        (of_q, _), (of_k, inside) = lists
        earlier = (of_k.unsqueeze(-2) <= of_q.unsqueeze(-1)) & inside.unsqueeze(-2)
        last = earlier.sum(-1, keepdim=True)
        mask = earlier & (torch.arange(of_k.shape[-1], device=q.device) >= last - size)
        blind = ~mask.any(-1, keepdim=True)
        nearest, rank, most = ranks[0]
        back = (nearest * most + rank).unsqueeze(-1)
    rows = [take(x, index).flatten(1, 2) for x, index in ((q, of_q), (k, of_k), (v, of_k))]
    o = scaled_dot_product_attention(*rows, attn_mask=(mask | blind).flatten(1, 2))
    o = o.masked_fill(blind.flatten(1, 2), 0.0).unflatten(1, (heads, -1)).flatten(2, 3)
    return o.gather(2, back.expand(-1, -1, -1, o.shape[-1])).transpose(1, 2)


def case(shape: Shape, clusters: int, size: int, causal: bool, *words: str, gpu: bool = False) -> Case:
    peers = {PADDED: partial(padded_clusters, size=size)}
    if not causal:
        peers = {GATHERED: partial(gathered_lists, size=size)}
        peers[SOFTMAX] = partial(gathered_lists, size=size, attend=softmax_attention)
    modes = (FORWARD, TRAINING)
    made = {name: partial(build, shape, clusters, peer, shape.dtype) for name, peer in peers.items()}
    made |= {
        OURS: partial(build, shape, clusters, partial(ours, size=size, causal=causal), shape.dtype),
        REFERENCE: partial(build, shape, clusters, next(iter(peers.values())), torch.float64),
    }
    keys = shape.T * min(size, shape.T // clusters) * (0.5 if causal else 1)
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{value}" for letter, value in (shape.letters | {"K": clusters, "w": size}).items())
    parts = ("routing_attention", precision, sizes, "" if causal else "not causal", *words)
    scores = 4 * shape.B * shape.H * shape.T * clusters * shape.D
    return Case(
        op="routing_attention",
        name=" ".join(part for part in parts if part),
        shape=shape.letters | {"K": clusters, "w": size},
        dtype=shape.dtype,
        steps=shape.T,
        builders=made,
        flops={mode: shape.count_flops(int(keys), mode) + scores for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(PADDED if causal else SOFTMAX, mode): 2.0 for mode in modes},
        check_steps=512,
        devices=("cuda",) if gpu else ("cpu",),
    )


# ---- cluster_assign


def assign(x: Tensor, centroids: Tensor, size: int, mode: str) -> tuple[Tensor, Tensor]:
    import seqops

    return seqops.cluster_assign(x, centroids, size, mode=mode)


def assign_by_einsum(x: Tensor, centroids: Tensor, size: int, mode: str) -> tuple[Tensor, Tensor]:
    steps, clusters = x.shape[1], centroids.shape[1]
    if mode == "balanced":
        scores = torch.einsum("bthd,hkd->bhkt", x, centroids)
        index = scores.topk(min(size, steps), -1).indices.sort(-1).values
        return torch.nn.functional.pad(index, (0, max(0, size - steps)), value=-1), scores.argmax(2).transpose(1, 2)
    nearest = torch.einsum("bthd,hkd->bthk", x, centroids).argmax(-1)
    of_head = nearest.transpose(1, 2)
    order = of_head.argsort(dim=-1, stable=True)
    counts = torch.nn.functional.one_hot(of_head, clusters).sum(2)
    entries = (counts.cumsum(-1) - counts).unsqueeze(-1) + torch.arange(size, device=x.device)
    index = order.gather(2, entries.clamp(max=steps - 1).flatten(2)).unflatten(2, entries.shape[2:])
    return torch.where(torch.arange(size, device=x.device) < counts.unsqueeze(-1), index, -1), nearest


def build_assignment(
    shape: Shape,
    clusters: int,
    function: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    steps: int,
    device: str = "cpu",
) -> Contender:
    x = draw(shape, steps, dtype, device)["q"].detach()
    centroids = draw_centroids(shape, clusters, dtype, device)
    return Contender(lambda: dict(zip(("index", "nearest"), function(x, centroids), strict=True)), {})


def assignment(shape: Shape, clusters: int, size: int, mode: str, *words: str, gpu: bool = False) -> Case:
    options = {"size": size, "mode": mode}
    peer = partial(assign_by_einsum, **options)
    letters = {name: size for name, size in shape.letters.items() if name != "Hk"} | {"K": clusters, "w": size}
    made = {
        EINSUM: partial(build_assignment, shape, clusters, peer, shape.dtype),
        OURS: partial(build_assignment, shape, clusters, partial(assign, **options), shape.dtype),
        REFERENCE: partial(build_assignment, shape, clusters, peer, torch.float64),
    }
    tokens = shape.B * shape.T * shape.H
    return Case(
        op="cluster_assign",
        name=" ".join(["cluster_assign", " ".join(f"{name}{value}" for name, value in letters.items()), mode, *words]),
        shape=letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=made,
        flops={FORWARD: 2 * tokens * clusters * shape.D},
        bytes={FORWARD: tokens * (shape.D * shape.dtype.itemsize + 4) + 4 * shape.B * shape.H * clusters * size},
        modes=(FORWARD,),
        goals={(EINSUM, FORWARD): 1.0},
        devices=("cuda",) if gpu else ("cpu",),
    )


CPU_CASES = [
    case(Shape(1, 4096, 8, 64), 16, 256, True),
    case(Shape(1, 4096, 8, 64), 16, 256, False),
    case(Shape(1, 8192, 8, 64), 32, 256, True),
    case(Shape(1, 4096, 8, 64, Hk=2), 16, 256, True),
    assignment(Shape(1, 4096, 8, 64), 16, 256, "causal"),
    assignment(Shape(1, 4096, 8, 64), 16, 256, "balanced"),
]
GPU_CASES = [
    case(Shape(4, 8192, 8, 64, dtype=torch.bfloat16), 32, 256, causal, "GPU", gpu=True) for causal in (True, False)
]
CASES = [*CPU_CASES, *GPU_CASES, assignment(Shape(4, 8192, 8, 64), 32, 256, "causal", "GPU", gpu=True)]
