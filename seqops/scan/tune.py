"""What can be tuned of the scans: how the CUDA kernels walk, and the tiles of the Triton kernels.

Letters: B batch, T time, C channels, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Report, Shape, Target, compile_cuda
from . import cuda, reference, tiles, tune_grid_scan
from .op import ops
from .tune_examples import DTYPES, compile_nothing, draw, example

HEAD = 64  # channels that share a gate, where gates are of heads

# Values are checked over several tiles, and several groups of them.
ROWS = (Flag("batch", 8, "B, the batch rows"), Flag("time", 4096, "T, the time steps", small=3000))
LINEAR_FLAGS = (
    *ROWS,
    Flag("channels", 1024, "C, the channels"),
    Flag("gates", "channel", f"a gate for each channel, or for {HEAD} of them", type=str, choices=("channel", "head")),
)
SOFTMAX_FLAGS = (*ROWS, Flag("heads", 16, "H, the heads"), Flag("dim", 64, "D, the channels of a head"))


# ---- kernels and keys


def linear_pass(walk: str, shape: Shape, dtype: str) -> tiles.Pass:
    name = cuda.NAMES[getattr(torch, dtype)]
    vec = tiles.vector(name, shape["channels"], ())
    if shape["gates"] == "head":
        if shape["channels"] % HEAD:
            raise ValueError(f"--gates head: expected channels that are a multiple of {HEAD}, got {shape['channels']}")
        return tiles.Pass(f"linear_scan.{walk}", f"{name}+{tiles.REAL[name]}", vec, 1)
    return tiles.Pass(f"linear_scan.{walk}", f"{name}+{name}", vec, vec)


def linear_key(walk: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    kernel = linear_pass(walk, shape, dtype)
    return cuda.key_of(kernel, shape["batch"], shape["time"], shape["channels"])


def softmax_pass(walk: str, shape: Shape, dtype: str) -> tiles.Pass:
    name = cuda.NAMES[getattr(torch, dtype)]
    if walk in ("forward", "backward"):
        return tiles.Pass(f"softmax_scan.{walk}", name, tiles.vector(name, shape["dim"], ()))
    return tiles.Pass(f"softmax_scan.{walk}", f"{tiles.REAL[name]}+{name}")


def softmax_key(walk: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    kernel = softmax_pass(walk, shape, dtype)
    channels = shape["heads"] * (shape["dim"] if walk in ("forward", "backward") else 1)
    return cuda.key_of(kernel, shape["batch"], shape["time"], channels)


def triton_key(kernel: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton

    widths = {"softmax_scan.scores": ("heads",), "linear_scan": ("channels",)}
    names = widths.get(kernel) or widths.get(kernel.partition(".")[0]) or ("heads", "dim")
    channels = 1
    for name in names:
        channels *= shape[name]
    return triton.key_of(kernel, getattr(torch, dtype), shape["batch"], shape["time"], channels)


def compile_pass(device: Any, key: choose.Key, constants: choose.Solution) -> Report:
    kernel = tiles.Pass.of(key)
    shared = 0 if kernel.name == "softmax_scan.weights" else tiles.shared_bytes(kernel, constants)
    compiled = tiles.compiled(kernel, constants)
    return compile_cuda(kernel.source, compiled, device.architecture, shared, constants["threads"])


def keys_of(name: str) -> Iterator[choose.Key]:
    """The kernel for all dtypes, at few and many rows, steps and channels."""
    for kernel in tiles.passes():
        if kernel.name == name:
            for rows, time, lanes in ((1, 16, 1), (1, 65536, 8), (8, 4096, 128), (64, 2048, 512)):
                yield cuda.key_of(kernel, rows, time, lanes * kernel.vec)


# ---- examples


def linear_inputs(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    """x and a gate that forgets slowly."""
    B, T, C = shape["batch"], shape["time"], shape["channels"]
    heads = shape["gates"] == "head"
    channels, gates = ((C // HEAD, HEAD), (C // HEAD, 1)) if heads else ((C,), (C,))
    x = draw(B, T, *channels, dtype=dtype, device=device)
    a = torch.sigmoid(draw(B, T, *gates, dtype=dtype, device=device) + 3)
    return x, a.float() if heads and dtype != "float64" else a


def linear_forward(where: str, shape: Shape, dtype: str, device: str) -> Example:
    x, a = linear_inputs(shape, dtype, device)
    expected = partial(reference.linear_scan, x.double(), a.double())
    return example(where, partial(ops.linear_scan, x, a), expected, dtype)


def linear_backward(where: str, shape: Shape, dtype: str, device: str) -> Example:
    """dx, da and the gradient of the initial state."""
    x, a = linear_inputs(shape, dtype, device)
    dh = draw(*x.shape, dtype=dtype, device=device)
    with backend.backend(where), torch.no_grad():
        h, _ = ops.linear_scan(x, a)
    run = partial(ops.linear_scan_backward, dh, None, a, h, None)

    def expected() -> Sequence[Tensor]:
        inputs = [x.double(), a.double(), x.new_zeros(x[:, 0].shape, dtype=torch.float64)]
        inputs = [each.detach().requires_grad_() for each in inputs]
        h, _ = reference.linear_scan(*inputs)
        return torch.autograd.grad(h, inputs, dh.double())

    return example(where, run, expected, dtype, x[0, 0].numel() // a[0, 0].numel())


def softmax_inputs(shape: Shape, dtype: str, device: str) -> tuple[Tensor, Tensor]:
    B, T, H, D = (shape[name] for name in ("batch", "time", "heads", "dim"))
    return draw(B, T, H, dtype=dtype, device=device), draw(B, T, H, D, dtype=dtype, device=device)


def softmax_forward(where: str, shape: Shape, dtype: str, device: str) -> Example:
    s, v = softmax_inputs(shape, dtype, device)
    expected = partial(reference.softmax_scan, s.double(), v.double())
    return example(where, partial(ops.softmax_scan, s, v), expected, dtype)


def softmax_backward(where: str, shape: Shape, dtype: str, device: str) -> Example:
    """ds and dv."""
    s, v = softmax_inputs(shape, dtype, device)
    do = draw(*v.shape, dtype=dtype, device=device)
    with backend.backend(where), torch.no_grad():
        o, _, m, u = ops.softmax_scan_forward(s, v)

    def run() -> Sequence[Tensor]:
        return ops.softmax_scan_backward(do, None, s, v, o, m, u, None, None)[:2]

    def expected() -> Sequence[Tensor]:
        inputs = [each.double().requires_grad_() for each in (s, v)]
        return torch.autograd.grad(reference.softmax_scan(*inputs)[0], inputs, do.double())

    return example(where, run, expected, dtype)


# ---- targets

EXAMPLES = {
    "linear_scan.forward": linear_forward,
    "linear_scan.backward": linear_backward,
    "softmax_scan.forward": softmax_forward,
    "softmax_scan.backward": softmax_backward,
}
# The passes over scores run in the forward, or where the gradients are found.
DIRECTIONS = {"scores": "forward", "gradients": "backward", "weights": "backward"}


def cuda_target(name: str) -> Target:
    op, _, walk = name.partition(".")
    direction = DIRECTIONS.get(walk, walk)
    return Target(
        op=op,
        direction=direction,
        tunable=cuda.TUNABLES[name],
        flags=LINEAR_FLAGS if op == "linear_scan" else SOFTMAX_FLAGS,
        dtypes=DTYPES,
        key=partial(linear_key if op == "linear_scan" else softmax_key, walk),
        compile=compile_pass,
        example=partial(EXAMPLES[f"{op}.{direction}"], "cuda"),
        distinct=None if walk == "weights" else ("march", "threads", "lanes"),
        keys=partial(keys_of, name),
    )


def triton_targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton

    def target(name: str) -> Target:
        op, _, walk = name.partition(".")
        direction = DIRECTIONS.get(walk, walk)
        return Target(
            op=op,
            direction=direction,
            tunable=triton.TUNABLES[name],
            flags=LINEAR_FLAGS if op == "linear_scan" else SOFTMAX_FLAGS,
            dtypes=DTYPES,
            key=partial(triton_key, name),
            compile=compile_nothing,
            example=partial(EXAMPLES[f"{op}.{direction}"], "triton"),
        )

    return [target(name) for name in triton.TUNABLES]


TARGETS = [*map(cuda_target, cuda.TUNABLES), *triton_targets(), *tune_grid_scan.targets()]
