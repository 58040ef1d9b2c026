"""Seeded random problems for the constraint solver, over every kind of node, small enough to enumerate."""

import itertools
import operator
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from seqops.tune import csp

RELATIONS = ("<=", "<", ">=", ">", "==", "!=")
COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
# Of two or three constraints: what the solver is given, and what it means.
JUNCTIONS: tuple[tuple[Callable[..., Any], Callable[..., bool]], ...] = (
    (lambda a, b: a | b, lambda a, b: a or b),
    (lambda a, b, c: a | b | c, lambda a, b, c: a or b or c),
    (csp.implies, lambda a, b: b or not a),
    (lambda a, b: ~(a & b), lambda a, b: not (a and b)),
)


class Pair(NamedTuple):
    """An expression or constraint, and the plain Python that says what it means."""

    built: Any
    meaning: Callable[[dict[str, int]], Any]

    @property
    def varies(self) -> bool:
        return isinstance(self.built, csp.Expression)

    @property
    def is_zero(self) -> bool:
        return not self.varies and self.built == 0


def constant(value: int | float) -> Pair:
    return Pair(value, lambda values: value)


def join(build: Callable[..., Any], compute: Callable[..., Any], *operands: Pair) -> Pair:
    """Every operand is computed first, so that whether there is a value depends on no order."""
    meanings = [operand.meaning for operand in operands]
    return Pair(
        build(*(operand.built for operand in operands)),
        lambda values: compute(*[meaning(values) for meaning in meanings]),
    )


class Oracle(NamedTuple):
    """What a problem means, by Python's own arithmetic: constraints in their order, terms of the objective."""

    constraints: list[Callable[[dict[str, int]], bool]]
    objective: list[Callable[[dict[str, int]], Any]]

    def met(self, values: dict[str, int], members: Sequence[int] | None = None) -> bool:
        """Whether the constraints hold, or those of the given numbers."""
        chosen = self.constraints if members is None else [self.constraints[i] for i in members]
        try:
            return all([meaning(values) for meaning in chosen])
        except (ZeroDivisionError, KeyError):
            return False

    def costs(self, values: dict[str, int]) -> tuple | None:
        """The objective's terms; None if they have no value."""
        try:
            return tuple([meaning(values) for meaning in self.objective])
        except (ZeroDivisionError, KeyError):
            return None


