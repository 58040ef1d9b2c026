"""Which backend serves an operator: the table of what exists, and forcing one.

The CPU key of an operator holds a C++ kernel. The first use of `backend(...)` takes those kernels out and puts Python
kernels in their place, which look at a context variable and fall back to C++. Whoever never forces a backend pays
nothing, and forcing works where the Autograd key is not consulted (inference_mode) and per thread. An operator that is
composed of others in Python has such a kernel from the start. The CUDA key holds a Python kernel that takes the forced
backend, or the first of those provided for GPUs that works on this machine.

Modules of the GPU backends are imported when they are first used: `import seqops` loads neither Triton nor CuPy.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from . import launch

BACKENDS = ("reference", "cpu", "triton", "cuda")
NATIVE = {"cpu": "CPU"}  # backends whose kernels are C++, registered on a dispatch key by the extension
GPU_BACKENDS = ("cuda", "triton")  # where an operator provides no order of its own
DEVICES = ("cpu", "cuda")  # of tensors that have data

library = torch.library.Library("seqops", "FRAGMENT")

_forced: ContextVar[str | None] = ContextVar("seqops_backend", default=None)
_served: dict[str, dict[str, Callable[..., Any] | None]] = {}  # operator -> backend -> Python function, None if native
_part_of: dict[str, str] = {}  # private operator -> public operator
_made_of: dict[str, tuple[str, ...]] = {}  # operator without kernels of its own -> the operators that it calls
_switchable: set[str] = set()
_switching = threading.Lock()


def provide(
    op_name: str,
    backend_name: str,
    function: Callable[..., Any] | None = None,
    *,
    check: Callable[..., None] | None = None,
    part_of: str | None = None,
) -> None:
    """Declare that a backend serves an operator: by `function`, or by a native kernel where `function` is None.

    Of the GPU backends, the first one provided that works on a machine is that of its CUDA tensors. A function for a
    backend whose kernels are otherwise native goes on that backend's dispatch key.

    Args:
        check: called first, with the arguments: raises for those that the operator refuses.
        part_of: the public operator of which this is a training or backward step. It stays out of `table()`, and
            messages speak of the public one.
    """
    check_name(backend_name)
    if function is not None and check is not None:
        function = _checked(function, check)
    _served.setdefault(op_name, {})[backend_name] = function
    if part_of is not None:
        _part_of[op_name] = part_of
    if function is not None and backend_name in NATIVE:
        _put_python(op_name, NATIVE[backend_name], function)


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return function(*args, **kwargs)

    return checked


def provide_module(
    op_name: str,
    module: str,
    *,
    check: Callable[..., None],
    part_of: str | None = None,
    backends: Sequence[str] = GPU_BACKENDS,
) -> None:
    """Declare that the functions named `op_name` of `module`'s Triton and CUDA submodules serve an operator.

    Args:
        check: called first, with the arguments: raises for those that the operator refuses.
        part_of: as for `provide`.
        backends: the submodules that there are, the preferred one first.
    """
    for name in backends:

        def call(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            return getattr(import_module(f"{module}.{_name}"), op_name)(*args, **kwargs)

        provide(op_name, name, call, check=check, part_of=part_of)


def compose(op_name: str, parts: Sequence[str], reference: Callable[..., Any]) -> None:
    """Declare that an operator has no kernels of its own: a backend serves it that serves all the operators it calls.

    Args:
        parts: those operators.
        reference: serves the forced backend "reference".
    """
    _made_of[op_name] = tuple(parts)
    provide(op_name, "reference", reference)


def kernels() -> list[tuple[str, str, str]]:
    """What the GPU backends have kernels for, on whatever machine: registered operator, public operator, backend."""
    return [
        (op, _part_of.get(op, op), name) for op, served in _served.items() for name in GPU_BACKENDS if name in served
    ]


def current() -> str | None:
    """The forced backend of this thread and context, or None."""
    return _forced.get()


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Force every seqops operator in this context to one backend.

    A call that the backend cannot serve raises RuntimeError with the reason; it never falls back in silence. What
    `torch.compile` has already compiled keeps the backend that it was traced with.

    Args:
        name: "reference" (plain PyTorch, any device, differentiable any number of times), "cpu", "triton" or "cuda".

    Raises:
        ValueError: for another name.
    """
    check_name(name)
    for op_name in _served:
        _make_switchable(op_name)
    with resume(name):
        yield


@contextmanager
def resume(name: str | None) -> Iterator[None]:
    """The forced backend `name` again, in another thread: autograd runs the backward of CUDA tensors in its own."""
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")


