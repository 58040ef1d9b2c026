"""Launchers of the CUDA kernels of the scans: the operators below autograd, on CUDA tensors, or simulated on the CPU.

Arguments and results are those of the operators' schemas. Every tensor becomes [B, T, C], its channels flattened and
contiguous; batch and time may have any stride. Nothing synchronises.

Letters: B batch, T time, C channels, N states (sequences, when packed), H heads, D channels of a head.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import choose, launch
from . import tiles

NAMES = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float",
    torch.float64: "double",
    torch.complex64: "complex64",
    torch.complex128: "complex128",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}

FORWARD = launch.Kernel("scan/linear_scan.cu", "linear_scan_forward", "PPPPPPP" + "q" * 12 + "?")
BACKWARD = launch.Kernel("scan/linear_scan.cu", "linear_scan_backward", "PPPPPPPPPP" + "q" * 13 + "??")
SCORES = launch.Kernel("scan/softmax_scan.cu", "softmax_scan_scores", "PPPPPPPPP" + "q" * 8 + "?")
WEIGHTS = launch.Kernel("scan/softmax_scan.cu", "softmax_scan_weights", "PPPPPPP" + "q" * 6 + "?")
VALUES = launch.Kernel("scan/softmax_scan.cu", "softmax_scan_forward", "PPPPPPP" + "q" * 9 + "?")
VALUES_BACKWARD = launch.Kernel("scan/softmax_scan.cu", "softmax_scan_backward", "PPPPPPPPPPP" + "q" * 12 + "?")
GRADIENTS = launch.Kernel("scan/softmax_scan.cu", "softmax_scan_gradients", "PPPPPPPPP" + "q" * 6 + "?")


# By the name of the kernel in tiles.py.
TUNABLES = {
    name: choose.Tunable(f"{name}.cuda", tiles.problem, (f"scan/{name.partition('.')[0]}.cu", tiles.__file__))
    for name in tiles.REGISTERS
}


@lru_cache(maxsize=4096)
def key_of(kernel: tiles.Pass, batch: int, time: int, channels: int) -> choose.Key:
    """All sizes are rounded up to a power of two, so that few choices exist.

    Sequences packed into a row may have any lengths: only the row counts, as if it were one sequence.
    """
    sizes = (("B", batch), ("T", time), ("L", channels // kernel.vec))
    return choose.Key(
        f"{kernel.name}.cuda",
        kernel.dtype,
        (
            choose.Size("V", kernel.vec),
            choose.Size("G", kernel.gates),
            *(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes),
        ),
    )


def _choose(kernel: tiles.Pass, like: Tensor, batch: int, time: int, channels: int) -> choose.Solution:
    tunable = TUNABLES[kernel.name]
    if like.is_cuda:
        return choose.solution(tunable, key_of(kernel, batch, time, channels), like.device)
    forced = choose.forced_solution(tunable.name)
    return tiles.simulated(kernel, batch, time, channels // kernel.vec) if forced is None else forced


# ---- tensors as the kernels see them


def _flat(x: Tensor) -> Tensor:
    """[B, T, *C] as [B, T, C] with contiguous channels: a view where there is one."""
    batch, time, *channels = x.shape
    flat = x.reshape(batch, time, prod(channels))
    return flat if flat.stride(2) == 1 or flat.shape[2] == 1 else flat.contiguous()


def _strides(x: Tensor) -> tuple[int, int]:
    """Of batch and time, 0 where there is only one."""
    return tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for dim in (0, 1))


def _alignments(*tensors: Tensor | None) -> tuple[int, ...]:
    """Addresses and strides in bytes: what has to be a multiple of an access."""
    found = []
    for x in tensors:
        if x is not None:
            found += [x.data_ptr(), *(stride * x.element_size() for stride in _strides(x))]
    return tuple(found)


def _state(state: Tensor | None, dtype: torch.dtype, rows: int, channels: int) -> Tensor | None:
    return None if state is None else state.to(dtype).reshape(rows, channels).contiguous()


def _copy_or_zeros(state: Tensor | None, like: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if state is None:
        return like.new_zeros(shape, dtype=dtype)
    return state.to(dtype, copy=True, memory_format=torch.contiguous_format).reshape(shape)


class _Gate(NamedTuple):
    """The gate of channel c is column (c // div) % mod of a [B or 1, T or 1, mod]."""

    a: Tensor
    div: int
    mod: int
    expanded: bool  # no such pattern: a copy of all channels

    @staticmethod
    def of(a: Tensor, channels: tuple[int, ...], dtype: torch.dtype) -> _Gate:
        a = a.to(dtype)
        batch, time = a.shape[:2]
        # Runs of neighbouring dimensions over which the gate varies, or does not.
        runs: list[tuple[bool, int]] = []
        for size, own in zip(channels, a.shape[2:], strict=True):
            if size > 1:
                varies = own > 1
                if runs and runs[-1][0] == varies:
                    runs[-1] = (varies, runs[-1][1] * size)
                else:
                    runs.append((varies, size))
        kinds = [varies for varies, _ in runs]
        expanded = kinds.count(True) > 1
        if expanded:
            a, div, mod = a.expand(batch, time, *channels), 1, prod(channels)
        elif True not in kinds:
            div, mod = max(prod(channels), 1), 1
        else:
            div, mod = prod([size for _, size in runs[kinds.index(True) + 1 :]]), runs[kinds.index(True)][1]
        a = _flat(a)
        if (a.stride(0) == 0 and batch > 1) or (a.stride(1) == 0 and time > 1):
            a = a.contiguous()  # the kernels take a stride of 0 for a gate that does not vary
        return _Gate(a, div, mod, expanded)

    def strides(self) -> tuple[int, int]:
        return _strides(self.a)


class _Problem(NamedTuple):
    """One scan over [B, T, C]: what forward and backward, linear and softmax have in common."""

    batch: int
    time: int
    channels: int
    rows: int  # of the states
    cu_seqlens: Tensor | None

    @staticmethod
    def of(x: Tensor, cu_seqlens: Tensor | None) -> _Problem:
        batch, time, channels = x.shape
        if cu_seqlens is None:
            return _Problem(batch, time, channels, batch, None)
        return _Problem(batch, time, channels, len(cu_seqlens) - 1, cu_seqlens.to(torch.int64).contiguous())

    def empty(self) -> bool:
        return self.time == 0 or self.batch == 0 or self.rows == 0

    def sizes(self) -> tuple[int, int, int, int]:
        return self.batch, self.time, self.channels, self.rows

    def launch(self, like: Tensor, kernel: tiles.Pass) -> tiles.Launch:
        chosen = _choose(kernel, like, self.batch, self.time, self.channels)
        return tiles.launch(kernel, chosen, self.batch, self.time, self.channels, self.rows)

    def state(self, chosen: tiles.Launch, before: Tensor | None, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The memory of the last state [N, C]. Tiles write it where a sequence ends, and an empty one never does."""
        shape = (self.rows, self.channels)
        if self.cu_seqlens is not None and chosen.tiles:
            return _copy_or_zeros(before, like, dtype, shape)
        return like.new_empty(shape, dtype=dtype)


def _workspace(chosen: tiles.Launch, like: Tensor) -> Tensor | None:
    """Tickets and flags, cleared on the stream: a captured launch clears them each time it is replayed."""
    return like.new_zeros(chosen.workspace, dtype=torch.int64) if chosen.workspace else None


# ---- linear_scan


class _Linear(NamedTuple):
    """Dtypes of a linear scan, and what one of its threads handles."""

    storage: torch.dtype
    carry: torch.dtype
    gate: _Gate
    gate_sum: torch.dtype  # of sums over gates' gradients
    kernel: tiles.Pass

    @staticmethod
    def of(tensors: tuple[Tensor | None, ...], a: Tensor, channels: tuple[int, ...], backward: bool) -> _Linear:
        """`tensors` are all that have the layout of x; those that are there agree in dtype and shape."""
        first = next(x for x in tensors if x is not None)
        storage = NAMES[first.dtype]
        carry, real = DTYPES[tiles.COMPUTE[storage]], DTYPES[tiles.REAL[storage]]
        gate_sum = carry if a.is_complex() else real
        dtype = a.dtype if a.dtype == first.dtype else gate_sum
        vec = tiles.vector(storage, first.shape[2], _alignments(*tensors))
        gate = _Gate.of(a, channels, dtype)
        gates = None
        if vec > 1:
            gates = tiles.gates_of(vec, gate.a.element_size(), gate.div, gate.mod, _alignments(gate.a))
            if gates == 1 and dtype != gate_sum:
                gate, dtype = _Gate.of(a, channels, gate_sum), gate_sum
        if gates is None:
            vec = gates = 1
        walk = "backward" if backward else "forward"
        kernel = tiles.Pass(f"linear_scan.{walk}", f"{storage}+{NAMES[dtype]}", vec, gates)
        return _Linear(first.dtype, carry, gate, gate_sum, kernel)


def linear_scan(
    x: Tensor,
    a: Tensor,
    initial_state: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h [B, T, *C] and the last state [B or N, *C]."""
    channels = x.shape[2:]
    if a.is_complex() and not x.is_complex():
        x = x.to(torch.complex128 if x.dtype == torch.float64 else torch.complex64)
    flat = _flat(x)
    problem = _Problem.of(flat, cu_seqlens)
    h = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    carry = DTYPES[tiles.COMPUTE[NAMES[x.dtype]]]
    initial = _state(initial_state, carry, problem.rows, problem.channels)
    if problem.empty():
        final = _copy_or_zeros(initial, x, carry, (problem.rows, problem.channels))
    else:
        plan = _Linear.of((flat, h), a, channels, backward=False)
        final = _forward(problem, plan, flat, initial, h, reverse)
    return h.view(x.shape), final.view(problem.rows, *channels)


def _forward(problem: _Problem, plan: _Linear, x: Tensor, initial: Tensor | None, h: Tensor, reverse: bool) -> Tensor:
    chosen = problem.launch(x, plan.kernel)
    final = problem.state(chosen, initial, x, plan.carry)
    pointers = (x, plan.gate.a, initial, h, final, problem.cu_seqlens, _workspace(chosen, x))
    strides = (*_strides(x), *plan.gate.strides(), plan.gate.div, plan.gate.mod)
    arguments = (*pointers, *problem.sizes(), *strides, chosen.lanes, chosen.group, reverse)
    FORWARD(chosen.constants, chosen.grid, chosen.threads, arguments, like=x, shared=chosen.shared)
    return final


def linear_scan_backward(
    dh: Tensor | None,
    dfinal_state: Tensor | None,
    a: Tensor,
    h: Tensor | None,
    initial_state: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [B, T, *C], da in the shape of a ([0] where h is None), and the gradient of the initial state [B or N, *C]."""
    known = dh if dh is not None else h
    channels = known.shape[2:]
    flat_dh = None if dh is None else _flat(dh)
    flat_h = None if h is None else _flat(h).contiguous()
    flat = flat_dh if flat_dh is not None else flat_h
    problem = _Problem.of(flat, cu_seqlens)
    dx = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
    carry = DTYPES[tiles.COMPUTE[NAMES[flat.dtype]]]
    dfinal = _state(dfinal_state, carry, problem.rows, problem.channels)
    start = None if h is None else _state(initial_state, carry, problem.rows, problem.channels)
    if problem.empty():
        dinitial = _copy_or_zeros(dfinal, flat, carry, (problem.rows, problem.channels))
        da = a.new_zeros(a.shape if h is not None else 0)
    else:
        plan = _Linear.of((flat_dh, flat_h, dx), a, channels, backward=True)
        da, dinitial = _backward(problem, plan, flat_dh, flat_h, dfinal, start, dx, a, channels, not reverse)
    return dx.view(known.shape), da, dinitial.view(problem.rows, *channels)


def _backward(
    problem: _Problem,
    plan: _Linear,
    dh: Tensor | None,
    h: Tensor | None,
    dfinal: Tensor | None,
    start: Tensor | None,
    dx: Tensor,
    a: Tensor,
    channels: tuple[int, ...],
    flip: bool,
) -> tuple[Tensor, Tensor]:
    chosen = problem.launch(dx, plan.kernel)
    dinitial = problem.state(chosen, dfinal, dx, plan.carry)
    gradient = _GateGradient.of(problem, plan, chosen, dx) if h is not None else None
    memory = None if gradient is None else gradient.memory
    pointers = (dh, plan.gate.a, h, dfinal, start, dx, memory, dinitial, problem.cu_seqlens, _workspace(chosen, dx))
    strides = (*((0, 0) if dh is None else _strides(dh)), *plan.gate.strides(), plan.gate.div, plan.gate.mod)
    seam, partial = (1, False) if gradient is None else (gradient.seam, gradient.partial)
    arguments = (*pointers, *problem.sizes(), *strides, seam, chosen.lanes, chosen.group, partial, flip)
    BACKWARD(chosen.constants, chosen.grid, chosen.threads, arguments, like=dx, shared=chosen.shared)
    da = a.new_empty(0) if gradient is None else gradient.finish(a, channels)
    return da, dinitial


class _GateGradient(NamedTuple):
    """What the backward stores of da, and the sums left to do, in an order that depends on shapes only."""

    memory: Tensor  # [rows, columns], or [B, T, columns]
    partial: bool
    seam: int  # lanes already summed into a column
    plan: _Linear
    problem: _Problem

    @staticmethod
    def of(problem: _Problem, plan: _Linear, chosen: tiles.Launch, like: Tensor) -> _GateGradient:
        gate, vec, gates = plan.gate, plan.kernel.vec, plan.kernel.gates
        columns = problem.channels // vec * gates
        if gate.a.shape[1] == 1:
            rows = chosen.tiles * problem.batch if chosen.tiles else problem.rows
            return _GateGradient(like.new_empty((rows, columns), dtype=plan.gate_sum), True, 1, plan, problem)
        seam = tiles.summed_lanes(gate.div // vec, chosen.lanes) if gates < vec else 1
        whole = gates == vec and gate.div == 1 and gate.mod == problem.channels and gate.a.shape[0] == problem.batch
        dtype = gate.a.dtype if whole else plan.gate_sum
        shape = (problem.batch, problem.time, columns // seam)
        return _GateGradient(like.new_empty(shape, dtype=dtype), not whole, seam, plan, problem)

    def finish(self, a: Tensor, channels: tuple[int, ...]) -> Tensor:
        gate, problem, total = self.plan.gate, self.problem, self.memory
        if total.ndim == 2:  # a row for every tile or sequence of every batch row
            total = total.view(-1, problem.batch, 1, total.shape[1]).sum(0)
        if gate.a.shape[0] < total.shape[0]:
            total = total.sum(0, keepdim=True)
        if gate.expanded:
            return total.view(*total.shape[:2], *channels).sum_to_size(a.shape).to(a.dtype)
        inner = gate.div * total.shape[2] // problem.channels  # columns of one gate
        if total.shape[2] > gate.mod:
            total = total.view(*total.shape[:2], -1, gate.mod, inner).sum((2, 4))
        return total.view(a.shape).to(a.dtype)


# ---- softmax_scan


def softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, D] and lse [B, T, H]."""
    o, lse, _, _ = _softmax_scan(s, v, initial_lse, initial_out, reverse, cu_seqlens, states=False)
    return o, lse


def softmax_scan_forward(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None = None,
    initial_out: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same, and m and u [B, T, H] after every step, which the backward reads."""
    o, lse, m, u = _softmax_scan(s, v, initial_lse, initial_out, reverse, cu_seqlens, states=True)
    return o, lse, m, u


def _softmax_scan(
    s: Tensor,
    v: Tensor,
    initial_lse: Tensor | None,
    initial_out: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    states: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    heads = s.shape[2]
    real = _real(v)
    lse = torch.empty(s.shape, dtype=real, device=s.device)
    m, u = (torch.empty_like(lse), torch.empty_like(lse)) if states else (None, None)
    flat = _flat(v)
    o = torch.empty(flat.shape, dtype=v.dtype, device=v.device)
    problem = _Problem.of(flat, cu_seqlens)
    if not problem.empty():
        scores = _scores(s, real)
        alpha, p = torch.empty_like(lse), torch.empty_like(lse)
        initial = _state(initial_lse, real, problem.rows, heads)
        of_scores = problem._replace(channels=heads)
        chosen = of_scores.launch(s, tiles.Pass("softmax_scan.scores", f"{NAMES[real]}+{NAMES[scores.dtype]}"))
        pointers = (scores, initial, lse, m, u, alpha, p, of_scores.cu_seqlens, _workspace(chosen, s))
        arguments = (*pointers, *of_scores.sizes(), *_strides(scores), chosen.lanes, chosen.group, reverse)
        SCORES(chosen.constants, chosen.grid, chosen.threads, arguments, like=s, shared=chosen.shared)

        out = _state(initial_out, real, problem.rows, problem.channels)
        vec = _values_of_thread(heads, flat, o)
        chosen = problem.launch(v, tiles.Pass("softmax_scan.forward", NAMES[v.dtype], vec))
        pointers = (flat, alpha, p, out, o, problem.cu_seqlens, _workspace(chosen, v))
        sizes = (problem.batch, problem.time, heads, problem.channels // heads, problem.rows)
        arguments = (*pointers, *sizes, *_strides(flat), chosen.lanes, chosen.group, reverse)
        VALUES(chosen.constants, chosen.grid, chosen.threads, arguments, like=v, shared=chosen.shared)
    return o.view(v.shape), lse, m, u


def softmax_scan_backward(
    do: Tensor | None,
    dlse: Tensor | None,
    s: Tensor,
    v: Tensor,
    o: Tensor,
    m: Tensor,
    u: Tensor,
    initial_lse: Tensor | None,
    initial_out: Tensor | None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ds, dv, and the gradients of the initial states [B or N, H] and [B or N, H, D].

    With R and r carried backwards, `R_t = do_t + alpha_{t+1} R_{t+1}` and
    `r_t = <do_t, o_t> - dlse_t + alpha_{t+1} r_{t+1}`: `dv_t = p_t R_t`, `ds_t = p_t (<R_t, v_t> - r_t)`.
    """
    heads, width = v.shape[2:]
    real = _real(v)
    problem = _Problem.of(_flat(v), cu_seqlens)
    if problem.empty():
        zeros = v.new_zeros((problem.rows, heads, width), dtype=real)
        return torch.zeros_like(s, memory_format=torch.contiguous_format), _zeros(v), zeros[..., 0].clone(), zeros
    alpha, p = _weights(problem, s, m, u, initial_lse, real, reverse)
    dv, product_v, product_o, dinitial_out = _values_backward(problem, do, v, o, alpha, p, reverse)
    ds, dinitial_r = _gradients(problem, s, alpha, p, product_v, product_o, dlse, reverse)
    dinitial_lse = -dinitial_r
    if initial_out is not None:  # where nothing came before, initial_out may be anything
        past = torch.where(dinitial_out == 0, 0.0, dinitial_out * initial_out.to(real))
        dinitial_lse += past.sum(-1)
    return ds, dv, dinitial_lse, dinitial_out


def _gradients(
    problem: _Problem,
    s: Tensor,
    alpha: Tensor,
    p: Tensor,
    product_v: Tensor,
    product_o: Tensor,
    dlse: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """ds [B, T, H], and r carried beyond the first step [B or N, H]."""
    problem, real = problem._replace(channels=s.shape[2]), alpha.dtype
    score = real if real == torch.float64 else s.dtype
    ds = torch.empty(s.shape, dtype=score, device=s.device)
    chosen = problem.launch(s, tiles.Pass("softmax_scan.gradients", f"{NAMES[real]}+{NAMES[score]}"))
    dinitial = problem.state(chosen, None, s, real)
    dlse = None if dlse is None else dlse.to(real).contiguous()
    tensors = (alpha, p, product_v.contiguous(), product_o.contiguous(), dlse, ds, dinitial, problem.cu_seqlens)
    arguments = (*tensors, _workspace(chosen, s), *problem.sizes(), chosen.lanes, chosen.group, not reverse)
    GRADIENTS(chosen.constants, chosen.grid, chosen.threads, arguments, like=s, shared=chosen.shared)
    return ds.to(s.dtype), dinitial


def _weights(
    problem: _Problem, s: Tensor, m: Tensor, u: Tensor, initial_lse: Tensor | None, real: torch.dtype, reverse: bool
) -> tuple[Tensor, Tensor]:
    """alpha and p [B, T, H] from what the forward kept."""
    scores, heads = _scores(s, real), s.shape[2]
    alpha, p = (torch.empty(s.shape, dtype=real, device=s.device) for _ in range(2))
    kernel = tiles.Pass("softmax_scan.weights", f"{NAMES[real]}+{NAMES[scores.dtype]}")
    chosen = _choose(kernel, s, problem.batch, problem.time, heads)
    threads = chosen["threads"]
    initial = _state(initial_lse, real, problem.rows, heads)
    pointers = (scores, m.contiguous(), u.contiguous(), initial, alpha, p, problem.cu_seqlens)
    arguments = (*pointers, *problem._replace(channels=heads).sizes(), *_strides(scores), reverse)
    WEIGHTS(tiles.compiled(kernel, chosen), -(-s.numel() // threads), threads, arguments, like=s)
    return alpha, p


def _values_backward(
    problem: _Problem, do: Tensor | None, v: Tensor, o: Tensor, alpha: Tensor, p: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dv, <R, v> and <do, o> [B, T, H], and the gradient of the initial output."""
    heads, width = v.shape[2:]
    if do is None:
        none = torch.zeros_like(alpha)
        return _zeros(v), none, none, alpha.new_zeros((problem.rows, heads, width))
    flat_do, flat_v, flat_o = _flat(do), _flat(v), _flat(o).contiguous()
    dv = torch.empty(flat_v.shape, dtype=v.dtype, device=v.device)
    vec = _values_of_thread(heads, flat_do, flat_v, flat_o, dv)
    chosen = problem.launch(v, tiles.Pass("softmax_scan.backward", NAMES[v.dtype], vec))
    seam = tiles.summed_lanes(width // vec, chosen.lanes)
    products = alpha.new_empty((2, *alpha.shape, width // vec // seam))
    dinitial = problem.state(chosen, None, v, alpha.dtype)
    workspace = _workspace(chosen, v)
    pointers = (
        flat_do,
        flat_v,
        flat_o,
        alpha,
        p,
        dv,
        products[0],
        products[1],
        dinitial,
        problem.cu_seqlens,
        workspace,
    )
    sizes = (problem.batch, problem.time, heads, width, problem.rows)
    arguments = (
        *pointers,
        *sizes,
        *_strides(flat_do),
        *_strides(flat_v),
        seam,
        chosen.lanes,
        chosen.group,
        not reverse,
    )
    VALUES_BACKWARD(chosen.constants, chosen.grid, chosen.threads, arguments, like=v, shared=chosen.shared)
    product_v, product_o = products.sum(-1) if products.shape[-1] > 1 else products.squeeze(-1)
    return dv.view(v.shape), product_v, product_o, dinitial.view(problem.rows, heads, width)


def _real(v: Tensor) -> torch.dtype:
    return DTYPES[tiles.REAL[NAMES[v.dtype]]]


def _scores(s: Tensor, real: torch.dtype) -> Tensor:
    """s as the kernels read it: its own dtype next to float32."""
    return _flat(s.to(real) if real == torch.float64 else s)


def _zeros(v: Tensor) -> Tensor:
    return torch.zeros_like(v, memory_format=torch.contiguous_format)


def _values_of_thread(heads: int, *tensors: Tensor) -> int:
    """A thread's values belong to one head."""
    vec = tiles.vector(NAMES[tensors[0].dtype], tensors[0].shape[2], _alignments(*tensors))
    return vec if tensors[0].shape[2] // heads % vec == 0 else 1
