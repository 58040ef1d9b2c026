"""The CUDA kernels of neural_memory: on the simulator, compiled for GPUs, and what the tuner chooses for them."""

import importlib.util
import itertools
import math
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import common, neural_memory
from torch import Tensor

from seqops.core import backend, choose, launch
from seqops.ttt import cuda, cuda_tiles
from seqops.ttt import tune_neural_memory_cuda as tune
from seqops.tune import device as devices

PRESETS = list(devices.PRESETS)
needs_simulator = pytest.mark.skipif(shutil.which("g++") is None, reason="the simulator compiles with g++")
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("cupy_backends") is None, reason="CuPy is not installed")
Case = neural_memory.Case

# Relative, of values after operands were rounded to 16 bits at every product: in roundings of one number.
ROUNDINGS = 3


def make(**sizes: Any) -> Case:
    return Case("neural_memory", **({"B": 1, "H": 1, "D": 64, "F": 64, "dtype": torch.bfloat16, "wide": True} | sizes))


def options(**values: Any) -> tuple[tuple[str, Any], ...]:
    return tuple(values.items())


@pytest.fixture(params=(1, 2, 3), ids=lambda seed: f"seed{seed}")
def simulator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SEQOPS_SIMULATE", str(request.param))
    with backend.backend("cuda"), torch.no_grad():
        yield


def without_gradients(case: Case) -> dict[str, Any]:
    return {name: value.detach() if torch.is_tensor(value) else value for name, value in case.inputs().items()}


def assert_as_the_reference(case: Case) -> tuple[Tensor, ...]:
    inputs = without_gradients(case)
    got = case.operator(**inputs)
    exact = case.reference(**common.in_float64(inputs))
    assert [each.dtype for each in got] == case.output_dtypes
    for value, expected in zip(got, exact, strict=True):
        rounding = torch.finfo(case.dtype).eps / 2
        assert common.error(value, expected.detach()) <= common.allowance(ROUNDINGS * rounding, value)
    return got


# ---------------------------------------------------------------- values, on the simulator

VALUES = [
    # a whole chunk, one that is shorter, and a state of two segments
    make(T=37, C=16, H=2, state=True),
    make(T=9, C=1, gates="none", dtype=torch.float16),
    make(T=20, C=7, B=2, gates="edges", options=options(loss="dot", window=3), layout="transposed"),
]
MORE = [
    make(T=70, C=64, state=True, options=options(window=5)),
    make(T=75, C=32, F=128, gates="none", dtype=torch.float16, wide=False),
    # Weights decay to 1e-5 here, where float16 has few digits left.
    make(T=75, C=32, F=128, gates="decay", wide=False),
    make(T=40, C=20, F=256, gates="none"),
    make(T=40, C=20, F=128, gates="momentum", state=True),
    make(T=5, C=200, gates="edges", state=True),
    make(T=1, C=1, state=True),
]


@needs_simulator
@pytest.mark.parametrize("case", [*VALUES, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE)], ids=str)
def test_values(case: Case, simulator: None) -> None:
    """On three schedules, twice bit for bit."""
    got = assert_as_the_reference(case)
    again = case.operator(**without_gradients(case))
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


GRADIENTS = [
    make(T=37, C=16, H=2, state=True),
    make(T=20, C=7, B=2, gates="edges", options=options(loss="dot", window=3), layout="transposed"),
]
MORE_GRADIENTS = [
    # several segments of eight chunks
    make(T=140, C=16, gates="none", dtype=torch.float16),
    make(T=40, C=12, F=128, state=True, options=options(window=40)),
    make(T=33, C=16, F=128, gates="none", wide=False),
    make(T=3, C=40, gates="momentum", dtype=torch.float16),
    make(T=20, C=1, gates="decay"),
]


@needs_simulator
@pytest.mark.parametrize(
    "case", [*GRADIENTS, *(pytest.param(each, marks=pytest.mark.slow) for each in MORE_GRADIENTS)], ids=str
)
def test_gradients(case: Case, simulator: None) -> None:
    """Of everything, by gradients of all results; on three schedules, twice bit for bit."""
    inputs = case.inputs()
    with torch.enable_grad():
        got = common.evaluate(case.operator, inputs, case.cotangents)
        again = common.evaluate(case.operator, inputs, case.cotangents)
        cotangents = case.cotangents([got[str(i)] for i in range(5)])
        exact = common.exact_results(case, inputs, cotangents)
    common.assert_same_bits(got, again)
    rounding = torch.finfo(case.dtype).eps / 2
    common.assert_within(got, exact, {n: common.allowance(ROUNDINGS * rounding, x) for n, x in exact.items()})
    leaves = common.differentiable(inputs)
    assert all(got[f"d{name}"].dtype == leaf.dtype for name, leaf in leaves.items())


