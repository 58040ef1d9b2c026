"""The recurrent operators step by step, for CUDA tensors whose heads fit no kernel of whole sequences.

A step is one batched product over the heads, by torch, and one kernel for everything else (csrc/rnn/step.h), in turns
on the current stream: any D, any dtype. Buffers and weights are laid out once a call; the loop allocates nothing, and
nothing synchronises, so that a CUDA graph that the caller captures holds it all. Sums and states are float32 (float64
for float64); the product's inputs have the digits of the storage dtype.

Letters: B batch, T time, H heads, D units of a head, G gates.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import launch, validate
from ..core.layout import time_first
from .cells import GATES

STORAGE = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16", torch.float16: "float16"}
THREADS = 128  # of a block

FORWARD = {op: launch.Kernel(f"rnn/{op}.cu", f"{op}_forward_step", "P" * 16 + "q" * 10 + "??q") for op in GATES}
BACKWARD = {op: launch.Kernel(f"rnn/{op}.cu", f"{op}_backward_step", "P" * 22 + "q" * 10 + "??q") for op in GATES}


def constants(op: str, storage: torch.dtype, product: torch.dtype, vec: int, backward: bool) -> dict[str, int | str]:
    """Of one kernel.

    Args:
        product: dtype of the product's inputs.
        vec: units a thread.
    """
    return {
        "STEP": 1,
        "STORAGE": STORAGE[storage],
        "INPUT": STORAGE[product],
        "THREADS": THREADS,
        "VEC": vec,
        "BACKWARD": int(backward),
    }


def product_dtype(like: Tensor) -> torch.dtype:
    """What the product's inputs are stored in. float32 where torch has no product of 16-bit numbers with float32 sums:
    on CPU tensors, and on GPUs whose tensor cores do not know bfloat16."""
    if like.element_size() > 2 or (like.is_cuda and torch.cuda.get_device_capability(like.device) >= (8, 0)):
        return like.dtype
    return torch.float32


def by_head(r: Tensor, dtype: torch.dtype) -> Tensor:
    """r [G, H, D, D] as [H, G D, D], itself where it lies so."""
    gates, heads, units, _ = r.shape
    return r.transpose(0, 1).to(dtype).contiguous().view(heads, gates * units, units)


def product(x: Tensor, weights: Tensor, sums: Tensor) -> Callable[[], Tensor]:
    """sums = x weights, for each head; sums are float32 also of 16-bit numbers."""
    if x.dtype == sums.dtype:
        return partial(torch.bmm, x, weights, out=sums)
    return partial(torch.bmm, x, weights, out_dtype=sums.dtype, out=sums)


def pairs(like: Tensor) -> tuple[int, int]:
    """What b and t count in the number of a pair (b, t) of sequences laid out like this one."""
    return (1, like.shape[0]) if time_first(like) else (like.shape[1], 1)


def units_a_thread(units: int, *tensors: Tensor | None) -> int:
    """Two neighbouring ones, where they can be read together.

    Args:
        tensors: all that a caller may have made, with units next to each other.
    """
    for t in tensors:
        if t is not None:
            strides = [t.stride(dim) for dim in range(t.ndim - 1) if t.shape[dim] > 1]
            if any(stride % 2 for stride in strides) or t.data_ptr() % (2 * t.element_size()):
                return 1
    return 1 if units % 2 else 2


def blocks(batch: int, heads: int, units: int, vec: int) -> int:
    """As in csrc/rnn/step.h: whole blocks for each row."""
    return batch * -(-heads * units // (vec * THREADS))


def on_device_of(like: Tensor) -> AbstractContextManager[Any]:
    return torch.cuda.device(like.device) if like.is_cuda else nullcontext()


def four(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*tensors, None, None, None)[:4]


def forward(
    op: str,
    x: Tensor,
    r: Tensor,
    bias: Tensor | None,
    initial: Sequence[Tensor | None],
    lengths: Tensor | None,
    h: Tensor,
    final: Sequence[Tensor],
    kept: Sequence[Tensor],
    reverse: bool,
    relu: bool,
) -> None:
    """Fills h, the final states and what the backward reads.

    Args:
        x: wx [B, T, G, H, D] with units next to each other.
        bias, initial, lengths: dense, in the dtype of sums and int64.
        h, kept: in the memory order of x; past a row's end nothing is written. `kept` is empty where no gradient is
            wanted.
    """
    batch, time, gates, heads, units = x.shape
    real, narrow = validate.real_of(x.dtype), product_dtype(x)
    weights = by_head(r, narrow)
    before = h.new_empty(heads, batch, units, dtype=narrow)
    y = h.new_empty(heads, batch, gates * units, dtype=real)
    vec = units_a_thread(units, x, bias, *initial)
    pointers = (x, bias, y, *four(initial), lengths, h, *four(final), *(*kept, None, None)[:2], before)
    numbers = (batch, time, heads, units, *x.stride()[:4], *pairs(h), reverse, relu)
    with on_device_of(x):
        step = FORWARD[op].prepare(
            constants(op, x.dtype, narrow, vec, False),
            blocks(batch, heads, units, vec),
            THREADS,
            (*pointers, *numbers),
            like=x,
        )
        multiply = product(before, weights.transpose(1, 2), y)
        step(-1)
        for i in range(time):
            multiply()
            step(i)


def backward(
    op: str,
    dh: Tensor | None,
    dfinal: Sequence[Tensor | None],
    r: Tensor,
    cache: Tensor | None,
    kept: Tensor | None,
    h: Tensor | None,
    final: Sequence[Tensor | None],
    initial: Sequence[Tensor | None],
    lengths: Tensor | None,
    dwx: Tensor,
    dy: Tensor | None,
    dinitial: Sequence[Tensor],
    reverse: bool,
    grad_clip: float | None,
    relu: bool,
) -> None:
    """Fills dwx, the GRU's dy of its candidate, and the gradients of the initial states.

    Args:
        dh: [B, T, H, D] with units next to each other.
        cache, kept, h: what the backward reads, in the memory order of dwx.
        dfinal: of all states; final, initial: h, c and n. All dense, in the dtype of sums.
        dwx, dy: past a row's end nothing is written.
    """
    batch, time, gates, heads, units = dwx.shape
    real, narrow = validate.real_of(dwx.dtype), product_dtype(dwx)
    weights = by_head(r, narrow)
    given = dwx.new_zeros(heads, batch, gates * units, dtype=narrow)  # rows that have not begun are multiplied too
    sums = dwx.new_empty(heads, batch, units, dtype=real)
    vec = units_a_thread(units, dh, cache, kept, h, *dfinal, *final, *initial)
    pointers = (dh, *four(dfinal), sums, cache, kept, h, *final[1:], *initial, lengths, dwx, dy, *four(dinitial), given)
    clip = struct.unpack("<q", struct.pack("<d", -1.0 if grad_clip is None else grad_clip))[0]
    strides = (0, 0, 0) if dh is None else dh.stride()[:3]
    numbers = (batch, time, heads, units, *strides, *pairs(dwx), clip, reverse, relu)
    with on_device_of(dwx):
        step = BACKWARD[op].prepare(
            constants(op, dwx.dtype, narrow, vec, True),
            blocks(batch, heads, units, vec),
            THREADS,
            (*pointers, *numbers),
            like=dwx,
        )
        multiply = product(given, weights, sums)
        for i in reversed(range(time)):
            step(i)
            multiply()
        step(-1)
