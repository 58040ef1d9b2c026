"""What the cases of all attention operators share: queries, keys and values with grouped heads, and options."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.attention import reference

from . import common
from .common import Function, arrange, name_of

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
STATES: dict[str, tuple[str, ...]] = {}  # no attention operator has a state


@dataclass(frozen=True, kw_only=True)
class AttentionCase(common.Case):
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
    def real(self) -> torch.dtype:
        """Of what is summed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, torch.float32]

    def edges(self) -> list[int]:
        """The ends of the packed sequences: the first and the last are empty, the second is one step."""
        draw = random.Random(self.seed)
        inner = sorted(draw.randint(min(1, self.T), self.T) for _ in range(3))
        return [0, 0, min(1, self.T), *inner, self.T, self.T]

    def draw(self, generator: torch.Generator, *shape: int, shared: Sequence[int] = ()) -> Tensor:
        """Normal values; with layout "expanded" the dimensions `shared` are read with stride 0."""
        expanded = self.layout == "expanded"
        sizes = [min(size, 1) if expanded and d in shared else size for d, size in enumerate(shape)]
        values = torch.randn(sizes, dtype=torch.float64, generator=generator)
        return values.expand(shape)

    def place(self, values: Tensor, device: str, dtype: torch.dtype | None = None) -> Tensor:
        """As a leaf in the case's dtype and memory layout."""
        sizes = values.shape
        for d, stride in enumerate(values.stride()):
            values = values.narrow(d, 0, min(sizes[d], 1)) if stride == 0 else values
        return arrange(values.to(dtype or self.dtype).to(device), self.layout).expand(sizes).requires_grad_()

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

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            values = torch.randn(shape, dtype=torch.float64, generator=generator)
            if output.is_floating_point():
                values = values.to(self.dtype).to(output.dtype)
            cotangents.append(arrange(values.to(output.device), self.layout).expand(output.shape))
        return cotangents

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        """The largest error allowed of each result: of its arithmetic and, if it has fewer bits, its own rounding."""
        dtypes = {str(position): dtype for position, dtype in enumerate(self.output_dtypes)}
        dtypes |= {f"d{name}": value.dtype for name, value in common.differentiable(inputs).items()}
        bounds = {}
        for name, value in exact.items():
            bound = TOLERANCE[self.real]
            if dtypes[name] != self.real:
                bound += 1.2 * torch.finfo(dtypes[name]).eps / 2
                # Half the distance of neighbours where numbers are so small that they have fewer digits.
                size = value[value.isfinite()].norm().item() / max(1, int(value.isfinite().sum())) ** 0.5
                bound += (
                    torch.finfo(dtypes[name]).smallest_normal * torch.finfo(dtypes[name]).eps / 2 / max(size, 1e-30)
                )
            bounds[name] = common.allowance(bound, value)
        return bounds


def distinct(cases: Sequence[Any]) -> list[Any]:
    """Without repetitions: of equal names the first."""
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]
