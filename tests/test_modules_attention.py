"""What is special to modules of sparse attention: decoding, selections, centroids, error texts."""

import math

import pytest
import torch

from seqops import nn


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


# ---- block diffusion


@pytest.fixture
def diffusion() -> nn.BlockDiffusionAttention:
    torch.manual_seed(0)
    return nn.BlockDiffusionAttention(8, 2, 4, dtype=torch.float64)


@pytest.mark.parametrize("pieces", [(12,), (4, 8), (4, 4, 4), (8, 3)])
def test_cache_of_clean_blocks_is_exact(diffusion, pieces):
    """Noisy blocks from the cache, and clean ones in any pieces of whole blocks, give what the training form gives."""
    L = sum(pieces)
    noisy, clean = drawn(2, L, 8), drawn(2, L, 8)
    expected_noisy, expected_clean = diffusion(torch.cat([noisy, clean], 1)).chunk(2, 1)
    cache, start = None, 0
    for length in pieces:
        block = slice(start, min(start + 4, L))
        torch.testing.assert_close(diffusion.denoise(noisy[:, block], cache), expected_noisy[:, block])
        y, cache = diffusion.extend(clean[:, start : start + length], cache)
        torch.testing.assert_close(y, expected_clean[:, start : start + length])
        start += length
    assert cache[0].shape == (2, L, 2, 4)


def test_denoising_leaves_the_cache(diffusion):
    _, cache = diffusion.extend(drawn(1, 4, 8))
    before = [t.clone() for t in cache]
    diffusion.denoise(drawn(1, 4, 8), cache)
    assert all(torch.equal(one, other) for one, other in zip(cache, before, strict=True))


def test_block_diffusion_errors(diffusion):
    with pytest.raises(ValueError, match="BlockDiffusionAttention: x: expected an even number of steps"):
        diffusion(drawn(1, 7, 8))
    with pytest.raises(ValueError, match="BlockDiffusionAttention: x: expected at most block_size = 4 steps, got 5"):
        diffusion.denoise(drawn(1, 5, 8))
    _, cache = diffusion.extend(drawn(1, 3, 8))
    with pytest.raises(ValueError, match="cache: expected a multiple of block_size = 4 steps, got 3"):
        diffusion.denoise(drawn(1, 4, 8), cache)


# ---- routing


def routing(**options) -> nn.RoutingAttention:
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 4, "num_local_heads": 2, "window": 4, "num_clusters": 3, "size": 3}
    return nn.RoutingAttention(**sizes | options, dtype=torch.float64)


def test_centroids_move_towards_their_tokens():
    module, x = routing(decay=0.9), drawn(2, 17, 16)
    before = module.centroids.clone()
    module(x)
    assert torch.equal(module.centroids, before), "a forward changes nothing"
    shared = torch.nn.functional.layer_norm(module.shared(x).unflatten(-1, (2, 4)), (4,))
    nearest = torch.einsum("bthd,hkd->bthk", shared, before).argmax(-1)
    module.update_centroids()
    for h in range(2):
        for c in range(3):
            mine = shared[:, :, h][nearest[:, :, h] == c]
            expected = before[h, c] if len(mine) == 0 else 0.9 * before[h, c] + 0.1 * mine.mean(0)
            torch.testing.assert_close(module.centroids[h, c], expected)
    assert not torch.equal(module.centroids, before)
    with pytest.raises(RuntimeError, match="expected a forward in training mode"):
        module.update_centroids()


def test_centroids_are_saved_and_not_trained():
    module = routing()
    assert "centroids" in module.state_dict() and "centroids" not in dict(module.named_parameters())
    module.eval()(drawn(1, 5, 16))
    with pytest.raises(RuntimeError, match="expected a forward in training mode"):
        module.update_centroids()


def test_routing_errors():
    with pytest.raises(ValueError, match="RoutingAttention: num_local_heads: expected 1 to num_heads - 1 = 3, got 4"):
        routing(num_local_heads=4)
    with pytest.raises(ValueError, match=r"RoutingAttention: decay: expected a number from 0 to 1, got 2\.0"):
        routing(decay=2.0)


def test_routing_sees_nothing_of_the_future():
    module, x = routing().eval(), drawn(2, 17, 16)
    changed = x.clone()
    changed[:, 9:] = drawn(2, 8, 16)
    assert torch.equal(module(x)[0][:, :9], module(changed)[0][:, :9])


# ---- Combiner


