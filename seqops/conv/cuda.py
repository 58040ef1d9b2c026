"""Launchers of the CUDA kernels of causal_conv1d: the operators below autograd, on CUDA tensors, or simulated.

Arguments and results are those of the operators' schemas. Batch and time may have any stride. Nothing synchronises.

Letters: B batch, T time, D channels, W taps, N states (sequences, when packed), S = (W - 1) dilation steps of a state.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import choose, launch
from . import tiles

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float", torch.float64: "double"}
DTYPES = {name: dtype for dtype, name in NAMES.items()}

FORWARD = launch.Kernel("conv/causal_conv1d.cu", "causal_conv1d_forward", "PPPPPPP" + "q" * 9)
BACKWARD = launch.Kernel("conv/causal_conv1d.cu", "causal_conv1d_backward", "P" * 10 + "q" * 12)
WIDE = launch.Kernel("conv/causal_conv1d_wide.cu", "causal_conv1d_wide", "P" * 8 + "q" * 10)
TAPS = launch.Kernel("conv/causal_conv1d_wide.cu", "causal_conv1d_taps", "P" * 5 + "q" * 11)

TUNABLES = {
    name: choose.Tunable(f"{name}.cuda", tiles.problem, (source, tiles.__file__))
    for name, source in (
        ("causal_conv1d.forward", FORWARD.source),
        ("causal_conv1d.backward", BACKWARD.source),
        ("causal_conv1d.wide", WIDE.source),
        ("causal_conv1d.taps", TAPS.source),
    )
}


@lru_cache(maxsize=4096)
def key_of(kernel: tiles.Pass, batch: int, time: int, channels: int, taps: int) -> choose.Key:
    """Sizes are rounded up to a power of two, so that few choices exist; up to 16 taps are compiled in."""
    sizes = (("B", batch), ("T", time), ("D", channels))
    width = choose.Size("W", taps)
    if kernel.walk in ("wide", "taps"):
        width = choose.bucket("W", taps, tiles.POWERS, 2 * tiles.POWERS[-1])
    return choose.Key(
        f"{kernel.name}.cuda",
        kernel.dtype,
        (
            choose.Size("V", kernel.vec),
            width,
            *(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes),
        ),
        kernel.flags(),
    )


def _choose(kernel: tiles.Pass, like: Tensor, batch: int, time: int, channels: int, taps: int) -> choose.Solution:
    tunable = TUNABLES[kernel.name]
    if like.is_cuda:
        return choose.solution(tunable, key_of(kernel, batch, time, channels, taps), like.device)
    forced = choose.forced_solution(tunable.name)
    return tiles.simulated(kernel) if forced is None else forced


# ---- tensors as the kernels see them


def _dense(x: Tensor) -> Tensor:
    """[B, T, D] with neighbouring channels next to each other."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _strides(x: Tensor | None) -> tuple[int, int]:
    """Of batch and time, 0 where there is only one."""
    return (0, 0) if x is None else tuple(x.stride(dim) if x.shape[dim] > 1 else 0 for dim in (0, 1))


def _alignments(*tensors: Tensor | None) -> tuple[int, ...]:
    """Addresses and strides in bytes: what has to be a multiple of an access."""
    found = []
    for x in tensors:
        if x is not None:
            found += [x.data_ptr(), *(stride * x.element_size() for stride in _strides(x))]
    return tuple(found)


