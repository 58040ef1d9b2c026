"""The search for constants, with kernels that are Python functions and clocks that are told what to show."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toys import Habits, make_target

from seqops.core import choose, launch
from seqops.tune import device as devices
from seqops.tune import search, target, timing
from seqops.tune.store import Entry, Store, shared

H100 = devices.PRESETS["h100"]
SHAPE = {"heads": 2, "dim": 64, "batch": 4, "time": 128, "gate": "full", "train": True}
ELSEWHERE = search.Place(H100, None, "no GPU here")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "user", tmp_path / "shipped")


@pytest.fixture
def here() -> search.Place:
    return search.Place(devices.host(), "cpu")


class Clock:
    """Gives each tile its microseconds instead of measuring; every call is made all the same."""

    def __init__(self, us: dict[int, float], habits: Habits) -> None:
        self.us, self.habits = us, habits

    def prepare(self, contenders: list[timing.Contender]) -> list[timing.Timer]:
        def make(contender: timing.Contender) -> timing.Timer:
            def timer() -> float:
                with contender.within():
                    contender.run()
                return self.us[self.habits.calls[-1][0]]

            return timer

        return [make(contender) for contender in contenders]


def times_of(**us: float) -> dict[int, float]:
    return {int(name[1:]): value for name, value in us.items()}


ALL_EQUAL = dict.fromkeys((4, 8, 16, 32, 64), 100.0)


def tune_here(us: dict[int, float], habits: Habits | None = None, place: Any = None, **options: Any) -> search.Outcome:
    habits = habits or Habits()
    place = place or search.Place(devices.host(), "cpu")
    toy = make_target(habits=habits)
    return search.tune(toy, place, SHAPE, "bf16", clock=Clock(ALL_EQUAL | us, habits), **options)


# --- the solver's part -----------------------------------------------------------------------------------------------


def test_candidates_come_in_the_model_s_order() -> None:
    outcome = search.solve(make_target(), H100, SHAPE, "bf16", top=5)
    assert [(c.constants["tile"], c.constants["unroll"]) for c in outcome.candidates] == [
        (64, 1),
        (32, 1),
        (32, 2),
        (16, 1),
        (16, 2),
    ]
    assert [c.rank for c in outcome.candidates] == [1, 2, 3, 4, 5]
    assert outcome.candidates[0].model_us == 11.5 and outcome.optimal
    assert outcome.candidates[0].predicted == {"registers": 88, "shared": 4096}
    assert (outcome.constraints, outcome.variables) == (2, 2) and outcome.nodes > 0
    assert str(outcome.key) == "toy.forward.cpu|bf16|D=64,B<=8|train"


def test_candidates_differ_in_the_variables_that_the_target_names() -> None:
    outcome = search.solve(make_target(distinct=("tile",)), H100, SHAPE, "bf16", top=8)
    assert [c.constants["tile"] for c in outcome.candidates] == [64, 32, 16, 8, 4]


def test_the_stored_choice_is_a_candidate_too(store: Store) -> None:
    toy = make_target()

    def put(tile: int) -> None:
        constants = {"tile": tile, "unroll": 1}
        store.put("h100", 90, "toy.forward.cpu|bf16|D=64,B<=8|train", Entry(constants, "measured", toy.tunable.digest))

    put(4)
    outcome = search.solve(toy, H100, SHAPE, "bf16", top=2, store=store)
    assert [(c.rank, c.constants["tile"], c.stored) for c in outcome.candidates] == [
        (1, 64, False),
        (2, 32, False),
        (0, 4, True),
    ]
    put(32)
    outcome = search.solve(toy, H100, SHAPE, "bf16", top=2, store=store)
    assert [(c.rank, c.stored) for c in outcome.candidates] == [(1, False), (2, True)]


def test_a_shape_that_nothing_fits_is_explained(store: Store) -> None:
    outcome = search.tune(make_target(), ELSEWHERE, SHAPE | {"dim": 7}, "bf16", store=store)
    assert "the tile divides the width" in outcome.explanation and outcome.explanation.startswith("infeasible")
    assert outcome.candidates == [] and outcome.chosen is None
    assert store.entries() == []


# --- compiling -------------------------------------------------------------------------------------------------------


def reasons(outcome: search.Outcome) -> dict[tuple[int, int], tuple[str, str] | None]:
    return {(c.constants["tile"], c.constants["unroll"]): c.failed and (c.failed, c.reason) for c in outcome.candidates}


def test_what_spills_or_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: None)
    toy = make_target(backend="cuda", habits=Habits(broken={8}, spills={64}))
    outcome = search.tune(toy, ELSEWHERE, SHAPE, "bf16")
    found = reasons(outcome)
    assert found[64, 1] == ("compile", "it spills 16 bytes a thread")
    assert found[8, 1] == ("compile", "toy.cu does not compile for sm_90a:\nexpected a ';'")
    assert found[32, 1] is None
    assert outcome.architecture == "sm_90a" and outcome.compiled == 6 and outcome.compile_seconds is not None
    # The model's best of those that compile.
    assert outcome.chosen.constants == {"tile": 32, "unroll": 1} and outcome.by == "solved"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"stack": 64}, "it needs a stack of 64 bytes a thread"),
        ({"shared": 300_000}, "it needs 300000 bytes of shared memory, and a block has 232448"),
        ({"registers": 200, "threads": 512}, "it needs 200 registers a thread, and 512 threads have 128 each"),
        ({"registers": 128, "threads": 512}, None),
    ],
)
def test_what_is_beyond_the_device_is_dropped(change: dict[str, int], reason: str | None) -> None:
    report = target.Report(100, 0, 0, 4096)
    toy = make_target(backend="cuda", compile=lambda *_: dataclasses.replace(report, **change))
    outcome = search.solve(toy, H100, SHAPE, "bf16", top=1)
    search.compile_all(outcome)
    assert [candidate.reason for candidate in outcome.candidates] == [reason]


def test_candidates_compile_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three wait for each other: one after the other, the barrier would break."""
    monkeypatch.setattr(search.os, "cpu_count", lambda: 3)
    barrier = threading.Barrier(3, timeout=20)

    def compile(*_: Any) -> target.Report:
        barrier.wait()
        return target.Report(32, 0, 0, 0)

    outcome = search.solve(make_target(backend="cuda", compile=compile), H100, SHAPE, "bf16", top=3)
    search.compile_all(outcome)
    assert outcome.compiled == 3 and all(candidate.failed is None for candidate in outcome.candidates)


