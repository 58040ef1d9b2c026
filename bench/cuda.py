"""Timing on a GPU: each call by itself, from a cold second-level cache, between two events.

Work on a GPU is asynchronous, so the host's clock is no use; events are written by the GPU where it gets to them.

* **Cold.** Before each call a buffer of several times the second-level cache is read, else repeated calls on the same
  tensors would measure the cache. Read, not written: dirty lines would be written back while the call runs.
* **Graph.** A call that a CUDA graph can hold is captured and its replays are timed, which leaves out the host's work.
  Where one contender of a case cannot be captured (it synchronises, say), all of that case are launched from the host,
  so that the ratio compares like with like; the result says which it was.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from bench import harness


class Stopwatch(harness.Stopwatch):
    """Takes the place of the host's clock for everything on the current CUDA device."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.buffer = torch.zeros(max(4 * cache, 64 << 20) // 4, dtype=torch.int32, device="cuda")
        self.largest = torch.empty((), dtype=torch.int32, device="cuda")
        self.stream = torch.cuda.Stream()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Everything of a case goes to one stream, the one that captures: a backward runs where its forward did."""
        with torch.cuda.stream(self.stream):
            try:
                yield
            finally:  # what a failed case has launched is not to run into the next one
                torch.cuda.synchronize()

    def flush(self) -> None:
        """Fills the second-level cache with what no contender reads."""
        torch.amax(self.buffer, dim=0, out=self.largest)

    def prepare(self, blocks: Mapping[str, harness.Block]) -> dict[str, harness.Block]:
        """Replays of graphs where every block can be captured, else the blocks themselves."""
        try:
            captured = {name: capture(block, self.stream) for name, block in blocks.items()}
        except RuntimeError:
            torch.cuda.synchronize()
            self.timing = "events"
            return dict(blocks)
        self.timing = "graph"
        return captured

    def seconds(self, block: harness.Block, calls: int = 1) -> float:
        """Time of so many calls in all, the flushes between them left out."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in pairs:
            self.flush()
            start.record()
            block(1)
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3

    def estimate(self, block: harness.Block) -> float:
        """The best of three after one that may compile."""
        self.seconds(block)
        return min(self.seconds(block) for _ in range(3))


def capture(block: harness.Block, stream: torch.cuda.Stream) -> harness.Block:
    """A block whose calls replay a graph of one call, captured on `stream`, which is the current one.

    Raises:
        RuntimeError: the call does what a graph cannot hold.
    """
    block(2)  # kernels compile and libraries make their handles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        block(1)

    def replay(calls: int) -> None:
        for _ in range(calls):
            graph.replay()

    return replay


def peak_memory(case: harness.Case, name: str, backend: str | None) -> int:
    """Bytes that torch allocates at the peak of one training step, beyond the tensors of the case."""
    contender = case.build(name, case.steps, harness.CUDA)
    step = harness.make_block(case, contender, harness.TRAINING, backend)
    step(1)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(1)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
