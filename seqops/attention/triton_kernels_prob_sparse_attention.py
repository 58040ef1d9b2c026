"""Triton kernels of prob_sparse_attention's parts: the measure of queries, the fill, and its gradients.

B batch, T time, H query heads, Hk key heads, D channels, U samples, N selected queries, n tiles of the time.

Running sums are those of tiles, added up in their order by whoever needs them, and a scan inside a tile: no sum depends
on timing, and none takes in what comes after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))


@triton.jit
def place(tiles, heads, blocks):
    """Batch row, head, tile, and block of channels of this program."""
    i = tl.program_id(0).to(tl.int64)
    i_r = i % blocks
    i_t = i // blocks % tiles
    i_h = i // blocks // tiles % heads
    return i // blocks // tiles // heads, i_h, i_t, i_r


@triton.jit(do_not_specialize=["T", "H", "Hk", "D", "U"])
def prob_sparse_measure(
    p_q,  # [B, T, H, D]
    p_k,  # [B, T, Hk, D]
    p_samples,  # [T, U]
    p_measure,  # [B, H, T]
    T,
    H,
    Hk,
    D,
    U,
    stride_q_b,
    stride_q_t,
    stride_q_h,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,  # BLOCK_D holds all channels
):
    """M_i = max_j <q_i, k_j> - (1/T) sum_j <q_i, k_j> over the samples j of i that are positions."""
    REAL: tl.constexpr = p_measure.dtype.element_ty
    i_b, i_h, i_t, _ = place(tl.cdiv(T, BLOCK_T), H, 1)
    b_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    b_d = tl.arange(0, BLOCK_D)
    m_t = b_t < T
    p_rows = p_q + i_b * stride_q_b + i_h * stride_q_h + b_t[:, None] * stride_q_t
    p_keys = p_k + i_b * stride_k_b + (i_h // (H // Hk)) * stride_k_h
    b_q = tl.zeros([BLOCK_T, BLOCK_D], dtype=REAL)
    if WHOLE:
        b_q = tl.load(p_rows + b_d[None, :], mask=m_t[:, None] & (b_d < D)[None, :], other=0.0).to(REAL)
    b_most = tl.full([BLOCK_T], -INF, dtype=REAL)
    b_sum = tl.zeros([BLOCK_T], dtype=REAL)
    for u in range(U):
        b_j = tl.load(p_samples + b_t * U + u, mask=m_t, other=-1).to(tl.int64)
        m_j = (b_j >= 0) & (b_j < T)
        o_k = tl.where(m_j, b_j, 0)[:, None] * stride_k_t
        if WHOLE:
            b_k = tl.load(p_keys + o_k + b_d[None, :], mask=m_j[:, None] & (b_d < D)[None, :], other=0.0).to(REAL)
            b_score = tl.sum(b_q * b_k, axis=1)
        else:
            b_score = tl.zeros([BLOCK_T], dtype=REAL)
            for d in range(0, D, BLOCK_D):
                m_d = (d + b_d < D)[None, :]
                b_q = tl.load(p_rows + d + b_d[None, :], mask=m_t[:, None] & m_d, other=0.0).to(REAL)
                b_k = tl.load(p_keys + o_k + d + b_d[None, :], mask=m_j[:, None] & m_d, other=0.0).to(REAL)
                b_score += tl.sum(b_q * b_k, axis=1)
        b_most = tl.where(m_j & (b_score > b_most), b_score, b_most)
        b_sum += tl.where(m_j, b_score, 0.0)  # NaN stays in the sum
    # -0 becomes 0, which ties with it.
    b_measure = b_most - b_sum / T.to(REAL) + 0.0
    tl.store(p_measure + (i_b * H + i_h) * T + b_t, b_measure, mask=m_t)


@triton.jit
def load_unselected(p_x, p_slot, b_t, m_t, o_d, m_d, T, stride_x_t, REAL: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK_T, BLOCK_D] steps of one head; MASKED: 0 for those that were selected."""
    m_x = m_t
    if MASKED:
        m_x = m_t & (tl.load(p_slot + b_t, mask=m_t, other=0) < 0)
    return tl.load(p_x + b_t[:, None] * stride_x_t + o_d[None, :], mask=m_x[:, None] & m_d[None, :], other=0.0).to(REAL)


