"""gathered_attention: the operators on rows and slots that it is made of, its ranges, and the public function.

    counting_sort         index lists by row: which slots name a row; without a gradient
    gather_rows           rows by index; its backward sums over the slots of a row, in their order
    reduce_slots          results of slots to results of rows, with the log-sum-exp

Letters: B batch, T time, H query heads, Hk key heads, D channels, K lists of w entries, S = K w slots. A slot is an
entry of a list: it names a position, or none where it lies outside [0, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import op as room
from . import reference

ops = torch.ops.seqops
INTEGERS = (torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "last")


# ---- checks and shapes of the parts


def check_counting_sort(index: Tensor, bins: int) -> None:
    op = "counting_sort"
    validate.expect(index.ndim == 3, op, "index", "3 dimensions [B, H, n]", f"shape {validate.shape_of(index)}")
    validate.check_type(op, "index", index, INTEGERS)
    validate.expect(bins >= 0, op, "bins", "0 to 2147483647", str(bins))


def counting_sort_shapes(index: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    check_counting_sort(index, bins)
    return index.new_empty(index.shape, dtype=torch.int32), index.new_empty(
        *index.shape[:2], bins + 1, dtype=torch.int32
    )


def check_rows(op: str, name: str, x: Tensor, letters: str) -> None:
    shape = validate.shape_of(x)
    validate.expect(x.ndim == 4, op, name, f"4 dimensions {letters}", f"shape {shape}")
    validate.check_type(op, name, x, validate.STORAGE)
    validate.expect(x.shape[2] >= 1 and x.shape[3] >= 1, op, name, "at least 1 head and 1 channel", f"shape {shape}")


def check_gather_rows(x: Tensor, index: Tensor) -> None:
    op = "gather_rows"
    check_rows(op, "x", x, "[B, T, Hk, D]")
    validate.check_device(op, "index", index, "x", x)
    validate.check_type(op, "index", index, INTEGERS)
    batch, heads = x.shape[0], x.shape[2]
    good = index.ndim == 3 and (index.shape[0] == 1 or index.shape[0] == batch)
    good = good and (index.shape[1] == 1 or (index.shape[1] > 0 and index.shape[1] % heads == 0))
    expected = f"[1 or B, 1 or a multiple of Hk, n] = [1 or {batch}, 1 or a multiple of {heads}, n]"
    validate.expect(good, op, "index", expected, validate.shape_of(index))


def gather_rows_shapes(x: Tensor, index: Tensor) -> Tensor:
    check_gather_rows(x, index)
    heads = x.shape[2] if index.shape[1] == 1 else index.shape[1]
    return x.new_empty(x.shape[0], index.shape[2], heads, x.shape[3])


def check_list(op: str, name: str, t: Tensor, like_name: str, like: Tensor, sizes: tuple[int, int, int]) -> None:
    validate.check_device(op, name, t, like_name, like)
    validate.check_type(op, name, t, (torch.int32,))
    batch, heads, size = sizes
    good = t.ndim == 3 and (t.shape[0] == 1 or t.shape[0] == batch) and (t.shape[1] == 1 or t.shape[1] == heads)
    expected = f"[1 or B, 1 or H, n] = [1 or {batch}, 1 or {heads}, {size}]"
    validate.expect(good and t.shape[2] == size, op, name, expected, validate.shape_of(t))


def check_lists(op: str, order: Tensor, starts: Tensor, like_name: str, like: Tensor, sizes: tuple[int, ...]) -> None:
    batch, heads, slots = sizes
    check_list(op, "order", order, like_name, like, (batch, heads, slots))
    shape = validate.shape_of(starts)
    good = starts.ndim == 3 and starts.shape[2] >= 1
    validate.expect(good, op, "starts", "3 dimensions [B, H, T + 1]", f"shape {shape}")
    check_list(op, "starts", starts, like_name, like, (batch, heads, starts.shape[2]))


def check_gather_rows_backward(dy: Tensor, order: Tensor, starts: Tensor, heads: int) -> None:
    op = "gather_rows_backward"
    check_rows(op, "dy", dy, "[B, n, H, D]")
    batch, n, H, _ = dy.shape
    validate.expect(heads >= 1 and H % heads == 0, op, "heads", f"a divisor of dy's {H}", str(heads))
    check_lists(op, order, starts, "dy", dy, (batch, H, n))


def gather_rows_backward_shapes(dy: Tensor, order: Tensor, starts: Tensor, heads: int) -> Tensor:
    check_gather_rows_backward(dy, order, starts, heads)
    return dy.new_empty(dy.shape[0], starts.shape[2] - 1, heads, dy.shape[3])


def check_reduce_slots(o: Tensor, lse: Tensor, order: Tensor, starts: Tensor, reduce: str = "mean") -> None:
    op = "reduce_slots"
    check_rows(op, "o", o, "[B, S, H, D]")
    batch, slots, heads, _ = o.shape
    validate.check_device(op, "lse", lse, "o", o)
    validate.check_shape(op, "lse", lse, "[B, H, S]", (batch, heads, slots))
    validate.check_type(op, "lse", lse, (validate.real_of(o.dtype),))
    check_lists(op, order, starts, "o", o, (batch, heads, slots))
    room.check_choice(op, "reduce", reduce, REDUCTIONS)


def reduce_slots_shapes(
    o: Tensor, lse: Tensor, order: Tensor, starts: Tensor, reduce: str = "mean"
) -> tuple[Tensor, Tensor]:
    check_reduce_slots(o, lse, order, starts, reduce)
    batch, _, heads, channels = o.shape
    steps = starts.shape[2] - 1
    return o.new_empty(batch, steps, heads, channels), lse.new_empty(batch, heads, steps)


def check_reduce_slots_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    lse: Tensor,
    order: Tensor,
    starts: Tensor,
    channels: int,
    dtype: torch.dtype,
    reduce: str = "mean",
) -> None:
    op = "reduce_slots_backward"
    validate.expect(lse.ndim == 3, op, "lse", "3 dimensions [B, H, S]", f"shape {validate.shape_of(lse)}")
    validate.check_type(op, "lse", lse, (torch.float32, torch.float64))
    validate.expect(channels >= 1, op, "channels", "1 or more", str(channels))
    batch, heads, slots = lse.shape
    check_lists(op, order, starts, "lse", lse, (batch, heads, slots))
    steps = starts.shape[2] - 1
    fits = dtype in validate.STORAGE and validate.real_of(dtype) == lse.dtype
    validate.expect(fits, op, "dtype", f"one computed in {validate.name_of(lse.dtype)}", validate.name_of(dtype))
    if do is not None:
        validate.check_device(op, "do", do, "lse", lse)
        validate.check_shape(op, "do", do, "[B, T, H, D]", (batch, steps, heads, channels))
        validate.check_type(op, "do", do, (dtype,))
    if dlse is not None:
        validate.check_device(op, "dlse", dlse, "lse", lse)
        validate.check_shape(op, "dlse", dlse, "[B, H, T]", (batch, heads, steps))
        validate.check_type(op, "dlse", dlse, (lse.dtype,))
    room.check_choice(op, "reduce", reduce, REDUCTIONS)


def reduce_slots_backward_shapes(
    do: Tensor | None,
    dlse: Tensor | None,
    lse: Tensor,
    order: Tensor,
    starts: Tensor,
    channels: int,
    dtype: torch.dtype,
    reduce: str = "mean",
) -> tuple[Tensor, Tensor]:
    check_reduce_slots_backward(do, dlse, lse, order, starts, channels, dtype, reduce)
    batch, heads, slots = lse.shape
    return lse.new_empty(batch, slots, heads, channels, dtype=dtype), lse.new_empty(lse.shape)


# ---- the formulas


def gather_rows_save(ctx: Any, inputs: tuple[Any, ...], outputs: Tensor) -> None:
    x, index = inputs
    ctx.steps, ctx.heads = x.shape[1], x.shape[2]
    ctx.save_for_backward(index)


def gather_rows_formula(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None
    order, starts = ops.counting_sort(saved[0], ctx.steps)
    return ops.gather_rows_backward(dy, order, starts, ctx.heads), None


def reduce_slots_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    o, lse, order, starts, reduce = inputs
    ctx.channels, ctx.dtype, ctx.reduce = o.shape[3], o.dtype, reduce
    ctx.save_for_backward(lse, order, starts)


def reduce_slots_formula(
    ctx: Any, saved: tuple[Any, ...], do: Tensor | None, dlse: Tensor | None
) -> tuple[Tensor | None, ...]:
    if do is None and dlse is None:
        return (None,) * 5
    grads = ops.reduce_slots_backward(do, dlse, *saved, ctx.channels, ctx.dtype, ctx.reduce)
    return *grads, None, None, None


# ---- vmap: the mapped dimension joins the batch


def vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    single = len(op._schema.returns) == 1

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        values = [
            value.movedim(dim, 0) if isinstance(value, Tensor) and dim is not None else value
            for value, dim in zip(flat, in_dims, strict=True)
        ]
        batches = [
            value.shape[0 if dim is None else 1]
            for value, dim in zip(values, in_dims, strict=True)
            if isinstance(value, Tensor)
        ]

        def join(value: Any, dim: int | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.is_floating_point():
                return register.fold(value, None if dim is None else 0, size, 0)
            if dim is None and value.shape[0] == 1:
                return value  # lists that all rows share
            if dim is None:
                return register.fold(value, None, size, 0)
            return value.expand(-1, max(batches), -1, -1).flatten(0, 1)

        outputs = op(*(join(*pair) for pair in zip(values, in_dims, strict=True)))
        split = [o.unflatten(0, (size, o.shape[0] // size)) for o in ((outputs,) if single else outputs)]
        return (split[0], 0) if single else (tuple(split), (0,) * len(split))

    return rule


# ---- registration of the parts


def register_part(name: str, shapes: Callable[..., Any], check: Callable[..., None]) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap_rule(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of="gathered_attention")
    backend.provide_module(name, __package__, check=check, part_of="gathered_attention", backends=("triton",))
    return operator


def register_parts() -> None:
    register_part("counting_sort", counting_sort_shapes, check_counting_sort)
    gather = register_part("gather_rows", gather_rows_shapes, check_gather_rows)
    register.register_autograd(gather, save=gather_rows_save, backward=gather_rows_formula)
    backward = register_part("gather_rows_backward", gather_rows_backward_shapes, check_gather_rows_backward)
    register.refuse_second_derivative(backward, gather)
    reduction = register_part("reduce_slots", reduce_slots_shapes, check_reduce_slots)
    register.register_autograd(reduction, save=reduce_slots_save, backward=reduce_slots_formula)
    backward = register_part("reduce_slots_backward", reduce_slots_backward_shapes, check_reduce_slots_backward)
    register.refuse_second_derivative(backward, reduction)


register_parts()


# ---- gathered_attention

SCHEMA = (
    "gathered_attention(Tensor q, Tensor k, Tensor v, Tensor q_index, Tensor k_index, *, bool causal=False, "
    "str reduce='mean', float? scale=None) -> (Tensor o, Tensor lse)"
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    causal: bool = False,
    reduce: str = "mean",
    scale: float | None = None,
) -> None:
    op = "gathered_attention"
    room.check_heads(op, q, k, v)
    for name, index in (("q_index", q_index), ("k_index", k_index)):
        validate.check_device(op, name, index, "q", q)
    for name, index, letter in (("q_index", q_index, "w"), ("k_index", k_index, "w'")):
        validate.check_type(op, name, index, INTEGERS)
        batch, heads, lists = q.shape[0], q.shape[2], "K" if name == "q_index" else q_index.shape[2]
        good = index.ndim == 4 and index.shape[0] == batch and index.shape[1] == heads
        good = good and (name == "q_index" or index.shape[2] == lists)
        expected = f"[B, H, K, {letter}] = [{batch}, {heads}, {lists}, {letter}]"
        validate.expect(good, op, name, expected, validate.shape_of(index))
    room.check_choice(op, "reduce", reduce, REDUCTIONS)


def sorted_list(index: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Lists ascending [B, H, K, w], pads as T at their ends; and how many entries [B, H, K, 1] are none."""
    ascending = torch.where((index >= 0) & (index < steps), index, steps).sort(-1).values
    return ascending, (ascending < steps).sum(-1, keepdim=True)


