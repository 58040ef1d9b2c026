"""Scans: shapes, gradient formulas, transforms, and the public functions.

    linear_scan, softmax_scan                    the public operators: results only
    softmax_scan_forward                         also m and u, which its backward reads; used where a gradient is wanted
    linear_scan_backward, softmax_scan_backward  all gradients

Letters: B batch, T time, C channels (any number of dimensions), H heads, D values of a head, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate

ops = torch.ops.seqops

SEQUENCES = (*validate.STORAGE, torch.complex64, torch.complex128)  # dtypes of x
WIDE = (torch.float64, torch.complex128)
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


# ---- linear_scan: checks and shapes, for tensors without data


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What the parts of a state are: float64 for float64 and complex128, else float32."""
    return torch.float64 if dtype in WIDE else torch.float32


def state_of(x: torch.dtype, a: torch.dtype) -> torch.dtype:
    real = real_of(x)
    return COMPLEX[real] if x.is_complex or a.is_complex else real


def check_gate(op: str, x: Tensor, a: Tensor) -> None:
    validate.check_device(op, "a", a, "x", x)
    fits = a.ndim == x.ndim and all(one == 1 or one == size for one, size in zip(a.shape, x.shape, strict=True))
    validate.expect(fits, op, "a", f"every dimension 1 or as in x {validate.shape_of(x)}", validate.shape_of(a))
    allowed = [torch.bfloat16, torch.float16, torch.float32]
    if x.dtype in WIDE:
        allowed += [torch.float64, torch.complex64, torch.complex128]
    elif real_of(x.dtype) == x.dtype or x.is_complex():
        allowed += [torch.complex64]
    validate.check_type(op, "a", a, allowed)


def check_linear_scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "linear_scan"
    shape = validate.shape_of(x)
    validate.expect(x.ndim >= 2, op, "x", "at least 2 dimensions [B, T, *C]", f"shape {shape}")
    validate.check_type(op, "x", x, SEQUENCES)
    channels = tuple(x.shape[2:])
    validate.expect(all(size >= 1 for size in channels), op, "x", "at least 1 channel", f"shape {shape}")
    check_gate(op, x, a)
    validate.check_cu_seqlens(op, cu_seqlens, "x", x)
    check_linear_state(op, "initial_state", initial_state, x, state_of(x.dtype, a.dtype), cu_seqlens)


def check_linear_state(
    op: str, name: str, state: Tensor | None, x: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None
) -> None:
    if state is None:
        return
    validate.check_device(op, name, state, "x", x)
    letters = "[B, *C]" if cu_seqlens is None else "[N, *C]"
    validate.check_shape(op, name, state, letters, (rows_of(x, cu_seqlens), *x.shape[2:]))
    validate.check_type(op, name, state, (x.dtype, real_of(x.dtype), dtype))


