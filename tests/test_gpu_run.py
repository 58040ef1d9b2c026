"""The GPU run without a GPU: what it does when tests fail, hang or die, when time is over, and the page it leads to.

Tests run in a project of stubs: a torch that sees a GPU, and a seqops with two operators.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import cold, gpu, hardware, harness, lines, watch
from bench import tuned as tuned_file
from seqops.core import backend, launch
from seqops.tune import device

ROOT = Path(__file__).resolve().parents[1]
GPU = {"name": "NVIDIA Stub 9", "compute_capability": "9.0", "memory_gib": 80.0}
COMMIT = {"id": "0123456789abcdef", "dirty": False}


def make_kernel(operator: str = "scan", backend: str = "cuda", step: str = "forward") -> hardware.Kernel:
    names = [operator] if step == "forward" else [f"{operator}_backward"]
    return hardware.Kernel(operator, backend, step, names, [f"{operator}.cu"])


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    """A run in an empty project, begun on a stub GPU."""
    begun = gpu.Run(tmp_path / "results", tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT, processes=1)
    begun.begin(GPU, {})
    return begun


def saved(run: gpu.Run) -> dict[str, Any]:
    return hardware.load(run.output / "nvidia-stub-9.json")


def outcomes(run: gpu.Run) -> dict[str, str]:
    return {stage["name"]: stage["status"] for stage in saved(run)["stages"]}


# --- stages ----------------------------------------------------------------------------------------------------------


def succeed(run: gpu.Run, seconds: float) -> str:
    return "fine"


def fail(run: gpu.Run, seconds: float) -> str:
    raise gpu.StageError("it is broken\nand this is the log")


def test_a_stage_is_cut_off_with_all_that_it_started(run: gpu.Run, tmp_path: Path) -> None:
    def stage(run: gpu.Run, seconds: float) -> str:
        done = run.execute(["sh", "-c", "sleep 60 & echo $!; wait"], "stage.log", seconds)
        assert done.code is None
        run.record["process"] = int(done.text)
        raise TimeoutError

    assert not run.go([gpu.Stage("slow", stage, 1), gpu.Stage("next", succeed, 1)])
    assert outcomes(run) == {"slow": "cut off", "next": "passed"}
    assert saved(run)["stages"][0]["seconds"] < 10
    with pytest.raises(ProcessLookupError):
        # The stage's own child has ended as well. (Whoever adopted it may take a moment to notice.)
        for _ in range(100):
            os.kill(saved(run)["process"], 0)
            if Path(f"/proc/{saved(run)['process']}/stat").read_text().split()[2] == "Z":
                raise ProcessLookupError
            time.sleep(0.05)


def test_all_stages_share_one_budget(run: gpu.Run) -> None:
    limits = []

    def stage(run: gpu.Run, seconds: float) -> str:
        limits.append(seconds)
        run.end = time.monotonic()
        return ""

    run.go([gpu.Stage("first", stage, 1000), gpu.Stage("second", stage, 1000)])
    assert len(limits) == 1 and limits[0] <= 60
    assert outcomes(run) == {"first": "passed", "second": "not run"}
    assert saved(run)["stages"][1]["text"] == "the time was over"


def test_stages_leave_what_later_ones_need(run: gpu.Run) -> None:
    limits = {}

    def stage(run: gpu.Run, seconds: float) -> str:
        limits[len(limits)] = seconds
        return ""

    run.go([gpu.Stage("a", stage, 50), gpu.Stage("b", stage, 50, reserve=20), gpu.Stage("c", stage, 9, reserve=10)])
    assert limits == {0: pytest.approx(30, abs=1), 1: pytest.approx(50, abs=1), 2: 9}


def test_an_extension_that_works_is_kept(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled again where it does not load, and where a source is newer."""
    source, extension = run.root / "csrc" / "a.cpp", run.root / "seqops" / "_C.abi3.so"
    for path, text in ((source, ""), (extension, ""), (extension.with_name("__init__.py"), "")):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    (run.root / "setup.py").write_text("print('compiling')")
    os.utime(source, (1000, 1000))
    assert gpu.build(run, 60) == "the extension that is there works"
    os.utime(source)
    os.utime(extension, (1000, 1000))
    assert gpu.build(run, 60) == "extension compiled"
    os.utime(source, (1000, 1000))
    extension.with_name("__init__.py").write_text("raise ImportError('another libstdc++')")
    assert gpu.build(run, 60) == "extension compiled"


def test_a_stage_is_left_out_where_what_it_needs_failed(run: gpu.Run) -> None:
    stages = [gpu.Stage("build", fail, 9), gpu.Stage("tests", succeed, 9, ("build",)), gpu.Stage("other", succeed, 9)]
    assert not run.go(stages)
    assert outcomes(run) == {"build": "failed", "tests": "not run", "other": "passed"}
    assert [stage["text"] for stage in saved(run)["stages"]] == [
        "it is broken\nand this is the log",
        "needs build",
        "fine",
    ]


def test_a_stage_alone_needs_no_other(run: gpu.Run) -> None:
    assert run.go([gpu.Stage("tests", succeed, 9, ("build",))])


