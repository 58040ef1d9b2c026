"""What can be tuned of the memory's Triton kernels: tokens of a tile.

Letters: B batch, T time, H heads, D channels, F hidden channels (0: a linear memory), C tokens of a chunk.
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
from .op_neural_memory import ops

# Relative and absolute, of values of about 1 after many products of operands of 16 bits.
TOLERANCES = {"float64": 1e-11, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.15}
FLAGS = (
    Flag("batch", 8, "B, the batch rows", small=1),
    Flag("time", 4096, "T, the tokens", small=200),
    Flag("heads", 16, "H, the heads", small=2),
    Flag("dim", 64, "D, the channels of a head"),
    Flag("hidden", 256, "F, the hidden channels; 0: a linear memory"),
    Flag("chunk", 16, "C, the tokens of a chunk"),
)


def triton_key(direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton_neural_memory as triton

    sizes = (triton.padded(shape[name]) for name in ("dim", "hidden"))
    return triton.key_of(direction, dtype, min(shape["chunk"], shape["time"]), *sizes)


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Every shape that can be chosen is compiled by the tests, for all architectures: none spills."""
    return None


def example(direction: str, shape: Shape, dtype: str, device: str) -> Example:
    """o and the state after the last token, or gradients of tokens and weights."""
    B, T, H, D, F, C = (shape[name] for name in ("batch", "time", "heads", "dim", "hidden", "chunk"))
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator) * scale

    def gate(most: float) -> Tensor:
        return torch.rand(B, T, H, generator=generator) * most

    keys = draw(B, T, H, D)
    sequences = [draw(B, T, H, D), keys / keys.norm(dim=-1, keepdim=True), draw(B, T, H, D), draw(B, T, H, D)]
    q, k, v, do = (t.to(getattr(torch, dtype)) for t in sequences)
    real = torch.float64 if dtype == "float64" else torch.float32
    gates = [t.to(real) for t in (gate(0.6 / C**0.5), gate(0.5), gate(0.9))]
    sizes = [(F, D), (D, F)] if F else [(D, D)]
    weights = [draw(B, H, *size, scale=size[1] ** -0.5).to(real) for size in sizes]
    tensors = [t.to(device) for t in (q, k, v, *gates, *weights)] + [None] * (4 - len(weights))

    def run() -> Sequence[Tensor]:
        with backend.backend("triton"), torch.no_grad():
            if direction == "forward":
                o, w1, w2, s1, s2 = ops.memory(*tensors, C)
                return (o, w1, w2, s1, s2) if F else (o, w1, s1)
            states = ops.memory_forward(*tensors, C)[5]
            found = ops.memory_backward(do.to(device), None, None, None, None, *tensors, states, C)
            return (*found[:3], *found[6 : 6 + len(weights)])

    def expected() -> Sequence[Tensor]:
        wide = [t.double().requires_grad_(direction != "forward") for t in (q, k, v, *weights)]
        lr, decay, momentum = (t.double() for t in gates)
        first, second, third, *learnt = wide
        o, w, s = reference.neural_memory(first, second, third, lr, learnt, C, decay=decay, momentum=momentum)
        return (o, *w, *s) if direction == "forward" else torch.autograd.grad(o, wide, do.double())

    # Gradients add as many terms as tokens are remembered.
    scale = 1 if direction == "forward" else 4
    return Example(run, expected, (TOLERANCES[dtype], TOLERANCES[dtype] * scale))


def triton_targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton_neural_memory as triton

    return [
        Target(
            op="neural_memory",
            direction=direction,
            tunable=tunable,
            flags=FLAGS,
            dtypes=tuple(TOLERANCES),
            key=partial(triton_key, direction),
            compile=compile_nothing,
            example=partial(example, direction),
        )
        for direction, tunable in triton.TUNABLES.items()
    ]


TARGETS = triton_targets()
