"""Modules: torch.nn's recurrent networks and more, computed by seqops' operators."""

from seqops.nn.aaren import Aaren
from seqops.nn.birdie import Birdie
from seqops.nn.conv_s5 import ConvS5
from seqops.nn.convert import convert
from seqops.nn.hgrn import HGRN
from seqops.nn.informer import Informer
from seqops.nn.lact import LaCT
from seqops.nn.lru import LRU
from seqops.nn.lssl import LSSL
from seqops.nn.mega_ema import MegaEMA
from seqops.nn.memory import NeuralMemory
from seqops.nn.min_rnn import MinGRU, MinLSTM
from seqops.nn.parts import parameter_groups
from seqops.nn.plstm import PLSTM1d, PLSTM2d
from seqops.nn.prob_sparse_attention import ProbSparseAttention
from seqops.nn.rg_lru import RGLRU, GriffinBlock
from seqops.nn.rnn import GRU, LSTM, RNN, SLSTM
from seqops.nn.s4 import S4
from seqops.nn.s4d import S4D
from seqops.nn.s5 import S5
from seqops.nn.streaming import Streaming, detach
from seqops.nn.titans import TitansMAC, TitansMAG, TitansMAL

__all__ = [
    "LSTM",
    "GRU",
    "RNN",
    "SLSTM",
    "Aaren",
    "Birdie",
    "ConvS5",
    "GriffinBlock",
    "HGRN",
    "Informer",
    "LaCT",
    "LRU",
    "LSSL",
    "MegaEMA",
    "MinGRU",
    "MinLSTM",
    "NeuralMemory",
    "PLSTM1d",
    "PLSTM2d",
    "ProbSparseAttention",
    "RGLRU",
    "S4",
    "S4D",
    "S5",
    "Streaming",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "convert",
    "detach",
    "parameter_groups",
]
