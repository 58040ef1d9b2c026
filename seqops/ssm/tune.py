"""What can be tuned of the room: tiles of the Triton kernels.

Letters: H heads, N modes of a head, L length or nodes.
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
from . import reference, tune_conv_ssm
from .op import ops

DTYPES = ("complex64", "complex128")
# Relative and absolute, of sums of thousands of terms.
TOLERANCES = {"complex64": 1e-4, "complex128": 1e-10}
FLAGS = (
    Flag("heads", 256, "H, the heads"),
    Flag("modes", 32, "N, the modes of a head"),
    Flag("length", 4096, "L, the length, or the nodes", small=1000),
)


def key(kernel: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton

    return triton.key_of(kernel, getattr(torch, dtype), shape["heads"], shape["modes"], shape["length"])


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """The tests compile every kernel that a choice can name."""
    return None


def inputs(op: str, shape: Shape, dtype: str, device: str) -> list[Tensor]:
    """z and c, or v, nodes and w."""
    H, N, L = shape["heads"], shape["modes"], shape["length"]
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.complex128, generator=generator)

    rate = torch.complex(-torch.rand(H, N, dtype=torch.float64, generator=generator) - 1 / L, draw(H, N).real)
    made = [rate, draw(H, N)] if op == "ssm_kernel" else [draw(H, N), 1j * draw(L).real, rate]
    return [each.to(getattr(torch, dtype)).to(device) for each in made]


def example(kernel: str, shape: Shape, dtype: str, device: str) -> Example:
    """The result, or all gradients."""
    op, _, walk = kernel.partition(".")
    given = inputs(op, shape, dtype, device)
    sizes = (shape["length"],) if op == "ssm_kernel" else ()
    exact = [each.to(torch.complex128) for each in given]
    dy = torch.randn(shape["heads"], shape["length"], generator=torch.Generator().manual_seed(1)).to(given[0])
    dy = dy.real.contiguous() if op == "ssm_kernel" else dy

    def run() -> Sequence[Tensor]:
        with backend.backend("triton"), torch.no_grad():
            if walk == "forward":
                return [getattr(ops, op)(*given, *sizes)]
            return getattr(ops, f"{op}_backward")(dy, *given)

    def expected() -> Sequence[Tensor]:
        function = getattr(reference, op)
        if walk == "forward":
            return [function(*exact, *sizes)]
        leaves = [each.detach().requires_grad_() for each in exact]
        y = function(*leaves, *sizes)
        return torch.autograd.grad(y, leaves, dy.to(y.dtype))

    tolerance = TOLERANCES[dtype]
    return Example(run, expected, (tolerance, tolerance * shape["length"] ** 0.5))


def targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton

    return [
        Target(
            op=name.partition(".")[0],
            direction=name.partition(".")[2],
            tunable=tunable,
            flags=FLAGS,
            dtypes=DTYPES,
            key=partial(key, name),
            compile=compile_nothing,
            example=partial(example, name),
        )
        for name, tunable in triton.TUNABLES.items()
    ]


TARGETS = [*targets(), *tune_conv_ssm.TARGETS]
