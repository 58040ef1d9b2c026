"""Every module of seqops.nn: the paper's formula, pieces and steps, compiling, saving, 16 bits, bad input."""

import copy
import inspect
import io
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import seqops
from tests.formulas import CASES, Case, output

# Modules of their own tests (tests/test_nn.py), and names that are no modules.
ELSEWHERE = {"LSTM", "GRU", "RNN", "SLSTM", "Streaming"}
MODULES = [name for name in seqops.nn.__all__ if inspect.isclass(getattr(seqops.nn, name)) and name not in ELSEWHERE]
FIRST = [next(case for case in CASES if case.module == name) for name in dict.fromkeys(c.module for c in CASES)]
STREAMING = [case for case in CASES if case.cuts]

every = pytest.mark.parametrize("case", CASES, ids=str)
first = pytest.mark.parametrize("case", FIRST, ids=str)
streaming = pytest.mark.parametrize("case", STREAMING, ids=str)


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    if expected.is_complex():
        got, expected = torch.view_as_real(got), torch.view_as_real(expected)
    got, expected = got.detach().double(), expected.detach().double()
    return float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def tensors(state: Any) -> Iterator[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from tensors(part)


def leaves(module: torch.nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """What a gradient can be taken by: parameters and floating inputs."""
    given = [t.requires_grad_() for t in inputs if isinstance(t, Tensor) and t.is_floating_point()]
    return [*module.parameters(), *given]


def test_every_module_has_a_case():
    assert {*MODULES} == {case.module for case in CASES}


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short_and_explained(name):
    """A page of code, and a docstring with every argument, the shapes, and the paper as its last paragraph."""
    cls = getattr(seqops.nn, name)
    assert len(inspect.getsource(cls).splitlines()) <= 120
    text = inspect.getdoc(cls)
    for argument in inspect.signature(cls).parameters:
        assert argument in text, argument
    assert "[B, " in text
    assert text.rstrip().splitlines()[-1].rstrip().endswith(".") and any(f"{y}" in text for y in range(1990, 2027))
    assert all(
        parameter.annotation is not inspect.Parameter.empty for parameter in inspect.signature(cls).parameters.values()
    )


@every
def test_formula(case: Case):
    """Values and all gradients of the paper's formula, in float64; values in float32."""
    module, inputs = case.build(), case.inputs()
    by = leaves(module, inputs)
    got = output(module(*inputs))
    expected = case.formula(module, *inputs)
    assert got.dtype == expected.dtype == torch.float64
    assert distance(got, expected) <= case.tolerance
    weight = torch.randn_like(expected)
    ours = torch.autograd.grad((got * weight).sum(), by, allow_unused=True)
    theirs = torch.autograd.grad((expected * weight).sum(), by, allow_unused=True)
    largest = max(float(t.abs().max()) for t in theirs if t is not None and t.numel())
    for one, other in zip(ours, theirs, strict=True):
        zero = torch.zeros(())
        difference = (zero if one is None else one) - (zero if other is None else other)
        assert difference.numel() == 0 or float(difference.abs().max()) <= 100 * case.tolerance * max(largest, 1.0)

    single = output(copy.deepcopy(module).float()(*case.inputs(torch.float32)))
    assert single.dtype == torch.float32
    assert distance(single, expected) <= 2e-4


@first
def test_every_parameter_learns(case: Case):
    module, inputs = case.build(), case.inputs()
    output(module(*inputs)).square().sum().backward()
    idle = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not idle


@streaming
def test_pieces_equal_whole(case: Case):
    """Cut anywhere, and step by step: outputs, the last state, and gradients through the states."""
    module, (x, *rest) = case.build(), case.inputs()
    assert not rest, "a streaming module takes x and a state"
    x.requires_grad_()
    whole, last = module(x)
    weight = torch.randn_like(whole)
    expected = torch.autograd.grad((whole * weight).sum(), x)[0]
    T = x.shape[1]
    plans = [(0, *case.cuts, T)] + [tuple(range(T + 1))] * case.steps
    for plan in plans:
        state, parts = None, []
        for start, end in itertools.pairwise(plan):
            y, state = module(x[:, start:end], state)
            parts.append(y)
        joined = torch.cat(parts, 1)
        assert distance(joined, whole) <= 10 * case.tolerance
        got = torch.autograd.grad((joined * weight).sum(), x)[0]
        assert distance(got, expected) <= 1000 * case.tolerance
        for one, other in zip(tensors(state), tensors(last), strict=True):
            assert distance(one, other) <= 100 * case.tolerance
    if case.steps:
        y, _ = module.step(x[:, 0])
        assert y.shape == whole[:, 0].shape and distance(y, whole[:, 0]) <= 10 * case.tolerance


@streaming
def test_state_keeps_no_sequence(case: Case):
    """As large after a long sequence as after a short one, and no view of one; detached, it has no history."""
    module = case.build()
    (x,) = case.inputs()
    long = torch.cat([x] * 4, 1)
    _, short_state = module(torch.cat([x] * 2, 1))
    _, state = module(long)
    assert [*tensors(state)]
    for one, other in zip(tensors(state), tensors(short_state), strict=True):
        assert one.untyped_storage().nbytes() == one.numel() * one.itemsize
        assert case.grows or one.shape == other.shape
    assert all(not part.requires_grad for part in tensors(seqops.nn.detach(state)))


def rows(state: Any, count: int) -> Any:
    """A state of `count` rows: the first of it, again and again."""
    if isinstance(state, Tensor):
        return state[:1].expand(count, *state.shape[1:]).clone()
    return None if state is None else tuple(rows(part, count) for part in state)


@pytest.mark.parametrize("case", [case for case in FIRST if case.cuts], ids=str)
def test_state_of_another_batch(case: Case):
    """An error that says what was expected: a state of one row is not spread over the batch."""
    module = case.build()
    (x,) = case.inputs()
    x = torch.cat([x, x])[:2]
    _, state = module(x)
    for count in (1, 3):
        wrong = rows(state, count)
        with pytest.raises(ValueError, match=r": expected .*, got "):
            module(x, wrong)
        if case.steps:
            with pytest.raises(ValueError, match=r": expected .*, got "):
                module.step(x[:, 0], wrong)


@pytest.mark.parametrize("case", [case for case in FIRST if case.cuts and case.draw is None], ids=str)
def test_empty(case: Case):
    """No steps, and no rows."""
    module = case.build()
    (x,) = case.inputs()
    for empty in (x[:, :0], x[:0]):
        y, _ = module(empty)
        assert y.shape[:2] == empty.shape[:2] and y.numel() == 0


@pytest.mark.parametrize("case", [case for case in CASES if case.compiled], ids=str)
def test_compiles(case: Case):
    """One graph without a break, forward and backward, the same values."""
    torch.compiler.reset()
    module, inputs = case.build(torch.float32), case.inputs(torch.float32)
    by = leaves(module, inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    got = output(compiled(*inputs))
    expected = output(module(*inputs))
    assert distance(got, expected) <= 1e-5
    ours = torch.autograd.grad(got.square().sum(), by, allow_unused=True)
    theirs = torch.autograd.grad(expected.square().sum(), by, allow_unused=True)
    largest = max(float(t.abs().max()) for t in theirs if t is not None and t.numel())
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or float((one - other).abs().max()) <= 1e-4 * max(largest, 1.0)


@first
def test_weight_decay_leaves_biases_alone(case: Case):
    """Also those of several dimensions, and those inside lists."""
    module = case.build()
    decayed, plain = ({id(p) for p in group["params"]} for group in seqops.nn.parameter_groups(module))
    assert not decayed & plain and decayed | plain == {id(p) for p in module.parameters()}
    assert [name for name, p in module.named_parameters() if "bias" in name and id(p) in decayed] == []


@first
def test_state_dict(case: Case):
    """Through a file into a module of another seed: the same bits."""
    module, other, inputs = case.build(), case.build(seed=5), case.inputs()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(output(module(*inputs)), output(other(*inputs)))
    assert len(module.state_dict()) > 0 or not [*module.parameters()]


@first
def test_device_and_dtype_arguments(case: Case):
    """As torch.nn's: parameters are made where and as asked."""
    made = getattr(seqops.nn, case.module)(**case.options, device="meta", dtype=torch.float64)
    for tensor in [*made.parameters(), *made.buffers()]:
        assert tensor.device.type == "meta"
    for tensor in made.parameters():
        assert tensor.dtype in (torch.float64, torch.complex128)


@pytest.mark.parametrize("case", [case for case in CASES if case.in16], ids=str)
def test_bfloat16(case: Case):
    """Parameters and inputs in bfloat16, and float32 parameters under autocast: near the same numbers in float64."""
    module = case.build(torch.bfloat16)
    inputs = case.inputs(torch.bfloat16)
    exact = output(copy.deepcopy(module).double()(*(widen(t) for t in inputs)))
    got = output(module(*inputs))
    assert got.dtype == torch.bfloat16
    assert distance(got, exact) <= case.bound16
    got.float().square().sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in module.parameters())

    module, inputs = case.build(torch.float32), case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        cast = output(module(*inputs))
    assert distance(cast, output(module(*inputs))) <= case.bound16


def widen(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@first
def test_bad_input_names_the_argument(case: Case):
    """Wrong width, wrong rank, integers: an error that names module and argument, before anything is computed."""
    module, (x, *rest) = case.build(), case.inputs()
    if not x.is_floating_point():
        return  # token ids: the module's own tests
    for wrong in (torch.cat([x, x], -1), x[0], x[..., 0], x.long()):
        with pytest.raises(ValueError, match=rf"{case.module}: \w+: expected .*, got "):
            module(wrong, *rest)
