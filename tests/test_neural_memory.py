"""Values, gradients and behaviour of neural_memory on the CPU; Triton: test_neural_memory_triton.py."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.neural_memory import OPERATORS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from seqops.ttt import reference

params = partial(cases.params, operators=OPERATORS)
make = partial(Case, "neural_memory")
MEMORIES = pytest.mark.parametrize("F", [None, 6], ids=["linear", "mlp"])
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["gd", "muon"])
GATED = ("lr", "decay", "momentum")


def results(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return cases.evaluate(case.operator, inputs, case.cotangents)


def piece(inputs: dict[str, Any], start: int, stop: int, state: Sequence[Tensor] = ()) -> dict[str, Any]:
    """The inputs of tokens start .. stop - 1, after the results `state`: weights, then momentum."""
    cut = {name: t[:, start:stop] if name in ("q", "k", "v", *GATED) else t for name, t in inputs.items()}
    layers = len(state) // 2
    return cut | {f"w{i + 1}": t for i, t in enumerate(state[:layers])} | named("s", state[layers:])


def named(letter: str, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{letter}{i + 1}": t for i, t in enumerate(tensors)}


def detached(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: t.detach().clone() if torch.is_tensor(t) else t for name, t in inputs.items()}


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("loss", ["l2", "dot"])
@MEMORIES
def test_gradients_are_those_of_the_loss(F: int | None, loss: str) -> None:
    D = 4
    shapes = [(D, D)] if F is None else [(F, D), (D, F)]
    weights = [torch.randn(1, 1, *shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    x, y = torch.randn(2, 1, 1, D, 1, dtype=torch.float64)
    f = weights[0] @ x if F is None else x + weights[1] @ silu(weights[0] @ x)
    value = (f - y).square().sum() / 2 if loss == "l2" else -(f * y).sum()
    expected = torch.autograd.grad(value, weights)
    found = reference.memory_gradients(weights, x, y, loss)
    cases.assert_within(named("d", found), named("d", expected), 1e-14)


def test_reference_of_one_token_is_the_rule() -> None:
    """o = f(M; q) with M = (1 - decay) W + S, S = momentum S - lr u."""
    case = make(B=1, T=1, F=None, state=True, dtype=torch.float64)
    inputs = detached(case.inputs())
    q, k, v, w, s = (inputs[name] for name in ("q", "k", "v", "w1", "s1"))
    gates = {name: inputs[name][:, 0, :, None, None] for name in GATED}
    error = torch.einsum("bhij,bthj->bhi", w, k) - v[:, 0]
    momentum = gates["momentum"] * s - gates["lr"] * error[..., None] * k[:, 0, :, None]
    learnt = (1 - gates["decay"]) * w + momentum
    expected = {"o": torch.einsum("bhij,bthj->bthi", learnt, q), "w": learnt, "s": momentum}
    found = dict(zip("ows", case.reference(**inputs), strict=True))
    cases.assert_within(found, expected, 1e-14)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == case.output_dtypes
    cotangents = case.cotangents(outputs)
    exact = cases.exact_results(case, inputs, cotangents)
    got = cases.evaluate(case.operator, inputs, cotangents)
    assert {n: got[f"d{n}"].dtype for n in cases.differentiable(inputs)} == {
        n: t.dtype for n, t in cases.differentiable(inputs).items()
    }
    cases.assert_within(got, exact, case.bounds(inputs, cotangents, exact))


# Chunks of more tokens than there are coefficients in buffers at a time, and segments of several chunks.
@pytest.mark.parametrize(("T", "C"), [(150, 140), (129, 64), (140, 1), (90, 5)])
@MEMORIES
def test_long_chunks_and_many(F: int | None, T: int, C: int) -> None:
    case = make(B=1, T=T, H=1, D=5, F=F, C=C, state=True, options=(("window", 70),), dtype=torch.float64)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, 1e-11)


@pytest.mark.parametrize("case", params("tiny", where=lambda case: not case.iterated))
def test_each_output_alone(case: Case) -> None:
    """A gradient of one result only."""
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    for position, cotangent in enumerate(case.cotangents(outputs)):
        function, exact = cases.only(position, case.operator), cases.only(position, case.reference)
        expected = cases.evaluate(exact, cases.in_float64(inputs), [cotangent])
        cases.assert_within(cases.evaluate(function, inputs, [cotangent]), expected, 1e-4)


@pytest.mark.parametrize("options", [(), (("loss", "dot"), ("window", 2)), (("optimizer", "muon"),)], ids=str)
@MEMORIES
def test_gradients_are_numerical(F: int | None, options: tuple[tuple[str, Any], ...]) -> None:
    """Through updates, gates and states."""
    case = make(B=1, T=7, H=1, D=2, F=F and 3, C=3, state=True, dtype=torch.float64, options=options)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    assert torch.autograd.gradcheck(
        lambda *values: case.operator(**(inputs | dict(zip(leaves, values, strict=True)))),
        (*leaves.values(),),
        rtol=1e-3 if case.iterated else 1e-5,
        fast_mode=case.iterated,
    )


# ---------------------------------------------------------------- special gates


@OPTIMIZERS
@MEMORIES
def test_without_a_rate_nothing_is_learnt(F: int | None, optimizer: str) -> None:
    case = make(F=F, gates="none", options=(("optimizer", optimizer),))
    inputs = detached(case.inputs())
    inputs["lr"].zero_()
    o, *state = case.operator(**inputs)
    weights = [inputs[f"w{i + 1}"] for i in range(case.layers)]
    for got, given_ in zip(state, weights, strict=False):
        assert torch.equal(got, given_)
    assert not any(got.any() for got in state[case.layers :])
    recalled = reference.recall(weights, inputs["q"].movedim(1, -1)).movedim(-1, 1)
    cases.assert_within({"o": o}, {"o": recalled}, 1e-6)


@MEMORIES
def test_full_decay_forgets(F: int | None) -> None:
    """All of the weights but the last step."""
    case = make(F=F, gates="decay", T=9, C=4, dtype=torch.float64)
    inputs = detached(case.inputs())
    inputs["decay"].zero_()
    inputs["decay"][:, 8] = 1  # the first token of its chunk
    _, *state = case.operator(**inputs)
    for weights, steps in zip(state[: case.layers], state[case.layers :], strict=True):
        torch.testing.assert_close(weights, steps, rtol=1e-12, atol=1e-14)
    forgotten = inputs | {"decay": torch.ones_like(inputs["decay"])}
    forgotten |= {name: t[:, 8:] for name, t in forgotten.items() if name in ("q", "k", "v", *GATED)}
    with torch.no_grad():
        before = case.operator(**piece(inputs, 0, 8))
    expected = case.operator(**piece(forgotten, 0, 1, before[1:]))
    cases.assert_within(named("w", state), named("w", expected[1:]), 1e-12)


@MEMORIES
def test_gates_of_zeros_are_no_gates(F: int | None) -> None:
    case = make(F=F, gates="none", dtype=torch.float64)
    inputs = detached(case.inputs())
    zeros = torch.zeros_like(inputs["lr"])
    plain = case.operator(**inputs)
    gated = case.operator(**inputs, decay=zeros, momentum=zeros)
    cases.assert_within(named("r", gated), named("r", plain), 1e-13)


# ---------------------------------------------------------------- pieces


@OPTIMIZERS
@pytest.mark.parametrize("T", [0, 1, 3, 4, 5, 8, 13])
@MEMORIES
def test_pieces_equal_whole(F: int | None, T: int, optimizer: str) -> None:
    """Cut at multiples of the chunk; and the last piece, token by token, from the start of its chunk."""
    case = make(T=T, C=4, F=F, state=True, dtype=torch.float64, options=(("window", 2), ("optimizer", optimizer)))
    inputs = detached(case.inputs())
    whole, *last = case.operator(**inputs)
    state = [inputs[f"{letter}{i + 1}"] for letter in "ws" for i in range(case.layers)]
    outputs = [whole[:, :0]]
    for start in range(0, T, 4):
        before = state
        for stop in range(start + 1, min(start + 4, T) + 1):
            o, *state = case.operator(**piece(inputs, start, stop, before))
            outputs.append(o[:, -1:])
    found = {"o": torch.cat(outputs, 1)} | named("state", state)
    cases.assert_within(found, {"o": whole} | named("state", last), 1e-10 if case.iterated else 1e-12)
    for cut in (0, 4, 8):
        if cut <= T:
            o, *state = case.operator(**piece(inputs, 0, cut))
            o2, *state = case.operator(**piece(inputs, cut, T, state))
            found = {"o": torch.cat([o, o2], 1)} | named("state", state)
            cases.assert_within(found, {"o": whole} | named("state", last), 1e-10 if case.iterated else 1e-12)


@MEMORIES
def test_results_without_tokens_are_copies(F: int | None) -> None:
    case = make(T=0, F=F, state=True)
    inputs = case.inputs()
    o, *state = case.operator(**inputs)
    given_ = [inputs[f"{letter}{i + 1}"] for letter in "ws" for i in range(case.layers)]
    assert o.shape == inputs["q"].shape
    for got, expected in zip(state, given_, strict=True):
        assert torch.equal(got, expected) and got.data_ptr() != expected.data_ptr()


# ---------------------------------------------------------------- what a token sees


@OPTIMIZERS
@pytest.mark.parametrize("C", [4, 100])
@MEMORIES
def test_no_token_sees_later_ones(F: int | None, C: int, optimizer: str) -> None:
    """Whatever stands at token 70, bits before it stay."""
    case = make(B=1, T=90, H=1, C=C, F=F, options=(("optimizer", optimizer), ("window", 3)))
    inputs = detached(case.inputs())
    o = case.operator(**inputs)[0]
    for name in ("q", "k", "v", *GATED):
        other = inputs | {name: inputs[name].clone()}
        other[name][:, 70] += 0.5 if name in ("q", "k", "v") else 0.05
        changed = case.operator(**other)[0]
        assert torch.equal(changed[:, :70], o[:, :70]), name
        complete = optimizer == "gd" or name == "q" or C == 4
        assert not complete or not torch.equal(changed[:, 70:], o[:, 70:]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("C", [4, 100])
@pytest.mark.parametrize("name", ["q", "k", "v", *GATED, "grad"])
@MEMORIES
def test_nan_stays_where_it_is_seen(F: int | None, name: str, C: int, value: float) -> None:
    """At token 70 of one head: other heads and rows, and what comes before, are what they are without."""
    case = make(B=2, T=90, H=2, C=C, F=F, D=5, state=True, dtype=torch.float64, options=(("window", 3),))
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    clean = cases.evaluate(case.operator, inputs, cotangents)
    with torch.no_grad():
        place = (0, 70, 0) if name in GATED else (0, 70, 0, 1)
        if name == "grad":
            cotangents[0] = cotangents[0].clone()
            cotangents[0][place] = value
        else:
            inputs[name][place] = value
    got = cases.evaluate(case.operator, inputs, cotangents)
    assert not all(t.isfinite().all() for t in got.values())
    for result, t in got.items():
        by_time = result == "0" or result[1:] in ("q", "k", "v", *GATED)
        head = 2 if by_time else 1
        torch.testing.assert_close(t[1:], clean[result][1:], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(t.select(head, 1), clean[result].select(head, 1), rtol=1e-9, atol=1e-11)
    if name == "grad":  # gradients go back in time
        for result in ("0", "dq", "dk", "dv"):
            later = slice(71, None)
            torch.testing.assert_close(got[result][:, later], clean[result][:, later], rtol=1e-9, atol=1e-11)
    else:
        for result in ("0", "dq"):
            torch.testing.assert_close(got[result][:, :70], clean[result][:, :70], rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- bits, memory, modes


@MEMORIES
def test_threads_and_batch_change_no_bit(F: int | None) -> None:
    case = make(B=3, T=80, H=2, D=40, F=F and 70, C=16, state=True)
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
    alone = case.operator(**{name: t[1:2] if torch.is_tensor(t) else t for name, t in inputs.items()})
    cases.assert_same_bits(
        {str(i): t for i, t in enumerate(alone)}, {str(i): found[0][str(i)][1:2] for i in range(len(alone))}
    )


@pytest.mark.parametrize("case", params("tiny"))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs))


@OPTIMIZERS
def test_under_inference_mode(optimizer: str) -> None:
    case = make(options=(("optimizer", optimizer),))
    inputs = case.inputs()
    expected = case.operator(**inputs)
    with torch.inference_mode():
        got = case.operator(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


PEAK = """
import resource, torch, seqops
def step(T):
    q, k, v = (torch.randn(1, T, 1, 64) * 0.1 for _ in range(3))
    lr, decay, momentum = (torch.rand(1, T, 1) * 0.01 for _ in range(3))
    weights = [(torch.randn(1, 1, *shape) * 0.1).requires_grad_() for shape in ((128, 64), (64, 128))]
    o, *_ = seqops.neural_memory(q, k, v, lr, weights, CHUNK, decay=decay, momentum=momentum, optimizer=OPTIMIZER)
    o.sum().backward()
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
step(300)
before = peak()
step(TOKENS)
print("MiB", peak() - before)
"""


@pytest.mark.parametrize(
    ("chunk", "tokens", "optimizer"),
    [
        (16, 4096, "gd"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((1, 2048, "gd"), (16, 4096, "muon"))),
    ],
)
def test_no_weights_of_every_token(chunk: int, tokens: int, optimizer: str, run_python: Callable[..., str]) -> None:
    """Weights of 64 KB, of each of which a state of every token would take 128 MiB or 64."""
    script = PEAK.replace("CHUNK", str(chunk)).replace("TOKENS", str(tokens)).replace("OPTIMIZER", repr(optimizer))
    grown = float(run_python(script).split()[-1])
    assert grown < 40


@settings(max_examples=20, deadline=None)
@given(
    B=st.integers(1, 2),
    T=st.integers(1, 40),
    D=st.integers(1, 20),
    F=st.one_of(st.none(), st.integers(1, 35)),
    C=st.integers(1, 45),
    window=st.integers(1, 50),
    loss=st.sampled_from(["l2", "dot"]),
    gates=st.sampled_from(["none", "decay", "momentum", "both", "edges"]),
    state=st.booleans(),
)
def test_any_shape(window: int, loss: str, **shape: Any) -> None:
    case = make(dtype=torch.float64, options=(("loss", loss), ("window", window)), **shape)
    inputs = case.inputs()
    with torch.no_grad():  # a step sums as many rates: else weights grow without end, and rounding errors with them
        inputs["lr"] /= min(window, case.C)
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, 1e-10)


# ---------------------------------------------------------------- instruction sets


# avx512_bf16 adds a product of pairs, which is not used here; the whole file runs with it where the machine has it.
# What "muon" is made of has tests of its own.
@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", "-k", "not muon", SEQOPS_CPU_ISA=isa)
