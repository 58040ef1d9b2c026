"""What was found is kept: one JSON file for each device, shipped in the package and overlaid by the user's own.

    {"format": 1, "device": "NVIDIA H200", "arch": 90,
     "probe": {"grid_barrier_us": 1.31, "seqops": "0.3.0", "time": "2026-01-31T12:00:00.000+00:00"},
     "entries": {"lstm.forward.cuda|bf16|D=256,B<=16": {
        "constants": {"ctas": 8}, "by": "measured", "us": 611.0, "model_us": 493.0,
        "source": "9f2c41d07a3be865", "seqops": "0.3.0", "time": "2026-01-31T12:00:00.000+00:00"}}}

Keys are text that means nothing here, but that an entry belongs to what stands before the first bar.

* Readers wait for no lock: a file is only ever replaced as a whole. A writer takes the lock, reads again, merges,
  writes a temporary file beside it, and replaces. Writers at the same time lose nothing, a killed one changes nothing.
  A reader that finds something bad repairs it if nobody has the lock, and else passes it over.
* An entry whose `source` is not the kernel's present one is stale: it is passed over, and dropped at the next write.
* A file that is not of this form is renamed to *.bad, with one warning, and begun again. An entry whose constants do
  not solve the kernel's problem is taken out, and the file that held it kept as *.bad.
* Where nothing can be written, what would have been is remembered by this process, with one warning. It is written
  with the next entry that can be, unless another process has measured the same later.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = 1
SHIPPED = Path(__file__).parent / "configs"

# seconds to wait for another process that writes to the same file
_PATIENCE = 10.0
_POLL = 0.005

_ABOUT = ("seqops", "time")  # what stands beside the facts of a probe
_PLAIN = re.compile(r"[a-z0-9]([a-z0-9.]*[a-z0-9])?|[A-Z0-9]+( [A-Z0-9]+)+")

Document = dict[str, Any]
Check = Callable[[Mapping[str, int]], "str | None"]


@dataclass(frozen=True)
class Entry:
    """The constants chosen for one key."""

    constants: Mapping[str, int]
    by: str  # measured, on the device; or solved, by the model alone
    source: str  # hash of what the kernel and its model are written in
    us: float | None = None  # measured time
    model_us: float | None = None
    seqops: str = ""  # version; filled in when put
    time: str = ""  # when it was put, ISO 8601


@dataclass(frozen=True)
class Listed:
    """An entry as `entries` lists it."""

    device: str
    key: str
    origin: str  # user or shipped
    entry: Entry

    @property
    def age(self) -> float | None:
        """Seconds since it was put, or None where that is not known."""
        try:
            return (datetime.now(timezone.utc) - datetime.fromisoformat(self.entry.time)).total_seconds()
        except (ValueError, TypeError):  # no time, or one without its zone
            return None


class Store:
    """The user's files over the shipped ones.

    Args:
        folder: of the user's files; default: `tune` in the cache folder.
        shipped: of those that come with the package.
    """

    def __init__(self, folder: Path | None = None, shipped: Path | None = None) -> None:
        if folder is None:
            from ..core import launch

            folder = launch.cache_folder() / "tune"
        self.folder = Path(folder).absolute()
        self.shipped = SHIPPED if shipped is None else Path(shipped).absolute()
        self._lock = threading.RLock()  # of what follows; held for moments only, never while waiting for a file's lock
        self._read_before: dict[Path, tuple[tuple[int, ...], Document | None]] = {}
        self._unwritten: dict[str, Document] = {}  # what could not be written, by device
        self._stale: set[tuple[str, str, str]] = set()  # device, key and source of entries to drop
        self._warned: set[Path] = set()
        _alive.add(self)

    def path(self, device_name: str) -> Path:
        """The user's file of a device."""
        return self.folder / file_name(device_name)

    # ---- reading

    def lookup(self, device_name: str, key: str, source: str, check: Check) -> Entry | None:
        """What is known for a key: the user's measured entry, else a shipped measured one, else the user's solved one.

        Args:
            source: the kernel's present hash; entries with another are passed over.
            check: says of constants what is wrong with them, or None.
        """
        with self._lock:
            own = self._user_entry(device_name, key, source, check)
            if own is not None and own.by == "measured":
                return own
            return self._shipped_entry(device_name, key, source, check) or own

    def probe(self, device_name: str, scope: str = "") -> dict[str, float]:
        """Measured facts of a device, by field: the user's, else those shipped, else none.

        Args:
            scope: of which way to use the device, where that matters: what was put with another is not found.
        """
        with self._lock:
            for document in (self._user(device_name), self._read(self.shipped / file_name(device_name), device_name)):
                found = {name.rpartition("/"): value for name, value in document["probe"].items()}
                facts = {name: value for (of, _, name), value in found.items() if of == scope and name not in _ABOUT}
                if facts:
                    return facts
            return {}

    def probed(self, device_name: str | None = None) -> list[str]:
        """Devices of which the user has measured facts."""
        with self._lock:
            found = {
                document["device"] for origin, document in self._documents() if origin == "user" and document["probe"]
            }
        return sorted(name for name in found if device_name in (None, name))

    def entries(self, device_name: str | None = None, op: str | None = None) -> list[Listed]:
        """All entries, stale ones too, by device, key and origin.

        Args:
            device_name: only of this device.
            op: only of this operator, or operator and direction: "lstm", "lstm.forward".
        """
        with self._lock:
            found = [
                Listed(document["device"], key, origin, _entry(entry))
                for origin, document in self._documents()
                if device_name in (None, document["device"])
                for key, entry in document["entries"].items()
                if _belongs(key, op)
            ]
        return sorted(found, key=lambda each: (each.device, each.key, each.origin != "user"))

    def _user_entry(self, device_name: str, key: str, source: str, check: Check) -> Entry | None:
        entry = self._user(device_name)["entries"].get(key)
        if entry is None:
            return None
        if entry["source"] != source:
            self._stale.add((device_name, key, entry["source"]))
            return None
        wrong = check(entry["constants"])
        if wrong is None:
            return _entry(entry)
        self._take_out(device_name, key, entry, wrong)
        return None

    def _shipped_entry(self, device_name: str, key: str, source: str, check: Check) -> Entry | None:
        path = self.shipped / file_name(device_name)
        entry = self._read(path, device_name)["entries"].get(key)
        if entry is None or entry["source"] != source or entry["by"] != "measured":
            return None
        wrong = check(entry["constants"])
        if wrong is not None:
            self._warn(path, f"{key}: {wrong}: passed over")
            return None
        return _entry(entry)

    def _documents(self) -> Iterator[tuple[str, Document]]:
        for origin, folder in (("user", self.folder), ("shipped", self.shipped)):
            names = {path: None for path in sorted(folder.glob("*.json"))}
            if origin == "user":
                names |= {self.path(device): device for device in self._unwritten}
            for path, device_name in names.items():
                document = self._read(path, device_name)
                if origin == "user":
                    _merge(document, self._unwritten.get(device_name or document["device"]), later=True)
                if document["device"]:
                    yield origin, document

    def _user(self, device_name: str) -> Document:
        document = self._read(self.path(device_name), device_name)
        _merge(document, self._unwritten.get(device_name), later=True)
        return document

    def _read(self, path: Path, device_name: str | None) -> Document:
        """A document of the caller's own, empty if there is none. Bad files of the user are set aside."""
        try:
            found = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            self._read_before.pop(path, None)
            return _empty(device_name)
        except OSError as error:
            self._warn(path, f"not read: {error}")
            return _empty(device_name)
        state = (found.st_mtime_ns, found.st_size, found.st_ino)
        known = self._read_before.get(path)
        if known is None or known[0] != state:
            known = self._read_before[path] = state, self._read_now(path, device_name)
        return _copied(known[1]) if known[1] is not None else _empty(device_name)

    def _read_now(self, path: Path, device_name: str | None) -> Document | None:
        """What the file holds, or None for a bad one, or for one that is not there any more."""
        try:
            return _parsed(path, device_name)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(path, f"not read: {error}")
            return None
        except ValueError as error:
            if path.parent != self.folder:
                self._warn(path, f"{error}: passed over")
                return None
            wrong = str(error)
        try:
            with _locked(path, 0), suppress(FileNotFoundError):
                return self._sound(path, device_name)
        except OSError as error:
            self._warn(path, f"{wrong}: passed over ({error})")
        return None

    def _sound(self, path: Path, device_name: str | None) -> Document | None:
        """What the file holds, for whoever has the lock: a bad one is renamed."""
        try:
            return _parsed(path, device_name)
        except ValueError as error:
            bad = path.with_name(f"{path.name}.bad")
            os.replace(path, bad)
            self._warn(path, f"{error}: renamed to {bad.name}, and begun again")
            return None

    # ---- writing

    def put(self, device_name: str, arch: int | str, key: str, entry: Entry) -> bool:
        """Keep an entry. A solved one never takes the place of one measured with the same source.

        Returns:
            Whether the file was written; else this process alone remembers the entry.
        """
        from .. import __version__

        if entry.by not in ("measured", "solved"):
            raise ValueError(f"by: expected measured or solved, got {entry.by!r}")
        entry = replace(entry, seqops=entry.seqops or __version__, time=entry.time or _now())
        new = {name: value for name, value in vars(entry).items() if value is not None}
        new["constants"] = dict(entry.constants)
        added = {**_empty(device_name), "arch": arch, "entries": {key: new}}
        _check(added, device_name)
        return self._update(device_name, added)

    def put_probe(self, device_name: str, arch: int | str, facts: Mapping[str, float], scope: str = "") -> bool:
        """Keep measured facts of a device; those measured before and not now, or in another scope, stay.

        Returns:
            Whether the file was written; else this process alone remembers the facts.
        """
        from .. import __version__

        scoped = {f"{scope}/{name}" if scope else name: value for name, value in facts.items()}
        added = {**_empty(device_name), "arch": arch, "probe": {**scoped, "seqops": __version__, "time": _now()}}
        _check(added, device_name)
        return self._update(device_name, added)

    def clear(self, op: str | None = None, device_name: str | None = None) -> int:
        """Remove entries of the user, and return how many; what is shipped stays. Without `op` the probe goes too.

        Raises:
            OSError: if a file cannot be changed.
        """
        with self._lock:
            names = sorted({document["device"] for origin, document in self._documents() if origin == "user"})
        return sum(self._clear(name, op) for name in names if device_name in (None, name))

    def _clear(self, device_name: str, op: str | None) -> int:
        path, doomed = self.path(device_name), set()
        if path.exists():
            with _locked(path, _PATIENCE):
                present = _empty(device_name)
                with suppress(FileNotFoundError):
                    present = self._sound(path, device_name) or present
                doomed = {key for key in present["entries"] if _belongs(key, op)}
                left = _without(present, doomed, op is None)
                if left["entries"] or left["probe"]:
                    _write(path, left)
                else:
                    path.unlink(missing_ok=True)
        with self._lock:
            remembered = self._unwritten.get(device_name)
            if remembered is not None:
                doomed |= {key for key in remembered["entries"] if _belongs(key, op)}
                self._unwritten[device_name] = _without(remembered, doomed, op is None)
        return len(doomed)

    def _update(self, device_name: str, added: Document) -> bool:
        """Merge into the file, or where that fails into what this process remembers."""
        path = self.path(device_name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path, _PATIENCE):
                document = _empty(device_name)
                with suppress(FileNotFoundError):
                    document = self._sound(path, device_name) or document
                with self._lock:
                    remembered = self._unwritten.get(device_name)
                    _merge(document, remembered, later=True)
                    self._drop_stale(document, device_name, added)
                _merge(document, added)
                _write(path, document)
            with self._lock:
                if self._unwritten.get(device_name) is remembered:  # else another thread's write failed meanwhile
                    self._unwritten.pop(device_name, None)
            return True
        except OSError as error:
            self._warn(path, f"cannot be written ({error}): kept in memory only")
        with self._lock:
            document = _copied(self._unwritten.get(device_name, _empty(device_name)))
            self._drop_stale(document, device_name, added)
            _merge(document, added)
            self._unwritten[device_name] = document
        return False

    def _drop_stale(self, document: Document, device_name: str, added: Document) -> None:
        """Without the entries that were seen to be stale, and those of the same kernel from another source than now."""
        now = {_kernel(key): entry["source"] for key, entry in added["entries"].items()}
        document["entries"] = {
            key: entry
            for key, entry in document["entries"].items()
            if (device_name, key, entry["source"]) not in self._stale
            and now.get(_kernel(key), entry["source"]) == entry["source"]
        }

    def _take_out(self, device_name: str, key: str, entry: Document, wrong: str) -> None:
        """Remove an entry that does not solve its problem; the file with it is kept as *.bad."""
        path = self.path(device_name)
        remembered = self._unwritten.get(device_name)
        if remembered is not None and remembered["entries"].get(key) == entry:
            self._unwritten[device_name] = _without(remembered, {key}, False)
        try:
            with _locked(path, 0), suppress(FileNotFoundError):
                document = self._sound(path, device_name)
                if document is not None and document["entries"].get(key) == entry:
                    bad = path.with_name(f"{path.name}.bad")
                    shutil.copyfile(path, bad)
                    del document["entries"][key]
                    _write(path, document)
                    self._warn(path, f"{key}: {wrong}: taken out; the file as it was is {bad.name}")
        except OSError as error:
            self._warn(path, f"{key}: {wrong}: passed over ({error})")

    def _warn(self, path: Path, text: str) -> None:
        """Once for each file, whatever else happens to it."""
        if path not in self._warned:
            self._warned.add(path)
            warnings.warn(f"{path}: {text}", RuntimeWarning, stacklevel=2)


