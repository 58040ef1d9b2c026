"""How far weights that learn drift over 32K tokens, by what the state is kept in between chunks.

    python -m bench.drift [--tokens N] [--json FILE] [--pages]
    python -m bench.drift --from FILE --pages

A sequence is read chunk by chunk, its state carried by hand, in float64 and beside it in other ways (see `WAYS`), all
on the same values, which bfloat16 holds exactly. What is compared is therefore arithmetic alone: the relative root mean
square error of the state, and of a chunk's outputs, whenever the number of tokens has doubled. `--pages` writes the
table of docs/ttt.md and docs/figures/drift.svg.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench import record, tables
from bench.harness import Settings, relative_error
from bench.tuner import table

DOCS = Path(__file__).parent.parent / "docs"
TOKENS = 32768
COLOURS = ("#3f7cc4", "#2f8f83", "#b3752a", "#a4558f")
Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """Of calling an operator: the dtypes of sequences, and of the state between two calls; how it begins."""

    name: str
    sequences: torch.dtype
    state: torch.dtype
    moved: float = 0.0  # the first weights, relatively


EXACT = Way("float64", torch.float64, torch.float64)
WAYS = (
    Way("float32", torch.float32, torch.float32),
    Way("bfloat16, state in float32", torch.bfloat16, torch.float32),
    Way("bfloat16, state in bfloat16", torch.bfloat16, torch.bfloat16),
    Way("float64, first weights moved by 1e-7", torch.float64, torch.float64, 1e-7),
)


@dataclass(frozen=True)
class Memory:
    """One operator with options: `first` makes the state, `call` takes a chunk's sequences and the state."""

    name: str
    C: int
    first: Callable[[torch.Generator], list[Tensor]]
    call: Callable[[dict[str, Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]
    rates: tuple[int, ...] = ()
    rate: float = 0.01
    D: int = 64
    H: int = 2

    def chunk(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Sequences of one chunk that bfloat16 holds exactly; keys and queries of length 1."""
        shape = (1, self.C, self.H)
        drawn = {name: torch.randn(*shape, self.D, generator=generator) for name in "qkv"}
        for name in "qk":
            drawn[name] /= drawn[name].norm(dim=-1, keepdim=True)
        drawn["lr"] = self.rate * torch.rand(*shape, *self.rates, generator=generator)
        drawn["momentum"] = 0.9 * torch.rand(shape, generator=generator)
        drawn["decay"] = 0.002 * torch.rand(shape, generator=generator)
        return {name: values.bfloat16().double() for name, values in drawn.items()}


def memories() -> list[Memory]:
    import seqops

    def weights(generator: torch.Generator, *shapes: tuple[int, int]) -> list[Tensor]:
        drawn = [torch.randn(1, 2, *shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]
        return [w.bfloat16().double() for w in drawn] + [torch.zeros_like(w).double() for w in drawn]

    def large(optimizer: str, given: dict[str, Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        sequences = [given[name] for name in ("q", "k", "v")]
        options = {"momentum": given["momentum"], "momentum_state": state[3:], "optimizer": optimizer}
        o, *state = seqops.large_chunk_ttt(*sequences, *state[:3], given["lr"], 1024, **options)
        return o, state

    def small(given: dict[str, Tensor], state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        layers = len(state) // 2
        options = {"momentum_state": state[layers:], "decay": given["decay"], "momentum": given["momentum"]}
        sequences = [given[name] for name in ("q", "k", "v", "lr")]
        o, learnt, sums = seqops.neural_memory(*sequences, state[:layers], 64, **options)
        return o, [*learnt, *sums]

    def swiglu(generator: torch.Generator) -> list[Tensor]:
        return weights(generator, (96, 64), (64, 96), (96, 64))

    return [
        Memory("large_chunk_ttt", 1024, swiglu, partial(large, "gd"), (3,)),
        Memory("large_chunk_ttt, muon", 1024, swiglu, partial(large, "muon"), (3,)),
        Memory("neural_memory, linear", 64, lambda g: weights(g, (64, 64)), small, rate=0.1),
        Memory("neural_memory, MLP", 64, lambda g: weights(g, (256, 64), (64, 256)), small, rate=0.1),
    ]


# ---- measuring


def measure(memory: Memory, tokens: int) -> Iterator[Row]:
    """A row for each way, whenever the number of tokens has doubled."""
    generator = torch.Generator().manual_seed(0)
    first = memory.first(generator)
    noise = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in first]
    states = {
        way: [(w * (1 + way.moved * n)).to(way.state) for w, n in zip(first, noise, strict=True)]
        for way in (EXACT, *WAYS)
    }
    shown = 1024
    for read in range(memory.C, tokens + 1, memory.C):
        values = memory.chunk(generator)
        outputs = {}
        for way, state in states.items():
            gates = torch.float32 if way.sequences == torch.bfloat16 else way.sequences
            given = {name: v.to(way.sequences if name in "qkv" else gates) for name, v in values.items()}
            outputs[way], after = memory.call(given, state)
            states[way] = [w.to(way.state) for w in after]
        if read < shown:
            continue
        shown *= 2
        for way in WAYS:
            errors = [
                relative_error(got.double(), exact) for got, exact in zip(states[way], states[EXACT], strict=True)
            ]
            yield {
                **{"name": memory.name, "way": way.name, "tokens": read, "state": max(errors)},
                "outputs": relative_error(outputs[way].double(), outputs[EXACT]),
            }


# ---- pages


def markdown(found: Row) -> str:
    names = dict.fromkeys(row["name"] for row in found["rows"])
    last = max(row["tokens"] for row in found["rows"])
    shown = {(row["name"], row["way"], row["tokens"]): row for row in found["rows"]}
    rows = []
    for name in names:
        for way in WAYS:
            ends = [shown[name, way.name, tokens] for tokens in (1024, last)]
            rows.append([name, way.name, *(f"{row[what]:.1e}" for what in ("state", "outputs") for row in ends)])
    thousands = [f"{tokens // 1024}K" for tokens in (1024, last)]
    head = ["operator", "computed in", *(f"{what}, {t} tokens" for what in ("state", "outputs") for t in thousands)]
    machine = found["machine"]
    return (
        f"{table(head, rows)}\n\n{machine['cpu']}, kernels {machine['seqops_isa']}. Relative errors against float64: "
        "of the state the worst matrix, of the outputs the chunk that ends there."
    )


def draw(found: Row, path: Path) -> None:
    """The state's error against the number of tokens."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    text, grid = "#7f8490", "#9aa0ab"
    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "seqops", "font.size": 9})
    names = list(dict.fromkeys(row["name"] for row in found["rows"]))
    figure, panes = plt.subplots(1, len(names), figsize=(9.4, 3.2), sharey=True)
    for pane, name in zip(panes, names, strict=True):
        for way, colour in zip(WAYS, COLOURS, strict=False):
            rows = [row for row in found["rows"] if row["name"] == name and row["way"] == way.name]
            points = [row["tokens"] for row in rows], [row["state"] for row in rows]
            pane.plot(*points, "-o", color=colour, markersize=3, label=way.name)
        pane.set_xscale("log", base=2)
        pane.set_yscale("log")
        ticks = sorted({row["tokens"] for row in found["rows"]})[::2]
        pane.set_xticks(ticks, [f"{tokens // 1024}K" for tokens in ticks])
        pane.set_title(name.replace(", ", ",\n"), color=text, fontsize=9)
        pane.set_xlabel("tokens", color=text)
        pane.tick_params(colors=text, which="both")
        for spine in pane.spines.values():
            spine.set_color(grid)
    panes[0].set_ylabel("error of the state", color=text)
    figure.legend(*panes[0].get_legend_handles_labels(), frameon=False, labelcolor=text, loc="lower center", ncols=2)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # Matplotlib leaves spaces at the ends of lines.
    path.write_text("".join(line.rstrip() + "\n" for line in path.read_text().splitlines()))


@click.command(help=__doc__)
@click.option("--tokens", type=click.IntRange(min=2048), default=TOKENS, show_default=True)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write the figures to this file.")
@click.option("--from", "source", type=click.Path(path_type=Path, exists=True), help="Take the figures from this file.")
@click.option("--pages", is_flag=True, help="Write the table and the picture of the documentation.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
def main(tokens: int, path: Path | None, source: Path | None, pages: bool, threads: int | None) -> None:
    if source is not None:
        found = json.loads(source.read_text())
    else:
        threads = threads or Settings().threads
        torch.set_num_threads(threads)
        found = {"machine": record.describe_machine(threads), "rows": []}
        for memory in memories():
            for row in measure(memory, tokens):
                found["rows"].append(row)
                click.echo(f"{row['name']}, {row['way']}, {row['tokens']}: {row['state']:.1e}, {row['outputs']:.1e}")
    if path is not None:
        path.write_text(json.dumps(found, indent=1) + "\n")
    if pages:
        tables.insert(DOCS / "ttt.md", markdown(found))
        draw(found, DOCS / "figures" / "drift.svg")


if __name__ == "__main__":
    with torch.no_grad():
        main()
