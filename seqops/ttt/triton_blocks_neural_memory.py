"""What the Triton kernels of neural_memory are written in: products of matrices that lie in memory, by tiles.

Letters as in triton_kernels_neural_memory.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(x, y, S: tl.constexpr, STATE: tl.constexpr):
    """x y of operands rounded to the storage dtype S, summed in STATE. What may exceed float16 is rounded to tf32."""
    if INTERPRETED or S == STATE:
        return tl.dot(x.to(STATE), y.to(STATE), out_dtype=STATE, input_precision="ieee")
    elif tl.float16 == S:
        return tl.dot(x.to(STATE), y.to(STATE), out_dtype=STATE, input_precision="tf32")
    else:
        return tl.dot(x.to(S), y.to(S), out_dtype=STATE)


@triton.jit
def narrow(x, S: tl.constexpr):
    """Rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts the bits off."""
    if INTERPRETED and tl.bfloat16 == S:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(S)


@triton.jit
def sigmoid(x):
    """Of the exponential of what is not positive: nothing overflows."""
    b_e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, b_e, 1.0) / (1.0 + b_e)


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    b_s = sigmoid(x)
    return b_s * (1.0 + x * (1.0 - b_s))


@triton.jit
def silu_curve(x):
    """The second derivative of silu."""
    b_s = sigmoid(x)
    return b_s * (1.0 - b_s) * (2.0 + x * (1.0 - 2.0 * b_s))


@triton.jit
def load_tile(
    p_x, stride_m, stride_n, first_m, end_m, first_n, end_n,
    STATE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """x[first_m + i, first_n + j] [BM, BN], zeros past the ends."""
    zero = tl.program_id(0).to(tl.int64) * 0
    i_m = tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    p_x += (zero + first_m) * stride_m + (zero + first_n) * stride_n
    m_x = (i_m < end_m - first_m)[:, None] & (i_n < end_n - first_n)[None, :]
    return tl.load(p_x + i_m[:, None] * stride_m + i_n[None, :] * stride_n, mask=m_x, other=0.0).to(STATE)


@triton.jit
def store_tile(p_x, b_x, stride_m, stride_n, first_m, end_m, first_n, end_n, BM: tl.constexpr, BN: tl.constexpr):
    """As `load_tile`, into memory of any dtype."""
    zero = tl.program_id(0).to(tl.int64) * 0
    i_m = tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    p_x += (zero + first_m) * stride_m + (zero + first_n) * stride_n
    m_x = (i_m < end_m - first_m)[:, None] & (i_n < end_n - first_n)[None, :]
    tl.store(p_x + i_m[:, None] * stride_m + i_n[None, :] * stride_n, narrow(b_x, p_x.dtype.element_ty), mask=m_x)


@triton.jit
def load_row(p_x, first, end, STATE: tl.constexpr, BM: tl.constexpr):
    """x[first + i] [BM], zeros past the end."""
    zero = tl.program_id(0).to(tl.int64) * 0
    i_m = tl.arange(0, BM)
    return tl.load(p_x + (zero + first) + i_m, mask=i_m < end - first, other=0.0).to(STATE)


@triton.jit
def store_row(p_x, b_x, first, end, BM: tl.constexpr):
    zero = tl.program_id(0).to(tl.int64) * 0
    i_m = tl.arange(0, BM)
    tl.store(p_x + (zero + first) + i_m, b_x, mask=i_m < end - first)


@triton.jit
def add_product(
    b_sum, p_x, stride_x_m, stride_x_k, p_y, stride_y_k, stride_y_n,
    first_m, end_m, first_n, end_n, first_k, end_k, p_scale,
    S: tl.constexpr, STATE: tl.constexpr, SCALED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """b_sum [BM, BN] + sum over first_k <= k < end_k of x[m, k] scale[k] y[k, n], the tile at (first_m, first_n)."""
    zero = tl.program_id(0).to(tl.int64) * 0
    i_m = tl.arange(0, BM)
    i_n = tl.arange(0, BN)
    i_k = tl.arange(0, BK)
    m_m = (i_m < end_m - first_m)[:, None]
    m_n = (i_n < end_n - first_n)[None, :]
    p_x += (zero + first_m) * stride_x_m + (zero + first_k) * stride_x_k
    p_y += (zero + first_n) * stride_y_n + (zero + first_k) * stride_y_k
    if SCALED:
        p_scale += zero + first_k
    for k in tl.range(first_k, end_k, BK, disable_licm=True):
        m_k = i_k < end_k - k
        b_x = tl.load(p_x + i_m[:, None] * stride_x_m + i_k[None, :] * stride_x_k, mask=m_m & m_k[None, :], other=0.0)
        b_y = tl.load(p_y + i_k[:, None] * stride_y_k + i_n[None, :] * stride_y_n, mask=m_k[:, None] & m_n, other=0.0)
        if SCALED:
            b_x = b_x.to(STATE) * tl.load(p_scale + i_k, mask=m_k, other=0.0)[None, :]
            p_scale += BK
        b_sum += multiply(b_x, b_y, S, STATE)
        p_x += BK * stride_x_k
        p_y += BK * stride_y_k
    return b_sum


@triton.jit
def add_earlier(
    b_sum, p_weights, P, p_x, stride_x, first_t, end_t, first_n, end_n,
    S: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """b_sum [BT, BN] + sum over i <= t of weights[t, i] x[i, n]: what is not finite reaches no earlier t."""
    b_sum = add_product(
        b_sum, p_weights, P, 1, p_x, stride_x, 1, first_t, end_t, first_n, end_n, 0, first_t, p_weights,
        S, STATE, False, BT, BN, BT,
    )  # fmt: skip
    b_p = load_tile(p_weights, P, 1, first_t, end_t, first_t, end_t, STATE, BT, BT)
    b_x = load_tile(p_x, stride_x, 1, first_t, end_t, first_n, end_n, STATE, BT, BN)
    m_wrong = b_x * 0 != 0
    b_sum += multiply(b_p, tl.where(m_wrong, 0.0, b_x), S, STATE)
    if tl.sum(tl.sum(m_wrong.to(tl.int32), axis=1), axis=0) > 0:
        b_sum = tl.where(tl.cumsum(m_wrong.to(tl.int32), axis=0) > 0, float("nan"), b_sum)
    return b_sum


@triton.jit
def store_pairs(
    p_raw, p_pairs, p_c, P, p_x, stride_x, p_y, stride_y, width, end_t, RAW: tl.constexpr,
    S: tl.constexpr, STATE: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """pairs[t, i] = c[t, i] x_t . y_i, 0 where i > t, and without c (RAW); tiles past the diagonal are not written."""
    i_r = tl.arange(0, BT)
    m_causal = i_r[:, None] >= i_r[None, :]
    for first_t in tl.range(0, end_t, BT, disable_licm=True):
        for first_i in tl.range(0, first_t + 1, BT, disable_licm=True):
            b_x = add_product(
                tl.zeros((BT, BT), STATE), p_x, stride_x, 1, p_y, 1, stride_y, first_t, end_t, first_i, end_t,
                0, width, p_c, S, STATE, False, BT, BT, BK,
            )  # fmt: skip
            m_pair = m_causal | (i_r[:, None] * 0 + first_i < first_t)
            b_x = tl.where(m_pair, b_x, 0.0)
            b_c = load_tile(p_c, P, 1, first_t, end_t, first_i, end_t, STATE, BT, BT)
            if RAW:
                store_tile(p_raw, b_x, P, 1, first_t, end_t, first_i, end_t, BT, BT)
            b_x = tl.where(m_pair, b_c * b_x, 0.0)
            store_tile(p_pairs, b_x, P, 1, first_t, end_t, first_i, end_t, BT, BT)


@triton.jit
def copy_numbers(p_to, p_from, first, end, BLOCK: tl.constexpr):
    i_n = tl.arange(0, BLOCK)
    for n in range(first, end, BLOCK):
        b_x = tl.load(p_from + n + i_n, mask=i_n < end - n)
        tl.store(p_to + n + i_n, b_x, mask=i_n < end - n)
