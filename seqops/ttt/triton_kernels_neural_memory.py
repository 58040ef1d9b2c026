"""Triton kernels of neural_memory: what depends on gates alone, and the walk along the chunks.

    memory_coefficients   the weights of every gradient in every step of its chunk, all chunks at once
    memory_walk           outputs and weights, chunk after chunk: one program for a head, or for rows of a linear memory

One chunk, with X = q, delta2 = K + h W2^T - V and so on, all [C, D] or [C, F] in the workspace (`*` elementwise):

    a = K W1^T  |  h = silu(a), delta2 = K + h W2^T - V  |  delta1 = (delta2 W2) * silu'(a)
    H = silu(b Q W1^T + g Q S1^T - (c * Q K^T) delta1)   |  o = Q + b H W2^T + g H S2^T - (c * H h^T) delta2
    W <- b W + g S - (c_C * delta)^T x                   |  S <- p S - (m_C * delta)^T x

Every bar is a barrier: what a program wrote its other threads read, from the second cache. A linear memory has
delta = K W^T - V and o = b Q W^T + g Q S^T - (c * Q K^T) delta; rows of W do not depend on each other, so that several
programs (`splits`) share a head.

B batch, T time, H heads, D channels, F hidden channels (0: linear), C tokens of a chunk, P numbers of a row of pairs, N
of a state. D, F and P are multiples of 16. S storage dtype, STATE that of sums, weights and gates.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks_neural_memory import (
    add_earlier,
    add_product,
    copy_numbers,
    load_row,
    load_tile,
    silu,
    silu_slope,
    store_pairs,
    store_tile,
)

COPIED = tl.constexpr(1024)
# Numbers that say nothing of alignment.
UNSPECIALIZED = [
    *("T", "H", "C", "chunks", "begin", "end", "span", "segments", "splits", "outputs", "momenta", "l2", "every"),
]


@triton.jit(do_not_specialize=["T", "H", "C", "chunks", "window", "decays", "momenta", "every"])
def memory_coefficients(
    p_lr, p_decay, p_momentum, p_c, p_m, p_last, p_b, p_g, p_p,
    T, H, C, P, chunks, window, decays, momenta, every,
    stride_lr_b, stride_lr_t, stride_lr_h, stride_decay_b, stride_decay_t, stride_decay_h,
    stride_momentum_b, stride_momentum_t, stride_momentum_h,
    BC: tl.constexpr,
):  # fmt: skip
    """m_t = momentum_t m_{t-1} + lr Band_t and c_t = (1 - decay_t) c_{t-1} + m_t, for BC gradients of one chunk.

    lr, decay, momentum [B, T, H] in, any strides
    c, m [B, H, T, P]       rows t of a chunk, columns i <= t; m where `every` is 1
    last [B, H, chunks, P]  the last row of m
    b, g, p [B, H, T]       products of (1 - decay), of momentum, and g_t = (1 - decay_t) g_{t-1} + p_t
    """
    STATE: tl.constexpr = p_c.dtype.element_ty
    pid = tl.program_id(0)
    n_c = (C + BC - 1) // BC
    i_c = pid % n_c
    i_j = (pid // n_c % chunks).to(tl.int64)
    i_bh = (pid // n_c // chunks).to(tl.int64)
    i_b = i_bh // H
    i_h = i_bh % H
    first = i_j * C
    count = tl.minimum(T - first, C).to(tl.int32)
    o_i = i_c * BC + tl.arange(0, BC)
    i_1 = tl.arange(0, 1)

    p_lr += i_b * stride_lr_b + i_h * stride_lr_h + first * stride_lr_t
    p_decay += i_b * stride_decay_b + i_h * stride_decay_h + first * stride_decay_t
    p_momentum += i_b * stride_momentum_b + i_h * stride_momentum_h + first * stride_momentum_t
    p_c += (i_bh * T + first) * P
    p_m += (i_bh * T + first) * P
    p_last += (i_bh * chunks + i_j) * P
    p_b += i_bh * T + first
    p_g += i_bh * T + first
    p_p += i_bh * T + first

    b_lr = tl.load(p_lr + o_i.to(tl.int64) * stride_lr_t, mask=o_i < count, other=0.0).to(STATE)
    b_m = tl.zeros((BC,), STATE)
    b_c = tl.zeros((BC,), STATE)
    b_p = tl.zeros((1,), STATE) + 1.0
    b_g = tl.zeros((1,), STATE)
    b_b = tl.zeros((1,), STATE) + 1.0
    m_first = i_1 + i_c < 1
    for t in range(0, count):
        # What later blocks of columns have before their first one is 0.
        b_keep = 1.0 - tl.load(p_decay + i_1, mask=i_1 < decays, other=0.0).to(STATE)
        b_hold = tl.load(p_momentum + i_1, mask=i_1 < momenta, other=0.0).to(STATE)
        m_band = (o_i <= t) & (o_i > t - window)
        b_m = tl.where(o_i <= t, b_hold * b_m, 0.0) + tl.where(m_band, b_lr, 0.0)
        b_c = tl.where(o_i <= t, b_keep * b_c, 0.0) + b_m
        b_p = b_hold * b_p
        b_g = b_keep * b_g + b_p
        b_b = b_keep * b_b
        tl.store(p_c + o_i, b_c, mask=o_i <= t)
        tl.store(p_m + o_i, b_m, mask=(o_i <= t) & (o_i * 0 < every))
        tl.store(p_b + i_1, b_b, mask=m_first)
        tl.store(p_g + i_1, b_g, mask=m_first)
        tl.store(p_p + i_1, b_p, mask=m_first)
        p_c += P
        p_m += P
        p_b += 1
        p_g += 1
        p_p += 1
        p_decay += stride_decay_t
        p_momentum += stride_momentum_t
    tl.store(p_last + o_i, b_m, mask=o_i < count)


@triton.jit
def update_weights(
    p_w, p_s, p_new, p_new_s, p_delta, stride_delta, p_x, stride_x, p_c, p_last, keep, flow, hold, momenta, sums,
    rows, columns, count, i_split, splits,
    S: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """W <- keep W + flow S - (c * delta)^T x and S <- hold S - (last * delta)^T x, where `sums` is 1.

    W and S [rows, columns]. `momenta` is 0 where no S enters: then it is not read.
    """
    for tile in tl.range(i_split, (rows + BU - 1) // BU, splits, disable_licm=True):
        first = tile * BU
        for column in tl.range(0, columns, BN, disable_licm=True):
            b_w = load_tile(p_w, columns, 1, first, rows, column, columns, STATE, BU, BN)
            b_s = load_tile(p_s, columns, 1, first, rows * momenta, column, columns, STATE, BU, BN)
            b_u = add_product(
                tl.zeros((BU, BN), STATE), p_delta, 1, stride_delta, p_x, stride_x, 1, first, rows, column, columns,
                0, count, p_c, S, STATE, True, BU, BN, BT,
            )  # fmt: skip
            store_tile(p_new, keep * b_w + flow * b_s - b_u, columns, 1, first, rows, column, columns, BU, BN)
            if sums > 0:
                b_u = add_product(
                    tl.zeros((BU, BN), STATE), p_delta, 1, stride_delta, p_x, stride_x, 1, first, rows, column,
                    columns, 0, count, p_last, S, STATE, True, BU, BN, BT,
                )  # fmt: skip
                store_tile(p_new_s, hold * b_s - b_u, columns, 1, first, rows, column, columns, BU, BN)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def memory_walk(
    p_q, p_k, p_v, p_o, p_w1, p_w2, p_s1, p_s2, p_states, p_c, p_last, p_b, p_g, p_p, p_work,
    T, H, D, F, C, P, chunks, begin, end, span, segments, splits, outputs, momenta, l2, every, slot, work,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_n,
    LAYERS: tl.constexpr, BT: tl.constexpr, BU: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Chunks [begin, end) of every head, in pieces of `span` chunks, each by its own programs.

    q, k, v [B, T, H, D]         any strides but the last
    o [B, T, H, D]               where `outputs` is 1
    w1, w2, s1, s2               [pieces, slots, ...] from stride_n: a piece's state, in place (slot = 0) or followed by
                                 those of its next chunks, `slot` numbers apart
    states [B, H, segments, N]   of every `every`-th chunk, 0: none
    c, last, b, g, p             of memory_coefficients
    work [programs, work]        a [C, F], h [C, F], delta1 [C, F], delta2 [C, D], pairs [C, P]
    """
    STATE: tl.constexpr = p_work.dtype.element_ty
    S: tl.constexpr = p_q.dtype.element_ty
    pid = tl.program_id(0)
    i_split = pid % splits
    i_piece = (pid // splits).to(tl.int64)
    i_segment = pid // splits % segments
    i_bh = i_piece // segments
    i_b = i_bh // H
    i_h = i_bh % H
    p_q += i_b * stride_q_b + i_h * stride_q_h
    p_k += i_b * stride_k_b + i_h * stride_k_h
    p_v += i_b * stride_v_b + i_h * stride_v_h
    p_o += (i_b * T * H + i_h) * D
    p_w1 += i_piece * stride_n
    p_w2 += i_piece * stride_n
    p_s1 += i_piece * stride_n
    p_s2 += i_piece * stride_n

    p_a = p_work + pid.to(tl.int64) * work
    p_h = p_a + C * F
    p_d1 = p_h + C * F
    p_d2 = p_d1 + C * F
    p_pairs = p_d2 + C * D
    if LAYERS == 2:
        size = F * D
        p_d = p_d1
        inner = F
    else:
        size = D * D
        p_d = p_d2
        inner = D
    size_s = size * momenta
    row = H * D

    first_chunk = begin + i_segment * span
    last_chunk = tl.minimum(first_chunk + span, end)
    for j in tl.range(first_chunk, last_chunk, disable_licm=True):
        i_j = i_bh * 0 + j
        token = i_j * C
        count = tl.minimum(T - token, C).to(tl.int32)
        c_q = p_q + token * stride_q_t
        c_k = p_k + token * stride_k_t
        c_v = p_v + token * stride_v_t
        c_o = p_o + token * row
        c_c = p_c + (i_bh * T + token) * P
        c_b = p_b + i_bh * T + token
        c_g = p_g + i_bh * T + token
        c_p = p_p + i_bh * T + token
        c_last = p_last + (i_bh * chunks + i_j) * P

        if every > 0:  # noqa: SIM102  j is no number where `every` is one that Triton knows
            if j % every == 0:
                segments_all = (chunks + every - 1) // every
                c_to = p_states + (i_bh * segments_all + j // every) * (LAYERS * size + LAYERS * size_s)
                if LAYERS == 2:
                    copy_numbers(c_to, p_w1, 0, size, COPIED)
                    copy_numbers(c_to + size, p_w2, 0, size, COPIED)
                    copy_numbers(c_to + 2 * size, p_s1, 0, size_s, COPIED)
                    copy_numbers(c_to + 3 * size, p_s2, 0, size_s, COPIED)
                else:
                    for tile in tl.range(i_split, (D + BU - 1) // BU, splits, disable_licm=True):
                        own = tl.minimum((tile + 1) * BU, D) * D
                        copy_numbers(c_to, p_w1, tile * BU * D, own, COPIED)
                        copy_numbers(c_to + size, p_s1, tile * BU * D, own * momenta, COPIED)

        if LAYERS == 2:
            for t in tl.range(0, count, BT, disable_licm=True):
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_a = add_product(
                        tl.zeros((BT, BN), STATE), c_k, stride_k_t, 1, p_w1, 1, D, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    store_tile(p_a, b_a, F, 1, t, count, n, F, BT, BN)
                    store_tile(p_h, silu(b_a), F, 1, t, count, n, F, BT, BN)
            tl.debug_barrier()

        # delta2, or delta of a linear memory: of a loss without residual -V alone
        for t in tl.range(0, count, BT, disable_licm=True):
            for tile in tl.range(i_split, (D + BU - 1) // BU, splits, disable_licm=True):
                n = tile * BU
                b_d = tl.zeros((BT, BU), STATE)
                if LAYERS == 2:
                    b_d = add_product(
                        b_d, p_h, F, 1, p_w2, 1, F, t, count, n, D, 0, F * l2, c_k, S, STATE, False, BT, BU, BK
                    )
                    b_d += load_tile(c_k, stride_k_t, 1, t, count * l2, n, D, STATE, BT, BU)
                else:
                    b_d = add_product(
                        b_d, c_k, stride_k_t, 1, p_w1, 1, D, t, count, n, D, 0, D * l2, c_k, S, STATE, False, BT, BU, BK
                    )
                b_d -= load_tile(c_v, stride_v_t, 1, t, count, n, D, STATE, BT, BU)
                store_tile(p_d2, b_d, D, 1, t, count, n, D, BT, BU)
        if outputs > 0:
            store_pairs(p_pairs, p_pairs, c_c, P, c_q, stride_q_t, c_k, stride_k_t, D, count, False, S, STATE, BT, BK)
        tl.debug_barrier()

        if LAYERS == 2:
            for t in tl.range(0, count, BT, disable_licm=True):
                for n in tl.range(0, F, BN, disable_licm=True):
                    b_d = add_product(
                        tl.zeros((BT, BN), STATE), p_d2, D, 1, p_w2, F, 1, t, count, n, F, 0, D, c_k,
                        S, STATE, False, BT, BN, BK,
                    )  # fmt: skip
                    b_d *= silu_slope(load_tile(p_a, F, 1, t, count, n, F, STATE, BT, BN))
                    store_tile(p_d1, b_d, F, 1, t, count, n, F, BT, BN)
            tl.debug_barrier()
            if outputs > 0:
                for t in tl.range(0, count, BT, disable_licm=True):
                    b_b = load_row(c_b, t, count, STATE, BT)[:, None]
                    b_g = load_row(c_g, t, count, STATE, BT)[:, None]
                    for n in tl.range(0, F, BN, disable_licm=True):
                        b_x = add_product(
                            tl.zeros((BT, BN), STATE), c_q, stride_q_t, 1, p_s1, 1, D, t, count, n, F,
                            0, D * momenta, c_k, S, STATE, False, BT, BN, BK,
                        )  # fmt: skip
                        b_y = add_product(
                            tl.zeros((BT, BN), STATE), c_q, stride_q_t, 1, p_w1, 1, D, t, count, n, F, 0, D, c_k,
                            S, STATE, False, BT, BN, BK,
                        )  # fmt: skip
                        b_x = b_b * b_y + b_g * b_x
                        b_y = add_earlier(
                            tl.zeros((BT, BN), STATE), p_pairs, P, p_d1, F, t, count, n, F, S, STATE, BT, BN
                        )
                        store_tile(p_a, silu(b_x - b_y), F, 1, t, count, n, F, BT, BN)
                tl.debug_barrier()
                store_pairs(p_pairs, p_pairs, c_c, P, p_a, F, p_h, F, F, count, False, S, STATE, BT, BK)
                tl.debug_barrier()

        if outputs > 0:
            for t in tl.range(0, count, BT, disable_licm=True):
                b_b = load_row(c_b, t, count, STATE, BT)[:, None]
                b_g = load_row(c_g, t, count, STATE, BT)[:, None]
                for tile in tl.range(i_split, (D + BU - 1) // BU, splits, disable_licm=True):
                    n = tile * BU
                    if LAYERS == 2:
                        b_x = add_product(
                            tl.zeros((BT, BU), STATE), p_a, F, 1, p_s2, 1, F, t, count, n, D,
                            0, F * momenta, c_k, S, STATE, False, BT, BU, BK,
                        )  # fmt: skip
                        b_y = add_product(
                            tl.zeros((BT, BU), STATE), p_a, F, 1, p_w2, 1, F, t, count, n, D, 0, F, c_k,
                            S, STATE, False, BT, BU, BK,
                        )  # fmt: skip
                    else:
                        b_x = add_product(
                            tl.zeros((BT, BU), STATE), c_q, stride_q_t, 1, p_s1, 1, D, t, count, n, D,
                            0, D * momenta, c_k, S, STATE, False, BT, BU, BK,
                        )  # fmt: skip
                        b_y = add_product(
                            tl.zeros((BT, BU), STATE), c_q, stride_q_t, 1, p_w1, 1, D, t, count, n, D, 0, D, c_k,
                            S, STATE, False, BT, BU, BK,
                        )  # fmt: skip
                    b_x = b_b * b_y + b_g * b_x
                    b_y = add_earlier(tl.zeros((BT, BU), STATE), p_pairs, P, p_d2, D, t, count, n, D, S, STATE, BT, BU)
                    b_x -= b_y
                    if LAYERS == 2:
                        b_x += load_tile(c_q, stride_q_t, 1, t, count, n, D, STATE, BT, BU)
                    store_tile(c_o, b_x, row, 1, t, count, n, D, BT, BU)

        # In place, or into the next slot; the last one needs none.
        sums = momenta
        if j + 1 == chunks:
            sums = 1
        if (slot == 0) | (j + 1 < last_chunk):
            keep = tl.load(c_b + count - 1)
            flow = tl.load(c_g + count - 1)
            hold = tl.load(c_p + count - 1)
            c_end = c_c + (count - 1) * P
            tl.debug_barrier()
            update_weights(
                p_w1, p_s1, p_w1 + slot, p_s1 + slot, p_d, inner, c_k, stride_k_t, c_end, c_last, keep, flow, hold,
                momenta, sums, inner, D, count, i_split, splits, S, STATE, BT, BU, BN,
            )  # fmt: skip
            if LAYERS == 2:
                update_weights(
                    p_w2, p_s2, p_w2 + slot, p_s2 + slot, p_d2, D, p_h, F, c_end, c_last, keep, flow, hold,
                    momenta, sums, D, F, count, i_split, splits, S, STATE, BT, BU, BN,
                )  # fmt: skip
        tl.debug_barrier()
        p_w1 += slot
        p_w2 += slot
        p_s1 += slot
        p_s2 += slot
