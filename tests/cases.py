"""One table of cases per operator. Every rung of tests reads it and adds nothing.

A case says shapes, dtype, options, memory layout and marks; it makes its own inputs, random gradients of its
outputs, and the bound its errors must keep. Errors are relative root mean squares against the reference in float64.
"""

import itertools
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from seqops.rnn import reference

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
STATES = {"lstm": ("h0", "c0"), "gru": ("h0",), "slstm": ("h0", "c0", "n0", "m0"), "elman": ("h0",)}
OPERATORS = tuple(GATES)
WIDE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One call of `op` with wx [B, T, G, H, D], r [G, H, D, D], b [G, H, D] and states [B, H, D]."""

    op: str
    B: int = 3
    T: int = 37
    H: int = 1
    D: int = 64
    dtype: torch.dtype = torch.float32
    bias: bool = True
    states: bool = True
    lengths: bool = False
    reverse: bool = False
    grad_clip: float | None = None
    nonlinearity: str = "tanh"
    layout: str = "contiguous"  # or "offset", "strided", "transposed", "expanded"
    float_states: bool = False  # 16-bit only: b and the states come in float32
    marks: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [f"B{self.B}", f"T{self.T}", f"H{self.H}", f"D{self.D}", str(self.dtype).removeprefix("torch.")]
        words += [] if self.bias else ["no_bias"]
        words += [] if self.states else ["no_states"]
        words += [name for name in ("lengths", "reverse", "float_states") if getattr(self, name)]
        words += [] if self.grad_clip is None else [f"clip{self.grad_clip:g}"]
        words += [] if self.nonlinearity == "tanh" else [self.nonlinearity]
        words += [] if self.layout == "contiguous" else [self.layout]
        return "-".join([self.op, *words])

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype of the states that are returned."""
        return self.dtype if self.dtype in WIDE else torch.float32

    def row_lengths(self) -> Tensor:
        """[B]: full, empty and one step first, then random ones; int32 or int64."""
        draw = random.Random(self.seed)
        rows = [self.T, 0, min(1, self.T)][: self.B] if self.B > 1 else [draw.randint(min(1, self.T), self.T)] * self.B
        rows += [draw.randint(0, self.T) for _ in range(self.B - len(rows))]
        return torch.tensor(rows, dtype=draw.choice([torch.int32, torch.int64]))

    def inputs(self) -> dict[str, Any]:
        """Every argument by name. Floating tensors are leaves that require grad; the padding of wx is NaN."""
        generator = torch.Generator().manual_seed(self.seed)
        B, T, G, H, D = self.B, self.T, GATES[self.op], self.H, self.D
        other = torch.float32 if self.float_states else self.dtype

        def draw(shape: Sequence[int], dtype: torch.dtype, shared: int) -> Tensor:
            """Normal values; with layout "expanded" dimension `shared` is read with stride 0."""
            shape = list(shape)
            if self.layout == "expanded":
                shape[shared] = min(shape[shared], 1)
            return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

        def place(values: Tensor, shape: Sequence[int]) -> Tensor:
            return arrange(values, self.layout).expand(*shape).requires_grad_()

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
        return inputs | self.options() | ({} if lengths is None else {"lengths": lengths})

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"reverse": self.reverse, "grad_clip": self.grad_clip}
        return options | ({"nonlinearity": self.nonlinearity} if self.op == "elman" else {})

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random gradients of the outputs, exact in the storage dtype; NaN where h is padding."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        cotangents = []
        for output in outputs:
            shape = [min(size, 1) for size in output.shape] if self.layout == "expanded" else output.shape
            values = torch.randn(shape, dtype=torch.float64, generator=generator).to(self.dtype).to(output.dtype)
            cotangents.append(arrange(values, self.layout).expand(output.shape))
        if self.lengths:
            padding = torch.arange(self.T) >= self.row_lengths()[:, None]
            cotangents[0] = cotangents[0].masked_fill(padding[:, :, None, None], torch.nan)
        return cotangents

    def tolerance(self) -> float:
        """The bound for float32 and float64; narrower dtypes are held against a peer in the same dtype."""
        return {torch.float32: 1e-5, torch.float64: 1e-12}[self.dtype] * max(self.T, 1) ** 0.5

    def with_marks(self, *marks: str) -> "Case":
        return replace(self, marks=marks)


