"""Depth-first branch and bound."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from math import inf, nextafter
from typing import Any

from .domains import Empty
from .limits import LimitReached, Statistics
from .network import Network

# A variable with more values than this is halved, else each value is tried.
WIDE = 4

Key = tuple[Any, ...]


class Best:
    """The `limit` cheapest solutions found, one for each combination of values of the `distinct` variables.

    Args:
        kept: False only counts them.

    Attributes:
        count: how many there are.
        found: keys and values, cheapest first.
        ceiling: the key that a solution has to undercut to be among them; None while any solution is.
    """

    def __init__(self, limit: int | None, distinct: Sequence[int], kept: bool = True) -> None:
        self.limit = limit
        self.kept = kept
        self.count = 0
        self.distinct = list(distinct)
        self.found: list[tuple[Key, tuple[int, ...]]] = []
        self.groups: dict[tuple[int, ...], tuple[Key, tuple[int, ...]]] = {}
        self.ceiling: Key | None = None

    @property
    def full(self) -> bool:
        return self.limit is not None and self.count == self.limit

    def add(self, key: Key, values: tuple[int, ...]) -> None:
        if not self.kept:
            self.count += 1
            return
        entry = (key, values)
        if self.distinct:
            group = tuple(values[x] for x in self.distinct)
            other = self.groups.get(group)
            if other is not None:
                if other[0] <= key:
                    return
                del self.found[bisect_left(self.found, other)]
            self.groups[group] = entry
        insort(self.found, entry)
        if self.limit is not None and len(self.found) > self.limit:
            _, dropped = self.found.pop()
            self.groups.pop(tuple(dropped[x] for x in self.distinct), None)
        self.count = len(self.found)
        if self.full:
            self.ceiling = self.found[-1][0]

    def group_ceiling(self, lo: Sequence[Any], hi: Sequence[Any]) -> Key | None:
        """The key of the solution that this group has already, where the domains leave one group."""
        if any(lo[x] != hi[x] for x in self.distinct):
            return None
        entry = self.groups.get(tuple(lo[x] for x in self.distinct))
        return entry[0] if entry else None


class Search:
    """One run over a network that holds the constraints.

    Args:
        terms: slots of the objective and its tie breakers.
        order: variables to assign first.
        accept: whether values solve the problem; asked of all that are found.
        cost: its exact key.
    """

    def __init__(
        self,
        network: Network,
        terms: Sequence[int],
        order: Sequence[int],
        best: Best,
        accept: Any,
        cost: Any,
        nodes: int,
        statistics: Statistics,
    ) -> None:
        self.network = network
        self.terms = list(terms)
        self.order = list(order)
        self.best = best
        self.accept = accept
        self.cost = cost
        self.nodes = nodes
        self.statistics = statistics
        d = network.domains
        watching = [d.on_lo[x] | d.on_hi[x] | d.on_hole[x] for x in range(d.variables)]
        self.degree = [max(1, marks.bit_count()) for marks in watching]

    def run(self) -> Iterator[tuple[int, ...]]:
        """Every solution that is accepted, as found; those too costly are skipped.

        Raises:
            LimitReached: without `best`.
        """
        d = self.network.domains
        try:
            self.network.settle()
        except Empty:
            return
        stack: list[tuple[Key, Any, Any, Key | None]] = [(self.bound(), d.save(), None, None)]
        while stack:
            bound, state, decision, ceiling = stack.pop()
            if self.hopeless(bound):
                continue
            d.restore(state)
            d.marked[0] = 0
            if self.settled():
                continue
            try:
                if decision is not None:
                    self.count()
                    self.assign(*decision)
                if decision is not None or ceiling is not self.best.ceiling:
                    self.tighten()
                    self.network.propagate()
                    bound = self.bound()
                    if self.hopeless(bound) or self.settled():
                        continue
            except Empty:
                continue
            x = self.choose()
            if x is None:
                values = tuple(d.lo[: d.variables])
                if self.accept(values):
                    self.best.add(self.cost(values), values)
                    yield values
                continue
            stack.extend(self.children(x))

    def children(self, x: int) -> list[tuple[Key, Any, Any, Key | None]]:
        """The nodes below this one, the last one first."""
        d = self.network.domains
        before = d.save()
        decisions = self.split(x)
        if not self.terms:
            return [((), before, decision, None) for decision in reversed(decisions)]
        found = []
        for number, decision in enumerate(decisions):
            self.count()
            if number:
                d.restore(before)
            d.marked[0] = 0
            try:
                self.assign(*decision)
                self.tighten()
                self.network.propagate()
            except Empty:
                continue
            bound = self.bound()
            if not self.hopeless(bound) and not self.settled():
                found.append((bound, number, d.save()))
        found.sort(key=lambda child: child[:2], reverse=True)
        return [(bound, state, None, self.best.ceiling) for bound, _, state in found]

    def split(self, x: int) -> list[tuple[int, int, int]]:
        """(variable, least value, largest value) of the parts that a node tries."""
        d = self.network.domains
        if d.size(x) <= WIDE:
            return [(x, value, value) for value in d.values(x)]
        low, high, step = int(d.lo[x]), int(d.hi[x]), d.step[x]
        middle = low + (high - low) // step // 2 * step
        if x in d.lists and not d.bits[x]:
            left = d.listed(x)
            middle = left[len(left) // 2 - 1]
        return [(x, low, middle), (x, middle + 1, high)]

    def assign(self, x: int, low: int, high: int) -> None:
        d = self.network.domains
        if d.lo[x] < low:
            d.set_lo(x, low)
        if d.hi[x] > high:
            d.set_hi(x, high)
        if not d.bits[x]:
            d.make_bits(x)

    def choose(self) -> int | None:
        """The variable to branch on: the first open one of `order`, else the one with the fewest values for each
        propagator that would hear of it."""
        d = self.network.domains
        lo, hi, bits, degree = d.lo, d.hi, d.bits, self.degree
        for x in self.order:
            if lo[x] != hi[x]:
                return x
        best, fewest = None, inf
        for x in range(d.variables):
            if lo[x] != hi[x]:
                b = bits[x]
                size = (b.bit_count() if b else d.size(x)) / degree[x]
                if size < fewest:
                    best, fewest = x, size
        return best

    def bound(self) -> Key:
        lo = self.network.domains.lo
        return tuple([lo[term] for term in self.terms])

    def hopeless(self, bound: Key) -> bool:
        """No solution below is cheaper than those that count."""
        best = self.best
        return bool(self.terms) and best.ceiling is not None and bound >= best.ceiling

    def settled(self) -> bool:
        """These domains leave one group of the distinct variables, and it has a solution that is no worse."""
        if not self.best.distinct:
            return False
        d = self.network.domains
        ceiling = self.best.group_ceiling(d.lo, d.hi)
        return ceiling is not None and self.bound() >= ceiling

    def tighten(self) -> None:
        """Cuts the objective to what is worth finding."""
        ceiling = self.best.ceiling
        if ceiling is None or not self.terms:
            return
        d = self.network.domains
        term, high = self.terms[0], ceiling[0]
        if len(self.terms) == 1:
            if d.step[term]:
                high -= 1
            elif isinstance(high, float):
                high = nextafter(high, -inf)
        d.set_hi_real(term, high)

    def count(self) -> None:
        statistics = self.statistics
        statistics.nodes += 1
        if statistics.nodes > self.nodes:
            raise LimitReached(f"more than {self.nodes} node{'' if self.nodes == 1 else 's'}")
        self.network.clock.check()
