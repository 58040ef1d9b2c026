"""combiner_attention: checks, shapes, gradient formulas and transforms of its parts, and the public function.

    span_summaries             khat and vhat [B, S, H, D] of spans of blocks, from q, k, v [B, T, H, D]
    span_summaries_backward    dq, dk, dv in float32, or float64 for float64
    running_pool               y_t = pool of x_t, x_{t - stride}, ...; of x_t, x_{t + stride}, ... where `reverse`
    running_pool_backward      dx

Spans are the blocks (not `tree`), or nodes of a tree: level l has nodes of 2^l blocks in pairs of siblings, as long as
there are two. A query sees, if `causal`, blocks with one after them, or left siblings; rows beyond those are zeros.
Nothing is kept for the gradient but the arguments (and y).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import composed_combiner_attention as composed
from . import op as room
from . import reference
from .composed_combiner_attention import rows_of

ops = torch.ops.seqops
PATTERNS = ("fixed", "logsparse", "axial")
POOLS = ("max", "mean")

SCHEMA = (
    "combiner_attention(Tensor q, Tensor k, Tensor v, int block_size, *, str pattern='fixed', str pool='max', "
    "bool causal=True, float? scale=None) -> Tensor"
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    pattern: str = "fixed",
    pool: str = "max",
    causal: bool = True,
    scale: float | None = None,
) -> None:
    op = "combiner_attention"
    room.check_heads(op, q, k, v)
    room.check_at_least(op, "block_size", block_size, 1)
    room.check_choice(op, "pattern", pattern, PATTERNS)
    room.check_choice(op, "pool", pool, POOLS)


# ---- parts: checks and shapes


def check_rows(op: str, name: str, x: Tensor) -> None:
    shape = validate.shape_of(x)
    validate.expect(x.ndim == 4, op, name, "4 dimensions [B, T, H, D]", f"shape {shape}")
    validate.check_type(op, name, x, validate.STORAGE)
    validate.expect(x.shape[2] >= 1 and x.shape[3] >= 1, op, name, "at least 1 head and 1 channel", f"shape {shape}")


def check_like(
    op: str, name: str, t: Tensor, like_name: str, like: Tensor, steps: int, letters: str = "[B, T, H, D]"
) -> None:
    validate.check_device(op, name, t, like_name, like)
    validate.check_type(op, name, t, (like.dtype,))
    validate.check_shape(op, name, t, letters, (like.shape[0], steps, *like.shape[2:]))


def check_options(op: str, name: str, value: int, pool: str) -> None:
    validate.expect(value >= 1, op, name, "an integer >= 1", str(value))
    validate.expect(pool in POOLS, op, "pool", f"one of {', '.join(POOLS)}", repr(pool))


def check_span_summaries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    tree: bool,
    pool: str,
    causal: bool,
    scale: float,
    op: str = "span_summaries",
) -> None:
    check_rows(op, "q", q)
    check_like(op, "k", k, "q", q, q.shape[1])
    check_like(op, "v", v, "q", q, q.shape[1])
    check_options(op, "block_size", block_size, pool)


def check_span_summaries_backward(
    dkhat: Tensor, dvhat: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: int, **options: Any
) -> None:
    op = "span_summaries_backward"
    check_span_summaries(q, k, v, block_size, **options, op=op)
    rows = rows_of(q.shape[1], block_size, options["tree"], options["causal"])
    check_like(op, "dkhat", dkhat, "q", q, rows, "[B, S, H, D]")
    check_like(op, "dvhat", dvhat, "q", q, rows, "[B, S, H, D]")


def check_running_pool(x: Tensor, stride: int, *, pool: str, reverse: bool) -> None:
    check_rows("running_pool", "x", x)
    check_options("running_pool", "stride", stride, pool)


def check_running_pool_backward(
    dy: Tensor, x: Tensor | None, y: Tensor | None, stride: int, *, pool: str, reverse: bool
) -> None:
    op = "running_pool_backward"
    check_rows(op, "dy", dy)
    check_options(op, "stride", stride, pool)
    if pool == "max":
        for name, value in (("x", x), ("y", y)):
            validate.expect(value is not None, op, name, "a tensor where pool is max", "None")
            check_like(op, name, value, "dy", dy, dy.shape[1])


def span_summaries_shapes(q: Tensor, k: Tensor, v: Tensor, block_size: int, **options: Any) -> tuple[Tensor, Tensor]:
    check_span_summaries(q, k, v, block_size, **options)
    rows = rows_of(q.shape[1], block_size, options["tree"], options["causal"])
    shape = (q.shape[0], rows, *q.shape[2:])
    return q.new_empty(shape), q.new_empty(shape)


def span_summaries_backward_shapes(
    dkhat: Tensor, dvhat: Tensor, q: Tensor, k: Tensor, v: Tensor, block_size: int, **options: Any
) -> tuple[Tensor, ...]:
    check_span_summaries_backward(dkhat, dvhat, q, k, v, block_size, **options)
    return tuple(t.new_empty(t.shape, dtype=validate.real_of(t.dtype)) for t in (q, k, v))


def running_pool_shapes(x: Tensor, stride: int, **options: Any) -> Tensor:
    check_running_pool(x, stride, **options)
    return x.new_empty(x.shape)


def running_pool_backward_shapes(dy: Tensor, x: Tensor | None, y: Tensor | None, stride: int, **options: Any) -> Tensor:
    check_running_pool_backward(dy, x, y, stride, **options)
    return dy.new_empty(dy.shape)


# ---- formulas


def save_span_summaries(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.block_size, tree, pool, causal, scale = inputs
    ctx.options = {"tree": tree, "pool": pool, "causal": causal, "scale": scale}
    ctx.save_for_backward(q, k, v)


def span_summaries_formula(
    ctx: Any, saved: tuple[Tensor, ...], dkhat: Tensor | None, dvhat: Tensor | None
) -> tuple[Tensor | None, ...]:
    some = dvhat if dkhat is None else dkhat
    if some is None:
        return (None,) * 8
    dkhat, dvhat = (torch.zeros_like(some) if gradient is None else gradient for gradient in (dkhat, dvhat))
    gradients = ops.span_summaries_backward(dkhat, dvhat, *saved, ctx.block_size, **ctx.options)
    return (*(gradient.to(some.dtype) for gradient in gradients), *(None,) * 5)


def save_running_pool(ctx: Any, inputs: tuple[Any, ...], y: Tensor) -> None:
    x, ctx.stride, ctx.pool, ctx.reverse = inputs
    ctx.save_for_backward(*((x, y) if ctx.pool == "max" else (None, None)))


def running_pool_formula(ctx: Any, saved: tuple[Tensor | None, ...], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 4
    dx = ops.running_pool_backward(dy, *saved, ctx.stride, pool=ctx.pool, reverse=ctx.reverse)
    return dx, None, None, None


# ---- registration


def register_operator(name: str, shapes: Callable[..., Any], check: Callable[..., None]) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, register.vmap_of_batch(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of="combiner_attention")
    backend.provide_module(name, __package__, check=check, part_of="combiner_attention", backends=("triton",))
    return operator


def register_parts() -> None:
    forward = register_operator("span_summaries", span_summaries_shapes, check_span_summaries)
    register.register_autograd(forward, save=save_span_summaries, backward=span_summaries_formula)
    backward = register_operator(
        "span_summaries_backward", span_summaries_backward_shapes, check_span_summaries_backward
    )
    register.refuse_second_derivative(backward, forward)
    forward = register_operator("running_pool", running_pool_shapes, check_running_pool)
    register.register_autograd(forward, save=save_running_pool, backward=running_pool_formula)
    backward = register_operator("running_pool_backward", running_pool_backward_shapes, check_running_pool_backward)
    register.refuse_second_derivative(backward, forward)


# ---- the operator


def compose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    pattern: str = "fixed",
    pool: str = "max",
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if pattern == "axial":
        return composed.over_grid(q, k, v, block_size, pool=pool, causal=causal, scale=scale)
    return composed.over_blocks(q, k, v, block_size, tree=pattern == "logsparse", pool=pool, causal=causal, scale=scale)


register.register_composite(
    SCHEMA,
    compose,
    reference=reference.combiner_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("range_attention", "span_summaries", "running_pool", "gather_rows", "merge_attention"),
)
register_parts()


def combiner_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    pattern: str = "fixed",
    pool: str = "max",
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Full attention that sees far keys through summaries: one softmax over direct keys and one row for each span.

        khat = pool k_j;  qhat = pool q_j;  vhat = sum_j softmax_j(scale <qhat, k_j>) v_j,  over positions j of the span

    A query's direct keys and spans hold every key that it may see once: the weights that `o` gives to values sum to 1.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        block_size: s, 1 or more. Where T is no more than that, this is plain attention.
        pattern: "fixed": direct keys are the query's block of s positions, and every other block is a span.
            "logsparse": the same direct keys; spans are the siblings, in a binary tree over blocks, of the nodes above
            the query's block. With s = 1 a query sees log T rows. "axial": positions are a grid of rows of s; direct
            keys are the query's row and column, and each other column has a span above that row, and one below.
        pool: "max", elementwise, where the earliest of equal ones has the gradient; or "mean".
        causal: a query sees no key after its own position, and no span that begins after it.
        scale: a number; None is D**-0.5.

    Returns:
        o [B, T, H, D] in the dtype of q.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: summaries, in rows of a head: T / s ("fixed"), up to T / s or 2 T / s ("logsparse", causal or not), and T or
    2 T ("axial"). A gradient keeps q, k, v, summaries, and the outputs of the softmax; "axial" keeps two more sets of
    these, in the order of columns. Where Hk is not H, keys and values are repeated for each query head.

    Example:
        >>> q, k = (torch.randn(2, 100, 4, 16) for _ in range(2))
        >>> o = seqops.combiner_attention(q, k, torch.ones(2, 100, 4, 16), 10)
        >>> torch.allclose(o, torch.ones(()))  # the weights of all keys sum to 1
        True

    Ren et al., "Combiner: full attention transformer with sparse computation cost", 2021.
    """
    return ops.combiner_attention(q, k, v, block_size, pattern=pattern, pool=pool, causal=causal, scale=scale)
