"""Launchers of the Triton kernels of combiner_attention's parts; letters as in triton_kernels_combiner_attention.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from ..core.layout import dense_inside
from . import triton_kernels_combiner_attention as kernels
from .composed_combiner_attention import levels, rows_of, spans_of

INTERPRETED = triton.knobs.runtime.interpret
WIDTHS = (16, 32, 64, 128, 256)  # of blocks of channels; wider heads take the next power of two
BYTES = 8192  # of a tile in the dtype of sums
CHANNELS = 128  # of a program of a running pool
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}
# ptxas spills a few registers of some summaries where it thinks that more warps will fit; with a limit it does not.
SPAN = OPTIONS | {"maxnreg": 255}
COLUMN = OPTIONS | {"num_warps": 1}
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    """On the current stream of `like`'s device."""
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options)


def strides(**tensors: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{letter}": t.stride(dim) for name, t in tensors.items() for dim, letter in enumerate("bth")}


def tile(channels: int, dtype: torch.dtype) -> dict[str, int]:
    width = max(triton.next_power_of_2(channels), WIDTHS[0])
    return {"BN": max(BYTES // (8 if dtype == torch.float64 else 4) // width, 1), "BD": width}


def levels_of(T: int, block_size: int, tree: bool, causal: bool) -> Iterator[dict[str, int]]:
    """Of each level with spans: the width of a node in positions, every which node has a row, and the rows."""
    if not tree:
        if count := spans_of(T, block_size, tree, causal):
            yield {"width": block_size, "every": 1, "count": count, "row": 0}
        return
    row = 0
    for level, pairs in enumerate(levels(T, block_size)):
        count = pairs if causal else 2 * pairs
        yield {"width": block_size << level, "every": 2 if causal else 1, "count": count, "row": row}
        row += count


def common(q: Tensor, k: Tensor, v: Tensor, rows: int, pool: str, scale: float) -> dict[str, Any]:
    _, T, H, D = q.shape
    near = torch.tensor(scale, dtype=torch.float32).item()  # numbers arrive in float32: a second one for float64
    numbers = {"scale": near, "scale_rest": scale - near}
    sizes = {"T": T, "H": H, "D": D, "S": rows, "MEAN": pool == "mean"}
    return {"p_q": q, "p_k": k, "p_v": v} | numbers | sizes | strides(q=q, k=k, v=v) | tile(D, q.dtype)


def span_summaries(
    q: Tensor, k: Tensor, v: Tensor, block_size: int, *, tree: bool, pool: str, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """khat and vhat [B, S, H, D]."""
    B, T, H, D = q.shape
    rows = rows_of(T, block_size, tree, causal)
    khat, vhat = (torch.zeros(B, rows, H, D, dtype=q.dtype, device=q.device) for _ in range(2))
    q, k, v = (dense_inside(x) for x in (q, k, v))
    arguments = common(q, k, v, rows, pool, scale) | {"p_khat": khat, "p_vhat": vhat}
    for level in levels_of(T, block_size, tree, causal) if B > 0 else ():
        launch(kernels.span_summaries_forward, q, B * H * level["count"], arguments | level, SPAN)
    return khat, vhat


def span_summaries_backward(
    dkhat: Tensor,
    dvhat: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    *,
    tree: bool,
    pool: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv [B, T, H, D] in the dtype of sums."""
    B, T, H, D = q.shape
    real = torch.float64 if q.dtype == torch.float64 else torch.float32
    dq, dk, dv = (torch.zeros(B, T, H, D, dtype=real, device=q.device) for _ in range(3))
    q, k, v = (dense_inside(x) for x in (q, k, v))
    arguments = common(q, k, v, dkhat.shape[1], pool, scale)
    arguments |= {"p_dkhat": dkhat.contiguous(), "p_dvhat": dvhat.contiguous(), "p_dq": dq, "p_dk": dk, "p_dv": dv}
    for i, level in enumerate(levels_of(T, block_size, tree, causal) if B > 0 else ()):
        more = level | {"ADD": i > 0}
        launch(kernels.span_summaries_backward, q, B * H * level["count"], arguments | more, SPAN)
    return dq, dk, dv


def running_pool(x: Tensor, stride: int, *, pool: str, reverse: bool) -> Tensor:
    """y [B, T, H, D]."""
    B, T, H, D = x.shape
    y = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    if B * T == 0:
        return y
    x, stride = dense_inside(x), min(stride, T)
    arguments = {"p_x": x, "p_y": y, "T": T, "H": H, "D": D, "stride": stride, **strides(x=x)}
    constants = {"MEAN": pool == "mean", "REVERSE": reverse, "BC": CHANNELS}
    programs = B * stride * -(-H * D // CHANNELS)
    launch(kernels.running_pool_forward, x, programs, arguments | constants, COLUMN)
    return y


def running_pool_backward(
    dy: Tensor, x: Tensor | None, y: Tensor | None, stride: int, *, pool: str, reverse: bool
) -> Tensor:
    """dx [B, T, H, D]."""
    B, T, H, D = dy.shape
    dx = torch.empty(B, T, H, D, dtype=dy.dtype, device=dy.device)
    if B * T == 0:
        return dx
    dy, stride = dense_inside(dy), min(stride, T)
    x = dy if x is None else dense_inside(x)
    arguments = {"p_dy": dy, "p_x": x, "p_y": dy if y is None else y.contiguous(), "p_dx": dx}
    arguments |= {"T": T, "H": H, "D": D, "stride": stride, **strides(dy=dy, x=x)}
    constants = {"MEAN": pool == "mean", "REVERSE": reverse, "BC": CHANNELS}
    programs = B * stride * -(-H * D // CHANNELS)
    launch(kernels.running_pool_backward, dy, programs, arguments | constants, COLUMN)
    return dx


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched, for heads up to the widest of WIDTHS."""
    for storage, name in STORAGE.items():
        real = "fp64" if storage == torch.float64 else "fp32"
        for width, mean in itertools.product(WIDTHS, (False, True)):
            constants = {"MEAN": mean, **tile(width, storage)}
            yield configuration(kernels.span_summaries_forward, name, real, constants, SPAN)
            for add in (False, True):
                yield configuration(kernels.span_summaries_backward, name, real, constants | {"ADD": add}, SPAN)
        for mean, reverse in itertools.product((False, True), repeat=2):
            constants = {"MEAN": mean, "REVERSE": reverse, "BC": CHANNELS}
            for kernel in (kernels.running_pool_forward, kernels.running_pool_backward):
                yield configuration(kernel, name, real, constants, COLUMN)


def configuration(
    kernel: Any, storage: str, real: str, constants: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    sums = ("p_dq", "p_dk", "p_dv")
    types = {
        name: f"*{real if name in sums else storage}"
        if name.startswith("p_")
        else "fp32"
        if name.startswith("scale")
        else "i32"
        for name in kernel.arg_names
        if name not in constants
    }
    return {"kernel": kernel, "types": types, "constants": constants, "options": options}
