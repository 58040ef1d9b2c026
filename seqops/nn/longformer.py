"""Longformer: attention in a window both ways, with global tokens; Recformer: a recommender's encoder made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import range_attention, window_attention
from .parts import Projections, check_positive, check_sequence, expect, full_ranges, split_heads, wide


class Longformer(torch.nn.Module):
    """Attention in a window both ways; a few global tokens see all and are seen by all.

        N(i) = {j : |i - j| <= window} and the global tokens
        o_i = sum_{j in N(i)} softmax_j(<q_i, k_j> / sqrt(D)) v_j
        o_g = sum_j softmax_j(<q'_g, k'_j> / sqrt(D)) v'_j    over all j, for a global token g
        y = W_o o

    q', k', v' are projections of their own. There are no positions: add them to x.

    Args:
        dim: channels of x, a multiple of num_heads.
        num_heads: H, heads of D = dim / num_heads channels.
        window: steps seen before, and steps seen after, a step's own; the published `attention_window` is their sum.
        device, dtype: of the parameters.

    Shapes: x [B, T, dim], global_index [G] int32 or int64, positions of global tokens, the same for each row of the
    batch (repeated ones count once, those outside of the sequence do not count), or None -> y [B, T, dim]. It reads
    whole sequences, which have no padding; there is no state.

    Initialisation: torch.nn.Linear's; the projections of global tokens start as copies of the others, as published. The
    maps of queries and keys have no bias.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: T (2 window + 1 + G) + G T keys a head, and as much memory as plain tensors of x.

    Beltagy et al., "Longformer: the long-document transformer", 2020.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, window=window)
        self.dim, self.window = dim, window
        self.project = Projections(self, dim, num_heads, device=device, dtype=dtype)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.global_query = torch.nn.Linear(dim, dim, bias=False, **options)
        self.global_key = torch.nn.Linear(dim, dim, bias=False, **options)
        self.global_value = torch.nn.Linear(dim, dim, **options)
        for name in ("query", "key", "value"):
            getattr(self, f"global_{name}").load_state_dict(getattr(self.project, name).state_dict())

    def forward(self, x: Tensor, global_index: Tensor | None = None) -> Tensor:
        check_sequence(self, x, self.dim)
        q, k, v = self.project(x)
        o, _ = window_attention(q, k, v, self.window, self.window, global_index=global_index)
        if global_index is not None and global_index.shape[0] > 0 and x.shape[1] > 0:
            rows = self.attend_globally(x, global_index.clamp(0, x.shape[1] - 1))
            same = global_index == torch.arange(x.shape[1], device=x.device)[:, None]
            rows = rows.to(o.dtype).index_select(1, same.int().argmax(1))
            o = torch.where(same.any(1)[:, None, None], rows, o)
        return self.project.join(o)

    def attend_globally(self, x: Tensor, index: Tensor) -> Tensor:
        """The rows [B, G, H, D] of the tokens at `index`, which see all."""
        q = self.global_query(x.index_select(1, index))
        q, k, v = (split_heads(t, self.project.num_heads) for t in (q, self.global_key(x), self.global_value(x)))
        return range_attention(q, k, v, full_ranges(q.shape[1], k.shape[1], x.device))[0]


class Recformer(torch.nn.Module):
    """A recommender's encoder: the words of a user's items, read by Longformer layers whose first token is global.

        h = LayerNorm(E_token + E_position + E_kind + E_item)
        h <- LayerNorm(h + Longformer(h, global token 0));  h <- LayerNorm(h + W_2 gelu(W_1 h))    num_layers times

    A sequence is a first token that stands for it, then the items as words of their attributes, the latest item first.
    `y[:, 0]` represents the user, or, for the words of one item, the item; their cosine ranks the items: `scores`.

    Args:
        vocabulary: number of tokens.
        dim: channels inside, a multiple of num_heads.
        num_heads: heads of the attention.
        num_layers: layers.
        window: steps seen before, and steps seen after; as published 32 of both.
        max_tokens: longest sequence.
        max_items: most items of a sequence, the first token's number 0 counted.
        kinds: kinds of tokens: first, attribute name, attribute value, other.
        dropout: after the embedding and each sublayer.
        device, dtype: of the parameters.

    Shapes: token [B, T], kind [B, T] below `kinds`, item [B, T] below `max_items`, all int64 -> y [B, T, dim]. The
    rows of a batch are equally long.

    Initialisation: N(0, 0.02) for embeddings, else as Longformer's and torch.nn.Linear's. MLPs are 4 dim wide.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: that of Longformer with one global token; no state.

    Li et al., "Text is all you need: learning language representations for sequential recommendation", 2023.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int = 768,
        num_heads: int = 12,
        num_layers: int = 12,
        window: int = 32,
        max_tokens: int = 1024,
        max_items: int = 51,
        kinds: int = 4,
        dropout: float = 0.1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, vocabulary=vocabulary, num_layers=num_layers, max_tokens=max_tokens)
        check_positive(self, max_items=max_items, kinds=kinds)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.max_tokens = max_tokens
        self.token, self.position, self.kind, self.item = (
            torch.nn.Embedding(count, dim, **options) for count in (vocabulary, max_tokens, kinds, max_items)
        )
        for embedding in (self.token, self.position, self.kind, self.item):
            torch.nn.init.normal_(embedding.weight, std=0.02)
        self.norm = torch.nn.LayerNorm(dim, **options)
        self.layers = torch.nn.ModuleList(Layer(dim, num_heads, window, dropout, **options) for _ in range(num_layers))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, token: Tensor, kind: Tensor, item: Tensor) -> Tensor:
        fits = token.ndim == 2 and token.shape[1] <= self.max_tokens
        expect(fits, self, "token", f"[B, T] with T <= {self.max_tokens}", f"shape {list(token.shape)}")
        for name, given in (("kind", kind), ("item", item)):
            expect(given.shape == token.shape, self, name, f"shape {list(token.shape)}", f"shape {list(given.shape)}")
        y = self.token(token) + self.position.weight[: token.shape[1]] + self.kind(kind) + self.item(item)
        y, first = self.dropout(self.norm(y)), torch.zeros(1, dtype=torch.int64, device=token.device)
        for layer in self.layers:
            y = layer(y, first)
        return y

    @staticmethod
    def scores(user: Tensor, items: Tensor, temperature: float = 0.05) -> Tensor:
        """user [B, dim] and items [N, dim] -> cosine / temperature [B, N], whose softmax is trained."""
        return functional.normalize(wide(user), dim=-1) @ functional.normalize(wide(items), dim=-1).mT / temperature


class Layer(torch.nn.Module):
    """Longformer attention and an MLP, each LayerNorm(x + f(x))."""

    def __init__(self, dim: int, num_heads: int, window: int, dropout: float, **options: Any) -> None:
        super().__init__()
        self.attention = Longformer(dim, num_heads, window, **options)
        self.up = torch.nn.Linear(dim, 4 * dim, **options)
        self.down = torch.nn.Linear(4 * dim, dim, **options)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(dim, **options) for _ in range(2))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, global_index: Tensor) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x, global_index)))
        return self.norms[1](x + self.dropout(self.down(functional.gelu(self.up(x)))))
