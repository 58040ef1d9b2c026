"""What several modules are made of: checks, positions, norms, windows over a cache, initial values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..attention import range_attention

# ---- checks


def expect(holds: bool, owner: object, argument: str, expected: str, got: object) -> None:
    """Raises ValueError naming module, argument, what was expected and what was got, unless `holds`."""
    if not holds:
        raise ValueError(f"{type(owner).__name__}: {argument}: expected {expected}, got {got}")


def check_positive(owner: object, **sizes: int) -> None:
    for name, size in sizes.items():
        whole = isinstance(size, int) and not isinstance(size, bool)
        expect(whole and size >= 1, owner, name, "a whole number of at least 1", repr(size))


def check_multiple(owner: object, name: str, size: int, of: str, factor: int) -> None:
    expect(size % factor == 0, owner, name, f"a multiple of {of} = {factor}", size)


def check_sequence(owner: object, x: Tensor, width: int, name: str = "x", letter: str = "D") -> None:
    """x must be [B, T, width] and floating."""
    fits = x.ndim == 3 and x.shape[-1] == width
    expect(fits, owner, name, f"[B, T, {letter} = {width}]", f"shape {list(x.shape)}")
    expect(x.is_floating_point(), owner, name, "a floating dtype", x.dtype)


def check_state(owner: object, state: tuple[Tensor, ...] | None, *shapes: tuple[int, ...]) -> None:
    """The tensors of a state must have these shapes: a state of one row would spread over a batch without a word."""
    if state is not None:
        wanted, got = [[*shape] for shape in shapes], [[*part.shape] for part in state]
        expect(got == wanted, owner, "state", f"shapes {wanted}", got)


# ---- values


def wide(x: Tensor) -> Tensor:
    """x in float32 at least: what recurrences, exponentials and norms are computed in."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def complex_of(pairs: Tensor) -> Tensor:
    """[..., 2] -> complex [...]. Parameters are stored as pairs: `module.bfloat16()` would drop imaginary parts."""
    return torch.view_as_complex(wide(pairs).contiguous())


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] -> [B, T, H, D]."""
    return x.unflatten(-1, (heads, -1))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """x / rms(x) over the last dimension, in float32 at least, times weight; in the dtype of x."""
    exact = wide(x)
    y = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (y if weight is None else y * weight).to(x.dtype)


def rotary(x: Tensor, start: int | Tensor = 0, base: float = 10000.0) -> Tensor:
    """Rotary positions: pairs (i, i + D/2) of x [B, T, H, D] turned by (start + t) base^(-2i/D).

    start is a number or a tensor [B] or []. Angles are reduced in float64: those of float32 are off by 1e-2 at t = 1e5.

    Su et al., "RoFormer: enhanced transformer with rotary position embedding", 2021.
    """
    T, half = x.shape[1], x.shape[-1] // 2
    if isinstance(start, Tensor) and start.ndim > 0 and start.shape != x.shape[:1]:
        raise ValueError(f"rotary: start: expected [B] = [{len(x)}] or [], got shape {[*start.shape]}")
    time = torch.arange(T, device=x.device, dtype=torch.float64)
    time = start.to(torch.float64).reshape(-1, 1) + time if isinstance(start, Tensor) else (start + time)[None]
    powers = torch.arange(half, device=x.device, dtype=torch.float64) / -half
    angle = torch.remainder(time[..., None] * base**powers, 2 * math.pi)[:, :, None]
    exact = wide(x)
    cos, sin = (part.to(exact.dtype) for part in (angle.cos(), angle.sin()))
    first, second = exact[..., :half], exact[..., half : 2 * half]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, exact[..., 2 * half :]], -1)
    return turned.to(x.dtype)


# ---- attention over what came before: a cache, then the new tokens


def append(cache: Tensor | None, new: Tensor) -> Tensor:
    """cache [B, S, ...] and new [B, T, ...] joined along time."""
    if cache is None:
        return new
    B, rest = new.shape[0], new.shape[2:]
    if cache.ndim != new.ndim or cache.shape[0] != B or cache.shape[2:] != rest:
        raise ValueError(f"state: expected a cache of shape {[B, 'S', *rest]}, got {[*cache.shape]}")
    return torch.cat([cache.to(new.dtype), new], 1)


def keep_last(x: Tensor, count: int) -> Tensor:
    """The last `count` of x [B, T, ...], in memory of their own."""
    return x[:, max(x.shape[1] - count, 0) :].clone()


def window_ranges(queries: int, keys: int, left: int, device: torch.device) -> Tensor:
    """Ranges for `range_attention`: the last `queries` of `keys` tokens see themselves and `left` before (-1: all)."""
    position = torch.arange(queries, device=device, dtype=torch.int32) + (keys - queries)
    first = torch.zeros_like(position) if left < 0 else (position - left).clamp(min=0)
    return torch.stack([first, position + 1])[None, None, None]


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, cache: tuple[Tensor, Tensor] | None, left: int, scale: float | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Causal attention of new tokens q [B, T, H, D], k, v [B, T, Hk, D] to themselves and `left` before them (-1: all).

    Returns o [B, T, H, D] and the cache (k, v) for the tokens that follow: the last `left`, or all.
    """
    before = (None, None) if cache is None else cache
    k, v = append(before[0], k), append(before[1], v)
    o, _ = range_attention(q, k, v, window_ranges(q.shape[1], k.shape[1], left, q.device), scale=scale)
    kept = k.shape[1] if left < 0 else left
    return o, (keep_last(k, kept), keep_last(v, kept))


