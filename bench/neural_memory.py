"""Cases of neural_memory, on the CPU and on a GPU.

Letters: B batch, T time, H heads, D channels, F hidden channels (0: a linear memory), C tokens of a chunk.

Peers:

* `token loop` is the rule as it is written, one token after the other, every token's weights in memory.
* `chunked PyTorch` is the closed form of a chunk as batched matrix products: what there is to gain without a kernel.
* `titans-pytorch` is that package's memory on the same keys, values, queries and weights, whose gates it takes once a
  chunk and whose weights it renews every chunk: less work than ours, and another result. With gates per token (`one
  gate a token`) it computes the same. It is measured where it is installed.

Operations are counted as for the closed form: for each token and head `14 D F + 4 C (D + F)`, or `6 D^2 + 4 C D` of a
linear memory, with momentum `8 D F` or `4 D^2` more; three times that in training. Bytes count q, k, v, o, gates,
weights and their gradients once for each pass. The float64 reference is chunked PyTorch in float64.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import silu

from bench.harness import FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

LOOP, CHUNKED, TITANS, TITANS_EXACT = (
    "token loop",
    "chunked PyTorch",
    "titans-pytorch",
    "titans-pytorch, one gate a token",
)


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    H: int
    D: int
    F: int
    C: int
    dtype: torch.dtype = torch.float32
    momentum: bool = True
    optimizer: str = "gd"

    @property
    def letters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in "BTHDFC"}

    @property
    def weights(self) -> list[tuple[int, int]]:
        return [(self.F, self.D), (self.D, self.F)] if self.F else [(self.D, self.D)]

    def count_bytes(self, mode: str) -> int:
        tokens = self.B * self.T * self.H * (4 * self.D + 3) * self.dtype.itemsize
        weights = 2 * 4 * self.B * self.H * sum(rows * columns for rows, columns in self.weights)
        return (3 if mode == TRAINING else 1) * (tokens + weights)

    def count_flops(self, mode: str) -> int:
        D, F, C = self.D, self.F, self.C
        token = 14 * D * F + 4 * C * (D + F) if F else 6 * D * D + 4 * C * D
        if self.momentum:
            token += 8 * D * F if F else 4 * D * D
        return (3 if mode == TRAINING else 1) * token * self.B * self.T * self.H


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`; gates and weights are float32 beside 16 bits.

    Keys and queries have length 1, as models make them.
    """
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    B, H, D = shape.B, shape.H, shape.D
    tensors = {}
    for name in "qkv":
        values = normal(B, steps, H, D)
        values = values if name == "v" else values / values.norm(dim=-1, keepdim=True)
        tensors[name] = values.to(shape.dtype).to(dtype)
    tensors["lr"] = (normal(B, steps, H).sigmoid() / shape.C).to(wide)
    tensors["decay"] = (0.05 * normal(B, steps, H).sigmoid()).to(wide)
    if shape.momentum:
        tensors["momentum"] = (0.9 * normal(B, steps, H).sigmoid()).to(wide)
    for i, sizes in enumerate(shape.weights):
        tensors[f"w{i + 1}"] = (normal(B, H, *sizes) * sizes[-1] ** -0.5).to(wide)
    return {name: t.requires_grad_() for name, t in tensors.items()}


Results = tuple[Tensor, list[Tensor], list[Tensor]]


def build(
    shape: Shape, function: Callable[..., Results], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)
    others = {name: t for name, t in leaves.items() if name not in ("w1", "w2")}
    weights = [leaves[name] for name in ("w1", "w2") if name in leaves]
    options = {} if shape.optimizer == "gd" else {"optimizer": shape.optimizer}
    # Fewer steps than asked for are a trial, which has whole chunks too.
    chunk_size = min(shape.C, steps)

    def run() -> dict[str, Tensor]:
        o, learnt, state = function(**others, weights=weights, chunk_size=chunk_size, **options)
        named = {f"w{i + 1}": w for i, w in enumerate(learnt)} | {f"s{i + 1}": s for i, s in enumerate(state)}
        return {"o": o} | named

    return Contender(run, leaves)


