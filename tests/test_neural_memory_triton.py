"""The Triton kernels of neural_memory: in Triton's interpreter, and what of them is launched and listed.

Tests that are marked `tiny` run again with the backend "triton" in a process whose Triton interprets: see test_rung.
The interpreter walks tiles of 16 tokens.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from cases import common, neural_memory
from torch import Tensor

from seqops.core import backend, choose
from seqops.tune import device as devices

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
tiles = import_module("seqops.ttt.tiles_neural_memory_triton")
Case = neural_memory.Case


def make(**sizes: Any) -> Case:
    return Case("neural_memory", **({"B": 1, "H": 1, "T": 5, "D": 4, "F": 5, "C": 3} | sizes))


def options(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


def is_triton() -> bool:
    return backend.current() == "triton"


@pytest.fixture
def short_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved states are two chunks apart, not eight, and those of two segments are computed again at once."""
    for name in ("op_neural_memory", *(("triton_neural_memory",) if is_triton() else ())):
        monkeypatch.setattr(import_module(f"seqops.ttt.{name}"), "segment_of", lambda chunk_size: 2)
    if is_triton():
        monkeypatch.setattr(import_module("seqops.ttt.triton_neural_memory"), "together", lambda call: 2)


def cotangents_of(case: Case, inputs: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return case.cotangents(case.reference(**inputs))


def assert_as_the_reference(case: Case) -> None:
    inputs = case.inputs()
    cotangents = cotangents_of(case, inputs)
    exact = common.exact_results(case, inputs, cotangents)
    got = common.evaluate(case.operator, inputs, cotangents)
    common.assert_within(got, exact, case.bounds(inputs, cotangents, exact))


QUICK = [
    # several segments of two chunks, the last of which is short; of the second case more than are computed at once
    make(T=5, C=2, state=True, dtype=torch.float64, options=options(window=2)),
    make(T=5, C=1, F=None, gates="momentum", state=True, H=2),
    # tiles of tokens and of channels
    make(T=18, C=17, D=3, F=17, gates="edges", options=options(loss="dot", window=20)),
    make(T=20, C=19, D=18, F=None, state=True, dtype=torch.float64),
    make(T=4, C=9, D=70, F=None, gates="decay", dtype=torch.bfloat16, wide=True, layout="transposed"),
    make(T=2, C=1, gates="none", dtype=torch.float16),
]
SLOW = [
    *(
        make(T=T, C=C, F=F, dtype=dtype, gates=gates, state=True, options=options(window=window))
        for (T, C), F, dtype, (gates, window) in itertools.product(
            ((1, 1), (7, 1), (33, 16), (40, 35), (20, 100)),
            (None, 20),
            common.WIDE + common.NARROW,
            (("both", 1), ("none", 3), ("edges", 100)),
        )
    ),
    *(make(T=20, C=16, D=D, F=F, H=2) for D, F in ((1, 1), (16, 33), (33, 70), (70, 16), (64, 256))),
    make(T=300, C=16, D=16, F=16, state=True),
]


@pytest.mark.tiny
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_values_and_gradients(case: Case, short_segments: None) -> None:
    assert_as_the_reference(case)


@pytest.mark.tiny
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("F", [None, 5])
def test_nan_stays_in_its_head_and_out_of_earlier_tokens(F: int | None, name: str) -> None:
    """In the middle of a chunk's tile: as in the loop over tokens."""
    inputs = make(T=7, C=4, F=F, H=2, gates="both").inputs()
    case = make(T=7, C=4, F=F, H=2)
    with torch.no_grad():
        inputs[name][0, 5, 1, 2] = torch.nan
        got, exact = case.operator(**inputs), case.reference(**inputs)
    assert exact[0].isnan().any() and not exact[0][:, :5].isnan().any() and not exact[0][:, :, 0].isnan().any()
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.tiny
def test_two_runs_are_bit_equal() -> None:
    case = make(T=2, F=5, dtype=torch.bfloat16)
    inputs = case.inputs()
    cotangents = cotangents_of(case, inputs)
    first, second = (common.evaluate(case.operator, inputs, cotangents) for _ in range(2))
    common.assert_same_bits(first, second)


@needs_triton
def test_rung(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked tiny, in a process of their own. Above five seconds for that reason."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


# ---- what is launched


def tensors_of(inputs: dict[str, Any]) -> list[Tensor | None]:
    names = ("q", "k", "v", "lr", "decay", "momentum", "w1", "w2", "s1", "s2")
    return [None if inputs.get(name) is None else inputs[name].detach() for name in names]


@needs_triton
def test_every_launch_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers ask for is what `configurations()` names: constants, types of pointers, and alignment."""
    triton = import_module("seqops.ttt.triton_neural_memory")

    def key(name: str, types: dict[str, str], constants: dict[str, Any], warps: int) -> tuple[Any, ...]:
        return name, *sorted(types.items()), *sorted(constants.items()), warps

    known = {
        key(
            each["kernel"].__name__,
            {n: t for n, t in each["types"].items() if n[:2] == "p_"},
            each["constants"],
            each["options"]["num_warps"],
        )
        for each in triton.configurations()
    }
    divisible = {each["kernel"].__name__: each.get("divisible", ()) for each in triton.configurations()}
    names = {dtype: f"*{name}" for dtype, name in triton.TYPES.items()} | {torch.int32: "*i32"}
    constants = ("LAYERS", "BT", "BU", "BN", "BK", "BC")
    asked = set()

    def record(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], warps: int) -> None:
        assert {*arguments} == {*kernel.arg_names}
        types = {n: names[v.dtype] for n, v in arguments.items() if isinstance(v, Tensor)}
        asked.add(key(kernel.__name__, types, {n: v for n, v in arguments.items() if n in constants}, warps))
        for name in divisible[kernel.__name__]:
            value = arguments[name]
            assert (value.data_ptr() if isinstance(value, Tensor) else value) % 16 == 0, name

    monkeypatch.setattr(triton, "launch", record)
    for dtype, F, gates, C in itertools.product(common.WIDE + common.NARROW, (None, 5, 16), ("none", "both"), (1, 40)):
        for shape in tiles.shapes("forward", str(dtype).removeprefix("torch.")):
            monkeypatch.setitem(triton.INTERPRETED_ROWS, "forward", shape.rows)
            for D, layout in ((16, "contiguous"), (5, "contiguous"), (16, "transposed")):
                case = make(T=200, D=D, F=F, C=C, gates=gates, dtype=dtype, layout=layout, H=2)
                tensors = tensors_of(case.inputs())
                found = triton.memory_forward(*tensors, C)
                assert found[0].shape == tensors[0].shape and found[5].shape[2] == -(-200 // (C * triton.segment_of(C)))
                given = found[:5] if F is not None else (found[0], found[1], None, found[3], None)
                gradients = triton.memory_backward(*given, *tensors, found[5], C)
                for gradient, tensor in zip(gradients, tensors, strict=True):
                    assert tensor is None or (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
    assert len(asked) >= 26  # all walks, and half of the widths of the coefficients
    assert asked <= known, sorted(asked - known)[0]


@needs_triton
def test_tiles_follow_the_chunk() -> None:
    triton = import_module("seqops.ttt.triton_neural_memory")

    def rows(dtype: str, chunk: int, direction: str = "forward") -> int:
        key = triton.key_of(direction, dtype, chunk, 64, 256)
        return triton.TUNABLES[direction].problem(devices.find("h100"), key).solve(seconds=math.inf)["rows"]

    assert rows("bfloat16", 16) == 16
    assert rows("bfloat16", 64) == 64
    assert rows("float64", 64) == rows("bfloat16", 64, "backward") == 16


def test_forced_choice_must_exist() -> None:
    with pytest.raises(RuntimeError, match=r"no kernel of 64 tokens for float64; tokens that exist: 16"):
        tiles.shape("forward", "float64", 64)
    assert choose.forced_solution("neural_memory.forward.triton") is None
