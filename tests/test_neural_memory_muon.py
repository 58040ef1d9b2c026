"""neural_memory with the optimizer "muon": what concerns its chunks alone; test_neural_memory.py has the rest."""

import math
from functools import partial

import cases
import pytest
import torch
from cases.neural_memory import MUON, OPERATORS, Case
from torch import Tensor

from seqops.ttt import composed_neural_memory as composed

params = partial(cases.params, operators=OPERATORS)
make = partial(Case, "neural_memory")
MEMORIES = pytest.mark.parametrize("F", [None, 6], ids=["linear", "mlp"])
GATES = ("lr", "decay", "momentum")


# ---------------------------------------------------------------- recurrences without a loop


def gates_of(C: int, kind: str) -> list[Tensor]:
    """lr, decay, momentum [1, 1, C]"""
    lr, decay, momentum = torch.rand(3, 1, 1, C, dtype=torch.float64, generator=torch.Generator().manual_seed(C))
    for gate in (decay, momentum) if kind == "edges" else ():
        gate[..., ::3], gate[..., 1::5] = 0, 1
    return [gate.requires_grad_() for gate in (lr, decay, momentum)]


def by_steps(lr: Tensor, decay: Tensor, momentum: Tensor, window: int) -> tuple[Tensor, ...]:
    """b of every token and c, m, g, p of the last, by the recurrences from token to token."""
    C, row = lr.shape[-1], torch.zeros_like(lr[0, 0])
    c, m, g, p, b = row, row, row[0], torch.ones_like(row[0]), [torch.ones_like(row[0])]
    for t in range(C):
        band = torch.tensor([float(t - window < i <= t) for i in range(C)], dtype=lr.dtype)
        keep, held = 1 - decay[0, 0, t], momentum[0, 0, t]
        m, p = held * m + lr[0, 0] * band, held * p
        c, g = keep * c + m, keep * g + p
        b.append(keep * b[-1])
    return torch.stack(b[1:])[None, None], c[None, None], m[None, None], g[None, None], p[None, None]


@pytest.mark.parametrize("kind", ["inside", "edges"])
@pytest.mark.parametrize("window", [1, 3, 4, 100])
@pytest.mark.parametrize("C", [1, 2, 7, 16])
def test_coefficients_are_those_of_the_recurrences(C: int, window: int, kind: str) -> None:
    gates = gates_of(C, kind)
    expected = by_steps(*gates, window)
    with torch.no_grad():
        found = composed.Coefficients(*gates, window)
    values = (found.b, found.c, found.m, found.g, found.p)
    for got, value in zip(values, expected, strict=True):
        torch.testing.assert_close(got, value.detach(), rtol=1e-13, atol=1e-15)
    cotangents = [torch.randn_like(value) for value in expected]
    exact = torch.autograd.grad(expected, gates, cotangents)
    for got, value in zip(found.gradients(*(t.clone() for t in cotangents)), exact, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------- values and gradients


# Two segments of chunks, whose weights the backward computes again; and longer chunks than the sequence.
@pytest.mark.parametrize(
    ("F", "T", "C"), [(None, 140, 1), (None, 30, 40), (None, 40, 40), (4, 70, 4), (4, 135, 5), (4, 30, 40), (4, 40, 40)]
)
def test_many_chunks_and_long_ones(F: int | None, T: int, C: int) -> None:
    options = (*MUON, ("window", 3))
    case = make(B=1, T=T, H=1, D=3, F=F, C=C, state=True, dtype=torch.float64, options=options)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    # Steps of Newton-Schulz enlarge small singular values, one chunk after the other: as far as the reference's results
    # move where inputs move by a rounding.
    generator = case.generator(2)
    with torch.no_grad():
        nudged = {
            name: t * (1 + torch.randn(t.shape, dtype=t.dtype, generator=generator) * 2**-52)
            for name, t in cases.differentiable(inputs).items()
        }
    moved = cases.exact_results(case, inputs | nudged, cotangents)
    bounds = {name: 1e-11 + 30 * cases.error(moved[name], value) for name, value in exact.items()}
    assert max(bounds.values()) < 1e-3
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, bounds)


@pytest.mark.parametrize("case", params("tiny", where=lambda case: case.iterated))
def test_each_output_alone(case: Case) -> None:
    """A gradient of one result only."""
    inputs = cases.in_float64(case.inputs())
    outputs = case.operator(**inputs)
    for position, cotangent in enumerate(case.cotangents(outputs)):
        function, exact = cases.only(position, case.operator), cases.only(position, case.reference)
        expected = cases.evaluate(exact, inputs, [cotangent])
        cases.assert_within(cases.evaluate(function, inputs, [cotangent]), expected, 1e-7)


@MEMORIES
def test_of_a_chunk_that_is_not_complete_weights_only_decay(F: int | None) -> None:
    case = make(B=1, T=3, C=4, F=F, state=True, dtype=torch.float64, options=MUON)
    inputs = {name: t.detach() if torch.is_tensor(t) else t for name, t in case.inputs().items()}
    _, *state = case.operator(**inputs)
    left = (1 - inputs["decay"]).prod(1)[..., None, None]
    for i, got in enumerate(state[: case.layers]):
        torch.testing.assert_close(got, left * inputs[f"w{i + 1}"], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("C", [4, 100])
@pytest.mark.parametrize("name", ["q", "k", "v", *GATES, "grad"])
@MEMORIES
def test_nan_stays_where_it_is_seen(F: int | None, name: str, C: int) -> None:
    """At token 22 of one head: other heads and rows, and what comes before, keep their bits."""
    case = make(B=2, T=30, H=2, C=C, F=F, D=5, state=True, options=(*MUON, ("window", 3)))
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    clean = cases.evaluate(case.operator, inputs, cotangents)
    with torch.no_grad():
        place = (0, 22, 0) if name in GATES else (0, 22, 0, 1)
        if name == "grad":
            cotangents[0] = cotangents[0].clone()
        (cotangents[0] if name == "grad" else inputs[name])[place] = math.nan
    got = cases.evaluate(case.operator, inputs, cotangents)
    assert not all(t.isfinite().all() for t in got.values())
    for result, t in got.items():
        head = 2 if result == "0" or result[1:] in ("q", "k", "v", *GATES) else 1
        assert torch.equal(t[1:], clean[result][1:]), result
        assert torch.equal(t.select(head, 1), clean[result].select(head, 1)), result
    for result in ("0", "dq", "dk", "dv") if name == "grad" else ("0", "dq"):
        seen = slice(23, None) if name == "grad" else slice(0, 22)
        assert torch.equal(got[result][:, seen], clean[result][:, seen]), result


def test_saved_states_are_few() -> None:
    """Of weights of 32 KB: one state for every 128 tokens, and the arguments."""
    case = make(B=1, T=512, H=1, D=32, F=128, C=1, options=MUON)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        o = case.operator(**case.inputs())[0]
    assert o.requires_grad and max(sizes) == 4 * 4 * 32 * 128
