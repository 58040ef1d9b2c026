"""Launchers of cluster_assign's Triton kernel, and lists by sorting; letters as in triton_kernels_cluster_assign.py."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels_cluster_assign as kernels
from .triton_gathered_attention import counting_sort, dense_inside

INTERPRETED = triton.knobs.runtime.interpret
STORAGE = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
CLUSTERS = (16, 64)  # of a tile
# Of float64 each product of a tile is in registers.
TILES = {True: {"BLOCK_T": 16, "BLOCK_K": 16, "BLOCK_D": 8}, False: {"BLOCK_T": 64, "BLOCK_D": 32}}
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def constants(dtype: torch.dtype, clusters: int, scores: bool) -> dict[str, Any]:
    wide = dtype == torch.float64
    block = {} if wide else {"BLOCK_K": CLUSTERS[clusters > CLUSTERS[0]]}
    return {"SCORES": scores, **TILES[wide], **block}


def score(x: Tensor, centroids: Tensor, wants_scores: bool) -> tuple[Tensor, Tensor]:
    """nearest [B, T, H], and the scores [B, H, K, T] or, unless wanted, nothing of a meaning."""
    (batch, steps, inner, channels), (heads, clusters, _) = x.shape, centroids.shape
    real = torch.float64 if x.dtype == torch.float64 else torch.float32
    nearest = torch.empty(batch, steps, heads, dtype=torch.int32, device=x.device)
    scores = torch.empty(batch, heads, clusters, steps if wants_scores else 0, dtype=real, device=x.device)
    if nearest.numel() == 0:
        return nearest, scores
    if not (x.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {x.device} needs TRITON_INTERPRET=1 from the start")
    x = dense_inside(x)
    chosen = constants(x.dtype, clusters, wants_scores)
    arguments = {
        "p_x": x,
        "p_centroids": centroids.to(real).contiguous(),
        "p_nearest": nearest,
        "p_scores": scores,
        "T": steps,
        "H": heads,
        "Hx": inner,
        "K": clusters,
        "D": channels,
        "stride_x_b": x.stride(0),
        "stride_x_t": x.stride(1),
        "stride_x_h": x.stride(2),
    }
    grid = (-(-steps // chosen["BLOCK_T"]) * heads * batch,)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        kernels.nearest_cluster[grid](**arguments, **chosen, **OPTIONS)
    return nearest, scores


def nearest_cluster(x: Tensor, centroids: Tensor) -> Tensor:
    """[B, T, H]"""
    return score(x, centroids, False)[0]


def cluster_lists(x: Tensor, centroids: Tensor, size: int, mode: str) -> tuple[Tensor, Tensor]:
    """index [B, H, K, size] and nearest [B, T, H]."""
    nearest, scores = score(x, centroids, mode == "balanced")
    steps, clusters = x.shape[1], centroids.shape[1]
    kept = min(size, steps)
    if mode == "balanced":
        places = torch.sort(scores, stable=True, dim=-1, descending=True).indices[..., :kept].sort(-1).values
    else:
        order, starts = counting_sort(nearest.movedim(1, 2), clusters)
        entries = starts[..., :-1].unsqueeze(-1) + torch.arange(kept, dtype=torch.int32, device=x.device)
        if steps == 0:
            places = entries
        else:
            flat = entries.clamp(max=steps - 1).flatten(2).long()
            places = torch.where(entries < starts[..., 1:].unsqueeze(-1), order.gather(2, flat).view(entries.shape), -1)
    return torch.nn.functional.pad(places.to(torch.int32), (0, size - kept), value=-1), nearest


# ---- the list


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    kernel = kernels.nearest_cluster
    for (dtype, storage), clusters, scores in itertools.product(STORAGE.items(), CLUSTERS, (False, True)):
        if dtype == torch.float64 and clusters != CLUSTERS[0]:
            continue
        real = "*fp64" if dtype == torch.float64 else "*fp32"
        types = {"p_x": f"*{storage}", "p_centroids": real, "p_nearest": "*i32", "p_scores": real}
        types |= {name: "i64" for name in kernel.arg_names if name.startswith("stride_")}
        chosen = constants(dtype, clusters, scores)
        types |= {name: "i32" for name in kernel.arg_names if name not in types and name not in chosen}
        yield {"kernel": kernel, "types": types, "constants": chosen, "options": OPTIONS}
