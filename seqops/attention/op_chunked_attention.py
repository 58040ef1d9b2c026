"""chunked_attention: checks, the ranges of its chunks, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import register, validate
from . import op as room
from . import ranges, reference

ops = torch.ops.seqops

SCHEMA = (
    "chunked_attention(Tensor q, Tensor k, Tensor v, int chunk_size, *, bool causal=False, str activation='softmax', "
    "Tensor? bias=None, float? scale=None, Tensor? cu_seqlens=None) -> (Tensor o, Tensor lse)"
)


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    causal: bool = False,
    activation: str = "softmax",
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> None:
    op = "chunked_attention"
    room.check_heads(op, q, k, v)
    room.check_at_least(op, "chunk_size", chunk_size, 1)
    room.check_choice(op, "activation", activation, room.ACTIVATIONS)
    if bias is not None:
        check_bias(op, bias, q, chunk_size)
    validate.check_cu_seqlens(op, cu_seqlens, "q", q)


def check_bias(op: str, bias: Tensor, q: Tensor, chunk_size: int) -> None:
    validate.check_device(op, "bias", bias, "q", q)
    validate.check_dtype(op, "bias", bias, q.dtype)
    H, C = q.shape[2], chunk_size
    sizes = {2: (2 * C - 1,), 3: (C, C)}.get(bias.ndim)
    fits = sizes is not None and all(got == size for got, size in zip(bias.shape[1:], sizes, strict=True))
    expected = f"[1 or H, 2 C - 1] or [1 or H, C, C] with H = {H} and C = {C}"
    validate.expect(fits and bias.shape[0] in (1, H), op, "bias", expected, validate.shape_of(bias))


@ranges.kept
def plan(T: int, chunk_size: int, causal: bool, cu_seqlens: Tensor | None, device: torch.device) -> Tensor:
    t, start, end = ranges.sequences(T, cu_seqlens, device)
    first = t - (t - start) % chunk_size
    return ranges.stack([(first, t + 1 if causal else torch.clamp(first + chunk_size, max=end))])


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    causal: bool = False,
    activation: str = "softmax",
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    chunks = plan(q.shape[1], chunk_size, causal, cu_seqlens, q.device)
    o, lse = ops.range_attention(q, k, v, chunks, bias=bias, scale=scale, activation=activation)
    return o, lse.to(torch.float32)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.chunked_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("range_attention",),
)


def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    *,
    causal: bool = False,
    activation: str = "softmax",
    bias: Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention inside chunks: each query sees the keys of its own chunk of `chunk_size` positions.

        s_ij = scale <q_i, k_j> + bias;  lse_i = log sum_j exp s_ij;  o_i = sum_j exp(s_ij - lse_i) v_j

    Chunks count from the start of a sequence; the last one may be shorter.

    Args:
        q: [B, T, H, D], queries: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        chunk_size: C, 1 or more.
        causal: a query sees no key after its own position.
        activation: "softmax"; or, without a normaliser, `o_i = sum_j P(s_ij) v_j` with "laplace", `P(s) = (1 + erf((s -
            sqrt(1/2)) sqrt(2 pi))) / 2` (MEGA), or "relu2", `P(s) = max(s, 0)^2`; lse is then 0, without a gradient.
        bias: added to the scores: of each pair of places in a chunk [1 or H, C, C], or by their distance [1 or H,
            2 C - 1], entry `C - 1 + j - i`. In the dtype of q or, where that has 16 bits, in float32.
        scale: a number; None is D**-0.5.
        cu_seqlens: [N + 1] int32 or int64, from 0 to T without decrease: with B = 1, sequence n is the positions
            `cu_seqlens[n]:cu_seqlens[n + 1]` and independent of the others.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse [B, H, T] in float32, natural, differentiable.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps q, k, v, o and lse.

    Example:
        >>> q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
        >>> o, lse = seqops.chunked_attention(q, k, v, 32, causal=True)  # chunks of 32, 32, 32 and 4
        >>> torch.equal(o[:, 32], v[:, 32])  # the first of a chunk sees itself alone
        True

    Ma et al., "MEGA: moving average equipped gated attention", 2023.
    """
    return ops.chunked_attention(
        q, k, v, chunk_size, causal=causal, activation=activation, bias=bias, scale=scale, cu_seqlens=cu_seqlens
    )
