"""The constraint solver against OR-Tools CP-SAT with one worker, on the problems of `bench/csp_problems.py`.

    python -m bench.csp [--json FILE] [--page FILE] [--rounds 9] [--goals]

Both state the problem and prove its minimum, from nothing, in one process: ours, theirs, ours, theirs, ... so that a
load that comes and goes meets both. CP-SAT's time starts with the expressions already made (a third of a millisecond
that ours includes). A row exists only if both have proven the same minimum and both solutions solve the problem.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ortools

from bench import cp_sat, csp_problems

BEGIN = "<!-- solver:begin -->"
END = "<!-- solver:end -->"
ROUNDS = 9
# The goal for the two problems of `csp_problems.GOALS`, building included.
GOAL_MS = 50.0


def measure(shape: csp_problems.Shape, rounds: int = ROUNDS) -> dict[str, Any]:
    """One problem as a plain row: medians in milliseconds, the ratio CP-SAT / ours of each round, nodes, the minimum.

    Raises:
        AssertionError: the two disagree.
    """
    ours, peers, building, peer_building = [], [], [], []
    solution = None
    nodes = 0
    for _ in range(rounds):
        began = time.perf_counter()
        p = csp_problems.recurrent(shape)
        built = time.perf_counter()
        solution = p.solve(seconds=60)
        ours.append(time.perf_counter() - began)
        building.append(built - began)
        nodes = p.statistics.nodes
        assert solution is not None and p.statistics.optimal

        began = time.perf_counter()
        model = cp_sat.Model(p)
        built = time.perf_counter()
        status, theirs, cost = cp_sat.solve(model)
        peers.append(time.perf_counter() - began)
        peer_building.append(built - began)
        assert status == "OPTIMAL" and theirs is not None
        assert p.check(solution) is None and p.check(theirs) is None
        assert abs(p.cost(solution) - cost) <= 1e-9 * abs(cost), (p.cost(solution), cost)
    ratios = sorted(peer / mine for peer, mine in zip(peers, ours, strict=True))
    return {
        "problem": str(shape),
        "variables": len(p.variables),
        "constraints": len(p.constraints),
        "ms": 1e3 * statistics.median(ours),
        "build_ms": 1e3 * statistics.median(building),
        "peer_ms": 1e3 * statistics.median(peers),
        "peer_build_ms": 1e3 * statistics.median(peer_building),
        "ratio": statistics.median(ratios),
        "ratio_p20": ratios[int(0.2 * (rounds - 1))],
        "ratio_p80": ratios[-1 - int(0.2 * (rounds - 1))],
        "nodes": nodes,
        "cost_us": p.cost(solution),
        "goal_ms": GOAL_MS if shape in csp_problems.GOALS else None,
        "rounds": rounds,
    }


def run(
    shapes: Sequence[csp_problems.Shape], rounds: int = ROUNDS, report: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """All rows, with what a page says about them."""
    # The first use of each pays for imports and its pages of code.
    csp_problems.recurrent(shapes[0]).solve(seconds=60)
    cp_sat.solve(cp_sat.Model(csp_problems.recurrent(shapes[0])))
    rows = []
    for shape in shapes:
        rows.append(measure(shape, rounds))
        if report:
            report(rows[-1])
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "ortools": ortools.__version__,
        "machine": describe_processor(),
        "rows": rows,
    }


def describe_processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


HEAD = ("problem", "ours", "CP-SAT", "ratio", "20-80 %", "nodes", "minimum")


def cells(row: dict[str, Any]) -> list[str]:
    goal = row["goal_ms"]
    verdict = "" if goal is None else f" (goal {goal:.0f})" if row["ms"] <= goal else f" (goal {goal:.0f}, missed)"
    return [
        row["problem"],
        f"{row['ms']:.1f} ms{verdict}",
        f"{row['peer_ms']:.1f} ms",
        f"{row['ratio']:.2f}x",
        f"{row['ratio_p20']:.2f}-{row['ratio_p80']:.2f}",
        str(row["nodes"]),
        f"{row['cost_us']:.0f} µs",
    ]


def summarise(record: dict[str, Any]) -> str:
    rows = record["rows"]
    ratios = sorted(row["ratio"] for row in rows)
    return (
        f"{rows[0]['variables']} variables, {rows[0]['constraints']} constraints each; median ratio "
        f"{statistics.median(ratios):.2f}x, least {ratios[0]:.2f}x; slowest {max(row['ms'] for row in rows):.0f} ms. "
        f"{record['machine']}, Python {record['python']}, OR-Tools {record['ortools']}, one worker; "
        f"{rows[0]['rounds']} rounds, {record['date'][:10]}"
    )


def markdown_table(record: dict[str, Any]) -> str:
    """The table of a page."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 1)), *(cells(row) for row in record["rows"])]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"{table}\n\n{summarise(record)}. Ratios above 1: ours is faster."


def update_page(path: Path, record: dict[str, Any]) -> None:
    """Replaces what stands between the two markers of a page.

    Raises:
        ValueError: the page has no pair of markers.
    """
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{path}: expected one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{markdown_table(record)}\n\n{END}{after}")


def render(row: dict[str, Any]) -> str:
    widths = (16, 20, 10, 7, 12, 6, 9)
    return "".join(
        f"{cell:<{width}}" if i == 0 else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(cells(row), widths, strict=True))
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.csp", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the table between the markers of this page")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default {ROUNDS}")
    parser.add_argument("--goals", action="store_true", help="only the problems that a goal is stated for")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    shapes = csp_problems.GOALS if options.goals else csp_problems.SHAPES
    record = run(shapes, options.rounds, lambda row: print(render(row), flush=True))
    print(summarise(record))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.page:
        update_page(options.page, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
