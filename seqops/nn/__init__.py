"""Modules: torch.nn's recurrent networks and more, computed by seqops' operators."""

from seqops.nn.convert import convert
from seqops.nn.rnn import GRU, LSTM, RNN, SLSTM

__all__ = ["LSTM", "GRU", "RNN", "SLSTM", "convert"]
