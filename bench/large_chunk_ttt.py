"""Cases of large_chunk_ttt, on the CPU and on a GPU.

Letters: B batch, T time, H heads, D channels, F hidden channels, C tokens of a chunk.

Peers compute the same result:

* `plain bmm` is what a user writes in torch: batched matrix products chunk by chunk, differentiated by autograd.
* `plain bmm, compiled` is the same through torch.compile, on a GPU.

The yardstick `sgemm` is one matrix product of 2048 columns with exactly as many operations as are counted: the share of
its rate that ours reaches is its ratio. Counted are, for each token and head, `18 D F` operations forward and `36 D F`
backward, nothing that is computed again; with Muon also the steps of Newton-Schulz by plain products, three times in
training. Bytes count q, k, v, o, rates, weights and their gradients once for each pass. The float64 reference is plain
bmm in float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import silu

from bench import newton_schulz
from bench.harness import FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

PLAIN, COMPILED, SGEMM = "plain bmm", "plain bmm, compiled", "sgemm"
RESULTS = ("o", "w0", "w1", "w2", "m0", "m1", "m2")


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    D: int
    F: int
    C: int
    dtype: torch.dtype = torch.float32
    optimizer: str = "gd"
    order: str = "apply_update"
    momentum: bool = False

    @property
    def letters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in "BTHDFC"}

    @property
    def options(self) -> dict[str, str]:
        return {"optimizer": self.optimizer, "order": self.order}

    def count_bytes(self, mode: str) -> int:
        tokens = self.B * self.T * self.H * (4 * self.D + 3) * self.dtype.itemsize
        weights = 2 * 3 * 4 * self.B * self.H * self.D * self.F
        return (3 if mode == TRAINING else 1) * (tokens + weights)

    def count_flops(self, mode: str) -> int:
        heads, chunks = self.B * self.H, self.T // self.C
        learnt = 12 * self.D * self.F * heads * (chunks * self.C if self.order == "apply_update" else self.T)
        flops = learnt + 6 * self.D * self.F * heads * self.T
        if self.optimizer == "muon":
            steps = len(newton_schulz.STEPS)
            flops += 3 * heads * chunks * steps * newton_schulz.step_flops(self.F, self.D)
        return (3 if mode == TRAINING else 1) * flops


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`; rates and weights are float32 beside 16 bits.

    Keys and queries have length 1, as models make them.
    """
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    B, H, D, F = shape.B, shape.H, shape.D, shape.F
    tensors = {}
    for name in "qkv":
        values = normal(B, steps, H, D)
        values = values if name == "v" else values / values.norm(dim=-1, keepdim=True)
        tensors[name] = values.to(shape.dtype).to(dtype)
    for name, sizes in (("w0", (F, D)), ("w1", (D, F)), ("w2", (F, D))):
        tensors[name] = (normal(B, H, *sizes) * sizes[-1] ** -0.5).to(wide)
    tensors["lr"] = (0.01 * normal(B, steps, H, 3).sigmoid()).to(wide)
    if shape.momentum:
        tensors["momentum"] = normal(B, steps, H).sigmoid().to(wide)
    return {name: t.requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)
    # Fewer steps than asked for are a trial, which learns too.
    chunk_size = min(shape.C, steps) if steps < shape.T else shape.C

    def run() -> dict[str, Tensor]:
        outputs = function(**leaves, chunk_size=chunk_size, **shape.options)
        # Without momentum the momentum's states have no gradient.
        return dict(zip(RESULTS[: 7 if shape.momentum else 4], outputs, strict=False))

    return Contender(run, leaves)


def build_sgemm(flops: int, dtype: torch.dtype, steps: int, device: str = "cpu") -> Contender:
    """One product of so many operations; on a GPU, where every dtype has its own rate, in the dtype of ours."""
    dtype = torch.float32 if device == "cpu" else dtype
    rows = max(1, round(flops / (2 * 2048**2)))
    a, b = torch.randn(rows, 2048, device=device, dtype=dtype), torch.randn(2048, 2048, device=device, dtype=dtype)
    product = torch.empty(rows, 2048, device=device, dtype=dtype)

    def run() -> dict[str, Tensor]:
        torch.mm(a, b, out=product)
        return {}

    return Contender(run, {})


