"""The recurrent operators as one torch operation after the other, for CUDA tensors whose heads fit no kernel of ours.

A step is one batched product over the heads and a cell of element-wise operations, on the current stream: any D, any
dtype, nothing compiled, nothing synchronised. Like the kernels, and unlike the reference, it keeps what the backward
reads instead of a graph. The product's inputs are rounded to the storage dtype, sums and states are float32 (float64
for float64).

Letters: B batch, T time, H heads, D units of a head, G gates. Gates of one step are [G, B, H, D].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..core import validate
from ..core.layout import new_sequence

STATES = {"lstm": 2, "gru": 1, "slstm": 4, "elman": 1}
CACHES = {"lstm": (4, None), "gru": (3, None), "slstm": (7,), "elman": ()}  # None: [B, T, H, D]


# ---- the cells: `wx`, `y` and `p` have gates first


def forward_cell(op: str, wx: Tensor, y: Tensor, state: Sequence[Tensor], relu: bool) -> tuple[list[Tensor], Any]:
    """The new states, and what the backward reads of the step: the cache [B, planes, H, D] and the kept [B, H, D]."""
    if op == "lstm":
        p = wx + y
        i, f, g, o = p[0].sigmoid(), p[1].sigmoid(), p[2].tanh(), p[3].sigmoid()
        c = f * state[1] + i * g
        return [o * c.tanh(), c], (p, c)
    if op == "gru":
        p_r, p_z = wx[0] + y[0], wx[1] + y[1]
        p_n = wx[2] + p_r.sigmoid() * y[2]
        z = p_z.sigmoid()
        return [(1 - z) * p_n.tanh() + z * state[0]], (torch.stack((p_r, p_z, p_n)), y[2])
    if op == "slstm":
        p_i, p_f, p_z, p_o = wx + y
        decayed = logsigmoid(p_f) + state[3]
        won = (p_i >= decayed) | p_i.isnan()  # NaN on either side wins over numbers
        m = torch.where(won, p_i, decayed)
        base = torch.where(m == -math.inf, 0.0, m)  # both are -inf: their difference would be NaN
        i, f = (p_i - base).exp(), (decayed - base).exp()
        c, n = f * state[1] + i * p_z.tanh(), f * state[2] + i
        cache = torch.stack((i, torch.where(won, -f, f), (-p_f).sigmoid(), p_z, p_o, c, n))
        return [p_o.sigmoid() * quotient(c, n), c, n, m], (cache,)
    p = (wx + y)[0]
    return [p.relu() if relu else p.tanh()], ()


def quotient(c: Tensor, n: Tensor) -> Tensor:
    empty = n == 0
    return torch.where(empty, 0.0, c / torch.where(empty, 1.0, n))


def backward_cell(
    op: str, read: Sequence[Tensor], e: Tensor, dstate: list[Tensor], relu: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dp, dy [G, B, H, D] and the gradients of the states before; that of h is what skips the product.

    Args:
        read: as in the kernels: LSTM p (4), c, c before; GRU p (3), y_n, h before; sLSTM its cache (7), c and n before;
            Elman h.
        e: the gradient of h.
    """
    nothing = torch.zeros_like(e)
    if op == "lstm":
        i, f, g, o = read[0].sigmoid(), read[1].sigmoid(), read[2].tanh(), read[3].sigmoid()
        s = read[4].tanh()
        dc = dstate[1] + e * o * (1 - s * s)
        dp = (dc * g * i * (1 - i), dc * read[5] * f * (1 - f), dc * i * (1 - g * g), e * s * o * (1 - o))
        gates = torch.stack(dp)
        return gates, gates, [nothing, dc * f]
    if op == "gru":
        r, z, n = read[0].sigmoid(), read[1].sigmoid(), read[2].tanh()
        dp_n = e * (1 - z) * (1 - n * n)
        dp_z = e * (read[4] - n) * z * (1 - z)
        dp_r = dp_n * read[3] * r * (1 - r)
        return torch.stack((dp_r, dp_z, dp_n)), torch.stack((dp_r, dp_z, r * dp_n)), [z * e]
    if op == "slstm":
        i, marked, slope, p_z, p_o, c, n, c_before, n_before = read
        won = marked.signbit()  # also of -0
        f, z, o = torch.where(won, -marked, marked), p_z.tanh(), p_o.sigmoid()
        q, dq = quotient(c, n), quotient(e * o, n)  # dq times dn/dq = -q
        dc, dn, delta = dstate[1] + dq, dstate[2] - dq * q, dstate[3]
        dp_i = (dc * z + dn) * i + torch.where(won, delta, 0.0)
        dp_f = ((dc * c_before + dn * n_before) * f + torch.where(won, 0.0, delta)) * slope
        gates = torch.stack((dp_i, dp_f, dc * i * (1 - z * z), e * q * o * (1 - o)))
        return gates, gates, [nothing, dc * f, dn * f, torch.where(won, 0.0, delta)]
    h = read[0]
    dp = (torch.where(h <= 0, 0.0, e) if relu else e * (1 - h * h)).unsqueeze(0)
    return dp, dp, [nothing]


# ---- the walks


def by_head(r: Tensor, dtype: torch.dtype, backward: bool) -> Tensor:
    """r [G, H, D, D] as [H, D, G D], or for the backward as [H, G D, D]."""
    gates, heads, units, _ = r.shape
    if backward:
        return r.permute(1, 0, 2, 3).reshape(heads, gates * units, units).to(dtype)
    return r.permute(1, 3, 0, 2).reshape(heads, units, gates * units).to(dtype)