def call_ours(**inputs: object) -> Results:
    import seqops

    return seqops.neural_memory(**inputs)


def slope(x: Tensor) -> Tensor:
    """Of SiLU."""
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


def token_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: list[Tensor],
    chunk_size: int,
    decay: Tensor,
    momentum: Tensor | None = None,
) -> Results:
    """Every token's gradient, momentum and weights, of all heads at a time."""
    start = now = weights
    S = [torch.zeros_like(w) for w in weights]
    outputs = []
    for t in range(q.shape[1]):
        if t % chunk_size == 0:
            start = now
        x, y, query = (each[:, t, :, :, None].to(start[0].dtype) for each in (k, v, q))
        rate, kept = lr[:, t, :, None, None], 1 - decay[:, t, :, None, None]
        if len(start) == 1:
            found = [(start[0] @ x - y) @ x.mT]
        else:
            a = start[0] @ x
            h = silu(a)
            delta = x + start[1] @ h - y
            found = [((start[1].mT @ delta) * slope(a)) @ x.mT, delta @ h.mT]
        if momentum is None:
            S = [-rate * u for u in found]
        else:
            S = [momentum[:, t, :, None, None] * s - rate * u for s, u in zip(S, found, strict=True)]
        now = [kept * w + s for w, s in zip(now, S, strict=True)]
        o = now[0] @ query if len(now) == 1 else query + now[1] @ silu(now[0] @ query)
        outputs.append(o[..., 0])
    return torch.stack(outputs, 1).to(q.dtype), now, S


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: list[Tensor],
    chunk_size: int,
    decay: Tensor,
    momentum: Tensor | None = None,
) -> Results:
    """The closed form: weights at the starts of chunks alone, tokens of a chunk by coefficients [C, C].

    With 16-bit q, k, v the products take operands of 16 bits.
    """
    dtype, real = q.dtype, weights[0].dtype
    # heads in front: [B, H, T, ...]
    q, k, v, lr, decay = (t.transpose(1, 2) for t in (q, k, v, lr, decay))
    momentum = None if momentum is None else momentum.transpose(1, 2)
    W, S = list(weights), [torch.zeros_like(w) for w in weights]
    outputs = []
    for first in range(0, q.shape[2], chunk_size):
        at = slice(first, min(first + chunk_size, q.shape[2]))
        Q, K, V, rate = q[:, :, at], k[:, :, at], v[:, :, at], lr[:, :, at]
        m, c, p, g, b = coefficients(rate, decay[:, :, at], None if momentum is None else momentum[:, :, at])

        def tile(X: Tensor, Kx: Tensor, w: Tensor, s: Tensor, delta: Tensor) -> Tensor:
            read = b[..., None] * (X @ w.to(dtype).mT)  # noqa: B023  called at once
            if momentum is not None:
                read = read + g[..., None] * (X @ s.to(dtype).mT)  # noqa: B023  called at once
            return read - (c * (X @ Kx.mT)).to(dtype) @ delta.to(dtype)  # noqa: B023  called at once

        if len(W) == 1:
            delta = K @ W[0].to(dtype).mT - V
            outputs.append(tile(Q, K, W[0], S[0], delta).to(dtype))
            pairs = [(delta, K)]
        else:
            low = [w.to(dtype) for w in W]
            a = K @ low[0].mT
            h = silu(a)
            delta2 = K + h @ low[1].mT - V
            delta1 = (delta2 @ low[1]) * slope(a)
            hidden = silu(tile(Q, K, W[0], S[0], delta1)).to(dtype)
            outputs.append((Q + tile(hidden, h, W[1], S[1], delta2)).to(dtype))
            pairs = [(delta1, K), (delta2, h)]
        rows = [((each[..., -1, :, None] * d).to(dtype), x) for each in (c, m) for d, x in pairs]
        added, summed = [r.mT @ x for r, x in rows[: len(W)]], [r.mT @ x for r, x in rows[len(W) :]]
        last = [each[..., -1, None, None] for each in (b, g, p)]
        W, S = (
            [last[0] * w + last[1] * s - more for w, s, more in zip(W, S, added, strict=True)],
            [last[2] * s - more for s, more in zip(S, summed, strict=True)],
        )
    return torch.cat(outputs, 2).transpose(1, 2), [w.to(real) for w in W], [s.to(real) for s in S]


