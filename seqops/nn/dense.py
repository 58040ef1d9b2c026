"""Dense recurrences h_t = Ā h_{t-1} + B̄ u_t, y_t = C h_t, as a convolution that starts from a state.

Letters: A [H, N, N], b [H, N], c [H, N], real, one system a channel; u [B, T, H]; states [B, H, N]. Nothing here has T
states: time is cut into blocks, whose rows c Ā^{i BLOCK} and columns Ā^j b meet in one product.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..conv import fft_conv

BLOCK = 64


def applied(A: Tensor, v: Tensor, count: int) -> Tensor:
    """v, Av, A²v, ... [..., count, N] of A [..., N, N], v [..., N], by doubling."""
    rows, turned = v[..., None, :], A.mT
    while rows.shape[-2] < count:
        rows = torch.cat([rows, rows @ turned], -2)
        turned = turned @ turned
    return rows[..., :count, :]


def blocks_of(A: Tensor, T: int) -> tuple[int, Tensor]:
    """How many blocks T steps are, and A^BLOCK, which one block needs not."""
    blocks = (T + BLOCK - 1) // BLOCK
    return blocks, torch.linalg.matrix_power(A, BLOCK) if blocks > 1 else A


def outgoing(A: Tensor, v: Tensor, c: Tensor, T: int) -> Tensor:
    """c Aᵗ v [..., H, T] of v [..., H, N], c [H, N]."""
    blocks, across = blocks_of(A, T)
    rows, columns = applied(across.mT, c, blocks), applied(A, v, min(BLOCK, T))
    return (rows @ columns.mT).flatten(-2)[..., :T]


def last_state(u: Tensor, A: Tensor, b: Tensor) -> Tensor:
    """Σ_t A^{T-1-t} b u_t [B, H, N]: blocks, then pairs of blocks, of which the earlier moves on."""
    B, T, H = u.shape
    blocks, across = blocks_of(A, T)
    # Zeros before the start leave the sum alone.
    blocks = max(blocks, 1)
    u = functional.pad(u, (0, 0, blocks * BLOCK - T, 0)).reshape(B, blocks, BLOCK, H)
    sums = torch.einsum("bjih,hin->bhjn", u, applied(A, b, BLOCK).flip(-2))
    while sums.shape[2] > 1:
        sums = functional.pad(sums, (0, 0, sums.shape[2] % 2, 0))
        # Contiguous, since a compiled product of symbolic sizes asks for a view of it.
        sums = sums[:, :, 0::2].contiguous() @ across.mT + sums[:, :, 1::2]
        across = across @ across
    return sums[:, :, 0]


def convolve(
    u: Tensor, k: Tensor, A: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u, its kernel k [H, T], and the state before -> y [B, T, H] and the state after."""
    T = u.shape[1]
    y, last = fft_conv(u, k, skip), last_state(u, A, b)
    if state is None:
        return y, last
    later = outgoing(A, moved(A, state), c, T).transpose(1, 2)
    return y + later, last + moved(torch.linalg.matrix_power(A, T), state)


def moved(A: Tensor, state: Tensor) -> Tensor:
    """A h of each channel."""
    return (A @ state[..., None])[..., 0]
