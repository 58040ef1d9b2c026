"""What can be tuned of conv_ssm: whether Triton's kernel joins the scan with the products."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Shape, Target
from . import reference_conv_ssm as reference
from .op_conv_ssm import ops

DTYPES = ("float32", "bfloat16", "float16")
# Relative and absolute, of sums of several hundred products.
TOLERANCES = {"float32": 5e-5, "float16": 0.01, "bfloat16": 0.08}
FLAGS = (
    Flag("batch", 8, "B, the batch rows"),
    Flag("time", 300, "T, the time steps"),
    Flag("side", 16, "Y and X, the sides of a frame"),
    Flag("channels", 128, "U, the channels of a frame"),
    Flag("states", 128, "P, the complex channels of the state"),
    Flag("size", 1, "kh and kw of the input kernel b; c and d are of one pixel"),
)


def key(walk: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton_conv_ssm as launchers

    pixels = shape["batch"] * shape["side"] ** 2
    sizes = (shape["time"], shape["channels"], shape["states"])
    return launchers.key_of(walk, getattr(torch, dtype), pixels, *sizes, shape["size"] > 1)


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """The tests compile every kernel that a choice can name."""
    return None


def inputs(shape: Shape, dtype: str, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    B, T, Y, U, P, k = (shape[name] for name in ("batch", "time", "side", "channels", "states", "size"))

    def draw(*sizes: int, fan: int = 1, dtype: torch.dtype = torch.complex64) -> Tensor:
        return (torch.randn(sizes, generator=generator, dtype=dtype) * fan**-0.5).to(device)

    a = torch.polar(torch.rand(P, generator=generator) * 0.2 + 0.8, torch.rand(P, generator=generator) * 6)
    return {
        "u": draw(B, T, Y, Y, U, dtype=torch.float32).to(getattr(torch, dtype)),
        "a": a.to(device),
        "b": draw(k, k, U, P, fan=k * k * U),
        "c": draw(1, 1, P, U, fan=P),
        "d": draw(1, 1, U, U, fan=U, dtype=torch.float32),
    }


def example(walk: str, shape: Shape, dtype: str, device: str) -> Example:
    """y, or du."""
    given = inputs(shape, dtype, device)
    exact = {name: t.to(torch.complex128 if t.is_complex() else torch.float64) for name, t in given.items()}
    dy = torch.randn(given["u"].shape, generator=torch.Generator().manual_seed(1)).to(given["u"])
    with backend.backend("triton"), torch.no_grad():
        _, _, entering = ops.conv_ssm_forward(*given.values())

    def run() -> Sequence[Tensor]:
        with backend.backend("triton"), torch.no_grad():
            if walk == "forward":
                return ops.conv_ssm(*given.values())[:1]
            return ops.conv_ssm_backward(dy, None, *given.values(), None, entering)[:1]

    def expected() -> Sequence[Tensor]:
        if walk == "forward":
            return reference.conv_ssm(**exact)[:1]
        leaves = {name: t.detach().requires_grad_() for name, t in exact.items()}
        return torch.autograd.grad(reference.conv_ssm(**leaves)[0], leaves["u"], dy.double())

    tolerance = TOLERANCES[dtype]
    return Example(run, expected, (tolerance, 10 * tolerance))


def targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton_conv_ssm as launchers

    return [
        Target(
            op="conv_ssm",
            direction=walk,
            tunable=tunable,
            flags=FLAGS,
            dtypes=DTYPES,
            key=partial(key, walk),
            compile=compile_nothing,
            example=partial(example, walk),
        )
        for walk, tunable in launchers.TUNABLES.items()
    ]


TARGETS = targets()
