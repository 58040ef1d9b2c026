"""What every operator promises to the rest of torch: dispatcher, autograd, torch.func, compile, export, backends."""

import inspect
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import cases
import pytest
import torch
from cases import (
    Case,
    as_tuple,
    causal_conv1d,
    conv_ssm,
    example,
    fft_conv,
    grid_scan,
    linear_attention,
    params,
    rnn,
    scan,
    ssm_kernel,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqops
from seqops.core import backend as backends

COMPOSITES = [op for op in cases.OPERATORS if op in backends._made_of]
OWN_KERNELS = [op for op in cases.OPERATORS if op not in COMPOSITES]
ATTENTION = [op for op in cases.OPERATORS if getattr(seqops, op).__module__.startswith("seqops.attention.")]
TTT = [op for op in cases.OPERATORS if getattr(seqops, op).__module__.startswith("seqops.ttt.")]
# Of one tensor: nothing can be mapped, or differentiated by, beside it.
ALONE = ("newton_schulz",)
# What they return is an index, or comes with the promise that it has no gradient.
WITHOUT_GRADIENT = [op for op in ATTENTION if op in ("cluster_assign", "update_centroids")]
WITH_GRADIENT = [op for op in cases.OPERATORS if op not in WITHOUT_GRADIENT]
SECOND = "seqops::{}: second derivatives are not supported; seqops.backend('reference') computes them"
FORWARD = "seqops::{} has no forward-mode derivative; use reverse mode (torch.func.grad, vjp, jacrev)"


def kernels_of(op: str) -> set[str]:
    """The operator, or, of one that is made of others, those that have kernels."""
    return set().union(*map(kernels_of, backends._made_of[op])) if op in COMPOSITES else {op}


def refusers(op: str) -> set[str]:
    """Which operators may be named where a derivative is refused."""
    return {op} | kernels_of(op)


def gpu_backend(op: str) -> str:
    """The first GPU backend that there is for an operator."""
    return next(name for name in backends.GPU_BACKENDS if backends._exists(op, name))


def registered() -> set[str]:
    """Every operator in our namespace that takes tensors."""
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("seqops::")}
    return {name for name in names if "Tensor" in str(getattr(torch.ops.seqops, name[8:]).default._schema)}


def with_options(*choices: tuple[str, dict[str, Any]]) -> list[Any]:
    """Operators with the options of a case, as parameters named after both."""
    return [pytest.param(op, options, id="-".join([op, *map(str, options.items())])) for op, options in choices]


