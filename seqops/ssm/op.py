"""ssm_kernel and cauchy_kernel: checks, shapes, gradient formulas, transforms, and the public functions.

    ssm_kernel, cauchy_kernel                      the public operators
    ssm_kernel_backward, cauchy_kernel_backward    all gradients

Letters: H heads, N modes of a head, L length or number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate

ops = torch.ops.seqops

COMPLEX = (torch.complex64, torch.complex128)
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}


# ---- checks and shapes, for tensors without data


def check_modes(op: str, name: str, t: Tensor) -> None:
    validate.expect(t.ndim == 2, op, name, "2 dimensions [H, N]", f"shape {validate.shape_of(t)}")
    validate.check_type(op, name, t, COMPLEX)


def check_as(op: str, name: str, t: Tensor, like_name: str, like: Tensor) -> None:
    validate.check_device(op, name, t, like_name, like)
    validate.check_shape(op, name, t, "[H, N]", like.shape)
    validate.check_type(op, name, t, (like.dtype,))


def check_ssm_kernel(z: Tensor, c: Tensor, length: int, *, op: str = "ssm_kernel") -> None:
    check_modes(op, "z", z)
    check_as(op, "c", c, "z", z)
    validate.expect(length >= 0, op, "length", "0 or more", str(length))


def ssm_kernel_shapes(z: Tensor, c: Tensor, length: int) -> Tensor:
    check_ssm_kernel(z, c, length)
    return z.new_empty(z.shape[0], length, dtype=REAL[z.dtype])


def check_ssm_kernel_backward(dk: Tensor, z: Tensor, c: Tensor) -> None:
    op = "ssm_kernel_backward"
    validate.expect(dk.ndim == 2, op, "dk", "2 dimensions [H, length]", f"shape {validate.shape_of(dk)}")
    check_ssm_kernel(z, c, dk.shape[1], op=op)
    validate.check_device(op, "dk", dk, "z", z)
    validate.check_shape(op, "dk", dk, "[H, length]", (z.shape[0], dk.shape[1]))
    validate.check_type(op, "dk", dk, (REAL[z.dtype],))


def ssm_kernel_backward_shapes(dk: Tensor, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    check_ssm_kernel_backward(dk, z, c)
    return z.new_empty(z.shape), c.new_empty(c.shape)


def check_cauchy_kernel(v: Tensor, nodes: Tensor, w: Tensor, *, op: str = "cauchy_kernel") -> None:
    check_modes(op, "v", v)
    validate.check_device(op, "nodes", nodes, "v", v)
    validate.expect(nodes.ndim == 1, op, "nodes", "1 dimension [L]", f"shape {validate.shape_of(nodes)}")
    validate.check_type(op, "nodes", nodes, (v.dtype,))
    check_as(op, "w", w, "v", v)


def cauchy_kernel_shapes(v: Tensor, nodes: Tensor, w: Tensor) -> Tensor:
    check_cauchy_kernel(v, nodes, w)
    return v.new_empty(v.shape[0], nodes.shape[0])


def check_cauchy_kernel_backward(dy: Tensor, v: Tensor, nodes: Tensor, w: Tensor, *, wants_nodes: bool = True) -> None:
    op = "cauchy_kernel_backward"
    check_cauchy_kernel(v, nodes, w, op=op)
    validate.check_device(op, "dy", dy, "v", v)
    validate.check_shape(op, "dy", dy, "[H, L]", (v.shape[0], nodes.shape[0]))
    validate.check_type(op, "dy", dy, (v.dtype,))


def cauchy_kernel_backward_shapes(
    dy: Tensor, v: Tensor, nodes: Tensor, w: Tensor, *, wants_nodes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    check_cauchy_kernel_backward(dy, v, nodes, w)
    return v.new_empty(v.shape), nodes.new_empty(nodes.shape if wants_nodes else 0), w.new_empty(w.shape)


# ---- the formulas


def ssm_kernel_save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    z, c, _ = inputs
    ctx.save_for_backward(z, c)


def ssm_kernel_formula(ctx: Any, saved: tuple[Any, ...], dk: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None, None) if dk is None else (*ops.ssm_kernel_backward(dk, *saved), None)


def cauchy_kernel_save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def cauchy_kernel_formula(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    wants_nodes = bool(ctx.needs_input_grad[1])
    dv, dnodes, dw = ops.cauchy_kernel_backward(dy, *saved, wants_nodes=wants_nodes)
    return dv, dnodes if wants_nodes else None, dw


# ---- vmap: the mapped dimension joins the heads


def vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]
    keywords = [argument.name for argument in op._schema.arguments if argument.kwarg_only]
    positional = len(names) - len(keywords)
    single = len(op._schema.returns) == 1

    def call(flat: list[Any]) -> tuple[Tensor, ...]:
        outputs = op(*flat[:positional], **dict(zip(keywords, flat[positional:], strict=True)))
        return (outputs,) if single else outputs

    def packed(outputs: list[Tensor], at: int) -> Any:
        return (outputs[0], at) if single else (tuple(outputs), (at,) * len(outputs))

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        nodes = names.index("nodes") if "nodes" in names else None
        # Each call has nodes of its own, or a gradient of them, which is a sum over its heads.
        if nodes is not None and (in_dims[nodes] is not None or dict(zip(names, flat, strict=True)).get("wants_nodes")):
            runs = [
                call([v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
                for i in range(size)
            ]
            return packed([torch.stack(column) for column in zip(*runs, strict=True)], 0)

        def join(name: str, value: Any, dim: int | None) -> Any:
            return register.fold(value, dim, size, 0) if isinstance(value, Tensor) and name != "nodes" else value

        outputs = call([join(*item) for item in zip(names, flat, in_dims, strict=True)])
        split = [o.new_empty(size, 0) if o.ndim == 1 else o.unflatten(0, (size, o.shape[0] // size)) for o in outputs]
        return packed(split, 0)

    return rule


# ---- registration


def register_operator(
    name: str, shapes: Callable[..., Any], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap_rule(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton",))
    return operator


CHECKS = {"ssm_kernel": check_ssm_kernel, "cauchy_kernel": check_cauchy_kernel}


def provide_reference(name: str, function: Callable[..., Tensor]) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any kernel."""
    backend.provide(name, "reference", function, check=CHECKS[name])


