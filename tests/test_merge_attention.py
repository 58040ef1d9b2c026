"""merge_attention on the CPU and the other backends: against the reference, empty parts, parts that make a whole."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases import Case, assert_within, evaluate, exact_results
from cases.merge_attention import Case as Merge
from torch import Tensor

import seqops
from seqops.attention import reference

OP = "merge_attention"
params = partial(cases.params, operators=(OP,))
make = partial(Merge, OP)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
NAMES = ("o1", "lse1", "o2", "lse2")


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """o and lse, and the gradients by all four arguments for random gradients of both."""
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = exact_results(case, inputs, cotangents)
    got = evaluate(case.operator, inputs, cotangents)
    assert [got["0"].dtype, got["1"].dtype] == case.output_dtypes
    assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("position", [rungs(0), rungs(1)])
def test_each_output_alone(position: int) -> None:
    """The other one has no gradient, which is not the same as zeros."""
    case = make(B=2, T=19, H=3, D=21, empty=True)
    inputs = case.inputs()
    cotangent = [case.cotangents(case.operator(**inputs))[position]]
    exact = evaluate(cases.only(position, case.reference), cases.in_float64(inputs), cotangent)
    assert_within(evaluate(cases.only(position, case.operator), inputs, cotangent), exact, 1e-5)


def test_formula() -> None:
    """w_n = exp(lse_n - lse), do_n = w_n do, dlse_n = w_n (<do, o_n - o> + dlse), as it is written."""
    case = make(B=2, T=5, dtype=torch.float64, narrow=True)
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    o1, lse1, o2, lse2 = (inputs[name].double() for name in NAMES)
    lse = (lse1.exp() + lse2.exp()).log()
    w1, w2 = ((part - lse).exp().mT.unsqueeze(-1) for part in (lse1, lse2))
    o = w1 * o1 + w2 * o2
    grad_o, grad_lse = torch.randn_like(o), torch.randn_like(lse)
    got = torch.ops.seqops.merge_attention(*inputs.values())
    torch.testing.assert_close(got[0], o)
    torch.testing.assert_close(got[1], lse.float())
    gradients = torch.ops.seqops.merge_attention_backward(grad_o, grad_lse.float(), *inputs.values())
    for i, (w, part) in enumerate(((w1, o1), (w2, o2))):
        torch.testing.assert_close(gradients[2 * i], w * grad_o)
        dlse = w.squeeze(-1).mT * ((grad_o * (part - o)).sum(-1).mT + grad_lse)
        torch.testing.assert_close(gradients[2 * i + 1], dlse.float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [rungs(math.nan), rungs(math.inf)])
def test_an_empty_part_is_left_out(value: float) -> None:
    """Whatever its o holds, o and lse are the other part's, bit for bit; both empty: 0 and -inf. No gradient."""
    case = make(B=1, T=20, H=2, D=5)
    inputs = case.inputs()
    empty = {name: inputs[name].detach().clone() for name in NAMES}
    empty["lse1"][..., 3:9] = -math.inf
    empty["lse2"][..., 7:12] = -math.inf
    empty["o1"][:, 3:9] = value
    empty["o2"][:, 7:12] = value
    leaves = {name: tensor.requires_grad_() for name, tensor in empty.items()}
    o, lse = seqops.merge_attention(**leaves)
    assert torch.equal(o[:, 3:7], leaves["o2"][:, 3:7]) and torch.equal(lse[..., 3:7], leaves["lse2"][..., 3:7])
    assert torch.equal(o[:, 9:12], leaves["o1"][:, 9:12]) and torch.equal(lse[..., 9:12], leaves["lse1"][..., 9:12])
    assert (o[:, 7:9] == 0).all() and (lse[..., 7:9] == -math.inf).all()
    grad_o, grad_lse = case.cotangents((o, lse))
    do1, dlse1, do2, dlse2 = torch.autograd.grad((o, lse), [*leaves.values()], (grad_o, grad_lse))
    assert (do1[:, 3:9] == 0).all() and (dlse1[..., 3:9] == 0).all()
    assert (do2[:, 7:12] == 0).all() and (dlse2[..., 7:12] == 0).all()
    assert torch.equal(do2[:, 3:7], grad_o[:, 3:7]) and torch.equal(dlse2[..., 3:7], grad_lse[..., 3:7])
    assert all(grad.isfinite().all() for grad in (do1, dlse1, do2, dlse2))