def call_ours(**inputs: object) -> tuple[Tensor, ...]:
    import seqops

    return seqops.large_chunk_ttt(**inputs)


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    lr: Tensor,
    chunk_size: int,
    momentum: Tensor | None = None,
    optimizer: str = "gd",
    order: str = "apply_update",
) -> tuple[Tensor, ...]:
    """Chunk by chunk; with 16-bit q, k, v the products take operands of 16 bits."""
    T, dtype = q.shape[1], q.dtype
    # heads in front: [B, H, T, ...]
    q, k, v, lr = (t.transpose(1, 2) for t in (q, k, v, lr))
    weights, sums = [w0, w1, w2], [torch.zeros_like(w) for w in (w0, w1, w2)]
    norms = [w.norm(dim=-1, keepdim=True) for w in weights]
    outputs = []

    def apply(at: slice) -> None:
        low, x = [w.to(dtype) for w in weights], q[:, :, at]
        outputs.append((silu(x @ low[0].mT) * (x @ low[2].mT)) @ low[1].mT)

    def update(at: slice) -> None:
        low, x, y, rates = [w.to(dtype) for w in weights], k[:, :, at], v[:, :, at], lr[:, :, at]
        y0, y2, g = x @ low[0].mT, x @ low[2].mT, y @ low[1]
        gate = torch.sigmoid(y0)
        e0 = g * y2 * (gate * (1 + y0 * (1 - gate)))
        e2, h = g * silu(y0), silu(y0) * y2
        found = (
            ((rates[..., 0:1] * e0).to(dtype).mT @ x),
            ((rates[..., 1:2] * y).to(dtype).mT @ h),
            ((rates[..., 2:3] * e2).to(dtype).mT @ x),
        )
        for i, step in enumerate(found):
            if momentum is not None:
                beta = momentum[:, at].mean(1)[..., None, None]
                sums[i] = step = beta * sums[i] + step
            if optimizer == "muon":
                step = newton_schulz.plain(step)
            weights[i] = weights[i] + step
            weights[i] = weights[i] * (norms[i] / weights[i].norm(dim=-1, keepdim=True).clamp(min=1e-5))

    for start in range(0, T, chunk_size):
        at = slice(start, min(start + chunk_size, T))
        if order == "update_apply":
            update(at)
            apply(at)
        else:
            apply(at)
            if at.stop - start == chunk_size:
                update(at)
    return (torch.cat(outputs, 2).transpose(1, 2), *weights, *sums)


@cache
def compiled() -> Callable[..., tuple[Tensor, ...]]:
    return torch.compile(plain)


def call_compiled(**inputs: object) -> tuple[Tensor, ...]:
    return compiled()(**inputs)


# ---- the table


def make_case(
    shape: Shape,
    note: str = "",
    peers: tuple[str, ...] = (PLAIN,),
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    devices: tuple[str, ...] = ("cpu",),
    sgemm: bool = True,
) -> Case:
    """A row of the table. `goals`: (peer or yardstick, mode) -> ratio of times."""
    functions = {PLAIN: plain, COMPILED: call_compiled}
    builders = {name: partial(build, shape, functions[name], shape.dtype) for name in peers}
    builders |= {
        OURS: partial(build, shape, call_ours, shape.dtype),
        REFERENCE: partial(build, shape, plain, torch.float64),
    }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    words = ("large_chunk_ttt", precision, sizes, "" if shape.optimizer == "gd" else shape.optimizer, note)
    flops = {mode: shape.count_flops(mode) for mode in modes}
    return Case(
        op="large_chunk_ttt",
        name=" ".join(part for part in words if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops=flops,
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        # One chunk is learnt, and applied to a few tokens.
        check_steps=shape.C + 64 if shape.C + 64 < shape.T else None,
        devices=devices,
        yardsticks={(SGEMM, mode): partial(build_sgemm, flops[mode], shape.dtype) for mode in modes if sgemm},
    )


BOTH = (FORWARD, TRAINING)
GOALS = {(PLAIN, mode): 1.3 for mode in BOTH} | {(SGEMM, mode): 0.8 for mode in BOTH}
LARGE, SMALL = (1, 4096, 4, 384, 384, 2048), (1, 4096, 4, 128, 256, 1024)

CPU_CASES = [
    make_case(Shape(*LARGE), goals=GOALS),
    make_case(Shape(*SMALL), goals=GOALS),
    make_case(Shape(*LARGE, optimizer="muon", momentum=True), "momentum"),
    make_case(Shape(*SMALL, dtype=torch.bfloat16)),
    make_case(Shape(16, 1, 4, 384, 384, 2048), "one step", modes=(INFERENCE,), sgemm=False),
]
GPU_GOALS = {(COMPILED, mode): 1.3 for mode in BOTH} | {(SGEMM, mode): 0.6 for mode in BOTH}
GPU_CASES = [
    make_case(
        Shape(B, T, H, D, D, C, torch.bfloat16, optimizer, momentum=True),
        "GPU",
        (PLAIN, COMPILED),
        GPU_GOALS,
        devices=("cuda",),
    )
    for B, T, H, D, C in ((1, 32768, 4, 384, 2048), (4, 8192, 1, 768, 2048))
    for optimizer in ("gd", "muon")
]

CASES = [*CPU_CASES, *GPU_CASES]
