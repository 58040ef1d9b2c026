"""Informer's attention: a few queries that stand out attend, the others take the mean of the values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..attention import prob_sparse_attention
from .parts import Projections, check_positive, check_sequence


class ProbSparseAttention(torch.nn.Module):
    """Self-attention for the queries whose scores stand out among sampled keys; the others get the mean of the values.

        U = min(factor ceil(ln T), T)  samples j(i, 1..U) of each query i;  as many queries of each head attend
        M_i = max_u <q_i, k_j(i,u)> - (1/T) sum_u <q_i, k_j(i,u)>
        o_i = sum_j softmax_j(<q_i, k_j> / sqrt(D)) v_j    for the U queries of largest M
        o_i = mean_j v_j, or sum_{j <= i} v_j if causal    for the others

    It reads whole sequences: what a query gets depends on later ones, which can displace it from the selection, even if
    causal. So there is no state. While training the samples are drawn anew in every call, from torch's generator; in
    evaluation they are a fixed scramble of (i, u), so that equal inputs give equal outputs (published code draws there,
    too).

    Args:
        dim: channels of x, a multiple of num_heads.
        num_heads: H, heads of dim / num_heads channels.
        factor: samples, and queries that attend, for each unit of ln T.
        causal: a selected query sees no later key, and the others get running sums, as published.
        device, dtype: of the parameters.

    Shapes: x [B, T, dim] -> y [B, T, dim].

    Initialisation: torch.nn.Linear's. The maps of queries and keys have no bias.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: O(T ln T) products of queries and keys, and as many samples in memory.

    Zhou et al., "Informer: beyond efficient Transformer for long sequence time-series forecasting", 2021.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        factor: int = 5,
        causal: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, factor=factor)
        self.dim, self.factor, self.causal = dim, factor, causal
        self.project = Projections(self, dim, num_heads, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(self, x, self.dim)
        T = x.shape[1]
        count = min(self.factor * math.ceil(math.log(T)), T) if T > 1 else T
        if self.training:
            samples = torch.randint(max(T, 1), (T, count), device=x.device)
        else:
            samples = scrambled(T, count, x.device)
        q, k, v = self.project(x)
        return self.project.join(prob_sparse_attention(q, k, v, samples, max(count, 1), causal=self.causal))


def scrambled(T: int, count: int, device: torch.device) -> Tensor:
    """Numbers below T [T, count] that look random and are always the same."""
    query, sample = torch.arange(T, device=device)[:, None], torch.arange(count, device=device)
    mixed = (query * 7919 + sample * 104729 + 12345) & 0x7FFFFFFF
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 15)) * 1103515245 & 0x7FFFFFFF
    return (mixed >> 7) % max(T, 1)
