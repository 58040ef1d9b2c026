"""What can be tuned of linear attention: the chunks and rows that the Triton kernels walk.

Letters: B batch, T time, H heads, K key width, V value width.
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
from . import reference, tiles
from .op import ops

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Relative and absolute, for outputs of about 1: in 16 bit weights and states are rounded to the storage dtype as well.
TOLERANCES = {"float64": 1e-12, "float32": 5e-5, "float16": 0.008, "bfloat16": 0.06}
# Values are checked over several rows of several chunks.
FLAGS = (
    Flag("batch", 4, "B, the batch rows", small=1),
    Flag("time", 4096, "T, the time steps", small=600),
    Flag("heads", 8, "H, the heads", small=2),
    Flag("key", 64, "K, the width of keys"),
    Flag("value", 64, "V, the width of values"),
    Flag("decay", "step", "no decay, one a step, or one a step and key channel", type=str, choices=tiles.DECAYS),
)


def triton_key(direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    """For tensors whose memory is aligned."""
    from . import triton

    sizes = [shape[name] for name in ("batch", "time", "heads", "key", "value")]
    aligned = tiles.SIZES[dtype] == 2 and not any(width % tiles.ALIGNMENT for width in sizes[3:])
    return triton.key_of(direction, dtype, *sizes, shape["decay"], aligned)


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Every shape that can be chosen is compiled by the tests, for all architectures: none spills."""
    return None


def inputs_of(shape: Shape, dtype: str, device: str) -> list[Tensor | None]:
    """q, k and v of about 1, and decays that forget within tens of steps."""
    B, T, H, K, V = (shape[name] for name in ("batch", "time", "heads", "key", "value"))
    generator = torch.Generator().manual_seed(K)
    sizes = {"step": (B, T, H), "channel": (B, T, H, K)}.get(shape["decay"])

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    q, k, v = draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V)
    g = None if sizes is None else -0.1 * draw(*sizes).abs()
    q, k = q * K**-0.25, k * K**-0.25
    return [each if each is None else each.to(getattr(torch, dtype)).to(device) for each in (q, k, v, g)]


def example(direction: str, shape: Shape, dtype: str, device: str) -> Example:
    """All outputs, or all gradients."""
    inputs = inputs_of(shape, dtype, device)
    wide = [each if each is None else each.double().requires_grad_(direction == "backward") for each in inputs]
    do = torch.ones_like(inputs[2]).mul_(0.5)

    def run() -> Sequence[Tensor]:
        with backend.backend("triton"), torch.no_grad():
            if direction == "forward":
                return ops.linear_attention(*inputs, scale=1.0)
            return ops.linear_attention_backward(do, None, *inputs, None, scale=1.0)[: 3 + (inputs[3] is not None)]

    def expected() -> Sequence[Tensor]:
        o, last = reference.linear_attention(*wide, scale=1.0)
        if direction == "forward":
            return o, last
        return torch.autograd.grad(o, [each for each in wide if each is not None], do.double())

    # Gradients add as many terms as steps are remembered.
    scale = 1 if direction == "forward" else 2
    return Example(run, expected, (TOLERANCES[dtype], TOLERANCES[dtype] * scale * shape["key"] ** 0.5))


def triton_targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton

    return [
        Target(
            op="linear_attention",
            direction=direction,
            tunable=tunable,
            flags=FLAGS,
            dtypes=DTYPES,
            key=partial(triton_key, direction),
            compile=compile_nothing,
            example=partial(example, direction),
        )
        for direction, tunable in triton.TUNABLES.items()
    ]


TARGETS = triton_targets()
