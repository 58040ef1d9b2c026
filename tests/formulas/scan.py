"""Modules composed of scans."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.formulas import Case, jitter


def aaren(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Attention of the learned query to the keys of all steps so far, one step after another."""
    B, T, D = x.shape
    H = module.heads
    keys = (x @ module.keys.weight.T).reshape(B, T, H, D // H)
    values = (x @ module.values.weight.T + (0 if module.values.bias is None else module.values.bias)).reshape(
        B, T, H, D // H
    )
    out = []
    for t in range(T):
        s = (keys[:, : t + 1] * module.query).sum(-1) / (D // H) ** 0.5  # [B, t + 1, H]
        out.append((torch.softmax(s, 1)[..., None] * values[:, : t + 1]).sum(1).reshape(B, D))
    y = torch.stack(out, 1) @ module.out.weight.T
    return y if module.out.bias is None else y + module.out.bias


def g(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x + 0.5, 1 / (1 + torch.exp(-x)))


def linear(module: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, torch.nn.Identity):
        return x
    y = x @ module.weight.T
    return y if module.bias is None else y + module.bias


def min_gru(module: torch.nn.Module, x: Tensor) -> Tensor:
    N = module.width
    h, out = torch.zeros(x.shape[0], N, dtype=x.dtype), []
    for t in range(x.shape[1]):
        p = linear(module.input, x[:, t])
        z = torch.sigmoid(p[:, N:])
        h = (1 - z) * h + z * g(p[:, :N])
        out.append(linear(module.out, h))
    return torch.stack(out, 1)


def min_lstm(module: torch.nn.Module, x: Tensor) -> Tensor:
    N = module.width
    h, out = torch.zeros(x.shape[0], N, dtype=x.dtype), []
    for t in range(x.shape[1]):
        p = linear(module.input, x[:, t])
        f, i = torch.sigmoid(p[:, N : 2 * N]), torch.sigmoid(p[:, 2 * N :])
        h = f / (f + i) * h + i / (f + i) * g(p[:, :N])
        out.append(linear(module.out, h))
    return torch.stack(out, 1)


def lru(module: torch.nn.Module, x: Tensor) -> Tensor:
    modulus, angle = torch.exp(-torch.exp(module.nu)), torch.exp(module.theta)
    eigenvalue = torch.complex(modulus * torch.cos(angle), modulus * torch.sin(angle))
    B, C = (torch.complex(p[..., 0], p[..., 1]) for p in (module.B, module.C))
    h, out = torch.zeros(x.shape[0], module.state_size, dtype=torch.complex128), []
    for t in range(x.shape[1]):
        u = x[:, t]
        h = eigenvalue * h + torch.exp(module.gamma) * (u.to(B.dtype) @ B.T)
        out.append((h @ C.T).real + module.skip * u)
    return torch.stack(out, 1)


def rg_lru(module: torch.nn.Module, x: Tensor, _: None = None, starts: Tensor | None = None) -> Tensor:
    B, T, D = x.shape
    H = module.heads
    h, out = torch.zeros(B, D, dtype=x.dtype), []
    for t in range(T):
        gates = []
        for each in range(2):
            blocks = []
            for i, part in enumerate(x[:, t].chunk(H, -1)):
                blocks.append(part @ module.weight[each, i] + module.bias[each, i])
            gates.append(1 / (1 + torch.exp(-torch.cat(blocks, -1))))
        a = torch.exp(-8 * torch.log(1 + torch.exp(module.decay)) * gates[0])
        h_on, h_new = a * h + torch.sqrt(1 - a * a) * gates[1] * x[:, t], gates[1] * x[:, t]
        anew = torch.full((B, 1), t == 0) if starts is None else starts[:, t, None] | (t == 0)
        h = torch.where(anew, h_new, h_on)
        out.append(h)
    return torch.stack(out, 1)


def griffin(module: torch.nn.Module, x: Tensor) -> Tensor:
    u = linear(module.input, x)
    W = module.taps
    padded = torch.cat([torch.zeros(x.shape[0], W - 1, module.width, dtype=x.dtype), u], 1)
    mixed = [(padded[:, t : t + W] * module.weight.T).sum(1) + module.bias for t in range(x.shape[1])]
    recurrence = rg_lru(module.recurrence, torch.stack(mixed, 1))
    gate = linear(module.gate, x)
    gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
    return linear(module.out, gelu * recurrence)


def hgrn(module: torch.nn.Module, x: Tensor) -> Tensor:
    B, T, D = x.shape
    weights = torch.exp(module.bounds) / torch.exp(module.bounds).sum(0)
    bound = torch.cumsum(weights, 0)[module.layer] - weights[0]
    h, out = torch.zeros(B, D, dtype=x.dtype), []
    for t in range(T):
        i, f, gate = (x[:, t] @ module.input.weight.T).split(D, -1)
        f = bound + (1 - bound) / (1 + torch.exp(-f))
        h = f * h + (1 - f) * i / (1 + torch.exp(-i))
        normed = h / torch.sqrt((h * h).mean(-1, keepdim=True) + 1e-6) * module.norm
        out.append((normed * gate / (1 + torch.exp(-gate))) @ module.out.weight.T)
    return torch.stack(out, 1)


def birdie(module: torch.nn.Module, n: Tensor, _: None = None, prefix: object = 0, starts: object = None) -> Tensor:
    """Row after row; the backward half of a token is an explicit sum over the later tokens of its prefix."""
    half = module.state_size // 2
    u, i, a, gate = linear(module.input, n).split(2 * half, -1)
    a, gate = 1 / (1 + torch.exp(-a)), 1 / (1 + torch.exp(-gate))
    x = u / (1 + torch.exp(-i)) * (1 - a)
    rows = []
    for b in range(n.shape[0]):
        T = n.shape[1]
        if isinstance(prefix, Tensor) and prefix.dtype == torch.bool:
            inside = [bool(m) for m in prefix[b]]
        else:
            inside = [t < (int(prefix[b]) if isinstance(prefix, Tensor) else prefix) for t in range(T)]
        document = [0 if starts is None else int(starts[b, : t + 1].sum()) for t in range(T)]
        out = []
        for t in range(T):
            ahead, weight = torch.zeros(half, dtype=n.dtype), torch.ones(half, dtype=n.dtype)
            for past in range(t, -1, -1):
                if document[past] == document[t]:
                    ahead = ahead + weight * x[b, past, :half]
                    weight = weight * a[b, past, :half]
            back, weight = x[b, t, half:], a[b, t, half:]
            for later in range(t + 1, T):
                if not (inside[t] and all(inside[t : later + 1]) and document[later] == document[t]):
                    break
                back = back + weight * x[b, later, half:]
                weight = weight * a[b, later, half:]
            out.append(torch.cat([ahead, back]) * gate[b, t])
        rows.append(linear(module.out, torch.stack(out)))
    return torch.stack(rows)


def documents() -> tuple[Tensor, None, Tensor]:
    starts = torch.zeros(2, 11, dtype=torch.bool)
    starts[0, 4] = starts[1, 1] = starts[1, 2] = starts[1, 9] = True
    return torch.randn(2, 11, 8, dtype=torch.float64), None, starts


def questions() -> tuple[Tensor, None, Tensor]:
    return torch.randn(4, 9, 8, dtype=torch.float64), None, torch.tensor([0, 1, 5, 9])


def packed_questions() -> tuple[Tensor, None, Tensor, Tensor]:
    """Documents of 5, 1 and 6 tokens whose prefixes have 3, 1 and 6; of 12 without one, two starts inside."""
    prefix, starts = torch.zeros(2, 12, dtype=torch.bool), torch.zeros(2, 12, dtype=torch.bool)
    prefix[0, :3] = prefix[0, 5:] = True
    starts[0, 0] = starts[0, 5] = starts[0, 6] = starts[1, 0] = starts[1, 7] = True
    return torch.randn(2, 12, 8, dtype=torch.float64), None, prefix, starts


CASES = [
    Case("Aaren", {"dim": 8, "heads": 2}, aaren, prepare=jitter),
    Case(
        "Aaren",
        {"dim": 8, "bias": False},
        aaren,
        note="one head",
        prepare=lambda m: jitter(m, 1.0),
        compiled=False,
        in16=False,
    ),
    Case("MinGRU", {"dim": 8}, min_gru),
    Case("MinGRU", {"dim": 8, "expansion": 2, "bias": False}, min_gru, note="expanded", in16=False),
    Case("MinLSTM", {"dim": 8, "expansion": 2}, min_lstm),
    Case(
        "MinLSTM",
        {"dim": 8, "forget_bias": 2.0},
        min_lstm,
        note="forget bias",
        prepare=lambda m: jitter(m, 1.0),
        compiled=False,
        in16=False,
    ),
    Case("LRU", {"dim": 8, "state_size": 6, "r_min": 0.3, "r_max": 0.95}, lru),
    Case("LRU", {"dim": 8}, lru, note="whole disc", prepare=lambda m: jitter(m, 0.1), compiled=False, in16=False),
    Case("RGLRU", {"dim": 8, "heads": 2}, rg_lru, prepare=jitter),
    Case("RGLRU", {"dim": 8}, rg_lru, draw=documents, note="documents", cuts=(), in16=False, prepare=jitter),
    Case("GriffinBlock", {"dim": 8, "width": 12, "heads": 3}, griffin, prepare=jitter),
    Case("HGRN", {"dim": 8, "layers": 4, "layer": 2}, hgrn, prepare=jitter),
    Case("HGRN", {"dim": 8}, hgrn, note="no bound", compiled=False, in16=False),
    Case("HGRN", {"dim": 8, "layers": 3, "layer": 2}, hgrn, note="last layer", compiled=False, in16=False),
    Case("Birdie", {"dim": 8}, birdie, note="causal"),
    Case("Birdie", {"dim": 8, "state_size": 6}, birdie, draw=questions, note="prefixes", cuts=()),
    Case("Birdie", {"dim": 8}, birdie, draw=packed_questions, note="documents", cuts=(), in16=False),
]
