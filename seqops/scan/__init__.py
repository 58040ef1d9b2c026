"""Scans: linear recurrences and running softmax averages, in parallel over time or over a grid."""

from . import op, op_grid_scan, reference
from .op import linear_scan, softmax_scan
from .op_grid_scan import grid_scan

__all__ = ["grid_scan", "linear_scan", "softmax_scan"]

for _name in ("linear_scan", "softmax_scan"):
    op.provide_reference(_name, getattr(reference, _name))
op.provide_reference("grid_scan", reference.grid_scan, op_grid_scan.check_grid_scan)
