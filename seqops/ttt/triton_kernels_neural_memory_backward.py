"""Triton kernels of neural_memory's backward: chunks in reverse, and the gradients of the gates, all chunks at once.

    memory_backward_walk   all but the gates' gradients; of these what the coefficients receive
    memory_gates           gradients of lr, decay and momentum, from those of the coefficients

One chunk, with dA the gradient of a tile's output (dO of the second; of the first dH * silu'(A)), E = dA delta^T and
R = -c * E, both causal, dW and dS those of the state after the chunk (`x` is K or h, X is Q or H):

    dX = R x + b dA W + g dA S             dc = -E * (X x^T)      db_t = <dA_t, W X_t>     dg_t = <dA_t, S X_t>
    ddelta = -(c * X x^T)^T dA - c_C * (x dW^T) - m_C * (x dS^T)
    dx = R^T X - (c_C * delta) dW - (m_C * delta) dS
    du = ddelta1 * silu'(a)    ddelta2 += du W2^T    da = ddelta1 * u * silu''(a) + dh * silu'(a),    u = delta2 W2
    dK += ddelta2 + da W1      dh += ddelta2 W2      dV = -ddelta2                                    (l2)
    dW <- b_C dW + (b dA)^T X + ...        dS <- g_C dW + p_C dS + (g dA)^T X

Letters as in triton_kernels_neural_memory.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks_neural_memory import (
    add_earlier,
    add_product,
    load_row,
    load_tile,
    silu,
    silu_curve,
    silu_slope,
    store_pairs,
    store_row,
    store_tile,
)

# Arrays of the workspace, [C, F] each, then of pairs, [C, P]; delta2 and ddelta2 [C, D] lie between.
I_A, I_H, I_U, I_D1, I_TILE, I_TOP, I_DTILE, I_DA = (tl.constexpr(i) for i in range(8))
I_RAW1, I_PAIRS1, I_R1, I_RAW2, I_PAIRS2, I_R2 = (tl.constexpr(i) for i in range(6))


@triton.jit
def store_pair_gradients(
    p_dc, p_r, p_raw, p_c, P, p_da, stride_da, p_delta, stride_delta, width, end_t, ADD: tl.constexpr,
    S: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """With E = dA delta^T, 0 where i > t: r = -c * E, and dc = -E * raw, or added to it (ADD)."""
    i_r = tl.arange(0, BT)
    m_causal = i_r[:, None] >= i_r[None, :]
    for first_t in tl.range(0, end_t, BT, disable_licm=True):
        for first_i in tl.range(0, first_t + 1, BT, disable_licm=True):
            b_e = add_product(
                tl.zeros((BT, BT), STATE), p_da, stride_da, 1, p_delta, 1, stride_delta, first_t, end_t, first_i, end_t,
                0, width, p_c, S, STATE, False, BT, BT, BK,
            )  # fmt: skip
            b_e = tl.where(m_causal | (i_r[:, None] * 0 + first_i < first_t), b_e, 0.0)
            b_c = load_tile(p_c, P, 1, first_t, end_t, first_i, end_t, STATE, BT, BT)
            b_c = tl.where(m_causal | (i_r[:, None] * 0 + first_i < first_t), b_c, 0.0)
            b_x = load_tile(p_raw, P, 1, first_t, end_t, first_i, end_t, STATE, BT, BT)
            store_tile(p_r, -(b_c * b_e), P, 1, first_t, end_t, first_i, end_t, BT, BT)
            b_x = -(b_e * b_x)
            if ADD:
                b_x += load_tile(p_dc, P, 1, first_t, end_t, first_i, end_t, STATE, BT, BT)
            store_tile(p_dc, b_x, P, 1, first_t, end_t, first_i, end_t, BT, BT)


@triton.jit
def update_gradients(
    p_dw, p_ds, p_w, p_s, p_da, stride_da, p_x, stride_x, p_b, p_g, keep, flow, hold, momenta,
    p_own, stride_own, p_other, stride_other, end_own, p_more, stride_more, p_with, stride_with, end_more,
    sum_b, sum_g, sum_p, rows, columns, count,
    S: tl.constexpr, STATE: tl.constexpr, TWO: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dW <- keep dW + (b dA)^T X + own^T other (+ more^T with), dS <- flow dW + hold dS + (g dA)^T X.

    Returns <dW, W>, <dW, S> and <dS, S> of what they were, added to the sums given. end_own, end_more: tokens, or 0.
    """
    for first in tl.range(0, rows, BU, disable_licm=True):
        for column in tl.range(0, columns, BN, disable_licm=True):
            b_dw = load_tile(p_dw, columns, 1, first, rows, column, columns, STATE, BU, BN)
            b_w = load_tile(p_w, columns, 1, first, rows, column, columns, STATE, BU, BN)
            sum_b += tl.sum(b_dw * b_w, axis=0)
            b_sum = add_product(
                keep * b_dw, p_da, 1, stride_da, p_x, stride_x, 1, first, rows, column, columns,
                0, count, p_b, S, STATE, True, BU, BN, BT,
            )  # fmt: skip
            b_sum = add_product(
                b_sum, p_own, 1, stride_own, p_other, stride_other, 1, first, rows, column, columns,
                0, end_own, p_b, S, STATE, False, BU, BN, BT,
            )  # fmt: skip
            if TWO:
                b_sum = add_product(
                    b_sum, p_more, 1, stride_more, p_with, stride_with, 1, first, rows, column, columns,
                    0, end_more, p_b, S, STATE, False, BU, BN, BT,
                )  # fmt: skip
            store_tile(p_dw, b_sum, columns, 1, first, rows, column, columns, BU, BN)
            if momenta > 0:
                b_s = load_tile(p_s, columns, 1, first, rows, column, columns, STATE, BU, BN)
                b_ds = load_tile(p_ds, columns, 1, first, rows, column, columns, STATE, BU, BN)
                sum_g += tl.sum(b_dw * b_s, axis=0)
                sum_p += tl.sum(b_ds * b_s, axis=0)
                b_sum = add_product(
                    flow * b_dw + hold * b_ds, p_da, 1, stride_da, p_x, stride_x, 1, first, rows, column, columns,
                    0, count, p_g, S, STATE, True, BU, BN, BT,
                )  # fmt: skip
                store_tile(p_ds, b_sum, columns, 1, first, rows, column, columns, BU, BN)
    return sum_b, sum_g, sum_p


