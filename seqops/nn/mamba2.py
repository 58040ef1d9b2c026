"""Mamba-2: a linear attention whose decay, keys, values and queries follow from the input; and its sliding window."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..conv import causal_conv1d
from ..linear_attention import linear_attention
from .parts import (
    append,
    check_multiple,
    check_positive,
    check_sequence,
    expect,
    inverse_softplus,
    keep_last,
    log_uniform,
    rms_norm,
    split_heads,
    wide,
)
from .streaming import State, Streaming


class Mamba2(Streaming):
    """Selective state space: every head's state matrix decays by a step width that the input chooses.

        [z, x', B', C', δ] = W_in x_t        [x, B, C] = silu(causal_conv1d([x', B', C']))        Δ = softplus(δ + bias)
        S_t = e^{-e^a Δ_t} S_{t-1} + B_t (Δ_t x_t)ᵀ        o_t = S_tᵀ C_t + d x_t
        y_t = W_out RMSNorm(o_t silu(z_t))

    With `window`, o_t counts the last `window` positions alone, each decayed as before: the sliding window that keeps
    a trained model's state from filling up beyond the lengths of its training.

    Args:
        dim: D, channels of x and y.
        state_size: N, rows of a head's state; width of B and C.
        head_size: P, channels of a head; H = expand * dim / P heads.
        expand: channels inside for each one outside.
        num_groups: B and C are shared by the heads of a group.
        kernel_size: W, taps of the convolution.
        window: positions that count, the current one among them; None: all.
        decay_scale: factor on the decay's exponent; above 1 the model forgets sooner than it was trained to.
        insert_scale: factor on what is added to the state.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. State: the convolution's last W - 1 steps [B, W - 1, C] with C = expand D + 2 groups N, in
    the dtype of the projection; and S [B, H, N, P] in float32 at least. With a window, in place of S, the last
    window - 1 rows of keys [B, ·, groups, N], values [B, ·, H, P] and decays [B, ·, H]; zeros before the start.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Initialisation: e^a uniform in 1 to 16, Δ's bias so that Δ is log-uniform in 0.001 to 0.1, d and the norm 1,
    projections and taps as torch.nn's. Both scales are 1 unless given: the values of the sliding window's paper are not
    confirmed here; its normalisation of the state is left out.

    Time O(T H N P); a step O(H N P), with a window `window` times that. A gradient keeps the projections of x.

    Dao and Gu, "Transformers are SSMs: generalized models and efficient algorithms through structured state space
    duality", 2024; Chen et al., "Stuffed Mamba: state collapse and state capacity of RNN-based long-context modeling",
    2024.
    """

    undecayed = ("log_rate", "step_bias", "skip")

    def __init__(
        self,
        dim: int,
        state_size: int = 128,
        head_size: int = 64,
        expand: int = 2,
        num_groups: int = 1,
        kernel_size: int = 4,
        window: int | None = None,
        decay_scale: float = 1.0,
        insert_scale: float = 1.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "state_size": state_size, "head_size": head_size, "expand": expand}
        check_positive(self, **sizes, num_groups=num_groups, kernel_size=kernel_size)
        check_multiple(self, "expand * dim", expand * dim, "head_size", head_size)
        self.num_heads = expand * dim // head_size
        check_multiple(self, "heads", self.num_heads, "num_groups", num_groups)
        if window is not None:
            check_positive(self, window=window)
        for name, scale in (("decay_scale", decay_scale), ("insert_scale", insert_scale)):
            expect(scale > 0, self, name, "a number above 0", scale)
        self.dim, self.state_size, self.num_groups, self.window = dim, state_size, num_groups, window
        self.decay_scale, self.insert_scale = decay_scale, insert_scale
        inner, mixed = expand * dim, expand * dim + 2 * num_groups * state_size
        self.parts = [inner, mixed, self.num_heads]
        options = {"device": device, "dtype": dtype}
        self.project = nn.Linear(dim, sum(self.parts), bias=False, **options)
        self.taps = nn.Parameter((torch.rand(mixed, kernel_size, **options) * 2 - 1) / math.sqrt(kernel_size))
        self.taps_bias = nn.Parameter((torch.rand(mixed, **options) * 2 - 1) / math.sqrt(kernel_size))
        self.log_rate = nn.Parameter(torch.log(1 + 15 * torch.rand(self.num_heads, **options)))
        self.step_bias = nn.Parameter(inverse_softplus(log_uniform((self.num_heads,), 1e-3, 0.1, **options)))
        self.skip = nn.Parameter(torch.ones(self.num_heads, **options))
        self.norm = nn.Parameter(torch.ones(inner, **options))
        self.out = nn.Linear(inner, dim, bias=False, **options)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """x [B, T, D], state or None -> y [B, T, D], state."""
        check_sequence(self, x, self.dim)
        tail, past = (None, None) if state is None else state
        gate, mixed, step = self.project(x).split(self.parts, -1)
        taps, bias = self.taps.to(mixed.dtype), self.taps_bias.to(mixed.dtype)
        tail = None if tail is None else tail.to(mixed.dtype)
        mixed, tail = causal_conv1d(mixed, taps, bias, tail, activation="silu")
        grouped = self.num_groups * self.state_size
        values, keys, queries = mixed.split([self.parts[0], grouped, grouped], -1)
        values = split_heads(values, self.num_heads)
        step = F.softplus(wide(step) + wide(self.step_bias))
        log_decay = step * -torch.exp(wide(self.log_rate)) * self.decay_scale
        added = (values * (step * self.insert_scale)[..., None]).to(mixed.dtype)
        o, past = self.attend(queries, keys, added, log_decay, past)
        o = (o + values * self.skip[:, None]).flatten(2)
        return self.out(rms_norm(o * F.silu(gate), self.norm)), (tail, past)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, past: State) -> tuple[Tensor, State]:
        """q, k [B, T, groups * N], v [B, T, H, P], log_decay [B, T, H] -> o [B, T, H, P], what the next piece needs."""
        q, k = split_heads(q, self.num_groups), split_heads(k, self.num_groups)
        if self.window is None:
            return linear_attention(self.spread(q), self.spread(k), v, log_decay, past, scale=1.0)
        kept = self.window - 1
        if past is None:  # keys of zero add nothing
            past = tuple(rows.new_zeros(len(rows), kept, *rows.shape[2:]) for rows in (k, v, log_decay))
        k, v, log_decay = (append(old, new) for old, new in zip(past, (k, v, log_decay), strict=True))
        q = torch.cat([q.new_zeros(len(q), kept, *q.shape[2:]), q], 1)
        o, _ = linear_attention(self.spread(q), self.spread(k), v, log_decay, scale=1.0, window=self.window)
        return o[:, kept:], tuple(keep_last(rows, kept) for rows in (k, v, log_decay))

    def spread(self, x: Tensor) -> Tensor:
        """[B, T, groups, N] -> [B, T, H, N], each group's row for all of its heads."""
        heads = self.num_heads // self.num_groups
        return x[:, :, :, None].expand(-1, -1, -1, heads, -1).flatten(2, 3)