def present(lengths: Tensor | None, t: int) -> Tensor | None:
    """[B, 1, 1]: the rows that have a step at time t."""
    return None if lengths is None else (lengths > t)[:, None, None]


def keep(new: Tensor, old: Tensor, valid: Tensor | None) -> Tensor:
    return new if valid is None else torch.where(valid, new, old)


def forward(
    op: str,
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reverse: bool,
    relu: bool,
    train: bool,
) -> tuple[Tensor, ...]:
    """h, the final states, and where `train` what the backward reads. `initial`: all states, in the dtype of sums."""
    storage, real = wx.dtype, validate.real_of(wx.dtype)
    time, gates, heads, units = wx.shape[1:]
    weights = by_head(r, real, backward=False)
    h = new_sequence(wx, heads, units)
    caches = [new_sequence(wx, *(() if n is None else (n,)), heads, units) for n in CACHES[op]] if train else []
    state = [each.clone() for each in initial]
    for t in reversed(range(time)) if reverse else range(time):
        valid = present(lengths, t)
        before = state[0].to(storage).to(real).transpose(0, 1)  # [H, B, D]
        y = torch.bmm(before, weights).unflatten(2, (gates, units)).permute(2, 1, 0, 3)
        if b is not None:
            y = y + b.to(real)[:, None]
        new, kept = forward_cell(op, wx[:, t].to(real).transpose(0, 1), y, state, relu)
        state = [keep(now, old, valid) for now, old in zip(new, state, strict=True)]
        h[:, t] = keep(state[0], torch.zeros_like(state[0]), valid).to(storage)
        for cache, value in zip(caches, kept, strict=False):
            value = value.transpose(0, 1) if cache.ndim == 5 else value
            mask = valid if valid is None or cache.ndim == 4 else valid[:, None]
            cache[:, t] = keep(value, torch.zeros_like(value), mask).to(storage)
    return (h, *(each.contiguous() for each in state), *caches)


def backward(
    op: str,
    dh: Tensor | None,
    dfinal: Sequence[Tensor],
    r: Tensor,
    like: Tensor,
    cache: Tensor | None,
    kept: Tensor | None,
    h: Tensor | None,
    initial: Sequence[Tensor],
    final: Sequence[Tensor],
    lengths: Tensor | None,
    reverse: bool,
    grad_clip: float | None,
    relu: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """dwx, the GRU's dy of its candidate, and the gradients of the initial states.

    Args:
        dfinal, initial: all states, in the dtype of sums, zeros where there is none.
        final: h, c and n of the sLSTM.
        like: gives the memory order.
    """
    storage, real = like.dtype, validate.real_of(like.dtype)
    gates, heads, units, _ = r.shape
    time = like.shape[1]
    weights = by_head(r, real, backward=True)
    dwx = new_sequence(like, gates, heads, units)
    dy_n = new_sequence(like, heads, units) if op == "gru" else None
    dstate = [each.clone() for each in dfinal]
    started = None if lengths is None else (lengths > 0)[:, None, None]
    if op == "slstm":
        dm = dstate[3] - (dstate[1] * final[1] + dstate[2] * final[2])
        dstate[3] = keep(dm, dstate[3], started)
    for t in range(time) if reverse else reversed(range(time)):
        valid = present(lengths, t)
        read = reads(op, t, cache, kept, h, initial, lengths, reverse, real)
        e = dstate[0] if dh is None else dstate[0] + dh[:, t].to(real)
        dp, dy, new = backward_cell(op, read, e, dstate, relu)
        flat = dy.to(storage).to(real).permute(2, 1, 0, 3).flatten(2)  # [H, B, G D]
        new[0] = torch.bmm(flat, weights).transpose(0, 1) + new[0]
        if grad_clip is not None:
            new[0] = new[0].clamp(-grad_clip, grad_clip)
        dstate = [keep(now, old, valid) for now, old in zip(new, dstate, strict=True)]
        mask = None if valid is None else valid[:, None]
        dp = dp.transpose(0, 1)
        dwx[:, t] = keep(dp, torch.zeros_like(dp), mask).to(storage)
        if dy_n is not None:
            dy_n[:, t] = keep(dy[2], torch.zeros_like(dy[2]), valid).to(storage)
    if op == "slstm":
        dm = dstate[3] + dstate[1] * initial[1] + dstate[2] * initial[2]
        dstate[3] = keep(dm, dstate[3], started)
    return dwx, dy_n, [each.contiguous() for each in dstate]


def reads(
    op: str,
    t: int,
    cache: Tensor | None,
    kept: Tensor | None,
    h: Tensor | None,
    initial: Sequence[Tensor],
    lengths: Tensor | None,
    reverse: bool,
    real: torch.dtype,
) -> list[Tensor]:
    """What `backward_cell` reads of the step at time t."""
    read = [] if cache is None else [*cache[:, t].to(real).unbind(1)]
    if kept is not None:
        read.append(kept[:, t].to(real))

    def before(sequence: Tensor, start: Tensor) -> Tensor:
        """One step earlier in the order of the recurrence, where the first step has the initial state."""
        if not reverse:
            return start if t == 0 else sequence[:, t - 1].to(real)
        if t + 1 == sequence.shape[1]:
            return start
        earlier = sequence[:, t + 1].to(real)
        return earlier if lengths is None else torch.where((lengths == t + 1)[:, None, None], start, earlier)

    if op == "lstm":
        read.append(before(kept, initial[1]))
    elif op == "gru":
        read.append(before(h, initial[0]))
    elif op == "slstm":
        read += [before(cache[:, :, 5], initial[1]), before(cache[:, :, 6], initial[2])]
    else:
        read.append(h[:, t].to(real))
    return read
