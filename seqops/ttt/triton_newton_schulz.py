"""Launchers of the Triton kernels of newton_schulz; letters as in triton_kernels_newton_schulz.py.

Products of 16-bit matrices take 16-bit operands: the iterate is rounded after each step. The adjoint is linear in the
gradient, which is carried at norm 1, so that float16 holds it. Of float32 each product is three of tf32 halves, or one
where the user allows that.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from ..core import choose
from . import tiles_newton_schulz as tiles
from . import triton_kernels_newton_schulz as kernels

INTERPRETED = triton.knobs.runtime.interpret
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
MUON_STEPS = (3.4445, -4.7750, 2.0315) * 5
PAD = 16  # numbers: what products of blocks and wide accesses need
ROWS, COLUMNS = 32, 64  # of a tile that is read and written once
PIECES = 64 if INTERPRETED else 1024  # tiles of a norm that are added together
ONCE = {"num_warps": 4, "num_stages": 1}


def launch(kernel: Any, like: Tensor, programs: int, arguments: dict[str, Any], options: dict[str, Any]) -> None:
    if not (like.is_cuda or INTERPRETED):
        raise RuntimeError(f"triton kernels take CUDA tensors; {like.device} needs TRITON_INTERPRET=1 from the start")
    with torch.cuda.device(like.device) if like.is_cuda else contextlib.nullcontext():
        kernel[(programs,)](**arguments, **options)


def real_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def two(name: str, value: float) -> dict[str, float]:
    """Kernels take numbers in float32: one, and what is left of it."""
    first = torch.tensor(value, dtype=torch.float32).item()
    return {name: first, f"{name}_rest": value - first}


def strides(name: str, x: Tensor) -> dict[str, int]:
    return {f"stride_{name}_{dim}": x.stride(i) for i, dim in enumerate("nrc")}


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def precision(dtype: torch.dtype) -> str:
    """Of the products: the user says whether float32 may be rounded to tf32; else each is three of tf32 halves.

    The attribute tells of both ways in which torch lets him say so.
    """
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


SOURCES = (tiles.__file__, __file__, str(Path(__file__).with_name("triton_kernels_newton_schulz.py")))
TUNABLES = {
    direction: choose.Tunable(f"newton_schulz.{direction}.triton", tiles.problem, SOURCES)
    for direction in ("forward", "backward")
}


@lru_cache(maxsize=4096)
def key_of(direction: str, dtype: str, count: int, rows: int, columns: int) -> choose.Key:
    """Sizes are rounded up, so that few choices exist."""
    sizes = (("n", count), ("M", min(rows, columns)), ("N", max(rows, columns)))
    buckets = tuple(choose.bucket(name, value, tiles.POWERS, 2 * tiles.POWERS[-1]) for name, value in sizes)
    return choose.Key(f"newton_schulz.{direction}.triton", dtype, buckets)


def tile_of(direction: str, x: Tensor) -> tiles.Tile:
    """x [n, rows, columns]"""
    dtype, tunable = name_of(x.dtype), TUNABLES[direction]
    if x.is_cuda:
        chosen = choose.solution(tunable, key_of(direction, dtype, *x.shape), x.device)
    else:
        chosen = choose.forced_solution(tunable.name)
    return tiles.INTERPRETED if chosen is None else tiles.shape(dtype, chosen["rows"])


class Call:
    """n matrices [rows, columns], wide, in any memory order, and the padded sizes of those that kernels make."""

    def __init__(self, direction: str, x: Tensor, coefficients: Sequence[float] | None, eps: float) -> None:
        self.shape, self.tall = x.shape, x.shape[-2] > x.shape[-1]
        numbers = [*(MUON_STEPS if coefficients is None else coefficients)]
        self.steps = [tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
        self.x = self.wide(x)
        self.n, self.rows, self.columns = self.x.shape
        self.m, self.N = (blocks(size, PAD) * PAD for size in (self.rows, self.columns))
        self.real, self.eps = real_of(x.dtype), eps
        self.tile, self.precision = tile_of(direction, self.x), precision(x.dtype)

    def wide(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, *x.shape[-2:])
        return flat.mT if self.tall else flat

    def norms(self, x: Tensor) -> Tensor:
        """[n]"""
        pieces = blocks(self.rows, ROWS) * blocks(self.columns, COLUMNS)
        most, total = (x.new_empty(self.n, pieces, dtype=self.real) for _ in range(2))
        arguments = {
            "p_x": x,
            "p_most": most,
            "p_sum": total,
            "rows": self.rows,
            "columns": self.columns,
            **strides("x", x),
            "BLOCK_R": ROWS,
            "BLOCK_C": COLUMNS,
        }
        launch(kernels.newton_schulz_sizes, x, self.n * pieces, arguments, ONCE)
        norm = x.new_empty(self.n, dtype=self.real)
        arguments = {"p_most": most, "p_sum": total, "p_norm": norm, "tiles": pieces, "BLOCK": PIECES}
        launch(kernels.newton_schulz_norms, x, self.n, arguments, ONCE)
        return norm

    def scale(self, x: Tensor, norm: Tensor, eps: float, y: Tensor) -> Tensor:
        """y: x / (norm + eps), beyond the last row and column of x zeros."""
        arguments = {
            "p_x": x,
            "p_norm": norm,
            "p_y": y,
            **two("eps", eps),
            "rows": self.rows,
            "columns": self.columns,
            **strides("x", x),
            "rows_y": y.shape[1],
            "columns_y": y.shape[2],
            **strides("y", y),
            "BLOCK_R": ROWS,
            "BLOCK_C": COLUMNS,
        }
        programs = self.n * blocks(y.shape[1], ROWS) * blocks(y.shape[2], COLUMNS)
        launch(kernels.newton_schulz_scale, x, programs, arguments, ONCE)
        return y

    def padded(self, dtype: torch.dtype | None = None) -> Tensor:
        return self.x.new_empty(self.n, self.m, self.N, dtype=dtype)

    def gram(
        self,
        x: Tensor,
        y: Tensor | None = None,
        alpha: float = 1.0,
        e: Tensor | None = None,
        beta: float = 0.0,
    ) -> Tensor:
        """alpha x x^T, or alpha (x y^T + y x^T), and beta e."""
        out = x.new_empty(self.n, self.m, self.m)
        arguments = {
            "p_x": x,
            "p_y": x if y is None else y,
            "p_e": x if e is None else e,
            "p_c": out,
            **two("alpha", alpha),
            **two("beta", beta),
            "m": self.m,
            "K": x.shape[2],
            "PAIR": y is not None,
            "ADD": e is not None,
            "PRECISION": self.precision,
            "BM": self.tile.rows,
            "BK": self.tile.depth,
        }
        rows = blocks(self.m, self.tile.rows)
        programs = self.n * (rows * (rows + 1) // 2)
        launch(kernels.newton_schulz_gram, x, programs, arguments, self.tile.options())
        return out

    def step(
        self, a: float, p: Tensor, y: Tensor, out: Tensor, q: Tensor | None = None, x: Tensor | None = None
    ) -> Tensor:
        """out: a y + p y + q x."""
        arguments = {
            "p_p": p,
            "p_y": y,
            "p_q": p if q is None else q,
            "p_x": y if x is None else x,
            "p_out": out,
            **two("a", a),
            "m": self.m,
            "N": self.N,
            "rows": out.shape[1],
            "columns": out.shape[2],
            **strides("out", out),
            "PAIR": q is not None,
            "PRECISION": self.precision,
            "BM": self.tile.rows,
            "BN": self.tile.columns,
            "BK": self.tile.depth,
        }
        programs = self.n * blocks(self.m, self.tile.rows) * blocks(self.N, self.tile.columns)
        launch(kernels.newton_schulz_step, y, programs, arguments, self.tile.options())
        return out


def iterate(call: Call, shape: tiles.Whole, to: Tensor) -> None:
    """One launch for each run of equal steps."""
    norm, y = call.x.new_empty(call.n, dtype=call.real), call.x.new_empty(call.n, shape.rows, call.N)
    runs = [(step, len([*same])) for step, same in itertools.groupby(call.steps)]
    for i, ((a, b, c), steps) in enumerate(runs):
        arguments = {
            "p_x": call.x,
            "p_norm": norm,
            "p_y": y,
            "p_out": to,
            "begin": int(i == 0),
            "finish": int(i == len(runs) - 1),
            "steps": steps,
            **two("eps", call.eps),
            **two("a", a),
            **two("b", b),
            **two("c", c),
            "N": call.N,
            "rows": call.rows,
            "columns": call.columns,
            **strides("x", call.x),
            **strides("out", to),
            "PRECISION": call.precision,
            "BM": shape.rows,
            "BN": shape.columns,
        }
        launch(kernels.newton_schulz_whole, to, call.n, arguments, shape.options())


def newton_schulz(x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    call = Call("forward", x, coefficients, eps)
    to, whole = call.wide(out), tiles.whole(name_of(x.dtype), call.rows, call.columns)
    if call.steps and whole is not None:
        iterate(call, whole, to)
        return out
    norm = call.norms(call.x)
    if not call.steps:
        call.scale(call.x, norm, eps, to)
        return out
    now, other = call.padded(), call.padded() if len(call.steps) > 1 else None
    call.scale(call.x, norm, eps, now)
    for i, (a, b, c) in enumerate(call.steps):
        gram = call.gram(now)
        product = call.gram(gram, None, c, gram, b)
        now, other = call.step(a, product, now, to if i == len(call.steps) - 1 else other), now
    return out


def newton_schulz_backward(
    dx: Tensor, x: Tensor, coefficients: Sequence[float] | None = None, eps: float = 1e-7
) -> Tensor:
    """The gradient of x, from that of the result."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    call = Call("backward", x, coefficients, eps)
    norm = call.norms(call.x)
    kept = []  # X, A and b A + c A A of each step
    now = call.scale(call.x, norm, eps, call.padded()) if call.steps else None
    for i, (a, b, c) in enumerate(call.steps):
        gram = call.gram(now)
        product = call.gram(gram, None, c, gram, b)
        kept.append((now, gram, product))
        if i < len(call.steps) - 1:
            now = call.step(a, product, now, call.padded())
    grad = call.wide(dx)
    size = call.norms(grad)
    y = call.scale(grad, size, 0.0, call.padded(None if call.steps else call.real))
    for i in reversed(range(len(call.steps))):
        (a, b, c), (now, gram, product) = call.steps[i], kept.pop()
        s = call.gram(y, now)
        q = call.gram(gram, s, c, s, b)
        y = call.step(a, product, y, call.padded(None if i else call.real), q, now)
    end(call, norm, size, y, call.wide(out))
    return out


