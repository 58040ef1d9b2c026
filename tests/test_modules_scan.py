"""Modules composed of scans: what is special to each of them."""

import copy
import itertools

import pytest
import torch
from torch import Tensor

from seqops.nn import HGRN, LRU, RGLRU, Aaren, Birdie, GriffinBlock, MinGRU, MinLSTM, PLSTM1d, PLSTM2d, parameter_groups
from seqops.nn.plstm import before
from seqops.nn.rg_lru import bounded_root

STREAMING = [
    Aaren(8, 2),
    MinGRU(8, 2),
    MinLSTM(8),
    LRU(8, 6),
    RGLRU(8, 2),
    GriffinBlock(8, 12, 3),
    HGRN(8, 3, 1),
    Birdie(8),
    PLSTM1d(8, 2),
]
streaming = pytest.mark.parametrize("module", STREAMING, ids=lambda module: type(module).__name__)


@streaming
def test_empty_pieces_change_nothing(module):
    """A piece without steps gives back the state before it, also at the start, where it stands for no steps read."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 8)
    _, last = module(x)
    _, state = module(x[:, :0])
    for start, end in ((0, 3), (3, 3), (3, 7)):
        _, state = module(x[:, start:end], state)
    for one, other in zip(state, last, strict=True):
        torch.testing.assert_close(one, other)
    _, kept = module(x[:, :0], state)
    assert all(torch.equal(one, other) for one, other in zip(kept, state, strict=True))


@streaming
def test_states_are_at_least_float32(module):
    """In 16 bits too, and steps in them follow the whole."""
    module, x = copy.deepcopy(module).bfloat16(), torch.randn(2, 30, 8, dtype=torch.bfloat16)
    whole, _ = module(x)
    state, steps = None, []
    for t in range(30):
        y, state = module.step(x[:, t], state)
        steps.append(y)
        assert all(part.dtype in (torch.float32, torch.complex64, torch.int64) for part in state)
    error = (torch.stack(steps, 1).float() - whole.float()).abs().max() / whole.float().abs().max()
    assert error <= 0.03


@streaming
def test_no_later_step_is_seen(module):
    """Changing a step changes nothing before it, and something from it on."""
    torch.manual_seed(0)
    x = torch.randn(1, 9, 8)
    other = x.clone()
    other[:, 5] += 1
    moved = (module(other)[0] - module(x)[0]).abs().amax((0, 2))
    assert not moved[:5].any() and (moved[5:] > 0).all()


@pytest.mark.parametrize("module", [RGLRU(8, 2), GriffinBlock(8), PLSTM1d(8, 2)], ids=lambda m: type(m).__name__)
def test_compiled_steps_share_a_graph(module):
    """Positions are tensors: the third step runs the graph of the second. Nothing is tracked in inference mode."""
    torch.compiler.reset()
    graphs = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    x, state, expected = torch.randn(2, 6, 8), None, None
    step = torch.compile(module.step, fullgraph=True, backend=count)
    with torch.inference_mode():
        for t in range(6):
            y, state = step(x[:, t], state)
            reference, expected = module.step(x[:, t], expected)
            torch.testing.assert_close(y, reference)
    assert graphs == 2  # without a state, and with one


@pytest.mark.parametrize(
    ("module", "numbers"),
    [
        (Aaren(32, 4), 3 * 32 + 3 * 4),
        (MinGRU(32), 6 * 32),
        (MinLSTM(32), 8 * 32),
        (LRU(32, 64), 32 + 2 * 64),
        (RGLRU(32, 4), 12 * 32),
        (GriffinBlock(32, 32, 4), 18 * 32),
        (HGRN(32, 2, 1), 13 * 32),
        (Birdie(32, 64), 13 * 64),
        (PLSTM1d(32), 10 * 32),
    ],
    ids=lambda value: str(value) if isinstance(value, int) else type(value).__name__,
)
def test_memory_of_a_gradient(module, numbers):
    """Docstrings say how many numbers of float32 are kept for each step."""
    parameters, kept = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(torch.randn(2, 256, 32))
    assert result[0].grad_fn is not None
    assert sum(nbytes for nbytes, _ in kept.values()) / (4 * 2 * 256) == pytest.approx(numbers, rel=0.08)


# ---- LRU


def test_lru_starts_on_its_ring():
    """Moduli uniform in area, angles up to max_phase, and inputs scaled to states of one size."""
    torch.manual_seed(0)
    module = LRU(4, 4096, r_min=0.5, r_max=0.9, max_phase=1.5)
    eigenvalues = module.eigenvalues().detach()
    assert eigenvalues.abs().min() >= 0.5 and eigenvalues.abs().max() <= 0.9 + 1e-6
    assert eigenvalues.angle().min() >= 0 and eigenvalues.angle().max() <= 1.5
    area = (eigenvalues.abs() ** 2 - 0.5**2) / (0.9**2 - 0.5**2)
    assert abs(float((area < 0.25).float().mean()) - 0.25) < 0.03
    torch.testing.assert_close(module.gamma.exp() ** 2, 1 - eigenvalues.abs() ** 2)
    for parameter in LRU(8, r_min=0.0, r_max=1.0).parameters():
        assert parameter.isfinite().all()


def test_lru_stays_stable():
    """Whatever its parameters become, no eigenvalue is above 1, and gradients are finite."""
    module = LRU(4)
    with torch.no_grad():
        module.nu.copy_(torch.tensor([-200.0, -1.0, 40.0, 200.0]))
        assert module.eigenvalues().abs().max() <= 1
    module(torch.randn(2, 9, 4))[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_lru_names_a_bad_ring():
    with pytest.raises(ValueError, match=r"LRU: r_min, r_max: expected 0 <= r_min < r_max <= 1, got \(0.9, 0.5\)"):
        LRU(4, r_min=0.9, r_max=0.5)


def test_constants_are_not_decayed():
    """Weight decay would move eigenvalues, bounds, and biases of any shape."""
    for module, names in (
        (LRU(4), {"nu", "theta", "gamma"}),
        (HGRN(4, 3, 1), {"bounds"}),
        (RGLRU(4), {"decay", "bias"}),
    ):
        plain = {id(parameter) for parameter in parameter_groups(module)[1]["params"]}
        assert all(id(getattr(module, name)) in plain for name in names)


# ---- minLSTM, Aaren


def test_min_lstm_with_both_gates_shut():
    """f and i near 0: their quotient is that of the exponentials, not 0 / 0."""
    module = MinLSTM(4)
    with torch.no_grad():
        module.input.bias[4:8], module.input.bias[8:] = -300.0, -301.0
        module.input.weight[4:] = 0
    x = torch.randn(1, 5, 4)
    y, _ = module(x)
    candidate = module.input(x)[..., :4]
    candidate = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
    h = torch.zeros(1, 4)
    for t in range(5):
        h = h * torch.sigmoid(torch.tensor(1.0)) + candidate[:, t] * torch.sigmoid(torch.tensor(-1.0))
        torch.testing.assert_close(y[:, t], h)


def test_min_lstm_forget_bias_needs_bias():
    with pytest.raises(ValueError, match=r"MinLSTM: forget_bias: expected 0 without bias, got 1.0"):
        MinLSTM(4, bias=False, forget_bias=1.0)


def test_aaren_with_large_scores():
    """Weights far apart: the heaviest step alone counts, and nothing overflows."""
    module = Aaren(4).double()
    with torch.no_grad():
        module.query.copy_(1e5 * module.query)
    x = torch.randn(1, 50, 4, dtype=torch.float64)
    y, (lse, o) = module(x)
    scores = module.keys(x) @ module.query[0] / 2
    values = module.values(x)
    torch.testing.assert_close(o[0, 0], values[0, scores[0].argmax()])
    torch.testing.assert_close(lse[0, 0], scores.max())
    assert y.isfinite().all()


def test_aaren_names_heads():
    with pytest.raises(ValueError, match="Aaren: dim: expected a multiple of num_heads = 3, got 8"):
        Aaren(8, 3)


# ---- RG-LRU


def test_root_is_bounded_in_slope_alone():
    """The value is the root's; the slope 1 / (2 sqrt(x)) up to 1000, at 0 too."""
    x = torch.tensor([0.0, 1e-12, 1e-8, 2.4e-7, 2.6e-7, 1e-3, 1.0], dtype=torch.float64, requires_grad=True)
    root = bounded_root(x)
    torch.testing.assert_close(root, x.sqrt())
    (slope,) = torch.autograd.grad(root.sum(), x)
    torch.testing.assert_close(slope, (0.5 / x.detach().sqrt()).clamp(max=1000))


