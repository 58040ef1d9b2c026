"""Birdie: a gated recurrence, half of which reads a prefix in both directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..scan import linear_scan
from .parts import check_multiple, check_positive, check_sequence, expect, wide
from .streaming import Streaming


class Birdie(Streaming):
    """Gated recurrence for prefix language models: half of the state runs forward, half backward within the prefix.

        forward half   h_t = a_t h_{t-1} + x_t
        backward half  h_t = a_t h_{t+1} + x_t  where t and t + 1 are in the prefix, else h_t = x_t
        a = sigmoid(W_a n)        x = W_u n ⊙ sigmoid(W_i n) ⊙ (1 - a)        y = W_o (h ⊙ sigmoid(W_g n))

    Every position of the prefix sees all of the prefix, every later one what came before it: what is to be predicted
    never reaches back. The backward half of a later position is its own x, so that it generates step by step.

        y, state = module(x, prefix=20)       # the whole: 20 tokens of prefix, then the suffix
        y, state = module.prefix(question)    # the prefix alone
        y, state = module.step(token, state)  # tokens after it

    Args:
        dim: D, features of n and y.
        state_size: N, both halves together, even; None is 2 D.
        device, dtype: of the parameters.

    Shapes: n [B, T, D] -> y [B, T, D]; state (h of the forward half [B, N / 2],), float32 at least, zeros at the start.

    Initialisation: as torch.nn.Linear's; the paper's is unconfirmed. The published example applies the a of the token
    before; here, as in the formula, a_t is the token's own.

    Memory: a gradient keeps about 13 N numbers for each step. Time: O(T D N) for the projections, O(T N) for the two
    scans.

    Raises:
        ValueError: a size is not positive, state_size is odd, n has a wrong shape or dtype, prefix or starts a wrong
            shape.

    Blouir et al., "Birdie: advancing state space models with reward-driven objectives and curricula", 2024.
    """

    def __init__(
        self,
        dim: int,
        state_size: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        state_size = 2 * dim if state_size is None else state_size
        check_positive(self, dim=dim, state_size=state_size)
        check_multiple(self, "state_size", state_size, "halves", 2)
        self.dim, self.state_size = dim, state_size
        options = {"device": device, "dtype": dtype}
        self.input = torch.nn.Linear(dim, 4 * state_size, **options)
        self.out = torch.nn.Linear(state_size, dim, **options)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.state_size}"

    def forward(
        self,
        n: Tensor,
        state: tuple[Tensor] | None = None,
        prefix: int | Tensor = 0,
        starts: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor]]:
        """A sequence, or a piece of one.

        Args:
            n: [B, T, D].
            state: of the steps before; None at the start.
            prefix: how many of these T tokens are prefix: a number, a number for each row [B], or bool [B, T], which
                marks them, as several documents in a row need.
            starts: [B, T] bool, first tokens of documents, where both halves begin anew.

        Returns:
            y [B, T, D], (h [B, N / 2],) after the last step.
        """
        check_sequence(self, n, self.dim, "n")
        u, enter, keep, gate = self.input(n).chunk(4, -1)
        a = torch.sigmoid(wide(keep))
        x = wide(u) * torch.sigmoid(wide(enter)) * torch.sigmoid(-wide(keep))
        both = self._marks(n, prefix)
        both = both & next_of(both)
        a_forward, a_backward = a.chunk(2, -1)
        if starts is not None:
            fits = starts.shape == n.shape[:2] and starts.dtype == torch.bool
            expect(fits, self, "starts", f"[B, T] = {[*n.shape[:2]]} bool", f"{list(starts.shape)} {starts.dtype}")
            a_forward = torch.where(starts[..., None], 0.0, a_forward)
            both = both & ~next_of(starts)
        x_forward, x_backward = x.chunk(2, -1)
        ahead, last = linear_scan(x_forward, a_forward, None if state is None else state[0])
        back, _ = linear_scan(x_backward, torch.where(both[..., None], a_backward, 0.0), reverse=True)
        h = torch.cat([ahead, back], -1).to(gate.dtype)
        return self.out(h * torch.sigmoid(gate)), (last,)

    def prefix(self, n: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        """A prefix alone: n [B, T, D] read in both directions -> y, and the state with which steps go on."""
        return self(n, prefix=n.shape[1])

    def _marks(self, n: Tensor, prefix: int | Tensor) -> Tensor:
        """[B, T] or [1, T] bool: which tokens are prefix."""
        B, T = n.shape[:2]
        position = torch.arange(T, device=n.device)[None]
        if not isinstance(prefix, Tensor):
            return position < prefix
        if prefix.dtype == torch.bool:
            expect(prefix.shape == (B, T), self, "prefix", f"[B, T] = {[B, T]} if bool", list(prefix.shape))
            return prefix
        expect(prefix.shape in ((), (B,)), self, "prefix", f"[B] = [{B}] or []", list(prefix.shape))
        return position < prefix.reshape(-1, 1)


def next_of(marks: Tensor) -> Tensor:
    """Of marks [B, T], at t that of t + 1; False at the end."""
    return torch.cat([marks[:, 1:], torch.zeros_like(marks[:, :1])], 1)
