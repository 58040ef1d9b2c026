"""Linear attention with decay: a matrix-valued linear recurrence over time."""

from . import op, reference
from .op import linear_attention

__all__ = ["linear_attention"]

op.provide_reference(reference.linear_attention)
