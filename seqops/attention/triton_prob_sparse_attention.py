"""Launchers of the Triton kernels of prob_sparse_attention; letters as in triton_kernels_prob_sparse_attention.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels_prob_sparse_attention as kernels

INTERPRETED = triton.knobs.runtime.interpret
BLOCKS = (16, 32, 64, 128, 256)  # channels at a time
ELEMENTS = {4: 4096, 8: 2048}  # of a tile, by the bytes of a number
BLOCK_N = 16  # tiles whose sums are added at a time
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **OPTIONS)


def real_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def tile_of(channels: int, real: torch.dtype) -> tuple[int, int]:
    """Steps and channels of a tile."""
    block = next((block for block in BLOCKS if channels <= block), BLOCKS[-1])
    return (8 if INTERPRETED else ELEMENTS[real.itemsize] // block), block


def dense_inside(x: Tensor) -> Tensor:
    return x if x.shape[3] == 1 or x.stride(3) == 1 else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{letter}": x.stride(d) for d, letter in enumerate("bth")}


def prob_sparse_rows(q: Tensor, k: Tensor, sample_index: Tensor, top: int) -> Tensor:
    """index [B, H, N]."""
    batch, steps, heads, channels = q.shape
    measure = torch.empty(batch, heads, steps, dtype=real_of(q), device=q.device)
    if measure.numel() > 0:
        q, k = dense_inside(q), dense_inside(k)
        block_t, block_d = tile_of(channels, measure.dtype)
        arguments = {
            "p_q": q,
            "p_k": k,
            "p_samples": sample_index.to(torch.int64).contiguous(),
            "p_measure": measure,
            "T": steps,
            "H": heads,
            "Hk": k.shape[2],
            "D": channels,
            "U": sample_index.shape[1],
            **strides("q", q),
            **strides("k", k),
            "BLOCK_T": block_t,
            "BLOCK_D": block_d,
            "WHOLE": channels <= block_d,
        }
        launch(kernels.prob_sparse_measure, q, -(-steps // block_t) * heads * batch, arguments)
    # Stable: of equal ones the earlier. NaN is the largest.
    order = measure.sort(dim=-1, descending=True, stable=True).indices
    return order[..., : min(top, steps)].sort(-1).values


def slots(index: Tensor, steps: int) -> Tensor:
    """[B, H, T]: which of the selected rows each step is, or -1."""
    numbers = torch.arange(index.shape[2], dtype=torch.int32, device=index.device).expand(index.shape)
    slot = torch.full((*index.shape[:2], steps), -1, dtype=torch.int32, device=index.device)
    return slot.scatter_(2, index, numbers)


def tile_sums(x: Tensor, slot: Tensor, key_heads: int, masked: bool, block_t: int, block_d: int) -> Tensor:
    batch, steps, heads, channels = x.shape
    tiles = -(-steps // block_t)
    sums = torch.empty(batch, key_heads, tiles, channels, dtype=real_of(x), device=x.device)
    arguments = {
        "p_x": x,
        "p_slot": slot,
        "p_sums": sums,
        "T": steps,
        "H": heads,
        "Hk": key_heads,
        "D": channels,
        **strides("x", x),
        "MASKED": masked,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
    }
    launch(kernels.prob_sparse_sums, x, -(-channels // block_d) * tiles * key_heads * batch, arguments)
    return sums


def prob_sparse_fill(v: Tensor, rows: Tensor, index: Tensor, *, causal: bool = False) -> Tensor:
    """o [B, T, H, D]."""
    batch, steps, key_heads, channels = v.shape
    heads = index.shape[1]
    o = torch.empty(batch, steps, heads, channels, dtype=v.dtype, device=v.device)
    if o.numel() == 0:
        return o
    v = dense_inside(v)
    block_t, block_d = tile_of(channels, real_of(v))
    slot = slots(index, steps)
    sums = tile_sums(v, slot, key_heads, False, block_t, block_d)
    arguments = {
        "p_v": v,
        "p_rows": rows.contiguous(),
        "p_slot": slot,
        "p_sums": sums,
        "p_o": o,
        "T": steps,
        "H": heads,
        "Hk": key_heads,
        "D": channels,
        "N": index.shape[2],
        **strides("v", v),
        "CAUSAL": causal,
        "BLOCK_T": block_t,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": block_d,
    }
    launch(kernels.prob_sparse_fill, v, -(-channels // block_d) * sums.shape[2] * key_heads * batch, arguments)
    return o


def prob_sparse_fill_backward(
    grad: Tensor, index: Tensor, key_heads: int, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """dv [B, T, Hk, D] and drows [B, N, H, D]."""
    batch, steps, heads, channels = grad.shape
    dv = torch.empty(batch, steps, key_heads, channels, dtype=grad.dtype, device=grad.device)
    places = index.movedim(1, 2).unsqueeze(3).expand(-1, -1, -1, channels)
    if dv.numel() == 0:
        return dv, torch.zeros(places.shape, dtype=grad.dtype, device=grad.device)
    grad = dense_inside(grad)
    block_t, block_d = tile_of(channels, real_of(grad))
    slot = slots(index, steps)
    sums = tile_sums(grad, slot, key_heads, True, block_t, block_d)
    arguments = {
        "p_grad": grad,
        "p_slot": slot,
        "p_sums": sums,
        "p_dv": dv,
        "T": steps,
        "H": heads,
        "Hk": key_heads,
        "D": channels,
        **strides("x", grad),
        "CAUSAL": causal,
        "BLOCK_T": block_t,
        "BLOCK_N": BLOCK_N,
        "BLOCK_D": block_d,
    }
    launch(
        kernels.prob_sparse_fill_backward, grad, -(-channels // block_d) * sums.shape[2] * key_heads * batch, arguments
    )
    return dv, grad.gather(1, places)


# ---- the list


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""

    def listed(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, Any]:
        storage, real = STORAGE[dtype], "fp64" if dtype == torch.float64 else "fp32"
        types = {name: f"*{storage}" for name in kernel.arg_names if name.startswith("p_")}
        special = {"p_measure": f"*{real}", "p_sums": f"*{real}", "p_slot": "*i32", "p_samples": "*i64"}
        types |= {name: value for name, value in special.items() if name in types}
        sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
        return {"kernel": kernel, "types": types | sizes, "constants": constants, "options": OPTIONS}

    for dtype, block in itertools.product(STORAGE, BLOCKS):
        real = torch.float64 if dtype == torch.float64 else torch.float32
        tile = {"BLOCK_T": ELEMENTS[real.itemsize] // block, "BLOCK_D": block}
        for whole in {True, block < BLOCKS[-1]}:
            yield listed(kernels.prob_sparse_measure, dtype, {**tile, "WHOLE": whole})
        for each in (False, True):
            yield listed(kernels.prob_sparse_sums, dtype, {**tile, "MASKED": each})
            for kernel in (kernels.prob_sparse_fill, kernels.prob_sparse_fill_backward):
                yield listed(kernel, dtype, {**tile, "CAUSAL": each, "BLOCK_N": BLOCK_N})
