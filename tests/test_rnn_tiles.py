"""How the CPU's recurrent kernels share their work: the plans, the questions that C++ asks, and what it remembers."""

import compileall
import ctypes
import itertools
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases.rnn import OPERATORS, Case

import seqops
from bench import tune_quality
from seqops.core import choose
from seqops.rnn import cpu, tiles, tune
from seqops.tune import csp, device
from seqops.tune.search import compare

TARGETS = {(target.op, target.direction): target for target in tune.CPU_TARGETS}
PLAN = cpu.plan
GOOD = {"workers": 1, "row_blocks": 1, "split_units": 0, "panel_width": 1, "narrow_weights": 0}
both = pytest.mark.parametrize(("op", "direction"), TARGETS)


class Asked(list[dict[str, int]]):
    """The questions so far; `answer` replaces the answers."""

    answer: Callable[[Any], choose.Solution] = staticmethod(PLAN)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    """Nothing is remembered from before, and nothing stays for others."""
    questions = Asked()

    def plan(question: Any) -> choose.Solution:
        questions.append({name: getattr(question, name) for name, _ in cpu.Question._fields_})
        return questions.answer(question)

    monkeypatch.setattr(cpu, "plan", plan)
    choose.forget()
    yield questions
    monkeypatch.undo()
    choose.forget()


