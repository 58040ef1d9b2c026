"""What the Triton kernels of attention over ranges are launched with: the tuner's problem.

A program owns a tile of rows, queries or keys, and walks what they see in tiles of others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..tune import csp

SIZES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
DIRECTIONS = ("forward", "dq", "dkv")
POWERS = tuple(1 << n for n in range(18))
ALIGNMENT = 16  # elements and bytes: what wide accesses need of strides, sizes and addresses
LEAST = 16  # channels of a product of blocks
WARPGROUPS = (90, 100)  # where products of 64 rows are other instructions
OTHERS = (80, 86, 89, 120)


class Shape(NamedTuple):
    rows: int  # that a program owns
    others: int  # of a tile that it walks
    width: int  # channels: all of them, or a slice
    warps: int
    stages: int  # of loads on their way
    architectures: tuple[int, ...] = ()  # that it spills nothing on and fits; none: all


def padded(D: int, most: int) -> int:
    """Channels of a block: a power of two that holds D, or `most`."""
    return min(max(1 << (D - 1).bit_length(), LEAST), most)


def width(direction: str, dtype: str, D: int) -> int:
    """Wider channels are taken in slices: for each, the scores are computed again."""
    if SIZES[dtype] > 2:
        return padded(D, 32)
    return padded(D, 256 if direction == "forward" else 128)


def shapes(direction: str, dtype: str, D: int, bias: bool) -> tuple[Shape, ...]:
    """Those that spill nothing, on the architectures that they name or on any. A bias takes registers."""
    columns = width(direction, dtype, D)
    if SIZES[dtype] == 8:
        return (Shape(16, 16, columns, 4, 1),)
    if SIZES[dtype] == 4:
        return Shape(16, 16, columns, 4, 1), Shape(32, 16, columns, 4, 1)
    if columns < D:  # in slices: fewer rows, since scores are summed beside what is owned
        return (Shape(32, 32, columns, 8, 1),)
    found = {
        "forward": {
            64: (
                (16, 64, 4, 2),
                (64, 32, 4, 2, OTHERS) if bias else (64, 64, 4, 2),
                (128, 64, 8, 2, (*OTHERS, 90)) if bias else (128, 64, 8, 2),
            ),
            128: ((16, 32, 4, 2), (64, 32, 8, 2)),
            256: ((32, 32, 8, 1),),
        },
        "dq": {
            64: ((16, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2)),
            128: ((64, 32, 8, 2),),
        },
        "dkv": {
            64: ((16, 32, 4, 2), (32, 32 if bias else 64, 4, 2), *(() if bias else ((64, 64, 8, 2, WARPGROUPS),))),
            128: ((32, 32, 8, 1), (32, 64, 8, 1)),
        },
    }[direction]
    return tuple(Shape(r, o, columns, *more) for r, o, *more in found[max(columns, 64)])


def fits(shape: Shape, arch: int) -> bool:
    return not shape.architectures or arch in shape.architectures


def bias_shapes(dtype: str, D: int) -> tuple[Shape, ...]:
    """Of the gradient of a bias: places in a chunk, of queries and of keys."""
    if SIZES[dtype] > 2:
        return (Shape(16, 16, padded(D, 32), 4, 1),)
    return Shape(32, 32, padded(D, 32), 4, 1), Shape(64, 64, padded(D, 32), 8, 1)


# ---- the choice

SEEN = 256  # others that an owner sees in one part, by supposition: a pattern's ranges are not read on the host
STEP_CYCLES = 400  # of a tile's loads, barriers and branches, by estimate
LOADED_BYTES = 64  # a clock and processor, from the second cache, by estimate
ELEMENT_CYCLES = 14  # a pair's weight, in a lane, by estimate
LANES = 128  # of a processor
ROW_CYCLES = 60  # of one row where products are not of blocks, by estimate


def problem(device: Any, key: Any) -> csp.Problem:
    """Tiles, warps and stages of a pass over owners [B, T, H] that see SEEN others in each part; microseconds."""
    direction, size = key.kernel.split(".")[1], SIZES[key.dtype]
    every = shapes(direction, key.dtype, key["D"], "bias" in key.flags)
    every = tuple(each for each in every if fits(each, device.arch))
    columns = every[0].width
    products = {"forward": 2, "dq": 3, "dkv": 4}[direction]

    p = csp.Problem(str(key))
    rows = p.int("rows", values=tuple(sorted({each.rows for each in every})))
    others = p.int("others", values=tuple(sorted({each.others for each in every})))
    warps = p.int("warps", values=tuple(sorted({each.warps for each in every})))
    stages = p.int("stages", values=tuple(sorted({each.stages for each in every})))
    known = [
        (rows == each.rows) & (others == each.others) & (warps == each.warps) & (stages == each.stages)
        for each in every
    ]
    first, *more = known
    for each in more:
        first = first | each
    p.add(first, "there is such a kernel")

    # Its own rows, and tiles on their way; as many programs are resident as memory and registers hold.
    own = rows if direction == "forward" else 2 * rows
    shared = p.define("shared", columns * size * (own + 2 * stages * others))
    p.add(shared <= device.shared_per_block, "tiles fit the shared memory")
    p.add(255 * 32 * warps <= device.registers_per_processor, "registers fit")
    resident = csp.min_(device.shared_per_processor // shared, device.registers_per_processor // (256 * 32 * warps))
    resident = csp.max_(resident, 1)

    slices = -(-key["D"] // columns)
    programs = csp.ceildiv(key["T"], rows) * (key["B"] * key["H"] * slices)
    # The scores are those of all channels; what is summed with them, of a slice.
    channels = columns * (slices + products - 1) if direction == "forward" else columns * (2 * slices + products - 2)
    rate = device.fma_bf16 if size == 2 else device.fma_f32
    pairs = rows * others
    loaded = others * (2 * columns * size / LOADED_BYTES)
    # What a processor does for all its programs; the latencies of a step they wait for at once.
    cycles = resident * (pairs * (channels / rate + ELEMENT_CYCLES / LANES) + loaded) + STEP_CYCLES / stages
    if size == 8:
        cycles = resident * others * ROW_CYCLES + pairs * (channels / rate)
    steps = csp.ceildiv(rows + SEEN, others) * key["P"]
    waves = csp.ceildiv(programs, resident * device.processors)
    p.minimize(waves * steps * (cycles / (1e3 * device.clock_ghz)) + device.launch_us, then=(-rows, -others))
    return p
