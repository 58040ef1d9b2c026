"""Triton kernels of pointer_scores: scores, their log-softmax, and the gradients.

B batch, Tq queries, Tk keys, A channels. A tile of pairs [BLOCK_Q, BLOCK_K] and a few channels of each are in registers
at a time; a program owns what it writes, so every sum has one order. `lengths` [B] are kept between 0 and Tk here.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def tanh(x):
    """No call of a library; nothing overflows."""
    b_e = tl.exp(-2.0 * tl.abs(x))
    b_t = (1.0 - b_e) / (1.0 + b_e)
    return tl.where(x < 0, -b_t, b_t)


@triton.jit
def length_of(p_lengths, i_b, Tk):
    return tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 0), Tk)


@triton.jit
def load_rows(p_x, b_t, m_t, b_a, A, stride_t, REAL: tl.constexpr):
    """[rows, channels]"""
    mask = m_t[:, None] & (b_a < A)[None, :]
    return tl.load(p_x + b_t[:, None] * stride_t + b_a[None, :], mask=mask, other=0.0).to(REAL)


@triton.jit
def products(
    p_q,
    p_k,
    b_i,
    m_i,
    b_j,
    m_j,
    A,
    stride_q_t,
    stride_k_t,
    REAL: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """<query_i, key_j>"""
    b_x = tl.zeros([BLOCK_Q, BLOCK_K], dtype=REAL)
    for a in range(0, A, BLOCK_A):
        b_a = a + tl.arange(0, BLOCK_A)
        b_q = load_rows(p_q, b_i, m_i, b_a, A, stride_q_t, REAL)
        b_k = load_rows(p_k, b_j, m_j, b_a, A, stride_k_t, REAL)
        b_x += tl.dot(b_q, tl.trans(b_k), out_dtype=REAL, input_precision="ieee")
    return b_x


@triton.jit(do_not_specialize=["Tq", "Tk", "A"])
def pointer_products(
    p_query,  # [B, Tq, A]
    p_key,  # [B, Tk, A]
    p_weight,  # [A], read where not CLIPPED
    p_lengths,  # [B] int64
    p_scores,  # [B, Tq, Tk]
    clip,  # as a sum of two
    clip_rest,
    Tq,
    Tk,
    A,
    stride_q_b,
    stride_q_t,
    stride_k_b,
    stride_k_t,
    CLIPPED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """s_ij of keys within the length."""
    REAL: tl.constexpr = p_scores.dtype.element_ty
    n_k = tl.cdiv(Tk, BLOCK_K)
    n_q = tl.cdiv(Tq, BLOCK_Q)
    i = tl.program_id(0).to(tl.int64)
    i_b = i // n_k // n_q
    length = length_of(p_lengths, i_b, Tk)
    b_i = i // n_k % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_j = i % n_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_i = b_i < Tq
    m_j = b_j < length
    p_q = p_query + i_b * stride_q_b
    p_k = p_key + i_b * stride_k_b
    if CLIPPED:
        b_x = products(p_q, p_k, b_i, m_i, b_j, m_j, A, stride_q_t, stride_k_t, REAL, BLOCK_Q, BLOCK_K, BLOCK_A)
        b_s = (tl.zeros([], dtype=REAL) + clip + clip_rest) * tanh(b_x / tl.sqrt(A.to(REAL)))
    else:
        b_s = tl.zeros([BLOCK_Q, BLOCK_K], dtype=REAL)
        for a in range(0, A, BLOCK_A):
            b_a = a + tl.arange(0, BLOCK_A)
            b_q = load_rows(p_q, b_i, m_i, b_a, A, stride_q_t, REAL)
            b_k = load_rows(p_k, b_j, m_j, b_a, A, stride_k_t, REAL)
            b_w = tl.load(p_weight + b_a, mask=b_a < A, other=0.0).to(REAL)
            b_s += tl.sum(tanh(b_q[:, None, :] + b_k[None, :, :]) * b_w[None, None, :], axis=2)
    o_s = (i_b * Tq + b_i) * Tk
    tl.store(p_scores + o_s[:, None] + b_j[None, :], b_s.to(REAL), mask=m_i[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["Tq", "Tk"])
def pointer_softmax(
    p_scores,  # [B, Tq, Tk]: the scores; log_p where EXACT
    p_lengths,
    p_log_p,  # [B, Tq, Tk]
    Tq,
    Tk,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program. What it overwrites it has read at the same place."""
    REAL: tl.constexpr = p_scores.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    length = length_of(p_lengths, row // Tq, Tk)
    b_most = tl.full([BLOCK], -INF, dtype=REAL)
    for j in range(0, length, BLOCK):
        b_j = j + tl.arange(0, BLOCK)
        b_s = tl.load(p_scores + row * Tk + b_j, mask=b_j < length, other=-INF)
        b_most = tl.where(b_s > b_most, b_s, b_most)
    most = tl.where(length > 0, tl.max(b_most, axis=0), 0.0)
    b_sum = tl.zeros([BLOCK], dtype=REAL)
    for j in range(0, length, BLOCK):
        b_j = j + tl.arange(0, BLOCK)
        b_s = tl.load(p_scores + row * Tk + b_j, mask=b_j < length, other=-INF)
        b_sum += tl.where(b_j < length, tl.exp(b_s - most), 0.0)
    rest = tl.log(tl.where(length > 0, tl.sum(b_sum, axis=0), 1.0))
    for j in range(0, Tk, BLOCK):
        b_j = j + tl.arange(0, BLOCK)
        b_s = tl.load(p_scores + row * Tk + b_j, mask=b_j < length, other=-INF)
        b_log_p = tl.where(b_j < length, (b_s - most) - rest, -INF)
        if EXACT:
            tl.store(p_scores + row * Tk + b_j, b_log_p, mask=b_j < Tk)
        tl.store(p_log_p + row * Tk + b_j, b_log_p.to(p_log_p.dtype.element_ty), mask=b_j < Tk)


@triton.jit(do_not_specialize=["Tq", "Tk"])
def pointer_sums(
    p_grad,  # [B, Tq, Tk]
    p_lengths,
    p_sums,  # [B, Tq]
    Tq,
    Tk,
    stride_g_b,
    stride_g_t,
    BLOCK: tl.constexpr,
):
    """G_i = sum_j g_ij, one row a program."""
    REAL: tl.constexpr = p_sums.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    length = length_of(p_lengths, row // Tq, Tk)
    p_row = p_grad + row // Tq * stride_g_b + row % Tq * stride_g_t
    b_sum = tl.zeros([BLOCK], dtype=REAL)
    for j in range(0, length, BLOCK):
        b_j = j + tl.arange(0, BLOCK)
        b_sum += tl.load(p_row + b_j, mask=b_j < length, other=0.0).to(REAL)
    tl.store(p_sums + row, tl.sum(b_sum, axis=0))


@triton.jit(do_not_specialize=["Tq", "Tk", "A"])
def pointer_score_gradient(
    p_grad,  # [B, Tq, Tk]
    p_log_p,  # [B, Tq, Tk]
    p_sums,  # [B, Tq]
    p_query,
    p_key,
    p_lengths,
    p_ds,  # [B, Tq, Tk]
    clip,  # as a sum of two
    clip_rest,
    Tq,
    Tk,
    A,
    stride_g_b,
    stride_g_t,
    stride_q_b,
    stride_q_t,
    stride_k_b,
    stride_k_t,
    CLIPPED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """ds_ij = g_ij - p_ij G_i; for the clipped dot the gradient of the dot product. Past the length 0."""
    REAL: tl.constexpr = p_ds.dtype.element_ty
    n_k = tl.cdiv(Tk, BLOCK_K)
    n_q = tl.cdiv(Tq, BLOCK_Q)
    i = tl.program_id(0).to(tl.int64)
    i_b = i // n_k // n_q
    length = length_of(p_lengths, i_b, Tk)
    b_i = i // n_k % n_q * BLOCK_Q + tl.arange(0, BLOCK_Q)
    b_j = i % n_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_i = b_i < Tq
    m_j = b_j < length
    mask = m_i[:, None] & m_j[None, :]
    o_s = ((i_b * Tq + b_i) * Tk)[:, None] + b_j[None, :]
    o_g = i_b * stride_g_b + (b_i * stride_g_t)[:, None] + b_j[None, :]
    b_sum = tl.load(p_sums + i_b * Tq + b_i, mask=m_i, other=0.0)
    b_p = tl.exp(tl.load(p_log_p + o_s, mask=mask, other=-INF))
    b_ds = tl.load(p_grad + o_g, mask=mask, other=0.0).to(REAL) - b_p * b_sum[:, None]
    if CLIPPED:
        p_q = p_query + i_b * stride_q_b
        p_k = p_key + i_b * stride_k_b
        b_x = products(p_q, p_k, b_i, m_i, b_j, m_j, A, stride_q_t, stride_k_t, REAL, BLOCK_Q, BLOCK_K, BLOCK_A)
        root = tl.sqrt(A.to(REAL))
        b_t = tanh(b_x / root)
        b_ds = b_ds * (1.0 - b_t) * (1.0 + b_t) * ((tl.zeros([], dtype=REAL) + clip + clip_rest) / root)
    b_ds = tl.where(m_j[None, :], b_ds, 0.0)
    tl.store(p_ds + o_s, b_ds.to(REAL), mask=m_i[:, None] & (b_j < Tk)[None, :])


@triton.jit(do_not_specialize=["Tq", "Tk", "A"])
def pointer_gradient(
    p_x,  # [B, Tx, A], whose gradient this is: queries, or keys where KEYS
    p_y,  # [B, Ty, A], the others
    p_weight,  # [A], read where not CLIPPED
    p_ds,  # [B, Tq, Tk]
    p_lengths,
    p_dx,  # [B, Tx, A]
    p_dweight,  # [B, n, A], written where not CLIPPED and not KEYS: of each tile of queries
    Tq,
    Tk,
    A,
    stride_x_b,
    stride_x_t,
    stride_y_b,
    stride_y_t,
    KEYS: tl.constexpr,
    CLIPPED: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """dx_ia = w_a sum_j ds_ij (1 - tanh^2), or sum_j ds_ij y_ja; dw_a = sum_ij ds_ij tanh."""
    REAL: tl.constexpr = p_ds.dtype.element_ty
    Tx = Tk if KEYS else Tq
    n_a = tl.cdiv(A, BLOCK_A)
    n_x = tl.cdiv(Tx, BLOCK_X)
    i = tl.program_id(0).to(tl.int64)
    i_b = i // n_a // n_x
    i_x = i // n_a % n_x
    length = length_of(p_lengths, i_b, Tk)
    b_x = i_x * BLOCK_X + tl.arange(0, BLOCK_X)
    b_a = i % n_a * BLOCK_A + tl.arange(0, BLOCK_A)
    if KEYS:
        m_x = b_x < length
        end = tl.where(i_x * BLOCK_X < length, Tq, 0)
        stride_s_x = 1
        stride_s_y = Tk
    else:
        m_x = b_x < Tq
        end = length
        stride_s_x = Tk
        stride_s_y = 1
    p_pairs = p_ds + i_b * Tq * Tk
    b_own = load_rows(p_x + i_b * stride_x_b, b_x, m_x, b_a, A, stride_x_t, REAL)
    b_dx = tl.zeros([BLOCK_X, BLOCK_A], dtype=REAL)
    b_dw = tl.zeros([BLOCK_A], dtype=REAL)
    for y in range(0, end, BLOCK_Y):
        b_y = y + tl.arange(0, BLOCK_Y).to(tl.int64)
        m_y = b_y < end
        o_s = b_x[:, None] * stride_s_x + b_y[None, :] * stride_s_y
        b_ds = tl.load(p_pairs + o_s, mask=m_x[:, None] & m_y[None, :], other=0.0)
        b_other = load_rows(p_y + i_b * stride_y_b, b_y, m_y, b_a, A, stride_y_t, REAL)
        if CLIPPED:
            b_dx += tl.dot(b_ds, b_other, out_dtype=REAL, input_precision="ieee")
        else:
            b_t = tanh(b_own[:, None, :] + b_other[None, :, :])
            b_dx += tl.sum(b_ds[:, :, None] * (1.0 - b_t) * (1.0 + b_t), axis=1)
            if not KEYS:
                b_dw += tl.sum(tl.sum(b_ds[:, :, None] * b_t, axis=1), axis=0)
    if not CLIPPED:
        b_w = tl.load(p_weight + b_a, mask=b_a < A, other=0.0).to(REAL)
        b_dx = b_dx * b_w[None, :]
        if not KEYS:
            tl.store(p_dweight + (i_b * n_x + i_x) * A + b_a, b_dw, mask=b_a < A)
    # A pair that does not exist adds nothing, even times what is infinite.
    b_dx = tl.where((end > 0) & m_x[:, None], b_dx, 0.0)
    o_dx = (i_b * Tx + b_x) * A
    mask = (b_x < Tx)[:, None] & (b_a < A)[None, :]
    tl.store(p_dx + o_dx[:, None] + b_a[None, :], b_dx.to(p_dx.dtype.element_ty), mask=mask)
