"""The first call: seconds until a new cell, size, batch or length has its result, and how many kernels it compiles.

    python -m bench.cold                     a table
    python -m bench.cold --json cold.json    and a file, written after each cell; `make gpu` keeps it in its own

Two processes go through the same cells, one after the other, with one cache folder (SEQOPS_CACHE) that is empty for the
first: it compiles, the second one loads. What a process does once is done before the first cell and counted apart:
importing CuPy and NVRTC, the tuner's model, handles of libraries. Each cell then takes a training step, forward and
backward; the same again; one with fewer rows, and one with fewer steps, which may compile nothing.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Operator, H, D, dtype, all with B rows and T steps.
CELLS = (
    ("lstm", 12, 64, "bfloat16"),
    ("lstm", 6, 128, "bfloat16"),
    ("lstm", 3, 256, "bfloat16"),
    ("lstm", 1, 768, "bfloat16"),
    ("gru", 1, 512, "bfloat16"),
    ("slstm", 4, 64, "bfloat16"),
    ("lstm", 12, 64, "float32"),
)
BATCH, TIME = 16, 1024
FEWER_ROWS, FEWER_STEPS = 13, 777  # of one bucket with the above
WARM_UP = ("elman", 1, 16, "bfloat16")
EMPTY, WARM = "empty", "warm"  # the cache
# Seconds of a first training step by the cache, and compilations of another batch or length.
GOALS = {EMPTY: 5.0, WARM: 0.1}
CACHES = {EMPTY: "an empty cache", WARM: "a warm cache"}
STEPS = ("first", "again", "rows", "steps")  # what is done with each cell, in order
# What a process writes before each of its documents.
MARKER = "seqops-cold: "
# The body of a process. When the one that started it ends, its standard input does too, and then it ends with all that
# it started: compilers would otherwise go on alone.
PROCESS = """
import json, os, signal, sys, threading

def follow():
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)

threading.Thread(target=follow, daemon=True).start()
from bench import cold
for found in cold.go_through(*json.loads(sys.argv[1])):
    print(cold.MARKER + json.dumps(found), flush=True)
"""


@contextmanager
def counted() -> Iterator[list[str]]:
    """The kernels that are compiled inside: neither loaded already nor in the cache."""
    from seqops.core import launch

    compiled: list[str] = []
    cached = launch._cached

    def count(stem: str, suffix: str, parts: Sequence[str], build: Any) -> Path:
        def build_and_count() -> bytes:
            compiled.append(stem)
            return build()

        return cached(stem, suffix, parts, build_and_count)

    launch._cached = count
    try:
        yield compiled
    finally:
        launch._cached = cached


def step(op: str, heads: int, units: int, dtype: str, batch: int, steps: int, device: str) -> dict[str, Any]:
    """One training step, on the CUDA backend: seconds of forward and backward, and kernels compiled."""
    import torch

    import seqops
    from bench.rnn_contenders import GATES

    gates, storage = GATES[op], getattr(torch, dtype)
    wx = torch.randn(batch, steps, gates, heads, units, device=device).to(storage).requires_grad_()
    r = (torch.randn(gates, heads, units, units, device=device) / units**0.5).to(storage).requires_grad_()
    dh = torch.randn(batch, steps, heads, units, device=device).to(storage)

    def wait() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    with counted() as compiled, seqops.backend("cuda"):
        start = wait()
        h, *_ = getattr(seqops, op)(wx, r)
        middle = wait()
        found = torch.autograd.grad(h, (wx, r), dh)
        end = wait()
    if not all(bool(each.isfinite().all()) for each in (h, *found)):
        raise RuntimeError(f"{op}, {heads} heads of {units}, {dtype}: values that are not finite")
    return {"forward": middle - start, "backward": end - middle, "compiled": len(compiled)}


def go_through(cells: Sequence[Sequence[Any]], batch: int, steps: int, device: str) -> Iterator[Any]:
    """What a process does: seconds of the warm-up, then four training steps of each cell, each as it is done."""
    import torch

    import seqops  # noqa: F401  # not counted

    if device == "cuda":
        torch.bmm(*(torch.ones(1, 16, 16, device=device, dtype=torch.bfloat16) for _ in range(2)))
        torch.mm(*(torch.ones(16, 16, device=device) for _ in range(2)))
        torch.cuda.synchronize()
    fewer_rows, fewer_steps = batch * FEWER_ROWS // BATCH, steps * FEWER_STEPS // TIME
    started = time.perf_counter()
    step(*WARM_UP, batch, steps, device)
    yield time.perf_counter() - started
    for cell in cells:
        sizes = (batch, steps), (batch, steps), (fewer_rows, steps), (batch, fewer_steps)
        yield {name: step(*cell, *size, device) for name, size in zip(STEPS, sizes, strict=True)}


def in_process(
    cells: Sequence[Sequence[Any]], batch: int, steps: int, device: str, cache: Path, seconds: float
) -> Iterator[Any]:
    """What `go_through` gives in a process of its own with that cache, each as it is done.

    Raises:
        RuntimeError: it failed, with what it said last.
        TimeoutError: it took too long; all that it started has ended as well.
    """
    command = [sys.executable, "-c", PROCESS, json.dumps([cells, batch, steps, device])]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "SEQOPS_CACHE": str(cache), "PYTHONPATH": path}
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            start_new_session=True,
        )
        late = threading.Event()

        def end() -> None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        def cut_off() -> None:
            late.set()
            end()

        timer = threading.Timer(seconds, cut_off)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(MARKER):
                    yield json.loads(line.removeprefix(MARKER))
            process.wait()
        finally:
            timer.cancel()
            end()
            process.communicate()
        if late.is_set():
            raise TimeoutError(f"no end within {seconds:.0f} s")
        if process.returncode:
            said.seek(0)
            raise RuntimeError((said.read().strip().splitlines() or [f"code {process.returncode}"])[-1])


def measure(
    cells: Sequence[Sequence[Any]] = CELLS,
    batch: int = BATCH,
    steps: int = TIME,
    device: str = "cuda",
    seconds: float = 300,
    keep: Callable[[dict[str, Any], str], None] = lambda document, line: None,
) -> dict[str, Any]:
    """The document: `once` by the state of the cache, and a row for each cell.

    Args:
        seconds: for each of the two processes.
        keep: called with the document as far as it goes, and a line about what is new in it.
    """
    rows = [dict(zip(("op", "H", "D", "dtype"), cell, strict=True), B=batch, T=steps) for cell in cells]
    document: dict[str, Any] = {"once": {}, "rows": rows}
    with tempfile.TemporaryDirectory() as folder:
        for cache in (EMPTY, WARM):
            found = in_process(cells, batch, steps, device, Path(folder), seconds)
            document["once"][cache] = next(found)
            keep(document, describe_once(document, cache))
            for row, cell in zip(rows, found, strict=True):
                row[cache] = cell
                keep(document, f"{describe_cell(row)}, {describe_first(row, cache)}")
    return document


def first_seconds(row: dict[str, Any], cache: str) -> float:
    """Forward and backward of a cell's first step."""
    return row[cache]["first"]["forward"] + row[cache]["first"]["backward"]


