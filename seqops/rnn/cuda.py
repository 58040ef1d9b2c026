"""Launchers of the CUDA kernels of the recurrent operators: on CUDA tensors, or simulated on the CPU.

Arguments and results are those of the operators' schemas. One kernel runs all steps, or where that is not possible or
slower two run each step (cuda_alternating.py). Nothing synchronises.

Letters: B batch, T time, H heads, D units of a head, G gates.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import choose, launch, validate
from ..core.layout import dense_inside, new_sequence, ordered, time_first
from . import cuda_alternating, cuda_tiles
from .cells import CACHES, GATES
from .entries import entries

logger = logging.getLogger(__name__)


def _kernels(op: str) -> tuple[launch.Kernel, launch.Kernel]:
    """The entries of a cell's source: all cells take the same arguments."""
    return (
        launch.Kernel(f"rnn/{op}.cu", f"{op}_forward", "P" * 15 + "q" * 13 + "??PPq"),
        launch.Kernel(f"rnn/{op}.cu", f"{op}_backward", "P" * 21 + "q" * 13 + "??PPq"),
    )


LSTM_FORWARD, LSTM_BACKWARD = _kernels("lstm")
GRU_FORWARD, GRU_BACKWARD = _kernels("gru")
SLSTM_FORWARD, SLSTM_BACKWARD = _kernels("slstm")
ELMAN_FORWARD, ELMAN_BACKWARD = _kernels("elman")
KERNELS = {
    "lstm": (LSTM_FORWARD, LSTM_BACKWARD),
    "gru": (GRU_FORWARD, GRU_BACKWARD),
    "slstm": (SLSTM_FORWARD, SLSTM_BACKWARD),
    "elman": (ELMAN_FORWARD, ELMAN_BACKWARD),
}
TUNABLES = {
    (op, direction): choose.Tunable(f"{op}.{direction}.cuda", cuda_tiles.problem, (f"rnn/{op}.cu", cuda_tiles.__file__))
    for op in GATES
    for direction in ("forward", "backward")
}


@lru_cache(maxsize=4096)
def key_of(kernel: cuda_tiles.Pass, heads: int, batch: int, time: int) -> choose.Key:
    """D is compiled in. H and B matter as the blocks that they make, T as far as it hides what is done once."""
    sizes = (
        choose.Size("D", kernel.dim),
        choose.Size("V", kernel.vec),
        choose.bucket("H", heads, cuda_tiles.HEADS, 2 * cuda_tiles.HEADS[-1]),
        choose.bucket("B", batch, cuda_tiles.ROWS, 2 * cuda_tiles.ROWS[-1]),
        choose.bucket("T", time, cuda_tiles.STEPS, 4 * cuda_tiles.STEPS[-1]),
    )
    return choose.Key(f"{kernel.name}.cuda", kernel.dtype, sizes, ("train",) if kernel.train else ())


def _choose(kernel: cuda_tiles.Pass, like: Tensor, heads: int, batch: int, time: int) -> choose.Solution | None:
    """The constants; none, or None, where the recurrence goes step by step."""
    tunable = TUNABLES[kernel.op, kernel.direction]
    forced = choose.forced_solution(tunable.name)
    if forced is not None or not like.is_cuda:
        return cuda_tiles.simulated(kernel, batch, time) if forced is None else forced
    key = key_of(kernel, heads, batch, time)
    return choose.solution(tunable, key, like.device) if _fused(key, like.device) else None


@lru_cache(maxsize=4096)
def _fused(key: choose.Key, on: torch.device) -> bool:
    """Whether one kernel runs all steps. Once for each key, and in the debug log."""
    facts = choose.facts(on)
    fused = cuda_tiles.fused(facts, key)
    if not fused:
        reason = "is predicted to be faster" if cuda_tiles.fits(facts, key) else "no block or blocks hold the head"
        logger.debug("%s on %s: step by step, with torch's products: %s", key, facts.name, reason)
    return fused


choose.on_forget(_fused.cache_clear)  # facts of a device may have been measured since


