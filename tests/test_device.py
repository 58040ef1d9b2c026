"""The hardware model: presets, occupancy, a GPU as a driver describes it, and this machine's CPU."""

import dataclasses
import json
import math
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqops.core import info
from seqops.tune import device, store
from seqops.tune.device import PRESETS, Device, Host

KB, MB = 1024, 1024 * 1024


def numbers(machine: Device | Host) -> dict[str, float]:
    found = {each.name: getattr(machine, each.name) for each in dataclasses.fields(machine)}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


# ---- presets

# name, SMs, GHz, KB a processor and a block, threads, cluster, MB of L2, TB/s, bf16 multiply-adds
TABLE = """
a100     80  108 1.41 164 163 2048  1  40 2.04 1024
h100     90  132 1.83 228 227 2048 16  50 3.35 2048
h200     90  132 1.83 228 227 2048 16  50 4.8  2048
b200    100  148 1.86 228 227 2048 16 126 8.0  4096
l4       89   58 2.04 100  99 1536  1  48 0.30  512
rtx4090  89  128 2.52 100  99 1536  1  72 1.01  256
"""
# dense bf16 with float32 sums as on the data sheets, TFLOP/s
SHEET = {"a100": 312, "h100": 989, "h200": 989, "b200": 2250, "l4": 121, "rtx4090": 165}


def test_table() -> None:
    rows = [line.split() for line in TABLE.split("\n") if line]
    assert [row[0] for row in rows] == [*PRESETS]
    for name, *values in rows:
        gpu = PRESETS[name]
        arch, processors, clock, shared, block, threads, cluster, l2, terabytes, bf16 = map(float, values)
        assert (gpu.name, gpu.preset, gpu.arch, gpu.processors) == (name, name, arch, processors)
        assert (gpu.clock_ghz, gpu.fma_bf16, gpu.threads_per_processor) == (clock, bf16, threads)
        assert (gpu.shared_per_processor, gpu.shared_per_block) == (shared * KB, block * KB)
        assert (gpu.max_cluster, gpu.l2_bytes, gpu.bandwidth) == (cluster, l2 * MB, pytest.approx(terabytes * 1e6))


@pytest.mark.parametrize("gpu", PRESETS.values(), ids=PRESETS)
def test_every_preset_holds_together(gpu: Device) -> None:
    facts = numbers(gpu)
    assert all(value > 0 and math.isfinite(value) for value in facts.values())
    assert {*gpu.origin} == {*facts} and {*gpu.origin.values()} <= {"preset", "estimate"}
    assert gpu.origin["launch_us"] == "estimate" and gpu.origin["processors"] == "preset"
    assert gpu.shared_per_block == gpu.shared_per_processor - gpu.reserved_per_block
    assert gpu.threads_per_processor % 128 == 0 and gpu.registers_per_processor == 65536
    assert gpu.max_cluster <= gpu.cluster_processors <= gpu.processors
    assert gpu.cluster_processors % gpu.max_cluster == 0
    assert gpu.graph_launch_us < gpu.launch_us and gpu.l2_hop_us <= gpu.l2_hit_us < gpu.memory_latency_us
    # mma.sync is at best as fast as the tensor cores are
    assert gpu.mma_issue_cycles >= 2048 / (gpu.fma_bf16 / 4) and gpu.mma_cycles > gpu.mma_issue_cycles
    rate = 2 * gpu.processors * gpu.clock_ghz * gpu.fma_bf16 / 1e3
    assert rate == pytest.approx(SHEET[gpu.name], rel=0.01)
    assert gpu.architecture == {80: "sm_80", 89: "sm_89", 90: "sm_90a", 100: "sm_100"}[gpu.arch]
    assert hash(gpu) == hash(dataclasses.replace(gpu))


def test_latencies_are_fields() -> None:
    assert {*device.LATENCIES} <= {each.name for each in dataclasses.fields(Device)}
    assert PRESETS["a100"].origin["grid_barrier_us"] == "preset"
    assert PRESETS["h100"].origin["grid_barrier_us"] == "estimate"
    assert PRESETS["h100"].origin["dsmem_cycles"] == "preset"


