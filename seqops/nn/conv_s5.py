"""ConvS5: a state-space layer for video, whose states are frames."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..ssm import conv_ssm
from .diagonal import as_pairs, from_pairs
from .parts import check_multiple, check_positive, complex_of, expect, log_uniform, wide
from .s5 import LEAST_DECAY
from .ssm import block_legs, hold_diagonal
from .streaming import Streaming


class ConvS5(Streaming):
    """A linear recurrence over frames, in and out of which convolutions lead, and a residual block around it.

        h_t = e^{Δλ} ⊙ h_{t-1} + (e^{Δλ} - 1)/λ ⊙ (B * x_t)        y_t = 2 Re(C * h_t)
        y  <-  y + conv(GELU(norm(conv(GELU(norm(y))))))        out = LayerNorm(x + y)

    `*` and conv are convolutions over the pixels of one frame. All frames pass through them at once, since the
    recurrence in between is linear: there is no loop over time as in a ConvLSTM.

    Args:
        dim: channels U of a frame.
        state_size: P, complex states of a pixel.
        kernel_size: of all convolutions, odd.
        norm_groups: of the group norms; they divide U.
        step_min, step_max: Δ starts log-uniform between them, one of a state.
        device, dtype: of the parameters.

    x [B, T, Y, X, U] -> y [B, T, Y, X, U] and the state, a tuple of [B, Y, X, P, 2] (real and imaginary parts, float32
    at least).

    λ starts as the normal part of HiPPO-LegS of 2P states, B as V* times a He-normal kernel, C as a He-normal kernel
    times V. Re λ = -1e-4 - exp(log_decay), where the authors clip at -1e-4. Weight decay leaves λ and Δ alone.

    Cost: 8 k² U P operations a pixel for the states and 4 k² U² for the block, k the kernel dim; a step costs a T-th.
    Memory: that of x, and one state for each block of frames (see `seqops.conv_ssm`).

    Raises:
        ValueError: for an even kernel_size, sizes below 1, channels that groups do not divide, or x of another shape.

    Smith et al., "Convolutional state space models for long-range spatiotemporal modeling", 2023.
    """

    undecayed = ("log_step", "log_decay", "frequency")

    def __init__(
        self,
        dim: int,
        state_size: int = 128,
        kernel_size: int = 3,
        norm_groups: int = 32,
        step_min: float = 1e-3,
        step_max: float = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, state_size=state_size, kernel_size=kernel_size, norm_groups=norm_groups)
        check_multiple(self, "dim", dim, "norm_groups", norm_groups)
        # An even kernel would move every frame by half a pixel.
        expect(kernel_size % 2 == 1, self, "kernel_size", "an odd number", kernel_size)
        expect(0 < step_min <= step_max, self, "step_min", f"0 < step_min <= step_max = {step_max}", step_min)
        self.dim, self.state_size, self.kernel_size = dim, state_size, kernel_size
        made = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        eigenvalues, V = block_legs(2 * state_size, 1)
        area = kernel_size**2
        b = torch.randn(kernel_size, kernel_size, dim, 2 * state_size, dtype=torch.float64)
        c = torch.randn(kernel_size, kernel_size, 2 * state_size, dim, dtype=torch.float64)
        b = (b * math.sqrt(2 / (dim * area)) + 0j) @ V.conj()
        c = V.T @ (c * math.sqrt(2 / (2 * state_size * area)) + 0j)
        self.log_step = torch.nn.Parameter(log_uniform((state_size,), step_min, step_max, **made).log())
        self.log_decay = torch.nn.Parameter((-eigenvalues.real - LEAST_DECAY).log().to(**made))
        self.frequency = torch.nn.Parameter(eigenvalues.imag.to(**made, copy=True))
        self.b = torch.nn.Parameter(torch.view_as_real(b.resolve_conj()).to(**made))
        self.c = torch.nn.Parameter(torch.view_as_real(c).to(**made))
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(norm_groups, dim, **made) for _ in range(2))
        convolutions = (torch.nn.Conv2d(dim, dim, kernel_size, padding="same", **made) for _ in range(2))
        self.convolutions = torch.nn.ModuleList(convolutions)
        self.norm = torch.nn.LayerNorm(dim, **made)

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}, kernel_size={self.kernel_size}"

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        fits = x.ndim == 5 and x.shape[-1] == self.dim
        expect(fits, self, "x", f"[B, T, Y, X, U = {self.dim}]", f"shape {list(x.shape)}")
        expect(x.is_floating_point(), self, "x", "a floating dtype", x.dtype)
        eigenvalues = torch.complex(-torch.exp(wide(self.log_decay)) - LEAST_DECAY, wide(self.frequency))
        z, inflow = hold_diagonal(eigenvalues, torch.exp(wide(self.log_step)))
        b, c = complex_of(self.b) * inflow, complex_of(self.c)
        y, last = conv_ssm(x, torch.exp(z), b, c, None, from_pairs(None if state is None else state[0], z))
        frames = y.flatten(0, 1).permute(0, 3, 1, 2)
        more = frames
        for norm, convolution in zip(self.norms, self.convolutions, strict=True):
            more = convolution(functional.gelu(norm(more)))
        y = (frames + more).permute(0, 2, 3, 1).unflatten(0, x.shape[:2])
        return self.norm(x + y), (as_pairs(last),)
