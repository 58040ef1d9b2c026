"""prob_sparse_attention: against the reference, its selection, its fill, what leaks, and on other backends."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import cases
import pytest
import torch
from cases import Case, assert_same_bits, assert_within, evaluate, exact_results
from cases.prob_sparse_attention import Case as Sparse
from torch import Tensor

import seqops
from seqops.attention import reference

OP = "prob_sparse_attention"
HAS_TRITON = importlib.util.find_spec("triton") is not None
ops = torch.ops.seqops
params = partial(cases.params, operators=(OP,))
make = partial(Sparse, OP)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
CAUSAL = (("causal", True),)


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    exact = exact_results(case, inputs, cotangents)
    assert outputs[0].dtype == case.dtype
    assert_within(evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact))


# ---------------------------------------------------------------- the selection


def drawn(T: int, U: int, dtype: torch.dtype = torch.float32, H: int = 2, D: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(T + U)
    q, k = (torch.randn(2, T, heads, D, generator=generator).to(dtype) for heads in (H, 1))
    return q, k, torch.randint(-2, T + 2, (T, U), generator=generator)


@pytest.mark.parametrize(
    ("T", "U", "dtype"),
    [rungs(7, 9, torch.float64), (16, 3, torch.float16), (37, 20, torch.float32), (90, 35, torch.bfloat16)],
)
def test_every_rank(T: int, U: int, dtype: torch.dtype) -> None:
    """For each `top` the positions of the largest measures, ascending: so the whole order of the measure is right."""
    q, k, samples = drawn(T, U, dtype)
    measure = reference.sampled_measure(q.double(), k.double(), samples)
    ordered = measure.sort(-1).values
    assert (ordered.diff(dim=-1)[ordered[..., 1:].isfinite()] > 1e-6).mean(dtype=torch.float64) > 0.9
    order = measure.sort(dim=-1, descending=True, stable=True)
    for top in range(1, T + 1):
        clear = top == T or order.values[..., top - 1] - order.values[..., top] > 1e-5
        got = ops.prob_sparse_rows(q, k, samples, top)
        expected = order.indices[..., :top].sort(-1).values
        assert torch.equal(got[clear], expected[clear]) and got.dtype == torch.int64


@pytest.mark.parametrize("integer", [rungs(torch.int32), torch.int64])
def test_by_hand(integer: torch.dtype) -> None:
    """One channel, keys 1, 2, 3, 4: what is sampled twice counts twice, and the sum is divided by T, not by U."""
    k = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    samples = torch.tensor([[0, 3, 3], [3, 3, 3], [0, 1, 9], [-1, 7, 4]], dtype=integer)
    measure = torch.tensor([4 - 9 / 4, 4 - 12 / 4, 2 - 3 / 4, -math.inf])
    q = torch.ones(1, 4, 1, 1)
    torch.testing.assert_close(reference.sampled_measure(q, k, samples).flatten(), measure)
    for top, expected in ((1, [0]), (2, [0, 2]), (3, [0, 1, 2]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        assert ops.prob_sparse_rows(q, k, samples, top).flatten().tolist() == expected
    # Without its duplicates row 1 has 4 - 4 / 4 = 3, and leads.
    samples[1, 1:] = -1
    assert ops.prob_sparse_rows(q, k, samples, 1).item() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_lower_index_and_nan_leads(dtype: torch.dtype) -> None:
    q = torch.zeros(1, 40, 1, 3, dtype=dtype)
    k = torch.ones_like(q)
    samples = torch.arange(40).unsqueeze(1).expand(-1, 4).contiguous()
    q[:, 1::2] = -q[:, 1::2]  # a measure of -0 is one of 0
    assert ops.prob_sparse_rows(q, k, samples, 17).flatten().tolist() == [*range(17)]
    q[:, 30], q[:, 33], q[:, 20] = math.nan, 5.0, math.nan
    assert ops.prob_sparse_rows(q, k, samples, 1).flatten().tolist() == [20]
    assert ops.prob_sparse_rows(q, k, samples, 5).flatten().tolist() == [0, 1, 20, 30, 33]
    samples[:5] = 40
    assert ops.prob_sparse_rows(q, k, samples, 5).flatten().tolist() == [5, 6, 20, 30, 33]
    samples[:] = -1  # nobody has a sample
    assert ops.prob_sparse_rows(q, k, samples, 3).flatten().tolist() == [0, 1, 2]


def test_a_sample_that_is_none_is_not_read() -> None:
    """Far outside, where 32 bits would come back in."""
    q, k, samples = drawn(12, 6)
    expected = ops.prob_sparse_rows(q, k, samples, 4)
    outside = (samples < 0) | (samples >= 12)
    for place in (-(2**62), 2**32, 2**62):
        moved = torch.where(outside, place, samples)
        assert torch.equal(ops.prob_sparse_rows(q, k, moved, 4), expected)
    assert outside.any()


@pytest.mark.parametrize("causal", [False, True])
def test_all_selected_is_full_attention(causal: bool) -> None:
    inputs = make(B=2, T=21, top=50, options=(("causal", causal),)).inputs()
    q, k, v = (inputs[name].detach() for name in "qkv")
    expected, _ = seqops.chunked_attention(q, k, v, 21, causal=causal)
    torch.testing.assert_close(seqops.prob_sparse_attention(**inputs), expected)


def test_the_selection_has_no_gradient() -> None:
    """Gradients are those of an attention with fixed rows: a query that is not selected has none."""
    inputs = make(B=1, T=15, top=3).inputs()
    index = ops.prob_sparse_rows(*(inputs[name] for name in ("q", "k", "sample_index", "top")))
    assert not index.requires_grad
    (dq,) = torch.autograd.grad(seqops.prob_sparse_attention(**inputs).square().sum(), inputs["q"])
    selected = torch.zeros(1, 4, 15, dtype=torch.bool).scatter(2, index, True)
    assert torch.equal(dq.abs().sum(-1).mT > 0, selected)


# ---------------------------------------------------------------- the fill


def fill(v: Tensor, rows: Tensor, index: Tensor, causal: bool) -> Tensor:
    """As it is written, in float64."""
    H, T = index.shape[1], v.shape[1]
    values = v.double().repeat_interleave(H // v.shape[2], dim=2)
    o = values.cumsum(1) if causal else values.mean(1, keepdim=True).expand(-1, T, -1, -1)
    places = index.movedim(1, 2).unsqueeze(-1).expand(rows.shape)
    return o.scatter(1, places, rows.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("T", "N", "H", "Hk", "D"), [rungs(19, 4, 4, 2, 21), (1, 1, 1, 1, 1), (9, 9, 2, 1, 5), (200, 7, 3, 3, 40)]
)
def test_fill(dtype: torch.dtype, causal: bool, T: int, N: int, H: int, Hk: int, D: int) -> None:
    generator = torch.Generator().manual_seed(T)
    v, rows = (torch.randn(2, *sizes, generator=generator).to(dtype) for sizes in ((T, Hk, D), (N, H, D)))
    index = torch.rand(2, H, T, generator=generator).argsort(-1)[..., :N].sort(-1).values
    leaves = {"v": v.requires_grad_(), "rows": rows.requires_grad_(), "index": index, "causal": causal}
    got = evaluate(lambda **given: (ops.prob_sparse_fill(**given),), leaves, lambda o: [torch.sin(o[0]) * 2])
    cotangent = (torch.sin(got["0"]) * 2).double()
    exact = evaluate(lambda **given: (fill(**given),), cases.in_float64(leaves), [cotangent])
    bound = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 6e-4, torch.bfloat16: 5e-3}[dtype]
    assert_within(got, exact, {name: 3 * bound for name in exact})
    assert torch.equal(got["0"].gather(1, index.movedim(1, 2).unsqueeze(-1).expand(rows.shape)), rows)


@pytest.mark.parametrize("value", [rungs(math.nan), math.inf])
def test_running_sums_take_in_nothing_later(value: float) -> None:
    """v at t reaches rows from t on; the gradient of row i reaches v up to i, and none where i is selected."""
    v, rows = torch.randn(1, 30, 1, 6), torch.randn(1, 2, 1, 6)
    index = torch.tensor([[[3, 25]]])
    clean = ops.prob_sparse_fill(v, rows, index, causal=True)
    spoiled = v.clone()
    spoiled[0, 17, 0, 2] = value
    got = ops.prob_sparse_fill(spoiled, rows, index, causal=True)
    assert torch.equal(got[0, :17], clean[0, :17]) and torch.equal(got[0, 25], rows[0, 1])
    assert (got[0, [17, 18, 24, 26, 29], 0, 2].isfinite() == 0).all()
    grad = torch.randn(1, 30, 1, 6)
    clean_dv, _ = ops.prob_sparse_fill_backward(grad, index, 1, causal=True)
    for row, reached in ((17, 18), (25, 0)):
        changed = grad.clone()
        changed[0, row, 0, 2] = value
        dv, drows = ops.prob_sparse_fill_backward(changed, index, 1, causal=True)
        assert torch.equal(dv[0, reached:], clean_dv[0, reached:]) and not dv[0, :reached, 0, 2].isfinite().any()
        assert torch.equal(drows[0, :, 0].isfinite().all(-1), torch.tensor([True, row != 25]))


# ---------------------------------------------------------------- what leaks, and what does not


@pytest.mark.parametrize("name", ["q", "k"])
def test_it_leaks(name: str) -> None:
    """As published: other queries or keys of the future change which of the earlier rows attend."""
    generator = torch.Generator().manual_seed(0)
    inputs = {each: torch.randn(1, 24, 1, 8, generator=generator) for each in "qkv"}
    inputs["sample_index"] = torch.randint(0, 24, (24, 6), generator=generator)
    before = seqops.prob_sparse_attention(**inputs, top=8, causal=True)
    inputs[name][:, 12:] *= -10
    after = seqops.prob_sparse_attention(**inputs, top=8, causal=True)
    assert not torch.equal(before[:, :12], after[:, :12])


def test_causal_hides_later_keys_and_values() -> None:
    """With the selection held, which later values cannot change, nothing later is seen."""
    inputs = make(B=1, T=24, top=5, options=CAUSAL).inputs()
    before = seqops.prob_sparse_attention(**inputs)
    changed = inputs | {"v": inputs["v"].detach().clone()}
    changed["v"][:, 15:] = math.nan
    after = seqops.prob_sparse_attention(**changed)
    assert torch.equal(before[:, :15], after[:, :15]) and after[:, 15:].isnan().any()


@pytest.mark.parametrize("options", [(), CAUSAL])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_stays_in_its_sequence_and_group(name: str, options: tuple[tuple[str, bool], ...]) -> None:
    inputs = make(B=3, T=20, H=4, Hk=2, options=options).inputs()
    clean = evaluate(
        lambda **given: (seqops.prob_sparse_attention(**given),), inputs, lambda o: [torch.ones_like(o[0])]
    )
    spoiled = inputs | {name: inputs[name].detach().clone()}
    spoiled[name][1, 7, 1 if name != "q" else 2] = math.nan
    spoiled[name].requires_grad_()
    got = evaluate(lambda **given: (seqops.prob_sparse_attention(**given),), spoiled, lambda o: [torch.ones_like(o[0])])
    for result, value in got.items():
        same = torch.ones_like(value, dtype=torch.bool)
        same[1, :, value.shape[2] // 2 :] = False
        assert torch.equal(value[same], clean[result][same]), result
    assert got["0"][1].isnan().any()


# ---------------------------------------------------------------- determinism and memory


@pytest.mark.parametrize("case", [case.with_marks() for case in cases.CASES[OP] if "small" in case.marks], ids=str)
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)


@pytest.mark.sanitize
@pytest.mark.parametrize("B", [1, 4])
def test_number_of_threads_changes_no_bit(B: int) -> None:
    inputs = make(B=B, T=300, H=2, Hk=1, D=70, U=30, top=20, options=CAUSAL).inputs()
    single = evaluate(lambda **given: (seqops.prob_sparse_attention(**given),), inputs, lambda o: [o[0].detach()])
    torch.set_num_threads(2)
    both = evaluate(lambda **given: (seqops.prob_sparse_attention(**given),), inputs, lambda o: [o[0].detach()])
    assert_same_bits(both, single)


PEAK = """
import torch, seqops
from bench.memory import read_status, reset_peak
torch.set_num_threads(1)
B, T, H, D, U = 1, 2048, 8, 64, 40
q, k, v = (torch.randn(B, T, H, D, requires_grad=True) for _ in range(3))
samples = torch.randint(0, T, (T, U))
def step(q, k, v, samples):
    seqops.prob_sparse_attention(q, k, v, samples, U).sum().backward()
step(*(t[:, :64].detach().requires_grad_() for t in (q, k, v)), samples[:64] % 64)
before = read_status("VmRSS")
reset_peak()
step(q, k, v, samples)
print(read_status("VmHWM") - before)
"""


def test_memory(run_python: Callable[..., str]) -> None:
    """A training step takes the output, gradients and copies of their size: nothing for each sampled or scored pair."""
    peak, tensor = int(run_python(PEAK, MALLOC_TRIM_THRESHOLD_="0")), 2048 * 8 * 64 * 4
    assert peak < 9 * tensor + (4 << 20)  # the sampled keys alone, [B, H, T, U, D], would take 40


# ---------------------------------------------------------------- again, elsewhere


@pytest.mark.parametrize(
    "isa", ["avx2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("baseline", "avx512"))]
)
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_interpreter(run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")
