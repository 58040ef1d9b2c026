"""Cases of grid_scan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqops.scan import reference

from . import common
from .common import LAYOUTS, NARROW, Function, arrange, name_of, pairwise
from .scan import GATES, HALF, REAL, TOLERANCE, real_of

OPERATORS = ("grid_scan",)
GATE_NAMES = ("t_rl", "t_ru", "t_dl", "t_du")
# The pairs of storage and gate that kernels see; the host widens gates of other dtypes.
NATIVE = [*((dtype, dtype) for dtype in REAL), *((dtype, torch.float32) for dtype in HALF)]
TINY = ("small", "sanitize", "tiny")
PAIRS = [(x, gate) for x in REAL for gate in GATES[x] if not gate.is_complex]


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """A grid of T x Y nodes; `reverse` flips both sides."""

    Y: int = 4
    H: int = 2
    D: int = 5
    gate_dtype: torch.dtype | None = None  # None: as x_r
    without: tuple[str, ...] = ()  # gates that are None
    states: str = "state"  # the dtype of the initial states: "storage", "state", or "none"
    flip_x: bool = False
    flip_y: bool = False
    gaps: bool = False  # exact zeros among the gates

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"X{self.T}", f"Y{self.Y}", f"H{self.H}", f"D{self.D}", name_of(self.dtype)]
        words += [] if self.gate_dtype is None else [f"gate_{name_of(self.gate_dtype)}"]
        words += [f"no_{name}" for name in self.without]
        words += [] if self.states == "state" else [f"states_{self.states}"]
        words += [name for name in ("reverse", "flip_x", "flip_y", "gaps") if getattr(self, name)]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return reference.grid_scan

    @property
    def flips(self) -> dict[str, bool]:
        return {"flip_x": self.reverse or self.flip_x, "flip_y": self.reverse or self.flip_y}

    @property
    def state_dtype(self) -> torch.dtype:
        return real_of(self.dtype)

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype, self.dtype]

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        generator, expanded = self.generator(), self.layout == "expanded"
        B, X, Y, H, D = self.B, self.T, self.Y, self.H, self.D

        def sizes(shape: Sequence[int], shared: Sequence[int]) -> list[int]:
            """With layout "expanded" the dimensions `shared` are read with stride 0."""
            return [min(size, 1) if expanded and d in shared else size for d, size in enumerate(shape)]

        def place(values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
            return arrange(values.to(dtype).to(device), self.layout).expand(*shape).requires_grad_()

        def normal(*shape: int, shared: Sequence[int] = (0,), dtype: torch.dtype | None = None) -> Tensor:
            values = torch.randn(sizes(shape, shared), dtype=torch.float64, generator=generator)
            return place(values, shape, dtype or self.dtype)

        def uniform() -> Tensor:
            return torch.rand(sizes((B, X, Y, H), (0, 2)), dtype=torch.float64, generator=generator)

        inputs: dict[str, Any] = {name: normal(B, X, Y, H, D, shared=(0, 4)) for name in ("x_r", "x_d")}
        # What a node hands on is shared out between its neighbours: nothing grows, and nothing is forgotten soon.
        for here, there in (("t_rl", "t_dl"), ("t_ru", "t_du")):
            share, strength = uniform(), (uniform() * -min(2.0, 16 / max(X + Y, 1))).exp()
            for name, part in ((here, share), (there, 1 - share)):
                gate = torch.where(uniform() < 0.25, -part, part) * strength
                gate = gate.masked_fill(uniform() < 0.2, 0.0) if self.gaps else gate
                inputs[name] = place(gate, (B, X, Y, H), self.gate_dtype or self.dtype)
        inputs |= dict.fromkeys(self.without)
        inputs = {name: inputs[name] for name in ("x_r", "x_d", *GATE_NAMES)}
        if self.states != "none":
            dtype = self.state_dtype if self.states == "state" else self.dtype
            inputs["initial_left"] = normal(B, Y, H, D, dtype=dtype)
            inputs["initial_top"] = normal(B, X, H, D, dtype=dtype)
        return inputs | self.flips

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        generator, cotangents = self.generator(1), []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            values = torch.randn(shape, dtype=torch.float64, generator=generator).to(output.dtype)
            cotangents.append(arrange(values.to(output.device), self.layout).expand(output.shape))
        return cotangents

    def bounds(
        self, inputs: dict[str, Any], cotangents: Sequence[Tensor], exact: dict[str, Tensor]
    ) -> dict[str, float]:
        """For each result the largest error allowed.

        That is the bound of the dtype it is computed in; where a 16-bit dtype has a part in it, 1.2 times the error of
        the reference in this dtype, or of one rounding if that is larger.
        """
        dtypes = {name: self.dtype for name in "01"}
        dtypes |= {f"d{name}": value.dtype for name, value in common.differentiable(inputs).items()}
        bounds, peer = {}, None
        for name, value in exact.items():
            computed = (self.state_dtype, real_of(dtypes[name]))
            bounds[name] = common.allowance(max(TOLERANCE[dtype] for dtype in computed), value)
            narrow = [torch.finfo(dtype).eps / 2 for dtype in (self.dtype, dtypes[name]) if dtype in NARROW]
            if narrow:
                peer = peer or common.evaluate(self.reference, inputs, cotangents)
                floor = common.allowance(max(narrow), value)
                bounds[name] = 1.2 * max(common.error(peer[name], value), floor)
        return bounds


def covering() -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "B": [1, 2, 3],
        "T": [1, 2, 5, 9],
        "Y": [1, 3, 8],
        "size": [(1, 1), (2, 3), (1, 17), (3, 8), (1, 70)],
        "pair": PAIRS,
        "layout": LAYOUTS,
        "flips": [(False, False), (True, False), (False, True), (True, True)],
        "without": [(), ("t_ru",), ("t_dl",), ("t_ru", "t_dl")],
        "states": ["none", "storage", "state"],
        "gaps": [False, True],
    }
    for row in pairwise(factors, seed=9):
        row["H"], row["D"] = row.pop("size")
        row["dtype"], row["gate_dtype"] = row.pop("pair")
        row["flip_x"], row["flip_y"] = row.pop("flips")
        yield Case("grid_scan", **row)


def table(op: str) -> list[Case]:
    make = partial(Case, op)
    cases = [
        # For the interpreter and the sanitizers. Rows and columns, the sizes around a strip of rows, flips.
        *(
            make(B=1, T=X, Y=Y, H=1, D=D).with_marks("small", "sanitize", *(["tiny"] if X * Y < 60 else []))
            for X, Y, D in ((1, 1, 1), (1, 9, 3), (9, 1, 3), (3, 4, 17), (4, 3, 16), (5, 5, 33), (8, 8, 5), (14, 14, 8))
        ),
        *(
            make(T=5, Y=3, flip_x=x, flip_y=y, gaps=True, without=without, B=1, H=1).with_marks(
                "small", "sanitize", "tiny"
            )
            for x, y, without in ((True, False, ()), (False, True, ("t_dl",)), (True, True, ("t_ru", "t_dl")))
        ),
        make(B=1, T=6, Y=5, H=1, D=70, reverse=True).with_marks("small", "tiny"),
        # Every pair of dtypes that a kernel sees. The interpreter truncates where bfloat16 is stored, GPUs round.
        *(
            make(B=2, T=7, Y=6, H=2, D=19, dtype=dtype, gate_dtype=gate, reverse=True, gaps=True).with_marks(
                "small", "sanitize"
            )
            for dtype, gate in NATIVE
        ),
        *(
            make(B=1, T=3, Y=4, H=1, dtype=dtype, gate_dtype=gate, states="storage").with_marks(
                "small", *(["tiny"] if torch.bfloat16 not in (dtype, gate) else [])
            )
            for dtype, gate in NATIVE
        ),
        # Nothing to do, in the batch, and along either side.
        *(
            make(B=B, T=X, Y=Y, states=states, reverse=reverse).with_marks(*TINY)
            for (B, X, Y), states, reverse in (
                ((0, 5, 4), "state", True),
                ((3, 0, 4), "state", False),
                ((3, 4, 0), "state", True),
                ((2, 0, 0), "none", False),
            )
        ),
        # Layouts.
        *(make(B=2, T=4, Y=3, layout=name).with_marks("small", "sanitize") for name in LAYOUTS[1:]),
        *(make(B=1, T=2, Y=3, D=3, layout=name).with_marks("small", "tiny") for name in LAYOUTS[2:]),
        # Long, wide and large.
        *(make(B=1, T=X, Y=Y, H=1, D=7) for X, Y in ((1, 300), (300, 1))),
        make(B=2, T=6, Y=5, H=1, D=512),
        make(B=1, T=14, Y=14, H=6, D=32, dtype=torch.bfloat16, flip_x=True),
        make(B=2, T=14, Y=14, H=2, D=16, dtype=torch.float16, gate_dtype=torch.float32, without=("t_ru",)),
        make(B=1, T=64, Y=65, H=1, D=48).with_marks("slow"),
        make(B=1, T=40, Y=130, H=2, D=24, dtype=torch.bfloat16, reverse=True).with_marks("slow"),
        *covering(),
    ]
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(op, **({"B": 3, "T": 5, "Y": 4, "H": 2, "D": 6} | options))
