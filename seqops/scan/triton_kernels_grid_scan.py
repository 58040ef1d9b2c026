"""Triton kernels of grid_scan.

    r = t_rl l + t_ru u + x_r,  d = t_dl l + t_du u + x_d,  l = r(x-1, y),  u = d(x, y-1)

A program has one batch row, one head and BD of its channels, and walks the grid in strips of BX rows. The lanes of a
block [BX, BD] stand on an antidiagonal: at step k, lane i of a strip is at column k - i. So u is what the lane itself
had a step ago, and l what its neighbour had, moved by one lane; with BX = 1 that is row by row. The first lane takes l
from `p_carry` [B, Y, H, D], where the last lane of the strip before has left it: a row of the grid, in L1 or L2. DEPTH
steps of loads are on their way, which stay in their storage dtype until their turn.

The backward walks the other way: with P and Q what comes from (x+1, y) and (x, y+1),

    g_r = dr + P,  g_d = dd + Q;  P = t_rl g_r + t_dl g_d,  Q = t_ru g_r + t_du g_d for the neighbours

Gradients of gates are sums over channels: each program stores those of its own, a second kernel adds them up in order.
A gate of exactly 0 lets nothing pass. Device memory is the limit: 64-bit offsets. Indices and flips are the caller's,
`flip` turns the walk.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_blocks import INF, narrow, push

NO_VARIANTS = [
    "X",
    "Y",
    "H",
    "D",
    "flip_x",
    "flip_y",
    "ru_rows",
    "dl_rows",
    "top_rows",
    "left_rows",
    "dr_rows",
    "dd_rows",
]


@triton.jit
def term(b_gate, b_value):
    """gate value; a gate of 0 lets nothing pass, not even NaN."""
    return tl.where(b_gate == 0, 0.0, b_gate * b_value)


@triton.jit
def gradient(b_gate, b_value, b_g):
    """<g, value> over the channels [BX, 1], without what is infinite or NaN and did not pass."""
    m_lost = (b_gate == 0) & ((tl.abs(b_value) < INF) == 0)
    return tl.sum(tl.where(m_lost, 0.0, b_value * b_g), axis=1, keep_dims=True)


@triton.jit
def from_lane_before(b_value, b_first, lane, BX: tl.constexpr, BD: tl.constexpr):
    """What the lane before has; the first lane gets b_first [1, BD]."""
    if BX == 1:
        return b_first
    else:
        b_from = tl.broadcast_to(tl.maximum(lane - 1, 0), (BX, BD))
        return tl.where(lane == 0, b_first, tl.gather(b_value, b_from, axis=0))


@triton.jit
def read_node(queue, p_r, p_d, p_rl, p_ru, p_dl, p_du, places, masks):
    """What enters a node, and its gates, at the end of the queue; places and masks of states and of gates."""
    queue = push(queue, tl.load(p_r + places[0], mask=masks[0], other=0.0))
    queue = push(queue, tl.load(p_d + places[0], mask=masks[1], other=0.0))
    queue = push(queue, tl.load(p_rl + places[1], mask=masks[2], other=0.0))
    queue = push(queue, tl.load(p_ru + places[1], mask=masks[3], other=0.0))
    queue = push(queue, tl.load(p_dl + places[1], mask=masks[4], other=0.0))
    return push(queue, tl.load(p_du + places[1], mask=masks[2], other=0.0))


@triton.jit
def store(pointer, b_offset, b_value, m_block):
    tl.store(pointer + b_offset, narrow(b_value, pointer.dtype.element_ty), mask=m_block)


@triton.jit(do_not_specialize=NO_VARIANTS)
def grid_scan_forward(
    p_x_r,  # [B, X, Y, H, D] S, strides of p_x_d
    p_x_d,
    p_rl,  # [B, X, Y, H] G, all with the same strides
    p_ru,
    p_dl,
    p_du,
    p_top,  # [top_rows, X, H, D] STATE
    p_carry,  # [B, Y, H, D] STATE: initial_left on entry
    p_r,  # [B, X, Y, H, D] S
    p_d,
    X,
    Y,
    H,
    D,
    flip_x,
    flip_y,
    ru_rows,
    dl_rows,
    top_rows,
    stride_x_b,
    stride_x_x,
    stride_x_y,
    stride_x_h,
    stride_t_b,
    stride_t_x,
    stride_t_y,
    stride_t_h,
    DEPTH: tl.constexpr,
    BX: tl.constexpr,
    BD: tl.constexpr,
):
    STATE: tl.constexpr = p_carry.dtype.element_ty
    n_d = (D + BD - 1) // BD
    pid = tl.program_id(0)
    # Blocks of one element: the interpreter cannot combine a mask that is a number with one that is a block.
    b_0 = tl.zeros((1, 1), tl.int32)
    i_h = (b_0 + pid // n_d % H).to(tl.int64)
    i_b = (b_0 + pid // n_d // H).to(tl.int64)
    b_c = (pid % n_d * BD + tl.arange(0, BD)[None, :]).to(tl.int64)
    m_c = b_c < D
    lane = tl.arange(0, BX)[:, None]
    m_ru = i_b < ru_rows
    m_dl = i_b < dl_rows
    step_x, step_y = 1 - 2 * flip_x.to(tl.int64), 1 - 2 * flip_y.to(tl.int64)
    first_x, first_y = flip_x.to(tl.int64) * (X - 1), flip_y.to(tl.int64) * (Y - 1)

    for strip in range(0, X, BX):
        b_i = strip + lane
        m_x = b_i < X
        b_x = first_x + step_x * b_i
        m_last = (lane == BX - 1) | (b_i == X - 1)
        o_x = i_b * stride_x_b + b_x * stride_x_x + i_h * stride_x_h + b_c
        o_t = i_b * stride_t_b + b_x * stride_t_x + i_h * stride_t_h
        o_y = ((i_b * X + b_x) * Y * H + i_h) * D + b_c
        o_carry = (i_b * Y * H + i_h) * D + b_c
        m_top = m_x & m_c & (i_b < top_rows)
        b_up = tl.load(p_top + ((i_b * X + b_x) * H + i_h) * D + b_c, mask=m_top, other=0.0).to(STATE)
        b_r = tl.zeros((BX, BD), STATE)
        queue = ()
        for early in tl.static_range(DEPTH):
            b_j = early - lane
            m_t = m_x & (b_j >= 0) & (b_j < Y)
            m = m_t & m_c
            b_y = first_y + step_y * b_j
            i_y = first_y + step_y * early
            places = (o_x + b_y * stride_x_y, o_t + b_y * stride_t_y)
            masks = (m, m, m_t, m_t & m_ru, m_t & m_dl)
            queue = read_node(queue, p_x_r, p_x_d, p_rl, p_ru, p_dl, p_du, places, masks)
            queue = push(queue, tl.load(p_carry + o_carry + i_y * H * D, mask=m_c & (b_0 + early < Y), other=0.0))
        for start in range(0, Y + BX - 1, DEPTH):
            for i in tl.static_range(DEPTH):
                k = start + i
                b_x_r = queue[0].to(STATE)
                b_x_d = queue[1].to(STATE)
                b_rl = queue[2].to(STATE)
                b_ru = queue[3].to(STATE)
                b_dl = queue[4].to(STATE)
                b_du = queue[5].to(STATE)
                b_first = queue[6]
                queue = queue[7:]
                ahead = k + DEPTH
                b_j = ahead - lane
                m_t = m_x & (b_j >= 0) & (b_j < Y)
                m = m_t & m_c
                b_y = first_y + step_y * b_j
                i_y = first_y + step_y * ahead
                places = (o_x + b_y * stride_x_y, o_t + b_y * stride_t_y)
                masks = (m, m, m_t, m_t & m_ru, m_t & m_dl)
                queue = read_node(queue, p_x_r, p_x_d, p_rl, p_ru, p_dl, p_du, places, masks)
                queue = push(queue, tl.load(p_carry + o_carry + i_y * H * D, mask=m_c & (b_0 + ahead < Y), other=0.0))

                b_j = k - lane
                m_now = m_x & (b_j >= 0) & (b_j < Y)
                b_y = first_y + step_y * b_j
                b_left = from_lane_before(b_r, b_first, lane, BX, BD)
                b_r = term(b_rl, b_left) + (term(b_ru, b_up) + b_x_r)
                b_d = term(b_dl, b_left) + (term(b_du, b_up) + b_x_d)
                b_up = tl.where(m_now, b_d, b_up)
                store(p_r, o_y + b_y * H * D, b_r, m_now & m_c)
                store(p_d, o_y + b_y * H * D, b_d, m_now & m_c)
                tl.store(p_carry + o_carry + b_y * H * D, b_r, mask=m_now & m_c & m_last)
        tl.debug_barrier()  # what other threads have left in p_carry is read


@triton.jit(do_not_specialize=NO_VARIANTS)
def grid_scan_backward(
    p_dr,  # [B, X, Y, H, D] S, strides of p_dd; [dr_rows]
    p_dd,  # [dd_rows]
    p_rl,  # [B, X, Y, H] G, all with the same strides
    p_ru,
    p_dl,
    p_du,
    p_r,  # GATES: [B, X, Y, H, D] S
    p_d,
    p_left,  # GATES: [left_rows, Y, H, D] STATE
    p_top,  # GATES: [top_rows, X, H, D] STATE
    p_dx_r,  # [B, X, Y, H, D] S
    p_dx_d,
    p_drl,  # GATES: [tiles of D, B, X, Y, H]
    p_dru,
    p_ddl,
    p_ddu,
    p_carry,  # [B, Y, H, D] STATE: zeros on entry, the gradient of initial_left on exit
    p_dtop,  # [B, X, H, D] STATE
    B,
    X,
    Y,
    H,
    D,
    flip_x,  # as the forward's: the walk here is the other way
    flip_y,
    ru_rows,
    dl_rows,
    left_rows,
    top_rows,
    dr_rows,
    dd_rows,
    stride_x_b,
    stride_x_x,
    stride_x_y,
    stride_x_h,
    stride_t_b,
    stride_t_x,
    stride_t_y,
    stride_t_h,
    GATES: tl.constexpr,
    DEPTH: tl.constexpr,
    BX: tl.constexpr,
    BD: tl.constexpr,
):
    STATE: tl.constexpr = p_carry.dtype.element_ty
    n_d = (D + BD - 1) // BD
    pid = tl.program_id(0)
    # Blocks of one element: the interpreter cannot combine a mask that is a number with one that is a block.
    b_0 = tl.zeros((1, 1), tl.int32)
    i_h = (b_0 + pid // n_d % H).to(tl.int64)
    i_b = (b_0 + pid // n_d // H).to(tl.int64)
    i_d = (pid % n_d).to(tl.int64)
    b_c = i_d * BD + tl.arange(0, BD)[None, :]
    m_c = b_c < D
    lane = tl.arange(0, BX)[:, None]
    m_ru = i_b < ru_rows
    m_dl = i_b < dl_rows
    step_x, step_y = 2 * flip_x.to(tl.int64) - 1, 2 * flip_y.to(tl.int64) - 1
    first_x, first_y = (1 - flip_x.to(tl.int64)) * (X - 1), (1 - flip_y.to(tl.int64)) * (Y - 1)

    for strip in range(0, X, BX):
        b_i = strip + lane
        m_x = b_i < X
        b_x = first_x + step_x * b_i
        m_last = (lane == BX - 1) | (b_i == X - 1)
        o_x = i_b * stride_x_b + b_x * stride_x_x + i_h * stride_x_h + b_c
        o_t = i_b * stride_t_b + b_x * stride_t_x + i_h * stride_t_h
        o_y = ((i_b * X + b_x) * Y * H + i_h) * D + b_c
        o_g = ((i_d * B + i_b) * X + b_x) * Y * H + i_h
        o_carry = (i_b * Y * H + i_h) * D + b_c
        o_top = ((i_b * X + b_x) * H + i_h) * D + b_c
        m_node = m_x & m_c
        m_dr = m_node & (i_b < dr_rows)
        m_dd = m_node & (i_b < dd_rows)
        if GATES:
            b_top = tl.load(p_top + o_top, mask=m_node & (i_b < top_rows), other=0.0)
            m_inner = m_node & (b_i < X - 1)
            m_border = m_node & (b_i == X - 1) & (i_b < left_rows)
        b_down = tl.zeros((BX, BD), STATE)
        b_right = tl.zeros((BX, BD), STATE)
        queue = ()
        for early in tl.static_range(DEPTH):
            b_j = early - lane
            m_t = (b_j >= 0) & (b_j < Y)
            b_y = first_y + step_y * b_j
            i_y = first_y + step_y * early
            places = (o_x + b_y * stride_x_y, o_t + b_y * stride_t_y)
            masks = (m_t & m_dr, m_t & m_dd, m_t & m_x, m_t & m_x & m_ru, m_t & m_x & m_dl)
            queue = read_node(queue, p_dr, p_dd, p_rl, p_ru, p_dl, p_du, places, masks)
            queue = push(queue, tl.load(p_carry + o_carry + i_y * H * D, mask=m_c & (b_0 + early < Y), other=0.0))
            if GATES:
                o_n = o_y + b_y * H * D
                m_inside = m_t & m_node & (b_j < Y - 1)
                queue = push(queue, tl.load(p_r + o_n + step_x * Y * H * D, mask=m_t & m_inner, other=0.0))
                queue = push(queue, tl.load(p_d + o_n + step_y * H * D, mask=m_inside, other=0.0))
                queue = push(queue, tl.load(p_left + o_carry + b_y * H * D, mask=m_t & m_border, other=0.0))
        for start in range(0, Y + BX - 1, DEPTH):
            for i in tl.static_range(DEPTH):
                k = start + i
                b_dr = queue[0].to(STATE)
                b_dd = queue[1].to(STATE)
                b_rl = queue[2].to(STATE)
                b_ru = queue[3].to(STATE)
                b_dl = queue[4].to(STATE)
                b_du = queue[5].to(STATE)
                b_first = queue[6]
                if GATES:
                    b_l = tl.where(b_i == X - 1, queue[9], queue[7].to(STATE))
                    b_u = tl.where(k - lane == Y - 1, b_top, queue[8].to(STATE))
                    queue = queue[10:]
                else:
                    queue = queue[7:]
                ahead = k + DEPTH
                b_j = ahead - lane
                m_t = (b_j >= 0) & (b_j < Y)
                b_y = first_y + step_y * b_j
                i_y = first_y + step_y * ahead
                places = (o_x + b_y * stride_x_y, o_t + b_y * stride_t_y)
                masks = (m_t & m_dr, m_t & m_dd, m_t & m_x, m_t & m_x & m_ru, m_t & m_x & m_dl)
                queue = read_node(queue, p_dr, p_dd, p_rl, p_ru, p_dl, p_du, places, masks)
                queue = push(queue, tl.load(p_carry + o_carry + i_y * H * D, mask=m_c & (b_0 + ahead < Y), other=0.0))
                if GATES:
                    o_n = o_y + b_y * H * D
                    m_inside = m_t & m_node & (b_j < Y - 1)
                    queue = push(queue, tl.load(p_r + o_n + step_x * Y * H * D, mask=m_t & m_inner, other=0.0))
                    queue = push(queue, tl.load(p_d + o_n + step_y * H * D, mask=m_inside, other=0.0))
                    queue = push(queue, tl.load(p_left + o_carry + b_y * H * D, mask=m_t & m_border, other=0.0))

                b_j = k - lane
                m_now = m_x & (b_j >= 0) & (b_j < Y)
                b_y = first_y + step_y * b_j
                b_g_r = b_dr + from_lane_before(b_right, b_first, lane, BX, BD)
                b_g_d = b_dd + b_down
                b_right = term(b_rl, b_g_r) + term(b_dl, b_g_d)
                b_down = tl.where(m_now, term(b_ru, b_g_r) + term(b_du, b_g_d), b_down)
                store(p_dx_r, o_y + b_y * H * D, b_g_r, m_now & m_c)
                store(p_dx_d, o_y + b_y * H * D, b_g_d, m_now & m_c)
                tl.store(p_carry + o_carry + b_y * H * D, b_right, mask=m_now & m_c & m_last)
                if GATES:
                    store(p_drl, o_g + b_y * H, gradient(b_rl, b_l, b_g_r), m_now)
                    store(p_dru, o_g + b_y * H, gradient(b_ru, b_u, b_g_r), m_now & m_ru)
                    store(p_ddl, o_g + b_y * H, gradient(b_dl, b_l, b_g_d), m_now & m_dl)
                    store(p_ddu, o_g + b_y * H, gradient(b_du, b_u, b_g_d), m_now)
        tl.store(p_dtop + o_top, b_down, mask=m_node)
        tl.debug_barrier()  # what other threads have left in p_carry is read


@triton.jit(do_not_specialize=["nodes", "tiles"])
def grid_scan_gates(p_part, p_gradient, nodes, tiles, BLOCK: tl.constexpr):
    """The sum of p_part [tiles, nodes] STATE over the tiles, first to last."""
    b_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = b_n < nodes
    b_sum = tl.load(p_part + b_n, mask=m_n, other=0.0)
    for tile in range(1, tiles):
        b_sum += tl.load(p_part + tl.cast(tile, tl.int64) * nodes + b_n, mask=m_n, other=0.0)
    store(p_gradient, b_n, b_sum, m_n)