@pytest.mark.parametrize("name", ["h100", "H100", "RTX 4090", "rtx-4090", "Rtx_4090"])
def test_find(name: str) -> None:
    assert device.find(name).name in ("h100", "rtx4090")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("h10", "; nearest: h100, h200, a100"), ("h1000", "; nearest: h100, h200, a100"), ("", ""), ("zzz", "")],
)
def test_find_names_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError) as caught:
        device.find(name)
    expected = f"device: expected one of a100, h100, h200, b200, l4, rtx4090, got {name!r}{nearest}"
    assert str(caught.value) == expected


# ---- occupancy


@pytest.mark.parametrize(
    ("threads", "most"), [(1, 255), (128, 255), (256, 255), (257, 168), (384, 168), (512, 128), (640, 96), (1024, 64)]
)
def test_registers_a_thread(threads: int, most: int) -> None:
    """65,536 registers go to groups of four warps, eight a thread at a time."""
    for gpu in PRESETS.values():
        assert gpu.thread_registers(threads) == most


@pytest.mark.parametrize(
    ("name", "threads", "registers", "shared", "blocks"),
    [
        # What NVIDIA's occupancy calculator gives: by threads, blocks, registers, shared memory.
        ("a100", 1024, 32, 0, 2),
        ("l4", 1024, 32, 0, 1),
        ("l4", 512, 32, 0, 3),
        ("h100", 32, 16, 0, 32),
        ("l4", 32, 16, 0, 24),
        ("h100", 256, 64, 0, 4),
        ("h100", 256, 65, 0, 3),  # 65 and 72 registers are the same
        ("h100", 256, 72, 0, 3),
        ("h100", 256, 128, 0, 2),
        ("h100", 256, 168, 0, 1),
        ("h100", 96, 168, 0, 4),  # 12 warps of 5,376 registers, in blocks of three
        ("h100", 128, 255, 0, 2),
        ("h100", 1024, 64, 0, 1),
        ("h100", 1024, 65, 0, 0),
        ("h100", 64, 256, 0, 0),
        ("h100", 128, 32, 227 * KB, 1),
        ("h100", 128, 32, 113 * KB, 2),
        ("h100", 128, 32, 113 * KB + 1, 1),
        ("h100", 128, 32, 227 * KB + 1, 0),
        ("a100", 128, 32, 164 * KB, 0),
        ("a100", 128, 32, 81 * KB, 2),
        ("l4", 128, 32, 49 * KB, 2),
        ("l4", 128, 32, 100, 12),
        ("l4", 128, 32, 8000, 11),
        ("a100", 128, 0, 0, 16),
    ],
)
def test_blocks_resident(name: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert PRESETS[name].blocks_resident(threads, registers, shared) == blocks


def test_blocks_that_are_resident_fit() -> None:
    for gpu in PRESETS.values():
        for threads in range(32, 1025, 32):
            most = gpu.thread_registers(threads)
            assert gpu.blocks_resident(threads, most, gpu.shared_per_block) == 1
            assert gpu.blocks_resident(threads, most + 1, 0) == 0
            counts = [gpu.blocks_resident(threads, registers, 0) for registers in range(1, most + 1)]
            assert counts == sorted(counts, reverse=True)
            assert all(n * threads <= gpu.threads_per_processor for n in counts)
            assert all(n * threads * r <= gpu.registers_per_processor for r, n in enumerate(counts, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda gpu: gpu.thread_registers(0), "threads: expected 1 to 1024, got 0"),
        (lambda gpu: gpu.thread_registers(1025), "threads: expected 1 to 1024, got 1025"),
        (lambda gpu: gpu.blocks_resident(2048, 32, 0), "threads: expected 1 to 1024, got 2048"),
        (lambda gpu: gpu.blocks_resident(32, -1, 0), "registers: expected at least 0, got -1"),
        (lambda gpu: gpu.blocks_resident(32, 32, -1), "shared: expected at least 0, got -1"),
        (lambda _: device.host(0), "threads: expected at least 1, got 0"),
    ],
)
def test_misuse(call: Callable[[Device], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call(PRESETS["h100"])
    assert str(caught.value) == message


# ---- measured facts


def test_measured_facts_replace_the_others() -> None:
    before = PRESETS["h100"]
    facts = {"grid_barrier_us": 1.3, "bandwidth": 3000000, "cluster_processors": 128.0}
    after = device.with_measured(before, facts)
    assert (after.grid_barrier_us, after.bandwidth, after.cluster_processors) == (1.3, 3e6, 128)
    assert isinstance(after.cluster_processors, int) and after.name == "h100"
    changed = {name for name in before.origin if before.origin[name] != after.origin[name]}
    assert changed == {"grid_barrier_us", "bandwidth", "cluster_processors"}
    assert {after.origin[name] for name in changed} == {"measured"}
    assert before.origin["bandwidth"] == "preset" and before.bandwidth == 3.35e6
    assert device.with_measured(device.host(1), {"barrier_us": 0.5}).origin["barrier_us"] == "measured"


POSITIVE = "expected a positive number, got {value!r}"


@pytest.mark.parametrize(
    ("name", "value", "wrong"),
    [
        *(("grid_barrier_us", value, POSITIVE) for value in (0, -1.0, float("nan"), float("inf"), "1", True)),
        ("grid_barrier_us", 1e300, "expected 0.0012 to 1.2e+03, got 1e+300"),
        ("grid_barrier_us", 1e-320, "expected 0.0012 to 1.2e+03, got 1e-320"),
        ("bandwidth", 10**400, "expected 3.35e+03 to 3.35e+09, got 100000000000000000...0000000000000000000"),
        ("mma_cycles", 4e4, "expected 0.033 to 3.3e+04, got 40000.0"),  # the preset's is an integer
        ("max_cluster", 32, "expected a whole number up to 16, got 32"),
        ("cluster_processors", 0.5, "expected a whole number up to 132, got 0.5"),
        ("l2_bytes", 1.0, "is nothing that a probe measures"),
        ("name", 3.0, "is nothing that a probe measures"),
        ("colour", 4.0, "is nothing that a probe measures"),
    ],
)
def test_facts_that_nobody_measured_are_left_out(
    name: str, value: Any, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They come from a file: an operator's call warns, once, and goes on with the others."""
    monkeypatch.setattr(device, "_warned", set())
    facts = {name: value, "launch_us": 2.5}
    with pytest.warns(RuntimeWarning) as caught:
        after = device.with_measured(PRESETS["h100"], facts)
        assert device.with_measured(PRESETS["h100"], facts) == after
    assert after == device.replace(PRESETS["h100"], launch_us=2.5)
    (only,) = caught
    assert str(only.message) == f"h100: {name}: {wrong.format(value=value)}: this measured fact is not used"


def test_a_call_survives_any_facts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import seqops
    from seqops.core import choose

    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path))
    cpu = device.host()
    facts = {
        "l2_bytes": 0.4,
        "l1_bandwidth": 10**400,
        "barrier_us": 1e300,
        "memory_bandwidth": 1e-320,
        "vector_bytes": 12,
    }
    store.shared().put_probe(cpu.name, cpu.arch, facts, cpu.scope)
    choose.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seqops.lstm(torch.randn(2, 5, 4, 1, 24), torch.randn(4, 1, 24, 24))
    choose.forget()


# ---- a GPU that is there

ATTRIBUTES = {
    "h200": {16: 132, 38: 50 * MB, 39: 2048, 81: 228 * KB, 82: 65536, 97: 227 * KB, 106: 32, 111: 1024}
    | {13: 1980000, 36: 3201000, 37: 6144, 120: 1},
    "a10": {16: 72, 38: 6 * MB, 39: 1536, 81: 100 * KB, 82: 65536, 97: 99 * KB, 106: 16, 111: 1024}
    | {13: 1695000, 36: 6251000, 37: 384, 120: 0},
    "rtx5090": {16: 170, 38: 96 * MB, 39: 1536, 81: 100 * KB, 82: 65536, 97: 99 * KB, 106: 24, 111: 1024}
    | {13: 2407000, 36: 14001000, 37: 512, 120: 1},
}


class Driver:
    """Stands for CuPy's binding to the CUDA runtime and for what torch tells, of one GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, arch: int, attributes: dict[int, int]) -> None:
        self.asked: set[int] = set()

        def attribute(number: int, index: int) -> int:
            assert index == 0
            self.asked.add(number)
            return attributes.get(number, 0)

        runtime = types.ModuleType("cupy_backends.cuda.api.runtime")
        runtime.deviceGetAttribute = attribute  # type: ignore[attr-defined]
        api = types.ModuleType("cupy_backends.cuda.api")
        api.runtime = runtime  # type: ignore[attr-defined]
        for module in ("cupy_backends", "cupy_backends.cuda"):
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", api)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: divmod(arch, 10))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def test_a_gpu_that_has_a_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, "NVIDIA H200", 90, ATTRIBUTES["h200"])
    gpu, preset = device.real(0), PRESETS["h200"]
    assert (gpu.name, gpu.preset, gpu.arch, gpu.architecture) == ("NVIDIA H200", "h200", 90, "sm_90a")
    assert (gpu.clock_ghz, gpu.bandwidth) == (1.98, pytest.approx(4.917e6, rel=1e-3))
    same = {"clock_ghz": preset.clock_ghz, "bandwidth": preset.bandwidth, "name": "h200"}
    assert dataclasses.replace(gpu, **same) == preset
    assert gpu.origin["processors"] == gpu.origin["bandwidth"] == "device"
    assert gpu.origin["grid_barrier_us"] == "estimate" and gpu.origin["dsmem_cycles"] == "preset"
    assert {*gpu.origin} == {*numbers(gpu)}


def test_gpus_that_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch, "NVIDIA A10", 86, ATTRIBUTES["a10"])
    gpu = device.real(0)
    assert (gpu.preset, gpu.arch, gpu.architecture) == ("l4", 86, "sm_86")
    assert (gpu.processors, gpu.blocks_per_processor, gpu.max_cluster) == (72, 16, 1)
    assert gpu.cluster_processors == 72 and gpu.bandwidth == pytest.approx(6e5, rel=1e-2)
    # no data sheet of an A10 was read
    assert gpu.origin["fma_bf16"] == gpu.origin["sync_cycles"] == "estimate" and gpu.origin["l2_bytes"] == "device"

    Driver(monkeypatch, "NVIDIA GeForce RTX 5090", 120, ATTRIBUTES["rtx5090"])
    gpu = device.real(0)
    assert (gpu.preset, gpu.architecture, gpu.blocks_per_processor) == ("rtx4090", "sm_120", 24)
    assert gpu.max_cluster == 8 and gpu.cluster_processors == 144
    assert gpu.origin["cluster_processors"] == "estimate"


@pytest.mark.parametrize(
    ("name", "arch", "processors", "preset"),
    [
        ("NVIDIA A100-SXM4-80GB", 80, 108, "a100"),
        ("NVIDIA A100 80GB PCIe MIG 1g.10gb", 80, 14, "a100"),
        ("NVIDIA H100 PCIe", 90, 114, "h100"),
        ("NVIDIA GH200 480GB", 90, 132, "h100"),
        ("NVIDIA B300", 103, 148, "b200"),
        ("NVIDIA L40S", 89, 142, "l4"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 89, 76, "rtx4090"),
        ("NVIDIA GeForce RTX 3060", 86, 28, "rtx4090"),
        ("NVIDIA RTX PRO 6000 Blackwell", 120, 188, "l4"),
        ("Tesla T4", 75, 40, "a100"),
        ("Orin", 87, 16, "l4"),
        ("Some GPU of the future", 150, 300, "b200"),
        ("", 30, 1, "a100"),
    ],
)
def test_nearest_preset(monkeypatch: pytest.MonkeyPatch, name: str, arch: int, processors: int, preset: str) -> None:
    """Whatever it is called, every field has a value."""
    Driver(monkeypatch, name, arch, {16: processors})
    gpu = device.real(0)
    assert (gpu.preset, gpu.processors, gpu.arch) == (preset, processors, arch)
    assert all(value > 0 for value in numbers(gpu).values()) and {*gpu.origin} == {*numbers(gpu)}
    assert gpu.blocks_resident(128, 64, 1000) >= 1


def test_a_driver_that_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some virtual GPUs tell 0 for their clocks."""
    driver = Driver(monkeypatch, "NVIDIA H100", 90, {120: 1})
    gpu = device.real(0)
    assert dataclasses.replace(gpu, name="h100") == PRESETS["h100"]
    assert driver.asked == {13, 16, 36, 37, 38, 39, 81, 82, 97, 106, 111, 120}


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels are tuned too; torch tells what it has, which is less with every CUDA."""
    Driver(monkeypatch, "NVIDIA H200", 90, {})
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.api", None)
    told = types.SimpleNamespace(major=9, multi_processor_count=78, shared_memory_per_block_optin=227 * KB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: told)
    gpu = device.real(0)
    assert (gpu.processors, gpu.origin["processors"], gpu.origin["l2_bytes"]) == (78, "device", "preset")
    assert (gpu.max_cluster, gpu.cluster_processors) == (16, 64)


@pytest.mark.gpu
def test_the_gpu_of_this_machine() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    gpu, told = device.real(0), torch.cuda.get_device_properties(0)
    assert (gpu.name, gpu.processors) == (told.name, told.multi_processor_count)
    assert gpu.arch == 10 * told.major + told.minor and gpu.l2_bytes == told.L2_cache_size
    assert gpu.shared_per_processor == told.shared_memory_per_multiprocessor
    if gpu.preset in gpu.name.lower():
        assert gpu.shared_per_block == PRESETS[gpu.preset].shared_per_block


# ---- the CPU


def test_host() -> None:
    machine = device.host(3)
    assert (machine.name, machine.threads, machine.isa) == (info.cpu_model(), 3, torch.ops.seqops.cpu_isa())
    assert machine.scope == f"{machine.isa}/3" and machine.vector_bytes in (16, 32, 64)
    facts = numbers(machine)
    assert all(value > 0 and math.isfinite(value) for value in facts.values()) and {*machine.origin} == {*facts}
    assert 8 * KB <= machine.l1_bytes <= machine.l2_bytes <= machine.l3_bytes
    assert machine.l1_bandwidth > machine.l2_bandwidth > machine.l3_bandwidth > machine.memory_bandwidth
    assert device.host(3) is machine and device.host(2) != machine
    assert device.host() == device.host(torch.get_num_threads())


def test_caches(tmp_path: Path) -> None:
    rows = [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2M"), ("3", "Unified", "1G")]
    rows += [("4", "Unified", "2G"), ("2", "Unified", "")]
    for i, row in enumerate(rows):
        folder = tmp_path / f"index{i}"
        folder.mkdir()
        for name, value in zip(("level", "type", "size"), row, strict=True):
            (folder / name).write_text(f"{value}\n")
    (tmp_path / "index9").mkdir()
    assert device._caches(tmp_path) == {"l1_bytes": 48 * KB, "l2_bytes": 2 * MB, "l3_bytes": 1024 * MB}
    found = device._caches(tmp_path / "none")  # sysconf knows, or nobody
    assert {*found} <= {"l1_bytes", "l2_bytes"} and all(size > 0 for size in found.values())


def test_clock_does_not_depend_on_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert device._clock_ghz("Intel(R) Xeon(R) CPU @ 2.20GHz") == 2.2
    assert device._clock_ghz("AMD EPYC") == 3.0
    monkeypatch.setattr(Path, "read_text", lambda *_: "3700000\n")
    assert device._clock_ghz("AMD EPYC") == 3.7


# ---- what a call of an operator asks


def test_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The device of a tensor, with what was measured on it."""
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path))
    Driver(monkeypatch, "NVIDIA H200", 90, ATTRIBUTES["h200"])
    gpu, cpu = device.of(torch.device("cuda")), device.of(torch.device("cpu"))
    assert gpu == device.real(0) == device.of(torch.device("cuda:0")) and cpu == device.host()
    assert device.present() == [gpu, cpu]

    store.shared().put_probe(gpu.name, gpu.arch, {"grid_barrier_us": 1.5})
    store.shared().put_probe(cpu.name, cpu.arch, {"barrier_us": 0.75}, cpu.scope)
    assert device.of(torch.device("cuda")).grid_barrier_us == 1.5  # type: ignore[union-attr]
    assert device.of(torch.device("cpu")).barrier_us == 0.75  # type: ignore[union-attr]
    assert device.find("h200").grid_barrier_us == 1.2

    # with other instructions or threads it is another machine, in the same file
    others = [device.replace(cpu, isa="baseline"), device.replace(cpu, threads=cpu.threads + 1)]
    for other in (each for each in others if each != cpu):
        monkeypatch.setattr(device, "host", lambda other=other: other)
        assert device.of(torch.device("cpu")) == other
        store.shared().put_probe(other.name, other.arch, {"barrier_us": 0.5}, other.scope)
        assert device.of(torch.device("cpu")).barrier_us == 0.5  # type: ignore[union-attr]
    monkeypatch.setattr(device, "host", lambda: cpu)
    assert device.of(torch.device("cpu")).barrier_us == 0.75  # type: ignore[union-attr]
    assert json.loads(store.shared().path(cpu.name).read_text())["arch"] == "cpu"

    with pytest.raises(ValueError, match=r"^device: expected cpu or cuda, got meta$"):
        device.of(torch.device("meta"))
