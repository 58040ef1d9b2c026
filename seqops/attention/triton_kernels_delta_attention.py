"""Triton kernels of held keys.

B batch, T time, Hk heads, D channels. A program walks the T steps of BLOCK_D channels of one head (by rows: of all of
them, since they move together). Decisions follow each other, but loads do not: DEPTH steps of them are on their way.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(D, Hk, BLOCK_D: tl.constexpr):
    """Batch row and head, the program's channels, and which of them there are."""
    i = tl.program_id(0).to(tl.int64)
    blocks = tl.cdiv(D, BLOCK_D)
    o_d = i % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    return i // blocks // Hk, i // blocks % Hk, o_d, o_d < D


@triton.jit
def push(queue, value):
    return queue + (value,)  # noqa: RUF005  no starred items


@triton.jit(do_not_specialize=["T", "Hk", "D"])
def held_keys_forward(
    p_k,  # [B, T, Hk, D]
    p_held,  # contiguous
    p_threshold,  # one number, in what is computed in
    T,
    Hk,
    D,
    stride_k_b,
    stride_k_t,
    stride_k_h,
    BY_ROW: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    REAL: tl.constexpr = p_threshold.dtype.element_ty
    i_b, i_h, o_d, m_d = place(D, Hk, BLOCK_D)
    o_k = i_b * stride_k_b + i_h * stride_k_h + o_d
    o_held = (i_b * T * Hk + i_h) * D + o_d
    stride = Hk.to(tl.int64) * D
    threshold = tl.load(p_threshold)
    b_held = tl.zeros([BLOCK_D], dtype=REAL)
    b_0 = tl.zeros([BLOCK_D], dtype=tl.int64)
    queue = ()
    for i in tl.static_range(DEPTH):
        b_t = b_0 + i
        queue = push(queue, tl.load(p_k + b_t * stride_k_t + o_k, mask=m_d & (b_t < T), other=0.0))
    for start in range(0, T, DEPTH):
        for i in tl.static_range(DEPTH):
            b_t = b_0 + (start + i)
            b_k = queue[0].to(REAL)
            b_ahead = b_t + DEPTH
            queue = push(queue[1:], tl.load(p_k + b_ahead * stride_k_t + o_k, mask=m_d & (b_ahead < T), other=0.0))
            # Equal infinities differ by nothing; NaN is moved to, and from.
            b_size = tl.abs(tl.where(b_k == b_held, 0.0, b_k - b_held))
            if BY_ROW:
                b_size = tl.sqrt(tl.sum(b_size * b_size, 0)) + tl.zeros([BLOCK_D], dtype=REAL)
            b_held = tl.where(b_size <= threshold, b_held, b_k)
            tl.store(p_held + b_t * stride + o_held, b_held.to(p_held.dtype.element_ty), mask=m_d & (b_t < T))


@triton.jit(do_not_specialize=["T", "Hk", "D"])
def held_keys_backward(
    p_grad,  # [B, T, Hk, D]
    p_held,
    p_dk,  # contiguous
    T,
    Hk,
    D,
    stride_g_b,
    stride_g_t,
    stride_g_h,
    stride_h_b,
    stride_h_t,
    stride_h_h,
    BY_ROW: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """From the last step: dk_t = the gradients summed from t up to the next move, where t moved; else 0."""
    REAL: tl.constexpr = tl.float64 if p_dk.dtype.element_ty == tl.float64 else tl.float32
    i_b, i_h, o_d, m_d = place(D, Hk, BLOCK_D)
    o_g = i_b * stride_g_b + i_h * stride_g_h + o_d
    o_h = i_b * stride_h_b + i_h * stride_h_h + o_d
    o_dk = (i_b * T * Hk + i_h) * D + o_d
    stride = Hk.to(tl.int64) * D
    b_sum = tl.zeros([BLOCK_D], dtype=REAL)
    b_last = tl.zeros([BLOCK_D], dtype=tl.int64) + T - 1
    b_held = tl.load(p_held + b_last * stride_h_t + o_h, mask=m_d, other=0.0).to(REAL)
    grads = ()
    before = ()
    for i in tl.static_range(DEPTH):
        b_t = b_last - i
        grads = push(grads, tl.load(p_grad + b_t * stride_g_t + o_g, mask=m_d & (b_t >= 0), other=0.0))
        before = push(before, tl.load(p_held + (b_t - 1) * stride_h_t + o_h, mask=m_d & (b_t >= 1), other=0.0))
    for start in range(0, T, DEPTH):
        for i in tl.static_range(DEPTH):
            b_t = b_last - (start + i)
            b_sum += grads[0].to(REAL)
            b_before = before[0].to(REAL)
            b_at = b_t - DEPTH
            grads = push(grads[1:], tl.load(p_grad + b_at * stride_g_t + o_g, mask=m_d & (b_at >= 0), other=0.0))
            b_at = b_at - 1
            before = push(before[1:], tl.load(p_held + b_at * stride_h_t + o_h, mask=m_d & (b_at >= 0), other=0.0))
            b_moved = (b_held != b_before).to(tl.int32)
            if BY_ROW:
                b_moved = tl.max(b_moved, 0) + tl.zeros([BLOCK_D], dtype=tl.int32)
            b_dk = tl.where(b_moved != 0, b_sum, 0.0)
            tl.store(p_dk + b_t * stride + o_dk, b_dk.to(p_dk.dtype.element_ty), mask=m_d & (b_t >= 0))
            b_sum = tl.where(b_moved != 0, 0.0, b_sum)
            b_held = b_before
