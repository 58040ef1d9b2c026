"""An integer constraint solver in pure Python: a proven minimum over small search spaces within milliseconds.

    p = csp.Problem("gemm tile")
    m = p.int("m", 16, 256, multiple_of=16)
    n = p.int("n", values=(8, 16, 32))
    p.add(m * n <= 4096, "accumulators fit")
    p.add(768 % m == 0)
    p.minimize(csp.ceildiv(768, m) * (40 + m * n / 64), then=-n)
    p.solve()  # {'m': 256, 'n': 8}

It needs the standard library alone.
"""

from .expressions import Constraint, Expression, Variable
from .functions import abs_, ceildiv, implies, lookup, max_, min_, where
from .limits import LimitReached, Statistics
from .problem import Problem

__all__ = [
    "Constraint",
    "Expression",
    "LimitReached",
    "Problem",
    "Statistics",
    "Variable",
    "abs_",
    "ceildiv",
    "implies",
    "lookup",
    "max_",
    "min_",
    "where",
]
