"""The specification of the scans: one loop over time steps or over the nodes of a grid, in plain torch.

Letters: B batch, T time, C channels (any number of dimensions), H heads, D channels of a head, N packed sequences, X
and Y sides of a grid.

Float64 and complex128 stay; every other dtype is computed in float32 or complex64, and only the outputs are rounded to
the storage dtype. All derivatives come from autograd, of any order. Arguments are not validated here.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

DOUBLE = (torch.float64, torch.complex128)


def times(a: Tensor, h: Tensor) -> Tensor:
    """a h; a real factor scales both parts of a complex one, so that an infinite part does not make the other NaN."""
    if h.is_complex() and not a.is_complex():
        return torch.complex(a * h.real, a * h.imag)
    return a * h


def plus(x: Tensor, y: Tensor) -> Tensor:
    """x + y; of complex numbers part by part: torch's own sum makes both parts NaN where one is."""
    if x.is_complex() and y.is_complex():
        return torch.complex(x.real + y.real, x.imag + y.imag)
    return x + y


def forgotten(a: Tensor, h: Tensor) -> Tensor:
    """Where h is infinite or NaN and a = 0 lets nothing of it pass."""
    return (a == 0) & ~h.isfinite()


class Carry(torch.autograd.Function):
    """a h, where a = 0 lets nothing pass, neither a value that is infinite or NaN nor such a gradient on its way back.

    a [.., 1 or C], h [.., C]. Masks alone do that for the value; for the gradient the derivative is written out, as a
    product of the same kind, so that it has every further derivative too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, h: Tensor) -> Tensor:
        return times(a, h.masked_fill(forgotten(a, h), 0.0))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, g: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        nothing = forgotten(a, h)
        h = h.masked_fill(nothing, 0.0)
        real_factor = g.is_complex() and not a.is_complex()
        da = g.real * h.real + g.imag * h.imag if real_factor else g * h.conj()
        return da.masked_fill(nothing, 0.0).sum_to_size(a.shape), Carry.apply(a.conj(), g)


def linear_scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`h_t = a_t h_{t-1} + x_t`, where `a_t = 0` resets: then `h_t = x_t`, whatever came before.

    Args:
        x: [B, T, *C], real or complex.
        a: x's rank, every dimension 1 or x's; no more precise than the state.
        initial_state: [B, *C], or [N, *C] with cu_seqlens; None: zeros.
        reverse: from the last step to the first.
        cu_seqlens: [N + 1] integers from 0 to T; B = 1. Sequence n is the steps `cu_seqlens[n]:cu_seqlens[n + 1]`.

    Returns:
        `h` [B, T, *C] in the dtype of x, complex if a is, and the state after the last step [B or N, *C] in the dtype
        of the arithmetic.

    Blelloch, "Prefix sums and their applications", 1990; Martin and Cundy, "Parallelizing linear recurrent neural nets
    over sequence length", 2018.
    """
    real = torch.float64 if x.dtype in DOUBLE else torch.float32
    complex_ = torch.complex128 if real == torch.float64 else torch.complex64
    precision = complex_ if x.is_complex() or a.is_complex() else real
    storage = precision if precision.is_complex else x.dtype
    x, a = x.to(precision), a.to(complex_ if a.is_complex() else real)
    batch, _, *channels = x.shape

    def run(x: Tensor, a: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        # One gate for all steps is one tensor for all steps: its gradients are summed in the dtype of the arithmetic.
        gates = a.unbind(1) if a.shape[1] == x.shape[1] else a.unbind(1) * x.shape[1]
        steps = [*zip(x.unbind(1), gates, strict=True)]
        for x_t, a_t in reversed(steps) if reverse else steps:
            h = plus(Carry.apply(a_t, h), x_t)
            outputs.append(h)
        return joined(outputs, x[:, :0], reverse).to(storage), h

    # Copies, because what is returned for T = 0 must not be the caller's own tensor.
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state = x.new_zeros(rows, *channels) if initial_state is None else initial_state.to(precision, copy=True)
    if cu_seqlens is None:
        return run(x, a, state)

    def sequence(n: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return run(x[:, start:stop], a if a.shape[1] == 1 else a[:, start:stop], state[n : n + 1])

    return packed(sequence, cu_seqlens, (x[:, :0].to(storage), state[:0]))


def softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`o_t = sum_{i<=t} e^{s_i} v_i / sum_{i<=t} e^{s_i}` and `lse_t = log sum_{i<=t} e^{s_i}`.

    A score of -inf stands for a step that is absent: its value counts for nothing even if it is NaN. Where all steps so
    far are absent, `o = 0` and `lse = -inf`, without gradients.

    Args:
        s: [B, T, H] scores, no more precise than the state.
        v: [B, T, H, D] values, real.
        initial_lse, initial_out: [B, H] and [B, H, D], with cu_seqlens [N, H] and [N, H, D]: the `lse` and `o` of the
            steps before, both or neither.
        reverse: from the last step to the first.
        cu_seqlens: [N + 1] integers from 0 to T; B = 1. Sequence n is the steps `cu_seqlens[n]:cu_seqlens[n + 1]`.

    Returns:
        `o` [B, T, H, D] in the dtype of v and `lse` [B, T, H] in the dtype of the arithmetic.

    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Feng et al., "Attention as an RNN", 2024.
    """
    precision = torch.float64 if v.dtype == torch.float64 else torch.float32
    storage, absent = v.dtype, s == -math.inf
    v = v.to(precision).masked_fill(absent[..., None], 0.0)
    s = s.to(precision)
    batch, _, heads, width = v.shape

    def run(s: Tensor, v: Tensor, m: Tensor, u: Tensor, o: Tensor) -> tuple[Tensor, Tensor]:
        maxima, sums, outputs = [], [], []
        steps = [*zip(s.unbind(1), v.unbind(1), strict=True)]
        for s_t, v_t in reversed(steps) if reverse else steps:
            m, u, o = softmax_step(s_t, v_t, m, u, o)
            for values, value in ((maxima, m), (sums, u), (outputs, o)):
                values.append(value)
        m, u, o = joined(maxima, s[:, :0], reverse), joined(sums, s[:, :0], reverse), joined(outputs, v[:, :0], reverse)
        empty = u == 0
        return o.to(storage), (m + u.masked_fill(empty, 1.0).log()).masked_fill(empty, -math.inf)

    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_lse is None or initial_out is None:
        m, u, o = s.new_full((rows, heads), -math.inf), s.new_zeros(rows, heads), v.new_zeros(rows, heads, width)
    else:
        m = initial_lse.to(precision)
        nothing = m == -math.inf
        u = torch.ones_like(m).masked_fill(nothing, 0.0)
        o = initial_out.to(precision).masked_fill(nothing[..., None], 0.0)
    if cu_seqlens is None:
        return run(s, v, m, u, o)

    def sequence(n: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        row = slice(n, n + 1)
        return run(s[:, start:stop], v[:, start:stop], m[row], u[row], o[row])

    return packed(sequence, cu_seqlens, (v[:, :0].to(storage), s[:, :0]), dims=(1, 1))


def softmax_step(s: Tensor, v: Tensor, m: Tensor, u: Tensor, o: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One more score [B, H] and value [B, H, D]: the new maximum m, sum u of e^{s - m} [B, H] and mean o [B, H, D].

    Of the old maximum and the score, the larger is weighted by exactly 1: +inf once is the limit of large scores, and
    twice is NaN.
    """
    above = s > m
    high, low = torch.where(above, s, m), torch.where(above, m, s)
    # -inf - -inf would be NaN where nothing has been added yet; any finite base gives the 0 that is meant.
    weight = (low - high.masked_fill(high == -math.inf, 0.0)).exp()
    past, new = torch.where(above, weight, 1.0) * u, torch.where(above, 1.0, weight)
    u = past + new
    safe = u.masked_fill(u == 0, 1.0)
    return high, u, (past / safe)[..., None] * o + (new / safe)[..., None] * v


def joined(outputs: list[Tensor], none: Tensor, reverse: bool) -> Tensor:
    """The steps [B, ...] in the order of time, [B, T, ...] in new memory; `none` [B, 0, ...] is the output of T = 0."""
    steps = outputs[::-1] if reverse else outputs
    return torch.stack(steps, 1) if steps else none.clone()


def packed(
    sequence: Callable[[int, int, int], tuple[Tensor, Tensor]],
    cu_seqlens: Tensor,
    none: tuple[Tensor, Tensor],
    dims: tuple[int, int] = (1, 0),
) -> tuple[Tensor, Tensor]:
    """Both results of `sequence(n, start, stop)` for every n, concatenated along `dims`; `none` stands for no sequence.

    `none` also ties the results to the graph of the arguments where all sequences are empty.
    """
    edges = cu_seqlens.tolist()
    results = [sequence(n, *edges[n : n + 2]) for n in range(len(edges) - 1)]
    return tuple(torch.cat([none[i], *(result[i] for result in results)], dims[i]) for i in (0, 1))


def grid_scan(
    x_r: Tensor,
    x_d: Tensor,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    *,
    initial_left: Tensor | None = None,
    initial_top: Tensor | None = None,
    flip_x: bool = False,
    flip_y: bool = False,
) -> tuple[Tensor, Tensor]:
    """`r = t_rl l + t_ru u + x_r` and `d = t_dl l + t_du u + x_d`, where `l = r(x-1, y)` and `u = d(x, y-1)`.

    A gate of exactly 0 lets nothing pass, neither NaN nor infinity.

    Args:
        x_r, x_d: [B, X, Y, H, D], real.
        t_rl, t_ru, t_dl, t_du: [B, X, Y, H], no more precise than the arithmetic; t_ru, t_dl may be None.
        initial_left: [B, Y, H, D]: l at the first x, zeros if None.
        initial_top: [B, X, H, D]: u at the first y, zeros if None.
        flip_x, flip_y: from the last index to the first.

    Returns:
        `r` and `d` [B, X, Y, H, D] in the dtype of x_r.

    Poeppel et al., "pLSTM: parallelizable linear source transition mark networks", 2025.
    """
    precision = torch.float64 if x_r.dtype == torch.float64 else torch.float32
    storage, (B, X, Y, H, D) = x_r.dtype, x_r.shape
    x_r, x_d = x_r.to(precision), x_d.to(precision)
    rl, ru, dl, du = (None if t is None else t.to(precision)[..., None] for t in (t_rl, t_ru, t_dl, t_du))
    left = x_r.new_zeros(B, Y, H, D) if initial_left is None else initial_left.to(precision)
    top = x_r.new_zeros(B, X, H, D) if initial_top is None else initial_top.to(precision)

    def term(gate: Tensor | None, at: tuple[slice, int, int], value: Tensor) -> Tensor | float:
        return 0.0 if gate is None else Carry.apply(gate[at], value)

    r, d = {}, {}  # node -> [B, H, D]
    for x in reversed(range(X)) if flip_x else range(X):
        for y in reversed(range(Y)) if flip_y else range(Y):
            l = r.get((x + 1 if flip_x else x - 1, y), left[:, y])  # noqa: E741  the formula's letter
            u = d.get((x, y + 1 if flip_y else y - 1), top[:, x])
            at = slice(None), x, y
            r[x, y] = term(rl, at, l) + term(ru, at, u) + x_r[at]
            d[x, y] = term(dl, at, l) + term(du, at, u) + x_d[at]

    def joined_nodes(nodes: dict[tuple[int, int], Tensor], like: Tensor) -> Tensor:
        rows = [torch.stack([nodes[x, y] for y in range(Y)], 1) for x in range(X)] if Y else []
        return (torch.stack(rows, 1) if rows else like.clone()).to(storage)

    return joined_nodes(r, x_r), joined_nodes(d, x_d)
