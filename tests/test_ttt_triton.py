"""The Triton kernels of newton_schulz and large_chunk_ttt: in Triton's interpreter, and what of them is launched.

Tests that are marked `tiny` run again with the backend "triton" in a process whose Triton interprets: see test_rung.
There products of 16-bit operands are rounded as on a GPU, but for the order of their sums.
"""

import importlib.util
import itertools
import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import seqops
from seqops.core import backend, choose
from seqops.tune import device as devices

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
reference, tiles, composed = (
    import_module(f"seqops.ttt.{name}") for name in ("reference", "tiles_newton_schulz", "composed_large_chunk_ttt")
)
LACT = tuple(number for step in seqops.ttt.LACT_LM_STEPS for number in step)
STEPS = LACT[:9]
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *HALVES)


def drawn(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def is_triton() -> bool:
    return backend.current() == "triton"


@pytest.fixture(params=[True, False], ids=["whole", "tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices in one kernel; and as if they were large."""
    if is_triton() and not request.param:
        monkeypatch.setattr(tiles, "whole", lambda *arguments: None)


# ---- newton_schulz


def in_half(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """The plain iteration in the dtype of x, whose products are summed in float32."""
    dtype = x.dtype
    y = x.float() / (x.float().norm() + 1e-7)
    y = y.to(dtype).float()
    for i in range(0, len(coefficients), 3):
        a, b, c = coefficients[i : i + 3]
        gram = (y @ y.mT).to(dtype).float()
        y = (a * y + (b * gram + c * (gram @ gram)).to(dtype).float() @ y).to(dtype).float()
    return y


class Matrices(NamedTuple):
    M: int
    N: int
    coefficients: tuple[float, ...] | None = LACT
    dtype: torch.dtype = torch.float32
    n: tuple[int, ...] = (2,)

    def __str__(self) -> str:
        steps = {None: "muon", LACT: "lact"}.get(self.coefficients, f"steps{len(self.coefficients or ()) // 3}")
        batch = "x".join(map(str, self.n)) or "alone"
        return f"{batch}-M{self.M}-N{self.N}-{steps}-{str(self.dtype).removeprefix('torch.')}"


BOUNDS = {torch.float64: 1e-13, torch.float32: 1e-5}
QUICK = [
    Matrices(40, 37, STEPS, n=(1,)),
    Matrices(6, 9, None, n=(2,)),
    Matrices(5, 70, LACT[:6], torch.float64, (2, 1)),
    Matrices(17, 3, (), torch.float64, ()),
    Matrices(36, 20, LACT[:3], torch.float64, (1,)),
]
SLOW = [
    Matrices(M, N, steps, dtype)
    for (M, N), steps, dtype in itertools.product(
        ((1, 1), (16, 16), (33, 65), (70, 33)), (None, LACT), (torch.float32, torch.float64)
    )
]


@pytest.mark.tiny
@pytest.mark.parametrize("case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)], ids=str)
def test_newton_schulz(case: Matrices, tiled: None) -> None:
    x = drawn(*case.n, case.M, case.N).to(case.dtype).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = seqops.newton_schulz(x, case.coefficients), reference.newton_schulz(exact, case.coefficients)
    dy = drawn(*y.shape, seed=1)
    (dx,), (dexact,) = torch.autograd.grad(y, x, dy.to(y.dtype)), torch.autograd.grad(expected, exact, dy)
    assert error(y, expected) <= BOUNDS[case.dtype]
    assert x.numel() // math.prod(case.n) == 1 or error(dx, dexact) <= 4 * BOUNDS[case.dtype]


@pytest.mark.tiny
@pytest.mark.parametrize("dtype", HALVES)
def test_halves_err_as_the_plain_iteration(dtype: torch.dtype, tiled: None) -> None:
    x = drawn(35, 20).to(dtype)
    exact, bound = (
        reference.newton_schulz(x.double(), STEPS),
        error(in_half(x, STEPS), reference.newton_schulz(x.double(), STEPS)),
    )
    x.requires_grad_()
    y = seqops.newton_schulz(x, STEPS)
    assert y.dtype == dtype
    assert error(y, exact) <= 1.5 * bound
    wide, dy = x.detach().double().requires_grad_(), drawn(35, 20, seed=1).to(dtype)
    (dx,) = torch.autograd.grad(y, x, dy)
    (dexact,) = torch.autograd.grad(reference.newton_schulz(wide, STEPS), wide, dy.double())
    # The adjoint walks as many steps back through iterates that are as wrong.
    assert dx.dtype == dtype
    assert error(dx, dexact) <= 4 * bound


@pytest.mark.tiny
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scale_does_not_matter(dtype: torch.dtype, tiled: None) -> None:
    """Of gradients neither, of which the squares would not be finite."""
    x, size = drawn(6, 9).to(dtype), 3e4 if dtype == torch.float16 else 1e30
    x = x / x.abs().max()
    large, dy = (x * size).requires_grad_(), (drawn(6, 9, seed=1) / 4 * size).to(dtype)
    y, plain = seqops.newton_schulz(large, LACT[:6]), reference.newton_schulz(x.double(), LACT[:6], 0.0)
    assert error(y, plain) < (1e-2 if dtype == torch.float16 else 1e-5)
    exact = large.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad(y, large, dy)
    (dexact,) = torch.autograd.grad(reference.newton_schulz(exact, LACT[:6], 0.0), exact, dy.double())
    assert error(dx, dexact) < (2e-2 if dtype == torch.float16 else 1e-4)


@pytest.mark.tiny
def test_zeros_and_nan_stay_in_their_matrix(tiled: None) -> None:
    x = drawn(4, 5, 20).float()
    x[0] = 0
    clean = x.clone().requires_grad_()
    x[2, 3, 4] = torch.nan
    x[3, 0, 0] = torch.inf
    x.requires_grad_()
    y, expected = seqops.newton_schulz(x, LACT[:3], 0.0), seqops.newton_schulz(clean, LACT[:3], 0.0)
    assert not y[0].any() and y[2:].isnan().all() and torch.equal(y[:2], expected[:2])
    dy = drawn(4, 5, 20, seed=1).float()
    dy[0, 0, 0] = torch.inf  # at zeros there is no slope
    (dx,), (dclean,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, clean, dy)
    assert not dx[0].any() and dx[2:].isnan().all() and torch.equal(dx[1], dclean[1])


@pytest.mark.tiny
def test_any_strides_and_bit_equal_runs(tiled: None) -> None:
    x, dy = drawn(2, 37, 18).float(), drawn(2, 37, 18, seed=1).float()

    def run(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = seqops.newton_schulz(x, LACT[:3])
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    first = run(x, dy)
    views = [t.permute(2, 0, 1).contiguous().permute(1, 2, 0) for t in (x, dy)]
    spread = [torch.full((2, 74, 36), torch.nan)[:, ::2, ::2].copy_(t) for t in (x, dy)]
    for other in (run(*views), run(*spread)):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    alone = run(x[1], dy[1])  # the batch does not matter either
    assert torch.equal(alone[0], first[0][1]) and torch.equal(alone[1], first[1][1])


# ---- large_chunk_ttt


SIGNATURES = {
    "gate": ("y0", "y2", "*out"),
    "gate_backward": ("y0", "y2", "dh", "*dy0", "*dy2", "*h"),
    "learn": ("y0", "y2", "g", "lr", "*e0", "*h", "*e2"),
    "learn_backward": (
        *("y0", "y2", "g", "lr", "p0", "p1", "p2"),
        *("*dy0", "*dy2", "*dg", "*e0", "*h", "*e2", "*dlr"),
    ),
}  # what a pass writes has a star


def silu_slopes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu and its derivatives, by autograd."""
    x = x.detach().requires_grad_()
    s = torch.nn.functional.silu(x)
    (s1,) = torch.autograd.grad(s.sum(), x, create_graph=True)
    (s2,) = torch.autograd.grad(s1.sum(), x)
    return s.detach(), s1.detach(), s2


def learnt(y0: Tensor, y2: Tensor, g: Tensor, lr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gate = torch.sigmoid(y0)
    s, s1 = y0 * gate, gate * (1 + y0 * (1 - gate))
    return lr[..., 0:1] * g * y2 * s1, lr[..., 1:2] * s * y2, lr[..., 2:3] * g * s


def expected_of(name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    y0, y2 = given["y0"], given["y2"]
    s, s1, _ = silu_slopes(y0)
    if name == "gate":
        return {"out": s * y2}
    if name == "gate_backward":
        return {"dy0": given["dh"] * y2 * s1, "dy2": given["dh"] * s, "h": s * y2}
    leaves = [given[n].requires_grad_() for n in ("y0", "y2", "g", "lr")]
    outputs = learnt(*leaves)
    found = dict(zip(("e0", "h", "e2"), (o.detach() for o in outputs), strict=True))
    if name == "learn":
        return found
    grads = torch.autograd.grad(outputs, leaves, [given[f"p{i}"] for i in range(3)])
    return found | dict(zip(("dy0", "dy2", "dg", "dlr"), grads, strict=True))


@pytest.mark.tiny
@pytest.mark.parametrize("out", [torch.float64, *HALVES])
@pytest.mark.parametrize("name", SIGNATURES)
def test_passes(name: str, out: torch.dtype) -> None:
    """Of views with any strides, into views; also where a result lies where an argument was read."""
    if out in HALVES and not is_triton():
        pytest.skip("operands have 16 bits on GPUs only")
    passes = passes_of()
    N, C, F = 2, 9, 21
    real = torch.float64 if out == torch.float64 else torch.float32
    names = SIGNATURES[name]
    given = {n: drawn(N, C, 3 if n == "lr" else F, seed=i).to(real) for i, n in enumerate(names) if n[0] != "*"}
    exact = expected_of(name, {n: t.double() for n, t in given.items()})
    arguments = []
    for n in names:
        if n[0] != "*":
            t = given[n]
            arguments.append(t if n == "lr" else t.new_full((N, 3, C, F + 4), torch.nan)[:, 1, :, :F].copy_(t))
        elif n == "*dlr":
            arguments.append(torch.empty(N, C, 3, dtype=real))
        else:
            arguments.append(torch.empty(N, C, F, dtype=out))
    getattr(passes, name)(*arguments)
    bound = {torch.float64: 1e-14, torch.bfloat16: 4e-3, torch.float16: 5e-4}
    for n, got in zip(names, arguments, strict=True):
        if n[0] == "*":
            assert error(got, exact[n[1:]]) <= (bound[out] if got.dtype == out else 1e-5), n
    if out == real:
        places = [n for n in names if n[0] != "*" and n != "lr"]
        written = [n for n in names if n[0] == "*" and n != "*dlr"]
        shared = dict(zip(written, places, strict=False))
        own = {n: t.clone() for n, t in given.items()}
        again = [own[shared[n]] if n in shared else own[n] if n in own else torch.empty_like(a)
                 for n, a in zip(names, arguments, strict=True)]  # fmt: skip
        getattr(passes, name)(*again)
        assert all(torch.equal(a, b) for n, a, b in zip(names, again, arguments, strict=True) if n[0] == "*")


def passes_of() -> Any:
    """Of the forced backend."""
    return import_module("seqops.ttt.triton_large_chunk_ttt") if is_triton() else torch.ops.seqops_passes


@pytest.mark.tiny
@pytest.mark.parametrize("norm", [False, True])
def test_rows_are_renewed(norm: bool) -> None:
    """Rows of zeros, rows shorter than the least norm, and rows that are to be zero among them."""
    passes = passes_of()
    w, d, dy = (drawn(2, 10, 37, seed=i) for i in range(3))
    norms0 = drawn(2, 10, seed=3).abs() if norm else None
    w[0, 3] = d[0, 3] = 0
    w[0, 4], d[0, 4] = w[0, 4] * 1e-8, 0
    if norm:
        norms0[1, 2] = 0
    leaves = [t.clone().requires_grad_() for t in (w, norms0) if t is not None]
    x = leaves[0] + d
    length = x.square().sum(-1).clamp(min=1e-300).sqrt()
    y = x * (leaves[1] / length.clamp(min=1e-5))[..., None] if norm else x
    norms = torch.empty(2, 10, dtype=torch.float64) if norm else None
    copy = torch.empty_like(w) if is_triton() else None  # for products of 16-bit operands: GPUs have these
    out = w.clone()
    passes.renew(out, d, norms0, out, norms, copy)
    assert error(out, y) < 1e-14 and (copy is None or torch.equal(out, copy))
    if not norm:
        other = torch.empty_like(w)
        passes.renew(w, d, None, other, None, None)
        assert torch.equal(other, out)
        return
    assert torch.allclose(norms, x.norm(dim=-1), rtol=1e-14)
    dw, dnorms0 = dy.clone(), torch.ones(2, 10, dtype=torch.float64)
    passes.renew_backward(dw, out, norms0, norms, dnorms0)
    exact_w, exact_norms = torch.autograd.grad(y, leaves, dy)
    assert error(dw, exact_w) < 1e-13
    some = norms0 > 0
    assert error((dnorms0 - 1)[some], exact_norms[some]) < 1e-13


def product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """Of 16-bit operands, summed in float32: torch has it on GPUs alone."""
    value = a.to(out.dtype) @ b.to(out.dtype)
    out.add_(value) if add else out.copy_(value)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, operand: torch.dtype) -> None:
    """Products take operands of 16 bits, and are computed again in the backward."""
    init = composed.Call.__init__

    def narrowed(self: Any, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.operand = operand

    monkeypatch.setattr(composed.Call, "__init__", narrowed)
    monkeypatch.setattr(composed, "product", product)
    monkeypatch.setattr(composed, "keeps_products", lambda q: False)


@pytest.mark.tiny
@pytest.mark.parametrize(("order", "dtype"), [("apply_update", torch.bfloat16), ("update_apply", torch.float16)])
def test_operands_of_16_bits(order: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_triton():
        pytest.skip("operands have 16 bits on GPUs only")
    as_on_a_gpu(monkeypatch, dtype)
    B, T, H, D, F = 1, 7, 2, 6, 9
    shapes = [(B, T, H, D)] * 3 + [(B, H, F, D), (B, H, D, F), (B, H, F, D)]
    inputs = [drawn(*shape, seed=i) / shape[-1] ** 0.5 for i, shape in enumerate(shapes)]
    inputs += [torch.sigmoid(drawn(B, T, H, 3, seed=7)) / 2, torch.sigmoid(drawn(B, T, H, seed=8))]
    given = [t.to(dtype).requires_grad_() for t in inputs]
    exact = [t.detach().double().requires_grad_() for t in given]
    outputs = seqops.large_chunk_ttt(*given[:7], 3, momentum=given[7], order=order)
    expected = reference.large_chunk_ttt(*exact[:7], 3, momentum=exact[7], order=order)
    cotangents = [drawn(*o.shape, seed=i).to(dtype).double() for i, o in enumerate(outputs)]
    grads = torch.autograd.grad(outputs, given, [c.to(o.dtype) for o, c in zip(outputs, cotangents, strict=True)])
    exacts = torch.autograd.grad(expected, exact, cotangents)
    assert [o.dtype for o in outputs] == [dtype, *[torch.float32] * 6]
    # Operands are rounded five times on the longest way from an argument to its gradient, and chunks follow each other.
    bound = 8 * torch.finfo(dtype).eps
    errors = [error(got, wanted) for got, wanted in zip((*outputs, *grads), (*expected, *exacts), strict=True)]
    assert max(errors) <= bound, errors


# ---- where no interpreter is needed


@needs_triton
def test_rung(run_rung: Callable[..., str]) -> None:
    """All tests of this file that are marked tiny, in a process of their own. Above five seconds for that reason."""
    run_rung(__file__, "tiny", SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("which", ["not update_apply", pytest.param("update_apply", marks=pytest.mark.slow)])
def test_rung_of_large_chunks(which: str, run_rung: Callable[..., str]) -> None:
    """Above five seconds as well: rows of the table of large_chunk_ttt, Newton-Schulz steps in one of each half."""
    file = str(Path(__file__).with_name("test_large_chunk_ttt.py"))
    rows = f"test_values_and_gradients and {which}"
    run_rung(file, "tiny", "-k", rows, SEQOPS_BACKEND="triton", TRITON_INTERPRET="1")


TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def launch_key(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
    pointers = sorted((n, t) for n, t in types.items() if n.startswith("p_"))
    return kernel.__name__, *pointers, *sorted((n, str(value)) for n, value in constants.items())


def listed(module: Any) -> set[tuple[Any, ...]]:
    return {launch_key(each["kernel"], each["types"], each["constants"]) for each in module.configurations()}


def asked(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    assert {*arguments} == {*kernel.arg_names}
    types = {n: TYPES[v.dtype] for n, v in arguments.items() if isinstance(v, Tensor)}
    return launch_key(kernel, types, {n: v for n, v in arguments.items() if n.isupper() and n not in ("K", "N")})


@needs_triton
def test_every_launch_of_newton_schulz_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers ask for is what `configurations()` names: constants and types of pointers."""
    module = import_module("seqops.ttt.triton_newton_schulz")
    met = set()
    monkeypatch.setattr(
        module, "launch", lambda kernel, like, programs, arguments, options: met.add(asked(kernel, arguments))
    )
    for dtype, tile in [(each, tile) for each in DTYPES for tile in tiles.SHAPES[module.name_of(each)]]:
        monkeypatch.setattr(module, "tile_of", lambda *arguments, tile=tile: tile)
        for size, steps in itertools.product((5, 20, 60, 150), ((), LACT[:3], LACT)):
            x = torch.zeros(1, size, 150, dtype=dtype)
            module.newton_schulz(x, steps)
            module.newton_schulz_backward(x, x, steps)
    assert len(met) > 50
    assert met <= listed(module)


class Unlaunched:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel: Any, met: set[tuple[Any, ...]]) -> None:
        self.kernel, self.met = kernel, met

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def call(num_warps: int, num_stages: int, maxnreg: int, **arguments: Any) -> None:
            assert grid[0] > 0
            self.met.add(asked(self.kernel, arguments))

        return call


@needs_triton
@pytest.mark.parametrize("operand", [None, *HALVES])
def test_every_launch_of_large_chunks_is_listed(operand: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where products of 16-bit arguments take 16-bit operands."""
    module = import_module("seqops.ttt.triton_large_chunk_ttt")
    met: set[tuple[Any, ...]] = set()
    monkeypatch.setattr(module, "INTERPRETED", True)  # launch on the CPU
    monkeypatch.setattr(
        module, "tile", lambda real, own=module.tile: own(real) | {"BLOCK_C": 32 if real == torch.float64 else 128}
    )
    for name in [n for n in dir(module.kernels) if n.startswith("large_chunk_")]:
        monkeypatch.setattr(module.kernels, name, Unlaunched(getattr(module.kernels, name), met))
    if operand is not None:
        as_on_a_gpu(monkeypatch, operand)
    for storage in (torch.float32, torch.float64) if operand is None else (operand,):
        for norm, optimizer in ((True, "gd"), (False, "gd")):
            sequence, lr = torch.zeros(1, 8, 2, 4, dtype=storage), torch.zeros(1, 8, 2, 3, dtype=storage)
            wide, tall = torch.zeros(1, 2, 6, 4, dtype=storage), torch.zeros(1, 2, 4, 6, dtype=storage)
            arguments = (*[sequence] * 3, wide, tall, wide, lr, lr[..., 0], None, None, None)
            options = {"optimizer": optimizer, "weight_norm": norm}
            module.fast_weights(*arguments, 4, **options)
            outputs = module.fast_weights_forward(*arguments, 4, **options)
            module.fast_weights_backward(*outputs[:7], *arguments, *outputs[7:], 4, **options)
    assert len(met) >= 6
    monkeypatch.undo()
    assert met <= listed(module)


@needs_triton
def test_tiles_follow_the_device() -> None:
    """Large ones where there are many."""
    module = import_module("seqops.ttt.triton_newton_schulz")

    def choice(name: str, *sizes: int, dtype: str = "bfloat16") -> int:
        key = module.key_of("forward", dtype, *sizes)
        return module.TUNABLES["forward"].problem(devices.find(name), key).solve(seconds=math.inf)["rows"]

    assert choice("h100", 12, 768, 768) == 128
    assert choice("h100", 1, 256, 256) == 64
    assert choice("h100", 12, 768, 768, dtype="float64") == 32


@needs_triton
def test_forced_choice_must_exist() -> None:
    with pytest.raises(RuntimeError, match=r"no kernel of 48 rows for float16; rows that exist: 64, 128"):
        tiles.shape("float16", 48)
    assert choose.forced_solution("newton_schulz.forward.triton") is None