def rows_of(like: Tensor, cu_seqlens: Tensor | None) -> int:
    return like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def linear_scan_shapes(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_linear_scan(x, a, initial_state, reverse=reverse, cu_seqlens=cu_seqlens)
    state = state_of(x.dtype, a.dtype)
    final_state = x.new_empty(rows_of(x, cu_seqlens), *x.shape[2:], dtype=state)
    return x.new_empty(x.shape, dtype=state if state.is_complex else x.dtype), final_state


def check_linear_scan_backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "linear_scan_backward"
    validate.expect(dh is not None or h is not None, op, "dh", "a tensor where h is None", "None")
    like, name = (dh, "dh") if h is None else (h, "h")
    validate.expect(like.ndim >= 2, op, name, "at least 2 dimensions [B, T, *C]", f"shape {validate.shape_of(like)}")
    validate.check_type(op, name, like, SEQUENCES)
    check_gate(op, like, a)
    validate.check_cu_seqlens(op, cu_seqlens, name, like)
    if dh is not None and h is not None:
        validate.check_device(op, "dh", dh, "h", h)
        got = validate.shape_of(dh)
        validate.expect(tuple(dh.shape) == tuple(h.shape), op, "dh", f"h's shape {validate.shape_of(h)}", got)
        validate.check_type(op, "dh", dh, (h.dtype,))
    real = a.is_complex() and not like.is_complex()
    validate.expect(not real, op, name, "a complex dtype with complex a", validate.name_of(like.dtype))
    state = state_of(like.dtype, a.dtype)
    for argument, value in (("dfinal_state", dfinal_state), ("initial_state", initial_state)):
        check_linear_state(op, argument, value, like, state, cu_seqlens)


def linear_scan_backward_shapes(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_linear_scan_backward(dh, dfinal_state, a, h, initial_state, cu_seqlens=cu_seqlens)
    like = dh if h is None else h
    dinitial_state = like.new_empty(rows_of(like, cu_seqlens), *like.shape[2:], dtype=state_of(like.dtype, a.dtype))
    return like.new_empty(like.shape), a.new_empty(0 if h is None else a.shape), dinitial_state


# ---- softmax_scan: the same


def check_softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
    op: str = "softmax_scan",
) -> None:
    s_shape, v_shape = validate.shape_of(s), validate.shape_of(v)
    validate.expect(s.ndim == 3, op, "s", "3 dimensions [B, T, H]", f"shape {s_shape}")
    validate.expect(s.shape[2] >= 1, op, "s", "at least 1 head", f"shape {s_shape}")
    validate.check_device(op, "v", v, "s", s)
    validate.expect(v.ndim == 4, op, "v", "4 dimensions [B, T, H, D]", f"shape {v_shape}")
    fits = all(got == size for got, size in zip(v.shape[:3], s.shape, strict=True))
    validate.expect(fits, op, "v", f"[B, T, H] = {s_shape} in front", v_shape)
    validate.expect(v.shape[3] >= 1, op, "v", "at least 1 value a head", f"shape {v_shape}")
    validate.check_type(op, "v", v, validate.STORAGE)
    allowed = [torch.bfloat16, torch.float16, torch.float32]
    validate.check_type(op, "s", s, [*allowed, torch.float64] if v.dtype == torch.float64 else allowed)
    validate.check_cu_seqlens(op, cu_seqlens, "s", s)
    check_softmax_states(op, s, v, initial_lse, initial_out, cu_seqlens)


def check_softmax_states(
    op: str, s: Tensor, v: Tensor, initial_lse: Tensor | None, initial_out: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    if initial_lse is None and initial_out is None:
        return
    validate.expect(initial_out is not None, op, "initial_out", "together with initial_lse", "None")
    validate.expect(initial_lse is not None, op, "initial_lse", "together with initial_out", "None")
    rows, heads, width = rows_of(s, cu_seqlens), s.shape[2], v.shape[3]
    first = "B" if cu_seqlens is None else "N"
    real = validate.real_of(v.dtype)
    for name, state, letters, shape, dtype in (
        ("initial_lse", initial_lse, f"[{first}, H]", (rows, heads), s.dtype),
        ("initial_out", initial_out, f"[{first}, H, D]", (rows, heads, width), v.dtype),
    ):
        validate.check_device(op, name, state, "s", s)
        validate.check_shape(op, name, state, letters, shape)
        validate.check_type(op, name, state, (dtype, real))


def softmax_scan_shapes(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_softmax_scan(s, v, initial_lse, initial_out, reverse=reverse, cu_seqlens=cu_seqlens)
    return v.new_empty(v.shape), v.new_empty(s.shape, dtype=validate.real_of(v.dtype))


def softmax_scan_forward_shapes(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    o, lse = softmax_scan_shapes(*args, **options)
    return o, lse, torch.empty_like(lse), torch.empty_like(lse)


def check_softmax_scan_backward(
    grad_o: Tensor | None,
    grad_lse: Tensor | None,
    s: Tensor,
    v: Tensor,
    o: Tensor,
    m: Tensor,
    u: Tensor,
    initial_lse: Tensor | None,
    initial_out: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "softmax_scan_backward"
    check_softmax_scan(s, v, initial_lse, initial_out, cu_seqlens=cu_seqlens, op=op)
    real = validate.real_of(v.dtype)
    for name, value in (("grad_o", grad_o), ("grad_lse", grad_lse), ("o", o), ("m", m), ("u", u)):
        if value is not None:
            like = v if name in ("grad_o", "o") else s
            letters = "[B, T, H, D]" if like is v else "[B, T, H]"
            validate.check_device(op, name, value, "s", s)
            validate.check_type(op, name, value, (v.dtype if like is v else real,))
            validate.check_shape(op, name, value, letters, like.shape)


def softmax_scan_backward_shapes(
    grad_o: Tensor | None,
    grad_lse: Tensor | None,
    s: Tensor,
    v: Tensor,
    o: Tensor,
    m: Tensor,
    u: Tensor,
    initial_lse: Tensor | None,
    initial_out: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_softmax_scan_backward(grad_o, grad_lse, s, v, o, m, u, initial_lse, initial_out, cu_seqlens=cu_seqlens)
    rows, real = rows_of(s, cu_seqlens), validate.real_of(v.dtype)
    states = (v.new_empty(rows, s.shape[2], dtype=real), v.new_empty(rows, *v.shape[2:], dtype=real))
    return (s.new_empty(s.shape), v.new_empty(v.shape), *states)


# ---- the formulas


def linear_scan_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, a, initial_state, ctx.reverse, cu_seqlens = inputs
    wants_gate = ctx.needs_input_grad[1]
    ctx.real_x = not x.is_complex()
    ctx.state_dtype = None if initial_state is None else initial_state.dtype
    ctx.shape, ctx.dtype = outputs[0].shape, outputs[0].dtype
    ctx.save_for_backward(a, outputs[0] if wants_gate else None, initial_state if wants_gate else None, cu_seqlens)


def linear_scan_formula(
    ctx: Any, saved: tuple[Any, ...], dh: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    a, h, initial_state, cu_seqlens = saved
    if dh is None and dfinal_state is None:
        return None, None, None, None, None
    if dh is None and h is None:
        dh = dfinal_state.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
    dx, da, dinitial_state = ops.linear_scan_backward(
        dh, dfinal_state, a, h, initial_state, reverse=ctx.reverse, cu_seqlens=cu_seqlens
    )
    if ctx.real_x and dx.is_complex():
        dx = dx.real
    return dx, None if h is None else da, as_state(dinitial_state, ctx.state_dtype), None, None


def as_state(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The gradient of an initial state of this dtype; None: there was none."""
    if dtype is None:
        return None
    return (gradient.real if gradient.is_complex() and not dtype.is_complex else gradient).to(dtype)


def softmax_scan_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    s, v, initial_lse, initial_out, ctx.reverse, cu_seqlens = inputs
    o, _, m, u = outputs
    ctx.mark_non_differentiable(m, u)
    ctx.save_for_backward(s, v, o, m, u, initial_lse, initial_out, cu_seqlens)


def softmax_scan_formula(
    ctx: Any, saved: tuple[Any, ...], grad_o: Tensor | None, grad_lse: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if grad_o is None and grad_lse is None:
        return (None,) * 6
    *tensors, cu_seqlens = saved
    ds, dv, *dstates = ops.softmax_scan_backward(grad_o, grad_lse, *tensors, reverse=ctx.reverse, cu_seqlens=cu_seqlens)
    states = (
        as_state(gradient, None if state is None else state.dtype)
        for gradient, state in zip(dstates, tensors[-2:], strict=True)
    )
    return (ds, dv, *states, None, None)


# ---- vmap: the mapped dimension becomes one of the channels or heads, which leaves time alone


def one_by_one(
    op: torch._ops.OpOverload, size: int, in_dims: tuple[int | None, ...], flat: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """For packed sequences that differ between the mapped calls."""
    runs = [
        call(op, [v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
        for i in range(size)
    ]
    return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])


def call(op: torch._ops.OpOverload, flat: list[Any]) -> tuple[Tensor, ...]:
    """With all arguments in the order of the schema; `reverse` and `cu_seqlens` are the last and have names."""
    return op(*flat[:-2], reverse=flat[-2], cu_seqlens=flat[-1])


def linear_scan_vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Sequences [B, T, *C] become [B, T, size, *C], states [B, *C] become [B, size, *C]."""
    names = [argument.name for argument in op._schema.arguments]
    states = {"initial_state", "dfinal_state"}
    backward = "h" in names

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        if in_dims[-1] is not None:
            return one_by_one(op, size, in_dims, flat)
        wants_gate = not backward or flat[names.index("h")] is not None

        def join(name: str, value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor) or name == "cu_seqlens":
                return value
            at = 1 if name in states else 2
            if dim is not None:
                return value.movedim(dim, at)
            value = value.unsqueeze(at)
            # A gate may be shared by all calls, but each call has a gradient of its own.
            shared = name == "a" and not (backward and wants_gate)
            return value if shared else value.expand(*value.shape[:at], size, *value.shape[at + 1 :])

        outputs = call(op, [join(*item) for item in zip(names, flat, in_dims, strict=True)])
        if not backward:
            return outputs, (2, 1)
        return outputs, (2, 2 if wants_gate else None, 1)

    return rule


def softmax_scan_vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The mapped dimension joins the heads."""
    names = [argument.name for argument in op._schema.arguments]
    states = {"initial_lse", "initial_out"}
    results = [argument.name for argument in op._schema.returns]

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        if in_dims[-1] is not None:
            return one_by_one(op, size, in_dims, flat)

        def join(name: str, value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor) or name == "cu_seqlens":
                return value
            return register.fold(value, dim, size, 1 if name in states else 2)

        outputs = call(op, [join(*item) for item in zip(names, flat, in_dims, strict=True)])
        at = [1 if name.startswith("dinitial") else 2 for name in results]
        split = tuple(o.unflatten(i, (size, o.shape[i] // size)) for o, i in zip(outputs, at, strict=True))
        return split, tuple(at)

    return rule


# ---- registration


def provide_reference(
    op: str, function: Callable[..., tuple[Tensor, ...]], check: Callable[..., None] | None = None
) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any kernel."""
    check = check or CHECKS[op]

    def checked(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        check(*args, **options)
        return function(*args, **options)

    backend.provide(op, "reference", checked)


CHECKS = {"linear_scan": check_linear_scan, "softmax_scan": check_softmax_scan}


def register_operator(
    name: str,
    shapes: Callable[..., tuple[Tensor, ...]],
    vmap: Callable[..., Any],
    check: Callable[..., None],
    part_of: str | None = None,
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of)
    return operator


def register_all() -> None:
    public = register_operator("linear_scan", linear_scan_shapes, linear_scan_vmap, check_linear_scan)
    register.register_autograd(public, save=linear_scan_save, backward=linear_scan_formula)
    backward = register_operator(
        "linear_scan_backward",
        linear_scan_backward_shapes,
        linear_scan_vmap,
        check_linear_scan_backward,
        "linear_scan",
    )
    register.refuse_second_derivative(backward, public)

    public = register_operator("softmax_scan", softmax_scan_shapes, softmax_scan_vmap, check_softmax_scan)
    training = register_operator(
        "softmax_scan_forward", softmax_scan_forward_shapes, softmax_scan_vmap, check_softmax_scan, "softmax_scan"
    )
    formula = register.register_autograd(training, save=softmax_scan_save, backward=softmax_scan_formula)
    register.register_training(public, formula)
    backward = register_operator(
        "softmax_scan_backward",
        softmax_scan_backward_shapes,
        softmax_scan_vmap,
        check_softmax_scan_backward,
        "softmax_scan",
    )
    register.refuse_second_derivative(backward, public)


register_all()


# ---- public functions


def linear_scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear recurrence over time, each channel by itself, real or complex.

        h_t = a_t h_{t-1} + x_t

    Where `a_t` is exactly 0 the recurrence starts anew: `h_t = x_t`, even if `h_{t-1}` is infinite or NaN.

    Args:
        x: [B, T, *C], any number of channel dimensions. float32, float64, bfloat16, float16, complex64 or complex128,
            any strides.
        a: the gate, of x's rank; each dimension is x's or 1. A size of 1 is read as such, never expanded: a gate that
            is constant in time is [1, 1, *C], one for each head [B, T, H, 1]. Any floating dtype that is no more
            precise than the state; complex with x of 32 bits or more.
        initial_state: [B, *C], with cu_seqlens [N, *C]: h before the first step, in x's dtype, the state's, or real
            where that is complex; None is zero.
        reverse: from the last step to the first: the initial state enters at T - 1, the final one is that of step 0.
        cu_seqlens: [N + 1] int32 or int64, from 0 to T without decrease: with B = 1, sequence n is the steps
            `cu_seqlens[n]:cu_seqlens[n + 1]` and independent of the others.

    Returns:
        h [B, T, *C] in the dtype of x (complex if a is), and the state after the last step, [B, *C] or [N, *C], in the
        dtype of the state: float32, or float64 for float64, complex if h is.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps a, and h and the initial state if a's gradient is wanted too.

    Example:
        >>> h, last = seqops.linear_scan(torch.ones(1, 4, 1), torch.full((1, 1, 1), 0.5))
        >>> h.flatten().tolist()
        [1.0, 1.5, 1.75, 1.875]
        >>> seqops.linear_scan(torch.ones(1, 1, 1), torch.full((1, 1, 1), 0.5), last)[0].item()  # one step on
        1.9375

    Blelloch, "Prefix sums and their applications", 1990; Martin and Cundy, "Parallelizing linear recurrent neural nets
    over sequence length", 2018.
    """
    return ops.linear_scan(x, a, initial_state, reverse=reverse, cu_seqlens=cu_seqlens)


def softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax average of everything so far, at every step: attention with one query, as a recurrence.

        o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i};  lse_t = log sum_{i<=t} e^{s_i}

    A score of -inf means that the step is absent: its value does not count, even if it is NaN. While all are absent,
    o = 0 and lse = -inf.

    Args:
        s: [B, T, H], the scores: any floating dtype that is no more precise than lse.
        v: [B, T, H, D], the values: float32, float64, bfloat16 or float16, any strides.
        initial_lse, initial_out: [B, H] and [B, H, D], with cu_seqlens [N, H] and [N, H, D]: lse and o of the steps
            before the first, both or neither, in the dtype of s or v, or of lse.
        reverse: from the last step to the first.
        cu_seqlens: as for `linear_scan`.

    Returns:
        o [B, T, H, D] in the dtype of v, and lse [B, T, H]: float32, or float64 for float64. Those of the last step are
        the state with which a following piece begins.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as for `linear_scan`.

    Memory: a gradient keeps s, v, o, and two numbers of lse's dtype for each step and head.

    Example:
        >>> scores, values = torch.zeros(1, 4, 1), torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1, 1)
        >>> o, lse = seqops.softmax_scan(scores, values)  # equal scores: the mean of all values so far
        >>> [round(mean, 4) for mean in o.flatten().tolist()]
        [1.0, 2.0, 3.0, 4.0]

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Feng et al., "Attention as an RNN", 2024.
    """
    return ops.softmax_scan(s, v, initial_lse, initial_out, reverse=reverse, cu_seqlens=cu_seqlens)
