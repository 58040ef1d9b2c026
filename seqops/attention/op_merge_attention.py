"""merge_attention: checks, shapes, gradient formula, transforms, and the public function.

merge_attention            (o1 [B, T, H, D], lse1 [B, H, T], o2, lse2) -> (o [B, T, H, D], lse [B, H, T])
merge_attention_backward   (grad_o or None, grad_lse or None, o1, lse1, o2, lse2) -> (do1, dlse1, do2, dlse2)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import reference

ops = torch.ops.seqops


# ---- checks and shapes, for tensors without data


def check(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, op: str = "merge_attention") -> None:
    shape = validate.shape_of(o1)
    validate.expect(o1.ndim == 4, op, "o1", "4 dimensions [B, T, H, D]", f"shape {shape}")
    validate.check_type(op, "o1", o1, validate.STORAGE)
    validate.expect(o1.shape[2] >= 1 and o1.shape[3] >= 1, op, "o1", "at least 1 head and 1 channel", f"shape {shape}")
    check_lse(op, "lse1", lse1, o1, torch.float32, validate.real_of(o1.dtype))
    validate.check_device(op, "o2", o2, "o1", o1)
    validate.check_type(op, "o2", o2, (o1.dtype,))
    validate.check_shape(op, "o2", o2, "[B, T, H, D]", o1.shape)
    check_lse(op, "lse2", lse2, o1, lse1.dtype)


def check_lse(op: str, name: str, lse: Tensor, o1: Tensor, *allowed: torch.dtype) -> None:
    validate.check_device(op, name, lse, "o1", o1)
    validate.check_type(op, name, lse, allowed)
    B, T, H, _ = o1.shape
    validate.check_shape(op, name, lse, "[B, H, T]", (B, H, T))


def shapes(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    check(o1, lse1, o2, lse2)
    return o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)


def check_backward(
    grad_o: Tensor | None, grad_lse: Tensor | None, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
) -> None:
    op = "merge_attention_backward"
    check(o1, lse1, o2, lse2, op)
    if grad_o is not None:
        validate.check_device(op, "grad_o", grad_o, "o1", o1)
        validate.check_type(op, "grad_o", grad_o, (o1.dtype,))
        validate.check_shape(op, "grad_o", grad_o, "[B, T, H, D]", o1.shape)
    if grad_lse is not None:
        check_lse(op, "grad_lse", grad_lse, o1, lse1.dtype)


def backward_shapes(
    grad_o: Tensor | None, grad_lse: Tensor | None, o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor
) -> tuple[Tensor, ...]:
    check_backward(grad_o, grad_lse, o1, lse1, o2, lse2)
    return tuple(t.new_empty(t.shape) for t in (o1, lse1, o2, lse2))


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def formula(
    ctx: Any, saved: tuple[Any, ...], grad_o: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_o is None and grad_lse is None:
        return (None,) * 4
    return ops.merge_attention_backward(grad_o, grad_lse, *saved)


# ---- vmap: the mapped dimension joins the batch


def vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        folded = [None if t is None else register.fold(t, dim, size, 0) for t, dim in zip(flat, in_dims, strict=True)]
        outputs = op(*folded)
        return tuple(t.unflatten(0, (size, t.shape[0] // size)) for t in outputs), (0,) * len(outputs)

    return rule


# ---- registration


def serve_reference(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    check(o1, lse1, o2, lse2)
    return reference.merge_attention(o1, lse1, o2, lse2)


def register_operator(
    name: str, shapes: Callable[..., tuple[Tensor, ...]], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton",))
    return operator


def register_all() -> None:
    public = register_operator("merge_attention", shapes, check)
    backend.provide("merge_attention", "reference", serve_reference)
    register.register_autograd(public, save=save, backward=formula)
    register.register_autocast(public, ("o1", "o2"))
    backward = register_operator("merge_attention_backward", backward_shapes, check_backward, "merge_attention")
    register.refuse_second_derivative(backward, public)


register_all()


# ---- public function


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over two disjoint sets of keys together, from the attention over each of them.

        lse = log(e^lse1 + e^lse2);  w_n = exp(lse_n - lse);  o = w_1 o_1 + w_2 o_2

    Where a set is empty, lse_n = -inf, it is left out, and its o_n is not looked at; where both are, o = 0 and lse =
    -inf. More sets by folding, from the left to the right.

    Args:
        o1, o2: [B, T, H, D], outputs in one dtype: float32, float64, bfloat16 or float16, any strides.
        lse1, lse2: [B, H, T], natural logarithms of their sums, in float32 or, both of them beside float64, in float64.

    Returns:
        o [B, T, H, D] in the dtype of o1, and lse [B, H, T] in that of lse1.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps the arguments.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 4, 16) for _ in range(3))
        >>> def over(first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        ...     ranges = torch.tensor([first, last], dtype=torch.int32).view(2, 1).expand(2, 8).contiguous()
        ...     return seqops.range_attention(q, k, v, ranges[None, None, None])
        >>> o, lse = seqops.merge_attention(*over(0, 3), *over(3, 8))
        >>> torch.allclose(o, over(0, 8)[0], atol=1e-6)
        True

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    return ops.merge_attention(o1, lse1, o2, lse2)
