"""How the CPU kernels share a recurrence: what may be chosen, and what a choice costs.

    workers         threads that take part
    row_blocks      whole sequences are dealt out in so many blocks of rows a head, and nobody waits for anybody
    split_units     or all heads' units are, in panels, and everybody meets once a step
    panel_width     vectors of units that one pass of the product computes; 1 where a panel interleaves several gates
    narrow_weights  packed 16-bit weights are widened as they are read, not before

B batch rows, T time steps, H heads, D units of a head, G gates. A step of the product is, panel by panel and tile by
tile of rows, `depth` multiplications of a few vectors of weights with the rows' inputs: see csrc/rnn/product.h.
"""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING, Any, NamedTuple

from .cells import GATES

if TYPE_CHECKING:
    from ..tune import csp

VARIABLES = ("workers", "row_blocks", "split_units", "panel_width", "narrow_weights")

# Calls between two edges share a choice, made for the upper one: one for each B while every row counts, then four an
# octave, in which a tile of rows gains or loses little. T matters only to what is done once a call.
ROW_EDGES = (*range(1, 17), *(base * quarter // 4 for base in (16, 32, 64, 128) for quarter in (5, 6, 7, 8)))
STEP_EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
ROWS_BEYOND, STEPS_BEYOND = 512, 1024

SIZES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}


def is_unpacked(direction: str, batch: int, time: int) -> bool:
    """Whether a call takes dot products with r as it lies. That adds in another order, so it is nobody's choice."""
    return direction == "forward" and batch * time < 16


# ---- what a step is made of


class Product(NamedTuple):
    """The product of a kernel in one dtype and instruction set."""

    units: int  # of a head
    gates: int  # whose weights a panel interleaves
    depth: int  # length of the sums
    lanes: int  # of a vector
    stored: int  # bytes of a value in memory
    size: int  # bytes of an input, and of a packed weight that is not narrow
    pairs: bool  # 16-bit weights are multiplied as they are, two steps of k at once
    tall: bool  # register tiles for 32 registers
    vector_bytes: int

    @property
    def steps(self) -> int:
        return -(-self.depth // 2) if self.pairs else self.depth

    @property
    def vectors(self) -> int:
        """Of units of a head."""
        return -(-self.units // self.lanes)

    @property
    def narrow(self) -> bool:
        """Whether packed weights may stay as they are stored."""
        return self.stored == 2 and not self.pairs

    @property
    def widths(self) -> list[int]:
        """Of panels: those that are wider than half the head's units would only add zeros."""
        return [width for width in (1, 2, 4) if width == 1 or (self.gates == 1 and self.vectors > width // 2)]

    def panels(self, width: int) -> int:
        return -(-self.vectors // width)

    def counted_panels(self, width: int) -> float:
        """The last one may be narrower: 1, 2 or 4 vectors."""
        last = self.vectors - (self.panels(width) - 1) * width
        return self.panels(width) - 1 + min(1.0, (4 if last == 3 else last) / width)

    def tile_rows(self, width: int, narrow: bool) -> int:
        """At most, of a register tile."""
        vectors = 4 if narrow else self.gates * width
        return {1: 12, 2: 12, 3: 8, 4: 6}[vectors] if self.tall else {1: 12, 2: 6, 3: 4, 4: 3}[vectors]

    def cell(self, cycles: float) -> float:
        """Of a vector of this size, where one of 64 bytes of float32 takes so many."""
        return cycles * self.vector_bytes / 64 * (2 if self.stored == 8 else 1)


def product(host: Any, op: str, direction: str, dtype: str, units: int) -> Product:
    backward = direction == "backward"
    pairs = dtype == "bfloat16" and host.isa == "avx512_bf16"
    return Product(
        units=units,
        gates=1 if backward else GATES[op],
        depth=GATES[op] * units if backward else units,
        lanes=host.vector_bytes // (8 if dtype == "float64" else 4),
        stored=SIZES[dtype],
        size=2 if pairs else max(SIZES[dtype], 4),
        pairs=pairs,
        tall=host.vector_bytes == 64 or platform.machine() in ("aarch64", "arm64"),
        vector_bytes=host.vector_bytes,
    )


# Cycles at the clock that the host gives, fitted to timings of every plan of some hundred shapes on AMD Zen 4 with 512-
# and with 256-bit vectors; bench/tune_quality.py takes such timings.
LATENCY = 4  # of a multiply-add
LATENCY_OF_PAIRS = 6
BROADCAST = 0.5  # an input to all lanes
WIDENING = 1  # a vector of narrow weights
INPUT_BYTE = 0.26  # of rows that the first cache does not hold: they are read element by element, many rows at a time
TILE = 50  # a register tile
ROW = 68  # a row of it
DOT = 3.4  # a vector of weights as it lies
HORIZONTAL = 8  # the sum of a vector's lanes
CALL = 30_000  # checking and allocating, once a call
SHARE = 0.75  # of a cache that is left for weights, and of the first for inputs
FOREIGN_BYTE = 1  # of weights that another core packed and still holds: a quarter of its second cache at most
EXCHANGED_BYTE = 0.4  # of h or dy that another core wrote
HELD_UP = 1.05  # work between barriers: whoever is late, because a core has other work too, is waited for by all
# A vector of units of one row: activations, states, loads and stores of sequences; for 64-byte vectors.
CELL = {
    "forward": {"lstm": 105, "gru": 60, "slstm": 135, "elman": 30},
    "backward": {"lstm": 155, "gru": 120, "slstm": 190, "elman": 12},
}
# Packing a vector of weights, by the width of panels.
PACKING = {
    "forward": {"full": {1: 14, 2: 13, 4: 8}, "pairs": {1: 9, 2: 20, 4: 20}, "narrow": {1: 8, 2: 8, 4: 4}},
    "backward": {"full": {1: 22, 2: 24, 4: 12}, "pairs": {1: 13, 2: 13, 4: 18}, "narrow": {1: 19, 2: 16, 4: 9}},
}


def counts(most: int) -> list[int]:
    """Numbers up to `most` that are worth a try: all up to 8, then four an octave, and `most` itself."""
    return [n for n in range(1, most + 1) if n <= 8 or n == most or n % (1 << (n.bit_length() - 3)) == 0]


def smallest_member(edges: tuple[int, ...], representative: int) -> int:
    """Of the bucket."""
    return 1 + max((edge for edge in edges if edge < representative), default=0)


def problem(host: Any, key: Any) -> csp.Problem:
    """The plans for one kind of call, and their cost in microseconds.

    Args:
        host: a `tune.device.Host`.
        key: a `core.choose.Key` of sizes H, D, B, T and threads; the flag "unpacked" says what `is_unpacked` does.
    """
    from ..tune import csp  # late: importing the operators must not load the solver

    op, direction, _ = key.kernel.split(".")
    H, D, B, T, threads = (key[name] for name in ("H", "D", "B", "T", "threads"))
    unpacked = "unpacked" in key.flags
    of = product(host, op, direction, key.dtype, D)

    p = csp.Problem(str(key))
    workers = p.int("workers", values=counts(threads))
    row_blocks = p.int("row_blocks", values=counts(min(smallest_member(ROW_EDGES, B), threads)))
    split_units = p.int("split_units", 0, 1)
    panel_width = p.int("panel_width", values=of.widths)
    narrow_weights = p.int("narrow_weights", 0, int(of.narrow and not unpacked))
    panels = csp.lookup(panel_width, {width: of.panels(width) for width in of.widths})
    split = split_units == 1
    p.add(~split | (row_blocks == 1), "a panel serves all rows")
    p.add(~split | (workers >= 2), "nothing is split for one worker")
    p.add(~split | (workers <= H * panels), "every worker has a panel")
    p.add(split | (workers <= H * row_blocks), "every worker has a sequence")
    p.add((workers >= 2) | (row_blocks == 1), "one worker takes all rows at once")

    # Bytes of weights that a worker goes through in a step.
    head = of.vectors * of.gates * of.steps * (host.vector_bytes // (1 + narrow_weights))
    mine = csp.where(split, csp.ceildiv(H * head, workers), head)
    rows = csp.ceildiv(B, row_blocks)
    panel = _panel(host, of, rows, panel_width, narrow_weights, mine, workers, unpacked)
    panel += rows * panel_width * of.cell(CELL[direction][op])

    cycles_per_us = 1e3 * host.clock_ghz
    counted = csp.lookup(panel_width, {width: of.counted_panels(width) for width in of.widths})
    whole = csp.ceildiv(H * row_blocks, workers) * counted * panel
    exchanged = H * B * of.depth * of.size * (workers - 1) / workers * EXCHANGED_BYTE
    barrier = csp.where(split, host.barrier_us * cycles_per_us + exchanged, 0.0)
    step = csp.where(split, csp.ceildiv(H * panels, workers) * panel * HELD_UP, whole) + barrier
    packing = 0.0
    if not unpacked:
        widened = csp.lookup(panel_width, PACKING[direction]["pairs" if of.pairs else "full"])
        stored = csp.lookup(panel_width, PACKING[direction]["narrow"])
        packing = H * of.vectors * of.gates * of.depth * csp.where(narrow_weights == 1, stored, widened) / workers
        # Each packs its share of all heads. Split units are packed by who needs them, blocks of rows need whole heads.
        heads = csp.ceildiv(csp.ceildiv(H * row_blocks, workers), row_blocks)
        foreign = csp.where(split, 0, csp.max_(heads * workers - H, 0) * head) / workers
        packing += csp.min_(foreign, host.l2_bytes / 4) * FOREIGN_BYTE
        p.define("packed bytes", H * head)
    p.define("cycles a step", step)
    p.define("barrier share", barrier / step)
    fork = csp.where(workers > 1, host.fork_us, 0.0)
    p.minimize((CALL + packing + T * step) / cycles_per_us + fork, then=workers + row_blocks)
    return p


def _panel(
    host: Any, of: Product, rows: Any, width: Any, narrow: Any, mine: Any, workers: Any, unpacked: bool
) -> csp.Expression:
    """Cycles of one panel's product in one step. Its first tile of rows brings the weights near, the others find them.

    Args:
        mine: bytes of weights that the worker goes through between two visits to this panel.
    """
    from ..tune import csp

    bandwidths = (host.l1_bandwidth, host.l2_bandwidth, host.l3_bandwidth, host.memory_bandwidth)
    l1, l2, l3, memory = (1e3 * host.clock_ghz / bandwidth for bandwidth in bandwidths)  # cycles a byte
    most_rows = {w + 8 * n: of.tile_rows(w, bool(n)) for w in of.widths for n in (0, 1)}
    tiles = csp.ceildiv(rows, csp.lookup(width + 8 * narrow, most_rows))
    columns = of.gates * width
    around = tiles * TILE + rows * ROW
    if unpacked:
        dots = rows * of.gates * csp.min_(width * of.lanes, of.units) * (DOT * of.units / of.lanes + HORIZONTAL)
        return csp.max_(dots, columns * of.lanes * of.units * of.stored * l3) + around

    in_l1 = int(SHARE * host.l1_bytes)
    inside = csp.min_(1.0, SHARE * host.l2_bytes / mine)  # of its own second cache
    shared = csp.min_(1.0, SHARE * host.l3_bytes / (mine * workers))  # of the third, which all share
    beyond = shared * l3 + (1 - shared) * memory
    first = csp.where(mine <= in_l1, l1, inside * l2 + (1 - inside) * beyond)
    step_bytes = columns * (host.vector_bytes // (1 + narrow))  # of weights, for one step of k
    again = csp.where(step_bytes * of.steps <= in_l1, l1, l2)
    tile_rows = rows / tiles
    input_bytes = of.size * (2 if of.pairs else 1)  # of one row, for one step of k
    inputs_stay = csp.ceildiv(rows, tiles) * of.steps * input_bytes <= in_l1
    inputs = csp.where(inputs_stay, 0.0, tile_rows * input_bytes * INPUT_BYTE)
    multiply = tile_rows * columns * (host.vector_bytes / 4) / host.fma_per_cycle
    issue = columns * host.vector_bytes * l1 + tile_rows * BROADCAST
    busy = csp.max_(multiply, issue, LATENCY_OF_PAIRS if of.pairs else LATENCY) + narrow * columns * WIDENING
    one, other = (csp.max_(busy, step_bytes * byte + inputs) for byte in (first, again))
    return of.steps * (one + (tiles - 1) * other) + around
