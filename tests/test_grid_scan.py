"""Values, gradients and behaviour of grid_scan, on the CPU and on every other backend.

Tests whose cases are marked `small` or `tiny` run again for every instruction set and in the Triton interpreter: see
RUNGS.
"""

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import cases
import pytest
import torch
from cases.grid_scan import GATE_NAMES, Case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import seqops
from seqops.scan import reference

params = partial(cases.params, operators=("grid_scan",))
make = partial(Case, "grid_scan")
rungs = partial(pytest.param, marks=[pytest.mark.small, pytest.mark.tiny])
FLIPS = [(False, False), (True, False), (False, True), (True, True)]
INF, NAN = math.inf, math.nan


def results(case: Case, inputs: dict[str, Any], function: cases.common.Function | None = None) -> dict[str, Tensor]:
    """Outputs and gradients of one call of the operator, or of what takes its place."""
    return cases.evaluate(function or case.operator, inputs, case.cotangents)


# ---------------------------------------------------------------- the reference itself


def solved(
    x_r: Tensor,
    x_d: Tensor,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    *,
    initial_left: Tensor | None = None,
    initial_top: Tensor | None = None,
    flip_x: bool = False,
    flip_y: bool = False,
) -> tuple[Tensor, Tensor]:
    """Without any recurrence: (r, d) solves the linear equations `s = M s + x`, for every batch row and head.

    Unknown 2 n is r of node n, 2 n + 1 its d. The nodes are those of a grid that has one more row and column before
    the first, whose states are given.
    """
    turned = [side for side, flip in ((1, flip_x), (2, flip_y)) if flip]
    t = [x_r.new_zeros(x_r.shape[:4]) if gate is None else gate for gate in (t_rl, t_ru, t_dl, t_du)]
    (x_r, x_d, *t) = (value.flip(turned) for value in (x_r, x_d, *t))
    B, X, Y, H, D = x_r.shape
    left = x_r.new_zeros(B, Y, H, D) if initial_left is None else initial_left
    top = x_r.new_zeros(B, X, H, D) if initial_top is None else initial_top
    left, top = left.flip([1] if flip_y else []), top.flip([1] if flip_x else [])
    number = {node: n for n, node in enumerate((x, y) for x in range(-1, X) for y in range(-1, Y))}
    rows, columns, entries = [], [], []
    right = [x_r.new_zeros(B, H, D)] * (2 * len(number))
    for (x, y), n in number.items():
        if x < 0 or y < 0:
            if y >= 0:
                right[2 * n] = left[:, y]
            if x >= 0:
                right[2 * n + 1] = top[:, x]
            continue
        rows += [2 * n, 2 * n, 2 * n + 1, 2 * n + 1]
        columns += [2 * number[x - 1, y], 2 * number[x, y - 1] + 1] * 2
        entries += [gate[:, x, y] for gate in t]
        right[2 * n], right[2 * n + 1] = x_r[:, x, y], x_d[:, x, y]
    matrix = torch.eye(len(right), dtype=x_r.dtype).expand(B, H, -1, -1).clone()
    if entries:
        places = torch.tensor(rows), torch.tensor(columns)
        matrix = matrix.index_put((slice_all(B, 0), slice_all(H, 1), *places), -torch.stack(entries, -1))
    states = torch.linalg.solve(matrix, torch.stack(right, 2)).movedim(1, 2).unflatten(1, (X + 1, Y + 1, 2))
    return tuple(states[:, 1:, 1:, i].flip(turned) for i in (0, 1))


def slice_all(size: int, dim: int) -> Tensor:
    return torch.arange(size).view(-1, *[1] * (2 - dim))


@pytest.mark.parametrize("without", [(), ("t_ru",), ("t_dl",)])
@pytest.mark.parametrize("states", ["none", "state"])
@pytest.mark.parametrize(("flip_x", "flip_y"), FLIPS)
def test_reference_is_the_definition(flip_x: bool, flip_y: bool, states: str, without: tuple[str, ...]) -> None:
    options = {"flip_x": flip_x, "flip_y": flip_y, "states": states, "without": without, "dtype": torch.float64}
    for X, Y in ((3, 4), (1, 5), (4, 1)):
        case = make(B=2, T=X, Y=Y, H=2, D=3, **options)
        inputs = case.inputs()
        cases.assert_within(results(case, inputs, case.reference), results(case, inputs, solved), 1e-13)


