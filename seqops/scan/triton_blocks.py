"""What the Triton kernels of the scans are written in: values, real or complex, and the places of a program's lanes.

A value is a tuple of blocks, (real,) or (real, imaginary); in memory the two parts are neighbours.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

INF = tl.constexpr(math.inf)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# ---- values


@triton.jit
def load(pointer, shift, o_block, m_block, other, COMPLEX: tl.constexpr):
    """The block at pointer + shift + o_block in its storage dtype; a complex number is two neighbours."""
    if COMPLEX:
        o_pair = tl.expand_dims(o_block * 2, 3) + tl.arange(0, 2)[None, None, None, :]
        m_pair = tl.expand_dims(m_block, 3)
        return tl.split(tl.load(pointer + shift * 2 + o_pair, mask=m_pair, other=other))
    else:
        return (tl.load(pointer + shift + o_block, mask=m_block, other=other),)


@triton.jit
def narrow(part, S: tl.constexpr):
    """Rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts the bits off."""
    if INTERPRETED and tl.bfloat16 == S:
        bits = part.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        part = tl.where(part == part, bits.to(tl.float32, bitcast=True), part)
    return part.to(S)


@triton.jit
def store(pointer, shift, o_block, m_block, value):
    """Round to the storage dtype and write."""
    S: tl.constexpr = pointer.dtype.element_ty
    if len(value) == 2:
        o_pair = tl.expand_dims(o_block * 2, 3) + tl.arange(0, 2)[None, None, None, :]
        b_pair = tl.join(narrow(value[0], S), narrow(value[1], S))
        tl.store(pointer + shift * 2 + o_pair, b_pair, mask=tl.expand_dims(m_block, 3))
    else:
        tl.store(pointer + shift + o_block, narrow(value[0], S), mask=m_block)


@triton.jit
def push(queue, item):
    return queue + (item,)  # noqa: RUF005  Triton knows no starred items


@triton.jit
def widen(value, STATE: tl.constexpr):
    if len(value) == 2:
        return value[0].to(STATE), value[1].to(STATE)
    else:
        return (value[0].to(STATE),)


@triton.jit
def widen_gate(value, m_block, STATE: tl.constexpr):
    """As `widen`, where masked lanes hold 1: they hand a state on unchanged."""
    if len(value) == 2:
        return value[0].to(STATE), tl.where(m_block, value[1].to(STATE), 0.0)
    else:
        return (value[0].to(STATE),)


@triton.jit
def zeros(BS: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr, STATE: tl.constexpr, COMPLEX: tl.constexpr):
    if COMPLEX:
        return tl.zeros((BS, BG, BR), STATE), tl.zeros((BS, BG, BR), STATE)
    else:
        return (tl.zeros((BS, BG, BR), STATE),)


@triton.jit
def add(x, y):
    if len(x) == 2:
        return x[0] + y[0], x[1] + y[1]
    else:
        return (x[0] + y[0],)


@triton.jit
def multiply(a, x):
    """a x; a real factor scales both parts of a complex one."""
    if len(a) == 2:
        return a[0] * x[0] - a[1] * x[1], a[0] * x[1] + a[1] * x[0]
    elif len(x) == 2:
        return a[0] * x[0], a[0] * x[1]
    else:
        return (a[0] * x[0],)


@triton.jit
def conjugate(a):
    if len(a) == 2:
        return a[0], -a[1]
    else:
        return a


@triton.jit
def is_zero(a):
    if len(a) == 2:
        return (a[0] == 0) & (a[1] == 0)
    else:
        return a[0] == 0


@triton.jit
def is_finite(a):
    if len(a) == 2:
        return (tl.abs(a[0]) < INF) & (tl.abs(a[1]) < INF)
    else:
        return tl.abs(a[0]) < INF


@triton.jit
def clear(m_block, x):
    """0 where m_block, else x."""
    if len(x) == 2:
        return tl.where(m_block, 0.0, x[0]), tl.where(m_block, 0.0, x[1])
    else:
        return (tl.where(m_block, 0.0, x[0]),)


@triton.jit
def select(m_block, x, y):
    if len(x) == 2:
        return tl.where(m_block, x[0], y[0]), tl.where(m_block, x[1], y[1])
    else:
        return (tl.where(m_block, x[0], y[0]),)


@triton.jit
def carry_on(a, h, RESET: tl.constexpr):
    """a h; with RESET a = 0 lets nothing pass, not even NaN."""
    if RESET:
        return clear(is_zero(a), multiply(a, h))
    else:
        return multiply(a, h)


@triton.jit
def saturate(part, m_inside):
    """The largest finite number instead of infinity, where both factors were finite."""
    LARGEST: tl.constexpr = 1.7976931348623157e308
    high = tl.where(m_inside & (part == INF), LARGEST, part)
    return tl.where(m_inside & (part == -INF), -LARGEST, high)


@triton.jit
def gather_gate(a, product):
    """a product, for the gates of a tile: 0 only where one of them is 0, infinite only where one of them is.

    Otherwise an underflow would act as a reset, and an overflow turn a state of 0 into NaN. In float64: a gate that is
    constant in time gives every tile the same product, and its rounding error would grow with the number of tiles.
    """
    SMALLEST: tl.constexpr = 2.2250738585072014e-308
    a = widen(a, tl.float64)
    m_inside = is_finite(a) & is_finite(product)
    m_passing = (is_zero(a) | is_zero(product)) == 0
    # A reset, even after a gate that is NaN.
    value = clear(is_zero(a), multiply(a, product))
    if len(value) == 2:
        value = (saturate(value[0], m_inside), saturate(value[1], m_inside))
        return tl.where(m_passing & is_zero(value), SMALLEST, value[0]), value[1]
    else:
        value = (saturate(value[0], m_inside),)
        return (tl.where(m_passing & is_zero(value), SMALLEST, value[0]),)


@triton.jit
def no_gates(BS: tl.constexpr, BG: tl.constexpr, COMPLEX: tl.constexpr):
    """The product of no gates, as `gather_gate` wants it."""
    if COMPLEX:
        return tl.full((BS, BG, 1), 1.0, tl.float64), tl.zeros((BS, BG, 1), tl.float64)
    else:
        return (tl.full((BS, BG, 1), 1.0, tl.float64),)


@triton.jit
def carry_reduced(a, h, RESET: tl.constexpr):
    """As `carry_on` inside a reduce pass, where 0 means that nothing has come yet and stays so under any gate."""
    return clear(is_zero(h), carry_on(a, h, RESET))


@triton.jit
def sum_channels(value):
    """[BS, BG, BR] -> [BS, BG, 1]."""
    if len(value) == 2:
        return tl.sum(value[0], axis=2, keep_dims=True), tl.sum(value[1], axis=2, keep_dims=True)
    else:
        return (tl.sum(value[0], axis=2, keep_dims=True),)


@triton.jit
def divide(x, y, STATE: tl.constexpr):
    """Rounded to nearest: alpha must be 1 exactly where a step adds nothing, or o would fade."""
    if STATE.primitive_bitwidth == 32:
        return tl.div_rn(x, y)
    else:
        return x / y


# ---- places


@triton.jit
def lanes(gates, reduced, BS: tl.constexpr, BG: tl.constexpr, BR: tl.constexpr):
    """Rows [BS, 1, 1], gates [1, BG, 1] and channels of a gate [1, 1, BR] of this program, and its block of R."""
    pid = tl.program_id(0)
    n_r = (reduced + BR - 1) // BR
    n_g = (gates + BG - 1) // BG
    i_r = pid % n_r
    i_g = pid // n_r % n_g
    i_s = pid // n_r // n_g
    b_i = i_s * BS + tl.arange(0, BS)[:, None, None]
    b_g = i_g * BG + tl.arange(0, BG)[None, :, None]
    b_r = i_r * BR + tl.arange(0, BR)[None, None, :]
    return b_i.to(tl.int64), b_g.to(tl.int64), b_r.to(tl.int64), i_r.to(tl.int64)


@triton.jit
def channels(b_g, b_r, gates, inner, GROUPED: tl.constexpr):
    """Channel numbers [1, BG, BR]. GROUPED: outer > 1; else r is the place inside a gate's one block."""
    if GROUPED:
        b_outer = b_r.to(tl.int32) // inner
        return b_outer.to(tl.int64) * (gates * inner) + b_g * inner + b_r.to(tl.int32) % inner
    else:
        return b_g * inner + b_r


