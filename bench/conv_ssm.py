"""Cases of conv_ssm: a linear state-space model over frames, on the CPU and on a GPU.

Letters: B batch, T time, Y = X sides of a frame, U channels of a frame, P complex channels of the state, k side of b,
and of c and d where they are no smaller.

The convolutions are torch's on every side, so the first thing to ask is what the recurrence adds to them:

* `two convolutions` is the input's real convolution with 2P outputs and the output's, of the 2P + U channels of states
  and frames, over all T frames at once; for training also their gradients. It computes no recurrence.
* `ConvLSTM` is what the model replaces: a convolution of frame and state to four gates, and the LSTM's equations, step
  after step in plain PyTorch, with as many real channels of the state, 2P. It computes something else.

A peer that computes the same:

* `whole sequence`: complex convolutions of all frames, and between them the recurrence as it is written, with autograd.

The float64 reference is that peer in double precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from bench.harness import FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

CONVOLUTIONS = "two convolutions"
CONV_LSTM = "ConvLSTM"
WHOLE = "whole sequence"


@dataclass(frozen=True)
class Shape:
    """Sizes of one case: b of side k, c and d of side `out`."""

    B: int
    T: int
    side: int
    U: int
    P: int
    k: int = 3
    out: int = 3
    dtype: torch.dtype = torch.float32
    carried: bool = False

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "Y": self.side, "U": self.U, "P": self.P, "k": self.k}

    def count_flops(self, mode: str) -> int:
        """Of the convolutions; two for each multiply-add, and twice as many again for both gradients."""
        each = 2 * self.k**2 * self.U * 2 * self.P + 2 * self.out**2 * self.U * (2 * self.P + self.U)
        return each * self.B * self.T * self.side**2 * (3 if mode == TRAINING else 1)

    def count_bytes(self, mode: str) -> int:
        """u and y once, and for training dy, u again and du."""
        frames = self.B * self.T * self.side**2 * self.U * self.dtype.itemsize
        return frames * (5 if mode == TRAINING else 2)


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtypes, then in `dtype` or its complex counterpart."""
    generator = torch.Generator(device).manual_seed(0)
    U, P, side = shape.U, shape.P, shape.side

    def normal(*sizes: int, fan: int = 1, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=kind) * fan**-0.5

    angle, modulus = (torch.rand(P, generator=generator, device=device) for _ in range(2))
    tensors = {
        "u": normal(shape.B, steps, side, side, U).to(shape.dtype),
        "a": torch.polar(0.8 + 0.2 * modulus, 6 * angle),
        "b": normal(shape.k, shape.k, U, P, fan=shape.k**2 * U, kind=torch.complex64),
        "c": normal(shape.out, shape.out, P, U, fan=4 * shape.out**2 * P, kind=torch.complex64),
        "d": normal(shape.out, shape.out, U, U, fan=shape.out**2 * U).to(shape.dtype),
    }
    if shape.carried:
        tensors["initial_state"] = normal(shape.B, side, side, P, kind=torch.complex64)
    wide = {torch.float64: torch.complex128}.get(dtype, torch.complex64)
    return {name: t.to(wide if t.is_complex() else dtype).requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)

    def run() -> dict[str, Tensor]:
        return dict(zip(("y", "final_state"), function(**leaves), strict=True))

    return Contender(run, leaves)


def call_ours(**inputs: Tensor) -> tuple[Tensor, ...]:
    import seqops

    return seqops.conv_ssm(**inputs)


