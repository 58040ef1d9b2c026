"""Informer: forecasts of a long horizon in one pass, from an encoder that halves its sequence layer by layer."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..attention import range_attention
from .parts import Projections, check_positive, check_sequence, expect, full_ranges
from .prob_sparse_attention import ProbSparseAttention


class Informer(torch.nn.Module):
    """Forecasts the next `horizon` steps of a series at once: a sparse encoder, and a decoder that starts from zeros.

        encoder: [ProbSparseAttention, MLP] x num_encoder_layers; between two layers the length is halved:
                 x <- max_pool(ELU(batch_norm(conv3(x))), 3, stride 2)
        decoder: the last `known` values, then `horizon` zeros; [causal ProbSparseAttention, attention to the encoder's
                 rows, MLP] x num_decoder_layers; a linear map of the last `horizon` rows is the forecast

    Every sublayer is LayerNorm(x + f(x)). Values enter by a convolution over 3 steps that wraps around, plus sine and
    cosine of the position, plus a linear map of the time features (hour, day of week, ... of a step). Normalising the
    series is the caller's.

    Left out of the published code: the decoder's `mix`, which joins its first attention's results across heads and
    steps, dropout of attention weights, and the biases of queries and keys.

    Args:
        channels: C, numbers of a step.
        horizon: steps that are forecast.
        dim: channels inside, a multiple of num_heads.
        num_heads: of every attention.
        known: steps at the end of x that the decoder starts from, at most L; as published half of L or all.
        num_encoder_layers: each but the last followed by the halving.
        num_decoder_layers: of the decoder.
        time_features: F, numbers that describe the time of a step; 0 for none.
        factor: of ProbSparseAttention.
        dropout: after the embedding and each sublayer, and inside MLPs.
        distil: False keeps the length between the encoder's layers.
        device, dtype: of the parameters.

    Shapes: x [B, L, C]; time [B, L, F] and time_ahead [B, horizon, F], both or, with time_features = 0, none
    -> [B, horizon, C].

    Initialisation: torch.nn's defaults; Kaiming's for the convolution of the embedding. MLPs are 4 dim wide.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: O(L ln L) for the encoder's attention, O((known + horizon) L) for the decoder's; no state: it reads whole
    sequences.

    Example:
        >>> model = seqops.nn.Informer(channels=7, horizon=24, dim=64, time_features=4)
        >>> model(torch.randn(2, 96, 7), torch.randn(2, 96, 4), torch.randn(2, 24, 4)).shape
        torch.Size([2, 24, 7])

    Zhou et al., "Informer: beyond efficient Transformer for long sequence time-series forecasting", 2021.
    """

    def __init__(
        self,
        channels: int,
        horizon: int,
        dim: int = 512,
        num_heads: int = 8,
        known: int = 48,
        num_encoder_layers: int = 2,
        num_decoder_layers: int = 1,
        time_features: int = 0,
        factor: int = 5,
        dropout: float = 0.05,
        distil: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        check_positive(self, channels=channels, horizon=horizon, known=known)
        whole = isinstance(time_features, int) and time_features >= 0
        expect(whole, self, "time_features", "a whole number of at least 0", repr(time_features))
        check_positive(self, num_encoder_layers=num_encoder_layers, num_decoder_layers=num_decoder_layers)
        self.channels, self.horizon, self.known, self.time_features = channels, horizon, known, time_features
        self.past = Embedding(channels, time_features, dim, dropout, **options)
        self.ahead = Embedding(channels, time_features, dim, dropout, **options)
        layers: list[torch.nn.Module] = []
        for layer in range(num_encoder_layers):
            if layer and distil:
                layers.append(Halving(dim, **options))
            layers.append(Layer(dim, num_heads, factor, dropout, **options))
        self.encoder = torch.nn.Sequential(*layers, torch.nn.LayerNorm(dim, **options))
        self.decoder = torch.nn.ModuleList(
            Layer(dim, num_heads, factor, dropout, decodes=True, **options) for _ in range(num_decoder_layers)
        )
        self.norm = torch.nn.LayerNorm(dim, **options)
        self.out = torch.nn.Linear(dim, channels, **options)

    def forward(self, x: Tensor, time: Tensor | None = None, time_ahead: Tensor | None = None) -> Tensor:
        check_sequence(self, x, self.channels, letter="C")
        B, L, _ = x.shape
        expect(self.known <= L, self, "x", f"at least known = {self.known} steps", f"shape {list(x.shape)}")
        for name, given, steps in (("time", time, L), ("time_ahead", time_ahead, self.horizon)):
            wanted = [B, steps, self.time_features] if self.time_features else None
            got = None if given is None else list(given.shape)
            expect(got == wanted, self, name, "None" if wanted is None else f"shape {wanted}", got)
        context = self.encoder(self.past(x, time))
        start = functional.pad(x[:, L - self.known :], (0, 0, 0, self.horizon))
        if time is not None and time_ahead is not None:
            time = torch.cat([time[:, L - self.known :], time_ahead], 1)
        y = self.ahead(start, time)
        for layer in self.decoder:
            y = layer(y, context)
        return self.out(self.norm(y[:, self.known :]))


class Embedding(torch.nn.Module):
    """Values [B, T, C] and time features [B, T, F] -> [B, T, dim]."""

    def __init__(self, channels: int, time_features: int, dim: int, dropout: float, **options: Any) -> None:
        super().__init__()
        self.values = torch.nn.Conv1d(channels, dim, 3, padding=1, padding_mode="circular", bias=False, **options)
        torch.nn.init.kaiming_normal_(self.values.weight, mode="fan_in", nonlinearity="leaky_relu")
        self.times = torch.nn.Linear(time_features, dim, bias=False, **options) if time_features else None
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, time: Tensor | None) -> Tensor:
        y = self.values(x.mT).mT
        y = y + positions(y.shape[1], y.shape[2], y.device).to(y.dtype)
        return self.dropout(y if self.times is None else y + self.times(time))


class Layer(torch.nn.Module):
    """Attention of selected queries, in a decoder also attention to all rows of a context, and an MLP."""

    def __init__(
        self, dim: int, num_heads: int, factor: int, dropout: float, decodes: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.attention = ProbSparseAttention(dim, num_heads, factor, causal=decodes, **options)
        self.cross = Projections(self, dim, num_heads, **options) if decodes else None
        self.up = torch.nn.Linear(dim, 4 * dim, **options)
        self.down = torch.nn.Linear(4 * dim, dim, **options)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(dim, **options) for _ in range(2 + decodes))
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = self.norms[0](x + self.dropout(self.attention(x)))
        if self.cross is not None:
            q, k, v = self.cross(x, context)
            o, _ = range_attention(q, k, v, full_ranges(q.shape[1], k.shape[1], x.device))
            x = self.norms[1](x + self.dropout(self.cross.join(o)))
        y = self.down(self.dropout(functional.gelu(self.up(x))))
        return self.norms[-1](x + self.dropout(y))


class Halving(torch.nn.Module):
    """Convolution over 3 steps that wraps around, batch norm, ELU, the largest of 3 at every second step."""

    def __init__(self, dim: int, **options: Any) -> None:
        super().__init__()
        self.mix = torch.nn.Conv1d(dim, dim, 3, padding=1, padding_mode="circular", **options)
        self.norm = torch.nn.BatchNorm1d(dim, **options)

    def forward(self, x: Tensor) -> Tensor:
        return functional.max_pool1d(functional.elu(self.norm(self.mix(x.mT))), 3, stride=2, padding=1).mT


def positions(T: int, dim: int, device: torch.device) -> Tensor:
    """Sines in even and cosines in odd channels of t / 10000^(channel / dim): [T, dim]."""
    time = torch.arange(T, device=device, dtype=torch.float64)
    channel = torch.arange(dim, device=device)
    power = (channel - channel % 2).to(torch.float64) * (-math.log(10000.0) / dim)
    angle = time[:, None] * torch.exp(power)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos())
