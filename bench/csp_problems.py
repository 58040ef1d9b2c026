"""Problems for the constraint solver: the tile constants of a recurrent kernel that holds R in registers.

Every quantity that the kernel's author would put on paper is a variable of its own, tied to the others by one
constraint, as autotuners without expressions have to state it: tile and warp counts, registers, bytes of shared memory
by use, cycles of each part of a time step. About ten are free; the rest follow. The cost is the time of one forward
pass over T steps of a batch, in microseconds.

Letters: B batch, T time, H heads, D units of a head, G gates.

A warp holds `row_tiles` tiles of 16 rows of R (rows are gates of units) and walks over `k_warp` tiles of 16 columns,
of which `k_regs` stay in registers, `k_smem` in shared memory, and `k_l2` stream from L2 in each step.
`warps_n` warps share the units of a CTA, `warps_k` warps the columns; `ctas` CTAs share a head and exchange h, within a
cluster or through L2.
"""

from dataclasses import dataclass

from seqops.tune import csp

G = 4
CLOCK = 1830  # cycles per microsecond
LAUNCH = 2.1  # microseconds


@dataclass(frozen=True)
class Gpu:
    """Limits of the kind of an H100."""

    processors: int = 132
    cluster_processors: int = 112  # reached by clusters of 16
    registers: int = 65536
    shared_processor: int = 228 << 10
    shared_block: int = 227 << 10
    threads: int = 2048


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem."""

    D: int
    H: int
    B: int
    T: int = 1024

    def __str__(self) -> str:
        return f"{self.H}x{self.D} B={self.B}"


SHAPES = (
    Shape(64, 12, 16),
    Shape(768, 1, 16),
    Shape(64, 1, 1),
    Shape(64, 16, 64),
    Shape(128, 6, 16),
    Shape(192, 4, 8),
    Shape(256, 3, 16),
    Shape(256, 12, 64),
    Shape(384, 2, 16),
    Shape(512, 1, 16),
    Shape(512, 4, 32),
    Shape(768, 1, 1),
    Shape(768, 1, 64),
    Shape(1024, 1, 16),
    Shape(1024, 2, 32),
    Shape(1536, 1, 16),
    Shape(2048, 1, 1),
    Shape(2048, 1, 16),
)
# The sizes of the comparison that the solver's goal is stated for: hidden size 768, in 12 heads or in one.
GOALS = SHAPES[:2]


def recurrent(shape: Shape, gpu: Gpu = Gpu()) -> csp.Problem:
    """The forward pass of an LSTM in bfloat16."""
    D, H, B, T = shape.D, shape.H, shape.B, shape.T
    p = csp.Problem(f"recurrent {shape}")
    k_total = -(-D // 16)

    # ---- what is chosen
    ctas = p.int("ctas", 1, gpu.processors)
    unit = p.int("unit", values=(4, 8, 16))
    groups = p.int("groups", 1, 8)
    warps_n = p.int("warps_n", 1, 32)
    warps_k = p.int("warps_k", values=(1, 2, 4, 8))
    k_regs = p.int("k_regs", 0, k_total)
    k_smem = p.int("k_smem", 0, k_total)
    k_l2 = p.int("k_l2", 0, k_total)
    tiles = p.int("tiles", values=(1, 2, 4))
    split = p.int("split", values=(1, 2, 4))
    ring = p.int("ring", 2, 4)
    resident = p.int("resident", 1, 2)
    exchange = p.int("exchange", 0, 2)  # none, cluster, grid

    # ---- how the work is cut
    units_warp = p.int("units_warp", 4, 128)
    units_cta = p.int("units_cta", 4, 4096)
    units_all = p.int("units_all", D, 4 * D + 4096)
    spare = p.int("spare", 0, 4096)
    rows = p.int("rows", 16, 512, multiple_of=16)
    row_tiles = p.int("row_tiles", 1, 32)
    k_warp = p.int("k_warp", 1, k_total)
    chain = p.int("chain", 1, k_total)
    warps = p.int("warps", 1, 32)
    quads = p.int("quads", 1, 8)
    threads = p.int("threads", 32, 1024, multiple_of=32)
    batch_rows = p.int("batch_rows", 8, 32)
    batch_tiles = p.int("batch_tiles", 1, B)
    groups_of_ctas = p.int("groups_of_ctas", 1, H * B)
    blocks = p.int("blocks", 1, H * B * gpu.processors)
    processors = p.int("processors", values=(gpu.cluster_processors, gpu.processors))
    places = p.int("places", 1, 2 * gpu.processors)
    waves = p.int("waves", 1, H * B * gpu.processors)
    p.add(units_warp == unit * groups)
    p.add(units_cta == units_warp * warps_n)
    p.add(units_all == units_cta * ctas)
    p.add(spare == units_all - D, "CTAs hold all units")
    p.add(spare < units_cta, "no CTA is idle")
    p.add(rows == G * units_warp)
    p.add(rows == 16 * row_tiles, "rows fill tiles")
    p.add(k_warp == csp.ceildiv(k_total, warps_k))
    p.add(k_regs + k_smem + k_l2 == k_warp, "every column tile has a place")
    p.add((warps_k - 1) * k_warp < k_total, "no warp is idle along k")
    p.add(split <= k_warp)
    p.add(row_tiles * tiles * split >= 4, "independent sums hide the latency of a product")
    p.add(chain == csp.ceildiv(k_warp, split))
    p.add(warps == warps_n * warps_k)
    p.add(quads == csp.ceildiv(warps, 4))
    p.add(threads == 32 * warps)
    p.add(batch_rows == 8 * tiles)
    p.add(batch_tiles == csp.ceildiv(B, batch_rows))
    p.add(groups_of_ctas == H * batch_tiles)
    p.add(blocks == groups_of_ctas * ctas)
    p.add(processors == csp.where((exchange == 1) & (ctas == 16), gpu.cluster_processors, gpu.processors))
    p.add(places == processors * resident)
    p.add(waves == csp.ceildiv(blocks, places))

    # ---- how CTAs meet
    p.add((exchange != 0) | (ctas == 1), "one CTA alone needs no exchange")
    p.add((exchange == 0) | (ctas > 1))
    p.add((exchange != 1) | (ctas == 2) | (ctas == 4) | (ctas == 8) | (ctas == 16), "cluster sizes")
    p.add((exchange != 2) | (waves == 1), "a grid that waits fits one wave")
    p.add((exchange != 2) | (resident == 1))
    p.add(csp.implies(exchange == 1, units_cta % 8 == 0), "16-byte stores into a peer")
    p.add(csp.implies(exchange == 2, units_cta % 4 == 0), "8-byte packets")

    # ---- registers
    cap = p.int("cap", 24, 255)
    regs_cap = p.int("regs_cap", 0, 512)
    regs_r = p.int("regs_r", 0, 4096, multiple_of=4)
    regs_sums = p.int("regs_sums", 4, 1024, multiple_of=4)
    regs_cells = p.int("regs_cells", 8, 1024)
    registers = p.int("registers", 24, 255)
    p.add(regs_cap == gpu.registers // (1024 * quads * resident) * 8)
    p.add(cap == csp.min_(255, regs_cap))
    p.add(regs_r == 4 * row_tiles * k_regs)
    p.add(regs_sums == 4 * row_tiles * split)
    p.add(regs_cells == 8 * tiles * csp.ceildiv(units_warp, 4 * warps_k) + 32 * tiles)
    p.add(registers == regs_r + regs_sums + regs_cells + 30)
    p.add(registers <= cap, "registers of a thread")
    p.add((k_smem == 0) | (registers + 4 * row_tiles > cap), "registers first")
    p.add(threads * resident <= gpu.threads, "threads of a processor")

    # ---- shared memory, bytes
    fragments = p.int("fragments", 0, 1 << 24)
    shared_h = p.int("shared_h", 0, 1 << 20)
    shared_ring = p.int("shared_ring", 0, 1 << 20)
    shared_sums = p.int("shared_sums", 0, 1 << 22)
    shared = p.int("shared", 0, gpu.shared_block)
    held = p.int("held", 1, 8192)
    p.add(held == warps * row_tiles)
    p.add(fragments == 512 * held * k_smem)
    p.add(shared_h == 4 * (D + 8) * batch_rows)
    p.add(shared_ring == 2 * G * ring * batch_rows * units_cta)
    p.add(shared_sums == 512 * tiles * warps_n * row_tiles * (warps_k - 1))
    p.add(shared == fragments + shared_h + shared_ring + shared_sums + 1024, "shared memory of a CTA")
    p.add((k_l2 == 0) | (shared + 512 * held > gpu.shared_block), "then shared memory, then L2")
    p.add(shared * resident <= gpu.shared_processor, "shared memory of a processor")

    # ---- cycles of a time step, in tenths
    mmas = p.int("mmas", 1, 1 << 20)
    issue = p.int("issue", 1, 1 << 26)
    latency = p.int("latency", 1, 1 << 20)
    smem_read = p.int("smem_read", 0, 1 << 24)
    h_read = p.int("h_read", 0, 1 << 24)
    l2_read = p.int("l2_read", 0, 1 << 26)
    busiest = p.int("busiest", 1, 1 << 26)
    reduce = p.int("reduce", 0, 1 << 20)
    cells = p.int("cells", 1, 1 << 20)
    packet = p.int("packet", 0, 1 << 24)
    travel = p.int("travel", 0, 1 << 24)
    step = p.int("step", 1, 1 << 27)
    load = p.int("load", 0, 1 << 27)
    total = p.int("total", 1, 1 << 38)
    p.add(mmas == tiles * row_tiles * k_warp)
    p.add(issue == 64 * mmas * quads * resident)
    p.add(latency == 330 * chain)
    p.add(smem_read == 40 * held * k_smem * resident)
    p.add(h_read == 20 * warps * k_warp * tiles)
    p.add(l2_read == 80 * held * k_l2 * resident)
    p.add(busiest == csp.max_(issue, latency, smem_read, h_read, l2_read))
    p.add(reduce == csp.where(warps_k > 1, 400 + 100 * warps_k * tiles, 0))
    p.add(cells == 600 + 400 * tiles * csp.ceildiv(units_warp, 4 * warps_k))
    p.add(packet == 2 * units_cta * batch_rows * (ctas - 1))
    p.add(travel == csp.where(exchange == 0, 0, csp.where(exchange == 1, 2000 + packet * 10 // 16, 6000 + packet // 8)))
    p.add(step == busiest + reduce + cells + 370 + travel)
    p.add(load == 4000 + 160 * held * (k_regs + k_smem))
    p.add(total == waves * (load + T * step))
    p.minimize(LAUNCH + total / (10 * CLOCK))
    return p
