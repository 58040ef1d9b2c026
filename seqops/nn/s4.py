"""S4: long convolutions of a state-space model with a normal matrix less one of rank 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..conv import fft_conv
from ..ssm import cauchy_kernel
from . import dense
from .diagonal import anticausal
from .parts import check_positive, check_sequence, check_state, complex_of, expect, log_uniform, wide
from .ssm import bilinear, normal_legs
from .streaming import Streaming


class S4(Streaming):
    """A state-space model A = diag(λ) - P P* for each channel, then a gated linear unit across channels.

        Ā = (I - ΔA/2)⁻¹ (I + ΔA/2)    B̄ = (I - ΔA/2)⁻¹ ΔB    h_t = Ā h_{t-1} + B̄ x_t    y_t = C h_t + D x_t
        out = (W GELU(y) + b)_1 ⊙ σ((W GELU(y) + b)_2)

    Training computes y as one convolution. Its kernel comes from the generating function at the roots of unity, four
    Cauchy sums; a state adds its response.

    Args:
        dim: channels D.
        state_size: N, real states of a channel. Even.
        bidirectional: a second kernel reads what follows; the module then returns y alone, and has no state.
        step_min, step_max: Δ starts log-uniform between them, one of a channel.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of [B, D, N], float32 at least: real parts, then imaginary ones.

    λ, P and B start as HiPPO-LegS in the basis where its normal part is diagonal; of each conjugate pair one is kept,
    and Re λ = -exp(log_decay). What is learned is C itself, not C (I - Ā^L) as published: kernels of all lengths and
    the state follow from the same numbers. Weight decay leaves λ, P and Δ alone.

    Cost: O(T N) for the Cauchy sums, O(T log T) for the convolution, and O(N³ log T) a channel for powers of Ā, which
    C (I - Ā^T) and the state need; a step O(D N), as Ā is of rank 1 beside a diagonal. Memory: kernels [D, T], Ā
    [D, N, N].

    Raises:
        ValueError: for sizes below 1, an odd state_size, or x of another shape.

    Gu et al., "Efficiently modeling long sequences with structured state spaces", 2022.
    """

    undecayed = ("log_step", "log_decay", "frequency", "p")

    def __init__(
        self,
        dim: int,
        state_size: int = 64,
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
        expect(0 < step_min <= step_max, self, "step_min", f"0 < step_min <= step_max = {step_max}", step_min)
        self.dim, self.state_size, self.bidirectional = dim, state_size, bidirectional
        made = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        eigenvalues, p, b, _ = (t.expand(dim, *t.shape) for t in normal_legs(state_size))
        self.log_step = torch.nn.Parameter(log_uniform((dim,), step_min, step_max, **made).log())
        self.log_decay = torch.nn.Parameter((-eigenvalues.real).log().to(**made))
        self.frequency = torch.nn.Parameter(eigenvalues.imag.to(**made, copy=True))
        self.p = torch.nn.Parameter(torch.view_as_real(p).to(**made, copy=True))
        self.b = torch.nn.Parameter(torch.view_as_real(b).to(**made, copy=True))
        kernels = 1 + bidirectional
        self.c = torch.nn.Parameter(torch.randn(kernels, dim, state_size // 2, 2, **made) * math.sqrt(0.5))
        self.skip = torch.nn.Parameter(torch.randn(dim, **made))
        self.mix = torch.nn.Linear(dim, 2 * dim, **made)

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}, bidirectional={self.bidirectional}"

    def system(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ā [D, N, N], B̄ [D, N], C [1 or 2, D, N] of the recurrence in real and imaginary parts."""
        decay, frequency = (torch.diag_embed(part) for part in (-torch.exp(wide(self.log_decay)), wide(self.frequency)))
        turning = torch.cat([torch.cat([decay, -frequency], -1), torch.cat([frequency, decay], -1)], -2)
        p, b, c = (wide(pairs).mT.flatten(-2) for pairs in (self.p, self.b, self.c))
        # 2 Re(C h) = 2 Re C Re h - 2 Im C Im h.
        sign = torch.tensor([2.0, -2.0], device=c.device, dtype=c.dtype).repeat_interleave(self.state_size // 2)
        # P* h of a pair and of its conjugate: twice the real part.
        A = turning - 2 * p[..., :, None] * p[..., None, :]
        return *bilinear(A, b, torch.exp(wide(self.log_step))), c * sign

    def modes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """λ, P and B [D, N/2], complex, and Δ [D, 1]."""
        eigenvalues = torch.complex(-torch.exp(wide(self.log_decay)), wide(self.frequency))
        return eigenvalues, complex_of(self.p), complex_of(self.b), torch.exp(wide(self.log_step))[:, None]

    def kernel(self, A: Tensor, c: Tensor, T: int) -> Tensor:
        """[D, T] of C [D, N], in real and imaginary parts: C Āᵗ B̄."""
        ends = c - (torch.linalg.matrix_power(A, T).mT @ c[..., None])[..., 0]
        real, imaginary = ends.unflatten(-1, (2, -1)).unbind(-2)
        return generated(*self.modes(), torch.complex(real, -imaginary) / 2, T)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        return functional.glu(self.mix(functional.gelu(y).to(x.dtype)), -1)

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> Any:
        check_sequence(self, x, self.dim)
        expect(state is None or not self.bidirectional, self, "state", "None where bidirectional", type(state).__name__)
        check_state(self, state, (x.shape[0], self.dim, self.state_size))
        u, skip, T = wide(x), wide(self.skip), x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            A, b, c = self.system()
            k = self.kernel(A, c[0], T)
            if self.bidirectional:
                y, after = fft_conv(u, k, skip) + anticausal(u, self.kernel(A, c[1], T), 1), None
            else:
                y, after = dense.convolve(u, k, A, b, c[0], skip, None if state is None else state[0])
        return self.output(y, x) if after is None else (self.output(y, x), (after,))

    def step(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, D] and the state before it -> y [B, D] and the state after it, by the recurrence."""
        expect(not self.bidirectional, self, "step", "a causal module", "bidirectional=True")
        check_sequence(self, x[:, None], self.dim)
        check_state(self, state, (x.shape[0], self.dim, self.state_size))
        u, c = wide(x)[..., None], complex_of(self.c[0])
        eigenvalues, p, b, step = self.modes()
        h = torch.zeros_like(eigenvalues) if state is None else torch.complex(*state[0].chunk(2, -1))
        h = solved(h, u, eigenvalues, p, b, step)
        y = doubled(c * h)[..., 0] + wide(self.skip) * u[..., 0]
        return self.output(y, x), (torch.cat([h.real, h.imag], -1),)


def generated(eigenvalues: Tensor, p: Tensor, b: Tensor, step: Tensor, c: Tensor, T: int) -> Tensor:
    """[D, T]: the inverse transform of c (I - ωĀ)⁻¹ B̄ at the T-th roots ω of unity, where c is C (I - Ā^T)."""
    if T == 0:
        return step.new_zeros(step.shape[0], 0)
    weights = torch.cat([c * b, c * p, p.conj() * b, p.conj() * p]) * step.repeat(4, 1)
    # 2 (1 - ω) / (1 + ω) = 2i tan(θ/2) at ω = e^{-iθ}. Its pole, ω = -1, is left to its limit below.
    half = math.pi / T * torch.arange((T + 1) // 2, device=c.device, dtype=torch.float64)
    nodes = torch.complex(torch.zeros_like(half), 2 * half.tan()).to(c.dtype)
    k00, k01, k10, k11 = cauchy_kernel(weights, nodes, (step * eigenvalues).repeat(4, 1)).chunk(4)
    values = (1 + nodes / 2) * (k00 - k01 * k10 / (1 + k11))
    if T % 2 == 0:
        values = torch.cat([values, weights[: step.shape[0]].sum(-1, keepdim=True).real + 0j], -1)
    return torch.fft.irfft(values, T)


def doubled(x: Tensor) -> Tensor:
    """The sum over pairs, each with its conjugate: real."""
    return 2 * x.real.sum(-1, keepdim=True)


def solved(h: Tensor, u: Tensor, eigenvalues: Tensor, p: Tensor, b: Tensor, step: Tensor) -> Tensor:
    """h' of (I - ΔA/2) h' = (I + ΔA/2) h + Δ b u with A = diag(λ) - p p*, without a matrix: p* h' is found first."""
    half = step / 2
    right = (1 + half * eigenvalues) * h - half * p * doubled(p.conj() * h) + step * b * u
    inverse = 1 / (1 - half * eigenvalues)
    read = doubled(p.conj() * inverse * right) / (1 + half * doubled(p.conj() * inverse * p))
    return inverse * (right - half * p * read)
