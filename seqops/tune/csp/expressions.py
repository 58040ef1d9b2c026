"""Expressions over integer variables and the constraints between them: what Python's operators build.

An expression is an operator and its operands, which are expressions or plain numbers; nothing is computed until a
problem is solved. Numbers are exact integers except where `/`, a float constant or a float in a `lookup` table makes an
expression real; real expressions serve objectives and definitions, constraints compare integers.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from .problem import Problem

LIMIT = 1 << 40

TRUTH = (
    "has no truth value before the problem is solved: write a & b for `and`, a | b for `or`, ~a for `not`, "
    "(a < b) & (b < c) for a < b < c, csp.where(condition, x, y) for `if`, csp.max_ and csp.min_ for max and min, "
    "(x == 2) | (x == 3) for `in`"
)
# Walks remember what they found at every so many levels of nesting, so that they need not recurse deeper.
DEEP = 16


def text_of(item: Any) -> str:
    from .walk import render  # late: it walks over the classes of this module

    return render(item)


def text_of_call(name: str, *operands: Any) -> str:
    from .walk import render_call

    return render_call(name, *operands)


def number(value: Any, what: str = "operand") -> int | float:
    """`value` as an int or float that expressions can hold, else an error that says what was expected."""
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{what}: expected a finite number, got {value}")
        return value
    try:
        integer = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: expected a number or an expression, got {value!r}") from None
    if not -LIMIT <= integer <= LIMIT:
        raise ValueError(f"{what}: expected an integer within ±2^40, got {integer}")
    return integer


class Expression:
    """An operator applied to operands. Made by operators and functions, not by hand."""

    __slots__ = ("depth", "operands", "operator", "problem", "real")

    def __init__(self, operator: str, operands: tuple[Any, ...], problem: Problem | None, real: bool) -> None:
        self.operator = operator
        self.operands = operands
        self.problem = problem
        self.real = real
        # Sums that lean to the left are walked in loops: however long, they are one level.
        self.depth = 0
        for number, operand in enumerate(operands):
            if isinstance(operand, Expression | Constraint):
                level = operand.depth + (number > 0 or operator not in SUMS or not is_sum(operand))
                if level > self.depth:
                    self.depth = level

    def __add__(self, other: Operand) -> Expression:
        return combine("+", self, other)

    def __radd__(self, other: Operand) -> Expression:
        return combine("+", other, self)

    def __sub__(self, other: Operand) -> Expression:
        return combine("-", self, other)

    def __rsub__(self, other: Operand) -> Expression:
        return combine("-", other, self)

    def __mul__(self, other: Operand) -> Expression:
        return combine("*", self, other)

    def __rmul__(self, other: Operand) -> Expression:
        return combine("*", other, self)

    def __floordiv__(self, other: Operand) -> Expression:
        return combine("//", self, other)

    def __rfloordiv__(self, other: Operand) -> Expression:
        return combine("//", other, self)

    def __mod__(self, other: Operand) -> Expression:
        return combine("%", self, other)

    def __rmod__(self, other: Operand) -> Expression:
        return combine("%", other, self)

    def __truediv__(self, other: Operand) -> Expression:
        return combine("/", self, other)

    def __rtruediv__(self, other: Operand) -> Expression:
        return combine("/", other, self)

    def __neg__(self) -> Expression:
        return Expression("neg", (self,), self.problem, self.real)

    def __pos__(self) -> Expression:
        return self

    def __abs__(self) -> Expression:
        return Expression("abs", (self,), self.problem, self.real)

    def __le__(self, other: Operand) -> Comparison:
        return compare("<=", self, other)

    def __lt__(self, other: Operand) -> Comparison:
        return compare("<", self, other)

    def __ge__(self, other: Operand) -> Comparison:
        return compare(">=", self, other)

    def __gt__(self, other: Operand) -> Comparison:
        return compare(">", self, other)

    def __eq__(self, other: object) -> Comparison:  # type: ignore[override]  # a constraint, no bool
        return compare("==", self, other)

    def __ne__(self, other: object) -> Comparison:  # type: ignore[override]  # a constraint, no bool
        return compare("!=", self, other)

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise TypeError(f"the expression {self} {TRUTH}")

    def __str__(self) -> str:
        return text_of(self)

    def __repr__(self) -> str:
        return f"<expression {self}>"


class Variable(Expression):
    """An integer to be chosen. Made by `Problem.int`."""

    __slots__ = ("high", "index", "low", "name", "step", "values")

    def __init__(
        self, problem: Problem, name: str, index: int, low: int, high: int, step: int, values: tuple[int, ...] | None
    ) -> None:
        super().__init__("variable", (), problem, False)
        self.name = name
        self.index = index
        self.low = low
        self.high = high
        self.step = step
        self.values = values

    def domain(self) -> str:
        """The domain in words, for messages."""
        if self.values is not None:
            shown = ", ".join(map(str, self.values[:8])) + (", ..." if len(self.values) > 8 else "")
            return "{" + shown + "}"
        return f"{self.low}..{self.high}" + (f" in steps of {self.step}" if self.step > 1 else "")

    def contains(self, value: int) -> bool:
        if self.values is not None:
            return value in self.values
        return self.low <= value <= self.high and (value - self.low) % self.step == 0

    def __repr__(self) -> str:
        return f"<variable {self.name} in {self.domain()}>"


Operand = Expression | int | float
SUMS = ("+", "-")


def is_sum(item: Any) -> bool:
    return isinstance(item, Expression) and item.operator in SUMS


def refusing(message: str) -> Callable[..., NoReturn]:
    def refused(self: Any, *others: Any) -> NoReturn:
        raise TypeError(message)

    return refused


for _names, _message in {
    "pow rpow": "** is not part of the language: write m * m, or a table, csp.lookup(x, {0: 1, 1: 2, 2: 4}), for 2**x",
    "divmod rdivmod": "divmod: write x // y and x % y",
    "and rand": "& joins constraints, such as (x > 1) & (y > 1), not expressions: write x % 4 for x & 3",
    "or ror xor rxor invert": "| and ~ join constraints, such as (x > 1) | (y > 1); expressions have no bits",
    "lshift rlshift rshift rrshift": "<< and >> are not part of the language: write x * 4, x // 4",
    "round ceil floor": "expressions are not rounded: use // or csp.ceildiv",
}.items():
    for _name in _names.split():
        setattr(Expression, f"__{_name}__", refusing(_message))


def owner(operands: tuple[Any, ...]) -> Problem | None:
    """The problem whose variables the operands hold."""
    found = None
    for operand in operands:
        problem = getattr(operand, "problem", None)
        if problem is not None and problem is not found:
            if found is not None:
                raise ValueError(f"operands belong to two problems, {found.name!r} and {problem.name!r}")
            found = problem
    return found


def is_real(operand: Any) -> bool:
    return operand.real if isinstance(operand, Expression) else isinstance(operand, float)


def combine(name: str, a: Any, b: Any) -> Expression:
    """A binary operator; one operand at least is an expression."""
    a_number = not isinstance(a, Expression)
    if a_number:
        if isinstance(a, Constraint):
            refuse(a, name)
        if type(a) is not int or not -LIMIT <= a <= LIMIT:
            a = number(a, f"left operand of {name}")
        problem, real = b.problem, b.real or isinstance(a, float)
    elif isinstance(b, Expression):
        problem, real = a.problem, a.real or b.real
        if problem is not b.problem:
            problem = owner((a, b))
    else:
        if isinstance(b, Constraint):
            refuse(b, name)
        if type(b) is not int or not -LIMIT <= b <= LIMIT:
            b = number(b, f"right operand of {name}")
        problem, real = a.problem, a.real or isinstance(b, float)
    if name == "/":
        if not isinstance(b, Expression) and b == 0:
            raise ZeroDivisionError(f"{a} / 0")
        real = True
    elif name in ("//", "%", "ceildiv"):
        if real:
            raise TypeError(f"{name}: expected integer operands, got a real one in {text_of_call(name, a, b)}")
        if not isinstance(b, Expression) and b == 0:
            raise ZeroDivisionError(text_of_call(name, a, b))
    return Expression(name, (a, b), problem, real)


def refuse(constraint: Constraint, name: str) -> NoReturn:
    raise TypeError(f"{name}: expected a number or an expression, got the constraint {constraint}: use csp.where")


# ---- constraints


class Constraint:
    """What must hold. Made by comparisons; combined by `|`, `&` and `~`."""

    __slots__ = ("depth", "name", "problem")
    depth: int
    name: str | None
    problem: Problem | None

    def __or__(self, other: Any) -> Constraint:
        return junction(Disjunction, self, other)

    def __and__(self, other: Any) -> Constraint:
        return junction(Conjunction, self, other)

    def __ror__(self, other: Any) -> Constraint:
        return junction(Disjunction, other, self)

    def __rand__(self, other: Any) -> Constraint:
        return junction(Conjunction, other, self)

    def __invert__(self) -> Constraint:
        known: dict[int, Constraint] = {}
        for part in (*deep_parts(self), self):
            if isinstance(part, Constraint):
                known[id(part)] = opposite(part, known)
        return known[id(self)]

    def named(self, name: str | None) -> Constraint:
        """The same constraint as another object with this name."""
        other = copy.copy(self)
        other.name = name
        return other

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        raise TypeError(f"==: cannot compare the constraint {self}: write (a & b) | (~a & ~b)")

    def __ne__(self, other: object) -> bool:
        if self is other:
            return False
        raise TypeError(f"!=: cannot compare the constraint {self}: write (a & ~b) | (~a & b)")

    __hash__ = object.__hash__

    def __bool__(self) -> NoReturn:
        raise TypeError(f"the constraint {self} {TRUTH}")

    def __str__(self) -> str:
        return text_of(self)

    def __repr__(self) -> str:
        return f"<constraint {self.label()}>"

    def label(self) -> str:
        """The constraint with its name before it, as explanations print it."""
        return f"{self.name}: {self}" if self.name else str(self)


def arithmetic(name: str) -> Callable[[Constraint, Any], NoReturn]:
    def refused(self: Constraint, other: Any) -> NoReturn:
        refuse(self, name)

    return refused


for _name, _methods in {
    "+": "add radd", "-": "sub rsub", "*": "mul rmul", "//": "floordiv rfloordiv", "%": "mod rmod",
    "/": "truediv rtruediv", "<": "lt", "<=": "le", ">": "gt", ">=": "ge",
}.items():  # fmt: skip
    for _method in _methods.split():
        setattr(Constraint, f"__{_method}__", arithmetic(_name))


class Comparison(Constraint):
    """`left relation right`."""

    __slots__ = ("left", "relation", "right")

    def __init__(self, relation: str, left: Any, right: Any, problem: Problem | None) -> None:
        self.name = None
        self.problem = problem
        self.relation = relation
        self.left = left
        self.right = right
        self.depth = 1 + max(depth(left), depth(right))


class Junction(Constraint):
    """Several constraints joined by one word."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Constraint, ...], problem: Problem | None) -> None:
        self.name = None
        self.problem = problem
        self.parts = parts
        self.depth = 1 + max(map(depth, parts))


