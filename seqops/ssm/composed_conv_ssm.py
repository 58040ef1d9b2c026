"""conv_ssm from torch's convolutions and our linear_scan, block by block of frames.

    x_t = a x_{t-1} + b * u_t        y_t = 2 Re(c * x_t) + d * u_t

Everything is real arithmetic: `b` is one convolution with 2P outputs, real and imaginary parts in turn, which
`linear_scan` reads as P complex channels; `c` is one with 2P inputs and weights (2 Re c, -2 Im c).

The states of a block are written once and read once while the caches have them; no more than one block of them exists.
For the backward the state that enters each block is kept ("entering"), and the block is computed again.

Letters: B batch, T time, Y and X pixels, U channels of a frame, P complex channels of the state, N frames of a block
(of one or several rows of the batch), I and O inputs and outputs of a convolution.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

ops = torch.ops.seqops

# Bytes of the states of a block, by device: on the CPU what its caches hold, on a GPU what occupies it.
BLOCK_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
# Where frames are large, a block has this many of them up to this many bytes: one state in 16 is kept.
FRAMES, MOST_BYTES = 16, 64 << 20

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}
Span = tuple[int, int]


def precision_of(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def block_frames(u: Tensor, width: int) -> int:
    """Frames of a block, for states of `width` complex channels: of one row, or fewer steps of several rows."""
    frame = u.shape[2] * u.shape[3] * width * 2 * precision_of(u.dtype).itemsize
    fit = BLOCK_BYTES.get(u.device.type, BLOCK_BYTES["cpu"]) // frame
    return max(fit, min(FRAMES, MOST_BYTES // frame), 1)


def block_steps(u: Tensor, width: int) -> int:
    """Steps of a block: of one row on the CPU, on a GPU of as many rows as leave FRAMES of them."""
    frames = block_frames(u, width)
    if u.device.type != "cuda":
        return frames
    return torch.sym_max(frames // torch.sym_max(u.shape[0], 1), min(FRAMES, frames))


def entering_shape(u: Tensor, width: int) -> tuple[int, ...]:
    """[B, blocks - 1, Y, X, P]: the states that enter all blocks but the first."""
    batch, steps, rows, columns, _ = u.shape
    each = block_steps(u, width)
    return batch, (steps + each - 1) // each - (steps > 0), rows, columns, width


class Blocks(NamedTuple):
    rows: list[Span]  # of the batch
    steps: list[Span]


def blocks_of(u: Tensor, width: int) -> Blocks:
    """On the CPU one row and many steps, or all steps and many rows: u and y of a block then lie in one piece."""
    batch, steps = u.shape[:2]
    each = block_steps(u, width)
    together = max(block_frames(u, width) // max(min(each, steps), 1), 1)
    return Blocks(
        [(start, min(start + together, batch)) for start in range(0, batch, together)],
        [(start, min(start + each, steps)) for start in range(0, steps, each)],
    )


# ---- convolutions of frames [N, Y, X, I] with kernels [kh, kw, I, O], and their gradients


class Factors(NamedTuple):
    """A product that is yet to be made, where it can be added to what is there: [N Y X, I] times [I, O]."""

    left: Tensor
    right: Tensor


Term = Tensor | Factors


class Kernel:
    """A real kernel [kh, kw, I, O], made ready once for all blocks."""

    def __init__(self, values: Tensor) -> None:
        self.size = values.shape[:2]
        self.pointwise = self.size == (1, 1)
        # As torch's convolutions take it without a copy: [O, I, kh, kw]; in float32 its inputs innermost in memory.
        layout = torch.contiguous_format if values.dtype == torch.float64 else torch.channels_last
        oihw = values.permute(3, 2, 0, 1)
        self.values = values[0, 0] if self.pointwise else oihw.contiguous(memory_format=layout)
        # An even kernel has one more tap after a pixel than before it: convolved with equal margins, the first row
        # or column is one too many. (A wider kernel with a zero there would turn a NaN outside its reach into a NaN.)
        self.extra = [1 - size % 2 for size in self.size]
        self.margins = [size // 2 for size in self.size]

    def apply(self, frames: Tensor) -> Term:
        """[N, Y, X, I] -> [N, Y, X, O]."""
        if self.pointwise:
            return Factors(frames.flatten(0, 2), self.values)
        out = conv2d(frames.permute(0, 3, 1, 2), self.values, padding=self.margins)
        return out[:, :, self.extra[0] :, self.extra[1] :].permute(0, 2, 3, 1)

    def gradients(self, grad: Tensor, frames: Tensor, dkernel: Tensor, wants_frames: bool = True) -> Term | None:
        """That of the frames [N, Y, X, I], from that of the result [N, Y, X, O]; the kernel's is added to `dkernel`."""
        if self.pointwise:
            grad = grad.flatten(0, 2)
            dkernel[0, 0].addmm_(frames.flatten(0, 2).mT, grad)
            return Factors(grad, self.values.mT) if wants_frames else None
        grad = pad(grad, (0, 0, self.extra[1], 0, self.extra[0], 0))
        dframes, dvalues, _ = torch.ops.aten.convolution_backward(
            *(grad.permute(0, 3, 1, 2), frames.permute(0, 3, 1, 2), self.values, None),
            *([1, 1], self.margins, [1, 1], False, [0, 0], 1, [wants_frames, True, False]),
        )
        dkernel += dvalues.permute(2, 3, 1, 0)
        return dframes.permute(0, 2, 3, 1) if wants_frames else None


