"""The GPU run: one command that builds, tests and measures seqops on a machine with a GPU, in under ten minutes.

    make gpu                                   everything; the file in bench/results named after the GPU, then a summary
    make gpu ARGS="--only tests --only bench"  some stages, which may take all of the time
    make gpu ARGS="--only bench --op lstm"     some operators
    python3 -m bench.gpu --help

It needs python3 with torch and a C++ compiler, no network and no environment of its own: packages that are missing are
listed, and what needs them is left out. Wheels of pure Python packages in a folder `wheels/` are used from there.

Each stage is a process with a time limit, and all have one budget. The file is written anew after every stage, so a run
that is cut off keeps what it has; `bench/hardware.py` says what it holds and makes `docs/hardware.md` from it.

Tests run in several processes that share the GPU, and write down each step (`bench/watch.py`). A process that dies,
hangs or breaks its CUDA context fails one test; another goes on after it.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import hardware, tuned
from bench import lines as wire
from bench.cold import CACHES, CELLS, find_misses

ROOT = Path(__file__).resolve().parents[1]
TOOLKIT = "/usr/local/cuda/bin"
PRIMITIVES = "tests/test_gpu_primitives.py"
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# Import name -> what is left out without it.
PACKAGES = {
    "triton": "backend triton",
    "cupy": "backend cuda",
    "numpy": "the benchmark",
    "click": "the benchmark, tuning, tests of the command line",
    "rich": "the benchmark, tuning",
    "pytest": "all tests and the benchmark",
    "pytest_benchmark": "the benchmark",
    "hypothesis": "tests with drawn inputs",
    "setuptools": "the build",
    "ninja": "the build",
}
# Tests ask torch for determinism, and cuBLAS has to be told before it starts.
TEST_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
KEPT_TEXT = 6000
LONGEST_TEST = 60.0

PROBE = """
import importlib.util, json, sys, torch
found = None
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": round(properties.L2_cache_size / 2**20, 1),
    }
