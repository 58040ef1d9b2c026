"""Cases of fft_conv."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.conv import reference

from . import common
from .common import LAYOUTS, NARROW, Function, arrange, as_tuple, name_of, pairwise

OPERATORS = ("fft_conv",)
STORAGE = (torch.float32, torch.float64, *NARROW)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in."""
    return torch.float32 if dtype in NARROW else dtype


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """u [B, T, D], k [D, L] or with N [D, N, L]."""

    D: int = 17
    L: int | None = None  # None: as many as T
    N: int | None = None
    skip: bool = True
    wide: bool = False  # k and skip in the dtype of the arithmetic

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"D{self.D}", f"L{self.taps}", name_of(self.dtype)]
        words += [] if self.N is None else [f"N{self.N}"]
        words += ["wide"] if self.wide else []
        words += [] if self.skip else ["no_skip"]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def taps(self) -> int:
        return self.T if self.L is None else self.L

    @property
    def reference(self) -> Function:
        return as_tuple(getattr(reference, self.op))

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator, expanded = self.generator(), self.layout == "expanded"

        def place(shape: Sequence[int], dtype: torch.dtype, shared: Sequence[int], scale: float = 1.0) -> Tensor:
            """Normal values; with layout "expanded" the dimensions `shared` are read with stride 0."""
            sizes = [min(size, 1) if expanded and d in shared else size for d, size in enumerate(shape)]
            values = torch.randn(sizes, dtype=torch.float64, generator=generator) * scale
            return arrange(values.to(dtype).to(device), self.layout).expand(*shape).requires_grad_()

        parameters = real_of(self.dtype) if self.wide else self.dtype
        kernels = () if self.N is None else (self.N,)
        inputs: dict[str, Any] = {
            "u": place((self.B, self.T, self.D), self.dtype, (0, 2)),
            "k": place((self.D, *kernels, self.taps), parameters, (0,), max(self.taps, 1) ** -0.5),
        }
        return inputs | ({"skip": place((self.D,), parameters, (0,))} if self.skip else {})

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            values = torch.randn(shape, dtype=torch.float64, generator=generator).to(output)
            cotangents.append(arrange(values, self.layout).expand(output.shape))
        return cotangents

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        """For each result the largest error allowed: of sums in its arithmetic, and of one rounding when stored."""
        parameters = real_of(self.dtype) if self.wide else self.dtype
        bounds = {}
        for name, value in exact.items():
            stored = parameters if name in ("dk", "dskip") else self.dtype
            bound = 1.2 * torch.finfo(stored).eps / 2 if stored in NARROW else TOLERANCE[stored]
            bounds[name] = common.allowance(bound, value)
        return bounds


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "D": [1, 3, 17, 33, 100],
        "L": [None, 0, 1, 5, 40, 150],
        "N": [None, 1, 3, 20],
        "B": [0, 1, 3],
        "T": [0, 1, 2, 37, 64, 129],
        "dtype": STORAGE,
        "wide": [False, True],
        "layout": LAYOUTS,
        "skip": [False, True],
    }
    for row in pairwise(factors, seed=1):
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options).with_marks(*marks)

    cases = [
        # For the interpreter and the sanitizers: both forms, and lengths around what they change at.
        *(make("small", "sanitize", B=1, T=T, D=5, skip=T % 2 == 0) for T in (1, 2, 3, 31, 32, 33, 34, 64, 65)),
        *(make("small", "sanitize", B=2, T=50, D=3, L=L) for L in (1, 2, 32, 33, 49, 51, 200)),
        make("small", "sanitize", "tiny", B=2, T=33, D=5),
        make("small", "sanitize", "tiny", B=1, T=40, D=3, L=7),
        make("small", "sanitize", "tiny", B=1, T=9, D=3, L=20, skip=False),
        make("small", "sanitize", "tiny", B=2, T=35, D=3, N=4),
        make("small", "sanitize", "tiny", B=1, T=5, D=2, L=0),
        make("small", "tiny", B=1, T=5, D=2, L=0, skip=False, N=2),
        # Many kernels of a channel: some that begin and end inside a register, some that fill several.
        *(make("small", "sanitize", B=2, T=34, D=D, N=N) for D, N in ((1, 40), (19, 2), (3, 16), (5, 7), (17, 1))),
        *(make("small", B=3, T=7, D=D, N=N) for D, N in ((1, 40), (19, 2), (3, 16))),
        # Every dtype. The interpreter truncates where bfloat16 is stored, GPUs round.
        *(
            make("small", "sanitize", B=2, T=T, D=6, dtype=dtype, wide=wide)
            for dtype, wide, T in itertools.product(STORAGE, (False, True), (20, 41))
            if dtype in NARROW or not wide
        ),
        *(
            make("small", *(["tiny"] if dtype != torch.bfloat16 else []), B=1, T=17, D=8, dtype=dtype, wide=True)
            for dtype in STORAGE[1:]
        ),
        # Nothing to do, in time, in the batch, and in both.
        *(
            make("small", "sanitize", "tiny", B=B, T=T, D=5, L=L, N=N, skip=skip)
            for B, T, L, N, skip in (
                (0, 5, 3, None, True),
                (3, 0, 3, 2, True),
                (0, 0, 0, None, False),
                (3, 0, 0, 2, True),
            )
        ),
        # Layouts.
        *(make("small", "sanitize", "tiny", B=2, T=34, D=8, layout=name) for name in LAYOUTS[1:]),
        make("small", B=2, T=40, D=8, N=3, layout="offset", dtype=torch.float16),
        # Lengths with factors of 3 and 5, several segments, several tasks, one row.
        *(make(B=1, T=T, D=3) for T in (97, 127, 160, 180, 191, 240, 257, 320, 479)),
        make(B=2, T=700, D=17, L=40),
        make(B=3, T=700, D=17, L=100, N=2),
        make(B=2, T=600, D=3, L=20),
        make(B=7, T=60, D=70),
        make(B=1, T=400, D=20, dtype=torch.float64),
        make(B=5, T=300, D=5, L=150, dtype=torch.bfloat16, wide=True),
        *covering(op),
    ]
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(op, **({"B": 3, "T": 5, "D": 4, "L": 6} | options))
