"""Which backend serves an operator: the table of what exists, and forcing one.

The CPU key of every operator holds a C++ kernel. The first use of `backend(...)` takes those kernels out and puts
Python kernels in their place, which look at a context variable and fall back to C++. Whoever never forces a backend
pays nothing, and forcing works where the Autograd key is not consulted (inference_mode) and per thread.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")
NATIVE = {"cpu": "CPU"}  # backends whose kernels are C++, registered on a dispatch key by the extension

library = torch.library.Library("seqops", "FRAGMENT")

_forced: ContextVar[str | None] = ContextVar("seqops_backend", default=None)
_served: dict[str, dict[str, Callable[..., Any] | None]] = {}  # operator -> backend -> Python function, None if native
_part_of: dict[str, str] = {}  # private operator -> public operator
_switchable: set[str] = set()


def provide(
    op_name: str, backend_name: str, function: Callable[..., Any] | None = None, *, part_of: str | None = None
) -> None:
    """Declare that a backend serves an operator: by `function`, or by a native kernel where `function` is None.

    Args:
        part_of: the public operator of which this is a training or backward step. It stays out of `table()`, and
            messages speak of the public one.
    """
    check_name(backend_name)
    _served.setdefault(op_name, {})[backend_name] = function
    if part_of is not None:
        _part_of[op_name] = part_of


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


def reason_missing(op_name: str, name: str) -> str | None:
    """Why a backend does not serve an operator on this machine, or None where it does."""
    if name in _served.get(op_name, {}):
        return None
    return f"no {name} kernel in this release"


def table() -> dict[str, dict[str, str | None]]:
    """Public operators x backends: None where the backend works on this machine, else the reason why it does not."""
    return {op: {name: reason_missing(op, name) for name in BACKENDS} for op in sorted(_served) if op not in _part_of}


def serve_python(op_name: str, *args: Any, **kwargs: Any) -> Any:
    """Call the forced backend's Python function, or raise with the reason why there is none."""
    name = current()
    function = _served.get(op_name, {}).get(name) if name is not None else None
    if function is None:
        raise RuntimeError(refusal(op_name, name))
    return function(*args, **kwargs)


def refusal(op_name: str, name: str | None, device: str | None = None) -> str:
    """The text of the error where no kernel can serve a call."""
    op_name = _part_of.get(op_name, op_name)
    exist = "backends that exist: " + ", ".join(other for other in BACKENDS if other in _served.get(op_name, {}))
    if name is None:
        return f"seqops::{op_name}: no kernel for {device} tensors in this release; {exist}"
    reason = reason_missing(op_name, name) or f"it does not take {device} tensors"
    return f"seqops::{op_name}: backend {name!r} cannot serve this call: {reason}; {exist}"


def register_elsewhere(op: torch._ops.OpOverload) -> None:
    """The CUDA key, until a GPU backend claims it: the reference where it is forced, else an error that says so."""
    op_name = op._schema.name.partition("::")[2]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if current() == "reference":
            return serve_python(op_name, *args, **kwargs)
        raise RuntimeError(refusal(op_name, current(), "cuda"))

    library.impl(op, kernel, "CUDA")


def _make_switchable(op_name: str) -> None:
    if op_name in _switchable:
        return
    _switchable.add(op_name)
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
