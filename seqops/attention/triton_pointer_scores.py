"""Launchers of the Triton kernels of pointer_scores; letters as in triton_kernels_pointer_scores.py."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels_pointer_scores as kernels

INTERPRETED = triton.knobs.runtime.interpret
ADDITIVE, CLIPPED = 16, 32  # queries, keys and channels of a tile
ROW = 16 if INTERPRETED else 1024  # numbers of a row at a time; no fewer than a program has threads
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
OPTIONS_OF = {torch.float32: OPTIONS, torch.float64: OPTIONS | {"num_warps": 8}}
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **OPTIONS_OF[real_of(like)])


def real_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def dense_inside(x: Tensor) -> Tensor:
    return x if x.shape[2] == 1 or x.stride(2) == 1 else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}_b": x.stride(0), f"stride_{name}_t": x.stride(1)}


def clips(clip: float) -> dict[str, float]:
    """Kernels take numbers in float32: one, and what is left of it."""
    first = torch.tensor(clip, dtype=torch.float32).item()
    return {"clip": first, "clip_rest": clip - first}


class Call:
    """The tensors of a call as kernels take them, and its constants."""

    def __init__(
        self, query: Tensor, key: Tensor, weight: Tensor | None, mode: str, clip: float, lengths: Tensor | None
    ) -> None:
        self.query, self.key = dense_inside(query), dense_inside(key)
        self.B, self.Tq, self.A = query.shape
        self.Tk, self.real = key.shape[1], real_of(query)
        self.clipped = mode == "clipped_dot"
        self.tile = CLIPPED if self.clipped else ADDITIVE
        self.weight = self.query if self.clipped or weight is None else weight.to(self.real).contiguous()
        every = torch.full((self.B,), self.Tk, dtype=torch.int64, device=query.device) if lengths is None else lengths
        self.lengths = every.to(torch.int64).contiguous()
        self.clips = clips(clip)
        self.sizes = {"Tq": self.Tq, "Tk": self.Tk}

    def tiles(self, size: int) -> int:
        return -(-size // self.tile)

    def blocks(self) -> dict[str, Any]:
        tile = dict.fromkeys(("BLOCK_Q", "BLOCK_K", "BLOCK_A"), self.tile)
        return {"CLIPPED": self.clipped, **tile}


def compute(call: Call, exact: bool) -> tuple[Tensor, Tensor]:
    """log_p, and the same in float32 where the storage type has 16 bits and it is wanted; else of no keys."""
    sizes, dtype = (call.B, call.Tq, call.Tk), call.query.dtype
    log_p = torch.empty(sizes, dtype=dtype, device=call.query.device)
    narrow = dtype != call.real
    scores = torch.empty(sizes, dtype=call.real, device=log_p.device) if narrow else log_p
    kept = scores if narrow and exact else log_p.new_empty(call.B, call.Tq, 0, dtype=call.real)
    if log_p.numel() == 0:
        return log_p, kept
    arguments = {
        "p_query": call.query,
        "p_key": call.key,
        "p_weight": call.weight,
        "p_lengths": call.lengths,
        "p_scores": scores,
        **call.clips,
        **call.sizes,
        "A": call.A,
        **strides("q", call.query),
        **strides("k", call.key),
        **call.blocks(),
    }
    launch(kernels.pointer_products, call.query, call.tiles(call.Tq) * call.tiles(call.Tk) * call.B, arguments)
    arguments = {
        "p_scores": scores,
        "p_lengths": call.lengths,
        "p_log_p": log_p,
        **call.sizes,
        "EXACT": narrow and exact,
        "BLOCK": ROW,
    }
    launch(kernels.pointer_softmax, call.query, call.B * call.Tq, arguments)
    return log_p, kept


def pointer_scores(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None,
    *,
    mode: str = "additive",
    clip: float = 10.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """log_p [B, Tq, Tk]."""
    return compute(Call(query, key, weight, mode, clip, lengths), False)[0]


def pointer_scores_forward(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None,
    *,
    mode: str = "additive",
    clip: float = 10.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """log_p and, of 16 bits, the same in float32."""
    return compute(Call(query, key, weight, mode, clip, lengths), True)


def pointer_scores_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    weight: Tensor | None,
    log_p: Tensor,
    *,
    mode: str = "additive",
    clip: float = 10.0,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dquery, dkey, and dweight of each row of the batch [B, A], or [B, 0]."""
    call = Call(query, key, weight, mode, clip, lengths)
    device, channels = query.device, 0 if call.clipped else call.A
    dquery = torch.empty(query.shape, dtype=query.dtype, device=device)
    dkey = torch.empty(key.shape, dtype=key.dtype, device=device)
    if grad.numel() == 0:
        return dquery.zero_(), dkey.zero_(), torch.zeros(call.B, channels, dtype=call.real, device=device)
    grad, log_p = dense_inside(grad), log_p.contiguous()
    sums = torch.empty(call.B, call.Tq, dtype=call.real, device=device)
    arguments = {
        "p_grad": grad,
        "p_lengths": call.lengths,
        "p_sums": sums,
        **call.sizes,
        **strides("g", grad),
        "BLOCK": ROW,
    }
    launch(kernels.pointer_sums, query, call.B * call.Tq, arguments)
    ds = torch.empty(call.B, call.Tq, call.Tk, dtype=call.real, device=device)
    arguments = {
        "p_grad": grad,
        "p_log_p": log_p,
        "p_sums": sums,
        "p_query": call.query,
        "p_key": call.key,
        "p_lengths": call.lengths,
        "p_ds": ds,
        **call.clips,
        **call.sizes,
        "A": call.A,
        **strides("g", grad),
        **strides("q", call.query),
        **strides("k", call.key),
        **call.blocks(),
    }
    launch(kernels.pointer_score_gradient, query, call.tiles(call.Tq) * call.tiles(call.Tk) * call.B, arguments)
    parts = torch.empty(call.B, call.tiles(call.Tq), channels, dtype=call.real, device=device)
    for keys, own, other, gradient in ((False, call.query, call.key, dquery), (True, call.key, call.query, dkey)):
        arguments = {
            "p_x": own,
            "p_y": other,
            "p_weight": call.weight,
            "p_ds": ds,
            "p_lengths": call.lengths,
            "p_dx": gradient,
            "p_dweight": ds if call.clipped else parts,
            **call.sizes,
            "A": call.A,
            **strides("x", own),
            **strides("y", other),
            "KEYS": keys,
            "CLIPPED": call.clipped,
            **dict.fromkeys(("BLOCK_X", "BLOCK_Y", "BLOCK_A"), call.tile),
        }
        launch(kernels.pointer_gradient, query, call.tiles(call.A) * call.tiles(own.shape[1]) * call.B, arguments)
    return dquery, dkey, parts.sum(1)


