"""pLSTM: linear recurrences whose sources, transitions and marks are gates, over a sequence or a grid."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linear_attention import linear_attention
from ..scan import grid_scan
from .parts import check_multiple, check_positive, check_sequence, expect, rms_norm, split_heads, wide
from .streaming import Streaming

# Transitions nearer to 0 count as this much: the gradient of their logarithm would drown in rounding.
LEAST = 1e-6


class _Gates(torch.nn.Linear):
    """Gates of each head from x: weights that start at 0, and biases at `start`, one number for each gate."""

    def __init__(self, dim: int, num_heads: int, start: list[float], **options: Any) -> None:
        self.start, self.num_heads = start, num_heads
        super().__init__(dim, len(start) * num_heads, **options)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.zero_()
        self.bias.copy_(torch.tensor(self.start).repeat_interleave(self.num_heads))

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [..., D] -> of each gate [..., H], in float32 at least."""
        return [*wide(super().forward(x)).unflatten(-1, (-1, self.num_heads)).unbind(-2)]


def small_linear(inputs: int, outputs: int, bias: bool, **options: Any) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs, outputs, bias=bias, **options)
    torch.nn.init.normal_(linear.weight, std=(2 / (5 * inputs)) ** 0.5)
    if bias:
        torch.nn.init.zeros_(linear.bias)
    return linear


def read_heads(o: Tensor, weight: Tensor) -> Tensor:
    """Each head of o [..., H, V] divided by its root mean square, times weight [H V] -> [..., H V]."""
    return rms_norm(o, eps=1e-5).flatten(-2) * wide(weight)


class PLSTM1d(Streaming):
    """pLSTM over time with one number for the transition of each head, of either sign.

        S_t = τ_t S_{t-1} + s_t k_t v_tᵀ
        o_t = K^-½ (m_t S_{t-1}ᵀ q_t + d_t (q_t · k_t) v_t)        y_t = W_o norm(o_t)
        τ = tanh(5 (w_τ x + b_τ))        s, m, d = sigmoid(w x + b)

    Marks read the state that comes in, and the step's own value passes by it. Computed by `linear_attention` with
    decays `log abs(τ)`; signs are multiplied into keys and queries: `Π τ = Π abs(τ) Π sign τ`. A τ nearer to 0 than
    1e-6 counts as that, without a gradient.

    Args:
        dim: D, features of x and y.
        num_heads: H, divides dim; K = V = D / H.
        device, dtype: of the parameters.

    Shapes: x [B, T, D] -> y [B, T, D]; state (S [B, H, K, V],), float32 at least, zeros at the start.

    Initialisation: gates' weights 0, biases of τ 1, of the others -5; projections normal · sqrt(2 / (5 D)), biases 0;
    norm 1. The published default has transitions that are 4 × 4 matrices, and source, mark and direct gates that are
    biases alone.

    Memory: a gradient keeps about 10 D numbers for each step. Time: O(T D²) for the projections, O(T D K) for the
    recurrence.

    Raises:
        ValueError: a size is not positive, num_heads does not divide dim, or x has a wrong shape or dtype.

    Pöppel et al., "pLSTM: parallelizable linear source transition mark networks", 2025.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.num_heads = dim, num_heads
        options = {"device": device, "dtype": dtype}
        self.input = small_linear(dim, 3 * dim, bias=True, **options)
        self.gates = _Gates(dim, num_heads, [1.0, -5.0, -5.0, -5.0], **options)
        self.norm = torch.nn.Parameter(torch.ones(dim, **options))
        self.out = small_linear(dim, dim, bias=False, **options)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, T, D] and (S,) of the steps before -> y [B, T, D], (S [B, H, K, V],) after the last step."""
        check_sequence(self, x, self.dim)
        q, k, v = (split_heads(part, self.num_heads) for part in self.input(x).chunk(3, -1))
        transition, source, mark, direct = self.gates(x)  # [B, T, H]
        tau, (s, m, d) = torch.tanh(5 * transition), (torch.sigmoid(gate)[..., None] for gate in (source, mark, direct))
        scale = q.shape[-1] ** -0.5
        S = wide(q).new_zeros(*q.shape[::2], *[q.shape[-1]] * 2) if state is None else state[0]

        # The step t + 1 reads the state after t; the first step that which came in.
        marked = wide(q) * (m * scale)
        negatives = (tau < 0).cumsum(1)
        sign = (1 - 2 * (negatives % 2))[..., None].to(marked.dtype)
        reads = torch.cat([marked[:, 1:], torch.zeros_like(marked[:, :1])], 1) * sign
        decay = tau.abs().clamp(min=LEAST).log()
        ahead, last = linear_attention(reads.to(v.dtype), (wide(k) * s * sign).to(v.dtype), v, decay, S, scale=1.0)
        first = torch.einsum("bthk,bhkv->bthv", marked[:, :1], S).to(v.dtype)
        incoming = torch.cat([first, ahead[:, :-1]], 1)
        last = last * (1 - 2 * ((tau < 0).sum(1) % 2))[..., None, None]

        passing = (wide(q) * wide(k)).sum(-1, keepdim=True) * (d * scale) * wide(v)
        return self.out(read_heads(incoming + passing, self.norm).to(v.dtype)), (last,)


