"""Triton kernels on rows and slots.

B batch, T rows, S slots, H heads of slots, Hk heads of rows (each of H / Hk heads of slots in turn), D channels.
Inverse lists `order` [S] and `starts` [T + 1] of each (b, h) have the slots of row t, ascending, at order[starts[t]] to
order[starts[t + 1] - 1]; strides of 0 stand for lists that are shared. A program owns one row of what it writes, so
every sum has one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

MEAN = tl.constexpr(0)
SUM = tl.constexpr(1)
LAST = tl.constexpr(2)


@triton.jit
def places(count, H):
    """Batch row, head, and which of `count` programs there."""
    i = tl.program_id(0).to(tl.int64)
    return i // count // H, i // count % H, i % count


@triton.jit(do_not_specialize=["T", "H", "Hk", "D", "n"])
def gather_rows(
    p_x,  # [B, T, Hk, D]
    p_index,  # [B or 1, H or 1, n]
    p_y,  # [B, n, H, D]
    T,
    H,
    Hk,
    D,
    n,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    stride_i_b,
    stride_i_h,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b, i_h, i_tile = places(tl.cdiv(n, ROWS), H)
    i = i_tile * ROWS + tl.arange(0, ROWS)
    m_i = i < n
    t = tl.load(p_index + i_b * stride_i_b + i_h * stride_i_h + i, mask=m_i, other=-1).to(tl.int64)
    m_t = (t >= 0) & (t < T)
    o_x = i_b * stride_x_b + (i_h // (H // Hk)) * stride_x_h + tl.where(m_t, t, 0) * stride_x_t
    o_y = ((i_b * n + i) * H + i_h) * D
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0)
        tl.store(p_y + o_y[:, None] + o_d[None, :], b_x, mask=m_i[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T", "S", "H", "Hk", "D"])
def sum_slots(
    p_x,  # [B, S, H, D]
    p_order,  # [B or 1, H or 1, S]
    p_starts,  # [B or 1, H or 1, T + 1]
    p_y,  # [B, T, Hk, D]
    p_slot_lse,  # [B, H, S], where LSE
    p_lse,  # [B, H, T], where LSE
    T,
    S,
    H,
    Hk,
    D,
    stride_x_b,
    stride_x_s,
    stride_x_h,
    stride_o_b,
    stride_o_h,
    stride_s_b,
    stride_s_h,
    REDUCE: tl.constexpr,
    LSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_b, i_k, i_t = places(T, Hk)
    group = H // Hk
    REAL: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_y = tl.zeros([BLOCK_D], dtype=REAL)
        count = tl.zeros([], dtype=tl.int32)
        for g in range(group):
            i_h = i_k * group + g
            o_s = i_b * stride_s_b + i_h * stride_s_h + i_t
            first = tl.load(p_starts + o_s)
            end = tl.load(p_starts + o_s + 1)
            if REDUCE == LAST:
                first = tl.maximum(first, end - 1)
            count += end - first
            for i in range(first, end):
                slot = tl.load(p_order + i_b * stride_o_b + i_h * stride_o_h + i).to(tl.int64)
                o_x = i_b * stride_x_b + slot * stride_x_s + i_h * stride_x_h
                b_y += tl.load(p_x + o_x + o_d, mask=m_d, other=0.0).to(REAL)
        if REDUCE == MEAN:
            b_y = b_y / tl.maximum(count, 1).to(REAL)
        tl.store(p_y + ((i_b * T + i_t) * Hk + i_k) * D + o_d, b_y.to(p_y.dtype.element_ty), mask=m_d)
    if LSE:
        o_s = i_b * stride_s_b + i_k * stride_s_h + i_t
        first = tl.load(p_starts + o_s)
        end = tl.load(p_starts + o_s + 1)
        if REDUCE == LAST:
            first = tl.maximum(first, end - 1)
        p_of = p_order + i_b * stride_o_b + i_k * stride_o_h
        total = log_sum_exp(p_slot_lse + (i_b * H + i_k) * S, p_of, first, end)
        tl.store(p_lse + (i_b * H + i_k) * T + i_t, total.to(REAL))


@triton.jit
def log_sum_exp(p_lse, p_order, first, end):
    """Of the slots' lse, in float64; -inf of none, and of one itself. What is infinite is not subtracted."""
    most = tl.zeros([], dtype=tl.float64) - float("inf")
    for i in range(first, end):
        value = tl.load(p_lse + tl.load(p_order + i).to(tl.int64)).to(tl.float64)
        most = tl.where(value <= most, most, value)
    finite = (most == most) & (tl.abs(most) < float("inf"))
    shift = tl.where(finite, most, 0.0)
    total = tl.zeros([], dtype=tl.float64)
    for i in range(first, end):
        value = tl.load(p_lse + tl.load(p_order + i).to(tl.int64)).to(tl.float64)
        total += tl.exp(value - shift)
    log = tl.where(total == 0, -float("inf"), tl.log(tl.where(total == 0, 1.0, total)))
    return tl.where(end - first == 1, most, log + shift)