def test_reference_gradients_are_numerical() -> None:
    """First and second derivatives, exact zeros in the gates included."""
    case = make(B=1, T=2, Y=2, H=1, D=2, dtype=torch.float64, flip_y=True)
    call, leaves = of_leaves(case, case.reference)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def of_leaves(case: Case, function: cases.common.Function) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """The function of the differentiable arguments alone, and those; every gate has an exact zero."""
    inputs = case.inputs()
    leaves = cases.differentiable(inputs)
    with torch.no_grad():
        for i, name in enumerate(name for name in GATE_NAMES if name not in case.without):
            inputs[name].flatten()[i::5].zero_()
    return lambda *values: function(**(inputs | dict(zip(leaves, values, strict=True)))), (*leaves.values(),)


# ---------------------------------------------------------------- values and gradients


def check(case: Case, device: str = "cpu") -> None:
    inputs = case.inputs(device)
    cotangents: list[Tensor] = []

    def look(outputs: Sequence[Tensor]) -> list[Tensor]:
        assert [o.dtype for o in outputs] == case.output_dtypes
        assert all(o.is_contiguous() and o.device.type == device for o in outputs)
        cotangents[:] = case.cotangents(outputs)
        return cotangents

    got = cases.evaluate(case.operator, inputs, look)
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(got, exact, case.bounds(inputs, cotangents, exact))


@pytest.mark.parametrize("case", params())
def test_values_and_gradients(case: Case) -> None:
    """Every output and the gradient of every input, for random gradients of every output."""
    check(case)


@pytest.mark.parametrize(
    "case", params("small", where=lambda case: case.dtype not in cases.NARROW and case.gaps and len(case.without) != 1)
)
def test_each_output_alone(case: Case) -> None:
    """The gradients of one output at a time: the other has none, which is not the same as zeros."""
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    bounds = case.bounds(inputs, cotangents, cases.exact_results(case, inputs, cotangents))
    for position, cotangent in enumerate(cotangents):
        exact = cases.evaluate(cases.only(position, case.reference), cases.in_float64(inputs), [cotangent])
        got = cases.evaluate(cases.only(position, case.operator), inputs, [cotangent])
        cases.assert_within(got, exact, bounds | {"0": bounds[str(position)]})


