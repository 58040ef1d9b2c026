"""Triton kernels of combiner_attention's parts.

    khat = pool k_j    qhat = pool q_j    vhat = sum_j softmax_j(scale <qhat, k_j>) v_j,    over positions j of a span

B batch, T time, H heads, S rows of summaries, D channels in one block BD. A program of `span_summaries_*` is one span,
BN positions of it at a time; spans of one launch are disjoint. A program of `running_pool_*` is one column of the grid
of rows of `stride` positions, for BC of the H D channels. The maximum is the first of equal ones, and NaN is above all
numbers. Products are of vectors, in float32, or float64 for float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(2147483647)  # no position
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def span(T, H, D, width, every, count, row, BD: tl.constexpr):
    """Of this program: batch, head, row of its summary, first position and count of positions; channels, which are."""
    i = tl.program_id(0).to(tl.int64)
    i_n = i % count
    i_h = i // count % H
    i_b = i // count // H
    first = i_n * every * width
    b_d = tl.arange(0, BD)
    return i_b, i_h, row + i_n, first, tl.minimum(T - first, width).to(tl.int32), b_d, b_d < D


@triton.jit
def load_tile(p_x, stride_t, start, n, b_d, m_d, ACC: tl.constexpr, BN: tl.constexpr):
    """Positions start, ..., those from n on zeros."""
    b_j = start + tl.arange(0, BN)
    m = (b_j < n)[:, None] & m_d[None, :]
    return tl.load(p_x + b_j.to(tl.int64)[:, None] * stride_t + b_d[None, :], mask=m, other=0.0).to(ACC)


@triton.jit
def pool_rows(
    p_x, stride_t, n, b_d, m_d, MEAN: tl.constexpr, ACC: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The pool of n positions, and which of them has the maximum."""
    b_best = tl.full([BD], 0.0 if MEAN else LOWEST, ACC)
    b_at = tl.full([BD], NEVER, tl.int32)
    b_nan = tl.full([BD], NEVER, tl.int32)
    for start in range(0, n, BN):
        b_x = load_tile(p_x, stride_t, start, n, b_d, m_d, ACC, BN)
        if MEAN:
            b_best += tl.sum(b_x, 0)
        else:
            b_j = (start + tl.arange(0, BN))[:, None]
            m_nan = (b_x != b_x) & (b_j < n)
            m_number = (b_x == b_x) & (b_j < n)
            b_most = tl.max(tl.where(m_number, b_x, LOWEST), 0)
            b_first = tl.min(tl.where(m_number & (b_x == b_most[None, :]), b_j, NEVER), 0)
            m_take = (b_most > b_best) | (b_at == NEVER)
            b_best = tl.where(m_take, b_most, b_best)
            b_at = tl.where(m_take, b_first, b_at)
            b_nan = tl.minimum(b_nan, tl.min(tl.where(m_nan, b_j, NEVER), 0))
    if MEAN:
        b_best = b_best / n
    else:
        b_best = tl.where(b_nan < NEVER, float("nan"), b_best)
        b_at = tl.where(b_nan < NEVER, b_nan, b_at)
    return b_best, b_at


@triton.jit
def scores(b_k, b_qhat, b_scale, start, n, BN: tl.constexpr):
    b_j = start + tl.arange(0, BN)
    return tl.where(b_j < n, tl.sum(b_k * b_qhat[None, :], 1) * b_scale, LOWEST)