@triton.jit(do_not_specialize=["T", "S", "H", "D"])
def spread_slots(
    p_dy,  # [B, T, H, D], where DY
    p_order,  # [B or 1, H or 1, S]
    p_starts,  # [B or 1, H or 1, T + 1]
    p_dx,  # [B, S, H, D]
    p_slot_lse,  # [B, H, S]
    p_dlse,  # [B, H, T], where DLSE
    p_dslot_lse,  # [B, H, S]
    T,
    S,
    H,
    D,
    stride_y_b,
    stride_y_t,
    stride_y_h,
    stride_o_b,
    stride_o_h,
    stride_s_b,
    stride_s_h,
    REDUCE: tl.constexpr,
    DY: tl.constexpr,
    DLSE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dx and dslot_lse of the slots of row t: of no row where t = T."""
    i_b, i_h, i_t = places(T + 1, H)
    REAL: tl.constexpr = tl.float64 if p_dx.dtype.element_ty == tl.float64 else tl.float32
    o_s = i_b * stride_s_b + i_h * stride_s_h + i_t
    named = i_t < T
    first = tl.load(p_starts + o_s)
    end = tl.load(p_starts + o_s + 1, mask=named, other=S).to(tl.int32)
    live = first
    if REDUCE == LAST:
        live = tl.maximum(first, end - 1)
    p_of = p_order + i_b * stride_o_b + i_h * stride_o_h
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_dy = tl.zeros([BLOCK_D], dtype=REAL)
        if DY:
            o_y = i_b * stride_y_b + i_t * stride_y_t + i_h * stride_y_h
            b_dy = tl.load(p_dy + o_y + o_d, mask=o_d < tl.where(named, D, 0), other=0.0).to(REAL)
        if REDUCE == MEAN:
            b_dy = b_dy / tl.maximum(end - first, 1).to(REAL)
        for i in range(first, end):
            slot = tl.load(p_of + i).to(tl.int64)
            b_dx = tl.where(i >= live, b_dy, 0.0).to(p_dx.dtype.element_ty)
            tl.store(p_dx + ((i_b * S + slot) * H + i_h) * D + o_d, b_dx, mask=m_d)
    p_lse = p_slot_lse + (i_b * H + i_h) * S
    p_dlse_of = p_dslot_lse + (i_b * H + i_h) * S
    total = tl.zeros([], dtype=tl.float64)
    from_row = tl.zeros([], dtype=tl.float64)
    if DLSE:
        total = log_sum_exp(p_lse, p_of, tl.where(named, live, 0), tl.where(named, end, 0))
        from_row = tl.load(p_dlse + (i_b * H + i_h) * T + i_t, mask=named, other=0.0).to(tl.float64)
    for i in range(first, end):
        slot = tl.load(p_of + i).to(tl.int64)
        value = tl.zeros([], dtype=tl.float64)
        if DLSE:
            share = tl.exp(tl.load(p_lse + slot).to(tl.float64) - total)
            value = tl.where(end - live == 1, from_row, from_row * share)
            value = tl.where((i >= live) & named & (total != -float("inf")), value, 0.0)
        tl.store(p_dlse_of + slot, value.to(REAL))
