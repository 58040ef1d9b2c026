"""Cases of prob_sparse_attention."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.attention import reference

from .attention import STATES, AttentionCase, distinct
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("prob_sparse_attention",)
__all__ = ["OPERATORS", "STATES", "example", "table"]

GAP = 1e-4  # of the measure between the last selected query and the next: a rounding error selects no other


@dataclass(frozen=True, kw_only=True)
class Case(AttentionCase):
    U: int = 5
    top: int = 4
    samples: str = "valid"  # with duplicates; "some" outside of the sequence, "none" inside

    def words(self) -> list[str]:
        return [*super().words(), f"U{self.U}", f"top{self.top}", *([] if self.samples == "valid" else [self.samples])]

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """Queries are drawn again where the selection hangs on rounding errors."""
        inputs = super().inputs(device)
        for attempt in range(100):
            if self.is_clear(inputs):
                return inputs
            generator = self.generator(2 + attempt)
            inputs["q"] = self.place(self.draw(generator, self.B, self.T, self.H, self.D, shared=(0,)), device)
        raise AssertionError(f"{self}: no clear selection")

    def is_clear(self, inputs: dict[str, Any]) -> bool:
        q, k = (inputs[name].detach().to("cpu", torch.float64) for name in ("q", "k"))
        measure = reference.sampled_measure(q, k, inputs["sample_index"].cpu()).sort(-1, descending=True).values
        if not 0 < self.top < self.T:
            return True
        last, following = measure[..., self.top - 1], measure[..., self.top]
        return bool(((last - following > GAP) | (last == -torch.inf)).all())

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        low, high = {"valid": (0, max(self.T, 1)), "some": (-self.T - 1, 2 * self.T + 1), "none": (-9, 0)}[self.samples]
        index = torch.randint(low, high, (self.T, self.U), generator=generator)
        if self.samples == "none":
            index[:, ::2] += 9 + self.T
        if self.U > 1 and self.samples == "valid":
            index[::2, 1] = index[::2, 0]
        if self.seed % 2:
            index = index.to(torch.int32)
        if self.layout not in ("contiguous", "offset"):
            index = index.mT.contiguous().mT
        return {"sample_index": index.to(device), "top": self.top}


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "heads": [(1, 1), (3, 1), (4, 2), (3, 3)],
        "D": [1, 5, 8, 16, 40, 64, 96],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 64, 65, 130],
        "U": [0, 1, 3, 16, 35],
        "top": [1, 5, 33, 200],
        "samples": ["valid", "valid", "some", "none"],
        "dtype": [*WIDE, *NARROW],
        "causal": [False, True],
        "scale": [None, None, 0.3],
        "layout": LAYOUTS,
    }
    for row in pairwise(factors, seed=7):
        row["H"], row["Hk"] = row.pop("heads")
        row["options"] = tuple((name, row.pop(name)) for name in ("causal", "scale"))
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("causal", "scale") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    cases = [
        make("small", "sanitize", "tiny", B=1, T=11, H=2, Hk=1),
        make("small", "sanitize", "tiny", B=1, T=11, H=2, Hk=1, samples="some", causal=True),
        *(make("small", "sanitize", B=2, T=19, causal=causal) for causal in (False, True)),
        *(make("small", "sanitize", B=B, T=T, causal=True) for B, T in ((0, 5), (3, 0), (0, 0))),
        make("small", "sanitize", B=2, T=9, samples="none"),
        make("small", "sanitize", B=2, T=9, U=0, causal=True),
        *(make("small", "sanitize", B=2, T=T, top=7, causal=True) for T in (1, 6, 7, 8)),
        make(B=1, T=300, H=2, Hk=1, D=64, U=35, top=35),
        make(B=1, T=300, H=2, Hk=1, D=64, U=35, top=35, causal=True),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "Hk": 1, "D": 6, "U": 4, "top": 2} | options))


def order(measure: Tensor) -> Tensor:
    """The positions by their measure, in which they are selected: NaN first, of equal ones the lower."""
    return measure.sort(dim=-1, descending=True, stable=True).indices
