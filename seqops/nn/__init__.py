"""Modules: torch.nn's recurrent networks and more, computed by seqops' operators."""

from seqops.nn.convert import convert
from seqops.nn.parts import parameter_groups
from seqops.nn.rnn import GRU, LSTM, RNN, SLSTM
from seqops.nn.streaming import Streaming, detach

__all__ = [
    "LSTM",
    "GRU",
    "RNN",
    "SLSTM",
    "Streaming",
    "convert",
    "detach",
    "parameter_groups",
]
