"""Values, gradients and behaviour of fft_conv, on the CPU and in Triton.

Tests whose cases are marked `small` or `tiny` run again with other instruction sets, and in the Triton interpreter: see
RUNGS.
"""

import importlib.util
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.fft_conv import OPERATORS, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops
from seqops.conv import reference
from seqops.core import choose

params = partial(cases.params, operators=OPERATORS)
ops = torch.ops.seqops
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
small = partial(pytest.param, marks=pytest.mark.small)
DIRECT, SPLIT = 20, 70  # taps: summed directly; long enough for transforms, short enough for several segments


def results(case: Case, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients of one call."""
    return cases.evaluate(case.operator, inputs, case.cotangents)


def sums(u: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    """The definition, in a loop over time and taps."""
    outputs = []
    for t in range(u.shape[1]):
        kernels = k.unsqueeze(1) if k.ndim == 2 else k
        total = torch.zeros(u.shape[0], u.shape[2], kernels.shape[1], dtype=u.dtype)
        for lag in range(min(t + 1, k.shape[-1])):
            total = total + kernels[..., lag] * u[:, t - lag, :, None]
        outputs.append(total if skip is None else total + (skip * u[:, t])[..., None])
    y = torch.stack(outputs, 1)
    return y.squeeze(-1) if k.ndim == 2 else y


def spectral(u: Tensor, k: Tensor) -> Tensor:
    """By torch's transforms of all the data at once."""
    steps = u.shape[1]
    taps = k[..., :steps].flatten(0, -2).t()
    wide = u.repeat_interleave(taps.shape[1] // u.shape[2], 2)
    n = steps + len(taps)
    y = torch.fft.irfft(torch.fft.rfft(wide, n, 1) * torch.fft.rfft(taps, n, 0), n, 1)[:, :steps]
    return y.reshape(*u.shape, *k.shape[1:-1])


def largest_error(got: Tensor, exact: Tensor) -> float:
    """Relative to the largest value."""
    return ((got.double() - exact).abs().max() / exact.abs().max()).item()


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("taps", [0, 3, 8, 12])
@pytest.mark.parametrize("many", [None, 3])
@pytest.mark.parametrize("skip", [False, True])
def test_reference_is_the_definition(taps: int, many: int | None, skip: bool) -> None:
    case = Case("fft_conv", B=2, T=8, D=3, L=taps, N=many, skip=skip, dtype=torch.float64)
    inputs = case.inputs()
    cases.assert_within({"0": reference.fft_conv(**inputs)}, {"0": sums(**inputs).detach()}, 1e-14)


@pytest.mark.parametrize("many", [None, 2])
def test_reference_gradients_are_numerical(many: int | None) -> None:
    inputs = Case("fft_conv", B=2, T=4, D=2, L=3, N=many, dtype=torch.float64).inputs()
    assert torch.autograd.gradcheck(reference.fft_conv, (*inputs.values(),))
    assert torch.autograd.gradgradcheck(reference.fft_conv, (*inputs.values(),))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    got = results(case, inputs)
    exact = cases.exact_results(case, inputs, case.cotangents(case.reference(**inputs)))
    cases.assert_within(got, exact, case.bounds(inputs, [], exact))
    assert [got["0"].dtype] == case.output_dtypes


@pytest.mark.parametrize(
    ("B", "T", "D", "L"),
    [
        *((1, 1009, 3, 1009), (2, 4097, 20, 4097), (1, 16384, 3, 16384), (1, 5003, 2, 90000)),
        *((3, 3000, 17, SPLIT), (2, 2500, 9, 700), (1, 20000, 2, DIRECT)),
    ],
)
def test_long_sequences(B: int, T: int, D: int, L: int) -> None:
    """Values and gradients in float32, within the error that the page gives; and in float64."""
    generator = torch.Generator().manual_seed(T)
    u, k, dy = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((B, T, D), (D, L), (B, T, D))
    )
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 2e-15)):
        leaves = [t.to(dtype).requires_grad_() for t in (u, k)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = spectral(*wide)
        expected = [exact.detach(), *torch.autograd.grad(exact, wide, dy.to(dtype).double())]
        y = seqops.fft_conv(*leaves)
        got = [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]
        errors = [largest_error(a, b) for a, b in zip(got, expected, strict=True)]
        assert max(errors) < bound, (dtype, errors)
        if T < L:
            assert not got[2][:, T:].any()


def test_agrees_with_causal_conv1d() -> None:
    x, weight = torch.randn(2, 500, 20), torch.randn(20, 48)
    expected = seqops.causal_conv1d(x, weight)[0]
    assert largest_error(seqops.fft_conv(x, weight.flip(1)), expected.double()) < 1e-6


def test_pieces_with_what_came_before() -> None:
    """A following piece needs the last L - 1 inputs in front, and nothing else."""
    u, k = torch.randn(2, 300, 5, dtype=torch.float64), torch.randn(5, 60, dtype=torch.float64)
    whole = seqops.fft_conv(u, k)
    for cut in (1, 60, 200):
        before = u[:, max(0, cut - 59) : cut]
        piece = seqops.fft_conv(torch.cat((before, u[:, cut:]), 1), k)[:, before.shape[1] :]
        torch.testing.assert_close(piece, whole[:, cut:], rtol=1e-12, atol=1e-12)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 4),
    T=st.integers(1, 300),
    D=st.integers(1, 40),
    L=st.integers(0, 400),
    N=st.sampled_from([None, 1, 2, 5, 17]),
    skip=st.booleans(),
)
def test_drawn_shapes(B: int, T: int, D: int, L: int, N: int | None, skip: bool) -> None:
    case = Case("fft_conv", B=B, T=T, D=D if N is None else min(D, 7), L=L, N=N, skip=skip)
    inputs = case.inputs()
    got = results(case, inputs)
    wide = cases.in_float64(inputs)

    def exact(u: Tensor, k: Tensor, skip: Tensor | None = None) -> tuple[Tensor, ...]:
        y = spectral(u, k) if L else (u if N is None else u[..., None].expand(-1, -1, -1, N)) * 0.0
        extra = 0.0 if skip is None else skip * u if N is None else (skip * u)[..., None]
        return (y + extra,)

    expected = cases.evaluate(exact, wide, case.cotangents)
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item()) if value.numel() else 1.0
        torch.testing.assert_close(got[name].double(), value, rtol=0, atol=2e-6 * scale, msg=name)


