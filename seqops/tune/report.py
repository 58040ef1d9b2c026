"""What `seqops tune` prints: tables and lines for people, and the same as data for programs."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .device import KB, MB, Device, Host
from .search import Candidate, Outcome, Place
from .store import Listed

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 240
LEAST_WIDTH = 20  # of a terminal; one that tells less is not believed
LOG_LINES = 12
GAP = 2  # blanks between columns


def make_console() -> Console:
    """For the standard output. A pipe or a file gets no colours, and lines so long that nothing wraps."""
    from rich.console import Console

    if sys.stdout is None:  # closed by who started the process
        return Console(markup=False, highlight=False, width=PIPED_WIDTH, file=io.StringIO())
    if sys.stdout.isatty():
        return Console(markup=False, highlight=False, width=terminal_width())
    return Console(markup=False, highlight=False, width=PIPED_WIDTH, force_terminal=False)


def terminal_width() -> int:
    return max(shutil.get_terminal_size().columns, LEAST_WIDTH)


def plus_minus(stream: TextIO | None) -> str:
    """The sign, as far as the stream can write it."""
    try:
        "±".encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "+-"
    return "±"


# ---- one outcome


def describe_shape(shape: dict[str, Any]) -> str:
    """heads=3 dim=256 train"""
    parts = [name if value is True else f"{name}={value}" for name, value in shape.items() if value is not False]
    return " ".join(parts)


def describe_place(place: Place) -> str:
    device = place.device
    if isinstance(device, Host):
        return f"{device.name}, {device.threads} threads" if device.threads > 1 else f"{device.name}, 1 thread"
    return f"{device.name} ({place.torch_device or f'preset; {place.absent}'})"


def describe_constants(constants: dict[str, int]) -> str:
    return " ".join(f"{name}={value}" for name, value in constants.items())


def describe_time(us: float) -> str:
    return f"{us:.3g} us" if us < 1e3 else f"{us / 1e3:.3g} ms" if us < 1e6 else f"{us / 1e6:.3g} s"


def describe_number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def describe_bytes(count: float) -> str:
    return f"{count / KB:.3g} KB" if count < MB else f"{count / MB:.3g} MB"


def draw_outcome(console: Console, outcome: Outcome, place: Place) -> None:
    title, shape = outcome.target.title, describe_shape(outcome.shape)
    console.print(f"{title}, {outcome.dtype}, {shape}, on {describe_place(place)}", style="bold")
    if outcome.explanation is not None:
        console.print(outcome.explanation)
        return
    proof = "optimal" if outcome.optimal else "best found in time"
    size = f"{outcome.constraints} constraints, {outcome.variables} variables"
    console.print(f"solved {size} in {outcome.seconds * 1e3:.0f} ms: {proof}, {outcome.nodes:,} nodes")
    draw_candidates(console, outcome)
    for line in tell_steps(outcome):
        console.print(line)


def tell_steps(outcome: Outcome) -> list[str]:
    """What was done with the candidates, and what became of the winner."""
    lines = []
    total = len(outcome.candidates)
    if outcome.compile_seconds is not None:
        spilled = any(c.report and (c.report.spills or c.report.stack) for c in outcome.candidates)
        figures = "" if spilled else ", no spills"
        lines.append(
            f"compiled {outcome.compiled} of {total} for {outcome.architecture} in {outcome.compile_seconds:.1f} s"
            f"{figures} (registers: model/compiler)"
        )
    elif outcome.uncompiled:
        lines.append(f"not compiled: {outcome.uncompiled}")
    lines += tell_dropped(outcome)
    if outcome.checked:
        wrong = sum(candidate.failed in ("check", "reference") for candidate in outcome.candidates)
        lines.append(f"checked {outcome.checked} against the reference: {f'{wrong} failed' if wrong else 'all right'}")
    timed = sum(candidate.us is not None for candidate in outcome.candidates)
    if outcome.untimed and not timed:
        lines.append(f"not timed: {outcome.untimed}")
    if outcome.interrupted:
        lines.append("interrupted" + ("" if outcome.chosen else ": nothing was measured yet"))
    if outcome.chosen is not None:
        lines.append(tell_winner(outcome))
    if outcome.stored:
        confirm = f" (time it on {article(outcome.device.name)} to confirm)" if outcome.by == "solved" else ""
        lines.append(f"stored as {outcome.by}: {home(outcome.stored)}{confirm}")
    elif outcome.unstored:
        lines.append(f"{'kept in memory only' if outcome.unwritten else 'not stored'}: {home(outcome.unstored)}")
    elif outcome.chosen is not None:
        lines.append("not stored: --dry-run")
    return lines


def tell_dropped(outcome: Outcome) -> list[str]:
    """The reasons, each with all candidates that it holds for; of a compiler's log the first lines."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for candidate in outcome.candidates:
        if candidate.failed is not None:
            which = str(candidate.rank) if candidate.rank else "the stored one"
            reasons.setdefault((candidate.failed, (candidate.reason or "").strip()), []).append(which)
    lines = []
    for (step, reason), which in reasons.items():
        first, *rest = reason.splitlines() or [""]
        lines.append(f"dropped {', '.join(which)}: " + (first if step == "reference" else f"{step}: {first}"))
        lines += [f"    {line}" for line in rest[:LOG_LINES]]
        if len(rest) > LOG_LINES:
            lines.append(f"    ... and {len(rest) - LOG_LINES} lines more: --json has them all")
    return lines


