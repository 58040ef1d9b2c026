"""Triton kernels of causal_conv1d.

    z_t = bias + sum_k w_k x_{t-(W-1-k)d}      dx_t = sum_k w_k dz_{t+(W-1-k)d}      dw_k = sum_t dz_t x_{t-(W-1-k)d}

B batch, T time, D channels, W taps (k = 0 the oldest), d dilation, N sequences, S = (W - 1) d steps of a state. A
program computes a tile of BT steps and BD channels; the taps pass by one after the other, and what they read comes
from the caches. Of packed sequences p_sequence [T] is the one that a step belongs to and p_edges [N + 1] where they
begin; otherwise every batch row is one. Sums are in float32, or float64 for float64.
"""

from __future__ import annotations

import triton
import triton.language as tl

Y, GRADIENT = (tl.constexpr(i) for i in range(2))  # PASS of the forward: y, or dz


@triton.jit
def tile(steps, channels, BT: tl.constexpr, BD: tl.constexpr):
    """Of this program: its row, steps [BT, 1] and channels [1, BD]. Neighbours share steps."""
    i = tl.program_id(0).to(tl.int64)
    n_d, n_t = tl.cdiv(channels, BD), tl.cdiv(steps, BT)
    b_d = i % n_d * BD + tl.arange(0, BD)
    b_t = i // n_d % n_t * BT + tl.arange(0, BT)
    return i // n_d // n_t, b_t[:, None], b_d[None, :]


@triton.jit
def sequence(p_sequence, p_edges, i_row, b_t, m_t, T, PACKED: tl.constexpr):
    """The sequences of steps of a row: their number, and where they begin and end."""
    if PACKED:
        b_n = tl.load(p_sequence + b_t, mask=m_t, other=0)
        b_begin = tl.load(p_edges + b_n, mask=m_t, other=0)
        return b_n, b_begin, tl.load(p_edges + b_n + 1, mask=m_t, other=0)
    b_n = i_row + 0 * b_t
    return b_n, 0 * b_t, 0 * b_t + T


@triton.jit
def load_rows(p_x, o_x, p_initial, initial_rows, b_n, b_t, b_begin, b_d, m, S, D, stride_x_t, ACC: tl.constexpr):
    """Steps b_t of x, those before the first from the state."""
    m_x = m & (b_t >= b_begin)
    b_x = tl.load(p_x + o_x + b_t * stride_x_t + b_d, mask=m_x, other=0.0).to(ACC)
    m_state = m & (b_t < b_begin) & (b_n < initial_rows)
    o_state = (b_n * S + S + b_t - b_begin) * D + b_d
    return b_x + tl.load(p_initial + o_state, mask=m_state, other=0.0).to(ACC)


