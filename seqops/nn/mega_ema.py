"""MegaEMA: several exponential moving averages of each channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..conv import fft_conv
from . import diagonal
from .parts import check_positive, check_sequence, check_state, expect, wide
from .streaming import Streaming


class MegaEMA(Streaming):
    """Damped exponential moving averages, N of each channel, summed up.

        p = σ(delta)    q = 1 - p σ(alpha)
        h_t = q ⊙ h_{t-1} + p ⊙ beta x_t        y_t = SiLU(Σ_n gamma_n h_{t,n} / √N + omega x_t)

    Training computes one convolution with the kernel Σ_n gamma_n p_n beta_n q_nˡ / √N; a state adds its response.

    Args:
        dim: channels D.
        state_size: N, averages of a channel.
        bidirectional: averages of their own run backwards; the module then returns y alone.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of h / (p beta) [B, D, N], float32 at least.

    delta and alpha start N(0, 0.2), beta alternates ±1 plus N(0, 0.02), gamma and omega N(0, 1), as published; weight
    decay leaves delta and alpha alone.

    Cost: O(T log T) a channel and O(T N) for the state that follows; a step O(D N). Memory: kernels [D, T].

    Raises:
        ValueError: for sizes below 1, or x of another shape.

    Ma et al., "Mega: moving average equipped gated attention", 2023.
    """

    undecayed = ("delta", "alpha")

    def __init__(
        self,
        dim: int,
        state_size: int = 16,
        bidirectional: bool = False,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, state_size=state_size)
        self.dim, self.state_size, self.bidirectional = dim, state_size, bidirectional
        shape, made = (1 + bidirectional, dim, state_size), {"device": device, "dtype": dtype}
        self.delta = torch.nn.Parameter(0.2 * torch.randn(shape, **made))
        self.alpha = torch.nn.Parameter(0.2 * torch.randn(shape, **made))
        sign = 1 - 2 * torch.remainder(torch.arange(state_size, **made), 2)
        self.beta = torch.nn.Parameter(sign + 0.02 * torch.randn(shape, **made))
        self.gamma = torch.nn.Parameter(torch.randn(shape, **made))
        self.omega = torch.nn.Parameter(torch.randn(dim, **made))

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}, bidirectional={self.bidirectional}"

    def modes(self) -> tuple[Tensor, Tensor]:
        """z = log q and the weights of the kernels, both [1 or 2, D, N]."""
        p = torch.sigmoid(wide(self.delta))
        # Sigmoids that round to 1 would make z infinite, and 0 z no number.
        gone = (p * torch.sigmoid(wide(self.alpha))).clamp(max=1 - torch.finfo(p.dtype).eps)
        z = torch.log1p(-gone)
        return z, wide(self.gamma) * p * wide(self.beta) / math.sqrt(self.state_size)

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> Any:
        check_sequence(self, x, self.dim)
        expect(state is None or not self.bidirectional, self, "state", "None where bidirectional", type(state).__name__)
        check_state(self, state, (x.shape[0], self.dim, self.state_size))
        (z, c), u, omega = self.modes(), wide(x), wide(self.omega)
        u = u.to(z.dtype)
        if self.bidirectional:
            y = fft_conv(u, diagonal.kernel(z[0], c[0], x.shape[1]), omega)
            y = y + diagonal.anticausal(u, diagonal.kernel(z[1], c[1], x.shape[1]), 0)
            return functional.silu(y).to(x.dtype)
        y, after = diagonal.convolve(u, z[0], c[0], omega, None if state is None else state[0])
        return functional.silu(y).to(x.dtype), (after,)

    def step(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, D] and the state before it -> y [B, D] and the state after it, by the recurrence."""
        expect(not self.bidirectional, self, "step", "a causal module", "bidirectional=True")
        check_sequence(self, x[:, None], self.dim)
        check_state(self, state, (x.shape[0], self.dim, self.state_size))
        z, c = self.modes()
        before = None if state is None else state[0]
        y, after = diagonal.advance(wide(x).to(z.dtype), z[0], c[0], wide(self.omega), before)
        return functional.silu(y).to(x.dtype), (after,)
