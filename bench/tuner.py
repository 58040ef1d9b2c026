"""The tuner's own figures: how fast problems are solved, and how good the first choice is.

    python -m bench.tuner [--json FILE] [--quick]     measure, and write a file for the pages
    python -m bench.tuner --from FILE --pages          write the tables and the picture of the documentation
    python -m bench.tuner --from FILE --solve --json FILE --pages    the problems anew, since one changed

Every kernel's own problem is solved here, on every preset; every plan of the CPU's recurrent kernels, predicted and
measured, comes from bench/tune_quality.py. The solver beside another one: bench/csp.py.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch

from bench import record, tables, tune_quality
from seqops.tune import device
from seqops.tune.target import Target, targets

RESULTS = Path(__file__).with_name("results") / "tuner-epyc-2-cores.json"
DOCS = Path(__file__).parent.parent / "docs"
REPEATS = 3

Row = dict[str, Any]


# ---- the kernels' problems


def keys_of(target: Target, machine: Any) -> Iterator[Any]:
    """Those that tests compile, else the default shape in every dtype and a few batches."""
    keys = [*target.keys()]
    if keys:
        yield from keys
        return
    shape = {flag.key: flag.default for flag in target.flags}
    for dtype in target.dtypes:
        for batch in (1, 16, 64):
            yield target.key({**shape, "batch": batch}, dtype, machine)


def solve_rows(quick: bool) -> Iterator[Row]:
    """For each kernel, all its problems on all presets: the best of three times, model building included."""
    for target in targets():
        machines = [device.host()] if target.backend == "cpu" else [*map(device.find, device.PRESETS)]
        times, nodes, sizes = [], [], []
        for machine in machines:
            for key in [*keys_of(target, machine)][:: 7 if quick else 1]:
                found = []
                for _ in range(REPEATS):
                    start = time.perf_counter()
                    problem = target.tunable.problem(machine, key)
                    solution = problem.solve()
                    found.append(1e3 * (time.perf_counter() - start))
                    assert solution is not None, problem.explain()
                times.append(min(found))
                nodes.append(problem.statistics.nodes)
                sizes.append((len(problem.variables), len(problem.constraints)))
        yield {
            "kernel": target.tunable.name,
            "problems": len(times),
            "variables": max(size[0] for size in sizes),
            "constraints": max(size[1] for size in sizes),
            "median_ms": statistics.median(times),
            "worst_ms": max(times),
            "nodes": max(nodes),
        }


def rounded(value: Any) -> Any:
    """The same with five digits: there are some thousand times in it."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list) else value


# ---- pages


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def measured_on(found: Row) -> str:
    machine = found["machine"]
    return f"Measured on {machine['cpu']}, {machine['cores']} cores, Python {machine['versions']['python']}"


def quality_table(found: Row) -> str:
    """For docs/tuning.md: one line for an operator and direction."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for each in found["quality"]["rows"]:
        groups.setdefault((each["op"], each["direction"], each["dtype"]), []).append(each)
    rows = []
    for (op, direction, dtype), members in groups.items():
        ratios = [each["ratio"] for each in members]
        correlations = [each["rank_correlation"] for each in members if each["rank_correlation"] is not None]
        rows.append(
            [
                f"{op} {direction}, {dtype}",
                str(len(members)),
                str(sum(len(each["candidates"]) for each in members)),
                f"{statistics.median(ratios):.2f}",
                f"{max(ratios):.2f}",
                f"{statistics.median(correlations):.2f}" if correlations else "",
            ]
        )
    head = ["kernel on the CPU", "shapes", "plans timed", "first choice / best, median", "worst", "rank correlation"]
    total = found["quality"]["summary"]
    text = (
        f"{measured_on(found)}, {found['quality']['host']['threads']} threads. Over all {total['rows']} rows the first "
        f"choice takes {total['ratio']['median']:.2f} times the best plan's time in the median, "
        f"{total['ratio']['p90']:.2f} at 90 %."
    )
    solves = [
        [
            each["kernel"],
            str(each["problems"]),
            f"{each['variables']}, {each['constraints']}",
            f"{each['median_ms']:.1f} ms",
            f"{each['worst_ms']:.1f} ms",
            str(each["nodes"]),
        ]
        for each in found["solves"]
    ]
    solve_head = ["problem", "solved", "variables, constraints", "median", "worst", "nodes, at most"]
    solve_text = "Each the best of three, model building included; GPU kernels on all presets."
    return f"{table(head, rows)}\n\n{text}\n\n{table(solve_head, solves)}\n\n{solve_text}"


def draw(found: Row, path: Path) -> None:
    """Predicted against measured time of every plan, and the model's first choices among them."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text, grid = "#7f8490", "#9aa0ab"
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "seqops", "font.size": 9})
    figure, panes = plt.subplots(1, 2, figsize=(8.4, 3.9), sharex=True, sharey=True)
    for pane, direction in zip(panes, ("forward", "backward"), strict=True):
        rows = [each for each in found["quality"]["rows"] if each["direction"] == direction]
        plans = [(plan["predicted_us"], plan["measured_us"]) for each in rows for plan in each["candidates"]]
        choices = [(each["candidates"][0]["predicted_us"], each["choice_us"]) for each in rows]
        pane.plot(*zip(*plans, strict=True), ".", color="#3f7cc4", alpha=0.35, markersize=4, label="a plan")
        pane.plot(*zip(*choices, strict=True), ".", color="#b3752a", markersize=5, label="the model's first choice")
        ends = [min(min(each) for each in plans), max(max(each) for each in plans)]
        pane.plot(ends, ends, color=grid, linewidth=0.8, label="equal")
        pane.set(xscale="log", yscale="log", xlabel="predicted, microseconds")
        pane.set_title(direction, color=text, fontsize=10)
        pane.xaxis.label.set_color(text)
        pane.tick_params(colors=text, which="both")
        for spine in pane.spines.values():
            spine.set_color(grid)
    panes[0].set_ylabel("measured, microseconds", color=text)
    panes[0].legend(frameon=False, labelcolor=text, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def write_pages(found: Row) -> None:
    tables.insert(DOCS / "tuning.md", quality_table(found))
    draw(found, DOCS / "figures" / "tuning.svg")


@click.command(help=__doc__)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True), help="Take figures from this file.")
@click.option("--solve", is_flag=True, help="With --from: solve the problems anew, and keep the other figures.")
@click.option("--pages", is_flag=True, help="Write the tables and the picture of the documentation.")
@click.option("--quick", is_flag=True, help="Fewer problems and shapes.")
@click.option("--threads", default=2, show_default=True, help="Of the CPU kernels.")
def main(path: Path | None, source: Path | None, solve: bool, pages: bool, quick: bool, threads: int) -> None:
    if solve and source is None:
        raise click.UsageError("--solve keeps the other figures of a file: name it with --from")
    if source is not None:
        found = json.loads(source.read_text())
        if solve:
            found["solves"] = [*solve_rows(quick)]
    else:
        torch.set_num_threads(threads)
        found = {"machine": record.describe_machine(threads)}
        found["solves"] = [*solve_rows(quick)]
        quality = [*tune_quality.rows(quick, threads)]
        host = {name: value for name, value in vars(device.host(threads)).items() if name != "origin"}
        found["quality"] = {"host": host, "summary": tune_quality.summary(quality), "rows": quality}
        for each in found["solves"]:
            click.echo(json.dumps(each))
        click.echo(json.dumps(found["quality"]["summary"]))
    if path is not None:
        path.write_text(json.dumps(rounded(found)) + "\n")
    if pages:
        write_pages(found)


if __name__ == "__main__":
    main()