_shared: dict[Path, Store] = {}
_alive: weakref.WeakSet[Store] = weakref.WeakSet()


def _after_fork() -> None:
    """Another thread may have had a lock at the fork, and is not there to give it back."""
    for each in _alive:
        each._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def shared() -> Store:
    """The store of this process, in the cache folder of now."""
    from ..core import launch

    folder = launch.cache_folder() / "tune"
    known = _shared.get(folder)
    return known if known is not None else _shared.setdefault(folder, Store(folder))


def file_name(device_name: str) -> str:
    """A name that every file system takes, of one device only: "NVIDIA H200" -> nvidia-h200.json.

    That is the form of names in capitals with spaces, and of small letters alone ("h100"). In others case and
    punctuation have to count too, and a hash keeps them: "NVIDIA A100-SXM4" -> nvidia-a100-sxm4_9f2c41d0.json.
    """
    plain = re.sub(r"[^a-z0-9.]+", "-", device_name.lower()).strip("-.")[:80]
    if len(device_name) <= 80 and _PLAIN.fullmatch(device_name):
        return f"{plain}.json"
    digest = hashlib.sha256(device_name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain}_{digest}.json"


# ---- documents


def _entry(found: Document) -> Entry:
    return Entry(**{**found, "constants": {**found["constants"]}})


