"""Values, gradients and behaviour of ssm_kernel and cauchy_kernel, on the CPU and on every other backend.

Tests whose cases are marked `small` or `tiny` run again with every instruction set and in the Triton interpreter.
"""

import cmath
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import cases
import pytest
import torch
from cases.ssm_kernel import OPERATORS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops
from seqops.ssm import reference

params = partial(cases.params, operators=OPERATORS)
INF = math.inf
# What a mode of the length adds to the error of a phase that is rounded in float32: of 131,072 steps, 1e-2.
PHASE = 1e-6


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


def check(case: Case, device: str = "cpu") -> None:
    """Outputs and all gradients against the reference in float64."""
    inputs = case.inputs(device)
    outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == case.output_dtypes
    cotangents = case.cotangents(outputs)
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, case.bounds(exact))


# ---------------------------------------------------------------- the reference itself


def test_reference_is_the_definition_of_ssm_kernel() -> None:
    """One complex number at a time, by Python."""
    inputs = Case("ssm_kernel", B=2, T=6, N=3, dtype=torch.float64).inputs()
    z, c = (inputs[name].tolist() for name in ("z", "c"))
    expected = [
        [sum(2 * (w * cmath.exp(step * mode)).real for mode, w in zip(*row, strict=True)) for step in range(6)]
        for row in zip(z, c, strict=True)
    ]
    torch.testing.assert_close(reference.ssm_kernel(**inputs), torch.tensor(expected, dtype=torch.float64))


def test_reference_is_the_definition_of_cauchy_kernel() -> None:
    inputs = Case("cauchy_kernel", B=2, T=6, N=3, dtype=torch.float64).inputs()
    v, nodes, w = (inputs[name].tolist() for name in ("v", "nodes", "w"))
    expected = [
        [sum(a / (x - p) + a.conjugate() / (x - p.conjugate()) for a, p in zip(*row, strict=True)) for x in nodes]
        for row in zip(v, w, strict=True)
    ]
    torch.testing.assert_close(reference.cauchy_kernel(**inputs), torch.tensor(expected, dtype=torch.complex128))


