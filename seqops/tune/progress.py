"""How far `seqops tune` is, on the standard error: a bar in a terminal, elsewhere one plain line for each candidate."""

from __future__ import annotations

import sys
from typing import Any

import click

from . import report, search

WORDS = {"compile": "compiling", "check": "checking", "time": "timing"}


class Progress:
    """A listener of `search.tune`, and the context in which it is one."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.percentage:.0f} %"))
            console = Console(stderr=True, markup=False, highlight=False, width=report.terminal_width())
            self.bar = Bar(*columns, TextColumn("{task.fields[note]}"), console=console, transient=True)
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, step: search.Step) -> None:
        if self.bar is not None:
            self._move(step)
        elif (line := plain(step)) is not None:
            click.echo(line, err=True)

    def _move(self, step: search.Step) -> None:
        if step.name not in WORDS:
            return
        state = step.timing
        words = f"{step.outcome.target.title}: {WORDS[step.name]} {step.done}/{step.total}"
        note, share = "", step.done / max(step.total, 1)
        if state is not None:
            best = "" if state.best is None else f"best {report.describe_time(state.best)}, "
            note, share = f"{best}{state.left:.0f} s left", state.share
        if self.task is None:
            self.task = self.bar.add_task(words, total=1.0, note=note)
        self.bar.update(self.task, description=words, completed=share, note=note)


def plain(step: search.Step) -> str | None:
    """The line of a candidate, once it is through or out; None before."""
    candidate, outcome = step.candidate, step.outcome
    if candidate is None:
        return None
    last = "timed" if outcome.untimed is None else "compile"
    if candidate.failed is not None:
        result = f"dropped: {first_line(candidate.reason)}"
    elif step.name != last:
        return None
    elif candidate.us is not None:
        spread = "" if candidate.spread is None else f", {report.plus_minus(sys.stderr)}{candidate.spread:.1%}"
        result = f"{report.describe_time(candidate.us)}{spread}, {candidate.runs} runs"
    elif candidate.report is not None:
        result = f"compiled, {candidate.report.registers} registers"
    else:
        return None
    where = f"{outcome.target.title} {step.done}/{step.total}"
    return f"{where}: {report.describe_constants(candidate.constants)}: {result}"


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]
