"""The recurrent operators step by step: a batched product by torch and a pointwise kernel in turns, simulated.

Values, gradients and two runs are those of test_rnn.py's rungs, on the same table of cases.
"""

import importlib.util
import itertools
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import cases
import pytest
import test_rnn
import torch
from cases.rnn import GATES, OPERATORS, STATES, Case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqops
from seqops.core import choose
from seqops.rnn import cuda, cuda_alternating
from seqops.tune.target import compile_cuda

DIRECTIONS = ("forward", "backward")
DTYPES = [*cuda_alternating.STORAGE]
ARCHITECTURES = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="the simulator compiles with g++")
needs_nvrtc = pytest.mark.skipif(importlib.util.find_spec("cupy_backends") is None, reason="CuPy is not installed")


@contextmanager
def steps(op: str, directions: Sequence[str] = DIRECTIONS) -> Iterator[None]:
    """On the CUDA backend these directions run step by step: an empty choice of constants means that."""
    with ExitStack() as stack:
        for direction in directions:
            stack.enter_context(choose.forced(f"{op}.{direction}.cuda", {}))
        stack.enter_context(seqops.backend("cuda"))
        yield


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")


def evaluated(case: Case, directions: Sequence[str], inputs: dict[str, Any], cotangents: list[Tensor]) -> Any:
    with steps(case.op, directions):
        return cases.evaluate(case.operator, inputs, cotangents)


# ---------------------------------------------------------------- values and gradients


def more_cases() -> Iterator[Case]:
    """What the table's small cases lack: several blocks for a row, and a pair of units that meets the end of a head."""
    for op in OPERATORS:
        for D, dtype in ((100, torch.float32), (100, torch.bfloat16), (101, torch.float16)):
            yield Case(op, B=3, T=2, H=3, D=D, dtype=dtype, lengths=True, reverse=True)


SMALL = [case for op in OPERATORS for case in cases.CASES[op] if "small" in case.marks]


@needs_compiler
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("case", [*SMALL, *more_cases()], ids=str)
def test_values_and_gradients(case: Case) -> None:
    """Within the bounds of every other kernel; a second run has the same bits."""
    with steps(case.op):
        test_rnn.check_on(case, "cpu")


@needs_compiler
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_directions_mix(op: str, dtype: torch.dtype) -> None:
    """What one forward keeps the other backward reads: results of each pair are within the bounds."""
    case = Case(op, B=3, T=4, H=2, D=17, dtype=dtype, lengths=True, reverse=True, grad_clip=0.05)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    bounds = test_rnn.bounds(case, inputs, cotangents, exact)
    for directions in (["forward"], ["backward"]):
        cases.assert_within(evaluated(case, directions, inputs, cotangents), exact, bounds)


def arranged(t: Tensor, offset: int) -> Tensor:
    """The same values in memory that begins `offset` elements later."""
    memory = t.new_empty(t.numel() + offset)
    return memory[offset:].view(t.shape).copy_(t).detach().requires_grad_()


@needs_compiler
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("op", OPERATORS)
def test_addresses_change_no_bit(op: str) -> None:
    """Tensors that begin at an odd element, one at a time: units are then read one by one."""
    case = Case(op, B=2, T=3, H=2, D=6)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    expected = evaluated(case, DIRECTIONS, inputs, cotangents)
    for name in ("wx", "r", "b", *STATES[op]):
        moved = inputs | {name: arranged(inputs[name], 1)}
        cases.assert_same_bits(evaluated(case, DIRECTIONS, moved, cotangents), expected)
    for i, cotangent in enumerate(cotangents):
        moved = [arranged(each, 1).detach() if each is cotangent else each for each in cotangents]
        assert moved[i].data_ptr() % 8
        cases.assert_same_bits(evaluated(case, DIRECTIONS, inputs, moved), expected)


# ---------------------------------------------------------------- the product


