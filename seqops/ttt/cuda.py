"""Launchers of the CUDA kernels of the memory: on CUDA tensors, or simulated on the CPU.

They serve a memory of two layers at D = 64, whose weights, or in the backward their adjoints, stay in registers
(csrc/ttt/memory.cu, memory_backward.cu). Every other call goes to the Triton kernels, unless this backend is forced:
then it is refused, with the reason. Nothing synchronises.

Letters: B batch, T time, H heads, D channels, F hidden channels.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose, launch
from . import cuda_tiles
from .composed_neural_memory import segment_of

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}

FORWARD = launch.Kernel(cuda_tiles.SOURCES["forward"], "neural_memory_forward", "P" * 16 + "q" * 15 + "?")
BACKWARD = launch.Kernel(cuda_tiles.SOURCES["backward"], "neural_memory_backward", "P" * 15 + "q" * 17 + "?")
TUNABLES = {
    direction: choose.Tunable(f"neural_memory.{direction}.cuda", cuda_tiles.problem, (source, cuda_tiles.__file__))
    for direction, source in cuda_tiles.SOURCES.items()
}


@lru_cache(maxsize=4096)
def key_of(kernel: cuda_tiles.Pass, items: int) -> choose.Key:
    """F and the rows of a chunk are compiled in; memories matter as the blocks that they fill the device with."""
    sizes = (
        choose.Size("F", kernel.hidden),
        choose.Size("R", kernel.rows),
        choose.bucket("N", items, cuda_tiles.ITEMS, 2 * cuda_tiles.ITEMS[-1]),
    )
    return choose.Key(
        f"neural_memory.{kernel.direction}.cuda", kernel.dtype, sizes, ("momentum",) if kernel.momentum else ()
    )


def _choose(kernel: cuda_tiles.Pass, like: Tensor, items: int) -> choose.Solution:
    tunable = TUNABLES[kernel.direction]
    if like.is_cuda:
        return choose.solution(tunable, key_of(kernel, items), like.device)
    forced = choose.forced_solution(tunable.name)
    return cuda_tiles.simulated(kernel) if forced is None else forced


@lru_cache(maxsize=4096)
def _fits(kernel: cuda_tiles.Pass, on: torch.device) -> bool:
    return cuda_tiles.fits(choose.facts(on), kernel)


choose.on_forget(_fits.cache_clear)  # facts of a device may have been measured since


def reason_unfit(
    direction: str, q: Tensor, w1: Tensor, w2: Tensor | None, momentum: Tensor | None, chunk_size: int
) -> str | None:
    """Why the kernels do not serve a call, or None where they do."""
    if q.dtype not in NAMES:
        return f"it serves bfloat16 and float16, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[3] != cuda_tiles.CHANNELS:
        return f"it serves D = {cuda_tiles.CHANNELS}, not {q.shape[3]}"
    if w2 is None:
        return "it serves a memory of two layers, not a linear one"
    hidden, longest = cuda_tiles.served(direction)
    of = "gradients of " if direction == "backward" else ""
    if w1.shape[2] not in hidden:
        return f"it serves {of}F = {', '.join(map(str, hidden))}, not {w1.shape[2]}"
    chunk = min(chunk_size, q.shape[1])  # never longer than the sequence
    rows = cuda_tiles.rows_of(chunk)
    if rows is None or rows > longest:
        return f"it serves {of}chunks of up to {longest} tokens, not {chunk}"
    kernel = cuda_tiles.Pass(direction, NAMES[q.dtype], w1.shape[2], rows, momentum is not None)
    if q.is_cuda and not _fits(kernel, q.device):
        return f"no block or cluster of {choose.facts(q.device).name} holds F = {w1.shape[2]} and chunks of {rows}"
    return None


# ---- tensors as the kernels see them


def _rows(t: Tensor) -> Tensor:
    """[B, T, H, D] whose rows are dense and at multiples of 16 bytes."""
    strides = [t.stride(dim) for dim in range(3) if t.shape[dim] > 1]
    aligned = t.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in strides)
    return t if aligned and t.stride(3) == 1 else t.clone(memory_format=torch.contiguous_format)


def _real(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.float32).contiguous()


def _kept(state: Tensor | None, like: Tensor) -> Tensor:
    """A state that no token has changed: new memory."""
    if state is None:
        return torch.zeros(like.shape, dtype=torch.float32, device=like.device)
    return state.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


# ---- the operators


def _forward(
    training: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
) -> tuple[Tensor, ...]:
    """o, the weights and the momentum; for training the states before every segment of chunks."""
    name = "memory_forward" if training else "memory"
    reason = reason_unfit("forward", q, w1, w2, momentum, chunk_size)
    if reason is not None:
        return elsewhere(name, reason)(
            q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss=loss, window=window
        )
    B, T, H, D = q.shape
    F, segment = w1.shape[2], segment_of(chunk_size)
    segments = -(-T // (chunk_size * segment))
    parts = 2 if momentum is None else 4
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    states = q.new_empty((B, H, segments, parts * F * D), dtype=torch.float32)
    if o.numel() == 0:
        results = (o, _kept(w1, w1), _kept(w2, w2), _kept(s1, w1), _kept(s2, w2))
        return (*results, states) if training else results
    final = [q.new_empty(t.shape, dtype=torch.float32) for t in (w1, w2, w1, w2)]
    run_forward(
        *(_rows(t) for t in (q, k, v)),
        *(_real(t) for t in (lr, decay, momentum)),
        *(w1, w2, s1, s2, o, final, states if training else None),
        *(T, min(chunk_size, T), segment, loss, window, momentum is not None),
    )
    return (o, *final, states) if training else (o, *final)


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    s1: Tensor | None,
    s2: Tensor | None,
    o: Tensor | None,
    final: list[Tensor] | None,
    states: Tensor | None,
    time: int,
    chunk: int,
    segment: int,
    loss: str,
    window: int,
    momenta: bool = True,
) -> None:
    """Writes o and the final states, or none of them, and every `segment` chunks `states`.

    q, k, v, in rows that the kernels take, the gates in float32 and o may be part of tensors of `time` tokens.
    """
    B, T, H, _ = q.shape
    kernel = cuda_tiles.Pass("forward", NAMES[q.dtype], w1.shape[2], cuda_tiles.rows_of(chunk) or 0, momenta)
    planned = cuda_tiles.launch(kernel, _choose(kernel, q, B * H))
    weights = (_real(t) for t in (w1, w2, s1, s2))
    tensors = (q, k, v, lr, decay, momentum, *weights, o, *(final or [None] * 4), states)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    FORWARD(
        planned.constants,
        B * H * planned.blocks,
        planned.threads,
        (*tensors, time, T, H, chunk, min(window, chunk), segment, *strides, loss == "l2"),
        like=q,
        shared=planned.shared,
        cluster=planned.blocks,
    )


def elsewhere(name: str, reason: str) -> Any:
    """The operator in Triton; an error with the reason where this backend is forced."""
    if backend.current() == "cuda":
        raise RuntimeError(backend.refusal(name, "cuda", "cuda" if torch.cuda.is_available() else "cpu", reason))
    return partial(backend.serve_by, "triton", name)


memory = partial(_forward, False)
memory_forward = partial(_forward, True)


def memory_backward(
    grad_o: Tensor | None,
    grad_w1: Tensor | None,
    grad_w2: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    states: Tensor,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
) -> tuple[Tensor, ...]:
    """The gradients of the ten tensors, in their dtypes; empty of those that are None.

    Segment by segment from the last: a forward gives the states before its chunks, then their gradients.
    """
    reason = reason_unfit("backward", q, w1, w2, momentum, chunk_size)
    if reason is not None:
        return elsewhere("memory_backward", reason)(
            *(grad_o, grad_w1, grad_w2, grad_s1, grad_s2, q, k, v, lr, decay, momentum, w1, w2, s1, s2),
            *(states, chunk_size),
            loss=loss,
            window=window,
        )
    B, T, H, D = q.shape
    F = w1.shape[2]
    shapes = [w1.shape, w2.shape, w1.shape, w2.shape]

    def flat(parts: list[Tensor | None]) -> Tensor:
        """[B, H, W1 | W2 | S1 | S2], zeros where there is none."""
        rows = [
            q.new_zeros((B, H, F * D), dtype=torch.float32) if t is None else t.to(torch.float32).flatten(2)
            for t in parts
        ]
        return torch.cat(rows, 2)

    adjoints = flat([grad_w1, grad_w2, grad_s1, grad_s2])
    grad = q.new_zeros(q.shape) if grad_o is None else _rows(grad_o)
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    gates = [_real(t) for t in (lr, decay, momentum)]
    dgates = [None if t is None else torch.empty_like(t) for t in gates]
    if q.numel():
        chunk = min(chunk_size, T)
        backward = cuda_tiles.Pass("backward", NAMES[q.dtype], F, cuda_tiles.rows_of(chunk) or 0, True)
        planned = cuda_tiles.launch(backward, _choose(backward, q, B * H))
        q, k, v = (_rows(t) for t in (q, k, v))
        span = segment_of(chunk_size)
        before = q.new_empty((B, H, min(span, -(-T // chunk)), 4 * F * D), dtype=torch.float32)
        for i in range(states.shape[2] - 1, -1, -1):
            at = slice(i * span * chunk, min((i + 1) * span * chunk, T))
            tokens = [None if t is None else t[:, at] for t in (q, k, v, *gates)]
            parts = [
                part.unflatten(2, shape[2:])
                for part, shape in zip(states[:, :, i].split(F * D, 2), shapes, strict=False)
            ]
            start = (*parts, None, None)[:4]
            run_forward(*tokens, *start, None, None, before, T, chunk, 1, loss, window)
            found = [None if t is None else t[:, at] for t in (dq, dk, dv, *dgates)]
            strides = [stride for t in (q, k, v, grad) for stride in t.stride()[:3]]
            BACKWARD(
                planned.constants,
                B * H,
                planned.threads,
                (
                    *(*tokens[:3], grad[:, at], *tokens[3:], before, adjoints, *found),
                    *(T, H, chunk, min(window, chunk), at.stop - at.start, *strides, loss == "l2"),
                ),
                like=q,
                shared=planned.shared,
            )
    dweights = [part.unflatten(2, shape[2:]) for part, shape in zip(adjoints.split(F * D, 2), shapes, strict=True)]
    gradients = (dq, dk, dv, *dgates, *dweights)
    nothing = q.new_empty(0, dtype=torch.float32)
    return tuple(
        nothing.clone() if t is None else gradient.to(t.dtype).contiguous()
        for t, gradient in zip((q, k, v, lr, decay, momentum, w1, w2, s1, s2), gradients, strict=True)
    )
