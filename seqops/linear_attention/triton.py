"""Launchers of linear attention's Triton kernels: which pieces walk, in which roles, and what is summed afterwards.

Letters as in triton_kernels.py. A state lies as [rows, H, K, V] and is read either way round: inner and outer channels
of a walk are K and V in the forward and for dv, and V and K for dq and dk.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles
from . import triton_kernels as kernels
from . import triton_window as window_kernels
from .tiles import Shape
from .triton_blocks import ALWAYS, APPLY, EACH, INFLOW, INNER, NONE, OUTER, REDUCE, REPAIR, STEP, SUM

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
    values = readable(log_decay) if log_decay.dim() == 4 else log_decay
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


# ---- operators


class Attention(NamedTuple):
    """One walk's worth of attention: roles of the sequences, decays, and states at both ends."""

    roles: tuple[Tensor, Tensor, Tensor]
    gate: Gate
    reverse: bool
    carry: State


def attend(
    call: Call, rows: Rows, attention: Attention, last: State, x: Tensor | None = None, form: Any = APPLY
) -> Output:
    """o [inner blocks, B, T, H, outer] of one walk, and what it gives times x."""
    q, _, v = attention.roles
    inner, outer = q.shape[3], v.shape[3]
    shape = call.shape()
    out = make_output(call, shape, inner, outer, False, v.device, x, partner_of(attention.gate, x))
    walk(
        form, call, shape, rows, attention.roles, attention.gate, attention.reverse,
        carry=attention.carry, last=last, out=out,
    )  # fmt: skip
    return out


def attend_window(
    call: Call,
    cu_seqlens: Tensor | None,
    attention: Attention,
    window: int,
    final: Tensor | None = None,
    x: Tensor | None = None,
) -> list[Output]:
    """Outputs, of which the first two are summed in o. final: the gradient of the last state, backwards in time."""
    q, _, v = attention.roles
    inner, outer = q.shape[3], v.shape[3]
    shape = call.shape()
    rows = place_rows(call, cu_seqlens, max(window, shape.steps))
    partner = partner_of(attention.gate, x)
    out = make_output(call, shape, inner, outer, True, v.device, x, partner)
    nothing = State(None)
    # Pairs of a row of one chunk may be further apart than the window.
    walk(
        APPLY, call, shape, rows, attention.roles, attention.gate, attention.reverse,
        carry=nothing, last=nothing, out=out, window=window,
    )  # fmt: skip
    outs = [out]
    more = out._replace(o=torch.empty_like(out.o), e=None if out.e is None else torch.empty_like(out.e))
    across(call, shape, rows, attention.roles, attention.gate, attention.reverse, window, more)
    outs.append(more)
    if final is not None:
        rows = place_rows(call, cu_seqlens, 0, tail=window)
        more = out._replace(e=None if out.e is None else torch.zeros_like(out.e), add=True)
        walk(
            INFLOW, call, shape, rows, attention.roles, attention.gate, attention.reverse,
            carry=attention.carry._replace(values=final), last=nothing, out=more,
        )  # fmt: skip
        outs.append(more)
    return outs


def partner_of(gate: Gate, x: Tensor | None) -> int:
    if x is None:
        return 0
    return EACH.value if gate.kind in (INNER, OUTER) else SUM.value


def summed(outs: Sequence[Output], dtype: torch.dtype) -> Tensor:
    """Blocks of inner channels, and parts of a window, added in their order."""
    first, *others = (out.o[0] if len(out.o) == 1 else out.o.sum(0) for out in outs[:2])
    for other in others:
        first += other
    return first.to(dtype)


