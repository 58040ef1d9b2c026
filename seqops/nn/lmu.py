"""LMU and LMUFormer: a memory that keeps the last stretch of a signal in Legendre polynomials."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..conv import fft_conv
from . import dense, ssm
from .parts import append, check_positive, check_sequence, check_state, expect, keep_last, wide
from .streaming import Streaming


class LMU(Streaming):
    """A Legendre memory unit whose states do not write to the memory, so that a sequence is one convolution.

        u_t = ReLU(w x_t + e)    m_t = Ā m_{t-1} + B̄ u_t    y_t = ReLU(W [m_t; x_t] + b)

    Ā and B̄ are constants: the zero-order hold of the delay of length theta, in float64 whatever the module's dtype.

    Args:
        dim: channels D of x.
        hidden: channels of y.
        state_size: N, polynomials.
        theta: steps that the memory spans.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, hidden] and the state, a tuple of m [B, N], float32 at least.

    Linear maps start as torch.nn.Linear's. theta < T is legal: what is older fades. The memory never needs its matrix
    diagonalised, whose eigenvectors have condition numbers up to 4e14.

    Cost: O(N T log T) for the memory, and O(N² T) for the response to a state; a step O(N²). Memory: m [B, T, N].

    Raises:
        ValueError: for sizes below 1, theta not above 0, or x of another shape.

    Chilkuri and Eliasmith, "Parallelizing Legendre Memory Unit training", 2021.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        state_size: int = 256,
        theta: float = 128.0,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, hidden=hidden, state_size=state_size)
        expect(theta > 0, self, "theta", "a number above 0", theta)
        self.dim, self.hidden, self.state_size, self.theta = dim, hidden, state_size, theta
        self.write = torch.nn.Linear(dim, 1, device=device, dtype=dtype)
        self.read = torch.nn.Linear(state_size + dim, hidden, device=device, dtype=dtype)
        A, b = ssm.hold(*ssm.lmu(state_size, theta))
        # As integers, which `module.bfloat16()` leaves alone: rounded, the memory would drift.
        bits = torch.cat([A, b[:, None]], 1).view(torch.int64).to(device)
        self.register_buffer("system_bits", bits, persistent=False)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.hidden}, state_size={self.state_size}, theta={self.theta}"

    def system(self) -> tuple[Tensor, Tensor]:
        """Ā [N, N] and B̄ [N], float64."""
        joined = self.system_bits.view(torch.float64)
        return joined[:, :-1], joined[:, -1]

    def written(self, x: Tensor) -> Tensor:
        return wide(torch.relu(self.write(x)))

    def output(self, m: Tensor, x: Tensor) -> Tensor:
        return torch.relu(self.read(torch.cat([m.to(x.dtype), x], -1)))

    def forward(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        check_sequence(self, x, self.dim)
        check_state(self, state, (x.shape[0], self.state_size))
        u, (A, b) = self.written(x), self.system()
        m = fft_conv(u, dense.applied(A, b, x.shape[1]).mT[None].to(u.dtype))[:, :, 0]
        start = u.new_zeros(x.shape[0], self.state_size)
        if state is not None:
            start = state[0]
            m = m + dense.applied(A, start.double() @ A.mT, x.shape[1]).to(m.dtype)
        return self.output(m, x), (keep_last(append(start[:, None], m), 1)[:, 0],)

    def step(self, x: Tensor, state: tuple[Tensor] | None = None) -> tuple[Tensor, tuple[Tensor]]:
        """x [B, D] and the state before it -> y [B, hidden] and the state after it, by the recurrence."""
        check_sequence(self, x[:, None], self.dim)
        check_state(self, state, (x.shape[0], self.state_size))
        u, (A, b) = self.written(x), self.system()
        m = u.double() * b if state is None else state[0].double() @ A.mT + u.double() * b
        m = m.to(u.dtype)
        return self.output(m, x), (m,)


class LMUFormer(Streaming):
    """A stem of causal convolutions, then blocks of an LMU and a perceptron: a transformer's shape without attention.

        stem    x <- ReLU(norm(conv₃(x))), twice, the first from D to dim channels
        block   x <- x + norm(W LMU(x))    x <- x + norm(W₂ ReLU(norm(W₁ x)))

    conv₃ is causal and three steps wide, norm a BatchNorm, W, W₁ and W₂ linear maps of one step (convolutions of
    width 1).

    Args:
        channels: channels D of x.
        dim: channels of the blocks and of y.
        state_size, theta: of the LMUs.
        num_blocks: how many.
        ratio: hidden channels of the perceptron, as a multiple of dim.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, dim] and the state, a tuple: for each convolution of the stem the last two inputs [B, 2, ·],
    then for each block the LMU's state.

    Published sizes are dim = state_size = 256, theta = 128 and one block. The stem's depth and its activation are ours,
    the spiking variant is left out. In training, batch norms see whole pieces: only in evaluation do pieces give what
    the whole gives.

    Cost: that of LMU, and 2 (1 + ratio) dim² products a step and block. Memory: activations.

    Raises:
        ValueError: for sizes below 1, theta not above 0, or x of another shape.

    Liu et al., "LMUFormer: low complexity yet powerful spiking model with Legendre memory units", 2024.
    """

    def __init__(
        self,
        channels: int,
        dim: int = 256,
        state_size: int = 256,
        theta: float = 128.0,
        num_blocks: int = 1,
        ratio: int = 4,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, channels=channels, dim=dim, state_size=state_size, num_blocks=num_blocks, ratio=ratio)
        expect(theta > 0, self, "theta", "a number above 0", theta)
        self.channels, self.dim = channels, dim
        made = {"device": device, "dtype": dtype}

        def mapped(inputs: int, outputs: int, width: int = 1) -> torch.nn.ModuleDict:
            convolution = torch.nn.Conv1d(inputs, outputs, width, bias=False, **made)
            return torch.nn.ModuleDict({"map": convolution, "norm": torch.nn.BatchNorm1d(outputs, **made)})

        self.stem = torch.nn.ModuleList(mapped(inputs, dim, 3) for inputs in (channels, dim))
        self.memories = torch.nn.ModuleList(LMU(dim, dim, state_size, theta, **made) for _ in range(num_blocks))
        self.mixes = torch.nn.ModuleList(mapped(dim, dim) for _ in range(num_blocks))
        self.widen = torch.nn.ModuleList(mapped(dim, ratio * dim) for _ in range(num_blocks))
        self.narrow = torch.nn.ModuleList(mapped(ratio * dim, dim) for _ in range(num_blocks))

    def extra_repr(self) -> str:
        return f"{self.channels}, dim={self.dim}"

    def forward(self, x: Tensor, state: tuple[Any, ...] | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        check_sequence(self, x, self.channels)
        if state is not None:
            check_state(self, state[:2], *((x.shape[0], 2, width) for width in (self.channels, self.dim)))
        before = (None,) * (2 + len(self.memories)) if state is None else state
        after = []
        for part, cache in zip(self.stem, before[:2], strict=True):
            cache = x.new_zeros(x.shape[0], 2, x.shape[2]) if cache is None else cache
            joined = append(cache, x)
            after.append(keep_last(joined, 2))
            x = torch.relu(convolved(part, joined))
        layers = zip(self.memories, self.mixes, self.widen, self.narrow, before[2:], strict=True)
        for memory, mix, widen, narrow, past in layers:
            y, last = memory(x, past)
            after.append(last)
            x = x + convolved(mix, y)
            x = x + convolved(narrow, torch.relu(convolved(widen, x)))
        return x, tuple(after)


def convolved(part: torch.nn.ModuleDict, x: Tensor) -> Tensor:
    """x [B, T + W - 1, D] through a convolution of width W and its norm: [B, T, outputs]."""
    weight = part["map"].weight
    W = weight.shape[2]
    windows = torch.cat([x[:, j : x.shape[1] - W + 1 + j] for j in range(W)], -1)
    y = functional.linear(windows, weight.mT.flatten(1))
    return part["norm"](y.flatten(0, 1)).unflatten(0, y.shape[:2])
