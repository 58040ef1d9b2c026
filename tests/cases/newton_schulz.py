"""Cases of newton_schulz: matrices [..., M, N], in batches of any number of dimensions."""

from dataclasses import dataclass
from typing import Any

import torch

from seqops.ttt import LACT_LM_STEPS, reference

from . import common
from .common import LAYOUTS, NARROW, WIDE, Function, name_of
from .ttt import STATES, IteratedCase

OPERATORS = ("newton_schulz",)
__all__ = ["OPERATORS", "STATES", "example", "table"]
FLAT = tuple(number for step in LACT_LM_STEPS for number in step)
STEPS = {"muon": None, "lact": FLAT, "two": FLAT[:6], "none": ()}


@dataclass(frozen=True, kw_only=True)
class Case(IteratedCase):
    """B matrices of T rows."""

    N: int = 9
    more: tuple[int, ...] = ()  # further dimensions of the batch, before B
    steps: str = "muon"
    kind: str = "full"  # or "zero": every other matrix; "rank one"
    alone: bool = False  # one matrix, without a batch

    def words(self) -> list[str]:
        words = [f"B{'x'.join(map(str, (*self.more, self.B)))}", f"M{self.T}", f"N{self.N}", name_of(self.dtype)]
        words += [self.steps, self.kind.replace(" ", "_")] + ["alone"] * self.alone
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return common.as_tuple(reference.newton_schulz)

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator = self.generator()
        values = self.draw(generator, *self.more, self.B, self.T, self.N, shared=(0,))
        if self.kind == "rank one":
            values = values[..., :1] * values[..., :1, :]
        if self.kind == "zero":
            values = values.clone()
            values[..., ::2, :, :] = 0
        values = values[0] if self.alone else values
        return {"x": self.place(values, device), "coefficients": STEPS[self.steps]}


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    sizes = [(1, 1), (1, 7), (5, 9), (9, 5), (16, 16), (17, 33), (40, 24)]
    return [
        *(make("small", "sanitize", "tiny", B=2, T=M, N=N, steps=s) for M, N in sizes for s in ("muon", "lact")),
        *(make("small", "sanitize", "tiny", B=3, T=6, N=4, steps=s) for s in ("none", "two")),
        *(make("small", "sanitize", "tiny", B=3, T=6, N=8, kind=kind) for kind in ("zero", "rank one")),
        *(make("small", "sanitize", B=B, T=T, N=N) for B, T, N in ((0, 5, 4), (3, 0, 4), (3, 4, 0))),
        *(make("small", "sanitize", B=2, T=12, N=20, dtype=dtype) for dtype in (*WIDE, *NARROW)),
        *(make("small", "sanitize", B=2, T=12, N=10, layout=layout) for layout in LAYOUTS[1:]),
        make("small", "sanitize", B=2, T=5, N=7, more=(3, 2)),
        make("small", "sanitize", B=1, T=5, N=7, alone=True),
        *(make(B=2, T=M, N=N) for M, N in ((63, 64), (65, 65), (128, 100), (200, 130), (96, 400))),
        *(make(B=1, T=M, N=N, dtype=torch.bfloat16, steps="lact") for M, N in ((64, 64), (100, 260))),
        make("slow", B=3, T=384, N=384),
        make("slow", B=1, T=768, N=1536, steps="lact"),
    ]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "N": 4, "steps": "two"} | options))
