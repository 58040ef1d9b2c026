"""Triton kernels of attention over ranges: one tile core, for which a pattern is nothing but integers in memory.

    range_attention_forward         o and lse; a program owns BM queries of one head
    _backward.py: _delta            <do, o> - dlse of every query
                  _dq               dq; a program owns BM queries of one head
                  _dkv              dk and dv of one source; a program owns BM keys of one key head, and walks queries
    _bias.py:     _dbias            sums of ds over batch rows and chunks; a program owns BM by BN places of a chunk
                  _dbias_outside    what is added to these for pairs that are no places of a chunk

    s_ij = scale <q_i, k_j> + bias;  p_ij = e^(s_ij - lse_i) or P(s_ij);  o_i = sum_j p_ij v_j
    dp_ij = <do_i, v_j>;  ds_ij = p_ij (dp_ij - delta_i) or P'(s_ij) dp_ij;  dbias = sum ds_ij
    dq_i = scale sum_j ds_ij k_j;  dk_j = scale sum_i ds_ij q_i;  dv_j = sum_i p_ij do_i

B batch, Tq queries, Tk keys (T2 of a second source), H heads, of which each `group` reads one key head, D channels, P
parts. Ranges are int32 [B or 1, H or 1, P, 2, owners]: a program reads those of its BM owners, walks from the least
first to the greatest end in tiles of BN, and compares positions only in tiles that some owner does not see whole.
Channels are padded to BD; what exceeds BD is summed in slices in scores, and owned in slices by other programs. S
storage dtype, STATE that of sums.

NaN and infinity: 0 NaN is NaN, so a product over a tile would carry them from what an owner does not see. What comes of
that is never finite: a program that meets such a result walks again, one row after the other (EXACT), where not to see
is a selection. Where all is finite that costs one look at the result. Float64 is walked so from the start.

Strides are in units of 16 elements, of which D is a multiple, so that all accesses are wide: the launchers see to that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    INF,
    LN2,
    NONE,
    SOFTMAX,
    UNSPECIALIZED,
    bias_of,
    blemish,
    load_row,
    load_rows,
    multiply,
    natural,
    products,
    products_with_row,
    ranges_of,
    rows_at,
    seen_pairs,
    store_rows,
    unit,
    weigh,
)


@triton.jit
def attend(
    b_o, b_max, b_sum, b_q, p_q, stride_q, p_k, stride_k, p_v, stride_v, p_ranges, parts, Tq, Tk, b_i, m_i, i_m, o_d,
    scale, p_bias, p_starts, most, stride_bias,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One source of keys, added to b_o [BM, BD] and, with softmax, to the running maximum and sum [BM].

    b_i [BM] queries, i_m [BM] the same from the tile's first, which p_q is; b_q [BM, BD] the rows. p_k, p_v: of a head.
    """
    S: tl.constexpr = p_q.dtype.element_ty
    STATE: tl.constexpr = b_o.dtype
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
            if D <= BD:
                b_k = load_rows(p_k_n, i_n, m_j, stride_k, o_d, D, BD, STATE)
                b_s = multiply(b_q, tl.trans(b_k), S, STATE) * scale
            else:
                b_s = products(p_q, i_m, m_i, stride_q, p_k_n, i_n, m_j, stride_k, D, BD, S, STATE) * scale
            if BIAS != NONE:
                b_more = bias_of(p_bias, b_i[:, None], b_j[None, :], b_start[:, None], most, stride_bias, BIAS, STATE)
                b_s += b_more * unit(ACTIVATION)
            if ACTIVATION == SOFTMAX:
                if (n < inner_low) | (n + BN > inner_high):
                    b_s = tl.where(seen_pairs(b_first, b_end, b_j), b_s, -INF)
                b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
                b_shift = tl.where(b_new == -INF, 0.0, b_new)
                b_p = tl.exp2(b_s - b_shift[:, None])
                b_keep = tl.exp2(b_max - b_shift)
                b_sum = b_sum * b_keep + tl.sum(b_p, axis=1)
                b_o = b_o * b_keep[:, None]
                b_max = b_new
            else:
                b_p = weigh(b_s, ACTIVATION)
                if (n < inner_low) | (n + BN > inner_high):
                    b_p = tl.where(seen_pairs(b_first, b_end, b_j), b_p, 0.0)
            b_v = load_rows(p_v_n, i_n, m_j, stride_v, o_d, D, BD, STATE)
            b_o += multiply(b_p, b_v, S, STATE)
    return b_o, b_max, b_sum


