"""Cases of range_attention: random ranges that do not decrease."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("range_attention",)
__all__ = ["OPERATORS", "STATES", "draw_ranges", "example", "table"]


def draw_ranges(generator: torch.Generator, *shape: int, keys: int, width: int, least: int = 0) -> Tensor:
    """[*shape[:-1], 2, shape[-1]]: bounds in order, ranges of `least` to `width` keys."""

    def integers(most: int, *sizes: int) -> Tensor:
        return torch.randint(0, most + 1, sizes, generator=generator)

    first = integers(max(keys - least, 0), *shape).sort(-1).values
    end = (first + least + integers(width - least, *shape)).clamp(max=keys).cummax(-1).values
    return torch.stack([first, end], -2).to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    """T queries of Tk keys."""

    Tk: int | None = None  # None: T
    parts: int = 1
    width: int = 12  # at most so many keys in a range
    least: int = 0  # 0: some queries see nothing
    each: str = "shared"  # the pattern of every "row", "head", "both", or "shared"
    S: int = 0  # keys of the second source; 0: none
    bias: str = "none"  # "distance", "distance_shared", "square" or "square_shared"
    C: int = 5  # places of the bias

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, self.real]

    def words(self) -> list[str]:
        words = [*super().words(), f"P{self.parts}", f"w{self.width}", self.each]
        words += [] if self.Tk is None else [f"Tk{self.Tk}"]
        words += ["all_see"] * self.least
        return words + [f"S{self.S}"] * (self.S > 0) + [f"{self.bias}{self.C}"] * (self.bias != "none")

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator = self.generator()
        keys = self.T if self.Tk is None else self.Tk
        inputs: dict[str, Any] = {"q": self.place(self.draw(generator, self.B, self.T, self.H, self.D), device)}
        sources = [("k", "v", "ranges", keys)] + ([("k2", "v2", "ranges2", self.S)] if self.S else [])
        for k, v, ranges, count in sources:
            for name, shared in ((k, (2,)), (v, (0, 3))):
                values = self.draw(generator, self.B, count, self.Hk, self.D, shared=shared)
                inputs[name] = self.place(values, device)
            rows = self.B if self.each in ("row", "both") else 1
            heads = self.H if self.each in ("head", "both") else 1
            shape = (rows, heads, self.parts, self.T)
            inputs[ranges] = draw_ranges(generator, *shape, keys=count, width=self.width, least=self.least).to(device)
        if self.bias != "none":
            heads = 1 if self.bias.endswith("shared") else self.H
            shape = (heads, 2 * self.C - 1) if self.bias.startswith("distance") else (heads, self.C, self.C)
            inputs["bias"] = self.place(self.draw(generator, *shape, shared=(0,)), device)
        return inputs | dict(self.options)


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 5, 16, 40, 64],
        "B": [1, 2],
        "T": [1, 2, 31, 64, 65, 130],
        "Tk": [None, 1, 40, 129],
        "dtype": [*WIDE, *NARROW],
        "parts": [1, 2, 5],
        "width": [1, 12, 100],
        "each": ["shared", "row", "head", "both"],
        "more": ["none", "none", 1, 70, "distance", "distance_shared", "square", "square_shared"],
        "C": [1, 5, 60],
        "activation": ["softmax", "softmax", "laplace", "relu2"],
        "scale": [None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=7):
        row["H"], row["Hk"] = row.pop("heads")
        more = row.pop("more")
        row |= {"bias": more} if isinstance(more, str) else {"S": more}
        row["options"] = tuple((name, row.pop(name)) for name in ("activation", "scale"))
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("activation", "scale") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    cases = [
        *(make("small", "sanitize", "tiny", B=2, T=T, parts=parts) for T in (20, 33) for parts in (1, 3)),
        make("small", "sanitize", "tiny", B=2, T=17, S=9, parts=2, each="both"),
        make("small", "sanitize", "tiny", B=2, T=17, Tk=40, each="head", bias="distance"),
        make("small", "sanitize", "tiny", B=1, T=19, bias="square_shared", each="row"),
        *(make("small", "sanitize", "tiny", B=1, T=19, activation=name) for name in ("laplace", "relu2")),
        *(make("small", "sanitize", B=B, T=T, H=2, Hk=1, D=2) for B, T in ((0, 5), (3, 0), (0, 0))),
        make("small", "sanitize", B=2, T=5, Tk=0),
        *(make("small", "sanitize", B=2, T=70, parts=2, S=66, dtype=dtype) for dtype in (*WIDE, *NARROW)),
        *(make("small", "sanitize", B=1, T=30, H=2, Hk=1, layout=layout, S=4) for layout in LAYOUTS[1:]),
        make("small", B=1, T=3, H=36, Hk=1, width=5),  # more query heads to a key head than a tile takes at a time
        make(B=1, T=300, H=2, Hk=1, D=96, width=300),
        make(B=1, T=200, H=1, Hk=1, D=16, parts=70, width=2),  # a tile of rows from more parts than it has rows
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "Tk": 11, "H": 2, "Hk": 1, "D": 6, "least": 1} | options))
