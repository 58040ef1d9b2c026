"""What the benchmark of the recurrent networks runs: ours, torch.nn's modules, loops over time, and other libraries.

Letters: B batch, T time, H heads, D units of a head, G gates, I input features.

Operations count the recurrent and the input products only, forward once and backward twice. Bytes count each tensor
once for writing and once for reading: input, output, weights, and in training what the backward reads and writes.
Recurrent weights that do not fit a cache move more than that, once a step.

Inputs are drawn on the CPU, so that they are the same on every device.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.harness import TRAINING, Contender

State = tuple[Tensor, ...]

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
STATES = {"lstm": ("h_n", "c_n"), "gru": ("h_n",), "slstm": ("h_n", "c_n", "n_n", "m_n"), "elman": ("h_n",)}
# Values per step and unit that the backward reads besides the output.
SAVED = {"lstm": 5, "gru": 4, "slstm": 7, "elman": 0}
MODULES = {"lstm": "LSTM", "gru": "GRU", "elman": "RNN"}

LOOP = "step loop"
TUNED_LOOP = "step loop, tuned"
ALTERNATING = "alternating"
FLASHRNN = "flashrnn"


@dataclass(frozen=True)
class Shape:
    """Sizes of one case.

    Attributes:
        inputs: I, or None for an operator without input projection.
        ragged: rows have different lengths, from T down to T/4, as a PackedSequence.
        carried: an initial state is given, as in streaming.
    """

    op: str
    B: int
    T: int
    D: int
    H: int = 1
    inputs: int | None = None
    dtype: torch.dtype = torch.float32
    layers: int = 1
    directions: int = 1
    ragged: bool = False
    carried: bool = False

    def lengths(self, steps: int) -> Tensor:
        """[B] int64, falling from `steps` to a quarter of it."""
        return torch.linspace(steps, max(1, steps // 4), self.B).round().long()

    @property
    def letters(self) -> dict[str, int]:
        heads = {"H": self.H} if self.H > 1 else {}
        return {"B": self.B, "T": self.T, **heads, "D": self.D}


def count_flops(shape: Shape, mode: str) -> int:
    """Multiplications and additions of the products; see the module's text."""
    steps = int(shape.lengths(shape.T).sum()) if shape.ragged else shape.B * shape.T
    gates, units, total = GATES[shape.op], shape.D * shape.H, 0
    for layer in range(shape.layers):
        inputs = (shape.inputs or 0) if layer == 0 else units * shape.directions
        total += shape.directions * 2 * steps * gates * units * (shape.D + inputs)
    return total * (3 if mode == TRAINING else 1)


def count_bytes(shape: Shape, mode: str) -> int:
    """Bytes that must move, each tensor once a direction; see the module's text."""
    steps = int(shape.lengths(shape.T).sum()) if shape.ragged else shape.B * shape.T
    gates, units, total = GATES[shape.op], shape.D * shape.H, 0
    for layer in range(shape.layers):
        inputs = (shape.inputs or 0) if layer == 0 else units * shape.directions
        weights = shape.directions * gates * units * (shape.D + inputs + 2)
        # The projected input is written and read where a projection makes it, and otherwise only read.
        projected = shape.directions * steps * gates * units
        source = steps * inputs if inputs else 0
        output = shape.directions * steps * units
        forward = source + weights + projected * (2 if inputs else 1) + output
        saved = shape.directions * steps * units * SAVED[shape.op]
        # Backward: saved values and outputs read, their gradients read, those of projection, input, weights written.
        backward = saved + 2 * output + projected * (3 if inputs else 1) + 2 * source + 2 * weights
        total += forward + (saved + backward if mode == TRAINING else 0)
    return total * shape.dtype.itemsize


# --- modules --------------------------------------------------------------------------------------------------------