missing = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is None]
print(json.dumps({"gpu": found, "missing": missing, "torch": torch.__version__, "cuda": torch.version.cuda}))
"""

INFO = """
import json, seqops
from seqops.core import info
print(json.dumps(info.collect(seqops.__version__)))
"""


class StageError(Exception):
    """A stage did not do what it is for; the text says why."""


class LeftOut(Exception):
    """A stage could not start on this machine; the text says why."""


@dataclass(frozen=True)
class Stage:
    """One step of the run.

    Attributes:
        run: does the work within so many seconds and returns a line about it. It may raise StageError, LeftOut, or
            TimeoutError where it was cut off.
        limit: seconds at most.
        needs: stages without which this one is left out.
        reserve: seconds of the budget that the stages before it leave.
    """

    name: str
    run: Callable[["Run", float], str]
    limit: float
    needs: Sequence[str] = ()
    reserve: float = 0


@dataclass
class Done:
    """A process that has ended. `code` is None where its time was over."""

    code: int | None
    text: str

    @property
    def tail(self) -> str:
        return self.text[-KEPT_TEXT:]


def default_processes() -> int:
    """One for each processor; more than a dozen would wait for the GPU."""
    return min(12, os.cpu_count() or 1)


@dataclass
class Run:
    """What the stages share.

    Attributes:
        output: folder of the file that is written.
        work: folder of logs and other files of this run.
        budget: seconds for all stages.
        commit: `id` and whether sources were `dirty`; None: what git says of the root.
        processes: how many run tests at a time.
        operators: of the benchmark and of first calls; none: all.
        record: what the file will hold; `previous`, what it held before this run.
        kernels: those that exist, once the build has made it possible to ask.
        lines: what the watched tests wrote down.
        complete: whether that is all of them.
    """

    output: Path
    work: Path
    budget: float
    root: Path = ROOT
    python: str = sys.executable
    commit: dict[str, Any] | None = None
    processes: int = field(default_factory=default_processes)
    operators: Sequence[str] = ()
    record: dict[str, Any] = field(default_factory=dict)
    previous: dict[str, Any] = field(default_factory=dict)
    kernels: list[hardware.Kernel] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = False

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.budget
        self.work.mkdir(parents=True, exist_ok=True)
        path = [str(self.root)]
        if unpack_wheels(self.root / "wheels", self.work / "site"):
            path.insert(0, str(self.work / "site"))
        path += filter(None, [os.environ.get("PYTHONPATH")])
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}

    # --- processes ---------------------------------------------------------------------------------------------------

    def start(self, command: Sequence[str], log: str, environment: Mapping[str, str] | None = None) -> subprocess.Popen:
        """A process in a session of its own, so that what it starts ends with it; its output goes to a log."""
        with (self.work / log).open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=self.root,
                env={**self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def execute(
        self, command: Sequence[str], log: str, seconds: float, environment: Mapping[str, str] | None = None
    ) -> Done:
        """Runs one process to its end, or ends it when the time is over."""
        (self.work / log).unlink(missing_ok=True)
        process = self.start(command, log, environment)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            kill(process)
        return Done(code, (self.work / log).read_text(errors="replace"))

    def ask(self, code: str, *arguments: str, seconds: float) -> dict[str, Any]:
        """What a small Python program prints last, as JSON."""
        done = self.execute([self.python, "-c", code, *arguments], "ask.log", seconds)
        if done.code is None:
            raise TimeoutError
        try:
            return json.loads(done.text.splitlines()[-1])
        except (json.JSONDecodeError, IndexError):
            raise StageError(f"ended with code {done.code}: {done.tail}") from None

    def missing(self, *packages: str) -> list[str]:
        return [name for name in packages if name in self.record.get("missing", {})]

    def require(self, *packages: str) -> None:
        missing = self.missing(*packages)
        if missing:
            raise LeftOut(f"not installed: {', '.join(missing)}")

    # --- the run -----------------------------------------------------------------------------------------------------

    def probe(self) -> None:
        """Which GPU this is, and which packages are missing. Ends the program where torch finds no GPU."""
        try:
            found = self.ask(PROBE, *PACKAGES, seconds=120)
        except (StageError, TimeoutError) as error:
            sys.exit(f"{self.python} cannot import torch: {error or 'it took more than two minutes'}")
        if found["gpu"] is None:
            sys.exit(f"torch {found['torch']} of {self.python} finds no CUDA device here: nothing to run")
        self.begin(found["gpu"], {name: PACKAGES[name] for name in found["missing"]})

    def begin(self, gpu: dict[str, Any], missing: dict[str, str]) -> None:
        """Starts the record of one GPU; what an earlier file says of the last time that a kernel passed stays."""
        self.path = self.output / hardware.file_name(gpu["name"])
        for folder in (self.output, hardware.RESULTS):
            if not self.previous and (folder / self.path.name).exists():
                try:
                    self.previous = hardware.load(folder / self.path.name)
                except ValueError as error:  # no reason to lose this run too
                    print(f"{error}; what it says of earlier runs is left out", flush=True)
        self.record = {
            "format": hardware.FORMAT,
            "gpu": gpu,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": self.commit or read_commit(self.root),
            "system": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
            "missing": missing,
            "stages": [],
            "kernels": [{**entry, "current": False} for entry in self.previous.get("kernels", [])],
            "kept": hardware.keep_sections(self.previous) if self.previous else {},
        }

    def go(self, stages: Sequence[Stage]) -> bool:
        """Runs the stages in order, writing the file after each; true where all passed."""
        for index, stage in enumerate(stages):
            started = time.monotonic()
            reserve = sum(later.reserve for later in stages[index + 1 :])
            passed = {entry["name"] for entry in self.record["stages"] if entry["status"] == "passed"}
            lacking = [name for name in stage.needs if name not in passed and name in {s.name for s in stages}]
            seconds = min(stage.limit, self.end - started - reserve)
            print(f"{stage.name} ...", flush=True)
            try:
                if lacking:
                    raise LeftOut(f"needs {', '.join(lacking)}")
                if seconds < 1:
                    raise LeftOut("the time was over")
                status, text = "passed", stage.run(self, seconds)
            except LeftOut as error:
                status, text = "not run", str(error)
            except TimeoutError as error:
                status, text = "cut off", str(error) or f"after {seconds:.0f} s"
            except StageError as error:
                status, text = "failed", str(error)
            except Exception as error:  # a mistake of ours must not cost what the other stages find
                status, text = "failed", f"{type(error).__name__}: {error}"
            spent = round(time.monotonic() - started, 1)
            self.record["stages"].append({"name": stage.name, "status": status, "seconds": spent, "text": text})
            print(f"  {status} in {spent:.0f} s: {text.splitlines()[0] if text else ''}", flush=True)
            self.save()
        return all(entry["status"] == "passed" for entry in self.record["stages"])

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.kernels:
            self.record["kernels"] = hardware.update(
                self.previous.get("kernels", []), self.kernels, self.record, self.lines, self.complete, self.root
            )
        self.record["kept"] = {name: kept for name, kept in self.record["kept"].items() if name not in self.record}
        self.output.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n")
        os.replace(temporary, self.path)


# --- stages ----------------------------------------------------------------------------------------------------------


def build(run: Run, seconds: float) -> str:
    """Compiles the extension into the source folder: nothing is installed into the machine's Python.

    One that is there, works here and is no older than the sources is kept: it may have come with them.
    """
    run.require("setuptools", "ninja")
    extension = run.root / "seqops" / "_C.abi3.so"
    sources = [path for path in (run.root / "csrc").rglob("*") if path.suffix in (".cpp", ".h")]
    if extension.exists() and all(path.stat().st_mtime <= extension.stat().st_mtime for path in sources):
        with suppress(StageError, TimeoutError):
            run.ask("import json, seqops; print(json.dumps(None))", seconds=min(60, seconds))
            return "the extension that is there works"
    done = run.execute([run.python, "setup.py", "build_ext", "--inplace"], "build.log", seconds)
    if done.code is None:
        raise TimeoutError
    if done.code:
        raise StageError(f"setup.py ended with code {done.code}\n{done.tail}")
    return "extension compiled"


def info(run: Run, seconds: float) -> str:
    """Versions, and which backends work here and why not."""
    found = run.ask(INFO, seconds=seconds)
    run.record["info"] = found
    asked = run.ask("from bench import hardware; hardware.print_kernels()", seconds=seconds)
    run.kernels = [hardware.Kernel(*fields) for fields in asked["kernels"]]
    reasons = {
        (name, reason)
        for row in found["operators"].values()
        for name, reason in row.items()
        if name in hardware.BACKENDS and reason and not reason.startswith("no ")
    }
    return "; ".join(f"{name}: {reason}" for name, reason in sorted(reasons)) or "both GPU backends work"


def pytest_command(run: Run, marks: str, watched: Path, *arguments: str) -> list[str]:
    first = run.work / "first.json"
    before = hardware.find_section(run.previous, "tests")
    failed = before.value["failures"] if before else []
    first.write_text(json.dumps([failure["test"] for failure in failed]))
    return [
        *(run.python, "-m", "pytest", "-m", marks, "--override-ini=addopts=", "-p", "bench.watch"),
        *("-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--tb=short", "--continue-on-collection-errors"),
        *(f"--watch-file={watched}", f"--watch-first={first}", f"--watch-limit={LONGEST_TEST}", *arguments),
    ]


@dataclass
class Watched:
    """What tests wrote down, and what kept them from writing more."""

    lines: list[dict[str, Any]]
    cut_off: bool = False
    broken: str | None = None

    def judge(self) -> str:
        """One line about the tests; raises where some failed, or not all ran."""
        counted = hardware.count_tests(self.lines)
        text = ", ".join(f"{counted[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        if self.broken:
            raise StageError(f"{text}; {self.broken}")
        if counted["failed"]:
            first = counted["failures"][0]
            raise StageError(f"{text}{', then cut off' if self.cut_off else ''}\n{first['test']}: {first['message']}")
        if self.cut_off:
            raise TimeoutError(f"after {text}")
        if not counted["passed"]:
            raise LeftOut(f"no test ran: {text}")
        return text


def watch_tests(run: Run, name: str, seconds: float, *arguments: str, processes: int = 1) -> Watched:
    """Runs tests marked gpu in several processes, and goes on after one that died."""
    run.require("pytest")
    end = time.monotonic() + seconds
    files = [run.work / f"{name}-{index + 1}.jsonl" for index in range(processes)]
    logs = [file.with_suffix(".log") for file in files]
    for file in (*files, *logs):
        file.unlink(missing_ok=True)

    def start(index: int) -> subprocess.Popen:
        shard = f"--watch-shard={index + 1}/{processes}"
        return run.start(
            pytest_command(run, "gpu", files[index], shard, *arguments), logs[index].name, TEST_ENVIRONMENT
        )

    running = {index: start(index) for index in range(processes)}
    found = Watched([])
    try:
        while running and not found.cut_off:
            for index, process in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                kill(process)
                del running[index]
                if close(files[index], code) or code == wire.GOES_ON:
                    running[index] = start(index)
                # 0: all passed; 1: some failed; 5: none were left to run.
                elif code not in (0, 1, 5):
                    log = logs[index].read_text(errors="replace")
                    found.broken = f"pytest ended with code {code}\n{log[-KEPT_TEXT:]}"
            found.cut_off = bool(running) and time.monotonic() > end
            time.sleep(0.05)
    finally:
        for process in running.values():
            kill(process)
    found.lines = [line for file in files for line in wire.read(file)]
    return found


def close(file: Path, code: int) -> bool:
    """Writes down the test that a process was in when it ended, as failed; false where there is none."""
    lines = wire.read(file)
    ended = {line["end"] for line in lines if "end" in line}
    lost = [line["begin"] for line in lines if "begin" in line and line["begin"] not in ended]
    trace = file.with_suffix(wire.TRACE)
    where = trace.read_text(errors="replace")[:2000] if trace.exists() else ""
    if where:
        message = f"no end within {LONGEST_TEST:.0f} s\n{where}"
    else:
        message = f"the process died: {signal.Signals(-code).name if code < 0 else f'code {code}'}"
    with file.open("a") as target:
        for test in lost:
            line = {"end": test, "outcome": "failed", "seconds": 0.0, "message": message, "measured": {}}
            # A process that died may have left half a line.
            target.write("\n" + json.dumps(line) + "\n")
    return bool(lost)


def primitives(run: Run, seconds: float) -> str:
    """Launches, barriers, clusters: what every kernel stands on."""
    found = watch_tests(run, "primitives", seconds, PRIMITIVES)
    run.record["primitives"] = hardware.count_tests(found.lines)
    run.record["measured"] = {key: value for line in found.lines for key, value in line.get("measured", {}).items()}
    return found.judge()


def exchange(run: Run, seconds: float) -> str:
    """What it costs blocks to tell each other something, and the tuner's facts: a step takes no less."""
    run.require("cupy")
    file = run.work / "exchange.json"
    file.unlink(missing_ok=True)
    done = run.execute([run.python, "-m", "bench.exchange", "--json", str(file)], "exchange.log", seconds)
    if done.code is None:
        raise TimeoutError
    if not file.exists():
        raise StageError(f"ended with code {done.code}\n{done.tail}")
    found = run.record["exchange"] = json.loads(file.read_text())
    wrong = [each for each in found["rounds"] if each["error"]]
    text = f"{len(found['facts'])} facts, {len(found['rounds']) - len(wrong)} ways"
    if wrong:
        named = [f"{each['way']}, {each['blocks']} blocks: {each['error']}" for each in wrong]
        raise StageError("\n".join([f"{text}, {len(wrong)} failed", *named]))
    return text


