"""The results as a table: in the terminal, in a pipe, and between two markers of a Markdown page."""

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from bench import harness
from bench.record import QUANTITIES, Record, Result, find_misses, memory_ratio

BEGIN = "<!-- bench:begin -->"
END = "<!-- bench:end -->"
MODE_TITLES = {
    harness.FORWARD: "forward",
    harness.TRAINING: "forward + backward",
    harness.BACKWARD: "backward alone",
    harness.INFERENCE: "inference mode",
}


def format_seconds(seconds: float) -> str:
    """Three digits and a unit."""
    units = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))
    unit, size = next((pair for pair in units if seconds >= 0.9995 * pair[1]), units[-1])
    value = seconds / size
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"


def format_ratio(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 99.5 else f"{ratio:.1f}x" if ratio >= 9.995 else f"{ratio:.2f}x"


def format_bytes(size: int) -> str:
    megabytes = size / (1 << 20)
    return f"{megabytes:.0f} MB" if megabytes >= 9.5 else f"{megabytes:.1f} MB"


def format_shares(shares: dict[str, float], peer: str | None) -> str:
    return " / ".join(f"{shares[name]:.0%}" for name in (harness.OURS, peer) if name in shares).replace("%", "")


def format_step(result: Result) -> str:
    """Ours by the step, beside the least that a step can take by estimate."""
    if result.step_seconds is None:
        return ""
    floor = "" if result.step_floor is None else f" (floor {format_seconds(result.step_floor)})"
    return format_seconds(result.step_seconds) + floor


LEFT = ("case", "mode", "against")
NUMBERS = (
    *("ours", "time goal", "a step", "peer", "ratio", "goal"),
    *("20-80 %", "memory ours / peer", "GEMM %", "copy %"),
)
# What a narrow terminal does without, first to last; the report has it all.
SPARED = ("copy %", "GEMM %", "20-80 %", "memory ours / peer", "a step", "time goal", "goal")


def make_row(result: Result, peer: str | None) -> dict[str, str]:
    """The cells of one case, mode and peer, by column; markup where the goal is met or missed. None: without a peer."""
    spent, limit = result.seconds[harness.OURS]["median"], result.time_goal
    colour = "" if limit is None else "[green]" if spent <= limit else "[red]"
    ours = {
        "case": result.title,
        "mode": result.mode,
        "ours": colour + format_seconds(spent),
        "time goal": "" if limit is None else format_seconds(limit),
        "a step": format_step(result),
    }
    if peer is None:
        return {
            **ours,
            "GEMM %": format_shares(result.gemm_fraction, None),
            "copy %": format_shares(result.copy_fraction, None),
        }
    ratio, goal = result.ratios[peer], result.goals.get(peer)
    colour = "" if goal is None else "[green]" if ratio["median"] >= goal else "[red]"
    weighed = harness.OURS in result.memory and peer in result.memory
    return {
        **ours,
        "against": peer,
        "peer": format_seconds(result.seconds[peer]["median"]),
        "ratio": f"{colour}{format_ratio(ratio['median'])}",
        "goal": "" if goal is None else f"{goal:.3g}x",
        "20-80 %": f"{ratio['p20']:.2f}-{ratio['p80']:.2f}",
        "memory ours / peer": " / ".join(format_bytes(result.memory[name]) for name in (harness.OURS, peer))
        if weighed
        else "",
        "GEMM %": format_shares(result.gemm_fraction, peer),
        "copy %": format_shares(result.copy_fraction, peer),
    }


def make_table(results: Iterable[Result], columns: Sequence[str], **style: object) -> Table:
    """One row for each case, mode and peer; a case with wrong values has one row without numbers. Columns of what no
    result has are left out.
    """
    results = list(results)
    filled = {"time goal": any(result.time_goal is not None for result in results)}
    filled["a step"] = any(result.steps is not None for result in results)
    columns = [title for title in columns if filled.get(title, True)]
    table = Table(pad_edge=False, **style)
    for title in columns:
        table.add_column(title, justify="left" if title in LEFT else "right", no_wrap=title != "case")
    for result in results:
        if result.error:
            failed = {"case": result.title, "mode": result.mode, "ours": "[red]FAILED"}
            table.add_row(*(failed.get(title, "") for title in columns))
        elif result.seconds:
            for peer in result.ratios or (None,):
                row = make_row(result, peer)
                table.add_row(*(row.get(title, "") for title in columns))
    return table


def render(results: Iterable[Result]) -> str:
    """The table as plain text, for a pipe or a log."""
    target = io.StringIO()
    Console(file=target, width=240, color_system=None).print(make_table(results, (*LEFT, *NUMBERS), box=None))
    return "".join(line.rstrip() + "\n" for line in target.getvalue().splitlines())


def print_table(results: Sequence[Result], console: Console) -> None:
    """The table in colour, with as many columns as the terminal has room for."""
    columns = [*LEFT, *NUMBERS]
    for spared in ("", *SPARED):
        columns = [title for title in columns if title != spared]
        table = make_table(results, columns, box=box.SIMPLE_HEAD)
        if Measurement.get(console, console.options.update_width(1000), table).maximum <= console.width:
            break
    console.print(table)


def describe(record: Record) -> str:
    """One line on what was measured, where and when."""
    machine, commit = record.machine, record.commit
    if "gpu" in machine:
        product = f"matrix product {record.rates['gemm'] / 1e12:.0f} TFLOP/s (bfloat16)"
        machine = {**machine, "cpu": f"{machine['gpu']}, {machine['cpu']}"}
    else:
        product = f"matrix product {record.rates['gemm'] / 1e9:.0f} GFLOP/s"
    changed = " with changes" if commit["dirty"] else ""
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, kernels {machine['seqops_isa']}, "
        f"torch {machine['versions']['torch']} ({machine['torch_isa']}), Python {machine['versions']['python']}; "
        f"{product}, copy {record.rates['copy'] / 1e9:.0f} GB/s; "
        f"commit {commit['id'][:10]}{changed}, {record.date[:10]}"
    )


