"""What ran on which GPU: the files that the GPU run writes, and the page that is made of them.

    python -m bench.hardware            write docs/hardware.md anew

A file `bench/results/<gpu>.json` holds one GPU's last run (stages, tests, sanitizers, benchmark) and, in `kernels`, an
entry for each operator, backend and pass:

| key | meaning |
|---|---|
| `status` | `passed`; `failed`; `cut off`: what ran has passed, and the time was over before the rest; `not run` |
| `date`, `commit` | of the run that the status is from; `current` says whether that was the last one |
| `tests` | how many tests that called the kernel `passed` and `failed` |
| `sources` | digests of the files that were tested |
| `speeds` | one for each case: none unless its tests passed, in the same run or before with the same sources |
| `last_passed` | `date`, `commit`, `speeds` and the digests of its `sources` when all its tests last passed, or None |

`kept` holds what earlier runs found in stages that this one did not come to: `date`, `commit` and `value` by name. So a
run may be spread over several commands.

Digests rather than a comparison of commits say whether sources have changed since: they need no history. Nothing here
needs more than the standard library until it asks which kernels exist.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import cold

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "hardware.md"
FORMAT = 1

# What proves a kernel in CI, where there is no GPU.
BACKENDS = {"cuda": "simulator only", "triton": "interpreter only"}
PASSES = ("forward", "backward")
# The passes whose kernels a mode of the benchmark runs; the last one is the one whose speed it shows.
MODES = {
    "forward": ("forward",),
    "inference": ("forward",),
    "forward+backward": ("forward", "backward"),
    "backward": ("forward", "backward"),
}
SHOWN_MODES = {"forward": "forward", "backward": "backward"}
# No speed is kept for a kernel in any other state.
SOUND = ("passed", "cut off")
KEPT_FAILURES = 50


@dataclass(frozen=True)
class Kernel:
    """What an operator needs in one pass on one backend.

    Attributes:
        names: registered operators that make up the pass, e.g. the one for inference and the one for training.
        sources: paths of the files that it is made of.
    """

    operator: str
    backend: str
    step: str
    names: Sequence[str]
    sources: Sequence[str]

    @property
    def key(self) -> tuple[str, str, str]:
        return self.operator, self.backend, self.step


def file_name(gpu: str) -> str:
    """`nvidia-h200.json` for "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"


def load(path: Path) -> dict[str, Any]:
    """Reads the file of a GPU.

    Raises:
        ValueError: it is not one, or of another format.
    """
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from None
    version = record.get("format") if isinstance(record, dict) else None
    if version != FORMAT or "kernels" not in record:
        raise ValueError(f"{path}: expected a record of a GPU run of format {FORMAT}, got {version}")
    return record


