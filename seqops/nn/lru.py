"""LRU: a linear recurrence with complex eigenvalues of modulus below 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..scan import linear_scan
from .parts import check_positive, check_sequence, expect, wide
from .streaming import Streaming


class LRU(Streaming):
    """Linear recurrent unit: a diagonal complex recurrence between two dense projections.

        h_t = λ ⊙ h_{t-1} + e^γ ⊙ (B x_t)        y_t = Re(C h_t) + skip ⊙ x_t
        λ = exp(-e^ν + i e^θ)

    Eigenvalues are parametrised so that `abs(λ) < 1` whatever the optimizer does.

    Args:
        dim: D, features of x and y.
        state_size: N, complex eigenvalues; None is dim.
        r_min, r_max: the ring in which eigenvalues start, 0 <= r_min < r_max <= 1.
        max_phase: they start with angles in [0, max_phase).
        device, dtype: of the parameters, which are real: B [N, D, 2] and C [D, N, 2] hold real and imaginary parts,
            nu, theta and gamma are [N], skip [D].

    Shapes: x [B, T, D] -> y [B, T, D]; state (h [B, N],), complex64, or complex128 for float64; zeros at the start.

    Initialisation: λ uniform in area on the ring, γ = log sqrt(1 - abs(λ)²), which makes all states alike in size; B
    normal / sqrt(2 D) and C normal / sqrt(N) in each part, skip normal.

    Memory: a gradient keeps D + 2 N numbers for each step. Time: O(T D N) for the projections, O(T N) for the scan.

        y, state = LRU(64, 128, r_min=0.9, r_max=0.999)(torch.randn(2, 100, 64))

    Raises:
        ValueError: a size is not positive, the ring is empty, or x has a wrong shape or dtype.

    Orvieto et al., "Resurrecting recurrent neural networks for long sequences", 2023.
    """

    undecayed = ("nu", "theta", "gamma")

    def __init__(
        self,
        dim: int,
        state_size: int | None = None,
        r_min: float = 0.0,
        r_max: float = 1.0,
        max_phase: float = 6.28,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_size = dim if state_size is None else state_size
        check_positive(self, dim=dim, state_size=state_size)
        expect(0 <= r_min < r_max <= 1, self, "r_min, r_max", "0 <= r_min < r_max <= 1", (r_min, r_max))
        expect(max_phase > 0, self, "max_phase", "a number above 0", max_phase)
        self.dim, self.state_size = dim, state_size
        self.ring = (r_min, r_max, max_phase)
        shapes = {"nu": (), "theta": (), "gamma": (), "B": (dim, 2)}
        for name, shape in shapes.items():
            parameter = torch.empty(state_size, *shape, device=device, dtype=dtype)
            self.register_parameter(name, torch.nn.Parameter(parameter))
        self.C = torch.nn.Parameter(torch.empty(dim, state_size, 2, device=device, dtype=dtype))
        self.skip = torch.nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.state_size}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        r_min, r_max, max_phase = self.ring
        # Neither 0 nor 1, whose logarithms are not finite, is drawn.
        drawn = torch.rand(2, self.state_size, device=self.nu.device).clamp(1e-6, 1 - 1e-6)
        decay = -0.5 * torch.log(r_min**2 + drawn[0] * (r_max**2 - r_min**2))
        self.nu.copy_(decay.log())
        self.theta.copy_((max_phase * drawn[1]).log())
        self.gamma.copy_(0.5 * torch.log(-torch.expm1(-2 * decay)))
        self.B.normal_(std=(2 * self.dim) ** -0.5)
        self.C.normal_(std=self.state_size**-0.5)
        self.skip.normal_()

    def eigenvalues(self) -> Tensor:
        """λ [N], complex."""
        angle = torch.remainder(wide(self.theta).exp(), 2 * math.pi)
        # Beyond 50 the modulus is 0 either way, but its gradient 0 times infinity.
        return torch.polar(torch.exp(-wide(self.nu).clamp(max=50.0).exp()), angle)

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, T, D] and (h,) of the steps before -> y [B, T, D], (h [B, N],) after the last step."""
        check_sequence(self, x, self.dim)
        # Real products twice as wide: real and imaginary parts take turns along the state.
        enter = (wide(self.B) * wide(self.gamma).exp()[:, None, None]).transpose(1, 2).flatten(0, 1)
        leave = torch.stack([self.C[..., 0], -self.C[..., 1]], -1).flatten(1)
        u = wide(functional.linear(x, enter.to(x.dtype))).unflatten(-1, (self.state_size, 2))
        h, last = linear_scan(
            torch.view_as_complex(u), self.eigenvalues()[None, None], None if state is None else state[0]
        )
        y = functional.linear(torch.view_as_real(h).flatten(2).to(x.dtype), leave)
        return y + self.skip * x, (last,)
