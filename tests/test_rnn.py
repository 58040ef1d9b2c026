"""Values, gradients and behaviour of lstm, gru, slstm and elman, on the CPU and in the CUDA simulator.

Tests and cases that are marked `small` run again in the simulator: see RUNGS.
"""

import itertools
import math
import os
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases.rnn import GATES, OPERATORS, STATES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops
from seqops.core import choose
from seqops.rnn import reference

CELLS = [*((op, "tanh") for op in OPERATORS), ("elman", "relu")]
params = partial(cases.params, operators=OPERATORS)
REGIME = os.environ.get("SIMULATED_REGIME", "block")
TORCH_MODULES = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}


@pytest.fixture(autouse=True)
def simulated_regime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the CUDA kernels on the simulator: how many blocks share a head, and how they exchange."""
    from seqops.rnn import cuda_tiles

    monkeypatch.setattr(cuda_tiles, "simulated_regime", REGIME)


def results(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients of one call of the operator."""
    return cases.evaluate(case.operator, inputs, case.cotangents)


# ---------------------------------------------------------------- the reference itself


def through_torch_nn(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """torch.nn's module as the operator: with the identity as input weight its input projection is wx."""
    gates, options = GATES[case.op], {"nonlinearity": case.nonlinearity} if case.op == "elman" else {}
    module = TORCH_MODULES[case.op](gates * case.D, case.D, batch_first=True, dtype=case.dtype, **options)

    def call(
        wx: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        h0: Tensor | None = None,
        c0: Tensor | None = None,
        *,
        reverse: bool,
        **_: Any,
    ) -> tuple[Tensor, ...]:
        bias = wx.new_zeros(gates * case.D)
        weights = {
            "weight_ih_l0": torch.eye(gates * case.D, dtype=case.dtype),
            "weight_hh_l0": r.reshape(gates * case.D, case.D),
            "bias_ih_l0": bias,
            "bias_hh_l0": bias if b is None else b.to(case.dtype).flatten(),
        }
        states = [None if s is None else s.to(case.dtype).transpose(0, 1).contiguous() for s in (h0, c0)]
        start = None if h0 is None else (*states,) if case.op == "lstm" else states[0]
        x = wx.flatten(2)
        h, last = torch.func.functional_call(module, weights, (x.flip(1) if reverse else x, start))
        last = last if isinstance(last, tuple) else (last,)
        return (h.flip(1) if reverse else h).unflatten(-1, (1, -1)), *(s.transpose(0, 1) for s in last)

    return call


def step_loop(case: Case) -> Callable[..., tuple[Tensor, ...]]:
    """The operator as a plain loop in which every operation rounds to the storage dtype."""
    cell = getattr(reference, f"{case.op}_cell")
    options = (case.nonlinearity,) if case.op == "elman" else ()

    def call(
        wx: Tensor,
        r: Tensor,
        b: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        reverse: bool,
        grad_clip: float | None,
        nonlinearity: str | None = None,
        **given: Tensor,
    ) -> tuple[Tensor, ...]:
        absent = {
            name: wx.new_full((case.B, case.H, case.D), -math.inf if name == "m0" else 0.0) for name in STATES[case.op]
        }
        state = [given.get(name, absent[name]).to(case.dtype) for name in absent]
        valid = torch.arange(case.T) < (torch.full((case.B,), case.T) if lengths is None else lengths)[:, None]
        wx = wx.where(valid[:, :, None, None, None], 0)
        outputs = [torch.empty(0)] * case.T
        for t in reversed(range(case.T)) if reverse else range(case.T):
            h = state[0] if grad_clip is None else reference.ClipGradient.apply(state[0], grad_clip)
            y = torch.einsum("ghoi,bhi->bgho", r, h)
            after = cell(wx[:, t], y if b is None else y + b.to(case.dtype), h, *state[1:], *options)
            state = [new.where(valid[:, t, None, None], old) for new, old in zip(after, state, strict=True)]
            outputs[t] = state[0].where(valid[:, t, None, None], 0)
        return torch.stack(outputs, 1), *state

    return call


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("op", "nonlinearity"), [cell for cell in CELLS if cell[0] in TORCH_MODULES])
def test_reference_is_torch_nn(op: str, nonlinearity: str, reverse: bool) -> None:
    case = Case(op, B=3, T=7, D=5, dtype=torch.float64, reverse=reverse, nonlinearity=nonlinearity)
    inputs = case.inputs()
    cotangents = case.cotangents(case.reference(**inputs))
    expected = cases.evaluate(through_torch_nn(case), inputs, cotangents)
    cases.assert_within(cases.evaluate(case.reference, inputs, cotangents), expected, 1e-14)


