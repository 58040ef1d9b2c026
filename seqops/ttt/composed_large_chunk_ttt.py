"""large_chunk_ttt as matrix products of torch and element-wise passes between them, chunk after chunk.

A backend brings the passes, six functions that write into their last arguments: csrc/ttt/passes.cpp says what they
compute. Memory between products is taken once a call. Letters: B batch, T time, H heads, N = B H, D channels, F hidden
channels, C tokens at hand, U updates. The three matrices of a weight, `w0 | w1 | w2`, are always in this order.

What the forward keeps for the backward:

    weights    [B, H, slots, 3 F D]   before every `span` updates and after the last; those between are learnt again
    sums       [B, H, slots, 3 F D]   the same of what was added last: momentum or, with "muon" alone, gradients
    norms      [B, H, U, 2 F + D]     of the rows of the weights before they were rescaled
    products   [B, H, 5, T, F]        w0 k, w2 k, w1^T v, w0 q, w2 q; with 0 in place of 5 they are computed again

What is not needed has a 0 in place of its last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import validate

ops = torch.ops.seqops

# Tokens at a time. Passes run in a CPU's caches, and GPUs want large products.
TILE = {"cpu": 1024, "cuda": 4096}
SPAN = 32  # at most so many updates are learnt again at a time


class Step(NamedTuple):
    learns: bool  # else the weights are applied
    start: int
    stop: int


def schedule(T: int, chunk_size: int, order: str) -> list[Step]:
    chunks = [(start, min(start + chunk_size, T)) for start in range(0, T, chunk_size)]
    if order == "full":
        return [Step(True, 0, T), Step(False, 0, T)] if T else []
    if order == "update_apply":
        return [Step(learns, *chunk) for chunk in chunks for learns in (True, False)]
    return [
        Step(learns, start, stop)
        for start, stop in chunks
        for learns in (False, True)
        if not learns or stop - start == chunk_size
    ]


def updates(T: int, chunk_size: int, order: str) -> int:
    """How many there are; without a branch on T, which may be a symbol."""
    if order == "full":
        return 1
    return T // chunk_size if order == "apply_update" else (T + chunk_size - 1) // chunk_size


def span(D: int, chunk_size: int) -> int:
    """Of so many updates the weights are kept once: at most 3 F numbers a token, but for the smallest chunks."""
    return torch.sym_min((D + chunk_size - 1) // chunk_size, SPAN)


def slots(D: int, T: int, chunk_size: int, order: str) -> int:
    """How often weights are kept, the last time at the end."""
    every = span(D, chunk_size)
    return (updates(T, chunk_size, order) + every - 1) // every + 1


def keeps_products(q: Tensor) -> bool:
    """Whether the forward keeps what the backward would compute again, a sixth of all its products' work.

    That is 5 F numbers a token and head, more than the arguments: memory that GPUs do not have to spare.
    """
    return q.device.type != "cuda"


def product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """`out = a b` or `out += a b`; 16-bit operands of a wider result are not widened first."""
    wider = {} if a.dtype == out.dtype else {"out_dtype": out.dtype}
    if add:
        torch.baddbmm(out, a, b, **wider, out=out)
    else:
        torch.bmm(a, b, **wider, out=out)


class Call:
    """Sizes and options of one call, and its memory."""

    def __init__(
        self,
        passes: Any,
        q: Tensor,
        w0: Tensor,
        lr: Tensor,
        momentum: Tensor | None,
        chunk_size: int,
        *,
        optimizer: str = "gd",
        order: str = "apply_update",
        coefficients: Sequence[float] | None = None,
        weight_norm: bool = True,
    ) -> None:
        self.passes = passes
        self.B, self.T, self.H, self.D = q.shape
        self.F, self.N = w0.shape[2], self.B * self.H
        self.shapes = ((self.F, self.D), (self.D, self.F), (self.F, self.D))
        self.q, self.real = q, validate.real_of(q.dtype)
        self.operand = q.dtype if q.device.type == "cuda" else self.real  # what products take
        self.chunk_size, self.order = chunk_size, order
        self.muon, self.coefficients, self.weight_norm = optimizer == "muon", coefficients, weight_norm
        self.keeps_sums = momentum is not None or self.muon
        self.steps = schedule(self.T, chunk_size, order)
        self.updates = updates(self.T, chunk_size, order)
        self.span, self.slots = span(self.D, chunk_size), slots(self.D, self.T, chunk_size, order)
        self.lr = self.by_head(lr)  # [N, T, 3]
        self.momentum = None if momentum is None else self.by_head(momentum)  # [N, T]
        self.held: dict[str, Tensor] = {}

    def by_head(self, t: Tensor) -> Tensor:
        """[B, T, H, ...] -> [N, T, ...]"""
        return t.to(self.real).transpose(1, 2).reshape(self.N, self.T, *t.shape[3:]).contiguous()

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of this name, the same in every chunk."""
        count = math.prod(shape)
        held = self.held.get(name)
        if held is None or held.numel() < count:
            self.held[name] = held = self.q.new_empty(count, dtype=dtype or self.real)
        return held[:count].view(shape)

    def chunk(self, t: Tensor, at: slice) -> Tensor:
        """Of [B, T, H, D], as [B, H, C, D]."""
        return t[:, at].transpose(1, 2)

    def is_batch(self, t: Tensor, dtype: torch.dtype) -> bool:
        """Whether a product can take chunks of t where they are."""
        return t.dtype == dtype and (self.B == 1 or self.H == 1) and (t.shape[3] == 1 or t.stride(3) == 1)

    def batch(self, t: Tensor) -> Tensor:
        """[B, H, C, D] -> [N, C, D], a view where B or H is 1."""
        return t[0] if self.B == 1 else t[:, 0]

    def rows(self, name: str, t: Tensor, at: slice) -> Tensor:
        """A chunk of q, k, v or a gradient as an operand [N, C, D]."""
        chunk = self.chunk(t, at)
        if self.is_batch(t, self.operand):
            return self.batch(chunk)
        copy = self.buffer(name, *chunk.shape, dtype=self.operand)
        copy.copy_(chunk)
        return copy.view(self.N, *chunk.shape[2:])

    def output(self, name: str, t: Tensor, at: slice) -> Tensor:
        """Where a chunk of t is written as [N, C, D]; `deliver` it then."""
        chunk = self.chunk(t, at)
        if self.is_batch(t, self.real):
            return self.batch(chunk)
        return self.buffer(name, self.N, *chunk.shape[2:])

    def deliver(self, value: Tensor, t: Tensor, at: slice) -> None:
        if not self.is_batch(t, self.real):
            chunk = self.chunk(t, at)
            chunk.copy_(value.view(chunk.shape))

    def hidden(self, name: str, C: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.buffer(name, self.N, C, self.F, dtype=dtype)

    def hiddens(self, names: Sequence[str], at: slice, dtype: torch.dtype | None = None) -> list[Tensor]:
        return [self.hidden(name, at.stop - at.start, dtype) for name in names]

    def over(self, names: Sequence[str], held: Sequence[Tensor], C: int) -> list[Tensor]:
        """Operands [N, C, F], in the place of what is read for the last time."""
        if self.operand == self.real:
            return [*held]
        return [self.hidden(name, C, self.operand) for name in names]

    def tiles(self, step: Step) -> list[slice]:
        tile = TILE[self.q.device.type]
        return [slice(start, min(start + tile, step.stop)) for start in range(step.start, step.stop, tile)]

    def matrices(self, state: Tensor, slot: int) -> list[Tensor]:
        """The three matrices [N, rows, columns] of a kept state [B, H, slots, 3 F D]."""
        flat = state.view(self.N, *state.shape[2:])[:, slot].unflatten(1, (3, self.F * self.D))
        return [flat[:, i].unflatten(1, shape) for i, shape in enumerate(self.shapes)]

    def matrices_norms(self, norms: Tensor, at: int) -> list[Tensor]:
        """Of their rows, [N, rows], from [B, H, U, 2 F + D]."""
        return [*norms.view(self.N, *norms.shape[2:])[:, at].split([rows for rows, _ in self.shapes], 1)]

    def scratch_norms(self) -> list[Tensor]:
        return [self.buffer(f"norms{i}", self.N, rows) for i, (rows, _) in enumerate(self.shapes)]

    def operands(self, name: str, weights: Sequence[Tensor]) -> list[Tensor]:
        if self.operand == self.real:
            return [*weights]
        copies = [self.buffer(f"{name}{i}", *w.shape, dtype=self.operand) for i, w in enumerate(weights)]
        return [copy.copy_(w) for copy, w in zip(copies, weights, strict=True)]

    def beta(self, step: Step) -> Tensor:
        """[N, 1, 1]"""
        return self.momentum[:, step.start : step.stop].mean(1)[:, None, None]


# ---- what learns


class Products:
    """w0 k, w2 k, w1^T v, w0 q, w2 q, numbered 0 to 4: kept for all tokens, or in memory that the next tile takes."""

    def __init__(self, call: Call, kept: Tensor | None, known: bool) -> None:
        self.call, self.known = call, known
        self.kept = None if kept is None or kept.shape[2] == 0 else kept.view(call.N, *kept.shape[2:])
        # Whether a pass may write over what it reads.
        self.passing = self.kept is None and call.operand == call.real

    def __call__(self, number: int, at: slice, x: Tensor, w: Tensor) -> Tensor:
        """x w"""
        if self.kept is None:
            y = self.call.hidden(("y0", "y2", "g", "y0", "y2")[number], at.stop - at.start)
        else:
            y = self.kept[:, number, at]
        if self.kept is None or not self.known:
            product(y, x, w)
        return y


class Learner:
    """Weights, and the sums that they took last, which go on from chunk to chunk."""

    def __init__(
        self,
        call: Call,
        keys: tuple[Tensor, Tensor],
        weights: list[Tensor],
        sums: list[Tensor],
        norms0: Sequence[Tensor | None],
        products: Products,
    ) -> None:
        self.call, (self.k, self.v), self.norms0, self.products = call, keys, norms0, products
        self.w, self.s = weights, sums
        self.operands = call.operands("w", weights)

    def learn(self, step: Step, w: list[Tensor], s: list[Tensor], norms: Sequence[Tensor | None]) -> None:
        """Go on to w and s, which may be those that there are."""
        call, (w0, w1, w2) = self.call, self.operands
        add = call.momentum is not None
        if add:
            for new, old in zip(s, self.s, strict=True):
                torch.mul(old, call.beta(step), out=new)
        for at in call.tiles(step):
            k, v = call.rows("k", self.k, at), call.rows("v", self.v, at)
            y0, y2, g = self.products(0, at, k, w0.mT), self.products(1, at, k, w2.mT), self.products(2, at, v, w1)
            out = (y0, y2, g) if self.products.passing else call.hiddens(("e0", "h", "e2"), at, call.operand)
            call.passes.learn(y0, y2, g, call.lr[:, at], *out)
            e0, h, e2 = out
            product(s[0], e0.mT, k, add)
            product(s[1], v.mT, h, add)
            product(s[2], e2.mT, k, add)
            add = True
        d = s
        if call.muon:
            d = [ops.newton_schulz(each.to(call.operand), call.coefficients).to(call.real) for each in s]
        copies = [None] * 3 if call.operand == call.real else self.operands
        for i in range(3):
            call.passes.renew(self.w[i], d[i], self.norms0[i], w[i], norms[i], copies[i])
        self.w, self.s = w, s
        if call.operand == call.real:
            self.operands = w


# ---- forward


class Forward:
    """The results are where the learner works; what the backward needs is copied or written beside."""

    def __init__(
        self,
        call: Call,
        tensors: Sequence[Tensor],
        weights: Sequence[Tensor],
        sums: Sequence[Tensor | None],
        training: bool,
    ) -> None:
        self.call, self.training = call, training
        self.q, k, v = tensors
        B, H, U = call.B, call.H, call.updates
        new, numbers = call.q.new_empty, 3 * call.F * call.D
        self.o = new(call.q.shape)
        self.states = [new(B, H, *shape, dtype=call.real) for shape in call.shapes * 2]
        products = None
        if training:
            slots, rows = call.slots, 2 * call.F + call.D
            self.weights = new(B, H, slots, numbers, dtype=call.real)
            self.sums = new(B, H, slots, numbers if call.keeps_sums else 0, dtype=call.real)
            self.norms = new(B, H, U, rows if call.weight_norm else 0, dtype=call.real)
            products = self.products = new(B, H, 5 if keeps_products(call.q) else 0, call.T, call.F, dtype=call.real)
        for state, given in zip(self.states, (*weights, *sums), strict=True):
            state.zero_() if given is None else state.copy_(given)
        flat = [state.view(call.N, *state.shape[2:]) for state in self.states]
        w, s = flat[:3], flat[3:]
        if call.momentum is None:  # what is given stays
            s = [call.buffer(f"s{i}", *each.shape) for i, each in enumerate(s)]
        norms0 = [torch.linalg.vector_norm(each, dim=-1) for each in w] if call.weight_norm else [None] * 3
        self.learner = Learner(call, (k, v), w, s, norms0, Products(call, products, False))
        self.at = 0

    def run(self) -> tuple[Tensor, ...]:
        call, learner = self.call, self.learner
        for step in call.steps:
            if not step.learns:
                self.apply(step)
                continue
            if self.training and self.at % call.span == 0:
                self.keep(self.at // call.span)
            learner.learn(step, learner.w, learner.s, self.norms_of(self.at))
            self.at += 1
        if not self.training:
            return (self.o, *self.states)
        self.keep(call.slots - 1)
        if call.T == 0:  # "full" counts one update
            self.keep(0)
            self.norms.zero_()
        learnt = max((step.stop for step in call.steps if step.learns), default=0)
        self.products[:, :, :3, learnt:].zero_()
        return (self.o, *self.states, self.weights, self.sums, self.norms, self.products)

    def keep(self, slot: int) -> None:
        call = self.call
        for kept, now in zip(call.matrices(self.weights, slot), self.learner.w, strict=True):
            kept.copy_(now)
        if not call.keeps_sums:
            return
        for kept, now in zip(call.matrices(self.sums, slot), self.learner.s, strict=True):
            kept.zero_() if self.at == 0 and call.momentum is None else kept.copy_(now)

    def norms_of(self, at: int) -> Sequence[Tensor | None]:
        call = self.call
        if not call.weight_norm:
            return [None] * 3
        if self.training:
            return call.matrices_norms(self.norms, at)
        return call.scratch_norms()

    def apply(self, step: Step) -> None:
        call, products, (w0, w1, w2) = self.call, self.learner.products, self.learner.operands
        for at in call.tiles(step):
            q, out = call.rows("q", self.q, at), call.output("o", self.o, at)
            y0, y2 = products(3, at, q, w0.mT), products(4, at, q, w2.mT)
            h = y0 if products.passing else call.hidden("h", at.stop - at.start, call.operand)
            call.passes.gate(y0, y2, h)
            product(out, h, w1.mT)
            call.deliver(out, self.o, at)


# ---- backward


class Backward:
    """Gradients by weights and momentum go from the last step to the first, and grow on their way."""

    def __init__(
        self,
        call: Call,
        grads: Sequence[Tensor | None],
        tensors: Sequence[Tensor],
        kept: Sequence[Tensor],
    ) -> None:
        self.call = call
        self.do, *states = grads
        self.q, self.k, self.v = tensors
        self.weights, self.sums, self.norms, products = (t.contiguous() for t in kept)
        self.products = Products(call, products, True)
        self.learning = [step for step in call.steps if step.learns]
        self.replayed = -1  # the span whose states are at hand
        N = call.N
        self.dq, self.dk, self.dv = (t.new_empty(t.shape) for t in tensors)
        self.dlr = torch.zeros_like(call.lr)
        self.dmomentum = None if call.momentum is None else torch.zeros_like(call.momentum)
        self.dw, self.ds = (
            [
                call.q.new_zeros(N, *shape, dtype=call.real)
                if d is None
                else d.to(call.real, copy=True).reshape(N, *shape).contiguous()
                for d, shape in zip(each, call.shapes, strict=True)
            ]
            for each in (states[:3], states[3:])
        )
        self.entry = call.matrices(self.weights, 0)
        self.norms0: list[Any] = [None] * 3
        if call.weight_norm:
            self.norms0 = [torch.linalg.vector_norm(w, dim=-1) for w in self.entry]
            self.dnorms0 = [torch.zeros_like(n) for n in self.norms0]

    def run(self) -> None:
        call = self.call
        at = len(self.learning)
        for step in reversed(call.steps):
            if step.learns:
                at -= 1
                self.update(step, at)
            else:
                self.apply(step, at)
        learnt = max((step.stop for step in call.steps if step.learns), default=0)
        for gradient in (self.dk[:, learnt:], self.dv[:, learnt:]):
            gradient.zero_()
        if self.do is None:
            self.dq.zero_()
        if call.weight_norm:  # |w| by w, which is 0 at 0
            for dw, w, n, dn in zip(self.dw, self.entry, self.norms0, self.dnorms0, strict=True):
                dw.addcmul_(w, torch.where(n == 0, 0, dn / n)[..., None])

    def state(self, at: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and sums after `at` updates: kept, or learnt again from those kept before."""
        call = self.call
        kept = at % call.span == 0 or at == len(self.learning)
        if not kept and self.replayed != at // call.span:
            self.replay(at // call.span)
        weights, sums = (self.weights, self.sums) if kept else self.between
        slot = -(-at // call.span) if kept else at % call.span - 1
        return call.matrices(weights, slot), call.matrices(sums, slot) if call.keeps_sums else []

    def replay(self, span: int) -> None:
        call = self.call
        shape = (call.B, call.H, call.span - 1, 3 * call.F * call.D)
        self.between = [call.buffer(name, *shape) for name in ("weights", "sums")]
        weights, sums = self.state(span * call.span)
        learner = Learner(call, (self.k, self.v), weights, sums, self.norms0, self.products)
        norms = call.scratch_norms() if call.weight_norm else [None] * 3
        for slot, step in enumerate(self.learning[span * call.span : (span + 1) * call.span - 1]):
            w, s = (call.matrices(state, slot) for state in self.between)
            learner.learn(step, w, s, norms)
        self.replayed = span

    def apply(self, step: Step, index: int) -> None:
        if self.do is None:
            return
        call = self.call
        w0, w1, w2 = call.operands("w", self.state(index)[0])
        for at in call.tiles(step):
            C = at.stop - at.start
            q, do, dq = call.rows("q", self.q, at), call.rows("do", self.do, at), call.output("dq", self.dq, at)
            y0, y2 = self.products(3, at, q, w0.mT), self.products(4, at, q, w2.mT)
            dh = call.hidden("p1", C)
            product(dh, do, w1)
            dy0, dy2, h = call.over(("dy0", "dy2", "h"), (dh, call.hidden("p0", C), call.hidden("p2", C)), C)
            call.passes.gate_backward(y0, y2, dh, dy0, dy2, h)
            product(dq, dy0, w0)
            product(dq, dy2, w2, True)
            call.deliver(dq, self.dq, at)
            product(self.dw[0], dy0.mT, q, True)
            product(self.dw[1], do.mT, h, True)
            product(self.dw[2], dy2.mT, q, True)

    def update(self, step: Step, index: int) -> None:
        call = self.call
        gradients = self.steps(step, index)  # by d0, d1, d2
        w0, w1, w2 = call.operands("w", self.state(index)[0])
        g0, g1, g2 = call.operands("d", gradients)
        if gradients is self.dw and call.operand == call.real:  # to which is added below
            copies = [call.buffer(f"d{i}", *g.shape) for i, g in enumerate(gradients)]
            g0, g1, g2 = (copy.copy_(g) for copy, g in zip(copies, gradients, strict=True))
        for at in call.tiles(step):
            C = at.stop - at.start
            k, v = call.rows("k", self.k, at), call.rows("v", self.v, at)
            dk, dv = call.output("dk", self.dk, at), call.output("dv", self.dv, at)
            y0, y2 = self.products(0, at, k, w0.mT), self.products(1, at, k, w2.mT)
            g = self.products(2, at, v, w1)
            p0, p1, p2 = (call.hidden(name, C) for name in ("p0", "p1", "p2"))
            product(p0, k, g0.mT)
            product(p1, v, g1)
            product(p2, k, g2.mT)
            dy0, dy2, dg = call.over(("dy0", "dy2", "dg"), (p0, p1, p2), C)
            e0, h, e2 = (call.hidden(name, C, call.operand) for name in ("e0", "h", "e2"))
            out = (dy0, dy2, dg, e0, h, e2, self.dlr[:, at])
            call.passes.learn_backward(y0, y2, g, call.lr[:, at], p0, p1, p2, *out)
            product(dk, dy0, w0)
            product(dk, dy2, w2, True)
            product(dk, e0, g0, True)
            product(dk, e2, g2, True)
            call.deliver(dk, self.dk, at)
            product(dv, dg, w1.mT)
            product(dv, h, g1.mT, True)
            call.deliver(dv, self.dv, at)
            product(self.dw[0], dy0.mT, k, True)
            product(self.dw[1], v.mT, dg, True)
            product(self.dw[2], dy2.mT, k, True)
        if call.momentum is not None:
            for ds in self.ds:
                ds.mul_(call.beta(step))

    def steps(self, step: Step, index: int) -> list[Tensor]:
        """`dw` back through norms; through Newton-Schulz and momentum to the gradients by d0, d1, d2."""
        call = self.call
        weights, sums = self.state(index + 1)
        if call.weight_norm:
            norms = call.matrices_norms(self.norms, index)
            for i in range(3):
                call.passes.renew_backward(self.dw[i], weights[i], self.norms0[i], norms[i], self.dnorms0[i])
        gradients = self.dw
        if call.muon:
            gradients = [
                ops.newton_schulz_backward(dw.to(call.operand), d.to(call.operand), call.coefficients).to(call.real)
                for dw, d in zip(self.dw, sums, strict=True)
            ]
        if call.momentum is None:
            return gradients
        before = self.state(index)[1]
        dbeta = torch.zeros_like(call.momentum[:, 0])
        for ds, gradient, s in zip(self.ds, gradients, before, strict=True):
            ds.add_(gradient)
            dbeta += (ds * s).sum((1, 2))
        self.dmomentum[:, step.start : step.stop] = (dbeta / (step.stop - step.start))[:, None]
        return self.ds


# ---- the operators


# `passes` are those of the backend; all other arguments are as in op_large_chunk_ttt.py.


def fast_weights(
    passes: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    m0: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    call = Call(passes, q, w0, lr, momentum, chunk_size, **options)
    return Forward(call, (q, k, v), (w0, w1, w2), (m0, m1, m2), False).run()


def fast_weights_forward(
    passes: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    m0: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    call = Call(passes, q, w0, lr, momentum, chunk_size, **options)
    return Forward(call, (q, k, v), (w0, w1, w2), (m0, m1, m2), True).run()


def fast_weights_backward(
    passes: Any,
    grad_o: Tensor | None,
    dw0: Tensor | None,
    dw1: Tensor | None,
    dw2: Tensor | None,
    dm0: Tensor | None,
    dm1: Tensor | None,
    dm2: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    momentum: Tensor | None,
    m0: Tensor | None,
    m1: Tensor | None,
    m2: Tensor | None,
    weights: Tensor,
    sums: Tensor,
    norms: Tensor,
    products: Tensor,
    chunk_size: int,
    **options: Any,
) -> tuple[Tensor, ...]:
    call = Call(passes, q, w0, lr, momentum, chunk_size, **options)
    grads, kept = (grad_o, dw0, dw1, dw2, dm0, dm1, dm2), (weights, sums, norms, products)
    backward = Backward(call, grads, (q, k, v), kept)
    backward.run()

    def by_token(gradient: Tensor | None, like: Tensor | None) -> Tensor:
        if like is None:
            return q.new_empty(0, dtype=call.real)
        return gradient.unflatten(0, (call.B, call.H)).transpose(1, 2).to(like.dtype).contiguous()

    def by_weight(gradient: Tensor, like: Tensor | None) -> Tensor:
        return q.new_empty(0, dtype=call.real) if like is None else gradient.view(like.shape).to(like.dtype)

    return (
        *(backward.dq, backward.dk, backward.dv),
        *map(by_weight, backward.dw, (w0, w1, w2)),
        by_token(backward.dlr, lr),
        by_token(backward.dmomentum, momentum),
        *map(by_weight, backward.ds, (m0, m1, m2)),
    )