def every(operators: Sequence[str], *options: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [*itertools.product(operators, options)]


PACKED = {"B": 1, "T": 7, "packed": True}
REVERSED = {"reverse": True}
CAUSAL = (("causal", True),)
MUON = ("optimizer", "muon")


def reversed_if_possible(op: str) -> dict[str, Any]:
    """The option, for operators that have it."""
    schema = getattr(torch.ops.seqops, op).default._schema
    return REVERSED if any(argument.name == "reverse" for argument in schema.arguments) else {}


# Every way of an operator to treat its arguments apart.
VARIANTS = with_options(
    *every(rnn.OPERATORS, {"lengths": True, "reverse": True, "grad_clip": 0.3}),
    *every(scan.OPERATORS, {}, {"reverse": True}, PACKED),
    *every(("linear_scan",), {"gate": "B1"}, {"gate": ""}, {"gate": "T0", **PACKED}),
    *every(conv_ssm.OPERATORS, {"U": 2, "P": 3}),
    *every(ssm_kernel.OPERATORS, {"T": 6}),
    *every(fft_conv.OPERATORS, {}, {"N": 2}, {"T": 34, "D": 2, "L": 40}),
    *every(causal_conv1d.OPERATORS, {}, {"dilation": 4}, {"silu": False, **PACKED}),
    *every(("grid_scan",), {"Y": 2, "H": 1}),
    *every(
        linear_attention.OPERATORS,
        {},
        {"decay": "channel"},
        {"decay": "head", **PACKED},
        {"decay": "none", "window": 2},
    ),
    *every(linear_attention.OPERATORS, {"decay": "none", "causal": False, "states": "none"}),
    *every(("chunked_attention",), {}, {"bias": "distance", "options": CAUSAL}, {"chunk_size": 2, **PACKED}),
    *every(("range_attention",), {}, {"bias": "square", "Tk": None}, {"S": 4, "parts": 2, "each": "both"}),
    *every(("window_attention",), {}, {"right": 0, "globals": None}, {"right": 0, "globals": (0, 2), **PACKED}),
    *every(("block_diffusion_attention",), {"T": 6, "block_size": 2}),
    *every(("delta_attention",), {}, {"options": (("sink", 1), ("mode", "row"))}),
    *every(("merge_attention",), {}),
    *every(
        ("combiner_attention",),
        {},
        {"T": 7, "pattern": "logsparse", "pool": "mean", "causal": False},
        {"T": 5, "pattern": "axial"},
        {"T": 5, "pattern": "axial", "pool": "mean", "causal": False},
    ),
    *every(("prob_sparse_attention",), {}, {"options": CAUSAL}),
    *every(("gathered_attention",), {}, {"options": (("reduce", "sum"), *CAUSAL)}, {"options": (("reduce", "last"),)}),
    *every(("routing_attention",), {}, {"options": (("causal", False),)}),
    *every(("pointer_scores",), {}, {"mode": "clipped_dot", "weight": "none", "lengths": True}),
    *every(("newton_schulz",), {}, {"T": 2, "N": 5, "more": (2,)}),
    *every(("large_chunk_ttt",), {}, {"T": 4, "momentum": "none", "options": (("order", "update_apply"), MUON)}),
    *every(("neural_memory",), {}, {"F": None, "gates": "none", "state": False, "options": (("window", 2),)}),
    *every(("neural_memory",), {"gates": "decay", "options": (("loss", "dot"), MUON)}),
)


class Recorder(TorchDispatchMode):
    """Notes every call of ours below autograd, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "seqops":
            self.calls.append((op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))


def recorded(case: Case) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The calls that inference, and a training step, of this case consist of."""
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    with Recorder() as recorder:
        with torch.no_grad():
            case.operator(**inputs)
        cases.evaluate(case.operator, inputs, cotangents)
    return recorder.calls


def checked_cases() -> list[Any]:
    """Every dtype with all options; no time; no batch; no options at all; for scans every kind of gate."""

    def of_scan(case: scan.Case) -> bool:
        native = case.T == 9 and case.states == "storage"
        return native or case.B * case.T == 0 or (case.T == 20 and case.packed) or (case.T == 5 and len(case.gate) == 1)

    def of_attention(case: Any) -> bool:
        """Of every operator one call, and one without steps: what it is made of has its own cases."""
        first = next(each for each in cases.CASES[case.op] if "small" in each.marks)
        empty = next(each for each in cases.CASES[case.op] if each.T == 0 < each.B)
        return str(case) in (str(first), str(empty))

    def of_grid(case: grid_scan.Case) -> bool:
        return (case.states == "storage" and case.gate_dtype == torch.float32) or case.T == 0 or len(case.without) == 2

    return [
        *params("small", where=lambda case: case.lengths and case.B * case.T != 0, operators=rnn.OPERATORS),
        *params("small", where=lambda case: case.B * case.T == 0 < case.B + case.T, operators=rnn.OPERATORS),
        *params("small", where=lambda case: not case.states, operators=rnn.OPERATORS),
        *params("small", where=of_scan, operators=scan.OPERATORS),
        *params("small", where=lambda case: case.layout == "contiguous" and case.B > 0, operators=conv_ssm.OPERATORS),
        *params("small", where=lambda case: case.layout == "contiguous", operators=ssm_kernel.OPERATORS),
        *params("tiny", where=lambda case: case.B > 0, operators=fft_conv.OPERATORS),
        *params("tiny", where=lambda case: case.layout == "contiguous", operators=causal_conv1d.OPERATORS),
        *params("small", where=of_grid, operators=grid_scan.OPERATORS),
        *params("tiny", where=lambda case: case.layout == "contiguous", operators=linear_attention.OPERATORS),
        *params("small", where=of_attention, operators=ATTENTION),
        *params("tiny", where=lambda case: case.steps == "two" or case.N in (9, 24), operators=("newton_schulz",)),
        *params("small", where=lambda case: case.B == 2 and case.T == 0, operators=TTT[1:]),
        *params("tiny", operators=TTT[1:]),
    ]


# ---------------------------------------------------------------- registration


@pytest.mark.parametrize("case", checked_cases())
def test_opcheck(case: Case) -> None:
    """The public operator with gradients wanted, then every operator, public or private, that a step calls."""
    public = getattr(torch.ops.seqops, case.op).default
    arguments = [argument for argument in public._schema.arguments if not argument.kwarg_only]
    inputs = case.listed(case.inputs())
    positional = tuple(inputs.pop(argument.name, argument.default_value) for argument in arguments)
    torch.library.opcheck(public, positional, inputs)
    for op, args, kwargs in recorded(case):
        args = tuple(a.detach().clone() if torch.is_tensor(a) else a for a in args)
        torch.library.opcheck(op, args, kwargs, test_utils=("test_schema", "test_faketensor"))


@cache
def called_by(op: str) -> frozenset[str]:
    """The registered operators that run in an example; of what is made of others, in its small cases too."""
    some = [example(op)]
    if op in COMPOSITES:
        some += [case for case in cases.CASES[op] if "small" in case.marks and case.B * case.T]
    return frozenset(overload.name().split(".")[0] for case in some for overload, _, _ in recorded(case))


def test_every_operator_has_cases() -> None:
    assert {*backends.table()} == {*cases.OPERATORS}
    for op, reasons in backends.table().items():
        assert {*reasons} == {*backends.BACKENDS}, op
        assert reasons["cpu"] is None and reasons["reference"] is None
    called = {f"seqops::{op}" for op in COMPOSITES}.union(*map(called_by, cases.OPERATORS))
    assert called | {"seqops::project"} == registered()  # a module's operator, in test_projection.py


@pytest.mark.parametrize("op", COMPOSITES)
def test_parts_are_those_that_run(op: str) -> None:
    """All of them do, and what runs has the backends that the operator then claims."""
    ran = {name.removeprefix("seqops::") for name in called_by(op)}
    assert kernels_of(op) <= ran | {name.removesuffix("_backward") for name in ran}
    for name in ("cpu", *backends.GPU_BACKENDS):
        assert not backends._exists(op, name) or {each for each in ran if name not in backends._served[each]} == set()


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_schema_is_the_public_signature(op: str) -> None:
    """The Python function and the operator take the same arguments in the same order, with the same defaults."""
    schema = getattr(torch.ops.seqops, op).default._schema
    expected = [(a.name, a.kwarg_only, a.default_value) for a in schema.arguments]
    got = [
        (p.name, p.kind is p.KEYWORD_ONLY, None if p.default is p.empty else p.default)
        for p in inspect.signature(getattr(seqops, op)).parameters.values()
    ]
    assert got == expected


# ---------------------------------------------------------------- autograd

# Where an example has many numbers: finite differences take two calls for each.
FEWER = {
    "linear_attention": {"B": 2, "T": 3, "H": 2, "K": 2, "V": 3},
    "conv_ssm": {"B": 2, "T": 3, "picture": (2, 2), "U": 2, "P": 2, "kernels": ((2, 3), (1, 2), (1, 1))},
    "grid_scan": {"B": 1, "T": 2, "Y": 2, "H": 1, "D": 2},
    "newton_schulz": {"B": 2, "T": 3, "N": 2},
    "large_chunk_ttt": {"B": 1, "T": 7, "H": 1, "D": 2, "F": 3, "C": 3},
    "neural_memory": {"B": 1, "T": 7, "H": 1, "D": 2, "F": 3, "C": 3},
}


def gradient_case(op: str, **options: Any) -> tuple[Case, dict[str, Any], dict[str, Tensor], Callable[..., Any]]:
    """A float64 case, its inputs, its leaves, and the operator as a function of the leaves in that order."""
    case = example(op, **({"T": 4, "dtype": torch.float64} | FEWER.get(op, {}) | options))
    inputs = case.inputs()
    if op in rnn.OPERATORS and case.lengths:
        with torch.no_grad():  # finite differences of NaN are NaN
            inputs["wx"].nan_to_num_(0.0)
    leaves = cases.differentiable(inputs)

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        """Outputs in double precision, since finite differences of others are their rounding errors; none of -inf."""
        outputs = case.operator(**(inputs | dict(zip(leaves, values, strict=True))))
        outputs = tuple(output for output in outputs if output.dtype in (torch.float64, torch.complex128))
        return tuple(o.masked_fill(o.isinf(), 0.0) for o in outputs) if op in ATTENTION else outputs

    return case, inputs, leaves, call


@pytest.mark.parametrize(
    ("op", "options"),
    with_options(
        *every(WITH_GRADIENT, {}, {"T": 1, "reverse": True}),
        *every(rnn.OPERATORS, {"lengths": True, "reverse": True}, {"grad_clip": 1e6}, {"bias": False, "D": 1}),
        *every(scan.OPERATORS, {"states": "none", "reverse": True}, PACKED),
        *every(causal_conv1d.OPERATORS, {"silu": False, "state": False, "bias": False}, PACKED),
        *every(("linear_scan",), {"gate": "B0"}, {"gate": "T1", "gaps": True}, {"gate": "", **PACKED}),
        *every(("linear_scan",), {"dtype": torch.complex128}, {"gate_dtype": torch.complex128, "gate": "1"}),
        *every(("newton_schulz",), {"T": 2, "N": 4, "steps": "muon"}),
        *every(("large_chunk_ttt",), {"options": (("order", "update_apply"), ("weight_norm", False))}),
        *every(("large_chunk_ttt",), {"momentum": "gates", "options": (("order", "full"), MUON)}),
        *every(("neural_memory",), {"options": (("window", 2), ("loss", "dot"))}, {"options": (MUON,)}),
        *every(("neural_memory",), {"F": None, "gates": "edges"}, {"gates": "none", "state": False}),
    ),
)
def test_gradcheck(op: str, options: dict[str, Any]) -> None:
    _, _, leaves, call = gradient_case(op, **options)
    assert torch.autograd.gradcheck(call, (*leaves.values(),), check_batched_grad=True)


def test_gradcheck_relu() -> None:
    _, _, leaves, call = gradient_case("elman", nonlinearity="relu", lengths=True)
    assert torch.autograd.gradcheck(call, (*leaves.values(),), check_batched_grad=True)


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_second_derivative_is_refused(op: str) -> None:
    _, _, leaves, call = gradient_case(op)
    gradients = torch.autograd.grad(
        call(*leaves.values())[0].abs().square().sum(), [*leaves.values()], create_graph=True, allow_unused=True
    )
    for gradient in gradients:
        if gradient is not None and gradient.requires_grad:  # centroids have none
            with pytest.raises(RuntimeError) as caught:
                torch.autograd.grad(gradient.abs().square().sum(), next(iter(leaves.values())), retain_graph=True)
            assert str(caught.value) in {SECOND.format(name) for name in refusers(op)}
    assert gradients[0].requires_grad
    with pytest.raises(RuntimeError) as caught:
        torch.autograd.gradgradcheck(call, (*leaves.values(),))
    assert str(caught.value) in {SECOND.format(name) for name in refusers(op)}


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_second_derivative_in_the_reference(op: str) -> None:
    """As the refusal says."""
    _, _, leaves, call = gradient_case(op, B=2, T=2)
    with seqops.backend("reference"):
        assert torch.autograd.gradgradcheck(call, (*leaves.values(),))


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_forward_mode_is_refused(op: str) -> None:
    _, _, leaves, call = gradient_case(op)
    values = tuple(value.detach() for value in leaves.values())
    with pytest.raises(NotImplementedError) as caught:
        torch.func.jvp(call, values, values)
    assert str(caught.value) in {FORWARD.format(name) for name in refusers(op)}
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError) as caught:
        call(torch.autograd.forward_ad.make_dual(values[0], values[0]), *values[1:])
    assert str(caught.value) in {FORWARD.format(name) for name in refusers(op)}


