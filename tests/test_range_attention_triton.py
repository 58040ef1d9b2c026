"""The Triton kernels of range_attention: in Triton's interpreter, and what of them is launched and listed.

Tests that are marked `tiny` run again with the backend "triton" in a process whose Triton interprets: see test_rung.
The interpreter walks tiles of 16 by 16, so that short cases have several, some of them seen whole.
"""

import importlib.util
import itertools
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from cases import common
from torch import Tensor

from seqops.attention import range_attention, ranges, reference
from seqops.core import choose
from seqops.tune import device as devices

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
tiles = import_module("seqops.attention.tiles")

# Relative, of the root of mean squares. The interpreter multiplies 16-bit operands in float32.
BOUNDS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
NAMES = ("q", "k", "v", "k2", "v2", "bias")


class Case(NamedTuple):
    pattern: str = "causal"  # chunks, causal chunks, "window", or own "block" and all before it, in two parts
    T: int = 40
    size: int = 10  # of chunks, blocks or the window
    dtype: torch.dtype = torch.float32
    S: int = 0  # rows of a second source
    bias: str = ""
    activation: str = "softmax"
    B: int = 1
    H: int = 2
    Hk: int = 1
    D: int = 16

    def __str__(self) -> str:
        return "-".join(str(each).removeprefix("torch.") for each in self if each not in ("", 0))

    def ranges(self) -> Tensor:
        t, size = torch.arange(self.T), self.size
        first = t - t % size
        return ranges.stack(
            {
                "chunks": [(first, torch.clamp(first + size, max=self.T))],
                "causal": [(first, t + 1)],
                "window": [((t - size).clamp(min=0), t + 1)],
                "block": [(first, t + 1), (0 * t, first)],
            }[self.pattern]
        )

    def inputs(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.T + self.D)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(self.dtype).requires_grad_()

        B, T, S, H, Hk, D, C = self.B, self.T, self.S, self.H, self.Hk, self.D, self.size
        inputs: dict[str, Any] = {"q": draw(B, T, H, D), "k": draw(B, T, Hk, D), "v": draw(B, T, Hk, D)}
        inputs["ranges"] = self.ranges()
        if S:
            t = torch.arange(T)
            inputs |= {"k2": draw(B, S, Hk, D), "v2": draw(B, S, Hk, D), "ranges2": ranges.stack([(0 * t, t * S // T)])}
        sizes = {"distance": (H, 2 * C - 1), "square": (1, C, C)}.get(self.bias)
        if sizes is not None:
            inputs["bias"] = draw(*sizes)
        return inputs | {"activation": self.activation}


def cotangents_of(outputs: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(each.shape, generator=generator).to(each.dtype) for each in outputs]


def assert_as_the_reference(case: Case) -> None:
    inputs = case.inputs()
    cotangents = cotangents_of(range_attention(**inputs))
    got = common.evaluate(range_attention, inputs, cotangents)
    exact = common.evaluate(reference.range_attention, common.in_float64(inputs), cotangents)
    bounds = {name: common.allowance(BOUNDS[case.dtype], value) for name, value in exact.items()}
    common.assert_within(got, exact, bounds)


QUICK = [
    Case("chunks", 33, 20, H=1),
    Case("causal", 37, 9, torch.bfloat16),
    Case("window", 37, 17, H=1, D=40),
    Case("block", 20, 6, torch.float16, S=20, B=2),
    Case("chunks", 11, 4, torch.float64, bias="distance"),
    Case("causal", 40, 20, bias="square", H=1),
    Case("causal", 19, 8, activation="laplace", bias="distance"),
    Case("chunks", 18, 32, torch.bfloat16, activation="relu2"),
    Case("block", 17, 16, D=33, Hk=2),
    Case("chunks", 9, 9, torch.float64, activation="laplace", S=5),
]
SLOW = [
    *(
        Case(pattern, T, size, dtype, S=S)
        for pattern, (T, size), dtype, S in itertools.product(
            ("chunks", "causal", "window", "block"), ((1, 1), (16, 16), (49, 3), (49, 100)), BOUNDS, (0, 17)
        )
    ),
    *(
        Case(pattern, 45, 18, dtype, bias=bias, activation=activation, Hk=2)
        for pattern, dtype, bias, activation in itertools.product(
            ("causal", "window"), BOUNDS, ("", "distance", "square"), ("softmax", "laplace", "relu2")
        )
    ),
    *(Case("block", 20, 7, dtype, D=D) for dtype, D in itertools.product(BOUNDS, (1, 64, 96, 300))),
]


@pytest.mark.tiny
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_values_and_gradients(case: Case) -> None:
    assert_as_the_reference(case)


# ---- NaN and infinity


def affected(case: Case, name: str) -> dict[str, Tensor]:
    """Of a special value in row 20 of a head of `name`: what may differ from a call with another value there."""
    seen = reference.range_counts(case.ranges(), case.T)[0, 0] > 0  # [Tq, Tk]
    at = torch.arange(case.T) == 20
    rows = seen[:, 20] if name in ("k", "v") else at  # queries whose scores or outputs are other ones
    keys = seen[rows].any(0)  # what these see
    return {"0": rows & (name != "do"), "dq": rows, "dk": keys, "dv": keys}


@pytest.mark.tiny
@pytest.mark.parametrize("name", ["q", "k", "v", "do"])
@pytest.mark.parametrize(("activation", "value"), [("softmax", torch.nan), ("relu2", torch.inf)])
def test_special_values_stay_with_those_that_see_them(activation: str, value: float, name: str) -> None:
    """Rows that do not see a value are what they are without it, where tiles hold both kinds of rows."""
    case = Case("causal", 24, 9, H=2, Hk=2, activation=activation, D=4)

    def results(special: float) -> dict[str, Tensor]:
        inputs = case.inputs()
        cotangents = cotangents_of(range_attention(**inputs))
        with torch.no_grad():
            {**inputs, "do": cotangents[0]}[name][0, 20, 0, 3] = special
        return common.evaluate(range_attention, inputs, cotangents)

    plain, got = results(0.5), results(value)
    for part, rows in affected(case, name).items():
        torch.testing.assert_close(got[part][0, ~rows, 0], plain[part][0, ~rows, 0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(got[part][0, :, 1], plain[part][0, :, 1], rtol=0, atol=0)
    assert not all(each.isfinite().all() for each in got.values())


@pytest.mark.tiny
def test_values_that_are_not_finite_are_those_of_the_reference() -> None:
    inputs = Case("window", 40, 9, H=1).inputs()
    with torch.no_grad():
        inputs["v"][0, 20, 0, :4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0])
        inputs["v"][0, 23, 0, 1] = -torch.inf
        inputs["k"][0, 35, 0, 0] = torch.nan
        got, exact = range_attention(**inputs), reference.range_attention(**inputs)
    for one, other in zip(got, exact, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.tiny
def test_queries_that_see_nothing() -> None:
    """o is 0, lse -inf, and no gradient comes of them, whatever that of lse is; others of their tile are as always."""
    inputs, t = Case("causal", 20, 20).inputs(), torch.arange(20)
    inputs["ranges"] = ranges.stack([(0 * t, t // 3 * 3)])
    o, lse = range_attention(**inputs)
    assert not o[:, :3].any() and (lse[..., :3] == -torch.inf).all() and lse[..., 3:].isfinite().all()
    dlse = torch.ones_like(lse)
    dlse[..., :3] = torch.nan
    dq, dk, dv = torch.autograd.grad((o, lse), [inputs[n] for n in "qkv"], (torch.ones_like(o), dlse))
    assert not dq[:, :3].any()
    assert all(each.isfinite().all() for each in (dq, dk, dv))


@pytest.mark.tiny
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_weights_have_all_digits(dtype: torch.dtype) -> None:
    """The error function's complement keeps its relative accuracy where `1 + erf` would have none."""
    scores = torch.linspace(-1.5 if dtype == torch.float32 else -6, 3, 40, dtype=dtype)
    q, k = scores.view(1, 40, 1, 1), torch.ones(1, 40, 1, 1, dtype=dtype)
    t = torch.arange(40)
    o, _ = range_attention(q, k, k, ranges.stack([(t, t + 1)]), scale=1.0, activation="laplace")
    exact = reference.weight_function("laplace", scores.double()).view(o.shape)
    assert exact.min() < 1e-6
    torch.testing.assert_close(o.double(), exact, rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=0)


@pytest.mark.tiny
@needs_triton
@pytest.mark.parametrize("memory", [0, 1 << 20])
def test_bias_sums_in_any_memory(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One table for all batch rows, or one for each and for pieces of its chunks."""
    monkeypatch.setattr(import_module("seqops.attention.triton_range_attention"), "PARTIAL_BYTES", memory)
    assert_as_the_reference(Case("causal", 17, 4, bias="distance", B=2, H=1))


@pytest.mark.tiny
def test_two_runs_are_bit_equal() -> None:
    inputs = Case("causal", 34, 12, torch.bfloat16, bias="distance").inputs()
    cotangents = cotangents_of(range_attention(**inputs))
    first, second = (common.evaluate(range_attention, inputs, cotangents) for _ in range(2))
    common.assert_same_bits(first, second)


@needs_triton
def test_rung(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked tiny, in a process of their own. Above five seconds for that reason."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


# ---- what is launched


Asked = list[tuple[Any, dict[str, Any]]]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Kernels and arguments of all launches, none of which is done."""
    triton, found = import_module("seqops.attention.triton_range_attention"), []

    def record(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], *options: int) -> None:
        assert {*arguments} == {*kernel.arg_names}
        found.append((kernel, arguments))

    monkeypatch.setattr(triton, "launch", record)
    return found


def launch_all(case: Case) -> None:
    triton = import_module("seqops.attention.triton_range_attention")
    inputs = {name: each.detach() if torch.is_tensor(each) else each for name, each in case.inputs().items()}
    o, lse = triton.range_attention(**inputs)
    for name in ("ranges", "ranges2"):
        if name in inputs:
            keys = inputs["k" if name == "ranges" else "k2"].shape[1]
            inputs[name.replace("ranges", "seen")] = ranges.seen_by(inputs[name], keys)
    triton.range_attention_backward(o, lse, o, lse, **inputs)
    triton.range_attention_backward(None, None, o, lse, **inputs)


def constants_of(kernel: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    return {p.name: arguments[p.name] for p in kernel.params if p.is_constexpr}


@needs_triton
def test_every_launch_is_listed(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers ask for is what `configurations()` names: constants and types of pointers."""
    triton = import_module("seqops.attention.triton_range_attention")
    listed = import_module("seqops.attention.triton_configurations_range_attention")

    def key(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
        return (
            kernel.__name__,
            *sorted((n, t) for n, t in types.items() if n[:2] == "p_"),
            *sorted((n, int(v)) for n, v in constants.items()),
        )

    known = {key(each["kernel"], each["types"], each["constants"]) for each in listed.configurations()}
    names = {dtype: f"*{name}" for dtype, name in listed.TYPES.items()} | {torch.int32: "*i32"}
    forms = [("softmax", "", 0), ("softmax", "", 9), ("softmax", "distance", 0), ("softmax", "square", 0)]
    forms += [("laplace", "", 0), ("laplace", "distance", 0), ("relu2", "square", 0)]
    wanted = set()
    for dtype, direction in itertools.product(BOUNDS, tiles.DIRECTIONS):
        for D, (activation, bias, S) in [*itertools.product([61], forms), *((D, forms[0]) for D in (9, 48, 128, 310))]:
            for shape in tiles.shapes(direction, common.name_of(dtype), -(-D // 16) * 16, bool(bias)):
                chosen = {"rows": shape.rows, "others": shape.others, "warps": shape.warps, "stages": shape.stages}
                monkeypatch.setitem(choose._forced, f"range_attention.{direction}.triton", [chosen])
                for other in {*tiles.DIRECTIONS} - {direction}:
                    choice = tiles.shapes(other, common.name_of(dtype), -(-D // 16) * 16, bool(bias))[0]
                    chosen = {name: getattr(choice, name) for name in ("rows", "others", "warps", "stages")}
                    monkeypatch.setitem(choose._forced, f"range_attention.{other}.triton", [chosen])
                launch_all(Case("causal", 20, 8, dtype, S=S, bias=bias, activation=activation, D=D))
    for kernel, arguments in asked:
        types = {n: names[v.dtype] for n, v in arguments.items() if isinstance(v, Tensor)}
        wanted.add(key(kernel, types, constants_of(kernel, arguments)))
    assert len(wanted) > 150
    assert triton.TUNABLES.keys() == {*tiles.DIRECTIONS}
    missing = sorted(wanted - known, key=str)
    assert not missing, (len(missing), missing[0])


@needs_triton
def test_new_lengths_compile_nothing(asked: Asked) -> None:
    """Lengths, batch, heads, parts, ranges and chunk sizes are run-time arguments: the constants are the same.

    Triton compiles again for an integer that is 1 or a multiple of 16 where it was not, unless it is told not to.
    """
    compiled = set()
    for case in (Case("causal", 40, 8), Case("chunks", 129, 16, B=2), Case("block", 48, 1, H=16), Case("window", 1, 1)):
        del asked[:]
        launch_all(case)
        compiled.add(tuple((kernel.__name__, str(constants_of(kernel, arguments))) for kernel, arguments in asked))
    assert len(compiled) == 1
    for kernel, arguments in asked:
        for parameter in kernel.params:
            if isinstance(arguments[parameter.name], int) and not parameter.is_constexpr:
                assert parameter.do_not_specialize, (kernel.__name__, parameter.name)


@needs_triton
def test_accesses_are_wide(asked: Asked) -> None:
    """Whatever the strides: rows begin at multiples of 16 elements, and odd channels are padded."""
    triton = import_module("seqops.attention.triton_range_attention")
    case = Case("causal", 20, 8, torch.bfloat16, D=40)
    inputs = {name: each.detach() if torch.is_tensor(each) else each for name, each in case.inputs().items()}
    for layout in common.LAYOUTS[:4]:
        odd = {name: common.arrange(inputs[name], layout) for name in "qkv"}
        o, _ = triton.range_attention(**{**inputs, **odd})
        assert o.shape == inputs["q"].shape and o.is_contiguous()
    for _, arguments in asked:
        assert arguments["D"] == 48
        for name in ("p_q", "p_k", "p_v"):
            x = arguments[name]
            assert x.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in x.stride()[:3]) and x.stride(3) == 1


@needs_triton
@pytest.mark.parametrize("preset", list(devices.PRESETS))
def test_tiles_follow_the_work(preset: str) -> None:
    """Large tiles where there are programs enough, small ones where there are few."""
    triton = import_module("seqops.attention.triton_range_attention")

    def choice(direction: str, T: int, H: int) -> dict[str, int]:
        key = triton.key_of(direction, "bfloat16", 1, T, H, 64, 1, False)
        return triton.TUNABLES[direction].problem(devices.find(preset), key).solve()

    for direction in tiles.DIRECTIONS:
        assert choice(direction, 1 << 17, 16)["rows"] > choice(direction, 256, 1)["rows"]