def register_all() -> None:
    public = register_operator("ssm_kernel", ssm_kernel_shapes, check_ssm_kernel)
    register.register_autograd(public, save=ssm_kernel_save, backward=ssm_kernel_formula)
    backward = register_operator(
        "ssm_kernel_backward", ssm_kernel_backward_shapes, check_ssm_kernel_backward, "ssm_kernel"
    )
    register.refuse_second_derivative(backward, public)

    public = register_operator("cauchy_kernel", cauchy_kernel_shapes, check_cauchy_kernel)
    register.register_autograd(public, save=cauchy_kernel_save, backward=cauchy_kernel_formula)
    backward = register_operator(
        "cauchy_kernel_backward", cauchy_kernel_backward_shapes, check_cauchy_kernel_backward, "cauchy_kernel"
    )
    register.refuse_second_derivative(backward, public)


register_all()


# ---- public functions


def ssm_kernel(z: Tensor, c: Tensor, length: int) -> Tensor:
    """Convolution kernel of a diagonal state-space model: a sum of complex exponentials at 0 .. length - 1.

        K_l = 2 Re sum_n c_n e^{l z_n}

    The phase `l Im z_n` is reduced in float64, so the error does not grow with l. `e^{0 z}` is 1 for every z. A mode
    with Re z > 0 grows; where its terms leave the range of the dtype, K is infinite or NaN.

    Args:
        z: [H, N], complex64 or complex128, any strides: what a step multiplies the logarithm of a mode by. A real part
            of -inf is a mode that is gone after step 0.
        c: [H, N], in the dtype of z: the weights. A real kernel has imaginary parts of 0 and half its weights.
        length: 0 or more.

    Returns:
        K [H, length], float32 or float64.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: nothing of size [H, N, length]; on the CPU tables of one head a thread. A gradient keeps z and c.

    Example:
        >>> z = torch.complex(torch.full((4, 8), -0.1), torch.arange(8.0).expand(4, 8))  # 4 heads, 8 modes each
        >>> kernel = seqops.ssm_kernel(z, torch.ones_like(z), 100)
        >>> y = seqops.fft_conv(torch.randn(2, 100, 4), kernel)  # the model, run over a sequence
        >>> kernel.shape, y.shape
        (torch.Size([4, 100]), torch.Size([2, 100, 4]))

    Gu, Gupta, Goel and Re, "On the parameterization and initialization of diagonal state space models", 2022.
    """
    return ops.ssm_kernel(z, c, length)


def cauchy_kernel(v: Tensor, nodes: Tensor, w: Tensor) -> Tensor:
    """Sum of simple fractions with conjugate pairs of poles, at many nodes.

        y_l = sum_n v_n / (nodes_l - w_n) + conj(v_n) / (nodes_l - conj(w_n))

    A node with an infinite part gives exactly 0. A node that is a pole gives infinity, in one part or both.

    Args:
        v: [H, N], complex64 or complex128, any strides: the weights.
        nodes: [L], in the dtype of v, shared by all heads.
        w: [H, N], in the dtype of v: the poles.

    Returns:
        y [H, L], in the dtype of v.

    Raises:
        ValueError, RuntimeError, NotImplementedError: as for `ssm_kernel`.

    Memory: nothing of size [H, N, L]. A gradient keeps v, nodes and w; that of nodes takes sums of [H / 8, L].

    Example:
        >>> v, poles = torch.ones(1, 1, dtype=torch.complex64), torch.full((1, 1), -0.5 + 0j)
        >>> y = seqops.cauchy_kernel(v, torch.tensor([0.5 + 0j, 1.5 + 0j]), poles)
        >>> y.real.tolist()  # twice 1 / (node + 0.5)
        [[2.0, 1.0]]

    Gu, Goel and Re, "Efficiently modeling long sequences with structured state spaces", 2022.
    """
    return ops.cauchy_kernel(v, nodes, w)
