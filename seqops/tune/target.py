"""What a room says of the kernels that can be tuned: `seqops/<room>/tune.py` holds them as TARGETS."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from ..core import choose, launch

SMALL = {"batch": 3, "time": 70}  # sizes at which values are checked, where a flag says nothing else
RESERVED = 1024  # bytes of shared memory a block that the compiler counts from sm_90 on, beyond the block's own


@dataclass(frozen=True)
class Flag:
    """One number, word or switch of a shape on the command line.

    Attributes:
        name: as on the command line without the dashes; the key in a shape, where `_` stands for `-`.
        choices: of a word.
        least: of a number.
        small: the number when values are checked, where the shape has more.
    """

    name: str
    default: int | str | bool
    help: str
    type: type = int
    choices: tuple[str, ...] = ()
    least: int = 1
    small: int | None = None

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


@dataclass(frozen=True)
class Report:
    """What the compiler made of a kernel: registers a thread, bytes of stack and spills a thread, of shared memory a
    block; threads a block, where the room says."""

    registers: int
    stack: int
    spills: int
    shared: int
    threads: int | None = None


@dataclass(frozen=True)
class Example:
    """A call of the kernel at one shape.

    Attributes:
        run: calls it, with the constants that `choose.forced` set, and gives the outputs.
        expected: the same from the reference in float64.
        tolerance: relative and absolute; of each value, as in torch.allclose.
    """

    run: Callable[[], Tensor | Sequence[Tensor]]
    expected: Callable[[], Tensor | Sequence[Tensor]]
    tolerance: tuple[float, float]


Shape = Mapping[str, Any]


def no_keys() -> Iterable[choose.Key]:
    return ()


@dataclass(frozen=True)
class Target:
    """One kernel that can be tuned.

    Attributes:
        op, direction: the public operator, and "forward" or "backward".
        tunable: its name ends in the backend.
        dtypes: the first is the default.
        key: (shape, dtype, device) to the key.
        compile: (device, key, constants) to a report; None where there is nothing to compile. Raises RuntimeError.
        example: (shape, dtype, torch device) to a call.
        distinct: the variables in which candidates have to differ; None: all.
        keys: those that are compiled offline for every preset by the tests.
    """

    op: str
    direction: str
    tunable: choose.Tunable
    flags: tuple[Flag, ...]
    dtypes: tuple[str, ...]
    key: Callable[[Shape, str, Any], choose.Key]
    compile: Callable[[Any, choose.Key, choose.Solution], Report | None]
    example: Callable[[Shape, str, str], Example]
    distinct: tuple[str, ...] | None = None
    keys: Callable[[], Iterable[choose.Key]] = no_keys

    @property
    def backend(self) -> str:
        return self.tunable.name.rpartition(".")[2]

    @property
    def title(self) -> str:
        """Operator and direction, and the kernel where a direction has several, or a second backend."""
        part = self.tunable.name.split(".")[-2]
        more = [word for word in (part, self.backend) if word not in (self.direction, "cpu", "cuda")]
        return f"{self.op} {self.direction}" + (f" ({', '.join(more)})" if more else "")

    def small(self, shape: Shape) -> dict[str, Any]:
        """The shape at which values are checked: the same constants serve any batch and time."""

        def limit(flag: Flag) -> Any:
            value, most = shape[flag.key], SMALL.get(flag.name) if flag.small is None else flag.small
            return value if most is None or flag.type is not int else min(value, most)

        return {flag.key: limit(flag) for flag in self.flags}


def targets() -> list[Target]:
    """Of all rooms, sorted by operator; a room without `tune.py` has none."""
    package = import_module(__name__.partition(".")[0])
    rooms = [module.name for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}.") if module.ispkg]
    found = [name for room in rooms if find_spec(name := f"{room}.tune") and room != __package__]
    return sorted(
        (target for name in found for target in import_module(name).TARGETS),
        key=lambda target: (target.op, target.direction != "forward", target.backend),
    )


def compile_cuda(
    source: str,
    constants: Mapping[str, int | str],
    architecture: str,
    shared: int = 0,
    threads: int | None = None,
) -> Report:
    """Compiles one kernel offline, for what it uses.

    Args:
        shared: bytes of dynamic shared memory, which the launch asks for.

    Raises:
        RuntimeError: with the compiler's words, or that cuobjdump is missing.
    """
    used = launch.resources(launch.compile_offline(source, constants, architecture))
    reserved = RESERVED if int(architecture.removeprefix("sm_").rstrip("abcdef")) >= 90 else 0
    fixed = max(used.get("SHARED", 0) - reserved, 0)
    return Report(used["REG"], used.get("STACK", 0), used.get("LOCAL", 0), fixed + shared, threads)
