"""Cases of the recurrent networks: LSTM, GRU, sLSTM, Elman.

Letters: B batch, T time, H heads, D units of a head, G gates, I input features.

Two kinds of case:

* **Modules** beside torch.nn's, from one `state_dict`, input projection included, `batch_first=True` on both sides.
* **Operators** with several heads or the sLSTM cell, which torch.nn lacks, beside two loops over time in plain PyTorch,
  without input projection on any side. `step loop` is written as the equations are, with one einsum a step and the
  step's input picked by index. `step loop, tuned` is the fastest eager form known to us: weights laid out once for one
  batched product, inputs unbound once. (Indexing costs in the backward pass: the gradient of each step is added to a
  zero tensor of the whole input's size.) Goals are set against the plain one; both are shown.

Operations count the recurrent and the input products only, forward once and backward twice. Bytes count each tensor
once for writing and once for reading: input, output, weights, and in training what the backward reads and writes.
Recurrent weights that do not fit a cache move more than that, once a step.

The goals were set on processors with AVX2. On later ones, this measures what such a processor would:

    export SEQOPS_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.harness import FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

GATES = {"lstm": 4, "gru": 3, "slstm": 4, "elman": 1}
STATES = {"lstm": ("h_n", "c_n"), "gru": ("h_n",), "slstm": ("h_n", "c_n", "n_n", "m_n"), "elman": ("h_n",)}
# Values per step and unit that the backward reads besides the output.
SAVED = {"lstm": 5, "gru": 4, "slstm": 7, "elman": 0}
MODULES = {"lstm": "LSTM", "gru": "GRU", "elman": "RNN"}

LOOP = "step loop"
TUNED_LOOP = "step loop, tuned"


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


def module_tensors(shape: Shape, steps: int) -> tuple[torch.nn.RNNBase, Tensor, tuple[Tensor, ...] | None]:
    """torch.nn's module with its own initial weights, the input [B, steps, I], and the initial states or None."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = getattr(torch.nn, MODULES[shape.op])(
            shape.inputs, shape.D, shape.layers, batch_first=True, bidirectional=shape.directions == 2
        )
        x = torch.randn(shape.B, steps, shape.inputs)
        states = tuple(torch.randn(shape.layers * shape.directions, shape.B, shape.D) for _ in STATES[shape.op])
    converted = tuple(state.to(shape.dtype) for state in states) if shape.carried else None
    return module.to(shape.dtype), x.to(shape.dtype), converted


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


def build_module(shape: Shape, ours: bool, steps: int) -> Contender:
    """seqops.nn's or torch.nn's module with the same weights and input."""
    module, x, states = module_tensors(shape, steps)
    if ours:
        import seqops

        weights = module.state_dict()
        module = getattr(seqops.nn, MODULES[shape.op])(
            shape.inputs, shape.D, shape.layers, batch_first=True, bidirectional=shape.directions == 2
        ).to(shape.dtype)
        module.load_state_dict(weights)
    x.requires_grad_()
    lengths = shape.lengths(steps) if shape.ragged else None
    # torch.nn.LSTM takes a pair, the others the tensor itself.
    state = states if states is None or len(states) > 1 else states[0]
    return Contender(partial(run_module, shape, module, x, lengths, state), {"x": x, **dict(module.named_parameters())})


def build_module_reference(shape: Shape, steps: int) -> Contender:
    """The same network in float64 from `seqops.rnn.reference`, layer by layer."""
    from seqops.rnn import reference

    module, x, states = module_tensors(shape, steps)
    x = x.double().requires_grad_()
    weights = {name: value.detach().double().requires_grad_() for name, value in module.named_parameters()}
    lengths = shape.lengths(steps) if shape.ragged else None
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


# --- operators ------------------------------------------------------------------------------------------------------

State = tuple[Tensor, ...]


def step_lstm(wx: Tensor, y: Tensor, state: State) -> State:
    """One step in plain torch; `wx`, `y` [B, G, H, D], states [B, H, D], `h` first. So the two below."""
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


STEPS = {"lstm": step_lstm, "gru": step_gru, "slstm": step_slstm}


def initial_state(op: str, wx: Tensor) -> State:
    zeros = wx.new_zeros(wx.shape[0], *wx.shape[3:])
    if op == "slstm":
        return zeros, zeros, zeros, torch.full_like(zeros, -torch.inf)
    return (zeros,) * len(STATES[op])


