"""What the cost models know of the machine: `Device`, a GPU, and `Host`, the CPU with its threads.

A GPU is a preset by name, or the one that is there: then what the driver tells replaces the preset's facts, and
everything else, all latencies first of all, comes from the preset nearest to it until `seqops tune --probe` measures
it. So every field of every device has a value, and `origin` says of each where it is from:

    preset     a data sheet, the tables of the CUDA programming guide, or a published measurement of that very GPU
    estimate   carried over from another GPU, or computed from what is known
    device     read from the driver, or for the CPU from the system
    measured   by `seqops.tune.probe` on this machine

Units: bytes, microseconds, cycles, bytes per microsecond (10^6 of them are a terabyte per second).
"""

from __future__ import annotations

import difflib
import math
import os
import re
import reprlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import torch

KB = 1024
MB = 1024 * 1024
TB_PER_SECOND = 1e6  # in bytes per microsecond

WARP = 32
PARTITIONS = 4  # of a multiprocessor, each with its quarter of the registers
REGISTERS_PER_THREAD = 255
THREADS_PER_BLOCK = 1024

# Units in which registers go to a warp and shared memory to a block (cuda_occupancy.h, compute capability 7 to 12).
_REGISTER_UNIT, _SHARED_UNIT = 256, 128


@dataclass(frozen=True)
class Device:
    """A GPU."""

    name: str
    preset: str | None  # the one that it starts from
    arch: int  # 10 major + minor
    processors: int
    clock_ghz: float
    shared_per_processor: int
    shared_per_block: int  # the most a block can opt in to
    threads_per_processor: int
    blocks_per_processor: int
    max_cluster: int  # blocks, with the opt-in above 8; 1: no clusters
    cluster_processors: int  # that blocks in clusters of max_cluster can occupy at once
    l2_bytes: int
    bandwidth: float  # of device memory
    fma_bf16: int  # multiply-adds a clock and processor on tensor cores, summed in float32
    fma_f32: int  # multiply-adds a clock and processor without them
    mma_issue_cycles: float  # of one mma.m16n8k16, on the tensor core of one partition
    mma_cycles: float = 33  # from an mma.m16n8k16 to one that needs its result
    sync_cycles: float = 37  # __syncthreads of 8 warps
    dsmem_cycles: float = 200  # from a store to the shared memory of a neighbour until it sees it
    dsmem_bytes_per_clock: float = 16  # of such stores, by one processor
    l2_hop_us: float = 0.16  # from a flag's release in one block until another has acquired it
    l2_hit_us: float = 0.2  # a load that hits the second cache
    grid_barrier_us: float = 1.2
    launch_us: float = 2.1  # from one kernel of a stream to the next
    graph_launch_us: float = 1.3  # the same in a graph
    memory_latency_us: float = 0.7  # a load that misses all caches
    registers_per_processor: int = 65536
    reserved_per_block: int = KB  # of shared memory, by the driver
    origin: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    scope = ""  # of what is measured: all of the GPU

    @property
    def architecture(self) -> str:
        """What the compiler calls it: Hopper's own instructions need the `a`."""
        return "sm_90a" if self.arch == 90 else f"sm_{self.arch}"

    def thread_registers(self, threads: int) -> int:
        """Registers that a thread of a block of so many can have at most, for one block to be resident."""
        _require("threads", threads, 1, THREADS_PER_BLOCK)
        groups = math.ceil(threads / (PARTITIONS * WARP))
        return min(self.registers_per_processor // (PARTITIONS * WARP * groups) // 8 * 8, REGISTERS_PER_THREAD)

    def blocks_resident(self, threads: int, registers: int, shared: int) -> int:
        """Blocks that a processor holds at once, 0 if not even one.

        Args:
            threads: of a block.
            registers: of a thread.
            shared: bytes of a block, static and dynamic.
        """
        _require("threads", threads, 1, THREADS_PER_BLOCK)
        _require("registers", registers, 0, None)
        _require("shared", shared, 0, None)
        if registers > self.thread_registers(threads) or shared > self.shared_per_block:
            return 0
        warps = math.ceil(threads / WARP)
        limits = [self.blocks_per_processor, self.threads_per_processor // (warps * WARP)]
        limits.append(self.shared_per_processor // (_up(shared, _SHARED_UNIT) + self.reserved_per_block))
        if registers:
            each = self.registers_per_processor // PARTITIONS // _up(registers * WARP, _REGISTER_UNIT)
            limits.append(each * PARTITIONS // warps)
        return min(limits)


@dataclass(frozen=True)
class Host:
    """The CPU, as the threads of one operator call see it. Bandwidths are those of one core while all threads run."""

    name: str
    threads: int
    isa: str  # instruction set of the kernels: baseline, avx2, avx512, avx512_bf16
    vector_bytes: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int  # shared by all cores
    clock_ghz: float
    fma_per_cycle: float  # float32 multiply-adds of one core
    l1_bandwidth: float
    l2_bandwidth: float
    l3_bandwidth: float
    memory_bandwidth: float
    barrier_us: float  # the threads meeting once
    fork_us: float  # starting them, once a call
    origin: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    arch = "cpu"  # in the store, whose file is that of all instruction sets

    @property
    def scope(self) -> str:
        """Of what is measured: with other instructions or another number of threads everything is different."""
        return f"{self.isa}/{self.threads}"


Machine = TypeVar("Machine", Device, Host)

FAR = 1000  # times what is known of a machine, or a part of it: nothing that was measured
_warned: set[tuple[str, str]] = set()  # machine and fact


def with_measured(machine: Machine, facts: Mapping[str, float]) -> Machine:
    """The machine with measured facts, by field.

    Facts come from files that anybody may have written. One that is no fact of `measurable`, or that is far from what
    is known of the machine, is left out, with a warning.
    """
    taken: dict[str, float] = {}
    for name, value in facts.items():
        wrong = _wrong_fact(machine, name, value)
        if wrong is None:
            taken[name] = int(value) if name in _COUNTS else float(value)
        elif (machine.name, name) not in _warned:
            _warned.add((machine.name, name))
            warnings.warn(
                f"{machine.name}: {name}: {wrong}: this measured fact is not used", RuntimeWarning, stacklevel=2
            )
    return replace(machine, **taken, origin={**machine.origin, **dict.fromkeys(taken, "measured")})


def measurable(machine: Device | Host) -> tuple[str, ...]:
    """The fields that a probe can measure."""
    return MEASURED_OF_GPUS if isinstance(machine, Device) else MEASURED_OF_CPUS


def _wrong_fact(machine: Device | Host, name: str, value: object) -> str | None:
    if name not in measurable(machine):
        return "is nothing that a probe measures"
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        return f"expected a positive number, got {reprlib.repr(value)}"
    if name in _COUNTS:
        most = machine.max_cluster if name == "max_cluster" else machine.processors
        right = value <= most and value == int(value)
        return None if right else f"expected a whole number up to {most}, got {reprlib.repr(value)}"
    known = getattr(machine, name)
    right = known / FAR <= value <= known * FAR
    return None if right else f"expected {known / FAR:.3g} to {known * FAR:.3g}, got {reprlib.repr(value)}"


def _require(name: str, value: int, least: int, most: int | None) -> None:
    if value < least or (most is not None and value > most):
        wanted = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected {wanted}, got {value}")


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# ---- presets
#
# Limits of an architecture: "Technical Specifications per Compute Capability" of the CUDA programming guide, and the
# same in CCCL's arch_traits.h. Processors, clock, caches and memory: NVIDIA's data sheets; at the clock,
# processors x fma_bf16 give the sheet's dense bf16 rate. The L2 of the B200 is what its driver reports, since the sheet
# has none. A cluster of 16 lies in one GPC, and an H100 has 7 GPCs or 8 with 16 processors to spare.

_AMPERE = {"arch": 80, "shared_per_processor": 164 * KB, "shared_per_block": 163 * KB, "threads_per_processor": 2048}
_AMPERE |= {"blocks_per_processor": 32, "max_cluster": 1, "fma_f32": 64}
_ADA = {"arch": 89, "shared_per_processor": 100 * KB, "shared_per_block": 99 * KB, "threads_per_processor": 1536}
_ADA |= {"blocks_per_processor": 24, "max_cluster": 1, "fma_f32": 128}
_HOPPER = {"arch": 90, "shared_per_processor": 228 * KB, "shared_per_block": 227 * KB, "threads_per_processor": 2048}
_HOPPER |= {"blocks_per_processor": 32, "max_cluster": 16, "fma_f32": 128}
_BLACKWELL = {**_HOPPER, "arch": 100}

# Estimates, but for those that were published for the architecture: the microbenchmarks of the A100 and of Hopper.
LATENCIES = (
    *("sync_cycles", "mma_cycles", "mma_issue_cycles", "dsmem_cycles", "dsmem_bytes_per_clock", "l2_hop_us"),
    *("l2_hit_us", "grid_barrier_us", "launch_us", "graph_launch_us", "memory_latency_us"),
)
_COUNTS = ("max_cluster", "cluster_processors")
MEASURED_OF_GPUS = (*LATENCIES, "bandwidth", "clock_ghz", *_COUNTS)
MEASURED_OF_CPUS = (
    *("l1_bandwidth", "l2_bandwidth", "l3_bandwidth", "memory_bandwidth", "fma_per_cycle", "barrier_us", "fork_us"),
)
_PUBLISHED = {
    80: ("sync_cycles", "mma_cycles", "mma_issue_cycles", "grid_barrier_us"),
    90: ("dsmem_cycles", "dsmem_bytes_per_clock", "l2_hop_us", "l2_hit_us"),
}


# name, limits, processors, GHz, L2 in MB, TB/s, bf16 multiply-adds, cycles of an mma.m16n8k16, processors for clusters.
# That mma is 2048 multiply-adds on a quarter of a processor. Hopper's mma.sync reaches 0.63 of what its wgmma does; for
# Blackwell there is no figure, and it is taken to be no slower than Hopper.
_TABLE = (
    ("a100", _AMPERE, 108, 1.41, 40, 2.04, 1024, 8.0, 108),
    ("h100", _HOPPER, 132, 1.83, 50, 3.35, 2048, 6.4, 112),
    ("h200", _HOPPER, 132, 1.83, 50, 4.8, 2048, 6.4, 112),
    ("b200", _BLACKWELL, 148, 1.86, 126, 8.0, 4096, 6.4, 112),
    ("l4", _ADA, 58, 2.04, 48, 0.30, 512, 16.0, 58),
    ("rtx4090", _ADA, 128, 2.52, 72, 1.01, 256, 32.0, 128),
)


def _numbers(kind: type) -> list[str]:
    return [each.name for each in fields(kind) if each.type in ("int", "float")]


def _presets() -> Iterator[Device]:
    for name, limits, processors, clock, l2, terabytes, bf16, issue, clustered in _TABLE:
        origin = dict.fromkeys(_numbers(Device), "preset") | dict.fromkeys(LATENCIES, "estimate")
        origin |= dict.fromkeys(_PUBLISHED.get(limits["arch"], ()), "preset")
        if limits["arch"] > 90:
            origin["cluster_processors"] = "estimate"
        yield Device(
            name=name,
            preset=name,
            processors=processors,
            clock_ghz=clock,
            l2_bytes=l2 * MB,
            bandwidth=terabytes * TB_PER_SECOND,
            fma_bf16=bf16,
            mma_issue_cycles=issue,
            cluster_processors=clustered,
            origin=origin,
            **limits,
        )


PRESETS: dict[str, Device] = {each.name: each for each in _presets()}


def find(name: str) -> Device:
    """The preset of this name, however it is spelled: h100, H100, RTX 4090.

    Raises:
        ValueError: if there is none, with the nearest names.
    """
    wanted = _squeezed(name)
    if wanted in PRESETS:
        return PRESETS[wanted]
    near = difflib.get_close_matches(wanted, PRESETS, n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(f"device: expected one of {', '.join(PRESETS)}, got {name!r}{hint}")


def _squeezed(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name.lower())


# ---- the GPU that is there

# Numbers of cudaDeviceAttr. The properties struct lost several of these facts in CUDA 13; the attributes did not.
_ATTRIBUTES = {
    "processors": 16,
    "l2_bytes": 38,
    "threads_per_processor": 39,
    "shared_per_processor": 81,
    "registers_per_processor": 82,
    "shared_per_block": 97,
    "blocks_per_processor": 106,
    "reserved_per_block": 111,
}
_CLOCK_KHZ, _MEMORY_CLOCK_KHZ, _MEMORY_BUS_BITS, _CLUSTER_LAUNCH = 13, 36, 37, 120

# The architecture of a preset that is closest to one that has none.
_KIN = {75: 80, 86: 89, 87: 89, 88: 89, 103: 100, 110: 100, 120: 89, 121: 89}


def real(index: int = 0) -> Device:
    """CUDA device `index`, as its driver describes it; what the driver does not tell comes from the nearest preset."""
    import torch

    major, minor = torch.cuda.get_device_capability(index)
    return _read(torch.cuda.get_device_name(index), 10 * major + minor, _attributes(index))


def _attributes(index: int) -> Callable[[int], int]:
    """Attributes by number, through CuPy's binding; without CuPy those that torch tells too, and 0 for the others."""
    try:
        from cupy_backends.cuda.api import runtime
    except ImportError:
        import torch

        told = torch.cuda.get_device_properties(index)
        names = {
            _ATTRIBUTES["processors"]: "multi_processor_count",
            _ATTRIBUTES["l2_bytes"]: "L2_cache_size",
            _ATTRIBUTES["threads_per_processor"]: "max_threads_per_multi_processor",
            _ATTRIBUTES["shared_per_processor"]: "shared_memory_per_multiprocessor",
            _ATTRIBUTES["registers_per_processor"]: "regs_per_multiprocessor",
            _ATTRIBUTES["shared_per_block"]: "shared_memory_per_block_optin",
            _CLOCK_KHZ: "clock_rate",
            _MEMORY_CLOCK_KHZ: "memory_clock_rate",
            _MEMORY_BUS_BITS: "memory_bus_width",
        }
        known = {number: getattr(told, name, 0) for number, name in names.items()}
        known[_CLUSTER_LAUNCH] = int(told.major >= 9)
        return lambda number: known.get(number, 0)
    return lambda number: int(runtime.deviceGetAttribute(number, index))


def _read(name: str, arch: int, attribute: Callable[[int], int]) -> Device:
    facts: dict[str, float] = {each: attribute(number) for each, number in _ATTRIBUTES.items()}
    facts["clock_ghz"] = attribute(_CLOCK_KHZ) / 1e6
    # a transfer on either edge of the memory's clock
    facts["bandwidth"] = 2 * attribute(_MEMORY_CLOCK_KHZ) * attribute(_MEMORY_BUS_BITS) / 8 / 1e3
    facts = {each: value for each, value in facts.items() if value > 0}  # some virtual GPUs tell 0
    base, own = _nearest(name, arch, int(facts.get("processors", 0)))

    facts["arch"] = arch
    origin = dict(base.origin) if own else dict.fromkeys(base.origin, "estimate")
    origin |= dict.fromkeys([*facts, "max_cluster"], "device")
    if not attribute(_CLUSTER_LAUNCH):
        facts |= {"max_cluster": 1, "cluster_processors": facts.get("processors", base.processors)}
    else:
        # 16 on Hopper's and Blackwell's data centre GPUs; 8 is what every GPU with clusters has
        facts["max_cluster"] = 16 if arch in (90, 100, 103) else 8
        share = base.cluster_processors / base.processors if base.max_cluster > 1 else 0.85
        usable = int(share * facts.get("processors", base.processors)) // facts["max_cluster"] * facts["max_cluster"]
        facts["cluster_processors"] = max(usable, facts["max_cluster"])
        origin["cluster_processors"] = "estimate"
    return replace(base, name=name, origin=origin, **facts)  # type: ignore[arg-type]  # fields by name


def _nearest(name: str, arch: int, processors: int) -> tuple[Device, bool]:
    """The preset of the GPU's own name, and True; else one of the nearest architecture, for the same market, of the
    nearest size, and False."""
    words = re.sub(r"[^a-z0-9]+", " ", name.lower()).replace("rtx ", "rtx").split()
    for preset in PRESETS.values():
        if preset.name in words:
            return preset, True
    kin = _KIN.get(arch, arch)
    gap = min(abs(each.arch - kin) for each in PRESETS.values())
    near = [each for each in PRESETS.values() if abs(each.arch - kin) == gap]
    games = "geforce" in words
    return min(near, key=lambda each: (("rtx" in each.name) != games, abs(each.processors - processors))), False


# ---- the CPU

_VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64, "avx512_bf16": 64}

# Per cycle of one core: a vector from the first cache and two from the second take as long as one 512-bit or two
# 256-bit multiply-adds, one from the third three times that. Round figures for servers of the last ten years.
_L1_BYTES_PER_CYCLE, _L2_BYTES_PER_CYCLE, _L3_BYTES_PER_CYCLE, _MEMORY_BYTES_PER_CYCLE = 64, 32, 64 / 6, 4
_BARRIER_CYCLES, _FORK_CYCLES = 700, 10_000


def host(threads: int | None = None) -> Host:
    """The CPU of this machine with so many threads (default: torch's number)."""
    if threads is None:
        import torch

        threads = torch.get_num_threads()
    _require("threads", threads, 1, None)
    return _host(threads)


@cache
def _host(threads: int) -> Host:
    import torch

    from ..core import info

    isa = torch.ops.seqops.cpu_isa()
    caches = _caches()
    clock = _clock_ghz(info.cpu_model())
    per_us = 1e3 * clock  # cycles in a microsecond
    facts = {"l1_bytes": 32 * KB, "l2_bytes": 512 * KB, "l3_bytes": 32 * MB} | caches
    made = Host(
        name=info.cpu_model(),
        threads=threads,
        isa=isa,
        vector_bytes=_VECTOR_BYTES[isa],
        clock_ghz=clock,
        fma_per_cycle=8 if isa == "baseline" else 16,
        l1_bandwidth=_L1_BYTES_PER_CYCLE * per_us,
        l2_bandwidth=_L2_BYTES_PER_CYCLE * per_us,
        l3_bandwidth=_L3_BYTES_PER_CYCLE * per_us,
        memory_bandwidth=_MEMORY_BYTES_PER_CYCLE * per_us,
        barrier_us=_BARRIER_CYCLES / per_us,
        fork_us=_FORK_CYCLES / per_us,
        **facts,
    )
    read = {"threads", "vector_bytes", *caches}
    return replace(made, origin={each: "device" if each in read else "estimate" for each in _numbers(Host)})


def _caches(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> dict[str, int]:
    """Bytes of the data caches by field. sysconf knows the first two; virtual machines get its third wrong."""
    found: dict[str, int] = {}
    for entry in sorted(folder.glob("index*")):
        try:
            level, kind, size = ((entry / each).read_text().strip() for each in ("level", "type", "size"))
        except OSError:
            continue
        sized = re.fullmatch(r"(\d+)([KMG]?)", size)
        if kind != "Instruction" and level in "123" and sized:
            found[f"l{level}_bytes"] = int(sized[1]) * KB ** " KMG".index(sized[2] or " ")
    for name, number in (("l1_bytes", "SC_LEVEL1_DCACHE_SIZE"), ("l2_bytes", "SC_LEVEL2_CACHE_SIZE")):
        if name not in found and number in os.sysconf_names and os.sysconf(number) > 0:
            found[name] = os.sysconf(number)
    return {name: size for name, size in found.items() if size > 0}


def _clock_ghz(model: str) -> float:
    """The highest clock, or the one that the name tells, else 3: never the present one, since choices depend on it."""
    try:
        return int(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) / 1e6
    except (OSError, ValueError):
        named = re.search(r"@ *([\d.]+) *GHz", model)
        return float(named[1]) if named else 3.0


# ---- all of them


def present() -> list[Device | Host]:
    """The GPUs that torch sees, and the CPU."""
    import torch

    return [*(real(index) for index in range(torch.cuda.device_count())), host()]


def of(device: torch.device) -> Device | Host:
    """What a kernel runs on, with what was measured on it and stored.

    Raises:
        ValueError: if the device is neither a CPU nor a CUDA GPU.
    """
    from . import store

    if device.type == "cpu":
        machine = host()
        return with_measured(machine, store.shared().probe(machine.name, machine.scope))
    if device.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {device}")
    import torch

    gpu = real(torch.cuda.current_device() if device.index is None else device.index)
    return with_measured(gpu, store.shared().probe(gpu.name))