def tell_winner(outcome: Outcome) -> str:
    chosen = outcome.chosen
    first = next((c for c in outcome.candidates if c.rank and c.failed is None), chosen)
    which = str(chosen.rank) if chosen.rank else "the stored one"
    if outcome.by == "solved":
        return f"chosen: {which}, the model's best" + ("" if chosen.rank == 1 else " of those that compile")
    timed = sum(candidate.us is not None for candidate in outcome.candidates)
    if first is chosen and timed == 1:
        return f"chosen: {which}, the model's first choice"
    if first is chosen:
        return f"chosen: {which}, the model's first choice; no other is more than 2 % faster"
    if first.us is None:
        return f"chosen: {which}"
    return f"chosen: {which}, {first.us / chosen.us:.2f} x as fast as {first.rank}, the model's first choice"


def article(name: str) -> str:
    return f"an {name}" if name[:1].lower() in "aehilmnorsx8" and name.isalnum() else f"a {name}"


def home(path: str) -> str:
    """With ~ for the user's folder."""
    folder = str(Path.home())
    return path.replace(f"{folder}/", "~/", 1) if len(folder) > 1 else path


# ---- the table of candidates


Column = tuple[str, list[str]]  # heading, cells


def draw_candidates(console: Console, outcome: Outcome) -> None:
    every, columns = arrange(outcome, console.width)
    if every:
        console.print(f"all with {every}")
    draw(console, columns, mark=[candidate is outcome.chosen for candidate in outcome.candidates])


def arrange(outcome: Outcome, width: int) -> tuple[str, list[Column]]:
    """The columns, and what all candidates have in common where there is no room for it in the table.

    Too wide, constants that are the same everywhere leave it, then the model's figures, beside measured times all of
    them; then the other constants go into one column that may wrap.
    """
    candidates = outcome.candidates
    rank: Column = ("", [("* " if c is outcome.chosen else "") + (str(c.rank) if c.rank else "-") for c in candidates])
    constants = [(name, [str(c.constants[name]) for c in candidates]) for name in candidates[0].constants]
    figures = [
        (name.replace("_", " "), [_figure(name, c) for c in candidates])
        for name in dict.fromkeys(name for c in candidates for name in c.predicted)
    ]
    results = _results(outcome)
    every = ""
    if _width(columns := [rank, *constants, *figures, *results]) > width and len(candidates) > 1:
        same = {name: cells[0] for name, cells in constants if len(set(cells)) == 1}
        constants = [(name, cells) for name, cells in constants if name not in same]
        every = " ".join(f"{name}={value}" for name, value in same.items())
        columns = [rank, *constants, *figures, *results]
    if _width(columns) > width:
        figures = [column for column in figures if column[0] in ("registers", "shared", "step us")]
        columns = [rank, *constants, *figures, *results]
    if _width(columns) > width and any(c.us is not None for c in candidates):
        figures = []
        columns = [rank, *constants, *results]
    if _width(columns) > width and len(constants) > 1:
        joined = [" ".join(f"{name}={cells[row]}" for name, cells in constants) for row in range(len(candidates))]
        columns = [rank, ("constants", joined), *figures, *results]
    return every, columns


