"""Cases of causal_conv1d."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.conv import reference

from . import common
from .common import LAYOUTS, NARROW, Function, arrange, name_of, pairwise

OPERATORS = ("causal_conv1d",)
STORAGE = (torch.float32, torch.float64, *NARROW)
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def real_of(dtype: torch.dtype) -> torch.dtype:
    """What sums of this dtype are kept in."""
    return torch.float32 if dtype in NARROW else dtype


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """x [B, T, D], weight [D, W]."""

    D: int = 17
    W: int = 4
    dilation: int = 1
    bias: bool = True
    state: bool = True
    silu: bool = False
    wide: bool = False  # weight and bias in the dtype of the arithmetic
    packed: bool = False  # several sequences along T, some of them empty

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"D{self.D}", f"W{self.W}", name_of(self.dtype)]
        words += [] if self.dilation == 1 else [f"dilation{self.dilation}"]
        words += [name for name in ("silu", "wide", "packed") if getattr(self, name)]
        words += [f"no_{name}" for name in ("bias", "state") if not getattr(self, name)]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return getattr(reference, self.op)

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, self.dtype]

    @property
    def steps_of_state(self) -> int:
        return (self.W - 1) * self.dilation

    def edges(self) -> list[int]:
        """The ends of the packed sequences: the first and the last are empty, the second is one step."""
        draw = random.Random(self.seed)
        inner = sorted(draw.randint(min(1, self.T), self.T) for _ in range(3))
        return [0, 0, min(1, self.T), *inner, self.T, self.T]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        assert self.B == 1 or not self.packed
        generator, expanded = self.generator(), self.layout == "expanded"

        def place(shape: Sequence[int], dtype: torch.dtype, shared: Sequence[int], scale: float = 1.0) -> Tensor:
            """Normal values; with layout "expanded" the dimensions `shared` are read with stride 0."""
            sizes = [min(size, 1) if expanded and d in shared else size for d, size in enumerate(shape)]
            values = torch.randn(sizes, dtype=torch.float64, generator=generator) * scale
            return arrange(values.to(dtype).to(device), self.layout).expand(*shape).requires_grad_()

        parameters = real_of(self.dtype) if self.wide else self.dtype
        rows = len(self.edges()) - 1 if self.packed else self.B
        inputs: dict[str, Any] = {
            "x": place((self.B, self.T, self.D), self.dtype, (0, 2)),
            "weight": place((self.D, self.W), parameters, (0,), self.W**-0.5),
        }
        if self.bias:
            inputs["bias"] = place((self.D,), parameters, (0,))
        if self.state:
            inputs["initial_state"] = place((rows, self.steps_of_state, self.D), self.dtype, (0, 2))
        if self.packed:
            integer = random.Random(self.seed).choice([torch.int32, torch.int64])
            inputs["cu_seqlens"] = torch.tensor(self.edges(), dtype=integer, device=device)
        return inputs | {"dilation": self.dilation, "activation": "silu" if self.silu else None}

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
            stored = parameters if name in ("dweight", "dbias") else self.dtype
            bound = TOLERANCE[real_of(self.dtype)]
            if stored in NARROW:
                bound = 1.2 * torch.finfo(stored).eps / 2
            bounds[name] = 0.0 if name == "1" else common.allowance(bound, value)
        return bounds


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "D": [1, 3, 17, 64, 100],
        "W": [1, 2, 3, 4, 5, 16, 64],
        "dilation": [1, 2, 7, 40],
        "B": [1, 3],
        "T": [0, 1, 5, 37, 64, 129],
        "dtype": STORAGE,
        "wide": [False, True],
        "layout": LAYOUTS,
        "silu": [False, True],
        "bias": [False, True],
        "state": [False, True],
        "packed": [False, True],
    }
    for row in pairwise(factors, seed=1):
        if row["packed"]:
            row["B"] = 1
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options).with_marks(*marks)

    everything = {"silu": True, "dilation": 3}
    cases = [
        # For the simulator, the interpreter and the sanitizers. First the widths, and the lengths around a run.
        *(make("small", "sanitize", B=2, T=21, D=5, W=W, silu=W % 2 == 1) for W in (1, 2, 3, 4, 5, 8, 15, 16)),
        *(make("small", B=1, T=40, D=5, W=W, silu=W == 17) for W in (17, 33)),
        *(make("small", "sanitize", B=2, T=T, D=9) for T in (1, 2, 3, 15, 16, 17, 31, 33, 65)),
        *(make("small", B=1, T=T, D=3, W=3, dilation=5) for T in (9, 10, 11, 79, 81)),  # S - 1, S, S + 1
        make("small", "sanitize", "tiny", B=2, T=7, D=5, W=3, **everything),
        make("small", "sanitize", "tiny", B=1, T=6, D=3, W=2, dilation=9, silu=True),
        make("small", "tiny", B=1, T=5, D=2, W=18, state=False),
        make("small", "sanitize", "tiny", B=1, T=20, D=5, packed=True, silu=True),
        make("small", "sanitize", B=1, T=70, D=5, W=3, packed=True, **everything),
        make("small", B=1, T=50, D=3, W=20, packed=True),
        # Few channels and many, one row and many, a step by itself.
        *(make("small", B=1, T=19, D=D) for D in (1, 64, 129, 300)),
        *(make("small", B=9, T=3, D=D, silu=True) for D in (1, 130)),
        make("small", "sanitize", "tiny", B=3, T=1, D=8, silu=True),
        make("small", B=2, T=1, D=16, W=20, **everything),
        # Every dtype. The interpreter truncates where bfloat16 is stored, GPUs round.
        *(
            make("small", "sanitize", B=2, T=19, D=6, dtype=dtype, wide=wide, **everything)
            for dtype, wide in itertools.product(STORAGE, (False, True))
            if dtype in NARROW or not wide
        ),
        *(
            make("small", *(["tiny"] if dtype != torch.bfloat16 else []), B=1, T=9, D=8, W=2, dtype=dtype, bias=False)
            for dtype in STORAGE[1:]
        ),
        make("small", B=1, T=30, D=16, W=19, dtype=torch.bfloat16, wide=True, silu=True),
        # Nothing to do, in time, in the batch, and in both.
        *(
            make("small", "sanitize", "tiny", B=B, T=T, D=5, state=state, silu=not state)
            for (B, T), state in (((0, 5), True), ((3, 0), True), ((0, 0), False), ((3, 0), False))
        ),
        make("small", "sanitize", "tiny", B=1, T=0, D=5, packed=True),
        make("small", "sanitize", "tiny", B=1, T=1, D=5, packed=True, dtype=torch.float16),
        # Layouts.
        *(make("small", "sanitize", "tiny", B=2, T=11, D=8, layout=name, silu=True) for name in LAYOUTS[1:]),
        make("small", B=2, T=11, D=8, layout="offset", dtype=torch.float16),
        # Long, wide, and with taps far apart.
        make(B=2, T=4097, D=17, W=4),
        make(B=2, T=700, D=512, W=4, silu=True),
        make(B=1, T=600, D=300, W=64),
        make(B=1, T=500, D=100, W=256, silu=True),
        make(B=1, T=3000, D=100, W=3, dilation=700, silu=True),
        make(B=1, T=3000, D=300, W=4, dilation=600),
        make(B=2, T=300, D=17, W=3, dilation=299, silu=True),
        make(B=2, T=300, D=17, W=3, dilation=1000),
        make(B=1, T=1000, D=512, dtype=torch.bfloat16, **everything),
        make(B=1, T=5000, D=40, packed=True, dtype=torch.float16, silu=True),
        *covering(op),
        *(
            make("slow", B=B, T=T, D=D, W=W, dilation=dilation, silu=silu)
            for B, T, D, W, dilation, silu in (
                (1, 131073, 33, 4, 16, True),
                (4, 4096, 512, 4, 1, False),
                (1, 4097, 512, 256, 1, True),
                (1, 20000, 512, 4, 4096, True),
            )
        ),
    ]
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(op, **({"B": 3, "T": 5, "D": 4, "W": 3, "silu": True} | options))
