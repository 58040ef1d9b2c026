"""Cases of chunked_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("chunked_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    chunk_size: int = 8
    bias: str = "none"  # "distance", "distance_shared", "square" or "square_shared"

    def words(self) -> list[str]:
        return [*super().words(), f"C{self.chunk_size}", *([] if self.bias == "none" else [self.bias])]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        inputs: dict[str, Any] = {"chunk_size": self.chunk_size}
        if self.bias != "none":
            C, heads = self.chunk_size, 1 if self.bias.endswith("shared") else self.H
            shape = (heads, 2 * C - 1) if self.bias.startswith("distance") else (heads, C, C)
            inputs["bias"] = self.place(self.draw(generator, *shape, shared=(0,)), device)
        return inputs


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 5, 8, 16, 40, 64],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 64, 65, 130],
        "chunk_size": [1, 3, 8, 64, 100],
        "dtype": [*WIDE, *NARROW],
        "causal": [False, True],
        "activation": ["softmax", "softmax", "laplace", "relu2"],
        "scale": [None, None, 0.3],
        "bias": ["none", "none", "distance", "distance_shared", "square", "square_shared"],
        "layout": LAYOUTS,
        "packed": [False, True],
    }
    for row in pairwise(factors, seed=6):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = tuple((name, row.pop(name)) for name in ("causal", "activation", "scale"))
        if row["packed"]:
            row["B"] = 1
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("causal", "activation", "scale") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    cases = [
        *(make("small", "sanitize", "tiny", B=2, T=T, causal=causal) for T in (20, 33) for causal in (False, True)),
        *(make("small", "sanitize", "tiny", B=1, T=19, activation=name) for name in ("laplace", "relu2")),
        make("small", "sanitize", "tiny", B=1, T=23, packed=True, causal=True),
        *(make("small", "sanitize", B=B, T=T, H=2, Hk=1, D=2) for B, T in ((0, 5), (3, 0), (0, 0))),
        make("small", "sanitize", B=1, T=0, packed=True),
        *(make("small", "sanitize", B=2, T=T, chunk_size=7, causal=True) for T in (1, 6, 7, 8, 17)),
        make(B=1, T=300, H=2, Hk=1, D=96, chunk_size=128, causal=True),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "chunk_size": 4} | options))
