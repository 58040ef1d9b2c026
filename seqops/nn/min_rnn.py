"""minGRU and minLSTM: gates that read the input alone, so that all steps run as one scan."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..scan import linear_scan
from .parts import check_positive, check_sequence, expect, wide
from .streaming import Streaming


def positive(x: Tensor) -> Tensor:
    """g(x) = x + 1/2 for x >= 0, else sigmoid(x): continuous, increasing, and above 0."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class _MinRNN(Streaming, ABC):
    """What both share: one projection to candidates and gates, the scan, and a projection where widths differ."""

    gates: int

    def __init__(
        self,
        dim: int,
        expansion: int = 1,
        bias: bool = True,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, expansion=expansion)
        self.dim, self.width = dim, dim * expansion
        options = {"device": device, "dtype": dtype}
        self.input = torch.nn.Linear(dim, (1 + self.gates) * self.width, bias=bias, **options)
        self.out = torch.nn.Linear(self.width, dim, bias=bias, **options) if expansion > 1 else torch.nn.Identity()

    def extra_repr(self) -> str:
        return f"{self.dim}, expansion={self.width // self.dim}"

    @abstractmethod
    def _amounts(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        """How much of the state stays, and how much of the candidate enters, in [0, 1]."""

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, T, D] and (h,) of the steps before -> y [B, T, D], (h [B, width],) after the last step."""
        check_sequence(self, x, self.dim)
        projected = self.input(x)
        candidate, gates = wide(projected).split([self.width, self.gates * self.width], -1)
        keep, enter = self._amounts(gates)
        h, last = linear_scan(enter * positive(candidate), keep, None if state is None else state[0])
        return self.out(h.to(projected.dtype)), (last,)


class MinGRU(_MinRNN):
    """A GRU whose gate and candidate do not read the state.

        h_t = (1 - z_t) h_{t-1} + z_t g(c_t)        c, k = W x        z = sigmoid(k)
        g(c) = c + 1/2 where c >= 0, else sigmoid(c)

    Args:
        dim: D, features of x and y.
        expansion: units of the state as a multiple of dim; above 1, a Linear leads back to dim.
        bias: whether the projections have biases.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (h [B, expansion D],), float32 at least, zeros at the start.

    Initialisation: as torch.nn.Linear's.

    Memory: a gradient keeps about 6 D numbers for each step, times expansion. Time: O(T D²) for the projections, O(T
    D) for the scan.

    Raises:
        ValueError: a size is not positive, or x has a wrong shape or dtype.

    Feng et al., "Were RNNs all we needed?", 2024.
    """

    gates = 1

    def _amounts(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-gates), torch.sigmoid(gates)


class MinLSTM(_MinRNN):
    """An LSTM whose gates and candidate do not read the state, the two gates scaled to a sum of 1.

        h_t = (f_t h_{t-1} + i_t g(c_t)) / (f_t + i_t)        c, k_f, k_i = W x        f, i = sigmoid(k_f), sigmoid(k_i)
        g(c) = c + 1/2 where c >= 0, else sigmoid(c)

    Computed as `f / (f + i) = sigmoid(-d)` with `d = softplus(-k_f) - softplus(-k_i)`: nothing is divided, so gates
    that are both near 0 do no harm.

    Args:
        dim: D, features of x and y.
        expansion: units of the state as a multiple of dim; above 1, a Linear leads back to dim.
        bias: whether the projections have biases.
        forget_bias: added to the bias of the forget gate at the start; needs bias.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (h [B, expansion D],), float32 at least, zeros at the start.

    Initialisation: as torch.nn.Linear's, but for forget_bias.

    Memory: a gradient keeps about 8 D numbers for each step, times expansion. Time: O(T D²) for the projections, O(T
    D) for the scan.

    Raises:
        ValueError: a size is not positive, forget_bias without bias, or x has a wrong shape or dtype.

    Feng et al., "Were RNNs all we needed?", 2024.
    """

    gates = 2

    def __init__(
        self,
        dim: int,
        expansion: int = 1,
        bias: bool = True,
        forget_bias: float = 0.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, expansion, bias, device=device, dtype=dtype)
        expect(bias or forget_bias == 0.0, self, "forget_bias", "0 without bias", forget_bias)
        if bias:
            with torch.no_grad():
                self.input.bias[self.width : 2 * self.width] += forget_bias

    def _amounts(self, gates: Tensor) -> tuple[Tensor, Tensor]:
        forget, enter = gates.chunk(2, -1)
        d = functional.softplus(-forget) - functional.softplus(-enter)
        return torch.sigmoid(-d), torch.sigmoid(d)
