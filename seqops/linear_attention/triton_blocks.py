"""What the Triton kernels of linear attention are written in: numbers, decays, and the places of a program.

Letters as in triton_kernels.py. Logarithms of decays are at most 0. They are only ever added, but for the pairs of
`step_pairs`: a sum of -inf says that the state was reset, and `fade` makes it a weight of exactly 0.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

INF = tl.constexpr(math.inf)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# PASS: what a walk adds to the state; that and the outputs; what the state that it began with gives.
REDUCE, APPLY, INFLOW = (tl.constexpr(i) for i in range(3))
# DECAY: none, one for a step, one for each inner or outer channel.
NONE, STEP, INNER, OUTER = (tl.constexpr(i) for i in range(4))
# PARTNER: what is returned of the outputs times x: nothing, the sum over channels, every product.
SUM, EACH = tl.constexpr(1), tl.constexpr(2)
# EXACT: by products over chunks (0); step by step where those have met what is not finite, or everywhere.
REPAIR, ALWAYS = tl.constexpr(1), tl.constexpr(2)
# Steps that are anchored together where each channel has a decay: the pairs within are weighed one by one.
ANCHOR = tl.constexpr(16)


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
def operand(pointer, o_block, m_block, STATE: tl.constexpr):
    """A block for a product: in its storage dtype, which the interpreter knows no products of."""
    block = tl.load(pointer + o_block, mask=m_block, other=0.0)
    if INTERPRETED:
        block = block.to(STATE)
    return block


@triton.jit
def multiply(x, y, S: tl.constexpr, STATE: tl.constexpr):
    """x y of operands in the storage dtype S, or rounded to it; summed in STATE."""
    if INTERPRETED:
        return tl.dot(x.to(STATE), y.to(STATE), out_dtype=STATE)
    else:
        return tl.dot(x.to(S), y.to(S), out_dtype=STATE, input_precision="ieee")


@triton.jit
def multiply_state(x, b_s, S: tl.constexpr, STATE: tl.constexpr):
    """x S. A state may exceed what float16 holds: there it is rounded to tf32, which has as many digits."""
    if not INTERPRETED and tl.float16 == S:
        return tl.dot(x.to(STATE), b_s, out_dtype=STATE, input_precision="tf32")
    else:
        return multiply(x, b_s, S, STATE)


@triton.jit
def fade(x):
    """The weight of a sum of logarithms; 0 after a reset."""
    return tl.where(x == -INF, 0.0, tl.exp(x))


@triton.jit
def weigh(b_weight, x):
    """b_weight x, where a weight of 0 lets nothing pass, not even NaN."""
    return tl.where(b_weight == 0, 0.0, b_weight * x)


@triton.jit
def blemish(x):
    """[BT, W] -> [BT]: 0 where all are finite, else NaN."""
    return tl.sum(x * 0, axis=1)


# ---- decays


@triton.jit
def gates(p_g, o_block, m_block, STATE: tl.constexpr):
    """Logarithms of decays; 0 where masked. NaN passes, and what is positive counts as 0."""
    b_g = tl.load(p_g + o_block, mask=m_block, other=0.0).to(STATE)
    return tl.where(b_g > 0, 0.0, b_g)


@triton.jit
def gates_of(p_g, b_t, m_t, o_c, m_c, stride_g_t, STATE: tl.constexpr, DECAY: tl.constexpr):
    """Of steps b_t [BT]: [BT, 1], or of channels o_c [W], [BT, W]."""
    if DECAY == STEP:
        return gates(p_g, b_t[:, None] * stride_g_t, m_t[:, None], STATE)
    else:
        return gates(p_g, b_t[:, None] * stride_g_t + o_c[None, :], m_t[:, None] & m_c[None, :], STATE)


@triton.jit
def sum_on(x, REVERSE: tl.constexpr):
    """Running sums over steps, from the first or from the last; of a single column as a vector, which 3.6 needs."""
    if x.shape[1] == 1:
        return tl.cumsum(tl.sum(x, axis=1), axis=0, reverse=REVERSE)[:, None]
    else:
        return tl.cumsum(x, axis=0, reverse=REVERSE)


@triton.jit
def step_pairs(b_g, b_place, REVERSE: tl.constexpr):
    """[BT, 1] -> [BT, BT]: the weight of pair (own, other); 0 where a reset lies between, or the other comes later.

    A difference of sums over the chunk: the resets among them are counted instead, and pairs of unequal counts masked.
    """
    m_reset = b_g == -INF
    b_sum = tl.cumsum(tl.sum(tl.where(m_reset, 0.0, b_g), axis=1), axis=0)
    b_count = tl.cumsum(tl.sum(m_reset.to(tl.int32), axis=1), axis=0)
    m_pair = b_count[:, None] == b_count[None, :]
    b_gap = b_sum[:, None] - b_sum[None, :]
    if REVERSE:
        b_gap = -b_gap
        m_pair &= b_place[:, None] <= b_place[None, :]
    else:
        m_pair &= b_place[:, None] >= b_place[None, :]
    b_gap = tl.where(m_pair, b_gap, 0.0)
    return tl.where(m_pair, tl.exp(tl.where(b_gap > 0, 0.0, b_gap)), 0.0)


@triton.jit
def anchored(b_g, b_next, edge, REVERSE: tl.constexpr, BT: tl.constexpr):
    """Logarithms on both sides of a step between blocks of ANCHOR: (own, its rows), (other, its rows)."""
    i_r = tl.arange(0, BT)[:, None]
    b_after = tl.cumsum(tl.where(i_r >= edge, b_g, 0.0), axis=0)
    b_before = tl.cumsum(tl.where(i_r + 1 < edge, b_next, 0.0), axis=0, reverse=True)
    if REVERSE:
        return b_before, (i_r < edge) & (i_r >= edge - ANCHOR), b_after, i_r >= edge
    else:
        return b_after, (i_r >= edge) & (i_r < edge + ANCHOR), b_before, i_r < edge


# ---- places


@triton.jit
def place(p_rows, i_row, spans, span, start, T, packed):
    """Of a row: sequence, batch row, first and past-the-last step of the sequence, first step and count of the row.

    p_rows [rows, 4], where packed: sequence, first, last, begin. Else all have `spans` rows, the first at `start`.
    """
    # Division in 32 bits, which is an instruction and not a call: there are fewer rows than that.
    i_narrow = i_row.to(tl.int32)
    i_n = (i_narrow // spans).to(tl.int64)
    i_b = i_n
    first = i_row * 0
    last = first + T
    begin = start + (i_narrow % spans).to(tl.int64) * span
    if packed > 0:
        i_n = tl.load(p_rows + i_row * 4)
        i_b = i_row * 0
        first = tl.load(p_rows + i_row * 4 + 1)
        last = tl.load(p_rows + i_row * 4 + 2)
        begin = tl.load(p_rows + i_row * 4 + 3)
    count = tl.maximum(tl.minimum(last - begin, span), 0)
    return i_n, i_b, first, last, begin, count
