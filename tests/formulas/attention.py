"""Modules of sparse attention: dense loops over the queries and the keys that each one sees."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from . import Case, jitter


def heads_of(linear: torch.nn.Linear, x: Tensor, heads: int) -> Tensor:
    y = x @ linear.weight.T
    y = y if linear.bias is None else y + linear.bias
    return y.reshape(*y.shape[:-1], heads, -1)


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """One query q [D] to keys and values k, v [n, D]."""
    scores = (k @ q) * (q.shape[0] ** -0.5 if scale is None else scale)
    return torch.softmax(scores, 0) @ v


def each(rows: Callable[[int, int, int], Tensor], B: int, T: int, H: int) -> Tensor:
    """[B, T, H * D] from the rows [D] of (batch, query, head)."""
    return torch.stack(
        [torch.stack([torch.cat([rows(b, i, h) for h in range(H)]) for i in range(T)]) for b in range(B)]
    )


def plain(linear: torch.nn.Linear, x: Tensor) -> Tensor:
    y = x @ linear.weight.T
    return y if linear.bias is None else y + linear.bias


def normed(norm: torch.nn.LayerNorm, x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


# ---- Informer


def scrambled(query: int, sample: int, T: int) -> int:
    mixed = (query * 7919 + sample * 104729 + 12345) % 2**31
    for _ in range(2):
        mixed = ((mixed ^ (mixed // 2**15)) * 1103515245) % 2**31
    return mixed // 2**7 % T


def prob_sparse(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The measure of each query over its samples, and full attention for the largest."""
    project = module.project
    (B, T, _), H = x.shape, project.num_heads
    q, k, v = (heads_of(linear, x, H) for linear in (project.query, project.key, project.value))
    count = min(module.factor * math.ceil(math.log(T)), T)
    selected = {}
    for b in range(B):
        for h in range(H):
            measure = []
            for i in range(T):
                products = torch.stack([q[b, i, h] @ k[b, scrambled(i, u, T), h] for u in range(count)])
                measure.append(float((products.max() - products.sum() / T).detach()))
            selected[b, h] = sorted(range(T), key=lambda i: -measure[i])[:count]

    def row(b: int, i: int, h: int) -> Tensor:
        end = i + 1 if module.causal else T
        if i in selected[b, h]:
            return attend(q[b, i, h], k[b, :end, h], v[b, :end, h])
        return v[b, :end, h].sum(0) if module.causal else v[b, :, h].mean(0)

    return plain(project.out, each(row, B, T, H))


def circular(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Convolution over 3 steps of x [B, T, C] that wraps around: tap n reads step t - 1 + n."""
    y = sum(torch.roll(x, 1 - n, 1) @ weight[:, :, n].T for n in range(3))
    return y if bias is None else y + bias


def informer_embedding(module: torch.nn.Module, x: Tensor, time: Tensor | None) -> Tensor:
    y = circular(module.values.weight, None, x)
    T, width = y.shape[1:]
    place = torch.zeros(T, width, dtype=torch.float64)
    for t in range(T):
        for n in range(width):
            angle = t / 10000 ** ((n - n % 2) / width)
            place[t, n] = math.cos(angle) if n % 2 else math.sin(angle)
    y = y + place
    return y if time is None else y + time @ module.times.weight.T


def informer_layer(module: torch.nn.Module, x: Tensor, context: Tensor | None = None) -> Tensor:
    x = normed(module.norms[0], x + prob_sparse(module.attention, x))
    if context is not None:
        (B, T, _), H, cross = x.shape, module.cross.num_heads, module.cross
        q, k, v = heads_of(cross.query, x, H), heads_of(cross.key, context, H), heads_of(cross.value, context, H)
        o = each(lambda b, i, h: attend(q[b, i, h], k[b, :, h], v[b, :, h]), B, T, H)
        x = normed(module.norms[1], x + plain(cross.out, o))
    inner = plain(module.up, x)
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    return normed(module.norms[-1], x + plain(module.down, inner))


def halved(module: torch.nn.Module, x: Tensor) -> Tensor:
    y, norm = circular(module.mix.weight, module.mix.bias, x), module.norm
    y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
    y = torch.where(y > 0, y, torch.expm1(y))
    T = y.shape[1]
    return torch.stack([y[:, max(t - 1, 0) : t + 2].amax(1) for t in range(0, T, 2)], 1)


def informer(module: torch.nn.Module, x: Tensor, time: Tensor | None = None, ahead: Tensor | None = None) -> Tensor:
    y = informer_embedding(module.past, x, time)
    for layer in module.encoder[:-1]:
        y = informer_layer(layer, y) if hasattr(layer, "attention") else halved(layer, y)
    context = normed(module.encoder[-1], y)
    start = torch.cat([x[:, -module.known :], x.new_zeros(x.shape[0], module.horizon, x.shape[2])], 1)
    times = None if time is None or ahead is None else torch.cat([time[:, -module.known :], ahead], 1)
    y = informer_embedding(module.ahead, start, times)
    for layer in module.decoder:
        y = informer_layer(layer, y, context)
    return plain(module.out, normed(module.norm, y)[:, module.known :])


def series() -> tuple[Tensor, ...]:
    """14 steps of 3 numbers, and 2 features of their times and of those of the 4 steps after them."""
    return tuple(torch.randn(2, T, C, dtype=torch.float64) for T, C in ((14, 3), (14, 2), (4, 2)))


def move(module: torch.nn.Module) -> None:
    """Small moves, and running statistics as after training."""
    jitter(module, 0.1)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.running_mean.normal_(std=0.2)
            part.running_var.uniform_(0.5, 2.0)


# In 16 bits another query may be selected: only cases in which all are selected are compared there.
SPARSE = {"cuts": (), "in16": False}

CASES = [
    Case("ProbSparseAttention", {"width": 8, "num_heads": 2, "factor": 1}, prob_sparse, note="few", **SPARSE),
    Case(
        "ProbSparseAttention",
        {"width": 8, "num_heads": 2, "factor": 1, "causal": True},
        prob_sparse,
        note="causal",
        compiled=False,
        **SPARSE,
    ),
    Case("ProbSparseAttention", {"width": 8, "num_heads": 2}, prob_sparse, note="all", cuts=(), compiled=False),
    Case(
        "Informer",
        {"channels": 3, "horizon": 4, "width": 8, "num_heads": 2, "known": 5, "time_features": 2, "factor": 1},
        informer,
        draw=series,
        prepare=move,
        **SPARSE,
    ),
    Case(
        "Informer",
        {"channels": 3, "horizon": 4, "width": 8, "num_heads": 2, "known": 5, "decoder_layers": 2, "distil": False},
        informer,
        (2, 11, 3),
        note="all selected",
        prepare=move,
        cuts=(),
        compiled=False,
    ),
]
