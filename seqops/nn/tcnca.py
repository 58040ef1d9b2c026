"""TCNCA: attention in chunks between dilated convolutions that carry what lies before a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..conv import causal_conv1d
from .mega import GatedChunkAttention
from .parts import check_positive, check_sequence
from .streaming import Streaming


class DilatedConvolutions(Streaming):
    """y <- y + SiLU(conv(y)), n causal convolutions of each channel, of width W and dilations 1, f, f², ...

    x [B, T, D] -> y [B, T, D] and the state, a tuple of what each convolution reads next, [B, (W - 1) fⁱ, D]. A step
    sees 1 + (W - 1) Σ fⁱ steps. Widths, dilations and the activation are ours: no code was released.
    """

    undecayed = ("bias",)

    def __init__(self, dim: int, width: int, factor: int, num_layers: int, made: dict[str, Any]) -> None:
        super().__init__()
        check_positive(self, dim=dim, width=width, factor=factor, num_layers=num_layers)
        self.dim, self.factor = dim, factor
        bound = width**-0.5
        self.weight = torch.nn.Parameter(torch.empty(num_layers, dim, width, **made).uniform_(-bound, bound))
        self.bias = torch.nn.Parameter(torch.empty(num_layers, dim, **made).uniform_(-bound, bound))

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        check_sequence(self, x, self.dim)
        after = []
        for i in range(self.weight.shape[0]):
            before = None if state is None else state[i].to(x.dtype)
            weight, bias = self.weight[i].to(x.dtype), self.bias[i].to(x.dtype)
            y, last = causal_conv1d(x, weight, bias, before, dilation=self.factor**i, activation="silu")
            x = x + y
            after.append(last)
        return x, tuple(after)


class TCNCA(GatedChunkAttention):
    """A temporal convolutional network with chunked attention: MegaAttention on dilated convolutions of x.

        m <- x, then m <- m + SiLU(conv_i(m)) for i < num_layers, dilated by factorⁱ
        u = σ(W_u m)    z = SiLU(W_z m)    r = SiLU(W_r m)    h = W_h m    v = SiLU(W_v x)
        q = gamma_1 z + beta_1    k = gamma_2 z + beta_2    o_t = Σ_i p(<q_t, k_i> / √Z + bias_{i-t}) v_i
        y = x + u ⊙ (SiLU(h + W_o (r ⊙ o)) - x)

    i runs over the chunk of t, up to t. What lies before a chunk reaches it through m, from at most the field of the
    convolutions, 1 + (width - 1) Σ factorⁱ steps.

    Args:
        dim: channels D.
        chunk_size: C, positions of a chunk.
        key_dim: Z, channels of z, q and k.
        value_dim: V, channels of v and r, a multiple of key_dim. Default: the first of them that is at least 2 D.
        width, factor, num_layers: taps of a convolution, by how much dilations grow, how many convolutions.
        activation: p: "softmax", "laplace" or "relu2", as MegaAttention has them.
        device, dtype: of the parameters.

    x [B, T, D] -> y [B, T, D] and the state, a tuple of the convolutions' (the field's steps, all in all) and of the
    open chunk's k [B, S, Z] and v [B, S, V] with S = T mod C of all that was read: up to C - 1 positions.

    No code was released: width, factor and num_layers (a field of 1365 steps), convolutions of single channels, SiLU
    and their uniform start within ±width^-½ are ours. The rest starts as MegaAttention.

    Cost: O(T C) attention and O(T width num_layers) convolutions; a step O(C). Memory: activations.

    Raises:
        ValueError: for sizes below 1, a value_dim that is no multiple of key_dim, or x of another shape.

    Terzić et al., "TCNCA: temporal convolution network with chunked attention for scalable sequence processing", 2023.
    """

    def __init__(
        self,
        dim: int,
        chunk_size: int = 1024,
        key_dim: int = 128,
        value_dim: int | None = None,
        width: int = 5,
        factor: int = 4,
        num_layers: int = 5,
        activation: str = "softmax",
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        made = {"device": device, "dtype": dtype}
        check_positive(self, dim=dim, key_dim=key_dim)
        average = DilatedConvolutions(dim, width, factor, num_layers, made)
        value_dim = -(-2 * dim // key_dim) * key_dim if value_dim is None else value_dim
        super().__init__(dim, average, chunk_size, key_dim, value_dim, True, activation, made)
