"""Values, gradients and behaviour of causal_conv1d, on the CPU and on every other backend.

Tests whose cases are marked `small` or `tiny` run again in the CUDA simulator and the Triton interpreter: see RUNGS.
"""

import importlib.util
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.causal_conv1d import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops

OP = "causal_conv1d"
params = partial(cases.params, operators=(OP,))
make = partial(Case, OP)
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
BACKENDS = ("cuda", "triton")


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of one call of the operator, or of what takes its place."""
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


# ---------------------------------------------------------------- the reference itself


def by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's convolution, sequence by sequence, of the state and x one after the other."""
    D, W = weight.shape
    edges = None if cu_seqlens is None else [*itertools.pairwise(cu_seqlens.tolist())]
    pieces = [x[b : b + 1] for b in range(len(x))] if edges is None else [x[:, a:b] for a, b in edges]
    outputs, states = [], []
    for n, piece in enumerate(pieces):
        before = x.new_zeros(1, (W - 1) * dilation, D) if initial_state is None else initial_state[n : n + 1]
        joined = torch.cat((before, piece), 1)
        states.append(joined[:, piece.shape[1] :])
        if piece.shape[1]:
            z = torch.conv1d(joined.mT, weight[:, None], bias, dilation=dilation, groups=D).mT
            outputs.append(torch.nn.functional.silu(z) if activation else z)
        else:
            outputs.append(piece)
    return torch.cat(outputs, 0 if edges is None else 1), torch.cat(states)


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("W", "dilation", "silu"), [(1, 3, True), (3, 1, False), (4, 5, True)])
def test_reference_is_torch(W: int, dilation: int, silu: bool, packed: bool, state: bool) -> None:
    """Values and gradients, also where the state is longer than the sequence."""
    for T in (2, 11):
        options = {"dilation": dilation, "silu": silu, "packed": packed, "state": state, "dtype": torch.float64}
        case = make(B=1 if packed else 3, T=T, D=3, W=W, **options)
        inputs = case.inputs()
        cases.assert_within(results(case, inputs, case.reference), results(case, inputs, by_torch), 1e-13)


