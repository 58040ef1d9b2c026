"""Layers that learn in their forward: what the formulas of tests/formulas/ttt.py do not show."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import seqops
from seqops.nn import TTTMLP, Atlas, LaCT, NeuralMemory, OmegaNet, TitansMAC, TTTLinear
from seqops.nn.ttt import gelu_slope, reconstruction_slope
from tests.formulas import CASES, Case, output

LEARNING = [case for case in CASES if case.module in ("NeuralMemory", "LaCT", "OmegaNet", "Atlas")]
LEARNING += [case for case in CASES if case.module.startswith(("Titans", "TTT"))]


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_outputs_do_not_depend_on_later_tokens(case: Case):
    module, (x,) = case.build(), case.inputs()
    for at in (5, 6, x.shape[1] - 1):
        if at < x.shape[1]:
            changed = torch.cat([x[:, :at], 3 - x[:, at:]], 1)
            before, after = output(module(x)), output(module(changed))
            assert torch.allclose(before[:, :at], after[:, :at], rtol=1e-12, atol=1e-12)
            assert not torch.allclose(before[:, at:], after[:, at:])


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_inference_mode(case: Case):
    module, (x,) = case.build(), case.inputs()
    with torch.inference_mode():
        y = output(module(x))
    assert torch.equal(y, output(module(x)))


@pytest.mark.parametrize("hidden", [0, 12])
def test_memory_stays_bounded_at_the_largest_rates(hidden: int):
    """The same key in every token, gates at their ends: all steps of a chunk point the same way."""
    torch.manual_seed(0)
    layer = NeuralMemory(8, 1, 16, hidden, kernel=1)
    with torch.no_grad():
        layer.gates.weight.zero_()
        layer.gates.bias.copy_(torch.tensor([20.0, -20.0, 3.0]))  # rate, decay, momentum
        _, state = layer(torch.randn(1, 1, 8).expand(1, 4096, 8))
    assert all(float(weight.abs().max()) < 10 for weight in state[1])


def test_gates_at_the_start():
    """A token forgets a thousandth; a chunk's rates sum to half of `rate`, less what momentum adds later."""
    layer = NeuralMemory(8, 2, 4, momentum=False, rate=0.8)
    torch.nn.init.zeros_(layer.gates.weight)
    lr, decay = layer.rates(torch.zeros(1, 4, 8))
    assert torch.allclose(decay, torch.full_like(decay, 0.001))
    assert torch.allclose(lr.sum(1), torch.full((1, 2), 0.4))
    with_momentum = NeuralMemory(8, 2, 4, rate=0.8)
    torch.nn.init.zeros_(with_momentum.gates.weight)
    assert torch.allclose(with_momentum.rates(torch.zeros(1, 4, 8))[0].sum(1), torch.full((1, 2), 0.2))


def test_lact_starts_with_small_rates_and_keeps_norms():
    layer = LaCT(8, 2, 4)
    torch.nn.init.zeros_(layer.rates.weight)
    rate = torch.nn.functional.softplus(layer.rates(torch.zeros(8)))
    assert torch.allclose(rate, torch.full_like(rate, 1e-3))
    _, state = layer(torch.randn(2, 40, 8))
    for weight, first in zip(state[0], layer.fast, strict=True):
        assert not torch.allclose(weight, first.expand_as(weight), atol=1e-2)  # it has learnt
        lengths = first.norm(dim=-1).expand(weight.shape[:3])
        assert torch.allclose(weight.norm(dim=-1), lengths, rtol=1e-5)


def test_memory_recalls_what_it_has_read():
    """A key read with its value brings the value back: after many readings the error is a fraction of the first."""
    torch.manual_seed(0)
    layer = NeuralMemory(16, 1, 1, momentum=False, kernel=1).double()
    x = torch.randn(1, 4, 16, dtype=torch.float64)
    _, k, v = (seqops.nn.memory.unit(torch.nn.functional.silu(part), 1) for part in layer.qkv(x).chunk(3, -1))

    def error(state: Any) -> Tensor:
        return (k.transpose(1, 2) @ state[1][0].mT - v.transpose(1, 2)).square().sum()

    _, state = layer(x.repeat(1, 50, 1))
    assert float(error(state)) < 0.01 * float(error(layer.start(x)))


@pytest.mark.parametrize("case", LEARNING, ids=str)
def test_slopes_at_tokens_of_zeros(case: Case):
    """What is scaled to length 1 has a slope of 1 / length: it is bounded where the length is 0."""
    module, (x,) = case.build(), case.inputs()
    x = torch.cat([torch.zeros_like(x), x], 1).requires_grad_()
    output(module(x)).square().sum().backward()
    assert float(x.grad.abs().max()) < 1e8


def test_open_chunk_is_all_that_a_state_gains():
    layer = TTTLinear(8, 2, 4)
    for T, opened in ((4, 0), (5, 1), (7, 3), (8, 0)):
        _, (_, (k, v, lr)) = layer(torch.randn(1, T, 8))
        assert k.shape[1] == v.shape[1] == lr.shape[1] == opened


def test_slopes_are_derivatives():
    z, target, weight, bias = torch.randn(4, 3, 6, dtype=torch.float64)
    z.requires_grad_()
    normal = torch.nn.functional.layer_norm(z, (6,), eps=1e-6)
    (expected,) = torch.autograd.grad((weight * normal + bias - target).square().sum() / 2, z)
    assert torch.allclose(reconstruction_slope(z, target, weight, bias), expected)
    (expected,) = torch.autograd.grad(torch.nn.functional.gelu(z, approximate="tanh").sum(), z)
    assert torch.allclose(gelu_slope(z), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeuralMemory(8, 3), "NeuralMemory: dim: expected a multiple of num_heads = 3, got 8"),
        (lambda: NeuralMemory(8, loss="l1"), "NeuralMemory: loss: expected 'l2' or 'dot', got 'l1'"),
        (lambda: NeuralMemory(8, optimizer="sgd"), "NeuralMemory: optimizer: expected 'gd' or 'muon', got 'sgd'"),
        (lambda: NeuralMemory(8, rate=-1.0), "NeuralMemory: rate: expected a number above 0, got -1.0"),
        (lambda: NeuralMemory(8, hidden=-1), "NeuralMemory: hidden: expected a whole number of at least 0, got -1"),
        (lambda: LaCT(8, 2, 0), "LaCT: chunk_size: expected a whole number of at least 1, got 0"),
        (lambda: LaCT(8, 2, 4, 3), "LaCT: dim: expected a multiple of num_fast_heads = 3, got 8"),
        (lambda: LaCT(8, 2, optimizer="adam"), "LaCT: optimizer: expected 'muon' or 'gd', got 'adam'"),
        (lambda: TitansMAC(8, 2, 0), "TitansMAC: segment: expected a whole number of at least 1, got 0"),
        (lambda: TTTMLP(8, 2, expand=0), "TTTMLP: expand: expected a whole number of at least 1, got 0"),
        (lambda: Atlas(8, chunk_size=-1), "Atlas: chunk_size: expected a whole number of at least 1, got -1"),
        (lambda: OmegaNet(8, degree=0), "OmegaNet: degree: expected a whole number of at least 1, got 0"),
    ],
)
def test_sizes_that_do_not_fit(make: Any, message: str):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_atlas_forgets_what_a_step_adds():
    layer = Atlas(8, 2, 4)
    forgotten = torch.sigmoid(layer.gates.bias[2:4])
    assert math.isclose(float(forgotten[0]), 1 / 5, rel_tol=1e-5)
