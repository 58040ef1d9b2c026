"""Fast sequence operators for PyTorch: `torch.ops.seqops.*`, the same as documented functions, and modules."""

from importlib.util import find_spec

import torch  # noqa: F401  the extension finds its symbols in the libraries that this loads

if find_spec("seqops._C") is None:
    raise ImportError(
        "seqops._C is not built for this Python and torch; build it with: "
        "pip install --no-build-isolation -e .  (or: make build)"
    )

from . import _C, nn  # noqa: F401  _C registers torch.ops.seqops
from .conv import causal_conv1d, fft_conv
from .core.backend import backend, read_environment
from .linear_attention import linear_attention
from .rnn import elman, gru, lstm, slstm
from .scan import grid_scan, linear_scan, softmax_scan
from .ssm import cauchy_kernel, conv_ssm, ssm_kernel

read_environment()

__version__ = "0.1.0"
__all__ = [
    "backend",
    "cauchy_kernel",
    "causal_conv1d",
    "conv_ssm",
    "elman",
    "fft_conv",
    "grid_scan",
    "gru",
    "linear_attention",
    "linear_scan",
    "lstm",
    "nn",
    "slstm",
    "softmax_scan",
    "ssm_kernel",
]