def run(op: str = "lstm", B: int = 3, T: int = 20, D: int = 16, H: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    wx = torch.randn(B, T, cases.rnn.GATES[op], H, D, generator=generator)
    return getattr(seqops, op)(wx, torch.randn(cases.rnn.GATES[op], H, D, D, generator=generator) / D**0.5)[0]


def problem(op: str, direction: str, dtype: str, threads: int, **shape: int) -> csp.Problem:
    host, target = device.host(threads), TARGETS[op, direction]
    return target.tunable.problem(host, target.key(shape, dtype, host))


# ---------------------------------------------------------------- plans


@pytest.mark.parametrize("shape", [(2, 33, 5, 9), (1, 70, 1, 17), (3, 16, 2, 3)], ids=str)
@pytest.mark.parametrize("dtype", tune.DTYPES)
@both
def test_every_plan_gives_the_reference_and_the_same_bits(
    op: str, direction: str, dtype: str, shape: tuple[int, int, int, int]
) -> None:
    torch.set_num_threads(3)
    target, sizes = TARGETS[op, direction], dict(zip(("heads", "dim", "batch", "time"), shape, strict=True))
    example = target.example(sizes, dtype, "cpu")
    expected, first = example.expected(), None
    plans = [*problem(op, direction, dtype, 3, **sizes).solutions(limit=1000, seconds=math.inf)]
    assert len(plans) >= 3
    for plan in plans:
        with choose.forced(target.tunable.name, plan):
            got = example.run()
        assert compare(got, expected, example.tolerance) is None, plan
        first = got if first is None else first
        assert all(cases.same_bits(a, b) for a, b in zip(got, first, strict=True)), plan


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512_bf16"])
@pytest.mark.parametrize("threads", [1, 2, 6, 64])
@both
def test_there_is_a_plan_for_everything(op: str, direction: str, threads: int, isa: str) -> None:
    host = replace(device.host(threads), isa=isa, vector_bytes={"baseline": 16, "avx2": 32}.get(isa, 64))
    target = TARGETS[op, direction]
    for (B, T), D, dtype in itertools.product([(1, 1), (3, 9), (100, 1000)], [1, 64, 770], ["float32", "bfloat16"]):
        shape = {"heads": 3, "dim": D, "batch": B, "time": T}
        key = target.key(shape, dtype, host)
        plan = tiles.problem(host, key).solve(seconds=math.inf)
        assert plan is not None and plan["workers"] <= threads and plan["row_blocks"] <= B
        assert set(plan) == set(tiles.VARIABLES)


def test_the_cost_follows_the_machine() -> None:
    """More of anything never costs more, a slower barrier never less."""
    host = replace(device.host(4), barrier_us=1.0)
    target = TARGETS["lstm", "forward"]
    key = target.key({"heads": 1, "dim": 512, "batch": 2, "time": 64}, "float32", host)

    def cost(**changes: float) -> float:
        p = tiles.problem(replace(host, **changes), key)
        return p.cost(p.solve(seconds=math.inf))

    for name in ("clock_ghz", "fma_per_cycle", "l2_bandwidth", "l3_bandwidth", "l2_bytes"):
        assert cost(**{name: 4 * getattr(host, name)}) <= cost()
    assert cost(barrier_us=2.0) > cost()


def test_what_a_problem_reports() -> None:
    p = problem("lstm", "forward", "float32", 2, heads=1, dim=256, batch=1, time=64)
    values = p.values({**GOOD, "workers": 2, "split_units": 1})
    assert values["packed bytes"] == 4 * 256 * 256 * 4
    assert 0 < values["barrier share"] < 1 < values["cycles a step"]
    assert p.values(GOOD)["barrier share"] == 0
    assert p.check({**GOOD, "row_blocks": 2}) is not None


# ---------------------------------------------------------------- buckets


def test_edges() -> None:
    assert tiles.ROW_EDGES[:16] == (*range(1, 17),)
    assert tiles.ROW_EDGES[16:] == (20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256)
    for edges, beyond in ((tiles.ROW_EDGES, tiles.ROWS_BEYOND), (tiles.STEP_EDGES, tiles.STEPS_BEYOND)):
        assert [*edges] == sorted({*edges}) and beyond > edges[-1] and len(edges) < 256
    members: dict[int, list[int]] = {}
    for B in range(1, 400):
        members.setdefault(choose.bucket("B", B, tiles.ROW_EDGES, tiles.ROWS_BEYOND).value, []).append(B)
    assert all(tiles.smallest_member(tiles.ROW_EDGES, value) == min(found) for value, found in members.items())


@both
def test_every_plan_of_a_bucket_serves_its_smallest_member(op: str, direction: str) -> None:
    for batch, smallest in ((3, 3), (20, 17), (40, 33), (1000, 257)):
        p = problem(op, direction, "float32", 300, heads=1, dim=16, batch=batch, time=20)
        assert (
            max(plan["row_blocks"] for plan in p.solutions(limit=10_000, distinct=("row_blocks",), seconds=math.inf))
            <= smallest
        )


def test_calls_of_a_bucket_share_an_answer(asked: Asked) -> None:
    """And the question is the same, whichever came first."""
    for B, T in ((17, 33), (20, 64), (18, 50)):
        run(B=B, T=T)
    assert [(q["B"], q["T"]) for q in asked] == [(20, 64)]
    run(B=21, T=64)
    run(B=21, T=65)
    run(B=257, T=257)
    run(B=300, T=300)
    assert [(q["B"], q["T"]) for q in asked[1:]] == [(24, 64), (24, 128), (257, 257)]


def test_what_is_asked(asked: Asked) -> None:
    torch.set_num_threads(2)
    asked.answer = lambda question: GOOD
    for op, dtype in zip(OPERATORS, (torch.float32, torch.float64, torch.bfloat16, torch.float16), strict=True):
        case = Case(op, B=2, T=7, H=3, D=5, dtype=dtype)
        cases.evaluate(case.operator, case.inputs(), case.cotangents(case.operator(**case.inputs())))
    sizes = {"H": 3, "D": 5, "B": 2, "T": 8, "threads": 2}
    assert asked == [
        {"cell": cell, "backward": backward, "storage": cell, "unpacked": 1 - backward, **sizes}
        for cell in range(4)
        for backward in (0, 1)
    ]


def test_the_border_of_dot_products(asked: Asked) -> None:
    """Calls of fewer than 16 rows times steps have plans of their own, in whatever bucket they fall."""
    for B, T in ((2, 7), (2, 8), (2, 5)):
        run(B=B, T=T)
    assert [(q["T"], q["unpacked"]) for q in asked] == [(8, 1), (8, 0)]
    assert [tiles.is_unpacked("forward", 2, T) for T in (7, 8)] == [True, False]
    assert not tiles.is_unpacked("backward", 1, 1)


# ---------------------------------------------------------------- remembering


def test_a_remembered_plan_asks_nobody(asked: Asked) -> None:
    for _ in range(20):
        run()
    assert len(asked) == 1
    torch.set_num_threads(2)
    run()
    run("gru")
    assert len(asked) == 3
    choose.forget()
    run()
    assert len(asked) == 4


def test_more_kinds_than_places(asked: Asked) -> None:
    """What finds no place is asked for again, and nothing is taken for something else."""
    asked.answer = lambda question: {**GOOD, "row_blocks": question.B, "workers": 1}
    for _ in range(2):
        for D, H in itertools.product(range(1, 50), range(1, 31)):
            run("elman", B=1 + (D + H) % 3, T=6, D=D, H=H)
    kinds = {tuple(question.values()) for question in asked}
    assert len(kinds) == 49 * 30 and len(asked) > len(kinds)


def test_a_forced_plan_reaches_the_kernel(asked: Asked) -> None:
    expected = run()
    with choose.forced("lstm.forward.cpu", {**GOOD, "row_blocks": 3}):
        assert torch.equal(run(), expected)
        with choose.forced("lstm.forward.cpu", {**GOOD, "row_blocks": 4}), pytest.raises(RuntimeError, match="row_bl"):
            run()
        run("gru")
    run()
    assert len(asked) == 5


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"workers": 0}, "workers: expected 1 to 2, got 0"),
        ({"workers": 3}, "workers: expected 1 to 2, got 3"),
        ({"row_blocks": 4}, "row_blocks: expected 1 to 3, got 4"),
        ({"split_units": 1, "row_blocks": 2}, "row_blocks: expected 1 to 1, got 2"),
        ({"split_units": 2}, "split_units: expected 0 to 1, got 2"),
        ({"panel_width": 2}, "panel_width: expected 1 to 1, got 2"),
        ({"narrow_weights": 1}, "narrow_weights: expected 0 to 0, got 1"),
    ],
    ids=str,
)
def test_impossible_plans_are_refused(wrong: dict[str, int], text: str) -> None:
    torch.set_num_threads(2)
    with (
        choose.forced("lstm.forward.cpu", GOOD | wrong),
        pytest.raises(RuntimeError, match=f"^lstm: impossible plan to share the work: {text}$"),
    ):
        run()
    run()


