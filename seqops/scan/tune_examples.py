"""How calls of the scans' kernels are tried: random inputs, and results within the tolerance of the dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Relative and absolute: in 16 bit 16 unit roundoffs, about twice what sums over a head need; else three times or more
# what the longest walks need.
TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 0.008, "bfloat16": 0.06}


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Tiles of the Triton kernels are arguments: no choice compiles anything."""
    return None


def draw(*sizes: int, dtype: str, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(sizes))
    return torch.randn(sizes, generator=generator).to(getattr(torch, dtype)).to(device)


def example(
    where: str,
    run: Callable[[], Sequence[Tensor]],
    expected: Callable[[], Sequence[Tensor]],
    dtype: str,
    summed: int = 1,
) -> Example:
    """`summed`: values of either sign that are added to one output, whose errors add up too."""

    def within() -> Sequence[Tensor]:
        with backend.backend(where), torch.no_grad():
            return run()

    return Example(within, expected, (TOLERANCES[dtype], TOLERANCES[dtype] * summed**0.5))
