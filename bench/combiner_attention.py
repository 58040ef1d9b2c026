"""Cases of combiner_attention, on the CPU and on a GPU.

Letters: those of bench/attention_peers.py, s positions of a block or of a grid's row. No public implementation has
kernels for it: the peer is the best composition of PyTorch's operators that we found, for T that s divides. It cuts
time into blocks by views, takes scores of direct keys and of summaries by batched products, joins them and calls one
softmax. Operations are counted as if that softmax had no masked entries, and summaries by one pass over each span.
"""

from functools import partial

import torch
from torch import Tensor

from bench.attention_peers import Shape, build, dense
from bench.harness import FORWARD, OURS, REFERENCE, TRAINING, Case

COMPOSED = "PyTorch composition"


def ours(q: Tensor, k: Tensor, v: Tensor, block_size: int, pattern: str, pool: str) -> Tensor:
    import seqops

    return seqops.combiner_attention(q, k, v, block_size, pattern=pattern, pool=pool)


def reference(q: Tensor, k: Tensor, v: Tensor, block_size: int, pattern: str, pool: str) -> Tensor:
    from seqops.attention import reference as exact

    return exact.combiner_attention(q, k, v, block_size, pattern=pattern, pool=pool)


def pooled(x: Tensor, pool: str, dim: int) -> Tensor:
    return x.amax(dim) if pool == "max" else x.mean(dim)


def summaries(q: Tensor, k: Tensor, v: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Of spans [..., n, D]: khat and vhat [..., D]; q is scaled."""
    weights = torch.softmax(k @ pooled(q, pool, -2).unsqueeze(-1), -2)
    return pooled(k, pool, -2), (weights.mT @ v).squeeze(-2)


def composed(q: Tensor, k: Tensor, v: Tensor, block_size: int, pattern: str, pool: str) -> Tensor:
    if q.shape[1] <= block_size:
        return dense(q, k, v, causal=True)
    scaled = q * q.shape[3] ** -0.5
    q, k, v = (x.transpose(1, 2).unflatten(2, (-1, block_size)) for x in (scaled, k, v))  # [B, H, N, s, D]
    if pattern == "axial":
        o = composed_axial(q, k, v, pool)
    else:
        if pattern == "fixed":
            khat, vhat = summaries(q, k, v, pool)  # [B, H, N, D]
            hidden = torch.ones(khat.shape[2], khat.shape[2], dtype=torch.bool, device=q.device).triu()
            far, values = (q.flatten(2, 3) @ khat.mT).unflatten(2, (-1, block_size)), vhat.unsqueeze(2)
            far = far.masked_fill(hidden[:, None], -torch.inf)
        else:
            far, values = composed_levels(q, k, v, pool)
        o = joined(q, k, v, far, values)
    return o.flatten(2, 3).transpose(1, 2)


def joined(q: Tensor, k: Tensor, v: Tensor, far: Tensor, values: Tensor) -> Tensor:
    """One softmax over a block's own keys, up to the query, and scores `far` of rows `values`."""
    s = q.shape[3]
    later = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    near = (q @ k.mT).masked_fill(later, -torch.inf)
    weights = torch.softmax(torch.cat([near, far], -1), -1)
    return weights[..., :s] @ v + weights[..., s:] @ values


def composed_levels(q: Tensor, k: Tensor, v: Tensor, pool: str) -> tuple[Tensor, Tensor]:
    """Scores and rows of each block's left siblings: one a level, masked where it has none."""
    blocks, rows_k, rows_v, hidden = q.shape[2], [], [], []
    block, level = torch.arange(blocks, device=q.device), 0
    while 2 << level <= blocks:
        parts = [x.unflatten(2, (-1, 2, 1 << level))[:, :, :, 0].flatten(3, 4) for x in (q, k, v)]
        khat, vhat = summaries(*parts, pool)
        sibling = block >> (level + 1)
        rows_k.append(khat[:, :, sibling])
        rows_v.append(vhat[:, :, sibling])
        hidden.append((block >> level & 1) == 0)
        level += 1
    khat, vhat = torch.stack(rows_k, 3), torch.stack(rows_v, 3)  # [B, H, N, levels, D]
    return (q @ khat.mT).masked_fill(torch.stack(hidden, 1).unsqueeze(1), -torch.inf), vhat


def composed_axial(q: Tensor, k: Tensor, v: Tensor, pool: str) -> Tensor:
    """Running pools down the grid [R, s]; row 0 has no summaries."""
    rows, s = q.shape[2:4]
    if pool == "max":
        qhat, khat = (x.cummax(2).values for x in (q, k))
    else:
        count = torch.arange(1, rows + 1, device=q.device, dtype=q.dtype)[:, None, None]
        qhat, khat = (x.cumsum(2) / count for x in (q, k))
    above = torch.ones(rows, rows, dtype=torch.bool, device=q.device).tril()
    by_column = [x.transpose(2, 3) for x in (q, k, v, qhat)]  # [B, H, s, R, D]
    inner = (by_column[3] @ by_column[1].mT).masked_fill(~above, -torch.inf)
    vhat = (torch.softmax(inner, -1) @ by_column[2]).transpose(2, 3)
    khat, vhat = (torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2) for x in (khat, vhat))
    later = torch.ones(s, s, dtype=torch.bool, device=q.device).triu(1)
    own = torch.eye(s, dtype=torch.bool, device=q.device)
    first = (torch.arange(rows, device=q.device) == 0)[:, None, None]
    near = (q @ k.mT).masked_fill(later, -torch.inf)
    far = (q @ khat.mT).masked_fill(own | first, -torch.inf)
    column = (by_column[0] @ by_column[1].mT).masked_fill(~above.tril(-1), -torch.inf).transpose(2, 3)
    weights = torch.softmax(torch.cat([near, far, column], -1), -1)
    by_row, summary, down = weights.split([s, s, rows], -1)
    return by_row @ v + summary @ vhat + (down.transpose(2, 3) @ by_column[2]).transpose(2, 3)


