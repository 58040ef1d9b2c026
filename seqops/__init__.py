"""Fast sequence operators for PyTorch: `torch.ops.seqops.*`, the same as documented functions, and modules."""

from importlib.util import find_spec

import torch  # noqa: F401  the extension finds its symbols in the libraries that this loads

if find_spec("seqops._C") is None:
    raise ImportError(
        "seqops._C is not built for this Python and torch; build it with: "
        "pip install --no-build-isolation -e .  (or: make build)"
    )

from . import _C, nn  # noqa: F401  _C registers torch.ops.seqops
from .attention import (
    block_diffusion_attention,
    chunked_attention,
    cluster_assign,
    combiner_attention,
    delta_attention,
    gathered_attention,
    merge_attention,
    pointer_scores,
    prob_sparse_attention,
    range_attention,
    routing_attention,
    update_centroids,
    window_attention,
)
from .conv import causal_conv1d, fft_conv
from .core.backend import backend, read_environment
from .linear_attention import linear_attention
from .rnn import elman, gru, lstm, slstm
from .scan import grid_scan, linear_scan, softmax_scan
from .ssm import cauchy_kernel, conv_ssm, ssm_kernel
from .ttt import large_chunk_ttt, neural_memory, newton_schulz

read_environment()

__version__ = "0.1.0"
__all__ = [
    "backend",
    "block_diffusion_attention",
    "cauchy_kernel",
    "causal_conv1d",
    "chunked_attention",
    "cluster_assign",
    "combiner_attention",
    "conv_ssm",
    "delta_attention",
    "elman",
    "fft_conv",
    "gathered_attention",
    "grid_scan",
    "gru",
    "large_chunk_ttt",
    "linear_attention",
    "linear_scan",
    "lstm",
    "merge_attention",
    "neural_memory",
    "newton_schulz",
    "nn",
    "prob_sparse_attention",
    "range_attention",
    "routing_attention",
    "pointer_scores",
    "slstm",
    "softmax_scan",
    "ssm_kernel",
    "update_centroids",
    "window_attention",
]
