"""Measuring the machine: what the kernels do, in the simulator; what they compile to; and the CPU for real.

No time that the simulator gives means anything: these tests are about work that is done, names and checks.
"""

import contextlib
import dataclasses
import importlib.util
import math
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seqops.core import info, launch
from seqops.tune import device, probe, store

HAS_NVRTC = importlib.util.find_spec("cupy_backends") is not None
# but for the clock and for graphs, which need a GPU
SIMULATED = {"sync_cycles", "mma_cycles", "mma_issue_cycles", "l2_hop_us", "l2_hit_us", "grid_barrier_us", "launch_us"}
SIMULATED |= {"memory_latency_us", "bandwidth"}
OF_CLUSTERS = {"dsmem_cycles", "dsmem_bytes_per_clock", "cluster_processors"}


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    if reason := launch._reason_without_compiler():
        pytest.skip(reason)
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def small(name: str, processors: int) -> device.Device:
    gpu = device.find(name)
    return dataclasses.replace(gpu, processors=processors, max_cluster=min(8, gpu.max_cluster))


def simulated(gpu: device.Device) -> dict[str, float]:
    return probe.measure_gpu(gpu, torch.device("cpu"), probe.SIMULATOR)


# ---- the GPU's kernels


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", ["l4", "h100"])
def test_kernels_do_what_they_are_timed_for(
    name: str, seed: int, monkeypatch: pytest.MonkeyPatch, simulate: None
) -> None:
    """Each result is checked by the probe itself."""
    monkeypatch.setenv("SEQOPS_SIMULATE", str(seed + 1))
    gpu = small(name, 20)
    facts = simulated(gpu)
    assert {*facts} == SIMULATED | (OF_CLUSTERS if name == "h100" else set())
    assert all(value > 0 and math.isfinite(value) for value in facts.values())
    assert {*facts} <= {*device.measurable(gpu)}
    if name == "h100":
        # in order there is one cluster at a time, else up to four; 20 processors hold two and a half
        assert facts["cluster_processors"] in ({8} if seed == 0 else {8, 16, 20})


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("_MMA_ISSUE", "probe_mma_issue: expected 1024, got [nan, "),
        ("_FLAGS", "probe_flags: expected 4, got [0, 0]: its time means nothing"),
        ("_GRID", "probe_grid: expected 16, got [0]: its time means nothing"),
        ("_CHASE", "probe_chase: expected "),
        ("_HAND_OVER", "probe_hand_over: expected 8, got [0]: its time means nothing"),
        ("_STORES", "probe_stores: expected tensor([7, 0, 1, 2, 3, 4, 5, 6]), got [nan, "),
        ("_CLUSTERS", "probe_clusters: 0 clusters of 8 at once, 0 at the end"),
    ],
)
def test_a_kernel_that_does_nothing_is_noticed(
    kernel: str, message: str, monkeypatch: pytest.MonkeyPatch, simulate: None
) -> None:
    class Idle(launch.Kernel):
        def __call__(self, *_: Any, **__: Any) -> None:
            pass

    real = getattr(probe, kernel)
    monkeypatch.setattr(probe, kernel, Idle(real.source, real.entry, real._arguments.codes))
    with pytest.raises(RuntimeError) as caught:
        simulated(small("h100", 20))
    assert str(caught.value).startswith(message)


def test_a_time_that_is_none_is_noticed(monkeypatch: pytest.MonkeyPatch, simulate: None) -> None:
    monkeypatch.setattr(probe._Probe, "bandwidth", lambda self: math.inf)
    with pytest.raises(RuntimeError, match=r"^l4: the GPU cannot be measured: \{'bandwidth': inf\}$"):
        simulated(small("l4", 4))


