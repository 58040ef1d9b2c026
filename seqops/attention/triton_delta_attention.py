"""Launchers of the Triton kernels of held keys."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels_delta_attention as kernels

INTERPRETED = triton.knobs.runtime.interpret
# A warp walks channels that lie side by side; many short programs share a multiprocessor.
BLOCK_D, DEPTH = 32, 8
# Of rows that move as one: powers of two, so that few kernels exist. Wider ones have fewer loads on their way.
LEAST, MOST = 32, 512
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True}
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options)


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dense_inside(t: Tensor) -> Tensor:
    return t if t.shape[3] == 1 or t.stride(3) == 1 else t.contiguous()


def strides(name: str, t: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{letter}": t.stride(i) for i, letter in enumerate("bth")}


def constants(by_row: bool, channels: int) -> dict[str, Any]:
    if not by_row:
        return {"BY_ROW": False, "DEPTH": DEPTH, "BLOCK_D": BLOCK_D}
    block = max(LEAST, triton.next_power_of_2(channels))
    return {"BY_ROW": True, "DEPTH": DEPTH if block <= 128 else 2, "BLOCK_D": block}


def options(block: int) -> dict[str, Any]:
    """Of the compiler: two numbers a lane, where rows are not very wide; with four, float64 spills."""
    return OPTIONS | {"num_warps": min(max(1, block // 64), 16)}


def run(kernel: Any, like: Tensor, by_row: bool, arguments: dict[str, Any]) -> None:
    B, T, heads, channels = like.shape
    chosen = constants(by_row, channels)
    programs = B * heads * triton.cdiv(channels, chosen["BLOCK_D"])
    sizes = {"T": T, "Hk": heads, "D": channels}
    launch(kernel, like, programs, arguments | sizes | chosen, options(chosen["BLOCK_D"]))


def held_keys(k: Tensor, threshold: float, by_row: bool) -> Tensor:
    held = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    if held.numel():
        k = dense_inside(k)
        # An argument would be a float32 in every kernel.
        limit = torch.full((1,), threshold, dtype=real_of(k.dtype), device=k.device)
        arguments = {"p_k": k, "p_held": held, "p_threshold": limit, **strides("k", k)}
        run(kernels.held_keys_forward, held, by_row, arguments)
    return held


def held_keys_backward(grad: Tensor, held: Tensor, by_row: bool) -> Tensor:
    dk = torch.empty(held.shape, dtype=held.dtype, device=held.device)
    if dk.numel():
        grad, held = dense_inside(grad), dense_inside(held)
        arguments = {"p_grad": grad, "p_held": held, "p_dk": dk, **strides("g", grad), **strides("h", held)}
        run(kernels.held_keys_backward, dk, by_row, arguments)
    return dk


def configurations() -> Iterator[dict[str, Any]]:
    """Kernels that may be launched, for rows of up to MOST channels: kernel, types of its run-time arguments,
    constants, options."""

    def listed(kernel: Any, storage: str, chosen: dict[str, Any]) -> dict[str, Any]:
        types = {n: f"*{storage}" for n in kernel.arg_names if n.startswith("p_")}
        types |= {"p_threshold": "*fp64" if storage == "fp64" else "*fp32"} if "p_threshold" in types else {}
        types |= {n: "i64" if n.startswith("stride_") else "i32" for n in kernel.arg_names if n not in types}
        types = {n: kind for n, kind in types.items() if n not in chosen}
        return {"kernel": kernel, "types": types, "constants": chosen, "options": options(chosen["BLOCK_D"])}

    widths = [1 << i for i in range(LEAST.bit_length() - 1, MOST.bit_length())]
    chosen = [constants(False, 1), *(constants(True, width) for width in widths)]
    for kernel, storage, each in itertools.product(
        (kernels.held_keys_forward, kernels.held_keys_backward), STORAGE.values(), chosen
    ):
        yield listed(kernel, storage, each)