@pytest.mark.parametrize("width", [0, 3, 5])
def test_impossible_panels_are_refused(width: int) -> None:
    with (
        choose.forced("elman.backward.cpu", GOOD | {"panel_width": width}),
        pytest.raises(RuntimeError, match=f"^elman_backward: impossible plan .*panel_width.* got {width}$"),
    ):
        torch.ops.seqops.elman_backward(None, None, torch.zeros(1, 1, 4, 4), torch.zeros(2, 3, 1, 4))


# ---------------------------------------------------------------- when asking goes wrong


@pytest.mark.parametrize("error", [ValueError("of 3 ≤ 4"), SystemExit(3), MemoryError(), ValueError("x" * 5000)])
def test_an_error_comes_back_as_text(asked: Asked, error: BaseException) -> None:
    def fail(question: Any) -> choose.Solution:
        raise error

    asked.answer = fail
    with pytest.raises(RuntimeError) as caught:
        run()
    text = f"{type(error).__name__}: {error}".replace("≤", "\\u2264")[:1023]
    assert str(caught.value) == f"lstm: no plan to share the work: {text}"
    asked.answer = PLAN  # nothing of it is remembered
    run()
    assert len(asked) == 2


def test_an_incomplete_choice_is_named() -> None:
    with choose.forced("lstm.forward.cpu", {"workers": 1}), pytest.raises(RuntimeError, match="got no row_blocks, sp"):
        run()


INTERRUPT = """
import signal, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts jobs in the background without it
import seqops
from seqops.rnn import cpu
def run():
    return seqops.lstm(torch.ones(2, 9, 4, 1, 8), torch.ones(4, 1, 8, 8))[0]
def interrupt(question):
    raise KeyboardInterrupt
expected, plan = run(), cpu.plan
seqops.core.choose.forget()
cpu.plan = interrupt
try:
    run()
    for _ in range(1000): pass  # Python delivers a signal between two instructions
    print("lost")
except KeyboardInterrupt:
    print("interrupted")
cpu.plan = plan
print(torch.equal(run(), expected))
"""


def test_an_interrupt_is_not_lost(run_python: Callable[..., str]) -> None:
    """It is raised when the call is over, and the next call is as ever. In a process of its own, which it may end."""
    assert run_python(INTERRUPT) == "interrupted\nTrue\n"