@pytest.mark.parametrize("pattern", ["fixed", "logsparse", "axial"])
def test_combiner_sees_nothing_of_the_future(pattern):
    torch.manual_seed(0)
    module, x = nn.Combiner(8, 2, 3, pattern, dtype=torch.float64), drawn(1, 14, 8)
    changed = x.clone()
    changed[:, 8:] = drawn(1, 6, 8)
    assert torch.equal(module(x)[0][:, :8], module(changed)[0][:, :8])
    assert not torch.equal(module(x)[0][:, 8:], module(changed)[0][:, 8:])


def test_fixed_combiner_keeps_a_row_of_a_closed_block():
    module = nn.Combiner(8, 2, 4, dtype=torch.float64)
    _, (open_block, closed) = module(drawn(3, 18, 8))
    assert open_block.shape == (3, 2, 3, 2, 4) and closed.shape == (3, 4, 2, 2, 4)


def test_combiner_errors():
    with pytest.raises(ValueError, match="Combiner: pattern: expected one of fixed, logsparse, axial, got 'row'"):
        nn.Combiner(8, 2, 4, "row")
    with pytest.raises(ValueError, match="Combiner: pool: expected one of max, mean, got 'sum'"):
        nn.Combiner(8, 2, 4, pool="sum")
    with pytest.raises(ValueError, match="Combiner: dim: expected a multiple of num_heads = 3, got 8"):
        nn.Combiner(8, 3, 4)
    both_ways = nn.Combiner(8, 2, 4, causal=False)
    with pytest.raises(ValueError, match="Combiner: state: expected None where causal is False, got a state"):
        both_ways(torch.randn(1, 4, 8), ())


# ---- selected queries, forecasts


def test_samples_are_drawn_anew_in_training_alone():
    torch.manual_seed(0)
    module, x = nn.ProbSparseAttention(8, 2, factor=1, dtype=torch.float64), drawn(1, 40, 8)
    assert len({module(x).sum().item() for _ in range(6)}) > 1
    module.eval()
    assert len({module(x).sum().item() for _ in range(6)}) == 1


@pytest.mark.parametrize("T", [0, 1, 2, 3])
def test_prob_sparse_of_short_sequences(T):
    for training in (True, False):
        module = nn.ProbSparseAttention(8, 2).train(training)
        assert module(torch.randn(2, T, 8)).isfinite().all() and module(torch.randn(2, T, 8)).shape == (2, T, 8)


