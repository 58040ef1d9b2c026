"""What can be tuned of fft_conv: tiles of the Triton kernels, and how many rows are transformed together.

Letters: B batch, T time, D channels, L taps.
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
from . import reference, tiles_fft_conv
from .op_fft_conv import ops

# Relative and absolute, of outputs of about 1: errors of transforms are relative to the largest.
TOLERANCES = {"float32": 1e-5, "float64": 1e-13, "bfloat16": 0.03, "float16": 0.004}
FLAGS = (
    Flag("batch", 8, "B, the batch rows"),
    Flag("time", 4096, "T, the time steps", small=300),
    Flag("dim", 512, "D, the channels", small=40),
    Flag("taps", 4096, "L, the taps of a channel", small=300),
)


def key_of(direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton_fft_conv

    B, T, D, L = (shape[flag.name] for flag in FLAGS)
    n = tiles_fft_conv.fast_length(T + min(T, L) - 1)
    return triton_fft_conv.key_of(direction, getattr(torch, dtype), B * D, T, n)


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Triton compiles at the first launch."""
    return None


def example(direction: str, shape: Shape, dtype: str, device: str) -> Example:
    generator = torch.Generator().manual_seed(0)
    B, T, D, L = (shape[flag.name] for flag in FLAGS)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(sizes, generator=generator) * scale).to(getattr(torch, dtype)).to(device)

    u, k, dy = draw(B, T, D), draw(D, L, scale=max(L, 1) ** -0.5), draw(B, T, D)

    def run() -> Tensor | Sequence[Tensor]:
        with backend.backend("triton"), torch.no_grad():
            if direction == "forward":
                return ops.fft_conv(u, k)
            return ops.fft_conv_backward(dy, u, k, None, True, True)[:2]

    def expected() -> Tensor | Sequence[Tensor]:
        inputs = [each.double().requires_grad_() for each in (u, k)]
        y = reference.fft_conv(*inputs)
        return y.detach() if direction == "forward" else torch.autograd.grad(y, inputs, dy.double())

    # Gradients of taps are sums over all rows and steps.
    summed = 1.0 if direction == "forward" else (B * T) ** 0.5
    return Example(run, expected, (TOLERANCES[dtype], TOLERANCES[dtype] * summed))


def target(direction: str) -> Target:
    from . import triton_fft_conv

    return Target(
        op="fft_conv",
        direction=direction,
        tunable=triton_fft_conv.TUNABLES[direction],
        flags=FLAGS,
        dtypes=tuple(tiles_fft_conv.SIZES),
        key=partial(key_of, direction),
        compile=compile_nothing,
        example=partial(example, direction),
    )


TARGETS = [target(direction) for direction in ("forward", "backward")] if find_spec("triton") is not None else []
