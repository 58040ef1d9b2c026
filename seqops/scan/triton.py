"""Launchers of the scans' Triton kernels: what is copied, which form walks, and what is summed afterwards.

Letters as in triton_kernels.py: channels are gates [G] times the channels [R] that share one; a lane walks a row.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import choose
from . import tiles, triton_grid_scan
from . import triton_kernels as kernels
from .triton_grid_scan import grid_scan, grid_scan_backward  # noqa: F401  served from here
from .triton_kernels import APPLY, EACH, FOLD, NONE, RECALL, REDUCE, SUM

# Steps of a tile in the interpreter, which has no device to choose for; 0: one walk, however long.
INTERPRETED_TILE = 0
# What needs no fold may be cut anywhere.
PIECE = 64

INTERPRETED = triton.knobs.runtime.interpret
REALS = {torch.complex64: torch.float32, torch.complex128: torch.float64}
# A program is one warp: nothing needs a barrier, and many short programs share a multiprocessor.
# Left to itself, ptxas saves registers by spilling a word or two.
OPTIONS = {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": 255}
WARP = 32
# Blocks of a dimension, where they fit: few, so that few kernels exist.
LADDER = (1, 8, 32, 64)
# Steps of loads on their way.
DEPTH = 4


class Gate(NamedTuple):
    """[1 or B, 1 or T, gates] values, gates neighbours in memory; channel (o * gates + g) * inner + i has gate g."""

    values: Tensor
    outer: int
    gates: int
    inner: int
    shape: tuple[int, ...]  # of the gates, one size for each dimension of C

    @property
    def reduced(self) -> int:
        return self.outer * self.inner


class Rows(NamedTuple):
    """The rows of a walk: arguments of the kernels, as `locate` reads them."""

    p_edges: Tensor
    p_sequence: Tensor
    p_tile: Tensor
    rows: int
    packed_rows: int
    tiled_rows: int
    sequences: int
    tiles: int
    steps: int


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def gate_dtype(a: torch.dtype, x: torch.dtype) -> torch.dtype:
    """What the kernels read a as: the dtype of x, or of x's real sums."""
    state = state_dtype(x)
    return x if a == x or a.is_complex else REALS.get(state, state)


SOURCES = (
    tiles.__file__,
    __file__,
    *(str(Path(__file__).with_name(f"triton_{part}.py")) for part in ("kernels", "blocks")),
)
TUNABLES = {
    name: choose.Tunable(f"{name}.triton", tiles.problem_in_triton, SOURCES)
    for name in ("linear_scan.forward", "linear_scan.backward", *(f"softmax_scan.{n}" for n in tiles.SOFTMAX_WALKS))
}


@lru_cache(maxsize=4096)
def key_of(kernel: str, dtype: torch.dtype, batch: int, steps: int, channels: int) -> choose.Key:
    """All sizes are rounded up to a power of two, so that few choices exist. Of packed sequences the row counts."""
    sizes = (("B", batch), ("T", steps), ("C", channels))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    return choose.Key(f"{kernel}.triton", str(dtype).removeprefix("torch."), buckets)


def tile_of(kernel: str, like: Tensor, channels: int) -> int:
    """Steps of a tile; 0: one walk through them all."""
    tunable, (batch, steps) = TUNABLES[kernel], like.shape[:2]
    chosen: choose.Solution | None
    if like.is_cuda:
        chosen = choose.solution(tunable, key_of(kernel, like.dtype, batch, steps, channels), like.device)
    else:
        chosen = choose.forced_solution(tunable.name)
    tile = INTERPRETED_TILE if chosen is None else chosen["tile"]
    return tile if steps > tile else 0


def widths(room: int) -> list[int]:
    return sorted({*(width for width in LADDER if width <= room), room})


