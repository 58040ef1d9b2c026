"""Triton kernels of linear attention over a window of w steps: what a step has from the block before its own.

Sequences are cut into blocks of w steps. A window covers the beginning of its own block, which is an ordinary walk of
the block, and the end of the block before: states of that block's last 1, 2, .. steps, met in the order in which they
grow. So nothing is ever subtracted from a state. Decays are weights from each step to the edge between the two blocks,
of at most 1 on either side: sums, no differences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    INNER,
    NONE,
    OUTER,
    REPAIR,
    STEP,
    SUM,
    blemish,
    fade,
    gates,
    gates_of,
    multiply,
    multiply_state,
    narrow,
    operand,
    place,
    sum_on,
    weigh,
)


@triton.jit
def linear_attention_reach(
    p_g, p_reach, p_rows,
    packed, spans, span, T, heads, W, chunks, stride_g_b, stride_g_t, stride_g_h,
    REVERSE: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """reach [rows, chunks, H, W]: decay of a row's steps before each chunk; REVERSE: of those after it."""
    STATE: tl.constexpr = p_reach.dtype.element_ty
    pid = tl.program_id(0)
    blocks = (W + BC - 1) // BC
    o_c = (pid % blocks * BC + tl.arange(0, BC)).to(tl.int64)
    i_h = (pid // blocks % heads).to(tl.int64)
    i_row = (pid // blocks // heads).to(tl.int64)
    _, i_b, _, _, begin, count = place(p_rows, i_row, spans, span, 0, T, packed)
    m_c = o_c < W
    p_g += i_b * stride_g_b + i_h * stride_g_h
    b_sum = tl.zeros((1, BC), STATE)
    for i in range(0, chunks):
        chunk = i
        if REVERSE:
            chunk = chunks - 1 - i
        o_reach = ((i_row * chunks + chunk) * heads + i_h) * W + o_c[None, :]
        tl.store(p_reach + o_reach, b_sum, mask=m_c[None, :])
        b_r = chunk * BT + tl.arange(0, BT)
        o_g = (begin + b_r)[:, None] * stride_g_t + o_c[None, :]
        b_g = gates(p_g, o_g, (b_r < count)[:, None] & m_c[None, :], STATE)
        b_sum += tl.sum(b_g, axis=0, keep_dims=True)


@triton.jit
def linear_attention_across(
    p_q, p_k, p_v, p_g, p_x, p_o, p_e, p_reach, p_wrong, p_rows,
    rows, packed, spans, span, window, B, T, heads, K, V, chunks, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_g_b, stride_g_t, stride_g_h, stride_x_b, stride_x_t, stride_x_h,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, PARTNER: tl.constexpr,
    EXACT: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """What each block's steps have from the block before it; REVERSE: from the one after it. o is in STATE.

    Tensors, e and the two scales as in `linear_attention_walk`. Blocks are of `span` steps: the window, or one chunk
    where that is more.
    """
    STATE: tl.constexpr = p_o.dtype.element_ty
    S: tl.constexpr = p_v.dtype.element_ty
    pid = tl.program_id(0)
    n_v = (V + BV - 1) // BV
    n_k = (K + BK - 1) // BK
    i_v = pid % n_v
    i_k = pid // n_v % n_k
    i_h = (pid // n_v // n_k % heads).to(tl.int64)
    i_row = (pid // n_v // n_k // heads).to(tl.int64)
    _, i_b, first, last, begin, count = place(p_rows, i_row, spans, span, 0, T, packed)
    if REVERSE:
        far_begin = begin + span
        far_count = tl.maximum(tl.minimum(last - far_begin, span), 0)
    else:
        far_begin = begin - span
        far_count = tl.where(far_begin >= first, span, 0)
    skipped = span - window
    o_k = (i_k * BK + tl.arange(0, BK)).to(tl.int64)
    o_v = (i_v * BV + tl.arange(0, BV)).to(tl.int64)
    m_k = o_k < K
    m_v = o_v < V
    i_r = tl.arange(0, BT)
    p_q += i_b * stride_q_b + i_h * stride_q_h
    p_k += i_b * stride_k_b + i_h * stride_k_h
    p_v += i_b * stride_v_b + i_h * stride_v_h
    p_g += i_b * stride_g_b + i_h * stride_g_h
    p_x += i_b * stride_x_b + i_h * stride_x_h
    pairs = (i_row * 0 + B) * T * heads
    p_o += i_k * pairs * V + (i_b * T * heads + i_h) * V
    if PARTNER == SUM:
        p_e += (i_k * n_v + i_v) * pairs + i_b * T * heads + i_h
    else:
        p_e += i_k * pairs * V + (i_b * T * heads + i_h) * V
    # Truth values of scalars do not mix with those of blocks: numbers are made blocks first.
    nil = tl.zeros((1,), tl.int64)
    full_scale = tl.zeros((1, 1), STATE) + scale + scale_rest

    b_s = tl.zeros((BK, BV), STATE)
    wrong = tl.zeros((BT,), STATE)
    # Decay from the far block's chunk to the edge.
    if DECAY == INNER:
        b_far_reach = tl.zeros((1, BK), STATE)
    elif DECAY == OUTER:
        b_far_reach = tl.zeros((1, BV), STATE)
    else:
        b_far_reach = tl.zeros((1, 1), STATE)
    o_c = o_v
    m_c = m_v
    W = V
    if DECAY == INNER:
        o_c = o_k
        m_c = m_k
        W = K
    walked = chunks
    if EXACT == REPAIR:
        walked = chunks * tl.load(p_wrong + pid)
    for i in range(0, walked):
        chunk = i
        if not REVERSE:
            chunk = chunks - 1 - i
        b_place = chunk * BT + i_r
        b_t = begin + b_place
        m_t = b_place < count
        b_u = far_begin + b_place
        m_u = b_place < far_count
        b_q = operand(p_q, b_t[:, None] * stride_q_t + o_k[None, :], m_t[:, None] & m_k[None, :], STATE)
        b_k = operand(p_k, b_u[:, None] * stride_k_t + o_k[None, :], m_u[:, None] & m_k[None, :], STATE)
        b_v = operand(p_v, b_u[:, None] * stride_v_t + o_v[None, :], m_u[:, None] & m_v[None, :], STATE)
        wrong += blemish(b_k.to(STATE)) + blemish(b_v.to(STATE))
        if DECAY != NONE:
            m_next = (b_place + 1 < count) & (i_r + 1 < BT)
            m_far_next = (b_place + 1 < far_count) & (i_r + 1 < BT)
            if REVERSE:
                b_lead = gates_of(p_g, b_t + 1, m_next, o_c, m_c, stride_g_t, STATE, DECAY)
                b_own = sum_on(b_lead, True)
                b_lag = gates_of(p_g, b_u, m_u, o_c, m_c, stride_g_t, STATE, DECAY)
                b_far = sum_on(b_lag, False)
            else:
                b_lead = gates_of(p_g, b_t, m_t, o_c, m_c, stride_g_t, STATE, DECAY)
                b_own = sum_on(b_lead, False)
                b_lag = gates_of(p_g, b_u + 1, m_far_next, o_c, m_c, stride_g_t, STATE, DECAY)
                b_far = sum_on(b_lag, True)
            if DECAY == STEP:
                o_reach = (i_row * chunks + chunk) * heads + i_h + tl.zeros((1, 1), tl.int64)
                b_reach = tl.load(p_reach + o_reach)
            else:
                o_reach = ((i_row * chunks + chunk) * heads + i_h) * W + o_c[None, :]
                b_reach = tl.load(p_reach + o_reach, mask=m_c[None, :], other=0.0)
            b_own = fade(b_own + b_reach)
            b_other = fade(b_far + b_far_reach)
            b_all = gates_of(p_g, b_u, m_u, o_c, m_c, stride_g_t, STATE, DECAY)
            b_far_reach += tl.sum(b_all, axis=0, keep_dims=True)
            # Weights of a NaN are NaN.
            wrong += tl.sum(b_own * 0, axis=1) + tl.sum(b_other * 0, axis=1)
        b_o = tl.zeros((BT, BV), STATE)
        if EXACT == 0:
            ahead = i_r[None, :] - i_r[:, None]
            m_pair = (-ahead if REVERSE else ahead) > skipped
            if DECAY == INNER:
                b_lead = b_q.to(STATE) * b_own
                b_lag = b_k.to(STATE) * b_other
                b_o = multiply_state(b_lead, b_s, S, STATE)
                b_p = tl.where(m_pair, multiply(b_lead, tl.trans(b_lag), S, STATE), 0.0)
                b_o += multiply(b_p, b_v, S, STATE)
                b_s += multiply(tl.trans(b_lag), b_v, S, STATE)
            else:
                b_p = tl.where(m_pair, multiply(b_q, tl.trans(b_k), S, STATE), 0.0)
                b_lag = b_v if DECAY == NONE else b_v.to(STATE) * b_other
                b_o = multiply_state(b_q, b_s, S, STATE) + multiply(b_p, b_lag, S, STATE)
                if DECAY != NONE:
                    b_o = b_o * b_own
                b_s += multiply(tl.trans(b_k), b_lag, S, STATE)
        else:
            for j in range(0, BT):
                i_step = BT - 1 - j
                i_far = i_step + skipped
                if REVERSE:
                    i_step = j
                    i_far = i_step - skipped
                m_own = nil + chunk * BT + i_step < count
                m_far = (nil + i_far >= 0) & (nil + chunk * BT + i_far < far_count)
                t = begin + chunk * BT + i_step
                u = far_begin + chunk * BT + i_far
                b_row_q = tl.load(p_q + t * stride_q_t + o_k, mask=m_own & m_k, other=0.0).to(STATE)[:, None]
                b_row_k = tl.load(p_k + u * stride_k_t + o_k, mask=m_far & m_k, other=0.0).to(STATE)[:, None]
                b_row_v = tl.load(p_v + u * stride_v_t + o_v, mask=m_far & m_v, other=0.0).to(STATE)[None, :]
                # Padded channels would keep 0 NaN.
                b_gain = tl.where(m_k[:, None], b_row_k * b_row_v, 0.0)
                if DECAY == NONE:
                    b_term = b_row_q * b_s
                else:
                    b_row_own = tl.sum(tl.where(i_r[:, None] == i_step, b_own, 0.0), axis=0, keep_dims=True)
                    b_row_far = tl.sum(tl.where(i_r[:, None] == i_far, b_other, 0.0), axis=0, keep_dims=True)
                    if DECAY == INNER:
                        b_term = b_row_q * weigh(tl.trans(b_row_own), b_s)
                        b_gain = weigh(tl.trans(b_row_far), b_gain)
                    else:
                        b_term = b_row_q * weigh(b_row_own, b_s)
                        b_gain = weigh(b_row_far, b_gain)
                b_row_o = tl.sum(b_term, axis=0, keep_dims=True)
                b_o = tl.where(i_r[:, None] == i_step, b_row_o, b_o)
                b_s += b_gain
        b_o = b_o * full_scale
        m_o = m_t[:, None] & m_v[None, :]
        o_o = b_t[:, None] * heads * V + o_v[None, :]
        if PARTNER != 0:
            b_x = tl.load(p_x + b_t[:, None] * stride_x_t + o_v[None, :], mask=m_o, other=0.0).to(STATE)
            if PARTNER == SUM:
                tl.store(p_e + b_t * heads, tl.sum(tl.where(m_o, b_o * b_x, 0.0), axis=1), mask=m_t)
            else:
                tl.store(p_e + o_o, b_o * b_x, mask=m_o)
        tl.store(p_o + o_o, narrow(b_o, p_o.dtype.element_ty), mask=m_o)
    if EXACT == 0:
        wrong += tl.sum(b_s * 0)
        tl.store(p_wrong + pid, (tl.sum(wrong, axis=0) != 0).to(tl.int32))
