"""Cases of causal_conv1d, on the CPU and on a GPU.

Letters: B batch, T time, D channels, W taps.

* `conv1d` is torch's convolution with as many groups as channels, from [B, T, D] to [B, T, D]: it takes and gives
  [B, D, T], so its user transposes twice. `conv1d, no transposes` leaves that out: x lies as torch wants it, and so
  does the result.
* `same bytes` is a clone of x for every two tensors as large as x that a pass moves. It makes new outputs, as an
  operator does.

Bytes count each tensor once for each pass that has to read or write it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.harness import BACKWARD, FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

SAME_BYTES = "same bytes"
CONV1D, BARE = "conv1d", "conv1d, no transposes"
# Tensors as large as x that a pass reads or writes.
TENSORS = {FORWARD: 2, BACKWARD: 3, TRAINING: 5, INFERENCE: 2}


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    B: int
    T: int
    D: int
    W: int
    dilation: int = 1
    silu: bool = False
    dtype: torch.dtype = torch.float32
    carried: bool = False

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "D": self.D, "W": self.W}

    @property
    def elements(self) -> int:
        return self.B * self.T * self.D

    def count_bytes(self, mode: str) -> int:
        states = 2 * self.B * (self.W - 1) * self.dilation * self.D if self.carried else 0
        return (TENSORS[mode] * self.elements + states) * self.dtype.itemsize

    def count_flops(self, mode: str) -> int:
        return 2 * self.W * self.elements * {BACKWARD: 2, TRAINING: 3}.get(mode, 1)


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    tensors = {
        "x": normal(shape.B, steps, shape.D),
        "weight": normal(shape.D, shape.W) / shape.W**0.5,
        "bias": normal(shape.D),
    }
    if shape.carried:
        tensors["initial_state"] = normal(shape.B, (shape.W - 1) * shape.dilation, shape.D)
    return {name: t.to(shape.dtype).to(dtype).requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., Tensor], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)

    def run() -> dict[str, Tensor]:
        return {"y": function(shape, **leaves)}

    return Contender(run, leaves)


def ours(shape: Shape, **inputs: Tensor) -> Tensor:
    import seqops

    activation = "silu" if shape.silu else None
    return seqops.causal_conv1d(**inputs, dilation=shape.dilation, activation=activation)[0]


def torch_conv1d(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None) -> Tensor:
    before = (shape.W - 1) * shape.dilation
    if initial_state is None:
        joined = torch.nn.functional.pad(x.mT, (before, 0))
    else:
        joined = torch.cat((initial_state, x), 1).mT
    z = torch.conv1d(joined, weight[:, None], bias, dilation=shape.dilation, groups=shape.D)
    return (torch.nn.functional.silu(z) if shape.silu else z).mT.contiguous()


def shifted_sums(shape: Shape, x: Tensor, weight: Tensor, bias: Tensor, initial_state: Tensor | None = None) -> Tensor:
    """The reference: a sum of shifted copies, without a convolution."""
    before = (shape.W - 1) * shape.dilation
    first = x.new_zeros(x.shape[0], before, shape.D) if initial_state is None else initial_state
    joined = torch.cat((first, x), 1)
    z = bias.expand(x.shape)
    for k in range(shape.W):
        start = k * shape.dilation
        z = torch.addcmul(z, weight[:, k], joined[:, start : start + x.shape[1]])
    return z * z.sigmoid() if shape.silu else z


def build_bare(shape: Shape, steps: int, device: str = "cpu") -> Contender:
    """x and the result as [B, D, T]; timed only, since its values are `conv1d`'s."""
    leaves = draw(shape, steps, shape.dtype, device)
    x = leaves["x"].detach().mT.contiguous().requires_grad_()
    weight, bias, before = leaves["weight"], leaves["bias"], (shape.W - 1) * shape.dilation

    def run() -> dict[str, Tensor]:
        joined = torch.nn.functional.pad(x, (before, 0))
        z = torch.conv1d(joined, weight[:, None], bias, dilation=shape.dilation, groups=shape.D)
        return {"y": torch.nn.functional.silu(z) if shape.silu else z}

    return Contender(run, {"x": x, "weight": weight, "bias": bias})


