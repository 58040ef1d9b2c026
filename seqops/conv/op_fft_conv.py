"""fft_conv: shapes, gradient formula, transforms, and the public function.

Letters: B batch, T time, D channels, N kernels of a channel, L taps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate

ops = torch.ops.seqops

# Which dimension of an argument or a result the channels are.
CHANNELS = {"u": 2, "k": 0, "skip": 0, "dy": 2, "y": 2, "du": 2, "dk": 0, "dskip": 0}


# ---- checks and shapes, for tensors without data


def check_fft_conv(u: Tensor, k: Tensor, skip: Tensor | None = None, op: str = "fft_conv") -> None:
    shape = validate.shape_of(u)
    validate.expect(u.ndim == 3, op, "u", "3 dimensions [B, T, D]", f"shape {shape}")
    validate.expect(u.shape[2] >= 1, op, "u", "at least 1 channel", f"shape {shape}")
    validate.check_type(op, "u", u, validate.STORAGE)
    validate.check_device(op, "k", k, "u", u)
    shape = validate.shape_of(k)
    validate.expect(k.ndim in (2, 3), op, "k", "2 or 3 dimensions [D, L] or [D, N, L]", f"shape {shape}")
    validate.expect(k.shape[0] == u.shape[2], op, "k", f"D = {u.shape[2]} in front", shape)
    validate.expect(k.ndim == 2 or k.shape[1] >= 1, op, "k", "at least 1 kernel a channel", f"shape {shape}")
    allowed = (u.dtype, validate.real_of(u.dtype))
    validate.check_type(op, "k", k, allowed)
    if skip is not None:
        validate.check_device(op, "skip", skip, "u", u)
        validate.check_shape(op, "skip", skip, "[D]", (u.shape[2],))
        validate.check_type(op, "skip", skip, allowed)


def fft_conv_shapes(u: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    check_fft_conv(u, k, skip)
    return u.new_empty(*u.shape, *k.shape[1:-1])


def check_fft_conv_backward(dy: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, for_u: bool, for_k: bool) -> None:
    op = "fft_conv_backward"
    check_fft_conv(u, k, skip, op)
    validate.check_device(op, "dy", dy, "u", u)
    validate.check_type(op, "dy", dy, (u.dtype,))
    letters = "[B, T, D, N]" if k.ndim == 3 else "[B, T, D]"
    validate.check_shape(op, "dy", dy, letters, (*u.shape, *k.shape[1:-1]))


def fft_conv_backward_shapes(
    dy: Tensor, u: Tensor, k: Tensor, skip: Tensor | None, for_u: bool, for_k: bool
) -> tuple[Tensor, Tensor, Tensor]:
    check_fft_conv_backward(dy, u, k, skip, for_u, for_k)
    dskip = u.new_empty(0 if skip is None or not for_k else skip.shape, dtype=validate.real_of(u.dtype))
    return u.new_empty(u.shape if for_u else 0), k.new_empty(k.shape if for_k else 0), dskip


# ---- the formula


def fft_conv_save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.for_u, *for_taps = ctx.needs_input_grad
    ctx.for_k = any(for_taps)
    ctx.save_for_backward(*inputs)


def fft_conv_formula(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    u, k, skip = saved
    du, dk, dskip = ops.fft_conv_backward(dy, u, k, skip, ctx.for_u, ctx.for_k)
    return (
        du if ctx.for_u else None,
        dk if ctx.for_k else None,
        dskip.to(skip.dtype) if ctx.for_k and skip is not None else None,
    )


# ---- vmap: the mapped dimension joins the channels or, where only u is mapped and no taps are summed for, the batch


def fft_conv_vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]
    results = [argument.name or "y" for argument in op._schema.returns]

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        given, dims = dict(zip(names, flat, strict=True)), dict(zip(names, in_dims, strict=True))
        shared = dims["k"] is None and dims["skip"] is None and not given.get("for_k")
        at = dict.fromkeys(("u", "dy", "y", "du"), 0) if shared else CHANNELS

        def join(name: str, value: Any) -> Any:
            mapped = name in at and isinstance(value, Tensor)
            return register.fold(value, dims[name], size, at[name]) if mapped else value

        outputs = op(*(join(name, value) for name, value in given.items()))
        if isinstance(outputs, Tensor):
            return outputs.unflatten(at["y"], (size, outputs.shape[at["y"]] // size)), at["y"]
        absent = {"du": not given.get("for_u"), "dk": not given.get("for_k")}
        absent["dskip"] = absent["dk"] or given["skip"] is None
        out_dims = tuple(None if absent[name] else at[name] for name in results)
        split = (
            output if dim is None else output.unflatten(dim, (size, output.shape[dim] // size))
            for output, dim in zip(outputs, out_dims, strict=True)
        )
        return tuple(split), out_dims

    return rule


# ---- registration


def provide_reference(function: Callable[..., Tensor]) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any kernel."""

    def checked(*args: Any) -> Tensor:
        check_fft_conv(*args)
        return function(*args)

    backend.provide("fft_conv", "reference", checked)


def register_operator(
    name: str, shapes: Callable[..., Any], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, fft_conv_vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton",))
    return operator


def register_all() -> None:
    public = register_operator("fft_conv", fft_conv_shapes, check_fft_conv)
    register.register_autograd(public, save=fft_conv_save, backward=fft_conv_formula)
    backward = register_operator("fft_conv_backward", fft_conv_backward_shapes, check_fft_conv_backward, "fft_conv")
    register.refuse_second_derivative(backward, public)


register_all()


# ---- the public function


def fft_conv(u: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    """Causal convolution over time with filters of any length, each channel with taps of its own.

        y_t = sum_{l=0}^{min(t, L-1)} k_l u_{t-l} + skip u_t

    Long filters go through Fourier transforms, so errors are relative to the largest values: about 3e-7 of max |y| in
    float32, which is all of a quiet output beside loud ones. What is not finite makes NaN of everything in its reach
    and changes nothing else: u_t reaches y_t ... y_{t+L-1}, k_l reaches y_l and all later ones.

    Args:
        u: [B, T, D] in float32, float64, bfloat16 or float16, any strides.
        k: [D, L], or [D, N, L] for N outputs of each channel; any L >= 0, taps l >= T have no part. In u's dtype or,
            where that has 16 bits, float32.
        skip: [D], of the dtypes of k; None is zero.

    Returns:
        y [B, T, D], or [B, T, D, N], in u's dtype.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps the arguments, no spectra. On the CPU a thread works on one register of channels (16 in
    float32 with AVX-512) in buffers of about T + L numbers each: 2 in the forward, 4 in the backward.

    Example:
        >>> u = torch.randn(2, 1000, 16, requires_grad=True)
        >>> y = seqops.fft_conv(u, torch.randn(16, 1000), torch.ones(16))  # filters as long as the sequence
        >>> y.sum().backward()
        >>> y.shape
        torch.Size([2, 1000, 16])

    Fu et al., "FlashFFTConv: efficient convolutions for long sequences with tensor cores", 2023; Nussbaumer, "Fast
    Fourier transform and convolution algorithms", 1982.
    """
    return ops.fft_conv(u, k, skip)
