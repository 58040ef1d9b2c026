"""Triton kernels between the matrix products of large_chunk_ttt: everything that is element-wise, and norms of rows.

N matrices, of C rows, one a token, with F hidden channels, or of R rows with X channels, weights. Any strides but the
last. What is written may lie where something was read, element for element. s, s1 and s2 are silu and its derivatives.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LEAST = tl.constexpr(1e-5)  # norm of a row


@triton.jit
def narrow(x, O: tl.constexpr):  # noqa: E741  O for output, as elsewhere
    """Rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts the bits off."""
    if INTERPRETED and tl.bfloat16 == O:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(O)


@triton.jit
def block_of(i, size, BLOCK: tl.constexpr):
    """The block number i % blocks of `size`, as offsets and mask, and i // blocks."""
    blocks = (size + BLOCK - 1) // BLOCK
    o = (i % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return o, o < size, i // blocks


@triton.jit
def read(p_x, i_n, o_r, o_c, mask, stride_n, stride_r, REAL: tl.constexpr):
    o_x = i_n * stride_n + o_r[:, None] * stride_r + o_c[None, :]
    return tl.load(p_x + o_x, mask=mask, other=0.0).to(REAL)


@triton.jit
def write(p_x, i_n, o_r, o_c, mask, stride_n, stride_r, b_x):
    o_x = i_n * stride_n + o_r[:, None] * stride_r + o_c[None, :]
    tl.store(p_x + o_x, narrow(b_x, p_x.dtype.element_ty), mask=mask)


@triton.jit
def silu(x):
    """s, s1, s2"""
    gate = 1.0 / (1.0 + tl.exp(-x))
    rest = 1.0 - gate
    return x * gate, gate * (1.0 + x * rest), gate * rest * (2.0 + x * (rest - gate))


@triton.jit
def rate(p_lr, i_n, o_r, m_r, stride_n, stride_r, i, REAL: tl.constexpr):
    """lr of the matrix i, [C, 1]"""
    return tl.load(p_lr + i_n * stride_n + o_r * stride_r + i, mask=m_r, other=0.0).to(REAL)[:, None]


@triton.jit(do_not_specialize=["rows"])
def large_chunk_gate(
    p_y0,
    p_y2,
    p_out,
    rows,
    channels,
    stride_y0_n,
    stride_y0_r,
    stride_y2_n,
    stride_y2_r,
    stride_out_n,
    stride_out_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = s y2"""
    REAL: tl.constexpr = p_y0.dtype.element_ty
    o_c, m_c, i = block_of(tl.program_id(0).to(tl.int64), channels, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows, BLOCK_R)
    mask = m_r[:, None] & m_c[None, :]
    b_y0 = read(p_y0, i_n, o_r, o_c, mask, stride_y0_n, stride_y0_r, REAL)
    b_y2 = read(p_y2, i_n, o_r, o_c, mask, stride_y2_n, stride_y2_r, REAL)
    b_s, _, _ = silu(b_y0)
    write(p_out, i_n, o_r, o_c, mask, stride_out_n, stride_out_r, b_s * b_y2)


@triton.jit(do_not_specialize=["rows"])
def large_chunk_gate_backward(
    p_y0,
    p_y2,
    p_dh,
    p_dy0,
    p_dy2,
    p_h,
    rows,
    channels,
    stride_y0_n,
    stride_y0_r,
    stride_y2_n,
    stride_y2_r,
    stride_dh_n,
    stride_dh_r,
    stride_dy0_n,
    stride_dy0_r,
    stride_dy2_n,
    stride_dy2_r,
    stride_h_n,
    stride_h_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy0 = dh y2 s1, dy2 = dh s, h = s y2"""
    REAL: tl.constexpr = p_y0.dtype.element_ty
    o_c, m_c, i = block_of(tl.program_id(0).to(tl.int64), channels, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows, BLOCK_R)
    mask = m_r[:, None] & m_c[None, :]
    b_y0 = read(p_y0, i_n, o_r, o_c, mask, stride_y0_n, stride_y0_r, REAL)
    b_y2 = read(p_y2, i_n, o_r, o_c, mask, stride_y2_n, stride_y2_r, REAL)
    b_dh = read(p_dh, i_n, o_r, o_c, mask, stride_dh_n, stride_dh_r, REAL)
    b_s, b_s1, _ = silu(b_y0)
    write(p_dy0, i_n, o_r, o_c, mask, stride_dy0_n, stride_dy0_r, b_dh * b_y2 * b_s1)
    write(p_dy2, i_n, o_r, o_c, mask, stride_dy2_n, stride_dy2_r, b_dh * b_s)
    write(p_h, i_n, o_r, o_c, mask, stride_h_n, stride_h_r, b_s * b_y2)


@triton.jit(do_not_specialize=["rows"])
def large_chunk_learn(
    p_y0,
    p_y2,
    p_g,
    p_lr,  # [N, C, 3]
    p_e0,
    p_h,
    p_e2,
    rows,
    channels,
    stride_y0_n,
    stride_y0_r,
    stride_y2_n,
    stride_y2_r,
    stride_g_n,
    stride_g_r,
    stride_lr_n,
    stride_lr_r,
    stride_e0_n,
    stride_e0_r,
    stride_h_n,
    stride_h_r,
    stride_e2_n,
    stride_e2_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """e0 = lr0 g y2 s1, h = lr1 s y2, e2 = lr2 g s"""
    REAL: tl.constexpr = p_y0.dtype.element_ty
    o_c, m_c, i = block_of(tl.program_id(0).to(tl.int64), channels, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows, BLOCK_R)
    mask = m_r[:, None] & m_c[None, :]
    b_y0 = read(p_y0, i_n, o_r, o_c, mask, stride_y0_n, stride_y0_r, REAL)
    b_y2 = read(p_y2, i_n, o_r, o_c, mask, stride_y2_n, stride_y2_r, REAL)
    b_g = read(p_g, i_n, o_r, o_c, mask, stride_g_n, stride_g_r, REAL)
    b_lr0 = rate(p_lr, i_n, o_r, m_r, stride_lr_n, stride_lr_r, 0, REAL)
    b_lr1 = rate(p_lr, i_n, o_r, m_r, stride_lr_n, stride_lr_r, 1, REAL)
    b_lr2 = rate(p_lr, i_n, o_r, m_r, stride_lr_n, stride_lr_r, 2, REAL)
    b_s, b_s1, _ = silu(b_y0)
    write(p_e0, i_n, o_r, o_c, mask, stride_e0_n, stride_e0_r, b_lr0 * (b_g * b_y2 * b_s1))
    write(p_h, i_n, o_r, o_c, mask, stride_h_n, stride_h_r, b_lr1 * (b_s * b_y2))
    write(p_e2, i_n, o_r, o_c, mask, stride_e2_n, stride_e2_r, b_lr2 * (b_g * b_s))


@triton.jit(do_not_specialize=["rows"])
def large_chunk_learn_backward(
    p_y0,
    p_y2,
    p_g,
    p_lr,  # [N, C, 3]
    p_p0,
    p_p1,
    p_p2,
    p_dy0,
    p_dy2,
    p_dg,
    p_e0,
    p_h,
    p_e2,
    p_dlr,  # [N, C, 3]
    rows,
    channels,
    stride_y0_n,
    stride_y0_r,
    stride_y2_n,
    stride_y2_r,
    stride_g_n,
    stride_g_r,
    stride_lr_n,
    stride_lr_r,
    stride_p0_n,
    stride_p0_r,
    stride_p1_n,
    stride_p1_r,
    stride_p2_n,
    stride_p2_r,
    stride_dy0_n,
    stride_dy0_r,
    stride_dy2_n,
    stride_dy2_r,
    stride_dg_n,
    stride_dg_r,
    stride_e0_n,
    stride_e0_r,
    stride_h_n,
    stride_h_r,
    stride_e2_n,
    stride_e2_r,
    stride_dlr_n,
    stride_dlr_r,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `large_chunk_learn` writes, and the gradients of y0, y2, g and lr from p0, p1, p2: those of its results,
    which the products with gradients of weights give."""
    REAL: tl.constexpr = p_y0.dtype.element_ty
    o_r, m_r, i_n = block_of(tl.program_id(0).to(tl.int64), rows, BLOCK_R)
    b_lr0 = rate(p_lr, i_n, o_r, m_r, stride_lr_n, stride_lr_r, 0, REAL)
    b_lr1 = rate(p_lr, i_n, o_r, m_r, stride_lr_n, stride_lr_r, 1, REAL)
    b_lr2 = rate(p_lr, i_n, o_r, m_r, stride_lr_n, stride_lr_r, 2, REAL)
    b_dlr0 = tl.zeros([BLOCK_R], REAL)
    b_dlr1 = tl.zeros([BLOCK_R], REAL)
    b_dlr2 = tl.zeros([BLOCK_R], REAL)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < channels)[None, :]
        b_y0 = read(p_y0, i_n, o_r, o_c, mask, stride_y0_n, stride_y0_r, REAL)
        b_y2 = read(p_y2, i_n, o_r, o_c, mask, stride_y2_n, stride_y2_r, REAL)
        b_g = read(p_g, i_n, o_r, o_c, mask, stride_g_n, stride_g_r, REAL)
        b_p0 = read(p_p0, i_n, o_r, o_c, mask, stride_p0_n, stride_p0_r, REAL)
        b_p1 = read(p_p1, i_n, o_r, o_c, mask, stride_p1_n, stride_p1_r, REAL)
        b_p2 = read(p_p2, i_n, o_r, o_c, mask, stride_p2_n, stride_p2_r, REAL)
        b_s, b_s1, b_s2 = silu(b_y0)
        b_e0 = b_g * b_y2 * b_s1
        b_h = b_s * b_y2
        b_e2 = b_g * b_s
        b_dlr0 += tl.sum(b_e0 * b_p0, axis=1)
        b_dlr1 += tl.sum(b_h * b_p1, axis=1)
        b_dlr2 += tl.sum(b_e2 * b_p2, axis=1)
        b_p0 = b_p0 * b_lr0
        b_p1 = b_p1 * b_lr1
        b_p2 = b_p2 * b_lr2
        b_dg = b_p2 * b_s + b_p0 * b_y2 * b_s1
        b_dy2 = b_p1 * b_s + b_p0 * b_g * b_s1
        b_dy0 = (b_p1 * b_y2 + b_p2 * b_g) * b_s1 + b_p0 * b_g * b_y2 * b_s2
        write(p_dy0, i_n, o_r, o_c, mask, stride_dy0_n, stride_dy0_r, b_dy0)
        write(p_dy2, i_n, o_r, o_c, mask, stride_dy2_n, stride_dy2_r, b_dy2)
        write(p_dg, i_n, o_r, o_c, mask, stride_dg_n, stride_dg_r, b_dg)
        write(p_e0, i_n, o_r, o_c, mask, stride_e0_n, stride_e0_r, b_lr0 * b_e0)
        write(p_h, i_n, o_r, o_c, mask, stride_h_n, stride_h_r, b_lr1 * b_h)
        write(p_e2, i_n, o_r, o_c, mask, stride_e2_n, stride_e2_r, b_lr2 * b_e2)
    p_dlr += i_n * stride_dlr_n + o_r * stride_dlr_r
    tl.store(p_dlr, b_dlr0, mask=m_r)
    tl.store(p_dlr + 1, b_dlr1, mask=m_r)
    tl.store(p_dlr + 2, b_dlr2, mask=m_r)


@triton.jit
def large_chunk_renew(
    p_w,
    p_d,
    p_norms0,  # [N, R], read where NORM
    p_out,
    p_norms,  # [N, R], written where NORM
    p_copy,  # read where COPY
    rows,
    channels,
    stride_w_n,
    stride_w_r,
    stride_d_n,
    stride_d_r,
    stride_norms0_n,
    stride_out_n,
    stride_out_r,
    stride_norms_n,
    stride_copy_n,
    stride_copy_r,
    NORM: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """out = w + d, its rows with the norms norms0 where NORM, which keeps their own; and a copy for products."""
    REAL: tl.constexpr = p_w.dtype.element_ty
    o_r, m_r, i_n = block_of(tl.program_id(0).to(tl.int64), rows, BLOCK_R)
    b_scale = tl.zeros([BLOCK_R], REAL) + 1.0
    if NORM:
        b_sum = tl.zeros([BLOCK_R, BLOCK_C], REAL)
        for c in range(0, channels, BLOCK_C):
            o_c = c + tl.arange(0, BLOCK_C)
            mask = m_r[:, None] & (o_c < channels)[None, :]
            b_x = read(p_w, i_n, o_r, o_c, mask, stride_w_n, stride_w_r, REAL)
            b_x += read(p_d, i_n, o_r, o_c, mask, stride_d_n, stride_d_r, REAL)
            b_sum += b_x * b_x
        b_norm = tl.sqrt(tl.sum(b_sum, axis=1))
        b_wanted = tl.load(p_norms0 + i_n * stride_norms0_n + o_r, mask=m_r, other=0.0)
        tl.store(p_norms + i_n * stride_norms_n + o_r, b_norm, mask=m_r)
        # NaN stays: it is not less.
        b_scale = b_wanted / tl.where(b_norm < LEAST, LEAST, b_norm)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < channels)[None, :]
        b_x = read(p_w, i_n, o_r, o_c, mask, stride_w_n, stride_w_r, REAL)
        b_x += read(p_d, i_n, o_r, o_c, mask, stride_d_n, stride_d_r, REAL)
        b_x = b_x * b_scale[:, None]
        write(p_out, i_n, o_r, o_c, mask, stride_out_n, stride_out_r, b_x)
        if COPY:
            write(p_copy, i_n, o_r, o_c, mask, stride_copy_n, stride_copy_r, b_x)


@triton.jit
def large_chunk_renew_backward(
    p_dw,
    p_w,
    p_norms0,  # [N, R]
    p_norms,
    p_dnorms0,
    rows,
    channels,
    stride_dw_n,
    stride_dw_r,
    stride_w_n,
    stride_w_r,
    stride_norms0_n,
    stride_norms_n,
    stride_dnorms0_n,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dw of `large_chunk_renew`'s result w to that of w + d, in place; the gradient of norms0 is added to dnorms0."""
    REAL: tl.constexpr = p_w.dtype.element_ty
    o_r, m_r, i_n = block_of(tl.program_id(0).to(tl.int64), rows, BLOCK_R)
    b_along = tl.zeros([BLOCK_R, BLOCK_C], REAL)
    b_square = tl.zeros([BLOCK_R, BLOCK_C], REAL)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < channels)[None, :]
        b_w = read(p_w, i_n, o_r, o_c, mask, stride_w_n, stride_w_r, REAL)
        b_along += b_w * read(p_dw, i_n, o_r, o_c, mask, stride_dw_n, stride_dw_r, REAL)
        b_square += b_w * b_w
    b_inner = tl.sum(b_along, axis=1)
    b_length = tl.sum(b_square, axis=1)
    b_wanted = tl.load(p_norms0 + i_n * stride_norms0_n + o_r, mask=m_r, other=0.0)
    b_norm = tl.load(p_norms + i_n * stride_norms_n + o_r, mask=m_r, other=1.0)
    o_dnorms0 = i_n * stride_dnorms0_n + o_r
    b_dnorms0 = tl.load(p_dnorms0 + o_dnorms0, mask=m_r, other=0.0)
    b_dnorms0 += tl.where(b_wanted == 0, 0.0, b_inner / tl.where(b_wanted == 0, 1.0, b_wanted))
    tl.store(p_dnorms0 + o_dnorms0, b_dnorms0, mask=m_r)
    b_scale = b_wanted / tl.where(b_norm < LEAST, LEAST, b_norm)
    # Below the least norm the divisor is a constant.
    none = (b_norm < LEAST) | (b_length == 0)
    b_by = tl.where(none, 1.0, b_length)
    b_back = tl.where(none, 0.0, b_inner / b_by)
    # What is left along w, of rounding, would be multiplied like the rest: it is taken out as well.
    b_along = tl.zeros([BLOCK_R, BLOCK_C], REAL)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < channels)[None, :]
        b_w = read(p_w, i_n, o_r, o_c, mask, stride_w_n, stride_w_r, REAL)
        b_dw = read(p_dw, i_n, o_r, o_c, mask, stride_dw_n, stride_dw_r, REAL)
        b_along += b_w * (b_dw - b_back[:, None] * b_w)
    b_rest = tl.where(none, 0.0, tl.sum(b_along, axis=1) / b_by)
    for c in range(0, channels, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        mask = m_r[:, None] & (o_c < channels)[None, :]
        b_w = read(p_w, i_n, o_r, o_c, mask, stride_w_n, stride_w_r, REAL)
        b_dw = read(p_dw, i_n, o_r, o_c, mask, stride_dw_n, stride_dw_r, REAL)
        b_dw = b_dw - b_back[:, None] * b_w
        b_dw = b_scale[:, None] * (b_dw - b_rest[:, None] * b_w)
        write(p_dw, i_n, o_r, o_c, mask, stride_dw_n, stride_dw_r, b_dw)