def test_without_a_compiler_the_model_s_first_is_chosen(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    reason = "CuPy is not installed (pip install 'seqops[cuda]')"
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: reason)
    outcome = search.tune(make_target(backend="cuda"), ELSEWHERE, SHAPE, "bf16", store=store)
    assert outcome.uncompiled == reason and outcome.compiled == 0
    assert outcome.chosen.rank == 1 and outcome.stored == str(store.path("h100"))
    (listed,) = store.entries()
    assert (listed.entry.by, listed.entry.us, listed.entry.model_us) == ("solved", None, 11.5)


def test_what_a_cubin_uses_is_read_from_it() -> None:
    """compile_cuda with the real compiler, where it is installed."""
    if launch.reason_not_compiled() is not None:
        pytest.skip(launch.reason_not_compiled())
    source = Path(__file__).parent / "kernels"
    kernel = next(path for path in sorted(source.glob("*.cu")))
    constants = {"THREADS": 64, "BLOCKS": 1}
    plain, large = (target.compile_cuda(str(kernel), constants, "sm_90a", shared=size) for size in (0, 4096))
    assert 0 < plain.registers <= 255 and plain.spills == plain.stack == 0
    assert large.shared == plain.shared + 4096


# --- checking --------------------------------------------------------------------------------------------------------


def test_wrong_candidates_are_dropped_and_not_timed(here: search.Place) -> None:
    habits = Habits(wrong={64}, raises={16})
    outcome = tune_here(times_of(t64=1, t32=50), habits)
    found = reasons(outcome)
    values = 3 * 70 * 64
    assert found[64, 1] == (
        "check",
        f"wrong: {values} of {values} values of output 0, by up to 1 where 1e-06 + 1e-05 of the value is allowed",
    )
    assert found[16, 1] == ("check", "it does not run: the launch with tile 16 failed")
    assert outcome.candidates[0].us is None and outcome.chosen.constants["tile"] == 32
    assert outcome.checked == 8


def test_values_are_checked_at_a_small_shape_and_timed_at_the_real_one() -> None:
    habits = Habits()
    tune_here({}, habits)
    shapes = [shape for _, shape in habits.calls]
    assert shapes[:8] == [(3, 70, 64)] * 8
    assert set(shapes[8:]) == {(4, 128, 64)}


