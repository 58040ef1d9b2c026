"""Cases of pointer_scores. T is the number of queries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, name_of, pairwise

OPERATORS = ("pointer_scores",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    Tk: int = 23
    A: int = 12
    mode: str = "additive"
    lengths: bool = False  # of the keys; one is 0, one all, one too large
    size: float = 1.0  # of queries and keys: from 10 on tanh takes another way, with numbers of every size
    weight: str = "storage"  # "float32", or "none" with a clipped dot

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"Tq{self.T}", f"Tk{self.Tk}", f"A{self.A}", name_of(self.dtype), self.mode]
        words += ["lengths"] if self.lengths else []
        words += [f"size{self.size:g}"] if self.size != 1 else []
        words += [] if self.weight == "storage" else [f"weight_{self.weight}"]
        words += [f"{name}_{value}" for name, value in self.options]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator = self.generator()
        inputs: dict[str, Any] = {}
        for name, steps, shared in (("query", self.T, (0,)), ("key", self.Tk, (2,))):
            values = self.draw(generator, self.B, steps, self.A, shared=shared) * self.size
            inputs[name] = self.place(values, device)
        inputs["weight"] = None
        if self.weight != "none":
            values = self.draw(generator, self.A, shared=(0,)) * 2 / self.A**0.5
            inputs["weight"] = self.place(values, device, self.real if self.weight == "float32" else self.dtype)
        inputs |= {"mode": self.mode, **dict(self.options)}
        if self.lengths:
            drawn = torch.randint(0, self.Tk + 1, (self.B,), generator=generator)
            drawn[:3] = torch.tensor([max(self.Tk - 1, 0), 0, self.Tk + 5])[: self.B]
            drawn = drawn.to(torch.int32 if self.seed % 2 else torch.int64)
            inputs["lengths"] = drawn.to(device)
        return inputs


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "A": [1, 3, 16, 17, 40, 64, 100],
        "B": [1, 2, 4],
        "T": [1, 2, 5, 33],
        "Tk": [1, 2, 15, 16, 37, 70],
        "mode": ["additive", "additive", "clipped_dot"],
        "lengths": [False, True],
        "size": [0.1, 1.0, 4.0, 10.0],
        "weight": ["storage", "float32"],
        "dtype": [*WIDE, *NARROW],
        "clip": [10.0, 2.5],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=8):
        row["options"] = (("clip", row.pop("clip")),)
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    both = ("additive", "clipped_dot")
    cases = [
        *(make("small", "sanitize", "tiny", B=3, T=5, mode=mode, lengths=True) for mode in both),
        make("small", "sanitize", "tiny", B=2, T=18, Tk=19, A=20),
        make("small", "sanitize", "tiny", B=2, T=3, mode="clipped_dot", weight="none"),
        make("small", "sanitize", B=2, T=6, size=8.0),
        *(make("small", "sanitize", B=B, T=T, Tk=Tk, lengths=B > 0) for B, T, Tk in ((0, 5, 4), (3, 0, 4), (3, 2, 0))),
        make(B=2, T=50, Tk=100, A=256, lengths=True),
        make(B=2, T=50, Tk=100, A=256, mode="clipped_dot"),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "Tk": 4, "A": 6} | options))