def summarise(record: Record) -> str:
    """How many goals were met."""
    failed = sum(result.error is not None for result in record.results)
    timed = [result for result in record.results if not result.error]
    # A goal against something that this machine lacks is neither met nor missed.
    goals = sum(len(result.goals.keys() - result.absent.keys()) for result in timed)
    goals += sum((result.copy_goal is not None) + (result.time_goal is not None) for result in timed)
    missed = [miss for miss in find_misses(record) if miss.quantity != "memory"]
    parts = [f"{goals - len(missed)} of {goals} goals met" if goals else "no goals"]
    heavier = sum(miss.quantity == "memory" for miss in find_misses(record))
    if heavier:
        parts.append(f"{heavier} training steps larger than the peer's")
    if failed:
        parts.append(f"{failed} cases failed, not timed")
    return ", ".join(parts)


def print_record(record: Record, console: Console) -> None:
    """The table and what needs saying about it; plain text unless `console` is a terminal."""
    if console.is_terminal:
        print_table(record.results, console)
    else:
        console.file.write(render(record.results))
    lines = [f"failed: {result.title}, {result.mode}: {result.error}" for result in record.results if result.error]
    absent = {(result.op, *pair) for result in record.results for pair in result.absent.items()}
    lines += [f"absent: {op}, {peer}: {reason}" for op, peer, reason in sorted(absent)]
    for miss in find_misses(record):
        what = QUANTITIES[miss.quantity]
        cause = f": {miss.cause}" if miss.cause else ""
        if miss.quantity == "seconds":
            reached = f"{format_seconds(miss.value)} for {format_seconds(miss.goal)}"
        else:
            what = f"{what} against {miss.peer}"
            reached = f"{miss.value:.2f} for {miss.goal:g}"
        lines.append(f"missed: {miss.result.title}, {miss.result.mode}, {what}: {reached}{cause}")
    lines += [summarise(record), describe(record)]
    console.file.write("\n".join(lines) + "\n")


