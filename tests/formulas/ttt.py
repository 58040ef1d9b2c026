"""Layers that learn in their forward, token by token; the inner gradients come from autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import Case, jitter

MUON = (3.4445, -4.7750, 2.0315)


# ---- pieces


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def heads_of(x: Tensor, heads: int) -> Tensor:
    B, T, D = x.shape
    return x.reshape(B, T, heads, D // heads)


def of_length_one(x: Tensor) -> Tensor:
    return x / (x * x).sum(-1, keepdim=True).sqrt()


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + eps).sqrt()


def linear(layer: torch.nn.Linear, x: Tensor) -> Tensor:
    y = torch.einsum("...i,oi->...o", x, layer.weight)
    return y if layer.bias is None else y + layer.bias


def convolved(x: Tensor, taps: Tensor | None) -> Tensor:
    """sum_j taps[:, W-1-j] x_{t-j}"""
    if taps is None:
        return x
    W, rows = taps.shape[1], []
    for t in range(x.shape[1]):
        rows.append(sum(taps[:, W - 1 - j] * x[:, t - j] for j in range(min(W, t + 1))))
    return torch.stack(rows, 1)


def orthogonal(x: Tensor) -> Tensor:
    """Five steps of Muon's iteration."""
    a, b, c = MUON
    x = x / ((x * x).sum((-2, -1), keepdim=True).sqrt() + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + b * square @ x + c * square @ square @ x
    return x


def slopes(loss: Callable[[list[Tensor]], Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
    """Of a loss by weights, themselves differentiable; keys and values that come of the same weights stay constant."""
    with torch.enable_grad():
        taken = [w + 0 if w.requires_grad else w.detach().requires_grad_() for w in weights]
        return [*torch.autograd.grad(loss(taken), taken, create_graph=True)]


def turned(x: Tensor, start: int = 0, base: float = 10000.0, period: int = 0) -> Tensor:
    """Rotary positions of x [B, T, H, D] as complex numbers."""
    T, half = x.shape[1], x.shape[-1] // 2
    t = torch.arange(start, start + T, dtype=torch.float64)
    t = t % period if period else t
    angle = t[:, None] * base ** (-torch.arange(half, dtype=torch.float64) / half)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.cat([z.real, z.imag], -1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [B, T, H, D], k, v [B, S, H, D], seen [T, S]."""
    score = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weight = torch.where(seen, score, -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weight, v)


def window_mask(T: int, window: int) -> Tensor:
    t = torch.arange(T)
    return (t[:, None] >= t) & (t[:, None] - t < window)


# ---- NeuralMemory


def answer(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """f(x) of x [B, H, D]."""
    y = torch.einsum("bhij,bhj->bhi", weights[0], x)
    return x + torch.einsum("bhij,bhj->bhi", weights[1], silu(y)) if len(weights) == 2 else y


def memory_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor,
    momentum: Tensor | None,
    weights: Sequence[Tensor],
    sums: Sequence[Tensor] | None,
    chunk: int,
    loss: str,
    window: int,
    optimizer: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Token by token: each step of the weights is formed."""
    now, outputs = [*weights], []
    S = [torch.zeros_like(w) for w in now] if sums is None else [*sums]
    for t in range(q.shape[1]):
        if t % chunk == 0:
            first, recent = now, []
            learnt, left = [torch.zeros_like(w) for w in now], torch.ones_like(lr[:, 0, :, None, None])

        def token_loss(at: list[Tensor], t: int = t) -> Tensor:
            said = answer(at, k[:, t])
            return -(said * v[:, t]).sum() if loss == "dot" else (said - v[:, t]).square().sum() / 2

        recent.append([lr[:, t, :, None, None] * slope for slope in slopes(token_loss, first)])
        keep = 1 - decay[:, t, :, None, None]
        again = 0 if momentum is None else momentum[:, t, :, None, None]
        S = [again * s - sum(step[i] for step in recent[-window:]) for i, s in enumerate(S)]
        learnt, left = [keep * old + s for old, s in zip(learnt, S, strict=True)], keep * left
        if optimizer == "muon":
            at_end = (t + 1) % chunk == 0
            steps = [orthogonal(each) if at_end else torch.zeros_like(each) for each in learnt]
        else:
            steps = learnt
        now = [left * w + step for w, step in zip(first, steps, strict=True)]
        outputs.append(answer(now, q[:, t]))
    return torch.stack(outputs, 1), now, S


def memory_inputs(module: Any, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    H, C = module.num_heads, module.chunk_size
    joined = silu(convolved(linear(module.qkv, x), module.taps))
    parts = joined.split(module.dim, -1)
    power = getattr(module, "coefficients", None)
    if power is not None:
        parts = [sum(a * p ** (i + 1) for i, a in enumerate(power)) for p in parts[:2]] + [parts[2]]
    gates = 1 / (1 + torch.exp(-linear(module.gates, x)))
    lr, decay = gates[..., :H], gates[..., H : 2 * H]
    momentum = gates[..., 2 * H :] if module.momentum else None
    lr = lr * module.rate / (C * module.window)
    lr = lr * (1 - momentum) if module.momentum else lr
    return [of_length_one(heads_of(p, H)) for p in parts], [lr, decay, momentum]


def memory_output(module: Any, o: Tensor, x: Tensor) -> Tensor:
    o = (rms(o) * module.scale).reshape(x.shape)
    return linear(module.out, o * silu(linear(module.gate, x)))


def neural_memory(module: Any, x: Tensor) -> Tensor:
    tokens, gates = memory_inputs(module, x)
    weights = [w.expand(x.shape[0], *w.shape) for w in module.memory]
    o, _, _ = memory_loop(*tokens, *gates, weights, None, module.chunk_size, **module.rule)
    return memory_output(module, o, x)


# ---- LaCT


def lact(module: Any, x: Tensor) -> Tensor:
    B, T, D = x.shape
    H, N, C = module.num_heads, module.num_fast_heads, module.chunk_size
    q, k, v = linear(module.qkv, x).split(D, -1)
    near = masked_attention(
        turned(heads_of(q, H)), turned(heads_of(k, H)), heads_of(v, H), window_mask(T, module.window)
    ).reshape(B, T, D)

    def fast(z: Tensor, which: int) -> Tensor:
        z = heads_of(silu(z * module.scale[which] + module.offset[which]), N)
        z = z / ((z * z).sum(-1, keepdim=True).sqrt() + 1e-5)
        return heads_of(turned(heads_of(z.reshape(B, T, D), H)).reshape(B, T, D), N)

    q, k, v = fast(q, 0), fast(k, 1), heads_of(silu(v), N)
    rates = torch.log(1 + torch.exp(linear(module.rates, x))).reshape(B, T, N, 3)
    w = [each.expand(B, *each.shape) for each in module.fast]
    lengths = [each.norm(dim=-1, keepdim=True) for each in w]
    S, outputs = [torch.zeros_like(each) for each in w], []

    def f(w: list[Tensor], z: Tensor) -> Tensor:
        a, b = (torch.einsum("bhij,bthj->bthi", each, z) for each in (w[0], w[2]))
        return torch.einsum("bhij,bthj->bthi", w[1], silu(a) * b)

    for start in range(0, T, C):
        at = slice(start, start + C)
        outputs.append(f(w, q[:, at]))
        if start + C > T:
            continue
        # the rate belongs to a token and a matrix: the gradient of each matrix is that of a loss with its rates
        d = []
        for i in range(3):

            def loss(z: list[Tensor], i: int = i, at: slice = at) -> Tensor:
                return (rates[:, at, :, i, None] * f(z, k[:, at]) * v[:, at]).sum()

            d.append(slopes(loss, w)[i])
        if module.momentum:
            held = (1 / (1 + torch.exp(-linear(module.held, x[:, at])))).mean(1)[..., None, None]
            S = d = [held * s + new for s, new in zip(S, d, strict=True)]
        if module.rule["optimizer"] == "muon":
            d = [orthogonal(each) for each in d]
        w = [a + b for a, b in zip(w, d, strict=True)]
        w = [each * length / each.norm(dim=-1, keepdim=True) for each, length in zip(w, lengths, strict=True)]
    o = rms(torch.cat(outputs, 1)) * module.norm * silu(linear(module.mix, x))[..., None]
    return linear(module.out, near + o.reshape(B, T, D))


# ---- Titans


def window_with_persistent(module: Any, x: Tensor) -> Tensor:
    """Dense attention to [persistent, x] under a mask."""
    part, T = module.attention, x.shape[1]
    P = part.persistent.shape[0]
    q, k, v = (heads_of(each, part.num_heads) for each in linear(part.qkv, x).chunk(3, -1))
    _, kp, vp = (heads_of(each, part.num_heads) for each in linear(part.qkv, part.persistent[None]).chunk(3, -1))
    keys = torch.cat([kp.expand(x.shape[0], *kp.shape[1:]), turned(k)], 1)
    values = torch.cat([vp.expand(x.shape[0], *vp.shape[1:]), v], 1)
    seen = torch.cat([torch.ones(T, P, dtype=torch.bool), window_mask(T, module.span)], 1)
    return masked_attention(turned(q), keys, values, seen).reshape(x.shape)


def gated(module: Any, y: Tensor, m: Tensor) -> Tensor:
    return linear(module.out, rms(y) * module.scale[0] / (1 + torch.exp(-rms(m) * module.scale[1])))


def titans_mag(module: Any, x: Tensor) -> Tensor:
    return gated(module, window_with_persistent(module, x), neural_memory(module.memory, x))


def titans_mal(module: Any, x: Tensor) -> Tensor:
    return linear(module.out, window_with_persistent(module, neural_memory(module.memory, x)))


def titans_mac(module: Any, x: Tensor) -> Tensor:
    B, T, D = x.shape
    memory, part, C = module.memory, module.attention, module.segment
    weights, sums, outputs = [w.expand(B, *w.shape) for w in memory.memory], None, []
    _, kp, vp = (heads_of(each, part.num_heads) for each in linear(part.qkv, part.persistent[None]).chunk(3, -1))
    for start in range(0, T, C):
        piece = x[:, start : start + C]
        n = piece.shape[1]
        asked = memory_inputs(memory, piece)[0][0]
        h = torch.stack([answer(weights, asked[:, t]) for t in range(n)], 1)
        h = (rms(h) * memory.scale).reshape(B, n, D)
        q, k, v = (heads_of(each, part.num_heads) for each in linear(part.qkv, piece).chunk(3, -1))
        _, kh, vh = (heads_of(each, part.num_heads) for each in linear(part.qkv, h).chunk(3, -1))
        keys = torch.cat([kp.expand(B, *kp.shape[1:]), turned(kh), turned(k)], 1)
        values = torch.cat([vp.expand(B, *vp.shape[1:]), vh, v], 1)
        causal = torch.ones(n, n).tril().bool()
        seen = torch.cat([torch.ones(n, kp.shape[1], dtype=torch.bool), causal, causal], 1)
        y = linear(module.attended, masked_attention(turned(q), keys, values, seen).reshape(B, n, D))
        tokens, gates = memory_inputs(memory, y)
        o, weights, sums = memory_loop(*tokens, *gates, weights, sums, C, **memory.rule)
        outputs.append(gated(module, y, memory_output(memory, o, y)))
    return torch.cat(outputs, 1)


# ---- TTT


def layer_norm(x: Tensor) -> Tensor:
    x = x - x.mean(-1, keepdim=True)
    return x / ((x * x).mean(-1, keepdim=True) + 1e-6).sqrt()


def gelu(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def ttt(module: Any, x: Tensor) -> Tensor:
    """Token by token, each with weights of its own."""
    B, _, D = x.shape
    H, C = module.num_heads, module.chunk_size
    q, k, v = (heads_of(part, H) for part in linear(module.qkv, x).chunk(3, -1))
    lr = module.rate / (1 + torch.exp(-linear(module.rates, x)))
    if not module.norm:
        q, k, v = of_length_one(q), of_length_one(k), of_length_one(v)
    q, k = turned(q, period=C), turned(k, period=C)
    if not module.norm:
        weights = [w.expand(B, *w.shape) for w in module.weights]
        target = v - k if len(weights) == 1 else v
        nothing = torch.zeros_like(lr)
        o, _, _ = memory_loop(q, k, target, lr / C, nothing, None, weights, None, C, "l2", 1, "gd")
        o = q + o if len(weights) == 1 else o
    else:
        o = ttt_loop(module, q, k, v, lr / (D // H))
    o = layer_norm(o.reshape(x.shape)) * module.post.weight + module.post.bias
    return linear(module.out, o)


def ttt_loop(module: Any, q: Tensor, k: Tensor, v: Tensor, lr: Tensor) -> Tensor:
    def z(w: list[Tensor], x: Tensor) -> Tensor:
        y = torch.einsum("bhij,bhj->bhi", w[0], x) + w[1][:, :, 0]
        return y if len(w) == 2 else torch.einsum("bhij,bhj->bhi", w[2], gelu(y)) + w[3][:, :, 0]

    def norm(y: Tensor) -> Tensor:
        return layer_norm(y) * module.norm_weight[:, 0] + module.norm_bias[:, 0]

    first = [part for pair in zip(module.weights, module.biases, strict=True) for part in pair]
    now, outputs = [part.expand(q.shape[0], *part.shape) for part in first], []
    for t in range(q.shape[1]):
        at = t % module.chunk_size
        if at == 0:
            first, total = now, [torch.zeros_like(w) for w in now]
        slope = slopes(lambda w, t=t: (norm(z(w, k[:, t])) - (v[:, t] - k[:, t])).square().sum() / 2, first)
        total = [old + lr[:, t, :, None, None] * new for old, new in zip(total, slope, strict=True)]
        rho = torch.relu(1 / (at + 1) + module.shares[at])
        now = [w - rho * step for w, step in zip(first, total, strict=True)]
        outputs.append(q[:, t] + norm(z(now, q[:, t])))
    return torch.stack(outputs, 1)


# 14 tokens in chunks of 4: twice as many, and four times, end with a chunk; the last chunk here is open
SIZE = {"dim": 8, "num_heads": 2, "chunk_size": 4}
LACT = {"dim": 8, "num_heads": 2, "chunk_size": 4}
TITANS = {"dim": 8, "num_heads": 2, "persistent": 3, "num_memory_heads": 2}
TTT = {"dim": 8, "num_heads": 2, "chunk_size": 4}

CASES = [
    Case("NeuralMemory", SIZE, neural_memory, (2, 14, 8), prepare=jitter),
    Case("NeuralMemory", {**SIZE, "hidden": 6, "loss": "dot", "kernel": 1}, neural_memory, (2, 14, 8), note="mlp dot"),
    Case(
        "NeuralMemory",
        {**SIZE, "hidden": 5, "window": 3, "momentum": False, "rate": 1.5},
        neural_memory,
        (2, 14, 8),
        note="mlp window",
        compiled=False,
    ),
    # Newton-Schulz turns what is small against the rest into something of size 1, and its rounding with it
    Case("NeuralMemory", {**SIZE, "optimizer": "muon"}, neural_memory, (2, 14, 8), note="muon", bound16=0.08),
    # the same of LaCT's steps
    Case("LaCT", {**LACT, "num_fast_heads": 2}, lact, (2, 14, 8), prepare=jitter, bound16=0.08),
    Case(
        "LaCT",
        {**LACT, "expand": 2, "optimizer": "gd", "momentum": False, "window": 6},
        lact,
        (2, 14, 8),
        note="gd",
        prepare=jitter,
        compiled=False,
    ),
    Case("TitansMAC", {**TITANS, "segment": 4, "hidden": 5}, titans_mac, (2, 14, 8), prepare=jitter),
    Case(
        "TitansMAC",
        {**TITANS, "segment": 7, "num_memory_heads": 1, "momentum": False},
        titans_mac,
        (2, 14, 8),
        note="linear",
        prepare=jitter,
        compiled=False,
    ),
    Case("TitansMAG", {**TITANS, "window": 5, "chunk_size": 4}, titans_mag, (2, 14, 8), prepare=jitter),
    Case(
        "TitansMAL",
        {**TITANS, "window": 5, "chunk_size": 4, "hidden": 6, "kernel": 1},
        titans_mal,
        (2, 14, 8),
        prepare=jitter,
    ),
    Case("TTTLinear", TTT, ttt, (2, 14, 8), prepare=jitter),
    Case("TTTLinear", {**TTT, "norm": False}, ttt, (2, 14, 8), note="plain", compiled=False),
    Case("TTTMLP", {**TTT, "expand": 2, "rate": 0.5}, ttt, (2, 14, 8), prepare=jitter),
    Case("TTTMLP", {**TTT, "expand": 2, "norm": False}, ttt, (2, 14, 8), note="plain", compiled=False),
    Case("OmegaNet", {**SIZE, "window": 3}, neural_memory, (2, 14, 8), prepare=jitter),
    Case(
        "OmegaNet",
        {**SIZE, "degree": 3, "hidden": 5},
        neural_memory,
        (2, 14, 8),
        note="mlp",
        prepare=jitter,
        compiled=False,
    ),
    Case("Atlas", {**SIZE, "hidden": 6}, neural_memory, (2, 14, 8), bound16=0.08),
    Case(
        "Atlas",
        {**SIZE, "chunk_size": 1, "num_heads": 1},
        neural_memory,
        (1, 7, 8),
        note="every token",
        compiled=False,
    ),
]
