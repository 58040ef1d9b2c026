"""The Triton kernels of lstm, gru, slstm and elman: in Triton's interpreter, by the compiler, and on a GPU.

Tests that are marked `tiny` run again with the backend "triton" in a process whose Triton interprets: see test_rung.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import cases
import pytest
import test_rnn
import torch
from cases.rnn import CASES, GATES, OPERATORS, STATES, Case

import seqops
from seqops.core import choose
from seqops.rnn import triton_tiles as tiles
from seqops.tune import device

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
EVERYTHING: dict[str, Any] = {"lengths": True, "reverse": True, "grad_clip": 0.05}


def tiny_cases() -> list[Any]:
    """The table's own and those with nothing to do; all options, odd units, a layout with time first, 16 bits."""
    every = []
    for op in OPERATORS:
        every += [case for case in CASES[op] if "tiny" in case.marks]
        every += [case for case in CASES[op] if case.B * case.T == 0 and case.D == 3 and "small" in case.marks]
        every += [
            Case(op, B=3, T=3, D=3, **EVERYTHING, dtype=torch.bfloat16),
            Case(op, B=2, T=2, D=17, layout="transposed", states=False),
            Case(op, B=2, T=3, D=5, dtype=torch.float16, float_states=True, layout="strided", bias=False),
        ]
    every += [Case("elman", B=2, T=5, H=2, D=16, nonlinearity="relu")]
    return cases.common.parameters(case.with_marks("tiny") for case in every)