def places_after(ascending: Tensor, values: Tensor) -> Tensor:
    """How many entries of its list [..., n] each of the values [..., m] is not below.

    Under vmap both are mapped over then: torch warns where one is not.
    """
    both = 0 * (ascending.sum(-1, keepdim=True) + values.sum(-1, keepdim=True))
    return torch.searchsorted((ascending + both).contiguous(), (values + both).contiguous(), right=True)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    causal: bool = False,
    reduce: str = "mean",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """One call of range_attention on packed rows: the keys that a slot sees are a range of its ascending list."""
    steps = q.shape[1]
    queries, _ = sorted_list(q_index, steps)
    keys, count = sorted_list(k_index, steps)
    end = count.expand(queries.shape)
    if causal:
        end = torch.minimum(places_after(keys, queries), end)
    # Pads see nothing, at a place that keeps the order.
    first = torch.where(queries < steps, 0, end)
    base = torch.arange(keys.shape[2], device=q.device).unsqueeze(-1) * keys.shape[3]
    ranges = torch.stack([(first + base).flatten(2), (end + base).flatten(2)], 2).unsqueeze(2).to(torch.int32)
    tokens = torch.where(end > first, queries, -1).flatten(2)
    lists = keys.flatten(2)
    slot_o, slot_lse = ops.range_attention(
        ops.gather_rows(q, queries.flatten(2)),
        ops.gather_rows(k, lists),
        ops.gather_rows(v, lists),
        ranges,
        scale=scale,
    )
    order, starts = ops.counting_sort(tokens, steps)
    o, lse = ops.reduce_slots(slot_o, slot_lse.to(validate.real_of(q.dtype)), order, starts, reduce)
    return o, lse.to(torch.float32)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.gathered_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("counting_sort", "gather_rows", "range_attention", "reduce_slots"),
)


