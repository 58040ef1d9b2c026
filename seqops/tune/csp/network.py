"""From constraints to propagators.

A comparison with a number cuts a domain at once; `v == x*y` makes the variable the product's own slot; the parts of an
alternative become slots of 0 and 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from . import linear, logic
from .domains import Empty
from .expressions import Comparison, Conjunction, Constraint, Disjunction, Expression, Fixed, Variable
from .nodes import Nodes, TooLarge, zero_meets
from .walk import variables


class Network(Nodes):
    """The compiled form of a problem."""

    def require(self, constraints: Iterable[Constraint]) -> None:
        """Requires constraints. What can grow too large waits until the others have narrowed what it is made of.

        Raises:
            Empty: they cannot hold.
            TooLarge: an expression can leave ±2^512.
            LimitReached: out of time.
        """
        waiting = list(constraints)
        while waiting:
            later = []
            for constraint in waiting:
                try:
                    self.post(constraint)
                except TooLarge as error:
                    later.append(constraint)
                    if len(later) == len(waiting):
                        raise error
            if later:
                self.propagate()
            waiting = later

    def post(self, constraint: Constraint) -> None:
        """Requires a constraint.

        Raises:
            Empty: it cannot hold.
            TooLarge: an expression can leave ±2^512.
            LimitReached: out of time.
        """
        self.clock.check()
        self.reach(constraint)
        if isinstance(constraint, Comparison):
            self.post_comparison(constraint)
        elif isinstance(constraint, Conjunction):
            for part in constraint.parts:
                self.post(part)
        elif isinstance(constraint, Disjunction):
            first = len(self.propagators)
            parts = []
            shared: set[int] | None = None
            for part in constraint.parts:
                parts.append(self.truth(part))
                used = {variable.index for variable in variables(part)}
                shared = used if shared is None else shared & used
            # The propagators of the parts alone, so that trying a part stays cheap.
            own = (1 << len(self.propagators)) - (1 << first)
            run = logic.alternatives(self.domains, parts, sorted(shared or ()), lambda part: self.attempt(part, own))
            self.add(run, dict.fromkeys((*parts, *sorted(shared or ()))), "lo hi hole")
        elif isinstance(constraint, Fixed) and not constraint.holds:
            raise Empty

    def attempt(self, part: int, own: int) -> tuple[list, ...] | None:
        """The domains that are left if the part is 1, by the propagators `own` alone; None if none are."""
        d = self.domains
        before, marks = d.save(), d.marked[0]
        d.marked[0] = 0
        try:
            d.set_lo(part, 1)
            for _ in range(4 * own.bit_count()):
                mine = d.marked[0] & own
                if not mine:
                    break
                first = mine & -mine
                d.marked[0] = mine ^ first
                self.propagators[first.bit_length() - 1]()
            return d.save()
        except Empty:
            return None
        finally:
            d.restore(before)
            d.marked[0] = marks

    def post_comparison(self, constraint: Comparison) -> None:
        d, relation = self.domains, constraint.relation
        if relation == "==" and self.define(constraint.left, constraint.right):
            return
        terms, bound, relation = self.normal(constraint)
        if not terms:
            if not zero_meets(relation, bound):
                raise Empty
            return
        if len(terms) > 1:
            known = self.nodes.get(("+", *sorted((x, c) for c, x in terms), 0))
            if known is not None:
                terms = [(1, known)]
        if len(terms) == 1:
            ((c, x),) = terms
            if relation == "<=":
                if c > 0 and d.hi[x] > bound // c:
                    d.set_hi(x, bound // c)
                elif c < 0 and d.lo[x] < -(bound // -c):
                    d.set_lo(x, -(bound // -c))
                return
            value, odd = divmod(bound, c)
            if relation == "==":
                if odd:
                    raise Empty
                self.fix(x, value)
                return
            if odd:
                return
            if d.bits[x]:
                d.remove(x, value)
                return
        if relation == "<=":
            index = self.add(linear.at_most(d, terms, bound), ())
            d.watch(index, tuple(x for c, x in terms if c > 0), "lo")
            d.watch(index, tuple(x for c, x in terms if c < 0), "hi")
        elif relation == "==":
            self.equate(terms, bound)
        else:
            self.add(linear.different(d, terms, bound), [x for _, x in terms])

    def fix(self, x: int, value: int) -> None:
        d = self.domains
        if d.lo[x] < value:
            d.set_lo(x, value)
        if d.hi[x] > value:
            d.set_hi(x, value)
        if d.lo[x] != value or d.hi[x] != value:
            raise Empty

    def define(self, left: Any, right: Any) -> bool:
        """`v == x*y` and the like: the variable becomes the node's slot. False where it cannot."""
        for variable, item in ((left, right), (right, left)):
            if not isinstance(variable, Variable) or not isinstance(item, Expression):
                continue
            x = variable.index
            if item.operator == "*":
                factors = self.factors(item)
                if factors is None:
                    continue
                z = self.product(*factors, x)
            elif item.operator in ("variable", "+", "-", "neg"):
                continue
            else:
                z = self.node(item, x)
            if z != x:
                # Another variable is the node already.
                self.equate([(1, x), (-1, z)], 0)
            return True
        return False

    def factors(self, item: Expression) -> tuple[int, int] | None:
        """The slots of which an expression is the product; None if a number is among its factors."""
        left, right = (self.form(operand) for operand in item.operands)
        (a, c), (b, e) = left, right
        if not a or not b:
            return None
        if len(a) == len(b) == 1 and c == e == 0:
            ((x, p),), ((y, q),) = a.items(), b.items()
            return (x, y) if p * q == 1 else None
        return self.slot_of(left), self.slot_of(right)