@pytest.mark.parametrize("without", ["x_r", "x_d", *GATE_NAMES, "initial_left", "initial_top", "gates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_some_inputs_need_no_gradient(dtype: torch.dtype, without: str) -> None:
    """The gradients of the other inputs are the same bits; without any gate's, another kernel rounds as it likes."""
    case = make(B=2, T=6, Y=5, H=2, D=9, dtype=dtype)
    inputs = case.inputs()
    whole = results(case, inputs)
    for name in GATE_NAMES if without == "gates" else (without,):
        inputs[name] = inputs[name].detach()
    outputs = case.operator(**inputs)
    leaves = {name: value for name, value in cases.differentiable(inputs).items() if value.requires_grad}
    gradients = torch.autograd.grad(outputs, [*leaves.values()], case.cotangents(outputs))
    got = {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    expected = {name: whole[name] for name in got}
    if without == "gates":
        narrow = {name: torch.finfo(value.dtype).eps for name, value in expected.items()}
        cases.assert_within(got, cases.in_double(expected), narrow)
    else:
        cases.assert_same_bits(got, expected)


@pytest.mark.parametrize("without", [(), ("t_ru",), ("t_dl",)])
@pytest.mark.parametrize("states", ["state", "none"])
@pytest.mark.parametrize(("flip_x", "flip_y"), FLIPS)
def test_gradients_are_numerical(flip_x: bool, flip_y: bool, states: str, without: tuple[str, ...]) -> None:
    """With exact zeros among the gates, whose derivative is not zero."""
    options = {"dtype": torch.float64, "flip_x": flip_x, "flip_y": flip_y, "states": states, "without": without}
    call, leaves = of_leaves(case := make(B=2, T=3, Y=2, H=1, D=2, **options), case.operator)
    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize(
    ("side", "dtype"),
    [
        rungs("T", torch.bfloat16),
        pytest.param("Y", torch.bfloat16, marks=pytest.mark.small),
        pytest.param("T", torch.float16, marks=pytest.mark.small),
        rungs("Y", torch.float16),
    ],
    ids=str,
)
def test_states_are_carried_in_float32(side: str, dtype: torch.dtype) -> None:
    """Additions that the storage dtype would lose: each is under half a unit in the last place of the sum."""
    shape = {"T": (1, 30, 1, 1, 2), "Y": (1, 1, 30, 1, 2)}[side]
    eps = torch.finfo(dtype).eps
    x = torch.full(shape, eps / 4, dtype=dtype)
    x[:, 0, 0] = 1.0
    one = torch.ones(shape[:4], dtype=dtype)
    r, d = seqops.grid_scan(x, x, one, None, None, one)
    last = (r if side == "T" else d)[:, -1, -1]
    assert torch.allclose(last.double(), torch.full((1, 1, 2), 1 + 29 * eps / 4).double(), rtol=eps, atol=0)


@pytest.mark.parametrize("dtype", [rungs(dtype, id=str(dtype)) for dtype in cases.NARROW])
def test_narrow_results_are_the_nearest_but_one(dtype: torch.dtype) -> None:
    """Every output by itself, within one unit in the last place: the Triton interpreter truncates to bfloat16."""
    case = make(B=2, T=5, Y=4, H=2, D=5, dtype=dtype, gate_dtype=torch.float32)
    inputs = case.inputs()
    with torch.no_grad():
        got, exact = case.operator(**inputs), case.reference(**cases.in_float64(inputs))
    for ours, value in zip(got, exact, strict=True):
        assert ((ours.double() - value).abs() <= torch.finfo(dtype).eps * value.abs() + 1e-6).all()


# ---------------------------------------------------------------- what the mathematics says


@pytest.mark.parametrize(("flip_x", "flip_y"), FLIPS)
def test_mass_is_conserved(flip_x: bool, flip_y: bool) -> None:
    """Where each node shares out all that it has, what enters is what leaves: gates whose pairs sum to 1."""
    B, X, Y, H, D = 2, 7, 9, 2, 5
    draw = torch.Generator().manual_seed(1)
    x_r, x_d = (torch.rand(B, X, Y, H, D, generator=draw, dtype=torch.float64) for _ in range(2))
    # t_rl and t_dl of a node share out l, t_ru and t_du share out u.
    of_l, of_u = (torch.rand(B, X, Y, H, generator=draw, dtype=torch.float64) for _ in range(2))
    left, top = (torch.rand(B, side, H, D, generator=draw, dtype=torch.float64) for side in (Y, X))
    borders = {"initial_left": left, "initial_top": top, "flip_x": flip_x, "flip_y": flip_y}
    r, d = seqops.grid_scan(x_r, x_d, of_l, of_u, 1 - of_l, 1 - of_u, **borders)
    left_out, top_out = r[:, 0 if flip_x else -1], d[:, :, 0 if flip_y else -1]
    entered = x_r.sum((1, 2)) + x_d.sum((1, 2)) + left.sum(1) + top.sum(1)
    torch.testing.assert_close(left_out.sum(1) + top_out.sum(1), entered, rtol=1e-12, atol=0)


def test_paths_are_counted() -> None:
    """Gates of 1: from a source at the corner, r + d of node (x, y) is the number of shortest paths to it."""
    side = 9
    x_r = torch.zeros(1, side, side, 1, 1)
    x_d = x_r.clone()
    x_r[:, 0, 0] = 1.0
    one = torch.ones(1, side, side, 1)
    r, d = (value.flatten() for value in seqops.grid_scan(x_r, x_d, one, one, one, one))
    # The source goes to the right first: every path enters node (1, 0).
    paths = [math.comb(x - 1 + y, y) if x > 0 else 0 for x in range(side) for y in range(side)]
    # r and d of a node are equal: each is the sum of what comes in.
    assert r[side:].tolist() == d[side:].tolist() == paths[side:]


@pytest.mark.parametrize(("flip_x", "flip_y"), FLIPS[1:])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_flips_turn_the_grid(dtype: torch.dtype, flip_x: bool, flip_y: bool) -> None:
    """The same bits as on turned tensors."""
    case = make(B=2, T=5, Y=7, dtype=dtype, flip_x=flip_x, flip_y=flip_y, gaps=True)
    sides = {"initial_left": [1] if flip_y else [], "initial_top": [1] if flip_x else []}
    turned = [side for side, flip in ((1, flip_x), (2, flip_y)) if flip]

    def on_turned(**given: Any) -> tuple[Tensor, ...]:
        given = {n: v.flip(sides.get(n, turned)) for n, v in given.items() if torch.is_tensor(v)}
        return tuple(value.flip(turned) for value in seqops.grid_scan(**given))

    inputs = case.inputs()
    cases.assert_same_bits(results(case, inputs), results(case, inputs, on_turned))


@pytest.mark.parametrize("without", [(), ("t_ru", "t_dl")])
def test_transposed_grid(without: tuple[str, ...]) -> None:
    """x and y, r and d, l and u change places; the sums of a node have two terms in another order."""
    case = make(B=2, T=5, Y=7, without=without, flip_x=True)
    inputs = case.inputs()
    swap = {"x_r": "x_d", "t_rl": "t_du", "t_ru": "t_dl", "initial_left": "initial_top"}
    swap |= {there: here for here, there in swap.items()}

    def transposed(flip_x: bool, flip_y: bool, **given: Any) -> tuple[Tensor, ...]:
        given = {swap[n]: v if v is None or n.startswith("initial") else v.transpose(1, 2) for n, v in given.items()}
        d, r = seqops.grid_scan(**given, flip_x=flip_y, flip_y=flip_x)
        return r.transpose(1, 2), d.transpose(1, 2)

    cases.assert_within(results(case, inputs, transposed), cases.in_double(results(case, inputs)), 1e-5)


def in_tiles(case: Case, x_cut: int, y_cut: int) -> cases.common.Function:
    """Four tiles, each fed with the borders of its neighbours."""

    def call(
        x_r: Tensor,
        x_d: Tensor,
        t_rl: Tensor,
        t_ru: Tensor | None,
        t_dl: Tensor | None,
        t_du: Tensor,
        initial_left: Tensor | None = None,
        initial_top: Tensor | None = None,
        flip_x: bool = False,
        flip_y: bool = False,
    ) -> tuple[Tensor, Tensor]:
        xs, ys = [slice(0, x_cut), slice(x_cut, None)], [slice(0, y_cut), slice(y_cut, None)]
        order_x, order_y = (1, 0) if flip_x else (0, 1), (1, 0) if flip_y else (0, 1)
        lefts = [None if initial_left is None else initial_left[:, y] for y in ys]
        r, d = {}, {}
        for i in order_x:
            top = None if initial_top is None else initial_top[:, xs[i]]
            for j in order_y:
                tile = [None if t is None else t[:, xs[i], ys[j]] for t in (x_r, x_d, t_rl, t_ru, t_dl, t_du)]
                options = {"initial_left": lefts[j], "initial_top": top, "flip_x": flip_x, "flip_y": flip_y}
                r[i, j], d[i, j] = seqops.grid_scan(*tile, **options)
                lefts[j], top = r[i, j][:, 0 if flip_x else -1], d[i, j][:, :, 0 if flip_y else -1]
        return tuple(torch.cat([torch.cat([s[i, 0], s[i, 1]], 2) for i in (0, 1)], 1) for s in (r, d))

    return call


@pytest.mark.parametrize("cut", [(1, 1), (3, 4), (6, 1), (2, 6)])
@pytest.mark.parametrize("states", ["state", "none"])
@pytest.mark.parametrize(("flip_x", "flip_y"), FLIPS)
def test_tiles_equal_whole(flip_x: bool, flip_y: bool, states: str, cut: tuple[int, int]) -> None:
    """Forward and gradients."""
    case = make(B=2, T=7, Y=7, H=2, D=9, states=states, flip_x=flip_x, flip_y=flip_y)
    inputs = case.inputs()
    whole = results(case, inputs)
    tiled = results(case, inputs, in_tiles(case, *cut))
    cases.assert_same_bits({n: tiled[n] for n in "01"}, {n: whole[n] for n in "01"})
    cases.assert_within(tiled, cases.in_double(whole), 1e-5)


@given(
    B=st.integers(0, 3),
    T=st.integers(0, 7),
    Y=st.integers(0, 7),
    H=st.integers(1, 3),
    D=st.integers(1, 20),
    states=st.sampled_from(["state", "none"]),
    flip_x=st.booleans(),
    flip_y=st.booleans(),
    without=st.sampled_from([(), ("t_ru",), ("t_dl",), ("t_ru", "t_dl")]),
    gaps=st.booleans(),
    layout=st.sampled_from(cases.LAYOUTS),
    cut=st.tuples(st.integers(0, 7), st.integers(0, 7)),
)
@settings(max_examples=25, derandomize=True, deadline=None, database=None)
def test_any_shape_and_any_cut(cut: tuple[int, int], **shape: Any) -> None:
    """Whole and in tiles, against the reference."""
    case = make(dtype=torch.float64, **shape)
    check(case)
    inputs = case.inputs()
    cotangents = case.cotangents(case.operator(**inputs))
    exact = cases.exact_results(case, inputs, cotangents)
    if case.T > 1 and case.Y > 1:  # a tile without rows or columns would hand on nothing
        tiles = in_tiles(case, 1 + cut[0] % (case.T - 1), 1 + cut[1] % (case.Y - 1))
        cases.assert_within(cases.evaluate(tiles, inputs, cotangents), exact, 1e-12)


# ---------------------------------------------------------------- NaN, infinity and exact zeros


def edge_inputs(bad: float) -> dict[str, Any]:
    """A grid [1, 5, 6, 1, 3] whose node (2, 2) is bad in one channel; gates of 0 wall in what it reaches."""
    case = make(B=1, T=5, Y=6, H=1, D=3)
    inputs = case.inputs()
    with torch.no_grad():
        for name in ("x_r", "x_d"):
            inputs[name][0, 2, 2, 0, 1] = bad
        for name in ("t_rl", "t_dl"):
            inputs[name][0, 3, :] = 0.0  # a wall between rows
        for name in ("t_ru", "t_du"):
            inputs[name][0, 2, 4] = 0.0  # and one within the row
    return inputs


@pytest.mark.parametrize("bad", [rungs(NAN), rungs(INF), rungs(-INF)])
def test_exact_zeros_cut(bad: float) -> None:
    """What is behind a wall has the values, and all have the gradients, that the reference says."""
    inputs = edge_inputs(bad)
    with torch.no_grad():
        r, d = seqops.grid_scan(**inputs)
    reached = torch.zeros(5, 6, dtype=torch.bool)
    reached[2, 2:4] = True
    for value in (r, d):
        finite = value[0, :, :, 0].isfinite()
        assert finite[..., [0, 2]].all()
        assert torch.equal(~finite[..., 1] & reached, ~finite[..., 1])
        assert not finite[2, 2:4, 1].any()
    case = make(B=1, T=5, Y=6, H=1, D=3)
    cotangents = case.cotangents((r, d))
    exact = cases.exact_results(case, inputs, cotangents)
    cases.assert_within(cases.evaluate(case.operator, inputs, cotangents), exact, 1e-5)


@pytest.mark.parametrize("bad", [rungs(NAN), rungs(INF)])
def test_exact_zeros_cut_gradients(bad: float) -> None:
    """A bad gradient does not pass a gate of 0 either, on its way back."""
    inputs = edge_inputs(0.0)
    with torch.no_grad():
        outputs = seqops.grid_scan(**inputs)
    case = make(B=1, T=5, Y=6, H=1, D=3)
    cotangents = case.cotangents(outputs)
    cotangents[0][0, 3, 3, 0, 1] = bad
    exact = cases.exact_results(case, inputs, cotangents)
    got = cases.evaluate(case.operator, inputs, cotangents)
    cases.assert_within(got, exact, 1e-5)
    assert got["dx_r"][0, :3].isfinite().all() and not got["dx_r"][0, 3, 3, 0, 1].isfinite()


@pytest.mark.parametrize("place", ["x_r", "x_d", "initial_left", "initial_top"])
@pytest.mark.parametrize(("flip_x", "flip_y"), FLIPS)
def test_nan_stays_in_its_channel(flip_x: bool, flip_y: bool, place: str) -> None:
    """And goes nowhere but onwards: not to other batch rows, heads, channels or earlier nodes."""
    case = make(B=3, T=4, Y=4, H=3, D=5, flip_x=flip_x, flip_y=flip_y)
    inputs = case.inputs()
    node = (2, 2) if place in ("x_r", "x_d") else (2,)
    with torch.no_grad():
        inputs[place][(1, *node, 1, 3)] = NAN
        outputs = case.operator(**inputs)
    allowed = torch.zeros(4, 4, dtype=torch.bool)
    x_after = slice(None) if place == "initial_left" else slice(0, 3) if flip_x else slice(2, None)
    y_after = slice(None) if place == "initial_top" else slice(0, 3) if flip_y else slice(2, None)
    allowed[x_after, y_after] = True
    for output in outputs:
        bad = output.isnan()
        assert bad[1, :, :, 1, 3].any() and torch.equal(bad[1, :, :, 1, 3] & allowed, bad[1, :, :, 1, 3])
        bad[1, :, :, 1, 3] = False
        assert not bad.any()


# ---------------------------------------------------------------- determinism, threads, memory


@pytest.mark.parametrize(
    "case",
    cases.common.parameters(
        case.with_marks("small")
        for case in cases.CASES["grid_scan"]
        if "small" in case.marks and (case.gaps or case.B * case.T * case.Y == 0)
    ),
)
def test_two_runs_are_bit_equal(case: Case) -> None:
    inputs = case.inputs()
    first = results(case, inputs)
    cases.assert_same_bits(results(case, inputs), first)
    with torch.no_grad():
        got = case.operator(**inputs)
    cases.assert_same_bits(dict(zip("01", got, strict=True)), {name: first[name] for name in "01"})


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape",
    [(4, 30, 30, 2, 40), (1, 40, 40, 6, 64), (1, 50, 120, 1, 40), (3, 30, 31, 1, 70), (1, 300, 40, 1, 50)],
    ids=str,
)
def test_number_of_threads_changes_no_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Shared out by batch rows, by heads, and by strips of columns, large enough that threads are used."""
    B, X, Y, H, D = shape
    draw = torch.Generator().manual_seed(0)
    x_r, x_d, *cotangents = (torch.randn(shape, generator=draw).to(dtype) for _ in range(4))
    gates = [((torch.rand(shape[:4], generator=draw) - 0.3) * 0.7).to(dtype) for _ in range(4)]
    borders = [torch.randn(B, side, H, D, generator=draw).to(dtype) for side in (Y, X)]
    names = ("x_r", "x_d", *GATE_NAMES, "initial_left", "initial_top")
    inputs = {n: v.requires_grad_() for n, v in zip(names, (x_r, x_d, *gates, *borders), strict=True)}
    single = cases.evaluate(seqops.grid_scan, inputs | {"flip_x": True}, cotangents)
    for threads in (2, 5):
        torch.set_num_threads(threads)
        cases.assert_same_bits(cases.evaluate(seqops.grid_scan, inputs | {"flip_x": True}, cotangents), single)
    rows = {name: value[-1:].detach().requires_grad_() for name, value in inputs.items()}
    row = cases.evaluate(seqops.grid_scan, rows | {"flip_x": True}, [c[-1:] for c in cotangents])
    cases.assert_same_bits(row, {name: value[-1:] for name, value in single.items()})


@pytest.mark.parametrize("T", [rungs(0), rungs(5)])
def test_outputs_are_new_memory(T: int) -> None:
    """Contiguous, and shared neither with an input nor with each other, even where nothing is computed."""
    case = make(B=3, T=T)
    inputs = case.inputs()
    before = {name: value.detach().clone() for name, value in cases.differentiable(inputs).items()}
    with torch.no_grad():
        outputs = case.operator(**inputs)
    for output in outputs:
        output.fill_(7.0)
    assert all(torch.equal(inputs[name], value) for name, value in before.items())
    assert all(output.is_contiguous() and (output == 7.0).all() for output in outputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept(dtype: torch.dtype) -> None:
    """Gates, r, d and the initial states; where no gradient of a gate is wanted, the gates alone."""
    case = make(B=3, T=6, Y=7, H=2, D=16, dtype=dtype)
    inputs = case.inputs()

    def kept() -> set[int]:
        tensors: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
            outputs = case.operator(**inputs)
        places = {t.untyped_storage().data_ptr() for t in tensors}
        return places - {o.untyped_storage().data_ptr() for o in outputs} if wants_gates else places

    wants_gates = True
    given = {value.untyped_storage().data_ptr() for value in cases.differentiable(inputs).values()}
    x = {inputs[name].untyped_storage().data_ptr() for name in ("x_r", "x_d")}
    assert kept() == given - x
    wants_gates = False
    for name in GATE_NAMES:
        inputs[name] = inputs[name].detach()
    assert kept() == {inputs[name].untyped_storage().data_ptr() for name in GATE_NAMES}


PEAK = """
import ctypes, re, torch, seqops
def status(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
def measure(function, expected, *name):
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed is not there to be used again
    open("/proc/self/clear_refs", "w").write("5")  # the peak restarts from what is resident now
    before = status("VmRSS")
    made = function()
    print(status("VmHWM") - before, expected, *name, sep=",")
    return made
def step(x, gates, flip):
    def back():
        return torch.autograd.grad((r, d), gates, (x, x))
    r, d = measure(lambda: seqops.grid_scan(x, x, *gates, flip_x=flip, flip_y=flip), 2 * x.nbytes, x.dtype, "forward")
    measure(back, 2 * x.nbytes, x.dtype, "backward")
for dtype in (torch.float32, torch.bfloat16):
    x = torch.empty(2, 64, 64, 4, 128).normal_().to(dtype)
    gates = [torch.full((2, 64, 64, 4), 0.4, dtype=dtype).requires_grad_() for _ in range(4)]
    if dtype == torch.float32:
        step(x[:, :1], [g[:, :1] for g in gates], False)  # the first call loads more code
        print("begin")
    for flip in (False, True):
        step(x, gates, flip)
"""


def test_memory_beyond_the_outputs(run_python: Callable[..., str]) -> None:
    """Peak of the process: some rows of the grid, gradients of gates, and two outputs that huge pages round."""
    lines = run_python(PEAK).split("begin\n")[1].splitlines()
    assert len(lines) == 8
    for line in lines:
        peak, outputs, *name = line.split(",")
        assert int(peak) >= int(outputs) * 0.9, f"{name}: nothing was measured"
        assert int(peak) <= int(outputs) + 5 * 2**20, f"{name}: {int(peak) / 2**20:.1f} MiB"


# ---------------------------------------------------------------- other backends, other instruction sets

RUNGS = {
    # avx512_bf16 adds a product of pairs, which is not used here.
    **{name: {"SEQOPS_CPU_ISA": name} for name in ("baseline", "avx2", "avx512")},
    "interpreter": {"SEQOPS_BACKEND": "triton", "TRITON_INTERPRET": "1"},
}


# The whole file runs with the last of the instruction sets where the machine has it.
@pytest.mark.parametrize("rung", [pytest.param(r, marks=[pytest.mark.slow] if r == "avx512" else []) for r in RUNGS])
def test_rung(rung: str, run_rung: Callable[..., str]) -> None:
    """All marked tests of this file in a process of their own. Above five seconds, since it is a whole rung."""
    if rung == "interpreter" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    mark = "tiny" if rung == "interpreter" else "small"
    run_rung(__file__, mark, **RUNGS[rung])


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_every_launch_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers ask for is what `configurations()` names and tests compile: constants, types of pointers."""
    grid = importlib.import_module("seqops.scan.triton_grid_scan")

    def identity(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
        return kernel.__name__, *sorted(types.items()), *sorted(constants.items())

    known = {
        identity(each["kernel"], {n: t for n, t in each["types"].items() if n[:2] == "p_"}, each["constants"])
        for each in grid.configurations()
    }
    asked = set()

    def record(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], compiler: dict[str, Any]) -> None:
        assert {*arguments} == {*kernel.arg_names} and programs > 0
        types = {n: f"*{grid.TYPES[v.dtype]}" for n, v in arguments.items() if isinstance(v, Tensor)}
        constants = {n: v for n, v in arguments.items() if n.isupper() and len(n) > 1}
        asked.add(identity(kernel, types, constants))

    monkeypatch.setattr(grid, "launch", record)
    for shape in ({"rows": 1, "width": 64}, {"rows": 8, "width": 8}):
        monkeypatch.setattr(grid, "INTERPRETED_SHAPE", shape)
        for x_dtype, gate_dtype in cases.grid_scan.PAIRS:
            for without, D in (((), 5), (("t_ru",), 70), (("t_ru", "t_dl"), 5)):
                case = make(B=1, T=2, Y=2, H=1, D=D, dtype=x_dtype, gate_dtype=gate_dtype, without=without)
                inputs = {n: v.detach() if torch.is_tensor(v) else v for n, v in case.inputs().items()}
                x_r, x_d, left, top = (inputs.pop(n) for n in ("x_r", "x_d", "initial_left", "initial_top"))
                gates = [inputs.pop(name) for name in GATE_NAMES]
                grid.grid_scan(x_r, x_d, *gates, initial_left=left, **inputs)
                grid.grid_scan_backward(x_r, None, *gates, x_r, x_d, left, None, **inputs)
                grid.grid_scan_backward(x_r, x_d, *gates, None, None, None, top, **inputs)
    assert len(asked) > 40
    assert asked <= known


# ---------------------------------------------------------------- GPU


def gpu_cases() -> list[Any]:
    return cases.common.parameters(
        replace(case, marks=("gpu", *(("sanitize",) if case.T == 7 and case.gaps else ())))
        for case in cases.CASES["grid_scan"]
    )


@pytest.mark.parametrize("case", gpu_cases())
def test_gpu(case: Case) -> None:
    """The whole table on CUDA tensors; a second run is bit-equal."""
    with seqops.backend("triton"):
        check(case, "cuda")
        inputs = case.inputs("cuda")
        cases.assert_same_bits(results(case, inputs), results(case, inputs))


@pytest.mark.gpu
def test_gpu_graph() -> None:
    """Forward and backward are captured once and replayed on other values, with the bits of an ordinary run."""
    case = make(B=2, T=14, Y=14, H=4, D=64, dtype=torch.bfloat16)
    inputs = case.inputs("cuda")
    cotangents = case.cotangents(case.operator(**inputs))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        cases.evaluate(case.operator, inputs, cotangents)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = cases.evaluate(case.operator, inputs, cotangents)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            inputs["x_r"].mul_(factor)
        graph.replay()
        torch.cuda.synchronize()
        replayed = {key: value.clone() for key, value in captured.items()}
        cases.assert_same_bits(replayed, cases.evaluate(case.operator, inputs, cotangents))


@pytest.mark.gpu
def test_gpu_large() -> None:
    """More than 2**31 elements: the last rows are held against the reference, from a wall of zeros on."""
    B, X, Y, H, D = 1, 130, 130, 1, 131_072
    x = torch.empty(B, X, Y, H, D, dtype=torch.bfloat16, device="cuda").normal_().requires_grad_()
    assert x.numel() > 2**31
    gates = [(torch.rand(B, X, Y, H, device="cuda") * 0.5) for _ in range(4)]
    for gate in (gates[0], gates[2]):
        gate[:, X - 5] = 0.0
    r, d = seqops.grid_scan(x, x, *gates)
    channels = [0, 1, D // 2, D - 1]
    small = x.detach()[:, X - 5 :][..., channels].cpu().double()
    exact = reference.grid_scan(small, small, *(gate[:, X - 5 :].cpu().double() for gate in gates))
    for got, expected in zip((r, d), exact, strict=True):
        assert cases.error(got[:, X - 5 :][..., channels], expected) <= 1.2 * torch.finfo(torch.bfloat16).eps / 2
