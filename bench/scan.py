"""Cases of the scans: linear_scan and softmax_scan, on the CPU and on a GPU; grid_scan's are in grid_scan.py.

Letters: B batch, T time, C channels, H heads, D values of a head.

Scans are bound by memory, so they are measured against what moves the same bytes and computes next to nothing: `same
bytes` is torch.add of the gate and the input where a pass moves three tensors, a clone where it moves two, and so many
of both that the bytes agree. It makes new outputs, as an operator does. Peers compute the same result:

* `step loop` is the recurrence as it is written, one step after the other.
* `associative_scan` is torch's own parallel scan, compiled; one case, because its compilation takes most of a minute.

Bytes count each tensor once for each pass that has to read or write it; operations are those of the recurrence. The
float64 reference runs all blocks of T side by side, first from zero, then corrected by what enters them.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec

import torch
from torch import Tensor

from bench.harness import BACKWARD, FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

SAME_BYTES = "same bytes"
LOOP = "step loop"
ASSOCIATIVE = "associative_scan"

GATES = {  # kind of gate -> its shape beside x [B, T, H, D]
    "": lambda B, T, H, D: (B, T, H, D),
    "constant gate": lambda B, T, H, D: (1, 1, H, D),
    "gate per head": lambda B, T, H, D: (B, T, H, 1),
}
# Tensors as large as x that a pass reads or writes: with a gate of x's size, and with a small one.
TENSORS = {FORWARD: (3, 2), BACKWARD: (5, 3), TRAINING: (8, 5), INFERENCE: (3, 2)}


@dataclass(frozen=True)
class Shape:
    """Sizes of one case; channels are H heads of D."""

    op: str
    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype = torch.float32
    gate: str = ""
    carried: bool = False

    @property
    def letters(self) -> dict[str, int]:
        sizes = {"B": self.B, "T": self.T}
        return sizes | ({"C": self.H * self.D} if self.H == 1 else {"H": self.H, "D": self.D})

    def tensors(self, mode: str) -> int:
        """How many tensors as large as x one call has to move."""
        if self.op == "softmax_scan":
            return {FORWARD: 2, INFERENCE: 2, BACKWARD: 4, TRAINING: 6}[mode]
        return TENSORS[mode][self.gate != ""]

    def count_bytes(self, mode: str) -> int:
        large = self.tensors(mode) * self.B * self.T * self.H * self.D * self.dtype.itemsize
        if self.op == "softmax_scan":  # s, lse, m, u of each head, once a pass
            return large + 16 * self.B * self.T * self.H * {TRAINING: 2}.get(mode, 1)
        small = math.prod(GATES[self.gate](self.B, self.T, self.H, self.D)) if self.gate else 0
        return large + small * self.dtype.itemsize * {BACKWARD: 2, TRAINING: 3}.get(mode, 1)

    def count_flops(self, mode: str) -> int:
        each = 8 if self.dtype.is_complex else 2
        return each * self.B * self.T * self.H * self.D * {BACKWARD: 2, TRAINING: 3}.get(mode, 1)


# ---- inputs and implementations


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`."""
    generator = torch.Generator(device).manual_seed(0)
    B, H, D = shape.B, shape.H, shape.D

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator, device=device, dtype=drawn)

    drawn = torch.complex64 if shape.dtype.is_complex else torch.float32
    if shape.op == "softmax_scan":
        tensors = {"s": normal(B, steps, H), "v": normal(B, steps, H, D)}
        if shape.carried:
            tensors |= {"initial_lse": normal(B, H), "initial_out": normal(B, H, D)}
    else:
        gate = normal(*GATES[shape.gate](B, steps, H, D))
        # Moduli between 0 and 1.
        gate = gate / gate.abs() * (1 - gate.abs() / 8).clamp(0) if gate.is_complex() else gate.sigmoid()
        tensors = {"x": normal(B, steps, H, D), "a": gate}
        if shape.carried:
            tensors |= {"initial_state": normal(B, H, D)}
    return {name: t.to(shape.dtype).to(dtype).requires_grad_() for name, t in tensors.items()}


def build(
    shape: Shape, function: Callable[..., tuple[Tensor, ...]], dtype: torch.dtype, steps: int, device: str = "cpu"
):
    leaves = draw(shape, steps, dtype, device)
    names = ("o", "lse") if shape.op == "softmax_scan" else ("h", "final_state")

    def run() -> dict[str, Tensor]:
        return dict(zip(names, function(shape.op, **leaves), strict=True))

    return Contender(run, leaves)


