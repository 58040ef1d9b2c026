"""How the C++ kernels share their work: they ask here once for each kind of call, and remember the answer.

Calls of one kind differ in B and T only within a bucket, so that new lengths seldom ask. Without Python, as where an
exported model runs, csrc/rnn/plan.cpp has a rule of its own. Whatever the plan, the results have the same bits.
"""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import _C
from ..core import choose
from . import tiles

CELLS = ("lstm", "gru", "slstm", "elman")  # as csrc/rnn/rnn.h counts them
DIRECTIONS = ("forward", "backward")
STORAGES = ("float32", "float64", "bfloat16", "float16")
ANSWERED, FAILED, INTERRUPTED = 1, 2, 3

TUNABLES = {
    (op, direction): choose.Tunable(
        f"{op}.{direction}.cpu", tiles.problem, (f"rnn/{op}_kernel.cpp", Path(tiles.__file__))
    )
    for op in CELLS
    for direction in DIRECTIONS
}


class Question(ctypes.Structure):
    """PlanQuestion in csrc/rnn/plan.h."""

    _fields_: Sequence[Any] = [
        (name, ctypes.c_int64) for name in ("cell", "backward", "storage", "H", "D", "B", "T", "threads", "unpacked")
    ]


class Answer(ctypes.Structure):
    """PlanAnswer in csrc/rnn/plan.h."""

    _fields_: Sequence[Any] = [
        *((name, ctypes.c_int64) for name in ("status", *tiles.VARIABLES)),
        ("error", ctypes.c_char * 1024),
    ]


Planner = ctypes.CFUNCTYPE(None, ctypes.POINTER(Question), ctypes.POINTER(Answer))


def key(op: str, direction: str, dtype: str, shape: Mapping[str, int], threads: int, unpacked: bool) -> choose.Key:
    """Of a call with these H, D, B and T.

    Args:
        unpacked: the call is so short that it takes dot products with r as it lies, see `tiles.is_unpacked`.
    """
    sizes = (
        choose.Size("H", shape["H"]),
        choose.Size("D", shape["D"]),
        choose.bucket("B", shape["B"], tiles.ROW_EDGES, tiles.ROWS_BEYOND),
        choose.bucket("T", shape["T"], tiles.STEP_EDGES, tiles.STEPS_BEYOND),
        choose.Size("threads", threads),
    )
    flags = (torch.ops.seqops.cpu_isa(), *(("unpacked",) if unpacked else ()))
    return choose.Key(TUNABLES[op, direction].name, dtype, sizes, flags)


def plan(q: Question) -> choose.Solution:
    op, direction, dtype = CELLS[q.cell], DIRECTIONS[q.backward], STORAGES[q.storage]
    shape = {"H": q.H, "D": q.D, "B": q.B, "T": q.T}
    found = choose.solution(
        TUNABLES[op, direction], key(op, direction, dtype, shape, q.threads, bool(q.unpacked)), torch.device("cpu")
    )
    missing = [name for name in tiles.VARIABLES if name not in found]
    if missing:
        raise ValueError(f"{op}.{direction}.cpu: expected {', '.join(tiles.VARIABLES)}, got no {', '.join(missing)}")
    return found


@Planner
def _answer(question: Any, answer: Any) -> None:
    """C++ calls it on the thread that runs the operator. An exception would be lost in ctypes: it goes as a text."""
    try:
        found = plan(question.contents)
        for name in tiles.VARIABLES:
            setattr(answer.contents, name, found[name])
        answer.contents.status = ANSWERED
    except KeyboardInterrupt:  # C++ raises the signal once more: it cannot be thrown from here
        answer.contents.status = INTERRUPTED
    except BaseException as error:
        answer.contents.error = f"{type(error).__name__}: {error}".encode("ascii", "backslashreplace")[:1023]
        answer.contents.status = FAILED


def _edges(values: Sequence[int]) -> tuple[Any, int]:
    return (ctypes.c_int64 * len(values))(*values), len(values)


def connect() -> None:
    """From now on the kernels ask here."""
    library = ctypes.CDLL(_C.__file__)
    library.seqops_rnn_set_planner.argtypes = [Planner, *(ctypes.c_void_p, ctypes.c_int64) * 2]
    library.seqops_rnn_set_planner.restype = library.seqops_rnn_forget_plans.restype = None
    library.seqops_rnn_set_planner(_answer, *_edges(tiles.ROW_EDGES), *_edges(tiles.STEP_EDGES))
    choose.on_forget(library.seqops_rnn_forget_plans)
    # A thread that still runs when the interpreter is gone must not call into it.
    atexit.register(library.seqops_rnn_set_planner, Planner(), None, 0, None, 0)
