"""Triton kernels of the scans.

    linear_scan    h_t = a_t h_{t-1} + x_t            softmax_scan    o_t = alpha_t o_{t-1} + p_t v_t

B batch, T time, C channels, H heads, D values of a head, S storage dtype; states and sums are in STATE, float32 or
float64. Channels are gates [G] times the channels [R] that share a gate; R is `outer` blocks of `inner` neighbours:
channel (o * G + g) * inner + i has gate g.

A *row* is a stretch of time that one lane walks: a whole sequence, or one tile of it. A program is one warp over a
block [BS rows, BG gates, BR channels of a gate]; it walks its rows step by step, with DEPTH steps of loads on their
way, which stay in their storage dtype until their turn: to convert one is to wait for it.

    march   rows are sequences: one kernel, APPLY
    tiled   rows are tiles: REDUCE gives what a tile does to a state, h -> A h + X; FOLD walks the tiles of a sequence,
            oldest first, and stores the state before each; APPLY is the march again, from those states

Both backwards are the same walks the other way. Device memory is the limit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import (
    INF,
    add,
    carry_on,
    carry_reduced,
    channels,
    clear,
    conjugate,
    divide,
    gather_gate,
    is_finite,
    is_zero,
    lanes,
    load,
    locate,
    multiply,
    no_gates,
    push,
    select,
    store,
    sum_channels,
    widen,
    widen_gate,
    zeros,
)

REDUCE, FOLD, APPLY, RECALL = (tl.constexpr(i) for i in range(4))  # PASS
NONE, EACH, SUM = (tl.constexpr(i) for i in range(3))  # GRAD: no gate gradient, one a step, one for all steps


@triton.jit(do_not_specialize=["reverse", "rows", "packed_rows", "tiled_rows", "initial_rows", "last_rows"])
def linear_scan_forward(
    p_x,  # [B, T, C] S
    p_a,  # [B, T, G], strides of 0 where one gate serves all
    p_p,  # [B, T, G] STATE, or p_last where not SCALED: factors of x, 0 skips x
    p_h,  # APPLY: [B, T, C] S; FOLD: [B, T, C] STATE, before each step; REDUCE: [rows, C] STATE
    p_product,  # REDUCE: [rows, G] float64, products of the gates
    p_initial,  # [initial_rows, C] STATE
    p_last,  # [last_rows, C] STATE
    p_edges,
    p_sequence,
    p_tile,
    T,
    rows,
    packed_rows,
    tiled_rows,
    sequences,
    tiles,
    steps,
    initial_rows,
    last_rows,
    reverse,
    gates,
    reduced,
    inner,
    stride_x_b,
    stride_x_t,
    stride_a_b,
    stride_a_t,
    PASS: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPLEX_X: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    DEPTH: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BR: tl.constexpr,
):
    """h_t = a_t h_{t-1} + x_t along the rows; a_t = 0 resets, unless SCALED: then h_t = a_t h_{t-1} + p_t x_t."""
    STATE: tl.constexpr = p_last.dtype.element_ty
    # The fold's gates are products of a tile's, in float64; the state is rounded after every step.
    STEP: tl.constexpr = tl.float64 if PASS == FOLD else STATE
    C = gates * reduced
    b_i, b_g, b_r, i_r = lanes(gates, reduced, BS, BG, BR)
    _, b_b, _, _, b_begin, b_count = locate(
        p_edges, p_sequence, p_tile, b_i, rows, packed_rows, tiled_rows, sequences, tiles, steps, T
    )
    o_c = channels(b_g, b_r, gates, inner, GROUPED)
    m_g = b_g < gates
    m_c = m_g & (b_r < reduced)
    direction = 1 - 2 * reverse.to(tl.int64)
    b_t = b_begin + reverse * (b_count - 1)  # the first step of the walk
    o_x = b_b * stride_x_b + b_t * stride_x_t + o_c
    o_a = b_b * stride_a_b + b_t * stride_a_t + b_g
    o_p = (b_b * T + b_t) * gates + b_g
    o_h = (b_b * T + b_t) * C + o_c

    b_h = widen(load(p_initial, 0, b_i * C + o_c, m_c & (b_i < initial_rows), 0.0, COMPLEX_X), STATE)
    b_product = no_gates(BS, BG, COMPLEX_A)

    queue_x = ()
    queue_a = ()
    queue_p = ()
    for i in tl.static_range(DEPTH):
        m_t = b_count > i
        queue_x = push(queue_x, load(p_x, direction * i * stride_x_t, o_x, m_c & m_t, 0.0, COMPLEX_X))
        queue_a = push(queue_a, load(p_a, direction * i * stride_a_t, o_a, m_g & m_t, 1.0, COMPLEX_A))
        if SCALED:
            queue_p = push(queue_p, tl.load(p_p + direction * i * gates + o_p, mask=m_g & m_t, other=0.0))
    for start in range(0, tl.max(b_count), DEPTH):
        for i in tl.static_range(DEPTH):
            now = start + i
            m_t = b_count > now
            b_x = widen(queue_x[0], STEP)
            b_a = widen_gate(queue_a[0], m_g & m_t, STEP)
            if SCALED:
                b_x = (tl.where(queue_p[0] == 0, 0.0, queue_p[0] * b_x[0]),)
            ahead = direction * (now + DEPTH)
            m_ahead = b_count > now + DEPTH
            queue_x = push(queue_x[1:], load(p_x, ahead * stride_x_t, o_x, m_c & m_ahead, 0.0, COMPLEX_X))
            queue_a = push(queue_a[1:], load(p_a, ahead * stride_a_t, o_a, m_g & m_ahead, 1.0, COMPLEX_A))
            if SCALED:
                queue_p = push(queue_p[1:], tl.load(p_p + ahead * gates + o_p, mask=m_g & m_ahead, other=0.0))
            if PASS == FOLD:
                store(p_h, direction * now * C, o_h, m_c & m_t, b_h)
            if PASS == REDUCE:
                b_h = add(carry_reduced(b_a, b_h, not SCALED), b_x)
                b_product = gather_gate(b_a, b_product)
            else:
                b_h = widen(add(carry_on(b_a, widen(b_h, STEP), not SCALED), b_x), STATE)
            if PASS == APPLY:
                store(p_h, direction * now * C, o_h, m_c & m_t, b_h)

    if PASS == REDUCE:
        store(p_h, 0, b_i * C + o_c, m_c & (b_i < rows), b_h)
        store(p_product, 0, b_i * gates + b_g, m_g & (b_i < rows) & (b_g * 0 + i_r == 0), b_product)
    else:
        store(p_last, 0, b_i * C + o_c, m_c & (b_i < last_rows), b_h)


@triton.jit(
    do_not_specialize=[
        "reverse",
        "rows",
        "packed_rows",
        "tiled_rows",
        "initial_rows",
        "last_rows",
        "state_rows",
        "dh_rows",
    ]
)
def linear_scan_backward(
    p_dh,  # [B, T, C] S, read where dh_rows
    p_a,  # [B, T, G], strides of 0 where one gate serves all
    p_h,  # [B, T, C] S, or p_dh where GRAD is NONE
    p_state,  # [state_rows, C] STATE: h before the first step of each sequence
    p_dx,  # APPLY: [B, T, C] S; REDUCE: [rows, C] STATE
    p_da,  # EACH: [blocks of R, B, T, G]; SUM: [blocks of R, rows, G]; REDUCE: [rows, G] float64, products of the gates
    p_initial,  # [initial_rows, C] STATE: gradient of the state after the row
    p_last,  # [last_rows, C] STATE: gradient of the state before the row
    p_edges,
    p_sequence,
    p_tile,
    B,
    T,
    rows,
    packed_rows,
    tiled_rows,
    sequences,
    tiles,
    steps,
    initial_rows,
    last_rows,
    state_rows,
    dh_rows,
    reverse,
    gates,
    reduced,
    inner,
    stride_dh_b,
    stride_dh_t,
    stride_a_b,
    stride_a_t,
    stride_h_b,
    stride_h_t,
    PASS: tl.constexpr,
    GRAD: tl.constexpr,
    GROUPED: tl.constexpr,
    COMPLEX_X: tl.constexpr,
    COMPLEX_A: tl.constexpr,
    DEPTH: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BR: tl.constexpr,
):
    """g_t = dh_t + c, dx_t = g_t, da_t = g_t conj(h_{t-1}), c = conj(a_t) g_t, from the scan's last step to its first.

    `reverse` is the scan's: this walk goes the other way.
    """
    STATE: tl.constexpr = p_last.dtype.element_ty
    C = gates * reduced
    b_i, b_g, b_r, i_r = lanes(gates, reduced, BS, BG, BR)
    b_n, b_b, b_first, b_last, b_begin, b_count = locate(
        p_edges, p_sequence, p_tile, b_i, rows, packed_rows, tiled_rows, sequences, tiles, steps, T
    )
    o_c = channels(b_g, b_r, gates, inner, GROUPED)
    m_g = b_g < gates
    m_c = m_g & (b_r < reduced)
    m_dh = m_c & (b_i < dh_rows)
    direction = 2 * reverse.to(tl.int64) - 1
    b_t = b_begin + (1 - reverse) * (b_count - 1)
    # Steps of the walk from b_t to the one that follows the initial state.
    b_edge = tl.where(direction > 0, b_last - 1 - b_t, b_t - b_first)
    o_dh = b_b * stride_dh_b + b_t * stride_dh_t + o_c
    o_a = b_b * stride_a_b + b_t * stride_a_t + b_g
    o_h = b_b * stride_h_b + b_t * stride_h_t + o_c
    o_dx = (b_b * T + b_t) * C + o_c
    o_da = ((i_r * B + b_b) * T + b_t) * gates + b_g

    b_c = widen(load(p_initial, 0, b_i * C + o_c, m_c & (b_i < initial_rows), 0.0, COMPLEX_X), STATE)
    b_product = no_gates(BS, BG, COMPLEX_A)
    b_sum = zeros(BS, BG, BR, STATE, COMPLEX_A)

    queue_dh = ()
    queue_a = ()
    queue_h = ()
    for i in tl.static_range(DEPTH):
        m_t = b_count > i
        queue_dh = push(queue_dh, load(p_dh, direction * i * stride_dh_t, o_dh, m_dh & m_t, 0.0, COMPLEX_X))
        queue_a = push(queue_a, load(p_a, direction * i * stride_a_t, o_a, m_g & m_t, 1.0, COMPLEX_A))
        if GRAD != NONE:
            m_h = m_c & m_t & (b_edge > i)
            queue_h = push(queue_h, load(p_h, direction * (i + 1) * stride_h_t, o_h, m_h, 0.0, COMPLEX_X))
    if GRAD != NONE:
        # Read once: only the last step of a row can follow the initial state.
        b_state = widen(load(p_state, 0, b_n * C + o_c, m_c & (b_n < state_rows), 0.0, COMPLEX_X), STATE)
    for start in range(0, tl.max(b_count), DEPTH):
        for i in tl.static_range(DEPTH):
            now = start + i
            m_t = b_count > now
            b_g_t = add(widen(queue_dh[0], STATE), b_c)
            b_a = conjugate(widen_gate(queue_a[0], m_g & m_t, STATE))
            ahead = direction * (now + DEPTH)
            m_ahead = b_count > now + DEPTH
            queue_dh = push(queue_dh[1:], load(p_dh, ahead * stride_dh_t, o_dh, m_dh & m_ahead, 0.0, COMPLEX_X))
            queue_a = push(queue_a[1:], load(p_a, ahead * stride_a_t, o_a, m_g & m_ahead, 1.0, COMPLEX_A))
            if GRAD != NONE:
                b_before = select(b_edge > now, widen(queue_h[0], STATE), b_state)
                m_h = m_c & m_ahead & (b_edge > now + DEPTH)
                queue_h = push(
                    queue_h[1:], load(p_h, ahead * stride_h_t + direction * stride_h_t, o_h, m_h, 0.0, COMPLEX_X)
                )
                if COMPLEX_A:
                    b_da = multiply(conjugate(b_before), b_g_t)
                elif COMPLEX_X:
                    b_da = (b_g_t[0] * b_before[0] + b_g_t[1] * b_before[1],)
                else:
                    b_da = (b_g_t[0] * b_before[0],)
                b_da = clear(is_zero(b_a) & (is_finite(b_before) == 0), b_da)
                b_da = clear((m_c & m_t) == 0, b_da)
                if GRAD == EACH:
                    store(p_da, direction * now * gates, o_da, m_g & m_t, sum_channels(b_da))
                else:
                    b_sum = add(b_sum, b_da)
            if PASS == REDUCE:
                b_c = carry_reduced(b_a, b_g_t, True)
                b_product = gather_gate(b_a, b_product)
            else:
                store(p_dx, direction * now * C, o_dx, m_c & m_t, b_g_t)
                b_c = carry_on(b_a, b_g_t, True)

    if PASS == REDUCE:
        store(p_dx, 0, b_i * C + o_c, m_c & (b_i < rows), b_c)
        store(p_da, 0, b_i * gates + b_g, m_g & (b_i < rows) & (b_g * 0 + i_r == 0), b_product)
    else:
        store(p_last, 0, b_i * C + o_c, m_c & (b_i < last_rows), b_c)
        if GRAD == SUM:
            store(p_da, 0, (i_r * rows + b_i) * gates + b_g, m_g & (b_i < rows), sum_channels(b_sum))


@triton.jit(do_not_specialize=["reverse", "rows", "packed_rows", "tiled_rows", "initial_rows", "weight_rows"])
def softmax_scan_weights(
    p_s,  # [B, T, H] scores; FOLD: maxima of tiles
    p_w,  # FOLD: [B, T, H] STATE, sums of tiles
    p_initial,  # [initial_rows, H] STATE: maximum before each row
    p_weight,  # [weight_rows, H] STATE: sum before each row; without it 1, or 0 where the maximum is -inf
    p_m,  # APPLY (KEEP), RECALL (read): [B, T, H] STATE; FOLD: [B, T, H], before each tile; REDUCE: [rows, H]
    p_u,
    p_alpha,  # APPLY, RECALL: [B, T, H] STATE
    p_p,
    p_lse,  # APPLY
    p_edges,
    p_sequence,
    p_tile,
    T,
    rows,
    packed_rows,
    tiled_rows,
    sequences,
    tiles,
    steps,
    initial_rows,
    weight_rows,
    reverse,
    heads,
    stride_s_b,
    stride_s_t,
    PASS: tl.constexpr,
    KEEP: tl.constexpr,
    DEPTH: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
):
    """m' = max(m, s), u' = u e^{m - m'} + e^{s - m'}, alpha = u e^{m - m'} / u', p = e^{s - m'} / u', lse = m' + log u'


    RECALL is APPLY from the m and u that were kept, wherever a row begins.
    """
    STATE: tl.constexpr = p_m.dtype.element_ty
    SMALLEST: tl.constexpr = 1.1754943508222875e-38 if STATE.primitive_bitwidth == 32 else 2.2250738585072014e-308
    b_i, b_g, _, _ = lanes(heads, 1, BS, BG, 1)
    b_n, b_b, b_first, b_last, b_begin, b_count = locate(
        p_edges, p_sequence, p_tile, b_i, rows, packed_rows, tiled_rows, sequences, tiles, steps, T
    )
    m_g = b_g < heads
    direction = 1 - 2 * reverse.to(tl.int64)
    b_t = b_begin + reverse * (b_count - 1)
    o_s = b_b * stride_s_b + b_t * stride_s_t + b_g
    o_h = (b_b * T + b_t) * heads + b_g

    b_from = b_i
    if PASS == RECALL:
        b_from = b_n
    m_initial = m_g & (b_from < initial_rows)
    b_m = tl.load(p_initial + b_from * heads + b_g, mask=m_initial, other=-INF)
    b_u = tl.where(b_m == -INF, 0.0, 1.0).to(STATE)
    if PASS == RECALL:
        b_behind = tl.where(direction > 0, b_t - b_first, b_last - 1 - b_t)
        m_past = m_g & (b_behind > 0) & (b_count > 0)
        o_past = o_h - direction * heads
        b_m = tl.where(m_past, tl.load(p_m + o_past, mask=m_past, other=0.0), b_m)
        b_u = tl.where(m_past, tl.load(p_u + o_past, mask=m_past, other=0.0), b_u)
    else:
        m_weight = m_g & (b_i < weight_rows)
        b_u = tl.where(m_weight, tl.load(p_weight + b_i * heads + b_g, mask=m_weight, other=0.0), b_u)

    queue_s = ()
    queue_w = ()
    for i in tl.static_range(DEPTH):
        m_t = m_g & (b_count > i)
        queue_s = push(queue_s, tl.load(p_s + direction * i * stride_s_t + o_s, mask=m_t, other=-INF))
        if PASS == FOLD:
            queue_w = push(queue_w, tl.load(p_w + direction * i * heads + o_h, mask=m_t, other=0.0))
    for start in range(0, tl.max(b_count), DEPTH):
        for i in tl.static_range(DEPTH):
            now = start + i
            m_t = m_g & (b_count > now)
            b_s = queue_s[0].to(STATE)
            ahead = direction * (now + DEPTH)
            m_ahead = m_g & (b_count > now + DEPTH)
            queue_s = push(queue_s[1:], tl.load(p_s + ahead * stride_s_t + o_s, mask=m_ahead, other=-INF))
            at = direction * now * heads
            if PASS == FOLD:
                b_w = queue_w[0]
                queue_w = push(queue_w[1:], tl.load(p_w + ahead * heads + o_h, mask=m_ahead, other=0.0))
                tl.store(p_m + at + o_h, b_m, mask=m_t)
                tl.store(p_u + at + o_h, b_u, mask=m_t)
            else:
                b_w = tl.full((BS, BG, 1), 1.0, STATE)
            # The larger of both weighs exactly 1: +inf once is the limit of large scores, twice is NaN.
            m_above = b_s > b_m
            b_high = tl.where(m_above, b_s, b_m)
            b_low = tl.where(m_above, b_m, b_s)
            b_fall = tl.exp(b_low - tl.where(b_high == -INF, 0.0, b_high))
            b_past = tl.where(m_above, b_fall * b_u, b_u)
            b_new = tl.where(m_above, b_w, b_fall * b_w)
            b_m = b_high
            b_u = b_past + b_new
            if PASS >= APPLY:  # or RECALL
                m_empty = b_u == 0
                b_safe = tl.where(m_empty, 1.0, b_u)
                b_p = divide(b_new, b_safe, STATE)
                # 0 means absent to the kernels that read p.
                b_p = tl.where((b_p == 0) & (b_s != -INF), SMALLEST, b_p)
                tl.store(p_alpha + at + o_h, divide(b_past, b_safe, STATE), mask=m_t)
                tl.store(p_p + at + o_h, b_p, mask=m_t)
                if PASS == APPLY:
                    tl.store(p_lse + at + o_h, tl.where(m_empty, -INF, b_m + tl.log(b_safe)), mask=m_t)
                    if KEEP:
                        tl.store(p_m + at + o_h, b_m, mask=m_t)
                        tl.store(p_u + at + o_h, b_u, mask=m_t)

    if PASS == REDUCE:
        tl.store(p_m + b_i * heads + b_g, b_m, mask=m_g & (b_i < rows))
        tl.store(p_u + b_i * heads + b_g, b_u, mask=m_g & (b_i < rows))


@triton.jit(
    do_not_specialize=[
        "reverse",
        "rows",
        "packed_rows",
        "tiled_rows",
        "initial_rows",
        "last_rows",
        "do_rows",
        "dlse_rows",
    ]
)
def softmax_scan_backward(
    p_do,  # [B, T, H, D] S, read where do_rows
    p_dlse,  # [B, T, H] STATE, read where dlse_rows
    p_o,  # [B, T, H, D] S
    p_v,  # [B, T, H, D] S
    p_alpha,  # [B, T, H] STATE
    p_p,  # [B, T, H] STATE
    p_dv,  # APPLY: [B, T, H, D] S; REDUCE: [rows, H] float64, products of alpha
    p_ds,  # APPLY: [blocks of D, B, T, H] STATE
    p_initial,  # [initial_rows, 2, H, D] STATE: alpha R and alpha r of the step after the row
    p_last,  # APPLY: [last_rows, 2, H, D] STATE: the same of the row's first step; REDUCE: [rows, 2, H, D]
    p_edges,
    p_sequence,
    p_tile,
    B,
    T,
    rows,
    packed_rows,
    tiled_rows,
    sequences,
    tiles,
    steps,
    initial_rows,
    last_rows,
    do_rows,
    dlse_rows,
    reverse,
    gates,
    reduced,
    stride_do_b,
    stride_do_t,
    stride_dlse_b,
    stride_dlse_t,
    stride_o_b,
    stride_o_t,
    stride_v_b,
    stride_v_t,
    PASS: tl.constexpr,
    DEPTH: tl.constexpr,
    BS: tl.constexpr,
    BG: tl.constexpr,
    BR: tl.constexpr,
):
    """R_t = do_t + c, r_t = <do_t, o_t> - dlse_t + e; dv = p R, ds = p (<R, v> - r); c = alpha R, e = alpha r.

    r is kept as D parts whose sum it is (dlse goes to the first), so that blocks of D need nothing of each other.
    """
    STATE: tl.constexpr = p_last.dtype.element_ty
    C = gates * reduced
    b_i, b_g, b_r, i_r = lanes(gates, reduced, BS, BG, BR)
    _, b_b, _, _, b_begin, b_count = locate(
        p_edges, p_sequence, p_tile, b_i, rows, packed_rows, tiled_rows, sequences, tiles, steps, T
    )
    o_c = b_g * reduced + b_r
    m_g = b_g < gates
    m_c = m_g & (b_r < reduced)
    m_do = m_c & (b_i < do_rows)
    m_dlse = m_g & (b_i < dlse_rows)
    direction = 2 * reverse.to(tl.int64) - 1
    b_t = b_begin + (1 - reverse) * (b_count - 1)
    o_do = b_b * stride_do_b + b_t * stride_do_t + o_c
    o_dlse = b_b * stride_dlse_b + b_t * stride_dlse_t + b_g
    o_o = b_b * stride_o_b + b_t * stride_o_t + o_c
    o_v = b_b * stride_v_b + b_t * stride_v_t + o_c
    o_p = (b_b * T + b_t) * gates + b_g
    o_dv = (b_b * T + b_t) * C + o_c
    o_ds = ((i_r * B + b_b) * T + b_t) * gates + b_g

    o_carry = b_i * 2 * C + o_c
    b_c = tl.load(p_initial + o_carry, mask=m_c & (b_i < initial_rows), other=0.0)
    b_e = tl.load(p_initial + o_carry + C, mask=m_c & (b_i < initial_rows), other=0.0)
    b_product = no_gates(BS, BG, False)

    queue_do = ()
    queue_dlse = ()
    queue_o = ()
    queue_v = ()
    queue_alpha = ()
    queue_p = ()
    for i in tl.static_range(DEPTH):
        m_t = b_count > i
        far = direction * i
        queue_do = push(queue_do, tl.load(p_do + far * stride_do_t + o_do, mask=m_do & m_t, other=0.0))
        queue_dlse = push(queue_dlse, tl.load(p_dlse + far * stride_dlse_t + o_dlse, mask=m_dlse & m_t, other=0.0))
        queue_o = push(queue_o, tl.load(p_o + far * stride_o_t + o_o, mask=m_do & m_t, other=0.0))
        queue_alpha = push(queue_alpha, tl.load(p_alpha + far * gates + o_p, mask=m_g & m_t, other=1.0))
        if PASS == APPLY:
            queue_v = push(queue_v, tl.load(p_v + far * stride_v_t + o_v, mask=m_c & m_t, other=0.0))
            queue_p = push(queue_p, tl.load(p_p + far * gates + o_p, mask=m_g & m_t, other=0.0))
    for start in range(0, tl.max(b_count), DEPTH):
        for i in tl.static_range(DEPTH):
            now = start + i
            m_t = b_count > now
            b_do = queue_do[0].to(STATE)
            b_total = b_c + b_do
            b_part = b_e + b_do * queue_o[0].to(STATE) - tl.where(b_r == 0, queue_dlse[0], 0.0)
            b_alpha = (queue_alpha[0],)
            far = direction * (now + DEPTH)
            m_far = b_count > now + DEPTH
            queue_do = push(queue_do[1:], tl.load(p_do + far * stride_do_t + o_do, mask=m_do & m_far, other=0.0))
            queue_dlse = push(
                queue_dlse[1:], tl.load(p_dlse + far * stride_dlse_t + o_dlse, mask=m_dlse & m_far, other=0.0)
            )
            queue_o = push(queue_o[1:], tl.load(p_o + far * stride_o_t + o_o, mask=m_do & m_far, other=0.0))
            queue_alpha = push(queue_alpha[1:], tl.load(p_alpha + far * gates + o_p, mask=m_g & m_far, other=1.0))
            if PASS == APPLY:
                b_v = queue_v[0].to(STATE)
                b_p = queue_p[0]
                queue_v = push(queue_v[1:], tl.load(p_v + far * stride_v_t + o_v, mask=m_c & m_far, other=0.0))
                queue_p = push(queue_p[1:], tl.load(p_p + far * gates + o_p, mask=m_g & m_far, other=0.0))
                b_dv = tl.where(b_p == 0, 0.0, b_p * b_total)
                store(p_dv, direction * now * C, o_dv, m_c & m_t, (b_dv,))
                b_ds = b_p * tl.sum(tl.where(m_c, b_total * b_v - b_part, 0.0), axis=2, keep_dims=True)
                b_ds = tl.where(b_p == 0, 0.0, b_ds)
                store(p_ds, direction * now * gates, o_ds, m_g & m_t, (b_ds,))
            else:
                b_product = gather_gate(b_alpha, b_product)
            b_c = carry_on(b_alpha, (b_total,), True)[0]
            b_e = carry_on(b_alpha, (b_part,), True)[0]

    m_last = m_c & (b_i < last_rows)
    tl.store(p_last + o_carry, b_c, mask=m_last)
    tl.store(p_last + o_carry + C, b_e, mask=m_last)
    if PASS == REDUCE:
        store(p_dv, 0, b_i * gates + b_g, m_g & (b_i < rows) & (b_g * 0 + i_r == 0), b_product)