def prepare(
    direction: str, q: Tensor, v: Tensor, log_decay: Tensor | None, scale: float | None, others: Sequence[Tensor]
) -> Call:
    """others: all that is read along time, beside q and v."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    B, T, H, V = v.shape
    name = str(v.dtype).removeprefix("torch.")
    decay = tiles.DECAYS[0 if log_decay is None else 1 + (log_decay.dim() == 4)]
    kind = tiles.Kind(name, decay == "channel", is_aligned(q, v, *others))
    chosen = choose_for(direction, v, key_of(direction, name, B, T, H, q.shape[3], V, decay, kind.aligned))
    return Call(B, T, H, scale, state_dtype(v.dtype), v.dtype, kind, chosen["steps"], chosen["span"])


def is_aligned(*sequences: Tensor) -> bool:
    """Whether accesses may be wide: 16 bytes of neighbours, wherever a step or head begins."""
    if sequences[0].element_size() != 2:
        return False
    return all(
        x.data_ptr() % tiles.ALIGNMENT == 0
        and x.shape[3] % tiles.ALIGNMENT == 0
        and all(x.stride(i) % tiles.ALIGNMENT == 0 for i in range(3) if x.shape[i] > 1)
        for x in sequences
    )


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in the dtype of v, and the final state [B or N, H, K, V]."""
    count = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    size, state = (count, v.shape[2], q.shape[3], v.shape[3]), state_dtype(v.dtype)
    if v.numel() == 0 or count == 0:
        last = torch.zeros(size, dtype=state, device=v.device)
        return torch.zeros_like(v, memory_format=torch.contiguous_format), copy_state(initial_state, last)
    q, k, v = readable(q), readable(k), readable(v)
    call = prepare("forward", q, v, log_decay, scale, (k,))
    gate, initial = gate_of(log_decay, v), dense(initial_state, call.state)
    last = torch.empty(size, dtype=call.state, device=v.device)
    attention = Attention((q, k, v), gate, False, State(initial))
    if window is not None and window < call.T:
        outs = attend_window(call, cu_seqlens, attention, window)
        rows = place_rows(call, cu_seqlens, 0, tail=window)
        shape = call.shape()
        walk(REDUCE, call, shape, rows, (q, k, v), gate._replace(kind=gate.kind), False,
             carry=State(None), last=State(last), mass=spare_mass(call, rows, gate))  # fmt: skip
        return summed(outs, v.dtype), last
    rows = place_rows(call, cu_seqlens, call.span)
    if not causal:
        _, last = states(call, call.shape(), rows, k, v, gate, initial, False)
        attention = attention._replace(carry=State(last, by_row=rows.whole))
        return summed([attend(call, rows, attention, State(None), form=INFLOW)], v.dtype), last
    if not rows.whole:
        shape = call.shape()
        local, last = states(call, shape, rows, k, v, gate, initial, False)
        return summed([attend(call, rows, attention._replace(carry=State(local)), State(None))], v.dtype), last
    return summed([attend(call, rows, attention, State(last))], v.dtype), last


def spare_mass(call: Call, rows: Rows, gate: Gate) -> Tensor | None:
    if gate.kind is NONE:
        return None
    return torch.empty(rows.rows, call.heads, gate.width, dtype=call.state, device=gate.values.device)


def dense_zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, memory_format=torch.contiguous_format)


def copy_state(state: Tensor | None, like: Tensor) -> Tensor:
    """What a call without steps returns: the state it began with, in new memory."""
    return torch.zeros_like(like) if state is None else like.copy_(state)


