"""The benchmark's own promises: checked before timed, interleaved, ratios by round, files that can be read again."""

import contextlib
import dataclasses
import html.parser
import io
import json
import re
import sys
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from rich.text import Text
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import seqops
from bench import __main__ as command
from bench import (
    attention_peers,
    cuda,
    harness,
    large_chunk_ttt,
    lengths,
    memory,
    modules,
    neural_memory,
    newton_schulz,
    plots,
    record,
    report,
    rnn,
    rnn_contenders,
    suite,
    tables,
)
from bench.harness import BACKWARD, FORWARD, INFERENCE, OURS, REFERENCE, TRAINING
from seqops.core import backend, launch

FAST, SLOW = "fast peer", "slow peer"
CALLS: list[str] = []


class Scale(torch.autograd.Function):
    """`factor * x` in the forward, `gradient_factor` in the backward: two places to plant an error in."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, factor: float, gradient_factor: float) -> Tensor:
        ctx.factor = gradient_factor
        return x * factor

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient * ctx.factor, None, None


def build(
    name: str,
    factor: float,
    gradient_factor: float,
    columns: int,
    dtype: torch.dtype,
    size: int,
    steps: int,
    breaks_at: int = 100,
) -> harness.Contender:
    x = torch.ones(size, steps, columns, dtype=dtype, requires_grad=True)
    factor = 0.0 if steps >= breaks_at else factor

    def run() -> dict[str, Tensor]:
        CALLS.append(name)
        return {"y": Scale.apply(x, factor, gradient_factor)}

    return harness.Contender(run, {"x": x})


def fail(steps: int) -> harness.Contender:
    raise RuntimeError("no kernel today")


def make_case(
    factor: float = 3.0,
    gradient_factor: float = 3.0,
    columns: int = 1,
    dtype: torch.dtype = torch.float32,
    size: int = 4,
    breaks_at: int = 100,
    op: str = "scale",
    **options: object,
) -> harness.Case:
    """`y = 3 x` with two peers, where ours may be made wrong."""
    return harness.Case(
        op=op,
        name=f"{op} B{size}",
        shape={"B": size, "T": 4},
        dtype=dtype,
        steps=4,
        builders={
            FAST: partial(build, FAST, 3.0, 3.0, 1, dtype, size),
            SLOW: partial(build, SLOW, 3.0, 3.0, 1, dtype, size),
            OURS: partial(build, OURS, factor, gradient_factor, columns, dtype, size, breaks_at=breaks_at),
            REFERENCE: partial(build, REFERENCE, 3.0, 3.0, 1, torch.float64, size),
        },
        flops={FORWARD: 10, TRAINING: 30, BACKWARD: 20, INFERENCE: 10},
        bytes={FORWARD: 20, TRAINING: 60, BACKWARD: 40, INFERENCE: 20},
        **options,
    )


@pytest.fixture
def plain_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest-benchmark refuses to measure in a worker of pytest-xdist; the runs in here are about order and files."""
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(suite.Suite, "rates", harness.Rates(gemm=1e9, copy=1e9))
    monkeypatch.setattr(harness.Settings, "rounds", lambda settings, seconds: 4)
    monkeypatch.setattr(harness, "BLOCK_SECONDS", 1e-9)


def measure(*cases: harness.Case) -> tuple[int, suite.Suite]:
    CALLS.clear()
    measured = suite.Suite(cases, harness.Settings(threads=1, quick=True, memory=False))
    return suite.run(measured), measured


def make_result(ratio: float = 2.0, **changes: object) -> record.Result:
    given = {
        "case": "scale <B4>",
        "op": "scale",
        "shape": {"B": 4},
        "dtype": "float32",
        "mode": TRAINING,
        "check": {"name": "d x, T=4", "error": 1e-7, "bound": 1e-5},
        "seconds": {
            OURS: {"median": 1.0, "p20": 0.9, "p80": 1.1, "rounds": 7},
            FAST: {"median": ratio, "p20": 0.9 * ratio, "p80": 1.1 * ratio, "rounds": 7},
        },
        "ratios": {FAST: {"median": ratio, "p20": 0.9 * ratio, "p80": 1.1 * ratio}},
        "goals": {FAST: 1.5},
        "causes": {FAST: "the peer is <quick>"},
        "gemm_fraction": {OURS: 0.5, FAST: 0.25},
        "copy_fraction": {OURS: 0.5, FAST: 0.25},
        "memory": {OURS: 5 << 20, FAST: 10 << 20},
    }
    return record.Result(**{**given, **changes})


def make_record(*results: record.Result) -> record.Record:
    versions = {"python": "3.10.1", "torch": "2.13.0", "seqops": "0.1.0"}
    machine = {"cpu": "A & B", "cores": 2, "threads": 2, "seqops_isa": "avx2", "torch_isa": "AVX2", "system": "Linux"}
    return record.Record(
        date="2030-01-02T03:04:05+00:00",
        commit={"id": "0123456789abcdef", "time": None, "dirty": True},
        machine={**machine, "versions": versions, "environment": {"OMP_NUM_THREADS": "1"}},
        settings={"threads": 2, "quick": True, "memory": True, "device": "cpu"},
        rates={"gemm": 5e10, "copy": 1e10},
        results=list(results),
    )


def test_rounds_are_interleaved(plain_process: None) -> None:
    """Every round runs each contender once, ours last, in the order of the table."""
    code, measured = measure(make_case(modes=(FORWARD,)))
    assert code == 0
    rounds = measured.results[0].seconds[OURS]["rounds"]
    assert rounds == 4
    # One more round than is counted warms up.
    assert CALLS[-3 * (rounds + 1) :] == [FAST, SLOW, OURS] * (rounds + 1)
    assert {contender["rounds"] for contender in measured.results[0].seconds.values()} == {rounds}


def test_every_mode_is_measured(plain_process: None) -> None:
    modes = (FORWARD, TRAINING, BACKWARD, INFERENCE)
    code, measured = measure(make_case(modes=modes, goals={(FAST, TRAINING): 2.0}))
    assert code == 0
    assert [result.mode for result in measured.results] == [*modes]
    assert [result.goals for result in measured.results] == [{}, {FAST: 2.0}, {}, {}]
    for result in measured.results:
        assert set(result.ratios) == {FAST, SLOW}
        assert set(result.seconds) == set(result.gemm_fraction) == set(result.copy_fraction) == {OURS, FAST, SLOW}
        expected = (
            {FORWARD: 10, TRAINING: 30, BACKWARD: 20, INFERENCE: 10}[result.mode] / result.seconds[OURS]["median"] / 1e9
        )
        assert result.gemm_fraction[OURS] == pytest.approx(expected)


def test_backward_alone_runs_no_forward(plain_process: None) -> None:
    code, measured = measure(make_case(modes=(BACKWARD,)))
    assert code == 0 and measured.results[0].ratios
    # Reference and ours for the check, and one forward each of ours and the two peers for all their backwards.
    assert sorted(CALLS) == sorted([REFERENCE, OURS, FAST, SLOW, OURS])


def build_yardstick(steps: int) -> harness.Contender:
    x = torch.ones(steps)

    def run() -> dict[str, Tensor]:
        CALLS.append("yardstick")
        return {"other": x + 1}

    return harness.Contender(run, {})


def test_a_yardstick_is_timed_and_not_compared(plain_process: None) -> None:
    """In the modes that it is for."""
    name, modes = "copy of the bytes", (FORWARD, TRAINING, BACKWARD)
    yardsticks = {(name, mode): build_yardstick for mode in modes} | {("another mode's", INFERENCE): fail}
    code, measured = measure(make_case(modes=modes, yardsticks=yardsticks, goals={(name, BACKWARD): 1e9}))
    assert code == 0
    for result in measured.results:
        assert set(result.ratios) == {FAST, SLOW, name}
    (miss,) = record.find_misses(make_record(*measured.results))
    assert (miss.peer, miss.result.mode) == (name, BACKWARD)
    assert CALLS.count("yardstick") >= 3 * measured.results[0].seconds[OURS]["rounds"]