# ---- projections of attention


class Projections(torch.nn.Module):
    """Linear maps from x [B, T, dim] to heads of queries, keys and values, and from the heads' results back.

    Args:
        owner: whose sizes these are; named in errors.
        dim: D, a multiple of num_heads.
        num_heads: H.
        bias: of the maps of values and results. Queries and keys have none: that of keys would change nothing.
    """

    def __init__(self, owner: object, dim: int, num_heads: int, bias: bool = True, **options: Any) -> None:
        super().__init__()
        check_positive(owner, dim=dim, num_heads=num_heads)
        check_multiple(owner, "dim", dim, "num_heads", num_heads)
        self.num_heads = num_heads
        self.query = torch.nn.Linear(dim, dim, bias=False, **options)
        self.key = torch.nn.Linear(dim, dim, bias=False, **options)
        self.value = torch.nn.Linear(dim, dim, bias=bias, **options)
        self.out = torch.nn.Linear(dim, dim, bias=bias, **options)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q of x [B, T, dim]; k, v of the context [B, S, dim], or of x: [B, T or S, H, D]."""
        context = x if context is None else context
        q, k, v = self.query(x), self.key(context), self.value(context)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def join(self, o: Tensor) -> Tensor:
        """o [B, T, H, D] -> [B, T, dim]."""
        return self.out(o.flatten(2))


def full_ranges(queries: int, keys: int, device: torch.device) -> Tensor:
    """Ranges for `range_attention`: each of `queries` sees all `keys`."""
    first = torch.zeros(queries, dtype=torch.int32, device=device)
    return torch.stack([first, first + keys])[None, None, None]


# ---- initial values and training


def log_uniform(shape: tuple[int, ...], low: float, high: float, **options: Any) -> Tensor:
    """Numbers whose logarithms are uniform between those of low and high."""
    return torch.exp(torch.rand(shape, **options) * (math.log(high) - math.log(low)) + math.log(low))


def inverse_softplus(x: Tensor) -> Tensor:
    """y with functional.softplus(y) = x, for x > 0."""
    return x + torch.log(-torch.expm1(-x))


def parameter_groups(model: torch.nn.Module, weight_decay: float = 0.01) -> list[dict[str, Any]]:
    """Groups for an optimizer: weight decay for matrices, none for biases, norms, and what a module calls `undecayed`.

    A module names parameters that decay would spoil, such as a state-space model's eigenvalues and time steps, or
    lists of them, in its attribute `undecayed`.

        optimizer = torch.optim.AdamW(seqops.nn.parameter_groups(model), lr=1e-3)
    """
    exempt = {
        parameter
        for module in model.modules()
        for name, parameter in module.named_parameters()
        if name.split(".")[0] in getattr(module, "undecayed", ())
    }
    decayed, plain = [], []
    for parameter in model.parameters():
        (plain if parameter in exempt or parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
