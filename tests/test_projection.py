"""seqops::project, the modules' input projection: linear in every respect, by our own product."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import seqops
from seqops.nn import projection

SIZES = [(1, 1, 1), (7, 3, 5), (13, 128, 17), (97, 33, 70), (300, 100, 130), (0, 4, 5), (5, 0, 3), (4, 6, 0)]


def inputs(rows: int, depth: int, units: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + depth + units)
    shapes = (rows, depth), (units, depth), (units,)
    return tuple(torch.randn(*shape, dtype=dtype, generator=generator) for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_equals_linear(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x, weight, bias = inputs(*size, dtype)
    for given in (bias, None):
        expected = functional.linear(x.double(), weight.double(), None if given is None else given.double())
        bound = 2e-6 if dtype == torch.float32 else 1e-14
        for laid_out in (weight, weight.t().contiguous().t(), weight.repeat_interleave(2, 1)[:, ::2]):
            got = torch.ops.seqops.project(x, laid_out, given)
            assert got.dtype == dtype and got.shape == expected.shape
            error = (got.double() - expected).norm() if got.numel() else torch.tensor(0.0)
            assert error <= bound * max(1, size[1]) ** 0.5 * max(expected.norm(), 1), error


def test_leading_dimensions_and_strides() -> None:
    x, weight, bias = inputs(24, 6, 5)
    x = x.view(2, 3, 4, 6).transpose(0, 2)
    torch.testing.assert_close(torch.ops.seqops.project(x, weight, bias), functional.linear(x, weight, bias))
    torch.testing.assert_close(torch.ops.seqops.project(x[0, 0, 0], weight), functional.linear(x[0, 0, 0], weight))


def test_threads_give_equal_bits() -> None:
    x, weight, bias = inputs(200, 64, 150, torch.float32)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(torch.ops.seqops.project(x, weight, bias))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_contracts() -> None:
    leaves = [t.requires_grad_() for t in inputs(4, 3, 5)]
    assert torch.autograd.gradcheck(torch.ops.seqops.project, leaves)
    assert torch.autograd.gradgradcheck(torch.ops.seqops.project, leaves)
    torch.library.opcheck(torch.ops.seqops.project.default, tuple(leaves))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "project: x: expected float32 or float64, got int64"),
        ({"x": torch.zeros(())}, "project: x: expected at least 1 dimension [..., in], got shape []"),
        ({"weight": torch.zeros(5)}, "project: weight: expected 2 dimensions [out, in], got shape [5]"),
        ({"weight": torch.zeros(5, 4)}, "project: weight: expected [out, in] = [5, 3], got [5, 4]"),
        ({"weight": torch.zeros(5, 3).double()}, "project: weight: expected x's dtype float32, got float64"),
        ({"bias": torch.zeros(4)}, "project: bias: expected [out] = [5], got [4]"),
        ({"bias": torch.zeros(5).double()}, "project: bias: expected x's dtype float32, got float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "bias": torch.zeros(5)} | change
    with pytest.raises(ValueError) as caught:
        torch.ops.seqops.project(**arguments)
    assert str(caught.value) == message


def test_large_layers_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module gives the same values and gradients, of first and second order, by either product."""
    module = seqops.nn.RNN(64, 64)
    x = torch.randn(96, 64, 64, requires_grad=True)
    wanted = (x, *module.parameters())
    assert projection.own_product_serves(x, module.weight_ih_l0)

    def results() -> list[Tensor]:
        y = module(x)[0]
        return [y, *torch.autograd.grad(y.square().mean(), wanted)]

    ours = results()
    monkeypatch.setattr(projection, "own_product_serves", lambda *_: False)
    for got, expected in zip(ours, results(), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-4)
