"""Triton kernels of newton_schulz: X <- a X + (b A + c A A) X with A = X X^T, and its adjoint.

    newton_schulz_sizes   of each tile of a matrix: the largest magnitude, and the sum of squares relative to it
    newton_schulz_norms   norms from those
    newton_schulz_scale   X / (norm + eps) into a padded matrix
    newton_schulz_gram    alpha X Y^T, or alpha (X Y^T + Y X^T), and beta E: tiles of the lower triangle, mirrored
    newton_schulz_step    a Y + P Y, or a Y + P Y + Q X
    newton_schulz_whole   all of that, where m is small: a program has a matrix, A and its polynomial on chip
    newton_schulz_inner   sums of x Y over tiles, where the norm depends on x
    newton_schulz_end     the gradient of x from that of X_0

n matrices of m <= N, sizes that are multiples of 16: what a matrix lacks of them is zeros, which every step keeps. So
only what reads arguments and writes results has masks for single elements. O dtype of operands, REAL that of sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# ---- numbers


@triton.jit
def narrow(x, O: tl.constexpr):  # noqa: E741
    """Rounded to nearest even, which Triton's interpreter does not do for bfloat16: it cuts the bits off."""
    if INTERPRETED and tl.bfloat16 == O:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(O)


@triton.jit
def operand(pointers, mask, REAL: tl.constexpr):
    """A block for a product: in its storage dtype, of which the interpreter knows no products."""
    block = tl.load(pointers, mask=mask, other=0.0)
    if INTERPRETED:
        block = block.to(REAL)
    return block


