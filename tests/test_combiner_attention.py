"""combiner_attention on the CPU against the reference in float64, and what its patterns promise.

Tests marked `tiny` run again on the Triton kernels, in Triton's interpreter: see test_rung.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import (
    Case,
    assert_same_bits,
    assert_within,
    combiner_attention,
    error,
    evaluate,
    exact_results,
    params,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import seqops
from seqops.attention import op_combiner_attention, reference

ops = torch.ops.seqops
PATTERNS, POOLS = combiner_attention.PATTERNS, op_combiner_attention.POOLS
HAS_TRITON = importlib.util.find_spec("triton") is not None
make = combiner_attention.make

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_pool = pytest.mark.parametrize("pool", POOLS)


def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v."""
    return tuple(torch.randn(sizes, dtype=dtype) for _ in range(3))


@pytest.mark.parametrize("case", params(operators=("combiner_attention",)))
def test_against_the_reference(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    cotangents = case.cotangents(outputs)
    exact = exact_results(case, inputs, cotangents)
    assert_within(evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.slow
@pytest.mark.parametrize(("pattern", "pool", "causal"), [*itertools.product(PATTERNS, POOLS, (True, False))])
def test_every_length(pattern: str, pool: str, causal: bool) -> None:
    """And every block size around it, with three heads of queries for each of keys."""
    for T, s in itertools.product(range(34), (1, 2, 3, 5, 8, 16, 40)):
        case = make("combiner_attention", pattern=pattern, pool=pool, causal=causal, B=1, T=T, H=3, Hk=1, D=3)
        inputs = case.inputs() | {"block_size": s}
        cotangents = case.cotangents(case.operator(**inputs))
        exact = exact_results(case, inputs, cotangents)
        assert_within(evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact))


# ---- the sets


@every_pattern
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s", [1, 3, 8])
def test_direct_keys_and_spans_partition_what_a_query_may_see(pattern: str, causal: bool, s: int) -> None:
    for T in (1, s, s + 1, 2 * s + 3, 5 * s + 2, 37):
        for i in range(T):
            direct, spans = reference.combiner_sets(i, T, s, pattern, causal)
            seen = sorted([*direct, *itertools.chain.from_iterable(spans)])
            assert seen == [*range(i + 1 if causal else T)]
            assert s < T or not spans


@pytest.mark.parametrize("T", [1, 2, 13, 64, 100])
def test_logsparse_of_single_positions_is_the_published_rule(T: int) -> None:
    """Of i in binary: itself, and for each bit that is set the positions that clearing it, and keeping those above it,
    leaves before i. So a query sees 1 + popcount(i) rows.
    """
    for i in range(T):
        direct, spans = reference.combiner_sets(i, T, 1, "logsparse")
        rest, published = i, []
        for level in range(i.bit_length()):
            if rest & (1 << level):
                rest -= 1 << level
                published.append(range(rest, rest + (1 << level)))
        assert direct == [i] and spans == published
        assert len(spans) == i.bit_count()


@every_pattern
@every_pool
@pytest.mark.parametrize("causal", [True, False])
def test_weights_of_values(pattern: str, pool: str, causal: bool) -> None:
    """They sum to 1, are none where a query may not look, and are no less than 0."""
    T, s = 23, 4
    q, k, _ = draw(1, T, 1, T)
    unit = torch.eye(T).view(1, T, 1, T)
    weights = seqops.combiner_attention(q, k, unit, s, pattern=pattern, pool=pool, causal=causal)[0, :, 0]  # [T, T]
    torch.testing.assert_close(weights.sum(1), torch.ones(T))
    seen = torch.ones(T, T).tril() if causal else torch.ones(T, T)
    assert ((weights > 0) == (seen > 0)).all()


@every_pattern
@pytest.mark.parametrize("causal", [True, False])
def test_short_sequences_are_plain_attention(pattern: str, causal: bool) -> None:
    q, k, v = draw(2, 9, 2, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
    )
    for s in (9, 10, 1000, 2**62):
        got = seqops.combiner_attention(q, k, v, s, pattern=pattern, causal=causal)
        torch.testing.assert_close(got, expected.transpose(1, 2), rtol=1e-12, atol=1e-13)


@every_pattern
@pytest.mark.parametrize("causal", [True, False])
def test_the_earliest_of_equal_maxima_has_the_gradient(pattern: str, causal: bool) -> None:
    q, k, v = (x.mul(1.5).round().requires_grad_() for x in draw(1, 26, 2, 5, dtype=torch.float64))
    inputs = {"q": q, "k": k, "v": v, "block_size": 4, "pattern": pattern, "causal": causal}
    cotangent = torch.randn(q.shape, dtype=torch.float64)
    got, exact = (
        evaluate(lambda **given: (function(**given),), inputs, [cotangent])  # noqa: B023
        for function in (seqops.combiner_attention, reference.combiner_attention)
    )
    assert_within(got, exact, 1e-11)


# ---- leaks


@every_pattern
@every_pool
@pytest.mark.parametrize("value", [3.0, math.nan, math.inf])
def test_causal_outputs_do_not_look_ahead(pattern: str, pool: str, value: float) -> None:
    """Whatever comes after t, outputs up to t have the same bits."""
    tensors = draw(1, 29, 2, 8)
    options = {"pattern": pattern, "pool": pool}
    before = seqops.combiner_attention(*tensors, 4, **options)
    for t in (0, 10, 15, 16, 27):
        changed = [x.clone() for x in tensors]
        for x in changed:
            x[:, t + 1 :] = value
        after = seqops.combiner_attention(*changed, 4, **options)
        assert torch.equal(before[:, : t + 1], after[:, : t + 1])
        assert not torch.equal(before[:, t + 1 :], after[:, t + 1 :])


@every_pattern
@every_pool
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_goes_where_it_does_in_the_reference(pattern: str, pool: str, name: str) -> None:
    """In outputs; in other sequences and heads nothing changes at all, gradients included."""
    case = make("combiner_attention", pattern=pattern, pool=pool, causal=True, B=2, T=22, H=2, Hk=2, D=4)
    clean, inputs = case.inputs(), case.inputs()
    with torch.no_grad():
        inputs[name][1, 9, 1, 2] = math.nan
    cotangents = case.cotangents(case.operator(**clean))
    before, after = (evaluate(case.operator, given, cotangents) for given in (clean, inputs))
    exact = exact_results(case, inputs, cotangents)
    assert torch.equal(after["0"].isnan(), exact["0"].isnan()) and after["0"].isnan().any()
    for result in before:
        assert torch.equal(before[result][0], after[result][0])
        assert torch.equal(before[result][1, :, 0], after[result][1, :, 0])


@every_pattern
def test_nan_of_the_last_query_keeps_to_what_it_sees(pattern: str) -> None:
    """A summary that would hold it is none: queries of no span that it sees have the gradients that they had."""
    T, s = 23, 4
    case = make("combiner_attention", pattern=pattern, pool="mean", causal=True, B=1, T=T, H=1, Hk=1, D=4)
    clean, inputs = case.inputs(), case.inputs()
    with torch.no_grad():
        inputs["q"][0, T - 1] = math.nan
    cotangents = case.cotangents(case.operator(**clean))
    cotangents[0][0, T - 1] = 0
    dq, expected = (evaluate(case.operator, given, cotangents)["dq"] for given in (inputs, clean))
    direct, _ = reference.combiner_sets(T - 1, T, s, pattern)
    alone = [i for i in direct if i != T - 1]
    assert torch.equal(dq[:, alone], expected[:, alone])


# ---- runs


@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_two_runs_are_bit_equal(pattern: str, dtype: torch.dtype) -> None:
    case = make("combiner_attention", pattern=pattern, causal=False, B=2, T=37, H=2, Hk=1, D=8, dtype=dtype)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    assert_same_bits(*(evaluate(case.operator, inputs, cotangents) for _ in range(2)))


@every_pattern
@every_pool
def test_results_do_not_depend_on_threads(pattern: str, pool: str) -> None:
    options = {"pattern": pattern, "pool": pool, "causal": False}
    case = make("combiner_attention", **options, B=1, T=700, H=2, Hk=2, D=64, block_size=32)
    inputs, results = case.inputs(), []
    cotangents = case.cotangents(case.operator(**inputs))
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(case.operator, inputs, cotangents))
    assert_same_bits(*results)


