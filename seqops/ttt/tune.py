"""What of this room `seqops tune` can choose tile sizes for."""

from __future__ import annotations

from . import tune_neural_memory_cuda, tune_neural_memory_triton, tune_newton_schulz

TARGETS = [*tune_neural_memory_cuda.TARGETS, *tune_neural_memory_triton.TARGETS, *tune_newton_schulz.TARGETS]