@triton.jit
def load_group(
    p_x,
    p_slot,
    i_b,
    i_k,
    b_t,
    o_d,
    T,
    H,
    group,
    D,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    REAL: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The sum of a group's heads."""
    b_x = tl.zeros([BLOCK_T, BLOCK_D], dtype=REAL)
    for g in range(group):
        i_h = i_k * group + g
        p_head = p_x + i_b * stride_x_b + i_h * stride_x_h
        p_places = p_slot + (i_b * H + i_h) * T
        b_x += load_unselected(p_head, p_places, b_t, b_t < T, o_d, o_d < D, T, stride_x_t, REAL, MASKED)
    return b_x


@triton.jit(do_not_specialize=["T", "H", "Hk", "D"])
def prob_sparse_sums(
    p_x,  # [B, T, H, D]
    p_slot,  # [B, H, T], read where MASKED
    p_sums,  # [B, Hk, n, D]
    T,
    H,  # of x: the key heads, or the query heads where MASKED
    Hk,
    D,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Of each tile: the sum of v, or (MASKED) of the gradients of rows that were not selected."""
    REAL: tl.constexpr = p_sums.dtype.element_ty
    n = tl.cdiv(T, BLOCK_T)
    i_b, i_k, i_t, i_r = place(n, Hk, tl.cdiv(D, BLOCK_D))
    b_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_r * BLOCK_D + tl.arange(0, BLOCK_D)
    b_x = load_group(
        p_x,
        p_slot,
        i_b,
        i_k,
        b_t,
        o_d,
        T,
        H,
        H // Hk,
        D,
        stride_x_b,
        stride_x_t,
        stride_x_h,
        REAL,
        MASKED,
        BLOCK_T,
        BLOCK_D,
    )
    tl.store(p_sums + ((i_b * Hk + i_k) * n + i_t) * D + o_d, tl.sum(b_x, axis=0), mask=o_d < D)


@triton.jit
def add_tiles(p_sums, first, end, D, o_d, REAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The sums of tiles first to end - 1."""
    b_sum = tl.zeros([BLOCK_D], dtype=REAL)
    for i in range(first, end, BLOCK_N):
        b_i = i + tl.arange(0, BLOCK_N)
        m = (b_i < end)[:, None] & (o_d < D)[None, :]
        b_sum += tl.sum(tl.load(p_sums + b_i[:, None] * D + o_d[None, :], mask=m, other=0.0), axis=0)
    return b_sum


@triton.jit(do_not_specialize=["T", "H", "Hk", "D", "N"])
def prob_sparse_fill(
    p_v,  # [B, T, Hk, D]
    p_rows,  # [B, N, H, D]
    p_slot,  # [B, H, T]: which of the rows, or -1
    p_sums,  # [B, Hk, n, D]
    p_o,  # [B, T, H, D]
    T,
    H,
    Hk,
    D,
    N,
    stride_v_b,
    stride_v_t,
    stride_v_h,
    CAUSAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    REAL: tl.constexpr = p_sums.dtype.element_ty
    n = tl.cdiv(T, BLOCK_T)
    i_b, i_k, i_t, i_r = place(n, Hk, tl.cdiv(D, BLOCK_D))
    group = H // Hk
    b_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_r * BLOCK_D + tl.arange(0, BLOCK_D)
    m_t = b_t < T
    m_d = o_d < D
    p_own = p_sums + (i_b * Hk + i_k) * n * D
    if CAUSAL:
        p_head = p_v + i_b * stride_v_b + i_k * stride_v_h
        b_v = load_unselected(p_head, p_slot, b_t, m_t, o_d, m_d, T, stride_v_t, REAL, False)
        b_past = add_tiles(p_own, 0, i_t, D, o_d, REAL, BLOCK_N, BLOCK_D)
        b_fill = tl.cumsum(b_v, axis=0) + b_past[None, :]
    else:
        b_mean = add_tiles(p_own, 0, n, D, o_d, REAL, BLOCK_N, BLOCK_D) / T.to(REAL)
        b_fill = b_mean[None, :] + tl.zeros([BLOCK_T, BLOCK_D], dtype=REAL)
    for g in range(group):
        i_h = i_k * group + g
        b_slot = tl.load(p_slot + (i_b * H + i_h) * T + b_t, mask=m_t, other=-1).to(tl.int64)
        m_row = b_slot >= 0
        o_row = ((i_b * N + tl.where(m_row, b_slot, 0)) * H + i_h) * D
        b_row = tl.load(p_rows + o_row[:, None] + o_d[None, :], mask=m_row[:, None] & m_d[None, :], other=0.0)
        b_o = tl.where(m_row[:, None], b_row.to(REAL), b_fill)
        o_o = ((i_b * T + b_t) * H + i_h) * D
        tl.store(p_o + o_o[:, None] + o_d[None, :], b_o.to(p_o.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit(do_not_specialize=["T", "H", "Hk", "D"])
def prob_sparse_fill_backward(
    p_grad,  # [B, T, H, D]
    p_slot,  # [B, H, T]
    p_sums,  # [B, Hk, n, D], of the gradients of rows that were not selected
    p_dv,  # [B, T, Hk, D]
    T,
    H,
    Hk,
    D,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    CAUSAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    REAL: tl.constexpr = p_sums.dtype.element_ty
    n = tl.cdiv(T, BLOCK_T)
    i_b, i_k, i_t, i_r = place(n, Hk, tl.cdiv(D, BLOCK_D))
    b_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = i_r * BLOCK_D + tl.arange(0, BLOCK_D)
    p_own = p_sums + (i_b * Hk + i_k) * n * D
    if CAUSAL:
        b_x = load_group(
            p_grad,
            p_slot,
            i_b,
            i_k,
            b_t,
            o_d,
            T,
            H,
            H // Hk,
            D,
            stride_x_b,
            stride_x_t,
            stride_x_h,
            REAL,
            True,
            BLOCK_T,
            BLOCK_D,
        )
        b_later = add_tiles(p_own, i_t + 1, n, D, o_d, REAL, BLOCK_N, BLOCK_D)
        b_dv = tl.cumsum(b_x, axis=0, reverse=True) + b_later[None, :]
    else:
        b_sum = add_tiles(p_own, 0, n, D, o_d, REAL, BLOCK_N, BLOCK_D) / T.to(REAL)
        b_dv = b_sum[None, :] + tl.zeros([BLOCK_T, BLOCK_D], dtype=REAL)
    o_dv = ((i_b * T + b_t) * Hk + i_k) * D
    mask = (b_t < T)[:, None] & (o_d < D)[None, :]
    tl.store(p_dv + o_dv[:, None] + o_d[None, :], b_dv.to(p_dv.dtype.element_ty), mask=mask)
