"""What every benchmark case goes through: values first, then interleaved time.

**Check.** Outputs, and for training gradients, are compared with the float64 reference on the same inputs. Float32 may
differ by 1e-5 sqrt(T) relative RMS; a 16-bit dtype by 1.2 times the error of the first peer in that dtype, on the same
inputs. A case that fails is not timed. Gradients of large cases are checked on the first `check_steps` steps, since the
reference is a loop over time in float64; outputs are always checked over the whole length.

**Time.** One round runs a block of calls of each contender in turn: peers, ours, peers, ours, ... A load that comes and
goes therefore meets all of them, and a ratio is taken inside its round before the median is taken over rounds.
pytest-benchmark times one function from its first round to its last, which lets such a load fall on one side only.
So `benchmark.pedantic` drives the rounds and times ours, and its `setup` step runs and times the peers with the same
clock: the suite keeps pytest-benchmark's options, statistics and files, and the rounds stay interleaved.
A block holds enough calls to last 2 ms, so that the clock and a cold start weigh little in calls of microseconds.
"""

import gc
import importlib.util
import math
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy
import torch
from torch import Tensor

OURS = "seqops"
REFERENCE = "reference"

FORWARD = "forward"
TRAINING = "forward+backward"
INFERENCE = "inference"
MODES = {
    FORWARD: "under torch.no_grad()",
    TRAINING: "with gradients to the input, weights and biases",
    INFERENCE: "under torch.inference_mode()",
}

BLOCK_SECONDS = 2e-3


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to run on the tensors of one case.

    Attributes:
        run: computes every output, by name; the names and shapes are the same for all contenders of a case.
        leaves: the tensors that receive gradients, by name; the names are the same for all contenders of a case.
    """

    run: Callable[[], dict[str, Tensor]]
    leaves: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the benchmark. It must pickle, since processes that measure memory receive it.

    Attributes:
        op: the operator, as `--op` names it.
        name: unique, as the tables print it.
        shape: the letters of the case (B, T, ...) and their values.
        dtype: storage dtype of every contender.
        steps: T.
        builders: name -> function of a number of steps that builds the contender with the same values as every other's.
            `seqops` and `reference` (float64) must be there; the rest are peers, the first of which sets the bound of
            16-bit dtypes.
        flops: mode -> floating-point operations of one call.
        bytes: mode -> bytes that one call has to move when everything is read and written once.
        goals: (peer, mode) -> the ratio of times to reach.
        causes: (peer, mode) -> why the goal is missed, where it is known to be missed.
        check_steps: T of the gradient check, where the whole length would take too long.
    """

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    steps: int
    builders: Mapping[str, Callable[[int], Contender]]
    flops: Mapping[str, int]
    bytes: Mapping[str, int]
    modes: Sequence[str] = (FORWARD, TRAINING)
    goals: Mapping[tuple[str, str], float] = field(default_factory=dict)
    causes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    check_steps: int | None = None

    @property
    def peers(self) -> list[str]:
        return [name for name in self.builders if name not in (OURS, REFERENCE)]


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        threads: of torch, and so of every contender.
        quick: fewer rounds.
        memory: also measure the peak memory of training steps.
    """

    threads: int = len(os.sched_getaffinity(0))
    quick: bool = False
    memory: bool = True

    def rounds(self, seconds: float) -> int:
        """How many rounds of this length are measured: enough for a spread, unless they would take minutes."""
        fewest, most, wanted, limit = (3, 15, 0.6, 6.0) if self.quick else (7, 41, 5.0, 60.0)
        rounds = min(max(int(wanted / seconds), fewest), most)
        return max(1, min(rounds, int(limit / seconds)))


@dataclass(frozen=True)
class Check:
    """The distance of one contender from the float64 reference.

    Attributes:
        errors: relative RMS error of each output and gradient, by name and number of steps.
        bounds: what each may be.
    """

    errors: dict[str, float]
    bounds: dict[str, float]

    @property
    def failures(self) -> list[str]:
        # Written so that NaN fails.
        return [name for name, error in self.errors.items() if not error <= self.bounds[name]]

    @property
    def message(self) -> str | None:
        """What is wrong with the values, or None."""
        parts = [f"{name}: {self.errors[name]:.1e} > {self.bounds[name]:.1e}" for name in self.failures]
        return "relative error against float64: " + "; ".join(parts) if parts else None


@dataclass(frozen=True)
class Rates:
    """What this machine does in this run: float32 FLOP/s of `torch.mm`, bytes/s (read and written) of `copy_`."""

    gemm: float
    copy: float


def load_cases() -> list[Case]:
    """The cases of all rooms: of each `bench/<room>.py` that has a package `seqops/<room>` beside it."""
    seqops = import_module("seqops")
    rooms = [module.name for module in pkgutil.iter_modules(seqops.__path__) if module.ispkg]
    found = [f"bench.{room}" for room in rooms if importlib.util.find_spec(f"bench.{room}")]
    return [case for name in found for case in import_module(name).CASES]


def cotangents(outputs: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random gradients of the outputs, the same for every contender: rounded to the storage dtype before they widen."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(dtype).to(o.dtype) for o in outputs.values()]


def evaluate(case: Case, name: str, mode: str, steps: int, backward: bool = True) -> dict[str, Tensor]:
    """Outputs of one contender in float64; when training also its gradients, as `d <leaf>`, unless not `backward`."""
    contender = case.builders[name](steps)
    with torch.set_grad_enabled(mode == TRAINING):
        outputs = contender.run()
    values = {name: output.detach().double() for name, output in outputs.items()}
    if mode == TRAINING and backward:
        leaves = tuple(contender.leaves.values())
        gradients = torch.autograd.grad(list(outputs.values()), leaves, cotangents(outputs, case.dtype))
        values |= {f"d {name}": gradient.double() for name, gradient in zip(contender.leaves, gradients, strict=True)}
    return values


def relative_error(value: Tensor, expected: Tensor) -> float:
    """RMS of the difference over RMS of what is expected; infinite where shapes differ."""
    if value.shape != expected.shape:
        return math.inf
    scale = expected.square().mean().sqrt().item()
    return (value - expected).square().mean().sqrt().item() / (scale or 1.0)


def compare(value: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors by name; infinite where a name is missing."""
    return {name: relative_error(value[name], e) if name in value else math.inf for name, e in expected.items()}