def test_our_own_mistake_costs_one_stage(run: gpu.Run) -> None:
    run.go([gpu.Stage("wrong", lambda run, seconds: str(1 // 0), 9), gpu.Stage("next", succeed, 9)])
    assert outcomes(run) == {"wrong": "failed", "next": "passed"}


def test_a_run_that_is_cut_off_keeps_what_it_has(run: gpu.Run) -> None:
    def interrupted(run: gpu.Run, seconds: float) -> str:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.go([gpu.Stage("first", succeed, 9), gpu.Stage("second", interrupted, 9)])
    assert outcomes(run) == {"first": "passed"}


def test_missing_packages_leave_out_what_needs_them(run: gpu.Run) -> None:
    missing = {"pytest": "all tests", "rich": "the benchmark, tuning", "ninja": "the build", "cupy": "backend cuda"}
    run.record["missing"] = missing
    stages = [stage for stage in gpu.stages() if stage.name != "info"]
    run.go([gpu.Stage(stage.name, stage.run, stage.limit) for stage in stages])
    assert set(outcomes(run).values()) == {"not run"}
    texts = {stage["name"]: stage["text"] for stage in saved(run)["stages"]}
    assert texts["build"] == "not installed: ninja"
    assert texts["tests"] == texts["memcheck"] == "not installed: pytest"
    assert texts["bench"] == "not installed: rich, pytest"
    assert texts["tune"] == "not installed: cupy, rich"
    assert texts["exchange"] == texts["cold"] == "not installed: cupy"


def test_wheels_of_pure_python_are_used(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, file in (("thing-1-py3-none-any.whl", "thing.py"), ("other-1-cp312-cp312-linux_x86_64.whl", "other.py")):
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr(file, "word = 'here'")
    run = gpu.Run(tmp_path / "results", tmp_path / "work", budget=60, root=tmp_path)
    run.begin(GPU, {})
    assert run.ask("import json, thing; print(json.dumps([thing.word]))", seconds=60) == ["here"]
    with pytest.raises(gpu.StageError, match="No module named 'other'"):
        run.ask("import other", seconds=60)


def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--output", str(tmp_path)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert re.match(r"torch \S+ of \S+ finds no CUDA device here: nothing to run\n", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_make_gpu_takes_the_machines_own_python() -> None:
    command = ["make", "--dry-run", "--always-make", "gpu", "PYTHON=some-python", "ARGS=--only bench"]
    # Not as a part of the `make test` that may be running this.
    outside = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    done = subprocess.run(command, cwd=ROOT, env=outside, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "some-python -m bench.gpu --only bench"


# --- tests of a stub project -----------------------------------------------------------------------------------------

TORCH = """
class Tensor:
    is_cuda = True

class cuda:
    broken = False

    @staticmethod
    def is_initialized():
        return True

    @classmethod
    def synchronize(cls):
        if cls.broken:
            raise RuntimeError("an illegal memory access was encountered")
"""

BACKEND = """
def launch(*arguments, **options):
    return arguments

_served = {
    "scan": {"cuda": launch, "triton": launch, "cpu": None},
    "scan_training": {"cuda": launch},
    "scan_backward": {"cuda": launch},
}

def call(operator, backend, *arguments):
    return _served[operator][backend](*arguments)
"""

TESTS = """
import os, signal, time
import pytest, torch
from seqops.core import backend

pytestmark = pytest.mark.gpu

def test_forward():
    backend.call("scan", "cuda", torch.Tensor())
    backend.call("scan_training", "cuda", torch.Tensor())

@pytest.mark.sanitize
def test_both(record_property):
    record_property("launch", 1.5)
    backend.call("scan", "cuda", torch.Tensor())
    backend.call("scan_backward", "cuda", torch.Tensor())

def test_on_the_cpu():
    backend.call("scan", "triton", 1.0)

def test_skipped():
    pytest.skip("no clusters here")
"""

TROUBLE = """

def test_wrong():
    backend.call("scan_backward", "cuda", torch.Tensor())
    assert 1 == 2

def test_dies():
    backend.call("scan", "triton", torch.Tensor())
    os.kill(os.getpid(), signal.SIGSEGV)

def test_hangs():
    time.sleep(60)

def test_breaks_the_context():
    torch.cuda.broken = True

def test_after_all_that():
    backend.call("scan_backward", "cuda", torch.Tensor())
"""


@pytest.fixture
def project(run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], gpu.Run]:
    """Writes a project with these tests, and gives its run."""

    def write(tests: str) -> gpu.Run:
        for path, text in {
            "torch.py": TORCH,
            "seqops/__init__.py": "",
            "seqops/core/__init__.py": "",
            "seqops/core/backend.py": BACKEND,
            "scan.cu": "kernel",
            "tests/test_scan.py": tests,
            "tests/test_drawn.py": "import hypothesis_that_is_missing",
            "pytest.ini": "[pytest]\naddopts = -m 'not gpu'\ntestpaths = tests\nmarkers =\n gpu: a\n sanitize: b\n",
        }.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(textwrap.dedent(text))
        (tmp_path / "bench").symlink_to(ROOT / "bench")
        run.environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        run.kernels = [make_kernel(step=step) for step in hardware.PASSES] + [make_kernel(backend="triton")]
        run.kernels[0] = hardware.Kernel("scan", "cuda", "forward", ["scan", "scan_training"], ["scan.cu"])
        monkeypatch.setattr(gpu, "LONGEST_TEST", 2.0)
        return run

    return write


def entry_of(run: gpu.Run, backend: str = "cuda", step: str = "forward") -> dict[str, Any]:
    entries = {(entry["backend"], entry["pass"]): entry for entry in saved(run)["kernels"]}
    return entries[backend, step]


TEST_STAGE = gpu.Stage("tests", gpu.tests, 50)


def test_tests_say_which_kernels_they_called(project: Callable[[str], gpu.Run]) -> None:
    run = project(TESTS)
    run.processes = 2
    assert run.go([TEST_STAGE])
    assert entry_of(run)["status"] == entry_of(run, step="backward")["status"] == "passed"
    assert entry_of(run)["tests"] == {"passed": 2, "failed": 0}
    assert entry_of(run, step="backward")["tests"] == {"passed": 1, "failed": 0}
    # Called on the CPU only: nothing ran on the GPU.
    assert entry_of(run, "triton")["status"] == "not run"
    found = saved(run)["tests"]
    assert (found["passed"], found["skips"]) == (3, {"Skipped: no clusters here": 1})
    (path, message), *others = found["uncollected"].items()
    assert path == "tests/test_drawn.py" and "hypothesis_that_is_missing" in message and not others


def test_a_test_that_dies_hangs_or_breaks_the_gpu_costs_itself(project: Callable[[str], gpu.Run]) -> None:
    run = project(TESTS + TROUBLE)
    assert not run.go([TEST_STAGE])
    found = saved(run)["tests"]
    failures = {failure["test"].rpartition("::")[2]: failure["message"] for failure in found["failures"]}
    assert set(failures) == {"test_wrong", "test_dies", "test_hangs", "test_breaks_the_context"}
    assert "assert 1 == 2" in failures["test_wrong"]
    assert failures["test_dies"] == "the process died: SIGSEGV"
    assert failures["test_hangs"].startswith("no end within 2 s\n") and "in test_hangs" in failures["test_hangs"]
    assert "an illegal memory access was encountered" in failures["test_breaks_the_context"]
    assert (found["passed"], found["skipped"]) == (4, 1)
    assert entry_of(run)["status"] == "passed"
    assert entry_of(run, step="backward")["status"] == entry_of(run, "triton")["status"] == "failed"
    assert entry_of(run, step="backward")["tests"] == {"passed": 2, "failed": 1}


class OnGpu(torch.Tensor):
    is_cuda = True


def test_calls_of_the_real_backends_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel's function, called through the table from which the operators take it."""
    served = {op: {name: lambda *given, **options: given for name in row} for op, row in backend._served.items()}
    monkeypatch.setattr(backend, "_served", served)
    seen: list[tuple[str, str]] = []
    watch.watch_backends(lambda operator, name: seen.append((operator, name)))
    there, here = torch.zeros(2).as_subclass(OnGpu), torch.zeros(2)
    expected = [(op, name) for op, _, name in backend.kernels()]
    for op, name in expected:
        assert backend._served[op][name](here) == (here,)
        backend._served[op][name](here, None, cu_seqlens=there)
    assert seen == expected != []


def test_tests_that_are_cut_off_keep_what_ran(
    project: Callable[[str], gpu.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock jumps forward once all but the last test have run."""
    run = project(TESTS + "\n\ndef test_slow():\n    open('slow', 'w').close()\n    time.sleep(60)\n")
    now = time.monotonic
    monkeypatch.setattr(gpu, "LONGEST_TEST", 60.0)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now() + 50 * (run.root / "slow").exists())
    run.go([gpu.Stage("tests", gpu.tests, 50)])
    assert outcomes(run) == {"tests": "cut off"}
    assert entry_of(run)["status"] == "cut off" and entry_of(run)["last_passed"] is None


def test_failures_of_the_last_run_come_first(project: Callable[[str], gpu.Run]) -> None:
    run = project(TESTS)
    found = {"failures": [{"test": "tests/test_scan.py::test_skipped", "message": ""}]}
    run.previous = {"tests": found, "date": "2030-01-02", "commit": COMMIT}
    run.go([TEST_STAGE])
    begun = [line["begin"] for line in lines.read(run.work / "tests-1.jsonl") if "begin" in line]
    assert [test.rpartition("::")[2] for test in begun][:2] == ["test_skipped", "test_forward"]


TURNS = """
import pytest

pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("case", [f"{op}-B{size}-{backend}" for op in ("a", "b") for size in (1, 2)
                                  for backend in ("triton", "cuda")])
def test_scan(case):
    pass

@pytest.mark.parametrize("case", ["a-B1", "a-B2", "a-B3"])
def test_other(case):
    pass
"""


def test_kinds_of_tests_take_turns(project: Callable[[str], gpu.Run]) -> None:
    """Of each function, operator and backend one, CUDA first; then a second one of each."""
    run = project(TURNS)
    assert run.go([TEST_STAGE])
    begun = [line["begin"] for line in lines.read(run.work / "tests-1.jsonl") if "begin" in line]
    assert [test.rpartition("test_")[2] for test in begun] == [
        *("scan[a-B1-cuda]", "scan[b-B1-cuda]", "other[a-B1]", "scan[a-B1-triton]", "scan[b-B1-triton]"),
        *("scan[a-B2-cuda]", "scan[b-B2-cuda]", "other[a-B2]", "scan[a-B2-triton]", "scan[b-B2-triton]"),
        "other[a-B3]",
    ]


@pytest.mark.parametrize(("processors", "expected"), [(2, 2), (16, 12), (None, 1)])
def test_processes_follow_the_processors(
    processors: int | None, expected: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: processors)
    assert gpu.Run(tmp_path, tmp_path, 1).processes == expected


def test_properties_of_primitives_are_shown(project: Callable[[str], gpu.Run]) -> None:
    run = project("")
    shutil.copy(run.root / "tests" / "test_scan.py", run.root / gpu.PRIMITIVES)
    (run.root / gpu.PRIMITIVES).write_text(TESTS)
    assert run.go([gpu.Stage("primitives", gpu.primitives, 50)])
    assert saved(run)["measured"] == {"launch": 1.5}
    assert entry_of(run)["status"] == "not run"  # they are no tests of operators


SANITIZER = """#!/bin/sh
echo "========= COMPUTE-SANITIZER"
while [ "$1" != "{python}" ]; do shift; done
"$@"
{report}
echo "========= ERROR SUMMARY: 1 error"
"""


REPORT = 'echo "========= Invalid __global__ read of size 4 bytes"'


@pytest.mark.parametrize(("report", "alone"), [("", False), (REPORT, False), (REPORT, True)])
def test_an_error_of_the_sanitizer_fails_the_kernels_of_its_test(
    project: Callable[[str], gpu.Run], monkeypatch: pytest.MonkeyPatch, report: str, alone: bool
) -> None:
    run = project(TESTS)
    program = run.root / "compute-sanitizer"
    program.write_text(SANITIZER.format(python=run.python, report=report))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(run.root), prepend=os.pathsep)
    stages = [TEST_STAGE, gpu.Stage("memcheck", gpu.sanitize("memcheck"), 50)]
    assert run.go(stages[alone:]) == (not report)
    status = "failed" if report else "passed"
    assert outcomes(run)["memcheck"] == status
    assert entry_of(run)["status"] == entry_of(run, step="backward")["status"] == status
    test = "tests/test_scan.py::test_both"
    errors = {test: ["Invalid __global__ read of size 4 bytes"]} if report else {}
    assert saved(run)["sanitizers"] == {"memcheck": {"tests": 1, "errors": errors}}


def test_reports_of_the_sanitizer_are_told_from_its_own_words() -> None:
    """Each report by its first line, in the test whose name was printed before."""
    log = f"""
========= COMPUTE-SANITIZER
{lines.MARKER}tests/a.py::test_a[x y]
========= Error: Race reported between Write access at scan+0x10 in scan.cu:5
=========     and Read access at scan+0x20 in scan.cu:6 [4 hazards]
=========
{lines.MARKER}tests/a.py::test_b
passed
========= Warning: Race reported between two writes of the same value
========= Target application returned an error
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
========= Error: process didn't terminate successfully
"""
    report = "Error: Race reported between Write access at scan+0x10 in scan.cu:5"
    assert gpu.find_errors(log) == {"tests/a.py::test_a[x y]": [report]}


def test_no_sanitizer_is_no_failure(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda *arguments, **options: None)
    run.go([gpu.Stage("memcheck", gpu.sanitize("memcheck"), 50)])
    assert saved(run)["stages"][0]["status"] == "not run"
    assert saved(run)["stages"][0]["text"] == "compute-sanitizer is not on this machine"


# --- speeds ----------------------------------------------------------------------------------------------------------


def make_result(mode: str = "forward", backend: str = "cuda", error: str | None = None) -> dict[str, Any]:
    return {
        "case": "scan B4",
        "op": "scan",
        "backend": backend,
        "mode": mode,
        "error": error,
        "seconds": {"seqops": {"median": 1e-3}},
        "copy_fraction": {"seqops": 0.875},
        "ratios": {"peer": {"median": 2.5}},
    }


def watch_lines(**tests: str) -> list[dict[str, Any]]:
    """Lines of tests that called the forward (`f...`) or the backward (`b...`) on CUDA, by name and outcome."""
    found = []
    for test, outcome in tests.items():
        name = "scan" if test[0] == "f" else "scan_backward"
        found += [{"kernel": [name, "cuda"], "test": test}, {"end": test, "outcome": outcome, "message": ""}]
    return found


@pytest.fixture
def benched(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the stages that follow from these outcomes, and a benchmark that gives these results."""

    def go(results: list[dict[str, Any]], run: gpu.Run = run, complete: bool = True, **tests: str) -> list[str]:
        run.kernels = [make_kernel(step=step) for step in hardware.PASSES]
        for kernel in run.kernels:
            if not (run.root / kernel.sources[0]).exists():
                (run.root / kernel.sources[0]).write_text("kernel")
        commands: list[str] = []

        def execute(command: list[str], log: str, seconds: float) -> gpu.Done:
            commands.append(" ".join(command))
            (run.work / "bench.json").write_text(
                json.dumps({"results": results, "rates": {"gemm": 7e14, "copy": 4e12}})
            )
            return gpu.Done(0, "")

        def watched(run: gpu.Run, seconds: float) -> str:
            run.lines, run.complete = watch_lines(**tests), complete
            return ""

        monkeypatch.setattr(run, "execute", execute)
        run.go([gpu.Stage("tests", watched, 9), gpu.Stage("bench", gpu.bench, 9)])
        return commands

    return go


def test_speeds_go_to_the_kernel_that_they_are_of(benched: Callable[..., list[str]], run: gpu.Run) -> None:
    results = [make_result(mode) for mode in ("forward", "backward", "forward+backward")]
    (command,) = benched(results, f1="passed", b1="passed", b2="skipped")
    assert "--op scan --kernel scan:cuda:backward --kernel scan:cuda:forward" in command
    assert "--device cuda" in command
    speed = {"case": "scan B4", "seconds": 1e-3, "copy": 0.875, "ratios": {"peer": 2.5}}
    assert entry_of(run)["speeds"] == entry_of(run)["last_passed"]["speeds"] == [speed]
    assert entry_of(run, step="backward")["speeds"] == [speed]


def test_failed_tests_leave_no_speed(benched: Callable[..., list[str]], run: gpu.Run) -> None:
    results = [make_result(mode) for mode in ("forward", "backward", "forward+backward")]
    (command,) = benched(results, f1="passed", b1="failed", b2="passed")
    assert command.endswith("--kernel scan:cuda:forward")  # the other one is not even timed
    assert entry_of(run)["speeds"] and not entry_of(run, step="backward")["speeds"]
    assert entry_of(run, step="backward")["last_passed"] is None
    # The benchmark's own record holds neither.
    assert [result["mode"] for result in saved(run)["bench"]["results"]] == ["forward"]


def test_steps_are_the_speed_of_recurrent_kernels(benched: Callable[..., list[str]], run: gpu.Run) -> None:
    """Forward by itself, backward as both passes; a share of the copy rate would say nothing."""
    results = [{**make_result(mode), "steps": 1000} for mode in ("forward", "forward+backward", "inference")]
    benched(results, f1="passed", b1="passed")
    (forward,), (both,) = entry_of(run)["speeds"], entry_of(run, step="backward")["speeds"]
    assert (forward["step"], forward["both"], both["step"], both["both"]) == (1e-6, False, 1e-6, True)
    assert hardware.describe_speed([forward]) == ("1.00 µs a step", "2.50x peer")
    assert hardware.describe_speed([both, {**both, "step": 2e-6}])[0] == "1.00 to 2.00 µs a step, both passes"
    assert hardware.describe_speed([forward, {"copy": 0.9, "ratios": {}}])[0] == "90%, 1.00 µs a step"


def test_operators_may_be_named(benched: Callable[..., list[str]], run: gpu.Run, tmp_path: Path) -> None:
    run.operators = ["scan", "other"]
    (command,) = benched([make_result()], f1="passed")
    assert command.endswith("--op scan --kernel scan:cuda:forward")
    later = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT, operators=["other"])
    later.begin(GPU, {})
    assert benched([make_result()], later, f1="passed") == []
    assert saved(later)["stages"][1]["text"] == "no kernel of other has passed its tests"


def test_named_stages_may_take_all_of_the_time() -> None:
    everything = gpu.choose(None)
    assert [stage.name for stage in everything if stage.name in ("exchange", "tests", "bench", "cold")] == [
        *("exchange", "tests", "bench", "cold")
    ]
    info, bench = gpu.choose(["bench"])
    assert (info.name, info.limit) == ("info", 60) and (bench.name, bench.limit) == ("bench", float("inf"))


def test_nothing_is_measured_where_nothing_passed(benched: Callable[..., list[str]], run: gpu.Run) -> None:
    assert benched([make_result()], f1="failed", b1="skipped") == []
    assert outcomes(run)["bench"] == "not run"
    assert "bench" not in saved(run)


def test_what_passed_before_may_be_measured_later(
    benched: Callable[..., list[str]], run: gpu.Run, tmp_path: Path
) -> None:
    """With the sources that passed, and only with them."""
    benched([], f1="passed", b1="failed")
    later = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    later.begin(GPU, {})
    benched([make_result(mode) for mode in ("forward", "backward")], later)
    assert entry_of(later)["speeds"] == entry_of(later)["last_passed"]["speeds"] != []
    assert not entry_of(later)["current"] and not entry_of(later, step="backward")["speeds"]
    (tmp_path / "scan.cu").write_text("changed")
    last = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    last.begin(GPU, {})
    assert benched([make_result()], last) == [] and outcomes(last)["bench"] == "not run"


def test_tests_that_were_cut_off_are_built_on(benched: Callable[..., list[str]], run: gpu.Run, tmp_path: Path) -> None:
    """What passed until then is measured in that run and in later ones, with the same sources; not what failed."""
    both = [make_result(mode) for mode in ("forward", "backward")]
    benched(both, complete=False, f1="passed", b1="failed")
    assert (entry_of(run)["status"], entry_of(run)["last_passed"]) == ("cut off", None)
    assert len(entry_of(run)["speeds"]) == 1 and not entry_of(run, step="backward")["speeds"]
    later = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    later.begin(GPU, {})
    (command,) = benched([{**make_result(), "copy_fraction": {"seqops": 0.5}}], later)
    assert command.endswith("--op scan --kernel scan:cuda:forward")
    assert entry_of(later)["speeds"][0]["copy"] == 0.5 and entry_of(later)["last_passed"] is None
    row, _ = rows(hardware.render(later.kernels, [], [saved(later)], tmp_path))
    when = entry_of(run)["date"][:10]
    note = f"**cut off** on {when} at 0123456789: 1 tests passed, others did not run"
    assert row[4:] == ["never", "", "50%", "2.50x peer", note]
    (tmp_path / "scan.cu").write_text("changed")
    last = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    last.begin(GPU, {})
    assert benched([make_result()], last) == [] and outcomes(last)["bench"] == "not run"


def test_wrong_values_in_the_benchmark_fail_it(benched: Callable[..., list[str]], run: gpu.Run) -> None:
    benched([make_result(error="wrong")], f1="passed")
    assert outcomes(run)["bench"] == "failed"
    assert entry_of(run)["speeds"] == []


def test_the_modes_are_those_of_the_benchmark() -> None:
    assert set(hardware.MODES) == set(harness.MODES)
    assert set(hardware.SHOWN_MODES) <= set(harness.MODES)
    assert set(hardware.BACKENDS) == set(harness.BACKENDS[harness.CUDA])


# --- exchange between blocks, and first calls ------------------------------------------------------------------------


def make_exchange(error: str | None = None) -> dict[str, Any]:
    way = {"way": "L2, packets", "kind": "grid", "blocks": 8, "threads": 256, "bytes": 768}
    failed = {**way, "blocks": 16, "microseconds": None, "error": error}
    rounds = [{**way, "microseconds": 1.234, "error": None}, *([failed] if error else [])]
    return {"facts": {"l2_hop_us": 0.612, "bandwidth": 4e6}, "rounds": rounds}


def make_cold(compiled: int = 0) -> dict[str, Any]:
    def step(seconds: float, compiled: int = 0) -> dict[str, Any]:
        return {"forward": seconds, "backward": 0.01, "compiled": compiled}

    empty = {"first": step(6.0, 2), "again": step(0.001), "rows": step(0.001, compiled), "steps": step(0.001)}
    warm = {"first": step(0.02), "again": step(0.001), "rows": step(0.001), "steps": step(0.001)}
    row = {"op": "lstm", "H": 12, "D": 64, "dtype": "bfloat16", "B": 16, "T": 1024, "empty": empty, "warm": warm}
    return {"once": {"empty": 2.5, "warm": 0.9}, "rows": [row]}


@pytest.fixture
def answered(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs one stage, whose process writes this document and prints this text."""

    def go(stage: gpu.Stage, document: dict[str, Any] | None, text: str = "", code: int | None = 0) -> list[str]:
        commands: list[str] = []

        def execute(command: list[str], log: str, seconds: float) -> gpu.Done:
            commands.append(" ".join(command[1:]))
            if document is not None:
                Path(command[command.index("--json") + 1]).write_text(json.dumps(document))
            return gpu.Done(code, text)

        monkeypatch.setattr(run, "execute", execute)
        run.go([stage])
        return commands

    return go


def test_exchange_is_kept(answered: Callable[..., list[str]], run: gpu.Run) -> None:
    stage = gpu.Stage("exchange", gpu.exchange, 60)
    (command,) = answered(stage, make_exchange())
    assert command.startswith("-m bench.exchange --json ")
    assert saved(run)["exchange"] == make_exchange() and saved(run)["stages"][0]["text"] == "2 facts, 1 ways"
    answered(stage, make_exchange("RuntimeError: not granted"), code=1)
    assert saved(run)["stages"][1]["status"] == "failed" and saved(run)["exchange"]["rounds"][1]["error"]
    lines = saved(run)["stages"][1]["text"].splitlines()
    assert lines == ["2 facts, 1 ways, 1 failed", "L2, packets, 16 blocks: RuntimeError: not granted"]
    answered(stage, None, "no driver", code=1)
    answered(stage, None, code=None)
    assert [each["status"] for each in saved(run)["stages"][2:]] == ["failed", "cut off"]


def test_first_calls_are_those_of_sound_kernels(answered: Callable[..., list[str]], run: gpu.Run) -> None:
    stage = gpu.Stage("cold", gpu.cold, 60)
    assert answered(stage, make_cold()) == [] and saved(run)["stages"][0]["status"] == "not run"
    run.kernels = [make_kernel("lstm", step=step) for step in hardware.PASSES] + [make_kernel("gru"), make_kernel()]
    run.record["kernels"] = [
        {"operator": op, "backend": "cuda", "pass": step, "status": "passed", "current": True}
        for op in ("lstm", "gru", "scan")
        for step in hardware.PASSES
    ]
    for kernel in run.kernels:
        (run.root / kernel.sources[0]).write_text("kernel")
    kernels, run.kernels = run.kernels, []  # entries as short as these are not written anew
    partial = make_cold()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(hardware, "find_sound", lambda *given: {kernel.key for kernel in kernels})
        (command,) = answered(stage, make_cold())
        # Of the GRU only the forward is sound, and scans have no cells there.
        assert command.endswith("--op lstm") and saved(run)["cold"] == make_cold()
        del partial["rows"][0]["warm"]
        answered(stage, partial, code=None)
        answered(stage, partial, "RuntimeError: values that are not finite", code=1)
        answered(stage, None, code=None)
    assert saved(run)["cold"] == partial
    missed = "missed: lstm bfloat16 B16 T1024 H12 D64, empty cache: 6.01 s for 5 s"
    complete, cut, failed, nothing = saved(run)["stages"][1:]
    whole = "cells: 1 with an empty cache, 1 with a warm cache; 1 goals missed"
    assert (complete["status"], complete["text"]) == ("passed", f"{whole}\n{missed}")
    some = whole.replace("1 with a warm", "0 with a warm")
    assert (cut["status"], cut["text"]) == ("cut off", f"after {some}\n{missed}")
    assert failed["status"] == "failed" and failed["text"].startswith(some) and "not finite" in failed["text"]
    assert (nothing["status"], nothing["text"]) == ("cut off", "before the first cell")


def test_missed_goals_of_first_calls() -> None:
    assert cold.find_misses(make_cold()) == ["lstm bfloat16 B16 T1024 H12 D64, empty cache: 6.01 s for 5 s"]
    assert "another batch compiles 3" in cold.find_misses(make_cold(3))[1]
    wrong = make_cold()
    wrong["rows"][0]["warm"]["first"]["compiled"] = 1
    assert "the first step with a warm cache compiles 1" in cold.find_misses(wrong)[1]


@pytest.mark.slow
def test_first_calls_in_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled once, found in the cache by the next process; another batch or length compiles nothing."""
    if reason := launch._reason_without_compiler():
        pytest.skip(reason)
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    monkeypatch.setattr(cold, "WARM_UP", ("elman", 1, 4, "bfloat16"))
    document = cold.measure([("gru", 2, 4, "bfloat16"), ("gru", 1, 8, "bfloat16")], batch=16, steps=8, device="cpu")
    for row in document["rows"]:
        assert row["empty"]["first"]["compiled"] == 2 and row["warm"]["first"]["compiled"] == 0
        for later in ("again", "rows", "steps"):
            assert row["empty"][later]["compiled"] == row["warm"][later]["compiled"] == 0
    assert document["once"]["empty"] > document["once"]["warm"] > 0
    assert "gru bfloat16 B16 T8 H2 D4: empty cache: forward " in cold.describe(document)


def test_a_process_that_fails_or_hangs_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEQOPS_SIMULATE", raising=False)
    with pytest.raises(RuntimeError, match=r"^RuntimeError: seqops::elman: backend 'cuda' cannot serve this call"):
        list(cold.in_process([("gru", 1, 4, "float32")], 2, 2, "cpu", tmp_path, 60))
    with pytest.raises(TimeoutError, match="no end within 0 s"):
        list(cold.in_process([("gru", 1, 4, "float32")], 2, 2, "cpu", tmp_path, 0.01))


# In place of bench.cold in a process: one cell is done, then a compiler of its own hangs, which holds all pipes.
HANGING = """
import subprocess

MARKER = {marker!r}

def go_through(cells, batch, steps, device):
    yield 1.5
    yield {cell!r}
    process = subprocess.Popen(["sleep", "60"])
    open("compiler", "w").write(str(process.pid))
    process.wait()
"""


@pytest.fixture
def hanging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the compiler's process number will be."""
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__init__.py").write_text("")
    cell = make_cold()["rows"][0]["empty"]
    (tmp_path / "bench" / "cold.py").write_text(HANGING.format(marker=cold.MARKER, cell=cell))
    monkeypatch.setattr(cold, "ROOT", tmp_path)
    return tmp_path / "compiler"


def has_ended(process: int) -> bool:
    """Whoever adopted it may take a moment to notice."""
    for _ in range(100):
        try:
            if Path(f"/proc/{process}/stat").read_text().split()[2] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_first_calls_that_are_cut_off_keep_what_was_measured(
    hanging: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line and the file after each cell; what the process started ends with it."""
    file, cell = tmp_path / "cold.json", make_cold()["rows"][0]["empty"]
    started = time.monotonic()
    assert cold.main(["--json", str(file), "--op", "lstm", "--seconds", "3"]) == 1
    assert time.monotonic() - started < 30 and has_ended(int(hanging.read_text()))
    document = json.loads(file.read_text())
    assert document["once"] == {"empty": 1.5}
    assert document["rows"][0]["empty"] == cell and "warm" not in document["rows"][0]
    assert not any("empty" in row for row in document["rows"][1:]) and len(document["rows"]) > 1
    line = "lstm bfloat16 B16 T1024 H12 D64, empty cache: forward 6.000 s, backward 0.010 s, 2 compiled"
    printed = capsys.readouterr().out
    assert line in printed.splitlines() and "warm cache: cut off" in printed
    assert printed.endswith("then: no end within 3 s\n")
    page = hardware.render([], [], [make_file() | {"cold": document}])
    assert "| lstm bfloat16 B16 T1024 H12 D64 | **6.01** | cut off | 2, 0, 0, 0 |" in page
    assert "| lstm bfloat16 B16 T1024 H6 D128 | cut off | cut off |  |" in page


def test_what_measures_first_calls_ends_with_the_one_that_started_it(hanging: Path, tmp_path: Path) -> None:
    """Even where that one is killed and can do nothing about it."""
    code = (
        "import pathlib, sys; from bench import cold; cold.ROOT = pathlib.Path(sys.argv[1])\n"
        "list(cold.in_process([], 1, 1, 'cpu', cold.ROOT, 60))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    try:
        for _ in range(200):
            if hanging.exists() and hanging.read_text():
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert has_ended(int(hanging.read_text()))


# --- tuning ----------------------------------------------------------------------------------------------------------


def make_tuned(failed: str | None = None, reason: str | None = None) -> dict[str, Any]:
    candidate = {"constants": {"tile": 8}, "failed": failed, "reason": reason}
    return {"results": [{"kernel": "scan.forward.cuda", "candidates": [candidate]}]}


@pytest.fixture
def tuned(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Runs the stage with commands that print these documents, the last one again and again, and write a store."""

    def go(*documents: dict[str, Any] | None, code: int | None = 0, seconds: float = 99) -> list[list[str]]:
        commands: list[list[str]] = []

        def execute(command: list[str], log: str, seconds: float) -> gpu.Done:
            commands.append(command)
            folder = Path(command[command.index("--output") + 1])
            folder.mkdir(exist_ok=True)
            entries = {f"key {number}": {"us": 1.0} for number in range(len(commands))}
            (folder / "nvidia-stub-9.json").write_text(json.dumps({"format": 1, "entries": entries}))
            document = documents[min(len(commands), len(documents)) - 1]
            text = "" if document is None else json.dumps(document, indent=1)
            return gpu.Done(code, f"scan forward 1/1: tile=8: 3 us\n{text}\n")

        monkeypatch.setattr(run, "execute", execute)
        run.go([gpu.Stage("tune", gpu.tune, seconds)])
        return commands

    return go


def test_tuning_is_kept_so_that_it_can_be_shipped(tuned: Callable[..., list[list[str]]], run: gpu.Run) -> None:
    commands = tuned({"probe": {"grid_barrier_us": 1.3}}, make_tuned())
    assert [command[4] for command in commands[:4]] == ["--probe", "lstm", "lstm", "linear_scan"]
    assert all(command[:4] == [run.python, "-m", "seqops", "tune"] for command in commands)
    assert "--top" not in commands[0] and commands[1][commands[1].index("--top") + 1] == "4"
    record = saved(run)["tune"]
    assert list(record["commands"]) == sorted(tuned_file.COMMANDS)
    assert record["commands"]["--probe"] == {"probe": {"grid_barrier_us": 1.3}}
    assert len(record["store"]["entries"]) == len(tuned_file.COMMANDS)
    assert saved(run)["stages"][0]["text"] == f"{len(tuned_file.COMMANDS)} of {len(tuned_file.COMMANDS)} done"
    assert outcomes(run) == {"tune": "passed"}


def test_wrong_candidates_fail_the_stage_and_keep_the_rest(tuned: Callable[..., list[list[str]]], run: gpu.Run) -> None:
    tuned({}, make_tuned("check", "wrong: 1 of 9 values"), make_tuned("compile", "it spills"))
    assert outcomes(run) == {"tune": "failed"}
    text = saved(run)["stages"][0]["text"].splitlines()
    expected = f"{tuned_file.SHAPES[0]}: scan.forward.cuda with {{'tile': 8}}: wrong: 1 of 9 values"
    assert text == [f"{len(tuned_file.COMMANDS)} of {len(tuned_file.COMMANDS)} done, 1 failures", expected]
    assert saved(run)["tune"]["store"]["entries"]


def test_a_tuner_that_dies_is_told(tuned: Callable[..., list[list[str]]], run: gpu.Run) -> None:
    tuned({}, None, code=1)
    text = saved(run)["stages"][0]["text"]
    assert outcomes(run) == {"tune": "failed"} and "ended with code 1: scan forward 1/1" in text


def test_tuning_that_is_cut_off_keeps_what_it_has(tuned: Callable[..., list[list[str]]], run: gpu.Run) -> None:
    commands = tuned(None, code=None)
    assert len(commands) == 1 and outcomes(run) == {"tune": "cut off"}
    assert saved(run)["stages"][0]["text"] == f"after 0 of {len(tuned_file.COMMANDS)} done"


def test_what_is_tuned_is_what_is_measured() -> None:
    """Every shape is one of the benchmark's on a GPU, and every word is one that `seqops tune` takes."""
    from bench import rnn, scan
    from seqops.tune import cli
    from seqops.tune.target import targets

    letters = {"batch": "B", "time": "T", "channels": "C", "heads": "H", "dim": "D"}
    measured = [
        {"H": 1, **case.shape, "op": case.op, "dtype": str(case.dtype).removeprefix("torch.")}
        for case in (*scan.GPU_CASES, *rnn.GPU_CASES)
    ]
    for case in list(measured):  # channels in heads are channels all the same
        if case["op"] == "linear_scan" and "D" in case:
            measured.append({**case, "C": case["H"] * case["D"]})
    for words in tuned_file.SHAPES:
        op, *rest = words.split()
        flags = dict(zip(rest[::2], rest[1::2], strict=True))
        known = {f"--{flag.name}" for target in targets() if target.op == op for flag in target.flags}
        assert set(flags) <= known | {"--dtype"}, words
        shape = {letters[name[2:]]: int(value) for name, value in flags.items() if name[2:] in letters}
        wanted = {**shape, "op": op, "dtype": flags["--dtype"]}
        assert any(wanted.items() <= case.items() for case in measured), words
        with cli.tune.make_context("tune", [*words.split(), "--device", "h100"]) as context:
            assert context.params["operator"] == op


def test_what_was_found_is_shipped_unless_kernels_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from seqops.tune.store import Entry, Store
    from seqops.tune.target import targets

    first, second = targets()[:2]
    found = Store(tmp_path / "found", tmp_path / "found")
    for target, source in ((first, first.tunable.digest), (second, "0" * 16)):
        found.put("NVIDIA Stub 9", 90, f"{target.tunable.name}|T<=8", Entry({"tile": 8}, "measured", source, us=1.5))
    found.put_probe("NVIDIA Stub 9", 90, {"grid_barrier_us": 1.31})
    file, folder = tmp_path / "run.json", tmp_path / "configs"
    file.write_text(json.dumps({"tune": {"store": json.loads(found.path("NVIDIA Stub 9").read_text())}}))
    assert tuned_file.main([str(file), "--folder", str(folder)]) == 0
    assert "left out, since its kernel changed" in capsys.readouterr().out
    shipped = Store(tmp_path / "nothing", folder)
    assert shipped.probe("NVIDIA Stub 9") == {"grid_barrier_us": 1.31}
    (listed,) = shipped.entries()
    assert listed.key == f"{first.tunable.name}|T<=8" and listed.origin == "shipped" and listed.entry.us == 1.5
    kept = {"kept": {"tune": {"value": json.loads(file.read_text())["tune"]}}}
    file.write_text(json.dumps(kept))
    assert tuned_file.main([str(file), "--folder", str(tmp_path / "again")]) == 0
    assert [path.name for path in (tmp_path / "again").iterdir()] == [path.name for path in folder.iterdir()]
    file.write_text("{}")
    assert tuned_file.main([str(file)]) == 1 and "nothing was tuned" in capsys.readouterr().err


# --- from run to run -------------------------------------------------------------------------------------------------


def make_record(day: int, **changes: Any) -> dict[str, Any]:
    return {"date": f"2030-01-0{day}T00:00:00+00:00", "commit": {**COMMIT, "id": f"{day}" * 40}, **changes}


def update(root: Path, previous: list, day: int, speed: bool = True, complete: bool = True, **tests: str) -> dict:
    record = make_record(day, bench={"results": [make_result()] if speed else []})
    (entry,) = hardware.update(previous, [make_kernel()], record, watch_lines(**tests), complete, root)
    return entry


def test_the_last_time_that_a_kernel_passed_stays(tmp_path: Path) -> None:
    (tmp_path / "scan.cu").write_text("one")
    first = update(tmp_path, [], 1, f1="passed")
    assert first["status"] == "passed" and first["last_passed"]["date"] == first["date"]
    failed = update(tmp_path, [first], 2, f1="passed", f2="failed")
    assert (failed["status"], failed["speeds"], failed["date"][:10]) == ("failed", [], "2030-01-02")
    cut = update(tmp_path, [failed], 3, complete=False, f1="passed")
    assert cut["status"] == "cut off"
    left_out = update(tmp_path, [cut], 4)
    assert left_out == {**cut, "current": False}
    for entry in (failed, cut, left_out):
        assert entry["last_passed"] == first["last_passed"]


def test_speeds_stay_while_sources_do(tmp_path: Path) -> None:
    (tmp_path / "scan.cu").write_text("one")
    first = update(tmp_path, [], 1, f1="passed")
    again = update(tmp_path, [first], 2, speed=False, f1="passed")
    assert again["last_passed"]["speeds"] == first["speeds"] != []
    (tmp_path / "scan.cu").write_text("two")
    assert update(tmp_path, [again], 3, speed=False, f1="passed")["last_passed"]["speeds"] == []


def test_an_earlier_file_is_carried_on(tmp_path: Path, run: gpu.Run) -> None:
    run.kernels = [make_kernel()]
    (tmp_path / "scan.cu").write_text("one")
    run.lines, run.complete = watch_lines(f1="passed"), True
    run.save()
    later = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    later.begin(GPU, {})
    later.go([gpu.Stage("build", fail, 9)])
    assert saved(later)["kernels"] == [{**run.record["kernels"][0], "current": False}]


def test_a_run_may_be_spread_over_several_commands(tmp_path: Path, run: gpu.Run) -> None:
    """What a stage found stays until it is run again, under the date and commit that it is from."""
    run.record |= {"exchange": make_exchange(), "cold": make_cold(), "date": "2030-01-01T00:00:00+00:00"}
    run.record["bench"] = {"rates": {"gemm": 7.9e14, "copy": 4.3e12}, "results": [make_result()]}
    run.save()
    other, pages = {**COMMIT, "id": "f" * 40}, []
    for day, found in ((2, {}), (3, {"cold": make_cold(3)})):
        later = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=other)
        later.begin(GPU, {})
        later.record |= {"date": f"2030-01-0{day}T00:00:00+00:00", **found}
        later.go([gpu.Stage("tests", succeed, 9)])
        later.record["kernels"] = []
        pages.append(hardware.render([], [], [{**saved(later), "gpu": GPU | {"name": "G"}}], tmp_path))
    first, commit = "2030-01-01, commit 0123456789", "commit ffffffffff"
    assert list(saved(later)["kept"]) == ["bench", "exchange"]
    for page in pages:
        assert f"G, {first}:" in page and f"Measured in an earlier run ({first}): bfloat16" in page
        assert "| scan B4 | forward | cuda | 1.000 ms |" in page
    assert f"G, {first}; once in a process" in pages[0] and f"2030-01-02, {commit}; compute" in pages[0]
    assert f"G, 2030-01-03, {commit}; once in a process" in pages[1]


def test_kept_results_are_no_speeds_of_another_run(tmp_path: Path, benched: Callable[..., list[str]]) -> None:
    run = gpu.Run(tmp_path / "results", tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    run.begin(GPU, {})
    benched([make_result()], run, f1="passed")
    (tmp_path / "scan.cu").write_text("changed")
    later = gpu.Run(run.output, tmp_path / "work", budget=60, root=tmp_path, commit=COMMIT)
    later.begin(GPU, {})
    later.kernels, later.lines, later.complete = [make_kernel()], watch_lines(f1="passed"), True
    later.save()
    assert saved(later)["kept"]["bench"]["value"]["results"] == [make_result()]
    assert entry_of(later)["status"] == "passed" and entry_of(later)["speeds"] == []
    assert entry_of(later)["last_passed"]["speeds"] == []


def test_a_damaged_file_does_not_stop_a_run(run: gpu.Run, capsys: pytest.CaptureFixture) -> None:
    run.output.mkdir()
    (run.output / "nvidia-stub-9.json").write_text("{")
    later = gpu.Run(run.output, run.work, budget=60, root=run.root, commit=COMMIT)
    later.begin(GPU, {})
    assert later.previous == {} and "expected JSON" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"format": 1}', '{"format": 2, "kernels": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json: expected"):
        hardware.load(tmp_path / "a.json")


# --- the page --------------------------------------------------------------------------------------------------------


def make_file(*entries: dict[str, Any], name: str = "NVIDIA Stub 9") -> dict[str, Any]:
    return make_record(
        5,
        gpu={**GPU, "name": name},
        missing={"fla": "a peer"},
        stages=[{"name": "tests", "status": "passed", "seconds": 61.2, "text": "9 passed\nmore"}],
        kernels=list(entries),
        info={"versions": {"torch": "2.11.0", "cupy": None}},
        bench={"rates": {"gemm": 7.9e14, "copy": 4.3e12}},
        measured={"launch, µs": 4.2},
        tests={"uncollected": {"tests/test_a.py": "No module named 'a'"}},
    )


def rows(page: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| `")]


def test_page_without_any_run() -> None:
    kernels = [make_kernel(), make_kernel(backend="triton", step="backward")]
    page = hardware.render(kernels, ["lstm"], [])
    assert "**No kernel has run on a GPU yet.**" in page
    assert rows(page) == [
        ["`scan`", "forward", "cuda", "none", "never", "", "", "", "simulator only"],
        ["`scan`", "backward", "triton", "none", "never", "", "", "", "interpreter only"],
    ]
    assert "Operators without a GPU kernel of their own: `lstm`." in page


def test_page_with_runs(tmp_path: Path) -> None:
    (tmp_path / "scan.cu").write_text("one")
    passed = update(tmp_path, [], 1, f1="passed")
    failed = update(tmp_path, [passed], 2, f1="failed")
    never = update(tmp_path, [], 3, f1="failed")
    files = [make_file(passed), make_file(failed, name="B"), make_file(never, name="C")]
    start = ["`scan`", "forward", "cuda"]
    kernels = [make_kernel(), make_kernel("other")]
    page = hardware.render(kernels, [], files, tmp_path)
    assert "**1 of 2 kernels have passed their tests on a GPU.**" in page
    assert rows(page) == [
        [*start, "NVIDIA Stub 9", "2030-01-01", "1111111111", "88%", "2.50x peer", ""],
        [*start, "B", "2030-01-01", "1111111111", "88%", "2.50x peer", "**failed** on 2030-01-02 at 2222222222"],
        [*start, "C", "never", "", "", "", "**failed** on 2030-01-03 at 3333333333"],
        ["`other`", "forward", "cuda", "none", "never", "", "", "", "simulator only"],
    ]
    assert "| tests | passed | 61 | 9 passed |" in page and "torch 2.11.0" in page and "cupy" not in page
    assert "product 790 TFLOP/s, copy 4.30 TB/s" in page and "| launch, µs | 4.2 |" in page and "fla (a peer)" in page
    assert "could not be collected there: tests/test_a.py: No module named 'a'." in page
    (tmp_path / "scan.cu").write_text("two")
    assert rows(hardware.render([make_kernel()], [], files[:1], tmp_path))[0][-1] == "changed since: scan.cu"


def test_page_without_measurements_says_so() -> None:
    page = hardware.render([make_kernel()], [], [])
    assert page.count(hardware.NEVER) == 2
    assert page.index("## Exchange between blocks") < page.index("## First calls")


def test_page_with_exchange_first_calls_and_results() -> None:
    lacking = {"flashrnn": "the package flashrnn is not installed"}
    ratios = {"peer": {"median": 2.0}, "B16 of ours": {"median": 0.5}}
    result = {**make_result(), "steps": 1000, "step_floor": 0.8e-6, "time_goal": 0.8e-3, "absent": lacking}
    result |= {"goals": {"peer": 1.5, "B16 of ours": 0.77}, "ratios": ratios}
    file = make_file()
    file["bench"]["results"] = [result, make_result("backward"), make_result(error="wrong")]
    failed = make_exchange("RuntimeError: not granted")
    page = hardware.render([make_kernel()], [], [{**file, "exchange": failed, "cold": make_cold(3)}, make_file()])
    assert hardware.NEVER not in page
    assert (
        "| L2, packets | 8 of 256 | 768 | 1.23 |\n| L2, packets | 16 of 256 | 768 | RuntimeError: not granted |" in page
    )
    assert "| flag through L2, one way, µs | 0.612 |" in page and "bandwidth" not in page
    once = "once in a process: 2.5 s with an empty cache, 0.9 s with a warm cache:"
    assert f"NVIDIA Stub 9, 2030-01-05, commit 5555555555; {once}" in page
    assert "| lstm bfloat16 B16 T1024 H12 D64 | **6.01** | 0.03 | **2, 0, 3, 0** |" in page
    row = "| scan B4 | forward | cuda | 1.000 ms | **0.80 ms** | 1.00 µs (floor 0.80) | 2.00x peer (goal 1.5x), "
    assert row + "**0.50x B16 of ours (goal 0.77x)** | flashrnn: the package flashrnn is not installed |" in page
    assert "| scan B4 | backward | cuda | 1.000 ms |  |  | 2.50x peer |  |" in page and page.count("| scan B4 |") == 2


def test_facts_on_the_page_are_those_of_the_tuner() -> None:
    assert set(hardware.FACTS) <= set(device.measurable(device.find("h100")))


def test_ranges_of_speeds() -> None:
    speeds = [{"copy": 0.811, "ratios": {"a": 2.0, "b": 1.5}}, {"copy": 0.9, "ratios": {"a": 3.0}}]
    assert hardware.describe_speed(speeds) == ("81% to 90%", "2.00 to 3.00x a, 1.50x b")
    assert hardware.describe_speed([]) == ("", "")


def test_the_page_is_the_one_that_the_results_give() -> None:
    """After a change: python -m bench.hardware."""
    assert hardware.PAGE.read_text(encoding="utf-8") == hardware.make_page()


def test_every_kernel_has_sources() -> None:
    for kernel in hardware.find_kernels():
        assert kernel.sources, kernel
        assert any(source.endswith((".cu", "triton.py")) for source in kernel.sources), kernel
        assert set(hardware.digest_sources(kernel)) == set(kernel.sources)


def test_summary_names_kernels_and_stages(run: gpu.Run, benched: Callable[..., list[str]]) -> None:
    benched([make_result()], f1="passed", b1="failed")
    text = gpu.summarise(run.record)
    assert re.search(r"^scan forward +cuda +passed +1/1 +88% +2\.50x peer$", text, re.MULTILINE)
    assert re.search(r"^scan backward +cuda +failed +0/1$", text, re.MULTILINE)
    assert re.search(r"^bench +passed ", text, re.MULTILINE)
