"""How linear attention's Triton kernels are launched: rows, decays and states as they read them, and one walk.

Letters as in triton_kernels.py. A state lies as [rows, H, K, V] and is read either way round: inner and outer channels
of a walk are K and V in the forward and for dv, and V and K for dq and dk.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import tiles
from . import triton_kernels as kernels
from . import triton_window as window_kernels
from .tiles import Shape
from .triton_blocks import ALWAYS, EACH, INNER, NONE, OUTER, REDUCE, REPAIR, STEP, SUM

INTERPRETED = triton.knobs.runtime.interpret
# Lanes of the kernels that only add, where they fit; rows of a block.
LANES = (16, 32, 64, 128)
JOINED = (32, 128)
REACHED = (1, 16)
MET = (1, 2, 4, 16)
# Steps of loads on their way.
DEPTH = 8
# Elements between steps: those of a chunk are counted in 32 bits.
MOST_STRIDE = 1 << 24


class Rows(NamedTuple):
    """The pieces of sequences that programs walk. `table` [rows, 4] where they are packed, else all have `spans`."""

    table: Tensor | None
    first: Tensor | None  # [sequences + 1] row of each packed sequence
    rows: int
    spans: int
    span: int
    start: int
    sequences: int

    @property
    def whole(self) -> bool:
        return self.rows == self.sequences

    def arguments(self) -> dict[str, Any]:
        return {"packed": int(self.table is not None), "spans": self.spans, "span": self.span}


class Gate(NamedTuple):
    """Logarithms of decays as a kernel reads them, and what it is compiled for."""

    values: Tensor
    strides: tuple[int, int, int]
    kind: Any  # NONE, STEP, INNER or OUTER
    width: int

    def other(self) -> Gate:
        """For a walk in which inner and outer channels have changed places."""
        swapped = {INNER.value: OUTER, OUTER.value: INNER}
        return self._replace(kind=swapped.get(self.kind.value, self.kind))


class State(NamedTuple):
    """[rows, H, K, V], `turned` where V are the inner channels; None: zeros."""

    values: Tensor | None
    turned: bool = False
    by_row: bool = True

    def turn(self) -> State:
        return self._replace(turned=not self.turned)

    def strides(self, name: str) -> dict[str, int]:
        n, h, k, v = (0, 0, 0, 0) if self.values is None else self.values.stride()
        inner, outer = (v, k) if self.turned else (k, v)
        return {f"stride_{name}_n": n, f"stride_{name}_h": h, f"stride_{name}_k": inner, f"stride_{name}_v": outer}


class Call(NamedTuple):
    """What all walks of one call share."""

    B: int
    T: int
    heads: int
    scale: float
    state: torch.dtype
    storage: torch.dtype
    kind: tiles.Kind
    steps: int  # of a chunk
    span: int  # of a row; 0: whole sequences

    def shape(self) -> Shape:
        return self.kind.shape(self.steps, self.T == 1)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def readable(x: Tensor) -> Tensor:
    """x with neighbours along the last dimension, and chunks within 32 bits; a copy where its strides are others."""
    near = (x.stride(-1) == 1 or x.shape[-1] == 1) and x.stride(1) < MOST_STRIDE
    return x if near else x.contiguous()


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Of [B, T, H, ...]; 0 where one entry serves all."""
    return {f"stride_{name}_{letter}": x.stride(i) if x.shape[i] > 1 else 0 for i, letter in enumerate("bth")}


def gate_of(log_decay: Tensor | None, like: Tensor) -> Gate:
    """Read in the dtype of the sequences, or else of sums."""
    state = state_dtype(like.dtype)
    if log_decay is None:
        return Gate(like.new_empty(0, dtype=state), (0, 0, 0), NONE, 1)
    if log_decay.dtype not in (like.dtype, state):
        log_decay = log_decay.to(state)
    if log_decay.dim() == 1:
        return Gate(log_decay, (0, 0, log_decay.stride(0)), STEP, 1)
    values = readable(log_decay) if log_decay.dim() == 4 else readable(log_decay[..., None])[..., 0]
    b, t, h = (values.stride(i) if values.shape[i] > 1 else 0 for i in range(3))
    return Gate(values, (b, t, h), INNER if values.dim() == 4 else STEP, values.shape[3] if values.dim() == 4 else 1)


