"""What is special to Mamba-2, LightNet and prefix linear attention: windows, lengths, prompts, wrong sizes."""

import math

import pytest
import torch

import seqops
from tests.test_modules import distance


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


def test_mamba2_window_forgets_what_lies_behind():
    """Beyond window and taps an input changes nothing; without a window it still does."""
    x = random(1, 20, 8)
    other = torch.cat([random(1, 4, 8), x[:, 4:]], 1)
    for window, equal in ((6, True), (None, False)):
        torch.manual_seed(0)
        module = seqops.nn.Mamba2(8, 4, 4, window=window, dtype=torch.float64)
        first = 4 - 1 + (6 - 1) + (4 - 1) + 1
        assert torch.equal(module(x)[0][:, first:], module(other)[0][:, first:]) == equal


def test_mamba2_state_has_one_size_from_the_start():
    """A window's rows are there before they are filled, so that a compiled step meets one shape."""
    module = seqops.nn.Mamba2(8, 4, 4, window=7)
    _, short = module.step(torch.randn(2, 8))
    _, long = module(torch.randn(2, 30, 8), short)
    assert [part.shape for part in short[1]] == [part.shape for part in long[1]]
    assert [part.shape[1] for part in long[1]] == [6, 6, 6]


def test_mamba2_starts_as_published():
    """Rates between 1 and 16, steps between 0.001 and 0.1: also in bfloat16, whose parameters are rounded."""
    module = seqops.nn.Mamba2(256, head_size=4)
    rate, step = module.log_rate.exp(), torch.nn.functional.softplus(module.step_bias)
    assert rate.min() >= 1 and rate.max() <= 16 and rate.min() < 3 and rate.max() > 12
    assert step.min() >= 0.00099 and step.max() <= 0.101 and step.min() < 0.004 and step.max() > 0.05
    assert all(parameter.isfinite().all() for parameter in seqops.nn.Mamba2(64, dtype=torch.bfloat16).parameters())


def test_lightnet_starts_with_the_first_value_and_keeps_averages():
    """The state's rows are averages of the values: after one step the value itself, and 1 where all values are 1."""
    module = seqops.nn.LightNet(8, 2, 3, 4, dtype=torch.float64)
    x = random(2, 1, 8)
    _, (state, _) = module(x)
    value = module.value(x).unflatten(-1, (2, 4))[:, 0]
    torch.testing.assert_close(state, value[:, :, None].expand(-1, -1, 3, -1))
    with torch.no_grad():
        module.value.weight.zero_()
        module.value.weight[:, 0] = 1.0
    x = torch.cat([torch.ones(2, 40, 1, dtype=torch.float64), random(2, 40, 7)], -1)
    _, (state, _) = module(x)
    torch.testing.assert_close(state, torch.ones_like(state))


def test_lightnet_keeps_its_digits_over_many_steps():
    """The decays of 20000 steps multiply to e^{z_0 - z_T}: in float32 their logarithms keep 5 digits."""
    module = seqops.nn.LightNet(4, 1, 2, 2)
    x = torch.randn(1, 20000, 4)
    with torch.no_grad():
        y, (state, z) = module(x)
        exact, (exact_state, exact_z) = module.double()(x.double())
    assert distance(state, exact_state) <= 1e-4 and distance(z, exact_z) <= 1e-5 and distance(y, exact) <= 1e-4
    assert z.max() > math.log(10000)


def test_lightnet_grid_reads_every_shape_of_grid():
    """A column and a row hold the same positions along another axis, and one axis alone is a sequence."""
    module = seqops.nn.LightNetGrid(8, 1, 2, 4, 3, dtype=torch.float64)
    assert module(random(2, 9, 8)).shape == (2, 9, 8)
    module = seqops.nn.LightNetGrid(8, 2, 2, 4, 3, dtype=torch.float64)
    x = random(2, 5, 1, 8)
    assert module(x).shape == x.shape
    assert not torch.allclose(module(x), module(x.transpose(1, 2)).transpose(1, 2))
    with pytest.raises(ValueError, match=r"LightNetGrid: x: expected \[B, 2 axes, D = 8\], got shape \[2, 5, 8\]"):
        module(x[:, :, 0])


def test_prefix_is_read_in_both_directions_and_what_follows_is_not():
    """Outputs at the prompt's start depend on the prompt's end; nowhere on what comes after the prompt."""
    module = seqops.nn.PrefixLinearAttention(8, 2, 4, dtype=torch.float64)
    x, M = random(1, 12, 8), 5
    y, _ = module(x, prefix=M)
    inside, after = x.clone(), x.clone()
    inside[:, M - 1] += 1
    after[:, 8] += 1
    assert (module(inside, prefix=M)[0] - y)[:, 0].abs().max() > 1e-3
    assert (module(inside)[0] - module(x)[0])[:, 0].abs().max() == 0
    assert distance(module(after, prefix=M)[0][:, :8], y[:, :8]) <= 1e-12
    assert (module(after, prefix=M)[0] - y)[:, 8].abs().max() > 1e-3


