"""large_chunk_ttt: the operators that it is made of, and the public function.

    fast_weights            (q, k, v [B, T, H, D], w0 [B, H, F, D], w1 [B, H, D, F], w2 [B, H, F, D], lr [B, T, H, 3],
                             momentum [B, T, H] or None, m0, m1, m2 like the weights or None, chunk_size, *, optimizer,
                             order, coefficients, weight_norm) -> (o [B, T, H, D], w0, w1, w2, m0, m1, m2)
    fast_weights_forward    the same -> (o, w0, w1, w2, m0, m1, m2, weights, sums, norms, products)
    fast_weights_backward   (gradients of the seven results, each or None, the eleven tensors, weights, sums, norms,
                             products, chunk_size, *, the options) -> gradients of the eleven tensors

What the forward keeps is told in composed_large_chunk_ttt.py. A gradient of what is None is empty, [0].
`large_chunk_ttt` itself only unpacks its list of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import composed_large_chunk_ttt as large_chunk
from . import op as room
from . import reference
from .op_newton_schulz import flat

ops = torch.ops.seqops

ORDERS = ("apply_update", "update_apply", "full")
SCHEMA = (
    "large_chunk_ttt(Tensor q, Tensor k, Tensor v, Tensor w0, Tensor w1, Tensor w2, Tensor lr, int chunk_size, *, "
    "Tensor? momentum=None, Tensor[]? momentum_state=None, str optimizer='gd', str order='apply_update', "
    "float[]? coefficients=None, bool weight_norm=True) -> (Tensor o, Tensor w0, Tensor w1, Tensor w2, Tensor m0, "
    "Tensor m1, Tensor m2)"
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    chunk_size: int,
    *,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    optimizer: str = "gd",
    order: str = "apply_update",
    coefficients: Sequence[float] | None = None,
    weight_norm: bool = True,
    op: str = "large_chunk_ttt",
) -> None:
    room.check_sequences(op, q, k, v)
    B, T, H, D = q.shape
    validate.expect(w0.ndim == 4, op, "w0", "4 dimensions [B, H, F, D]", f"shape {validate.shape_of(w0)}")
    F = w0.shape[2]
    wide, tall = ("[B, H, F, D]", (B, H, F, D)), ("[B, H, D, F]", (B, H, D, F))
    for name, t, (letters, shape) in (("w0", w0, wide), ("w1", w1, tall), ("w2", w2, wide)):
        room.check_like(op, name, t, letters, shape, q)
    validate.expect(F >= 1, op, "w0", "at least 1 hidden channel", f"shape {validate.shape_of(w0)}")
    room.check_like(op, "lr", lr, "[B, T, H, 3]", (B, T, H, 3), q)
    room.check_at_least(op, "chunk_size", chunk_size, 1)
    room.check_like(op, "momentum", momentum, "[B, T, H]", (B, T, H), q)
    if momentum_state is not None:
        room.check_count(op, "momentum_state", momentum_state, (3,))
        for i, (t, (letters, shape)) in enumerate(zip(momentum_state, (wide, tall, wide), strict=True)):
            room.check_like(op, f"momentum_state[{i}]", t, letters, shape, q)
    room.check_choice(op, "optimizer", optimizer, room.OPTIMIZERS)
    room.check_choice(op, "order", order, ORDERS)
    room.check_coefficients(op, coefficients)


# ---- the operators that compute


def check_fast_weights(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    m0: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    chunk_size: int,
    *,
    op: str = "fast_weights",
    **options: Any,
) -> None:
    given = [m for m in (m0, m1, m2) if m is not None]
    options |= {"momentum": momentum, "momentum_state": given if given else None, "op": op}
    check(q, k, v, w0, w1, w2, lr, chunk_size, **options)


def fast_weights_shapes(
    q: Tensor, k: Tensor, v: Tensor, w0: Tensor, *others: Any, **options: Any
) -> tuple[Tensor, ...]:
    check_fast_weights(q, k, v, w0, *others, **options)
    B, _, H, D = q.shape
    F, real = w0.shape[2], validate.real_of(q.dtype)
    states = [q.new_empty(B, H, *shape, dtype=real) for shape in ((F, D), (D, F), (F, D)) * 2]
    return q.new_empty(q.shape), *states


def fast_weights_forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    m0: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    check_fast_weights(q, k, v, w0, w1, w2, lr, momentum, m0, m1, m2, chunk_size, op="fast_weights_forward", **options)
    outputs = fast_weights_shapes(q, k, v, w0, w1, w2, lr, momentum, m0, m1, m2, chunk_size, **options)
    return *outputs, *(
        q.new_empty(shape, dtype=validate.real_of(q.dtype)) for shape in kept(q, w0, momentum, chunk_size, **options)
    )


def kept(
    q: Tensor,
    w0: Tensor,
    momentum: Tensor | None,
    chunk_size: int,
    *,
    optimizer: str = "gd",
    order: str = "apply_update",
    weight_norm: bool = True,
    **others: Any,
) -> list[tuple[int, ...]]:
    """The shapes of what the forward keeps."""
    B, T, H, D = q.shape
    F, U = w0.shape[2], large_chunk.updates(T, chunk_size, order)
    slots = large_chunk.slots(D, T, chunk_size, order)
    with_sums = momentum is not None or optimizer == "muon"
    return [
        (B, H, slots, 3 * F * D),
        (B, H, slots, 3 * F * D if with_sums else 0),
        (B, H, U, 2 * F + D if weight_norm else 0),
        (B, H, 5 if large_chunk.keeps_products(q) else 0, T, F),
    ]


def check_fast_weights_backward(*args: Any, **options: Any) -> None:
    op = "fast_weights_backward"
    grads, tensors, saved, chunk_size = args[:7], args[7:18], args[18:22], args[22]
    check_fast_weights(*tensors, chunk_size, op=op, **options)
    q, _, _, w0, w1 = tensors[:5]
    real = validate.real_of(q.dtype)
    likes = (("[B, T, H, D]", q), *(("[B, H, F, D]", w0), ("[B, H, D, F]", w1), ("[B, H, F, D]", w0)) * 2)
    names = ("grad_o", "dw0", "dw1", "dw2", "dm0", "dm1", "dm2")
    for name, grad, (letters, like) in zip(names, grads, likes, strict=True):
        if grad is not None:
            validate.check_device(op, name, grad, "q", q)
            validate.check_type(op, name, grad, (q.dtype if name == "grad_o" else real,))
            validate.check_shape(op, name, grad, letters, like.shape)
    letters = ("[B, H, slots, 3 F D]", "[B, H, slots, 3 F D]", "[B, H, U, 2 F + D]", "[B, H, 5, T, F]")
    shapes = kept(q, w0, tensors[7], chunk_size, **options)
    for name, t, letter, shape in zip(("weights", "sums", "norms", "products"), saved, letters, shapes, strict=True):
        validate.check_device(op, name, t, "q", q)
        validate.check_type(op, name, t, (real,))
        validate.check_shape(op, name, t, letter, shape)


def fast_weights_backward_shapes(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    check_fast_weights_backward(*args, **options)
    q = args[7]
    none = validate.real_of(q.dtype)
    return tuple(q.new_empty(0, dtype=none) if t is None else t.new_empty(t.shape) for t in args[7:18])


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_size, ctx.optimizer, ctx.order, ctx.coefficients, ctx.weight_norm = inputs
    kept_ = outputs[7:]
    ctx.mark_non_differentiable(*kept_)
    ctx.save_for_backward(*tensors, *kept_)


def formula(ctx: Any, saved: tuple[Any, ...], *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grads = grads[:7]
    if all(grad is None for grad in grads):
        return (None,) * 16
    options = {"optimizer": ctx.optimizer, "order": ctx.order}
    options |= {"coefficients": ctx.coefficients, "weight_norm": ctx.weight_norm}
    gradients = ops.fast_weights_backward(*grads, *saved, ctx.chunk_size, **options)
    present = (None if t is None else gradient for t, gradient in zip(saved[:11], gradients, strict=True))
    return *present, None, None, None, None, None


# ---- registration


TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor w0, Tensor w1, Tensor w2, Tensor lr, Tensor? momentum, Tensor? m0, "
    "Tensor? m1, Tensor? m2, "
)
OPTIONS = (
    "int chunk_size, *, str optimizer='gd', str order='apply_update', float[]? coefficients=None, "
    "bool weight_norm=True)"
)
OUTPUTS = "Tensor o, Tensor w0, Tensor w1, Tensor w2, Tensor m0, Tensor m1, Tensor m2"
KEPT = "Tensor weights, Tensor sums, Tensor norms, Tensor products"
GRADS = "Tensor? grad_o, Tensor? dw0, Tensor? dw1, Tensor? dw2, Tensor? dm0, Tensor? dm1, Tensor? dm2, "
GRADIENTS = (
    "Tensor dq, Tensor dk, Tensor dv, Tensor dw0, Tensor dw1, Tensor dw2, Tensor dlr, Tensor dmomentum, Tensor dm0, "
    "Tensor dm1, Tensor dm2"
)


def register_operator(
    name: str, schema: str, shapes: Callable[..., Any], check: Callable[..., None]
) -> torch._ops.OpOverload:
    backend.library.define(name + schema)
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, register.vmap_of_batch(operator))
    backend.register_elsewhere(operator)

    def on_cpu(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        return getattr(large_chunk, name)(torch.ops.seqops_passes, *args, **options)

    backend.provide(name, "cpu", on_cpu, check=check, part_of="large_chunk_ttt")
    backend.provide_module(name, __package__, check=check, part_of="large_chunk_ttt", backends=("triton",))
    return operator


def register_all() -> None:
    inference = register_operator(
        "fast_weights", f"({TENSORS}{OPTIONS} -> ({OUTPUTS})", fast_weights_shapes, check_fast_weights
    )
    forward = register_operator(
        "fast_weights_forward",
        f"({TENSORS}{OPTIONS} -> ({OUTPUTS}, {KEPT})",
        fast_weights_forward_shapes,
        partial(check_fast_weights, op="fast_weights_forward"),
    )
    backward = register_operator(
        "fast_weights_backward",
        f"({GRADS}{TENSORS}{KEPT}, {OPTIONS} -> ({GRADIENTS})",
        fast_weights_backward_shapes,
        check_fast_weights_backward,
    )
    training = register.register_autograd(forward, save=save, backward=formula)
    register.register_training(inference, training)
    register.refuse_second_derivative(backward, inference)


register_all()


# ---- large_chunk_ttt


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    chunk_size: int,
    *,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    optimizer: str = "gd",
    order: str = "apply_update",
    coefficients: Sequence[float] | None = None,
    weight_norm: bool = True,
) -> tuple[Tensor, ...]:
    m0, m1, m2 = (None, None, None) if momentum_state is None else momentum_state
    options = {"optimizer": optimizer, "order": order, "coefficients": coefficients, "weight_norm": weight_norm}
    return ops.fast_weights(q, k, v, w0, w1, w2, lr, momentum, m0, m1, m2, chunk_size, **options)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.large_chunk_ttt,
    check=check,
    cast=("q", "k", "v"),
    parts=("fast_weights",),
)


def large_chunk_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    chunk_size: int,
    *,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    optimizer: str = "gd",
    order: str = "apply_update",
    coefficients: Sequence[float] | None = None,
    weight_norm: bool = True,
) -> tuple[Tensor, ...]:
    """A gated MLP as fast weights, `f(x) = w1 (silu(w0 x) * (w2 x))`, that learns one step every chunk (LaCT).

        o_t = f(q_t);  S_i <- beta S_i - sum_t lr_ti d loss_t / d w_i,  loss_t = -<f(k_t), v_t>;  w_i <- w_i + S_i

    The sum is over the tokens of a chunk, `beta` the mean of its momentum, and i counts the matrices. Rows of
    the weights are then rescaled to the norms that they had at the beginning. All gradients, those through the steps
    among them, are exact.

    Args:
        q, k, v: [B, T, H, D], queries, keys and values: float32, float64, bfloat16 or float16, any strides.
        w0, w2: [B, H, F, D], the weights before the first token. In q's dtype or, where that has 16 bits, float32.
        w1: [B, H, D, F], the same.
        lr: [B, T, H, 3], rates of w0, w1 and w2, of the same dtypes. A token with rates of 0 teaches nothing.
        chunk_size: an integer >= 1. Chunks are counted from the first token of the call.
        momentum: [B, T, H], of the same dtypes; None is none.
        momentum_state: three tensors like the weights, S before the first token; None is zero.
        optimizer: "gd", or "muon": each step `S_i`, without momentum `d_i`, goes through `newton_schulz` before it is
            added. Then rates only weigh tokens against each other.
        order: which weights a chunk's queries meet. "apply_update": those before its own step, so that a token sees
            chunks before its own and nothing leaks; a last chunk that is not complete is not learnt. "update_apply":
            those after its step, so that tokens see their whole chunk; an incomplete one is learnt. "full": one step on
            all tokens comes before all queries, and chunk_size has no effect.
        coefficients: of "muon", triples or a flat list as `newton_schulz` takes them; None is `MUON_STEPS`.
        weight_norm: False: rows are not rescaled.

    Returns:
        o [B, T, H, D] in the dtype of q, and in float32, or float64 for float64, the weights w0, w1, w2 and their
        momentum S after the last step; without momentum those are `momentum_state` or zeros.

    A sequence cut at multiples of chunk_size, with weights and momentum carried, equals the whole; another cut moves
    the chunks. To decode under "apply_update", call with each token alone, and once more with all tokens of the chunk
    when it is full, of which call only the state counts.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: of up to 1024 tokens at a time 6 F numbers a token and head; on GPUs of up to 4096, 12 F in the backward. A
    gradient keeps the arguments, the weights before each step (of chunks shorter than D, once in D tokens or 32 steps:
    those between are learnt again) and, with momentum or "muon", as many sums; on CPUs also 5 F numbers a token and
    head, products that GPUs compute again.

    Example:
        >>> q, k, v = (torch.randn(2, 64, 2, 8) for _ in range(3))
        >>> w0, w1, w2 = (torch.randn(2, 2, *shape) / 4 for shape in ((16, 8), (8, 16), (16, 8)))
        >>> o, *state = seqops.large_chunk_ttt(q, k, v, w0, w1, w2, torch.full((2, 64, 2, 3), 0.01), 32)
        >>> o.shape, len(state)  # three matrices and their momentum
        (torch.Size([2, 64, 2, 8]), 6)

    Zhang et al., "Test-time training done right", 2025.
    """
    options = {
        **{"momentum": momentum, "momentum_state": momentum_state, "optimizer": optimizer, "order": order},
        **{"coefficients": flat(coefficients), "weight_norm": weight_norm},
    }
    return ops.large_chunk_ttt(q, k, v, w0, w1, w2, lr, chunk_size, **options)
