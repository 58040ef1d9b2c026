"""Aaren: attention whose only query is learned, and so a recurrence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..scan import softmax_scan
from .parts import check_multiple, check_positive, check_sequence, split_heads, wide
from .streaming import Streaming


class Aaren(Streaming):
    """Softmax attention of one learned query a head to everything read so far, with a state of fixed size.

        s_t = q · W_k x_t / sqrt(D / H)                                    of each head
        o_t = sum_{i<=t} e^{s_i} W_v x_i / sum_{i<=t} e^{s_i}              y_t = W_o o_t

    The query is the same at every step, so keys are needed as scores alone: `q W_k` is one matrix [H, dim], and no key
    is ever computed.

    Args:
        dim: D, features of x and y.
        num_heads: H, divides dim.
        bias: whether the projections of values and outputs have biases; one of the keys would cancel.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (lse [B, H], o [B, H, D / H]), float32 at least: the logarithm of the sum
    of weights so far, and the average of values so far. Without any step lse is -inf and o is 0.

    Initialisation: query normal / sqrt(D / H), projections as torch.nn.Linear's. The authors' code was not found;
    theirs are unconfirmed.

    Memory: a gradient keeps 3 D + 3 H numbers for each step. Time: O(T D²) for the projections, O(T D) for the scan.

        y, state = Aaren(64, num_heads=4)(torch.randn(2, 100, 64))

    Raises:
        ValueError: a size is not positive, num_heads does not divide dim, or x has a wrong shape or dtype.

    Feng et al., "Attention as an RNN", 2024.
    """

    undecayed = ("query",)

    def __init__(
        self, dim: int, num_heads: int = 1, bias: bool = True, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.num_heads = dim, num_heads
        options = {"device": device, "dtype": dtype}
        self.query = torch.nn.Parameter(torch.empty(num_heads, dim // num_heads, **options))
        self.keys = torch.nn.Linear(dim, dim, bias=False, **options)
        self.values = torch.nn.Linear(dim, dim, bias=bias, **options)
        self.out = torch.nn.Linear(dim, dim, bias=bias, **options)
        torch.nn.init.normal_(self.query, std=(dim // num_heads) ** -0.5)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, D] and (lse, o) of the steps before -> y [B, T, D], (lse, o) of the last step."""
        check_sequence(self, x, self.dim)
        reader = torch.einsum("hd,hdi->hi", wide(self.query), wide(self.keys.weight).unflatten(0, (self.num_heads, -1)))
        s = functional.linear(x, (reader * (self.dim // self.num_heads) ** -0.5).to(x.dtype))  # [B, T, H]
        v = split_heads(self.values(x), self.num_heads)
        s, before = wide(s), (None, None) if state is None else state
        o, lse = softmax_scan(s, v, *before)
        y = self.out(o.flatten(2))
        if x.shape[1] > 0:
            state = (lse[:, -1].clone(), wide(o[:, -1]).clone())
        elif state is None:
            state = (torch.full_like(s.sum(1), -torch.inf), torch.zeros_like(wide(v.sum(1))))
        return y, state
