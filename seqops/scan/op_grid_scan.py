"""Scan over a grid: shapes, gradient formula, transforms, and the public function.

    grid_scan            the public operator
    grid_scan_backward   all gradients

Letters: B batch, X and Y sides of the grid, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate

ops = torch.ops.seqops

GATES = ("t_rl", "t_ru", "t_dl", "t_du")
NODES, OF_GATES = "[B, X, Y, H, D]", "[B, X, Y, H]"


# ---- checks and shapes, for tensors without data


def check_nodes(op: str, name: str, x: Tensor) -> None:
    shape = validate.shape_of(x)
    validate.expect(x.ndim == 5, op, name, f"5 dimensions {NODES}", f"shape {shape}")
    validate.expect(x.shape[3] >= 1 and x.shape[4] >= 1, op, name, "at least 1 head and 1 channel", f"shape {shape}")
    validate.check_type(op, name, x, validate.STORAGE)


def check_same(op: str, name: str, t: Tensor | None, like_name: str, like: Tensor) -> None:
    if t is not None:
        validate.check_device(op, name, t, like_name, like)
        validate.check_shape(op, name, t, NODES, like.shape)
        validate.check_type(op, name, t, (like.dtype,))


def check_gates(op: str, gates: tuple[Tensor | None, ...], like_name: str, like: Tensor) -> None:
    allowed = [torch.bfloat16, torch.float16, torch.float32]
    allowed += [torch.float64] if like.dtype == torch.float64 else []
    for name, gate in zip(GATES, gates, strict=True):
        if gate is not None:
            validate.check_device(op, name, gate, like_name, like)
            validate.check_shape(op, name, gate, OF_GATES, like.shape[:4])
            validate.check_type(op, name, gate, allowed)


def check_borders(op: str, left: Tensor | None, top: Tensor | None, like_name: str, like: Tensor) -> None:
    B, X, Y, H, D = like.shape
    for name, border, letter, side in (("initial_left", left, "Y", Y), ("initial_top", top, "X", X)):
        if border is not None:
            validate.check_device(op, name, border, like_name, like)
            validate.check_shape(op, name, border, f"[B, {letter}, H, D]", (B, side, H, D))
            validate.check_type(op, name, border, (like.dtype, validate.real_of(like.dtype)))


def check_grid_scan(
    x_r: Tensor,
    x_d: Tensor,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    *,
    initial_left: Tensor | None = None,
    initial_top: Tensor | None = None,
    flip_x: bool = False,
    flip_y: bool = False,
) -> None:
    op = "grid_scan"
    check_nodes(op, "x_r", x_r)
    check_same(op, "x_d", x_d, "x_r", x_r)
    check_gates(op, (t_rl, t_ru, t_dl, t_du), "x_r", x_r)
    check_borders(op, initial_left, initial_top, "x_r", x_r)


def grid_scan_shapes(x_r: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    check_grid_scan(x_r, *args, **options)
    return x_r.new_empty(x_r.shape), x_r.new_empty(x_r.shape)


def check_grid_scan_backward(
    dr: Tensor | None,
    dd: Tensor | None,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    r: Tensor | None,
    d: Tensor | None,
    initial_left: Tensor | None,
    initial_top: Tensor | None,
    *,
    flip_x: bool = False,
    flip_y: bool = False,
) -> None:
    op = "grid_scan_backward"
    validate.expect(dr is not None or dd is not None, op, "dr", "a tensor where dd is None", "None")
    name, like = ("dd", dd) if dr is None else ("dr", dr)
    check_nodes(op, name, like)
    check_same(op, "dd", dd, name, like)
    check_gates(op, (t_rl, t_ru, t_dl, t_du), name, like)
    validate.expect(r is None or d is not None, op, "d", "together with r", "None")
    validate.expect(d is None or r is not None, op, "r", "together with d", "None")
    check_same(op, "r", r, name, like)
    check_same(op, "d", d, name, like)
    check_borders(op, initial_left, initial_top, name, like)


def grid_scan_backward_shapes(
    dr: Tensor | None,
    dd: Tensor | None,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    r: Tensor | None,
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    check_grid_scan_backward(dr, dd, t_rl, t_ru, t_dl, t_du, r, *rest, **options)
    like = dd if dr is None else dr
    B, X, Y, H, D = like.shape
    gates = (
        t_rl.new_empty(0) if gate is None else gate.new_empty(0 if r is None else gate.shape)
        for gate in (t_rl, t_ru, t_dl, t_du)
    )
    real = validate.real_of(like.dtype)
    borders = (like.new_empty(B, side, H, D, dtype=real) for side in (Y, X))
    return (like.new_empty(like.shape), like.new_empty(like.shape), *gates, *borders)


# ---- the formula


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, _, *gates, left, top, ctx.flip_x, ctx.flip_y = inputs
    ctx.given = [t is not None for t in gates]
    ctx.border_dtypes = [None if t is None else t.dtype for t in (left, top)]
    # Without a gradient of gates, which are sums of products, the gates are all that is needed.
    kept = (*outputs, left, top) if any(ctx.needs_input_grad[2:6]) else (None,) * 4
    ctx.save_for_backward(*gates, *kept)


def formula(ctx: Any, saved: tuple[Any, ...], dr: Tensor | None, dd: Tensor | None) -> tuple[Tensor | None, ...]:
    if dr is None and dd is None:
        return (None,) * 10
    dx_r, dx_d, *rest = ops.grid_scan_backward(dr, dd, *saved, flip_x=ctx.flip_x, flip_y=ctx.flip_y)
    wanted = saved[4] is not None
    gates = (gradient if wanted and given else None for gradient, given in zip(rest[:4], ctx.given, strict=True))
    borders = (
        None if dtype is None else gradient.to(dtype)
        for gradient, dtype in zip(rest[4:], ctx.border_dtypes, strict=True)
    )
    return (dx_r, dx_d, *gates, *borders, None, None)


# ---- vmap


def vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The mapped dimension joins the batch."""
    split = len([argument for argument in op._schema.arguments if not argument.kwarg_only])
    names = [argument.name for argument in op._schema.arguments]

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        folded = [
            register.fold(value, dim, size, 0) if isinstance(value, Tensor) else value
            for value, dim in zip(flat, in_dims, strict=True)
        ]
        outputs = op(*folded[:split], **dict(zip(names[split:], folded[split:], strict=True)))
        batch = next(value.shape[0] for value in folded if isinstance(value, Tensor))
        # A gradient that was not wanted is [0].
        mapped = [output.ndim > 1 for output in outputs]
        unfolded = tuple(
            output.unflatten(0, (size, batch // size)) if is_mapped else output
            for output, is_mapped in zip(outputs, mapped, strict=True)
        )
        return unfolded, tuple(0 if is_mapped else None for is_mapped in mapped)

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


def register_all() -> None:
    public = register_operator("grid_scan", grid_scan_shapes, check_grid_scan)
    register.register_autograd(public, save=save, backward=formula)
    backward = register_operator("grid_scan_backward", grid_scan_backward_shapes, check_grid_scan_backward, "grid_scan")
    register.refuse_second_derivative(backward, public)


register_all()


# ---- the public function


def grid_scan(
    x_r: Tensor,
    x_d: Tensor,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    *,
    initial_left: Tensor | None = None,
    initial_top: Tensor | None = None,
    flip_x: bool = False,
    flip_y: bool = False,
) -> tuple[Tensor, Tensor]:
    """Linear recurrence over the nodes of a grid, each of which hands one state on to the right and one down.

        r(x, y) = t_rl l + t_ru u + x_r        l = r(x-1, y), initial_left[y] at the first x
        d(x, y) = t_dl l + t_du u + x_d        u = d(x, y-1), initial_top[x] at the first y

    A gate's letters say where it leads to, then where it comes from. Where a gate is exactly 0 nothing passes, neither
    NaN nor infinity. Stability is the caller's: nothing grows where `|t_rl| + |t_dl|` and `|t_ru| + |t_du|` are at most
    1 (propagation), or where one of `t_ru` and `t_dl` is None and every gate at most 1 (directional).

    Args:
        x_r, x_d: [B, X, Y, H, D], what enters at every node; float32, float64, bfloat16 or float16, any strides.
        t_rl, t_ru, t_dl, t_du: [B, X, Y, H], the gates: any floating dtype that is no more precise than the arithmetic.
            t_ru and t_dl may be None, which drops their term.
        initial_left: [B, Y, H, D], in the dtype of x_r or the arithmetic's; None is zero.
        initial_top: [B, X, H, D], likewise.
        flip_x, flip_y: walk from the last index to the first. Indices stay the caller's: with flip_x, initial_left
            enters at x = X - 1.

    Returns:
        r and d [B, X, Y, H, D] in the dtype of x_r. What leaves the grid, `r[:, -1]` and `d[:, :, -1]` (with flips,
        `r[:, 0]` and `d[:, :, 0]`), is the initial_left and initial_top of the neighbouring tiles.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps the gates, and r, d and the initial states if a gate's gradient is wanted too. In 16 bit a
    row of the grid is kept in float32 during the call.

    Example:
        >>> x_r = x_d = torch.randn(2, 6, 5, 4, 8)  # 2 grids of 6 by 5 nodes, 4 heads of 8 channels
        >>> gate = torch.full((2, 6, 5, 4), 0.4)
        >>> r, d = seqops.grid_scan(x_r, x_d, gate, gate, gate, gate)
        >>> r.shape
        torch.Size([2, 6, 5, 4, 8])

    Poeppel et al., "pLSTM: parallelizable linear source transition mark networks", 2025.
    """
    return ops.grid_scan(
        x_r,
        x_d,
        t_rl,
        t_ru,
        t_dl,
        t_du,
        initial_left=initial_left,
        initial_top=initial_top,
        flip_x=flip_x,
        flip_y=flip_y,
    )
