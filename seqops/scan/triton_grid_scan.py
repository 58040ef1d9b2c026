"""Launchers of the Triton kernels of grid_scan."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles_grid_scan as tiles
from . import triton_kernels_grid_scan as kernels
from .tiles import POWERS

INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
# In the interpreter, which has no device to choose for: strips of a few rows.
INTERPRETED_SHAPE = {"rows": 4, "width": 32}
SUMMED = 256  # gates of a program of the second kernel


SOURCES = (tiles.__file__, __file__, kernels.__file__)
TUNABLES = {
    walk: choose.Tunable(f"grid_scan.{walk}.triton", tiles.problem_in_triton, SOURCES)
    for walk in ("forward", "backward")
}


OF_SUMS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@lru_cache(maxsize=4096)
def key_of(walk: str, dtype: torch.dtype, heads: int, X: int, Y: int, D: int) -> choose.Key:
    """All sizes are rounded up to a power of two, so that few choices exist. heads: of all batch rows."""
    sizes = (("N", heads), ("X", X), ("Y", Y), ("D", D))
    buckets = tuple(choose.bucket(name, value, POWERS, 2 * POWERS[-1]) for name, value in sizes)
    return choose.Key(f"grid_scan.{walk}.triton", str(dtype).removeprefix("torch."), buckets)


def shape_of(walk: str, x: Tensor) -> dict[str, int]:
    """BX and BD."""
    B, X, Y, H, D = x.shape
    tunable = TUNABLES[walk]
    if x.is_cuda:
        chosen = choose.solution(tunable, key_of(walk, x.dtype, B * H, X, Y, D), x.device)
    else:
        chosen = choose.forced_solution(tunable.name) or INTERPRETED_SHAPE
    return {"BX": chosen["rows"], "BD": chosen["width"]}


def options(shape: dict[str, int], dtype: torch.dtype) -> dict[str, Any]:
    """Of the compiler."""
    warps = tiles.warps(shape["BX"], shape["BD"], str(dtype).removeprefix("torch."))
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": 255}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], compiler: dict[str, Any]) -> None:
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **compiler)


def alike(*tensors: Tensor | None, dense_from: int) -> list[Tensor | None]:
    """The tensors with equal strides, and neighbours along the last dimensions; copies where they have not."""
    given = [t.resolve_neg() for t in tensors if t is not None]
    dense = all(t[(0,) * dense_from].is_contiguous() for t in given)
    if not dense or len({t.stride() for t in given}) > 1:
        return [None if t is None else t.contiguous() for t in tensors]
    return [None if t is None else t.resolve_neg() for t in tensors]


def gate_dtype(x: Tensor, *gates: Tensor | None) -> torch.dtype:
    """What the kernels read gates as: the dtype of x where all have it, else that of its sums."""
    return x.dtype if all(gate is None or gate.dtype == x.dtype for gate in gates) else state_dtype(x.dtype)


def gates_of(x: Tensor, *gates: Tensor | None) -> list[Tensor | None]:
    dtype = gate_dtype(x, *gates)
    return alike(*(None if gate is None else gate.to(dtype) for gate in gates), dense_from=4)


def dense_border(border: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if border is None else border.to(dtype).resolve_neg().contiguous()


def rows(x: Tensor, given: Tensor | None) -> int:
    """Batch rows that there are of it."""
    return 0 if given is None else x.shape[0]


def common_arguments(
    x: Tensor, gates: list[Tensor | None], flip_x: bool, flip_y: bool, shape: dict[str, int]
) -> dict[str, Any]:
    rl, ru, dl, du = gates
    named = {"p_rl": rl, "p_ru": rl if ru is None else ru, "p_dl": rl if dl is None else dl, "p_du": du}
    sizes = dict(zip("XYHD", x.shape[1:], strict=True))
    flags = {"flip_x": int(flip_x), "flip_y": int(flip_y), "ru_rows": rows(x, ru), "dl_rows": rows(x, dl)}
    strides = {f"stride_{name}_{letter}": t.stride(i) for name, t in (("x", x), ("t", rl)) for i, letter in LETTERS}
    return {**named, **sizes, **flags, **strides, **shape}


LETTERS = tuple(enumerate("bxyh"))


def grid_scan(
    x_r: Tensor,
    x_d: Tensor,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    *,
    initial_left: Tensor | None = None,
    initial_top: Tensor | None = None,
    flip_x: bool = False,
    flip_y: bool = False,
) -> tuple[Tensor, Tensor]:
    B, _, Y, H, D = x_r.shape
    state = state_dtype(x_r.dtype)
    r, d = (torch.empty(x_r.shape, dtype=x_r.dtype, device=x_r.device) for _ in range(2))
    if not r.numel():
        return r, d
    x_r, x_d = alike(x_r, x_d, dense_from=4)
    shape = shape_of("forward", x_r)
    carry = torch.zeros(B, Y, H, D, dtype=state, device=x_r.device)
    if initial_left is not None:
        carry.copy_(initial_left)
    top = dense_border(initial_top, state)
    arguments = {
        "p_x_r": x_r,
        "p_x_d": x_d,
        "p_top": carry if top is None else top,
        "p_carry": carry,
        "p_r": r,
        "p_d": d,
        "top_rows": rows(x_r, top),
        "DEPTH": tiles.depth(False),
        **common_arguments(x_r, gates_of(x_r, t_rl, t_ru, t_dl, t_du), flip_x, flip_y, shape),
    }
    launch(kernels.grid_scan_forward, x_r, B * H * -(-D // shape["BD"]), arguments, options(shape, x_r.dtype))
    return r, d


def grid_scan_backward(
    dr: Tensor | None,
    dd: Tensor | None,
    t_rl: Tensor,
    t_ru: Tensor | None,
    t_dl: Tensor | None,
    t_du: Tensor,
    r: Tensor | None,
    d: Tensor | None,
    initial_left: Tensor | None,
    initial_top: Tensor | None,
    *,
    flip_x: bool = False,
    flip_y: bool = False,
) -> tuple[Tensor, ...]:
    like = dd if dr is None else dr
    B, X, Y, H, D = like.shape
    state, device = state_dtype(like.dtype), like.device
    given, wants_gates = (t_rl, t_ru, t_dl, t_du), r is not None
    read = gate_dtype(like, *given)
    dx_r, dx_d = (torch.empty(like.shape, dtype=like.dtype, device=device) for _ in range(2))
    dleft, dtop = (torch.zeros(B, side, H, D, dtype=state, device=device) for side in (Y, X))
    dgates = [
        torch.empty((B, X, Y, H) if wants_gates and gate is not None else (0,), dtype=read, device=device)
        for gate in given
    ]
    if like.numel():
        dr, dd = alike(dr, dd, dense_from=4)
        shape = shape_of("backward", like)
        tiles_of_d = -(-D // shape["BD"])
        parts = dgates
        if wants_gates and tiles_of_d > 1:
            parts = [torch.empty(tiles_of_d, *gate.shape, dtype=state, device=device) for gate in dgates]
        first = dd if dr is None else dr
        left, top = dense_border(initial_left, state), dense_border(initial_top, state)
        arguments = {
            "p_dr": first,
            "p_dd": first if dd is None else dd,
            "p_r": r.contiguous() if wants_gates else dx_r,
            "p_d": d.contiguous() if wants_gates else dx_d,
            "p_left": dleft if left is None else left,
            "p_top": dtop if top is None else top,
            "p_dx_r": dx_r,
            "p_dx_d": dx_d,
            **dict(zip(("p_drl", "p_dru", "p_ddl", "p_ddu"), parts, strict=True)),
            "p_carry": dleft,
            "p_dtop": dtop,
            "B": B,
            "left_rows": rows(like, left),
            "top_rows": rows(like, top),
            "dr_rows": rows(like, dr),
            "dd_rows": rows(like, dd),
            "GATES": wants_gates,
            "DEPTH": tiles.depth(wants_gates),
            **common_arguments(first, gates_of(first, *given), flip_x, flip_y, shape),
        }
        launch(kernels.grid_scan_backward, like, B * H * tiles_of_d, arguments, options(shape, like.dtype))
        if parts is not dgates:
            for part, gradient_ in zip(parts, dgates, strict=True):
                add_parts(part, gradient_)
    gradients = (
        total.to(t_rl.dtype if gate is None else gate.dtype) for gate, total in zip(given, dgates, strict=True)
    )
    return (dx_r, dx_d, *gradients, dleft, dtop)


def add_parts(part: Tensor, total: Tensor) -> None:
    """total [B, X, Y, H] is the sum of part [tiles, B, X, Y, H]."""
    if total.numel():
        arguments = {"p_part": part, "p_gradient": total, "nodes": total.numel(), "tiles": len(part), "BLOCK": SUMMED}
        launch(kernels.grid_scan_gates, total, -(-total.numel() // SUMMED), arguments, OF_SUMS)


# ---- what may be launched, for compilation without a device

PAIRS = [*((dtype, dtype) for dtype in TYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)]


def configurations() -> Iterator[dict[str, Any]]:
    """As in triton.py: kernel, types of its run-time arguments, constants, options."""
    for (x, gate), (rows, width) in itertools.product(PAIRS, tiles.SHAPES):
        state, shape = state_dtype(x), {"BX": rows, "BD": width}
        read = {"p_rl": gate, "p_ru": gate, "p_dl": gate, "p_du": gate}
        forward = {"p_x_r": x, "p_x_d": x, "p_r": x, "p_d": x, **read}
        constants = {"DEPTH": tiles.depth(False), **shape}
        yield configuration(kernels.grid_scan_forward, constants, state, forward, options(shape, x))
        backward = {**dict.fromkeys(("p_dr", "p_dd", "p_r", "p_d", "p_dx_r", "p_dx_d"), x), **read}
        for wants_gates, written in ((False, gate), *((True, dtype) for dtype in dict.fromkeys((gate, state)))):
            pointers = backward | dict.fromkeys(("p_drl", "p_dru", "p_ddl", "p_ddu"), written)
            named = {"GATES": wants_gates, "DEPTH": tiles.depth(wants_gates), **shape}
            yield configuration(kernels.grid_scan_backward, named, state, pointers, options(shape, x))
    for gate in TYPES:
        state = state_dtype(gate)
        yield configuration(kernels.grid_scan_gates, {"BLOCK": SUMMED}, state, {"p_gradient": gate}, OF_SUMS)


def configuration(
    kernel: Any,
    constants: dict[str, Any],
    state: torch.dtype,
    pointers: dict[str, torch.dtype],
    compiler: dict[str, Any],
) -> dict[str, Any]:
    """Pointers without a name here are to STATE; other arguments are int32."""
    types = {name: "*" + TYPES[pointers.get(name, state)] for name in kernel.arg_names if name.startswith("p_")}
    sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
    return {"kernel": kernel, "types": types | sizes, "constants": constants, "options": compiler}