@lru_cache(maxsize=4096)
def _planned(
    kernel: cuda_tiles.Pass, chosen: tuple[tuple[str, int], ...], heads: int, batch: int, time: int
) -> cuda_tiles.Launch:
    return cuda_tiles.launch(kernel, dict(chosen), heads, batch, time)


# ---- tensors as the kernels see them


def _state(state: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if state is None else state.to(dtype).contiguous()


def _filled(state: Tensor | None, like: Tensor, dtype: torch.dtype, shape: tuple[int, ...], absent: float) -> Tensor:
    """New memory that holds the state."""
    if state is None:
        return like.new_full(shape, absent, dtype=dtype)
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _lengths(lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else lengths.to(torch.int64).contiguous()


def _aligned(size: int, *tensors: Tensor | None) -> bool:
    """Whether two neighbouring units of all steps can be read together."""
    for t in tensors:
        if t is not None:
            strides = [t.stride(dim) for dim in range(t.ndim - 1) if t.shape[dim] > 1]
            if any(each * t.element_size() % size for each in strides) or t.data_ptr() % size:
                return False
    return True


class _Problem(NamedTuple):
    """One call: what forward and backward have in common."""

    op: str
    direction: str
    like: Tensor  # wx, or what the backward reads: gives dtype, device and memory order
    batch: int
    time: int
    heads: int
    units: int
    lengths: Tensor | None
    reverse: bool
    relu: bool

    @property
    def real(self) -> torch.dtype:
        return validate.real_of(self.like.dtype)

    def state_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.units

    def empty(self) -> bool:
        return self.batch == 0 or self.time == 0

    def sequence(self, *inner: int) -> Tensor:
        """A new [B, T, *inner, H, D]; what lies past a row's end is zero."""
        made = new_sequence(self.like, *inner, self.heads, self.units)
        return made if self.lengths is None else made.zero_()

    def pairs(self) -> tuple[int, int]:
        return (1, self.batch) if time_first(self.like) else (self.time, 1)

    def kernel(self, train: bool, *read: Tensor | None) -> cuda_tiles.Pass:
        dtype = str(self.like.dtype).removeprefix("torch.")
        size = 2 * self.like.element_size()
        pairs = self.like.element_size() == 2 and self.units % 2 == 0 and _aligned(size, *read)
        return cuda_tiles.Pass(self.op, self.direction, dtype, self.units, 2 if pairs else 1, train)

    def choose(self, kernel: cuda_tiles.Pass) -> choose.Solution | None:
        return _choose(kernel, self.like, self.heads, self.batch, self.time)

    def launch(self, kernel: cuda_tiles.Pass, chosen: choose.Solution, arguments: Sequence[Any]) -> None:
        planned = _planned(kernel, tuple(chosen.items()), self.heads, self.batch, min(self.time, 2))
        entry, like = KERNELS[self.op][self.direction == "backward"], self.like
        together = planned.teams  # in one launch
        if planned.cooperative or planned.workspace:
            blocks = entry.resident_blocks(planned.constants, planned.threads, like, planned.shared, planned.cluster)
            together = max(min(together, blocks // planned.blocks), 1)
        workspace = packets = None
        if planned.workspace:
            workspace = like.new_empty(together * planned.blocks * planned.workspace, dtype=torch.uint8)
        if planned.packets:
            packets = like.new_empty(together * planned.packets // 8, dtype=torch.int64)
        for first in range(0, planned.teams, together):
            teams = min(together, planned.teams - first)
            if packets is not None:
                packets.zero_()  # no tag is 0
            entry(
                planned.constants,
                teams * planned.blocks,
                planned.threads,
                (*arguments, workspace, packets, first),
                like=like,
                shared=planned.shared,
                cluster=planned.cluster,
                cooperative=planned.cooperative,
            )


# ---- forward


def _forward(
    op: str,
    train: bool,
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    states: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    reverse: bool,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, ...]:
    """h, the final states, and where `train` what the backward reads."""
    batch, time, _, heads, units = wx.shape
    problem = _Problem(op, "forward", wx, batch, time, heads, units, _lengths(lengths), reverse, nonlinearity == "relu")
    caches = CACHES[op] if train else ()
    inner = [() if planes is None else (planes,) for planes in caches]
    absent = [-math.inf if i == 3 else 0.0 for i in range(len(states))]  # m0

    def filled() -> list[Tensor]:
        shape = problem.state_shape()
        return [_filled(s, wx, problem.real, shape, value) for s, value in zip(states, absent, strict=True)]

    if problem.empty():
        return (problem.sequence(), *filled(), *(problem.sequence(*planes) for planes in inner))
    x = dense_inside(wx)
    h = problem.sequence()
    final = [wx.new_empty(problem.state_shape(), dtype=problem.real) for _ in states]
    kept = [problem.sequence(*planes) for planes in inner]
    bias = _state(b, problem.real)
    initial = [_state(s, problem.real) for s in states]
    kernel = problem.kernel(train, x)
    chosen = problem.choose(kernel)
    if not chosen:
        cuda_alternating.forward(op, x, r, bias, initial, problem.lengths, h, final, kept, reverse, problem.relu)
        return (h, *final, *kept)
    pointers = (x, r, bias, *_four(initial), problem.lengths, h, *_four(final), *(*kept, None, None)[:2])
    strides = (*x.stride()[:4], *r.stride(), *problem.pairs())
    problem.launch(kernel, chosen, (*pointers, batch, time, heads, *strides, reverse, problem.relu))
    return (h, *final, *kept)


def _four(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*tensors, None, None, None)[:4]


# ---- backward


def _backward(
    op: str,
    dh: Tensor | None,
    dfinal: tuple[Tensor | None, ...],
    r: Tensor,
    cache: Tensor | None,
    kept: Tensor | None,
    h: Tensor | None,
    initial: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    reverse: bool,
    grad_clip: float | None,
    nonlinearity: str = "tanh",
    final: tuple[Tensor | None, ...] = (None, None, None),
) -> tuple[Tensor, ...]:
    """dwx, for the GRU dy of its candidate, and the gradients of the initial states.

    Args:
        dfinal: of all states; initial: h, c and n; final: h, c and n of the sLSTM.
    """
    like = h if cache is None else cache
    batch, time = like.shape[:2]
    heads, units = like.shape[-2:]
    relu = nonlinearity == "relu"
    problem = _Problem(op, "backward", like, batch, time, heads, units, _lengths(lengths), reverse, relu)
    dwx = problem.sequence(GATES[op])
    dy = problem.sequence() if op == "gru" else None
    gradients = [_state(each, problem.real) for each in dfinal]
    states = [_state(each, problem.real) for each in initial]
    last = [_state(each, problem.real) for each in final]

    def filled(given: Sequence[Tensor | None]) -> list[Tensor]:
        return [_filled(s, like, problem.real, problem.state_shape(), 0.0) for s in given]

    def results(dinitial: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (dwx, *(() if dy is None else (dy,)), *dinitial)

    if problem.empty():
        return results(filled(gradients))
    dh = None if dh is None else dense_inside(dh)
    cache, kept, h = (ordered(t, like) for t in (cache, kept, h))
    dinitial = [like.new_empty(problem.state_shape(), dtype=problem.real) for _ in dfinal]
    kernel = problem.kernel(False, dh, cache, kept, h)
    chosen = problem.choose(kernel)
    if not chosen:
        cuda_alternating.backward(
            op, dh, gradients, r, cache, kept, h, last, states, problem.lengths, dwx, dy, dinitial, reverse, grad_clip,
            relu,
        )  # fmt: skip
        return results(dinitial)
    pointers = (dh, *_four(gradients), r, cache, kept, h, *last[1:], *states, problem.lengths, dwx, dy)
    strides = (*((0, 0, 0) if dh is None else dh.stride()[:3]), *r.stride(), *problem.pairs())
    clip = struct.unpack("<q", struct.pack("<d", -1.0 if grad_clip is None else grad_clip))[0]
    arguments = (*pointers, *_four(dinitial), batch, time, heads, *strides, clip, reverse, relu)
    problem.launch(kernel, chosen, arguments)
    return results(dinitial)


# ---- the operators

OPERATORS = entries(_forward, _backward)


def __getattr__(name: str) -> Any:
    """The operators by their registered names: lstm, lstm_forward, lstm_backward, ..."""
    try:
        return OPERATORS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
