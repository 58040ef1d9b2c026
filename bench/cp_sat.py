"""A problem of `seqops.tune.csp` as a model of OR-Tools CP-SAT: the peer of its answers and its speed.

A constraint `v == x*y` becomes one constraint of CP-SAT, as somebody who writes for CP-SAT would state it; variables
are added for nested expressions only. Domains are those of `Problem.int`. Integers are exact on both sides; real
numbers occur in linear objectives alone.
"""

from math import inf
from typing import Any

from ortools.sat.python import cp_model

from seqops.tune import csp
from seqops.tune.csp.expressions import OPPOSITE, Comparison, Conjunction, Disjunction, Expression, Fixed, Variable
from seqops.tune.csp.walk import RELATIONS

# What CP-SAT adds up has to stay within 64 bits.
REACH = 1 << 50


class Model:
    """The model and its variables by name."""

    def __init__(self, problem: csp.Problem) -> None:
        self.model = cp_model.CpModel()
        self.variables: dict[str, cp_model.IntVar] = {}
        self.bounds: dict[int, tuple[int, int]] = {}
        self.known: dict[int, Any] = {}
        for v in problem.variables.values():
            if v.values is not None:
                made = self.model.new_int_var_from_domain(cp_model.Domain.from_values(v.values), v.name)
            elif v.step == 1 or v.low == v.high:
                made = self.model.new_int_var(v.low, v.high, v.name)
            else:
                made = self.model.new_int_var_from_domain(
                    cp_model.Domain.from_values(range(v.low, v.high + 1, v.step)), v.name
                )
            self.variables[v.name] = made
            self.bounds[made.index] = (v.low, v.high)
        for constraint in problem.constraints:
            self.require(constraint, None)
        if problem.objective:
            self.model.minimize(self.objective(problem.objective[0]))
            for term in problem.objective[1:]:
                # Not weighed here, but it has to be defined.
                self.objective(term)

    # ---- expressions

    def make(self, low: int, high: int) -> cp_model.IntVar:
        low, high = max(low, -REACH), min(high, REACH)
        made = self.model.new_int_var(low, high, "")
        self.bounds[made.index] = (low, high)
        return made

    def range(self, item: Any) -> tuple[int, int]:
        """Bounds of what `number` gave."""
        if isinstance(item, int):
            return item, item
        if isinstance(item, cp_model.IntVar):
            return self.bounds[item.index]
        flat = cp_model.FlatIntExpr(item)
        low = high = flat.offset
        for variable, c in zip(flat.vars, flat.coeffs, strict=True):
            a, b = self.bounds[variable.index]
            low += c * (a if c > 0 else b)
            high += c * (b if c > 0 else a)
        return low, high

    def number(self, item: Any) -> Any:
        """A linear expression of CP-SAT."""
        if not isinstance(item, Expression):
            return item
        if isinstance(item, Variable):
            return self.variables[item.name]
        key = id(item)
        if key not in self.known:
            # The item is kept with its value, so that no other item takes its id.
            self.known[key] = (item, self.build(item))
        return self.known[key][1]

    def build(self, item: Expression) -> Any:
        name, operands = item.operator, item.operands
        if name == "+":
            return self.number(operands[0]) + self.number(operands[1])
        if name == "-":
            return self.number(operands[0]) - self.number(operands[1])
        if name == "neg":
            return -self.number(operands[0])
        if name == "*":
            a, b = self.number(operands[0]), self.number(operands[1])
            if isinstance(a, int) or isinstance(b, int):
                return a * b
            (p, q), (r, s) = self.range(a), self.range(b)
            corners = (p * r, p * s, q * r, q * s)
            return self.bind(item, self.make(min(corners), max(corners)))
        return self.bind(item, self.target(item))

    def target(self, item: Expression) -> cp_model.IntVar:
        """A new variable as wide as the node can be."""
        name, operands = item.operator, item.operands
        if name == "lookup":
            return self.make(min(operands[1].values()), max(operands[1].values()))
        ranges = [self.range(self.number(operand)) for operand in operands if isinstance(operand, Expression | int)]
        if name == "%":
            low, high = ranges[1]
            return self.make(min(low + 1, 0), max(high - 1, 0))
        if name in ("min", "max", "where"):
            return self.make(min(low for low, _ in ranges), max(high for _, high in ranges))
        size = max(abs(ranges[0][0]), abs(ranges[0][1])) + 1
        return self.make(0 if ranges[0][0] >= 0 and (name == "abs" or ranges[1][0] > 0) else -size, size)

    def bind(self, item: Expression, z: Any) -> Any:
        """z is the node's value."""
        name, operands, model = item.operator, item.operands, self.model
        if name == "where":
            b = self.truth(operands[0])
            model.add(z == self.number(operands[1])).only_enforce_if(b)
            model.add(z == self.number(operands[2])).only_enforce_if(~b)
            return z
        if name == "lookup":
            model.add_allowed_assignments([self.number(operands[0]), z], list(operands[1].items()))
            return z
        values = [self.number(operand) for operand in operands]
        if name == "*":
            model.add_multiplication_equality(z, values)
        elif name == "min":
            model.add_min_equality(z, values)
        elif name == "max":
            model.add_max_equality(z, values)
        elif name == "abs":
            model.add_abs_equality(z, values[0])
        else:
            self.bind_quotient(name, z, *values)
        return z

    def bind_quotient(self, name: str, z: Any, x: Any, y: Any) -> None:
        model = self.model
        (xl, _), (yl, yh) = self.range(x), self.range(y)
        if xl >= 0 and yl > 0:
            if name == "//":
                model.add_division_equality(z, x, y)
            elif name == "ceildiv":
                model.add_division_equality(z, x + y - 1, y)
            else:
                model.add_modulo_equality(z, x, y)
            return
        # x = q y + r with r between 0 and y; CP-SAT itself rounds towards 0.
        if name == "ceildiv":
            x, z = -x, -z
            xl = self.range(x)[0]
        size = max(abs(bound) for bound in self.range(x)) + 1
        widest = max(abs(yl), abs(yh))
        q = self.make(-size, size) if name == "%" else z
        r = z if name == "%" else self.make(-widest, widest)
        if isinstance(y, int):
            model.add(x == q * y + r)
            model.add_linear_constraint(r, *((0, y - 1) if y > 0 else (y + 1, 0)))
            return
        qy = self.make(-size - 2 * widest, size + 2 * widest)
        model.add_multiplication_equality(qy, [q, y])
        model.add(x == qy + r)
        model.add(y != 0)
        positive = model.new_bool_var("")
        model.add(y > 0).only_enforce_if(positive)
        model.add(y < 0).only_enforce_if(~positive)
        model.add(r >= 0).only_enforce_if(positive)
        model.add(r < y).only_enforce_if(positive)
        model.add(r <= 0).only_enforce_if(~positive)
        model.add(r > y).only_enforce_if(~positive)

    # ---- constraints

    def linear(self, relation: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            # Two numbers: CP-SAT wants a variable.
            left = left + 0 * self.constant()
        return RELATIONS[relation](left, right)

    def constant(self) -> cp_model.IntVar:
        return self.make(0, 0)

    def require(self, constraint: Any, when: Any) -> None:
        """The constraint holds, where the literal `when` is true."""
        model = self.model
        if isinstance(constraint, Comparison):
            left, right = constraint.left, constraint.right
            if when is None and constraint.relation == "==":
                for v, item in ((left, right), (right, left)):
                    if isinstance(v, Variable) and isinstance(item, Expression) and self.is_node(item):
                        self.bind(item, self.variables[v.name])
                        return
            made = model.add(self.linear(constraint.relation, self.number(left), self.number(right)))
            if when is not None:
                made.only_enforce_if(when)
        elif isinstance(constraint, Conjunction):
            for part in constraint.parts:
                self.require(part, when)
        elif isinstance(constraint, Disjunction):
            made = model.add_bool_or([self.truth(part) for part in constraint.parts])
            if when is not None:
                made.only_enforce_if(when)
        elif isinstance(constraint, Fixed) and not constraint.holds:
            made = model.add_bool_or([])
            if when is not None:
                made.only_enforce_if(when)

    def is_node(self, item: Expression) -> bool:
        if item.operator == "*":
            return all(isinstance(operand, Expression) for operand in item.operands)
        return item.operator not in ("variable", "+", "-", "neg")

    def truth(self, constraint: Any) -> Any:
        """A literal that is true exactly where the constraint holds."""
        b = self.model.new_bool_var("")
        if isinstance(constraint, Disjunction | Conjunction):
            parts = [self.truth(part) for part in constraint.parts]
            if isinstance(constraint, Disjunction):
                self.model.add_bool_or(parts).only_enforce_if(b)
                self.model.add_bool_and([~part for part in parts]).only_enforce_if(~b)
            else:
                self.model.add_bool_and(parts).only_enforce_if(b)
                self.model.add_bool_or([~part for part in parts]).only_enforce_if(~b)
            return b
        self.require(constraint, b)
        if isinstance(constraint, Fixed):
            self.require(Fixed(not constraint.holds), ~b)
        else:
            opposite = Comparison(OPPOSITE[constraint.relation], constraint.left, constraint.right, None)
            self.require(opposite, ~b)
        return b

    def objective(self, item: Any) -> Any:
        """Linear, with real coefficients."""
        if isinstance(item, Expression) and item.real:
            if item.operator == "/" and not isinstance(item.operands[1], Expression):
                return self.objective(item.operands[0]) * (1 / item.operands[1])
            if item.operator == "+":
                return self.objective(item.operands[0]) + self.objective(item.operands[1])
            raise ValueError(f"CP-SAT takes linear objectives, got {item}")
        return self.number(item)


def solve(model: Model, seconds: float = 60.0) -> tuple[str, dict[str, int] | None, float]:
    """One worker: the status in words, the solution if there is one, the objective.

    A minimum is "OPTIMAL" only where it is proven.
    """
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = seconds
    status = solver.solve(model.model)
    name = solver.status_name(status)
    if name not in ("OPTIMAL", "FEASIBLE"):
        return name, None, inf
    return name, {v: solver.value(x) for v, x in model.variables.items()}, solver.objective_value
