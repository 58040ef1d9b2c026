"""S5: one linear state-space model that reads and writes all channels."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..scan import linear_scan
from .diagonal import as_pairs, from_pairs
from .parts import check_multiple, check_positive, check_sequence, complex_of, expect, log_uniform, wide
from .ssm import block_legs, hold_diagonal
from .streaming import Streaming

# What decays stay above, so that no learned state grows.
LEAST_DECAY = 1e-4


class S5(Streaming):
    """A diagonal state-space model of several inputs and outputs, and a gate of its result.

        h_t = e^{Δλ} ⊙ h_{t-1} + (e^{Δλ} - 1)/λ ⊙ (B x_t)        y_t = 2 Re(C h_t) + D ⊙ x_t
        out = GELU(y) ⊙ σ(W GELU(y) + b)

    The states of all channels are one linear scan, so a sequence costs O(T) and any piece starts from a state.

    Args:
        dim: channels D.
        state_size: P, real states: P/2 complex ones are kept, the others are their conjugates.
        num_blocks: λ starts as that many copies of the LegS spectrum of P/num_blocks states, which must be even.
        bidirectional: a second scan runs backwards and C reads both; the module then returns y alone.
        step_min, step_max: Δ starts log-uniform between them, one of a state.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of [B, P/2, 2] (real and imaginary parts, float32 at least).

    λ starts as the normal part of HiPPO-LegS, B as V* times a LeCun-normal matrix, C as a LeCun-normal matrix times V,
    D normal, as published. The authors clip Re λ at -1e-4; here Re λ = -1e-4 - exp(log_decay), which has a gradient
    everywhere. Weight decay leaves λ and Δ alone. Residual and norm belong to the network around.

    Cost: O(T D P) products and a scan of [B, T, P/2] complex states, which are kept for the backward.

    Raises:
        ValueError: for sizes below 1, states that num_blocks does not divide into even parts, or x of another shape.

    Smith et al., "Simplified state space layers for sequence modeling", 2023.
    """

    undecayed = ("log_step", "log_decay", "frequency")

    def __init__(
        self,
        dim: int,
        state_size: int = 256,
        num_blocks: int = 1,
        bidirectional: bool = False,
        step_min: float = 1e-3,
        step_max: float = 0.1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, state_size=state_size, num_blocks=num_blocks)
        check_multiple(self, "state_size", state_size, "2 * num_blocks", 2 * num_blocks)
        expect(0 < step_min <= step_max, self, "step_min", f"0 < step_min <= step_max = {step_max}", step_min)
        self.dim, self.state_size, self.bidirectional = dim, state_size, bidirectional
        made = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        eigenvalues, V = block_legs(state_size, num_blocks)
        columns = 1 + bidirectional
        b = V.mH @ (torch.randn(state_size, dim, dtype=torch.float64) / math.sqrt(dim) + 0j)
        weights = torch.randn(columns, dim, state_size, dtype=torch.float64) / math.sqrt(state_size)
        self.log_step = torch.nn.Parameter(log_uniform((state_size // 2,), step_min, step_max, **made).log())
        self.log_decay = torch.nn.Parameter((-eigenvalues.real - LEAST_DECAY).log().to(**made))
        self.frequency = torch.nn.Parameter(eigenvalues.imag.to(**made, copy=True))
        self.b = torch.nn.Parameter(torch.view_as_real(b).to(**made))
        self.c = torch.nn.Parameter(torch.view_as_real((weights + 0j) @ V).to(**made))
        self.skip = torch.nn.Parameter(torch.randn(dim, **made))
        self.gate = torch.nn.Linear(dim, dim, **made)

    def extra_repr(self) -> str:
        return f"{self.dim}, state_size={self.state_size}, bidirectional={self.bidirectional}"

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> Any:
        check_sequence(self, x, self.dim)
        expect(state is None or not self.bidirectional, self, "state", "None where bidirectional", type(state).__name__)
        with torch.autocast(x.device.type, enabled=False):
            y, after = self.scan(wide(x).to(wide(self.skip).dtype), None if state is None else state[0])
        active = functional.gelu(y).to(x.dtype)
        out = active * torch.sigmoid(self.gate(active))
        return out if self.bidirectional else (out, (as_pairs(after),))

    def scan(self, x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """x [B, T, D] in float32 at least -> 2 Re(C h) + D x, and the last state [B, P/2] of the forward scan."""
        eigenvalues = torch.complex(-torch.exp(wide(self.log_decay)) - LEAST_DECAY, wide(self.frequency))
        z, inflow = hold_diagonal(eigenvalues, torch.exp(wide(self.log_step)))
        b, c = complex_of(self.b) * inflow[:, None], complex_of(self.c)
        # Real inputs times a complex matrix: one real product, whose results lie in pairs.
        pairs = torch.view_as_real(b.T.contiguous()).flatten(1)
        entering = torch.view_as_complex((x @ pairs).unflatten(-1, (-1, 2)))
        keep = torch.exp(z)[None, None]
        h, last = linear_scan(entering, keep, from_pairs(state, entering))
        y = read(h, c[0])
        if self.bidirectional:
            y = y + read(linear_scan(entering, keep, reverse=True)[0], c[1])
        return y + wide(self.skip) * x, last


def read(h: Tensor, c: Tensor) -> Tensor:
    """2 Re(C h) [B, T, D] of h [B, T, P], c [D, P], as one real product of half the work."""
    pairs = torch.view_as_real(2 * c.conj().resolve_conj()).flatten(1)
    return torch.view_as_real(h).flatten(2) @ pairs.T
