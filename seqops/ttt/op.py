"""Checks that the operators of this room share, for tensors without data and for kernels in Python.

Letters: B batch, T time, H heads, D channels, F hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..core import validate

OPTIMIZERS = ("gd", "muon")


def check_sequences(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k, v [B, T, H, D]."""
    shape = validate.shape_of(q)
    validate.expect(q.ndim == 4, op, "q", "4 dimensions [B, T, H, D]", f"shape {shape}")
    validate.check_type(op, "q", q, validate.STORAGE)
    validate.expect(q.shape[2] >= 1 and q.shape[3] >= 1, op, "q", "at least 1 head and 1 channel", f"shape {shape}")
    for name, t in (("k", k), ("v", v)):
        validate.check_device(op, name, t, "q", q)
        validate.check_type(op, name, t, (q.dtype,))
        validate.check_shape(op, name, t, "[B, T, H, D]", q.shape)


def check_like(op: str, name: str, t: Tensor | None, letters: str, shape: Sequence[int], q: Tensor) -> None:
    """A tensor beside q, in the dtype of q or, where that has 16 bits, in float32; None passes."""
    if t is not None:
        validate.check_device(op, name, t, "q", q)
        validate.check_dtype(op, name, t, q.dtype)
        validate.check_shape(op, name, t, letters, shape)


def check_choice(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    expected = f"one of {', '.join(choices)}"
    validate.expect(value in choices, op, name, expected, repr(value))


def check_at_least(op: str, name: str, value: int, least: int) -> None:
    validate.expect(value >= least, op, name, f"an integer >= {least}", str(value))


def check_coefficients(op: str, coefficients: Sequence[float] | None) -> None:
    if coefficients is not None:
        count = len(coefficients)
        validate.expect(count % 3 == 0, op, "coefficients", "a multiple of 3 numbers", f"{count} numbers")


def check_count(op: str, name: str, tensors: Sequence[Tensor], allowed: Sequence[int]) -> None:
    expected = " or ".join(str(count) for count in allowed)
    validate.expect(len(tensors) in allowed, op, name, f"{expected} tensors", str(len(tensors)))