class Conjunction(Junction):
    """All parts hold."""

    __slots__ = ()


class Disjunction(Junction):
    """One part at least holds."""

    __slots__ = ()


class Fixed(Constraint):
    """A condition that Python has already decided, such as `768 % 64 == 0`."""

    __slots__ = ("holds",)

    def __init__(self, holds: bool) -> None:
        self.name = None
        self.problem = None
        self.holds = holds
        self.depth = 0


OPPOSITE = {"<=": ">", ">": "<=", "<": ">=", ">=": "<", "==": "!=", "!=": "=="}


def opposite(constraint: Constraint, known: dict[int, Constraint]) -> Constraint:
    """What holds where the constraint does not; `known` has those of deep parts by id."""
    if id(constraint) in known:
        return known[id(constraint)]
    if isinstance(constraint, Comparison):
        return Comparison(OPPOSITE[constraint.relation], constraint.left, constraint.right, constraint.problem)
    if isinstance(constraint, Fixed):
        return Fixed(not constraint.holds)
    assert isinstance(constraint, Junction)
    kind = Disjunction if isinstance(constraint, Conjunction) else Conjunction
    return kind(tuple([opposite(part, known) for part in constraint.parts]), constraint.problem)


# ---- nesting


def depth(item: Any) -> int:
    """How many levels of operators lie below an item."""
    return item.depth if isinstance(item, Expression | Constraint) else 0


