"""Cases of update_centroids: B batch, T time, H heads, D channels of a head, K clusters. Peers, plain PyTorch:

* `index_add`: sums and counts by `index_add_` over (head, cluster), the quotient, and the moving average.
* `one-hot product`: the same by a matrix product with one-hot rows, as code of the Routing Transformer has it.

Additions are counted: one for each number of x. Bytes are x once, the assignment, and centroids in and out. There is no
gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import CPU, FORWARD, OURS, REFERENCE, Case, Contender

ADD, PRODUCT = "index_add", "one-hot product"
DECAY = 0.5  # the usual 0.999 would hide errors of the mean from the comparison; the work is the same


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    D: int
    K: int
    dtype: torch.dtype = torch.float32

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "H": self.H, "D": self.D, "K": self.K}


def ours(centroids: Tensor, x: Tensor, nearest: Tensor) -> Tensor:
    import seqops

    return seqops.update_centroids(centroids, x, nearest, decay=DECAY)


def moved(centroids: Tensor, sums: Tensor, number: Tensor) -> Tensor:
    mean = sums / number.clamp(min=1).unsqueeze(-1)
    return torch.where(number.unsqueeze(-1) > 0, DECAY * centroids + (1 - DECAY) * mean, centroids)


def by_index_add(centroids: Tensor, x: Tensor, nearest: Tensor) -> Tensor:
    heads, clusters, channels = centroids.shape
    place = (nearest + clusters * torch.arange(heads, device=x.device)).flatten()
    sums = x.new_zeros(heads * clusters, channels).index_add_(0, place, x.reshape(-1, channels))
    number = x.new_zeros(heads * clusters).index_add_(0, place, x.new_ones(len(place)))
    return moved(centroids, sums.view_as(centroids), number.view(heads, clusters))


def by_product(centroids: Tensor, x: Tensor, nearest: Tensor) -> Tensor:
    chosen = torch.nn.functional.one_hot(nearest, centroids.shape[1]).to(x.dtype)
    return moved(centroids, torch.einsum("bthk,bthd->hkd", chosen, x), chosen.sum((0, 1)))


def build(
    shape: Shape, function: Callable[..., Tensor], dtype: torch.dtype, steps: int, device: str = CPU
) -> Contender:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device).to(shape.dtype).to(dtype)

    x, centroids = normal(shape.B, steps, shape.H, shape.D), normal(shape.H, shape.K, shape.D)
    nearest = torch.randint(shape.K, (shape.B, steps, shape.H), generator=generator, device=device)
    return Contender(lambda: {"centroids": function(centroids, x, nearest)}, {})


def case(shape: Shape, *words: str) -> Case:
    numbers = shape.B * shape.T * shape.H * shape.D
    sizes = " ".join(f"{letter}{value}" for letter, value in shape.letters.items())
    return Case(
        op="update_centroids",
        name=" ".join(("update_centroids", sizes, *words)),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders={
            ADD: partial(build, shape, by_index_add, shape.dtype),
            PRODUCT: partial(build, shape, by_product, shape.dtype),
            OURS: partial(build, shape, ours, shape.dtype),
            REFERENCE: partial(build, shape, by_product, torch.float64),
        },
        flops={FORWARD: numbers},
        bytes={
            FORWARD: (numbers + 2 * shape.H * shape.K * shape.D) * shape.dtype.itemsize + 8 * numbers // shape.D,
        },
        modes=(FORWARD,),
    )


CASES = [case(Shape(1, 4096, 8, 64, 16)), case(Shape(4, 4096, 8, 64, 64))]
