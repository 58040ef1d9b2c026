"""HGRN: gates with a lower bound that grows from layer to layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..scan import linear_scan
from .parts import check_positive, check_sequence, expect, rms_norm, wide
from .streaming import Streaming


class HGRN(Streaming):
    """Hierarchically gated recurrent network, the real form: lower layers forget, upper layers remember.

        h_t = f_t h_{t-1} + (1 - f_t) silu(W_i x_t)        f = b + (1 - b) sigmoid(W_f x)
        y_t = W_o (rmsnorm(h_t) ⊙ silu(W_g x_t))

    The bound b of layer i is `cumsum(softmax(Γ))_i - softmax(Γ)_0`, the softmax over layers: 0 in the first, below 1 in
    the last, learned, and never decreasing from a layer to the next. Γ belongs to all layers:

        first = HGRN(64, num_layers=3)
        stack = torch.nn.ModuleList([first, *(HGRN(64, 3, layer, first.bounds) for layer in (1, 2))])

    Args:
        dim: D, features of x, y and state.
        num_layers: of the model; 1 means no bound.
        layer: i, which of them this is, from 0.
        bounds: Γ [num_layers, D], the parameter of another layer of the model, to share it; None makes a new one.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (h [B, D],), float32 at least, zeros at the start.

    Initialisation: Γ zeros, so that bounds grow evenly; projections as torch.nn.Linear's, without biases; norm 1.

    Memory: a gradient keeps about 13 D numbers for each step. Time: O(T D²) for the projections, O(T D) for the scan.

    Raises:
        ValueError: a size is not positive, layer is not below num_layers, bounds or x has a wrong shape, x a wrong
            dtype.

    Qin et al., "Hierarchically gated recurrent neural network for sequence modeling", 2023.
    """

    undecayed = ("bounds",)

    def __init__(
        self,
        dim: int,
        num_layers: int = 1,
        layer: int = 0,
        bounds: torch.nn.Parameter | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_layers=num_layers)
        expect(0 <= layer < num_layers, self, "layer", f"0 <= layer < num_layers = {num_layers}", layer)
        self.dim, self.num_layers, self.layer = dim, num_layers, layer
        options = {"device": device, "dtype": dtype}
        if bounds is None:
            bounds = torch.nn.Parameter(torch.zeros(num_layers, dim, **options))
        expect(bounds.shape == (num_layers, dim), self, "bounds", f"shape {[num_layers, dim]}", list(bounds.shape))
        self.bounds = bounds
        self.input = torch.nn.Linear(dim, 3 * dim, bias=False, **options)
        self.norm = torch.nn.Parameter(torch.ones(dim, **options))
        self.out = torch.nn.Linear(dim, dim, bias=False, **options)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_layers={self.num_layers}, layer={self.layer}"

    def lower_bound(self) -> Tensor:
        """b [D], in [0, 1)."""
        return torch.softmax(wide(self.bounds), 0)[1 : self.layer + 1].sum(0)

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, T, D] and (h,) of the steps before -> y [B, T, D], (h [B, D],) after the last step."""
        check_sequence(self, x, self.dim)
        value, forget, gate = self.input(x).chunk(3, -1)
        # 1 - f as a product: near f = 1 the difference has no digits left.
        open_ = (1 - self.lower_bound()) * torch.sigmoid(-wide(forget))
        h, last = linear_scan(functional.silu(wide(value)) * open_, 1 - open_, None if state is None else state[0])
        y = rms_norm(h, self.norm).to(gate.dtype) * functional.silu(gate)
        return self.out(y), (last,)
