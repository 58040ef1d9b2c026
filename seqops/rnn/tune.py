"""What can be tuned of the recurrent operators: how the CPU kernels share their work, and the CUDA kernels' tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Report, Shape, Target, compile_cuda
from . import cpu, cuda, cuda_tiles, reference, tiles
from .op import GATES, STATES, ops

FLAGS = (
    Flag("heads", 1, "H, the number of heads"),
    Flag("dim", 64, "D, the units of a head; on a GPU as many as one block holds"),
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
    shared = kernel.shared_bytes(constants["tiles"], constants["k_regs"], constants["ring"])
    compiled = cuda_tiles.compiled(kernel, constants)
    return compile_cuda(kernel.source, compiled, device.architecture, shared, constants["threads"])


# Heads that every preset holds.
DIMS = {"bfloat16": (128, 64), "float16": (128,), "float32": (64, 48)}


def keys_of(op: str, direction: str) -> Iterator[choose.Key]:
    """For all dtypes, few and many blocks."""
    for dtype, dims in DIMS.items():
        for dim in dims:
            for heads, batch, time in ((1, 1, 16), (12, 16, 1024), (64, 64, 256)):
                shape = {"heads": heads, "dim": dim, "batch": batch, "time": time}
                yield cuda_key(op, direction, shape, dtype, None)
    if op != "elman" and direction == "forward":
        yield cuda.key_of(cuda_tiles.Pass(op, direction, "bfloat16", 64, 2, False), 1, 16, 1024)


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
        # In float64, which is there to check others, fewer units fit than the flags begin with.
        dtypes=("bfloat16", "float16", "float32"),
        key=partial(cuda_key, op, direction),
        compile=compile_pass,
        example=partial(EXAMPLES[direction], op, "cuda"),
        distinct=("tiles", "k_regs", "split"),
        keys=partial(keys_of, op, direction),
    )
    for (op, direction), tunable in cuda.TUNABLES.items()
]
TARGETS = [*CPU_TARGETS, *CUDA_TARGETS]