def test_informer_learns_a_sine():
    """A forecast that is much better than the mean after a few steps, of other values and times."""
    torch.manual_seed(0)
    model = nn.Informer(1, 6, dim=16, num_heads=2, known=8, time_features=2, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def series() -> tuple[torch.Tensor, ...]:
        t = torch.rand(16, 1, 1) * 20 + torch.arange(30.0)[None, :, None]
        phase = 2 * math.pi * t / 12
        x, time = phase.sin() + 0.1 * torch.randn(t.shape), torch.cat([phase.sin(), phase.cos()], -1)
        return x[:, :24], time[:, :24], time[:, 24:], x[:, 24:]

    for _ in range(60):
        x, time, ahead, target = series()
        optimizer.zero_grad()
        (model(x, time, ahead) - target).square().mean().backward()
        optimizer.step()
    x, time, ahead, target = series()
    assert (model.eval()(x, time, ahead) - target).square().mean() < 0.3 * target.var()


def test_informer_errors():
    with pytest.raises(ValueError, match="Informer: time_features: expected a whole number of at least 0, got -1"):
        nn.Informer(3, 4, time_features=-1)
    model = nn.Informer(3, 4, dim=8, num_heads=2, known=6, time_features=2)
    with pytest.raises(ValueError, match=r"Informer: x: expected at least known = 6 steps, got shape \[2, 5, 3\]"):
        model(torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.randn(2, 4, 2))
    with pytest.raises(ValueError, match=r"Informer: time: expected shape \[2, 8, 2\], got None"):
        model(torch.randn(2, 8, 3))
    with pytest.raises(ValueError, match=r"Informer: time_ahead: expected shape \[2, 4, 2\], got \[2, 8, 2\]"):
        model(torch.randn(2, 8, 3), torch.randn(2, 8, 2), torch.randn(2, 8, 2))


# ---- Longformer, Recformer


def test_global_projections_start_as_copies():
    module = nn.Longformer(8, 2, 2)
    for name in ("query", "key", "value"):
        for one, other in zip(
            getattr(module, f"global_{name}").parameters(), getattr(module.project, name).parameters(), strict=True
        ):
            assert torch.equal(one, other) and one is not other


def test_without_tokens_of_the_sequence_nothing_is_global():
    module, x = nn.Longformer(8, 2, 2, dtype=torch.float64), drawn(2, 9, 8)
    for none in (torch.tensor([], dtype=torch.int64), torch.tensor([9, -1])):
        torch.testing.assert_close(module(x, none), module(x))
    assert module(x[:, :0], torch.tensor([0])).shape == (2, 0, 8)


def test_recformer_scores_and_errors():
    module = nn.Recformer(20, 8, 2, 1, max_tokens=10)
    user, items = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    expected = torch.tensor([[1.0, 0.5**0.5], [0.0, 0.5**0.5]]) / 0.05
    torch.testing.assert_close(module.scores(user, items), expected)
    token = torch.zeros(2, 11, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Recformer: token: expected \[B, T\] with T <= 10, got shape \[2, 11\]"):
        module(token, token, token)
    with pytest.raises(ValueError, match=r"Recformer: kind: expected shape \[2, 4\], got shape \[2, 5\]"):
        module(token[:, :4], token[:, :5], token[:, :4])


# ---- pointers


@pytest.fixture
def pointers() -> nn.PointerNetwork:
    torch.manual_seed(0)
    module = nn.PointerNetwork(3, 8, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(10)
    return module


def test_lengths_hide_what_is_past_them(pointers):
    """A padded row gives what it gives alone, whatever its padding holds."""
    x, target, lengths = drawn(2, 9, 3), torch.randint(5, (2, 4)), torch.tensor([9, 5])
    log_p = pointers(x, target, lengths)
    torch.testing.assert_close(log_p[1:, :, :5], pointers(x[1:, :5], target[1:]))
    torch.testing.assert_close(log_p[:1], pointers(x[:1], target[:1]))
    assert bool((log_p[1, :, 5:] == -torch.inf).all())


def test_decoding_takes_the_likeliest_place(pointers):
    """Decoded places, given back as targets, are those of largest log_p among what is left."""
    x = drawn(3, 7, 3)
    free = pointers.decode(x, 7, again=True)
    assert torch.equal(pointers(x, free).argmax(-1), free)
    once = pointers.decode(x, 7)
    assert torch.equal(once.sort(1).values, torch.arange(7).expand(3, 7))
    log_p = pointers(x, once)
    for i in range(7):
        left = log_p[:, i].clone().scatter(1, once[:, :i], -torch.inf)
        assert torch.equal(left.argmax(1), once[:, i])
    assert pointers.decode(x, 0).shape == (3, 0)
    assert pointers.decode(x, 9, again=True).shape == (3, 9)
    with pytest.raises(ValueError, match="PointerNetwork: steps: expected at most T = 7 unless again, got 8"):
        pointers.decode(x, 8)


def test_pointers_learn_to_sort():
    """Numbers between 0 and 1, pointed at from the smallest: most first places are right after a few steps."""
    torch.manual_seed(0)
    module = nn.PointerNetwork(1, 32)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    for _ in range(150):
        x = torch.rand(64, 4, 1)
        target = x.squeeze(2).argsort(1)
        optimizer.zero_grad()
        torch.nn.functional.nll_loss(module(x, target).flatten(0, 1), target.flatten()).backward()
        optimizer.step()
    x = torch.rand(200, 4, 1)
    assert (module.decode(x, 4)[:, 0] == x.squeeze(2).argmin(1)).float().mean() > 0.8


def test_pointer_errors(pointers):
    with pytest.raises(ValueError, match="PointerNetwork: mode: expected one of additive, clipped_dot, got 'dot'"):
        nn.PointerNetwork(3, 8, "dot")
    with pytest.raises(ValueError, match=r"PointerNetwork: target: expected whole numbers \[B, N\] = \[2, N\], got"):
        pointers(drawn(2, 5, 3), torch.zeros(3, 4, dtype=torch.int64))


# ---- held keys


def test_without_threshold_it_is_causal_attention():
    torch.manual_seed(0)
    module, x = nn.DeltaAttention(8, 2, 0.0, window=2, sink=1, dtype=torch.float64), drawn(2, 12, 8)
    q, k, v = (t.movedim(1, 2) for t in module.project(x))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).movedim(2, 1)
    torch.testing.assert_close(module(x)[0], module.project.join(o))


def test_delta_errors():
    with pytest.raises(ValueError, match="DeltaAttention: mode: expected one of element, row, got 'head'"):
        nn.DeltaAttention(8, 2, mode="head")
    with pytest.raises(ValueError, match=r"DeltaAttention: threshold: expected a number >= 0, got -1\.0"):
        nn.DeltaAttention(8, 2, -1.0)
    with pytest.raises(ValueError, match=r"DeltaAttention: window: expected a whole number >= 0, got 2\.5"):
        nn.DeltaAttention(8, 2, window=2.5)
