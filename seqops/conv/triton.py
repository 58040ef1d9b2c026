"""Launchers of the Triton kernels of causal_conv1d.

Letters as in triton_kernels.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles, triton_fft_conv
from . import triton_kernels as kernels
from .triton_fft_conv import fft_conv, fft_conv_backward  # noqa: F401  found by name
from .triton_kernels import GRADIENT, Y

INTERPRETED = triton.knobs.runtime.interpret
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# Left to itself, ptxas saves registers by spilling a word or two; but with this, sums of weights spill many.
MOST_REGISTERS = {"maxnreg": 255}
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
# For the interpreter, which has no device to choose for.
INTERPRETED_TILE = {"steps": 8, "channels": 16}
PIECE = 1024  # steps that a program adds up for the gradient of a tap

SOURCES = (tiles.__file__, __file__, str(Path(__file__).with_name("triton_kernels.py")))
TUNABLES = {
    name: choose.Tunable(f"{name}.triton", tiles.problem_in_triton, SOURCES)
    for name in ("causal_conv1d.forward", "causal_conv1d.backward")
}


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=4096)
def key_of(kernel: str, dtype: torch.dtype, batch: int, time: int, channels: int, taps: int) -> choose.Key:
    """All sizes are rounded up to a power of two, so that few choices exist."""
    sizes = (("B", batch), ("T", time), ("D", channels), ("W", taps))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    return choose.Key(f"{kernel}.triton", str(dtype).removeprefix("torch."), buckets)


class Call(NamedTuple):
    """What the passes have in common."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None
    dilation: int
    silu: bool
    sequence: Tensor  # [T] of packed sequences; else empty
    edges: Tensor  # [N + 1]; else empty
    packed: bool
    tile: dict[str, int]  # BT, BD

    @property
    def taps(self) -> int:
        return self.weight.shape[1]

    @property
    def steps(self) -> int:
        """Of a state."""
        return (self.taps - 1) * self.dilation

    @property
    def rows(self) -> int:
        """Of a state."""
        return len(self.edges) - 1 if self.packed else self.x.shape[0]

    def common(self) -> dict[str, Any]:
        """Arguments of every pass over the taps."""
        _, T, D = self.x.shape
        return {
            "p_sequence": self.sequence,
            "p_edges": self.edges,
            "T": T,
            "D": D,
            "W": self.taps,
            "S": self.steps,
            "dilation": self.dilation,
            "PACKED": self.packed,
            **self.tile,
        }

    def weights(self) -> dict[str, Any]:
        return {"p_weight": self.weight, "stride_w_d": self.weight.stride(0), "stride_w_k": self.weight.stride(1)}

    def inputs(self) -> dict[str, Any]:
        return {
            "p_x": self.x,
            "p_initial": self.x if self.initial is None else self.initial,
            "initial_rows": 0 if self.initial is None else self.rows,
            "stride_x_b": self.x.stride(0),
            "stride_x_t": self.x.stride(1),
        }


def call_of(
    walk: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    dilation: int,
    activation: str | None,
    cu_seqlens: Tensor | None,
) -> Call:
    if bias is not None and bias.dtype != weight.dtype:  # one of them is in float32
        weight, bias = weight.float(), bias.float()
    batch, time, channels = x.shape
    unused = torch.empty(0, dtype=torch.int64, device=x.device)
    sequence, edges = unused, unused
    if cu_seqlens is not None:
        # Edges that are none (nobody has looked at them) lead to no address outside of the tensors.
        inner = cu_seqlens.to(torch.int64)[1:-1].clamp(0, time)
        edges = torch.cat((inner.new_zeros(1), inner, inner.new_full((1,), time))).cummax(0).values
        edges = edges[: len(cu_seqlens)].contiguous()
        sequence = torch.searchsorted(edges[1:], torch.arange(time, device=x.device), right=True)
    name, chosen = f"causal_conv1d.{walk}", None
    if x.is_cuda:
        key = key_of(name, x.dtype, batch, time, channels, weight.shape[1])
        chosen = choose.solution(TUNABLES[name], key, x.device)
    else:
        chosen = choose.forced_solution(TUNABLES[name].name) or INTERPRETED_TILE
    return Call(
        dense(x),
        weight,
        None if bias is None else bias.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        dilation,
        activation is not None,
        sequence,
        edges,
        cu_seqlens is not None,
        {"BT": chosen["steps"], "BD": chosen["channels"]},
    )


def dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    if programs:
        with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
            kernel[(programs,)](**arguments, **options(kernel))


def options(kernel: Any) -> dict[str, Any]:
    """Of the compiler."""
    return OPTIONS if kernel is kernels.causal_conv1d_weights else OPTIONS | MOST_REGISTERS


