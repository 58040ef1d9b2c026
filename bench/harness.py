"""What every benchmark case goes through: values first, then interleaved time.

**Check.** Outputs, and for training gradients, are compared with the float64 reference on the same inputs. Float32 may
differ by 1e-5 sqrt(T) relative RMS; a 16-bit dtype by 1.2 times the error of the case's ruler, or where it has none of
the first peer, in that dtype and on the same inputs, or by the dtype's own spacing where there is no peer. A case that
fails is not timed. Gradients of large cases are checked on the first `check_steps` steps, since the reference is a loop
over time in float64; outputs are always checked over the whole length.

**Time.** One round runs a block of calls of each contender in turn: peers, ours, peers, ours, ... A load that comes and
goes therefore meets all of them, and a ratio is taken inside its round before the median is taken over rounds.
pytest-benchmark times one function from its first round to its last, which lets such a load fall on one side only.
So `benchmark.pedantic` drives the rounds and runs ours, and its `setup` step runs the peers, all by the same clock: the
suite keeps pytest-benchmark's options, statistics and files, and the rounds stay interleaved.
A block holds enough calls to last 2 ms, so that the clock and a cold start weigh little in calls of microseconds.

**Devices.** A case says where it can run. On a GPU the clock is `bench/cuda.py`'s, and every backend of seqops that
serves the operator there is checked and measured by itself. There a peer that fails, or that computes something else,
is named with the reason instead of being timed: nobody could try it beforehand.
"""

import gc
import importlib.util
import math
import os
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import numpy
import torch
from torch import Tensor

CPU, CUDA = "cpu", "cuda"
# Name of a suite -> what it has a case for.
OPERATORS, LENGTHS, MODULES = "operators", "lengths", "modules"
SUITES = {
    OPERATORS: "every operator beside what it replaces, at sizes of models",
    LENGTHS: "every operator at several lengths, in small sizes",
    MODULES: "every module of seqops.nn beside a layer of causal attention",
}
DEVICES = (CPU, CUDA)
# The backends whose kernels run on a device; on the CPU there is nothing to choose.
BACKENDS = {CUDA: ("cuda", "triton")}

OURS = "seqops"
REFERENCE = "reference"
# A contender that is only compared with the reference: it sets the bound of 16-bit dtypes in place of the first peer.
RULER = "ruler"

FORWARD = "forward"
TRAINING = "forward+backward"
BACKWARD = "backward"
INFERENCE = "inference"
MODES = {
    FORWARD: "under torch.no_grad()",
    TRAINING: "with gradients to the input, weights and biases",
    BACKWARD: "gradients alone, again and again from one forward",
    INFERENCE: "under torch.inference_mode()",
}
WITH_GRADIENTS = (TRAINING, BACKWARD)

BLOCK_SECONDS = 2e-3
# Of peers, on another device than the CPU: see `find_unfit`.
UNFIT_STEPS, UNFIT_ERROR = 16, 0.1


