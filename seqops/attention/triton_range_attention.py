"""Attention over ranges in Triton: launches.

Letters as in triton_kernels_range_attention.py.
"""

from __future__ import annotations

import contextlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles
from . import triton_kernels_range_attention as kernels
from . import triton_kernels_range_attention_backward as backward_kernels
from . import triton_kernels_range_attention_bias as bias_kernels
from .triton_blocks import DISTANCE, LAPLACE, NONE, RELU2, SOFTMAX, SQUARE

INTERPRETED = triton.knobs.runtime.interpret
ACTIVATIONS = {"softmax": SOFTMAX.value, "laplace": LAPLACE.value, "relu2": RELU2.value}
# Elements between rows: those of a tile are counted in 32 bits.
MOST_STRIDE = 1 << 24
# Rows of a program of the kernel that only adds, and its channels at once.
DELTA_ROWS, DELTA_WIDTH = 32, 64
# Of the one that looks for pairs outside of a bias: queries at a time, and keys where there are any.
OUTSIDE_ROWS, OUTSIDE_KEYS = 128, 32
# Of partial sums of the gradient of a bias.
PARTIAL_BYTES, PARTIAL_PROGRAMS = 64 << 20, 1024


class Source(NamedTuple):
    """Keys and values [B, Tk, Hk, D] and the ranges of the queries over them, or of the keys over the queries."""

    k: Tensor
    v: Tensor
    ranges: Tensor


class Bias(NamedTuple):
    values: Tensor
    kind: int  # NONE, DISTANCE or SQUARE
    starts: Tensor  # int32 [Tq]: where the places of a query's range count from
    places: int = 0

    def arguments(self) -> dict[str, Any]:
        x = self.values
        return {
            "p_bias": x,
            "p_starts": self.starts,
            "most": max(x.shape[-1] - 1, 0),
            "stride_bias_h": x.stride(0) if x.shape[0] > 1 else 0,
            "stride_bias_i": x.stride(1) if x.ndim == 3 else 0,
            "BIAS": self.kind,
        }


class Call(NamedTuple):
    """What all launches of one call share."""

    q: Tensor
    bias: Bias
    scale: float
    activation: int

    @property
    def state(self) -> torch.dtype:
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    def arguments(self) -> dict[str, Any]:
        _, T, H, D = self.q.shape
        high = torch.tensor(self.scale, dtype=torch.float32).item()
        rest = self.scale - high if math.isfinite(self.scale) else 0.0
        return {
            "p_q": self.q, "Tq": T, "H": H, "scale": high, "scale_rest": rest, **strides("q", self.q),
            **self.bias.arguments(), "D": D, "ACTIVATION": self.activation, 
            "EXACT": self.q.dtype == torch.float64,
        }  # fmt: skip


# ---- tensors as kernels read them


def readable(x: Tensor) -> Tensor:
    """x [B, T, H, D] for wide accesses, D padded to a multiple of 16 with zeros; a copy where it is not so yet.

    Rows, heads and batch rows then begin at multiples of 16 elements, tiles are within 32 bits.
    """
    unit, D = tiles.ALIGNMENT, x.shape[3]
    aligned = x.data_ptr() % unit == 0 and all(x.stride(i) % unit == 0 for i in range(3) if x.shape[i] > 1)
    if D % unit:
        return torch.nn.functional.pad(x, (0, -D % unit))
    near = x.stride(3) == 1 and x.stride(1) < MOST_STRIDE
    return x if aligned and near else x.clone(memory_format=torch.contiguous_format)


def cut(x: Tensor, D: int) -> Tensor:
    """Without the channels that were added."""
    return x if x.ndim == 1 or x.shape[3] == D else x[..., :D].contiguous()


