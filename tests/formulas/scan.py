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
]
