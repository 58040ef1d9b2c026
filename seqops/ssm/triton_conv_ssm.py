"""Launchers of conv_ssm's Triton kernel, and what it is composed of where that kernel does not serve or does not pay.

Letters as in triton_kernels_conv_ssm.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core import choose
from . import composed_conv_ssm as composed
from . import tiles_conv_ssm as tiles
from . import triton_kernels_conv_ssm as kernels
from .triton_kernels_conv_ssm import BACKWARD, FORWARD, RECALL

INTERPRETED = triton.knobs.runtime.interpret
# In the interpreter, which has no device to choose for.
INTERPRETED_CHOICE = {"joined": 1, "rows": 16}
BK = 16  # channels of a product at a time
WALKS = {FORWARD.value: "forward", RECALL.value: "recall", BACKWARD.value: "backward"}

SOURCES = (
    tiles.__file__,
    __file__,
    *(str(Path(__file__).with_name(name)) for name in ("triton_kernels_conv_ssm.py", "composed_conv_ssm.py")),
)
TUNABLES = {walk: choose.Tunable(f"conv_ssm.{walk}.triton", tiles.problem, SOURCES) for walk in ("forward", "backward")}


@lru_cache(maxsize=4096)
def key_of(
    walk: str, dtype: torch.dtype, pixels: int, steps: int, channels: int, width: int, given: bool
) -> choose.Key:
    """Sizes are rounded up, so that few choices exist."""
    count, wide = tiles.blocks(width)
    sizes = (
        *(choose.bucket(n, v, tiles.POWERS, 2 * tiles.POWERS[-1]) for n, v in (("M", pixels), ("T", steps))),
        choose.bucket("U", channels, tiles.POWERS, 2 * tiles.POWERS[-1]),
        choose.Size("P", count * wide, "<="),
    )
    name = f"conv_ssm.{walk}.triton"
    return choose.Key(name, str(dtype).removeprefix("torch."), sizes, ("given",) if given else ())


def choice(walk: str, u: Tensor, width: int, given: bool) -> choose.Solution:
    tunable, (batch, steps, height, columns, channels) = TUNABLES[walk], u.shape
    if u.is_cuda:
        key = key_of(walk, u.dtype, batch * height * columns, steps, channels, width, given)
        return choose.solution(tunable, key, u.device)
    return choose.forced_solution(tunable.name) or INTERPRETED_CHOICE


def precision() -> str:
    """Of the products: the user says whether float32 may be rounded to tf32; else each is three of tf32 halves.

    The attribute tells of both ways in which torch lets him say so.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def options(width: int) -> dict[str, Any]:
    """Of the compiler. Left to itself, ptxas saves registers by spilling a word or two."""
    warps = tiles.warps(width)
    return {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": True, "maxnreg": min(255, 65536 // (32 * warps))}


def dense_frames(block: Tensor) -> Tensor:
    """[rows, steps, Y, X, I] with the pixels of a frame in one piece."""
    frame = block[0, 0]
    return block if frame.is_contiguous() else block.contiguous()


def real_view(value: Any) -> Any:
    return torch.view_as_real(value) if isinstance(value, Tensor) and value.is_complex() else value


def constants(
    form: tl.constexpr, inside: bool, out: bool, skip: bool, how: str, rows: int, width: int
) -> dict[str, Any]:
    count, wide = tiles.blocks(width)
    flags = {"PASS": form.value, "IN": inside, "OUT": out, "SKIP": skip, "PRECISION": how}
    return {**flags, "NP": count, "BM": rows, "BP": wide, "BK": BK, "BN": max(wide, 32)}


class Joined(composed.Kernels):
    """The kernels of a call whose scan and output products are one kernel; the input product too, if b is one pixel."""

    def __init__(self, u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, rows: int) -> None:
        super().__init__(u, a, b, c, d)
        self.rows = rows
        self.gate = self.a.reshape(-1).contiguous()
        self.how = precision()
        self.w_in = torch.stack((b[0, 0].real, b[0, 0].imag)) if self.b.pointwise else None
        self.w_out = torch.stack((2 * c[0, 0].real, -2 * c[0, 0].imag))
        self.skip = None if self.d is None else self.d.values.contiguous()

    def launch(
        self,
        form: tl.constexpr,
        block: Tensor,
        weights: tuple[Tensor | None, Tensor | None, Tensor | None],
        states: dict[str, Tensor | None],
        out: Tensor | None,
    ) -> Tensor:
        """One walk over a block [rows, steps, Y, X, I]; returns what is carried out of it, [rows, Y, X, P]."""
        w_in, w_out, skip = weights
        rows, steps, height, columns, inputs = block.shape
        last = self.gate.new_empty(rows, height, columns, self.width)
        present = {name: t.contiguous() for name, t in states.items() if t is not None}
        source = dense_frames(block) if w_in is not None else block
        target = last if out is None else out
        arguments = {
            "p_in": source,
            "p_w_in": last if w_in is None else w_in.contiguous(),
            "p_a": self.gate,
            "p_initial": last,
            "p_states": last,
            "p_out": target,
            "p_w_out": last if w_out is None else w_out.contiguous(),
            "p_skip": last if skip is None else skip.contiguous(),
            "p_last": last,
            "p_carry": last,
            "p_g": last,
            "p_da": last,
            **{f"p_{name}": t for name, t in present.items()},
            "M": rows * height * columns,
            "pixels": height * columns,
            "T": steps,
            "I": inputs,
            "O": 0 if out is None else out.shape[-1],
            "P": self.width,
            "parts": 2 * tiles.blocks(self.width)[0],
            "initial_rows": rows * height * columns if "initial" in present else 0,
            "carry_rows": rows * height * columns if "carry" in present else 0,
            "stride_in_b": source.stride(0),
            "stride_in_t": source.stride(1),
            "stride_out_b": target.stride(0),
            "stride_out_t": target.stride(1),
            **constants(form, w_in is not None, out is not None, skip is not None, self.how, self.rows, self.width),
        }
        if not (block.is_cuda or INTERPRETED):
            raise RuntimeError(
                f"triton kernels take CUDA tensors; {block.device} needs TRITON_INTERPRET=1 from the start"
            )
        with torch.cuda.device(block.device) if block.is_cuda else contextlib.nullcontext():
            kernels.conv_ssm_march[(self.programs(block),)](
                **{name: real_view(value) for name, value in arguments.items()},
                **options(self.width),
            )
        return last

    def programs(self, block: Tensor) -> int:
        return -(-block.shape[0] * block.shape[2] * block.shape[3] // self.rows)

    def forward(self, u: Tensor, state: Tensor | None, y: Tensor) -> Tensor:
        weights = self.w_in, self.w_out, self.skip
        if self.w_in is not None:
            return self.launch(FORWARD, u, weights, {"initial": state}, y)
        frames = self.frames(u)
        moved = self.as_states(self.b.apply(frames), u)
        if self.skip is None:
            return self.launch(FORWARD, moved, weights, {"initial": state}, y)
        # The kernel's products of u are those of its own input: here d's is added afterwards.
        read = torch.empty(y.shape, dtype=self.precision, device=y.device)
        state = self.launch(FORWARD, moved, (None, self.w_out, None), {"initial": state}, read)
        composed.write_sum(y, read.flatten(0, 1), self.d.apply(frames))
        return state

    def recall(self, u: Tensor, frames: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.w_in is None:
            return super().recall(u, frames, state)
        states = self.gate.new_empty(*u.shape[:4], self.width)
        last = self.launch(RECALL, u, (self.w_in, None, None), {"initial": state, "states": states}, None)
        return states, last

    def backward(
        self,
        sums: composed.Sums,
        u: Tensor,
        dy: Tensor | None,
        state: Tensor | None,
        dstate: Tensor | None,
        du: Tensor | None,
    ) -> Tensor:
        if dy is None:
            return super().backward(sums, u, dy, state, dstate, du)
        inside = self.w_in is not None and du is not None
        frames = self.frames(u)
        states, _ = self.recall(u, frames, state)
        g = torch.empty_like(states)
        da = self.gate.new_empty(self.programs(u), self.width)
        weights = (
            self.w_out.mT,
            self.w_in.mT if inside else None,
            self.skip.mT if inside and self.skip is not None else None,
        )
        sequences = {"initial": state, "carry": dstate, "states": states, "g": g, "da": da}
        dstate = self.launch(BACKWARD, dy, weights, sequences, du if inside else None)
        sums.da.add_(da.sum(0))
        grad = self.frames(dy)
        wanted = du is not None and not inside
        self.c.gradients(grad, composed.as_frames(states), sums.dc)
        through = None if self.d is None else self.d.gradients(grad, frames, sums.dd, wanted)
        dframes = self.b.gradients(composed.as_frames(g), frames, sums.db, wanted)
        if wanted:
            composed.write_sum(du, dframes, through)
        return dstate


def kernels_of(walk: str, u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> composed.Kernels:
    """The joined kernel, where it can serve and is thought to pay."""
    outputs = [c] if d is None else [c, d]
    can = all(kernel.shape[:2] == (1, 1) for kernel in outputs) and u.dtype != torch.float64
    if can and tiles.fits(walk, tiles.ROWS[0], a.shape[0]) and u.numel():
        chosen = choice(walk, u, a.shape[0], b.shape[:2] != (1, 1))
        if chosen["joined"]:
            return Joined(u, a, b, c, d, chosen["rows"])
    return composed.Kernels(u, a, b, c, d)


# ---- operators


def conv_ssm(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with composed.exact(u.device):
        return composed.march(kernels_of("forward", u, a, b, c, d), u, a, initial_state, False)[:2]


def conv_ssm_forward(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Also the states that enter the blocks, [B, blocks - 1, Y, X, P]."""
    with composed.exact(u.device):
        return composed.march(kernels_of("forward", u, a, b, c, d), u, a, initial_state, True)


def conv_ssm_backward(
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    *,
    wants_u: bool = True,
) -> tuple[Tensor, ...]:
    with composed.exact(u.device):
        mine = kernels_of("backward", u, a, b, c, d)
        return composed.march_back(mine, dy, dfinal_state, u, a, b, c, d, initial_state, entering, wants_u)


# ---- what is shipped

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDTHS = (16, 32, 64, 128, 256)


def ways() -> Iterator[tuple[tl.constexpr, bool, bool, bool]]:
    """PASS, IN, OUT and SKIP."""
    yield from ((FORWARD, inside, True, skip) for inside, skip in ((True, True), (True, False), (False, False)))
    yield RECALL, True, False, False
    yield from ((BACKWARD, True, out, skip) for out, skip in ((True, True), (True, False), (False, False)))


def configurations() -> Iterator[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    kernel = kernels.conv_ssm_march
    for dtype, (form, inside, out, skip), how in itertools.product(TYPES, ways(), ("tf32x3", "tf32")):
        walk = WALKS[form.value]
        for width, rows in itertools.product(WIDTHS, tiles.ROWS):
            if not tiles.fits(walk, rows, width):
                continue
            pointers = {name: "*fp32" for name in kernel.arg_names if name.startswith("p_")}
            pointers |= {"p_in": f"*{TYPES[dtype]}"} if inside else {}
            pointers |= {"p_out": f"*{TYPES[dtype]}"} if out else {}
            fixed = constants(form, inside, out, skip, how, rows, width)
            sizes = {name: "i32" for name in kernel.arg_names if name not in pointers and name not in fixed}
            chosen = options(width)
            yield {"kernel": kernel, "types": pointers | sizes, "constants": fixed, "options": chosen}