def test_whoever_is_asked_may_run_operators(asked: Asked) -> None:
    expected = run()

    def nested(question: Any) -> choose.Solution:
        assert torch.equal(run(), expected)
        return PLAN(question)

    asked.answer = nested
    choose.forget()
    assert torch.equal(run(), expected)
    assert len(asked) == 2


# ---------------------------------------------------------------- threads and processes


def test_many_threads_ask_at_once(asked: Asked) -> None:
    """While others have everything forgotten."""
    shapes = [(op, B, T, D) for op in OPERATORS for B in (1, 5) for T in (3, 20) for D in (7, 16, 33)]
    expected = [run(*shape) for shape in shapes]
    choose.forget()
    start = threading.Barrier(8)

    def work(index: int) -> None:
        start.wait()
        for _ in range(6):
            for shape, value in zip(shapes, expected, strict=True):
                assert torch.equal(run(*shape), value)
                if index == 0:
                    choose.forget()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))


def test_the_backward_may_run_in_another_thread(asked: Asked) -> None:
    case = Case("lstm", B=3, T=20, D=16)
    inputs = case.inputs()
    loss = case.operator(**inputs)[0].sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert inputs["wx"].grad is not None
    assert [q["backward"] for q in asked] == [0, 1]


PLANS = """
import sys, torch, seqops
from seqops.rnn import cpu
plan, found = cpu.plan, {}
def record(question):
    answer = plan(question)
    found[tuple(getattr(question, name) for name, _ in question._fields_)] = tuple(answer.items())
    return answer
cpu.plan = record
torch.set_num_threads(2)
order = [(op, B, T) for op in ("lstm", "gru", "slstm", "elman") for B in (1, 18, 20) for T in (1, 9, 14)]
results = {}
for op, B, T in order if sys.argv[1] == "rising" else reversed(order):
    g = torch.Generator().manual_seed(B * T)
    gates = {"gru": 3, "elman": 1}.get(op, 4)
    wx, r = torch.randn(B, T, gates, 2, 33, generator=g).requires_grad_(), torch.randn(gates, 2, 33, 33, generator=g)
    h = getattr(seqops, op)(wx, r)[0]
    h.sum().backward()
    results[op, B, T] = h.sum().item(), wx.grad.double().sum().item()
print(sorted(found.items()), [results[each] for each in order])
"""


def test_two_processes_choose_alike(run_python: Callable[..., str]) -> None:
    """Whatever came first, and however Python hashes."""
    first = run_python(PLANS, "rising", PYTHONHASHSEED="1")
    assert first == run_python(PLANS, "falling", PYTHONHASHSEED="2") and len(first) > 1000


FORK = """
import os, torch, seqops
def run(D):
    return seqops.lstm(torch.ones(2, 9, 4, 1, D), torch.ones(4, 1, D, D) / D)[0].sum()
expected = run(8)
child = os.fork()
if child == 0:
    os._exit(0 if run(8) == expected and run(9).isfinite() else 1)
print(os.waitpid(child, 0)[1])
"""


def test_a_forked_child_asks(run_python: Callable[..., str]) -> None:
    assert run_python(FORK) == "0\n"


IMPORT = """
import sys, torch, seqops
solver = lambda: "seqops.tune.csp" in sys.modules
print(solver())
seqops.lstm(torch.ones(2, 9, 4, 1, 8), torch.ones(4, 1, 8, 8))
print(solver())
"""


def test_the_solver_is_imported_when_it_is_needed(run_python: Callable[..., str]) -> None:
    assert run_python(IMPORT) == "False\nTrue\n"


