"""Launchers of the Triton kernels between the matrix products of large_chunk_ttt, and the operators that they serve."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from . import composed_large_chunk_ttt as composed
from . import triton_kernels_large_chunk_ttt as kernels

INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
ROWS = 8  # of a tile
OPTIONS = {"num_warps": 4, "num_stages": 1, "maxnreg": 255}


def tile(real: torch.dtype) -> dict[str, int]:
    return {"BLOCK_R": ROWS, "BLOCK_C": 16 if INTERPRETED else 32 if real == torch.float64 else 128}


def launch(kernel: Any, whole: bool, sizes: tuple[int, int, int], tensors: dict[str, Tensor], **flags: bool) -> None:
    """sizes: matrices, rows, columns of one. whole: whether a program has whole rows."""
    like = next(iter(tensors.values()))
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    matrices, rows, channels = sizes
    shape = tile(like.dtype)
    programs = matrices * -(-rows // ROWS) * (1 if whole else -(-channels // shape["BLOCK_C"]))
    if not programs:
        return
    arguments: dict[str, Any] = {"rows": rows, "channels": channels, **flags, **shape}
    for name, tensor in tensors.items():
        arguments[f"p_{name}"] = tensor
        dims = "nr"[: tensor.ndim - 1]
        arguments |= {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, tensor.stride(), strict=False)}
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **OPTIONS)


# ---- the passes of composed_large_chunk_ttt.py


def gate(y0: Tensor, y2: Tensor, out: Tensor) -> None:
    launch(kernels.large_chunk_gate, False, tuple(y0.shape), {"y0": y0, "y2": y2, "out": out})


def gate_backward(y0: Tensor, y2: Tensor, dh: Tensor, dy0: Tensor, dy2: Tensor, h: Tensor) -> None:
    tensors = {"y0": y0, "y2": y2, "dh": dh, "dy0": dy0, "dy2": dy2, "h": h}
    launch(kernels.large_chunk_gate_backward, False, tuple(y0.shape), tensors)


def learn(y0: Tensor, y2: Tensor, g: Tensor, lr: Tensor, e0: Tensor, h: Tensor, e2: Tensor) -> None:
    tensors = {"y0": y0, "y2": y2, "g": g, "lr": lr, "e0": e0, "h": h, "e2": e2}
    launch(kernels.large_chunk_learn, False, tuple(y0.shape), tensors)


def learn_backward(
    y0: Tensor,
    y2: Tensor,
    g: Tensor,
    lr: Tensor,
    p0: Tensor,
    p1: Tensor,
    p2: Tensor,
    dy0: Tensor,
    dy2: Tensor,
    dg: Tensor,
    e0: Tensor,
    h: Tensor,
    e2: Tensor,
    dlr: Tensor,
) -> None:
    tensors = {"y0": y0, "y2": y2, "g": g, "lr": lr, "p0": p0, "p1": p1, "p2": p2}
    tensors |= {"dy0": dy0, "dy2": dy2, "dg": dg, "e0": e0, "h": h, "e2": e2, "dlr": dlr}
    launch(kernels.large_chunk_learn_backward, True, tuple(y0.shape), tensors)


def renew(w: Tensor, d: Tensor, norms0: Tensor | None, out: Tensor, norms: Tensor | None, copy: Tensor | None) -> None:
    rows = w[:, :, 0]
    tensors = {"w": w, "d": d, "out": out, "copy": out if copy is None else copy}
    tensors |= {"norms0": rows if norms0 is None else norms0, "norms": rows if norms is None else norms}
    launch(kernels.large_chunk_renew, True, tuple(w.shape), tensors, NORM=norms0 is not None, COPY=copy is not None)


def renew_backward(dw: Tensor, w: Tensor, norms0: Tensor, norms: Tensor, dnorms0: Tensor) -> None:
    tensors = {"dw": dw, "w": w, "norms0": norms0, "norms": norms, "dnorms0": dnorms0}
    launch(kernels.large_chunk_renew_backward, True, tuple(w.shape), tensors)


# ---- the operators

PASSES = sys.modules[__name__]
fast_weights = partial(composed.fast_weights, PASSES)
fast_weights_forward = partial(composed.fast_weights_forward, PASSES)
fast_weights_backward = partial(composed.fast_weights_backward, PASSES)


# ---- the list


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched, for the compiler: kernel, types, constants, options."""
    every = [kernels.large_chunk_gate, kernels.large_chunk_gate_backward, kernels.large_chunk_learn]
    every += [kernels.large_chunk_learn_backward, kernels.large_chunk_renew_backward]
    outputs = ("p_out", "p_dy0", "p_dy2", "p_dg", "p_h", "p_e0", "p_e2", "p_copy")

    def listed(kernel: Any, real: torch.dtype, out: torch.dtype, **constants: bool) -> dict[str, Any]:
        narrow = outputs if kernel is not kernels.large_chunk_renew else ("p_copy",)
        types = {n: f"*{TYPES[out if n in narrow else real]}" for n in kernel.arg_names if n.startswith("p_")}
        types |= {name: "i32" for name in kernel.arg_names if not name.isupper() and name not in types}
        found = {"kernel": kernel, "types": types, "constants": {**constants, **tile(real)}, "options": OPTIONS}
        # Every run of the tests compiles the two that add up, of one dtype.
        often = out == torch.bfloat16 and kernel in (kernels.large_chunk_learn_backward, kernels.large_chunk_renew)
        return found if often else found | {"seldom": True}

    for out in TYPES:
        real = torch.float64 if out == torch.float64 else torch.float32
        for kernel in every:
            if out == real or kernel is not kernels.large_chunk_renew_backward:
                yield listed(kernel, real, out)
        for norm in (False, True):
            yield listed(kernels.large_chunk_renew, real, out, NORM=norm, COPY=True)
            if out == real:
                yield listed(kernels.large_chunk_renew, real, out, NORM=norm, COPY=False)
