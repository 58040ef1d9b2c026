"""window_attention: checks, the ranges of its windows and of its global keys, and the public function.

Letters as in op.py; G entries of global_index, N packed sequences, S = N G slots of global positions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import register, validate
from . import op as room
from . import ranges, reference

ops = torch.ops.seqops

SCHEMA = (
    "window_attention(Tensor q, Tensor k, Tensor v, int left, int right, *, Tensor? global_index=None, "
    "float? scale=None, Tensor? cu_seqlens=None) -> (Tensor o, Tensor lse)"
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    left: int,
    right: int,
    *,
    global_index: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "window_attention"
    room.check_heads(op, q, k, v)
    room.check_at_least(op, "left", left, -1)
    room.check_at_least(op, "right", right, -1)
    if global_index is not None:
        validate.check_device(op, "global_index", global_index, "q", q)
        validate.check_type(op, "global_index", global_index, (torch.int32, torch.int64))
        got = f"shape {validate.shape_of(global_index)}"
        validate.expect(global_index.ndim == 1, op, "global_index", "1 dimension [G]", got)
    validate.check_cu_seqlens(op, cu_seqlens, "q", q)


# ---- the window itself


def windows(
    T: int, left: int, right: int, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of each position its sequence's start and end, and its window's: int64 [T] each."""
    t, start, end = ranges.sequences(T, cu_seqlens, device)
    start, end = (edge if isinstance(edge, Tensor) else torch.full_like(t, edge) for edge in (start, end))
    first = start if left < 0 else torch.maximum(t - left, start)
    # Not t + right + 1, which a large `right` would carry beyond 64 bits.
    last = end if right < 0 else torch.where(end - t > right, t + min(right, room.FAR) + 1, end)
    return start, end, first, last


@ranges.kept
def plan(T: int, left: int, right: int, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    _, _, first, last = windows(T, left, right, cu_seqlens, device)
    return ranges.stack([(first, last)])


# ---- the global positions


class Globals(NamedTuple):
    """What the slots of global positions are, and what they see and are seen by."""

    index: Tensor  # [1, 1, S]: the position of a slot, ascending in each sequence; -1 where there is none
    seen: Tensor  # ranges of slots, [1, 1, 2, 2, T]: beyond the window on the left, and on the right
    rows: Tensor  # ranges of keys, [1, 1, 1, 2, S]: what the query of a slot sees
    slot: Tensor  # [1, 1, T]: the slot that a position has, -1 for none


def place_globals(
    T: int, left: int, right: int, global_index: Tensor, cu_seqlens: Tensor | None, device: torch.device
) -> Globals:
    """Nothing here waits for values: a duplicate and an entry beyond its sequence keep a slot that nobody sees.

    Slots are ordered by a key: twice a position, and one less than twice its sequence's end where there is none.
    """
    edges = ranges.steps(2, device) * T if cu_seqlens is None else cu_seqlens.long()
    starts, ends = edges[:-1].unsqueeze(1), edges[1:].unsqueeze(1)
    entries = global_index.long().sort().values
    repeated = torch.cat([entries.new_zeros(1, dtype=torch.bool), entries[1:] == entries[:-1]])[: entries.shape[0]]
    valid = (entries >= 0) & (entries < ends - starts) & ~repeated
    keys = torch.where(valid, 2 * (starts + entries), 2 * ends - 1).sort(1).values.flatten()
    valid = keys % 2 == 0
    position = torch.where(valid, keys // 2, -1)

    start, end, first, last = windows(T, left, right, cu_seqlens, device)

    def slots(begin: Tensor, stop: Tensor) -> ranges.Part:
        """Of the positions from begin to stop - 1, in one sequence."""
        low, high = torch.searchsorted(keys, 2 * begin), torch.searchsorted(keys, 2 * stop - 1)
        return low, torch.maximum(low, high)

    parts = [slots(start, first), slots(last, last if right == 0 else end)]
    begin, stop = (edge.expand(-1, entries.shape[0]).flatten() for edge in (starts, ends))
    seen_by_rows = (torch.where(valid, begin, stop), torch.where(valid, position + 1, stop) if right == 0 else stop)
    t = ranges.steps(T, device)
    at = torch.searchsorted(keys, 2 * t)
    taken = torch.cat([keys, keys.new_full((1,), -1)])[at] == 2 * t
    slot = torch.where(taken, at, -1)
    return Globals(position[None, None], ranges.stack(parts), ranges.stack([seen_by_rows]), slot[None, None])


def composed(
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
    T = q.shape[1]
    window = plan(T, left, right, cu_seqlens, q.device)
    if global_index is None:
        o, lse = ops.range_attention(q, k, v, window, scale=scale)
        return o, lse.to(torch.float32)
    index, seen, rows, slot = place_globals(T, left, right, global_index, cu_seqlens, q.device)
    k2, v2 = ops.gather_rows(k, index), ops.gather_rows(v, index)
    o, lse = ops.range_attention(q, k, v, window, k2, v2, seen, scale=scale)
    # The rows of global positions: all of them apart, each in the place of its position.
    o_rows, lse_rows = ops.range_attention(ops.gather_rows(q, index), k, v, rows, scale=scale)
    o_rows, lse_rows = ops.gather_rows(o_rows, slot), ops.gather_rows(lse_rows.mT.unsqueeze(-1), slot)
    taken = slot[0, 0] >= 0
    o = torch.where(taken[:, None, None], o_rows, o)
    return o, torch.where(taken, lse_rows.squeeze(-1).mT, lse).to(torch.float32)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.window_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("range_attention", "gather_rows"),
)


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
    """Attention in a sliding window, with global positions that see and are seen by all.

        N(i) = {j : i - left <= j <= i + right}, and every global position; of a global i every j
        s_ij = scale <q_i, k_j>;  lse_i = log sum_{j in N(i)} exp s_ij;  o_i = sum_{j in N(i)} exp(s_ij - lse_i) v_j

    With `right = 0` it is causal: global positions, too, see and are seen no later than at their own place.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        left, right: positions seen before and after a query's own, 0 or more; -1: all.
        global_index: [G] int32 or int64, a set of positions counted from the start of each sequence: a repeated one
            counts once, and one that a sequence does not have is left out there.
        scale: a number; None is D**-0.5.
        cu_seqlens: [N + 1] int32 or int64, from 0 to T without decrease: with B = 1, sequence n is the positions
            `cu_seqlens[n]:cu_seqlens[n + 1]` and independent of the others.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse [B, H, T] in float32, natural, differentiable.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps q, k, v, o and lse. With global positions it also keeps their rows of q, k, v, o and lse
    (of every packed sequence), and one more tensor of the size of o is made on the way.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> sinks = torch.tensor([0, 1, 2, 3])
        >>> o, lse = seqops.window_attention(q, k, v, 31, 0, global_index=sinks)  # the last 32, and the first four
        >>> o.shape
        torch.Size([2, 100, 4, 16])

    Beltagy et al., "Longformer: the long-document transformer", 2020; its window of w is left = right = w / 2.
    """
    return ops.window_attention(q, k, v, left, right, global_index=global_index, scale=scale, cu_seqlens=cu_seqlens)
