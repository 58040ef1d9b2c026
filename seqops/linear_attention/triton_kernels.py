"""Triton kernels of linear attention: walks along time, and what joins their pieces.

    linear_attention_walk      o_i = sum_{j <= i} (q_i . k_j) e^(G_i - G_j) v_j, chunk by chunk, the state in registers
    linear_attention_join      states between the pieces of a sequence, from what each piece adds
    linear_attention_reach     of a window: decay from a block's edge to each of its chunks
    linear_attention_across    of a window: what the block before still gives
    linear_attention_meet      states times gradients of states, where the sums of `linear_attention_decay` begin
    linear_attention_decay     gradients of decays, from those of queries and keys

One walk is the forward and all three gradients: with S^T as the state, dq attends with do over v and reads k; walked
the other way (REVERSE), dk attends with v over do and reads q, and dv attends with k over q and reads do. So `q`, `k`
and `v` are roles here: K inner channels are summed in a score, V outer ones are read, and the state is inner by outer.

B batch, T time, H heads, K inner channels, V outer ones. A row is a piece of a sequence: `span` steps that one program
walks in chunks of BT for BK inner and BV outer channels. S storage dtype, STATE that of sums and states. Decays have no
scale: forward outputs are scaled, and on the way back what the state takes is, since its adjoint is not.

NaN and infinity: 0 NaN is NaN, so a product over a chunk would carry them to earlier steps and past resets. A program
that meets any says so, and a second launch walks its row again, step by step; where nothing is wrong it ends at once.
Float64 is walked step by step from the start, and so is a single step.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    ANCHOR,
    APPLY,
    INF,
    INFLOW,
    INNER,
    NONE,
    OUTER,
    REDUCE,
    REPAIR,
    STEP,
    SUM,
    anchored,
    blemish,
    fade,
    gates,
    gates_of,
    multiply,
    multiply_state,
    narrow,
    operand,
    place,
    step_pairs,
    sum_on,
    weigh,
)


@triton.jit
def shifted_pairs(
    b_o, b_q, b_p, p_k, p_v, p_g, b_t, m_t, left, o_k, m_k, o_v, m_v, stride_k_t, stride_v_t, stride_g_t,
    STATE: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Pairs within blocks of ANCHOR, by their distance, added to scores b_p (INNER) or to outputs b_o (OUTER)."""
    i_r = tl.arange(0, BT)
    i_a = i_r % ANCHOR
    b_log = tl.zeros(b_q.shape if DECAY == INNER else b_o.shape, STATE)
    # Not unrolled, since its end is no constant: sixteen rounds of loads at once would not fit the registers.
    for distance in range(0, tl.minimum(left, ANCHOR)):
        if REVERSE:
            m_near = (b_t + distance < left) & (i_a + distance < ANCHOR)
            b_far = b_t + distance
            b_gate = b_far
            other = i_r + distance
        else:
            m_near = m_t & (i_a >= distance)
            b_far = b_t - distance
            b_gate = b_far + 1
            other = i_r - distance
        m_gate = m_near & (i_a * 0 + distance > 0)
        if DECAY == INNER:
            b_log += gates_of(p_g, b_gate, m_gate, o_k, m_k, stride_g_t, STATE, DECAY)
            m_far = m_near[:, None] & m_k[None, :]
            b_k = tl.load(p_k + b_far[:, None] * stride_k_t + o_k[None, :], mask=m_far, other=0.0).to(STATE)
            b_score = tl.sum(b_q * b_k * fade(b_log), axis=1)
            b_p += tl.where((i_r[None, :] == other[:, None]) & m_near[:, None], b_score[:, None], 0.0)
        else:
            b_log += gates_of(p_g, b_gate, m_gate, o_v, m_v, stride_g_t, STATE, DECAY)
            m_far = m_near[:, None] & m_v[None, :]
            b_v = tl.load(p_v + b_far[:, None] * stride_v_t + o_v[None, :], mask=m_far, other=0.0).to(STATE)
            b_score = tl.sum(tl.where(i_r[None, :] == other[:, None], b_p, 0.0), axis=1)
            b_o += b_score[:, None] * b_v * fade(b_log)
    if DECAY == INNER:
        return b_p
    else:
        return b_o


