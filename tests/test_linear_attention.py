"""Values, gradients and behaviour of linear_attention on the CPU; Triton: test_linear_attention_triton.py."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.linear_attention import DECAYS, OPERATORS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops

params = partial(cases.params, operators=OPERATORS)
make = partial(Case, "linear_attention")


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


# ---------------------------------------------------------------- the reference itself


def by_pairs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Without a recurrence: the sum over all pairs of a query and a key, each weighted by the decays between them."""
    B, T, H, K = q.shape
    g = torch.zeros(B, T, H, K, dtype=q.dtype) if log_decay is None else log_decay.clamp(max=0)
    g = g[:, None].expand(B, T, H, K) if g.ndim == 1 else g[..., None].expand(B, T, H, K) if g.ndim == 3 else g

    def between(early: int, late: int) -> Tensor:  # [B, H, K]: decays of the steps early .. late - 1
        return g[:, early:late].sum(1).exp() if causal else torch.ones_like(g[:, 0])

    def state(t: int) -> Tensor:
        first = 0 if window is None else max(t - window + 1, 0)
        total = torch.zeros(B, H, K, v.shape[-1], dtype=q.dtype)
        for j in range(first, t + 1 if causal else T):
            total = total + (between(j + 1, t + 1) * k[:, j])[..., None] * v[:, j, :, None]
        return total if initial_state is None else total + between(0, t + 1)[..., None] * initial_state

    o = [torch.einsum("bhk,bhkv->bhv", q[:, t], state(t)) * K**-0.5 for t in range(T)]
    return torch.stack(o, 1), state(T - 1)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("decay", [*DECAYS, "everywhere"])
def test_reference_is_the_definition(decay: str, window: int | None) -> None:
    options = {"decay": "none", "causal": False, "window": None} if decay == "everywhere" else {"decay": decay}
    case = make(B=2, T=7, K=3, V=2, dtype=torch.float64, **({"window": window} | options))
    inputs = case.inputs()
    expected = results(case, inputs, by_pairs)
    if window == 1:  # no decay lies between a query and itself
        expected.pop("dlog_decay", None)
    cases.assert_within(results(case, inputs, case.reference), expected, 1e-13)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == case.output_dtypes
    cotangents = case.cotangents(outputs)
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(
        cases.evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact)
    )


@pytest.mark.parametrize("case", params("tiny", where=lambda case: case.B * case.T > 0 and case.layout == "contiguous"))
def test_each_output_alone(case: Case) -> None:
    """A gradient of the outputs only, or of the final state only."""
    inputs = case.inputs()
    for position in (0, 1):
        function, reference = cases.only(position, case.operator), cases.only(position, case.reference)
        cotangents = [case.cotangents(case.operator(**inputs))[position]]
        exact = cases.evaluate(reference, cases.in_float64(inputs), cotangents)
        got = cases.evaluate(function, inputs, cotangents)
        cases.assert_within(got, exact, {name: 2e-3 if case.dtype in cases.NARROW else 1e-4 for name in exact})


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("decay", DECAYS)
def test_gradients_are_numerical(decay: str, packed: bool, window: int | None) -> None:
    case = make(B=1, T=6, H=1, K=2, V=3, dtype=torch.float64, decay=decay, packed=packed, window=window)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    assert torch.autograd.gradcheck(
        lambda *values: case.operator(**(inputs | dict(zip(leaves, values, strict=True)))), (*leaves.values(),)
    )


def test_decays_above_zero_have_no_gradient() -> None:
    q, k, v = (torch.randn(1, 70, 1, 4) for _ in range(3))
    for shape in ((1,), (1, 70, 1), (1, 70, 1, 4)):
        g = torch.full(shape, 0.5, requires_grad=True)
        o, state = seqops.linear_attention(q, k, v, g)
        assert torch.equal(o, seqops.linear_attention(q, k, v, torch.zeros(shape))[0])
        assert torch.equal(torch.autograd.grad(o.sum() + state.sum(), g)[0], torch.zeros(shape))


