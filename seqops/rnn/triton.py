"""Launchers of the recurrent operators' Triton kernels: on CUDA tensors, or on the CPU by Triton's interpreter.

Arguments and results are those of the operators' schemas. Nothing synchronises.

Letters: B batch, T time, H heads, D units of a head, G gates.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import backend, choose
from ..core.layout import dense_inside, new_sequence, ordered, time_first
from . import triton_kernels as kernels
from . import triton_tiles as tiles
from .entries import entries

CELLS = {"lstm": kernels.LSTM, "gru": kernels.GRU, "slstm": kernels.SLSTM, "elman": kernels.ELMAN}
CACHES = {"lstm": (4, None), "gru": (3, None), "slstm": (7,), "elman": ()}  # as op.py has them
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

SOURCES = (tiles.__file__, __file__, str(Path(__file__).with_name("triton_kernels.py")))
TUNABLES = {
    (op, direction): choose.Tunable(f"{op}.{direction}.triton", tiles.problem, SOURCES)
    for op in tiles.GATES
    for direction in ("forward", "backward")
}


@lru_cache(maxsize=4096)
def key_of(kernel: tiles.Kernel, heads: int, batch: int) -> choose.Key:
    """A step's time is that of all others, so T does not matter."""
    sizes = (
        choose.Size("D", kernel.units),
        choose.bucket("H", heads, tiles.HEADS, 2 * tiles.HEADS[-1]),
        choose.bucket("B", batch, tiles.BATCHES, 2 * tiles.BATCHES[-1]),
    )
    return choose.Key(f"{kernel.name}.triton", kernel.dtype, sizes)


def shape_of(kernel: tiles.Kernel, like: Tensor, heads: int, batch: int) -> tiles.Shape:
    tunable = TUNABLES[kernel.op, kernel.direction]
    chosen: choose.Solution | None
    if like.is_cuda:
        chosen = choose.solution(tunable, key_of(kernel, heads, batch), like.device)
    else:
        chosen = choose.forced_solution(tunable.name)
    return kernel.shapes()[0] if chosen is None else tiles.shape(kernel, chosen["rows"])


