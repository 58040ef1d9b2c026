"""What the kernels of causal_conv1d are compiled with and launched as: the tuner's problems and their consequences.

CUDA has four kernels (csrc/conv/causal_conv1d.cu and causal_conv1d_wide.cu): `forward` and `backward` of up to 16 taps,
which stay in registers; `wide`, the same sums for any number of taps, and `taps`, the gradients of those.

Letters: B batch, T time, D channels, W taps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..tune import csp

SIZES = {"bfloat16": 2, "float16": 2, "float": 4, "double": 8}
REAL = {"bfloat16": "float", "float16": "float", "float": "float", "double": "double"}
# (x, weight) as the kernels see them; a bias of another dtype than weight is converted before, and weight with it
PAIRS = (*((name, name) for name in SIZES), ("bfloat16", "float"), ("float16", "float"))
MOST_TAPS = {"forward": 16, "backward": 8}  # that stay in registers
WIDE_PASSES = ("FORWARD", "DZ", "DX")


class Pass(NamedTuple):
    """A kernel for given dtypes and taps. `vec`: the most channels a thread, 16 bytes or what addresses allow."""

    name: str  # operator.pass
    dtype: str  # "x+weight"; of wide kernels "x"
    vec: int
    taps: int = 0  # of forward and backward
    silu: bool = False
    packed: bool = False

    @staticmethod
    def of(key: Any) -> Pass:
        taps = next((size.value for size in key.sizes if size.name == "W" and size.relation == "="), 0)
        return Pass(
            key.kernel.rpartition(".")[0], key.dtype, key["V"], taps, "silu" in key.flags, "packed" in key.flags
        )

    @property
    def walk(self) -> str:
        return self.name.partition(".")[2]

    @property
    def source(self) -> str:
        return "conv/causal_conv1d.cu" if self.walk in ("forward", "backward") else "conv/causal_conv1d_wide.cu"

    @property
    def storage(self) -> str:
        return self.dtype.partition("+")[0]

    @property
    def size(self) -> int:
        return SIZES[self.storage]

    @property
    def words(self) -> int:
        """32-bit words of a number in the arithmetic."""
        return SIZES[REAL[self.storage]] // 4

    def flags(self) -> tuple[str, ...]:
        return (*(("silu",) if self.silu else ()), *(("packed",) if self.packed else ()))

    def constants(self, wide_pass: str = "FORWARD") -> dict[str, int | str]:
        """Those that the tuner does not choose."""
        common = {"STORAGE": self.storage, "SILU": int(self.silu), "PACKED": int(self.packed)}
        if self.walk in ("forward", "backward"):
            weight = self.dtype.partition("+")[2]
            return {**common, "WEIGHT": weight, "TAPS": self.taps, "BACKWARD": int(self.walk == "backward")}
        dz = REAL[self.storage] if self.silu else self.storage
        return {**common, "DZ_STORAGE": dz, "PASS": "TAPS_GRADIENT" if self.walk == "taps" else wide_pass}


def passes() -> Iterator[Pass]:
    """The kernels that are compiled offline: every dtype, and widths at the edges of what registers hold."""
    for storage, weight in PAIRS:
        wide = 16 // SIZES[storage]
        for taps, vec, silu, packed in (
            (4, wide, True, False),
            (4, 1, False, False),
            (1, wide, False, True),
            (3, wide, True, True),
            (8, wide, False, False),
            (16, wide, True, False),
        ):
            for walk in ("forward", "backward"):
                if taps > MOST_TAPS[walk]:
                    continue
                yield Pass(f"causal_conv1d.{walk}", f"{storage}+{weight}", vec, taps, silu, packed)
    for storage in SIZES:
        for vec, silu, packed in ((16 // SIZES[storage], True, False), (1, False, True)):
            for walk in ("wide", "taps"):
                yield Pass(f"causal_conv1d.{walk}", storage, vec, silu=silu, packed=packed)


# ---- what a thread holds, in 32-bit words


def held_words(kernel: Pass, vec: Any, depth: Any) -> Any:
    """Taps, windows and sums. `depth`: of wide kernels, the outputs or taps of a thread."""
    if kernel.walk == "forward":
        return vec * ((2 * kernel.taps + 1) * kernel.words)
    if kernel.walk == "backward":
        return vec * (((4 if kernel.silu else 3) * kernel.taps + 2) * kernel.words)
    return vec * depth * (2 * kernel.words)


def channels_of(kernel: Pass) -> int:
    """Channels a thread: as many as addresses allow, as long as registers hold what belongs to them."""
    vec = kernel.vec
    most = MOST_HELD[kernel.walk]
    while vec > 1 and held_words(kernel, vec, 8) > most:
        vec //= 2
    return vec


MOST_HELD = {"forward": 140, "backward": 104, "wide": 64, "taps": 64}


def registers(kernel: Pass, depth: Any, arch: int) -> Any:
    """Of a thread, at most: fitted to what the compiler took for every pass on five architectures.

    depth: rows read ahead; of wide kernels, outputs or taps of a thread.
    """
    vec = channels_of(kernel)
    held, double, newer = held_words(kernel, vec, depth), int(kernel.words == 2), int(arch >= 100)
    if kernel.walk == "forward":
        ahead = depth * vec * kernel.size // 4
        packed = kernel.packed * (7 + 5 * kernel.taps // 3)
        return (
            held * 53 // 50
            + ahead * 21 // 20
            + 7 * depth // 2
            + (44 + packed + 2 * kernel.silu + 6 * double + 3 * newer)
        )
    if kernel.walk == "backward":
        ahead = depth * vec * kernel.size // 2
        return held * 26 // 25 + ahead * 4 // 5 + 5 * depth + (91 + 5 * kernel.silu + 2 * double + 18 * newer)
    if kernel.walk == "wide":
        return held * 7 // 5 + (10 + 7 * kernel.packed) * depth // 2 + (72 + 4 * double)
    return held * 29 // 20 + depth + 69


# ---- the choice

POWERS = tuple(1 << n for n in range(18))
SECTOR, LINE = 32, 128  # bytes that memory gives at once, and likes to
OVERLAP_LOSS = 1 / 8  # of the shorter of two times that overlap


def power_of_two_from(value: int) -> int:
    return 1 << max(value - 1, 0).bit_length()


def problem(device: Any, key: Any) -> csp.Problem:
    """Constants of the kernel, and its time in microseconds, for T steps of B rows of D channels."""
    kernel = Pass.of(key)
    vec, backward = channels_of(kernel), kernel.walk in ("backward", "taps")
    rows, time = key["B"], key["T"]
    lanes_of_row = -(-key["D"] // vec)
    # Steps, and a quarter more reads where the rows beside a run are read again.
    steps_of_run = {"forward": (16, 32, 64), "backward": (16, 32, 64), "wide": (4, 8), "taps": (32, 64, 128)}
    depths = {"forward": (2, 4), "backward": (2,), "wide": (4, 8), "taps": (4, 8)}

    p = csp.Problem(str(key))
    threads = p.int("threads", values=(64, 128, 256))
    lanes = p.int("lanes", values=[n for n in POWERS[2:7] if n <= max(power_of_two_from(lanes_of_row), 4)])
    run = p.int("run", values=steps_of_run[kernel.walk])
    depth = p.int("depth", values=depths[kernel.walk])
    turns = p.int("turns", values=(1, 2, 4, 8, 16) if backward else (1,))
    blocks = p.int("blocks", values=(1, 2, 3, 4, 6, 8))  # of a multiprocessor, at once

    taken = p.define("registers", registers(kernel, depth, device.arch))
    shared = p.define("shared", threads * (vec * 4 * kernel.words if backward else 0))
    if kernel.walk == "wide":
        p.add(run == depth, "a run is what a thread computes")
    p.add(lanes <= threads, "lanes of a block")
    p.add(threads * blocks <= device.threads_per_processor, "threads of a multiprocessor")
    p.add(blocks <= device.blocks_per_processor, "blocks of a multiprocessor")
    p.add(taken <= 248, "registers of a thread")
    # Registers are granted to warps in units of 8 a thread.
    p.add(csp.ceildiv(taken, 8) * 8 * threads * blocks <= device.registers_per_processor, "registers fit")
    p.add((shared + device.reserved_per_block) * blocks <= device.shared_per_processor, "shared memory")

    groups = threads // lanes
    items = rows * csp.ceildiv(time, run)
    tiles = csp.ceildiv(key["W"], depth) if kernel.walk == "taps" else 1
    of_lanes = csp.ceildiv(items, groups * turns)  # blocks that share lanes
    grid = of_lanes * 1.0 * csp.ceildiv(lanes_of_row, lanes) * tiles  # of any size: not an integer to the solver
    cycle = 1e-3 / device.clock_ghz

    # A wave of blocks: rows arrive `depth` at a time, and multiply-adds are as many as the arithmetic has.
    streams = 2 if backward else 1
    taps = depth if kernel.walk == "taps" else key["W"]
    work = taps * ((3 if kernel.silu else 2) if kernel.walk == "backward" else 1) + 4
    waiting = (run / depth + 1) * (2 * device.memory_latency_us)
    if kernel.walk == "wide":
        waiting = csp.ceildiv(key["W"], depth) * device.l2_hit_us + 2 * device.memory_latency_us
    active = csp.min_(blocks, csp.max_(1.0, grid / device.processors))
    issue = active * threads * run * (work * vec * cycle * (1 if kernel.words == 1 else 2) / 128)
    rounds = csp.max_(1.0, grid / (blocks * device.processors))
    waves = rounds * turns * csp.max_(waiting, issue)
    elements = 1.0 * rows * time * lanes_of_row * vec
    width = lanes * (vec * kernel.size)  # bytes next to each other
    waste = csp.max_(1, SECTOR / width) + csp.max_(0, LINE - width) / (4 * LINE)
    # Rows beside a run come from the second cache, at about twice the memory's rate.
    again = 0 if kernel.walk == "wide" else min(key["W"] - 1, 16) / (2 * run)
    moved = elements * kernel.size * waste * (streams * (1 + again) + 1) * tiles / device.bandwidth
    sums = of_lanes * (lanes_of_row * vec * (key["W"] + 1) * 8 * kernel.words / device.bandwidth) if backward else 0.0
    p.minimize(device.launch_us + _overlapping(waves, moved) + sums, then=(taken, threads))
    return p


def _overlapping(first: Any, second: Any) -> csp.Expression:
    """Two times that overlap, but never wholly."""
    return csp.max_(first, second) + csp.min_(first, second) * OVERLAP_LOSS


# ---- without a device


def simulated(kernel: Pass) -> dict[str, int]:
    """Small sizes for the simulator, so that short cases have many runs and blocks."""
    wide = {"wide": (4, 4), "taps": (8, 4), "forward": (4, 2), "backward": (4, 2)}
    run, depth = wide[kernel.walk]
    return {"threads": 32, "lanes": 4, "run": run, "depth": depth, "turns": 2, "blocks": 1}


# ---- the launch


class Launch(NamedTuple):
    constants: dict[str, int | str]
    grid: int
    threads: int
    shared: int
    turns: int
    blocks: int  # that share lanes: rows of partial sums


def compiled(kernel: Pass, chosen: Mapping[str, int], wide_pass: str = "FORWARD") -> dict[str, int | str]:
    """The constants that a choice compiles with."""
    sizes = {"VEC": channels_of(kernel), "THREADS": chosen["threads"], "LANES": chosen["lanes"]}
    if kernel.walk in ("forward", "backward"):
        sizes |= {"RUN": chosen["run"], "STEPS": chosen["depth"]}
    elif kernel.walk == "wide":
        sizes |= {"OUTPUTS": chosen["depth"]}
    else:
        sizes |= {"TILE": chosen["depth"], "RUN": chosen["run"]}
    return {**kernel.constants(wide_pass), **sizes}


def shared_bytes(kernel: Pass, chosen: Mapping[str, int]) -> int:
    """Dynamic shared memory of a block."""
    if kernel.walk in ("forward", "wide"):
        return 0
    return chosen["threads"] * channels_of(kernel) * 4 * kernel.words


def runs(batch: int, time: int, dilation: int, run: int) -> int:
    """As the kernels count them (csrc/conv/device.h): every class of a row is cut by itself."""
    return batch * min(dilation, time) * -(-time // (run * dilation))


def launch(
    kernel: Pass, chosen: Mapping[str, int], items: int, channels: int, taps: int, wide_pass: str = "FORWARD"
) -> Launch:
    """`items`: runs, and what has to be done for states."""
    groups = chosen["threads"] // chosen["lanes"]
    turns = chosen["turns"] if kernel.walk in ("backward", "taps") else 1
    blocks = -(-items // (groups * turns))
    strips = -(-(channels // channels_of(kernel)) // chosen["lanes"])
    tiles = -(-taps // chosen["depth"]) if kernel.walk == "taps" else 1
    shared = shared_bytes(kernel, chosen)
    return Launch(
        compiled(kernel, chosen, wide_pass), blocks * strips * tiles, chosen["threads"], shared, turns, blocks
    )


def vector(storage: str, channels: int, alignments: tuple[int, ...]) -> int:
    """The most channels a thread: 16 bytes, or what sizes, and addresses and strides in bytes, are multiples of."""
    vec = 16 // SIZES[storage]
    while vec > 1 and (channels % vec or any(each % (vec * SIZES[storage]) for each in alignments)):
        vec //= 2
    return vec


# ---- in Triton

TRITON_STEPS, TRITON_CHANNELS = (8, 32), (16, 64, 128)
TRITON_BYTES = 8192  # of a tile in the dtype of its sums: with more, those of weights do not fit the registers
TRITON_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def problem_in_triton(device: Any, key: Any) -> csp.Problem:
    """Steps and channels of a program's tile, and the time in microseconds."""
    size, backward = TRITON_SIZES[key.dtype], key.kernel.partition(".")[2].startswith("backward")
    rows, time, width, taps = key["B"], key["T"], key["D"], key["W"]
    p = csp.Problem(str(key))
    steps = p.int("steps", values=TRITON_STEPS)
    channels = p.int("channels", values=TRITON_CHANNELS)
    p.add(steps * channels * max(size, 4) <= TRITON_BYTES)
    programs = p.define("programs", rows * csp.ceildiv(time, steps) * csp.ceildiv(width, channels))
    # A tile that is larger than the warps of a program keeps several rows of a thread on their way.
    resident = device.processors * (device.threads_per_processor // 128)
    waves = csp.ceildiv(programs, resident) * (taps * device.l2_hit_us / 2 + 2 * device.memory_latency_us)
    elements = programs * steps * channels
    waste = csp.max_(1, SECTOR / (channels * size))
    # What a tile reads twice comes from the caches, at about twice the memory's rate or better.
    again = csp.min_(taps - 1, steps) / (2 * steps)
    moved = elements * waste * (1 + again) * (size * (5 if backward else 2)) / device.bandwidth
    p.minimize(device.launch_us * (4 if backward else 2) + _overlapping(waves, moved), then=steps)
    return p
