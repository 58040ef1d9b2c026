"""Cases of block_diffusion_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("block_diffusion_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """T is that of both halves together."""

    T: int = 36
    block_size: int = 4

    def words(self) -> list[str]:
        return [*super().words(), f"S{self.block_size}"]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        return {"block_size": self.block_size}


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 8, 40, 64],
        "B": [1, 2],
        "T": [2, 6, 14, 64, 66, 130],
        "block_size": [1, 3, 4, 32, 200],
        "dtype": [*WIDE, *NARROW],
        "scale": [None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=8):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = (("scale", row.pop("scale")),)
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    cases = [
        make("small", "sanitize", B=1, T=16),
        make("small", "sanitize", "tiny", B=1, T=22, H=2, Hk=1),
        make("small", "sanitize", "tiny", B=1, T=38, H=2, Hk=1),
        make("small", "sanitize", B=2, T=12, block_size=1),
        *(make("small", "sanitize", B=B, T=T) for B, T in ((0, 6), (3, 0), (0, 0))),
        *(make("small", "sanitize", B=2, T=2 * L, block_size=5) for L in (1, 4, 5, 6, 13)),
        make(B=1, T=300, H=2, Hk=1, D=96, block_size=32),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different; an odd T is made even."""
    options.pop("reverse", None)
    sizes = {"B": 3, "T": 10, "H": 2, "Hk": 1, "D": 5, "block_size": 4} | options
    return Case(op, **sizes | {"T": sizes["T"] + sizes["T"] % 2})
