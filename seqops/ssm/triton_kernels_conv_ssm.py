"""The Triton kernel of conv_ssm where the output kernels c and d are of one pixel: scan and products in one.

    x_t = a x_{t-1} + in_t        out_t = W_out x_t + W_skip u_t        in_t = W_in u_t, or given

A pixel is then a sequence by itself. A program has BM pixels of the batch; their states, all P complex channels of
them, stay in its registers while it walks along time, as NP blocks of BP channels. Products take BK inputs and give BN
outputs at a time; the weights come from the L2 cache at every step.

    FORWARD   u to y
    RECALL    u to the states x of a block, which the gradients of the parameters read
    BACKWARD  the same walk against time: dy to du, with the transposed weights. The state is that of the gradient,
              g_t = W_in dy_t + conj(a) g_{t+1}; it is stored, and da = sum of g_t conj(x_{t-1}) is summed a pixel

Letters: B batch, T time, M = B Y X pixels, I and O inputs and outputs of a frame, P complex channels of the state. S is
the storage dtype; complex numbers are two neighbours.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

FORWARD, RECALL, BACKWARD = (tl.constexpr(i) for i in range(3))  # PASS
INF = tl.constexpr(math.inf)


@triton.jit
def load_pairs(pointer, o_block, m_block):
    """Two blocks, real and imaginary parts, float32; 0 where masked."""
    o_pair = tl.expand_dims(o_block * 2, 2) + tl.arange(0, 2)[None, None, :]
    return tl.split(tl.load(pointer + o_pair, mask=tl.expand_dims(m_block, 2), other=0.0).to(tl.float32))


@triton.jit
def store_pairs(pointer, o_block, m_block, re, im):
    o_pair = tl.expand_dims(o_block * 2, 2) + tl.arange(0, 2)[None, None, :]
    tl.store(pointer + o_pair, tl.join(re, im), mask=tl.expand_dims(m_block, 2))


@triton.jit
def push(queue, item):
    return queue + (item,)  # noqa: RUF005  Triton knows no starred items


@triton.jit
def pick(re, im, part, NP: tl.constexpr):
    """Block `part` of the real and then the imaginary ones."""
    b_x = re[0]
    for i in tl.static_range(1, NP):
        b_x = tl.where(part == i, re[i], b_x)
    for i in tl.static_range(NP):
        b_x = tl.where(part == NP + i, im[i], b_x)
    return b_x


@triton.jit(do_not_specialize=["M", "T", "initial_rows", "carry_rows", "pixels", "parts"])
def conv_ssm_march(
    p_in,  # [B, T, Y, X, I] S, frames dense; without IN [B, T, Y, X, P] complex
    p_w_in,  # [2, I, P]: for the real and for the imaginary part
    p_a,  # [P] complex
    p_initial,  # [initial_rows, P] complex: x before the first step
    p_states,  # [B, T, Y, X, P] complex: x, RECALL writes and BACKWARD reads it
    p_out,  # [B, T, Y, X, O] S, frames dense
    p_w_out,  # [2, P, O]
    p_skip,  # [I, O]
    p_last,  # [M, P] complex: x after the last step, BACKWARD: gradient of x before the first
    p_carry,  # BACKWARD: [carry_rows, P] complex: gradient of x after the last step
    p_g,  # BACKWARD: [B, T, Y, X, P] complex
    p_da,  # BACKWARD: [programs, P] complex
    M,
    pixels,  # Y X
    T,
    I,  # channels in  # noqa: E741
    O,  # channels out  # noqa: E741
    P,
    parts,  # 2 NP, which the compiler must not know: it would load the weights of all parts of a state at once
    initial_rows,
    carry_rows,
    stride_in_b,
    stride_in_t,
    stride_out_b,
    stride_out_t,
    PASS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SKIP: tl.constexpr,
    PRECISION: tl.constexpr,
    NP: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BK: tl.constexpr,
    BN: tl.constexpr,
):
    b_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)[:, None]
    m_m = b_m < M
    b_b = b_m // pixels
    b_pixel = b_m % pixels
    b_p = tl.arange(0, BP)[None, :]
    b_k = tl.arange(0, BK)
    b_n = tl.arange(0, BN)
    o_in = b_b * stride_in_b + b_pixel * I
    o_out = b_b * stride_out_b + b_pixel * O
    o_sequence = (b_b * T * pixels + b_pixel) * P
    stride_sequence = pixels.to(tl.int64) * P

    re, im, a_re, a_im, da_re, da_im = (), (), (), (), (), ()
    for i in tl.static_range(NP):
        m_c = i * BP + b_p < P
        one_re, one_im = load_pairs(p_a, i * BP + b_p, m_c)
        a_re = push(a_re, one_re)
        a_im = push(a_im, one_im)
        if PASS == BACKWARD:
            x_re, x_im = load_pairs(p_carry, b_m * P + i * BP + b_p, m_c & (b_m < carry_rows))
        else:
            x_re, x_im = load_pairs(p_initial, b_m * P + i * BP + b_p, m_c & (b_m < initial_rows))
        re = push(re, x_re)
        im = push(im, x_im)
        da_re = push(da_re, tl.zeros((BM, BP), tl.float32))
        da_im = push(da_im, tl.zeros((BM, BP), tl.float32))

    for step in range(0, T):
        t = tl.cast(T - 1 - step if PASS == BACKWARD else step, tl.int64)
        m_past = tl.zeros((BM, 1), tl.int64) + t > 0  # a block: the interpreter combines no other mask with one
        # what comes in
        in_re, in_im = (), ()
        if IN:
            for _ in tl.static_range(NP):
                in_re = push(in_re, tl.zeros((BM, BP), tl.float32))
                in_im = push(in_im, tl.zeros((BM, BP), tl.float32))
            for k in range(0, I, BK):
                m_k = k + b_k < I
                b_in = tl.load(p_in + o_in + t * stride_in_t + (k + b_k)[None, :], mask=m_m & m_k[None, :], other=0.0)
                b_in = b_in.to(tl.float32)
                for part in range(0, parts):
                    b_i = part % NP * BP + b_p
                    o_w = part // NP * (I * P) + (k + b_k)[:, None] * P + b_i
                    b_w = tl.load(p_w_in + o_w, mask=m_k[:, None] & (b_i < P), other=0.0)
                    b_sum = tl.dot(b_in, b_w, pick(in_re, in_im, part, NP), input_precision=PRECISION)
                    sum_re, sum_im = (), ()
                    for i in tl.static_range(NP):
                        sum_re = push(sum_re, tl.where(part == i, b_sum, in_re[i]))
                        sum_im = push(sum_im, tl.where(part == NP + i, b_sum, in_im[i]))
                    in_re, in_im = sum_re, sum_im
        else:
            for i in tl.static_range(NP):
                o_p = o_sequence + t * stride_sequence + i * BP + b_p
                x_re, x_im = load_pairs(p_in, o_p, m_m & (i * BP + b_p < P))
                in_re = push(in_re, x_re)
                in_im = push(in_im, x_im)
        # the recurrence; `here` is what the products take
        new_re, new_im, here_re, here_im, sum_re, sum_im = (), (), (), (), (), ()
        for i in tl.static_range(NP):
            m_p = m_m & (i * BP + b_p < P)
            o_p = o_sequence + t * stride_sequence + i * BP + b_p
            m_reset = (a_re[i] == 0) & (a_im[i] == 0)
            if PASS == BACKWARD:
                g_re, g_im = re[i] + in_re[i], im[i] + in_im[i]
                here_re = push(here_re, g_re)
                here_im = push(here_im, g_im)
                store_pairs(p_g, o_p, m_p, g_re, g_im)
                # conj(a) g
                new_re = push(new_re, tl.where(m_reset, 0.0, a_re[i] * g_re + a_im[i] * g_im))
                new_im = push(new_im, tl.where(m_reset, 0.0, a_re[i] * g_im - a_im[i] * g_re))
                m_first = m_p & (m_past == 0) & (b_m < initial_rows)
                x_re, x_im = load_pairs(p_states, o_p - stride_sequence, m_p & m_past)
                y_re, y_im = load_pairs(p_initial, b_m * P + i * BP + b_p, m_first)
                # What a gate of 0 forgets has no part in its gradient where it is not finite.
                m_lost = m_reset & ((tl.abs(x_re + y_re) < INF) & (tl.abs(x_im + y_im) < INF) == 0)
                x_re = tl.where(m_lost, 0.0, x_re + y_re)
                x_im = tl.where(m_lost, 0.0, x_im + y_im)
                sum_re = push(sum_re, da_re[i] + g_re * x_re + g_im * x_im)
                sum_im = push(sum_im, da_im[i] + g_im * x_re - g_re * x_im)
            else:
                x_re = tl.where(m_reset, 0.0, a_re[i] * re[i] - a_im[i] * im[i]) + in_re[i]
                x_im = tl.where(m_reset, 0.0, a_re[i] * im[i] + a_im[i] * re[i]) + in_im[i]
                if PASS == RECALL:
                    store_pairs(p_states, o_p, m_p, x_re, x_im)
                new_re = push(new_re, x_re)
                new_im = push(new_im, x_im)
        re, im = new_re, new_im
        if PASS == BACKWARD:
            da_re, da_im = sum_re, sum_im
        else:
            here_re, here_im = new_re, new_im
        # what goes out
        if OUT:
            for n in range(0, O, BN):
                m_n = (n + b_n < O)[None, :]
                b_out = tl.zeros((BM, BN), tl.float32)
                for part in range(0, parts):
                    b_i = part % NP * BP + tl.arange(0, BP)[:, None]
                    o_r = (part // NP * P + b_i) * O + (n + b_n)[None, :]
                    b_r = tl.load(p_w_out + o_r, mask=(b_i < P) & m_n, other=0.0)
                    b_out = tl.dot(pick(here_re, here_im, part, NP), b_r, b_out, input_precision=PRECISION)
                if SKIP:
                    for k in range(0, I, BK):
                        m_k = k + b_k < I
                        o_k = o_in + t * stride_in_t + (k + b_k)[None, :]
                        b_u = tl.load(p_in + o_k, mask=m_m & m_k[None, :], other=0.0).to(tl.float32)
                        o_s = (k + b_k)[:, None] * O + (n + b_n)[None, :]
                        b_s = tl.load(p_skip + o_s, mask=m_k[:, None] & m_n, other=0.0)
                        b_out = tl.dot(b_u, b_s, b_out, input_precision=PRECISION)
                o_n = o_out + t * stride_out_t + (n + b_n)[None, :]
                tl.store(p_out + o_n, b_out.to(p_out.dtype.element_ty), mask=m_m & m_n)

    for i in tl.static_range(NP):
        m_p = i * BP + b_p < P
        store_pairs(p_last, b_m * P + i * BP + b_p, m_m & m_p, re[i], im[i])
        if PASS == BACKWARD:
            total_re = tl.sum(da_re[i], axis=0, keep_dims=True)
            total_im = tl.sum(da_im[i], axis=0, keep_dims=True)
            o_p = tl.program_id(0).to(tl.int64) * P + i * BP + b_p
            store_pairs(p_da, o_p, m_p, total_re, total_im)