@pytest.mark.parametrize("taps", [DIRECT, SPLIT, 300])
def test_quiet_channels_keep_their_digits(taps: int) -> None:
    """Channels are apart: errors are relative to the largest value of the same channel."""
    u, k = torch.randn(2, 300, 5), torch.randn(5, taps)
    scale = 10.0 ** -torch.arange(0, 25, 5)
    y, exact = seqops.fft_conv(u * scale, k), spectral((u * scale).double(), k.double())
    for d in range(5):
        assert largest_error(y[..., d], exact[..., d]) < 1e-6


# ---------------------------------------------------------------- what is not wanted, or not there


@pytest.mark.parametrize("wanted", [("u",), ("k",), ("skip",), ("u", "skip"), ("k", "skip")])
@pytest.mark.parametrize("many", [None, 3])
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...], many: int | None) -> None:
    case = Case("fft_conv", B=2, T=40, D=5, N=many)
    inputs = case.inputs()
    expected = results(case, inputs)
    some = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
    y = seqops.fft_conv(**some)
    got = torch.autograd.grad(y, [some[name] for name in wanted], case.cotangents([y])[0])
    cases.assert_same_bits(dict(zip(wanted, got, strict=True)), {name: expected[f"d{name}"] for name in wanted})
    sizes = [t.numel() for t in ops.fft_conv_backward(y.detach(), *some.values(), "u" in wanted, wanted != ("u",))]
    assert [size > 0 for size in sizes] == ["u" in wanted, wanted != ("u",), wanted != ("u",)]


@pytest.mark.parametrize("taps", [DIRECT, SPLIT, 400])
@pytest.mark.parametrize("many", [None, 3])
def test_rows_and_channels_do_not_depend_on_their_neighbours(taps: int, many: int | None) -> None:
    """Alone they give the same bits, but for the sums over the batch."""
    case = Case("fft_conv", B=3, T=400, D=20, L=taps, N=many)
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    y = seqops.fft_conv(**inputs)
    assert torch.equal(seqops.fft_conv(inputs["u"][1:2], inputs["k"], inputs["skip"]), y[1:2])
    if many is None:
        part = slice(16, 19)
        alone = seqops.fft_conv(inputs["u"][..., part], inputs["k"][part], inputs["skip"][part])
        assert torch.equal(alone, y[:, :, part])


@pytest.mark.parametrize("taps", [DIRECT, SPLIT, 500])
@pytest.mark.parametrize("many", [None, 3])
def test_results_do_not_depend_on_the_number_of_threads(taps: int, many: int | None) -> None:
    case = Case("fft_conv", B=5, T=500, D=20, L=taps, N=many)
    inputs, threads = case.inputs(), torch.get_num_threads()
    expected = results(case, inputs)
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            cases.assert_same_bits(results(case, inputs), expected)
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- what is not finite


def poisoned(t: Tensor, *at: tuple[int, ...], value: float) -> Tensor:
    t = t.clone()
    for index in at:
        t[index] = value
    return t


def reached(shape: tuple[int, ...], where: Any) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    for index in where:
        mask[index] = True
    return mask