def test_a_package_without_sources_serves(run_python: Callable[..., str], tmp_path: Path) -> None:
    """Neither csrc/ beside it nor the text of its own modules is needed to choose a plan."""
    package = tmp_path / "seqops"
    shutil.copytree(Path(seqops.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(package, quiet=1, legacy=True)
    (package / "rnn" / "tiles.py").unlink()
    script = "import sys, seqops; print(seqops.__file__)\n" + IMPORT
    output = run_python(script, folder=tmp_path, PYTHONPATH=str(tmp_path))
    assert output == f"{package / '__init__.py'}\nFalse\nTrue\n"


AT_EXIT = """
import atexit, torch
def late():
    h = seqops.lstm(torch.ones(2, 9, 4, 1, 9), torch.ones(4, 1, 9, 9))[0]
    print(h.isfinite().all().item(), len(asked))
atexit.register(late)  # before ours, so it runs after ours
import seqops
from seqops.rnn import cpu
plan, asked = cpu.plan, []
cpu.plan = lambda question: (asked.append(1), plan(question))[1]
seqops.lstm(torch.ones(2, 9, 4, 1, 8), torch.ones(4, 1, 8, 8))
"""


def test_a_call_at_exit_asks_nobody(run_python: Callable[..., str]) -> None:
    assert run_python(AT_EXIT) == "True 1\n"


NOBODY = """
import ctypes, itertools, sys, torch, seqops
from seqops.core import choose
from seqops.rnn import cpu
def refuse(question):
    raise AssertionError("asked")
def evaluate():
    for op, threads, (B, T, H, D), dtype in itertools.product(
        ("lstm", "gru", "slstm", "elman"), (1, 3), ((1, 1, 1, 3), (1, 20, 1, 300), (5, 20, 2, 16), (40, 17, 3, 64)),
        (torch.float32, torch.float16),
    ):
        torch.set_num_threads(threads)
        g = torch.Generator().manual_seed(B * T)
        gates = {"gru": 3, "elman": 1}.get(op, 4)
        wx = torch.randn(B, T, gates, H, D, generator=g).to(dtype).requires_grad_()
        h = getattr(seqops, op)(wx, (torch.randn(gates, H, D, D, generator=g) / D**0.5).to(dtype))[0]
        h.sum().backward()
        yield h.detach(), wx.grad
wx, r = torch.randn(3, 20, 4, 1, 8), torch.randn(4, 1, 8, 8)
class Model(torch.nn.Module):
    def forward(self, wx, r):
        return seqops.lstm(wx, r)[0]
exported = torch.export.export(Model(), (wx, r)).module()
expected = [*evaluate()], exported(wx, r)
library = ctypes.CDLL(seqops._C.__file__)
library.seqops_rnn_set_planner(None, None, 0, None, 0)
cpu.plan = refuse
choose.forget()
for mine, other in zip(evaluate(), expected[0], strict=True):
    assert torch.equal(mine[0], other[0]) and torch.equal(mine[1], other[1])
assert torch.equal(exported(wx, r), expected[1])
print("same")
"""


def test_without_a_planner(run_python: Callable[..., str]) -> None:
    """One rule serves, with the same bits; an exported model too."""
    assert run_python(NOBODY) == "same\n"


def test_layouts_are_those_of_the_header() -> None:
    """Nine and six numbers of eight bytes, and the text."""
    assert ctypes.sizeof(cpu.Question) == 9 * 8 and ctypes.sizeof(cpu.Answer) == 6 * 8 + 1024


# ---------------------------------------------------------------- the benchmark of the choices


def test_ranks_agree_or_not() -> None:
    assert tune_quality.rank_correlation([1.0, 2.0, 3.0], [10.0, 11.0, 50.0]) == pytest.approx(1)
    assert tune_quality.rank_correlation([3.0, 2.0, 1.0], [10.0, 11.0, 50.0]) == pytest.approx(-1)
    assert [*tune_quality.ranks([5.0, 1.0, 5.0])] == [1.5, 0, 1.5]
    assert tune_quality.rank_correlation([1.0, 1.0, 1.0], [10.0, 11.0, 50.0]) is None


def test_a_row_holds_every_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setattr(tune_quality, "SECONDS", 0)
    monkeypatch.setattr(tune_quality, "WARM", 0)
    shape = {"heads": 2, "dim": 70, "batch": 3, "time": 20}
    row = tune_quality.row(TARGETS["elman", "forward"], "float32", shape, 2)
    plans = [tuple(each["plan"].values()) for each in row["candidates"]]
    assert len({*plans}) == len(plans) == 12 and row["choice"] == row["candidates"][0]["plan"]
    assert row["choice_us"] == row["candidates"][0]["measured_us"] >= row["best_us"] > 0
    predicted = [each["predicted_us"] for each in row["candidates"]]
    assert predicted == sorted(predicted)
    assert tune_quality.summary([row])["ratio"]["median"] == row["ratio"] >= 1
