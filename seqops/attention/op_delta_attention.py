"""delta_attention: the held keys, with their shapes and gradient; the ranges of both kinds of keys; public function.

    held_keys            (k [B, T, Hk, D], threshold, by_row) -> held [B, T, Hk, D]
    held_keys_backward   (grad, held [B, T, Hk, D], by_row) -> dk

A step moves a channel (with by_row: a whole row) exactly where `held` differs from the step before: nothing else is
kept for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import op as room
from . import ranges, reference

ops = torch.ops.seqops

SCHEMA = (
    "delta_attention(Tensor q, Tensor k, Tensor v, float threshold, *, int window, int sink=0, str mode='element', "
    "float? scale=None) -> (Tensor o, Tensor lse)"
)
MODES = ("element", "row")


# ---- held keys


def check_held(k: Tensor, threshold: float, by_row: bool) -> None:
    op = "held_keys"
    check_keys(op, "k", k)
    validate.expect(threshold >= 0, op, "threshold", "a number >= 0", f"{threshold:g}")


def check_keys(op: str, name: str, k: Tensor) -> None:
    validate.expect(k.ndim == 4, op, name, "4 dimensions [B, T, Hk, D]", f"shape {validate.shape_of(k)}")
    validate.check_type(op, name, k, validate.STORAGE)


def check_held_backward(grad: Tensor, held: Tensor, by_row: bool) -> None:
    op = "held_keys_backward"
    check_keys(op, "held", held)
    validate.check_device(op, "grad", grad, "held", held)
    validate.check_type(op, "grad", grad, (held.dtype,))
    validate.check_shape(op, "grad", grad, "[B, T, Hk, D]", held.shape)


def held_shapes(k: Tensor, threshold: float, by_row: bool) -> Tensor:
    check_held(k, threshold, by_row)
    return k.new_empty(k.shape)


def held_backward_shapes(grad: Tensor, held: Tensor, by_row: bool) -> Tensor:
    check_held_backward(grad, held, by_row)
    return held.new_empty(held.shape)


def save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.by_row = inputs[2]
    ctx.save_for_backward(outputs)


def formula(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    return ops.held_keys_backward(grad, *saved, ctx.by_row), None, None


def vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The mapped dimension joins the batch."""

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        folded = [
            register.fold(t, dim, size, 0) if isinstance(t, Tensor) else t for t, dim in zip(flat, in_dims, strict=True)
        ]
        output = op(*folded)
        return output.unflatten(0, (size, output.shape[0] // size)), 0

    return rule


def register_held(name: str, shapes: Callable[..., Tensor], check: Callable[..., None]) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of="delta_attention")
    backend.provide_module(name, __package__, check=check, part_of="delta_attention", backends=("triton",))
    return operator


def register_all() -> None:
    held = register_held("held_keys", held_shapes, check_held)
    backend.provide("held_keys", "reference", reference.held_keys, check=check_held, part_of="delta_attention")
    register.register_autograd(held, save=save, backward=formula)
    backward = register_held("held_keys_backward", held_backward_shapes, check_held_backward)
    register.refuse_second_derivative(backward, held)


register_all()


# ---- delta_attention


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float,
    *,
    window: int,
    sink: int = 0,
    mode: str = "element",
    scale: float | None = None,
) -> None:
    op = "delta_attention"
    room.check_heads(op, q, k, v)
    validate.expect(threshold >= 0, op, "threshold", "a number >= 0", f"{threshold:g}")
    room.check_at_least(op, "window", window, 0)
    room.check_at_least(op, "sink", sink, 0)
    room.check_choice(op, "mode", mode, MODES)


@ranges.kept
def plan(T: int, window: int, sink: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys seen as they are: the first ones, and the last ones; and those between, seen as held."""
    t = ranges.steps(T, device)
    end, sink = t + 1, min(sink, room.FAR)
    recent = (end - window).clamp(min=0)  # the first key of the window
    first = torch.minimum(recent.clamp(min=sink), end)
    direct = ranges.stack([(torch.zeros_like(t), end.clamp(max=sink)), (first, end)])
    return direct, ranges.stack([(recent.clamp(max=sink), recent)])


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float,
    *,
    window: int,
    sink: int = 0,
    mode: str = "element",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    direct, between = plan(q.shape[1], window, sink, q.device)
    held = ops.held_keys(k, threshold, mode == "row")
    o, lse = ops.range_attention(q, k, v, direct, held, v, between, scale=scale)
    return o, lse.to(torch.float32)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.delta_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("range_attention", "held_keys"),
)


def delta_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    threshold: float,
    *,
    window: int,
    sink: int = 0,
    mode: str = "element",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention that sees distant keys as they last changed by more than a threshold.

        h_t = k_t where |k_t - h_{t-1}| > threshold, else h_{t-1};  h_{-1} = 0
        s_ij = scale <q_i, k_j> where i - j < window or j < sink, else scale <q_i, h_j>, for j <= i
        lse_i = log sum_{j <= i} exp s_ij;  o_i = sum_{j <= i} exp(s_ij - lse_i) v_j

    The gradient of h_t goes to the step that last moved it. A cache of held keys stores few of their channels.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        threshold: 0 or more; with 0 the result is causal attention.
        window: the last keys, a query's own among them, that are seen as they are: 0 or more.
        sink: the first keys that are seen as they are: 0 or more.
        mode: "element": each channel is held by itself; "row": a row of D channels moves as one, where the 2-norm of
            its change exceeds the threshold.
        scale: a number; None is D**-0.5.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse [B, H, T] in float32, natural, differentiable.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: the held keys are a tensor of the size of k; a gradient keeps them, q, k, v, o and lse.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> o, lse = seqops.delta_attention(q, k, v, 0.5, window=16, sink=4)
        >>> exact, _ = seqops.window_attention(q, k, v, -1, 0)
        >>> torch.allclose(o[:, :16], exact[:, :16], atol=1e-5)  # so far nothing is beyond the window
        True

    "DeltaLLM: a training-free framework exploiting temporal sparsity for efficient edge LLM inference", 2025.
    """
    return ops.delta_attention(q, k, v, threshold, window=window, sink=sink, mode=mode, scale=scale)
