"""Operators on clusters of tokens: assignment, gathered lists, routing, moving centroids, and their parts."""

import importlib.util
import itertools
import math
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import cases
import pytest
import torch
from cases import Case, assert_within, evaluate, exact_results
from cases.cluster_assign import Case as Assigned
from cases.gathered_attention import Case as Gathered
from cases.routing_attention import Case as Routed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import seqops
from seqops.attention import reference

ops = torch.ops.seqops
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
params = partial(cases.params, operators=("gathered_attention", "routing_attention"))
assigned = partial(cases.params, operators=("cluster_assign", "update_centroids"))


def plain(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if torch.is_tensor(value) else value for name, value in inputs.items()}


# ---------------------------------------------------------------- the reference itself


def listed(x: Tensor, centroids: Tensor, size: int, mode: str) -> tuple[list[list[int]], list[int]]:
    """Of one head x [T, D], with sorts of Python: the lists, without pads, and the nearest clusters."""
    scores = (x @ centroids.T).tolist()
    nearest = [min(range(len(row)), key=lambda c: (-row[c], c)) for row in scores]
    lists = []
    for c in range(len(centroids)):
        if mode == "balanced":
            lists.append(sorted(sorted(range(len(x)), key=lambda t: (-scores[t][c], t))[:size]))
        else:
            lists.append([t for t in range(len(x)) if nearest[t] == c][:size])
    return lists, nearest


@pytest.mark.parametrize("size", [1, 4, 50])
@pytest.mark.parametrize("mode", ["balanced", "causal"])
def test_assignment_is_that_of_sorting(mode: str, size: int) -> None:
    """Exact scores, many of them equal."""
    generator = torch.Generator().manual_seed(size)
    x = torch.randint(-2, 3, (2, 23, 2, 3), generator=generator).double()
    centroids = torch.randint(-2, 3, (2, 5, 3), generator=generator).double()
    index, nearest = seqops.cluster_assign(x, centroids, size, mode=mode)
    assert index.dtype == nearest.dtype == torch.int32
    assert [*index.shape] == [2, 2, 5, size]
    for b, h in itertools.product(range(2), range(2)):
        lists, clusters = listed(x[b, :, h], centroids[h], size, mode)
        assert nearest[b, :, h].tolist() == clusters
        assert index[b, h].tolist() == [entries + [-1] * (size - len(entries)) for entries in lists]


def test_reference_of_gathered_is_the_table() -> None:
    """Slot by slot, with torch's attention: tokens in no list, in one, in several, twice in one."""
    q, k, v = (torch.randn(1, 7, 1, 4, dtype=torch.float64) for _ in range(3))
    q_index = torch.tensor([[[[0, 3, 3, -1], [3, 5, 7, 1], [5, 2, 0, 0]]]])
    k_index = torch.tensor([[[[4, 0, 4, -5], [6, 6, 9, 3], [1, 5, 5, 5]]]])
    for causal, reduce in itertools.product((False, True), ("mean", "sum", "last")):
        slots: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in range(7)}
        for queries, keys in zip(q_index[0, 0].tolist(), k_index[0, 0].tolist(), strict=True):
            for i in queries:
                seen = [j for j in keys if 0 <= j < 7 and (j <= i or not causal)]
                if 0 <= i < 7 and seen:
                    scores = q[0, i, 0] @ k[0, seen, 0].T / 2
                    slots[i].append((scores.softmax(0) @ v[0, seen, 0], scores.logsumexp(0)))
        o, lse = reference.gathered_attention(q, k, v, q_index, k_index, causal=causal, reduce=reduce)
        for i, results in slots.items():
            if not results:
                assert not o[0, i].any() and lse[0, 0, i] == -math.inf
                continue
            values = torch.stack([value for value, _ in results])
            expected = {"mean": values.mean(0), "sum": values.sum(0), "last": values[-1]}[reduce]
            of_slots = torch.stack([value for _, value in results])
            total = of_slots[-1] if reduce == "last" else of_slots.logsumexp(0)
            torch.testing.assert_close(o[0, i, 0], expected)
            torch.testing.assert_close(lse[0, 0, i], total.float())


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = exact_results(case, inputs, cotangents)
    got = evaluate(case.operator, inputs, cotangents)
    assert [got["0"].dtype, got["1"].dtype] == case.output_dtypes
    assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("case", assigned())
