"""From expressions to slots and propagators, and propagation to a fixpoint.

Equal subexpressions share one slot, wherever they occur, so what one constraint finds out about `m*n` serves all
others. Sums with integer coefficients are flattened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import gcd, inf
from typing import Any

from . import choices, linear, logic, products, quotients, reals
from .domains import Domains
from .expressions import (
    Comparison,
    Conjunction,
    Constraint,
    Expression,
    Fixed,
    Junction,
    Variable,
    deep_parts,
    is_sum,
)
from .limits import Clock

# No integer that an expression can reach may exceed this, so that none is too large to become a float.
LARGEST = 1 << 512
# A fixpoint that takes more runs than these, and these for each propagator, is left unfinished. That loses no solution.
RUNS, RUNS_EACH = 1000, 64
# The clock is read once in so many runs.
RUNS_UNTIMED = 128

Form = tuple[dict[int, int], int]  # slot -> coefficient, constant


class TooLarge(ValueError):
    """An expression can leave ±2^512."""


class Nodes:
    """Variables and expressions as slots, and the propagators between them.

    Args:
        clock: what compilation and propagation may take.
    """

    def __init__(self, declared: Sequence[Variable], clock: Clock | None = None) -> None:
        self.clock = clock or Clock()
        self.domains = Domains()
        self.propagators: list[Callable[[], object]] = []
        self.aligners: list[Callable[[], None]] = []
        self.nodes: dict[tuple, int] = {}
        # By id, with the expression itself, so that no other takes its id.
        self.forms: dict[int, tuple[Expression, Form]] = {}
        self.made: dict[int, tuple[Expression, int]] = {}
        self.truths: dict[int, tuple[Constraint, int]] = {}
        d = self.domains
        for variable in declared:
            x = d.slot(variable.low, variable.high, variable.step)
            if variable.values is None:
                d.make_bits(x)
            else:
                d.set_values(x, variable.values)
                if not d.bits[x]:
                    self.add(choices.member(d, x, variable.values), (x,))
        d.variables = len(declared)

    # ---- propagation

    def add(self, run: Callable[[], object], slots: Sequence[int], events: str = "lo hi") -> int:
        """A new propagator, marked to run."""
        index = len(self.propagators)
        self.propagators.append(run)
        self.domains.watch(index, tuple(slots), events)
        self.domains.marked[0] |= 1 << index
        return index

    def propagate(self) -> None:
        """Runs marked propagators until none is left, or too many have run.

        Raises:
            Empty: there is no solution in these domains.
            LimitReached: out of time.
        """
        marked, propagators = self.domains.marked, self.propagators
        left = RUNS + RUNS_EACH * len(propagators)
        while left > 0:
            for _ in range(RUNS_UNTIMED):
                marks = marked[0]
                if not marks:
                    return
                first = marks & -marks
                marked[0] = marks ^ first
                if not propagators[first.bit_length() - 1]():
                    marked[0] &= ~first
            self.clock.check()
            left -= RUNS_UNTIMED
        marked[0] = 0

    def settle(self) -> None:
        """The first fixpoint: steps as well as bounds."""
        d = self.domains
        for _ in range(3):
            self.propagate()
            for x in range(d.variables):
                if not d.bits[x] and d.make_bits(x):
                    d.marked[0] |= d.on_lo[x] | d.on_hi[x] | d.on_hole[x]
            for align in self.aligners:
                self.clock.check()
                align()
            if not d.marked[0]:
                return
        self.propagate()

    # ---- expressions

    def reach(self, item: Any) -> None:
        """Makes what lies deep in an item, so that making the item recurses little."""
        for part in deep_parts(item):
            if isinstance(part, Constraint):
                self.truth(part)
            elif part.real:
                self.slot(part)
            else:
                self.form(part)

    def deep_slot(self, item: Any) -> int:
        """The slot of any expression or number, however deep."""
        self.clock.check()
        self.reach(item)
        return self.slot(item)

    def form(self, item: Any) -> Form:
        """An integer expression as a sum of slots."""
        if not isinstance(item, Expression):
            return {}, item
        if item.operator == "variable":
            return {item.index: 1}, 0  # type: ignore[attr-defined]  # a Variable
        known = self.forms.get(id(item))
        if known is None:
            known = self.forms[id(item)] = (item, self.make_form(item))
        return known[1]

    def make_form(self, item: Expression) -> Form:
        name, operands = item.operator, item.operands
        if name == "neg":
            return scale(self.form(operands[0]), -1)
        if name in ("+", "-"):
            # Long sums lean to the left: a loop, since recursion would be too deep.
            terms: dict[int, int] = {}
            constant = 0
            node: Any = item
            while is_sum(node) and id(node) not in self.forms:
                constant += accumulate(terms, self.form(node.operands[1]), 1 if node.operator == "+" else -1)
                node = node.operands[0]
            constant += accumulate(terms, self.form(node), 1)
            return {x: c for x, c in terms.items() if c}, constant
        if name == "*":
            (a, c), (b, e) = left, right = self.form(operands[0]), self.form(operands[1])
            if not a:
                return scale(right, c)
            if not b:
                return scale(left, e)
            if len(a) == len(b) == 1 and c == e == 0:
                # 4*m * n as 4 * (m*n), which shares the product.
                ((x, p),), ((y, q),) = a.items(), b.items()
                return {self.product(x, y): p * q}, 0
            return {self.product(self.slot_of(left), self.slot_of(right)): 1}, 0
        return {self.node(item): 1}, 0

    def slot_of(self, form: Form) -> int:
        """The slot of a sum."""
        terms, constant = form
        if not terms:
            return self.constant(constant)
        if constant == 0 and len(terms) == 1:
            ((x, c),) = terms.items()
            if c == 1:
                return x
        key = ("+", *sorted(terms.items()), constant)
        z = self.nodes.get(key)
        if z is None:
            d = self.domains
            low = high = constant
            for x, c in terms.items():
                low += c * (d.lo[x] if c > 0 else d.hi[x])
                high += c * (d.hi[x] if c > 0 else d.lo[x])
            z = self.nodes[key] = self.integer(low, high)
            self.equate([*((c, x) for x, c in terms.items()), (-1, z)], -constant)
        return z

    def integer(self, low: int | float, high: int | float) -> int:
        if low < -LARGEST or high > LARGEST:
            ends = " to ".join(f"{'-' if end < 0 else ''}2^{int(end).bit_length()}" for end in (low, high))
            raise TooLarge(f"an expression of the problem can leave ±2^512: it reaches from {ends}")
        return self.domains.slot(low, high, 1)

    def equate(self, terms: linear.Terms, constant: int) -> None:
        """sum c x == constant, as a constraint."""
        d = self.domains
        self.add(linear.equal(d, terms, constant), [x for _, x in terms], "lo hi hole" if len(terms) == 2 else "lo hi")
        self.aligners.append(lambda: linear.align(d, terms, constant))

    def constant(self, value: int | float) -> int:
        key = ("constant", type(value), value)
        if key not in self.nodes:
            self.nodes[key] = self.domains.slot(value, value, 0 if isinstance(value, float) else 1)
        return self.nodes[key]

    def product(self, x: int, y: int, target: int | None = None) -> int:
        x, y = min(x, y), max(x, y)
        known = self.nodes.get(("*", x, y))
        if known is not None:
            return known
        d = self.domains
        z = target
        if z is None:
            z = self.integer(*reals.corners(d.lo[x], d.hi[x], d.lo[y], d.hi[y]))
        self.nodes["*", x, y] = z
        self.add(products.product(d, z, x, y), (x, y, z))
        self.aligners.append(lambda: products.align_product(d, z, x, y))
        return z

    def slot(self, item: Any) -> int:
        """The slot of any expression or number."""
        if not isinstance(item, Expression):
            return self.constant(item)
        if not item.real:
            return self.slot_of(self.form(item))
        known = self.made.get(id(item))
        if known is None:
            known = self.made[id(item)] = (item, self.node(item))
        return known[1]

    def node(self, item: Expression, target: int | None = None) -> int:
        """The slot of an expression whose operator is no integer sum or product; `target` may become it."""
        name, d = item.operator, self.domains
        if item.real and name in ("+", "-", "neg"):
            terms = self.real_terms(item)
            key: tuple = ("real +", *terms)
            slots = [x for _, x in terms]
        elif name == "lookup":
            terms = []
            slots = [self.slot(item.operands[0])]
            key = (name, slots[0], *item.operands[1].items(), item.real)
        else:
            terms = []
            slots = [self.truth(part) if isinstance(part, Constraint) else self.slot(part) for part in item.operands]
            slots = sorted(set(slots)) if name in ("min", "max") else slots
            key = (name, *slots)
        known = self.nodes.get(key)
        if known is not None:
            return known
        z = d.slot(-inf, inf, 0 if item.real else 1) if target is None else target
        if name in ("/", "//", "ceildiv", "%"):
            y = slots[1]
            if d.lo[y] <= 0 <= d.hi[y]:
                nonzero = quotients.not_zero(d, y)
                self.add(nonzero, (y,))
                nonzero()
        run = self.propagator(item, z, slots, terms)
        self.nodes[key] = z
        self.add(run, (*dict.fromkeys(slots), z), "lo hi hole" if name in ("%", "lookup") else "lo hi")
        # Bounds at once: those made next read them.
        run()
        return z

    def propagator(self, item: Expression, z: int, slots: list[int], terms: list[tuple[int, int]]) -> linear.Propagator:
        """What ties the slot of an expression to those of its operands."""
        name, d = item.operator, self.domains
        if terms:
            return reals.total(d, z, terms)
        if name in ("min", "max"):
            return choices.extreme(d, z, slots, name == "max")
        if name == "lookup":
            return choices.table(d, z, slots[0], item.operands[1])
        if name in ("//", "ceildiv"):
            return quotients.quotient(d, z, *slots, up=name == "ceildiv")
        make: Callable[..., linear.Propagator] = {
            "where": logic.choice,
            "abs": choices.absolute,
            "*": reals.product,
            "/": reals.quotient,
            "%": quotients.remainder,
        }[name]
        return make(d, z, *slots)

    def real_terms(self, item: Expression) -> list[tuple[int, int]]:
        """(sign, slot) of a real sum, in the order in which Python adds."""
        terms: list[tuple[int, int]] = []
        node: Any = item
        while is_sum(node) and node.real:
            terms.append((1 if node.operator == "+" else -1, self.slot(node.operands[1])))
            node = node.operands[0]
        if isinstance(node, Expression) and node.real and node.operator == "neg":
            terms.append((-1, self.slot(node.operands[0])))
        else:
            terms.append((1, self.slot(node)))
        return terms[::-1]

    # ---- truth

    def truth(self, constraint: Any) -> int:
        """A slot that is 1 where the constraint holds and 0 where it does not."""
        if isinstance(constraint, Fixed):
            return self.constant(int(constraint.holds))
        if isinstance(constraint, Comparison):
            return self.truth_comparison(constraint)
        known = self.truths.get(id(constraint))
        if known is None:
            known = self.truths[id(constraint)] = (constraint, self.truth_junction(constraint))
        return known[1]

    def truth_junction(self, constraint: Junction) -> int:
        d = self.domains
        parts = [self.truth(part) for part in constraint.parts]
        every = isinstance(constraint, Conjunction)
        key = ("all" if every else "any", *sorted(set(parts)))
        if key not in self.nodes:
            b = self.nodes[key] = d.slot(0, 1, 1)
            make = logic.truth_all if every else logic.truth_any
            self.add(make(d, b, parts), (*dict.fromkeys(parts), b))
        return self.nodes[key]

    def truth_comparison(self, constraint: Comparison) -> int:
        terms, bound, relation = self.normal(constraint)
        if not terms:
            return self.constant(int(zero_meets(relation, bound)))
        if len(terms) > 1:
            # One slot for a sum and its negative.
            sign = 1 if min(terms, key=lambda term: term[1])[0] > 0 else -1
            x, c = self.slot_of(({y: sign * e for e, y in terms}, 0)), sign
        else:
            ((c, x),) = terms
        if relation == "<=":
            # c x <= bound, as x <= limit or as not (x <= limit).
            limit, positive = (bound // c, True) if c > 0 else (-(bound // -c) - 1, False)
            b = self.truth_of("<=", x, limit)
            return b if positive else self.opposite(b)
        value, odd = divmod(bound, c)
        if odd:
            return self.constant(int(relation == "!="))
        b = self.truth_of("==", x, value)
        return b if relation == "==" else self.opposite(b)

    def truth_of(self, relation: str, x: int, value: int) -> int:
        key = (relation, x, value)
        if key not in self.nodes:
            d = self.domains
            b = self.nodes[key] = d.slot(0, 1, 1)
            make = logic.truth_at_most if relation == "<=" else logic.truth_equal
            self.add(make(d, b, x, value), (x, b), "lo hi hole" if relation == "==" else "lo hi")
        return self.nodes[key]

    def opposite(self, b: int) -> int:
        return self.slot_of(({b: -1}, 1))

    def normal(self, constraint: Comparison) -> tuple[linear.Terms, int, str]:
        """sum c x <= bound, == bound or != bound."""
        relation, left, right = constraint.relation, constraint.left, constraint.right
        if relation in (">", ">="):
            left, right = right, left
        terms: dict[int, int] = {}
        constant = accumulate(terms, self.form(left), 1) + accumulate(terms, self.form(right), -1)
        terms = {x: c for x, c in terms.items() if c}
        bound = -constant - (relation in ("<", ">"))
        relation = relation if relation in ("==", "!=") else "<="
        g = gcd(*terms.values())
        if g > 1:
            if relation == "<=" or bound % g == 0:
                return [(c // g, x) for x, c in terms.items()], bound // g, relation
            # Never equal.
            return [], 1, relation
        return [(c, x) for x, c in terms.items()], bound, relation


def zero_meets(relation: str, bound: int) -> bool:
    """Whether 0 `relation` bound."""
    return {"<=": bound >= 0, "==": bound == 0, "!=": bound != 0}[relation]


def scale(form: Form, factor: int) -> Form:
    terms, constant = form
    if factor == 0:
        return {}, 0
    return {x: factor * c for x, c in terms.items()}, factor * constant


def accumulate(terms: dict[int, int], form: Form, sign: int) -> int:
    """Adds or subtracts a form's terms; gives what that does to the constant."""
    for x, c in form[0].items():
        terms[x] = terms.get(x, 0) + sign * c
    return sign * form[1]
