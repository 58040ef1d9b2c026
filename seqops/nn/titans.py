"""Titans: attention to what is near, and a memory that learns what is far, joined in three ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import range_attention
from .memory import NeuralMemory, recall
from .parts import (
    append,
    check_multiple,
    check_positive,
    check_sequence,
    expect,
    keep_last,
    rms_norm,
    rotary,
    split_heads,
    wide,
    window_ranges,
)
from .streaming import State, Streaming


class PersistentAttention(nn.Module):
    """Attention whose queries also see `persistent` tokens that are parameters; rotary positions for all others."""

    def __init__(self, dim: int, num_heads: int, persistent: int, base: float, **options: Any) -> None:
        super().__init__()
        self.num_heads, self.base = num_heads, base
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **options)
        self.persistent = nn.Parameter(torch.randn(persistent, dim, **options) * 0.02)

    def project(self, x: Tensor, position: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, T, H, D] of x [B, T, D], whose first token has this position."""
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        return rotary(q, position, self.base), rotary(k, position, self.base), v

    def behind_persistent(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, S, H, D] behind those of the persistent tokens: [B, P + S, H, D]."""
        _, *fixed = (split_heads(part, self.num_heads) for part in self.qkv(self.persistent[None]).chunk(3, -1))
        return tuple(
            torch.cat([part.to(new.dtype).expand(new.shape[0], -1, -1, -1), new], 1)
            for part, new in zip(fixed, (k, v), strict=True)
        )

    def window(
        self, x: Tensor, cache: tuple[Tensor, Tensor], position: Tensor, left: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Each token sees itself, `left` before it and the persistent ones. Returns o [B, T, D] and the next cache."""
        q, *new = self.project(x, position)
        k, v = (append(old, part) for old, part in zip(cache, new, strict=True))
        keys, values = self.behind_persistent(k, v)
        near, P = window_ranges(x.shape[1], k.shape[1], left, x.device), self.persistent.shape[0]
        fixed = torch.zeros_like(near)
        fixed[..., 1, :] = P
        o, _ = range_attention(q, keys, values, torch.cat([fixed, near + P], 2))
        return o.flatten(2), (keep_last(k, left), keep_last(v, left))

    def nothing(self, x: Tensor) -> Tensor:
        """Keys or values before the first token of x [B, T, D]."""
        return split_heads(x[:, :0], self.num_heads).clone()


def gate(a: Tensor, m: Tensor, scale: Tensor) -> Tensor:
    return rms_norm(a, wide(scale[0])) * torch.sigmoid(rms_norm(m, wide(scale[1])))


class WindowAndMemory(Streaming):
    """What TitansMAG and TitansMAL are made of."""

    gated = False
    undecayed = ("scale",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        chunk_size: int = 16,
        hidden: int = 0,
        num_memory_heads: int = 1,
        persistent: int = 4,
        *,
        rate: float = 1.0,
        momentum: bool = True,
        kernel: int = 4,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads, window=window, persistent=persistent)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.span = dim, window
        options = {"device": device, "dtype": dtype}
        self.attention = PersistentAttention(dim, num_heads, persistent, base, **options)
        rule = {"rate": rate, "momentum": momentum, "kernel": kernel}
        self.memory = NeuralMemory(dim, num_memory_heads, chunk_size, hidden, **rule, **options)
        self.scale = nn.Parameter(torch.ones(2, dim, **options)) if self.gated else None
        self.out = nn.Linear(dim, dim, bias=False, **options)

    def start(self, x: Tensor) -> State:
        """The state before the first token of x [B, T, D]."""
        cache = self.attention.nothing(x), self.attention.nothing(x)
        return self.memory.start(x), cache, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)


class TitansMAG(WindowAndMemory):
    """Memory as a gate: attention to a window, times what a neural memory that reads the same tokens says.

        a = attention(x) to [persistent, the last `window` tokens];   m = NeuralMemory(x)
        y = W_o (rms_norm(a) * sigmoid(rms_norm(m)))

    Args:
        dim: D, channels of x and y.
        num_heads: of the attention.
        window: tokens that attention sees, its own included.
        chunk_size, hidden, num_memory_heads: of the memory, `seqops.nn.NeuralMemory`.
        persistent: tokens that are parameters and seen by all.
        rate, momentum, kernel: of the memory.
        base: of the rotary positions.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: the memory's, keys and values of the window, the position, int64 [B].

    Initially persistent tokens are normal (std 0.02), norms have weight 1; the memory starts as NeuralMemory.
    Persistent tokens are seen by the attention alone: what the memory would learn of them is in its initial weights.

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T: that of the memory and of attention to `window + persistent` tokens; so does memory.

    Behrouz et al., "Titans: learning to memorize at test time", 2024.
    """

    gated = True

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        memory, cache, position = self.start(x) if state is None else state
        a, cache = self.attention.window(x, cache, position, self.span - 1)
        m, memory = self.memory(x, memory)
        y = self.out(gate(a, m, self.scale))
        return y, (memory, cache, position + x.shape[1])


