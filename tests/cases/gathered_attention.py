"""Cases of gathered_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("gathered_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    K: int = 3
    wq: int = 5
    wk: int = 6
    entries: str = "some"  # outside of the sequence; "valid": none; "pads": all

    def words(self) -> list[str]:
        return [
            *super().words(),
            f"K{self.K}",
            f"w{self.wq}_{self.wk}",
            *([] if self.entries == "some" else [self.entries]),
        ]

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        return {
            name: self.lists(generator, width).to(device)
            for name, width in (("q_index", self.wq), ("k_index", self.wk))
        }

    def lists(self, generator: torch.Generator, width: int) -> Tensor:
        """In no order, with repetitions."""
        low, high = {"valid": (0, self.T), "some": (-2, self.T + 2), "pads": (-9, 0)}[self.entries]
        index = torch.randint(low, max(high, low + 1), (self.B, self.H, self.K, width), generator=generator)
        if self.entries == "pads":
            index[..., ::2] += self.T + 9
        if self.T == 0 and self.entries == "valid":
            index -= 1
        index = index.to(torch.int32) if self.D % 2 else index
        return index if self.layout in ("contiguous", "offset") else index.mT.contiguous().mT


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 5, 8, 16, 40, 64, 96],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 64, 65],
        "K": [1, 3, 5],
        "wq": [1, 6, 33],
        "wk": [1, 7, 40],
        "entries": ["some", "some", "valid", "pads"],
        "dtype": [*WIDE, *NARROW],
        "causal": [False, True],
        "reduce": ["mean", "sum", "last"],
        "scale": [None, None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=8):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = tuple((name, row.pop(name)) for name in ("causal", "reduce", "scale"))
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("causal", "reduce", "scale") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    cases = [
        *(
            make("small", "sanitize", B=2, T=9, causal=causal, reduce=how)
            for causal, how in ((False, "mean"), (True, "mean"), (True, "sum"), (True, "last"))
        ),
        *(make("small", "tiny", B=1, T=5, H=2, Hk=1, K=2, causal=True, reduce=how) for how in ("mean", "last")),
        make("small", "sanitize", B=1, T=7, entries="pads"),
        *(make("small", "sanitize", B=B, T=T, causal=True) for B, T in ((0, 5), (3, 0))),
        *(make("small", "sanitize", B=2, T=6, K=K, wq=wq, wk=wk) for K, wq, wk in ((0, 3, 2), (2, 0, 3), (2, 3, 0))),
        *(make("small", "sanitize", B=2, T=T, K=1, wq=9, wk=9, entries="valid", causal=True) for T in (1, 2)),
        make(B=1, T=200, H=2, Hk=1, D=64, K=5, wq=64, wk=80, causal=True),
        make(B=0, T=0),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "K": 4, "wq": 8, "wk": 10} | options))
