"""Operators that are Python functions, for tests of the tuner: every step of a search without any room's kernels.

`toy` has a forward and a backward pass for GPUs and for the CPU; `pea` has a forward pass for the CPU alone. What a
kernel does may be changed by its tile: give other values, raise, sleep, or not compile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqops.core import choose
from seqops.tune import csp
from seqops.tune.target import Example, Flag, Report, Target

FLAGS = (
    Flag("heads", 2, "Heads."),
    Flag("dim", 64, "Width of a head."),
    Flag("batch", 4, "Sequences."),
    Flag("time", 128, "Steps."),
    Flag("gate", "full", "Kind of gate.", str, choices=("full", "constant")),
    Flag("train", True, "With what a backward reads.", bool),
)


@dataclass
class Habits:
    """What kernels do, by tile."""

    wrong: set[int] = field(default_factory=set)
    raises: set[int] = field(default_factory=set)
    sleeps: dict[int, float] = field(default_factory=dict)
    broken: set[int] = field(default_factory=set)  # do not compile
    spills: set[int] = field(default_factory=set)
    before: Callable[[int], None] = lambda tile: None  # called by each call
    calls: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)  # tile and shape of each call


def make_problem(device: Any, key: choose.Key) -> csp.Problem:
    """Tiles that divide the width; the model prefers large ones."""
    problem = csp.Problem(key.kernel)
    tile = problem.int("tile", values=(4, 8, 16, 32, 64, 128))
    unroll = problem.int("unroll", values=(1, 2))
    problem.add(key["D"] % tile == 0, "the tile divides the width")
    problem.add(tile * unroll <= 64, "accumulators fit")
    problem.define("registers", 24 + tile * unroll)
    problem.define("shared", tile * unroll * 64)
    problem.minimize(10 + csp.ceildiv(key["D"], tile) * 1.5, then=unroll)
    return problem


def make_target(
    op: str = "toy", direction: str = "forward", backend: str = "cpu", habits: Habits | None = None, **changes: Any
) -> Target:
    does = habits or Habits()
    tunable = choose.Tunable(f"{op}.{direction}.{backend}", make_problem, (Path(__file__),))

    def key(shape: Any, dtype: str, device: Any) -> choose.Key:
        sizes = (choose.Size("D", shape["dim"]), choose.bucket("B", shape["batch"], (8, 16), 64))
        return choose.Key(tunable.name, dtype, sizes, ("train",) if shape["train"] else ())

    def compile(device: Any, key: choose.Key, constants: choose.Solution) -> Report | None:
        if backend == "cpu":
            return None
        tile = constants["tile"]
        if tile in does.broken:
            raise RuntimeError(f"toy.cu does not compile for {device.architecture}:\nexpected a ';'")
        product = tile * constants["unroll"]
        return Report(22 + product, 0, 16 if tile in does.spills else 0, product * 64, threads=128)

    def example(shape: Any, dtype: str, torch_device: str) -> Example:
        x = torch.linspace(-1, 1, shape["batch"] * shape["time"] * shape["dim"], dtype=torch.float32)
        x = x.view(shape["batch"], shape["time"], shape["dim"])

        def run() -> Tensor:
            tile = choose.solution(tunable, key(shape, dtype, None), torch.device("cpu"))["tile"]
            does.calls.append((tile, tuple(x.shape)))
            does.before(tile)
            if tile in does.raises:
                raise RuntimeError(f"the launch with tile {tile} failed")
            time.sleep(does.sleeps.get(tile, 0))
            return 2 * x + (tile in does.wrong)

        return Example(run, lambda: (2 * x.double(),), (1e-5, 1e-6))

    chosen = {"flags": FLAGS, "dtypes": ("bf16", "float32"), "key": key, "compile": compile, "example": example}
    return Target(op, direction, tunable, **(chosen | changes))


def make_targets(habits: Habits | None = None) -> list[Target]:
    passes = [(d, b) for d in ("forward", "backward") for b in ("cpu", "cuda")]
    return [*(make_target("toy", d, b, habits) for d, b in passes), make_target("pea", habits=habits)]


def install(habits: Habits | None = None) -> None:
    """Have the command line know these operators alone, in this process."""
    from seqops.tune import cli

    found = make_targets(habits)
    cli.targets = lambda: found