def programs(call: Call, rows: int, steps: int) -> int:
    return rows * -(-steps // call.tile["BT"]) * -(-call.x.shape[2] // call.tile["BD"])


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
    call = call_of("forward", x, weight, bias, initial_state, dilation, activation, cu_seqlens)
    y, final = x.new_empty(x.shape), x.new_empty(call.rows, call.steps, x.shape[2])
    forward(call, None, y)
    names = ("p_edges", "T", "D", "S", "PACKED", "BT", "BD")
    arguments = {name: value for name, value in call.common().items() if name in names}
    arguments |= call.inputs() | {"p_final": final}
    launch(kernels.causal_conv1d_state, x, programs(call, call.rows, call.steps), arguments)
    return y, final


def forward(call: Call, dy: Tensor | None, out: Tensor) -> None:
    """y, or with dy the gradient of z."""
    like = out if dy is None else dy
    arguments = {
        **call.common(),
        **call.weights(),
        **call.inputs(),
        "p_bias": call.weight if call.bias is None else call.bias,
        "bias_channels": 0 if call.bias is None else len(call.bias),
        "p_dy": call.x if dy is None else dy,
        "p_y": out,
        "stride_dy_b": like.stride(0),
        "stride_dy_t": like.stride(1),
        "PASS": (Y if dy is None else GRADIENT).value,
        "SILU": call.silu,
    }
    launch(kernels.causal_conv1d_forward, call.x, programs(call, *call.x.shape[:2]), arguments)


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
    call = call_of("backward", x, weight, bias, initial_state, dilation, activation, cu_seqlens)
    batch, time, channels = x.shape
    dz = x.new_zeros(1, 1, channels).expand(x.shape) if dy is None else dense(dy)
    if call.silu and dy is not None:
        dz = torch.empty(x.shape, dtype=real_of(x.dtype), device=x.device)
        forward(call, dense(dy), dz)
    dx = x.new_empty(x.shape)
    inputs(call, dz, dfinal_state, dx, batch, time, state=False)
    dinitial = x.new_empty(0 if initial_state is None else (call.rows, call.steps, channels))
    if initial_state is not None:
        inputs(call, dz, dfinal_state, dinitial, call.rows, call.steps, state=True)
    piece = min(PIECE, max(time, 1))
    pieces = batch * -(-time // piece)
    sums = torch.empty(pieces, call.taps + 1, channels, dtype=real_of(x.dtype), device=x.device)
    arguments = {
        **call.common(),
        **call.inputs(),
        "p_dz": dz,
        "p_sums": sums,
        "piece": piece,
        "stride_dz_b": dz.stride(0),
        "stride_dz_t": dz.stride(1),
    }
    count = pieces * (call.taps + 1) * -(-channels // call.tile["BD"])
    launch(kernels.causal_conv1d_weights, x, count, arguments)
    total = sums.sum(0)
    dweight = total[:-1].t().to(weight.dtype).contiguous()
    dbias = total.new_empty(0) if bias is None else total[-1].to(bias.dtype, copy=True)
    return dx, dweight, dbias, dinitial


def inputs(
    call: Call, dz: Tensor, dfinal_state: Tensor | None, out: Tensor, rows: int, steps: int, state: bool
) -> None:
    dfinal = out if dfinal_state is None else dfinal_state.contiguous()
    arguments = {
        **call.common(),
        **call.weights(),
        "p_dz": dz,
        "p_dfinal": dfinal,
        "p_dx": out,
        "steps": steps,
        "final_rows": 0 if dfinal_state is None else call.rows,
        "stride_dz_b": dz.stride(0),
        "stride_dz_t": dz.stride(1),
        "STATE": state,
    }
    launch(kernels.causal_conv1d_inputs, call.x, programs(call, rows, steps), arguments)


# ---- what is compiled


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    return [*forward_configurations(), *backward_configurations(), *triton_fft_conv.configurations()]


def with_tiles(dtypes: Iterable[Any]) -> Iterator[tuple[Any, dict[str, int], bool]]:
    """Each dtype of x, or tuple that begins with one, with every tile that may be chosen, and packed or not."""
    sizes = itertools.product(tiles.TRITON_STEPS, tiles.TRITON_CHANNELS)
    for each, (steps, channels), packed in itertools.product(dtypes, sizes, (False, True)):
        x = each[0] if isinstance(each, tuple) else each
        if steps * channels * real_of(x).itemsize <= tiles.TRITON_BYTES:
            yield each, {"BT": steps, "BD": channels}, packed


def configuration(kernel: Any, constants: dict[str, Any], **pointers: torch.dtype) -> dict[str, Any]:
    types = {name: f"*{TYPES[dtype]}" for name, dtype in pointers.items()}
    types |= {name: "*i64" for name in ("p_sequence", "p_edges") if name in kernel.arg_names}
    sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
    return {"kernel": kernel, "types": types | sizes, "constants": constants, "options": options(kernel)}


def pairs() -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Dtypes of x and weight."""
    for x in TYPES:
        yield from ((x, weight) for weight in dict.fromkeys((x, real_of(x))))


def forward_configurations() -> Iterator[dict[str, Any]]:
    for (x, weight), shape, packed in with_tiles(pairs()):
        tensors = {"p_x": x, "p_weight": weight, "p_bias": weight, "p_initial": x, "p_dy": x}
        for form, silu in ((Y, False), (Y, True), (GRADIENT, True)):
            constants = {"PASS": form.value, "SILU": silu, "PACKED": packed, **shape}
            out = x if form == Y else real_of(x)
            yield configuration(kernels.causal_conv1d_forward, constants, **tensors, p_y=out)
    for x, shape, packed in with_tiles(TYPES):
        constants = {"PACKED": packed, **shape}
        yield configuration(kernels.causal_conv1d_state, constants, p_x=x, p_initial=x, p_final=x)


def backward_configurations() -> Iterator[dict[str, Any]]:
    for (x, weight), shape, packed in with_tiles(pairs()):
        for dz, state in itertools.product(dict.fromkeys((x, real_of(x))), (False, True)):
            tensors = {"p_dz": dz, "p_weight": weight, "p_dfinal": x, "p_dx": x}
            constants = {"STATE": state, "PACKED": packed, **shape}
            yield configuration(kernels.causal_conv1d_inputs, constants, **tensors)
    for x, shape, packed in with_tiles(TYPES):
        for dz in dict.fromkeys((x, real_of(x))):
            tensors = {"p_dz": dz, "p_x": x, "p_initial": x, "p_sums": real_of(x)}
            yield configuration(kernels.causal_conv1d_weights, {"PACKED": packed, **shape}, **tensors)