@triton.jit
def attend_exactly(
    b_o, b_max, b_sum, p_q, stride_q, p_k, stride_k, p_v, stride_v, p_ranges, parts, Tq, Tk, b_i, m_i, i_m, o_d,
    scale, p_bias, p_starts, most, stride_bias,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """As `attend`, one key after the other."""
    STATE: tl.constexpr = b_o.dtype
    if BIAS != NONE:
        b_start = tl.load(p_starts + b_i, mask=m_i, other=0)
    for part in range(parts):
        b_first, b_end, low, high, _, _ = ranges_of(p_ranges + part * 2 * Tq, b_i, m_i, Tq, Tk)
        for j in range(low, high):
            m_see = (b_first <= j) & (j < b_end)
            p_row = p_k + j * stride_k.to(tl.int64)
            b_s = products_with_row(p_q, i_m, m_i, stride_q, p_row, D, BD, STATE) * scale
            if BIAS != NONE:
                b_s += bias_of(p_bias, b_i, b_i * 0 + j, b_start, most, stride_bias, BIAS, STATE) * unit(ACTIVATION)
            if ACTIVATION == SOFTMAX:
                b_s = tl.where(m_see, b_s, -INF)
                b_new = tl.maximum(b_max, b_s)
                b_shift = tl.where(b_new == -INF, 0.0, b_new)
                b_p = tl.exp2(b_s - b_shift)
                b_keep = tl.exp2(b_max - b_shift)
                b_sum = b_sum * b_keep + b_p
                b_o = b_o * b_keep[:, None]
                b_max = b_new
            else:
                b_p = weigh(b_s, ACTIVATION)
            b_v = load_row(p_v + j * stride_v.to(tl.int64), o_d, D, STATE)
            b_o += tl.where(m_see[:, None], b_p[:, None] * b_v[None, :], 0.0)
    return b_o, b_max, b_sum


@triton.jit(do_not_specialize=UNSPECIALIZED)
def range_attention_forward(
    p_q, p_k, p_v, p_ranges, p_k2, p_v2, p_ranges2, p_bias, p_starts, p_o, p_lse,
    Tq, Tk, T2, H, group, parts, parts2, most, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_k2_b, stride_k2_t, stride_k2_h, stride_v2_b, stride_v2_t, stride_v2_h,
    stride_ranges_b, stride_ranges_h, stride_ranges2_b, stride_ranges2_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, SECOND: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """q [B, Tq, H, D], k, v [B, Tk, Hk, D], k2, v2 [B, T2, Hk, D] in; o [B, Tq, H, D], lse [B, H, Tq] out.

    bias [1 or H, most + 1] or [1 or H, most + 1, most + 1], with `starts` [Tq] that its places count from.
    """
    S: tl.constexpr = p_q.dtype.element_ty
    STATE: tl.constexpr = tl.float64 if tl.float64 == S else tl.float32
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
    scale = natural(scale, scale_rest, STATE) * unit(ACTIVATION)

    p_q, stride_q = rows_at(p_q, i_b, begin, i_h, stride_q_b, stride_q_t, stride_q_h)
    p_k, stride_k = rows_at(p_k, i_b, 0, i_g, stride_k_b, stride_k_t, stride_k_h)
    p_v, stride_v = rows_at(p_v, i_b, 0, i_g, stride_v_b, stride_v_t, stride_v_h)
    p_ranges += i_b * stride_ranges_b + i_h * stride_ranges_h
    if SECOND:
        p_k2, stride_k2 = rows_at(p_k2, i_b, 0, i_g, stride_k2_b, stride_k2_t, stride_k2_h)
        p_v2, stride_v2 = rows_at(p_v2, i_b, 0, i_g, stride_v2_b, stride_v2_t, stride_v2_h)
        p_ranges2 += i_b * stride_ranges2_b + i_h * stride_ranges2_h
    p_bias += i_h * stride_bias_h

    b_o = tl.zeros([BM, BD], STATE)
    b_max = tl.full([BM], -INF, STATE)
    b_sum = tl.zeros([BM], STATE)
    wrong = True
    if not EXACT:
        b_q = load_rows(p_q, i_m, m_i, stride_q, o_d, D, BD, STATE)
        b_o, b_max, b_sum = attend(
            b_o, b_max, b_sum, b_q, p_q, stride_q, p_k, stride_k, p_v, stride_v, p_ranges, parts, Tq, Tk,
            b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i, D, ACTIVATION, BIAS, BN, BD,
        )  # fmt: skip
        if SECOND:
            b_o, b_max, b_sum = attend(
                b_o, b_max, b_sum, b_q, p_q, stride_q, p_k2, stride_k2, p_v2, stride_v2, p_ranges2, parts2, Tq, T2,
                b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i, D, ACTIVATION, NONE, BN, BD,
            )  # fmt: skip
        wrong = blemish(b_o) != 0
    if wrong:
        b_o = tl.zeros([BM, BD], STATE)
        b_max = tl.full([BM], -INF, STATE)
        b_sum = tl.zeros([BM], STATE)
        b_o, b_max, b_sum = attend_exactly(
            b_o, b_max, b_sum, p_q, stride_q, p_k, stride_k, p_v, stride_v, p_ranges, parts, Tq, Tk,
            b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i, D, ACTIVATION, BIAS, BD,
        )  # fmt: skip
        if SECOND:
            b_o, b_max, b_sum = attend_exactly(
                b_o, b_max, b_sum, p_q, stride_q, p_k2, stride_k2, p_v2, stride_v2, p_ranges2, parts2, Tq, T2,
                b_i, m_i, i_m, o_d, scale, p_bias, p_starts, most, stride_bias_i, D, ACTIVATION, NONE, BD,
            )  # fmt: skip

    b_lse = tl.zeros([BM], STATE)
    if ACTIVATION == SOFTMAX:
        b_lse = tl.where(b_sum == 0, -INF, (b_max + tl.log2(b_sum)) * LN2)
        b_o = b_o / tl.where(b_sum == 0, 1.0, b_sum)[:, None]
    if i_d == 0:
        p_lse += (i_b * H + i_h) * Tq
        tl.store(p_lse + b_i, b_lse.to(p_lse.dtype.element_ty), mask=m_i)
    p_o += ((i_b * Tq + begin) * H + i_h) * D
    store_rows(p_o, b_o, i_m, m_i, H * D, o_d, D)