def markdown_cells(result: Result | None, peer: str) -> list[str]:
    """Times and ratio of one mode; blank where it was not measured. Without a peer, which is "", ours alone."""
    if result is None:
        return ["", ""]
    if result.error:
        return ["failed", ""]
    if peer not in result.ratios:
        return ["" if peer else format_seconds(result.seconds[harness.OURS]["median"]), ""]
    ratio, goal = result.ratios[peer]["median"], result.goals.get(peer)
    times = " / ".join(format_seconds(result.seconds[name]["median"]) for name in (harness.OURS, peer))
    text = f"**{format_ratio(ratio)}**"
    if goal is not None:
        text += f" (goal {goal:.3g}x)" if ratio >= goal else f" (goal {goal:.3g}x, missed)"
    return [times, text]


def markdown_rows(results: Sequence[Result]) -> Iterator[list[str]]:
    """One row for each case and peer, and one more for each mode that has no columns."""
    cases = dict.fromkeys(result.title for result in results)
    for case in cases:
        modes = {result.mode: result for result in results if result.title == case}
        peers = dict.fromkeys(peer for result in modes.values() for peer in (*result.goals, *result.ratios)) or [""]
        training = modes.get(harness.TRAINING)
        for peer in peers:
            ratio = training and memory_ratio(training, peer)
            memory = ""
            if ratio:
                memory = " / ".join(format_bytes(training.memory[name]) for name in (harness.OURS, peer))
            cells = [
                cell for mode in (harness.FORWARD, harness.TRAINING) for cell in markdown_cells(modes.get(mode), peer)
            ]
            if any(cells):
                yield [case, peer, *cells, memory]
            for mode in (harness.BACKWARD, harness.INFERENCE):
                if mode in modes and (modes[mode].error or not peer or peer in modes[mode].ratios):
                    yield [f"{case}, {MODE_TITLES[mode]}", peer, *markdown_cells(modes[mode], peer), "", "", ""]


def first_cases(results: Sequence[Result]) -> list[Result]:
    """Of each operator the first case, which is the one that most users meet, in the modes that have columns."""
    first: dict[str, str] = {}
    shown = [result for result in results if result.mode in (harness.FORWARD, harness.TRAINING)]
    return [result for result in shown if first.setdefault(result.op, result.title) == result.title]


def markdown_table(*records: Record, brief: bool = False) -> str:
    """The table for README and the documentation, with a line below it, for each run, that says what was measured.

    Args:
        brief: the first case of each operator alone.
    """
    head = [
        "case",
        "against",
        "forward: ours / peer",
        "ratio",
        "forward + backward: ours / peer",
        "ratio",
        "memory of a step",
    ]
    results = [result for record in records for result in record.results]
    results = first_cases(results) if brief else results
    lines = [head, ["---", "---", "---:", "---:", "---:", "---:", "---:"], *markdown_rows(results)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    runs = "\n\n".join(f"{of_run(record, len(records))}{describe(record)}." for record in records)
    return f"{table}\n\n{runs} Ratios above 1: ours is faster."


def of_run(record: Record, runs: int) -> str:
    """Which operators a run measured, where there are several runs."""
    return "" if runs == 1 else ", ".join(f"`{op}`" for op in dict.fromkeys(r.op for r in record.results)) + ": "


def update_markdown(path: Path, *records: Record, brief: bool = False) -> None:
    """Replaces what stands between the two markers of a page by the table; a page that does not exist is made.

    Raises:
        ValueError: the page has no pair of markers.
    """
    insert(path, markdown_table(*records, brief=brief))


def insert(path: Path, text: str) -> None:
    """Replaces what stands between the two markers of a page; see `update_markdown`."""
    check_markdown(path)
    before, _, rest = (path.read_text() if path.exists() else f"{BEGIN}\n{END}\n").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def check_markdown(path: Path) -> None:
    """Raises what `update_markdown` would, without writing."""
    if path.exists():
        text = path.read_text()
        if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
            raise ValueError(f"{path}: expected one line {BEGIN} and after it one line {END}")
