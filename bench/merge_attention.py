"""Cases of merge_attention, on the CPU and on a GPU.

Letters: B batch, T time, H heads, D channels. The one peer, and in float64 the reference:

* `plain PyTorch` is the formula, with the larger of both logarithms taken out.

Operations are three a number of o, and in the backward six; bytes count each tensor once for each pass that has to read
or write it.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

PLAIN = "plain PyTorch"
NAMES = ("o1", "lse1", "o2", "lse2")


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype = torch.float32

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "H": self.H, "D": self.D}

    @property
    def numbers(self) -> int:
        return self.B * self.T * self.H * self.D

    def count_bytes(self, mode: str) -> int:
        """o1, o2 and o; in the backward do, o1, o2, do1 and do2."""
        return self.numbers * self.dtype.itemsize * (8 if mode == TRAINING else 3)

    def count_flops(self, mode: str) -> int:
        return self.numbers * (9 if mode == TRAINING else 3)


def build(shape: Shape, function: object, dtype: torch.dtype, steps: int, device: str = "cpu") -> Contender:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    B, H = shape.B, shape.H
    real = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        name: (
            normal(B, steps, H, shape.D).to(shape.dtype).to(dtype) if name[0] == "o" else normal(B, H, steps).to(real)
        ).requires_grad_()
        for name in NAMES
    }
    return Contender(lambda: dict(zip(("o", "lse"), function(**leaves), strict=True)), leaves)


def ours(**inputs: Tensor) -> tuple[Tensor, Tensor]:
    import seqops

    return seqops.merge_attention(**inputs)


def plain(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1, lse2)
    first, second = ((part - lse).exp().mT.unsqueeze(-1) for part in (lse1, lse2))
    return (first * o1 + second * o2).to(o1.dtype), lse


def case(shape: Shape, *words: str, device: str = "cpu") -> Case:
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    modes = (FORWARD, TRAINING)
    return Case(
        op="merge_attention",
        name=" ".join(part for part in ("merge_attention", precision, sizes, *words) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders={
            PLAIN: partial(build, shape, plain, shape.dtype),
            OURS: partial(build, shape, ours, shape.dtype),
            REFERENCE: partial(build, shape, plain, torch.float64),
        },
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(PLAIN, mode): 1.0 for mode in modes},
        causes={},
        check_steps=None,
        devices=(device,),
    )


CPU_CASES = [case(Shape(2, 4096, 8, 64)), case(Shape(2, 4096, 8, 64, torch.bfloat16))]
GPU_CASES = [case(Shape(8, 8192, 16, 64, torch.bfloat16), "GPU", device="cuda")]
CASES = [*CPU_CASES, *GPU_CASES]
