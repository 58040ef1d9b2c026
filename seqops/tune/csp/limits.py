"""What a search may take, and what it took."""

from __future__ import annotations

import operator
import time
from dataclasses import dataclass
from math import inf, isnan
from numbers import Real
from typing import Any


@dataclass
class Statistics:
    """What a search took.

    Attributes:
        nodes: domains that were cut and propagated.
        seconds: from the call, compilation included; without what the consumer of a stream took.
        optimal: whether the search came to its end: the minimum is proven, or that there is no solution. Without an
            objective also where it stopped at as many solutions as were asked for.
    """

    nodes: int = 0
    seconds: float = 0.0
    optimal: bool = False


class LimitReached(Exception):
    """The search took more nodes or seconds than it was given.

    Attributes:
        best: what was found: of `solve` a solution or None, of `solutions` a list; solutions that were streamed already
            are not in it.
    """

    def __init__(self, message: str, best: Any = None) -> None:
        super().__init__(message)
        self.best = best


class Clock:
    """The time of one search, which stands still between `pause` and `resume`."""

    def __init__(self, seconds: float = inf) -> None:
        self.began = time.perf_counter()
        self.deadline = self.began + seconds
        self.paused = 0.0

    def passed(self) -> float:
        return time.perf_counter() - self.began

    def expired(self) -> bool:
        return time.perf_counter() > self.deadline

    def check(self) -> None:
        """Raises LimitReached when the time is over."""
        if time.perf_counter() > self.deadline:
            raise LimitReached("out of time")

    def pause(self) -> None:
        self.paused = time.perf_counter()

    def resume(self) -> None:
        away = time.perf_counter() - self.paused
        self.began += away
        self.deadline += away


def check_nodes(nodes: Any, what: str) -> int:
    """`nodes` as an int, else an error that says what was expected."""
    try:
        count = operator.index(nodes)
    except TypeError:
        raise TypeError(f"{what}: nodes: expected an integer, got {nodes!r}") from None
    if count < 0:
        raise ValueError(f"{what}: nodes: expected at least 0, got {count}")
    return count


def check_seconds(seconds: Any, what: str) -> float:
    """`seconds` as a float, else an error that says what was expected."""
    if not isinstance(seconds, Real):
        raise TypeError(f"{what}: seconds: expected a number, got {seconds!r}")
    if isnan(seconds) or seconds < 0:
        raise ValueError(f"{what}: seconds: expected at least 0, got {seconds}")
    return float(seconds)
