"""What has no operator of Python's own: `ceildiv`, extremes, choices, tables, implication."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .expressions import (
    Constraint,
    Disjunction,
    Expression,
    Fixed,
    Operand,
    combine,
    is_real,
    junction,
    number,
    owner,
    refuse,
)
from .expressions import condition as as_condition


def ceildiv(a: Operand, b: Operand) -> Any:
    """`a / b` rounded up, of integers."""
    if isinstance(a, Expression) or isinstance(b, Expression):
        return combine("ceildiv", a, b)
    a, b = number(a, "ceildiv"), number(b, "ceildiv")
    if isinstance(a, float) or isinstance(b, float):
        raise TypeError(f"ceildiv: expected integers, got {a!r} and {b!r}")
    return -(-a // b)


def extreme(name: str, operands: tuple[Any, ...]) -> Any:
    if len(operands) == 1 and not isinstance(operands[0], Expression):
        try:
            operands = tuple(operands[0])
        except TypeError:
            raise TypeError(f"{name}_: expected operands or one sequence of them, got {operands[0]!r}") from None
    if not operands:
        raise TypeError(f"{name}_: expected at least one operand, got none")
    for operand in operands:
        if isinstance(operand, Constraint):
            refuse(operand, f"{name}_")
    operands = tuple(o if isinstance(o, Expression) else number(o, f"{name}_") for o in operands)
    problem = owner(operands)
    if not any(isinstance(operand, Expression) for operand in operands):
        return min(operands) if name == "min" else max(operands)
    if len(operands) == 1:
        return operands[0]
    return Expression(name, operands, problem, any(is_real(operand) for operand in operands))


def min_(*operands: Any) -> Any:
    """The smallest operand; takes operands, or one sequence of them."""
    return extreme("min", operands)


def max_(*operands: Any) -> Any:
    """The largest operand; takes operands, or one sequence of them."""
    return extreme("max", operands)


def abs_(operand: Operand) -> Any:
    """The absolute value."""
    if isinstance(operand, Constraint):
        refuse(operand, "abs_")
    return abs(operand) if isinstance(operand, Expression) else abs(number(operand, "abs_"))


def where(condition: Constraint | bool, a: Operand, b: Operand) -> Any:
    """`a` where the condition holds, else `b`. Both have to be defined either way."""
    condition = as_condition(condition, "where: condition")
    for operand in (a, b):
        if isinstance(operand, Constraint):
            refuse(operand, "where")
    a = a if isinstance(a, Expression) else number(a, "where")
    b = b if isinstance(b, Expression) else number(b, "where")
    if isinstance(condition, Fixed):
        return a if condition.holds else b
    return Expression("where", (condition, a, b), owner((condition, a, b)), is_real(a) or is_real(b))


def lookup(key: Operand, table: Mapping[int, int | float]) -> Any:
    """The table's entry for `key`; a key that the table lacks is outside the domain."""
    if not isinstance(table, Mapping) or not table:
        raise TypeError(f"lookup: table: expected a mapping from integers to numbers, got {table!r}")
    entries = {}
    for entry, value in table.items():
        if isinstance(entry, float):
            raise TypeError(f"lookup: table: expected integer keys, got {entry!r}")
        entries[number(entry, "lookup: table: key")] = number(value, f"lookup: table[{entry}]")
    if not isinstance(key, Expression):
        if key not in entries:
            raise ValueError(f"lookup: the table has no {key!r}")
        return entries[key]
    if key.real:
        raise TypeError(f"lookup: key: expected an integer expression, got the real {key}")
    real = any(isinstance(value, float) for value in entries.values())
    return Expression("lookup", (key, dict(sorted(entries.items()))), key.problem, real)


def implies(a: Constraint | bool, b: Constraint | bool) -> Constraint:
    """Where `a` holds, so does `b`."""
    return junction(Disjunction, ~as_condition(a, "implies"), as_condition(b, "implies"))
