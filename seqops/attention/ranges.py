"""Which keys a query sees, as ranges of key positions: what `range_attention` takes for a plan.

A part gives each of Tq queries one range `first <= j < end`, as int32 [2, Tq]; a pattern is a list of parts, [1, 1, P,
2, Tq] for all rows and heads alike. Neither `first` nor `end` may decrease from a query to the next (an empty range has
first == end, at a place that keeps the order). So the queries that see one key are a range too, and the gradients of
keys walk queries as the forward walks keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

Part = tuple[Tensor, Tensor]


def stack(parts: Sequence[Part]) -> Tensor:
    """Parts (first, end), each [..., Tq], as int32 [B or 1, H or 1, P, 2, Tq]."""
    pairs = [torch.stack(torch.broadcast_tensors(first, end), -2) for first, end in parts]
    ranges = torch.stack(pairs, -3).to(torch.int32)
    return ranges.view(*(1,) * (5 - ranges.ndim), *ranges.shape)


def steps(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)


def sequences(count: int, cu_seqlens: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | int, Tensor | int]:
    """All positions, and for each the start and the end of its packed sequence."""
    t = steps(count, device)
    if cu_seqlens is None:
        return t, 0, count
    edges = cu_seqlens.long()
    number = torch.searchsorted(edges, t, right=True)
    return t, edges[number - 1], edges[number]


def kept(make: Callable[..., Any]) -> Callable[..., Any]:
    """`make(*sizes, device)`, whose last results are kept: plain tensors for plain numbers, which nobody writes to."""

    @lru_cache(maxsize=16)
    def remembered(stream: int, *key: Any) -> Any:
        with torch.inference_mode(False):  # what is made there cannot be saved for a gradient
            return make(*key)

    @wraps(make)
    def call(*key: Any) -> Any:
        plain = all(type(part) in (int, bool, str, type(None), torch.device) for part in key)
        stream = stream_of(key[-1]) if plain and not tracing() else None
        return make(*key) if stream is None else remembered(stream, *key)

    return call


def stream_of(device: torch.device) -> int | None:
    """The stream on which a tensor made now is ready; None while a CUDA graph is captured: only its replay fills it."""
    if device.type != "cuda":
        return 0
    return None if torch.cuda.is_current_stream_capturing() else torch.cuda.current_stream(device).cuda_stream


def tracing() -> bool:
    """Whether tensors made now could be other than plain ones: fake, functional, or traced."""
    if torch.compiler.is_compiling():
        return True
    modes = torch.utils._python_dispatch._len_torch_dispatch_stack()
    return bool(modes) or torch._C._are_functorch_transforms_active()


def seen_by(ranges: Tensor, keys: int) -> Tensor:
    """The same pairs from the side of the keys: [B or 1, H or 1, P, 2, keys], ranges of the queries that see a key."""
    first, end = (part.contiguous() for part in ranges.unbind(3))
    # Under vmap `ranges` may be mapped: the same dimensions for j.
    zeros = torch.zeros_like(first.sum(-1, keepdim=True, dtype=ranges.dtype))
    j = torch.arange(keys, device=ranges.device, dtype=ranges.dtype) + zeros
    # Of queries in order: the first whose range ends after j, and the first whose range starts after j.
    return torch.stack([torch.searchsorted(edge, j, right=True, out_int32=True) for edge in (end, first)], 3)
