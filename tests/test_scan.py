"""Values, gradients and behaviour of linear_scan and softmax_scan, on the CPU and on every other backend.

Tests whose cases are marked `small` or `tiny` run again in the CUDA simulator and the Triton interpreter: see RUNGS.
"""

import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.scan import OPERATORS, SEQUENCES, STATES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops
from seqops.scan import reference

params = partial(cases.params, operators=OPERATORS)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
TOLERANCE = 1e-5  # in float32
BACKENDS = ("cuda", "triton")


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of one call of the operator, or of what takes its place."""
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


def each_gate(*gates: str) -> list[tuple[str, str]]:
    """The operators, linear_scan with each of these gates."""
    return [*(("linear_scan", gate) for gate in gates), ("softmax_scan", "BT012")]


# ---------------------------------------------------------------- the reference itself


def linear_sums(x: Tensor, a: Tensor, initial_state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One sequence by the sum `h_t = sum_i a_{i+1} .. a_t x_i`, the initial state being x_{-1}."""
    a = a.expand(-1, x.shape[1], *a.shape[2:])
    terms = [*x.unbind(1)] if initial_state is None else [initial_state, *x.unbind(1)]
    late = len(terms) - x.shape[1]
    outputs = []
    for t in range(x.shape[1]):
        total = 0.0
        for i in range(t + late + 1):
            factor = 1.0
            for gate in range(i - late + 1, t + 1):
                factor = factor * a[:, gate]
            total = total + factor * terms[i]
        outputs.append(total)
    return torch.stack(outputs, 1), outputs[-1]


