"""BlockDiffusionAttention: trained on a noisy and a clean copy at once, decoded block by block from a cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import block_diffusion_attention, range_attention
from .parts import Projections, append, check_multiple, check_positive, check_sequence, expect, full_ranges, rotary

Cache = tuple[Tensor, Tensor]


class BlockDiffusionAttention(torch.nn.Module):
    """Attention for denoising a sequence block by block, each given the clean blocks before it.

        b(i) = floor((i mod L) / block_size),  L = T / 2
        i < L, noisy:  sees noisy j with b(j) = b(i) and clean j with b(j) < b(i)
        i >= L, clean: sees clean j with b(j) <= b(i)
        o_i = sum_j softmax_j(<q_i, k_j> / sqrt(D)) v_j;  y = W_o o

    q and k carry rotary positions i mod L. Inside a block nothing is causal; across blocks nothing of a later one is
    seen. Training takes both copies at once. Decoding keeps the clean blocks' keys and values, exactly:

        y, cache = module.extend(clean, cache)     # blocks that are done
        y = module.denoise(noisy, cache)           # the next one, as often as it takes

    Fast-dLLM's cache inside a block, of parts that are denoised already, is approximate and left out.

    Args:
        dim: channels of x, a multiple of num_heads.
        num_heads: H, heads of D = dim / num_heads channels, D even.
        block_size: steps of a block.
        base: of the rotary positions.
        device, dtype: of the parameters.

    Shapes: x [B, 2 L, dim], noisy steps first -> y [B, 2 L, dim]. A cache is keys and values [B, S, H, D]; it
    **grows** with the clean steps.

    Initialisation: torch.nn.Linear's, no biases.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: L^2 + L block_size products of queries and keys a head.

    Arriola et al., "Block diffusion: interpolating between autoregressive and diffusion language models", 2025; Wu et
    al., "Fast-dLLM v2: efficient block-diffusion LLM", 2025.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block_size: int,
        base: float = 10000.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, block_size=block_size)
        self.project = Projections(self, dim, num_heads, bias=False, device=device, dtype=dtype)
        check_multiple(self, "dim", dim, "2 num_heads", 2 * num_heads)
        self.dim, self.block_size, self.base = dim, block_size, base

    def forward(self, x: Tensor) -> Tensor:
        check_sequence(self, x, self.dim)
        expect(x.shape[1] % 2 == 0, self, "x", "an even number of steps, noisy and clean ones", x.shape[1])
        q, k, v = self.project(x)
        q, k = (torch.cat([rotary(half, 0, self.base) for half in t.chunk(2, 1)], 1) for t in (q, k))
        return self.project.join(block_diffusion_attention(q, k, v, self.block_size)[0])

    def extend(self, x: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Clean steps x [B, S, dim], from the start of a block on -> y, and the cache with them."""
        q, k, v, past = self.project_after(x, cache)
        i = torch.arange(past, past + x.shape[1], device=x.device, dtype=torch.int32)
        end = (i - i % self.block_size + self.block_size).clamp(max=k.shape[1])
        ranges = torch.stack([torch.zeros_like(i), end])[None, None, None]
        return self.project.join(range_attention(q, k, v, ranges)[0]), (k, v)

    def denoise(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """Noisy steps x [B, S, dim] of the block after the cache, S <= block_size -> y. The cache stays as it is."""
        q, k, v, _ = self.project_after(x, cache)
        expect(x.shape[1] <= self.block_size, self, "x", f"at most block_size = {self.block_size} steps", x.shape[1])
        return self.project.join(range_attention(q, k, v, full_ranges(q.shape[1], k.shape[1], x.device))[0])

    def project_after(self, x: Tensor, cache: Cache | None) -> tuple[Tensor, Tensor, Tensor, int]:
        """Queries of x, keys and values of the cache and of x, and how many steps the cache has."""
        check_sequence(self, x, self.dim)
        past = 0 if cache is None else cache[0].shape[1]
        whole = f"a multiple of block_size = {self.block_size} steps"
        expect(past % self.block_size == 0, self, "cache", whole, past)
        q, k, v = self.project(x)
        q, k = rotary(q, past, self.base), rotary(k, past, self.base)
        before = (None, None) if cache is None else cache
        return q, append(before[0], k), append(before[1], v), past
