"""Cases of cluster_assign and update_centroids."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import STATES, distinct
from .clusters import ClusterCase
from .common import LAYOUTS, NARROW, WIDE, pairwise

OPERATORS = ("cluster_assign", "update_centroids")
__all__ = ["OPERATORS", "STATES", "example", "table"]


@dataclass(frozen=True, kw_only=True)
class Case(ClusterCase):
    nearest: str = "some"  # of update_centroids: clusters that there are not; "none" other; "first": one cluster alone

    def words(self) -> list[str]:
        words = [word for word in super().words() if word != f"Hk{self.Hk}"]
        words = [word for word in words if self.op == "cluster_assign" or not word.startswith("size")]
        return words + ([] if self.nearest == "some" else [self.nearest])

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        if self.op == "cluster_assign":
            return [torch.int32, torch.int32]
        return [self.real if self.seed % 2 else self.dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator = self.generator()
        x = self.place(self.draw(generator, self.B, self.T, self.H, self.D, shared=(0,)), device)
        centroids = self.centroids(generator, device)
        if self.op == "cluster_assign":
            inputs = {"x": x, "centroids": centroids, "size": self.size, **dict(self.options)}
            return self.redraw(inputs, ("x",), self.size, device)
        low, high = {"some": (-2, self.K + 2), "none": (-9, 0), "first": (0, 1)}[self.nearest]
        nearest = torch.randint(low, high, (self.B, self.T, self.H), generator=generator)
        nearest = nearest if self.D % 2 else nearest.to(torch.int32)
        if self.layout not in ("contiguous", "offset"):
            nearest = nearest.mT.contiguous().mT
        return {"centroids": centroids, "x": x, "nearest": nearest.to(device), **dict(self.options)}

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        if self.op == "cluster_assign":
            return dict.fromkeys(exact, 0.0)
        return super().bounds({}, cotangents, exact)


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors: dict[str, Sequence[Any]] = {
        "H": [1, 3, 4],
        "D": [1, 5, 8, 16, 40, 64, 96],
        "B": [1, 2],
        "T": [1, 2, 7, 31, 64, 65, 130],
        "K": [1, 2, 5, 16, 33, 70],
        "dtype": [*WIDE, *NARROW],
        "layout": LAYOUTS,
    }
    if op == "cluster_assign":
        factors |= {"size": [1, 4, 31, 200], "mode": ["balanced", "causal"], "spread": [1.0, 1.0, 0.0]}
    else:
        factors |= {"nearest": ["some", "some", "none", "first"], "decay": [0.999, 0.5, 0.0]}
    for row in pairwise(factors, seed=9):
        row["options"] = tuple((name, row.pop(name)) for name in ("mode", "decay") if name in row)
        if row["D"] == 1:
            row["K"] = min(row["K"], 2)  # of one channel the largest score is that of an outer centroid
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        plain = tuple((name, options.pop(name)) for name in ("mode", "decay") if name in options)
        return Case(op, **options, options=plain, marks=marks)

    ways: list[dict[str, Any]] = [{"mode": "balanced"}, {"mode": "causal"}]
    if op == "update_centroids":
        ways = [{"decay": 0.5}, {"nearest": "first"}]
    cases = [
        *(make("small", "sanitize", B=2, T=19, **way) for way in ways),
        *(make("small", "tiny", B=1, T=9, H=1, K=2, **way) for way in ways),
        *(make("small", "sanitize", B=B, T=T, **way) for B, T in ((0, 5), (3, 0)) for way in ways),
        *(make("small", "sanitize", B=2, T=3, size=7, K=5, **way) for way in ways),
        *(make("small", "sanitize", B=1, T=17, D=5, K=18, spread=0.0, **way) for way in ways),
        *(make(B=2, T=700, H=2, D=64, K=16, size=50, **way) for way in ways),
        *(make(B=0, T=0, **way) for way in ways),
    ]
    return distinct([*cases, *covering(op)])


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "D": 6, "K": 4, "size": 3} | options))
