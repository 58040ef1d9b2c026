"""conv_ssm: checks, shapes, gradient formula, transforms, and the public function.

    conv_ssm             the public operator: results only
    conv_ssm_forward     also the states that enter the blocks, which its backward reads; where a gradient is wanted
    conv_ssm_backward    all gradients

Letters: B batch, T time, Y and X pixels, U channels of a frame, P complex channels of the state, kh and kw the sizes of
a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import composed_conv_ssm as composed

ops = torch.ops.seqops


# ---- checks and shapes


def check_kernel(op: str, name: str, kernel: Tensor, letters: str, sizes: tuple[int, int]) -> None:
    """[kh, kw, *sizes], of any kh and kw."""
    got = validate.shape_of(kernel)
    fits = kernel.ndim == 4 and all(a == b for a, b in zip(kernel.shape[2:], sizes, strict=True))
    expected = f"[kh, kw, {letters}] = [kh, kw, {', '.join(str(size) for size in sizes)}]"
    validate.expect(fits, op, name, expected, got)
    validate.expect(kernel.shape[0] >= 1 and kernel.shape[1] >= 1, op, name, "kh and kw of 1 or more", got)


def check_conv_ssm(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    op: str = "conv_ssm",
) -> None:
    shape = validate.shape_of(u)
    validate.expect(u.ndim == 5, op, "u", "5 dimensions [B, T, Y, X, U]", f"shape {shape}")
    validate.check_type(op, "u", u, validate.STORAGE)
    full = all(size >= 1 for size in u.shape[2:])
    validate.expect(full, op, "u", "at least 1 row, 1 column and 1 channel", f"shape {shape}")
    for name, value in (("a", a), ("b", b), ("c", c), ("d", d), ("initial_state", initial_state)):
        if value is not None:
            validate.check_device(op, name, value, "u", u)
    state = composed.COMPLEX[validate.real_of(u.dtype)]
    validate.expect(a.ndim == 1 and a.shape[0] >= 1, op, "a", "[P] with P of 1 or more", validate.shape_of(a))
    validate.check_type(op, "a", a, (state,))
    inner, width = u.shape[4], a.shape[0]
    for name, kernel, letters, sizes in (("b", b, "U, P", (inner, width)), ("c", c, "P, U", (width, inner))):
        check_kernel(op, name, kernel, letters, sizes)
        validate.check_type(op, name, kernel, (state,))
    if d is not None:
        check_kernel(op, "d", d, "U, U", (inner, inner))
        validate.check_dtype(op, "d", d, u.dtype)
    check_state(op, "initial_state", initial_state, u, a)


def check_state(op: str, name: str, state: Tensor | None, u: Tensor, a: Tensor) -> None:
    if state is not None:
        validate.check_device(op, name, state, "u", u)
        validate.check_shape(op, name, state, "[B, Y, X, P]", (u.shape[0], u.shape[2], u.shape[3], a.shape[0]))
        validate.check_type(op, name, state, (a.dtype,))


def conv_ssm_shapes(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    check_conv_ssm(u, a, b, c, d, initial_state)
    return u.new_empty(u.shape), a.new_empty(u.shape[0], u.shape[2], u.shape[3], a.shape[0])


def conv_ssm_forward_shapes(u: Tensor, a: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return *conv_ssm_shapes(u, a, *args), a.new_empty(composed.entering_shape(u, a.shape[0]))


def check_conv_ssm_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    *,
    wants_u: bool = True,
) -> None:
    op = "conv_ssm_backward"
    check_conv_ssm(u, a, b, c, d, initial_state, op=op)
    if dy is not None:
        validate.check_device(op, "dy", dy, "u", u)
        validate.check_shape(op, "dy", dy, "[B, T, Y, X, U]", u.shape)
        validate.check_type(op, "dy", dy, (u.dtype,))
    check_state(op, "dfinal_state", dfinal_state, u, a)
    validate.check_device(op, "entering", entering, "u", u)
    shape = composed.entering_shape(u, a.shape[0])
    validate.check_shape(op, "entering", entering, "[B, blocks - 1, Y, X, P]", shape)
    validate.check_type(op, "entering", entering, (a.dtype,))


def conv_ssm_backward_shapes(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    *,
    wants_u: bool = True,
) -> tuple[Tensor, ...]:
    check_conv_ssm_backward(dy, dfinal_state, u, a, b, c, d, initial_state, entering)
    dd = u.new_empty(0, dtype=validate.real_of(u.dtype)) if d is None else d.new_empty(d.shape)
    dinitial_state = a.new_empty(u.shape[0], u.shape[2], u.shape[3], a.shape[0])
    du = u.new_empty(u.shape if wants_u else 0)
    return du, a.new_empty(a.shape), b.new_empty(b.shape), c.new_empty(c.shape), dd, dinitial_state


# ---- the formula


def conv_ssm_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(outputs[2])
    ctx.save_for_backward(*inputs, outputs[2])


def conv_ssm_formula(
    ctx: Any, saved: tuple[Any, ...], dy: Tensor | None, dfinal_state: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    if dy is None and dfinal_state is None:
        return (None,) * 6
    wants_u = bool(ctx.needs_input_grad[0])
    du, da, db, dc, dd, dinitial_state = ops.conv_ssm_backward(dy, dfinal_state, *saved, wants_u=wants_u)
    d, initial_state = saved[4:6]
    return (
        du if wants_u else None,
        da,
        db,
        dc,
        None if d is None else dd,
        None if initial_state is None else dinitial_state,
    )


# ---- vmap


def conv_ssm_vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """What is mapped joins the batch. Each call has its own where parameters differ, or gradients are sums over B."""
    names = [argument.name for argument in op._schema.arguments]
    positional = sum(not argument.kwarg_only for argument in op._schema.arguments)
    sequences = {"u", "initial_state"}

    def call(flat: list[Any]) -> tuple[Tensor, ...]:
        return op(*flat[:positional], **dict(zip(names[positional:], flat[positional:], strict=True)))

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        mapped = {name for name, dim in zip(names, in_dims, strict=True) if dim is not None}
        if "dy" in names or not mapped <= sequences:
            runs = [
                call([v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
                for i in range(size)
            ]
            return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])

        def join(name: str, value: Any, dim: int | None) -> Any:
            return register.fold(value, dim, size, 0) if name in sequences and isinstance(value, Tensor) else value

        outputs = call([join(*item) for item in zip(names, flat, in_dims, strict=True)])
        return tuple(o.unflatten(0, (size, o.shape[0] // size)) for o in outputs), (0,) * len(outputs)

    return rule


# ---- registration


def provide_reference(function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any other."""
    backend.provide("conv_ssm", "reference", function, check=check_conv_ssm)