@triton.jit(do_not_specialize=["T", "H", "S", "width", "every", "count", "row"])
def span_summaries_forward(
    p_q, p_k, p_v,  # [B, T, H, D]
    p_khat, p_vhat,  # [B, S, H, D], dense
    T, H, D, S, width, every, count, row, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    MEAN: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    b_scale = tl.zeros([1], ACC) + scale + scale_rest
    i_b, i_h, i_s, first, n, b_d, m_d = span(T, H, D, width, every, count, row, BD)
    p_q += i_b * stride_q_b + i_h * stride_q_h + first * stride_q_t
    p_k += i_b * stride_k_b + i_h * stride_k_h + first * stride_k_t
    p_v += i_b * stride_v_b + i_h * stride_v_h + first * stride_v_t
    b_qhat, _ = pool_rows(p_q, stride_q_t, n, b_d, m_d, MEAN, ACC, BN, BD)
    b_khat, _ = pool_rows(p_k, stride_k_t, n, b_d, m_d, MEAN, ACC, BN, BD)
    most = tl.full([1], LOWEST, ACC)
    total = tl.zeros([1], ACC)
    b_vhat = tl.zeros([BD], ACC)
    for start in range(0, n, BN):
        b_k = load_tile(p_k, stride_k_t, start, n, b_d, m_d, ACC, BN)
        b_s = scores(b_k, b_qhat, b_scale, start, n, BN)
        b_v = load_tile(p_v, stride_v_t, start, n, b_d, m_d, ACC, BN)
        now = tl.maximum(most, tl.max(b_s, 0))
        shift = tl.where(now == LOWEST, 0.0, now)
        b_p = tl.exp(b_s - shift)
        fade = tl.exp(most - shift)
        total = total * fade + tl.sum(b_p, 0)
        b_vhat = b_vhat * fade + tl.sum(b_p[:, None] * b_v, 0)
        most = now
    o_out = ((i_b * S + i_s) * H + i_h) * D + b_d
    STORED: tl.constexpr = p_khat.dtype.element_ty
    tl.store(p_khat + o_out, b_khat.to(STORED), mask=m_d)
    tl.store(p_vhat + o_out, (b_vhat / total).to(STORED), mask=m_d)


@triton.jit(do_not_specialize=["T", "H", "S", "width", "every", "count", "row"])
def span_summaries_backward(
    p_q, p_k, p_v,  # [B, T, H, D]
    p_dkhat, p_dvhat,  # [B, S, H, D], dense
    p_dq, p_dk, p_dv,  # [B, T, H, D], dense, in ACC
    T, H, D, S, width, every, count, row, scale, scale_rest,
    stride_q_b, stride_q_t, stride_q_h, stride_k_b, stride_k_t, stride_k_h, stride_v_b, stride_v_t, stride_v_h,
    MEAN: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """g_j = w_j (<v_j, dvhat> - mean)   dv_j = w_j dvhat   dk_j = scale g_j qhat   dqhat = scale sum_j g_j k_j

    and through the pools. ADD: to what is there.
    """
    ACC: tl.constexpr = tl.float64 if p_q.dtype.element_ty == tl.float64 else tl.float32
    b_scale = tl.zeros([1], ACC) + scale + scale_rest
    i_b, i_h, i_s, first, n, b_d, m_d = span(T, H, D, width, every, count, row, BD)
    p_q += i_b * stride_q_b + i_h * stride_q_h + first * stride_q_t
    p_k += i_b * stride_k_b + i_h * stride_k_h + first * stride_k_t
    p_v += i_b * stride_v_b + i_h * stride_v_h + first * stride_v_t
    o_in = ((i_b * S + i_s) * H + i_h) * D + b_d
    b_dkhat = tl.load(p_dkhat + o_in, mask=m_d, other=0.0).to(ACC)
    b_dvhat = tl.load(p_dvhat + o_in, mask=m_d, other=0.0).to(ACC)
    b_qhat, b_q_at = pool_rows(p_q, stride_q_t, n, b_d, m_d, MEAN, ACC, BN, BD)
    b_k_at = b_q_at
    if not MEAN:
        _, b_k_at = pool_rows(p_k, stride_k_t, n, b_d, m_d, MEAN, ACC, BN, BD)
    most = tl.full([1], LOWEST, ACC)
    total = tl.zeros([1], ACC)
    mean = tl.zeros([1], ACC)
    for start in range(0, n, BN):
        b_k = load_tile(p_k, stride_k_t, start, n, b_d, m_d, ACC, BN)
        b_s = scores(b_k, b_qhat, b_scale, start, n, BN)
        b_v = load_tile(p_v, stride_v_t, start, n, b_d, m_d, ACC, BN)
        now = tl.maximum(most, tl.max(b_s, 0))
        shift = tl.where(now == LOWEST, 0.0, now)
        b_p = tl.exp(b_s - shift)
        fade = tl.exp(most - shift)
        total = total * fade + tl.sum(b_p, 0)
        mean = mean * fade + tl.sum(b_p * tl.sum(b_v * b_dvhat[None, :], 1), 0)
        most = now
    mean = mean / total
    shift = tl.where(most == LOWEST, 0.0, most)
    b_dqhat = tl.zeros([BD], ACC)
    for start in range(0, n, BN):
        b_j = start + tl.arange(0, BN)
        b_k = load_tile(p_k, stride_k_t, start, n, b_d, m_d, ACC, BN)
        b_s = scores(b_k, b_qhat, b_scale, start, n, BN)
        b_v = load_tile(p_v, stride_v_t, start, n, b_d, m_d, ACC, BN)
        b_w = tl.exp(b_s - shift) / total
        b_g = b_scale * b_w * (tl.sum(b_v * b_dvhat[None, :], 1) - mean)
        b_g = tl.where(b_j < n, b_g, 0.0)
        b_dqhat += tl.sum(b_g[:, None] * b_k, 0)
        b_dk = b_g[:, None] * b_qhat[None, :]
        if MEAN:
            b_dk += (b_dkhat / n)[None, :]
        else:
            b_dk += tl.where(b_j[:, None] == b_k_at[None, :], b_dkhat[None, :], 0.0)
        b_dv = b_w[:, None] * b_dvhat[None, :]
        o_rows = ((i_b * T + first + b_j.to(tl.int64)) * H + i_h)[:, None] * D + b_d[None, :]
        m = (b_j < n)[:, None] & m_d[None, :]
        if ADD:
            b_dk += tl.load(p_dk + o_rows, mask=m, other=0.0).to(ACC)
            b_dv += tl.load(p_dv + o_rows, mask=m, other=0.0).to(ACC)
        tl.store(p_dk + o_rows, b_dk, mask=m)
        tl.store(p_dv + o_rows, b_dv, mask=m)
    for start in range(0, n, BN):
        b_j = start + tl.arange(0, BN)
        o_rows = ((i_b * T + first + b_j.to(tl.int64)) * H + i_h)[:, None] * D + b_d[None, :]
        m = (b_j < n)[:, None] & m_d[None, :]
        if MEAN:
            b_dq = tl.zeros([BN, BD], ACC) + (b_dqhat / n)[None, :]
        else:
            b_dq = tl.where(b_j[:, None] == b_q_at[None, :], b_dqhat[None, :], 0.0)
        if ADD:
            b_dq += tl.load(p_dq + o_rows, mask=m, other=0.0).to(ACC)
        tl.store(p_dq + o_rows, b_dq, mask=m)


@triton.jit
def column(H, D, stride, BC: tl.constexpr):
    """Of this program: batch, column; channels, their heads and places, and which are."""
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(H * D, BC)
    b_c = i % blocks * BC + tl.arange(0, BC)
    return i // blocks // stride, i // blocks % stride, b_c, b_c // D, b_c % D, b_c < H * D


@triton.jit
def takes(b_x, b_best, REVERSE: tl.constexpr):
    """Whether x, which comes after the best or (REVERSE) before it, is the maximum."""
    if REVERSE:
        return (b_x >= b_best) | (b_x != b_x)
    else:
        return (b_x > b_best) | ((b_x != b_x) & (b_best == b_best))


@triton.jit(do_not_specialize=["T", "H", "stride"])
def running_pool_forward(
    p_x,  # [B, T, H, D]
    p_y,  # [B, T, H, D], dense
    T, H, D, stride, stride_x_b, stride_x_t, stride_x_h,
    MEAN: tl.constexpr, REVERSE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    i_b, i_c, b_c, b_h, b_d, m_c = column(H, D, stride, BC)
    count = ((T - i_c + stride - 1) // stride).to(tl.int32)
    p_x += i_b * stride_x_b
    o_x = b_h * stride_x_h + b_d
    b_y = tl.zeros([BC], ACC)
    for done in range(0, count):
        step = count - 1 - done if REVERSE else done
        t = i_c + (step + 0 * i_c) * stride
        b_x = tl.load(p_x + t * stride_x_t + o_x, mask=m_c, other=0.0).to(ACC)
        if MEAN:
            b_y += b_x
            b_out = b_y / (done + 1)
        else:
            b_y = tl.where(takes(b_x, b_y, REVERSE) | (done + 0 * b_c == 0), b_x, b_y)
            b_out = b_y
        tl.store(p_y + (i_b * T + t) * H * D + b_c, b_out.to(p_y.dtype.element_ty), mask=m_c)


@triton.jit(do_not_specialize=["T", "H", "stride"])
def running_pool_backward(
    p_dy, p_x,  # [B, T, H, D]
    p_y, p_dx,  # [B, T, H, D], dense
    T, H, D, stride, stride_dy_b, stride_dy_t, stride_dy_h, stride_x_b, stride_x_t, stride_x_h,
    MEAN: tl.constexpr, REVERSE: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Against the walk of the forward, with the sum of what goes to the maximum so far."""
    ACC: tl.constexpr = tl.float64 if p_dy.dtype.element_ty == tl.float64 else tl.float32
    i_b, i_c, b_c, b_h, b_d, m_c = column(H, D, stride, BC)
    count = ((T - i_c + stride - 1) // stride).to(tl.int32)
    b_sum = tl.zeros([BC], ACC)
    for i in range(0, count):
        done = count - 1 - i
        step = count - 1 - done if REVERSE else done
        t = i_c + (step + 0 * i_c) * stride
        b_dy = tl.load(p_dy + i_b * stride_dy_b + t * stride_dy_t + b_h * stride_dy_h + b_d, mask=m_c, other=0.0)
        if MEAN:
            b_sum += b_dy.to(ACC) / (done + 1)
            b_dx = b_sum
        else:
            b_sum += b_dy.to(ACC)
            before = t + stride if REVERSE else t - stride
            m_before = m_c & (done + 0 * b_c > 0)
            b_x = tl.load(p_x + i_b * stride_x_b + t * stride_x_t + b_h * stride_x_h + b_d, mask=m_c, other=0.0)
            b_best = tl.load(p_y + (i_b * T + before) * H * D + b_c, mask=m_before, other=0.0)
            m_take = takes(b_x.to(ACC), b_best.to(ACC), REVERSE) | (done + 0 * b_c == 0)
            b_dx = tl.where(m_take, b_sum, 0.0)
            b_sum = tl.where(m_take, 0.0, b_sum)
        tl.store(p_dx + (i_b * T + t) * H * D + b_c, b_dx.to(p_dx.dtype.element_ty), mask=m_c)