def load_all(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The records of all GPUs in a folder, by the GPU's name; the benchmark's own files there are left out."""
    found = [path for path in sorted(folder.glob("*.json")) if '"kernels"' in path.read_text()]
    return sorted((load(path) for path in found), key=lambda record: record["gpu"]["name"])


# What stages leave under names of their own, and the page or a later run reads.
SECTIONS = ("exchange", "tests", "bench", "cold", "tune")


@dataclass(frozen=True)
class Section:
    """What a stage found, and of which run: of the last one unless `is_kept`."""

    value: Any
    date: str
    commit: Mapping[str, Any]
    is_kept: bool

    @property
    def origin(self) -> str:
        return f"{self.date[:10]}, commit {describe_commit(self.commit)}"


def find_section(record: Mapping[str, Any], name: str) -> Section | None:
    """From the last run that came to it, or None."""
    if name in record:
        return Section(record[name], record["date"], record["commit"], False)
    if kept := record.get("kept", {}).get(name):
        return Section(**kept, is_kept=True)
    return None


def keep_sections(previous: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """For the record of the next run: what the one before found, or kept."""
    found = {name: find_section(previous, name) for name in SECTIONS}
    return {
        name: {"value": section.value, "date": section.date, "commit": section.commit}
        for name, section in found.items()
        if section
    }


# --- which kernels there are -----------------------------------------------------------------------------------------


def find_kernels() -> list[Kernel]:
    """Every kernel of a GPU backend that this source has, whether or not it can run on this machine."""
    import seqops
    from seqops.core import backend

    names: dict[tuple[str, str, str], list[str]] = {}
    for name, operator, backend_name in backend.kernels():
        step = "backward" if name.endswith("_backward") else "forward"
        names.setdefault((operator, backend_name, step), []).append(name)
    found = []
    for (operator, backend_name, step), registered in names.items():
        room = getattr(seqops, operator).__module__.split(".")[1]
        sources = find_sources(operator, backend_name, room)
        found.append(Kernel(operator, backend_name, step, sorted(registered), sources))
    return sorted(found, key=lambda kernel: (kernel.operator, PASSES.index(kernel.step), kernel.backend))


INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)


def find_sources(operator: str, backend: str, room: str, root: Path = ROOT) -> list[str]:
    """Paths of what a kernel is compiled from and launched by. A `.cu` that bears no operator's name is every one's."""
    import seqops

    package = root / "seqops" / room
    files = [*package.glob(f"{backend}*.py"), package / "tiles.py"]
    for composed in package.glob(f"composed_{operator}.py"):  # made of other operators, whose kernels are its own
        parts = {name for name in re.findall(r"\bops\.(\w+)", composed.read_text()) if name in seqops.__all__}
        rooms = {name: getattr(seqops, name).__module__.split(".")[1] for name in parts}
        files += [composed, *(root / each for name in parts for each in find_sources(name, backend, rooms[name], root))]
    if backend == "cuda":
        others = tuple(name for name in seqops.__all__ if name != operator)
        kernels = [path for path in (root / "csrc" / room).glob("*.cu") if not path.stem.startswith(others)]
        files += [*with_includes(kernels, root / "csrc"), root / "seqops" / "core" / "launch.py"]
    return sorted({path.relative_to(root).as_posix() for path in files if path.exists()})


def with_includes(files: Iterable[Path], root: Path) -> set[Path]:
    """The files and all headers of ours that they include on a GPU."""
    found: set[Path] = set()
    wanted = list(files)
    while wanted:
        path = wanted.pop()
        if path not in found and path.exists() and path.name != "simulator.h":
            found.add(path)
            wanted += [root / name for name in INCLUDE.findall(path.read_text())]
    return found


def find_unserved() -> list[str]:
    """Public operators without a GPU kernel of their own: those made of others run on the kernels of these."""
    from seqops.core import backend

    return sorted(set(backend.table()) - {kernel.operator for kernel in find_kernels()})


def print_kernels() -> None:
    """The kernels as JSON, for the GPU run, which imports no seqops itself."""
    print(
        json.dumps({"kernels": [[*kernel.key, list(kernel.names), list(kernel.sources)] for kernel in find_kernels()]})
    )


def digest_sources(kernel: Kernel, root: Path = ROOT) -> dict[str, str]:
    """Path -> digest of each source as it is now."""
    paths = [root / source for source in kernel.sources]
    return {
        source: hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for source, path in zip(kernel.sources, paths, strict=True)
        if path.exists()
    }


# --- from what a run saw to entries ----------------------------------------------------------------------------------


def count_tests(lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """How tests ended: numbers, the failures, reasons of skips, and files that could not be collected."""
    ended = [line for line in lines if "end" in line]
    counted: dict[str, Any] = {
        outcome: sum(line["outcome"] == outcome for line in ended) for outcome in ("passed", "failed", "skipped")
    }
    failures = [{"test": line["end"], "message": line["message"]} for line in ended if line["outcome"] == "failed"]
    counted["failures"] = failures[:KEPT_FAILURES]
    counted["skips"] = {}
    for line in ended:
        if line["outcome"] == "skipped":
            counted["skips"][line["message"]] = counted["skips"].get(line["message"], 0) + 1
    counted["uncollected"] = {
        line["uncollected"]: line["message"].strip().splitlines()[-1] if line["message"].strip() else ""
        for line in lines
        if "uncollected" in line
    }
    return counted


def update(
    previous: Sequence[Mapping[str, Any]],
    kernels: Sequence[Kernel],
    record: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    complete: bool,
    root: Path = ROOT,
) -> list[dict[str, Any]]:
    """The entries after a run, or after a part of it.

    Args:
        previous: the entries before it.
        record: of the run: its date, commit and benchmark.
        lines: what the watched tests wrote down.
        complete: whether all tests have run.
    """
    before = {(entry["operator"], entry["backend"], entry["pass"]): entry for entry in previous}
    outcomes: dict[str, list[str]] = {}
    for line in lines:
        if "end" in line:
            outcomes.setdefault(line.get("of", line["end"]), []).append(line["outcome"])
    entries = []
    for kernel in kernels:
        called = {
            line["test"]
            for line in lines
            if "kernel" in line and line["kernel"][1] == kernel.backend and line["kernel"][0] in kernel.names
        }
        failed = sum("failed" in outcomes.get(test, ()) for test in called)
        passed = sum({*outcomes.get(test, ())} == {"passed"} for test in called)
        old = before.get(kernel.key)
        if not failed and not passed and old is not None:
            entries.append(keep(kernel, old, record, root))
            continue
        status = "failed" if failed else "not run" if not passed else "passed" if complete else "cut off"
        entry = {
            "operator": kernel.operator,
            "backend": kernel.backend,
            "pass": kernel.step,
            "status": status,
            "current": True,
            "date": record["date"],
            "commit": record["commit"],
            "tests": {"passed": passed, "failed": failed},
            "sources": digest_sources(kernel, root),
            "speeds": find_speeds(kernel, record) if status in SOUND else [],
            "last_passed": old["last_passed"] if old else None,
        }
        if status == "passed":
            entry["last_passed"] = make_last_passed(kernel, entry, root)
        entries.append(entry)
    return entries


def keep(kernel: Kernel, old: Mapping[str, Any], record: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """The entry of a kernel that this run has not tested; speeds are new where it measured what had passed before."""
    entry = {**old, "current": False}
    speeds = find_speeds(kernel, record)
    if speeds and find_sound([entry], [kernel], root):
        entry["speeds"] = speeds
        if old["status"] == "passed":
            entry["last_passed"] = {**old["last_passed"], "speeds": speeds}
    return entry


def find_sound(
    entries: Sequence[Mapping[str, Any]], kernels: Sequence[Kernel], root: Path = ROOT
) -> set[tuple[str, str, str]]:
    """Keys of the kernels that may be measured: tested in this run, or before with the sources that there are now."""
    sound = set()
    for kernel in kernels:
        for entry in entries:
            if (entry["operator"], entry["backend"], entry["pass"]) != kernel.key:
                continue
            if entry["status"] in SOUND and (entry["current"] or entry["sources"] == digest_sources(kernel, root)):
                sound.add(kernel.key)
    return sound


def make_last_passed(kernel: Kernel, entry: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """This run as the last one that passed. Speeds of the one before stay where nothing was measured nor changed."""
    sources, before = digest_sources(kernel, root), entry["last_passed"]
    kept = before["speeds"] if before and before["sources"] == sources else []
    return {
        "date": entry["date"],
        "commit": entry["commit"],
        "sources": sources,
        "speeds": entry["speeds"] or kept,
    }


def step_speed(result: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of a step, of one pass or of both, where steps bound the time."""
    if not result.get("steps"):
        return {}
    return {"step": result["seconds"]["seqops"]["median"] / result["steps"], "both": is_of_both(result)}


def is_of_both(result: Mapping[str, Any]) -> bool:
    """Whether it measures both passes of an operator whose backward is not measured alone."""
    return result["mode"] == "forward+backward" and bool(result.get("steps"))


def find_speeds(kernel: Kernel, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the benchmark of this run measured of a kernel."""
    return [
        {
            "case": result["case"],
            "seconds": result["seconds"]["seqops"]["median"],
            "copy": result["copy_fraction"]["seqops"],
            "ratios": {peer: ratio["median"] for peer, ratio in result["ratios"].items()},
            **step_speed(result),
        }
        for result in record.get("bench", {}).get("results", [])
        if (result["op"], result["backend"]) == (kernel.operator, kernel.backend)
        and not result["error"]
        and kernel.step == ("backward" if is_of_both(result) else SHOWN_MODES.get(result["mode"]))
    ]


def withheld(result: Mapping[str, Any], sound: Collection[tuple[str, str, str]]) -> bool:
    """Whether a result of the benchmark is not for anyone to see: a kernel that it runs has not passed its tests."""
    return any((result["op"], result["backend"], step) not in sound for step in MODES[result["mode"]])


# --- the page --------------------------------------------------------------------------------------------------------


def describe_range(values: Sequence[float], text: str) -> str:
    """Least and greatest, once where they look the same."""
    ends = [text.format(value) for value in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def describe_speed(speeds: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """Share of the copy rate or microseconds of a step, and ratios to the peers, over all cases."""
    if not speeds:
        return "", ""
    shares = [speed["copy"] for speed in speeds if not speed.get("step")]
    bounds = [describe_range(shares, "{:.0%}")] if shares else []
    for both, ending in ((False, " µs a step"), (True, " µs a step, both passes")):
        steps = [1e6 * speed["step"] for speed in speeds if speed.get("step") and speed["both"] == both]
        bounds += [describe_range(steps, "{:.2f}") + ending] if steps else []
    peers = dict.fromkeys(peer for speed in speeds for peer in speed["ratios"])
    ratios = {peer: [speed["ratios"][peer] for speed in speeds if peer in speed["ratios"]] for peer in peers}
    return (
        ", ".join(bounds),
        ", ".join(f"{describe_range(found, '{:.2f}')}x {peer}" for peer, found in ratios.items()),
    )


def describe_commit(commit: Mapping[str, Any]) -> str:
    return (commit["id"] or "unknown")[:10] + (" with changes" if commit["dirty"] else "")


def describe_changes(kernel: Kernel, last: Mapping[str, Any], root: Path) -> str:
    """Which sources differ from those that passed, by file name."""
    now, then = digest_sources(kernel, root), last["sources"]
    changed = sorted(path for path in now.keys() | then.keys() if now.get(path) != then.get(path))
    names = ", ".join(path.rpartition("/")[2] for path in changed)
    return f"changed since: {names}" if changed else ""


def kernel_rows(kernel: Kernel, records: Sequence[Mapping[str, Any]], root: Path) -> list[list[str]]:
    """The rows of one kernel: a GPU each, or one that says what proves it instead."""
    start = [f"`{kernel.operator}`", kernel.step, kernel.backend]
    rows = []
    for record in records:
        for entry in record["kernels"]:
            if (entry["operator"], entry["backend"], entry["pass"]) != kernel.key or entry["status"] == "not run":
                continue
            notes, when, speed = [], ["never", ""], ("", "")
            if entry["status"] != "passed":
                notes.append(f"**{entry['status']}** on {entry['date'][:10]} at {describe_commit(entry['commit'])}")
                if entry["status"] == "cut off":
                    notes[-1] += f": {entry['tests']['passed']} tests passed, others did not run"
            if last := entry["last_passed"]:
                when = [last["date"][:10], describe_commit(last["commit"])]
                speed = describe_speed(last["speeds"])
                notes.append(describe_changes(kernel, last, root))
            if entry["status"] == "cut off" and entry["speeds"]:
                speed = describe_speed(entry["speeds"])
            rows.append([*start, record["gpu"]["name"], *when, *speed, "; ".join(filter(None, notes))])
    return rows or [[*start, "none", "never", "", "", "", BACKENDS[kernel.backend]]]


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


RESULT_HEAD = ("case", "mode", "backend", "ours", "goal", "a step", "peer's time over ours, and goals", "absent")


def result_row(result: Mapping[str, Any]) -> list[str]:
    """One result of the benchmark; a goal in bold that was not reached."""
    spent, goal, steps = result["seconds"]["seqops"]["median"], result.get("time_goal"), result.get("steps")
    floor = result.get("step_floor")
    ratios = []
    for peer, ratio in result["ratios"].items():
        wanted = result.get("goals", {}).get(peer)
        text = f"{ratio['median']:.2f}x {peer}" + ("" if wanted is None else f" (goal {wanted:.3g}x)")
        ratios.append(text if wanted is None or ratio["median"] >= wanted else f"**{text}**")
    reached = "" if goal is None else f"{1e3 * goal:.2f} ms" if spent <= goal else f"**{1e3 * goal:.2f} ms**"
    step = "" if not steps else f"{1e6 * spent / steps:.2f} µs" + (f" (floor {1e6 * floor:.2f})" if floor else "")
    absent = "; ".join(f"{peer}: {why}" for peer, why in result.get("absent", {}).items())
    start = [result["case"], result["mode"], result["backend"] or ""]
    return [*start, f"{1e3 * spent:.3f} ms", reached, step, ", ".join(ratios), absent]


# Facts of the tuner that say what an exchange costs: name -> title.
FACTS = {
    "clock_ghz": "clock, GHz",
    "sync_cycles": "barrier of a block of 256 threads, cycles",
    "mma_cycles": "product m16n8k16 after product, cycles",
    "mma_issue_cycles": "product m16n8k16 of one tensor core, cycles",
    "dsmem_cycles": "flag to another block's shared memory, one way, cycles",
    "dsmem_bytes_per_clock": "stores to another block's shared memory, bytes a cycle",
    "cluster_processors": "multiprocessors that clusters occupy at once",
    "l2_hop_us": "flag through L2, one way, µs",
    "l2_hit_us": "load from L2, µs",
    "memory_latency_us": "load from memory, µs",
    "grid_barrier_us": "barrier of the grid, µs",
    "launch_us": "from kernel to kernel, µs",
    "graph_launch_us": "from kernel to kernel in a graph, µs",
}
EXCHANGE = (
    "A step of a recurrent kernel whose head is spread over several blocks ends with a round in which every block "
    "sends its slice of `h` to all others and waits for theirs. `bench/exchange.cu` makes such rounds and nothing "
    "else, so a step cannot take less; values are checked. The GPU run measures them before any kernel."
)
FIRST_CALLS = (
    "A training step, forward and backward, that is the first of its cell and size in a process: with an empty cache "
    "of compiled kernels, and in another process with the cache that the first one left. What is done once in a "
    "process is apart. The same step again, one with fewer rows and one with fewer steps have to compile nothing."
)
NEVER = "**Never measured on a GPU.**"


def exchange_section(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What it costs blocks to tell each other something."""
    parts = ["## Exchange between blocks", EXCHANGE]
    measured = [(record, section) for record in records if (section := find_section(record, "exchange"))]
    for record, section in measured:
        found = section.value
        rows = [
            [
                each["way"],
                f"{each['blocks']} of {each['threads']}",
                str(each["bytes"]),
                each["error"] or f"{each['microseconds']:.2f}",
            ]
            for each in found["rounds"]
        ]
        facts = [[FACTS[name], f"{found['facts'][name]:.3g}"] for name in FACTS if name in found["facts"]]
        parts += [
            f"{record['gpu']['name']}, {section.origin}:",
            make_table(("way", "blocks of threads", "bytes each", "µs a round"), rows),
            make_table(("fact", "value"), facts),
        ]
    return parts if measured else [*parts, NEVER]


def cold_section(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Seconds of first calls."""
    parts = ["## First calls", FIRST_CALLS]
    measured = [(record, section) for record in records if (section := find_section(record, "cold"))]
    for record, section in measured:
        found = section.value
        rows = []
        for row in found["rows"]:
            cells = []
            for cache, goal in cold.GOALS.items():
                spent = cold.first_seconds(row, cache) if cache in row else None
                text = "cut off" if spent is None else f"{spent:.2f}"
                cells.append(text if spent is None or spent <= goal else f"**{text}**")
            counts = [row[cold.EMPTY][key]["compiled"] for key in cold.STEPS] if cold.EMPTY in row else []
            text = ", ".join(map(str, counts))
            rows.append([cold.describe_cell(row), *cells, f"**{text}**" if any(counts[1:]) else text])
        goals = [f"{cache} cache, s (goal {goal:g})" for cache, goal in cold.GOALS.items()]
        once = ", ".join(f"{spent:.1f} s with {cold.CACHES[cache]}" for cache, spent in found["once"].items())
        parts += [
            f"{record['gpu']['name']}, {section.origin}; once in a process: {once}:",
            make_table(("cell", *goals, "kernels compiled: first, again, fewer rows, fewer steps"), rows),
        ]
    return parts if measured else [*parts, NEVER]


def describe_run(record: Mapping[str, Any]) -> str:
    """One GPU's last run."""
    gpu, versions = record["gpu"], record.get("info", {}).get("versions", {})
    software = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    lines = [
        f"### {gpu['name']}",
        "",
        f"{record['date'][:10]}, commit {describe_commit(record['commit'])}; compute capability "
        f"{gpu['compute_capability']}, {gpu['memory_gib']:g} GiB; {software or 'versions unknown'}.",
        "",
        make_table(
            ("stage", "outcome", "seconds", ""),
            [
                [stage["name"], stage["status"], f"{stage['seconds']:.0f}", (stage["text"].splitlines() or [""])[0]]
                for stage in record["stages"]
            ],
        ),
    ]
    section = find_section(record, "bench")
    found = section.value if section else {}
    if rates := found.get("rates"):
        product, copy = f"{rates['gemm'] / 1e12:.0f} TFLOP/s", f"{rates['copy'] / 1e12:.2f} TB/s"
        when = f"in an earlier run ({section.origin})" if section and section.is_kept else "in that run"
        lines += ["", f"Measured {when}: bfloat16 matrix product {product}, copy {copy}."]
    if results := [result for result in found.get("results", []) if not result["error"]]:
        lines += ["", make_table(RESULT_HEAD, map(result_row, results))]
    if measured := record.get("measured"):
        lines += ["", make_table(("measured", "value"), [[name, str(value)] for name, value in measured.items()])]
    if record["missing"]:
        missing = "; ".join(f"{name} ({what})" for name, what in record["missing"].items())
        lines += ["", f"Not installed there, so left out: {missing}."]
    if uncollected := record.get("tests", {}).get("uncollected"):
        files = "; ".join(f"{file}: {why}" for file, why in uncollected.items())
        lines += ["", f"Tests that could not be collected there: {files}."]
    return "\n".join(lines)


def render(
    kernels: Sequence[Kernel], unserved: Sequence[str], records: Sequence[Mapping[str, Any]], root: Path = ROOT
) -> str:
    """The page."""
    rows = [row for kernel in kernels for row in kernel_rows(kernel, records, root)]
    passed = {
        (entry["operator"], entry["backend"], entry["pass"])
        for record in records
        for entry in record["kernels"]
        if entry["last_passed"]
    }
    count = sum(kernel.key in passed for kernel in kernels)
    if not records:
        summary = "**No kernel has run on a GPU yet.**"
    else:
        summary = f"**{count} of {len(kernels)} kernels have passed their tests on a GPU.**"
    parts = [
        "# Hardware",
        "<!-- Made by `python -m bench.hardware` from the files in bench/results; a test compares. -->",
        f"Which GPU kernel has run on which GPU, when, and how fast. {summary} Without a GPU, CUDA kernels run on a "
        "simulator on the small cases of the tests, and are compiled for sm_80, sm_89, sm_90, sm_100 and sm_120; "
        "Triton kernels run in Triton's interpreter on the tiny cases, and each kind of them is compiled for sm_80, "
        "sm_90, sm_100 and sm_120. That shows values on those cases, resources, and of CUDA kernels races; it says "
        "nothing about speed.",
        "    make gpu                    # on a machine with a GPU: build, test, sanitize, measure\n"
        "    python -m bench.hardware    # this page, from what that wrote to bench/results",
    ]
    if kernels:
        head = ("operator", "pass", "backend", "GPU", "last passed", "commit", "of copy, or a step", "against", "")
        parts += ["## Kernels", make_table(head, rows)]
        parts += [
            "*Of copy*: bytes that the pass has to move, per second, over the rate of a `clone` in the same run; for "
            "recurrent cells, whose steps wait for each other, the time of one step instead. Least and greatest of all "
            "cases. *Against*: the peer's time over ours. No speed stands beside a kernel whose tests failed; beside "
            "one whose tests were *cut off* it is from that run, or from a later one with the same files. "
            "*Changed since*: files of the kernel that are not those that passed."
        ]
    if unserved:
        parts += ["Operators without a GPU kernel of their own: " + ", ".join(f"`{name}`" for name in unserved) + "."]
    parts += [*exchange_section(records), *cold_section(records)]
    if records:
        parts += ["## Runs", *map(describe_run, records)]
    return "\n\n".join(parts) + "\n"


def make_page(root: Path = ROOT) -> str:
    """The page for this source and the files of `bench/results`."""
    return render(find_kernels(), find_unserved(), load_all(root / "bench" / "results"), root)


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hardware", description="Writes docs/hardware.md.")
    parser.parse_args(arguments)
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