def module_tensors(shape: Shape, steps: int, device: str) -> tuple[torch.nn.RNNBase, Tensor, tuple[Tensor, ...] | None]:
    """torch.nn's module with its own initial weights, the input [B, steps, I], and the initial states or None."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(torch.nn, MODULES[shape.op])(
            shape.inputs, shape.D, shape.layers, batch_first=True, bidirectional=shape.directions == 2
        )
        x = torch.randn(shape.B, steps, shape.inputs)
        states = tuple(torch.randn(shape.layers * shape.directions, shape.B, shape.D) for _ in STATES[shape.op])
    converted = tuple(state.to(device, shape.dtype) for state in states) if shape.carried else None
    return module.to(device, shape.dtype), x.to(device, shape.dtype), converted


def run_module(
    shape: Shape, module: torch.nn.Module, x: Tensor, lengths: Tensor | None, state: object
) -> dict[str, Tensor]:
    """A call as a user writes it: packing and unpacking belong to it where rows have different lengths."""
    if lengths is None:
        h, last = module(x, state)
    else:
        packed, last = module(pack_padded_sequence(x, lengths, batch_first=True), state)
        h, _ = pad_packed_sequence(packed, batch_first=True)
    final = last if isinstance(last, tuple) else (last,)
    return {"h": h, **dict(zip(STATES[shape.op], final, strict=True))}


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN may multiply float32 with ten bits of mantissa; it may unless told otherwise."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def build_module(
    shape: Shape,
    ours: bool,
    steps: int,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    allow_tf32: bool = False,
) -> Contender:
    """seqops.nn's or torch.nn's module with the same weights and input, in `dtype` if it is not the shape's."""
    module, x, states = module_tensors(shape, steps, device)
    if dtype is not None:  # from the same, once rounded, numbers
        module, x = module.to(dtype), x.to(dtype)
        states = states and tuple(state.to(dtype) for state in states)
    if ours:
        import seqops

        weights = module.state_dict()
        module = getattr(seqops.nn, MODULES[shape.op])(
            shape.inputs, shape.D, shape.layers, batch_first=True, bidirectional=shape.directions == 2
        ).to(device, shape.dtype)
        module.load_state_dict(weights)
    x.requires_grad_()
    lengths = shape.lengths(steps) if shape.ragged else None
    # torch.nn.LSTM takes a pair, the others the tensor itself.
    state = states if states is None or len(states) > 1 else states[0]
    run = partial(run_module, shape, module, x, lengths, state)
    return Contender(run, {"x": x, **dict(module.named_parameters())}, partial(tf32, allow_tf32))


def build_module_reference(shape: Shape, steps: int, device: str = "cpu") -> Contender:
    """The same network in float64 from `seqops.rnn.reference`, layer by layer."""
    from seqops.rnn import reference

    module, x, states = module_tensors(shape, steps, device)
    x = x.double().requires_grad_()
    weights = {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}
    lengths = shape.lengths(steps).to(device) if shape.ragged else None
    gates, operator = GATES[shape.op], getattr(reference, shape.op)

    def run() -> dict[str, Tensor]:
        source, final = x, []
        for layer in range(shape.layers):
            outputs = []
            for direction, suffix in enumerate(("", "_reverse")[: shape.directions]):
                w, r, b_w, b_r = (
                    weights[f"{kind}_l{layer}{suffix}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
                )
                index = layer * shape.directions + direction
                given = [state[index, :, None].double() for state in states or ()]
                h, *last = operator(
                    (source @ w.T + b_w).view(shape.B, steps, gates, 1, shape.D),
                    r.view(gates, 1, shape.D, shape.D),
                    b_r.view(gates, 1, shape.D),
                    *given,
                    lengths=lengths,
                    reverse=direction == 1,
                )
                outputs.append(h.flatten(2))
                final.append([state.flatten(1) for state in last])
            source = torch.cat(outputs, -1)
        stacked = [torch.stack(states) for states in zip(*final, strict=True)]
        return {"h": source, **dict(zip(STATES[shape.op], stacked, strict=True))}

    return Contender(run, {"x": x, **weights})


def build_module_ruler(shape: Shape, steps: int, device: str = "cpu") -> Contender:
    """The same network of one layer in plain torch, every operation rounded to the storage dtype.

    In the form that seqops has too: the projection of all steps is stored, then come the steps.
    """
    assert shape.layers == shape.directions == 1 and not shape.ragged
    module, x, states = module_tensors(shape, steps, device)
    x.requires_grad_()
    gates = GATES[shape.op]
    w, r, b_w, b_r = (getattr(module, f"{kind}_l0") for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))

    def run() -> dict[str, Tensor]:
        wx = linear(x, w, b_w).view(shape.B, steps, gates, 1, shape.D)
        given = tuple(state[0, :, None] for state in states) if states else None
        h, *last = step_loop(shape.op, wx, r.view(gates, 1, shape.D, shape.D), b_r.view(gates, 1, shape.D), given)
        final = [state.transpose(0, 1) for state in last]  # [1, B, D], as modules have it
        return {"h": h.flatten(2), **dict(zip(STATES[shape.op], final, strict=True))}

    return Contender(run, {"x": x, **dict(module.named_parameters())})


# --- operators ------------------------------------------------------------------------------------------------------


