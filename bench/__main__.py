"""`python -m bench`: see the package's text."""

import difflib
import sys
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench import hardware, harness, modules, record, report, suite, tables

RESULTS = Path(__file__).with_name("results")


class Reporter:
    """A progress bar on a terminal; one line for each result elsewhere, so that a log shows where a run is."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.task = self.progress.add_task("starting", total=None)
        self.done = 0
        self.total = 0

    def __call__(self, event: str, value: Any) -> None:
        if event == "start":
            self.total = value
            self.progress.update(self.task, total=value)
        elif event == "stage":
            self.progress.update(self.task, description=value)
        else:
            self.done += 1
            self.progress.advance(self.task)
            if not self.console.is_terminal:
                click.echo(f"[{self.done}/{self.total}] {describe_result(value)}", err=True)


def describe_result(result: record.Result) -> str:
    if result.error:
        return f"{result.title}, {result.mode}: FAILED, {result.error}"
    ratios = [f"{tables.format_ratio(ratio['median'])} {peer}" for peer, ratio in result.ratios.items()]
    share = result.copy_fraction.get(harness.OURS)
    if result.step_seconds is not None:
        ratios.append(f"{tables.format_seconds(result.step_seconds)} a step")
    elif share is not None:
        ratios.append(f"{share:.0%} of copy")
    if not ratios and harness.OURS in result.seconds:
        ratios.append(tables.format_seconds(result.seconds[harness.OURS]["median"]))
    return f"{result.title}, {result.mode}: " + ", ".join(ratios)


def select(cases: list[harness.Case], wanted: tuple[str, ...]) -> list[harness.Case]:
    """The cases of the operators that `--op` names; all where it names none."""
    known = list(dict.fromkeys(case.op for case in cases))
    for op in wanted:
        if op not in known:
            near = difflib.get_close_matches(op, known, n=3, cutoff=0.4)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise click.BadParameter(f"no operator {op!r}; {hint}", param_hint="--op")
    return [case for case in cases if not wanted or case.op in wanted]


def on_device(device: str, cases: list[harness.Case]) -> list[harness.Case]:
    """The cases that run on a device. Ends the program, saying why, where there is no device or nothing to measure."""
    if device == harness.CUDA and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch finds no CUDA device here")
    cases = [case for case in cases if device in case.devices]
    if not cases:
        raise click.UsageError(f"--device {device}: no case of these operators runs there")
    if device in harness.BACKENDS:
        from seqops.core import backend

        served = [case for case in cases if harness.backends_for(case, device)]
        for op in sorted({case.op for case in cases} - {case.op for case in served}):
            reasons = "; ".join(
                f"{name}: {backend.reason_missing(op, name, device)}" for name in harness.BACKENDS[device]
            )
            click.echo(f"left out: {op}: {reasons}", err=True)
        if not served:
            raise click.UsageError(f"--device {device}: no backend of these operators works here")
        cases = sorted(served, key=lambda case: case.priority)  # a run may be cut off
    return cases


def parse_kernels(values: tuple[str, ...]) -> set[tuple[str, str, str]] | None:
    """(operator, backend, pass) of each; None where none is given."""
    found = set()
    for value in values:
        op, backend, step = value.split(":") if value.count(":") == 2 else ("", "", "")
        if backend not in hardware.BACKENDS or step not in hardware.PASSES:
            expected = f"OP:{'|'.join(hardware.BACKENDS)}:{'|'.join(hardware.PASSES)}"
            raise click.BadParameter(f"expected {expected}, got {value!r}", param_hint="--kernel")
        found.add((op, backend, step))
    return found or None


def list_cases(cases: list[harness.Case]) -> None:
    for case in cases:
        for mode in case.modes:
            goals = [f"{peer} >= {goal:g}x" for (peer, of), goal in case.goals.items() if of == mode]
            goals += [f"{case.copy_goals[mode]:g} of copy"] if mode in case.copy_goals else []
            goals += [f"<= {tables.format_seconds(case.time_goals[mode])}"] if mode in case.time_goals else []
            click.echo(f"{case.op:<6} {case.name}, {mode}  [{', '.join(goals) or 'no goal'}]")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this operator; may be given several times.")
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    metavar="OP:BACKEND:PASS",
    callback=lambda context, option, value: parse_kernels(value),
    help="Only what needs no other kernel, e.g. lstm:cuda:forward; may be given several times.",
)
@click.option("--quick", is_flag=True, help="Fewer rounds.")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the results."
)
@click.option("--html", "html_path", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the report.")
@click.option(
    "--markdown",
    "markdown_paths",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help=f"Page whose text between {tables.BEGIN} and {tables.END} becomes the table; may be given several times.",
)
@click.option(
    "--from",
    "sources",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Measure nothing; write the table and reports from this JSON file, with --op of some operators. Given several "
    "times: --markdown and --html from all of them.",
)
@click.option(
    "--suite",
    "suite_name",
    type=click.Choice([*harness.SUITES]),
    default=harness.OPERATORS,
    show_default=True,
    help="; ".join(f"{name}: {what}" for name, what in harness.SUITES.items()) + ".",
)
@click.option("--pages", is_flag=True, help="Write the modules' numbers into docs/modules.md and docs/nn.")
@click.option("--brief", is_flag=True, help="In --markdown the first case of each operator alone.")
@click.option("--device", type=click.Choice(harness.DEVICES), default=harness.CPU, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Threads of every contender. Default: all cores.")
@click.option("--list", "only_list", is_flag=True, help="Print the cases and their goals, measure nothing.")
def main(
    ops: tuple[str, ...],
    kernels: set[tuple[str, str, str]] | None,
    quick: bool,
    json_path: Path | None,
    html_path: Path | None,
    markdown_paths: tuple[Path, ...],
    sources: tuple[Path, ...],
    suite_name: str,
    pages: bool,
    brief: bool,
    device: str,
    threads: int | None,
    only_list: bool,
) -> None:
    """Measure every operator, or every module, beside what it replaces.

    Values are compared with a float64 reference first; a case that fails has no time, and the exit code is 1.
    Results go to bench/results/latest.json and latest.html unless --json or --html name another place; those of another
    suite to latest.SUITE.json and latest.SUITE.html.
    """
    for path in markdown_paths:
        try:
            tables.check_markdown(path)
        except ValueError as error:
            raise click.UsageError(f"--markdown: {error}") from None

    if len(sources) > 1 and json_path:
        raise click.UsageError("--json is of one run: --from of several files makes --markdown, --html and --pages")
    problems: list[str] = []
    if sources:
        records = [load(source, ops) for source in sources]
        for source, found in zip(sources, records, strict=True):
            try:
                record.check_fit(records[0], found)
            except ValueError as error:
                if html_path:
                    raise click.UsageError(f"--from: {source} does not fit {sources[0]}: {error}") from None
        if pages and not any(found.suite == harness.MODULES for found in records):
            raise click.UsageError(f"--pages: none of these files is a run of --suite {harness.MODULES}")
    else:
        if pages and suite_name != harness.MODULES:
            raise click.UsageError(f"--pages writes what --suite {harness.MODULES} measures")
        cases = on_device(device, select(harness.load_suite(suite_name), ops))
        if only_list:
            return list_cases(cases)
        name = "latest" if suite_name == harness.OPERATORS else f"latest.{suite_name}"
        json_path = json_path or RESULTS / f"{name}.json"
        settings = harness.Settings(
            **({"threads": threads} if threads else {}),
            quick=quick,
            memory=suite_name != harness.MODULES,
            device=device,
            suite=suite_name,
        )
        measured, problems = measure(cases, settings, json_path, kernels)
        records = [measured]
        html_path = html_path or RESULTS / f"{name}.html"

    for found in records:
        tables.print_record(found, Console())
    written = list(markdown_paths)
    for path in markdown_paths:
        tables.update_markdown(path, *records, brief=brief)
    if json_path:
        records[0].save(json_path)
        written.append(json_path)
    if html_path:
        report.write_html(html_path, *records)
        written.append(html_path)
    if pages:
        written += modules.update_pages(records)
    for path in written:
        click.echo(f"wrote {path}")
    for problem in problems:
        click.echo(problem, err=True)
    if problems or any(result.error for found in records for result in found.results):
        sys.exit(1)


def load(source: Path, ops: tuple[str, ...]) -> record.Record:
    """A record of an earlier run, of the operators that `--op` names."""
    try:
        found = record.load(source)
    except ValueError as error:
        raise click.UsageError(f"--from: {error}") from None
    found.results = [result for result in found.results if not ops or result.op in ops]
    return found


def measure(
    cases: list[harness.Case],
    settings: harness.Settings,
    path: Path,
    kernels: set[tuple[str, str, str]] | None = None,
) -> tuple[record.Record, list[str]]:
    """Runs the suite with a progress bar. Returns the record, and what went wrong outside of any case.

    Args:
        path: where the record goes.
        kernels: see `suite.Suite`.

    On a GPU, where a run may be cut off, the record is also written after each result.
    """
    reporter = Reporter()

    def report_and_keep(event: str, value: Any) -> None:
        reporter(event, value)
        if event == "result" and settings.device != harness.CPU and "rates" in vars(measured):
            record.make_record(settings, measured.rates, measured.results).save(path)

    measured = suite.Suite(cases, settings, report_and_keep, kernels)
    if not measured.measurements:
        raise click.UsageError("--kernel: no case of these operators runs on these kernels alone")
    with reporter.progress:
        code = suite.run(measured)
    problems = measured.problems
    if code not in (0, 1) and not problems:
        problems.append(f"pytest ended with code {code}" + (" (interrupted)" if code == 2 else ""))
    if not measured.results:
        raise click.ClickException("nothing was measured\n" + "\n".join(problems))
    return record.make_record(settings, measured.rates, measured.results), problems


if __name__ == "__main__":
    main(prog_name="python -m bench")