def check_reach(case: Case, value: float, row: int, last: int) -> None:
    """Everything in reach of `value` is NaN, everything else has the bits that zeros in its place give."""
    clean = {name: t.detach() for name, t in case.inputs().items()}
    T, taps = case.T, case.taps
    t0, l0 = T // 3, taps // 2
    one = () if case.N is None else (1,)  # the kernel of which a tap is not finite
    for name, at, where in (
        ("u", [(0, t0, 1), (row, T - 1, last)], [(0, slice(t0, t0 + taps), 1), (row, T - 1, last)]),
        ("k", [(2, *one, l0)], [(slice(None), slice(l0, None), 2, *one)]),
        ("skip", [(last,)], [(slice(None), slice(None), last)]),
    ):
        got = seqops.fft_conv(**clean | {name: poisoned(clean[name], *at, value=value)})
        expected = seqops.fft_conv(**clean | {name: poisoned(clean[name], *at, value=0.0)})
        mask = reached(got.shape, where)
        assert torch.equal(got.isnan(), mask), name
        assert torch.equal(got[~mask], expected[~mask]), name


def check_reach_of_gradients(case: Case, last: int) -> None:
    """The same, of dy, u and k in the backward."""
    clean = {name: t.detach() for name, t in case.inputs().items()}
    clean = {"dy": case.cotangents([seqops.fft_conv(**clean)])[0], **clean}
    T, M = case.T, min(case.T, case.taps)
    t0, l0 = T // 2, M // 3
    one, every = ((), ()) if case.N is None else ((1,), (slice(None),))
    nothing: list[Any] = []
    for name, at, of_u, of_k in (
        ("dy", (1, t0, 1, *one), [(1, slice(max(0, t0 - M + 1), t0 + 1), 1)], [(1, *one, slice(0, min(M, t0 + 1)))]),
        ("u", (0, t0, last), nothing, [(last, *every, slice(0, min(M, T - t0)))]),
        ("k", (2, *one, l0), [(slice(None), slice(0, T - l0), 2)], nothing),
    ):
        masks = [reached(clean["u"].shape, of_u), reached(clean["k"].shape, of_k)]
        masks.append(masks[1].reshape(case.D, -1).any(1))  # what reaches tap 0 of any kernel reaches skip
        got, expected = (
            ops.fft_conv_backward(*(clean | {name: poisoned(clean[name], at, value=value)}).values(), True, True)
            for value in (math.nan, 0.0)
        )
        for found, other, mask in zip(got, expected, masks, strict=True):
            assert torch.equal(found.isnan(), mask), name
            assert torch.equal(found[~mask], other[~mask]), name


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "taps"), [(60, DIRECT), (400, SPLIT), (90, 90), (90, 50), small(36, 34)])
@pytest.mark.parametrize("many", [None, 3])
def test_what_is_not_finite_reaches_no_further(
    many: int | None, T: int, taps: int, dtype: torch.dtype, value: float
) -> None:
    check_reach(Case("fft_conv", B=2, T=T, D=19, L=taps, N=many, dtype=dtype), value, row=1, last=17)


@pytest.mark.parametrize(("T", "taps"), [(60, DIRECT), (400, SPLIT), (90, 90), (90, 50), (40, 200), small(37, 36)])
@pytest.mark.parametrize("many", [None, 3])
def test_gradients_of_what_is_not_finite(many: int | None, T: int, taps: int) -> None:
    check_reach_of_gradients(Case("fft_conv", B=2, T=T, D=19, L=taps, N=many), last=17)


@pytest.mark.tiny
@pytest.mark.parametrize(("many", "taps"), [(None, 5), (2, 20)])
def test_what_is_not_finite_in_few_steps(many: int | None, taps: int) -> None:
    case = Case("fft_conv", B=2, T=8, D=3, L=taps, N=many)
    check_reach(case, math.inf, row=1, last=0)
    check_reach_of_gradients(case, last=0)


def test_taps_beyond_the_sequence_count_for_nothing() -> None:
    u, k = torch.randn(2, 50, 3), torch.randn(3, 80)
    k[:, 50:] = torch.nan
    assert torch.equal(seqops.fft_conv(u, k), seqops.fft_conv(u, k[:, :50]))


# ---------------------------------------------------------------- memory


