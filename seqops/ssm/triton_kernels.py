"""Triton kernels of ssm_kernel and cauchy_kernel.

    K_l = 2 Re sum_n c_n e^{l z_n}        y_l = sum_n v_n / (w_l - p_n) + conj(v_n) / (w_l - conj(p_n))

H heads, N modes of a head, L length or nodes; complex numbers are pairs. With l = C j + i, `powers` makes the tables
e^{i z} [H, C, N] and e^{C j z} [H, J, N], J = L / C, the phase reduced in float64; a program of `ssm_kernel_*` is one
head and a tile of R rows j and C columns i, and takes the modes one after the other: products are float32
multiplications and additions, never TF32. A program of `cauchy_kernel_*` is a stretch of nodes, of one head, or of a
few for gradients.
Sums over tiles are written apart and added afterwards, in their order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sine_cosine(x):
    """Of float64 numbers up to 1e9, without libraries: those keep tables for larger ones in local memory."""
    quarters = tl.floor(x * 0.63661977236758134308 + 0.5)
    r = (x - quarters * 1.57079632673412561417e00) - quarters * 6.07710050630396597660e-11
    r = r - quarters * 2.02226624879595063154e-21
    s = r * r
    sine = -7.6471637318198164759e-13 + s * 2.8114572543455207632e-15
    sine = 1.6059043836821614599e-10 + s * sine
    sine = -2.5052108385441718775e-08 + s * sine
    sine = 2.7557319223985890653e-06 + s * sine
    sine = -1.9841269841269841270e-04 + s * sine
    sine = 8.3333333333333333333e-03 + s * sine
    sine = -1.6666666666666666667e-01 + s * sine
    sine = r + r * s * sine
    cosine = 4.7794773323873852974e-14 - s * 1.5619206968586226463e-16
    cosine = -1.1470745597729724714e-11 + s * cosine
    cosine = 2.0876756987868098979e-09 + s * cosine
    cosine = -2.7557319223985890653e-07 + s * cosine
    cosine = 2.4801587301587301587e-05 + s * cosine
    cosine = -1.3888888888888888889e-03 + s * cosine
    cosine = 4.1666666666666666667e-02 + s * cosine
    cosine = 1.0 - s * (0.5 - s * cosine)
    quadrant = quarters - 4 * tl.floor(quarters * 0.25)
    swap = (quadrant == 1) | (quadrant == 3)
    of_sine = tl.where(swap, cosine, sine)
    of_cosine = tl.where(swap, sine, cosine)
    return tl.where(quadrant >= 2, -of_sine, of_sine), tl.where(
        (quadrant == 1) | (quadrant == 2), -of_cosine, of_cosine
    )


@triton.jit
def powers(
    p_z,  # [H, N, 2]
    p_c,  # [H, N, 2], used where SCALED
    p_table,  # [H, count, N, 2]
    N,
    count,
    step,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """e^{step m z} for m < count, times 2 c where SCALED."""
    i_h = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_i = i < count * N
    o_n = (i_h * N + i % N) * 2
    m = (i // N * step).to(tl.float64)
    z_re = tl.load(p_z + o_n, mask=m_i, other=0.0).to(tl.float64)
    z_im = tl.load(p_z + o_n + 1, mask=m_i, other=0.0).to(tl.float64)
    size = tl.exp(m * tl.where(m == 0, 0.0, z_re))
    sine, cosine = sine_cosine(m * tl.where(m == 0, 0.0, z_im))
    re = size * cosine
    im = tl.where(sine == 0, 0.0, size * sine)
    if SCALED:
        c_re = 2 * tl.load(p_c + o_n, mask=m_i, other=0.0).to(tl.float64)
        c_im = 2 * tl.load(p_c + o_n + 1, mask=m_i, other=0.0).to(tl.float64)
        scaled = c_re * re - c_im * im
        im = c_re * im + c_im * re
        re = scaled
    o_table = (i_h * count * N + i) * 2
    REAL: tl.constexpr = p_table.dtype.element_ty
    tl.store(p_table + o_table, re.to(REAL), mask=m_i)
    tl.store(p_table + o_table + 1, im.to(REAL), mask=m_i)


@triton.jit
def ssm_kernel_forward(
    p_columns,  # [H, C, N, 2]
    p_rows,  # [H, J, N, 2]
    p_k,  # [H, L]
    N,
    J,
    L,
    C: tl.constexpr,
    R: tl.constexpr,
):
    i_h = tl.program_id(1).to(tl.int64)
    i_j = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    i_c = tl.arange(0, C)
    REAL: tl.constexpr = p_k.dtype.element_ty
    o_j = (i_h * J + i_j) * N * 2
    o_c = (i_h * C + i_c) * N * 2
    m_j = i_j < J
    b_k = tl.zeros([R, C], dtype=REAL)
    for n in range(N):
        a_re = tl.load(p_rows + o_j + 2 * n, mask=m_j, other=0.0).to(REAL)
        a_im = tl.load(p_rows + o_j + 2 * n + 1, mask=m_j, other=0.0).to(REAL)
        t_re = tl.load(p_columns + o_c + 2 * n).to(REAL)
        t_im = tl.load(p_columns + o_c + 2 * n + 1).to(REAL)
        b_k += a_re[:, None] * t_re[None, :] - a_im[:, None] * t_im[None, :]
    i_l = i_j[:, None] * C + i_c[None, :]
    tl.store(p_k + i_h * L + i_l, b_k, mask=i_l < L)


@triton.jit
def ssm_kernel_backward(
    p_columns,  # [H, C, N, 2]
    p_rows,  # [H, J, N, 2], of z alone
    p_dk,  # [H, L]
    p_sums,  # [H, tiles, N, 4] float64: the parts of sum_l dk_l e^{l z}, and of sum_l l dk_l e^{l z}
    N,
    J,
    L,
    tiles,
    C: tl.constexpr,
    R: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    i_j = i_tile * R + tl.arange(0, R)
    i_c = tl.arange(0, C)
    REAL: tl.constexpr = p_dk.dtype.element_ty
    o_j = (i_h * J + i_j) * N * 2
    o_c = (i_h * C + i_c) * N * 2
    m_j = i_j < J
    i_l = i_j[:, None] * C + i_c[None, :]
    b_dk = tl.load(p_dk + i_h * L + i_l, mask=i_l < L, other=0.0).to(REAL)
    b_c = i_c.to(REAL)[None, :]
    b_j = (i_j * C).to(tl.float64)
    o_sums = (i_h * tiles + i_tile) * N * 4
    for n in range(N):
        t_re = tl.load(p_columns + o_c + 2 * n).to(REAL)[None, :]
        t_im = tl.load(p_columns + o_c + 2 * n + 1).to(REAL)[None, :]
        g_re = tl.sum(b_dk * t_re, 1).to(tl.float64)
        g_im = tl.sum(b_dk * t_im, 1).to(tl.float64)
        u_re = b_j * g_re + tl.sum(b_dk * (b_c * t_re), 1).to(tl.float64)
        u_im = b_j * g_im + tl.sum(b_dk * (b_c * t_im), 1).to(tl.float64)
        a_re = tl.load(p_rows + o_j + 2 * n, mask=m_j, other=0.0).to(tl.float64)
        a_im = tl.load(p_rows + o_j + 2 * n + 1, mask=m_j, other=0.0).to(tl.float64)
        tl.store(p_sums + o_sums + 4 * n, tl.sum(a_re * g_re - a_im * g_im, 0))
        tl.store(p_sums + o_sums + 4 * n + 1, tl.sum(a_re * g_im + a_im * g_re, 0))
        tl.store(p_sums + o_sums + 4 * n + 2, tl.sum(a_re * u_re - a_im * u_im, 0))
        tl.store(p_sums + o_sums + 4 * n + 3, tl.sum(a_re * u_im + a_im * u_re, 0))


@triton.jit
def scale_of(x, q, r, REAL: tl.constexpr):
    """The power of two that brings the largest of three numbers to [1, 2)."""
    if REAL.primitive_bitwidth == 32:
        largest = tl.maximum(tl.abs(x), tl.maximum(tl.abs(q), tl.abs(r)))
        largest = tl.minimum(tl.maximum(largest, 1.1754943508222875e-38), 8.507059173023462e37)
        bits = largest.to(tl.int32, bitcast=True)
        return (0x7F000000 - ((bits >> 23) << 23)).to(tl.float32, bitcast=True)
    else:
        largest = tl.maximum(tl.abs(x), tl.maximum(tl.abs(q), tl.abs(r)))
        largest = tl.minimum(tl.maximum(largest, 2.2250738585072014e-308), 4.49423283715579e307)
        bits = largest.to(tl.int64, bitcast=True)
        return (0x7FE0000000000000 - ((bits >> 52) << 52)).to(tl.float64, bitcast=True)


@triton.jit
def load_nodes(p_nodes, i_l, L, REAL: tl.constexpr):
    """Parts, and where a node is infinite: it becomes 1e30, far from any pole. Past the end stands the last node."""
    o_l = tl.minimum(i_l, L - 1) * 2
    re = tl.load(p_nodes + o_l).to(REAL)
    im = tl.load(p_nodes + o_l + 1).to(REAL)
    infinite = (tl.abs(re) == float("inf")) | (tl.abs(im) == float("inf"))
    return tl.where(infinite, 1e30, re), tl.where(infinite, 0.0, im), infinite


@triton.jit
def cauchy_kernel_forward(
    p_v,  # [H, N, 2]
    p_nodes,  # [L, 2]
    p_w,  # [H, N, 2]
    p_y,  # [H, L, 2]
    N,
    L,
    BLOCK: tl.constexpr,
):
    i_h = tl.program_id(1).to(tl.int64)
    i_l = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    REAL: tl.constexpr = p_y.dtype.element_ty
    node_re, node_im, infinite = load_nodes(p_nodes, i_l, L, REAL)
    b_re = tl.zeros([BLOCK], dtype=REAL)
    b_im = tl.zeros([BLOCK], dtype=REAL)
    for n in range(N):
        o_n = (i_h * N + n) * 2
        v_re = 2 * tl.load(p_v + o_n).to(REAL)
        v_im = 2 * tl.load(p_v + o_n + 1).to(REAL)
        w_re = tl.load(p_w + o_n).to(REAL)
        w_im = tl.load(p_w + o_n + 1).to(REAL)
        x = node_re - w_re
        q = node_im - w_im
        r = node_im + w_im
        scale = scale_of(x, q, r, REAL)
        x1 = x * scale
        y1 = node_im * scale
        below_re = x1 * x1 - (q * scale) * (r * scale)
        below_im = 2 * x1 * y1
        size = below_re * below_re + below_im * below_im
        inverse = scale / size
        above_re = v_re * x1 - v_im * w_im * scale
        above_im = v_re * y1
        at_pole = size == 0
        b_re += tl.where(at_pole, above_re, above_re * below_re + above_im * below_im) * inverse
        b_im += tl.where(at_pole, above_im, above_im * below_re - above_re * below_im) * inverse
    o_y = (i_h * L + i_l) * 2
    tl.store(p_y + o_y, tl.where(infinite, 0.0, b_re), mask=i_l < L)
    tl.store(p_y + o_y + 1, tl.where(infinite, 0.0, b_im), mask=i_l < L)


@triton.jit
def cauchy_kernel_backward(
    p_dy,  # [H, L, 2]
    p_v,  # [H, N, 2]
    p_nodes,  # [L, 2]
    p_w,  # [H, N, 2]
    p_sums,  # [H, stretches, N, 4]: the parts of dv, and of dw / conj(v)
    p_dnodes,  # [groups, L, 2], where NODES
    H,
    N,
    L,
    stretches,
    group,
    NODES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of a dy + b conj(dy), and of a^2 dy + b^2 conj(dy); a = 1 / conj(node - w), b = 1 / (node - conj(w))."""
    i_stretch = tl.program_id(0).to(tl.int64)
    i_group = tl.program_id(1).to(tl.int64)
    i_l = i_stretch * BLOCK + tl.arange(0, BLOCK)
    REAL: tl.constexpr = p_dy.dtype.element_ty
    node_re, node_im, infinite = load_nodes(p_nodes, i_l, L, REAL)
    m_l = (i_l < L) & (infinite == 0)
    d_re = tl.zeros([BLOCK], dtype=REAL)
    d_im = tl.zeros([BLOCK], dtype=REAL)
    first = i_group * group
    for i_h in range(first, tl.minimum(first + group, H)):
        o_y = (i_h * L + i_l) * 2
        g_re = tl.load(p_dy + o_y, mask=m_l, other=0.0).to(REAL)
        g_im = tl.load(p_dy + o_y + 1, mask=m_l, other=0.0).to(REAL)
        o_sums = (i_h * stretches + i_stretch) * N * 4
        for n in range(N):
            o_n = (i_h * N + n) * 2
            w_im = tl.load(p_w + o_n + 1).to(REAL)
            x = node_re - tl.load(p_w + o_n).to(REAL)
            q = node_im - w_im
            r = node_im + w_im
            scale = scale_of(x, q, r, REAL)
            x = x * scale
            q = q * scale
            r = r * scale
            near = x * x + q * q
            far = x * x + r * r
            inverse = scale / (near * far)
            a_re = x * (far * inverse)
            a_im = q * (far * inverse)
            b_re = x * (near * inverse)
            b_im = -r * (near * inverse)
            ag_re = a_re * g_re - a_im * g_im
            ag_im = a_re * g_im + a_im * g_re
            bg_re = b_re * g_re + b_im * g_im
            bg_im = b_im * g_re - b_re * g_im
            aag_re = a_re * ag_re - a_im * ag_im
            aag_im = a_re * ag_im + a_im * ag_re
            bbg_re = b_re * bg_re - b_im * bg_im
            bbg_im = b_re * bg_im + b_im * bg_re
            tl.store(p_sums + o_sums + 4 * n, tl.sum(ag_re + bg_re, 0))
            tl.store(p_sums + o_sums + 4 * n + 1, tl.sum(ag_im + bg_im, 0))
            tl.store(p_sums + o_sums + 4 * n + 2, tl.sum(aag_re + bbg_re, 0))
            tl.store(p_sums + o_sums + 4 * n + 3, tl.sum(aag_im + bbg_im, 0))
            if NODES:
                v_re = tl.load(p_v + o_n).to(REAL)
                v_im = tl.load(p_v + o_n + 1).to(REAL)
                d_re -= v_re * (aag_re + bbg_re) + v_im * (aag_im + bbg_im)
                d_im -= v_re * (aag_im - bbg_im) - v_im * (aag_re - bbg_re)
    if NODES:
        o_d = (i_group * L + i_l) * 2
        tl.store(p_dnodes + o_d, d_re, mask=i_l < L)
        tl.store(p_dnodes + o_d + 1, d_im, mask=i_l < L)