@needs_simulator
def test_gradients_of_heads_apart(simulator: None) -> None:
    """NaN in one head's gradient of o leaves those of the other as they are, and those of later tokens too."""
    case = make(T=20, C=16, H=2)
    inputs, leaf = case.inputs(), {}
    with torch.enable_grad():
        for broken in (False, True):
            o = case.operator(**inputs)[0]
            grad = torch.ones_like(o)
            if broken:
                grad[0, 17, 0] = torch.nan
            leaf[broken] = torch.autograd.grad(o, [inputs["k"], inputs["w1"], inputs["lr"]], grad)
    (dk, dw, dlr), (dk_nan, dw_nan, dlr_nan) = leaf[False], leaf[True]
    assert torch.equal(dk[:, :, 1], dk_nan[:, :, 1]) and dk_nan[0, 0, 0].isnan().all()
    assert not dk_nan[0, 18:, 0].isnan().any() and not dlr_nan[0, 18:, 0].isnan().any()
    assert torch.equal(dw[:, 1], dw_nan[:, 1]) and torch.equal(dlr[:, :, 1], dlr_nan[:, :, 1])


CHOICES = [  # blocks, units, buffers: what a warp and a block own, and how chunks are fetched
    *((128, momentum, (2, 16, 2)) for momentum in (False, True)),
    (256, True, (4, 16, 1)),
    (256, False, (1, 32, 1)),
    (256, False, (2, 32, 2)),
    (128, False, (1, 32, 2)),
]


@needs_simulator
@pytest.mark.parametrize(
    ("hidden", "momentum", "chosen"),
    [CHOICES[1], *(pytest.param(*each, marks=pytest.mark.slow) for each in (CHOICES[0], *CHOICES[2:]))],
    ids=str,
)
def test_clusters(hidden: int, momentum: bool, chosen: tuple[int, int, int], simulator: None) -> None:
    """Hidden channels over the blocks of a cluster, and over warps, in other parts."""
    constants = dict(zip(("cluster", "units", "buffers"), chosen, strict=True))
    with choose.forced("neural_memory.forward.cuda", constants):
        gates = "both" if momentum else "decay"
        assert_as_the_reference(make(T=21, C=16, F=hidden, gates=gates, state=True))


@needs_simulator
def test_states_before_segments(simulator: None) -> None:
    """Where another call ends at that token: the same bits."""
    case = make(T=140, C=16, state=True)
    given = without_gradients(case)
    tensors = [given[name] for name in ("q", "k", "v", "lr", "decay", "momentum")]
    weights = [given[name] for name in ("w1", "w2", "s1", "s2")]
    *_, states = cuda.memory_forward(*tensors, *weights, 16)
    assert states.shape == (1, case.H, 2, 4 * 64 * 64)
    flat = torch.cat([each.float().flatten(2) for each in weights], 2)
    assert torch.equal(states[:, :, 0], flat)
    _, *final = cuda.memory(*(t[:, :128] for t in tensors), *weights, 16)
    assert torch.equal(states[:, :, 1], torch.cat([each.flatten(2) for each in final], 2))


@needs_simulator
@pytest.mark.parametrize("name", ["q", "k", "v", "lr"])
def test_not_a_number_stays_with_who_sees_it(name: str, simulator: None) -> None:
    """In one head, from its token on, or with q in its token alone; all else has the same bits as without it."""
    case = make(T=40, C=16, H=2, state=True)
    given = without_gradients(case)
    clean = case.operator(**given)
    given[name] = given[name].clone()
    given[name][0, 21, 0] = torch.nan
    got = case.operator(**given)
    o, expected = got[0], clean[0]
    last = 22 if name == "q" else 40
    assert o[0, 21:last, 0].isnan().all()
    common.assert_within({"o": o[:, :21]}, {"o": expected[:, :21]}, ROUNDINGS * torch.finfo(case.dtype).eps / 2)
    assert torch.equal(o[:, :, 1], expected[:, :, 1]) and torch.equal(o[:, last:, 0], expected[:, last:, 0])
    for value, old in zip(got[1:], clean[1:], strict=True):
        assert torch.equal(value[:, 1], old[:, 1])
        assert value[:, 0].isnan().any() == (name != "q")