# ---- the list


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""

    def listed(kernel: Any, dtype: torch.dtype, constants: dict[str, Any]) -> dict[str, Any]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        storage, real = STORAGE[dtype], STORAGE[wide]
        wides = ("p_scores", "p_sums", "p_ds", "p_dweight")
        # Softmax writes log_p as it is stored; the gradient of scores reads it as it was computed.
        wides += ("p_log_p",) if kernel is kernels.pointer_score_gradient else ()
        # Where there is no weight, queries stand for it.
        wides += () if constants.get("CLIPPED") else ("p_weight",)
        types = {name: f"*{real if name in wides else storage}" for name in kernel.arg_names if name.startswith("p_")}
        types |= {"p_lengths": "*i64"} if "p_lengths" in types else {}
        types |= {name: "fp32" for name in ("clip", "clip_rest") if name in kernel.arg_names}
        sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
        return {"kernel": kernel, "types": types | sizes, "constants": constants, "options": OPTIONS_OF[wide]}

    def tile(names: str, clipped: bool) -> dict[str, Any]:
        return {f"BLOCK_{letter}": CLIPPED if clipped else ADDITIVE for letter in names} | {"CLIPPED": clipped}

    for dtype in STORAGE:
        narrow = dtype not in (torch.float32, torch.float64)
        for exact in {False, narrow}:
            yield listed(kernels.pointer_softmax, dtype, {"EXACT": exact, "BLOCK": 1024})
        yield listed(kernels.pointer_sums, dtype, {"BLOCK": 1024})
        for clipped in (False, True):
            for kernel in (kernels.pointer_products, kernels.pointer_score_gradient):
                yield listed(kernel, dtype, tile("QKA", clipped))
            for keys in (False, True):
                yield listed(kernels.pointer_gradient, dtype, tile("XYA", clipped) | {"KEYS": keys})
