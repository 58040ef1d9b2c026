"""Triton kernels of cluster_assign.

B batch, T tokens, H heads, Hx heads of x (each of H / Hx heads in turn), K clusters, D channels. A program is a tile of
tokens of one (b, h); it goes over the clusters a tile at a time and keeps the best of each token, so that scores are
stored only where lists need them. Products of float32 and float64 are exact, whatever torch says of tf32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "H", "Hx", "K", "D"])
def nearest_cluster(
    p_x,  # [B, T, Hx, D]
    p_centroids,  # [H, K, D]
    p_nearest,  # [B, T, H]
    p_scores,  # [B, H, K, T], where SCORES
    T,
    H,
    Hx,
    K,
    D,
    stride_x_b,
    stride_x_t,
    stride_x_h,
    SCORES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles = tl.cdiv(T, BLOCK_T)
    i = tl.program_id(0).to(tl.int64)
    i_b, i_h, i_tile = i // tiles // H, i // tiles % H, i % tiles
    i_t = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = i_t < T
    REAL: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    o_x = i_b * stride_x_b + (i_h // (H // Hx)) * stride_x_h + i_t * stride_x_t
    b_best = tl.zeros([BLOCK_T], dtype=REAL) - float("inf")
    b_nearest = tl.zeros([BLOCK_T], dtype=tl.int32)
    for k in range(0, K, BLOCK_K):
        i_k = k + tl.arange(0, BLOCK_K)
        m_k = i_k < K
        o_k = (i_h * K + i_k) * D
        b_s = tl.zeros([BLOCK_T, BLOCK_K], dtype=REAL)
        for d in range(0, D, BLOCK_D):
            i_d = d + tl.arange(0, BLOCK_D)
            m_d = i_d < D
            b_x = tl.load(p_x + o_x[:, None] + i_d[None, :], mask=m_t[:, None] & m_d[None, :], other=0.0).to(REAL)
            b_mu = tl.load(p_centroids + o_k[None, :] + i_d[:, None], mask=m_k[None, :] & m_d[:, None], other=0.0)
            b_mu = b_mu.to(REAL)
            if tl.float64 == REAL:
                b_s += tl.sum(b_x[:, :, None] * b_mu[None, :, :], 1)
            else:
                b_s += tl.dot(b_x, b_mu, input_precision="ieee")
        if SCORES:
            o_s = (i_b * H * K + i_h * K + i_k).to(tl.int64) * T
            tl.store(p_scores + o_s[None, :] + i_t[:, None], b_s, mask=m_t[:, None] & m_k[None, :])
        # NaN before all, of equal scores the lower cluster. A rank says the same in numbers that compare.
        b_nan = (b_s != b_s) & m_k[None, :]
        b_value = tl.where(b_nan | ~m_k[None, :], -float("inf"), b_s)
        b_most = tl.max(b_value, 1)
        b_any = tl.max(b_nan.to(tl.int32), 1) > 0
        b_wanted = tl.where(b_any[:, None], b_nan, (b_value == b_most[:, None]) & m_k[None, :])
        b_first = tl.min(tl.where(b_wanted, i_k[None, :], K), 1).to(tl.int32)
        b_better = (b_best == b_best) & (b_any | (b_most > b_best))
        b_nearest = tl.where(b_better, b_first, b_nearest)
        b_best = tl.where(b_better, tl.where(b_any, float("nan"), b_most), b_best)
    tl.store(p_nearest + (i_b * T + i_t) * H + i_h, b_nearest, mask=m_t)
