"""What combiner_attention is made of: the ranges of its patterns, and calls of the operators that do the work.

Letters, beside the room's: s block size or width of a grid's rows, S rows of summaries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ranges

ops = torch.ops.seqops


def levels(T: int, block_size: int) -> list[int]:
    """Pairs of siblings on each level of the tree."""
    pairs, nodes = [], -(-T // block_size)
    while nodes > 1:
        pairs.append(nodes // 2)
        nodes = (nodes + 1) // 2
    return pairs


def spans_of(T: int, block_size: int, tree: bool, causal: bool) -> int:
    """How many spans some query sees."""
    if tree:
        return sum(levels(T, block_size)) * (1 if causal else 2)
    blocks = -(-T // block_size)
    return max(blocks - 1, 0) if causal else blocks


def rows_of(T: int, block_size: int, tree: bool, causal: bool) -> int:
    """Rows of summaries, the last ones zeros: 2 or more where T is, since compilers take sizes of 0 and 1 apart."""
    return (spans_of(T, block_size, tree, causal) if tree else -(-T // block_size)) + 1


# ---- fixed and logsparse: spans are runs of blocks


@ranges.kept
def plan(T: int, block_size: int, tree: bool, causal: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ranges of direct keys, and of summaries in the order in which span_summaries has them."""
    t = ranges.steps(T, device)
    block = t // block_size
    first = block * block_size
    own = ranges.stack([(first, t + 1 if causal else torch.clamp(first + block_size, max=T))])
    if not tree:
        after = (block + 1, torch.full_like(block, -(-T // block_size)))
        return own, ranges.stack([(torch.zeros_like(block), block)] + ([] if causal else [after]))
    parts, begin = [], 0
    for level, pairs in enumerate(levels(T, block_size)):
        node = block >> level
        bit = node & 1
        if causal:  # left siblings alone: one row for each pair
            row = begin + (node >> 1)
            parts.append((row, row + bit))
        else:
            row, end = begin + node, begin + 2 * pairs
            parts.append((row - bit, row))
            parts.append((torch.clamp(row + 1, max=end), torch.clamp(row + 2 - bit, max=end)))
        begin += pairs if causal else 2 * pairs
    return own, ranges.stack(parts)


def over_blocks(
    q: Tensor, k: Tensor, v: Tensor, s: int, *, tree: bool, pool: str, causal: bool, scale: float
) -> Tensor:
    T = q.shape[1]
    if tree and not levels(T, s):
        own = plan(T, s, False, causal, q.device)[0]
        return ops.range_attention(q, k, v, own, scale=scale)[0]
    own, summaries = plan(T, s, tree, causal, q.device)
    k, v = (of_heads(x, q.shape[2]) for x in (k, v))
    khat, vhat = ops.span_summaries(q, k, v, s, tree=tree, pool=pool, causal=causal, scale=scale)
    return ops.range_attention(q, k, v, own, khat, vhat, summaries, scale=scale)[0]


def of_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, Hk, D], each head repeated for its query heads: their summaries differ."""
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


# ---- axial: a grid of rows of s positions; spans are pieces of columns


def places(T: int, s: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions column by column: the place of each position, and where its column begins and ends."""
    t = ranges.steps(T, device)
    row, column = t // s, t % s
    full = T // s  # rows; of the columns before `long`, one more
    long = T - full * s
    first = column * full + torch.clamp(column, max=long)
    return first + row, first, first + full + (column < long)


@ranges.kept
def columns(T: int, s: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions in the order of columns, and the place of each there: permutations [1, 1, T] that undo each other."""
    place = places(T, s, device)[0]
    return torch.argsort(place).to(torch.int32).view(1, 1, -1), place.to(torch.int32).view(1, 1, -1)


@ranges.kept
def plan_axial(T: int, s: int, causal: bool, device: torch.device) -> tuple[Tensor, ...]:
    """Ranges of: own rows; summaries, those of rows above first; own columns; columns down to a place, and from it on.

    The last three in the order of columns. Nobody sees a summary of the last row and above, or of the first and below.
    """
    t = ranges.steps(T, device)
    row = t // s * s
    own = ranges.stack([(row, t + 1 if causal else torch.clamp(row + s, max=T))])
    # The summaries above row r end in row r - 1, where position t - s is the own column's.
    summaries = [(torch.clamp(at, min=0), torch.clamp(to, min=0)) for at, to in ((row - s, t - s), (t - s + 1, row))]
    place, first, end = places(T, s, device)
    own_columns = [(first, place)]
    if not causal:
        for at, to in ((row + s, t + s), (t + s + 1, row + 2 * s)):
            summaries.append((T + torch.clamp(at, max=T), T + torch.clamp(to, max=T)))
        own_columns.append((place + 1, end))
    order = torch.argsort(place)

    def in_columns(*parts: ranges.Part) -> Tensor:
        return ranges.stack([(at[order], to[order]) for at, to in parts])

    down = in_columns((torch.where(row + s < T, first, place + 1), place + 1))
    up = in_columns((place, torch.where(t >= s, end, place)))
    return own, ranges.stack(summaries), in_columns(*own_columns), down, up


def over_grid(q: Tensor, k: Tensor, v: Tensor, s: int, *, pool: str, causal: bool, scale: float) -> Tensor:
    """Rows and summaries are one softmax, own columns another one, and both are merged."""
    T, H = q.shape[1:3]
    own, summaries, own_columns, down, up = plan_axial(T, s, causal, q.device)
    by_column, by_row = columns(T, s, q.device)
    k_columns, v_columns = (ops.gather_rows(x, by_column) for x in (k, v))
    o_columns, lse_columns = ops.range_attention(
        ops.gather_rows(q, by_column), k_columns, v_columns, own_columns, scale=scale
    )
    khats, vhats = [], []
    for seen, reverse in ((down, False),) if causal else ((down, False), (up, True)):
        qhat, khat = (ops.running_pool(x, s, pool=pool, reverse=reverse) for x in (q, k))
        vhat, _ = ops.range_attention(ops.gather_rows(qhat, by_column), k_columns, v_columns, seen, scale=scale)
        khats.append(of_heads(khat, H))
        vhats.append(ops.gather_rows(vhat, by_row))
    khat, vhat = (parts[0] if causal else torch.cat(parts, 1) for parts in (khats, vhats))
    k, v = (of_heads(x, H) for x in (k, v))
    o_rows, lse_rows = ops.range_attention(q, k, v, own, khat, vhat, summaries, scale=scale)
    lse_columns = ops.gather_rows(lse_columns.transpose(1, 2).unsqueeze(3), by_row).squeeze(3).transpose(1, 2)
    return ops.merge_attention(o_rows, lse_rows, ops.gather_rows(o_columns, by_row), lse_columns)[0]
