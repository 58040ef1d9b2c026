"""causal_conv1d: shapes, gradient formula, transforms, and the public function.

Letters: B batch, T time, D channels, W taps, S = (W - 1) dilation steps of state, N packed sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate

ops = torch.ops.seqops

# Which dimension of an argument or a result the channels are.
CHANNELS = {
    **dict.fromkeys(("x", "y", "dx", "dy", "initial_state", "final_state", "dinitial_state", "dfinal_state"), 2),
    **dict.fromkeys(("weight", "bias", "dweight", "dbias"), 0),
}


# ---- checks and shapes, for tensors without data


def rows_of(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def state_steps(weight: Tensor, dilation: int) -> int:
    return (weight.shape[1] - 1) * dilation


def check_like_x(op: str, name: str, t: Tensor, x: Tensor, letters: str, sizes: Sequence[int], wide: bool) -> None:
    """A tensor beside x: of x's dtype or, where `wide`, of the dtype that x is computed in."""
    validate.check_device(op, name, t, "x", x)
    validate.check_shape(op, name, t, letters, sizes)
    validate.check_type(op, name, t, (x.dtype, validate.real_of(x.dtype) if wide else x.dtype))


def check_causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    op: str = "causal_conv1d",
) -> None:
    shape = validate.shape_of(x)
    validate.expect(x.ndim == 3, op, "x", "3 dimensions [B, T, D]", f"shape {shape}")
    validate.check_type(op, "x", x, validate.STORAGE)
    validate.expect(x.shape[2] >= 1, op, "x", "at least 1 channel", f"shape {shape}")
    channels, storage = x.shape[2], (x.dtype, validate.real_of(x.dtype))
    validate.check_device(op, "weight", weight, "x", x)
    good = weight.ndim == 2 and weight.shape[0] == channels and weight.shape[1] >= 1
    validate.expect(good, op, "weight", f"[D, W] with D = {channels} and W >= 1", validate.shape_of(weight))
    validate.check_type(op, "weight", weight, storage)
    if bias is not None:
        check_like_x(op, "bias", bias, x, "[D]", (channels,), True)
    validate.expect(dilation >= 1, op, "dilation", "an integer >= 1", str(dilation))
    limit = "(W - 1) * dilation below 2**40"
    validate.expect(dilation <= 2**40 // weight.shape[1], op, "dilation", limit, str(dilation))
    validate.expect(activation in (None, "silu"), op, "activation", "None or 'silu'", f"'{activation}'")
    validate.check_cu_seqlens(op, cu_seqlens, "x", x)
    check_state(op, "initial_state", initial_state, x, weight, dilation, cu_seqlens)


def check_state(
    op: str, name: str, state: Tensor | None, x: Tensor, weight: Tensor, dilation: int, cu_seqlens: Tensor | None
) -> None:
    if state is not None:
        letters = "[B, (W - 1) * dilation, D]" if cu_seqlens is None else "[N, (W - 1) * dilation, D]"
        sizes = (rows_of(x, cu_seqlens), state_steps(weight, dilation), x.shape[2])
        check_like_x(op, name, state, x, letters, sizes, False)


def causal_conv1d_shapes(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_causal_conv1d(x, weight, bias, initial_state, dilation=dilation, activation=activation, cu_seqlens=cu_seqlens)
    return x.new_empty(x.shape), x.new_empty(rows_of(x, cu_seqlens), state_steps(weight, dilation), x.shape[2])


def check_causal_conv1d_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "causal_conv1d_backward"
    options: dict[str, Any] = {"dilation": dilation, "activation": activation, "cu_seqlens": cu_seqlens}
    check_causal_conv1d(x, weight, bias, initial_state, op=op, **options)
    if dy is not None:
        check_like_x(op, "dy", dy, x, "[B, T, D]", x.shape, False)
    check_state(op, "dfinal_state", dfinal_state, x, weight, dilation, cu_seqlens)


def causal_conv1d_backward_shapes(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    check_causal_conv1d_backward(dy, dfinal_state, x, weight, bias, initial_state, **options)
    dbias = x.new_empty(0, dtype=validate.real_of(x.dtype)) if bias is None else bias.new_empty(bias.shape)
    dinitial_state = x.new_empty(0 if initial_state is None else initial_state.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dinitial_state


# ---- the formula


def causal_conv1d_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    x, weight, bias, initial_state, ctx.dilation, ctx.activation, cu_seqlens = inputs
    ctx.save_for_backward(x, weight, bias, initial_state, cu_seqlens)


def causal_conv1d_formula(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dfinal_state: Tensor | None
) -> tuple[Tensor | None, ...]:
    if dy is None and dfinal_state is None:
        return (None,) * 7
    *tensors, cu_seqlens = saved
    options = {"dilation": ctx.dilation, "activation": ctx.activation, "cu_seqlens": cu_seqlens}
    dx, dweight, dbias, dinitial_state = ops.causal_conv1d_backward(dy, dfinal_state, *tensors, **options)
    _, _, bias, initial_state = tensors
    return (
        dx,
        dweight,
        None if bias is None else dbias,
        None if initial_state is None else dinitial_state,
        None,
        None,
        None,
    )


# ---- vmap: the mapped dimension joins the channels, which leaves the batch to packed sequences and sums over it alone


def causal_conv1d_vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]
    results = [argument.name for argument in op._schema.returns]
    options = [argument.name for argument in op._schema.arguments if argument.kwarg_only]

    def call(flat: Sequence[Any]) -> tuple[Tensor, ...]:
        split = len(flat) - len(options)
        return op(*flat[:split], **dict(zip(options, flat[split:], strict=True)))

    def one_by_one(size: int, in_dims: Sequence[int | None], flat: Sequence[Any]) -> Any:
        """For packed sequences that differ between the mapped calls."""
        runs = [
            call([v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
            for i in range(size)
        ]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(results)

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        if in_dims[-1] is not None:
            return one_by_one(size, in_dims, flat)
        joined = [
            register.fold(value, dim, size, CHANNELS[name]) if name in CHANNELS and value is not None else value
            for name, value, dim in zip(names, flat, in_dims, strict=True)
        ]
        given = dict(zip(names, flat, strict=True))
        absent = {f"d{name}" for name in ("bias", "initial_state") if given[name] is None}
        dims = tuple(None if name in absent else CHANNELS[name] for name in results)
        outputs = tuple(
            output if dim is None else output.unflatten(dim, (size, output.shape[dim] // size))
            for output, dim in zip(call(joined), dims, strict=True)
        )
        return outputs, dims

    return rule


# ---- registration


def provide_reference(function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any kernel."""

    def checked(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        check_causal_conv1d(*args, **options)
        return function(*args, **options)

    backend.provide("causal_conv1d", "reference", checked)


def register_operator(
    name: str, shapes: Callable[..., tuple[Tensor, ...]], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, causal_conv1d_vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of)
    return operator


def register_all() -> None:
    public = register_operator("causal_conv1d", causal_conv1d_shapes, check_causal_conv1d)
    register.register_autograd(public, save=causal_conv1d_save, backward=causal_conv1d_formula)
    backward = register_operator(
        "causal_conv1d_backward", causal_conv1d_backward_shapes, check_causal_conv1d_backward, "causal_conv1d"
    )
    register.refuse_second_derivative(backward, public)


register_all()


# ---- the public function


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal convolution over time, each channel with taps of its own.

        z_t = bias + sum_j weight[:, W-1-j] * x_{t - j dilation};  y_t = z_t, or silu(z_t) = z_t sigmoid(z_t)

    The last tap meets the current step, as in torch's conv1d. Steps before the first are the initial state's.

    Args:
        x: [B, T, D] in float32, float64, bfloat16 or float16, any strides.
        weight: [D, W], any W >= 1; in x's dtype or, where that has 16 bits, float32.
        bias: [D], of the dtypes of weight; None is zero.
        initial_state: [B, S, D] with S = (W - 1) dilation, with cu_seqlens [N, S, D], in x's dtype: the S steps before
            the first; None is zero.
        dilation: steps between two taps, at least 1; may be more than T.
        activation: None or "silu".
        cu_seqlens: [N + 1] int32 or int64, from 0 to T without decrease: with B = 1, sequence n is the steps
            `cu_seqlens[n]:cu_seqlens[n + 1]` and independent of the others.

    Returns:
        y [B, T, D], and the last S steps of the initial state and x one after the other, [B, S, D] or [N, S, D]: the
        initial state of a following piece. Both in x's dtype; the state is copied, never computed.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps the arguments, and computes z anew where there is an activation. The backward has partial
    sums of the weights' gradient, at most a quarter of x unless W or D W is large against T.

    Example:
        >>> x, taps = torch.tensor([1.0, 0.0, 0.0, 2.0]).view(1, 4, 1), torch.tensor([[3.0, 2.0, 1.0]])
        >>> y, tail = seqops.causal_conv1d(x, taps)
        >>> y.flatten().tolist(), tail.flatten().tolist()
        ([1.0, 2.0, 3.0, 2.0], [0.0, 2.0])

    Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces", 2023; van den Oord et al.,
    "WaveNet", 2016.
    """
    return ops.causal_conv1d(
        x, weight, bias, initial_state, dilation=dilation, activation=activation, cu_seqlens=cu_seqlens
    )
