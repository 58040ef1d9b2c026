"""Timing several versions of one call against each other, on a GPU or on the CPU.

All take turns, so that a clock that drifts drifts for all. A version is known when its median is known to 1 %; one that
is clearly slower than the leader stops early.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

WARM_UPS = 3
KNOWN = 0.01  # relative half width of the median's 95 % interval
SLOWER = 1.5  # times the leader
EARLY = 5  # runs before anything is concluded
LEAST = 3  # rounds, however long one takes
MOST = 2000

# A run on the CPU lasts at least so long, in microseconds: the clock's own time is then nothing.
SHORTEST_RUN = 300.0
# A call longer than this needs no second one to be warm.
LONG_CALL = 20_000.0


@dataclass
class Contender:
    """One version of the call.

    Attributes:
        run: the call.
        within: gives the context that makes it this version.
    """

    run: Callable[[], object]
    within: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Times:
    """What is known of one version: microseconds of each run, whether it stopped early, why it failed."""

    runs: list[float] = field(default_factory=list)
    stopped: bool = False
    failed: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.runs) if self.runs else None

    @property
    def spread(self) -> float | None:
        """Half the width of the median's 95 % interval, over the median; it comes from the order of the runs alone."""
        if len(self.runs) < 2:
            return None
        ordered = sorted(self.runs)
        out = max(0, math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
        return (ordered[-1 - out] - ordered[out]) / 2 / statistics.median(ordered)

    @property
    def known(self) -> bool:
        spread = self.spread
        return len(self.runs) >= EARLY and spread is not None and spread <= KNOWN


Timer = Callable[[], float]  # makes one run, gives its microseconds


class Clock(Protocol):
    def prepare(self, contenders: Sequence[Contender]) -> list[Timer]: ...


class HostClock:
    """For calls that are over when they return."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def prepare(self, contenders: Sequence[Contender]) -> list[Timer]:
        return [self._timer(contender) for contender in contenders]

    def _timer(self, contender: Contender) -> Timer:
        calls, long = 0, False

        def spend(number: int) -> float:
            start = self.now()
            for _ in range(number):
                contender.run()
            return (self.now() - start) * 1e6 / number

        def timer() -> float:
            nonlocal calls, long
            with contender.within():
                if not long:
                    once = spend(1)  # the first call after the change of version asks which one it is
                if calls == 0:
                    once = min(once, spend(1)) if once < LONG_CALL else once
                    calls, long = max(1, math.ceil(SHORTEST_RUN / max(once, 0.1))), once > LONG_CALL
                return spend(calls)

        return timer


class CudaClock:
    """For calls that queue work on a CUDA device: from a cold second-level cache, between two events.

    Calls that a CUDA graph can hold are captured, which leaves the host's work out; all of them or none.

    Args:
        index: of the device.
        cuda: `torch.cuda`, or what stands in for it.
    """

    def __init__(self, index: int, cuda: Any = torch.cuda, empty: Callable[..., Any] = torch.zeros) -> None:
        self.index = index
        self.cuda = cuda
        size = cuda.get_device_properties(index).L2_cache_size
        # Read, not written: dirty lines would be written back while the call runs.
        self.buffer = empty(max(4 * size, 64 << 20) // 4, dtype=torch.int32, device=f"cuda:{index}")
        self.captured = False

    def prepare(self, contenders: Sequence[Contender]) -> list[Timer]:
        with self.cuda.device(self.index):
            try:
                calls = self._capture(contenders)
                self.captured = True
            except Exception:  # what a graph cannot hold is launched from the host; what fails there too is told
                self.cuda.synchronize()
                self.captured = False
        if self.captured:
            return [self._timer(Contender(call)) for call in calls]
        return [self._timer(contender) for contender in contenders]

    def _capture(self, contenders: Sequence[Contender]) -> list[Callable[[], object]]:
        """Replays of one call each. They run in turn, so that they may share memory."""
        stream, pool, calls = self.cuda.Stream(), self.cuda.graph_pool_handle(), []
        for contender in contenders:
            with contender.within():
                with self.cuda.stream(stream):
                    for _ in range(2):  # what compiles or allocates does so before the capture
                        contender.run()
                self.cuda.synchronize()
                graph = self.cuda.CUDAGraph()
                with self.cuda.graph(graph, pool=pool, stream=stream):
                    contender.run()
            calls.append(graph.replay)
        return calls

    def _timer(self, contender: Contender) -> Timer:
        def timer() -> float:
            with self.cuda.device(self.index), contender.within():
                if not self.captured:
                    contender.run()  # the first call after the change of version asks which one it is
                start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
                self.buffer.amax()
                start.record()
                contender.run()
                end.record()
                self.cuda.synchronize()
                return start.elapsed_time(end) * 1e3

        return timer


@dataclass(frozen=True)
class State:
    """How far the timing is: versions that are known or stopped, of all; the best median; seconds left at most."""

    done: int
    total: int
    share: float
    best: float | None
    left: float


def measure(
    contenders: Sequence[Contender],
    clock: Clock,
    seconds: float,
    tell: Callable[[State], None] = lambda state: None,
    now: Callable[[], float] = time.monotonic,
) -> tuple[list[Times], bool]:
    """Times all of them, for about so many seconds.

    Returns:
        What is known of each, and whether an interrupt ended it.
    """
    start = now()
    found = [Times() for _ in contenders]

    def attempt(index: int) -> float | None:
        try:
            return timers[index]()
        except Exception as error:
            found[index].failed = f"{type(error).__name__}: {error}"
            return None

    def state() -> State:
        best = min((times.median for times in found if times.runs), default=None)
        spent = now() - start
        done = sum(times.known or times.stopped or times.failed is not None for times in found)
        share = max(done / max(len(found), 1), min(spent / seconds, 1.0) if seconds > 0 else 1.0)
        return State(done, len(found), share, best, max(seconds - spent, 0.0))

    try:
        try:
            timers = clock.prepare(contenders)
        except Exception as error:  # a call that breaks the CUDA context breaks it for all
            for times in found:
                times.failed = f"{type(error).__name__}: {error}"
            return found, False
        for index in range(len(found)):
            for _ in range(WARM_UPS):
                once = attempt(index)
                if once is None or now() - start > seconds / 4 or once > LONG_CALL * 10:
                    break
        for turn in range(MOST):
            live = [i for i, times in enumerate(found) if not (times.stopped or times.failed)]
            over = turn >= LEAST and now() - start >= seconds
            if over or not live or all(found[i].known for i in live):
                break
            for index in live:
                once = attempt(index)
                if once is not None:
                    found[index].runs.append(once)
            _stop_slow(found)
            tell(state())
    except KeyboardInterrupt:
        return found, True
    return found, False


def _stop_slow(found: Sequence[Times]) -> None:
    running = [times for times in found if times.runs and times.failed is None]
    best = min((times.median for times in running), default=0.0)
    for times in running:
        if len(times.runs) >= EARLY and times.median > SLOWER * best:
            times.stopped = True
