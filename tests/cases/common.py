"""What the cases of every room share: the base class, memory layouts, errors, comparisons, pytest parameters."""

import itertools
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import seqops

WIDE = (torch.float32, torch.float64)
NARROW = (torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "offset", "strided", "transposed", "expanded")

Function = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of `op` on B rows of T steps. A room's class adds its shapes and options, and makes the tensors.

    The methods that raise NotImplementedError are that class's to write.
    """

    op: str = field(kw_only=False)
    B: int = 3
    T: int = 37
    dtype: torch.dtype = torch.float32
    reverse: bool = False
    layout: str = "contiguous"  # or another of LAYOUTS
    marks: tuple[str, ...] = ()

    def words(self) -> list[str]:
        """What distinguishes the case, for its name."""
        raise NotImplementedError

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """Every argument by name. Tensors to differentiate by are leaves that require grad."""
        raise NotImplementedError

    def cotangents(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Random gradients of the outputs, exact in the storage dtype, on the device of the outputs."""
        raise NotImplementedError

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        raise NotImplementedError

    @property
    def reference(self) -> Function:
        raise NotImplementedError

    @property
    def operator(self) -> Function:
        return self.adapted(getattr(seqops, self.op))

    def listed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs as the operator names them: here a list's tensors, or not a list, stand by themselves."""
        return inputs

    def adapted(self, function: Callable[..., Any]) -> Function:
        """A function of the operator's arguments as one of `inputs`, with a flat tuple of results."""
        return as_tuple(function)

    def __str__(self) -> str:
        return "-".join([self.op, *self.words()])

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    def generator(self, stream: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + stream)

    def with_marks(self, *marks: str) -> "Case":
        return replace(self, marks=marks)


@dataclass(frozen=True, kw_only=True)
class DrawnCase(Case):
    """Inputs of normal values, and bounds of errors that follow from dtypes.

    A class whose arithmetic needs another bound changes `tolerance`.
    """

    tolerance: ClassVar[dict[torch.dtype, float]] = {torch.float32: 1e-5, torch.float64: 1e-11}

    @property
    def real(self) -> torch.dtype:
        """Of what is summed."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

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
        dtypes |= {f"d{name}": value.dtype for name, value in differentiable(inputs).items()}
        bounds = {}
        for name, value in exact.items():
            bound = self.tolerance[self.real]
            if dtypes[name] != self.real:
                bound += 1.2 * torch.finfo(dtypes[name]).eps / 2
                # Half the distance of neighbours where numbers are so small that they have fewer digits.
                size = value[value.isfinite()].norm().item() / max(1, int(value.isfinite().sum())) ** 0.5
                bound += (
                    torch.finfo(dtypes[name]).smallest_normal * torch.finfo(dtypes[name]).eps / 2 / max(size, 1e-30)
                )
            bounds[name] = allowance(bound, value)
        return bounds


def as_tuple(function: Callable[..., Any]) -> Function:
    """The function, of which a single result is a tuple of one."""

    def call(*arguments: Any, **options: Any) -> tuple[Tensor, ...]:
        outputs = function(*arguments, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    return call


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    tensors = {name: value for name, value in inputs.items() if torch.is_tensor(value)}
    return {name: value for name, value in tensors.items() if value.is_floating_point() or value.is_complex()}


def in_float64(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same values as new leaves in float64 or complex128, on the CPU."""

    def widened(value: Tensor) -> Tensor:
        return value.detach().to("cpu", torch.complex128 if value.is_complex() else torch.float64).requires_grad_()

    others = {name: value.cpu() if torch.is_tensor(value) else value for name, value in inputs.items()}
    return others | {name: widened(value) for name, value in differentiable(inputs).items()}


def evaluate(
    function: Function,
    inputs: dict[str, Any],
    cotangents: Sequence[Tensor] | Callable[[Sequence[Tensor]], Sequence[Tensor]],
) -> dict[str, Tensor]:
    """Outputs by position ("0", "1", ...) and gradients by argument ("dwx", ...) of one call.

    The gradients of the outputs may be made from the outputs.
    """
    outputs = function(**inputs)
    if callable(cotangents):
        cotangents = cotangents(outputs)
    leaves = differentiable(inputs)
    pairs = [(o, c.to(o.dtype)) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    # Some arguments have no part in a call without steps: their gradient is then zero.
    gradients = torch.autograd.grad(
        [o for o, _ in pairs], [*leaves.values()], [c for _, c in pairs], materialize_grads=True
    )
    results = {str(position): output.detach() for position, output in enumerate(outputs)}
    return results | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def exact_results(case: Case, inputs: dict[str, Any], cotangents: Sequence[Tensor]) -> dict[str, Tensor]:
    return evaluate(case.reference, in_float64(inputs), [cotangent.cpu() for cotangent in cotangents])


def only(position: int, function: Function) -> Callable[..., tuple[Tensor]]:
    """The function, of whose outputs only one is returned."""
    return lambda *arguments, **options: (function(*arguments, **options)[position],)


def in_double(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: value.to(torch.complex128 if value.is_complex() else torch.float64) for n, value in values.items()}


def error(got: Tensor, exact: Tensor) -> float:
    """Relative root mean square error; infinite where `got` is not exactly as infinite or as NaN as `exact`."""
    assert got.shape == exact.shape, f"{[*got.shape]} is not {[*exact.shape]}"
    assert got.is_complex() == exact.is_complex(), f"{got.dtype} is not {exact.dtype}"
    got, exact = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (got, exact))
    got, exact = (t.to("cpu", torch.float64) for t in (got, exact))
    finite = exact.isfinite()
    if not torch.equal(got[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)):
        return torch.inf
    difference, size = (got - exact)[finite].norm().item(), exact[finite].norm().item()
    return difference / size if size else 0.0 if difference == 0 else torch.inf


def allowance(bound: float, values: Tensor) -> float:
    """The bound on the error of these values: it is one for the mean of many.

    A few can all be rounded badly, at three places on their way, or be small differences of larger numbers.
    """
    return bound if values.numel() >= 64 else 3 * bound


def assert_within(got: dict[str, Tensor], exact: dict[str, Tensor], bound: float | dict[str, float]) -> None:
    """Every result within its relative error; `bound` holds for all of them, or is given by name."""
    bounds = bound if isinstance(bound, dict) else dict.fromkeys(exact, bound)
    errors = {name: error(got[name], exact[name]) for name in exact}
    wrong = [f"{name}: {errors[name]:.2e} > {bounds[name]:.2e}" for name in exact if not errors[name] <= bounds[name]]
    assert not wrong, f"relative errors above their bounds: {wrong}"


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert {name: got[name].dtype for name in expected} == {name: value.dtype for name, value in expected.items()}
    differing = [name for name in expected if not same_bits(got[name], expected[name])]
    assert not differing, f"{differing} differ, by {[error(got[n], in_double(expected)[n]) for n in differing]}"


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


def parameters(cases: Iterable[Case]) -> list[Any]:
    """The cases as pytest parameters with their marks."""
    return [
        pytest.param(case, id=str(case), marks=[getattr(pytest.mark, name) for name in case.marks]) for case in cases
    ]


def distinct(cases: Sequence[Any]) -> list[Any]:
    """Without repetitions: of equal names the first."""
    return [*{str(case): case for case in reversed(cases)}.values()][::-1]
