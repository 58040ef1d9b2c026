"""Fast weights that learn a large chunk at a time, beside attention to a window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from ..ttt import large_chunk_ttt
from .parts import (
    append,
    cached_attention,
    check_multiple,
    check_positive,
    check_sequence,
    expect,
    keep_last,
    rms_norm,
    rotary,
    split_heads,
    wide,
)
from .streaming import State, Streaming

RATE = 1e-3  # of a step, before training
RANK = 32  # of what the first and the third fast weight differ by from half the identity


def unit(x: Tensor) -> Tensor:
    """Of length 1, or shorter where x is close to 0."""
    return x / (x.norm(dim=-1, keepdim=True) + 1e-5)


def fast_weights(num_heads: int, D: int, F: int, **options: Any) -> nn.ParameterList:
    """w0, w2 [num_heads, F, D]: half the identity and a product of low rank; w1 [num_heads, D, F]: normal."""
    weights = []
    for _ in range(2):
        left = torch.randn(num_heads, F, RANK, **options) * (0.5 / math.sqrt(RANK))
        right = torch.randn(num_heads, RANK, D, **options) * (0.5 / math.sqrt(D))
        weights.append(left @ right + 0.5 * torch.eye(F, D, **options))
    middle = torch.randn(num_heads, D, F, **options) / math.sqrt(F)
    return nn.ParameterList(nn.Parameter(weight) for weight in (weights[0], middle, weights[1]))


def learn(
    tokens: Sequence[Tensor],
    weights: Sequence[Tensor],
    sums: Sequence[Tensor],
    opened: Sequence[Tensor],
    chunk_size: int,
    **rule: Any,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """`large_chunk_ttt` of tokens q, k, v [B, T, H, D] and rates [B, T, H, 3 or, with momentum, 4], chunks counted from
    the sequence's start.

    Returns o, and weights, sums, and the open chunk's (k, v, rates) after the tokens.
    """
    q, *new = tokens
    T, before = q.shape[1], opened[0].shape[1]
    k, v, rates = (append(old, part) for old, part in zip(opened, new, strict=True))
    total = before + T
    kept = tuple(keep_last(part, total % chunk_size) for part in (k, v, rates))
    if total < chunk_size:  # nothing is learnt: the open chunk's other tokens are not needed
        k, v, rates, before = *(part[:, before:] for part in (k, v, rates)), 0
    else:  # what they asked is answered already: keys stand in their place
        q = append(opened[0], q)
    held = {"momentum": rates[..., 3], "momentum_state": list(sums)} if sums else {}
    o, *learnt = large_chunk_ttt(q, k, v, *weights, rates[..., :3], chunk_size, **held, **rule)
    return o[:, before:], tuple(learnt[:3]), tuple(learnt[3:]) if sums else (), kept


class LaCT(Streaming):
    """A gated MLP whose weights learn one step every chunk of a thousand tokens or so, beside attention to a window.

        q, k, v = W x;   a = attention(rotary(q), rotary(k), v), each token to the last `window`
        f(x) = w1 (silu(w0 x) * (w2 x));   w <- w - step of sum_t lr_t d(-<f(k'_t), v'_t>) / d w, after each chunk
        y = W_o (a + rms_norm(f(q')) silu(W_s x))

    where q', k' = rotary(unit(silu(scale q + offset))), v' = silu(v), `lr = softplus(W_l x + b)` for each of w0, w1 and
    w2, a chunk's step has momentum, the mean of sigmoid(W_m x + b), and may be orthogonalised (Muon), and the rows of w
    keep their norms. A token meets the weights that chunks before its own have left; its own chunk is in the window.

    Args:
        dim: D, channels of x and y.
        num_heads: of the attention.
        chunk_size: tokens of an inner step.
        num_fast_heads: networks side by side, each of D / num_fast_heads channels.
        window: tokens that attention sees, its own included; None is `chunk_size`. Fewer than `chunk_size` leave a gap.
        expand: hidden units of a network for each of its channels.
        optimizer: "muon" or "gd".
        steps: coefficients of Muon's `newton_schulz`; None are Muon's own, LaCT's language models take
            `seqops.LACT_LM_STEPS`.
        momentum: False: none.
        base: of the rotary positions.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: w and, with momentum, the last step, in float32 at least; keys, values and gates of
    the open chunk; the window's keys and values; the position, int64 [B].

    Initially w0 and w2 are half the identity and a product of rank 32 (std 0.5 / sqrt(32) and 0.5 / sqrt(d)), w1 is
    normal with variance 1 / hidden units, scale 1, offset 0, and a rate 0.001.

    Raises:
        ValueError: for sizes that do not fit and unknown names, at once and for a wrong x.

    Time grows with T: a token costs 18 D d expand products of the fast weights with d = D / num_fast_heads, and
    attention to the window. Memory for the gradient: that of `large_chunk_ttt`.

    Zhang et al., "Test-time training done right", 2025.
    """

    undecayed = ("scale", "offset")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 1024,
        num_fast_heads: int = 1,
        *,
        window: int | None = None,
        expand: int = 1,
        optimizer: str = "muon",
        steps: Sequence[Sequence[float]] | None = None,
        momentum: bool = True,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        window = chunk_size if window is None else window
        check_positive(self, dim=dim, num_heads=num_heads, chunk_size=chunk_size, num_fast_heads=num_fast_heads)
        check_positive(self, window=window, expand=expand)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        check_multiple(self, "dim", dim, "num_fast_heads", num_fast_heads)
        expect(optimizer in ("muon", "gd"), self, "optimizer", "'muon' or 'gd'", repr(optimizer))
        self.dim, self.num_heads, self.chunk_size, self.num_fast_heads = dim, num_heads, chunk_size, num_fast_heads
        self.window, self.momentum, self.base = window, momentum, base
        self.rule = {"optimizer": optimizer, "coefficients": steps}
        options = {"device": device, "dtype": dtype}
        D = dim // num_fast_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **options)
        self.scale = nn.Parameter(torch.ones(2, dim, **options))  # of the fast q and k
        self.offset = nn.Parameter(torch.zeros(2, dim, **options))
        self.rates = nn.Linear(dim, 3 * num_fast_heads, **options)
        self.held = nn.Linear(dim, num_fast_heads, **options) if momentum else None
        self.mix = nn.Linear(dim, num_fast_heads, **options)
        self.norm = nn.Parameter(torch.ones(D, **options))
        self.out = nn.Linear(dim, dim, bias=False, **options)
        self.fast = fast_weights(num_fast_heads, D, D * expand, **options)
        nn.init.constant_(self.rates.bias, RATE + math.log(-math.expm1(-RATE)))  # softplus of it is RATE

    def start(self, x: Tensor) -> State:
        """The state before the first token of x [B, T, D]."""
        B, real = x.shape[0], wide(x).dtype
        weights = tuple(wide(weight).to(real).repeat(B, 1, 1, 1) for weight in self.fast)
        sums = tuple(map(torch.zeros_like, weights)) if self.momentum else ()
        opened, cache = ([split_heads(x[:, :0], heads).clone()] * 2 for heads in (self.num_fast_heads, self.num_heads))
        rates = wide(x.new_zeros(B, 0, self.num_fast_heads, 4))[..., : 3 + self.momentum].clone()
        return weights, sums, (*opened, rates), tuple(cache), torch.zeros(B, dtype=torch.int64, device=x.device)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        weights, sums, opened, cache, position = self.start(x) if state is None else state
        q, k, v = self.qkv(x).chunk(3, -1)
        turned = [rotary(split_heads(part, self.num_heads), position, self.base) for part in (q, k)]
        y, cache = cached_attention(*turned, split_heads(v, self.num_heads), cache, self.window - 1)
        asked, keys = (self.ask(part, i, position) for i, part in enumerate((q, k)))
        rates = split_heads(softplus(wide(self.rates(x))), self.num_fast_heads)
        if self.held is not None:
            rates = torch.cat([rates, torch.sigmoid(wide(self.held(x)))[..., None]], -1)
        tokens = (asked, keys, split_heads(silu(v), self.num_fast_heads), rates)
        o, weights, sums, opened = learn(tokens, weights, sums, opened, self.chunk_size, **self.rule)
        o = rms_norm(o, wide(self.norm)) * silu(self.mix(x))[..., None]
        y = self.out(y.flatten(2) + o.flatten(2).to(y.dtype))
        return y, (weights, sums, opened, cache, position + x.shape[1])

    def ask(self, x: Tensor, which: int, position: Tensor) -> Tensor:
        """Queries (0) or keys (1) of the fast weights; positions turn the channels of the attention's heads."""
        x = unit(split_heads(silu(x * self.scale[which] + self.offset[which]), self.num_fast_heads))
        x = rotary(split_heads(x.flatten(2), self.num_heads), position, self.base)
        return split_heads(x.flatten(2), self.num_fast_heads)
