"""What the CUDA kernels of the recurrent operators are compiled with and launched as: the tuner's problem.

One block holds a head's weights, in registers first and then in shared memory, and walks all steps of `tiles` times
eight batch rows (csrc/rnn/device.h). A step's product is a sum of `steps` parts: 16 inputs long on tensor cores, 4 long
without them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..tune import csp

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
CACHES = {"lstm": (4, None), "gru": (3, None), "slstm": (7,), "elman": ()}  # as op.py has them
STATES = {"lstm": 2, "gru": 1, "slstm": 4, "elman": 1}
READS = {"lstm": 7, "gru": 6, "slstm": 10, "elman": 2}  # of the backward, a unit and step
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
STORAGE = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float", "float64": "double"}

HEADS = tuple(1 << n for n in range(11))
ROWS = tuple(1 << n for n in range(3, 13))
STEPS = (4, 64, 1024)

LEAST_ARCH = 80  # of mma.m16n8k16 with bfloat16, and of cp.async
MOST_THREADS = 1024


# ---- a kernel


class Pass(NamedTuple):
    """A kernel of one cell in one dtype, for heads of `dim` units; `vec`: units that one access moves."""

    op: str
    direction: str
    dtype: str
    dim: int
    vec: int
    train: bool

    @staticmethod
    def of(key: Any) -> Pass:
        op, direction, _ = key.kernel.split(".")
        return Pass(op, direction, key.dtype, key["D"], key["V"], "train" in key.flags)

    @property
    def name(self) -> str:
        return f"{self.op}.{self.direction}"

    @property
    def source(self) -> str:
        return f"rnn/{self.op}.cu"

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    @property
    def size(self) -> int:
        return SIZES[self.dtype]

    @property
    def narrow(self) -> bool:
        return self.size == 2

    @property
    def words(self) -> int:
        """Registers of a number that is computed with."""
        return 2 if self.size == 8 else 1

    @property
    def lane_units(self) -> int:
        return 2 if self.narrow else 1

    @property
    def warps(self) -> int:
        return -(-self.dim // (8 * self.lane_units))

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def padded(self) -> int:
        return 8 * self.lane_units * self.warps

    @property
    def outputs(self) -> int:
        """Of the product, a unit."""
        return 1 if self.backward else GATES[self.op]

    @property
    def depth(self) -> int:
        """Length of the product's sums."""
        return self.padded * (GATES[self.op] if self.backward else 1)

    @property
    def steps(self) -> int:
        return self.depth // (16 if self.narrow else 4)

    @property
    def part_words(self) -> int:
        """Registers of a lane's weights for one step of the sum."""
        return self.outputs * (4 if self.narrow else self.words)

    @property
    def reads(self) -> int:
        return READS[self.op] if self.backward else GATES[self.op]

    def shared_bytes(self, tiles: Any, k_regs: Any, ring: Any) -> Any:
        """Of a block: inputs of this step and the next, weights, and what is read ahead."""
        inputs = 2 * 8 * tiles * ((self.depth + 8) * 2 if self.narrow else self.depth * self.size)
        weights = (self.steps - k_regs) * self.threads * self.part_words * 4
        ahead = ring * self.reads * 2 * tiles * self.lane_units * self.threads * self.size
        return inputs + weights + ahead

    def registers(self, tiles: Any, k_regs: Any, split: Any, arch: int) -> Any:
        """Of a thread, at most: the weights, the sums, what the product reads ahead, and what the cell holds."""
        cell = REGISTERS[self.name][(2, 4, 8).index(self.size)] + 4 * (arch >= 100)
        loop = csp.where(k_regs < self.steps, READ_AHEAD, 0)  # of weights in shared memory
        if self.narrow:
            further = OF_TILE[self.name] + 12 * (arch >= 100)
            sums = 4 * tiles * split if self.backward else 2 * tiles * self.outputs * (1 + split)
            return cell + further * (tiles - 1) + k_regs * self.part_words + sums + loop
        sums = 8 * self.outputs * self.words
        return cell + k_regs * self.part_words + sums + 8 * self.words * min(self.steps, 4) + loop


# Of a thread, for its cell: in 16 bits, float32 and float64; held against the compiler. Architectures differ by 60 in
# float64, where only the bound matters.
REGISTERS = {
    "lstm.forward": (80, 50, 60),
    "lstm.backward": (90, 82, 72),
    "gru.forward": (72, 46, 60),
    "gru.backward": (84, 70, 64),
    "slstm.forward": (92, 52, 72),
    "slstm.backward": (104, 88, 104),
    "elman.forward": (60, 52, 80),
    "elman.backward": (64, 65, 84),
}
OF_TILE = {  # each further tile of rows
    **{"lstm.forward": 24, "lstm.backward": 34, "gru.forward": 26, "gru.backward": 26},
    **{"slstm.forward": 44, "slstm.backward": 46, "elman.forward": 24, "elman.backward": 16},
}
READ_AHEAD = 26


# ---- the choice

