"""Triton kernels of attention over ranges: gradients of queries, and of keys and values.

Equations and letters as in triton_kernels_range_attention.py, the walks too: where a result is not finite it is
computed again, one row after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    NONE,
    UNSPECIALIZED,
    bias_of,
    blemish,
    gradient_of_score,
    load_row,
    load_rows,
    lse_of,
    multiply,
    natural,
    products,
    products_with_row,
    ranges_of,
    rows_at,
    seen_pairs,
    store_rows,
    unit,
    weight_again,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def range_attention_delta(
    p_o, p_do, p_dlse, p_delta, Tq, H,
    stride_o_b, stride_o_t, stride_o_h, stride_do_b, stride_do_t, stride_do_h,
    stride_dlse_b, stride_dlse_t, stride_dlse_h,
    D: tl.constexpr, DLSE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """delta [B, H, Tq] = <do, o> - dlse, for BM queries of a head."""
    STATE: tl.constexpr = p_delta.dtype.element_ty
    pid = tl.program_id(0)
    tiles = (Tq + BM - 1) // BM
    begin = pid % tiles * BM
    i_h = (pid // tiles % H).to(tl.int64)
    i_b = (pid // tiles // H).to(tl.int64)
    i_m = tl.arange(0, BM)
    b_i = begin + i_m
    m_i = b_i < Tq
    p_o, stride_o = rows_at(p_o, i_b, begin, i_h, stride_o_b, stride_o_t, stride_o_h)
    p_do, stride_do = rows_at(p_do, i_b, begin, i_h, stride_do_b, stride_do_t, stride_do_h)
    b_delta = tl.zeros([BM], STATE)
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        b_o = load_rows(p_o, i_m, m_i, stride_o, o_d, D, BD, STATE).to(STATE)
        b_do = load_rows(p_do, i_m, m_i, stride_do, o_d, D, BD, STATE).to(STATE)
        b_delta += tl.sum(b_o * b_do, axis=1)
    if DLSE:
        p_dlse += i_b * stride_dlse_b + i_h * stride_dlse_h
        b_delta -= tl.load(p_dlse + b_i.to(tl.int64) * stride_dlse_t, mask=m_i, other=0.0).to(STATE)
    tl.store(p_delta + (i_b * H + i_h) * Tq + b_i, b_delta, mask=m_i)


@triton.jit
def descend(
    b_dq, b_q, b_do, b_lse, b_delta, p_q, stride_q, p_do, stride_do, p_k, stride_k, p_v, stride_v,
    p_ranges, parts, Tq, Tk, b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ds k of one source of keys, added to b_dq [BM, BD]."""
    S: tl.constexpr = p_q.dtype.element_ty
    STATE: tl.constexpr = b_dq.dtype
    i_n = tl.arange(0, BN)
    if BIAS != NONE:
        b_start = tl.load(p_starts + b_i, mask=m_i, other=0)
    for part in range(parts):
        b_first, b_end, low, high, inner_low, inner_high = ranges_of(p_ranges + part * 2 * Tq, b_i, m_i, Tq, Tk)
        for n in range(low, high, BN):
            b_j = n + i_n
            m_j = b_j < high
            p_k_n = p_k + n * stride_k.to(tl.int64)
            p_v_n = p_v + n * stride_v.to(tl.int64)
            b_k = load_rows(p_k_n, i_n, m_j, stride_k, o_d, D, BD, STATE)
            if D <= BD:
                b_v = load_rows(p_v_n, i_n, m_j, stride_v, o_d, D, BD, STATE)
                b_s = multiply(b_q, tl.trans(b_k), S, STATE) * scale
                b_dp = multiply(b_do, tl.trans(b_v), S, STATE)
            else:
                b_s = products(p_q, i_m, m_i, stride_q, p_k_n, i_n, m_j, stride_k, D, BD, S, STATE) * scale
                b_dp = products(p_do, i_m, m_i, stride_do, p_v_n, i_n, m_j, stride_v, D, BD, S, STATE)
            if BIAS != NONE:
                b_more = bias_of(p_bias, b_i[:, None], b_j[None, :], b_start[:, None], most, stride_bias, BIAS, STATE)
                b_s += b_more * unit(ACTIVATION)
            b_p = weight_again(b_s, b_lse[:, None], ACTIVATION)
            b_ds = gradient_of_score(b_s, b_p, b_dp, b_delta[:, None], ACTIVATION)
            if (n < inner_low) | (n + BN > inner_high):
                b_ds = tl.where(seen_pairs(b_first, b_end, b_j), b_ds, 0.0)
            b_dq += multiply(b_ds, b_k, S, STATE)
    return b_dq


