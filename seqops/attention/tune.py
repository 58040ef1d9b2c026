"""What can be tuned of attention over ranges: the tiles that the Triton kernels walk.

Letters: B batch, T time, H heads, D channels, C positions of a chunk.
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
from . import ranges, reference
from .op import ops

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Relative and absolute, for outputs of about 1: in 16 bit weights and their gradients are rounded too.
TOLERANCES = {"float64": 1e-12, "float32": 2e-5, "float16": 0.008, "bfloat16": 0.06}
# Values are checked over several tiles, of which the last is short.
FLAGS = (
    Flag("batch", 4, "B, the batch rows", small=1),
    Flag("time", 4096, "T, the time steps", small=300),
    Flag("heads", 8, "H, the heads", small=2),
    Flag("dim", 64, "D, the channels of a head"),
    Flag("chunk", 256, "C, the positions of a chunk", small=160),
)


def triton_key(direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton_range_attention as triton

    return triton.key_of(direction, dtype, *(shape[name] for name in ("batch", "time", "heads", "dim")), 1, False)


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Every shape that can be chosen is compiled by the tests, for all architectures: none spills."""
    return None


def example(direction: str, shape: Shape, dtype: str, device: str) -> Example:
    """Causal attention in chunks: o and lse, or the gradients of q, k and v."""
    B, T, H, D, C = (shape[name] for name in ("batch", "time", "heads", "dim", "chunk"))
    generator = torch.Generator().manual_seed(D)
    q, k, v, do = (torch.randn(B, T, H, D, generator=generator).to(getattr(torch, dtype)) for _ in range(4))
    t = ranges.steps(T, torch.device("cpu"))
    chunks = ranges.stack([(t - t % C, t + 1)])
    seen = ranges.seen_by(chunks, T)
    wide = [each.double().requires_grad_(direction != "forward") for each in (q, k, v)]
    exact = reference.range_attention(*wide, chunks)
    o, lse = (each.detach() for each in exact)
    real = torch.float64 if dtype == "float64" else torch.float32
    saved = [each.to(device) for each in (do, o.to(q.dtype), lse.to(real), q, k, v, chunks, seen)]

    def run() -> Sequence[Tensor]:
        do, o, lse, q, k, v, chunks, seen = saved
        with backend.backend("triton"), torch.no_grad():
            if direction == "forward":
                return ops.range_attention(q, k, v, chunks)
            return ops.range_attention_backward(do, None, o, lse, q, k, v, chunks, seen)[:3]

    def expected() -> Sequence[Tensor]:
        return exact if direction == "forward" else torch.autograd.grad(exact[0], wide, do.double())

    scale = 1 if direction == "forward" else 4
    return Example(run, expected, (TOLERANCES[dtype], TOLERANCES[dtype] * scale))


def triton_targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton_range_attention as triton

    return [
        Target(
            op="range_attention",
            direction="forward" if direction == "forward" else "backward",
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