def check(case: Case, device: str = "cpu") -> None:
    inputs = case.inputs(device)
    made: list[torch.Tensor] = []

    def cotangents(outputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        made[:] = case.cotangents(outputs)
        return made

    got = cases.evaluate(case.operator, inputs, cotangents)
    exact = cases.exact_results(case, inputs, made)
    on_cpu = [each.cpu() for each in made]
    cases.assert_within(got, exact, test_rnn.bounds(case, case.inputs(), on_cpu, exact))


@pytest.mark.parametrize("case", tiny_cases())
def test_values_and_gradients(case: Case) -> None:
    check(case)


@pytest.mark.tiny
@pytest.mark.parametrize("op", OPERATORS)
def test_two_runs_are_bit_equal(op: str) -> None:
    case = Case(op, B=2, T=2, D=5, lengths=True)
    inputs = case.inputs()
    cases.assert_same_bits(test_rnn.results(case, inputs), test_rnn.results(case, inputs))


@pytest.mark.tiny
@pytest.mark.parametrize("op", OPERATORS)
def test_many_rows_and_heads(op: str) -> None:
    """Several programs: two blocks of rows for each of two heads."""
    check(Case(op, B=18, T=2, H=2, D=3, **EVERYTHING))


@pytest.mark.tiny
@pytest.mark.parametrize("units", [0, 16], ids=["launches", "one_program"])
@pytest.mark.parametrize("op", OPERATORS)
def test_weights_that_no_program_holds(op: str, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program walks the steps of a head, or a launch is a step, of two blocks of units here."""
    monkeypatch.setattr(tiles, "padded", lambda _: units)
    monkeypatch.setattr(tiles.Kernel, "holds", False)
    check(Case(op, B=3, T=3, H=2 if units else 1, D=7 if units else 40, **EVERYTHING))


@pytest.mark.tiny
@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("op", OPERATORS)
def test_nan_stays_in_its_row(op: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of a program share its products; their values and gradients keep their bits."""
    if not held:
        monkeypatch.setattr(tiles.Kernel, "holds", False)
    case = Case(op, B=3, T=3, D=5)
    inputs = case.inputs()
    clean = test_rnn.results(case, inputs)
    with torch.no_grad():
        inputs["wx"][1, 1] = torch.nan
    got = test_rnn.results(case, inputs)
    assert got["0"][1, 1:].isnan().all() and got["dwx"][1, 1].isnan().all()
    others = torch.tensor([0, 2])
    for name in ("0", "1", "dwx", *(f"d{state}" for state in STATES[op])):
        assert torch.equal(got[name][others], clean[name][others]), name
    assert torch.equal(got["0"][1, 0], clean["0"][1, 0])


@pytest.mark.tiny
@pytest.mark.parametrize("edge", test_rnn.slstm_edges())
def test_slstm_edges(edge: str) -> None:
    inputs = {name: value.float().requires_grad_() for name, value in test_rnn.slstm_edges()[edge].items()}
    outputs = seqops.slstm(**inputs)
    cotangents = [torch.ones_like(output) for output in outputs]
    exact = cases.evaluate(test_rnn.reference.slstm, cases.in_float64(inputs), cotangents)
    assert all(not value.isnan().any() for value in exact.values())
    cases.assert_within(cases.evaluate(seqops.slstm, inputs, cotangents), exact, 1e-5)


@pytest.mark.tiny
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("op", OPERATORS)
def test_values_that_are_not_finite(op: str, value: float) -> None:
    """In one gate of a row each, at the last step: every output is as infinite or as NaN as the reference's."""
    case = Case(op, B=GATES[op], T=2, D=3)
    inputs = case.inputs()
    with torch.no_grad():
        for gate in range(GATES[op]):
            inputs["wx"][gate, 1, gate] = value
        exact, got = case.reference(**cases.in_float64(inputs)), case.operator(**inputs)
    for expected, output in zip(exact, got, strict=True):
        assert cases.error(output, expected) <= case.tolerance()


@needs_triton
def test_float64_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module("seqops.rnn.triton")  # before the variable is set, or Triton would interpret in the whole process
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    inputs = Case("gru", B=1, T=1, D=1, dtype=torch.float64).inputs()
    with seqops.backend("triton"), pytest.raises(RuntimeError) as caught:
        seqops.gru(**inputs)
    assert str(caught.value) == (
        "seqops::gru: backend 'triton' cannot serve this call: its kernels take float32, bfloat16 and float16, not "
        "float64; backends that exist: reference, cpu, triton, cuda"
    )


IN_RUNG = """
import sys, pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *sys.argv[1:]]))
"""


@needs_triton
def test_rung(run_python: Callable[..., str]) -> None:
    """All tests of this file that are marked tiny, in a process of their own. Above five seconds for that reason."""
    environment = {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    output = run_python(IN_RUNG, "--durations=8", "-m", "tiny and not slow and not gpu", __file__, **environment)
    assert " passed" in output and " skipped" not in output, output


# ---------------------------------------------------------------- what is launched and compiled


Launch = tuple[Any, dict[str, Any]]  # kernel, and its arguments and options by name


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """What the launchers launch from now on, and nothing is run."""
    rnn = import_module("seqops.rnn.triton")  # before the variable is set, or Triton would interpret
    asked: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return self.launch

        def __getattr__(self, name: str) -> Any:
            return getattr(self.kernel, name)

        def launch(self, **arguments: Any) -> None:
            asked.append((self.kernel, arguments))

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(rnn.kernels, "INTERPRETED", True)
    for table in (rnn.KERNELS, rnn.STEPS):
        for direction, kernel in table.items():
            monkeypatch.setitem(table, direction, Recorder(kernel))
    return asked


@needs_triton
def test_every_launch_is_listed(monkeypatch: pytest.MonkeyPatch, launches: list[Launch]) -> None:
    """What the launchers ask for is what `configurations()` names: constants, types of pointers, and options."""
    rnn = import_module("seqops.rnn.triton")

    def key(name: str, types: dict[str, str], constants: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
        return name, *(tuple(sorted(each.items())) for each in (types, constants, options))

    known = set()
    for each in rnn.configurations():
        types = {n: t for n, t in each["types"].items() if n[:2] == "p_"}
        known.add(key(each["kernel"].__name__, types, each["constants"], each["options"]))
    names = {dtype: f"*{name}" for dtype, name in rnn.TYPES.items()} | {torch.int64: "*i64"}
    ops = torch.ops.seqops
    with seqops.backend("triton"):
        shapes = itertools.product(OPERATORS, rnn.TYPES, (1, 17, 64, 65, 129), (True, False))
        for op, dtype, D, plain in shapes:
            case = Case(op, B=2, T=2, D=D, dtype=dtype, lengths=not plain, states=not plain, bias=not plain)
            monkeypatch.setattr(
                rnn, "precision", lambda _, p=plain, d=dtype: "ieee" if p or d.itemsize == 2 else "tf32"
            )
            inputs = case.inputs()
            test_rnn.results(case, inputs)
            with torch.no_grad():
                getattr(ops, op)(*[inputs[n] for n in ("wx", "r")])
            kernel = tiles.Kernel(op, "forward", cases.common.name_of(dtype), tiles.padded(D))
            for rows in [each.rows for each in kernel.shapes()]:
                with choose.forced(f"{op}.forward.triton", {"rows": rows}):
                    getattr(rnn, op)(inputs["wx"].detach(), inputs["r"].detach())
    asked = set()
    for jitted, arguments in launches:
        options = {n: arguments.pop(n) for n in ("num_warps", "num_stages", "enable_fp_fusion", "maxnreg")}
        assert {*arguments} == {*jitted.arg_names}
        types = {n: names[v.dtype] for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        constants = {n: v for n, v in arguments.items() if n.isupper() and n not in ("B", "T")}
        asked.add(key(jitted.__name__, types, constants, options))
    assert len(asked) > 130
    assert asked <= known


@needs_triton
@pytest.mark.parametrize("units", [17, 64, 100, 200])
@pytest.mark.parametrize("op", OPERATORS)
def test_batch_and_time_compile_nothing(op: str, units: int, launches: list[Launch]) -> None:
    """What has other values for other batches and lengths is not specialised, in any memory order."""
    sizes = [(16, 16), (16, 3), (3, 16), (5, 7), (5, 1), (1, 7), (1, 1)]
    for layout in ("contiguous", "transposed", "strided"):
        launches.clear()
        with seqops.backend("triton"):
            for B, T in sizes:
                case = Case(op, B=B, T=T, H=1, D=units, layout=layout, lengths=True)
                test_rnn.results(case, case.inputs())
        values: dict[tuple[Any, str], set[int]] = {}
        for kernel, arguments in launches:
            for name, value in arguments.items():
                if not isinstance(value, torch.Tensor | float | str):
                    values.setdefault((kernel, name), set()).add(value)
        varying = {each for each, found in values.items() if len(found) > 1}
        for direction in ("forward", "backward"):
            names = {name for kernel, name in varying if direction in kernel.__name__}
            assert {"B", "T"} < names and names & {"pair_b", "pair_t"}
        specialised = {(kernel.__name__, name) for kernel, name in varying if name not in kernel.do_not_specialize}
        assert not specialised, layout


@needs_triton
@pytest.mark.parametrize("units", [1, 17, 64])
def test_strides_of_sequences(units: int) -> None:
    """Numbers times ALIGN; it is 16 where rows and steps are aligned, whatever their number."""
    rnn = import_module("seqops.rnn.triton")
    dense = torch.empty(16, 32, 3, 2, units)
    views = {
        "dense": dense,
        "time first": dense.transpose(0, 1),
        "part": dense[:4, 1:3],
        "every second": dense[::2, ::2],
        "repeated": dense[:1].expand(7, *dense.shape[1:]),
        "one value": dense[:1, :1].expand(7, 9, *dense.shape[2:]),
    }
    for name, view in views.items():
        found = rnn.strides("wx", view, "g", "h")
        assert [found[f"wx_{dim}"] * found["ALIGN"] for dim in "bt"] == [*view.stride()[:2]], name
        assert [found["stride_wx_g"], found["stride_wx_h"]] == [2 * units, units], name
        assert found["ALIGN"] == (16 if units == 64 or name == "one value" else 1), name
    assert rnn.strides("dh", None, "h") == {"dh_b": 0, "dh_t": 0, "stride_dh_h": 0, "ALIGN": 16}


@needs_triton
@pytest.mark.parametrize("op", OPERATORS)
def test_what_steps_share_is_made_once(op: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of a step differs from the one before in what it begins and ends at alone."""
    rnn = import_module("seqops.rnn.triton")
    calls: list[str] = []

    def count(name: str) -> None:
        made = getattr(rnn, name)

        def counted(*arguments: Any) -> Any:
            calls.append(name)
            return made(*arguments)

        monkeypatch.setattr(rnn, name, counted)

    for name in ("constants", "options", "precision"):
        count(name)
    case = Case(op, B=2, T=5, D=130)
    with seqops.backend("triton"):
        test_rnn.results(case, case.inputs())
    assert sorted(calls) == sorted(["constants", "options", "precision"] * 2)
    for kernel, first in ((rnn.kernels.recurrence_forward_steps, 0), (rnn.kernels.recurrence_backward_steps, -1)):
        mine = [arguments for each, arguments in launches if each is kernel]
        spans = [(each.pop("begin"), each.pop("end")) for each in mine]
        expected = [*itertools.pairwise(range(first, 6))]
        assert spans == (expected if first == 0 else expected[::-1])
        for each in mine:
            assert {*each} == {*mine[0]} and all(each[name] is mine[0][name] for name in each)


@needs_triton
@pytest.mark.parametrize("units", [64, 300])
def test_rows_that_do_not_exist(units: int, launches: list[Launch]) -> None:
    case = Case("lstm", B=1, T=1, D=units)
    inputs = case.inputs()
    forced = choose.forced("lstm.forward.triton", {"rows": 48})
    where = "D up to 64" if units == 64 else "D above 128"
    with seqops.backend("triton"), forced, pytest.raises(RuntimeError) as caught:
        case.operator(**inputs)
    assert f"lstm.forward.triton has no kernel of 48 rows for float32 and {where}; rows that exist: 16" in str(
        caught.value
    )
    assert not launches


PRECISIONS = {  # what the user sets: whether float32 products may be rounded to TF32
    "": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.set_float32_matmul_precision('high'); torch.set_float32_matmul_precision('highest')": False,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
}
IN_OWN_SETTING = """
import sys, torch
import seqops
from seqops.rnn import triton
start = torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision
for setting in sys.argv[1:]:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.fp32_precision = start
    exec(setting)
    with seqops.backend("triton"):
        seqops.elman(torch.ones(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    print(*(triton.precision(dtype) for dtype in (torch.float32, torch.bfloat16)))
"""


@needs_triton
def test_precision_is_the_users(run_python: Callable[..., str]) -> None:
    """Every way of setting it, in a process of its own, where nothing has to be set back."""
    output = run_python(IN_OWN_SETTING, *PRECISIONS, TRITON_INTERPRET="1")
    assert output.split("\n")[: len(PRECISIONS)] == [
        f"{'tf32' if tf32 else 'ieee'} ieee" for tf32 in PRECISIONS.values()
    ]


@needs_triton
@pytest.mark.parametrize(
    ("name", "dtype", "precision", "architecture", "expected"),
    [
        ("recurrence_forward", "*bf16", "ieee", 80, True),
        ("recurrence_backward", "*fp16", "ieee", 90, True),
        ("recurrence_forward_steps", "*bf16", "ieee", 100, True),
        ("recurrence_backward_steps", "*fp32", "tf32", 120, True),
        ("recurrence_forward", "*fp32", "ieee", 90, False),
    ],
)
def test_products_run_on_tensor_cores(name: str, dtype: str, precision: str, architecture: int, expected: bool) -> None:
    """All but those of float32 that may not be rounded."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    listed = import_module("seqops.rnn.triton").configurations()
    chosen = next(
        each
        for each in listed
        if (each["kernel"].__name__, each["types"]["p_r"], each["constants"]["PRECISION"]) == (name, dtype, precision)
    )
    kernel, types = chosen["kernel"], chosen["types"]
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=chosen["constants"])
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=chosen["options"])
    assert ("mma.sync" in compiled.asm["ptx"]) == expected


@pytest.mark.parametrize("preset", device.PRESETS)
@pytest.mark.parametrize("op", OPERATORS)
def test_choice_fills_the_device_first(op: str, preset: str) -> None:
    """Few rows a program while multiprocessors are idle; for many rows no more waves than need be."""
    machine = device.find(preset)
    for direction, dtype, units in itertools.product(("forward", "backward"), tiles.SIZES, (*tiles.WIDTHS, 0)):
        kernel = tiles.Kernel(op, direction, dtype, units)

        def rows(batch: int, kernel: tiles.Kernel = kernel) -> int:
            key = choose.Key(
                f"{kernel.name}.triton",
                kernel.dtype,
                (choose.Size("D", kernel.units), choose.Size("H", 1), choose.Size("B", batch)),
            )
            best = tiles.problem(machine, key).solve(seconds=math.inf)
            assert best is not None
            assert tiles.shape(kernel, best["rows"]).rows == best["rows"]
            return best["rows"]

        assert rows(16) == 16
        most = max(shape.rows for shape in kernel.shapes())
        assert rows(32 * machine.processors) == most


# ---------------------------------------------------------------- GPU


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(
    "case",
    cases.params(operators=OPERATORS, where=lambda case: "slow" not in case.marks and case.dtype != torch.float64),
)
def test_gpu(case: Case) -> None:
    """The whole table on CUDA tensors; a second run is bit-equal."""
    with seqops.backend("triton"):
        check(case, "cuda")
        inputs = case.inputs("cuda")
        cases.assert_same_bits(test_rnn.results(case, inputs), test_rnn.results(case, inputs))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("D", [48, 100, 200])
@pytest.mark.parametrize("op", OPERATORS)
def test_gpu_graph(op: str, D: int) -> None:
    """Forward and backward are captured once and replayed on other values, with the bits of an ordinary run.

    Of 48 units the kernels hold weights, of 100 one program walks without, of 200 each step is a launch.
    """
    case = Case(op, B=5, T=12, H=2, D=D, dtype=torch.bfloat16, lengths=True)
    inputs = case.inputs("cuda")
    with seqops.backend("triton"):
        cotangents = case.cotangents(case.operator(**inputs))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            cases.evaluate(case.operator, inputs, cotangents)  # compiles, which a capture may not
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = cases.evaluate(case.operator, inputs, cotangents)
        for factor in (1.0, 0.5, -1.0):
            with torch.no_grad():
                inputs["wx"].mul_(factor)
            graph.replay()
            torch.cuda.synchronize()
            replayed = {key: value.clone() for key, value in captured.items()}
            cases.assert_same_bits(replayed, cases.evaluate(case.operator, inputs, cotangents))
