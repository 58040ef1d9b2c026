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
    T, dim = y.shape[1:]
    place = torch.zeros(T, dim, dtype=torch.float64)
    for t in range(T):
        for n in range(dim):
            angle = t / 10000 ** ((n - n % 2) / dim)
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


# ---- Combiner


def spans_of(i: int, T: int, s: int, pattern: str, causal: bool) -> tuple[list[int], list[list[int]]]:
    """Direct keys of query i, and its spans."""
    block, end = i // s, i + 1 if causal else T
    own = [j for j in range(end) if j // s == block]
    others = [j for j in range(end if pattern == "axial" else T) if j not in own]
    if pattern == "fixed":
        groups = [[j for j in others if j // s == b] for b in range(-(-T // s)) if b < block or not causal]
    elif pattern == "axial":
        column = [j for j in others if j % s == i % s]
        own += column
        above = [[j for j in others if j not in column and j % s == c and j < block * s] for c in range(s)]
        below = [[j for j in others if j not in column and j % s == c and j > block * s] for c in range(s)]
        groups = above + below
    else:
        groups = []
        for level in range(T.bit_length()):
            mine = block >> level
            sibling = [j for j in range(T) if (j // s) >> level == mine ^ 1]
            if mine % 2 == 1 or not causal:
                groups.append(sibling)
    return own, [group for group in groups if group]


def combiner(module: torch.nn.Module, x: Tensor) -> Tensor:
    project = module.project
    (B, T, _), H = x.shape, project.num_heads
    q, k, v = (heads_of(linear, x, H) for linear in (project.query, project.key, project.value))

    def pool(t: Tensor) -> Tensor:
        return t.max(0).values if module.pool == "max" else t.mean(0)

    def row(b: int, i: int, h: int) -> Tensor:
        direct, spans = spans_of(i, T, module.block_size, module.pattern, module.causal)
        keys, values = [k[b, j, h] for j in direct], [v[b, j, h] for j in direct]
        for span in spans:
            keys.append(pool(k[b, span, h]))
            values.append(attend(pool(q[b, span, h]), k[b, span, h], v[b, span, h]))
        return attend(q[b, i, h], torch.stack(keys), torch.stack(values))

    return plain(project.out, each(row, B, T, H))


# ---- routing


def turned(x: Tensor, base: float, start: int = 0) -> Tensor:
    """Rotary positions of x [B, T, H, D], pair (n, n + D / 2) as a complex number."""
    half = x.shape[-1] // 2
    angle = torch.tensor(
        [[(start + t) * base ** (-n / half) for n in range(half)] for t in range(x.shape[1])], dtype=torch.float64
    )
    y = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([y.real, y.imag], -1)


def routing(module: torch.nn.Module, x: Tensor) -> Tensor:
    (B, T, _), H, local = x.shape, module.num_heads, module.num_local_heads
    q, k = (turned(heads_of(linear, x, local), module.base) for linear in (module.query, module.key))
    v, shared = heads_of(module.value, x, H), heads_of(module.shared, x, H - local)
    shared = shared - shared.mean(-1, keepdim=True)
    shared = shared / (shared.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    cluster = torch.einsum("bthd,hkd->bthk", shared, module.centroids).argmax(-1)

    def row(b: int, i: int, h: int) -> Tensor:
        if h < local:
            seen = range(max(0, i - module.window + 1), i + 1)
            return attend(q[b, i, h], k[b, seen, h], v[b, seen, h])
        seen = [j for j in range(i + 1) if cluster[b, j, h - local] == cluster[b, i, h - local]][-module.size :]
        return attend(shared[b, i, h - local], shared[b, seen, h - local], v[b, seen, h])

    return plain(module.out, each(row, B, T, H))


# ---- Longformer and Recformer


def longformer(module: torch.nn.Module, x: Tensor, global_index: Tensor | None = None) -> Tensor:
    project = module.project
    (B, T, _), H = x.shape, project.num_heads
    q, k, v = (heads_of(linear, x, H) for linear in (project.query, project.key, project.value))
    q_g, k_g, v_g = (heads_of(getattr(module, f"global_{n}"), x, H) for n in ("query", "key", "value"))
    everywhere = set() if global_index is None else {*global_index.tolist()}

    def row(b: int, i: int, h: int) -> Tensor:
        if i in everywhere:
            return attend(q_g[b, i, h], k_g[b, :, h], v_g[b, :, h])
        seen = [j for j in range(T) if abs(i - j) <= module.window or j in everywhere]
        return attend(q[b, i, h], k[b, seen, h], v[b, seen, h])

    return plain(project.out, each(row, B, T, H))


def with_globals() -> tuple[Tensor, ...]:
    """Two global tokens, one of them named twice, and one that is not there."""
    return torch.randn(2, 13, 8, dtype=torch.float64), torch.tensor([9, 0, 9, 40])


def recformer(module: torch.nn.Module, token: Tensor, kind: Tensor, item: Tensor) -> Tensor:
    y = module.token.weight[token] + module.kind.weight[kind] + module.item.weight[item]
    y = normed(module.norm, torch.stack([y[:, t] + module.position.weight[t] for t in range(y.shape[1])], 1))
    for layer in module.layers:
        y = normed(layer.norms[0], y + longformer(layer.attention, y, torch.tensor([0])))
        inner = plain(layer.up, y)
        y = normed(layer.norms[1], y + plain(layer.down, inner * (1 + torch.erf(inner / math.sqrt(2))) / 2))
    return y


def words() -> tuple[Tensor, ...]:
    return tuple(torch.randint(count, (2, 11)) for count in (20, 4, 5))


# ---- block diffusion


def block_diffusion(module: torch.nn.Module, x: Tensor) -> Tensor:
    project, s = module.project, module.block_size
    (B, T, _), H = x.shape, project.num_heads
    L = T // 2
    q, k, v = (heads_of(linear, x, H) for linear in (project.query, project.key, project.value))
    q, k = (torch.cat([turned(t[:, :L], module.base), turned(t[:, L:], module.base)], 1) for t in (q, k))

    def sees(i: int, j: int) -> bool:
        mine, other = i % L // s, j % L // s
        if i < L:
            return other == mine if j < L else other < mine
        return j >= L and other <= mine

    def row(b: int, i: int, h: int) -> Tensor:
        seen = [j for j in range(T) if sees(i, j)]
        return attend(q[b, i, h], k[b, seen, h], v[b, seen, h])

    return plain(project.out, each(row, B, T, H))


# ---- DeltaLLM


def delta(module: torch.nn.Module, x: Tensor) -> Tensor:
    project = module.project
    (B, T, _), H = x.shape, project.num_heads
    q, k, v = (heads_of(linear, x, H) for linear in (project.query, project.key, project.value))
    rows, last = [], torch.zeros_like(k[:, 0])
    for t in range(T):
        change = (k[:, t] - last).abs()
        if module.mode == "row":
            change = change.square().sum(-1, keepdim=True).sqrt().expand_as(change)
        last = torch.where(change > module.threshold, k[:, t], last)
        rows.append(last)

    def row(b: int, i: int, h: int) -> Tensor:
        keys = [k[b, j, h] if i - j < module.window or j < module.sink else rows[j][b, h] for j in range(i + 1)]
        return attend(q[b, i, h], torch.stack(keys), v[b, : i + 1, h])

    return plain(project.out, each(row, B, T, H))


# ---- pointer network


def lstm(cell: torch.nn.Module, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows = []
    for t in range(x.shape[1]):
        gates = x[:, t] @ cell.weight_ih_l0.T + cell.bias_ih_l0 + h @ cell.weight_hh_l0.T + cell.bias_hh_l0
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        rows.append(h)
    return torch.stack(rows, 1), h, c


def pointer(module: torch.nn.Module, x: Tensor, target: Tensor, lengths: Tensor | None = None) -> Tensor:
    rows = []
    for b in range(x.shape[0]):
        length = x.shape[1] if lengths is None else int(lengths[b])
        zero = x.new_zeros(1, module.query.weight.shape[0])
        e, h, c = lstm(module.encoder, x[b : b + 1, :length], zero, zero)
        read = torch.stack([module.start, *x[b, target[b, :-1]]])[None]
        d, _, _ = lstm(module.decoder, read, h, c)
        query, key = d[0] @ module.query.weight.T, e[0] @ module.key.weight.T
        if module.mode == "additive":
            scores = torch.stack(
                [torch.stack([torch.tanh(one + other) @ module.weight for other in key]) for one in query]
            )
        else:
            scores = module.clip * torch.tanh(query @ key.T / math.sqrt(query.shape[1]))
        rows.append(scores - scores.exp().sum(1, keepdim=True).log())
    return torch.stack(rows)


def places() -> tuple[Tensor, ...]:
    return torch.randn(2, 9, 3, dtype=torch.float64), torch.randint(9, (2, 5))


def louder(module: torch.nn.Module) -> None:
    """Weights of 0.08 hardly leave tanh's straight part."""
    for parameter in module.parameters():
        parameter.mul_(8)


# In 16 bits another query may be selected: only cases in which all are selected are compared there.
SPARSE = {"cuts": (), "in16": False}

CASES = [
    Case("ProbSparseAttention", {"dim": 8, "num_heads": 2, "factor": 1}, prob_sparse, note="few", **SPARSE),
    Case(
        "ProbSparseAttention",
        {"dim": 8, "num_heads": 2, "factor": 1, "causal": True},
        prob_sparse,
        note="causal",
        compiled=False,
        **SPARSE,
    ),
    Case("ProbSparseAttention", {"dim": 8, "num_heads": 2}, prob_sparse, note="all", cuts=(), compiled=False),
    Case(
        "Informer",
        {"channels": 3, "horizon": 4, "dim": 8, "num_heads": 2, "known": 5, "time_features": 2, "factor": 1},
        informer,
        draw=series,
        prepare=move,
        **SPARSE,
    ),
    Case(
        "Informer",
        {"channels": 3, "horizon": 4, "dim": 8, "num_heads": 2, "known": 5, "num_decoder_layers": 2, "distil": False},
        informer,
        (2, 11, 3),
        note="all selected",
        prepare=move,
        cuts=(),
        compiled=False,
    ),
    *(
        Case(
            "Combiner",
            {"dim": 8, "num_heads": 2, "block_size": s, "pattern": pattern, "pool": pool},
            combiner,
            (2, 17, 8),
            note=f"{pattern} {pool}",
            cuts=(3, 8, 9),
            grows=True,
            compiled=pool == "max",
        )
        for s, pattern, pool in (
            (4, "fixed", "max"),
            (4, "fixed", "mean"),
            (2, "logsparse", "max"),
            (3, "logsparse", "mean"),
            (5, "axial", "max"),
            (5, "axial", "mean"),
        )
    ),
    *(
        Case(
            "Combiner",
            {"dim": 8, "num_heads": 2, "block_size": 4, "pattern": pattern, "causal": False},
            combiner,
            note=f"{pattern} both ways",
            cuts=(),
            compiled=False,
        )
        for pattern in ("fixed", "logsparse", "axial")
    ),
    Case(
        "RoutingAttention",
        {"dim": 16, "num_heads": 4, "num_local_heads": 2, "window": 4, "num_clusters": 3, "size": 3},
        routing,
        (2, 17, 16),
        cuts=(1, 6, 7),
        # In 16 bits a token can have another cluster: compared where there is one.
        in16=False,
    ),
    Case(
        "RoutingAttention",
        {"dim": 12, "num_heads": 3, "num_local_heads": 1, "window": 1, "num_clusters": 1, "size": 5},
        routing,
        (2, 13, 12),
        note="one cluster",
        compiled=False,
    ),
    Case("Longformer", {"dim": 8, "num_heads": 2, "window": 3}, longformer, draw=with_globals, prepare=jitter, cuts=()),
    Case("Longformer", {"dim": 8, "num_heads": 2, "window": 2}, longformer, note="no global tokens", cuts=()),
    Case(
        "Recformer",
        {"vocabulary": 20, "dim": 8, "num_heads": 2, "num_layers": 2, "window": 2, "max_tokens": 15, "max_items": 5},
        recformer,
        draw=words,
        prepare=jitter,
        cuts=(),
    ),
    Case(
        "BlockDiffusionAttention",
        {"dim": 8, "num_heads": 2, "block_size": 4},
        block_diffusion,
        (2, 20, 8),
        cuts=(),
    ),
    *(
        Case(
            "DeltaAttention",
            {"dim": 8, "num_heads": 2, "threshold": 0.6, "window": window, "sink": sink, "mode": mode},
            delta,
            (2, 15, 8),
            note=note,
            grows=True,
            compiled=mode == "element",
            # In 16 bits a change can be on the other side of the threshold.
            in16=False,
        )
        for note, window, sink, mode in (("element", 3, 2, "element"), ("row", 0, 0, "row"))
    ),
    Case(
        "DeltaAttention",
        {"dim": 8, "num_heads": 2, "threshold": 0.0, "window": 2, "sink": 7},
        delta,
        note="nothing held",
        grows=True,
        compiled=False,
    ),
    Case("PointerNetwork", {"channels": 3, "hidden": 8}, pointer, draw=places, prepare=louder, cuts=()),
    Case(
        "PointerNetwork",
        {"channels": 3, "hidden": 8, "mode": "clipped_dot"},
        pointer,
        draw=places,
        note="clipped dot",
        prepare=louder,
        cuts=(),
        compiled=False,
    ),
]