class Event:
    """Takes the host's time, as everything runs at once here."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


def test_timing_by_events_and_graphs(monkeypatch: pytest.MonkeyPatch, simulate: None) -> None:
    """The way through the code that a GPU takes, with stand-ins for what torch has for it; kernels are simulated."""
    captured: list[int] = []

    class Graph:
        def replay(self) -> None:
            assert captured

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        captured.append(1)
        yield

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda on: (1 << 20, 1 << 30))
    monkeypatch.setattr(probe._Probe, "is_timed", property(lambda self: True, lambda self, value: None), raising=False)
    cycles = iter((1_000, 1_001_000))
    spent = iter((10.0, 510.0))
    gpu = small("h100", 20)
    probing = probe._Probe(gpu, torch.device("cpu"), probe.SIMULATOR)
    assert probing._large() == 64 << 10

    # 1,000,000 cycles in 500 microseconds
    def microseconds(self: Any, call: Any) -> float:
        (cell,) = (each.cell_contents for each in call.__closure__ if isinstance(each.cell_contents, torch.Tensor))
        cell.fill_(next(cycles))
        return next(spent)

    with monkeypatch.context() as patched:
        patched.setattr(probe._Probe, "microseconds", microseconds)
        assert probing.clock_ghz() == 2.0
    monkeypatch.setattr(probe._Probe, "clock_ghz", lambda self: 1.9)
    facts = simulated(gpu)
    assert {*facts} == SIMULATED | OF_CLUSTERS | {"graph_launch_us", "clock_ghz"} and facts["clock_ghz"] == 1.9
    assert captured == [1]


@pytest.mark.filterwarnings("ignore:.*this measured fact is not used")  # the simulator's times are none of a GPU
def test_a_driver_without_large_clusters(monkeypatch: pytest.MonkeyPatch, simulate: None) -> None:
    """Clusters of 16 are an offer: where it is refused, 8 are taken, which every GPU with clusters has."""
    real = probe._Probe._occupied

    def refusing(self: Any, cluster: int) -> dict[str, float]:
        if cluster == 16:
            raise ArithmeticError("CUDA_ERROR_INVALID_CLUSTER_SIZE")
        return real(self, cluster)

    monkeypatch.setattr(probe, "_refusals", lambda: (ArithmeticError,))
    monkeypatch.setattr(probe._Probe, "_occupied", refusing)
    gpu = dataclasses.replace(device.find("h100"), processors=20)
    facts = simulated(gpu)
    assert facts["max_cluster"] == 8 and device.with_measured(gpu, facts).max_cluster == 8


@pytest.mark.skipif(not HAS_NVRTC, reason="CuPy is not installed")
def test_refusals_are_the_drivers() -> None:
    (kind,) = probe._refusals()
    assert issubclass(kind, RuntimeError) and kind is not RuntimeError


# sm_80 and sm_89 have no clusters
ARCHITECTURES = {"sm_80": {}, "sm_89": {}, **{key: {"CLUSTER": 8} for key in ("sm_90a", "sm_100", "sm_120")}}


@pytest.mark.skipif(not HAS_NVRTC, reason="CuPy is not installed")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_offline(architecture: str) -> None:
    """Nothing spills, and what is to be timed is there, not moved out of the loop nor computed beforehand."""
    constants = ARCHITECTURES[architecture]
    path = launch.compile_offline(probe.SOURCE, constants, architecture)
    used = launch.resources(path)
    assert used["STACK"] == used["LOCAL"] == 0 and used["REG"] <= 64
    assert used["SHARED"] <= 9 << 10

    listing = subprocess.run([launch._cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout
    counts: dict[str, dict[str, int]] = {}
    for function in listing.split("Function : ")[1:]:
        codes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][A-Z0-9_]*)", function, re.MULTILINE)
        # the clock is read into a uniform register on newer ones
        codes = ["CS2R" if code == "CS2UR" else code for code in codes]
        counts[function.split()[0]] = {code: codes.count(code) for code in codes}
    exported = set(re.findall(r"^EXPORT\((\w+)\)", (launch.SOURCES / probe.SOURCE).read_text(), re.MULTILINE))
    clusters = {"probe_hand_over", "probe_stores", "probe_clusters"}
    assert {*counts} == (exported if constants else exported - clusters)
    for name, code, least in (
        ("probe_sync", "BAR", 16),
        ("probe_mma_latency", "HMMA", 16),
        ("probe_mma_issue", "HMMA", 64),
        ("probe_sync", "CS2R", 2),
        ("probe_chase", "LDG", 2),
        ("probe_stores", "ST", 8 if constants else 0),
    ):
        assert counts.get(name, {}).get(code, 0) >= least, (name, counts)


@pytest.mark.gpu
def test_the_gpu_of_this_machine(tmp_path: Path) -> None:
    """Within a few times the preset's figures, in a second or two, and the store takes it."""
    if reason := launch.reason_missing():
        pytest.skip(reason)
    on = torch.device("cuda", 0)
    probe.measure(on)  # compiles
    start = time.perf_counter()
    facts = probe.measure(on)
    assert time.perf_counter() - start < 3
    gpu = device.real(0)
    expected = {*device.LATENCIES, "bandwidth", "clock_ghz", *OF_CLUSTERS}
    if gpu.max_cluster == 1:
        expected -= OF_CLUSTERS
    assert {*facts} - {"max_cluster"} == expected
    for name, value in facts.items():
        assert getattr(gpu, name) / 8 < value < getattr(gpu, name) * 8, (name, value)
    assert facts["clock_ghz"] <= 1.05 * gpu.clock_ghz and facts["bandwidth"] <= 1.05 * gpu.bandwidth
    kept = store.Store(tmp_path, tmp_path / "shipped")
    kept.put_probe(gpu.name, gpu.arch, facts)
    assert kept.probe(gpu.name) == facts