def test_a_flag_says_how_small_it_may_be() -> None:
    flags = (target.Flag("batch", 9, "", small=5), target.Flag("time", 9, ""), target.Flag("free", 9, ""))
    toy = dataclasses.replace(make_target(), flags=flags)
    assert toy.small({"batch": 100, "time": 1000, "free": 10**6}) == {"batch": 5, "time": 70, "free": 10**6}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (([1.0, 2.0],), None),
        (([1.0, 2.0], [3.0]), "wrong: 2 outputs, expected 1"),
        (([1.0],), "wrong: output 0 has shape [1], expected [2]"),
        (
            ([1.0, 2.5],),
            "wrong: 1 of 2 values of output 0, by up to 0.5 where 0.01 + 0.1 of the value is allowed",
        ),
        (
            ([1.0, float("nan")],),
            "wrong: 1 of 2 values of output 0, by up to inf where 0.01 + 0.1 of the value is allowed",
        ),
    ],
)
def test_comparing(values: tuple[list[float], ...], reason: str | None) -> None:
    given = [torch.tensor(value) for value in values]
    assert search.compare(given, [torch.tensor([1.0, 2.0], dtype=torch.float64)], (0.1, 0.01)) == reason


def test_a_broken_context_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access nothing else runs in the process: that is said, not charged to the next candidate."""

    def synchronize(device: str) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    habits = Habits(raises={64})
    outcome = search.solve(make_target(habits=habits), H100, SHAPE, "bf16", top=2)
    search.check_all(outcome, "cuda:0")
    assert outcome.lost and len(habits.calls) == 1
    assert [candidate.reason for candidate in outcome.candidates] == [
        "it does not run: the launch with tile 64 failed",
        "not tried: 1 broke the CUDA context",
    ]


@pytest.mark.parametrize("part", ["check", "time"])
def test_inputs_that_cannot_be_made_are_told(part: str, here: search.Place) -> None:
    toy = make_target()

    def example(shape: Any, dtype: str, torch_device: str) -> target.Example:
        if shape["batch"] == (3 if part == "check" else 4):
            raise MemoryError("4 TB wanted")
        return toy.example(shape, dtype, torch_device)

    outcome = search.tune(dataclasses.replace(toy, example=example), here, SHAPE, "bf16", top=2)
    step, text = {"check": ("reference", "could not be checked"), "time": ("time", "no inputs of this shape")}[part]
    assert [(c.failed, c.reason) for c in outcome.candidates] == [(step, f"{text}: MemoryError: 4 TB wanted")] * 2
    assert outcome.chosen is None


def test_values_that_cannot_be_compared_are_not_wrong(monkeypatch: pytest.MonkeyPatch, here: search.Place) -> None:
    def compare(*_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(search, "compare", compare)
    outcome = search.tune(make_target(), here, SHAPE, "bf16", top=1)
    (only,) = outcome.candidates
    assert (only.failed, only.reason) == ("reference", "could not be checked: out of memory")


def test_a_context_that_breaks_while_timing_is_told(monkeypatch: pytest.MonkeyPatch, here: search.Place) -> None:
    calls = {"made": 0}

    def before(tile: int) -> None:
        calls["made"] += 1
        if calls["made"] > 60:
            raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(search, "_is_lost", lambda torch_device: True)
    habits = Habits(before=before)
    toy, clock = make_target(habits=habits), Clock({64: 9.0, 32: 9.0}, habits)
    outcome = search.tune(toy, here, SHAPE, "bf16", top=2, clock=clock)
    assert outcome.chosen is not None and not outcome.lost  # known after five runs each, before it breaks
    calls["made"] = 55
    outcome = search.tune(toy, here, SHAPE, "bf16", top=2, clock=clock)
    assert outcome.lost and outcome.chosen is None
    text = "it does not run at this shape: RuntimeError: an illegal memory access was encountered"
    assert [candidate.reason for candidate in outcome.candidates] == [text] * 2


# --- timing ----------------------------------------------------------------------------------------------------------


def measure(us: list[Callable[[int], float]], seconds: float = 1e9, **options: Any) -> tuple[list[timing.Times], list]:
    """Times versions whose n-th run takes us[version](n); also the order in which they ran."""
    order: list[int] = []

    class Told:
        def prepare(self, contenders: list[timing.Contender]) -> list[timing.Timer]:
            def make(index: int) -> timing.Timer:
                def timer() -> float:
                    order.append(index)
                    return us[index](order.count(index))

                return timer

            return [make(index) for index in range(len(contenders))]

    found, interrupted = timing.measure([timing.Contender(lambda: None)] * len(us), Told(), seconds, **options)
    assert not interrupted
    return found, order


def test_versions_take_turns_after_three_warm_ups() -> None:
    found, order = measure([lambda n: 100.0 + n % 2, lambda n: 120.0])
    assert order[:6] == [0, 0, 0, 1, 1, 1]
    assert order[6:10] == [0, 1, 0, 1]
    assert found[0].median == pytest.approx(100.5, abs=0.6) and found[1].median == 120


def test_timing_ends_when_the_medians_are_known() -> None:
    found, _ = measure([lambda n: 100.0, lambda n: 101.0])
    assert [len(times.runs) for times in found] == [timing.EARLY] * 2
    assert all(times.known for times in found)
    # With every sixth run 5 % off, a few more runs are needed; with two values 5 % apart the median never settles.
    noisy, _ = measure([lambda n: 105.0 if n % 6 == 0 else 100.0, lambda n: 100.0])
    assert timing.EARLY < len(noisy[0].runs) < 40 and noisy[0].known
    split, _ = measure([lambda n: 100.0 + 5 * (n % 2), lambda n: 100.0])
    assert len(split[0].runs) == timing.MOST and not split[0].known


def test_a_clearly_slower_one_stops_after_five_runs() -> None:
    found, order = measure([lambda n: 100.0 + n % 5, lambda n: 160.0 + n % 5, lambda n: 145.0 + n % 5])
    assert found[1].stopped and len(found[1].runs) == 5
    assert not found[2].stopped and not found[0].stopped
    assert len(found[2].runs) == len(found[0].runs) > 5 and 1 not in order[9 + 15 :]


def test_timing_ends_when_the_time_is_over() -> None:
    """Each run advances the clock by a second; noise never settles."""
    clock = {"now": 0.0}

    def run(n: int) -> float:
        clock["now"] += 1
        return 100.0 * (1 + n % 4)

    found, _ = measure([run, run], seconds=30, now=lambda: clock["now"])
    assert 30 <= clock["now"] <= 32 and not found[0].known
    # However little there is, three rounds are made.
    clock["now"] = 0.0
    found, _ = measure([run, run], seconds=0.5, now=lambda: clock["now"])
    assert [len(times.runs) for times in found] == [timing.LEAST] * 2


def test_one_that_does_not_run_leaves_the_others() -> None:
    def broken(n: int) -> float:
        raise RuntimeError("out of memory")

    found, _ = measure([broken, lambda n: 100.0])
    assert found[0].failed == "RuntimeError: out of memory" and found[0].runs == []
    assert found[1].median == 100 and found[1].known


def test_progress_is_told() -> None:
    states: list[timing.State] = []
    measure([lambda n: 100.0, lambda n: 250.0], tell=states.append)
    assert [(state.done, state.best) for state in states][-1] == (2, 100.0)
    assert all(0 <= state.share <= 1 and state.total == 2 for state in states)


def test_the_spread_is_that_of_the_median() -> None:
    """Of 100 runs the interval lies between the 40th and the 60th or so; an outlier changes nothing."""
    times = timing.Times([float(value) for value in [*range(1, 100), 10**9]])
    assert times.median == 50.5 and times.spread == pytest.approx(10 / 50.5, abs=0.02)
    assert timing.Times([1.0]).spread is None and timing.Times().median is None


def test_the_host_clock_makes_short_calls_long_enough() -> None:
    now = {"s": 0.0, "calls": 0}

    def run() -> None:
        now["calls"] += 1
        now["s"] += 10e-6

    (timer,) = timing.HostClock(lambda: now["s"]).prepare([timing.Contender(run)])
    assert timer() == pytest.approx(10)
    before = now["calls"]
    assert timer() == pytest.approx(10)
    # One call to settle in, then 300 us of them.
    assert now["calls"] - before == 31


def test_the_host_clock_makes_long_calls_once() -> None:
    now = {"s": 0.0, "calls": 0}

    def run() -> None:
        now["calls"] += 1
        now["s"] += 0.1

    (timer,) = timing.HostClock(lambda: now["s"]).prepare([timing.Contender(run)])
    timer()
    before = now["calls"]
    assert timer() == pytest.approx(1e5) and now["calls"] == before + 1


# --- timing on a GPU, which is a stub here ---------------------------------------------------------------------------


class StubCuda:
    """A `torch.cuda` whose clock is a log: each call to the device takes its own microseconds."""

    def __init__(self, captures: bool = True) -> None:
        self.log: list[str] = []
        self.captures, self.capturing, self.us = captures, False, 0.0

    def get_device_properties(self, index: int) -> Any:
        return SimpleNamespace(L2_cache_size=50 << 20)

    def synchronize(self, *_: Any) -> None:
        self.log.append("synchronize")

    def graph_pool_handle(self) -> int:
        return 1

    def Stream(self) -> str:
        return "side"

    def stream(self, stream: str) -> Any:
        return nullcontext()

    def device(self, index: int) -> Any:
        assert index == 1
        return nullcontext()

    def run(self, us: float, name: str) -> None:
        if self.capturing:
            if not self.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recorded = (us, name)
            return
        self.us += us
        self.log.append(name)

    def CUDAGraph(self) -> Any:
        graph = SimpleNamespace(work=None)
        graph.replay = lambda: self.run(graph.work[0], f"replay {graph.work[1]}")
        return graph

    @contextmanager
    def graph(self, graph: Any, pool: int, stream: str) -> Iterator[None]:
        assert stream == "side"
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
        graph.work = self.recorded

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace()

        def record() -> None:
            event.at = self.us
            self.log.append("event")

        event.record = record
        event.elapsed_time = lambda other: (other.at - event.at) / 1e3
        return event

    def buffer(self, size: int, dtype: torch.dtype, device: str) -> Any:
        assert size * 4 == 200 << 20 and device == "cuda:1"
        return SimpleNamespace(amax=lambda: self.run(60, "flush"))


@pytest.mark.parametrize("captures", [True, False])
def test_a_gpu_is_timed_by_events_from_a_cold_cache(captures: bool) -> None:
    cuda = StubCuda(captures)
    clock = timing.CudaClock(1, cuda, cuda.buffer)
    inside: list[int] = []

    @contextmanager
    def within(index: int) -> Iterator[None]:
        inside.append(index)
        try:
            yield
        finally:
            inside.pop()

    def run(index: int) -> None:
        assert inside == [index]
        cuda.run(10.0 * (index + 1), f"kernel {index}")

    contenders = [timing.Contender(lambda i=i: run(i), lambda i=i: within(i)) for i in range(2)]
    first, second = clock.prepare(contenders)
    assert clock.captured == captures
    cuda.log.clear()
    assert second() == pytest.approx(20)
    name = "replay kernel 1" if captures else "kernel 1"
    # Without a graph one call settles in, as the version was just changed.
    assert cuda.log == [*([] if captures else [name]), "flush", "event", name, "event", "synchronize"]
    assert first() == pytest.approx(10)


def test_a_whole_timing_on_the_stub(here: search.Place) -> None:
    cuda = StubCuda()
    habits = Habits()
    habits.before = lambda tile: cuda.run({64: 90.0, 32: 60.0}.get(tile, 200.0), f"tile {tile}")
    outcome = search.tune(make_target(habits=habits), here, SHAPE, "bf16", clock=timing.CudaClock(1, cuda, cuda.buffer))
    assert outcome.chosen.constants["tile"] == 32 and outcome.chosen.us == pytest.approx(60)
    assert outcome.candidates[0].us == pytest.approx(90) and outcome.candidates[-1].stopped


def test_a_context_that_breaks_before_the_timing_is_told(here: search.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first calls of the capture break it, and then synchronizing fails too."""
    text = "CUDA error: an illegal memory access was encountered"
    cuda, habits = StubCuda(), Habits()

    def fail(*_: Any) -> None:
        raise RuntimeError(text)

    def before(tile: int) -> None:
        if len(habits.calls) > 2:  # both were checked
            cuda.synchronize = fail
            fail()

    habits.before = before
    clock = timing.CudaClock(1, cuda, cuda.buffer)
    monkeypatch.setattr(search, "_is_lost", lambda torch_device: True)
    outcome = search.tune(make_target(habits=habits), here, SHAPE, "bf16", top=2, clock=clock)
    assert outcome.lost and outcome.chosen is None
    reason = f"it does not run at this shape: RuntimeError: {text}"
    assert [(c.failed, c.reason) for c in outcome.candidates] == [("time", reason)] * 2


