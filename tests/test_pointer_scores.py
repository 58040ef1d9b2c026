"""pointer_scores: against the reference, lengths, extreme numbers, what NaN reaches, and on other backends."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases import Case, assert_same_bits, assert_within, evaluate, exact_results
from cases.pointer_scores import Case as Pointer
from torch import Tensor

import seqops
from seqops.attention import reference

OP = "pointer_scores"
HAS_TRITON = importlib.util.find_spec("triton") is not None
params = partial(cases.params, operators=(OP,))
make = partial(Pointer, OP)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
MODES = [rungs("additive"), rungs("clipped_dot")]


def results(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients, for gradients of ones and twos."""

    def cotangents(outputs: Any) -> list[Tensor]:
        pattern = torch.arange(outputs[0].numel(), dtype=outputs[0].dtype).view(outputs[0].shape) % 2 + 1
        return [pattern]

    return evaluate(cases.as_tuple(seqops.pointer_scores), inputs, cotangents)


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    exact = exact_results(case, inputs, cotangents)
    assert outputs[0].dtype == case.dtype
    assert_within(evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact))


def test_formula() -> None:
    """As it is written, one pair after the other."""
    inputs = make(B=2, T=3, Tk=4, A=5, dtype=torch.float64, lengths=True).inputs()
    q, k, w = (inputs[name].tolist() for name in ("query", "key", "weight"))
    for mode in ("additive", "clipped_dot"):
        got = seqops.pointer_scores(**inputs | {"mode": mode, "clip": 3.0, "lengths": torch.tensor([4, 2])})
        for b, length in enumerate((4, 2)):
            for i in range(3):
                pairs = [[*zip(q[b][i], k[b][j], w, strict=True)] for j in range(length)]
                scores = [
                    sum(c * math.tanh(x + y) for x, y, c in pair)
                    if mode == "additive"
                    else 3 * math.tanh(sum(x * y for x, y, _ in pair) / math.sqrt(5))
                    for pair in pairs
                ]
                total = math.log(sum(map(math.exp, scores)))
                expected = [score - total for score in scores] + [-math.inf] * (4 - length)
                torch.testing.assert_close(got[b, i], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("mode", MODES)
def test_probabilities_add_up_to_one(mode: str) -> None:
    inputs = make(B=3, T=5, lengths=True, mode=mode).inputs()
    total = seqops.pointer_scores(**inputs).exp().sum(-1)
    torch.testing.assert_close(total, (inputs["lengths"] > 0).float().unsqueeze(1).expand(-1, 5))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [rungs(math.nan), math.inf])
def test_past_the_length_nothing_counts(mode: str, value: float) -> None:
    """Neither keys nor the gradients of their log_p, even if they are NaN; a length of 0 has no gradients at all."""
    inputs = make(B=4, T=6, mode=mode).inputs()
    lengths = torch.tensor([23, 0, 7, -3])
    clean = results(inputs | {"lengths": lengths})
    past = torch.arange(23) >= lengths.unsqueeze(1)
    spoiled = {name: inputs[name].detach().clone() for name in ("query", "key", "weight")}
    spoiled["key"][past] = value
    spoiled["query"][1] = value
    leaves = {name: tensor.requires_grad_() for name, tensor in spoiled.items()}
    outputs = (seqops.pointer_scores(**inputs | leaves, lengths=lengths),)
    grad = torch.arange(outputs[0].numel(), dtype=torch.float32).view(outputs[0].shape) % 2 + 1
    grad = grad.masked_fill(past.unsqueeze(1), value)
    names = [name for name in leaves if f"d{name}" in clean]
    gradients = torch.autograd.grad(outputs, [leaves[name] for name in names], [grad], materialize_grads=True)
    assert torch.equal(outputs[0], clean["0"]) and (outputs[0][past.unsqueeze(1).expand(-1, 6, -1)] == -math.inf).all()
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.equal(gradient, clean[f"d{name}"]), name
    assert (gradients[0][[1, 3]] == 0).all() and (gradients[1][past] == 0).all()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [rungs("query"), "key"])
def test_nan_stays_where_it_belongs(mode: str, name: str) -> None:
    """A query reaches its own row, a key all rows of its batch row, neither another batch row."""
    inputs = make(B=3, T=6, mode=mode).inputs()
    clean = results(inputs)
    spoiled = inputs | {name: inputs[name].detach().clone()}
    spoiled[name][1, 4, 2] = math.nan
    spoiled[name].requires_grad_()
    got = results(spoiled)
    rows = slice(4, 5) if name == "query" else slice(None)
    expected = torch.zeros_like(got["0"], dtype=torch.bool)
    expected[1, rows] = True
    assert torch.equal(got["0"].isnan(), expected)
    for result in ("0", "dquery", "dkey"):
        assert torch.equal(got[result][[0, 2]], clean[result][[0, 2]])
    if name == "query":
        torch.testing.assert_close(got["dquery"][1, [0, 1, 2, 3, 5]], clean["dquery"][1, [0, 1, 2, 3, 5]])


