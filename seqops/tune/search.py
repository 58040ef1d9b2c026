"""Finding a kernel's constants: the solver's best, compiled, checked, timed, and the winner stored.

What is found about a `Target` comes back as an `Outcome`, which the command line prints as a table or as JSON.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, choose, launch
from . import csp, timing
from .store import Entry, Store
from .target import Report, Shape, Target

WORTH = 0.02  # by how much faster than the model's first choice a winner has to be


# ---- what is found


@dataclass
class Candidate:
    """One solution and what became of it.

    Attributes:
        rank: in the model's order, from 1; 0: the stored one, where the model has it further down.
        model_us: the model's time.
        predicted: the quantities that the problem names.
        failed: the step that dropped it, "compile", "reference" (which could not be computed, so that nothing is known
            of the candidate), "check" or "time"; `reason` says why.
        us, spread, runs: the median in microseconds, half the width of its 95 % interval over it, and of how many.
        stopped: it was clearly slower than the leader, and not timed to the end.
    """

    rank: int
    constants: dict[str, int]
    model_us: float
    predicted: dict[str, float] = field(default_factory=dict)
    stored: bool = False
    report: Report | None = None
    failed: str | None = None
    reason: str | None = None
    us: float | None = None
    spread: float | None = None
    runs: int = 0
    stopped: bool = False


@dataclass
class Outcome:
    """All about one kernel at one shape.

    Attributes:
        optimal: the first candidate is proven to be the model's best.
        explanation: why nothing fits, where nothing does.
        architecture, compiled, compile_seconds: what was compiled for, how many, how long; None: nothing was.
        uncompiled, untimed: why not.
        chosen: the candidate that serves from now on; `by` is "measured" or "solved", `entry` what the store keeps.
        stored: the file that it was written to; `unstored`, why it was not; `unwritten`: because the file cannot be.
        lost: a candidate broke the CUDA context: nothing more runs in this process.
    """

    target: Target
    device: Any
    shape: dict[str, Any]
    dtype: str
    key: choose.Key
    constraints: int = 0
    variables: int = 0
    seconds: float = 0.0
    nodes: int = 0
    optimal: bool = False
    explanation: str | None = None
    candidates: list[Candidate] = field(default_factory=list)
    architecture: str | None = None
    compiled: int = 0
    compile_seconds: float | None = None
    uncompiled: str | None = None
    untimed: str | None = None
    checked: int = 0
    chosen: Candidate | None = None
    by: str | None = None
    entry: Entry | None = None
    stored: str | None = None
    unstored: str | None = None
    unwritten: bool = False
    interrupted: bool = False
    lost: bool = False

    @property
    def alive(self) -> list[Candidate]:
        return [candidate for candidate in self.candidates if candidate.failed is None]


@dataclass(frozen=True)
class Step:
    """What a listener hears: the candidate that a step has done, or how far the timing is."""

    outcome: Outcome
    name: str  # "solve", "compile", "check", "time" or "timed"
    done: int
    total: int
    candidate: Candidate | None = None
    timing: timing.State | None = None


Listener = Callable[[Step], None]


def quiet(step: Step) -> None:
    pass


@dataclass(frozen=True)
class Place:
    """Where to tune for, and the torch device to run on; None where that is not here, and why."""

    device: Any
    torch_device: str | None = None
    absent: str | None = None

    @property
    def on_cpu(self) -> bool:
        return not hasattr(self.device, "processors")


# ---- the steps


def solve(target: Target, device: Any, shape: Shape, dtype: str, top: int, store: Store | None = None) -> Outcome:
    """The best `top` solutions of the model, and the stored one."""
    key = target.key(shape, dtype, device)
    problem = target.tunable.problem(device, key)
    outcome = Outcome(target, device, dict(shape), dtype, key)
    outcome.constraints, outcome.variables = len(problem.constraints), len(problem.variables)
    start = time.perf_counter()
    try:
        best = problem.solve()
        outcome.optimal = best is not None
    except csp.LimitReached as limit:
        best = limit.best
        if best is None:
            outcome.explanation = f"the solver gave up before it found anything: {limit}"
    outcome.seconds = time.perf_counter() - start
    outcome.nodes = problem.statistics.nodes
    if best is None:
        outcome.explanation = outcome.explanation or problem.explain()
        return outcome
    found = [best]
    options = {} if target.distinct is None else {"distinct": target.distinct}
    try:
        for solution in problem.solutions(limit=top, **options):
            if not _same(solution, best, target.distinct):
                found.append(solution)
    except csp.LimitReached:
        pass  # those that came before it are candidates
    for rank, constants in enumerate(found[:top], 1):
        outcome.candidates.append(_candidate(problem, rank, constants))
    entry = store and store.lookup(device.name, str(key), target.tunable.digest, problem.check)
    if entry:
        known = [c for c in outcome.candidates if c.constants == dict(entry.constants)]
        if not known:
            known = [_candidate(problem, 0, entry.constants)]
            outcome.candidates += known
        known[0].stored = True
    return outcome


def _same(one: choose.Solution, other: choose.Solution, names: tuple[str, ...] | None) -> bool:
    return all(one[name] == other[name] for name in names or one)


def _candidate(problem: csp.Problem, rank: int, constants: choose.Solution) -> Candidate:
    return Candidate(rank, dict(constants), problem.cost(constants), dict(problem.values(constants)))


def compile_all(outcome: Outcome, tell: Listener = quiet) -> None:
    """Compiles what is alive, side by side, and drops what spills or does not fit."""
    target, device, start = outcome.target, outcome.device, time.perf_counter()
    waiting = outcome.alive
    with ThreadPoolExecutor(min(len(waiting), os.cpu_count() or 1) or 1) as pool:
        jobs = {pool.submit(target.compile, device, outcome.key, c.constants): c for c in waiting}
        try:
            for done, job in enumerate(as_completed(jobs), 1):
                candidate = jobs[job]
                try:
                    candidate.report = job.result()
                except Exception as error:
                    candidate.failed, candidate.reason = "compile", _told(error)
                else:
                    reason = candidate.report and _unfit(candidate.report, device)
                    if reason:
                        candidate.failed, candidate.reason = "compile", reason
                tell(Step(outcome, "compile", done, len(waiting), candidate))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    outcome.compiled = sum(candidate.report is not None for candidate in waiting)
    if outcome.compiled:
        outcome.architecture = device.architecture
        outcome.compile_seconds = time.perf_counter() - start


def _unfit(report: Report, device: Any) -> str | None:
    if report.spills:
        return f"it spills {report.spills} bytes a thread"
    if report.stack:
        return f"it needs a stack of {report.stack} bytes a thread"
    if report.shared > device.shared_per_block:
        return f"it needs {report.shared} bytes of shared memory, and a block has {device.shared_per_block}"
    cap = 255 if report.threads is None else device.thread_registers(report.threads)
    if report.registers > cap:
        return f"it needs {report.registers} registers a thread, and {report.threads} threads have {cap} each"
    return None


def within(target: Target, candidate: Candidate) -> AbstractContextManager[Any]:
    """The context in which the target's kernel runs with these constants."""
    stack = ExitStack()
    # Forcing replaces the CPU kernels by slower calls, so only where something else would run.
    if target.backend in backend.BACKENDS and (target.backend != "cpu" or backend.current() not in (None, "cpu")):
        stack.enter_context(backend.backend(target.backend))
    stack.enter_context(choose.forced(target.tunable.name, candidate.constants))
    return stack


