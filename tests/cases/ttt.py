"""What the cases of test-time training share: sequences, gates, weights, options."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.ttt import reference

from . import common
from .common import Function, name_of

STATES: dict[str, tuple[str, ...]] = {}  # weights are arguments like others


@dataclass(frozen=True, kw_only=True)
class IteratedCase(common.DrawnCase):
    """Newton-Schulz steps enlarge small singular values, and with them rounding errors, by hundreds.

    How much depends on the matrix. So the bound is that of one rounding, and 4 times the reference's own error in what
    the operator computes in.
    """

    @property
    def iterated(self) -> bool:
        return True

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        bounds = super().bounds(inputs, cotangents, exact)
        if not self.iterated:
            return bounds
        leaves = common.differentiable(inputs)
        same = {name: t.detach().to("cpu", self.real).requires_grad_() for name, t in leaves.items()}
        given = {name: value.cpu() if torch.is_tensor(value) else value for name, value in inputs.items()}
        own = common.evaluate(self.reference, given | same, [cotangent.cpu() for cotangent in cotangents])
        return {name: bound + 4 * common.error(own[name], exact[name]) for name, bound in bounds.items()}


@dataclass(frozen=True, kw_only=True)
class HeadCase(IteratedCase):
    """An operator of q, k, v [B, T, H, D] with weights of each batch row and head."""

    T: int = 11
    H: int = 2
    D: int = 8
    C: int = 4
    wide: bool = False  # beside 16-bit q, k, v: gates and weights in float32
    options: tuple[tuple[str, Any], ...] = ()  # plain ones, by name

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"H{self.H}", f"D{self.D}", f"C{self.C}", name_of(self.dtype)]
        words += [f"{name}_{value}" for name, value in self.options] + ["wide"] * self.wide
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def iterated(self) -> bool:
        return dict(self.options).get("optimizer") == "muon"

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        bounds = super().bounds(inputs, cotangents, exact)
        if self.iterated and min(self.T, self.C) <= 1:
            # Of a single gradient the size does not matter: by its rate there is no derivative, only rounding.
            bounds |= {name: torch.inf for name in ("dlr", "dmomentum") if name in bounds}
        return bounds

    @property
    def reference(self) -> Function:
        return common.as_tuple(getattr(reference, self.op))

    @property
    def beside(self) -> torch.dtype:
        """The dtype of gates and weights."""
        return self.real if self.wide else self.dtype

    def sequence(self, generator: torch.Generator, device: str, unit: bool = False) -> Tensor:
        """[B, T, H, D]; `unit`: of length 1, as keys are, so that steps converge."""
        values = self.draw(generator, self.B, self.T, self.H, self.D, shared=(2,))
        return self.place(values / values.norm(dim=-1, keepdim=True) if unit else values, device)

    def gate(self, generator: torch.Generator, device: str, low: float, high: float, *more: int) -> Tensor:
        """[B, T, H, *more] between two numbers."""
        drawn = torch.sigmoid(self.draw(generator, self.B, self.T, self.H, *more, shared=(0,)))
        return self.place(low + (high - low) * drawn, device, self.beside)

    def weight(self, generator: torch.Generator, device: str, *sizes: int, size: float = 1.0) -> Tensor:
        """[B, H, *sizes], products with which keep the size of a vector."""
        values = self.draw(generator, self.B, self.H, *sizes, shared=(0,))
        return self.place(values * size * sizes[-1] ** -0.5, device, self.beside)
