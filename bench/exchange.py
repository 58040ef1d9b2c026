"""What it costs blocks of threads to tell each other something: measured by itself, before any kernel that does so.

    python -m bench.exchange                        a table
    python -m bench.exchange --json exchange.json   and a file; `make gpu` keeps it in its own

A step of a recurrent kernel whose head is spread over several blocks ends with a round in which every block sends its
slice of h to all others and waits for theirs. `exchange.cu` makes such rounds and nothing else, in each way that there
is, so a step's time cannot be less than a round's. The tuner's facts (`seqops tune --probe`: latencies one way, cycles
of a product, the clock) are measured with them.

A round leaves a number that only complete rounds in order give. A way that leaves another one has no time.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from seqops.core import launch
from seqops.tune import probe

SOURCE = str(Path(__file__).with_name("exchange.cu"))
THREADS = 256
WORDS = 48  # of 16 bytes: 48 units of 16 bits for 8 batch rows, as 16 blocks have them of a head of 768
BLOCK_THREADS = (128, 256, 512, 1024)
CLUSTERS = (2, 4, 8, 16)
GRIDS = (2, 8, 16, 32)
ROUNDS = (500, 4500)  # the difference counts, so launching does not
REPEATS = 5
WRONG = (1 << 32) - 1


@dataclass(frozen=True)
class Way:
    """One way to exchange slices.

    Attributes:
        name: for tables.
        entry: of the kernel, with its arguments' codes.
        kind: "block", "cluster" or "grid".
        sizes: to measure: threads of a block, or numbers of blocks; for "grid" those that are resident together, and
            all that can be.
    """

    name: str
    entry: str
    codes: str
    kind: str
    sizes: Sequence[int]


WAYS = (
    Way("shared memory, block barrier", "exchange_block", "Pq", "block", BLOCK_THREADS),
    Way("shared memory of the cluster, cluster barrier", "exchange_cluster_barrier", "Pq", "cluster", CLUSTERS),
    Way("shared memory of the cluster, st.async and mbarrier", "exchange_cluster_async", "Pq", "cluster", CLUSTERS),
    Way("L2, grid barrier", "exchange_grid_barrier", "PPPq", "grid", GRIDS),
    Way("L2, a flag for each block", "exchange_grid_flags", "PPPq", "grid", GRIDS),
    Way("L2, packets of data and tag", "exchange_grid_packets", "PPq", "grid", GRIDS),
)


@dataclass(frozen=True)
class Round:
    """What one way took. Where `error` is set there is no time.

    Attributes:
        bytes: that a block sends to each other one; of "block", a warp to the others.
        microseconds: of a round, the median of several runs.
    """

    way: str
    kind: str
    blocks: int
    threads: int
    bytes: int
    microseconds: float | None = None
    error: str | None = None


def measure_way(way: Way, size: int, like: Tensor, rounds: Sequence[int] = ROUNDS, repeats: int = REPEATS) -> Round:
    """Times one way at one size; an error of the launch, or a wrong number, is in the result."""
    blocks, threads = (1, size) if way.kind == "block" else (size, THREADS)
    sent = 512 if way.kind == "block" else 16 * WORDS
    constants = {"THREADS": threads, "WORDS": WORDS} | ({"CLUSTER": size} if way.kind == "cluster" else {})
    kernel = launch.Kernel(SOURCE, way.entry, way.codes)
    out = torch.empty(blocks, dtype=torch.int32, device=like.device)
    memory: list[Tensor] = []
    if way.kind == "grid":
        units = 8 if way.entry == "exchange_grid_packets" else 4  # words of 4 bytes for one of 16
        memory.append(torch.empty(2, blocks, WORDS, units, dtype=torch.int32, device=like.device))
        memory += [torch.empty(blocks, dtype=torch.int32, device=like.device)] if way.codes.count("P") == 3 else []
    cluster = size if way.kind == "cluster" else 1

    def run(count: int) -> None:
        for tensor in memory:
            tensor.zero_()
        kernel(
            constants, blocks, threads, (out, *memory, count), like=like, cluster=cluster,
            cooperative=way.kind == "grid",
        )  # fmt: skip

    found = Round(way.name, way.kind, blocks, threads, sent)
    try:
        spent = [[seconds(lambda count=count: run(count), like) for count in rounds] for _ in range(repeats + 1)][1:]
        check(way, blocks, rounds[-1], out)
    except Exception as error:  # of the driver's own kinds too; the other ways go on
        return Round(**{**asdict(found), "error": f"{type(error).__name__}: {error}".splitlines()[0]})
    each = [1e6 * (long - short) / (rounds[1] - rounds[0]) for short, long in spent]
    return Round(**{**asdict(found), "microseconds": statistics.median(each)})


def check(way: Way, blocks: int, rounds: int, out: Tensor) -> None:
    """Raises where a block did not get what complete rounds in order give."""
    if way.kind == "block":
        expected = [rounds]
    else:
        expected = [1000 * ((rank + rounds) % blocks) + rounds for rank in range(blocks)]
    found = [value % (1 << 32) for value in out.tolist()]
    if found != expected:
        wrong = next(rank for rank in range(blocks) if found[rank] != expected[rank])
        shown = "words that differ" if found[wrong] == WRONG else found[wrong]
        raise RuntimeError(f"block {wrong} of {blocks} got {shown} after {rounds} rounds, not {expected[wrong]}")


def seconds(call: Callable[[], object], like: Tensor) -> float:
    """Time of a call; the simulator's says nothing."""
    if not like.is_cuda:
        call()
        return 0.0
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def sizes_of(way: Way, processors: int, has_clusters: bool) -> list[int]:
    """For the grid also one block on every processor."""
    if way.kind == "cluster" and not has_clusters:
        return []
    if way.kind == "grid":
        return sorted({*(size for size in way.sizes if size <= processors), processors})
    return list(way.sizes)


def measure() -> dict[str, object]:
    """The document: `facts` of the tuner, and `rounds`."""
    device = torch.device("cuda", torch.cuda.current_device())
    properties = torch.cuda.get_device_properties(device)
    like = torch.empty(0, device=device)
    facts = probe.measure(device)  # first, since it wakes the clocks
    rounds = [
        asdict(measure_way(way, size, like))
        for way in WAYS
        for size in sizes_of(way, properties.multi_processor_count, properties.major >= 9)
    ]
    return {"facts": facts, "rounds": rounds}


def describe(document: dict[str, object]) -> str:
    """A line for each fact and each round."""
    lines = [f"{name} = {value:.4g}" for name, value in document["facts"].items()]
    for found in document["rounds"]:
        what = f"{found['way']}, {found['blocks']} blocks of {found['threads']} threads, {found['bytes']} bytes"
        lines.append(f"{what}: {found['error'] or format(found['microseconds'], '.3f') + ' µs a round'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.exchange", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where to write what was found")
    chosen = parser.parse_args(arguments)
    if reason := launch.reason_missing():
        sys.exit(f"CUDA kernels cannot be launched here: {reason}")
    document = measure()
    print(describe(document))
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(found["error"] for found in document["rounds"]))


if __name__ == "__main__":
    sys.exit(main())