def check_all(outcome: Outcome, torch_device: str, tell: Listener = quiet) -> None:
    """Runs what is alive at a small shape, and drops what fails or gives other values than the reference."""
    target, waiting = outcome.target, outcome.alive
    try:
        example = target.example(target.small(outcome.shape), outcome.dtype, torch_device)
        expected = _listed(example.expected())
    except Exception as error:  # memory is short, or the operator refuses the shape
        _drop(waiting, "reference", f"could not be checked: {_told(error)}")
        outcome.lost = _is_lost(torch_device)
        return
    for done, candidate in enumerate(waiting, 1):
        step, reason = "check", None
        try:
            with within(target, candidate):
                values = _listed(example.run())
        except Exception as error:
            reason = f"it does not run: {_told(error)}"
            outcome.lost = _is_lost(torch_device)
        else:
            try:
                reason = compare(values, expected, example.tolerance)
            except Exception as error:  # memory is short, or the kernel failed after its launch
                outcome.lost = _is_lost(torch_device)
                lost = f"it does not run: {_told(error)}"
                step, reason = (
                    ("check", lost) if outcome.lost else ("reference", f"could not be checked: {_told(error)}")
                )
        if reason:
            candidate.failed, candidate.reason = step, reason
        tell(Step(outcome, "check", done, len(waiting), candidate))
        if outcome.lost:
            _drop(waiting[done:], "check", f"not tried: {candidate.rank or 'the stored one'} broke the CUDA context")
            break
    outcome.checked = len(waiting)


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"


