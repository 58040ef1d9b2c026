"""Triton kernels that merge two parts of a softmax.

B batch, T time, H heads, D channels. A program owns ROWS rows of all B T H, a row being one head of one step, and walks
their channels; w_n = exp(lse_n - lse) is computed once a row. Device memory is the limit: 3 tensors of the size of o in
the forward, 5 in the backward.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place_rows(B, T, H, ROWS: tl.constexpr):
    """Batch row, step and head of the program's rows, and which of them there are."""
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return i // H // T, i // H % T, i % H, i < B * T * H


@triton.jit
def weigh(b_first, b_second):
    """w_1, w_2 and lse, from lse_1 and lse_2."""
    INF: tl.constexpr = float("inf")
    b_most = tl.where((b_first > b_second) | (b_first != b_first), b_first, b_second)
    b_shift = tl.where(b_most == -INF, 0.0, b_most)
    b_one, b_two = tl.exp(b_first - b_shift), tl.exp(b_second - b_shift)
    b_total = b_one + b_two
    b_divisor = tl.where(b_total == 0, 1.0, b_total)
    b_lse = tl.where(b_total == 0, -INF, b_shift + tl.log(b_divisor))
    return b_one / b_divisor, b_two / b_divisor, b_lse


@triton.jit(do_not_specialize=["B", "T", "H", "D"])
def merge_attention_forward(
    p_o1,  # [B, T, H, D]
    p_lse1,  # [B, H, T]
    p_o2,
    p_lse2,
    p_o,  # contiguous, as the others that are written
    p_lse,
    B,
    T,
    H,
    D,
    stride_o1_b,
    stride_o1_t,
    stride_o1_h,
    stride_o2_b,
    stride_o2_t,
    stride_o2_h,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    REAL: tl.constexpr = p_lse.dtype.element_ty
    i_b, i_t, i_h, m_i = place_rows(B, T, H, ROWS)
    o_lse = (i_b * H + i_h) * T + i_t
    b_first = tl.load(p_lse1 + o_lse, mask=m_i, other=0.0)
    b_second = tl.load(p_lse2 + o_lse, mask=m_i, other=0.0)
    b_w1, b_w2, b_lse = weigh(b_first, b_second)
    tl.store(p_lse + o_lse, b_lse, mask=m_i)
    # A part without keys is left out, whatever its o holds.
    m_1 = (m_i & (b_first != -float("inf")))[:, None]
    m_2 = (m_i & (b_second != -float("inf")))[:, None]
    o_1 = (i_b * stride_o1_b + i_t * stride_o1_t + i_h * stride_o1_h)[:, None]
    o_2 = (i_b * stride_o2_b + i_t * stride_o2_t + i_h * stride_o2_h)[:, None]
    o_o = (((i_b * T + i_t) * H + i_h) * D)[:, None]
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D))[None, :]
        m_d = o_d < D
        b_1 = tl.load(p_o1 + o_1 + o_d, mask=m_1 & m_d, other=0.0).to(REAL)
        b_2 = tl.load(p_o2 + o_2 + o_d, mask=m_2 & m_d, other=0.0).to(REAL)
        b_o = b_w1[:, None] * b_1 + b_w2[:, None] * b_2
        tl.store(p_o + o_o + o_d, b_o.to(p_o.dtype.element_ty), mask=m_i[:, None] & m_d)


@triton.jit(do_not_specialize=["B", "T", "H", "D"])
def merge_attention_backward(
    p_grad_o,  # [B, T, H, D], where GRAD_O
    p_grad_lse,  # [B, H, T], where GRAD_LSE
    p_o1,
    p_lse1,
    p_o2,
    p_lse2,
    p_do1,  # contiguous, as the others that are written
    p_dlse1,
    p_do2,
    p_dlse2,
    B,
    T,
    H,
    D,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_o1_b,
    stride_o1_t,
    stride_o1_h,
    stride_o2_b,
    stride_o2_t,
    stride_o2_h,
    GRAD_O: tl.constexpr,
    GRAD_LSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """do_n = w_n do; dlse_1 = w_1 w_2 <do, o_1 - o_2> + w_1 dlse, and dlse_2 with 1 and 2 exchanged."""
    REAL: tl.constexpr = p_dlse1.dtype.element_ty
    i_b, i_t, i_h, m_i = place_rows(B, T, H, ROWS)
    o_lse = (i_b * H + i_h) * T + i_t
    b_first = tl.load(p_lse1 + o_lse, mask=m_i, other=0.0)
    b_second = tl.load(p_lse2 + o_lse, mask=m_i, other=0.0)
    b_w1, b_w2, _ = weigh(b_first, b_second)
    m_1 = m_i & (b_first != -float("inf"))
    m_2 = m_i & (b_second != -float("inf"))
    m_both = (m_1 & m_2)[:, None]
    o_1 = (i_b * stride_o1_b + i_t * stride_o1_t + i_h * stride_o1_h)[:, None]
    o_2 = (i_b * stride_o2_b + i_t * stride_o2_t + i_h * stride_o2_h)[:, None]
    o_g = (i_b * stride_g_b + i_t * stride_g_t + i_h * stride_g_h)[:, None]
    o_o = (((i_b * T + i_t) * H + i_h) * D)[:, None]
    b_dot = tl.zeros([ROWS], dtype=REAL)
    for d in range(0, D, BLOCK_D):
        o_d = (d + tl.arange(0, BLOCK_D))[None, :]
        m_d = o_d < D
        if GRAD_O:
            b_g = tl.load(p_grad_o + o_g + o_d, mask=m_i[:, None] & m_d, other=0.0).to(REAL)
            b_1 = tl.load(p_o1 + o_1 + o_d, mask=m_both & m_d, other=0.0).to(REAL)
            b_2 = tl.load(p_o2 + o_2 + o_d, mask=m_both & m_d, other=0.0).to(REAL)
            b_dot += tl.sum(tl.where(m_both, b_g * (b_1 - b_2), 0.0), 1)
        else:
            b_g = tl.zeros([ROWS, BLOCK_D], dtype=REAL)
        b_do1 = tl.where(m_1[:, None], b_w1[:, None] * b_g, 0.0)
        b_do2 = tl.where(m_2[:, None], b_w2[:, None] * b_g, 0.0)
        tl.store(p_do1 + o_o + o_d, b_do1.to(p_do1.dtype.element_ty), mask=m_i[:, None] & m_d)
        tl.store(p_do2 + o_o + o_d, b_do2.to(p_do2.dtype.element_ty), mask=m_i[:, None] & m_d)
    b_apart = tl.where(m_1 & m_2, b_w1 * b_w2 * b_dot, 0.0)
    b_grad = tl.zeros([ROWS], dtype=REAL)
    if GRAD_LSE:
        b_grad = tl.load(p_grad_lse + o_lse, mask=m_i, other=0.0)
    tl.store(p_dlse1 + o_lse, tl.where(m_1, b_w1 * b_grad + b_apart, 0.0), mask=m_i)
    tl.store(p_dlse2 + o_lse, tl.where(m_2, b_w2 * b_grad - b_apart, 0.0), mask=m_i)
