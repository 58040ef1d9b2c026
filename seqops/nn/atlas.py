"""Memories that learn a window of tokens at a time, of keys in polynomial features."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .memory import NeuralMemory
from .parts import check_positive, expect, wide


class PolynomialMemory(NeuralMemory):
    """A NeuralMemory whose queries and keys are polynomials of what the convolution gives."""

    undecayed = ("scale", "coefficients")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int,
        hidden: int,
        degree: int,
        forgotten: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        **rule: object,
    ) -> None:
        super().__init__(dim, num_heads, chunk_size, hidden, **rule, device=device, dtype=dtype)
        check_positive(self, degree=degree)
        powers = [1 / math.factorial(i) for i in range(1, degree + 1)]
        self.coefficients = nn.Parameter(torch.tensor(powers, device=device, dtype=dtype))
        expect(0 < forgotten < 1, self, "forgotten", "a number between 0 and 1", forgotten)
        with torch.no_grad():
            self.gates.bias[num_heads : 2 * num_heads] = math.log(forgotten / (1 - forgotten))

    def features(self, x: Tensor) -> Tensor:
        exact, y = wide(x), torch.zeros_like(wide(x))
        for coefficient in wide(self.coefficients).flip(0):  # Horner
            y = (y + coefficient) * exact
        return y.to(x.dtype)


class OmegaNet(PolynomialMemory):
    """A memory whose every step is down the loss of the last tokens together, not of the newest alone (Omega rule).

        q, k = unit(phi(silu(conv(x W)))), v = unit(silu(conv(x W)));   phi(x) = sum_{i=1..degree} a_i x^i
        M_t = (1 - decay_t) M_{t-1} - sum_{i = t-window+1..t} lr_i d loss_i / d M;   o_t = f(M_t; q_t)
        y_t = W_o (rms_norm(o_t) * silu(W_g x_t))

    with the gradient at the weights M of the chunk's start, `loss_i = |f(k_i) - v_i|^2 / 2`, the sum within the chunk,
    `decay_t = sigmoid(W_d x_t + b)` and `lr_t = sigmoid(W_l x_t + b) rate / (chunk_size window)`.

    Args:
        dim: D, channels of x and y.
        num_heads: memories side by side, each of D / num_heads channels.
        chunk_size: tokens whose gradients are taken at the same weights.
        hidden: 0 is a linear memory `f(x) = M x`; else the units of `f(x) = x + W2 silu(W1 x)`.
        window: tokens whose losses a step sums; None is the chunk.
        degree: of phi.
        rate: bounds the sum of a chunk's rates.
        kernel: taps of the convolution over time; 1 is none.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: NeuralMemory's, without momentum.

    Initially a_i = 1 / i!, the rest as in NeuralMemory. phi is taken of each channel, our choice: the paper's basis has
    the products of channels too, whose number is a power of theirs.

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T, as NeuralMemory's; so does memory for the gradient.

    Behrouz et al., "ATLAS: learning to optimally memorize the context at test time", 2025.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        chunk_size: int = 16,
        hidden: int = 0,
        window: int | None = None,
        degree: int = 2,
        *,
        rate: float = 1.0,
        kernel: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        rule = {"window": chunk_size if window is None else window, "momentum": False, "rate": rate, "kernel": kernel}
        super().__init__(dim, num_heads, chunk_size, hidden, degree, 0.001, device, dtype, **rule)


class Atlas(PolynomialMemory):
    """OmegaNet with momentum, whose steps are orthogonalised by Newton-Schulz, a chunk's together (Atlas, Muon).

        q, k = unit(phi(silu(conv(x W)))), v = unit(silu(conv(x W)));   phi(x) = sum_{i=1..degree} a_i x^i
        S_t = momentum_t S_{t-1} - sum_{i = t-window+1..t} lr_i d loss_i / d M
        M_t = prod(1 - decay) M + [t ends a chunk] newton_schulz(sum_i prod(1 - decay) S_i);   o_t = f(M_t; q_t)
        y_t = W_o (rms_norm(o_t) * silu(W_g x_t))

    with the gradient at the weights M of the chunk's start, from which the products and the sums run, and the gates of
    NeuralMemory. Within a chunk weights only decay: `chunk_size` = 1 is the paper's step for every token.

    Args:
        dim: D, channels of x and y.
        num_heads: memories side by side, each of D / num_heads channels.
        chunk_size: tokens whose gradients are taken at the same weights.
        hidden: 0 is a linear memory `f(x) = M x`; else the units of `f(x) = x + W2 silu(W1 x)`.
        window: tokens whose losses a step sums; None is the chunk.
        degree: of phi.
        kernel: taps of the convolution over time; 1 is none.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: NeuralMemory's.

    Initially a_i = 1 / i! and a token forgets 1 / (chunk_size + 1) of the memory: every chunk adds a step of size 1,
    and what forgets less would grow beyond what it learns. The rest is as in NeuralMemory. Rates only weigh tokens
    against each other. The paper's basis has the products of channels too, and a gate on the step; neither is here.

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T, as NeuralMemory's, with Newton-Schulz of each matrix a chunk; so does memory for the gradient.

    Behrouz et al., "ATLAS: learning to optimally memorize the context at test time", 2025.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        chunk_size: int = 16,
        hidden: int = 0,
        window: int | None = None,
        degree: int = 2,
        *,
        kernel: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(self, chunk_size=chunk_size)
        rule = {"window": chunk_size if window is None else window, "optimizer": "muon", "kernel": kernel}
        super().__init__(dim, num_heads, chunk_size, hidden, degree, 1 / (chunk_size + 1), device, dtype, **rule)