class PLSTM2d(torch.nn.Module):
    """pLSTM over a grid: every node hands one state on to the right and one down, and the grid is walked four ways.

        R(x, y) = t_rl R(x-1, y) + t_ru U(x, y-1) + s_r k vᵀ        U(x, y) = t_dl R(x-1, y) + t_du U(x, y-1) + s_d k vᵀ
        o(x, y) = K^-½ Σ_flips q · (m_l R(x-1, y) + m_u U(x, y-1)) + K^-½ d (q · k) v        y = W_o norm(o)

    Mode "P" (propagation) divides what arrives between the two directions, with `p = sigmoid(b + w · x / (2 D))` and τ:
    `t_rl = t_ru = p τ`, `t_dl = t_du = 1 - p τ`, `s_r = p s`, `s_d = 1 - s_r`, `m_l = m_u = m`: a state spreads, and
    its total stays. Mode "D" (direction) has a gate of its own for everything but `t_dl = 0`: a state goes straight,
    and turns once, from down to right. Published models alternate P and D. Each flip has its own gates.

    Args:
        dim: D, features of x and y.
        num_heads: H, divides dim; K = V = D / H.
        mode: "P" or "D".
        device, dtype: of the parameters.

    Shapes: x [B, X, Y, D] -> y [B, X, Y, D]; there is no state to carry.

    Initialisation: gates' weights 0; biases of transitions 1, read through tanh(5 ·), of s, m and d -5, through the
    sigmoid, of p from -2 to 2 over the heads; projections normal · sqrt(2 / (5 D)), biases 0; norm 1. Unlike the
    published code, mode P holds τ at 0 from below: negative ones would make states grow.

    Memory and time: the scan runs over the values k vᵀ, K V numbers for each node and head, or, where the grid has
    fewer nodes than that, over the nodes' influence on each other, as many numbers as nodes; the results are equal.

    Raises:
        ValueError: a size is not positive, num_heads does not divide dim, mode is neither, x has a wrong shape or
            dtype.

    Pöppel et al., "pLSTM: parallelizable linear source transition mark networks", 2025.
    """

    def __init__(
        self, dim: int, num_heads: int = 1, mode: str = "P", *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        expect(mode in ("P", "D"), self, "mode", "'P' or 'D'", repr(mode))
        self.dim, self.num_heads, self.mode = dim, num_heads, mode
        options = {"device": device, "dtype": dtype}
        self.input = small_linear(dim, 3 * dim, bias=True, **options)
        # Of each flip. P: τ, s, m. D: t_rl, t_du, t_ru, s_r, s_d, m_l, m_u.
        start = [1.0, -5.0, -5.0] if mode == "P" else [1.0] * 3 + [-5.0] * 4
        self.gates = _Gates(dim, num_heads, start * 4, **options)
        if mode == "P":
            self.orientation = _Gates(dim, num_heads, [0.0] * 4, **options)
            with torch.no_grad():
                self.orientation.bias.copy_(torch.linspace(-2, 2, num_heads).repeat(4))
        self.direct = _Gates(dim, num_heads, [-5.0], **options)
        self.norm = torch.nn.Parameter(torch.ones(dim, **options))
        self.out = small_linear(dim, dim, bias=False, **options)

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}, mode={self.mode!r}"

    def forward(self, x: Tensor) -> Tensor:
        """x [B, X, Y, D] -> y [B, X, Y, D]."""
        fits = x.ndim == 4 and x.shape[-1] == self.dim
        expect(fits, self, "x", f"[B, X, Y, D = {self.dim}]", f"shape {list(x.shape)}")
        expect(x.is_floating_point(), self, "x", "a floating dtype", x.dtype)
        q, k, v = (wide(part).unflatten(-1, (self.num_heads, -1)) for part in self.input(x).chunk(3, -1))
        q = q * q.shape[-1] ** -0.5
        nodes, K = x.shape[1] * x.shape[2], q.shape[-1]
        by_nodes = 0 < nodes < K * K
        if by_nodes:
            carried = torch.eye(nodes, dtype=q.dtype, device=q.device).view(1, *x.shape[1:3], 1, nodes)
        else:
            carried = (k[..., None] * v[..., None, :]).flatten(-2)  # [B, X, Y, H, K V]

        arrived = 0  # [B, X, Y, H, nodes or K V]
        for flip, gates in enumerate(self._gates_of_flips(x)):
            t_rl, t_ru, t_dl, t_du, s_r, s_d, m_l, m_u = gates
            flips = {"flip_x": flip & 1 == 1, "flip_y": flip & 2 == 2}
            right, down = grid_scan(s_r[..., None] * carried, s_d[..., None] * carried, t_rl, t_ru, t_dl, t_du, **flips)
            arrived = arrived + m_l[..., None] * before(right, 1, flips["flip_x"])
            arrived = arrived + m_u[..., None] * before(down, 2, flips["flip_y"])

        if by_nodes:
            scores = torch.einsum("bnhk,bmhk->bnhm", q.flatten(1, 2), k.flatten(1, 2))
            o = torch.einsum("bnhm,bmhv->bnhv", scores * arrived.flatten(1, 2), v.flatten(1, 2)).view_as(v)
        else:
            o = torch.einsum("bxyhk,bxyhkv->bxyhv", q, arrived.unflatten(-1, (K, K)))
        (direct,) = self.direct(x)
        o = wide(o) + (q * k).sum(-1, keepdim=True) * torch.sigmoid(direct)[..., None] * v
        return self.out(read_heads(o, self.norm).to(x.dtype))

    def _gates_of_flips(self, x: Tensor) -> Iterator[tuple[Tensor | None, ...]]:
        """Of each flip t_rl, t_ru, t_dl, t_du, s_r, s_d, m_l, m_u, [B, X, Y, H] each."""
        gates = self.gates(x)
        count = len(gates) // 4
        orientation = self.orientation(x / (2 * self.dim)) if self.mode == "P" else [None] * 4
        for flip in range(4):
            own = gates[flip * count : (flip + 1) * count]
            if self.mode == "P":
                p, (transition, source, mark) = torch.sigmoid(orientation[flip]), own
                on, s, m = p * torch.tanh(5 * transition).clamp(min=0), p * torch.sigmoid(source), torch.sigmoid(mark)
                yield on, on, 1 - on, 1 - on, s, 1 - s, m, m
            else:
                t_rl, t_du, t_ru = (torch.tanh(5 * gate) for gate in own[:3])
                yield t_rl, t_ru, None, t_du, *(torch.sigmoid(gate) for gate in own[3:])


def before(x: Tensor, dim: int, flip: bool) -> Tensor:
    """What leaves the node before along `dim` of x [B, X, Y, H, C]: 0 at the first, with flip at the last."""
    size = x.shape[dim]
    edge = torch.zeros_like(x.narrow(dim, 0, min(size, 1)))
    kept = x.narrow(dim, 1 if flip and size > 0 else 0, max(size - 1, 0))
    return torch.cat([kept, edge] if flip else [edge, kept], dim)