@pytest.mark.parametrize("dtype", [rungs(torch.float32), torch.float64])
def test_numbers_of_every_size(dtype: torch.dtype) -> None:
    """e^{2x} of a query may overflow where that of a key vanishes: the sum decides."""
    sizes = torch.tensor([0.0, 1e-30, 1e-3, 1.0, 9.9, 10.1, 44.0, 80.1, 400.0, 1e30], dtype=dtype)
    values = torch.cat([sizes, -sizes])
    query = values.view(1, -1, 1).expand(1, -1, 3).contiguous().requires_grad_()
    key = (values.flip(0) + 0.25).view(1, -1, 1).expand(1, -1, 3).contiguous().requires_grad_()
    weight = torch.tensor([0.5, -0.25, 2.0], dtype=dtype, requires_grad=True)
    inputs = {"query": query, "key": key, "weight": weight}
    got = results(inputs)
    pattern = torch.arange(got["0"].numel(), dtype=dtype).view(got["0"].shape) % 2 + 1
    exact = evaluate(cases.as_tuple(reference.pointer_scores), cases.in_float64(inputs), [pattern])
    assert_within(got, exact, 1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("size", [rungs(1e16), rungs(math.inf)])
def test_weights_of_every_size(size: float) -> None:
    query, key = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 0.0], [0.5, 0.0], [-1.0, 0.0]]])
    got = seqops.pointer_scores(query, key, torch.tensor([size, 1.0])).flatten()
    if size == math.inf:
        assert got.isnan().all()  # inf - inf, as of torch's log_softmax
    else:
        torch.testing.assert_close(got, (size * key[0, :, 0].tanh()).log_softmax(0))


def test_lengths_beyond_the_keys_are_all() -> None:
    inputs = make(B=3, T=4).inputs()
    assert torch.equal(
        seqops.pointer_scores(**inputs, lengths=torch.tensor([23, 24, 2**40])), seqops.pointer_scores(**inputs)
    )


def test_one_query_at_a_time_is_all_at_once() -> None:
    inputs = make(B=2, T=7, Tk=40, A=70).inputs()
    whole = seqops.pointer_scores(**inputs)
    steps = [seqops.pointer_scores(**inputs | {"query": inputs["query"][:, i : i + 1]}) for i in range(7)]
    assert torch.equal(torch.cat(steps, 1), whole)


def test_weights_are_not_read_by_the_dot() -> None:
    inputs = make(B=2, T=5, mode="clipped_dot").inputs()
    (dweight,) = torch.autograd.grad(seqops.pointer_scores(**inputs).sum(), inputs["weight"], materialize_grads=True)
    assert torch.equal(dweight, torch.zeros_like(dweight))
    without = seqops.pointer_scores(**inputs | {"weight": None})
    spoiled = seqops.pointer_scores(**inputs | {"weight": torch.full_like(inputs["weight"], math.nan)})
    assert torch.equal(spoiled, without)


# ---------------------------------------------------------------- determinism and memory


@pytest.mark.parametrize("case", [case.with_marks() for case in cases.CASES[OP] if "small" in case.marks], ids=str)
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)


@pytest.mark.sanitize
@pytest.mark.parametrize("mode", ["additive", "clipped_dot"])
def test_number_of_threads_changes_no_bit(mode: str) -> None:
    inputs = make(B=3, T=40, Tk=50, A=100, mode=mode, lengths=True).inputs()
    single = results(inputs)
    torch.set_num_threads(2)
    assert_same_bits(results(inputs), single)


PEAK = """
import torch, seqops
from bench.memory import read_status, reset_peak
torch.set_num_threads(1)
def step(T):
    q, k, w = (torch.randn(*s, requires_grad=True) for s in ((2, T, 256), (2, T, 256), (256,)))
    before = read_status("VmRSS")
    reset_peak()
    seqops.pointer_scores(q, k, w).sum().backward()
    return read_status("VmHWM") - before
step(8)
print(step(512))
"""


def test_memory(run_python: Callable[..., str]) -> None:
    """A training step of 1 MB queries and keys and 2 MB of log_p: nothing of the 512 MB that all tanh take."""
    assert int(run_python(PEAK)) < 24 << 20


# ---------------------------------------------------------------- again, elsewhere


@pytest.mark.parametrize(
    "isa", ["avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("baseline", "avx512"))]
)
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_interpreter(run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")