def test_rg_lru_learns_without_decay():
    """a = 1 to the last bit, where the slope of the root has no bound: gradients stay finite."""
    module = RGLRU(4)
    with torch.no_grad():
        module.decay.fill_(-200.0)
    x = torch.randn(2, 20, 4, requires_grad=True)
    module(x)[0].square().sum().backward()
    assert all(p.grad.isfinite().all() for p in (*module.parameters(), x))


def test_rg_lru_begins_with_its_input():
    """The first step's root is 1; the same step later is scaled, and decays start where the docstring says."""
    torch.manual_seed(0)
    module = RGLRU(512)
    both = torch.exp(-2 * torch.nn.functional.softplus(module.decay))
    assert both.min() >= 0.9**2 and both.max() <= 0.999**2 + 1e-6
    x = torch.randn(1, 1, 512)
    y, (_, count) = module(x)
    gate = torch.sigmoid(x[0, 0] @ module.weight[1, 0])
    torch.testing.assert_close(y[0, 0], gate * x[0, 0])
    later, _ = module(x, (torch.zeros(1, 512), count))
    assert (later.abs() < y.abs()).all()


def test_documents_do_not_mix():
    """A start in the middle: the rest is as if it stood alone. Pieces may begin with one."""
    torch.manual_seed(0)
    for module in (RGLRU(8, 2), Birdie(8)):
        x, starts = torch.randn(2, 12, 8), torch.zeros(2, 12, dtype=torch.bool)
        starts[:, 5] = True
        y, _ = module(x, starts=starts)
        torch.testing.assert_close(y[:, 5:], module(x[:, 5:])[0])
        _, state = module(x[:, :5])
        torch.testing.assert_close(module(x[:, 5:], state, starts=starts[:, 5:])[0], y[:, 5:])
        with pytest.raises(ValueError, match=r": starts: expected \[B, T\] = \[2, 12\] bool, got \[12\]"):
            module(x, starts=starts[0])


