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
from torch._subclasses.fake_tensor import FakeTensorMode

import seqops


def of(*shape: int, dtype: torch.dtype = torch.float32, device: str | None = None) -> Callable[[str], torch.Tensor]:
    """A tensor to be made later, on the device under test unless one is named."""
    return lambda tested: torch.zeros(shape, dtype=dtype, device=device or tested)


def lengths(*values: int, dtype: torch.dtype = torch.int64) -> Callable[[str], torch.Tensor]:
    return lambda tested: torch.tensor(values, dtype=dtype, device=tested)


@dataclass(frozen=True)
class Mistake:
    """What to change in a good call (B = 2, T = 5, H = 1, D = 8, float32) and the text that must follow."""

    op: str
    text: str
    change: dict[str, Any] = field(default_factory=dict)
    needs_values: bool = False

    def __str__(self) -> str:
        return re.sub(r"[^\w.]+", "-", f"{self.op} {self.text}")


HALF = {"wx": of(2, 5, 4, 1, 8, dtype=torch.bfloat16), "r": of(4, 1, 8, 8, dtype=torch.bfloat16)}

MISTAKES = [
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
        for op, names in cases.STATES.items()
        for name in names
        for shape in ((2, 8), (3, 1, 8))
    ),
    *(
        Mistake(op, f"{name}: expected float32, got int32", {name: of(2, 1, 8, dtype=torch.int32)})
        for op, names in cases.STATES.items()
        for name in names
    ),
    Mistake("lstm", "lengths: expected int32 or int64, got float32", {"lengths": of(2)}),
    Mistake("gru", "lengths: expected int32 or int64, got bool", {"lengths": of(2, dtype=torch.bool)}),
    Mistake("lstm", "lengths: expected [B] = [2], got [3]", {"lengths": lengths(1, 2, 3)}),
    Mistake("elman", "lengths: expected [B] = [2], got [2, 1]", {"lengths": of(2, 1, dtype=torch.int32)}),
    Mistake("lstm", "lengths: expected values in [0, T] = [0, 5], got 6 at index 1", {"lengths": lengths(5, 6)}, True),
    Mistake(
        "slstm", "lengths: expected values in [0, T] = [0, 5], got -1 at index 0", {"lengths": lengths(-1, 9)}, True
    ),
    Mistake(
        "gru",
        "lengths: expected values in [0, T] = [0, 5], got 7 at index 1",
        {"lengths": lengths(0, 7, dtype=torch.int32)},
        True,
    ),
    *(Mistake(op, "grad_clip: expected a number >= 0, got -1", {"grad_clip": -1.0}) for op in cases.OPERATORS),
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
    Mistake("lstm", "lengths: expected [B] = [2], got [1]", {"lengths": lengths(9), "grad_clip": -1.0}),
    Mistake("elman", "grad_clip: expected a number >= 0, got -2", {"grad_clip": -2.0, "nonlinearity": "gelu"}),
    # A bad shape is told before a bad dtype, an empty batch or an empty sequence does not hide a mistake.
    Mistake("lstm", "r: expected [G, H, D, D] = [4, 1, 8, 8], got [8]", {"r": of(8, dtype=torch.float64)}),
    Mistake("lstm", "r: expected [G, H, D, D] = [4, 1, 8, 8], got [1]", {"wx": of(0, 0, 4, 1, 8), "r": of(1)}),
    Mistake(
        "gru",
        "lengths: expected values in [0, T] = [0, 0], got 1 at index 0",
        {"wx": of(2, 0, 3, 1, 8), "lengths": lengths(1, 1)},
        True,
    ),
]


def arguments(mistake: Mistake, device: str) -> dict[str, Any]:
    gates = cases.GATES[mistake.op]
    good = {"wx": of(2, 5, gates, 1, 8), "r": of(gates, 1, 8, 8)}
    return {name: make(device) if callable(make) else make for name, make in {**good, **mistake.change}.items()}


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
    gates = cases.GATES[op]
    shapes = {"r": (gates, 1, 8, 8), "b": (gates, 1, 8), **dict.fromkeys(cases.STATES[op], (2, 1, 8))}
    for name in shapes:
        for ours, theirs in (("cpu", "meta"), ("meta", "cpu")):
            change = {n: of(*s, device=theirs if n == name else ours) for n, s in shapes.items()}
            mistake = Mistake(op, f"{name}: expected wx's device {ours}, got {theirs}", change)
            with refused(mistake):
                public(op, **arguments(mistake, ours))
    mistake = Mistake(op, "lengths: expected wx's device cpu, got meta", {"lengths": of(2, device="meta")})
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


def test_unknown_backend() -> None:
    with pytest.raises(ValueError) as caught, seqops.backend("magic"):
        pass
    assert str(caught.value) == "backend: expected one of reference, cpu, triton, cuda, got 'magic'"
