"""block_diffusion_attention: checks, the ranges of its blocks, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import register, validate
from . import op as room
from . import ranges, reference

ops = torch.ops.seqops

SCHEMA = (
    "block_diffusion_attention(Tensor q, Tensor k, Tensor v, int block_size, *, float? scale=None) "
    "-> (Tensor o, Tensor lse)"
)


def check(q: Tensor, k: Tensor, v: Tensor, block_size: int, *, scale: float | None = None) -> None:
    op = "block_diffusion_attention"
    room.check_heads(op, q, k, v)
    got = f"shape {validate.shape_of(q)}"
    validate.expect(q.shape[1] % 2 == 0, op, "q", "an even number of positions, T = 2 L", got)
    room.check_at_least(op, "block_size", block_size, 1)


@ranges.kept
def plan(T: int, block_size: int, device: torch.device) -> Tensor:
    """Three parts: of a noisy row its own noisy block, and the clean blocks before; of a clean row the clean blocks up
    to its own. Where a row has no share in a part, its range is empty at the end that keeps the order."""
    L, i = T // 2, ranges.steps(T, device)
    noisy = i < L
    first = torch.where(noisy, i, i - L)
    first = first - first % block_size
    last = (first + min(block_size, room.FAR)).clamp(max=L)
    own = (torch.where(noisy, first, L), torch.where(noisy, last, L))
    before = (torch.where(noisy, L, T), torch.where(noisy, L + first, T))
    clean = (torch.full_like(i, L), torch.where(noisy, L, L + last))
    return ranges.stack([own, before, clean])


def composed(q: Tensor, k: Tensor, v: Tensor, block_size: int, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    o, lse = ops.range_attention(q, k, v, plan(q.shape[1], block_size, q.device), scale=scale)
    return o, lse.to(torch.float32)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.block_diffusion_attention,
    check=check,
    cast=("q", "k", "v"),
    parts=("range_attention",),
)


def block_diffusion_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of block diffusion: a noisy copy of a sequence and after it a clean one, in blocks, in one call.

        T = 2 L;  b(i) = floor((i mod L) / block_size)
        i < L, noisy:  N(i) = {noisy j : b(j) = b(i)} and {clean j : b(j) < b(i)}
        i >= L, clean: N(i) = {clean j : b(j) <= b(i)}
        s_ij = scale <q_i, k_j>;  lse_i = log sum_{j in N(i)} exp s_ij;  o_i = sum_{j in N(i)} exp(s_ij - lse_i) v_j

    Every block is denoised given the clean blocks before it; inside a block nothing is causal, across blocks nothing
    of a later one is seen, and no clean row sees a noisy key.

    Args:
        q: [B, T, H, D], queries, T = 2 L even, noisy rows first: float32, float64, bfloat16 or float16, any strides.
        k, v: [B, T, Hk, D], keys and values, in the dtype of q; Hk divides H, and query head h reads key head
            `h // (H / Hk)`.
        block_size: 1 or more; the last block of each half may be shorter.
        scale: a number; None is D**-0.5.

    Returns:
        o [B, T, H, D] in the dtype of q, and lse [B, H, T] in float32, natural, differentiable.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Memory: a gradient keeps q, k, v, o and lse.

    Example:
        >>> q, k, v = (torch.randn(2, 2 * 64, 4, 16) for _ in range(3))  # a noisy copy of 64 tokens, then the clean one
        >>> o, lse = seqops.block_diffusion_attention(q, k, v, 8)
        >>> noisy, clean = o.chunk(2, 1)
        >>> noisy.shape
        torch.Size([2, 64, 4, 16])

    Arriola et al., "Block diffusion: interpolating between autoregressive and diffusion language models", 2025; Wu et
    al., "Fast-dLLM v2: efficient block-diffusion LLM", 2025.
    """
    return ops.block_diffusion_attention(q, k, v, block_size, scale=scale)
