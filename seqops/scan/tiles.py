"""What the CUDA kernels of the scans are compiled with and launched as, from shapes alone. Standard library only.

Two ways to walk (csrc/scan/device.h): `march`, a thread for VEC channels and all steps, where there are channels enough
to fill the device; `tiles`, blocks of a few channels and a few hundred steps that hand the state on, everywhere else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

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


class Device(NamedTuple):
    """Sizes of blocks, and how many lanes of 16 bytes are enough to march."""

    marching_lanes: int
    short: int  # so few steps that a march costs less than handing the state on, however few the channels
    march_threads: int
    march_steps: int
    tile_threads: int
    tile_bytes: int  # of shared memory, for what the threads read
    tile_steps: int  # a thread, at most
    tile_lanes: int  # of 16 bytes: one line of 128
    narrow_lanes: int  # of one element
    group: int  # tiles between published states, at most


def device(processors: int | None) -> Device:
    """For a GPU of so many multiprocessors; None: small sizes for the simulator, so that short cases have many tiles.

    32 KB in flight an SM hide the memory's latency: 64 lanes of two tensors, 16 steps ahead. A tile's 64 KB are two
    blocks an SM with what else they need (227 KB on sm_90 and sm_100), one on sm_80 (163) and sm_120 (99).
    """
    if processors is None:
        return Device(
            marching_lanes=24,
            short=2,
            march_threads=32,
            march_steps=4,
            tile_threads=32,
            tile_bytes=1 << 20,
            tile_steps=2,
            tile_lanes=8,
            narrow_lanes=8,
            group=2,
        )
    return Device(
        marching_lanes=64 * processors,
        short=64,
        march_threads=64,
        march_steps=16,
        tile_threads=256,
        tile_bytes=64 << 10,
        tile_steps=16,
        tile_lanes=8,
        narrow_lanes=32,
        group=32,
    )


class Launch(NamedTuple):
    constants: dict[str, int | str]
    grid: int
    threads: int
    shared: int
    lanes: int  # of a tile; 0: a march
    group: int
    tiles: int  # along time; 0: a march
    workspace: int  # 8-byte words, zero


class Lane(NamedTuple):
    """What one thread handles of a step."""

    channels: int  # VEC
    wide: bool  # 16 bytes of a tensor, not one element
    step_bytes: int  # all it reads
    map_bytes: int  # of one channel
    state_bytes: int


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


def marches(at: Device, lane: Lane, rows: int, lanes: int, time: int, packed: bool) -> bool:
    """Sequences packed into one row may have any lengths: there only a row's own channels count, as if it were one."""
    if not lane.wide:
        return False  # too little in flight
    return time <= at.short or (lanes if packed else rows * lanes) >= at.marching_lanes


