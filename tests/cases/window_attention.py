"""Cases of window_attention."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("window_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    left: int = 5
    right: int = 3
    globals: tuple[int, ...] | None = None

    def words(self) -> list[str]:
        places = [] if self.globals is None else ["_".join(["G", *map(str, self.globals)])]
        return [*super().words(), f"l{self.left}", f"r{self.right}", *places]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        inputs: dict[str, Any] = {"left": self.left, "right": self.right}
        if self.globals is not None:
            integer = random.Random(self.seed + 1).choice([torch.int32, torch.int64])
            inputs["global_index"] = torch.tensor(self.globals, dtype=integer, device=device)
        return inputs


# Sets of global positions: none, the first, inside of windows, repeated, out of order, before and beyond the sequence.
GLOBALS = [None, None, (), (0,), (0, 1, 2, 3), (9, 0, 9, 4, 0), (-1, 2, 200, 30), (7, 6, 5, 8, 40)]


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 8, 40, 64],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 65, 130],
        "left": [-1, 0, 1, 8, 33, 200],
        "right": [-1, 0, 0, 1, 8, 200],
        "globals": GLOBALS,
        "dtype": [*WIDE, *NARROW],
        "scale": [None, 0.3],
        "layout": LAYOUTS,
        "packed": [False, True],
    }
    for row in pairwise(factors, seed=7):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = (("scale", row.pop("scale")),)
        if row["packed"]:
            row["B"] = 1
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    cases = [
        *(make("small", "sanitize", B=2, T=T, right=right) for T in (20, 33) for right in (0, 3)),
        make("small", "sanitize", "tiny", B=1, T=33, H=2, Hk=1),
        make("small", "sanitize", "tiny", B=1, T=21, H=2, Hk=1, right=0, globals=(0, 9)),
        make("small", "sanitize", B=1, T=21, globals=(4, 17, 4)),
        make("small", "sanitize", "tiny", B=1, T=23, H=1, Hk=1, packed=True, globals=(0, 3)),
        *(make("small", "sanitize", B=B, T=T, globals=(0,)) for B, T in ((0, 5), (3, 0), (0, 0))),
        make("small", "sanitize", B=1, T=0, packed=True, globals=(0,)),
        *(make("small", "sanitize", B=2, T=T, left=4, right=0, globals=(1,)) for T in (1, 4, 5, 6, 13)),
        make(B=1, T=300, H=2, Hk=1, D=96, left=128, right=0, globals=(0, 1, 2, 3)),
        make(B=1, T=300, H=2, Hk=1, D=64, left=40, right=40, globals=(0, 250)),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "left": 1, "right": 2, "globals": (3,)} | options))
