"""Causal convolutions over time: a few taps for every channel, or filters as long as the sequence."""

from . import op, op_fft_conv, reference
from .op import causal_conv1d
from .op_fft_conv import fft_conv

__all__ = ["causal_conv1d", "fft_conv"]

op.provide_reference(reference.causal_conv1d)
op_fft_conv.provide_reference(reference.fft_conv)