def launch(
    at: Device,
    constants: dict[str, int | str],
    lane: Lane,
    batch: int,
    time: int,
    channels: int,
    rows: int,
    march: bool,
) -> Launch:
    """`rows` are the rows of the states: the batch, or the sequences packed into it."""
    lanes_of_row = channels // lane.channels
    constants = {**constants, "VEC": lane.channels, "MARCH": int(march), **_sizes(at, lane, march)}
    threads, steps = int(constants["THREADS"]), int(constants["STEPS"])
    if march:
        blocks = -(-rows * lanes_of_row // threads)
        return Launch(constants, blocks, threads, steps * threads * lane.step_bytes, 0, 0, 0, 0)
    lanes = min(power_of_two_from(lanes_of_row), _most_lanes(at, lane))
    width = lanes * lane.channels
    strips = batch * -(-lanes_of_row // lanes)
    tiles = -(-time // (threads // lanes * steps))
    group = min(at.group, power_of_two_from(-(-2 * at.group // strips)))
    groups = -(-tiles // group)
    words = 1 + strips * width * (groups * lane.state_bytes + tiles * lane.map_bytes * (group > 1)) // 4
    shared = _tile_shared(lane, steps, threads, lanes, group)
    return Launch(constants, tiles * strips, threads, shared, lanes, group, tiles, words)


def _sizes(at: Device, lane: Lane, march: bool) -> dict[str, int]:
    if march:
        return {"THREADS": at.march_threads, "STEPS": at.march_steps, "BLOCKS": 4}
    steps = min(at.tile_steps, at.tile_bytes // (at.tile_threads * lane.step_bytes))
    return {"THREADS": at.tile_threads, "STEPS": steps, "BLOCKS": 2}


def _most_lanes(at: Device, lane: Lane) -> int:
    """Of a tile. The maps of a group stay within 16 KB."""
    fitting = (16 << 10) // (at.group * lane.channels * lane.map_bytes)
    return min(at.tile_lanes if lane.wide else at.narrow_lanes, 1 << (fitting.bit_length() - 1))


def _tile_shared(lane: Lane, steps: int, threads: int, lanes: int, group: int) -> int:
    width = lanes * lane.channels
    maps = (threads // lanes + group) * width * lane.map_bytes
    return steps * threads * lane.step_bytes + maps + width * lane.state_bytes


# ---- linear_scan


def linear_lane(storage: str, gate: str, vec: int, gates: int, backward: bool) -> Lane:
    """x, or dh and h, with the gates."""
    access = vec * SIZES[storage]
    state = SIZES[COMPUTE[storage]]
    product = 16 if gate.startswith("complex") else SIZES[REAL[storage]]  # complex gates are multiplied in double
    align = max(product, state)
    step = (2 if backward else 1) * access + gates * SIZES[gate]
    return Lane(vec, access == 16, step, -(-(product + state) // align) * align, state)


def linear_constants(storage: str, gate: str, gates: int, backward: bool) -> dict[str, int | str]:
    return {"STORAGE": storage, "GATE_STORAGE": gate, "GATES": gates, "BACKWARD": int(backward)}


# ---- softmax_scan

VALUES = ("bfloat16", "float16", "float", "double")
# (v's arithmetic, s) as the kernels see them; other scores are converted before
SCORES = (("float", "bfloat16"), ("float", "float16"), ("float", "float"), ("double", "double"))


def softmax_lane(storage: str, vec: int, backward: bool) -> Lane:
    """v, or do, v and o, with alpha and p of the head."""
    real = SIZES[REAL[storage]]
    access = vec * SIZES[storage]
    return Lane(vec, access == 16, (3 if backward else 1) * access + 2 * real, 2 * real, real)


def score_lane(score: str) -> Lane:
    """The state of a head is m and u, in double; its map has a mark beside them."""
    return Lane(1, False, SIZES[score], 24, 16)


def gradient_lane(real: str) -> Lane:
    """alpha, p, two products and dlse of one head."""
    return Lane(1, False, 5 * SIZES[real], 2 * SIZES[real], SIZES[real])


def softmax_constants(walk: str, storage: str) -> dict[str, int | str]:
    return {"PASS": walk, "STORAGE": storage}


def score_constants(walk: str, storage: str, score: str) -> dict[str, int | str]:
    return {"PASS": walk, "STORAGE": storage, "SCORE": score}


WEIGHT_THREADS = 256


# ---- everything that may be launched


def configurations() -> list[dict[str, Any]]:
    """Every source, entry and set of constants on a GPU, with threads and the most shared memory."""
    at = device(1)
    found: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(source: str, entry: str, constants: dict[str, int | str], lane: Lane, march: bool) -> None:
        constants = {**constants, "VEC": lane.channels, "MARCH": int(march), **_sizes(at, lane, march)}
        threads, steps = int(constants["THREADS"]), int(constants["STEPS"])
        lanes = _most_lanes(at, lane)
        shared = steps * threads * lane.step_bytes if march else _tile_shared(lane, steps, threads, lanes, at.group)
        found[source, entry, tuple(sorted(constants.items()))] = {
            "source": source,
            "entry": entry,
            "constants": constants,
            "threads": threads,
            "shared": shared,
            "cluster": 1,
        }

    for storage, gate in PAIRS:
        wide = 16 // SIZES[storage]
        for vec, gates in dict.fromkeys(((wide, wide), (wide, 1), (1, 1))):
            if gates < vec and gate not in (COMPUTE[storage], REAL[storage]):
                continue  # such gates are converted
            for backward in (False, True):
                lane = linear_lane(storage, gate, vec, gates, backward)
                entry = "linear_scan_backward" if backward else "linear_scan_forward"
                for march in (False, True):
                    if march and not marches(at, lane, 1, at.marching_lanes, 1, False):
                        continue
                    constants = linear_constants(storage, gate, gates, backward)
                    add("scan/linear_scan.cu", entry, constants, lane, march)
    for storage in VALUES:
        for vec in (16 // SIZES[storage], 1):
            for walk in ("FORWARD", "BACKWARD"):
                lane = softmax_lane(storage, vec, walk == "BACKWARD")
                for march in (False, True):
                    if not march or marches(at, lane, 1, at.marching_lanes, 1, False):
                        constants = softmax_constants(walk, storage)
                        add("scan/softmax_scan.cu", f"softmax_scan_{walk.lower()}", constants, lane, march)
    for real, score in SCORES:
        constants = score_constants("SCORES", real, score)
        add("scan/softmax_scan.cu", "softmax_scan_scores", constants, score_lane(score), False)
        constants = score_constants("GRADIENTS", real, score)
        add("scan/softmax_scan.cu", "softmax_scan_gradients", constants, gradient_lane(real), False)
        constants = {**score_constants("WEIGHTS", real, score), "VEC": 1, "THREADS": WEIGHT_THREADS, "STEPS": 1}
        found["softmax_scan_weights", real, score] = {
            "source": "scan/softmax_scan.cu",
            "entry": "softmax_scan_weights",
            "constants": constants,
            "threads": WEIGHT_THREADS,
            "shared": 0,
            "cluster": 1,
        }
    return list(found.values())