class _Call(NamedTuple):
    """What forward and backward have in common."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    dilation: int
    silu: bool
    edges: Tensor | None

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        initial_state: Tensor | None,
        dilation: int,
        activation: str | None,
        cu_seqlens: Tensor | None,
    ) -> _Call:
        if bias is not None and bias.dtype != weight.dtype:  # one of them is in float32
            weight, bias = weight.float(), bias.float()
        return _Call(
            _dense(x),
            weight,
            None if bias is None else bias.contiguous(),
            None if initial_state is None else initial_state.contiguous(),
            dilation,
            activation is not None,
            None if cu_seqlens is None else cu_seqlens.to(torch.int64).contiguous(),
        )

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """B, T, D, N."""
        return (*self.x.shape, self.x.shape[0] if self.edges is None else len(self.edges) - 1)

    @property
    def taps(self) -> int:
        return self.weight.shape[1]

    @property
    def steps(self) -> int:
        """Of a state."""
        return (self.taps - 1) * self.dilation

    @property
    def real(self) -> torch.dtype:
        return DTYPES[tiles.REAL[NAMES[self.x.dtype]]]

    def kernel(self, walk: str, *tensors: Tensor | None) -> tiles.Pass:
        """`tensors`: what is accessed beside x, of x's dtype or a wider one."""
        storage, narrow = NAMES[self.x.dtype], walk in tiles.MOST_TAPS
        vec = tiles.vector(storage, self.x.shape[2], _alignments(self.x, self.initial, *tensors))
        dtype = f"{storage}+{NAMES[self.weight.dtype]}" if narrow else storage
        taps = self.taps if narrow else 0
        return tiles.Pass(f"causal_conv1d.{walk}", dtype, vec, taps, self.silu, self.edges is not None)

    def launch(self, kernel: tiles.Pass, states: int, wide_pass: str = "FORWARD") -> tiles.Launch:
        """`states`: items beside the runs, for a run of one step; a run of several takes fewer."""
        batch, time, channels, _ = self.sizes
        chosen = _choose(kernel, self.x, batch, time, channels, self.taps)
        items = tiles.runs(batch, time, self.dilation, chosen["run"]) if time else 0
        if kernel.walk == "forward":
            states = states * -(-self.steps // chosen["run"])
        elif kernel.walk == "wide":
            states = states * self.dilation * -(-(self.taps - 1) // chosen["run"])
        elif kernel.walk == "backward":
            states = states * self.dilation * (self.taps > 1)
        return tiles.launch(kernel, chosen, items + states, channels, self.taps, wide_pass)

    def packed_weight(self) -> Tensor:
        """[W, D] in the arithmetic's dtype."""
        return self.weight.to(self.real).t().contiguous()


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [B, T, D] and the last state [B or N, S, D]."""
    call = _Call.of(x, weight, bias, initial_state, dilation, activation, cu_seqlens)
    B, T, D, N = call.sizes
    y, final = x.new_empty(B, T, D), x.new_empty(N, call.steps, D)
    if call.taps > tiles.MOST_TAPS["forward"]:
        _wide(call, "FORWARD", call.x, call.packed_weight(), None, call.initial, y, final)
        return y, final
    kernel = call.kernel("forward", y, final)
    chosen = call.launch(kernel, N)
    pointers = (call.x, call.weight, call.bias, call.initial, y, final, call.edges)
    arguments = (*pointers, *call.sizes, dilation, *_strides(call.x), *call.weight.stride())
    FORWARD(chosen.constants, chosen.grid, chosen.threads, arguments, like=x, shared=chosen.shared)
    return y, final


def _wide(
    call: _Call,
    wide_pass: str,
    rows: Tensor,
    weight: Tensor,
    dy: Tensor | None,
    state: Tensor | None,
    out: Tensor,
    state_out: Tensor | None,
) -> None:
    """One pass over [B, T, D]: see csrc/conv/causal_conv1d_wide.cu."""
    kernel = call.kernel("wide", rows, dy, state, out, state_out)
    chosen = call.launch(kernel, 0 if state_out is None else call.sizes[3], wide_pass)
    bias = None if call.bias is None or wide_pass == "DX" else call.bias.to(call.real)
    pointers = (rows, weight, bias, dy, state, out, state_out, call.edges)
    arguments = (*pointers, *call.sizes, call.taps, call.dilation, *_strides(rows), *_strides(dy))
    WIDE(chosen.constants, chosen.grid, chosen.threads, arguments, like=rows, shared=chosen.shared)


def causal_conv1d_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx [B, T, D], dweight [D, W], dbias [D] ([0] without bias), dinitial_state [B or N, S, D] ([0] without it)."""
    call = _Call.of(x, weight, bias, initial_state, dilation, activation, cu_seqlens)
    B, T, D, N = call.sizes
    dy = None if dy is None else _dense(dy)
    dfinal = None if dfinal_state is None else dfinal_state.contiguous()
    dx = x.new_empty(B, T, D)
    dinitial = None if initial_state is None else x.new_empty(N, call.steps, D)
    if call.taps > tiles.MOST_TAPS["backward"]:
        sums = _wide_backward(call, dy, dfinal, dx, dinitial)
    else:
        kernel = call.kernel("backward", dy, dfinal, dx, dinitial)
        chosen = call.launch(kernel, 0 if dinitial is None else N)
        sums = x.new_empty((chosen.blocks, call.taps + 1, D), dtype=call.real)
        pointers = (dy, call.x, call.weight, call.bias, call.initial, dfinal, dx, dinitial, sums, call.edges)
        strides = (*_strides(dy), *_strides(call.x), *call.weight.stride())
        arguments = (*pointers, *call.sizes, dilation, *strides, chosen.turns)
        BACKWARD(chosen.constants, chosen.grid, chosen.threads, arguments, like=x, shared=chosen.shared)
    total = sums.sum(0)  # in an order that depends on shapes only
    dweight = total[:-1].t().to(weight.dtype, memory_format=torch.contiguous_format)
    dbias = x.new_empty(0, dtype=call.real) if bias is None else total[-1].to(bias.dtype, copy=True)
    return dx, dweight.contiguous(), dbias, x.new_empty(0) if dinitial is None else dinitial


def _wide_backward(
    call: _Call, dy: Tensor | None, dfinal: Tensor | None, dx: Tensor, dinitial: Tensor | None
) -> Tensor:
    """Writes dx and dinitial; the partial sums [blocks, W + 1, D]."""
    x, weight = call.x, call.packed_weight()
    if dy is None:
        dz = x.new_zeros((1, 1, x.shape[2]), dtype=call.real if call.silu else x.dtype).expand(x.shape)
    elif call.silu:
        dz = torch.empty(x.shape, dtype=call.real, device=x.device)
        _wide(call, "DZ", x, weight, dy, call.initial, dz, None)
    else:
        dz = dy
    _wide(call, "DX", dz, weight, None, dfinal, dx, dinitial)
    kernel = call.kernel("taps", dz)
    chosen = call.launch(kernel, 0)
    sums = x.new_empty((chosen.blocks, call.taps + 1, x.shape[2]), dtype=call.real)
    pointers = (dz, x, call.initial, sums, call.edges)
    arguments = (*pointers, *call.sizes, call.taps, call.dilation, *_strides(dz), *_strides(x), chosen.turns)
    TAPS(chosen.constants, chosen.grid, chosen.threads, arguments, like=x, shared=chosen.shared)
    return sums