def call_ours(op: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    import seqops

    return getattr(seqops, op)(**inputs)


def step_loop(op: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """The recurrence step after step; softmax_scan's with numerator and denominator apart."""
    if op == "linear_scan":
        x, a, h = inputs["x"], inputs["a"], inputs.get("initial_state")
        h = torch.zeros_like(x[:, 0]) if h is None else h
        outputs = []
        for x_t, a_t in zip(x.unbind(1), a.expand(-1, x.shape[1], -1, -1).unbind(1), strict=True):
            h = a_t * h + x_t
            outputs.append(h)
        # The state of 16-bit storage is float32.
        return torch.stack(outputs, 1), h.to(torch.float32) if x.dtype.itemsize == 2 else h
    s, v = inputs["s"], inputs["v"]
    lse, o, outputs, sums = torch.full_like(s[:, 0], -math.inf), torch.zeros_like(v[:, 0]), [], []
    for s_t, v_t in zip(s.unbind(1), v.unbind(1), strict=True):
        new = torch.logaddexp(lse, s_t)
        o = (lse - new).exp()[..., None] * o + (s_t - new).exp()[..., None] * v_t
        lse = new
        outputs.append(o)
        sums.append(lse)
    return torch.stack(outputs, 1), torch.stack(sums, 1).to(torch.float32)


@cache
def compiled_scan() -> Callable[[Tensor, Tensor], Tensor]:
    from torch._higher_order_ops.associative_scan import associative_scan

    def compose(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return torch.compile(lambda a, x: associative_scan(compose, (a, x), 1, combine_mode="generic")[1])


def torch_scan(op: str, x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    h = compiled_scan()(a, x)
    return h, h[:, -1]


def blocked(op: str, **inputs: Tensor) -> tuple[Tensor, ...]:
    """The reference: independent of the operators, and without a loop over all of T."""
    if op == "softmax_scan":
        s, v = inputs["s"], inputs["v"]
        if "initial_lse" in inputs:
            s = torch.cat((inputs["initial_lse"][:, None], s), 1)
            v = torch.cat((inputs["initial_out"][:, None], v), 1)
        most = s.detach().amax(1, keepdim=True)
        weight = (s - most).exp()
        total = weight.cumsum(1)
        o, lse = (weight[..., None] * v).cumsum(1) / total[..., None], total.log() + most
        skip = int("initial_lse" in inputs)
        return o[:, skip:], lse[:, skip:]
    x, a = inputs["x"], inputs["a"]
    B, T, H, D = x.shape
    length = max(1, math.isqrt(T))
    blocks = -(-T // length)
    pad = blocks * length - T
    x = torch.cat((x, x.new_zeros(B, pad, H, D)), 1).unflatten(1, (blocks, length))
    a = a.expand(-1, T, -1, -1)
    a = torch.cat((a, a.new_ones(a.shape[0], pad, *a.shape[2:])), 1).unflatten(1, (blocks, length))
    h, product, local, products = torch.zeros_like(x[:, :, 0]), torch.ones_like(a[:, :, 0]), [], []
    for i in range(length):
        h = a[:, :, i] * h + x[:, :, i]
        product = a[:, :, i] * product
        local.append(h)
        products.append(product)
    state = inputs["initial_state"] if "initial_state" in inputs else torch.zeros_like(x[:, 0, 0])
    entering = []
    for block in range(blocks):
        entering.append(state)
        state = products[-1][:, block] * state + local[-1][:, block]
    h = torch.stack(local, 2) + torch.stack(products, 2) * torch.stack(entering, 1)[:, :, None]
    h = h.flatten(1, 2)[:, :T]
    return h, h[:, -1]


def build_same_bytes(shape: Shape, mode: str, steps: int, device: str = "cpu") -> Contender:
    """torch.add moves three tensors, a clone two: together as many as the pass."""
    sizes = (shape.B, steps, shape.H, shape.D)
    first, second = (torch.ones(sizes, dtype=shape.dtype, device=device) for _ in range(2))
    count = shape.tensors(mode)
    clones = {2: 1, 3: 0, 4: 2, 5: 1, 6: 0, 8: 1}[count]
    adds = (count - 2 * clones) // 3

    def run() -> dict[str, Tensor]:
        for _ in range(adds):
            first + second
        for _ in range(clones):
            first.clone()
        return {}

    return Contender(run, {})


# ---- the table


def make_case(
    shape: Shape,
    note: str = "",
    peers: tuple[str, ...] = (),
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, BACKWARD, TRAINING),
    copy_goals: Mapping[str, float] | None = None,
    causes: Mapping[tuple[str, str], str] | None = None,
    check_steps: int | None = None,
    devices: tuple[str, ...] = ("cpu",),
    absent: Mapping[str, str] | None = None,
) -> Case:
    """A row of the table.

    Args:
        note: what the shape does not say, for the name.
        peers: of LOOP and ASSOCIATIVE.
        goals: (peer or SAME_BYTES, mode) -> ratio of times.
        copy_goals: mode -> share of the copy rate.
        check_steps: T of the gradient check.
    """
    functions = {LOOP: step_loop, ASSOCIATIVE: torch_scan}
    builders = {name: partial(build, shape, functions[name], shape.dtype) for name in peers}
    exact = torch.complex128 if shape.dtype.is_complex else torch.float64
    builders |= {
        OURS: partial(build, shape, call_ours, shape.dtype),
        REFERENCE: partial(build, shape, blocked, exact),
    }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    return Case(
        op=shape.op,
        name=" ".join(part for part in (shape.op, precision, sizes, shape.gate, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals=goals or {},
        causes=causes or {},
        check_steps=check_steps,
        devices=devices,
        yardsticks={(SAME_BYTES, mode): partial(build_same_bytes, shape, mode) for mode in modes if mode != INFERENCE},
        absent=absent or {},
        copy_goals=copy_goals or {},
    )


def near_memory(forward: float = 0.8, backward: float = 0.8, training: float = 1 / 1.3) -> dict[tuple[str, str], float]:
    return {(SAME_BYTES, FORWARD): forward, (SAME_BYTES, BACKWARD): backward, (SAME_BYTES, TRAINING): training}


def linear(B: int, T: int, C: int, dtype: torch.dtype = torch.float32, **options: object) -> Shape:
    return Shape("linear_scan", B, T, 1, C, dtype, **options)


SIXTEEN_BITS = (
    "Not looked into. At these sizes a clone runs at or above the measured copy rate; the conversion of every value to "
    "float32 and back is the first thing to look at."
)
SIXTEEN_BITS_CAUSES = {(SAME_BYTES, mode): SIXTEEN_BITS for mode in (FORWARD, BACKWARD, TRAINING)}
TORCH_SCAN = (
    "At the copy rate of this machine the bytes alone would take more than a twentieth of torch's time, so the goal "
    "is out of reach here; it was set where torch's scan took many times as long."
)

CPU_CASES = [
    make_case(linear(4, 4096, 512), peers=(LOOP,), goals=near_memory(), check_steps=256),
    make_case(
        linear(4, 4096, 512),
        "beside torch's scan",
        peers=(ASSOCIATIVE,),
        goals={(ASSOCIATIVE, FORWARD): 20},
        modes=(FORWARD,),
        causes={(ASSOCIATIVE, FORWARD): TORCH_SCAN},
    ),
    make_case(
        linear(4, 4096, 512, torch.bfloat16),
        peers=(LOOP,),
        goals=near_memory(),
        causes=SIXTEEN_BITS_CAUSES,
        check_steps=256,
    ),
    make_case(linear(4, 4096, 256, torch.complex64), goals=near_memory(1 / 1.3, 1 / 1.3), check_steps=256),
    make_case(linear(4, 4096, 512, gate="constant gate"), goals=near_memory(), check_steps=256),
    make_case(Shape("linear_scan", 4, 4096, 8, 64, gate="gate per head"), goals=near_memory(), check_steps=256),
    make_case(linear(1, 262144, 64), "few channels", goals=near_memory(), check_steps=256),
    make_case(linear(64, 512, 256), "many rows", goals=near_memory(), check_steps=256),
    make_case(linear(16, 1, 1024, carried=True), "one step", peers=(LOOP,), modes=(INFERENCE,)),
    make_case(Shape("softmax_scan", 4, 4096, 8, 64), peers=(LOOP,), goals=near_memory(0.6, 0.6, 0.6), check_steps=256),
    make_case(
        Shape("softmax_scan", 4, 4096, 8, 64, torch.bfloat16),
        goals=near_memory(0.6, 0.6, 0.6),
        causes=SIXTEEN_BITS_CAUSES,
        check_steps=256,
    ),
    make_case(Shape("softmax_scan", 1, 65536, 8, 32), "few heads", goals=near_memory(0.6, 0.6, 0.6), check_steps=256),
]

COPY = {FORWARD: 0.85, BACKWARD: 0.80}
SOFTMAX_COPY = {FORWARD: 0.8, BACKWARD: 0.8}
# These take other layouts and sizes; where they are installed, their own benchmarks are to be run beside ours.
ABSENT = {
    title: f"{title} is not installed"
    for title, package in (("accelerated-scan", "accelerated_scan"), ("fla chunk_hgrn", "fla"))
    if find_spec(package) is None
}


def on_gpu(shape: Shape, goals: Mapping[str, float] = COPY, note: str = "GPU") -> Case:
    return make_case(
        shape,
        note,
        modes=(FORWARD, BACKWARD),
        copy_goals=goals,
        check_steps=256,
        devices=("cuda",),
        absent=ABSENT,
    )


GPU_CASES = [
    on_gpu(linear(B, T, C, dtype))
    for B, T, C in ((1, 1 << 20, 64), (1, 65536, 2048), (8, 8192, 1024), (64, 512, 2048))
    for dtype in (torch.float32, torch.bfloat16)
] + [
    on_gpu(linear(8, 8192, 512, torch.complex64)),
    on_gpu(linear(8, 8192, 1024, gate="constant gate")),
    on_gpu(Shape("linear_scan", 8, 8192, 16, 64, gate="gate per head")),
    *(
        on_gpu(Shape("softmax_scan", B, T, H, 64, dtype), SOFTMAX_COPY)
        for B, T, H in ((8, 8192, 16), (1, 262144, 4))
        for dtype in (torch.float32, torch.bfloat16)
    ),
]

CASES = [*CPU_CASES, *GPU_CASES]