def _width(columns: Sequence[Column]) -> int:
    return sum(max(map(len, [heading, *cells])) + GAP for heading, cells in columns)


def _figure(name: str, candidate: Candidate) -> str:
    if name not in candidate.predicted:
        return ""
    value, report = candidate.predicted[name], candidate.report
    if name == "registers" and report is not None:
        return f"{value:.0f}/{report.registers}"
    if name == "shared":
        drawn = describe_bytes(value)
        # what is equal up to alignment is equal
        return (
            drawn if report is None or drawn == describe_bytes(report.shared) else f"{drawn}/{report.shared / KB:.3g}"
        )
    return describe_number(value)


def _results(outcome: Outcome) -> list[Column]:
    candidates = outcome.candidates
    columns = [("model us", [describe_number(float(c.model_us)) for c in candidates])]
    if any(c.report for c in candidates) and not any("registers" in c.predicted for c in candidates):
        columns.insert(0, ("registers", [str(c.report.registers) if c.report else "" for c in candidates]))
    if any(c.us is not None for c in candidates):
        columns.append(("measured us", ["" if c.us is None else describe_number(float(c.us)) for c in candidates]))
        columns.append((plus_minus(sys.stdout), ["" if c.spread is None else f"{c.spread:.1%}" for c in candidates]))
        columns.append(("runs", [str(c.runs) if c.runs else "" for c in candidates]))
    notes = [", ".join(_notes(candidate)) for candidate in candidates]
    return [*columns, ("", notes)] if any(notes) else columns


def _notes(candidate: Candidate) -> list[str]:
    dropped = {"compile": "does not compile", "reference": "not checked", "check": "wrong", "time": "does not run"}
    notes = [dropped[candidate.failed]] if candidate.failed else []
    if candidate.failed == "check" and not (candidate.reason or "").startswith("wrong"):
        notes = ["not tried" if (candidate.reason or "").startswith("not tried") else "does not run"]
    if candidate.report and candidate.failed == "compile":
        notes = ["spills" if candidate.report.spills or candidate.report.stack else "does not fit"]
    return notes + ["stored"] * candidate.stored + ["slow"] * candidate.stopped


def draw(console: Console, columns: Sequence[Column], mark: Sequence[bool] = (), left: int = 0) -> None:
    """A table of right-aligned cells, but for the first `left` columns, `constants` and the last where it has words.

    Where it is wider than the console, each row is a line instead, which may wrap.
    """
    from rich.table import Table

    # the column of constants may wrap between them
    narrowest = [(name, " ".join(cells).split() if name == "constants" else cells) for name, cells in columns]
    if _width(narrowest) - GAP > console.width:
        return draw_lines(console, columns)
    table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
    for place, (heading, cells) in enumerate(columns):
        words = place < left or heading == "constants" or (heading == "" and place > 0)
        folds = heading == "constants"
        table.add_column(heading, justify="left" if words else "right", no_wrap=not folds, overflow="fold")
        if not any(cells) and not heading:
            table.columns[-1].width = 0
    for row in range(len(columns[0][1])):
        style = "green" if row < len(mark) and mark[row] else None
        table.add_row(*(cells[row] for _, cells in columns), style=style)
    console.print(table)


def draw_lines(console: Console, columns: Sequence[Column]) -> None:
    (_, first), *others = columns
    for row, name in enumerate(first):
        cells = [(heading, cells[row]) for heading, cells in others if cells[row]]
        words = [cell if heading in ("", "constants") else f"{heading} {cell}" for heading, cell in cells]
        console.print(f"{name}: {', '.join(words)}")


