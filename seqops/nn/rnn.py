"""Recurrent modules: constructor, forward, state_dict and PackedSequence of torch.nn's, computed by seqops' operators.

Letters: B batch, T time, H heads, D units of a head (hidden_size / num_heads), G gates, L layers, N directions.

The input projection of a layer is one matrix product over all its steps, with `bias_ih`; `bias_hh` and the recurrence
are the operator's. Time-major input stays so: the operator takes the transposed view of its projection, and lays out
the output, and in the backward the gradient, in the same order.

The modules do not derive from torch.nn.LSTM and its kin, because torch.compile refuses all instances of those. Nor do
they keep torch.nn.RNNBase's list of flat weights, which goes stale when a weight is replaced: a weight is an attribute,
read anew in every forward.
"""

import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from .projection import project

State = Tensor | tuple[Tensor, ...]

# For each layer and direction weight_ih, weight_hh, bias_ih, bias_hh, weight_hr; None for those that a module lacks.
Weights = list[list[Tensor | None]]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def autocasts(device: torch.device) -> bool:
    """Whether matrix products on `device` choose their own dtype now."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def add_to_first_step(wx: Tensor, addend: Tensor, lengths: Tensor | None, reverse: bool) -> Tensor:
    """wx [B, T, G, H, D] with addend [B, G * H * D] added to the step that each row runs first; T >= 1."""
    B, T, G, H, D = wx.shape
    addend = addend.view(B, G, H, D)
    if reverse and lengths is not None:
        return wx.index_put((torch.arange(B, device=wx.device), lengths - 1), addend, accumulate=True)
    first = T - 1 if reverse else 0
    return wx.select_scatter(wx.select(1, first) + addend, 1, first)


class RNNBase(torch.nn.Module):
    """What the four modules share.

    Args:
        input_size: features of the input.
        hidden_size: units of a layer, all heads together.
        num_layers: layers, each reading the outputs of the one before.
        bias: whether there are `bias_ih` and `bias_hh`.
        batch_first: input and output are [B, T, features], else [T, B, features]; states are the same for both.
        dropout: probability with which, in training, an output of a layer other than the last becomes zero.
        bidirectional: each layer also runs from the last step to the first; the two outputs are concatenated.
        device, dtype: of the parameters.
        num_heads: the recurrence is block-diagonal, a unit sees the D units of its own head: `weight_hh_l{k}` is
            [G * hidden_size, D], its rows ordered by gate, head, unit.
        recompute: keep only the inputs of each layer for the backward, which then runs the layer's forward again.
        proj_size: LSTM only.

    Raises:
        TypeError, ValueError: an argument has a wrong type or value.

    Memory: while a layer runs, its input projection, G values per unit and step; for the backward the input of each
    layer, and without `recompute` what the operator keeps.
    """

    mode: str
    gates: ClassVar[int]
    states: ClassVar[tuple[str, ...]]
    # Whether 16-bit modules return the float32 states of the operator; those of torch.nn have the dtype of the output.
    exact_states: ClassVar[bool] = False
    # The recurrence.
    _operator: Callable[..., tuple[Tensor, ...]]
    # What modules made by `convert` have, and modules saved before the option existed.
    num_heads: int = 1
    recompute: bool = False
    proj_size: int = 0

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        recompute: bool = False,
        proj_size: int = 0,
    ) -> None:
        super().__init__()
        self.input_size = input_size
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.bias = bias
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        self.num_heads = num_heads
        self.recompute = recompute
        self.proj_size = proj_size
        self._check_options()
        self.dropout = float(dropout)

        # The names, shapes and order of torch.nn's: checkpoints depend on them, and the numbers that a seed gives.
        rows, outputs = self.gates * hidden_size, proj_size or hidden_size
        for index, names in enumerate(self._name_weights()):
            features = input_size if index < self._directions else outputs * self._directions
            shapes = ((rows, features), (rows, outputs // num_heads), (rows,), (rows,), (proj_size, hidden_size))
            for name, shape in zip(names, shapes, strict=True):
                if name is not None:
                    setattr(self, name, torch.nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    def _name_weights(self) -> list[tuple[str | None, ...]]:
        """Names of weight_ih, weight_hh, bias_ih, bias_hh, weight_hr for each layer and direction, None if absent."""
        bias, projection = self.bias, self.proj_size > 0
        kinds = {"weight_ih": True, "weight_hh": True, "bias_ih": bias, "bias_hh": bias, "weight_hr": projection}
        suffixes = [
            f"l{layer}{way}" for layer in range(self.num_layers) for way in ("", "_reverse")[: self._directions]
        ]
        self._names = [tuple(f"{kind}_{suffix}" if on else None for kind, on in kinds.items()) for suffix in suffixes]
        return self._names

    def reset_parameters(self) -> None:
        """Draws every parameter uniformly from ±1 / sqrt(hidden_size), as torch.nn's modules do."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)

    def flatten_parameters(self) -> None:
        """Does nothing: weights need not lie together. Code written for torch.nn's modules calls it."""

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """The weights of each layer and direction, in the order of `state_dict`."""
        return [[weight for weight in weights if weight is not None] for weights in self._weights()]

    def extra_repr(self) -> str:
        defaults = {
            "proj_size": 0,
            "num_layers": 1,
            "bias": True,
            "batch_first": False,
            "dropout": 0,
            "bidirectional": False,
            "num_heads": 1,
            "recompute": False,
        }
        options = ((name, getattr(self, name), default) for name, default in defaults.items())
        changed = [f"{name}={value}" for name, value, default in options if value != default]
        return ", ".join([f"{self.input_size}, {self.hidden_size}", *changed])

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """Runs the layers over a sequence.

        Args:
            input: [T, B, input_size], or [B, T, input_size] with batch_first, or [T, input_size], or a PackedSequence.
            hx: initial states [L * N, B, hidden_size], without the B where the input has none: one tensor for modules
                with one state, else a tuple. With projections h is [L * N, B, proj_size]. Dtype of the input, or
                float32 where that has 16 bits. None: zeros (the m of SLSTM: -inf).

        Returns:
            The outputs of the last layer, in the form and layout of the input with N * hidden_size (or N * proj_size)
            features, and the final states in the form of `hx`: give them to the next call to go on with the sequence.

        Raises:
            ValueError: input or hx has a wrong shape, device or dtype.
        """
        initial = self._unpack_state(hx)
        weights = self._weights()
        if isinstance(input, PackedSequence):
            output, final = self._run_packed(input, initial, weights)
        else:
            if input.dim() not in (2, 3):
                self._refuse("input", "2 or 3 dimensions", f"shape {list(input.shape)}")
            if input.dim() == 3:
                self._check(input, initial, (input.shape[0 if self.batch_first else 1],), weights)
                output, final = self._run(input, initial, weights, self.batch_first)
            else:
                self._check(input, initial, (), weights)
                if initial is not None:
                    initial = tuple(state[:, None] for state in initial)
                output, final = self._run(input[None], initial, weights, batch_first=True)
                output, final = output[0], tuple(state[:, 0] for state in final)
        return output, final if len(self.states) > 1 else final[0]

    def _run_packed(
        self, packed: PackedSequence, initial: tuple[Tensor, ...] | None, weights: Weights
    ) -> tuple[PackedSequence, tuple[Tensor, ...]]:
        """Runs over a right-padded copy. Sequences keep their packed order; states have, and get, the caller's."""
        data, sizes, sorted_indices, unsorted_indices = packed
        if data.dim() != 2:
            self._refuse("input.data", "2 dimensions", f"shape {list(data.shape)}")
        # Sizes lie on the CPU: no other device is waited for.
        batch, time = int(sizes[0]), len(sizes)
        self._check(data, initial, (batch,), weights)
        step = torch.repeat_interleave(sizes)
        sequence = torch.arange(len(step)) - (sizes.cumsum(0) - sizes)[step]
        position = (step * batch + sequence).to(data.device)
        lengths = (sizes > torch.arange(batch)[:, None]).sum(1).to(data.device)
        # Zeros, because a NaN in the padding would reach the gradient of weight_ih as 0 * NaN.
        x = data.new_zeros(time * batch, self.input_size).index_copy_(0, position, data)
        if initial is not None and sorted_indices is not None:
            initial = tuple(state.index_select(1, sorted_indices) for state in initial)
        output, final = self._run(x.view(time, batch, -1), initial, weights, batch_first=False, lengths=lengths)
        if unsorted_indices is not None:
            final = tuple(state.index_select(1, unsorted_indices) for state in final)
        output = output.flatten(0, 1).index_select(0, position)
        return PackedSequence(output, sizes, sorted_indices, unsorted_indices), final

    def _run(
        self,
        x: Tensor,
        initial: tuple[Tensor, ...] | None,
        weights: Weights,
        batch_first: bool,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x [T, B, ..] or [B, T, ..], initial states [L * N, B, ..], lengths [B] -> outputs as x, final states."""
        # For each layer and direction its states [1, B, ..]. Where T is 1 every view counts.
        single, final = len(weights) == 1, []
        if single or initial is None:
            given = [initial or ()] * len(weights)
        else:
            given = list(zip(*[state.split(1) for state in initial], strict=True))
        for layer in range(self.num_layers):
            if layer and self.training and self.dropout:
                x = functional.dropout(x, self.dropout)
            outputs = []
            for reverse in (False, True)[: self._directions]:
                arguments = (x, weights[len(final)], given[len(final)], batch_first, lengths, reverse)
                if self.recompute and torch.is_grad_enabled():
                    h, *states = checkpoint(
                        self._run_direction, *arguments, use_reentrant=False, preserve_rng_state=False
                    )
                else:
                    h, *states = self._run_direction(*arguments)
                outputs.append(h)
                final.append(states)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return x, tuple(final[0] if single else [torch.cat(states) for states in zip(*final, strict=True)])

    def _run_direction(
        self,
        x: Tensor,
        weights: list[Tensor | None],
        states: tuple[Tensor, ...],
        batch_first: bool,
        lengths: Tensor | None,
        reverse: bool,
    ) -> tuple[Tensor, ...]:
        """One layer in one direction: x as in `_run`, initial states [1, B, ..] -> outputs as x, and final states."""
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = weights
        G, H, D = self.gates, self.num_heads, self.hidden_size // self.num_heads
        # Of a contiguous x linear adds the bias inside the matrix product, else in a pass of its own.
        outer, inner, _ = x.shape
        wx = project(x.contiguous(), weight_ih, bias_ih).view(outer, inner, G, H, D)
        if not batch_first:
            wx = wx.transpose(0, 1)
        B, T = (outer, inner) if batch_first else (inner, outer)
        projected = None
        if weight_hr is not None:
            # With h = P h', P = weight_hr, the recurrence R h is the plain one of h' with R P for its weights. Only h0
            # is given projected: what R makes of it joins the input of the first step.
            if states:
                projected, *rest = states
                states = (None, *rest)
                if T:
                    wx = add_to_first_step(wx, functional.linear(projected.to(wx.dtype), weight_hh), lengths, reverse)
            weight_hh = weight_hh @ weight_hr
        r = weight_hh.reshape(G, H, D, D)
        b = None if bias_hh is None else bias_hh.reshape(G, H, D)
        states = [None if state is None else state.reshape(B, H, D) for state in states]
        # Giving options takes one microsecond; the operator takes ten for a small step.
        options = {"lengths": lengths, "reverse": reverse} if reverse or lengths is not None else {}
        h, *final = self._operator(wx, r, b, *states, **options)
        if not batch_first:
            h = h.transpose(0, 1)
        # Contiguous as torch.nn's, because callers write output.view(T * B, ..).
        h = h.reshape(outer, inner, self.hidden_size).contiguous()
        final = [state.reshape(1, B, self.hidden_size) for state in final]
        if final[0].dtype != h.dtype and not self.exact_states:
            final = [state.to(h.dtype) for state in final]
        if weight_hr is not None:
            h = functional.linear(h, weight_hr)
            # Where no step ran h0 is still the state, and its h' is not known.
            final[0] = functional.linear(final[0], weight_hr) if T or projected is None else projected.to(h.dtype)
        return h, *final

    def _weights(self) -> Weights:
        """The weights as they are now, each read once, because a parametrization computes it anew."""
        parameters = self._parameters
        return [
            [
                None if name is None else parameters[name] if name in parameters else getattr(self, name)
                for name in names
            ]
            for names in self._names
        ]

    @property
    def _directions(self) -> int:
        return 2 if self.bidirectional else 1

    def _unpack_state(self, hx: State | None) -> tuple[Tensor, ...] | None:
        if hx is None:
            return None
        if len(self.states) == 1:
            if not isinstance(hx, Tensor):
                self._refuse("hx", "a tensor", type(hx).__name__)
            return (hx,)
        if not isinstance(hx, (tuple, list)) or len(hx) != len(self.states):
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            self._refuse("hx", f"a tuple of {len(self.states)} tensors ({', '.join(self.states)})", got)
        return tuple(hx)

    def _check(self, x: Tensor, initial: tuple[Tensor, ...] | None, batch: tuple[int, ...], weights: Weights) -> None:
        """x [.., input_size]; initial states [L * N, *batch, ..]."""
        if x.shape[-1] != self.input_size:
            self._refuse("input", f"input_size = {self.input_size} features", f"shape {list(x.shape)}")
        dtype, device = weights[0][0].dtype, weights[0][0].device
        if x.device != device:
            self._refuse("input", f"the weights' device {device}", str(x.device))
        if x.dtype != dtype and not autocasts(device):
            self._refuse("input", f"the weights' dtype {dtype_name(dtype)}", dtype_name(x.dtype))
        if initial is None:
            return
        accepted = (dtype, torch.float32) if dtype.itemsize == 2 else (dtype,)
        for index, (name, state) in enumerate(zip(self.states, initial, strict=True)):
            argument = f"hx[{index}]" if len(self.states) > 1 else "hx"
            features = self.proj_size if name == "h" and self.proj_size else self.hidden_size
            expected = (self.num_layers * self._directions, *batch, features)
            if state.shape != expected:
                form = "[num_layers * directions, B, features]" if batch else "[num_layers * directions, features]"
                self._refuse(argument, f"{form} = {list(expected)}", f"{list(state.shape)}")
            if state.device != device:
                self._refuse(argument, f"the weights' device {device}", str(state.device))
            if state.dtype not in accepted and not autocasts(device):
                self._refuse(argument, " or ".join(map(dtype_name, accepted)), dtype_name(state.dtype))

    def _check_options(self) -> None:
        sizes = ("input_size", "hidden_size", "num_layers", "num_heads")
        for kind, names in ((int, (*sizes, "proj_size")), (bool, ("bias", "batch_first"))):
            for name in names:
                if not isinstance(getattr(self, name), kind):
                    got = type(getattr(self, name)).__name__
                    raise TypeError(f"{type(self).__name__}: {name}: expected {kind.__name__}, got {got}")
        for name in sizes:
            if getattr(self, name) < 1:
                self._refuse(name, "at least 1", getattr(self, name))
        if self.hidden_size % self.num_heads:
            self._refuse("num_heads", f"a divisor of hidden_size = {self.hidden_size}", self.num_heads)
        if isinstance(self.dropout, bool) or not isinstance(self.dropout, Real) or not 0 <= self.dropout <= 1:
            self._refuse("dropout", "a number in [0, 1]", self.dropout)
        if self.dropout and self.num_layers == 1:
            warnings.warn(
                f"{type(self).__name__}: dropout={self.dropout} does nothing: it acts between layers, and there is one",
                stacklevel=3,
            )
        if self.proj_size and not isinstance(self, LSTM):
            self._refuse("proj_size", "0, since only LSTM has projections", self.proj_size)
        if not 0 <= self.proj_size < self.hidden_size:
            self._refuse("proj_size", f"0 or less than hidden_size = {self.hidden_size}", self.proj_size)
        if self.proj_size and self.num_heads > 1:
            reason = "a projection would mix the heads that the recurrence keeps apart"
            self._refuse("proj_size", f"0 with num_heads = {self.num_heads} ({reason})", self.proj_size)

    def _refuse(self, argument: str, expected: str, got: object) -> NoReturn:
        raise ValueError(f"{type(self).__name__}: {argument}: expected {expected}, got {got}")


class LSTM(RNNBase):
    """torch.nn.LSTM, computed by `seqops.lstm`; state (h, c), gate rows i, f, g, o.

        i, f, o = sigmoid(p_i), sigmoid(p_f), sigmoid(p_o)    p = weight_ih x + bias_ih + weight_hh h + bias_hh
        c = f c + i tanh(p_g)
        h = o tanh(c), or weight_hr (o tanh(c)) with proj_size > 0

    Constructor, forward, state_dict, initial weights and PackedSequence are torch.nn.LSTM's, and checkpoints of either
    load into the other; `num_heads` and `recompute` are added. Arguments, returns and errors: RNNBase.

    With projections the recurrence runs over the unprojected h, with the weights `weight_hh weight_hr`.

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; projections: Sak et al., "Long short-term memory based
    recurrent neural network architectures for large vocabulary speech recognition", 2014.
    """

    mode = "LSTM"
    gates = 4
    states = ("h", "c")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            num_heads=num_heads,
            recompute=recompute,
            proj_size=proj_size,
        )

    _operator = torch.ops.seqops.lstm.default


class GRU(RNNBase):
    """torch.nn.GRU, computed by `seqops.gru`; state h, gate rows r, z, n.

        r, z = sigmoid(p_r), sigmoid(p_z)                     p = weight_ih x + bias_ih + weight_hh h + bias_hh
        n = tanh(wx_n + r (weight_hh h + bias_hh)_n)          wx = weight_ih x + bias_ih
        h = (1 - z) n + z h

    Constructor, forward, state_dict, initial weights and PackedSequence are torch.nn.GRU's, and checkpoints of either
    load into the other; `num_heads` and `recompute` are added. Arguments, returns and errors: RNNBase.

    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", 2014.
    """

    mode = "GRU"
    gates = 3
    states = ("h",)

    _operator = torch.ops.seqops.gru.default


class RNN(RNNBase):
    """torch.nn.RNN, computed by `seqops.elman`; state h.

        h = tanh(weight_ih x + bias_ih + weight_hh h + bias_hh), or max(.., 0) with nonlinearity "relu"

    Constructor, forward, state_dict, initial weights and PackedSequence are torch.nn.RNN's, and checkpoints of either
    load into the other; `num_heads` and `recompute` are added. Arguments, returns and errors: RNNBase.

    Elman, "Finding structure in time", 1990.
    """

    gates = 1
    states = ("h",)

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads: int = 1,
        recompute: bool = False,
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            self._refuse("nonlinearity", "'tanh' or 'relu'", repr(nonlinearity))
        super().__init__(
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device,
            dtype,
            num_heads=num_heads,
            recompute=recompute,
        )
        self.nonlinearity = nonlinearity

    @property
    def mode(self) -> str:
        return f"RNN_{self.nonlinearity.upper()}"

    def _operator(self, *arguments: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
        return torch.ops.seqops.elman.default(*arguments, nonlinearity=self.nonlinearity, **options)


class SLSTM(RNNBase):
    """The sLSTM cell in the same shape of module, computed by `seqops.slstm`; state (h, c, n, m), gate rows i, f, z, o.

        l = logsigmoid(p_f) + m                               p = weight_ih x + bias_ih + weight_hh h + bias_hh
        m = max(l, p_i)
        i, f = exp(p_i - m), exp(l - m)                       with the new m
        c = f c + i tanh(p_z)
        n = f n + i
        h = sigmoid(p_o) c / n

    Parameters have the names, shapes and initial distribution of an LSTM's. States of 16-bit modules are float32: m is
    the logarithm of a scale, and in 8 bits the weight of the past would be lost. Arguments, returns, errors: RNNBase.

    Beck et al., "xLSTM: Extended long short-term memory", 2024.
    """

    mode = "SLSTM"
    gates = 4
    states = ("h", "c", "n", "m")
    exact_states = True

    _operator = torch.ops.seqops.slstm.default
