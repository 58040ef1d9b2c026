"""Modules: torch.nn's recurrent networks and more, computed by seqops' operators."""

from seqops.nn.aaren import Aaren
from seqops.nn.convert import convert
from seqops.nn.lru import LRU
from seqops.nn.memory import NeuralMemory
from seqops.nn.min_rnn import MinGRU, MinLSTM
from seqops.nn.parts import parameter_groups
from seqops.nn.rnn import GRU, LSTM, RNN, SLSTM
from seqops.nn.s4d import S4D
from seqops.nn.streaming import Streaming, detach

__all__ = [
    "LSTM",
    "GRU",
    "RNN",
    "SLSTM",
    "Aaren",
    "LRU",
    "MinGRU",
    "MinLSTM",
    "NeuralMemory",
    "S4D",
    "Streaming",
    "convert",
    "detach",
    "parameter_groups",
]
