"""Bad arguments: the exact message, the same on every path, before anything is computed."""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cases
import pytest
import torch
from cases import rnn, scan
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import seqops
from seqops.rnn.op import check_for_gpu


def of(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Callable[[str], torch.Tensor]:
    """A tensor to be made later, on the device under test unless one is named."""
    return lambda tested: torch.zeros(shape, dtype=dtype, device=device or tested)


def integers(*values: int, dtype: torch.dtype = torch.int64) -> Callable[[str], torch.Tensor]:
    return lambda tested: torch.tensor(values, dtype=dtype, device=tested)


@dataclass(frozen=True)
class Mistake:
    """What to change in a good call (see GOOD) and the text that must follow."""

    op: str
    text: str
    change: dict[str, Any] = field(default_factory=dict)
    needs_values: bool = False

    def __str__(self) -> str:
        return re.sub(r"[^\w.]+", "-", f"{self.op} {self.text}")


# In a good call B = 2, T = 5, D = 8, all in float32.
GOOD = {
    **{op: {"wx": of(2, 5, rnn.GATES[op], 1, 8), "r": of(rnn.GATES[op], 1, 8, 8)} for op in rnn.OPERATORS},
    "linear_scan": {"x": of(2, 5, 8), "a": of(2, 5, 8)},
    "softmax_scan": {"s": of(2, 5, 3), "v": of(2, 5, 3, 8)},
    "linear_attention": {"q": of(2, 5, 3, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 7)},
}
# What else may be given, with its shape.
OTHERS = {
    **{op: {"b": (gates, 1, 8), **dict.fromkeys(rnn.STATES[op], (2, 1, 8))} for op, gates in rnn.GATES.items()},
    "linear_scan": {"initial_state": (2, 8)},
    "softmax_scan": {"initial_lse": (2, 3), "initial_out": (2, 3, 8)},
    "linear_attention": {"log_decay": (2, 5, 3), "initial_state": (2, 3, 8, 7)},
}
HALF = {"wx": of(2, 5, 4, 1, 8, dtype=torch.bfloat16), "r": of(4, 1, 8, 8, dtype=torch.bfloat16)}

RNN = [
    Mistake("lstm", "wx: expected 5 dimensions [B, T, G, H, D], got shape [2, 3, 4]", {"wx": of(2, 3, 4)}),
    Mistake("gru", "wx: expected 5 dimensions [B, T, G, H, D], got shape []", {"wx": of()}),
    Mistake("lstm", "wx: expected 4 gates (dimension 2), got shape [2, 5, 3, 1, 8]", {"wx": of(2, 5, 3, 1, 8)}),
    Mistake("gru", "wx: expected 3 gates (dimension 2), got shape [2, 5, 4, 1, 8]", {"wx": of(2, 5, 4, 1, 8)}),
    Mistake("slstm", "wx: expected 4 gates (dimension 2), got shape [2, 5, 1, 1, 8]", {"wx": of(2, 5, 1, 1, 8)}),
    Mistake("elman", "wx: expected 1 gate (dimension 2), got shape [2, 5, 4, 1, 8]", {"wx": of(2, 5, 4, 1, 8)}),
    Mistake("lstm", "wx: expected at least 1 head and 1 unit, got shape [2, 5, 4, 1, 0]", {"wx": of(2, 5, 4, 1, 0)}),
    Mistake("lstm", "wx: expected at least 1 head and 1 unit, got shape [2, 5, 4, 0, 8]", {"wx": of(2, 5, 4, 0, 8)}),
    Mistake(
        "lstm",
        "wx: expected float32, float64, bfloat16 or float16, got int64",
        {"wx": of(2, 5, 4, 1, 8, dtype=torch.int64)},
    ),
    Mistake(
        "elman",
        "wx: expected float32, float64, bfloat16 or float16, got complex64",
        {"wx": of(2, 5, 1, 1, 8, dtype=torch.complex64)},
    ),
    Mistake("lstm", "r: expected [G, H, D, D] = [4, 1, 8, 8], got [4, 1, 8, 7]", {"r": of(4, 1, 8, 7)}),
    Mistake("gru", "r: expected [G, H, D, D] = [3, 1, 8, 8], got [4, 1, 8, 8]", {"r": of(4, 1, 8, 8)}),
    Mistake("slstm", "r: expected [G, H, D, D] = [4, 1, 8, 8], got [32, 8]", {"r": of(32, 8)}),
    Mistake("lstm", "r: expected wx's dtype float32, got float64", {"r": of(4, 1, 8, 8, dtype=torch.float64)}),
    Mistake("lstm", "r: expected wx's dtype bfloat16, got float32", {**HALF, "r": of(4, 1, 8, 8)}),
    Mistake("lstm", "b: expected [G, H, D] = [4, 1, 8], got [4, 8]", {"b": of(4, 8)}),
    Mistake("lstm", "b: expected float32, got float64", {"b": of(4, 1, 8, dtype=torch.float64)}),
    Mistake("lstm", "b: expected float32, got bfloat16", {"b": of(4, 1, 8, dtype=torch.bfloat16)}),
    Mistake("lstm", "b: expected bfloat16 or float32, got float64", {**HALF, "b": of(4, 1, 8, dtype=torch.float64)}),
    Mistake("lstm", "c0: expected bfloat16 or float32, got float16", {**HALF, "c0": of(2, 1, 8, dtype=torch.float16)}),
    Mistake(
        "gru",
        "h0: expected float64, got float32",
        {
            "wx": of(2, 5, 3, 1, 8, dtype=torch.float64),
            "r": of(3, 1, 8, 8, dtype=torch.float64),
            "b": of(3, 1, 8, dtype=torch.float64),
            "h0": of(2, 1, 8),
        },
    ),
    *(
        Mistake(op, f"{name}: expected [B, H, D] = [2, 1, 8], got {[*shape]}", {name: of(*shape)})
        for op, names in rnn.STATES.items()
        for name in names
        for shape in ((2, 8), (3, 1, 8))
    ),
    *(
        Mistake(op, f"{name}: expected float32, got int32", {name: of(2, 1, 8, dtype=torch.int32)})
        for op, names in rnn.STATES.items()
        for name in names
    ),
    Mistake("lstm", "lengths: expected int32 or int64, got float32", {"lengths": of(2)}),
    Mistake("gru", "lengths: expected int32 or int64, got bool", {"lengths": of(2, dtype=torch.bool)}),
    Mistake("lstm", "lengths: expected [B] = [2], got [3]", {"lengths": integers(1, 2, 3)}),
    Mistake("elman", "lengths: expected [B] = [2], got [2, 1]", {"lengths": of(2, 1, dtype=torch.int32)}),
    Mistake("lstm", "lengths: expected values in [0, T] = [0, 5], got 6 at index 1", {"lengths": integers(5, 6)}, True),
    Mistake(
        "slstm", "lengths: expected values in [0, T] = [0, 5], got -1 at index 0", {"lengths": integers(-1, 9)}, True
    ),
    Mistake(
        "gru",
        "lengths: expected values in [0, T] = [0, 5], got 7 at index 1",
        {"lengths": integers(0, 7, dtype=torch.int32)},
        True,
    ),
    *(Mistake(op, "grad_clip: expected a number >= 0, got -1", {"grad_clip": -1.0}) for op in rnn.OPERATORS),
    Mistake("lstm", "grad_clip: expected a number >= 0, got -0.5", {"grad_clip": -0.5}),
    Mistake("lstm", "grad_clip: expected a number >= 0, got nan", {"grad_clip": math.nan}),
    Mistake("elman", "nonlinearity: expected 'tanh' or 'relu', got 'gelu'", {"nonlinearity": "gelu"}),
    Mistake("elman", "nonlinearity: expected 'tanh' or 'relu', got ''", {"nonlinearity": ""}),
    # Of several mistakes the first in the order of the arguments is told.
    Mistake(
        "lstm",
        "r: expected [G, H, D, D] = [4, 1, 8, 8], got [4, 1, 8, 7]",
        {"r": of(4, 1, 8, 7), "c0": of(2, 8), "lengths": of(2), "grad_clip": -1.0},
    ),
    Mistake("slstm", "n0: expected [B, H, D] = [2, 1, 8], got [2]", {"n0": of(2), "m0": of(2), "grad_clip": -1.0}),
    Mistake("lstm", "lengths: expected [B] = [2], got [1]", {"lengths": integers(9), "grad_clip": -1.0}),
    Mistake("elman", "grad_clip: expected a number >= 0, got -2", {"grad_clip": -2.0, "nonlinearity": "gelu"}),
    # A bad shape is told before a bad dtype, an empty batch or an empty sequence does not hide a mistake.
    Mistake("lstm", "r: expected [G, H, D, D] = [4, 1, 8, 8], got [8]", {"r": of(8, dtype=torch.float64)}),
    Mistake("lstm", "r: expected [G, H, D, D] = [4, 1, 8, 8], got [1]", {"wx": of(0, 0, 4, 1, 8), "r": of(1)}),
    Mistake(
        "gru",
        "lengths: expected values in [0, T] = [0, 0], got 1 at index 0",
        {"wx": of(2, 0, 3, 1, 8), "lengths": integers(1, 1)},
        True,
    ),
]


def packed(edges: Callable[[str], torch.Tensor], **change: Any) -> dict[str, Any]:
    return {"x": of(1, 5, 8), "a": of(1, 5, 8), "cu_seqlens": edges} | change


def packed_softmax(edges: Callable[[str], torch.Tensor], **change: Any) -> dict[str, Any]:
    return {"s": of(1, 5, 3), "v": of(1, 5, 3, 8), "cu_seqlens": edges} | change


def both(lse: Any, out: Any, **change: Any) -> dict[str, Any]:
    return {"initial_lse": lse, "initial_out": out} | change


HALF_GATES = "bfloat16, float16 or float32"
GATES = "bfloat16, float16, float32 or complex64"
ALL_GATES = "bfloat16, float16, float32, float64, complex64 or complex128"
STORAGE = "float32, float64, bfloat16, float16, complex64 or complex128"

LINEAR = [
    ("x: expected at least 2 dimensions [B, T, *C], got shape [5]", {"x": of(5)}),
    ("x: expected at least 2 dimensions [B, T, *C], got shape []", {"x": of(), "a": of()}),
    (f"x: expected {STORAGE}, got int64", {"x": of(2, 5, 8, dtype=torch.int64)}),
    (f"x: expected {STORAGE}, got bool", {"x": of(2, 5, 8, dtype=torch.bool)}),
    ("x: expected at least 1 channel, got shape [2, 5, 0]", {"x": of(2, 5, 0), "a": of(2, 5, 1)}),
    ("x: expected at least 1 channel, got shape [2, 5, 3, 0]", {"x": of(2, 5, 3, 0), "a": of(2, 5, 1, 1)}),
    ("a: expected every dimension 1 or as in x [2, 5, 8], got [2, 5, 7]", {"a": of(2, 5, 7)}),
    ("a: expected every dimension 1 or as in x [2, 5, 8], got [2, 4, 8]", {"a": of(2, 4, 8)}),
    ("a: expected every dimension 1 or as in x [2, 5, 8], got [3, 5, 8]", {"a": of(3, 5, 8)}),
    ("a: expected every dimension 1 or as in x [2, 5, 8], got [2, 5]", {"a": of(2, 5)}),
    ("a: expected every dimension 1 or as in x [2, 5, 8], got [2, 5, 8, 1]", {"a": of(2, 5, 8, 1)}),
    ("a: expected every dimension 1 or as in x [2, 5, 8], got [2, 0, 8]", {"a": of(2, 0, 8)}),
    ("a: expected every dimension 1 or as in x [1, 5], got [2, 5]", {"x": of(1, 5), "a": of(2, 5)}),
    *(
        (f"a: expected {HALF_GATES}, got {name}", {"x": of(2, 5, 8, dtype=x), "a": of(2, 5, 8, dtype=a)})
        for x in cases.NARROW
        for name, a in (("complex64", torch.complex64), ("float64", torch.float64), ("int32", torch.int32))
    ),
    *(
        (f"a: expected {GATES}, got {name}", {"x": of(2, 5, 8, dtype=x), "a": of(2, 5, 8, dtype=a)})
        for x in (torch.float32, torch.complex64)
        for name, a in (("float64", torch.float64), ("complex128", torch.complex128), ("int64", torch.int64))
    ),
    *(
        (f"a: expected {ALL_GATES}, got int32", {"x": of(2, 5, 8, dtype=x), "a": of(2, 5, 8, dtype=torch.int32)})
        for x in (torch.float64, torch.complex128)
    ),
    ("initial_state: expected [B, *C] = [2, 8], got [3, 8]", {"initial_state": of(3, 8)}),
    ("initial_state: expected [B, *C] = [2, 8], got [2, 1, 8]", {"initial_state": of(2, 1, 8)}),
    ("initial_state: expected [B, *C] = [2], got [2, 1]", {"x": of(2, 5), "a": of(1, 1), "initial_state": of(2, 1)}),
    (
        "initial_state: expected [B, *C] = [2, 3, 8], got [2, 8]",
        {"x": of(2, 5, 3, 8), "a": of(2, 5, 3, 1), "initial_state": of(2, 8)},
    ),
    ("initial_state: expected float32, got float64", {"initial_state": of(2, 8, dtype=torch.float64)}),
    ("initial_state: expected float32, got complex64", {"initial_state": of(2, 8, dtype=torch.complex64)}),
    (
        "initial_state: expected bfloat16 or float32, got float64",
        {"x": of(2, 5, 8, dtype=torch.bfloat16), "initial_state": of(2, 8, dtype=torch.float64)},
    ),
    (
        "initial_state: expected float32 or complex64, got complex128",
        {"a": of(2, 5, 8, dtype=torch.complex64), "initial_state": of(2, 8, dtype=torch.complex128)},
    ),
    (
        "initial_state: expected complex64 or float32, got bfloat16",
        {"x": of(2, 5, 8, dtype=torch.complex64), "initial_state": of(2, 8, dtype=torch.bfloat16)},
    ),
    (
        "initial_state: expected complex128 or float64, got float32",
        {"x": of(2, 5, 8, dtype=torch.complex128), "initial_state": of(2, 8)},
    ),
    # Of several mistakes the first in the order of the arguments is told; shapes before dtypes.
    (
        "a: expected every dimension 1 or as in x [2, 5, 8], got [2]",
        {"a": of(2, dtype=torch.int32), "initial_state": of(2), "cu_seqlens": of(2)},
    ),
    ("x: expected batch 1 with cu_seqlens, got shape [2, 5, 8]", {"cu_seqlens": of(2), "initial_state": of(2)}),
    ("initial_state: expected [B, *C] = [2, 8], got [2]", {"initial_state": of(2, dtype=torch.int32)}),
    # An empty batch or an empty sequence does not hide a mistake.
    ("a: expected every dimension 1 or as in x [0, 0, 8], got [0, 0, 7]", {"x": of(0, 0, 8), "a": of(0, 0, 7)}),
    ("initial_state: expected [N, *C] = [2, 8], got [3, 8]", packed(integers(0, 2, 5), initial_state=of(3, 8))),
    (
        "initial_state: expected [N, *C] = [0, 8], got [1, 8]",
        packed(integers(0), x=of(1, 0, 8), a=of(1, 1, 8), initial_state=of(1, 8)),
    ),
]
SOFTMAX = [
    ("s: expected 3 dimensions [B, T, H], got shape [2, 5]", {"s": of(2, 5)}),
    ("s: expected 3 dimensions [B, T, H], got shape [2, 5, 3, 1]", {"s": of(2, 5, 3, 1)}),
    ("s: expected at least 1 head, got shape [2, 5, 0]", {"s": of(2, 5, 0), "v": of(2, 5, 0, 8)}),
    ("v: expected 4 dimensions [B, T, H, D], got shape [2, 5, 3]", {"v": of(2, 5, 3)}),
    ("v: expected [B, T, H] = [2, 5, 3] in front, got [2, 5, 4, 8]", {"v": of(2, 5, 4, 8)}),
    ("v: expected [B, T, H] = [2, 5, 3] in front, got [2, 1, 3, 8]", {"v": of(2, 1, 3, 8)}),
    ("v: expected at least 1 value a head, got shape [2, 5, 3, 0]", {"v": of(2, 5, 3, 0)}),
    *(
        (f"v: expected float32, float64, bfloat16 or float16, got {name}", {"v": of(2, 5, 3, 8, dtype=dtype)})
        for name, dtype in (("int32", torch.int32), ("complex64", torch.complex64))
    ),
    *(
        (f"s: expected {HALF_GATES}, got {name}", {"s": of(2, 5, 3, dtype=s), "v": of(2, 5, 3, 8, dtype=v)})
        for v in (torch.float32, *cases.NARROW)
        for name, s in (("float64", torch.float64), ("complex64", torch.complex64), ("int64", torch.int64))
    ),
    (
        "s: expected bfloat16, float16, float32 or float64, got int64",
        {"s": of(2, 5, 3, dtype=torch.int64), "v": of(2, 5, 3, 8, dtype=torch.float64)},
    ),
    ("initial_out: expected together with initial_lse, got None", {"initial_lse": of(2, 3)}),
    ("initial_lse: expected together with initial_out, got None", {"initial_out": of(2, 3, 8)}),
    ("initial_lse: expected [B, H] = [2, 3], got [2, 4]", both(of(2, 4), of(2, 3, 8))),
    ("initial_lse: expected [B, H] = [2, 3], got [2, 3, 1]", both(of(2, 3, 1), of(2, 3, 8))),
    ("initial_out: expected [B, H, D] = [2, 3, 8], got [2, 3]", both(of(2, 3), of(2, 3))),
    ("initial_lse: expected float32, got float64", both(of(2, 3, dtype=torch.float64), of(2, 3, 8))),
    ("initial_out: expected float32, got bfloat16", both(of(2, 3), of(2, 3, 8, dtype=torch.bfloat16))),
    (
        "initial_lse: expected bfloat16 or float32, got float64",
        both(of(2, 3, dtype=torch.float64), of(2, 3, 8), s=of(2, 5, 3, dtype=torch.bfloat16)),
    ),
    (
        "initial_lse: expected float32, got bfloat16",  # the dtype of v is not that of s
        both(of(2, 3, dtype=torch.bfloat16), of(2, 3, 8), v=of(2, 5, 3, 8, dtype=torch.bfloat16)),
    ),
    (
        "initial_out: expected float16 or float32, got bfloat16",
        both(of(2, 3), of(2, 3, 8, dtype=torch.bfloat16), v=of(2, 5, 3, 8, dtype=torch.float16)),
    ),
    (
        "initial_lse: expected [N, H] = [2, 3], got [1, 3]",
        packed_softmax(integers(0, 2, 5), **both(of(1, 3), of(2, 3, 8))),
    ),
    (
        "initial_out: expected [N, H, D] = [2, 3, 8], got [1, 3, 8]",
        packed_softmax(integers(0, 2, 5), **both(of(2, 3), of(1, 3, 8))),
    ),
    (
        "v: expected [B, T, H] = [2, 5, 3] in front, got [2, 5, 4, 8]",
        both(of(2), None, v=of(2, 5, 4, 8, dtype=torch.int32), cu_seqlens=of(2)),
    ),
    ("s: expected batch 1 with cu_seqlens, got shape [2, 5, 3]", {"cu_seqlens": of(2), "initial_lse": of(2)}),
]
# The same for both scans: shapes first, then what only values tell.
PACKED = [
    ("cu_seqlens: expected int32 or int64, got float32", of(3), False),
    ("cu_seqlens: expected int32 or int64, got bool", of(3, dtype=torch.bool), False),
    ("cu_seqlens: expected 1 dimension [N + 1], got shape [2, 3]", of(2, 3, dtype=torch.int32), False),
    ("cu_seqlens: expected 1 dimension [N + 1], got shape []", of(dtype=torch.int64), False),
    ("cu_seqlens: expected 1 dimension [N + 1], got shape [0]", of(0, dtype=torch.int64), False),
    ("cu_seqlens: expected 0 at index 0, got 1", integers(1, 2, 5), True),
    ("cu_seqlens: expected 0 at index 0, got -1", integers(-1, 2, 7, dtype=torch.int32), True),
    ("cu_seqlens: expected no decrease, got 2 after 5 at index 3", integers(0, 1, 5, 2), True),
    ("cu_seqlens: expected no decrease, got -3 after 0 at index 1", integers(0, -3, 5, dtype=torch.int32), True),
    ("cu_seqlens: expected T = 5 at the end, got 7", integers(0, 2, 7), True),
    ("cu_seqlens: expected T = 5 at the end, got 4", integers(0, 2, 4, dtype=torch.int32), True),
    ("cu_seqlens: expected T = 5 at the end, got 0", integers(0), True),
    ("cu_seqlens: expected T = 5 at the end, got 9223372036854775807", integers(0, 2**63 - 1), True),
]
LINEAR_ATTENTION = [
    ("q: expected 4 dimensions [B, T, H, K], got shape [2, 5, 3]", {"q": of(2, 5, 3)}),
    ("q: expected float32, float64, bfloat16 or float16, got int64", {"q": of(2, 5, 3, 8, dtype=torch.int64)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 0, 8]", {"q": of(2, 5, 0, 8)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 3, 0]", {"q": of(2, 5, 3, 0)}),
    ("k: expected float32, got bfloat16", {"k": of(2, 5, 3, 8, dtype=torch.bfloat16)}),
    ("k: expected [B, T, H, K] = [2, 5, 3, 8], got [2, 5, 3, 7]", {"k": of(2, 5, 3, 7)}),
    ("v: expected float32, got float64", {"v": of(2, 5, 3, 7, dtype=torch.float64)}),
    ("v: expected 4 dimensions [B, T, H, V], got shape [2, 5, 3]", {"v": of(2, 5, 3)}),
    ("v: expected [B, T, H] = [2, 5, 3] in front, got [2, 4, 3, 7]", {"v": of(2, 4, 3, 7)}),
    ("v: expected at least 1 channel, got shape [2, 5, 3, 0]", {"v": of(2, 5, 3, 0)}),
    ("log_decay: expected bfloat16, float16 or float32, got float64", {"log_decay": of(3, dtype=torch.float64)}),
    *(
        (
            "log_decay: expected [H] = [3], [B, T, H] = [2, 5, 3] or [B, T, H, K] = [2, 5, 3, 8], "
            f"got [{', '.join(map(str, shape))}]",
            {"log_decay": of(*shape)},
        )
        for shape in ((), (2,), (2, 5, 1), (2, 5, 3, 1))
    ),
    ("log_decay: expected None where causal is False, got a tensor", {"log_decay": of(3), "causal": False}),
    ("window: expected None where causal is False, got 3", {"window": 3, "causal": False}),
    ("window: expected an integer >= 1, got 0", {"window": 0}),
    ("initial_state: expected None with a window, got a tensor", {"window": 3, "initial_state": of(2, 3, 8, 7)}),
    ("initial_state: expected [B, H, K, V] = [2, 3, 8, 7], got [2, 3, 7, 8]", {"initial_state": of(2, 3, 7, 8)}),
    ("initial_state: expected float32, got float64", {"initial_state": of(2, 3, 8, 7, dtype=torch.float64)}),
    # Of several mistakes the first in the order of the arguments is told.
    ("k: expected [B, T, H, K] = [2, 5, 3, 8], got [1]", {"k": of(1), "v": of(1), "initial_state": of(1)}),
]
MISTAKES = [
    *RNN,
    *(Mistake("linear_attention", text, change) for text, change in LINEAR_ATTENTION),
    *(Mistake("linear_scan", text, change) for text, change in LINEAR),
    *(Mistake("softmax_scan", text, change) for text, change in SOFTMAX),
    *(Mistake("linear_scan", text, packed(edges), values) for text, edges, values in PACKED),
    *(Mistake("softmax_scan", text, packed_softmax(edges), values) for text, edges, values in PACKED),
    Mistake("linear_scan", "x: expected batch 1 with cu_seqlens, got shape [2, 5, 8]", {"cu_seqlens": integers(0, 5)}),
    Mistake("softmax_scan", "s: expected batch 1 with cu_seqlens, got shape [2, 5, 3]", {"cu_seqlens": integers(0, 5)}),
    Mistake(
        "linear_scan",
        "x: expected batch 1 with cu_seqlens, got shape [0, 5, 8]",
        packed(integers(0, 5), x=of(0, 5, 8), a=of(1, 1, 1)),
    ),
]


def arguments(mistake: Mistake, device: str) -> dict[str, Any]:
    given = GOOD[mistake.op] | mistake.change
    return {name: make(device) if callable(make) else make for name, make in given.items()}


def public(op: str, **inputs: Any) -> Any:
    return getattr(seqops, op)(**inputs)


def schema(op: str, **inputs: Any) -> Any:
    return getattr(torch.ops.seqops, op)(**inputs)


def training(op: str, **inputs: Any) -> Any:
    for value in inputs.values():
        if torch.is_tensor(value) and (value.is_floating_point() or value.is_complex()):
            value.requires_grad_()
    return getattr(seqops, op)(**inputs)


def inference(op: str, **inputs: Any) -> Any:
    with torch.inference_mode():
        return getattr(seqops, op)(**inputs)


def under_reference(op: str, **inputs: Any) -> Any:
    with seqops.backend("reference"):
        return getattr(seqops, op)(**inputs)


def under_simulator(op: str, **inputs: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch, seqops.backend("cuda"):
        patch.setenv("SEQOPS_SIMULATE", "1")
        return getattr(seqops, op)(**inputs)


@contextmanager
def refused(mistake: Mistake) -> Iterator[None]:
    with pytest.raises(ValueError) as caught:
        yield
    assert str(caught.value) == f"{mistake.op}: {mistake.text}"


@pytest.mark.parametrize("path", [public, schema, training, inference, under_reference], ids=lambda path: path.__name__)
@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_message(mistake: Mistake, path: Callable[..., Any]) -> None:
    inputs = arguments(mistake, "cpu")
    with refused(mistake):
        path(mistake.op, **inputs)


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_message_of_a_python_backend(mistake: Mistake) -> None:
    with refused(mistake):
        under_simulator(mistake.op, **arguments(mistake, "cpu"))


@pytest.mark.parametrize("path", [public, training], ids=lambda path: path.__name__)
@pytest.mark.parametrize("mistake", [m for m in MISTAKES if not m.needs_values], ids=str)
def test_message_without_values(mistake: Mistake, path: Callable[..., Any]) -> None:
    """Meta and fake tensors have shapes only."""
    with refused(mistake):
        path(mistake.op, **arguments(mistake, "meta"))
    with FakeTensorMode(), refused(mistake):
        path(mistake.op, **arguments(mistake, "cpu"))


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_devices_must_agree(op: str) -> None:
    (first, make_first), *rest = GOOD[op].items()
    shapes = {first: make_first("cpu").shape, **{name: make("cpu").shape for name, make in rest}, **OTHERS[op]}
    for name in shapes:
        if name == first:
            continue
        for ours, theirs in (("cpu", "meta"), ("meta", "cpu")):
            change = {n: of(*s, device=theirs if n == name else ours) for n, s in shapes.items()}
            mistake = Mistake(op, f"{name}: expected {first}'s device {ours}, got {theirs}", change)
            with refused(mistake):
                public(op, **arguments(mistake, ours))
    if op in rnn.OPERATORS:
        change = {"lengths": of(2, device="meta")}
    elif op == "linear_attention":
        change = {name: of(1, *make_first("cpu").shape[1:]) for name in ("q", "k")}
        change |= {"v": of(1, 5, 3, 7), "cu_seqlens": of(2, device="meta")}
    else:
        change = (packed if op == "linear_scan" else packed_softmax)(of(2, device="meta"))
    mistake = Mistake(op, f"{[*change][-1]}: expected {first}'s device cpu, got meta", change)
    with refused(mistake):
        public(op, **arguments(mistake, "cpu"))


def test_good_edges_are_accepted() -> None:
    """What lies just inside the limits that the messages name."""
    wx, r = torch.zeros(2, 5, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    for options in (
        {"lengths": torch.tensor([0, 5])},
        {"lengths": torch.tensor([0, 5], dtype=torch.int32)},
        {"grad_clip": 0.0},
        {"grad_clip": math.inf},
        {"grad_clip": 1},
    ):
        h, h_n = seqops.elman(wx, r, **options)
        assert [*h.shape] == [2, 5, 1, 1] and [*h_n.shape] == [2, 1, 1]


def test_good_edges_of_scans_are_accepted() -> None:
    """No channel dimension, no sequence, only empty ones, and gates of every dtype that is precise enough."""
    one = torch.zeros(1, 0)
    for values in ((0,), (0, 0), (0, 0, 0)):
        cu_seqlens = torch.tensor(values)
        h, last = seqops.linear_scan(one, one[:, :1], cu_seqlens=cu_seqlens)
        assert [*h.shape] == [1, 0] and [*last.shape] == [len(values) - 1]
        o, lse = seqops.softmax_scan(one[..., None].expand(1, 0, 2), torch.zeros(1, 0, 2, 3), cu_seqlens=cu_seqlens)
        assert [*o.shape] == [1, 0, 2, 3] and [*lse.shape] == [1, 0, 2]
    for dtype, gates in scan.GATES.items():
        for gate in gates:
            case = scan.example("linear_scan", dtype=dtype, gate_dtype=gate)
            assert [o.dtype for o in case.operator(**case.inputs())] == case.output_dtypes


def of_backward(op: str) -> dict[str, Tensor | None]:
    """Good arguments of a scan's backward, B = 2, T = 5."""
    if op == "linear_scan_backward":
        x = torch.zeros(2, 5, 3)
        return {"dh": x, "dfinal_state": x[:, 0], "a": x, "h": x, "initial_state": x[:, 0]}
    if op == "linear_attention_backward":
        q, v, state = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 6), torch.zeros(2, 3, 4, 6)
        tensors = {"grad_o": v, "dfinal_state": state, "q": q, "k": q, "v": v}
        return tensors | {"log_decay": q, "initial_state": state}
    s, v = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3, 4)
    tensors = {"grad_o": v, "grad_lse": s, "s": s, "v": v, "o": v, "m": s, "u": s + 1}
    return tensors | {"initial_lse": s[:, 0], "initial_out": v[:, 0]}


BACKWARD_MISTAKES = [
    (
        "linear_attention_backward",
        {"grad_o": torch.zeros(2, 5, 3, 4)},
        "grad_o: expected [B, T, H, V] = [2, 5, 3, 6], got [2, 5, 3, 4]",
    ),
    (
        "linear_attention_backward",
        {"grad_o": torch.zeros(2, 5, 3, 6).double()},
        "grad_o: expected float32, got float64",
    ),
    (
        "linear_attention_backward",
        {"dfinal_state": torch.zeros(2, 3, 6, 4)},
        "dfinal_state: expected [B, H, K, V] = [2, 3, 4, 6], got [2, 3, 6, 4]",
    ),
    ("linear_scan_backward", {"dh": None, "h": None}, "dh: expected a tensor where h is None, got None"),
    (
        "linear_scan_backward",
        {"h": torch.zeros(2, 5, 3).long()},
        "h: expected float32, float64, bfloat16, float16, complex64 or complex128, got int64",
    ),
    (
        "linear_scan_backward",
        {"h": torch.zeros(2, 2, 3)},
        "a: expected every dimension 1 or as in x [2, 2, 3], got [2, 5, 3]",
    ),
    ("linear_scan_backward", {"dh": torch.zeros(2, 5, 1)}, "dh: expected h's shape [2, 5, 3], got [2, 5, 1]"),
    ("linear_scan_backward", {"dh": torch.zeros(2, 5, 3).double()}, "dh: expected float32, got float64"),
    (
        "linear_scan_backward",
        {"a": torch.zeros(2, 5, 3) + 0j},
        "h: expected a complex dtype with complex a, got float32",
    ),
    (
        "linear_scan_backward",
        {"dfinal_state": torch.zeros(2, 4)},
        "dfinal_state: expected [B, *C] = [2, 3], got [2, 4]",
    ),
    (
        "linear_scan_backward",
        {"cu_seqlens": torch.tensor([0, 5])},
        "h: expected batch 1 with cu_seqlens, got shape [2, 5, 3]",
    ),
    (
        "softmax_scan_backward",
        {"v": torch.zeros(2, 2, 3, 4)},
        "v: expected [B, T, H] = [2, 5, 3] in front, got [2, 2, 3, 4]",
    ),
    ("softmax_scan_backward", {"m": torch.zeros(2, 2, 3)}, "m: expected [B, T, H] = [2, 5, 3], got [2, 2, 3]"),
    ("softmax_scan_backward", {"u": torch.zeros(2, 5, 3).double()}, "u: expected float32, got float64"),
    (
        "softmax_scan_backward",
        {"o": torch.zeros(2, 5, 3, 1)},
        "o: expected [B, T, H, D] = [2, 5, 3, 4], got [2, 5, 3, 1]",
    ),
    ("softmax_scan_backward", {"grad_o": torch.zeros(2, 5, 3, 4).long()}, "grad_o: expected float32, got int64"),
    ("softmax_scan_backward", {"initial_out": None}, "initial_out: expected together with initial_lse, got None"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "change", "text"), BACKWARD_MISTAKES, ids=[m[2] for m in BACKWARD_MISTAKES])
def test_backward_operators_refuse(op: str, change: dict[str, Any], text: str, device: str) -> None:
    """Our formulas call them; called by others they must not read past a tensor's end."""
    named = {"cu_seqlens": change["cu_seqlens"].to(device)} if "cu_seqlens" in change else {}
    changed = {name: value for name, value in change.items() if name != "cu_seqlens"}
    values = [None if t is None else t.to(device) for t in (of_backward(op) | changed).values()]
    with pytest.raises(ValueError) as caught:
        getattr(torch.ops.seqops, op)(*values, **named)
    assert str(caught.value) == f"{op}: {text}"


PLANES = {"lstm": 4, "gru": 3, "slstm": 7}


def of_rnn_backward(op: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor | None]:
    """Good arguments of a recurrent operator's backward, B = 2, T = 5, H = 3, D = 4."""
    schema = getattr(torch.ops.seqops, f"{op}_backward").default._schema.arguments
    shapes = {"r": (rnn.GATES[op], 3, 4, 4)} | dict.fromkeys(("dh", "c", "y", "h"), (2, 5, 3, 4))
    shapes |= dict.fromkeys(("p", "cache"), (2, 5, PLANES.get(op), 3, 4))
    return {a.name: torch.zeros(shapes.get(a.name, (2, 3, 4)), dtype=dtype) for a in schema if not a.kwarg_only}


STATE_SHAPE = "expected [B, H, D] = [2, 3, 4], got"
RNN_BACKWARD_MISTAKES = [
    ("lstm", {"p": torch.zeros(2, 5, 3, 4)}, "lstm_backward: p: expected 5 dimensions, got shape [2, 5, 3, 4]"),
    ("elman", {"h": torch.zeros(2, 3, 4)}, "elman_backward: h: expected 4 dimensions, got shape [2, 3, 4]"),
    (
        "slstm",
        {"cache": torch.zeros(2, 5, 7, 3, 4).long()},
        "slstm_backward: cache: expected float32, float64, bfloat16 or float16, got int64",
    ),
    (
        "gru",
        {"p": torch.zeros(2, 5, 4, 3, 4)},
        "gru_backward: p: expected [B, T, G, H, D] = [2, 5, 3, 3, 4], got [2, 5, 4, 3, 4]",
    ),
    # Nothing there: no heads, or heads without units.
    *(
        (
            op,
            {name: torch.zeros(*shape, H, D)},
            f"{op}_backward: {name}: expected at least 1 head and 1 unit, got shape {[*shape, H, D]}",
        )
        for op, name, shape in (
            ("lstm", "p", (2, 5, 4)),
            ("gru", "p", (2, 5, 3)),
            ("slstm", "cache", (2, 5, 7)),
            ("elman", "h", (2, 5)),
        )
        for H, D in ((0, 4), (3, 0))
    ),
    ("gru", {"r": torch.zeros(3, 4, 4)}, "gru_backward: r: expected [G, H, D, D] = [3, 3, 4, 4], got [3, 4, 4]"),
    ("lstm", {"r": torch.zeros(4, 3, 4, 4).double()}, "lstm_backward: r: expected float32, got float64"),
    (
        "lstm",
        {"dh": torch.zeros(2, 5, 3)},
        "lstm_backward: dh: expected [B, T, H, D] = [2, 5, 3, 4], got [2, 5, 3]",
    ),
    ("elman", {"dh": torch.zeros(2, 5, 3, 4).bfloat16()}, "elman_backward: dh: expected float32, got bfloat16"),
    (
        "lstm",
        {"c": torch.zeros(5, 2, 3, 4)},
        "lstm_backward: c: expected [B, T, H, D] = [2, 5, 3, 4], got [5, 2, 3, 4]",
    ),
    ("gru", {"y": torch.zeros(2, 5, 3, 4).double()}, "gru_backward: y: expected float32, got float64"),
    ("gru", {"h": torch.zeros(2)}, "gru_backward: h: expected [B, T, H, D] = [2, 5, 3, 4], got [2]"),
    *(
        (op, {f"d{name[0]}_n": torch.zeros(2, 3)}, f"{op}_backward: gradient of a final state: {STATE_SHAPE} [2, 3]")
        for op, names in rnn.STATES.items()
        for name in names
    ),
    *(
        (op, {name: torch.zeros(3, 2, 4)}, f"{op}_backward: initial state: {STATE_SHAPE} [3, 2, 4]")
        for op, name in (("lstm", "c0"), ("gru", "h0"), ("slstm", "c0"), ("slstm", "n0"))
    ),
    *(
        ("slstm", {name: torch.zeros(2, 3, 4).double()}, "slstm_backward: final state: expected float32, got float64")
        for name in ("c_n", "n_n")
    ),
    ("lstm", {"lengths": torch.tensor([1])}, "lstm: lengths: expected [B] = [2], got [1]"),
    ("gru", {"lengths": torch.zeros(2)}, "gru: lengths: expected int32 or int64, got float32"),
    ("slstm", {"grad_clip": -1.0}, "slstm: grad_clip: expected a number >= 0, got -1"),
    ("elman", {"nonlinearity": "gelu"}, "elman: nonlinearity: expected 'tanh' or 'relu', got 'gelu'"),
    # Of several mistakes the same one is told.
    (
        "elman",
        {"nonlinearity": "gelu", "grad_clip": -1.0, "h": torch.zeros(1)},
        "elman: nonlinearity: expected 'tanh' or 'relu', got 'gelu'",
    ),
    ("gru", {"grad_clip": -1.0, "p": torch.zeros(1)}, "gru: grad_clip: expected a number >= 0, got -1"),
    (
        "lstm",
        {"dh": torch.zeros(1), "dh_n": torch.zeros(1), "r": torch.zeros(1)},
        "lstm_backward: r: expected [G, H, D, D] = [4, 3, 4, 4], got [1]",
    ),
    (
        "lstm",
        {"dc_n": torch.zeros(2), "c": torch.zeros(1), "lengths": torch.zeros(1)},
        "lstm_backward: c: expected [B, T, H, D] = [2, 5, 3, 4], got [1]",
    ),
    (
        "slstm",
        {"c_n": torch.zeros(1), "c0": torch.zeros(2), "dm_n": torch.zeros(3), "lengths": torch.zeros(1)},
        f"slstm_backward: gradient of a final state: {STATE_SHAPE} [3]",
    ),
    (
        "slstm",
        {"c_n": torch.zeros(1), "n0": torch.zeros(2), "lengths": torch.zeros(1)},
        f"slstm_backward: initial state: {STATE_SHAPE} [2]",
    ),
]


@pytest.mark.parametrize("path", ["cpu", "meta", "cuda"])
@pytest.mark.parametrize(("op", "change", "text"), RNN_BACKWARD_MISTAKES)
def test_rnn_backward_operators_refuse(
    op: str, change: dict[str, Any], text: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same words from C++, from a backend in Python, and without values."""
    device = "meta" if path == "meta" else "cpu"
    given = {name: t.to(device) if torch.is_tensor(t) else t for name, t in (of_rnn_backward(op) | change).items()}
    positional = [given.pop(name) for name in of_rnn_backward(op)]
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    with seqops.backend("cuda" if path == "cuda" else "cpu"), pytest.raises(ValueError) as caught:
        getattr(torch.ops.seqops, f"{op}_backward")(*positional, **given)
    assert str(caught.value) == text


@pytest.mark.parametrize("op", rnn.OPERATORS)
def test_sizes_that_gpu_kernels_do_not_count(op: str) -> None:
    """Refused before anything is computed, by a check of their own: the CPU kernels know no such limit."""
    G, most = rnn.GATES[op], 2**31 - 1
    for B, T, H, D, text in (
        (1, 2**31, 1, 1, "fewer than 2^31 steps on a GPU"),
        (1, 2**33, 2, 1, "fewer than 2^31 steps on a GPU"),
        (2**31, 1, 1, 1, "B H D below 2^31 on a GPU"),
        (2**16, 1, 2**10, 2**5, "B H D below 2^31 on a GPU"),
        (1, most, 1, 1, None),
        (most, 1, 1, 1, None),
    ):
        wx, r = torch.empty(B, T, G, H, D, device="meta"), torch.empty(G, H, D, D, device="meta")
        saved = torch.empty(B, T, *((PLANES[op],) if op in PLANES else ()), H, D, device="meta")
        sequence, state = torch.empty(B, T, H, D, device="meta"), torch.empty(B, H, D, device="meta")
        values = {"r": r, "p": saved, "cache": saved, "h": sequence, "c": sequence, "y": sequence}
        values |= {"c_n": state, "n_n": state}
        name = next(each for each in ("p", "cache", "h") if each in of_rnn_backward(op))
        calls = (
            ((False, wx, r), f"{op}: wx", [*wx.shape]),
            ((True, *map(values.get, of_rnn_backward(op))), f"{op}_backward: {name}", [*values[name].shape]),
        )
        for arguments, where, shape in calls:
            if text is None:
                check_for_gpu(op, *arguments)
                continue
            with pytest.raises(ValueError) as caught:
                check_for_gpu(op, *arguments)
            assert str(caught.value) == f"{where}: expected {text}, got shape {shape}"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError) as caught, seqops.backend("magic"):
        pass
    assert str(caught.value) == "backend: expected one of reference, cpu, triton, cuda, got 'magic'"
