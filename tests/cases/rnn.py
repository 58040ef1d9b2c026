"""Cases of lstm, gru, slstm and elman."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqops.rnn import reference

from . import common
from .common import LAYOUTS, NARROW, WIDE, Function, arrange, name_of, pairwise

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
STATES = {"lstm": ("h0", "c0"), "gru": ("h0",), "slstm": ("h0", "c0", "n0", "m0"), "elman": ("h0",)}
OPERATORS = tuple(GATES)


@dataclass(frozen=True, kw_only=True)
class Case(common.Case):
    """One call of `op` with wx [B, T, G, H, D], r [G, H, D, D], b [G, H, D] and states [B, H, D]."""

    H: int = 1
    D: int = 64
    bias: bool = True
    states: bool = True
    lengths: bool = False
    grad_clip: float | None = None
    nonlinearity: str = "tanh"
    float_states: bool = False  # 16-bit only: b and the states come in float32

    def words(self) -> list[str]:
        words = [f"B{self.B}", f"T{self.T}", f"H{self.H}", f"D{self.D}", name_of(self.dtype)]
        words += [] if self.bias else ["no_bias"]
        words += [] if self.states else ["no_states"]
        words += [name for name in ("lengths", "reverse", "float_states") if getattr(self, name)]
        words += [] if self.grad_clip is None else [f"clip{self.grad_clip:g}"]
        words += [] if self.nonlinearity == "tanh" else [self.nonlinearity]
        return words + ([] if self.layout == "contiguous" else [self.layout])

    @property
    def reference(self) -> Function:
        return getattr(reference, self.op)

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the states that are returned."""
        return self.dtype if self.dtype in WIDE else torch.float32

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype] + [self.state_dtype] * len(STATES[self.op])

    def row_lengths(self) -> Tensor:
        """[B]: full, empty and one step first, then random ones; int32 or int64."""
        draw = random.Random(self.seed)
        rows = [self.T, 0, min(1, self.T)][: self.B] if self.B > 1 else [draw.randint(min(1, self.T), self.T)] * self.B
        rows += [draw.randint(0, self.T) for _ in range(self.B - len(rows))]
        return torch.tensor(rows, dtype=draw.choice([torch.int32, torch.int64]))

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """The padding of wx is NaN."""
        generator = self.generator()
        B, T, G, H, D = self.B, self.T, GATES[self.op], self.H, self.D
        other = torch.float32 if self.float_states else self.dtype

        def draw(shape: Sequence[int], dtype: torch.dtype, shared: int) -> Tensor:
            """Normal values; with layout "expanded" dimension `shared` is read with stride 0."""
            shape = list(shape)
            if self.layout == "expanded":
                shape[shared] = min(shape[shared], 1)
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

        def place(values: Tensor, shape: Sequence[int]) -> Tensor:
            return arrange(values.to(device), self.layout).expand(*shape).requires_grad_()

        lengths = self.row_lengths() if self.lengths else None
        wx_shape, state_shape = (B, T, G, H, D), (B, H, D)
        # Rows of unequal length cannot share their memory, heads can.
        wx = draw(wx_shape, self.dtype, shared=3 if self.lengths else 0)
        if lengths is not None:
            wx[torch.arange(T) >= lengths[:, None]] = torch.nan
        inputs: dict[str, Any] = {"wx": place(wx, wx_shape)}
        # Variance 1 / D keeps the recurrence contracting: errors do not grow with T by themselves.
        inputs["r"] = place(draw((G, H, D, D), self.dtype, shared=1) / D**0.5, (G, H, D, D))
        if self.bias:
            inputs["b"] = place(draw((G, H, D), other, shared=2) / 2, (G, H, D))
        for name in STATES[self.op] if self.states else ():
            state = draw(state_shape, other, shared=0)
            # A normaliser is a sum of positive terms.
            inputs[name] = place(state.abs() + 0.5 if name == "n0" else state, state_shape)
        return inputs | self.options() | ({} if lengths is None else {"lengths": lengths.to(device)})

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"reverse": self.reverse, "grad_clip": self.grad_clip}
        return options | ({"nonlinearity": self.nonlinearity} if self.op == "elman" else {})

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """NaN where h is padding."""
        generator = self.generator(1)
        cotangents = []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            values = torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype).to(output.dtype)
            cotangents.append(arrange(values.to(output.device), self.layout).expand(output.shape))
        if self.lengths:
            padding = torch.arange(self.T) >= self.row_lengths()[:, None]
            cotangents[0] = cotangents[0].masked_fill(padding[:, :, None, None].to(cotangents[0].device), torch.nan)
        return cotangents

    def tolerance(self) -> float:
        """The bound for float32 and float64; narrower dtypes are held against a peer in the same dtype."""
        return {torch.float32: 1e-5, torch.float64: 1e-12}[self.dtype] * max(self.T, 1) ** 0.5


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options. Batches and widths lie around the edges of 8- and 16-lane kernels."""
    factors = {
        "D": [1, 3, 17, 64, 100, 257],
        "B": [1, 2, 3, 7, 17],
        "T": [1, 2, 5, 37],
        "H": [1, 3],
        "dtype": [*WIDE, *NARROW],
        "layout": LAYOUTS,
        "lengths": [False, True],
        "reverse": [False, True],
        "grad_clip": [None, 0.05],
        "bias": [True, False],
        "states": [True, False],
        "float_states": [False, True],
        "nonlinearity": ["tanh", "relu"] if op == "elman" else ["tanh"],
    }
    for row in pairwise(factors, seed=GATES[op]):
        row["float_states"] = row["float_states"] and row["dtype"] in NARROW
        yield Case(op, **row)


def table(op: str) -> list[Case]:
    everything = {"H": 3, "D": 3, "lengths": True, "reverse": True, "grad_clip": 0.05}
    cases = [
        # For the simulator, the interpreter and the sanitizers: small, all options, the edges of T.
        *(Case(op, B=3, T=T, H=2, D=D).with_marks("small", "sanitize") for T in (1, 2, 4, 5) for D in (3, 16)),
        Case(op, B=2, T=5, H=2, D=16).with_marks("tiny", "small"),
        *(Case(op, B=7, T=5, **everything, dtype=d).with_marks("small", "sanitize") for d in (*WIDE, *NARROW)),
        Case(op, B=1, T=37, H=1, D=100, dtype=torch.float64).with_marks("sanitize"),
        Case(op, B=2, T=3, H=3, D=33, layout="transposed", states=False).with_marks("small", "sanitize"),
        # Two tiles of rows in a block, several blocks, and units that no access pairs.
        Case(op, B=19, T=3, H=2, D=40, dtype=torch.bfloat16, lengths=True).with_marks("small"),
        Case(op, B=9, T=3, D=33, dtype=torch.float16, float_states=True, layout="strided").with_marks("small"),
        # Nothing to do, in time, in the batch, and in both.
        *(Case(op, B=B, T=T, **everything).with_marks("small", "sanitize") for B, T in ((0, 5), (3, 0), (0, 0))),
        *(Case(op, B=B, T=T, D=64, states=False, bias=False, dtype=torch.bfloat16) for B, T in ((0, 37), (17, 0))),
        # Long.
        Case(op, B=3, T=1000, D=64),
        Case(op, B=1, T=1000, H=3, D=3, reverse=True, grad_clip=0.05),
        Case(op, B=2, T=1000, D=100, dtype=torch.float64, lengths=True),
        Case(op, B=3, T=1000, D=64, dtype=torch.bfloat16, states=False),
        # Wide enough for the units of one head to be split over threads.
        Case(op, B=1, T=5, D=770),
        Case(op, B=17, T=5, D=257),
        *covering(op),
    ]
    if op == "elman":
        cases += [Case(op, B=3, T=T, H=2, D=16, nonlinearity="relu").with_marks("small", "sanitize") for T in (1, 5)]
    # Every shape there is.
    sizes = itertools.product((0, 1, 3, 17), (0, 1, 2, 37, 1000), (1, 3), (1, 3, 64, 100, 257), (False, True))
    known = {str(case) for case in cases}
    for B, T, H, D, options in sizes:
        clip = 0.05 if options else None
        case = Case(op, B=B, T=T, H=H, D=D, lengths=options, reverse=options, grad_clip=clip)
        cases += [] if str(case) in known else [case.with_marks("slow")]
    return [*{str(case): case for case in cases}.values()]


CASES = {op: table(op) for op in OPERATORS}


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    return Case(op, **({"B": 3, "T": 5, "H": 2, "D": 4} | options))