@triton.jit(do_not_specialize=["W", "dilation", "bias_channels", "initial_rows", "T", "D", "S"])
def causal_conv1d_forward(
    p_x,  # [B, T, D]
    p_weight,  # [D, W]
    p_bias,  # [D]
    p_initial,  # [N, S, D]
    p_dy,  # GRADIENT: [B, T, D]
    p_y,  # [B, T, D]; GRADIENT: dz
    p_sequence,
    p_edges,
    T,
    D,
    W,
    S,
    dilation,
    bias_channels,
    initial_rows,
    stride_x_b,
    stride_x_t,
    stride_dy_b,
    stride_dy_t,
    stride_w_d,
    stride_w_k,
    PASS: tl.constexpr,
    SILU: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """y, or the gradient of z."""
    ACC: tl.constexpr = tl.float64 if p_x.dtype.element_ty == tl.float64 else tl.float32
    i_b, b_t, b_d = tile(T, D, BT, BD)
    m_t, m_d = b_t < T, b_d < D
    m = m_t & m_d
    b_n, b_begin, _ = sequence(p_sequence, p_edges, i_b, b_t, m_t, T, PACKED)
    b_z = tl.zeros([BT, BD], ACC) + tl.load(p_bias + b_d, mask=b_d < bias_channels, other=0.0).to(ACC)
    for k in range(W):
        b_w = tl.load(p_weight + b_d * stride_w_d + k * stride_w_k, mask=m_d, other=0.0).to(ACC)
        b_s = b_t - (W - 1 - k).to(tl.int64) * dilation
        b_x = load_rows(
            p_x, i_b * stride_x_b, p_initial, initial_rows, b_n, b_s, b_begin, b_d, m, S, D, stride_x_t, ACC
        )
        b_z += b_w * b_x
    if SILU:
        b_gate = 1.0 / (1.0 + tl.exp(-b_z))
        b_z = b_gate * (1.0 + b_z * (1.0 - b_gate)) if PASS == GRADIENT else b_z * b_gate
    if PASS == GRADIENT:
        b_z *= tl.load(p_dy + i_b * stride_dy_b + b_t * stride_dy_t + b_d, mask=m, other=0.0).to(ACC)
    tl.store(p_y + (i_b * T + b_t) * D + b_d, b_z.to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["W", "dilation", "final_rows", "T", "D", "S", "steps"])
def causal_conv1d_inputs(
    p_dz,  # [B, T, D]
    p_weight,  # [D, W]
    p_dfinal,  # [N, S, D]
    p_dx,  # [B, T, D]; STATE: [N, S, D], the gradient of the first state
    p_sequence,
    p_edges,
    T,
    D,
    W,
    S,
    steps,  # T; STATE: S
    dilation,
    final_rows,
    stride_dz_b,
    stride_dz_t,
    stride_w_d,
    stride_w_k,
    STATE: tl.constexpr,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """dx, or the gradient of the first state, whose steps are before those of its sequence."""
    ACC: tl.constexpr = tl.float64 if p_dz.dtype.element_ty == tl.float64 else tl.float32
    i_row, b_i, b_d = tile(steps, D, BT, BD)
    m_i, m_d = b_i < steps, b_d < D
    m = m_i & m_d
    if STATE:
        b_n = i_row + 0 * b_i
        b_begin, b_end = 0 * b_i, 0 * b_i + T
        if PACKED:
            b_begin, b_end = tl.load(p_edges + b_n), tl.load(p_edges + b_n + 1)
        b_t = b_begin - S + b_i
    else:
        b_n, b_begin, b_end = sequence(p_sequence, p_edges, i_row, b_i, m_i, T, PACKED)
        b_t = b_i
    i_b = i_row * (1 - PACKED)
    b_kept = b_t - (b_end - S)
    m_kept = m & (b_kept >= 0) & (b_n < final_rows)
    b_dx = tl.load(p_dfinal + (b_n * S + b_kept) * D + b_d, mask=m_kept, other=0.0).to(ACC)
    for k in range(W):
        b_w = tl.load(p_weight + b_d * stride_w_d + k * stride_w_k, mask=m_d, other=0.0).to(ACC)
        b_s = b_t + (W - 1 - k).to(tl.int64) * dilation
        m_s = m & (b_s >= b_begin) & (b_s < b_end)
        b_dz = tl.load(p_dz + i_b * stride_dz_b + b_s * stride_dz_t + b_d, mask=m_s, other=0.0).to(ACC)
        b_dx += tl.where(m_s, b_w * b_dz, 0.0)
    tl.store(p_dx + (i_row * steps + b_i) * D + b_d, b_dx.to(p_dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["W", "dilation", "initial_rows", "T", "D", "S", "piece"])
def causal_conv1d_weights(
    p_dz,  # [B, T, D]
    p_x,  # [B, T, D]
    p_initial,  # [N, S, D]
    p_sums,  # [pieces of all rows, W + 1, D]: of the taps, and of the bias
    p_sequence,
    p_edges,
    T,
    D,
    W,
    S,
    piece,  # steps that a program adds up
    dilation,
    initial_rows,
    stride_dz_b,
    stride_dz_t,
    stride_x_b,
    stride_x_t,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """Of a piece of a row, the gradient of one tap or of the bias."""
    ACC: tl.constexpr = tl.float64 if p_dz.dtype.element_ty == tl.float64 else tl.float32
    i = tl.program_id(0).to(tl.int64)
    n_d, pieces = tl.cdiv(D, BD), tl.cdiv(T, piece)
    i_k = i // n_d % (W + 1)
    i_p = i // n_d // (W + 1)
    b_d = (i % n_d * BD + tl.arange(0, BD))[None, :]
    i_b, i_first = i_p // pieces, i_p % pieces * piece
    m_d = b_d < D
    b_sum = tl.zeros([BT, BD], ACC)
    for i_t in range(0, piece, BT):
        b_t = (i_first + i_t + tl.arange(0, BT))[:, None]
        m_t = (b_t < T) & (b_t < i_first + piece)
        m = m_t & m_d
        b_dz = tl.load(p_dz + i_b * stride_dz_b + b_t * stride_dz_t + b_d, mask=m, other=0.0).to(ACC)
        m_tap = 0 * b_t + i_k < W  # of a block's shape: the interpreter fails on a number that is joined to a mask
        m_x = m & m_tap
        b_n, b_begin, _ = sequence(p_sequence, p_edges, i_b, b_t, m_t, T, PACKED)
        b_s = b_t - (W - 1 - i_k) * dilation
        b_x = load_rows(
            p_x, i_b * stride_x_b, p_initial, initial_rows, b_n, b_s, b_begin, b_d, m_x, S, D, stride_x_t, ACC
        )
        b_sum += b_dz * tl.where(m_tap, b_x, 1.0)
    b_total = tl.sum(b_sum, 0)[None, :]
    tl.store(p_sums + (i_p * (W + 1) + i_k) * D + b_d, b_total, mask=m_d)


@triton.jit(do_not_specialize=["initial_rows", "T", "D", "S"])
def causal_conv1d_state(
    p_x,  # [B, T, D]
    p_initial,  # [N, S, D]
    p_final,  # [N, S, D]
    p_edges,
    T,
    D,
    S,
    initial_rows,
    stride_x_b,
    stride_x_t,
    PACKED: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    """The last S steps of the state and x one after the other, bit for bit."""
    i_n, b_i, b_d = tile(S, D, BT, BD)
    m = (b_i < S) & (b_d < D)
    b_n = i_n + 0 * b_i
    b_begin, b_end = 0 * b_i, 0 * b_i + T
    if PACKED:
        b_begin, b_end = tl.load(p_edges + b_n), tl.load(p_edges + b_n + 1)
    b_t = b_end - S + b_i
    m_x = b_t >= b_begin
    b_x = tl.load(p_x + i_n * (1 - PACKED) * stride_x_b + b_t * stride_x_t + b_d, mask=m & m_x, other=0.0)
    m_state = m & (b_t < b_begin) & (b_n < initial_rows)
    b_state = tl.load(p_initial + (i_n * S + S + b_t - b_begin) * D + b_d, mask=m_state, other=0.0)
    tl.store(p_final + (i_n * S + b_i) * D + b_d, tl.where(m_x, b_x, b_state), mask=m)