def gathered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    *,
    causal: bool = False,
    reduce: str = "mean",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside lists: the queries of list c see its keys; a token's results in several lists become one.

        slot (c, a) of token i = q_index[c, a]:   o', lse' = attention of q_i over the keys k_index[c]
        o_i = mean, sum or last of its slots' o'  lse_i = log sum exp lse', or that of the last

    An entry outside [0, T) is a pad. A key listed twice counts twice. A slot is live if it sees a key; the others have
    no part. A token without live slots has o = 0 and lse = -inf. If the lists depend on later tokens, so does the
    result, whatever `causal` says: see `cluster_assign`.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        q_index: [B, H, K, w], int32 or int64: positions of queries, K lists a head.
        k_index: [B, H, K, w'], int32 or int64: positions of keys.
        causal: a slot of token i sees the entries of its list that are i or less.
        reduce: "mean" or "sum" of the live slots, or "last": that of the largest (c, a).
        scale: a number; None is D**-0.5.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse [B, H, T] in float32, natural, differentiable.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: the listed rows of q, k and v [B, K w, H, D], and a result for each slot. A gradient keeps them.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 1, 16) for _ in range(3))
        >>> lists = torch.tensor([[0, 2], [1, 3]]).view(1, 1, 2, 2)  # tokens 0 and 2 see each other, and so do 1 and 3
        >>> o, lse = seqops.gathered_attention(q, k, v, lists, lists, causal=True)
        >>> torch.equal(o[:, :2], v[:, :2])  # the first of each list sees itself alone
        True

    Roy, Saffar, Vaswani and Grangier, "Efficient content-based sparse attention with routing transformers", 2021.
    """
    return ops.gathered_attention(q, k, v, q_index, k_index, causal=causal, reduce=reduce, scale=scale)
