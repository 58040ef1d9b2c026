"""What the cases of all attention operators share: queries, keys and values with grouped heads, and options."""

import random
from dataclasses import dataclass
from typing import Any

import torch

from seqops.attention import reference

from . import common
from .common import Function, distinct, name_of

__all__ = ["STATES", "AttentionCase", "distinct"]
STATES: dict[str, tuple[str, ...]] = {}  # no attention operator has a state


@dataclass(frozen=True, kw_only=True)
class AttentionCase(common.DrawnCase):
    """An operator of q [B, T, H, D] and k, v [B, T, Hk, D].

    The class of an operator adds its tensors in `more_inputs`, and the names of its float outputs where they are not o
    and lse.
    """

    H: int = 4
    Hk: int = 2
    D: int = 8
    packed: bool = False  # several sequences along T, some of them empty
    options: tuple[tuple[str, Any], ...] = ()  # plain ones, by name

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"H{self.H}", f"Hk{self.Hk}", f"D{self.D}", name_of(self.dtype)]
        words += [f"{name}_{value}" for name, value in self.options]
        words += ["packed"] if self.packed else []
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return common.as_tuple(getattr(reference, self.op))

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, torch.float32]

    def edges(self) -> list[int]:
        """The ends of the packed sequences: the first and the last are empty, the second is one step."""
        draw = random.Random(self.seed)
        inner = sorted(draw.randint(min(1, self.T), self.T) for _ in range(3))
        return [0, 0, min(1, self.T), *inner, self.T, self.T]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        assert self.B == 1 or not self.packed
        generator = self.generator()
        inputs: dict[str, Any] = {}
        for name, heads, shared in (("q", self.H, (0,)), ("k", self.Hk, (2,)), ("v", self.Hk, (0, 3))):
            values = self.draw(generator, self.B, self.T, heads, self.D, shared=shared)
            inputs[name] = self.place(values, device)
        inputs |= self.more_inputs(generator, device) | dict(self.options)
        if self.packed:
            integer = random.Random(self.seed).choice([torch.int32, torch.int64])
            inputs["cu_seqlens"] = torch.tensor(self.edges(), dtype=integer, device=device)
        return inputs

    def more_inputs(self, generator: torch.Generator, device: str) -> dict[str, Any]:
        return {}
