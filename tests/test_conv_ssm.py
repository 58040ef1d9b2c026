"""Values, gradients and behaviour of conv_ssm, on the CPU and on every other backend.

Tests whose cases are marked `small` or `tiny` run again in the CUDA simulator and the Triton interpreter.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import cases
import pytest
import torch
from cases.conv_ssm import SIZES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import conv2d, pad

import seqops
from seqops.ssm import composed_conv_ssm as composed

params = partial(cases.params, operators=("conv_ssm",))
ONE = ((1, 1), (1, 1), (1, 1))
THREE = ((3, 3), (3, 3), (3, 3))


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


@pytest.fixture
def few_frames(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes blocks of so many frames, however small they are."""

    def limit(frames: int) -> None:
        monkeypatch.setattr(composed, "BLOCK_BYTES", {"cpu": 0})
        monkeypatch.setattr(composed, "FRAMES", frames)

    return limit


# ---------------------------------------------------------------- the reference itself


def written_out(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """By sums over all earlier frames, and torch's own complex convolutions of padded frames."""

    def convolve(frames: Tensor, kernel: Tensor) -> Tensor:
        above, below = (kernel.shape[0] - 1) // 2, kernel.shape[0] // 2
        left, right = (kernel.shape[1] - 1) // 2, kernel.shape[1] // 2
        padded = pad(frames.permute(0, 3, 1, 2), (left, right, above, below))
        return conv2d(padded, kernel.permute(3, 2, 0, 1)).permute(0, 2, 3, 1)

    moved = [convolve(u_t.to(b.dtype), b) for u_t in u.unbind(1)]
    outputs, x = [], None
    for t, u_t in enumerate(u.unbind(1)):
        x = sum(a ** (t - s) * moved[s] for s in range(t + 1))
        x = x if initial_state is None else x + a ** (t + 1) * initial_state
        y = 2 * convolve(x, c).real
        outputs.append(y if d is None else y + convolve(u_t, d))
    return torch.stack(outputs, 1), x


@pytest.mark.parametrize("kernels", [ONE, THREE, ((2, 4), (1, 3), None), ((4, 1), (2, 2), (5, 6))], ids=str)
@pytest.mark.parametrize("state", [False, True])
def test_reference_is_the_definition(state: bool, kernels: Any) -> None:
    case = Case("conv_ssm", B=2, T=4, dtype=torch.float64, kernels=kernels, state=state)
    inputs = case.inputs()
    cases.assert_within(results(case, inputs, case.reference), results(case, inputs, written_out), 1e-12)


def test_reference_gradients_are_numerical() -> None:
    """First and second derivatives, exact zeros in the gate included."""
    options = {"B": 1, "T": 2, "picture": (2, 3), "U": 1, "P": 2, "kernels": ((2, 1), (1, 3), (1, 1)), "gaps": True}
    case = Case("conv_ssm", dtype=torch.float64, **options)
    inputs = case.inputs()
    call = lambda *values: case.reference(*values)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(call, tuple(inputs.values()))


# ---------------------------------------------------------------- values and gradients


def check(case: Case, function: cases.common.Function | None = None, device: str = "cpu") -> None:
    """Outputs and all gradients against the reference in float64."""
    inputs = case.inputs(device)
    outputs = case.operator(**inputs)
    assert [o.dtype for o in outputs] == case.output_dtypes
    cotangents = case.cotangents(outputs)
    exact = cases.exact_results(case, inputs, cotangents)
    got = cases.evaluate(function or case.operator, inputs, cotangents)
    cases.assert_within(got, exact, case.bounds(exact))


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", params("small", where=lambda case: case.B * case.T > 0))
@pytest.mark.parametrize("frames", [1, 2])
def test_several_blocks(case: Case, frames: int, few_frames: Callable[[int], None]) -> None:
    few_frames(frames)
    assert len(composed.blocks_of(case.inputs()["u"], case.P).steps) == -(-case.T // frames)
    check(case)


@given(
    B=st.integers(1, 4),
    T=st.integers(1, 9),
    picture=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    U=st.integers(1, 5),
    P=st.integers(1, 5),
    kernels=st.tuples(st.sampled_from(SIZES), st.sampled_from(SIZES), st.sampled_from((None, *SIZES))),
    state=st.booleans(),
    gaps=st.booleans(),
    frames=st.integers(1, 10),
)
@settings(max_examples=25, derandomize=True, deadline=None)
def test_any_shape(frames: int, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(composed, "BLOCK_BYTES", {"cpu": 0})
        patch.setattr(composed, "FRAMES", frames)
        check(Case("conv_ssm", dtype=torch.float64, **options))


def test_pointwise_kernels_are_linear_scan() -> None:
    """Without neighbours a frame is a batch of pixels."""
    case = Case("conv_ssm", B=2, T=7, U=3, P=4, kernels=((1, 1), (1, 1), None), dtype=torch.float64)
    inputs = case.inputs()
    y, last = case.operator(**inputs)
    moved = inputs["u"].to(torch.complex128) @ inputs["b"][0, 0]
    h, state = seqops.linear_scan(moved, inputs["a"].view(1, 1, 1, 1, -1), inputs["initial_state"])
    torch.testing.assert_close(y, 2 * (h @ inputs["c"][0, 0]).real)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize("missing", ["u", "initial_state", "a"])
def test_gradients_that_nobody_wants(missing: str) -> None:
    """The others are the same bits."""
    case = cases.example("conv_ssm")
    inputs = case.inputs()
    expected = results(case, inputs)
    inputs[missing] = inputs[missing].detach()
    outputs = case.operator(**inputs)
    leaves = [name for name in cases.differentiable(inputs) if name != missing]
    got = torch.autograd.grad(outputs, [inputs[name] for name in leaves], case.cotangents(outputs))
    cases.assert_same_bits(
        {f"d{n}": g for n, g in zip(leaves, got, strict=True)}, {f"d{n}": expected[f"d{n}"] for n in leaves}
    )


@pytest.mark.parametrize("only", [0, 1])
def test_one_output_differentiated(only: int) -> None:
    case = cases.example("conv_ssm", dtype=torch.float64)
    inputs = case.inputs()
    ours, theirs = cases.only(only, case.operator), cases.only(only, case.reference)
    cases.assert_within(results(case, inputs, ours), results(case, inputs, theirs), 1e-12)


# ---------------------------------------------------------------- carried states


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernels", [ONE, THREE, ((2, 2), (3, 1), (1, 4))], ids=str)
def test_pieces_equal_whole(kernels: Any, dtype: torch.dtype) -> None:
    """To rounding: torch may convolve another number of frames in another order."""
    case = Case("conv_ssm", T=9, kernels=kernels, dtype=dtype)
    inputs = case.inputs()

    def in_pieces(u: Tensor, *parameters: Tensor, initial_state: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        parts, state = [], initial_state
        for piece in u.split([0, 1, 5, 2, 1], 1):
            y, state = seqops.conv_ssm(piece, *parameters, **more, initial_state=state)
            parts.append(y)
        return torch.cat(parts, 1), state

    bound = {torch.float64: 1e-13, torch.float32: 2e-6}[dtype]
    cases.assert_within(results(case, inputs, in_pieces_named(in_pieces)), results(case, inputs), bound)


def in_pieces_named(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **inputs: function(inputs.pop("u"), **inputs)


@pytest.mark.parametrize("kernels", [ONE, THREE], ids=str)
def test_blocks_do_not_show(kernels: Any, few_frames: Callable[[int], None]) -> None:
    """One frame a block, or all of them: the same to rounding, which the sums of the convolutions' own order leave."""
    case = Case("conv_ssm", B=2, T=7, kernels=kernels)
    inputs = case.inputs()
    whole = results(case, inputs)
    few_frames(1)
    cases.assert_within(results(case, inputs), cases.in_double(whole), 1e-6)


def test_no_steps_return_the_state() -> None:
    case = Case("conv_ssm", T=0)
    inputs = case.inputs()
    y, state = case.operator(**inputs)
    assert y.shape == inputs["u"].shape
    assert torch.equal(state, inputs["initial_state"]) and state.data_ptr() != inputs["initial_state"].data_ptr()
    (gradient,) = torch.autograd.grad(state.real.sum(), inputs["initial_state"])
    assert torch.equal(gradient, torch.ones_like(state))


# ---------------------------------------------------------------- NaN and infinity


def reach(seen: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels [Y, X] whose window holds one that is `seen`."""
    above, left = (size[0] - 1) // 2, (size[1] - 1) // 2
    padded = pad(seen.double(), (left, size[1] - 1 - left, above, size[0] - 1 - above))
    return conv2d(padded[None, None], torch.ones(1, 1, *size, dtype=torch.float64))[0, 0] > 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernels", [ONE, THREE, ((2, 3), (1, 4), (5, 1))], ids=str)
def test_one_bad_pixel_stays_in_reach(kernels: Any, dtype: torch.dtype, value: float) -> None:
    """It spreads by the radius of the kernels, and forward in time; everything else is as if it were not there."""
    case = Case("conv_ssm", B=2, T=5, picture=(9, 11), U=16, P=17, kernels=kernels, dtype=dtype)
    inputs = {name: tensor.detach() for name, tensor in case.inputs().items()}
    good, good_state = seqops.conv_ssm(**inputs)
    inputs["u"] = inputs["u"].clone()
    inputs["u"][1, 2, 4, 5, 3] = value
    y, state = seqops.conv_ssm(**inputs)
    pixel = torch.zeros(case.picture)
    pixel[4, 5] = 1
    in_state = reach(pixel, kernels[0])
    in_y = reach(in_state, kernels[1])
    bad = torch.zeros(y.shape[:-1], dtype=torch.bool)
    bad[1, 2] = in_y | reach(pixel, kernels[2])
    bad[1, 3:] = in_y
    assert torch.equal(~y.isfinite().all(-1), bad)
    assert torch.equal(~state.isfinite().all(-1)[1], in_state) and state[0].isfinite().all()
    torch.testing.assert_close(y[~bad], good[~bad])
    torch.testing.assert_close(state[1][~in_state], good_state[1][~in_state])


def test_a_gate_of_zero_forgets_a_bad_state() -> None:
    case = Case("conv_ssm", B=1, T=3, P=2, gaps=True)  # the first of both
    inputs = {name: tensor.detach().clone() for name, tensor in case.inputs().items()}
    inputs["initial_state"][..., 0] = torch.nan
    y, state = seqops.conv_ssm(**inputs)
    assert y.isfinite().all() and state.isfinite().all()
    cases.assert_within(
        dict(zip("01", (y, state), strict=True)), dict(zip("01", case.reference(**inputs), strict=True)), 1e-6
    )


# ---------------------------------------------------------------- blocks and memory


def test_size_of_blocks() -> None:
    """4 MiB of states, or 16 frames, or 64 MiB; on a GPU 64 MiB; never less than one frame."""
    for device, picture, width, frames in (
        ("cpu", (16, 16), 64, 32),
        ("cpu", (8, 8), 64, 128),
        ("cpu", (64, 64), 128, 16),
        ("cpu", (256, 256), 128, 1),
        ("cpu", (512, 512), 128, 1),
        ("meta", (16, 16), 64, 32),
        ("cuda", (16, 16), 64, 512),
    ):
        with FakeTensorMode():
            assert composed.block_frames(torch.empty(1, 1, *picture, 1, device=device), width) == frames
    assert composed.block_frames(torch.empty(1, 1, 16, 16, 1, dtype=torch.bfloat16), 64) == 32
    assert composed.block_frames(torch.empty(1, 1, 16, 16, 1, dtype=torch.float64), 32) == 32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (5, 1), (5, 3), (2, 80), (3, 33), (7, 0), (0, 7), (40, 600)])
def test_blocks_cover_everything_once(B: int, T: int, device: str) -> None:
    with FakeTensorMode():
        u = torch.empty(B, T, 16, 16, 1, device=device)
        rows, steps = composed.blocks_of(u, 64)
        assert composed.entering_shape(u, 64)[1] == max(len(steps) - 1, 0)
        most = composed.block_frames(u, 64)
        assert T != 1 or len(rows) == 1
        assert device == "cpu" or len(steps) <= 2 or steps[0][1] >= 16
    seen = torch.zeros(B, T, dtype=torch.int64)
    for row in rows:
        for step in steps:
            block = seen[slice(*row), slice(*step)]
            assert device == "cuda" or block.is_contiguous()
            assert 0 < block.numel() <= most
            block += 1
    assert (seen == 1).all()


PEAK = """
import torch, seqops
from bench import memory
from seqops.ssm import composed_conv_ssm as composed
composed.BLOCK_BYTES, composed.FRAMES = {"cpu": 1 << 19}, 8
T, width = 150, 32
u = torch.randn(2, T, 16, 16, 16, requires_grad=True)
a = torch.polar(torch.full((width,), 0.9), torch.rand(width)).requires_grad_()
b, c = (torch.randn(1, 1, *s, dtype=torch.complex64).requires_grad_() for s in ((16, width), (width, 16)))
def step(u):
    y, _ = seqops.conv_ssm(u, a, b, c)
    torch.autograd.grad(y, (u, a, b, c), torch.ones((), dtype=y.dtype).expand(y.shape))
step(u[:, :20])
before = memory.read_status("VmRSS")
memory.reset_peak()
step(u)
print(memory.read_status("VmHWM") - before, u.numel() * 4, 8 * 2 * T * 256 * width)
"""


def test_memory_of_a_training_step(run_python: Callable[..., str]) -> None:
    """y, du, one state of each block, and a few blocks, here of 512 KiB: far from all states even once."""
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
    peak, frames, states = map(int, run_python(PEAK, **environment).split())
    assert peak < 2 * frames + states / 8 + 8 * (1 << 19), (peak, frames, states)
    assert peak < states


@pytest.mark.slow
def test_memory_beside_the_whole_sequence() -> None:
    """A quarter, at T = 300, of what autograd keeps of the equations as they are written."""
    from bench import conv_ssm, memory

    case = next(case for case in conv_ssm.CASES if case.steps == 300)
    ours, naive = (memory.Processes().peak(case, name, 1) for name in ("seqops", conv_ssm.WHOLE))
    assert 4 * ours <= naive, (ours, naive)


# ---------------------------------------------------------------- runs, threads, backends


@pytest.mark.parametrize("case", params("small", where=lambda case: case.B * case.T > 4))
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs))


def test_two_threads() -> None:
    case = Case("conv_ssm", B=3, T=11, picture=(16, 16), U=16, P=16)
    inputs = case.inputs()
    alone = results(case, inputs)
    torch.set_num_threads(2)
    together = results(case, inputs)
    cases.assert_same_bits(results(case, inputs), together)
    cases.assert_within(together, cases.in_double(alone), 1e-5)


def test_autocast_of_another_dtype_changes_nothing() -> None:
    case = cases.example("conv_ssm", kernels=ONE)
    inputs = case.inputs()
    expected = results(case, inputs)
    with torch.autocast("cpu", dtype=torch.float16):
        cases.assert_same_bits(results(case, inputs), expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_of_cudnn_are_put_back(device: str) -> None:
    """Deterministic on a GPU while a call lasts, even one that fails; nothing is touched on the CPU."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    try:
        cudnn.deterministic, cudnn.benchmark = False, True
        with pytest.raises(KeyError), composed.exact(torch.device(device)):
            assert cudnn.deterministic == (device == "cuda") and cudnn.benchmark == (device == "cpu")
            raise KeyError
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def test_state_does_not_alias() -> None:
    """Every result is new memory, for any T."""
    for T in (0, 1, 3):
        case = replace(cases.example("conv_ssm"), T=T)
        inputs = case.inputs()
        pointers = {tensor.untyped_storage().data_ptr() for tensor in inputs.values() if tensor.numel()}
        assert not pointers & {o.untyped_storage().data_ptr() for o in case.operator(**inputs) if o.numel()}


# ---------------------------------------------------------------- other backends

RUNGS = {
    "simulator": {"SEQOPS_BACKEND": "cuda", "SEQOPS_SIMULATE": "1"},
    "interpreter": {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
}


# linear_scan's kernels, which are all of the simulator's, have rungs of their own in every run.
@pytest.mark.parametrize("rung", [pytest.param("simulator", marks=pytest.mark.slow), "interpreter"])
def test_rung(rung: str, run_rung: Callable[..., str]) -> None:
    """All marked cases in a process of their own: linear_scan in CUDA, and the joined kernel in Triton."""
    if rung == "interpreter" and find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if rung == "simulator" and shutil.which("g++") is None:
        pytest.skip("the simulator compiles with g++")
    mark = "tiny" if rung == "interpreter" else "small"
    run_rung(__file__, mark, "-k", "test_values_and_gradients", **RUNGS[rung])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_every_launch_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers ask for is what `configurations()` names: constants and types of pointers."""
    launchers = import_module("seqops.ssm.triton_conv_ssm")

    def key(types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
        pointers = (item for item in types.items() if item[0].startswith("p_"))
        return *sorted(pointers), *sorted(constants.items())

    known = {key(each["types"], each["constants"]) for each in launchers.configurations()}
    asked = set()

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            return self.record

        def record(self, **arguments: Any) -> None:
            tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
            types = {name: f"*{launchers.TYPES[t.dtype]}" for name, t in tensors.items()}
            constants = {n: v for n, v in arguments.items() if n.isupper() and n not in ("M", "T", "I", "O", "P")}
            asked.add(key(types, constants))
            chosen = {"num_warps", "num_stages", "enable_fp_fusion", "maxnreg"}
            assert {*arguments} == {*kernel.arg_names} | chosen

    kernel = launchers.kernels.conv_ssm_march
    monkeypatch.setattr(launchers, "INTERPRETED", True)
    monkeypatch.setattr(launchers, "kernels", type("Kernels", (), {"conv_ssm_march": Kernel()}))
    for dtype in launchers.TYPES:
        for width in (1, 16, 17, 33, 65, 128, 200, 256):
            for size in (ONE, ((3, 3), (1, 1), (1, 1)), ((1, 1), (1, 1), None), ((2, 2), (1, 1), None)):
                for rows in (each for each in launchers.tiles.ROWS if launchers.tiles.fits("forward", each, width)):
                    case = Case("conv_ssm", B=2, T=2, picture=(1, 2), U=2, P=width, kernels=size, dtype=dtype)
                    given = {name: t.detach() for name, t in case.inputs().items()}
                    u, a, b, c = (given[name] for name in "uabc")
                    d, state = given.get("d"), given["initial_state"]
                    monkeypatch.setattr(launchers, "INTERPRETED_CHOICE", {"joined": 1, "rows": rows})
                    _, _, entering = launchers.conv_ssm_forward(u, a, b, c, d, state)
                    if launchers.tiles.fits("backward", rows, width):
                        launchers.conv_ssm_backward(u, state, u, a, b, c, d, state, entering)
                        launchers.conv_ssm_backward(u, None, u, a, b, c, d, None, entering, wants_u=False)
    assert len(asked) > 40
    assert asked <= known