def test_a_case_without_peers_is_bounded_by_its_dtype(plain_process: None) -> None:
    cases = [make_case(3.0 * error, dtype=torch.bfloat16, modes=(FORWARD,), op=f"by {error}") for error in (1, 1.02)]
    for case in cases:
        del case.builders[FAST], case.builders[SLOW]
    code, measured = measure(*cases)
    assert code == 1
    right, wrong = measured.results
    assert right.error is None and wrong.check["bound"] == torch.finfo(torch.bfloat16).eps
    assert "y, T=4: 2.1e-02 > 7.8e-03" in wrong.error
    # It has a row, and what is absent is said.
    assert re.search(r"^\| by 1 B4 \|  \| [\d.]+ [µm]s \|  \|", tables.markdown_table(make_record(right)), re.MULTILINE)
    assert re.search(r"by 1 B4 +forward +[\d.]+ [µm]s", tables.render([right]))
    right.absent = {"a library": "it is not installed"}
    target = io.StringIO()
    tables.print_record(make_record(right), Console(file=target))
    assert "absent: by 1, a library: it is not installed" in target.getvalue()


def test_share_of_the_copy_rate_is_a_goal() -> None:
    met, missed = make_result(copy_goal=0.5), make_result(copy_goal=0.8, causes={record.COPY: "too small"})
    (miss,) = record.find_misses(make_record(met, missed))
    assert (miss.quantity, miss.value, miss.goal, miss.cause) == ("copy", 0.5, 0.8, "too small")
    assert tables.summarise(make_record(met, missed)) == "3 of 4 goals met"


def test_complex_values_are_compared_whole(plain_process: None) -> None:
    """An error in the imaginary part alone is one, and gradients of complex outputs are complex."""
    values = torch.tensor([1 + 1j, 2 - 1j])
    assert harness.relative_error(values, values.real + 0j) == pytest.approx((2 / 5) ** 0.5)
    assert harness.widen(values.to(torch.complex64)).dtype == torch.complex128
    (gradient,) = harness.cotangents({"h": values}, torch.complex64)
    assert gradient.dtype == values.dtype and gradient.imag.abs().min() > 0


class SlowWatch(harness.Stopwatch):
    timing = "events"


