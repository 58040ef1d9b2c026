"""The memory order of sequences [B, T, ...]: as that of the tensor they belong to, so that nobody copies."""

from __future__ import annotations

from torch import Tensor


def time_first(t: Tensor) -> bool:
    """Sequences are laid out like `wx`: batch first or, if that is a transposed view, time first, so nobody copies."""
    return t.stride(0) < t.stride(1)


def new_sequence(like: Tensor, *inner: int) -> Tensor:
    """An uninitialised [B, T, *inner] in the memory order of `like` [B, T, ...]."""
    batch, time = like.shape[:2]
    if time_first(like):
        stride = 1
        strides = []
        for size in reversed((time, batch, *inner)):
            strides.insert(0, stride)
            stride = stride * size
        strides[0], strides[1] = strides[1], strides[0]
        return like.new_empty_strided((batch, time, *inner), strides)
    return like.new_empty(batch, time, *inner)


def dense_inside(t: Tensor) -> Tensor:
    """With the elements of the last dimension next to each other."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def ordered(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A sequence that we made, dense in the memory order of `like`; a copy only where a caller gave another one."""
    if t is None or not time_first(like):
        return None if t is None else t.contiguous()
    return t.transpose(0, 1).contiguous().transpose(0, 1)