def step_loop(op: str, wx: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """The loop as the equations read. `wx` [B, T, G, H, D], `r` [G, H, D, D], `b` [G, H, D]."""
    state, outputs = initial_state(op, wx), []
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


def call_reference(op: str, wx: Tensor, r: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    from seqops.rnn import reference

    return getattr(reference, op)(wx, r, b)


def build_operator(
    shape: Shape, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, steps: int
) -> Contender:
    """One implementation of an operator on `wx` [B, steps, G, H, D]."""
    gates, generator = GATES[shape.op], torch.Generator().manual_seed(0)
    wx = torch.randn(shape.B, steps, gates, shape.H, shape.D, generator=generator)
    r = torch.randn(gates, shape.H, shape.D, shape.D, generator=generator) / shape.D**0.5
    b = torch.randn(gates, shape.H, shape.D, generator=generator) / 4
    leaves = {name: tensor.to(dtype).requires_grad_() for name, tensor in {"wx": wx, "r": r, "b": b}.items()}

    def run() -> dict[str, Tensor]:
        return dict(zip(("h", *STATES[shape.op]), function(shape.op, *leaves.values()), strict=True))

    return Contender(run, leaves)


# --- the table ------------------------------------------------------------------------------------------------------


def make_case(
    shape: Shape,
    note: str = "",
    forward: float | None = None,
    training: float | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    check_steps: int | None = None,
    causes: Mapping[str, str] | None = None,
) -> Case:
    """A row of the table.

    Args:
        note: what the shape does not say, for the name.
        forward, training: goals for the ratio of times, against torch.nn's module or the plain step loop.
        check_steps: T of the gradient check where the whole length would take too long.
        causes: mode -> why its goal is missed.
    """
    if shape.inputs is None:
        peer, title = LOOP, shape.op
        builders = {
            LOOP: partial(build_operator, shape, step_loop, shape.dtype),
            TUNED_LOOP: partial(build_operator, shape, tuned_step_loop, shape.dtype),
            OURS: partial(build_operator, shape, call_ours, shape.dtype),
            REFERENCE: partial(build_operator, shape, call_reference, torch.float64),
        }
    else:
        peer = title = f"nn.{MODULES[shape.op]}"
        builders = {
            peer: partial(build_module, shape, False),
            OURS: partial(build_module, shape, True),
            REFERENCE: partial(build_module_reference, shape),
        }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    goals = {FORWARD: forward, TRAINING: training}
    return Case(
        op=shape.op,
        name=" ".join(part for part in (title, precision, sizes, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: count_flops(shape, mode) for mode in modes},
        bytes={mode: count_bytes(shape, mode) for mode in modes},
        modes=modes,
        goals={(peer, mode): goal for mode, goal in goals.items() if goal is not None},
        causes={(peer, mode): cause for mode, cause in (causes or {}).items()},
        check_steps=check_steps,
    )


def module(op: str, batch: int, time: int, units: int, dtype: torch.dtype = torch.float32, **options: object) -> Shape:
    """A module whose input is as wide as its state."""
    return Shape(op, batch, time, units, inputs=units, dtype=dtype, **options)


BFLOAT16 = (
    "Where the processor multiplies bfloat16 itself (AVX512-BF16), torch does so as well as seqops, and both are near "
    "its rate. Without those instructions torch takes 4 to 9 times its float32 time: the goal was set against that."
)
DENSE = (
    "With AVX-512 torch's oneDNN runs the whole layer near this machine's matrix product rate at larger widths, so "
    "little is left to gain; the goal was set on a processor with AVX2. Of our step, the gradients of both weights "
    "still go through torch's BLAS product."
)
ONE_ROW = "With one row both sides stream the weights from the cache once a step."
DENSE_CAUSES = {FORWARD: DENSE, TRAINING: DENSE}
LOOP_CAUSES = {
    mode: "Activations take as long as the product at 64 units a head, and the goal's loop was slower than this one."
    for mode in (FORWARD, TRAINING)
}
BFLOAT16_CAUSES = {FORWARD: BFLOAT16, TRAINING: BFLOAT16}

# Where D is 768 the float64 reference takes tens of seconds for all steps.
LARGE = 32

CASES = [
    make_case(module("lstm", 16, 256, 128), forward=1.0, training=1.3, causes=DENSE_CAUSES),
    make_case(module("lstm", 16, 256, 256), forward=1.0, training=1.5, causes=DENSE_CAUSES),
    make_case(module("lstm", 16, 256, 768), forward=1.0, training=1.1, causes=DENSE_CAUSES, check_steps=LARGE),
    make_case(module("lstm", 1, 256, 128), forward=1.2, training=1.3, modes=(FORWARD, TRAINING, INFERENCE)),
    make_case(module("lstm", 1, 256, 768), forward=1.0, training=1.2, causes={TRAINING: ONE_ROW}, check_steps=LARGE),
    make_case(module("lstm", 16, 256, 128, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES),
    make_case(module("lstm", 16, 256, 256, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES),
    make_case(
        module("lstm", 16, 256, 768, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES, check_steps=LARGE
    ),
    make_case(module("lstm", 1, 256, 128, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES),
    make_case(
        module("lstm", 1, 256, 768, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES, check_steps=LARGE
    ),
    make_case(module("gru", 1, 256, 128), forward=2.5, training=5),
    make_case(module("gru", 1, 256, 768), forward=2, training=3.5, check_steps=LARGE),
    make_case(module("gru", 16, 256, 256), forward=1.8, training=1.8),
    make_case(Shape("slstm", 16, 256, 64, H=4), forward=10, training=19, causes=LOOP_CAUSES),
    make_case(Shape("gru", 16, 256, 64, H=4), forward=8, training=9, causes=LOOP_CAUSES),
    make_case(Shape("lstm", 16, 256, 64, H=4), forward=8, training=30, causes=LOOP_CAUSES),
    make_case(module("elman", 16, 256, 256)),
    make_case(module("lstm", 4, 64, 32)),
    make_case(module("lstm", 16, 256, 128, layers=2, directions=2, ragged=True), "2 layers both ways, packed"),
    make_case(module("lstm", 1, 1, 256, carried=True), "decode", modes=(FORWARD, INFERENCE)),
    make_case(module("lstm", 1, 1, 768, carried=True), "decode", modes=(FORWARD, INFERENCE)),
]
