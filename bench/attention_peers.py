"""What the benchmarks of attention operators share: inputs, operations, bytes, and peers that compute the same.

Letters: B batch, T time, H query heads, Hk key heads, D channels of a head.

A contender is a function of q [B, T, H, D] and k, v [B, T, Hk, D] that returns o [B, T, H, D]; lse is not compared,
since no peer returns it. A pattern's mask is a function of the number of steps and the device: bool [T, T], true where
query i sees key j. Peers:

* `SDPA, dense mask` is `torch.nn.functional.scaled_dot_product_attention` with that mask, made beforehand.
* `FlexAttention` is torch's compiled attention with the pattern as a function of positions; its block mask is made
  beforehand too. On GPUs alone: on the CPU it has no gradient.

Operations are two multiplications and two additions for each channel of each visible pair, and 2.5 times as many in the
backward; bytes count q, k, v and o once, and twice as many in the backward. The reference is SDPA with the dense mask
in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import BACKWARD, FORWARD, OURS, REFERENCE, TRAINING, Case, Contender

DENSE = "SDPA, dense mask"
FLEX = "FlexAttention"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v -> o
Mask = Callable[[int, str], Tensor]  # steps, device -> bool [T, T]
Visible = Callable[[Any, Any, Any, Any], Tensor]  # FlexAttention's batch, head, i, j -> bool


@dataclass(frozen=True)
class Shape:
    """Sizes of one case."""

    B: int
    T: int
    H: int
    D: int
    Hk: int | None = None
    dtype: torch.dtype = torch.float32

    @property
    def key_heads(self) -> int:
        return self.H if self.Hk is None else self.Hk

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "H": self.H, "D": self.D} | ({} if self.Hk is None else {"Hk": self.Hk})

    def count_bytes(self, mode: str) -> int:
        forward = 2 * (self.H + self.key_heads) * self.B * self.T * self.D * self.dtype.itemsize
        return forward * {BACKWARD: 2, TRAINING: 3}.get(mode, 1)

    def count_flops(self, pairs: int, mode: str) -> int:
        """Of so many visible pairs a head of a row."""
        return int(4 * self.B * self.H * self.D * pairs * {BACKWARD: 2.5, TRAINING: 3.5}.get(mode, 1))


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """q, k and v, rounded to the storage dtype, then in `dtype`."""
    generator = torch.Generator(device).manual_seed(0)
    heads = {"q": shape.H, "k": shape.key_heads, "v": shape.key_heads}
    return {
        name: torch.randn(shape.B, steps, count, shape.D, generator=generator, device=device)
        .to(shape.dtype)
        .to(dtype)
        .requires_grad_()
        for name, count in heads.items()
    }


def build(shape: Shape, function: Attention, dtype: torch.dtype, steps: int, device: str = "cpu") -> Contender:
    leaves = draw(shape, steps, dtype, device)
    return Contender(lambda: {"o": function(**leaves)}, leaves)


def build_dense(shape: Shape, mask: Mask, dtype: torch.dtype, steps: int, device: str = "cpu") -> Contender:
    return build(shape, partial(dense, mask=mask(steps, device)), dtype, steps, device)


def build_flex(
    shape: Shape, visible: Visible, dtype: torch.dtype, steps: int, device: str = "cuda"
) -> Contender:  # pragma: no cover - on a GPU
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(visible, None, None, steps, steps, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled_flex()(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)

    return build(shape, attend, dtype, steps, device)


@cache
def compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """SDPA of [B, T, H, D] over all keys, those of the mask, or the earlier ones."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def make_case(
    op: str,
    shape: Shape,
    mask: Mask,
    pairs: int,
    *,
    ours: Attention | None = None,
    words: Sequence[str] = (),
    peers: Mapping[str, Attention] | None = None,
    visible: Visible | None = None,
    builders: Mapping[str, Callable[..., Contender]] | None = None,
    goals: Mapping[tuple[str, str], float] | None = None,
    causes: Mapping[tuple[str, str], str] | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    check_steps: int | None = 512,
    devices: tuple[str, ...] = ("cpu",),
) -> Case:
    """A row of an operator's table. It pickles if the functions do: partials of functions at the top of a module.

    Args:
        mask: the pattern, for the dense peer and the reference.
        pairs: how many it has with shape.T steps.
        ours: the operator with its options, of which it returns o; or it is among `builders`.
        words: what the shape does not say, for the name.
        peers: further ones, before the dense mask.
        visible: the pattern as a function of positions: adds FlexAttention.
        builders: in place of those that this makes, by name.
        goals: (peer, mode) -> ratio of times.
    """
    made: dict[str, Callable[..., Contender]] = {
        name: partial(build, shape, function, shape.dtype) for name, function in (peers or {}).items()
    }
    made |= {
        DENSE: partial(build_dense, shape, mask, shape.dtype),
        **({} if visible is None else {FLEX: partial(build_flex, shape, visible, shape.dtype)}),
        **({} if ours is None else {OURS: partial(build, shape, ours, shape.dtype)}),
        REFERENCE: partial(build_dense, shape, mask, torch.float64),
        **(builders or {}),
    }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    return Case(
        op=op,
        name=" ".join(part for part in (op, precision, sizes, *words) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=made,
        flops={mode: shape.count_flops(pairs, mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        causes=causes or {},
        check_steps=check_steps if check_steps is not None and check_steps < shape.T else None,
        devices=devices,
    )


def positions(steps: int, device: str) -> tuple[Tensor, Tensor]:
    """i [T, 1] and j [T]."""
    t = torch.arange(steps, device=device)
    return t[:, None], t


def triangle(size: int) -> int:
    """Pairs of `size` queries with the keys up to their own."""
    return size * (size + 1) // 2
