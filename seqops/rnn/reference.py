"""The specification of the recurrent operators: one loop over time steps, in plain torch.

Letters: B batch, T time, H heads, D units of a head, G gates. Per head `y_g = R_g h_{t-1} + b_g`, `p_g = wx_g + y_g`.
A cell turns `wx`, `y` [B, G, H, D] and the states [B, H, D] of the step before into the new states, `h` first.

Float64 stays float64; every other dtype is computed in float32, with `h` rounded to the storage dtype where it enters
the recurrent product. All derivatives come from autograd, of any order, `grad_clip` included. Arguments are not
validated here.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped to `[-limit, limit]`; NaN passes the clamp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.limit = inputs[1]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.limit, ctx.limit), None


def lstm_cell(wx: Tensor, y: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    p_i, p_f, p_g, p_o = (wx + y).unbind(1)
    c = p_f.sigmoid() * c + p_i.sigmoid() * p_g.tanh()
    return p_o.sigmoid() * c.tanh(), c


def gru_cell(wx: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
    wx_r, wx_z, wx_n = wx.unbind(1)
    y_r, y_z, y_n = y.unbind(1)
    r = (wx_r + y_r).sigmoid()
    z = (wx_z + y_z).sigmoid()
    n = (wx_n + r * y_n).tanh()
    return ((1 - z) * n + z * h,)


def slstm_cell(wx: Tensor, y: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    p_i, p_f, p_z, p_o = (wx + y).unbind(1)
    decayed = logsigmoid(p_f) + m
    # The input gate wins ties (torch.maximum would split their gradient), and NaN in either operand wins over numbers.
    m = torch.where((p_i >= decayed) | p_i.isnan(), p_i, decayed)
    # -inf - -inf would be NaN where nothing has been added yet; any finite base gives the i = f = 0 that is meant.
    base = torch.where(m == -math.inf, 0.0, m)
    i = (p_i - base).exp()
    f = (decayed - base).exp()
    c = f * c + i * p_z.tanh()
    n = f * n + i
    empty = n == 0
    ratio = torch.where(empty, 0.0, c / torch.where(empty, 1.0, n))
    return p_o.sigmoid() * ratio, c, n, m


def elman_cell(wx: Tensor, y: Tensor, h: Tensor, nonlinearity: str) -> tuple[Tensor]:
    p = (wx + y).squeeze(1)
    return (p.tanh() if nonlinearity == "tanh" else p.relu(),)


def run(
    cell: Callable[..., tuple[Tensor, ...]],
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    states: Sequence[tuple[Tensor | None, float]],
    lengths: Tensor | None,
    reverse: bool,
    grad_clip: float | None,
) -> tuple[Tensor, ...]:
    """Runs `cell` over time.

    Args:
        wx: [B, T, G, H, D].
        r: [G, H, D, D].
        b: [G, H, D] or None.
        states: for each state of the cell its initial value [B, H, D] or None, and the number that stands for None.
        lengths: [B] integers or None.

    Returns:
        `h` [B, T, H, D] in the dtype of `wx`, then the final states [B, H, D] in the dtype of the arithmetic.
    """
    storage, precision = wx.dtype, torch.float64 if wx.dtype == torch.float64 else torch.float32
    batch, time, _, heads, units = wx.shape
    valid = None
    if lengths is not None:
        valid = torch.arange(time, device=wx.device) < lengths[:, None]  # [B, T]
        wx = wx.where(valid[:, :, None, None, None], 0)
    # Widened once, so that their gradients are summed over time in the dtype of the arithmetic.
    r, b = r.to(precision), None if b is None else b.to(precision)
    # Copies, because what is returned for T = 0 must not be the caller's own tensor.
    state = tuple(
        torch.full((batch, heads, units), absent, dtype=precision, device=wx.device)
        if given is None
        else given.to(precision, copy=True)
        for given, absent in states
    )
    outputs = []
    steps = list(enumerate(wx.to(precision).unbind(1)))
    for t, wx_t in reversed(steps) if reverse else steps:
        # Rows past their end step from zeros, so that nothing in them can reach a gradient, and keep their state.
        before = state if valid is None else tuple(s.where(valid[:, t, None, None], 0) for s in state)
        h = before[0] if grad_clip is None else ClipGradient.apply(before[0], grad_clip)
        y = torch.einsum("ghoi,bhi->bgho", r, h.to(storage).to(precision))
        after = cell(wx_t, y if b is None else y + b, h, *before[1:])
        if valid is not None:
            after = tuple(new.where(valid[:, t, None, None], old) for new, old in zip(after, state, strict=True))
        state = after
        outputs.append(state[0][:, None].to(storage))
    if reverse:
        outputs.reverse()
    # The empty slice is the output of T = 0, tied to the graph as any other.
    h = torch.cat([wx[:, :0, 0], *outputs], 1)
    if valid is not None:
        h = h.where(valid[:, :, None, None], 0)
    return (h, *state)


def lstm(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`c = sigmoid(p_f) c + sigmoid(p_i) tanh(p_g)`, `h = sigmoid(p_o) tanh(c)`; gates i, f, g, o.

    Returns h [B, T, H, D], h_n and c_n [B, H, D].

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; forget gate: Gers et al., "Learning to forget", 2000.
    """
    return run(lstm_cell, wx, r, b, ((h0, 0.0), (c0, 0.0)), lengths, reverse, grad_clip)


def gru(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`n = tanh(wx_n + sigmoid(p_r) y_n)`, `h = (1 - z) n + z h` with `z = sigmoid(p_z)`; gates r, z, n.

    The reset gate multiplies the product, bias included, as in torch.nn.GRU. Returns h [B, T, H, D] and h_n [B, H, D].

    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", 2014.
    """
    return run(gru_cell, wx, r, b, ((h0, 0.0),), lengths, reverse, grad_clip)


def slstm(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`h = sigmoid(p_o) c / n` with an exponential input gate and the stabiliser `m`; gates i, f, z, o.

    `l = logsigmoid(p_f) + m`; then `m = max(l, p_i)`, `i = exp(p_i - m)`, `f = exp(l - m)`, `c = f c + i tanh(p_z)` and
    `n = f n + i`. Where `l` and `p_i` are both -inf, `i = f = 0`; where `n = 0`, `c / n` is 0 with zero gradient.
    Returns h [B, T, H, D], h_n, c_n, n_n and m_n [B, H, D]; without m0, m starts at -inf.

    Beck et al., "xLSTM: Extended long short-term memory", 2024.
    """
    states = ((h0, 0.0), (c0, 0.0), (n0, 0.0), (m0, -math.inf))
    return run(slstm_cell, wx, r, b, states, lengths, reverse, grad_clip)


def elman(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`h = tanh(p)`, or `max(p, 0)` with nonlinearity "relu".

    Returns h [B, T, H, D] and h_n [B, H, D].

    Elman, "Finding structure in time", 1990.
    """

    def cell(wx_t: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor]:
        return elman_cell(wx_t, y, h, nonlinearity)

    return run(cell, wx, r, b, ((h0, 0.0),), lengths, reverse, grad_clip)
