"""Mamba-2, GLA, RetNet, LightNet, prefix linear attention: sums over all pairs of positions, or loops over states."""

import math

import torch
from torch import Tensor

from tests.formulas import Case, jitter


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.pow(2).sum(-1, keepdim=True) / x.shape[-1] + eps).sqrt()


def heads(x: Tensor, count: int) -> Tensor:
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count)


def mamba2(module, x: Tensor) -> Tensor:
    """Every pair of positions, with the product of the decays between them."""
    B, T, _ = x.shape
    H, G, N = module.num_heads, module.num_groups, module.state_size
    C, W = module.taps.shape
    inner = C - 2 * G * N
    projected = x @ module.project.weight.T
    z, mixed, step = projected[..., :inner], projected[..., inner : inner + C], projected[..., inner + C :]
    rows = []
    for t in range(T):
        row = module.taps_bias.expand(B, C)
        for back in range(min(W, t + 1)):
            row = row + module.taps[:, W - 1 - back] * mixed[:, t - back]
        rows.append(silu(row))
    mixed = torch.stack(rows, 1)
    u, keys, queries = mixed[..., :inner], mixed[..., inner : inner + G * N], mixed[..., inner + G * N :]
    step = torch.log1p(torch.exp(step + module.step_bias))
    decay = torch.exp(-torch.exp(module.log_rate) * step * module.decay_scale)
    u = heads(u, H)
    outputs = []
    for t in range(T):
        total = module.skip[:, None] * u[:, t]
        passed = torch.ones(B, H, dtype=x.dtype)
        for s in range(t, -1 if module.window is None else max(t - module.window, -1), -1):
            key, query = keys[:, s].reshape(B, G, N), queries[:, t].reshape(B, G, N)
            score = torch.stack([(key[:, h * G // H] * query[:, h * G // H]).sum(-1) for h in range(H)], 1)
            weight = score * passed * step[:, s] * module.insert_scale
            total = total + weight[..., None] * u[:, s]
            passed = passed * decay[:, s]
        outputs.append(total.reshape(B, inner))
    o = torch.stack(outputs, 1)
    return (normed(o * silu(z)) * module.norm) @ module.out.weight.T


def gla(module, x: Tensor) -> Tensor:
    H = module.num_heads
    q, k, v = (heads(x @ linear.weight.T, H) for linear in (module.query, module.key, module.value))
    logit = (x @ module.decay[0].weight.T) @ module.decay[1].weight.T + module.decay[1].bias
    alpha = heads(sigmoid(logit) ** (1 / module.temperature), H)
    state = torch.zeros(x.shape[0], H, q.shape[-1], v.shape[-1], dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        state = alpha[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((q[:, t, :, :, None] * state).sum(2) / math.sqrt(q.shape[-1]))
    o = (normed(torch.stack(outputs, 1)) * module.norm).flatten(2)
    return (o * silu(x @ module.gate.weight.T)) @ module.out.weight.T


def retnet(module, x: Tensor) -> Tensor:
    """The parallel form, with rotations as products of complex numbers."""
    H, T = module.num_heads, x.shape[1]
    q, k, v = (heads(x @ linear.weight.T, H) for linear in (module.query, module.key, module.value))
    half = q.shape[-1] // 2
    frequency = torch.tensor([module.base ** (-2 * i / (2 * half)) for i in range(half)], dtype=x.dtype)
    outputs = []
    for t in range(T):
        total = 0.0
        for s in range(t + 1):
            turn = torch.polar(torch.ones_like(frequency), (t - s) * frequency)
            one = torch.complex(q[:, t, :, :half], q[:, t, :, half:])
            other = torch.complex(k[:, s, :, :half], k[:, s, :, half:])
            score = (one * turn * other.conj()).real.sum(-1) / math.sqrt(2 * half)
            decay = torch.tensor([(1 - 2.0 ** (-5 - h)) ** (t - s) for h in range(H)], dtype=x.dtype)
            total = total + (score * decay)[..., None] * v[:, s]
        outputs.append(total)
    o = normed(torch.stack(outputs, 1)).flatten(2)
    return (o * silu(x @ module.gate.weight.T)) @ module.out.weight.T


def gated(module, x: Tensor, o: Tensor) -> Tensor:
    gate = silu((x @ module.gate[0].weight.T) @ module.gate[1].weight.T)
    return (normed(o) * module.norm * gate) @ module.out.weight.T


def lightnet(module, x: Tensor) -> Tensor:
    """A softmax over the steps so far, computed anew at every step."""
    H = module.num_heads
    q, score = heads(silu(x @ module.query.weight.T), H), heads(x @ module.key.weight.T, H)
    v = heads(x @ module.value.weight.T, H)
    outputs = []
    for t in range(x.shape[1]):
        weights = torch.softmax(score[:, : t + 1], 1)
        averages = torch.einsum("bshk,bshv->bhkv", weights, v[:, : t + 1])
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], averages) / math.sqrt(q.shape[-1]))
    return gated(module, x, torch.stack(outputs, 1).flatten(2))


def lightnet_grid(module, x: Tensor) -> Tensor:
    """Every pair of positions: the cosine of the difference of their angles between query and key."""
    grid, H, K = x.shape[1:-1], module.num_heads, module.key_size
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    q, score = heads(silu(flat @ module.query.weight.T), H), heads(flat @ module.key.weight.T, H)
    v = heads(flat @ module.value.weight.T, H)
    weights = score.exp() / score.exp().sum(1, keepdim=True)
    places = torch.cartesian_prod(*(torch.arange(n) for n in grid)).reshape(-1, len(grid))
    part = K // module.axes
    outputs = []
    for i in range(len(places)):
        total = 0.0
        for j in range(len(places)):
            apart = [
                math.cos(float(places[i, c // part] - places[j, c // part]) * module.base ** (-(c % part) / part))
                for c in range(K)
            ]
            similar = (q[:, i] * weights[:, j] * torch.tensor(apart, dtype=x.dtype)).sum(-1) / math.sqrt(2 * K)
            total = total + similar[..., None] * v[:, j]
        outputs.append(total.flatten(1))
    return gated(module, flat, torch.stack(outputs, 1)).reshape(x.shape)


def prefix_linear_attention(module, x: Tensor, state: None = None, prefix: int = 0) -> Tensor:
    """Pairs of positions weighted by 1 + s + s²/2; those of the prompt count again, by projections of their own."""
    H, K = module.num_heads, module.feature_size
    q, k, v = (heads(x @ linear.weight.T, H) for linear in (module.query, module.key, module.value))
    own_k, own_v = (heads(x @ linear.weight.T, H) for linear in (module.prefix_key, module.prefix_value))
    outputs = []
    for t in range(x.shape[1]):
        pairs = [(k[:, s], v[:, s]) for s in range(t + 1)] + [(own_k[:, s], own_v[:, s]) for s in range(prefix)]
        above, below = 0.0, 0.0
        for key, value in pairs:
            score = (q[:, t] * key).sum(-1, keepdim=True) / math.sqrt(K)
            weight = 1 + score + score**2 / 2
            above, below = above + weight * value, below + weight
        outputs.append((above / below).flatten(1))
    return torch.stack(outputs, 1) @ module.out.weight.T


def away_from_start(module: torch.nn.Module) -> None:
    """Norms that differ, and decays that fade within the sequence."""
    jitter(module, 0.2)


def fast_decays(module: torch.nn.Module) -> None:
    """Steps as wide as some a trained model takes: the first ones forget nearly nothing within a test."""
    jitter(module, 0.2)
    module.step_bias.add_(3.0)


def grid(*sizes: int):
    def draw() -> tuple[Tensor]:
        return (torch.randn(2, *sizes, 8, dtype=torch.float64),)

    return draw


def prompted(prefix: int):
    def draw() -> tuple[Tensor, None, int]:
        return torch.randn(2, 13, 8, dtype=torch.float64), None, prefix

    return draw


SMALL = {"dim": 8, "state_size": 4, "head_size": 4}
SIZES = {"dim": 8, "num_heads": 2, "key_size": 6, "rank": 3}

CASES = [
    Case("Mamba2", SMALL, mamba2, prepare=fast_decays),
    Case("Mamba2", {**SMALL, "window": 5}, mamba2, prepare=fast_decays, note="window"),
    Case(
        "Mamba2",
        {**SMALL, "num_groups": 2, "kernel_size": 1, "window": 1, "decay_scale": 1.5, "insert_scale": 0.5},
        mamba2,
        prepare=fast_decays,
        note="groups, window of one, scales",
        shape=(1, 7, 8),
        cuts=(3,),
        compiled=False,
        in16=False,
    ),
    Case("GLA", {"dim": 8, "num_heads": 2, "rank": 3, "temperature": 2.0}, gla, prepare=away_from_start),
    Case("RetNet", {"dim": 8, "num_heads": 2}, retnet),
    Case(
        "RetNet",
        {"dim": 12, "num_heads": 3, "value_dim": 6, "base": 100.0},
        retnet,
        note="narrow values",
        shape=(1, 9, 12),
        compiled=False,
        in16=False,
    ),
    Case("LightNet", SIZES, lightnet, prepare=away_from_start),
    Case("LightNetGrid", SIZES, lightnet_grid, prepare=away_from_start, draw=grid(3, 4), cuts=()),
    Case(
        "LightNetGrid",
        {**SIZES, "axes": 3},
        lightnet_grid,
        prepare=away_from_start,
        draw=grid(2, 1, 3),
        cuts=(),
        note="three axes",
        compiled=False,
        in16=False,
    ),
    Case(
        "PrefixLinearAttention",
        {"dim": 8, "num_heads": 2, "feature_size": 4},
        prefix_linear_attention,
        draw=prompted(5),
        cuts=(),
        note="prompt",
    ),
    Case(
        "PrefixLinearAttention",
        {"dim": 8, "num_heads": 2, "feature_size": 4},
        prefix_linear_attention,
        note="without a prompt",
        in16=False,
    ),
]
