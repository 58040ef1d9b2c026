"""What the cases of the operators on clusters share: centroids, and data whose assignment no rounding error changes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.attention import reference

from .attention import AttentionCase

GAP = 1e-4  # between the score of what is chosen and the next one


def is_clear(x: Tensor, centroids: Tensor, size: int | None) -> bool:
    """Whether rounding errors change neither the nearest cluster nor, with a size, the lists of the best tokens."""
    scores = reference.cluster_scores(x.detach().to("cpu", torch.float64), centroids.detach().to("cpu", torch.float64))
    ranked = scores.sort(-1, descending=True).values
    clear = ranked.shape[-1] < 2 or bool((ranked[..., 0] - ranked[..., 1] > GAP).all())
    if size is not None and 0 < size < scores.shape[2]:
        ranked = scores.sort(2, descending=True).values
        clear = clear and bool((ranked[:, :, size - 1] - ranked[:, :, size] > GAP).all())
    return clear


@dataclass(frozen=True, kw_only=True)
class ClusterCase(AttentionCase):
    """With centroids [H, K, D], beside 16 bits in float32 for every other case."""

    K: int = 3
    size: int = 4
    spread: float = 1.0  # of the centroids around the first one; 0: all are that one, and all scores and ties exact

    def words(self) -> list[str]:
        words = [*super().words(), f"K{self.K}", f"size{self.size}"]
        return words + ([] if self.spread == 1.0 else [f"spread{self.spread:g}"])

    def draw(self, generator: torch.Generator, *shape: int, shared: Sequence[int] = ()) -> Tensor:
        values = super().draw(generator, *shape, shared=shared)
        return values if self.spread else (values * 8).round() / 8

    def centroids(self, generator: torch.Generator, device: str) -> Tensor:
        values = self.draw(generator, self.H, self.K, self.D, shared=(0,))
        if self.spread != 1.0:
            values = values[:, :1] + self.spread * (values - values[:, :1])
        return self.place(values, device, self.real if self.seed % 2 else self.dtype)

    def redraw(self, inputs: dict[str, Any], names: tuple[str, ...], size: int | None, device: str) -> dict[str, Any]:
        """Draws tensors again until the assignment is clear; of centroids that are all one, ties are exact."""
        for name in names:
            heads = inputs[name].shape[2]
            for attempt in range(200):
                if self.spread == 0 or is_clear(inputs[name], inputs["centroids"], size):
                    break
                values = self.draw(self.generator(2 + attempt), self.B, self.T, heads, self.D, shared=(0,))
                inputs[name] = self.place(values, device)
            else:
                raise AssertionError(f"{self}: no clear assignment")
        return inputs