# ---- HGRN


def test_hgrn_layers_share_bounds():
    """One parameter; bounds begin at 0, grow from layer to layer, and stay below 1."""
    first = HGRN(8, num_layers=4)
    stack = torch.nn.ModuleList([first, *(HGRN(8, 4, layer, first.bounds) for layer in range(1, 4))])
    assert len({id(layer.bounds) for layer in stack}) == 1
    with torch.no_grad():
        first.bounds.normal_(std=3)
    bounds = [layer.lower_bound() for layer in stack]
    assert (bounds[0] == 0).all() and (bounds[-1] < 1).all()
    assert all((low <= high).all() for low, high in itertools.pairwise(bounds))
    x = torch.randn(2, 5, 8)
    for layer in stack:
        x = x + layer(x)[0]
    x.sum().backward()
    assert first.bounds.grad.abs().max() > 0


def test_hgrn_names_a_bad_layer():
    with pytest.raises(ValueError, match="HGRN: layer: expected 0 <= layer < num_layers = 2, got 2"):
        HGRN(8, 2, 2)
    with pytest.raises(ValueError, match=r"HGRN: bounds: expected shape \[3, 8\], got \[2, 8\]"):
        HGRN(8, 3, 1, HGRN(8, 2).bounds)


# ---- Birdie


def test_birdie_generates_after_a_prefix():
    """The prefix at once, then steps: what the whole gives."""
    torch.manual_seed(0)
    module, n = Birdie(8).double(), torch.randn(3, 12, 8, dtype=torch.float64)
    whole, last = module(n, prefix=7)
    y, state = module.prefix(n[:, :7])
    parts = [y]
    for t in range(7, 12):
        y, state = module.step(n[:, t], state)
        parts.append(y[:, None])
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, last)
    torch.testing.assert_close(module(n, prefix=torch.tensor([7, 7, 7]))[0], whole)
    torch.testing.assert_close(module(n, prefix=(torch.arange(12) < 7).expand(3, 12))[0], whole)


def test_birdie_prefix_sees_itself_and_nothing_else():
    """Every token of the prefix moves every output of it; tokens after it move none before them."""
    torch.manual_seed(0)
    module, n = Birdie(8).double(), torch.randn(1, 9, 8, dtype=torch.float64)
    y, _ = module(n, prefix=5)
    for changed in range(9):
        other = n.clone()
        other[:, changed] += 1
        moved = (module(other, prefix=5)[0] - y).abs().amax((0, 2)) > 0
        expected = torch.ones(9, dtype=torch.bool) if changed < 5 else torch.arange(9) >= changed
        assert torch.equal(moved, expected)