def test_a_clock_that_cannot_be_made_is_told(here: search.Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its buffer does not fit, or the context is lost."""

    def refuse(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(timing, "HostClock", refuse)
    outcome = search.tune(make_target(), here, SHAPE, "bf16", top=2)
    told = ("time", "nothing can be timed: CUDA out of memory")
    assert [(c.failed, c.reason) for c in outcome.candidates] == [told] * 2 and not outcome.lost


# --- keeping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("us", "winner"), [(98.1, 64), (98.0, 64), (97.9, 32), (50, 32), (120, 64)])
def test_a_winner_has_to_be_two_percent_faster(us: float, winner: int, store: Store) -> None:
    outcome = tune_here(times_of(t64=100, t32=us, t16=101, t8=101, t4=101), store=store, stored=store)
    assert outcome.chosen.constants["tile"] == winner and outcome.by == "measured"
    (listed,) = store.entries()
    assert listed.entry.constants == outcome.chosen.constants and listed.entry.us == outcome.chosen.us
    assert listed.entry.by == "measured" and listed.entry.source == outcome.target.tunable.digest
    assert outcome.stored == str(store.path(devices.host().name))


def test_the_stored_one_stays_where_it_is_the_fastest(store: Store) -> None:
    key, toy = "toy.forward.cpu|bf16|D=64,B<=8|train", make_target()
    constants = {"tile": 4, "unroll": 1}
    host = devices.host()
    store.put(host.name, host.arch, key, Entry(constants, "measured", toy.tunable.digest, us=40.0))
    outcome = tune_here(times_of(t4=50), top=3, store=store, stored=store)
    assert outcome.chosen.rank == 0 and outcome.chosen.constants == constants
    assert store.entries()[0].entry.us == 50


def test_a_dry_run_writes_nothing(store: Store) -> None:
    outcome = tune_here({}, stored=store)
    assert outcome.chosen is not None and outcome.entry is not None and outcome.stored is None
    assert not store.folder.exists()


def test_what_was_measured_is_not_replaced_by_what_was_solved(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: "no compiler")
    toy = make_target(backend="cuda")
    key = "toy.forward.cuda|bf16|D=64,B<=8|train"
    measured = Entry({"tile": 8, "unroll": 1}, "measured", toy.tunable.digest, us=9.0)
    store.put("h100", 90, key, measured)
    outcome = search.tune(toy, ELSEWHERE, SHAPE, "bf16", store=store)
    assert outcome.stored is None and outcome.unstored.startswith("what was measured on 20")
    assert store.entries()[0].entry.constants == measured.constants


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "tune", tmp_path)
    with pytest.warns(RuntimeWarning, match="memory only"):
        outcome = tune_here({}, store=store)
    assert outcome.stored is None and outcome.unwritten and outcome.unstored.endswith("cannot be written")


def test_the_choice_serves_from_now_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was remembered of earlier calls is asked again, once there is something to find."""
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: "no compiler")
    forgotten: list[int] = []
    monkeypatch.setattr(choose, "forget", lambda: forgotten.append(len(store.entries())))
    search.tune(make_target(backend="cuda"), ELSEWHERE, SHAPE, "bf16", store=store)
    assert forgotten == [1]


