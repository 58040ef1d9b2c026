"""Operators of the room under the backend "triton", and a list of their kernels, which the tests compile offline.

The launchers of ssm_kernel and cauchy_kernel; letters as in triton_kernels.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles, triton_conv_ssm
from . import triton_kernels as kernels
from .triton_conv_ssm import conv_ssm, conv_ssm_backward, conv_ssm_forward

__all__ = [
    "cauchy_kernel",
    "cauchy_kernel_backward",
    "configurations",
    "conv_ssm",
    "conv_ssm_backward",
    "conv_ssm_forward",
    "ssm_kernel",
    "ssm_kernel_backward",
]

INTERPRETED = triton.knobs.runtime.interpret
# In the interpreter, which has no device to choose for: short cases have several tiles.
INTERPRETED_CHOICE = {"columns": 8, "rows": 4, "block": 16}
OPTIONS = {"num_warps": tiles.WARPS, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": 255}
TABLES = (128, 512)  # numbers of a program of `powers`: of small tables, and of others
REAL = {torch.complex64: torch.float32, torch.complex128: torch.float64}

SOURCES = (tiles.__file__, __file__, str(Path(__file__).with_name("triton_kernels.py")))
TUNABLES = {
    f"{op}.{walk}": choose.Tunable(f"{op}.{walk}.triton", problem, SOURCES)
    for op, problem in (("ssm_kernel", tiles.problem), ("cauchy_kernel", tiles.problem_of_cauchy))
    for walk in ("forward", "backward")
}


@lru_cache(maxsize=4096)
def key_of(kernel: str, dtype: torch.dtype, heads: int, modes: int, length: int) -> choose.Key:
    """All sizes are rounded up to a power of two, so that few choices exist."""
    sizes = (("H", heads), ("N", modes), ("L", length))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    return choose.Key(f"{kernel}.triton", str(dtype).removeprefix("torch."), buckets)


def choice(kernel: str, like: Tensor, length: int) -> choose.Solution:
    tunable = TUNABLES[kernel]
    if like.is_cuda:
        return choose.solution(tunable, key_of(kernel, like.dtype, *like.shape, length), like.device)
    return choose.forced_solution(tunable.name) or INTERPRETED_CHOICE


def launch(kernel: Any, like: Tensor, grid: tuple[int, int], arguments: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[grid](**arguments, **OPTIONS)


def pairs(x: Tensor) -> Tensor:
    """A complex tensor as parts, dense."""
    return torch.view_as_real(x.resolve_conj().resolve_neg().contiguous())


def powers(z: Tensor, c: Tensor | None, count: int, step: int) -> Tensor:
    """e^{step m z} for m < count, times 2 c: [H, count, N, 2]."""
    heads, modes = z.shape[:2]
    table = z.new_empty(heads, count, modes, 2)
    arguments = {"p_z": z, "p_c": z if c is None else c, "p_table": table, "N": modes, "count": count, "step": step}
    block = TABLES[count * modes >= 4096]
    constants = {"SCALED": c is not None, "BLOCK": block}
    launch(kernels.powers, z, (-(-count * modes // block), heads), arguments | constants)
    return table


def ssm_kernel(z: Tensor, c: Tensor, length: int) -> Tensor:
    """K [H, length]."""
    (heads, modes), real = z.shape, REAL[z.dtype]
    k = torch.empty(heads, length, dtype=real, device=z.device)
    if z.numel() == 0 or length == 0:
        return k.zero_()
    chosen = choice("ssm_kernel.forward", z, length)
    columns, rows = chosen["columns"], chosen["rows"]
    z_read, count = pairs(z), -(-length // columns)
    arguments = {
        "p_columns": powers(z_read, None, columns, 1),
        "p_rows": powers(z_read, pairs(c), count, columns),
        "p_k": k,
        "N": modes,
        "J": count,
        "L": length,
        "C": columns,
        "R": rows,
    }
    launch(kernels.ssm_kernel_forward, z, (-(-count // rows), heads), arguments)
    return k


def ssm_kernel_backward(dk: Tensor, z: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """dz and dc [H, N]."""
    heads, modes, length = *z.shape, dk.shape[1]
    if z.numel() == 0 or length == 0:
        return torch.zeros_like(z), torch.zeros_like(c)
    chosen = choice("ssm_kernel.backward", z, length)
    columns, rows = chosen["columns"], chosen["rows"]
    z_read, count = pairs(z), -(-length // columns)
    programs = -(-count // rows)
    sums = torch.empty(heads, programs, modes, 4, dtype=torch.float64, device=z.device)
    arguments = {
        "p_columns": powers(z_read, None, columns, 1),
        "p_rows": powers(z_read, None, count, columns),
        "p_dk": dk.contiguous(),
        "p_sums": sums,
        "N": modes,
        "J": count,
        "L": length,
        "tiles": programs,
        "C": columns,
        "R": rows,
    }
    launch(kernels.ssm_kernel_backward, z, (programs, heads), arguments)
    plain, timed = torch.view_as_complex(sums.sum(1).view(heads, modes, 2, 2)).unbind(-1)
    dz = (2 * (c * timed).conj()).resolve_conj()
    return dz.to(z.dtype), (2 * plain.conj()).resolve_conj().to(c.dtype)


def cauchy_kernel(v: Tensor, nodes: Tensor, w: Tensor) -> Tensor:
    """y [H, L]."""
    (heads, modes), length = v.shape, len(nodes)
    y = torch.empty(heads, length, dtype=v.dtype, device=v.device)
    if v.numel() == 0 or length == 0:
        return y.zero_()
    block = choice("cauchy_kernel.forward", v, length)["block"]
    arguments = {
        "p_v": pairs(v),
        "p_nodes": pairs(nodes),
        "p_w": pairs(w),
        "p_y": torch.view_as_real(y),
        "N": modes,
        "L": length,
        "BLOCK": block,
    }
    launch(kernels.cauchy_kernel_forward, v, (-(-length // block), heads), arguments)
    return y


def cauchy_kernel_backward(
    dy: Tensor, v: Tensor, nodes: Tensor, w: Tensor, *, wants_nodes: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """dv [H, N], dnodes [L] or, unless wanted, [0], and dw [H, N]."""
    (heads, modes), length = v.shape, len(nodes)
    if v.numel() == 0 or length == 0:
        return torch.zeros_like(v), nodes.new_zeros(length if wants_nodes else 0), torch.zeros_like(w)
    block = choice("cauchy_kernel.backward", v, length)["block"]
    stretches, groups, real = -(-length // block), -(-heads // tiles.HEADS), REAL[v.dtype]
    sums = torch.empty(heads, stretches, modes, 4, dtype=real, device=v.device)
    parts = torch.empty(groups, length, 2, dtype=real, device=v.device) if wants_nodes else sums
    arguments = {
        "p_dy": pairs(dy),
        "p_v": pairs(v),
        "p_nodes": pairs(nodes),
        "p_w": pairs(w),
        "p_sums": sums,
        "p_dnodes": parts,
        "H": heads,
        "N": modes,
        "L": length,
        "stretches": stretches,
        "group": tiles.HEADS,
        "NODES": wants_nodes,
        "BLOCK": block,
    }
    launch(kernels.cauchy_kernel_backward, v, (stretches, groups), arguments)
    dv, dw = torch.view_as_complex(sums.sum(1).view(heads, modes, 2, 2)).unbind(-1)
    dnodes = torch.view_as_complex(parts.sum(0)) if wants_nodes else nodes.new_empty(0)
    return dv.contiguous(), dnodes, (v.conj() * dw).resolve_conj()


# ---- the list


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    return [*ours(), *triton_conv_ssm.configurations()]


def ours() -> Iterator[dict[str, Any]]:
    def listed(kernel: Any, real: str, constants: dict[str, Any]) -> dict[str, Any]:
        pointers = {name: f"*{real}" for name in kernel.arg_names if name.startswith("p_")}
        pointers |= {"p_sums": "*fp64"} if kernel is kernels.ssm_kernel_backward else {}
        sizes = {name: "i32" for name in kernel.arg_names if name not in pointers and name not in constants}
        return {"kernel": kernel, "types": pointers | sizes, "constants": constants, "options": OPTIONS}

    for real, size in (("fp32", 4), ("fp64", 8)):
        for scaled, block in itertools.product((False, True), TABLES):
            yield listed(kernels.powers, real, {"SCALED": scaled, "BLOCK": block})
        for columns, rows in itertools.product(tiles.COLUMNS, tiles.ROWS):
            if columns * rows <= tiles.TILES[size]:
                for kernel in (kernels.ssm_kernel_forward, kernels.ssm_kernel_backward):
                    yield listed(kernel, real, {"C": columns, "R": rows})
        for block in tiles.BLOCKS:
            yield listed(kernels.cauchy_kernel_forward, real, {"BLOCK": block})
            for nodes in (False, True):
                yield listed(kernels.cauchy_kernel_backward, real, {"NODES": nodes, "BLOCK": block})
