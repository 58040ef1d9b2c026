"""The file of a run: what was measured, on what, from which commit."""

import json
import os
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import harness, memory

FORMAT = 1
ENVIRONMENT = ("SEQOPS_", "OMP_", "GOMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_")


@dataclass
class Result:
    """One case in one mode. Where `error` is set, the values were wrong or nothing ran, and there are no times.

    Attributes:
        mode: a key of `harness.MODES`.
        check: the `name`, `error` and `bound` of the output or gradient nearest its bound.
        seconds: contender -> `median`, `p20`, `p80` of a call, the number of `rounds`, and of `calls` in each.
        ratios: peer -> `median`, `p20`, `p80` of peer's time over ours, round by round.
        goals, causes: peer -> the ratio to reach; why it is missed, where that is known.
        gemm_fraction: contender -> FLOP/s over this machine's matrix product.
        copy_fraction: contender -> bytes/s over this machine's copy.
        memory: contender -> bytes that a training step adds at its peak.
        backend: which one served ours, where the device has several.
        timing: "clock" on the CPU; on a GPU "graph" or "events" (see `cuda.py`).
        absent: peer -> why it could not be measured.
        copy_goal: the share of the copy rate to reach.
        time_goal: seconds of a call to stay within.
        steps: T, where one step after the other bounds the time.
        step_floor: seconds that a step of this mode cannot take less than, by estimate.
        length: what the case's time is drawn against, where it is one of several lengths.
        state: contender -> bytes of the state after that length, of a module.
        parameters: contender -> how many a module has.
    """

    case: str
    op: str
    shape: dict[str, int]
    dtype: str
    mode: str
    error: str | None = None
    check: dict[str, Any] | None = None
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    ratios: dict[str, dict[str, float]] = field(default_factory=dict)
    goals: dict[str, float] = field(default_factory=dict)
    causes: dict[str, str] = field(default_factory=dict)
    gemm_fraction: dict[str, float] = field(default_factory=dict)
    copy_fraction: dict[str, float] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    backend: str | None = None
    timing: str = harness.Stopwatch.timing
    absent: dict[str, str] = field(default_factory=dict)
    copy_goal: float | None = None
    time_goal: float | None = None
    steps: int | None = None
    step_floor: float | None = None
    length: int | None = None
    state: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)

    @property
    def step_seconds(self) -> float | None:
        """Ours, by the step."""
        if self.steps is None or harness.OURS not in self.seconds:
            return None
        return self.seconds[harness.OURS]["median"] / self.steps

    @property
    def title(self) -> str:
        """The case, and the backend where there was a choice."""
        return f"{self.case}, {self.backend}" if self.backend else self.case


@dataclass
class Record:
    """One run of the suite; `save` and `load` keep it as JSON."""

    date: str
    commit: dict[str, Any]
    machine: dict[str, Any]
    settings: dict[str, Any]
    rates: dict[str, float]
    results: list[Result]
    format: int = FORMAT

    @property
    def suite(self) -> str:
        return self.settings.get("suite", harness.OPERATORS)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")


QUANTITIES = {
    "time": "time",
    "copy": "share of the copy rate",
    "memory": "memory of a step",
    "seconds": "time of a call",
}
COPY = "copy"  # what a share of the copy rate is measured against
TIME = "time"  # what a time of its own is measured against: the goal


@dataclass(frozen=True)
class Miss:
    """A goal that was not reached: `value` is below `goal` for a ratio of times or of rates, above it for memory and
    for seconds of a call.

    Attributes:
        quantity: a key of `QUANTITIES`.
    """

    result: Result
    peer: str
    quantity: str
    value: float
    goal: float
    cause: str


def load(path: Path) -> Record:
    """Reads a record.

    Raises:
        ValueError: not JSON, another format version, or fields missing or unknown.
    """
    try:
        fields = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    version = fields.get("format") if isinstance(fields, dict) else None
    if version != FORMAT:
        raise ValueError(f"{path}: expected a benchmark record of format {FORMAT}, got {version}")
    try:
        return Record(**{**fields, "results": [Result(**result) for result in fields["results"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a benchmark record: {error}") from None


MUST_FIT = ("gpu", "cpu", "cores", "threads", "seqops_isa", "torch_isa", "system")


def check_fit(first: Record, other: Record) -> None:
    """Raises ValueError unless both are runs on one kind of machine with one build of torch."""
    one, two = ({**r.settings, **r.machine, "torch": r.machine["versions"]["torch"]} for r in (first, other))
    for key in (*MUST_FIT, "torch", "device"):
        if one.get(key) != two.get(key):
            raise ValueError(f"{key}: expected {one.get(key)!r} as in the first run, got {two.get(key)!r}")


def describe_machine(threads: int, device: str = harness.CPU) -> dict[str, Any]:
    """Processor, cores, instruction sets, versions and the settings of the environment that change speed."""
    from pytest_benchmark.plugin import pytest_benchmark_generate_machine_info

    import seqops

    found = pytest_benchmark_generate_machine_info()
    gpu = {"gpu": torch.cuda.get_device_name()} if device == harness.CUDA else {}
    return {
        **gpu,
        "cpu": found["cpu"].get("brand_raw", found["machine"]),
        "cores": os.cpu_count(),
        "threads": threads,
        "seqops_isa": torch.ops.seqops.cpu_isa(),
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{found['system']} {found['machine']}",
        "versions": {"python": found["python_version"], "torch": torch.__version__, "seqops": seqops.__version__},
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(ENVIRONMENT)},
    }


def describe_commit() -> dict[str, Any]:
    """The commit that was measured: `id`, `time`, and whether files differed from it."""
    from pytest_benchmark.utils import get_commit_info

    found = get_commit_info("seqops")
    return {key: found[key] for key in ("id", "time", "dirty")}


def make_record(settings: harness.Settings, rates: harness.Rates, results: list[Result]) -> Record:
    return Record(
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=describe_commit(),
        machine=describe_machine(settings.threads, settings.device),
        settings=asdict(settings),
        rates=asdict(rates),
        results=results,
    )


def memory_ratio(result: Result, peer: str) -> float | None:
    """Ours over the peer's; None where not measured, or so small that the method's own error shows."""
    ours, theirs = result.memory.get(harness.OURS), result.memory.get(peer)
    if ours is None or theirs is None or max(ours, theirs) < memory.SMALLEST_COMPARED:
        return None
    return ours / max(theirs, 1)


def find_misses(record: Record) -> list[Miss]:
    """Goals not reached: ratios of times below theirs, and a training step larger than the peer's."""
    misses = []
    for result in record.results:
        for peer, goal in result.goals.items():
            cause = result.causes.get(peer, "")
            if peer in result.ratios and result.ratios[peer]["median"] < goal:
                misses.append(Miss(result, peer, "time", result.ratios[peer]["median"], goal, cause))
            ratio = memory_ratio(result, peer)
            if ratio is not None and ratio > 1:
                misses.append(Miss(result, peer, "memory", ratio, 1.0, ""))
        share = result.copy_fraction.get(harness.OURS)
        if result.copy_goal is not None and share is not None and share < result.copy_goal:
            misses.append(Miss(result, COPY, "copy", share, result.copy_goal, result.causes.get(COPY, "")))
        spent = result.seconds.get(harness.OURS, {}).get("median")
        if result.time_goal is not None and spent is not None and spent > result.time_goal:
            misses.append(Miss(result, TIME, "seconds", spent, result.time_goal, result.causes.get(TIME, "")))
    return misses