@needs_simulator
def test_without_tokens_or_rows(simulator: None) -> None:
    for sizes in ({"T": 0}, {"B": 0}):
        given = without_gradients(make(**({"T": 5, "C": 4, "state": True} | sizes)))
        o, w1, w2, s1, s2 = make(C=4).operator(**given)
        assert o.shape == given["q"].shape
        for name, value in (("w1", w1), ("w2", w2), ("s1", s1), ("s2", s2)):
            assert torch.equal(value, given[name].float())
            assert value.numel() == 0 or value.data_ptr() != given[name].data_ptr()


# ---------------------------------------------------------------- refusals


def refused(**changes: Any) -> str:
    case = make(**({"T": 6, "C": 4} | changes))
    with pytest.raises(RuntimeError) as caught:
        case.operator(**without_gradients(case))
    return str(caught.value)


@needs_simulator
def test_refusals_where_it_is_forced(simulator: None) -> None:
    for changes, reason in (
        ({"dtype": torch.float32}, "it serves bfloat16 and float16, not float32"),
        ({"D": 32}, "it serves D = 64, not 32"),
        ({"F": None}, "it serves a memory of two layers, not a linear one"),
        ({"F": 96}, "it serves F = 64, 128, 256, not 96"),
        ({"T": 65, "C": 80}, "it serves chunks of up to 64 tokens, not 65"),
        ({"options": options(optimizer="muon")}, "it has no kernel for the optimizer 'muon'"),
    ):
        message = refused(**changes)
        assert f"seqops::neural_memory: backend 'cuda' cannot serve this call: {reason}" in message


@needs_simulator
def test_refusals_of_gradients(simulator: None) -> None:
    """A forward that is served, whose gradients are not: the error comes with them."""
    for changes, reason in (
        ({"F": 256, "gates": "decay"}, "it serves gradients of F = 64, 128, not 256"),
        ({"T": 17, "C": 64}, "it serves gradients of chunks of up to 16 tokens, not 17"),
    ):
        case = make(**({"T": 6, "C": 4} | changes))
        with torch.enable_grad(), pytest.raises(RuntimeError) as caught:
            case.operator(**case.inputs())[0].sum().backward()
        assert f"backend 'cuda' cannot serve this call: {reason}" in str(caught.value)


