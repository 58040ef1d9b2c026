"""State-space models, step by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.formulas import Case


def gated(linear: torch.nn.Linear, y: Tensor) -> Tensor:
    """GELU, a linear map to twice the width, half of it times the sigmoid of the other half."""
    exact = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    first, second = (exact @ linear.weight.T + linear.bias).chunk(2, -1)
    return first / (1 + torch.exp(-second))


def s4d(module: torch.nn.Module, x: Tensor) -> Tensor:
    step = module.log_step.exp()[:, None]
    eigenvalues = torch.complex(-module.log_decay.exp(), module.frequency)
    keep, enter = torch.exp(step * eigenvalues), (torch.exp(step * eigenvalues) - 1) / eigenvalues
    c = module.c[..., 0] + 1j * module.c[..., 1]

    def read(u: Tensor, c: Tensor) -> Tensor:
        h, rows = u.new_zeros(*u[:, 0].shape, keep.shape[1]) + 0j, []
        for t in range(u.shape[1]):
            h = keep * h + enter * u[:, t, :, None]
            rows.append(2 * (c * h).sum(-1).real)
        return torch.stack(rows, 1)

    y = read(x, c[0]) + module.skip * x
    if module.bidirectional:
        later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
        y = y + read(later.flip(1), c[1]).flip(1)
    return gated(module.mix, y)


CASES = [
    Case("S4D", {"size": 6, "state_size": 8}, s4d, shape=(2, 13, 6)),
    Case("S4D", {"size": 4, "state_size": 6, "init": "lin", "step_min": 1e-5}, s4d, shape=(2, 70, 4), note="lin",
         compiled=False, in16=False, steps=False),
    Case("S4D", {"size": 5, "state_size": 4, "init": "inv", "bidirectional": True}, s4d, shape=(2, 11, 5),
         note="both ways", cuts=()),
]  # fmt: skip
