"""MegaAttention: attention in chunks, gated, between moving averages that carry what lies before a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import chunked_attention
from .mega_ema import MegaEMA
from .parts import append, check_multiple, check_positive, check_sequence, expect, split_heads, wide
from .streaming import State, Streaming


class GatedChunkAttention(Streaming):
    """What MegaAttention and TCNCA share: all but `average`, which gives m [B, T, D] and its state."""

    undecayed = ("beta", "bias")

    def __init__(
        self,
        dim: int,
        average: torch.nn.Module,
        chunk_size: int,
        key_dim: int,
        value_dim: int,
        causal: bool,
        activation: str,
        made: dict[str, Any],
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, chunk_size=chunk_size, key_dim=key_dim, value_dim=value_dim)
        check_multiple(self, "value_dim", value_dim, "key_dim", key_dim)
        known = ("softmax", "laplace", "relu2")
        expect(activation in known, self, "activation", "'softmax', 'laplace' or 'relu2'", repr(activation))
        self.dim, self.chunk_size, self.key_dim, self.value_dim = dim, chunk_size, key_dim, value_dim
        self.causal, self.activation, self.average = causal, activation, average
        self.gates = torch.nn.Linear(dim, 2 * dim + key_dim + value_dim, **made)
        self.value = torch.nn.Linear(dim, value_dim, **made)
        self.out = torch.nn.Linear(value_dim, dim, **made)
        self.gamma = torch.nn.Parameter(0.02 * torch.randn(2, key_dim, **made))
        self.beta = torch.nn.Parameter(torch.zeros(2, key_dim, **made))
        self.bias = torch.nn.Parameter(0.02 * torch.randn(2 * chunk_size - 1, **made))
        for linear in (self.gates, self.value, self.out):
            torch.nn.init.normal_(linear.weight, std=0.02)
            torch.nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        return f"{self.dim}, chunk_size={self.chunk_size}, key_dim={self.key_dim}, value_dim={self.value_dim}"

    def forward(self, x: Tensor, state: State = None) -> Any:
        check_sequence(self, x, self.dim)
        expect(state is None or self.causal, self, "state", "None where causal=False", type(state).__name__)
        if self.causal:
            m, after = self.average(x, None if state is None else state[0])
        else:
            m = self.average(x)
        widths = (self.dim, self.key_dim, self.value_dim, self.dim)
        update, z, reset, h = self.gates(m.to(x.dtype)).split(widths, -1)
        z, update = functional.silu(z), torch.sigmoid(update)
        q, k = (self.gamma[i] * z + self.beta[i] for i in range(2))
        v = functional.silu(self.value(x))
        if self.causal and state is not None:
            k, v = append(state[1], k), append(state[2], v)
        o = self.attend(q, k.to(q.dtype), v.to(q.dtype))
        y = x + update * (functional.silu(h + self.out(functional.silu(reset) * o)) - x)
        if not self.causal:
            return y
        # A full chunk is never looked at again.
        closed = k.shape[1] - k.shape[1] % self.chunk_size
        return y, (after, k[:, closed:].clone(), v[:, closed:].clone())

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, T, Z], k [B, S + T, Z], v [B, S + T, V]: S positions of the open chunk, then new ones."""
        open_ = k.shape[1] - q.shape[1]
        if self.activation == "softmax":
            q = q * self.key_dim**-0.5
        else:
            # The others have no normaliser: the published one is how many positions a query sees.
            place = torch.arange(open_, k.shape[1], device=q.device)
            seen = place % self.chunk_size + 1
            if not self.causal:
                seen = (k.shape[1] - place + seen - 1).clamp(max=self.chunk_size)
            q = (wide(q) / seen[:, None]).to(q.dtype)
        q = functional.pad(q, (0, 0, open_, 0))
        heads = self.value_dim // self.key_dim
        q, k = (t[:, :, None].expand(-1, -1, heads, -1) for t in (q, k))
        options = {
            "causal": self.causal,
            "activation": self.activation,
            "scale": 1.0,
            "bias": self.bias.to(q.dtype)[None],
        }
        o, _ = chunked_attention(q, k, split_heads(v, heads), self.chunk_size, **options)
        return o[:, open_:].flatten(2)


class MegaAttention(GatedChunkAttention):
    """Attention in chunks by one query and key a position, on moving averages of x, and gates of what it gives.

        m = MegaEMA(x)    u = σ(W_u m)    z = SiLU(W_z m)    r = SiLU(W_r m)    h = W_h m    v = SiLU(W_v x)
        q = gamma_1 z + beta_1    k = gamma_2 z + beta_2    o_t = Σ_i p(<q_t, k_i> / √Z + bias_{i-t}) v_i
        y = x + u ⊙ (SiLU(h + W_o (r ⊙ o)) - x)

    i runs over the chunk of t, up to t where causal. What lies before a chunk reaches it through m.

    Args:
        dim: channels D.
        chunk_size: C, positions of a chunk.
        key_dim: Z, channels of z, q and k.
        value_dim: V, channels of v and r, a multiple of key_dim. Default: the first of them that is at least 2 D.
        state_size: averages of a channel of MegaEMA.
        causal: False: chunks are seen as a whole, averages run both ways, and the module returns y alone.
        activation: p: "softmax", "laplace" or "relu2". The last two have no normaliser; there the product of q and k is
            divided by how many positions t sees instead of by √Z.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of MegaEMA's and of the open chunk's k [B, S, Z] and v [B, S, V]
    with S = T mod C of all that was read: it grows up to C - 1 positions, and no further.

    Weights and gamma start N(0, 0.02), beta 0, the bias of positions N(0, 0.02), those of linear maps 0. Weight decay
    leaves beta and bias alone. The norm before it and the feed-forward layer after it belong to the network around.

    Cost: O(T C) attention, O(T log T) averages; a step O(C). Memory: activations; no scores are stored.

    Raises:
        ValueError: for sizes below 1, a value_dim that is no multiple of key_dim, or x of another shape.

    Ma et al., "Mega: moving average equipped gated attention", 2023.
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int = 1024,
        key_dim: int = 128,
        value_dim: int | None = None,
        state_size: int = 16,
        causal: bool = True,
        activation: str = "softmax",
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made = {"device": device, "dtype": dtype}
        check_positive(self, dim=dim, key_dim=key_dim, state_size=state_size)
        average = MegaEMA(dim, state_size, not causal, **made)
        value_dim = -(-2 * dim // key_dim) * key_dim if value_dim is None else value_dim
        super().__init__(dim, average, chunk_size, key_dim, value_dim, causal, activation, made)
