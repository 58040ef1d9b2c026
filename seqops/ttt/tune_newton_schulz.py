"""What can be tuned of newton_schulz: tiles of the Triton kernels.

Letters: n matrices of M rows and N columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Shape, Target
from . import reference
from .op_newton_schulz import ops

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Relative and absolute, of elements of about M^-1/2: steps enlarge what 16 bits lose.
TOLERANCES = {"float64": 1e-10, "float32": 5e-4, "float16": 0.02, "bfloat16": 0.15}
FLAGS = (
    Flag("batch", 12, "n, the matrices", small=2),
    Flag("rows", 768, "M, the rows", small=200),
    Flag("columns", 768, "N, the columns", small=300),
)


def key_of(direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton_newton_schulz

    return triton_newton_schulz.key_of(direction, dtype, *(shape[flag.name] for flag in FLAGS))


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Every shape that can be chosen is compiled by the tests, for all architectures: none spills."""
    return None


def example(direction: str, shape: Shape, dtype: str, device: str) -> Example:
    n, rows, columns = (shape[flag.name] for flag in FLAGS)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(n, rows, columns, generator=generator).to(getattr(torch, dtype)).to(device) for _ in range(2))

    def run() -> Tensor | Sequence[Tensor]:
        with backend.backend("triton"), torch.no_grad():
            return ops.newton_schulz(x) if direction == "forward" else ops.newton_schulz_backward(dy, x)

    def expected() -> Tensor:
        wide = x.double().requires_grad_(direction == "backward")
        y = reference.newton_schulz(wide)
        return y if direction == "forward" else torch.autograd.grad(y, wide, dy.double())[0]

    return Example(run, expected, (TOLERANCES[dtype], TOLERANCES[dtype]))


def targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton_newton_schulz

    return [
        Target(
            op="newton_schulz",
            direction=direction,
            tunable=tunable,
            flags=FLAGS,
            dtypes=DTYPES,
            key=partial(key_of, direction),
            compile=compile_nothing,
            example=partial(example, direction),
        )
        for direction, tunable in triton_newton_schulz.TUNABLES.items()
    ]


TARGETS = targets()
