"""RetNet's multi-scale retention: linear attention with rotary positions and a fixed decay for each head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..linear_attention import linear_attention
from .parts import check_multiple, check_positive, check_sequence, check_state, expect, rms_norm, rotary, split_heads
from .streaming import State, Streaming


class RetNet(Streaming):
    """Multi-scale retention: head h forgets at a rate of its own, 1 - 2^{-5-h} a step, and knows distances by rotation.

        q_t, k_t = rotary(W_q x_t, t), rotary(W_k x_t, t)        v_t = W_v x_t
        S_t = (1 - 2^{-5-h}) S_{t-1} + k_t v_tᵀ        o_t = S_tᵀ q_t / √K
        y_t = W_o (RMSNorm of each head(o_t) silu(W_g x_t))

    Args:
        dim: D, channels of x and y; of all heads' keys together.
        num_heads: H; K = dim / H, an even number.
        value_dim: channels of all heads' values together, H V; None: 2 dim.
        base: of the rotary angles.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. State: S [B, H, K, V], float32 at least; and the number of steps read, int64 [B].

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Initialisation: Xavier uniform, of gain 2^{-5/2} for W_q, W_k, W_v, W_g, and 1 for W_o, as in the authors' code.
    That code also divides scores by sums of their sizes, which the norm cancels but for its epsilon, and pairs
    neighbouring channels in its rotation, where here channel i is paired with i + K/2.

    Time O(T H K V), a step O(H K V). A gradient keeps q, k, v and the gate.

    Sun et al., "Retentive network: a successor to transformer for large language models", 2023.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        value_dim: int | None = None,
        base: float = 10000.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = 2 * dim if value_dim is None else value_dim
        check_positive(self, dim=dim, num_heads=num_heads, value_dim=value_dim)
        check_multiple(self, "dim", dim, "2 * num_heads", 2 * num_heads)
        check_multiple(self, "value_dim", value_dim, "num_heads", num_heads)
        expect(base > 0, self, "base", "a number above 0", base)
        self.dim, self.num_heads, self.base = dim, num_heads, base
        options = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, dim, bias=False, **options)
        self.key = nn.Linear(dim, dim, bias=False, **options)
        self.value = nn.Linear(dim, value_dim, bias=False, **options)
        self.gate = nn.Linear(dim, value_dim, bias=False, **options)
        self.out = nn.Linear(value_dim, dim, bias=False, **options)
        for linear in (self.query, self.key, self.value, self.gate):
            nn.init.xavier_uniform_(linear.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x [B, T, D], state or None -> y [B, T, D], state."""
        check_sequence(self, x, self.dim)
        K, V = (size // self.num_heads for size in (self.dim, self.value.out_features))
        check_state(self, state, (len(x), self.num_heads, K, V), (len(x),))
        past, start = (None, x.new_zeros(len(x), dtype=torch.int64)) if state is None else state
        q, k, v = (split_heads(project(x), self.num_heads) for project in (self.query, self.key, self.value))
        q, k = rotary(q, start, self.base), rotary(k, start, self.base)
        # Computed here, not stored: bfloat16 would round the slow heads' decays to 1.
        head = torch.arange(self.num_heads, device=x.device, dtype=torch.float64)
        log_decay = torch.log1p(-torch.exp2(-5 - head)).to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        o, past = linear_attention(q, k, v, log_decay, past)
        return self.out(rms_norm(o).flatten(2) * F.silu(self.gate(x))), (past, start + x.shape[1])