@every_pool
def test_step_by_step_from_a_cache(pool: str) -> None:
    """`fixed` decodes from the open block, the pools of its rows, and the summaries of closed blocks."""
    T, s, H, Hk, D = 27, 5, 4, 2, 8
    q, k, v = torch.randn(1, T, H, D), torch.randn(1, T, Hk, D), torch.randn(1, T, Hk, D)
    whole = seqops.combiner_attention(q, k, v, s, pool=pool)
    closed: list[tuple[Tensor, Tensor]] = []  # khat, vhat [1, H, D]
    open_rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for t in range(T):
        row = (q[:, t], *(x[:, t].repeat_interleave(H // Hk, 1) for x in (k, v)))
        open_rows.append(row)
        keys = torch.stack([khat for khat, _ in closed] + [each[1] for each in open_rows], 1)
        values = torch.stack([vhat for _, vhat in closed] + [each[2] for each in open_rows], 1)
        weights = torch.softmax((row[0].unsqueeze(1) * keys).sum(-1, keepdim=True) * D**-0.5, 1)
        torch.testing.assert_close((weights * values).sum(1), whole[:, t], rtol=1e-5, atol=1e-6)
        if len(open_rows) == s:
            block = [torch.stack(parts, 1) for parts in zip(*open_rows, strict=True)]
            closed.append(reference.span_summary(*block, pool, D**-0.5))
            open_rows.clear()


class Largest(TorchDispatchMode):
    """The most numbers that a tensor made below autograd has."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = op(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, Tensor):
                self.numbers = max(self.numbers, output.untyped_storage().nbytes() // output.element_size())
        return outputs


@every_pattern
def test_memory_is_linear_in_time(pattern: str) -> None:
    """No tensor of a training step has more than a few times the numbers of q."""
    T, D = 2048, 8
    inputs = {"q": None, "k": None, "v": None}
    inputs = {name: torch.randn(1, T, 1, D, requires_grad=True) for name in inputs}
    with Largest() as largest:
        o = seqops.combiner_attention(**inputs, block_size=32, pattern=pattern, causal=False)
        torch.autograd.grad(o.sum(), [*inputs.values()])
    levels = (T // 32).bit_length()
    assert T * D <= largest.numbers <= max(4 * T * D, 4 * levels * T)  # rows, or the ranges of a tree


@pytest.mark.parametrize(("pattern", "lengths"), [("fixed", (9, 33)), ("axial", (9, 33)), ("logsparse", (34, 62))])
def test_another_length_compiles_nothing(pattern: str, lengths: tuple[int, ...]) -> None:
    """A tree of another depth does: it is another graph."""
    torch.compiler.reset()
    call = torch.compile(seqops.combiner_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for first, T in zip((True, False), lengths, strict=True):
        tensors = draw(2, T, 3, 5)
        with torch._dynamo.config.patch(error_on_recompile=not first):
            got = call(*tensors, 4, pattern=pattern)
        assert torch.equal(got, seqops.combiner_attention(*tensors, 4, pattern=pattern))
    torch.compiler.reset()


# ---- the parts


def summaries_in_torch(
    q: Tensor, k: Tensor, v: Tensor, spans: list[range], pool: str, scale: float
) -> tuple[Tensor, Tensor]:
    rows = [reference.span_summary(*(x[:, span.start : span.stop] for x in (q, k, v)), pool, scale) for span in spans]
    return tuple(torch.stack(part, 1) for part in zip(*rows, strict=True))


def in_every_dtype(*flags: str, everyday: tuple[bool, ...]) -> Any:
    """Flags, pools and dtypes, all of them on the CPU. In Triton's interpreter, which is slow, all in float32; and of
    the flags `everyday` in the others too, which differ in how rows are loaded and rounded alone."""
    values = []
    for dtype in (torch.float64, torch.float32, torch.float16):
        for given in itertools.product((False, True), repeat=len(flags)):
            tiny = dtype == torch.float32 or given == everyday
            values += [pytest.param(*given, dtype, pool, marks=pytest.mark.tiny if tiny else ()) for pool in POOLS]
    return pytest.mark.parametrize((*flags, "dtype", "pool"), values)


@in_every_dtype("tree", "causal", everyday=(True, True))
def test_span_summaries(tree: bool, causal: bool, dtype: torch.dtype, pool: str) -> None:
    T, s = 26, 5
    blocks = [range(first, min(first + s, T)) for first in range(0, T, s)]
    spans = blocks[:-1] if causal else blocks
    if tree:  # of six blocks: nodes of 1, 2 and 4
        nodes = [[range(f, min(f + w, T)) for f in range(0, T, w)] for w in (s, 2 * s, 4 * s)]
        seen = [nodes[0], nodes[1][:2], nodes[2]]
        spans = [span for level in seen for span in (level[::2] if causal else level)]
    leaves = [x.to(dtype).requires_grad_() for x in draw(2, T, 2, 7, dtype=torch.float64)]
    got = ops.span_summaries(*leaves, s, tree=tree, pool=pool, causal=causal, scale=0.4)
    assert all(x[:, len(spans) :].eq(0).all() for x in got)
    got = [x[:, : len(spans)] for x in got]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = summaries_in_torch(*wide, spans, pool, 0.4)
    cotangents = [torch.randn(x.shape, dtype=torch.float64).to(dtype) for x in got]
    gradients = torch.autograd.grad(got, leaves, cotangents)
    expected = torch.autograd.grad(exact, wide, [c.double() for c in cotangents])
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-4}[dtype]
    for a, b in zip((*got, *gradients), (*exact, *expected), strict=True):
        assert a.dtype == dtype and error(a, b.detach()) <= bound


@in_every_dtype("reverse", everyday=(True,))
def test_running_pool(reverse: bool, dtype: torch.dtype, pool: str) -> None:
    T, s = 23, 4
    x = torch.randn(2, T, 2, 7).mul(2).round().to(dtype).requires_grad_()  # with ties
    got = ops.running_pool(x, s, pool=pool, reverse=reverse)
    wide = x.detach().double().requires_grad_()
    rows = [wide[:, t::s] if reverse else wide[:, t % s : t + 1 : s] for t in range(T)]
    exact = torch.stack([reference.pooled(each, pool) for each in rows], 1)
    cotangent = torch.randn(x.shape).to(dtype)
    (gradient,) = torch.autograd.grad(got, x, cotangent)
    (expected,) = torch.autograd.grad(exact, wide, cotangent.double())
    bound = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 6e-4}[dtype]
    assert got.dtype == dtype and error(got, exact.detach()) <= bound and error(gradient, expected) <= bound
    if pool == "max":
        assert torch.equal(got.double(), exact)


@pytest.mark.tiny
@pytest.mark.parametrize("reverse", [False, True])
def test_nan_is_the_maximum_from_its_place_on(reverse: bool) -> None:
    x = torch.randn(1, 12, 1, 3)
    x[0, 6, 0, 1] = x[0, 10, 0, 1] = math.nan
    got = ops.running_pool(x.requires_grad_(), 4, pool="max", reverse=reverse)
    where = torch.zeros(1, 12, 1, 3, dtype=torch.bool)
    for t in (2, 6, 10) if reverse else (6, 10):
        where[0, t, 0, 1] = True
    assert torch.equal(got.isnan(), where)
    (gradient,) = torch.autograd.grad(got, x, torch.ones_like(got))
    taken = gradient[0, :, 0, 1][[2, 6, 10]]
    assert taken.tolist() == ([0, 2, 1] if reverse else [1, 2, 0])


MISTAKES: list[tuple[str, Callable[[], Any]]] = [
    ("span_summaries: q: expected 4 dimensions [B, T, H, D], got shape [2, 3]", lambda q: (q[0, 0], q, q, 2)),
    ("span_summaries: k: expected [B, T, H, D] = [1, 6, 2, 3], got [1, 5, 2, 3]", lambda q: (q, q[:, 1:], q, 2)),
    ("span_summaries: v: expected float32, got float64", lambda q: (q, q, q.double(), 2)),
    ("span_summaries: block_size: expected an integer >= 1, got 0", lambda q: (q, q, q, 0)),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("text", "arguments"), MISTAKES)
def test_errors_of_span_summaries(text: str, arguments: Callable[..., Any], device: str) -> None:
    q = torch.zeros(1, 6, 2, 3, device=device)
    with pytest.raises(ValueError) as caught:
        ops.span_summaries(*arguments(q), tree=False, pool="max", causal=True, scale=1.0)
    assert str(caught.value) == text


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_of_running_pool(device: str) -> None:
    x = torch.zeros(1, 6, 2, 3, device=device)
    for text, call in (
        ("stride: expected an integer >= 1, got -1", lambda: ops.running_pool(x, -1, pool="max", reverse=False)),
        ("pool: expected one of max, mean, got 'sum'", lambda: ops.running_pool(x, 1, pool="sum", reverse=False)),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"running_pool: {text}"


# ---- Triton


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_rung(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked tiny, in a process of their own. Above five seconds for that reason."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")
