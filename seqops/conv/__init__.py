"""Causal convolutions over time: a few taps for every channel, or filters as long as the sequence."""

from . import op, reference
from .op import causal_conv1d

__all__ = ["causal_conv1d"]

op.provide_reference(reference.causal_conv1d)