@triton.jit
def locate(p_edges, p_sequence, p_tile, b_i, rows, packed_rows, tiled_rows, sequences, tiles, steps, T):
    """Where rows lie: sequence, batch row, first and past-the-last step of the sequence, first step and length of row.

    p_edges [sequences + 1] int64: where packed sequences begin, clamped here. Where their tiles are rows, p_sequence
    [rows] is the sequence of each, and p_tile [sequences + 1] the first row of each sequence.
    """
    m_packed = b_i < packed_rows
    m_tiled = b_i < tiled_rows
    b_listed = tl.load(p_sequence + b_i, mask=m_tiled, other=0)
    # Division in 32 bits, which is an instruction and not a call: there are fewer rows than that.
    b_batch = (b_i.to(tl.int32) // tiles).to(tl.int64)
    b_n = tl.where(m_tiled, b_listed, tl.where(m_packed, b_i, b_batch))
    b_tile = b_i - tl.load(p_tile + b_n, mask=m_tiled, other=0)
    b_tile = tl.where(m_tiled, b_tile, tl.where(m_packed, 0, b_i - b_batch * tiles))
    m_edge = m_packed & (b_i < rows)
    b_first = tl.load(p_edges + b_n, mask=m_edge & (b_n > 0), other=0)
    b_last = tl.load(p_edges + b_n + 1, mask=m_edge & (b_n + 1 < sequences), other=0)
    b_last = tl.where(m_edge & (b_n + 1 < sequences), b_last, T)
    b_first = tl.minimum(tl.maximum(b_first, 0), T)
    b_last = tl.minimum(tl.maximum(b_last, b_first), T)
    b_begin = tl.minimum(b_first + b_tile * steps, b_last)
    b_count = tl.where(b_i < rows, tl.minimum(b_last - b_begin, steps), 0)
    return b_n, tl.where(m_packed, 0, b_n), b_first, b_last, b_begin, b_count
