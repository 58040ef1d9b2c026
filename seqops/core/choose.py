"""Which constants a kernel runs with: what the call of an operator asks, and where the answer comes from.

An answer depends on the device, the key and the files of the tuner, never on earlier calls, and nothing is timed here:
it is what the store holds for the key, else what the kernel's own problem gives. `seqops.tune` does the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import launch

if TYPE_CHECKING:
    from ..tune import csp

Solution = Mapping[str, int]


class Size(NamedTuple):
    """A size that a choice depends on. `value` is what the problem is solved at: the whole bucket's representative."""

    name: str
    value: int
    relation: str = "="  # of a bucket "<=", or ">64" for all that is above

    def __str__(self) -> str:
        return f"{self.name}{self.relation}" + (f"{self.value}" if self.relation in ("=", "<=") else "")


def bucket(name: str, value: int, edges: Sequence[int], beyond: int) -> Size:
    """The smallest of the rising `edges` that is not below `value`; above the last one, `beyond` represents all."""
    for edge in edges:
        if value <= edge:
            return Size(name, edge, "<=")
    return Size(name, beyond, f">{edges[-1]}")


class Key(NamedTuple):
    """What a choice depends on, beside the device."""

    kernel: str  # operator.direction.backend
    dtype: str
    sizes: tuple[Size, ...]
    flags: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> int:  # type: ignore[override]  # by name
        for size in self.sizes:
            if size.name == name:
                return size.value
        raise KeyError(f"{self}: no size {name!r}")

    def __str__(self) -> str:
        parts = (self.kernel, self.dtype, ",".join(map(str, self.sizes)), ",".join(self.flags))
        return "|".join(part for part in parts if part)


class Tunable:
    """A kernel whose constants are chosen.

    Args:
        name: operator.direction.backend, as in "linear_scan.forward.cuda".
        problem: (device, key) to the csp.Problem whose solutions are the constants. The device is a
            `tune.device.Device`, or for the CPU a `tune.device.Host`.
        sources: files that the kernel and the problem are written in, absolute or below csrc/. A stored choice holds
            for one content of them and of what they include.
    """

    def __init__(self, name: str, problem: Callable[[Any, Key], csp.Problem], sources: Sequence[str | Path]) -> None:
        self.name = name
        self.problem = problem
        self.sources = tuple(sources)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits that change with the sources."""
        contents: dict[Path, bytes] = {}
        wanted = [launch.SOURCES / source for source in self.sources]
        while wanted:
            path = wanted.pop().resolve()
            # A package may be packed without its sources: then a stored choice holds whatever they are.
            if path not in contents and path.is_file():
                contents[path] = path.read_bytes()
                if path.suffix != ".py":
                    wanted += _included(path, contents[path].decode("utf-8", "replace"))
        # In an order that does not depend on where the package is installed, and without the paths themselves.
        parts = sorted((path.name, content) for path, content in contents.items())
        return hashlib.sha256(b"\0".join(content for _, content in parts)).hexdigest()[:16]


def _included(path: Path, text: str) -> Iterator[Path]:
    """Our files that a source includes, found from its own folder or from csrc."""
    for name in launch.INCLUDE.findall(text):
        places = (path.parent / name, launch.SOURCES / name)
        yield from [place for place in places if place.is_file()][:1]


_memo: dict[tuple[Key, torch.device], Solution] = {}
_generation = 0  # of what is remembered
_forced: dict[str, list[Solution]] = {}  # by the kernel's name; the last one holds
_forgetters: list[Callable[[], None]] = []


def solution(tunable: Tunable, key: Key, on: torch.device) -> Solution:
    """The constants for a key on a device, which may be the CPU.

    Raises:
        RuntimeError: if no constants make the kernel run there, with the constraints that exclude each other.
    """
    if _forced:
        forced = forced_solution(tunable.name)
        if forced is not None:
            return forced
    known = _memo.get((key, on))
    if known is None:
        generation = _generation
        known = _decide(tunable, key, on)
        if generation == _generation:  # else the files have changed since
            _memo[key, on] = known
    return known


def facts(on: torch.device) -> Any:
    """What problems are given of a device: a `tune.device.Device`, or `Host` for the CPU."""
    from ..tune import device

    return device.of(on)


def _decide(tunable: Tunable, key: Key, on: torch.device) -> Solution:
    from ..tune import csp, device, store

    facts = device.of(on)
    problem = tunable.problem(facts, key)
    entry = store.shared().lookup(facts.name, str(key), tunable.digest, problem.check)
    if entry is not None:
        return entry.constants
    try:
        # No limit of time: the answer must not depend on how busy the machine is.
        best = problem.solve(seconds=math.inf)
    except csp.LimitReached as limit:
        best = limit.best
        if best is None:
            raise RuntimeError(f"{tunable.name}: nothing found on {facts.name} for {key}: {limit}") from limit
    if best is None:
        raise RuntimeError(f"{tunable.name}: nothing fits {facts.name} for {key}: {problem.explain()}")
    return best


def forced_solution(name: str) -> Solution | None:
    """What `forced` set for the kernel of this name."""
    return (_forced.get(name) or (None,))[-1]


@contextlib.contextmanager
def forced(name: str, constants: Solution) -> Iterator[None]:
    """Inside, the kernel of this name runs with these constants, in every thread."""
    # Blocks of several threads may overlap: each takes away its own.
    mine = dict(constants)
    _forced.setdefault(name, []).append(mine)
    _clear()
    try:
        yield
    finally:
        _forced[name] = [each for each in _forced[name] if each is not mine]
        if not _forced[name]:
            del _forced[name]
        _clear()


def forget() -> None:
    """Ask again at the next call: the files have changed."""
    global _generation
    _generation += 1
    _memo.clear()
    _clear()


def on_forget(callback: Callable[[], None]) -> None:
    """Have `callback` forget what is remembered elsewhere."""
    _forgetters.append(callback)


def _clear() -> None:
    for callback in _forgetters:
        callback()
