"""Cases of conv_ssm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.ssm import reference_conv_ssm

from . import common
from .common import LAYOUTS, NARROW, Function, arrange, name_of, pairwise

OPERATORS = ("conv_ssm",)
STATES = {"conv_ssm": ("initial_state",)}
COMPLEX = {torch.float64: torch.complex128}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """conv_ssm of u [B, T, *picture, U] with P states a pixel, and kernels of the sizes `kernels` for b, c and d."""

    picture: Size = (4, 5)
    U: int = 3
    P: int = 2
    kernels: tuple[Size, Size, Size | None] = ((3, 3), (3, 3), (3, 3))  # None: no d
    d_dtype: torch.dtype | None = None  # None: as u
    state: bool = True
    gaps: bool = False  # exact zeros in a

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"{self.picture[0]}x{self.picture[1]}", f"U{self.U}", f"P{self.P}"]
        words += [name_of(self.dtype)]
        words += ["kernels_" + "_".join("none" if size is None else f"{size[0]}x{size[1]}" for size in self.kernels)]
        words += [] if self.d_dtype is None else [f"d_{name_of(self.d_dtype)}"]
        words += [] if self.state else ["stateless"]
        words += ["gaps"] if self.gaps else []
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return reference_conv_ssm.conv_ssm

    @property
    def precision(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def state_dtype(self) -> torch.dtype:
        return COMPLEX.get(self.dtype, torch.complex64)

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, self.state_dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator, expanded = self.generator(), self.layout == "expanded"

        def draw(*shape: int, shared: Sequence[int] = (), dtype: torch.dtype, scale: float = 1.0) -> Tensor:
            """Normal values; with layout "expanded" the dimensions `shared` are read with stride 0."""
            sizes = [min(size, 1) if expanded and i in shared else size for i, size in enumerate(shape)]
            kind = torch.complex128 if dtype.is_complex else torch.float64
            values = torch.randn(sizes, dtype=kind, generator=generator) * scale
            return place(values.to(dtype)).expand(shape).requires_grad_()

        def place(values: Tensor) -> Tensor:
            return arrange(values.to(device), self.layout)

        B, T, U, P, (Y, X), state = self.B, self.T, self.U, self.P, self.picture, self.state_dtype
        modulus = torch.rand(P, dtype=torch.float64, generator=generator).sqrt()
        if self.gaps:
            modulus[::2] = 0
        a = torch.polar(modulus, torch.rand(P, dtype=torch.float64, generator=generator) * math.tau).to(state)
        if self.gaps:
            a[::2] = 0  # the real part as well as the imaginary one
        of_b, of_c, of_d = self.kernels
        inputs = {
            "u": draw(B, T, Y, X, U, shared=(0, 3), dtype=self.dtype),
            "a": place(a).requires_grad_(),
            "b": draw(*of_b, U, P, shared=(1,), dtype=state, scale=(of_b[0] * of_b[1] * U) ** -0.5),
            "c": draw(*of_c, P, U, shared=(0, 3), dtype=state, scale=(2 * of_c[0] * of_c[1] * P) ** -0.5),
        }
        if of_d is not None:
            scale = (of_d[0] * of_d[1] * U) ** -0.5
            inputs["d"] = draw(*of_d, U, U, shared=(2,), dtype=self.d_dtype or self.dtype, scale=scale)
        if self.state:
            inputs["initial_state"] = draw(B, Y, X, P, shared=(1,), dtype=state)
        return inputs

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            kind = torch.complex128 if output.is_complex() else torch.float64
            values = torch.randn(shape, dtype=kind, generator=generator)
            cotangents.append(arrange(values.to(output.dtype).to(output.device), self.layout).expand(output.shape))
        return cotangents

    def bounds(self, exact: dict[str, Tensor]) -> dict[str, float]:
        """For each result the largest error allowed: that of its own rounding, if it has 16 bits, and of the sums."""
        inputs = common.differentiable(self.inputs())
        dtypes = {"0": self.dtype, "1": self.state_dtype} | {f"d{name}": value.dtype for name, value in inputs.items()}
        bounds = {}
        for name, value in exact.items():
            bound = TOLERANCE[self.precision]
            if dtypes[name] in NARROW:
                bound = torch.finfo(dtypes[name]).eps / 2
            bounds[name] = common.allowance(bound, value)
        return bounds


SIZES = ((1, 1), (3, 3), (2, 2), (1, 4), (5, 2))


def covering(op: str) -> list[Case]:
    """Every pair of shapes and options."""
    factors = {
        "picture": [(1, 1), (4, 5), (7, 3), (1, 6)],
        "U": [1, 3, 16],
        "P": [1, 2, 17],
        "of_b": SIZES,
        "of_c": SIZES,
        "of_d": (None, *SIZES),
        "B": [1, 2, 5],
        "T": [1, 2, 9, 16, 17],
        "dtype": [torch.float32, torch.float64, *NARROW],
        "state": [False, True],
        "layout": LAYOUTS,
        "gaps": [False, True],
    }
    cases = []
    for row in pairwise(factors, seed=7):
        kernels = (row.pop("of_b"), row.pop("of_c"), row.pop("of_d"))
        cases.append(Case(op, kernels=kernels, **row))
    return cases


def table(op: str) -> list[Case]:
    def make(**options: Any) -> Case:
        return Case(op, **options)

    one = ((1, 1), (1, 1), (1, 1))
    everywhere = ("small", "tiny")
    cases = [
        # All options together, and kernels of one pixel, which have a way of their own.
        make(B=2, T=6, gaps=True).with_marks(*everywhere, "sanitize"),
        make(B=2, T=9, picture=(3, 7), U=5, P=17, kernels=one).with_marks(*everywhere, "sanitize"),
        make(B=1, T=5, picture=(3, 7), U=5, P=17, kernels=((3, 3), (1, 1), None)).with_marks(*everywhere),
        # More channels than a block of states or outputs has.
        make(B=1, T=3, picture=(1, 2), U=70, P=100, kernels=one).with_marks(*everywhere),
        make(B=1, T=5, picture=(2, 2), U=2, P=3, kernels=((1, 1), (1, 1), (3, 3)), gaps=True).with_marks("small"),
        make(B=1, T=5, picture=(2, 2), U=2, P=3, kernels=((1, 1), (3, 3), (1, 1))).with_marks("small"),
        make(B=2, T=4, picture=(5, 2), kernels=((2, 4), (4, 1), (5, 3)), state=False).with_marks("small"),
        make(B=1, T=3, picture=(1, 1), U=1, P=1, kernels=one).with_marks(*everywhere),
        make(B=1, T=3, picture=(1, 2), kernels=((7, 7), (4, 6), None)).with_marks("small"),
        # Every dtype; the interpreter truncates where bfloat16 is stored, GPUs round.
        *(
            make(B=2, T=5, U=5, kernels=kernels, dtype=dtype).with_marks(
                "small", *(["tiny"] if dtype == torch.float16 and kernels == one else [])
            )
            for dtype in (torch.float64, *NARROW)
            for kernels in (one, ((3, 3), (2, 3), (1, 3)))
        ),
        *(make(B=1, T=3, dtype=dtype, d_dtype=torch.float32).with_marks("small") for dtype in NARROW),
        # Nothing to do.
        *(
            make(B=B, T=T, kernels=kernels, state=state).with_marks(
                "small", "sanitize", *(["tiny"] if kernels == one else [])
            )
            for (B, T), state in (((0, 5), True), ((3, 0), True), ((3, 0), False), ((0, 0), False))
            for kernels in (one, ((3, 3), (3, 3), (3, 3)))
        ),
        # Layouts.
        make(B=2, T=5, layout="transposed", kernels=one).with_marks(*everywhere),
        *(make(B=2, T=5, layout=name, kernels=one).with_marks("small") for name in LAYOUTS[1:]),
        *(make(B=2, T=5, layout=name).with_marks("small") for name in LAYOUTS[1:]),
        # Several blocks: a frame's states are 512 KB here, and a row has 35 of them.
        make(B=1, T=35, picture=(64, 32), U=2, P=32, kernels=((1, 1), (3, 3), (1, 1))),
        *(
            make(B=B, T=T, picture=(16, 16), U=24, P=33, kernels=kernels).with_marks("slow")
            for B, T in ((1, 300), (3, 65))
            for kernels in (one, ((3, 3), (1, 1), None), ((3, 3), (3, 3), (3, 3)))
        ),
    ]
    cases += covering(op)
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(
        op, **({"B": 3, "T": 5, "picture": (4, 6), "U": 8, "P": 10, "kernels": ((3, 3), (1, 2), (1, 1))} | options)
    )
