"""Why a problem has no solution: a set of constraints that fails, though every part of it can be met."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .domains import Empty
from .expressions import Comparison, Constraint, Expression, Variable, is_real
from .limits import Clock, LimitReached, Statistics
from .network import Network
from .nodes import TooLarge
from .search import Best, Search
from .walk import Undefined, evaluate, partial, render

if TYPE_CHECKING:
    from .problem import Problem

SECONDS = 0.2
NODES = 2000


class Defined:
    """That the objective or a definition has a value: a member of conflicts, as constraints are."""

    def __init__(self, name: str, item: Any) -> None:
        self.name = name
        self.item = item

    def label(self) -> str:
        return f"{self.name} is defined: {render(self.item)}"


Member = Constraint | Defined


def explain(problem: Problem, seconds: float, filter_seconds: float = SECONDS) -> str | None:
    """The conflict in words; None if the problem has a solution.

    Args:
        seconds: to find out whether there is one.
        filter_seconds: to make the conflict small.

    Raises:
        LimitReached: it is not known whether there is a solution.
    """
    members: list[Member] = list(problem.constraints)
    quantities = [*problem.definitions.items(), *(("objective", term) for term in problem.objective)]
    # Real numbers may become inf - inf.
    members += [Defined(name, item) for name, item in quantities if is_real(item) or partial(item)]
    verdict = fails(problem, members, Clock(seconds), sys.maxsize)
    if verdict is None:
        raise LimitReached(f"{problem.name}: not known to be infeasible within {seconds:g} s")
    if not verdict:
        return None
    clock = Clock(filter_seconds)
    left, proven = minimise(problem, members, clock)
    return describe(problem, left, proven, clock)


def compile_members(problem: Problem, members: Sequence[Member], clock: Clock) -> Network:
    """The network of some constraints.

    Raises:
        Empty: they cannot hold together.
        TooLarge: an expression can leave ±2^512.
        LimitReached: out of time.
    """
    network = Network(list(problem.variables.values()), clock)
    network.require(member for member in members if isinstance(member, Constraint))
    for member in members:
        if isinstance(member, Defined):
            network.deep_slot(member.item)
    return network


def fails(problem: Problem, members: Sequence[Member], clock: Clock, nodes: int = NODES) -> bool | None:
    """Whether the members cannot hold together; None if that takes too long to find out."""

    def accept(values: tuple[int, ...]) -> bool:
        return met(members, dict(zip(problem.variables, values, strict=True)))

    try:
        network = compile_members(problem, members, clock)
        search = Search(network, [], [], Best(1, ()), accept, lambda values: (), nodes, Statistics())
        return next(search.run(), None) is None
    except Empty:
        return True
    except LimitReached:
        return None
    except TooLarge:
        # Without the constraints that were left out.
        if nodes == NODES:
            return None
        raise


def met(members: Sequence[Member], solution: dict[str, int]) -> bool:
    """Whether every constraint holds and every quantity has a value."""
    try:
        found = [(member, evaluate(getattr(member, "item", member), solution)) for member in members]
    except Undefined:
        return False
    return all(value for member, value in found if isinstance(member, Constraint))


def minimise(problem: Problem, members: list[Member], clock: Clock) -> tuple[list[Member], bool]:
    """A failing subset that cannot lose a member and still fail; False if that is not proven."""
    left = list(members)
    proven = True
    size = (len(left) + 1) // 2
    while left:
        start = 0
        while start < len(left):
            if clock.expired():
                return left, False
            rest = left[:start] + left[start + size :]
            verdict = fails(problem, rest, clock)
            if verdict:
                left = rest
            else:
                if verdict is None and size == 1:
                    proven = False
                start += size
        if size == 1:
            break
        size = (size + 1) // 2
    return left, proven


def describe(problem: Problem, members: list[Member], proven: bool, clock: Clock) -> str:
    count = len(problem.constraints) + sum(isinstance(member, Defined) for member in members)
    if len(members) == 1:
        lines = [f"infeasible: 1 of {count} constraints cannot hold"]
    else:
        lines = [f"infeasible: these {len(members)} of {count} constraints cannot hold together"]
    if not proven:
        lines[0] += " (the smallest set found in time; a part of it may fail too)"
    rows = [(member.label(), bounds(problem, member, members, clock)) for member in members]
    width = max(len(label) for label, found in rows if found) if any(found for _, found in rows) else 0
    lines += [f"  {label:<{width}}     {found}" if found else f"  {label}" for label, found in rows]
    return "\n".join(lines)


def bounds(problem: Problem, member: Member, members: list[Member], clock: Clock) -> str:
    """What propagation of the others finds of the sides of a comparison, where that refutes it and time is left."""
    if not isinstance(member, Comparison) or clock.expired():
        return ""
    others = [other for other in members if other is not member]
    try:
        network = compile_members(problem, others, clock)
        network.settle()
        sides = []
        for side in (member.left, member.right):
            x = network.deep_slot(side)
            network.settle()
            sides.append((side, network.domains.lo[x], network.domains.hi[x]))
    except (Empty, LimitReached, TooLarge):
        return ""
    (left, a, b), (right, c, e) = sides
    relation = member.relation
    if (relation == "<=" and a > e) or (relation == "<" and a >= e) or (relation == "==" and a > e):
        said = [(left, "at least", a), (right, "at most", e)]
    elif (relation == ">=" and b < c) or (relation == ">" and b <= c) or (relation == "==" and b < c):
        said = [(left, "at most", b), (right, "at least", c)]
    elif relation == "!=" and a == b == c == e:
        said = [(left, "always", a), (right, "always", c)]
    else:
        return ""
    words = [
        f"{side} is {how} {value}"
        for side, how, value in said
        if isinstance(side, Expression) and not isinstance(side, Variable)
    ]
    return ", ".join(words)
