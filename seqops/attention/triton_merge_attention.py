"""Launchers of the Triton kernels of merge_attention."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels_merge_attention as kernels

INTERPRETED = triton.knobs.runtime.interpret
ROWS, BLOCK_D = 16, 64
TILE = {"ROWS": ROWS, "BLOCK_D": BLOCK_D}
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options)


def dense_inside(t: Tensor) -> Tensor:
    return t if t.shape[3] == 1 or t.stride(3) == 1 else t.contiguous()


def strides(name: str, t: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{letter}": t.stride(i) for i, letter in enumerate("bth")}


def parts(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> dict[str, Any]:
    real = torch.float64 if o1.dtype == torch.float64 else torch.float32
    o1, o2 = dense_inside(o1), dense_inside(o2)
    sums = {"p_lse1": lse1.to(real).contiguous(), "p_lse2": lse2.to(real).contiguous()}
    sizes = dict(zip("BTHD", o1.shape, strict=True))
    return {"p_o1": o1, "p_o2": o2, **sums, **sizes, **strides("o1", o1), **strides("o2", o2), **TILE}


def programs(o1: Tensor) -> int:
    return triton.cdiv(o1.shape[0] * o1.shape[1] * o1.shape[2], ROWS)


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    arguments = parts(o1, lse1, o2, lse2)
    o = torch.empty(o1.shape, dtype=o1.dtype, device=o1.device)
    lse = torch.empty(lse1.shape, dtype=arguments["p_lse1"].dtype, device=o1.device)
    if o.numel():
        launch(kernels.merge_attention_forward, o, programs(o1), arguments | {"p_o": o, "p_lse": lse}, OPTIONS)
    return o, lse.to(lse1.dtype)


def merge_attention_backward(
    grad_o: Tensor | None, grad_lse: Tensor | None, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = parts(o1, lse1, o2, lse2)
    do1, do2 = (torch.empty(o1.shape, dtype=o1.dtype, device=o1.device) for _ in range(2))
    real = arguments["p_lse1"].dtype
    dlse1, dlse2 = (torch.empty(lse1.shape, dtype=real, device=o1.device) for _ in range(2))
    if do1.numel():
        grad = do1 if grad_o is None else dense_inside(grad_o)
        arguments |= {
            "p_grad_o": grad,
            "p_grad_lse": dlse1 if grad_lse is None else grad_lse.to(real).contiguous(),
            "p_do1": do1,
            "p_do2": do2,
            "p_dlse1": dlse1,
            "p_dlse2": dlse2,
            "GRAD_O": grad_o is not None,
            "GRAD_LSE": grad_lse is not None,
            **strides("g", grad),
        }
        launch(kernels.merge_attention_backward, do1, programs(o1), arguments, OPTIONS)
    return do1, dlse1.to(lse1.dtype), do2, dlse2.to(lse1.dtype)


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""

    def listed(kernel: Any, storage: str, constants: dict[str, Any]) -> dict[str, Any]:
        real = "*fp64" if storage == "fp64" else "*fp32"
        types = {n: real if "lse" in n else f"*{storage}" for n in kernel.arg_names if n.startswith("p_")}
        types |= {n: "i64" if n.startswith("stride_") else "i32" for n in kernel.arg_names if n not in types}
        types = {n: kind for n, kind in types.items() if n not in constants}
        return {"kernel": kernel, "types": types, "constants": constants, "options": OPTIONS}

    for storage in STORAGE.values():
        yield listed(kernels.merge_attention_forward, storage, TILE)
        for given in itertools.product((True, False), repeat=2):
            if any(given):
                flags = dict(zip(("GRAD_O", "GRAD_LSE"), given, strict=True))
                yield listed(kernels.merge_attention_backward, storage, flags | TILE)
