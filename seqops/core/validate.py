"""Argument checks for tensors whose data we do not have (meta and fake tensors) and for backends in Python.

The C++ kernels check the same with the same texts (csrc/common/check.h); tests hold both to one table. Every message is
"<operator>: <argument>: expected <what>, got <what>".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

STORAGE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_of(t: Tensor) -> str:
    return f"[{', '.join(str(size) for size in t.shape)}]"


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What a storage dtype is computed in, and what its states have."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect(good: bool, op: str, argument: str, expected: str, got: str) -> None:
    if not good:
        raise ValueError(f"{op}: {argument}: expected {expected}, got {got}")


def check_device(op: str, argument: str, t: Tensor, like_name: str, like: Tensor) -> None:
    if t.device != like.device:
        raise ValueError(f"{op}: {argument}: expected {like_name}'s device {like.device}, got {t.device}")


def check_shape(op: str, argument: str, t: Tensor, letters: str, expected: Sequence[int]) -> None:
    if t.ndim != len(expected) or any(got != size for got, size in zip(t.shape, expected, strict=True)):
        sizes = ", ".join(str(size) for size in expected)
        raise ValueError(f"{op}: {argument}: expected {letters} = [{sizes}], got {shape_of(t)}")


def check_dtype(op: str, argument: str, t: Tensor, dtype: torch.dtype) -> None:
    """Biases and states have the storage dtype or, where that has 16 bits, float32."""
    real = real_of(dtype)
    if t.dtype not in (dtype, real):
        expected = name_of(dtype) if real == dtype else f"{name_of(dtype)} or float32"
        raise ValueError(f"{op}: {argument}: expected {expected}, got {name_of(t.dtype)}")


def check_type(op: str, argument: str, t: Tensor, allowed: Sequence[torch.dtype]) -> None:
    """`allowed` is told in its order, repetitions left out."""
    if t.dtype not in allowed:
        *names, last = dict.fromkeys(name_of(dtype) for dtype in allowed)
        expected = f"{', '.join(names)} or {last}" if names else last
        raise ValueError(f"{op}: {argument}: expected {expected}, got {name_of(t.dtype)}")


def check_cu_seqlens(op: str, cu_seqlens: Tensor | None, like_name: str, like: Tensor) -> None:
    """Packed sequences [N + 1] in the one batch row of `like` [1, T, ...]."""
    if cu_seqlens is None:
        return
    expect(like.shape[0] == 1, op, like_name, "batch 1 with cu_seqlens", f"shape {shape_of(like)}")
    check_device(op, "cu_seqlens", cu_seqlens, like_name, like)
    check_type(op, "cu_seqlens", cu_seqlens, (torch.int32, torch.int64))
    good = cu_seqlens.ndim == 1 and cu_seqlens.shape[0] >= 1
    expect(good, op, "cu_seqlens", "1 dimension [N + 1]", f"shape {shape_of(cu_seqlens)}")
    if has_data(cu_seqlens):
        edges, steps = cu_seqlens.tolist(), like.shape[1]
        expect(edges[0] == 0, op, "cu_seqlens", "0 at index 0", str(edges[0]))
        for i in range(1, len(edges)):
            got = f"{edges[i]} after {edges[i - 1]} at index {i}"
            expect(edges[i] >= edges[i - 1], op, "cu_seqlens", "no decrease", got)
        expect(edges[-1] == steps, op, "cu_seqlens", f"T = {steps} at the end", str(edges[-1]))


def check_grad_clip(op: str, grad_clip: float | None) -> None:
    if grad_clip is not None and not grad_clip >= 0:
        raise ValueError(f"{op}: grad_clip: expected a number >= 0, got {grad_clip:g}")


def has_data(t: Tensor) -> bool:
    """Whether values can be looked at: not in meta or fake tensors, nor inside a transform or a trace."""
    plain = type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"
    return plain and not torch._C._functorch.is_functorch_wrapped_tensor(t)
