"""update_centroids: checks, sums by cluster in a fixed order, and the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import register, validate
from . import op_cluster_assign as clusters
from . import reference

ops = torch.ops.seqops
PARTS = 32  # of the tokens: each is summed apart, then the parts in their order

SCHEMA = "update_centroids(Tensor centroids, Tensor x, Tensor nearest, *, float decay=0.999) -> Tensor"


def check(centroids: Tensor, x: Tensor, nearest: Tensor, *, decay: float = 0.999) -> None:
    op = "update_centroids"
    clusters.check_clusters(op, x, centroids, grouped=False)
    validate.check_device(op, "nearest", nearest, "x", x)
    validate.check_shape(op, "nearest", nearest, "[B, T, H]", x.shape[:3])
    validate.check_type(op, "nearest", nearest, (torch.int32, torch.int64))


def composed(centroids: Tensor, x: Tensor, nearest: Tensor, *, decay: float = 0.999) -> Tensor:
    heads, count, _ = centroids.shape
    real = validate.real_of(x.dtype)
    tokens = x.detach().to(real).flatten(0, 1).unsqueeze(0)  # [1, B T, H, D]
    clusters_of = nearest.flatten(0, 1).movedim(1, 0).long()  # [H, B T]
    steps = tokens.shape[1]
    part = torch.arange(steps, device=x.device) * PARTS // max(steps, 1)
    known = (clusters_of >= 0) & (clusters_of < count)
    places = torch.where(known, part * count + clusters_of, -1).unsqueeze(0)
    order, starts = ops.counting_sort(places, PARTS * count)
    sums = ops.gather_rows_backward(tokens, order, starts, heads).view(PARTS, count, heads, -1).sum(0)
    number = starts.diff(dim=-1).view(heads, PARTS, count).sum(1).unsqueeze(-1)
    old = centroids.detach().to(real)
    moved = decay * old + (1 - decay) * (sums.movedim(1, 0) / number.clamp(min=1))
    return torch.where(number > 0, moved, old).to(centroids.dtype)


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.update_centroids,
    check=check,
    cast=(),
    parts=("counting_sort", "gather_rows_backward"),
)


def update_centroids(centroids: Tensor, x: Tensor, nearest: Tensor, *, decay: float = 0.999) -> Tensor:
    """Moving averages of the tokens of each cluster: one step of online k-means.

        mu_c <- decay mu_c + (1 - decay) mean{x_t : nearest_t = c}

    The mean is over batch and time; a cluster without tokens stays as it is. Normalising x is the caller's. Call it
    after the step of the optimiser: no forward pass changes centroids.

    Args:
        centroids: [H, K, D], in the dtype of x or, where that has 16 bits, in float32, which keeps small steps.
        x: [B, T, H, D]: float32, float64, bfloat16 or float16, any strides.
        nearest: [B, T, H], int32 or int64, as `cluster_assign` gives it; tokens with an entry outside [0, K) are left
            out.
        decay: a number.

    Returns:
        The new centroids [H, K, D], without a gradient.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a forced backend cannot serve the call.

    Memory: x in float32, and 32 partial sums [K, H, D], which are added in a fixed order.

    Example:
        >>> centroids, x = torch.zeros(1, 2, 3), torch.ones(1, 4, 1, 3)
        >>> nearest = torch.zeros(1, 4, 1, dtype=torch.int32)  # all tokens are of cluster 0
        >>> seqops.update_centroids(centroids, x, nearest, decay=0.75)
        tensor([[[0.2500, 0.2500, 0.2500],
                 [0.0000, 0.0000, 0.0000]]])

    Roy, Saffar, Vaswani and Grangier, "Efficient content-based sparse attention with routing transformers", 2021.
    """
    return ops.update_centroids(centroids, x, nearest, decay=decay)
