"""Triton kernels of attention over ranges: the gradient of a bias, which is a sum over batch rows and chunks.

Equations and letters as in triton_kernels_range_attention.py. No sum is atomic: each program has a table of its own for
a piece of the queries, and the tables are added in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    DISTANCE,
    UNSPECIALIZED,
    bias_of,
    gradient_of_score,
    lse_of,
    natural,
    products,
    products_with_row,
    ranges_of,
    rows_at,
    seen_pairs,
    unit,
    weight_again,
)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def range_attention_dbias(
    p_q, p_k, p_v, p_ranges, p_bias, p_starts, p_runs, p_do, p_lse, p_delta, p_dbias,
    B, Tq, Tk, H, group, parts, most, places, rows_b, pieces, piece, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_do_b, stride_do_t, stride_do_h, stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, EXACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Sums of ds by place [tables, H, places, places], of chunks that begin in `piece` queries of `rows_b` batch rows.

    starts [Tq]: where the chunk of a query begins; runs [Tq]: the first query of the next chunk. Pairs that are not
    places of a chunk are left to `range_attention_dbias_outside`.
    """
    S: tl.constexpr = p_q.dtype.element_ty
    STATE: tl.constexpr = p_delta.dtype.element_ty
    pid = tl.program_id(0)
    rows = (places + BM - 1) // BM
    columns = (places + BN - 1) // BN
    i_m = tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    column = pid % columns * BN
    row = pid // columns % rows * BM
    i_h = (pid // columns // rows % H).to(tl.int64)
    i_p = (pid // columns // rows // H).to(tl.int64)
    i_g = i_h // group
    scale = natural(scale, scale_rest, STATE) * unit(ACTIVATION)
    p_bias += i_h * stride_bias_h
    begin = (i_p % pieces).to(tl.int32) * piece
    last = tl.minimum(begin + piece, Tq)
    before = tl.load(p_starts + tl.maximum(begin - 1, 0))
    if (begin > 0) & (begin < last) & (tl.load(p_starts + tl.minimum(begin, Tq - 1)) == before):
        begin = tl.load(p_runs + begin)
    b_sum = tl.zeros([BM, BN], STATE)
    first_b = i_p // pieces * rows_b
    for row_b in range(first_b, tl.minimum(first_b + rows_b, B)):
        i_b = first_b * 0 + row_b
        p_q_b, stride_q = rows_at(p_q, i_b, 0, i_h, stride_q_b, stride_q_t, stride_q_h)
        p_do_b, stride_do = rows_at(p_do, i_b, 0, i_h, stride_do_b, stride_do_t, stride_do_h)
        p_k_b, stride_k = rows_at(p_k, i_b, 0, i_g, stride_k_b, stride_k_t, stride_k_h)
        p_v_b, stride_v = rows_at(p_v, i_b, 0, i_g, stride_v_b, stride_v_t, stride_v_h)
        p_ranges_b = p_ranges + i_b * stride_ranges_b + i_h * stride_ranges_h
        at = (i_b * H + i_h) * Tq
        i = begin
        while i < last:
            start = tl.load(p_starts + i)
            stop = tl.load(p_runs + i)
            b_i = start + row + i_m
            b_j = start + column + i_n
            m_i = (b_i >= i) & (b_i < stop) & (row + i_m < places)
            m_j = (b_j >= 0) & (b_j < Tk) & (column + i_n < places)
            if (start + row < stop) & (start + column < Tk):
                b_count = tl.zeros([BM, BN], tl.int32)
                for part in range(parts):
                    p_part = p_ranges_b + part * 2 * Tq
                    b_first = tl.load(p_part + b_i, mask=m_i, other=0)
                    b_end = tl.load(p_part + Tq + b_i, mask=m_i, other=0)
                    b_count += (seen_pairs(b_first, b_end, b_j) & m_j[None, :]).to(tl.int32)
                first_row = start + row
                first_column = start + column
                p_q_i = p_q_b + first_row * stride_q.to(tl.int64)
                p_do_i = p_do_b + first_row * stride_do.to(tl.int64)
                p_k_j = p_k_b + first_column * stride_k.to(tl.int64)
                p_v_j = p_v_b + first_column * stride_v.to(tl.int64)
                if EXACT:
                    b_s = tl.zeros([BM, BN], STATE)
                    b_dp = tl.zeros([BM, BN], STATE)
                    for n in range(tl.maximum(-first_column, 0), tl.minimum(BN, Tk - first_column)):
                        b_one = products_with_row(
                            p_q_i, i_m, m_i, stride_q, p_k_j + n * stride_k.to(tl.int64), D, BD, STATE
                        )
                        b_other = products_with_row(
                            p_do_i, i_m, m_i, stride_do, p_v_j + n * stride_v.to(tl.int64), D, BD, STATE
                        )
                        b_s = tl.where(i_n[None, :] == n, b_one[:, None], b_s)
                        b_dp = tl.where(i_n[None, :] == n, b_other[:, None], b_dp)
                else:
                    b_s = products(p_q_i, i_m, m_i, stride_q, p_k_j, i_n, m_j, stride_k, D, BD, S, STATE)
                    b_dp = products(p_do_i, i_m, m_i, stride_do, p_v_j, i_n, m_j, stride_v, D, BD, S, STATE)
                b_more = bias_of(
                    p_bias, b_i[:, None], b_j[None, :], (b_i * 0 + start)[:, None], most, stride_bias_i, BIAS, STATE
                )
                b_s = b_s * scale + b_more * unit(ACTIVATION)
                b_lse = lse_of(p_lse + at + b_i, m_i, STATE)
                b_delta = tl.load(p_delta + at + b_i, mask=m_i, other=0.0)
                b_p = weight_again(b_s, b_lse[:, None], ACTIVATION)
                b_ds = gradient_of_score(b_s, b_p, b_dp, b_delta[:, None], ACTIVATION)
                b_sum += tl.where(b_count > 0, b_ds * b_count.to(STATE), 0.0)
            i = tl.maximum(stop, i + 1)
    p_dbias += (i_p * H + i_h) * places * places
    p_at = p_dbias + (row + i_m)[:, None] * places + (column + i_n)[None, :]
    tl.store(p_at, b_sum, mask=(row + i_m < places)[:, None] & (column + i_n < places)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def range_attention_dbias_outside(
    p_q, p_k, p_v, p_ranges, p_bias, p_starts, p_do, p_lse, p_delta, p_dbias,
    B, Tq, Tk, H, group, parts, most, places, rows_b, pieces, piece, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_do_b, stride_do_t, stride_do_h, stride_ranges_b, stride_ranges_h, stride_bias_h, stride_bias_i,
    D: tl.constexpr, ACTIVATION: tl.constexpr, BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Pairs that are not places of a chunk, added to the sums [tables, H, places, places], one query after the other.

    Chunks have none: a program then only looks at the ranges of its `piece` queries. A distance is summed at the pair
    of places that is first in the table.
    """
    STATE: tl.constexpr = p_delta.dtype.element_ty
    pid = tl.program_id(0)
    i_m = tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    i_h = (pid % H).to(tl.int64)
    i_p = (pid // H).to(tl.int64)
    i_g = i_h // group
    scale = natural(scale, scale_rest, STATE) * unit(ACTIVATION)
    p_bias += i_h * stride_bias_h
    p_dbias += (i_p * H + i_h) * places * places
    begin = (i_p % pieces).to(tl.int32) * piece
    last = tl.minimum(begin + piece, Tq)
    first_b = i_p // pieces * rows_b
    for row_b in range(first_b, tl.minimum(first_b + rows_b, B)):
        i_b = first_b * 0 + row_b
        p_q_b, stride_q = rows_at(p_q, i_b, 0, i_h, stride_q_b, stride_q_t, stride_q_h)
        p_do_b, stride_do = rows_at(p_do, i_b, 0, i_h, stride_do_b, stride_do_t, stride_do_h)
        p_k_b, stride_k = rows_at(p_k, i_b, 0, i_g, stride_k_b, stride_k_t, stride_k_h)
        p_v_b, stride_v = rows_at(p_v, i_b, 0, i_g, stride_v_b, stride_v_t, stride_v_h)
        p_ranges_b = p_ranges + i_b * stride_ranges_b + i_h * stride_ranges_h
        at = (i_b * H + i_h) * Tq
        for t in range(begin, last, BM):
            b_i = t + i_m
            m_i = b_i < last
            b_start = tl.load(p_starts + b_i, mask=m_i, other=0)
            for part in range(parts):
                p_part = p_ranges_b + part * 2 * Tq
                b_first, b_end, _, _, _, _ = ranges_of(p_part, b_i, m_i, Tq, Tk)
                m_away = (b_i < b_start) | (b_i >= b_start + places) | (b_first < b_start) | (b_end > b_start + places)
                away = tl.max((m_away & (b_first < b_end)).to(tl.int32), axis=0)
                for i in range(t, tl.where(away > 0, tl.minimum(t + BM, last), t)):
                    start = tl.load(p_starts + i)
                    first = tl.maximum(tl.load(p_part + i), 0)
                    end = tl.minimum(tl.load(p_part + Tq + i), Tk)
                    inside = (i >= start) & (i < start + places)
                    p_q_i = p_q_b + i * stride_q.to(tl.int64)
                    p_do_i = p_do_b + i * stride_do.to(tl.int64)
                    # Keys before the chunk and keys after it; of a query outside of its chunk all of them.
                    for side in range(2):
                        low = tl.where(side == 0, first, tl.where(inside, tl.maximum(first, start + places), end))
                        high = tl.where(side == 0, tl.where(inside, tl.minimum(end, start), end), end)
                        for n in range(low, high, BN):
                            b_j = n + i_n
                            m_j = b_j < high
                            p_k_n = p_k_b + n * stride_k.to(tl.int64)
                            p_v_n = p_v_b + n * stride_v.to(tl.int64)
                            b_same = b_j * 0 + i
                            b_s = products_with_row(p_k_n, i_n, m_j, stride_k, p_q_i, D, BD, STATE) * scale
                            b_dp = products_with_row(p_v_n, i_n, m_j, stride_v, p_do_i, D, BD, STATE)
                            b_more = bias_of(p_bias, b_same, b_j, b_j * 0 + start, most, stride_bias_i, BIAS, STATE)
                            b_s += b_more * unit(ACTIVATION)
                            b_lse = lse_of(p_lse + at + b_same, m_j, STATE)
                            b_delta = tl.load(p_delta + at + b_same)
                            b_p = weight_again(b_s, b_lse, ACTIVATION)
                            b_ds = gradient_of_score(b_s, b_p, b_dp, b_delta, ACTIVATION)
                            if BIAS == DISTANCE:
                                b_place = places - 1 + b_j - i
                                b_gap = tl.minimum(tl.maximum(b_place, 0), most) - (places - 1)
                                b_at = tl.maximum(-b_gap, 0) * places + tl.maximum(b_gap, 0)
                                before, after = (places - 1) * places, places - 1
                            else:
                                b_place = b_j - start
                                row = tl.minimum(tl.maximum(i - start, 0), most) * places
                                b_at = row + tl.minimum(tl.maximum(b_place, 0), most)
                                before, after = row, row + most
                            m_place = m_j & (b_place >= 0) & (b_place <= most)
                            b_sum = tl.load(p_dbias + b_at, mask=m_place, other=0.0) + b_ds
                            tl.debug_barrier()
                            tl.store(p_dbias + b_at, b_sum, mask=m_place)
                            tl.debug_barrier()
                            low_sum = tl.load(p_dbias + before) + tl.sum(
                                tl.where(m_j & (b_place < 0), b_ds, 0.0), axis=0
                            )
                            tl.debug_barrier()
                            tl.store(p_dbias + before, low_sum)
                            tl.debug_barrier()
                            high_sum = tl.load(p_dbias + after) + tl.sum(
                                tl.where(m_j & (b_place > most), b_ds, 0.0), axis=0
                            )
                            tl.debug_barrier()
                            tl.store(p_dbias + after, high_sum)
                            tl.debug_barrier()