def end(call: Call, norm: Tensor, size: Tensor, y: Tensor, dx: Tensor) -> None:
    """dx from the gradient of X_0 over `size`."""
    pieces = blocks(call.rows, ROWS) * blocks(call.columns, COLUMNS)
    common = {
        "p_x": call.x,
        "p_norm": norm,
        "p_y": y,
        **two("eps", call.eps),
        "rows": call.rows,
        "columns": call.columns,
        **strides("x", call.x),
        "m": call.m,
        "N": call.N,
        "BLOCK_R": ROWS,
        "BLOCK_C": COLUMNS,
    }
    inner = norm.new_empty(call.n, pieces)
    launch(kernels.newton_schulz_inner, dx, call.n * pieces, {**common, "p_inner": inner}, ONCE)
    arguments = {**common, "p_inner": inner.sum(1), "p_size": size, "p_dx": dx, **strides("dx", dx)}
    launch(kernels.newton_schulz_end, dx, call.n * pieces, arguments, ONCE)


# ---- the list


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched, for the compiler: kernel, types, constants, options."""

    def listed(kernel: Any, constants: dict[str, Any], options: dict[str, Any], **pointers: torch.dtype) -> Any:
        types = {name: f"*{TYPES[pointers[name]]}" for name in kernel.arg_names if name.startswith("p_")}
        numbers = ("a", "b", "c", "alpha", "beta", "eps")
        types |= {f"{name}{rest}": "fp32" for name in numbers for rest in ("", "_rest") if name in kernel.arg_names}
        types |= {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
        found = {"kernel": kernel, "types": types, "constants": constants, "options": options}
        given = () if "BK" in constants else ("p_x", "p_out")  # tensors that may lie anywhere
        # Every run of the tests compiles the products of one dtype, and norms.
        often = kernel is kernels.newton_schulz_sizes if x == torch.float32 else "PRECISION" in constants
        if x in (torch.float16, torch.float64) or not often or pointers.get("p_out", x) != x:
            found["seldom"] = True
        padded = [name for name in types if (name.startswith("p_") and name not in given) or name in ("m", "N", "K")]
        return found | ({"divisible": padded} if "PRECISION" in constants else {})

    tile = {"BLOCK_R": ROWS, "BLOCK_C": COLUMNS}
    for x in TYPES:
        real = real_of(x)
        sizes = dict.fromkeys(("p_norm", "p_most", "p_sum", "p_inner", "p_size"), real)
        yield listed(kernels.newton_schulz_sizes, tile, ONCE, **sizes, p_x=x)
        if x == real:
            yield listed(kernels.newton_schulz_norms, {"BLOCK": PIECES}, ONCE, **sizes)
        for y in dict.fromkeys((x, real)):
            yield listed(kernels.newton_schulz_scale, tile, ONCE, **sizes, p_x=x, p_y=y)
        for kernel in (kernels.newton_schulz_inner, kernels.newton_schulz_end):
            yield listed(kernel, tile, ONCE, **sizes, p_x=x, p_y=real, p_dx=x)
        for how in ("tf32x3", "tf32") if x == torch.float32 else ("ieee",):
            for shape in tiles.WHOLE[name_of(x)]:
                constants = {"PRECISION": how, "BM": shape.rows, "BN": shape.columns}
                pointers = {**sizes, "p_x": x, "p_y": x, "p_out": x}
                yield listed(kernels.newton_schulz_whole, constants, shape.options(), **pointers)
            for shape in tiles.SHAPES[name_of(x)]:
                common = {"PRECISION": how, "BM": shape.rows, "BK": shape.depth}
                pointers = dict.fromkeys(("p_x", "p_y", "p_e", "p_c", "p_p", "p_q"), x)
                for pair, add in ((False, False), (False, True), (True, False), (True, True)):
                    constants = {**common, "PAIR": pair, "ADD": add}
                    yield listed(kernels.newton_schulz_gram, constants, shape.options(), **pointers)
                for pair, out in dict.fromkeys(((False, x), (True, x), (True, real))):
                    constants = {**common, "PAIR": pair, "BN": shape.columns}
                    yield listed(kernels.newton_schulz_step, constants, shape.options(), **pointers, p_out=out)