def _empty(device_name: str | None) -> Document:
    return {"format": FORMAT, "device": device_name or "", "arch": 0, "probe": {}, "entries": {}}


def _copied(document: Document) -> Document:
    return {**document, "probe": {**document["probe"]}, "entries": {**document["entries"]}}


def _merge(document: Document, added: Document | None, later: bool = False) -> None:
    """Put what is added over the document's own; with `later`, where the document's is not newer."""
    if added is None:
        return
    document["arch"] = added["arch"] or document["arch"]
    newer = later and _when(document["probe"]) > _when(added["probe"])
    document["probe"] = added["probe"] | document["probe"] if newer else document["probe"] | added["probe"]
    for key, entry in added["entries"].items():
        old = document["entries"].get(key)
        if old is not None:
            measured = old["by"] == "measured"
            if measured and entry["by"] == "solved" and old["source"] == entry["source"]:
                continue
            if later and (measured or entry["by"] == "solved") and _when(old) > _when(entry):
                continue
        document["entries"][key] = entry


def _when(found: Document) -> float:
    try:
        return datetime.fromisoformat(found["time"]).timestamp()
    except (KeyError, ValueError, OverflowError, OSError):  # not told, or no time: before all others
        return -math.inf


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _without(document: Document, keys: set[str], probe: bool) -> Document:
    left = {key: entry for key, entry in document["entries"].items() if key not in keys}
    return {**document, "entries": left, "probe": {} if probe else document["probe"]}