class TitansMAL(WindowAndMemory):
    """Memory as a layer: a neural memory, then attention to a window of what it says.

        m = NeuralMemory(x);   y = W_o attention(m) to [persistent, the last `window` tokens]

    Args:
        dim: D, channels of x and y.
        num_heads: of the attention.
        window: tokens that attention sees, its own included.
        chunk_size, hidden, num_memory_heads: of the memory, `seqops.nn.NeuralMemory`.
        persistent: tokens that are parameters and seen by all.
        rate, momentum, kernel: of the memory.
        base: of the rotary positions.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: the memory's, keys and values of the window, the position, int64 [B].

    Initially persistent tokens are normal (std 0.02); the memory starts as NeuralMemory. Persistent tokens are seen by
    the attention alone: what the memory would learn of them is in its initial weights.

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T: that of the memory and of attention to `window + persistent` tokens; so does memory.

    Behrouz et al., "Titans: learning to memorize at test time", 2024.
    """

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        memory, cache, position = self.start(x) if state is None else state
        m, memory = self.memory(x, memory)
        a, cache = self.attention.window(m, cache, position, self.span - 1)
        return self.out(a), (memory, cache, position + x.shape[1])


class TitansMAC(Streaming):
    """Memory as a context: each segment attends to itself and to what a neural memory recalls of all segments before.

        h = f(M; q(x)), by the memory's weights before the segment
        y_i = W_a attention(x_i) to [persistent, h_j, x_j for j <= i of the segment]
        m = NeuralMemory(y), which learns;   o = W_o (rms_norm(y) * sigmoid(rms_norm(m)))

    Args:
        dim: D, channels of x and y.
        num_heads: of the attention.
        segment: tokens that attend to one another; also the memory's chunk.
        hidden, num_memory_heads: of the memory, `seqops.nn.NeuralMemory`, here without a convolution.
        persistent: tokens that are parameters and seen by all.
        rate, momentum: of the memory.
        base: of the rotary positions, in which h_j has the place of x_j.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: the memory's, and keys and values of the open segment, of h and of x.

    Initially persistent tokens are normal (std 0.02), norms have weight 1; the memory starts as NeuralMemory. Of h a
    token sees what it and those before it have asked for: all of the segment's would show it what follows.

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T, a segment after another: that of the memory and of attention to twice a segment; so does memory.

    Behrouz et al., "Titans: learning to memorize at test time", 2024.
    """

    undecayed = ("scale",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        segment: int,
        hidden: int = 0,
        num_memory_heads: int = 1,
        persistent: int = 4,
        *,
        rate: float = 1.0,
        momentum: bool = True,
        base: float = 10000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads, segment=segment, persistent=persistent)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.segment = dim, segment
        options = {"device": device, "dtype": dtype}
        self.attention = PersistentAttention(dim, num_heads, persistent, base, **options)
        self.attended = nn.Linear(dim, dim, bias=False, **options)
        rule = {"rate": rate, "momentum": momentum, "kernel": 1}
        self.memory = NeuralMemory(dim, num_memory_heads, segment, hidden, **rule, **options)
        self.scale = nn.Parameter(torch.ones(2, dim, **options))
        self.out = nn.Linear(dim, dim, bias=False, **options)

    def start(self, x: Tensor) -> State:
        """The state before the first token of x [B, T, D]."""
        return self.memory.start(x), tuple(self.attention.nothing(x) for _ in range(4))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        memory, opened = self.start(x) if state is None else state
        expect(len(opened[0]) == len(x), self, "state", f"B = {len(x)} rows", len(opened[0]))
        outputs, at = [], 0
        while at < x.shape[1] or not outputs:
            piece = x[:, at : at + self.segment - opened[0].shape[1]]
            y, memory, opened = self.within(piece, memory, opened)
            outputs.append(y)
            at = sum(part.shape[1] for part in outputs)
        return self.out(torch.cat(outputs, 1)), (memory, opened)

    def within(self, x: Tensor, memory: State, opened: tuple[Tensor, ...]) -> tuple[Tensor, State, tuple[Tensor, ...]]:
        """Tokens of one segment, behind those that are open; what they give before W_o, and the state after them."""
        before, T, P = opened[0].shape[1], x.shape[1], self.attention.persistent.shape[0]
        _, *recalled = self.attention.project(recall(self.memory, x, memory), before)
        q, *own = self.attention.project(x, before)
        opened = tuple(append(old, new) for old, new in zip(opened, (*recalled, *own), strict=True))
        k, v = (torch.cat([opened[i], opened[i + 2]], 1) for i in (0, 1))
        own_at = P + before + T
        last = torch.arange(before + 1, own_at - P + 1, device=x.device, dtype=torch.int32)
        first = torch.zeros_like(last)
        ranges = torch.stack([torch.stack([first, last + P]), torch.stack([first + own_at, last + own_at])])
        a, _ = range_attention(q, *self.attention.behind_persistent(k, v), ranges[None, None])
        y = self.attended(a.flatten(2))
        m, memory = self.memory(y, memory)
        kept = 0 if before + T == self.segment else before + T
        return gate(y, m, self.scale), memory, tuple(keep_last(part, kept) for part in opened)
