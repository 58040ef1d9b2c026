"""Cases of ssm_kernel and cauchy_kernel: B heads, T the length or the number of nodes, N modes a head."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.ssm import reference

from . import common
from .common import LAYOUTS, Function, arrange, as_tuple, name_of, pairwise

OPERATORS = ("ssm_kernel", "cauchy_kernel")
STATES: dict[str, tuple[str, ...]] = {"ssm_kernel": (), "cauchy_kernel": ()}
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
# Three times what the worst of these cases needs.
TOLERANCE = {torch.float32: 3e-6, torch.float64: 1e-12}


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """ssm_kernel of z, c [B, N] and length T, or cauchy_kernel of v, w [B, N] and T nodes; `dtype` is of the parts."""

    N: int = 5
    special: bool = False  # modes that are gone after step 0, or on the circle; infinite nodes, and some close to poles

    def words(self) -> list[str]:
        words = [f"H{self.B}", f"L{self.T}", f"N{self.N}", name_of(self.dtype)]
        words += ["special"] if self.special else []
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return as_tuple(getattr(reference, self.op))

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype if self.op == "ssm_kernel" else COMPLEX[self.dtype]]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator, expanded = self.generator(), self.layout == "expanded"
        H, N, L = self.B, self.N, self.T

        def shape(*sizes: int) -> list[int]:
            """With layout "expanded" the first dimension is read with stride 0."""
            return [min(size, 1) if expanded and i == 0 else size for i, size in enumerate(sizes)]

        def uniform(*sizes: int) -> Tensor:
            return torch.rand(shape(*sizes), dtype=torch.float64, generator=generator)

        def normal(*sizes: int) -> Tensor:
            return torch.randn(shape(*sizes), dtype=torch.complex128, generator=generator)

        def place(values: Tensor, *sizes: int) -> Tensor:
            values = arrange(values.to(COMPLEX[self.dtype]).to(device), self.layout)
            return values.expand(sizes).requires_grad_()

        if self.op == "ssm_kernel":
            # Forgets in a few hundred steps, or in a few of the length.
            z = torch.complex(-uniform(H, N) * 4 / max(L, 1), (2 * uniform(H, N) - 1) * math.pi)
            if self.special and z.numel():
                z[..., 0] = complex(-math.inf, 1.0)
                z.real[..., 1:3] = 0.0
            return {"z": place(z, H, N), "c": place(normal(H, N), H, N), "length": L}
        nodes, w = normal(L), torch.complex(-uniform(H, N), 2 * normal(H, N).real)
        if self.special and nodes.numel() > 8 and w.numel():
            # In float32 a distance of a few units: such differences are exact.
            nodes[0] = w.flatten()[0].to(COMPLEX[self.dtype]).to(torch.complex128) + 1e-6
            nodes[1:5] = torch.tensor([complex(math.inf, 0), complex(1, -math.inf), 1e18 + 0j, 0j])
        return {"v": place(normal(H, N), H, N), "nodes": place(nodes, L), "w": place(w, H, N)}

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            sizes = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            kind = torch.complex128 if output.is_complex() else torch.float64
            values = torch.randn(sizes, dtype=kind, generator=generator)
            cotangents.append(arrange(values.to(output.dtype).to(output.device), self.layout).expand(output.shape))
        return cotangents

    def bounds(self, exact: dict[str, Tensor]) -> dict[str, float]:
        return {name: common.allowance(TOLERANCE[self.dtype], value) for name, value in exact.items()}


def table(op: str) -> list[Case]:
    def make(**options: Any) -> Case:
        return Case(op, **options)

    cases = [
        make(B=2, T=9, N=3, special=True).with_marks("small", "tiny", "sanitize"),
        make(B=3, T=37, N=5, special=True).with_marks("small", "tiny"),
        make(B=1, T=64, N=1).with_marks("small", "tiny"),
        make(B=2, T=33, N=17, dtype=torch.float64).with_marks("small", "tiny", "sanitize"),
        # Nothing to do.
        *(make(B=B, T=T, N=N).with_marks("small", "tiny") for B, T, N in ((0, 5, 3), (2, 0, 3), (2, 5, 0), (0, 0, 0))),
        *(make(B=2, T=21, N=4, layout=name).with_marks("small", "tiny") for name in LAYOUTS[1:]),
        # Several blocks of modes, segments, and stretches of nodes.
        make(B=2, T=1025, N=70),
        make(B=1, T=33000, N=3),
        make(B=9, T=2050, N=2),
        make(B=256, T=4096, N=32).with_marks("slow"),
        make(B=2, T=70000, N=130, special=True).with_marks("slow"),
    ]
    factors = {
        "B": [1, 3, 8],
        "T": [1, 2, 15, 16, 17, 255, 257, 1023, 1024, 1030],
        "N": [1, 2, 7, 64, 65],
        "dtype": [torch.float32, torch.float64],
        "layout": LAYOUTS,
        "special": [False, True],
    }
    cases += [make(**row) for row in pairwise(factors, seed=5)]
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(op, **({"B": 3, "T": 9, "N": 4} | options))