def convolve(frames: Tensor, kernel: Tensor) -> Tensor:
    """Frames [N, Y, X, I] with an odd kernel [k, k, I, O]."""
    kernel = kernel.permute(3, 2, 0, 1)
    return conv2d(frames.permute(0, 3, 1, 2), kernel, padding=kernel.shape[-1] // 2).permute(0, 2, 3, 1)


def whole_sequence(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As the equations are written, in the dtypes of the parameters."""
    storage, real = u.dtype, b.real.dtype
    u, d = u.to(real), d.to(real)
    frames = u.flatten(0, 1)
    moved = convolve(frames.to(b.dtype), b).unflatten(0, u.shape[:2])
    x = torch.zeros_like(moved[:, 0]) if initial_state is None else initial_state
    states = []
    for moved_t in moved.unbind(1):
        x = a * x + moved_t
        states.append(x)
    y = 2 * convolve(torch.stack(states, 1).flatten(0, 1), c).real + convolve(frames, d)
    return y.unflatten(0, u.shape[:2]).to(storage), x


def build_convolutions(shape: Shape, mode: str, steps: int, device: str = "cpu") -> Contender:
    """The input's and the output's convolution, of dense channels-last frames."""

    def frames(channels: int) -> Tensor:
        sizes = (shape.B * steps, shape.side, shape.side, channels)
        return torch.randn(sizes, device=device).permute(0, 3, 1, 2).requires_grad_()

    def kernel(outputs: int, inputs: int, side: int) -> Tensor:
        values = torch.randn(outputs, inputs, side, side, device=device) * 0.1
        return values.contiguous(memory_format=torch.channels_last).requires_grad_()

    pairs = [
        (frames(shape.U), kernel(2 * shape.P, shape.U, shape.k), frames(2 * shape.P).detach()),
        (frames(2 * shape.P + shape.U), kernel(shape.U, 2 * shape.P + shape.U, shape.out), frames(shape.U).detach()),
    ]

    def run() -> dict[str, Tensor]:
        if mode != TRAINING:
            for x, weight, _ in pairs:
                conv2d(x, weight, padding=weight.shape[-1] // 2)
            return {}
        with torch.enable_grad():
            outputs = [conv2d(x, weight, padding=weight.shape[-1] // 2) for x, weight, _ in pairs]
        torch.autograd.grad(outputs, [t for pair in pairs for t in pair[:2]], [grad for *_, grad in pairs])
        return {}

    return Contender(run, {})


def build_conv_lstm(shape: Shape, mode: str, steps: int, device: str = "cpu") -> Contender:
    """A step's gates i, f, g, o are one convolution of [frame, h], h of 2P channels."""
    hidden = 2 * shape.P
    u = torch.randn(shape.B, steps, shape.side, shape.side, shape.U, device=device, requires_grad=True)
    weight = torch.randn(4 * hidden, shape.U + hidden, shape.k, shape.k, device=device) * 0.02
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    bias = torch.zeros(4 * hidden, device=device, requires_grad=True)
    zeros = torch.zeros(shape.B, hidden, shape.side, shape.side, device=device)
    zeros = zeros.contiguous(memory_format=torch.channels_last)
    dh = torch.randn(shape.B, steps, hidden, shape.side, shape.side, device=device)

    def forward() -> Tensor:
        h, state, outputs = zeros, zeros, []
        for frame in u.permute(1, 0, 4, 2, 3).unbind(0):
            gates = conv2d(torch.cat((frame, h), 1), weight, bias, padding=shape.k // 2)
            i, f, g, o = gates.chunk(4, 1)
            state = f.sigmoid() * state + i.sigmoid() * g.tanh()
            h = o.sigmoid() * state.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1)

    def run() -> dict[str, Tensor]:
        if mode != TRAINING:
            forward()
            return {}
        with torch.enable_grad():
            outputs = forward()
        torch.autograd.grad(outputs, (u, weight, bias), dh)
        return {}

    return Contender(run, {})


# ---- the table


def make_case(
    shape: Shape,
    note: str = "",
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    yardsticks: tuple[str, ...] = (CONVOLUTIONS, CONV_LSTM),
    peers: tuple[str, ...] = (WHOLE,),
    causes: Mapping[tuple[str, str], str] | None = None,
    check_steps: int | None = None,
    devices: tuple[str, ...] = ("cpu",),
) -> Case:
    """A row of the table.

    Args:
        note: what the shape does not say, for the name.
        goals: (peer or yardstick, mode) -> ratio of times.
        check_steps: T of the gradient check.
    """
    builders = {
        **{name: partial(build, shape, whole_sequence, shape.dtype) for name in peers},
        OURS: partial(build, shape, call_ours, shape.dtype),
        REFERENCE: partial(build, shape, whole_sequence, torch.float64),
    }
    makers = {CONVOLUTIONS: build_convolutions, CONV_LSTM: build_conv_lstm}
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    return Case(
        op="conv_ssm",
        name=" ".join(part for part in ("conv_ssm", precision, sizes, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        causes=causes or {},
        check_steps=check_steps,
        devices=devices,
        yardsticks={(name, mode): partial(makers[name], shape, mode) for name in yardsticks for mode in modes},
    )


GOALS = {(CONVOLUTIONS, FORWARD): 1 / 1.15, (CONVOLUTIONS, TRAINING): 1 / 1.15, (CONV_LSTM, TRAINING): 3.0}
RECOMPUTED = (
    "The backward computes each block's states again: one input convolution and one scan more than the yardstick has."
)
CAUSES = {(CONVOLUTIONS, TRAINING): RECOMPUTED}
POINTWISE = {(CONVOLUTIONS, FORWARD): 1 / 1.15, (CONVOLUTIONS, TRAINING): 1 / 1.15}

CPU_CASES = [
    make_case(Shape(4, 20, 16, 64, 64), goals=GOALS, causes=CAUSES, check_steps=4),
    make_case(Shape(2, 20, 16, 128, 128), goals=GOALS, causes=CAUSES, check_steps=2),
    make_case(
        Shape(4, 64, 16, 64, 64, 1, 1),
        "kernels of one pixel",
        goals=POINTWISE,
        causes=CAUSES,
        yardsticks=(CONVOLUTIONS,),
        check_steps=16,
    ),
    make_case(
        Shape(2, 300, 16, 16, 32, 3, 1),
        "output kernels of one pixel",
        goals=POINTWISE,
        causes=CAUSES,
        yardsticks=(CONVOLUTIONS,),
        check_steps=16,
    ),
    make_case(Shape(2, 20, 16, 64, 64, dtype=torch.bfloat16), yardsticks=(CONV_LSTM,), check_steps=4),
    make_case(
        Shape(4, 1, 16, 64, 64, carried=True),
        "one step",
        modes=(INFERENCE,),
        yardsticks=(CONV_LSTM,),
        goals={(CONV_LSTM, INFERENCE): 3.0},
    ),
]

GPU_CASES = [
    make_case(shape, note, goals=goals, peers=(), check_steps=8, devices=("cuda",))
    for shape, note, goals in (
        (Shape(8, 300, 16, 256, 128), "GPU", GOALS),
        (Shape(8, 600, 16, 128, 64), "GPU", GOALS),
        (Shape(8, 300, 16, 128, 128, 1, 1), "kernels of one pixel, GPU", POINTWISE),
        (Shape(8, 300, 16, 128, 128, 3, 1), "output kernels of one pixel, GPU", POINTWISE),
        (Shape(8, 300, 16, 128, 128, 1, 1, torch.bfloat16), "kernels of one pixel, GPU", {}),
    )
]

CASES = [*CPU_CASES, *GPU_CASES]