def find_misses(document: dict[str, Any]) -> list[str]:
    """What is slower than the goals, or compiles where nothing may be compiled."""
    misses = []
    for row in document["rows"]:
        title = describe_cell(row)
        for cache, goal in GOALS.items():
            if cache in row and not first_seconds(row, cache) <= goal:
                misses.append(f"{title}, {cache} cache: {first_seconds(row, cache):.2f} s for {goal:g} s")
        compiled = {}
        if EMPTY in row:
            again = {"the same again": "again", "another batch": "rows", "another length": "steps"}
            compiled = {what: row[EMPTY][key]["compiled"] for what, key in again.items()}
        if WARM in row:
            compiled["the first step with a warm cache"] = row[WARM]["first"]["compiled"]
        misses += [f"{title}: {what} compiles {count}" for what, count in compiled.items() if count]
    return misses


def describe_cell(row: dict[str, Any]) -> str:
    return f"{row['op']} {row['dtype']} B{row['B']} T{row['T']} H{row['H']} D{row['D']}"


def describe_once(document: dict[str, Any], cache: str) -> str:
    return f"once in a process, {cache} cache: {document['once'][cache]:.2f} s"


def describe_first(row: dict[str, Any], cache: str) -> str:
    first = row[cache]["first"]
    return (
        f"{cache} cache: forward {first['forward']:.3f} s, backward {first['backward']:.3f} s, "
        f"{first['compiled']} compiled"
    )


def describe(document: dict[str, Any]) -> str:
    lines = [describe_once(document, cache) for cache in document["once"]]
    for row in document["rows"]:
        parts = [describe_first(row, cache) if cache in row else f"{cache} cache: cut off" for cache in (EMPTY, WARM)]
        lines.append(f"{describe_cell(row)}: {'; '.join(parts)}")
    return "\n".join([*lines, *(f"missed: {miss}" for miss in find_misses(document))])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cold", description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where to write what was found, anew after each cell")
    parser.add_argument("--op", action="append", help="only cells of this operator; may be given several times")
    parser.add_argument("--seconds", type=float, default=300, help="for each of the two processes")
    chosen = parser.parse_args(arguments)
    cells = [cell for cell in CELLS if not chosen.op or cell[0] in chosen.op]
    latest: dict[str, Any] = {"once": {}, "rows": []}

    def keep(document: dict[str, Any], line: str) -> None:
        latest.update(document)
        print(line, flush=True)
        if chosen.json:
            temporary = chosen.json.with_suffix(".tmp")
            temporary.write_text(json.dumps(document, indent=1) + "\n")
            os.replace(temporary, chosen.json)

    failure = None
    try:
        measure(cells, seconds=chosen.seconds, keep=keep)
    except (RuntimeError, TimeoutError) as error:
        failure = error
    print(f"\n{describe(latest)}")
    if failure:
        print(f"then: {failure}")
    return 1 if failure else 0


if __name__ == "__main__":
    sys.exit(main())
