"""What the tests of the store share: an entry, a file, and a problem of one constant."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqops.tune import store
from seqops.tune.store import Entry, Store

DEVICE = "NVIDIA H200"
KEY = "lstm.forward.cuda|bf16|D=256,H=3,B<=16,T>64|train"
SOURCE = "9f2c41d07a3be865"
OLD = "0000000000000000"


def entry(by: str = "measured", source: str = SOURCE, **constants: int) -> Entry:
    us = 611.0 if by == "measured" else None
    return Entry(constants or {"ctas": 8, "unit": 4}, by, source, us, model_us=493.0)


def right(constants: Mapping[str, int]) -> str | None:
    """The problem of these tests: ctas from 1 to 16."""
    if not 1 <= constants.get("ctas", 1) <= 16:
        return f"ctas: {constants['ctas']} is not in 1..16"
    return None


def document(entries: dict[str, Any] | None = None, **changed: Any) -> dict[str, Any]:
    return {"format": 1, "device": DEVICE, "arch": 90, "probe": {}, "entries": entries or {}} | changed


def plain(by: str = "measured", source: str = SOURCE, **constants: int) -> dict[str, Any]:
    return {"constants": constants or {"ctas": 8}, "by": by, "us": 1.0, "model_us": 2.0, "source": source}


def put_file(folder: Path, content: str | bytes | dict[str, Any], device: str = DEVICE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / store.file_name(device)
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def look(kept: Store, key: str = KEY, source: str = SOURCE, device: str = DEVICE) -> Entry | None:
    return kept.lookup(device, key, source, right)


def refuse(*_: Any, **__: Any) -> None:
    raise OSError(30, "Read-only file system")
