"""Triton kernels of the recurrent cells.

    whole    one program holds the weights of a head for a block of batch rows, and walks all their steps
    steps    weights and states stay in memory; one program walks the steps of a head, or several share one step

B batch, T time, H heads, D units of a head, G gates, S storage dtype; sums and states are in float32. `units` is D; a
block has UNITS of them, which is a power of two: those past D are never stored. `given` has a bit for each argument
that there is: bit n for state n, BIAS and DH.

A sequence that we made is dense, [B, T, .., H, D] or with time first: pair (row, time) is number row * pair_b + time *
pair_t. wx and dh lie as they came: strides wx_b, wx_t, dh_b and dh_t are in multiples of ALIGN elements, 16 or 1, which
says how wide an access may be and follows neither B nor T. A row of n steps walks times 0 .. n-1, or n-1 .. 0 where
`reverse`. Rows do not meet: a NaN stays in its own.

A value is a tuple of blocks [ROWS, UNITS], one for each gate, state or plane.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

INF = tl.constexpr(math.inf)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LSTM, GRU, SLSTM, ELMAN = (tl.constexpr(i) for i in range(4))  # CELL
BIAS, DH, FIRST = tl.constexpr(4), tl.constexpr(4), tl.constexpr(5)  # bits of `given`
EVERY = tl.constexpr(15)  # all states


# ---- numbers


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def tanh(x):
    """From exp, and near zero, where that would cancel, a polynomial: relative errors below 4e-7.

    That is with an exp and a division of half a unit in the last place. A GPU has ex2.approx and div.full for them: by
    NVIDIA's bounds of these, at worst about 5e-7, an estimate.
    """
    square = x * x
    near = square * -5.70498872745e-3 + 2.06390887954e-2
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * x + x
    far = 1 - 2 / (tl.exp(2 * tl.abs(x)) + 1)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log1p(e^-|x|); the factor takes away what rounding 1 + e did to the logarithm."""
    e = tl.exp(-tl.abs(x))
    one = 1 + e
    return tl.where(x < 0, x, 0.0) - tl.where(one == 1, e, tl.log(one) * (e / (one - 1)))


@triton.jit
def quotient(c, n):
    return tl.where(n == 0, 0.0, c / tl.where(n == 0, 1.0, n))


