"""What can be tuned of the memory's CUDA kernel: how hidden channels are shared out.

Letters: B batch, T time, H heads, F hidden channels, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose
from ..tune.target import Example, Flag, Report, Shape, Target, compile_cuda
from . import cuda, cuda_tiles, reference
from .op_neural_memory import ops

# Relative and absolute, of values of about 1 after many products of operands of 16 bits.
TOLERANCES = {"float16": 0.02, "bfloat16": 0.15}
FLAGS = (
    Flag("batch", 8, "B, the batch rows"),
    Flag("time", 4096, "T, the tokens"),
    Flag("heads", 16, "H, the heads", small=2),
    Flag("hidden", 64, "F, the hidden channels"),
    Flag("chunk", 16, "C, the tokens of a chunk"),
    Flag("momentum", "given", "of the weights", type=str, choices=("given", "none")),
)


def pass_of(direction: str, shape: Shape, dtype: str) -> cuda_tiles.Pass:
    hidden, longest = cuda_tiles.served(direction)
    rows = cuda_tiles.rows_of(shape["chunk"])
    if rows is None or rows > longest:
        raise ValueError(f"--chunk: expected at most {longest}, got {shape['chunk']}")
    if shape["hidden"] not in hidden:
        raise ValueError(f"--hidden: expected one of {', '.join(map(str, hidden))}, got {shape['hidden']}")
    return cuda_tiles.Pass(direction, dtype, shape["hidden"], rows, shape["momentum"] == "given")


def key_of(direction: str, shape: Shape, dtype: str, device: Any) -> choose.Key:
    return cuda.key_of(pass_of(direction, shape, dtype), shape["batch"] * shape["heads"])


def compile_pass(device: Any, key: choose.Key, constants: choose.Solution) -> Report:
    kernel = cuda_tiles.Pass.of(key)
    planned = cuda_tiles.launch(kernel, constants)
    source = cuda_tiles.SOURCES[kernel.direction]
    return compile_cuda(source, planned.constants, device.architecture, planned.shared, planned.threads)


def keys_of(direction: str) -> Iterator[choose.Key]:
    """Sizes that a block of every preset holds."""
    for hidden, momentum in ((64, True), (64, False), (128, True)):
        if direction == "forward" or hidden == 64:
            yield cuda.key_of(cuda_tiles.Pass(direction, "bfloat16", hidden, 16, momentum), 128)


def inputs_of(shape: Shape, dtype: str, device: str) -> list[Tensor | None]:
    """q, k, v, lr, decay, momentum, w1, w2."""
    generator = torch.Generator().manual_seed(0)
    B, T, H, F, C = (shape[name] for name in ("batch", "time", "heads", "hidden", "chunk"))
    D = cuda_tiles.CHANNELS

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.randn(sizes, generator=generator) * scale

    def gate(most: float) -> Tensor:
        return (torch.rand(B, T, H, generator=generator) * most).to(device)

    keys = draw(B, T, H, D)
    sequences = (draw(B, T, H, D), keys / keys.norm(dim=-1, keepdim=True), draw(B, T, H, D))
    weights = (draw(B, H, F, D, scale=D**-0.5), draw(B, H, D, F, scale=F**-0.5))
    return [
        *(t.to(getattr(torch, dtype)).to(device) for t in sequences),
        *(gate(0.6 / C**0.5), gate(0.5), gate(0.9) if shape["momentum"] == "given" else None),
        *(t.to(device) for t in weights),
    ]


def outputs_of(tensors: Sequence[Tensor | None], chunk: int) -> tuple[Tensor, ...]:
    """o, the weights and the momentum of the reference."""
    q, k, v, lr, decay, momentum, *weights = tensors
    o, w, s = reference.neural_memory(q, k, v, lr, weights, chunk, decay=decay, momentum=momentum)
    return (o, *w, *s)


def example(direction: str, shape: Shape, dtype: str, device: str) -> Example:
    """The results of a forward, or the gradients of its tensors for a gradient of o."""
    tensors, chunk = inputs_of(shape, dtype, device), shape["chunk"]
    grad = tensors[0].flip(1)
    with backend.backend("cuda"), torch.no_grad():
        states = None if direction == "forward" else ops.memory_forward(*tensors, None, None, chunk)[-1]

    def run() -> Sequence[Tensor]:
        with backend.backend("cuda"), torch.no_grad():
            if states is None:
                return ops.memory(*tensors, None, None, chunk)
            missing = (None,) * 4
            found = ops.memory_backward(grad, *missing, *tensors, None, None, states, chunk)
        return [gradient for gradient, t in zip(found, tensors, strict=False) if t is not None]

    def expected() -> Sequence[Tensor]:
        given = [None if t is None else t.double().requires_grad_(direction == "backward") for t in tensors]
        outputs = outputs_of(given, chunk)
        if direction == "forward":
            return outputs
        return torch.autograd.grad(outputs[0], [t for t in given if t is not None], grad.double())

    return Example(run, expected, (TOLERANCES[dtype],) * 2)


TARGETS = [
    Target(
        op="neural_memory",
        direction=direction,
        tunable=tunable,
        flags=FLAGS,
        dtypes=tuple(TOLERANCES),
        key=partial(key_of, direction),
        compile=compile_pass,
        example=partial(example, direction),
        distinct=("cluster", "units", "buffers"),
        keys=partial(keys_of, direction),
    )
    for direction, tunable in cuda.TUNABLES.items()
]
