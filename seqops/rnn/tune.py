"""What can be tuned of the recurrent operators: how the CPU kernels share their work. There is nothing to compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import choose
from ..tune.target import Example, Flag, Shape, Target
from . import cpu, reference, tiles
from .op import GATES, STATES, ops

FLAGS = (
    Flag("heads", 1, "H, the number of heads"),
    Flag("dim", 256, "D, the units of a head"),
    # Values are checked at the batch itself, for which blocks of rows are chosen, and at steps enough to pack r.
    Flag("batch", 16, "B, the batch rows", small=1 << 20),
    Flag("time", 256, "T, the time steps", small=16),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}


def key_of(op: str, direction: str, shape: Shape, dtype: str, host: Any) -> choose.Key:
    sizes = {"H": shape["heads"], "D": shape["dim"], "B": shape["batch"], "T": shape["time"]}
    unpacked = tiles.is_unpacked(direction, sizes["B"], sizes["T"])
    return cpu.key(op, direction, dtype, sizes, host.threads, unpacked)


def compile_nothing(host: Any, key: choose.Key, constants: choose.Solution) -> None:
    return None


def inputs_of(op: str, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """wx [B, T, G, H, D], r [G, H, D, D] and the gradient of h [B, T, H, D]."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, D = (shape[name] for name in ("batch", "time", "heads", "dim"))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    wx, r = draw(B, T, GATES[op], H, D), draw(GATES[op], H, D, D) / D**0.5
    return wx.to(dtype), r.to(dtype), draw(B, T, H, D).to(dtype)


def forward_example(op: str, shape: Shape, dtype: str, device: str) -> Example:
    """h and the final states."""
    wx, r, _ = inputs_of(op, shape, getattr(torch, dtype))

    def expected() -> tuple[Tensor, ...]:
        return getattr(reference, op)(wx.double(), r.double())

    return Example(partial(_without_gradient, getattr(ops, op), wx, r), expected, (TOLERANCES[dtype],) * 2)


def backward_example(op: str, shape: Shape, dtype: str, device: str) -> Example:
    """The gradients of wx and of the initial states, for a gradient of h."""
    wx, r, dh = inputs_of(op, shape, getattr(torch, dtype))
    missing = (None,) * len(STATES[op])
    with torch.no_grad():
        if op == "elman":
            h, _ = ops.elman(wx, r)
            run = partial(ops.elman_backward, dh, None, r, h)
        else:
            h, *states = getattr(ops, f"{op}_forward")(wx, r)
            final, saved = states[: len(missing)], states[len(missing) :]
            saved += {"lstm": [None], "gru": [h, None], "slstm": [*final[1:3], None, None]}[op]
            run = partial(getattr(ops, f"{op}_backward"), dh, *missing, r, *saved)

    def expected() -> tuple[Tensor, ...]:
        start = [wx.double(), *initial_states(op, shape)]
        given = dict(zip(STATES[op], start[1:], strict=True))
        for each in start:
            each.requires_grad_()
        h, *_ = getattr(reference, op)(start[0], r.double(), **given)
        return torch.autograd.grad(h, start, dh.double(), materialize_grads=True)

    def results() -> tuple[Tensor, ...]:
        found = _without_gradient(run)
        return (found[0], *found[2:]) if op == "gru" else found  # without dy

    return Example(results, expected, (TOLERANCES[dtype],) * 2)


def initial_states(op: str, shape: Shape) -> list[Tensor]:
    """What a missing state is, in float64."""
    B, H, D = shape["batch"], shape["heads"], shape["dim"]
    return [torch.full((B, H, D), -torch.inf if name == "m0" else 0.0, dtype=torch.float64) for name in STATES[op]]


def _without_gradient(function: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return function(*args)


TARGETS = [
    Target(
        op=op,
        direction=direction,
        tunable=tunable,
        flags=FLAGS,
        dtypes=DTYPES,
        key=partial(key_of, op, direction),
        compile=compile_nothing,
        example=partial(forward_example if direction == "forward" else backward_example, op),
    )
    for (op, direction), tunable in cpu.TUNABLES.items()
]
