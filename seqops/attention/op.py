"""range_attention: checks, shapes, gradient formula, transforms, and the public function; and what patterns share.

    range_attention            (q [B, Tq, H, D], k, v [B, Tk, Hk, D], ranges [B or 1, H or 1, P, 2, Tq], k2, v2 [B, S,
                                Hk, D], ranges2, bias, *, scale, activation) -> (o [B, Tq, H, D], lse [B, H, Tq])
    range_attention_backward   (grad_o, grad_lse or None, o, lse, q, k, v, ranges, seen [.., P, 2, Tk], k2, v2, ranges2,
                                seen2, bias, *, scale, activation, bias_gradient) -> (dq, dk, dv, dk2, dv2, dbias)

What is not there has an empty gradient, [0]. `seen` is the same pattern from the side of the keys: ranges of queries.

Letters: B batch, Tq queries, Tk keys, H query heads, Hk key heads, D channels, P parts of a pattern, S keys of a second
source, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import ranges as patterns
from . import reference

ops = torch.ops.seqops
ACTIVATIONS = ("softmax", "laplace", "relu2")
FAR = 1 << 40  # more positions than any sequence has: sizes are cut to it before they are added to


# ---- checks


def check_heads(op: str, q: Tensor, k: Tensor, v: Tensor, *, same_length: bool = True) -> None:
    """q [B, T, H, D]; k, v [B, T, Hk, D] (or, not same_length, of another T) where Hk divides H."""
    shape = validate.shape_of(q)
    validate.expect(q.ndim == 4, op, "q", "4 dimensions [B, T, H, D]", f"shape {shape}")
    validate.check_type(op, "q", q, validate.STORAGE)
    validate.expect(q.shape[2] >= 1 and q.shape[3] >= 1, op, "q", "at least 1 head and 1 channel", f"shape {shape}")
    B, T, H, D = q.shape
    validate.check_device(op, "k", k, "q", q)
    validate.check_type(op, "k", k, (q.dtype,))
    got = validate.shape_of(k)
    letters = f"[B, T, Hk, D] = [{B}, {T}, Hk, {D}]" if same_length else f"[B, Tk, Hk, D] = [{B}, Tk, Hk, {D}]"
    fits = k.ndim == 4 and k.shape[0] == B and k.shape[3] == D and (not same_length or k.shape[1] == T)
    validate.expect(fits, op, "k", letters, got)
    validate.expect(
        k.shape[2] >= 1 and H % k.shape[2] == 0, op, "k", f"a number of heads that divides q's {H}", f"shape {got}"
    )
    validate.check_device(op, "v", v, "q", q)
    validate.check_type(op, "v", v, (q.dtype,))
    validate.check_shape(op, "v", v, "[B, T, Hk, D]" if same_length else "[B, Tk, Hk, D]", k.shape)


def check_at_least(op: str, name: str, value: int, least: int) -> None:
    validate.expect(value >= least, op, name, f"an integer >= {least}", str(value))


def check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    validate.expect(value in choices, op, name, f"one of {', '.join(choices)}", repr(value))


def check_ranges(op: str, name: str, ranges: Tensor, q: Tensor, letter: str, owners: int) -> None:
    validate.check_device(op, name, ranges, "q", q)
    validate.check_type(op, name, ranges, (torch.int32,))
    B, _, H, _ = q.shape
    fits = ranges.ndim == 5 and ranges.shape[0] in (1, B) and ranges.shape[1] in (1, H) and ranges.shape[2] >= 1
    fits = fits and ranges.shape[3] == 2 and ranges.shape[4] == owners
    expected = f"[B or 1, H or 1, P, 2, {letter}] = [{B} or 1, {H} or 1, P, 2, {owners}]"
    validate.expect(fits, op, name, expected, validate.shape_of(ranges))


def check_second(op: str, q: Tensor, k: Tensor, k2: Tensor | None, v2: Tensor | None, ranges2: Tensor | None) -> None:
    if k2 is None and v2 is None and ranges2 is None:
        return
    if k2 is None or v2 is None or ranges2 is None:
        got = ["None" if t is None else "a tensor" for t in (k2, v2, ranges2)]
        validate.expect(False, op, "k2", "k2, v2 and ranges2 together", f"{got[0]}, {got[1]} and {got[2]}")
    B, D = q.shape[0], q.shape[3]
    validate.check_device(op, "k2", k2, "q", q)
    validate.check_type(op, "k2", k2, (q.dtype,))
    got = validate.shape_of(k2)
    fits = k2.ndim == 4 and k2.shape[0] == B and k2.shape[3] == D
    validate.expect(fits, op, "k2", f"[B, S, Hk, D] = [{B}, S, Hk, {D}]", got)
    heads = k.shape[2]
    validate.expect(k2.shape[2] == heads, op, "k2", f"k's {heads} heads", f"shape {got}")
    validate.check_device(op, "v2", v2, "q", q)
    validate.check_type(op, "v2", v2, (q.dtype,))
    validate.check_shape(op, "v2", v2, "[B, S, Hk, D]", k2.shape)
    check_ranges(op, "ranges2", ranges2, q, "Tq", q.shape[1])


def check_range_bias(op: str, bias: Tensor | None, q: Tensor, k2: Tensor | None) -> None:
    if bias is None:
        return
    validate.expect(k2 is None, op, "bias", "None with k2", "a tensor")
    validate.check_device(op, "bias", bias, "q", q)
    validate.check_dtype(op, "bias", bias, q.dtype)
    H = q.shape[2]
    square = bias.ndim == 3 and bias.shape[1] == bias.shape[2] and bias.shape[1] >= 1
    fits = square or (bias.ndim == 2 and bias.shape[1] % 2 == 1)
    expected = f"[1 or H, 2 C - 1] or [1 or H, C, C] with H = {H}"
    validate.expect(fits and bias.shape[0] in (1, H), op, "bias", expected, validate.shape_of(bias))


def check_range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    ranges2: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
    op: str = "range_attention",
) -> None:
    check_heads(op, q, k, v, same_length=False)
    check_ranges(op, "ranges", ranges, q, "Tq", q.shape[1])
    check_second(op, q, k, k2, v2, ranges2)
    check_range_bias(op, bias, q, k2)
    check_choice(op, "activation", activation, ACTIVATIONS)


def check_range_attention_backward(
    grad_o: Tensor | None,
    grad_lse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    seen: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    ranges2: Tensor | None,
    seen2: Tensor | None,
    bias: Tensor | None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
    bias_gradient: bool = True,
) -> None:
    op = "range_attention_backward"
    check_range_attention(q, k, v, ranges, k2, v2, ranges2, bias, scale=scale, activation=activation, op=op)
    (B, T, H, _), real = q.shape, validate.real_of(q.dtype)
    for name, t, dtype, letters, shape in (
        ("grad_o", grad_o, q.dtype, "[B, Tq, H, D]", q.shape),
        ("grad_lse", grad_lse, real, "[B, H, Tq]", (B, H, T)),
        ("o", o, q.dtype, "[B, Tq, H, D]", q.shape),
        ("lse", lse, real, "[B, H, Tq]", (B, H, T)),
    ):
        if t is not None:
            validate.check_device(op, name, t, "q", q)
            validate.check_type(op, name, t, (dtype,))
            validate.check_shape(op, name, t, letters, shape)
    check_ranges(op, "seen", seen, q, "Tk", k.shape[1])
    given = "None" if seen2 is None else "a tensor"
    validate.expect((seen2 is None) == (k2 is None), op, "seen2", "one where there is k2", given)
    if k2 is not None and seen2 is not None:
        check_ranges(op, "seen2", seen2, q, "S", k2.shape[1])


# ---- shapes, for tensors without data


def range_attention_shapes(q: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    check_range_attention(q, *args, **options)
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=validate.real_of(q.dtype))


def range_attention_backward_shapes(*args: Any, bias_gradient: bool = True, **options: Any) -> tuple[Tensor, ...]:
    check_range_attention_backward(*args, bias_gradient=bias_gradient, **options)
    _, _, _, _, q, k, v, _, _, k2, v2, _, _, bias = args
    second = [q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (k2, v2)]
    if bias is None or not bias_gradient:
        dbias = q.new_empty(0, dtype=validate.real_of(q.dtype))
    else:
        dbias = bias.new_empty(bias.shape)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), *second, dbias)


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.activation = inputs
    ctx.save_for_backward(*outputs, *tensors)


def formula(
    ctx: Any, saved: tuple[Any, ...], grad_o: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if ctx.activation != "softmax":
        grad_lse = None
    if grad_o is None and grad_lse is None:
        return (None,) * 10
    o, lse, q, k, v, ranges, k2, v2, ranges2, bias = saved
    seen = patterns.seen_by(ranges, k.shape[1])
    seen2 = None if k2 is None else patterns.seen_by(ranges2, k2.shape[1])
    options = {"scale": ctx.scale, "activation": ctx.activation, "bias_gradient": ctx.needs_input_grad[7]}
    dq, dk, dv, dk2, dv2, dbias = ops.range_attention_backward(
        grad_o, grad_lse, o, lse, q, k, v, ranges, seen, k2, v2, ranges2, seen2, bias, **options
    )
    dk2, dv2 = (None, None) if k2 is None else (dk2, dv2)
    dbias = dbias if ctx.needs_input_grad[7] else None
    return dq, dk, dv, None, dk2, dv2, None, dbias, None, None


# ---- vmap: the mapped dimension joins the batch; with a bias, which all rows share, the calls are made one by one


def vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    arguments = op._schema.arguments
    names = [argument.name for argument in arguments]
    positional = sum(not argument.kwarg_only for argument in arguments)
    patterns_of = ("ranges", "ranges2", "seen", "seen2")

    def call(flat: list[Any]) -> tuple[Tensor, ...]:
        return op(*flat[:positional], **dict(zip(names[positional:], flat[positional:], strict=True)))

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        given = dict(zip(names, zip(flat, in_dims, strict=True), strict=True))
        if given["bias"][0] is not None:
            return one_by_one(size, in_dims, flat)
        q, dim = given["q"]
        rows = q.shape[0] if dim is None else q.movedim(dim, 0).shape[1]

        def join(name: str, value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            if name in patterns_of:
                if dim is None and value.shape[0] == 1:
                    return value
                value = value if dim is None else value.movedim(dim, 0)
                value = value.expand(*value.shape[:-5], rows, *value.shape[-4:])
                return register.fold(value, None if dim is None else 0, size, 0)
            return register.fold(value, dim, size, 0)

        outputs = call([join(name, *item) for name, item in given.items()])
        split, dims = [], []
        for output in outputs:
            empty = output.ndim == 1
            split.append(output if empty else output.unflatten(0, (size, rows)))
            dims.append(None if empty else 0)
        return tuple(split), tuple(dims)

    def one_by_one(size: int, in_dims: tuple[int | None, ...], flat: tuple[Any, ...]) -> Any:
        runs = [
            call([v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
            for i in range(size)
        ]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])

    return rule


# ---- registration


def checked_reference(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    check_range_attention(*args, **options)
    return reference.range_attention(*args, **options)


def register_operator(
    name: str, shapes: Callable[..., tuple[Tensor, ...]], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    """An operator with kernels of its own, in C++ and in Triton."""
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton",))
    return operator


def register_all() -> None:
    public = register_operator("range_attention", range_attention_shapes, check_range_attention)
    backend.provide("range_attention", "reference", checked_reference)
    register.register_autograd(public, save=save, backward=formula)
    register.register_autocast(public, ("q", "k", "v", "k2", "v2"))
    backward = register_operator(
        "range_attention_backward", range_attention_backward_shapes, check_range_attention_backward, "range_attention"
    )
    register.refuse_second_derivative(backward, public)


register_all()


# ---- public function


def check_order(name: str, ranges: Tensor | None) -> None:
    """Neither bound of a part may decrease, where values can be looked at cheaply."""
    if torch.compiler.is_compiling() or ranges is None:
        return
    if not validate.has_data(ranges) or ranges.ndim != 5 or ranges.dtype != torch.int32:
        return
    falls = (ranges[..., 1:] < ranges[..., :-1]).nonzero()
    if len(falls):
        *at, bound, t = falls[0].tolist()
        got = f"{ranges[(*at, bound, t + 1)]} after {ranges[(*at, bound, t)]} at query {t + 1} of {[*at, bound]}"
        validate.expect(False, "range_attention", name, "bounds that do not decrease", got)


def range_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    ranges2: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: float | None = None,
    activation: str = "softmax",
) -> tuple[Tensor, Tensor]:
    """Attention in which each query sees ranges of keys: any pattern that is a few ranges a query, in linear memory.

        s_ij = scale <q_i, k_j> + bias;  lse_i = log sum_j exp s_ij;  o_i = sum_j exp(s_ij - lse_i) v_j

    summed over the parts p of a pattern and, in each, over `ranges[.., p, 0, i] <= j < ranges[.., p, 1, i]`. A key in
    several parts counts as often. A window of 128 keys that ends at the query, and the first 4 keys of all, are

        i = torch.arange(T, dtype=torch.int32)
        window = torch.stack([(i - 127).clamp(min=0), i + 1])
        sinks = torch.stack([torch.zeros_like(i), (i - 127).clamp(0, 4)])  # those that the window has left behind
        o, lse = seqops.range_attention(q, k, v, torch.stack([window, sinks])[None, None])

    Args:
        q: [B, Tq, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, Tk, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        ranges: [B or 1, H or 1, P, 2, Tq] int32: P parts, of each the first key that a query sees and the one after
            the last. From a query to the next neither may decrease (this is looked at on the CPU); a part that is empty
            for a query has both equal, at a place that keeps the order. What lies outside 0 .. Tk is cut off.
        k2, v2, ranges2: a second source [B, S, Hk, D] of keys and values, and the ranges of it: part of the same
            softmax. For keys that are not in k: summaries, or rows gathered from k.
        bias: added to the scores, of places i and j counted from the start of the query's first range (of batch row and
            head 0): by pairs of places [1 or H, C, C], or by their distance [1 or H, 2 C - 1], entry `C - 1 + j - i`.
            In the dtype of q or, where that has 16 bits, in float32. Not with k2.
        scale: a number; None is D**-0.5.
        activation: "softmax"; or, without a normaliser, `o_i = sum_j P(s_ij) v_j` with "laplace", `P(s) = (1 + erf((s -
            sqrt(1/2)) sqrt(2 pi))) / 2`, or "relu2", `P(s) = max(s, 0)^2`; lse is then 0, without a gradient.

    Returns:
        o [B, Tq, H, D] in the dtype of q, and lse [B, H, Tq] in float32 (float64 for float64), natural,
        differentiable. A query that sees nothing has o = 0 and lse = -inf.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps the inputs, o and lse.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> i = torch.arange(100, dtype=torch.int32)
        >>> last_ten = torch.stack([(i - 9).clamp(min=0), i + 1])
        >>> o, lse = seqops.range_attention(q, k, v, last_ten[None, None, None])
        >>> o.shape, lse.shape
        (torch.Size([2, 100, 4, 16]), torch.Size([2, 4, 100]))

    Dao et al., "FlashAttention: fast and memory-efficient exact attention with IO-awareness", 2022.
    """
    check_order("ranges", ranges)
    check_order("ranges2", ranges2)
    return ops.range_attention(q, k, v, ranges, k2, v2, ranges2, bias, scale=scale, activation=activation)
