"""Systems of state-space models in float64: where they start, and how they become recurrences.

A system h' = A h + B u has N states. Functions return tensors in float64 or complex128 on the CPU, except those that a
module calls in its forward, which keep the dtype they are given.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# ---- where systems start


def legs(N: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS: A [N, N] and B [N], which keep the past in scaled Legendre polynomials.

        A_nk = -√((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 above        B_n = √(2n+1)

    Gu et al., "HiPPO: recurrent memory with optimal polynomial projections", 2020.
    """
    n = torch.arange(N, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    return -torch.outer(B, B).tril(-1) - torch.diag(n + 1), B


def normal_legs(N: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LegS as a normal matrix less one of rank 1, in the normal one's basis.

    With P_n = √(n+½), A + P Pᵀ = V diag(λ) V*, Re λ = -½. Returns of each conjugate pair the one with Im λ > 0:
    λ [N/2], V*P [N/2], V*B [N/2], V [N, N/2]. N is even.
    """
    A, B = legs(N)
    P = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    # -½ plus a skew-symmetric matrix S; -iS is Hermitian, with the eigenvalues Im λ in ascending order.
    skew = A + torch.outer(P, P) + 0.5 * torch.eye(N, dtype=torch.float64)
    frequency, V = torch.linalg.eigh(-1j * skew.to(torch.complex128))
    frequency, V = frequency[N // 2 :], V[:, N // 2 :]
    back = V.mH.contiguous()
    return torch.complex(torch.full_like(frequency, -0.5), frequency), back @ (P + 0j), back @ (B + 0j), V


def diagonal_start(name: str, N: int) -> Tensor:
    """λ [N/2] of S4D-Lin, S4D-Inv or S4D-LegS.

        lin  -½ + iπn        inv  -½ + i(N/π)(N/(2n+1) - 1)        legs  those of `normal_legs`

    Gu et al., "On the parameterization and initialization of diagonal state space models", 2022.
    """
    if name == "legs":
        return normal_legs(N)[0]
    n = torch.arange(N // 2, dtype=torch.float64)
    frequency = math.pi * n if name == "lin" else N / math.pi * (N / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(frequency, -0.5), frequency)


def block_legs(states: int, blocks: int) -> tuple[Tensor, Tensor]:
    """`blocks` equal normal parts of LegS: λ [states / 2] and the block-diagonal V [states, states / 2]."""
    frequency, _, _, V = normal_legs(states // blocks)
    return frequency.repeat(blocks), torch.block_diag(*[V] * blocks)


def lmu(N: int, theta: float) -> tuple[Tensor, Tensor]:
    """The delay of length theta: A [N, N] and B [N], which keep the last theta in shifted Legendre polynomials.

        A_ij = (2i+1)/θ · (-1 if i < j else (-1)^(i-j+1))        B_i = (2i+1)(-1)^i/θ

    Voelker et al., "Legendre Memory Units: continuous-time representation in recurrent neural networks", 2019.
    """
    i = torch.arange(N, dtype=torch.float64)
    sign = 1 - 2 * torch.remainder(i, 2)
    size = (2 * i + 1) / theta
    below = -torch.outer(sign, sign).tril()
    above = torch.ones(N, N, dtype=torch.float64).triu(1)
    return size[:, None] * (below - above), size * sign


# ---- recurrences h_t = Ā h_{t-1} + B̄ u_t


def hold_factor(x: Tensor) -> Tensor:
    """(eˣ - 1) / x, for real or complex x; near 0 its series. Its gradients are finite everywhere."""
    near = x.abs() < 1e-3
    safe = torch.where(near, torch.ones_like(x), x)
    series = 1 + x / 2 * (1 + x / 3 * (1 + x / 4))
    return torch.where(near, series, torch.expm1(safe) / safe)


def hold_diagonal(eigenvalues: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold of a diagonal system: z = Δλ, of which eᶻ is λ̄, and B̄/B = (eᶻ - 1)/λ."""
    z = step * eigenvalues
    return z, step * hold_factor(z)


def bilinear(A: Tensor, B: Tensor, step: Tensor, alpha: float = 0.5) -> tuple[Tensor, Tensor]:
    """The generalised bilinear rule of A [..., N, N], B [..., N] and step [...]: Ā [..., N, N], B̄ [..., N].

    Ā = (I - αΔA)⁻¹ (I + (1-α)ΔA)        B̄ = (I - αΔA)⁻¹ ΔB
    """
    one = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    scaled = step[..., None, None] * A
    right = torch.cat([one + (1 - alpha) * scaled, (step[..., None] * B)[..., None]], -1)
    solved = torch.linalg.solve(one - alpha * scaled, right)
    return solved[..., :-1], solved[..., -1]


def hold(A: Tensor, B: Tensor, step: float = 1.0) -> tuple[Tensor, Tensor]:
    """Zero-order hold of A [N, N], B [N]: the exponential of [[ΔA, ΔB], [0, 0]] has Ā and B̄ in its first rows."""
    N = A.shape[0]
    joined = A.new_zeros(N + 1, N + 1)
    joined[:N, :N], joined[:N, N] = step * A, step * B
    joined = torch.linalg.matrix_exp(joined)
    return joined[:N, :N].contiguous(), joined[:N, N].contiguous()
