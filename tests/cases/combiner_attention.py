"""Cases of combiner_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("combiner_attention",)
PATTERNS = ("fixed", "logsparse", "axial")
OPTIONS = ("pattern", "pool", "causal", "scale")
__all__ = ["OPERATORS", "OPTIONS", "PATTERNS", "STATES", "Case", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    block_size: int = 4

    def words(self) -> list[str]:
        return [*super().words(), f"s{self.block_size}"]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        return {"block_size": self.block_size}

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype]


def make(op: str, *marks: str, **options: Any) -> Case:
    plain = options.pop("options", ()) + tuple((name, options.pop(name)) for name in OPTIONS if name in options)
    return Case(op, **options, options=plain, marks=marks)


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 5, 8, 16, 40, 64],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 64, 65],
        "block_size": [1, 3, 8, 16, 100],
        "dtype": [*WIDE, *NARROW],
        "pattern": PATTERNS,
        "pool": ["max", "mean"],
        "causal": [False, True],
        "scale": [None, None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=7):
        row["H"], row["Hk"] = row.pop("heads")
        yield make(op, **row)


def table(op: str) -> list[Case]:
    cases = [
        *(
            make(op, "small", "sanitize", B=2, T=T, pattern=pattern, pool=pool, causal=causal)
            for pattern in PATTERNS
            for T, pool, causal in ((19, "max", True), (23, "mean", False))
        ),
        *(
            make(
                op, "small", "tiny", B=1, T=11, H=2, Hk=1, D=4, block_size=3, pattern=pattern, pool=pool, causal=causal
            )
            for pattern, pool, causal in zip(PATTERNS, ("max", "mean", "max"), (True, False, False), strict=True)
        ),
        *(
            make(op, "small", "sanitize", B=B, T=T, pattern=p)
            for B, T, p in zip((0, 3, 0), (5, 0, 0), PATTERNS, strict=True)
        ),
        # Around the ends of blocks.
        *(
            make(op, "small", "sanitize", B=1, T=T, H=2, Hk=1, D=3, block_size=5, pattern=pattern, causal=causal)
            for pattern in PATTERNS
            for causal in (True, False)
            for T in (0, 1, 4, 5, 6, 13)
        ),
        *(make(op, B=1, T=300, H=2, Hk=1, D=96, block_size=128, pattern=p, pool="mean") for p in PATTERNS[:2]),
        make(op, B=1, T=300, H=1, Hk=1, D=64, block_size=16, pattern="axial", causal=False),
        make(op, B=1, T=257, H=1, Hk=1, D=40, block_size=1, pattern="logsparse", dtype=torch.bfloat16),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return make(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "block_size": 2} | options))
