"""Launchers of the Triton kernels on rows and slots; letters as in triton_kernels_gathered_attention.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels_gathered_attention as kernels

INTERPRETED = triton.knobs.runtime.interpret
BLOCKS = (16, 64, 128, 256)  # channels at a time
ELEMENTS = 2048  # of a tile of `gather_rows`
REDUCE = {"mean": kernels.MEAN, "sum": kernels.SUM, "last": kernels.LAST}
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
ROW = OPTIONS | {"num_warps": 1}  # of programs that own one row
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(
    kernel: Any, like: Tensor, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, Any]
) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **options)


def block_of(channels: int) -> int:
    return next((block for block in BLOCKS if channels <= block), BLOCKS[-1])


def dense_inside(x: Tensor) -> Tensor:
    return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()


def shared(x: Tensor, dim: int) -> int:
    """The stride of a dimension of lists: 0 where it is one for all."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def lists(order: Tensor, starts: Tensor) -> dict[str, Any]:
    order, starts = order.contiguous(), starts.contiguous()
    strides = {"stride_o_b": shared(order, 0), "stride_o_h": shared(order, 1)}
    strides |= {"stride_s_b": shared(starts, 0), "stride_s_h": shared(starts, 1)}
    return {"p_order": order, "p_starts": starts, **strides}


def counting_sort(index: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """order [B, H, n] and starts [B, H, bins + 1]: a stable sort of integers, which is one order whatever sorts."""
    batch, heads = index.shape[:2]
    bin_of = torch.where((index >= 0) & (index < bins), index, bins).to(torch.int32).contiguous()
    ordered, order = torch.sort(bin_of, stable=True)
    edges = torch.arange(bins + 1, dtype=torch.int32, device=index.device).expand(batch, heads, -1).contiguous()
    starts = torch.searchsorted(ordered, edges, out_int32=True)
    return order.to(torch.int32), starts


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """y [B, n, H, D]."""
    batch, steps, inner, channels = x.shape
    n, heads = index.shape[2], max(inner, index.shape[1])
    y = torch.empty(batch, n, heads, channels, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    x, index = dense_inside(x), index.contiguous()
    block = block_of(channels)
    rows = ELEMENTS // block
    arguments = {
        "p_x": x,
        "p_index": index,
        "p_y": y,
        "T": steps,
        "H": heads,
        "Hk": inner,
        "D": channels,
        "n": n,
        "stride_x_b": x.stride(0),
        "stride_x_t": x.stride(1),
        "stride_x_h": x.stride(2),
        "stride_i_b": shared(index, 0),
        "stride_i_h": shared(index, 1),
        "ROWS": rows,
        "BLOCK_D": block,
    }
    launch(kernels.gather_rows, x, (-(-n // rows) * heads * batch,), arguments, OPTIONS)
    return y


def sums(x: Tensor, order: Tensor, starts: Tensor, heads: int, reduce: str, lse: Tensor | None) -> tuple[Tensor, Any]:
    batch, slots, inner, channels = x.shape
    steps = starts.shape[2] - 1
    y = torch.empty(batch, steps, heads, channels, dtype=x.dtype, device=x.device)
    total = None if lse is None else torch.empty(batch, inner, steps, dtype=lse.dtype, device=x.device)
    if y.numel() == 0:
        return y, total
    x = dense_inside(x)
    arguments = lists(order, starts) | {
        "p_x": x,
        "p_y": y,
        "p_slot_lse": x if lse is None else lse.contiguous(),
        "p_lse": x if total is None else total,
        "T": steps,
        "S": slots,
        "H": inner,
        "Hk": heads,
        "D": channels,
        "stride_x_b": x.stride(0),
        "stride_x_s": x.stride(1),
        "stride_x_h": x.stride(2),
        "REDUCE": REDUCE[reduce].value,
        "LSE": lse is not None,
        "BLOCK_D": block_of(channels),
    }
    launch(kernels.sum_slots, x, (steps * heads * batch,), arguments, ROW)
    return y, total


def gather_rows_backward(dy: Tensor, order: Tensor, starts: Tensor, heads: int) -> Tensor:
    """dx [B, T, Hk, D]."""
    return sums(dy, order, starts, heads, "sum", None)[0]


def reduce_slots(o: Tensor, lse: Tensor, order: Tensor, starts: Tensor, reduce: str = "mean") -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] and lse [B, H, T]."""
    return sums(o, order, starts, o.shape[2], reduce, lse)


def reduce_slots_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    lse: Tensor,
    order: Tensor,
    starts: Tensor,
    channels: int,
    dtype: torch.dtype,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    """do [B, S, H, D] and dlse [B, H, S] of the slots."""
    batch, heads, slots = lse.shape
    dx = torch.empty(batch, slots, heads, channels, dtype=dtype, device=lse.device)
    dslot = torch.empty_like(lse, memory_format=torch.contiguous_format)
    if dx.numel() == 0:
        return dx, dslot
    steps = starts.shape[2] - 1
    dy = dx if do is None else dense_inside(do)
    arguments = lists(order, starts) | {
        "p_dy": dy,
        "p_dx": dx,
        "p_slot_lse": lse.contiguous(),
        "p_dlse": dslot if dlse is None else dlse.contiguous(),
        "p_dslot_lse": dslot,
        "T": steps,
        "S": slots,
        "H": heads,
        "D": channels,
        "stride_y_b": dy.stride(0),
        "stride_y_t": dy.stride(1),
        "stride_y_h": dy.stride(2),
        "REDUCE": REDUCE[reduce].value,
        "DY": do is not None,
        "DLSE": dlse is not None,
        "BLOCK_D": block_of(channels),
    }
    launch(kernels.spread_slots, dx, ((steps + 1) * heads * batch,), arguments, ROW)
    return dx, dslot


# ---- the list


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""

    def listed(kernel: Any, storage: str, constants: dict[str, Any], options: dict[str, Any], **types: str) -> Any:
        given = {name: f"*{storage}" for name in kernel.arg_names if name.startswith("p_")}
        real = "*fp64" if storage == "fp64" else "*fp32"
        fixed = {"p_order": "*i32", "p_starts": "*i32"} | {name: real for name in given if name.endswith("lse")}
        given |= {name: kind for name, kind in (fixed | types).items() if name in given}
        given |= {name: "i64" for name in kernel.arg_names if name.startswith("stride_")}
        given |= {name: "i32" for name in kernel.arg_names if name not in given and name not in constants}
        return {"kernel": kernel, "types": given, "constants": constants, "options": options}

    for storage, block in itertools.product(STORAGE.values(), BLOCKS):
        for index in ("*i32", "*i64"):
            constants = {"ROWS": ELEMENTS // block, "BLOCK_D": block}
            yield listed(kernels.gather_rows, storage, constants, OPTIONS, p_index=index)
        unused = {"p_slot_lse": f"*{storage}", "p_lse": f"*{storage}"}
        plain = {"REDUCE": kernels.SUM.value, "LSE": False, "BLOCK_D": block}
        yield listed(kernels.sum_slots, storage, plain, ROW, **unused)
        for reduce in REDUCE.values():
            yield listed(kernels.sum_slots, storage, plain | {"REDUCE": reduce.value, "LSE": True}, ROW)
            for given in ((True, False), (False, True), (True, True)):
                flags = dict(zip(("DY", "DLSE"), given, strict=True))
                yield listed(kernels.spread_slots, storage, {"REDUCE": reduce.value, **flags, "BLOCK_D": block}, ROW)