def test_assignment_and_centroids(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    expected = case.reference(**cases.in_float64(inputs))
    assert [output.dtype for output in outputs] == case.output_dtypes
    assert not any(output.requires_grad for output in outputs)
    got, exact = ({str(i): o for i, o in enumerate(results)} for results in (outputs, expected))
    assert_within(got, exact, case.bounds(inputs, [], exact))


@pytest.mark.parametrize("case", params("small", where=lambda case: case.B * case.T > 6))
def test_two_runs_and_any_number_of_threads_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = evaluate(case.operator, inputs, case.cotangents)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            cases.assert_same_bits(evaluate(case.operator, inputs, case.cotangents), first)
    finally:
        torch.set_num_threads(threads)


def test_large_calls_do_not_depend_on_threads() -> None:
    """Large enough for several threads: rows, sums over slots, scores and lists."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 600, 4, 64, generator=generator).requires_grad_() for _ in range(3))
    centroids = torch.randn(4, 16, 64, generator=generator)
    threads = torch.get_num_threads()

    def run(count: int) -> list[Tensor]:
        torch.set_num_threads(count)
        found = [*seqops.cluster_assign(q, centroids, 50), *seqops.cluster_assign(k, centroids, 50, mode="causal")]
        for causal in (True, False):
            o, nearest = seqops.routing_attention(q, k, v, centroids, 64, causal=causal)
            found += [o, nearest, *torch.autograd.grad(o.sum(), (q, k, v))]
        return [*found, seqops.update_centroids(centroids, k, nearest)]

    try:
        assert all(torch.equal(a, b) for a, b in zip(run(1), run(3), strict=True))
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- cluster_assign


def test_not_a_number_ranks_before_all() -> None:
    x = torch.zeros(1, 6, 1, 2, dtype=torch.float64)
    x[0, :, 0, 0] = torch.arange(6)
    x[0, 2, 0, 0] = math.nan
    centroids = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    for mode in ("balanced", "causal"):
        expected = reference.cluster_assign(x, centroids, 2, mode=mode)
        got = seqops.cluster_assign(x, centroids, 2, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    index, nearest = seqops.cluster_assign(x, centroids, 2)
    assert nearest[0, :, 0].tolist() == [0, 1, 0, 1, 1, 1]
    assert index[0, 0].tolist() == [[0, 2], [2, 5]]
    centroids[0, 1] = math.nan
    assert (seqops.cluster_assign(x, centroids, 2)[1] == torch.tensor([1, 1, 0, 1, 1, 1]).view(1, 6, 1)).all()


def test_infinite_scores_and_signed_zeros() -> None:
    """-inf is a score, and both zeros are one."""
    x = torch.tensor([-math.inf, -1.0, 0.0, -0.0, math.inf, 0.0]).view(1, 6, 1, 1)
    centroids = torch.ones(1, 3, 1)
    index, nearest = seqops.cluster_assign(x, centroids, 3)
    assert not nearest.any()
    assert index[0, 0, 0].tolist() == [2, 3, 4]
    assert seqops.cluster_assign(x, centroids, 9)[0][0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]


def test_one_cluster_and_empty_clusters() -> None:
    x = torch.ones(1, 9, 1, 2)
    index, nearest = seqops.cluster_assign(x, torch.tensor([[[0.0, 0.0], [1.0, 1.0], [-1.0, 0.0]]]), 4, mode="causal")
    assert (nearest == 1).all()
    assert index[0, 0].tolist() == [[-1] * 4, [0, 1, 2, 3], [-1] * 4]
    index, _ = seqops.cluster_assign(x, torch.ones(1, 1, 2), 20)
    assert index[0, 0, 0].tolist() == [*range(9), *[-1] * 11]


def test_rows_do_not_depend_on_the_batch() -> None:
    case = Assigned("cluster_assign", B=3, T=70, H=3, D=33, K=20, size=9)
    inputs = plain(case.inputs())
    whole = seqops.cluster_assign(**inputs)
    for b in range(3):
        alone = seqops.cluster_assign(**inputs | {"x": inputs["x"][b : b + 1]})
        assert all(torch.equal(part[0], all_[b]) for part, all_ in zip(alone, whole, strict=True))


# ---------------------------------------------------------------- leaks


def disturbed(inputs: dict[str, Any], t: int) -> dict[str, Any]:
    """Other queries, keys and values after t."""
    changed = dict(inputs)
    for name in "qkv":
        changed[name] = inputs[name].clone()
        changed[name][:, t + 1 :] = 3 * torch.randn_like(changed[name][:, t + 1 :])
    return changed


@pytest.mark.parametrize("size", [1, 3, 30])
def test_causal_routing_does_not_leak(size: int) -> None:
    """Whatever comes later, results have the same bits."""
    inputs = plain(Routed("routing_attention", B=2, T=24, size=size, K=3).inputs())
    before, nearest = seqops.routing_attention(**inputs)
    for t in (0, 5, 11, 22):
        changed = disturbed(inputs, t)
        after, again = seqops.routing_attention(**changed)
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert torch.equal(again[:, : t + 1], nearest[:, : t + 1])
        changed["v"][:, t + 1 :] = math.nan
        assert torch.equal(seqops.routing_attention(**changed)[0][:, : t + 1], before[:, : t + 1])


def causal_gathered(inputs: dict[str, Any], mode: str) -> tuple[Tensor, Tensor]:
    q, k, v = (inputs[name] for name in "qkv")
    lists = [seqops.cluster_assign(x, inputs["centroids"], 6, mode=mode)[0] for x in (q, k)]
    return seqops.gathered_attention(q, k, v, *lists, causal=True)


def test_causal_lists_do_not_leak_and_balanced_lists_do() -> None:
    """A mask alone does not help: a later token displaces an earlier one from a balanced list."""
    inputs = plain(Routed("routing_attention", B=2, T=24, H=2, Hk=2, K=3).inputs())
    before = {mode: causal_gathered(inputs, mode) for mode in ("balanced", "causal")}
    leaks = False
    for t in (5, 11, 20):
        changed = disturbed(inputs, t)
        after = causal_gathered(changed, "causal")
        assert torch.equal(after[0][:, : t + 1], before["causal"][0][:, : t + 1])
        assert torch.equal(after[1][..., : t + 1], before["causal"][1][..., : t + 1])
        leaks |= not torch.equal(causal_gathered(changed, "balanced")[0][:, : t + 1], before["balanced"][0][:, : t + 1])
    assert leaks


def test_published_routing_leaks() -> None:
    inputs = plain(Routed("routing_attention", B=1, T=24, K=3, options=(("causal", False),)).inputs())
    before, _ = seqops.routing_attention(**inputs)
    assert not torch.equal(seqops.routing_attention(**disturbed(inputs, 11))[0][:, :12], before[:, :12])


# ---------------------------------------------------------------- routing


@pytest.mark.parametrize("size", [1, 4, 40])
def test_steps_from_rings_equal_the_whole(size: int) -> None:
    """A ring of `size` rows a cluster and head, as decoding has it: plain attention over the ring."""
    inputs = plain(Routed("routing_attention", B=2, T=29, H=4, Hk=2, size=size, K=3, dtype=torch.float64).inputs())
    q, k, v, centroids = (inputs[name] for name in ("q", "k", "v", "centroids"))
    whole, nearest = seqops.routing_attention(**inputs)
    for b, h in itertools.product(range(2), range(4)):
        rings: dict[int, list[int]] = {c: [] for c in range(3)}
        for t in range(29):
            c = int((centroids[h].double() @ k[b, t, h // 2]).argmax())
            rings[c] = [*rings[c], t][-size:]
            mine = int((centroids[h].double() @ q[b, t, h]).argmax())
            assert mine == nearest[b, t, h]
            if not rings[mine]:
                assert not whole[b, t, h].any()
                continue
            keys, values = (x[b, rings[mine], h // 2].unsqueeze(0) for x in (k, v))
            step = scaled_dot_product_attention(q[b, t, h].view(1, 1, -1), keys, values)
            torch.testing.assert_close(step.view(-1), whole[b, t, h])


def test_routing_equals_causal_lists_where_no_cluster_is_full() -> None:
    """With keys that are the queries, and lists of any length."""
    case = Routed("routing_attention", B=2, T=20, H=2, Hk=2, size=20, dtype=torch.float64)
    inputs = plain(case.inputs())
    inputs["k"] = inputs["q"]
    expected, nearest = seqops.routing_attention(**inputs)
    index, again = seqops.cluster_assign(inputs["q"], inputs["centroids"], 20, mode="causal")
    o, _ = seqops.gathered_attention(inputs["q"], inputs["k"], inputs["v"], index, index, causal=True)
    assert torch.equal(nearest, again)
    torch.testing.assert_close(o, expected)


def test_one_cluster_is_a_window() -> None:
    case = Routed("routing_attention", B=2, T=33, K=1, size=5, dtype=torch.float64)
    inputs = plain(case.inputs())
    expected, _ = seqops.window_attention(inputs["q"], inputs["k"], inputs["v"], 4, 0)
    torch.testing.assert_close(seqops.routing_attention(**inputs)[0], expected)


# ---------------------------------------------------------------- gathered


def test_lists_in_any_order_mean_the_same() -> None:
    inputs = Gathered("gathered_attention", B=2, T=12, dtype=torch.float64).inputs()
    first = evaluate(seqops.gathered_attention, inputs, [torch.ones(2, 12, 4, 8), torch.zeros(2, 4, 12)])
    for name in ("q_index", "k_index"):
        other = inputs | {name: inputs[name].flip(-1)}
        again = evaluate(seqops.gathered_attention, other, [torch.ones(2, 12, 4, 8), torch.zeros(2, 4, 12)])
        assert_within(again, first, dict.fromkeys(first, 1e-12) | {"1": 1e-7})


def test_entries_outside_are_pads() -> None:
    """Whatever they are, of both integer types; gradients there are 0."""
    inputs = Gathered("gathered_attention", B=1, T=12, entries="valid").inputs()
    for dtype, values in ((torch.int64, (-1, 12, 2**62, -(2**63))), (torch.int32, (-7, 13, 2**31 - 1, -(2**31)))):
        results = []
        for value in values:
            changed = {name: inputs[name].to(dtype).clone() for name in ("q_index", "k_index")}
            changed["q_index"][..., 1] = value
            changed["k_index"][..., 2:4] = value
            results.append(
                evaluate(seqops.gathered_attention, inputs | changed, [torch.ones(1, 12, 4, 8), torch.ones(1, 4, 12)])
            )
        for other in results[1:]:
            cases.assert_same_bits(other, results[0])


def test_a_key_listed_twice_counts_twice() -> None:
    q, k, v = (torch.randn(1, 4, 1, 3, dtype=torch.float64) for _ in range(3))
    every = torch.arange(4).view(1, 1, 1, 4)
    twice, lse = seqops.gathered_attention(q, k, v, every, torch.tensor([[[[2, 0, 2]]]]))
    scores = (q[0, :, 0] @ k[0, [0, 2], 0].T) * 3**-0.5 + torch.tensor([0.0, math.log(2)])
    torch.testing.assert_close(twice[0, :, 0], scores.softmax(1) @ v[0, [0, 2], 0])
    torch.testing.assert_close(lse[0, 0], scores.logsumexp(1).float())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_lists(value: float) -> None:
    """In one key: only tokens whose lists see it, of its heads."""
    inputs = Gathered("gathered_attention", B=2, T=9, H=4, Hk=2, K=3, wq=3, wk=4).inputs()
    inputs["k_index"][0, 2, 0, 1], inputs["q_index"][0, 2, 0, 2] = 3, 5
    call = partial(seqops.gathered_attention, causal=True)
    clean = evaluate(call, inputs, [torch.ones(2, 9, 4, 8), torch.ones(2, 4, 9)])
    with torch.no_grad():
        inputs["v"][0, 3, 1] = value
    got = evaluate(call, inputs, [torch.ones(2, 9, 4, 8), torch.ones(2, 4, 9)])
    reached = torch.zeros(2, 9, 4, dtype=torch.bool)
    for h, c in itertools.product((2, 3), range(2)):
        if 3 in inputs["k_index"][0, h, c]:
            for i in inputs["q_index"][0, h, c].tolist():
                if 3 <= i < 9:
                    reached[0, i, h] = True
    assert reached.any() and torch.equal(~got["0"].isfinite().all(-1), reached)
    assert torch.equal(got["0"][~reached], clean["0"][~reached])
    assert torch.equal(got["1"], clean["1"])
    for name in ("dq", "dk"):
        assert torch.equal(got[name][1], clean[name][1])
        half = got[name].shape[2] // 2
        assert torch.equal(got[name][0, :, :half], clean[name][0, :, :half])


@pytest.mark.parametrize("reduce", ["mean", "sum", "last"])
def test_gradient_of_lse_is_that_of_the_table(reduce: str) -> None:
    """Of o and lse together, in float64, where lse comes back in float32: by the reference's own operations."""
    case = Gathered("gathered_attention", B=2, T=7, dtype=torch.float64, options=(("reduce", reduce), ("causal", True)))
    inputs = case.inputs()
    cotangents = [torch.zeros(2, 7, 4, 8, dtype=torch.float64), torch.randn(2, 4, 7)]
    exact = evaluate(case.reference, cases.in_float64(inputs), cotangents)
    assert_within(evaluate(case.operator, inputs, cotangents), exact, dict.fromkeys(exact, 1e-11) | {"1": 1e-7})


# ---------------------------------------------------------------- centroids


def test_empty_clusters_stay_and_other_entries_are_left_out() -> None:
    centroids, x = torch.randn(2, 4, 3), torch.randn(2, 5, 2, 3)
    nearest = torch.tensor([0, 3, -1, 4, 0]).view(1, 5, 1).expand(2, 5, 2)
    got = seqops.update_centroids(centroids, x, nearest, decay=0.75)
    assert torch.equal(got[:, 1:3], centroids[:, 1:3])
    torch.testing.assert_close(got[:, 0], 0.75 * centroids[:, 0] + 0.25 * x[:, [0, 4]].mean((0, 1)))
    torch.testing.assert_close(got[:, 3], 0.75 * centroids[:, 3] + 0.25 * x[:, 1].mean(0))
    x[0, 0, 1] = math.nan
    after = seqops.update_centroids(centroids, x, nearest, decay=0.75)
    assert after[1, 0].isnan().all()
    after[1, 0] = got[1, 0]
    assert torch.equal(after, got)


def test_small_steps_are_kept_beside_16_bits() -> None:
    """Centroids in float32 move by less than a bfloat16 could hold."""
    centroids, x = torch.ones(1, 1, 1), torch.full((1, 8, 1, 1), 2.0, dtype=torch.bfloat16)
    nearest = torch.zeros(1, 8, 1, dtype=torch.int32)
    assert seqops.update_centroids(centroids, x, nearest).item() == pytest.approx(1.001, abs=1e-6)


# ---------------------------------------------------------------- the parts


def rows_cases() -> list[tuple[int, ...]]:
    """B, T, Hk, D; B, H, n of the index."""
    return [
        (2, 7, 2, 5, 2, 4, 11),
        (2, 7, 2, 5, 1, 1, 9),
        (3, 5, 1, 70, 1, 3, 20),
        (2, 0, 2, 4, 2, 2, 3),
        (2, 4, 2, 300, 2, 2, 0),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", rows_cases(), ids=str)
def test_rows_and_their_gradient(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    B, T, Hk, D, *of_index = sizes
    x = torch.randn(B, D, T, Hk, dtype=torch.float64).to(dtype).movedim(1, 3)
    index = torch.randint(-2, T + 2, of_index).to(torch.int32 if D % 2 else torch.int64)
    rows = ops.gather_rows(x.requires_grad_(), index)
    assert torch.equal(rows, reference.gather_rows(x, index))
    dy = torch.randn(rows.shape, dtype=torch.float64).to(dtype)
    (got,) = torch.autograd.grad(rows, x, dy)
    assert got.dtype == dtype
    if T == 0:
        return
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.gather_rows(wide, index), wide, dy.double())
    assert_within({"dx": got}, {"dx": exact}, {"dx": 3 * torch.finfo(dtype).eps})


def test_counting_sort_is_stable() -> None:
    index = torch.randint(-2, 9, (2, 3, 50))
    order, starts = ops.counting_sort(index, 6)
    for b, h in itertools.product(range(2), range(3)):
        bins = [i if 0 <= i < 6 else 6 for i in index[b, h].tolist()]
        assert order[b, h].tolist() == sorted(range(50), key=lambda i: bins[i])
        assert starts[b, h].tolist() == [sum(b < c for b in bins) for c in range(7)]


@pytest.mark.parametrize("dims", [(0, 0), (None, 0), (0, None), (2, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_rows_under_vmap(dims: tuple[int | None, int | None], batch: int) -> None:
    """Lists of their own for each row, or shared."""
    x, index = torch.randn(3, 2, 5, 2, 3, dtype=torch.float64), torch.randint(-1, 6, (3, batch, 2, 8))

    def loss(x: Tensor, index: Tensor) -> Tensor:
        return ops.gather_rows(x, index).sin().sum()

    values = [v[0] if dim is None else v.movedim(0, dim) for v, dim in zip((x, index), dims, strict=True)]
    got = torch.vmap(torch.func.grad(loss), dims)(*values)
    for i in range(3):
        one = [v if dim is None else v.select(dim, i) for v, dim in zip(values, dims, strict=True)]
        first = one[0].clone().requires_grad_()
        (expected,) = torch.autograd.grad(reference.gather_rows(first, one[1]).sin().sum(), first)
        torch.testing.assert_close(got[i], expected)


REFUSED = [
    (
        lambda: ops.counting_sort(torch.zeros(2, 3), 4),
        "counting_sort: index: expected 3 dimensions [B, H, n], got shape [2, 3]",
    ),
    (lambda: ops.counting_sort(torch.zeros(2, 3, 1), 4), "counting_sort: index: expected int32 or int64, got float32"),
    (
        lambda: ops.gather_rows(torch.zeros(2, 5, 2, 3), torch.zeros(3, 1, 4, dtype=torch.int64)),
        "gather_rows: index: expected [1 or B, 1 or a multiple of Hk, n] = [1 or 2, 1 or a multiple of 2, n], "
        "got [3, 1, 4]",
    ),
    (
        lambda: ops.gather_rows(torch.zeros(2, 5, 2, 3), torch.zeros(2, 3, 4, dtype=torch.int64)),
        "gather_rows: index: expected [1 or B, 1 or a multiple of Hk, n] = [1 or 2, 1 or a multiple of 2, n], "
        "got [2, 3, 4]",
    ),
    (
        lambda: ops.reduce_slots(
            torch.zeros(2, 5, 2, 3), torch.zeros(2, 2, 5, dtype=torch.float64), *order_of(2, 2, 5)
        ),
        "reduce_slots: lse: expected float32, got float64",
    ),
    (
        lambda: ops.reduce_slots(torch.zeros(2, 5, 2, 3), torch.zeros(2, 2, 5), *order_of(2, 3, 5)),
        "reduce_slots: order: expected [1 or B, 1 or H, n] = [1 or 2, 1 or 2, 5], got [2, 3, 5]",
    ),
    (
        lambda: ops.reduce_slots(torch.zeros(2, 5, 2, 3), torch.zeros(2, 2, 5), *order_of(2, 2, 5), "most"),
        "reduce_slots: reduce: expected one of mean, sum, last, got 'most'",
    ),
    (
        lambda: ops.nearest_cluster(torch.zeros(2, 5, 2, 3), torch.zeros(3, 4, 3)),
        "nearest_cluster: centroids: expected [H, K, D] = [a multiple of 2, K >= 1, 3], got [3, 4, 3]",
    ),
    (
        lambda: ops.cluster_lists(torch.zeros(2, 5, 2, 3), torch.zeros(2, 4, 3), 0, "causal"),
        "cluster_lists: size: expected an integer >= 1, got 0",
    ),
]


def order_of(B: int, H: int, n: int) -> tuple[Tensor, Tensor]:
    return ops.counting_sort(torch.zeros(B, H, n, dtype=torch.int64), 4)


@pytest.mark.parametrize(("call", "text"), REFUSED, ids=[text.split(":")[0] for _, text in REFUSED])
def test_parts_refuse(call: Any, text: str) -> None:
    """With data and without."""
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text
    with torch._subclasses.FakeTensorMode(), pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text


# ---------------------------------------------------------------- Triton


@needs_triton
def test_rung(run_rung: Callable[..., str]) -> None:
    """What is marked tiny, in a process whose Triton interprets. Above five seconds for that reason."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


@needs_triton
def test_every_launch_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers of rows and slots ask for is in `configurations()`: constants and types of pointers."""
    launchers = import_module("seqops.attention.triton_gathered_attention")
    types = {
        **{dtype: f"*{name}" for dtype, name in launchers.STORAGE.items()},
        torch.int32: "*i32",
        torch.int64: "*i64",
    }

    def key(kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
        return kernel.__name__, *sorted(pointers.items()), *sorted(constants.items())

    known = set()
    for each in launchers.configurations():
        pointers = {name: kind for name, kind in each["types"].items() if kind.startswith("*")}
        known.add(key(each["kernel"], pointers, each["constants"]))
    asked = set()

    def record(kernel: Any, like: Tensor, grid: Any, arguments: dict[str, Any], options: dict[str, Any]) -> None:
        assert {*arguments} == {*kernel.arg_names} and len(grid) == 1
        pointers = {name: types[t.dtype] for name, t in arguments.items() if isinstance(t, Tensor)}
        names = ("ROWS", "REDUCE", "LSE", "DY", "DLSE", "BLOCK_D")
        asked.add(key(kernel, pointers, {name: v for name, v in arguments.items() if name in names}))

    monkeypatch.setattr(launchers, "launch", record)
    for dtype, channels in itertools.product(launchers.STORAGE, (1, 16, 17, 64, 65, 128, 129, 300)):
        rows = torch.zeros(2, 5, 2, channels, dtype=dtype)
        index = torch.zeros(2, 2, 5, dtype=torch.int64)
        order, starts = launchers.counting_sort(index, 5)
        for integers in (index, index.to(torch.int32)):
            launchers.gather_rows(rows, integers)
        launchers.gather_rows_backward(rows, order, starts, 1)
        lse = torch.zeros(2, 2, 5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for reduce in launchers.REDUCE:
            launchers.reduce_slots(rows, lse, order, starts, reduce)
            for do, dlse in ((rows, None), (None, lse), (rows, lse)):
                launchers.reduce_slots_backward(do, dlse, lse, order, starts, channels, dtype, reduce)
    assert {each[0] for each in asked} == {each[0] for each in known}
    assert asked <= known
