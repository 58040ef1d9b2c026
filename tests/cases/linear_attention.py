"""Cases of linear_attention."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.linear_attention import reference

from . import common
from .common import LAYOUTS, NARROW, WIDE, Function, arrange, name_of, pairwise

OPERATORS = ("linear_attention",)
STATES = {"linear_attention": ("initial_state",)}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
DECAYS = ("none", "head", "step", "channel")


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """linear_attention of q, k [B, T, H, K] and v [B, T, H, V] and decays of heads, steps or channels."""

    H: int = 2
    K: int = 5
    V: int = 7
    decay: str = "step"  # or another of DECAYS
    decay_dtype: torch.dtype | None = None  # None: as q
    states: str = "state"  # the dtype of the initial state: "storage", "state", or "none"
    causal: bool = True
    window: int | None = None
    packed: bool = False  # several sequences along T, some of them empty
    gaps: bool = False  # resets, and decays above 0

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"H{self.H}", f"K{self.K}", f"V{self.V}", name_of(self.dtype), self.decay]
        words += [] if self.decay_dtype is None else [f"decay_{name_of(self.decay_dtype)}"]
        words += [] if self.states == "state" else [f"states_{self.states}"]
        words += [] if self.window is None else [f"window{self.window}"]
        words += [] if self.causal else ["everywhere"]
        words += [name for name in ("packed", "gaps") if getattr(self, name)]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return reference.linear_attention

    @property
    def real(self) -> torch.dtype:
        """Of what is carried and summed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, self.real]

    def edges(self) -> list[int]:
        """The ends of the packed sequences: the first and the last are empty, the second is one step."""
        draw = random.Random(self.seed)
        inner = sorted(draw.randint(min(1, self.T), self.T) for _ in range(3))
        return [0, 0, min(1, self.T), *inner, self.T, self.T]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        assert self.B == 1 or not self.packed
        generator, expanded = self.generator(), self.layout == "expanded"

        def draw(*shape: int, shared: Sequence[int] = ()) -> Tensor:
            """Normal values; with layout "expanded" the dimensions `shared` are read with stride 0."""
            sizes = [min(size, 1) if expanded and d in shared else size for d, size in enumerate(shape)]
            return torch.randn(sizes, dtype=torch.float64, generator=generator)

        def place(values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return arrange(values.to(dtype).to(device), self.layout).expand(*shape).requires_grad_()

        B, T, H, K, V = self.B, self.T, self.H, self.K, self.V
        inputs: dict[str, Any] = {}
        for name, width, shared in (("q", K, (0,)), ("k", K, (2,)), ("v", V, (0, 3))):
            inputs[name] = place(draw(B, T, H, width, shared=shared), (B, T, H, width), self.dtype)
        if self.decay != "none":
            shape = {"head": (H,), "step": (B, T, H), "channel": (B, T, H, K)}[self.decay]
            g = draw(*shape, shared=(0,)).abs() * -min(0.5, 8 / max(T, 1))
            if self.gaps:
                where = torch.rand(g.shape, dtype=torch.float64, generator=generator)
                g = g.masked_fill(where < 0.1, -math.inf).masked_fill(where > 0.9, 0.3)
            inputs["log_decay"] = place(g, shape, self.decay_dtype or self.dtype)
        if self.states != "none" and self.window is None:
            rows = len(self.edges()) - 1 if self.packed else B
            dtype = self.dtype if self.states == "storage" else self.real
            inputs["initial_state"] = place(draw(rows, H, K, V, shared=(0, 2)), (rows, H, K, V), dtype)
        if self.packed:
            integer = random.Random(self.seed).choice([torch.int32, torch.int64])
            inputs["cu_seqlens"] = torch.tensor(self.edges(), dtype=integer, device=device)
        options = {} if self.causal else {"causal": False}
        return inputs | options | ({} if self.window is None else {"window": self.window})

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            values = torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype).to(output.dtype)
            cotangents.append(arrange(values.to(output.device), self.layout).expand(output.shape))
        return cotangents

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        """For each result the largest error allowed: of its arithmetic, and of its own rounding if it has fewer bits.

        Gradients of decays are differences of larger sums.
        """
        dtypes = dict(zip(("0", "1"), self.output_dtypes, strict=True))
        dtypes |= {f"d{name}": value.dtype for name, value in common.differentiable(inputs).items()}
        bounds = {}
        for name, value in exact.items():
            bound = TOLERANCE[self.real] * (10 if name == "dlog_decay" else 1)
            if dtypes[name] != self.real:
                bound += 1.2 * torch.finfo(dtypes[name]).eps / 2
            bounds[name] = common.allowance(bound, value)
        return bounds


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "widths": [(1, 1, 1), (2, 5, 7), (1, 17, 3), (3, 3, 16), (1, 64, 64)],
        "B": [1, 2],
        "T": [1, 2, 5, 37, 64, 65, 129],
        "dtypes": [
            *((dtype, None) for dtype in (*WIDE, *NARROW)),
            *((dtype, torch.float32) for dtype in (torch.float64, *NARROW)),
            (torch.float32, torch.bfloat16),
        ],
        "mode": [*DECAYS, "everywhere"],
        "window": [None, None, 2, 3, 64, 100],
        "states": ["none", "storage", "state"],
        "layout": LAYOUTS,
        "packed": [False, True],
        "gaps": [False, True],
    }
    for row in pairwise(factors, seed=5):
        row["H"], row["K"], row["V"] = row.pop("widths")
        row["dtype"], row["decay_dtype"] = row.pop("dtypes")
        mode = row.pop("mode")
        row |= {"decay": "none", "causal": False, "window": None} if mode == "everywhere" else {"decay": mode}
        if row["decay"] == "none":
            row["decay_dtype"], row["gaps"] = None, False
        if row["packed"]:
            row["B"] = 1
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    cases = [
        # Every mode, for the interpreter and the sanitizers too.
        *(make("small", "sanitize", "tiny", B=2, T=20, decay=decay, gaps=decay != "none") for decay in DECAYS),
        make("small", "sanitize", "tiny", B=2, T=19, decay="none", causal=False),
        *(make("small", "sanitize", "tiny", B=2, T=21, decay=decay, window=5) for decay in DECAYS),
        *(make("small", "sanitize", "tiny", B=1, T=23, decay=decay, packed=True) for decay in ("head", "channel")),
        make("small", "sanitize", "tiny", B=1, T=23, decay="step", packed=True, window=4),
        make("small", "sanitize", "tiny", B=1, T=23, decay="none", packed=True, causal=False),
        # Nothing to do.
        *(
            make("small", "sanitize", "tiny", B=B, T=T, decay=decay, states=states)
            for (B, T), decay, states in (
                ((0, 5), "step", "state"),
                ((3, 0), "channel", "state"),
                ((0, 0), "none", "none"),
                ((3, 0), "head", "none"),
            )
        ),
        make("small", "sanitize", "tiny", B=1, T=0, packed=True),
        make("small", "sanitize", "tiny", B=1, T=1, packed=True, dtype=torch.float16),
        # Layouts and dtypes.
        *(make("small", "sanitize", "tiny", B=2, T=11, layout=name) for name in LAYOUTS[1:]),
        *(make("small", "sanitize", B=2, T=66, dtype=dtype, gaps=True) for dtype in (*WIDE, *NARROW)),
        *(
            make("small", "sanitize", B=1, T=18, dtype=dtype, decay="channel", states="storage", decay_dtype=decay)
            for dtype in NARROW
            for decay in (None, torch.float32)
        ),
        # Around the edges of chunks.
        *(make("small", "sanitize", B=1, T=T, decay=d) for T in (1, 2, 63, 64, 65, 129) for d in ("step", "channel")),
        *(
            make("small", "sanitize", B=1, T=200, H=1, K=3, V=4, decay=decay, window=window)
            for decay, windows in (("step", (2, 63, 64, 65, 128, 129, 197)), ("channel", (64, 130)), ("none", (65,)))
            for window in windows
        ),
        # Wide heads, which no tile divides.
        *(make(B=1, T=130, H=2, K=K, V=V, decay=d) for K, V in ((64, 64), (128, 33), (273, 17)) for d in DECAYS[1:]),
        make(B=1, T=600, H=1, K=16, V=16, decay="head", dtype=torch.bfloat16),
        make(B=1, T=600, H=1, K=3, V=4, decay="channel", window=300),
        make("slow", B=1, T=8000, H=2, K=16, V=16),
        make("slow", B=1, T=16323, H=1, K=8, V=8, decay="channel"),
    ]
    cases += covering(op)
    sizes = itertools.product((1, 3), (1, 31, 64, 65, 300), [(1, 1), (17, 9), (64, 128)], DECAYS)
    cases += [make("slow", B=B, T=T, K=K, V=V, decay=decay, gaps=decay != "none") for B, T, (K, V), decay in sizes]
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "K": 4, "V": 6} | options))
