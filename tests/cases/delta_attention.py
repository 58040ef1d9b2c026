"""Cases of delta_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("delta_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    threshold: float = 0.9  # about half of all steps move a channel of normal numbers
    window: int = 4

    def words(self) -> list[str]:
        return [*super().words(), f"by{self.threshold}", f"w{self.window}"]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        return {"threshold": self.threshold, "window": self.window}


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 8, 19, 40, 64],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 65, 130],
        "window": [0, 1, 8, 200],
        "threshold": [0.0, 0.6, 1.5, 8.0],
        "sink": [0, 1, 5, 200],
        "mode": ["element", "row"],
        "dtype": [*WIDE, *NARROW],
        "scale": [None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=9):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = tuple((name, row.pop(name)) for name in ("sink", "mode", "scale"))
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("sink", "mode") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    cases = [
        make("small", "sanitize", B=2, T=20, sink=2),
        make("small", "sanitize", "tiny", B=1, T=33, H=2, Hk=1, sink=2),
        make("small", "sanitize", "tiny", B=1, T=21, H=2, Hk=1, D=11, mode="row", threshold=4.0),
        *(make("small", "sanitize", B=B, T=T) for B, T in ((0, 5), (3, 0), (0, 0))),
        *(make("small", "sanitize", B=2, T=T, window=4, sink=1) for T in (1, 4, 5, 6, 13)),
        make(B=1, T=300, H=2, Hk=1, D=96, window=64, sink=4),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "window": 2} | options))
