"""RoutingAttention: some heads attend to what came just before, the others to tokens of their cluster."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import cluster_assign, range_attention, routing_attention, update_centroids
from .parts import (
    append,
    cached_attention,
    check_multiple,
    check_positive,
    check_sequence,
    expect,
    rotary,
    split_heads,
    wide,
)
from .streaming import State, Streaming


class RoutingAttention(Streaming):
    """Causal attention whose local heads see the last `window` steps, and whose other heads see their cluster.

        local heads:    q, k = rotary(x W_q), rotary(x W_k);  i sees j with i - window < j <= i
        cluster heads:  q_t = k_t = (u - mean u) / std u,  u = x_t W_s;  c(t) = argmax_c <q_t, mu_c>
                        i sees the last `size` steps j <= i with c(j) = c(i);  there are no positions
        y = W_o (heads side by side)

    The centroids mu are moving averages, not learnt by gradients. After the optimiser's step of a training forward:

        loss.backward(); optimizer.step(); module.update_centroids()

    The published causal form chooses keys by their rank in the whole sequence, and so depends on the future; this one
    does not. The published relative bias is replaced by rotary positions. The published loss 1e-4 mean |q - mu_c|^2,
    which draws tokens to their centroids, is left out. In bfloat16 the centroids' small moves are mostly rounded away:
    train in float32, or under autocast.

    Args:
        dim: channels of x, a multiple of num_heads.
        num_heads: H, heads of D = dim / num_heads channels; D even.
        num_local_heads: how many of them are local: at least 1, and fewer than num_heads.
        window: steps that a local head sees, its own among them.
        num_clusters: K, of each cluster head; about sqrt(T).
        size: steps of its cluster that a query sees; about T / K.
        decay: of the centroids' moving averages.
        base: of the rotary positions.
        device, dtype: of the parameters.

    Shapes: x [B, T, dim] -> y [B, T, dim].

    State: the number of steps read [B]; keys and values of the L local heads [B, window - 1, L, D]; of the others the
    last `size` of each cluster [B, K size, H - L, D], and how many there are [B, H - L, K].

    Initialisation: torch.nn.Linear's, no biases; centroids are normalised like q, from N(0, 1).

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: `update_centroids` without a training forward before it.

    Cost: `window` and at most `size` keys a query, and K products with centroids.

    Roy, Saffar, Vaswani and Grangier, "Efficient content-based sparse attention with routing transformers", 2021.
    """

    centroids: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_local_heads: int,
        window: int,
        num_clusters: int,
        size: int,
        decay: float = 0.999,
        base: float = 10000.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads, window=window, num_clusters=num_clusters, size=size)
        check_multiple(self, "dim", dim, "2 num_heads", 2 * num_heads)
        expect(
            1 <= num_local_heads < num_heads,
            self,
            "num_local_heads",
            f"1 to num_heads - 1 = {num_heads - 1}",
            num_local_heads,
        )
        expect(0 <= decay <= 1, self, "decay", "a number from 0 to 1", decay)
        self.dim, self.num_heads, self.num_local_heads, self.window = dim, num_heads, num_local_heads, window
        self.size, self.decay, self.base = size, decay, base
        D, options = dim // num_heads, {"bias": False, "device": device, "dtype": dtype}
        self.query = torch.nn.Linear(dim, num_local_heads * D, **options)
        self.key = torch.nn.Linear(dim, num_local_heads * D, **options)
        self.shared = torch.nn.Linear(dim, dim - num_local_heads * D, **options)
        self.value = torch.nn.Linear(dim, dim, **options)
        self.out = torch.nn.Linear(dim, dim, **options)
        drawn = torch.randn(num_heads - num_local_heads, num_clusters, D, device=device, dtype=dtype)
        self.register_buffer("centroids", functional.layer_norm(drawn, (D,)))
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        local, D = self.num_local_heads, self.dim // self.num_heads
        v = split_heads(self.value(x), self.num_heads)
        q, k = split_heads(self.query(x), local), split_heads(self.key(x), local)
        start = x.new_zeros(x.shape[0], dtype=torch.int64) if state is None else state[0]
        q, k = rotary(q, start, self.base), rotary(k, start, self.base)
        near, cache = cached_attention(q, k, v[:, :, :local], None if state is None else state[1], self.window - 1)

        shared = split_heads(self.shared(x), self.num_heads - local)
        shared = functional.layer_norm(wide(shared), (D,)).to(shared.dtype)
        if state is None:
            far, nearest = routing_attention(shared, shared, v[:, :, local:], self.centroids, self.size)
            by_cluster = Rings.empty(shared, self.centroids.shape[1], self.size).then(shared, v[:, :, local:], nearest)
        else:
            _, nearest = cluster_assign(shared, self.centroids, 1, mode="causal")
            by_cluster = Rings(*state[2]).then(shared, v[:, :, local:], nearest)
            far = by_cluster.attend(shared, nearest)
        if self.training:
            self.seen = (shared.detach(), nearest)
        return self.out(torch.cat([near, far], 2).flatten(2)), (start + x.shape[1], cache, by_cluster.last())

    @torch.no_grad()
    def update_centroids(self) -> None:
        """Moves the centroids towards the tokens of the last training forward: one step of online k-means."""
        if self.seen is None:
            raise RuntimeError("RoutingAttention: update_centroids: expected a forward in training mode before it")
        self.centroids.copy_(update_centroids(self.centroids, *self.seen, decay=self.decay))
        self.seen = None


class Rings(NamedTuple):
    """The last tokens of each cluster: what a step can still see. Letters as above, H cluster heads, R rows a ring."""

    k: Tensor  # [B, K R, H, D], in each cluster by time, the newest last
    v: Tensor
    filled: Tensor  # [B, H, K] int64: rows that hold a token

    @staticmethod
    def empty(k: Tensor, clusters: int, size: int) -> Rings:
        rows = k.new_zeros(k.shape[0], clusters * size, *k.shape[2:])
        return Rings(rows, rows, torch.zeros(k.shape[0], k.shape[2], clusters, dtype=torch.int64, device=k.device))

    def then(self, k: Tensor, v: Tensor, nearest: Tensor) -> Sorted:
        """The rings and after them new tokens k, v [B, T, H, D] of clusters [B, T, H], sorted by cluster and time."""
        K, size = self.filled.shape[2], self.k.shape[1] // self.filled.shape[2]
        cluster = torch.arange(K, device=k.device)[:, None].expand(K, size)
        row = torch.arange(size, device=k.device)
        # A row without a token belongs to no cluster: K.
        held = torch.where(row >= size - self.filled[..., None], cluster, K).flatten(2)
        k, v = append(self.k, k), append(self.v, v)
        time = torch.arange(k.shape[1], device=k.device)
        order, place = (torch.cat([held, nearest.movedim(2, 1).long()], 2) * k.shape[1] + time).sort(2)
        return Sorted(take(k, place), take(v, place), order.contiguous(), K, size)


class Sorted(NamedTuple):
    """Keys and values by cluster, in each by time: those of a cluster up to any time are a range."""

    k: Tensor  # [B, S, H, D]
    v: Tensor
    order: Tensor  # [B, H, S], ascending: cluster * S + time
    clusters: int
    size: int

    def attend(self, q: Tensor, nearest: Tensor) -> Tensor:
        """q [B, T, H, D] of the last T tokens in time, and their clusters [B, T, H] -> o [B, T, H, D]."""
        S, T = self.order.shape[2], q.shape[1]
        time = torch.arange(S - T, S, device=q.device)
        asked, place = (nearest.movedim(2, 1).long() * S + time).sort(2)
        end = torch.searchsorted(self.order, asked.contiguous(), right=True)
        first = torch.searchsorted(self.order, (asked - asked % S).contiguous())
        ranges = torch.stack([torch.maximum(first, end - self.size), end], 2)[:, :, None].int()
        o, _ = range_attention(take(q, place), self.k, self.v, ranges)
        return torch.zeros_like(o).scatter(1, place.movedim(1, 2)[..., None].expand_as(o), o)

    def last(self) -> Rings:
        """The last `size` tokens of each cluster."""
        (B, H, S), K = self.order.shape, self.clusters
        edges = torch.arange(K + 1, device=self.order.device).mul(S).expand(B, H, K + 1)
        bounds = torch.searchsorted(self.order, edges.contiguous())
        row = bounds[..., 1:, None] - self.size + torch.arange(self.size, device=bounds.device)
        kept = (row >= bounds[..., :-1, None]).flatten(2).movedim(1, 2)[..., None]
        k, v = (torch.where(kept, take(t, row.clamp(min=0).flatten(2)), 0) for t in (self.k, self.v))
        return Rings(k, v, bounds.diff(dim=-1).clamp(max=self.size))


def take(x: Tensor, place: Tensor) -> Tensor:
    """Rows of x [B, S, H, D] at the places [B, H, N] of each head -> [B, N, H, D]."""
    index = place.movedim(1, 2)[..., None]
    return x.gather(1, index.expand(*index.shape[:3], x.shape[3]))