def arrange(values: Tensor, layout: str) -> Tensor:
    """The same values as a view into a larger tensor that is NaN everywhere else."""
    if layout == "offset":  # contiguous, but not aligned to a vector
        buffer = values.new_full((values.numel() + 8,), torch.nan)
        view = buffer[3 : 3 + values.numel()].view(values.shape)
    elif layout in ("strided", "transposed"):
        sizes = [size + 2 for size in values.shape]
        if layout == "transposed":  # the last dimension has the largest stride
            view = values.new_full(sizes[::-1], torch.nan).permute(*reversed(range(values.dim())))
        else:
            view = values.new_full(sizes, torch.nan)
        for dimension in range(values.dim()):
            view = view.narrow(dimension, 1, values.shape[dimension])
    else:
        return values
    return view.copy_(values)


def differentiable(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values as new float64 leaves."""
    exact = {name: value.detach().double().requires_grad_() for name, value in differentiable(inputs).items()}
    return inputs | exact


def evaluate(
    function: Callable[..., tuple[Tensor, ...]], inputs: dict[str, Any], cotangents: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Outputs by position ("0", "1", ...) and gradients by argument ("dwx", ...) of one call."""
    outputs = function(**inputs)
    leaves = differentiable(inputs)
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    # r has no part in a call without steps: its gradient is then zero.
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], [*leaves.values()], [c for _, c in pairs], materialize_grads=True
    )
    results = {str(position): output.detach() for position, output in enumerate(outputs)}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def exact_results(case: Case, inputs: dict[str, Any], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    return evaluate(getattr(reference, case.op), in_float64(inputs), cotangents)


def error(got: Tensor, exact: Tensor) -> float:
    """Relative root mean square error; infinite where `got` is not exactly as infinite or as NaN as `exact`."""
    assert got.shape == exact.shape, f"{[*got.shape]} is not {[*exact.shape]}"
    got, finite = got.double(), exact.isfinite()
    if not torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)):
        return torch.inf
    difference, size = (got - exact)[finite].norm().item(), exact[finite].norm().item()
    return difference / size if difference else 0.0


def assert_within(got: dict[str, Tensor], exact: dict[str, Tensor], bound: float | dict[str, float]) -> None:
    """Every result within its relative error; `bound` holds for all of them, or is given by name."""
    bounds = bound if isinstance(bound, dict) else dict.fromkeys(exact, bound)
    errors = {name: error(got[name], exact[name]) for name in exact}
    wrong = [f"{name}: {errors[name]:.2e} > {bounds[name]:.2e}" for name in exact if not errors[name] <= bounds[name]]
    assert not wrong, f"relative errors above their bounds: {wrong}"


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {name: got[name].dtype for name in expected} == {name: value.dtype for name, value in expected.items()}
    differing = [name for name in expected if not same_bits(got[name], expected[name])]
    assert not differing, f"{differing} differ, by {[error(got[n], expected[n].double()) for n in differing]}"


def same_bits(got: Tensor, expected: Tensor) -> bool:
    return torch.allclose(got, expected, rtol=0, atol=0, equal_nan=True)


def pairwise(factors: dict[str, Sequence[Any]], seed: int) -> Iterator[dict[str, Any]]:
    """Rows in which every pair of values of two factors occurs: the best of 30 random candidates, again and again."""
    names, draw = [*factors], random.Random(seed)
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i, j in itertools.product(range(len(factors[a])), range(len(factors[b])))
    }
    while wanted:
        (a, i), (b, j) = min(wanted)
        rows = [
            {name: draw.randrange(len(values)) for name, values in factors.items()} | {a: i, b: j} for _ in range(30)
        ]
        covered = [{*itertools.combinations(row.items(), 2)} & wanted for row in rows]
        best = max(range(30), key=lambda candidate: len(covered[candidate]))
        wanted -= covered[best]
        yield {name: factors[name][index] for name, index in rows[best].items()}


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options. Batches and widths lie around the edges of 8- and 16-lane kernels."""
    factors = {
        "D": [1, 3, 17, 64, 100, 257],
        "B": [1, 2, 3, 7, 17],
        "T": [1, 2, 5, 37],
        "H": [1, 3],
        "dtype": [*WIDE, *NARROW],
        "layout": ["contiguous", "offset", "strided", "transposed", "expanded"],
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
        case = Case(op, B, T, H, D, lengths=options, reverse=options, grad_clip=0.05 if options else None)
        cases += [] if str(case) in known else [case.with_marks("slow")]
    return [*{str(case): case for case in cases}.values()]


CASES = {op: table(op) for op in OPERATORS}


def params(mark: str | None = None, where: Callable[[Case], bool] = lambda case: True) -> list[Any]:
    """The cases, of all operators, as pytest parameters with their marks."""
    return [
        pytest.param(case, id=str(case), marks=[getattr(pytest.mark, name) for name in case.marks])
        for cases in CASES.values()
        for case in cases
        if (mark is None or mark in case.marks) and where(case)
    ]
