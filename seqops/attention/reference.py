"""Attention over sparse patterns, in plain PyTorch with dense weights: the specification.

A pattern is a count for each pair of a query and a key: how often the query sees the key (almost always 0 or 1).

Letters: B batch, T time, H query heads, Hk key heads (each serves H / Hk query heads in turn), D channels, P parts of a
pattern, S rows of a second source of keys, C positions of a chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grouped(t: Tensor, heads: int) -> Tensor:
    """[B, T, Hk, D] as [B, H, T, D]: query head h reads key head h // (H / Hk)."""
    return t.movedim(1, 2).repeat_interleave(heads // t.shape[2], dim=1)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    counts: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Attention in which query i sees key j `counts[..., i, j]` times; counts and bias broadcast to [B, H, Tq, Tk].

    lse has the dtype of the sums: public operators return it in float32.
    """
    heads, real = q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    keys, values = grouped(k.to(real), heads), grouped(v.to(real), heads)
    scores = q.to(real).movedim(1, 2) @ keys.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = scores + bias.to(real)
    seen = counts.broadcast_to(scores.shape) > 0
    times = counts.broadcast_to(scores.shape).to(real)
    if activation == "softmax":
        scores = scores.masked_fill(~seen, -torch.inf)
        least = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.new_zeros(*scores.shape[:-1], 1)
        shift = torch.where(least == -torch.inf, 0.0, least)  # a row that sees nothing
        # exp(-inf - shift) is 0, and its gradient too: nothing here makes a NaN of what is not seen.
        weights = (scores - shift).exp() * times
        total = weights.sum(-1, keepdim=True)
        lse = torch.where(total > 0, total.log(), -torch.inf) + shift
        lse = torch.where(total.isnan(), total, lse)
        weights = weights / torch.where(total == 0, 1.0, total)
    else:
        scores = scores.masked_fill(~seen, 0.0)
        weights = weight_function(activation, scores) * times
        weights = weights.masked_fill(~seen, 0.0)
        lse = scores.new_zeros(*scores.shape[:-1], 1)
    o = weighted_sum(weights, seen, values)
    return o.movedim(1, 2).to(q.dtype), lse.squeeze(-1)


def weighted_sum(weights: Tensor, seen: Tensor, values: Tensor) -> Tensor:
    """weights @ values, where a value that is not seen has no part in the sum even if it is infinite or NaN."""
    real = values.dtype
    finite = torch.where(values.isfinite(), values, 0.0)
    counted, lost = (seen & (weights != 0)).to(real), (seen & (weights == 0)).to(real)
    special = torch.where(counted @ values.isposinf().to(real) > 0, torch.inf, 0.0)
    special = special - torch.where(counted @ values.isneginf().to(real) > 0, torch.inf, 0.0)
    undefined = seen.to(real) @ values.isnan().to(real) + lost @ values.isinf().to(real)  # 0 * inf
    return weights @ finite + torch.where(undefined > 0, torch.nan, special).to(real)


def weight_function(activation: str, scores: Tensor) -> Tensor:
    if activation == "laplace":
        mean, deviation = math.sqrt(0.5), 1 / math.sqrt(4 * math.pi)
        return (
            torch.special.erfc((mean - scores) / (deviation * math.sqrt(2))) / 2
        )  # (1 + erf(-x)) / 2, no cancellation
    return torch.relu(scores).square()


def range_counts(ranges: Tensor, keys: int) -> Tensor:
    """[B or 1, H or 1, P, 2, Tq] -> [B or 1, H or 1, Tq, keys]: in how many of its parts each query sees each key."""
    j = torch.arange(keys, device=ranges.device)
    first, end = ranges.unsqueeze(-1).unbind(3)
    return ((first <= j) & (j < end)).sum(2)


def range_bias(bias: Tensor, ranges: Tensor, keys: int) -> Tensor:
    """The bias of each pair [H or 1, Tq, keys] of positions counted from the start of the query's range."""
    start = ranges[0, 0, 0, 0].unsqueeze(-1)
    i = torch.arange(ranges.shape[-1], device=ranges.device).unsqueeze(-1) - start
    j = torch.arange(keys, device=ranges.device) - start
    if bias.ndim == 2:
        most = bias.shape[1] - 1
        return bias[:, (most // 2 + j - i).clamp(0, most)]
    most = bias.shape[1] - 1
    return bias[:, i.clamp(0, most), j.clamp(0, most)]


def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    ranges2: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, Tensor]:
    counts = range_counts(ranges, k.shape[1])
    added = None if bias is None else range_bias(bias, ranges, k.shape[1])
    if k2 is not None:
        more = range_counts(ranges2, k2.shape[1])
        front = [max(sizes) for sizes in zip(counts.shape[:-1], more.shape[:-1], strict=True)]
        counts = torch.cat([counts.expand(*front, -1), more.expand(*front, -1)], -1)
        k, v = torch.cat([k, k2], 1), torch.cat([v, v2], 1)
    return dense_attention(q, k, v, counts, scale, added, activation)


# ---- patterns: how often each of T queries sees each of T keys


def sequence_numbers(T: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """The packed sequence of each position, and its place there."""
    t = torch.arange(T, device=device)
    if cu_seqlens is None:
        return torch.zeros_like(t), t
    number = (t.unsqueeze(1) >= cu_seqlens[1:]).sum(1)
    return number, t - cu_seqlens.long()[number]


def chunked_counts(T: int, chunk_size: int, causal: bool, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    number, t = sequence_numbers(T, cu_seqlens, device)
    chunk = t // chunk_size
    seen = (number.unsqueeze(1) == number) & (chunk.unsqueeze(1) == chunk)
    return (seen & (t <= t.unsqueeze(1)) if causal else seen).long()


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    causal: bool = False,
    activation: str = "softmax",
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """N(i): the positions of i's chunk, up to i where causal."""
    T = q.shape[1]
    counts = chunked_counts(T, chunk_size, causal, cu_seqlens, q.device)
    added = None
    if bias is not None:
        place = sequence_numbers(T, cu_seqlens, q.device)[1] % chunk_size
        i, j = place.unsqueeze(1).expand(T, T), place.expand(T, T)
        added = bias[:, chunk_size - 1 + j - i] if bias.ndim == 2 else bias[:, i, j]
    o, lse = dense_attention(q, k, v, counts, scale, added, activation)
    return o, lse.to(torch.float32)


def window_counts(
    T: int, left: int, right: int, global_index: Tensor | None, cu_seqlens: Tensor | None, device: torch.device
) -> Tensor:
    number, t = sequence_numbers(T, cu_seqlens, device)
    i, j = t.unsqueeze(1), t
    seen = torch.ones(T, T, dtype=torch.bool, device=device)
    if left >= 0:
        seen = seen & (i - j <= left)
    if right >= 0:
        seen = seen & (j - i <= right)
    if global_index is not None:
        everywhere = (t.unsqueeze(1) == global_index).any(1)
        seen = seen | everywhere | everywhere.unsqueeze(1)
    if right == 0:
        seen = seen & (j <= i)
    return (seen & (number.unsqueeze(1) == number)).long()


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    *,
    global_index: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """N(i): i - left to i + right, and the global positions; those see every key. Causal where right is 0."""
    counts = window_counts(q.shape[1], left, right, global_index, cu_seqlens, q.device)
    o, lse = dense_attention(q, k, v, counts, scale)
    return o, lse.to(torch.float32)


def block_diffusion_counts(T: int, block_size: int, device: torch.device) -> Tensor:
    L, t = T // 2, torch.arange(T, device=device)
    noisy = t < L
    block = torch.where(noisy, t, t - L) // block_size
    own, past = block.unsqueeze(1) == block, block < block.unsqueeze(1)
    of_noisy = torch.where(noisy, own, past)
    of_clean = ~noisy & (own | past)
    return torch.where(noisy.unsqueeze(1), of_noisy, of_clean).long()


def block_diffusion_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """A noisy row sees its own noisy block and the clean blocks before; a clean row the clean blocks up to its own."""
    o, lse = dense_attention(q, k, v, block_diffusion_counts(q.shape[1], block_size, q.device), scale)
    return o, lse.to(torch.float32)


# ---- keys that are held while they change little


def held_keys(k: Tensor, threshold: float, by_row: bool) -> Tensor:
    """h_t = k_t where it differs from h_{t-1} by more than the threshold, else h_{t-1}; h_{-1} = 0."""
    real = torch.float64 if k.dtype == torch.float64 else torch.float32
    held, rows = torch.zeros_like(k[:, :1]).squeeze(1) if k.shape[1] else None, []
    for row in k.unbind(1):
        # Equal infinities differ by nothing.
        change = torch.where(row == held, 0.0, row.detach().to(real) - held.detach().to(real)).abs()
        size = change.square().sum(-1, keepdim=True).sqrt() if by_row else change
        held = torch.where(size <= threshold, held, row)
        rows.append(held)
    return torch.stack(rows, 1) if rows else k.clone()


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float,
    *,
    window: int,
    sink: int = 0,
    mode: str = "element",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal: keys at least `window` back, the first `sink` apart, are seen as held."""
    T = q.shape[1]
    i, j = torch.arange(T, device=q.device).unsqueeze(1), torch.arange(T, device=q.device)
    past, direct = j <= i, (i - j < window) | (j < sink)
    counts = torch.cat([past & direct, past & ~direct], 1).long()
    held = held_keys(k, threshold, mode == "row")
    o, lse = dense_attention(q, torch.cat([k, held], 1), torch.cat([v, v], 1), counts, scale)
    return o, lse.to(torch.float32)


# ---- parts of a softmax


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """w_n = exp(lse_n - lse), o = w_1 o_1 + w_2 o_2; a part with lse -inf is left out, whatever its o."""
    real = torch.float64 if o1.dtype == torch.float64 else torch.float32
    first, second = lse1.to(real), lse2.to(real)
    most = torch.maximum(first, second).detach()
    shift = torch.where(most == -torch.inf, 0.0, most)
    total = 0.0
    sums = 0.0
    for o, lse in ((o1, first), (o2, second)):
        weight = (lse - shift).exp()
        part = torch.where((lse == -torch.inf).mT.unsqueeze(-1), 0.0, o.to(real))
        total = total + weight
        sums = sums + weight.mT.unsqueeze(-1) * part
    empty = total == 0
    divisor = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, divisor.log() + shift)
    return (sums / divisor.mT.unsqueeze(-1)).to(o1.dtype), lse.to(lse1.dtype)


# ---- combiner: direct keys, and spans that a summary stands for


def combiner_sets(
    i: int, T: int, block_size: int, pattern: str = "fixed", causal: bool = True
) -> tuple[list[int], list[range]]:
    """What query i sees: positions of direct keys, and spans of positions."""
    s, blocks = block_size, -(-T // block_size)
    row, column = divmod(i, s)
    direct = [*range(row * s, i + 1 if causal else min((row + 1) * s, T))]

    def span(first: int, end: int) -> range:
        return range(first * s, min(end * s, T))

    if pattern == "fixed":
        spans = [span(n, n + 1) for n in range(blocks) if n < row or (n > row and not causal)]
    elif pattern == "logsparse":
        spans = []
        for level in range(blocks.bit_length()):
            n, width = row >> level, 1 << level
            if n % 2 == 1:
                spans.append(span((n - 1) * width, n * width))
            elif not causal:
                spans.append(span((n + 1) * width, (n + 2) * width))
    else:
        others = [other for other in range(s) if other != column]
        direct += [*range(column, row * s, s)]
        spans = [range(other, row * s, s) for other in others]
        if not causal:
            direct += [*range(i + s, T, s)]
            spans += [range((row + 1) * s + other, T, s) for other in others]
    return direct, [each for each in spans if len(each) > 0]


def pooled(x: Tensor, pool: str) -> Tensor:
    """[B, n, H, D] -> [B, H, D]; of several maxima the first has the gradient."""
    return x.max(1).values if pool == "max" else x.mean(1)


def span_summary(q: Tensor, k: Tensor, v: Tensor, pool: str, scale: float) -> tuple[Tensor, Tensor]:
    """Of the rows [B, n, H, D] of a span: khat and vhat [B, H, D]."""
    scores = (pooled(q, pool).unsqueeze(1) * k).sum(-1, keepdim=True) * scale
    return pooled(k, pool), (torch.softmax(scores, 1) * v).sum(1)


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    pattern: str = "fixed",
    pool: str = "max",
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """One softmax over direct keys and the summaries of spans."""
    (_, T, H, D), real = q.shape, torch.float64 if q.dtype == torch.float64 else torch.float32
    scale = D**-0.5 if scale is None else scale
    sets = [combiner_sets(i, T, block_size, pattern, causal) for i in range(T)]
    spans = [*dict.fromkeys(span for _, spans in sets for span in spans)]
    counts = torch.zeros(T, T + len(spans), dtype=torch.long)
    place = {span: T + n for n, span in enumerate(spans)}
    for i, (direct, seen) in enumerate(sets):
        counts[i, [*direct, *(place[span] for span in seen)]] = 1
    queries, keys, values = (grouped(x.to(real), H).movedim(2, 1) for x in (q, k, v))
    summaries = []
    for span in spans:
        rows = slice(span.start, span.stop, span.step)
        summaries.append(span_summary(queries[:, rows], keys[:, rows], values[:, rows], pool, scale))
    if spans:
        khat, vhat = (torch.stack(parts, 1) for parts in zip(*summaries, strict=True))
        keys, values = torch.cat([keys, khat], 1), torch.cat([values, vhat], 1)
    return dense_attention(queries, keys, values, counts.to(q.device), scale)[0].to(q.dtype)


# ---- clusters


def cluster_scores(x: Tensor, centroids: Tensor) -> Tensor:
    """x_t . mu_c [B, H, T, K]; head h of the clusters reads head h // (H / Hx) of x."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    return grouped(x.to(real), centroids.shape[0]) @ centroids.to(real).mT


def best_first(scores: Tensor) -> Tensor:
    """Places along the last dimension from the largest score on: NaN before all, of equal ones the lower place."""
    return scores.sort(stable=True, dim=-1, descending=True).indices


def nearest_cluster(x: Tensor, centroids: Tensor) -> Tensor:
    """[B, T, H]"""
    return best_first(cluster_scores(x, centroids))[..., 0].movedim(1, 2).to(torch.int32)


def marked_first(marked: Tensor, size: int) -> Tensor:
    """The first `size` places along the last dimension that are marked, then -1."""
    steps = marked.shape[-1]
    places = torch.where(marked, torch.arange(steps, device=marked.device), steps).sort(-1).values[..., :size]
    places = torch.nn.functional.pad(places, (0, max(0, size - steps)), value=steps)
    return torch.where(places < steps, places, -1).to(torch.int32)


def cluster_assign(x: Tensor, centroids: Tensor, size: int, *, mode: str = "balanced") -> tuple[Tensor, Tensor]:
    nearest = nearest_cluster(x, centroids)
    if mode == "balanced":
        order = best_first(cluster_scores(x, centroids).mT)
        rank = order.argsort(-1)
        return marked_first(rank < size, size), nearest
    clusters = torch.arange(centroids.shape[1], device=x.device).view(1, 1, -1, 1)
    return marked_first(nearest.movedim(1, 2).unsqueeze(2) == clusters, size), nearest


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    causal: bool = False,
    reduce: str = "mean",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A slot (c, a) attends to list c of k_index; the live slots of a token give its result."""
    steps, real = q.shape[1], torch.float64 if q.dtype == torch.float64 else torch.float32
    t = torch.arange(steps, device=q.device)
    tokens = q_index.flatten(2).long().unsqueeze(-1)  # [B, H, S, 1]
    listed = (k_index.unsqueeze(-1) == t).sum(-2)  # [B, H, K, T], how often
    counts = listed.repeat_interleave(q_index.shape[3], 2) * ((tokens >= 0) & (tokens < steps))
    if causal:
        counts = counts * (t <= tokens)
    slot_o, slot_lse = dense_attention(
        gather_rows(q, tokens.squeeze(-1)).to(real), k.to(real), v.to(real), counts, scale
    )
    slot_lse = slot_lse.to(real)
    owned = ((tokens == t) & (counts.sum(-1, keepdim=True) > 0)).mT  # [B, H, T, S], the live slots of a token
    if reduce == "last":
        place = torch.arange(1, owned.shape[-1] + 1, device=q.device)
        owned = owned & (place == last_place(owned, place))
    number = owned.sum(-1, keepdim=True)
    weights = owned.to(real) / (number.clamp(min=1) if reduce == "mean" else 1)
    o = weighted_sum(weights, owned, slot_o.movedim(1, 2))
    terms = slot_lse.unsqueeze(2).masked_fill(~owned, -torch.inf)
    return o.movedim(1, 2).to(q.dtype), log_sum_exp(terms).to(torch.float32)


def last_place(owned: Tensor, place: Tensor) -> Tensor:
    marks = owned * place
    return marks.amax(-1, keepdim=True) if marks.shape[-1] else marks.new_zeros(*marks.shape[:-1], 1)


def log_sum_exp(terms: Tensor) -> Tensor:
    """Along the last dimension; -inf, without a gradient, where all terms are -inf."""
    most = terms.detach().amax(-1, keepdim=True) if terms.shape[-1] else terms.new_zeros(*terms.shape[:-1], 1)
    shift = torch.where(most.isfinite(), most, 0.0)
    total = (terms - shift).exp().sum(-1, keepdim=True)
    return (torch.where(total == 0, 1.0, total).log().masked_fill(total == 0, -torch.inf) + shift).squeeze(-1)


def routing_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    size: int,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal: N(i) is the last `size` keys j <= i of i's cluster. Else balanced lists of queries and of keys."""
    nearest = nearest_cluster(q, centroids)
    if not causal:
        lists = [cluster_assign(x.repeat_interleave(q.shape[2] // x.shape[2], 2), centroids, size)[0] for x in (q, k)]
        return gathered_attention(q, k, v, *lists, scale=scale)[0], nearest
    t = torch.arange(q.shape[1], device=q.device)
    of_keys = nearest_cluster(k, centroids).movedim(1, 2).unsqueeze(2)  # [B, H, 1, T]
    same = (nearest.movedim(1, 2).unsqueeze(3) == of_keys) & (t <= t.unsqueeze(1))  # [B, H, T, T]
    later = same.sum(-1, keepdim=True) - same.cumsum(-1)  # keys of the cluster after j, up to i
    return dense_attention(q, k, v, (same & (later < size)).long(), scale)[0], nearest


def update_centroids(centroids: Tensor, x: Tensor, nearest: Tensor, *, decay: float = 0.999) -> Tensor:
    """mu_c <- decay mu_c + (1 - decay) mean{x_t : nearest_t = c}, over batch and time; of none unchanged."""
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    clusters = centroids.shape[1]
    tokens = x.to(real).movedim(2, 0).flatten(1, 2)  # [H, B T, D]
    mine = nearest.movedim(2, 0).flatten(1).unsqueeze(1) == torch.arange(clusters, device=x.device).unsqueeze(1)
    number = mine.sum(-1, keepdim=True)
    mean = weighted_sum(mine.to(real), mine, tokens) / number.clamp(min=1)
    moved = decay * centroids.to(real) + (1 - decay) * mean
    return torch.where(number > 0, moved, centroids.to(real)).to(centroids.dtype).detach()


# ---- rows by index


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, T, Hk, D], index [B or 1, H or 1, n] -> [B, n, H or Hk, D]: rows of x; zeros where an index is outside."""
    batch, steps, heads, _ = x.shape
    if index.shape[1] > heads:
        x = x.repeat_interleave(index.shape[1] // heads, dim=2)
    index = index.expand(batch, x.shape[2], -1).movedim(1, 2).long()
    valid = ((index >= 0) & (index < steps)).unsqueeze(-1)
    if steps == 0:
        return x.new_zeros(*index.shape, x.shape[3])
    rows = x.gather(1, index.clamp(0, steps - 1).unsqueeze(-1).expand(*index.shape, x.shape[3]))
    return torch.where(valid, rows, 0.0)


# ---- selected queries


def sampled_measure(q: Tensor, k: Tensor, sample_index: Tensor) -> Tensor:
    """M [B, H, T] = max_j <q_i, k_j> - (1/T) sum_j <q_i, k_j> over the samples j of i; -inf without any."""
    steps, heads, real = q.shape[1], q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    if steps == 0:
        return q.new_zeros(q.shape[0], heads, 0, dtype=real)
    scores = q.to(real).movedim(1, 2) @ grouped(k.to(real), heads).mT
    valid = (sample_index >= 0) & (sample_index < steps)
    places = sample_index.long().clamp(0, steps - 1).expand(*scores.shape[:2], -1, -1)
    sampled = scores.gather(3, places)
    none = torch.full_like(scores[..., :1], -torch.inf)
    most = torch.cat([none, sampled.masked_fill(~valid, -torch.inf)], -1).amax(-1)
    return torch.where(valid.any(-1), most - sampled.masked_fill(~valid, 0.0).sum(-1) / steps, -torch.inf)


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sample_index: Tensor,
    top: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """The queries of largest M attend to all keys, up to their own if causal; the others get a mean or running sum."""
    steps, heads, real = q.shape[1], q.shape[2], torch.float64 if q.dtype == torch.float64 else torch.float32
    order = sampled_measure(q.detach(), k.detach(), sample_index).sort(dim=-1, descending=True, stable=True).indices
    selected = torch.zeros_like(order, dtype=torch.bool).scatter(2, order[..., :top], True)
    t = torch.arange(steps, device=q.device)
    seen = t <= t.unsqueeze(1) if causal else (t >= 0).expand(steps, -1)
    o, _ = dense_attention(q, k, v, seen.long(), scale)
    values = grouped(v.to(real), heads)
    fill = values.cumsum(2) if causal else values.mean(2, keepdim=True).expand_as(values)
    return torch.where(selected.movedim(1, 2).unsqueeze(3), o, fill.movedim(1, 2).to(q.dtype))


# ---- pointers


def pointer_scores(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None,
    *,
    mode: str = "additive",
    clip: float = 10.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """log_softmax over the first `lengths` keys: of weight . tanh(query + key), or clip tanh(<query, key> / sqrt A)."""
    real = torch.float64 if query.dtype == torch.float64 else torch.float32
    steps = key.shape[1]
    seen = torch.ones(key.shape[0], 1, steps, dtype=torch.bool, device=key.device)
    if lengths is not None:
        seen = torch.arange(steps, device=key.device) < lengths.view(-1, 1, 1)
    q, k = query.to(real), torch.where(seen.mT, key.to(real), 0.0)
    if mode == "additive":
        scores = (q.unsqueeze(2) + k.unsqueeze(1)).tanh() @ weight.to(real)
    else:
        scores = clip * (q @ k.mT / query.shape[2] ** 0.5).tanh()
    some = seen.any(-1, keepdim=True)  # a row of -inf has no softmax
    log_p = torch.where(some, scores, 0.0).masked_fill(~seen & some, -torch.inf).log_softmax(-1)
    return torch.where(seen, log_p, -torch.inf).to(query.dtype)
