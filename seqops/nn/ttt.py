"""TTT layers: a hidden state that is a model, trained by every token to reconstruct a value from a key."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad

from .memory import learn_in_chunks, unit
from .parts import append, check_multiple, check_positive, check_sequence, expect, keep_last, rotary, split_heads, wide
from .streaming import State, Streaming

EPS = 1e-6  # of layer norms


def rotary_in_chunks(x: Tensor, chunk_size: int, before: int) -> Tensor:
    """Rotary positions of x [B, T, H, D] that begin anew with each chunk; `before` tokens of the first are gone."""
    T = x.shape[1]
    filled = pad(x, (0, 0, 0, 0, before, -(before + T) % chunk_size))
    turned = rotary(filled.unflatten(1, (-1, chunk_size)).flatten(0, 1))
    return turned.unflatten(0, (x.shape[0], filled.shape[1] // chunk_size)).flatten(1, 2)[:, before : before + T]


def normalised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x - mean) / std over the last dimension, and 1 / std."""
    x = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
    return x * scale, scale


def reconstruction_slope(z: Tensor, target: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gradient by z of |weight * normalised(z) + bias - target|^2 / 2."""
    unit_z, scale = normalised(z)
    d = (weight * unit_z + bias - target) * weight
    return (d - d.mean(-1, keepdim=True) - unit_z * (d * unit_z).mean(-1, keepdim=True)) * scale


def gelu_slope(x: Tensor) -> Tensor:
    """The derivative of gelu(x, approximate="tanh")."""
    a, b = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(a * (x + b * x**3))
    return (1 + tanh) / 2 + x / 2 * (1 - tanh.square()) * a * (1 + 3 * b * x.square())


def learn_chunk(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, state: Sequence[Tensor], rho: Tensor, norm: tuple[Tensor, Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """One chunk of the published rule, in its dual form: no weight of a single token is formed.

        z_t = q_t W_t^T + b_t = q_t W^T + b - rho_t sum_{i<=t} lr_i (<q_t, k_i> + 1) dz_i

    Args:
        q, k, v: [B, H, n, D], tokens of the chunk.
        lr: [B, H, 1, n].
        state: W [B, H, D', D] and b [B, H, 1, D'] of each layer, before the chunk.
        rho: [n, 1].
        norm: weight and bias [H, 1, D] of the layer norm.

    Returns:
        o [B, H, n, D], and the layers after the chunk.
    """
    layers = [*zip(state[::2], state[1::2], strict=True)]
    # gradients by what each layer gives, at the weights before the chunk
    inputs, outputs = [k], []
    for i, (w, b) in enumerate(layers):
        outputs.append(inputs[i] @ w.mT + b)
        inputs.append(gelu(outputs[i], approximate="tanh"))
    slopes = [reconstruction_slope(outputs[-1], v - k, *norm)]
    if len(layers) == 2:
        slopes.insert(0, slopes[0] @ layers[1][0] * gelu_slope(outputs[0]))
    # answers, each with its token's weights
    x, after = q, []
    for i, (w, b) in enumerate(layers):
        x = x if i == 0 else gelu(x, approximate="tanh")
        steps = (rho * lr).tril()  # [B, H, n, n]
        x = x @ w.mT + b - (steps * (x @ inputs[i].mT + 1)) @ slopes[i]
        last = rho[-1:].sum() * lr.mT * slopes[i]  # a sum of one, or of none
        after += [w - last.mT @ inputs[i], b - last.sum(-2, keepdim=True)]
    weight, bias = norm
    return q + weight * normalised(x)[0] + bias, after


class TTTLayer(Streaming):
    """What TTTLinear and TTTMLP share; `hidden` 0 is the linear model."""

    undecayed = ("biases", "norm_weight", "norm_bias", "shares")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int,
        hidden: int,
        norm: bool,
        rate: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_positive(self, dim=dim, num_heads=num_heads, chunk_size=chunk_size)
        check_multiple(self, "dim", dim, "num_heads", num_heads)
        expect(rate > 0, self, "rate", "a number above 0", rate)
        self.dim, self.num_heads, self.chunk_size, self.norm, self.rate = dim, num_heads, chunk_size, norm, rate
        options = {"device": device, "dtype": dtype}
        D = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **options)
        self.rates = nn.Linear(dim, num_heads, **options)
        shapes = [(hidden, D), (D, hidden)] if hidden else [(D, D)]
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(num_heads, *s, **options) * 0.02) for s in shapes)
        self.post = nn.LayerNorm(dim, EPS, **options)
        self.out = nn.Linear(dim, dim, bias=False, **options)
        if norm:
            self.biases = nn.ParameterList(nn.Parameter(torch.zeros(num_heads, 1, s[0], **options)) for s in shapes)
            self.norm_weight = nn.Parameter(torch.ones(num_heads, 1, D, **options))
            self.norm_bias = nn.Parameter(torch.zeros(num_heads, 1, D, **options))
            self.shares = nn.Parameter(torch.zeros(chunk_size, **options))
        with torch.no_grad():
            self.rates.weight.normal_(std=0.02)
            self.rates.bias.zero_()

    def start(self, x: Tensor) -> State:
        """The state before the first token of x [B, T, D]."""
        B, real = x.shape[0], wide(x).dtype
        held: Iterable[Tensor] = self.weights
        if self.norm:
            held = [part for pair in zip(self.weights, self.biases, strict=True) for part in pair]
        token = split_heads(x[:, :0], self.num_heads).clone()
        rates = x.new_zeros(B, 0, self.num_heads, dtype=real)
        return tuple(wide(part).to(real).repeat(B, 1, 1, 1) for part in held), (token, token.clone(), rates)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        weights, opened = self.start(x) if state is None else state
        q, k, v = (split_heads(part, self.num_heads) for part in self.qkv(x).chunk(3, -1))
        lr = torch.sigmoid(wide(self.rates(x))) * self.rate
        before = opened[0].shape[1]
        if not self.norm:
            q, k, v = (unit(part.flatten(2), self.num_heads) for part in (q, k, v))
        q, k = (rotary_in_chunks(part, self.chunk_size, before) for part in (q, k))
        learn = self.published if self.norm else self.plain
        o, state = learn((q, k, v), lr, weights, opened)
        return self.out(self.post(o.flatten(2))), state

    def plain(
        self, tokens: tuple[Tensor, ...], lr: Tensor, weights: tuple[Tensor, ...], opened: tuple[Tensor, ...]
    ) -> tuple[Tensor, State]:
        q, k, v = tokens
        linear = len(weights) == 1  # the operator's linear model is W x, its MLP x + W2 silu(W1 x)
        tokens = (q, k, v - k) if linear else tokens
        o, (weights, _, opened) = learn_in_chunks(
            tokens, [lr / self.chunk_size], (weights, (), opened), self.chunk_size
        )
        return (q + o if linear else o), (weights, opened)

    def published(
        self, tokens: tuple[Tensor, ...], lr: Tensor, weights: tuple[Tensor, ...], opened: tuple[Tensor, ...]
    ) -> tuple[Tensor, State]:
        q, *new = tokens[0], *tokens[1:], lr / tokens[0].shape[-1]
        before, T, C = opened[0].shape[1], q.shape[1], self.chunk_size
        k, v, lr = (append(old, part) for old, part in zip(opened, new, strict=True))
        kept = tuple(keep_last(part, (before + T) % C) for part in (k, v, lr))
        # what the open chunk's tokens asked is answered already: keys stand in their place
        q, k, v = (wide(part).transpose(1, 2) for part in (append(opened[0], q), k, v))
        rho = 1 / torch.arange(1, C + 1, device=q.device, dtype=q.dtype)
        rho = (rho + wide(self.shares)).clamp(min=0)[:, None]
        norm = wide(self.norm_weight), wide(self.norm_bias)
        outputs = []
        with torch.autocast(q.device.type, enabled=False):
            for start in range(0, max(before + T, 1), C):
                at = slice(start, start + C)
                chunk = [part[:, :, at] for part in (q, k, v)]
                n = chunk[0].shape[2]
                o, learnt = learn_chunk(*chunk, lr[:, at].mT[:, :, None], weights, rho[:n], norm)
                outputs.append(o)
                weights = tuple(learnt) if n == C else weights
        o = torch.cat(outputs, 2)[:, :, before:].transpose(1, 2)
        return o.to(tokens[0].dtype), (weights, kept)


class TTTLinear(TTTLayer):
    """A hidden state that is a linear model, trained by every token to reconstruct a value from a key (TTT-Linear).

        f(x) = x + LN(W x + b);   loss_i = |LN(W k_i + b) - (v_i - k_i)|^2 / 2
        (W, b)_t = (W, b) - rho_t sum_{i<=t} lr_i d loss_i / d (W, b);   o_t = f_t(q_t);   y = W_o LN(o)

    where the sum begins, and gradients are taken, at the chunk's start; `rho_t = max(1/t + learnt_t, 0)` for the t-th
    token of a chunk, `lr_i = rate sigmoid(W_l x_i + b_l) / d`, and q, k have rotary positions within the chunk.

    Args:
        dim: D, channels of x and y.
        num_heads: models side by side, each of d = D / num_heads channels.
        chunk_size: tokens whose gradients are taken at the same weights.
        norm: False: without LN, b and rho, on the operator `neural_memory`: `f(x) = x + W x`, with q, k and v of length
            1 and `lr_i = rate sigmoid(W_l x_i + b_l) / chunk_size`, so that a chunk's steps are stable.
        rate: the largest rate.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: W and b at the start of the open chunk, in float32 at least, and keys, values and
    rates of its tokens, fewer than `chunk_size`.

    Initially W is normal (std 0.02), b 0, LN the identity, W_l normal (std 0.02).

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T, a chunk after another: `norm=True` is made of torch's products, in float32 at least, `norm=False`
    is faster. Memory for the gradient grows with T, and with d^2 a head for every chunk.

    Sun et al., "Learning to (learn at test time): RNNs with expressive hidden states", 2024.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 16,
        *,
        norm: bool = True,
        rate: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, num_heads, chunk_size, 0, norm, rate, device, dtype)


