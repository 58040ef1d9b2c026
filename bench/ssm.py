"""Cases of ssm_kernel and cauchy_kernel, on the CPU and on a GPU.

Letters: H heads, N modes of a head, L length, or number of nodes.

What users write is the sum with all its terms at once, [H, N, L] complex numbers (`all terms`). The peer `two tables`
is the way of our CPU kernel in plain PyTorch: anchors and a table by complex exponentials in float64, their product by
`torch.bmm`, at the rate of the machine's matrix products. The float64 reference is `all terms` in double precision.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

TERMS = "all terms"
TABLES = "two tables"


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    op: str
    H: int
    N: int
    L: int
    dtype: torch.dtype = torch.complex64

    @property
    def letters(self) -> dict[str, int]:
        return {"H": self.H, "N": self.N, "L": self.L}

    def count_flops(self, mode: str) -> int:
        """Of the products of tables, and twice as many for gradients; of a pair of fractions about 25, and 60."""
        forward, backward = (4, 8) if self.op == "ssm_kernel" else (25, 60)
        return (forward + (backward if mode == TRAINING else 0)) * self.H * self.N * self.L

    def count_bytes(self, mode: str) -> int:
        """The result once, and for training its gradient."""
        each = self.dtype.itemsize // (2 if self.op == "ssm_kernel" else 1)
        return each * self.H * self.L * (2 if mode == TRAINING else 1)


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the dtype of the case, then in `dtype`: modes as S4D begins with."""
    generator = torch.Generator(device).manual_seed(0)
    H, N = shape.H, shape.N

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=torch.complex128)

    step = 10 ** (-3 + 2 * torch.rand(H, 1, generator=generator, device=device, dtype=torch.float64))
    imaginary = torch.pi * torch.arange(N, device=device, dtype=torch.float64)
    rate = step * torch.complex(torch.full_like(imaginary, -0.5), imaginary)
    if shape.op == "ssm_kernel":
        tensors = {"z": rate, "c": normal(H, N)}
    else:
        angle = 2 * torch.pi * torch.arange(steps, device=device, dtype=torch.float64) / (2 * steps)
        nodes = torch.complex(torch.zeros_like(angle), 2 * torch.tan(angle / 2))
        tensors = {"v": normal(H, N), "nodes": nodes, "w": rate}
    return {name: t.to(shape.dtype).to(dtype).requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., Tensor], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)
    sizes = {"length": steps} if shape.op == "ssm_kernel" else {}
    return Contender(lambda: {"y": function(**leaves, **sizes)}, leaves)


def call_ours(op: str, **inputs: Tensor) -> Tensor:
    import seqops

    return getattr(seqops, op)(**inputs)


def all_terms_of_ssm(z: Tensor, c: Tensor, length: int) -> Tensor:
    steps = torch.arange(length, device=z.device, dtype=z.real.dtype)
    return 2 * torch.einsum("hn,hnl->hl", c, (z.unsqueeze(-1) * steps).exp()).real


def all_terms_of_cauchy(v: Tensor, nodes: Tensor, w: Tensor) -> Tensor:
    v, w = v.unsqueeze(-1), w.unsqueeze(-1)
    return (v / (nodes - w) + v.conj() / (nodes - w.conj())).sum(1)


def two_tables(z: Tensor, c: Tensor, length: int) -> Tensor:
    """Rows of as many columns as the root of the length."""
    columns = 1 << max(length - 1, 1).bit_length() // 2
    wide = z.to(torch.complex128)
    rows = torch.arange(-(-length // columns), device=z.device) * columns
    anchors = (2 * c.unsqueeze(1) * (rows[:, None] * wide.unsqueeze(1)).exp()).to(z.dtype)
    table = (wide.unsqueeze(-1) * torch.arange(columns, device=z.device)).exp().to(z.dtype)
    left = torch.cat((anchors.real, -anchors.imag), 2)
    right = torch.cat((table.real, table.imag), 1)
    return torch.bmm(left, right).flatten(1)[:, :length]


# ---- the table


def make_case(
    shape: Shape,
    goals: Mapping[tuple[str, str], float] | None = None,
    note: str = "",
    check_steps: int | None = 512,
    devices: tuple[str, ...] = ("cpu",),
) -> Case:
    """A row of the table; goals are (peer, mode) -> ratio of times."""
    terms = all_terms_of_ssm if shape.op == "ssm_kernel" else all_terms_of_cauchy
    builders = {
        TERMS: partial(build, shape, terms, shape.dtype),
        OURS: partial(build, shape, partial(call_ours, shape.op), shape.dtype),
        REFERENCE: partial(build, shape, terms, torch.complex128),
    }
    if shape.op == "ssm_kernel":
        builders[TABLES] = partial(build, shape, two_tables, shape.dtype)
    precision = "" if shape.dtype == torch.complex64 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    modes = (FORWARD, TRAINING)
    return Case(
        op=shape.op,
        name=" ".join(part for part in (shape.op, precision, sizes, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.L,
        builders=builders,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        check_steps=check_steps,
        devices=devices,
    )


GOALS = {(TERMS, FORWARD): 10.0, (TERMS, TRAINING): 10.0}
BOTH = {**GOALS, (TABLES, FORWARD): 1.5, (TABLES, TRAINING): 1.5}

CASES = [
    make_case(Shape("ssm_kernel", 256, 32, 4096), BOTH),
    make_case(Shape("ssm_kernel", 128, 32, 1024), BOTH),
    make_case(Shape("ssm_kernel", 16, 64, 16384), BOTH),
    make_case(Shape("ssm_kernel", 64, 32, 2048, torch.complex128), GOALS),
    make_case(Shape("cauchy_kernel", 256, 32, 2048), GOALS),
    make_case(Shape("cauchy_kernel", 1024, 4, 513), GOALS),
    make_case(Shape("cauchy_kernel", 64, 32, 1024, torch.complex128), GOALS),
    *(
        make_case(Shape(op, H, N, L), GOALS, "GPU", devices=("cuda",))
        for op, H, N, L in (
            ("ssm_kernel", 256, 32, 4096),
            ("ssm_kernel", 512, 32, 16384),
            ("cauchy_kernel", 256, 32, 2049),
            ("cauchy_kernel", 1024, 32, 8193),
        )
    ),
]