def precision(dtype: torch.dtype) -> str:
    """Of the products: the user says whether float32 may be rounded to tf32.

    In either way that torch has, and this attribute tells of both. torch.get_float32_matmul_precision() raises an error
    once the newer one has been used.
    """
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def options(shape: tiles.Shape) -> dict[str, Any]:
    """Of the compiler. Left to itself, ptxas saves registers by spilling a word or two."""
    most = min(255, 65536 // (32 * shape.warps))
    return {"num_warps": shape.warps, "num_stages": shape.stages, "enable_fp_fusion": True, "maxnreg": most}


# ---- tensors as the kernels see them


def dense(t: Tensor | None) -> Tensor | None:
    """A state or bias."""
    return None if t is None else t.to(torch.float32).contiguous()


def filled(t: Tensor | None, like: Tensor, shape: tuple[int, ...], absent: float = 0.0) -> Tensor:
    """New memory that holds the state."""
    if t is None:
        return like.new_full(shape, absent, dtype=torch.float32)
    return t.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def bits(*present: Tensor | None) -> int:
    return sum(1 << i for i, t in enumerate(present) if t is not None)


class Call(NamedTuple):
    """What forward and backward have in common."""

    kernel: tiles.Kernel
    like: Tensor  # wx, or what the backward reads: gives dtype, device and memory order
    batch: int
    time: int
    heads: int
    units: int
    lengths: Tensor | None
    reverse: bool
    relu: bool

    @staticmethod
    def of(op: str, direction: str, like: Tensor, lengths: Tensor | None, reverse: bool, nonlinearity: str) -> Call:
        if like.dtype not in TYPES:
            reason = f"its kernels take float32, bfloat16 and float16, not {str(like.dtype).removeprefix('torch.')}"
            raise RuntimeError(backend.refusal(op, "triton", like.device.type, reason))
        heads, units = like.shape[-2:]
        kernel = tiles.Kernel(op, direction, str(like.dtype).removeprefix("torch."), tiles.padded(units))
        lengths = None if lengths is None else lengths.to(torch.int64).contiguous()
        return Call(kernel, like, *like.shape[:2], heads, units, lengths, reverse, nonlinearity == "relu")

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, self.units

    @property
    def empty(self) -> bool:
        return self.batch == 0 or self.time == 0

    def sequence(self, *inner: int) -> Tensor:
        """A new [B, T, *inner, H, D]; what lies past a row's end is zero."""
        made = new_sequence(self.like, *inner, self.heads, self.units)
        return made if self.lengths is None else made.zero_()

    def launch(self, shape: tiles.Shape, arguments: dict[str, Any]) -> None:
        """One launch where a program walks a head, else one for each step."""
        kernel = self.kernel
        if kernel.holds:
            run(KERNELS[kernel.direction], self, shape, 1, arguments, [{}])
            return
        first = 0 if kernel.direction == "forward" else -1
        spans = [(first, self.time)] if kernel.units else [*itertools.pairwise(range(first, self.time + 1))]
        steps = [{"begin": begin, "end": end} for begin, end in spans]
        parts = 1 if kernel.units else -(-self.units // shape.units)
        more = {"DEPTH": shape.depth, "parts": parts}
        in_order = steps if kernel.direction == "forward" else steps[::-1]
        run(STEPS[kernel.direction], self, shape, parts, {**arguments, **more}, in_order)


KERNELS = {"forward": kernels.recurrence_forward, "backward": kernels.recurrence_backward}
STEPS = {"forward": kernels.recurrence_forward_steps, "backward": kernels.recurrence_backward_steps}


def run(
    kernel: Any,
    call: Call,
    shape: tiles.Shape,
    parts: int,
    arguments: dict[str, Any],
    steps: Sequence[dict[str, int]],
) -> None:
    """Launches on the current stream of the device, one for each of `steps`, which says what is new in it.

    A launch has one program for each part of a head and block of rows.
    """
    like = call.like
    if not (like.is_cuda or kernels.INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    pair_b, pair_t = (1, call.batch) if time_first(like) else (call.time, 1)
    everywhere = {
        "p_lengths": like.new_empty(0, dtype=torch.int64) if call.lengths is None else call.lengths,
        "lengths_rows": 0 if call.lengths is None else call.batch,
        "B": call.batch,
        "T": call.time,
        "heads": call.heads,
        "units": call.units,
        "reverse": int(call.reverse),
        "relu": int(call.relu),
        "pair_b": pair_b,
        "pair_t": pair_t,
        **constants(call.kernel, shape, precision(like.dtype)),
        **arguments,
        **options(shape),
    }
    programs = parts * call.heads * -(-call.batch // shape.rows)
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        launch = kernel[(programs,)]
        for step in steps:
            launch(**everywhere, **step)


def constants(kernel: tiles.Kernel, shape: tiles.Shape, precise: str) -> dict[str, Any]:
    return {"CELL": CELLS[kernel.op].value, "PRECISION": precise, "ROWS": shape.rows, "UNITS": shape.units}


def strides(name: str, t: Tensor | None, *inner: str) -> dict[str, int]:
    """Of a sequence [B, T, *inner, D]; those of a row and a step in multiples of ALIGN.

    In a sequence that is dense in either order both are multiples of the shorter: ALIGN follows neither B nor T.
    """
    of_b, of_t, *others = (0,) * (2 + len(inner)) if t is None else t.stride()[:-1]
    align = 1 if of_b % 16 or of_t % 16 else 16
    counts = {f"{name}_b": of_b // align, f"{name}_t": of_t // align, "ALIGN": align}
    return counts | {f"stride_{name}_{dim}": stride for dim, stride in zip(inner, others, strict=True)}


def weights(r: Tensor) -> dict[str, Any]:
    return {"p_r": r} | {f"stride_r_{name}": r.stride(dim) for dim, name in enumerate(("g", "h", "out", "in"))}


def states(names: Sequence[str], values: Sequence[Tensor | None], other: Tensor) -> dict[str, Tensor]:
    """Arguments by name; `other` stands for those that are not there."""
    padded = (*values, *(None,) * len(names))
    return {name: other if value is None else value for name, value in zip(names, padded, strict=False)}


INITIAL, FINAL = ("p_h0", "p_c0", "p_n0", "p_m0"), ("p_h_n", "p_c_n", "p_n_n", "p_m_n")
DINITIAL, DFINAL = ("p_dh0", "p_dc0", "p_dn0", "p_dm0"), ("p_dh_n", "p_dc_n", "p_dn_n", "p_dm_n")


# ---- forward


def forward(
    op: str,
    train: bool,
    wx: Tensor,
    r: Tensor,
    b: Tensor | None,
    initial: tuple[Tensor | None, ...],
    lengths: Tensor | None,
    reverse: bool,
    nonlinearity: str = "tanh",
) -> tuple[Tensor, ...]:
    """h, the final states, and where `train` what the backward reads."""
    call = Call.of(op, "forward", wx, lengths, reverse, nonlinearity)
    h = call.sequence()
    kept = [call.sequence(*(() if planes is None else (planes,))) for planes in (CACHES[op] if train else ())]
    if call.empty or not call.kernel.holds:
        absent = (0.0, 0.0, 0.0, -math.inf)
        final = [filled(s, wx, call.state_shape, value) for s, value in zip(initial, absent, strict=False)]
    else:
        final = [wx.new_empty(call.state_shape, dtype=torch.float32) for _ in initial]
    if call.empty:
        return (h, *final, *kept)
    x, bias = dense_inside(wx), dense(b)
    cache, beside = (*kept, h, h)[:2]
    shape = shape_of(call.kernel, wx, call.heads, call.batch)
    arguments = {
        "p_wx": x,
        **strides("wx", x, "g", "h"),
        **weights(r),
        "p_b": final[0] if bias is None else bias,
        **states(FINAL, final, final[0]),
        "p_h": h,
        "p_cache": cache,
        "p_kept": beside,
        "TRAIN": train,
    }
    given = 0 if bias is None else 1 << kernels.BIAS.value
    if call.kernel.holds:
        before = [dense(s) for s in initial]
        arguments |= states(INITIAL, before, final[0]) | {"given": given | bits(*before)}
    else:
        slots = wx.new_empty((2, *call.state_shape))
        slots[0] = final[0]
        arguments |= {"p_in": slots, "given": given}
    call.launch(shape, arguments)
    return (h, *final, *kept)


# ---- backward


def backward(
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
    final: tuple[Tensor | None, ...] = (),
) -> tuple[Tensor, ...]:
    """dwx, for the GRU dy of its candidate, and the gradients of the initial states.

    Args:
        dfinal: of all states; initial: h, c and n, as far as the cell reads them; final: h, c and n of the sLSTM.
    """
    like = next(t for t in (cache, h) if t is not None)
    call = Call.of(op, "backward", like, lengths, reverse, nonlinearity)
    dwx = call.sequence(tiles.GATES[op])
    dy = call.sequence() if op == "gru" else None

    def results(dinitial: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return (dwx, *(() if dy is None else (dy,)), *dinitial)

    dstates = [filled(each, like, call.state_shape) for each in dfinal]
    if call.empty:
        return results(dstates)
    dh = None if dh is None else dense_inside(dh)
    cache, kept, h = (ordered(t, like) for t in (cache, kept, h))
    first, second = (dense(initial[i]) for i in ((0, 1) if op == "gru" else (1, 2)))
    if op == "slstm":
        dstates[3] = delta(call, dstates, -1, final[1:])
    dinitial = [torch.empty_like(each) for each in dstates] if call.kernel.holds else dstates
    shape = shape_of(call.kernel, like, call.heads, call.batch)
    some = next(t for t in (cache, h) if t is not None)
    arguments = {
        "p_dh": dwx if dh is None else dh,
        **strides("dh", dh, "h"),
        **weights(r),
        **states(("p_cache", "p_kept", "p_output"), (cache, kept, h), some),
        **states(("p_first", "p_second"), (first, second), dinitial[0]),
        "p_dwx": dwx,
        "p_dy": dwx if dy is None else dy,
        **states(DINITIAL, dinitial, dinitial[0]),
        "given": bits(*dstates) | bits(dh) << kernels.DH.value | bits(first, second) << kernels.FIRST.value,
        "clip": math.inf if grad_clip is None else float(grad_clip),
    }
    if call.kernel.holds:
        arguments |= states(DFINAL, dstates, dinitial[0])
    call.launch(shape, arguments)
    if op == "slstm":
        dinitial[3] = delta(call, dinitial, 1, (first, second))
    return results(dinitial)


def delta(call: Call, dstates: Sequence[Tensor], sign: int, cn: Sequence[Tensor | None]) -> Tensor:
    """The gradient of m plus or minus what c and n carry of it, in the rows that have steps."""
    value = dstates[3]
    carried = sum(d * each.to(torch.float32) for d, each in zip(dstates[1:3], cn, strict=True) if each is not None)
    moved = value + sign * carried
    return moved if call.lengths is None else torch.where((call.lengths > 0)[:, None, None], moved, value)


# ---- the operators

OPERATORS = entries(forward, backward)


def __getattr__(name: str) -> Any:
    """The operators by their registered names: lstm, lstm_forward, lstm_backward, ..."""
    try:
        return OPERATORS[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


# ---- what is shipped


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    found = []
    cells = itertools.product(CELLS, ("forward", "backward"), TYPES, (*tiles.WIDTHS, 0))
    for op, direction, dtype, units in cells:
        which = tiles.Kernel(op, direction, str(dtype).removeprefix("torch."), units)
        if units and not which.holds:  # the kernel of units beyond these
            continue
        for shape in which.shapes():
            for precise in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
                found += [*configured(which, shape, dtype, precise)]
    return found


def configured(which: tiles.Kernel, shape: tiles.Shape, dtype: torch.dtype, precise: str) -> Iterator[dict[str, Any]]:
    kernel = (KERNELS if which.holds else STEPS)[which.direction]
    fixed = constants(which, shape, precise) | ({} if which.holds else {"DEPTH": shape.depth})
    states = {*INITIAL, *FINAL, *DINITIAL, *DFINAL, "p_b", "p_first", "p_second"}
    types = {
        name: f"*{TYPES[torch.float32 if name in states else dtype]}" for name in kernel.arg_names if name[:2] == "p_"
    }
    types |= {"p_lengths": "*i64"} | ({"clip": "fp32"} if which.direction == "backward" else {})
    trains = (False, True) if CACHES[which.op] else (False,)
    for train, align in itertools.product(trains if which.direction == "forward" else (None,), (1, 16)):
        named = fixed | {"ALIGN": align} | ({} if train is None else {"TRAIN": train})
        sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in named}
        yield {"kernel": kernel, "types": types | sizes, "constants": named, "options": options(shape)}
