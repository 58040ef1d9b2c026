"""State-space modules: where their systems start, their discretisations, and what is special to one of them."""

import math

import pytest
import torch
from torch import Tensor

import seqops
from seqops.nn import diagonal, ssm
from tests.test_modules import distance


def impulse(A: Tensor, b: Tensor, c: Tensor, T: int) -> Tensor:
    """c Aᵗ b for t < T, one product after another."""
    rows = []
    for _ in range(T):
        rows.append((c * b).sum(-1))
        b = (A @ b[..., None])[..., 0]
    return torch.stack(rows, -1)


# ---- where systems start


@pytest.mark.parametrize("N", [2, 8, 64])
def test_normal_part_of_legs(N):
    """V diag(λ) V* - P Pᵀ is LegS, with V orthonormal, when each pair has its conjugate."""
    A, B = ssm.legs(N)
    eigenvalues, P, b, V = ssm.normal_legs(N)
    assert torch.equal(eigenvalues.real, torch.full((N // 2,), -0.5, dtype=torch.float64))
    assert bool((eigenvalues.imag > 0).all())
    both, values = torch.cat([V, V.conj()], 1), torch.cat([eigenvalues, eigenvalues.conj()])
    torch.testing.assert_close(both.mH @ both, torch.eye(N, dtype=torch.complex128), atol=1e-12, rtol=0)
    low = (torch.arange(N, dtype=torch.float64) + 0.5).sqrt()
    assert distance((both * values @ both.mH).real, A + torch.outer(low, low)) <= 1e-12
    for small, whole in ((P, low), (b, B)):
        assert distance(2 * (V @ small).real, whole) <= 1e-12


def test_legs_by_hand():
    A, B = ssm.legs(3)
    expected = [[-1, 0, 0], [-math.sqrt(3), -2, 0], [-math.sqrt(5), -math.sqrt(15), -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, 3, 5], dtype=torch.float64).sqrt())


def test_diagonal_starts():
    assert torch.equal(ssm.diagonal_start("lin", 6).imag, math.pi * torch.arange(3, dtype=torch.float64))
    expected = 6 / math.pi * (6 / torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64) - 1)
    torch.testing.assert_close(ssm.diagonal_start("inv", 6).imag, expected)
    assert torch.equal(ssm.diagonal_start("legs", 6), ssm.normal_legs(6)[0])


def test_s4_starts_as_legs():
    """In the basis of its normal part the layer is HiPPO-LegS, read by any C: the same response to an impulse."""
    N, T = 16, 40
    torch.manual_seed(0)
    module = seqops.nn.S4(3, state_size=N, dtype=torch.float64)
    A, b, c = module.system()
    V = ssm.normal_legs(N)[3]
    c_dense = 2 * (torch.view_as_complex(module.c[0]) @ V.mH).real
    A_dense, b_dense = ssm.bilinear(*ssm.legs(N), module.log_step.exp())
    expected = impulse(A_dense, b_dense, c_dense, T)
    assert distance(impulse(A, b, c[0], T), expected) <= 1e-10
    assert distance(module.kernel(A, c[0], T), expected) <= 1e-9


@pytest.mark.parametrize("module", [seqops.nn.S5(4, 12, num_blocks=3), seqops.nn.ConvS5(4, 6, norm_groups=2)])
def test_s5_starts_as_legs(module):
    """Real parts are -½, and B and C are those of a real system: its conjugate half is not missing."""
    decay = module.log_decay.exp() + 1e-4
    torch.testing.assert_close(decay, torch.full_like(decay, 0.5))
    states = 4 if isinstance(module, seqops.nn.S5) else 12
    torch.testing.assert_close(module.frequency.detach()[: states // 2].double(), ssm.normal_legs(states)[0].imag)


def test_lmu_keeps_a_delay():
    """From the memory of a slow wave, Legendre polynomials give back what it was theta steps ago, and half of that."""
    N, theta, T = 12, 100.0, 400
    A, b = ssm.hold(*ssm.lmu(N, theta))
    wave = torch.sin(2 * math.pi * torch.arange(T, dtype=torch.float64) / 120)
    m = torch.zeros(N, dtype=torch.float64)
    for u in wave:
        m = A @ m + b * u
    # Shifted Legendre polynomials at the end of the window are 1, in its middle P_i(0).
    middle = [1.0, 0.0]
    for i in range(1, N - 1):
        middle.append(-i * middle[i - 1] / (i + 1))
    # A step is held for its length, so that a time theta ago is where two of them meet.
    for weights, steps in ((torch.ones(N, dtype=torch.float64), 100), (torch.tensor(middle, dtype=torch.float64), 50)):
        assert abs(float(weights @ m - (wave[-steps] + wave[-steps - 1]) / 2)) < 2e-3


# ---- discretisations


def test_holds_agree():
    """The exponential of the joined matrix, and the diagonal formula with its series near 0."""
    eigenvalues = torch.tensor([-2.0, -0.5, -1e-3, -1e-7, 0.0], dtype=torch.float64)
    b = torch.randn(5, dtype=torch.float64)
    A, B = ssm.hold(torch.diag(eigenvalues), b, 0.3)
    z, factor = ssm.hold_diagonal(eigenvalues, torch.tensor(0.3, dtype=torch.float64))
    assert distance(A, torch.diag(z.exp())) <= 1e-14
    assert distance(B, factor * b) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_hold_factor(dtype):
    """Continuous where the series takes over, with finite gradients at 0."""
    x = torch.tensor([0.0, 1e-12, 9.999e-4, 1.001e-3, 0.5, -1.0], dtype=dtype, requires_grad=True)
    y = ssm.hold_factor(x)
    terms = sum(x.detach() ** n / math.factorial(n + 1) for n in range(20))
    torch.testing.assert_close(y, terms, atol=0, rtol=1e-12)
    slope = torch.autograd.grad(y.real.sum(), x)[0]
    expected = sum(n * x.detach().conj() ** (n - 1) / math.factorial(n + 1) for n in range(1, 20))
    torch.testing.assert_close(slope, expected, atol=0, rtol=1e-8)


def test_bilinear_rules():
    """α = ½ keeps the unit circle of a lossless system; α = 1 is the backward Euler rule, α = 0 the forward one."""
    A, b, step = torch.tensor([[0.0, 2.0], [-2.0, 0.0]]).double(), torch.ones(2).double(), torch.tensor(0.1).double()
    middle, _ = ssm.bilinear(A, b, step)
    torch.testing.assert_close(middle.mT @ middle, torch.eye(2).double())
    forward, entering = ssm.bilinear(A, b, step, alpha=0.0)
    torch.testing.assert_close(forward, torch.eye(2).double() + 0.1 * A)
    torch.testing.assert_close(entering, 0.1 * b)
    backward, _ = ssm.bilinear(A, b, step, alpha=1.0)
    torch.testing.assert_close(backward, torch.linalg.inv(torch.eye(2).double() - 0.1 * A))


# ---- precision, compiling, dtypes


@pytest.mark.parametrize("name", ["S4D", "S4", "LSSL", "MegaEMA", "LMU"])
def test_long_sequences_in_float32(name):
    """3000 steps, the last third from a state, against float64: phases and powers keep their digits."""
    torch.manual_seed(0)
    sizes = (2, 3) if name == "LMU" else (2,)
    module, x = getattr(seqops.nn, name)(*sizes, state_size=32), torch.randn(1, 3000, 2)
    with torch.no_grad():
        first, state = module(x[:, :2000])
        second, last = module(x[:, 2000:], state)
        exact, exact_last = module.double()(x.double())
    assert distance(torch.cat([first, second], 1), exact) <= 2e-4
    assert distance(last[0], exact_last[0]) <= 2e-4


@pytest.mark.parametrize("name", ["S4D", "LSSL", "LMU", "MegaAttention"])
def test_compiles_for_any_length(name):
    """One graph each for lengths that change, as torch.compile has it by default."""
    torch.compiler.reset()
    torch.manual_seed(0)
    options = {"chunk_size": 8, "key_dim": 4} if name == "MegaAttention" else {"state_size": 4}
    module = getattr(seqops.nn, name)(4, *([5] if name == "LMU" else []), **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for T in (20, 33, 90):
        x = torch.randn(2, T, 4)
        assert distance(compiled(x)[0], module(x)[0]) <= 1e-5


def test_lmu_keeps_its_system_in_any_dtype():
    module = seqops.nn.LMU(4, 5, state_size=6, theta=7.0)
    exact = [t.clone() for t in module.system()]
    for one, other in zip(module.bfloat16().system(), exact, strict=True):
        assert torch.equal(one, other) and one.dtype == torch.float64
    assert "system_bits" not in module.state_dict()


def test_powers_of_large_phases():
    """e^{lz} at step 100,000 in complex64, of a z whose phase is 2.7 a step."""
    z = torch.tensor([[-1e-6 + 2.7j]], dtype=torch.complex64)
    got = diagonal.powers(z, 1001, 100)[0, 0, -1]
    expected = torch.exp(z.to(torch.complex128) * 100_000)[0, 0]
    assert abs(complex(got) - complex(expected)) <= 1e-6


# ---- what is special to one module


def test_weight_decay_leaves_dynamics_alone():
    for module in (seqops.nn.S4D(4), seqops.nn.S4(4), seqops.nn.S5(4, 4), seqops.nn.ConvS5(32, 4), seqops.nn.LSSL(4)):
        decayed = {id(p) for p in seqops.nn.parameter_groups(module)[0]["params"]}
        spared = [p for name, p in module.named_parameters() if name in module.undecayed]
        assert len(spared) == len(module.undecayed) and not decayed & {id(p) for p in spared}


def test_bidirectional_modules_see_what_follows_once():
    """The published second kernel begins one step later, the present is the first one's. MegaEMA's begins now."""
    torch.manual_seed(0)
    for module, reads_now in ((seqops.nn.S4D(3, 4, bidirectional=True), False), (seqops.nn.MegaEMA(3, 2, True), True)):
        x = torch.randn(1, 6, 3)
        with torch.no_grad():
            whole = module(x)
            (module.c if isinstance(module, seqops.nn.S4D) else module.gamma)[1].zero_()
            changed = (module(x) - whole).abs().amax((0, 2)) > 0
        assert changed.tolist() == [True] * 5 + [reads_now]


@pytest.mark.parametrize(
    ("module", "argument"),
    [
        (lambda: seqops.nn.S4D(4, 4, bidirectional=True), "state"),
        (lambda: seqops.nn.S4(4, 4, bidirectional=True), "state"),
        (lambda: seqops.nn.S5(4, 4, bidirectional=True), "state"),
        (lambda: seqops.nn.MegaEMA(4, 4, bidirectional=True), "state"),
        (lambda: seqops.nn.MegaAttention(4, 4, 4, causal=False), "state"),
    ],
)
def test_bidirectional_modules_refuse_states(module, argument):
    with pytest.raises(ValueError, match=f"{argument}: expected None where"):
        module()(torch.randn(1, 3, 4), (torch.zeros(1),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seqops.nn.S4D(4, state_size=5), "S4D: state_size: expected an even number, got 5"),
        (lambda: seqops.nn.S4D(4, init="hippo"), "S4D: init: expected 'legs', 'lin' or 'inv', got 'hippo'"),
        (lambda: seqops.nn.S4D(4, step_min=0.0), r"S4D: step_min: expected 0 < step_min <= step_max = 0.1, got 0.0"),
        (lambda: seqops.nn.S4(4, state_size=3), "S4: state_size: expected an even number, got 3"),
        (
            lambda: seqops.nn.S5(4, 12, num_blocks=4),
            r"a multiple of 2 \* num_blocks = 8, got 12",
        ),
        (lambda: seqops.nn.ConvS5(32, kernel_size=4), "ConvS5: kernel_size: expected an odd number, got 4"),
        (lambda: seqops.nn.ConvS5(30), "ConvS5: dim: expected a multiple of norm_groups = 32, got 30"),
        (lambda: seqops.nn.LSSL(0), "LSSL: dim: expected a whole number of at least 1, got 0"),
        (lambda: seqops.nn.LMU(4, 4, theta=0.0), "LMU: theta: expected a number above 0, got 0.0"),
        (lambda: seqops.nn.LMUFormer(4, ratio=0), "LMUFormer: ratio: expected a whole number of at least 1, got 0"),
        (lambda: seqops.nn.MegaEMA(4, 0), "MegaEMA: state_size: expected a whole number of at least 1, got 0"),
        (
            lambda: seqops.nn.MegaAttention(4, key_dim=4, value_dim=6),
            "MegaAttention: value_dim: expected a multiple of key_dim = 4, got 6",
        ),
        (
            lambda: seqops.nn.MegaAttention(4, activation="relu"),
            "MegaAttention: activation: expected 'softmax', 'laplace' or 'relu2', got 'relu'",
        ),
        (lambda: seqops.nn.TCNCA(4, chunk_size=0), "TCNCA: chunk_size: expected a whole number of at least 1, got 0"),
    ],
)
def test_constructors_name_what_is_wrong(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_open_chunks_hold_less_than_a_chunk():
    """Keys and values are kept up to the end of their chunk, then dropped."""
    module, state = seqops.nn.MegaAttention(4, chunk_size=3, key_dim=2), None
    for t in range(8):
        _, state = module.step(torch.randn(2, 4), state)
        assert state[1].shape[1] == state[2].shape[1] == (t + 1) % 3


@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_attention_in_chunks_stays_in_them(activation):
    """With averages of no reach, a value changes what follows in its chunk, and no other chunk."""
    torch.manual_seed(0)
    module = seqops.nn.MegaAttention(4, chunk_size=4, key_dim=4, activation=activation).double()
    with torch.no_grad():
        module.average.gamma.zero_()
        module.gamma.fill_(2.0)
        module.gates.weight.mul_(50)
        module.bias.abs_()
    x = torch.randn(1, 12, 4, dtype=torch.float64)
    moved = x.clone()
    moved[:, 5] += 1
    changed = (module(moved)[0] - module(x)[0]).abs().amax((0, 2)) > 0
    assert changed.tolist() == [t in (5, 6, 7) for t in range(12)]


def test_field_of_dilated_convolutions():
    """The defaults see 1365 steps: 1 + 4 (1 + 4 + 16 + 64 + 256)."""
    torch.manual_seed(0)
    module = seqops.nn.TCNCA(2, chunk_size=1, key_dim=2).double().average
    with torch.no_grad():
        module.weight.fill_(0.3)
    x = torch.zeros(1, 1400, 2, dtype=torch.float64, requires_grad=True)
    reached = torch.autograd.grad(module(x)[0][:, -1].sum(), x)[0].abs().amax((0, 2)) > 0
    assert reached.nonzero()[0].item() == 1400 - 1365


def test_conv_s5_keeps_a_frame_in_place():
    """A pixel reaches what three convolutions before and in the block reach, no further, and all later frames."""
    torch.manual_seed(0)
    module = seqops.nn.ConvS5(2, 3, norm_groups=1).double()
    with torch.no_grad():
        for norm in module.norms:  # a group norm reaches all pixels of its frame
            norm.weight.zero_()
    x = torch.randn(1, 3, 9, 9, 2, dtype=torch.float64)
    moved = x.clone()
    moved[:, 1, 4, 4] += 1
    changed = (module(moved)[0] - module(x)[0]).abs().amax((0, -1)) > 0
    near = torch.zeros(9, 9, dtype=torch.bool)
    near[2:7, 2:7] = True
    assert not changed[0].any()
    assert torch.equal(changed[1], near) and torch.equal(changed[2], near)


def test_mega_ema_without_memory():
    """Gates so open that q rounds to 0: a step keeps nothing of the past, and nothing is infinite."""
    torch.manual_seed(0)
    module = seqops.nn.MegaEMA(2, 3)
    with torch.no_grad():
        module.delta.fill_(20.0)
        module.alpha.fill_(20.0)
    x = torch.randn(1, 6, 2)
    y, state = module(x)
    weight = (module.beta * module.gamma)[0].sum(-1) / math.sqrt(3) + module.omega
    torch.testing.assert_close(y, torch.nn.functional.silu(weight * x))
    torch.testing.assert_close(module.step(x[:, 0], state)[0], y[:, 0])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "module",
    [
        seqops.nn.S4D(4, 4, bidirectional=True),
        seqops.nn.S4(4, 4, bidirectional=True),
        seqops.nn.S5(4, 4, bidirectional=True),
        seqops.nn.MegaEMA(4, bidirectional=True),
        seqops.nn.MegaAttention(4, 4, 4, causal=False),
    ],
    ids=lambda module: type(module).__name__,
)
def test_both_ways_there_are_no_steps(module):
    """Also of two rows, which an unpacking would take for y and state."""
    with pytest.raises(ValueError, match=": step: expected a causal module, got "):
        module.step(torch.randn(2, 4))
