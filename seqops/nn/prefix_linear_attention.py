"""Prefix linear attention: a prompt is read as a whole, what follows is decoded causally."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..linear_attention import linear_attention
from .parts import check_multiple, check_positive, check_sequence, expect, split_heads, wide
from .streaming import State, Streaming


class PrefixLinearAttention(Streaming):
    """Just read twice: every position of the prompt sees all of it, and every later one the prompt and what followed.

        φ(u) = [1, u / K^{1/4}, vec(u uᵀ) / √(2 K)], so that φ(q)·φ(k) = 1 + s + s²/2 with s = q·k / √K
        S_0 = sum over the prompt of φ(E_k x) [E_v x, 1]ᵀ        S_t = S_{t-1} + φ(W_k x_t) [W_v x_t, 1]ᵀ
        [n, d]_t = S_tᵀ φ(W_q x_t)        y_t = W_o (n_t / d_t)

    A prompt has projections E of its own; the causal sum runs over it too. Three ways to use it:

        y, state = module(x, prefix=M)             # x [B, T, D]; its first M steps are the prompt: training
        state = module.prefix(prompt, lengths)     # the sum alone; only lengths[b] steps of row b count
        y, state = module(x, state)                # from a state: decoding, also by module.step

    Args:
        dim: D, channels of x and y.
        num_heads: H; values have V = D / H channels.
        feature_size: K, channels of a head's queries and keys.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]; state S [B, H, 1 + K + K², V + 1], float32 at least. Without a prompt S_0 = 0.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Initialisation: torch.nn.Linear's.

    Time O(T H K² V), a step O(H K² V). A gradient keeps the feature maps, 1 + K + K² numbers for each key and query.

    Arora et al., "Just read twice: closing the recall gap for recurrent language models", 2024.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 16,
        feature_size: int = 16,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads, feature_size=feature_size)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        self.dim, self.num_heads, self.feature_size = dim, num_heads, feature_size
        options = {"device": device, "dtype": dtype}
        self.query = nn.Linear(dim, num_heads * feature_size, bias=False, **options)
        self.key = nn.Linear(dim, num_heads * feature_size, bias=False, **options)
        self.value = nn.Linear(dim, dim, bias=False, **options)
        self.prefix_key = nn.Linear(dim, num_heads * feature_size, bias=False, **options)
        self.prefix_value = nn.Linear(dim, dim, bias=False, **options)
        self.out = nn.Linear(dim, dim, bias=False, **options)

    def features(self, x: Tensor) -> Tensor:
        """[B, T, H K] -> [B, T, H, 1 + K + K²]."""
        x = split_heads(wide(x), self.num_heads)
        squares = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * self.feature_size)
        return torch.cat([torch.ones_like(x[..., :1]), x / self.feature_size**0.25, squares], -1)

    def values(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, H, V + 1], the last column 1."""
        return nn.functional.pad(split_heads(x, self.num_heads), (0, 1), value=1.0)

    def prefix(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """A prompt x [B, M, D], of row b its first lengths[b] steps (None: all) -> S_0 [B, H, 1 + K + K², V + 1]."""
        check_sequence(self, x, self.dim)
        if lengths is None:
            k, v = self.features(self.prefix_key(x)), self.values(self.prefix_value(x))
        else:
            expect(lengths.shape == x.shape[:1], self, "lengths", f"[B = {len(x)}]", f"shape {list(lengths.shape)}")
            absent = (torch.arange(x.shape[1], device=x.device) >= lengths[:, None])[..., None]
            x = x.masked_fill(absent, 0.0)
            k, v = self.features(self.prefix_key(x)), self.values(self.prefix_value(x))
            k = k.masked_fill(absent[..., None], 0.0)
        return torch.einsum("bthf,bthv->bhfv", k, wide(v))

    def forward(self, x: Tensor, state: State = None, prefix: int = 0) -> tuple[Tensor, State]:
        """x [B, T, D], state or None, steps at the start that are a prompt -> y [B, T, D], state."""
        check_sequence(self, x, self.dim)
        if prefix:
            expect(0 <= prefix <= x.shape[1], self, "prefix", f"a number from 0 to T = {x.shape[1]}", prefix)
            read = self.prefix(x[:, :prefix])
            state = read if state is None else state + read
        v = self.values(self.value(x))
        # Weights are not negative: in float16 their sum would overflow on long sequences.
        inside = torch.float32 if v.dtype == torch.float16 else v.dtype
        q, k = self.features(self.query(x)).to(inside), self.features(self.key(x)).to(inside)
        o, state = linear_attention(q, k, v.to(inside), None, state, scale=1.0)
        y = wide(o[..., :-1]) / (wide(o[..., -1:]) + 1e-12)
        return self.out(y.to(v.dtype).flatten(2)), state
