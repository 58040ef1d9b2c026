"""Gated linear attention: a decay for every key channel, chosen by the input."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..linear_attention import linear_attention
from .parts import check_multiple, check_positive, check_sequence, expect, rms_norm, split_heads, wide
from .streaming import State, Streaming


class GLA(Streaming):
    """Gated linear attention: each key channel of a head's state fades at a rate that the input chooses at every step.

        g_t = logsigmoid(W_2 W_1 x_t + b) / temperature        q, k, v = W_q x, W_k x, W_v x
        S_t = e^{g_t} S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t / √K
        y_t = W_o (RMSNorm of each head(o_t) silu(W_r x_t))

    Args:
        dim: D, channels of x and y.
        num_heads: H.
        key_dim: channels of all heads' keys together, H K; None: dim // 2.
        value_dim: channels of all heads' values together, H V; None: dim.
        rank: between W_1 and W_2.
        temperature: the higher, the longer the state remembers.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]; state S [B, H, K, V], float32 at least.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Initialisation: torch.nn.Linear's, b included; the norm 1. The authors' own is not confirmed here.

    Time O(T H K V), a step O(H K V). A gradient keeps q, k, v, g and the output gate.

    Yang et al., "Gated linear attention transformers with hardware-efficient training", 2024.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        key_dim = dim // 2 if key_dim is None else key_dim
        value_dim = dim if value_dim is None else value_dim
        check_positive(self, dim=dim, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, rank=rank)
        check_multiple(self, "key_dim", key_dim, "num_heads", num_heads)
        check_multiple(self, "value_dim", value_dim, "num_heads", num_heads)
        expect(temperature > 0, self, "temperature", "a number above 0", temperature)
        self.dim, self.num_heads, self.temperature = dim, num_heads, temperature
        options = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, key_dim, bias=False, **options)
        self.key = nn.Linear(dim, key_dim, bias=False, **options)
        self.value = nn.Linear(dim, value_dim, bias=False, **options)
        self.decay = nn.Sequential(nn.Linear(dim, rank, bias=False, **options), nn.Linear(rank, key_dim, **options))
        self.gate = nn.Linear(dim, value_dim, bias=False, **options)
        self.norm = nn.Parameter(torch.ones(value_dim // num_heads, **options))
        self.out = nn.Linear(value_dim, dim, bias=False, **options)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x [B, T, D], state or None -> y [B, T, D], state."""
        check_sequence(self, x, self.dim)
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        log_decay = split_heads(F.logsigmoid(wide(self.decay(x))) / self.temperature, self.num_heads)
        o, state = linear_attention(q, k, v, log_decay, state)
        return self.out(rms_norm(o, self.norm).flatten(2) * F.silu(self.gate(x))), state
