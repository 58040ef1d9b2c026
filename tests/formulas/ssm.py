"""State-space models, step by step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.formulas import Case, jitter


def gated(linear: torch.nn.Linear, y: Tensor) -> Tensor:
    """GELU, a linear map to twice the width, half of it times the sigmoid of the other half."""
    exact = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    first, second = (exact @ linear.weight.T + linear.bias).chunk(2, -1)
    return first / (1 + torch.exp(-second))


def s4d(module: torch.nn.Module, x: Tensor) -> Tensor:
    step = module.log_step.exp()[:, None]
    eigenvalues = torch.complex(-module.log_decay.exp(), module.frequency)
    keep, enter = torch.exp(step * eigenvalues), (torch.exp(step * eigenvalues) - 1) / eigenvalues
    c = module.c[..., 0] + 1j * module.c[..., 1]

    def read(u: Tensor, c: Tensor) -> Tensor:
        h, rows = u.new_zeros(*u[:, 0].shape, keep.shape[1]) + 0j, []
        for t in range(u.shape[1]):
            h = keep * h + enter * u[:, t, :, None]
            rows.append(2 * (c * h).sum(-1).real)
        return torch.stack(rows, 1)

    y = read(x, c[0]) + module.skip * x
    if module.bidirectional:
        later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
        y = y + read(later.flip(1), c[1]).flip(1)
    return gated(module.mix, y)


def s5_modes(module: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """What a step keeps of a state, and by how much an input enters."""
    step = module.log_step.exp()
    eigenvalues = torch.complex(-1e-4 - module.log_decay.exp(), module.frequency)
    return torch.exp(step * eigenvalues), (torch.exp(step * eigenvalues) - 1) / eigenvalues


def s5(module: torch.nn.Module, x: Tensor) -> Tensor:
    keep, enter = s5_modes(module)
    b, c = (p[..., 0] + 1j * p[..., 1] for p in (module.b, module.c))

    def read(u: Tensor, c: Tensor) -> Tensor:
        h, rows = torch.zeros(u.shape[0], keep.shape[0], dtype=torch.complex128), []
        for t in range(u.shape[1]):
            h = keep * h + enter * ((u[:, t] + 0j) @ b.T)
            rows.append(2 * (h @ c.T).real)
        return torch.stack(rows, 1)

    y = read(x, c[0]) + module.skip * x
    if module.bidirectional:
        y = y + read(x.flip(1), c[1]).flip(1)
    y = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    return y / (1 + torch.exp(-(y @ module.gate.weight.T + module.gate.bias)))


def conv_s5(module: torch.nn.Module, x: Tensor) -> Tensor:
    keep, enter = s5_modes(module)
    b, c = (p[..., 0] + 1j * p[..., 1] for p in (module.b, module.c))
    half = module.kernel_size // 2

    def convolve(frame: Tensor, kernel: Tensor) -> Tensor:
        """frame [B, Y, X, U], kernel [k, k, U, P]: tap by tap."""
        wide = torch.nn.functional.pad(frame, (0, 0, half, half, half, half))
        Y, X = frame.shape[1:3]
        taps = ((i, j) for i in range(2 * half + 1) for j in range(2 * half + 1))
        return sum(wide[:, i : i + Y, j : j + X] @ kernel[i, j] for i, j in taps)

    def normalised(y: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
        centred = y - y.mean(dims, keepdim=True)
        return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()

    h, frames = 0, []
    for t in range(x.shape[1]):
        h = keep * h + enter * convolve(x[:, t] + 0j, b)
        y = more = 2 * convolve(h, c).real
        for norm, convolution in zip(module.norms, module.convolutions, strict=True):
            groups = normalised(more.unflatten(-1, (norm.num_groups, -1)), (1, 2, 4), norm.eps).flatten(3)
            groups = groups * norm.weight + norm.bias
            active = groups / 2 * (1 + torch.erf(groups / math.sqrt(2)))
            more = convolve(active, convolution.weight.permute(2, 3, 1, 0)) + convolution.bias
        joined = normalised(x[:, t] + y + more, (3,), module.norm.eps)
        frames.append(joined * module.norm.weight + module.norm.bias)
    return torch.stack(frames, 1)


def averages(module: torch.nn.Module, x: Tensor) -> Tensor:
    """MegaEMA."""
    p, damping = 1 / (1 + torch.exp(-module.delta)), 1 / (1 + torch.exp(-module.alpha))

    def read(u: Tensor, way: int) -> Tensor:
        h, rows = 0, []
        for t in range(u.shape[1]):
            h = (1 - p[way] * damping[way]) * h + p[way] * module.beta[way] * u[:, t, :, None]
            rows.append((module.gamma[way] * h).sum(-1) / math.sqrt(module.state_size))
        return torch.stack(rows, 1)

    y = read(x, 0) + module.omega * x
    if module.bidirectional:
        y = y + read(x.flip(1), 1).flip(1)
    return y / (1 + torch.exp(-y))


def bilinear_loop(A: Tensor, b: Tensor, c: Tensor, step: Tensor, x: Tensor) -> Tensor:
    """y [B, T] of one channel x [B, T]: (I - ΔA/2) h_t = (I + ΔA/2) h_{t-1} + Δ b x_t, y_t = c h_t."""
    one = torch.eye(A.shape[0], dtype=A.dtype)
    backward, forward = torch.linalg.inv(one - step * A / 2), one + step * A / 2
    h, rows = torch.zeros(x.shape[0], A.shape[0], dtype=A.dtype), []
    for t in range(x.shape[1]):
        h = (h @ forward.T + step * b * x[:, t, None]) @ backward.T
        rows.append(h @ c)
    return torch.stack(rows, 1)


def s4(module: torch.nn.Module, x: Tensor) -> Tensor:
    """Every pair of conjugates written out, A = diag(λ) - P P*."""
    eigenvalues = torch.complex(-module.log_decay.exp(), module.frequency)
    p, b, c = (t[..., 0] + 1j * t[..., 1] for t in (module.p, module.b, module.c))
    eigenvalues, p, b, c = (torch.cat([t, t.conj()], -1) for t in (eigenvalues, p, b, c))

    def read(u: Tensor, c: Tensor) -> Tensor:
        columns = [
            bilinear_loop(
                torch.diag(eigenvalues[d]) - torch.outer(p[d], p[d].conj()),
                b[d],
                c[d],
                module.log_step[d].exp(),
                u[..., d],
            )
            for d in range(u.shape[-1])
        ]
        return torch.stack(columns, -1).real

    y = read(x, c[0]) + module.skip * x
    if module.bidirectional:
        later = torch.cat([x[:, 1:], torch.zeros_like(x[:, :1])], 1)
        y = y + read(later.flip(1), c[1]).flip(1)
    return gated(module.mix, y)


def lssl(module: torch.nn.Module, x: Tensor) -> Tensor:
    columns = [
        bilinear_loop(module.a, module.b, module.c[d], module.log_step[d].exp(), x[..., d]) for d in range(x.shape[-1])
    ]
    y = torch.stack(columns, -1) + module.skip * x
    y = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    return y @ module.mix.weight.T + module.mix.bias


def lmu(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The matrices entry by entry, their hold as the exponential's power series after halving, m step by step."""
    N, theta = module.state_size, module.theta
    A = torch.zeros(N, N, dtype=torch.float64)
    for i in range(N):
        for j in range(N):
            A[i, j] = (2 * i + 1) / theta * (-1.0 if i < j else (-1.0) ** (i - j + 1))
    b = torch.tensor([(2 * i + 1) * (-1.0) ** i / theta for i in range(N)], dtype=torch.float64)
    one, halvings = torch.eye(N, dtype=torch.float64), 12
    small, term = A / 2**halvings, torch.eye(N, dtype=torch.float64)
    keep = one.clone()
    for n in range(1, 18):
        term = term @ small / n
        keep = keep + term
    for _ in range(halvings):
        keep = keep @ keep
    enter = torch.linalg.solve(A, (keep - one) @ b)
    m, rows = torch.zeros(x.shape[0], N, dtype=torch.float64), []
    for t in range(x.shape[1]):
        u = (x[:, t] @ module.write.weight.T + module.write.bias).clamp(min=0)
        m = m @ keep.T + u * enter
        rows.append((torch.cat([m, x[:, t]], -1) @ module.read.weight.T + module.read.bias).clamp(min=0))
    return torch.stack(rows, 1)


