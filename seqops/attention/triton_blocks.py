"""What the Triton kernels of attention over ranges are written in: numbers, weights, blocks of rows, and walks.

Letters as in triton_kernels_range_attention.py. An owner is what a program sums for: queries in the forward and for dq,
keys for dk and dv. Owners have ranges of `others`, and walk them in tiles.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from . import tiles

INF = tl.constexpr(math.inf)
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
ROOT_TWO = tl.constexpr(math.sqrt(2))
ROOT_HALF = tl.constexpr(math.sqrt(0.5))
ROOT_TWO_PI = tl.constexpr(math.sqrt(2 * math.pi))
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# ACTIVATION
SOFTMAX, LAPLACE, RELU2 = (tl.constexpr(i) for i in range(3))
# BIAS: none, by the distance of two places in a range, by both places.
NONE, DISTANCE, SQUARE = (tl.constexpr(i) for i in range(3))

# Strides are in units of it.
UNIT = tl.constexpr(tiles.ALIGNMENT)
# A new length, and a batch row or head at another distance, compile nothing.
SIZES = ("B", "Tq", "Tk", "T2", "H", "group", "parts", "parts2", "most", "places", "rows_b", "pieces", "piece")
STRIDES = [f"stride_{x}_{letter}" for x in ("q", "k", "v", "k2", "v2", "o", "do", "dlse") for letter in "bth"]
STRIDES += [f"stride_{x}_{letter}" for x in ("ranges", "ranges2") for letter in "bh"] + [
    "stride_bias_h",
    "stride_bias_i",
]
UNSPECIALIZED = [*SIZES, *STRIDES]


# ---- numbers


@triton.jit
def narrow(x, S: tl.constexpr):
    """Rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts the bits off."""
    if INTERPRETED and tl.bfloat16 == S:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(S)


@triton.jit
def multiply(x, y, S: tl.constexpr, STATE: tl.constexpr):
    """x y of operands in the storage dtype S, or rounded to it; summed in STATE."""
    if INTERPRETED:
        return tl.dot(x.to(STATE), y.to(STATE), out_dtype=STATE)
    else:
        return tl.dot(x.to(S), y.to(S), out_dtype=STATE, input_precision="ieee")


@triton.jit
def blemish(x):
    """0 where every entry of a block is finite, else NaN."""
    return tl.sum(tl.sum(x * 0, axis=1), axis=0)


@triton.jit
def scaled_erfc(b_x):
    """e^(x^2) erfc(x) for x >= 0, relative error 3e-7, in float64 5e-16: t = 2 / (2 + x) times a polynomial of t.

    Interpolated at the Chebyshev nodes of 0 <= x <= 10.5, in float64 27.5, where erfc(x) is below all numbers.
    """
    b_t = 2 / (2 + b_x)
    if b_x.dtype == tl.float64:
        u = b_t * 2.1454545454545455 - 1.1454545454545455
        y = -5.4355600903608478e-10 * u + 5.3321721009415843e-10
        y = y * u + 4.2442617191434895e-9
        y = y * u - 7.142570311852231e-9
        y = y * u - 9.8699603024018562e-9
        y = y * u + 3.799547734592981e-8
        y = y * u - 2.9409515119490986e-8
        y = y * u - 7.4912552122503252e-8
        y = y * u + 2.7676885095655068e-7
        y = y * u - 2.742469339460004e-7
        y = y * u - 7.0411379653275552e-7
        y = y * u + 2.7357576133203409e-6
        y = y * u - 1.80836720895065e-6
        y = y * u - 1.0680524268315749e-5
        y = y * u + 2.8203152890386341e-5
        y = y * u + 1.4271924331764752e-5
        y = y * u - 0.00018708416107910485
        y = y * u + 0.00014593870255478422
        y = y * u + 0.0011163836256762335
        y = y * u - 0.0018136980302077698
        y = y * u - 0.0088678307088405871
        y = y * u + 0.012285324665861113
        y = y * u + 0.12438548734918597
        y = y * u + 0.33817087581594279
        y = y * u + 0.53473266149462547
    else:
        u = b_t * 2.380952381 - 1.380952381
        y = -5.810831072e-5 * u + 2.468174236e-5
        y = y * u + 0.0006153885199
        y = y * u - 0.0006861686311
        y = y * u - 0.006324627916
        y = y * u + 0.00631161789
        y = y * u + 0.10352079
        y = y * u + 0.3271876608
        y = y * u + 0.5694087224
    return y * b_t


# ---- scores and weights


@triton.jit
def natural(scale, scale_rest, STATE: tl.constexpr):
    """Arguments are float32: two of them hold a float64 to 48 bits."""
    return tl.full([], 1, STATE) * scale + tl.full([], 1, STATE) * scale_rest


@triton.jit
def unit(ACTIVATION: tl.constexpr):
    """Of scores: with softmax they are logarithms to base 2, whose exponential is one instruction."""
    return LOG2E if ACTIVATION == SOFTMAX else 1.0


@triton.jit
def laplace_place(b_s):
    """x of P = erfc(x) / 2; beyond 27 it is 0, and at NaN it stays NaN."""
    b_x = (ROOT_HALF - b_s) * ROOT_TWO_PI
    b_x = tl.where(b_x > 27, 27.0, b_x)
    return tl.where(b_x < -27, -27.0, b_x)


@triton.jit
def weigh(b_s, ACTIVATION: tl.constexpr):
    """P(s) of an activation that has no normaliser."""
    if ACTIVATION == LAPLACE:
        b_x = laplace_place(b_s)
        b_far = tl.abs(b_x)
        b_tail = tl.exp(-b_x * b_x) * scaled_erfc(b_far) * 0.5
        return tl.where(b_x < 0, 1 - b_tail, b_tail)
    else:
        b_up = tl.where(b_s <= 0, 0.0, b_s)  # NaN stays
        return b_up * b_up


@triton.jit
def gradient_of_score(b_s, b_p, b_dp, b_delta, ACTIVATION: tl.constexpr):
    """ds of weights p and their gradients dp = <do, v>; b_delta = <do, o> - dlse, for softmax."""
    if ACTIVATION == SOFTMAX:
        return b_p * (b_dp - b_delta)
    elif ACTIVATION == LAPLACE:
        b_x = laplace_place(b_s)
        return ROOT_TWO * tl.exp(-b_x * b_x) * b_dp
    else:
        return tl.where(b_s <= 0, 0.0, 2 * b_s) * b_dp


@triton.jit
def weight_again(b_s, b_lse, ACTIVATION: tl.constexpr):
    """In the backward: from a score and the query's lse (+inf where it saw nothing), both in units of the score."""
    if ACTIVATION == SOFTMAX:
        return tl.exp2(b_s - b_lse)
    else:
        return weigh(b_s, ACTIVATION)


