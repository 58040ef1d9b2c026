"""Tuned constants: found on a GPU by the GPU run, kept in its file, and shipped from there.

    python3 -m bench.tuned bench/results/nvidia-h200.json      into seqops/tune/configs

What was found with other sources of a kernel than the present ones is left out. The GPU run needs the standard library
alone, and so does this module, until something is shipped.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The benchmark's shapes on a GPU, the most telling first.
SHAPES = tuple(
    f"{operator} {shape} --dtype {dtype}"
    for operator, shape, dtypes in (
        ("lstm", "--heads 12 --dim 64 --batch 16 --time 1024", ("bfloat16",)),
        ("lstm", "--heads 1 --dim 768 --batch 16 --time 1024", ("bfloat16",)),
        ("linear_scan", "--batch 8 --time 8192 --channels 1024", ("float32", "bfloat16")),
        ("softmax_scan", "--batch 8 --time 8192 --heads 16 --dim 64", ("float32", "bfloat16")),
        ("lstm", "--heads 6 --dim 128 --batch 16 --time 1024", ("bfloat16",)),
        ("lstm", "--heads 3 --dim 256 --batch 16 --time 1024", ("bfloat16",)),
        ("gru", "--heads 1 --dim 512 --batch 16 --time 1024", ("bfloat16",)),
        ("slstm", "--heads 4 --dim 64 --batch 16 --time 1024", ("bfloat16",)),
        ("linear_scan", "--batch 1 --time 65536 --channels 2048", ("float32", "bfloat16")),
        ("softmax_scan", "--batch 1 --time 262144 --heads 4 --dim 64", ("float32", "bfloat16")),
        ("linear_scan", "--batch 1 --time 1048576 --channels 64", ("float32", "bfloat16")),
        ("linear_scan", "--batch 8 --time 8192 --channels 1024 --gates head", ("float32",)),
        ("linear_scan", "--batch 64 --time 512 --channels 2048", ("float32", "bfloat16")),
    )
    for dtype in dtypes
)
CANDIDATES = 4
SECONDS = 4.0  # of timing, for each shape
COMMANDS = ("--probe", *SHAPES)
KEPT_TEXT = 6000

Execute = Callable[[Sequence[str], float], tuple[int | None, str]]  # words, seconds -> code (None: cut off), output


def run_commands(execute: Execute, folder: Path, record: dict[str, Any], seconds: float) -> list[str]:
    """Runs as many as there is time for; what went wrong comes back.

    Args:
        execute: runs `seqops tune` with more words.
        folder: where entries go, which must not be there.
        record: receives what each printed, and under `store` the entries.
    """
    end, slowest, wrong = time.monotonic() + seconds, 1.0, []
    limits = ["--top", str(CANDIDATES), "--seconds", str(SECONDS)]
    for command in COMMANDS:
        started = time.monotonic()
        if end - started < slowest:
            break
        options = [] if command == "--probe" else limits
        words = [*command.split(), *options, "--device", "cuda", "--json", "--output", str(folder)]
        code, text = execute(words, end - started)
        document = find_document(text)
        if document is None and code is None:
            break
        slowest = max(slowest, time.monotonic() - started)
        record["commands"][command] = document or {"error": text[-KEPT_TEXT:]}
        wrong += [f"{command}: {failure}" for failure in find_failures(code, text, document)]
        stored = sorted(folder.glob("*.json"))
        record["store"] = json.loads(stored[0].read_text()) if stored else None
    return wrong


def find_document(text: str) -> dict[str, Any] | None:
    """The JSON document in a log, which also holds lines about progress."""
    found = re.search(r"^\{$.*^\}$", text, re.MULTILINE | re.DOTALL)
    try:
        return json.loads(found[0]) if found else None
    except json.JSONDecodeError:
        return None


def find_failures(code: int | None, text: str, document: dict[str, Any] | None) -> list[str]:
    """What went wrong: a candidate with other values than the reference too, or one that could not be compared with it,
    whatever became of the others."""
    found = [
        f"{result['kernel']} with {candidate['constants']}: {candidate['reason']}"
        for result in (document or {}).get("results", [])
        for candidate in result["candidates"]
        if candidate["failed"] in ("reference", "check", "time")
    ]
    if code and not found:
        found = [f"ended with code {code}: {text[-KEPT_TEXT:]}"]
    return found


def ship(document: dict[str, Any], folder: Path) -> list[str]:
    """Writes the entries of a run's store to a folder. Returns a line about each."""
    from seqops.tune.store import Entry, Store
    from seqops.tune.target import targets

    now = {target.tunable.name: target.tunable.digest for target in targets()}
    store, device = Store(folder, folder), document["device"]
    facts = {name: value for name, value in document["probe"].items() if not isinstance(value, str)}
    if facts:
        store.put_probe(device, document["arch"], facts)
    lines = [f"{device}: {len(facts)} facts"]
    for key, entry in sorted(document["entries"].items()):
        if now.get(key.partition("|")[0]) != entry["source"]:
            lines.append(f"left out, since its kernel changed: {key}")
        else:
            store.put(device, document["arch"], key, Entry(**entry))
            lines.append(f"shipped: {key}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(prog="python -m bench.tuned", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="of the GPU run")
    parser.add_argument("--folder", type=Path, default=root / "seqops" / "tune" / "configs")
    chosen = parser.parse_args(arguments)
    for file in chosen.files:
        record = json.loads(file.read_text())
        found = record.get("tune") or record.get("kept", {}).get("tune", {}).get("value") or {}
        document = found.get("store")
        if document is None:
            print(f"{file}: nothing was tuned in that run", file=sys.stderr)
            return 1
        print("\n".join(ship(document, chosen.folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
