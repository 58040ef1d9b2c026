"""Values, gradients and behaviour of range_attention on the CPU against the reference in float64."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.range_attention import OPERATORS, Case, draw_ranges
from torch import Tensor

import seqops
from seqops.attention import ranges as patterns
from seqops.attention import reference

params = partial(cases.params, operators=OPERATORS)
make = partial(Case, "range_attention")


def results(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return cases.evaluate(case.operator, inputs, case.cotangents)


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


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_each_output_alone(dtype: torch.dtype, position: int) -> None:
    case = make(B=2, T=20, S=7, dtype=dtype)
    inputs = case.inputs()
    function, exactly = cases.only(position, case.operator), cases.only(position, case.reference)
    cotangents = [case.cotangents(case.operator(**inputs))[position]]
    exact = cases.evaluate(exactly, cases.in_float64(inputs), cotangents)
    bounds = case.bounds(inputs, cotangents, exact | {"1": exact["0"]})
    cases.assert_within(cases.evaluate(function, inputs, cotangents), exact, bounds)


@pytest.mark.parametrize(
    "options",
    [
        {"parts": 2, "S": 3, "each": "both"},
        {"bias": "distance", "each": "row"},
        {"bias": "square_shared", "C": 3},
        {"options": (("activation", "laplace"),), "S": 3},
        {"options": (("activation", "relu2"),), "bias": "square"},
    ],
    ids=str,
)
def test_gradients_are_numerical(options: dict[str, Any]) -> None:
    case = make(B=2, T=5, Tk=6, H=2, Hk=1, D=2, width=4, dtype=torch.float64, **options)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)

    def function(*values: Tensor) -> list[Tensor]:
        outputs = case.operator(**(inputs | dict(zip(leaves, values, strict=True))))
        return [output.masked_fill(output == -torch.inf, 0.0) for output in outputs if output.requires_grad]

    assert torch.autograd.gradcheck(function, (*leaves.values(),))


@pytest.mark.parametrize("activation", ["laplace", "relu2"])
@pytest.mark.parametrize("dtype", cases.WIDE, ids=str)
def test_tiny_weights_have_all_their_digits(dtype: torch.dtype, activation: str) -> None:
    """Each of 2000 queries sees the one key, whose value is 1: o is the weight of a score from -3 to 3."""
    s = torch.linspace(-3, 3, 2000, dtype=dtype)
    one, ranges = torch.ones(1, 1, 1, 1, dtype=dtype), torch.tensor([[[[[0], [1]]]]], dtype=torch.int32)
    q = s.view(1, -1, 1, 1).requires_grad_()
    o, _ = seqops.range_attention(q, one, one, ranges.expand(1, 1, 1, 2, 2000), scale=1.0, activation=activation)
    exact_q = s.double().requires_grad_()
    exact = reference.weight_function(activation, exact_q)
    # A score's own rounding counts up to 200 times here: d log erfc(x) / d log x = 2 x^2.
    bound = 1000 * torch.finfo(dtype).eps
    torch.testing.assert_close(o.flatten().double(), exact.detach(), rtol=bound, atol=0)
    (got,), (expected,) = torch.autograd.grad(o.sum(), q), torch.autograd.grad(exact.sum(), exact_q)
    torch.testing.assert_close(got.flatten().double(), expected, rtol=bound, atol=0)


# ---------------------------------------------------------------- the pattern


@pytest.mark.parametrize("keys", [0, 1, 50])
def test_seen_by_turns_a_pattern_round(keys: int) -> None:
    ranges = draw_ranges(torch.Generator().manual_seed(1), 2, 3, 4, 70, keys=keys, width=9)
    counts, seen = reference.range_counts(ranges, keys), patterns.seen_by(ranges, keys)
    assert seen.shape == (2, 3, 4, 2, keys) and seen.dtype == torch.int32
    assert torch.equal(reference.range_counts(seen, 70), counts.mT)


def test_a_row_that_sees_nothing() -> None:
    """o is 0, lse -inf, no gradient comes from it; and none to a key that nobody sees."""
    q, k, v = (torch.randn(1, 3, 1, 8, requires_grad=True) for _ in range(3))
    ranges = torch.tensor([[0, 1, 1], [1, 1, 2]], dtype=torch.int32)[None, None, None]
    o, lse = seqops.range_attention(q, k, v, ranges)
    assert torch.equal(o[:, 1], torch.zeros(1, 1, 8)) and lse[0, 0, 1] == -math.inf
    do, dlse = torch.ones_like(o), torch.ones_like(lse)
    do[:, 1], dlse[:, :, 1] = math.nan, math.nan
    dq, dk, dv = torch.autograd.grad((o, lse), (q, k, v), (do, dlse))
    assert torch.equal(dq[:, 1], torch.zeros(1, 1, 8))
    assert torch.equal(dk[:, 2], torch.zeros(1, 1, 8)) and torch.equal(dv[:, 2], torch.zeros(1, 1, 8))
    assert all(gradient.isfinite().all() for gradient in (dq, dk, dv))


@pytest.mark.parametrize("T", [7, 130])
def test_ranges_out_of_bounds(T: int) -> None:
    """The operator itself takes them: what is outside is cut off. In whatever order, nothing outside is read."""
    case = make(B=1, T=T, H=1, Hk=1, dtype=torch.float64)
    inputs = case.inputs()
    wild = torch.tensor([-(2**31), -9, 0, 3, T, T + 5, 2**31 - 1], dtype=torch.int32)
    inputs["ranges"] = wild[torch.randint(len(wild), (1, 1, 2, 2, T), generator=case.generator())]
    o, lse = torch.ops.seqops.range_attention(**inputs)
    expected = reference.range_attention(**inputs)
    cases.assert_within({"o": o, "lse": lse}, dict(zip(("o", "lse"), expected, strict=True)), 1e-11)
    inputs["ranges"] = inputs["ranges"].sort(-1).values
    function = cases.as_tuple(torch.ops.seqops.range_attention)
    cotangents = case.cotangents((o, lse))
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(cases.evaluate(function, inputs, cotangents), exact, 1e-11)
    inputs["ranges"] = inputs["ranges"].flip(-1)  # falls: gradients of keys are of another pattern, but of numbers
    got = cases.evaluate(function, inputs, cotangents)
    assert all(got[f"d{name}"].isfinite().all() for name in "qkv")


def test_bounds_must_not_decrease() -> None:
    case = make(B=1, T=4)
    inputs = case.inputs()
    inputs["ranges"] = torch.tensor([[0, 1, 0, 2], [3, 3, 3, 3]], dtype=torch.int32)[None, None, None]
    with pytest.raises(
        ValueError, match=r"^range_attention: ranges: expected bounds that do not decrease, got 0 after "
    ):
        seqops.range_attention(**inputs)


# ---------------------------------------------------------------- NaN stays with those who see it


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "k2", "v2", "grad"])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_nan_stays_with_those_who_see_it(activation: str, name: str, value: float) -> None:
    """One bad row of head 0 of batch row 0: what is not connected with it is as it was."""
    case = make(B=2, T=90, H=2, Hk=2, S=20, parts=2, dtype=torch.float64, options=(("activation", activation),))
    inputs = case.inputs()
    cotangents = [c.contiguous() for c in case.cotangents(case.operator(**inputs))]
    clean, place = cases.evaluate(case.operator, inputs, cotangents), 9
    with torch.no_grad():
        (cotangents[0] if name == "grad" else inputs[name])[0, place, 0, 1] = value
    got = cases.evaluate(case.operator, inputs, cotangents)
    seen = {"": reference.range_counts(inputs["ranges"], 90)[0, 0] > 0}  # [Tq, Tk]
    seen["2"] = reference.range_counts(inputs["ranges2"], 20)[0, 0] > 0
    rows = torch.arange(90) == place  # queries that the bad row reaches
    if name[0] in "kv":
        rows = seen[name[1:]][:, place]
    assert rows.any() and not rows.all()
    reached = {"0": rows if name != "grad" else rows & False, "dq": rows}
    for source, pairs in seen.items():
        reached[f"dk{source}"] = reached[f"dv{source}"] = pairs[rows].any(0)
    for result, where in reached.items():
        same = torch.ones(2, len(where), 2, dtype=torch.bool)
        same[0, :, 0] = ~where
        torch.testing.assert_close(got[result][same], clean[result][same], rtol=1e-9, atol=1e-11)
    if name != "grad":
        assert not got["0"][0, rows, 0].isfinite().all()
    if value != value:
        assert got["dq"][0, rows, 0].isnan().all()


@pytest.mark.parametrize(
    "case", params("small", where=lambda case: case.B * case.T > 0 and case.dtype == torch.float64)
)
def test_nan_in_values_as_in_the_reference(case: Case) -> None:
    inputs = case.inputs()
    with torch.no_grad():
        inputs["v"][:, ::7] = math.nan
        inputs["v"][:, 3::7, :, ::2] = -math.inf
    got, exact = case.operator(**inputs), case.reference(**cases.in_float64(inputs))
    bound = case.bounds(inputs, (), {"0": exact[0].detach()})["0"]
    cases.assert_within({"o": got[0].detach()}, {"o": exact[0].detach()}, bound)


# ---------------------------------------------------------------- threads, runs, transforms, memory, instruction sets


@pytest.mark.parametrize("options", [{"S": 90, "parts": 2}, {"bias": "square"}], ids=str)
def test_number_of_threads_changes_no_bit(options: dict[str, Any]) -> None:
    case = make(B=2, T=300, H=2, Hk=1, D=16, width=150, **options)
    inputs, threads = case.inputs(), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            found.append(results(case, inputs))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        cases.assert_same_bits(other, found[0])


@pytest.mark.parametrize("options", [{"S": 4}, {"bias": "distance"}], ids=str)
@pytest.mark.parametrize(
    "mapped", [("q", "k"), ("v", "ranges"), ("q", "k", "v", "ranges", "k2", "v2", "ranges2", "bias")]
)
def test_vmap_is_a_loop(mapped: tuple[str, ...], options: dict[str, Any]) -> None:
    each = [make(B=2, T=9, dtype=torch.float64, each="row", **options).inputs() for _ in range(3)]
    generator = torch.Generator().manual_seed(3)
    for inputs in each:
        for name, value in inputs.items():
            if name.startswith("ranges"):
                keys = inputs["k2" if name == "ranges2" else "k"].shape[1]
                inputs[name] = draw_ranges(generator, *value.shape[:3], 9, keys=keys, width=5)
            elif torch.is_tensor(value):
                inputs[name] = torch.randn(value.shape, dtype=value.dtype, generator=generator)
    names = [name for name in mapped if name in each[0]]
    stacked = [torch.stack([inputs[name] for inputs in each], 1) for name in names]

    def loss(*values: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = torch.ops.seqops.range_attention(**(each[0] | dict(zip(names, values, strict=True))))
        return o.square().sum() + torch.where(lse == -torch.inf, 0.0, lse).sum(), (o, lse)

    wanted = tuple(i for i, name in enumerate(names) if not name.startswith("ranges"))
    function = torch.func.grad_and_value(loss, wanted, has_aux=True)
    got = torch.func.vmap(function, 1)(*stacked)
    expected = [function(*(inputs[name] for name in names)) for inputs in each]
    flat, _ = torch.utils._pytree.tree_flatten(got)
    loops = [torch.utils._pytree.tree_flatten(one)[0] for one in expected]
    for values, column in zip(flat, zip(*loops, strict=True), strict=True):
        torch.testing.assert_close(values, torch.stack(column), rtol=1e-12, atol=1e-12)


MEMORY = """
import resource, torch, seqops
def used():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def call(T):
    q, k, v = (torch.randn(1, T, 1, 8, requires_grad=True) for _ in range(3))
    i = torch.arange(T, dtype=torch.int32)
    o, lse = seqops.range_attention(q, k, v, torch.stack([(i - 20).clamp(min=0), i + 1])[None, None, None])
    (o.sum() + lse.sum()).backward()
call(100)
before = used()
call(50000)
print(used() - before)
"""


def test_memory_is_linear_in_time(run_python: Callable[..., str]) -> None:
    """50000 queries forward and backward: one bit for each pair would be 300 MB."""
    assert float(run_python(MEMORY)) < 60


# avx512_bf16 adds a product of pairs, which is not used here; the whole file runs with it where the machine has it.
@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)
