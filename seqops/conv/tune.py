"""What can be tuned of causal_conv1d: how the CUDA kernels share out the work, and the tiles of the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Report, Shape, Target, compile_cuda
from . import cuda, reference, tiles, tune_fft_conv
from .op import ops

DTYPES = ("bfloat16", "float16", "float32", "float64")
# Relative and absolute: 16 unit roundoffs of 16 bits; else what sums over time need, and three times more.
TOLERANCES = {"float64": 1e-11, "float32": 1e-4, "float16": 0.008, "bfloat16": 0.06}

FLAGS = (
    Flag("batch", 8, "B, the batch rows"),
    Flag("time", 4096, "T, the time steps", small=300),
    Flag("channels", 2048, "D, the channels"),
    Flag("width", 4, "W, the taps"),
    Flag("dilation", 1, "steps between taps"),
    Flag("activation", "silu", "of the output", type=str, choices=("silu", "none")),
)


# ---- kernels and keys


def pass_of(walk: str, shape: Shape, dtype: str) -> tiles.Pass:
    name, narrow = cuda.NAMES[getattr(torch, dtype)], walk in tiles.MOST_TAPS
    if narrow and shape["width"] > tiles.MOST_TAPS[walk]:
        most = tiles.MOST_TAPS[walk]
        raise ValueError(
            f"--width: expected at most {most}, got {shape['width']}; wider ones have kernels of their own"
        )
    vec, silu = tiles.vector(name, shape["channels"], ()), shape["activation"] == "silu"
    if narrow:
        return tiles.Pass(f"causal_conv1d.{walk}", f"{name}+{name}", vec, shape["width"], silu)
    return tiles.Pass(f"causal_conv1d.{walk}", name, vec, 0, silu)


def cuda_key(walk: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    kernel = pass_of(walk, shape, dtype)
    return cuda.key_of(kernel, shape["batch"], shape["time"], shape["channels"], shape["width"])


def triton_key(kernel: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton

    sizes = (shape[name] for name in ("batch", "time", "channels", "width"))
    return triton.key_of(kernel, getattr(torch, dtype), *sizes)


def compile_pass(device: Any, key: choose.Key, constants: choose.Solution) -> Report:
    """Of the wide kernel's passes the gradient's, which takes the most registers."""
    kernel = tiles.Pass.of(key)
    compiled = tiles.compiled(kernel, constants, "DX")
    shared = tiles.shared_bytes(kernel, constants)
    return compile_cuda(kernel.source, compiled, device.architecture, shared, constants["threads"])


def compile_nothing(device: Any, key: choose.Key, constants: choose.Solution) -> None:
    """Tiles of the Triton kernels are among those that are compiled offline."""
    return None


def keys_of(name: str) -> Iterator[choose.Key]:
    """The kernel for all dtypes, at few and many rows, steps and channels."""
    for kernel in tiles.passes():
        if kernel.name == name:
            taps = kernel.taps or 64
            for rows, time, lanes in ((1, 16, 1), (1, 65536, 8), (8, 4096, 128)):
                yield cuda.key_of(kernel, rows, time, lanes * kernel.vec, taps)


# ---- examples


def draw(*sizes: int, dtype: str, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(len(sizes))
    return torch.randn(sizes, generator=generator).to(getattr(torch, dtype)).to(device)


def options_of(shape: Shape) -> dict[str, Any]:
    return {"dilation": shape["dilation"], "activation": None if shape["activation"] == "none" else "silu"}


def example(
    where: str,
    run: Callable[[], Sequence[Tensor]],
    expected: Callable[[], Sequence[Tensor]],
    dtype: str,
    summed: int = 1,
) -> Example:
    """`summed`: values of either sign that are added to one output, whose errors add up too."""

    def within() -> Sequence[Tensor]:
        with backend.backend(where), torch.no_grad():
            return run()

    return Example(within, expected, (TOLERANCES[dtype], TOLERANCES[dtype] * summed**0.5))


def inputs_of(shape: Shape, dtype: str, device: str) -> tuple[Tensor, ...]:
    """x, weight, bias and an initial state."""
    B, T, D, W = (shape[name] for name in ("batch", "time", "channels", "width"))
    steps = (W - 1) * shape["dilation"]
    weight = draw(D, W, dtype=dtype, device=device) / W**0.5
    x, state = draw(B, T, D, dtype=dtype, device=device), draw(B, steps, D, dtype=dtype, device=device)
    return x, weight, draw(D, dtype=dtype, device=device), state


def forward(where: str, shape: Shape, dtype: str, device: str) -> Example:
    inputs, options = inputs_of(shape, dtype, device), options_of(shape)
    expected = partial(reference.causal_conv1d, *(each.double() for each in inputs), **options)
    return example(where, partial(ops.causal_conv1d, *inputs, **options), expected, dtype)


def backward(where: str, shape: Shape, dtype: str, device: str) -> Example:
    """dx, dweight, dbias and the gradient of the initial state."""
    inputs, options = inputs_of(shape, dtype, device), options_of(shape)
    dy = draw(*inputs[0].shape, dtype=dtype, device=device)
    run = partial(ops.causal_conv1d_backward, dy, None, *inputs, **options)

    def expected() -> Sequence[Tensor]:
        leaves = [each.double().requires_grad_() for each in inputs]
        return torch.autograd.grad(reference.causal_conv1d(*leaves, **options)[0], leaves, dy.double())

    return example(where, run, expected, dtype, dy.shape[0] * dy.shape[1])


# ---- targets

# The walks of wide filters: where `seqops tune` times them.
DIRECTIONS = {"forward": "forward", "backward": "backward", "wide": "forward", "taps": "backward"}
EXAMPLES = {"forward": forward, "backward": backward}
WIDE_FLAGS = tuple(Flag(**{**vars(flag), "default": 64}) if flag.name == "width" else flag for flag in FLAGS)


def cuda_target(name: str) -> Target:
    walk = name.partition(".")[2]
    return Target(
        op="causal_conv1d",
        direction=DIRECTIONS[walk],
        tunable=cuda.TUNABLES[name],
        flags=FLAGS if walk in tiles.MOST_TAPS else WIDE_FLAGS,
        dtypes=DTYPES,
        key=partial(cuda_key, walk),
        compile=compile_pass,
        example=partial(EXAMPLES[DIRECTIONS[walk]], "cuda"),
        distinct=("threads", "lanes", "run"),
        keys=partial(keys_of, name),
    )


def triton_targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton

    def target(name: str) -> Target:
        direction = name.partition(".")[2]
        return Target(
            op="causal_conv1d",
            direction=direction,
            tunable=triton.TUNABLES[name],
            flags=FLAGS,
            dtypes=DTYPES,
            key=partial(triton_key, name),
            compile=compile_nothing,
            example=partial(EXAMPLES[direction], "triton"),
        )

    return [target(name) for name in triton.TUNABLES if name.startswith("causal_conv1d.")]


TARGETS = [*(cuda_target(name) for name in cuda.TUNABLES), *triton_targets(), *tune_fft_conv.TARGETS]