def check(case: Case, mode: str) -> Check:
    """Compares ours with the float64 reference: outputs over all steps, gradients over `case.check_steps`."""
    short = case.check_steps if mode == TRAINING else None
    errors, bounds = {}, {}
    for steps, backward in [(short, True), (case.steps, False)] if short else [(case.steps, True)]:
        # The reference's outputs are the same in all modes, and cheapest without a graph.
        expected = evaluate(case, REFERENCE, mode if backward else FORWARD, steps)
        found = compare(evaluate(case, OURS, mode, steps, backward), expected)
        if case.dtype in (torch.bfloat16, torch.float16):
            peer = compare(evaluate(case, case.peers[0], mode, steps, backward), expected)
            allowed = {name: 1.2 * error for name, error in peer.items()}
        else:
            allowed = dict.fromkeys(found, 1e-5 * math.sqrt(steps))
        errors |= {f"{name}, T={steps}": error for name, error in found.items()}
        bounds |= {f"{name}, T={steps}": bound for name, bound in allowed.items()}
    return Check(errors, bounds)


def make_block(case: Case, contender: Contender, mode: str, calls: int) -> Callable[[], None]:
    """A function that makes `calls` calls in one mode and keeps nothing."""
    if mode == TRAINING:
        leaves = tuple(contender.leaves.values())
        gradients = cotangents(contender.run(), case.dtype)

        def block() -> None:
            for _ in range(calls):
                torch.autograd.grad(tuple(contender.run().values()), leaves, gradients)

    else:
        without_gradients = torch.no_grad if mode == FORWARD else torch.inference_mode

        def block() -> None:
            with without_gradients():
                for _ in range(calls):
                    contender.run()

    return block


def seconds_of(block: Callable[[], None]) -> float:
    start = time.perf_counter()
    block()
    return time.perf_counter() - start


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles."""
    low, middle, high = numpy.percentile(values, (20, 50, 80))
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def ratio_summary(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Peer's time over ours, round by round, then median and quantiles: above 1 ours is faster."""
    return summary([p / o for o, p in zip(ours, peer, strict=True)])


def interleave(
    blocks: Mapping[str, Callable[[], None]], benchmark: Any, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Runs rounds of all blocks.

    Args:
        blocks: by contender; `seqops` is the one that pytest-benchmark times, last in each round.
        benchmark: the `benchmark` fixture.
        rounds: at least 1.
        warm_up: rounds before them that are not counted.

    Returns:
        Seconds of each block in each round, by contender; empty where pytest-benchmark is disabled.
    """
    peers = {name: block for name, block in blocks.items() if name != OURS}
    times: dict[str, list[float]] = {name: [] for name in peers}

    def run_peers() -> None:
        for name, block in peers.items():
            times[name].append(seconds_of(block))

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(blocks[OURS], setup=run_peers, rounds=rounds, warmup_rounds=warm_up, iterations=1)
    finally:
        if collecting:
            gc.enable()
    if benchmark.stats is None:
        return {}
    return {OURS: list(benchmark.stats.stats.data), **{name: spent[-rounds:] for name, spent in times.items()}}


def measure(case: Case, mode: str, benchmark: Any, settings: Settings) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Times all contenders. The values are not checked here.

    Args:
        mode: a key of `MODES`.
        benchmark: the `benchmark` fixture.

    Returns:
        Seconds of a call in each round, and the calls in a block, both by contender.
    """
    names = [*case.peers, OURS]
    contenders = {name: case.builders[name](case.steps) for name in names}
    single = {name: make_block(case, contenders[name], mode, 1) for name in names}
    spent = {}
    for name, block in single.items():
        first = seconds_of(block)
        # A long call is its own estimate; a short one's first call is mostly the cold start.
        spent[name] = first if first > 0.2 else min(seconds_of(block) for _ in range(3))
    calls = {name: max(1, math.ceil(BLOCK_SECONDS / spent[name])) for name in names}
    blocks = {name: make_block(case, contenders[name], mode, calls[name]) for name in names}
    seconds = sum(spent[name] * calls[name] for name in names)
    # Long calls were warmed up by their estimate.
    times = interleave(blocks, benchmark, settings.rounds(seconds), warm_up=int(seconds < 1))
    return {name: [seconds / calls[name] for seconds in times[name]] for name in times}, calls


def measure_rates() -> Rates:
    """This machine's float32 matrix product and copy, at torch's present number of threads: the best of 7 runs.

    A rate that others are measured by is a ceiling, hence no median.
    """
    # 2048: 34 MB in all, large enough to run at full rate, and a tenth of a second on one core.
    size = 2048
    a, b, product = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    # 256 MB each, many times any cache.
    source = torch.ones(64 << 20)
    target = torch.zeros_like(source)

    def least_seconds(block: Callable[[], object]) -> float:
        return min(seconds_of(block) for _ in range(7))

    gemm = 2 * size**3 / least_seconds(lambda: torch.mm(a, b, out=product))
    copy = 2 * source.nbytes / least_seconds(lambda: target.copy_(source))
    return Rates(gemm, copy)
