"""fft_conv on GPUs: torch's transforms of a few rows at a time, for the second cache, and Triton kernels around them.

Of a block of channels, rows [B, C, n] of real numbers are read, transformed, multiplied, transformed back and written:
what lies between the kernels is never as large as the whole sequence.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles_fft_conv as tiles
from . import triton_kernels_fft_conv as kernels

# In the interpreter, which has no device to choose for.
INTERPRETED_CHOICE = {"time": 32, "width": 8, "rows": 8}

INTERPRETED = triton.knobs.runtime.interpret
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}

SOURCES = (tiles.__file__, __file__, str(Path(__file__).with_name("triton_kernels_fft_conv.py")))
TUNABLES = {
    direction: choose.Tunable(f"fft_conv.{direction}.triton", tiles.problem, SOURCES)
    for direction in ("forward", "backward")
}


@lru_cache(maxsize=4096)
def key_of(direction: str, dtype: torch.dtype, rows: int, steps: int, n: int) -> choose.Key:
    """All sizes are rounded up to a power of two, so that few choices exist. `rows`: outputs of a step."""
    sizes = (("R", rows), ("T", steps), ("F", n))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    return choose.Key(f"fft_conv.{direction}.triton", str(dtype).removeprefix("torch."), buckets)


class Plan(NamedTuple):
    """How a call is cut up."""

    B: int
    T: int
    D: int
    N: int
    M: int  # taps that matter
    n: int  # numbers of a transform
    real: torch.dtype
    time: int  # steps and channels of a tile
    width: int
    channels: int  # of a block, and its batch rows
    batch: int

    def blocks(self) -> Iterator[slice]:
        return (slice(d, min(d + self.channels, self.D)) for d in range(0, self.D, self.channels))

    def batches(self) -> Iterator[slice]:
        return (slice(b, min(b + self.batch, self.B)) for b in range(0, self.B, self.batch))

    def outputs(self, block: slice) -> slice:
        return slice(block.start * self.N, block.stop * self.N)


def plan_of(direction: str, u: Tensor, k: Tensor, skip: Tensor | None) -> Plan:
    B, T, D = u.shape
    N = k.shape[1] if k.ndim == 3 else 1
    M = max(min(T, k.shape[-1]), int(skip is not None))
    n = tiles.fast_length(T + M - 1)
    tunable = TUNABLES[direction]
    chosen: choose.Solution | None
    if u.is_cuda:
        chosen = choose.solution(tunable, key_of(direction, u.dtype, B * D * N, T, n), u.device)
    else:
        chosen = choose.forced_solution(tunable.name) or INTERPRETED_CHOICE
    time, width = chosen["time"], chosen["width"]
    channels = min(D, max(chosen["rows"] // max(B * N, 1) // width, 1) * width)
    batch = min(B, max(chosen["rows"] // (channels * N), 1))
    real = torch.float64 if u.dtype == torch.float64 else torch.float32
    return Plan(B, T, D, N, M, n, real, time, width, channels, batch)


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any]) -> None:
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **OPTIONS)


def strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"stride_{name}_{dim}" for dim in "btc"), x.stride(), strict=True))


class Rows(NamedTuple):
    """A sequence as rows [B, C, n], and the times of the first and the last number of a row that is not finite."""

    values: Tensor
    first: Tensor
    last: Tensor


def read(plan: Plan, x: Tensor, skip: Tensor | None = None) -> Rows:
    """x [B, T, C], with skip [C // N] added to the first step."""
    batch, steps, channels = x.shape
    pieces = -(-plan.n // plan.time)
    values = x.new_empty(batch, channels, plan.n, dtype=plan.real)
    first, last = (x.new_empty(batch, channels, pieces, dtype=torch.int64) for _ in range(2))
    arguments = {
        "p_x": x,
        "p_skip": values if skip is None else skip,
        "p_rows": values,
        "p_first": first,
        "p_last": last,
        "steps": steps,
        "channels": channels,
        "n": plan.n,
        "kernels": plan.N,
        "never": plan.T,
        "skipped": 0 if skip is None else channels,
        **strides("x", x),
        "BLOCK_T": plan.time,
        "BLOCK_C": plan.width,
    }
    launch(kernels.fft_conv_read, x, batch * pieces * -(-channels // plan.width), arguments)
    return Rows(values, first.amin(-1), last.amax(-1))


def write(plan: Plan, rows: Tensor, y: Tensor, reach: Tensor | None = None) -> None:
    """The first steps of rows [B, C, n] to y [B, T, C]; NaN up to reach [C]."""
    batch, steps, channels = y.shape
    arguments = {
        "p_rows": rows,
        "p_reach": torch.empty(0, dtype=torch.int64, device=y.device) if reach is None else reach,
        "p_y": y,
        "steps": steps,
        "channels": channels,
        "n": plan.n,
        "reached": 0 if reach is None else channels,
        **strides("y", y),
        "BLOCK_T": plan.time,
        "BLOCK_C": plan.width,
    }
    launch(kernels.fft_conv_write, y, batch * -(-steps // plan.time) * -(-channels // plan.width), arguments)


def mark(plan: Plan, x: Tensor, bad: Tensor, tap: Tensor, y: Tensor, backward: bool) -> None:
    """NaN in y [B, T, C] for everything in x [B, T, C'] that is not finite and reaches it; bad [B, C'], tap [C]."""
    batch, steps, channels = y.shape
    arguments = {
        "p_x": x,
        "p_bad": bad,
        "p_tap": tap,
        "p_y": y,
        "steps": steps,
        "channels": channels,
        "sources": x.shape[2],
        "taps": plan.M,
        "outer": 1 if backward else plan.N,
        "inner": plan.N if backward else 1,
        "backward": int(backward),
        **strides("x", x),
        **strides("y", y),
        "BLOCK_C": plan.width,
    }
    launch(kernels.fft_conv_mark, y, batch * -(-channels // plan.width), arguments)


def read_taps(plan: Plan, k: Tensor, skip: Tensor | None, block: slice) -> Rows:
    """The taps of a block as rows [1, C, n]."""
    taps = k.reshape(plan.D * plan.N, k.shape[-1])[plan.outputs(block), : plan.M]
    return read(plan, taps.t()[None], None if skip is None else skip[block].to(plan.real).contiguous())


def fft_conv(u: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    plan = plan_of("forward", u, k, skip)
    y = u.new_empty(*u.shape, *k.shape[1:-1])
    if not y.numel() or not plan.M:
        return y.zero_()
    outputs = y.view(plan.B, plan.T, plan.D * plan.N)
    for block in plan.blocks():
        taps = read_taps(plan, k, skip, block)
        filters = torch.fft.rfft(taps.values).unflatten(1, (-1, plan.N))  # [1, D, N, n / 2 + 1]
        for batch in plan.batches():
            x, to = u[batch, :, block], outputs[batch, :, plan.outputs(block)]
            rows = read(plan, x)
            product = torch.fft.rfft(rows.values)[:, :, None] * filters
            write(plan, torch.fft.irfft(product.flatten(1, 2), plan.n), to)
            mark(plan, x, rows.last, taps.first[0], to, backward=False)
    return y


def fft_conv_backward(
    dy: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, for_u: bool, for_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    plan = plan_of("backward", u, k, skip)
    du, dk = u.new_empty(u.shape if for_u else 0), k.new_empty(k.shape if for_k else 0)
    dskip = u.new_empty(0 if skip is None or not for_k else plan.D, dtype=plan.real)
    if not dy.numel() or not plan.M:
        return du.zero_(), dk.zero_(), dskip.zero_()
    grads = dy.reshape(plan.B, plan.T, plan.D * plan.N)
    for block in plan.blocks():
        own, taps = plan.outputs(block), read_taps(plan, k, skip, block)
        filters = torch.fft.rfft(taps.values).unflatten(1, (-1, plan.N))
        total, reach = None, torch.full_like(taps.first[0], -1)
        for batch in plan.batches():
            grad = read(plan, grads[batch, :, own])
            d_spectra = torch.fft.rfft(grad.values).unflatten(1, (-1, plan.N))  # [B, D, N, n / 2 + 1]
            if for_k:
                rows = read(plan, u[batch, :, block])
                part = (d_spectra * torch.fft.rfft(rows.values).conj()[:, :, None]).sum(0)
                total = part if total is None else total + part
                # dy at t meets taps up to t, u at s those below T - s.
                late = (plan.T - 1 - rows.first).repeat_interleave(plan.N, 1)
                reach = torch.maximum(reach, torch.maximum(grad.last, late).amax(0))
            if for_u:
                to = du[batch, :, block]
                product = (d_spectra * filters.conj()).sum(2)
                write(plan, torch.fft.irfft(product, plan.n), to)
                tap = taps.first[0].view(-1, plan.N).amin(1)
                mark(plan, grads[batch, :, own], grad.last, tap, to, backward=True)
        if for_k:
            write_taps(plan, torch.fft.irfft(total.flatten(0, 1), plan.n), reach, dk, dskip, block)
    if for_k:
        dk[..., plan.M :].zero_()
    return du, dk, dskip


def write_taps(plan: Plan, rows: Tensor, reach: Tensor, dk: Tensor, dskip: Tensor, block: slice) -> None:
    """rows [C, n] of a block to dk, and what skip has of them: the first taps."""
    taps = dk.view(plan.D * plan.N, dk.shape[-1])[plan.outputs(block), : plan.M]
    if taps.shape[-1]:
        write(plan, rows[None], taps.t()[None], reach)
    if dskip.numel():
        first = torch.where(reach >= 0, math.nan, rows[:, 0])
        dskip[block] = first.view(-1, plan.N).sum(1)


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched, for the compiler: kernel, types, constants, options."""
    strided = {f"stride_{name}_{dim}": "i64" for name in "xy" for dim in "btc"}
    for dtype, name in TYPES.items():
        real = "*fp64" if dtype == torch.float64 else "*fp32"
        pointers = {"p_x": f"*{name}", "p_skip": real, "p_rows": real, "p_y": f"*{name}"}
        pointers |= dict.fromkeys(("p_first", "p_last", "p_reach", "p_bad", "p_tap"), "*i64")
        for kernel in (kernels.fft_conv_read, kernels.fft_conv_write, kernels.fft_conv_mark):
            types = {a: pointers.get(a) or strided.get(a, "i64") for a in kernel.arg_names if not a.isupper()}
            for time in tiles.TIMES if "BLOCK_T" in kernel.arg_names else (0,):
                for width in (each for each in tiles.WIDTHS if time * each <= tiles.MOST_OF_TILE):
                    constants = {"BLOCK_T": time, "BLOCK_C": width} if time else {"BLOCK_C": width}
                    yield {"kernel": kernel, "types": types, "constants": constants, "options": OPTIONS}