def register_operator(
    name: str,
    shapes: Callable[..., tuple[Tensor, ...]],
    check: Callable[..., None],
    part_of: str | None = None,
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, conv_ssm_vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", getattr(composed, name), check=check, part_of=part_of)
    # Triton first, which has kernels of its own for kernels of one pixel; either calls its backend's linear_scan.
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton", "cuda"))
    return operator


def register_all() -> None:
    public = register_operator("conv_ssm", conv_ssm_shapes, check_conv_ssm)
    training = register_operator("conv_ssm_forward", conv_ssm_forward_shapes, check_conv_ssm, "conv_ssm")
    formula = register.register_autograd(training, save=conv_ssm_save, backward=conv_ssm_formula)
    register.register_training(public, formula)
    backward = register_operator("conv_ssm_backward", conv_ssm_backward_shapes, check_conv_ssm_backward, "conv_ssm")
    register.refuse_second_derivative(backward, public)


register_all()


# ---- the public function


def conv_ssm(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear state-space model over frames, with convolutions as input and output matrices (ConvS5).

        x_t = a x_{t-1} + b * u_t        y_t = 2 Re(c * x_t) + d * u_t

    `*` is a convolution of frames as `torch.nn.functional.conv2d` has it (not flipped), zero outside the frame, with
    (k - 1) // 2 taps before a pixel and k // 2 after it. The state is complex, one number for each pixel and channel.

    Args:
        u: [B, T, Y, X, U], the frames: float32, float64, bfloat16 or float16, any strides.
        a: [P], complex64, or complex128 where u is float64: the gate. Exactly 0 resets: `x_t = b * u_t`.
        b: [kh, kw, U, P], in the dtype of a.
        c: [kh, kw, P, U], in the dtype of a. The kernels b, c and d may have different sizes kh and kw, odd or even.
        d: [kh, kw, U, U], in the dtype of u or, where that has 16 bits, in float32; None is zero.
        initial_state: [B, Y, X, P], in the dtype of a: x before the first step; None is zero.

    Returns:
        y [B, T, Y, X, U] in the dtype of u, and the state after the last step, [B, Y, X, P] in the dtype of a.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: states of one block of frames (on the CPU 4 MiB of them, on a GPU 64 MiB, or 16 frames of one row where
    those are more). A gradient keeps the arguments, and one state a block.

    Example:
        >>> u = torch.randn(2, 10, 8, 8, 3)  # 2 rows of 10 frames, 8 by 8 pixels, 3 channels
        >>> a = torch.full((16,), 0.9 + 0.1j)
        >>> b, c = (torch.randn(*shape, dtype=torch.complex64) for shape in ((3, 3, 3, 16), (3, 3, 16, 3)))
        >>> y, state = seqops.conv_ssm(u, a, b, c)
        >>> y.shape, state.shape
        (torch.Size([2, 10, 8, 8, 3]), torch.Size([2, 8, 8, 16]))

    Smith, De Mello, Kautz, Linderman and Byeon, "Convolutional state space models for long-range spatiotemporal
    modeling", 2023.
    """
    return ops.conv_ssm(u, a, b, c, d, initial_state)
