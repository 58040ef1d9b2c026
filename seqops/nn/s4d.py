"""S4D: long convolutions whose kernels are sums of decaying waves."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import diagonal
from .parts import check_positive, check_sequence, check_state, complex_of, expect, log_uniform, wide
from .ssm import diagonal_start, hold_diagonal
from .streaming import Streaming


class S4D(Streaming):
    """A diagonal state-space model for each channel, then a gated linear unit across channels.

        h_t = e^{Δλ} h_{t-1} + (e^{Δλ} - 1)/λ · x_t        y_t = 2 Re Σ_n C_n h_{t,n} + D x_t
        out = (W GELU(y) + b)_1 ⊙ σ((W GELU(y) + b)_2)

    Training computes y as one convolution with the kernel 2 Re Σ C (e^{Δλ} - 1)/λ e^{lΔλ}; a state adds its response.

    Args:
        dim: channels D.
        state_size: N, real states of a channel: N/2 complex ones are kept, the others are their conjugates. Even.
        init: "legs", "lin" or "inv", where λ starts.
        bidirectional: a second kernel reads what follows; the module then returns y alone, and has no state.
        step_min, step_max: Δ starts log-uniform between them, one of a channel.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of [B, D, N/2, 2] (real and imaginary parts, float32 at least).

    Re λ = -exp(log_decay), so that no mode grows. C starts complex normal, the skip D normal, as published. Weight
    decay leaves λ and Δ alone. No residual and no norm are inside: a network adds both around the module.

    Cost: O(T log T) a channel and O(T N) for the state that follows; a step O(D N). Memory: kernels [D, T].

    Raises:
        ValueError: for sizes below 1, an odd state_size, an unknown init, or x of another shape.

    Gu et al., "On the parameterization and initialization of diagonal state space models", 2022.
    """

    undecayed = ("log_step", "log_decay", "frequency")

    def __init__(
        self,
        dim: int,
        state_size: int = 64,
        init: str = "legs",
        bidirectional: bool = False,
        step_min: float = 1e-3,
        step_max: float = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, state_size=state_size)
        expect(state_size % 2 == 0, self, "state_size", "an even number", state_size)
        expect(init in ("legs", "lin", "inv"), self, "init", "'legs', 'lin' or 'inv'", repr(init))
        expect(0 < step_min <= step_max, self, "step_min", f"0 < step_min <= step_max = {step_max}", step_min)
        self.dim, self.state_size, self.bidirectional = dim, state_size, bidirectional
        made = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        eigenvalues = diagonal_start(init, state_size).expand(dim, -1)
        kernels = 1 + bidirectional
        self.log_step = torch.nn.Parameter(log_uniform((dim,), step_min, step_max, **made).log())
        self.log_decay = torch.nn.Parameter((-eigenvalues.real).log().to(**made))
        self.frequency = torch.nn.Parameter(eigenvalues.imag.to(**made, copy=True))
        self.c = torch.nn.Parameter(torch.randn(kernels, dim, state_size // 2, 2, **made) * math.sqrt(0.5))
        self.skip = torch.nn.Parameter(torch.randn(dim, **made))
        self.mix = torch.nn.Linear(dim, 2 * dim, **made)

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}, bidirectional={self.bidirectional}"

    def modes(self) -> tuple[Tensor, Tensor]:
        """z = Δλ [D, N/2] and the weights of the kernels [1 or 2, D, N/2], complex."""
        eigenvalues = torch.complex(-torch.exp(wide(self.log_decay)), wide(self.frequency))
        z, inflow = hold_diagonal(eigenvalues, torch.exp(wide(self.log_step))[:, None])
        return z, complex_of(self.c) * inflow

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return functional.glu(self.mix(functional.gelu(y).to(x.dtype)), -1)

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> Any:
        check_sequence(self, x, self.dim)
        z, c = self.modes()
        u, skip = wide(x).to(z.real.dtype), wide(self.skip)
        if self.bidirectional:
            expect(state is None, self, "state", "None where bidirectional", type(state).__name__)
            y = diagonal.fft_conv(u, diagonal.kernel(z, c[0], x.shape[1]), skip)
            return self.output(y + diagonal.anticausal(u, diagonal.kernel(z, c[1], x.shape[1]), 1), x)
        check_state(self, state, (x.shape[0], self.dim, self.state_size // 2, 2))
        before = diagonal.from_pairs(None if state is None else state[0], z)
        y, after = diagonal.convolve(u, z, c[0], skip, before)
        return self.output(y, x), (diagonal.as_pairs(after),)

    def step(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, D] and the state before it -> y [B, D] and the state after it, by the recurrence."""
        expect(not self.bidirectional, self, "step", "a causal module", "bidirectional=True")
        check_sequence(self, x[:, None], self.dim)
        check_state(self, state, (x.shape[0], self.dim, self.state_size // 2, 2))
        z, c = self.modes()
        before = diagonal.from_pairs(None if state is None else state[0], z)
        y, after = diagonal.advance(wide(x).to(z.real.dtype), z, c[0], wide(self.skip), before)
        return self.output(y, x), (diagonal.as_pairs(after),)
