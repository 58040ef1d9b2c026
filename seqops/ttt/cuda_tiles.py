"""What the CUDA kernels of the memory are compiled with and launched as: the tuner's problem and its consequences.

Letters: F hidden channels, C tokens of a chunk, R rows of tensor-core tiles for a chunk.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..tune import csp

CHANNELS = 64  # D
HIDDEN = (64, 128, 256)  # F
ROWS = (16, 32, 64)  # R
LEAST_ARCH = 80
WARPS = (4, 8)
UNITS = (16, 32)  # hidden channels of a warp
# Float32 weights and momentum in a lane's registers, of 255: the products need the others.
MOST_HELD = 128
# With all of them the compiler takes what it may; with half of them what it took at most.
REGISTERS, REGISTERS_OF_HALF = 255, 184
CLUSTERS = (1, 2, 4)
ITEMS = tuple(1 << n for n in range(13))

SOURCES = {"forward": "ttt/memory.cu", "backward": "ttt/memory_backward.cu"}
# The backward carries adjoints of weights and of momentum, and of a chunk what they give: one block; with 32 rows the
# compiler spills.
BACKWARD_HIDDEN, BACKWARD_ROWS = (64, 128), (16,)


class Pass(NamedTuple):
    """A kernel for given sizes. `rows`: the tokens of a chunk, rounded up to one of ROWS."""

    direction: str
    dtype: str
    hidden: int
    rows: int
    momentum: bool

    @staticmethod
    def of(key: Any) -> Pass:
        return Pass(key.kernel.split(".")[1], key.dtype, key["F"], key["R"], "momentum" in key.flags)

    @property
    def backward(self) -> bool:
        return self.direction == "backward"

    @property
    def carried(self) -> int:
        """Matrices of a layer that pass from chunk to chunk."""
        return 2 if self.momentum or self.backward else 1

    def held(self, units: int) -> int:
        """Registers of a lane's weights."""
        return 2 * self.carried * units * CHANNELS // 32

    def registers(self, units: int) -> int:
        """Of a thread, at most."""
        return REGISTERS if self.held(units) > MOST_HELD // 2 else REGISTERS_OF_HALF

    def shared_bytes(self, units: int, warps: int, buffers: int) -> int:
        """As the kernels take them, one array after the other."""
        rows, width = self.rows, units * warps
        tokens = rows * (CHANNELS + 8) * 2
        hidden = rows * warps * (units + 8) * 2
        weights = self.carried * width * (CHANNELS + 8) * 2
        pairs = rows * (rows + 8)
        if self.backward:
            rounded = 6 * tokens + 5 * hidden + 5 * (weights // self.carried) + 4 * 2 * pairs
            sums = 4 * (pairs + 4 * warps * rows + 2 * CHANNELS // 8 * rows + 2 * rows * (CHANNELS + 4) + 4 * warps)
            coefficients = 4 * (2 * pairs + 8 * rows + 4)
            return rounded + sums + coefficients + 160  # pointers and strides
        coefficients = 4 * pairs + 4 * 7 * rows + 16
        sources = 80  # pointers and strides
        return (3 * buffers + 1) * tokens + 3 * hidden + weights + 2 * pairs + coefficients + sources


def rows_of(chunk: int) -> int | None:
    """Of a chunk of so many tokens; None where it is too long."""
    return next((rows for rows in ROWS if chunk <= rows), None)


def served(direction: str) -> tuple[tuple[int, ...], int]:
    """F, and the most tokens of a chunk."""
    return (BACKWARD_HIDDEN, BACKWARD_ROWS[-1]) if direction == "backward" else (HIDDEN, ROWS[-1])


def is_served(kernel: Pass) -> bool:
    hidden, longest = served(kernel.direction)
    return kernel.hidden in hidden and kernel.rows <= longest


# ---- the choice

ROW_BLOCK_CYCLES = 300  # from one instruction that needs another's result to the next, for 16 rows of one product
COLUMN_CYCLES = 12  # of one token of the coefficients
SIMULATED_SHARED = 227 * 1024


class Shape(NamedTuple):
    """How a choice shares out the hidden channels."""

    cluster: int  # blocks
    units: int
    warps: int
    buffers: int

    @property
    def code(self) -> int:
        """One number for what is chosen."""
        return self.cluster * 100 + self.units * 2 + self.buffers


def shapes(device: Any, kernel: Pass) -> list[Shape]:
    """All that the device can hold."""
    if not is_served(kernel):
        return []
    found = []
    for blocks in (1,) if kernel.backward else CLUSTERS:
        for units in (16,) if kernel.backward else UNITS:
            warps, rest = divmod(kernel.hidden, blocks * units)
            fast = units < 32 or device.arch >= 90  # before, the compiler spills
            if rest or warps not in WARPS or kernel.held(units) > MOST_HELD or blocks > device.max_cluster or not fast:
                continue
            for buffers in (1,) if kernel.backward else (1, 2):
                shared = kernel.shared_bytes(units, warps, buffers)
                if device.blocks_resident(32 * warps, kernel.registers(units), shared):
                    found.append(Shape(blocks, units, warps, buffers))
    return found


def fits(device: Any, kernel: Pass) -> bool:
    return device.arch >= LEAST_ARCH and bool(shapes(device, kernel))


def chunk_cycles(device: Any, kernel: Pass, shape: Shape) -> tuple[float, float]:
    """Of one chunk: those in which a quarter of a multiprocessor issues products for one block, and those between."""
    tiles, units, warps = kernel.rows // 16, shape.units, shape.warps
    if kernel.backward:
        # What the forward of the segment does, and about three times as much: 21 products of [R, 64, F], 7 of pairs.
        own = 21 * tiles * units // 8 * 4 + 5 * tiles * (tiles + 1) // 2 * units // 8
        shared = 2 * tiles * (tiles + 1) * (4 + units * warps // 16) + 4 * tiles * (tiles + 1) * 8
        issue = (own + shared / warps) * warps / 4 * device.mma_issue_cycles
        waits = 18 * device.sync_cycles + 3 * COLUMN_CYCLES * kernel.rows + 16 * tiles * ROW_BLOCK_CYCLES
        return issue, waits + device.memory_latency_us * 1e3 * device.clock_ghz
    more = kernel.carried
    own = tiles * units // 8 * 4 * (3 + more)  # a twice, delta2 W2, Q W1' and Q S1'
    own += tiles * (tiles + 1) // 2 * units // 8 + 2 * more * tiles * units // 16 * 8  # pairs times delta1; learning
    shared = tiles * 8 * (units * warps // 16) * (1 + more)  # h W2', H W2' and H S2'
    shared += tiles * (tiles + 1) * (4 + units * warps // 16) + tiles * (tiles + 1) // 2 * 8
    issue = (own + shared / warps) * warps / 4 * device.mma_issue_cycles
    waits = 6 * device.sync_cycles + COLUMN_CYCLES * kernel.rows + 4 * tiles * ROW_BLOCK_CYCLES
    waits += (1 + more) * units * warps / 16 * device.mma_cycles
    if shape.cluster > 1:
        received = kernel.rows * CHANNELS * 4 * shape.cluster
        waits += 2 * (2 * device.dsmem_cycles + received / device.dsmem_bytes_per_clock)
    if shape.buffers == 1:
        waits += device.memory_latency_us * 1e3 * device.clock_ghz
    return issue, waits


def time_us(device: Any, kernel: Pass, shape: Shape, items: int) -> float:
    """Of 64 chunks of `items` memories."""
    shared = kernel.shared_bytes(shape.units, shape.warps, shape.buffers)
    resident = device.blocks_resident(32 * shape.warps, kernel.registers(shape.units), shared)
    processors = device.processors if shape.cluster == 1 else min(device.processors, device.cluster_processors)
    together = max(processors * resident // shape.cluster, 1)
    waves = -(-items // together)
    sharing = min(resident, -(-items * shape.cluster // processors))  # blocks that a multiprocessor has at once
    issue, waits = chunk_cycles(device, kernel, shape)
    return device.launch_us + waves * 64 * max(issue * sharing, issue + waits) / (1e3 * device.clock_ghz)


def problem(device: Any, key: Any) -> csp.Problem:
    """Blocks of a cluster, hidden channels of a warp, buffers of tokens; and the time in microseconds."""
    kernel = Pass.of(key)
    possible = {shape.code: shape for shape in shapes(device, kernel)} if device.arch >= LEAST_ARCH else {}
    p = csp.Problem(str(key))
    cluster = p.int("cluster", values=CLUSTERS)
    units = p.int("units", values=UNITS)
    buffers = p.int("buffers", values=(1, 2))
    code = p.define("shape", cluster * 100 + units * 2 + buffers)
    codes = [Shape(b, u, 0, n).code for b in CLUSTERS for u in UNITS for n in (1, 2)]

    def of_shape(value: Callable[[Shape], Any], otherwise: Any = 0) -> csp.Expression:
        return csp.lookup(code, {each: value(possible[each]) if each in possible else otherwise for each in codes})

    p.add(of_shape(lambda shape: 1) == 1, "a block holds its part")
    p.define("threads", of_shape(lambda shape: 32 * shape.warps))
    p.define("shared", of_shape(lambda shape: kernel.shared_bytes(shape.units, shape.warps, shape.buffers)))
    p.define("registers", of_shape(lambda shape: kernel.registers(shape.units)))
    cost = of_shape(lambda shape: time_us(device, kernel, shape, key["N"]), 0.0)
    p.minimize(cost, then=(cluster, buffers))
    return p


def simulated(kernel: Pass) -> dict[str, int]:
    """The first shape that the simulator's block of 227 KB holds; two buffers where it can be."""
    for blocks, units in itertools.product(CLUSTERS, UNITS):
        warps, rest = divmod(kernel.hidden, blocks * units)
        if rest == 0 and warps in WARPS and kernel.held(units) <= MOST_HELD:
            buffers = 1 if kernel.backward else 2
            fit = kernel.shared_bytes(units, warps, buffers) <= SIMULATED_SHARED
            return {"cluster": blocks, "units": units, "buffers": buffers if fit else 1}
    raise ValueError(f"{kernel}: no block holds it")


# ---- the launch


class Launch(NamedTuple):
    constants: dict[str, int | str]
    threads: int
    shared: int
    blocks: int  # of a memory


def launch(kernel: Pass, chosen: Mapping[str, int]) -> Launch:
    blocks, units, buffers = (chosen[name] for name in ("cluster", "units", "buffers"))
    warps = kernel.hidden // (blocks * units)
    constants: dict[str, int | str] = {
        **{"STORAGE": kernel.dtype, "ROWS": kernel.rows, "UNITS": units, "WARPS": warps, "BLOCKS": blocks},
        **{"MOMENTUM": kernel.carried - 1, "BUFFERS": buffers},
    }
    return Launch(constants, 32 * warps, kernel.shared_bytes(units, warps, buffers), blocks)
