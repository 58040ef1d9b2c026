"""What can be tuned of the recurrent operators: how the CPU kernels share their work, and the CUDA kernels' tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Report, Shape, Target, compile_cuda
from . import cpu, cuda, cuda_tiles, reference, tiles
from .cells import GATES, STATES
from .op import ops

FLAGS = (
    Flag("heads", 1, "H, the number of heads"),
    Flag("dim", 256, "D, the units of a head"),
    # Values are checked at the batch itself, for which blocks of rows are chosen, and at steps enough to pack r.
    Flag("batch", 16, "B, the batch rows", small=1 << 20),
    Flag("time", 256, "T, the time steps", small=16),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")
# Relative and absolute: in 16 bit 16 unit roundoffs, three times what the widest heads need; else more than that.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "float16": 0.008, "bfloat16": 0.06}


def key_of(op: str, direction: str, shape: Shape, dtype: str, host: Any) -> choose.Key:
    sizes = {"H": shape["heads"], "D": shape["dim"], "B": shape["batch"], "T": shape["time"]}
    unpacked = tiles.is_unpacked(direction, sizes["B"], sizes["T"])
    return cpu.key(op, direction, dtype, sizes, host.threads, unpacked)


def cuda_pass(op: str, direction: str, shape: Shape, dtype: str) -> cuda_tiles.Pass:
    """The kernel of a training step, for tensors that are aligned."""
    vec = 2 if cuda_tiles.SIZES[dtype] == 2 and shape["dim"] % 2 == 0 else 1
    train = direction == "forward" and op != "elman"
    return cuda_tiles.Pass(op, direction, dtype, shape["dim"], vec, train)


def cuda_key(op: str, direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    return cuda.key_of(cuda_pass(op, direction, shape, dtype), shape["heads"], shape["batch"], shape["time"])


def compile_pass(device: Any, key: choose.Key, constants: choose.Solution) -> Report:
    kernel = cuda_tiles.Pass.of(key)
    layout, compiled = cuda_tiles.Layout(kernel, constants), cuda_tiles.compiled(kernel, constants)
    return compile_cuda(kernel.source, compiled, device.architecture, layout.shared_bytes(), layout.threads)


# Shapes (D, heads, batch, time) whose choices are compiled in tests: a block, a cluster and the grid hold a head, and
# steps few enough to read the weights as they lie.
SHAPES = {
    "bfloat16": (
        *((64, 1, 1, 16), (64, 12, 16, 1024), (64, 64, 64, 256), (128, 6, 16, 1024), (256, 3, 16, 1024)),
        *((256, 12, 64, 256), (768, 1, 16, 1024), (768, 1, 64, 256), (1536, 1, 16, 256), (2688, 1, 16, 256)),
        *((1023, 1, 16, 256), (1024, 1, 1, 1), (64, 4, 8, 4)),
    ),
    "float16": ((128, 1, 1, 16), (768, 4, 8, 64), (100, 2, 1, 1)),
    "float32": ((64, 12, 16, 1024), (256, 1, 16, 256), (512, 1, 32, 256), (128, 64, 64, 256), (256, 1, 1, 1)),
    "float64": ((32, 1, 16, 64), (256, 1, 4, 64)),
}


def keys_of(op: str, direction: str) -> Iterator[choose.Key]:
    for dtype, shapes in SHAPES.items():
        for sizes in shapes:
            shape = dict(zip(("dim", "heads", "batch", "time"), sizes, strict=True))
            yield cuda_key(op, direction, shape, dtype, None)
    train = direction == "forward" and op != "elman"
    yield cuda.key_of(cuda_tiles.Pass(op, direction, "bfloat16", 128, 1, train), 4, 16, 64)  # at odd addresses
    if train:
        for dim in (64, 768):
            yield cuda.key_of(cuda_tiles.Pass(op, direction, "bfloat16", dim, 2, False), 1, 16, 1024)


def compile_nothing(host: Any, key: choose.Key, constants: choose.Solution) -> None:
    return None


def inputs_of(op: str, shape: Shape, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """wx [B, T, G, H, D], r [G, H, D, D] and the gradient of h [B, T, H, D]."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, D = (shape[name] for name in ("batch", "time", "heads", "dim"))

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(device)

    wx, r = draw(B, T, GATES[op], H, D), draw(GATES[op], H, D, D) / D**0.5
    return wx.to(dtype), r.to(dtype), draw(B, T, H, D).to(dtype)


