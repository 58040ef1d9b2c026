"""Cases of pointer_scores, on the CPU and on a GPU.

Letters: B batch, Tq queries, Tk keys, A channels.

Peer: `plain PyTorch` writes the formula down: tanh of a tensor [B, Tq, Tk, A], or of a batch of products, then
`log_softmax`. The reference is the same in float64.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

PLAIN = "plain PyTorch"


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    B: int
    Tq: int
    Tk: int
    A: int
    mode: str = "additive"
    dtype: torch.dtype = torch.float32

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "Tq": self.Tq, "Tk": self.Tk, "A": self.A}

    def count_flops(self, mode: str) -> int:
        """An addition, a tangent counted as one, a multiply-add; or a multiply-add alone. Twice in the backward."""
        each = 4 if self.mode == "additive" else 2
        return each * self.B * self.Tq * self.Tk * self.A * (3 if mode == TRAINING else 1)

    def count_bytes(self, mode: str) -> int:
        """query, key and log_p once, and for training again, with their gradients."""
        numbers = self.B * ((self.Tq + self.Tk) * self.A + self.Tq * self.Tk)
        return numbers * self.dtype.itemsize * (3 if mode == TRAINING else 1)


def ours(query: Tensor, key: Tensor, weight: Tensor, mode: str) -> Tensor:
    import seqops

    return seqops.pointer_scores(query, key, weight, mode=mode)


def plain(query: Tensor, key: Tensor, weight: Tensor, mode: str) -> Tensor:
    if mode == "additive":
        scores = (query.unsqueeze(2) + key.unsqueeze(1)).tanh() @ weight
    else:
        scores = 10 * (query @ key.mT / query.shape[2] ** 0.5).tanh() + 0 * weight.sum()
    return scores.log_softmax(-1)


def build(shape: Shape, function: object, dtype: torch.dtype, steps: int, device: str = "cpu") -> Contender:
    generator = torch.Generator(device).manual_seed(0)
    sizes = {
        "query": (shape.B, steps, shape.A),
        "key": (shape.B, shape.Tk, shape.A),
        "weight": (shape.A,),
    }
    leaves = {
        name: (torch.randn(size, generator=generator, device=device) * (0.1 if name == "weight" else 1))
        .to(shape.dtype)
        .to(dtype)
        .requires_grad_()
        for name, size in sizes.items()
    }
    return Contender(lambda: {"log_p": function(**leaves, mode=shape.mode)}, leaves)


def case(shape: Shape, *words: str, goals: dict[str, float], devices: tuple[str, ...] = ("cpu",)) -> Case:
    modes = (FORWARD, TRAINING)
    sizes = (f"{letter}{size}" for letter, size in shape.letters.items())
    kind = () if shape.mode == "additive" else ("clipped dot",)
    return Case(
        op="pointer_scores",
        name=" ".join(("pointer_scores", *sizes, *kind, *words)),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.Tq,
        builders={
            PLAIN: partial(build, shape, plain, shape.dtype),
            OURS: partial(build, shape, ours, shape.dtype),
            REFERENCE: partial(build, shape, plain, torch.float64),
        },
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(PLAIN, mode): ratio for mode, ratio in goals.items()},
        devices=devices,
    )


ADDITIVE = {FORWARD: 4.0, TRAINING: 4.0}
CPU_CASES = [
    case(Shape(32, 50, 50, 256), goals=ADDITIVE),
    case(Shape(4, 200, 200, 256), goals=ADDITIVE),
    case(Shape(64, 1, 100, 256), "one query", goals=ADDITIVE),
    case(Shape(32, 50, 50, 256, "clipped_dot"), goals={}),
]
GPU_CASES = [
    case(Shape(256, 100, 100, 256, mode), "GPU", goals=ADDITIVE if mode == "additive" else {}, devices=("cuda",))
    for mode in ("additive", "clipped_dot")
]
CASES = [*CPU_CASES, *GPU_CASES]
