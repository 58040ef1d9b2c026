"""Values, gradients and behaviour of large_chunk_ttt on the CPU; Triton: test_ttt_triton.py."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.large_chunk_ttt import ORDERS, Case
from torch import Tensor
from torch.nn.functional import silu

import seqops
from seqops.ttt import composed_large_chunk_ttt as large_chunk

params = partial(cases.params, operators=("large_chunk_ttt",))
make = partial(Case, "large_chunk_ttt")
WEIGHTS = ("w0", "w1", "w2")
SUMS = ("m0", "m1", "m2")


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


def pieces_of(inputs: dict[str, Any], at: slice) -> dict[str, Any]:
    """The same call on some of its tokens."""
    return {n: v[:, at] if n in ("q", "k", "v", "lr", "momentum") else v for n, v in inputs.items()}


# ---------------------------------------------------------------- the reference itself


def apply(w: list[Tensor], x: Tensor) -> Tensor:
    return (silu(x @ w[0].T) * (x @ w[2].T)) @ w[1].T


def plainly(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    chunk_size: int,
    *,
    momentum: Tensor | None = None,
    momentum_state: list[Tensor] | None = None,
    optimizer: str = "gd",
    order: str = "apply_update",
    coefficients: list[float] | None = None,
    weight_norm: bool = True,
) -> tuple[Tensor, ...]:
    """One row and head after the other; gradients of the loss, token by token, come from autograd."""
    o = torch.zeros_like(q)
    states = [torch.zeros_like(w) for w in (w0, w1, w2, w0, w1, w2)]
    T = q.shape[1]
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            w = [each[b, h].clone() for each in (w0, w1, w2)]
            lengths = [each.square().sum(1).sqrt() for each in w]
            m = [torch.zeros_like(each) for each in w]
            if momentum_state is not None:
                m = [each[b, h].clone() for each in momentum_state]

            def update(start: int, stop: int, b: int = b, h: int = h, w: list = w, m: list = m, n: list = lengths):
                steps = [torch.zeros_like(each) for each in w]
                for t in range(start, stop):
                    leaves = [each.clone().requires_grad_() for each in w]
                    with torch.enable_grad():
                        loss = -(apply(leaves, k[b, t, h]) * v[b, t, h]).sum()
                    for i, gradient in enumerate(torch.autograd.grad(loss, leaves)):
                        steps[i] -= lr[b, t, h, i] * gradient
                for i in range(3):
                    if momentum is not None:
                        m[i] = steps[i] = sum(momentum[b, start:stop, h]) / (stop - start) * m[i] + steps[i]
                    step = seqops.newton_schulz(steps[i], coefficients) if optimizer == "muon" else steps[i]
                    w[i] = w[i] + step
                    if weight_norm:
                        for row in range(w[i].shape[0]):
                            w[i][row] *= n[i][row] / w[i][row].norm()

            size = T if order == "full" else chunk_size
            for start in range(0, T, size):
                stop = min(start + size, T)
                if order != "apply_update":
                    update(start, stop)
                o[b, start:stop, h] = apply(w, q[b, start:stop, h])
                if order == "apply_update" and stop - start == size:
                    update(start, stop)
            for state, each in zip(states, (*w, *m), strict=True):
                state[b, h] = each
    return o, *states


@pytest.mark.parametrize("momentum", ["none", "state"])
@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("order", ORDERS)
def test_reference_is_the_definition(order: str, optimizer: str, weight_norm: bool, momentum: str) -> None:
    options = (("order", order), ("optimizer", optimizer), ("weight_norm", weight_norm))
    case = make(B=2, T=7, H=2, D=3, F=4, C=3, dtype=torch.float64, momentum=momentum, options=options)
    inputs = {n: v.detach() if torch.is_tensor(v) else v for n, v in case.inputs().items()}
    expected = case.adapted(plainly)(**inputs)
    got = case.reference(**inputs)
    cases.assert_within(dict(zip("0123456", got, strict=True)), dict(zip("0123456", expected, strict=True)), 1e-11)


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == case.output_dtypes
    cotangents = case.cotangents(outputs)
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(
        cases.evaluate(case.operator, inputs, cotangents), exact, case.bounds(inputs, cotangents, exact)
    )


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("case", params("tiny"))
def test_each_output_alone(case: Case, position: int) -> None:
    """A gradient of one output only: those of the others are not there."""
    case = replace(case, dtype=torch.float64)
    inputs = case.inputs()
    cotangents = [case.cotangents(case.operator(**inputs))[position]]
    function, reference = cases.only(position, case.operator), cases.only(position, case.reference)
    if not reference(**inputs)[0].requires_grad:  # zeros
        assert torch.equal(function(**inputs)[0], torch.zeros_like(cotangents[0]))
        return
    exact = cases.evaluate(reference, cases.in_float64(inputs), cotangents)
    cases.assert_within(cases.evaluate(function, inputs, cotangents), exact, 1e-9)


@pytest.mark.parametrize("weight_norm", [True, False])
@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_numerical(order: str, optimizer: str, weight_norm: bool) -> None:
    options = (("order", order), ("optimizer", optimizer), ("weight_norm", weight_norm))
    case = make(B=1, T=7, H=1, D=2, F=3, C=3, dtype=torch.float64, momentum="state", options=options)
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    assert torch.autograd.gradcheck(
        lambda *values: case.operator(**(inputs | dict(zip(leaves, values, strict=True)))),
        (*leaves.values(),),
        fast_mode=True,
    )


@pytest.mark.parametrize("case", params("tiny"))
def test_products_computed_again(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on GPUs, where the forward does not keep them: the same bits."""
    inputs = case.inputs()
    kept = results(case, inputs)
    monkeypatch.setattr(large_chunk, "keeps_products", lambda q: False)
    cases.assert_same_bits(results(case, inputs), kept)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("momentum", ["none", "state"])
