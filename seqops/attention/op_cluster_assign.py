"""cluster_assign: the operators that it is made of, and the public function.

    nearest_cluster    of each token the cluster of its largest score
    cluster_lists      that, and the tokens of each cluster

Letters: B batch, T time, H heads, Hx heads of x (each of H / Hx heads in turn), K clusters, D channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import op as room
from . import reference

ops = torch.ops.seqops
MODES = ("balanced", "causal")


# ---- checks and shapes


def check_clusters(op: str, x: Tensor, centroids: Tensor, *, grouped: bool = True) -> None:
    """x [B, T, H, D] and centroids [H, K, D]; grouped: x may have fewer heads, which divide H."""
    shape = validate.shape_of(x)
    validate.expect(x.ndim == 4, op, "x", "4 dimensions [B, T, H, D]", f"shape {shape}")
    validate.check_type(op, "x", x, validate.STORAGE)
    validate.expect(x.shape[2] >= 1 and x.shape[3] >= 1, op, "x", "at least 1 head and 1 channel", f"shape {shape}")
    check_centroids(op, centroids, "x", x, grouped=grouped)


def check_centroids(op: str, centroids: Tensor, like_name: str, like: Tensor, *, grouped: bool = False) -> None:
    validate.check_device(op, "centroids", centroids, like_name, like)
    heads, channels = like.shape[2:]
    good = centroids.ndim == 3 and centroids.shape[1] >= 1 and centroids.shape[2] == channels
    if grouped:
        good = good and centroids.shape[0] >= 1 and centroids.shape[0] % heads == 0
    else:
        good = good and centroids.shape[0] == heads
    letters = f"[{f'a multiple of {heads}' if grouped else heads}, K >= 1, {channels}]"
    validate.expect(good, op, "centroids", f"[H, K, D] = {letters}", validate.shape_of(centroids))
    validate.check_type(op, "centroids", centroids, (like.dtype, validate.real_of(like.dtype)))


def check_nearest_cluster(x: Tensor, centroids: Tensor) -> None:
    check_clusters("nearest_cluster", x, centroids)


def nearest_cluster_shapes(x: Tensor, centroids: Tensor) -> Tensor:
    check_nearest_cluster(x, centroids)
    return x.new_empty(*x.shape[:2], centroids.shape[0], dtype=torch.int32)


def check_cluster_lists(x: Tensor, centroids: Tensor, size: int, mode: str) -> None:
    op = "cluster_lists"
    check_clusters(op, x, centroids)
    room.check_at_least(op, "size", size, 1)
    room.check_choice(op, "mode", mode, MODES)


def cluster_lists_shapes(x: Tensor, centroids: Tensor, size: int, mode: str) -> tuple[Tensor, Tensor]:
    check_cluster_lists(x, centroids, size, mode)
    heads, clusters, _ = centroids.shape
    index = x.new_empty(x.shape[0], heads, clusters, size, dtype=torch.int32)
    return index, x.new_empty(*x.shape[:2], heads, dtype=torch.int32)


# ---- vmap: what is mapped joins the batch, where centroids are shared; else each call is its own


def vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    single = len(op._schema.returns) == 1

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        x, centroids, *rest = flat
        if in_dims[1] is None:
            outputs = op(register.fold(x, in_dims[0], size, 0), centroids, *rest)
            split = [o.unflatten(0, (size, o.shape[0] // size)) for o in ((outputs,) if single else outputs)]
        else:
            each = [
                op(*(v.select(dim, i) if dim is not None else v for v, dim in zip(flat, in_dims, strict=True)))
                for i in range(size)
            ]
            split = [torch.stack(column) for column in zip(*([(o,) for o in each] if single else each), strict=True)]
        return (split[0], 0) if single else (tuple(split), (0,) * len(split))

    return rule


# ---- registration


def register_part(name: str, shapes: Callable[..., Any], check: Callable[..., None]) -> None:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, vmap_rule(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of="cluster_assign")
    backend.provide_module(name, __package__, check=check, part_of="cluster_assign", backends=("triton",))


register_part("nearest_cluster", nearest_cluster_shapes, check_nearest_cluster)
register_part("cluster_lists", cluster_lists_shapes, check_cluster_lists)

SCHEMA = (
    "cluster_assign(Tensor x, Tensor centroids, SymInt size, *, str mode='balanced') -> (Tensor index, Tensor nearest)"
)


def check(x: Tensor, centroids: Tensor, size: int, *, mode: str = "balanced") -> None:
    op = "cluster_assign"
    check_clusters(op, x, centroids, grouped=False)
    room.check_at_least(op, "size", size, 1)
    room.check_choice(op, "mode", mode, MODES)


def composed(x: Tensor, centroids: Tensor, size: int, *, mode: str = "balanced") -> tuple[Tensor, Tensor]:
    return ops.cluster_lists(x.detach(), centroids.detach(), size, mode)


register.register_composite(
    SCHEMA, composed, reference=reference.cluster_assign, check=check, cast=(), parts=("cluster_lists",)
)


def cluster_assign(x: Tensor, centroids: Tensor, size: int, *, mode: str = "balanced") -> tuple[Tensor, Tensor]:
    """Tokens by cluster: the nearest centroid of each, and a list of tokens for each.

        nearest_t = argmax_c <x_t, mu_c>

    Balanced: list c is the `min(size, T)` tokens of the largest <x_t, mu_c> in the whole sequence. A token may be in
    several lists or in none, and a later token can displace an earlier one: attention over such lists depends on the
    future, even under a causal mask. Causal: list c is the first `size` tokens, in time, whose nearest cluster is c.
    Whether a token is listed then depends on it and on earlier ones alone.

    Scores are float32 (of float64 tokens float64). Of equal ones the lower cluster or token counts as the larger; NaN
    counts as larger than all. Neither result has a gradient.

    Args:
        x: [B, T, H, D]: float32, float64, bfloat16 or float16, any strides.
        centroids: [H, K, D], in the dtype of x or, where that has 16 bits, in float32.
        size: entries of a list, 1 or more.
        mode: "balanced" or "causal".

    Returns:
        index [B, H, K, size], ascending, -1 at the ends of lists that have fewer; and nearest [B, T, H]; both int32.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a forced backend cannot serve the call.

    Memory: in mode "balanced" the scores [K, T] of one head a thread, on a GPU [B, H, K, T] of them.

    Example:
        >>> tokens = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [0.1, 0.9]])
        >>> index, nearest = seqops.cluster_assign(tokens.view(1, 4, 1, 2), torch.eye(2)[None], 3, mode="causal")
        >>> nearest.flatten().tolist(), index.view(2, 3).tolist()
        ([0, 1, 0, 1], [[0, 2, -1], [1, 3, -1]])

    Roy, Saffar, Vaswani and Grangier, "Efficient content-based sparse attention with routing transformers", 2021.
    """
    return ops.cluster_assign(x, centroids, size, mode=mode)
