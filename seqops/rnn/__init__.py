"""Recurrent networks: LSTM, GRU, sLSTM and Elman's."""

from . import cpu, op, reference
from .op import elman, gru, lstm, slstm

__all__ = ["elman", "gru", "lstm", "slstm"]

for _name in __all__:
    op.provide_reference(_name, getattr(reference, _name))
cpu.connect()
