"""From which length on a sparse pattern is faster than attention over everything, on this machine.

    python -m bench.crossover [--op NAME ...] [--json FILE] [--pages]
    python -m bench.crossover --from FILE --pages

Every pattern of `patterns()` is timed beside SDPA without a mask, causal where the pattern is, over lengths that
double: blocks of calls in turn, ratios taken inside a round, medians over rounds. `--pages` writes the table of
docs/attention.md and docs/figures/crossover.svg. Values are not compared: the two compute different things.

A pattern's length is found between the last one at which it is slower and the next, on the line through the two in
logarithmic scales.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench import record, tables
from bench.attention_peers import Attention, Shape, build, dense
from bench.harness import FORWARD, OURS, TRAINING, Case, Settings, Stopwatch, make_block
from bench.tuner import table

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = Path(__file__).with_name("results") / "attention-epyc-2-cores.json"
SHAPE = Shape(1, 0, 8, 64)  # the length is each row's
LENGTHS = {FORWARD: (128, 256, 512, 1024, 2048, 4096, 8192), TRAINING: (128, 256, 512, 1024, 2048, 4096)}
SECONDS = 0.6  # for the rounds of one length
COLOURS = ("#3f7cc4", "#2f8f83", "#b3752a", "#a4558f", "#7a8b2e", "#c0504d", "#5b6bb5", "#8a6d3b")
Row = dict[str, Any]


@dataclass(frozen=True)
class Pattern:
    """An operator with its options: `make` gives the function of q, k, v for a length."""

    op: str
    words: str
    make: Callable[[int], Attention]
    causal: bool = True

    @property
    def name(self) -> str:
        return f"{self.op}, {self.words}"


def patterns() -> list[Pattern]:
    """One of each operator, as models use it."""
    import seqops

    def first(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[int], Attention]:
        """The same call for every length, of which o is returned."""

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            found = function(q, k, v, *arguments, **options)
            return found[0] if isinstance(found, tuple) else found

        return lambda steps: attend

    def routing(steps: int) -> Attention:
        size = 256
        clusters = max(1, steps // size)
        centroids = torch.randn(SHAPE.H, clusters, SHAPE.D, generator=torch.Generator().manual_seed(2))
        return first(seqops.routing_attention, centroids, size)(steps)

    def prob_sparse(steps: int) -> Attention:
        count = min(steps, 5 * math.ceil(math.log(steps)))
        samples = torch.randint(0, steps, (steps, count), generator=torch.Generator().manual_seed(2))
        return first(seqops.prob_sparse_attention, samples, count)(steps)

    return [
        Pattern("chunked_attention", "chunks of 256", first(seqops.chunked_attention, 256, causal=True)),
        Pattern("window_attention", "256 keys", first(seqops.window_attention, 255, 0)),
        Pattern(
            "block_diffusion_attention",
            "blocks of 32",
            first(seqops.block_diffusion_attention, 32),
            causal=False,
        ),
        *(
            Pattern("combiner_attention", f"{name}, blocks of 64", first(seqops.combiner_attention, 64, pattern=name))
            for name in ("fixed", "logsparse", "axial")
        ),
        Pattern("routing_attention", "T / 256 clusters, 256 keys", routing),
        Pattern("delta_attention", "a window of 128", first(seqops.delta_attention, 0.6, window=128)),
        Pattern("prob_sparse_attention", "5 ln T queries", prob_sparse, causal=False),
    ]


# ---- measuring


def measure(pattern: Pattern, mode: str, steps: int, watch: Stopwatch) -> Row:
    """Milliseconds of a call of ours and of SDPA, and the median ratio of the two in a round."""
    functions = {"SDPA": partial(dense, causal=pattern.causal), OURS: pattern.make(steps)}
    blocks = {name: make_block(CASE, build(SHAPE, run, SHAPE.dtype, steps), mode) for name, run in functions.items()}
    spent = {name: watch.estimate(block) for name, block in blocks.items()}
    calls = {name: max(1, math.ceil(2e-3 / each)) for name, each in spent.items()}
    rounds = min(max(3, int(SECONDS / sum(spent[name] * calls[name] for name in blocks))), 25)
    times = [
        {name: watch.seconds(block, calls[name]) / calls[name] for name, block in blocks.items()} for _ in range(rounds)
    ]
    return {
        "T": steps,
        "ours_ms": 1e3 * statistics.median(each[OURS] for each in times),
        "dense_ms": 1e3 * statistics.median(each["SDPA"] for each in times),
        "ratio": statistics.median(each["SDPA"] / each[OURS] for each in times),
    }


# What `make_block` asks of a case.
CASE = Case("crossover", "", {}, SHAPE.dtype, 0, {}, {}, {})


def crossover(lengths: list[Row]) -> float | None:
    """The length from which on every ratio is 1 or more; 0 where all are, None where the last one is not."""
    slower = [place for place, each in enumerate(lengths) if each["ratio"] < 1]
    if not slower:
        return 0.0
    if slower[-1] == len(lengths) - 1:
        return None
    below, above = lengths[slower[-1]], lengths[slower[-1] + 1]
    a, b = math.log(below["ratio"]), math.log(above["ratio"])
    share = -a / (b - a)
    return math.exp(math.log(below["T"]) + share * math.log(above["T"] / below["T"]))


def measure_all(chosen: list[Pattern]) -> Iterator[Row]:
    watch = Stopwatch()
    for pattern in chosen:
        for mode, lengths in LENGTHS.items():
            rows = [measure(pattern, mode, steps, watch) for steps in lengths]
            yield {
                "op": pattern.op,
                "name": pattern.name,
                "causal": pattern.causal,
                "mode": mode,
                "crossover": crossover(rows),
                "lengths": rows,
            }


# ---- pages


def describe(row: Row) -> str:
    if row["crossover"] is None:
        return f"above {row['lengths'][-1]['T']}"
    if row["crossover"] == 0:
        return f"below {row['lengths'][0]['T']}"
    digits = 10 ** (int(math.log10(row["crossover"])) - 1)
    return str(round(row["crossover"] / digits) * digits)  # two digits


def markdown(found: Row) -> str:
    names = dict.fromkeys(row["name"] for row in found["rows"])
    rows = []
    for name in names:
        of = {row["mode"]: row for row in found["rows"] if row["name"] == name}
        cells = []
        for mode in LENGTHS:
            row = of.get(mode)  # None: a run was cut off
            cells += ["", ""] if row is None else [describe(row), tables.format_ratio(row["lengths"][-1]["ratio"])]
        rows.append([name, "earlier keys" if of[FORWARD]["causal"] else "all keys", *cells])
    ends = [max(lengths) for lengths in LENGTHS.values()]
    head = [
        *("pattern", "SDPA sees"),
        *("forward: faster from T =", f"at T = {ends[0]}"),
        *("forward + backward: faster from T =", f"at T = {ends[1]}"),
    ]
    machine, shape = found["machine"], found["shape"]
    return (
        f"{table(head, rows)}\n\n{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, torch "
        f"{machine['versions']['torch']}; {', '.join(f'{name} = {size}' for name, size in shape.items())}, float32."
    )


def draw(found: Row, path: Path) -> None:
    """SDPA's time over ours against the length."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text, grid = "#7f8490", "#9aa0ab"
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "seqops", "font.size": 9})
    figure, panes = plt.subplots(1, 2, figsize=(9.4, 3.9), sharey=True)
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    for pane, mode in zip(panes, LENGTHS, strict=True):
        for row in found["rows"]:
            if row["mode"] == mode:
                place = names.index(row["name"])
                points = [(each["T"], each["ratio"]) for each in row["lengths"]]
                style = "-" if place < len(COLOURS) else "--"
                colour = COLOURS[place % len(COLOURS)]
                pane.plot(*zip(*points, strict=True), f"{style}o", color=colour, markersize=3, label=row["name"])
        pane.axhline(1, color=grid, linewidth=0.8)
        pane.set_xscale("log", base=2)
        pane.set_yscale("log")
        pane.set_xticks(LENGTHS[mode], [str(steps) for steps in LENGTHS[mode]])
        pane.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        pane.set_xlabel("T", color=text)
        pane.set_title(tables.MODE_TITLES[mode], color=text, fontsize=10)
        pane.tick_params(colors=text, which="both")
        for spine in pane.spines.values():
            spine.set_color(grid)
    panes[0].set_ylabel("SDPA's time / ours", color=text)
    handles, labels = panes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, labelcolor=text, loc="lower center", ncols=3, fontsize=8)
    figure.tight_layout(rect=(0, 0.05 * -(-len(names) // 3) + 0.02, 1, 1))
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # Matplotlib leaves spaces at the ends of lines.
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


@click.command(help=__doc__)
@click.option("--op", "ops", multiple=True, metavar="NAME", help="Only this operator; may be given several times.")
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True), help="Take the figures from this file.")
@click.option("--pages", is_flag=True, help="Write the table and the picture of the documentation.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
def main(ops: tuple[str, ...], path: Path | None, source: Path | None, pages: bool, threads: int | None) -> None:
    if source is not None:
        found = json.loads(source.read_text())
    else:
        threads = threads or Settings().threads
        torch.set_num_threads(threads)
        found = {"machine": record.describe_machine(threads), "shape": {"B": 1, "H": SHAPE.H, "D": SHAPE.D}, "rows": []}
        if path is not None and ops and path.exists():  # of the others what the file has
            found["rows"] = [row for row in json.loads(path.read_text())["rows"] if row["op"] not in ops]
        for row in measure_all([each for each in patterns() if not ops or each.op in ops]):
            found["rows"].append(row)
            ratios = ", ".join(f"{each['T']}: {each['ratio']:.2f}" for each in row["lengths"])
            click.echo(f"{row['name']}, {row['mode']}: {describe(row)} ({ratios})")
            if path is not None:  # a run may be cut off
                path.write_text(json.dumps(found, indent=1) + "\n")
    if pages:
        tables.insert(DOCS / "attention.md", markdown(found))
        draw(found, DOCS / "figures" / "crossover.svg")


if __name__ == "__main__":
    main()
