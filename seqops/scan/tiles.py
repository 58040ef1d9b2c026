"""What the CUDA kernels of the scans are compiled with and launched as: the tuner's problem and its consequences.

Two ways to walk (csrc/scan/device.h): `march`, a thread for VEC channels and all steps, where there are channels enough
to fill the device; `tiles`, blocks of a few channels and a few hundred steps that hand the state on, everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from ..tune import csp

SIZES = {"bfloat16": 2, "float16": 2, "float": 4, "double": 8, "complex64": 8, "complex128": 16}
COMPUTE = {**{name: name for name in SIZES}, "bfloat16": "float", "float16": "float"}
REAL = {**COMPUTE, "complex64": "float", "complex128": "double"}

# (x, a) as the kernels see them; other gates are converted before
PAIRS = (
    *((half, gate) for half in ("bfloat16", "float16") for gate in (half, "float")),
    ("float", "float"),
    ("double", "double"),
    *((name, gate) for name in ("complex64", "complex128") for gate in (name, REAL[name])),
)
VALUES = ("bfloat16", "float16", "float", "double")
# (v's arithmetic, s) as the kernels see them; other scores are converted before
SCORES = (("float", "bfloat16"), ("float", "float16"), ("float", "float"), ("double", "double"))


# ---- a kernel


class Lane(NamedTuple):
    """What one thread handles of a step, in bytes."""

    channels: int  # VEC
    marches: bool  # 16 bytes of a tensor: one element would leave too little in flight
    reads: int
    writes: int
    map_bytes: int  # of one channel
    state_bytes: int


class Pass(NamedTuple):
    """A kernel for given dtypes and channels a thread. `gates`: read by a thread, for all its channels together."""

    name: str  # operator.pass
    dtype: str  # "x+a", "v" or "v's arithmetic+s"
    vec: int = 1
    gates: int = 1

    @staticmethod
    def of(key: Any) -> Pass:
        return Pass(key.kernel.rpartition(".")[0], key.dtype, key["V"], key["G"])

    @property
    def entry(self) -> str:
        return self.name.replace(".", "_")

    @property
    def source(self) -> str:
        return f"scan/{self.name.partition('.')[0]}.cu"

    @property
    def storage(self) -> str:
        return self.dtype.partition("+")[0]

    @property
    def second(self) -> str:
        """The gate of a linear scan, the score of a softmax scan."""
        return self.dtype.partition("+")[2]

    def constants(self) -> dict[str, int | str]:
        """Those that the tuner does not choose."""
        operator, _, walk = self.name.partition(".")
        if operator == "linear_scan":
            backward = int(walk == "backward")
            return {"STORAGE": self.storage, "GATE_STORAGE": self.second, "GATES": self.gates, "BACKWARD": backward}
        score = {"SCORE": self.second} if self.second else {}
        return {"PASS": walk.upper(), "STORAGE": self.storage, **score}

    @lru_cache  # noqa: B019 - a tuple, of which there are a hundred
    def lane(self) -> Lane:
        size, real = SIZES[self.storage], SIZES[REAL[self.storage]]
        access, state = self.vec * size, SIZES[COMPUTE[self.storage]]
        if self.name.startswith("linear_scan"):  # x and h, or dh, h, dx and da, with the gates
            gates = self.gates * SIZES[self.second]
            # Complex gates are multiplied in double.
            product = 16 if self.second.startswith("complex") else real
            align = max(product, state)
            each = -(-(product + state) // align) * align
            if self.name.endswith("forward"):
                return Lane(self.vec, access == 16, access + gates, access, each, state)
            return Lane(self.vec, access == 16, 2 * access + gates, access + gates, each, state)
        if self.name == "softmax_scan.forward":  # v and o, with alpha and p of the head
            return Lane(self.vec, access == 16, access + 2 * real, access, 2 * real, real)
        if self.name == "softmax_scan.backward":  # do, v, o and dv
            return Lane(self.vec, access == 16, 3 * access + 2 * real, access + 2 * real, 2 * real, real)
        if self.name == "softmax_scan.scores":
            # The state of a head is m and u, in double; its map has a mark beside them. Five tensors are written.
            return Lane(1, False, SIZES[self.second], 5 * real, 24, 16)
        if self.name == "softmax_scan.gradients":  # alpha, p, two products and dlse of one head
            return Lane(1, False, 5 * real, SIZES[self.second], 2 * real, real)
        # weights: s, m and u of two steps, alpha and p
        return Lane(1, False, SIZES[self.second] + 2 * real, 2 * real, 0, 0)

    def registers(self, march: bool, arch: int) -> int:
        """At most: the compiler may take as many as it likes."""
        of = REGISTERS[self.name][march]
        state = SIZES[COMPUTE[self.storage]]
        gate = state if self.second.startswith("complex") else SIZES[REAL[self.storage]]
        double = REAL[self.storage] == "double" and arch >= 100
        words = of.state * self.vec * state // 4 + of.gate * self.gates * gate // 4
        return of.base + words + of.double * double + of.newer * (arch >= 90)


class Registers(NamedTuple):
    """Of a thread, at most: fitted to what the compiler took for every pass on five architectures."""

    base: int
    state: int = 0  # for each 32-bit word of state
    gate: int = 0  # for each word of gates
    double: int = 0  # for doubles, from sm_100 on
    newer: int = 0  # from sm_90 on


REGISTERS = {  # by whether it marches
    "linear_scan.forward": (Registers(81, 2, 3, newer=4), Registers(76, double=8, newer=4)),
    "linear_scan.backward": (Registers(98, 2, 2, newer=4), Registers(85, gate=7, double=4)),
    "softmax_scan.forward": (Registers(90, 2), Registers(48, 2, newer=8)),
    "softmax_scan.backward": (Registers(94, 2), Registers(100, 2)),
    "softmax_scan.scores": (Registers(99),),
    "softmax_scan.gradients": (Registers(85, double=4),),
    "softmax_scan.weights": (Registers(40),),
}


def passes() -> Iterator[Pass]:
    """Every kernel that may be launched."""
    for storage, gate in PAIRS:
        wide = 16 // SIZES[storage]
        for vec, gates in dict.fromkeys(((wide, wide), (wide, 1), (1, 1))):
            if gates < vec and gate not in (COMPUTE[storage], REAL[storage]):
                continue  # such gates are converted
            for walk in ("forward", "backward"):
                yield Pass(f"linear_scan.{walk}", f"{storage}+{gate}", vec, gates)
    for storage in VALUES:
        for vec in (16 // SIZES[storage], 1):
            for walk in ("forward", "backward"):
                yield Pass(f"softmax_scan.{walk}", storage, vec)
    for real, score in SCORES:
        for walk in ("scores", "gradients", "weights"):
            yield Pass(f"softmax_scan.{walk}", f"{real}+{score}")


# ---- the choice

POWERS = tuple(1 << n for n in range(18))
MOST_MAPS = 16 << 10  # bytes of a group's maps: they are read again by every tile
TICKET = 128  # bytes of static shared memory that the compiler takes for a block's ticket
SECTOR, LINE = 32, 128  # bytes that memory gives at once, and likes to
OVERLAP_LOSS = 1 / 8  # of the shorter of two times that overlap
# Dependent operations, by estimate: one step, and one map after another, each with a load from shared memory.
CHAIN_CYCLES, FOLD_CYCLES = 40, 30


def problem(device: Any, key: Any) -> csp.Problem:
    """Constants of the kernel, and its time in microseconds, for T steps of B rows of L lanes of V channels."""
    kernel = Pass.of(key)
    if kernel.name == "softmax_scan.weights":
        return _pointwise(device, key, kernel)
    lane = kernel.lane()
    of_map, of_state = lane.channels * lane.map_bytes, lane.channels * lane.state_bytes

    p = csp.Problem(str(key))
    march = p.int("march", values=(0, 1) if lane.marches else (0,))
    threads = p.int("threads", values=(64, 128, 256))
    steps = p.int("steps", values=(2, 4, 8, 16))
    blocks = p.int("blocks", values=(1, 2, 3, 4, 6, 8))  # of a multiprocessor, at once
    lanes = p.int("lanes", values=[n for n in POWERS[:6] if n <= power_of_two_from(key["L"])])
    group = p.int("group", values=POWERS[:6])

    marching = kernel.registers(lane.marches, device.arch)
    registers = p.define("registers", csp.where(march == 1, marching, kernel.registers(False, device.arch)))
    slices = p.define("slices", threads // lanes)
    maps = (slices + group) * lanes * of_map + lanes * of_state
    shared = p.define("shared", steps * threads * lane.reads + (1 - march) * (maps + TICKET))

    p.add(csp.implies(march == 1, (lanes == 1) & (group == 1)), "a march has no tiles")
    p.add(threads * blocks <= device.threads_per_processor, "threads of a multiprocessor")
    p.add(blocks <= device.blocks_per_processor, "blocks of a multiprocessor")
    # Registers are granted to warps in units of 8 a thread.
    p.add(csp.ceildiv(registers, 8) * 8 * threads * blocks <= device.registers_per_processor, "registers fit")
    p.add(shared <= device.shared_per_block, "shared memory of a block")
    p.add((shared + device.reserved_per_block) * blocks <= device.shared_per_processor, "shared memory")
    p.add(group * lanes * of_map <= MOST_MAPS, "maps of a group")

    work = _Work(device, lane, SIZES[kernel.storage], key["B"], key["T"], key["L"])
    march_us = work.march_us(threads, steps, blocks)
    tiles_us = work.tiles_us(threads, steps, blocks, lanes, group)
    p.minimize(csp.where(march == 1, march_us, tiles_us), then=(shared, blocks))
    return p


class _Work(NamedTuple):
    """The times of both ways, in microseconds, as far as they are known without a run."""

    device: Any
    lane: Lane
    element: int  # bytes of one
    rows: int
    time: int
    lanes: int  # of a row

    @property
    def cycle(self) -> float:
        return 1e-3 / self.device.clock_ghz

    @property
    def latency(self) -> float:
        """Of memory that is busy: twice that of one access."""
        return 2 * self.device.memory_latency_us

    @property
    def moved(self) -> float:
        """All bytes, at the memory's rate."""
        return self.rows * self.time * self.lanes * (self.lane.reads + self.lane.writes) / self.device.bandwidth

    def step_us(self, active: Any, threads: Any, times: int) -> csp.Expression:
        """One step of all blocks that share a multiprocessor: instructions, four a cycle, and what it takes from L2."""
        instructions = 20 + 6 * self.lane.channels  # of a warp
        issue = active * threads * (instructions * times * self.cycle / (32 * 4))
        return csp.max_(issue, active * threads * ((self.lane.reads + self.lane.writes) * self.cycle / 64))

    def march_us(self, threads: Any, steps: Any, blocks: Any) -> csp.Expression:
        grid = csp.ceildiv(self.rows * self.lanes, threads)
        active = csp.min_(blocks, csp.ceildiv(grid, self.device.processors))
        each = csp.max_(self.latency / steps, CHAIN_CYCLES * self.cycle, self.step_us(active, threads, 1))
        walk = csp.ceildiv(grid, blocks * self.device.processors) * self.time * each
        return self.device.launch_us + self.latency + overlapping(walk, self.moved)

    def tiles_us(self, threads: Any, steps: Any, blocks: Any, lanes: Any, group: Any) -> csp.Expression:
        device, cycle, slices = self.device, self.cycle, threads // lanes
        tiles = csp.ceildiv(self.time, slices * steps)
        grid = tiles * self.rows * csp.ceildiv(self.lanes, lanes)
        active = csp.min_(blocks, csp.ceildiv(grid, device.processors))
        # A state travels through memory from group to group; a tile waits for its turn, and walks its steps twice.
        hop = 2 * device.l2_hop_us + group * (FOLD_CYCLES * cycle)
        walks = steps * csp.max_(2 * CHAIN_CYCLES * cycle, self.step_us(active, threads, 2))
        folds = (slices * (2 * FOLD_CYCLES) + 4 * device.sync_cycles) * cycle
        tile = self.latency + hop + walks + folds
        waves = csp.ceildiv(grid, blocks * device.processors) * tile
        chain = csp.ceildiv(tiles, group) * hop + tile
        # Maps are written once and read by half a group, as packets of twice their size; L2 gives them, at about twice
        # the memory's rate.
        packets = grid * (group + 1) * lanes * (self.lane.channels * self.lane.map_bytes / (2 * device.bandwidth))
        width = lanes * (16 if self.lane.marches else self.element)  # bytes next to each other
        waste = csp.max_(1, SECTOR / width) + csp.max_(0, LINE - width) / (4 * LINE)
        # The workspace is cleared first.
        return 2 * device.launch_us + overlapping(self.moved * waste + packets, csp.max_(waves, chain))