def test_birdie_names_a_bad_prefix():
    module, n = Birdie(8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"Birdie: prefix: expected \[B\] = \[2\] or \[\], got \[3\]"):
        module(n, prefix=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match=r"Birdie: prefix: expected \[B, T\] = \[2, 5\] if bool, got \[2\]"):
        module(n, prefix=torch.tensor([True, False]))


# ---- pLSTM


def transition_gradient(module: PLSTM1d, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The transitions before their tanh, and the gradient by them."""
    kept = []
    hook = module.gates.register_forward_hook(lambda _, __, gates: (gates[0].retain_grad(), kept.append(gates[0]))[1])
    (module(x)[0] * weight).sum().backward()
    hook.remove()
    return kept[0].detach().double(), kept[0].grad.double()


def test_plstm_gradient_by_negative_transitions():
    """In float32, through the logarithm of their size: right where τ < 0, and within rounding / τ near 0."""
    torch.manual_seed(0)
    module = PLSTM1d(16, 2)
    with torch.no_grad():
        module.gates.bias.zero_()
        module.gates.weight.normal_(std=0.1)
    x, weight = torch.randn(2, 300, 16), torch.randn(2, 300, 16)
    z, exact = transition_gradient(copy.deepcopy(module).double(), x.double(), weight.double())
    _, got = transition_gradient(module, x, weight)
    assert 0.3 < (z < 0).double().mean() < 0.7
    error = (got - exact).abs() / exact.abs().max()
    assert error[z.abs() > 0.05].max() <= 1e-5
    assert (error * z.abs().clamp(min=1e-3)).max() <= 1e-5


def test_plstm_with_a_transition_of_zero():
    """What came before is forgotten, and gradients are finite."""
    module = PLSTM1d(4)
    with torch.no_grad():
        module.gates.bias[0] = 0.0
    x = torch.randn(1, 6, 4, requires_grad=True)
    y, (S,) = module(x)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    _, (alone,) = module(x[:, 5:])
    torch.testing.assert_close(S, alone, atol=1e-7, rtol=1e-5)


def test_plstm_modes_reach_different_nodes():
    """P spreads to every node. Both read all four ways, so that every node is seen by every other."""
    torch.manual_seed(0)
    for mode in ("P", "D"):
        module, x = PLSTM2d(8, 2, mode).double(), torch.randn(1, 4, 5, 8, dtype=torch.float64)
        y, other = module(x), x.clone()
        other[0, 1, 2] += 1
        assert ((module(other) - y).abs().amax((0, 3)) > 0).all()


def test_plstm_of_a_turned_grid():
    """All flips are read: with the gates of the flips exchanged, a mirrored grid gives the mirrored output."""
    torch.manual_seed(0)
    for mode in ("P", "D"):
        module = PLSTM2d(8, 2, mode).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
            mirrored = copy.deepcopy(module)
            gates = [mirrored.gates] + ([mirrored.orientation] if mode == "P" else [])
            for layer in gates:
                for parameter in layer.parameters():
                    by_flip = parameter.reshape(4, -1, *parameter.shape[1:])
                    parameter.copy_(by_flip[[1, 0, 3, 2]].reshape_as(parameter))
        x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
        torch.testing.assert_close(mirrored(x.flip(1)), module(x).flip(1))


def test_plstm_p_mode_keeps_its_total_on_large_grids():
    """Nothing grows over 60 × 50 nodes, with transitions that would be negative too."""
    torch.manual_seed(0)
    module = PLSTM2d(8, 2, "P")
    with torch.no_grad():
        module.gates.weight.normal_(std=0.5)
        y = module(torch.randn(1, 60, 50, 8))
    assert y.isfinite().all() and y.abs().max() < 10


def test_plstm_grids_without_nodes():
    module = PLSTM2d(8, 2)
    for shape in ((0, 3, 4, 8), (2, 0, 4, 8), (2, 3, 0, 8), (2, 1, 1, 8)):
        assert module(torch.randn(shape)).shape == shape


def test_plstm_names_a_bad_mode():
    with pytest.raises(ValueError, match="PLSTM2d: mode: expected 'P' or 'D', got 'X'"):
        PLSTM2d(8, mode="X")


def test_incoming_states_are_shifted_by_a_node():
    x = torch.arange(6.0).reshape(1, 3, 2, 1, 1)
    assert before(x, 1, False).flatten().tolist() == [0, 0, 0, 1, 2, 3]
    assert before(x, 1, True).flatten().tolist() == [2, 3, 4, 5, 0, 0]
    assert before(x, 2, True).flatten().tolist() == [1, 0, 3, 0, 5, 0]
