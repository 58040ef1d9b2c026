"""newton_schulz: checks, gradient formula, and the public function.

newton_schulz            (x [..., M, N], coefficients 3 S numbers or None, eps) -> x
newton_schulz_backward   (dx [..., M, N], x, coefficients, eps) -> dx
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import op as room
from . import reference

ops = torch.ops.seqops

MUON_STEPS = ((3.4445, -4.7750, 2.0315),) * 5
LACT_LM_STEPS = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)


# ---- checks and shapes, for tensors without data


def check(x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7, op: str = "newton_schulz") -> None:
    shape = validate.shape_of(x)
    validate.expect(x.ndim >= 2, op, "x", "at least 2 dimensions [..., M, N]", f"shape {shape}")
    validate.check_type(op, "x", x, validate.STORAGE)
    room.check_coefficients(op, coefficients)
    validate.expect(eps >= 0, op, "eps", "a number >= 0", f"{eps:g}")


def shapes(x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7) -> Tensor:
    check(x, coefficients, eps)
    return x.new_empty(x.shape)


def check_backward(dx: Tensor, x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7) -> None:
    op = "newton_schulz_backward"
    check(x, coefficients, eps, op)
    validate.check_device(op, "dx", dx, "x", x)
    validate.check_type(op, "dx", dx, (x.dtype,))
    same = dx.ndim == x.ndim and all(got == size for got, size in zip(dx.shape, x.shape, strict=True))
    validate.expect(same, op, "dx", f"x's shape {validate.shape_of(x)}", validate.shape_of(dx))


def backward_shapes(dx: Tensor, x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7) -> Tensor:
    check_backward(dx, x, coefficients, eps)
    return x.new_empty(x.shape)


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.coefficients, ctx.eps = inputs
    ctx.save_for_backward(x)


def formula(ctx: Any, saved: tuple[Tensor, ...], grad: Tensor | None) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return (None,) * 3
    return ops.newton_schulz_backward(grad, *saved, ctx.coefficients, ctx.eps), None, None


# ---- vmap: the mapped dimension joins those in front


def vmap(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> tuple[Tensor, int]:
        def in_front(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)

        return op(*map(in_front, flat, in_dims)), 0

    return rule


# ---- registration


def serve_reference(x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7) -> Tensor:
    check(x, coefficients, eps)
    return reference.newton_schulz(x, coefficients, eps)


def register_operator(
    name: str, shapes: Callable[..., Tensor], check: Callable[..., None], part_of: str | None = None
) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of=part_of)
    backend.provide_module(name, __package__, check=check, part_of=part_of, backends=("triton",))
    return operator


def register_all() -> None:
    public = register_operator("newton_schulz", shapes, check)
    backend.provide("newton_schulz", "reference", serve_reference)
    register.register_autograd(public, save=save, backward=formula)
    register.register_autocast(public, ("x",))
    backward = register_operator("newton_schulz_backward", backward_shapes, check_backward, "newton_schulz")
    register.refuse_second_derivative(backward, public)


register_all()


# ---- public function


def flat(coefficients: Sequence[float] | Sequence[Sequence[float]] | None) -> list[float] | None:
    """Triples, or a flat list, as the flat list that operators take."""
    if coefficients is None:
        return None
    return [number for each in coefficients for number in (each if isinstance(each, Sequence) else (each,))]


def newton_schulz(
    x: Tensor, coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None, eps: float = 1e-7
) -> Tensor:
    """Newton-Schulz steps, which bring the singular values of a matrix near 1 and leave its singular vectors.

        A = X X^T;  X <- a X + (b A + c A A) X,  from X = x / (|x| + eps), transposed first where M > N

    Args:
        x: [..., M, N], matrices in a batch of any number of dimensions: float32, float64, bfloat16 or float16, any
            strides. 16 bits are computed in float32; on GPUs their products take 16-bit operands.
        coefficients: (a, b, c) of each step, as triples or one flat list; None is `seqops.ttt.MUON_STEPS`. None at all,
            `()`, only normalises. `seqops.ttt.LACT_LM_STEPS` is the other published set.
        eps: added to the norm of a matrix.

    Returns:
        [..., M, N] in the dtype of x. A matrix of zeros gives zeros, and its gradient is zero.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps x. While it runs there are the iterate and two matrices of min(M, N)^2 numbers, for a
    gradient those of every step: of all matrices on GPUs, of as many as there are threads on the CPU.

    Example:
        >>> x = torch.randn(16, 32)
        >>> values = torch.linalg.svdvals(seqops.newton_schulz(x))
        >>> bool((values - 1).abs().max() < 0.4)  # the singular values are near 1
        True

    Bernstein and Newhouse, "Old optimizer, new norm: an anthology", 2024; Jordan et al., "Muon: an optimizer for hidden
    layers in neural networks", 2024.
    """
    return ops.newton_schulz(x, flat(coefficients), eps)