def test_other_calls_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same arguments, unless this backend is forced."""
    seen = []
    monkeypatch.setattr(backend, "serve_by", lambda *args, **options: seen.append((args, options)))
    given = without_gradients(make(T=6, C=4, dtype=torch.float32))
    tensors = [*(given[name] for name in ("q", "k", "v", "lr", "decay", "momentum", "w1", "w2")), None, None]
    for name in ("memory", "memory_forward", "memory_backward"):
        gradients = [tensors[0], None, None, None, None] * (name == "memory_backward")
        arguments = [*gradients, *tensors, *([tensors[0]] if gradients else []), 4]
        getattr(cuda, name)(*arguments, loss="dot", window=2)
        (to, operator, *passed), more = seen.pop()
        assert (to, operator, more) == ("triton", name, {"loss": "dot", "window": 2})
        assert all(x is y for x, y in zip(passed, arguments, strict=True))


# ---------------------------------------------------------------- what is chosen


def passes() -> list[cuda_tiles.Pass]:
    sizes = itertools.product(("bfloat16", "float16"), cuda_tiles.HIDDEN, cuda_tiles.ROWS, (False, True))
    every = [cuda_tiles.Pass(direction, *each) for each in sizes for direction in cuda_tiles.SOURCES]
    return [each for each in every if cuda_tiles.is_served(each)]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_choice_is_the_fastest_that_fits(preset: str) -> None:
    """What the solver finds is the best of all shapes; where there is none the kernel does not serve."""
    gpu = devices.find(preset)
    for kernel, items in itertools.product(passes()[::5], (1, 64, 4096)):
        problem = cuda_tiles.problem(gpu, cuda.key_of(kernel, items))
        chosen = problem.solve(seconds=math.inf)
        assert (chosen is not None) == cuda_tiles.fits(gpu, kernel)
        if chosen is None:
            assert "a block holds its part" in problem.explain()
            continue
        times = [cuda_tiles.time_us(gpu, kernel, shape, items) for shape in cuda_tiles.shapes(gpu, kernel)]
        assert problem.cost(chosen) == pytest.approx(min(times), rel=1e-9)
        planned = cuda_tiles.launch(kernel, chosen)
        assert planned.shared <= gpu.shared_per_block and planned.blocks <= gpu.max_cluster


def test_clusters_hold_what_a_block_cannot() -> None:
    """F = 256 with momentum: two blocks of a cluster on Hopper, nothing before it."""
    kernel = cuda_tiles.Pass("forward", "bfloat16", 256, 16, True)
    assert not cuda_tiles.fits(devices.find("a100"), kernel)
    assert min(shape.cluster for shape in cuda_tiles.shapes(devices.find("h100"), kernel)) == 2


def test_keys_share_choices() -> None:
    kernel = cuda_tiles.Pass("forward", "bfloat16", 128, 32, True)
    assert str(cuda.key_of(kernel, 5)) == "neural_memory.forward.cuda|bfloat16|F=128,R=32,N<=8|momentum"
    assert cuda.key_of(kernel, 5) == cuda.key_of(kernel, 8) != cuda.key_of(kernel, 9)


# ---------------------------------------------------------------- compiled for GPUs


def compiled() -> Iterator[Any]:
    """All shapes of all presets, once an architecture; a few on every run."""
    seen: set[Any] = set()
    for gpu, kernel in itertools.product(devices.PRESETS.values(), passes()):
        for shape in cuda_tiles.shapes(gpu, kernel):
            planned = cuda_tiles.launch(kernel, shape._asdict())
            name = f"{kernel.direction}-{gpu.architecture}-" + "-".join(map(str, planned.constants.values()))
            if name not in seen:
                quick = (kernel.rows, kernel.dtype, shape.units) == (16, "bfloat16", 16) and kernel.hidden == 64
                quick = (
                    quick
                    and kernel.momentum
                    and shape.buffers == 2 - kernel.backward
                    and gpu.arch == (80 if kernel.backward else 90)
                )
                yield pytest.param(gpu, kernel, shape, id=name, marks=() if quick else pytest.mark.slow)
            seen.add(name)


@needs_compiler
@pytest.mark.parametrize(("gpu", "kernel", "shape"), [*compiled()])
def test_compiles_without_spills(gpu: Any, kernel: cuda_tiles.Pass, shape: cuda_tiles.Shape) -> None:
    planned = cuda_tiles.launch(kernel, shape._asdict())
    used = launch.resources(
        launch.compile_offline(cuda_tiles.SOURCES[kernel.direction], planned.constants, gpu.architecture)
    )
    assert used["STACK"] == used["LOCAL"] == 0
    assert used["REG"] <= gpu.thread_registers(planned.threads)


# ---------------------------------------------------------------- the tuner


@needs_simulator
@pytest.mark.parametrize("target", tune.TARGETS, ids=lambda target: target.direction)
def test_the_tuners_examples(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    shape = target.small({flag.key: flag.default for flag in target.flags})
    shape |= {"hidden": 64, "heads": 1, "batch": 1, "time": 24}
    example = target.example(shape, "bfloat16", "cpu")
    for value, expected in zip(example.run(), example.expected(), strict=True):
        torch.testing.assert_close(value.double(), expected, rtol=example.tolerance[0], atol=example.tolerance[1])


def test_the_tuner_refuses_what_is_not_served() -> None:
    shape = {flag.key: flag.default for flag in tune.FLAGS}
    for direction, changes, message in (
        ("forward", {"chunk": 65}, "--chunk: expected at most 64, got 65"),
        ("backward", {"chunk": 17}, "--chunk: expected at most 16, got 17"),
        ("backward", {"hidden": 256}, "--hidden: expected one of 64, 128, got 256"),
    ):
        with pytest.raises(ValueError, match=message):
            tune.key_of(direction, shape | changes, "bfloat16", None)