@dataclass(frozen=True)
class Contender:
    """One implementation, ready to run on the tensors of one case.

    Attributes:
        run: computes every output, by name; the names and shapes are the same for all contenders of a case. A yardstick
            (see `Case`) may return nothing.
        leaves: the tensors that receive gradients, by name; the names are the same for all contenders of a case.
        within: what its forward and its backward run inside of, such as a setting of torch's.
    """

    run: Callable[[], dict[str, Tensor]]
    leaves: dict[str, Tensor]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


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
            `seqops` and `reference` (float64) must be there, `ruler` may be; the rest are peers, the first of which
            sets the bound of 16-bit dtypes where there is no ruler. On another device than the CPU the function is also
            given `device=`, and builds there.
        flops: mode -> floating-point operations of one call.
        bytes: mode -> bytes that one call has to move when everything is read and written once.
        devices: of `DEVICES`, those that the case can run on.
        yardsticks: (name, mode) -> builder of something that moves the same bytes and computes something else. It is
            timed as a peer is, by `run` without gradients, and its values are not looked at.
        absent: peer -> why it cannot be measured on this machine.
        goals: (peer or yardstick, mode) -> the ratio of times to reach.
        copy_goals: mode -> the share of this device's copy rate to reach.
        causes: (peer, mode) -> why the goal is missed, where it is known to be missed.
        check_steps: T of the gradient check, where the whole length would take too long.
        check_whole: whether outputs are also checked over all steps.
        tolerance: the relative error allowed, where it is not 1e-5 sqrt(T) or the bound of a 16-bit dtype.
        length: by which cases of one operator make a line in the plots of time against length.
        facts: called once where given: `state` and `parameters`, each contender -> bytes, or number of them.
        time_goals: mode -> seconds of a call to stay within.
        beside: name -> another case, of which ours is checked, and timed as a peer is, by the same backend.
        is_stepwise: one step after the other bounds the time: results are also given by the step.
        step_floor: seconds that a forward step cannot take less than, by estimate.
        backends: of a device with several, those to measure.
        goal_backends: those whose results the goals are for.
        priority: lower ones are measured first on a GPU, where a run may be cut off.
    """

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    steps: int
    builders: Mapping[str, Callable[..., Contender]]
    flops: Mapping[str, int]
    bytes: Mapping[str, int]
    modes: Sequence[str] = (FORWARD, TRAINING)
    goals: Mapping[tuple[str, str], float] = field(default_factory=dict)
    causes: Mapping[tuple[str, str], str] = field(default_factory=dict)
    check_steps: int | None = None
    check_whole: bool = True
    tolerance: float | None = None
    length: int | None = None
    facts: Callable[[], Mapping[str, Mapping[str, int]]] | None = None
    devices: Sequence[str] = (CPU,)
    yardsticks: Mapping[tuple[str, str], Callable[..., Contender]] = field(default_factory=dict)
    absent: Mapping[str, str] = field(default_factory=dict)
    copy_goals: Mapping[str, float] = field(default_factory=dict)
    time_goals: Mapping[str, float] = field(default_factory=dict)
    beside: Mapping[str, "Case"] = field(default_factory=dict)
    is_stepwise: bool = False
    step_floor: float | None = None
    backends: Sequence[str] = tuple(name for names in BACKENDS.values() for name in names)
    goal_backends: Sequence[str] = tuple(name for names in BACKENDS.values() for name in names)
    priority: int = 1

    def has_goals(self, backend: str | None) -> bool:
        """Whether the goals are for a result of this backend; None where the device has only one."""
        return backend is None or backend in self.goal_backends

    @property
    def peers(self) -> list[str]:
        return [name for name in self.builders if name not in (OURS, REFERENCE, RULER)]

    def build(self, name: str, steps: int, device: str = CPU) -> Contender:
        return self._call(self.builders[name], steps, device)

    def build_yardsticks(self, mode: str, device: str = CPU) -> dict[str, Contender]:
        """Those of one mode, by name, over all steps."""
        builders = {name: builder for (name, of), builder in self.yardsticks.items() if of == mode}
        return {name: self._call(builder, self.steps, device) for name, builder in builders.items()}

    @staticmethod
    def _call(builder: Callable[..., Contender], steps: int, device: str) -> Contender:
        return builder(steps) if device == CPU else builder(steps, device=device)


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        threads: of torch, and so of every contender.
        quick: fewer rounds.
        memory: also measure the peak memory of training steps.
        device: one of `DEVICES`.
        suite: a key of `SUITES`.
    """

    threads: int = len(os.sched_getaffinity(0))
    quick: bool = False
    memory: bool = True
    device: str = CPU
    suite: str = OPERATORS

    def rounds(self, seconds: float) -> int:
        """How many rounds of this length are measured: enough for a spread, unless they would take minutes."""
        if self.suite != OPERATORS:  # many cases
            fewest, most, wanted, limit = (3, 9, 0.15, 2.5) if self.quick else (5, 21, 1.0, 20.0)
        else:
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
    """What this device does in this run: FLOP/s of `torch.mm`, and bytes/s, read and written, of a copy.

    On the CPU the product is float32 and the copy goes to memory in use (`copy_`); on a GPU the product is bfloat16 and
    the copy is a `clone`.
    """

    gemm: float
    copy: float


def load_suite(name: str) -> list[Case]:
    """The cases of a suite, a key of `SUITES`."""
    return load_cases() if name == OPERATORS else import_module(f"bench.{name}").load_cases()


