"""The Triton kernels of linear attention: in Triton's interpreter, and what of them is launched and listed.

Tests that are marked `tiny` run again with the backend "triton" in a process whose Triton interprets: see test_rung.
The interpreter walks rows of 32 steps in chunks of 16, so that short cases have several of both.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from seqops.core import choose
from seqops.tune import device as devices

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
reference, tiles, op = (import_module(f"seqops.linear_attention.{name}") for name in ("reference", "tiles", "op"))

# Relative, of the root of mean squares. The interpreter multiplies 16-bit operands in float32.
BOUNDS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.bfloat16: 6e-3, torch.float16: 8e-4}
NAMES = ("q", "k", "v", "log_decay", "initial_state")


class Case(NamedTuple):
    decay: str | None = None  # "head", "step", "channel"
    T: int = 37
    dtype: torch.dtype = torch.float32
    state: bool = False
    window: int | None = None
    causal: bool = True
    edges: tuple[int, ...] | None = None
    B: int = 1
    H: int = 1
    K: int = 3
    V: int = 2
    transposed: bool = False

    def __str__(self) -> str:
        return "-".join(str(each).removeprefix("torch.") for each in self if each not in (None, False))

    def inputs(self) -> dict[str, Any]:
        """Every argument; decays hold resets and some that are positive, which count as 0."""
        generator = torch.Generator().manual_seed(len(str(self)) + self.T)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=generator)

        B, T, H, K, V = self.B, self.T, self.H, self.K, self.V
        sizes = {"head": (H,), "step": (B, T, H), "channel": (B, T, H, K)}.get(self.decay or "")
        g = None
        if sizes is not None:
            g = -draw(*sizes).abs()
            if len(sizes) > 1:
                g[torch.rand(sizes, generator=generator) < 0.1] = -torch.inf
                g[torch.rand(sizes, generator=generator) < 0.1] = 0.5
        rows = B if self.edges is None else len(self.edges) - 1
        tensors = [draw(B, T, H, K), draw(B, T, H, K), draw(B, T, H, V), g, draw(rows, H, K, V) if self.state else None]
        if self.transposed:
            tensors[:3] = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in tensors[:3]]
        inputs: dict[str, Any] = {
            name: None if t is None else t.to(self.dtype).requires_grad_()
            for name, t in zip(NAMES, tensors, strict=True)
        }
        cu_seqlens = None if self.edges is None else torch.tensor(self.edges)
        return {**inputs, "causal": self.causal, "window": self.window, "cu_seqlens": cu_seqlens}


def results(function: Callable[..., Any], inputs: dict[str, Any], cotangents: list[Tensor]) -> dict[str, Tensor]:
    o, final = function(**inputs)
    leaves = {name: inputs[name] for name in NAMES if inputs[name] is not None}
    outputs = [each for each in (o, final) if each.requires_grad]
    wanted = [c.to(each.dtype) for each, c in zip((o, final), cotangents, strict=True) if each.requires_grad]
    grads = torch.autograd.grad(outputs, [*leaves.values()], wanted, materialize_grads=True)
    return {"o": o.detach(), "final": final.detach()} | dict(zip(leaves, grads, strict=True))


def compare(case: Case) -> None:
    inputs = case.inputs()
    doubled = {
        name: value.detach().double().requires_grad_()
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    with torch.no_grad():
        shapes = [each.shape for each in reference.linear_attention(**doubled)]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    got = results(op.linear_attention, inputs, cotangents)
    exact = results(reference.linear_attention, doubled, cotangents)
    if case.decay not in (None, "head"):
        g = inputs["log_decay"]
        assert not got["log_decay"][(g == -torch.inf) | (g > 0)].any()
    for name, value in exact.items():
        error = (got[name].double() - value).norm() / value.norm().clamp(min=1e-300)
        assert value.norm() == 0 == got[name].norm() or error <= BOUNDS[case.dtype], (name, error)


QUICK = [
    Case("step", 50, torch.bfloat16, state=True, K=5),
    Case("channel", 50, state=True),
    Case("channel", 21, torch.float64, edges=(0, 3, 3, 21), state=True),
    Case("head", 40, torch.float16, edges=(0, 33, 40), transposed=True),
    Case("step", 37, window=3),
    Case("channel", 33, torch.bfloat16, window=18),
    Case(None, 33, causal=False, state=True),
    Case("step", 1, torch.bfloat16, state=True, H=2),
    Case("channel", 1, torch.float32, state=True, B=2),
]
SLOW = [
    *(
        Case(decay, T, dtype, window=window, state=window is None)
        for decay, T, dtype, window in itertools.product(
            (None, "head", "step", "channel"), (15, 16, 17, 64), BOUNDS, (None, 1, 16, 17, 33, 100)
        )
    ),
    *(Case(decay, 20, K=K, V=V, state=True) for decay in (None, "step", "channel") for K, V in ((65, 3), (3, 65))),
    *(Case(decay, 60, window=w, edges=(0, 2, 22, 22, 60)) for decay in (None, "step", "channel") for w in (5, 18)),
]


@pytest.mark.tiny
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_values_and_gradients(case: Case) -> None:
    compare(case)


@pytest.mark.tiny
@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize(("decay", "window"), [("step", None), ("channel", None), ("channel", 17)])
def test_nan_keeps_to_later_steps(decay: str, window: int | None, name: str) -> None:
    """Not to earlier steps of its chunk, nor past a reset, nor out of the window: as in a loop over the steps."""
    inputs = Case(decay, 40, window=window).inputs()
    with torch.no_grad():
        inputs[name][0, 20, 0, 0] = torch.nan
        inputs["log_decay"][0, 29] = -torch.inf
        got, exact = (function(**inputs)[0] for function in (op.linear_attention, reference.linear_attention))
    assert exact.isnan().any()
    torch.testing.assert_close(got, exact, equal_nan=True, rtol=1e-4, atol=1e-5)


@pytest.mark.tiny
def test_two_runs_are_bit_equal() -> None:
    case = Case("step", 34, torch.bfloat16, state=True)
    inputs = case.inputs()
    cotangents = [torch.ones(1, 34, 1, 2), torch.ones(1, 1, 3, 2)]
    first, second = (results(op.linear_attention, inputs, cotangents) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@needs_triton
def test_rung(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked tiny, in a process of their own. Above five seconds for that reason."""
    environment = {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    run_rung(__file__, "tiny", **environment)


# ---- what is launched


@needs_triton
def test_every_launch_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers ask for is what `configurations()` names: constants and types of pointers."""
    triton = import_module("seqops.linear_attention.triton")

    def key(name: str, types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
        return name, *sorted(types.items()), *sorted((n, int(v)) for n, v in constants.items())

    known = {
        key(each["kernel"].__name__, {n: t for n, t in each["types"].items() if n[:2] == "p_"}, each["constants"])
        for each in triton.configurations()
    }
    names = {dtype: f"*{name}" for dtype, name in triton.TYPES.items()} | {torch.int64: "*i64", torch.int32: "*i32"}
    asked = set()

    def record(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], warps: int) -> None:
        assert {*arguments} == {*kernel.arg_names}
        types = {n: names[v.dtype] for n, v in arguments.items() if isinstance(v, Tensor)}
        constants = {n: v for n, v in arguments.items() if n.isupper() and n not in ("B", "T", "K", "V", "W")}
        asked.add(key(kernel.__name__, types, constants))

    for name in ("triton", "triton_walks"):
        monkeypatch.setattr(import_module(f"seqops.linear_attention.{name}"), "launch", record)
    decays, windows = (None, "head", "step", "channel"), (None, 3, 100)
    for dtype, decay, window, T in itertools.product(triton.TYPES, decays, windows, (1, 130)):
        for steps, width in ((16, 3), (64, 16)):
            for gate in (dtype, torch.float32 if dtype != torch.float64 else dtype):
                case = Case(decay, T, dtype, window=window, K=width, V=width, edges=(0, 3, T) if T > 3 else None)
                aligned = width == 16 and dtype in triton.HALVES and decay != "channel" and T > 1
                chosen = {"steps": steps if aligned else 16, "span": 32}
                monkeypatch.setattr(triton, "INTERPRETED_CHOICE", chosen)
                inputs = {n: v.detach() if isinstance(v, Tensor) else v for n, v in case.inputs().items()}
                g = inputs["log_decay"]
                tensors = [inputs["q"], inputs["k"], inputs["v"], None if g is None else g.to(gate), None]
                options = {name: inputs[name] for name in ("causal", "window", "cu_seqlens")}
                o, final = triton.linear_attention(*tensors, **options)
                triton.linear_attention_backward(o, final, *tensors, **options)
                if decay is None and window is None:
                    o, final = triton.linear_attention(*tensors, causal=False)
                    triton.linear_attention_backward(o, final, *tensors, causal=False)
    assert len(asked) > 200
    assert not asked - known, sorted(asked - known)[0]


@needs_triton
def test_rows_fill_the_device() -> None:
    """Whole sequences where they are many, pieces of them where they are few; of gradients of decays always pieces."""
    triton = import_module("seqops.linear_attention.triton")

    def choice(direction: str, B: int, decay: str) -> dict[str, int]:
        key = triton.key_of(direction, "bfloat16", B, 8192, 16, 64, 64, decay, True)
        return triton.TUNABLES[direction].problem(devices.find("h100"), key).solve(seconds=math.inf)

    assert choice("forward", 256, "step")["span"] == 0
    assert choice("forward", 1, "step")["span"] > 0
    assert choice("backward", 256, "step")["span"] > 0
    assert choice("backward", 256, "none")["span"] == 0


@needs_triton
def test_forced_choice_must_exist() -> None:
    kind = tiles.Kind("float32", False, False)
    with pytest.raises(RuntimeError, match=r"no kernel of 64 steps .* steps that exist: 16"):
        kind.shape(64)
    assert choose.forced_solution("linear_attention.forward.triton") is None