def _kernel(key: str) -> str:
    return key.partition("|")[0]


def _belongs(key: str, op: str | None) -> bool:
    return op is None or f"{_kernel(key)}.".startswith(f"{op}.")


def _parsed(path: Path, device_name: str | None) -> Document:
    """The document in a file.

    Raises:
        ValueError: if it is none, saying what is wrong with it.
    """
    text = path.read_bytes()
    if not text:
        raise ValueError("is empty")
    try:
        document = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON ({error})") from error
    _check(document, device_name)
    right = file_name(document["device"])
    _require(right == path.name, f"device: {document['device']!r} is that of {right}")
    return document


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _check(document: Any, device_name: str | None) -> None:
    """Raises ValueError with the place of the first thing that is not as it should be."""
    _require(isinstance(document, dict), "expected an object")
    _require(document.get("format") == FORMAT, f"format: expected {FORMAT}, got {document.get('format')!r}")
    for name, kind in (("device", str), ("arch", int | str), ("probe", dict), ("entries", dict)):
        value = document.get(name)
        _require(isinstance(value, kind), f"{name}: expected {_called(kind)}, got {value!r}")
    name = document["device"]
    _require(device_name in (None, name), f"device: expected {device_name!r}, got {name!r}")
    for name, value in document["probe"].items():
        right = isinstance(value, str) if name in _ABOUT else _is_number(value) and value > 0
        _require(right, f"probe: {name}: expected a positive number, got {value!r}")
    for key, entry in document["entries"].items():
        _check_entry(f"entries: {key}", entry)


