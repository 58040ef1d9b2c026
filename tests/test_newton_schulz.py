"""Values, gradients and behaviour of newton_schulz on the CPU."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.newton_schulz import FLAT, OPERATORS, STEPS, Case
from torch import Tensor

import seqops
from seqops.ttt import LACT_LM_STEPS, MUON_STEPS, newton_schulz

params = partial(cases.params, operators=OPERATORS)
make = partial(Case, "newton_schulz")


def results(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    return cases.evaluate(case.operator, inputs, case.cotangents)


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (5, 3), (4, 4)], ids=str)
def test_reference_steps_singular_values(shape: tuple[int, int]) -> None:
    """On singular values the iteration is an odd polynomial."""
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for steps in STEPS.values():
        u, values, vh = torch.linalg.svd(x, full_matrices=False)
        values = values / (values.norm(dim=-1, keepdim=True) + 1e-7)
        flat = [number for step in MUON_STEPS for number in step] if steps is None else steps
        for i in range(0, len(flat), 3):
            a, b, c = flat[i : i + 3]
            values = a * values + b * values**3 + c * values**5
        got = cases.newton_schulz.reference.newton_schulz(x, steps)
        torch.testing.assert_close(got, u @ values.diag_embed() @ vh, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("steps", "condition", "low", "high"),
    [
        (MUON_STEPS, 10, 0.68, 1.13),
        (MUON_STEPS, 100, 0.68, 1.20),
        (MUON_STEPS, 1000, 0.21, 1.20),
        (LACT_LM_STEPS, 10, 0.98, 1.03),
        (LACT_LM_STEPS, 100, 0.98, 1.14),
        (LACT_LM_STEPS, 1000, 0.22, 1.14),
    ],
)
def test_singular_values_come_near_one(steps: Any, condition: float, low: float, high: float) -> None:
    """Both published sets, on 64 singular values from 1 down to 1 / condition, evenly in their logarithm."""
    generator = torch.Generator().manual_seed(5)
    u, v = (torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64, generator=generator))[0] for _ in range(2))
    values = torch.logspace(0, -math.log10(condition), 64, dtype=torch.float64)
    got = torch.linalg.svdvals(newton_schulz(u @ values.diag() @ v, steps))
    assert abs(got.min() - low) < 0.006 and abs(got.max() - high) < 0.006


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


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (1, 1), (18, 35)], ids=str)
@pytest.mark.parametrize("steps", STEPS)
def test_gradients_are_numerical(shape: tuple[int, int], steps: str) -> None:
    case = make(B=2, T=shape[0], N=shape[1], steps=steps, dtype=torch.float64)
    inputs = case.inputs()
    assert torch.autograd.gradcheck(lambda x: case.operator(x, STEPS[steps]), (inputs["x"],), fast_mode=True)


def test_triples_are_the_flat_list() -> None:
    x = torch.randn(4, 6)
    assert torch.equal(newton_schulz(x, LACT_LM_STEPS), torch.ops.seqops.newton_schulz(x, FLAT))
    assert torch.equal(newton_schulz(x), newton_schulz(x, MUON_STEPS))
    assert cases.error(newton_schulz(x, []), x.double() / (x.double().norm() + 1e-7)) < 2e-7


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e20, 1e37])
def test_norm_neither_overflows_nor_underflows(size: float) -> None:
    """The sum of squares would, in float32; the gradient too keeps its digits."""
    case = make(B=2, T=20, N=30)
    x = (case.inputs()["x"].detach() * size).requires_grad_()
    grad = torch.randn(2, 20, 30) * 1e-6
    exact_x = x.detach().double().requires_grad_()
    out, exact = newton_schulz(x, None, 0.0), case.reference(exact_x, None, 0.0)[0]
    (dx,), (exact_dx,) = (torch.autograd.grad(o, leaf, grad.to(o)) for o, leaf in ((out, x), (exact, exact_x)))
    bound = 1e-5 + 4 * cases.error(case.reference((exact_x / size).float(), None, 0.0)[0], exact)
    assert cases.error(out, exact) < bound
    if exact_dx.abs().max() < 1e35 and exact_dx.abs().max() > 1e-30:
        assert cases.error(dx, exact_dx) < 10 * bound


def test_eps_counts_beside_a_small_norm() -> None:
    x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 1e-3
    for eps in (0.0, 1e-3, 1.0):
        inputs = {"x": x.clone().requires_grad_(), "coefficients": FLAT, "eps": eps}
        case = make(T=6, N=4, dtype=torch.float64)
        exact = cases.evaluate(case.reference, inputs, case.cotangents)
        cases.assert_within(cases.evaluate(case.operator, inputs, case.cotangents), exact, 1e-11)


# ---------------------------------------------------------------- NaN, infinity


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["x", "grad"])
def test_nan_stays_in_its_matrix(value: float, where: str) -> None:
    case = make(B=5, T=12, N=20)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    clean = cases.evaluate(case.operator, inputs, cotangents)
    with torch.no_grad():
        spoilt = inputs["x"] if where == "x" else cotangents[0]
        spoilt[2, 3, 4] = value
    got = cases.evaluate(case.operator, inputs, cotangents)
    assert not got["dx"][2].isfinite().any()
    assert where == "grad" or not got["0"][2].isfinite().any()
    for name in got:
        assert torch.equal(got[name][[0, 1, 3, 4]], clean[name][[0, 1, 3, 4]])


# ---------------------------------------------------------------- batches, threads, layouts


@pytest.mark.parametrize(("M", "N"), [(70, 70), (150, 90), (96, 200)])
def test_batch_and_threads_change_no_bit(M: int, N: int) -> None:
    """Matrices alone, in a batch, each by one thread, or shared by all of them."""
    case = make(B=5, T=M, N=N)
    inputs, threads = case.inputs(), torch.get_num_threads()
    cotangents = case.cotangents(case.operator(**inputs))
    expected = cases.evaluate(case.operator, inputs, cotangents)
    for i in (0, 4):
        x = inputs["x"][i].detach().requires_grad_()
        alone = cases.evaluate(case.operator, {"x": x, "coefficients": None}, [cotangents[0][i]])
        cases.assert_same_bits(alone, {name: value[i] for name, value in expected.items()})
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            cases.assert_same_bits(cases.evaluate(case.operator, inputs, cotangents), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", params("tiny", where=lambda case: case.T > 5))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.parametrize("shape", [(3, 17, 40), (2, 33, 33)], ids=str)
def test_transpose_gives_the_transpose(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=1e-9, atol=1e-9)


def test_only_x_is_saved() -> None:
    saved: list[Tensor] = []
    x = torch.randn(3, 24, 40, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        newton_schulz(x).sum().backward()
    assert [t.shape for t in saved] == [x.shape]


def test_vmap_takes_any_dimension() -> None:
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    for dim in (0, 1):
        mapped = torch.vmap(newton_schulz, in_dims=dim, out_dims=dim)(x)
        assert torch.equal(mapped, newton_schulz(x))
    grads = torch.vmap(torch.func.grad(lambda m: newton_schulz(m).sin().sum()))(x[:, 0])
    leaf = x[:, 0].clone().requires_grad_()
    newton_schulz(leaf).sin().sum().backward()
    assert torch.equal(grads, leaf.grad)


def test_inference_mode() -> None:
    x = torch.randn(4, 6)
    with torch.inference_mode():
        got = newton_schulz(x)
    assert torch.equal(got, newton_schulz(x))


def test_second_derivative_raises() -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(newton_schulz(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="newton_schulz: second derivatives are not supported"):
        dx.sum().backward()
    with seqops.backend("reference"):
        assert torch.autograd.gradgradcheck(lambda t: newton_schulz(t, FLAT[:3]), (x,))


# ---------------------------------------------------------------- instruction sets


@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)