class TTTMLP(TTTLayer):
    """A hidden state that is an MLP, trained by every token to reconstruct a value from a key (TTT-MLP).

        f(x) = x + LN(z(x)), z(x) = W2 gelu(W1 x + b1) + b2;   loss_i = |LN(z(k_i)) - (v_i - k_i)|^2 / 2
        weights_t = weights - rho_t sum_{i<=t} lr_i d loss_i / d weights;   o_t = f_t(q_t);   y = W_o LN(o)

    where the sum begins, and gradients are taken, at the chunk's start; `rho_t = max(1/t + learnt_t, 0)` for the t-th
    token of a chunk, `lr_i = rate sigmoid(W_l x_i + b_l) / d`, and q, k have rotary positions within the chunk. gelu is
    the one with tanh.

    Args:
        dim: D, channels of x and y.
        num_heads: models side by side, each of d = D / num_heads channels.
        chunk_size: tokens whose gradients are taken at the same weights.
        expand: hidden units of a model for each of its channels.
        norm: False: without LN, biases and rho, on the operator `neural_memory`: `f(x) = x + W2 silu(W1 x)`, with q, k
            and v of length 1 and `lr_i = rate sigmoid(W_l x_i + b_l) / chunk_size`.
        rate: the largest rate.
        device, dtype: of the parameters.

    Shapes: x, y [B, T, D]. state: W1, b1, W2, b2 at the start of the open chunk, in float32 at least, and keys, values
    and rates of its tokens, fewer than `chunk_size`.

    Initially W1, W2 are normal (std 0.02), biases 0, LN the identity, W_l normal (std 0.02).

    Raises:
        ValueError: for sizes that do not fit, at once and for a wrong x.

    Time grows with T, a chunk after another: `norm=True` is made of torch's products, in float32 at least, `norm=False`
    is faster. Memory for the gradient grows with T, and with 2 expand d^2 a head for every chunk.

    Sun et al., "Learning to (learn at test time): RNNs with expressive hidden states", 2024.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        chunk_size: int = 16,
        expand: int = 4,
        *,
        norm: bool = True,
        rate: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_positive(self, dim=dim, num_heads=num_heads, expand=expand)
        super().__init__(dim, num_heads, chunk_size, dim // num_heads * expand, norm, rate, device, dtype)
