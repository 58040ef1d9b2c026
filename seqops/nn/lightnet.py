"""LightNet: linear attention whose keys are a softmax over time, running or, on a grid, over all positions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..linear_attention import linear_attention
from ..scan import softmax_scan
from .parts import check_multiple, check_positive, check_sequence, expect, rms_norm, split_heads, wide
from .streaming import State, Streaming


class Gated(nn.Module):
    """Projections that both kinds share; y = W_o (RMSNorm(o) silu(W_2 W_1 x)), the norm over all D channels."""

    def __init__(self, dim: int, num_heads: int | None, key_size: int, rank: int, options: dict[str, Any]) -> None:
        super().__init__()
        check_positive(self, dim=dim, key_size=key_size, rank=rank)
        num_heads = max(dim // key_size, 1) if num_heads is None else num_heads
        check_positive(self, num_heads=num_heads)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.num_heads, self.key_size = dim, num_heads, key_size
        self.query = nn.Linear(dim, num_heads * key_size, bias=False, **options)
        self.key = nn.Linear(dim, num_heads * key_size, bias=False, **options)
        self.value = nn.Linear(dim, dim, bias=False, **options)
        narrow, wider = nn.Linear(dim, rank, bias=False, **options), nn.Linear(rank, dim, bias=False, **options)
        self.gate = nn.Sequential(narrow, wider)
        self.norm = nn.Parameter(torch.ones(dim, **options))
        self.out = nn.Linear(dim, dim, bias=False, **options)

    def read_out(self, x: Tensor, o: Tensor) -> Tensor:
        """x, o [B, T, D] -> y [B, T, D]."""
        return self.out(rms_norm(o, self.norm) * F.silu(self.gate(x)))


class LightNet(Gated, Streaming):
    """Causal LightNet: in every key channel, attention to the past by a softmax over time, kept up to date by a decay.

        κ, q, v = W_k x, silu(W_q x), W_v x        z_t = log sum_{i<=t} e^{κ_i}, each channel by itself
        S_t = e^{z_{t-1} - z_t} S_{t-1} + e^{κ_t - z_t} v_tᵀ        o_t = S_tᵀ q_t / √K
        y_t = W_o (RMSNorm(o_t) silu(W_2 W_1 x_t))

    so that row c of S_t is the average of v_1 ... v_t with weights e^{κ_c}. The decay z_{t-1} - z_t is computed as
    logsigmoid(z_{t-1} - κ_t): the difference itself would lose its digits as z grows.

    Args:
        dim: D, channels of x and y.
        num_heads: H; None: dim / key_size, at least 1.
        key_size: K, keys' channels in a head.
        rank: between W_1 and W_2.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. State: S [B, H, K, D / H] and z [B, H K], float32 at least; z = -inf before the first step.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Initialisation: torch.nn.Linear's; the norm 1. The authors' own is not confirmed here.

    Time O(T K D), a step O(K D). A gradient keeps q, κ, z, v and the gate.

    Qin et al., "You only scan once: efficient multi-dimension sequential modeling with LightNet", 2024.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        key_size: int = 128,
        rank: int = 128,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, key_size, rank, {"device": device, "dtype": dtype})

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x [B, T, D], state or None -> y [B, T, D], state."""
        check_sequence(self, x, self.dim)
        q, score, v = F.silu(self.query(x)), wide(self.key(x)), self.value(x)
        past, first = (None, score.new_full((len(x), score.shape[-1]), -math.inf)) if state is None else state
        nothing = score.new_zeros(1, 1, 1, 1).expand(*score.shape, 1)
        _, lse = softmax_scan(score, nothing, first, torch.zeros_like(first)[..., None])
        lse = torch.cat([first[:, None], lse], 1)
        # Before the first step lse is -inf: the decay is 0 and the key 1.
        behind = lse[:, :-1] - score
        log_decay, k = F.logsigmoid(behind), torch.sigmoid(-behind).to(v.dtype)
        o, past = linear_attention(*(split_heads(each, self.num_heads) for each in (q, k, v, log_decay)), past)
        return self.read_out(x, o.flatten(2)), (past, lse[:, -1].clone())


class LightNetGrid(Gated):
    """LightNet over a grid of any number of axes, such as an image's: every position sees all others, in one pass.

        κ, q, v = W_k x, silu(W_q x), W_v x        k = softmax of κ over all positions, each channel by itself
        r(u) = [u cos θ, u sin θ]        o = r(q) sum over positions (r(k) vᵀ) / √(2 K)
        y = W_o (RMSNorm(o) silu(W_2 W_1 x))

    θ of a position is, in the channels' a-th part of `axes` equal ones, its coordinate along axis a times a frequency
    of the channel, base^{-i axes / K} for the i-th channel of the part.

    Args:
        dim: D, channels of x and y.
        axes: of the grid: 2 for an image.
        num_heads: H; None: dim / key_size, at least 1.
        key_size: K, keys' channels in a head, a multiple of axes.
        rank: between W_1 and W_2.
        base: of the angles.
        device, dtype: of the parameters.

    Shapes: x, y [B, *grid, D], for two axes [B, X, Y, D]; grids of any size.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Initialisation: torch.nn.Linear's; the norm 1. The authors' own is not confirmed here.

    Time and memory O(positions), with O(K D) for each; a gradient keeps q, k, their rotations, v and the gate.

    Qin et al., "You only scan once: efficient multi-dimension sequential modeling with LightNet", 2024.
    """

    def __init__(
        self,
        dim: int,
        axes: int = 2,
        num_heads: int | None = None,
        key_size: int = 128,
        rank: int = 128,
        base: float = 10000.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, key_size, rank, {"device": device, "dtype": dtype})
        check_positive(self, axes=axes)
        check_multiple(self, "key_size", key_size, "axes", axes)
        expect(base > 0, self, "base", "a number above 0", base)
        self.axes, self.base = axes, base

    def angles(self, grid: torch.Size, device: torch.device) -> Tensor:
        """[positions, K] in float64, position by position as the grid is flattened."""
        part = self.key_size // self.axes
        frequency = self.base ** (torch.arange(part, device=device, dtype=torch.float64) / -part)
        places = [torch.arange(size, device=device, dtype=torch.float64) for size in grid]
        places = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).flatten(0, -2)
        return (places[:, :, None] * frequency).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, *grid, D] -> y [B, *grid, D]."""
        fits = x.ndim == self.axes + 2 and x.shape[-1] == self.dim
        expect(fits, self, "x", f"[B, {self.axes} axes, D = {self.dim}]", f"shape {list(x.shape)}")
        expect(x.is_floating_point(), self, "x", "a floating dtype", x.dtype)
        flat = x.flatten(1, -2)
        q, v = F.silu(self.query(flat)), self.value(flat)
        k = torch.softmax(wide(self.key(flat)), 1)
        angle = self.angles(x.shape[1:-1], x.device)[None, :, None]
        cos, sin = angle.cos().to(k.dtype), angle.sin().to(k.dtype)
        q, k = (split_heads(wide(each), self.num_heads) for each in (q, k))
        q, k = (torch.cat([each * cos, each * sin], -1).to(v.dtype) for each in (q, k))
        o, _ = linear_attention(q, k, split_heads(v, self.num_heads), causal=False)
        return self.read_out(flat, o.flatten(2)).view(x.shape)
