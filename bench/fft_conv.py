"""Cases of fft_conv, on the CPU and on a GPU.

Letters: B batch, T time, D channels, N kernels of a channel, L taps.

The peer `torch.fft` is what is written without this operator: `rfft` of everything along time, padded to a power of
two, one product, `irfft`, the first T steps; on the sequence as it lies, and on a transposed view. `same bytes` is a
clone of u: what remains where nothing is computed.

Bytes count u, y and k once for each pass that has to read or write them, operations are those of real transforms of
T + L numbers. The reference is the peer's code in float64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.harness import BACKWARD, FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender

SAME_BYTES = "same bytes"
PLAIN, TRANSPOSED = "torch.fft", "torch.fft, transposed"
DIRECT = "causal_conv1d"
HALF = (torch.bfloat16, torch.float16)
# Sequences that a pass reads or writes: of u's size, and of y's.
OF_U, OF_Y = {FORWARD: 1, INFERENCE: 1, BACKWARD: 2, TRAINING: 3}, {FORWARD: 1, INFERENCE: 1, BACKWARD: 1, TRAINING: 2}
# Transforms there and back: of u and y; of u, dy and du; both.
TRANSFORMS = {FORWARD: 2, INFERENCE: 2, BACKWARD: 3, TRAINING: 5}


@dataclass(frozen=True)
class Shape:
    B: int
    T: int
    D: int
    L: int
    N: int = 0  # 0: k is [D, L]
    dtype: torch.dtype = torch.float32

    @property
    def letters(self) -> dict[str, int]:
        return {"B": self.B, "T": self.T, "D": self.D} | ({"N": self.N} if self.N else {}) | {"L": self.L}

    @property
    def outputs(self) -> int:
        """Of a step."""
        return self.D * max(self.N, 1)

    def count_bytes(self, mode: str) -> int:
        sequences = self.B * self.T * (OF_U[mode] * self.D + OF_Y[mode] * self.outputs)
        taps = self.outputs * self.L * {FORWARD: 1, INFERENCE: 1, BACKWARD: 2, TRAINING: 3}[mode]
        return (sequences + taps) * self.dtype.itemsize

    def count_flops(self, mode: str) -> int:
        n = self.T + min(self.T, self.L)
        transform = 2.5 * n * math.log2(max(n, 2))
        return round(self.B * self.outputs * TRANSFORMS[mode] * transform)


def draw(shape: Shape, steps: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs by name, rounded to the storage dtype, then in `dtype`."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(sizes, generator=generator, device=device) * scale
        return values.to(shape.dtype).to(dtype).requires_grad_()

    kernels = (shape.N,) if shape.N else ()
    u = normal(shape.B, steps, shape.D)
    k = normal(shape.D, *kernels, shape.L, scale=shape.L**-0.5)
    return {"u": u, "k": k, "skip": normal(shape.D)}


def build(shape: Shape, function: str, dtype: torch.dtype, steps: int, device: str = "cpu") -> Contender:
    leaves = draw(shape, steps, dtype, device)
    return Contender(lambda: {"y": FUNCTIONS[function](**leaves)}, leaves)


def ours(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    import seqops

    return seqops.fft_conv(u, k, skip)


def padded(u: Tensor, k: Tensor) -> int:
    """Of the lengths that suffice the power of two, which transforms take best."""
    return 1 << (u.shape[1] + min(u.shape[1], k.shape[-1]) - 2).bit_length()


def plain(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    """Along time as it lies; 16-bit storage through float32."""
    steps, n, wide = u.shape[1], padded(u, k), torch.float32 if u.dtype in HALF else u.dtype
    taps = k[..., :steps].to(wide)
    spectrum = torch.fft.rfft(u.to(wide), n, 1)
    filters = torch.fft.rfft(taps, n).movedim(-1, 0)
    product = spectrum * filters if k.ndim == 2 else spectrum[..., None] * filters
    added = skip * u if k.ndim == 2 else (skip * u)[..., None]
    return torch.fft.irfft(product, n, 1)[:, :steps].to(u.dtype) + added


def transposed(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    steps, n, wide = u.shape[1], padded(u, k), torch.float32 if u.dtype in HALF else u.dtype
    spectrum = torch.fft.rfft(u.to(wide).transpose(1, 2), n)
    filters = torch.fft.rfft(k[..., :steps].to(wide), n)
    y = torch.fft.irfft(spectrum * filters, n)[..., :steps]
    return y.transpose(1, 2).to(u.dtype) + skip * u


def by_conv1d(u: Tensor, k: Tensor, skip: Tensor) -> Tensor:
    import seqops

    return seqops.causal_conv1d(u, k.flip(1))[0] + skip * u


FUNCTIONS = {OURS: ours, REFERENCE: plain, PLAIN: plain, TRANSPOSED: transposed, DIRECT: by_conv1d}


def build_same_bytes(shape: Shape, steps: int, device: str = "cpu") -> Contender:
    u = torch.ones(shape.B, steps, shape.D, dtype=shape.dtype, device=device)

    def run() -> dict[str, Tensor]:
        u.clone()
        return {}

    return Contender(run, {})


def make_case(
    shape: Shape,
    peers: tuple[str, ...] = (PLAIN, TRANSPOSED),
    goals: Mapping[tuple[str, str], float] | None = None,
    modes: tuple[str, ...] = (FORWARD, BACKWARD, TRAINING),
    note: str = "",
    devices: tuple[str, ...] = ("cpu",),
    absent: Mapping[str, str] | None = None,
) -> Case:
    exact = {REFERENCE: partial(build, shape, REFERENCE, torch.float64)}
    builders = {name: partial(build, shape, name, shape.dtype) for name in (*peers, OURS)}
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    return Case(
        op="fft_conv",
        name=" ".join(part for part in ("fft_conv", precision, sizes, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders | exact,
        flops={mode: shape.count_flops(mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(peer, mode): goal for (peer, mode), goal in (goals or {}).items() if mode in modes},
        devices=devices,
        yardsticks={} if shape.N else {(SAME_BYTES, FORWARD): partial(build_same_bytes, shape)},
        absent=absent or {},
    )


def faster(ratio: float = 1.5, peers: tuple[str, ...] = (PLAIN, TRANSPOSED)) -> dict[tuple[str, str], float]:
    return {(peer, mode): ratio for peer in peers for mode in (FORWARD, BACKWARD, TRAINING)}


CPU_CASES = [
    make_case(Shape(4, 1024, 512, 1024), goals=faster()),
    make_case(Shape(4, 4096, 512, 4096), goals=faster()),
    make_case(Shape(4, 16384, 256, 16384), goals=faster()),
    make_case(Shape(4, 4096, 512, 4096, dtype=torch.bfloat16), goals=faster()),
    make_case(Shape(4, 4096, 256, 256), goals=faster()),
    make_case(Shape(4, 4096, 512, 64), (PLAIN, DIRECT), goals=faster(1.5, (PLAIN,))),
    make_case(Shape(1, 65536, 32, 65536), goals=faster(), note="one row"),
    make_case(Shape(32, 128, 1, 128, N=256), (PLAIN,), goals=faster(1.5, (PLAIN,)), note="many kernels"),
]

ABSENT = {"FlashFFTConv": "FlashFFTConv is not installed"}


def on_gpu(shape: Shape) -> Case:
    return make_case(shape, goals=faster(), modes=(FORWARD, BACKWARD), note="GPU", devices=("cuda",), absent=ABSENT)


GPU_CASES = [
    on_gpu(Shape(B, T, D, T, dtype=dtype))
    for B, T, D in ((8, 1024, 1024), (8, 4096, 1024), (4, 16384, 512), (1, 131072, 256))
    for dtype in (torch.float32, torch.bfloat16)
]

CASES = [*CPU_CASES, *GPU_CASES]