def dense(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if state is None else state.to(dtype).contiguous()


def place_rows(call: Call, cu_seqlens: Tensor | None, span: int, tail: int = 0) -> Rows:
    """Rows of `span` steps, 0: whole sequences. tail: only the last steps of each. Nothing waits for `cu_seqlens`."""
    span = min(span or call.T, call.T)
    if cu_seqlens is None:
        if tail:
            return Rows(None, None, call.B, 1, tail, max(call.T - tail, 0), call.B)
        spans = -(-call.T // span)
        return Rows(None, None, call.B * spans, spans, span, 0, call.B)
    count, steps = len(cu_seqlens) - 1, call.T
    edges = cu_seqlens.to(torch.int64)
    edges = torch.cat((edges.new_zeros(1), edges[1:-1].clamp(0, steps), edges.new_full((1,), steps))).cummax(0).values
    begin, end = edges[:-1], edges[1:]
    numbers = torch.arange(count, device=edges.device)
    if tail or span == steps:
        start = torch.maximum(begin, end - tail) if tail else begin
        table = torch.stack((numbers, begin, end, start), 1)
        return Rows(table, None, count, 1, tail or span, 0, count)
    # Every sequence may leave one row unfilled; rows that no sequence needs begin past their end.
    first = torch.cat((edges.new_zeros(1), ((edges.diff() + span - 1) // span).cumsum(0)))
    rows = steps // span + count
    numbers = torch.arange(rows, device=edges.device)
    n = torch.searchsorted(first[1:], numbers, right=True).clamp(max=count - 1)
    table = torch.stack((n, begin[n], end[n], begin[n] + (numbers - first[n]) * span), 1)
    return Rows(table, first, rows, 1, span, 0, count)


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], warps: int) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    if programs:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**arguments, **options(warps))


def launch_exact(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], shape: Shape) -> None:
    """By products over chunks, and then step by step where these have met what is not finite; or so everywhere."""
    wrong = torch.empty(programs, dtype=torch.int32, device=like.device)
    for exact in (ALWAYS.value,) if shape.exact else (0, REPAIR.value):
        launch(kernel, like, programs, {**arguments, "p_wrong": wrong, "EXACT": exact}, shape.warps)


def options(warps: int) -> dict[str, Any]:
    """Left to itself, ptxas saves registers by spilling a word or two."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": 255}


def scales(scale: float) -> dict[str, float]:
    """Arguments are float32: two of them hold a float64 to 48 bits."""
    high = torch.tensor(scale, dtype=torch.float32).item()
    return {"scale": high, "scale_rest": scale - high if math.isfinite(scale) else 0.0}


def fit(widths: Sequence[int], size: int) -> int:
    """The least of the rising widths that takes it, or the last."""
    return next((width for width in widths if width >= size), widths[-1])


def blocks(size: int, width: int) -> int:
    return -(-size // width)


class Output(NamedTuple):
    """o [inner blocks, B, T, H, outer], and o x, in sums of blocks where `partner` is SUM."""

    o: Tensor
    e: Tensor | None = None
    x: Tensor | None = None
    partner: int = 0
    add: bool = False


def make_output(
    call: Call, shape: Shape, inner: int, outer: int, wide: bool, device: torch.device, x: Tensor | None, partner: int
) -> Output:
    """wide: in the dtype of sums, to add to."""
    n_k, n_v, pairs = blocks(inner, shape.inner), blocks(outer, shape.outer), (call.B, call.T, call.heads)
    like = {"device": device}
    dtype = call.state if wide or n_k > 1 else call.storage
    o = torch.empty(n_k, *pairs, outer, dtype=dtype, **like)
    e = None
    if partner == SUM.value:
        e = torch.empty(n_k * n_v, *pairs, dtype=call.state, **like)
    elif partner == EACH.value:
        e = torch.empty(n_k, *pairs, outer, dtype=call.state, **like)
    return Output(o, e, x, partner)


def sequences(q: Tensor, k: Tensor, v: Tensor, gate: Gate, out: Output | None) -> dict[str, Any]:
    x = q if out is None or out.x is None or not out.partner else out.x
    return {
        "p_q": q,
        "p_k": k,
        "p_v": v,
        "p_g": gate.values,
        "p_x": x,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("x", x),
        "stride_g_b": gate.strides[0],
        "stride_g_t": gate.strides[1],
        "stride_g_h": gate.strides[2],
    }


def walk(
    form: Any,
    call: Call,
    shape: Shape,
    rows: Rows,
    roles: tuple[Tensor, Tensor, Tensor],
    gate: Gate,
    reverse: bool,
    *,
    carry: State,
    last: State,
    out: Output | None = None,
    mass: Tensor | None = None,
    window: int = 0,
) -> None:
    """One launch: `roles` are q, k, v."""
    q, k, v = roles
    inner, outer = q.shape[3], v.shape[3]
    given = [t for t in (carry.values, last.values) if t is not None]
    state = given[0] if given else v.new_empty(0, dtype=call.state)
    arguments = {
        **sequences(q, k, v, gate, out),
        "p_o": state if out is None else out.o,
        "p_e": state if out is None or out.e is None else out.e,
        "p_carry": state if carry.values is None else carry.values,
        "p_last": state if last.values is None else last.values,
        "p_mass": state if mass is None else mass,
        "p_rows": state.new_empty(0, dtype=torch.int64) if rows.table is None else rows.table,
        "rows": rows.rows,
        **rows.arguments(),
        "start": rows.start,
        "B": call.B,
        "T": call.T,
        "heads": call.heads,
        "K": inner,
        "V": outer,
        "carry_rows": 0 if carry.values is None else len(carry.values),
        "last_rows": 0 if last.values is None else rows.rows,
        "by_row": int(carry.by_row),
        "window": window,
        **scales(call.scale),
        **carry.strides("carry"),
        **last.strides("last"),
        **walk_constants(form, gate.kind, reverse, out, 0 < window < shape.steps, shape),
    }
    programs = rows.rows * call.heads * blocks(inner, shape.inner) * blocks(outer, shape.outer)
    launch_exact(kernels.linear_attention_walk, v, programs, arguments, shape)


def walk_constants(
    form: Any, kind: Any, reverse: bool, out: Output | None, narrow: bool, shape: Shape
) -> dict[str, Any]:
    flags = {"PASS": form.value, "DECAY": kind.value, "REVERSE": reverse}
    flags |= {"ADD": out is not None and out.add, "PARTNER": 0 if out is None else out.partner}
    return {**flags, "NARROW": narrow, "BT": shape.steps, "BK": shape.inner, "BV": shape.outer}


def states(
    call: Call,
    shape: Shape,
    rows: Rows,
    k: Tensor,
    v: Tensor,
    gate: Gate,
    initial: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States before each row [rows, H, K, V], and the last ones [sequences, H, K, V]."""
    size = (call.heads, k.shape[3], v.shape[3])
    like = {"dtype": call.state, "device": v.device}
    local = torch.empty(rows.rows, *size, **like)
    mass = None
    if gate.kind is not NONE:
        mass = torch.empty(rows.rows, call.heads, gate.width, **like)
    walk(REDUCE, call, shape, rows, (k, k, v), gate, reverse, carry=State(None), last=State(local), mass=mass)
    last = torch.empty(rows.sequences, *size, **like)
    given = local if initial is None else initial
    lanes = fit(JOINED, size[1] * size[2])
    arguments = {
        "p_state": local,
        "p_mass": local if mass is None else mass,
        "p_initial": given,
        "p_last": last,
        "p_first": torch.empty(0, dtype=torch.int64, device=v.device) if rows.first is None else rows.first,
        "packed": int(rows.first is not None),
        "spans": rows.spans,
        "sequences": rows.sequences,
        "heads": call.heads,
        "K": size[1],
        "V": size[2],
        "initial_rows": 0 if initial is None else rows.sequences,
        "stride_mass_n": call.heads * gate.width,
        "stride_mass_h": gate.width,
        "stride_mass_k": int(gate.kind is INNER),
        "stride_mass_v": int(gate.kind is OUTER),
        **State(given).strides("initial"),
        "REVERSE": reverse,
        "DECAYS": mass is not None,
        "BC": lanes,
    }
    programs = rows.sequences * call.heads * blocks(size[1] * size[2], lanes)
    launch(kernels.linear_attention_join, v, programs, arguments, lanes // 32)
    return local, last


def across(
    call: Call,
    shape: Shape,
    rows: Rows,
    roles: tuple[Tensor, Tensor, Tensor],
    gate: Gate,
    reverse: bool,
    window: int,
    out: Output,
) -> None:
    """Add what a window has from the block beside its own."""
    q, k, v = roles
    inner, outer = q.shape[3], v.shape[3]
    chunks = blocks(rows.span, shape.steps)
    table = torch.empty(0, dtype=torch.int64, device=v.device) if rows.table is None else rows.table
    reach = out.o
    if gate.kind is not NONE:
        reach = torch.empty(rows.rows, chunks, call.heads, gate.width, dtype=call.state, device=v.device)
        lanes = fit(REACHED, gate.width)
        arguments = {
            "p_g": gate.values,
            "p_reach": reach,
            "p_rows": table,
            **rows.arguments(),
            "T": call.T,
            "heads": call.heads,
            "W": gate.width,
            "chunks": chunks,
            "stride_g_b": gate.strides[0],
            "stride_g_t": gate.strides[1],
            "stride_g_h": gate.strides[2],
            "REVERSE": reverse,
            "BT": shape.steps,
            "BC": lanes,
        }
        programs = rows.rows * call.heads * blocks(gate.width, lanes)
        launch(window_kernels.linear_attention_reach, v, programs, arguments, 1)
    arguments = {
        **sequences(q, k, v, gate, out),
        "p_o": out.o,
        "p_e": out.o if out.e is None else out.e,
        "p_reach": reach,
        "p_rows": table,
        "rows": rows.rows,
        **rows.arguments(),
        "window": window,
        "B": call.B,
        "T": call.T,
        "heads": call.heads,
        "K": inner,
        "V": outer,
        "chunks": chunks,
        **scales(call.scale),
        "DECAY": gate.kind.value,
        "REVERSE": reverse,
        "PARTNER": out.partner,
        "BT": shape.steps,
        "BK": shape.inner,
        "BV": shape.outer,
    }
    programs = rows.rows * call.heads * blocks(inner, shape.inner) * blocks(outer, shape.outer)
    launch_exact(window_kernels.linear_attention_across, v, programs, arguments, shape)