@triton.jit
def bias_of(p_bias, b_i, b_j, b_start, most, stride, BIAS: tl.constexpr, STATE: tl.constexpr):
    """Of pairs of positions counted from the start of the query's range; places outside the table are its edge.

    p_bias: of the head, [2 C - 1] or [C, C] with neighbours along the last dimension, which ends at `most`.
    """
    if BIAS == DISTANCE:
        b_at = tl.minimum(tl.maximum(most // 2 + b_j - b_i, 0), most)
    else:
        b_row = tl.minimum(tl.maximum(b_i - b_start, 0), most)
        b_at = b_row * stride + tl.minimum(tl.maximum(b_j - b_start, 0), most)
    return tl.load(p_bias + b_at).to(STATE)


@triton.jit
def lse_of(p_lse, m_i, STATE: tl.constexpr):
    """In units of scores; +inf for queries that see nothing: their weights are then 0."""
    b_lse = tl.load(p_lse, mask=m_i, other=INF).to(STATE) * LOG2E
    return tl.where(b_lse == -INF, INF, b_lse)


# ---- rows


@triton.jit
def rows_at(p_x, i_b, i_t, i_h, stride_b, stride_t, stride_h):
    """Of x [B, T, H, D]: row i_t of head i_h, and the elements between rows."""
    p_x += (i_b * stride_b.to(tl.int64) + i_t * stride_t.to(tl.int64) + i_h * stride_h.to(tl.int64)) * UNIT
    return p_x, stride_t * UNIT


@triton.jit
def load_rows(p_x, b_r, m_r, stride, o_d, D: tl.constexpr, BD: tl.constexpr, STATE: tl.constexpr):
    """[rows, BD], 0 where masked; in the storage dtype, but in the interpreter, which knows no products of it."""
    p = p_x + b_r[:, None] * stride + o_d[None, :]
    if D % BD == 0:
        b_x = tl.load(p, mask=m_r[:, None], other=0.0)
    else:
        b_x = tl.load(p, mask=m_r[:, None] & (o_d[None, :] < D), other=0.0)
    if INTERPRETED:
        b_x = b_x.to(STATE)
    return b_x


@triton.jit
def store_rows(p_x, b_x, b_r, m_r, stride, o_d, D: tl.constexpr):
    b_x = narrow(b_x, p_x.dtype.element_ty)
    tl.store(p_x + b_r[:, None] * stride + o_d[None, :], b_x, mask=m_r[:, None] & (o_d[None, :] < D))


@triton.jit
def load_row(p_x, o_d, D: tl.constexpr, STATE: tl.constexpr):
    """One row [BD]."""
    return tl.load(p_x + o_d, mask=o_d < D, other=0.0).to(STATE)


@triton.jit
def slices_end(D: tl.constexpr, BD: tl.constexpr):
    """D; of several slices no constant, since unrolled they would not fit the registers: grids have one dimension."""
    if D <= BD:
        return D
    else:
        return D + tl.program_id(1)


@triton.jit
def products(
    p_x, b_x, m_x, stride_x, p_y, b_y, m_y, stride_y,
    D: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, STATE: tl.constexpr,
):  # fmt: skip
    """x y^T [BX, BY]: over all D channels, in slices of BD. b_x, b_y: rows of tiles that begin at p_x, p_y."""
    b_s = tl.zeros([b_x.shape[0], b_y.shape[0]], STATE)
    for d in range(0, slices_end(D, BD), BD):
        o_d = d + tl.arange(0, BD)
        b_one = load_rows(p_x, b_x, m_x, stride_x, o_d, D, BD, STATE)
        b_other = load_rows(p_y, b_y, m_y, stride_y, o_d, D, BD, STATE)
        b_s += multiply(b_one, tl.trans(b_other), S, STATE)
    return b_s


@triton.jit
def products_with_row(
    p_x, b_x, m_x, stride_x, p_y, D: tl.constexpr, BD: tl.constexpr, STATE: tl.constexpr
):  # fmt: skip
    """x y [BX], y one row: without a product of blocks, so that no row has a part in another's."""
    b_s = tl.zeros([b_x.shape[0]], STATE)
    for d in range(0, slices_end(D, BD), BD):
        o_d = d + tl.arange(0, BD)
        b_one = load_rows(p_x, b_x, m_x, stride_x, o_d, D, BD, STATE).to(STATE)
        b_s += tl.sum(b_one * load_row(p_y, o_d, D, STATE)[None, :], axis=1)
    return b_s


# ---- walks


@triton.jit
def ranges_of(p_part, b_own, m_own, owners, others):
    """Of owners b_own in one part, int32 [2, owners]: first and end, the walk over all, and what all of them see.

    Ranges are cut to [0, others). Owners that see nothing do not lengthen the walk, but nothing is seen by all then.
    """
    b_first = tl.maximum(tl.load(p_part + b_own, mask=m_own, other=0), 0)
    b_end = tl.minimum(tl.load(p_part + owners + b_own, mask=m_own, other=0), others)
    m_some = b_first < b_end
    low = tl.min(tl.where(m_some, b_first, others), axis=0)
    high = tl.max(tl.where(m_some, b_end, 0), axis=0)
    inner_low = tl.max(b_first, axis=0)
    inner_high = tl.min(tl.where(m_own, b_end, others), axis=0)
    return b_first, b_end, low, high, inner_low, inner_high


@triton.jit
def seen_pairs(b_first, b_end, b_other):
    """[owners, others]: whether an owner's range has the other."""
    return (b_first[:, None] <= b_other[None, :]) & (b_other[None, :] < b_end[:, None])