def lmu_former(module: torch.nn.Module, x: Tensor) -> Tensor:
    def normed(norm: torch.nn.Module, y: Tensor) -> Tensor:
        return (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias

    def mapped(part: torch.nn.ModuleDict, y: Tensor) -> Tensor:
        return normed(part["norm"], y @ part["map"].weight[..., 0].T)

    for part in module.stem:
        taps = part["map"].weight
        past = torch.cat([torch.zeros_like(x[:, :2]), x], 1)
        y = sum(past[:, j : j + x.shape[1]] @ taps[..., j].T for j in range(3))
        x = normed(part["norm"], y).clamp(min=0)
    for i, memory in enumerate(module.memories):
        x = x + mapped(module.mixes[i], lmu(memory, x))
        x = x + mapped(module.narrow[i], mapped(module.widen[i], x).clamp(min=0))
    return x


def move_norms(module: torch.nn.Module) -> None:
    """Running statistics that are not 0 and 1; memories that something is written to."""
    for memory in module.memories:
        memory.write.bias.fill_(0.5)
    for each in module.modules():
        if isinstance(each, torch.nn.BatchNorm1d):
            each.running_mean.normal_(std=0.3)
            each.running_var.uniform_(0.5, 2)
            each.bias.normal_(std=0.3)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def dilated(module: torch.nn.Module, x: Tensor) -> Tensor:
    """The convolutions of TCNCA, tap by tap."""
    layers, _, width = module.weight.shape
    for i in range(layers):
        steps = []
        for t in range(x.shape[1]):
            z = module.bias[i].expand(x.shape[0], -1)
            for j in range(width):
                before = t - j * module.factor**i
                if before >= 0:
                    z = z + module.weight[i, :, width - 1 - j] * x[:, before]
            steps.append(silu(z))
        x = x + torch.stack(steps, 1)
    return x


def gated_chunks(module: torch.nn.Module, x: Tensor) -> Tensor:
    """MegaAttention and TCNCA, query by query."""
    T, D = x.shape[1:]
    Z, V, C = module.key_dim, module.value_dim, module.chunk_size
    m = dilated(module.average, x) if hasattr(module.average, "factor") else averages(module.average, x)
    mapped = m @ module.gates.weight.T + module.gates.bias
    u, z, r, h = mapped[..., :D], mapped[..., D : D + Z], mapped[..., D + Z : D + Z + V], mapped[..., D + Z + V :]
    u, z, r = 1 / (1 + torch.exp(-u)), silu(z), silu(r)
    q, k = module.gamma[0] * z + module.beta[0], module.gamma[1] * z + module.beta[1]
    v = silu(x @ module.value.weight.T + module.value.bias)
    rows = []
    for t in range(T):
        start = t // C * C
        end = t + 1 if module.causal else min(start + C, T)
        products = (q[:, t, None] * k[:, start:end]).sum(-1)
        bias = torch.stack([module.bias[C - 1 + i - t] for i in range(start, end)])
        if module.activation == "softmax":
            p = torch.softmax(products / math.sqrt(Z) + bias, -1)
        else:
            scores = products / (end - start) + bias
            p = (1 + torch.erf((scores - math.sqrt(0.5)) * math.sqrt(2 * math.pi))) / 2
        rows.append((p[..., None] * v[:, start:end]).sum(1))
    o = torch.stack(rows, 1)
    return x + u * (silu(h + (r * o) @ module.out.weight.T + module.out.bias) - x)


CASES = [
    Case("S4D", {"dim": 6, "state_size": 8}, s4d, shape=(2, 13, 6)),
    Case("S4D", {"dim": 4, "state_size": 6, "init": "lin", "step_min": 1e-5}, s4d, shape=(2, 70, 4), note="lin",
         compiled=False, in16=False, steps=False),
    Case("S4D", {"dim": 5, "state_size": 4, "init": "inv", "bidirectional": True}, s4d, shape=(2, 11, 5),
         note="both ways", cuts=()),
    Case("S5", {"dim": 6, "state_size": 8}, s5, shape=(2, 13, 6)),
    Case("S5", {"dim": 4, "state_size": 12, "num_blocks": 3, "bidirectional": True}, s5, shape=(2, 11, 4), cuts=(),
         note="both ways"),
    Case("ConvS5", {"dim": 4, "state_size": 3, "norm_groups": 2}, conv_s5, shape=(2, 7, 4, 5, 4), cuts=(1, 5)),
    Case("ConvS5", {"dim": 3, "state_size": 2, "kernel_size": 1, "norm_groups": 1}, conv_s5, shape=(1, 9, 2, 3, 3),
         cuts=(4,), note="1x1", compiled=False, in16=False, prepare=jitter),
    Case("MegaEMA", {"dim": 6, "state_size": 4}, averages, shape=(2, 70, 6), cuts=(1, 30, 66), steps=False),
    Case("MegaEMA", {"dim": 5, "state_size": 3}, averages, shape=(2, 9, 5), note="short", compiled=False, in16=False),
    Case("MegaEMA", {"dim": 5, "state_size": 2, "bidirectional": True}, averages, shape=(2, 11, 5), cuts=(),
         note="both ways"),
    Case("S4", {"dim": 3, "state_size": 4}, s4, shape=(2, 12, 3)),
    Case("S4", {"dim": 2, "state_size": 6}, s4, shape=(1, 135, 2), cuts=(1, 70), note="odd and long", steps=False,
         compiled=False, in16=False),
    Case("S4", {"dim": 2, "state_size": 4, "bidirectional": True}, s4, shape=(2, 9, 2), note="both ways", cuts=()),
    Case("LSSL", {"dim": 3, "state_size": 4}, lssl, shape=(2, 13, 3)),
    Case("LSSL", {"dim": 2, "state_size": 3}, lssl, shape=(1, 150, 2), cuts=(1, 70), note="long", steps=False,
         compiled=False, in16=False),
    Case("LMU", {"dim": 5, "hidden": 7, "state_size": 6, "theta": 9.0}, lmu, shape=(2, 13, 5)),
    Case("LMU", {"dim": 3, "hidden": 4, "state_size": 4, "theta": 5.5}, lmu, shape=(1, 140, 3), cuts=(70,), note="long",
         steps=False, compiled=False, in16=False),
    Case("LMUFormer", {"channels": 3, "dim": 6, "state_size": 4, "theta": 6.0, "num_blocks": 2, "ratio": 2}, lmu_former,
         shape=(2, 11, 3), prepare=move_norms),
    Case("MegaAttention", {"dim": 6, "chunk_size": 4, "key_dim": 4, "value_dim": 8, "state_size": 2}, gated_chunks,
         shape=(2, 12, 6), prepare=jitter),
    Case("MegaAttention", {"dim": 5, "chunk_size": 4, "key_dim": 3, "activation": "laplace", "state_size": 2},
         gated_chunks, shape=(2, 14, 5), prepare=jitter, note="laplace", compiled=False),
    Case("MegaAttention", {"dim": 4, "chunk_size": 5, "key_dim": 4, "causal": False, "activation": "laplace"},
         gated_chunks, shape=(2, 13, 4), prepare=jitter, note="both ways", cuts=(), in16=False),
    Case("TCNCA", {"dim": 6, "chunk_size": 4, "key_dim": 4, "value_dim": 8, "width": 3, "factor": 2, "num_layers": 2},
         gated_chunks, shape=(2, 12, 6), prepare=jitter),
]  # fmt: skip
