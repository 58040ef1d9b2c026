"""block_diffusion_attention on the CPU and the other backends: against the reference, leaks, decoding of blocks."""

import importlib.util
import math
from collections.abc import Callable
from functools import partial

import cases
import pytest
import torch
from cases import Case, assert_within, evaluate, exact_results
from cases.block_diffusion_attention import Case as Diffusion
from torch.nn.functional import scaled_dot_product_attention

import seqops
from seqops.attention import reference

OP = "block_diffusion_attention"
params = partial(cases.params, operators=(OP,))
make = partial(Diffusion, OP)


@pytest.mark.parametrize("block_size", [1, 2, 5, 8, 100])
@pytest.mark.parametrize("L", [0, 1, 5, 16, 17])
def test_reference_is_the_set(L: int, block_size: int) -> None:
    got = reference.block_diffusion_counts(2 * L, block_size, torch.device("cpu"))
    expected = torch.zeros(2 * L, 2 * L, dtype=torch.int64)
    for i in range(L):
        b = i // block_size
        for j in range(L):
            c = j // block_size
            expected[i, j] = b == c
            expected[i, L + j] = c < b
            expected[L + i, L + j] = c <= b
    assert torch.equal(got, expected)
    if L % block_size == 0:
        assert expected.sum() == L * L + L * block_size


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """o and lse, and the gradients by all of q, k, v for random gradients of both."""
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = exact_results(case, inputs, cotangents)
    got = evaluate(case.operator, inputs, cotangents)
    assert [got["0"].dtype, got["1"].dtype] == case.output_dtypes
    assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("case", params(where=lambda case: case.T == 300))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    cases.assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)


@pytest.mark.parametrize("size", [2**40, 2**63 - 1])
def test_blocks_of_any_size(size: int) -> None:
    """The largest integers are one block, like any other that is as long as a half."""
    inputs = make(B=1, T=18, block_size=9).inputs()
    expected = seqops.block_diffusion_attention(**inputs)
    got = seqops.block_diffusion_attention(**inputs | {"block_size": size})
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("poison", ["other numbers", "nan"])
def test_nothing_leaks_across_blocks(poison: str) -> None:
    """Rows of a block, noisy and clean, have the same bits whatever later blocks hold, and whatever noisy rows of any
    other block do."""
    L, size = 18, 4
    case = make(B=2, T=2 * L, block_size=size)
    inputs = {name: v.detach() if torch.is_tensor(v) else v for name, v in case.inputs().items()}
    o, lse = seqops.block_diffusion_attention(**inputs)
    block = torch.arange(L) // size
    for b in range(int(block.max()) + 1):
        unseen = torch.cat([block != b, block > b])  # noisy rows of other blocks; clean rows of later ones
        changed = dict(inputs)
        for name in "qkv":
            changed[name] = inputs[name].clone()
            changed[name][:, unseen] = math.nan if poison == "nan" else torch.randn_like(changed[name][:, unseen])
        again, again_lse = seqops.block_diffusion_attention(**changed)
        for rows in (torch.cat([block == b, block < 0]), torch.cat([block < 0, block == b])):
            assert torch.equal(again[:, rows], o[:, rows])
            assert torch.equal(again_lse[..., rows], lse[..., rows])


def test_clean_rows_see_no_noise_and_their_own_block() -> None:
    """No gradient of a clean row reaches a noisy key; a noisy row's own clean block stays hidden from it."""
    L, size = 12, 4
    inputs = make(B=1, T=2 * L, block_size=size, dtype=torch.float64).inputs()
    o, _ = seqops.block_diffusion_attention(**inputs)
    clean, noisy = (
        torch.autograd.grad(rows.square().sum(), (inputs["k"], inputs["v"]), retain_graph=True)
        for rows in (o[:, L:], o[:, size : 2 * size])
    )
    for grad in clean:
        assert (grad[:, :L] == 0).all() and (grad[:, L:] != 0).all()
    for grad in noisy:
        seen = torch.zeros(2 * L, dtype=torch.bool)
        seen[size : 2 * size] = True
        seen[L : L + size] = True
        assert (grad[:, ~seen] == 0).all() and (grad[:, seen] != 0).all()


def test_blocks_from_a_cache_equal_the_whole() -> None:
    """The clean rows of closed blocks and the rows of the current one: plain attention."""
    L, size = 14, 4
    case = make(B=2, T=2 * L, H=4, Hk=2, block_size=size, dtype=torch.float64)
    q, k, v = (case.inputs()[name].detach() for name in "qkv")
    whole, _ = seqops.block_diffusion_attention(q, k, v, size)

    def attend(rows: slice, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        heads = (x.movedim(1, 2) for x in (q[:, rows], keys, values))
        return scaled_dot_product_attention(*heads, enable_gqa=True).movedim(1, 2)

    for start in range(0, L, size):
        stop = min(start + size, L)
        noisy, clean = slice(start, stop), slice(L + start, L + stop)
        cached_k, cached_v = k[:, L : L + start], v[:, L : L + start]
        keys, values = torch.cat([cached_k, k[:, noisy]], 1), torch.cat([cached_v, v[:, noisy]], 1)
        torch.testing.assert_close(attend(noisy, keys, values), whole[:, noisy])
        keys, values = torch.cat([cached_k, k[:, clean]], 1), torch.cat([cached_v, v[:, clean]], 1)
        torch.testing.assert_close(attend(clean, keys, values), whole[:, clean])


# ---------------------------------------------------------------- other backends


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_in_the_interpreter(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked `tiny`, by the Triton kernels, in a process of their own."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")