# ---------------------------------------------------------------- NaN, infinity, resets


@pytest.mark.parametrize("T", [9, 150])
@pytest.mark.parametrize("name", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("decay", ["none", "step", "channel"])
def test_nan_does_not_go_back_in_time(decay: str, name: str, T: int) -> None:
    """A NaN at step 5 of head 0, in float64: every result elsewhere is what it is without."""
    case = make(B=2, T=T, K=3, V=4, decay=decay, dtype=torch.float64)
    inputs = case.inputs()
    names = [*cases.differentiable(inputs)]
    cotangents = case.cotangents(case.operator(**inputs))
    clean = cases.evaluate(case.operator, inputs, cotangents)
    with torch.no_grad():
        if name == "grad":
            cotangents[0] = cotangents[0].clone()
            cotangents[0][0, 5, 0, 1] = math.nan
        else:
            inputs[name][0, 5, 0, 1] = math.nan
    got = cases.evaluate(case.operator, inputs, cotangents)
    assert any(value.isnan().any() for value in got.values())
    for result in ("0", *(f"d{n}" for n in names if n != "initial_state")):
        other_head, other_row = got[result][:, :, 1:], got[result][1:]
        torch.testing.assert_close(other_head, clean[result][:, :, 1:], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(other_row, clean[result][1:], rtol=1e-9, atol=1e-11)
    if name == "grad":  # gradients flow back: what comes later stays
        for result in ("0", "dk", "dv"):
            torch.testing.assert_close(got[result][:, 6:], clean[result][:, 6:], rtol=1e-9, atol=1e-11)
    else:
        torch.testing.assert_close(got["0"][:, :5], clean["0"][:, :5], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(got["dq"][:, :5], clean["dq"][:, :5], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 63, 64, 100, 129])
@pytest.mark.parametrize("decay", ["step", "channel"])
def test_a_reset_forgets_nan(decay: str, place: int) -> None:
    case = make(B=1, T=130, H=1, K=3, V=4, decay=decay, dtype=torch.float64)
    inputs = case.inputs()
    with torch.no_grad():
        inputs["log_decay"][:, place] = -math.inf
        inputs["initial_state"].fill_(math.nan)
        inputs["v"][:, :place] = math.inf
    o, state = case.operator(**inputs)
    alone = {name: value[:, place:] for name, value in inputs.items() if name != "initial_state"}
    expected, last = case.operator(**alone)
    torch.testing.assert_close(o[:, place:], expected, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, last, rtol=1e-9, atol=1e-11)
    assert not o[:, :place].isfinite().any()


def test_decays_close_to_one_keep_their_digits() -> None:
    """Over 16384 steps in float32: decays are summed before they are exponentiated, and nothing is subtracted."""
    case = make(B=1, T=16384, H=1, K=4, V=4, decay="none", states="none")
    inputs = case.inputs()
    q, k, v = (inputs[name].detach() for name in "qkv")
    for window in (None, 640):
        g = torch.full((1,), math.log(0.9999))
        got = seqops.linear_attention(q, k, v, g, window=window)[0]
        weight = torch.full((1, 1), math.log(0.9999), dtype=torch.float64).float().double()
        rows = [100, 5000, 16383]
        for t in rows:
            first = 0 if window is None else max(0, t - window + 1)
            age = torch.arange(t - first, -1, -1, dtype=torch.float64)
            score = (k[0, first : t + 1, 0].double() @ q[0, t, 0].double()) * (age * weight[0]).exp() * 0.5
            assert cases.error(got[0, t, 0], score @ v[0, first : t + 1, 0].double()) < 5e-6


# ---------------------------------------------------------------- pieces, sequences, threads


@pytest.mark.parametrize("cuts", [[0], [1], [64], [99], [30, 30, 60]], ids=str)
@pytest.mark.parametrize("decay", DECAYS)
def test_pieces_equal_whole(decay: str, cuts: list[int]) -> None:
    case = make(B=2, T=130, decay=decay, dtype=torch.float64)
    inputs = case.inputs()
    whole, last = case.operator(**inputs)
    state, pieces = inputs.pop("initial_state"), []
    for start, stop in zip([0, *cuts], [*cuts, 130], strict=True):
        piece = {
            n: value if n == "log_decay" and decay == "head" else value[:, start:stop] for n, value in inputs.items()
        }
        o, state = case.operator(**piece, initial_state=state)
        pieces.append(o)
    cases.assert_within({"o": torch.cat(pieces, 1), "state": state}, {"o": whole, "state": last}, 1e-12)


def test_single_steps_equal_one_call() -> None:
    case = make(B=2, T=12, decay="channel", gaps=True)
    inputs = case.inputs()
    whole, last = case.operator(**inputs)
    state, steps = inputs.pop("initial_state"), []
    for t in range(12):
        o, state = case.operator(**{name: value[:, t : t + 1] for name, value in inputs.items()}, initial_state=state)
        steps.append(o)
    cases.assert_within({"o": torch.cat(steps, 1), "state": state}, cases.in_double({"o": whole, "state": last}), 1e-6)


@pytest.mark.parametrize("window", [5, 70, 140])
def test_streaming_under_a_window(window: int) -> None:
    """The last rows that a window can see, and the new ones."""
    case = make(B=1, T=200, decay="step", window=window, dtype=torch.float64)
    inputs = case.inputs()
    whole, last = case.operator(**inputs)
    tail = {n: v[:, 150 - window + 1 :] if torch.is_tensor(v) else v for n, v in inputs.items()}
    o, state = case.operator(**tail)
    expected = {"o": whole[:, 150:], "state": last}
    cases.assert_within({"o": o[:, window - 1 :], "state": state}, expected, 1e-12)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("decay", DECAYS)
def test_packed_equals_separate(decay: str, window: int | None) -> None:
    """Bit by bit; what is NaN in one sequence stays there."""
    case = make(B=1, T=150, decay=decay, packed=True, window=window)
    inputs = case.inputs()
    with torch.no_grad():
        inputs["v"][:, case.edges()[3]] = math.nan
    o, last = case.operator(**inputs)
    edges = inputs.pop("cu_seqlens").tolist()
    state = inputs.pop("initial_state", None)
    for n in range(len(edges) - 1):
        at = slice(edges[n], edges[n + 1])
        own = {
            name: value[:, at] if torch.is_tensor(value) and value.ndim > 1 else value for name, value in inputs.items()
        }
        own |= {} if state is None else {"initial_state": state[n : n + 1]}
        alone, own_last = case.operator(**own)
        assert cases.same_bits(o[:, at], alone) and cases.same_bits(last[n : n + 1], own_last)


@pytest.mark.parametrize(
    "options", [{}, {"decay": "channel"}, {"window": 100}, {"decay": "none", "causal": False}], ids=str
)
def test_number_of_threads_changes_no_bit(options: dict[str, Any]) -> None:
    """One head over 1500 steps: chunks are shared among threads, or marched through by one."""
    case = make(B=1, T=1500, H=1, K=64, V=64, **options)
    inputs, threads = case.inputs(), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(results(case, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        cases.assert_same_bits(other, found[0])


@pytest.mark.parametrize("case", params("tiny", where=lambda case: case.T > 9))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs))


@settings(max_examples=25, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 140),
    K=st.integers(1, 20),
    V=st.integers(1, 20),
    decay=st.sampled_from(DECAYS),
    window=st.one_of(st.none(), st.integers(2, 150)),
    gaps=st.booleans(),
)
def test_any_shape(gaps: bool, **shape: Any) -> None:
    case = make(dtype=torch.float64, gaps=gaps and shape["decay"] != "none", **shape)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    exact.pop("dlog_decay", None)  # may be nothing but a difference of equal sums
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, 1e-11)


# ---------------------------------------------------------------- instruction sets


# avx512_bf16 adds a product of pairs, which is not used here; the whole file runs with it where the machine has it.
@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)