def plain(ranges: Tensor) -> Tensor:
    """[B or 1, H or 1, P, 2, T] whose parts are dense; nothing is copied of what `ranges.stack` made."""
    ranges = ranges if ranges.dtype == torch.int32 else ranges.to(torch.int32)
    inner = ranges.shape[2:]
    dense = all(
        size == 1 or stride == want
        for size, stride, want in zip(inner, ranges.stride()[2:], (2 * inner[2], inner[2], 1), strict=True)
    )
    return ranges if dense else ranges.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Of [B, T, H, D], in units of 16; 0 where one entry serves all."""
    return {f"stride_{name}_{c}": x.stride(i) // tiles.ALIGNMENT if x.shape[i] > 1 else 0 for i, c in enumerate("bth")}


def range_strides(name: str, ranges: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{c}": ranges.stride(i) if ranges.shape[i] > 1 else 0 for i, c in enumerate("bh")}


def bias_as_read(bias: Tensor | None, ranges: Tensor, q: Tensor) -> Bias:
    """In the dtype of sums: it is small beside what it is added to."""
    state = torch.float64 if q.dtype == torch.float64 else torch.float32
    if bias is None:
        return Bias(q.new_empty(1, 1, dtype=state), NONE.value, ranges.new_empty(1, dtype=torch.int32))
    starts, bias = ranges[0, 0, 0, 0].to(torch.int32).contiguous(), bias.to(state)
    bias = bias if bias.stride(-1) == 1 or bias.shape[-1] == 1 else bias.contiguous()
    if bias.ndim == 2:
        return Bias(bias, DISTANCE.value, starts, (bias.shape[1] + 1) // 2)
    return Bias(bias, SQUARE.value, starts, bias.shape[1])


def prepare(q: Tensor, first: Source, bias: Tensor | None, scale: float | None, activation: str) -> Call:
    """The scale is that of the channels before any are added."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    return Call(readable(q), bias_as_read(bias, first.ranges, q), scale, ACTIVATIONS[activation])


def source_of(k: Tensor | None, v: Tensor | None, ranges: Tensor | None) -> Source | None:
    return None if k is None else Source(readable(k), readable(v), plain(ranges))


def source_arguments(first: Source, second: Source | None) -> dict[str, Any]:
    """Without a second source its arguments are those of the first, which nothing reads."""
    other = first if second is None else second
    return {
        "p_k": first.k, "p_v": first.v, "p_ranges": first.ranges, "Tk": first.k.shape[1],
        "parts": first.ranges.shape[2], **strides("k", first.k), **strides("v", first.v),
        **range_strides("ranges", first.ranges),
        "p_k2": other.k, "p_v2": other.v, "p_ranges2": other.ranges, "T2": other.k.shape[1],
        "parts2": other.ranges.shape[2], **strides("k2", other.k), **strides("v2", other.v),
        **range_strides("ranges2", other.ranges), "SECOND": second is not None,
    }  # fmt: skip


# ---- launches


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], warps: int, stages: int) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    if programs:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**arguments, **options(warps, stages))