@triton.jit
def find_places(
    p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
    size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
    stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
):  # fmt: skip
    """Where a chunk's arrays begin, from a zero in memory: each part of the walk computes it anew.

    Sixty pointers do not fit the registers, where the compiler would keep what it knows not to change.
    """
    zero = tl.load(p_zero)
    i_b = ((i_bh + zero) // H).to(tl.int64)
    i_h = ((i_bh + zero) % H).to(tl.int64)
    i_head = (i_bh + zero).to(tl.int64)
    i_chunk = i_head * 0 + j + zero
    token = i_chunk * C
    n_f = C * F + zero
    n_d = C * D + zero
    w = p_work + i_head * work
    o_t = i_head * T + token
    o_pairs = o_t * P
    return (
        w, w + 8 * n_f, w + 8 * n_f + 2 * n_d, n_f, n_d, C * P + zero,
        i_head * stride_n + (i_chunk - begin) * slot, i_head * size,
        o_t, o_pairs, o_pairs + (count - 1) * P, (i_head * chunks + i_chunk) * P, ((i_b * T + token) * H + i_h) * D,
        p_q + i_b * stride_q_b + i_h * stride_q_h + token * stride_q_t,
        p_k + i_b * stride_k_b + i_h * stride_k_h + token * stride_k_t,
        p_v + i_b * stride_v_b + i_h * stride_v_h + token * stride_v_t,
        p_do + i_b * stride_do_b + i_h * stride_do_h + token * stride_do_t,
    )  # fmt: skip


@triton.jit(do_not_specialize=["T", "H", "C", "chunks", "begin", "end", "momenta", "given", "l2"])
def memory_backward_walk(
    p_q, p_k, p_v, p_do, p_w1, p_w2, p_s1, p_s2, p_c, p_last, p_b, p_g, p_p, p_work, p_zero,
    p_dq, p_dk, p_dv, p_dw1, p_dw2, p_ds1, p_ds2, p_dc, p_dend, p_dlast, p_db, p_dg, p_dsums,
    T, H, D, F, C, P, chunks, begin, end, momenta, given, l2, slot, work,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_do_b, stride_do_t, stride_do_h, stride_n,
    LAYERS: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Chunks end - 1, ..., begin of one head.

    q, k, v, do [B, T, H, D]     any strides but the last
    w1, w2, s1, s2               [heads, slots, ...] from stride_n: states before the chunks, `slot` numbers apart
    c, last, b, g, p             of memory_coefficients
    dq, dk, dv [B, T, H, D]      written
    dw1, dw2, ds1, ds2 [B, H]    of the state after the chunks, changed to those of the state before them
    dc [B, H, T, P], dend, dlast [B, H, chunks, P]   of c, and, by the end of a chunk, of the last rows of c and m
    db, dg [B, H, T], dsums [3, B, H, chunks]        of b and g, and, by the end of a chunk, of the last b, g and p
    work [heads, work]           a, h, u, delta1, A, H, dA, da [C, F], delta2, ddelta2 [C, D], six of pairs [C, P]
    zero [1]                     0, in int32
    `momenta` 0: no S enters. `given`: a gradient of S.
    """
    STATE: tl.constexpr = p_work.dtype.element_ty
    S: tl.constexpr = p_q.dtype.element_ty
    i_bh = tl.program_id(0).to(tl.int32)
    row = H * D
    if LAYERS == 2:
        size = F * D
        inner = F
        DELTA: tl.constexpr = I_D1
    else:
        size = D * D
        inner = D
        DELTA: tl.constexpr = I_DA + 1

    for back in tl.range(0, end - begin, disable_licm=True):
        j = end - 1 - back
        count = tl.minimum(T - j * C, C)
        (
            w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
        ) = find_places(
            p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
            size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
            stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
        )  # fmt: skip
        # Without momentum S has a gradient only after the last chunk of all.
        held = momenta
        if j + 1 == chunks:
            held = given

        # ---- again, what the forward had
        if LAYERS == 2:
            for t in tl.range(0, count, BT, disable_licm=True):
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_a = add_product(
                        tl.zeros((BT, BN), STATE), c_k, stride_k_t, 1, p_w1 + o_state, 1, D, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    store_tile(w + I_A * n_f, b_a, F, 1, t, count, n, F, BT, BN)
                    store_tile(w + I_H * n_f, silu(b_a), F, 1, t, count, n, F, BT, BN)
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
        for t in tl.range(0, count, BT, disable_licm=True):
            for n in tl.range(0, D, BN, disable_licm=True):
                b_d = tl.zeros((BT, BN), STATE)
                if LAYERS == 2:
                    b_d = add_product(
                        b_d, w + I_H * n_f, F, 1, p_w2 + o_state, 1, F, t, count, n, D, 0, F * l2, c_k, S, STATE,
                        False, BT, BN, BK,
                    )  # fmt: skip
                    b_d += load_tile(c_k, stride_k_t, 1, t, count * l2, n, D, STATE, BT, BN)
                else:
                    b_d = add_product(
                        b_d, c_k, stride_k_t, 1, p_w1 + o_state, 1, D, t, count, n, D, 0, D * l2, c_k, S, STATE,
                        False, BT, BN, BK,
                    )  # fmt: skip
                b_d -= load_tile(c_v, stride_v_t, 1, t, count, n, D, STATE, BT, BN)
                store_tile(w_d, b_d, D, 1, t, count, n, D, BT, BN)
        store_pairs(
            w_p + I_RAW1 * n_p, w_p + I_PAIRS1 * n_p, p_c + o_pairs, P, c_q, stride_q_t, c_k, stride_k_t, D, count,
            True, S, STATE, BT, BK,
        )  # fmt: skip
        tl.debug_barrier()
        (
            w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
        ) = find_places(
            p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
            size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
            stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
        )  # fmt: skip
        if LAYERS == 2:
            for t in tl.range(0, count, BT, disable_licm=True):
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_d = add_product(
                        tl.zeros((BT, BN), STATE), w_d, D, 1, p_w2 + o_state, F, 1, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    store_tile(w + I_U * n_f, b_d, F, 1, t, count, n, F, BT, BN)
                    b_d *= silu_slope(load_tile(w + I_A * n_f, F, 1, t, count, n, F, STATE, BT, BN))
                    store_tile(w + I_D1 * n_f, b_d, F, 1, t, count, n, F, BT, BN)
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
            for t in tl.range(0, count, BT, disable_licm=True):
                b_b = load_row(p_b + o_t, t, count, STATE, BT)[:, None]
                b_g = load_row(p_g + o_t, t, count, STATE, BT)[:, None]
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_x = add_product(
                        tl.zeros((BT, BN), STATE), c_q, stride_q_t, 1, p_s1 + o_state, 1, D, t, count, n, F,
                        0, D * momenta, c_k, S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), c_q, stride_q_t, 1, p_w1 + o_state, 1, D, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_x = b_b * b_y + b_g * b_x
                    b_y = add_earlier(
                        tl.zeros((BT, BN), STATE), w_p + I_PAIRS1 * n_p, P, w + I_D1 * n_f, F, t, count, n, F, S,
                        STATE, BT, BN,
                    )  # fmt: skip
                    store_tile(w + I_TILE * n_f, b_x - b_y, F, 1, t, count, n, F, BT, BN)
                    store_tile(w + I_TOP * n_f, silu(b_x - b_y), F, 1, t, count, n, F, BT, BN)
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
            # ---- the second tile
            store_pairs(
                w_p + I_RAW2 * n_p, w_p + I_PAIRS2 * n_p, p_c + o_pairs, P, w + I_TOP * n_f, F, w + I_H * n_f, F, F,
                count, True, S, STATE, BT, BK,
            )  # fmt: skip
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
            store_pair_gradients(
                p_dc + o_pairs, w_p + I_R2 * n_p, w_p + I_RAW2 * n_p, p_c + o_pairs, P, c_do, stride_do_t, w_d, D, D,
                count, False, S, STATE, BT, BK,
            )  # fmt: skip
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
            for t in tl.range(0, count, BT, disable_licm=True):
                b_b = load_row(p_b + o_t, t, count, STATE, BT)
                b_g = load_row(p_g + o_t, t, count, STATE, BT)
                b_db = tl.zeros((BT,), STATE)
                b_dg = tl.zeros((BT,), STATE)
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_top = load_tile(w + I_TOP * n_f, F, 1, t, count, n, F, STATE, BT, BN)
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), c_do, stride_do_t, 1, p_w2 + o_state, F, 1, t, count, n, F, 0, D,
                        c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_db += tl.sum(b_y * b_top, axis=1)
                    b_x = b_b[:, None] * b_y
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), c_do, stride_do_t, 1, p_s2 + o_state, F, 1, t, count, n, F,
                        0, D * momenta, c_k, S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_dg += tl.sum(b_y * b_top, axis=1)
                    b_x += b_g[:, None] * b_y
                    b_x += add_earlier(
                        tl.zeros((BT, BN), STATE), w_p + I_R2 * n_p, P, w + I_H * n_f, F, t, count, n, F, S, STATE,
                        BT, BN,
                    )  # fmt: skip
                    b_x *= silu_slope(load_tile(w + I_TILE * n_f, F, 1, t, count, n, F, STATE, BT, BN))
                    store_tile(w + I_DTILE * n_f, b_x, F, 1, t, count, n, F, BT, BN)
                store_row(p_db + o_t, b_db, t, count, BT)
                store_row(p_dg + o_t, b_dg, t, count, BT)
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
            store_pair_gradients(
                p_dc + o_pairs, w_p + I_R1 * n_p, w_p + I_RAW1 * n_p, p_c + o_pairs, P, w + I_DTILE * n_f, F,
                w + I_D1 * n_f, F, F, count, True, S, STATE, BT, BK,
            )  # fmt: skip
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip
        else:
            store_pair_gradients(
                p_dc + o_pairs, w_p + I_R1 * n_p, w_p + I_RAW1 * n_p, p_c + o_pairs, P, c_do, stride_do_t, w_d, D, D,
                count, False, S, STATE, BT, BK,
            )  # fmt: skip
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip

        # ---- the first tile, or that of a linear memory: dA of `inner` columns
        if LAYERS == 2:
            c_tile = w + I_DTILE * n_f
            stride_tile = F
        else:
            c_tile = c_do
            stride_tile = stride_do_t
        for t in tl.range(0, count, BT, disable_licm=True):
            b_b = load_row(p_b + o_t, t, count, STATE, BT)
            b_g = load_row(p_g + o_t, t, count, STATE, BT)
            b_db = tl.zeros((BT,), STATE)
            b_dg = tl.zeros((BT,), STATE)
            if LAYERS == 2:
                b_db += load_row(p_db + o_t, t, count, STATE, BT)
                b_dg += load_row(p_dg + o_t, t, count, STATE, BT)
                # What all threads have read, one writes.
                tl.debug_barrier()
            for n in tl.range(0, D, BN, disable_licm=True):
                b_q = load_tile(c_q, stride_q_t, 1, t, count, n, D, STATE, BT, BN)
                b_y = add_product(
                    tl.zeros((BT, BN), STATE), c_tile, stride_tile, 1, p_w1 + o_state, D, 1, t, count, n, D, 0, inner,
                    c_k,
                    S, STATE, False, BT, BN, BK,
                )  # fmt: skip
                b_db += tl.sum(b_y * b_q, axis=1)
                b_x = b_b[:, None] * b_y
                b_y = add_product(
                    tl.zeros((BT, BN), STATE), c_tile, stride_tile, 1, p_s1 + o_state, D, 1, t, count, n, D,
                    0, inner * momenta, c_k, S, STATE, False, BT, BN, BK,
                )  # fmt: skip
                b_dg += tl.sum(b_y * b_q, axis=1)
                b_x += b_g[:, None] * b_y
                b_x += add_earlier(
                    tl.zeros((BT, BN), STATE), w_p + I_R1 * n_p, P, c_k, stride_k_t, t, count, n, D, S, STATE, BT, BN
                )
                if LAYERS == 2:
                    b_x += load_tile(c_do, stride_do_t, 1, t, count, n, D, STATE, BT, BN)
                store_tile(p_dq + o_out, b_x, row, 1, t, count, n, D, BT, BN)
            store_row(p_db + o_t, b_db, t, count, BT)
            store_row(p_dg + o_t, b_dg, t, count, BT)

        # ---- gradients of delta1
        if LAYERS == 2:
            for t in tl.range(0, count, BT, disable_licm=True):
                b_end = load_row(p_c + o_end, t, count, STATE, BT)[:, None]
                b_last = load_row(p_last + o_chunk, t, count, STATE, BT)[:, None]
                b_dend = tl.zeros((BT,), STATE)
                b_dlast = tl.zeros((BT,), STATE)
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_x = add_product(
                        tl.zeros((BT, BN), STATE), w_p + I_PAIRS1 * n_p, 1, P, w + I_DTILE * n_f, F, 1, t, count, n,
                        F, t, count, c_k,
                        S, STATE, False, BT, BN, BT,
                    )  # fmt: skip
                    b_d = load_tile(w + I_D1 * n_f, F, 1, t, count, n, F, STATE, BT, BN)
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), c_k, stride_k_t, 1, p_dw1 + o_w, 1, D, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_dend -= tl.sum(b_d * b_y, axis=1)
                    b_x += b_end * b_y
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), c_k, stride_k_t, 1, p_ds1 + o_w, 1, D, t, count, n, F, 0, D * held,
                        c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_dlast -= tl.sum(b_d * b_y, axis=1)
                    b_x += b_last * b_y
                    b_a = load_tile(w + I_A * n_f, F, 1, t, count, n, F, STATE, BT, BN)
                    b_u = load_tile(w + I_U * n_f, F, 1, t, count, n, F, STATE, BT, BN)
                    # du in place of A, of which nothing more is asked
                    store_tile(w + I_TILE * n_f, -b_x * silu_slope(b_a), F, 1, t, count, n, F, BT, BN)
                    store_tile(w + I_DA * n_f, -b_x * b_u * silu_curve(b_a), F, 1, t, count, n, F, BT, BN)
                store_row(p_dend + o_chunk, b_dend, t, count, BT)
                store_row(p_dlast + o_chunk, b_dlast, t, count, BT)
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip

        # ---- gradients of delta2, or of a linear memory's delta
        for t in tl.range(0, count, BT, disable_licm=True):
            b_end = load_row(p_c + o_end, t, count, STATE, BT)[:, None]
            b_last = load_row(p_last + o_chunk, t, count, STATE, BT)[:, None]
            b_dend = tl.zeros((BT,), STATE)
            b_dlast = tl.zeros((BT,), STATE)
            if LAYERS == 2:
                b_dend += load_row(p_dend + o_chunk, t, count, STATE, BT)
                b_dlast += load_row(p_dlast + o_chunk, t, count, STATE, BT)
                tl.debug_barrier()
            for n in tl.range(0, D, BN, disable_licm=True):
                b_d = load_tile(w_d, D, 1, t, count, n, D, STATE, BT, BN)
                if LAYERS == 2:
                    b_x = add_product(
                        tl.zeros((BT, BN), STATE), w_p + I_PAIRS2 * n_p, 1, P, c_do, stride_do_t, 1, t, count, n, D,
                        t, count, c_k,
                        S, STATE, False, BT, BN, BT,
                    )  # fmt: skip
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), w + I_H * n_f, F, 1, p_dw2 + o_w, 1, F, t, count, n, D, 0, F, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_z = add_product(
                        tl.zeros((BT, BN), STATE), w + I_H * n_f, F, 1, p_ds2 + o_w, 1, F, t, count, n, D, 0,
                        F * held, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                else:
                    b_x = add_product(
                        tl.zeros((BT, BN), STATE), w_p + I_PAIRS1 * n_p, 1, P, c_do, stride_do_t, 1, t, count, n, D,
                        t, count, c_k,
                        S, STATE, False, BT, BN, BT,
                    )  # fmt: skip
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), c_k, stride_k_t, 1, p_dw1 + o_w, 1, D, t, count, n, D, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_z = add_product(
                        tl.zeros((BT, BN), STATE), c_k, stride_k_t, 1, p_ds1 + o_w, 1, D, t, count, n, D, 0, D * held,
                        c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                b_dend -= tl.sum(b_d * b_y, axis=1)
                b_dlast -= tl.sum(b_d * b_z, axis=1)
                b_x = -(b_x + b_end * b_y + b_last * b_z)
                if LAYERS == 2:
                    b_x = add_product(
                        b_x, w + I_TILE * n_f, F, 1, p_w2 + o_state, 1, F, t, count, n, D, 0, F, c_k, S, STATE, False,
                        BT, BN, BK,
                    )  # fmt: skip
                store_tile(w_d + n_d, b_x, D, 1, t, count, n, D, BT, BN)
                store_tile(p_dv + o_out, -b_x, row, 1, t, count, n, D, BT, BN)
            store_row(p_dend + o_chunk, b_dend, t, count, BT)
            store_row(p_dlast + o_chunk, b_dlast, t, count, BT)
        tl.debug_barrier()
        (
            w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
        ) = find_places(
            p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
            size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
            stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
        )  # fmt: skip

        # ---- gradients of h, then of a
        if LAYERS == 2:
            for t in tl.range(0, count, BT, disable_licm=True):
                b_end = load_row(p_c + o_end, t, count, STATE, BT)[:, None]
                b_last = load_row(p_last + o_chunk, t, count, STATE, BT)[:, None]
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_x = add_product(
                        tl.zeros((BT, BN), STATE), w_d, D, 1, p_dw2 + o_w, F, 1, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_y = add_product(
                        tl.zeros((BT, BN), STATE), w_d, D, 1, p_ds2 + o_w, F, 1, t, count, n, F, 0, D * held, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_x = -(b_end * b_x + b_last * b_y)
                    b_x = add_product(
                        b_x, w_p + I_R2 * n_p, 1, P, w + I_TOP * n_f, F, 1, t, count, n, F, t, count, c_k, S, STATE,
                        False, BT, BN, BT,
                    )  # fmt: skip
                    b_x = add_product(
                        b_x, w_d + n_d, D, 1, p_w2 + o_state, F, 1, t, count, n, F, 0, D * l2, c_k, S, STATE, False,
                        BT, BN, BK,
                    )  # fmt: skip
                    b_x *= silu_slope(load_tile(w + I_A * n_f, F, 1, t, count, n, F, STATE, BT, BN))
                    b_x += load_tile(w + I_DA * n_f, F, 1, t, count, n, F, STATE, BT, BN)
                    # in place of u
                    store_tile(w + I_U * n_f, b_x, F, 1, t, count, n, F, BT, BN)
            tl.debug_barrier()
            (
                w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
            ) = find_places(
                p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
                size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
                stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
            )  # fmt: skip

        # ---- gradients of keys
        for t in tl.range(0, count, BT, disable_licm=True):
            b_end = load_row(p_c + o_end, t, count, STATE, BT)[:, None]
            b_last = load_row(p_last + o_chunk, t, count, STATE, BT)[:, None]
            for n in tl.range(0, D, BN, disable_licm=True):
                b_x = add_product(
                    tl.zeros((BT, BN), STATE), w + DELTA * n_f, inner, 1, p_dw1 + o_w, D, 1, t, count, n, D, 0, inner,
                    c_k,
                    S, STATE, False, BT, BN, BK,
                )  # fmt: skip
                b_y = add_product(
                    tl.zeros((BT, BN), STATE), w + DELTA * n_f, inner, 1, p_ds1 + o_w, D, 1, t, count, n, D, 0,
                    inner * held, c_k,
                    S, STATE, False, BT, BN, BK,
                )  # fmt: skip
                b_x = -(b_end * b_x + b_last * b_y)
                b_x = add_product(
                    b_x, w_p + I_R1 * n_p, 1, P, c_q, stride_q_t, 1, t, count, n, D, t, count, c_k, S, STATE, False,
                    BT, BN, BT,
                )  # fmt: skip
                if LAYERS == 2:
                    b_x = add_product(
                        b_x, w + I_U * n_f, F, 1, p_w1 + o_state, D, 1, t, count, n, D, 0, F, c_k, S, STATE, False,
                        BT, BN, BK,
                    )  # fmt: skip
                    b_x += load_tile(w_d + n_d, D, 1, t, count * l2, n, D, STATE, BT, BN)
                else:
                    b_x = add_product(
                        b_x, w_d + n_d, D, 1, p_w1 + o_state, D, 1, t, count, n, D, 0, D * l2, c_k, S, STATE, False,
                        BT, BN, BK,
                    )  # fmt: skip
                store_tile(p_dk + o_out, b_x, row, 1, t, count, n, D, BT, BN)
        tl.debug_barrier()
        (
            w, w_d, w_p, n_f, n_d, n_p, o_state, o_w, o_t, o_pairs, o_end, o_chunk, o_out, c_q, c_k, c_v, c_do,
        ) = find_places(
            p_work, p_zero, p_q, p_k, p_v, p_do, i_bh, j, work, C, D, F, P, T, H, chunks, begin, stride_n, slot,
            size, count, stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h,
            stride_v_b, stride_v_t, stride_v_h, stride_do_b, stride_do_t, stride_do_h,
        )  # fmt: skip

        # ---- gradients of the state before the chunk
        keep = tl.load(p_b + o_t + count - 1)
        flow = tl.load(p_g + o_t + count - 1)
        hold = tl.load(p_p + o_t + count - 1)
        b_sb = tl.zeros((BN,), STATE)
        b_sg = tl.zeros((BN,), STATE)
        b_sp = tl.zeros((BN,), STATE)
        if LAYERS == 2:
            b_sb, b_sg, b_sp = update_gradients(
                p_dw1 + o_w, p_ds1 + o_w, p_w1 + o_state, p_s1 + o_state, w + I_DTILE * n_f, F, c_q, stride_q_t,
                p_b + o_t, p_g + o_t, keep, flow, hold, momenta,
                w + I_U * n_f, F, c_k, stride_k_t, count, w + I_U * n_f, F, c_k, stride_k_t, 0,
                b_sb, b_sg, b_sp, F, D, count, S, STATE, False, BT, BU, BN,
            )  # fmt: skip
            b_sb, b_sg, b_sp = update_gradients(
                p_dw2 + o_w, p_ds2 + o_w, p_w2 + o_state, p_s2 + o_state, c_do, stride_do_t, w + I_TOP * n_f, F,
                p_b + o_t, p_g + o_t, keep, flow, hold, momenta,
                w_d, D, w + I_TILE * n_f, F, count, w_d + n_d, D, w + I_H * n_f, F, count * l2,
                b_sb, b_sg, b_sp, D, F, count, S, STATE, True, BT, BU, BN,
            )  # fmt: skip
        else:
            b_sb, b_sg, b_sp = update_gradients(
                p_dw1 + o_w, p_ds1 + o_w, p_w1 + o_state, p_s1 + o_state, c_do, stride_do_t, c_q, stride_q_t,
                p_b + o_t, p_g + o_t, keep, flow, hold, momenta,
                w_d + n_d, D, c_k, stride_k_t, count * l2, w_d + n_d, D, c_k, stride_k_t, 0,
                b_sb, b_sg, b_sp, D, D, count, S, STATE, False, BT, BU, BN,
            )  # fmt: skip
        numbers = tl.num_programs(0).to(tl.int64) * chunks
        c_dsums = p_dsums + i_bh.to(tl.int64) * chunks + j
        tl.store(c_dsums, tl.sum(b_sb, axis=0))
        tl.store(c_dsums + numbers, tl.sum(b_sg, axis=0))
        tl.store(c_dsums + 2 * numbers, tl.sum(b_sp, axis=0))
        tl.debug_barrier()


@triton.jit(do_not_specialize=["T", "H", "C", "chunks", "window", "decays", "momenta"])
def memory_gates(
    p_decay, p_momentum, p_c, p_m, p_b, p_g, p_p, p_dc, p_dend, p_dlast, p_db, p_dg, p_dsums,
    p_dlr, p_ddecay, p_dmomentum,
    T, H, C, P, chunks, window, decays, momenta,
    stride_decay_b, stride_decay_t, stride_decay_h, stride_momentum_b, stride_momentum_t, stride_momentum_h,
    BC: tl.constexpr,
):  # fmt: skip
    """The recurrences of memory_coefficients, backwards, for BC columns of one chunk.

    dlr [B, T, H]; ddecay, dmomentum [blocks of columns, B, T, H], to be summed, the first with what b, g and p receive
    """
    STATE: tl.constexpr = p_c.dtype.element_ty
    pid = tl.program_id(0)
    n_c = (C + BC - 1) // BC
    i_c = pid % n_c
    i_j = (pid // n_c % chunks).to(tl.int64)
    i_bh = (pid // n_c // chunks).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    heads = tl.num_programs(0).to(tl.int64) // n_c
    token = i_j * C
    count = tl.minimum(T - token, C).to(tl.int32)
    o_i = i_c * BC + tl.arange(0, BC)
    i_1 = tl.arange(0, 1)
    m_first = i_1 + i_c < 1

    last = token + count - 1
    p_decay += i_b * stride_decay_b + i_h * stride_decay_h + last * stride_decay_t
    p_momentum += i_b * stride_momentum_b + i_h * stride_momentum_h + last * stride_momentum_t
    o_row = (i_bh * T + last) * P
    o_t = i_bh * T + last
    o_out = (i_b * T + token) * H + i_h
    pairs = heads // chunks * T
    p_ddecay += i_c * pairs + o_out + (count - 1) * H
    p_dmomentum += i_c * pairs + o_out + (count - 1) * H
    o_chunk = (i_bh * chunks + i_j) * P + o_i

    b_cb = tl.load(p_dend + o_chunk, mask=o_i < count, other=0.0)
    b_mb = tl.load(p_dlast + o_chunk, mask=o_i < count, other=0.0)
    b_bb = tl.load(p_dsums + i_bh * chunks + i_j + i_1)
    b_gb = tl.load(p_dsums + heads + i_bh * chunks + i_j + i_1)
    b_pb = tl.load(p_dsums + 2 * heads + i_bh * chunks + i_j + i_1)
    b_dlr = tl.zeros((BC,), STATE)
    for s in range(0, count):
        t = count - 1 - s
        b_keep = 1.0 - tl.load(p_decay + i_1, mask=i_1 < decays, other=0.0).to(STATE)
        b_hold = tl.load(p_momentum + i_1, mask=i_1 < momenta, other=0.0).to(STATE)
        b_cb += tl.load(p_dc + o_row + o_i, mask=o_i <= t, other=0.0)
        b_mb += b_cb
        b_gb += tl.load(p_dg + o_t + i_1)
        b_pb += b_gb
        b_bb += tl.load(p_db + o_t + i_1)
        # Before the first token c, m and g are 0, b and p are 1.
        m_before = i_1 < t
        b_c = tl.load(p_c + o_row - P + o_i, mask=o_i < t, other=0.0)
        b_m = tl.load(p_m + o_row - P + o_i, mask=o_i < t, other=0.0)
        b_b = tl.load(p_b + o_t - 1 + i_1, mask=m_before, other=1.0)
        b_g = tl.load(p_g + o_t - 1 + i_1, mask=m_before, other=0.0)
        b_p = tl.load(p_p + o_t - 1 + i_1, mask=m_before, other=1.0)
        b_ddecay = tl.where(m_first, -(b_gb * b_g + b_bb * b_b), 0.0) - tl.sum(b_cb * b_c, axis=0)
        b_dmomentum = tl.where(m_first, b_pb * b_p, 0.0) + tl.sum(b_mb * b_m, axis=0)
        tl.store(p_ddecay + i_1, b_ddecay)
        tl.store(p_dmomentum + i_1, b_dmomentum)
        b_dlr += tl.where((o_i <= t) & (o_i > t - window), b_mb, 0.0)
        b_cb = b_keep * b_cb
        b_mb = b_hold * b_mb
        b_gb = b_keep * b_gb
        b_pb = b_hold * b_pb
        b_bb = b_keep * b_bb
        o_row -= P
        o_t -= 1
        p_decay -= stride_decay_t
        p_momentum -= stride_momentum_t
        p_ddecay -= H
        p_dmomentum -= H
    tl.store(p_dlr + o_out + o_i.to(tl.int64) * H, b_dlr, mask=o_i < count)