def build_same_bytes(shape: Shape, mode: str, steps: int, device: str = "cpu") -> Contender:
    """A clone moves two tensors, torch.add three: together as many as the pass."""
    first, second = (torch.ones(shape.B, steps, shape.D, dtype=shape.dtype, device=device) for _ in range(2))

    def run() -> dict[str, Tensor]:
        if mode in (FORWARD, TRAINING, INFERENCE):
            first.clone()
        if mode in (BACKWARD, TRAINING):
            first + second
        return {}

    return Contender(run, {})


# ---- the table


def make_case(
    shape: Shape,
    note: str = "",
    peers: tuple[str, ...] = (CONV1D,),
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    copy_goals: Mapping[str, float] | None = None,
    causes: Mapping[tuple[str, str], str] | None = None,
    devices: tuple[str, ...] = ("cpu",),
    absent: Mapping[str, str] | None = None,
) -> Case:
    """A row of the table.

    Args:
        note: what the shape does not say, for the name.
        goals: (peer or SAME_BYTES, mode) -> ratio of times.
        copy_goals: mode -> share of the copy rate.
    """
    builders = {name: partial(build, shape, torch_conv1d, shape.dtype) for name in peers}
    builders |= {
        OURS: partial(build, shape, ours, shape.dtype),
        REFERENCE: partial(build, shape, shifted_sums, torch.float64),
    }
    yardsticks = {(SAME_BYTES, mode): partial(build_same_bytes, shape, mode) for mode in modes if mode != INFERENCE}
    if peers and not shape.carried:
        yardsticks |= {(BARE, mode): partial(build_bare, shape) for mode in modes if mode == FORWARD}
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    words = [f"{letter}{size}" for letter, size in shape.letters.items()]
    words += [f"dilation {shape.dilation}"] * (shape.dilation > 1) + ["silu"] * shape.silu
    return Case(
        op="causal_conv1d",
        name=" ".join(part for part in ("causal_conv1d", precision, *words, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        causes=causes or {},
        check_steps=min(shape.T, 512) if TRAINING in modes or BACKWARD in modes else None,
        devices=devices,
        yardsticks=yardsticks,
        absent=absent or {},
        copy_goals=copy_goals or {},
    )


FIVE = {(CONV1D, FORWARD): 5.0}

CPU_CASES = [
    make_case(Shape(4, 4096, 512, 4), goals=FIVE),
    make_case(Shape(4, 4096, 512, 4, dilation=16), goals=FIVE),
    make_case(Shape(4, 4096, 512, 4, silu=True)),
    make_case(Shape(4, 4096, 512, 4, dilation=1024)),
    make_case(Shape(4, 4096, 512, 4, silu=True, dtype=torch.bfloat16)),
    # Of torch's gradients with many taps one call takes seconds.
    *(make_case(Shape(4, 4096, 512, W), modes=(FORWARD,)) for W in (64, 256)),
    *(make_case(Shape(4, 4096, 512, W), "with gradients", peers=(), modes=(TRAINING,)) for W in (64, 256)),
    make_case(Shape(16, 1, 2048, 4, silu=True, carried=True), "one step", modes=(INFERENCE,)),
]

COPY = {FORWARD: 0.85, BACKWARD: 0.80}
# Takes widths of 2 to 4 without dilation; where it is installed, its own benchmark is to be run beside ours.
ABSENT = (
    {} if find_spec("causal_conv1d") is not None else {"causal-conv1d": "the package causal-conv1d is not installed"}
)


def on_gpu(shape: Shape, copy_goals: Mapping[str, float] | None = COPY) -> Case:
    peers = (CONV1D,) if shape.W <= 64 else ()
    modes, devices = (FORWARD, BACKWARD), ("cuda",)
    return make_case(shape, "GPU", peers, modes=modes, copy_goals=copy_goals, devices=devices, absent=ABSENT)


GPU_CASES = [
    *(
        on_gpu(Shape(B, T, D, 4, silu=True, dtype=dtype))
        for B, T, D in ((8, 4096, 2048), (1, 65536, 2048), (64, 2048, 768))
        for dtype in (torch.float32, torch.bfloat16)
    ),
    on_gpu(Shape(8, 4096, 2048, 4, dilation=16, dtype=torch.bfloat16)),
    on_gpu(Shape(8, 4096, 2048, 3, dilation=256, dtype=torch.bfloat16)),
    on_gpu(Shape(8, 4096, 2048, 16, dtype=torch.bfloat16), None),
    on_gpu(Shape(8, 4096, 2048, 64, dtype=torch.bfloat16), None),
]

CASES = [*CPU_CASES, *GPU_CASES]
