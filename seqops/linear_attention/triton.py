"""Linear attention in Triton: which pieces walk, in which roles, and what is summed afterwards.

Letters as in triton_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import choose
from . import tiles
from . import triton_kernels as kernels
from .triton_blocks import APPLY, EACH, INFLOW, INNER, NONE, OUTER, REDUCE, SUM
from .triton_configurations import HALVES, TYPES, configurations
from .triton_walks import (
    DEPTH,
    LANES,
    MET,
    Call,
    Gate,
    Output,
    Rows,
    State,
    across,
    blocks,
    dense,
    fit,
    gate_of,
    launch,
    make_output,
    place_rows,
    readable,
    state_dtype,
    states,
    walk,
)

__all__ = ["HALVES", "TUNABLES", "TYPES", "configurations", "key_of", "linear_attention", "linear_attention_backward"]


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
    *(str(Path(__file__).with_name(f"triton_{part}.py")) for part in ("walks", "kernels", "blocks", "window")),
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
