"""delta_attention on the CPU and the other backends: held keys, against the reference, leaks, decoding."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases import Case, assert_within, evaluate, exact_results
from cases.delta_attention import Case as Delta
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import seqops
from seqops.attention import reference

OP = "delta_attention"
params = partial(cases.params, operators=(OP,))
make = partial(Delta, OP)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
held_keys = torch.ops.seqops.held_keys


def keys_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)


# ---------------------------------------------------------------- held keys


def held_by_hand(k: Tensor, threshold: float, by_row: bool) -> tuple[Tensor, Tensor]:
    """The recurrence, number by number; and where it moved."""
    held, moved = torch.zeros_like(k), torch.zeros(k.shape, dtype=torch.bool)
    for b in range(k.shape[0]):
        for h in range(k.shape[2]):
            past = [0.0] * k.shape[3]
            for t in range(k.shape[1]):
                row = k[b, t, h].tolist()
                sizes = [abs(x - y) for x, y in zip(row, past, strict=True)]
                if by_row:
                    sizes = [math.sqrt(sum(size**2 for size in sizes))] * len(sizes)
                for d, size in enumerate(sizes):
                    if size > threshold:
                        past[d], moved[b, t, h, d] = row[d], True
                held[b, t, h] = torch.tensor(past, dtype=k.dtype)
    return held, moved


@pytest.mark.parametrize("by_row", [rungs(False), rungs(True)])
@pytest.mark.parametrize("threshold", [0.0, 0.6, 2.5])
def test_held_keys_by_hand(threshold: float, by_row: bool) -> None:
    """Of the reference, and of the kernel: values, and the gradient as the sum over the hold."""
    k = keys_of(2, 19, 3, 5, dtype=torch.float64)
    held, moved = held_by_hand(k, threshold, by_row)
    grad, expected = keys_of(2, 19, 3, 5, dtype=torch.float64, seed=1), torch.zeros_like(k)
    for b, t, h, d in moved.nonzero().tolist():
        later = moved[b, t + 1 :, h, d].nonzero()
        stop = t + 1 + later[0].item() if len(later) else k.shape[1]
        expected[b, t, h, d] = grad[b, t:stop, h, d].sum()
    for function in (held_keys, reference.held_keys):
        leaf = k.clone().requires_grad_()
        got = function(leaf, threshold, by_row)
        assert torch.equal(got, held)
        torch.testing.assert_close(torch.autograd.grad(got, leaf, grad)[0], expected)


@pytest.mark.parametrize("D", [rungs(5), rungs(40), rungs(150)])
@pytest.mark.parametrize("by_row", [False, True])
def test_held_keys_of_some_widths(by_row: bool, D: int) -> None:
    """In one dtype, on every backend."""
    k, grad = keys_of(1, 21, 2, D), keys_of(1, 21, 2, D, seed=1)
    threshold = 0.7 * (D**0.5 if by_row else 1)
    held = held_keys(k, threshold, by_row)
    assert torch.equal(held, reference.held_keys(k, threshold, by_row))
    leaf = k.clone().requires_grad_()
    exact = torch.autograd.grad(reference.held_keys(leaf, threshold, by_row), leaf, grad)[0]
    torch.testing.assert_close(torch.ops.seqops.held_keys_backward(grad, held, by_row), exact)


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", [1, 3, 16, 33, pytest.param(100, marks=pytest.mark.small)])
def test_held_keys_of_any_width(D: int, dtype: torch.dtype, by_row: bool) -> None:
    for layout in ("contiguous", "offset", "strided", "transposed"):
        k = cases.arrange(keys_of(2, 21, 2, D, dtype=dtype), layout)
        threshold = 0.7 * (D**0.5 if by_row else 1)
        held = held_keys(k, threshold, by_row)
        assert torch.equal(held, reference.held_keys(k, threshold, by_row))
        grad = cases.arrange(keys_of(2, 21, 2, D, dtype=dtype, seed=1), layout)
        got = torch.ops.seqops.held_keys_backward(grad, held, by_row)
        wide = k.double().requires_grad_()
        exact = torch.autograd.grad(reference.held_keys(wide, threshold, by_row), wide, grad.double())[0]
        assert_within({"dk": got}, {"dk": exact}, 1e-6 + torch.finfo(dtype).eps)


@pytest.mark.parametrize("by_row", [rungs(False), rungs(True)])
def test_held_keys_of_special_numbers(by_row: bool) -> None:
    """NaN is moved to and away from; infinity differs from all but itself; nothing reaches other channels or heads."""
    k = torch.tensor([0.5, math.nan, 1.0, 1.2, math.inf, math.inf, -math.inf, 2.0, 2.1, math.nan, math.nan, -1.0])
    expected = torch.tensor(
        [0.0, math.nan, 1.0, 1.0, math.inf, math.inf, -math.inf, 2.0, 2.0, math.nan, math.nan, -1.0]
    )
    k = k.view(1, -1, 1, 1)
    for function in (held_keys, reference.held_keys):
        got = function(k, 0.6, by_row).flatten()
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.arange(1.0, 13.0).view(1, -1, 1, 1)
    got = torch.ops.seqops.held_keys_backward(grad, held_keys(k, 0.6, by_row), by_row)
    assert got.flatten().tolist() == [0, 2, 7, 0, 11, 0, 7, 17, 0, 10, 11, 12]


@pytest.mark.sanitize
@pytest.mark.parametrize("by_row", [False, True])
def test_number_of_threads_changes_no_bit(by_row: bool) -> None:
    k, grad = keys_of(3, 700, 5, 33), keys_of(3, 700, 5, 33, seed=1)
    single = held_keys(k, 0.7, by_row)
    dk = torch.ops.seqops.held_keys_backward(grad, single, by_row)
    torch.set_num_threads(2)
    assert torch.equal(held_keys(k, 0.7, by_row), single)
    assert torch.equal(torch.ops.seqops.held_keys_backward(grad, single, by_row), dk)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """o and lse, and the gradients by all of q, k, v for random gradients of both."""
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = exact_results(case, inputs, cotangents)
    got = evaluate(case.operator, inputs, cotangents)
    assert [got["0"].dtype, got["1"].dtype] == case.output_dtypes
    assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("case", params(where=lambda case: case.T == 300))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    cases.assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)


@pytest.mark.parametrize(("window", "sink"), [(0, 0), (3, 0), (0, 4), (3, 4), (30, 0), (0, 30), (2**63 - 1, 2**63 - 1)])
def test_threshold_0_is_causal_attention(window: int, sink: int) -> None:
    """Whatever keys are taken as held: each key once."""
    case = make(B=2, T=19, threshold=0.0, window=window, options=(("sink", sink),), dtype=torch.float64)
    inputs = case.inputs()
    causal = torch.ones(19, 19, dtype=torch.int64).tril()

    def plainly(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> tuple[Tensor, ...]:
        o, lse = reference.dense_attention(q, k, v, causal)
        return o, lse.to(torch.float32)

    expected = evaluate(plainly, inputs, case.cotangents)
    got = evaluate(case.operator, inputs, case.cotangents)
    assert_within(got, expected, dict.fromkeys(expected, 1e-12) | {"1": 1e-7})


# ---------------------------------------------------------------- causality, NaN


@pytest.mark.parametrize("mode", ["element", "row"])
def test_no_leak_from_the_future(mode: str) -> None:
    """Whatever comes later, outputs have the same bits."""
    case = make(B=2, T=23, threshold=0.9, window=4, options=(("sink", 2), ("mode", mode)))
    inputs = {name: v.detach() if torch.is_tensor(v) else v for name, v in case.inputs().items()}
    before = seqops.delta_attention(**inputs)
    for t in (0, 3, 8, 15, 21):
        for poison in (None, math.nan):
            changed = dict(inputs)
            for name in "qkv":
                changed[name] = inputs[name].clone()
                later = torch.randn_like(changed[name][:, t + 1 :]) * 5
                changed[name][:, t + 1 :] = later if poison is None else poison
            o, lse = seqops.delta_attention(**changed)
            assert torch.equal(o[:, : t + 1], before[0][:, : t + 1])
            assert torch.equal(lse[..., : t + 1], before[1][..., : t + 1])


@pytest.mark.parametrize("value", [rungs(math.nan), math.inf])
def test_nan_stays_in_its_head_and_row(value: float) -> None:
    case = make(B=2, T=16, H=4, Hk=2, window=3)
    inputs = case.inputs()
    clean = evaluate(case.operator, inputs, case.cotangents)
    with torch.no_grad():
        inputs["v"][1, 6, 1, 2] = value
    got = evaluate(case.operator, inputs, case.cotangents)
    reached = torch.zeros_like(clean["0"], dtype=torch.bool)
    reached[1, 6:, 2:, 2] = True
    assert torch.equal(~got["0"].isfinite(), reached)
    assert torch.equal(got["0"][0], clean["0"][0]) and torch.equal(got["0"][:, :, :2], clean["0"][:, :, :2])
    torch.testing.assert_close(got["0"][~reached], clean["0"][~reached])  # near it, numbers may be added in parts
    for name in ("dq", "dk", "dv"):
        assert torch.equal(got[name][0], clean[name][0])
        half = got[name].shape[2] // 2
        assert torch.equal(got[name][:, :, :half], clean[name][:, :, :half])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("mode", ["element", "row"])
def test_steps_from_a_cache_equal_the_whole(mode: str) -> None:
    """The rows of sink and window as they are, held rows for the rest, and the last held row: plain attention."""
    window, sink, threshold, T = 4, 2, 0.9, 20
    case = make(
        B=2,
        T=T,
        H=4,
        Hk=2,
        threshold=threshold,
        window=window,
        options=(("sink", sink), ("mode", mode)),
        dtype=torch.float64,
    )
    q, k, v = (case.inputs()[name].detach() for name in "qkv")
    whole, _ = seqops.delta_attention(q, k, v, threshold, window=window, sink=sink, mode=mode)
    last = torch.zeros_like(k[:, 0])
    cached: list[Tensor] = []  # a held key for each position so far
    for t in range(T):
        change = (k[:, t] - last).abs()
        size = change.norm(dim=-1, keepdim=True) if mode == "row" else change
        last = torch.where(size > threshold, k[:, t], last)
        cached.append(last)
        rows = [k[:, j] if t - j < window or j < sink else cached[j] for j in range(t + 1)]
        heads = (x.movedim(1, 2) for x in (q[:, t : t + 1], torch.stack(rows, 1), v[:, : t + 1]))
        step = scaled_dot_product_attention(*heads, enable_gqa=True).movedim(1, 2)
        torch.testing.assert_close(step, whole[:, t : t + 1])


# ---------------------------------------------------------------- other backends, other instruction sets


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked `tiny`, by the Triton kernels, in a process of their own."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


# avx512_bf16 adds a product of pairs, which is not used here; the whole file runs with it where the machine has it.
@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "small", SEQOPS_CPU_ISA=isa)