# --- interrupts ------------------------------------------------------------------------------------------------------


def interrupt_after(habits: Habits, calls: int) -> None:
    left = {"calls": calls}

    def before(tile: int) -> None:
        left["calls"] -= 1
        if left["calls"] < 0:
            raise KeyboardInterrupt

    habits.before = before


@pytest.mark.parametrize(
    ("calls", "measured"),
    [(3, False), (8 + 3, False), (8 + 24 + 8, False), (8 + 24 + 3 * 8, True), (8 + 24 + 3 * 8 + 5, True)],
    ids=["while checking", "while warming up", "after one round", "after three", "in the fourth"],
)
def test_an_interrupted_search_keeps_what_was_measured(calls: int, measured: bool, store: Store) -> None:
    habits = Habits()
    interrupt_after(habits, calls)
    outcome = tune_here(times_of(t32=50), habits, store=store, seconds=1e9)
    assert outcome.interrupted
    assert [each.entry.constants["tile"] for each in store.entries()] == ([32] if measured else [])
    assert outcome.by == ("measured" if measured else None)


def test_an_interrupt_while_compiling_stores_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: None)

    def tell(step: search.Step) -> None:
        if step.name == "compile":
            raise KeyboardInterrupt

    outcome = search.tune(make_target(backend="cuda"), ELSEWHERE, SHAPE, "bf16", store=store, tell=tell)
    assert outcome.interrupted and outcome.chosen is None and store.entries() == []


