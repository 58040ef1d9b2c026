"""Cases of newton_schulz, on the CPU and on a GPU: G matrices [M, N].

The peer `plain products` is what optimizers write: three matrix products a step, on the whole batch, differentiated by
autograd.

Operations are those of plain products, two for a multiplication and an addition: `(4 rho + 2) m^3` a step, with m the
smaller side and rho the ratio of both, and twice that in the backward. Bytes count the matrices and their gradients
once for each pass that has to read or write them. The float64 reference is plain products in float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

PLAIN = "plain products"
STEPS = ((3.4445, -4.7750, 2.0315),) * 5


@dataclass(frozen=True)
class Shape:
    G: int
    M: int
    N: int
    dtype: torch.dtype = torch.float32

    @property
    def letters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in "GMN"}

    def count_bytes(self, mode: str) -> int:
        return (2 if mode == FORWARD else 5) * self.G * self.M * self.N * self.dtype.itemsize

    def count_flops(self, mode: str) -> int:
        return (1 if mode == FORWARD else 3) * self.G * step_flops(self.M, self.N) * len(STEPS)


def step_flops(M: int, N: int) -> int:
    """Of one step on one matrix, by plain products."""
    short, long = min(M, N), max(M, N)
    return 4 * short * short * long + 2 * short**3


def plain(x: Tensor, eps: float = 1e-7) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + eps)
    for a, b, c in STEPS:
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.mT if tall else y


def call_ours(x: Tensor) -> Tensor:
    import seqops

    return seqops.newton_schulz(x)


def build(
    shape: Shape, function: Callable[[Tensor], Tensor], dtype: torch.dtype, rows: int, device: str = "cpu"
) -> Contender:
    """Of so many rows instead of M."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(shape.G, rows, shape.N, generator=generator, device=device)
    x = drawn.to(shape.dtype).to(dtype).requires_grad_()
    return Contender(lambda: {"o": function(x)}, {"x": x})


def make_case(
    shape: Shape,
    note: str = "",
    goals: Mapping[tuple[str, str], float] | None = None,
    devices: tuple[str, ...] = ("cpu",),
) -> Case:
    modes = (FORWARD, TRAINING)
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    return Case(
        op="newton_schulz",
        name=" ".join(part for part in ("newton_schulz", precision, sizes, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.M,
        builders={
            OURS: partial(build, shape, call_ours, shape.dtype),
            PLAIN: partial(build, shape, plain, shape.dtype),
            REFERENCE: partial(build, shape, plain, torch.float64),
        },
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        devices=devices,
    )


GOALS = {(PLAIN, mode): 1.3 for mode in (FORWARD, TRAINING)}
CPU_CASES = [
    make_case(Shape(12, 384, 384), goals=GOALS),
    make_case(Shape(12, 384, 768), goals=GOALS),
    make_case(Shape(3, 768, 768), goals=GOALS),
    make_case(Shape(24, 128, 128), goals=GOALS),
    make_case(Shape(64, 64, 64), goals=GOALS),
    make_case(Shape(32, 256, 64), "tall"),
]
GPU_CASES = [
    make_case(Shape(G, M, N, dtype), "GPU", GOALS, devices=("cuda",))
    for G, M, N in ((12, 768, 768), (12, 384, 384), (1, 2048, 2048), (256, 128, 128))
    for dtype in (torch.bfloat16, torch.float32)
]

CASES = [*CPU_CASES, *GPU_CASES]
