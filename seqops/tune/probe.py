"""Measuring what the hardware model takes from presets: `seqops tune --probe`. A GPU or the CPU, in about a second.

    facts = probe.measure(torch.device("cuda"))     # {"grid_barrier_us": 1.31, "mma_cycles": 33.1, ...}
    store.shared().put_probe(gpu.name, gpu.arch, facts, gpu.scope)

The names are fields of `device.Device` and `device.Host`. Everything is run several times, and the median taken. The
kernels (csrc/common/probe.cu) leave results as well, which are checked: a time counts only for work that was done.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import info, launch
from . import device

SOURCE = "common/probe.cu"
_NOTHING = launch.Kernel(SOURCE, "probe_nothing", "q")
_DELAY = launch.Kernel(SOURCE, "probe_delay", "q")
_SYNC = launch.Kernel(SOURCE, "probe_sync", "Pq")
_MMA_LATENCY = launch.Kernel(SOURCE, "probe_mma_latency", "PPq")
_MMA_ISSUE = launch.Kernel(SOURCE, "probe_mma_issue", "PPq")
_FLAGS = launch.Kernel(SOURCE, "probe_flags", "Pqq")
_CHASE = launch.Kernel(SOURCE, "probe_chase", "PPq")
_GRID = launch.Kernel(SOURCE, "probe_grid", "Pq")
_HAND_OVER = launch.Kernel(SOURCE, "probe_hand_over", "PPq")
_STORES = launch.Kernel(SOURCE, "probe_stores", "PPq")
_CLUSTERS = launch.Kernel(SOURCE, "probe_clusters", "Pq")

_UNROLL = 16  # instructions of a round, in the kernels that have several
_LINE = 128  # bytes
_PARTNERS = 7  # blocks that the first one exchanges flags with: near ones and far ones
_CLUSTER = 8  # blocks that exchange numbers; every GPU with clusters has so many


class Effort(NamedTuple):
    """How much of everything. Fewer for the simulator, where a count of calls takes the place of time."""

    repeats: int
    rounds: int
    launches: int
    delay_cycles: int  # in which the host queues what is timed
    stay_cycles: int
    near_bytes: int  # more than the first cache, less than the second
    large_bytes: int  # at least


GPU = Effort(5, 1000, 200, 400_000, 200_000, 2 << 20, 256 << 20)
SIMULATOR = Effort(1, 4, 3, 1, 40, 4 << 10, 64 << 10)


def measure(on: torch.device) -> dict[str, float]:
    """Facts of a device, by field of its model.

    Raises:
        ValueError: if the device is neither a CPU nor a CUDA GPU.
        RuntimeError: if CUDA kernels cannot be launched, or one does not do what it is timed for.
    """
    if on.type == "cpu":
        return measure_host()
    if on.type != "cuda":
        raise ValueError(f"device: expected cpu or cuda, got {on}")
    reason = launch.reason_missing()
    if reason is not None:
        raise RuntimeError(f"the GPU cannot be measured: {reason}")
    with torch.cuda.device(on):
        on = torch.device("cuda", torch.cuda.current_device())
        return measure_gpu(device.real(on.index), on, GPU)


# ---- a GPU


def measure_gpu(gpu: device.Device, on: torch.device, effort: Effort) -> dict[str, float]:
    """The same with CPU tensors runs in the simulator, which shows that the kernels do what they are timed for."""
    probe = _Probe(gpu, on, effort)
    facts = {"bandwidth": probe.bandwidth(), **probe.loads()}  # first, since they wake the clocks
    facts |= {"sync_cycles": probe.sync_cycles(), **probe.mma()}
    facts |= {"l2_hop_us": probe.l2_hop_us(), "grid_barrier_us": probe.grid_barrier_us()}
    facts |= {"launch_us": probe.launch_us()}
    if gpu.max_cluster > 1:
        facts |= probe.clusters()
    if probe.is_timed:  # the simulator has neither
        facts |= {"graph_launch_us": probe.graph_launch_us(), "clock_ghz": probe.clock_ghz()}
    wrong = {name: value for name, value in facts.items() if not 0 < value < math.inf}
    if wrong:
        raise RuntimeError(f"{gpu.name}: the GPU cannot be measured: {wrong}")
    return {name: float(value) for name, value in facts.items()}


class _Probe:
    def __init__(self, gpu: device.Device, on: torch.device, effort: Effort) -> None:
        self.gpu, self.on, self.effort = gpu, on, effort
        self.like = torch.empty(0, device=on)
        self.is_timed = on.type == "cuda"
        # of clusters where there are some, so that the source is compiled once
        self.constants = {"CLUSTER": _CLUSTER} if gpu.max_cluster > 1 else {}

    # ---- time

    def microseconds(self, call: Callable[[], None]) -> float:
        """Median time of a call on the device, after one that is not counted."""
        call()
        return statistics.median(self._once(call) for _ in range(self.effort.repeats))

    def _once(self, call: Callable[[], object], delay: int | None = None) -> float:
        """Time of a call that is queued behind a kernel which runs for long enough: the host's part does not count."""
        _DELAY(self.constants, 1, 32, (delay or self.effort.delay_cycles,), like=self.like)
        if not self.is_timed:
            begin = time.perf_counter()
            call()
            return max(1e6 * (time.perf_counter() - begin), 1e-3)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end)

    def cycles(self, call: Callable[[Tensor], None], counters: int = 1) -> float:
        """Median over the repeats of the most that a kernel wrote to its counters."""
        written = torch.zeros(counters, dtype=torch.int64, device=self.on)
        call(written)
        found = []
        for _ in range(self.effort.repeats):
            call(written)
            found.append(int(written.max()))
        return statistics.median(found)

    # ---- one thing each

    def clock_ghz(self) -> float:
        """Cycles over time, of two launches that differ in length, so that launching cancels out."""

        def run(rounds: int) -> tuple[float, float]:
            written = torch.zeros(1, dtype=torch.int64, device=self.on)
            spent = self.microseconds(lambda: _SYNC(self.constants, 1, 256, (written, rounds), like=self.like))
            return float(written.item()), spent

        rounds = 2 * self.effort.rounds
        (few, short), (many, long) = run(rounds), run(6 * rounds)
        return (many - few) / (long - short) / 1e3 if long > short else 0.0

    def sync_cycles(self) -> float:
        rounds = self.effort.rounds
        spent = self.cycles(lambda p: _SYNC(self.constants, 1, 256, (p, rounds), like=self.like))
        return spent / (_UNROLL * rounds)

    def mma(self) -> dict[str, float]:
        rounds = self.effort.rounds

        def run(kernel: launch.Kernel, threads: int) -> float:
            sums = torch.full((threads,), torch.nan, device=self.on)
            arguments = (sums, rounds)
            spent = self.cycles(
                lambda p: kernel(self.constants, 1, threads, (p, *arguments), like=self.like), threads // 32
            )
            self.check(kernel, sums, 16 * _UNROLL * rounds)
            return spent / (_UNROLL * rounds)

        # four sums in each of two warps of a tensor core
        return {"mma_cycles": run(_MMA_LATENCY, 32), "mma_issue_cycles": run(_MMA_ISSUE, 256) / 8}

    def l2_hop_us(self) -> float:
        """Mean over several pairs of blocks: how far they are apart matters."""
        rounds = self.effort.rounds
        blocks = min(self.gpu.processors, _FLAGS.resident_blocks(self.constants, 32, self.like))
        flags = torch.zeros(65, dtype=torch.int32, device=self.on)

        def run(partner: int) -> float:
            def call() -> None:
                flags.zero_()
                _FLAGS(self.constants, blocks, 32, (flags, partner, rounds), like=self.like, cooperative=True)

            spent = self.microseconds(call)
            self.check(_FLAGS, flags[[0, 64]], rounds)
            return spent / (2 * rounds)

        partners = sorted({max(1, i * (blocks - 1) // _PARTNERS) for i in range(1, _PARTNERS + 1)})
        return statistics.mean(map(run, partners))

    def grid_barrier_us(self) -> float:
        rounds = self.effort.rounds
        blocks = min(self.gpu.processors, _GRID.resident_blocks(self.constants, 256, self.like))
        arrived = torch.zeros(1, dtype=torch.int32, device=self.on)

        def call() -> None:
            arrived.zero_()
            _GRID(self.constants, blocks, 256, (arrived, rounds), like=self.like, cooperative=True)

        spent = self.microseconds(call)
        self.check(_GRID, arrived, blocks * rounds)
        return spent / rounds

    def loads(self) -> dict[str, float]:
        """A chain that the second cache holds, and one that is four times as long, after it has been filled again."""
        near = self._load_us(self.effort.near_bytes, flush=False)
        return {"l2_hit_us": near, "memory_latency_us": self._load_us(self._large(), flush=True)}

    def _load_us(self, size: int, flush: bool) -> float:
        lines, words = size // _LINE, _LINE // 4
        order = torch.randperm(lines, device=self.on)
        chain = torch.zeros(lines, words, dtype=torch.int32, device=self.on)
        chain[order, 0] = order.roll(-1).to(torch.int32) * words
        place = (order[:1] * words).to(torch.int32)
        if flush:
            torch.zeros(size, dtype=torch.uint8, device=self.on)
        # Each call goes on where the last one ended: where the chain is longer than all of them, no line is met twice.
        steps = 4 * self.effort.rounds
        spent = self.microseconds(lambda: _CHASE(self.constants, 1, 32, (chain, place, steps), like=self.like))
        passed = steps * (self.effort.repeats + 1) % lines
        self.check(_CHASE, place, int(order[passed]) * words)
        return spent / steps

    def bandwidth(self) -> float:
        """Bytes read and written by a copy that no cache holds."""
        source = torch.zeros(4 * self._large(), dtype=torch.uint8, device=self.on)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.microseconds(lambda: target.copy_(source))

    def _large(self) -> int:
        """Bytes of which the second cache holds a quarter at most."""
        if not self.is_timed:
            return self.effort.large_bytes
        return min(max(self.effort.large_bytes, 4 * self.gpu.l2_bytes), torch.cuda.mem_get_info(self.on)[0] // 16)

    def launch_us(self) -> float:
        """From kernel to kernel."""

        def call() -> None:
            for _ in range(self.effort.launches):
                self._nothing()

        return self._launches_us(call)

    def graph_launch_us(self) -> float:
        """The same in a graph."""
        self._nothing()  # loaded before the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self.effort.launches):
                self._nothing()
        return self._launches_us(graph.replay)

    def _nothing(self) -> None:
        _NOTHING(self.constants, 1, 32, (0,), like=self.like)

    def _launches_us(self, call: Callable[[], object]) -> float:
        call()
        # Python takes longer to queue a kernel than the GPU to start it: all are queued before the first runs.
        delay = 20 * self.effort.delay_cycles
        return statistics.median(self._once(call, delay) for _ in range(self.effort.repeats)) / self.effort.launches

    def clusters(self) -> dict[str, float]:
        rounds = self.effort.rounds
        count = torch.zeros(1, dtype=torch.int32, device=self.on)
        handing = self.cycles(
            lambda p: _HAND_OVER(self.constants, _CLUSTER, 32, (p, count, rounds), like=self.like, cluster=_CLUSTER)
        )
        self.check(_HAND_OVER, count, 2 * rounds)
        came = torch.full((_CLUSTER,), torch.nan, device=self.on)
        storing = self.cycles(
            lambda p: _STORES(self.constants, _CLUSTER, 256, (p, came, rounds), like=self.like, cluster=_CLUSTER),
            _CLUSTER,
        )
        self.check(_STORES, came, torch.arange(_CLUSTER, device=self.on).roll(1))
        facts = {"dsmem_cycles": handing / (2 * rounds), "dsmem_bytes_per_clock": 8 * 256 * 4 * rounds / storing}
        return facts | self._resident()

    def _resident(self) -> dict[str, float]:
        """Processors that the largest clusters occupy at once, with one block on each."""
        try:
            return self._occupied(self.gpu.max_cluster)
        except _refusals():
            if self.gpu.max_cluster <= _CLUSTER:
                raise
            return {"max_cluster": _CLUSTER, **self._occupied(_CLUSTER)}  # this driver grants no larger ones

    def _occupied(self, cluster: int) -> dict[str, float]:
        shared = self.gpu.shared_per_block if self.is_timed else 1024
        live = torch.zeros(2, dtype=torch.int32, device=self.on)
        grid = 2 * -(-self.gpu.processors // cluster) * cluster
        arguments = (live, self.effort.stay_cycles)
        _CLUSTERS({"CLUSTER": cluster}, grid, 32, arguments, like=self.like, shared=shared, cluster=cluster)
        now, most = live.tolist()
        if now != 0 or not 1 <= most * cluster <= grid:
            raise RuntimeError(f"{_CLUSTERS.entry}: {most} clusters of {cluster} at once, {now} at the end")
        return {"cluster_processors": min(most * cluster, self.gpu.processors)}

    @staticmethod
    def check(kernel: launch.Kernel, found: Tensor, expected: float | Tensor) -> None:
        if not bool((found == expected).all()):
            raise RuntimeError(f"{kernel.entry}: expected {expected}, got {found.tolist()}: its time means nothing")


def _refusals() -> tuple[type[Exception], ...]:
    """What CuPy raises where the driver refuses a launch."""
    try:
        from cupy_backends.cuda.api.driver import CUDADriverError
    except ImportError:
        return ()
    return (CUDADriverError,)


# ---- the CPU


def measure_host(seconds: float = 0.5) -> dict[str, float]:
    """Facts of the CPU, of the present instruction set and torch's present number of threads.

    The best of several short runs each: other programs only make them slower.

    Args:
        seconds: about as long, beside what it takes to write the memory that is read.
    """
    machine = device.host()
    share = 1e6 * seconds / 7  # microseconds for each of seven things
    sizes = {
        # a thread's own, well inside the cache; the last is several times what all of them share
        "l1_bandwidth": machine.l1_bytes // 2,
        "l2_bandwidth": machine.l2_bytes // 2,
        "l3_bandwidth": max(machine.l3_bytes // (2 * machine.threads), 2 * machine.l2_bytes),
        "memory_bandwidth": min(4 * machine.l3_bytes, 512 << 20) // machine.threads,
    }
    facts: dict[str, float] = {}
    for name, size in sizes.items():
        facts[name] = _most(share, size, lambda rounds, size=size: _call("read", size, rounds))
    # the clock is an estimate too: what counts is the product
    cycles = 1e3 * machine.clock_ghz
    facts["fma_per_cycle"] = _most(share, 16 * machine.vector_bytes, lambda n: _call("multiply_add", n)) / cycles
    if machine.threads > 1:
        facts["fork_us"] = _least(share, lambda rounds: _call("fork", rounds))
        if "OpenMP" in info.parallel_backend():  # the threads of others need not run together, and would wait for ever
            facts["barrier_us"] = _least(share, lambda rounds: _call("barrier", rounds))
    wrong = {name: value for name, value in facts.items() if not 0 < value < math.inf}
    if wrong:
        raise RuntimeError(f"the CPU cannot be measured: {wrong}")
    return facts


def _most(share: float, amount: int, rate: Callable[[int], float]) -> float:
    """The best rate, per microsecond, of runs that take the share together; a round is about `amount` of it."""
    first = rate(max((1 << 18) // amount, 1))
    rounds = max(int(share / 2 * first / amount), 1)
    return max(first, rate(rounds), rate(rounds))


def _least(share: float, spent: Callable[[int], float]) -> float:
    """The least time of a round, of several runs that take the share together."""
    first = spent(10)
    rounds = int(min(max(share / 8 / max(first, 1e-3), 1), 10_000))
    return min(first, *(spent(rounds) for _ in range(8)))


def _call(name: str, *arguments: int) -> float:
    return float(_functions()[name](*map(ctypes.c_int64, arguments)))


@cache
def _functions() -> dict[str, Callable[..., float]]:
    from .. import _C

    library = ctypes.CDLL(_C.__file__)
    functions = {name: library[f"seqops_probe_{name}"] for name in ("fork", "barrier", "read", "multiply_add")}
    for function in functions.values():
        function.restype = ctypes.c_double
    return functions
