"""A layer whose state is a network that learns what it reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, silu

from ..conv import causal_conv1d
from ..ttt import neural_memory
from .parts import (
    append,
    check_multiple,
    check_positive,
    check_sequence,
    expect,
    keep_last,
    rms_norm,
    split_heads,
    wide,
)
from .streaming import State, Streaming

FORGOTTEN = 0.001  # of a memory by a token, before training
SHORT = 0.001  # length of a query, key or value that is not brought to 1


def unit(x: Tensor, num_heads: int) -> Tensor:
    """[B, T, H D] -> [B, T, H, D], of length 1; what is shorter than SHORT is divided by SHORT: slopes stay bounded."""
    return normalize(wide(split_heads(x, num_heads)), dim=-1, eps=SHORT).to(x.dtype)


def learn_in_chunks(
    tokens: Sequence[Tensor],
    gates: Sequence[Tensor],
    state: tuple[Any, ...],
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, tuple[Any, ...]]:
    """`neural_memory` of q, k, v [B, T, H, D] and gates lr[, decay[, momentum]] [B, T, H], in a sequence's own chunks.

    state: weights and sums at the start of the open chunk, and its k, v and gates, which are learnt again.
    Returns o [B, T, H, D] and the state after the tokens.
    """
    weights, sums, (keys, values, *opened) = state
    # what the open chunk's tokens asked is answered already: keys stand in their place
    q, k, v = (append(old, new) for old, new in zip((keys, keys, values), tokens, strict=True))
    gates = [append(old, new) for old, new in zip(opened, gates, strict=True)]

    def run(at: slice) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]]:
        lr, *others = (gate[:, at] for gate in gates)
        given = dict(zip(("decay", "momentum"), others, strict=False)) | options
        if sums:
            given["momentum_state"] = list(sums)
        o, w, s = neural_memory(q[:, at], k[:, at], v[:, at], lr, list(weights), chunk_size, **given)
        return o, tuple(w), tuple(s) if sums else ()

    total = k.shape[1]
    complete, outputs = total // chunk_size * chunk_size, []
    if complete:
        o, weights, sums = run(slice(0, complete))
        outputs.append(o)
    outputs.append(run(slice(complete, None))[0])
    kept = tuple(keep_last(t, total - complete) for t in (k, v, *gates))
    return torch.cat(outputs, 1)[:, keys.shape[1] :], (weights, sums, kept)


def recall(memory: NeuralMemory, x: Tensor, state: State) -> Tensor:
    """What the memory of a state answers to x [B, T, D] without learning, by the weights of the open chunk's start.

    Without a convolution: memories with kernel = 1.
    """
    q = unit(memory.features(silu(memory.qkv(x)).chunk(3, -1)[0]), memory.num_heads).transpose(1, 2)
    first, *second = (weight.to(q.dtype) for weight in state[1])
    o = q @ first.mT
    o = q + silu(o) @ second[0].mT if second else o
    return rms_norm(o.transpose(1, 2), wide(memory.scale)).flatten(2)


class NeuralMemory(Streaming):
    """A memory that learns each token's key and value while it reads, and answers each token's query (Titans).

        q, k, v = silu(conv(x W)), per head of length 1 (shorter if below 0.001)
        S_t = momentum_t S_{t-1} - lr_t d loss_t / d M;   M_t = (1 - decay_t) M_{t-1} + S_t;   o_t = f(M_t; q_t)
        y_t = W_o (rms_norm(o_t) * silu(W_g x_t))

    with the gradient at the weights M of the chunk's start, `loss = |f(k_t) - v_t|^2 / 2` or `-<f(k_t), v_t>`, and the
    gates `momentum_t = sigmoid(W_m x_t + b)`, `decay_t = sigmoid(W_d x_t + b)` and
    `lr_t = (1 - momentum_t) sigmoid(W_l x_t + b) rate / (chunk_size window)`. The paper leaves rates free, and free
    ones diverge as a chunk's steps add up: so bounded, their sum stays below `rate`, and so do the repetitions of a
    momentum that stays the same. One that swings between 0 and nearly 1 can still push the memory away.

    Args:
        dim: D, channels of x and y.
        num_heads: memories side by side, each of D / num_heads channels.
        chunk_size: tokens whose gradients are taken at the same weights.
        hidden: 0 is a linear memory `f(x) = M x`; else the units of `f(x) = x + W2 silu(W1 x)`.
        loss: "l2" or "dot".
        optimizer: "gd", or "muon": a chunk's whole step is orthogonalised at its end, until which weights only decay.
        window: how many tokens of the chunk the step of a token sums (ATLAS's Omega rule).
        momentum: False: none, and no state for it.
        rate: bounds the sum of a chunk's rates; a linear memory with "l2" is stable below 2, momentum staying the same.
        kernel: taps of the convolution over time; 1 is none.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: the last inputs of the convolution, weights and their momentum at the start of the
    open chunk in float32 at least, and keys, values and gates of the open chunk's tokens, fewer than `chunk_size`.

    Initially the memory is Xavier uniform, a token forgets 0.001 of it, and sigmoid(W_l x + b) is near 1/2; the paper
    names no values. Values have length 1, as keys: the paper's may grow, and errors with them.

    Raises:
        ValueError: for sizes that do not fit and unknown names, at once and for a wrong x.

    Time grows with T: a token costs about 6 D^2 / num_heads products of the memory, 14 D hidden with an MLP, and a step
    those of the open chunk again. Memory for the gradient: that of `neural_memory`.

    Behrouz et al., "Titans: learning to memorize at test time", 2024.
    """

    undecayed = ("scale",)

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        chunk_size: int = 16,
        hidden: int = 0,
        *,
        loss: str = "l2",
        optimizer: str = "gd",
        window: int = 1,
        momentum: bool = True,
        rate: float = 1.0,
        kernel: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads, chunk_size=chunk_size, window=window, kernel=kernel)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        expect(isinstance(hidden, int) and hidden >= 0, self, "hidden", "a whole number of at least 0", repr(hidden))
        expect(loss in ("l2", "dot"), self, "loss", "'l2' or 'dot'", repr(loss))
        expect(optimizer in ("gd", "muon"), self, "optimizer", "'gd' or 'muon'", repr(optimizer))
        expect(rate > 0, self, "rate", "a number above 0", rate)
        self.dim, self.num_heads, self.chunk_size, self.hidden = dim, num_heads, chunk_size, hidden
        self.window, self.momentum, self.rate = window, momentum, rate
        self.rule = {"loss": loss, "optimizer": optimizer, "window": window}
        options = {"device": device, "dtype": dtype}
        D = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **options)
        self.taps = nn.Parameter(torch.empty(3 * dim, kernel, **options)) if kernel > 1 else None
        self.gates = nn.Linear(dim, (2 + momentum) * num_heads, **options)  # rate, decay, momentum
        shapes = [(num_heads, hidden, D), (num_heads, D, hidden)] if hidden else [(num_heads, D, D)]
        self.memory = nn.ParameterList(nn.Parameter(torch.empty(shape, **options)) for shape in shapes)
        self.scale = nn.Parameter(torch.ones(num_heads, D, **options))  # of the norm
        self.gate = nn.Linear(dim, dim, bias=False, **options)
        self.out = nn.Linear(dim, dim, bias=False, **options)
        with torch.no_grad():
            for weight in self.memory:
                nn.init.uniform_(weight, -1, 1).mul_(math.sqrt(6 / (weight.shape[1] + weight.shape[2])))
            self.gates.bias.zero_()[num_heads : 2 * num_heads] = math.log(FORGOTTEN / (1 - FORGOTTEN))
            if kernel > 1:
                nn.init.uniform_(self.taps, -(kernel**-0.5), kernel**-0.5)

    def start(self, x: Tensor) -> State:
        """The state before the first token of x [B, T, D]."""
        B, real = x.shape[0], wide(x).dtype
        weights = tuple(wide(weight).to(real).repeat(B, 1, 1, 1) for weight in self.memory)
        sums = tuple(map(torch.zeros_like, weights)) if self.momentum else ()
        token = x.new_zeros(B, 0, self.num_heads, self.dim // self.num_heads)
        gate = token.new_zeros(B, 0, self.num_heads, dtype=real)
        taps = 0 if self.taps is None else self.taps.shape[1] - 1
        opened = (token, token.clone(), *(gate.clone() for _ in range(2 + self.momentum)))
        return x.new_zeros(B, taps, 3 * self.dim), weights, sums, opened

    def features(self, x: Tensor) -> Tensor:  # of queries and keys
        return x

    def rates(self, x: Tensor) -> list[Tensor]:
        """lr, decay and momentum [B, T, H] of tokens x [B, T, D]."""
        lr, *others = torch.sigmoid(wide(self.gates(x))).chunk(2 + self.momentum, -1)
        left = 1 - others[1] if self.momentum else 1
        return [lr * left * (self.rate / (self.chunk_size * self.window)), *others]

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        before, *state = self.start(x) if state is None else state
        joined = self.qkv(x)
        if self.taps is None:
            joined = silu(joined)
        else:
            joined, before = causal_conv1d(joined, self.taps, None, before.to(joined.dtype), activation="silu")
        q, k, v = joined.chunk(3, -1)
        tokens = [unit(part, self.num_heads) for part in (self.features(q), self.features(k), v)]
        o, state = learn_in_chunks(tokens, self.rates(x), state, self.chunk_size, **self.rule)
        y = rms_norm(o, wide(self.scale)).flatten(2) * silu(self.gate(x))
        return self.out(y), (before, *state)