@pytest.mark.parametrize("op", OPERATORS)
def test_reference_gradients_are_numerical(op: str) -> None:
    """First and second derivatives."""
    inputs = Case(op, B=2, T=4, N=2, dtype=torch.float64).inputs()
    leaves = cases.differentiable(inputs)

    def call(*values: Tensor) -> Tensor:
        return getattr(reference, op)(**(inputs | dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


def test_reference_is_an_impulse_response() -> None:
    """Of the recurrence h_t = e^z h_{t-1} + u_t, read out by 2 Re sum c h."""
    inputs = Case("ssm_kernel", B=2, T=40, N=3, dtype=torch.float64).inputs()
    z, c = inputs["z"].detach(), inputs["c"].detach()
    impulse = torch.zeros(1, 40, 2, 3, dtype=torch.complex128)
    impulse[:, 0] = 1
    h, _ = seqops.linear_scan(impulse, z.exp()[None, None])
    torch.testing.assert_close(seqops.ssm_kernel(z, c, 40), 2 * (c * h[0]).sum(-1).real.T)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    check(case)


@given(
    op=st.sampled_from(OPERATORS),
    H=st.integers(0, 10),
    L=st.integers(0, 300),
    N=st.integers(0, 70),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    special=st.booleans(),
)
@settings(deadline=None, max_examples=25)
def test_any_shape(op: str, H: int, L: int, N: int, dtype: torch.dtype, special: bool) -> None:
    check(Case(op, B=H, T=L, N=N, dtype=dtype, special=special))


@pytest.mark.parametrize("case", params("small"))
def test_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_threads_change_no_bit(op: str, dtype: torch.dtype) -> None:
    case = Case(op, B=17, T=1500, N=12, dtype=dtype)
    inputs, threads = case.inputs(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(case, inputs)
        torch.set_num_threads(3)
        cases.assert_same_bits(results(case, inputs), alone)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", OPERATORS)
def test_heads_are_independent(op: str) -> None:
    """A head has the same bits alone, and a NaN stays in its own."""
    case = Case(op, B=5, T=70, N=6)
    inputs = case.inputs()
    heads = [name for name in cases.differentiable(inputs) if name != "nodes"]
    with torch.no_grad():
        whole = case.operator(**inputs)[0]
        alone = case.operator(**(inputs | {name: inputs[name][2:3] for name in heads}))[0]
        assert torch.equal(whole[2:3], alone)
        inputs[heads[0]][2, 1] = complex(math.nan, 0)
        spoilt = case.operator(**inputs)[0]
    assert spoilt[2, 1:].isnan().all()  # e^{0 z} is 1 for every z
    others = [0, 1, 3, 4]
    assert torch.equal(spoilt[others], whole[others])


@pytest.mark.parametrize("op", OPERATORS)
def test_memory_without_a_term_for_each_mode(op: str, run_python: Callable[..., str]) -> None:
    """The peak of the process grows by a small part of [H, N, L], which would be 512 MB."""
    assert float(run_python(PEAK, op)) < 64


PEAK = """
import resource, sys, torch, seqops
H, N, L = 16, 64, 65536
def run(length):
    z, c = torch.randn(H, N, dtype=torch.complex64) - 3, torch.randn(H, N, dtype=torch.complex64)
    z, c = z.requires_grad_(), c.requires_grad_()
    nodes = torch.randn(length, dtype=torch.complex64)
    y = seqops.ssm_kernel(z, c, length) if sys.argv[1] == "ssm_kernel" else seqops.cauchy_kernel(c, nodes, z)
    torch.autograd.grad(y, (z, c), torch.ones_like(y))
run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(L)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


# ---------------------------------------------------------------- edges of ssm_kernel


@pytest.mark.parametrize("first", [0, 4096, 130_000])
def test_error_does_not_grow_with_the_length(first: int) -> None:
    """Of 1,072 values from here, at phases up to pi a step; rounded in float32 they would be off by 2e-3 and more."""
    generator = torch.Generator().manual_seed(3)
    im = (torch.rand(4, 8, generator=generator) * 2 - 1) * math.pi
    z, c = torch.complex(torch.full_like(im, -1e-6), im), torch.randn(4, 8, dtype=torch.complex64, generator=generator)
    got = seqops.ssm_kernel(z, c, 131_072)[:, first : first + 1072]
    exact = reference.ssm_kernel(z.to(torch.complex128), c.to(torch.complex128), 131_072)[:, first : first + 1072]
    assert cases.error(got, exact) < PHASE


def test_gradients_at_great_length() -> None:
    check(Case("ssm_kernel", B=1, T=131_072, N=2))


def test_modes_that_vanish() -> None:
    """e^{0 z} is 1 for every z; afterwards a real part of -inf leaves nothing, and takes no gradient."""
    z = torch.tensor([[complex(-INF, 0), complex(-INF, 2)]]).requires_grad_()
    c = torch.tensor([[2 + 1j, 0.5 - 1j]]).requires_grad_()
    k = seqops.ssm_kernel(z, c, 300)
    assert k[0, 0] == 5 and not k[0, 1:].any()
    dz, dc = torch.autograd.grad(k.sum(), (z, c))
    assert not dz.any() and torch.equal(dc, torch.full_like(dc, 2))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_growing_modes_reach_infinity(dtype: torch.dtype) -> None:
    """Exact while they are finite, then infinite for ever; of modes that turn, infinite or NaN."""
    real = torch.zeros(0, dtype=dtype).real.dtype
    z, c = torch.tensor([[1.0]]).to(dtype), torch.tensor([[0.5]]).to(dtype)
    k = seqops.ssm_kernel(z, c, 1200)[0]
    exact = torch.arange(1200, dtype=torch.float64).exp()
    finite, infinite = exact < min(torch.finfo(real).max, 1e300), exact > torch.finfo(real).max
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[real]
    torch.testing.assert_close(k[finite].double(), exact[finite], rtol=tolerance, atol=0)
    assert infinite.any() and (k[infinite] == INF).all()
    turning = seqops.ssm_kernel(z + 0.5j, c, 1200)[0]
    assert not turning[infinite][10:].isfinite().any()
    assert turning[finite][:-10].isfinite().all()


def test_no_modes_and_no_length() -> None:
    none = torch.zeros(3, 0, dtype=torch.complex64)
    assert torch.equal(seqops.ssm_kernel(none, none, 7), torch.zeros(3, 7))
    assert seqops.ssm_kernel(none, none, 0).shape == (3, 0)


# ---------------------------------------------------------------- edges of cauchy_kernel


def test_nodes_at_and_near_poles() -> None:
    w = torch.tensor([[1 + 1j, -0.5 + 2j]])
    v = torch.tensor([[1 + 1j, 0.25 - 1j]])
    near = seqops.cauchy_kernel(v, w[0] + torch.tensor([1e-6, 1e-6j]), w)
    exact = reference.cauchy_kernel(*(t.to(torch.complex128) for t in (v, w[0] + torch.tensor([1e-6, 1e-6j]), w)))
    assert near.abs().min() > 1e5 and cases.error(near, exact) < 1e-6
    at = seqops.cauchy_kernel(v, torch.cat((w[0], w[0].conj())), w)
    assert at.isinf().all()


def test_infinite_nodes_give_nothing() -> None:
    """Exactly 0, also beside NaN; their gradient is 0, and they have no part in others."""
    case = Case("cauchy_kernel", B=9, T=21, N=4)
    inputs = case.inputs()
    nodes = torch.tensor([complex(INF, 0), complex(-INF, math.nan), complex(3, INF), complex(-INF, INF)])
    more = torch.cat((nodes, inputs["nodes"].detach())).requires_grad_()
    y = seqops.cauchy_kernel(inputs["v"], more, inputs["w"])
    assert not y[:, :4].any()
    dy = torch.randn(y.shape, dtype=y.dtype, generator=case.generator(2))
    dv, dnodes, dw = torch.autograd.grad(y, (inputs["v"], more, inputs["w"]), dy)
    assert not dnodes[:4].any()
    alone = seqops.cauchy_kernel(**inputs)
    expected = torch.autograd.grad(alone, (inputs["v"], inputs["nodes"], inputs["w"]), dy[:, 4:])
    torch.testing.assert_close((dv, dnodes[4:], dw), expected)


@pytest.mark.parametrize("size", [1e-15, 1e15, 1e30])
def test_neither_overflows_nor_underflows(size: float) -> None:
    """Of everything times a number it is the kernel divided by that; squares of distances have no such range."""
    inputs = Case("cauchy_kernel", B=2, T=19, N=3).inputs()
    with torch.no_grad():
        plain = seqops.cauchy_kernel(**inputs)
        scaled = seqops.cauchy_kernel(inputs["v"], inputs["nodes"] * size, inputs["w"] * size)
    torch.testing.assert_close(torch.view_as_real(scaled) * size, torch.view_as_real(plain), rtol=1e-4, atol=1e-4)


def test_gradient_of_nodes_is_not_made_unless_wanted() -> None:
    inputs = {name: value.detach() for name, value in Case("cauchy_kernel", B=9, T=21, N=4).inputs().items()}
    dy = torch.ones(9, 21, dtype=torch.complex64)
    every = torch.ops.seqops.cauchy_kernel_backward(dy, *inputs.values())
    some = torch.ops.seqops.cauchy_kernel_backward(dy, *inputs.values(), wants_nodes=False)
    assert some[1].shape == (0,)
    assert torch.equal(every[0], some[0]) and torch.equal(every[2], some[2])


# ---------------------------------------------------------------- other backends, in a process of their own

SETS = ("baseline", "avx2", "avx512")
RUNGS = {
    **{name: {"SEQOPS_CPU_ISA": name} for name in SETS},
    "interpreter": {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
}


# The whole file runs with the last of the instruction sets where the machine has it.
@pytest.mark.parametrize("rung", [pytest.param(r, marks=[pytest.mark.slow] if r == "avx512" else []) for r in RUNGS])
def test_rung(rung: str, run_rung: Callable[..., str]) -> None:
    if rung == "interpreter" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    mark = "tiny" if rung == "interpreter" else "small"
    run_rung(__file__, mark, **RUNGS[rung])


# ---------------------------------------------------------------- GPU


def gpu_cases() -> list[Any]:
    chosen = [case for op in OPERATORS for case in cases.CASES[op]]
    return [
        pytest.param(
            replace(case, marks=()),
            id=str(case),
            marks=[pytest.mark.gpu, *([pytest.mark.sanitize] if "sanitize" in case.marks else [])],
        )
        for case in chosen
    ]


@pytest.mark.parametrize("case", gpu_cases())
def test_gpu(case: Case) -> None:
    """The whole table on CUDA tensors; a second run is bit-equal."""
    with seqops.backend("triton"):
        check(case, "cuda")
        inputs = case.inputs("cuda")
        cases.assert_same_bits(results(case, inputs), results(case, inputs))
