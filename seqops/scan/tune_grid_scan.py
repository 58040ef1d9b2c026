"""What can be tuned of grid_scan: the strips and widths of its Triton kernels.

Letters: B batch, X and Y sides of the grid, H heads, D channels of a head.
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
from .op_grid_scan import ops
from .tune_examples import DTYPES, compile_nothing, draw, example

FLAGS = (
    Flag("batch", 64, "B, the batch rows", small=2),
    Flag("width", 14, "X, the first side of the grid"),
    Flag("height", 14, "Y, the second side"),
    Flag("heads", 6, "H, the heads"),
    Flag("dim", 64, "D, the channels of a head"),
)


def key(walk: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton_grid_scan

    heads = shape["batch"] * shape["heads"]
    return triton_grid_scan.key_of(walk, getattr(torch, dtype), heads, shape["width"], shape["height"], shape["dim"])


def inputs(shape: Shape, dtype: str, device: str) -> list[Tensor]:
    """x_r, x_d, and gates that share out less than all there is."""
    nodes = tuple(shape[name] for name in ("batch", "width", "height", "heads"))
    x = [draw(*nodes, shape["dim"], dtype=dtype, device=device) for _ in range(2)]
    share = torch.sigmoid(draw(*nodes, dtype=dtype, device=device)) * 0.95
    return [*x, share, share, 0.95 - share, 0.95 - share]


def forward(shape: Shape, dtype: str, device: str) -> Example:
    given = inputs(shape, dtype, device)
    expected = partial(reference.grid_scan, *(each.double() for each in given))
    return example("triton", partial(ops.grid_scan, *given), expected, dtype)


def backward(shape: Shape, dtype: str, device: str) -> Example:
    """dx_r, dx_d and the gradients of the gates."""
    given = inputs(shape, dtype, device)
    dr, dd = given[1], given[0]
    with backend.backend("triton"), torch.no_grad():
        r, d = ops.grid_scan(*given)

    def run() -> Sequence[Tensor]:
        return ops.grid_scan_backward(dr, dd, *given[2:], r, d, None, None)[:6]

    def expected() -> Sequence[Tensor]:
        leaves = [each.double().requires_grad_() for each in given]
        return torch.autograd.grad(reference.grid_scan(*leaves), leaves, (dr.double(), dd.double()))

    return example("triton", run, expected, dtype, shape["dim"])


def targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton_grid_scan

    return [
        Target(
            op="grid_scan",
            direction=walk,
            tunable=tunable,
            flags=FLAGS,
            dtypes=DTYPES,
            key=partial(key, walk),
            compile=compile_nothing,
            example={"forward": forward, "backward": backward}[walk],
        )
        for walk, tunable in triton_grid_scan.TUNABLES.items()
    ]
