"""Diagonal recurrences h_t = eᶻ h_{t-1} + u_t, y_t = 2 Re Σ c h_t, as a convolution that starts from a state."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..conv import fft_conv
from ..ssm import ssm_kernel

# Steps whose powers of eᶻ are tabulated, when a state is summed up.
BLOCK = 64


def kernel(z: Tensor, c: Tensor, length: int) -> Tensor:
    """K [H, length] of z, c [H, N]: 2 Re Σ_n c_n e^{l z_n} of complex modes, Σ_n c_n e^{l z_n} of real ones."""
    if z.is_complex():
        return ssm_kernel(z, c, length)
    return ssm_kernel(torch.complex(z, torch.zeros_like(z)), torch.complex(c / 2, torch.zeros_like(c)), length)


def powers(z: Tensor, count: int, stride: int) -> Tensor:
    """e^{stride l z} [..., count] in z's dtype: the exponent in float64, where a large phase keeps its digits."""
    exponents = stride * torch.arange(count, device=z.device, dtype=torch.float64)
    exact = z.to(torch.complex128 if z.is_complex() else torch.float64)
    return torch.exp(exact[..., None] * exponents).to(z.dtype)


def last_state(u: Tensor, z: Tensor) -> Tensor:
    """Σ_t e^{(T-1-t) z} u_t [B, H, N] of u [B, T, H], z [H, N], without a tensor of T states."""
    B, T, H = u.shape
    blocks = (T + BLOCK - 1) // BLOCK
    # Zeros before the start leave the sum alone.
    u = functional.pad(u, (0, 0, blocks * BLOCK - T, 0)).reshape(B, blocks, BLOCK, H).to(z.dtype)
    within, across = powers(z, BLOCK, 1).flip(-1), powers(z, blocks, BLOCK).flip(-1)
    with torch.autocast(u.device.type, enabled=False):
        return torch.einsum("bjih,hni,hnj->bhn", u, within, across)


def convolve(u: Tensor, z: Tensor, c: Tensor, skip: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """u [B, T, H], modes z, c [H, N], skip [H], state [B, H, N] -> y [B, T, H] and the state after it.

    The convolution, plus what the state still gives: 2 Re Σ c e^{(t+1) z} h.
    """
    B, T, H = u.shape
    y = fft_conv(u, kernel(z, c, T), skip)
    last = last_state(u, z)
    if state is None:
        return y, last
    modes = (z.expand(B, *z.shape).flatten(0, 1), (c * torch.exp(z) * state).flatten(0, 1))
    later = kernel(*modes, T).unflatten(0, (B, H)).transpose(1, 2)
    return y + later, last + state * torch.exp(z * T)


def advance(u: Tensor, z: Tensor, c: Tensor, skip: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: u [B, H] -> y [B, H] and the state [B, H, N]."""
    inflow = u[..., None].to(z.dtype)
    state = inflow.expand(*u.shape, z.shape[-1]).clone() if state is None else torch.exp(z) * state + inflow
    y = (c * state).sum(-1)
    return (2 * y.real if z.is_complex() else y) + skip * u, state


def anticausal(u: Tensor, k: Tensor, gap: int) -> Tensor:
    """Σ_l k_l u_{t+gap+l} of u [B, T, H], k [H, T]."""
    turned = functional.pad(u.flip(1), (0, 0, gap, 0))[:, : u.shape[1]]
    return fft_conv(turned, k).flip(1)


def as_pairs(state: Tensor) -> Tensor:
    """A complex state as a module returns it: [..., 2], real."""
    return torch.view_as_real(state.resolve_conj().contiguous())


def from_pairs(state: Tensor | None, like: Tensor) -> Tensor | None:
    return None if state is None else torch.view_as_complex(state.contiguous()).to(like.dtype)