def _drop(candidates: Sequence[Candidate], step: str, reason: str) -> None:
    for candidate in candidates:
        candidate.failed, candidate.reason = step, reason


def _is_lost(torch_device: str) -> bool:
    """Whether the CUDA context is broken: then nothing more runs in this process."""
    if torch_device.startswith("cuda"):
        try:
            torch.cuda.synchronize(torch_device)
        except RuntimeError:
            return True
    return False


def _listed(values: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


def compare(values: Sequence[Tensor], expected: Sequence[Tensor], tolerance: tuple[float, float]) -> str | None:
    """What is wrong with the values, or None."""
    relative, absolute = tolerance
    if len(values) != len(expected):
        return f"wrong: {len(values)} outputs, expected {len(expected)}"
    for index, (value, right) in enumerate(zip(values, expected, strict=True)):
        if value.shape != right.shape:
            return f"wrong: output {index} has shape {list(value.shape)}, expected {list(right.shape)}"
        wide = torch.complex128 if right.is_complex() else torch.float64
        value, right = value.detach().to(right.device, wide), right.detach().to(wide)
        fine = torch.isclose(value, right, rtol=relative, atol=absolute, equal_nan=True)
        if not fine.all():
            count, worst = int((~fine).sum()), float((value - right).abs().nan_to_num(float("inf")).max())
            allowed = f"{absolute:g} + {relative:g} of the value is allowed"
            return f"wrong: {count} of {fine.numel()} values of output {index}, by up to {worst:.3g} where {allowed}"
    return None


def time_all(
    outcome: Outcome, torch_device: str, seconds: float, tell: Listener = quiet, clock: timing.Clock | None = None
) -> None:
    """Times what is alive at the shape that was asked for."""
    target, waiting = outcome.target, outcome.alive
    try:
        example = target.example(outcome.shape, outcome.dtype, torch_device)
    except Exception as error:
        _drop(waiting, "time", f"no inputs of this shape: {_told(error)}")
        outcome.lost = _is_lost(torch_device)
        return
    contenders = [timing.Contender(example.run, partial(within, target, candidate)) for candidate in waiting]
    if clock is None:
        where = torch.device(torch_device)
        try:
            clock = timing.HostClock() if where.type == "cpu" else timing.CudaClock(where.index or 0)
        except Exception as error:  # memory is short, or the context is lost
            _drop(waiting, "time", f"nothing can be timed: {_told(error)}")
            outcome.lost = _is_lost(torch_device)
            return

    def hear(state: timing.State) -> None:
        tell(Step(outcome, "time", state.done, state.total, timing=state))

    with torch.no_grad() if target.direction == "forward" else nullcontext():
        found, outcome.interrupted = timing.measure(contenders, clock, seconds, hear)
    for done, (candidate, times) in enumerate(zip(waiting, found, strict=True), 1):
        candidate.runs, candidate.stopped = len(times.runs), times.stopped
        candidate.us, candidate.spread = times.median, times.spread
        if times.failed:
            candidate.failed, candidate.reason = "time", f"it does not run at this shape: {times.failed}"
        tell(Step(outcome, "timed", done, len(waiting), candidate))
    outcome.lost = any(times.failed for times in found) and _is_lost(torch_device)


def pick(outcome: Outcome) -> None:
    """The winner: the fastest, if it beats the model's first choice by more than 2 %."""
    first = next((c for c in outcome.alive if c.rank), None)
    # Of an interrupted timing, medians of fewer runs say nothing.
    timed = [c for c in outcome.alive if c.us is not None and (not outcome.interrupted or c.runs >= timing.LEAST)]
    if timed:
        fastest = min(timed, key=lambda candidate: candidate.us)
        if first in timed and fastest.us >= (1 - WORTH) * first.us:
            fastest = first
        outcome.chosen, outcome.by = fastest, "measured"
    elif outcome.untimed is not None and not outcome.interrupted and outcome.alive:
        outcome.chosen, outcome.by = first or outcome.alive[0], "solved"


def keep(outcome: Outcome, store: Store | None) -> None:
    """Picks the winner, and writes it to the store unless that is None."""
    pick(outcome)
    if outcome.chosen is None:
        return
    device, chosen = outcome.device, outcome.chosen
    outcome.entry = Entry(
        constants=chosen.constants,
        by=outcome.by,
        source=outcome.target.tunable.digest,
        us=chosen.us,
        model_us=chosen.model_us,
    )
    if store is None:
        return
    written = store.put(device.name, device.arch, str(outcome.key), outcome.entry)
    choose.forget()
    if not written:
        outcome.unwritten, outcome.unstored = True, f"{store.path(device.name)} cannot be written"
        return
    # A measured entry stays where the new one is solved.
    found = Store(store.folder).entries(device.name)
    now = [each.entry for each in found if each.key == str(outcome.key) and each.origin == "user"]
    if now and (now[0].by, dict(now[0].constants)) == (outcome.by, chosen.constants):
        outcome.stored = str(store.path(device.name))
    elif now and now[0].by == "measured":
        outcome.unstored = f"what was measured on {now[0].time[:10]} stays in {store.path(device.name)}"
    else:  # another process removed it, or put something else
        outcome.unstored = f"another process has changed {store.path(device.name)}"


def tune(
    target: Target,
    place: Place,
    shape: Shape,
    dtype: str,
    *,
    top: int = 8,
    seconds: float = 30.0,
    stored: Store | None = None,
    store: Store | None = None,
    tell: Listener = quiet,
    clock: timing.Clock | None = None,
) -> Outcome:
    """Everything about one kernel at one shape.

    An interrupt ends it early; what was measured by then is kept, and the outcome says so.

    Args:
        top: candidates, beside the stored one.
        seconds: of timing.
        stored: the store that is asked for the present choice.
        store: the one that the winner is written to; None: nothing is written.
    """
    outcome = solve(target, place.device, shape, dtype, top, stored)
    tell(Step(outcome, "solve", len(outcome.candidates), len(outcome.candidates)))
    if not outcome.candidates:
        return outcome
    outcome.untimed = place.absent
    try:
        if not place.on_cpu:
            outcome.uncompiled = launch.reason_not_compiled()
            if outcome.uncompiled is None:
                compile_all(outcome, tell)
        if place.torch_device is not None and outcome.alive:
            check_all(outcome, place.torch_device, tell)
            if outcome.alive and not outcome.lost:
                time_all(outcome, place.torch_device, seconds, tell, clock)
    except KeyboardInterrupt:
        outcome.interrupted = True
    keep(outcome, store)
    return outcome
