"""Cases of delta_attention, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py, w positions of the window. The one peer, and in float64 the reference:

* `loop and SDPA` is what is written in plain PyTorch: the held keys step after step, and SDPA over keys and held keys
  together, with a mask of [T, 2 T].

Operations are those of causal attention: each key is seen once, as it is or as held.
"""

from functools import partial

import torch
from torch import Tensor

from bench.attention_peers import DENSE, Shape, build, dense, make_case, positions, triangle
from bench.harness import FORWARD, REFERENCE, TRAINING, Case

LOOP = "loop and SDPA"
SINK = 4


def ours(q: Tensor, k: Tensor, v: Tensor, threshold: float, window: int) -> Tensor:
    import seqops

    return seqops.delta_attention(q, k, v, threshold, window=window, sink=SINK)[0]


def loop_and_mask(q: Tensor, k: Tensor, v: Tensor, threshold: float, window: int) -> Tensor:
    last, rows = torch.zeros_like(k[:, 0]), []
    wide = torch.float64 if k.dtype == torch.float64 else torch.float32  # of the change
    for row in k.unbind(1):
        last = torch.where((row.to(wide) - last.to(wide)).abs() > threshold, row, last)
        rows.append(last)
    i, j = positions(q.shape[1], q.device.type)
    direct = (i - j < window) | (j < SINK)
    seen = torch.cat([(j <= i) & direct, (j <= i) & ~direct], 1)
    return dense(q, torch.cat([k, torch.stack(rows, 1)], 1), torch.cat([v, v], 1), seen)


def causal(steps: int, device: str) -> Tensor:
    return torch.ones(steps, steps, dtype=torch.bool, device=device).tril()


def case(shape: Shape, threshold: float, window: int, *words: str, gpu: bool = False) -> Case:
    options = {"threshold": threshold, "window": window}
    made = make_case(
        "delta_attention",
        shape,
        causal,
        triangle(shape.T),
        ours=partial(ours, **options),
        words=(f"w{window}", *words),
        builders={
            LOOP: partial(build, shape, partial(loop_and_mask, **options), shape.dtype),
            REFERENCE: partial(build, shape, partial(loop_and_mask, **options), torch.float64),
        },
        goals={(LOOP, mode): 3.0 for mode in (FORWARD, TRAINING)},
        devices=("cuda",) if gpu else ("cpu",),
    )
    made.builders.pop(DENSE)  # of causal attention, which is something else
    return made


CPU_CASES = [
    case(Shape(1, 2048, 8, 64), 0.6, 128),
    case(Shape(1, 2048, 8, 64, Hk=2), 0.6, 128),
    case(Shape(1, 2048, 8, 64, dtype=torch.bfloat16), 0.6, 128),
]
GPU_CASES = [case(Shape(4, 4096, 16, 64, Hk=4, dtype=torch.bfloat16), 0.6, 256, "GPU", gpu=True)]
CASES = [*CPU_CASES, *GPU_CASES]
