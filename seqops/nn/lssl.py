"""LSSL: long convolutions of a state-space model with a dense matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from . import dense
from .parts import check_positive, check_sequence, check_state, expect, log_uniform, wide
from .ssm import bilinear, legs
from .streaming import Streaming


class LSSL(Streaming):
    """A dense state-space model, shared by the channels, each with its own time step, then a linear map across them.

        Ā = (I - ΔA/2)⁻¹ (I + ΔA/2)    B̄ = (I - ΔA/2)⁻¹ ΔB    h_t = Ā h_{t-1} + B̄ x_t    y_t = C h_t + D x_t
        out = W GELU(y) + b

    Training computes y as one convolution with K_l = C Āˡ B̄, as products of rows C Ā^{64 i} and columns Āʲ B̄; a state
    adds its response, and a step is the recurrence.

    Args:
        dim: channels D.
        state_size: N, states of a channel. (256 published.)
        step_min, step_max: Δ starts log-uniform between them, one of a channel.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of [B, D, N], float32 at least.

    A and B start as HiPPO-LegS, C and D normal, as published; the authors' structured parametrisation of A is left out.
    Train A slowly: its published learning rate is 1e-4, and nothing keeps a learned A from growing. Weight decay leaves
    A, B and Δ alone.

    Cost: O(N³) a channel for powers of Ā, O(N T) products for the kernel, O(T log T) for the convolution; a step
    solves for the state, O(D N³). Memory: Ā [D, N, N] and D N (64 + T/64) numbers.

    Raises:
        ValueError: for sizes below 1, or x of another shape.

    Gu et al., "Combining recurrent, convolutional, and continuous-time models with linear state-space layers", 2021.
    """

    undecayed = ("a", "b", "log_step")

    def __init__(
        self,
        dim: int,
        state_size: int = 64,
        step_min: float = 1e-3,
        step_max: float = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, state_size=state_size)
        expect(0 < step_min <= step_max, self, "step_min", f"0 < step_min <= step_max = {step_max}", step_min)
        self.dim, self.state_size = dim, state_size
        made = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        a, b = legs(state_size)
        self.a = torch.nn.Parameter(a.to(**made))
        self.b = torch.nn.Parameter(b.to(**made))
        self.log_step = torch.nn.Parameter(log_uniform((dim,), step_min, step_max, **made).log())
        self.c = torch.nn.Parameter(torch.randn(dim, state_size, **made))
        self.skip = torch.nn.Parameter(torch.randn(dim, **made))
        self.mix = torch.nn.Linear(dim, dim, **made)

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}"

    def system(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ā [D, N, N], B̄, C [D, N], skip [D]."""
        A, b = bilinear(wide(self.a), wide(self.b), torch.exp(wide(self.log_step)))
        return A, b, wide(self.c), wide(self.skip)

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        check_sequence(self, x, self.dim)
        check_state(self, state, (x.shape[0], self.dim, self.state_size))
        with torch.autocast(x.device.type, enabled=False):
            A, b, c, skip = self.system()
            k = dense.outgoing(A, b, c, x.shape[1])
            y, after = dense.convolve(wide(x), k, A, b, c, skip, None if state is None else state[0])
        return self.mix(functional.gelu(y).to(x.dtype)), (after,)

    def step(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, D] and the state before it -> y [B, D] and the state after it, by the recurrence."""
        check_sequence(self, x[:, None], self.dim)
        check_state(self, state, (x.shape[0], self.dim, self.state_size))
        u, A, half = wide(x), wide(self.a), torch.exp(wide(self.log_step))[:, None] / 2
        with torch.autocast(x.device.type, enabled=False):
            right = 2 * half * wide(self.b) * u[..., None]
            if state is not None:
                right = right + state[0] + half * (state[0] @ A.mT)
            # (I - ΔA/2) h of all rows at once, a channel after another.
            left = torch.eye(self.state_size, dtype=A.dtype, device=A.device) - half[..., None] * A
            h = torch.linalg.solve(left, right.permute(1, 2, 0)).permute(2, 0, 1).contiguous()
        y = (wide(self.c) * h).sum(-1) + wide(self.skip) * u
        return self.mix(functional.gelu(y).to(x.dtype)), (h,)
