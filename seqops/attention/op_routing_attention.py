"""routing_attention: checks, its ranges of keys sorted by cluster, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import register
from . import op as room
from . import op_cluster_assign as clusters
from . import op_gathered_attention as lists
from . import reference

ops = torch.ops.seqops

SCHEMA = (
    "routing_attention(Tensor q, Tensor k, Tensor v, Tensor centroids, SymInt size, *, bool causal=True, "
    "float? scale=None) -> (Tensor o, Tensor nearest)"
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    size: int,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> None:
    op = "routing_attention"
    room.check_heads(op, q, k, v)
    clusters.check_centroids(op, centroids, "q", q)
    room.check_at_least(op, "size", size, 1)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Tensor,
    size: int,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    centroids = centroids.detach()
    if not causal:
        of_queries, nearest = ops.cluster_lists(q.detach(), centroids, size, "balanced")
        of_keys, _ = ops.cluster_lists(k.detach(), centroids, size, "balanced")
        return ops.gathered_attention(q, k, v, of_queries, of_keys, scale=scale)[0], nearest
    nearest = ops.nearest_cluster(q.detach(), centroids)
    of_keys = ops.nearest_cluster(k.detach(), centroids)
    order, ranges = sorted_by_cluster(nearest.movedim(1, 2), of_keys.movedim(1, 2), centroids.shape[1], size)
    queries, keys = order
    slot_o, _ = ops.range_attention(
        ops.gather_rows(q, queries), ops.gather_rows(k, keys), ops.gather_rows(v, keys), ranges, scale=scale
    )
    places, _ = ops.counting_sort(queries, q.shape[1])  # of a permutation: its inverse
    return ops.gather_rows(slot_o, places), nearest


def sorted_by_cluster(
    of_queries: Tensor, of_keys: Tensor, count: int, size: int
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Clusters [B, H, T] of queries and keys: the orders in which both lie by cluster, then by time, and the ranges.

    With both sorted, the keys j <= i of i's cluster end where i would go among them, and start `size` before that, or
    where the cluster does. Neither end decreases from a query to the next.
    """
    steps = of_queries.shape[2]
    queries, _ = ops.counting_sort(of_queries, count)
    keys, starts = ops.counting_sort(of_keys, count)

    def placed(order: Tensor, cluster: Tensor) -> tuple[Tensor, Tensor]:
        """The cluster of what lies at each place, and (cluster, time) as one number, which ascends."""
        time = order.long()
        mine = cluster.long().gather(2, time)
        return mine, mine * steps + time

    cluster, of_query = placed(queries, of_queries)
    _, of_key = placed(keys, of_keys)
    end = lists.places_after(of_key, of_query)
    first = torch.maximum(end - size, starts.long().gather(2, cluster))
    return (queries, keys), torch.stack([first, end], 2).unsqueeze(2).to(torch.int32)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.routing_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("nearest_cluster", "cluster_lists", "counting_sort", "gather_rows", "range_attention", "reduce_slots"),
)


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
    """Attention inside clusters: a query sees keys whose nearest centroid is that of the query.

        c(t) = argmax_c <q_t, mu_c>;  c'(t) = argmax_c <k_t, mu_c>

    Causal: query i sees the last `size` keys j <= i with c'(j) = c(i): no token is dropped, and nothing depends on the
    future. Else the published form: of each cluster the `size` best queries of the whole sequence see its `size` best
    keys; a token has the mean of its results, and 0 if it is in no list.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        centroids: [H, K, D], in the dtype of q or, where that has 16 bits, in float32; without a gradient: see
            `update_centroids`.
        size: keys that a query sees, 1 or more.
        causal: see above.
        scale: a number; None is D**-0.5.

    Returns:
        o [B, T, H, D] in the dtype of q, and nearest [B, T, H], int32: c(t), which has no gradient.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: q, k and v sorted by cluster [B, T, H, D], and the result in that order; a gradient keeps them. Not causal:
    that of `cluster_assign` and `gathered_attention`.

    Example:
        >>> q = k = torch.nn.functional.normalize(torch.randn(2, 100, 4, 16), dim=-1)
        >>> o, nearest = seqops.routing_attention(q, k, torch.randn(2, 100, 4, 16), torch.randn(4, 8, 16), 32)
        >>> o.shape, nearest.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 100, 4]))

    Roy, Saffar, Vaswani and Grangier, "Efficient content-based sparse attention with routing transformers", 2021. Its
    causal form selects as the other one does, and so depends on the future; this one does not.
    """
    return ops.routing_attention(q, k, v, centroids, size, causal=causal, scale=scale)