def _check_entry(place: str, entry: Any) -> None:
    _require(isinstance(entry, dict), f"{place}: expected an object, got {entry!r}")
    constants = entry.get("constants")
    _require(isinstance(constants, dict), f"{place}: constants: expected an object, got {constants!r}")
    for name, value in constants.items():
        right = isinstance(value, int) and not isinstance(value, bool)
        _require(right, f"{place}: constants: {name}: expected an integer, got {value!r}")
    by = entry.get("by")
    _require(by in ("measured", "solved"), f"{place}: by: expected measured or solved, got {by!r}")
    for name in ("us", "model_us"):
        value = entry.get(name)
        _require(value is None or _is_number(value), f"{place}: {name}: expected a number, got {value!r}")
    for name in ("source", "seqops", "time"):
        value = entry.get(name, "" if name != "source" else None)
        _require(isinstance(value, str), f"{place}: {name}: expected text, got {value!r}")
    unknown = sorted({*entry} - {*Entry.__dataclass_fields__})
    _require(not unknown, f"{place}: unknown: {', '.join(unknown)}")


def _require(right: bool, wrong: str) -> None:
    if not right:
        raise ValueError(wrong)


def _called(kind: Any) -> str:
    return {str: "text", dict: "an object"}.get(kind, "a number or text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _text(document: Document) -> str:
    """The file's content: an entry a line, in order, so that two files can be compared."""

    encode = json.JSONEncoder(sort_keys=True).encode

    def row(name: str, value: Any) -> str:
        return f"{encode(name)}: {encode(value)}"

    rows = [row(name, document[name]) for name in ("format", "device", "arch", "probe")]
    entries = ",\n".join("  " + row(key, entry) for key, entry in sorted(document["entries"].items()))
    rows.append(f'"entries": {{\n{entries}\n }}' if entries else '"entries": {}')
    return "{" + ",\n ".join(rows) + "}\n"


def _locked(path: Path, patience: float) -> Any:
    """The lock of a file, waited for so many seconds."""
    from filelock import FileLock

    # Its Timeout is an OSError.
    return FileLock(path.with_name(f"{path.name}.lock"), timeout=patience, poll_interval=_POLL)


def _write(path: Path, document: Document) -> None:
    """Replace the file, for whoever has its lock: then temporary files are what killed writers left."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.", suffix=".tmp")
    try:
        os.fchmod(handle, 0o644)  # a cache can be shared
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(_text(document))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
