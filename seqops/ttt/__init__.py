"""Test-time training: weights that learn while a sequence is read."""

from .op_large_chunk_ttt import large_chunk_ttt
from .op_neural_memory import neural_memory
from .op_newton_schulz import LACT_LM_STEPS, MUON_STEPS, newton_schulz

__all__ = ["LACT_LM_STEPS", "MUON_STEPS", "large_chunk_ttt", "neural_memory", "newton_schulz"]