def count_pairs(T: int, s: int, pattern: str) -> int:
    """Multiplications by a row, of queries and of summaries, half of those of scores and half of those of values."""
    blocks = T // s
    own = blocks * s * (s + 1) // 2
    if pattern == "fixed":
        return own + s * blocks * (blocks - 1) // 2 + T
    if pattern == "logsparse":
        levels = (blocks - 1).bit_length()
        return own + s * sum(block.bit_count() for block in range(blocks)) + T * levels // 2
    return own + T * (blocks - 1) // 2 * 2 + s * (s - 1) * (blocks - 1)


def case(
    shape: Shape, block_size: int, pattern: str = "fixed", pool: str = "max", *words: str, gpu: bool = False
) -> Case:
    options = {"block_size": block_size, "pattern": pattern, "pool": pool}
    modes, device = (FORWARD, TRAINING), "cuda" if gpu else "cpu"
    pairs = count_pairs(shape.T, block_size, pattern)
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    name = " ".join(filter(None, ("combiner_attention", precision, sizes, f"s{block_size}", pattern, pool, *words)))
    return Case(
        op="combiner_attention",
        name=name,
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders={
            COMPOSED: partial(build, shape, partial(composed, **options), shape.dtype),
            OURS: partial(build, shape, partial(ours, **options), shape.dtype),
            REFERENCE: partial(build, shape, partial(reference, **options), torch.float64),
        },
        flops={mode: shape.count_flops(pairs, mode) for mode in modes},
        bytes={mode: shape.count_bytes(mode) for mode in modes},
        modes=modes,
        goals={(COMPOSED, mode): 3.0 if gpu else 5.0 for mode in modes},
        check_steps=4 * block_size,
        devices=(device,),
    )


CPU_CASES = [
    *(case(Shape(2, 2048, 8, 64), 128, pattern) for pattern in ("fixed", "logsparse", "axial")),
    case(Shape(2, 2048, 8, 64), 128, "fixed", "mean"),
    case(Shape(2, 2048, 8, 64, dtype=torch.bfloat16), 128),
    case(Shape(1, 16384, 8, 64), 128),
]
GPU_CASES = [
    case(Shape(8, 8192, 12, 64, dtype=torch.bfloat16), 128, pattern, "max", "GPU", gpu=True)
    for pattern in ("fixed", "logsparse", "axial")
]
CASES = [*CPU_CASES, *GPU_CASES]
