"""Linear attention: shapes, gradient formula, transforms, and the public function.

    linear_attention            (q [B, T, H, K], k [B, T, H, K], v [B, T, H, V], log_decay, initial_state [B, H, K, V],
                                 *, scale, causal, window, cu_seqlens) -> (o [B, T, H, V], final_state [B, H, K, V])
    linear_attention_backward   (grad_o [B, T, H, V] or None, dfinal_state [B, H, K, V] or None, q, k, v, log_decay,
                                 initial_state, *, scale, causal, window, cu_seqlens)
                                -> (dq, dk, dv, dlog_decay, dinitial_state)

`log_decay` is None, [H], [B, T, H] or [B, T, H, K], and its gradient has its shape and dtype; without one `dlog_decay`
is empty, [0]. With cu_seqlens states lead with N. States and their gradients are float32, or float64 for float64;
`dinitial_state` is always there (zeros with a window). Letters: B batch, T time, H heads, K key width, V value width, N
packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate

ops = torch.ops.seqops


# ---- checks and shapes, for tensors without data


def rows_of(like: Tensor, cu_seqlens: Tensor | None) -> int:
    return like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_sequences(op: str, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> None:
    shape = validate.shape_of(q)
    validate.expect(q.ndim == 4, op, "q", "4 dimensions [B, T, H, K]", f"shape {shape}")
    validate.check_type(op, "q", q, validate.STORAGE)
    validate.expect(q.shape[2] >= 1 and q.shape[3] >= 1, op, "q", "at least 1 head and 1 channel", f"shape {shape}")
    validate.check_device(op, "k", k, "q", q)
    validate.check_type(op, "k", k, (q.dtype,))
    validate.check_shape(op, "k", k, "[B, T, H, K]", q.shape)
    validate.check_device(op, "v", v, "q", q)
    validate.check_type(op, "v", v, (q.dtype,))
    shape = validate.shape_of(v)
    validate.expect(v.ndim == 4, op, "v", "4 dimensions [B, T, H, V]", f"shape {shape}")
    sizes = ", ".join(str(size) for size in q.shape[:3])
    validate.expect(v.shape[:3] == q.shape[:3], op, "v", f"[B, T, H] = [{sizes}] in front", shape)
    validate.expect(v.shape[3] >= 1, op, "v", "at least 1 channel", f"shape {shape}")
    if log_decay is not None:
        check_decay(op, q, log_decay)


def check_decay(op: str, q: Tensor, log_decay: Tensor) -> None:
    validate.check_device(op, "log_decay", log_decay, "q", q)
    allowed = [torch.bfloat16, torch.float16, torch.float32]
    validate.check_type(op, "log_decay", log_decay, allowed + ([q.dtype] if q.dtype == torch.float64 else []))
    B, T, H, K = q.shape
    # By its rank: comparing shapes of other ranks would make a compiled graph depend on sizes being unequal.
    shape = {1: (H,), 3: (B, T, H), 4: (B, T, H, K)}.get(log_decay.ndim)
    fits = shape is not None and all(got == size for got, size in zip(log_decay.shape, shape, strict=True))
    expected = f"[H] = [{H}], [B, T, H] = [{B}, {T}, {H}] or [B, T, H, K] = [{B}, {T}, {H}, {K}]"
    validate.expect(fits, op, "log_decay", expected, validate.shape_of(log_decay))


def check_state(op: str, name: str, state: Tensor | None, q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if state is None:
        return
    validate.check_device(op, name, state, "q", q)
    letters = "[B, H, K, V]" if cu_seqlens is None else "[N, H, K, V]"
    validate.check_shape(op, name, state, letters, (rows_of(q, cu_seqlens), *q.shape[2:], v.shape[3]))
    validate.check_type(op, name, state, (q.dtype, validate.real_of(q.dtype)))


def check_options(
    op: str, log_decay: Tensor | None, initial_state: Tensor | None, causal: bool, window: int | None
) -> None:
    if not causal:
        validate.expect(log_decay is None, op, "log_decay", "None where causal is False", "a tensor")
        validate.expect(window is None, op, "window", "None where causal is False", str(window))
    if window is not None:
        validate.expect(window >= 1, op, "window", "an integer >= 1", str(window))
        validate.expect(initial_state is None, op, "initial_state", "None with a window", "a tensor")


def check_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    op: str = "linear_attention",
) -> None:
    check_sequences(op, q, k, v, log_decay)
    check_options(op, log_decay, initial_state, causal, window)
    validate.check_cu_seqlens(op, cu_seqlens, "q", q)
    check_state(op, "initial_state", initial_state, q, v, cu_seqlens)


def linear_attention_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    check_linear_attention(q, k, v, log_decay, initial_state, **options)
    rows = rows_of(q, options.get("cu_seqlens"))
    state = q.new_empty(rows, *q.shape[2:], v.shape[3], dtype=validate.real_of(q.dtype))
    return v.new_empty(v.shape), state


def check_linear_attention_backward(
    grad_o: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "linear_attention_backward"
    check_linear_attention(
        q, k, v, log_decay, initial_state, causal=causal, window=window, cu_seqlens=cu_seqlens, op=op
    )
    if grad_o is not None:
        validate.check_device(op, "grad_o", grad_o, "q", q)
        validate.check_type(op, "grad_o", grad_o, (v.dtype,))
        validate.check_shape(op, "grad_o", grad_o, "[B, T, H, V]", v.shape)
    check_state(op, "dfinal_state", dfinal_state, q, v, cu_seqlens)


def linear_attention_backward_shapes(
    grad_o: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    check_linear_attention_backward(grad_o, dfinal_state, q, k, v, log_decay, initial_state, **options)
    real = validate.real_of(q.dtype)
    state = q.new_empty(rows_of(q, options.get("cu_seqlens")), *q.shape[2:], v.shape[3], dtype=real)
    decay = q.new_empty(0, dtype=real) if log_decay is None else log_decay.new_empty(log_decay.shape)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), decay, state)


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, ctx.causal, ctx.window, cu_seqlens = inputs
    ctx.save_for_backward(*tensors, cu_seqlens)


def formula(
    ctx: Any, saved: tuple[Any, ...], grad_o: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_o is None and dfinal_state is None:
        return (None,) * 9
    *tensors, cu_seqlens = saved
    _, _, _, log_decay, initial_state = tensors
    options = {"scale": ctx.scale, "causal": ctx.causal, "window": ctx.window, "cu_seqlens": cu_seqlens}
    dq, dk, dv, dlog_decay, dstate = ops.linear_attention_backward(grad_o, dfinal_state, *tensors, **options)
    dlog_decay = None if log_decay is None else dlog_decay
    dstate = None if initial_state is None else dstate.to(initial_state.dtype)
    return dq, dk, dv, dlog_decay, dstate, None, None, None, None


# ---- vmap: the mapped dimension joins the heads


OPTIONS = ("scale", "causal", "window", "cu_seqlens")


def call(op: torch._ops.OpOverload, flat: list[Any]) -> tuple[Tensor, ...]:
    """With all arguments in the order of the schema; the options are the last and have names."""
    return op(*flat[:-4], **dict(zip(OPTIONS, flat[-4:], strict=True)))


def one_by_one(
    op: torch._ops.OpOverload, size: int, in_dims: tuple[int | None, ...], flat: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """For packed sequences that differ between the mapped calls."""
    runs = [
        call(op, [v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
        for i in range(size)
    ]
    return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])


def vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]
    results = [argument.name for argument in op._schema.returns]

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        if in_dims[-1] is not None:
            return one_by_one(op, size, in_dims, flat)
        decay, dim = next((v, d) for name, v, d in zip(names, flat, in_dims, strict=True) if name == "log_decay")
        shared_in_time = decay is not None and decay.ndim - (dim is not None) == 1
        # Where the heads are, without the mapped dimension.
        at = {"initial_state": 1, "dfinal_state": 1, "final_state": 1, "dinitial_state": 1}
        at |= {"log_decay": 0, "dlog_decay": 0} if shared_in_time else {}

        def join(name: str, value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor) or name == "cu_seqlens":
                return value
            return register.fold(value, dim, size, at.get(name, 2))

        outputs = call(op, [join(*item) for item in zip(names, flat, in_dims, strict=True)])
        split, dims = [], []
        for name, output in zip(results, outputs, strict=True):
            where = at.get(name, 2)
            empty = name == "dlog_decay" and decay is None
            split.append(output if empty else output.unflatten(where, (size, output.shape[where] // size)))
            dims.append(None if empty else where)
        return tuple(split), tuple(dims)

    return rule


# ---- registration


def provide_reference(function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any kernel."""

    def checked(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        check_linear_attention(*args, **options)
        return function(*args, **options)

    backend.provide("linear_attention", "reference", checked)


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
    public = register_operator("linear_attention", linear_attention_shapes, check_linear_attention)
    register.register_autograd(public, save=save, backward=formula)
    backward = register_operator(
        "linear_attention_backward",
        linear_attention_backward_shapes,
        check_linear_attention_backward,
        "linear_attention",
    )
    register.refuse_second_derivative(backward, public)


register_all()


# ---- public function


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention: a state matrix of keys and values, decayed and added to at every step, that queries read.

        S_t = exp(g_t) S_{t-1} + k_t v_t^T;  o_t = scale S_t^T q_t

    Args:
        q, k: [B, T, H, K], queries and keys: float32, float64, bfloat16 or float16, any strides.
        v: [B, T, H, V], values, in the dtype of q.
        log_decay: g, of each head [H], of each head and step [B, T, H], or also of each key channel [B, T, H, K]; None
            is 0. Values above 0 count as 0, with no gradient; -inf is a reset, which lets nothing of the state before
            pass. Any floating dtype that is no more precise than the state.
        initial_state: [B, H, K, V], with cu_seqlens [N, H, K, V]: S before the first step, in the dtype of q or of the
            state; None is zero. Not with a window.
        scale: a number; None is K**-0.5.
        causal: False: every position reads the state after all of them, `o_t = scale S^T q_t`; without log_decay and
            window.
        window: only the last `window` positions count, position t itself among them.
        cu_seqlens: [N + 1] int32 or int64, from 0 to T without decrease: with B = 1, sequence n is the steps
            `cu_seqlens[n]:cu_seqlens[n + 1]` and independent of the others.

    Returns:
        o [B, T, H, V] in the dtype of v, and the state after the last step (with a window: of the last `window` steps),
        [B, H, K, V] or [N, H, K, V], in float32, or float64 for float64.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps q, k, v, log_decay and the initial state. States between chunks are computed again, and
    held for as many sequences and heads at a time as there are threads.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16, requires_grad=True) for _ in range(3))
        >>> o, state = seqops.linear_attention(q, k, v, -torch.rand(2, 100, 4))  # a decay of each token and head
        >>> o.sum().backward()
        >>> o, state = seqops.linear_attention(q[:, :1], k[:, :1], v[:, :1], initial_state=state)  # one step on
        >>> o.shape, state.shape
        (torch.Size([2, 1, 4, 16]), torch.Size([2, 4, 16, 16]))

    Katharopoulos et al., "Transformers are RNNs: fast autoregressive transformers with linear attention", 2020; Yang et
    al., "Gated linear attention transformers with hardware-efficient training", 2024.
    """
    return ops.linear_attention(
        q, k, v, log_decay, initial_state, scale=scale, causal=causal, window=window, cu_seqlens=cu_seqlens
    )