@triton.jit
def linear_attention_walk(
    p_q, p_k, p_v, p_g, p_x, p_o, p_e, p_carry, p_last, p_mass, p_wrong, p_rows,
    rows, packed, spans, span, start, B, T, heads, K, V, carry_rows, last_rows, by_row, window, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    stride_g_b, stride_g_t, stride_g_h, stride_x_b, stride_x_t, stride_x_h,
    stride_carry_n, stride_carry_h, stride_carry_k, stride_carry_v,
    stride_last_n, stride_last_h, stride_last_k, stride_last_v,
    PASS: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, ADD: tl.constexpr,
    PARTNER: tl.constexpr, EXACT: tl.constexpr, NARROW: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row of one head, for BK inner and BV outer channels, by products over chunks or step by step (EXACT).

    q, k [B, T, H, K], v [B, T, H, V], g [B, T, H, 1, K or V] as DECAY says, x [B, T, H, V] in, any strides but the last
    carry, last [rows, H, K, V]      the state before the row and after it
    o [K / BK, B, T, H, V]           added to (ADD) or written; in STATE where inner blocks are summed later
    e [blocks, B, T, H] or as o      o x in STATE
    mass [rows, H, 1 or K]           logarithm of the decay over the row (REDUCE)
    NARROW                           the window is less than a chunk
    wrong [programs]                 1 where something is not finite, and the row is to be walked again (REPAIR)
    """
    STATE: tl.constexpr = p_carry.dtype.element_ty
    S: tl.constexpr = p_v.dtype.element_ty
    pid = tl.program_id(0)
    n_v = (V + BV - 1) // BV
    n_k = (K + BK - 1) // BK
    i_v = pid % n_v
    i_k = pid // n_v % n_k
    i_h = (pid // n_v // n_k % heads).to(tl.int64)
    i_row = (pid // n_v // n_k // heads).to(tl.int64)
    i_n, i_b, _, _, begin, count = place(p_rows, i_row, spans, span, start, T, packed)
    end = begin + count

    # Within a chunk offsets fit 32 bits: the launchers see to that.
    o_k = i_k * BK + tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    i_r = tl.arange(0, BT)
    p_q += i_b * stride_q_b + i_h * stride_q_h
    p_k += i_b * stride_k_b + i_h * stride_k_h
    p_v += i_b * stride_v_b + i_h * stride_v_h
    p_g += i_b * stride_g_b + i_h * stride_g_h
    p_x += i_b * stride_x_b + i_h * stride_x_h
    # Outputs are dense.
    pairs = (i_row * 0 + B) * T * heads
    p_o += i_k * pairs * V + (i_b * T * heads + i_h) * V
    if PARTNER == SUM:
        p_e += (i_k * n_v + i_v) * pairs + i_b * T * heads + i_h
    else:
        p_e += i_k * pairs * V + (i_b * T * heads + i_h) * V

    # Truth values of scalars do not mix with those of blocks: numbers are made blocks first.
    nil = tl.zeros((1,), tl.int64)
    full_scale = tl.zeros((1, 1), STATE) + scale + scale_rest
    i_carry = tl.where(by_row > 0, i_row, i_n)
    o_carry = i_carry * stride_carry_n + i_h * stride_carry_h
    o_carry += o_k[:, None].to(tl.int64) * stride_carry_k + o_v[None, :].to(tl.int64) * stride_carry_v
    m_state = m_k[:, None] & m_v[None, :]
    b_s = tl.load(p_carry + o_carry, mask=m_state & (nil[:, None] + i_carry < carry_rows), other=0.0)
    # 0 while all is finite, else NaN.
    wrong = tl.zeros((BT,), STATE) + tl.sum(b_s * 0)
    if DECAY == INNER:
        b_mass = tl.zeros((1, BK), STATE)
    elif DECAY == OUTER:
        b_mass = tl.zeros((1, BV), STATE)
    else:
        b_mass = tl.zeros((1, 1), STATE)

    chunks = ((count + BT - 1) // BT).to(tl.int32)
    walked = chunks
    stored = 1
    if EXACT == REPAIR:
        stored = tl.load(p_wrong + pid)
        walked = chunks * stored
    for i in tl.range(0, walked, disable_licm=True):
        chunk = i
        if REVERSE:
            chunk = chunks - 1 - i
        first = begin + chunk * BT
        left = tl.minimum(end - first, BT).to(tl.int32)
        m_t = i_r < left
        m_next = i_r + 1 < left
        c_q = p_q + first * stride_q_t
        c_k = p_k + first * stride_k_t
        c_v = p_v + first * stride_v_t
        c_g = p_g + first * stride_g_t
        if DECAY == INNER:
            b_g = gates_of(c_g, i_r, m_t, o_k, m_k, stride_g_t, STATE, DECAY)
            b_next = gates_of(c_g, i_r + 1, m_next, o_k, m_k, stride_g_t, STATE, DECAY)
        elif DECAY != NONE:
            b_g = gates_of(c_g, i_r, m_t, o_v, m_v, stride_g_t, STATE, DECAY)
            b_next = gates_of(c_g, i_r + 1, m_next, o_v, m_v, stride_g_t, STATE, DECAY)
        if PASS != REDUCE:
            b_q = operand(c_q, i_r[:, None] * stride_q_t + o_k[None, :], m_t[:, None] & m_k[None, :], STATE)
        if PASS != INFLOW:
            b_k = operand(c_k, i_r[:, None] * stride_k_t + o_k[None, :], m_t[:, None] & m_k[None, :], STATE)
            b_v = operand(c_v, i_r[:, None] * stride_v_t + o_v[None, :], m_t[:, None] & m_v[None, :], STATE)
            b_wrong = blemish(b_k.to(STATE)) + blemish(b_v.to(STATE))
            if DECAY != NONE:
                b_wrong += tl.sum(tl.where(b_g == -INF, 0.0, b_g * 0), axis=1)
            wrong += b_wrong
        if DECAY != NONE:
            b_head = sum_on(b_g, False)
            b_tail = sum_on(b_next, True)
            b_total = tl.sum(b_g, axis=0, keep_dims=True)
            b_mass += b_total
            if REVERSE:
                b_own = fade(b_tail)
                b_other = fade(b_head)
            else:
                b_own = fade(b_head)
                b_other = fade(b_tail)
            b_keep = fade(b_total)
            if DECAY == INNER:
                b_keep = tl.trans(b_keep)

        b_o = tl.zeros((BT, BV), STATE)
        if EXACT == 0:
            if PASS != REDUCE:
                # What the state gives.
                if DECAY == INNER:
                    b_o = multiply_state(b_q.to(STATE) * b_own, b_s, S, STATE)
                else:
                    b_o = multiply_state(b_q, b_s, S, STATE)
                    if DECAY != NONE:
                        b_o = b_o * b_own
                if not REVERSE:
                    b_o = b_o * full_scale
            if PASS == APPLY:
                # What the chunk's own steps give.
                # Of places that the loop moves: else the compiler keeps the masks of all pairs in registers throughout.
                b_place = i * BT + i_r
                if DECAY == INNER:
                    b_p = tl.zeros((BT, BT), STATE)
                    for a in tl.static_range(1, BT // ANCHOR):
                        b_lead, m_lead, b_lag, m_lag = anchored(b_g, b_next, a * ANCHOR, REVERSE, BT)
                        b_lead = tl.where(m_lead, b_q.to(STATE) * fade(b_lead), 0.0)
                        b_lag = tl.where(m_lag, b_k.to(STATE) * fade(b_lag), 0.0)
                        b_p += multiply(b_lead, tl.trans(b_lag), S, STATE)
                    b_p = shifted_pairs(
                        b_o, b_q.to(STATE), b_p, c_k, c_v, c_g, i_r, m_t, left, o_k, m_k, o_v, m_v,
                        stride_k_t, stride_v_t, stride_g_t, STATE, DECAY, REVERSE, BT,
                    )  # fmt: skip
                    b_p = b_p * full_scale
                    if NARROW:
                        b_p = tl.where(tl.abs(b_place[:, None] - b_place[None, :]) < window, b_p, 0.0)
                    b_o += multiply(b_p, b_v, S, STATE)
                else:
                    b_p = multiply(b_q, tl.trans(b_k), S, STATE) * full_scale
                    if DECAY == STEP:
                        b_p = b_p * step_pairs(b_g, b_place, REVERSE)
                    elif REVERSE:
                        b_p = tl.where(b_place[:, None] <= b_place[None, :], b_p, 0.0)
                    else:
                        b_p = tl.where(b_place[:, None] >= b_place[None, :], b_p, 0.0)
                    if NARROW:
                        b_p = tl.where(tl.abs(b_place[:, None] - b_place[None, :]) < window, b_p, 0.0)
                    if DECAY == OUTER:
                        for a in tl.static_range(1, BT // ANCHOR):
                            b_lead, m_lead, b_lag, m_lag = anchored(b_g, b_next, a * ANCHOR, REVERSE, BT)
                            b_part = tl.where(m_lead & tl.trans(m_lag), b_p, 0.0)
                            b_lag = tl.where(m_lag, b_v.to(STATE) * fade(b_lag), 0.0)
                            b_o += fade(b_lead) * multiply(b_part, b_lag, S, STATE)
                        b_o = shifted_pairs(
                            b_o, b_o, b_p, c_k, c_v, c_g, i_r, m_t, left, o_k, m_k, o_v, m_v,
                            stride_k_t, stride_v_t, stride_g_t, STATE, DECAY, REVERSE, BT,
                        )  # fmt: skip
                    else:
                        b_o += multiply(b_p, b_v, S, STATE)
            # What the state takes.
            if DECAY != NONE:
                b_s = b_s * b_keep
            if PASS != INFLOW:
                if DECAY == INNER:
                    b_new = multiply(tl.trans(b_k.to(STATE) * b_other), b_v, S, STATE)
                elif DECAY == NONE:
                    b_new = multiply(tl.trans(b_k), b_v, S, STATE)
                else:
                    b_new = multiply(tl.trans(b_k), b_v.to(STATE) * b_other, S, STATE)
                if REVERSE:
                    b_new = b_new * full_scale
                b_s += b_new
        else:
            for j in range(0, left):
                i_own = j
                if REVERSE:
                    i_own = left - 1 - j
                b_row_o = tl.zeros((1, BV), STATE)
                # Within a window narrower than the chunk every step sums anew.
                start_of_sum = j
                if NARROW:
                    b_s = tl.zeros((BK, BV), STATE)
                    start_of_sum = tl.maximum(j - window + 1, 0)
                for n in range(start_of_sum, j + 1):
                    t = n
                    if REVERSE:
                        t = left - 1 - n
                    m_step = nil + t < left
                    b_row_k = tl.load(c_k + t * stride_k_t + o_k, mask=m_step & m_k, other=0.0).to(STATE)
                    b_row_v = tl.load(c_v + t * stride_v_t + o_v, mask=m_step & m_v, other=0.0).to(STATE)
                    # Padded channels would keep 0 NaN.
                    b_gain = tl.where(m_k[:, None], b_row_k[:, None] * b_row_v[None, :], 0.0)
                    if DECAY == INNER:
                        b_factor = fade(gates(c_g, t * stride_g_t + o_k, m_step & m_k, STATE))[:, None]
                    elif DECAY == OUTER:
                        b_factor = fade(gates(c_g, t * stride_g_t + o_v, m_step & m_v, STATE))[None, :]
                    elif DECAY == STEP:
                        b_factor = fade(gates(c_g, (nil + t * stride_g_t)[:, None], m_step[:, None], STATE))
                    if REVERSE:
                        if PASS != INFLOW:
                            b_s += b_gain * full_scale
                    elif DECAY != NONE:
                        b_s = weigh(b_factor, b_s)
                    if not REVERSE and PASS != INFLOW:
                        b_s += b_gain
                    if PASS != REDUCE:
                        m_own = (nil + i_own < left) & m_k
                        b_row_q = tl.load(c_q + i_own * stride_q_t + o_k, mask=m_own, other=0.0).to(STATE)
                        # The last one holds.
                        b_row_o = tl.sum(b_row_q[:, None] * b_s, axis=0, keep_dims=True)
                        if not REVERSE:
                            b_row_o = b_row_o * full_scale
                    if REVERSE and DECAY != NONE:
                        b_s = weigh(b_factor, b_s)
                if PASS != REDUCE:
                    b_o = tl.where(i_r[:, None] == i_own, b_row_o, b_o)

        if PASS != REDUCE:
            m_o = m_t[:, None] & m_v[None, :]
            o_o = i_r[:, None] * (heads * V) + o_v[None, :]
            c_o = p_o + first * heads * V
            if PARTNER != 0:
                o_x = i_r[:, None] * stride_x_t + o_v[None, :]
                b_x = tl.load(p_x + first * stride_x_t + o_x, mask=m_o, other=0.0).to(STATE)
                if PARTNER == SUM:
                    tl.store(p_e + first * heads + i_r * heads, tl.sum(tl.where(m_o, b_o * b_x, 0.0), axis=1), mask=m_t)
                else:
                    tl.store(p_e + first * heads * V + o_o, b_o * b_x, mask=m_o)
            if ADD:
                b_o += tl.load(c_o + o_o, mask=m_o, other=0.0).to(STATE)
            tl.store(c_o + o_o, narrow(b_o, p_o.dtype.element_ty), mask=m_o)

    if EXACT == 0:
        wrong += tl.sum(b_s * 0)
        tl.store(p_wrong + pid, (tl.sum(wrong, axis=0) != 0).to(tl.int32))
    # New masks: those from before the loop would have taken registers throughout.
    stored_rows = tl.where(i_row < last_rows * stored, 1, 0)
    m_last = (o_k < K * stored_rows)[:, None] & (o_v < V * stored_rows)[None, :]
    o_last = i_row * stride_last_n + i_h * stride_last_h
    o_last += o_k[:, None].to(tl.int64) * stride_last_k + o_v[None, :].to(tl.int64) * stride_last_v
    tl.store(p_last + o_last, b_s, mask=m_last)
    if PASS == REDUCE:
        # By one program of those that share it.
        i_mass = i_row * heads + i_h
        if DECAY == INNER:
            m_mass = m_k & (nil + i_v < stored)
            tl.store(p_mass + i_mass * K + o_k[None, :], b_mass, mask=m_mass[None, :])
        elif DECAY == STEP:
            tl.store(p_mass + (nil + i_mass)[:, None], b_mass, mask=(nil + i_v + i_k < stored)[:, None])


@triton.jit
def linear_attention_join(
    p_state, p_mass, p_initial, p_last, p_first,
    packed, spans, sequences, heads, K, V, initial_rows,
    stride_mass_n, stride_mass_h, stride_mass_k, stride_mass_v,
    stride_initial_n, stride_initial_h, stride_initial_k, stride_initial_v,
    REVERSE: tl.constexpr, DECAYS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Replace what each row adds, in state [rows, H, K, V], by the state before the row; last [sequences, H, K, V]."""
    pid = tl.program_id(0)
    blocks = (K * V + BC - 1) // BC
    b_c = pid % blocks * BC + tl.arange(0, BC)
    i_h = (pid // blocks % heads).to(tl.int64)
    i_n = (pid // blocks // heads).to(tl.int64)
    m_c = b_c < K * V
    b_k = (b_c // V).to(tl.int64)
    b_v = (b_c % V).to(tl.int64)
    size = i_h * 0 + K * V
    o_c = b_c.to(tl.int64)
    o_state = i_h * size + o_c
    o_initial = i_n * stride_initial_n + i_h * stride_initial_h + b_k * stride_initial_k + b_v * stride_initial_v
    b_s = tl.load(p_initial + o_initial, mask=m_c & (o_c * 0 + i_n < initial_rows), other=0.0)
    row = i_n * spans
    count = (row * 0 + spans).to(tl.int32)
    if packed > 0:
        row = tl.load(p_first + i_n)
        count = (tl.load(p_first + i_n + 1) - row).to(tl.int32)
    for i in range(0, count):
        i_row = row + i
        if REVERSE:
            i_row = row + count - 1 - i
        b_new = tl.load(p_state + i_row * heads * size + o_state, mask=m_c, other=0.0)
        tl.store(p_state + i_row * heads * size + o_state, b_s, mask=m_c)
        if DECAYS:
            o_mass = i_row * stride_mass_n + i_h * stride_mass_h + b_k * stride_mass_k + b_v * stride_mass_v
            b_s = weigh(fade(tl.load(p_mass + o_mass, mask=m_c, other=0.0)), b_s)
        b_s += b_new
    tl.store(p_last + i_n * heads * size + o_state, b_s, mask=m_c)


@triton.jit
def linear_attention_meet(
    p_s, p_ds, p_m, heads, K, V,
    stride_s_n, stride_s_h, stride_s_k, stride_s_v, stride_ds_n, stride_ds_h, stride_ds_k, stride_ds_v,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """m [rows, H, K] = sum over V of s ds, [rows, H, K, V] each, in their order."""
    pid = tl.program_id(0)
    n_k = (K + BK - 1) // BK
    o_k = (pid % n_k * BK + tl.arange(0, BK)).to(tl.int64)
    i_h = (pid // n_k % heads).to(tl.int64)
    i_row = (pid // n_k // heads).to(tl.int64)
    m_k = o_k < K
    b_sum = tl.zeros((BK,), p_s.dtype.element_ty)
    p_s += i_row * stride_s_n + i_h * stride_s_h
    p_ds += i_row * stride_ds_n + i_h * stride_ds_h
    for v in range(0, V, BV):
        o_v = v + tl.arange(0, BV).to(tl.int64)
        m_block = m_k[:, None] & (o_v < V)[None, :]
        b_s = tl.load(p_s + o_k[:, None] * stride_s_k + o_v[None, :] * stride_s_v, mask=m_block, other=0.0)
        b_ds = tl.load(p_ds + o_k[:, None] * stride_ds_k + o_v[None, :] * stride_ds_v, mask=m_block, other=0.0)
        b_sum += tl.sum(b_s * b_ds, axis=1)
    tl.store(p_m + (i_row * heads + i_h) * K + o_k, b_sum, mask=m_k)


@triton.jit
def linear_attention_decay(
    p_e, p_g, p_m, p_dg, p_rows,
    packed, spans, span, start, T, heads, K, given, stride_g_b, stride_g_t, stride_g_h, stride_g_k,
    BC: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dg_t = e_t + dg_{t+1} in a row, from m [rows, H, K] on; 0 where the state is reset, or the decay was positive.

    e, dg [B, T, H, K], where K is 1 for decays of a step. given: an initial state, else the first decay fades nothing.
    """
    STATE: tl.constexpr = p_e.dtype.element_ty
    pid = tl.program_id(0)
    size = heads * K
    blocks = (size + BC - 1) // BC
    b_c = pid % blocks * BC + tl.arange(0, BC)
    o_c = b_c.to(tl.int64)
    i_row = (pid // blocks).to(tl.int64)
    _, i_b, first, _, begin, count = place(p_rows, i_row, spans, span, start, T, packed)
    m_c = o_c < size
    p_g += i_b * stride_g_b + (b_c // K).to(tl.int64) * stride_g_h + (b_c % K).to(tl.int64) * stride_g_k
    o_first = (i_b * T + begin) * size + o_c
    b_dg = tl.load(p_m + i_row * size + o_c, mask=m_c, other=0.0)
    for i in range(0, ((count + DEPTH - 1) // DEPTH).to(tl.int32)):
        # All loads first.
        queue_e = ()
        queue_g = ()
        for j in tl.static_range(DEPTH):
            t = count - 1 - i * DEPTH - j
            m_t = m_c & (o_c * 0 + t >= 0)
            queue_e = queue_e + (tl.load(p_e + o_first + t * size, mask=m_t, other=0.0),)  # noqa: RUF005  no starred items
            queue_g = queue_g + (tl.load(p_g + (begin + t) * stride_g_t, mask=m_t, other=0.0).to(STATE),)  # noqa: RUF005  no starred items
        for j in tl.static_range(DEPTH):
            t = count - 1 - i * DEPTH - j
            m_t = m_c & (o_c * 0 + t >= 0)
            b_dg = tl.where(queue_g[j] == -INF, 0.0, b_dg + queue_e[j])
            m_none = (queue_g[j] > 0) | (o_c * 0 + begin + t - first + given == 0)
            tl.store(p_dg + o_first + t * size, tl.where(m_none, 0.0, b_dg), mask=m_t)