# --- what rooms say --------------------------------------------------------------------------------------------------


def test_targets_of_rooms_are_found_and_well_formed() -> None:
    """Names agree, flags have defaults of their type, and the default shape has a key."""
    for found in target.targets():
        op, part, kind = found.tunable.name.split(".")
        assert found.op == op and found.direction in ("forward", "backward")
        assert kind in ("cpu", "cuda", "triton") and part
        for flag in found.flags:
            assert isinstance(flag.default, flag.type) and flag.help and not flag.help.endswith("?")
            assert not flag.choices or flag.default in flag.choices
        assert found.dtypes
        device = devices.host() if kind == "cpu" else H100
        shape = {flag.key: flag.default for flag in found.flags}
        key = found.key(shape, found.dtypes[0], device)
        assert key.kernel == found.tunable.name and str(key) == str(found.key(shape, found.dtypes[0], device))
        json.dumps({str(key): len(found.tunable.digest)})


# --- rooms' kernels --------------------------------------------------------------------------------------------------


def test_a_room_s_kernel_is_tuned_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Solved, checked, timed and stored; what is stored is what calls then run with."""
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path))
    found = next(each for each in target.targets() if each.backend == "cpu")
    shape = {flag.key: flag.default for flag in found.flags} | {"dim": 24, "batch": 3, "time": 20}
    host, here = devices.host(), search.Place(devices.host(), "cpu")
    outcome = search.tune(found, here, shape, "float32", seconds=0.1, stored=shared(), store=shared())
    assert outcome.candidates and all(candidate.failed is None for candidate in outcome.candidates)
    assert outcome.by == "measured" and outcome.stored == str(shared().path(host.name))
    key = found.key(shape, "float32", host)
    assert dict(choose.solution(found.tunable, key, torch.device("cpu"))) == outcome.chosen.constants
    choose.forget()


SIMULATED = """
from dataclasses import replace
from seqops.core import launch
from seqops.tune import device, search, target