def step_lstm(wx: Tensor, y: Tensor, state: State) -> State:
    """One step in plain torch; `wx`, `y` [B, G, H, D], states [B, H, D], `h` first. So the others."""
    _, c = state
    i, f, g, o = (wx + y).unbind(1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def step_gru(wx: Tensor, y: Tensor, state: State) -> State:
    (h,) = state
    r, z = torch.sigmoid(wx[:, :2] + y[:, :2]).unbind(1)
    n = torch.tanh(wx[:, 2] + r * y[:, 2])
    return (n + z * (h - n),)


def step_slstm(wx: Tensor, y: Tensor, state: State) -> State:
    _, c, n, m = state
    i, f, z, o = (wx + y).unbind(1)
    decayed = logsigmoid(f) + m
    m = torch.maximum(decayed, i)
    i = torch.exp(i - m)
    f = torch.exp(decayed - m)
    c = f * c + i * torch.tanh(z)
    n = f * n + i
    return torch.sigmoid(o) * c / n, c, n, m


def step_elman(wx: Tensor, y: Tensor, state: State) -> State:
    return (torch.tanh((wx + y)[:, 0]),)


STEPS = {"lstm": step_lstm, "gru": step_gru, "slstm": step_slstm, "elman": step_elman}


def initial_state(op: str, wx: Tensor) -> State:
    zeros = wx.new_zeros(wx.shape[0], *wx.shape[3:])
    if op == "slstm":
        return zeros, zeros, zeros, torch.full_like(zeros, -torch.inf)
    return (zeros,) * len(STATES[op])


def step_loop(op: str, wx: Tensor, r: Tensor, b: Tensor, state: State | None = None) -> tuple[Tensor, ...]:
    """The loop as the equations read, from zeros where no `state` is given: [B, H, D] each.

    `wx` [B, T, G, H, D], `r` [G, H, D, D], `b` [G, H, D].
    """
    state, outputs = state or initial_state(op, wx), []
    for t in range(wx.shape[1]):
        y = torch.einsum("ghoi,bhi->bgho", r, state[0]) + b
        state = STEPS[op](wx[:, t], y, state)
        outputs.append(state[0])
    return torch.stack(outputs, 1), *state


def tuned_step_loop(op: str, wx: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The same with one batched product a step from weights laid out once, and the input unbound once."""
    batch, _, gates, heads, units = wx.shape
    weights = r.permute(1, 3, 0, 2).reshape(heads, units, gates * units)
    bias = b.transpose(0, 1).reshape(heads, 1, gates * units)
    state, outputs = initial_state(op, wx), []
    for wx_t in wx.unbind(1):
        y = torch.baddbmm(bias, state[0].transpose(0, 1), weights)  # [H, B, G * D]
        state = STEPS[op](wx_t, y.view(heads, batch, gates, units).permute(1, 2, 0, 3), state)
        outputs.append(state[0])
    return torch.stack(outputs, 1), *state


def call_ours(op: str, wx: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    import seqops

    return getattr(seqops, op)(wx, r, b)


@contextmanager
def alternating(op: str) -> Iterator[None]:
    """Ours, step by step instead of in one kernel: no constants for the kernel means this. In every thread."""
    import seqops
    from seqops.core import choose

    with ExitStack() as entered:
        entered.enter_context(seqops.backend("cuda"))
        for direction in ("forward", "backward"):
            entered.enter_context(choose.forced(f"{op}.{direction}.cuda", {}))
        yield


def call_flashrnn(op: str, wx: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The fused kernels of the installed package, which pads the batch and starts from zero states."""
    dtype = str(wx.dtype).removeprefix("torch.")
    # [states, B, T, H, D] and the last step of it
    states, last = import_module("flashrnn").flashrnn(wx, r, b, function=op, backend="cuda_fused", dtype=dtype)
    return states[0], *last[:, :, 0].unbind(0)


def call_reference(op: str, wx: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    from seqops.rnn import reference

    return getattr(reference, op)(wx, r, b)


def build_operator(
    shape: Shape,
    function: Callable[..., tuple[Tensor, ...]],
    dtype: torch.dtype,
    steps: int,
    device: str = "cpu",
    within: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Contender:
    """One implementation of an operator on `wx` [B, steps, G, H, D]."""
    gates, generator = GATES[shape.op], torch.Generator().manual_seed(0)
    wx = torch.randn(shape.B, steps, gates, shape.H, shape.D, generator=generator)
    r = torch.randn(gates, shape.H, shape.D, shape.D, generator=generator) / shape.D**0.5
    b = torch.randn(gates, shape.H, shape.D, generator=generator) / 4
    rounded = {name: tensor.to(shape.dtype) for name, tensor in {"wx": wx, "r": r, "b": b}.items()}
    leaves = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in rounded.items()}

    def run() -> dict[str, Tensor]:
        return dict(zip(("h", *STATES[shape.op]), function(shape.op, *leaves.values()), strict=True))

    return Contender(run, leaves, within)
