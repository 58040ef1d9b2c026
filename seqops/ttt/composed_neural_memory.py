"""neural_memory with the optimizer "muon" as matrix products of torch and newton_schulz, chunk after chunk.

In a chunk of C tokens from weights W and momentum S, with x_i, delta_i the two factors of token i's gradient at W:

    tokens t < C    o_t = f(b_t W; q_t)
    the end         V = g S - (c delta)^T x     W <- b_C W + newton_schulz(V)     S <- p S - (m delta)^T x
    the last token  o_C = f(W; q_C), with the new weights

A chunk that is not complete lets its weights decay, `W <- b_C W`, and every token of it reads them so. No weight of a
single token is formed, and c, m, g, p are those of the chunk's end alone. All is computed in float32, or float64.

What the forward keeps for the backward are `states` [B, H, segments, w1 | w2 | s1 | s2]: weights, and S with momentum,
before every segment of chunks, in which the backward computes them again.

Letters: B batch, T time, H heads, N = B H, D channels, F hidden channels, C tokens of a chunk, n chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import validate

ops = torch.ops.seqops


def segment_of(chunk_size: int) -> int:
    """How many chunks there are between two saved states: 8, or 128 tokens of shorter ones."""
    return max(8, -(-128 // chunk_size))


# ---- recurrences along the last dimension, by doubling; factors lie in [0, 1], and nothing is divided


def scan(factor: Tensor, x: Tensor, reverse: bool = False) -> Tensor:
    """`y_t = x_t + factor_t y_{t-1}`; reversed `y_t = x_t + factor_t y_{t+1}`."""
    if reverse:
        return scan(factor.flip(-1), x.flip(-1)).flip(-1)
    y, step = x, 1
    while step < x.shape[-1]:
        y = torch.cat((y[..., :step], y[..., step:] + factor[..., step:] * y[..., :-step]), -1)
        factor = torch.cat((factor[..., :step], factor[..., step:] * factor[..., :-step]), -1)
        step *= 2
    return y


def products(x: Tensor) -> Tensor:
    """`y_t = x_t y_{t-1}`, from 1."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat((x[..., :step], x[..., step:] * x[..., :-step]), -1)
        step *= 2
    return x


def after(x: Tensor) -> Tensor:
    """At t what x has at t + 1, and 1 at the end."""
    return torch.cat((x[..., 1:], torch.ones_like(x[..., :1])), -1)


def before(x: Tensor, first: float) -> Tensor:
    """At t what x has at t - 1, and `first` at the start."""
    return torch.cat((torch.full_like(x[..., :1], first), x[..., :-1]), -1)


def window_sums(x: Tensor, window: int, back: bool = False) -> Tensor:
    """`y_t = x_t + .. + x_{t + window - 1}`, or `x_{t - window + 1} + .. + x_t`: from blocks of 1, 2, 4, ... tokens."""
    if back:
        return window_sums(x.flip(-1), window).flip(-1)
    C = x.shape[-1]
    left, block, size, at = min(window, C), x, 1, 0
    total = torch.zeros_like(x)
    while left:
        if left & 1:
            total = torch.cat((total[..., : C - at] + block[..., at:], total[..., C - at :]), -1)
            at += size
        left >>= 1
        if left:
            block = torch.cat((block[..., :-size] + block[..., size:], block[..., -size:]), -1)
            size *= 2
    return total


# ---- coefficients


