"""Cases of routing_attention."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import STATES, distinct
from .clusters import ClusterCase
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("routing_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(ClusterCase):
    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, torch.int32]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        return {"centroids": self.centroids(generator, device), "size": self.size}

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        causal = dict(self.options).get("causal", True)
        return self.redraw(super().inputs(device), ("q", "k"), None if causal else self.size, device)

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        floats = {name: value for name, value in exact.items() if name not in ("1", "dcentroids")}
        # What is chosen has no rounding error, and no gradient.
        return super().bounds(inputs, cotangents, floats) | dict.fromkeys(exact.keys() - floats.keys(), 0.0)


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [5, 8, 16, 40, 64, 96],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 64, 65, 130],
        "K": [1, 2, 5, 17],
        "size": [1, 4, 31, 200],
        "dtype": [*WIDE, *NARROW],
        "causal": [True, True, False],
        "scale": [None, None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=11):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = tuple((name, row.pop(name)) for name in ("causal", "scale"))
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("causal", "scale") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    cases = [
        *(make("small", "sanitize", B=2, T=15, causal=causal) for causal in (True, False)),
        *(make("small", "tiny", B=1, T=9, H=2, Hk=1, K=2, causal=causal) for causal in (True, False)),
        *(make("small", "sanitize", B=B, T=T) for B, T in ((0, 5), (3, 0))),
        *(make("small", "sanitize", B=B, T=T, causal=False) for B, T in ((0, 5), (3, 0))),
        *(make("small", "sanitize", B=2, T=T, size=3, K=2) for T in (1, 3, 4, 9)),
        make(B=1, T=300, H=2, Hk=1, D=64, K=6, size=40),
        make(B=1, T=300, H=2, Hk=1, D=64, K=6, size=40, causal=False),
        make(B=0, T=0),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "K": 4, "size": 3} | options))
