"""prob_sparse_attention: checks, its parts, and the public function.

    prob_sparse_rows             the selected queries of each head, ascending
    prob_sparse_fill             the output: rows of the selected queries, and what the others get
    prob_sparse_fill_backward    its gradients

Letters: B batch, T time, H query heads, Hk key heads, D channels, U samples of a query, N selected queries.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import op as room
from . import ranges, reference

ops = torch.ops.seqops

SCHEMA = (
    "prob_sparse_attention(Tensor q, Tensor k, Tensor v, Tensor sample_index, int top, *, bool causal=False, "
    "float? scale=None) -> Tensor o"
)


# ---- checks and shapes, for tensors without data


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sample_index: Tensor,
    top: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> None:
    op = "prob_sparse_attention"
    room.check_heads(op, q, k, v)
    check_samples(op, q, sample_index, top)


def check_samples(op: str, q: Tensor, sample_index: Tensor, top: int) -> None:
    validate.check_device(op, "sample_index", sample_index, "q", q)
    validate.check_type(op, "sample_index", sample_index, (torch.int32, torch.int64))
    fits = sample_index.ndim == 2 and sample_index.shape[0] == q.shape[1]
    got = validate.shape_of(sample_index)
    validate.expect(fits, op, "sample_index", f"[T, U] = [{q.shape[1]}, U]", got)
    room.check_at_least(op, "top", top, 1)


def check_rows(q: Tensor, k: Tensor, sample_index: Tensor, top: int) -> None:
    op = "prob_sparse_rows"
    room.check_heads(op, q, k, k)
    check_samples(op, q, sample_index, top)


def rows_shapes(q: Tensor, k: Tensor, sample_index: Tensor, top: int) -> Tensor:
    check_rows(q, k, sample_index, top)
    return q.new_empty(q.shape[0], q.shape[2], torch.sym_min(top, q.shape[1]), dtype=torch.int64)


def check_index(op: str, index: Tensor, batches: int, like_name: str, like: Tensor) -> None:
    validate.check_device(op, "index", index, like_name, like)
    validate.check_type(op, "index", index, (torch.int64,))
    fits = index.ndim == 3 and index.shape[0] == batches and index.shape[1] >= 1
    validate.expect(fits, op, "index", f"[B, H, N] = [{batches}, H, N]", validate.shape_of(index))


def check_divides(op: str, name: str, heads: int, of: int) -> None:
    validate.expect(heads >= 1 and of % heads == 0, op, name, f"a number of heads that divides {of}", str(heads))


def check_values(op: str, name: str, t: Tensor) -> None:
    shape = validate.shape_of(t)
    validate.expect(t.ndim == 4, op, name, "4 dimensions [B, T, H, D]", f"shape {shape}")
    validate.check_type(op, name, t, validate.STORAGE)
    validate.expect(t.shape[2] >= 1 and t.shape[3] >= 1, op, name, "at least 1 head and 1 channel", f"shape {shape}")


def check_fill(v: Tensor, rows: Tensor, index: Tensor, *, causal: bool = False) -> None:
    op = "prob_sparse_fill"
    check_values(op, "v", v)
    check_index(op, index, v.shape[0], "v", v)
    check_divides(op, "v", v.shape[2], index.shape[1])
    validate.check_device(op, "rows", rows, "v", v)
    validate.check_type(op, "rows", rows, (v.dtype,))
    expected = (v.shape[0], index.shape[2], index.shape[1], v.shape[3])
    validate.check_shape(op, "rows", rows, "[B, N, H, D]", expected)


def fill_shapes(v: Tensor, rows: Tensor, index: Tensor, *, causal: bool = False) -> Tensor:
    check_fill(v, rows, index)
    return v.new_empty(v.shape[0], v.shape[1], index.shape[1], v.shape[3])


def check_fill_backward(grad: Tensor, index: Tensor, key_heads: int, *, causal: bool = False) -> None:
    op = "prob_sparse_fill_backward"
    check_values(op, "grad", grad)
    check_index(op, index, grad.shape[0], "grad", grad)
    H = grad.shape[2]
    validate.expect(index.shape[1] == H, op, "index", f"H = {H} heads", str(index.shape[1]))
    check_divides(op, "key_heads", key_heads, H)


def fill_backward_shapes(grad: Tensor, index: Tensor, key_heads: int, *, causal: bool = False) -> tuple[Tensor, Tensor]:
    check_fill_backward(grad, index, key_heads)
    B, T, H, D = grad.shape
    return grad.new_empty(B, T, key_heads, D), grad.new_empty(B, index.shape[2], H, D)


# ---- the formulas


def rows_save(ctx: Any, inputs: tuple[Any, ...], index: Tensor) -> None:
    ctx.mark_non_differentiable(index)


def rows_formula(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None) -> tuple[None, ...]:
    return (None,) * 4


def fill_save(ctx: Any, inputs: tuple[Any, ...], o: Tensor) -> None:
    v, _, index, ctx.causal = inputs
    ctx.key_heads = v.shape[2]
    ctx.save_for_backward(index)


def fill_formula(ctx: Any, saved: tuple[Any, ...], grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 4
    dv, drows = ops.prob_sparse_fill_backward(grad, *saved, ctx.key_heads, causal=ctx.causal)
    return dv, drows, None, None


# ---- registration


def register_part(name: str, shapes: Callable[..., Any], check: Callable[..., None]) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, register.vmap_of_batch(operator, alone=("sample_index",)))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of="prob_sparse_attention")
    backend.provide_module(name, __package__, check=check, part_of="prob_sparse_attention", backends=("triton",))
    return operator


def register_all() -> None:
    rows = register_part("prob_sparse_rows", rows_shapes, check_rows)
    register.register_autograd(rows, save=rows_save, backward=rows_formula, jvp=lambda ctx, saved, *tangents: None)
    fill = register_part("prob_sparse_fill", fill_shapes, check_fill)
    register.register_autograd(fill, save=fill_save, backward=fill_formula)
    backward = register_part("prob_sparse_fill_backward", fill_backward_shapes, check_fill_backward)
    register.refuse_second_derivative(backward, fill)


register_all()


# ---- the operator


@ranges.kept
def plan(T: int, rows: int, device: torch.device) -> Tensor:
    """Every row sees every key."""
    first = torch.zeros(rows, dtype=torch.int32, device=device)
    return ranges.stack([(first, first + T)])


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sample_index: Tensor,
    top: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    index = ops.prob_sparse_rows(q, k, sample_index, top)
    if causal:
        seen = ranges.stack([(torch.zeros_like(index), index + 1)])
    else:
        seen = plan(q.shape[1], index.shape[2], q.device)
    rows, _ = ops.range_attention(ops.gather_rows(q, index), k, v, seen, scale=scale)
    return ops.prob_sparse_fill(v, rows, index, causal=causal)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.prob_sparse_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("prob_sparse_rows", "gather_rows", "range_attention", "prob_sparse_fill"),
)


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sample_index: Tensor,
    top: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Full attention for the `top` queries whose scores stand out most among sampled keys; a sum of v for the others.

        M_i = max_j <q_i, k_j> - (1/T) sum_j <q_i, k_j>    over the samples j of i
        o_i = sum_j softmax_j(scale <q_i, k_j>) v_j        for the `min(top, T)` queries of largest M
        o_i = mean_j v_j, or sum_{j <= i} v_j if causal    for the others

    The sum is divided by T, not by the number of samples; a key that is sampled twice counts twice. Without a sample M
    is -inf. NaN ranks highest, and of equal M the lower position. The selection has no gradient.

    It **leaks**: M looks at sampled keys of the future, and ranks a query against those of the future. `causal` hides
    later keys from the attention of the selected queries and from the sums, nothing more; there is no exact decoding.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        sample_index: [T, U] int32 or int64, the keys that each query's M looks at, shared by batch and heads. An entry
            outside of `0 .. T - 1` is none. U may be 0.
        top: queries of each head that attend, 1 or more.
        causal: a selected query sees no key after its own position, and the others get running sums.
        scale: a number; None is D**-0.5.

    Returns:
        o [B, T, H, D] in the dtype of q.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: M [B, H, T], and nothing of size [B, H, T, U] or [B, H, T, T]. A gradient keeps q, k, v and the rows of
    the selected queries.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> samples = torch.randint(100, (100, 20))  # 20 keys for each query's measure
        >>> o = seqops.prob_sparse_attention(q, k, v, samples, 25)  # 25 queries attend, the others get the mean of v
        >>> o.shape
        torch.Size([2, 100, 4, 16])

    Zhou et al., "Informer: beyond efficient Transformer for long sequence time-series forecasting", 2021.
    """
    return ops.prob_sparse_attention(q, k, v, sample_index, top, causal=causal, scale=scale)
