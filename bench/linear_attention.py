"""Cases of linear_attention, on the CPU and on a GPU.

Letters: B batch, T time, H heads, K key width, V value width, C steps of a chunk.

Peers compute the same result:

* `chunked PyTorch` is what a user writes in torch: chunks of 64 as batched matrix products, a loop over the states.
* `step loop` is the recurrence as it is written, one step after the other.

Operations are those of the chunk form with C = 64, two for a multiplication and an addition: of the pairs of a chunk,
the state's part of the outputs, and the states. Bytes count q, k, v, o, decays and their gradients once for each pass
that has to read or write them. The float64 reference is the chunk form in float64, one chunk after the other.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.harness import BACKWARD, FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

CHUNKED = "chunked PyTorch"
LOOP = "step loop"
CHUNK = 64


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one case."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: torch.dtype = torch.float32
    decay: str = "step"  # "none", "step" or "channel"
    window: int | None = None
    causal: bool = True
    carried: bool = False

    @property
    def letters(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in "BTHKV"}

    def decay_shape(self, steps: int) -> tuple[int, ...]:
        return (self.B, steps, self.H) + ((self.K,) if self.decay == "channel" else ())

    def count_bytes(self, mode: str) -> int:
        forward = 2 * (self.K + self.V) * self.B * self.T * self.H * self.dtype.itemsize
        forward += 4 * math.prod(self.decay_shape(self.T)) if self.decay != "none" else 0
        return int(forward * {BACKWARD: 2, TRAINING: 3}.get(mode, 1))

    def count_flops(self, mode: str) -> int:
        pairs = 2 * CHUNK * (self.K + self.V) // 2 if self.causal else 0
        if self.window is not None:
            pairs *= 3  # the window's edge
        forward = (pairs + 4 * self.K * self.V) * self.B * self.T * self.H
        return int(forward * {BACKWARD: 2.5, TRAINING: 3.5}.get(mode, 1))


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`; decays are float32 beside 16 bits."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    B, H, K, V = shape.B, shape.H, shape.K, shape.V
    widths = {"q": K, "k": K, "v": V}
    tensors = {name: normal(B, steps, H, width).to(shape.dtype).to(dtype) for name, width in widths.items()}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if shape.decay != "none":
        tensors["log_decay"] = (normal(*shape.decay_shape(steps)).abs() * -0.05).to(wide)
    if shape.carried:
        tensors["initial_state"] = normal(B, H, K, V).to(wide)
    return {name: t.requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, steps: int, device: str = "cpu"
) -> Contender:
    leaves = draw(shape, steps, dtype, device)
    options = ({} if shape.window is None else {"window": shape.window}) | ({} if shape.causal else {"causal": False})

    def run() -> dict[str, Tensor]:
        return dict(zip(("o", "final_state"), function(**leaves, **options), strict=True))

    return Contender(run, leaves)


def call_ours(**inputs: object) -> tuple[Tensor, ...]:
    import seqops

    return seqops.linear_attention(**inputs)


def step_loop(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, initial_state: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The recurrence step after step, the state in float32."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, T, H, K = q.shape
    state = torch.zeros(B, H, K, v.shape[-1], dtype=wide, device=q.device) if initial_state is None else initial_state
    outputs = []
    for t in range(T):
        if log_decay is not None:
            decay = log_decay[:, t].exp()[..., None]
            state = state * (decay if decay.ndim == 4 else decay[..., None])
        state = state + (k[:, t, :, :, None] * v[:, t, :, None, :]).to(wide)
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t].to(wide), state) * K**-0.5)
    return torch.stack(outputs, 1).to(v.dtype), state


def split(x: Tensor) -> Tensor:
    """[B, T, H, width] -> [B, H, chunks, C, width], filled up with zeros."""
    missing = -x.shape[1] % CHUNK
    x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), 1) if missing else x
    return x.unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    window: int | None = None,
    causal: bool = True,
) -> tuple[Tensor, ...]:
    """Chunks of 64 as batched products; decays of channels divide keys, as is done where they are not small."""
    T, K = q.shape[1], q.shape[-1]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    if not causal:
        state = torch.einsum("bthk,bthv->bhkv", k.to(wide), v.to(wide))
        return (torch.einsum("bthk,bhkv->bthv", q.to(wide), state) * K**-0.5).to(v.dtype), state
    storage, q, k, v = v.dtype, *(split(x.to(wide)) for x in (q * K**-0.5, k, v))
    earlier = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).tril()
    if log_decay is None:
        log_decay = torch.zeros(q.shape[0], T, q.shape[1], dtype=wide, device=q.device)
    by_channel = log_decay.ndim == 4
    total = split(log_decay if by_channel else log_decay[..., None]).cumsum(3)
    if window is not None:
        return windowed(q, k, v, total, window, T, storage)
    if by_channel:
        scores = ((q * total.exp()) @ (k * (-total).exp()).transpose(-1, -2)).masked_fill(~earlier, 0)
    else:
        weight = (total - total.transpose(-1, -2)).masked_fill(~earlier, -math.inf).exp()
        scores = (q @ k.transpose(-1, -2)) * weight
    added = (k * (total[..., -1:, :] - total).exp()).transpose(-1, -2) @ v
    kept = total[..., -1, :].exp()[..., None]
    state = torch.zeros_like(added[:, :, 0]) if initial_state is None else initial_state
    states = []
    for chunk in range(added.shape[2]):
        states.append(state)
        state = kept[:, :, chunk] * state + added[:, :, chunk]
    o = scores @ v + (q * total.exp()) @ torch.stack(states, 2)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(storage), state


def windowed(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor, window: int, T: int, storage: torch.dtype
) -> tuple[Tensor, ...]:
    """Every chunk of queries against the keys that it can see, as masked pairs; for one decay a step."""
    ends = total[..., -1, :].cumsum(2)
    g = (total + (ends - total[..., -1, :])[..., None, :])[..., 0]
    blocks = -(-(window - 1) // CHUNK)
    outputs = []
    for chunk in range(q.shape[2]):
        first = max(0, chunk - blocks)
        keys, values = (x[:, :, first : chunk + 1].flatten(2, 3) for x in (k, v))
        apart = g[:, :, chunk, :, None] - g[:, :, first : chunk + 1].flatten(2)[..., None, :]
        at = torch.arange(CHUNK, device=q.device)
        distance = (chunk - first) * CHUNK + at[:, None] - torch.arange(keys.shape[2], device=q.device)
        apart = apart.masked_fill((distance < 0) | (distance >= window), -math.inf)
        outputs.append(((q[:, :, chunk] @ keys.transpose(-1, -2)) * apart.exp()) @ values)
    late, start = g.flatten(2)[:, :, T - 1 : T], max(0, T - window)
    weight = (late - g.flatten(2)[:, :, start:T]).exp()[..., None]
    state = (k.flatten(2, 3)[:, :, start:T] * weight).transpose(-1, -2) @ v.flatten(2, 3)[:, :, start:T]
    return torch.stack(outputs, 2).permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T].to(storage), state


# ---- the table


def make_case(
    shape: Shape,
    note: str = "",
    peers: tuple[str, ...] = (CHUNKED,),
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, BACKWARD, TRAINING),
    check_steps: int | None = 256,
    devices: tuple[str, ...] = ("cpu",),
    absent: Mapping[str, str] | None = None,
) -> Case:
    """A row of the table. `goals`: (peer, mode) -> ratio of times."""
    functions = {CHUNKED: chunked, LOOP: step_loop}
    builders = {name: partial(build, shape, functions[name], shape.dtype) for name in peers}
    builders |= {
        OURS: partial(build, shape, call_ours, shape.dtype),
        REFERENCE: partial(build, shape, chunked, torch.float64),
    }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    options = {"none": "no decay", "step": "", "channel": "decay per channel"}[shape.decay] if shape.causal else ""
    window = "" if shape.window is None else f"window {shape.window}"
    words = ("linear_attention", precision, sizes, options, window, "" if shape.causal else "not causal", note)
    return Case(
        op="linear_attention",
        name=" ".join(part for part in words if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        causes={},
        check_steps=check_steps,
        devices=devices,
        yardsticks={},
        absent=absent or {},
        copy_goals={},
    )


SIZES = (2, 4096, 8, 64, 64)
FIVE = {(CHUNKED, FORWARD): 5.0, (CHUNKED, TRAINING): 5.0}

CPU_CASES = [
    make_case(Shape(*SIZES), goals=FIVE),
    make_case(Shape(1, 512, 8, 64, 64), "beside a loop", peers=(LOOP,)),
    make_case(Shape(*SIZES, decay="channel")),
    make_case(Shape(*SIZES, decay="none")),
    make_case(Shape(*SIZES, dtype=torch.bfloat16)),
    make_case(Shape(*SIZES, window=512)),
    make_case(Shape(*SIZES, decay="none", causal=False)),
    make_case(Shape(1, 16384, 1, 128, 128), "one head"),
    make_case(Shape(16, 1, 8, 64, 64, carried=True), "one step", peers=(LOOP,), modes=(INFERENCE,), check_steps=None),
]

ABSENT = {
    title: f"{title} is not installed"
    for title, package in (("fla chunk_simple_gla", "fla"), ("fla chunk_gla", "fla"))
    if find_spec(package) is None
}
GPU_CASES = [
    make_case(Shape(B, T, H, D, D, dtype, decay), "GPU", modes=(FORWARD, BACKWARD), devices=("cuda",), absent=ABSENT)
    for B, T, H, D in ((8, 4096, 16, 64), (4, 8192, 16, 128), (1, 65536, 4, 64))
    for dtype in (torch.float32, torch.bfloat16)
    for decay in ("step", "channel")
]

CASES = [*CPU_CASES, *GPU_CASES]