def read_environment() -> None:
    """Force the backend that SEQOPS_BACKEND names on the whole process. Called once, when all rooms are registered."""
    name = os.environ.get("SEQOPS_BACKEND")
    if not name:
        return
    if name not in BACKENDS:
        raise ImportError(f"SEQOPS_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    global _forced
    _forced = ContextVar("seqops_backend", default=name)
    for op_name in _served:
        _make_switchable(op_name)


def reason_missing(op_name: str, name: str, device: str | None = None) -> str | None:
    """Why a backend does not serve an operator on this machine, or None where it does.

    Args:
        device: "cpu" or "cuda": for tensors of that device. None: for any.
    """
    if op_name in _made_of and name != "reference":
        return next(filter(None, (reason_missing(part, name, device) for part in _made_of[op_name])), None)
    if name not in _served.get(op_name, {}):
        return f"no {name} kernel in this release"
    if name not in GPU_BACKENDS:
        return None
    on_gpu, on_cpu = {"triton": _triton_reasons, "cuda": _cuda_reasons}[name]()
    if device is not None:
        return on_gpu if device == "cuda" else on_cpu
    return on_gpu and on_cpu and f"{on_gpu}; {on_cpu}"


def _cuda_reasons() -> tuple[str | None, str | None]:
    """Why CUDA C++ kernels serve no CUDA tensors, and why they serve no CPU tensors."""
    return launch.reason_missing(), launch.reason_not_simulated()


def _triton_reasons() -> tuple[str | None, str | None]:
    if not _installed("triton"):
        return ("Triton is not installed (pip install triton)",) * 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 interprets Triton kernels on the CPU", None
    on_gpu = None if torch.cuda.is_available() else "torch finds no CUDA device"
    return on_gpu, "the environment variable TRITON_INTERPRET is not set (to 1)"


@cache
def _installed(package: str) -> bool:
    return find_spec(package) is not None


def table() -> dict[str, dict[str, str | None]]:
    """Public operators x backends: None where the backend works on this machine, else the reason why it does not."""
    return {op: {name: reason_missing(op, name) for name in BACKENDS} for op in sorted(_served) if op not in _part_of}


def serve_python(op_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the forced backend's Python function, or raise with the reason why there is none."""
    name, device = current(), _device_of(args)
    function = _served.get(op_name, {}).get(name) if name is not None else None
    if function is None or (name in GPU_BACKENDS and reason_missing(op_name, name, device) is not None):
        raise RuntimeError(refusal(op_name, name, device))
    return function(*args, **kwargs)


def serve_by(name: str, op_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call another backend's function: for a backend that leaves part of an operator's calls to it."""
    function = _served.get(op_name, {}).get(name)
    device = _device_of(args)
    if function is None or reason_missing(op_name, name, device) is not None:
        raise RuntimeError(refusal(op_name, name, device))
    return function(*args, **kwargs)


def serve_composite(op_name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an operator that is made of others: its reference where that is forced, else `function`.

    The parts obey a forced backend themselves; what one of them cannot serve is told of the whole, before any runs.
    """
    name = current()
    if name is None:
        return function(*args, **kwargs)
    if name == "reference":
        return serve_python(op_name, *args, **kwargs)
    device = _device_of(args)
    unfit = device == "cuda" if name in NATIVE else reason_missing(op_name, name, device) is not None
    if unfit and device in DEVICES:
        raise RuntimeError(refusal(op_name, name, device))
    return function(*args, **kwargs)


def refusal(op_name: str, name: str | None, device: str, reason: str | None = None) -> str:
    """The text of the error where no kernel can serve a call, with the backend's own `reason` where it has one."""
    public = _part_of.get(op_name, op_name)
    exist = "backends that exist: " + ", ".join(other for other in BACKENDS if _exists(public, other))
    if name is None:
        reasons = [f"{other}: {reason_missing(op_name, other, device)}" for other in GPU_BACKENDS]
        return f"seqops::{public}: no kernel for {device} tensors ({'; '.join(reasons)}); {exist}"
    reason = reason or reason_missing(op_name, name, device) or f"it does not take {device} tensors"
    return f"seqops::{public}: backend {name!r} cannot serve this call: {reason}; {exist}"


def _exists(op_name: str, name: str) -> bool:
    if op_name in _made_of and name != "reference":
        return all(_exists(part, name) for part in _made_of[op_name])
    return name in _served.get(op_name, {})


def _device_of(args: tuple[Any, ...]) -> str:
    return next((arg.device.type for arg in args if isinstance(arg, torch.Tensor)), "cpu")


def register_elsewhere(op: torch._ops.OpOverload) -> None:
    """The CUDA key: the forced backend, else the first GPU backend that works here, else an error that says why not."""
    op_name = op._schema.name.partition("::")[2]

    @cache
    def default() -> str | None:
        order = [name for name in _served.get(op_name, {}) if name in GPU_BACKENDS]
        return next((name for name in order if reason_missing(op_name, name, "cuda") is None), None)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        name = current()
        if name is not None:
            if name in NATIVE:
                raise RuntimeError(refusal(op_name, name, "cuda"))
            return serve_python(op_name, *args, **kwargs)
        name = default()
        if name is None:
            raise RuntimeError(refusal(op_name, None, "cuda"))
        return _served[op_name][name](*args, **kwargs)

    library.impl(op, kernel, "CUDA")


def _make_switchable(op_name: str) -> None:
    with _switching:
        if op_name not in _switchable and op_name not in _made_of:
            _replace_kernel(op_name)
            _switchable.add(op_name)


def _replace_kernel(op_name: str) -> None:
    op = getattr(torch.ops.seqops, op_name).default
    native = torch.library.get_kernel(op, "CPU")

    def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        name = current()
        if name is None or NATIVE.get(name) == "CPU":
            return native.call_boxed(keyset, *args, **kwargs)
        return serve_python(op_name, *args, **kwargs)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that a kernel is replaced: that is the point
        library.impl(op, kernel, "CPU", with_keyset=True)


def _put_python(op_name: str, key: str, function: Callable[..., Any]) -> None:
    """On a dispatch key that has no native kernel: `function`, or whatever other backend is forced."""

    def kernel(*args: Any, **kwargs: Any) -> Any:
        name = current()
        if name is None or NATIVE.get(name) == key:
            return function(*args, **kwargs)
        return serve_python(op_name, *args, **kwargs)

    library.impl(getattr(torch.ops.seqops, op_name).default, kernel, key)
    _switchable.add(op_name)