def overlapping(first: Any, second: Any) -> csp.Expression:
    """Two times that overlap, but never wholly."""
    return csp.max_(first, second) + csp.min_(first, second) * OVERLAP_LOSS


def _pointwise(device: Any, key: Any, kernel: Pass) -> csp.Problem:
    """A thread for every step and lane."""
    p = csp.Problem(str(key))
    threads = p.int("threads", values=(64, 128, 256))
    registers = p.define("registers", threads * 0 + kernel.registers(False, device.arch))
    p.define("shared", threads * 0)
    p.add(registers * threads <= device.registers_per_processor, "registers fit")
    lane, items = kernel.lane(), key["B"] * key["T"] * key["L"]
    waves = items / (device.threads_per_processor * device.processors)
    bytes_us = items * (lane.reads + lane.writes) / device.bandwidth
    p.minimize(device.launch_us + max(bytes_us, waves * device.memory_latency_us), then=-threads)
    return p


# ---- in Triton

SOFTMAX_WALKS = ("scores", "forward", "backward")
TRITON_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16}
DEPTH = 4  # steps that a lane reads ahead


def problem_in_triton(device: Any, key: Any) -> csp.Problem:
    """Steps of a tile, or 0 for one walk, and the time in microseconds, for T steps of B rows of C channels.

    A program is one warp. Tiles are walked twice, for what they add to a state and then with the state, and between
    these one walk folds them.
    """
    size = TRITON_SIZES[key.dtype]
    reads = (2 if key.kernel.partition(".")[2].startswith("backward") else 1) * size + max(size, 4)
    rows, time, channels = key["B"], key["T"], key["C"]
    lanes = rows * channels
    resident = device.processors * device.blocks_per_processor * 32

    p = csp.Problem(str(key))
    tile = p.int("tile", values=(0, *(steps for steps in (32, 64, 128, 256, 512) if steps < time)))
    length = csp.where(tile == 0, time, tile)
    pieces = p.define("tiles", csp.where(tile == 0, 1, csp.ceildiv(time, csp.max_(tile, 1))))

    def walk_us(steps: Any, parallel: Any, moved: float) -> csp.Expression:
        waiting = csp.ceildiv(parallel, resident) * steps * (2 * device.memory_latency_us / DEPTH)
        return overlapping(waiting, moved) + device.launch_us

    def moved_us(each: int) -> float:
        return rows * time * channels * each / device.bandwidth

    apply = walk_us(length, pieces * lanes, moved_us(reads + size))
    fold = walk_us(pieces, lanes, 0.0)
    p.minimize(apply + csp.where(tile == 0, 0, fold + walk_us(length, pieces * lanes, moved_us(reads))), then=tile)
    return p