def test_short_chunks_are_learnt_again(
    momentum: str, optimizer: str, keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are kept once in D tokens or SPAN updates; here every 3 of 9."""
    monkeypatch.setattr(large_chunk, "keeps_products", lambda q: keeps)
    monkeypatch.setattr(large_chunk, "SPAN", 3)
    case = make(T=19, C=2, D=8, dtype=torch.float64, momentum=momentum, options=(("optimizer", optimizer),))
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    got, exact = cases.evaluate(case.operator, inputs, cotangents), cases.exact_results(case, inputs, cotangents)
    cases.assert_within(got, exact, 1e-9 if optimizer == "muon" else 1e-11)
    *_, weights, sums, _, _ = torch.ops.seqops.fast_weights_forward(*flat(inputs), 2, optimizer="muon")
    assert weights.shape == sums.shape == (3, 2, 4, 3 * 6 * 8)


def flat(inputs: dict[str, Any]) -> list[Any]:
    """The tensors of fast_weights, in order."""
    names = ("q", "k", "v", "w0", "w1", "w2", "lr", "momentum", "m0", "m1", "m2")
    return [inputs.get(name) for name in names]


@pytest.mark.parametrize("order", ORDERS)
def test_long_chunks_in_tiles(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(large_chunk.TILE, "cpu", 3)
    case = make(T=19, C=8, dtype=torch.float64, momentum="state", options=(("order", order),))
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    cases.assert_within(
        cases.evaluate(case.operator, inputs, cotangents), cases.exact_results(case, inputs, cotangents), 1e-11
    )


@pytest.mark.parametrize("case", params("tiny"))
def test_inference_equals_training(case: Case) -> None:
    """Without gradients weights are overwritten: the same bits, also in inference mode."""
    inputs = case.inputs()
    training = case.operator(**inputs)
    with torch.no_grad():
        plain = case.operator(**inputs)
    with torch.inference_mode():
        inference = case.operator(**inputs)
    for other in (plain, inference):
        assert all(cases.same_bits(a, b) for a, b in zip(other, training, strict=True))


# ---------------------------------------------------------------- what the rules say


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("weight_norm", [True, False])
def test_tokens_without_rate_teach_nothing(weight_norm: bool, order: str) -> None:
    case = make(dtype=torch.float64, momentum="none", options=(("order", order), ("weight_norm", weight_norm)))
    inputs = {n: v.detach() if torch.is_tensor(v) else v for n, v in case.inputs().items()}
    inputs["lr"] = torch.zeros_like(inputs["lr"])
    o, *states = case.operator(**inputs)
    for name, w in zip(WEIGHTS, states[:3], strict=True):
        torch.testing.assert_close(w, inputs[name], rtol=1e-14, atol=1e-14)
    heads = [inputs[n] for n in WEIGHTS]
    x = inputs["q"].transpose(1, 2)
    expected = (silu(x @ heads[0].mT) * (x @ heads[2].mT)) @ heads[1].mT
    torch.testing.assert_close(o, expected.transpose(1, 2), rtol=1e-12, atol=1e-13)


def test_padding_completes_a_chunk() -> None:
    """Rates of 0, and momentum in the mean of the tokens that are there."""
    case = make(T=10, C=4, dtype=torch.float64, momentum="state", options=(("order", "update_apply"),))
    inputs = {n: v.detach() if torch.is_tensor(v) else v for n, v in case.inputs().items()}
    o, *states = case.operator(**inputs)
    longer = dict(inputs)
    for name in ("q", "k", "v", "lr", "momentum"):
        tail = torch.zeros_like(inputs[name][:, :2]) + (name in "kv")
        if name == "momentum":
            tail = tail + inputs[name][:, 8:].mean(1, keepdim=True)
        longer[name] = torch.cat((inputs[name], tail), 1)
    padded, *padded_states = case.operator(**longer)
    named = dict(zip("0123456", (o, *states), strict=True))
    cases.assert_within(dict(zip("0123456", (padded[:, :10], *padded_states), strict=True)), named, 1e-12)


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
def test_rows_keep_their_norms(optimizer: str) -> None:
    case = make(B=1, T=600, H=2, D=24, F=40, C=8, options=(("optimizer", optimizer),))
    inputs = case.inputs()
    outputs = case.operator(**inputs)
    for name, w in zip(WEIGHTS, outputs[1:4], strict=True):
        before, after = (t.double().norm(dim=-1) for t in (inputs[name], w))
        assert not torch.allclose(inputs[name], w, atol=1e-2)
        torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_rows_of_zeros() -> None:
    """A row that is zero keeps its norm, has a gradient, and gives none to others."""
    case = make(B=1, H=1, dtype=torch.float64, momentum="none")
    inputs = case.inputs()
    with torch.no_grad():
        inputs["w0"][:, :, 2] = 0
        inputs["w1"][:, :, 1] = 0
    cotangents = case.cotangents(case.operator(**inputs))
    got, exact = cases.evaluate(case.operator, inputs, cotangents), cases.exact_results(case, inputs, cotangents)
    cases.assert_within(got, exact, 1e-11)
    assert not got["1"][:, :, 2].any() and not got["2"][:, :, 1].any()


def test_no_momentum_gives_its_state_back() -> None:
    case = make(momentum="state")
    inputs = case.inputs()
    inputs["momentum"] = None
    outputs = case.operator(**inputs)
    for name, m in zip(SUMS, outputs[4:], strict=True):
        assert torch.equal(m, inputs[name]) and m.data_ptr() != inputs[name].data_ptr()
    gradients = torch.autograd.grad([m.sum() for m in outputs[4:]], [inputs[name] for name in SUMS])
    assert all(torch.equal(g, torch.ones_like(g)) for g in gradients)


# ---------------------------------------------------------------- pieces


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("order", ["apply_update", "update_apply"])
@pytest.mark.parametrize("cuts", [[0], [4], [8, 12], [4, 4, 8, 12, 16]], ids=str)
def test_pieces_equal_whole(cuts: list[int], order: str, optimizer: str) -> None:
    """Cut at multiples of the chunk, with weights and momentum carried."""
    options = (("order", order), ("optimizer", optimizer))
    case = make(T=18, C=4, dtype=torch.float64, momentum="state", options=options)
    inputs = case.inputs()
    whole, *last = case.operator(**inputs)
    state, pieces = {name: inputs[name] for name in (*WEIGHTS, *SUMS)}, []
    for start, stop in zip([0, *cuts], [*cuts, 18], strict=True):
        o, *carried = case.operator(**(pieces_of(inputs, slice(start, stop)) | state))
        state = dict(zip((*WEIGHTS, *SUMS), carried, strict=True))
        pieces.append(o)
    expected = {"o": whole, **dict(zip((*WEIGHTS, *SUMS), last, strict=True))}
    cases.assert_within({"o": torch.cat(pieces, 1), **state}, expected, 1e-12)


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
def test_decoding_equals_whole(optimizer: str) -> None:
    """Token by token, as a module does it: keys of the open chunk wait until it is full."""
    case = make(T=14, C=4, dtype=torch.float64, momentum="state", options=(("optimizer", optimizer),))
    inputs = case.inputs()
    whole, *last = case.operator(**inputs)
    state, tokens, opened = {name: inputs[name] for name in (*WEIGHTS, *SUMS)}, [], 0
    for t in range(14):
        o, *_ = case.operator(**(pieces_of(inputs, slice(t, t + 1)) | state))
        tokens.append(o)
        if t + 1 - opened == 4:
            _, *carried = case.operator(**(pieces_of(inputs, slice(opened, t + 1)) | state))
            state, opened = dict(zip((*WEIGHTS, *SUMS), carried, strict=True)), t + 1
    expected = {"o": whole, **dict(zip((*WEIGHTS, *SUMS), last, strict=True))}
    cases.assert_within({"o": torch.cat(tokens, 1), **state}, expected, 1e-12)


# ---------------------------------------------------------------- who sees whom


def seen(case: Case, token: int) -> tuple[Tensor, list[bool]]:
    """Which tokens' outputs, and which states, change with k and v of one token."""
    inputs = {n: v.detach() if torch.is_tensor(v) else v for n, v in case.inputs().items()}
    before, *states = case.operator(**inputs)
    for name in "kv":
        inputs[name] = inputs[name].clone()
        inputs[name][:, token] += 1
    after, *others = case.operator(**inputs)
    return (after != before).flatten(2).any(-1).all(0), [
        not torch.equal(a, b) for a, b in zip(states, others, strict=True)
    ]


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("token", [0, 3, 5, 9])
def test_leaks(token: int, optimizer: str) -> None:
    """A sequence of 10 in chunks of 4, the last of 2."""
    position = torch.arange(10)
    for order, expected in (
        ("apply_update", position >= (token // 4 + 1) * 4),
        ("update_apply", position >= token // 4 * 4),
        ("full", position >= 0),
    ):
        case = make(B=1, H=1, T=10, C=4, options=(("order", order), ("optimizer", optimizer)))
        tokens, states = seen(case, token)
        assert torch.equal(tokens, expected), order
        learnt = order != "apply_update" or token < 8
        assert states == [learnt] * 6, order


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["q", "k", "v", "lr", "momentum", "w0", "w1", "w2", "m1", "grad"])
def test_nan_stays_in_its_head(name: str, order: str, optimizer: str) -> None:
    """And of the tokens in those that see it."""
    options = (("order", order), ("optimizer", optimizer))
    case = make(B=2, T=11, H=2, C=4, dtype=torch.float64, momentum="state", options=options)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    clean = cases.evaluate(case.operator, inputs, cotangents)
    with torch.no_grad():
        if name == "grad":
            cotangents[0] = cotangents[0].clone()
            cotangents[0][0, 5, 0, 1] = math.nan
        elif name[0] in "wm" and name != "momentum":
            inputs[name][0, 0, 1, 1] = math.nan
        else:
            inputs[name][0, 5, 0] = math.nan
    got = cases.evaluate(case.operator, inputs, cotangents)
    assert any(value.isnan().any() for value in got.values())
    for result, value in got.items():
        by_token = result in ("0", "dq", "dk", "dv", "dlr", "dmomentum")
        head = 2 if by_token else 1
        torch.testing.assert_close(value[1], clean[result][1], rtol=1e-11, atol=1e-12)
        others = (t.narrow(head, 1, 1) for t in (value, clean[result]))
        torch.testing.assert_close(*others, rtol=1e-11, atol=1e-12)
    hidden = {"apply_update": 8, "update_apply": 4, "full": 0}[order]  # outputs that keys of token 5 do not reach
    if name in ("k", "v", "lr", "momentum"):
        torch.testing.assert_close(got["0"][:, :hidden], clean["0"][:, :hidden])
        assert got["0"][0, hidden:, 0].isnan().all()
    if name == "q":
        assert [*got["0"].isnan().flatten(2).any(-1).nonzero()[:, 1]] == [5]


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("case", params("tiny"))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.parametrize("optimizer", ["gd", "muon"])
def test_passes_of_every_thread(optimizer: str) -> None:
    """Rows are shared out among threads; products are torch's."""
    case = make(B=1, T=300, H=3, D=40, F=72, C=128, momentum="state", options=(("optimizer", optimizer),))
    inputs, threads = case.inputs(), torch.get_num_threads()
    alone = results(case, inputs)
    try:
        torch.set_num_threads(3)
        shared = results(case, inputs)
    finally:
        torch.set_num_threads(threads)
    cases.assert_within(shared, cases.in_double(alone), 1e-3 if optimizer == "muon" else 1e-5)


# ---------------------------------------------------------------- passes


def test_passes_refuse_what_does_not_fit() -> None:
    """Nobody else calls them; they would not crash."""
    passes = torch.ops.seqops_passes
    y = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"gate: y2: expected \[N, rows, width\] = \[2, 3, 4\], got \[2, 3, 5\]"):
        passes.gate(y, torch.zeros(2, 3, 5), y)
    with pytest.raises(ValueError, match="gate: out: expected float32, got float64"):
        passes.gate(y, y, y.double())
    with pytest.raises(ValueError, match="gate: y2: expected a dense last dimension, got stride 2"):
        passes.gate(y, torch.zeros(2, 3, 8)[..., ::2], y)
    with pytest.raises(ValueError, match="gate: y0: expected 3 dimensions, got shape"):
        passes.gate(y[0], y, y)
    with pytest.raises(ValueError, match=r"renew: norms0: expected \[N, rows\] = \[2, 3\], got \[2, 4\]"):
        passes.renew(y, y, torch.zeros(2, 4), y, torch.zeros(2, 3), None)
    with pytest.raises(ValueError, match="renew: norms: expected a tensor beside norms0, got None"):
        passes.renew(y, y, torch.zeros(2, 3), y, None, None)


# ---------------------------------------------------------------- instruction sets


# avx512_bf16 adds a product of pairs, which is not used here; the whole file runs with it where the machine has it.
@pytest.mark.parametrize("isa", ["baseline", "avx2", pytest.param("avx512", marks=pytest.mark.slow)])
def test_instruction_sets(isa: str, run_rung: Callable[..., str]) -> None:
    run_rung(__file__, "sanitize", "-k", "values", SEQOPS_CPU_ISA=isa)
