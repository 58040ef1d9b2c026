"""Operators of the room under the backend "triton", and a list of their kernels, which the tests compile offline."""

from __future__ import annotations

from typing import Any

from . import (
    triton_cluster_assign,
    triton_combiner_attention,
    triton_configurations_range_attention,
    triton_delta_attention,
    triton_gathered_attention,
    triton_merge_attention,
    triton_pointer_scores,
    triton_prob_sparse_attention,
)
from .triton_cluster_assign import cluster_lists, nearest_cluster
from .triton_combiner_attention import running_pool, running_pool_backward, span_summaries, span_summaries_backward
from .triton_delta_attention import held_keys, held_keys_backward
from .triton_gathered_attention import (
    counting_sort,
    gather_rows,
    gather_rows_backward,
    reduce_slots,
    reduce_slots_backward,
)
from .triton_merge_attention import merge_attention, merge_attention_backward
from .triton_pointer_scores import pointer_scores, pointer_scores_backward, pointer_scores_forward
from .triton_prob_sparse_attention import prob_sparse_fill, prob_sparse_fill_backward, prob_sparse_rows
from .triton_range_attention import range_attention, range_attention_backward

__all__ = [
    "cluster_lists",
    "configurations",
    "counting_sort",
    "gather_rows",
    "gather_rows_backward",
    "held_keys",
    "held_keys_backward",
    "merge_attention",
    "merge_attention_backward",
    "nearest_cluster",
    "pointer_scores",
    "pointer_scores_backward",
    "pointer_scores_forward",
    "prob_sparse_fill",
    "prob_sparse_fill_backward",
    "prob_sparse_rows",
    "range_attention",
    "range_attention_backward",
    "reduce_slots",
    "reduce_slots_backward",
    "running_pool",
    "running_pool_backward",
    "span_summaries",
    "span_summaries_backward",
]

PARTS = (
    triton_cluster_assign,
    triton_combiner_attention,
    triton_configurations_range_attention,
    triton_delta_attention,
    triton_gathered_attention,
    triton_merge_attention,
    triton_pointer_scores,
    triton_prob_sparse_attention,
)


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    return [configuration for part in PARTS for configuration in part.configurations()]