@triton.jit
def block_of(i, size, BLOCK: tl.constexpr):
    """The block number i % blocks of `size`, as offsets and mask, and i // blocks."""
    blocks = (size + BLOCK - 1) // BLOCK
    o = (i % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return o, o < size, i // blocks


@triton.jit
def divisor(p_norm, i_n, eps, eps_rest):
    """What a matrix is divided by, and 0 for one of zeros, else 1."""
    norm = tl.load(p_norm + i_n)
    some = tl.where(norm == 0, 0.0, 1.0)
    whole = (norm * 0 + eps + eps_rest) + norm
    return tl.where(norm == 0, norm * 0 + 1, whole), some.to(norm.dtype)


# ---- norms


@triton.jit
def newton_schulz_sizes(
    p_x,  # [n, rows, columns]
    p_most,  # [n, tiles]
    p_sum,
    rows,
    columns,
    stride_x_n,
    stride_x_r,
    stride_x_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Infinities count as 1 each beside an infinite magnitude."""
    REAL: tl.constexpr = p_most.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    o_c, m_c, i = block_of(pid, columns, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows, BLOCK_R)
    o_x = i_n * stride_x_n + o_r[:, None] * stride_x_r + o_c[None, :] * stride_x_c
    b_x = tl.abs(tl.load(p_x + o_x, mask=m_r[:, None] & m_c[None, :], other=0.0).to(REAL))
    most = tl.max(tl.max(b_x, axis=1), axis=0)
    by = tl.where(most == 0, most * 0 + 1, most)
    b_part = tl.where(b_x == by, 1.0, b_x / by)
    tl.store(p_most + pid, most)
    tl.store(p_sum + pid, tl.sum(tl.sum(b_part * b_part, axis=1), axis=0))


@triton.jit
def newton_schulz_norms(
    p_most,  # [n, tiles]
    p_sum,
    p_norm,  # [n]
    tiles,
    BLOCK: tl.constexpr,
):
    REAL: tl.constexpr = p_most.dtype.element_ty
    i_n = tl.program_id(0).to(tl.int64)
    b_most = tl.zeros([BLOCK], REAL)
    for t in range(0, tiles, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        b_tile = tl.load(p_most + i_n * tiles + o_t, mask=o_t < tiles, other=0.0)
        b_most = tl.where(b_tile > b_most, b_tile, b_most)
    most = tl.max(b_most, axis=0)
    by = tl.where(most == 0, most * 0 + 1, most)
    b_sum = tl.zeros([BLOCK], REAL)
    for t in range(0, tiles, BLOCK):
        o_t = t + tl.arange(0, BLOCK)
        b_tile = tl.load(p_most + i_n * tiles + o_t, mask=o_t < tiles, other=0.0)
        b_part = tl.where(b_tile == by, 1.0, b_tile / by)
        b_sum += b_part * b_part * tl.load(p_sum + i_n * tiles + o_t, mask=o_t < tiles, other=0.0)
    tl.store(p_norm + i_n, most * tl.sqrt(tl.sum(b_sum, axis=0)))


@triton.jit
def newton_schulz_scale(
    p_x,  # [n, rows, columns]
    p_norm,  # [n]
    p_y,  # [n, rows_y, columns_y]
    eps,  # as a sum of two
    eps_rest,
    rows,
    columns,
    stride_x_n,
    stride_x_r,
    stride_x_c,
    rows_y,
    columns_y,
    stride_y_n,
    stride_y_r,
    stride_y_c,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    REAL: tl.constexpr = p_norm.dtype.element_ty
    o_c, m_c, i = block_of(tl.program_id(0).to(tl.int64), columns_y, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows_y, BLOCK_R)
    o_x = i_n * stride_x_n + o_r[:, None] * stride_x_r + o_c[None, :] * stride_x_c
    b_x = tl.load(p_x + o_x, mask=(o_r < rows)[:, None] & (o_c < columns)[None, :], other=0.0).to(REAL)
    by, some = divisor(p_norm, i_n, eps, eps_rest)
    o_y = i_n * stride_y_n + o_r[:, None] * stride_y_r + o_c[None, :] * stride_y_c
    tl.store(p_y + o_y, narrow(b_x * some / by, p_y.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


# ---- products


@triton.jit
def newton_schulz_gram(
    p_x,  # [n, m, K]
    p_y,  # [n, m, K], read where PAIR
    p_e,  # [n, m, m], read where ADD
    p_c,  # [n, m, m]
    alpha,  # each as a sum of two
    alpha_rest,
    beta,
    beta_rest,
    m,
    K,
    PAIR: tl.constexpr,
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile on or below the diagonal, and its mirror image."""
    O: tl.constexpr = p_c.dtype.element_ty  # noqa: E741
    REAL: tl.constexpr = tl.float64 if tl.float64 == O else tl.float32
    tiles = (m + BM - 1) // BM
    triangle = tiles * (tiles + 1) // 2
    pid = tl.program_id(0)
    i_n = (pid // triangle).to(tl.int64)
    i = pid % triangle
    i_r = ((tl.sqrt(8.0 * i.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_r = tl.where(i_r * (i_r + 1) // 2 > i, i_r - 1, i_r)
    i_r = tl.where((i_r + 1) * (i_r + 2) // 2 <= i, i_r + 1, i_r)
    i_c = i - i_r * (i_r + 1) // 2
    o_r = i_r * BM + tl.arange(0, BM)
    o_c = i_c * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    m_r = o_r < m
    m_c = o_c < m
    o_xr = i_n * m * K + o_r.to(tl.int64)[:, None] * K + o_k[None, :]
    o_xc = i_n * m * K + o_c.to(tl.int64)[:, None] * K + o_k[None, :]
    b_c = tl.zeros([BM, BM], REAL)
    for k in range(0, K, BK):
        m_k = (k + o_k < K)[None, :]
        b_r = operand(p_x + o_xr + k, m_r[:, None] & m_k, REAL)
        if PAIR:
            b_t = operand(p_y + o_xc + k, m_c[:, None] & m_k, REAL)
        else:
            b_t = operand(p_x + o_xc + k, m_c[:, None] & m_k, REAL)
        b_c = tl.dot(b_r, tl.trans(b_t), acc=b_c, out_dtype=REAL, input_precision=PRECISION)
    if PAIR:
        for k in range(0, K, BK):
            m_k = (k + o_k < K)[None, :]
            b_r = operand(p_y + o_xr + k, m_r[:, None] & m_k, REAL)
            b_t = operand(p_x + o_xc + k, m_c[:, None] & m_k, REAL)
            b_c = tl.dot(b_r, tl.trans(b_t), acc=b_c, out_dtype=REAL, input_precision=PRECISION)
    b_c = b_c * (tl.zeros([BM, BM], REAL) + alpha + alpha_rest)
    mask = m_r[:, None] & m_c[None, :]
    o_e = i_n * m * m + o_r.to(tl.int64)[:, None] * m + o_c[None, :]
    if ADD:
        b_e = tl.load(p_e + o_e, mask=mask, other=0.0).to(REAL)
        b_c += b_e * (tl.zeros([BM, BM], REAL) + beta + beta_rest)
    b_out = narrow(b_c, O)
    tl.store(p_c + o_e, b_out, mask=mask)
    if i_r != i_c:
        o_m = i_n * m * m + o_c.to(tl.int64)[:, None] * m + o_r[None, :]
        tl.store(p_c + o_m, tl.trans(b_out), mask=m_c[:, None] & m_r[None, :])


@triton.jit
def newton_schulz_step(
    p_p,  # [n, m, m]
    p_y,  # [n, m, N]
    p_q,  # [n, m, m], read where PAIR
    p_x,  # [n, m, N]
    p_out,  # [n, rows, columns]: the first of m and N
    a,  # as a sum of two
    a_rest,
    m,
    N,
    rows,
    columns,
    stride_out_n,
    stride_out_r,
    stride_out_c,
    PAIR: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    REAL: tl.constexpr = tl.float64 if tl.float64 == p_y.dtype.element_ty else tl.float32
    pid = tl.program_id(0)
    n_r = (m + BM - 1) // BM
    n_c = (N + BN - 1) // BN
    i_r = pid % n_r
    i_c = pid // n_r % n_c
    i_n = (pid // n_r // n_c).to(tl.int64)
    o_r = i_r * BM + tl.arange(0, BM)
    o_c = i_c * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_r = o_r < m
    m_c = o_c < N
    o_p = i_n * m * m + o_r.to(tl.int64)[:, None] * m + o_k[None, :]
    o_y = i_n * m * N + o_c[None, :]
    b_out = tl.zeros([BM, BN], REAL)
    for k in range(0, m, BK):
        m_k = k + o_k < m
        b_p = operand(p_p + o_p + k, m_r[:, None] & m_k[None, :], REAL)
        b_y = operand(p_y + o_y + (k + o_k).to(tl.int64)[:, None] * N, m_k[:, None] & m_c[None, :], REAL)
        b_out = tl.dot(b_p, b_y, acc=b_out, out_dtype=REAL, input_precision=PRECISION)
    if PAIR:
        for k in range(0, m, BK):
            m_k = k + o_k < m
            b_p = operand(p_q + o_p + k, m_r[:, None] & m_k[None, :], REAL)
            b_y = operand(p_x + o_y + (k + o_k).to(tl.int64)[:, None] * N, m_k[:, None] & m_c[None, :], REAL)
            b_out = tl.dot(b_p, b_y, acc=b_out, out_dtype=REAL, input_precision=PRECISION)
    o_own = i_n * m * N + o_r.to(tl.int64)[:, None] * N + o_c[None, :]
    b_own = tl.load(p_y + o_own, mask=m_r[:, None] & m_c[None, :], other=0.0).to(REAL)
    b_out += b_own * (tl.zeros([BM, BN], REAL) + a + a_rest)
    o_out = i_n * stride_out_n + o_r.to(tl.int64)[:, None] * stride_out_r + o_c.to(tl.int64)[None, :] * stride_out_c
    mask = (o_r < rows)[:, None] & (o_c < columns)[None, :]
    tl.store(p_out + o_out, narrow(b_out, p_out.dtype.element_ty), mask=mask)


@triton.jit
def newton_schulz_whole(
    p_x,  # [n, rows, columns], read where `begin`
    p_norm,  # [n], written where `begin`
    p_y,  # [n, BM, N]: X, in and out
    p_out,  # [n, rows, columns], written where `finish`
    begin,
    finish,
    steps,
    eps,  # each as a sum of two
    eps_rest,
    a,
    a_rest,
    b,
    b_rest,
    c,
    c_rest,
    N,
    rows,
    columns,
    stride_x_n,
    stride_x_r,
    stride_x_c,
    stride_out_n,
    stride_out_r,
    stride_out_c,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Norm and X_0 where `begin`, then steps of equal coefficients, of which the last writes the result where `finish`.

    A step walks the columns of X once: each block takes its step, and adds to the next A.
    """
    O: tl.constexpr = p_y.dtype.element_ty  # noqa: E741
    REAL: tl.constexpr = p_norm.dtype.element_ty
    i_n = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    m_r = (o_r < rows)[:, None]
    p_x += i_n * stride_x_n + o_r.to(tl.int64)[:, None] * stride_x_r
    p_out += i_n * stride_out_n + o_r.to(tl.int64)[:, None] * stride_out_r
    p_y += i_n * BM * N + o_r.to(tl.int64)[:, None] * N

    if begin > 0:
        b_most = tl.zeros([BM, BN], REAL)
        for j in range(0, N, BN):
            o_c = (j + o_n).to(tl.int64)[None, :]
            b_x = tl.abs(tl.load(p_x + o_c * stride_x_c, mask=m_r & (o_c < columns), other=0.0).to(REAL))
            # NaN is found below.
            b_most = tl.where(b_x > b_most, b_x, b_most)
        most = tl.max(tl.max(b_most, axis=1), axis=0)
        by = tl.where(most == 0, most * 0 + 1, most)
        b_sum = tl.zeros([BM, BN], REAL)
        for j in range(0, N, BN):
            o_c = (j + o_n).to(tl.int64)[None, :]
            b_x = tl.abs(tl.load(p_x + o_c * stride_x_c, mask=m_r & (o_c < columns), other=0.0).to(REAL))
            b_part = tl.where(b_x == by, 1.0, b_x / by)
            b_sum += b_part * b_part
        norm = most * tl.sqrt(tl.sum(tl.sum(b_sum, axis=1), axis=0))
        tl.store(p_norm + i_n, norm)
        whole = tl.where(norm == 0, norm * 0 + 1, (norm * 0 + eps + eps_rest) + norm)
        for j in range(0, N, BN):
            o_c = (j + o_n).to(tl.int64)[None, :]
            b_x = tl.load(p_x + o_c * stride_x_c, mask=m_r & (o_c < columns), other=0.0).to(REAL)
            tl.store(p_y + o_c, narrow(b_x / whole, O), mask=o_c < N)
        tl.debug_barrier()

    b_gram = tl.zeros([BM, BM], REAL)
    for j in range(0, N, BN):
        o_c = (j + o_n)[None, :]
        b_y = operand(p_y + o_c, o_c < N, REAL)
        b_gram = tl.dot(b_y, tl.trans(b_y), acc=b_gram, out_dtype=REAL, input_precision=PRECISION)
    one = tl.zeros([1, 1], REAL)
    for step in range(0, steps):
        b_a = narrow(b_gram, O)
        if INTERPRETED:
            b_a = b_a.to(REAL)
        b_p = tl.dot(b_a, b_a, out_dtype=REAL, input_precision=PRECISION) * (one + c + c_rest)
        b_p = narrow(b_p + b_gram * (one + b + b_rest), O)
        if INTERPRETED:
            b_p = b_p.to(REAL)
        b_gram = tl.zeros([BM, BM], REAL)
        for j in range(0, N, BN):
            o_c = (j + o_n)[None, :]
            b_y = operand(p_y + o_c, o_c < N, REAL)
            b_new = tl.dot(b_p, b_y, out_dtype=REAL, input_precision=PRECISION) + b_y.to(REAL) * (one + a + a_rest)
            b_y = narrow(b_new, O)
            if finish * (step + 1) == steps:
                m_out = m_r & (o_c < columns)
                tl.store(p_out + o_c.to(tl.int64) * stride_out_c, narrow(b_new, p_out.dtype.element_ty), mask=m_out)
            else:
                tl.store(p_y + o_c, b_y, mask=o_c < N)
            if INTERPRETED:
                b_y = b_y.to(REAL)
            b_gram = tl.dot(b_y, tl.trans(b_y), acc=b_gram, out_dtype=REAL, input_precision=PRECISION)
        # The next step's threads read what others have written.
        tl.debug_barrier()


# ---- the gradient of the norm


@triton.jit
def newton_schulz_inner(
    p_x,  # [n, rows, columns]
    p_norm,  # [n]
    p_y,  # [n, m, N]
    p_inner,  # [n, tiles]
    eps,  # as a sum of two
    eps_rest,
    rows,
    columns,
    stride_x_n,
    stride_x_r,
    stride_x_c,
    m,
    N,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Of X_0 = x / (norm + eps) and Y, the gradient of it."""
    REAL: tl.constexpr = p_norm.dtype.element_ty
    pid = tl.program_id(0).to(tl.int64)
    o_c, m_c, i = block_of(pid, columns, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows, BLOCK_R)
    mask = m_r[:, None] & m_c[None, :]
    o_x = i_n * stride_x_n + o_r[:, None] * stride_x_r + o_c[None, :] * stride_x_c
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(REAL)
    b_y = tl.load(p_y + i_n * m * N + o_r[:, None] * N + o_c[None, :], mask=mask, other=0.0).to(REAL)
    by, some = divisor(p_norm, i_n, eps, eps_rest)
    tl.store(p_inner + pid, tl.sum(tl.sum(b_x * some / by * b_y, axis=1), axis=0))


@triton.jit
def newton_schulz_end(
    p_x,  # [n, rows, columns]
    p_norm,  # [n]
    p_y,  # [n, m, N]
    p_inner,  # [n]
    p_size,  # [n]: what dx is multiplied by
    p_dx,  # [n, rows, columns]
    eps,  # as a sum of two
    eps_rest,
    rows,
    columns,
    stride_x_n,
    stride_x_r,
    stride_x_c,
    stride_dx_n,
    stride_dx_r,
    stride_dx_c,
    m,
    N,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = Y / (norm + eps) - X_0 <X_0, Y> / norm"""
    REAL: tl.constexpr = p_norm.dtype.element_ty
    o_c, m_c, i = block_of(tl.program_id(0).to(tl.int64), columns, BLOCK_C)
    o_r, m_r, i_n = block_of(i, rows, BLOCK_R)
    mask = m_r[:, None] & m_c[None, :]
    o_x = i_n * stride_x_n + o_r[:, None] * stride_x_r + o_c[None, :] * stride_x_c
    b_x = tl.load(p_x + o_x, mask=mask, other=0.0).to(REAL)
    b_y = tl.load(p_y + i_n * m * N + o_r[:, None] * N + o_c[None, :], mask=mask, other=0.0).to(REAL)
    by, some = divisor(p_norm, i_n, eps, eps_rest)
    norm = tl.load(p_norm + i_n)
    slope = tl.load(p_inner + i_n) / tl.where(norm == 0, norm * 0 + 1, norm)
    b_dx = (b_y / by - b_x / by * slope) * tl.load(p_size + i_n)
    b_dx = tl.where(some == 0, 0.0, b_dx)
    o_dx = i_n * stride_dx_n + o_r[:, None] * stride_dx_r + o_c[None, :] * stride_dx_c
    tl.store(p_dx + o_dx, narrow(b_dx, p_dx.dtype.element_ty), mask=mask)
