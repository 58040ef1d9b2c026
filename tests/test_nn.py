"""seqops.nn against torch.nn: the same weights give the same outputs, states and gradients; modules stay modules."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, prune, skip_init
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import seqops
from seqops.rnn import reference

INPUT, HIDDEN = 5, 6
LENGTHS = (4, 7, 1, 7)
MODULES = ("LSTM", "GRU", "RNN", "SLSTM")
SHARED = ("LSTM", "GRU", "RNN")  # with torch.nn
STATES = {"LSTM": 2, "GRU": 1, "RNN": 1, "SLSTM": 4}


@dataclass(frozen=True)
class Case:
    """A module of torch.nn, its options, and the form of its input."""

    module: str
    layers: int = 1
    bidirectional: bool = False
    form: str = "batch_first"  # or "time_major", "single", "packed", "packed_unsorted"
    proj: int = 0
    bias: bool = True
    nonlinearity: str = "tanh"
    states: bool = True
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        words = [self.module, f"L{self.layers}", self.form, str(self.dtype).removeprefix("torch.")]
        words += [word for word, on in (("both", self.bidirectional), (f"proj{self.proj}", self.proj)) if on]
        words += [] if self.nonlinearity == "tanh" else [self.nonlinearity]
        words += [word for word, on in (("no_bias", not self.bias), ("no_states", not self.states)) if on]
        return "-".join(words)

    @property
    def options(self) -> dict[str, Any]:
        options = {"num_layers": self.layers, "bidirectional": self.bidirectional, "bias": self.bias}
        options["batch_first"] = self.form == "batch_first"
        options |= {"proj_size": self.proj} if self.proj else {}
        return options | ({"nonlinearity": self.nonlinearity} if self.module == "RNN" else {})

    def inputs(self) -> tuple[Tensor | PackedSequence, list[Tensor], list[Tensor]]:
        """Input, states, and which of these tensors get gradients; in float64, with values that `dtype` can hold."""

        def leaf(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(self.dtype).double().requires_grad_()

        batch, time = len(LENGTHS), max(LENGTHS)
        rows = self.layers * (1 + self.bidirectional)
        shape = () if self.form == "single" else (batch,)
        states = [leaf(rows, *shape, self.proj or HIDDEN), leaf(rows, *shape, HIDDEN)][: STATES[self.module]]
        states = states if self.states else []
        if self.form.startswith("packed"):
            data = leaf(batch, time, INPUT)
            lengths = torch.tensor(sorted(LENGTHS, reverse=True) if self.form == "packed" else LENGTHS)
            x = pack_padded_sequence(data, lengths, True, enforce_sorted=self.form == "packed")
        else:
            data = leaf(
                *{"batch_first": (batch, time), "time_major": (time, batch), "single": (time,)}[self.form], INPUT
            )
            x = data
        return x, states, [data, *states]


def flat(value: Any) -> list[Tensor]:
    """All tensors of a module's result, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)] if isinstance(value, (tuple, list)) else []


def floats(value: Any) -> list[Tensor]:
    return [tensor for tensor in flat(value) if tensor.is_floating_point()]


def pack_state(states: Sequence[Tensor]) -> Any:
    return None if not states else states[0] if len(states) == 1 else tuple(states)


def cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype)