def tests(run: Run, seconds: float) -> str:
    """All tests marked gpu, those that failed last time first."""
    found = watch_tests(run, "tests", seconds, f"--ignore={PRIMITIVES}", processes=run.processes)
    run.lines += found.lines
    run.complete = not found.cut_off and not found.broken
    run.record["tests"] = hardware.count_tests(found.lines)
    return found.judge()


def sanitize(tool: str) -> Callable[[Run, float], str]:
    """A stage that runs the tests marked sanitize under one tool of compute-sanitizer."""

    def stage(run: Run, seconds: float) -> str:
        run.require("pytest")
        program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=TOOLKIT)
        if program is None:
            raise LeftOut("compute-sanitizer is not on this machine")
        file = run.work / f"{tool}.jsonl"
        file.unlink(missing_ok=True)
        options = [
            "--tool",
            tool,
            "--print-limit",
            "50",
            *(["--report-api-errors", "no"] if tool == "memcheck" else []),
        ]
        command = pytest_command(run, "gpu and sanitize", file, "--watch-markers", "--capture=no")
        environment = {**TEST_ENVIRONMENT, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = run.execute([program, *options, *command], f"{tool}.log", seconds, environment)
        lines = wire.read(file)
        ran = [line for line in lines if "end" in line]
        errors = find_errors(done.text)
        run.record.setdefault("sanitizers", {})[tool] = {"tests": len(ran), "errors": errors}
        # An error of the tool is one of the kernels that ran in that test.
        run.lines += [line for line in lines if "kernel" in line and line["test"] in errors]
        for test, found in errors.items():
            message = f"{tool}: {found[0]}"
            run.lines.append({"end": f"{test} [{tool}]", "of": test, "outcome": "failed", "message": message})
        if errors:
            raise StageError("\n".join(f"{test}: {found[0]}" for test, found in errors.items()))
        if done.code is None:
            raise TimeoutError(f"after {len(ran)} tests, no error until then")
        if not ran:
            told = [line for line in done.text.splitlines() if line.startswith("=========")]
            raise LeftOut(
                f"no test ran: {' '.join(told[1:3]) or done.text[-300:].strip() or 'none is marked sanitize'}"
            )
        failed = [line["end"] for line in ran if line["outcome"] == "failed"]
        if failed:
            raise StageError(f"{len(failed)} of {len(ran)} tests failed, without an error of the tool: {failed[0]}")
        return f"{len(ran)} tests, no error"

    return stage


def find_errors(text: str) -> dict[str, list[str]]:
    """What compute-sanitizer reported in each test: first lines of its reports, by the test whose name came before."""
    quiet = (
        *("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application", "Warning"),
        *("Internal Sanitizer Error", "Error: process didn't", "Error: Device not", "Error: No attachable"),
    )
    test, errors = "before any test", {}
    for line in text.splitlines():
        if line.startswith(wire.MARKER):
            test = line.removeprefix(wire.MARKER)
        heading = re.match(r"={9} (\S.*)", line)
        if heading and not heading[1].startswith(quiet):
            errors.setdefault(test, []).append(heading[1])
    return errors


def chosen_operators(run: Run, sound: set[str]) -> list[str]:
    """Those of the sound ones that the run is to measure, in order."""
    if not sound:
        raise LeftOut("no kernel has passed its tests")
    chosen = sorted(sound & set(run.operators or sound))
    if not chosen:
        raise LeftOut(f"no kernel of {', '.join(run.operators)} has passed its tests")
    return chosen


def cold(run: Run, seconds: float) -> str:
    """Seconds of first calls, with an empty and a warm cache, of operators whose CUDA kernels passed their tests."""
    run.require("cupy")
    found = hardware.find_sound(run.record["kernels"], run.kernels, run.root)
    both = {op for op, _, _ in found if all((op, "cuda", step) in found for step in hardware.PASSES)}
    operators = chosen_operators(run, both & {op for op, *_ in CELLS})
    file = run.work / "cold.json"
    file.unlink(missing_ok=True)
    chosen = [argument for operator in operators for argument in ("--op", operator)]
    command = [run.python, "-m", "bench.cold", "--json", str(file), *chosen]
    done = run.execute(command, "cold.log", seconds)
    if not file.exists():
        if done.code is None:
            raise TimeoutError("before the first cell")
        raise StageError(f"ended with code {done.code}\n{done.tail}")
    record = run.record["cold"] = json.loads(file.read_text())
    counts = [f"{sum(cache in row for row in record['rows'])} with {title}" for cache, title in CACHES.items()]
    misses = find_misses(record)
    text = "\n".join([f"cells: {', '.join(counts)}; {len(misses)} goals missed", *map("missed: {}".format, misses)])
    if done.code is None:
        raise TimeoutError(f"after {text}")
    if done.code:
        raise StageError(f"{text}\nended with code {done.code}\n{done.tail}")
    return text


def bench(run: Run, seconds: float) -> str:
    """The benchmark, of what needs no kernel but those whose tests passed."""
    run.require("numpy", "click", "rich", "pytest", "pytest_benchmark")
    sound = hardware.find_sound(run.record["kernels"], run.kernels, run.root)
    operators = chosen_operators(run, {operator for operator, _, _ in sound})
    file = run.work / "bench.json"
    file.unlink(missing_ok=True)
    chosen = [argument for operator in operators for argument in ("--op", operator)]
    for kernel in sorted(sound):
        chosen += ["--kernel", ":".join(kernel)] if kernel[0] in operators else []
    command = [run.python, "-m", "bench", "--device", "cuda", "--quick", "--json", str(file), *chosen]
    done = run.execute(command, "bench.log", seconds)
    if not file.exists():
        if done.code is None:
            raise TimeoutError("before the first result")
        raise StageError(f"ended with code {done.code}\n{done.tail}")
    record = json.loads(file.read_text())
    measured, record["results"] = (
        record["results"],
        [result for result in record["results"] if not hardware.withheld(result, sound)],
    )
    run.record["bench"] = record
    failed = [result for result in record["results"] if result["error"]]
    text = f"{len(record['results']) - len(failed)} results"
    if len(measured) > len(record["results"]):
        text += f", {len(measured) - len(record['results'])} withheld since a kernel's tests failed"
    if failed:
        named = [f"{result['case']}, {result['mode']}, {result['backend']}: {result['error']}" for result in failed]
        raise StageError("\n".join([f"{text}, {len(failed)} failed", *named]))
    if done.code is None:
        raise TimeoutError(f"after {text}")
    return text


def tune(run: Run, seconds: float) -> str:
    """Latencies of the GPU, and the fastest constants at the benchmark's shapes: what may be shipped.

    It is kept in the record alone, so that the benchmark measures what is shipped now.
    """
    run.require("cupy", "click", "rich")
    folder = run.work / "tune"
    shutil.rmtree(folder, ignore_errors=True)
    record = run.record["tune"] = {"commands": {}, "store": None}

    def execute(words: Sequence[str], limit: float) -> tuple[int | None, str]:
        done = run.execute([run.python, "-m", "seqops", "tune", *words], "tune.log", limit)
        return done.code, done.text

    wrong = tuned.run_commands(execute, folder, record, seconds)
    done, total = len(record["commands"]), len(tuned.COMMANDS)
    text = f"{done} of {total} done"
    if wrong:
        raise StageError("\n".join([f"{text}, {len(wrong)} failures", *wrong]))
    if done < total:
        raise TimeoutError(f"after {text}")
    return text


def stages() -> list[Stage]:
    return [
        Stage("build", build, 180),
        Stage("info", info, 60, ("build",)),
        Stage("primitives", primitives, 60, ("build",)),
        Stage("exchange", exchange, 60, ("build",)),
        Stage("tests", tests, 220, ("info",)),
        *(Stage(tool, sanitize(tool), 45, ("info",), reserve=15) for tool in SANITIZERS),
        Stage("bench", bench, 160, ("info",), reserve=90),
        Stage("cold", cold, 90, ("info",), reserve=40),
        Stage("tune", tune, 120, ("info",), reserve=60),
    ]


def choose(only: Sequence[str] | None) -> list[Stage]:
    """All stages, or those named, which have no limit of their own. What kernels there are is asked in any case."""
    if not only:
        return stages()
    chosen = [replace(stage, limit=math.inf) if stage.name in only else stage for stage in stages()]
    return [stage for stage in chosen if stage.name in (*only, "info")]


# --- helpers ---------------------------------------------------------------------------------------------------------


def kill(process: subprocess.Popen) -> None:
    """Ends a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process whose kernel never ends may be slow to leave the driver; it must not hold up the others.
    with suppress(subprocess.TimeoutExpired):
        process.wait(20)


def unpack_wheels(folder: Path, target: Path) -> list[str]:
    """Lays pure Python wheels out as a folder for PYTHONPATH. Returns their names; others need an installer."""
    wheels = sorted(folder.glob("*-none-any.whl"))
    shutil.rmtree(target, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as file:
            file.extractall(target)
    return [wheel.name for wheel in wheels]


def read_commit(root: Path) -> dict[str, Any]:
    """The commit of the source, and whether files differ from it; None for what is not known (a copy without .git)."""

    def git(*arguments: str) -> str | None:
        if shutil.which("git") is None:
            return None
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    changes = git("status", "--porcelain", "--untracked-files=no")
    return {"id": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def summarise(record: dict[str, Any]) -> str:
    """Kernels and stages, for the end of the log."""
    rows = [["kernel", "backend", "status", "tests", "of copy", "against"]]
    for entry in record["kernels"]:
        speed = hardware.describe_speed(entry["speeds"])
        counted = entry["tests"]
        rows.append(
            [
                f"{entry['operator']} {entry['pass']}",
                entry["backend"],
                entry["status"] + ("" if entry["current"] or entry["status"] == "not run" else " before"),
                f"{counted['passed']}/{counted['passed'] + counted['failed']}",
                *speed,
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.append("")
    for failure in record.get("tests", {}).get("failures", [])[:20]:
        lines.append(f"failed: {failure['test']}: {(failure['message'].strip().splitlines() or [''])[-1]}")
    lines += [f"not collected: {file}: {why}" for file, why in record.get("tests", {}).get("uncollected", {}).items()]
    lines += [f"missing: {name} ({what})" for name, what in record["missing"].items()]
    lines += [f"measured: {name} = {value}" for name, value in record.get("measured", {}).items()]
    for stage in record["stages"]:
        first = stage["text"].splitlines()[0] if stage["text"] else ""
        lines.append(f"{stage['name']:<12} {stage['status']:<8} {stage['seconds']:>6.0f} s  {first}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    names = [stage.name for stage in stages()]
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", action="append", choices=names, metavar="STAGE", help=f"of {', '.join(names)}")
    parser.add_argument("--op", action="append", metavar="NAME", help="measure this operator only; several times")
    parser.add_argument("--budget", type=float, default=570, metavar="SECONDS", help="for all stages (default: 570)")
    parser.add_argument("--output", type=Path, default=hardware.RESULTS, help="folder of the file (bench/results)")
    parser.add_argument("--commit", help="the commit of the sources, where they are a copy without .git")
    processes = default_processes()
    parser.add_argument("--processes", type=int, default=processes, help=f"that run tests at a time ({processes})")
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("torch") is None:
        sys.exit(f"{sys.executable} has no torch; name another: make gpu PYTHON=/path/to/python3")
    run = Run(
        chosen.output,
        ROOT / "build" / "gpu",
        chosen.budget,
        commit={"id": chosen.commit, "dirty": None} if chosen.commit else None,
        processes=chosen.processes,
        operators=chosen.op or (),
    )
    # What was started ends with us, also where a time limit around us sends SIGTERM.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run.probe()
    sound = run.go(choose(chosen.only))
    print(f"\n{summarise(run.record)}\nwrote {run.path}")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
