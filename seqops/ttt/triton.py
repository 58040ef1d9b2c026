"""Operators of the room under the backend "triton", and a list of their kernels, which the tests compile offline."""

from __future__ import annotations

from typing import Any

from . import triton_large_chunk_ttt, triton_neural_memory, triton_newton_schulz
from .triton_large_chunk_ttt import fast_weights, fast_weights_backward, fast_weights_forward
from .triton_neural_memory import memory, memory_backward, memory_forward
from .triton_newton_schulz import newton_schulz, newton_schulz_backward

__all__ = [
    "configurations",
    "fast_weights",
    "fast_weights_backward",
    "fast_weights_forward",
    "memory",
    "memory_backward",
    "memory_forward",
    "newton_schulz",
    "newton_schulz_backward",
]

PARTS = (triton_large_chunk_ttt, triton_neural_memory, triton_newton_schulz)


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    return [configuration for part in PARTS for configuration in part.configurations()]
