"""pointer_scores: checks, shapes, gradient formula, transforms, and the public function.

    pointer_scores             the public operator
    pointer_scores_forward     also log_p in float32 where the storage type has 16 bits: its backward reads that
    pointer_scores_backward    all gradients; that of the weights for each row of the batch

Letters: B batch, Tq queries, Tk keys, A channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import op as room
from . import reference

ops = torch.ops.seqops

MODES = ("additive", "clipped_dot")


# ---- checks and shapes, for tensors without data


def check(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None,
    *,
    mode: str = "additive",
    clip: float = 10.0,
    lengths: Tensor | None = None,
    op: str = "pointer_scores",
) -> None:
    shape = validate.shape_of(query)
    validate.expect(query.ndim == 3, op, "query", "3 dimensions [B, Tq, A]", f"shape {shape}")
    validate.check_type(op, "query", query, validate.STORAGE)
    validate.expect(query.shape[2] >= 1, op, "query", "at least 1 channel", f"shape {shape}")
    B, _, A = query.shape
    validate.check_device(op, "key", key, "query", query)
    validate.check_type(op, "key", key, (query.dtype,))
    fits = key.ndim == 3 and key.shape[0] == B and key.shape[2] == A
    validate.expect(fits, op, "key", f"[B, Tk, A] = [{B}, Tk, {A}]", validate.shape_of(key))
    room.check_choice(op, "mode", mode, MODES)
    validate.expect(weight is not None or mode == "clipped_dot", op, "weight", "a tensor with mode 'additive'", "None")
    if weight is not None:
        validate.check_device(op, "weight", weight, "query", query)
        validate.check_type(op, "weight", weight, (query.dtype, validate.real_of(query.dtype)))
        validate.check_shape(op, "weight", weight, "[A]", (A,))
    validate.expect(clip > 0, op, "clip", "a number > 0", f"{clip:g}")
    if lengths is not None:
        validate.check_device(op, "lengths", lengths, "query", query)
        validate.check_type(op, "lengths", lengths, (torch.int32, torch.int64))
        validate.check_shape(op, "lengths", lengths, "[B]", (B,))


def shapes(query: Tensor, key: Tensor, weight: Tensor | None, **options: Any) -> Tensor:
    check(query, key, weight, **options)
    return query.new_empty(query.shape[0], query.shape[1], key.shape[1])


def forward_shapes(query: Tensor, key: Tensor, weight: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    log_p = shapes(query, key, weight, **options)
    real = validate.real_of(query.dtype)
    steps = log_p.shape[2] if real != query.dtype else 0
    return log_p, query.new_empty(*log_p.shape[:2], steps, dtype=real)


def check_backward(
    grad: Tensor, query: Tensor, key: Tensor, weight: Tensor | None, log_p: Tensor, **options: Any
) -> None:
    op = "pointer_scores_backward"
    check(query, key, weight, op=op, **options)
    expected = (*query.shape[:2], key.shape[1])
    for name, value, dtype in (("grad", grad, query.dtype), ("log_p", log_p, validate.real_of(query.dtype))):
        validate.check_device(op, name, value, "query", query)
        validate.check_type(op, name, value, (dtype,))
        validate.check_shape(op, name, value, "[B, Tq, Tk]", expected)


def backward_shapes(
    grad: Tensor, query: Tensor, key: Tensor, weight: Tensor | None, log_p: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    check_backward(grad, query, key, weight, log_p, **options)
    channels = query.shape[2] if options.get("mode", "additive") == "additive" else 0
    dweight = query.new_empty(query.shape[0], channels, dtype=validate.real_of(query.dtype))
    return query.new_empty(query.shape), key.new_empty(key.shape), dweight


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    query, key, weight, ctx.mode, ctx.clip, lengths = inputs
    log_p, exact = outputs
    ctx.mark_non_differentiable(exact)
    ctx.save_for_backward(query, key, weight, log_p if log_p.dtype == exact.dtype else exact, lengths)


def formula(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    query, key, weight, log_p, lengths = saved
    dquery, dkey, parts = ops.pointer_scores_backward(
        grad, query, key, weight, log_p, mode=ctx.mode, clip=ctx.clip, lengths=lengths
    )
    dweight = None
    if weight is not None and ctx.needs_input_grad[2]:
        dweight = parts.sum(0).to(weight.dtype) if ctx.mode == "additive" else torch.zeros_like(weight)
    return dquery, dkey, dweight, None, None, None


# ---- registration


def register_operator(
    name: str, shapes: Callable[..., Any], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, register.vmap_of_batch(operator, alone=("weight",)))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton",))
    return operator


def register_all() -> None:
    public = register_operator("pointer_scores", shapes, check)
    training = register_operator("pointer_scores_forward", forward_shapes, check, "pointer_scores")
    recorded = register.register_autograd(training, save=save, backward=formula)
    register.register_training(public, recorded)
    register.register_autocast(public, ("query", "key"))
    backward = register_operator("pointer_scores_backward", backward_shapes, check_backward, "pointer_scores")
    register.refuse_second_derivative(backward, public)
    backend.provide("pointer_scores", "reference", reference.pointer_scores, check=check)


register_all()


# ---- the public function


def pointer_scores(
    query: Tensor,
    key: Tensor,
    weight: Tensor | None,
    *,
    mode: str = "additive",
    clip: float = 10.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """Log-probabilities with which each query points at the keys.

        s_ij = sum_a weight_a tanh(query_ia + key_ja)          "additive"
        s_ij = clip tanh(<query_i, key_j> / sqrt A)            "clipped_dot"
        log_p_ij = s_ij - log sum_{j' < length} exp s_ij'

    Args:
        query: [B, Tq, A], projected queries: float32, float64, bfloat16 or float16, any strides.
        key: [B, Tk, A], projected keys, in the dtype of query.
        weight: [A], in the dtype of query or, where that has 16 bits, in float32. "clipped_dot" reads none, and takes
            None too.
        mode: "additive" or "clipped_dot".
        clip: the largest score of "clipped_dot".
        lengths: [B] int32 or int64, how many keys of each row there are, kept between 0 and Tk; None is Tk. Those past
            it have log_p = -inf and do not count, even if they are NaN.

    Returns:
        log_p [B, Tq, Tk] in the dtype of query; -inf throughout where the length is 0.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: nothing of size [B, Tq, Tk, A]; on the CPU copies of query and key. A gradient keeps query, key, weight and
    log_p (in float32 where it has 16 bits), computes the hyperbolic tangents again, and takes one more [B, Tq, Tk].

    Example:
        >>> query, key, weight = torch.randn(2, 5, 16), torch.randn(2, 7, 16), torch.randn(16)
        >>> log_p = seqops.pointer_scores(query, key, weight, lengths=torch.tensor([7, 3]))
        >>> log_p.shape, bool((log_p[1, :, 3:] == -torch.inf).all())
        (torch.Size([2, 5, 7]), True)

    Vinyals, Fortunato and Jaitly, "Pointer networks", 2015; Kool, van Hoof and Welling, "Attention, learn to solve
    routing problems!", 2019.
    """
    return ops.pointer_scores(query, key, weight, mode=mode, clip=clip, lengths=lengths)
