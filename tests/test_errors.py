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
from torch.utils._pytree import tree_leaves

import seqops
from seqops.core import backend as backends
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
    "conv_ssm": {
        "u": of(2, 5, 4, 6, 8),
        "a": of(7, dtype=torch.complex64),
        "b": of(3, 3, 8, 7, dtype=torch.complex64),
        "c": of(1, 2, 7, 8, dtype=torch.complex64),
    },
    "ssm_kernel": {"z": of(2, 5, dtype=torch.complex64), "c": of(2, 5, dtype=torch.complex64), "length": 7},
    "cauchy_kernel": {
        name: of(*s, dtype=torch.complex64) for name, s in (("v", (2, 5)), ("nodes", (7,)), ("w", (2, 5)))
    },
    "fft_conv": {"u": of(2, 5, 8), "k": of(8, 3)},
    "causal_conv1d": {"x": of(2, 5, 8), "weight": of(8, 3)},
    "grid_scan": {
        **dict.fromkeys(("x_r", "x_d"), of(2, 5, 4, 3, 8)),
        **dict.fromkeys(("t_rl", "t_ru", "t_dl", "t_du"), of(2, 5, 4, 3)),
    },
    "linear_attention": {"q": of(2, 5, 3, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 7)},
    "chunked_attention": {"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8), "chunk_size": 3},
    "range_attention": {
        **{
            "q": of(2, 5, 6, 8),
            "k": of(2, 4, 3, 8),
            "v": of(2, 4, 3, 8),
            "ranges": of(1, 6, 3, 2, 5, dtype=torch.int32),
        },
        **{"k2": of(2, 7, 3, 8), "v2": of(2, 7, 3, 8), "ranges2": of(2, 1, 1, 2, 5, dtype=torch.int32)},
    },
    "window_attention": {"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8), "left": 2, "right": 1},
    "block_diffusion_attention": {"q": of(2, 6, 6, 8), "k": of(2, 6, 3, 8), "v": of(2, 6, 3, 8), "block_size": 2},
    "combiner_attention": {"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8), "block_size": 2},
    "delta_attention": {
        **{"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8)},
        **{"threshold": 0.5, "window": 2},
    },
    "gathered_attention": {
        **{"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8)},
        **{"q_index": of(2, 6, 4, 3, dtype=torch.int64), "k_index": of(2, 6, 4, 5, dtype=torch.int32)},
    },
    "routing_attention": {
        **{"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8)},
        **{"centroids": of(6, 4, 8), "size": 3},
    },
    "cluster_assign": {"x": of(2, 5, 6, 8), "centroids": of(6, 4, 8), "size": 3},
    "update_centroids": {
        **{"x": of(2, 5, 6, 8), "centroids": of(6, 4, 8)},
        "nearest": of(2, 5, 6, dtype=torch.int32),
    },
    "merge_attention": {
        **dict.fromkeys(("o1", "o2"), of(2, 5, 3, 8)),
        **dict.fromkeys(("lse1", "lse2"), of(2, 3, 5)),
    },
    "prob_sparse_attention": {
        **{"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8)},
        **{"sample_index": of(5, 4, dtype=torch.int64), "top": 2},
    },
    "pointer_scores": {"query": of(2, 5, 8), "key": of(2, 4, 8), "weight": of(8)},
    "newton_schulz": {"x": of(2, 5, 8)},
    "large_chunk_ttt": {
        **dict.fromkeys(("q", "k", "v"), of(2, 5, 3, 8)),
        **{"w0": of(2, 3, 6, 8), "w1": of(2, 3, 8, 6), "w2": of(2, 3, 6, 8), "lr": of(2, 5, 3, 3), "chunk_size": 2},
    },
    "neural_memory": {
        **dict.fromkeys(("q", "k", "v"), of(2, 5, 3, 8)),
        **{"lr": of(2, 5, 3), "weights": [of(2, 3, 6, 8), of(2, 3, 8, 6)], "chunk_size": 2},
    },
}
# What else may be given, with its shape.
OTHERS = {
    **{op: {"b": (gates, 1, 8), **dict.fromkeys(rnn.STATES[op], (2, 1, 8))} for op, gates in rnn.GATES.items()},
    "linear_scan": {"initial_state": (2, 8)},
    "softmax_scan": {"initial_lse": (2, 3), "initial_out": (2, 3, 8)},
    "conv_ssm": {"d": (1, 1, 8, 8), "initial_state": (2, 4, 6, 7)},
    "ssm_kernel": {},
    "cauchy_kernel": {},
    "fft_conv": {"skip": (8,)},
    "causal_conv1d": {"bias": (8,), "initial_state": (2, 2, 8)},
    "grid_scan": {"initial_left": (2, 4, 3, 8), "initial_top": (2, 5, 3, 8)},
    "linear_attention": {"log_decay": (2, 5, 3), "initial_state": (2, 3, 8, 7)},
    "chunked_attention": {"bias": (6, 5)},
    "range_attention": {},
    "window_attention": {},
    "block_diffusion_attention": {},
    "combiner_attention": {},
    "delta_attention": {},
    "merge_attention": {},
    "gathered_attention": {},
    "routing_attention": {},
    "cluster_assign": {},
    "update_centroids": {},
    "prob_sparse_attention": {},
    "pointer_scores": {},
    "newton_schulz": {},
    "large_chunk_ttt": {"momentum": (2, 5, 3), "momentum_state": [(2, 3, 6, 8), (2, 3, 8, 6), (2, 3, 6, 8)]},
    "neural_memory": {
        **dict.fromkeys(("decay", "momentum"), (2, 5, 3)),
        "momentum_state": [(2, 3, 6, 8), (2, 3, 8, 6)],
    },
}
HEADED = (
    "chunked_attention",
    "window_attention",
    "combiner_attention",
    "delta_attention",
    "gathered_attention",
    "routing_attention",
    "prob_sparse_attention",
)
HEADED_PACKED = ("chunked_attention", "window_attention")


def rows(batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Queries, keys and values of so many rows."""
    return {name: of(batch, 5, heads, 8, dtype=dtype) for name, heads in (("q", 6), ("k", 3), ("v", 3))}


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
CONV_SSM = [
    ("u: expected 5 dimensions [B, T, Y, X, U], got shape [2, 5, 4, 8]", {"u": of(2, 5, 4, 8)}),
    ("u: expected float32, float64, bfloat16 or float16, got int64", {"u": of(2, 5, 4, 6, 8, dtype=torch.int64)}),
    *(
        (f"u: expected at least 1 row, 1 column and 1 channel, got shape {[*shape]}", {"u": of(*shape)})
        for shape in ((2, 5, 0, 6, 8), (2, 5, 4, 0, 8), (2, 5, 4, 6, 0))
    ),
    ("a: expected [P] with P of 1 or more, got [1, 7]", {"a": of(1, 7, dtype=torch.complex64)}),
    ("a: expected [P] with P of 1 or more, got [0]", {"a": of(0, dtype=torch.complex64)}),
    ("a: expected complex64, got float32", {"a": of(7)}),
    ("a: expected complex64, got complex128", {"a": of(7, dtype=torch.complex128)}),
    ("a: expected complex128, got complex64", {"u": of(2, 5, 4, 6, 8, dtype=torch.float64)}),
    ("b: expected [kh, kw, U, P] = [kh, kw, 8, 7], got [3, 3, 7, 8]", {"b": of(3, 3, 7, 8, dtype=torch.complex64)}),
    ("b: expected [kh, kw, U, P] = [kh, kw, 8, 7], got [8, 7]", {"b": of(8, 7, dtype=torch.complex64)}),
    ("b: expected kh and kw of 1 or more, got [3, 0, 8, 7]", {"b": of(3, 0, 8, 7, dtype=torch.complex64)}),
    ("b: expected complex64, got float32", {"b": of(3, 3, 8, 7)}),
    ("c: expected [kh, kw, P, U] = [kh, kw, 7, 8], got [1, 1, 8, 7]", {"c": of(1, 1, 8, 7, dtype=torch.complex64)}),
    ("c: expected kh and kw of 1 or more, got [0, 1, 7, 8]", {"c": of(0, 1, 7, 8, dtype=torch.complex64)}),
    ("c: expected complex64, got complex128", {"c": of(1, 1, 7, 8, dtype=torch.complex128)}),
    ("d: expected [kh, kw, U, U] = [kh, kw, 8, 8], got [1, 1, 8, 7]", {"d": of(1, 1, 8, 7)}),
    ("d: expected kh and kw of 1 or more, got [0, 0, 8, 8]", {"d": of(0, 0, 8, 8)}),
    ("d: expected float32, got complex64", {"d": of(1, 1, 8, 8, dtype=torch.complex64)}),
    (
        "d: expected bfloat16 or float32, got float16",
        {"u": of(2, 5, 4, 6, 8, dtype=torch.bfloat16), "d": of(1, 1, 8, 8, dtype=torch.float16)},
    ),
    ("initial_state: expected [B, Y, X, P] = [2, 4, 6, 7], got [2, 7]", {"initial_state": of(2, 7)}),
    ("initial_state: expected complex64, got float32", {"initial_state": of(2, 4, 6, 7)}),
    # Of several mistakes the first in the order of the arguments is told.
    ("b: expected complex64, got float32", {"b": of(3, 3, 8, 7), "c": of(1), "initial_state": of(1)}),
]
KERNELS = [
    ("ssm_kernel", "z: expected 2 dimensions [H, N], got shape [2, 5, 1]", {"z": of(2, 5, 1, dtype=torch.complex64)}),
    ("ssm_kernel", "z: expected complex64 or complex128, got float32", {"z": of(2, 5)}),
    ("ssm_kernel", "c: expected [H, N] = [2, 5], got [2, 4]", {"c": of(2, 4, dtype=torch.complex64)}),
    ("ssm_kernel", "c: expected complex64, got complex128", {"c": of(2, 5, dtype=torch.complex128)}),
    ("ssm_kernel", "c: expected complex64, got float32", {"c": of(2, 5)}),
    ("ssm_kernel", "length: expected 0 or more, got -1", {"length": -1}),
    ("ssm_kernel", "c: expected [H, N] = [2, 5], got [5]", {"c": of(5), "length": -1}),
    ("cauchy_kernel", "v: expected 2 dimensions [H, N], got shape [5]", {"v": of(5, dtype=torch.complex64)}),
    ("cauchy_kernel", "v: expected complex64 or complex128, got bfloat16", {"v": of(2, 5, dtype=torch.bfloat16)}),
    ("cauchy_kernel", "nodes: expected 1 dimension [L], got shape [1, 7]", {"nodes": of(1, 7, dtype=torch.complex64)}),
    ("cauchy_kernel", "nodes: expected complex64, got float32", {"nodes": of(7)}),
    ("cauchy_kernel", "w: expected [H, N] = [2, 5], got [5, 2]", {"w": of(5, 2, dtype=torch.complex64)}),
    ("cauchy_kernel", "w: expected complex64, got complex128", {"w": of(2, 5, dtype=torch.complex128)}),
    ("cauchy_kernel", "nodes: expected complex64, got int64", {"nodes": of(7, dtype=torch.int64), "w": of(1)}),
]
FFT_CONV = [
    ("u: expected 3 dimensions [B, T, D], got shape [2, 5, 1, 8]", {"u": of(2, 5, 1, 8)}),
    ("u: expected at least 1 channel, got shape [2, 5, 0]", {"u": of(2, 5, 0), "k": of(0, 3)}),
    ("u: expected float32, float64, bfloat16 or float16, got complex64", {"u": of(2, 5, 8, dtype=torch.complex64)}),
    ("k: expected 2 or 3 dimensions [D, L] or [D, N, L], got shape [8]", {"k": of(8)}),
    ("k: expected 2 or 3 dimensions [D, L] or [D, N, L], got shape [8, 1, 1, 3]", {"k": of(8, 1, 1, 3)}),
    ("k: expected D = 8 in front, got [7, 3]", {"k": of(7, 3)}),
    ("k: expected at least 1 kernel a channel, got shape [8, 0, 3]", {"k": of(8, 0, 3)}),
    ("k: expected float32, got float64", {"k": of(8, 3, dtype=torch.float64)}),
    ("k: expected float64, got float32", {"u": of(2, 5, 8, dtype=torch.float64)}),
    (
        "k: expected bfloat16 or float32, got float16",
        {"u": of(2, 5, 8, dtype=torch.bfloat16), "k": of(8, 3, dtype=torch.float16)},
    ),
    ("skip: expected [D] = [8], got [8, 1]", {"skip": of(8, 1)}),
    ("skip: expected [D] = [8], got [1]", {"skip": of(1)}),
    ("skip: expected float32, got bfloat16", {"skip": of(8, dtype=torch.bfloat16)}),
]
CAUSAL_CONV1D = [
    ("x: expected 3 dimensions [B, T, D], got shape [5, 8]", {"x": of(5, 8)}),
    ("x: expected at least 1 channel, got shape [2, 5, 0]", {"x": of(2, 5, 0), "weight": of(0, 3)}),
    ("x: expected float32, float64, bfloat16 or float16, got int64", {"x": of(2, 5, 8, dtype=torch.int64)}),
    ("weight: expected [D, W] with D = 8 and W >= 1, got [3, 8]", {"weight": of(3, 8)}),
    ("weight: expected [D, W] with D = 8 and W >= 1, got [8, 1, 3]", {"weight": of(8, 1, 3)}),
    ("weight: expected [D, W] with D = 8 and W >= 1, got [8, 0]", {"weight": of(8, 0)}),
    ("weight: expected float32, got float64", {"weight": of(8, 3, dtype=torch.float64)}),
    (
        "weight: expected bfloat16 or float32, got float16",
        {"x": of(2, 5, 8, dtype=torch.bfloat16), "weight": of(8, 3, dtype=torch.float16)},
    ),
    ("bias: expected [D] = [8], got [8, 1]", {"bias": of(8, 1)}),
    ("bias: expected float32, got bfloat16", {"bias": of(8, dtype=torch.bfloat16)}),
    ("dilation: expected an integer >= 1, got 0", {"dilation": 0}),
    ("dilation: expected an integer >= 1, got -3", {"dilation": -3}),
    ("dilation: expected (W - 1) * dilation below 2**40, got 4611686018427387904", {"dilation": 1 << 62}),
    ("activation: expected None or 'silu', got 'relu'", {"activation": "relu"}),
    ("activation: expected None or 'silu', got ''", {"activation": ""}),
    (
        "initial_state: expected [B, (W - 1) * dilation, D] = [2, 8, 8], got [2, 2, 8]",
        {"dilation": 4, "initial_state": of(2, 2, 8)},
    ),
    (
        "initial_state: expected [N, (W - 1) * dilation, D] = [3, 2, 8], got [1, 2, 8]",
        {"x": of(1, 5, 8), "cu_seqlens": integers(0, 2, 2, 5), "initial_state": of(1, 2, 8)},
    ),
    ("initial_state: expected float32, got float64", {"initial_state": of(2, 2, 8, dtype=torch.float64)}),
    (
        "initial_state: expected bfloat16, got float32",
        {
            "x": of(2, 5, 8, dtype=torch.bfloat16),
            "weight": of(8, 3, dtype=torch.bfloat16),
            "initial_state": of(2, 2, 8),
        },
    ),
    ("x: expected batch 1 with cu_seqlens, got shape [2, 5, 8]", {"cu_seqlens": integers(0, 5)}),
]
NODES, OF_GATES = "[B, X, Y, H, D] = [2, 5, 4, 3, 8]", "[B, X, Y, H] = [2, 5, 4, 3]"
GRID = [
    ("x_r: expected 5 dimensions [B, X, Y, H, D], got shape [2, 5, 4, 8]", {"x_r": of(2, 5, 4, 8)}),
    ("x_r: expected 5 dimensions [B, X, Y, H, D], got shape []", {"x_r": of()}),
    ("x_r: expected at least 1 head and 1 channel, got shape [2, 5, 4, 0, 8]", {"x_r": of(2, 5, 4, 0, 8)}),
    ("x_r: expected at least 1 head and 1 channel, got shape [2, 5, 4, 3, 0]", {"x_r": of(2, 5, 4, 3, 0)}),
    *(
        (f"x_r: expected float32, float64, bfloat16 or float16, got {name}", {"x_r": of(2, 5, 4, 3, 8, dtype=dtype)})
        for name, dtype in (("int64", torch.int64), ("complex64", torch.complex64))
    ),
    (f"x_d: expected {NODES}, got [2, 5, 4, 3, 7]", {"x_d": of(2, 5, 4, 3, 7)}),
    (f"x_d: expected {NODES}, got [2, 5, 4, 3]", {"x_d": of(2, 5, 4, 3)}),
    ("x_d: expected float32, got bfloat16", {"x_d": of(2, 5, 4, 3, 8, dtype=torch.bfloat16)}),
    *(
        (f"{name}: expected {OF_GATES}, got {[*shape]}", {name: of(*shape)})
        for name in ("t_rl", "t_ru", "t_dl", "t_du")
        for shape in ((2, 5, 4), (2, 4, 5, 3), (2, 5, 4, 3, 1))
    ),
    *(
        (f"{name}: expected {HALF_GATES}, got {got}", {name: of(2, 5, 4, 3, dtype=dtype)})
        for name in ("t_rl", "t_ru", "t_dl", "t_du")
        for got, dtype in (("float64", torch.float64), ("int32", torch.int32))
    ),
    (
        "t_dl: expected bfloat16, float16, float32 or float64, got complex64",
        {
            **dict.fromkeys(("x_r", "x_d"), of(2, 5, 4, 3, 8, dtype=torch.float64)),
            "t_dl": of(2, 5, 4, 3, dtype=torch.complex64),
        },
    ),
    (
        "initial_left: expected [B, Y, H, D] = [2, 4, 3, 8], got [2, 5, 3, 8]",
        {"initial_left": of(2, 5, 3, 8), "initial_top": of(2)},
    ),
    ("initial_top: expected [B, X, H, D] = [2, 5, 3, 8], got [2, 4, 3, 8]", {"initial_top": of(2, 4, 3, 8)}),
    ("initial_left: expected float32, got float64", {"initial_left": of(2, 4, 3, 8, dtype=torch.float64)}),
    (
        "initial_top: expected bfloat16 or float32, got float16",
        {
            **dict.fromkeys(("x_r", "x_d"), of(2, 5, 4, 3, 8, dtype=torch.bfloat16)),
            "initial_top": of(2, 5, 3, 8, dtype=torch.float16),
        },
    ),
    # Of several mistakes the first in the order of the arguments is told; an empty grid does not hide one.
    (f"x_d: expected {NODES}, got [1]", {"x_d": of(1, dtype=torch.int64), "t_rl": of(1), "initial_left": of(1)}),
    ("t_ru: expected [B, X, Y, H] = [2, 5, 4, 3], got [1]", {"t_ru": of(1), "t_du": of(1), "initial_top": of(1)}),
    (
        "t_rl: expected [B, X, Y, H] = [2, 0, 4, 3], got [2, 5, 4, 3]",
        {**dict.fromkeys(("x_r", "x_d"), of(2, 0, 4, 3, 8))},
    ),
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
# Of every operator whose first three arguments are queries, keys and values.
HEADS = [
    ("q: expected 4 dimensions [B, T, H, D], got shape [2, 5, 6]", {"q": of(2, 5, 6)}),
    ("q: expected float32, float64, bfloat16 or float16, got int64", {"q": of(2, 5, 6, 8, dtype=torch.int64)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 0, 8]", {"q": of(2, 5, 0, 8)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 6, 0]", {"q": of(2, 5, 6, 0)}),
    ("k: expected float32, got bfloat16", {"k": of(2, 5, 3, 8, dtype=torch.bfloat16)}),
    *(
        (f"k: expected [B, T, Hk, D] = [2, 5, Hk, 8], got {[*shape]}", {"k": of(*shape)})
        for shape in ((2, 5, 3, 7), (2, 4, 3, 8), (1, 5, 3, 8), (2, 5, 8))
    ),
    *(
        (f"k: expected a number of heads that divides q's 6, got shape {[*shape]}", {"k": of(*shape), "v": of(1)})
        for shape in ((2, 5, 4, 8), (2, 5, 12, 8), (2, 5, 0, 8))
    ),
    ("v: expected float32, got float64", {"v": of(2, 5, 3, 8, dtype=torch.float64)}),
    *(
        (f"v: expected [B, T, Hk, D] = [2, 5, 3, 8], got {[*shape]}", {"v": of(*shape)})
        for shape in ((2, 5, 6, 8), (2, 5, 3, 7), (2, 5, 3))
    ),
    # Of several mistakes the first in the order of the arguments is told; an empty batch does not hide one.
    ("k: expected [B, T, Hk, D] = [2, 5, Hk, 8], got [1]", {"k": of(1), "v": of(1)}),
    ("v: expected [B, T, Hk, D] = [0, 5, 3, 8], got [0, 5, 1, 8]", {**rows(0), "v": of(0, 5, 1, 8)}),
]
BIASES = "[1 or H, 2 C - 1] or [1 or H, C, C] with H = 6 and C = 3"
CHUNKED = [
    *((f"chunk_size: expected an integer >= 1, got {size}", {"chunk_size": size}) for size in (0, -4)),
    *(
        (f"activation: expected one of softmax, laplace, relu2, got {name!r}", {"activation": name})
        for name in ("gelu", "")
    ),
    *(
        (f"bias: expected {BIASES}, got {[*shape]}", {"bias": of(*shape)})
        for shape in ((), (5,), (6, 3), (2, 5), (6, 3, 5), (3, 3, 3), (1, 6, 3, 3))
    ),
    ("bias: expected float32, got float64", {"bias": of(6, 5, dtype=torch.float64)}),
    (
        "bias: expected bfloat16 or float32, got float16",
        {**rows(2, torch.bfloat16), "bias": of(6, 5, dtype=torch.float16)},
    ),
    ("q: expected batch 1 with cu_seqlens, got shape [2, 5, 6, 8]", {"cu_seqlens": integers(0, 5)}),
    # Of several mistakes the first in the order of the arguments is told.
    ("chunk_size: expected an integer >= 1, got 0", {"chunk_size": 0, "activation": "gelu", "bias": of(1)}),
    (f"bias: expected {BIASES}, got [1]", {"bias": of(1), "cu_seqlens": of(2)}),
]
ONE_SOURCE = dict.fromkeys(("k2", "v2", "ranges2"))
RANGES = "[B or 1, H or 1, P, 2, Tq] = [2 or 1, 6 or 1, P, 2, 5]"
RANGE_BIASES = "[1 or H, 2 C - 1] or [1 or H, C, C] with H = 6"
RANGE = [
    ("q: expected 4 dimensions [B, T, H, D], got shape [2, 5, 6]", {"q": of(2, 5, 6)}),
    ("q: expected float32, float64, bfloat16 or float16, got int64", {"q": of(2, 5, 6, 8, dtype=torch.int64)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 6, 0]", {"q": of(2, 5, 6, 0)}),
    ("k: expected float32, got float16", {"k": of(2, 4, 3, 8, dtype=torch.float16)}),
    *(
        (f"k: expected [B, Tk, Hk, D] = [2, Tk, Hk, 8], got {[*shape]}", {"k": of(*shape)})
        for shape in ((2, 4, 3, 7), (1, 4, 3, 8), (2, 4, 8))
    ),
    *(
        (f"k: expected a number of heads that divides q's 6, got shape {[*shape]}", {"k": of(*shape)})
        for shape in ((2, 4, 4, 8), (2, 4, 0, 8))
    ),
    ("v: expected float32, got float64", {"v": of(2, 4, 3, 8, dtype=torch.float64)}),
    ("v: expected [B, Tk, Hk, D] = [2, 4, 3, 8], got [2, 5, 3, 8]", {"v": of(2, 5, 3, 8)}),
    *(
        (f"{name}: expected {RANGES}, got {[*shape]}", {name: of(*shape, dtype=torch.int32)})
        for name in ("ranges", "ranges2")
        for shape in ((1, 6, 3, 2, 4), (1, 6, 0, 2, 5), (1, 6, 3, 5, 2), (3, 1, 1, 2, 5), (1, 3, 1, 2, 5), (1, 1, 2, 5))
    ),
    ("ranges: expected int32, got int64", {"ranges": of(1, 1, 1, 2, 5, dtype=torch.int64)}),
    ("ranges2: expected int32, got float32", {"ranges2": of(1, 1, 1, 2, 5)}),
    ("k2: expected k2, v2 and ranges2 together, got None, a tensor and a tensor", {"k2": None}),
    ("k2: expected k2, v2 and ranges2 together, got None, None and a tensor", {"k2": None, "v2": None}),
    ("k2: expected k2, v2 and ranges2 together, got a tensor, a tensor and None", {"ranges2": None}),
    ("k2: expected float32, got bfloat16", {"k2": of(2, 7, 3, 8, dtype=torch.bfloat16)}),
    *(
        (f"k2: expected [B, S, Hk, D] = [2, S, Hk, 8], got {[*shape]}", {"k2": of(*shape)})
        for shape in ((2, 7, 3, 9), (1, 7, 3, 8), (7, 3, 8))
    ),
    ("k2: expected k's 3 heads, got shape [2, 7, 6, 8]", {"k2": of(2, 7, 6, 8)}),
    ("v2: expected float32, got float64", {"v2": of(2, 7, 3, 8, dtype=torch.float64)}),
    ("v2: expected [B, S, Hk, D] = [2, 7, 3, 8], got [2, 6, 3, 8]", {"v2": of(2, 6, 3, 8)}),
    ("bias: expected None with k2, got a tensor", {"bias": of(6, 5)}),
    *(
        (f"bias: expected {RANGE_BIASES}, got {[*shape]}", {**ONE_SOURCE, "bias": of(*shape)})
        for shape in ((), (5,), (6, 4), (2, 5), (6, 3, 5), (6, 0, 0), (1, 6, 3, 3))
    ),
    ("bias: expected float32, got float64", {**ONE_SOURCE, "bias": of(6, 5, dtype=torch.float64)}),
    ("activation: expected one of softmax, laplace, relu2, got 'gelu'", {"activation": "gelu"}),
    # Of several mistakes the first in the order of the arguments is told; an empty batch does not hide one.
    (f"ranges: expected {RANGES}, got [1]", {"ranges": of(1, dtype=torch.int32), "k2": of(1), "activation": ""}),
    (
        "v: expected [B, Tk, Hk, D] = [0, 4, 3, 8], got [0, 4, 1, 8]",
        {
            **{"q": of(0, 5, 6, 8), "k": of(0, 4, 3, 8), "v": of(0, 4, 1, 8)},
        },
    ),
]
WINDOW = [
    *((f"{name}: expected an integer >= -1, got -2", {name: -2}) for name in ("left", "right")),
    ("global_index: expected int32 or int64, got float32", {"global_index": of(3)}),
    ("global_index: expected int32 or int64, got bool", {"global_index": of(3, dtype=torch.bool)}),
    ("global_index: expected 1 dimension [G], got shape [3, 1]", {"global_index": of(3, 1, dtype=torch.int64)}),
    ("global_index: expected 1 dimension [G], got shape []", {"global_index": of(dtype=torch.int32)}),
    ("q: expected batch 1 with cu_seqlens, got shape [2, 5, 6, 8]", {"cu_seqlens": integers(0, 5)}),
    # Of several mistakes the first in the order of the arguments is told.
    ("left: expected an integer >= -1, got -9", {"left": -9, "right": -9, "global_index": of(3)}),
]
ODD = {"q": of(2, 5, 6, 8), "k": of(2, 5, 3, 8), "v": of(2, 5, 3, 8)}
BLOCK_DIFFUSION = [
    ("q: expected 4 dimensions [B, T, H, D], got shape [2, 6, 6]", {"q": of(2, 6, 6)}),
    ("k: expected [B, T, Hk, D] = [2, 6, Hk, 8], got [2, 5, 3, 8]", {"k": of(2, 5, 3, 8)}),
    ("v: expected [B, T, Hk, D] = [2, 6, 3, 8], got [2, 6, 2, 8]", {"v": of(2, 6, 2, 8)}),
    ("q: expected an even number of positions, T = 2 L, got shape [2, 5, 6, 8]", ODD),
    *((f"block_size: expected an integer >= 1, got {size}", {"block_size": size}) for size in (0, -4)),
    # Of several mistakes the first in the order of the arguments is told.
    ("q: expected an even number of positions, T = 2 L, got shape [2, 5, 6, 8]", {**ODD, "block_size": 0}),
]
COMBINER = [
    ("block_size: expected an integer >= 1, got 0", {"block_size": 0}),
    ("pattern: expected one of fixed, logsparse, axial, got 'strided'", {"pattern": "strided"}),
    ("pool: expected one of max, mean, got 'sum'", {"pool": "sum"}),
]
DELTA = [
    ("threshold: expected a number >= 0, got -0.5", {"threshold": -0.5}),
    ("threshold: expected a number >= 0, got nan", {"threshold": math.nan}),
    *((f"{name}: expected an integer >= 0, got -1", {name: -1}) for name in ("window", "sink")),
    ("mode: expected one of element, row, got 'column'", {"mode": "column"}),
    # Of several mistakes the first in the order of the arguments is told.
    ("threshold: expected a number >= 0, got -2", {"threshold": -2.0, "window": -1, "mode": ""}),
]
MERGE = [
    ("o1: expected 4 dimensions [B, T, H, D], got shape [2, 5, 3]", {"o1": of(2, 5, 3)}),
    ("o1: expected float32, float64, bfloat16 or float16, got int64", {"o1": of(2, 5, 3, 8, dtype=torch.int64)}),
    ("o1: expected at least 1 head and 1 channel, got shape [2, 5, 0, 8]", {"o1": of(2, 5, 0, 8)}),
    ("o1: expected at least 1 head and 1 channel, got shape [2, 5, 3, 0]", {"o1": of(2, 5, 3, 0)}),
    ("lse1: expected float32, got float64", {"lse1": of(2, 3, 5, dtype=torch.float64)}),
    ("lse1: expected [B, H, T] = [2, 3, 5], got [2, 5, 3]", {"lse1": of(2, 5, 3)}),
    ("o2: expected float32, got bfloat16", {"o2": of(2, 5, 3, 8, dtype=torch.bfloat16)}),
    ("o2: expected [B, T, H, D] = [2, 5, 3, 8], got [2, 5, 3, 7]", {"o2": of(2, 5, 3, 7)}),
    ("lse2: expected [B, H, T] = [2, 3, 5], got [2, 3]", {"lse2": of(2, 3)}),
    (
        "lse1: expected float32 or float64, got bfloat16",
        {"o1": of(2, 5, 3, 8, dtype=torch.float64), "lse1": of(2, 3, 5, dtype=torch.bfloat16)},
    ),
    (
        "lse2: expected float64, got float32",
        {
            **dict.fromkeys(("o1", "o2"), of(2, 5, 3, 8, dtype=torch.float64)),
            "lse1": of(2, 3, 5, dtype=torch.float64),
        },
    ),
    # Of several mistakes the first in the order of the arguments is told; an empty batch does not hide one.
    ("lse1: expected [B, H, T] = [2, 3, 5], got [1]", {"lse1": of(1), "o2": of(1)}),
    (
        "lse2: expected [B, H, T] = [0, 3, 5], got [0, 3, 4]",
        {
            **dict.fromkeys(("o1", "o2"), of(0, 5, 3, 8)),
            "lse1": of(0, 3, 5),
            "lse2": of(0, 3, 4),
        },
    ),
]
GATHERED = [
    ("q_index: expected int32 or int64, got float32", {"q_index": of(2, 6, 4, 3)}),
    *(
        (f"q_index: expected [B, H, K, w] = [2, 6, K, w], got {[*shape]}", {"q_index": of(*shape, dtype=torch.int64)})
        for shape in ((2, 3, 4, 3), (1, 6, 4, 3), (6, 4, 3))
    ),
    ("k_index: expected int32 or int64, got bool", {"k_index": of(2, 6, 4, 5, dtype=torch.bool)}),
    (
        "k_index: expected [B, H, K, w'] = [2, 6, 4, w'], got [2, 6, 3, 5]",
        {"k_index": of(2, 6, 3, 5, dtype=torch.int64)},
    ),
    ("reduce: expected one of mean, sum, last, got 'max'", {"reduce": "max"}),
]
CENTROIDS = [
    *(
        (f"centroids: expected [H, K, D] = [6, K >= 1, 8], got {[*shape]}", {"centroids": of(*shape)})
        for shape in ((6, 8), (3, 4, 8), (6, 0, 8), (6, 4, 7))
    ),
    ("centroids: expected float32, got float64", {"centroids": of(6, 4, 8, dtype=torch.float64)}),
]
SIZES = [(f"size: expected an integer >= 1, got {size}", {"size": size}) for size in (0, -2)]
TOKENS = [
    ("x: expected 4 dimensions [B, T, H, D], got shape [2, 5, 6]", {"x": of(2, 5, 6)}),
    ("x: expected float32, float64, bfloat16 or float16, got int64", {"x": of(2, 5, 6, 8, dtype=torch.int64)}),
    ("x: expected at least 1 head and 1 channel, got shape [2, 5, 0, 8]", {"x": of(2, 5, 0, 8)}),
]
NEAREST = [
    ("nearest: expected [B, T, H] = [2, 5, 6], got [2, 6, 5]", {"nearest": of(2, 6, 5, dtype=torch.int64)}),
    ("nearest: expected int32 or int64, got float32", {"nearest": of(2, 5, 6)}),
]
PROB_SPARSE = [
    ("sample_index: expected int32 or int64, got float32", {"sample_index": of(5, 4)}),
    ("sample_index: expected [T, U] = [5, U], got [4, 5]", {"sample_index": of(4, 5, dtype=torch.int32)}),
    ("sample_index: expected [T, U] = [5, U], got [5]", {"sample_index": of(5, dtype=torch.int32)}),
    ("top: expected an integer >= 1, got 0", {"top": 0}),
    # Of several mistakes the first in the order of the arguments is told.
    ("sample_index: expected [T, U] = [5, U], got [2]", {"sample_index": of(2, dtype=torch.int32), "top": 0}),
]
POINTER = [
    ("query: expected 3 dimensions [B, Tq, A], got shape [2, 5, 3, 8]", {"query": of(2, 5, 3, 8)}),
    ("query: expected float32, float64, bfloat16 or float16, got int64", {"query": of(2, 5, 8, dtype=torch.int64)}),
    ("query: expected at least 1 channel, got shape [2, 5, 0]", {"query": of(2, 5, 0)}),
    ("key: expected float32, got bfloat16", {"key": of(2, 4, 8, dtype=torch.bfloat16)}),
    ("key: expected [B, Tk, A] = [2, Tk, 8], got [2, 4, 7]", {"key": of(2, 4, 7)}),
    ("key: expected [B, Tk, A] = [2, Tk, 8], got [3, 4, 8]", {"key": of(3, 4, 8)}),
    ("key: expected [B, Tk, A] = [2, Tk, 8], got [2, 8]", {"key": of(2, 8)}),
    ("mode: expected one of additive, clipped_dot, got 'dot'", {"mode": "dot"}),
    ("weight: expected a tensor with mode 'additive', got None", {"weight": None}),
    ("weight: expected [A] = [8], got [8, 1]", {"weight": of(8, 1)}),
    ("weight: expected [A] = [8], got [5]", {"weight": of(5), "mode": "clipped_dot"}),
    ("weight: expected float32, got float64", {"weight": of(8, dtype=torch.float64)}),
    (
        "weight: expected bfloat16 or float32, got float16",
        {
            **{"query": of(2, 5, 8, dtype=torch.bfloat16), "key": of(2, 4, 8, dtype=torch.bfloat16)},
            "weight": of(8, dtype=torch.float16),
        },
    ),
    ("clip: expected a number > 0, got 0", {"clip": 0.0}),
    ("clip: expected a number > 0, got -2.5", {"clip": -2.5}),
    ("clip: expected a number > 0, got nan", {"clip": math.nan}),
    ("lengths: expected int32 or int64, got float32", {"lengths": of(2)}),
    ("lengths: expected [B] = [2], got [3]", {"lengths": integers(1, 2, 3)}),
    # Of several mistakes the first in the order of the arguments is told; an empty batch does not hide one.
    ("key: expected [B, Tk, A] = [2, Tk, 8], got [1]", {"key": of(1), "weight": of(1), "lengths": integers(1)}),
    ("lengths: expected [B] = [0], got [1]", {"query": of(0, 5, 8), "key": of(0, 4, 8), "lengths": integers(1)}),
]
NEWTON_SCHULZ = [
    *(
        (f"x: expected at least 2 dimensions [..., M, N], got shape {[*shape]}", {"x": of(*shape)})
        for shape in ((), (5,))
    ),
    *(
        (f"x: expected float32, float64, bfloat16 or float16, got {name}", {"x": of(5, 8, dtype=dtype)})
        for name, dtype in (("int64", torch.int64), ("complex64", torch.complex64))
    ),
    *(
        (f"coefficients: expected a multiple of 3 numbers, got {count} numbers", {"coefficients": [0.5] * count})
        for count in (1, 4, 14)
    ),
    ("eps: expected a number >= 0, got -1", {"eps": -1.0}),
    ("eps: expected a number >= 0, got nan", {"eps": math.nan}),
    # Of several mistakes the first in the order of the arguments is told.
    ("x: expected at least 2 dimensions [..., M, N], got shape [8]", {"x": of(8), "coefficients": [1.0]}),
]
NARROW_HEADS = dict.fromkeys(("q", "k", "v"), of(2, 5, 3, 8, dtype=torch.bfloat16))
# Of both operators whose weights learn from keys and values.
LEARNING = [
    ("q: expected 4 dimensions [B, T, H, D], got shape [2, 5, 3]", {"q": of(2, 5, 3)}),
    ("q: expected float32, float64, bfloat16 or float16, got int64", {"q": of(2, 5, 3, 8, dtype=torch.int64)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 0, 8]", {"q": of(2, 5, 0, 8)}),
    ("q: expected at least 1 head and 1 channel, got shape [2, 5, 3, 0]", {"q": of(2, 5, 3, 0)}),
    ("k: expected float32, got bfloat16", {"k": of(2, 5, 3, 8, dtype=torch.bfloat16)}),
    *(
        (f"{name}: expected [B, T, H, D] = [2, 5, 3, 8], got {[*shape]}", {name: of(*shape)})
        for name, shape in (("k", (2, 4, 3, 8)), ("k", (2, 5, 8)), ("v", (2, 5, 1, 8)), ("v", (2, 5, 3, 7)))
    ),
    *((f"chunk_size: expected an integer >= 1, got {size}", {"chunk_size": size}) for size in (0, -4)),
    ("momentum: expected [B, T, H] = [2, 5, 3], got [2, 5, 3, 1]", {"momentum": of(2, 5, 3, 1)}),
    ("momentum: expected float32, got float64", {"momentum": of(2, 5, 3, dtype=torch.float64)}),
    ("optimizer: expected one of gd, muon, got 'adam'", {"optimizer": "adam"}),
    # Of several mistakes the first in the order of the arguments is told.
    ("k: expected [B, T, H, D] = [2, 5, 3, 8], got [1]", {"k": of(1), "lr": of(1), "chunk_size": 0}),
]
LARGE_CHUNK = [
    ("w0: expected 4 dimensions [B, H, F, D], got shape [3, 6, 8]", {"w0": of(3, 6, 8)}),
    ("w0: expected [B, H, F, D] = [2, 3, 6, 8], got [2, 3, 6, 7]", {"w0": of(2, 3, 6, 7)}),
    ("w1: expected [B, H, D, F] = [2, 3, 8, 6], got [2, 3, 6, 8]", {"w1": of(2, 3, 6, 8)}),
    ("w2: expected [B, H, F, D] = [2, 3, 6, 8], got [2, 3, 5, 8]", {"w2": of(2, 3, 5, 8)}),
    (
        "w0: expected at least 1 hidden channel, got shape [2, 3, 0, 8]",
        {"w0": of(2, 3, 0, 8), "w1": of(2, 3, 8, 0), "w2": of(2, 3, 0, 8)},
    ),
    ("w2: expected float32, got float64", {"w2": of(2, 3, 6, 8, dtype=torch.float64)}),
    ("w0: expected bfloat16 or float32, got float16", {**NARROW_HEADS, "w0": of(2, 3, 6, 8, dtype=torch.float16)}),
    ("lr: expected [B, T, H, 3] = [2, 5, 3, 3], got [2, 5, 3]", {"lr": of(2, 5, 3)}),
    ("lr: expected float32, got bfloat16", {"lr": of(2, 5, 3, 3, dtype=torch.bfloat16)}),
    *(
        (f"momentum_state: expected 3 tensors, got {count}", {"momentum_state": [of(2, 3, 6, 8)] * count})
        for count in (0, 1, 4)
    ),
    (
        "momentum_state[1]: expected [B, H, D, F] = [2, 3, 8, 6], got [2, 3, 6, 8]",
        {"momentum_state": [of(2, 3, 6, 8)] * 3},
    ),
    ("order: expected one of apply_update, update_apply, full, got 'update'", {"order": "update"}),
    *(
        (f"coefficients: expected a multiple of 3 numbers, got {count} numbers", {"coefficients": [0.5] * count})
        for count in (1, 4)
    ),
    # Of several mistakes the first in the order of the arguments is told.
    ("lr: expected [B, T, H, 3] = [2, 5, 3, 3], got [1]", {"lr": of(1), "chunk_size": 0, "order": ""}),
]
MEMORY = [
    ("lr: expected [B, T, H] = [2, 5, 3], got [2, 5, 3, 3]", {"lr": of(2, 5, 3, 3)}),
    ("lr: expected float32, got float64", {"lr": of(2, 5, 3, dtype=torch.float64)}),
    ("decay: expected [B, T, H] = [2, 5, 3], got [2, 3, 5]", {"decay": of(2, 3, 5)}),
    ("decay: expected bfloat16 or float32, got float16", {**NARROW_HEADS, "decay": of(2, 5, 3, dtype=torch.float16)}),
    *((f"weights: expected 1 or 2 tensors, got {count}", {"weights": [of(2, 3, 8, 8)] * count}) for count in (0, 3)),
    ("weights[0]: expected [B, H, D, D] = [2, 3, 8, 8], got [2, 3, 6, 8]", {"weights": [of(2, 3, 6, 8)]}),
    ("weights[0]: expected 4 dimensions [B, H, F, D], got shape [3, 6, 8]", {"weights": [of(3, 6, 8), of(2, 3, 8, 6)]}),
    (
        "weights[0]: expected at least 1 hidden channel, got shape [2, 3, 0, 8]",
        {"weights": [of(2, 3, 0, 8), of(2, 3, 8, 0)]},
    ),
    ("weights[1]: expected [B, H, D, F] = [2, 3, 8, 6], got [2, 3, 6, 8]", {"weights": [of(2, 3, 6, 8)] * 2}),
    ("weights[1]: expected float32, got float64", {"weights": [of(2, 3, 6, 8), of(2, 3, 8, 6, dtype=torch.float64)]}),
    *(
        (f"momentum_state: expected 2 tensors, got {count}", {"momentum_state": [of(2, 3, 6, 8)] * count})
        for count in (0, 1, 3)
    ),
    (
        "momentum_state[1]: expected [B, H, D, F] = [2, 3, 8, 6], got [2, 3, 6, 8]",
        {"momentum_state": [of(2, 3, 6, 8)] * 2},
    ),
    (
        "momentum_state[0]: expected [B, H, D, D] = [2, 3, 8, 8], got [2, 3, 8, 6]",
        {"weights": [of(2, 3, 8, 8)], "momentum_state": [of(2, 3, 8, 6)]},
    ),
    ("loss: expected one of l2, dot, got 'l1'", {"loss": "l1"}),
    *((f"window: expected an integer >= 1, got {size}", {"window": size}) for size in (0, -1)),
    # Of several mistakes the first in the order of the arguments is told.
    ("lr: expected [B, T, H] = [2, 5, 3], got [1]", {"lr": of(1), "weights": [], "window": 0}),
    ("chunk_size: expected an integer >= 1, got 0", {"chunk_size": 0, "decay": of(1), "loss": ""}),
]
MISTAKES = [
    *RNN,
    *(Mistake("newton_schulz", text, change) for text, change in NEWTON_SCHULZ),
    *(Mistake(op, text, change) for op in ("large_chunk_ttt", "neural_memory") for text, change in LEARNING),
    *(Mistake("large_chunk_ttt", text, change) for text, change in LARGE_CHUNK),
    *(Mistake("neural_memory", text, change) for text, change in MEMORY),
    *(Mistake("gathered_attention", text, change) for text, change in GATHERED),
    *(Mistake("routing_attention", text, change) for text, change in (*CENTROIDS, *SIZES)),
    *(Mistake("cluster_assign", text, change) for text, change in (*TOKENS, *CENTROIDS, *SIZES)),
    Mistake("cluster_assign", "mode: expected one of balanced, causal, got 'best'", {"mode": "best"}),
    *(Mistake("update_centroids", text, change) for text, change in (*TOKENS, *CENTROIDS, *NEAREST)),
    *(Mistake(op, text, change) for op in HEADED for text, change in HEADS),
    *(
        Mistake(op, text, rows(1) | {"cu_seqlens": edges}, values)
        for op in HEADED_PACKED
        for text, edges, values in PACKED
    ),
    *(Mistake("chunked_attention", text, change) for text, change in CHUNKED),
    *(Mistake("range_attention", text, change) for text, change in RANGE),
    *(Mistake("window_attention", text, change) for text, change in WINDOW),
    *(Mistake("block_diffusion_attention", text, change) for text, change in BLOCK_DIFFUSION),
    *(Mistake("combiner_attention", text, change) for text, change in COMBINER),
    *(Mistake("delta_attention", text, change) for text, change in DELTA),
    *(Mistake("merge_attention", text, change) for text, change in MERGE),
    *(Mistake("prob_sparse_attention", text, change) for text, change in PROB_SPARSE),
    *(Mistake("pointer_scores", text, change) for text, change in POINTER),
    *(Mistake(op, text, change) for op, text, change in KERNELS),
    *(Mistake("conv_ssm", text, change) for text, change in CONV_SSM),
    *(Mistake("causal_conv1d", text, change) for text, change in CAUSAL_CONV1D),
    *(
        Mistake("causal_conv1d", text, {"x": of(1, 5, 8), "cu_seqlens": edges}, values)
        for text, edges, values in PACKED
    ),
    *(Mistake("fft_conv", text, change) for text, change in FFT_CONV),
    *(Mistake("grid_scan", text, change) for text, change in GRID),
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
    def made(make: Any) -> Any:
        if isinstance(make, list):
            return [made(each) for each in make]
        return make(device) if callable(make) else make

    return {name: made(make) for name, make in (GOOD[mistake.op] | mistake.change).items()}


def public(op: str, **inputs: Any) -> Any:
    return getattr(seqops, op)(**inputs)


def schema(op: str, **inputs: Any) -> Any:
    return getattr(torch.ops.seqops, op)(**inputs)


def training(op: str, **inputs: Any) -> Any:
    for value in tree_leaves(inputs):
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
    """Or in the interpreter, where there are kernels in Triton only."""
    name = next(name for name in backends.GPU_BACKENDS if backends._exists(op, name))
    with pytest.MonkeyPatch.context() as patch, seqops.backend(name):
        patch.setenv({"triton": "TRITON_INTERPRET", "cuda": "SEQOPS_SIMULATE"}[name], "1")
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


def one_by_one(arguments: dict[str, Any]) -> dict[str, Any]:
    """A list `weights` as `weights[0]`, `weights[1]`."""
    named = {name: value for name, value in arguments.items() if not isinstance(value, list)}
    lists = {name: value for name, value in arguments.items() if isinstance(value, list)}
    return named | {f"{name}[{i}]": each for name, value in lists.items() for i, each in enumerate(value)}


def in_lists(arguments: dict[str, Any]) -> dict[str, Any]:
    """What `one_by_one` was given."""
    lists: dict[str, Any] = {}
    for name, value in arguments.items():
        first, bracket, _ = name.partition("[")
        if bracket:
            lists.setdefault(first, []).append(value)
        else:
            lists[name] = value
    return lists


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_devices_must_agree(op: str) -> None:
    first = next(iter(GOOD[op]))
    made = {name: make("cpu") for name, make in one_by_one(GOOD[op]).items() if callable(make)}
    shapes = {**{name: t.shape for name, t in made.items()}, **one_by_one(OTHERS[op])}
    # Where the first one is complex, all are.
    dtype = made[first].dtype
    indices = {n: t.dtype for n, t in made.items() if not (t.is_floating_point() or t.is_complex())}
    for name in shapes:
        if name == first:
            continue
        for ours, theirs in (("cpu", "meta"), ("meta", "cpu")):
            change = {
                n: of(*s, dtype=indices.get(n, dtype), device=theirs if n == name else ours) for n, s in shapes.items()
            }
            mistake = Mistake(op, f"{name}: expected {first}'s device {ours}, got {theirs}", in_lists(change))
            with refused(mistake):
                public(op, **arguments(mistake, ours))
    if op in rnn.OPERATORS:
        change = {"lengths": of(2, device="meta")}
    elif op == "linear_attention":
        change = {"q": of(1, 5, 3, 8), "k": of(1, 5, 3, 8), "v": of(1, 5, 3, 7), "cu_seqlens": of(2, device="meta")}
    elif op in HEADED_PACKED:
        change = rows(1) | {"cu_seqlens": of(2, device="meta")}
    elif op == "causal_conv1d":
        change = {"x": of(1, 5, 8), "cu_seqlens": of(2, device="meta")}
    elif op not in scan.OPERATORS:
        return
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


def of_backward(op: str) -> dict[str, Any]:
    """Good arguments of a backward, B = 2, T = 5."""
    if op == "grid_scan_backward":
        x, t, border = torch.zeros(2, 5, 5, 3, 4), torch.zeros(2, 5, 5, 3), torch.zeros(2, 5, 3, 4)
        gates = dict.fromkeys(("t_rl", "t_ru", "t_dl", "t_du"), t)
        tensors = {"dr": x, "dd": x, **gates, "r": x, "d": x}
        return tensors | {"initial_left": border, "initial_top": border}
    if op == "linear_scan_backward":
        x = torch.zeros(2, 5, 3)
        return {"dh": x, "dfinal_state": x[:, 0], "a": x, "h": x, "initial_state": x[:, 0]}
    if op == "ssm_kernel_backward":
        z = torch.zeros(2, 5) + 0j
        return {"dk": torch.zeros(2, 7), "z": z, "c": z}
    if op == "cauchy_kernel_backward":
        v = torch.zeros(2, 5) + 0j
        return {"dy": torch.zeros(2, 7) + 0j, "v": v, "nodes": torch.zeros(7) + 0j, "w": v}
    if op == "conv_ssm_backward":
        u, a, x = torch.zeros(2, 5, 1, 3, 4), torch.zeros(6) + 0j, torch.zeros(2, 1, 3, 6) + 0j
        b, c, d = (torch.zeros(1, 1, *sizes) for sizes in ((4, 6), (6, 4), (4, 4)))
        tensors = {"dy": u, "dfinal_state": x, "u": u, "a": a, "b": b + 0j, "c": c + 0j, "d": d, "initial_state": x}
        return tensors | {"entering": x[:, None][:, :0]}
    if op == "causal_conv1d_backward":
        x, state = torch.zeros(2, 5, 4), torch.zeros(2, 2, 4)
        others = {"weight": torch.zeros(4, 3), "bias": torch.zeros(4), "initial_state": state}
        return {"dy": x, "dfinal_state": state, "x": x, **others}
    if op == "fft_conv_backward":
        dy, u, k = torch.zeros(2, 5, 4, 3), torch.zeros(2, 5, 4), torch.zeros(4, 3, 7)
        return {"dy": dy, "u": u, "k": k, "skip": k[:, 0, 0], "for_u": True, "for_k": True}
    if op == "range_attention_backward":
        q, k, lse = torch.zeros(2, 5, 3, 4), torch.zeros(2, 6, 3, 4), torch.zeros(2, 3, 5)
        ranges, seen = (torch.zeros(1, 1, 1, 2, count, dtype=torch.int32) for count in (5, 6))
        tensors = {"grad_o": q, "grad_lse": lse, "o": q, "lse": lse, "q": q, "k": k, "v": k, "ranges": ranges}
        tensors |= {"seen": seen, "k2": k, "v2": k, "ranges2": ranges, "seen2": seen}
        return tensors | {"bias": None}
    if op == "linear_attention_backward":
        q, v, state = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3, 6), torch.zeros(2, 3, 4, 6)
        tensors = {"grad_o": v, "dfinal_state": state, "q": q, "k": q, "v": v}
        return tensors | {"log_decay": q, "initial_state": state}
    if op == "newton_schulz_backward":
        x = torch.zeros(2, 5, 4)
        return {"dx": x, "x": x, "coefficients": [1.0, 2.0, 3.0], "eps": 1e-7}
    if op == "fast_weights_backward":
        q, rate = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3)
        weights = [torch.zeros(2, 3, *sizes) for sizes in ((6, 4), (4, 6), (6, 4))]
        tensors = [q, q, q, *weights, rate[..., None].expand(2, 5, 3, 3), rate, *weights]
        kept = torch.ops.seqops.fast_weights_forward(*tensors, 2)[7:]
        names = "grad_o dw0 dw1 dw2 dm0 dm1 dm2 q k v w0 w1 w2 lr momentum m0 m1 m2 weights sums norms products"
        return dict(zip(names.split(), (q, *weights, *weights, *tensors, *kept), strict=True)) | {"chunk_size": 2}
    if op in ("memory", "memory_forward", "memory_backward"):
        q, rate = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3)
        weights = {"w1": torch.zeros(2, 3, 6, 4), "w2": torch.zeros(2, 3, 4, 6)}
        tensors = {"q": q, "k": q, "v": q, "lr": rate, "decay": rate, "momentum": rate, **weights}
        tensors |= {"s1": weights["w1"], "s2": weights["w2"]}
        if op != "memory_backward":
            return tensors | {"chunk_size": 2}
        grads = {"grad_o": q, **{f"grad_{name}": tensors[name] for name in ("w1", "w2", "s1", "s2")}}
        states = torch.zeros(2, 3, 1, 96)  # before the only segment: w1, w2, s1, s2
        return {**grads, **tensors, "states": states, "chunk_size": 2}
    s, v = torch.zeros(2, 5, 3), torch.zeros(2, 5, 3, 4)
    tensors = {"grad_o": v, "grad_lse": s, "s": s, "v": v, "o": v, "m": s, "u": s + 1}
    return tensors | {"initial_lse": s[:, 0], "initial_out": v[:, 0]}


BACKWARD_MISTAKES = [
    *(
        ("range_attention_backward", {name: torch.zeros(*shape)}, f"{name}: expected {letters}, got {[*shape]}")
        for name, shape, letters in (
            ("grad_o", (2, 5, 3, 5), "[B, Tq, H, D] = [2, 5, 3, 4]"),
            ("grad_lse", (2, 5, 3), "[B, H, Tq] = [2, 3, 5]"),
            ("o", (5, 3, 4), "[B, Tq, H, D] = [2, 5, 3, 4]"),
            ("lse", (2, 3), "[B, H, Tq] = [2, 3, 5]"),
        )
    ),
    *(
        (
            "range_attention_backward",
            {name: torch.zeros(1, 1, 1, 2, 5, dtype=torch.int32)},
            f"{name}: expected [B or 1, H or 1, P, 2, {letter}] = [2 or 1, 3 or 1, P, 2, 6], got [1, 1, 1, 2, 5]",
        )
        for name, letter in (("seen", "Tk"), ("seen2", "S"))
    ),
    (
        "range_attention_backward",
        {"grad_lse": torch.zeros(2, 3, 5).double()},
        "grad_lse: expected float32, got float64",
    ),
    ("range_attention_backward", {"seen2": None}, "seen2: expected one where there is k2, got None"),
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
    (
        "conv_ssm_backward",
        {"dy": torch.zeros(2, 5, 3)},
        "dy: expected [B, T, Y, X, U] = [2, 5, 1, 3, 4], got [2, 5, 3]",
    ),
    ("conv_ssm_backward", {"dy": torch.zeros(2, 5, 1, 3, 4).double()}, "dy: expected float32, got float64"),
    (
        "conv_ssm_backward",
        {"dfinal_state": torch.zeros(2, 6) + 0j},
        "dfinal_state: expected [B, Y, X, P] = [2, 1, 3, 6], got [2, 6]",
    ),
    (
        "conv_ssm_backward",
        {"entering": torch.zeros(2, 1, 1, 3, 6) + 0j},
        "entering: expected [B, blocks - 1, Y, X, P] = [2, 0, 1, 3, 6], got [2, 1, 1, 3, 6]",
    ),
    ("conv_ssm_backward", {"a": torch.zeros(6)}, "a: expected complex64, got float32"),
    ("ssm_kernel_backward", {"dk": torch.zeros(7)}, "dk: expected 2 dimensions [H, length], got shape [7]"),
    ("ssm_kernel_backward", {"dk": torch.zeros(3, 7)}, "dk: expected [H, length] = [2, 7], got [3, 7]"),
    ("ssm_kernel_backward", {"dk": torch.zeros(2, 7) + 0j}, "dk: expected float32, got complex64"),
    ("ssm_kernel_backward", {"c": torch.zeros(2, 4) + 0j}, "c: expected [H, N] = [2, 5], got [2, 4]"),
    ("cauchy_kernel_backward", {"dy": torch.zeros(2, 6) + 0j}, "dy: expected [H, L] = [2, 7], got [2, 6]"),
    ("cauchy_kernel_backward", {"dy": torch.zeros(2, 7)}, "dy: expected complex64, got float32"),
    ("cauchy_kernel_backward", {"w": torch.zeros(2) + 0j}, "w: expected [H, N] = [2, 5], got [2]"),
    ("grid_scan_backward", {"dr": None, "dd": None}, "dr: expected a tensor where dd is None, got None"),
    ("grid_scan_backward", {"dr": torch.zeros(2)}, "dr: expected 5 dimensions [B, X, Y, H, D], got shape [2]"),
    (
        "grid_scan_backward",
        {"dr": None, "dd": torch.zeros(2).long()},
        "dd: expected 5 dimensions [B, X, Y, H, D], got shape [2]",
    ),
    ("grid_scan_backward", {"dd": torch.zeros(2, 5, 5, 3, 4).double()}, "dd: expected float32, got float64"),
    ("grid_scan_backward", {"t_du": torch.zeros(2)}, "t_du: expected [B, X, Y, H] = [2, 5, 5, 3], got [2]"),
    ("grid_scan_backward", {"d": None}, "d: expected together with r, got None"),
    ("grid_scan_backward", {"r": None}, "r: expected together with d, got None"),
    (
        "grid_scan_backward",
        {"d": torch.zeros(2, 5, 5, 3, 1)},
        "d: expected [B, X, Y, H, D] = [2, 5, 5, 3, 4], got [2, 5, 5, 3, 1]",
    ),
    (
        "grid_scan_backward",
        {"initial_top": torch.zeros(2, 3)},
        "initial_top: expected [B, X, H, D] = [2, 5, 3, 4], got [2, 3]",
    ),
    ("softmax_scan_backward", {"initial_out": None}, "initial_out: expected together with initial_lse, got None"),
    ("fft_conv_backward", {"dy": torch.zeros(2, 5, 4)}, "dy: expected [B, T, D, N] = [2, 5, 4, 3], got [2, 5, 4]"),
    ("fft_conv_backward", {"k": torch.zeros(4, 7)}, "dy: expected [B, T, D] = [2, 5, 4], got [2, 5, 4, 3]"),
    ("fft_conv_backward", {"dy": torch.zeros(2, 5, 4, 3).double()}, "dy: expected float32, got float64"),
    ("fft_conv_backward", {"skip": torch.zeros(3)}, "skip: expected [D] = [4], got [3]"),
    ("causal_conv1d_backward", {"dy": torch.zeros(2, 4, 4)}, "dy: expected [B, T, D] = [2, 5, 4], got [2, 4, 4]"),
    ("causal_conv1d_backward", {"dy": torch.zeros(2, 5, 4).double()}, "dy: expected float32, got float64"),
    (
        "causal_conv1d_backward",
        {"dfinal_state": torch.zeros(2, 3, 4)},
        "dfinal_state: expected [B, (W - 1) * dilation, D] = [2, 2, 4], got [2, 3, 4]",
    ),
    (
        "causal_conv1d_backward",
        {"weight": torch.zeros(5, 3)},
        "weight: expected [D, W] with D = 4 and W >= 1, got [5, 3]",
    ),
    ("newton_schulz_backward", {"dx": torch.zeros(2, 5, 3)}, "dx: expected x's shape [2, 5, 4], got [2, 5, 3]"),
    ("newton_schulz_backward", {"dx": torch.zeros(5, 4)}, "dx: expected x's shape [2, 5, 4], got [5, 4]"),
    ("newton_schulz_backward", {"dx": torch.zeros(2, 5, 4).double()}, "dx: expected float32, got float64"),
    (
        "newton_schulz_backward",
        {"coefficients": [1.0]},
        "coefficients: expected a multiple of 3 numbers, got 1 numbers",
    ),
    *(
        ("fast_weights_backward", {name: torch.zeros(2, 5)}, f"{name}: expected {letters}, got [2, 5]")
        for name, letters in (
            ("grad_o", "[B, T, H, D] = [2, 5, 3, 4]"),
            ("dw1", "[B, H, D, F] = [2, 3, 4, 6]"),
            ("dm2", "[B, H, F, D] = [2, 3, 6, 4]"),
            ("lr", "[B, T, H, 3] = [2, 5, 3, 3]"),
            ("weights", "[B, H, slots, 3 F D] = [2, 3, 2, 72]"),
            ("sums", "[B, H, slots, 3 F D] = [2, 3, 2, 72]"),
            ("norms", "[B, H, U, 2 F + D] = [2, 3, 2, 16]"),
            ("products", "[B, H, 5, T, F] = [2, 3, 5, 5, 6]"),
        )
    ),
    ("fast_weights_backward", {"grad_o": torch.zeros(2, 5, 3, 4).double()}, "grad_o: expected float32, got float64"),
    ("fast_weights_backward", {"m1": None}, "momentum_state: expected 3 tensors, got 2"),
    ("fast_weights_backward", {"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
    *(
        (op, {name: torch.zeros(*shape)}, f"{name}: expected {letters}, got {[*shape]}")
        for op in ("memory", "memory_forward", "memory_backward")
        for name, shape, letters in (
            ("k", (2, 4, 3, 4), "[B, T, H, D] = [2, 5, 3, 4]"),
            ("lr", (2, 5), "[B, T, H] = [2, 5, 3]"),
            ("w2", (2, 3, 6, 4), "[B, H, D, F] = [2, 3, 4, 6]"),
            ("s1", (3, 6, 4), "[B, H, F, D] = [2, 3, 6, 4]"),
        )
    ),
    ("memory", {"w1": torch.zeros(6, 4)}, "w1: expected 4 dimensions [B, H, F, D], got shape [6, 4]"),
    ("memory", {"w2": None, "s2": None}, "w1: expected [B, H, D, D] = [2, 3, 4, 4], got [2, 3, 6, 4]"),
    ("memory", {"w1": torch.zeros(2, 3, 4, 4), "w2": None, "s1": None}, "s2: expected None without w2, got a tensor"),
    ("memory", {"chunk_size": 0}, "chunk_size: expected an integer >= 1, got 0"),
    *(
        ("memory_backward", {name: torch.zeros(2, 5)}, f"{name}: expected {letters}, got [2, 5]")
        for name, letters in (
            ("grad_o", "[B, T, H, D] = [2, 5, 3, 4]"),
            ("grad_w1", "[B, H, F, D] = [2, 3, 6, 4]"),
            ("grad_s2", "[B, H, D, F] = [2, 3, 4, 6]"),
            ("states", "[B, H, segments, N] = [2, 3, 1, 96]"),
        )
    ),
    ("memory_backward", {"grad_o": torch.zeros(2, 5, 3, 4).double()}, "grad_o: expected float32, got float64"),
    ("memory_backward", {"states": torch.zeros(2, 3, 1, 96).double()}, "states: expected float32, got float64"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("op", "change", "text"), BACKWARD_MISTAKES, ids=[m[2] for m in BACKWARD_MISTAKES])
def test_backward_operators_refuse(op: str, change: dict[str, Any], text: str, device: str) -> None:
    """Our formulas call them; called by others they must not read past a tensor's end."""
    named = {"cu_seqlens": change["cu_seqlens"].to(device)} if "cu_seqlens" in change else {}
    changed = {name: value for name, value in change.items() if name != "cu_seqlens"}
    values = [t.to(device) if torch.is_tensor(t) else t for t in (of_backward(op) | changed).values()]
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
