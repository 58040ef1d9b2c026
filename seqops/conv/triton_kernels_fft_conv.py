"""Triton kernels around the transforms of fft_conv: what reads a sequence for them, and what writes their results.

Letters: B batch, T time, C channels, n numbers of a transform; a row is one channel of one batch row. A transform wants
time along memory, a sequence has channels there: a program turns one tile of BLOCK_T x BLOCK_C.
"""

import triton
import triton.language as tl


@triton.jit
def locate(size, BLOCK: tl.constexpr, i):
    """The block number i % blocks of `size`, as offsets and mask, and i // blocks."""
    blocks = (size + BLOCK - 1) // BLOCK
    o = (i % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return o, o < size, i // blocks


# p_x [B, steps, C] in · p_skip [C // N] in, added to the first number of the first `skipped` channels
# p_rows [B, C, n] out, zeros from `steps` on
# p_first, p_last [B, C, tiles] out: times of the first (else `never`) and last (else -1) that is not finite, which
# becomes 0
@triton.jit
def fft_conv_read(
    p_x,
    p_skip,
    p_rows,
    p_first,
    p_last,
    steps,
    channels,
    n,
    kernels,
    never,
    skipped,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c, m_c, i = locate(channels, BLOCK_C, tl.program_id(0))
    o_t, m_t, b = locate(n, BLOCK_T, i)
    b = b.to(tl.int64)
    b_x = tl.load(
        p_x + b * stride_x_b + o_t[:, None] * stride_x_t + o_c[None, :] * stride_x_c,
        mask=(o_t < steps)[:, None] & m_c[None, :],
        other=0.0,
    ).to(p_rows.dtype.element_ty)
    b_skip = tl.load(p_skip + o_c // kernels, mask=o_c < skipped, other=0.0).to(p_rows.dtype.element_ty)
    b_x = tl.where((o_t == 0)[:, None], b_x + b_skip[None, :], b_x)
    finite = b_x - b_x == 0.0
    o_row = b * channels + o_c
    tl.store(p_rows + o_row[None, :] * n + o_t[:, None], tl.where(finite, b_x, 0.0), mask=m_t[:, None] & m_c[None, :])
    tiles = (n + BLOCK_T - 1) // BLOCK_T
    o_tile = o_row * tiles + i % tiles
    b_time = o_t[:, None] + tl.zeros((BLOCK_T, BLOCK_C), tl.int64)
    tl.store(p_first + o_tile, tl.min(tl.where(finite, never, b_time), 0), mask=m_c)
    tl.store(p_last + o_tile, tl.max(tl.where(finite, -1, b_time), 0), mask=m_c)


# p_rows [B, C, n] in · p_reach [C] in, of the first `reached` channels: numbers up to it become NaN
# p_y [B, steps, C] out
@triton.jit
def fft_conv_write(
    p_rows,
    p_reach,
    p_y,
    steps,
    channels,
    n,
    reached,
    stride_y_b,
    stride_y_t,
    stride_y_c,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    o_c, m_c, i = locate(channels, BLOCK_C, tl.program_id(0))
    o_t, m_t, b = locate(steps, BLOCK_T, i)
    b = b.to(tl.int64)
    mask = m_t[:, None] & m_c[None, :]
    b_y = tl.load(p_rows + (b * channels + o_c)[None, :] * n + o_t[:, None], mask=mask, other=0.0)
    b_reach = tl.load(p_reach + o_c, mask=o_c < reached, other=-1)
    b_y = tl.where(o_t[:, None] <= b_reach[None, :], float("nan"), b_y)
    tl.store(
        p_y + b * stride_y_b + o_t[:, None] * stride_y_t + o_c[None, :] * stride_y_c,
        b_y.to(p_y.dtype.element_ty),
        mask=mask,
    )


# p_x [B, T, C'] in, walked from its first step on, or from its last · p_bad [B, C'] in: below 0 if all is finite
# p_tap [C] in: the first tap that is not finite
# p_y [B, T, C] out: NaN where any x of the last `taps` steps is not finite, or the walk has come to that tap
# Channel c has channels c // outer * inner + 0 ... inner - 1 of x.
@triton.jit
def fft_conv_mark(
    p_x,
    p_bad,
    p_tap,
    p_y,
    steps,
    channels,
    sources,
    taps,
    outer,
    inner,
    backward,
    stride_x_b,
    stride_x_t,
    stride_x_c,
    stride_y_b,
    stride_y_t,
    stride_y_c,
    BLOCK_C: tl.constexpr,
):
    o_c, m_c, b = locate(channels, BLOCK_C, tl.program_id(0))
    b = b.to(tl.int64)
    o_x = o_c // outer * inner
    b_tap = tl.load(p_tap + o_c, mask=m_c, other=steps)
    b_bad = tl.full((BLOCK_C,), -1, tl.int64)
    for j in range(inner):
        b_bad = tl.maximum(b_bad, tl.load(p_bad + b * sources + o_x + j, mask=m_c, other=-1))
    some = tl.max(((b_bad >= 0) | (b_tap < steps)).to(tl.int32), 0)
    b_last = tl.full((BLOCK_C,), 0, tl.int64) - taps
    # Nearly always there is nothing to walk through.
    for i in range(tl.where(some > 0, steps, 0)):
        t = tl.where(backward != 0, steps - 1 - i, i).to(tl.int64)
        for j in range(inner):
            p = p_x + b * stride_x_b + t * stride_x_t + (o_x + j) * stride_x_c
            b_x = tl.load(p, mask=m_c, other=0.0).to(tl.float32)
            b_last = tl.where(b_x - b_x == 0.0, b_last, i)
        tl.store(
            p_y + b * stride_y_b + t * stride_y_t + o_c * stride_y_c,
            tl.full((BLOCK_C,), float("nan"), tl.float32).to(p_y.dtype.element_ty),
            mask=m_c & ((i - b_last < taps) | (i >= b_tap)),
        )