def fit(room: int, size: int) -> int:
    """The widest block that takes at most twice the lanes which the best one takes."""
    taken = {width: -(-size // width) * width for width in widths(room)}
    return max(width for width in taken if taken[width] <= 2 * min(taken.values()))


def elements(dtype: torch.dtype) -> int:
    """Elements of a program's block, one or two a lane: with four, the general strides take more than 255 registers."""
    return max(WARP, 256 // state_dtype(dtype).itemsize)


def block(room: int, gates: int, reduced: int) -> dict[str, int]:
    """BS, BG and BR, of `room` elements together."""
    wide = fit(room, reduced)
    high = fit(room // wide, gates)
    return {"BS": room // wide // high, "BG": high, "BR": wide}


def launch(kernel: Any, like: Tensor, sizes: tuple[int, int, int], arguments: dict[str, Any]) -> None:
    """Run one program for each block of rows, gates and channels of a gate on the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    shape = (arguments["BS"], arguments["BG"], arguments.get("BR", 1))
    programs = math.prod(-(-size // width) for size, width in zip(sizes, shape, strict=True))
    if programs:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**{name: real_view(value) for name, value in arguments.items()}, **OPTIONS)


def real_view(value: Any) -> Any:
    return torch.view_as_real(value) if isinstance(value, Tensor) and value.is_complex() else value


def readable(x: Tensor, *shape: int) -> Tensor:
    """x in this shape with neighbours along the last dimension; a copy where its strides do not allow that."""
    x = x.resolve_conj().resolve_neg().reshape(shape)
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def stride(x: Tensor, dim: int) -> int:
    """0 where one entry serves all."""
    return 0 if x.shape[dim] == 1 else x.stride(dim)


def dense_state(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if state is None else state.to(dtype).resolve_conj().resolve_neg().contiguous()


def copy_state(state: Tensor | None, like: Tensor) -> Tensor:
    """What a scan without steps returns: the state it began with, in new memory."""
    return torch.zeros_like(like) if state is None else like.copy_(state)


def gate_of(a: Tensor, dtype: torch.dtype, shape: torch.Size) -> Gate:
    """a [1 or B, 1 or T, *(1 or C)] as a Gate in `dtype`; only dimensions of 1 between varying ones are expanded."""
    own, every = list(a.shape[2:]), list(shape[2:])
    varying = [i for i, size in enumerate(own) if size > 1]
    low, high = (varying[0], varying[-1] + 1) if varying else (0, 0)
    own[low:high] = every[low:high]
    outer, inner = math.prod(every[:low]), math.prod(every[high:])
    values = readable(a.to(dtype).expand(*a.shape[:2], *own), *a.shape[:2], math.prod(own))
    return Gate(values, outer, math.prod(own), inner, tuple(own))


def place_rows(batch: int, steps: int, cu_seqlens: Tensor | None, tile: int, device: torch.device) -> Rows:
    """Rows of a walk over [batch, steps]; nothing waits for the values of `cu_seqlens`.

    tile: steps; 0: whole sequences.
    """
    unused = torch.empty(0, dtype=torch.int64, device=device)
    if cu_seqlens is None:
        pieces = -(-steps // tile) if tile else 1
        return Rows(unused, unused, unused, batch * pieces, 0, 0, batch, pieces, tile or steps)
    edges, sequences = cu_seqlens.to(torch.int64).contiguous(), len(cu_seqlens) - 1
    if not tile:
        return Rows(edges, unused, unused, sequences, sequences, 0, sequences, 1, steps)
    # As `locate` clamps them. Every sequence may leave one tile unfilled; rows that no sequence needs stay empty.
    edges = torch.cat((edges.new_zeros(1), edges[1:-1].clamp(0, steps), edges.new_full((1,), steps))).cummax(0).values
    first = torch.cat((edges.new_zeros(1), ((edges.diff() + tile - 1) // tile).cumsum(0)))
    rows = steps // tile + sequences
    sequence = torch.searchsorted(first[1:], torch.arange(rows, device=device), right=True).clamp(max=sequences - 1)
    return Rows(edges, sequence, first, rows, rows, rows, sequences, 1, tile)


def fold_rows(rows: Rows) -> tuple[Rows, tuple[int, int]]:
    """The walk over the tiles of `rows`, and [batch, time] of what it walks over."""
    batch, steps = (1, rows.rows) if rows.packed_rows else (rows.sequences, rows.tiles)
    packed = rows.sequences if rows.packed_rows else 0
    folded = rows._replace(
        p_edges=rows.p_tile, rows=rows.sequences, packed_rows=packed, tiled_rows=0, tiles=1, steps=steps
    )
    return folded, (batch, steps)


def run_forward(
    form: tl.constexpr,
    rows: Rows,
    x: Tensor,
    gate: Gate,
    p: Tensor | None,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    initial: Tensor | None,
    reverse: bool,
) -> None:
    """One launch of the kernel: x [B, T, C]; outputs are h, product and last, None where there is none."""
    h, product, last = outputs
    shape = block(elements(x.dtype), gate.gates, gate.reduced)
    state = next(t for t in (last, initial, product, p, h) if t is not None and t.dtype == state_dtype(x.dtype))
    arguments = {
        "p_x": x,
        "p_a": gate.values,
        "p_p": state if p is None else p,
        "p_h": h,
        "p_product": state if product is None else product,
        "p_initial": state if initial is None else initial,
        "p_last": state if last is None else last,
        **rows._asdict(),
        "T": x.shape[1],
        "initial_rows": 0 if initial is None else rows.rows,
        "last_rows": 0 if last is None else rows.rows,
        "reverse": int(reverse),
        "gates": gate.gates,
        "reduced": gate.reduced,
        "inner": gate.inner,
        "stride_x_b": stride(x, 0),
        "stride_x_t": stride(x, 1),
        "stride_a_b": stride(gate.values, 0),
        "stride_a_t": stride(gate.values, 1),
        **forward_constants(form, x.dtype, gate.values.dtype, shape, gate.outer > 1, p is not None),
    }
    launch(kernels.linear_scan_forward, x, (rows.rows, gate.gates, gate.reduced), arguments)


def forward_constants(
    form: tl.constexpr, x: torch.dtype, a: torch.dtype, shape: dict[str, int], grouped: bool, scaled: bool
) -> dict[str, Any]:
    flags = {"SCALED": scaled, "GROUPED": grouped, "COMPLEX_X": x.is_complex, "COMPLEX_A": a.is_complex}
    return {"PASS": form.value, **flags, "DEPTH": DEPTH, **shape}


def scan_forward(
    kernel: str,
    x: Tensor,
    gate: Gate,
    p: Tensor | None,
    initial: Tensor | None,
    h: Tensor,
    last: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
) -> None:
    """Write h [B, T, C] and last [sequences, C]."""
    batch, steps, width = x.shape
    tile = tile_of(kernel, x, width)
    rows = place_rows(batch, steps, cu_seqlens, tile, x.device)
    if tile:
        state = state_dtype(x.dtype)
        carry = torch.empty(rows.rows, width, dtype=state, device=x.device)
        product = torch.empty(rows.rows, gate.gates, dtype=wide(gate.values.dtype), device=x.device)
        run_forward(REDUCE, rows, x, gate, p, (carry, product, None), None, reverse)
        fold(rows, carry, gate._replace(values=product), initial, last, reverse)
        initial, last = carry, None
    run_forward(APPLY, rows, x, gate, p, (h, None, last), initial, reverse)


def wide(gate: torch.dtype) -> torch.dtype:
    """Of the products of gates."""
    return torch.complex128 if gate.is_complex else torch.float64


def fold(rows: Rows, carry: Tensor, gate: Gate, initial: Tensor | None, last: Tensor | None, reverse: bool) -> None:
    """Replace what each tile adds to a state, in `carry` [rows, C], by the state before the tile."""
    folded, shape = fold_rows(rows)
    carry = carry.view(*shape, -1)
    gate = gate._replace(values=gate.values.view(*shape, -1))
    run_forward(FOLD, folded, carry, gate, None, (carry, None, last), initial, reverse)


def run_backward(
    form: tl.constexpr,
    grad: tl.constexpr,
    rows: Rows,
    dh: Tensor | None,
    gate: Gate,
    h: Tensor,
    state: Tensor | None,
    outputs: tuple[Tensor, Tensor | None, Tensor | None],
    initial: Tensor | None,
    reverse: bool,
) -> None:
    """One launch of the kernel: dh and h [B, T, C]; outputs are dx, da (REDUCE: products) and last."""
    dx, da, last = outputs
    shape = block(elements(h.dtype), gate.gates, gate.reduced)
    like = next(t for t in (last, initial, dx) if t is not None)
    dh_or_h = h if dh is None else dh
    arguments = {
        "p_dh": dh_or_h,
        "p_a": gate.values,
        "p_h": h,
        "p_state": like if state is None else state,
        "p_dx": dx,
        "p_da": like if da is None else da,
        "p_initial": like if initial is None else initial,
        "p_last": like if last is None else last,
        **rows._asdict(),
        "B": h.shape[0],
        "T": h.shape[1],
        "initial_rows": 0 if initial is None else rows.rows,
        "last_rows": 0 if last is None else rows.rows,
        "state_rows": 0 if state is None else rows.sequences,
        "dh_rows": 0 if dh is None else rows.rows,
        "reverse": int(reverse),
        "gates": gate.gates,
        "reduced": gate.reduced,
        "inner": gate.inner,
        "stride_dh_b": stride(dh_or_h, 0),
        "stride_dh_t": stride(dh_or_h, 1),
        "stride_a_b": stride(gate.values, 0),
        "stride_a_t": stride(gate.values, 1),
        "stride_h_b": stride(h, 0),
        "stride_h_t": stride(h, 1),
        **backward_constants(form, grad, h.dtype, gate.values.dtype, shape, gate.outer > 1),
    }
    launch(kernels.linear_scan_backward, h, (rows.rows, gate.gates, gate.reduced), arguments)


def backward_constants(
    form: tl.constexpr, grad: tl.constexpr, x: torch.dtype, a: torch.dtype, shape: dict[str, int], grouped: bool
) -> dict[str, Any]:
    flags = {"GROUPED": grouped, "COMPLEX_X": x.is_complex, "COMPLEX_A": a.is_complex}
    return {"PASS": form.value, "GRAD": grad.value, **flags, "DEPTH": DEPTH, **shape}


# ---- operators


def linear_scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, *C] in the dtype of x, complex if a is, and the final state [B or N, *C]."""
    storage = torch.promote_types(x.dtype, torch.complex64) if a.is_complex() and not x.is_complex() else x.dtype
    batch, steps, *shape = x.shape
    state, width = state_dtype(storage), math.prod(shape)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    h = torch.empty(x.shape, dtype=storage, device=x.device)
    last = torch.empty(sequences, *shape, dtype=state, device=x.device)
    if h.numel() == 0:
        return h, copy_state(initial_state, last)
    x_read = readable(x.to(storage), batch, steps, width)
    gate = gate_of(a, gate_dtype(a.dtype, storage), x.shape)
    initial = dense_state(initial_state, state)
    scan_forward("linear_scan.forward", x_read, gate, None, initial, h, last, reverse, cu_seqlens)
    return h, last


def linear_scan_backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, T, *C], da in a's shape, or empty where h is None, and the gradient of the initial state [B or N, *C]."""
    like = h if dh is None else dh
    batch, steps, *shape = like.shape
    storage, state, width = like.dtype, state_dtype(like.dtype), math.prod(shape)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    dx = torch.empty(like.shape, dtype=storage, device=like.device)
    dinitial = torch.empty(sequences, *shape, dtype=state, device=like.device)
    if dx.numel() == 0:
        da = a.new_empty(0) if h is None else torch.zeros(a.shape, dtype=a.dtype, device=a.device)
        return dx, da, copy_state(dfinal_state, dinitial)
    gate = gate_of(a, gate_dtype(a.dtype, storage), like.shape)
    dh_read = None if dh is None else readable(dh, batch, steps, width)
    h_read = dh_read if h is None else readable(h, batch, steps, width)
    tile = tile_of("linear_scan.backward", like, width)
    rows = place_rows(batch, steps, cu_seqlens, tile, like.device)
    carry, last = dense_state(dfinal_state, state), dinitial
    sums = state if gate.values.is_complex() else REALS.get(state, state)
    if tile:
        folded = torch.empty(rows.rows, width, dtype=state, device=like.device)
        product = torch.empty(rows.rows, gate.gates, dtype=wide(gate.values.dtype), device=like.device)
        run_backward(REDUCE, NONE, rows, dh_read, gate, h_read, None, (folded, product, None), None, reverse)
        # The gradients' walk is the scan's the other way.
        fold(rows, folded, gate._replace(values=product), carry, dinitial, not reverse)
        carry, last = folded, None

    grad, da = gate_gradient(a, gate, h, rows, sums)
    before = dense_state(initial_state, state) if h is not None else None
    run_backward(APPLY, grad, rows, dh_read, gate, h_read, before, (dx, da, last), carry, reverse)
    return dx, a.new_empty(0) if h is None else sum_gate(da, grad, a, gate, rows), dinitial


def gate_gradient(
    a: Tensor, gate: Gate, h: Tensor | None, rows: Rows, sums: torch.dtype
) -> tuple[tl.constexpr, Tensor | None]:
    """GRAD, and where its sums go: one for each block of R and each step or row, summed later; or da at once."""
    if h is None:
        return NONE, None
    batch, steps = h.shape[:2]
    blocks = -(-gate.reduced // block(elements(h.dtype), gate.gates, gate.reduced)["BR"])
    if a.shape[1] != steps:
        return SUM, torch.empty(blocks, rows.rows, gate.gates, dtype=sums, device=a.device)
    whole = blocks == 1 and a.shape[0] == batch
    return EACH, torch.empty(
        blocks, batch, steps, gate.gates, dtype=gate.values.dtype if whole else sums, device=a.device
    )


def sum_gate(da: Tensor, grad: tl.constexpr, a: Tensor, gate: Gate, rows: Rows) -> Tensor:
    """Partial sums, in their order, to a's shape and dtype."""
    if grad == SUM:
        da = da.view(len(da), -1, 1 if rows.packed_rows else rows.tiles, gate.gates)
        da = da.sum(dim=(0, 2) if a.shape[0] > 1 else (0, 1, 2))
    elif len(da) > 1 or a.shape[0] != da.shape[1]:
        da = da.sum(dim=0 if a.shape[0] == da.shape[1] else (0, 1))
    # `gate_of` expands dimensions of 1 between varying ones.
    return da.view(*a.shape[:2], *gate.shape).sum_to_size(a.shape).to(a.dtype)


def softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] in the dtype of v and lse [B, T, H]."""
    return run_softmax(s, v, initial_lse, initial_out, reverse, cu_seqlens, keep=False)[:2]


def softmax_scan_forward(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `softmax_scan`, and m and u [B, T, H] after each step."""
    return run_softmax(s, v, initial_lse, initial_out, reverse, cu_seqlens, keep=True)


def run_softmax(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None,
    initial_out: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, steps, heads, width = v.shape
    state = state_dtype(v.dtype)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse, alpha, p = (torch.empty(s.shape, dtype=state, device=v.device) for _ in range(3))
    m, u = (torch.empty_like(lse) if keep else lse for _ in range(2))
    if o.numel() == 0:
        return o, lse, m, u
    s = readable(score(s, state), batch, steps, heads)
    maximum = dense_state(initial_lse, state)
    tile = tile_of("softmax_scan.scores", s, heads)
    rows = place_rows(batch, steps, cu_seqlens, tile, v.device)
    outputs, weight = {"p_m": m, "p_u": u, "p_alpha": alpha, "p_p": p, "p_lse": lse}, None
    if tile:
        maxima, sums = (torch.empty(rows.rows, heads, dtype=state, device=v.device) for _ in range(2))
        run_weights(REDUCE, rows, s, {**outputs, "p_m": maxima, "p_u": sums}, None, None, reverse)
        folded, shape = fold_rows(rows)
        partial = {**outputs, "p_m": maxima, "p_u": sums}
        run_weights(FOLD, folded, maxima.view(*shape, heads), partial, maximum, None, reverse)
        maximum, weight = maxima, sums
    run_weights(APPLY, rows, s, outputs, maximum, weight, reverse, keep=keep)

    initial = dense_state(initial_out, state)
    if initial is not None:
        initial = initial.masked_fill((initial_lse == -math.inf)[..., None], 0.0)
    gate = Gate(alpha, 1, heads, width, (heads,))
    values = readable(v, batch, steps, heads * width)
    scan_forward("softmax_scan.forward", values, gate, p, initial, o, None, reverse, cu_seqlens)
    return o, lse, m, u


def score(s: Tensor, state: torch.dtype) -> Tensor:
    return s.to(state) if state == torch.float64 else s


def run_weights(
    form: tl.constexpr,
    rows: Rows,
    s: Tensor,
    outputs: dict[str, Tensor],
    maximum: Tensor | None,
    weight: Tensor | None,
    reverse: bool,
    *,
    keep: bool = False,
) -> None:
    """One launch of the kernel: s [B, T, H]; maximum and weight before each row, or sequence (RECALL)."""
    high = fit(WARP, s.shape[2])
    arguments = {
        "p_s": s,
        "p_w": outputs["p_u"],
        "p_initial": outputs["p_m"] if maximum is None else maximum,
        "p_weight": outputs["p_u"] if weight is None else weight,
        **outputs,
        **rows._asdict(),
        "T": s.shape[1],
        "initial_rows": 0 if maximum is None else len(maximum),
        "weight_rows": 0 if weight is None else len(weight),
        "reverse": int(reverse),
        "heads": s.shape[2],
        "stride_s_b": stride(s, 0),
        "stride_s_t": stride(s, 1),
        **weights_constants(form, {"BS": WARP // high, "BG": high}, keep),
    }
    launch(kernels.softmax_scan_weights, s, (rows.rows, s.shape[2], 1), arguments)


def weights_constants(form: tl.constexpr, shape: dict[str, int], keep: bool) -> dict[str, Any]:
    return {"PASS": form.value, "KEEP": keep, "DEPTH": DEPTH, **shape}


def softmax_scan_backward(
    do: Tensor | None,
    dlse: Tensor | None,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ds, dv in the dtypes of s and v; gradients of the initial lse [B or N, H] and out [B or N, H, D]."""
    batch, steps, heads, width = v.shape
    state = state_dtype(v.dtype)
    sequences = batch if cu_seqlens is None else len(cu_seqlens) - 1
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = torch.zeros(sequences, 2, heads, width, dtype=state, device=v.device)
    if dv.numel() == 0:
        ds = torch.zeros(s.shape, dtype=s.dtype, device=s.device)
        return ds, dv, last[:, 1, :, 0].clone(), last[:, 0].clone()
    m, u = (readable(t, batch, steps, heads).contiguous() for t in (m, u))
    lse = dense_state(initial_lse, state)
    alpha, p = torch.empty_like(m), torch.empty_like(m)
    # alpha and p follow from m and u at any step, so tiles need no fold.
    piece = PIECE if steps > PIECE else 0
    rows = place_rows(batch, steps, cu_seqlens, piece, v.device)
    outputs = {"p_m": m, "p_u": u, "p_alpha": alpha, "p_p": p, "p_lse": m}
    run_weights(RECALL, rows, readable(score(s, state), batch, steps, heads), outputs, lse, None, reverse)

    flat = (batch, steps, heads * width)
    grads = (
        None if do is None else readable(do, *flat),
        None if dlse is None else readable(dlse.to(state), batch, steps, heads),
    )
    inputs = (readable(o, *flat), readable(v, *flat), alpha, p)
    tile = tile_of("softmax_scan.backward", v, heads * width)
    if tile != piece:
        rows = place_rows(batch, steps, cu_seqlens, tile, v.device)
    blocks = -(-width // block(WARP, heads, width)["BR"])
    ds = torch.empty(blocks, batch, steps, heads, dtype=state, device=v.device)
    carry, end = None, last
    if tile:
        carry = torch.empty(rows.rows, 2, heads, width, dtype=state, device=v.device)
        product = torch.empty(rows.rows, heads, dtype=torch.float64, device=v.device)
        run_values(REDUCE, rows, grads, inputs, (product, ds), None, carry, reverse)
        fold(rows, carry, Gate(product, 2, heads, width, (heads,)), None, last, not reverse)
        end = None
    run_values(APPLY, rows, grads, inputs, (dv, ds), carry, end, reverse)

    dinitial_lse = -last[:, 1].sum(-1)
    if lse is not None:
        gradient = last[:, 0]
        # In an empty sequence no gradient meets an infinite state.
        given = torch.where(gradient == 0, 0.0, gradient * dense_state(initial_out, state)).sum(-1)
        dinitial_lse = (dinitial_lse + given).masked_fill(lse == -math.inf, 0.0)
    return ds.sum(0).to(s.dtype), dv, dinitial_lse, last[:, 0].clone()


def run_values(
    form: tl.constexpr,
    rows: Rows,
    grads: tuple[Tensor | None, Tensor | None],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    outputs: tuple[Tensor, Tensor],
    initial: Tensor | None,
    last: Tensor | None,
    reverse: bool,
) -> None:
    """One launch of the kernel: outputs are dv (REDUCE: products) and ds."""
    o, v, alpha, p = inputs
    heads = alpha.shape[2]
    width = v.shape[2] // heads
    do, dlse = o if grads[0] is None else grads[0], alpha if grads[1] is None else grads[1]
    like = alpha if last is None else last
    arguments = {
        "p_do": do,
        "p_dlse": dlse,
        "p_o": o,
        "p_v": v,
        "p_alpha": alpha,
        "p_p": p,
        "p_dv": outputs[0],
        "p_ds": outputs[1],
        "p_initial": like if initial is None else initial,
        "p_last": like,
        **rows._asdict(),
        "B": v.shape[0],
        "T": v.shape[1],
        "initial_rows": 0 if initial is None else rows.rows,
        "last_rows": 0 if last is None else rows.rows,
        "do_rows": 0 if grads[0] is None else rows.rows,
        "dlse_rows": 0 if grads[1] is None else rows.rows,
        "reverse": int(reverse),
        "gates": heads,
        "reduced": width,
        "stride_do_b": stride(do, 0),
        "stride_do_t": stride(do, 1),
        "stride_dlse_b": stride(dlse, 0),
        "stride_dlse_t": stride(dlse, 1),
        "stride_o_b": stride(o, 0),
        "stride_o_t": stride(o, 1),
        "stride_v_b": stride(v, 0),
        "stride_v_t": stride(v, 1),
        **values_constants(form, block(WARP, heads, width)),
    }
    launch(kernels.softmax_scan_backward, v, (rows.rows, heads, width), arguments)


def values_constants(form: tl.constexpr, shape: dict[str, int]) -> dict[str, Any]:
    return {"PASS": form.value, "DEPTH": DEPTH, **shape}


# ---- what is shipped


TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
REAL_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
COMPLEX_PAIRS = (
    (torch.complex64, torch.complex64),
    (torch.complex64, torch.float32),
    (torch.complex128, torch.complex128),
    (torch.complex128, torch.float64),
)


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    own = [*forward_configurations(), *backward_configurations(), *weights_configurations(), *values_configurations()]
    return [*own, *triton_grid_scan.configurations()]


def configuration(
    kernel: Any, constants: dict[str, Any], state: torch.dtype, **pointers: torch.dtype
) -> dict[str, Any]:
    """Pointers without a name here are to STATE, or to the int64 that say where rows lie; other arguments are int32."""
    pointers = {name: pointers.get(name, state) for name in kernel.arg_names if name.startswith("p_")}
    types = {name: "*" + TYPES[REALS.get(dtype, dtype)] for name, dtype in pointers.items()}
    types |= dict.fromkeys(("p_edges", "p_sequence", "p_tile"), "*i64")
    sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
    return {"kernel": kernel, "types": types | sizes, "constants": constants, "options": OPTIONS}


def blocks(room: int) -> Iterator[dict[str, int]]:
    """What `block` can return."""
    for wide in widths(room):
        for high in widths(room // wide):
            yield {"BS": room // wide // high, "BG": high, "BR": wide}


def forward_configurations() -> Iterator[dict[str, Any]]:
    for x, a in (*REAL_PAIRS, *COMPLEX_PAIRS):
        state, products = state_dtype(x), wide(a)
        forms = [(APPLY, a, False), (REDUCE, a, False)]
        forms += [(FOLD, products, False)] if x == state else []
        forms += [(APPLY, a, True), (REDUCE, a, True)] if a == state and not x.is_complex else []
        for (form, gate, scaled), shape in itertools.product(forms, blocks(elements(x))):
            for grouped in (False,) if scaled else (False, True):
                pointers = {"p_x": x, "p_a": gate, "p_h": x if form == APPLY else state}
                pointers |= {"p_product": products} if form == REDUCE else {}
                constants = forward_constants(form, x, gate, shape, grouped, scaled)
                yield configuration(kernels.linear_scan_forward, constants, state, **pointers)


def backward_configurations() -> Iterator[dict[str, Any]]:
    for x, a in (*REAL_PAIRS, *COMPLEX_PAIRS):
        state = state_dtype(x)
        forms = [(REDUCE, NONE, wide(a)), (APPLY, NONE, state), (APPLY, SUM, state)]
        forms += [(APPLY, EACH, da) for da in {REALS.get(a, a): None, REALS.get(state, state): None}]
        for (form, grad, da), shape, grouped in itertools.product(forms, blocks(elements(x)), (False, True)):
            constants = backward_constants(form, grad, x, a, shape, grouped)
            dx = x if form == APPLY else state
            kernel = kernels.linear_scan_backward
            yield configuration(kernel, constants, state, p_dh=x, p_a=a, p_h=x, p_dx=dx, p_da=da)


def weights_configurations() -> Iterator[dict[str, Any]]:
    for s, state in {(s, state_dtype(s)): None for s in TYPES}:
        for form, high in itertools.product((REDUCE, APPLY, RECALL, *((FOLD,) if s == state else ())), widths(WARP)):
            for keep in (False, True) if form == APPLY else (False,):
                constants = weights_constants(form, {"BS": WARP // high, "BG": high}, keep)
                yield configuration(kernels.softmax_scan_weights, constants, state, p_s=s)


def values_configurations() -> Iterator[dict[str, Any]]:
    for v in TYPES:
        state = state_dtype(v)
        for form, shape in itertools.product((REDUCE, APPLY), blocks(WARP)):
            constants = values_constants(form, shape)
            dv = v if form == APPLY else torch.float64
            kernel = kernels.softmax_scan_backward
            yield configuration(kernel, constants, state, p_do=v, p_o=v, p_v=v, p_dv=dv)
