"""What the CUDA kernels of the recurrent operators are compiled with and launched as: the tuner's problem.

A team of `blocks` thread blocks holds a head's weights, in registers first and then in shared memory, and walks all
steps of `tiles` times eight batch rows (csrc/rnn/device.h). A sum has parts: 16 inputs long on tensor cores, 4 without.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

from ..tune import csp
from .cells import GATES, STATES

READS = {"lstm": 7, "gru": 6, "slstm": 10, "elman": 2}  # of the backward, a unit and step
SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
STORAGE = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float", "float64": "double"}

HEADS = tuple(1 << n for n in range(11))
ROWS = tuple(1 << n for n in range(3, 13))
STEPS = (1, 4, 64, 1024)

ALONE, CLUSTER, GRID = range(3)  # how the blocks of a head exchange
VARIABLES = ("exchange", "blocks", "unit_warps", "k_warps", "tiles", "k_regs", "k_shared", "direct", "split", "ring")

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
    def group(self) -> int:
        """Units of a warp."""
        return 8 * self.lane_units

    @property
    def groups(self) -> int:
        """Warps' worth of units, at least."""
        return -(-self.dim // self.group)

    @property
    def part(self) -> int:
        """Inputs of one part of a sum."""
        return 16 if self.narrow else 4

    @property
    def gates(self) -> int:
        return GATES[self.op]

    @property
    def fragment(self) -> int:
        """Bytes of a lane's weights of one output and one part."""
        return 16 if self.narrow else self.size

    @property
    def number(self) -> int:
        """Bytes of a sum."""
        return 8 if self.size == 8 else 4

    @property
    def reads(self) -> int:
        return READS[self.op] if self.backward else self.gates


@dataclass(frozen=True)
class Layout:
    """What a choice makes of a kernel: the counts of csrc/rnn/device*.h, under the same names."""

    kernel: Pass
    chosen: Mapping[str, int]

    @cached_property
    def threads(self) -> int:
        return 32 * self.chosen["unit_warps"] * self.chosen["k_warps"]

    @cached_property
    def units(self) -> int:
        """Of a block."""
        return self.kernel.group * self.chosen["unit_warps"]

    @cached_property
    def lane_rows(self) -> int:
        return 2 * self.chosen["tiles"]

    @cached_property
    def owners(self) -> int:
        return min(self.chosen["k_warps"], self.lane_rows)

    @cached_property
    def outputs(self) -> int:
        """Of a warp's product, a unit."""
        return self.chosen["blocks"] // self.chosen["k_warps"] if self.kernel.backward else self.kernel.gates

    @cached_property
    def chunk(self) -> int:
        """Outputs that are computed together."""
        if not self.kernel.backward:
            return self.outputs
        return next(count for count in (4, 3, 2, 1) if self.outputs % count == 0)

    @cached_property
    def steps(self) -> int:
        """Parts of one sum."""
        if self.kernel.backward:
            return self.kernel.gates * self.units // self.kernel.part
        return -(-self.units * self.chosen["blocks"] // self.kernel.part // self.chosen["k_warps"])

    @cached_property
    def depth(self) -> int:
        """Inputs in shared memory, a row."""
        return self.steps * self.kernel.part * (1 if self.kernel.backward else self.chosen["k_warps"])

    @cached_property
    def parts(self) -> int:
        return self.outputs // self.chunk * self.steps

    @cached_property
    def kept(self) -> int:
        return min(self.chosen["k_regs"], self.parts)

    @cached_property
    def held(self) -> int:
        return min(self.kept + self.chosen["k_shared"], self.parts)

    @cached_property
    def part_bytes(self) -> int:
        """Of all threads of a block."""
        return self.chunk * self.threads * self.kernel.fragment

    @cached_property
    def part_words(self) -> int:
        """Registers of a lane's weights of one part."""
        return self.chunk * self.kernel.fragment // 4

    @property
    def owned(self) -> int:
        """Rows that a lane finishes."""
        return self.lane_rows // self.owners

    @cached_property
    def received(self) -> int:
        """Bytes that a block gets from all blocks in a step."""
        kernel, warps = self.kernel, self.chosen["unit_warps"] * self.chosen["blocks"]
        size = kernel.number if kernel.backward else kernel.size
        return warps * 32 * self.lane_rows * kernel.lane_units * size

    @cached_property
    def ahead(self) -> int:
        """Bytes of shared memory for each step that is read ahead."""
        kernel = self.kernel
        owner_rows = 32 * self.chosen["unit_warps"] * self.lane_rows  # all lanes' rows that owners have
        slot = max(kernel.vec * kernel.size, 4) // kernel.vec  # bytes of a unit
        return kernel.reads * owner_rows * kernel.lane_units * slot

    def shared_bytes(self) -> int:
        """Of a block: weights, what is read ahead, partial sums, and inputs of this step and the next."""
        kernel, chosen = self.kernel, self.chosen
        count = 1 if kernel.backward else kernel.gates
        sums = self.threads * self.lane_rows * count * kernel.lane_units * kernel.number if chosen["k_warps"] > 1 else 0
        inputs = 2 * 8 * chosen["tiles"] * (self.depth + (8 if kernel.narrow else 0)) * kernel.size
        cluster = chosen["exchange"] == CLUSTER
        exchange = cluster * (16 + (2 * self.received if kernel.backward else 0))
        total = (self.held - self.kept) * self.part_bytes + chosen["ring"] * self.ahead + sums + inputs + exchange
        return max(total, self.part_bytes if kernel.narrow and self.kept else 0)

    def workspace_bytes(self) -> int:
        """Of a block, in global memory: the weights that neither registers nor shared memory hold."""
        return 0 if self.chosen["direct"] else (self.parts - self.held) * self.part_bytes

    def packet_bytes(self) -> int:
        """Of a team, in global memory: two slots of packets, each as large as the data again."""
        if self.chosen["exchange"] != GRID:
            return 0
        return 2 * 2 * self.received * (self.chosen["blocks"] if self.kernel.backward else 1)


# ---- registers
#
# Of a thread, beside its weights: what it needs, or the compiler spills, and what the compiler takes where it is free.
# Both are sums of the numbers below, in tenths, times those of `features`, by direction and size of a number. They are
# bounds of what the compiler made of some thousand kernels for five architectures, found by linear programming.

# fmt: off
REGISTERS: dict[tuple[str, int], dict[str, tuple[int, int]]] = {
    ("forward", 2): {
        "lstm": (-300, -300), "gru": (-258, -37), "slstm": (-140, -230), "elman": (-300, 383), "newer": (0, 6),
        "cells": (32, 22), "states": (0, 6), "gates": (13, 3), "tiles": (170, 174), "chunk": (0, 274),
        "sums": (37, 41), "steps": (44, 2), "read": (1, 9), "beyond": (0, 12), "fragments": (55, 0),
        "gathered": (72, 165), "grid": (398, 149), "shared_sums": (163, 0), "singles": (0, 1),
    },
    ("forward", 4): {
        "lstm": (-300, -300), "gru": (-105, -111), "slstm": (-194, -300), "elman": (321, 391), "newer": (0, 130),
        "cells": (71, 111), "tiles": (224, 60), "chunk": (184, 301), "beyond": (33, 0), "fragments": (88, 48),
        "direct": (0, 160), "gathered": (0, 13), "cluster": (165, 118), "grid": (275, 219),
    },
    ("forward", 8): {
        "lstm": (-207, -300), "gru": (-300, -150), "slstm": (-300, -120), "elman": (-300, 610), "newer": (100, 0),
        "gates": (8, 39), "chunk": (0, 147), "beyond": (598, 0), "fragments": (142, 45), "grid": (0, 220),
        "shared_sums": (0, 190),
    },
    ("backward", 2): {
        "lstm": (-104, 198), "gru": (40, 337), "slstm": (-49, 229), "elman": (151, 426), "newer": (23, 0),
        "cells": (0, 12), "states": (23, 23), "gates": (36, 36), "tiles": (103, 0), "chunk": (6, 12),
        "chunks": (410, 460), "sums": (49, 57), "inputs": (47, 0), "steps": (14, 25), "beyond": (122, 0),
        "fragments": (0, 19), "direct": (0, 1040), "gathered": (166, 0), "cluster": (53, 75), "grid": (132, 152),
        "shared_sums": (38, 130),
    },
    ("backward", 4): {
        "lstm": (390, 946), "gru": (540, 888), "slstm": (242, 1006), "elman": (280, 970), "newer": (3, 120),
        "cells": (83, 57), "states": (60, 5), "gates": (0, 27), "tiles": (162, 165), "chunks": (519, 570),
        "fragments": (90, 35), "gathered": (0, 22), "cluster": (0, 2), "grid": (161, 82), "shared_sums": (0, 81),
    },
    ("backward", 8): {
        "lstm": (-300, -283), "gru": (-300, -232), "slstm": (-300, -183), "elman": (-300, -300), "cells": (0, 137),
        "states": (81, 0), "gates": (18, 71), "tiles": (480, 164), "chunk": (62, 52), "chunks": (630, 577),
        "beyond": (300, 0), "fragments": (0, 15), "cluster": (0, 297), "grid": (160, 0), "shared_sums": (0, 714),
    },
}
# fmt: on


def features(layout: Layout, split: int, arch: int, beyond: bool, direct: bool) -> dict[str, int]:
    """What a thread's registers depend on, apart from the weights that they hold.

    Args:
        beyond: some weights are in shared memory or streamed.
    """
    kernel, chosen = layout.kernel, layout.chosen
    chunk, tiles = layout.chunk * kernel.words, chosen["tiles"]
    cells = layout.owned * kernel.lane_units * kernel.words
    unrolled = min(layout.steps, MOST_UNROLLED) if kernel.narrow else 0
    return {
        kernel.op: 1,
        "newer": arch >= 100,
        "cells": cells,
        "states": cells * len(STATES[kernel.op]),
        "gates": cells * kernel.gates,
        "tiles": tiles - 1,
        "chunk": chunk,
        "chunks": layout.outputs > layout.chunk,
        "sums": tiles * chunk * split if kernel.narrow else 0,
        "inputs": tiles * chunk if kernel.narrow else 0,
        "steps": unrolled,
        "read": unrolled * chunk * beyond,
        "beyond": beyond,
        "fragments": chunk * beyond,
        "direct": direct,
        "gathered": chunk * direct * min(layout.steps, 2 if kernel.narrow else 4),  # that are loaded at once
        "cluster": chosen["exchange"] == CLUSTER,
        "grid": chosen["exchange"] == GRID,
        "shared_sums": chosen["k_warps"] > 1,
        "singles": kernel.vec < kernel.lane_units,
    }


SPARE = 8  # registers that are left free: what is needed is no exact number
MOST_UNROLLED = 8  # steps whose loads the compiler moves to the front of a loop


def registers_without(
    layout: Layout, split: int, arch: int, beyond: bool = False, direct: bool = False
) -> tuple[int, int]:
    """Registers of a thread without its weights: needed, and taken."""
    of = REGISTERS[layout.kernel.direction, layout.kernel.size]
    needed = taken = 0
    for name, count in features(layout, split, arch, beyond, direct).items():
        if count and name in of:
            needed += count * of[name][0]
            taken += count * of[name][1]
    return -(-needed // 10), -(-taken // 10)


# ---- the choice
#
# Times are estimates from what `seqops.tune.device` knows of a device, which a probe may have measured, and from the
# constants here. INSTRUCTIONS are counted in the machine code of the loops over steps for sm_90a.

INSTRUCTIONS = {  # of a warp for a cell in 16 bits, with what it reads and stores
    **{"lstm.forward": 110, "lstm.backward": 195, "gru.forward": 90, "gru.backward": 175},
    **{"slstm.forward": 175, "slstm.backward": 245, "elman.forward": 60, "elman.backward": 80},
}
WIDER = {2: 1, 4: 2, 8: 5}  # so many times the instructions, by the size of a number
CELL_CYCLES = 150  # of a cell's operations after each other
EARLY = 0.4  # of a cell's backward, before the gradients of other blocks arrive
SHARED_BYTES = 128  # a cycle and multiprocessor, of shared memory
L2_BYTES, MOST_L2_BYTES = 24, 48  # the same of the second cache, while all multiprocessors read and while few do
L2_SHARE = 0.75  # of the second cache holds weights that are read again
SCIENTIFIC = (80, 90, 100, 103)  # architectures with float64 at half the rate of float32; others have a 64th

WORTH = 3.0  # what takes so many times as long as the best choice is not worth looking at
SPLITS, RINGS = (1, 2, 4), (2, 4, 8)
MOST_DIRECT = 4  # steps for which weights may be read as they lie


BySplit = dict[int, int]


class Shape(NamedTuple):
    """How a head is shared: four variables, and what follows from them.

    Times in microseconds. A choice takes

        start + waves (load + T step),   step = fixed + product + (parts that are streamed) stream
    """

    unit_warps: int
    k_warps: int
    exchange: int
    tiles: int
    blocks: int
    threads: int
    parts: int
    part_bytes: int
    fixed_bytes: int  # of shared memory
    ring_bytes: int  # of it, a step that is read ahead
    staged: int  # the least where parts are kept in registers: they pass through it
    most_registers: int
    kept: BySplit  # parts in registers
    needed: tuple[BySplit, BySplit]  # registers, by `direct`: with fewer the compiler spills
    registers: tuple[BySplit, BySplit]  # that it takes at most
    start: float
    waves: int
    load: float
    fixed: float
    issue: float
    chain: dict[int, float]
    read: float  # inputs from shared memory
    read_part: float  # the same of a part of the weights
    stream: float
    direct: float  # of a part of the weights as r lies
    resident_bytes: int  # of a part, in all blocks that run at once

    @property
    def code(self) -> int:
        """What follows from the four variables is looked up under this number."""
        return code_of(self.unit_warps, self.k_warps, self.exchange, self.tiles)


TABLES = (
    *("parts", "part_bytes", "fixed_bytes", "ring_bytes", "staged", "waves", "start", "load", "fixed", "issue"),
    *("read", "read_part", "stream", "direct", "resident_bytes"),
)


def code_of(unit_warps: Any, k_warps: Any, exchange: Any, tiles: Any) -> Any:
    return unit_warps * 256 + k_warps * 16 + exchange * 5 + tiles


def shapes(device: Any, key: Any) -> list[Shape]:
    """All of them, also those that do not fit."""
    kernel = Pass.of(key)
    rows = -(-key["B"] // 8)
    widest = 32 if kernel.groups <= 32 else 16
    counts = {-(-kernel.groups // blocks) for blocks in range(1, kernel.groups + 1)}
    found = []
    for unit_warps in sorted(count for count in counts if count <= widest):
        blocks = -(-kernel.groups // unit_warps)
        exchanges = [ALONE] if blocks == 1 else [CLUSTER, GRID] if 1 < blocks <= device.max_cluster else [GRID]
        for k_warps in (1, 2, 4, 8):
            if kernel.backward:
                # Outputs that fall into many small chunks share few loads of their inputs.
                outputs = blocks // k_warps
                unfit = blocks % k_warps or (outputs > 4 and outputs % 3 and outputs % 4)
            else:
                unfit = kernel.groups * kernel.group // kernel.part < k_warps
            if unfit or 32 * unit_warps * k_warps > MOST_THREADS or (k_warps > 1 and unit_warps >= 16):
                continue
            for exchange in exchanges:
                for tiles in (1, 2, 4):
                    if tiles < 2 * rows:
                        found.append(_shape(device, key, kernel, unit_warps, k_warps, exchange, tiles))
    return found


def _shape(device: Any, key: Any, kernel: Pass, unit_warps: int, k_warps: int, exchange: int, tiles: int) -> Shape:
    blocks = -(-kernel.groups // unit_warps)
    named = {"exchange": exchange, "blocks": blocks, "unit_warps": unit_warps, "k_warps": k_warps, "tiles": tiles}
    layout = Layout(kernel, {**named, "k_regs": 0, "k_shared": 0, "direct": 0, "split": 1, "ring": 0})
    cycle = 1e-3 / device.clock_ghz
    threads, steps, parts, part_bytes = layout.threads, layout.steps, layout.parts, layout.part_bytes
    warps, chunks = threads // 32, layout.outputs // layout.chunk
    alone_step = key["T"] == 1 and not kernel.backward  # hands nothing over

    cap = device.thread_registers(threads)
    kept, needed, registers = _in_registers(layout, device.arch, cap)

    # Teams, and how many of them run at once.
    teams = key["H"] * -(-key["B"] // (8 * tiles))
    together = device.processors // blocks
    if exchange == CLUSTER:
        # Of one GPC: what a cluster of the largest size leaves is used by none.
        together = device.cluster_processors // device.max_cluster * (device.max_cluster // blocks)
    waves = -(-teams * blocks // device.processors) if alone_step else -(-teams // max(together, 1))
    launches = waves if exchange == GRID and not alone_step else 1
    weights = key["H"] * kernel.gates * kernel.dim**2 * kernel.size / device.bandwidth

    # The product of a step.
    if kernel.narrow:
        issue = tiles * layout.outputs * steps * -(-warps // 4) * device.mma_issue_cycles
        chain = {split: chunks * (-(-steps // split) * device.mma_cycles + 4 * split * layout.chunk) for split in kept}
        input_bytes = tiles * chunks * warps * steps * 256
    else:
        issue = tiles * 8 * layout.outputs * steps * threads / multiply_adds(device, kernel)
        chain = {1: tiles * chunks * (steps * 4 + 20 * layout.chunk)}
        input_bytes = tiles * chunks * warps * steps * 32 * kernel.number
    together_parts = 2 if kernel.narrow else 4  # that a warp reads at once
    active = blocks * min(teams, max(together, 1))
    bandwidth = min(MOST_L2_BYTES, L2_BYTES * max(device.processors / active, 1)) / cycle
    gathered = part_bytes / (bandwidth / 2)  # single numbers

    turn = _turn_us(device, layout, handed=exchange != ALONE and not alone_step, bandwidth=bandwidth)

    return Shape(
        **named,
        threads=threads,
        parts=parts,
        part_bytes=part_bytes,
        fixed_bytes=layout.shared_bytes(),
        ring_bytes=layout.ahead,
        staged=part_bytes if kernel.narrow else 0,
        most_registers=cap,
        kept=kept,
        needed=needed,
        registers=registers,
        start=launches * device.launch_us,
        waves=waves,
        # Two fragments after the others go to their place; all together come from memory.
        load=max(parts * layout.chunk * device.memory_latency_us / 2, parts * gathered, weights / waves),
        fixed=turn,
        issue=issue * cycle,
        chain={split: each * cycle for split, each in chain.items()},
        read=input_bytes / SHARED_BYTES * cycle,
        read_part=part_bytes / SHARED_BYTES * cycle,
        stream=max(device.l2_hit_us / together_parts, part_bytes / bandwidth),
        direct=max(device.memory_latency_us / together_parts, gathered),
        resident_bytes=part_bytes * active,
    )


def _in_registers(
    layout: Layout, arch: int, cap: int
) -> tuple[BySplit, tuple[BySplit, BySplit], tuple[BySplit, BySplit]]:
    """By split, the parts that registers hold without spills; then by `direct` and split, registers needed and taken.

    Args:
        cap: registers that a thread can have.
    """
    kept: BySplit = {}
    needed: tuple[BySplit, BySplit] = ({}, {})
    registers: tuple[BySplit, BySplit] = ({}, {})
    words, room_for_weights = layout.part_words, cap - SPARE
    for split in SPLITS if layout.kernel.narrow else (1,):
        if split > layout.steps:
            continue
        least, taken = registers_without(layout, split, arch)
        kept[split] = layout.parts
        if least + layout.parts * words > room_for_weights:
            least, taken = registers_without(layout, split, arch, beyond=True)
            kept[split] = min(max((room_for_weights - least) // words, 0), layout.parts - 1)
        held = kept[split] * words
        needed[0][split], registers[0][split] = least + held, min(taken + held, cap)
        least, taken = registers_without(layout, split, arch, direct=True)
        needed[1][split], registers[1][split] = least, min(taken, cap)
    return kept, needed, registers


def _turn_us(device: Any, layout: Layout, handed: bool, bandwidth: float) -> float:
    """What nothing overlaps in a step: the exchange, a lane's cells one after the other, the sums of several warps.

    Args:
        handed: between blocks.
        bandwidth: of the second cache, for one multiprocessor.
    """
    kernel, chosen, received = layout.kernel, layout.chosen, layout.received
    cycle, tiles, warps = 1e-3 / device.clock_ghz, chosen["tiles"], layout.threads // 32
    instructions = INSTRUCTIONS[kernel.name] * WIDER[kernel.size]
    if kernel.size == 8 and device.arch not in SCIENTIFIC:
        instructions *= 16
    cells = -(-chosen["unit_warps"] * layout.owners // 4) * layout.owned * kernel.lane_units  # of a warp scheduler
    cell = (CELL_CYCLES + cells * instructions) * cycle

    wait = device.sync_cycles * cycle
    if handed and chosen["exchange"] == CLUSTER:
        wait = (device.dsmem_cycles + received / device.dsmem_bytes_per_clock) * cycle
    elif handed:
        # Half of a packet is its number. Loads come in turns.
        blocks = -(-chosen["blocks"] // chosen["k_warps"])
        turns = -(-blocks // 4) * tiles if kernel.backward else -(-received // (4 * 32 * 8 * warps))
        moved = 2 * received * (2 if kernel.backward else 1)
        wait += device.l2_hop_us + (turns - 1) * device.l2_hit_us + moved / bandwidth
    if kernel.backward and chosen["exchange"] != ALONE:
        wait += (device.sync_cycles + received / SHARED_BYTES) * cycle
        wait -= min(wait, EARLY * cell)
    if chosen["k_warps"] > 1:
        count = 1 if kernel.backward else kernel.gates
        sums = layout.threads * 2 * tiles * count * kernel.lane_units * kernel.number
        wait += (device.sync_cycles + 2 * sums / SHARED_BYTES) * cycle
    return wait + cell


def most(*values: Any) -> Any:
    """The largest number, or an expression for it."""
    return csp.max_(values) if any(isinstance(value, csp.Expression) for value in values) else max(values)


def either(chosen: Any, yes: Any, no: Any) -> Any:
    """By a number that is 0 or 1, or by a variable."""
    return csp.where(chosen == 1, yes, no) if isinstance(chosen, csp.Expression) else yes if chosen else no


def room(capacity: int, shape: Any, kept: Any, ring: Any) -> Any:
    """Parts that shared memory holds, beside those in registers."""
    left = most(capacity - shape.fixed_bytes - ring * shape.ring_bytes, 0)
    return -most(-(left // shape.part_bytes), kept - shape.parts)


def step_us(device: Any, shape: Any, chain: Any, k_regs: Any, k_shared: Any, direct: Any, ring: Any) -> Any:
    """One step, of a shape or of expressions for what it has."""
    beyond = shape.parts - k_regs - k_shared
    product = most(shape.issue, chain, shape.read + k_shared * shape.read_part)
    streamed = beyond * either(direct, shape.direct, shape.stream)
    # What the second cache does not hold comes from memory.
    over = most(beyond * shape.resident_bytes - int(L2_SHARE * device.l2_bytes), 0) / device.bandwidth
    # What a step reads was asked for `ring` steps before.
    return most(shape.fixed + product + streamed + over, 2 * device.memory_latency_us / ring)


def whole_us(device: Any, key: Any, shape: Any, direct: Any, step: Any) -> Any:
    load = either(direct, 0.0, shape.load)
    return shape.start + shape.waves * (device.memory_latency_us + load + key["T"] * step)


class Plan(NamedTuple):
    """A shape, in microseconds what all of its choices take at least, and its best one: infinite where none fits."""

    least: float
    shape: Shape
    best: float


def plans(device: Any, key: Any) -> list[Plan]:
    """Of the shapes that are worth looking at, the most promising first; where nothing fits of all."""
    ordered = sorted((_least(device, key, shape), shape.code, shape) for shape in shapes(device, key))
    found: list[Plan] = []
    best = math.inf
    for least, _, shape in ordered:
        if least <= WORTH * best:
            found.append(Plan(least, shape, _best(device, key, shape)))
            best = min(best, found[-1].best)
    return [plan for plan in found if plan.best < math.inf] or found


def directs(key: Any) -> tuple[int, ...]:
    return (0, 1) if key["T"] <= MOST_DIRECT else (0,)


def _least(device: Any, key: Any, shape: Shape) -> float:
    """As if every number could be had at its best."""
    kept, chain = max(shape.kept.values()), min(shape.chain.values())
    shared = max(room(device.shared_per_block, shape, 0, RINGS[0]), 0)
    shared = min(shared, shape.parts - kept)

    def whole(direct: int) -> float:
        of, in_registers, in_shared = shape._replace(read_part=0.0), kept, shared
        if direct:
            in_registers = in_shared = 0
        step = step_us(device, of, chain, in_registers, in_shared, direct, RINGS[-1])
        return whole_us(device, key, of, direct, step)

    return min(map(whole, directs(key)))


def _best(device: Any, key: Any, shape: Shape) -> float:
    if shape.exchange == CLUSTER and shape.blocks > device.max_cluster:
        return math.inf
    if shape.exchange == GRID and shape.blocks > most_blocks(device, key):
        return math.inf
    best = math.inf
    for direct, split, ring in itertools.product(directs(key), shape.kept, RINGS):
        kept = 0 if direct else shape.kept[split]
        shared = 0 if direct else room(device.shared_per_block, shape, kept, ring)
        used = max(shape.fixed_bytes + ring * shape.ring_bytes + shared * shape.part_bytes, shape.staged * (kept > 0))
        if shape.needed[direct][split] > shape.most_registers or used > device.shared_per_block:
            continue
        step = step_us(device, shape, shape.chain[split], kept, shared, direct, ring)
        best = min(best, whole_us(device, key, shape, direct, step))
    return best


def most_blocks(device: Any, key: Any) -> int:
    """Of a head over the grid: those that wait for each other have to run together."""
    kernel = Pass.of(key)
    return device.processors if kernel.backward or key["T"] > 1 else kernel.groups


def problem(device: Any, key: Any) -> csp.Problem:
    """Constants of the kernel, and its time in microseconds, for T steps of B rows of H heads of D units."""
    looked = plans(device, key)
    listed = [plan.shape for plan in looked]
    p = csp.Problem(str(key))
    exchange = p.int("exchange", values={shape.exchange for shape in listed})
    blocks = p.int("blocks", values={shape.blocks for shape in listed})
    unit_warps = p.int("unit_warps", values={shape.unit_warps for shape in listed})
    k_warps = p.int("k_warps", values={shape.k_warps for shape in listed})
    tiles = p.int("tiles", values={shape.tiles for shape in listed})
    k_regs = p.int("k_regs", 0, max(shape.parts for shape in listed))
    k_shared = p.int("k_shared", 0, max(shape.parts for shape in listed))
    direct = p.int("direct", values=directs(key))
    split = p.int("split", values={split for shape in listed for split in shape.kept})
    ring = p.int("ring", values=RINGS)
    # Then what is left to try is next to each other in the tables.
    p.order(unit_warps, k_warps, exchange, tiles, direct, split, ring)

    code = code_of(unit_warps, k_warps, exchange, tiles)

    def of(name: str) -> csp.Expression:
        return csp.lookup(code, {shape.code: getattr(shape, name) for shape in listed})

    def by_split(tables: Callable[[Shape], Mapping[int, float]]) -> csp.Expression:
        table = {8 * shape.code + each: value for shape in listed for each, value in tables(shape).items()}
        return csp.lookup(8 * code + split, table)

    def by_place(name: str) -> Any:
        def of_place(place: int) -> csp.Expression:
            return by_split(lambda shape: getattr(shape, name)[place])

        return either(direct, of_place(1), of_place(0)) if len(directs(key)) > 1 else of_place(0)

    shape = SimpleNamespace(**{name: of(name) for name in TABLES})
    p.add(blocks == of("blocks"), "every block has units")
    p.add(csp.implies(exchange == CLUSTER, blocks <= device.max_cluster), "blocks of a cluster")
    p.add(csp.implies(exchange == GRID, blocks <= most_blocks(device, key)), "blocks that run together")
    kept = by_split(lambda shape: shape.kept)
    p.define("threads", of("threads"))
    p.define("registers", by_place("registers"))
    p.add(by_place("needed") <= of("most_registers"), "registers fit")
    p.add(k_regs == either(direct, 0, kept), "registers hold what they can")
    held = room(device.shared_per_block, shape, kept, ring)
    p.add(k_shared == either(direct, 0, held), "shared memory holds what it can")
    used = shape.fixed_bytes + ring * shape.ring_bytes + k_shared * shape.part_bytes
    shared = p.define("shared", csp.max_(used, csp.where(k_regs > 0, shape.staged, 0)))
    p.add(shared <= device.shared_per_block, "shared memory of a block")

    step = p.define("step", step_us(device, shape, by_split(lambda shape: shape.chain), k_regs, k_shared, direct, ring))
    p.define("step by step", stepwise_us(device, key))
    whole = whole_us(device, key, shape, direct, step)
    least = csp.lookup(code, {plan.shape.code: plan.least for plan in looked})
    p.minimize(csp.max_(least, whole), then=(shared, split))
    return p


def fits(device: Any, key: Any) -> bool:
    """Whether the device can hold the heads."""
    return device.arch >= LEAST_ARCH and any(plan.best < math.inf for plan in plans(device, key))


def fused(device: Any, key: Any) -> bool:
    """Whether the kernel of whole sequences serves: it fits, and one step after the other would take longer."""
    if device.arch < LEAST_ARCH:
        return False
    return min((plan.best for plan in plans(device, key)), default=math.inf) <= stepwise_us(device, key)


# ---- step by step

HOST_US = 10.0  # from one step's two launches to those of the next, by the loop in Python
PRODUCT_SHARE = 0.6  # of the peak, by a library's batched product


def stepwise_us(device: Any, key: Any) -> float:
    """What cuda_alternating.py takes, in microseconds: a step is a product and a pointwise kernel, and both wait for
    the one before. A product reads all weights, whatever few rows it is for."""
    kernel = Pass.of(key)
    cells, gates = key["B"] * key["H"] * kernel.dim, kernel.gates
    weights = key["H"] * gates * kernel.dim**2 * kernel.size
    rate = device.fma_bf16 if kernel.narrow else multiply_adds(device, kernel)
    multiply = cells * gates * kernel.dim / (PRODUCT_SHARE * rate * device.processors * 1e3 * device.clock_ghz)
    cached = L2_BYTES * device.processors * 1e3 * device.clock_ghz
    read = weights / (cached if weights <= L2_SHARE * device.l2_bytes else device.bandwidth)
    pointwise = cells * (kernel.reads * kernel.size + 2 * gates * kernel.number) / device.bandwidth
    step = max(multiply, read, device.launch_us) + max(pointwise, device.launch_us)
    return 2 * weights / device.bandwidth + key["T"] * max(step, HOST_US)


def multiply_adds(device: Any, kernel: Pass) -> float:
    """A cycle and multiprocessor, without tensor cores."""
    return device.fma_f32 / (1 if kernel.size <= 4 else 2 if device.arch in SCIENTIFIC else 64)


# ---- without a device

SIMULATED_SHARED = 227 << 10
REGIMES = {"block": ALONE, "cluster": CLUSTER, "grid": GRID}
simulated_regime = "block"  # of choices for the simulator; heads of one warp's units have one block in any


def simulated(kernel: Pass, batch: int, time: int) -> dict[str, int]:
    """For the simulator: few blocks, and weights in registers, in shared memory and, over the grid, in neither."""
    exchange = REGIMES[simulated_regime] if kernel.groups > 1 else ALONE
    if exchange == ALONE and kernel.groups > 16:  # more warps than a block has, or more weights
        exchange = GRID
    unit_warps = kernel.groups if exchange == ALONE else -(-kernel.groups // 4)
    blocks = -(-kernel.groups // unit_warps)
    chosen = {
        "exchange": exchange if blocks > 1 else ALONE,
        "blocks": blocks,
        "unit_warps": unit_warps,
        "k_warps": (2 if blocks % 2 == 0 else 1) if kernel.backward else 2 if unit_warps < 16 else 1,
        "tiles": 2 if kernel.narrow and batch > 16 else 1,
        "split": 2 if kernel.narrow else 1,
        "ring": 2,
        "direct": int(exchange == GRID and time <= 4),
    }
    parts = Layout(kernel, {**chosen, "k_regs": 0, "k_shared": 0}).parts
    places = 3 if exchange == GRID else 2
    share = 0 if chosen["direct"] else -(-parts // places)
    chosen |= {"k_regs": share, "k_shared": share}
    while chosen["k_shared"] and Layout(kernel, chosen).shared_bytes() > SIMULATED_SHARED:
        chosen["k_shared"] -= 1
    return chosen


# ---- the launch


class Launch(NamedTuple):
    """Blocks of one team are next to each other. `teams`: one for each head and batch tile."""

    constants: dict[str, int | str]
    teams: int
    blocks: int  # of a team
    threads: int
    shared: int
    cluster: int
    cooperative: bool
    workspace: int  # bytes of a block
    packets: int  # bytes of a team


def launch(kernel: Pass, chosen: Mapping[str, int], heads: int, batch: int, time: int) -> Launch:
    layout = Layout(kernel, chosen)
    # A forward of one step hands nothing over.
    cooperative = chosen["exchange"] == GRID and (kernel.backward or time > 1)
    return Launch(
        constants=compiled(kernel, chosen),
        teams=heads * -(-batch // (8 * chosen["tiles"])),
        blocks=chosen["blocks"],
        threads=layout.threads,
        shared=layout.shared_bytes(),
        cluster=chosen["blocks"] if chosen["exchange"] == CLUSTER else 1,
        cooperative=cooperative,
        workspace=layout.workspace_bytes(),
        packets=layout.packet_bytes() if cooperative else 0,
    )


def compiled(kernel: Pass, chosen: Mapping[str, int]) -> dict[str, int | str]:
    """The constants that a choice compiles with."""
    sizes = {name.upper(): chosen[name] for name in VARIABLES}
    fixed = {"STORAGE": STORAGE[kernel.dtype], "DIM": kernel.dim, "VEC": kernel.vec, "BACKWARD": int(kernel.backward)}
    return {**fixed, **sizes, **({} if kernel.backward else {"TRAIN": int(kernel.train)})}
