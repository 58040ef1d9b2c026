"""Launchers of the Triton kernels of neural_memory, of the optimizer "gd".

Letters as in triton_kernels_neural_memory.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles_neural_memory_triton as tiles
from . import triton_kernels_neural_memory as kernels
from . import triton_kernels_neural_memory_backward as backward_kernels
from .composed_neural_memory import segment_of

INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
# Elements between steps: those of a tile are counted in 32 bits.
MOST_STRIDE = 1 << 24
ALIGNMENT = 16  # elements and bytes: where rows begin, so that accesses are wide
# Arrays of the workspace: [C, F], [C, D], [C, C].
FORWARD_ARRAYS, BACKWARD_ARRAYS = (3, 1, 1), (8, 2, 6)

SOURCES = (
    tiles.__file__,
    __file__,
    *(
        str(Path(__file__).with_name(f"triton_{part}.py"))
        for part in ("blocks_neural_memory", "kernels_neural_memory", "kernels_neural_memory_backward")
    ),
)
TUNABLES = {
    direction: choose.Tunable(f"neural_memory.{direction}.triton", tiles.problem, SOURCES)
    for direction in ("forward", "backward")
}
SLOTS = 128  # chunks of a head whose states the backward has at once, beyond a segment
# For the interpreter, which has no device to choose for.
INTERPRETED_ROWS = {"forward": 16, "backward": 16}


# ---- choices


@lru_cache(maxsize=4096)
def key_of(direction: str, dtype: str, chunk: int, channels: int, hidden: int) -> choose.Key:
    """Sizes are rounded up to a power of two, so that few choices exist; F of a linear memory is 0."""
    sizes = (("C", chunk), ("D", channels), ("F", hidden))
    edges = (0, *tiles.POWERS)
    buckets = tuple(choose.bucket(name, value, edges, 2 * edges[-1]) for name, value in sizes)
    return choose.Key(f"neural_memory.{direction}.triton", dtype, buckets)


def shape_for(direction: str, call: Call) -> tiles.Shape:
    dtype = str(call.q.dtype).removeprefix("torch.")
    tunable = TUNABLES[direction]
    if call.q.is_cuda:
        found = choose.solution(tunable, key_of(direction, dtype, call.C, call.D, call.F), call.q.device)
    else:
        found = choose.forced_solution(tunable.name) or {"rows": INTERPRETED_ROWS[direction]}
    return tiles.shape(direction, dtype, found["rows"])


# ---- launches


class Call(NamedTuple):
    """What the passes of one call have in common. D, F and P are padded to ALIGNMENT, with zeros."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    decay: Tensor | None
    momentum: Tensor | None
    F: int
    C: int  # tokens of a chunk, of which there are at most T
    every: int  # chunks of a segment, whose first state is kept
    l2: bool
    window: int
    state: torch.dtype
    channels: int  # those that there are
    hidden: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        B, T, H, D = self.q.shape
        return B, T, H, D

    @property
    def D(self) -> int:
        return self.q.shape[3]

    @property
    def P(self) -> int:
        """Numbers between rows of pairs."""
        return padded(self.C)

    @property
    def heads(self) -> int:
        return self.q.shape[0] * self.q.shape[2]

    @property
    def chunks(self) -> int:
        return -(-self.q.shape[1] // self.C)

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.every)

    @property
    def layers(self) -> int:
        return 2 if self.F else 1

    @property
    def weight(self) -> int:
        """Numbers of one matrix."""
        return (self.F or self.D) * self.D

    @property
    def numbers(self) -> int:
        """Of a state."""
        return self.layers * self.weight * (2 if self.momentum is not None else 1)

    def new(self, *sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(sizes, dtype=dtype or self.state, device=self.q.device)

    def work(self, arrays: tuple[int, int, int]) -> int:
        hidden, channels, pairs = arrays
        return self.C * (hidden * self.F + channels * self.D + pairs * self.P)

    def matrix(self, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of W1 or W2: those that there are, and those in memory."""
        there, here = (self.hidden or self.channels, self.channels), (self.F or self.D, self.D)
        return (there[::-1], here[::-1]) if layer else (there, here)

    def wide(self, x: Tensor | None, layer: int) -> Tensor:
        """A copy of a weight-like tensor [B, H, ...], or zeros, in the dtype of sums."""
        (rows, columns), here = self.matrix(layer)
        B, _, H, _ = self.sizes
        if x is not None and (rows, columns) == here:
            return x.to(self.state, copy=True, memory_format=torch.contiguous_format)
        full = torch.zeros(B, H, *here, dtype=self.state, device=self.q.device)
        if x is not None:
            full[..., :rows, :columns] = x
        return full

    def slim(self, x: Tensor, layer: int) -> Tensor:
        """What there is of it."""
        rows, columns = self.matrix(layer)[0]
        return x[..., :rows, :columns].contiguous()

    def states(self, x: Tensor, widen: bool) -> Tensor:
        """[..., N] of matrices that there are to those in memory, or back."""
        sources, parts = [], []
        for layer in [*range(self.layers)] * (self.numbers // (self.layers * self.weight)):
            there, here = self.matrix(layer)
            sources.append((layer, there if widen else here))
        pieces = x.split([rows * columns for _, (rows, columns) in sources], -1)
        for (layer, size), piece in zip(sources, pieces, strict=True):
            (rows, columns), here = self.matrix(layer)
            part = piece.unflatten(-1, size)
            if widen:
                part = torch.nn.functional.pad(part, (0, here[1] - columns, 0, here[0] - rows))
            parts.append(part[..., : here[0] if widen else rows, : here[1] if widen else columns].flatten(-2))
        return torch.cat(parts, -1)

    @property
    def exact(self) -> bool:
        """Whether nothing is filled with zeros."""
        return (self.channels, self.hidden) == (self.D, self.F)


class Coefficients(NamedTuple):
    c: Tensor  # [B, H, T, P]
    m: Tensor  # the same; empty without `every`
    last: Tensor  # [B, H, chunks, P]
    b: Tensor  # [B, H, T]
    g: Tensor
    p: Tensor

    def arguments(self) -> dict[str, Tensor]:
        return {"p_c": self.c, "p_last": self.last, "p_b": self.b, "p_g": self.g, "p_p": self.p}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], warps: int) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    if programs:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**arguments, **options(warps))


def options(warps: int) -> dict[str, Any]:
    """Left to itself, ptxas saves registers by spilling a word or two."""
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": 255}


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def readable(x: Tensor) -> Tensor:
    """x where all rows [B, T, H] begin at multiples of ALIGNMENT, near enough for 32 bits; else a copy."""
    B, T, H, D = x.shape
    aligned = D % ALIGNMENT == 0 and x.data_ptr() % ALIGNMENT == 0 and (x.stride(3) == 1 or D == 1)
    if aligned and x.stride(1) < MOST_STRIDE and not any(x.stride(i) % ALIGNMENT for i in range(3) if x.shape[i] > 1):
        return x
    full = x.new_zeros(B, T, H, padded(D))
    full[..., :D] = x
    return full


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Of [B, T, H, ...]; 0 where one entry serves all."""
    return {f"stride_{name}_{letter}": x.stride(i) if x.shape[i] > 1 else 0 for i, letter in enumerate("bth")}


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    chunk_size: int,
    loss: str,
    window: int,
) -> Call:
    state = torch.float64 if q.dtype == torch.float64 else torch.float32
    tokens = max(q.shape[1], 1)
    return Call(
        readable(q),
        readable(k),
        readable(v),
        lr.to(state),
        None if decay is None else decay.to(state),
        None if momentum is None else momentum.to(state),
        0 if w2 is None else padded(w1.shape[2]),
        min(chunk_size, tokens),
        segment_of(chunk_size),
        loss == "l2",
        min(window, tokens),
        state,
        q.shape[3],
        0 if w2 is None else w1.shape[2],
    )


def gates(call: Call) -> dict[str, Any]:
    """Decay and momentum as kernels read them; what is not there is not read."""
    found: dict[str, Any] = {}
    for name, flag in (("decay", "decays"), ("momentum", "momenta")):
        values = getattr(call, name)
        there = call.lr if values is None else values
        found |= {f"p_{name}": there, flag: int(values is not None), **strides(name, there)}
    return found


def columns_of(call: Call) -> int:
    return next((width for width in tiles.PAIRS if width >= call.C), tiles.PAIRS[-1])


def coefficients(call: Call, every: bool) -> Coefficients:
    """every: all of m, for the backward."""
    B, T, H, _ = call.sizes
    c = call.new(B, H, T, call.P)
    m = call.new(B, H, T, call.P) if every else call.new(0)
    last, (b, g, p) = call.new(B, H, call.chunks, call.P), (call.new(B, H, T) for _ in range(3))
    width = columns_of(call)
    arguments = {
        "p_lr": call.lr, "p_c": c, "p_m": m, "p_last": last, "p_b": b, "p_g": g, "p_p": p,
        "T": T, "H": H, "C": call.C, "P": call.P, "chunks": call.chunks, "window": call.window, "every": int(every),
        **strides("lr", call.lr), **gates(call), "BC": width,
    }  # fmt: skip
    programs = call.heads * call.chunks * -(-call.C // width)
    launch(kernels.memory_coefficients, call.q, programs, arguments, width // 32 or 1)
    return Coefficients(c, m, last, b, g, p)


class Memory(NamedTuple):
    """States as kernels read them: those of pieces `stride` numbers apart, of chunks `slot` numbers."""

    w1: Tensor
    w2: Tensor
    s1: Tensor
    s2: Tensor
    stride: int
    slot: int = 0

    def arguments(self) -> dict[str, Any]:
        names = {"p_w1": self.w1, "p_w2": self.w2, "p_s1": self.s1, "p_s2": self.s2}
        return {**names, "stride_n": self.stride, "slot": self.slot}


def flat_memory(call: Call, states: Tensor, pieces: int) -> Memory:
    """Of W1 | W2 | S1 | S2 in the last dimension, `pieces` of them one after the other."""
    one, size = states.view(-1), call.weight
    last = 2 if call.momentum is not None else 1
    at = (
        [0, size, size * call.layers, size * (2 * call.layers - 1)]
        if last == 2
        else [0, size * (call.layers - 1), 0, 0]
    )
    w1, w2, s1, s2 = (one[i:] for i in at)
    return Memory(w1, w2, s1, s2, pieces * call.numbers, call.numbers)


def walk(
    call: Call,
    coefficients: Coefficients,
    memory: Memory,
    begin: int,
    end: int,
    span: int,
    o: Tensor | None,
    states: Tensor | None,
) -> None:
    """Chunks [begin, end) in pieces of `span`."""
    _, T, H, D = call.sizes
    shape = shape_for("forward", call)
    pieces = -(-(end - begin) // span)
    splits = 1 if call.layers == 2 else -(-D // shape.owned)
    programs = call.heads * pieces * splits
    numbers = call.work(FORWARD_ARRAYS)
    work = call.new(programs, numbers)
    arguments = {
        "p_q": call.q, "p_k": call.k, "p_v": call.v, "p_o": call.q if o is None else o, "p_work": work,
        "p_states": work if states is None else states, **coefficients.arguments(), **memory.arguments(),
        "T": T, "H": H, "D": D, "F": call.F, "C": call.C, "P": call.P, "chunks": call.chunks,
        "begin": begin, "end": end, "span": span, "segments": pieces, "splits": splits,
        "outputs": int(o is not None), "momenta": int(call.momentum is not None), "l2": int(call.l2),
        "every": 0 if states is None else call.every, "work": numbers,
        **strides("q", call.q), **strides("k", call.k), **strides("v", call.v),
        **constants(call.layers, shape),
    }  # fmt: skip
    launch(kernels.memory_walk, call.q, programs, arguments, shape.warps)


def constants(layers: int, shape: tiles.Shape) -> dict[str, int]:
    return {"LAYERS": layers, "BT": shape.rows, "BU": shape.owned, "BN": shape.columns, "BK": shape.inner}


# ---- operators


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    chunk_size: int,
    loss: str,
    window: int,
    keep: bool,
) -> tuple[Tensor, ...]:
    """keep: also the states at which segments begin."""
    call = prepare(q, k, v, lr, decay, momentum, w1, w2, chunk_size, loss, window)
    B, T, H, D = call.sizes
    weights = [call.wide(w, i) for i, w in enumerate((w1, w2)[: call.layers])]
    sums = [call.wide(s, i) for i, s in enumerate((s1, s2)[: call.layers])]
    o = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    states = call.new(B, H, call.segments if T else 0, call.numbers)
    if o.numel():
        own = Memory(weights[0], weights[-1], sums[0], sums[-1], call.weight)
        walk(call, coefficients(call, False), own, 0, call.chunks, call.chunks, o, states if keep else None)
    if not call.exact:
        o, states = o[..., : call.channels].contiguous(), call.states(states, False)
        weights, sums = ([call.slim(x, i) for i, x in enumerate(each)] for each in (weights, sums))
    missing = [call.new(0)] * (2 - call.layers)
    found = (o, *weights, *missing, *sums, *(each.clone() for each in missing))
    return (*found, states) if keep else found


def memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
) -> tuple[Tensor, ...]:
    """o [B, T, H, D] in the dtype of q, and w1, w2, s1, s2 after the last token."""
    return forward(q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss, window, False)


def memory_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
) -> tuple[Tensor, ...]:
    """As `memory`, and states [B, H, segments, N]."""
    return forward(q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss, window, True)


def memory_backward(
    grad_o: Tensor | None,
    grad_w1: Tensor | None,
    grad_w2: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    states: Tensor,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors, each in its dtype; of what is None, [0].

    The states within a segment are computed again, for as many segments at once as fill the device.
    """
    call = prepare(q, k, v, lr, decay, momentum, w1, w2, chunk_size, loss, window)
    B, T, H, D = call.sizes
    dw = [call.wide(grad, i) for i, grad in enumerate((grad_w1, grad_w2)[: call.layers])]
    ds = [call.wide(grad, i) for i, grad in enumerate((grad_s1, grad_s2)[: call.layers])]
    dq, dk, dv = (torch.empty(B, T, H, D, dtype=q.dtype, device=q.device) for _ in range(3))
    if dq.numel():
        do = readable(q.new_zeros(1, 1, 1, 1).expand(q.shape) if grad_o is None else grad_o)
        known, found = coefficients(call, True), make_gradients(call, dq, dk, dv, dw, ds)
        walk_back(call, known, states, do, found, grad_s1 is not None or grad_s2 is not None)
        of_gates = gates_back(call, known, found)
        if momentum is None:
            ds = [torch.zeros_like(each) for each in ds]  # nothing of S entered
    else:
        of_gates = tuple(torch.zeros_like(call.lr) for _ in range(3))
    if not call.exact:
        dq, dk, dv = (each[..., : call.channels].contiguous() for each in (dq, dk, dv))
        dw, ds = ([call.slim(x, i) for i, x in enumerate(each)] for each in (dw, ds))
    pairs = (*zip(of_gates, (lr, decay, momentum), strict=True), *both(dw, (w1, w2)), *both(ds, (s1, s2)))
    return (dq, dk, dv, *(call.new(0) if like is None else gradient.to(like.dtype) for gradient, like in pairs))


def both(gradients: list[Tensor], given: tuple[Tensor | None, ...]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Of a linear memory the second ones are not there."""
    return zip((*gradients, gradients[0])[:2], given, strict=True)


class Gradients(NamedTuple):
    """What the backward walk writes."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dw: list[Tensor]  # of the state after the last chunk, changed to those of the first one
    ds: list[Tensor]
    dc: Tensor  # [B, H, T, P]
    dend: Tensor  # [B, H, chunks, P]
    dlast: Tensor
    db: Tensor  # [B, H, T]
    dg: Tensor
    dsums: Tensor  # [3, B, H, chunks]

    def arguments(self) -> dict[str, Tensor]:
        names = ("dq", "dk", "dv", "dc", "dend", "dlast", "db", "dg", "dsums")
        found = {f"p_{name}": getattr(self, name) for name in names}
        for name, (first, *_, last) in (("dw", (*self.dw, self.dw[-1])), ("ds", (*self.ds, self.ds[-1]))):
            found |= {f"p_{name}1": first, f"p_{name}2": last}
        return found


def make_gradients(call: Call, dq: Tensor, dk: Tensor, dv: Tensor, dw: list[Tensor], ds: list[Tensor]) -> Gradients:
    B, T, H, _ = call.sizes
    dc = call.new(B, H, T, call.P)
    dend, dlast = (call.new(B, H, call.chunks, call.P) for _ in range(2))
    db, dg = (call.new(B, H, T) for _ in range(2))
    return Gradients(dq, dk, dv, dw, ds, dc, dend, dlast, db, dg, call.new(3, B, H, call.chunks))


def together(call: Call) -> int:
    """Segments whose states are computed at once: as many as fill the device with programs, or SLOTS chunks."""
    processors = 1
    if call.q.is_cuda:
        processors = torch.cuda.get_device_properties(call.q.device).multi_processor_count
    return max(1, min(processors // max(call.heads, 1), call.segments, SLOTS // call.every))


def walk_back(call: Call, known: Coefficients, states: Tensor, do: Tensor, found: Gradients, given: bool) -> None:
    """All chunks, from the last to the first. given: there is a gradient of S."""
    B, T, H, D = call.sizes
    shape = shape_for("backward", call)
    numbers = call.work(BACKWARD_ARRAYS)
    work = call.new(call.heads, numbers)
    zero = torch.zeros(1, dtype=torch.int32, device=do.device)
    group = together(call)
    for first in reversed(range(0, call.segments, group)):
        last = min(first + group, call.segments)
        begin, end = first * call.every, min(last * call.every, call.chunks)
        slots = call.new(B, H, last - first, call.every, call.numbers)
        given_states = states[:, :, first:last]
        slots[:, :, :, 0] = given_states if call.exact else call.states(given_states, True)
        # A segment's last chunk needs no state after it.
        walk(call, known, flat_memory(call, slots, call.every), begin, end, call.every, None, None)
        memory = flat_memory(call, slots, (last - first) * call.every)
        arguments = {
            "p_q": call.q, "p_k": call.k, "p_v": call.v, "p_do": do, "p_work": work, "p_zero": zero,
            **known.arguments(), **memory.arguments(), **found.arguments(),
            "T": T, "H": H, "D": D, "F": call.F, "C": call.C, "P": call.P, "chunks": call.chunks,
            "begin": begin, "end": end, "momenta": int(call.momentum is not None), "given": int(given),
            "l2": int(call.l2), "work": numbers,
            **strides("q", call.q), **strides("k", call.k), **strides("v", call.v), **strides("do", do),
            **constants(call.layers, shape),
        }  # fmt: skip
        launch(backward_kernels.memory_backward_walk, call.q, call.heads, arguments, shape.warps)


def gates_back(call: Call, known: Coefficients, found: Gradients) -> tuple[Tensor, ...]:
    """dlr, ddecay, dmomentum [B, T, H]."""
    B, T, H, _ = call.sizes
    width = columns_of(call)
    blocks = -(-call.C // width)
    dlr, (ddecay, dmomentum) = call.new(B, T, H), (call.new(blocks, B, T, H) for _ in range(2))
    arguments = {
        **known.arguments(), "p_m": known.m, **gates(call),
        "p_dc": found.dc, "p_dend": found.dend, "p_dlast": found.dlast, "p_db": found.db, "p_dg": found.dg,
        "p_dsums": found.dsums, "p_dlr": dlr, "p_ddecay": ddecay, "p_dmomentum": dmomentum,
        "T": T, "H": H, "C": call.C, "P": call.P, "chunks": call.chunks, "window": call.window, "BC": width,
    }  # fmt: skip
    del arguments["p_last"]
    launch(backward_kernels.memory_gates, call.q, call.heads * call.chunks * blocks, arguments, width // 32 or 1)
    return dlr, ddecay.sum(0), dmomentum.sum(0)


# ---- what the tests compile


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    return [*walk_configurations(), *gate_configurations()]


def walk_configurations() -> Iterator[dict[str, Any]]:
    for storage in TYPES:
        real = torch.float64 if storage == torch.float64 else torch.float32
        sequences = ("p_q", "p_k", "p_v", "p_o", "p_do", "p_dq", "p_dk", "p_dv")
        walks = {"forward": kernels.memory_walk, "backward": backward_kernels.memory_backward_walk}
        for direction, kernel in walks.items():
            for shape in tiles.shapes(direction, str(storage).removeprefix("torch.")):
                for layers in (1, 2):
                    fixed = constants(layers, shape)
                    found = configuration(kernel, dict.fromkeys(sequences, storage), real, fixed, shape.warps)
                    # Half a minute each to compile: every run has one.
                    seldom = (direction, storage, layers) != ("forward", torch.bfloat16, 1)
                    yield found | ({"seldom": True} if seldom else {})


def gate_configurations() -> Iterator[dict[str, Any]]:
    for real in (torch.float32, torch.float64):
        for width in tiles.PAIRS:
            for kernel in (kernels.memory_coefficients, backward_kernels.memory_gates):
                yield configuration(kernel, {}, real, {"BC": width}, width // 32 or 1)


def configuration(
    kernel: Any, pointers: dict[str, torch.dtype], real: torch.dtype, fixed: dict[str, int], warps: int
) -> dict[str, Any]:  # fmt: skip
    """Pointers without a name here are to sums; what else is not a constant is an int32."""
    types = {
        name: "*" + TYPES[pointers.get(name, real)] if name.startswith("p_") else "i32"
        for name in kernel.arg_names
        if name not in fixed
    }
    types |= {"p_zero": "*i32"} if "p_zero" in types else {}
    found = {"kernel": kernel, "types": types, "constants": fixed, "options": options(warps)}
    if "p_q" not in types:
        return found
    # Everything that tiles are read from begins at multiples of ALIGNMENT.
    pointed = [name for name in types if name.startswith(("p_", "stride_"))]
    return found | {"divisible": [*pointed, "D", "F", "P", "slot", "work"]}
