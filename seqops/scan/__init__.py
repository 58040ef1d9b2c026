"""Scans: linear recurrences and running softmax averages, in parallel over time."""

from . import op, reference
from .op import linear_scan, softmax_scan

__all__ = ["linear_scan", "softmax_scan"]

for _name in __all__:
    op.provide_reference(_name, getattr(reference, _name))