@triton.jit
def clamp(x, limit):
    """NaN passes."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def narrow(x, S: tl.constexpr):
    """Rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts the bits off."""
    if INTERPRETED and tl.bfloat16 == S:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(S)


@triton.jit
def multiply(b_in, b_r, b_sum, PRECISION: tl.constexpr):
    """b_sum + b_in b_r in float32, of blocks in the storage dtype, which the interpreter knows no products of."""
    if INTERPRETED:
        return tl.dot(b_in.to(tl.float32), b_r.to(tl.float32), b_sum)
    else:
        return tl.dot(b_in, b_r, b_sum, input_precision=PRECISION)


@triton.jit
def products(b_in, b_r, sums, PRECISION: tl.constexpr):
    """sums + b_in r for each gate; sums may be one row for all."""
    value = ()
    for gate in tl.static_range(len(b_r)):
        b_sum = tl.zeros((b_in.shape[0], b_r[gate].shape[1]), tl.float32) + sums[gate]
        value = push(value, multiply(b_in, b_r[gate], b_sum, PRECISION))
    return value


@triton.jit
def sum_of_products(dy, b_r, b_sum, PRECISION: tl.constexpr):
    """b_sum + dy r, added over the gates."""
    for gate in tl.static_range(len(b_r)):
        b_sum = multiply(dy[gate], b_r[gate], b_sum, PRECISION)
    return b_sum


# ---- tuples


@triton.jit
def push(value, block):
    return value + (block,)  # noqa: RUF005  Triton knows no starred items


@triton.jit
def widen(value):
    wide = ()
    for i in tl.static_range(len(value)):
        wide = push(wide, value[i].to(tl.float32))
    return wide


@triton.jit
def narrow_all(value, S: tl.constexpr):
    narrowed = ()
    for i in tl.static_range(len(value)):
        narrowed = push(narrowed, narrow(value[i], S))
    return narrowed


@triton.jit
def add(x, y):
    sums = ()
    for i in tl.static_range(len(x)):
        sums = push(sums, x[i] + y[i])
    return sums


@triton.jit
def select(m_block, x, y):
    chosen = ()
    for i in tl.static_range(len(x)):
        chosen = push(chosen, tl.where(m_block, x[i], y[i]))
    return chosen


@triton.jit
def load(pointer, o_block, m_block, stride, COUNT: tl.constexpr):
    """COUNT blocks at o_block, each `stride` after the one before, in their storage dtype."""
    value = ()
    for _ in tl.static_range(COUNT):
        value = push(value, tl.load(pointer + o_block, mask=m_block, other=0.0))
        pointer += stride
    return value


@triton.jit
def store(pointer, o_block, m_block, stride, value):
    for i in tl.static_range(len(value)):
        tl.store(pointer + o_block, narrow(value[i], pointer.dtype.element_ty), mask=m_block)
        pointer += stride


@triton.jit
def load_states(pointers, o_block, m_block, given, absent, CELL: tl.constexpr):
    """[B, H, D] each; those that are not given are 0, m is `absent`."""
    value = ()
    for i in tl.static_range(states_of(CELL)):
        m_state = only(m_block, given, i)
        value = push(value, tl.load(pointers[i] + o_block, mask=m_state, other=absent if i == 3 else 0.0))
    return value


@triton.jit
def store_states(pointers, o_block, m_block, value):
    for i in tl.static_range(len(value)):
        tl.store(pointers[i] + o_block, value[i], mask=m_block)


# ---- the cells


@triton.constexpr_function
def gates_of(cell):
    return (4, 3, 4, 1)[cell]


@triton.constexpr_function
def states_of(cell):
    return (2, 1, 4, 1)[cell]


@triton.constexpr_function
def planes_of(cell):
    """Of the cache that the forward fills."""
    return (4, 3, 7, 0)[cell]


@triton.jit
def forward_cell(wx, y, state, relu, CELL: tl.constexpr):
    """The new states, the cache and what is kept beside it; y is the product, bias included."""
    if CELL == LSTM:
        p = add(wx, y)
        c = sigmoid(p[1]) * state[1] + sigmoid(p[0]) * tanh(p[2])
        return (sigmoid(p[3]) * tanh(c), c), p, (c,)
    elif CELL == GRU:
        p_r = wx[0] + y[0]
        p_z = wx[1] + y[1]
        p_n = wx[2] + sigmoid(p_r) * y[2]
        z = sigmoid(p_z)
        return ((1 - z) * tanh(p_n) + z * state[0],), (p_r, p_z, p_n), (y[2],)
    elif CELL == SLSTM:
        p = add(wx, y)
        decayed = log_sigmoid(p[1]) + state[3]
        won = (p[0] >= decayed) | (p[0] != p[0])  # NaN on either side wins over numbers
        m = tl.where(won, p[0], decayed)
        base = tl.where(m == -INF, 0.0, m)  # both are -inf: their difference would be NaN
        i = tl.exp(p[0] - base)
        f = tl.exp(decayed - base)
        c = f * state[1] + i * tanh(p[2])
        n = f * state[2] + i
        # The sign says who won, also of 0.
        marked = f.to(tl.int32, bitcast=True) | tl.where(won, -2147483648, 0)
        cache = (i, marked.to(tl.float32, bitcast=True), sigmoid(-p[1]), p[2], p[3], c, n)
        return (sigmoid(p[3]) * quotient(c, n), c, n, m), cache, ()
    else:
        p = wx[0] + y[0]
        return (tl.where(relu != 0, tl.where(p < 0, 0.0, p), tanh(p)),), (), ()


# What the backward reads: of the step the first planes of the cache, then what is kept (GRU) or h (Elman); of the step
# and of the one before c (LSTM); h, used only of the one before (GRU); c and n, planes of the cache (sLSTM).


@triton.constexpr_function
def now_of(cell):
    """Planes that are read of the step."""
    return (4, 3, 5, 0)[cell]


@triton.constexpr_function
def before_of(cell):
    """How many are read of the step before."""
    return (1, 1, 2, 0)[cell]


@triton.jit
def backward_cell(read, now, before, e, dstate, relu, CELL: tl.constexpr):
    """dp, dy and the gradients of the states before; that of h is what skips the product.

    `read`, `now` and `before` as told above.
    """
    if CELL == LSTM:
        i, f, g, o = sigmoid(read[0]), sigmoid(read[1]), tanh(read[2]), sigmoid(read[3])
        s = tanh(now[0])
        dc = dstate[1] + e * o * (1 - s * s)
        dp = (dc * g * i * (1 - i), dc * before[0] * f * (1 - f), dc * i * (1 - g * g), e * s * o * (1 - o))
        return dp, dp, (tl.zeros_like(e), dc * f)
    elif CELL == GRU:
        r, z, n = sigmoid(read[0]), sigmoid(read[1]), tanh(read[2])
        dp_n = e * (1 - z) * (1 - n * n)
        dp_z = e * (before[0] - n) * z * (1 - z)
        dp_r = dp_n * read[3] * r * (1 - r)
        return (dp_r, dp_z, dp_n), (dp_r, dp_z, r * dp_n), (z * e,)
    elif CELL == SLSTM:
        won = read[1].to(tl.int32, bitcast=True) < 0
        i, f, slope, z, o = read[0], tl.abs(read[1]), read[2], tanh(read[3]), sigmoid(read[4])
        q = quotient(now[0], now[1])
        dq = quotient(e * o, now[1])  # times dn/dq = -q
        dc = dstate[1] + dq
        dn = dstate[2] - dq * q
        delta = tl.where(won, 0.0, dstate[3])
        dp_i = (dc * z + dn) * i + tl.where(won, dstate[3], 0.0)
        dp_f = ((dc * before[0] + dn * before[1]) * f + delta) * slope
        dp = (dp_i, dp_f, dc * i * (1 - z * z), e * q * o * (1 - o))
        return dp, dp, (tl.zeros_like(e), dc * f, dn * f, delta)
    else:
        h = read[0]
        dp = (tl.where(relu != 0, tl.where(h <= 0, 0.0, e), e * (1 - h * h)),)
        return dp, dp, (tl.zeros_like(e),)


# ---- where things lie


@triton.jit
def locate(p_lengths, lengths_rows, heads, blocks, B, T, ROWS: tl.constexpr):
    """This program's head, its block of units, its rows [ROWS, 1] and their numbers of steps, none past B."""
    i_head = tl.program_id(0) // blocks % heads
    b_row = (tl.program_id(0) // (blocks * heads)).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    # Nothing checks the values on a GPU: clamped, they may give wrong results but never a wrong address.
    b_length = tl.load(p_lengths + b_row, mask=b_row < lengths_rows, other=T)
    b_length = tl.minimum(tl.maximum(b_length, 0), T).to(tl.int32)
    return i_head, tl.program_id(0) % blocks, b_row, tl.where(b_row < B, b_length, 0)


@triton.jit
def read_step(p_cache, p_beside, p_dh, b_pair, b_dh, b_unit, width, m_block, m_dh, CELL: tl.constexpr):
    """What the backward reads of a step alone, and dh."""
    NOW: tl.constexpr = now_of(CELL)
    read = load(p_cache, b_pair * (planes_of(CELL) * width) + b_unit, m_block, width, NOW)
    if CELL == GRU or CELL == ELMAN:  # noqa: SIM109  Triton knows no `in`
        read = push(read, tl.load(p_beside + b_pair * width + b_unit, mask=m_block, other=0.0))
    return push(read, tl.load(p_dh + b_dh + b_unit, mask=m_dh & m_block, other=0.0))


@triton.jit
def read_before(p_cache, p_beside, p_output, b_pair, b_unit, width, m_block, CELL: tl.constexpr):
    """What it reads both of a step and of the one before."""
    BEFORE: tl.constexpr = before_of(CELL)
    if CELL == SLSTM:
        o_cache = b_pair * (planes_of(CELL) * width) + b_unit
        return load(p_cache + now_of(CELL) * width, o_cache, m_block, width, BEFORE)
    else:
        return load(p_output if CELL == GRU else p_beside, b_pair * width + b_unit, m_block, 0, BEFORE)


@triton.jit
def read_initial(p_first, p_second, o_state, m_state, given, CELL: tl.constexpr):
    """The same before the first step: c0; h0; c0 and n0."""
    BEFORE: tl.constexpr = before_of(CELL)
    pointers = (p_first, p_second)
    value = ()
    for i in tl.static_range(BEFORE):
        value = push(value, tl.load(pointers[i] + o_state, mask=only(m_state, given, FIRST + i), other=0.0))
    return value


@triton.jit
def time_of(b_length, step, reverse, T):
    """When the rows have this step, 0 where they do not have it.

    Also for the compiler's sake: where addresses grow evenly it keeps one in registers for every access, too many.
    """
    b_time = tl.where(reverse != 0, b_length - 1 - step, step)
    return tl.where(has_step(b_length, step, T), b_time, 0).to(tl.int64)


@triton.jit
def only(m_block, given, BIT: tl.constexpr):
    """The mask where an argument is given, else nothing; the interpreter cannot join a block's mask and a scalar's."""
    return (m_block.to(tl.int32) & (given >> BIT)) != 0


@triton.jit
def has_step(b_length, step, T):
    """The rows that have this step, which none does below 0."""
    return b_length > tl.where(step >= 0, step, T)


@triton.jit
def load_weights(p_r, b_k, b_n, units, stride_g, stride_k, stride_n, GATES: tl.constexpr):
    """A block for each gate, zero past D."""
    return load(
        p_r, b_k.to(tl.int64) * stride_k + b_n.to(tl.int64) * stride_n, (b_k < units) & (b_n < units), stride_g, GATES
    )


# ---- the whole walk

# All that follows B and T, or another batch or length might wait for the compiler.
NEVER_SPECIALIZED = ["B", "T", "heads", "lengths_rows", "given", "reverse", "relu", "pair_b", "pair_t"]
NEVER_SPECIALIZED += ["wx_b", "wx_t", "dh_b", "dh_t"]


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def recurrence_forward(
    p_wx,  # [B, T, G, H, D] S
    p_r,  # [G, H, D, D] S
    p_b,  # [G, H, D] float32
    p_h0,  # [B, H, D] float32, as all states
    p_c0,
    p_n0,
    p_m0,
    p_lengths,  # [lengths_rows] int64
    p_h,  # [B, T, H, D] S
    p_h_n,
    p_c_n,
    p_n_n,
    p_m_n,
    p_cache,  # [B, T, planes, H, D] S
    p_kept,  # [B, T, H, D] S
    B,
    T,
    heads,
    units,
    lengths_rows,
    given,
    reverse,
    relu,
    wx_b,
    wx_t,
    stride_wx_g,
    stride_wx_h,
    stride_r_g,
    stride_r_h,
    stride_r_out,
    stride_r_in,
    pair_b,
    pair_t,
    CELL: tl.constexpr,
    TRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """p_t = wx_t + r h_{t-1} + b, then the cell. Memory beyond the outputs: none."""
    S: tl.constexpr = p_wx.dtype.element_ty
    GATES: tl.constexpr = gates_of(CELL)
    PLANES: tl.constexpr = planes_of(CELL)
    i_head, _, b_row, b_length = locate(p_lengths, lengths_rows, heads, 1, B, T, ROWS)
    b_unit = tl.arange(0, UNITS)[None, :]
    width = heads.to(tl.int64) * units
    place = i_head.to(tl.int64) * units
    m_unit = b_unit < units
    m_state = m_unit & (b_row < B)
    o_wx = b_row * wx_b * ALIGN + b_unit
    o_state = b_row * width + b_unit + place
    p_wx += i_head.to(tl.int64) * stride_wx_h

    p_r += i_head.to(tl.int64) * stride_r_h
    b_r = load_weights(p_r, tl.arange(0, UNITS)[:, None], b_unit, units, stride_r_g, stride_r_in, stride_r_out, GATES)
    b_bias = load(p_b + place, b_unit, only(m_unit, given, BIAS), width, GATES)
    state = load_states((p_h0, p_c0, p_n0, p_m0), o_state, m_state, given, -INF, CELL)
    o_next = o_wx + time_of(b_length, 0, reverse, T) * wx_t * ALIGN
    b_wx = load(p_wx, o_next, m_unit & (b_length > 0), stride_wx_g, GATES)
    # Also before the loop, for the compiler's sake: weights that only the loop uses are read from shared memory there.
    y = products(narrow(state[0], S), b_r, b_bias, PRECISION)
    for step in range(0, tl.max(b_length)):
        wx = widen(b_wx)
        new, cache, kept = forward_cell(wx, y, state, relu, CELL)
        b_now = b_length > step
        m_now = m_unit & b_now
        b_pair = b_row * pair_b + time_of(b_length, step, reverse, T) * pair_t
        store(p_h + place, b_pair * width + b_unit, m_now, 0, (new[0],))
        if TRAIN:
            store(p_cache + place, b_pair * (PLANES * width) + b_unit, m_now, width, cache)
            store(p_kept + place, b_pair * width + b_unit, m_now, 0, kept)
        state = select(b_now, new, state)
        # What the next step reads is on its way while this one multiplies; to widen it would be to wait for it.
        m_next = m_unit & (b_length > step + 1)
        o_next = o_wx + time_of(b_length, step + 1, reverse, T) * wx_t * ALIGN
        b_wx = load(p_wx, o_next, m_next, stride_wx_g, GATES)
        y = products(narrow(state[0], S), b_r, b_bias, PRECISION)
    store_states((p_h_n, p_c_n, p_n_n, p_m_n), o_state, m_state, state)


@triton.jit(do_not_specialize=NEVER_SPECIALIZED)
def recurrence_backward(
    p_dh,  # [B, T, H, D] S
    p_dh_n,  # [B, H, D] float32, as all states
    p_dc_n,
    p_dn_n,
    p_dm_n,
    p_r,  # [G, H, D, D] S
    p_cache,  # [B, T, planes, H, D] S
    p_kept,  # [B, T, H, D] S
    p_output,  # [B, T, H, D] S: h
    p_first,  # [B, H, D] float32: c0, or h0 of the GRU
    p_second,  # n0
    p_lengths,  # [lengths_rows] int64
    p_dwx,  # [B, T, G, H, D] S
    p_dy,  # [B, T, H, D] S: of the GRU's candidate
    p_dh0,
    p_dc0,
    p_dn0,
    p_dm0,
    B,
    T,
    heads,
    units,
    lengths_rows,
    given,
    reverse,
    relu,
    clip,
    dh_b,
    dh_t,
    stride_dh_h,
    stride_r_g,
    stride_r_h,
    stride_r_out,
    stride_r_in,
    pair_b,
    pair_t,
    CELL: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
):
    """From the last step to the first: dp of the cell, then the gradient of the h before it, sum over gates of r^T dy.

    p_dm_n and p_dm0 are the sLSTM's delta. Memory beyond the outputs: none.
    """
    S: tl.constexpr = p_r.dtype.element_ty
    GATES: tl.constexpr = gates_of(CELL)
    i_head, _, b_row, b_length = locate(p_lengths, lengths_rows, heads, 1, B, T, ROWS)
    b_unit = tl.arange(0, UNITS)[None, :]
    width = heads.to(tl.int64) * units
    place = i_head.to(tl.int64) * units
    m_unit = b_unit < units
    m_state = m_unit & (b_row < B)
    m_dh = only(m_unit, given, DH)
    o_dh = b_row * dh_b * ALIGN
    o_pair = b_row * pair_b
    o_state = b_row * width + b_unit + place
    p_dh += i_head.to(tl.int64) * stride_dh_h
    p_cache += place
    p_kept += place
    p_output += place
    p_beside = p_output if CELL == ELMAN else p_kept

    p_r += i_head.to(tl.int64) * stride_r_h
    b_r = load_weights(p_r, tl.arange(0, UNITS)[:, None], b_unit, units, stride_r_g, stride_r_out, stride_r_in, GATES)
    dstate = load_states((p_dh_n, p_dc_n, p_dn_n, p_dm_n), o_state, m_state, given, 0.0, CELL)
    last = tl.max(b_length) - 1
    b_time = time_of(b_length, last, reverse, T)
    o_before = o_pair + time_of(b_length, last - 1, reverse, T) * pair_t
    m_block = m_unit & has_step(b_length, last, T)
    o_now = o_pair + b_time * pair_t
    o_dh_now = o_dh + b_time * dh_t * ALIGN
    read = read_step(p_cache, p_beside, p_dh, o_now, o_dh_now, b_unit, width, m_block, m_dh, CELL)
    now = read_before(p_cache, p_beside, p_output, o_now, b_unit, width, m_block, CELL)
    m_block = m_unit & has_step(b_length, last - 1, T)
    before = read_before(p_cache, p_beside, p_output, o_before, b_unit, width, m_block, CELL)
    for back in range(0, last + 1):
        step = last - back
        wide = widen(read)
        b_now = widen(now)
        b_before = widen(before)
        if step == 0:
            b_before = read_initial(p_first, p_second, o_state, m_state, given, CELL)
        # What the next step reads is on its way while this one computes; to widen it would be to wait for it.
        b_time = time_of(b_length, step - 1, reverse, T)
        m_block = m_unit & has_step(b_length, step - 1, T)
        o_next = o_pair + b_time * pair_t
        o_dh_next = o_dh + b_time * dh_t * ALIGN
        read = read_step(p_cache, p_beside, p_dh, o_next, o_dh_next, b_unit, width, m_block, m_dh, CELL)
        now = before
        m_block = m_unit & has_step(b_length, step - 2, T)
        o_next = o_pair + time_of(b_length, step - 2, reverse, T) * pair_t
        before = read_before(p_cache, p_beside, p_output, o_next, b_unit, width, m_block, CELL)

        e = dstate[0] + wide[len(wide) - 1]
        dp, dy, new = backward_cell(wide, b_now, b_before, e, dstate, relu, CELL)
        m_row = b_length > step
        b_pair = o_pair + time_of(b_length, step, reverse, T) * pair_t
        store(p_dwx + place, b_pair * (GATES * width) + b_unit, m_unit & m_row, width, dp)
        if CELL == GRU:
            store(p_dy + place, b_pair * width + b_unit, m_unit & m_row, 0, (dy[2],))
        b_sum = sum_of_products(narrow_all(dy, S), b_r, new[0], PRECISION)
        dstate = select(m_row, (clamp(b_sum, clip),) + new[1:], dstate)  # noqa: RUF005  as above
    store_states((p_dh0, p_dc0, p_dn0, p_dm0), o_state, m_state, dstate)


# ---- some steps


@triton.jit(do_not_specialize=["begin", "end", "parts", *NEVER_SPECIALIZED])
def recurrence_forward_steps(
    p_wx,  # [B, T, G, H, D] S
    p_r,  # [G, H, D, D] S
    p_b,  # [G, H, D] float32
    p_in,  # [2, B, H, D] S: h before the step in slot step % 2, and after it in the other
    p_h_n,  # [B, H, D] float32, as all states: before the step, then after it
    p_c_n,
    p_n_n,
    p_m_n,
    p_lengths,  # [lengths_rows] int64
    p_h,  # [B, T, H, D] S
    p_cache,  # [B, T, planes, H, D] S
    p_kept,  # [B, T, H, D] S
    begin,
    end,
    parts,
    B,
    T,
    heads,
    units,
    lengths_rows,
    given,
    reverse,
    relu,
    wx_b,
    wx_t,
    stride_wx_g,
    stride_wx_h,
    stride_r_g,
    stride_r_h,
    stride_r_out,
    stride_r_in,
    pair_b,
    pair_t,
    CELL: tl.constexpr,
    TRAIN: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,  # of the product at a time
):
    """As recurrence_forward, steps begin to end - 1. Weights and states are in memory, so D is as it likes.

    `parts` programs share a head's units. One may walk many steps; where there are more, a launch is a step.
    """
    GATES: tl.constexpr = gates_of(CELL)
    PLANES: tl.constexpr = planes_of(CELL)
    i_head, i_part, b_row, b_length = locate(p_lengths, lengths_rows, heads, parts, B, T, ROWS)
    width = heads.to(tl.int64) * units
    place = i_head.to(tl.int64) * units
    slot = B.to(tl.int64) * width
    states = (p_h_n, p_c_n, p_n_n, p_m_n)
    p_wx += i_head.to(tl.int64) * stride_wx_h
    p_r += i_head.to(tl.int64) * stride_r_h
    p_b += place
    p_h += place
    p_cache += place
    p_kept += place
    for step in range(begin, tl.minimum(end, tl.max(b_length))):
        tl.debug_barrier()  # what other threads wrote a step before is read
        m_row = b_length > step
        b_time = time_of(b_length, step, reverse, T)
        b_pair = b_row * pair_b + b_time * pair_t
        for i_block in range(i_part, tl.cdiv(units, UNITS), parts):
            b_unit = i_block * UNITS + tl.arange(0, UNITS)[None, :]
            m_unit = b_unit < units
            m_now = m_unit & m_row
            b_bias = load(p_b, b_unit, only(m_unit, given, BIAS), width, GATES)
            y = ()
            for gate in tl.static_range(GATES):
                y = push(y, tl.zeros((ROWS, UNITS), tl.float32) + b_bias[gate])
            for start in range(0, units, DEPTH):
                b_k = start + tl.arange(0, DEPTH)
                o_in = b_row * width + place + b_k[None, :]
                b_in = tl.load(p_in + (step % 2) * slot + o_in, mask=m_row & (b_k[None, :] < units), other=0.0)
                b_r = load_weights(p_r, b_k[:, None], b_unit, units, stride_r_g, stride_r_in, stride_r_out, GATES)
                y = products(b_in, b_r, y, PRECISION)
            o_wx = b_row * wx_b * ALIGN + b_time * wx_t * ALIGN + b_unit
            wx = widen(load(p_wx, o_wx, m_now, stride_wx_g, GATES))
            o_state = b_row * width + b_unit + place
            new, cache, kept = forward_cell(wx, y, load_states(states, o_state, m_now, EVERY, 0.0, CELL), relu, CELL)
            store(p_h, b_pair * width + b_unit, m_now, 0, (new[0],))
            store(p_in + (1 - step % 2) * slot, o_state, m_now, 0, (new[0],))
            if TRAIN:
                store(p_cache, b_pair * (PLANES * width) + b_unit, m_now, width, cache)
                store(p_kept, b_pair * width + b_unit, m_now, 0, kept)
            store_states(states, o_state, m_now, new)


@triton.jit(do_not_specialize=["begin", "end", "parts", *NEVER_SPECIALIZED])
def recurrence_backward_steps(
    p_dh,  # [B, T, H, D] S
    p_dh0,  # [B, H, D] float32, as all states: after the step, then before it; of h what skips the product
    p_dc0,
    p_dn0,
    p_dm0,
    p_r,  # [G, H, D, D] S
    p_cache,  # [B, T, planes, H, D] S
    p_kept,  # [B, T, H, D] S
    p_output,  # [B, T, H, D] S: h
    p_first,  # [B, H, D] float32: c0, or h0 of the GRU
    p_second,  # n0
    p_lengths,  # [lengths_rows] int64
    p_dwx,  # [B, T, G, H, D] S
    p_dy,  # [B, T, H, D] S: of the GRU's candidate
    begin,
    end,
    parts,
    B,
    T,
    heads,
    units,
    lengths_rows,
    given,
    reverse,
    relu,
    clip,
    dh_b,
    dh_t,
    stride_dh_h,
    stride_r_g,
    stride_r_h,
    stride_r_out,
    stride_r_in,
    pair_b,
    pair_t,
    CELL: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    UNITS: tl.constexpr,
    DEPTH: tl.constexpr,  # of the product at a time
):
    """As recurrence_backward, from step end - 1 to `begin`: the product with the dy of the step after, then the cell.

    Step -1 is the product alone. Weights and states are in memory; programs and launches are those of the forward.
    """
    GATES: tl.constexpr = gates_of(CELL)
    i_head, i_part, b_row, b_length = locate(p_lengths, lengths_rows, heads, parts, B, T, ROWS)
    width = heads.to(tl.int64) * units
    place = i_head.to(tl.int64) * units
    states = (p_dh0, p_dc0, p_dn0, p_dm0)
    p_dh += i_head.to(tl.int64) * stride_dh_h
    p_r += i_head.to(tl.int64) * stride_r_h
    p_cache += place
    p_kept += place
    p_output += place
    p_dwx += place
    p_dy += place
    p_beside = p_output if CELL == ELMAN else p_kept
    for back in range(0, end - begin):
        step = end - 1 - back
        tl.debug_barrier()  # what other threads wrote a step before is read
        m_row = has_step(b_length, step, T)
        m_before = has_step(b_length, step - 1, T)
        m_after = b_length > step + 1
        b_time = time_of(b_length, step, reverse, T)
        b_pair = b_row * pair_b + b_time * pair_t
        b_after = b_row * pair_b + time_of(b_length, step + 1, reverse, T) * pair_t
        o_dh = b_row * dh_b * ALIGN + b_time * dh_t * ALIGN
        for i_block in range(i_part, tl.cdiv(units, UNITS), parts):
            b_unit = i_block * UNITS + tl.arange(0, UNITS)[None, :]
            m_unit = b_unit < units
            m_now = m_unit & m_row
            o_state = b_row * width + b_unit + place
            dstate = load_states(states, o_state, m_unit & (b_row < B), EVERY, 0.0, CELL)
            b_sum = dstate[0]
            for start in range(0, tl.where(step + 1 < T, units, 0), DEPTH):
                b_k = start + tl.arange(0, DEPTH)
                m_in = m_after & (b_k[None, :] < units)
                dy = load(p_dwx, b_after * (GATES * width) + b_k[None, :], m_in, width, 2 if CELL == GRU else GATES)
                if CELL == GRU:
                    dy = push(dy, tl.load(p_dy + b_after * width + b_k[None, :], mask=m_in, other=0.0))
                b_r = load_weights(p_r, b_k[:, None], b_unit, units, stride_r_g, stride_r_out, stride_r_in, GATES)
                b_sum = sum_of_products(dy, b_r, b_sum, PRECISION)
            b_a = tl.where(m_after, clamp(b_sum, clip), dstate[0])

            m_dh = only(m_unit, given, DH)
            read = widen(read_step(p_cache, p_beside, p_dh, b_pair, o_dh, b_unit, width, m_now, m_dh, CELL))
            now = widen(read_before(p_cache, p_beside, p_output, b_pair, b_unit, width, m_now, CELL))
            o_before = b_row * pair_b + time_of(b_length, step - 1, reverse, T) * pair_t
            before = widen(read_before(p_cache, p_beside, p_output, o_before, b_unit, width, m_unit & m_before, CELL))
            if step == 0:
                before = read_initial(p_first, p_second, o_state, m_now, given, CELL)
            dp, dy_now, new = backward_cell(read, now, before, b_a + read[len(read) - 1], dstate, relu, CELL)
            store(p_dwx, b_pair * (GATES * width) + b_unit, m_now, width, dp)
            if CELL == GRU:
                store(p_dy, b_pair * width + b_unit, m_now, 0, (dy_now[2],))
            m_h = m_unit & (b_length > tl.maximum(step, 0))
            tl.store(p_dh0 + o_state, tl.where(step < 0, b_a, new[0]), mask=m_h)
            store_states((p_dc0, p_dn0, p_dm0), o_state, m_now, new[1:])