def options(warps: int, stages: int) -> dict[str, Any]:
    """Left to itself, ptxas saves registers by spilling a word or two."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True, "maxnreg": 255}


def launch_tiles(kernel: Any, call: Call, owners: int, copies: int, arguments: dict[str, Any], shape: Any) -> None:
    """A program for each tile of owners, slice of channels, and of `copies`: heads of all batch rows."""
    blocks = {"BM": shape.rows, "BN": shape.others, "BD": shape.width}
    programs = -(-owners // shape.rows) * -(-call.q.shape[3] // shape.width) * copies
    launch(kernel, call.q, programs, {**arguments, **blocks}, shape.warps, shape.stages)


def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    ranges2: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """o [B, Tq, H, D] in the dtype of q, and lse [B, H, Tq] in the dtype of sums."""
    first, second = source_of(k, v, ranges), source_of(k2, v2, ranges2)
    call, D = prepare(q, first, bias, scale, activation), q.shape[3]
    q = call.q
    B, T, H, _ = q.shape
    o, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(B, H, T, dtype=call.state)
    arguments = {
        **call.arguments(), **source_arguments(first, second), "group": H // first.k.shape[2],
        "p_o": o, "p_lse": lse,
    }  # fmt: skip
    launch_tiles(kernels.range_attention_forward, call, T, B * H, arguments, shape_for("forward", call, first, second))
    return cut(o, D), lse


def range_attention_backward(
    grad_o: Tensor | None,
    grad_lse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    seen: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    ranges2: Tensor | None = None,
    seen2: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
    bias_gradient: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dk2, dv2 (empty without a second source) and dbias (empty without one, or where it is not wanted)."""
    first, second, D = source_of(k, v, ranges), source_of(k2, v2, ranges2), q.shape[3]
    call = prepare(q, first, bias, scale, activation)
    q = call.q
    do = q.new_zeros(1, 1, 1, q.shape[3]).expand(q.shape) if grad_o is None else readable(grad_o)
    B, T, H, _ = q.shape
    lse = lse.contiguous()
    delta = deltas(call, o, do, grad_lse) if activation == "softmax" else torch.zeros_like(lse)
    common = {
        **call.arguments(), "group": H // first.k.shape[2], "p_do": do, **strides("do", do),
        "p_lse": lse, "p_delta": delta,
    }  # fmt: skip

    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments = {**common, **source_arguments(first, second), "p_dq": dq}
    launch_tiles(backward_kernels.range_attention_dq, call, T, B * H, arguments, shape_for("dq", call, first, second))
    dk, dv = keys_and_values(call, common, first._replace(ranges=plain(seen)))
    dk2 = dv2 = q.new_empty(0)
    if second is not None:
        without = {**common, **Bias(call.bias.values, NONE.value, call.bias.starts).arguments()}
        dk2, dv2 = keys_and_values(call, without, second._replace(ranges=plain(seen2)))
    dbias = q.new_empty(0, dtype=call.state)
    if bias is not None and bias_gradient:
        dbias = bias_sums(call, common, first, bias)
    return cut(dq, D), cut(dk, D), cut(dv, D), cut(dk2, D), cut(dv2, D), dbias


