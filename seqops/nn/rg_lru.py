"""RG-LRU and the recurrent block of Griffin around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..conv import causal_conv1d
from ..scan import linear_scan
from .parts import (
    check_multiple,
    check_positive,
    check_sequence,
    check_state,
    expect,
    inverse_softplus,
    split_heads,
    wide,
)
from .streaming import Streaming

STEEPEST = 1000.0


def bounded_root(x: Tensor) -> Tensor:
    """sqrt(x) for x >= 0, whose derivative is at most 1000: that of the root at 0 is infinite."""
    least = 0.25 / STEEPEST**2
    line = x.detach().clamp(min=0).sqrt() + STEEPEST * (x - x.detach())
    return torch.where(x >= least, x.clamp(min=least).sqrt(), line)


class RGLRU(Streaming):
    """Real-gated linear recurrent unit: a gated decay, and an input scaled to keep the size of the state.

        h_t = a_t h_{t-1} + sqrt(1 - a_t²) i_t x_t        i = sigmoid(W_x x)        r = sigmoid(W_a x)
        a_t = exp(-8 softplus(Λ) r_t)

    At the first step of a sequence, and of a document, a = 0: the root is 1, nothing of what came before is read. The
    root's derivative is held at 1000, which it would exceed as a approaches 1.

    Args:
        dim: D, features of x, y and state.
        num_heads: H, divides dim: W_x and W_a are block-diagonal, a feature's gates see the D / H of its head.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (h [B, D], count [B]): float32 at least, and the steps read, int64.

    Initialisation: `exp(-2 softplus(Λ))` uniform between 0.9² and 0.999²; W normal / sqrt(D / H), biases 0.

    Memory: a gradient keeps about 12 D numbers for each step. Time: O(T D² / H) for the gates, O(T D) for the scan.

    Raises:
        ValueError: a size is not positive, num_heads does not divide dim, or x or starts has a wrong shape or dtype.

    De et al., "Griffin: mixing gated linear recurrences with local attention for efficient language models", 2024.
    """

    undecayed = ("decay", "bias")

    def __init__(self, dim: int, num_heads: int = 1, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.num_heads = dim, num_heads
        width, options = dim // num_heads, {"device": device, "dtype": dtype}
        # [gate, head, from, to]: the gate of the decay, then that of the input.
        self.weight = torch.nn.Parameter(torch.empty(2, num_heads, width, width, **options))
        self.bias = torch.nn.Parameter(torch.zeros(2, num_heads, width, **options))
        self.decay = torch.nn.Parameter(torch.empty(dim, **options))
        self.reset_parameters()

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(std=(self.dim // self.num_heads) ** -0.5)
        self.bias.zero_()
        square = torch.empty(self.dim, device=self.decay.device).uniform_(0.9**2, 0.999**2)
        self.decay.copy_(inverse_softplus(-0.5 * square.log()))

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, T, D], the state of the steps before, starts [B, T] bool: first steps of documents -> y, state."""
        check_sequence(self, x, self.dim)
        B, T, D = x.shape
        check_state(self, state, (B, D), (B,))
        if state is None:
            state = (wide(x).new_zeros(B, D), torch.zeros(B, dtype=torch.int64, device=x.device))
        h, count = state
        first = (torch.arange(T, device=x.device) + count[:, None] == 0)[..., None]  # [B, T, 1]
        if starts is not None:
            fits = starts.shape == x.shape[:2] and starts.dtype == torch.bool
            expect(fits, self, "starts", f"[B, T] = {[B, T]} bool", f"{list(starts.shape)} {starts.dtype}")
            first = first | starts[..., None]
        products = torch.einsum("bthi,ghij->gbthj", split_heads(x, self.num_heads), self.weight)
        gate, enter = torch.sigmoid(wide(products) + self.bias[:, None, None]).flatten(-2)  # [B, T, D] each
        log_a = -8 * functional.softplus(wide(self.decay)) * gate
        a = torch.where(first, 0.0, log_a.exp())
        root = torch.where(first, 1.0, bounded_root(-torch.expm1(2 * log_a)))
        h, last = linear_scan(root * enter * wide(x), a, h)
        return h.to(x.dtype), (last, count + T)


class GriffinBlock(Streaming):
    """Griffin's recurrent block: a short convolution and an RG-LRU, gated by a second branch.

        y = W_o (gelu(W_g x) ⊙ RGLRU(conv(W_x x)))

    Args:
        dim: D, features of x and y.
        width: R, features of the recurrence; None is dim.
        num_heads: of the RG-LRU, divides width.
        taps: W, of the causal convolution.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (last W - 1 inputs of the convolution [B, W - 1, R], h [B, R],
    count [B]), float32 at least, count int64.

    Initialisation: projections normal / sqrt(features read), taps normal · sqrt(0.01 / W), biases 0. The published
    output projection also shrinks with the number of layers.

    Memory: a gradient keeps about 18 R numbers for each step. Time: O(T D R) for the projections, O(T R) for
    convolution and scan.

        block = GriffinBlock(64, num_heads=4)
        y, state = block(torch.randn(2, 100, 64))

    Raises:
        ValueError: a size is not positive, num_heads does not divide width, or x or starts has a wrong shape or dtype.

    De et al., "Griffin: mixing gated linear recurrences with local attention for efficient language models", 2024.
    """

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        num_heads: int = 1,
        taps: int = 4,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = dim if width is None else width
        check_positive(self, dim=dim, width=width, num_heads=num_heads, taps=taps)
        check_multiple(self, "width", width, "num_heads", num_heads)
        self.dim, self.width, self.taps = dim, width, taps
        options = {"device": device, "dtype": dtype}
        self.gate = torch.nn.Linear(dim, width, **options)
        self.input = torch.nn.Linear(dim, width, **options)
        self.weight = torch.nn.Parameter(torch.empty(width, taps, **options))
        self.bias = torch.nn.Parameter(torch.zeros(width, **options))
        self.recurrence = RGLRU(width, num_heads, **options)
        self.out = torch.nn.Linear(width, dim, **options)
        for linear in (self.gate, self.input, self.out):
            torch.nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            torch.nn.init.zeros_(linear.bias)
        torch.nn.init.normal_(self.weight, std=(0.01 / taps) ** 0.5)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.width}, taps={self.taps}"

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None, starts: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """x [B, T, D], the state of the steps before, starts [B, T] bool: where the recurrence begins anew -> y, state.

        The convolution reads across starts, over W - 1 steps.
        """
        check_sequence(self, x, self.dim)
        u = self.input(x)
        before = None if state is None else state[0].to(u.dtype)
        u, taps = causal_conv1d(u, self.weight, self.bias, before)
        u, (h, count) = self.recurrence(u, None if state is None else state[1:], starts)
        y = self.out(functional.gelu(self.gate(x), approximate="tanh") * u)
        return y, (wide(taps), h, count)