@triton.jit
def descend_exactly(
    b_dq, b_lse, b_delta, p_q, stride_q, p_do, stride_do, p_k, stride_k, p_v, stride_v,
    p_ranges, parts, Tq, Tk, b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As `descend`, one key after the other."""
    STATE: tl.constexpr = b_dq.dtype
    if BIAS != NONE:
        b_start = tl.load(p_starts + b_i, mask=m_i, other=0)
    for part in range(parts):
        b_first, b_end, low, high, _, _ = ranges_of(p_ranges + part * 2 * Tq, b_i, m_i, Tq, Tk)
        for j in range(low, high):
            m_see = (b_first <= j) & (j < b_end)
            p_k_j = p_k + j * stride_k.to(tl.int64)
            p_v_j = p_v + j * stride_v.to(tl.int64)
            b_s = products_with_row(p_q, i_m, m_i, stride_q, p_k_j, D, BD, STATE) * scale
            b_dp = products_with_row(p_do, i_m, m_i, stride_do, p_v_j, D, BD, STATE)
            if BIAS != NONE:
                b_s += bias_of(p_bias, b_i, b_i * 0 + j, b_start, most, stride_bias, BIAS, STATE) * unit(ACTIVATION)
            b_p = weight_again(b_s, b_lse, ACTIVATION)
            b_ds = gradient_of_score(b_s, b_p, b_dp, b_delta, ACTIVATION)
            b_k = load_row(p_k_j, o_d, D, STATE)
            b_dq += tl.where(m_see[:, None], b_ds[:, None] * b_k[None, :], 0.0)
    return b_dq


@triton.jit(do_not_specialize=UNSPECIALIZED)
def range_attention_dq(
    p_q, p_k, p_v, p_ranges, p_k2, p_v2, p_ranges2, p_bias, p_starts, p_do, p_lse, p_delta, p_dq,
    Tq, Tk, T2, H, group, parts, parts2, most, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_k2_b, stride_k2_t, stride_k2_h, stride_v2_b, stride_v2_t, stride_v2_h, stride_do_b, stride_do_t, stride_do_h,
    stride_ranges_b, stride_ranges_h, stride_ranges2_b, stride_ranges2_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, SECOND: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What the forward reads, do [B, Tq, H, D], lse and delta [B, H, Tq] in; dq [B, Tq, H, D] out."""
    STATE: tl.constexpr = p_delta.dtype.element_ty
    SLICES: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    tiles = (Tq + BM - 1) // BM
    i_d = pid % SLICES
    begin = pid // SLICES % tiles * BM
    i_h = (pid // SLICES // tiles % H).to(tl.int64)
    i_b = (pid // SLICES // tiles // H).to(tl.int64)
    i_g = i_h // group
    i_m = tl.arange(0, BM)
    b_i = begin + i_m
    m_i = b_i < Tq
    o_d = i_d * BD + tl.arange(0, BD)
    natural_scale = natural(scale, scale_rest, STATE)
    scale = natural_scale * unit(ACTIVATION)

    p_q, stride_q = rows_at(p_q, i_b, begin, i_h, stride_q_b, stride_q_t, stride_q_h)
    p_do, stride_do = rows_at(p_do, i_b, begin, i_h, stride_do_b, stride_do_t, stride_do_h)
    p_k, stride_k = rows_at(p_k, i_b, 0, i_g, stride_k_b, stride_k_t, stride_k_h)
    p_v, stride_v = rows_at(p_v, i_b, 0, i_g, stride_v_b, stride_v_t, stride_v_h)
    p_ranges += i_b * stride_ranges_b + i_h * stride_ranges_h
    if SECOND:
        p_k2, stride_k2 = rows_at(p_k2, i_b, 0, i_g, stride_k2_b, stride_k2_t, stride_k2_h)
        p_v2, stride_v2 = rows_at(p_v2, i_b, 0, i_g, stride_v2_b, stride_v2_t, stride_v2_h)
        p_ranges2 += i_b * stride_ranges2_b + i_h * stride_ranges2_h
    p_bias += i_h * stride_bias_h
    b_lse = lse_of(p_lse + (i_b * H + i_h) * Tq + b_i, m_i, STATE)
    b_delta = tl.load(p_delta + (i_b * H + i_h) * Tq + b_i, mask=m_i, other=0.0)

    b_dq = tl.zeros([BM, BD], STATE)
    wrong = True
    if not EXACT:
        b_q = load_rows(p_q, i_m, m_i, stride_q, o_d, D, BD, STATE)
        b_do = load_rows(p_do, i_m, m_i, stride_do, o_d, D, BD, STATE)
        b_dq = descend(
            b_dq, b_q, b_do, b_lse, b_delta, p_q, stride_q, p_do, stride_do, p_k, stride_k, p_v, stride_v,
            p_ranges, parts, Tq, Tk, b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i,
            D, ACTIVATION, BIAS, BN, BD,
        )  # fmt: skip
        if SECOND:
            b_dq = descend(
                b_dq, b_q, b_do, b_lse, b_delta, p_q, stride_q, p_do, stride_do, p_k2, stride_k2, p_v2, stride_v2,
                p_ranges2, parts2, Tq, T2, b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i,
                D, ACTIVATION, NONE, BN, BD,
            )  # fmt: skip
        wrong = blemish(b_dq) != 0
    if wrong:
        b_dq = tl.zeros([BM, BD], STATE)
        b_dq = descend_exactly(
            b_dq, b_lse, b_delta, p_q, stride_q, p_do, stride_do, p_k, stride_k, p_v, stride_v,
            p_ranges, parts, Tq, Tk, b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i,
            D, ACTIVATION, BIAS, BD,
        )  # fmt: skip
        if SECOND:
            b_dq = descend_exactly(
                b_dq, b_lse, b_delta, p_q, stride_q, p_do, stride_do, p_k2, stride_k2, p_v2, stride_v2,
                p_ranges2, parts2, Tq, T2, b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i,
                D, ACTIVATION, NONE, BD,
            )  # fmt: skip
    p_dq += ((i_b * Tq + begin) * H + i_h) * D
    store_rows(p_dq, b_dq * natural_scale, i_m, m_i, H * D, o_d, D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def range_attention_dkv(
    p_q, p_k, p_v, p_ranges, p_bias, p_starts, p_do, p_lse, p_delta, p_dk, p_dv,
    Tq, Tk, H, group, parts, most, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_do_b, stride_do_t, stride_do_h, stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As for dq, with ranges [B or 1, H or 1, P, 2, Tk] of the queries that see a key; dk, dv [B, Tk, Hk, D] out."""
    STATE: tl.constexpr = p_delta.dtype.element_ty
    SLICES: tl.constexpr = (D + BD - 1) // BD
    pid = tl.program_id(0)
    tiles = (Tk + BM - 1) // BM
    heads = H // group
    i_d = pid % SLICES
    begin = pid // SLICES % tiles * BM
    i_g = (pid // SLICES // tiles % heads).to(tl.int64)
    i_b = (pid // SLICES // tiles // heads).to(tl.int64)
    i_m = tl.arange(0, BM)
    b_j = begin + i_m
    m_j = b_j < Tk
    o_d = i_d * BD + tl.arange(0, BD)
    natural_scale = natural(scale, scale_rest, STATE)
    scale = natural_scale * unit(ACTIVATION)
    p_k, stride_k = rows_at(p_k, i_b, begin, i_g, stride_k_b, stride_k_t, stride_k_h)
    p_v, stride_v = rows_at(p_v, i_b, begin, i_g, stride_v_b, stride_v_t, stride_v_h)

    b_dk = tl.zeros([BM, BD], STATE)
    b_dv = tl.zeros([BM, BD], STATE)
    wrong = True
    if not EXACT:
        b_k = load_rows(p_k, i_m, m_j, stride_k, o_d, D, BD, STATE)
        b_v = load_rows(p_v, i_m, m_j, stride_v, o_d, D, BD, STATE)
        b_dk, b_dv = collect(
            b_dk, b_dv, b_k, b_v, p_k, stride_k, p_v, stride_v, p_q, p_do, p_lse, p_delta, p_ranges, p_bias, p_starts,
            Tq, Tk, H, group, parts, most, scale, i_b, i_g, b_j, m_j, i_m, o_d,
            stride_q_b, stride_q_t, stride_q_h, stride_do_b, stride_do_t, stride_do_h,
            stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i, D, ACTIVATION, BIAS, BN, BD,
        )  # fmt: skip
        wrong = (blemish(b_dk) != 0) | (blemish(b_dv) != 0)
    if wrong:
        b_dk = tl.zeros([BM, BD], STATE)
        b_dv = tl.zeros([BM, BD], STATE)
        b_dk, b_dv = collect_exactly(
            b_dk, b_dv, p_k, stride_k, p_v, stride_v, p_q, p_do, p_lse, p_delta, p_ranges, p_bias, p_starts,
            Tq, Tk, H, group, parts, most, scale, i_b, i_g, b_j, m_j, i_m, o_d,
            stride_q_b, stride_q_t, stride_q_h, stride_do_b, stride_do_t, stride_do_h,
            stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i, D, ACTIVATION, BIAS, BD,
        )  # fmt: skip
    at = ((i_b * Tk + begin) * heads + i_g) * D
    store_rows(p_dk + at, b_dk * natural_scale, i_m, m_j, heads * D, o_d, D)
    store_rows(p_dv + at, b_dv, i_m, m_j, heads * D, o_d, D)


@triton.jit
def collect(
    b_dk, b_dv, b_k, b_v, p_k, stride_k, p_v, stride_v, p_q, p_do, p_lse, p_delta, p_ranges, p_bias, p_starts,
    Tq, Tk, H, group, parts, most, scale, i_b, i_g, b_j, m_j, i_m, o_d,
    stride_q_b, stride_q_t, stride_q_h, stride_do_b, stride_do_t, stride_do_h,
    stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """ds q and p do of the queries, head by head of a group, added to b_dk and b_dv [BM, BD]."""
    S: tl.constexpr = p_k.dtype.element_ty
    STATE: tl.constexpr = b_dk.dtype
    i_n = tl.arange(0, BN)
    for member in range(group):
        i_h = i_g * group + member
        p_q_h, stride_q = rows_at(p_q, i_b, 0, i_h, stride_q_b, stride_q_t, stride_q_h)
        p_do_h, stride_do = rows_at(p_do, i_b, 0, i_h, stride_do_b, stride_do_t, stride_do_h)
        p_seen = p_ranges + i_b * stride_ranges_b + i_h * stride_ranges_h
        at = (i_b * H + i_h) * Tq
        for part in range(parts):
            b_first, b_end, low, high, inner_low, inner_high = ranges_of(p_seen + part * 2 * Tk, b_j, m_j, Tk, Tq)
            for n in range(low, high, BN):
                b_i = n + i_n
                m_i = b_i < high
                p_q_n = p_q_h + n * stride_q.to(tl.int64)
                p_do_n = p_do_h + n * stride_do.to(tl.int64)
                b_q = load_rows(p_q_n, i_n, m_i, stride_q, o_d, D, BD, STATE)
                b_do = load_rows(p_do_n, i_n, m_i, stride_do, o_d, D, BD, STATE)
                if D <= BD:
                    b_s = multiply(b_k, tl.trans(b_q), S, STATE) * scale
                    b_dp = multiply(b_v, tl.trans(b_do), S, STATE)
                else:
                    b_s = products(p_k, i_m, m_j, stride_k, p_q_n, i_n, m_i, stride_q, D, BD, S, STATE) * scale
                    b_dp = products(p_v, i_m, m_j, stride_v, p_do_n, i_n, m_i, stride_do, D, BD, S, STATE)
                if BIAS != NONE:
                    b_start = tl.load(p_starts + b_i, mask=m_i, other=0)
                    b_more = bias_of(
                        p_bias + i_h * stride_bias_h, b_i[None, :], b_j[:, None], b_start[None, :], most,
                        stride_bias_i, BIAS, STATE,
                    )  # fmt: skip
                    b_s += b_more * unit(ACTIVATION)
                b_lse = lse_of(p_lse + at + b_i, m_i, STATE)
                b_delta = tl.load(p_delta + at + b_i, mask=m_i, other=0.0)
                b_p = weight_again(b_s, b_lse[None, :], ACTIVATION)
                b_ds = gradient_of_score(b_s, b_p, b_dp, b_delta[None, :], ACTIVATION)
                if (n < inner_low) | (n + BN > inner_high):
                    m_pair = seen_pairs(b_first, b_end, b_i)
                    b_p = tl.where(m_pair, b_p, 0.0)
                    b_ds = tl.where(m_pair, b_ds, 0.0)
                b_dv += multiply(b_p, b_do, S, STATE)
                b_dk += multiply(b_ds, b_q, S, STATE)
    return b_dk, b_dv


@triton.jit
def collect_exactly(
    b_dk, b_dv, p_k, stride_k, p_v, stride_v, p_q, p_do, p_lse, p_delta, p_ranges, p_bias, p_starts,
    Tq, Tk, H, group, parts, most, scale, i_b, i_g, b_j, m_j, i_m, o_d,
    stride_q_b, stride_q_t, stride_q_h, stride_do_b, stride_do_t, stride_do_h,
    stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As `collect`, one query after the other."""
    STATE: tl.constexpr = b_dk.dtype
    for member in range(group):
        i_h = i_g * group + member
        p_q_h, stride_q = rows_at(p_q, i_b, 0, i_h, stride_q_b, stride_q_t, stride_q_h)
        p_do_h, stride_do = rows_at(p_do, i_b, 0, i_h, stride_do_b, stride_do_t, stride_do_h)
        p_seen = p_ranges + i_b * stride_ranges_b + i_h * stride_ranges_h
        at = (i_b * H + i_h) * Tq
        for part in range(parts):
            b_first, b_end, low, high, _, _ = ranges_of(p_seen + part * 2 * Tk, b_j, m_j, Tk, Tq)
            for i in range(low, high):
                m_see = (b_first <= i) & (i < b_end)
                p_q_i = p_q_h + i * stride_q.to(tl.int64)
                p_do_i = p_do_h + i * stride_do.to(tl.int64)
                b_s = products_with_row(p_k, i_m, m_j, stride_k, p_q_i, D, BD, STATE) * scale
                b_dp = products_with_row(p_v, i_m, m_j, stride_v, p_do_i, D, BD, STATE)
                if BIAS != NONE:
                    b_start = tl.load(p_starts + b_j * 0 + i)
                    b_more = bias_of(
                        p_bias + i_h * stride_bias_h, b_j * 0 + i, b_j, b_start, most, stride_bias_i, BIAS, STATE
                    )
                    b_s += b_more * unit(ACTIVATION)
                b_lse = lse_of(p_lse + at + b_j * 0 + i, b_j * 0 == 0, STATE)
                b_delta = tl.load(p_delta + at + b_j * 0 + i)
                b_p = weight_again(b_s, b_lse, ACTIVATION)
                b_ds = gradient_of_score(b_s, b_p, b_dp, b_delta, ACTIVATION)
                b_q = load_row(p_q_i, o_d, D, STATE)
                b_do = load_row(p_do_i, o_d, D, STATE)
                b_dv += tl.where(m_see[:, None], b_p[:, None] * b_do[None, :], 0.0)
                b_dk += tl.where(m_see[:, None], b_ds[:, None] * b_q[None, :], 0.0)
    return b_dk, b_dv
