"""Attention over sparse patterns: chunks, windows, blocks, summaries, clusters, selected queries."""

from .op import range_attention
from .op_block_diffusion_attention import block_diffusion_attention
from .op_chunked_attention import chunked_attention
from .op_cluster_assign import cluster_assign
from .op_combiner_attention import combiner_attention
from .op_delta_attention import delta_attention
from .op_gathered_attention import gathered_attention
from .op_merge_attention import merge_attention
from .op_pointer_scores import pointer_scores
from .op_prob_sparse_attention import prob_sparse_attention
from .op_routing_attention import routing_attention
from .op_update_centroids import update_centroids
from .op_window_attention import window_attention

__all__ = [
    "block_diffusion_attention",
    "chunked_attention",
    "cluster_assign",
    "combiner_attention",
    "delta_attention",
    "gathered_attention",
    "merge_attention",
    "pointer_scores",
    "prob_sparse_attention",
    "range_attention",
    "routing_attention",
    "update_centroids",
    "window_attention",
]