PEAK = """
import ctypes, sys, torch, seqops
from bench.memory import read_status, reset_peak
from torch.fft import irfft, rfft

def step(T, D):
    u, k, skip, dy = torch.randn(4, T, D), torch.randn(D, T), torch.randn(D), torch.randn(4, T, D)
    leaves = [t.requires_grad_() for t in (u, k, skip)]
    ctypes.CDLL(None).malloc_trim(0)
    before = read_status("VmRSS")
    reset_peak()
    if sys.argv[1] == "ours":
        y = seqops.fft_conv(*leaves)
    else:
        y = irfft(rfft(u, 2 * T, 1) * rfft(k, 2 * T, 1).t(), 2 * T, 1)[:, :T] + skip * u
    torch.autograd.grad(y, leaves, dy)
    return read_status("VmHWM") - before

step(64, 8)
print(step(2048, 256))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read the Linux way")
def test_peak_memory(run_python: Callable[..., str]) -> None:
    """Of a training step: the results, buffers of one register of channels, and less than a quarter of torch's."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    ours, plain = (int(run_python(PEAK, name, **allocator)) for name in ("ours", "plain"))
    results = 4 * (2 * 4 * 2048 * 256 + 256 * 2048)  # y, du and dk
    buffers = 4 * 4 * 2 * 2048 * 16
    assert ours < results + buffers + (3 << 20)
    assert ours < plain / 4


# ---------------------------------------------------------------- other backends, other instruction sets

SETS = ("baseline", "avx2", "avx512")
RUNGS = {
    **{name: {"SEQOPS_CPU_ISA": name} for name in SETS},
    "interpreter": {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
}


# The whole file runs with the last of the instruction sets where the machine has it.
@pytest.mark.parametrize("rung", [pytest.param(r, marks=[pytest.mark.slow] if r == "avx512" else []) for r in RUNGS])
def test_rung(rung: str, run_rung: Callable[..., str]) -> None:
    """All marked tests of this file in a process of their own."""
    if rung == "interpreter" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    mark = "tiny" if rung == "interpreter" else "small"
    run_rung(__file__, mark, **RUNGS[rung])


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", params(where=lambda case: "slow" not in case.marks))
def test_gpu(case: Case) -> None:
    """The whole table on CUDA tensors; a second run is bit-equal."""
    inputs = case.inputs("cuda")
    with seqops.backend("triton"):
        got = results(case, inputs)
        cases.assert_same_bits(results(case, inputs), got)
    exact = cases.exact_results(case, inputs, case.cotangents(case.reference(**inputs)))
    cases.assert_within(got, exact, case.bounds(inputs, [], exact))


@pytest.mark.gpu
def test_gpu_graph() -> None:
    """Forward and backward are captured once and replayed on other values, with the bits of an ordinary run."""
    case = Case("fft_conv", B=2, T=1000, D=96)
    inputs = case.inputs("cuda")
    cotangents = case.cotangents(case.operator(**inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cases.evaluate(case.operator, inputs, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.evaluate(case.operator, inputs, cotangents)
    for factor in (1.0, 0.5, -1.0):
        with torch.no_grad():
            inputs["u"].mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        replayed = {key: value.clone() for key, value in captured.items()}
        cases.assert_same_bits(replayed, cases.evaluate(case.operator, inputs, cotangents))


@pytest.mark.gpu
@pytest.mark.parametrize("taps", [SPLIT, 3000])
def test_gpu_of_several_blocks(taps: int) -> None:
    """Channels and rows in blocks, tiles of every shape: the values stay the same but for rounding."""
    case = Case("fft_conv", B=3, T=3000, D=70, L=taps)
    inputs = case.inputs("cuda")
    expected = {name: value.double().cpu() for name, value in results(case, inputs).items()}
    for time, width, rows in ((32, 8, 8), (32, 64, 64), (64, 32, 16), (128, 16, 1024)):
        chosen = {"time": time, "width": width, "rows": rows}
        with choose.forced("fft_conv.forward.triton", chosen), choose.forced("fft_conv.backward.triton", chosen):
            cases.assert_within(results(case, inputs), expected, 2e-6)


def test_blocks_and_tiles_in_the_interpreter(run_python: Callable[..., str]) -> None:
    """The same at a few steps: blocks of channels, of rows, and of both."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    assert run_python(BLOCKS, PYTHONPATH="tests", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1").endswith("same\n")


BLOCKS = """
import cases, contextlib, torch
from cases.fft_conv import Case
from seqops.core import choose

torch.manual_seed(0)
for many in (None, 2):
    case = Case("fft_conv", B=3, T=12, D=10, L=9, N=many)
    inputs = case.inputs()
    exact = cases.exact_results(case, inputs, case.cotangents(case.reference(**inputs)))
    for time, width, rows in ((32, 8, 8), (32, 8, 16), (64, 16, 64)):
        with contextlib.ExitStack() as stack:
            for direction in ("forward", "backward"):
                chosen = {"time": time, "width": width, "rows": rows}
                stack.enter_context(choose.forced(f"fft_conv.{direction}.triton", chosen))
            got = cases.evaluate(case.operator, inputs, case.cotangents)
        cases.assert_within(got, exact, 2e-6)
print("same")
"""