# ---- data


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """All of it, as JSON takes it; `entry` is what the store keeps under `key`."""
    plain = (
        *("dtype", "shape", "optimal", "explanation", "architecture", "compiled", "compile_seconds", "uncompiled"),
        *("untimed", "checked", "by", "stored", "unstored", "unwritten", "interrupted", "lost"),
    )
    entry = outcome.entry
    return {
        "op": outcome.target.op,
        "direction": outcome.target.direction,
        "kernel": outcome.target.tunable.name,
        "key": str(outcome.key),
        **{name: getattr(outcome, name) for name in plain},
        "solver": {name: getattr(outcome, name) for name in ("constraints", "variables", "seconds", "nodes")},
        "candidates": [asdict(candidate) for candidate in outcome.candidates],
        "chosen": None if outcome.chosen is None else outcome.candidates.index(outcome.chosen),
        "entry": entry and {name: value for name, value in asdict(entry).items() if value not in (None, "")},
    }


def place_data(place: Place) -> dict[str, Any]:
    device = place.device
    facts = {name: getattr(device, name, None) for name in ("name", "preset", "arch", "isa", "threads")}
    return {**facts, "torch_device": place.torch_device, "absent": place.absent}


# ---- devices and entries


def draw_devices(console: Console, presets: Sequence[Device], present: Sequence[Device | Host]) -> None:
    gpus = [device for device in present if isinstance(device, Device)]
    rows = [*((device, "preset") for device in presets), *((gpu, f"here, cuda:{i}") for i, gpu in enumerate(gpus))]
    columns: list[Column] = [
        ("device", [device.name for device, _ in rows]),
        ("arch", [str(device.arch) for device, _ in rows]),
        ("processors", [str(device.processors) for device, _ in rows]),
        ("GHz", [f"{device.clock_ghz:.2f}" for device, _ in rows]),
        ("shared KB", [str(device.shared_per_block // KB) for device, _ in rows]),
        ("L2 MB", [str(device.l2_bytes // MB) for device, _ in rows]),
        ("TB/s", [f"{device.bandwidth / 1e6:.2f}" for device, _ in rows]),
        ("", [where for _, where in rows]),
    ]
    draw(console, columns, left=1)
    for host in (device for device in present if isinstance(device, Host)):
        caches = " + ".join(describe_bytes(size) for size in (host.l1_bytes, host.l2_bytes, host.l3_bytes))
        console.print(f"cpu: {host.name}, threads: {host.threads}, {host.isa}, caches {caches}")
    if not gpus:
        console.print("no GPU here")


def entry_data(listed: Listed, stale: bool) -> dict[str, Any]:
    known = {name: value for name, value in asdict(listed.entry).items() if value not in (None, "")}
    facts = {"device": listed.device, "key": listed.key, "origin": listed.origin, "stale": stale}
    return {**facts, **known, "age": listed.age}


def draw_entries(console: Console, entries: Sequence[tuple[Listed, bool]]) -> None:
    """By device; as a table, or where that is too wide with a paragraph for each."""
    for device in dict.fromkeys(listed.device for listed, _ in entries):
        console.print(device, style="bold")
        rows = [(listed, stale) for listed, stale in entries if listed.device == device]
        times = [listed.entry.us if listed.entry.us is not None else listed.entry.model_us for listed, _ in rows]
        columns: list[Column] = [
            ("key", [listed.key for listed, _ in rows]),
            ("constants", [describe_constants(dict(listed.entry.constants)) for listed, _ in rows]),
            ("by", [listed.entry.by for listed, _ in rows]),
            ("time", ["" if us is None else describe_time(us) for us in times]),
            ("from", [listed.origin for listed, _ in rows]),
            ("age", [describe_age(listed.age) for listed, _ in rows]),
            ("", ["kernel changed: not used" if stale else "" for _, stale in rows]),
        ]
        if not any(columns[-1][1]):
            del columns[-1]
        if _width(columns) <= console.width:
            draw(console, columns, left=1)
            continue
        for row in range(len(rows)):
            key, constants, by, time, origin, age, *more = (cells[row] for _, cells in columns)
            console.print(key)
            told = [f"{by} {time}".strip(), origin, f"{age} old", *filter(None, more)]
            console.print(f"    {', '.join(told)}")
            console.print(f"    {constants}")


def describe_age(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