def deltas(call: Call, o: Tensor, do: Tensor, dlse: Tensor | None) -> Tensor:
    """[B, H, Tq]: <do, o> - dlse."""
    B, T, H, D = call.q.shape
    o, delta = readable(o), call.q.new_empty(B, H, T, dtype=call.state)
    names = {"stride_dlse_b": 0, "stride_dlse_h": 1, "stride_dlse_t": 2}
    arguments = {
        "p_o": o, "p_do": do, "p_dlse": delta if dlse is None else dlse, "p_delta": delta, "Tq": T, "H": H,
        **strides("o", o), **strides("do", do),
        **{name: 0 if dlse is None else dlse.stride(i) for name, i in names.items()},
        "D": D, "DLSE": dlse is not None, "BM": DELTA_ROWS, "BD": tiles.padded(D, DELTA_WIDTH),
    }  # fmt: skip
    launch(backward_kernels.range_attention_delta, call.q, -(-T // DELTA_ROWS) * B * H, arguments, 4, 1)
    return delta


def keys_and_values(call: Call, common: dict[str, Any], source: Source) -> tuple[Tensor, Tensor]:
    k = source.k
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    arguments = {
        **common, "p_k": k, "p_v": source.v, "p_ranges": source.ranges, "Tk": k.shape[1],
        "parts": source.ranges.shape[2], **strides("k", k), **strides("v", source.v),
        **range_strides("ranges", source.ranges), "p_dk": dk, "p_dv": dv,
    }  # fmt: skip
    shape = shape_for("dkv", call, source, None)
    launch_tiles(backward_kernels.range_attention_dkv, call, k.shape[1], k.shape[0] * k.shape[2], arguments, shape)
    return dk, dv


def bias_sums(call: Call, common: dict[str, Any], first: Source, bias: Tensor) -> Tensor:
    """The gradient of the bias: of pairs of places, by pieces of the queries, added in their order."""
    B, T, H, D = call.q.shape
    k, places, starts = first.k, call.bias.places, call.bias.starts
    if call.q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(bias, memory_format=torch.contiguous_format)
    every = tiles.bias_shapes(str(call.q.dtype).removeprefix("torch."), D)
    shape = next((each for each in every if each.rows >= places), every[-1])
    blocks = -(-places // shape.rows) * -(-places // shape.others)
    # Tables are for some batch rows and some of the queries each: as many as fill a GPU, or as the memory holds.
    most = max(PARTIAL_BYTES // (H * places * places * call.state.itemsize), 1)
    rows = -(-B // min(B, most))
    groups = -(-B // rows)
    pieces = max(min(PARTIAL_PROGRAMS // (blocks * H * groups), most // groups, T // places), 1)
    sums = call.q.new_empty(groups * pieces, H, places, places, dtype=call.state)
    arguments = {
        **common, "p_k": k, "p_v": first.v, "p_ranges": first.ranges, "Tk": k.shape[1], "parts": first.ranges.shape[2],
        **strides("k", k), **strides("v", first.v), **range_strides("ranges", first.ranges),
        "p_runs": torch.searchsorted(starts, starts, right=True, out_int32=True), "p_dbias": sums,
        "B": B, "places": places, "rows_b": rows, "pieces": pieces, "piece": -(-T // pieces),
        "BM": shape.rows, "BN": shape.others, "BD": shape.width,
    }  # fmt: skip
    programs = blocks * H * groups * pieces
    launch(bias_kernels.range_attention_dbias, call.q, programs, arguments, shape.warps, shape.stages)
    kernel = bias_kernels.range_attention_dbias_outside
    arguments = {name: value for name, value in arguments.items() if name in kernel.arg_names}
    launch(kernel, call.q, groups * pieces * H, arguments | {"BM": OUTSIDE_ROWS, "BN": OUTSIDE_KEYS}, 4, 1)
    square = sums.sum(0)
    if bias.shape[0] == 1:
        square = square.sum(0, keepdim=True)
    if bias.ndim == 2:
        square = by_distance(square)
    return square.to(bias.dtype)


def by_distance(square: Tensor) -> Tensor:
    """[h, C, C] -> [h, 2 C - 1]: sums of the diagonals, entry C - 1 + j - i."""
    h, C, _ = square.shape
    # Row i, backwards from the last, begins one place later than the row before it.
    turned = torch.nn.functional.pad(square.flip(1), (0, C)).flatten(1)[:, : C * (2 * C - 1)]
    return turned.view(h, C, 2 * C - 1).sum(1)


# ---- choices

PARTS = ("blocks", *(f"kernels_range_attention{part}" for part in ("", "_backward", "_bias")))
SOURCES = (
    tiles.__file__,
    __file__,
    *(str(Path(__file__).with_name(f"triton_{part}.py")) for part in PARTS),
)
TUNABLES = {
    direction: choose.Tunable(f"range_attention.{direction}.triton", tiles.problem, SOURCES)
    for direction in tiles.DIRECTIONS
}
# In the interpreter, which has no device to choose for: small tiles, so that short cases have several.
INTERPRETED_CHOICE = {"rows": 16, "others": 16, "warps": 4, "stages": 1}


@lru_cache(maxsize=4096)
def key_of(direction: str, dtype: str, B: int, T: int, H: int, D: int, parts: int, bias: bool) -> choose.Key:
    """Sizes are rounded up to a power of two, so that few choices exist. T: owners; H: their heads."""
    sizes = (("B", B), ("T", T), ("H", H), ("D", D), ("P", parts))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    return choose.Key(f"range_attention.{direction}.triton", dtype, buckets, ("bias",) if bias else ())


def shape_for(direction: str, call: Call, source: Source, second: Source | None) -> tiles.Shape:
    q, k = call.q, source.k
    B, T, H, D = k.shape if direction == "dkv" else q.shape
    dtype = str(q.dtype).removeprefix("torch.")
    parts = source.ranges.shape[2] + (0 if second is None else second.ranges.shape[2])
    tunable = TUNABLES[direction]
    if q.is_cuda:
        key = key_of(direction, dtype, B, T, H, D, parts, call.bias.kind != NONE.value)
        chosen = choose.solution(tunable, key, q.device)
    else:
        chosen = choose.forced_solution(tunable.name) or INTERPRETED_CHOICE
    width = tiles.width(direction, dtype, D)
    return tiles.Shape(chosen["rows"], chosen["others"], width, chosen["warps"], chosen["stages"])
