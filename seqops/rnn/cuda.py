"""Launchers of the CUDA kernels of the recurrent operators: on CUDA tensors, or simulated on the CPU.

Arguments and results are those of the operators' schemas. A head that one block can hold runs in one kernel for all
steps; any other step by step in torch (cuda_alternating.py). Nothing synchronises.

Letters: B batch, T time, H heads, D units of a head, G gates.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import choose, launch, validate
from ..core.layout import new_sequence, time_first
from . import cuda_alternating, cuda_tiles


def _kernels(op: str) -> tuple[launch.Kernel, launch.Kernel]:
    """The entries of a cell's source: all cells take the same arguments."""
    return (
        launch.Kernel(f"rnn/{op}.cu", f"{op}_forward", "P" * 15 + "q" * 13 + "??"),
        launch.Kernel(f"rnn/{op}.cu", f"{op}_backward", "P" * 21 + "q" * 13 + "??"),
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
    for op in cuda_tiles.GATES
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
    """The constants, or None where no block holds a head."""
    tunable = TUNABLES[kernel.op, kernel.direction]
    if like.is_cuda:
        if choose.forced_solution(tunable.name) is None and not _fits(kernel, like.device):
            return None
        return choose.solution(tunable, key_of(kernel, heads, batch, time), like.device)
    forced = choose.forced_solution(tunable.name)
    return cuda_tiles.simulated(kernel, batch) if forced is None else forced


@lru_cache(maxsize=4096)
def _fits(kernel: cuda_tiles.Pass, on: torch.device) -> bool:
    return cuda_tiles.fits(choose.facts(on), key_of(kernel, 1, 1, 1))


# ---- tensors as the kernels see them


def _rows(t: Tensor) -> Tensor:
    """With units next to each other."""
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _ordered(t: Tensor | None, like: Tensor) -> Tensor | None:
    """A sequence that we made, dense in the memory order of `like`; a copy only where a caller gave another one."""
    if t is None:
        return None
    same = new_sequence(like, *t.shape[2:]) if not _is_dense(t, like) else t
    return t if same is t else same.copy_(t)


def _is_dense(t: Tensor, like: Tensor) -> bool:
    inner = t[0, 0] if t.numel() else t
    width = math.prod(t.shape[2:])
    rows, steps = (width, width * t.shape[0]) if time_first(like) else (width * t.shape[1], width)
    fits = all(t.shape[dim] == 1 or t.stride(dim) == stride for dim, stride in ((0, rows), (1, steps)))
    return fits and inner.is_contiguous()


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
        planned = cuda_tiles.launch(kernel, chosen, self.heads, self.batch)
        entry = KERNELS[self.op][self.direction == "backward"]
        entry(planned.constants, planned.grid, planned.threads, arguments, like=self.like, shared=planned.shared)


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
    caches = cuda_tiles.CACHES[op] if train else ()
    inner = [() if planes is None else (planes,) for planes in caches]
    absent = [-math.inf if i == 3 else 0.0 for i in range(len(states))]  # m0

    def filled() -> list[Tensor]:
        shape = problem.state_shape()
        return [_filled(s, wx, problem.real, shape, value) for s, value in zip(states, absent, strict=True)]

    if problem.empty():
        return (problem.sequence(), *filled(), *(problem.sequence(*planes) for planes in inner))
    x = _rows(wx)
    kernel = problem.kernel(train, x)
    chosen = problem.choose(kernel)
    if chosen is None:
        return cuda_alternating.forward(op, wx, r, b, filled(), problem.lengths, reverse, problem.relu, train)
    h = problem.sequence()
    final = [wx.new_empty(problem.state_shape(), dtype=problem.real) for _ in states]
    kept = [problem.sequence(*planes) for planes in inner]
    bias = _state(b, problem.real)
    initial = [_state(s, problem.real) for s in states]
    pointers = (x, r, bias, *_four(initial), problem.lengths, h, *_four(final), *(*kept, None, None)[:2])
    strides = (*x.stride()[:4], *r.stride(), *problem.pairs())
    arguments = (*pointers, batch, time, heads, *strides, reverse, problem.relu)
    problem.launch(kernel, chosen, arguments)
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
    dwx = problem.sequence(cuda_tiles.GATES[op])
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
    dh = None if dh is None else _rows(dh)
    cache, kept, h = (_ordered(t, like) for t in (cache, kept, h))
    kernel = problem.kernel(False, dh, cache, kept, h)
    chosen = problem.choose(kernel)
    if chosen is None:
        dwx, dy, dinitial = cuda_alternating.backward(
            op, dh, filled(gradients), r, like, cache, kept, h, filled(states), last, problem.lengths, reverse,
            grad_clip, relu,
        )  # fmt: skip
        return results(dinitial)
    dinitial = [like.new_empty(problem.state_shape(), dtype=problem.real) for _ in dfinal]
    pointers = (dh, *_four(gradients), r, cache, kept, h, *last[1:], *states, problem.lengths, dwx, dy)
    strides = (*((0, 0, 0) if dh is None else dh.stride()[:3]), *r.stride(), *problem.pairs())
    clip = struct.unpack("<q", struct.pack("<d", -1.0 if grad_clip is None else grad_clip))[0]
    arguments = (*pointers, *_four(dinitial), batch, time, heads, *strides, clip, reverse, relu)
    problem.launch(kernel, chosen, arguments)
    return results(dinitial)


# ---- the operators


def lstm(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
    train: bool = False,
) -> tuple[Tensor, ...]:
    return _forward("lstm", train, wx, r, b, (h0, c0), lengths, reverse)


def gru(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
    train: bool = False,
) -> tuple[Tensor, ...]:
    return _forward("gru", train, wx, r, b, (h0,), lengths, reverse)


def slstm(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
    train: bool = False,
) -> tuple[Tensor, ...]:
    return _forward("slstm", train, wx, r, b, (h0, c0, n0, m0), lengths, reverse)


def elman(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    return _forward("elman", False, wx, r, b, (h0,), lengths, reverse, nonlinearity)


lstm_forward, gru_forward, slstm_forward = (partial(function, train=True) for function in (lstm, gru, slstm))


def lstm_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    r: Tensor,
    p: Tensor,
    c: Tensor,
    c0: Tensor | None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    return _backward("lstm", dh, (dh_n, dc_n), r, p, c, None, (None, c0, None), lengths, reverse, grad_clip)


def gru_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    r: Tensor,
    p: Tensor,
    y: Tensor,
    h: Tensor,
    h0: Tensor | None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    return _backward("gru", dh, (dh_n,), r, p, y, h, (h0, None, None), lengths, reverse, grad_clip)


def slstm_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dn_n: Tensor | None,
    dm_n: Tensor | None,
    r: Tensor,
    cache: Tensor,
    c_n: Tensor,
    n_n: Tensor,
    c0: Tensor | None,
    n0: Tensor | None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    dfinal = (dh_n, dc_n, dn_n, dm_n)
    final = (None, c_n, n_n)
    return _backward(
        "slstm", dh, dfinal, r, cache, None, None, (None, c0, n0), lengths, reverse, grad_clip, final=final
    )


def elman_backward(
    dh: Tensor | None,
    dh_n: Tensor | None,
    r: Tensor,
    h: Tensor,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, ...]:
    none = (None, None, None)
    return _backward("elman", dh, (dh_n,), r, None, None, h, none, lengths, reverse, grad_clip, nonlinearity)