class Source:
    """Draws one problem; equal seeds draw equal problems.

    Args:
        real: the objective may hold `/`, floats and real tables.
        space: no more assignments than this.
    """

    def __init__(self, seed: int, real: bool = True, space: int = 600) -> None:
        self.random = random.Random(seed)
        self.real = real
        self.space = space
        self.seed = seed

    def problem(self, shuffle: int | None = None) -> csp.Problem:
        """`shuffle` reorders the constraints. Afterwards `oracle` says what the problem means."""
        r = self.random
        p = csp.Problem(f"seed {self.seed}")
        room = self.space
        for index in range(r.randint(2, 6)):
            count = r.randint(1, max(1, min(12, room)))
            room //= count
            self.variable(p, f"v{index}", count)
        self.variables = list(p.variables.values())
        constraints = [self.constraint(r.choice((1, 1, 2))) for _ in range(r.randint(1, 8))]
        terms = []
        if r.random() < 0.85:
            terms = [self.number(r.randint(1, 3), self.real) for _ in range(r.choice((1, 1, 2, 3)))]
            p.minimize(terms[0].built, then=[term.built for term in terms[1:]])
        if shuffle is not None:
            random.Random(shuffle).shuffle(constraints)
        for constraint in constraints:
            p.add(constraint.built)
        self.oracle = Oracle([constraint.meaning for constraint in constraints], [term.meaning for term in terms])
        return p

    def variable(self, p: csp.Problem, name: str, count: int) -> None:
        r = self.random
        kind = r.randrange(3)
        if kind == 0:
            low = r.randint(-8, 8)
            p.int(name, low, low + count - 1)
        elif kind == 1:
            step = r.randint(2, 5)
            low = r.randint(-4, 4) * step
            p.int(name, low, low + (count - 1) * step, multiple_of=step)
        else:
            p.int(name, values=r.sample(range(-12, 25), count))

    def number(self, depth: int, real: bool = False) -> Pair:
        """An expression with a variable in it."""
        r = self.random
        if depth == 0:
            variable = r.choice(self.variables)
            return Pair(variable, lambda values, name=variable.name: values[name])
        kinds = ["+", "-", "*", "//", "%", "ceildiv", "min", "max", "abs", "neg", "where", "lookup"]
        kind = r.choice([*kinds, "/", "/", "+", "*"] if real else kinds)
        a = self.number(depth - 1, real and kind not in ("//", "%", "ceildiv", "lookup"))
        if kind == "abs":
            return join(csp.abs_, abs, a)
        if kind == "neg":
            return join(operator.neg, operator.neg, a)
        if kind == "lookup":
            keys = r.sample(range(-12, 25), r.randint(12, 30))
            table = {key: r.randint(-20, 20) / 8 if real else r.randint(-20, 20) for key in keys}
            return join(lambda key: csp.lookup(key, table), lambda key: table[key], a)
        integral = kind in ("//", "%", "ceildiv")
        b = self.operand(depth - 1, real and not integral)
        if r.random() < 0.2 and kind != "where":
            a, b = b, a
        if not a.varies and not b.varies:
            a = self.number(0)
        if integral and b.is_zero:
            b = constant(3)
        if kind == "/" and b.is_zero:
            b = constant(0.5)
        if kind in ARITHMETIC:
            return join(ARITHMETIC[kind], ARITHMETIC[kind], a, b)
        if kind == "ceildiv":
            return join(csp.ceildiv, lambda x, y: -(-x // y), a, b)
        if kind == "where":
            held = self.constraint(r.choice((0, 0, 1)), depth=min(1, depth - 1))
            return join(csp.where, lambda c, x, y: x if c else y, held, a, b)
        operands = [a, b, *(self.operand(0, real) for _ in range(r.choice((0, 0, 1))))]
        return join(csp.min_, min, *operands) if kind == "min" else join(csp.max_, max, *operands)

    def operand(self, depth: int, real: bool) -> Pair:
        """An expression or a number."""
        r = self.random
        if r.random() < 0.35:
            return constant(r.choice((r.randint(-9, 12), r.randint(1, 6), r.randint(-30, 30) / 4 if real else 2)))
        return self.number(r.randint(0, depth), real)

    def constraint(self, joints: int, depth: int = 2) -> Pair:
        r = self.random
        kind = r.randrange(8) if joints else 7
        if kind in (0, 1, 2, 3):
            parts = [self.constraint(joints - 1, 1), self.constraint(joints - 1, 1)]
            if kind == 1:
                parts.append(self.constraint(0, 1))
            return join(*JUNCTIONS[kind], *parts)
        if kind == 4:
            x, y = self.number(r.choice((0, 0, 1))), self.operand(r.choice((0, 1)), False)
            divided, divisor = (y, x) if r.random() < 0.5 else (x, y)
            divides = lambda x, y: x % y == 0  # noqa: E731
            return join(divides, divides, divided, constant(4) if divisor.is_zero else divisor)
        a, b = self.number(r.randint(0, depth)), self.operand(r.randint(0, depth), False)
        relation = r.choice(RELATIONS if r.random() < 0.7 else ("<=", ">="))
        return join(COMPARISONS[relation], COMPARISONS[relation], a, b)


class WideSource(Source):
    """Domains too wide to enumerate: ranges of thousands, long strides, values that lie far apart."""

    def variable(self, p: csp.Problem, name: str, count: int) -> None:
        r = self.random
        kind = r.randrange(4)
        if kind == 0:
            super().variable(p, name, r.randint(1, 12))
        elif kind == 1:
            low = r.randint(-3000, 3000)
            p.int(name, low, low + r.randint(0, 20000))
        elif kind == 2:
            step = r.choice((2, 3, 7, 16, 100))
            low = r.randint(-50, 50) * step
            p.int(name, low, low + step * r.randint(0, 9000), multiple_of=step)
        else:
            p.int(name, values=[r.randint(-(10**6), 10**6) for _ in range(r.randint(1, 30))])


def enumerate_values(p: csp.Problem) -> Iterator[dict[str, int]]:
    """Every assignment, in order."""
    choices = []
    for v in p.variables.values():
        choices.append(v.values if v.values is not None else range(v.low, v.high + 1, v.step))
    for values in itertools.product(*choices):
        yield dict(zip(p.variables, values, strict=True))