POINTWISE_CYCLES = 150  # a cell, from the product's sum to h in shared memory, by estimate
TILE_CYCLES = 40  # of each further tile of rows
SHARED_BYTES_PER_CYCLE = 128
LOADED_BYTES_PER_CYCLE = 32  # by one multiprocessor, of weights at the start


def problem(device: Any, key: Any) -> csp.Problem:
    """Constants of the kernel, and its time in microseconds, for T steps of B rows of H heads of D units."""
    kernel = Pass.of(key)
    steps, warps = kernel.steps, kernel.warps
    p = csp.Problem(str(key))
    threads = p.int("threads", values=(kernel.threads,))
    tiles = p.int("tiles", values=(1, 2) if kernel.narrow else (1,))
    k_regs = p.int("k_regs", values=sorted({*range(0, steps + 1, max(steps // 16, 1)), steps}))
    split = p.int("split", values=(1, 2, 4) if kernel.narrow else (1,))
    ring = p.int("ring", values=(2, 4, 8))

    registers = p.define("registers", kernel.registers(tiles, k_regs, split, device.arch))
    shared = p.define("shared", kernel.shared_bytes(tiles, k_regs, ring))
    p.add(threads <= MOST_THREADS, "threads of a block")
    if kernel.threads <= MOST_THREADS:
        p.add(registers <= device.thread_registers(kernel.threads), "registers fit")
    p.add(shared <= device.shared_per_block, "shared memory of a block")
    p.add(split <= steps, "every sum has a part")

    # Cycles of a step: what the slowest unit needs, or one product after the other.
    weights = (steps - k_regs) * (warps * 32 * kernel.part_words * 4 / SHARED_BYTES_PER_CYCLE)
    inputs = tiles * (warps * kernel.depth * 8 * (2 if kernel.narrow else kernel.size) / SHARED_BYTES_PER_CYCLE)
    if kernel.narrow:
        turns = -(-warps // 4)  # of a partition's tensor core
        busy = tiles * (kernel.outputs * steps * turns * device.mma_issue_cycles)
        chain = csp.ceildiv(steps, split) * device.mma_cycles + 4 * split * kernel.outputs
    else:
        rate = device.fma_f32 / (1 if kernel.size == 4 else 2 if device.arch in (80, 90, 100) else 64)
        busy = tiles * (8 * kernel.outputs * steps * kernel.threads / rate)
        chain = steps * 4.0 + 20 * kernel.outputs
    product = csp.max_(busy, chain, weights + inputs)
    cell = POINTWISE_CYCLES + TILE_CYCLES * (tiles - 1) + device.sync_cycles
    step_us = (product + cell) / (1e3 * device.clock_ghz)
    # What a step reads was asked for `ring` steps before.
    step_us = csp.max_(step_us, 2 * device.memory_latency_us / ring)

    blocks = key["H"] * csp.ceildiv(key["B"], 8 * tiles)
    waves = csp.ceildiv(blocks, device.processors)
    load = steps * kernel.threads * kernel.part_words * 4 / LOADED_BYTES_PER_CYCLE / (1e3 * device.clock_ghz)
    p.define("step", step_us)
    p.minimize(device.launch_us + waves * (load + device.memory_latency_us + key["T"] * step_us), then=(shared, split))
    return p


def fits(device: Any, key: Any) -> bool:
    """Whether a block of the device holds a head."""
    # Without a limit of time: the answer must not depend on how busy the machine is.
    return device.arch >= LEAST_ARCH and problem(device, key).solve(seconds=math.inf) is not None


# ---- without a device

SIMULATED_SHARED = 227 << 10


def simulated(kernel: Pass, batch: int) -> dict[str, int] | None:
    """For the simulator: weights in registers and in shared memory; None where no GPU holds the head."""
    tiles = 2 if kernel.narrow and batch > 16 else 1
    chosen = {"threads": kernel.threads, "tiles": tiles, "k_regs": (kernel.steps + 1) // 2, "ring": 2}
    chosen["split"] = 2 if kernel.narrow and kernel.steps > 1 else 1
    held = kernel.shared_bytes(tiles, chosen["k_regs"], 2) <= SIMULATED_SHARED
    return chosen if held and kernel.threads <= MOST_THREADS else None


# ---- the launch


class Launch(NamedTuple):
    constants: dict[str, int | str]
    grid: int
    threads: int
    shared: int


def launch(kernel: Pass, chosen: Mapping[str, int], heads: int, batch: int) -> Launch:
    shared = kernel.shared_bytes(chosen["tiles"], chosen["k_regs"], chosen["ring"])
    blocks = heads * -(-batch // (8 * chosen["tiles"]))
    return Launch(compiled(kernel, chosen), blocks, kernel.threads, shared)


def compiled(kernel: Pass, chosen: Mapping[str, int]) -> dict[str, int | str]:
    """The constants that a choice compiles with."""
    sizes = {name.upper(): chosen[name] for name in ("threads", "tiles", "k_regs", "split", "ring")}
    fixed = {"STORAGE": STORAGE[kernel.dtype], "DIM": kernel.dim, "VEC": kernel.vec, "BACKWARD": int(kernel.backward)}
    return {**fixed, **sizes, **({} if kernel.backward else {"TRAIN": int(kernel.train)})}