def softmax_means(
    s: Tensor, v: Tensor, initial_lse: Tensor | None = None, initial_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One sequence by torch's softmax of all scores so far, the initial state being one more score and value."""
    if initial_lse is not None:
        s, v = torch.cat([initial_lse[:, None], s], 1), torch.cat([initial_out[:, None], v], 1)
    weights = [s[:, : t + 1].softmax(1)[..., None] for t in range(s.shape[1])]
    o = torch.stack([(w * v[:, : t + 1]).sum(1) for t, w in enumerate(weights)], 1)
    lse = torch.stack([s[:, : t + 1].logsumexp(1) for t in range(s.shape[1])], 1)
    return (o, lse) if initial_lse is None else (o[:, 1:], lse[:, 1:])


def separately(case: Case, function: cases.common.Function) -> cases.common.Function:
    """`function`, which knows neither reverse nor cu_seqlens, called once a sequence and on flipped ones."""
    linear = case.op == "linear_scan"

    def turned(t: Tensor) -> Tensor:
        return t.flip(1) if case.reverse else t

    def call(
        first: Tensor, second: Tensor, *states: Tensor, cu_seqlens: Tensor | None = None, reverse: bool = False
    ) -> tuple[Tensor, Tensor]:
        if cu_seqlens is None:
            y, last = function(turned(first), turned(second), *states)
            return turned(y), last if linear else turned(last)
        parts = []
        for n, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
            mine = (state[n : n + 1] for state in states)
            cut = (first[:, start:stop], second if second.shape[1] == 1 else second[:, start:stop])
            if start < stop:
                y, last = function(*map(turned, cut), *mine)
                parts.append((turned(y), last if linear else turned(last)))
            elif linear:
                parts.append((first[:, :0], next(mine, first.new_zeros(first[:, 0].shape))))
        y, last = zip(*parts, strict=True)
        return torch.cat(y, 1), torch.cat(last, 0 if linear else 1)

    def named(**inputs: Any) -> tuple[Tensor, Tensor]:
        tensors = [inputs.pop(name) for name in (*SEQUENCES[case.op], *STATES[case.op]) if name in inputs]
        return call(*tensors, **inputs)

    return named


CLOSED = {"linear_scan": linear_sums, "softmax_scan": softmax_means}


@pytest.mark.parametrize("states", ["none", "state"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("op", "dtype"), [*((op, torch.float64) for op in OPERATORS), ("linear_scan", torch.complex128)], ids=str
)
def test_reference_is_the_definition(op: str, dtype: torch.dtype, reverse: bool, packed: bool, states: str) -> None:
    """Without any recurrence, values and gradients."""
    options = {"reverse": reverse, "packed": packed, "states": states, "dtype": dtype}
    case = Case(op, B=1 if packed else 3, T=9, channels=(2, 3), **options)
    for gate in ("BT01", "T1", "B0") if op == "linear_scan" else ("BT01",):
        case = replace(case, gate=gate)
        inputs = case.inputs()
        expected = results(case, inputs, separately(case, CLOSED[op]))
        cases.assert_within(results(case, inputs, case.reference), expected, 1e-13)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_reference_gradients_are_numerical(op: str, packed: bool, reverse: bool) -> None:
    """First and second derivatives, exact zeros in the gate included."""
    case = Case(op, B=1 if packed else 2, T=4, channels=(2, 2), dtype=torch.float64, packed=packed, reverse=reverse)
    call, leaves = of_leaves(case, case.inputs(), case.reference)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def of_leaves(
    case: Case, inputs: dict[str, Any], function: cases.common.Function
) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The function of the differentiable arguments alone, and those; a gate has some exact zeros."""
    leaves = cases.differentiable(inputs)
    if case.op == "linear_scan":
        with torch.no_grad():
            inputs["a"].flatten()[::3].zero_()
    return lambda *values: function(**(inputs | dict(zip(leaves, values, strict=True)))), (*leaves.values(),)


# ---------------------------------------------------------------- values and gradients


LATEST: dict[Case, dict[str, Tensor]] = {}  # exact results, for the other backends of the same case


def check(case: Case, device: str = "cpu", **changes: Tensor) -> None:
    inputs = case.inputs(device) | changes
    cotangents: list[Tensor] = []

    def look(outputs: Sequence[Tensor]) -> list[Tensor]:
        assert [o.dtype for o in outputs] == case.output_dtypes
        assert all(o.is_contiguous() and o.device.type == device for o in outputs)
        cotangents[:] = case.cotangents(outputs)
        return cotangents

    got = cases.evaluate(case.operator, inputs, look)
    if changes or case not in LATEST:
        LATEST.clear()
        LATEST[case] = cases.exact_results(case, inputs, cotangents)
    exact = LATEST.pop(case) if changes else LATEST[case]
    cases.assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """Every output and the gradient of every input, for random gradients of every output.

    The longest take above five seconds, which the reference needs for its loop over 16323 steps.
    """
    check(case)


@pytest.mark.parametrize(
    "case",
    params("small", where=lambda case: case.dtype not in cases.NARROW and case.gaps and case.T > 2),
)
def test_each_output_alone(case: Case) -> None:
    """The gradients of one output at a time: the other has none, which is not the same as zeros."""
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    bounds = case.bounds(inputs, cotangents, cases.exact_results(case, inputs, cotangents))
    for position, cotangent in enumerate(cotangents):
        exact = cases.evaluate(cases.only(position, case.reference), cases.in_float64(inputs), [cotangent])
        got = cases.evaluate(cases.only(position, case.operator), inputs, [cotangent])
        cases.assert_within(got, exact, bounds | {"0": bounds[str(position)]})


@pytest.mark.parametrize("without", ["x", "a", "initial_state", "s", "v", "initial_lse", "initial_out"])
@pytest.mark.parametrize("packed", [False, True])
def test_some_inputs_need_no_gradient(without: str, packed: bool) -> None:
    """The gradients of the other inputs are the same bits."""
    op = "linear_scan" if without in ("x", "a", "initial_state") else "softmax_scan"
    for dtype in (torch.float32, torch.bfloat16):
        case = Case(op, B=1 if packed else 3, T=70, channels=(2, 9), packed=packed, dtype=dtype)
        inputs = case.inputs()
        whole = results(case, inputs)
        inputs[without] = inputs[without].detach()
        outputs = case.operator(**inputs)
        leaves = {name: value for name, value in cases.differentiable(inputs).items() if value.requires_grad}
        gradients = torch.autograd.grad(outputs, [*leaves.values()], case.cotangents(outputs))
        got = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        cases.assert_same_bits(got, {name: whole[name] for name in got})


@pytest.mark.parametrize("gate", ["BT01", "BT0", "T1", "01", "B", ""])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_linear_gradients_are_numerical(packed: bool, dtype: torch.dtype, gate: str) -> None:
    """With exact zeros among the gates, whose derivative is not zero."""
    options = {"dtype": dtype, "gate": gate, "packed": packed, "reverse": packed}
    for gate_dtype in (dtype, torch.float64):
        case = Case("linear_scan", B=1 if packed else 2, T=4, channels=(2, 2), gate_dtype=gate_dtype, **options)
        call, leaves = of_leaves(case, case.inputs(), case.operator)
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("states", ["state", "none"])
def test_softmax_gradients_are_numerical(states: str, packed: bool) -> None:
    options = {"dtype": torch.float64, "packed": packed, "reverse": packed, "states": states}
    case = Case("softmax_scan", B=1 if packed else 2, T=5, channels=(2, 3), **options)
    call, leaves = of_leaves(case, case.inputs(), case.operator)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", cases.NARROW, ids=str)
def test_states_are_carried_in_float32(dtype: torch.dtype) -> None:
    """1000 additions that the storage dtype would lose: each is under half a unit in the last place of the sum."""
    x = torch.full((1, 1000, 3), 1 / 256, dtype=dtype)
    x[:, 0] = 1.0
    last = seqops.linear_scan(x, torch.ones(1, 1, 1, dtype=dtype))[1]
    assert last.dtype == torch.float32 and cases.error(last, torch.full((1, 3), 1 + 999 / 256).double()) <= 1e-6
    s = torch.zeros(1, 1000, 1, dtype=dtype)
    o, lse = seqops.softmax_scan(s, torch.ones(1, 1000, 1, 2, dtype=dtype))
    assert torch.equal(o, torch.ones_like(o))
    assert cases.error(lse.flatten(), torch.arange(1, 1001, dtype=torch.float64).log()) <= 1e-6


@pytest.mark.parametrize("dtype", [rungs(dtype, id=str(dtype)) for dtype in cases.NARROW])
@pytest.mark.parametrize("op", OPERATORS)
def test_narrow_results_are_the_nearest_but_one(op: str, dtype: torch.dtype) -> None:
    """Every output by itself, within one unit in the last place: the Triton interpreter truncates to bfloat16."""
    case = Case(op, B=2, T=9, channels=(2, 5), dtype=dtype, gate_dtype=torch.float32)
    inputs = case.inputs()
    with torch.no_grad():
        got = case.operator(**inputs)
        exact = case.reference(**cases.in_float64(inputs))
    assert ((got[0].double() - exact[0]).abs() <= torch.finfo(dtype).eps * exact[0].abs() + 1e-6).all()
    assert cases.error(got[1], exact[1]) <= TOLERANCE


# ---------------------------------------------------------------- edges of the arithmetic

LINEAR_EDGES = (
    "plain",
    "NaN, then a reset",
    "NaN for good",
    "infinity, then a reset",
    "infinity for good",
    "NaN where products underflow",
    "NaN in the gate, then a reset",
    "NaN at the first step",
    "gates of 1",
    "gates of -1",
    "gates of 1.01",
    "gates of 0",
    "gates of 0 at both ends",
    "reset before everything is infinite",
)


def linear_edges(T: int, copies: int) -> dict[str, Any]:
    """x and a [1, T, channels], a channel an edge, all edges so many times."""
    draw = torch.Generator().manual_seed(T)
    x = torch.randn(1, T, len(LINEAR_EDGES), generator=draw, dtype=torch.float64).float()
    a = torch.rand(1, T, len(LINEAR_EDGES), generator=draw, dtype=torch.float64).float() / 2 + 0.5
    third, half = T // 3, T // 2

    def put(tensor: Tensor, edge: str, t: int | slice, value: float) -> None:
        tensor[:, t, LINEAR_EDGES.index(edge)] = value

    for edge, value in (("NaN, then a reset", math.nan), ("infinity, then a reset", -math.inf)):
        put(x, edge, third, value)
        put(a, edge, half, 0.0)
    put(x, "NaN for good", third, math.nan)
    put(x, "infinity for good", third, math.inf)
    put(x, "NaN where products underflow", third, math.nan)
    put(a, "NaN where products underflow", slice(None), 1e-3)
    put(a, "NaN in the gate, then a reset", third, math.nan)
    put(a, "NaN in the gate, then a reset", half, 0.0)
    put(x, "NaN at the first step", 0, math.nan)
    put(a, "NaN at the first step", half, 0.0)
    put(a, "NaN at the first step", half + 1, 0.0)
    put(a, "gates of 1", slice(None), 1.0)
    put(a, "gates of -1", slice(None), -1.0)
    put(a, "gates of 1.01", slice(None), 1.01)
    put(a, "gates of 0", slice(None), 0.0)
    put(a, "gates of 0 at both ends", 0, 0.0)
    put(a, "gates of 0 at both ends", T - 1, 0.0)
    put(x, "reset before everything is infinite", slice(half, None), math.inf)
    put(a, "reset before everything is infinite", half, 0.0)
    return {"x": x.repeat(1, 1, copies).requires_grad_(), "a": a.repeat(1, 1, copies).requires_grad_()}


SOFTMAX_EDGES = (
    "plain",
    "scores of 1e4 and -1e4",
    "scores of 1e4",
    "scores of -1e4",
    "scores that grow to 1e4",
    "scores that fall from 1e4",
    "all absent",
    "absent at first",
    "absent at last",
    "one present",
    # Only their values are compared.
    "one infinite score",
    "two infinite scores",
    "NaN for a score",
    "NaN for a value",
    "infinity for a value",
)
SMOOTH = SOFTMAX_EDGES.index("one infinite score")


def softmax_edges(T: int, copies: int) -> dict[str, Any]:
    """s [1, T, heads] and v [1, T, heads, 3], a head an edge, all edges so many times."""
    draw = torch.Generator().manual_seed(T)
    s = torch.randn(1, T, len(SOFTMAX_EDGES), generator=draw, dtype=torch.float64).float()
    v = torch.randn(1, T, len(SOFTMAX_EDGES), 3, generator=draw, dtype=torch.float64).float()

    def at(edge: str, values: Tensor = s) -> Tensor:
        return values[:, :, SOFTMAX_EDGES.index(edge)]

    at("scores of 1e4 and -1e4")[:] = 1e4 * at("scores of 1e4 and -1e4").sign()
    at("scores of 1e4")[:] = 1e4
    at("scores of -1e4")[:] = -1e4
    at("scores that grow to 1e4")[:] = torch.linspace(-1e4, 1e4, T)
    at("scores that fall from 1e4")[:] = torch.linspace(1e4, -1e4, T)
    absent = torch.zeros(s.shape, dtype=torch.bool)
    at("all absent", absent)[:] = True
    at("absent at first", absent)[:, : T // 2] = True
    at("absent at last", absent)[:, T // 2 :] = True
    at("one present", absent)[:] = True
    at("one present", absent)[:, T // 2] = False
    s[absent], v[absent] = -math.inf, math.nan
    at("one infinite score")[:, T // 2] = math.inf
    at("two infinite scores")[:, T // 3 : T // 2 + 1 : T // 2 - T // 3] = math.inf
    at("NaN for a score")[:, T // 3] = math.nan
    at("NaN for a value", v)[:, T // 3] = math.nan
    at("infinity for a value", v)[:, T // 3] = math.inf
    return {"s": s.repeat(1, 1, copies).requires_grad_(), "v": v.repeat(1, 1, copies, 1).requires_grad_()}


def flipped(inputs: dict[str, Any], dimension: int = 1) -> dict[str, Any]:
    return {n: t.detach().flip(dimension).requires_grad_() if torch.is_tensor(t) else t for n, t in inputs.items()}


EDGE_SIZES = [
    pytest.param(17, 1, marks=[pytest.mark.small, pytest.mark.tiny]),
    pytest.param(64, 1, marks=pytest.mark.small),
    pytest.param(200, 1, marks=pytest.mark.small),
    pytest.param(1000, 2, id="1000-two threads, of which one gets the later half"),
]


@pytest.mark.parametrize("nan_gradient", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "threads"), EDGE_SIZES)
def test_linear_edges(T: int, threads: int, reverse: bool, nan_gradient: bool) -> None:
    """Every channel by itself: as infinite, as NaN and as near as the reference; gradients too.

    With a NaN gradient at three quarters of the time: resets keep it from everything before them.
    """
    torch.set_num_threads(threads)
    copies, every = 8 * threads - 7, len(LINEAR_EDGES)
    inputs = linear_edges(T, copies)
    cotangents = [torch.randn(1, T, every * copies), torch.randn(1, every * copies)]
    if nan_gradient:
        cotangents[0][:, T * 3 // 4] = math.nan
    exact = cases.evaluate(reference.linear_scan, cases.in_float64(inputs), cotangents)
    if reverse:
        inputs, cotangents[0] = flipped(inputs), cotangents[0].flip(1)
    got = cases.evaluate(partial(seqops.linear_scan, reverse=reverse), inputs, cotangents)
    for name in exact:
        value = got[name].flip(1) if reverse and name != "1" else got[name]
        for i, edge in enumerate(LINEAR_EDGES):
            mine = exact[name][..., i::every]
            error = cases.error(value[..., i::every], mine)
            assert error <= cases.allowance(TOLERANCE, mine), f"{edge}: {name}: {error}"
    reset = LINEAR_EDGES.index("NaN, then a reset")
    assert got["0"][..., reset].isnan().any() and got["1"][..., reset::every].isfinite().all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "threads"), EDGE_SIZES)
def test_softmax_edges(T: int, threads: int, reverse: bool) -> None:
    """Every head by itself: as infinite, as NaN and as near as the reference; gradients too."""
    torch.set_num_threads(threads)
    copies, every = 8 * threads - 7, len(SOFTMAX_EDGES)
    inputs = softmax_edges(T, copies)
    cotangents = [torch.randn(1, T, every * copies, 3), torch.randn(1, T, every * copies)]
    exact = cases.evaluate(reference.softmax_scan, cases.in_float64(inputs), cotangents)
    if reverse:
        inputs, cotangents = flipped(inputs), [c.flip(1) for c in cotangents]
    got = cases.evaluate(partial(seqops.softmax_scan, reverse=reverse), inputs, cotangents)
    for name in exact:
        value = got[name].flip(1) if reverse else got[name]
        for i, edge in enumerate(SOFTMAX_EDGES[:SMOOTH] if name[0] == "d" else SOFTMAX_EDGES):
            mine = exact[name][:, :, i::every]
            error = cases.error(value[:, :, i::every], mine)
            assert error <= cases.allowance(TOLERANCE, mine), f"{edge}: {name}: {error}"
    absent = SOFTMAX_EDGES.index("all absent")
    assert (got["0"][:, :, absent::every] == 0).all() and (got["1"][:, :, absent::every] == -math.inf).all()


@pytest.mark.parametrize("T", [rungs(5), pytest.param(300, marks=pytest.mark.small)])
def test_growth_ends_at_infinity(T: int) -> None:
    """Gates of 2 double the state until it is infinite, and nothing becomes NaN."""
    x, a = torch.ones(1, T, 3), torch.full((1, T, 3), 2.0)
    h, last = seqops.linear_scan(x, a)
    exact = 2.0 ** torch.arange(1, T + 1, dtype=torch.float64) - 1
    expected = exact.float().double()[None, :, None].expand(1, T, 3)
    assert cases.error(h, expected) <= TOLERANCE and torch.equal(last, h[:, -1])


@pytest.mark.parametrize("T", [rungs(9), pytest.param(1000, marks=pytest.mark.small), 2000])
def test_rotation_keeps_its_length(T: int) -> None:
    """Gates of absolute value 1 turn the state, forwards and in the gradient of the initial state."""
    angle = torch.linspace(0, 6, 5, dtype=torch.float64)
    a = torch.polar(torch.ones_like(angle), angle).to(torch.complex64).view(1, 1, 5)
    state = torch.ones(2, 5, dtype=torch.complex64, requires_grad=True)
    h, last = seqops.linear_scan(torch.zeros(2, T, 5, dtype=torch.complex64), a, state)
    exact = a.to(torch.complex128) ** torch.arange(1, T + 1).view(-1, 1)
    assert cases.error(h, exact.expand(2, T, 5)) <= TOLERANCE
    [gradient] = torch.autograd.grad(last, state, torch.ones_like(last))
    assert cases.error(gradient, exact[:, -1].conj().expand(2, 5).resolve_conj()) <= TOLERANCE


@pytest.mark.parametrize(
    "kind",
    [rungs("full"), pytest.param("per head", marks=pytest.mark.small), pytest.param("shared", marks=pytest.mark.small)],
)
@pytest.mark.parametrize("place", ["x", "initial_state", "gradient"])
def test_nan_stays_in_its_channel_and_sequence(place: str, kind: str) -> None:
    """It goes on along the recurrence, and everything else keeps its bits; backwards as well."""
    gate = {"full": "BT01", "per head": "BT0", "shared": "BT1"}[kind]
    case = Case("linear_scan", B=1, T=24, channels=(3, 5), gate=gate, packed=True)
    inputs = case.inputs()
    edges = inputs["cu_seqlens"] = torch.tensor([0, 3, 3, 15, 24])
    with torch.no_grad():
        inputs["initial_state"] = inputs["initial_state"][:4].clone().requires_grad_()
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    clean = cases.evaluate(case.operator, inputs, cotangents)
    sequence, step = 2, {"x": 8, "initial_state": 3, "gradient": 8}[place]
    with torch.no_grad():
        if place == "gradient":
            cotangents[0][0, step, 1, 2] = math.nan
        elif place == "x":
            inputs["x"][0, step, 1, 2] = math.nan
        else:
            inputs["initial_state"][sequence, 1, 2] = math.nan
    got = cases.evaluate(case.operator, inputs, cotangents)
    touched = {name: torch.zeros(value.shape, dtype=torch.bool) for name, value in clean.items()}
    after = slice(step, int(edges[sequence + 1]))
    if place == "gradient":
        touched["dx"][0, int(edges[sequence]) : step + 1, 1, 2] = True
        touched["dinitial_state"][sequence, 1, 2] = True
        gates = slice(int(edges[sequence]), step + 1)
    else:
        touched["0"][0, after, 1, 2] = True
        touched["1"][sequence, 1, 2] = True
        # Of the gate at a step it is the state before that counts.
        gates = slice(step + (place == "x"), after.stop)
    if kind == "full":
        touched["da"][0, gates, 1, 2] = True
    else:
        touched["da"][0, gates, 1 if kind == "per head" else 0, 2 if kind == "shared" else 0] = True
    for name, value in clean.items():
        assert got[name][touched[name]].isnan().all(), name
        assert torch.equal(got[name][~touched[name]], value[~touched[name]]), name


@pytest.mark.parametrize(
    "place", [rungs("s"), *(pytest.param(place, marks=pytest.mark.small) for place in ("v", "gradient"))]
)
def test_nan_stays_in_its_head_and_sequence(place: str) -> None:
    case = Case("softmax_scan", B=1, T=24, channels=(3, 5), packed=True)
    inputs = case.inputs()
    edges = inputs["cu_seqlens"] = torch.tensor([0, 3, 3, 15, 24])
    with torch.no_grad():
        for name in STATES[case.op]:
            inputs[name] = inputs[name][:4].clone().requires_grad_()
    cotangents = case.cotangents(case.operator(**inputs))
    clean = cases.evaluate(case.operator, inputs, cotangents)
    with torch.no_grad():
        (cotangents[0] if place == "gradient" else inputs[place])[0, 8, 1] = math.nan
    got = cases.evaluate(case.operator, inputs, cotangents)
    sequence, head = slice(int(edges[2]), int(edges[3])), 1
    if place != "gradient":
        assert got["0"][0, 8 : sequence.stop, head].isnan().all()
        assert got["1"][0, 8 : sequence.stop, head].isnan().all() == (place == "s")
    for name, value in clean.items():
        touched = torch.zeros(value.shape, dtype=torch.bool)
        if "initial" in name:
            touched[2, head] = True
        elif name[0] == "d":
            touched[0, sequence, head] = True
        elif place != "gradient":
            touched[0, 8 : sequence.stop, head] = True
        assert torch.equal(got[name][~touched], value[~touched]), name


@pytest.mark.parametrize("T", [rungs(3)])
def test_absent_past(T: int) -> None:
    """An initial lse of -inf weighs nothing, whatever its output is, and gets no gradient."""
    inputs = Case("softmax_scan", B=2, T=T, channels=(2, 3)).inputs()
    without = {name: inputs[name] for name in SEQUENCES["softmax_scan"]}
    inputs["initial_lse"] = torch.full((2, 2), -math.inf, requires_grad=True)
    inputs["initial_out"] = torch.full((2, 2, 3), math.nan, requires_grad=True)
    cotangents = [torch.randn(2, T, 2, 3), torch.randn(2, T, 2)]
    got = cases.evaluate(seqops.softmax_scan, inputs, cotangents)
    assert not got.pop("dinitial_lse").count_nonzero() and not got.pop("dinitial_out").count_nonzero()
    cases.assert_within(got, cases.in_double(cases.evaluate(seqops.softmax_scan, without, cotangents)), TOLERANCE)


# ---------------------------------------------------------------- pieces, directions, sequences


def in_pieces(case: Case, cuts: Sequence[int]) -> cases.common.Function:
    """The operator run on the pieces between the cuts, each starting from the states where the one before ended."""
    edges = [0, *sorted(cuts), case.T]
    pieces = [*itertools.pairwise(edges)]

    def call(reverse: bool, **inputs: Tensor) -> tuple[Tensor, ...]:
        parts = {}
        states = {name: inputs[name] for name in STATES[case.op] if name in inputs}
        for start, stop in reversed(pieces) if reverse else pieces:
            cut = {
                name: inputs[name] if inputs[name].shape[1] == 1 != case.T else inputs[name][:, start:stop]
                for name in SEQUENCES[case.op]
            }
            y, last = parts[start, stop] = case.operator(**cut, **states, reverse=reverse)
            if case.op == "linear_scan":
                states = {"initial_state": last}
            elif start < stop:
                end = 0 if reverse else -1
                states = {"initial_lse": last[:, end], "initial_out": y[:, end]}
        y = torch.cat([parts[piece][0] for piece in pieces], 1)
        if case.op == "linear_scan":
            return y, states["initial_state"]
        return y, torch.cat([parts[piece][1] for piece in pieces], 1)

    return call


@pytest.mark.parametrize("cuts", [[0], [1], [64], [99], [100], [30, 30, 60]], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("states", ["state", "none"])
@pytest.mark.parametrize("op", OPERATORS)
def test_pieces_equal_whole(op: str, states: str, reverse: bool, cuts: list[int]) -> None:
    """Forward and gradients, whatever the states carried over."""
    for gate in ("BT01", "0") if op == "linear_scan" else ("BT01",):
        case = Case(op, B=2, T=100, channels=(2, 9), states=states, reverse=reverse, gate=gate)
        inputs = case.inputs()
        whole = results(case, inputs)
        cases.assert_within(results(case, inputs, in_pieces(case, cuts)), cases.in_double(whole), TOLERANCE)


@pytest.mark.parametrize(
    "dtype",
    [rungs(torch.float32, id="float32"), pytest.param(torch.bfloat16, id="bfloat16", marks=pytest.mark.small)],
)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_single_steps_equal_one_call(op: str, reverse: bool, dtype: torch.dtype) -> None:
    """A cut of softmax_scan rounds o to its dtype: so much is allowed, a step."""
    case = Case(op, B=2, T=4, channels=(2, 9), reverse=reverse, dtype=dtype)
    inputs = case.inputs()
    with torch.no_grad():
        whole, steps = case.operator(**inputs), in_pieces(case, range(1, case.T))(**inputs)
    bound = TOLERANCE if dtype == torch.float32 else torch.finfo(dtype).eps
    assert all(cases.error(got, expected.double()) <= bound for got, expected in zip(steps, whole, strict=True))
    if op == "linear_scan":
        assert cases.error(steps[1], whole[1].double()) <= TOLERANCE


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_reverse_is_flip_scan_flip(op: str, dtype: torch.dtype, packed: bool) -> None:
    """Packed, each sequence is turned within itself: flipped as a whole, they come in the opposite order."""
    case = Case(op, B=1 if packed else 2, T=70, channels=(2, 9), dtype=dtype, packed=packed, reverse=True)
    inputs = case.inputs()

    def turned(reverse: bool, cu_seqlens: Tensor | None = None, **given: Tensor) -> tuple[Tensor, Tensor]:
        given = {
            name: value.flip(1) if name in SEQUENCES[op] else value.flip(0) if packed else value
            for name, value in given.items()
        }
        lengths = {} if cu_seqlens is None else {"cu_seqlens": case.T - cu_seqlens.flip(0)}
        y, last = case.operator(**given, **lengths)
        if op == "softmax_scan":
            return y.flip(1), last.flip(1)
        return y.flip(1), last.flip(0) if packed else last

    got, expected = results(case, inputs), results(case, inputs, turned)
    cotangents = case.cotangents(case.operator(**inputs))
    bounds = case.bounds(inputs, cotangents, cases.exact_results(case, inputs, cotangents))
    cases.assert_within(got, cases.in_double(expected), bounds)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("op", "gate"), each_gate("BT01", "BT0", "01", "T1", ""))
def test_packed_equals_separate(op: str, gate: str, reverse: bool) -> None:
    """Empty sequences and those of one step included; a gate shared by all gathers the sum over them."""
    case = Case(op, B=1, T=90, channels=(3, 5), gate=gate, packed=True, reverse=reverse)
    inputs = case.inputs()
    separate = separately(replace(case, reverse=False), partial(case.operator, reverse=reverse))
    cases.assert_within(results(case, inputs), cases.in_double(results(case, inputs, separate)), TOLERANCE)


@given(
    op=st.sampled_from(OPERATORS),
    B=st.integers(0, 5),
    T=st.integers(0, 70),
    channels=st.tuples(st.integers(1, 4), st.integers(1, 20)),
    gate=st.sets(st.sampled_from("BT01")).map(lambda names: "".join(name for name in "BT01" if name in names)),
    dtype=st.sampled_from([torch.float64, torch.complex128]),
    states=st.sampled_from(["state", "none"]),
    packed=st.booleans(),
    reverse=st.booleans(),
    gaps=st.booleans(),
    layout=st.sampled_from(cases.LAYOUTS),
    cuts=st.lists(st.integers(0, 70), max_size=3),
)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_any_shape_and_any_cuts(cuts: list[int], **shape: Any) -> None:
    """Whole and in pieces, against the reference."""
    if shape["packed"]:
        shape["B"] = 1
    if shape["op"] == "softmax_scan":
        shape["dtype"] = torch.float64
    case = Case(**shape)
    check(case)
    if not case.packed:
        pieces = in_pieces(case, [min(cut, case.T) for cut in cuts])
        inputs = case.inputs()
        cotangents = case.cotangents(case.operator(**inputs))
        exact = cases.exact_results(case, inputs, cotangents)
        cases.assert_within(cases.evaluate(pieces, inputs, cotangents), exact, 1e-12)


# ---------------------------------------------------------------- determinism, memory


@pytest.mark.parametrize(
    "case",
    cases.common.parameters(
        case.with_marks("small")
        for op in OPERATORS
        for case in cases.CASES[op]
        if "small" in case.marks and (case.gaps or case.T in (0, 129))
    ),
)
def test_two_runs_and_two_backwards_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first, second = results(case, inputs), results(case, inputs)
    cases.assert_same_bits(second, first)
    with torch.no_grad():
        got = case.operator(**inputs)
    cases.assert_same_bits(dict(zip("01", got, strict=True)), {name: first[name] for name in "01"})


@pytest.mark.sanitize
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("op", "dtype"),
    [*itertools.product(OPERATORS, (torch.float32, torch.bfloat16)), ("linear_scan", torch.complex64)],
    ids=str,
)
def test_number_of_threads_changes_no_bit(op: str, packed: bool, dtype: torch.dtype) -> None:
    """Where there are rows or channels enough for every thread. Sums over rows are of few, in any order."""
    case = Case(op, B=1 if packed else 4, T=150, channels=(4, 50), dtype=dtype, packed=packed)
    inputs = case.inputs()
    if packed:
        inputs["cu_seqlens"] = torch.tensor([0, 20, 40, 60, 80, 100, 125, 150])
    single = results(case, inputs)
    torch.set_num_threads(2)
    cases.assert_same_bits(results(case, inputs), single)


@pytest.mark.sanitize
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("op", "gate"), each_gate("BT0", "T", "01", "0"))
def test_time_split_over_a_number_of_threads(op: str, packed: bool, reverse: bool, gate: str) -> None:
    """One long row, or one among short ones: as near to float64 as ever, and the same in every run."""
    channels = (200,) if op == "linear_scan" else (4, 50)
    # Resets (here with reverse) hide what is handed from one part to the next.
    options = {"packed": packed, "reverse": reverse, "gaps": reverse, "gate": gate}
    case = Case(op, B=1, T=900, channels=channels, **options)
    edges = {"cu_seqlens": torch.tensor([0, 0, 1, 20, 850, 870, 900, 900])} if packed else {}
    inputs = case.inputs() | edges
    single = results(case, inputs)
    torch.set_num_threads(2)
    check(case, **edges)
    double = results(case, inputs)
    cases.assert_same_bits(results(case, inputs), double)
    assert reverse or not all(torch.equal(double[name], single[name]) for name in double), "time was not split"


@pytest.mark.parametrize("T", [rungs(0), rungs(5)])
@pytest.mark.parametrize("op", OPERATORS)
def test_outputs_are_new_memory(op: str, T: int) -> None:
    """Contiguous, and shared neither with an input nor with each other, even where nothing is computed."""
    case = Case(op, B=3, T=T, channels=(2, 4))
    inputs = case.inputs()
    before = {name: value.detach().clone() for name, value in cases.differentiable(inputs).items()}
    with torch.no_grad():
        outputs = case.operator(**inputs)
    for output in outputs:
        assert output.is_contiguous()
        output.fill_(7.0)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert all((output == 7.0).all() for output in outputs)
    if T == 0 and op == "linear_scan":
        assert torch.equal(case.operator(**inputs)[1], inputs["initial_state"])


@pytest.mark.parametrize("packed", [False, True])
def test_empty_sequences_return_their_state(packed: bool) -> None:
    """And pass its gradient on."""
    case = Case("linear_scan", B=1 if packed else 3, T=0, channels=(2, 4), packed=packed)
    inputs = case.inputs()
    got = results(case, inputs)
    assert torch.equal(got["1"], inputs["initial_state"])
    assert torch.equal(got["dinitial_state"], case.cotangents(case.operator(**inputs))[1])
    del inputs["initial_state"]
    assert not case.operator(**inputs)[1].count_nonzero()


def kept_for_backward(outputs_of: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], dict[int, Tensor]]:
    """The outputs, and the tensors kept for the backward by their place in memory."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = outputs_of()
    return outputs, kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("packed", [False, True])
def test_what_linear_scan_keeps(packed: bool, dtype: torch.dtype) -> None:
    """a, h and the initial state; where no gradient of the gate is wanted, a alone (and cu_seqlens)."""
    case = Case("linear_scan", B=1 if packed else 3, T=50, channels=(2, 16), dtype=dtype, packed=packed)
    inputs = case.inputs()
    outputs, kept = kept_for_backward(lambda: case.operator(**inputs))
    allowed = [inputs["a"], outputs[0], inputs["initial_state"], *([inputs["cu_seqlens"]] if packed else [])]
    places = {tensor.untyped_storage().data_ptr() for tensor in allowed}
    assert {*kept} <= places
    inputs["a"] = inputs["a"].detach()
    _, kept = kept_for_backward(lambda: case.operator(**inputs))
    assert {*kept} <= places - {outputs[0].untyped_storage().data_ptr()}
    assert sum(tensor.numel() for tensor in kept.values()) <= inputs["a"].numel() + (8 if packed else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_softmax_scan_keeps(dtype: torch.dtype) -> None:
    """s, v, o and the initial states, and beyond them m and u: two numbers a head and step in the dtype of sums."""
    case = Case("softmax_scan", B=3, T=50, channels=(2, 16), dtype=dtype)
    inputs = case.inputs()
    outputs, kept = kept_for_backward(lambda: case.operator(**inputs))
    for tensor in (outputs[0], *cases.differentiable(inputs).values()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) <= 2 * 4 * 3 * 50 * 2


PEAK = """
import re, torch, seqops
def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
x, s = torch.empty(4, 4096, 4, 64).normal_(), torch.empty(4, 4096, 4).normal_()
for name, op, first, second in (
    ("a full gate", seqops.linear_scan, x, torch.empty_like(x).uniform_()),
    ("a gate a head", seqops.linear_scan, x, s[..., None].sigmoid()),
    ("a constant gate", seqops.linear_scan, x, torch.full((1, 1, 4, 64), 0.9)),
    ("a transposed gate", seqops.linear_scan, x, torch.empty(4, 4, 64, 4096).uniform_().movedim(-1, 1)),
    ("softmax", seqops.softmax_scan, s, x),
):
    with torch.no_grad():
        op(first[:, :8], second[:, :8])
        open("/proc/self/clear_refs", "w").write("5")  # the peak restarts from what is resident now
        before = status("VmRSS")
        outputs = op(first, second)
        copied = second.nbytes if name == "a transposed gate" else 0
        print(status("VmHWM") - before, sum(o.nbytes for o in outputs) + copied, name, sep=",")
        del outputs
"""


def test_inference_needs_the_memory_of_its_outputs(run_python: Callable[..., str]) -> None:
    """Peak of the process: no state a step, no expanded gate (16 MiB). One that is not laid out by time is copied."""
    for line in run_python(PEAK).splitlines():
        peak, outputs, name = line.split(",")
        assert int(peak) <= int(outputs) + 2**21, f"{name}: {int(peak) / 2**20:.1f} MiB"


INF, NAN = math.inf, math.nan


def extremes() -> dict[str, tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]]:
    """Inputs whose chunks say less than their steps do: 64 or more values a step, so that time is split."""
    steps, width = 9000, 32
    x, gates = torch.zeros(1, steps, width), torch.ones(1, steps, 1)
    x[:, 1600:1636] = 1
    gates[:, 1640:1840], gates[:, 1840:1885] = 0.5, 10
    overflowing = torch.zeros(1, steps, width)
    overflowing[:, 100], overflowing[:, 4000:4005] = -3.2e38, 1e38
    s, v = torch.zeros(1, 3000, 4), torch.ones(1, 3000, 4, 64)
    twice, late, lost = s.clone(), s.clone(), v.clone()
    twice[:, [100, 1000], 0] = INF
    late[:, 500:] = 200
    lost[0, 10, 0, 0] = NAN
    rising = torch.arange(3000.0).view(1, 3000, 1).expand_as(s)
    return {
        "a product that vanished does not grow again": (seqops.linear_scan, (x, gates)),
        "a chunk by itself overflows": (seqops.linear_scan, (overflowing, torch.ones(1, 1, width))),
        "+inf in two chunks": (seqops.softmax_scan, (twice, v)),
        "NaN far below": (seqops.softmax_scan, (late, lost)),
        "weights that vanish": (seqops.softmax_scan, (rising, v)),
    }


@pytest.mark.parametrize("name", extremes())
def test_chunks_keep_what_steps_say(name: str) -> None:
    """Finite, infinite and NaN in the same places, with time split or not; forward, and backward from a late NaN."""
    function, inputs = extremes()[name]
    leaves = [t.clone().requires_grad_() for t in inputs]
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        first, second = function(*leaves)
        gradient = torch.zeros_like(first)
        gradient[:, -10] = NAN
        found.append([first.detach(), second.detach(), *torch.autograd.grad(first, leaves, gradient)])
    for alone, together in zip(*found, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("op", [rungs("softmax_scan")])
def test_small_weights_are_not_absent(op: str) -> None:
    """A weight that underflows lets NaN pass, in a value and in a gradient; a score of -inf does not."""
    s = torch.tensor([0.0, -200.0, -INF, 0.0]).view(1, 4, 1).requires_grad_()
    for step, seen in ((1, [False, True, True, True]), (2, [False] * 4)):
        v = torch.ones(1, 4, 1, 1)
        v[:, step] = NAN
        assert seqops.softmax_scan(s, v)[0].isnan().flatten().tolist() == seen
    rising, v = torch.tensor([0.0, 100, 200, 0]).view(1, 4, 1).requires_grad_(), torch.ones(1, 4, 1, 1).requires_grad_()
    gradient = torch.ones(1, 4, 1, 1)
    gradient[:, 3] = NAN
    for found in torch.autograd.grad(seqops.softmax_scan(rising, v)[0], (rising, v), gradient):
        assert found.isnan().all()


@pytest.mark.parametrize("op", [rungs("softmax_scan")])
def test_infinite_state_of_an_empty_sequence(op: str) -> None:
    s, v = torch.zeros(1, 3, 1), torch.ones(1, 3, 1, 2)
    lse, out = torch.zeros(2, 1, requires_grad=True), torch.tensor([[[INF, 1]], [[1, 1]]])
    o, _ = seqops.softmax_scan(s, v, lse, out, cu_seqlens=torch.tensor([0, 0, 3]))
    assert torch.autograd.grad(o.sum(), lse)[0].flatten().tolist() == [0, 0]


@pytest.mark.parametrize("op", [rungs("linear_scan")])
def test_reset_after_a_half_infinite_number(op: str) -> None:
    """A real gate's gradient at a reset is 0 where either part of the state before it is not finite."""
    x = torch.tensor([complex(INF, 2), 1 + 1j]).view(1, 2, 1)
    a = torch.tensor([1.0, 0.0]).view(1, 2, 1).requires_grad_()
    h, _ = seqops.linear_scan(x, a)
    gradient = torch.tensor([0, 3 + 5j]).view(1, 2, 1)
    assert torch.autograd.grad(h, a, gradient)[0].flatten().tolist() == [0, 0]


# ---------------------------------------------------------------- other backends, other instruction sets

SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
RUNGS = {
    **{name: {"SEQOPS_CPU_ISA": name} for name in SETS},
    **{f"simulator-{seed}": {"SEQOPS_BACKEND": "cuda", "SEQOPS_SIMULATE": str(seed)} for seed in (1, 2, 3)},
    **{f"interpreter-{way}": {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"} for way in ("march", "tiles")},
}

IN_RUNG = """
import sys, pytest
if sys.argv.pop(1) == "interpreter-tiles":  # short sequences too
    from seqops.scan import triton
    triton.INTERPRETED_TILE, triton.PIECE = 8, 8
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *sys.argv[1:]]))
"""


def missing(rung: str) -> str | None:
    """What this machine lacks for the rung."""
    if rung.startswith("interpreter") and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if rung.startswith("simulator") and shutil.which("g++") is None:
        return "the simulator compiles with g++"
    return None


# The whole file runs with the last of the instruction sets; other ways of the interpreter differ in tiles.
SELDOM = ("avx512", "avx512_bf16", "interpreter-tiles")


@pytest.mark.parametrize("rung", [pytest.param(r, marks=[pytest.mark.slow] if r in SELDOM else []) for r in RUNGS])
def test_rung(rung: str, run_python: Callable[..., str]) -> None:
    """All marked tests of this file in a process of their own. Above five seconds, since it is a whole rung."""
    reason = missing(rung)
    if reason:
        pytest.skip(reason)
    mark = "tiny" if rung.startswith("interpreter") else "small"
    chosen = ("-k", "values_and_gradients or edges") if rung == "interpreter-tiles" else ()
    output = run_python(IN_RUNG, rung, *chosen, "-m", f"{mark} and not slow and not gpu", __file__, **RUNGS[rung])
    assert " passed" in output and " skipped" not in output, output


# ---------------------------------------------------------------- GPU


def on_gpu(case: Case) -> bool:
    """The few that also run under compute-sanitizer, which is slow."""
    return "sanitize" in case.marks and case.T in (5, 33, 66) and (case.packed or case.dtype == torch.bfloat16)


def gpu_cases() -> list[Any]:
    chosen = []
    for case in itertools.chain(*(cases.CASES[op] for op in OPERATORS)):
        marks = [pytest.mark.gpu, *([pytest.mark.sanitize] if on_gpu(case) else [])]
        # Of the slow ones those that are long, but not for half a minute in the reference.
        if "slow" not in case.marks or 1000 < case.T < 20_000:
            chosen.append(pytest.param(case, id=str(case), marks=marks))
    return chosen


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", gpu_cases())
def test_gpu(name: str, case: Case) -> None:
    """The whole table on CUDA tensors; a second run is bit-equal."""
    with seqops.backend(name):
        check(case, "cuda")
        inputs = case.inputs("cuda")
        cases.assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_graph(op: str, name: str, packed: bool) -> None:
    """Forward and backward are captured once and replayed on other values, with the bits of an ordinary run."""
    case = Case(op, B=1 if packed else 2, T=1000, channels=(4, 32), dtype=torch.bfloat16, packed=packed)
    inputs = case.inputs("cuda")
    cotangents = case.cotangents(case.operator(**inputs))
    stream = torch.cuda.Stream()
    with seqops.backend(name):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cases.evaluate(case.operator, inputs, cotangents)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cases.evaluate(case.operator, inputs, cotangents)
        for factor in (1.0, 0.5, -1.0):
            with torch.no_grad():
                inputs[SEQUENCES[op][0]].mul_(factor)
            graph.replay()
            torch.cuda.synchronize()
            replayed = {key: value.clone() for key, value in captured.items()}
            cases.assert_same_bits(replayed, cases.evaluate(case.operator, inputs, cotangents))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1025, 2_100_001), (4099, 1025, 512), (1, 4_200_001, 512)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_large(op: str, name: str, shape: tuple[int, int, int]) -> None:
    """More than 2**31 elements: wide, many rows, and long. Channels at both ends are held against the reference.

    Of the long one the last steps are checked, from a reset (for softmax_scan: a score above all others) on.
    """
    B, T, D = shape
    assert B * T * D > 2**31
    start = max(0, T - 1025)
    rows, channels = [0, B - 1], [0, 1, D // 2, D - 1]
    values = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()
    gates = torch.rand(B, T, 1, device="cuda") if op == "linear_scan" else torch.randn(B, T, 1, device="cuda")
    cotangent = torch.ones((), dtype=torch.bfloat16, device="cuda").expand(shape)
    if op == "linear_scan":
        gates[:, start] = 0.0
        first, second = values, gates
    else:
        gates[:, start] = 50.0
        first, second = gates, values[:, :, None]
    first, second = first.requires_grad_(), second.requires_grad_()
    with seqops.backend(name):
        y = getattr(seqops, op)(first, second)[0]
        dvalues, dgates = torch.autograd.grad(
            y, (first, second)[:: 1 if op == "linear_scan" else -1], cotangent.view_as(y)
        )
    assert y.isfinite().all() and dvalues.isfinite().all() and dgates.isfinite().all()
    small = values.detach()[rows][:, start:, channels].cpu().double().requires_grad_()
    small_gates = gates.detach()[rows][:, start:].cpu().double()
    if op == "linear_scan":
        exact, _ = reference.linear_scan(small, small_gates)
    else:
        exact, _ = reference.softmax_scan(small_gates, small[:, :, None])
    [gradient] = torch.autograd.grad(exact, small, torch.ones_like(exact))
    for got, expected in ((y, exact), (dvalues, gradient)):
        sampled = got.view(shape)[rows][:, start:, channels]
        assert cases.error(sampled, expected.detach().view(sampled.shape)) <= 1.2 * torch.finfo(torch.bfloat16).eps / 2