@pytest.fixture
def stub_gpu(plain_process: None, monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """A device called cuda that is the CPU, on which two backends serve everything; gives the backends forced."""
    used: list[str | None] = []

    @contextlib.contextmanager
    def forced(name: str | None) -> Iterator[None]:
        used.append(name)
        monkeypatch.setattr(harness, "now_forced", name, raising=False)
        yield
        monkeypatch.setattr(harness, "now_forced", None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub 9")
    monkeypatch.setattr(harness, "make_stopwatch", lambda device: SlowWatch())
    monkeypatch.setattr(backend, "reason_missing", lambda op, name, device: None if op == "scale" else f"no {name}")
    monkeypatch.setattr(harness, "forced", forced)
    return used


def on_any_device(*arguments: object, device: str = "cpu", **options: object) -> harness.Contender:
    CALLS.append(device)
    return build(*arguments, **options)


def gpu_case(**options: object) -> harness.Case:
    case = make_case(modes=(FORWARD, TRAINING), **{"devices": ("cpu", "cuda"), **options})
    for name, builder in case.builders.items():
        case.builders[name] = partial(on_any_device, *builder.args, **builder.keywords)
    return case


def test_every_backend_of_a_device_is_measured(stub_gpu: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    settings = harness.Settings(threads=1, quick=True, memory=False, device="cuda")
    measured = suite.Suite([gpu_case()], settings)
    assert suite.run(measured) == 0
    assert [(result.backend, result.mode) for result in measured.results] == [
        ("cuda", FORWARD),
        ("cuda", TRAINING),
        ("triton", FORWARD),
        ("triton", TRAINING),
    ]
    assert "cpu" not in CALLS and "cuda" in CALLS
    assert {result.timing for result in measured.results} == {"events"}
    assert [result.title for result in measured.results][::2] == ["scale B4, cuda", "scale B4, triton"]
    # Peers and the reference are not forced.
    assert {None, "cuda", "triton"} == set(stub_gpu)
    found = record.make_record(settings, measured.rates, measured.results)
    assert found.machine["gpu"] == "Stub 9" and found.settings["device"] == "cuda"
    assert tables.describe(found).startswith("Stub 9, ") and "TFLOP/s (bfloat16)" in tables.describe(found)


def test_a_backend_with_wrong_values_is_not_timed(stub_gpu: list[str | None]) -> None:
    """The other one is."""
    case = gpu_case()
    right = case.builders[OURS]

    def build_ours(steps: int, device: str) -> harness.Contender:
        contender = right(steps, device=device)

        def run() -> dict[str, Tensor]:
            factor = 2.0 if harness.now_forced == "triton" else 1.0
            return {name: factor * output for name, output in contender.run().items()}

        return harness.Contender(run, contender.leaves)

    case.builders[OURS] = build_ours
    measured = suite.Suite([case], harness.Settings(threads=1, quick=True, memory=False, device="cuda"))
    assert suite.run(measured) == 1
    for result in measured.results:
        assert (result.error is None) == (result.backend == "cuda") == bool(result.seconds)


def test_command_on_a_gpu_keeps_each_result(
    stub_gpu: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What no backend serves is left out with the reasons; the file grows with each result."""
    monkeypatch.setattr(cuda, "peak_memory", lambda case, name, backend: 8 << 20)
    monkeypatch.setattr(suite.Suite, "rates", cached_property(lambda self: harness.Rates(1e14, 1e12)))
    suite.Suite.rates.__set_name__(suite.Suite, "rates")
    sizes = []
    save = record.Record.save

    def count(self: record.Record, path: Path) -> None:
        sizes.append(len(self.results))
        save(self, path)

    monkeypatch.setattr(record.Record, "save", count)
    cases = [gpu_case(), gpu_case(op="other"), make_case(op="cpu only")]
    code, output = run_command(monkeypatch, cases, "--device=cuda", "--quick", f"--json={tmp_path / 'run.json'}")
    assert code == 0
    assert sizes == [1, 2, 3, 4, 4]
    assert "left out: other: cuda: no cuda; triton: no triton" in output and "cpu only" not in output
    assert record.load(tmp_path / "run.json").results[1].memory == dict.fromkeys((OURS, FAST, SLOW), 8 << 20)
    code, output = run_command(monkeypatch, [make_case()], "--device=cuda")
    assert code == 2 and "--device cuda: no case of these operators runs there" in output
    code, output = run_command(monkeypatch, [gpu_case(op="other")], "--device=cuda")
    assert code == 2 and "--device cuda: no backend of these operators works here" in output


class StubEvent:
    """Writes into a log when it is recorded; the n-th pair is n milliseconds apart."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")

    def elapsed_time(self, end: "StubEvent") -> float:
        self.log.append("read")
        return float(self.log.count("read"))


@pytest.fixture
def stub_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of torch in bench/cuda.py; gives the log of what was done on the GPU."""
    log = StubEvent.log = []

    @contextlib.contextmanager
    def graph(graph: object, stream: object) -> Iterator[None]:
        log.append("capture")
        yield

    gpu = SimpleNamespace(
        get_device_properties=lambda device: SimpleNamespace(L2_cache_size=50 << 20),
        current_device=lambda: 0,
        Stream=object,
        Event=StubEvent,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: log.append("replay")),
        graph=graph,
        synchronize=lambda: log.append("wait"),
        stream=lambda stream: contextlib.nullcontext(),
    )
    stub = SimpleNamespace(
        int32=torch.int32,
        zeros=lambda size, **options: log.append(f"buffer of {4 * size >> 20} MB"),
        empty=lambda *size, **options: None,
        amax=lambda *arguments, **options: log.append("flush"),
        cuda=gpu,
    )
    monkeypatch.setattr(cuda, "torch", stub)
    return log


def test_calls_on_a_gpu_are_cold_and_timed_one_by_one(stub_torch: list[str]) -> None:
    watch = cuda.Stopwatch()
    assert stub_torch == ["buffer of 200 MB"]
    stub_torch.clear()
    assert watch.seconds(lambda calls: stub_torch.append(f"call {calls}"), 2) == pytest.approx(3e-3)
    assert stub_torch == [*["flush", "event", "call 1", "event"] * 2, "wait", "read", "read"]


def test_a_case_that_fails_leaves_nothing_running(stub_torch: list[str]) -> None:
    watch = cuda.Stopwatch()
    stub_torch.clear()
    with pytest.raises(RuntimeError, match="no kernel today"), watch.running():
        fail(1)
    assert stub_torch == ["wait"]


def test_graphs_are_timed_where_all_can_be_captured(stub_torch: list[str]) -> None:
    watch = cuda.Stopwatch()
    stub_torch.clear()
    prepared = watch.prepare({OURS: lambda calls: stub_torch.append(f"call {calls}")})
    assert stub_torch == ["call 2", "capture", "call 1"] and watch.timing == "graph"
    prepared[OURS](1)
    assert stub_torch[-1] == "replay"

    def synchronise(calls: int) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    blocks = {FAST: synchronise, OURS: prepared[OURS]}
    assert watch.prepare(blocks) == blocks and watch.timing == "events"


def test_ratios_are_taken_inside_a_round() -> None:
    """A machine that slows down tenfold for some rounds does not move the ratio."""
    assert harness.ratio_summary([1, 10, 10, 1, 1], [2, 20, 20, 2, 2]) == {"median": 2, "p20": 2, "p80": 2}
    # The medians' ratio would be 3 / 2.
    assert harness.ratio_summary([1, 2, 3], [3, 2, 3])["median"] == 1
    with pytest.raises(ValueError, match="zip"):
        harness.ratio_summary([1, 2], [1, 2, 3])


@pytest.mark.parametrize(
    ("quick", "seconds", "rounds"),
    [(True, 1e-4, 15), (True, 0.08, 7), (True, 1, 3), (True, 2.5, 2), (True, 30, 1), (False, 1e-4, 41), (False, 3, 7)],
)
def test_rounds_follow_the_length_of_a_round(quick: bool, seconds: float, rounds: int) -> None:
    assert harness.Settings(quick=quick).rounds(seconds) == rounds


def test_spread_is_the_20_and_80_percent_quantile() -> None:
    assert harness.summary([5, 1, 4, 2, 3, 6]) == {"median": 3.5, "p20": 2, "p80": 5}


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"factor": 3.001}, "y, T=4: 3.3e-04 > 2.0e-05"),
        ({"gradient_factor": 2.9}, "d x, T=4: 3.3e-02 > 2.0e-05"),
        ({"factor": float("nan")}, "y, T=4: nan > 2.0e-05"),
        ({"columns": 2}, "y, T=4: inf > 2.0e-05"),
        ({"gradient_factor": 2.9, "dtype": torch.bfloat16}, "d x, T=4:"),
        # Right for the two steps whose gradients are checked, wrong later on.
        ({"breaks_at": 3, "check_steps": 2}, "y, T=4: "),
    ],
    ids=["value", "gradient", "nan", "shape", "bfloat16", "length"],
)
def test_wrong_values_are_never_timed(plain_process: None, wrong: dict[str, object], text: str) -> None:
    code, measured = measure(make_case(**wrong, modes=(TRAINING,)), make_case(op="right", modes=(TRAINING,)))
    failed, right = measured.results
    assert code == 1
    assert text in failed.error
    assert not failed.seconds and not failed.ratios and not failed.memory
    assert right.error is None and right.ratios
    shown = tables.render([failed])
    assert "FAILED" in shown and "ms" not in shown and "µs" not in shown


def test_an_exception_fails_its_case_only(plain_process: None) -> None:
    case = make_case(modes=(FORWARD,))
    broken = make_case(modes=(FORWARD,), op="broken")
    broken.builders[OURS] = fail
    code, measured = measure(broken, case)
    assert code == 1
    assert [result.error for result in measured.results] == ["RuntimeError: no kernel today", None]


def test_peak_memory_is_exact_to_a_megabyte() -> None:
    """The output, 64 MB, and the gradient of the input, 64 MB, live at once."""
    case = make_case(size=4 << 20)
    peak = memory.Processes().peak(case, OURS, threads=1)
    assert peak == pytest.approx(128 << 20, abs=2 << 20)


def test_a_failing_memory_process_says_why() -> None:
    case = make_case()
    case.builders[OURS] = fail
    with pytest.raises(RuntimeError, match="scale B4, seqops: RuntimeError: no kernel today"):
        memory.Processes().peak(case, OURS, threads=1)


def test_record_survives_its_file(tmp_path: Path) -> None:
    found = make_record(make_result(), make_result(error="wrong", seconds={}, ratios={}))
    found.save(tmp_path / "deep" / "run.json")
    assert record.load(tmp_path / "deep" / "run.json") == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields.update(format=2), "expected a benchmark record of format 1, got 2"),
        (lambda fields: fields.pop("rates"), "rates"),
        (lambda fields: fields["results"][0].update(speed=1), "speed"),
        (lambda fields: fields.pop("results"), "results"),
    ],
    ids=["format", "missing", "unknown", "results"],
)
def test_other_files_are_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "run.json"
    make_record(make_result()).save(path)
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        record.load(path)


def test_misses_name_the_distance_and_the_cause() -> None:
    met, missed = make_result(), make_result(1.2)
    heavy = make_result(memory={OURS: 12 << 20, FAST: 10 << 20})
    tiny = make_result(memory={OURS: 2 << 20, FAST: 1 << 20})
    (time,) = record.find_misses(make_record(met, missed))
    assert (time.quantity, time.value, time.goal, time.cause) == ("time", 1.2, 1.5, "the peer is <quick>")
    (weight,) = record.find_misses(make_record(heavy, tiny))
    assert (weight.quantity, weight.value, weight.goal) == ("memory", 1.2, 1.0)


class Page(html.parser.HTMLParser):
    """Collects what a browser would fetch, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        names = ("src", "href", "xlink:href", "data", "action")
        self.fetched += [value for name, value in attributes if name in names and not value.startswith("#")]
        if tag not in ("meta", "br", "input", "tr", "td", "th"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def report_of(tmp_path: Path, *records: record.Record) -> str:
    report.write_html(tmp_path / "run.html", *records)
    return (tmp_path / "run.html").read_text(encoding="utf-8")


def test_html_page_needs_nothing_else(tmp_path: Path) -> None:
    wrong = make_result(case="bad <case>", error="y 1 > 0", seconds={}, ratios={})
    text = report_of(tmp_path, make_record(make_result(), make_result(1.2, mode=FORWARD), wrong))
    page = Page(text)
    assert not page.open and not page.fetched
    # Ratios of two modes, rates, and memory.
    assert page.seen.count("svg") == 4 and page.seen.count("script") == 1
    # A time of 1 s at half of the matrix product; the filter and the sorting find what they need.
    assert 'data-op="scale" id="scale"' in text and "data-v=2><b class=met>2.00x</b>" in text
    assert "seqops, scale &lt;B4&gt;, training step: 25 GFLOP/s" in text
    assert "http" not in text and "@import" not in text and "url(" not in text.replace("url(#", "")
    assert "the peer is &lt;quick&gt;" in text and "1 of 2 goals met" in text and "y 1 &gt; 0" in text


def test_markdown_table_replaces_only_its_own_text(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"# Title\n\n{tables.BEGIN}\nold\n{tables.END}\n\nEnd.\n")
    tables.update_markdown(page, make_record(make_result(), make_result(1.2, mode=FORWARD)))
    once = page.read_text()
    assert once.startswith(f"# Title\n\n{tables.BEGIN}\n\n| case |") and once.endswith(f"{tables.END}\n\nEnd.\n")
    assert "old" not in once and "5.0 MB / 10 MB" in once
    assert "| 1.00 s / 1.20 s | **1.20x** (goal 1.5x, missed) | 1.00 s / 2.00 s | **2.00x** (goal 1.5x) |" in once
    tables.update_markdown(page, make_record(make_result(), make_result(1.2, mode=FORWARD)))
    assert page.read_text() == once


def test_brief_markdown_has_the_first_case_of_each_operator() -> None:
    one = make_record(make_result(case="a"), make_result(case="a", mode=harness.INFERENCE), make_result(case="b"))
    two = make_record(make_result(op="other", case="c"), make_result(op="other", case="d", mode=FORWARD))
    two.rates["gemm"] = 7e9
    table, *runs = tables.markdown_table(one, two, brief=True).split("\n\n")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| a", "| c"]
    assert runs[0].startswith(f"`{one.results[0].op}`: ") and runs[1].startswith("`other`: ")
    assert "7 GFLOP/s" in runs[1] and "7 GFLOP/s" not in runs[0]
    assert all(f"| {case} |" in tables.markdown_table(one, two) for case in "abcd")
    assert tables.markdown_table(one).split("\n\n")[1].startswith(tables.describe(one))


@pytest.mark.parametrize("text", ["", f"{tables.BEGIN}\n", f"{tables.END}\n{tables.BEGIN}\n"])
def test_markdown_without_markers_is_refused(tmp_path: Path, text: str) -> None:
    page = tmp_path / "README.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="expected one line <!-- bench:begin -->"):
        tables.update_markdown(page, make_record(make_result()))
    assert page.read_text() == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (12.3, "12.3 s"),
        (1, "1.00 s"),
        (0.99999, "1.00 s"),
        (0.1234, "123 ms"),
        (1.234e-3, "1.23 ms"),
        (9.999e-3, "10.0 ms"),
        (4.56e-6, "4.56 µs"),
        (4.5e-8, "0.04 µs"),
    ],
)
def test_seconds_have_three_digits(seconds: float, text: str) -> None:
    assert tables.format_seconds(seconds) == text


@pytest.mark.parametrize(("width", "shown"), [(72, "ratio"), (100, "goal"), (200, "copy %")])
def test_table_fits_the_terminal(width: int, shown: str) -> None:
    target = io.StringIO()
    tables.print_table([make_result(), make_result(0.5)], Console(file=target, width=width, force_terminal=True))
    assert shown in target.getvalue() and "2.00x" in target.getvalue() and "0.50x" in target.getvalue()
    plain = [Text.from_ansi(line).plain for line in target.getvalue().splitlines()]
    assert all(len(line) <= width for line in plain)


def run_command(monkeypatch: pytest.MonkeyPatch, cases: list[harness.Case], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(harness, "load_cases", lambda: cases)
    done = CliRunner().invoke(command.main, arguments)
    return done.exit_code, done.output


def test_command_measures_and_writes(plain_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory.Processes, "peak", lambda *arguments: 8 << 20)
    files = [f"--json={tmp_path / 'run.json'}", f"--html={tmp_path / 'run.html'}", f"--markdown={tmp_path / 'run.md'}"]
    wrong = make_case(factor=2.0, op="wrong")
    code, output = run_command(monkeypatch, [make_case(), wrong], "--quick", "--threads=1", *files)
    assert code == 1
    assert "failed: wrong B4, forward: relative error against float64: y, T=4: 3.3e-01 > 2.0e-05" in output
    assert record.load(tmp_path / "run.json").results[1].memory == {OURS: 8 << 20, FAST: 8 << 20, SLOW: 8 << 20}
    assert "<svg" in (tmp_path / "run.html").read_text() and tables.BEGIN in (tmp_path / "run.md").read_text()

    code, output = run_command(monkeypatch, [make_case()], "--op=scale", "--quick", "--threads=1", *files)
    assert code == 0
    assert tables.render(record.load(tmp_path / "run.json").results) in output
    before = (tmp_path / "run.md").read_text()
    (tmp_path / "run.md").unlink()
    code, again = run_command(monkeypatch, [], f"--from={tmp_path / 'run.json'}", files[2])
    assert code == 0
    assert again.startswith(tables.render(record.load(tmp_path / "run.json").results))
    assert (tmp_path / "run.md").read_text() == before

    found = record.load(tmp_path / "run.json")
    found.machine["cpu"] = "another one"
    found.save(tmp_path / "other.json")
    sources = [f"--from={tmp_path / 'run.json'}", f"--from={tmp_path / 'other.json'}"]
    code, output = run_command(monkeypatch, [], *sources, files[1])
    assert code == 2 and "other.json does not fit " in output and "got 'another one'" in output
    code, output = run_command(monkeypatch, [], *sources, files[2])
    assert code == 0, output

    both = [f"--from={tmp_path / 'run.json'}"] * 2
    code, output = run_command(monkeypatch, [], *both, files[1])
    assert code == 0 and (tmp_path / "run.html").read_text().count("<section") == 1
    code, output = run_command(monkeypatch, [], *both, "--brief", files[2])
    assert code == 0 and (tmp_path / "run.md").read_text().count("| scale B4 |") == 2
    code, output = run_command(monkeypatch, [], *both, files[0])
    assert code == 2 and "--json is of one run" in output
    code, output = run_command(monkeypatch, [], *both, "--pages")
    assert code == 2 and "--pages: none of these files is a run of --suite modules" in output


def test_command_lists_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = run_command(monkeypatch, [make_case(goals={(FAST, FORWARD): 2.0})], "--list")
    assert code == 0
    assert output.splitlines() == [
        "scale  scale B4, forward  [fast peer >= 2x]",
        "scale  scale B4, forward+backward  [no goal]",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op=slst"], "no operator 'slst'; did you mean slstm or lstm?"),
        (["--op=zzz"], "no operator 'zzz'; there are lstm, slstm, gru"),
        (["--threads=0"], "0 is not in the range x>=1"),
        (["--kernel=lstm:cpu:forward"], "expected OP:cuda|triton:forward|backward, got 'lstm:cpu:forward'"),
        (["--kernel=lstm"], "expected OP:cuda|triton:forward|backward, got 'lstm'"),
        (["--device=tpu"], "'tpu' is not one of 'cpu', 'cuda'"),
        (["--from=README.md"], "--from: README.md: expected JSON"),
        (["--markdown=Makefile"], "--markdown: Makefile: expected one line <!-- bench:begin -->"),
    ],
)
def test_command_refuses_what_it_cannot_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "Makefile"):
        Path(name).write_text("text\n")
    code, output = run_command(monkeypatch, [make_case(op=op) for op in ("lstm", "slstm", "gru")], *arguments)
    assert code == 2
    assert message in output


def test_command_needs_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, output = run_command(monkeypatch, [make_case()], "--device=cuda")
    assert code == 2
    assert "--device cuda: torch finds no CUDA device here" in output


def test_command_needs_no_matplotlib_for_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    make_record(make_result()).save(tmp_path / "run.json")
    code, output = run_command(monkeypatch, [], f"--from={tmp_path / 'run.json'}", f"--html={tmp_path / 'run.html'}")
    assert code == 0, output


def test_page_of_several_runs(tmp_path: Path) -> None:
    """Of a case in two runs the last counts; rates are those of each one's own run; lengths make lines."""
    lengths = [make_result(2.0 * T, case=f"scale T{T}", length=T, mode=FORWARD) for T in (8, 64)]
    one, two = make_record(make_result(2.0), *lengths), make_record(make_result(3.0), make_result(op="other"))
    two.rates["gemm"] = 8e10
    text = report_of(tmp_path, one, two)
    assert text.count("<section") == 2 and "2.00x" in text and text.count(">3.00x</b>") == 1
    assert "training step: 40 GFLOP/s" in text and "80 GFLOP/s" in text and "50 GFLOP/s" in text
    assert "forward: time against length" in text and "memory of a training step against length" in text
    assert f"{FAST}, 64: 128 s" in text and f"{OURS}, 8: 1.00 s" in text
    two.machine["threads"] = 7
    with pytest.raises(ValueError, match="threads: expected 2 as in the first run, got 7"):
        report.write_html(tmp_path / "run.html", one, two)


def test_share_of_the_roof_is_the_larger_share() -> None:
    found = make_result(gemm_fraction={OURS: 0.5, FAST: 0.1}, copy_fraction={OURS: 0.4, FAST: 0.3})
    assert report.roof_fraction(found) == {OURS: 0.5, FAST: 0.3}


def test_ticks_are_round_and_few() -> None:
    assert plots.ticks(0.9, 30.0) == [1, 2, 5, 10, 20]
    assert plots.ticks(1.0, 1e5) == [1, 10, 100, 1e3, 1e4, 1e5]
    assert len(plots.ticks(1e-9, 1e9)) <= 9


# --- the suites of lengths and of modules


def test_every_public_operator_has_cases() -> None:
    public = {*backend.table()}
    assert public <= {*seqops.__all__}
    assert {case.op for case in harness.load_cases()} == public
    assert {*lengths.SWEEPS} == public
    cases = harness.load_suite("lengths")
    assert len({case.name for case in cases}) == len(cases)
    for op in public:
        found = [case.length for case in cases if case.op == op]
        assert len(found) >= 3 and found == sorted(found), op
    assert all(not case.goals and set(case.modes) <= {FORWARD, TRAINING} for case in cases)


@pytest.mark.parametrize("op", lengths.SWEEPS)
def test_shortest_length_of_each_operator(op: str) -> None:
    """Ours and the peer that is timed beside it agree with float64."""
    case = lengths.make_cases(op)[0]
    steps = min(case.steps, 128)
    mode = case.modes[-1]
    expected = harness.evaluate(case, REFERENCE, mode, steps)
    for name in (OURS, *case.peers):
        errors = harness.compare(harness.evaluate(case, name, mode, steps), expected)
        # Newton-Schulz steps enlarge the rounding of small singular values.
        assert all(error < 1e-4 for error in errors.values()), (name, errors)


def test_every_module_has_sizes() -> None:
    """A module that `python -m bench --suite modules` does not know is named here: bench/modules.py needs a line."""
    assert modules.missing() == []
    assert {*modules.MODULES} <= {*modules.exported()}


@pytest.mark.parametrize("name", [name for name in modules.exported() if name in modules.MODULES])
def test_module_can_be_measured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built, run and differentiated at a short length; one step after a past, with a state whose size is known."""
    monkeypatch.setattr(modules, "PAST", 40)
    *cases, last = modules.make_cases(name)
    cases = cases or [last]
    contender = cases[0].build(OURS, 64 if name != "ConvS5" else 2)
    outputs = contender.run()
    assert all(value.isfinite().all() for value in outputs.values())
    torch.autograd.grad([y.sum() for y in outputs.values()], [*contender.leaves.values()])
    if last.modes == (INFERENCE,):
        with torch.inference_mode():
            y = last.build(OURS, 1).run()["y"]
            assert y.shape[0] == modules.BATCH and y.isfinite().all()
        assert last.facts()["state"][OURS] > 0
    assert cases[0].facts()["parameters"][OURS] > 0


def test_every_module_has_a_place_for_its_numbers() -> None:
    """In one page of docs/nn, between markers."""
    text = "".join(path.read_text() for path in sorted(modules.PAGES.glob("*.md")))
    assert [name for name in modules.exported() if text.count(modules.begin(name)) != 1] == []
    assert text.count("<!-- numbers: ") == text.count(modules.END)
    tables.check_markdown(modules.PAGE)


def test_attention_beside_modules_is_causal_and_steps() -> None:
    layer, x = modules.CausalAttention().double(), torch.randn(2, 9, modules.WIDTH, dtype=torch.float64)
    whole = layer(x)
    torch.testing.assert_close(layer(x[:, :5]), whole[:, :5])
    with torch.no_grad():
        _, k, v = layer.heads(x)
        keys, values = k.clone(), v.clone()
        keys[:, :, -1], values[:, :, -1] = 0, 0
        torch.testing.assert_close(layer.step(x[:, -1], keys, values), whole[:, -1])


def test_modules_are_measured_and_written(plain_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Into the table of all, and into the page of each; again from the file the same."""
    entry = dataclasses.replace(modules.MODULES["MinGRU"], lengths=(4, 8))
    monkeypatch.setattr(modules, "MODULES", {"MinGRU": entry})
    monkeypatch.setattr(modules, "exported", lambda: ["MinGRU"])
    pages = tmp_path / "nn"
    pages.mkdir()
    (tmp_path / "modules.md").write_text(f"{tables.BEGIN}\n{tables.END}\n")
    page = "# MinGRU\n\n<!-- numbers: MinGRU -->\n<!-- end numbers -->\n\nEnd.\n"
    (pages / "min-gru.md").write_text(page)
    (pages / "other.md").write_text("# Other\n")
    write = partial(modules.update_pages, page=tmp_path / "modules.md", pages=pages)
    monkeypatch.setattr(modules, "update_pages", write)
    files = [f"--json={tmp_path / 'run.json'}", f"--html={tmp_path / 'run.html'}"]
    code, output = run_command(monkeypatch, [], "--suite=modules", "--quick", "--threads=1", "--pages", *files)
    assert code == 0, output
    found = record.load(tmp_path / "run.json")
    assert found.suite == "modules" and len(found.results) == 5
    assert all({modules.ATTENTION} == set(result.ratios) and not result.goals for result in found.results)
    step = found.results[-1]
    assert step.state[OURS] == 4 * 128 * 4 and step.state[modules.ATTENTION] == 2 * 4 * 8 * 128 * 4
    own = (pages / "min-gru.md").read_text()
    assert own.startswith("# MinGRU\n\n<!-- numbers: MinGRU -->\n\n|  | T = 4 | T = 8 |") and own.endswith("End.\n")
    assert "state 2 kB" in own and "one step " in own and (pages / "other.md").read_text() == "# Other\n"
    assert "| `MinGRU` |" in (tmp_path / "modules.md").read_text()
    assert "<h2>Modules</h2>" in (tmp_path / "run.html").read_text()
    (pages / "min-gru.md").write_text(page)
    code, output = run_command(monkeypatch, [], f"--from={tmp_path / 'run.json'}", "--pages")
    assert code == 0 and (pages / "min-gru.md").read_text() == own
    (pages / "min-gru.md").write_text("<!-- numbers: MinGRU -->\n")
    with pytest.raises(ValueError, match="expected a line <!-- end numbers -->"):
        write([found])
    code, output = run_command(monkeypatch, [make_case()], "--pages")
    assert code == 2 and "--pages writes what --suite modules measures" in output


def test_case_tables_are_consistent() -> None:
    cases = harness.load_cases()
    assert {"lstm", "gru", "slstm", "elman"} <= {case.op for case in cases}
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert {OURS, REFERENCE} <= set(case.builders)
        assert case.devices and set(case.devices) <= set(harness.DEVICES)
        assert case.backends and set(case.backends) <= {name for row in harness.BACKENDS.values() for name in row}
        assert set(case.time_goals) <= set(case.modes)
        # Without peers, only a ruler can bound what 16 bits may be off by.
        assert case.peers or harness.RULER in case.builders or case.op not in rnn.MODULES
        assert not set(case.absent) & set(case.builders)
        timed = {*case.builders, *case.absent, *case.beside, *(name for name, _ in case.yardsticks)} - {harness.RULER}
        assert {mode for _, mode in case.yardsticks} | set(case.copy_goals) <= set(case.modes)
        assert set(case.modes) == set(case.flops) == set(case.bytes) <= set(harness.MODES)
        for peer, mode in (*case.goals, *case.causes):
            assert peer in timed | {record.COPY} and mode in case.modes
        assert case.check_steps is None or case.check_steps < case.steps


@pytest.mark.parametrize("case", rnn.CPU_CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_contenders_compute_the_same(case: harness.Case) -> None:
    """Ours and every peer give the float64 reference's outputs and gradients on three steps, in the case's modes."""
    bound = 1e-5 if case.dtype == torch.float32 else 5e-2
    steps = min(3, case.steps)
    mode = TRAINING if TRAINING in case.modes else case.modes[0]
    expected = harness.evaluate(case, REFERENCE, mode, steps)
    for name in (OURS, *case.peers):
        errors = harness.compare(harness.evaluate(case, name, mode, steps), expected)
        assert all(error < bound for error in errors.values()), (name, errors)


def is_attention(op: str) -> bool:
    return getattr(getattr(seqops, op, None), "__module__", "").startswith("seqops.attention.")


ATTENTION = [case for case in harness.load_cases() if is_attention(case.op) and harness.CPU in case.devices]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name.replace(" ", "-"))
def test_contenders_of_attention_compute_the_same(case: harness.Case) -> None:
    """On as many steps as make more than one of each pattern's pieces; some peers take whole blocks of 128."""
    steps, bound = min(512, case.steps), 1e-5 if case.dtype == torch.float32 else 5e-2
    mode = TRAINING if TRAINING in case.modes else case.modes[0]
    expected = harness.evaluate(case, REFERENCE, mode, steps)
    for name in (OURS, *case.peers):
        errors = harness.compare(harness.evaluate(case, name, mode, steps), expected)
        assert all(error < bound for error in errors.values()), (name, errors)


ALL_PEERS = (neural_memory.LOOP, neural_memory.CHUNKED)
LEARNING = [
    newton_schulz.make_case(newton_schulz.Shape(3, 20, 12)),
    *(
        large_chunk_ttt.make_case(large_chunk_ttt.Shape(2, 11, 3, 8, 6, 4, **options), sgemm=False)
        for options in ({}, {"optimizer": "muon", "momentum": True}, {"order": "update_apply"})
    ),
    *(neural_memory.make_case(neural_memory.Shape(2, 12, 3, 8, F, 4), peers=ALL_PEERS) for F in (0, 12)),
    neural_memory.make_case(neural_memory.Shape(2, 12, 3, 8, 12, 4, momentum=False), peers=ALL_PEERS),
]


@pytest.mark.parametrize("case", LEARNING, ids=lambda case: case.name.replace(" ", "-"))
def test_contenders_of_test_time_training_compute_the_same(case: harness.Case) -> None:
    expected = harness.evaluate(case, REFERENCE, TRAINING, case.steps)
    for name in (OURS, *case.peers):
        errors = harness.compare(harness.evaluate(case, name, TRAINING, case.steps), expected)
        # Newton-Schulz steps enlarge the rounding of small singular values.
        assert all(error < 1e-4 for error in errors.values()), (name, errors)


@pytest.mark.parametrize("F", [0, 12])
def test_titans_computes_the_same_with_gates_per_token(F: int) -> None:
    """Another implementation of the same rule, where it is installed."""
    pytest.importorskip("titans_pytorch")
    case = neural_memory.make_case(neural_memory.Shape(2, 12, 3, 8, F, 4), peers=(neural_memory.TITANS_EXACT,))
    expected = harness.evaluate(case, OURS, TRAINING, 12)
    errors = harness.compare(harness.evaluate(case, neural_memory.TITANS_EXACT, TRAINING, 12), expected)
    assert all(error < 1e-5 for error in errors.values()), errors


def test_sgemm_does_the_operations_of_its_case() -> None:
    case = next(case for case in large_chunk_ttt.CPU_CASES if case.yardsticks)
    for mode in case.modes:
        with FlopCounterMode(display=False) as counter:
            case.build_yardsticks(mode)[large_chunk_ttt.SGEMM].run()
        assert counter.get_total_flops() == pytest.approx(case.flops[mode], rel=1e-3)


def test_operations_of_large_chunks_are_those_that_torch_counts() -> None:
    """Of plain bmm, forward, which computes nothing twice."""
    for options in ({}, {"order": "update_apply"}, {"optimizer": "muon"}):
        case = large_chunk_ttt.make_case(large_chunk_ttt.Shape(1, 12, 2, 8, 6, 4, **options))
        contender = case.build(large_chunk_ttt.PLAIN, case.steps)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            contender.run()
        assert counter.get_total_flops() == case.flops[FORWARD]


@pytest.mark.parametrize("case", ATTENTION, ids=lambda case: case.name.replace(" ", "-"))
def test_operations_of_attention_are_those_of_its_mask(case: harness.Case) -> None:
    build = case.builders[REFERENCE]
    if build.func is attention_peers.build_dense:
        shape, mask = build.args[:2]
        assert case.flops[FORWARD] == 4 * shape.B * shape.H * shape.D * int(mask(shape.T, "cpu").sum())


# --- the recurrent networks on a GPU, in small and on the CPU: ours in the simulator


def run_flashrnn(wx: Tensor, r: Tensor, b: Tensor, function: str, backend: str, dtype: str) -> tuple[Tensor, Tensor]:
    """In place of the package, in its layout [states, B, T, H, D]; of all states but h only the last step is right."""
    assert backend == "cuda_fused" and dtype == str(wx.dtype).removeprefix("torch.")
    h, *last = rnn_contenders.call_reference(function, wx, r, b)
    states = torch.stack((h, *(state[:, None].expand_as(h) for state in last[1:])))
    return states, torch.stack(last)[:, :, None]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := launch._reason_without_compiler():
        pytest.skip(reason)
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    monkeypatch.setitem(sys.modules, "flashrnn", SimpleNamespace(flashrnn=run_flashrnn))
    monkeypatch.setattr(rnn, "NO_FLASHRNN", {})


OPERATORS = [("lstm", torch.bfloat16), ("slstm", torch.float32), ("gru", torch.bfloat16), ("elman", torch.float32)]


@pytest.mark.parametrize(("op", "dtype"), OPERATORS, ids=[op for op, _ in OPERATORS])
def test_contenders_on_a_gpu_compute_the_same(op: str, dtype: torch.dtype, simulated: None) -> None:
    """The alternating path of ours, FlashRNN's layout and the loops, forward and backward."""
    case = rnn.on_gpu(rnn.several(op, 2, 4, batch=3, dtype=dtype, time=5))
    wanted = {rnn.ALTERNATING, *((rnn.LOOP,) if op == "slstm" else ()), *((rnn.FLASHRNN,) if op != "gru" else ())}
    assert set(case.peers) == wanted and case.backends == ("cuda", "triton") and not case.absent
    assert harness.find_unfit(case, TRAINING, "cpu") == {}
    bound = 1e-5 if dtype == torch.float32 else 5e-2
    expected = harness.evaluate(case, REFERENCE, TRAINING, case.steps)
    for name in (OURS, harness.RULER, *case.peers):
        errors = harness.compare(harness.evaluate(case, name, TRAINING, case.steps), expected)
        assert all(error < bound for error in errors.values()), (name, errors)


def test_the_alternating_peer_runs_no_kernel_of_all_steps(simulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqops.rnn import cuda as kernels

    def launched(*arguments: object, **options: object) -> None:
        raise AssertionError("the kernel of all steps")

    for pair in kernels.KERNELS.values():
        for kernel in pair:
            monkeypatch.setattr(kernel, "_simulate", launched)
    case = rnn.on_gpu(rnn.several("lstm", 2, 4, batch=3, time=3))
    assert harness.evaluate(case, rnn.ALTERNATING, TRAINING, 3)
    with pytest.raises(AssertionError, match="the kernel of all steps"):
        harness.evaluate(case, OURS, TRAINING, 3, backend="cuda")


@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("op", ["lstm", "gru", "elman"])
def test_modules_on_a_gpu_are_bounded_by_a_ruler(op: str, carried: bool, simulated: None) -> None:
    """The loop after a stored projection, rounded as it goes: it sets the bound, whatever the peers do; ours is in it.

    In float64 it is the reference itself.
    """
    shape = rnn.layer(op, 16, batch=3, time=1 if carried else 12, carried=carried)
    mode = INFERENCE if carried else TRAINING
    case = rnn.on_gpu(shape, modes=(mode,))
    case = dataclasses.replace(case, check_steps=None)
    expected = harness.evaluate(case, REFERENCE, mode, shape.T)
    ruler = harness.compare(harness.evaluate(case, harness.RULER, mode, shape.T), expected)
    assert all(1e-4 < error < 5e-2 for error in ruler.values()), ruler
    for peer in case.peers:
        case.builders[peer] = fail
    found = harness.check(case, mode, backend="cuda")
    assert found.bounds == {f"{name}, T={shape.T}": 1.2 * error for name, error in ruler.items()}
    assert not found.failures, found.message
    exact = rnn.on_gpu(dataclasses.replace(shape, dtype=torch.float64), modes=(mode,))
    expected = harness.evaluate(exact, REFERENCE, mode, shape.T)
    errors = harness.compare(harness.evaluate(exact, harness.RULER, mode, shape.T), expected)
    assert all(error < 1e-13 for error in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("op", ["lstm", "gru", "elman"])
def test_modules_on_a_gpu_have_a_peer_of_another_precision(op: str, dtype: torch.dtype) -> None:
    case = rnn.on_gpu(rnn.layer(op, 8, batch=2, dtype=dtype, time=4))
    title = f"nn.{rnn.MODULES[op]}"
    assert case.peers == [title, f"{title}, {'float16' if dtype == torch.bfloat16 else 'TF32'}"]
    assert harness.find_unfit(case, TRAINING, "cpu") == {}
    inside = {}
    for name in (OURS, *case.peers):
        contender = case.build(name, 4)
        with contender.within():
            inside[name] = torch.backends.cudnn.allow_tf32, contender.run()["h"].dtype
    other = (False, torch.float16) if dtype == torch.bfloat16 else (True, dtype)
    assert list(inside.values()) == [(False, dtype), (False, dtype), other]


def test_the_goals_on_a_gpu() -> None:
    """Milliseconds of a training step's two measurements, and ratios, by case."""
    cases = {case.name.removesuffix(" GPU"): case for case in rnn.GPU_CASES}
    assert len(cases) == len(rnn.GPU_CASES) and all(case.is_stepwise for case in cases.values())
    times = {name: tuple(case.time_goals.values()) for name, case in cases.items() if case.time_goals}
    assert times == {
        "lstm bfloat16 B16 T1024 H12 D64": (0.8e-3, 2.5e-3),
        "lstm bfloat16 B16 T1024 H6 D128": (1.0e-3, 3.0e-3),
        "lstm bfloat16 B16 T1024 H3 D256": (1.3e-3, 3.8e-3),
        "nn.LSTM bfloat16 B16 T1024 D768": (1.7e-3, 4.8e-3),
    }
    for name, case in cases.items():
        if name.startswith(("nn.GRU bfloat16 B16", "nn.LSTM bfloat16 B16")) and case.steps > 1:
            wanted = {"gru": 3, "lstm": 2.5}[case.op]
            assert case.goals == {(case.peers[0], mode): wanted for mode in (FORWARD, TRAINING)}, name
        if case.beside:
            small = case.beside[rnn.SMALL_BATCH]
            assert {**case.shape, "B": 16} == small.shape and case.shape["B"] == 64
            assert set(case.goals.values()) == {1 / 1.3}
        assert case.has_goals("cuda") and not case.has_goals("triton")


def test_flashrnn_is_a_goal_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rnn, "NO_FLASHRNN", {})
    case = rnn.on_gpu(rnn.several("slstm", 3, 256))
    assert case.goals == {(rnn.FLASHRNN, mode): 3 for mode in (FORWARD, TRAINING)}
    for shape in (rnn.several("slstm", 1, 257), rnn.several("gru", 4, 64), rnn.several("lstm", 4, 64, time=1)):
        assert not rnn.on_gpu(shape).goals
    monkeypatch.setattr(rnn, "NO_FLASHRNN", {rnn.FLASHRNN: "the package flashrnn is not installed"})
    assert not rnn.on_gpu(rnn.several("slstm", 3, 256)).goals


def test_recurrent_cases_go_all_the_way(
    simulated: None, plain_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU, but for the clock and for where tensors lie: checked, peers tried, timed, and printed."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stub 9")
    monkeypatch.setattr(harness, "make_stopwatch", lambda device: SlowWatch())
    monkeypatch.setattr(harness, "UNFIT_STEPS", 2)
    monkeypatch.setattr(backend, "reason_missing", lambda op, name, device: None if name == "cuda" else "no GPU")
    monkeypatch.setattr(harness.Case, "_call", staticmethod(lambda builder, steps, device: builder(steps)))
    monkeypatch.setattr(rnn, "NO_FLASHRNN", {rnn.FLASHRNN: "the package flashrnn is not installed"})
    small, time_goal = rnn.on_gpu(rnn.several("lstm", 2, 4, batch=2, time=3)), {FORWARD: 1e9, TRAINING: 1e-9}
    cases = [
        rnn.on_gpu(rnn.several("lstm", 2, 4, batch=3, time=3), milliseconds=time_goal),
        rnn.on_gpu(rnn.several("lstm", 2, 4, batch=8, time=3), beside={rnn.SMALL_BATCH: small}),
        rnn.on_gpu(rnn.layer("gru", 16, batch=4, time=3), ratio=1e9),
        rnn.on_gpu(rnn.layer("lstm", 16, batch=4, time=1, carried=True), "decode", modes=(INFERENCE,)),
    ]
    cases = [dataclasses.replace(case, check_steps=2 if case.check_steps else None) for case in cases]
    settings = harness.Settings(threads=1, quick=True, memory=False, device="cuda")
    measured = suite.Suite(cases, settings)
    assert suite.run(measured) == 0, [result.error for result in measured.results]
    peers = [set(result.ratios) for result in measured.results]
    both = {"nn.LSTM", "nn.LSTM, float16"}
    expected = [*[{rnn.ALTERNATING}] * 2, *[{rnn.SMALL_BATCH}] * 2, *[{"nn.GRU", "nn.GRU, float16"}] * 2, both]
    assert peers == expected and {result.backend for result in measured.results} == {"cuda"}
    assert all(result.step_seconds > 0 for result in measured.results)
    found = record.make_record(settings, measured.rates, measured.results)
    found.save(tmp_path / "run.json")
    target = io.StringIO()
    tables.print_record(record.load(tmp_path / "run.json"), Console(file=target))
    text = target.getvalue()
    assert "absent: lstm, flashrnn: the package flashrnn is not installed" in text
    assert "missed: lstm bfloat16 B3 T3 H2 D4 GPU, cuda, forward+backward, time of a call: " in text
    assert "missed: nn.GRU bfloat16 B4 T3 D16 GPU, cuda, forward, time against nn.GRU: " in text
    report.write_html(tmp_path / "run.html", found)
    assert "a step" in (tmp_path / "run.html").read_text()


# --- what only a GPU's cases have


def test_times_steps_and_other_cases(stub_gpu: list[str | None]) -> None:
    """A time to stay within, ours at another size by the same backend, and what one step takes."""
    case = gpu_case(
        backends=("cuda",),
        time_goals={FORWARD: 1e-12, TRAINING: 1e3},
        beside={"small": gpu_case(op="small")},
        goals={("small", FORWARD): 1e9},
        is_stepwise=True,
        step_floor=1e-9,
    )
    measured = suite.Suite([case], harness.Settings(threads=1, quick=True, memory=False, device="cuda"))
    assert suite.run(measured) == 0
    forward, training = measured.results
    assert set(forward.ratios) == {FAST, SLOW, "small"}
    assert forward.step_seconds == pytest.approx(forward.seconds[OURS]["median"] / 4)
    assert (forward.step_floor, training.step_floor) == (1e-9, None)
    found = record.make_record(measured.settings, measured.rates, measured.results)
    misses = {(miss.quantity, miss.peer, miss.result.mode) for miss in record.find_misses(found)}
    assert misses == {("time", "small", FORWARD), ("seconds", record.TIME, FORWARD)}
    assert tables.summarise(found) == "1 of 3 goals met"
    text = tables.render(measured.results)
    assert "time goal" in text and "a step" in text and "(floor 0.00 µs)" in text
    target = io.StringIO()
    tables.print_record(found, Console(file=target))
    assert re.search(
        r"^missed: scale B4, cuda, forward, time of a call: [\d.]+ \S+ for 0.00 µs$", target.getvalue(), re.M
    )
    assert "time goal" not in tables.render([make_result()]) and "a step" not in tables.render([make_result()])


def test_goals_are_for_the_backends_that_a_case_names(stub_gpu: list[str | None]) -> None:
    goals = {"goals": {(FAST, FORWARD): 2.0}, "time_goals": {FORWARD: 1.0}, "copy_goals": {FORWARD: 0.5}}
    case = gpu_case(**goals, goal_backends=("cuda",))
    measured = suite.Suite([case], harness.Settings(threads=1, quick=True, memory=False, device="cuda"))
    assert suite.run(measured) == 0
    found = {
        result.backend: (result.goals, result.time_goal, result.copy_goal)
        for result in measured.results
        if result.mode == FORWARD
    }
    assert found == {"cuda": ({FAST: 2.0}, 1.0, 0.5), "triton": ({}, None, None)}
    assert all(result.ratios for result in measured.results)


def test_only_named_kernels_are_measured(
    stub_gpu: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what needs another one as well is not run at all."""
    monkeypatch.setattr(cuda, "peak_memory", lambda case, name, backend: 8 << 20)
    names = ["scale:cuda:forward", "scale:cuda:backward", "scale:triton:forward"]
    chosen = [f"--kernel={name}" for name in names]
    file = tmp_path / "run.json"
    stub_gpu.clear()
    code, output = run_command(monkeypatch, [gpu_case()], "--device=cuda", "--quick", f"--json={file}", *chosen[::2])
    assert code == 0, output
    kept = [(result.backend, result.mode) for result in record.load(file).results]
    assert kept == [("cuda", FORWARD), ("triton", FORWARD)]
    code, _ = run_command(monkeypatch, [gpu_case()], "--device=cuda", "--quick", f"--json={file}", *chosen)
    kept = [(result.backend, result.mode) for result in record.load(file).results]
    assert code == 0 and kept == [("cuda", FORWARD), ("cuda", TRAINING), ("triton", FORWARD)]
    code, output = run_command(monkeypatch, [gpu_case()], "--device=cuda", "--kernel=scale:cuda:backward")
    assert code == 2 and "no case of these operators runs on these kernels alone" in output


def test_another_case_is_checked_once(stub_gpu: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is in the run itself; what was found there counts."""
    checked: list[tuple[str, str, str]] = []
    check = harness.check

    def count(case: harness.Case, mode: str, device: str, backend: str) -> harness.Check:
        checked.append((case.op, mode, backend))
        return check(case, mode, device, backend)

    monkeypatch.setattr(harness, "check", count)
    small = gpu_case(op="scale", factor=2.0)
    large = gpu_case(op="scale", size=16, beside={"small": small})
    monkeypatch.setattr(backend, "reason_missing", lambda op, name, device: None)
    measured = suite.Suite([small, large], harness.Settings(threads=1, quick=True, memory=False, device="cuda"))
    assert suite.run(measured) == 1
    assert len(checked) == len(measured.results) == 8
    for result in measured.results[4:]:
        assert result.case == "scale B16" and "small: y, T=4" in result.error
    assert all("small" not in result.error for result in measured.results[:4])


def test_wrong_values_of_the_other_case_are_not_timed(stub_gpu: list[str | None]) -> None:
    case = gpu_case(backends=("cuda",), beside={"small": gpu_case(op="small", factor=2.0)})
    measured = suite.Suite([case], harness.Settings(threads=1, quick=True, memory=False, device="cuda"))
    assert suite.run(measured) == 1
    assert all("small: y, T=4" in result.error and not result.seconds for result in measured.results)


def test_peers_that_fail_or_differ_are_absent_on_a_gpu(stub_gpu: list[str | None]) -> None:
    """With the reason; what is left is measured."""
    case = gpu_case(backends=("cuda",))
    case.builders[SLOW] = partial(on_any_device, SLOW, 2.0, 2.0, 1, torch.float32, 4)
    case.builders["broken"] = lambda steps, device: fail(steps)
    measured = suite.Suite([case], harness.Settings(threads=1, quick=True, memory=False, device="cuda"))
    assert suite.run(measured) == 0
    for result in measured.results:
        assert set(result.ratios) == {FAST}
        assert result.absent == {
            SLOW: "it computes something else: y, T=4, is off by 3.3e-01",
            "broken": "RuntimeError: no kernel today",
        }


def test_a_ruler_bounds_values_and_is_not_timed(plain_process: None) -> None:
    """By 1.2 times its own error, in place of the first peer's."""
    cases = [
        make_case(3.0 * (1 + error), dtype=torch.bfloat16, modes=(FORWARD,), op=f"by {error}") for error in (0.1, 0.2)
    ]
    for case in cases:
        case.builders[harness.RULER] = partial(build, harness.RULER, 3.3, 3.3, 1, torch.bfloat16, 4)
    code, measured = measure(*cases)
    assert code == 1
    right, wrong = measured.results
    assert right.error is None and set(right.ratios) == {FAST, SLOW}
    assert wrong.error is not None and wrong.check["bound"] == pytest.approx(1.2 * right.check["error"])


def test_urgent_cases_are_measured_first(stub_gpu: list[str | None]) -> None:
    cases = [gpu_case(size=1, priority=2), gpu_case(size=2), gpu_case(size=3, priority=0), gpu_case(size=4)]
    assert [case.shape["B"] for case in command.on_device("cuda", cases)] == [3, 2, 4, 1]
    assert command.on_device("cpu", cases) == cases


@pytest.mark.parametrize("name", ["nn.LSTM B4 T64 D32", "nn.RNN B16 T256 D256", "gru B16 T256 H4 D64"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    case = next(case for case in rnn.CASES if case.name == name)
    reference = case.builders[REFERENCE](case.steps)
    with FlopCounterMode(display=False) as counter:
        reference.run()
    assert counter.get_total_flops() == case.flops[FORWARD]
    assert case.flops[TRAINING] == 3 * case.flops[FORWARD]