@pytest.mark.parametrize("op", OPERATORS)
def test_reference_gradients_are_numerical(op: str) -> None:
    case = Case(op, B=3, T=3, H=2, D=2, dtype=torch.float64, lengths=True, reverse=True)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    with torch.no_grad():  # finite differences of NaN are NaN
        inputs["wx"].nan_to_num_(0.0)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return case.reference(**(inputs | dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradcheck(call, (*leaves.values(),))
    assert torch.autograd.gradgradcheck(call, (*leaves.values(),))


# ---------------------------------------------------------------- values and gradients


def narrow_bounds(
    case: Case, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
) -> dict[str, float]:
    """1.2 times the error of the peer in this dtype, or of unlucky roundings if that is larger.

    Many values cannot all be rounded badly: one rounding bounds their mean. A few can, at each of the three places
    where a value is stored on its way into a gradient (h, the gradient of p, the result), while the peer is lucky.
    """
    plain = case.H == 1 and not case.lengths and case.grad_clip is None and case.op in TORCH_MODULES
    peer = cases.evaluate(through_torch_nn(case) if plain else step_loop(case), inputs, cotangents)
    rounding = torch.finfo(case.dtype).eps / 2
    floor = {name: rounding if value.numel() >= 64 else 3 * rounding for name, value in exact.items()}
    return {name: 1.2 * max(cases.error(peer[name], value), floor[name]) for name, value in exact.items()}


def bounds(
    case: Case, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
) -> float | dict[str, float]:
    if case.dtype in cases.WIDE:
        return case.tolerance()
    if case.B * case.T == 0:
        return torch.finfo(case.dtype).eps
    return narrow_bounds(case, inputs, cotangents, exact)


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """Every output and the gradient of every input, for random gradients of every output."""
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == case.output_dtypes
    cotangents = case.cotangents(outputs)
    exact = cases.exact_results(case, inputs, cotangents)
    bound = bounds(case, inputs, cotangents, exact)
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, bound)


@pytest.mark.parametrize("case", params("sanitize", where=lambda case: case.dtype in cases.WIDE))
def test_each_output_alone(case: Case) -> None:
    """The gradients of one output at a time: the others have none, which is not the same as zeros."""
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    for position, cotangent in enumerate(case.cotangents(outputs)):
        exact = cases.evaluate(cases.only(position, case.reference), cases.in_float64(inputs), [cotangent])
        got = cases.evaluate(cases.only(position, case.operator), inputs, [cotangent])
        cases.assert_within(got, exact, case.tolerance())


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("without", ["wx", "r", "b", "states"])
def test_some_inputs_need_no_gradient(op: str, without: str) -> None:
    """The gradients of the other inputs are the same bits."""
    case = Case(op, B=3, T=5, H=2, D=16)
    inputs = case.inputs()
    whole = results(case, inputs)
    for name in STATES[op] if without == "states" else [without]:
        inputs[name] = inputs[name].detach()
    outputs = case.operator(**inputs)
    leaves = {name: value for name, value in cases.differentiable(inputs).items() if value.requires_grad}
    gradients = torch.autograd.grad(outputs, [*leaves.values()], case.cotangents(outputs))
    cases.assert_same_bits(
        {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}, {f"d{n}": whole[f"d{n}"] for n in leaves}
    )


@pytest.mark.parametrize("dtype", cases.NARROW, ids=str)
@pytest.mark.parametrize("op", ["lstm", "gru", "slstm"])
def test_states_are_carried_in_float32(op: str, dtype: torch.dtype) -> None:
    """1000 additions that the storage dtype would lose: each is under half a unit in the last place of the sum."""
    gate = {"lstm": [-8.0, 20.0, 4.0, 0.0], "gru": [0.0, 7.0, 4.0], "slstm": [-8.0, 20.0, 4.0, 0.0]}[op]
    wx = torch.tensor(gate, dtype=dtype)[None, None, :, None, None].expand(1, 1000, -1, 1, 3)
    r = torch.zeros(len(gate), 1, 3, 3, dtype=dtype)
    states = {"m0": torch.zeros(1, 1, 3)} if op == "slstm" else {}
    got = getattr(seqops, op)(wx, r, **states)
    exact = getattr(reference, op)(wx.double(), r.double(), **states)
    for state, expected in zip(got[1:], exact[1:], strict=True):
        assert state.dtype == torch.float32
        assert cases.error(state, expected) <= 1e-4


@pytest.mark.parametrize("op", OPERATORS)
def test_saturated_gates_over_ten_thousand_steps(op: str) -> None:
    """Nothing overflows or drifts: float32 stays near float64, whose own values the other tests hold."""
    generator = torch.Generator().manual_seed(0)
    wx = torch.randn(2, 10_000, GATES[op], 2, 8, generator=generator) * 20
    if op == "slstm":
        wx[:, :, 0] = wx[:, :, 0].clamp(-80, 80)
        wx[0, ::7, 0], wx[0, 3::7, 0] = 80.0, -80.0
    r = torch.randn(GATES[op], 2, 8, 8, generator=generator) / 8**0.5
    inputs = {"wx": wx.requires_grad_(), "r": r.requires_grad_()}
    outputs = getattr(seqops, op)(**inputs)
    cotangents = [torch.randn(o.shape, generator=generator) for o in outputs]
    got = cases.evaluate(getattr(seqops, op), inputs, cotangents)
    assert all(value.isfinite().all() for value in got.values())
    exact = cases.evaluate(getattr(seqops, op), cases.in_float64(inputs), cotangents)
    cases.assert_within(got, exact, 1e-5 * 10_000**0.5)


def slstm_edges() -> dict[str, dict[str, Tensor]]:
    """Inputs [1, T, 4, 1, 2] on the edges of the stabiliser's definition, without recurrence."""
    wx = torch.randn(1, 4, 4, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = torch.zeros(4, 1, 2, 2, dtype=torch.float64)
    state = wx.new_ones(1, 1, 2)
    nothing, reset, tie = wx.clone(), wx.clone(), wx.clone()
    nothing[:, 0, 0] = -math.inf
    reset[:, 1, 1] = -math.inf
    tie[:, 0, 0], tie[:, 0, 1] = 0.0, math.inf
    every = dict.fromkeys(("h0", "c0", "n0"), state)
    return {
        "nothing added yet": {"wx": nothing, "r": r},
        "nothing added at all": {"wx": nothing[:, :1], "r": r},
        "nothing added to an empty normaliser": {
            "wx": nothing[:, :1],
            "r": r,
            "c0": state,
            "n0": 0 * state,
            "m0": 0 * state,
        },
        "all forgotten": {"wx": reset, "r": r, **every, "m0": state},
        "tie": {"wx": tie[:, :1], "r": r, **every, "m0": 0 * state},
        "minus infinity in m0": {"wx": wx, "r": r, **every, "m0": -math.inf * state},
    }


@pytest.mark.small
@pytest.mark.parametrize("edge", slstm_edges())
def test_slstm_edges(edge: str) -> None:
    inputs = {name: value.clone().requires_grad_() for name, value in slstm_edges()[edge].items()}
    outputs = reference.slstm(**inputs)
    for position in range(len(outputs)):
        cotangent = torch.ones_like(outputs[position])
        exact = cases.evaluate(cases.only(position, reference.slstm), inputs, [cotangent])
        got = cases.evaluate(cases.only(position, seqops.slstm), inputs, [cotangent])
        assert all(not value.isnan().any() for value in exact.values())
        cases.assert_within(got, exact, 1e-14)


# ---------------------------------------------------------------- pieces, rows, heads


def in_pieces(case: Case, cuts: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
    """The operator run on the pieces between the cuts, each starting from the states where the one before ended."""
    edges = [0, *sorted(cuts), case.T]
    pieces = [*itertools.pairwise(edges)]

    def call(wx: Tensor, lengths: Tensor | None = None, **arguments: Any) -> tuple[Tensor, ...]:
        outputs = {}
        for start, stop in reversed(pieces) if case.reverse else pieces:
            within = {} if lengths is None else {"lengths": (lengths - start).clamp(0, stop - start)}
            outputs[start, stop], *states = case.operator(wx[:, start:stop], **arguments, **within)
            arguments |= dict(zip(STATES[case.op], states, strict=True))
        return torch.cat([outputs[piece] for piece in pieces], 1), *states

    return call


@pytest.mark.parametrize("cuts", [[0], [1], [18], [36], [37], [5, 5, 20]], ids=str)
@pytest.mark.parametrize("grad_clip", [None, 0.05])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_pieces_equal_whole(op: str, reverse: bool, grad_clip: float | None, cuts: list[int]) -> None:
    """Forward and gradients, whatever the states carried over and wherever the cut lies in a row."""
    case = Case(op, B=4, T=37, H=2, D=16, lengths=True, reverse=reverse, grad_clip=grad_clip)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    whole = cases.evaluate(case.operator, inputs, cotangents)
    cases.assert_within(
        cases.evaluate(in_pieces(case, cuts), inputs, cotangents), cases.in_double(whole), case.tolerance()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_single_steps_equal_one_call(op: str, reverse: bool, dtype: torch.dtype) -> None:
    case = Case(op, B=3, T=9, H=2, D=16, reverse=reverse, dtype=dtype)
    inputs = case.inputs()
    with torch.no_grad():
        whole, steps = case.operator(**inputs), in_pieces(case, range(1, case.T))(**inputs)
    bound = case.tolerance() if dtype == torch.float32 else torch.finfo(dtype).eps
    assert all(cases.error(got, expected.double()) <= bound for got, expected in zip(steps, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("D", [3, 64, 100])
@pytest.mark.parametrize("op", OPERATORS)
def test_rows_depend_on_nothing_but_themselves(op: str, D: int, dtype: torch.dtype) -> None:
    """A row alone, among few and among many is the same bits, outputs and gradients.

    T = 20, since a call of very few rows times steps does not pack r and sums in another order.
    """
    case = Case(op, B=17, T=20, H=2, D=D, dtype=dtype)
    inputs = case.inputs()
    function = case.operator
    cotangents = case.cotangents(function(**inputs))
    by_row = ["wx", *STATES[op]]

    def part(rows: slice) -> dict[str, Tensor]:
        taken = {name: inputs[name][rows].detach().requires_grad_() for name in by_row}
        got = cases.evaluate(function, inputs | taken, [c[rows] for c in cotangents])
        return {name: value for name, value in got.items() if name not in ("dr", "db")}

    whole = part(slice(None))
    for rows in (slice(0, 1), slice(3, 5), slice(2, 9), slice(16, 17)):
        cases.assert_same_bits(part(rows), {name: value[rows] for name, value in whole.items()})


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("op", OPERATORS)
def test_padded_batch_equals_separate_sequences(op: str, reverse: bool) -> None:
    """Outputs and the gradients of each row's own inputs; r and b gather the sum over the sequences."""
    case = Case(op, B=7, T=12, H=2, D=16, lengths=True, reverse=reverse, grad_clip=0.2)
    inputs = case.inputs()
    function = case.operator
    cotangents = case.cotangents(function(**inputs))
    whole = cases.evaluate(function, inputs, cotangents)
    lengths = inputs.pop("lengths")
    sums = {"dr": torch.zeros_like(whole["dr"]), "db": torch.zeros_like(whole["db"])}
    for row, length in enumerate(lengths.tolist()):
        taken = {name: inputs[name][row : row + 1].detach().requires_grad_() for name in STATES[op]}
        taken["wx"] = inputs["wx"][row : row + 1, :length].detach().requires_grad_()
        mine = [cotangents[0][row : row + 1, :length], *(c[row : row + 1] for c in cotangents[1:])]
        alone = cases.evaluate(function, inputs | taken, mine)
        for name in sums:
            sums[name] += alone.pop(name)
        for name, value in alone.items():
            cut = whole[name][row : row + 1]
            if name in ("0", "dwx"):
                assert not cut[:, length:].count_nonzero(), f"{name} is not zero in the padding of row {row}"
                cut = cut[:, :length]
            assert cases.error(cut, value.double()) <= case.tolerance(), f"{name}, row {row} of length {length}"
    cases.assert_within({name: whole[name] for name in sums}, cases.in_double(sums), case.tolerance())


@pytest.mark.small
@pytest.mark.parametrize("place", ["wx", "h0"])
@pytest.mark.parametrize(("op", "nonlinearity"), CELLS)
def test_nan_stays_in_its_row_and_head(op: str, nonlinearity: str, place: str) -> None:
    """It goes on along the recurrence, and everything else keeps its bits; backward as well."""
    case = Case(op, B=7, T=6, H=3, D=5, nonlinearity=nonlinearity)
    inputs = case.inputs()
    clean = results(case, inputs)
    row, head, step = 2, 1, 3 if place == "wx" else 0
    with torch.no_grad():
        if place == "wx":
            inputs["wx"][row, step, :, head] = torch.nan
        else:
            inputs["h0"][row, head] = torch.nan
    got = results(case, inputs)
    assert got["0"][row, step:, head].isnan().all()
    for state in range(1, 1 + len(STATES[op])):
        assert got[str(state)][row, head].isnan().all()
    assert got["dr"][:, head].isnan().any()
    if nonlinearity == "tanh":  # relu passes the gradient on, whatever the value
        assert got["dwx"][row, step, :, head].isnan().all()
    for name, value in clean.items():
        heads = {"0": 2, "dwx": 3, "dr": 1, "db": 1}.get(name, 1)
        touched = torch.zeros(value.shape, dtype=torch.bool)
        if name in ("dr", "db"):
            touched.select(heads, head).fill_(True)
        else:
            touched.select(heads, head)[row] = True
        if name == "0":  # not before the step
            touched[:, :step] = False
        assert torch.equal(got[name][~touched], value[~touched]), name


@pytest.mark.small
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("op", "nonlinearity"), CELLS)
def test_values_that_are_not_finite(op: str, nonlinearity: str, value: float) -> None:
    """In one gate at the last step: every output is as infinite or as NaN as the reference's."""
    case = Case(op, B=2, T=3, H=2, D=5, dtype=torch.float64, nonlinearity=nonlinearity)
    for gate in range(GATES[op]):
        inputs = case.inputs()
        with torch.no_grad():
            inputs["wx"][1, 2, gate] = value
            exact, got = case.reference(**inputs), case.operator(**inputs)
        for position, expected in enumerate(exact):
            assert cases.error(got[position], expected) <= case.tolerance(), f"output {position}, gate {gate}"


@given(
    op=st.sampled_from(OPERATORS),
    B=st.integers(0, 9),
    T=st.integers(0, 12),
    H=st.integers(1, 3),
    D=st.integers(1, 40),
    lengths=st.booleans(),
    reverse=st.booleans(),
    grad_clip=st.sampled_from([None, 0.0, 0.1]),
    layout=st.sampled_from(["contiguous", "offset", "strided", "transposed", "expanded"]),
    cuts=st.lists(st.integers(0, 12), max_size=3),
)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_any_shape_and_any_cuts(cuts: list[int], **shape: Any) -> None:
    """Whole and in pieces, against the reference."""
    case = Case(**shape, dtype=torch.float64)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, case.tolerance())
    pieces = in_pieces(case, [min(cut, case.T) for cut in cuts])
    cases.assert_within(cases.evaluate(pieces, inputs, cotangents), exact, case.tolerance())


# ---------------------------------------------------------------- determinism, memory


@pytest.mark.parametrize("case", params("sanitize"))
def test_two_runs_and_two_backwards_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first, second = results(case, inputs), results(case, inputs)
    cases.assert_same_bits(second, first)
    outputs, leaves = case.operator(**inputs), cases.differentiable(inputs)
    cotangents = case.cotangents(outputs)
    for _ in range(2):
        gradients = torch.autograd.grad(
            outputs, [*leaves.values()], cotangents, retain_graph=True, materialize_grads=True
        )
        got = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
        cases.assert_same_bits(got, {name: first[name] for name in got})
    cases.assert_same_bits({str(i): o for i, o in enumerate(outputs)}, {n: v for n, v in first.items() if n[0] != "d"})


@pytest.mark.small
@pytest.mark.parametrize("dtype", [*cases.WIDE, *cases.NARROW], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_training_and_clipping_leave_the_forward_alone(op: str, dtype: torch.dtype) -> None:
    case = Case(op, B=5, T=9, H=2, D=17, dtype=dtype)
    inputs = case.inputs()
    with torch.no_grad():
        expected = case.operator(**inputs)
    for clip in (None, 0.0, 1e-3, math.inf):
        got = case.operator(**(inputs | {"grad_clip": clip}))
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.small
@pytest.mark.parametrize("op", OPERATORS)
def test_zero_clip_cuts_time(op: str) -> None:
    """With grad_clip = 0 no gradient of h crosses a step, so h0 gets none; without a clip it does."""
    case = Case(op, B=2, T=4, H=2, D=5, grad_clip=0.0)
    assert not results(case, case.inputs())["dh0"].count_nonzero()
    assert results(case, case.inputs() | {"grad_clip": None})["dh0"].count_nonzero()


@pytest.mark.parametrize(
    "shape",
    [
        {"B": 1, "D": 770},
        {"B": 17, "D": 257},
        pytest.param({"B": 1, "D": 128, "H": 3}, marks=pytest.mark.sanitize),
        pytest.param({"B": 17, "D": 16, "H": 3}, marks=pytest.mark.sanitize),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_number_of_threads_changes_no_bit(op: str, dtype: torch.dtype, shape: dict[str, int]) -> None:
    case = Case(op, T=5, dtype=dtype, **shape)
    inputs = case.inputs()
    single = results(case, inputs)
    torch.set_num_threads(2)
    double = results(case, inputs)
    # dr and db are torch's own product and sum, whose order is torch's affair.
    cases.assert_same_bits(double, {name: value for name, value in single.items() if name not in ("dr", "db")})
    cases.assert_within(double, cases.in_double(single), 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.small
@pytest.mark.parametrize("T", [0, 5])
@pytest.mark.parametrize("op", OPERATORS)
def test_outputs_are_new_memory(op: str, T: int) -> None:
    """Contiguous, and shared neither with an input nor with each other, even where nothing is computed."""
    inputs = Case(op, B=3, T=T, H=2, D=4).inputs()
    before = {name: value.detach().clone() for name, value in cases.differentiable(inputs).items()}
    with torch.no_grad():
        outputs = getattr(seqops, op)(**inputs)
    for output in outputs:
        assert output.is_contiguous()
        output.fill_(7.0)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert all((output == 7.0).all() for output in outputs)
    if T == 0:
        for output, name in zip(getattr(seqops, op)(**inputs)[1:], STATES[op], strict=True):
            assert torch.equal(output, inputs[name])


SAVED_PER_UNIT = {"lstm": 5, "gru": 4, "slstm": 7, "elman": 0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_what_the_backward_keeps(op: str, dtype: torch.dtype) -> None:
    """Beyond inputs and outputs: so many values a unit and step, in the storage dtype."""
    case = Case(op, B=3, T=50, H=2, D=16, dtype=dtype)
    inputs = case.inputs()
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = case.operator(**inputs)
    for tensor in (*outputs, *cases.differentiable(inputs).values()):
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert sum(saved.values()) <= SAVED_PER_UNIT[op] * outputs[0].numel() * dtype.itemsize


PEAK = """
import re, sys, torch, seqops
def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
for op, gates in (("lstm", 4), ("gru", 3), ("slstm", 4), ("elman", 1)):
    wx, r = torch.empty(8, 2048, gates, 1, 128).normal_(), torch.empty(gates, 1, 128, 128).normal_() / 12
    with torch.no_grad():
        getattr(seqops, op)(wx[:, :8], r)
        open("/proc/self/clear_refs", "w").write("5")  # the peak restarts from what is resident now
        before = status("VmRSS")
        outputs = getattr(seqops, op)(wx, r)
        print(op, status("VmHWM") - before, sum(o.nbytes for o in outputs))
"""


def test_inference_needs_the_memory_of_its_outputs(run_python: Callable[..., str]) -> None:
    """Peak of the process, packed weights included: no cache of a training step, no copy of wx (8 to 32 MiB)."""
    for line in run_python(PEAK).splitlines():
        op, peak, outputs = line.split()
        assert int(peak) <= int(outputs) + 2**21, f"{op}: {int(peak) / 2**20:.1f} MiB"


# ---------------------------------------------------------------- instruction sets

SETS = ("baseline", "avx2", "avx512", "avx512_bf16")

IN_SET = """
import sys, pytest, torch, seqops
print("set:", torch.ops.seqops.cpu_isa())
plain = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*plain, "-m", "small", "-k", "values_and_gradients", sys.argv[1]]))
"""


def best_set() -> str:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        return "avx512_bf16" if "avx512_bf16" in flags else "avx512"
    return "avx2" if {"avx2", "fma", "f16c"} <= flags else "baseline"


# The whole file runs with one of the last two where the machine has it.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name.startswith("avx512") else ()) for name in SETS]
)
def test_instruction_sets(name: str, run_python: Callable[..., str]) -> None:
    """SEQOPS_CPU_ISA lowers the choice and never raises it above what the processor has; each set passes the cases."""
    output = run_python(IN_SET, __file__, SEQOPS_CPU_ISA=name)
    assert f"set: {min(name, best_set(), key=SETS.index)}\n" in output


# ---------------------------------------------------------------- the CUDA kernels, simulated

# Every regime of the kernels under every schedule.
RUNGS = {
    f"{regime}-{seed}": {"SEQOPS_BACKEND": "cuda", "SEQOPS_SIMULATE": str(seed), "SIMULATED_REGIME": regime}
    for regime in ("block", "cluster", "grid")
    for seed in (1, 2, 3)
}


# In every run each regime in one schedule, and all three schedules. What blocks exchange knows two bytes, not which of
# the dtypes they are: float16 runs in one regime, bfloat16 in all.
EVERYDAY = {"block-1": (), "cluster-2": ("-k", "not -float16"), "grid-3": ("-k", "not -float16")}


@pytest.mark.parametrize(
    "rung", [pytest.param(rung, marks=() if rung in EVERYDAY else pytest.mark.slow) for rung in RUNGS]
)
def test_rung(rung: str, run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked small, in a process of their own. Above five seconds for that reason."""
    if shutil.which("g++") is None:
        pytest.skip("the simulator compiles with g++")
    run_rung(__file__, "small", *EVERYDAY.get(rung, ()), **RUNGS[rung])


# Regime, pass, file, what it says after the words that come before it, and what it says instead.
WAITS = [
    ("block", 0, "device_exchange.h", "if (OVER_GRID && n > 0) receive(n);", "__syncthreads();", ""),
    ("block", 0, "device.h", "sum.add(part, y);", "cp_async_wait<RING - 1>();", ""),
    ("block", 0, "device_exchange.h", "32 * K_WARPS);\n", "named_barrier_sync(1 + unit_warp(), 32 * K_WARPS);", ""),
    ("block", 1, "device.h", "sum.add(part, dh);", "__syncthreads();", ""),
    ("block", 1, "device.h", "const auto prepare", "cp_async_wait<RING - 1>();", ""),
    ("cluster", 0, "device_exchange.h", "} else {\n", "arrivals.wait(n, RECEIVED);", ""),
    ("cluster", 0, "device_exchange.h", "arrivals.begin(RECEIVED);", "cluster_barrier();", ""),
    ("cluster", 1, "device_exchange.h", "Sums<1>& sums) const {", "arrivals.wait(n, RECEIVED);", ""),
    ("cluster", 1, "device.h", "sum.add(part, dh);", "__syncthreads();", ""),
    (
        "grid",
        0,
        "device_exchange.h",
        "Input* const to",
        "wait_for_packet(packet(n, index), seen[i], n)",
        "uint32_t(seen[i])",
    ),
    ("grid", 0, "device_exchange.h", "receive(n);", "__syncthreads();", ""),
    (
        "grid",
        1,
        "device_exchange.h",
        "words[word] = ",
        "wait_for_packet(p, seen[i][word], n)",
        "uint32_t(seen[i][word])",
    ),
    ("grid", 1, "device.h", "sum.add(part, dh);", "__syncthreads();", ""),
]


@pytest.mark.parametrize(("regime", "backward", "file", "after", "line", "instead"), WAITS)
def test_a_missing_wait_is_noticed(
    regime: str,
    backward: int,
    file: str,
    after: str,
    line: str,
    instead: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two steps: without a barrier, or without waiting for what was asked for, some schedule gives wrong values
    or stops the simulator."""
    if shutil.which("g++") is None:
        pytest.skip("the simulator compiles with g++")
    from seqops.core import launch
    from seqops.rnn import cuda, cuda_tiles

    shutil.copytree(launch.SOURCES, tmp_path / "csrc")
    header = tmp_path / "csrc" / "rnn" / file
    begin, found, rest = header.read_text().partition(after)
    assert found and line in rest
    header.write_text(begin + found + rest.replace(line, instead, 1))
    monkeypatch.setattr(launch, "SOURCES", tmp_path / "csrc")
    monkeypatch.setattr(cuda_tiles, "simulated_regime", regime)
    monkeypatch.setattr(cuda.KERNELS["gru"][backward], "_simulated", {})
    case = Case("gru", B=9, T=5, H=1, D=33)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)

    def is_right(seed: int) -> bool:
        monkeypatch.setenv("SEQOPS_SIMULATE", str(seed))
        try:
            with seqops.backend("cuda"):
                cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, case.tolerance())
        except (AssertionError, RuntimeError) as error:
            assert "does not compile" not in str(error)
            return False
        return True

    assert not all(is_right(seed) for seed in (2, 3, 4))


def drawn_choice(kernel: Any, draw: random.Random) -> dict[str, int]:
    """Any constants that the kernel is written for, and that fit a GPU's shared memory."""
    from seqops.rnn import cuda_tiles

    while True:
        unit_warps = draw.randint(1, kernel.groups)
        blocks = -(-kernel.groups // unit_warps)
        shared_out = [n for n in (1, 2, 4, 8) if (blocks % n == 0 or not kernel.backward) and unit_warps * n <= 32]
        exchange = cuda_tiles.ALONE if blocks == 1 else draw.choice([cuda_tiles.CLUSTER, cuda_tiles.GRID])
        chosen = {"exchange": exchange, "blocks": blocks, "unit_warps": unit_warps, "k_warps": draw.choice(shared_out)}
        chosen |= {"tiles": draw.choice([1, 2, 4]), "split": draw.choice([1, 2, 4]), "ring": draw.choice([2, 4, 8])}
        chosen |= {"direct": int(draw.random() < 0.2), "k_regs": 0, "k_shared": 0}
        if not chosen["direct"]:
            parts = cuda_tiles.Layout(kernel, chosen).parts
            chosen["k_regs"] = draw.randint(0, parts)
            chosen["k_shared"] = draw.randint(0, parts - chosen["k_regs"])
        if cuda_tiles.Layout(kernel, chosen).shared_bytes() <= cuda_tiles.SIMULATED_SHARED:
            return chosen


@pytest.mark.parametrize("number", [*range(16), *(pytest.param(i, marks=pytest.mark.slow) for i in range(16, 200))])
def test_any_constants(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner may choose any of them: values, gradients and two bit-equal runs."""
    if shutil.which("g++") is None:
        pytest.skip("the simulator compiles with g++")
    from seqops.rnn import cuda_tiles

    draw = random.Random(number)
    op = draw.choice(OPERATORS)
    dtype = draw.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    case = Case(
        op, B=draw.randint(1, 35), T=draw.randint(1, 6), H=draw.randint(1, 2), D=draw.randint(1, 90), dtype=dtype
    )
    case = replace(case, lengths=draw.random() < 0.5, reverse=draw.random() < 0.5)
    choices: dict[Any, dict[str, int]] = {}

    def drawn(kernel: Any, batch: int, time: int) -> dict[str, int]:
        return choices.setdefault(kernel, drawn_choice(kernel, draw))

    monkeypatch.setattr(cuda_tiles, "simulated", drawn)
    monkeypatch.setenv("SEQOPS_SIMULATE", str(2 + number))
    check_on(case, "cpu")
    assert choices


# ---------------------------------------------------------------- GPU


def check_on(case: Case, device: str) -> None:
    """Values and gradients of the CUDA kernels; a second run is bit-equal."""
    inputs = case.inputs(device)
    with seqops.backend("cuda"):
        cotangents = case.cotangents(case.operator(**inputs))
        got = cases.evaluate(case.operator, inputs, cotangents)
        cases.assert_same_bits(cases.evaluate(case.operator, inputs, cotangents), got)
    exact = cases.exact_results(case, inputs, cotangents)
    bound = bounds(case, case.inputs(), [cotangent.cpu() for cotangent in cotangents], exact)
    cases.assert_within(got, exact, bound)


@pytest.mark.gpu
@pytest.mark.parametrize("case", params(where=lambda case: "slow" not in case.marks))
def test_gpu(case: Case) -> None:
    """The whole table on CUDA tensors: heads that a block holds, and others."""
    check_on(case, "cuda")


@pytest.mark.parametrize("case", params("tiny"))
def test_gpu_tests_check(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests on a GPU do, on the simulator."""
    if shutil.which("g++") is None:
        pytest.skip("the simulator compiles with g++")
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    check_on(case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("regime", ["block", "cluster", "grid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_regimes(op: str, dtype: torch.dtype, regime: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each way to hold a head, with the constants of the simulator, whatever the tuner would choose for this GPU."""
    from seqops.rnn import cuda_tiles

    monkeypatch.setattr(cuda_tiles, "simulated_regime", regime)
    if regime == "cluster" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("a GPU before compute capability 9.0 has no clusters")
    for B, T, D in ((5, 40, 33), (19, 9, 64), (3, 1, 70)):
        with ExitStack() as stack:
            for direction in ("forward", "backward"):
                train = direction == "forward" and op != "elman"
                kernel = cuda_tiles.Pass(op, direction, str(dtype).removeprefix("torch."), D, 1, train)
                constants = cuda_tiles.simulated(kernel, B, T)
                stack.enter_context(choose.forced(f"{op}.{direction}.cuda", constants))
            check_on(Case(op, B=B, T=T, H=3, D=D, dtype=dtype, lengths=True), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [256, 768, 1000, 2688])
@pytest.mark.parametrize(("op", "dtype"), [("lstm", torch.bfloat16), ("gru", torch.float16), ("lstm", torch.float32)])
def test_gpu_wide_heads(op: str, dtype: torch.dtype, D: int) -> None:
    """Heads that no block holds, with the tuner's constants for this GPU; of several steps, and of one."""
    for B, T in ((4, 12), (17, 6), (2, 1)):
        check_on(Case(op, B=B, T=T, H=1, D=D, dtype=dtype), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 300])
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_graph(op: str, D: int) -> None:
    """Forward and backward are captured once and replayed on other values, with the bits of an ordinary run."""
    case = Case(op, B=5, T=20, H=2, D=D, dtype=torch.bfloat16, lengths=True)
    inputs = case.inputs("cuda")
    cotangents = case.cotangents(case.operator(**inputs))
    stream = torch.cuda.Stream()
    with seqops.backend("cuda"):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cases.evaluate(case.operator, inputs, cotangents)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cases.evaluate(case.operator, inputs, cotangents)
        for factor in (1.0, 0.5, -1.0):
            with torch.no_grad():
                inputs["wx"].mul_(factor)
            graph.replay()
            torch.cuda.synchronize()
            replayed = {key: value.clone() for key, value in captured.items()}
            cases.assert_same_bits(replayed, cases.evaluate(case.operator, inputs, cotangents))


@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_gpu_graph_of_a_model(train: bool) -> None:
    """A whole model is captured once, and replayed on another input with the bits of an ordinary run."""
    torch.manual_seed(0)
    model = seqops.nn.LSTM(48, 256, num_layers=2, batch_first=True).to("cuda", torch.bfloat16)
    x = torch.randn(5, 20, 48, device="cuda", dtype=torch.bfloat16, requires_grad=train)

    def run() -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(train):
            y, (h_n, c_n) = model(x)
            wanted = [x, *model.parameters()] if train else []
            return (y, h_n, c_n, *(torch.autograd.grad(y.float().square().sum(), wanted) if train else ()))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        x.mul_(-0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(mine, expected) for mine, expected in zip([c.clone() for c in captured], run(), strict=True))


def test_case_table_repeats() -> None:
    """A case makes the same inputs every time, and no two cases have the same name."""
    names = [str(case) for table in cases.CASES.values() for case in table]
    assert len({*names}) == len(names)
    case = replace(cases.CASES["lstm"][0], lengths=True)
    first, second = case.inputs(), case.inputs()
    assert cases.same_bits(first["wx"], second["wx"])
    assert torch.equal(first["lengths"], second["lengths"])
