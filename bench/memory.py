"""Peak memory of one training step, as the operating system counts it.

Each contender runs in a process of its own, forked from a server that has imported torch and started no threads. There

1. a step over a few time steps loads code, threads and tables, and is thrown away;
2. the tensors of the case are built, and the process's peak counter is reset (`/proc/self/clear_refs`);
3. one training step runs, and the peak counter (`VmHWM`) less the resident size before it is the result.

So outputs, saved tensors, gradients and scratch memory count, from any allocator: torch's own profiler does not see
what oneDNN or an extension allocates by itself. The C library is told to give every block above 64 KB pages of its own
and to return them when freed, since a heap that keeps freed pages would count them again. The result is exact to about
1 MB, which is why results below 4 MB are not compared.
"""

import ctypes
import multiprocessing
import os
from multiprocessing.connection import Connection

import torch

from bench import harness

SMALLEST_COMPARED = 4 << 20
WARM_UP_STEPS = 4

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}


def read_status(key: str) -> int:
    """Bytes of one line of `/proc/self/status`."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def reset_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_of_step(case: harness.Case, name: str) -> int:
    """Bytes that one training step adds at its peak, measured in this process."""
    harness.make_block(case, case.build(name, min(WARM_UP_STEPS, case.steps)), harness.TRAINING)(1)
    contender = case.build(name, case.steps)
    step = harness.make_block(case, contender, harness.TRAINING)
    ctypes.CDLL(None).malloc_trim(0)
    before = read_status("VmRSS")
    reset_peak()
    step(1)
    return read_status("VmHWM") - before


def answer(connection: Connection, case: harness.Case, name: str, threads: int) -> None:
    """The body of a measuring process. Sends bytes, or the text of the error."""
    torch.set_num_threads(threads)
    try:
        connection.send(peak_of_step(case, name))
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}")


class Processes:
    """Makes measuring processes.

    The server that forks them reads the allocator's settings when it starts, so they are in the environment only then.
    """

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["torch", "seqops", "bench.memory"])

    def peak(self, case: harness.Case, name: str, threads: int) -> int:
        """Bytes that a training step of one contender adds at its peak.

        Raises:
            RuntimeError: the process failed, with its error.
        """
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=answer, args=(sender, case, name, threads), daemon=True)
        before = {key: os.environ.get(key) for key in ALLOCATOR}
        os.environ.update(ALLOCATOR)
        try:
            process.start()
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value
        sender.close()
        try:
            result = receiver.recv()
        except EOFError:
            result = "the measuring process died"
        process.join()
        if isinstance(result, str):
            raise RuntimeError(f"{case.name}, {name}: {result}")
        return result