# ---------------------------------------------------------------- torch.func


def of_leaves(case: Case, function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """The function, to which the tensors that the case differentiates by are given by position."""
    names = [*cases.differentiable(case.inputs())]
    return lambda *values, **options: function(**dict(zip(names, values, strict=True)), **options)


def others(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that have no gradient: integers, options, index tensors."""
    leaves = cases.differentiable(inputs)
    return {name: value for name, value in inputs.items() if name not in leaves}


def loss_of(function: Callable[..., tuple[Tensor, ...]], options: dict[str, Any]) -> Callable[..., Tensor]:
    """A scalar of every output, of the positional tensors."""

    def parts(output: Tensor) -> Tensor:
        if output.is_complex():
            return torch.view_as_real(output)
        return output.masked_fill(output == -torch.inf, 0.0)  # lse where nothing is seen

    return lambda *values: sum(parts(output).sin().sum() for output in as_tuple(function)(*values, **options))


def jacobians(f: Callable[..., Tensor], values: tuple[Tensor, ...]) -> Any:
    """With respect to the first two arguments, or the one of them that is real: jacrev takes no others."""
    real = [i for i, value in enumerate(values[:2]) if not value.is_complex()]
    if not real:
        pairs = [torch.view_as_real(value.resolve_conj()) for value in values[:2]]
        parts = lambda a, b: f(*map(torch.view_as_complex, (a, b)), *values[2:])  # noqa: E731
        return torch.func.jacrev(parts, (0, 1))(*pairs)

    def of_real(*some: Tensor) -> Tensor:
        given = dict(zip(real, some, strict=True))
        return f(*(given.get(i, value) for i, value in enumerate(values)))

    return torch.func.jacrev(of_real, tuple(range(len(real))))(*(values[i] for i in real))


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, v: torch.func.grad(f, tuple(range(len(v))))(*take(v, 0)),
    "grad_and_value": lambda f, v: torch.func.grad_and_value(f)(*take(v, 0)),
    "vjp": lambda f, v: torch.func.vjp(f, *take(v, 0))[1](torch.tensor(2.0, dtype=torch.float64)),
    "jacrev": lambda f, v: jacobians(f, take(v, 0)),
    "vmap": lambda f, v: torch.vmap(f)(*v),
    "vmap, first one mapped": lambda f, v: torch.vmap(f, (0, *[None] * (len(v) - 1)))(v[0], *take(v[1:], 0)),
    "vmap, first one not mapped": lambda f, v: torch.vmap(f, (None, 0, 0, *[None] * len(v))[: len(v)])(
        *take(v[:1], 0), *v[1:3], *take(v[3:], 0)
    ),
    "vmap, last dimension": lambda f, v: torch.vmap(f, -1)(*(value.movedim(0, -1) for value in v)),
    "vmap, output of a map": lambda f, v: torch.vmap(torch.vmap(f))(*(value.expand(2, *value.shape) for value in v)),
    "vmap(grad)": lambda f, v: torch.vmap(torch.func.grad(f, (0, 1, 2)[: len(v)]))(*v),
    "vmap(grad), second and third shared": lambda f, v: torch.vmap(
        torch.func.grad(f, (0, 1, 2)[: len(v)]), (0, None, None, *[0] * len(v))[: len(v)]
    )(v[0], *take(v[1:3], 0), *v[3:]),
    "vmap(grad), second and third mapped": lambda f, v: torch.vmap(
        torch.func.grad(f, (0, 1, 2)[: len(v)]), (None, 0, 0, *[None] * len(v))[: len(v)]
    )(*take(v[:1], 0), *v[1:3], *take(v[3:], 0)),
    "grad(vmap)": lambda f, v: torch.func.grad(lambda *x: torch.vmap(f)(*x).sum(), tuple(range(len(v))))(*v),
    "grad(vmap), second one mapped": lambda f, v: torch.func.grad(
        lambda first, second: torch.vmap(lambda one: f(first, one, *take(v[2:], 0)))(second).sum(), (0, 1)
    )(v[0][0], v[1]),
}


def take(values: tuple[Tensor, ...], index: int) -> tuple[Tensor, ...]:
    return tuple(value[index] for value in values)


def drawn(op: str, **options: Any) -> tuple[Case, tuple[Tensor, ...], dict[str, Any]]:
    """A float64 case, its tensors, and the rest of its arguments."""
    case = example(op, **({"T": 3, "dtype": torch.float64} | options))
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    return case, tuple(value.detach().nan_to_num(0.0) for value in leaves.values()), others(inputs)


def precision(case: Case) -> dict[str, float]:
    """How near two computations of one result are: some operators have an output in float32 in every case."""
    narrow = torch.float32 in case.output_dtypes
    return {"rtol": 1e-5, "atol": 1e-6} if narrow else {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(("op", "options"), VARIANTS)
def test_function_transforms(op: str, options: dict[str, Any], transform: str) -> None:
    """As the same transform of the reference."""
    if op in ALONE and ("second" in transform or "not mapped" in transform):
        pytest.skip("there is no second tensor")
    case, tensors, rest = drawn(op, **options)
    # Three different copies to map over.
    values = tuple(torch.stack([v, v.flip(0) * 0.7, v + 0.1]) for v in tensors)
    got = TRANSFORMS[transform](loss_of(of_leaves(case, case.operator), rest), values)
    expected = TRANSFORMS[transform](loss_of(of_leaves(case, case.reference), rest), values)
    torch.testing.assert_close(got, expected, **precision(case))


@pytest.mark.parametrize("op", [*scan.OPERATORS, *causal_conv1d.OPERATORS])
def test_vmap_over_packed_sequences_that_differ(op: str) -> None:
    _, (first, second, *_), rest = drawn(op, **PACKED)
    edges = torch.stack([rest["cu_seqlens"], torch.tensor([0, 2, 4, 5, 5, 6, 7, 7]).to(rest["cu_seqlens"])])
    got = torch.vmap(lambda one: getattr(seqops, op)(first, second, cu_seqlens=one))(edges)
    expected = [example(op).reference(first, second, cu_seqlens=one) for one in edges]
    torch.testing.assert_close(got, tuple(torch.stack(column) for column in zip(*expected, strict=True)))


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_transform_inside_ordinary_autograd(op: str) -> None:
    """The value that grad_and_value returns keeps the outer graph."""
    case, inputs, leaves, _ = gradient_case(op)
    values, rest = tuple(leaves.values()), others(inputs)
    if op in ALONE:
        values = (values[0], torch.tensor(0.7, dtype=torch.float64, requires_grad=True))

    def outer(function: Callable[..., tuple[Tensor, ...]]) -> Tensor:
        if op in ALONE:
            single = function
            function = lambda x, factor, **options: single((x + 1) * factor, **options)  # noqa: E731
        value = torch.func.grad_and_value(loss_of(function, rest))(values[0].detach(), *values[1:])[1]
        return torch.autograd.grad(value, values[1])[0]

    got, expected = (outer(of_leaves(case, f)) for f in (case.operator, case.reference))
    torch.testing.assert_close(got, expected, **precision(case))


# ---------------------------------------------------------------- compile, export


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def is_index(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype == torch.int32 and value.ndim < 5  # not the ranges of a pattern


def gradients_of(
    outputs: Sequence[Tensor], leaves: Sequence[Tensor], cotangents: Sequence[Tensor], retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Of the outputs that have a gradient; some operators return an index as well."""
    pairs = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    # Some arguments have no gradient at all, as centroids have none.
    options = {"retain_graph": retain_graph, "materialize_grads": True}
    return torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs], **options)


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_compile_with_dynamic_shapes(op: str, fresh_compiler: None) -> None:
    """One graph, no break, and not compiled again for another batch or length; forward and gradients.

    Torch itself treats sizes of 0 and 1 apart, and the gradient of r has one of T - 1.
    """
    options = reversed_if_possible(op) | ({"grad_clip": 0.3} if op in rnn.OPERATORS else {})
    case = example(op)
    call = of_leaves(case, case.adapted(getattr(torch.ops.seqops, op)))

    def step(*values: Tensor, **rest: Any) -> tuple[Tensor, ...]:
        outputs = call(*values, **(rest | options))
        return tuple(output * 2 for output in outputs)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for first, (B, T) in zip((True, False, False, False), ((17, 13), (4, 9), (9, 7), (2, 33)), strict=True):
        case = example(op, B=B, T=T)  # in the first call all sizes differ: equal ones would be taken for one
        inputs = case.inputs()
        leaves, rest = tuple(cases.differentiable(inputs).values()), others(inputs)
        rest |= {name: value.long() for name, value in rest.items() if is_index(value)}  # some cases draw the dtype
        with torch._dynamo.config.patch(error_on_recompile=not first):
            got = compiled(*leaves, **rest)
        expected = step(*leaves, **rest)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        if op in WITHOUT_GRADIENT:
            assert not any(output.requires_grad for output in (*got, *expected))
            continue
        cotangents = case.cotangents(expected)
        gradients = [gradients_of(outputs, leaves, cotangents) for outputs in (got, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("op", [*scan.OPERATORS, *causal_conv1d.OPERATORS])
def test_compile_with_any_number_of_sequences(op: str, fresh_compiler: None) -> None:
    """Packed: another length and another number of sequences compile nothing new."""

    def step(first: Tensor, second: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, ...]:
        return getattr(seqops, op)(first, second, cu_seqlens=cu_seqlens)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for first_call, edges in zip(
        (True, False, False), ([0, 3, 5, 5, 8, 11], [0, 0, 2, 7, 8, 9], [0, 12, 13]), strict=True
    ):
        without = {"states": "none"} if op in scan.OPERATORS else {"state": False, "bias": False}
        inputs = example(op, B=1, T=edges[-1], **without).inputs()
        values = [*cases.differentiable(inputs).values(), torch.tensor(edges)]
        with torch._dynamo.config.patch(error_on_recompile=not first_call):
            got = compiled(*values)
        expected = step(*values)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(("op", "options"), VARIANTS)
def test_compile_the_public_function(op: str, options: dict[str, Any], fresh_compiler: None) -> None:
    case = example(op, **options)
    inputs = case.inputs()
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, expected = compiled(**inputs), case.operator(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("op", ["lstm", *scan.OPERATORS, *causal_conv1d.OPERATORS, *grid_scan.OPERATORS])
def test_compile_of_transforms(op: str, fresh_compiler: None) -> None:
    case, values, rest = drawn(op)
    mapped = tuple(torch.stack([v, v * 0.7]) for v in values)

    def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="aot_eager")

    ours, theirs = (loss_of(of_leaves(case, f), rest) for f in (case.operator, case.reference))
    torch.testing.assert_close(
        compiled(torch.func.grad(ours))(*values), torch.func.grad(theirs)(*values), **precision(case)
    )
    got = compiled(torch.vmap(torch.func.grad(ours)))(*mapped)
    torch.testing.assert_close(got, torch.vmap(torch.func.grad(theirs))(*mapped), **precision(case))


INDUCTOR = """
import torch, seqops
def step(wx, r, b):
    h, h_n, c_n = seqops.lstm(wx, r, b, grad_clip=1.0)
    y, last = seqops.linear_scan(h, wx[:, :, 0].sigmoid())
    o, lse = seqops.softmax_scan(y.mean(-1), h)
    return (o * h).mean() + c_n.sum() + last.sum() + lse.mean()
inputs = [torch.randn(*s).requires_grad_() for s in ((3, 5, 4, 2, 8), (4, 2, 8, 8), (4, 2, 8))]
compiled = torch.compile(step, fullgraph=True)
got, expected = [torch.autograd.grad(f(*inputs), inputs) for f in (compiled, step)]
torch.testing.assert_close(got, expected)
print("same")
"""


def test_first_call_of_a_process_is_compiled(run_python: Callable[..., str]) -> None:
    """With inductor: nothing depends on an eager call having come first."""
    assert run_python(INDUCTOR).endswith("same\n")


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_export_with_dynamic_batch_and_time(op: str) -> None:
    options = {"lengths": True, "states": False} if op in rnn.OPERATORS else {}
    case = example(op, B=3, T=5, **options)
    given = case.inputs()
    names = [name for name, value in given.items() if torch.is_tensor(value)]
    plain = {name: value for name, value in given.items() if name not in names} | reversed_if_possible(op)
    call = case.adapted(getattr(torch.ops.seqops, op))

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
            return call(**dict(zip(names, values, strict=True)), **plain)

    def arguments(B: int, T: int) -> tuple[Tensor, ...]:
        inputs = example(op, B=B, T=T, **options).inputs()
        return tuple(inputs[name].detach() for name in names)

    batch, time = torch.export.Dim("batch", min=2), torch.export.Dim("time", min=2)
    sequence, row = {0: batch, 1: time}, {0: batch}
    dynamic = {
        "linear_scan": (sequence, sequence, row),
        "softmax_scan": (sequence, sequence, row, row),
        "conv_ssm": (sequence, None, None, None, None, row),
        "ssm_kernel": (row, row),
        "cauchy_kernel": (row, {0: time}, row),
        "fft_conv": (sequence, None, None),
        "grid_scan": (sequence,) * 6 + (row, sequence),
        "linear_attention": (sequence, sequence, sequence, sequence, row),
        "block_diffusion_attention": ({0: batch, 1: 2 * torch.export.Dim("half", min=1)},) * 3,
        "chunked_attention": (sequence, sequence, sequence),
        "delta_attention": (sequence, sequence, sequence),
        "merge_attention": (sequence, {0: batch, 2: time}) * 2,
        "window_attention": (sequence, sequence, sequence, None),
        "range_attention": (sequence, row, row, {4: time}),
        "combiner_attention": ({0: batch, 1: torch.export.Dim("time", min=3)},) * 3,  # with 2, there is no span
        "prob_sparse_attention": (sequence, sequence, sequence, {0: time}),
        "cluster_assign": (sequence, None),
        "update_centroids": (None, sequence, sequence),
        "gathered_attention": (sequence, sequence, sequence, row, row),
        "routing_attention": (sequence, sequence, sequence, None),
        "pointer_scores": (sequence, row, None),
        "newton_schulz": (sequence,),
        "large_chunk_ttt": (sequence,) * 3 + (row,) * 3 + (sequence,) * 2 + (row,) * 3,
        "neural_memory": (sequence,) * 4 + (row,) * 2 + (sequence,) * 2 + (row,) * 2,
    }.get(op, (sequence, None, None, row))
    exported = torch.export.export(Module(), arguments(3, 5), dynamic_shapes=(dynamic,))
    assert [str(n.target) for n in exported.graph.nodes if "seqops" in str(n.target)] == [f"seqops.{op}.default"]
    for B, T in ((3, 5), (2, 9), (7, 6)):
        inputs = arguments(B, T)
        got, expected = exported.module()(*inputs), Module()(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# ---------------------------------------------------------------- modes


@pytest.mark.parametrize("op", rnn.OPERATORS)
def test_autocast_of_products(op: str) -> None:
    """wx and r take the autocast dtype, states stay in float32, gradients come in the dtype of the inputs."""
    case = example(op)
    inputs = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == [torch.bfloat16] + [torch.float32] * len(rnn.STATES[op])
    cast = {name: inputs[name].detach().bfloat16().requires_grad_() for name in ("wx", "r")}
    expected = case.operator(**(inputs | cast))
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    cotangents = case.cotangents(outputs)
    got = torch.autograd.grad(outputs, [inputs["wx"], inputs["r"]], cotangents)
    direct = torch.autograd.grad(expected, [cast["wx"], cast["r"]], cotangents)
    assert all(torch.equal(a, b.float()) for a, b in zip(got, direct, strict=True))
    with torch.autocast("cpu", enabled=False):
        assert case.operator(**inputs)[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize(
    "op",
    [*scan.OPERATORS, *conv_ssm.OPERATORS, *causal_conv1d.OPERATORS, *grid_scan.OPERATORS, *linear_attention.OPERATORS],
)
def test_autocast_casts_no_scan(op: str, dtype: torch.dtype) -> None:
    if op != "linear_scan" and dtype.is_complex:
        dtype = torch.float16
    case = example(op, dtype=dtype)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    expected = cases.evaluate(case.operator, inputs, cotangents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cases.assert_same_bits(cases.evaluate(case.operator, inputs, cotangents), expected)


@pytest.mark.parametrize("op", [*(op for op in ATTENTION if op in WITH_GRADIENT), *TTT])
def test_autocast_of_attention(op: str) -> None:
    """What the products multiply takes the autocast dtype, lse stays in float32, gradients have the inputs' dtype.

    So it is in test-time training, where weights and gates stay in float32.
    """
    wide = {"wide": True} if op in TTT[1:] else {}
    case, narrow = example(op), example(op, dtype=torch.bfloat16, **wide)
    inputs = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.operator(**inputs)
    assert [output.dtype for output in outputs] == narrow.output_dtypes
    cast = {name for name, value in narrow.inputs().items() if name in inputs and is_narrow(value)}
    cast -= {"weight", "centroids", "bias"}  # parameters may be float32 beside 16 bits
    direct = {n: v.detach().bfloat16().requires_grad_() if n in cast else v for n, v in inputs.items()}
    expected = case.operator(**direct)
    assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
    cotangents = case.cotangents(outputs)
    leaves = [cases.differentiable(given).values() for given in (inputs, direct)]
    got, exact = (gradients_of(o, [*ls], cotangents) for o, ls in zip((outputs, expected), leaves, strict=True))
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, exact, strict=True))
    with torch.autocast("cpu", enabled=False):
        assert case.operator(**inputs)[0].dtype == torch.float32


def is_narrow(value: Any) -> bool:
    return torch.is_tensor(value) and value.dtype == torch.bfloat16


@pytest.mark.parametrize("op", [*rnn.OPERATORS, *(op for op in ATTENTION if op in WITH_GRADIENT), *TTT])
def test_autocast_around_the_backward(op: str) -> None:
    """A forward in float32 has its gradients in float32, wherever the backward is called."""
    case = example(op)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    expected = gradients_of(outputs, [*leaves.values()], cotangents, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients_of(outputs, [*leaves.values()], cotangents)
        assert torch.is_autocast_enabled("cpu")
    for name, a, b in zip(leaves, got, expected, strict=True):
        assert cases.same_bits(a, b), name


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_autocast_leaves_float64_alone(op: str) -> None:
    case = example(op, dtype=torch.float64)
    inputs = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = case.operator(**inputs)
    assert [output.dtype for output in outputs] == case.output_dtypes
    assert op in WITHOUT_GRADIENT or outputs[0].real.dtype == torch.float64


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_inference_mode(op: str) -> None:
    case = example(op)
    inputs = case.inputs()
    expected = case.operator(**inputs)
    with torch.inference_mode():
        got = case.operator(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert all(output.is_inference() and not output.requires_grad for output in got)


@pytest.mark.parametrize("op", ATTENTION)
def test_training_after_inference_mode(op: str) -> None:
    """What an operator keeps of a call in inference mode serves a gradient too."""
    case = example(op, B=2, T=23)  # sizes that no other test has
    inputs = case.inputs()
    with torch.inference_mode():
        case.operator(**inputs)
    cases.evaluate(case.operator, inputs, case.cotangents)


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_activation_checkpointing(op: str) -> None:
    case = example(op)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))

    def again(**arguments: Any) -> tuple[Tensor, ...]:
        return torch.utils.checkpoint.checkpoint(case.operator, use_reentrant=False, **arguments)

    expected = cases.evaluate(case.operator, inputs, cotangents)
    cases.assert_same_bits(cases.evaluate(again, inputs, cotangents), expected)


# ---------------------------------------------------------------- backends


def counted(monkeypatch: pytest.MonkeyPatch, backend: str, function: Callable[..., Any] | None = None) -> list[int]:
    """A list that gets the thread of every call that the backend serves, by its function or by `function`."""
    calls: list[int] = []

    def count(op: str, serve: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(threading.get_ident())
            return serve(*args, **options) if function is None else function(op, *args, **options)

        return call

    for op, served in backends._served.items():
        if served.get(backend) is not None:
            monkeypatch.setitem(served, backend, count(op, served[backend]))
    return calls


@pytest.fixture
def reference_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever a reference runs."""
    return counted(monkeypatch, "reference")


@pytest.mark.parametrize("mode", ["grad", "no_grad", "inference_mode"])
@pytest.mark.parametrize("op", cases.OPERATORS)
def test_forced_reference(op: str, mode: str, reference_calls: list[int]) -> None:
    """It runs, once, gives the reference's own bits and gradients, and is gone when the block ends."""
    case = example(op, **({"lengths": True} if op in rnn.OPERATORS else PACKED if op in scan.OPERATORS else {}))
    inputs = case.inputs()
    expected = case.reference(**inputs)
    cotangents = case.cotangents(expected)
    gradients = cases.evaluate(case.reference, inputs, cotangents) if op in WITH_GRADIENT else {}
    assert not reference_calls
    context = {"grad": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[mode]
    assert backends.current() is None
    with context(), seqops.backend("reference"):
        assert backends.current() == "reference"
        got = case.operator(**inputs)
        assert len(reference_calls) == 1
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
        if mode == "grad" and op in WITH_GRADIENT:
            cases.assert_same_bits(cases.evaluate(case.operator, inputs, cotangents), gradients)
    assert backends.current() is None
    del reference_calls[:]
    with context():
        case.operator(**inputs)
    assert not reference_calls


def test_forcing_nests_and_survives_errors() -> None:
    with seqops.backend("reference"):
        with seqops.backend("cpu"):
            assert backends.current() == "cpu"
        assert backends.current() == "reference"
    with pytest.raises(KeyError), seqops.backend("reference"):
        raise KeyError
    assert backends.current() is None


def test_forcing_is_of_one_thread(reference_calls: list[int]) -> None:
    case = example("lstm")
    inputs = case.inputs()
    seen: list[str | None] = []

    def elsewhere() -> None:
        seen.append(backends.current())
        case.operator(**inputs)

    def forced_elsewhere() -> None:
        with seqops.backend("reference"):
            case.operator(**inputs)

    with seqops.backend("reference"):
        for target in (elsewhere, forced_elsewhere):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
        assert seen == [None]
        assert len(reference_calls) == 1 and reference_calls[0] != threading.get_ident()


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_forced_cpu_is_the_default(op: str, reference_calls: list[int]) -> None:
    case = example(op)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    expected = cases.evaluate(case.operator, inputs, cotangents)
    with seqops.backend("cpu"):
        cases.assert_same_bits(cases.evaluate(case.operator, inputs, cotangents), expected)
    assert not reference_calls


@pytest.mark.parametrize("mode", ["grad", "inference_mode"])
@pytest.mark.parametrize(
    ("op", "name"),
    [
        *((op, name) for op, public, name in backends.kernels() if op == public),
        *((op, name) for op in COMPOSITES for name in backends.GPU_BACKENDS),
    ],
)
def test_forced_backend_that_cannot_serve_says_why(
    op: str, name: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SEQOPS_SIMULATE", "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)
    inputs = example(op).inputs()
    reason = backends.reason_missing(op, name, "cpu")
    assert reason
    context = torch.enable_grad if mode == "grad" else torch.inference_mode
    with context(), seqops.backend(name), pytest.raises(RuntimeError) as caught:
        example(op).operator(**inputs)
    text = str(caught.value)
    assert text.startswith(f"seqops::{op}: backend '{name}' cannot serve this call: {reason}; backends that exist: ref")
    variable = {"triton": "TRITON_INTERPRET", "cuda": "SEQOPS_SIMULATE"}[name]
    exist = [each for each in ("triton", "cuda") if backends._exists(op, each)]
    assert (variable if name in exist else f"no {name} kernel in this release") in reason
    assert text.endswith(f"backends that exist: reference, cpu, {', '.join(exist)}")


def on_cuda_key(op: str, inputs: dict[str, Any]) -> Any:
    """The kernel that CUDA tensors reach, called with CPU tensors."""
    overload = getattr(torch.ops.seqops, op).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def call(**given: Any) -> Any:
        positional = [given.get(a.name, a.default_value) for a in overload._schema.arguments if not a.kwarg_only]
        named = {a.name: given[a.name] for a in overload._schema.arguments if a.kwarg_only and a.name in given}
        return overload.redispatch(keys, *positional, **named)

    with torch.no_grad():
        return example(op).adapted(call)(**inputs)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU this key has kernels")
@pytest.mark.parametrize("op", OWN_KERNELS)
def test_without_a_gpu_its_key_says_why(op: str) -> None:
    inputs = example(op).inputs()
    with pytest.raises(RuntimeError) as caught:
        on_cuda_key(op, inputs)
    text = str(caught.value)
    reasons = "; ".join(f"{name}: {backends.reason_missing(op, name, 'cuda')}" for name in ("cuda", "triton"))
    assert "None" not in reasons
    assert text.startswith(f"seqops::{op}: no kernel for cuda tensors ({reasons}); backends that exist: reference, cpu")
    with seqops.backend("cpu"), pytest.raises(RuntimeError) as caught:
        on_cuda_key(op, inputs)
    text = str(caught.value)
    assert text.startswith(
        f"seqops::{op}: backend 'cpu' cannot serve this call: it does not take cuda tensors; backends"
    )


WITHOUT_CUPY = """
import importlib.util, sys, types, cases, torch, seqops
from seqops.core import backend
from test_contracts import OWN_KERNELS, on_cuda_key

found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "cupy_backends" else found(name, *rest)
torch.cuda.is_available = lambda: True
if sys.argv[1] == "without":
    backend._installed = lambda package: False

class Module(types.ModuleType):
    def __getattr__(self, name):
        def serve(*args, **options):
            raise LookupError(f"{self.__name__}.{name}")
        return serve

for room in ("rnn", "scan", "ssm", "conv", "linear_attention", "attention", "ttt"):
    sys.modules[f"seqops.{room}.triton"] = Module(f"seqops.{room}.triton")
for op in OWN_KERNELS:
    try:
        on_cuda_key(op, cases.example(op).inputs())
    except (LookupError, RuntimeError) as error:
        print(op, error, sep=" -> ")
"""


@pytest.mark.parametrize("triton", ["with", "without"])
def test_without_cupy(triton: str, run_python: Callable[..., str]) -> None:
    """Triton serves CUDA tensors, where it has kernels; else the error says what to install."""
    output = run_python(WITHOUT_CUPY, triton, PYTHONPATH=os.path.dirname(__file__))
    said = dict(line.split(" -> ", 1) for line in output.splitlines())
    assert set(said) == set(OWN_KERNELS)
    has_triton = {op for op, _, name in backends.kernels() if name == "triton"}
    for op, text in said.items():
        if triton == "with" and op in has_triton and find_spec("triton") is not None:
            assert text == f"{getattr(seqops, op).__module__.rpartition('.')[0]}.triton.{op}"
            continue
        has_cuda = (op, op, "cuda") in backends.kernels()
        reason = "CuPy is not installed (pip install " if has_cuda else "no cuda kernel in this release"
        assert text.startswith(f"seqops::{op}: no kernel for cuda tensors (cuda: {reason}")
        assert op not in has_triton or "triton: Triton is not installed (pip install triton)" in text
        assert "backends that exist: reference, cpu" in text


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_reference_on_the_cuda_key(op: str) -> None:
    case = example(op)
    inputs = case.inputs()
    with seqops.backend("reference"):
        got = on_cuda_key(op, inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, case.reference(**inputs), strict=True))


@pytest.mark.parametrize("op", WITH_GRADIENT)
def test_backward_keeps_the_forced_backend(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward's, where the backward runs in another thread, as it does on GPUs, and after the block has ended."""

    def native(name: str, *args: Any, **options: Any) -> Any:
        with backends.resume(None):
            return getattr(torch.ops.seqops, name)(*args, **options)

    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    name = gpu_backend(op)
    calls = counted(monkeypatch, name, native)
    case = example(op)
    inputs = case.inputs()
    with seqops.backend(name):
        outputs = case.operator(**inputs)
    forward = len(calls)
    assert forward == 1 or (op in COMPOSITES and forward)
    leaves = [*cases.differentiable(inputs).values()]

    def backward() -> None:
        for leaf, gradient in zip(leaves, gradients_of(outputs, leaves, case.cotangents(outputs)), strict=True):
            leaf.grad = gradient

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    assert len(calls) == 2 or (op in COMPOSITES and len(calls) > forward)
    assert not {*calls[:forward]} & {*calls[forward:]}
    assert all(leaf.grad is not None for leaf in leaves)


IN_ENVIRONMENT = """
import torch, seqops
from seqops.core import backend
print(backend.current())
try:
    seqops.linear_scan(torch.ones(1, 2, 3), torch.ones(1, 2, 3))
except RuntimeError as error:
    print(error)
"""


def test_forced_by_the_environment(run_python: Callable[..., str]) -> None:
    assert run_python(IN_ENVIRONMENT, SEQOPS_BACKEND="reference") == "reference\n"
    without = {"SEQOPS_SIMULATE": "", "TRITON_INTERPRET": ""}
    for name in ("cuda", "triton"):
        first, error = run_python(IN_ENVIRONMENT, SEQOPS_BACKEND=name, **without).splitlines()
        assert first == name and f"backend '{name}' cannot serve this call" in error


@pytest.mark.parametrize("op", cases.OPERATORS)
def test_compile_under_a_forced_backend(op: str, fresh_compiler: None, reference_calls: list[int]) -> None:
    case = example(op)
    inputs = case.inputs()
    compiled = torch.compile(case.operator, fullgraph=True, backend="aot_eager")
    with seqops.backend("reference"), torch.no_grad():
        got = compiled(**inputs)
        expected = case.operator(**inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
