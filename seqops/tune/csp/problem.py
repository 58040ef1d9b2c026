"""A problem: variables, constraints, an objective, and what can be asked of them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from .domains import BITS, Empty
from .explanation import explain
from .expressions import Constraint, Expression, Variable, condition, number
from .limits import Clock, LimitReached, Statistics, check_nodes, check_seconds
from .network import Network
from .search import Best, Search
from .walk import Undefined, evaluate, partial

NODES = 100_000
SECONDS = 2.0


class Problem:
    """Integer variables, constraints between them, and an objective to minimise."""

    def __init__(self, name: str = "problem") -> None:
        self.name = name
        self.variables: dict[str, Variable] = {}
        self.constraints: list[Constraint] = []
        self.definitions: dict[str, Any] = {}
        self.objective: tuple[Any, ...] = ()
        self.first: list[Variable] = []
        self.statistics = Statistics()

    def __repr__(self) -> str:
        return f"<problem {self.name}: {len(self.variables)} variables, {len(self.constraints)} constraints>"

    # ---- building

    def int(
        self,
        name: str,
        low: int | None = None,
        high: int | None = None,
        *,
        multiple_of: int = 1,
        values: Iterable[int] | None = None,
    ) -> Variable:
        """A new variable with the values `low..high`, of those the multiples of `multiple_of`; or with `values`."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"int: name: expected a non-empty string, got {name!r}")
        if name in self.variables:
            raise ValueError(f"int: {name}: the problem has a variable of this name already")
        if name in self.definitions:
            raise ValueError(f"int: {name}: the problem has a definition of this name already")
        if values is not None:
            if low is not None or high is not None or multiple_of != 1:
                raise TypeError(f"int: {name}: expected either bounds or values, got both")
            if not isinstance(values, Iterable):
                raise TypeError(f"int: {name}: values: expected integers, got {values!r}")
            listed = tuple(sorted({integer(value, f"int: {name}: values") for value in values}))
            if not listed:
                raise ValueError(f"int: {name}: values: expected at least one, got none")
            if len(listed) > BITS:
                raise ValueError(f"int: {name}: values: expected at most {BITS}, got {len(listed)}")
            variable = Variable(self, name, len(self.variables), listed[0], listed[-1], 1, listed)
        else:
            if low is None or high is None:
                raise TypeError(f"int: {name}: expected bounds low and high, or values")
            low, high = integer(low, f"int: {name}: low"), integer(high, f"int: {name}: high")
            step = integer(multiple_of, f"int: {name}: multiple_of")
            if step < 1:
                raise ValueError(f"int: {name}: multiple_of: expected at least 1, got {step}")
            first, last = -(-low // step) * step, high // step * step
            if first > last:
                what = f"a multiple of {step} between" if step > 1 else "a value between"
                raise ValueError(f"int: {name}: expected {what} low and high, got {low}..{high}")
            variable = Variable(self, name, len(self.variables), first, last, step, None)
        self.variables[name] = variable
        return variable

    def add(self, constraint: Constraint | bool, name: str | None = None) -> Constraint:
        """Requires a constraint; `name` says what it means in explanations. Gives back the named constraint."""
        constraint = condition(constraint, "add")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"add: name: expected a string, got {name!r}")
        self.check_owner(constraint, "add")
        # Another object: the same constraint may be added elsewhere, under another name.
        constraint = constraint.named(name)
        self.constraints.append(constraint)
        return constraint

    def define(self, name: str, expression: Any) -> Any:
        """Names a quantity for reports and gives it back."""
        if not isinstance(name, str) or not name:
            raise TypeError(f"define: name: expected a non-empty string, got {name!r}")
        if name in self.definitions or name in self.variables:
            raise ValueError(f"define: {name}: the problem has this name already")
        self.definitions[name] = self.operand(expression, f"define: {name}")
        return expression

    def minimize(self, objective: Any, then: Any = ()) -> None:
        """What to minimise; `then`, an expression or several, decides between equal costs, the first ones first."""
        later = then if isinstance(then, tuple | list) else (then,)
        terms = [self.operand(objective, "minimize: objective")]
        terms += [self.operand(term, "minimize: then") for term in later]
        self.objective = tuple(terms)

    def order(self, *variables: Variable) -> None:
        """The variables that the search assigns first, in this order."""
        for variable in variables:
            if not isinstance(variable, Variable):
                raise TypeError(f"order: expected variables, got {variable!r}")
            self.check_owner(variable, "order")
        self.first = list(variables)

    def operand(self, item: Any, what: str) -> Any:
        if isinstance(item, Constraint):
            raise TypeError(f"{what}: expected an expression, got the constraint {item}: use csp.where")
        if isinstance(item, Expression):
            self.check_owner(item, what)
            return item
        return number(item, what)

    def check_owner(self, item: Any, what: str) -> None:
        if item.problem is not None and item.problem is not self:
            raise ValueError(f"{what}: {item}: belongs to another problem, {item.problem.name!r}")

    # ---- one solution

    def check(self, solution: Mapping[str, int]) -> str | None:
        """None if this solves the problem, else what is wrong, in one line."""
        if not isinstance(solution, Mapping):
            raise TypeError(f"check: solution: expected a mapping from names to integers, got {solution!r}")
        for name in self.variables:
            if name not in solution:
                return f"{name}: missing"
        for name, value in solution.items():
            if name not in self.variables:
                return f"{name}: not a variable of {self.name}"
            if type(value) is not int:
                return f"{name}: expected an int, got {value!r}"
            if not self.variables[name].contains(value):
                return f"{name}: expected a value of {self.variables[name].domain()}, got {value}"
        return self.defect(solution)

    def defect(self, solution: Mapping[str, int]) -> str | None:
        """What is wrong with values that are in their domains; None if nothing is."""
        for constraint in self.constraints:
            try:
                if not evaluate(constraint, solution):
                    return f"violates {constraint.label()}"
            except Undefined as problem:
                return f"{problem} in {constraint.label()}"
        for name, item in [*self.definitions.items(), *(("objective", term) for term in self.objective)]:
            try:
                evaluate(item, solution)
            except Undefined as problem:
                return f"{problem} in {name}: {item}"
        return None

    def cost(self, solution: Mapping[str, int]) -> int | float:
        """The objective's value; without its tie breakers."""
        if not self.objective:
            raise ValueError(f"cost: {self.name} has no objective")
        self.expect_all(solution, "cost")
        return evaluate(self.objective[0], solution)

    def values(self, solution: Mapping[str, int]) -> dict[str, int | float]:
        """The defined quantities, in the order of their definition."""
        self.expect_all(solution, "values")
        return {name: evaluate(item, solution) for name, item in self.definitions.items()}

    def expect_all(self, solution: Mapping[str, int], what: str) -> None:
        if not isinstance(solution, Mapping):
            raise TypeError(f"{what}: solution: expected a mapping from names to integers, got {solution!r}")
        for name in self.variables:
            if name not in solution:
                raise ValueError(f"{what}: solution: {name}: missing")
            if not isinstance(solution[name], int):
                raise TypeError(f"{what}: solution: {name}: expected an int, got {solution[name]!r}")

    # ---- solving

    def solve(self, nodes: int = NODES, seconds: float = SECONDS) -> dict[str, int] | None:
        """The cheapest solution, or None if there is none.

        Raises:
            LimitReached: the search took more nodes or seconds; `.best` holds the cheapest solution found, or None.
        """
        best = Best(1, ())
        self.statistics = Statistics()
        nodes, clock = check_nodes(nodes, "solve"), Clock(check_seconds(seconds, "solve"))
        try:
            for _ in self.search(best, nodes, clock):
                pass
        except LimitReached as limit:
            limit.best = limit.best[0] if limit.best else None
            raise
        found = self.name_values(best)
        return found[0] if found else None

    def solutions(
        self,
        limit: int | None = None,
        distinct: Sequence[str | Variable] = (),
        nodes: int = NODES,
        seconds: float = SECONDS,
    ) -> Iterator[dict[str, int]]:
        """Solutions, cheapest first: at most `limit`, and one for each combination of values of `distinct`.

        They are those of the problem as it is now: what is added while they are read does not count. Nor does the time
        that passes between them.

        Raises:
            LimitReached: the search took more nodes or seconds; `.best` holds a list of those found, without an
                objective and `distinct` an empty one, since they were given already.
        """
        nodes, seconds = check_nodes(nodes, "solutions"), check_seconds(seconds, "solutions")
        if limit is not None and integer(limit, "solutions: limit") < 0:
            raise ValueError(f"solutions: limit: expected at least 0, got {limit}")
        slots = self.distinct_slots(distinct)
        self.statistics = Statistics()
        return self.frozen().stream(Best(limit, slots, bool(self.objective or slots)), nodes, seconds)

    def distinct_slots(self, distinct: Any) -> list[int]:
        if isinstance(distinct, str | Variable):
            distinct = (distinct,)
        if not isinstance(distinct, Iterable):
            raise TypeError(f"solutions: distinct: expected variables or their names, got {distinct!r}")
        slots = []
        for item in distinct:
            if isinstance(item, Variable):
                self.check_owner(item, "solutions: distinct")
            elif not isinstance(item, str):
                raise TypeError(f"solutions: distinct: expected variables or their names, got {item!r}")
            name = item.name if isinstance(item, Variable) else item
            if name not in self.variables:
                raise ValueError(f"solutions: distinct: expected variables of {self.name}, got {name!r}")
            slots.append(self.variables[name].index)
        return slots

    def frozen(self) -> Problem:
        """The problem as it is now; statistics are shared."""
        still = copy.copy(self)
        still.variables, still.definitions = dict(self.variables), dict(self.definitions)
        still.constraints, still.first = list(self.constraints), list(self.first)
        return still

    def stream(self, best: Best, nodes: int, seconds: float) -> Iterator[dict[str, int]]:
        """With an objective all at the end; without one each solution when it is found."""
        if best.limit == 0:
            return
        clock = Clock(seconds)
        for found in self.search(best, nodes, clock):
            if not self.objective:
                clock.pause()
                yield found
                clock.resume()
        if self.objective:
            yield from self.name_values(best)

    def name_values(self, best: Best) -> list[dict[str, int]]:
        return [dict(zip(self.variables, values, strict=True)) for _, values in best.found]

    def compile(self, clock: Clock | None = None) -> tuple[Network, list[int]]:
        """The network of everything, and the slots of the objective's terms.

        Raises:
            Empty: there is no solution.
            TooLarge: an expression can leave ±2^512.
            LimitReached: out of time.
        """
        network = Network(list(self.variables.values()), clock)
        network.require(self.constraints)
        terms = [network.deep_slot(term) for term in self.objective]
        for item in self.definitions.values():
            if partial(item):
                network.deep_slot(item)
        return network, terms

    def search(self, best: Best, nodes: int, clock: Clock) -> Iterator[dict[str, int]]:
        """Fills `best`; gives every improvement on the way."""
        statistics = self.statistics

        def accept(values: tuple[int, ...]) -> bool:
            return self.defect(dict(zip(self.variables, values, strict=True))) is None

        def cost(values: tuple[int, ...]) -> tuple[int | float, ...]:
            solution = dict(zip(self.variables, values, strict=True))
            return tuple([evaluate(term, solution) for term in self.objective])

        try:
            network, terms = self.compile(clock)
            order = [variable.index for variable in self.first]
            search = Search(network, terms, order, best, accept, cost, nodes, statistics)
            for values in search.run():
                yield dict(zip(self.variables, values, strict=True))
                if not terms and best.full:
                    break
            statistics.optimal = True
        except Empty:
            statistics.optimal = True
        except LimitReached as limit:
            raise LimitReached(f"{self.name}: {limit}", self.name_values(best)) from None
        finally:
            statistics.seconds = clock.passed()

    def explain(self, seconds: float = SECONDS) -> str | None:
        """Why there is no solution: constraints that cannot hold together; None if there is a solution.

        Raises:
            LimitReached: whether there is one takes longer than `seconds` to find out.
        """
        return explain(self, check_seconds(seconds, "explain"))


def integer(value: Any, what: str) -> int:
    found = number(value, what)
    if isinstance(found, float):
        raise TypeError(f"{what}: expected an integer, got {found!r}")
    return found
