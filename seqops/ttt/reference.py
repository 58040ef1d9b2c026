"""The specification of test-time training: loops over chunks, steps and single tokens, in plain torch.

Letters: B batch, T time, H heads, D channels, F hidden channels, C tokens of a chunk. Weights multiply from the left,
`W x`, so for the rows x of a chunk [C, D] they are `x W^T`.

Float64 stays; every other dtype is computed in float32. Weights and momentum are returned in that; other outputs are
rounded to the storage dtype. All derivatives come from autograd, of any order. Arguments are not validated here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

MUON_STEPS = ((3.4445, -4.7750, 2.0315),) * 5


def _real(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.to(torch.float32)


def silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


# ---- Newton-Schulz


def triples(coefficients: Sequence[float] | Sequence[Sequence[float]] | None) -> list[tuple[float, float, float]]:
    """A step's a, b, c; from triples, from a flat list, or the default."""
    if coefficients is None:
        return [*MUON_STEPS]
    flat = [number for each in coefficients for number in (each if isinstance(each, Sequence) else (each,))]
    return [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]


def newton_schulz(
    x: Tensor, coefficients: Sequence[float] | Sequence[Sequence[float]] | None = None, eps: float = 1e-7
) -> Tensor:
    """`X <- a X + (b A + c A A) X` with `A = X X^T`, from `X = x / (|x| + eps)`; tall matrices are transposed.

    Args:
        x: [..., M, N].

    Returns:
        [..., M, N]; a matrix of zeros gives zeros, with zero gradient.
    """
    wide = _real(x)
    tall = x.shape[-2] > x.shape[-1]
    y = wide.mT if tall else wide
    zero = (y == 0).all(-1, keepdim=True).all(-2, keepdim=True)
    norm = torch.where(zero, 1, y).square().sum((-2, -1), keepdim=True).sqrt()
    y = torch.where(zero, 0, y) / (norm + eps)
    for a, b, c in triples(coefficients):
        gram = y @ y.mT
        y = a * y + (b * gram + c * (gram @ gram)) @ y
    return (y.mT if tall else y).to(x.dtype, copy=True)


# ---- large chunks


def large_chunk_ttt(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    chunk_size: int,
    *,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    optimizer: str = "gd",
    order: str = "apply_update",
    coefficients: Sequence[float] | None = None,
    weight_norm: bool = True,
) -> tuple[Tensor, ...]:
    """`f(x) = w1 (silu(w0 x) * (w2 x))`, whose weights take one step down the loss `-<f(k), v>` per chunk.

    Args:
        q, k, v: [B, T, H, D].
        w0, w2: [B, H, F, D].
        w1: [B, H, D, F].
        lr: [B, T, H, 3], of w0, w1 and w2.
        chunk_size: C.
        momentum: [B, T, H], whose mean over a chunk is its momentum; None is none.
        momentum_state: three tensors like the weights.
        optimizer: "gd" or "muon".
        order: "apply_update", "update_apply" or "full".
        coefficients: of `newton_schulz`.
        weight_norm: whether rows keep the norms that they come with.

    Returns:
        o [B, T, H, D], w0, w1, w2 and their momentum after the last chunk.
    """
    T = q.shape[1]
    # heads in front: [B, H, T, ...]
    q_, k_, v_, lr_ = (_real(t).transpose(1, 2) for t in (q, k, v, lr))
    weights = [_real(w).clone() for w in (w0, w1, w2)]
    norms = [w.norm(dim=-1, keepdim=True) for w in weights]
    sums = (
        [torch.zeros_like(w) for w in weights] if momentum_state is None else [_real(m).clone() for m in momentum_state]
    )

    def apply(x: Tensor) -> Tensor:
        return (silu(x @ weights[0].mT) * (x @ weights[2].mT)) @ weights[1].mT

    def update(at: slice) -> None:
        K, V, rates = k_[:, :, at], v_[:, :, at], lr_[:, :, at]
        y0, y2, g = K @ weights[0].mT, K @ weights[2].mT, V @ weights[1]
        e0, e2, h = g * y2 * silu_slope(y0), g * silu(y0), silu(y0) * y2
        steps = [
            (rates[..., 0:1] * e0).mT @ K,
            (rates[..., 1:2] * V).mT @ h,
            (rates[..., 2:3] * e2).mT @ K,
        ]
        for i, step in enumerate(steps):
            if momentum is not None:
                beta = _real(momentum)[:, at].mean(1)[..., None, None]
                sums[i] = step = beta * sums[i] + step
            if optimizer == "muon":
                step = newton_schulz(step, coefficients)
            weights[i] = weights[i] + step
            if weight_norm:
                weights[i] = weights[i] * (norms[i] / weights[i].norm(dim=-1, keepdim=True).clamp(min=1e-5))

    outputs = []
    size = max(T, 1) if order == "full" else chunk_size
    for start in range(0, T, size):
        at = slice(start, min(start + size, T))
        if order == "apply_update":
            outputs.append(apply(q_[:, :, at]))
            if at.stop - start == size:
                update(at)
        else:
            update(at)
            outputs.append(apply(q_[:, :, at]))
    o = torch.cat(outputs, 2).transpose(1, 2) if outputs else torch.zeros_like(q)
    return (o.to(q.dtype), *weights, *sums)