def parts_of(item: Expression | Constraint) -> tuple[Any, ...]:
    """What an item is made of: expressions, constraints, numbers and tables."""
    if isinstance(item, Expression):
        return item.operands
    if isinstance(item, Comparison):
        return item.left, item.right
    return item.parts if isinstance(item, Junction) else ()


def deep_parts(item: Any) -> list[Any]:
    """The parts below an item at every 16th level, innermost first: none of most."""
    if depth(item) < DEEP:
        return []
    found, stack, seen = [], [item], {id(item)}
    while stack:
        above = stack.pop()
        for part in parts_of(above):
            if depth(part) < DEEP or id(part) in seen:
                continue
            seen.add(id(part))
            stack.append(part)
            # Of a long sum the whole alone.
            inner = is_sum(above) and is_sum(part) and part.depth == above.depth
            if part.depth % DEEP == 0 and not inner:
                found.append(part)
    return sorted(found, key=depth)


# ---- making constraints


def compare(relation: str, a: Expression, b: Any) -> Comparison:
    problem = a.problem
    if isinstance(b, Expression):
        if b.problem is not problem:
            problem = owner((a, b))
        real = a.real or b.real
    else:
        if isinstance(b, Constraint):
            refuse(b, relation)
        if type(b) is not int or not -LIMIT <= b <= LIMIT:
            b = number(b, f"right operand of {relation}")
        real = a.real or isinstance(b, float)
    if real:
        text = f"{text_of(a)} {relation} {text_of(b)}"
        raise TypeError(f"constraints compare integers, got the real {text}: multiply out, or use // or csp.ceildiv")
    return Comparison(relation, a, b, problem)


def condition(value: Any, what: str) -> Constraint:
    """`value` as a constraint; a bool is one that Python has decided."""
    if isinstance(value, Constraint):
        return value
    if isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")):
        return Fixed(bool(value))
    raise TypeError(f"{what}: expected a constraint such as m >= 16, got {value!r}")


def junction(kind: type[Junction], a: Any, b: Any) -> Constraint:
    what = "|" if kind is Disjunction else "&"
    parts: list[Constraint] = []
    for side in (condition(a, what), condition(b, what)):
        parts.extend(side.parts if type(side) is kind else (side,))
    return kind(tuple(parts), owner(tuple(parts)))