def load_cases() -> list[Case]:
    """The suite of operators: of each `bench/<room>.py` beside a package `seqops/<room>`, and `bench/<operator>.py`."""
    seqops = import_module("seqops")
    rooms = [module.name for module in pkgutil.iter_modules(seqops.__path__) if module.ispkg]
    names = dict.fromkeys((*rooms, *import_module("seqops.core.backend").table()))
    found = [f"bench.{name}" for name in names if importlib.util.find_spec(f"bench.{name}")]
    return [case for name in found for case in import_module(name).CASES]


def backends_for(case: Case, device: str) -> list[str | None]:
    """What to measure of a case on a device: its backends there, or None alone for what torch dispatches to."""
    if device not in BACKENDS:
        return [None]
    from seqops.core import backend

    return [
        name
        for name in BACKENDS[device]
        if name in case.backends and backend.reason_missing(case.op, name, device) is None
    ]


def forced(name: str | None) -> AbstractContextManager[None]:
    """Forces one backend of seqops; does nothing for None."""
    if name is None:
        return nullcontext()
    import seqops

    return seqops.backend(name)


def cotangents(outputs: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Random gradients of the outputs, the same for every contender: rounded to the storage dtype before they widen."""
    gradients = []
    for output in outputs.values():
        if not gradients:
            generator = torch.Generator(output.device).manual_seed(1)
        drawn = torch.complex64 if output.is_complex() else torch.float32
        gradient = torch.randn(output.shape, generator=generator, dtype=drawn, device=output.device)
        rounded = gradient if drawn.is_complex or dtype.is_complex else gradient.to(dtype)
        gradients.append(rounded.to(output.dtype))
    return gradients


def widen(value: Tensor) -> Tensor:
    return value.to(torch.complex128 if value.is_complex() else torch.float64)


def evaluate(
    case: Case,
    name: str,
    mode: str,
    steps: int,
    gradients: bool = True,
    device: str = CPU,
    backend: str | None = None,
) -> dict[str, Tensor]:
    """Outputs of one contender in double precision, and in modes with `gradients` also these, as `d <leaf>`."""
    contender = case.build(name, steps, device)
    with torch.set_grad_enabled(mode in WITH_GRADIENTS), forced(backend), contender.within():
        outputs = contender.run()
        values = {name: widen(output.detach()) for name, output in outputs.items()}
        if mode in WITH_GRADIENTS and gradients:
            leaves = tuple(contender.leaves.values())
            found = torch.autograd.grad(list(outputs.values()), leaves, cotangents(outputs, case.dtype))
            values |= {f"d {name}": widen(gradient) for name, gradient in zip(contender.leaves, found, strict=True)}
    return values


def relative_error(value: Tensor, expected: Tensor, least: float = 0.0) -> float:
    """RMS of the difference over RMS of what is expected, or over `least`; infinite where shapes differ."""
    if value.shape != expected.shape:
        return math.inf
    root = math.sqrt(max(expected.numel(), 1))
    scale = max(torch.linalg.vector_norm(expected).item() / root, least)
    return torch.linalg.vector_norm(value - expected).item() / root / (scale or 1.0)


def compare(value: Mapping[str, Tensor], expected: Mapping[str, Tensor], least: float = 0.0) -> dict[str, float]:
    """Relative errors by name, see `relative_error`; infinite where a name is missing."""
    return {name: relative_error(value[name], e, least) if name in value else math.inf for name, e in expected.items()}


def check(case: Case, mode: str, device: str = CPU, backend: str | None = None) -> Check:
    """Compares ours with the float64 reference: outputs over all steps, gradients over `case.check_steps`."""
    short = case.check_steps if mode in WITH_GRADIENTS else None
    errors, bounds = {}, {}
    if not case.check_whole:
        plan = [(min(case.check_steps or case.steps, case.steps), True)]
    else:
        plan = [(short, True), (case.steps, False)] if short else [(case.steps, True)]
    for steps, gradients in plan:
        # The reference's outputs are the same in all modes, and cheapest without a graph.
        expected = evaluate(case, REFERENCE, mode if gradients else FORWARD, steps, device=device)
        least = 0.0
        if case.tolerance is not None:  # of whole modules, where some gradients are zero but for rounding
            least = 1e-3 * max(value.abs().square().mean().sqrt().item() for value in expected.values())
        found = compare(evaluate(case, OURS, mode, steps, gradients, device, backend), expected, least)
        if case.tolerance is not None:
            allowed = dict.fromkeys(found, case.tolerance)
        elif case.dtype not in (torch.bfloat16, torch.float16):
            allowed = dict.fromkeys(found, 1e-5 * math.sqrt(steps))
        elif judge := RULER if RULER in case.builders else next(iter(case.peers), None):
            peer = compare(evaluate(case, judge, mode, steps, gradients, device), expected)
            allowed = {name: 1.2 * error for name, error in peer.items()}
        else:
            allowed = dict.fromkeys(found, torch.finfo(case.dtype).eps)
        errors |= {f"{name}, T={steps}": error for name, error in found.items()}
        bounds |= {f"{name}, T={steps}": bound for name, bound in allowed.items()}
    return Check(errors, bounds)


def find_unfit(case: Case, mode: str, device: str) -> dict[str, str]:
    """Peers that cannot be timed here, with the reason: they fail, or what they compute is something else.

    A few steps show it. Their precision is their own affair, so the bounds are wide.
    """
    steps = min(case.steps, UNFIT_STEPS)
    expected, unfit = None, {}
    for name in case.peers:
        try:
            found = evaluate(case, name, mode, steps, device=device)
        except Exception as error:
            unfit[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if expected is None:
            expected = evaluate(case, REFERENCE, mode, steps, device=device)
        errors = {of: relative_error(value, expected[of]) for of, value in found.items()}
        worst = max(errors, key=lambda of: math.inf if math.isnan(errors[of]) else errors[of])
        if not errors[worst] <= UNFIT_ERROR:
            unfit[name] = f"it computes something else: {worst}, T={steps}, is off by {errors[worst]:.1e}"
    return unfit


Block = Callable[[int], None]


def make_block(case: Case, contender: Contender, mode: str, backend: str | None = None) -> Block:
    """A function that makes so many calls in one mode and keeps nothing."""
    if mode in WITH_GRADIENTS:
        leaves = tuple(contender.leaves.values())
        with forced(backend), contender.within():
            outputs = contender.run()
        gradients = cotangents(outputs, case.dtype)

    if mode == BACKWARD:
        roots = tuple(outputs.values())

        def block(calls: int) -> None:
            with forced(backend), contender.within():
                for _ in range(calls):
                    torch.autograd.grad(roots, leaves, gradients, retain_graph=True)

    elif mode == TRAINING:
        del outputs

        def block(calls: int) -> None:
            with forced(backend), contender.within():
                for _ in range(calls):
                    torch.autograd.grad(tuple(contender.run().values()), leaves, gradients)

    else:
        without_gradients = torch.no_grad if mode == FORWARD else torch.inference_mode

        def block(calls: int) -> None:
            with without_gradients(), forced(backend), contender.within():
                for _ in range(calls):
                    contender.run()

    return block


class Stopwatch:
    """The clock of the CPU. Another device's has the same methods.

    Attributes:
        timing: how the times of a case were taken, for its result.
    """

    timing = "clock"

    def running(self) -> AbstractContextManager[None]:
        """Everything of a case is built and timed inside."""
        return nullcontext()

    def prepare(self, blocks: Mapping[str, Block]) -> dict[str, Block]:
        """The blocks in the form in which they are timed."""
        return dict(blocks)

    def seconds(self, block: Block, calls: int = 1) -> float:
        """Time of so many calls in all."""
        start = time.perf_counter()
        block(calls)
        return time.perf_counter() - start

    def estimate(self, block: Block) -> float:
        """About the time of a call. A long call is its own estimate; a short one's first is mostly the cold start."""
        first = self.seconds(block)
        return first if first > 0.2 else min(self.seconds(block) for _ in range(3))


def make_stopwatch(device: str) -> Stopwatch:
    if device == CPU:
        return Stopwatch()
    from bench import cuda

    return cuda.Stopwatch()


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and the 20 % and 80 % quantiles."""
    low, middle, high = numpy.percentile(values, (20, 50, 80))
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def ratio_summary(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Peer's time over ours, round by round, then median and quantiles: above 1 ours is faster."""
    return summary([p / o for o, p in zip(ours, peer, strict=True)])


def interleave(
    runs: Mapping[str, Callable[[], float]], benchmark: Any, rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Runs rounds of all contenders.

    Args:
        runs: contender -> a function that runs its block and returns the seconds it took; `seqops` is the one that
            pytest-benchmark calls, last in each round.
        benchmark: the `benchmark` fixture.
        rounds: at least 1.
        warm_up: rounds before them that are not counted.

    Returns:
        Seconds of each block in each round, by contender; empty where pytest-benchmark is disabled.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}

    def run_ours() -> None:
        times[OURS].append(runs[OURS]())

    def run_peers() -> None:
        for name, run in runs.items():
            if name != OURS:
                times[name].append(run())

    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(run_ours, setup=run_peers, rounds=rounds, warmup_rounds=warm_up, iterations=1)
    finally:
        if collecting:
            gc.enable()
    if benchmark.stats is None:
        return {}
    return {name: spent[-rounds:] for name, spent in times.items()}


@dataclass(frozen=True)
class Times:
    """What `measure` found.

    Attributes:
        seconds: contender -> seconds of a call in each round.
        calls: contender -> calls in a block.
        timing: how they were taken.
    """

    seconds: dict[str, list[float]]
    calls: dict[str, int]
    timing: str


def measure(case: Case, mode: str, benchmark: Any, settings: Settings, backend: str | None = None) -> Times:
    """Times all contenders. The values are not checked here.

    Args:
        mode: a key of `MODES`.
        benchmark: the `benchmark` fixture.
        backend: which one serves ours, where the device has several.
    """
    device, watch = settings.device, make_stopwatch(settings.device)
    with watch.running():
        blocks = {name: make_block(case, case.build(name, case.steps, device), mode) for name in case.peers}
        for name, yardstick in case.build_yardsticks(mode, device).items():
            blocks[name] = make_block(case, yardstick, FORWARD)
        for name, other in case.beside.items():
            blocks[name] = make_block(other, other.build(OURS, other.steps, device), mode, backend)
        blocks[OURS] = make_block(case, case.build(OURS, case.steps, device), mode, backend)
        blocks = watch.prepare(blocks)
        spent = {name: watch.estimate(block) for name, block in blocks.items()}
        calls = {name: max(1, math.ceil(BLOCK_SECONDS / spent[name])) for name in blocks}
        runs = {name: partial(watch.seconds, block, calls[name]) for name, block in blocks.items()}
        seconds = sum(spent[name] * calls[name] for name in blocks)
        # Long calls were warmed up by their estimate.
        times = interleave(runs, benchmark, settings.rounds(seconds), warm_up=int(seconds < 1))
    return Times({name: [spent / calls[name] for spent in times[name]] for name in times}, calls, watch.timing)


def measure_rates(device: str = CPU) -> Rates:
    """The device's matrix product and copy, on the CPU at torch's present number of threads: the best of 7 runs.

    A rate that others are measured by is a ceiling, hence no median.
    """
    watch = make_stopwatch(device)

    def least_seconds(call: Callable[[], object]) -> float:
        def block(calls: int) -> None:
            for _ in range(calls):
                call()

        with watch.running():
            return min(watch.seconds(block) for _ in range(7))

    if device != CPU:
        size, dtype = 8192, torch.bfloat16
        a, b, product = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(3))
        source = torch.randn(1 << 28, device=device)  # 1 GiB
        copy = 2 * source.nbytes / least_seconds(source.clone)
        return Rates(2 * size**3 / least_seconds(lambda: torch.mm(a, b, out=product)), copy)
    # 2048: 34 MB in all, large enough to run at full rate, and a tenth of a second on one core.
    size = 2048
    a, b, product = torch.randn(size, size), torch.randn(size, size), torch.empty(size, size)
    # 256 MB each, many times any cache.
    source = torch.ones(64 << 20)
    target = torch.zeros_like(source)
    gemm = 2 * size**3 / least_seconds(lambda: torch.mm(a, b, out=product))
    copy = 2 * source.nbytes / least_seconds(lambda: target.copy_(source))
    return Rates(gemm, copy)
