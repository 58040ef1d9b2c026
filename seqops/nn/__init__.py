"""Modules: torch.nn's recurrent networks and more, computed by seqops' operators."""

from seqops.nn.aaren import Aaren
from seqops.nn.atlas import Atlas, OmegaNet
from seqops.nn.birdie import Birdie
from seqops.nn.block_diffusion import BlockDiffusionAttention
from seqops.nn.combiner import Combiner
from seqops.nn.conv_s5 import ConvS5
from seqops.nn.convert import convert
from seqops.nn.delta import DeltaAttention
from seqops.nn.gla import GLA
from seqops.nn.hgrn import HGRN
from seqops.nn.informer import Informer
from seqops.nn.lact import LaCT
from seqops.nn.lightnet import LightNet, LightNetGrid
from seqops.nn.lmu import LMU, LMUFormer
from seqops.nn.longformer import Longformer, Recformer
from seqops.nn.lru import LRU
from seqops.nn.lssl import LSSL
from seqops.nn.mamba2 import Mamba2
from seqops.nn.mega import MegaAttention
from seqops.nn.mega_ema import MegaEMA
from seqops.nn.memory import NeuralMemory
from seqops.nn.min_rnn import MinGRU, MinLSTM
from seqops.nn.parts import parameter_groups
from seqops.nn.plstm import PLSTM1d, PLSTM2d
from seqops.nn.pointer_network import PointerNetwork
from seqops.nn.prefix_linear_attention import PrefixLinearAttention
from seqops.nn.prob_sparse_attention import ProbSparseAttention
from seqops.nn.retnet import RetNet
from seqops.nn.rg_lru import RGLRU, GriffinBlock
from seqops.nn.rnn import GRU, LSTM, RNN, SLSTM
from seqops.nn.routing import RoutingAttention
from seqops.nn.s4 import S4
from seqops.nn.s4d import S4D
from seqops.nn.s5 import S5
from seqops.nn.streaming import Streaming, detach
from seqops.nn.tcnca import TCNCA
from seqops.nn.titans import TitansMAC, TitansMAG, TitansMAL
from seqops.nn.ttt import TTTMLP, TTTLinear

__all__ = [
    "LSTM",
    "GRU",
    "RNN",
    "SLSTM",
    "Aaren",
    "Atlas",
    "Birdie",
    "BlockDiffusionAttention",
    "Combiner",
    "ConvS5",
    "DeltaAttention",
    "GLA",
    "GriffinBlock",
    "HGRN",
    "Informer",
    "LaCT",
    "LightNet",
    "LightNetGrid",
    "LMU",
    "LMUFormer",
    "Longformer",
    "LRU",
    "LSSL",
    "Mamba2",
    "MegaAttention",
    "MegaEMA",
    "MinGRU",
    "MinLSTM",
    "NeuralMemory",
    "OmegaNet",
    "PLSTM1d",
    "PLSTM2d",
    "PointerNetwork",
    "PrefixLinearAttention",
    "ProbSparseAttention",
    "Recformer",
    "RetNet",
    "RGLRU",
    "RoutingAttention",
    "S4",
    "S4D",
    "S5",
    "Streaming",
    "TCNCA",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TTTLinear",
    "TTTMLP",
    "convert",
    "detach",
    "parameter_groups",
]