class Coefficients:
    """Of chunks of one length: gates [N, n, C]; without momentum g and p are 0, and S is not read."""

    def __init__(self, lr: Tensor, decay: Tensor | None, momentum: Tensor | None, window: int) -> None:
        self.lr, self.window = lr, window
        self.keep = torch.ones_like(lr) if decay is None else 1 - decay
        self.held = torch.zeros_like(lr) if momentum is None else momentum
        self.b = products(self.keep)
        # of the tokens after this one: what is left of a weight, and of S, at the end
        self.left = products(after(self.keep).flip(-1)).flip(-1)
        self.remaining = products(after(self.held).flip(-1)).flip(-1)
        # what a step of S at this token has added to V by the end
        self.effect = scan(after(self.held), self.left, reverse=True)
        self.effects, self.sums = window_sums(self.effect, window), window_sums(self.remaining, window)
        self.c, self.m = lr * self.effects, lr * self.sums
        self.g, self.p = self.held[..., 0] * self.effect[..., 0], self.held[..., 0] * self.remaining[..., 0]

    def gradients(self, db: Tensor, dc: Tensor, dm: Tensor, dg: Tensor, dp: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of lr, decay and momentum."""
        deffect = window_sums(dc * self.lr, self.window, back=True)
        dremaining = window_sums(dm * self.lr, self.window, back=True)
        first = torch.stack((dg, dp), -1) * self.held[..., :1]
        deffect[..., 0] += first[..., 0]
        dremaining[..., 0] += first[..., 1]
        dlr = dc * self.effects + dm * self.sums
        # each recurrence ran from the last token to the first; its adjoint runs the other way
        deffect, dremaining = scan(self.held, deffect), scan(self.held, dremaining)
        dleft = scan(self.keep, deffect)
        dheld = before(deffect, 0) * self.effect + before(dremaining, 0) * self.remaining
        dheld[..., 0] = dg * self.effect[..., 0] + dp * self.remaining[..., 0]
        db = scan(after(self.keep), db, reverse=True)
        dkeep = before(dleft, 0) * self.left + db * before(self.b, 1)
        return dlr, -dkeep, dheld


class Chunk(NamedTuple):
    """Coefficients [N, C] of one chunk; g, p [N, 1, 1]."""

    start: int
    stop: int
    complete: bool
    b: Tensor
    c: Tensor
    m: Tensor
    g: Tensor
    p: Tensor


# ---- the memory


def slope(x: Tensor) -> Tensor:
    """silu'"""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def curvature(x: Tensor) -> Tensor:
    """silu''"""
    gate = torch.sigmoid(x)
    return gate * (1 - gate) * (2 + x * (1 - 2 * gate))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Inner(NamedTuple):
    """The gradients of a chunk's tokens: of each weight the factors (delta [N, C, out], x [N, C, in])."""

    pairs: list[tuple[Tensor, Tensor]]
    a: Tensor | None = None  # W1 k
    below: Tensor | None = None  # W2^T delta2


def inner(k: Tensor, v: Tensor, weights: Sequence[Tensor], loss: str) -> Inner:
    if len(weights) == 1:
        return Inner([(k @ weights[0].mT - v if loss == "l2" else -v, k)])
    a = k @ weights[0].mT
    h = silu(a)
    delta = k + h @ weights[1].mT - v if loss == "l2" else -v
    below = delta @ weights[1]
    return Inner([(below * slope(a), k), (delta, h)], a, below)


def inner_backward(
    k: Tensor, weights: Sequence[Tensor], loss: str, given: Inner, ddelta: list[Tensor], dx: list[Tensor]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dk, dv and what the weights' gradients gain, from those of the pairs."""
    if len(weights) == 1:
        if loss != "l2":
            return dx[0], -ddelta[0], [torch.zeros_like(weights[0])]
        return dx[0] + ddelta[0] @ weights[0], -ddelta[0], [ddelta[0].mT @ k]
    (_, _), (delta, h) = given.pairs
    dbelow = ddelta[0] * slope(given.a)
    dlast, dh, dk = ddelta[1] + dbelow @ weights[1].mT, dx[1], dx[0]
    dsecond = delta.mT @ dbelow
    if loss == "l2":
        dk, dh = dk + dlast, dh + dlast @ weights[1]
        dsecond = dsecond + dlast.mT @ h
    da = ddelta[0] * given.below * curvature(given.a) + dh * slope(given.a)
    return dk + da @ weights[0], -dlast, [da.mT @ k, dsecond]


def read(q: Tensor, weights: Sequence[Tensor], b: Tensor) -> Tensor:
    """`f(b_t W; q_t)`; b [N, C]."""
    b = b[..., None]
    if len(weights) == 1:
        return b * (q @ weights[0].mT)
    return q + b * (silu(b * (q @ weights[0].mT)) @ weights[1].mT)


def read_backward(do: Tensor, q: Tensor, weights: Sequence[Tensor], b: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """dq, db and the gradients of the weights."""
    b = b[..., None]
    scaled = b * do
    if len(weights) == 1:
        return scaled @ weights[0], (do * (q @ weights[0].mT)).sum(-1), [scaled.mT @ q]
    first = q @ weights[0].mT
    hidden = silu(b * first)
    dhidden = (scaled @ weights[1]) * slope(b * first)
    db = (do * (hidden @ weights[1].mT)).sum(-1) + (dhidden * first).sum(-1)
    dfirst = b * dhidden
    return do + dfirst @ weights[0], db, [dfirst.mT @ q, scaled.mT @ hidden]


State = tuple[list[Tensor], list[Tensor]]  # weights and S, each [N, out, in]


class Call:
    """The arguments of one call, with heads in front: [N, T, ...]."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        decay: Tensor | None,
        momentum: Tensor | None,
        w1: Tensor,
        w2: Tensor | None,
        s1: Tensor | None,
        s2: Tensor | None,
        chunk_size: int,
        *,
        loss: str = "l2",
        window: int = 1,
    ) -> None:
        self.B, self.T, self.H, self.D = q.shape
        self.N, self.C, self.loss = self.B * self.H, chunk_size, loss
        self.real = validate.real_of(q.dtype)
        self.q, self.k, self.v = (self.heads(t) for t in (q, k, v))
        self.given = [w for w in (w1, w2) if w is not None]
        self.weights = [self.flat(w) for w in self.given]
        states = [s1, s2][: len(self.given)]
        # Without momentum S is what the last token, or window of tokens, leaves.
        self.sums = [
            torch.zeros_like(w) if s is None else self.flat(s) for w, s in zip(self.weights, states, strict=True)
        ]
        self.has_momentum = momentum is not None
        gates = [None if t is None else self.heads(t) for t in (lr, decay, momentum)]
        self.complete = self.T // chunk_size
        self.coefficients = []  # of the complete chunks, and of the last where it is not
        edge = self.complete * chunk_size
        if edge:
            cut = [None if t is None else t[:, :edge].unflatten(1, (self.complete, chunk_size)) for t in gates]
            self.coefficients.append(Coefficients(*cut, window))
        if edge < self.T:
            self.coefficients.append(Coefficients(*(None if t is None else t[:, None, edge:] for t in gates), window))

    def heads(self, t: Tensor) -> Tensor:
        return t.transpose(1, 2).to(self.real).reshape(self.N, self.T, *t.shape[3:])

    def back(self, t: Tensor, like: Tensor) -> Tensor:
        return t.unflatten(0, (self.B, self.H)).transpose(1, 2).to(like.dtype).contiguous()

    def flat(self, t: Tensor) -> Tensor:
        return t.to(self.real).reshape(self.N, *t.shape[2:])

    @property
    def chunks(self) -> int:
        return -(-self.T // self.C)

    def chunk(self, i: int) -> Chunk:
        complete = i < self.complete
        of, at = (self.coefficients[0], i) if complete else (self.coefficients[-1], 0)
        rows = (of.b[:, at], of.c[:, at], of.m[:, at])
        ends = (of.g[:, at, None, None], of.p[:, at, None, None])
        return Chunk(i * self.C, min((i + 1) * self.C, self.T), complete, *rows, *ends)

    def inner(self, chunk: Chunk, weights: Sequence[Tensor]) -> Inner:
        return inner(self.k[:, chunk.start : chunk.stop], self.v[:, chunk.start : chunk.stop], weights, self.loss)

    def update(self, chunk: Chunk, given: Inner, sums: Sequence[Tensor]) -> list[Tensor]:
        """V, of a complete chunk."""
        steps = [(-chunk.c[..., None] * delta).mT @ x for delta, x in given.pairs]
        return [step + chunk.g * s for step, s in zip(steps, sums, strict=True)] if self.has_momentum else steps

    def advance(self, chunk: Chunk, given: Inner, weights: Sequence[Tensor], sums: Sequence[Tensor]) -> State:
        """Weights and S after a chunk."""
        new = [chunk.b[:, -1:, None] * w for w in weights]
        if chunk.complete:
            new = [w + ops.newton_schulz(v) for w, v in zip(new, self.update(chunk, given, sums), strict=True)]
        if not self.has_momentum and chunk.stop < self.T:
            return new, list(sums)  # which nothing will read
        steps = [(-chunk.m[..., None] * delta).mT @ x for delta, x in given.pairs]
        if self.has_momentum:
            steps = [step + chunk.p * s for step, s in zip(steps, sums, strict=True)]
        return new, steps

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.flatten(1).unflatten(0, (self.B, self.H)) for t in tensors], -1)

    def unpack(self, state: Tensor) -> State:
        """Weights and S of one saved state [B, H, w1 | w2 | s1 | s2]."""
        like = [*self.weights, *(self.sums if self.has_momentum else [])]
        parts = state.split([w.shape[1] * w.shape[2] for w in like], -1)
        tensors = [part.reshape(w.shape) for part, w in zip(parts, like, strict=True)]
        layers = len(self.weights)
        return tensors[:layers], tensors[layers:] or self.sums


# ---- forward


def run(call: Call, states: Tensor | None) -> tuple[Tensor, State]:
    """o [N, T, D] and the last weights and S. Where `states` is given, it is written."""
    o = torch.empty_like(call.q)
    weights, sums = [w.clone() for w in call.weights], [s.clone() for s in call.sums]
    for i in range(call.chunks):
        if states is not None and i % segment_of(call.C) == 0:
            kept = [*weights, *(sums if call.has_momentum else [])]
            states[:, :, i // segment_of(call.C)] = call.pack(kept)
        chunk = call.chunk(i)
        rows = slice(chunk.start, chunk.stop - chunk.complete)  # that read the old weights
        if rows.start < rows.stop:
            o[:, rows] = read(call.q[:, rows], weights, chunk.b[:, : rows.stop - rows.start])
        weights, sums = call.advance(chunk, call.inner(chunk, weights), weights, sums)
        if chunk.complete:
            last = slice(chunk.stop - 1, chunk.stop)
            o[:, last] = read(call.q[:, last], weights, torch.ones_like(chunk.b[:, :1]))
    return o, (weights, sums)


def results(call: Call, q: Tensor, o: Tensor, last: State) -> tuple[Tensor, ...]:
    """o, w1, w2, s1, s2."""
    nothing = o.new_empty(0)
    shaped = [
        [t.unflatten(0, (call.B, call.H)).contiguous() for t in each] + [nothing.clone()] * (2 - len(each))
        for each in last
    ]
    return (call.back(o, q), *shaped[0], *shaped[1])


def muon_memory(q: Tensor, *arguments: Tensor | int | None, **options: str | int) -> tuple[Tensor, ...]:
    call = Call(q, *arguments, **options)
    return results(call, q, *run(call, None))


def muon_memory_forward(q: Tensor, *arguments: Tensor | int | None, **options: str | int) -> tuple[Tensor, ...]:
    call = Call(q, *arguments, **options)
    size = sum(w.shape[1] * w.shape[2] for w in call.weights) * (2 if call.has_momentum else 1)
    segments = -(-call.chunks // segment_of(call.C))
    states = call.q.new_empty(call.B, call.H, segments, size)
    return (*results(call, q, *run(call, states)), states)


# ---- backward


def outer(a: Tensor, b: Tensor) -> Tensor:
    """`<a, b>` of matrices [N, out, in]: [N]."""
    return (a * b).sum((-2, -1))


class Gradients:
    """What the backward of one call writes, and the adjoints of weights and S that it carries."""

    def __init__(self, call: Call, grad_o: Tensor | None, last: Sequence[Tensor | None]) -> None:
        layers = len(call.weights)
        self.call = call
        self.do = torch.zeros_like(call.q) if grad_o is None else call.heads(grad_o)
        like = call.weights
        carried = [
            [torch.zeros_like(w) if t is None else call.flat(t) for t, w in zip(part, like, strict=False)]
            for part in (last[:2], last[2:])
        ]
        self.dw, self.ds = carried[0][:layers], carried[1][:layers]
        self.dq, self.dk, self.dv = (torch.empty_like(call.q) for _ in range(3))
        # of the coefficients of each kind of chunks: b, c, m [N, n, C], g, p [N, n]
        self.coefficients = [
            tuple(torch.zeros_like(t) for t in (each.b, each.c, each.m, each.g, each.p)) for each in call.coefficients
        ]

    def walk(self, i: int, entry: State, exit_weights: Sequence[Tensor]) -> None:
        """Chunk i, from the weights and S before it and the weights after it."""
        call, chunk, (weights, sums) = self.call, self.call.chunk(i), entry
        db, dc, dm, dg, dp = (t[:, i if chunk.complete else 0] for t in self.coefficients[0 if chunk.complete else -1])
        at = slice(chunk.start, chunk.stop)
        given = call.inner(chunk, weights)
        if chunk.complete:  # the last token reads the new weights
            last = slice(chunk.stop - 1, chunk.stop)
            ones = torch.ones_like(chunk.b[:, :1])
            self.dq[:, last], _, more = read_backward(self.do[:, last], call.q[:, last], exit_weights, ones)
            self.dw = [dw + each for dw, each in zip(self.dw, more, strict=True)]
        dw = [chunk.b[:, -1:, None] * each for each in self.dw]
        db[:, -1] += sum(outer(each, w) for each, w in zip(self.dw, weights, strict=True))
        ddelta = [torch.zeros_like(delta) for delta, _ in given.pairs]
        dx = [torch.zeros_like(x) for _, x in given.pairs]
        ds = [torch.zeros_like(w) for w in weights]
        if chunk.complete:
            learnt = call.update(chunk, given, sums)
            dlearnt = [ops.newton_schulz_backward(each, v) for each, v in zip(self.dw, learnt, strict=True)]
            self.sum_backward(given, chunk.c, dlearnt, ddelta, dx, dc)
            if call.has_momentum:
                dg += sum(outer(each, s) for each, s in zip(dlearnt, sums, strict=True))
                ds = [chunk.g * each for each in dlearnt]
        if call.has_momentum or chunk.stop == call.T:
            self.sum_backward(given, chunk.m, self.ds, ddelta, dx, dm)
        if call.has_momentum:
            dp += sum(outer(each, s) for each, s in zip(self.ds, sums, strict=True))
            ds = [chunk.p * each + more for each, more in zip(self.ds, ds, strict=True)]
        rows = slice(chunk.start, chunk.stop - chunk.complete)
        count = rows.stop - rows.start
        if count:
            old = read_backward(self.do[:, rows], call.q[:, rows], weights, chunk.b[:, :count])
            self.dq[:, rows], db_rows, more = old
            db[:, :count] += db_rows
            dw = [each + one for each, one in zip(dw, more, strict=True)]
        self.dk[:, at], self.dv[:, at], more = inner_backward(call.k[:, at], weights, call.loss, given, ddelta, dx)
        self.dw, self.ds = [each + one for each, one in zip(dw, more, strict=True)], ds

    @staticmethod
    def sum_backward(
        given: Inner,
        factor: Tensor,
        adjoints: Sequence[Tensor],
        ddelta: list[Tensor],
        dx: list[Tensor],
        dfactor: Tensor,
    ) -> None:
        """Of `-(factor delta)^T x`, into the last three."""
        factor = factor[..., None]
        for i, ((delta, x), adjoint) in enumerate(zip(given.pairs, adjoints, strict=True)):
            along = x @ adjoint.mT
            ddelta[i] -= factor * along
            dx[i] -= (factor * delta) @ adjoint
            dfactor -= (delta * along).sum(-1)

    def gates(self) -> list[Tensor]:
        """dlr, ddecay, dmomentum [N, T]."""
        call = self.call
        found = [each.gradients(*given) for each, given in zip(call.coefficients, self.coefficients, strict=True)]
        empty = [call.q.new_zeros(call.N, 0)] * 3
        return [torch.cat([part.flatten(1) for part in parts], 1) for parts in zip(empty, *found, strict=True)]


def muon_memory_backward(
    grad_o: Tensor | None,
    grad_w1: Tensor | None,
    grad_w2: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    states: Tensor,
    chunk_size: int,
    **options: str | int,
) -> tuple[Tensor, ...]:
    call = Call(q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, **options)
    found = Gradients(call, grad_o, (grad_w1, grad_w2, grad_s1, grad_s2))
    size = segment_of(chunk_size)
    for segment in reversed(range(states.shape[2])):
        first, end = segment * size, min((segment + 1) * size, call.chunks)
        entries = [call.unpack(states[:, :, segment])]
        for i in range(first, end):
            chunk, (weights, sums) = call.chunk(i), entries[-1]
            entries.append(call.advance(chunk, call.inner(chunk, weights), weights, sums))
        for i in reversed(range(first, end)):
            found.walk(i, entries[i - first], entries.pop()[0])
    nothing = call.q.new_empty(0)
    gates = [
        nothing.clone() if gate is None else call.back(dgate, gate)
        for gate, dgate in zip((lr, decay, momentum), found.gates(), strict=True)
    ]
    weights = [
        nothing.clone() if t is None else each.reshape(t.shape).to(t.dtype)
        for t, each in zip((w1, w2), [*found.dw, None], strict=False)
    ]
    sums = [
        nothing.clone() if t is None else each.reshape(t.shape).to(t.dtype)
        for t, each in zip((s1, s2), [*found.ds, None], strict=False)
    ]
    sequences = [call.back(each, q) for each in (found.dq, found.dk, found.dv)]
    return (*sequences, *gates, *weights, *sums)