@needs_compiler
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("dtype", cases.NARROW, ids=str)
@pytest.mark.parametrize("op", OPERATORS)
def test_narrow_inputs_of_the_product(op: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU 16-bit numbers are multiplied as they are: the kernels write them so, and nothing else changes."""
    case = Case(op, B=3, T=4, H=2, D=10, dtype=dtype)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    expected = evaluated(case, DIRECTIONS, inputs, cotangents)
    multiplied = set()

    def product(x: Tensor, weights: Tensor, sums: Tensor) -> Callable[[], Tensor]:
        """torch has none on the CPU that gives float32."""
        multiplied.add((x.dtype, weights.dtype, sums.dtype))
        return lambda: torch.bmm(x.float(), weights.float(), out=sums)

    monkeypatch.setattr(cuda_alternating, "product_dtype", lambda like: like.dtype)
    monkeypatch.setattr(cuda_alternating, "product", product)
    cases.assert_same_bits(evaluated(case, DIRECTIONS, inputs, cotangents), expected)
    assert multiplied == {(dtype, dtype, torch.float32)}


@pytest.mark.parametrize("dtype", cases.NARROW, ids=str)
def test_narrow_products_give_float32(dtype: torch.dtype) -> None:
    """torch takes the call; only CUDA has a kernel for it."""
    x, weights, sums = torch.zeros(2, 3, 4, dtype=dtype), torch.zeros(2, 4, 5, dtype=dtype), torch.zeros(2, 3, 5)
    with pytest.raises(NotImplementedError, match=r"'aten::bmm.dtype_out' with arguments from the 'CPU' backend"):
        cuda_alternating.product(x, weights, sums)()


def test_type_of_the_products_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores know bfloat16 from compute capability 8.0 on."""
    for dtype in DTYPES:
        wide = dtype if dtype in cases.WIDE else torch.float32
        assert cuda_alternating.product_dtype(torch.empty(0, dtype=dtype)) == wide
        like = SimpleNamespace(dtype=dtype, is_cuda=True, device="cuda:0", element_size=lambda d=dtype: d.itemsize)
        for capability, expected in (((7, 5), wide), ((8, 0), dtype), ((9, 0), dtype)):
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
            assert cuda_alternating.product_dtype(like) == expected


class Counting(TorchDispatchMode):
    """How often each operator of torch is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(op)] += 1
        return op(*args, **(kwargs or {}))


@needs_compiler
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("H", [1, 2])
@pytest.mark.parametrize("op", OPERATORS)
def test_a_step_is_one_product(op: str, H: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step more is one more product and one more launch in each direction: nothing is allocated or copied."""
    launches: Counter[str] = Counter()
    for kernels in (cuda_alternating.FORWARD, cuda_alternating.BACKWARD):
        original = kernels[op].prepare

        def prepare(*args: Any, _original: Any = original, _name: str = kernels[op].entry, **options: Any) -> Any:
            launch = _original(*args, **options)

            def counted(step: int) -> None:
                launches[_name] += 1
                launch(step)

            return counted

        monkeypatch.setattr(kernels[op], "prepare", prepare)

    def calls(T: int) -> Counter[str]:
        case = Case(op, B=3, T=T, H=H, D=6, lengths=True)
        inputs = detached(case)
        inputs["lengths"] = inputs["lengths"].long()
        mode = Counting()
        inputs.pop("grad_clip")  # not the backend's affair in the forward
        with steps(op), mode:  # not through the dispatcher, which shows a mode its own calls only
            outputs = getattr(cuda, training(op))(**inputs)
            backward_of(cuda, op, inputs, outputs)
        return mode.calls

    few = calls(2)
    assert launches == {f"{op}_forward_step": 3, f"{op}_backward_step": 3}
    many = calls(5)
    assert launches == {f"{op}_forward_step": 9, f"{op}_backward_step": 9}
    many.subtract(few)
    assert +many == {"aten.bmm.out": 6} and not -many
    # Weights of one head or one gate are multiplied as they lie; others are laid out once a direction.
    assert few["aten.clone.default"] == (0 if H == 1 or GATES[op] == 1 else 2)


def detached(case: Case) -> dict[str, Any]:
    return {name: t.detach() if isinstance(t, Tensor) else t for name, t in case.inputs().items()}


def training(op: str) -> str:
    """The operator that keeps what the backward reads."""
    return op if op == "elman" else f"{op}_forward"


def backward_of(namespace: Any, op: str, inputs: dict[str, Any], outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The backward operator, of ones."""
    h, finals, kept = outputs[0], outputs[1 : 1 + len(STATES[op])], outputs[1 + len(STATES[op]) :]
    gradients = [torch.ones_like(each) for each in (h, *finals)]
    reads = {
        "lstm": lambda: (*kept, inputs["c0"]),
        "gru": lambda: (*kept, h, inputs["h0"]),
        "slstm": lambda: (*kept, finals[1], finals[2], inputs["c0"], inputs["n0"]),
        "elman": lambda: (h,),
    }[op]()
    options = {name: inputs[name] for name in ("lengths", "reverse")}
    return getattr(namespace, f"{op}_backward")(*gradients, inputs["r"], *reads, grad_clip=0.1, **options)


@needs_compiler
@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("op", OPERATORS)
def test_autocast_leaves_the_steps_alone(op: str) -> None:
    """Also where the backward operator is called by itself."""
    inputs = detached(Case(op, B=2, T=3, D=5, lengths=True))
    outputs = getattr(torch.ops.seqops, training(op))(**inputs)
    with steps(op):
        expected = backward_of(torch.ops.seqops, op, inputs, outputs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = backward_of(torch.ops.seqops, op, inputs, outputs)
    assert all(cases.same_bits(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- compiled offline


def compiled() -> Iterator[Any]:
    """Every kernel for every architecture; every run takes each kernel once, and meets all architectures."""
    kernels = itertools.product(OPERATORS, DIRECTIONS, DTYPES)
    for i, (op, direction, dtype) in enumerate(kernels):
        for j, (architecture, vec) in enumerate(itertools.product(ARCHITECTURES, (2, 1))):
            # 40 seconds for all of them, which differ in little.
            marks = () if i % 9 == j else pytest.mark.slow
            name = f"{op}-{direction}-{str(dtype).removeprefix('torch.')}-{architecture}-{vec}"
            yield pytest.param(op, direction, dtype, architecture, vec, marks=marks, id=name)


@needs_nvrtc
@pytest.mark.parametrize(("op", "direction", "dtype", "architecture", "vec"), [*compiled()])
def test_compiles_without_spills(op: str, direction: str, dtype: torch.dtype, architecture: str, vec: int) -> None:
    constants = cuda_alternating.constants(op, dtype, dtype, vec, direction == "backward")
    report = compile_cuda(f"rnn/{op}.cu", constants, architecture, threads=cuda_alternating.THREADS)
    assert not report.stack and not report.spills and not report.shared
    # Latency is all that such a kernel has: four blocks fit on a multiprocessor at least.
    assert report.registers * cuda_alternating.THREADS * 4 <= 65536


@needs_nvrtc
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_for_older_gpus(dtype: torch.dtype) -> None:
    """Before sm_80 these are all the kernels there are."""
    product = dtype if dtype in cases.WIDE else torch.float32
    for backward in (False, True):
        constants = cuda_alternating.constants("slstm", dtype, product, 2, backward)
        report = compile_cuda("rnn/slstm.cu", constants, "sm_75", threads=cuda_alternating.THREADS)
        assert not report.stack and not report.spills


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        *SMALL,
        *more_cases(),
        *(Case(op, B=17, T=20, H=2, D=300, dtype=dtype, lengths=True) for op in OPERATORS for dtype in DTYPES),
        *(Case(op, B=5, T=20, D=768, dtype=dtype) for op in OPERATORS for dtype in DTYPES),
    ],
    ids=str,
)
def test_gpu(case: Case) -> None:
    with steps(case.op):
        test_rnn.check_on(case, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_graph(op: str) -> None:
    """Captured as any other work of the stream, and replayed on other values."""
    case = Case(op, B=5, T=20, H=2, D=64, dtype=torch.bfloat16, lengths=True)
    inputs = case.inputs("cuda")
    cotangents = case.cotangents(case.operator(**inputs))
    run = partial(evaluated, case, DIRECTIONS, inputs, cotangents)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for factor in (1.0, 0.5, -1.0):
        with torch.no_grad():
            inputs["wx"].mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        replayed = {key: value.clone() for key, value in captured.items()}
        cases.assert_same_bits(replayed, run())