# ---- the CPU


@pytest.mark.filterwarnings("ignore:.*this measured fact is not used")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_cpu_of_this_machine(threads: int, tmp_path: Path) -> None:
    torch.set_num_threads(threads)
    facts = probe.measure(torch.device("cpu"))
    expected = {"l1_bandwidth", "l2_bandwidth", "l3_bandwidth", "memory_bandwidth", "fma_per_cycle"}
    if threads > 1:
        expected |= {"fork_us"} | ({"barrier_us"} if "OpenMP" in info.parallel_backend() else set())
    assert {*facts} == expected
    assert all(value > 0 and math.isfinite(value) for value in facts.values())
    # wide limits: other programs may run
    assert 1e2 < facts["memory_bandwidth"] < 2e6 and facts["l1_bandwidth"] < 1e7
    assert 0.1 < facts["fma_per_cycle"] < 200
    before = device.host()
    after = device.with_measured(before, facts)
    # where other programs keep the cores, threads may wait for each other beyond belief
    taken = {name for name, origin in after.origin.items() if origin == "measured"}
    assert taken | {"fork_us", "barrier_us"} >= {*facts} >= taken
    assert after.threads == threads and after.l2_bandwidth == facts["l2_bandwidth"]
    kept = store.Store(tmp_path, tmp_path / "shipped")
    assert kept.put_probe(before.name, before.arch, facts, before.scope)
    assert kept.probe(before.name, before.scope) == facts


def test_another_set_of_instructions(run_python: Any) -> None:
    """Each has loops of its own."""
    script = "from seqops.tune import probe; print(probe._call('read', 16384, 100), probe._call('multiply_add', 1000))"
    values = [float(value) for value in run_python(script, SEQOPS_CPU_ISA="baseline").split()]
    assert all(1 < value < 1e8 for value in values)


def test_threads_that_need_not_run_together_are_not_made_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool may run one worker after another: a barrier among them would never open."""
    asked = []

    def call(name: str, *_: int) -> float:
        asked.append(name)
        return 100.0

    monkeypatch.setattr(probe, "_call", call)
    monkeypatch.setattr(info, "parallel_backend", lambda: "native thread pool")
    torch.set_num_threads(2)
    facts = probe.measure_host()
    assert "barrier" not in asked and "barrier_us" not in facts and facts["fork_us"] == 100


def test_no_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_call", lambda name, *_: -1.0 if name == "read" else 100.0)
    with pytest.raises(RuntimeError, match=r"^the CPU cannot be measured: \{'l1_bandwidth': -1\.0, "):
        probe.measure_host()


# ---- misuse


def test_what_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"^device: expected cpu or cuda, got meta$"):
        probe.measure(torch.device("meta"))
    monkeypatch.setattr(launch, "reason_missing", lambda: "torch finds no CUDA device")
    with pytest.raises(RuntimeError, match=r"^the GPU cannot be measured: torch finds no CUDA device$"):
        probe.measure(torch.device("cuda"))


def test_names_are_fields() -> None:
    """What is measured is what the models take."""
    fields = {each.name for each in dataclasses.fields(device.Device)}
    assert SIMULATED | OF_CLUSTERS | {"graph_launch_us", "clock_ghz", "max_cluster"} <= fields
    assert {*device.LATENCIES} <= SIMULATED | OF_CLUSTERS | {"graph_launch_us"}