def forward_example(op: str, where: str, shape: Shape, dtype: str, device: str) -> Example:
    """h and the final states."""
    wx, r, _ = inputs_of(op, shape, getattr(torch, dtype), device)
    # The CUDA kernel that is tuned is that of a training step, whose results come first.
    run = getattr(ops, op) if where == "cpu" or op == "elman" else getattr(ops, f"{op}_forward")

    def expected() -> tuple[Tensor, ...]:
        return getattr(reference, op)(wx.double(), r.double())

    def results() -> tuple[Tensor, ...]:
        return _without_gradient(where, run, wx, r)[: 1 + len(STATES[op])]

    return Example(results, expected, (TOLERANCES[dtype],) * 2)


def backward_example(op: str, where: str, shape: Shape, dtype: str, device: str) -> Example:
    """The gradients of wx and of the initial states, for a gradient of h."""
    wx, r, dh = inputs_of(op, shape, getattr(torch, dtype), device)
    missing = (None,) * len(STATES[op])
    with torch.no_grad(), _within(where):
        if op == "elman":
            h, _ = ops.elman(wx, r)
            run = partial(ops.elman_backward, dh, None, r, h)
        else:
            h, *states = getattr(ops, f"{op}_forward")(wx, r)
            final, saved = states[: len(missing)], states[len(missing) :]
            saved += {"lstm": [None], "gru": [h, None], "slstm": [*final[1:3], None, None]}[op]
            run = partial(getattr(ops, f"{op}_backward"), dh, *missing, r, *saved)

    def expected() -> tuple[Tensor, ...]:
        start = [wx.double(), *(state.to(device) for state in initial_states(op, shape))]
        given = dict(zip(STATES[op], start[1:], strict=True))
        for each in start:
            each.requires_grad_()
        h, *_ = getattr(reference, op)(start[0], r.double(), **given)
        return torch.autograd.grad(h, start, dh.double(), materialize_grads=True)

    def results() -> tuple[Tensor, ...]:
        found = _without_gradient(where, run)
        return (found[0], *found[2:]) if op == "gru" else found  # without dy

    return Example(results, expected, (TOLERANCES[dtype],) * 2)


def initial_states(op: str, shape: Shape) -> list[Tensor]:
    """What a missing state is, in float64."""
    B, H, D = shape["batch"], shape["heads"], shape["dim"]
    return [torch.full((B, H, D), -torch.inf if name == "m0" else 0.0, dtype=torch.float64) for name in STATES[op]]


def _within(where: str) -> Any:
    """The forced backend; the CPU's kernels need none."""
    return nullcontext() if where == "cpu" else backend.backend(where)


def _without_gradient(where: str, function: Callable[..., tuple[Tensor, ...]], *args: Any) -> tuple[Tensor, ...]:
    with torch.no_grad(), _within(where):
        return function(*args)


EXAMPLES = {"forward": forward_example, "backward": backward_example}

CPU_TARGETS = [
    Target(
        op=op,
        direction=direction,
        tunable=tunable,
        flags=FLAGS,
        dtypes=DTYPES,
        key=partial(key_of, op, direction),
        compile=compile_nothing,
        example=partial(EXAMPLES[direction], op, "cpu"),
    )
    for (op, direction), tunable in cpu.TUNABLES.items()
]
CUDA_TARGETS = [
    Target(
        op=op,
        direction=direction,
        tunable=tunable,
        flags=FLAGS,
        dtypes=("bfloat16", "float16", "float32", "float64"),
        key=partial(cuda_key, op, direction),
        compile=compile_pass,
        example=partial(EXAMPLES[direction], op, "cuda"),
        distinct=("exchange", "blocks", "k_warps", "tiles", "split"),
        keys=partial(keys_of, op, direction),
    )
    for (op, direction), tunable in cuda.TUNABLES.items()
]


def triton_key(op: str, direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    from . import triton, triton_tiles

    kernel = triton_tiles.Kernel(op, direction, dtype, triton_tiles.padded(shape["dim"]))
    return triton.key_of(kernel, shape["heads"], shape["batch"])


def triton_targets() -> list[Target]:
    if find_spec("triton") is None:
        return []
    from . import triton

    return [
        Target(
            op=op,
            direction=direction,
            tunable=tunable,
            flags=FLAGS,
            dtypes=("bfloat16", "float16", "float32"),
            key=partial(triton_key, op, direction),
            compile=compile_nothing,
            example=partial(EXAMPLES[direction], op, "triton"),
        )
        for (op, direction), tunable in triton.TUNABLES.items()
    ]


TARGETS = [*CPU_TARGETS, *CUDA_TARGETS, *triton_targets()]
