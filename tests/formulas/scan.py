"""Modules composed of scans."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.formulas import Case, jitter


def aaren(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Attention of the learned query to the keys of all steps so far, one step after another."""
    B, T, D = x.shape
    H = module.num_heads
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
    H = module.num_heads
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


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def normed_heads(o: Tensor, module: torch.nn.Module) -> Tensor:
    """o [..., H, V] -> y [..., D]."""
    return ((o / torch.sqrt((o * o).mean(-1, keepdim=True) + 1e-5)).flatten(-2) * module.norm) @ module.out.weight.T


def plstm_1d(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Transitions are multiplied as they are, signs included."""
    B, T, D = x.shape
    H = module.num_heads
    K = D // H
    S, out = torch.zeros(B, H, K, K, dtype=x.dtype), []
    for t in range(T):
        q, k, v = (part.reshape(B, H, K) for part in linear(module.input, x[:, t]).split(D, -1))
        tau, s, m, d = linear(module.gates, x[:, t]).split(H, -1)
        tau, s, m, d = torch.tanh(5 * tau), sigmoid(s), sigmoid(m), sigmoid(d)
        incoming = torch.einsum("bhk,bhkv->bhv", q, S) * m[..., None]
        out.append((incoming + (d * (q * k).sum(-1))[..., None] * v) / K**0.5)
        S = tau[..., None, None] * S + s[..., None, None] * k[..., :, None] * v[..., None, :]
    return normed_heads(torch.stack(out, 1), module)


def plstm_2d(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Node after node of four flipped grids, the state of each edge a matrix."""
    B, X, Y, D = x.shape
    H = module.num_heads
    K = D // H
    total: dict[tuple[int, int], Tensor] = {}
    for flip in range(4):
        columns = range(X - 1, -1, -1) if flip % 2 else range(X)
        rows = range(Y - 1, -1, -1) if flip // 2 else range(Y)
        right: dict[tuple[int, int], Tensor] = {}
        down: dict[tuple[int, int], Tensor] = {}
        none = torch.zeros(B, H, K, K, dtype=x.dtype)
        for i in columns:
            for j in rows:
                node = x[:, i, j]
                q, k, v = (part.reshape(B, H, K) for part in linear(module.input, node).split(D, -1))
                gates = linear(module.gates, node).reshape(B, 4, -1, H)[:, flip, :, :, None, None].unbind(1)
                if module.mode == "P":
                    weight, bias = (
                        p.reshape(4, H, -1)[flip] for p in (module.orientation.weight, module.orientation.bias)
                    )
                    p = sigmoid(0.5 * node @ weight.T / D + bias[:, 0])[..., None, None]
                    tau, s, m = torch.relu(torch.tanh(5 * gates[0])), sigmoid(gates[1]), sigmoid(gates[2])
                    t_rl = t_ru = p * tau
                    t_dl = t_du = 1 - p * tau
                    s_r, s_d, m_l, m_u = p * s, 1 - p * s, m, m
                else:
                    t_rl, t_du, t_ru = (torch.tanh(5 * gate) for gate in gates[:3])
                    t_dl = 0.0
                    s_r, s_d, m_l, m_u = (sigmoid(gate) for gate in gates[3:])
                left = right.get((i + 1 if flip % 2 else i - 1, j), none)
                up = down.get((i, j + 1 if flip // 2 else j - 1), none)
                own = k[..., :, None] * v[..., None, :]
                right[i, j] = t_rl * left + t_ru * up + s_r * own
                down[i, j] = t_dl * left + t_du * up + s_d * own
                o = torch.einsum("bhk,bhkv->bhv", q, m_l * left + m_u * up)
                if flip == 0:
                    o = o + (sigmoid(linear(module.direct, node)) * (q * k).sum(-1))[..., None] * v
                total[i, j] = total.get((i, j), 0) + o / K**0.5
    grid = torch.stack([torch.stack([total[i, j] for j in range(Y)], 1) for i in range(X)], 1)
    return normed_heads(grid, module)


def signs(module: torch.nn.Module) -> None:
    """Transitions of both signs, and gates far enough open to matter."""
    jitter(module, 0.5)
    for name, parameter in module.named_parameters():
        if name.endswith("gates.bias"):
            parameter.mul_(0.2)


def grid(X: int, Y: int) -> Callable[[], tuple[Tensor]]:
    return lambda: (torch.randn(2, X, Y, 8, dtype=torch.float64),)


CASES = [
    Case("Aaren", {"dim": 8, "num_heads": 2}, aaren, prepare=jitter),
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
    Case("RGLRU", {"dim": 8, "num_heads": 2}, rg_lru, prepare=jitter),
    Case("RGLRU", {"dim": 8}, rg_lru, draw=documents, note="documents", cuts=(), in16=False, prepare=jitter),
    Case("GriffinBlock", {"dim": 8, "width": 12, "num_heads": 3}, griffin, prepare=jitter),
    Case("HGRN", {"dim": 8, "num_layers": 4, "layer": 2}, hgrn, prepare=jitter),
    Case("HGRN", {"dim": 8}, hgrn, note="no bound", compiled=False, in16=False),
    Case("HGRN", {"dim": 8, "num_layers": 3, "layer": 2}, hgrn, note="last layer", compiled=False, in16=False),
    Case("Birdie", {"dim": 8}, birdie, note="causal"),
    Case("Birdie", {"dim": 8, "state_size": 6}, birdie, draw=questions, note="prefixes", cuts=()),
    Case("Birdie", {"dim": 8}, birdie, draw=packed_questions, note="documents", cuts=(), in16=False),
    Case("PLSTM1d", {"dim": 8, "num_heads": 2}, plstm_1d, prepare=signs),
    Case("PLSTM1d", {"dim": 8}, plstm_1d, note="as it starts", compiled=False, in16=False),
    Case("PLSTM2d", {"dim": 8, "num_heads": 2}, plstm_2d, draw=grid(3, 4), cuts=(), prepare=signs),
    Case("PLSTM2d", {"dim": 8, "mode": "D"}, plstm_2d, draw=grid(5, 3), note="D", cuts=(), prepare=signs),
    Case(
        "PLSTM2d",
        {"dim": 8, "num_heads": 4, "mode": "P"},
        plstm_2d,
        draw=grid(3, 3),
        note="P over values",
        cuts=(),
        prepare=signs,
    ),
    Case(
        "PLSTM2d",
        {"dim": 8, "num_heads": 4, "mode": "D"},
        plstm_2d,
        draw=grid(2, 5),
        note="D over values",
        cuts=(),
        prepare=signs,
        compiled=False,
        in16=False,
    ),
]