def test_nan_stays_in_its_row() -> None:
    for name in NAMES:
        case = make(B=2, T=20, H=3, D=5)
        inputs = {each: value.detach() for each, value in case.inputs().items()}
        clean = seqops.merge_attention(**inputs)
        inputs[name][(1, 4, 2, 0) if name[0] == "o" else (1, 2, 4)] = math.nan
        o, lse = seqops.merge_attention(**inputs)
        reached, reached_lse = torch.zeros_like(o, dtype=torch.bool), torch.zeros_like(lse, dtype=torch.bool)
        reached[(1, 4, 2, 0) if name[0] == "o" else (1, 4, 2)] = True
        reached_lse[1, 2, 4] = name[0] == "l"
        assert torch.equal(o.isnan(), reached) and torch.equal(lse.isnan(), reached_lse)
        assert torch.equal(o[~reached], clean[0][~reached]) and torch.equal(lse[~reached_lse], clean[1][~reached_lse])


def test_far_apart_and_large() -> None:
    """Sums of any size, with no overflow on the way."""
    lse1 = torch.tensor([3e4, -3e4, 1e30, 0.0, 88.0]).view(1, 1, 5)
    lse2 = torch.tensor([-3e4, 3e4, 1e30, 200.0, -88.0]).view(1, 1, 5)
    o1, o2 = torch.ones(1, 5, 1, 3), torch.full((1, 5, 1, 3), 3.0)
    o, lse = seqops.merge_attention(o1, lse1, o2, lse2)
    torch.testing.assert_close(o[0, :, 0, 0], torch.tensor([1.0, 3.0, 2.0, 3.0, 1.0]))
    torch.testing.assert_close(lse.flatten(), torch.tensor([3e4, 3e4, 1e30, 200.0, 88.0]))


@pytest.mark.parametrize("case", params("small", where=lambda case: case.B * case.T > 0))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    cases.assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)


@pytest.mark.sanitize
def test_number_of_threads_changes_no_bit() -> None:
    case = make(B=3, T=500, H=3, D=70, empty=True)
    inputs = case.inputs()
    single = evaluate(case.operator, inputs, case.cotangents)
    torch.set_num_threads(2)
    cases.assert_same_bits(evaluate(case.operator, inputs, case.cotangents), single)


# ---------------------------------------------------------------- parts of an attention


def causal_parts(q: Tensor, k: Tensor, v: Tensor, cuts: list[int]) -> tuple[Tensor, Tensor]:
    """Causal attention as the fold of its parts over the keys between cuts."""
    T = q.shape[1]
    merged: tuple[Tensor, Tensor] | None = None
    for start, stop in zip([0, *cuts], [*cuts, T], strict=True):
        seen = torch.ones(T, T, dtype=torch.int64).tril()
        seen[:, :start] = 0
        seen[:, stop:] = 0
        part = reference.dense_attention(q, k, v, seen)
        merged = part if merged is None else seqops.merge_attention(*merged, *part)
    assert merged is not None
    return merged


@pytest.mark.parametrize("cuts", [[5], [0, 7], [1, 8, 16]], ids=str)
def test_merging_parts_equals_the_whole(cuts: list[int]) -> None:
    """Outputs and gradients; the first rows see nothing of the later parts."""
    B, T, H, D = 2, 17, 4, 6
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(B, T, heads, D, dtype=torch.float64, generator=generator).requires_grad_() for heads in (H, 2, 2)
    )

    def results(function: Any) -> dict[str, Tensor]:
        inputs = {"q": q, "k": k, "v": v}
        return evaluate(function, inputs, [torch.ones(B, T, H, D).cumsum(1), torch.ones(B, H, T).cumsum(2)])

    whole = results(lambda q, k, v: reference.dense_attention(q, k, v, torch.ones(T, T, dtype=torch.int64).tril()))
    merged = results(lambda q, k, v: causal_parts(q, k, v, cuts))
    assert_within(merged, whole, 1e-12)


# ---------------------------------------------------------------- other backends, other instruction sets


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked `tiny`, by the Triton kernels, in a process of their own."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


# avx512_bf16 adds a product of pairs, which is not used here; the whole file runs with it where the machine has it.
@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)