def test_reference_gradients_are_numerical() -> None:
    case = make(B=2, T=4, D=2, W=3, dilation=2, silu=True, dtype=torch.float64)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return case.reference(**(inputs | dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradcheck(call, (*leaves.values(),))
    assert torch.autograd.gradgradcheck(call, (*leaves.values(),))


# ---------------------------------------------------------------- values


LATEST: dict[Case, dict[str, Tensor]] = {}  # exact results, for the other backends of the same case


def check(case: Case, device: str = "cpu") -> None:
    inputs = case.inputs(device)
    cotangents: list[Tensor] = []

    def look(outputs: Sequence[Tensor]) -> list[Tensor]:
        assert [o.dtype for o in outputs] == case.output_dtypes
        assert all(o.is_contiguous() and o.device.type == device for o in outputs)
        cotangents[:] = case.cotangents(outputs)
        return cotangents

    got = cases.evaluate(case.operator, inputs, look)
    if case not in LATEST:
        LATEST.clear()
        LATEST[case] = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(got, LATEST[case], case.bounds(inputs, cotangents, LATEST[case]))


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """Every output and the gradient of every input, for random gradients of every output; the state bit for bit."""
    check(case)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("W", [rungs(2), pytest.param(20, marks=pytest.mark.small)])
def test_each_output_alone(W: int, packed: bool, position: int) -> None:
    """The other one has no gradient, which is not the same as zeros."""
    case = make(B=1, T=12, D=3, W=W, silu=True, packed=packed)
    inputs = case.inputs()
    cotangent = [case.cotangents(case.operator(**inputs))[position]]
    exact = cases.evaluate(cases.only(position, case.reference), cases.in_float64(inputs), cotangent)
    cases.assert_within(cases.evaluate(cases.only(position, case.operator), inputs, cotangent), exact, 1e-5)


@pytest.mark.parametrize(
    ("W", "dilation", "T"), [(4, 1, 9), (4, 1, 2), (3, 4, 11), (3, 12, 7), (18, 1, 6), (1, 2, 5), (2, 1, 1)]
)
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_are_numerical(silu: bool, W: int, dilation: int, T: int) -> None:
    case = make(B=1, T=T, D=2, W=W, dilation=dilation, silu=silu, dtype=torch.float64, packed=silu)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        return case.operator(**(inputs | dict(zip(leaves, values, strict=True))))

    assert torch.autograd.gradcheck(call, (*leaves.values(),))


@pytest.mark.parametrize("without", ["x", "weight", "bias", "initial_state"])
def test_some_inputs_need_no_gradient(without: str) -> None:
    """The gradients of the other inputs are the same bits."""
    case = make(B=3, T=70, D=9, silu=True)
    inputs = case.inputs()
    whole = results(case, inputs)
    inputs[without] = inputs[without].detach()
    outputs = case.operator(**inputs)
    leaves = {name: value for name, value in cases.differentiable(inputs).items() if value.requires_grad}
    gradients = torch.autograd.grad(outputs, [*leaves.values()], case.cotangents(outputs))
    got = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    cases.assert_same_bits(got, {name: whole[name] for name in got})


# ---------------------------------------------------------------- pieces, packed sequences


def in_pieces(case: Case, cuts: Sequence[int]) -> cases.common.Function:
    def call(x: Tensor, initial_state: Tensor | None = None, **others: Any) -> tuple[Tensor, Tensor]:
        state, outputs = initial_state, []
        for start, stop in itertools.pairwise((0, *sorted(cuts), case.T)):
            y, state = case.operator(x=x[:, start:stop], initial_state=state, **others)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    return call


@pytest.mark.parametrize(
    "cuts", [rungs([0]), rungs([1]), [24], [9, 9, 20], pytest.param([*range(1, 25)], marks=pytest.mark.small)], ids=str
)
@pytest.mark.parametrize(("W", "dilation"), [(4, 1), (3, 5), (2, 30)])
def test_pieces_equal_whole(W: int, dilation: int, cuts: list[int]) -> None:
    """Bit for bit: of an output, every tap is added in the same order. Gradients are sums in other orders."""
    for dtype in (torch.float32, torch.bfloat16):
        case = make(B=2, T=25, D=9, W=W, dilation=dilation, silu=True, dtype=dtype, state=dtype == torch.float32)
        inputs = case.inputs()
        with torch.no_grad():
            whole, parts = case.operator(**inputs), in_pieces(case, cuts)(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    case = make(B=2, T=25, D=9, W=W, dilation=dilation, silu=True)
    inputs = case.inputs()
    exact = cases.in_double(results(case, inputs))
    cases.assert_within(results(case, inputs, in_pieces(case, cuts)), exact, 1e-5)


@pytest.mark.parametrize(("W", "dilation"), [(4, 1), (3, 7), (20, 1)])
def test_packed_equals_separate(W: int, dilation: int) -> None:
    """Empty sequences and those of one step included: outputs bit for bit."""
    case = make(B=1, T=90, D=15, W=W, dilation=dilation, packed=True, silu=True)
    inputs = case.inputs()
    edges = [*itertools.pairwise(inputs.pop("cu_seqlens").tolist())]

    def separately(x: Tensor, initial_state: Tensor, **others: Any) -> tuple[Tensor, ...]:
        parts = [
            case.operator(x=x[:, a:b], initial_state=initial_state[n : n + 1], **others)
            for n, (a, b) in enumerate(edges)
        ]
        return torch.cat([y for y, _ in parts], 1), torch.cat([last for _, last in parts])

    expected = results(case, inputs, separately)
    got = results(case, case.inputs())
    assert torch.equal(got["0"], expected["0"]) and torch.equal(got["1"], expected["1"])
    cases.assert_within(got, cases.in_double(expected), 1e-5)


@given(
    B=st.integers(0, 4),
    T=st.integers(0, 70),
    D=st.integers(1, 40),
    W=st.integers(1, 20),
    dilation=st.integers(1, 90),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    silu=st.booleans(),
    bias=st.booleans(),
    state=st.booleans(),
    packed=st.booleans(),
    layout=st.sampled_from(cases.LAYOUTS),
    cuts=st.lists(st.integers(0, 70), max_size=3),
)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_any_shape_and_any_cuts(cuts: list[int], **shape: Any) -> None:
    """Whole against the reference, and in pieces against the whole."""
    case = make(**(shape | ({"B": 1} if shape["packed"] else {})))
    check(case)
    if not case.packed:
        inputs = case.inputs()
        with torch.no_grad():
            whole, parts = case.operator(**inputs), in_pieces(case, [min(cut, case.T) for cut in cuts])(**inputs)
        assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


# ---------------------------------------------------------------- infinity and NaN


@pytest.mark.parametrize("value", [rungs(math.nan), rungs(math.inf)])
@pytest.mark.parametrize(("W", "dilation"), [rungs(3, 4), pytest.param(18, 1, marks=pytest.mark.small)])
def test_nan_reaches_only_what_reads_it(W: int, dilation: int, value: float) -> None:
    """In x: its channel, at t, t + dilation, ...; everything else has the bits of a run without it."""
    case = make(B=1, T=30, D=5, W=W, dilation=dilation, packed=True)
    inputs = {name: v.detach() if torch.is_tensor(v) else v for name, v in case.inputs().items()}
    inputs["cu_seqlens"] = torch.tensor([0, 3, 20, 20, 30])
    inputs["initial_state"] = inputs["initial_state"][:4]
    clean, _ = case.operator(**inputs)
    inputs["x"][0, 6, 2] = value
    y, state = case.operator(**inputs)
    reached = torch.zeros_like(y, dtype=torch.bool)
    reached[0, 6 : min(6 + (W - 1) * dilation + 1, 20) : dilation, 2] = True
    assert torch.equal(~y.isfinite(), reached)
    assert torch.equal(y[~reached], clean[~reached])
    assert (~state.isfinite()).sum() == ((W - 1) * dilation >= 20 - 6)


def test_infinite_weight_and_missing_steps() -> None:
    """On the CPU: a tap that meets no gradient adds nothing, however large it is."""
    case = make(B=1, T=3, D=2, W=3, bias=False)
    inputs = case.inputs()
    inputs["weight"].data[0, 0] = math.inf
    y, _ = case.operator(**inputs)
    expected = torch.autograd.grad(
        case.reference(**inputs)[0], (inputs["x"], inputs["initial_state"]), y.new_ones(y.shape)
    )
    got = torch.autograd.grad(y, (inputs["x"], inputs["initial_state"]), y.new_ones(y.shape))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    assert got[0][0, -1].isfinite().all()


def test_silu_of_large_numbers() -> None:
    x = torch.tensor([-1e30, -100.0, -88.0, 0.0, 88.0, 1e30]).view(1, 6, 1).requires_grad_()
    y, _ = seqops.causal_conv1d(x, torch.ones(1, 1), activation="silu")
    expected = torch.nn.functional.silu(x)
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-30)
    got, wanted = (torch.autograd.grad(v.sum(), x)[0] for v in (y, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-30)


# ---------------------------------------------------------------- determinism, memory


@pytest.mark.parametrize("case", params("small", where=lambda case: case.silu and case.T in (0, 19, 20, 21, 70)))
def test_two_runs_and_two_backwards_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = results(case, inputs)
    cases.assert_same_bits(results(case, inputs), first)
    with torch.no_grad():
        got = case.operator(**inputs)
    cases.assert_same_bits(dict(zip("01", got, strict=True)), {name: first[name] for name in "01"})


@pytest.mark.sanitize
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("W", "dilation"), [(4, 1), (3, 300), (30, 2)])
def test_number_of_threads_changes_no_bit(W: int, dilation: int, packed: bool) -> None:
    """Outputs do not depend on how steps are shared out, and sums of gradients are cut by sizes alone."""
    case = make(B=1, T=3000, D=70, W=W, dilation=dilation, silu=True, packed=packed, state=False)
    inputs = case.inputs()
    single = results(case, inputs)
    torch.set_num_threads(2)
    cases.assert_same_bits(results(case, inputs), single)


def test_rows_do_not_depend_on_the_batch() -> None:
    case = make(B=7, T=600, D=33, W=5, silu=True)
    inputs = case.inputs()
    whole = results(case, inputs)
    alone = inputs | {name: inputs[name][3:4] for name in ("x", "initial_state")}
    y, last = case.operator(**alone)
    assert torch.equal(y[0], whole["0"][3]) and torch.equal(last[0], whole["1"][3])


@pytest.mark.parametrize("T", [rungs(0), rungs(1), rungs(5)])
@pytest.mark.parametrize("W", [1, 4])
def test_outputs_are_new_memory(W: int, T: int) -> None:
    """Contiguous, and shared neither with an input nor with each other, even where nothing is computed."""
    case = make(B=3, T=T, D=4, W=W)
    inputs = case.inputs()
    before = {name: value.detach().clone() for name, value in cases.differentiable(inputs).items()}
    with torch.no_grad():
        outputs = case.operator(**inputs)
    for output in outputs:
        assert output.is_contiguous()
        output.fill_(7.0)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert all((output == 7.0).all() for output in outputs)


PEAK = """
import re, torch, seqops
def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
x, g = (torch.empty(4, 4096, 256).normal_() for _ in range(2))
for W, dilation in ((4, 1), (4, 64), (32, 1)):
    weight = torch.randn(256, W)
    def forward():
        return seqops.causal_conv1d(x, weight, dilation=dilation, activation="silu")
    def backward():
        inputs = (g, None, x, weight, None, None)
        return torch.ops.seqops.causal_conv1d_backward(*inputs, dilation=dilation, activation="silu")
    for run in (forward, backward):
        run()
        open("/proc/self/clear_refs", "w").write("5")  # the peak restarts from what is resident now
        before = status("VmRSS")
        outputs = run()
        print(status("VmHWM") - before, sum(o.nbytes for o in outputs), run.__name__, W, dilation, sep=",")
        del outputs
"""


def test_peak_memory(run_python: Callable[..., str]) -> None:
    """Beside the outputs: nothing of the size of x (16 MiB), with an activation either."""
    for line in run_python(PEAK).splitlines():
        peak, outputs, *name = line.split(",")
        assert int(peak) <= int(outputs) + 5 * 2**20, f"{name}: {int(peak) / 2**20:.1f} MiB"


# ---------------------------------------------------------------- other backends, other instruction sets

SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
RUNGS = {
    **{name: {"SEQOPS_CPU_ISA": name} for name in SETS},
    **{f"simulator-{seed}": {"SEQOPS_BACKEND": "cuda", "SEQOPS_SIMULATE": str(seed)} for seed in (1, 2, 3)},
    "interpreter": {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
}


def missing(rung: str) -> str | None:
    """What this machine lacks for the rung."""
    if rung.startswith("interpreter") and importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if rung.startswith("simulator") and shutil.which("g++") is None:
        return "the simulator compiles with g++"
    return None


# The whole file runs with one of these instruction sets where the machine has it. Of the simulator's schedules, none of
# which is in order, one is tried on every run: the others repeat all cases for the two barriers of a backward.
SELDOM = ("avx512", "avx512_bf16", "simulator-2", "simulator-3")


@pytest.mark.parametrize(
    "rung", [pytest.param(rung, marks=[pytest.mark.slow] if rung in SELDOM else []) for rung in RUNGS]
)
def test_rung(rung: str, run_rung: Callable[..., str]) -> None:
    """All marked tests of this file in a process of their own. Above five seconds, since it is a whole rung."""
    reason = missing(rung)
    if reason:
        pytest.skip(reason)
    mark = "tiny" if rung.startswith("interpreter") else "small"
    run_rung(__file__, mark, **RUNGS[rung])


# ---------------------------------------------------------------- GPU


def gpu_cases() -> list[Any]:
    chosen = []
    for case in cases.CASES[OP]:
        few = "sanitize" in case.marks and case.T in (19, 20) and case.silu  # compute-sanitizer is slow
        marks = [pytest.mark.gpu, *([pytest.mark.sanitize] if few else [])]
        if "slow" not in case.marks or 1000 < case.T < 20_000:
            chosen.append(pytest.param(case, id=str(case), marks=marks))
    return chosen


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", gpu_cases())
def test_gpu(name: str, case: Case) -> None:
    """The whole table on CUDA tensors; a second run is bit-equal."""
    with seqops.backend(name):
        check(case, "cuda")
        inputs = case.inputs("cuda")
        cases.assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_graph(name: str, packed: bool) -> None:
    """Forward and backward are captured once and replayed on other values, with the bits of an ordinary run."""
    case = make(B=1 if packed else 2, T=1000, D=128, dtype=torch.bfloat16, packed=packed, silu=True)
    inputs = case.inputs("cuda")
    cotangents = case.cotangents(case.operator(**inputs))
    stream = torch.cuda.Stream()
    with seqops.backend(name):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cases.evaluate(case.operator, inputs, cotangents)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cases.evaluate(case.operator, inputs, cotangents)
        for factor in (1.0, 0.5, -1.0):
            with torch.no_grad():
                inputs["x"].mul_(factor)
            graph.replay()
            torch.cuda.synchronize()
            replayed = {key: value.clone() for key, value in captured.items()}
            cases.assert_same_bits(replayed, cases.evaluate(case.operator, inputs, cotangents))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1025, 2_100_001), (4099, 1025, 512), (1, 4_200_001, 512)], ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_gpu_large(name: str, shape: tuple[int, int, int]) -> None:
    """More than 2**31 elements: wide, many rows, and long. Channels at both ends are held against the reference."""
    B, T, D = shape
    rows, channels, start = [0, B - 1], [0, 1, D // 2, D - 1], max(0, T - 100)
    x = torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    weight = torch.randn(D, 4, dtype=torch.bfloat16, device="cuda")
    with seqops.backend(name):
        y, _ = seqops.causal_conv1d(x, weight)
        [dx] = torch.autograd.grad(y, x, torch.ones((), dtype=torch.bfloat16, device="cuda").expand(shape))
    exact, _ = seqops.conv.reference.causal_conv1d(
        x.detach()[rows][:, :, channels][:, start:].cpu().double(), weight[channels].cpu().double()
    )
    sampled = y.detach()[rows][:, :, channels][:, start + 3 :]
    assert cases.error(sampled, exact[:, 3:]) <= 1.2 * torch.finfo(torch.bfloat16).eps / 2
    total = weight[channels].cpu().double().sum(1).expand(len(rows), T - 3, -1)
    assert cases.error(dx[rows][:, :, channels][:, :-3], total) <= 1.2 * torch.finfo(torch.bfloat16).eps / 2