found = next(t for t in target.targets() if t.tunable.name == "linear_scan.forward.cuda")
shape = {flag.key: flag.default for flag in found.flags} | {"batch": 1, "time": 40, "channels": 8}
found = replace(found, distinct=("threads",))
outcome = search.solve(found, device.PRESETS["l4"], shape, "float32", top=2)
search.check_all(outcome, "cpu")
for candidate in outcome.candidates:
    assert candidate.failed is None, candidate.reason
print(len(outcome.candidates), len(list(launch.cache_folder().glob("linear_scan-*.so"))))
"""


def test_a_room_s_cuda_kernel_runs_with_each_candidate_s_constants(
    run_python: Callable[..., str], tmp_path: Path
) -> None:
    """In the simulator: one library for each candidate."""
    if launch._reason_without_compiler() is not None:
        pytest.skip(launch._reason_without_compiler())
    assert run_python(SIMULATED, SEQOPS_SIMULATE="1", SEQOPS_CACHE=str(tmp_path)).split() == ["2", "2"]


@pytest.mark.gpu
def test_a_room_s_kernel_is_tuned_on_a_gpu(tmp_path: Path) -> None:
    words = (
        "linear_scan --forward --batch 4 --time 2048 --channels 512 --dtype float32 --top 3 --seconds 2 --device cuda"
    )
    done = subprocess.run(
        [sys.executable, "-m", "seqops", "tune", *words.split(), "--device", "cuda", "--json"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"SEQOPS_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert done.returncode == 0, done.stderr
    for result in json.loads(done.stdout)["results"]:
        assert result["by"] == "measured" and result["compiled"] == len(result["candidates"])
        for candidate in result["candidates"]:
            assert candidate["failed"] is None and candidate["us"] > 0, candidate
