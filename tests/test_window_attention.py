"""window_attention on the CPU and the other backends: against the reference, leaks, packed sequences, decoding."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases import Case, assert_within, evaluate, exact_results
from cases.window_attention import GLOBALS
from cases.window_attention import Case as Window
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import seqops
from seqops.attention import reference

OP = "window_attention"
params = partial(cases.params, operators=(OP,))
make = partial(Window, OP)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])


# ---------------------------------------------------------------- the reference itself


def neighbours(i: int, T: int, left: int, right: int, chosen: tuple[int, ...]) -> set[int]:
    """N(i), as a set, of one sequence."""
    seen = {j for j in range(T) if (left < 0 or i - j <= left) and (right < 0 or j - i <= right)}
    seen |= {j for j in range(T) if j in chosen or i in chosen}
    return {j for j in seen if right != 0 or j <= i}


@pytest.mark.parametrize("chosen", [*map(tuple, filter(None, GLOBALS)), ()], ids=str)
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 0), (-1, 0), (2, 4), (0, 2), (-1, 3), (4, -1), (-1, -1)])
def test_reference_is_the_set(left: int, right: int, chosen: tuple[int, ...]) -> None:
    edges = [0, 0, 5, 6, 17, 17]
    index = torch.tensor(chosen, dtype=torch.int64)
    got = reference.window_counts(17, left, right, index, torch.tensor(edges), torch.device("cpu"))
    expected = torch.zeros(17, 17, dtype=torch.int64)
    for a, b in itertools.pairwise(edges):
        for i in range(b - a):
            for j in neighbours(i, b - a, left, right, chosen):
                expected[a + i, a + j] = 1
    assert torch.equal(got, expected)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """o and lse, and the gradients by all of q, k, v for random gradients of both."""
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = exact_results(case, inputs, cotangents)
    got = evaluate(case.operator, inputs, cotangents)
    assert [got["0"].dtype, got["1"].dtype] == case.output_dtypes
    assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("case", params(where=lambda case: case.T == 300))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    cases.assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)


@pytest.mark.parametrize("size", [2**62, 2**63 - 1])
def test_windows_of_any_size(size: int) -> None:
    """The largest integers are windows like any other that leaves nothing out."""
    inputs = make(B=1, T=9, left=-1, right=-1, globals=(2,)).inputs()
    expected = seqops.window_attention(**inputs)
    got = seqops.window_attention(**inputs | {"left": size, "right": size})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_window_of_all_is_plain_attention() -> None:
    inputs = make(B=2, T=21, H=4, Hk=4, left=-1, right=0, dtype=torch.float64).inputs()
    q, k, v = (inputs[name].movedim(1, 2) for name in "qkv")
    expected = scaled_dot_product_attention(q, k, v, is_causal=True).movedim(1, 2)
    torch.testing.assert_close(seqops.window_attention(**inputs)[0], expected)


# ---------------------------------------------------------------- global positions


@pytest.mark.parametrize("right", [0, 3])
def test_globals_are_a_set(right: int) -> None:
    """Neither order nor repetitions nor positions that there are not change anything; the order changes no bit."""
    case = make(B=1, T=40, left=4, right=right, packed=True, globals=(1, 7, 30), dtype=torch.float64)
    inputs = case.inputs() | {"cu_seqlens": torch.tensor([0, 9, 9, 40])}
    first = evaluate(case.operator, inputs, case.cotangents)
    for other in ([30, 7, 1, 7, 30, 7], [-1, 1, 7, 30, 31, 2**62, -(2**63)]):
        again = evaluate(case.operator, inputs | {"global_index": torch.tensor(other)}, case.cotangents)
        assert_within(again, first, dict.fromkeys(first, 1e-12) | {"1": 1e-7})
    same = inputs | {"global_index": torch.tensor([30, 7, 1])}
    cases.assert_same_bits(evaluate(case.operator, same, case.cotangents), first)


@pytest.mark.parametrize("right", [0, 3])
def test_globals_inside_of_the_window_count_once(right: int) -> None:
    """Where everything is in the window, they change nothing."""
    case = make(B=1, T=12, left=20, right=right and 20, dtype=torch.float64)
    inputs = case.inputs()
    expected = case.operator(**inputs)
    got = case.operator(**inputs, global_index=torch.tensor([0, 3, 3, 11]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_no_globals_is_none() -> None:
    inputs = make(B=2, T=12).inputs()
    expected = seqops.window_attention(**inputs)
    got = seqops.window_attention(**inputs, global_index=torch.empty(0, dtype=torch.int64))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- causality, packed sequences, NaN


@pytest.mark.parametrize("chosen", [None, (0, 1, 9, 14)])
def test_no_leak_from_the_future(chosen: tuple[int, ...] | None) -> None:
    """Causal where right is 0: whatever comes later, outputs have the same bits, and gradients do not reach it."""
    case = make(B=2, T=23, left=4, right=0, globals=chosen)
    inputs = {name: v.detach() if torch.is_tensor(v) else v for name, v in case.inputs().items()}
    before = seqops.window_attention(**inputs)
    for t in (0, 8, 9, 15, 21):
        changed = dict(inputs)
        for name in "qkv":
            changed[name] = inputs[name].clone()
            changed[name][:, t + 1 :] = torch.randn_like(changed[name][:, t + 1 :]) * 5
        o, lse = seqops.window_attention(**changed)
        assert torch.equal(o[:, : t + 1], before[0][:, : t + 1])
        assert torch.equal(lse[..., : t + 1], before[1][..., : t + 1])
        changed["k"][:, t + 1 :] = math.nan
        changed["v"][:, t + 1 :] = math.inf
        o, lse = seqops.window_attention(**changed)
        assert torch.equal(o[:, : t + 1], before[0][:, : t + 1])


def test_a_window_on_the_right_sees_the_future() -> None:
    inputs = {
        name: v.detach() if torch.is_tensor(v) else v for name, v in make(B=1, T=9, left=1, right=1).inputs().items()
    }
    before, _ = seqops.window_attention(**inputs)
    inputs["v"][:, 5] += 1
    after, _ = seqops.window_attention(**inputs)
    changed = (after != before).flatten(2).any(-1)[0]
    assert changed.tolist() == [t in (4, 5, 6) for t in range(9)]


@pytest.mark.parametrize("chosen", [None, (0, 3, 11)])
@pytest.mark.parametrize("right", [0, 2])
def test_packed_equals_separate(right: int, chosen: tuple[int, ...] | None) -> None:
    """Empty sequences, those of one position, and those without some of the global positions included."""
    case = make(B=1, T=60, left=5, right=right, packed=True, globals=chosen, dtype=torch.float64)
    inputs = case.inputs() | {"cu_seqlens": torch.tensor([0, 0, 1, 11, 23, 23, 60])}
    edges = [*itertools.pairwise(inputs["cu_seqlens"].tolist())]

    def separately(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, **options: Any) -> tuple[Tensor, ...]:
        parts = [case.operator(q=q[:, a:b], k=k[:, a:b], v=v[:, a:b], **options) for a, b in edges]
        return torch.cat([o for o, _ in parts], 1), torch.cat([lse for _, lse in parts], 2)

    expected = evaluate(separately, inputs, case.cotangents)
    assert_within(
        evaluate(case.operator, inputs, case.cotangents), expected, dict.fromkeys(expected, 1e-12) | {"1": 1e-7}
    )


@pytest.mark.parametrize("value", [rungs(math.nan), math.inf])
def test_nan_stays_in_its_sequence_and_head(value: float) -> None:
    case = make(B=1, T=24, H=4, Hk=2, left=2, right=1, packed=True, globals=(1,))
    inputs = case.inputs() | {"cu_seqlens": torch.tensor([0, 9, 24])}
    clean = evaluate(case.operator, inputs, case.cotangents)
    with torch.no_grad():
        inputs["v"][0, 13, 1, 2] = value
    got = evaluate(case.operator, inputs, case.cotangents)
    reached = torch.zeros_like(clean["0"], dtype=torch.bool)
    reached[0, [10, 12, 13, 14, 15], 2:, 2] = True  # position 10 is global
    assert torch.equal(~got["0"].isfinite(), reached)
    assert torch.equal(got["0"][:, :, :2], clean["0"][:, :, :2])
    torch.testing.assert_close(got["0"][~reached], clean["0"][~reached])  # near it, numbers may be added in parts
    torch.testing.assert_close(got["1"], clean["1"])
    for name in ("dq", "dk", "dv"):
        torch.testing.assert_close(got[name][:, :9], clean[name][:, :9])
        half = got[name].shape[2] // 2
        assert torch.equal(got[name][:, :, :half], clean[name][:, :, :half])


# ---------------------------------------------------------------- decoding


def test_steps_from_a_cache_equal_the_whole() -> None:
    """One query over a ring of left + 1 rows and the rows of global positions before it: plain attention."""
    left, chosen = 4, (0, 1, 7)
    case = make(B=2, T=20, H=4, Hk=2, left=left, right=0, globals=chosen, dtype=torch.float64)
    q, k, v = (case.inputs()[name].detach() for name in "qkv")
    whole, _ = seqops.window_attention(q, k, v, left, 0, global_index=torch.tensor(chosen))
    ring: list[int] = []
    kept: list[int] = []
    everything: list[int] = []
    for t in range(20):
        everything.append(t)
        ring = [*ring, t][-(left + 1) :]
        if t in chosen:
            kept.append(t)
        rows = everything if t in chosen else [*ring, *(j for j in kept if j not in ring)]
        keys, values = (x[:, rows].movedim(1, 2) for x in (k, v))
        step = scaled_dot_product_attention(q[:, t : t + 1].movedim(1, 2), keys, values, enable_gqa=True)
        torch.testing.assert_close(step.movedim(1, 2), whole[:, t : t + 1])


# ---------------------------------------------------------------- other backends


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked `tiny`, by the Triton kernels, in a process of their own."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")