def write_sum(out: Tensor, *terms: Term | None) -> None:
    """The sum of one or two terms, into the block `out` [rows, steps, Y, X, O] of a sequence."""
    present = [term for term in terms if term is not None]
    tensors = [term for term in present if not isinstance(term, Factors)]
    products = [term for term in present if isinstance(term, Factors)]
    precision = precision_of(out.dtype)
    direct = out.dtype == precision and out.is_contiguous()
    target = out if direct else torch.empty(out.shape, dtype=precision, device=out.device)
    flat = target.view(-1, out.shape[-1])
    if len(tensors) == 2:
        torch.add(*tensors, out=target.view(tensors[0].shape))
    elif tensors:
        target.view(tensors[0].shape).copy_(tensors[0])
    else:
        torch.mm(*products.pop(0), out=flat)
    for term in products:
        flat.addmm_(*term)
    if target is not out:
        out.copy_(target)


class Kernels:
    """The kernels of a call, in the dtype that it computes in."""

    def __init__(self, u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None) -> None:
        self.precision = precision_of(u.dtype)
        self.width = a.shape[0]
        self.a = a.resolve_conj().resolve_neg().view(1, 1, 1, 1, -1)
        self.b = Kernel(torch.view_as_real(b.resolve_conj()).flatten(-2))
        # 2 Re(c x) = 2 Re c Re x - 2 Im c Im x.
        self.c = Kernel(torch.view_as_real(2 * c.conj().resolve_conj()).movedim(-1, -2).flatten(2, 3))
        self.d = None if d is None else Kernel(d.to(self.precision))

    def frames(self, sequence: Tensor) -> Tensor:
        """A block of a sequence [rows, steps, Y, X, I], as frames [N, Y, X, I]."""
        return sequence.to(self.precision).flatten(0, 1).contiguous()

    def as_states(self, term: Term, block: Tensor) -> Tensor:
        """2P channels of each pixel of a block [rows, steps, Y, X, ...], as complex states [rows, steps, Y, X, P]."""
        values = term.left @ term.right if isinstance(term, Factors) else term.contiguous()
        return torch.view_as_complex(values.view(*block.shape[:4], self.width, 2))

    def forward(self, u: Tensor, state: Tensor | None, y: Tensor) -> Tensor:
        """y of a block [rows, steps, Y, X, U]; returns the state [rows, Y, X, P] after it."""
        frames = self.frames(u)
        states, state = self.recall(u, frames, state)
        skip = None if self.d is None else self.d.apply(frames)
        write_sum(y, self.c.apply(as_frames(states)), skip)
        return state

    def recall(self, u: Tensor, frames: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """The states [rows, steps, Y, X, P] of a block, and the last one."""
        return ops.linear_scan(self.as_states(self.b.apply(frames), u), self.a, state)

    def backward(
        self,
        sums: Sums,
        u: Tensor,
        dy: Tensor | None,
        state: Tensor | None,
        dstate: Tensor | None,
        du: Tensor | None,
    ) -> Tensor:
        """du of a block and, added to `sums`, its part in all other gradients.

        `state` entered the block; `dstate` is the gradient of the one that left it. Returns that of `state`.
        """
        frames = self.frames(u)
        states, _ = self.recall(u, frames, state)
        dstates, through = None, None
        if dy is not None:
            grad = self.frames(dy)
            dstates = self.as_states(self.c.gradients(grad, as_frames(states), sums.dc), dy)
            if self.d is not None:
                through = self.d.gradients(grad, frames, sums.dd, du is not None)
        g, da, dstate = ops.linear_scan_backward(dstates, dstate, self.a, states, state)
        sums.da.add_(da)
        dframes = self.b.gradients(as_frames(g), frames, sums.db, du is not None)
        if du is not None:
            write_sum(du, dframes, through)
        return dstate


class Sums(NamedTuple):
    """Gradients of the parameters, in real arithmetic: those of the real kernels that Kernels makes of b and c."""

    da: Tensor  # [1, 1, 1, 1, P] complex
    db: Tensor  # [kh, kw, U, 2P]
    dc: Tensor  # [kh, kw, 2P, U]
    dd: Tensor  # [kh, kw, U, U], or nothing


def as_frames(states: Tensor) -> Tensor:
    """Complex states [rows, steps, Y, X, P] as frames [N, Y, X, 2P]."""
    return torch.view_as_real(states).flatten(-2).flatten(0, 1)


# ---- torch's settings


@contextlib.contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast inside, and of cuDNN only algorithms that give the same bits in every run."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with torch._C._DisableAutocast():
        if device.type != "cuda":
            yield
            return
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            cudnn.deterministic, cudnn.benchmark = before


# ---- both passes


def march(
    kernels: Kernels, u: Tensor, a: Tensor, initial_state: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, the final state and, with `keep`, the states that enter the blocks."""
    blocks = blocks_of(u, kernels.width)
    y = u.new_empty(u.shape)
    final_state = a.new_empty(u.shape[0], *u.shape[2:4], kernels.width)
    entering = a.new_empty(entering_shape(u, kernels.width)) if keep else None
    for rows in blocks.rows:
        mine = slice(*rows)
        state = None if initial_state is None else initial_state[mine]
        for i, steps in enumerate(blocks.steps):
            if entering is not None and i > 0:
                entering[mine, i - 1] = state
            state = kernels.forward(u[mine, slice(*steps)], state, y[mine, slice(*steps)])
        final_state[mine] = 0 if state is None else state
    return y, final_state, entering


def march_back(
    kernels: Kernels,
    dy: Tensor | None,
    dfinal_state: Tensor | None,
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None,
    initial_state: Tensor | None,
    entering: Tensor,
    wants_u: bool,
) -> tuple[Tensor, ...]:
    """All gradients; those of d and of a u that is not wanted are empty."""
    blocks, width = blocks_of(u, kernels.width), kernels.width
    real = {"dtype": kernels.precision, "device": u.device}
    du = u.new_empty(u.shape if wants_u else 0)
    dinitial_state = a.new_empty(u.shape[0], *u.shape[2:4], width)
    sums = Sums(
        torch.zeros_like(kernels.a),
        torch.zeros(*b.shape[:3], 2 * width, **real),
        torch.zeros(*c.shape[:2], 2 * width, c.shape[3], **real),
        torch.zeros((0,) if d is None else d.shape, **real),
    )
    for rows in blocks.rows:
        mine = slice(*rows)
        first = None if initial_state is None else initial_state[mine]
        dstate = None if dfinal_state is None else dfinal_state[mine]
        for i, steps in reversed([*enumerate(blocks.steps)]):
            block = mine, slice(*steps)
            state = entering[mine, i - 1] if i else first
            into = du[block] if wants_u else None
            dstate = kernels.backward(sums, u[block], None if dy is None else dy[block], state, dstate, into)
        dinitial_state[mine] = 0 if dstate is None else dstate

    db = torch.view_as_complex(sums.db.unflatten(-1, (width, 2)))
    # Of (2 Re c, -2 Im c).
    dc = torch.view_as_complex(sums.dc.unflatten(2, (width, 2)).movedim(3, -1).contiguous())
    dc = (2 * dc).conj().resolve_conj()
    return du, sums.da.flatten(), db, dc, sums.dd if d is None else sums.dd.to(d.dtype), dinitial_state


# ---- operators


def conv_ssm(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with exact(u.device):
        return march(Kernels(u, a, b, c, d), u, a, initial_state, False)[:2]


def conv_ssm_forward(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Also the states that enter the blocks, [B, blocks - 1, Y, X, P]."""
    with exact(u.device):
        return march(Kernels(u, a, b, c, d), u, a, initial_state, True)


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
    with exact(u.device):
        return march_back(Kernels(u, a, b, c, d), dy, dfinal_state, u, a, b, c, d, initial_state, entering, wants_u)
