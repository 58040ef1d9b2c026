"""Cases of window_attention, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py, w positions of the window on a side. The peer beside those of that file:

* `SDPA of blocks` cuts the queries into blocks of w, copies the keys that each of them can reach, 2 w or 3 w of them,
  and calls SDPA with a mask of blocks: what is written in plain PyTorch. It knows no global positions.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bench.attention_peers import DENSE, FLEX, Shape, dense, make_case, positions
from bench.harness import FORWARD, TRAINING, Case

BLOCKS = "SDPA of blocks"


def ours(q: Tensor, k: Tensor, v: Tensor, left: int, right: int, globals: tuple[int, ...]) -> Tensor:
    import seqops

    index = torch.tensor(globals, device=q.device) if globals else None
    return seqops.window_attention(q, k, v, left, right, global_index=index)[0]


def visible(left: int, right: int, globals: tuple[int, ...], b: Any, h: Any, i: Tensor, j: Tensor) -> Tensor:
    seen = (i - j <= left) & (j - i <= right)
    for position in globals:
        seen = seen | (i == position) | (j == position)
    return seen & (j <= i) if right == 0 else seen


def mask(steps: int, device: str, left: int, right: int, globals: tuple[int, ...]) -> Tensor:
    return visible(left, right, globals, None, None, *positions(steps, device))


def blocks_of_queries(q: Tensor, k: Tensor, v: Tensor, left: int, right: int) -> Tensor:
    """Left and right are equal, or right is 0."""
    batch, steps, size = q.shape[0], q.shape[1], left
    missing = -steps % size
    blocks = pad(q, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, size)).flatten(0, 1)
    reach = size + left + right
    keys, values = (
        pad(x, (0, 0, 0, 0, left, missing + right)).unfold(1, reach, size).movedim(-1, 2).flatten(0, 1) for x in (k, v)
    )
    count = blocks.shape[0] // batch
    first = torch.arange(count, device=q.device)[:, None, None] * size
    i, j = first + torch.arange(size, device=q.device)[:, None], first - left + torch.arange(reach, device=q.device)
    # A query beyond the end sees itself, or it would see nothing.
    seen = (i - j <= left) & (j - i <= right) & (j >= 0) & ((j < steps) | (j == i))
    o = dense(blocks, keys, values, seen[:, None].repeat(batch, 1, 1, 1))
    return o.unflatten(0, (batch, count)).flatten(1, 2)[:, :steps]


def case(shape: Shape, left: int, right: int, *words: str, globals: tuple[int, ...] = (), gpu: bool = False) -> Case:
    options: dict[str, Any] = {"left": left, "right": right, "globals": globals}
    both = (FORWARD, TRAINING)
    goals = {(DENSE, mode): 3.0 for mode in both} | ({(FLEX, mode): 1.2 for mode in both} if gpu else {})
    named = (f"w{left}", "" if right else "causal", f"{len(globals)} global" if globals else "", *words)
    return make_case(
        "window_attention",
        shape,
        partial(mask, **options),
        count_pairs(shape.T, **options),
        ours=partial(ours, **options),
        words=named,
        peers={} if globals else {BLOCKS: partial(blocks_of_queries, left=left, right=right)},
        visible=partial(visible, left, right, globals) if gpu else None,
        goals=goals,
        devices=("cuda",) if gpu else ("cpu",),
    )


def count_pairs(steps: int, left: int, right: int, globals: tuple[int, ...]) -> int:
    """Row by row: a window's keys, and the global ones that it does not hold; the rows of global positions."""
    pairs = 0
    for i in range(steps):
        end = i + 1 if right == 0 else steps
        if i in globals:
            pairs += end
            continue
        first, last = max(i - left, 0), min(i + right + 1, steps)
        pairs += last - first + sum(position < end and not first <= position < last for position in globals)
    return pairs


CPU_CASES = [
    case(Shape(2, 4096, 8, 64), 256, 0),
    case(Shape(2, 4096, 8, 64), 256, 256),
    case(Shape(2, 4096, 8, 64), 256, 256, globals=(0,)),
    case(Shape(2, 4096, 8, 64), 256, 0, globals=(0, 1, 2, 3)),
    case(Shape(2, 4096, 8, 64, dtype=torch.bfloat16), 256, 0),
    case(Shape(2, 4096, 8, 64, Hk=2), 256, 0),
    case(Shape(2, 4096, 8, 64), 32, 32),
]
GPU_CASES = [
    case(Shape(B, T, 16, D, dtype=torch.bfloat16), w, right, "GPU", globals=globals, gpu=True)
    for B, T, D, w, right, globals in (
        (8, 8192, 64, 256, 0, ()),
        (8, 4096, 64, 256, 256, (0,)),
        (4, 16384, 128, 1024, 0, (0, 1, 2, 3)),
    )
]
CASES = [*CPU_CASES, *GPU_CASES]
