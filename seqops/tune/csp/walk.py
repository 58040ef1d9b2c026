"""Walking through expressions: their value, their text, their variables."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from .expressions import (
    SUMS,
    Comparison,
    Conjunction,
    Constraint,
    Expression,
    Fixed,
    Junction,
    Variable,
    deep_parts,
    is_sum,
    parts_of,
)

# Text shows so many levels of nesting.
LEVELS = 40


class Undefined(ValueError):
    """An expression has no value: a zero divisor, a key that a `lookup` lacks, inf - inf."""


# ---- values


def divide(a: Any, b: Any) -> float:
    if b == 0:
        raise Undefined(f"{a} / 0")
    return a / b


def floor_divide(a: int, b: int) -> int:
    if b == 0:
        raise Undefined(f"{a} // 0")
    return a // b


def ceil_divide(a: int, b: int) -> int:
    if b == 0:
        raise Undefined(f"ceildiv({a}, 0)")
    return -(-a // b)


def modulo(a: int, b: int) -> int:
    if b == 0:
        raise Undefined(f"{a} % 0")
    return a % b


BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": divide,
    "//": floor_divide,
    "ceildiv": ceil_divide,
    "%": modulo,
}
RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    "<": operator.lt,
    ">=": operator.ge,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}


def evaluate(item: Any, values: Mapping[str, int]) -> Any:
    """The number or truth of an expression or constraint for given variables.

    Raises:
        Undefined: there is none.
    """
    known: dict[int, Any] = {}
    for part in deep_parts(item):
        known[id(part)] = value_of(part, values, known)
    return value_of(item, values, known)


def value_of(item: Any, values: Mapping[str, int], known: Mapping[int, Any]) -> Any:
    """What `evaluate` gives; `known` has the values of deep parts by id."""
    if known and id(item) in known:
        return known[id(item)]
    if isinstance(item, Expression):
        return value_of_expression(item, values, known)
    if isinstance(item, Comparison):
        return RELATIONS[item.relation](value_of(item.left, values, known), value_of(item.right, values, known))
    if isinstance(item, Junction):
        # Every part, so that whether a problem has a value never depends on the order of parts.
        held = [value_of(part, values, known) for part in item.parts]
        return all(held) if isinstance(item, Conjunction) else any(held)
    if isinstance(item, Fixed):
        return item.holds
    return item


def value_of_expression(item: Expression, values: Mapping[str, int], known: Mapping[int, Any]) -> Any:
    name, operands = item.operator, item.operands
    if name == "variable":
        return values[item.name]  # type: ignore[attr-defined]  # a Variable
    if name in SUMS:
        return value_of_sum(item, values, known)
    if name in BINARY:
        return binary(item, value_of(operands[0], values, known), value_of(operands[1], values, known))
    if name == "lookup":
        key = value_of(operands[0], values, known)
        if key not in operands[1]:
            raise Undefined(f"lookup has no {key}")
        return operands[1][key]
    found = [value_of(operand, values, known) for operand in operands]
    if name == "where":
        return found[1] if found[0] else found[2]
    if name == "neg":
        return -found[0]
    if name == "abs":
        return abs(found[0])
    return min(found) if name == "min" else max(found)


def value_of_sum(item: Expression, values: Mapping[str, int], known: Mapping[int, Any]) -> Any:
    """In a loop, since long sums lean to the left and recursion would be too deep."""
    spine = [item]
    left = item.operands[0]
    while is_sum(left) and id(left) not in known:
        spine.append(left)
        left = left.operands[0]
    result = value_of(left, values, known)
    for node in reversed(spine):
        result = binary(node, result, value_of(node.operands[1], values, known))
    return result


def binary(item: Expression, a: Any, b: Any) -> Any:
    """The operator's value, which is not NaN."""
    try:
        result = BINARY[item.operator](a, b)
    except OverflowError:
        raise Undefined(f"{a:.3g} {item.operator} {b:.3g} is no float") from None
    if item.real and result != result:
        raise Undefined(f"{a} {item.operator} {b}")
    return result


# ---- text

BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "//": 2, "%": 2, "neg": 3}


def render(item: Any, levels: int = LEVELS) -> str:
    """As it would be written in Python, products without spaces: `m*n + 4 <= 4096`. What lies too deep is `...`."""
    if levels == 0 and isinstance(item, Expression | Constraint) and item.depth:
        return "..."
    if isinstance(item, Comparison):
        return f"{render(item.left, levels - 1)} {item.relation} {render(item.right, levels - 1)}"
    if isinstance(item, Junction):
        word = " & " if isinstance(item, Conjunction) else " | "
        return word.join([f"({render(part, levels - 1)})" for part in item.parts])
    if isinstance(item, Fixed):
        return str(item.holds)
    if not isinstance(item, Expression):
        return str(item)
    name, operands = item.operator, item.operands
    if name == "variable":
        return item.name  # type: ignore[attr-defined]  # a Variable
    if name == "neg":
        return f"-{bracket(operands[0], 3, levels)}"
    if name in SUMS:
        parts: list[str] = []
        node: Any = item
        while is_sum(node):
            parts += [bracket(node.operands[1], 2, levels), f" {node.operator} "]
            node = node.operands[0]
        return "".join((render(node, levels - 1), *reversed(parts)))
    if name in BINDING:
        level = BINDING[name]
        gap = "" if name in "*/" else " "
        return f"{bracket(operands[0], level, levels)}{gap}{name}{gap}{bracket(operands[1], level + 1, levels)}"
    if name == "lookup":
        return f"lookup({render(operands[0], levels - 1)}, {operands[1]})"
    return render_call(name, *operands, levels=levels)


def bracket(item: Any, binding: int, levels: int) -> str:
    text = render(item, levels - 1)
    weak = isinstance(item, Expression) and BINDING.get(item.operator, 9) < binding
    return f"({text})" if weak or (not isinstance(item, Expression) and item < 0 and binding > 1) else text


def render_call(name: str, *operands: Any, levels: int = LEVELS) -> str:
    texts = [render(operand, levels - 1) for operand in operands]
    return f" {name} ".join(texts) if name in BINDING else f"{name}({', '.join(texts)})"


# ---- parts


def parts(item: Any) -> Iterator[Any]:
    """The item and every expression and constraint in it, each once."""
    stack, seen = [item], set()
    while stack:
        part = stack.pop()
        if isinstance(part, Expression | Constraint) and id(part) not in seen:
            seen.add(id(part))
            yield part
            stack.extend(parts_of(part))


def variables(item: Any) -> Iterator[Variable]:
    """Every variable that occurs, once."""
    return (part for part in parts(item) if isinstance(part, Variable))


def partial(item: Any) -> bool:
    """Whether a zero divisor or a missing key may leave it undefined."""
    return any(
        part.operator == "lookup"
        or (part.operator in ("/", "//", "%", "ceildiv") and isinstance(part.operands[1], Expression))
        for part in parts(item)
        if isinstance(part, Expression)
    )