def coefficients(lr: Tensor, decay: Tensor, momentum: Tensor | None) -> tuple[Tensor, ...]:
    """Rows m_t and c_t [..., C, C], and p, g, b [..., C], by their recurrences."""
    held = torch.zeros_like(lr) if momentum is None else momentum
    m_row = c_row = torch.zeros_like(lr)
    p, g, b = torch.ones_like(lr[..., 0]), torch.zeros_like(lr[..., 0]), torch.ones_like(lr[..., 0])
    columns = torch.arange(lr.shape[-1], device=lr.device)
    found = []
    for t in range(lr.shape[-1]):
        kept = 1 - decay[..., t]
        m_row = held[..., t, None] * m_row + lr * (columns == t)
        c_row = kept[..., None] * c_row + m_row
        p = held[..., t] * p
        g, b = kept * g + p, kept * b
        found.append((m_row, c_row, p, g, b))
    rows, ends = [*zip(*found, strict=True)][:2], [*zip(*found, strict=True)][2:]
    return (*(torch.stack(each, -2) for each in rows), *(torch.stack(each, -1) for each in ends))


# ---- the package


class Given(torch.nn.Module):
    """Stands where a memory computes gates from its input [B, n, ...]: gives the next n columns of a tensor."""

    def __init__(self, values: Tensor, shaped: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.values, self.shaped, self.at = values, shaped, 0

    def forward(self, x: Tensor) -> Tensor:
        first, self.at = self.at, self.at + x.shape[1]
        return self.shaped(self.values[:, first : self.at])


class MLP(torch.nn.Module):
    """The memory as the package takes it: x + W2 silu(W1 x), or W x."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        for i, size in enumerate(sizes):
            self.register_parameter(f"w{i + 1}", torch.nn.Parameter(torch.zeros(size)))

    def forward(self, x: Tensor) -> Tensor:
        return x + silu(x @ self.w1.mT) @ self.w2.mT if hasattr(self, "w2") else x @ self.w1.mT


def titans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: list[Tensor],
    chunk_size: int,
    decay: Tensor,
    momentum: Tensor | None = None,
    per_token: bool = False,
) -> Results:
    """Its projections are left out; a gate of a chunk is that of its last token."""
    from titans_pytorch import NeuralMemory
    from titans_pytorch.neural_memory import NeuralMemState

    B, T, H, D = q.shape
    every = 1 if per_token else chunk_size
    identity = torch.nn.Identity()
    memory = NeuralMemory(
        dim=H * D,
        dim_head=D,
        heads=H,
        chunk_size=every,
        batch_size=chunk_size,
        model=MLP([tuple(w.shape[2:]) for w in weights]),
        store_memory_loss_fn=lambda found, wanted: (found - wanted).square().sum(-1) / 2,
        adaptive_step_transform=lambda rate: rate,
        momentum=momentum is not None,
        qkv_receives_diff_views=True,
        pre_rmsnorm=False,
        mem_model_norm_add_residual=False,
    )
    memory.to_queries = memory.to_keys = memory.to_values = memory.combine_heads = identity
    memory.retrieve_gate = None

    def rows(gate: Tensor) -> Tensor:
        """[B, T, H] -> [B H, T]."""
        return gate.transpose(1, 2).flatten(0, 1)

    def logits(gate: Tensor) -> Tensor:
        """One a chunk, before the sigmoid that the package takes."""
        return torch.logit(rows(gate)[:, every - 1 :: every])

    memory.to_adaptive_step = Given(rows(lr), lambda gate: gate)
    memory.to_decay_factor = Given(logits(decay), lambda gate: gate[..., None])
    if momentum is not None:
        memory.to_momentum = Given(logits(momentum), lambda gate: gate[None, ..., None])
    start = {f"w{i + 1}": w.flatten(0, 1) for i, w in enumerate(weights)}
    views = torch.stack([each.flatten(2) for each in (q, k, v)])
    o, state = memory(views, state=NeuralMemState(0, start, None, None, None))
    learnt, sums = state.states
    found = [learnt[name].unflatten(0, (B, H)) for name in start]
    zeros = [torch.zeros_like(w) for w in weights]
    held = zeros if momentum is None else [sums[name][0].unflatten(0, (B, H)) for name in start]
    return o.reshape(B, T, H, D), found, held


# ---- the table

PEERS = {LOOP: token_loop, CHUNKED: chunked, TITANS: titans, TITANS_EXACT: partial(titans, per_token=True)}
OPTIONAL = (TITANS, TITANS_EXACT)
INSTALLED = find_spec("titans_pytorch") is not None


def make_case(
    shape: Shape,
    note: str = "",
    peers: tuple[str, ...] = (LOOP, TITANS, CHUNKED),
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    check_steps: int | None = None,
    devices: tuple[str, ...] = ("cpu",),
) -> Case:
    """A row of the table. `goals`: (peer, mode) -> ratio of times."""
    absent = {} if INSTALLED else {name: "titans-pytorch is not installed" for name in peers if name in OPTIONAL}
    builders = {name: partial(build, shape, PEERS[name], shape.dtype) for name in peers if name not in absent}
    builders |= {
        OURS: partial(build, shape, call_ours, shape.dtype),
        REFERENCE: partial(build, shape, chunked, torch.float64),
    }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items() if letter != "F" or size)
    words = ("neural_memory", precision, sizes, "" if shape.F else "linear", note)
    return Case(
        op="neural_memory",
        name=" ".join(part for part in words if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        check_steps=check_steps,
        devices=devices,
        absent=absent,
    )


BOTH = (FORWARD, TRAINING)
OF_TITANS = {(TITANS, mode): 5.0 for mode in BOTH}
GOALS = {(LOOP, mode): 10.0 for mode in BOTH} | OF_TITANS

CPU_CASES = [
    # The loop keeps weights of every token, for its gradient: few tokens.
    make_case(Shape(1, 256, 4, 64, 256, 16), goals=GOALS),
    make_case(Shape(1, 1024, 4, 64, 256, 64), "", (TITANS, CHUNKED), OF_TITANS),
    make_case(Shape(1, 256, 8, 64, 0, 32), goals=GOALS),
    make_case(Shape(1, 128, 4, 64, 256, 16), "gates", (TITANS_EXACT,), {(TITANS_EXACT, mode): 5.0 for mode in BOTH}),
    make_case(Shape(2, 2048, 8, 64, 256, 64), "longer", (CHUNKED,), check_steps=256),
    make_case(Shape(2, 2048, 8, 64, 256, 64, torch.bfloat16), "", (CHUNKED,), check_steps=256),
    make_case(Shape(16, 1, 4, 64, 256, 16), "one step", (LOOP,), modes=(INFERENCE,)),
]
GPU_CASES = [
    make_case(
        Shape(B, T, H, 64, F, C, dtype),
        "GPU",
        (CHUNKED, TITANS),
        {(TITANS, mode): 10.0 for mode in BOTH},
        check_steps=256,
        devices=("cuda",),
    )
    for B, T, H, F, C in ((8, 2048, 16, 256, 16), (8, 2048, 16, 256, 64), (8, 2048, 16, 0, 16))
    for dtype in (torch.bfloat16, torch.float32)
]

CASES = [*CPU_CASES, *GPU_CASES]