def test_prefix_then_pieces_then_steps():
    """Reading the prompt, then the sequence from that state in any pieces: what one call gives."""
    module = seqops.nn.PrefixLinearAttention(8, 2, 4, dtype=torch.float64)
    x = random(2, 12, 8)
    whole, last = module(x, prefix=5)
    first, state = module(x[:, :7], module.prefix(x[:, :5]))
    parts = [first]
    for t in range(7, 12):
        y, state = module.step(x[:, t], state)
        parts.append(y[:, None])
    assert distance(torch.cat(parts, 1), whole) <= 1e-9 and distance(state, last) <= 1e-9


def test_prefixes_of_different_lengths():
    """Each row counts its own prompt alone, and none at length 0; what pads a prompt does not matter, even NaN."""
    module = seqops.nn.PrefixLinearAttention(8, 2, 4, dtype=torch.float64)
    prompt, x, lengths = random(3, 6, 8), random(3, 4, 8), torch.tensor([6, 2, 0])
    y, _ = module(x, module.prefix(prompt, lengths))
    for row, length in enumerate(lengths.tolist()):
        alone, _ = module(x[row : row + 1], module.prefix(prompt[row : row + 1, :length]))
        assert distance(y[row : row + 1], alone) <= 1e-12
    padded = torch.where(torch.arange(6)[None, :, None] < lengths[:, None, None], prompt, math.nan)
    assert torch.equal(module(x, module.prefix(padded, lengths))[0], y)


def test_prefix_linear_attention_in_float16_is_long():
    """The sum of more weights than float16 counts: the average is still that of float32."""
    torch.manual_seed(0)
    module, x = seqops.nn.PrefixLinearAttention(2, 1, 1).half(), torch.randn(1, 70000, 2).half() + 1
    with torch.no_grad():
        y, _ = module(x)
        expected, _ = module.float()(x.float())
    assert distance(y[:, -1], expected[:, -1]) <= 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: seqops.nn.Mamba2(8, 4, 3), "Mamba2: expand * dim: expected a multiple of head_size = 3, got 16"),
        (
            lambda: seqops.nn.Mamba2(8, 4, 4, num_groups=3),
            "Mamba2: heads: expected a multiple of num_groups = 3, got 4",
        ),
        (lambda: seqops.nn.Mamba2(8, 4, 4, window=0), "Mamba2: window: expected a whole number of at least 1, got 0"),
        (
            lambda: seqops.nn.Mamba2(8, 4, 4, decay_scale=0.0),
            "Mamba2: decay_scale: expected a number above 0, got 0.0",
        ),
        (lambda: seqops.nn.GLA(12, 4), "GLA: key_dim: expected a multiple of num_heads = 4, got 6"),
        (lambda: seqops.nn.GLA(8, temperature=-1.0), "GLA: temperature: expected a number above 0, got -1.0"),
        (lambda: seqops.nn.RetNet(12, 4), "RetNet: dim: expected a multiple of 2 * num_heads = 8, got 12"),
        (lambda: seqops.nn.RetNet(8, 2, base=0.0), "RetNet: base: expected a number above 0, got 0.0"),
        (
            lambda: seqops.nn.LightNetGrid(8, key_size=4, base=-2.0),
            "LightNetGrid: base: expected a number above 0, got -2.0",
        ),
        (lambda: seqops.nn.LightNet(8, 3), "LightNet: dim: expected a multiple of num_heads = 3, got 8"),
        (lambda: seqops.nn.LightNet(8, key_size=0), "LightNet: key_size: expected a whole number of at least 1, got 0"),
        (
            lambda: seqops.nn.LightNetGrid(8, 3, key_size=4),
            "LightNetGrid: key_size: expected a multiple of axes = 3, got 4",
        ),
        (
            lambda: seqops.nn.PrefixLinearAttention(8, 2)(torch.zeros(1, 3, 8), prefix=4),
            "PrefixLinearAttention: prefix: expected a number from 0 to T = 3, got 4",
        ),
        (
            lambda: seqops.nn.PrefixLinearAttention(8, 2).prefix(torch.zeros(1, 3, 8), torch.tensor([1, 2])),
            "PrefixLinearAttention: lengths: expected [B = 1], got shape [2]",
        ),
    ],
    ids=lambda value: value.split(", got")[0].replace(" ", "-") if isinstance(value, str) else "",
)
def test_wrong_sizes(make, message):
    with pytest.raises(ValueError) as raised:
        make()
    assert str(raised.value) == message
