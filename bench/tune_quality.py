"""How good the choices of the tuner's model are: every plan of the CPU's recurrent kernels timed beside its prediction.

    python -m bench.tune_quality [--json FILE] [--quick] [--threads N]

For each operator, direction, dtype and shape, every plan that the problem allows runs, in rounds over all of them in an
order that changes, so that a disturbance hits all alike. A row says what the model's first choice costs beside the best
one, and how well predicted and measured times agree in rank (Spearman's correlation). Values are not checked here:
tests/test_rnn_tiles.py holds every plan to the same bits.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy
import torch

from seqops.core import choose
from seqops.rnn import tune
from seqops.tune import device
from seqops.tune.target import Target

# H, D, B, T
SHAPES = (
    (1, 64, 1, 64),
    (1, 128, 1, 256),
    (1, 256, 16, 64),
    (1, 512, 3, 16),
    (1, 1024, 1, 16),
    (1, 256, 64, 16),
    (3, 128, 4, 64),
    (4, 64, 16, 256),
    (12, 64, 8, 32),
    (3, 256, 32, 16),
    (2, 768, 8, 4),
    (6, 100, 1, 1),
)
QUICK = (SHAPES[2], SHAPES[6])
DTYPES = ("float32", "bfloat16")
SECONDS = 0.6  # for all plans of a row
WARM = 5e-4  # seconds that a plan runs before it is timed: threads that slept are awake then
BLOCK = 1e-3  # seconds of calls between two looks at the clock


def ranks(values: Any) -> Any:
    """From 0; equal values share the mean of their ranks."""
    _, which, counts = numpy.unique(values, return_inverse=True, return_counts=True)
    return (numpy.cumsum(counts) - (counts + 1) / 2)[which]


def rank_correlation(predicted: list[float], measured: list[float]) -> float | None:
    """None where there is nothing to rank."""
    a, b = ranks(numpy.round(predicted, 6)), ranks(measured)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(numpy.corrcoef(a, b)[0, 1])


def clock(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def measure(name: str, run: Callable[[], object], plans: list[dict[str, int]]) -> list[list[float]]:
    """Microseconds of a call in each round, by plan."""
    once = min(clock(run, 1) for _ in range(3))
    calls = max(1, min(50, round(BLOCK / once)))
    rounds = max(5, min(40, round(SECONDS / len(plans) / (once * calls + WARM))))
    times: list[list[float]] = [[] for _ in plans]
    order = list(range(len(plans)))
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for i in order:
            with choose.forced(name, plans[i]):
                start = time.perf_counter()
                run()
                while time.perf_counter() - start < WARM:
                    run()
                times[i].append(1e6 * clock(run, calls))
    return times


def row(target: Target, dtype: str, shape: dict[str, int], threads: int) -> dict[str, Any]:
    host = device.host(threads)
    problem = target.tunable.problem(host, target.key(shape, dtype, host))
    plans = [dict(plan) for plan in problem.solutions(limit=1000)]  # cheapest first
    predicted = [problem.cost(plan) for plan in plans]
    times = measure(target.tunable.name, target.example(shape, dtype, "cpu").run, plans)
    measured = [float(numpy.median(each)) for each in times]
    best = min(range(len(plans)), key=measured.__getitem__)
    return {
        "op": target.op,
        "direction": target.direction,
        "dtype": dtype,
        "shape": shape,
        "threads": threads,
        "choice": plans[0],
        "best": plans[best],
        "choice_us": measured[0],
        "best_us": measured[best],
        "ratio": measured[0] / measured[best],
        "rank_correlation": rank_correlation(predicted, measured),
        "candidates": [
            {"plan": plan, "predicted_us": model, "measured_us": us, "least_us": min(each)}
            for plan, model, us, each in zip(plans, predicted, measured, times, strict=True)
        ],
    }


def rows(quick: bool, threads: int) -> Iterator[dict[str, Any]]:
    for target, dtype, sizes in product(tune.CPU_TARGETS, DTYPES, QUICK if quick else SHAPES):
        yield row(target, dtype, dict(zip(("heads", "dim", "batch", "time"), sizes, strict=True)), threads)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [each["ratio"] for each in results]
    correlations = [each["rank_correlation"] for each in results if each["rank_correlation"] is not None]
    median, most, worst = (float(numpy.quantile(ratios, share)) for share in (0.5, 0.9, 1))
    return {
        "rows": len(results),
        "candidates": sum(len(each["candidates"]) for each in results),
        "ratio": {"median": median, "p90": most, "worst": worst},
        "rank_correlation": {
            "median": float(numpy.median(correlations)),
            "p10": float(numpy.quantile(correlations, 0.1)),
        },
    }


def describe(each: dict[str, Any]) -> str:
    sizes = " ".join(f"{letter}{each['shape'][name]}" for letter, name in zip("HDBT", each["shape"], strict=True))
    correlation = "" if each["rank_correlation"] is None else f", rank correlation {each['rank_correlation']:.2f}"
    return (
        f"{each['op']} {each['direction']} {each['dtype']} {sizes}: {each['choice_us']:.0f} us, "
        f"best of {len(each['candidates'])} {each['best_us']:.0f} us, ratio {each['ratio']:.2f}{correlation}"
    )


@click.command(help=__doc__)
@click.option("--json", "path", type=click.Path(path_type=Path), help="Write rows and summary to this file.")
@click.option("--quick", is_flag=True, help="Two shapes of each kernel instead of all.")
@click.option("--threads", default=2, show_default=True)
def main(path: Path | None, quick: bool, threads: int) -> None:
    torch.set_num_threads(threads)
    results = []
    for each in rows(quick, threads):
        results.append(each)
        click.echo(describe(each))
    total = summary(results)
    click.echo(json.dumps(total))
    if path is not None:
        host = {name: value for name, value in vars(device.host(threads)).items() if name != "origin"}
        path.write_text(json.dumps({"host": host, "summary": total, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
