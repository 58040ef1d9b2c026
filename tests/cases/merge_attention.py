"""Cases of merge_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("merge_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    empty: bool = False  # some rows of one part, or of both, have no keys
    narrow: bool = False  # beside float64: lse in float32

    def words(self) -> list[str]:
        words = [word for word in super().words() if word != f"Hk{self.Hk}"]
        return words + ["empty"] * self.empty + ["narrow"] * self.narrow

    @property
    def sums(self) -> torch.dtype:
        return torch.float32 if self.narrow else self.real

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, self.sums]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator = self.generator()
        inputs: dict[str, Any] = {}
        for n, shared in ((1, (0,)), (2, (2, 3))):
            rows = self.draw(generator, self.B, self.T, self.H, self.D, shared=shared)
            sums = 3 * self.draw(generator, self.B, self.H, self.T, shared=(1,) if n == 1 else (0,))
            if self.empty:
                none = torch.rand(sums.shape, generator=generator) < 0.3
                sums = sums.masked_fill(none, -torch.inf)
            inputs |= {f"o{n}": self.place(rows, device), f"lse{n}": self.place(sums, device, self.sums)}
        return inputs


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "H": [1, 3, 4],
        "D": [1, 5, 8, 16, 40, 64, 200],
        "B": [1, 2, 3],
        "T": [1, 2, 7, 15, 16, 17, 130],
        "dtype": [*WIDE, *NARROW],
        "layout": LAYOUTS,
        "empty": [False, True],
    }
    yield from (Case(op, **row) for row in pairwise(factors, seed=10))


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    cases = [
        *(make("small", "sanitize", "tiny", B=2, T=T, empty=empty) for T in (5, 17) for empty in (False, True)),
        make("small", "sanitize", "tiny", B=1, T=9, H=3, D=75, empty=True),
        make("small", "sanitize", B=2, T=6, dtype=torch.float64, narrow=True, empty=True),
        *(make("small", "sanitize", B=B, T=T) for B, T in ((0, 5), (3, 0), (0, 0))),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "D": 6} | options))