# ---- without a device


def simulated(kernel: Pass, batch: int, time: int, lanes_of_row: int) -> dict[str, int]:
    """Small sizes for the simulator, so that short cases have many tiles."""
    if kernel.lane().marches and (time <= 2 or batch * lanes_of_row >= 24):
        return {"march": 1, "threads": 32, "steps": 4, "blocks": 1, "lanes": 1, "group": 1}
    return {"march": 0, "threads": 32, "steps": 2, "blocks": 1, "lanes": 8, "group": 2}


# ---- the launch


class Launch(NamedTuple):
    constants: dict[str, int | str]
    grid: int
    threads: int
    shared: int
    lanes: int  # of a tile; 0: a march
    group: int
    tiles: int  # along time; 0: a march
    workspace: int  # 8-byte words, zero


def launch(kernel: Pass, chosen: Mapping[str, int], batch: int, time: int, channels: int, rows: int) -> Launch:
    """`rows` are the rows of the states: the batch, or the sequences packed into it."""
    constants, lane = compiled(kernel, chosen), kernel.lane()
    threads, steps = chosen["threads"], chosen["steps"]
    lanes_of_row = channels // lane.channels
    if chosen["march"]:
        blocks = -(-rows * lanes_of_row // threads)
        return Launch(constants, blocks, threads, shared_bytes(kernel, chosen), 0, 0, 0, 0)
    # Fewer lanes than the bucket's representative are possible.
    lanes = min(chosen["lanes"], power_of_two_from(lanes_of_row))
    strips = batch * -(-lanes_of_row // lanes)
    tiles = -(-time // (threads // lanes * steps))
    group = chosen["group"]
    groups = -(-tiles // group)
    width = lanes * lane.channels
    words = 1 + strips * width * (groups * lane.state_bytes + tiles * lane.map_bytes * (group > 1)) // 4
    shared = shared_bytes(kernel, {**chosen, "lanes": lanes})
    return Launch(constants, tiles * strips, threads, shared, lanes, group, tiles, words)


def compiled(kernel: Pass, chosen: Mapping[str, int]) -> dict[str, int | str]:
    """The constants that a choice compiles with."""
    if kernel.name == "softmax_scan.weights":
        return {**kernel.constants(), "VEC": 1, "THREADS": chosen["threads"], "STEPS": 1}
    sizes = {name.upper(): chosen[name] for name in ("march", "threads", "steps")}
    return {**kernel.constants(), "VEC": kernel.vec, **sizes}


def shared_bytes(kernel: Pass, chosen: Mapping[str, int]) -> int:
    """Dynamic shared memory of a block."""
    lane, threads = kernel.lane(), chosen["threads"]
    slots = chosen["steps"] * threads * lane.reads
    if chosen["march"]:
        return slots
    width = chosen["lanes"] * lane.channels
    return slots + (threads // chosen["lanes"] + chosen["group"]) * width * lane.map_bytes + width * lane.state_bytes


def power_of_two_from(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def vector(storage: str, channels: int, alignments: tuple[int, ...]) -> int:
    """Channels a thread: 16 bytes, or 1 where the channels, or an address or stride in bytes, do not allow that."""
    width = 16 // SIZES[storage]
    return width if channels % width == 0 and not any(each % 16 for each in alignments) else 1


def summed_lanes(group: int, most: int) -> int:
    """The largest power of two of neighbouring lanes, at most `most` (0: a warp), that never leaves its group."""
    together = 1
    while together < min(most or 32, 32) and group % (2 * together) == 0:
        together *= 2
    return together


def gates_of(vec: int, gate_size: int, div: int, mod: int, alignments: tuple[int, ...]) -> int | None:
    """How many gates a thread reads in one access: VEC, or 1 for all its channels. None: neither fits."""
    if div == 1 and mod % vec == 0 and not any(each % min(16, vec * gate_size) for each in alignments):
        return vec
    return 1 if div % vec == 0 else None