def run(module: torch.nn.Module, case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Outputs, states, and gradients of inputs, states and weights, for random cotangents."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(2)
    x, states, leaves = case.inputs()
    outputs = floats(module(cast(x, dtype), pack_state([state.to(dtype) for state in states])))
    cotangents = [torch.randn(output.shape, dtype=torch.float64, generator=generator) for output in outputs]
    gradients = torch.autograd.grad(outputs, [*leaves, *module.parameters()], [c.to(dtype) for c in cotangents])
    return [*outputs, *gradients]


def error(values: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative root mean square among tensors."""
    assert [value.shape for value in values] == [right.shape for right in exact]
    pairs = [(v.detach().double(), e.detach()) for v, e in zip(values, exact, strict=True)]
    # torch's max, because Python's drops NaN.
    return float(torch.stack([(v - e).norm() / (e.norm() + 1e-30) for v, e in pairs]).max())


def table() -> list[Case]:
    forms = ("batch_first", "time_major", "single", "packed", "packed_unsorted")
    depths = ((1, False), (2, True), (3, False))
    kinds = [{"module": name} for name in SHARED]
    kinds += [{"module": "RNN", "nonlinearity": "relu"}, {"module": "LSTM", "proj": 3}]
    cases = [
        Case(**kind, layers=layers, bidirectional=both, form=form)
        for kind, (layers, both), form in itertools.product(kinds, depths, forms)
    ]
    for kind, form in itertools.product(kinds, ("batch_first", "packed_unsorted")):
        for dtype in (torch.float32, torch.bfloat16):
            cases.append(Case(**kind, layers=2, bidirectional=True, form=form, dtype=dtype))
        cases.append(Case(**kind, layers=2, bidirectional=True, form=form, bias=False))
        cases.append(Case(**kind, layers=2, bidirectional=True, form=form, states=False))
    return cases


@pytest.mark.parametrize("case", table(), ids=str)
def test_equals_torch(case: Case) -> None:
    torch.manual_seed(0)
    theirs = getattr(torch.nn, case.module)(INPUT, HIDDEN, **case.options, dtype=case.dtype)
    ours = getattr(seqops.nn, case.module)(INPUT, HIDDEN, **case.options, dtype=case.dtype)
    ours.load_state_dict(theirs.state_dict())
    exact = run(copy.deepcopy(theirs).double(), case, torch.float64)
    values = run(ours, case, case.dtype)
    assert all(value.dtype == case.dtype for value in values[: 1 + STATES[case.module]])
    if case.dtype == torch.float64:
        assert error(values, exact) < 1e-13
    elif case.dtype == torch.float32:
        assert error(values, exact) < 5e-6
    else:
        assert error(values, exact) < 1.2 * error(run(theirs, case, case.dtype), exact)


@pytest.mark.parametrize("case", [case for case in table() if case.dtype == torch.float64 and case.states], ids=str)
def test_state_dict(case: Case) -> None:
    torch.manual_seed(3)
    theirs = getattr(torch.nn, case.module)(INPUT, HIDDEN, **case.options)
    torch.manual_seed(3)
    ours = getattr(seqops.nn, case.module)(INPUT, HIDDEN, **case.options)
    left, right = ours.state_dict(), theirs.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert repr(ours) == repr(theirs)
    assert ours.mode == theirs.mode
    for mine, other in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, other, strict=True))
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in theirs.state_dict().items())


# ---------------------------------------------------------------- heads, sLSTM


def block_diagonal(weight: Tensor, gates: int, heads: int) -> Tensor:
    """weight_hh [G * hidden, D] of a module with heads -> [G * hidden, hidden] of one without."""
    blocks = weight.view(gates, heads, -1, weight.shape[1])
    return torch.cat([torch.block_diag(*gate) for gate in blocks])


@pytest.mark.parametrize("module", SHARED)
def test_heads_are_a_block_diagonal_recurrence(module: str) -> None:
    case = Case(module, layers=2, bidirectional=True)
    ours = getattr(seqops.nn, module)(INPUT, HIDDEN, **case.options, dtype=torch.float64, num_heads=3)
    theirs = getattr(torch.nn, module)(INPUT, HIDDEN, **case.options, dtype=torch.float64)
    assert repr(ours).endswith("num_heads=3)")
    weights = {
        name: block_diagonal(weight, ours.gates, 3) if "weight_hh" in name else weight
        for name, weight in ours.state_dict().items()
    }
    theirs.load_state_dict(weights)
    values, exact = run(ours, case, torch.float64), run(theirs, case, torch.float64)
    first = len(values) - len(weights)
    for index, name in enumerate(weights, start=first):
        if "weight_hh" in name:
            assert values[index].shape == (ours.gates * HIDDEN, HIDDEN // 3)
            rows = exact[index].view(ours.gates, 3, 2, 3, 2)
            exact[index] = torch.stack([rows[:, head, :, head] for head in range(3)], 1).reshape(-1, 2)
    assert error(values, exact) < 1e-13


def stack(layers: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return tuple(torch.stack(states) for states in zip(*layers, strict=True))


@pytest.mark.parametrize("heads", [1, 3])
def test_slstm_equals_its_definition(heads: int) -> None:
    module = seqops.nn.SLSTM(INPUT, HIDDEN, 2, bidirectional=True, batch_first=True, num_heads=heads).double()
    x = torch.randn(4, 7, INPUT, dtype=torch.float64, requires_grad=True)
    initial = [torch.randn(4, 4, HIDDEN, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    initial[2] = initial[2].detach().exp().requires_grad_()

    h, final = x, []
    for layer in range(2):
        outputs = []
        for direction, suffix in enumerate((f"l{layer}", f"l{layer}_reverse")):
            weight_ih, weight_hh, bias_ih, bias_hh = (
                getattr(module, f"{name}_{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            )
            wx = functional.linear(h, weight_ih, bias_ih).unflatten(-1, (4, heads, -1))
            r = weight_hh.view(4, heads, HIDDEN // heads, HIDDEN // heads)
            states = [state[2 * layer + direction].unflatten(-1, (heads, -1)) for state in initial]
            output, *states = reference.slstm(wx, r, bias_hh.view(4, heads, -1), *states, reverse=bool(direction))
            outputs.append(output.flatten(2))
            final.append([state.flatten(1) for state in states])
        h = torch.cat(outputs, -1)
    exact = [h, *stack(final)]

    values = flat(module(x, tuple(initial)))
    cotangents = [torch.randn_like(value) for value in exact]
    leaves = [x, *initial, *module.parameters()]
    exact += torch.autograd.grad(exact, leaves, cotangents)
    values += torch.autograd.grad(values, leaves, cotangents)
    assert error(values, exact) < 1e-12


def test_slstm_parameters_are_those_of_an_lstm() -> None:
    torch.manual_seed(0)
    ours = seqops.nn.SLSTM(INPUT, HIDDEN, 2, bidirectional=True).state_dict()
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize("module", MODULES)
def test_steps_with_carried_state_equal_the_whole(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, dtype=torch.float64)
    x = torch.randn(9, 3, INPUT, dtype=torch.float64)
    whole, last = model(x)
    state, steps = None, []
    for step in x.split(1):
        output, state = model(step, state)
        steps.append(output)
    torch.testing.assert_close(torch.cat(steps), whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-13, atol=1e-13)


def test_projected_steps_with_carried_state_equal_the_whole() -> None:
    model = seqops.nn.LSTM(INPUT, HIDDEN, 2, proj_size=4, dtype=torch.float64)
    x = torch.randn(9, 3, INPUT, dtype=torch.float64)
    whole, last = model(x)
    head, state = model(x[:4])
    empty, state = model(x[4:4], state)
    tail, state = model(x[4:], state)
    torch.testing.assert_close(torch.cat([head, empty, tail]), whole, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, last, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(7, 0), (0, 3), (1, 1), (0, 0)], ids=str)
def test_empty_and_short(module: str, shape: tuple[int, int]) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=True)
    x = torch.randn(*shape, INPUT, requires_grad=True)
    initial = [torch.rand(4, shape[1], HIDDEN) for _ in range(STATES[module])]
    output, final = model(x, pack_state(initial))
    final = flat(final)
    assert output.shape == (*shape, 2 * HIDDEN)
    assert all(state.shape == (4, shape[1], HIDDEN) for state in final)
    if shape[0] == 0:
        assert all(torch.equal(state, given) for state, given in zip(final, initial, strict=True))
    (output.sum() + sum(state.sum() for state in final)).backward()
    assert x.grad.shape == x.shape
    # Where no step runs a backend may leave the recurrent weights out of the graph.
    gradients = [weight.grad for weight in model.parameters() if shape[0] or weight.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("module", MODULES)
def test_packed_equals_each_sequence_alone(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=True, dtype=torch.float64)
    sequences = [torch.randn(length, INPUT, dtype=torch.float64) for length in LENGTHS]
    output, final = model(pack_sequence(sequences, enforce_sorted=False))
    outputs = torch.nn.utils.rnn.unpack_sequence(output)
    for index, sequence in enumerate(sequences):
        alone, last = model(sequence)
        torch.testing.assert_close(outputs[index], alone, rtol=1e-13, atol=1e-13)
        for state, expected in zip(flat(final), flat(last), strict=True):
            torch.testing.assert_close(state[:, index], expected, rtol=1e-13, atol=1e-13)


def test_packed_nan_stays_in_its_sequence() -> None:
    model = seqops.nn.LSTM(INPUT, HIDDEN)
    sequences = [torch.randn(7, INPUT), torch.full((3, INPUT), torch.nan), torch.randn(2, INPUT)]
    outputs = torch.nn.utils.rnn.unpack_sequence(model(pack_sequence(sequences))[0])
    assert [bool(output.isnan().any()) for output in outputs] == [False, True, False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("module", MODULES)
def test_time_major_output_is_contiguous(module: str, backend: str) -> None:
    x = torch.randn(7, 3, INPUT)
    for both in (False, True):
        model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=both)
        with seqops.backend(backend):
            output, _ = model(x)
        assert output.is_contiguous()
        torch.testing.assert_close(output, model(x)[0], rtol=1e-5, atol=1e-6)


def test_strided_input() -> None:
    model = seqops.nn.LSTM(INPUT, HIDDEN, batch_first=True)
    wide = torch.randn(7, 3, 2 * INPUT)
    x = wide.transpose(0, 1)[..., ::2]
    torch.testing.assert_close(model(x), model(x.clone(memory_format=torch.contiguous_format)), rtol=0, atol=0)


@pytest.mark.parametrize("module", MODULES)
def test_16_bit_states(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, dtype=torch.bfloat16)
    x = torch.randn(7, 3, INPUT, dtype=torch.bfloat16)
    output, final = model(x)
    assert output.dtype == torch.bfloat16
    assert all(state.dtype == (torch.float32 if module == "SLSTM" else torch.bfloat16) for state in flat(final))
    wide = [state.float() for state in flat(final)]
    narrow = [state.bfloat16() for state in flat(final)]
    assert model(x, pack_state(wide))[0].dtype == torch.bfloat16
    assert model(x, pack_state(narrow))[0].dtype == torch.bfloat16


# ---------------------------------------------------------------- dropout, recompute


@pytest.mark.parametrize("module", MODULES)
def test_dropout_is_between_layers_and_in_training(module: str) -> None:
    kind = getattr(seqops.nn, module)
    model = kind(INPUT, HIDDEN, 2, batch_first=True, dropout=0.5)
    layers = [kind(INPUT, HIDDEN, batch_first=True), kind(HIDDEN, HIDDEN, batch_first=True)]
    for index, layer in enumerate(layers):
        layer.load_state_dict(
            {
                name.replace(f"_l{index}", "_l0"): weight
                for name, weight in model.state_dict().items()
                if f"_l{index}" in name
            }
        )
    x = torch.randn(3, 7, INPUT)
    torch.manual_seed(5)
    output, _ = model(x)
    torch.manual_seed(5)
    expected = layers[1](functional.dropout(layers[0](x)[0], 0.5))[0]
    assert torch.equal(output, expected)
    assert not torch.equal(output, model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], layers[1](layers[0](x)[0])[0])


def saved_bytes(model: torch.nn.Module, x: Tensor) -> int:
    """What autograd keeps, weights and input apart."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters())}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = model(x)
    del result
    return sum(storages.values())


@pytest.mark.parametrize("module", MODULES)
def test_recompute(module: str) -> None:
    torch.manual_seed(0)
    plain = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=True)
    torch.manual_seed(0)
    lean = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=True, recompute=True)
    assert repr(lean).endswith("recompute=True)")
    x = torch.randn(7, 3, INPUT)
    results = []
    for model in (plain, lean):
        outputs = flat(model(x))
        results.append(outputs + list(torch.autograd.grad(outputs, list(model.parameters()), outputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert saved_bytes(lean, x) <= saved_bytes(plain, x) / 3
    with torch.no_grad():
        assert torch.equal(lean(x)[0], plain(x)[0])


# ---------------------------------------------------------------- what modules take part in


@pytest.mark.parametrize("form", ["time_major", "batch_first"])
@pytest.mark.parametrize("module", MODULES)
def test_compile_in_one_graph_for_all_sizes(module: str, form: str) -> None:
    torch.compiler.reset()
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, bidirectional=True, batch_first=form == "batch_first")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((7, 3), (4, 5)):
        x = torch.randn(*shape, INPUT)
        results = []
        for run_model in (model, compiled):
            with torch._dynamo.config.patch(error_on_recompile=shape == (4, 5)):
                outputs = flat(run_model(x))
            results.append(outputs + list(torch.autograd.grad(outputs, list(model.parameters()), outputs)))
        torch.testing.assert_close(results[1], results[0], rtol=1e-6, atol=1e-6)


def test_compile_with_states_and_projections() -> None:
    torch.compiler.reset()
    model = seqops.nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, hx = torch.randn(7, 3, INPUT), (torch.randn(4, 3, 4), torch.randn(4, 3, HIDDEN))
    torch.testing.assert_close(compiled(x, hx), model(x, hx), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("module", MODULES)
def test_export_with_dynamic_batch_and_time(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=True).eval()
    batch, time = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("time", min=2, max=64)
    program = torch.export.export(model, (torch.randn(7, 3, INPUT),), dynamic_shapes=({0: time, 1: batch},))
    x = torch.randn(4, 5, INPUT)
    torch.testing.assert_close(program.module()(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("module", MODULES)
def test_autocast(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, bidirectional=True)
    x = torch.randn(7, 3, INPUT)
    absent = [0.0, 0.0, 0.0, -torch.inf]
    initial = pack_state([torch.full((4, 3, HIDDEN), value) for value in absent[: STATES[module]]])
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = model(x)
        again, _ = model(x, initial)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, again)
    narrow = copy.deepcopy(model).bfloat16()
    assert error([output], [model(x)[0]]) < 1.2 * error([narrow(x.bfloat16())[0]], [model(x)[0]])
    output.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("module", MODULES)
def test_functional_transforms(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, dtype=torch.float64)
    x = torch.randn(7, 3, INPUT, dtype=torch.float64)

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (x,))[0].square().sum()

    weights = {name: torch.randn_like(weight) for name, weight in model.named_parameters()}
    gradients = torch.func.grad(loss)(weights)
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    other(x)[0].square().sum().backward()
    for name, weight in other.named_parameters():
        torch.testing.assert_close(gradients[name], weight.grad, rtol=1e-12, atol=1e-12)

    several = {name: torch.stack([weight, -weight]) for name, weight in weights.items()}
    losses = torch.func.vmap(loss)(several)
    torch.testing.assert_close(losses[0], loss(weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", MODULES)
def test_copies_and_pickles(module: str) -> None:
    model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2, num_heads=2, recompute=True).eval()
    x = torch.randn(7, 3, INPUT)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert repr(twin) == repr(model)
        assert torch.equal(twin(x)[0], model(x)[0])
        twin.bias_ih_l0.data.add_(1)
        assert not torch.equal(twin(x)[0], model(x)[0])


@pytest.mark.parametrize("module", MODULES)
def test_devices_and_freezing(module: str) -> None:
    kind = getattr(seqops.nn, module)
    model = kind(INPUT, HIDDEN, device="meta")
    assert model(torch.empty(7, 3, INPUT, device="meta"))[0].shape == (7, 3, HIDDEN)
    model.to_empty(device="cpu").reset_parameters()
    model.requires_grad_(False)
    assert not model(torch.randn(7, 3, INPUT))[0].requires_grad
    assert skip_init(kind, INPUT, HIDDEN).weight_hh_l0.device.type == "cpu"
    assert kind(INPUT, HIDDEN).to(torch.float16).weight_hh_l0.dtype == torch.float16
    model.flatten_parameters()


@pytest.mark.parametrize("module", MODULES)
def test_replaced_weights_are_honoured(module: str) -> None:
    x = torch.randn(7, 3, INPUT)
    model = getattr(seqops.nn, module)(INPUT, HIDDEN)
    before = model(x)[0]

    class Double(torch.nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return 2 * weight

    double = Double()
    parametrize.register_parametrization(model, "weight_hh_l0", double)
    double.calls = 0
    twice = model(x)[0]
    assert double.calls == 1
    parametrize.remove_parametrizations(model, "weight_hh_l0")
    assert torch.equal(model(x)[0], twice)
    model.weight_hh_l0 = torch.nn.Parameter(model.weight_hh_l0.detach() / 2)
    torch.testing.assert_close(model(x)[0], before, rtol=0, atol=0)

    normed = parametrizations.weight_norm(copy.deepcopy(model), "weight_ih_l0")
    torch.testing.assert_close(normed(x)[0], before, rtol=1e-6, atol=1e-6)
    pruned = prune.random_unstructured(copy.deepcopy(model), "weight_hh_l0", amount=1.0)
    model.weight_hh_l0.data.zero_()
    assert torch.equal(pruned(x)[0], model(x)[0])


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for module in MODULES:
            model = getattr(seqops.nn, module)(INPUT, HIDDEN, 2)
            twin = copy.deepcopy(model)
            x = torch.randn(7, 3, INPUT)
            for run_model in (torch.nn.parallel.DistributedDataParallel(model), twin):
                run_model(x)[0].square().sum().backward()
            for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- convert


class Tagger(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.LSTM(INPUT, HIDDEN, 2, batch_first=True, bidirectional=True)
        self.layers = torch.nn.ModuleList([torch.nn.GRU(2 * HIDDEN, HIDDEN, batch_first=True)])
        self.again = self.layers[0]
        self.head = torch.nn.RNN(HIDDEN, 3, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.encoder(x)
        x, _ = self.layers[0](x)
        return self.head(x)[0]


def test_convert_a_model() -> None:
    model = Tagger().double()
    model.encoder.eval()
    model.head.weight_hh_l0.requires_grad_(False)
    x = torch.randn(3, 7, INPUT, dtype=torch.float64)
    expected = model(x)
    parameters = dict(model.named_parameters())
    calls = []
    handle = model.head.register_forward_hook(lambda *_: calls.append(1))
    shown = repr(model)

    assert seqops.nn.convert(model) is model
    assert type(model.encoder) is seqops.nn.LSTM
    assert type(model.layers[0]) is seqops.nn.GRU
    assert type(model.head) is seqops.nn.RNN
    assert model.again is model.layers[0]
    assert repr(model) == shown
    assert not model.encoder.training
    assert model.head.training
    assert all(weight is parameters[name] for name, weight in model.named_parameters())
    assert not model.head.weight_hh_l0.requires_grad
    torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)
    assert calls == [1]
    handle.remove()

    encoder = model.encoder
    assert seqops.nn.convert(model).encoder is encoder
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.float()):
        torch.testing.assert_close(twin(x.to(twin.head.bias_hh_l0.dtype)).double(), expected, rtol=1e-5, atol=1e-5)
    assert Tagger().load_state_dict(model.state_dict()).missing_keys == []


def test_convert_goes_on_with_the_optimizer() -> None:
    results = []
    for change in (lambda model: model, seqops.nn.convert):
        torch.manual_seed(0)
        model = Tagger().double()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        x = torch.randn(3, 7, INPUT, dtype=torch.float64)
        for step in range(4):
            if step == 2:
                model = change(model)
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
        results.append(loss)
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=0)


def test_convert_the_root_and_compile_it() -> None:
    torch.compiler.reset()
    theirs = torch.nn.LSTM(INPUT, HIDDEN, 2, proj_size=3, dtype=torch.float64)
    ours = seqops.nn.convert(copy.deepcopy(theirs))
    assert type(ours) is seqops.nn.LSTM
    x = torch.randn(7, 3, INPUT, dtype=torch.float64)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x), rtol=1e-13, atol=1e-13)


def test_convert_keeps_parametrizations() -> None:
    theirs = parametrizations.weight_norm(torch.nn.LSTM(INPUT, HIDDEN), "weight_hh_l0")
    ours = seqops.nn.convert(copy.deepcopy(theirs))
    assert isinstance(ours, seqops.nn.LSTM)
    assert parametrize.is_parametrized(ours, "weight_hh_l0")
    x = torch.randn(7, 3, INPUT)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is seqops.nn.LSTM
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_convert_leaves_what_it_does_not_know() -> None:
    class Own(torch.nn.LSTM):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(input, hx)

    patched = torch.nn.GRU(INPUT, HIDDEN)
    patched.forward = lambda x: x
    quantized = torch.ao.nn.quantized.dynamic.LSTM(INPUT, HIDDEN)
    others = [Own(INPUT, HIDDEN), patched, quantized, torch.nn.LSTMCell(INPUT, HIDDEN), torch.nn.Linear(2, 2)]
    kinds = [type(module) for module in others]
    model = seqops.nn.convert(torch.nn.ModuleList(others))
    assert [type(module) for module in model] == kinds


def test_convert_does_not_keep_old_weights() -> None:
    model = seqops.nn.convert(torch.nn.LSTM(INPUT, HIDDEN))
    model.weight_ih_l0 = torch.nn.Parameter(torch.zeros_like(model.weight_ih_l0))
    assert {id(value) for value in model.state_dict(keep_vars=True).values()} == {id(p) for p in model.parameters()}
    assert not [name for name in vars(model) if "flat_weight" in name]


# ---------------------------------------------------------------- errors


def construct(kind: str, *arguments: Any, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(seqops.nn, kind)(*arguments, **options)


def call(kind: str, x: Any, hx: Any = None, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(seqops.nn, kind)(INPUT, HIDDEN, **options)(x, hx)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


MESSAGES = [
    (construct("LSTM", 5.0, 6), "LSTM: input_size: expected int, got float"),
    (construct("GRU", 5, "6"), "GRU: hidden_size: expected int, got str"),
    (construct("LSTM", 5, 6, bias=1), "LSTM: bias: expected bool, got int"),
    (construct("RNN", 5, 6, batch_first=None), "RNN: batch_first: expected bool, got NoneType"),
    (construct("LSTM", 0, 6), "LSTM: input_size: expected at least 1, got 0"),
    (construct("SLSTM", 5, -1), "SLSTM: hidden_size: expected at least 1, got -1"),
    (construct("LSTM", 5, 6, 0), "LSTM: num_layers: expected at least 1, got 0"),
    (construct("LSTM", 5, 6, num_heads=0), "LSTM: num_heads: expected at least 1, got 0"),
    (construct("LSTM", 5, 6, num_heads=4), "LSTM: num_heads: expected a divisor of hidden_size = 6, got 4"),
    (construct("LSTM", 5, 6, dropout=1.5), "LSTM: dropout: expected a number in [0, 1], got 1.5"),
    (construct("LSTM", 5, 6, dropout=True), "LSTM: dropout: expected a number in [0, 1], got True"),
    (construct("LSTM", 5, 6, proj_size=6), "LSTM: proj_size: expected 0 or less than hidden_size = 6, got 6"),
    (construct("LSTM", 5, 6, proj_size=-1), "LSTM: proj_size: expected 0 or less than hidden_size = 6, got -1"),
    (construct("GRU", 5, 6, proj_size=2), "GRU: proj_size: expected 0, since only LSTM has projections, got 2"),
    (
        construct("LSTM", 5, 6, proj_size=2, num_heads=3),
        "LSTM: proj_size: expected 0 with num_heads = 3 (a projection would mix the heads that the recurrence keeps "
        "apart), got 2",
    ),
    (construct("RNN", 5, 6, nonlinearity="gelu"), "RNN: nonlinearity: expected 'tanh' or 'relu', got 'gelu'"),
    (call("LSTM", zeros(5)), "LSTM: input: expected 2 or 3 dimensions, got shape [5]"),
    (call("LSTM", zeros(1, 2, 3, 5)), "LSTM: input: expected 2 or 3 dimensions, got shape [1, 2, 3, 5]"),
    (call("GRU", zeros(7, 3, 4)), "GRU: input: expected input_size = 5 features, got shape [7, 3, 4]"),
    (call("GRU", zeros(7, 5, dtype=torch.float64)), "GRU: input: expected the weights' dtype float32, got float64"),
    (call("GRU", zeros(7, 5), device="meta"), "GRU: input: expected the weights' device meta, got cpu"),
    (
        call("GRU", zeros(7, 5).to("meta", torch.float64), device="meta"),
        "GRU: input: expected the weights' dtype float32, got float64",
    ),
    (
        call("LSTM", zeros(7, 3, 5), (zeros(1, 3, 6), zeros(1, 3, 6).to("meta"))),
        "LSTM: hx[1]: expected the weights' device cpu, got meta",
    ),
    (call("GRU", zeros(7, 3, 5), (zeros(1, 3, 6),)), "GRU: hx: expected a tensor, got tuple"),
    (call("LSTM", zeros(7, 3, 5), zeros(1, 3, 6)), "LSTM: hx: expected a tuple of 2 tensors (h, c), got Tensor"),
    (
        call("SLSTM", zeros(7, 3, 5), (zeros(1, 3, 6),) * 2),
        "SLSTM: hx: expected a tuple of 4 tensors (h, c, n, m), got 2 of them",
    ),
    (
        call("RNN", zeros(7, 3, 5), zeros(3, 6)),
        "RNN: hx: expected [num_layers * directions, B, features] = [1, 3, 6], got [3, 6]",
    ),
    (
        call("LSTM", zeros(7, 3, 5), (zeros(4, 3, 2), zeros(4, 3, 2)), num_layers=2, bidirectional=True, proj_size=2),
        "LSTM: hx[1]: expected [num_layers * directions, B, features] = [4, 3, 6], got [4, 3, 2]",
    ),
    (
        call("LSTM", zeros(7, 3, 5), (zeros(1, 7, 6), zeros(1, 3, 6))),
        "LSTM: hx[0]: expected [num_layers * directions, B, features] = [1, 3, 6], got [1, 7, 6]",
    ),
    (
        call("LSTM", zeros(7, 5), (zeros(1, 1, 6), zeros(1, 6))),
        "LSTM: hx[0]: expected [num_layers * directions, features] = [1, 6], got [1, 1, 6]",
    ),
    (call("RNN", zeros(7, 5), zeros(1, 6, dtype=torch.float64)), "RNN: hx: expected float32, got float64"),
    (
        call("RNN", zeros(7, 5).half(), zeros(1, 6, dtype=torch.float64), dtype=torch.float16),
        "RNN: hx: expected float16 or float32, got float64",
    ),
    (
        call("GRU", pack_sequence([zeros(2, 5), zeros(1, 5)]), zeros(1, 3, 6)),
        "GRU: hx: expected [num_layers * directions, B, features] = [1, 2, 6], got [1, 3, 6]",
    ),
    (
        call("GRU", pack_sequence([zeros(2), zeros(1)])),
        "GRU: input.data: expected 2 dimensions, got shape [3]",
    ),
    (lambda: seqops.nn.convert(3), "convert: model: expected a torch.nn.Module, got int"),
]


@pytest.mark.parametrize(("action", "message"), MESSAGES, ids=[message for _, message in MESSAGES])
def test_messages(action: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError)) as raised:
        action()
    assert str(raised.value) == message


def test_useless_dropout_warns() -> None:
    with pytest.warns(UserWarning) as raised:
        seqops.nn.GRU(5, 6, dropout=0.5)
    assert str(raised[0].message) == "GRU: dropout=0.5 does nothing: it acts between layers, and there is one"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        seqops.nn.GRU(5, 6, 2, dropout=0.5)