def linear_attention_backward(
    grad_o: Tensor | None,
    dfinal_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay (empty where there is none) and the gradient of the initial state [B or N, H, K, V]."""
    count = v.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    size, state = (count, v.shape[2], q.shape[3], v.shape[3]), state_dtype(v.dtype)
    dg = v.new_empty(0, dtype=state) if log_decay is None else None
    if v.numel() == 0 or count == 0:
        dg = dense_zeros(log_decay) if dg is None else dg
        dinitial = copy_state(None if window else dfinal_state, torch.zeros(size, dtype=state, device=v.device))
        return dense_zeros(q), dense_zeros(k), dense_zeros(v), dg, dinitial
    do = grad_o
    if do is None:
        do = v.new_zeros(1, 1, 1, v.shape[3]).expand(v.shape)
    do, q, k, v = readable(do), readable(q), readable(k), readable(v)
    call = prepare("backward", q, v, log_decay, scale, (k, do))
    gate, initial, final = gate_of(log_decay, v), dense(initial_state, call.state), dense(dfinal_state, call.state)
    x_q, x_k = (q, k) if log_decay is not None else (None, None)
    if window is not None and window < call.T:
        return backward_window(call, cu_seqlens, do, final, q, k, v, log_decay, gate, window, size)

    rows = place_rows(call, cu_seqlens, call.span)
    shape = call.shape()
    s, ds = State(initial), State(final)
    dinitial = None
    if not rows.whole or not causal:
        local, last = states(call, shape, rows, k, v, gate, initial, False)
        s = State(local) if causal else State(last, by_row=rows.whole)
        local, dinitial = states(call, shape, rows, q, do, gate, final, True)
        ds = State(local) if causal else State(dinitial, by_row=rows.whole)
    form = APPLY if causal else INFLOW
    ends = State(None)
    if log_decay is not None:
        ends = State(torch.empty(rows.rows, *size[1:], dtype=call.state, device=v.device))
    # On the way forwards outputs are scaled; on the way back the state is.
    turned = gate.other()
    dq = attend(call, rows, Attention((do, v, k), turned, False, s.turn()), ends.turn(), x_q, form)
    dk = attend(call, rows, Attention((v, do, q), turned, True, ds.turn()), State(None), x_k, form)
    last = State(None)
    if dinitial is None:
        dinitial = torch.empty(size, dtype=call.state, device=v.device)
        last = State(dinitial)
    dv = attend(call, rows, Attention((k, q, do), gate, True, ds), last, None, form)
    if log_decay is not None:
        e = dq.e.sum(0).sub_(dk.e.sum(0))
        dg = gradient_of_decay(call, rows, e, log_decay, gate, initial is not None, ends.values, ds.values)
    return summed([dq], q.dtype), summed([dk], k.dtype), summed([dv], v.dtype), dg, dinitial


def backward_window(
    call: Call,
    cu_seqlens: Tensor | None,
    do: Tensor,
    final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    gate: Gate,
    window: int,
    size: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x_q, x_k = (q, k) if log_decay is not None else (None, None)
    turned, nothing = gate.other(), State(None)
    dq = attend_window(call, cu_seqlens, Attention((do, v, k), turned, False, nothing.turn()), window, None, x_q)
    dk = attend_window(call, cu_seqlens, Attention((v, do, q), turned, True, nothing.turn()), window, final, x_k)
    dv = attend_window(call, cu_seqlens, Attention((k, q, do), gate, True, nothing), window, final)
    dg = v.new_empty(0, dtype=call.state)
    if log_decay is not None and window == 1:
        dg = dense_zeros(log_decay)
    elif log_decay is not None:
        e = sum(out.e.sum(0) for out in dq) - sum(out.e.sum(0) for out in dk)
        last = None
        if final is not None:
            last = torch.empty(size, dtype=call.state, device=v.device)
            rows = place_rows(call, cu_seqlens, 0, tail=window)
            shape = call.shape()
            walk(REDUCE, call, shape, rows, (q, k, v), gate, False,
                 carry=nothing, last=State(last), mass=spare_mass(call, rows, gate))  # fmt: skip
        dg = gradient_of_decay(call, place_rows(call, cu_seqlens, 0), e, log_decay, gate, False, last, final)
    dinitial = torch.zeros(size, dtype=call.state, device=v.device)
    return summed(dq, q.dtype), summed(dk, k.dtype), summed(dv, v.dtype), dg, dinitial


def gradient_of_decay(
    call: Call, rows: Rows, e: Tensor, log_decay: Tensor, gate: Gate, given: bool, s: Tensor | None, ds: Tensor | None
) -> Tensor:
    """From e [B, T, H] or [B, T, H, K], and the states after each row with their gradients [rows, H, K, V].

    given: there is an initial state.
    """
    width = gate.width
    if s is None or ds is None:
        meeting = e.new_zeros(rows.rows, call.heads, width)
    else:
        K, V = s.shape[2:]
        width_k = fit(MET, K)
        meeting = e.new_empty(rows.rows, call.heads, K)
        arguments = {
            "p_s": s, "p_ds": ds, "p_m": meeting, "heads": call.heads, "K": K, "V": V,
            **State(s).strides("s"), **State(ds).strides("ds"), "BK": width_k, "BV": 32,
        }  # fmt: skip
        launch(kernels.linear_attention_meet, s, rows.rows * call.heads * blocks(K, width_k), arguments, 1)
        if width == 1:
            meeting = meeting.sum(2, keepdim=True)
    dg = torch.empty_like(e)
    lanes = fit(LANES, call.heads * width)
    values = gate.values
    arguments = {
        "p_e": e,
        "p_g": values,
        "p_m": meeting,
        "p_dg": dg,
        "p_rows": torch.empty(0, dtype=torch.int64, device=e.device) if rows.table is None else rows.table,
        **rows.arguments(),
        "start": rows.start,
        "T": call.T,
        "heads": call.heads,
        "K": width,
        "given": int(given),
        "stride_g_b": gate.strides[0],
        "stride_g_t": gate.strides[1],
        "stride_g_h": gate.strides[2],
        "stride_g_k": int(width > 1),
        "BC": lanes,
        "DEPTH": DEPTH,
    }
    programs = rows.rows * blocks(call.heads * width, lanes)
    launch(kernels.linear_attention_decay, e, programs, arguments, max(lanes // 32, 1))
    return (dg.sum((0, 1)) if log_decay.dim() == 1 else dg).to(log_decay.dtype)


# ---- choices

SOURCES = (
    tiles.__file__,
    __file__,
    *(str(Path(__file__).with_name(f"triton_{part}.py")) for part in ("kernels", "blocks", "window")),
)
TUNABLES = {
    direction: choose.Tunable(f"linear_attention.{direction}.triton", tiles.problem, SOURCES)
    for direction in ("forward", "backward")
}
# In the interpreter, which has no device to choose for: short rows and chunks, so that short cases have several.
INTERPRETED_CHOICE = {"steps": 16, "span": 32}


@lru_cache(maxsize=4096)
def key_of(direction: str, dtype: str, B: int, T: int, H: int, K: int, V: int, decay: str, aligned: bool) -> choose.Key:
    """Sizes are rounded up to a power of two, so that few choices exist. Of packed sequences the row counts."""
    sizes = (("B", B), ("T", T), ("H", H), ("K", K), ("V", V))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    flags = (decay, *(("aligned",) if aligned else ()))
    return choose.Key(f"linear_attention.{direction}.triton", dtype, buckets, flags)


def choose_for(direction: str, like: Tensor, key: choose.Key) -> choose.Solution:
    if like.is_cuda:
        return choose.solution(TUNABLES[direction], key, like.device)
    return choose.forced_solution(TUNABLES[direction].name) or INTERPRETED_CHOICE


# ---- what is shipped

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALVES = (torch.bfloat16, torch.float16)
# What is a multiple of 16 where accesses are wide.
WIDE = ("K", "V", *(f"stride_{name}_{letter}" for name in "qkvx" for letter in "bth"))


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    every = [*walk_configurations(), *across_configurations(), *small_configurations()]
    known = {(each["kernel"].__name__, str(each["types"]), str(each["constants"])): each for each in every}
    return [*known.values()]


def configuration(
    kernel: Any, constants: dict[str, Any], state: torch.dtype, warps: int, wide: bool | None = None, **pointers: Any
) -> dict[str, Any]:
    """Pointers without a name here are to STATE, or to integers; other arguments are int32, but for the scale.

    wide: whether the launcher takes this kernel for wide accesses, which needs multiples of 16; None: for both.
    """
    types = {name: "*" + TYPES[pointers.get(name, state)] for name in kernel.arg_names if name.startswith("p_")}
    types |= {name: "*i64" for name in ("p_rows", "p_first") if name in types}
    types |= {"p_wrong": "*i32"} if "p_wrong" in types else {}
    sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
    sizes |= {name: "fp32" for name in ("scale", "scale_rest") if name in sizes}
    found = {"kernel": kernel, "types": types | sizes, "constants": constants, "options": options(warps)}
    pointed = [name for name in types if name.startswith("p_")]
    return found if wide is None else {**found, "divisible": [*pointed, *WIDE] if wide else []}


def kinds() -> Iterator[tuple[torch.dtype, Any, torch.dtype, Shape, bool]]:
    """Sequences, decays, dtype of these, shape, whether accesses are wide."""
    for storage in TYPES:
        state = state_dtype(storage)
        for decay in (NONE, STEP, INNER, OUTER):
            for aligned in (False, True) if storage in HALVES else (False,):
                kind = tiles.Kind(str(storage).removeprefix("torch."), decay in (INNER, OUTER), aligned)
                for gate in dict.fromkeys((state,) if decay is NONE else (storage, state)):
                    for shape in dict.fromkeys((*kind.shapes(), *kind.shapes(single=True))):
                        yield storage, decay, gate, shape, aligned


def walk_configurations() -> Iterator[dict[str, Any]]:
    kernel = kernels.linear_attention_walk
    for storage, decay, gate, shape, aligned in kinds():
        state = state_dtype(storage)
        like = {"p_q": storage, "p_k": storage, "p_v": storage, "p_x": storage, "p_g": gate}
        summed = SUM.value if decay is STEP else EACH.value
        partners = (0,) if decay is NONE else (0, summed)
        forms = [(REDUCE, reverse, 0, False, state, False) for reverse in (False, True) if decay is not OUTER]
        for reverse, partner in itertools.product((False, True), partners):
            for o in dict.fromkeys((storage, state)):
                forms += [(APPLY, reverse, partner, False, o, False)]
                forms += [(INFLOW, reverse, 0, False, o, False)] if decay is NONE else []
            # A window within a chunk, and what the last state's gradient adds.
            forms += [(APPLY, reverse, partner, False, state, True)]
            forms += [(INFLOW, True, partner, True, state, False)] if reverse else []
        for (form, reverse, partner, add, o, narrow), exact in itertools.product(forms, exact_of(shape)):
            constants = {"PASS": form.value, "DECAY": decay.value, "REVERSE": reverse, "ADD": add, "PARTNER": partner}
            constants |= {"EXACT": exact, "NARROW": narrow, **blocks_of(shape)}
            wide = aligned if shape.steps > 16 else None
            yield on(shape, configuration(kernel, constants, state, shape.warps, wide, **like, p_o=o))


def on(shape: Shape, configuration: dict[str, Any]) -> dict[str, Any]:
    return configuration | ({"architectures": shape.architectures} if shape.architectures else {})


def exact_of(shape: Shape) -> tuple[int, ...]:
    return (ALWAYS.value,) if shape.exact else (0, REPAIR.value)


def blocks_of(shape: Shape) -> dict[str, int]:
    return {"BT": shape.steps, "BK": shape.inner, "BV": shape.outer}


def across_configurations() -> Iterator[dict[str, Any]]:
    kernel = window_kernels.linear_attention_across
    for storage, decay, gate, shape, aligned in kinds():
        state = state_dtype(storage)
        like = {"p_q": storage, "p_k": storage, "p_v": storage, "p_x": storage, "p_g": gate}
        partners = (0,) if decay is NONE else (0, SUM.value if decay is STEP else EACH.value)
        for reverse, partner, exact in itertools.product((False, True), partners, exact_of(shape)):
            constants = {"DECAY": decay.value, "REVERSE": reverse, "PARTNER": partner, "EXACT": exact}
            wide = aligned if shape.steps > 16 else None
            yield on(shape, configuration(kernel, constants | blocks_of(shape), state, shape.warps, wide, **like))


def small_configurations() -> Iterator[dict[str, Any]]:
    flags = (False, True)
    for state in (torch.float32, torch.float64):
        for reverse, decays, lanes in itertools.product(flags, flags, JOINED):
            constants = {"REVERSE": reverse, "DECAYS": decays, "BC": lanes}
            yield configuration(kernels.linear_attention_join, constants, state, lanes // 32)
        for width in MET:
            yield configuration(kernels.linear_attention_meet, {"BK": width, "BV": 32}, state, 1)
    for storage in TYPES:
        state = state_dtype(storage)
        for lanes in LANES:
            constants = {"BC": lanes, "DEPTH": DEPTH}
            yield configuration(kernels.linear_attention_decay, constants, state, max(lanes // 32, 1), p_g=storage)
        for reverse, lanes, steps in itertools.product(flags, REACHED, (16, 64)):
            constants = {"REVERSE": reverse, "BT": steps, "BC": lanes}
            yield configuration(window_kernels.linear_attention_reach, constants, state, 1, p_g=storage)
