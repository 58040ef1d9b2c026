"""What modules that read a sequence share: the whole at once, in pieces, or one step after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# A tensor, or a tuple of states. Batch is every tensor's first dimension.
State = Any


class Streaming(torch.nn.Module):
    """A module whose past fits a state.

        y, state = module(x)                  # x [B, T, D], from the start
        y, state = module(x, state)           # the piece that follows
        y, state = module.step(x_t, state)    # one step, x_t [B, D]

    Pieces joined by their state give what the whole gives, gradients included. A state is a tensor, or a tuple of
    states, each tensor with the batch first; its size does not grow with the sequence, except in modules that attend to
    all that they have read, whose docstrings say so. A state holds no view of the piece that it ends.
    """

    def step(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x [B, D], one step, and the state before it (None: the start) -> y [B, D], the state after it."""
        result = self(x[:, None], state)
        if isinstance(result, Tensor):  # two rows of it would pass for y and state
            raise ValueError(f"{type(self).__name__}: step: expected a causal module, got one that returns y alone")
        y, state = result
        return y[:, 0], state


def detach(state: State) -> State:
    """A state without its history, for backpropagation through a few pieces at a time."""
    if state is None:
        return None
    return state.detach() if isinstance(state, Tensor) else tuple(detach(part) for part in state)