# ---- small chunks


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Sequence[Tensor],
    chunk_size: int,
    *,
    decay: Tensor | None = None,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    loss: str = "l2",
    window: int = 1,
    optimizer: str = "gd",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A memory `f`, one step of whose weights every token takes, with the gradient at the weights its chunk began with.

        S_t = momentum_t S_{t-1} - sum of lr_i u_i over the last `window` tokens of the chunk
        M_t = (1 - decay_t) M_{t-1} + S_t;  o_t = f(M_t; q_t)

    With "muon" `M_t = b_t M_0 + V_t` keeps only `b_t M_0`, until the last token of a complete chunk adds
    `newton_schulz(V_t)`.

    Args:
        q, k, v: [B, T, H, D].
        lr, decay, momentum: [B, T, H].
        weights: [W [B, H, D, D]], `f(x) = W x`, or [W1 [B, H, F, D], W2 [B, H, D, F]], `f(x) = x + W2 silu(W1 x)`.
        chunk_size: C.
        momentum_state: S before the first token.
        loss: "l2", `|f(k) - v|^2 / 2`, or "dot", `-<f(k), v>`.
        window: how many tokens' gradients each step sums, within the chunk.
        optimizer: "gd" or "muon".

    Returns:
        o [B, T, H, D], the weights M and the momentum S after the last token.
    """
    T = q.shape[1]
    start = [_real(w).clone() for w in weights]  # M_0 of the chunk
    now = start
    S = [torch.zeros_like(w) for w in start] if momentum_state is None else [_real(s).clone() for s in momentum_state]
    V = [torch.zeros_like(w) for w in start]
    b = torch.ones_like(_real(lr[:, :1]).transpose(1, 2)[..., None])
    recent: list[list[Tensor]] = []  # lr_i u_i of the chunk's tokens
    outputs = []

    def gate(t: Tensor, at: int) -> Tensor:
        return _real(t[:, at])[..., None, None]

    for t in range(T):
        if t % chunk_size == 0:
            start, recent = now, []
            V, b = [torch.zeros_like(w) for w in start], torch.ones_like(b)
        x, y = (_real(each[:, t])[..., None] for each in (k, v))  # [B, H, D, 1]
        recent.append([gate(lr, t) * u for u in memory_gradients(start, x, y, loss)])
        kept = 1 - gate(decay, t) if decay is not None else torch.ones_like(b)
        held = gate(momentum, t) if momentum is not None else torch.zeros_like(b)
        S = [held * s - sum(step[i] for step in recent[-window:]) for i, s in enumerate(S)]
        V = [kept * old + s for old, s in zip(V, S, strict=True)]
        b = kept * b
        if optimizer == "gd":
            now = [b * first + learnt for first, learnt in zip(start, V, strict=True)]
        else:
            complete = (t + 1) % chunk_size == 0
            now = [
                b * first + (newton_schulz(learnt) if complete else 0) for first, learnt in zip(start, V, strict=True)
            ]
        outputs.append(recall(now, _real(q[:, t])[..., None])[..., 0])
    o = torch.stack(outputs, 1) if outputs else torch.zeros_like(q)
    return o.to(q.dtype), [w.clone() for w in now], [s.clone() for s in S]


def recall(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """`f(x)` of columns x [B, H, D, n]."""
    if len(weights) == 1:
        return weights[0] @ x
    return x + weights[1] @ silu(weights[0] @ x)


def memory_gradients(weights: Sequence[Tensor], x: Tensor, y: Tensor, loss: str) -> list[Tensor]:
    """Of one token's loss by each weight; x, y [B, H, D, 1]."""
    if len(weights) == 1:
        delta = (weights[0] @ x if loss == "l2" else 0) - y
        return [delta @ x.mT]
    a = weights[0] @ x
    h = silu(a)
    delta = (x + weights[1] @ h if loss == "l2" else 0) - y
    below = (weights[1].mT @ delta) * silu_slope(a)
    return [below @ x.mT, delta @ h.mT]
