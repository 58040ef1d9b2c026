"""Combiner: attention to all keys, the far ones through summaries of blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import combiner_attention, range_attention
from .parts import Projections, append, check_positive, check_sequence, expect, wide
from .streaming import State, Streaming

PATTERNS = ("fixed", "logsparse", "axial")


class Combiner(Streaming):
    """Full attention at the cost of a sparse one: near keys as they are, a block of far keys as one summary.

        khat = pool k_j;  qhat = pool q_j;  vhat = sum_j softmax_j(<qhat, k_j> / sqrt(D)) v_j    over j in a span
        o_i = one softmax over direct keys and the khat of spans, with values v and vhat;  y = W_o o

    "fixed": direct keys are those of the query's block of `block_size` steps, spans are the earlier blocks.
    "logsparse": spans are nodes of a binary tree over blocks. "axial": steps are a grid with rows of `block_size`;
    direct keys are the own row and column. See `combiner_attention`. There are no positions: add them to x.

    Of the paper's patterns row-major axial, mixture and routing are left out.

    Args:
        dim: channels of x, a multiple of num_heads.
        num_heads: H, heads of dim / num_heads channels.
        block_size: s, steps of a block or of a grid's row.
        pattern: "fixed", "logsparse" or "axial".
        pool: "max" or "mean" of each channel in a span.
        causal: False: every step sees the whole sequence, and there is no state.
        device, dtype: of the parameters.

    Shapes: x [B, T, dim] -> y [B, T, dim].

    State: it **grows** with the sequence. "fixed": q, k, v of the open block [B, T mod s, 3, H, D] and the summaries of
    closed ones [B, T / s, 2, H, D]. The other patterns: q, k, v of all steps [B, T, 3, H, D], since a larger span's
    summary is no function of smaller ones'; what follows is computed together with everything before it. Not causal:
    None.

    Initialisation: Xavier's uniform, no biases.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: T (s + T / s) / 2 rows of keys a head ("fixed", causal), T (s + log2(T / s)) / 2 ("logsparse").

    Ren et al., "Combiner: full attention transformer with sparse computation cost", 2021.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        block_size: int,
        pattern: str = "fixed",
        pool: str = "max",
        causal: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_positive(self, block_size=block_size)
        expect(pattern in PATTERNS, self, "pattern", f"one of {', '.join(PATTERNS)}", repr(pattern))
        expect(pool in ("max", "mean"), self, "pool", "one of max, mean", repr(pool))
        self.dim, self.block_size, self.pattern, self.pool, self.causal = dim, block_size, pattern, pool, causal
        self.project = Projections(self, dim, num_heads, bias=False, device=device, dtype=dtype)
        for parameter in self.parameters():
            torch.nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        expect(self.causal or state is None, self, "state", "None where causal is False", "a state")
        new = torch.stack(self.project(x), 2)
        if not self.causal:
            return self.project.join(self.attend(new)), None
        if self.pattern != "fixed":
            rows = append(None if state is None else state[0], new)
            o = self.attend(rows)[:, rows.shape[1] - x.shape[1] :]
            return self.project.join(o), (rows,)
        before = (new[:, :0], new[:, :0, :2]) if state is None else state
        rows = append(before[0], new)
        ended = rows.shape[1] - rows.shape[1] % self.block_size
        closed = append(before[1], self.summaries(rows[:, :ended]))
        o = self.attend(new) if state is None else self.attend_after(rows, closed, x.shape[1], before[1].shape[1])
        return self.project.join(o), (rows[:, ended:].clone(), closed)

    def attend(self, rows: Tensor) -> Tensor:
        """rows [B, T, 3, H, D] of a whole sequence -> o [B, T, H, D]."""
        q, k, v = rows.unbind(2)
        return combiner_attention(q, k, v, self.block_size, pattern=self.pattern, pool=self.pool, causal=self.causal)

    def attend_after(self, rows: Tensor, closed: Tensor, queries: int, blocks: int) -> Tensor:
        """The last `queries` of rows [B, N, 3, H, D], which start a block; `blocks` closed ones are before it."""
        q, k, v = rows.unbind(2)
        khat, vhat = closed.unbind(2)
        i = torch.arange(queries, device=rows.device, dtype=torch.int32) + (rows.shape[1] - queries)
        own = torch.stack([i - i % self.block_size, i + 1])
        spans = torch.stack([torch.zeros_like(i), blocks + i // self.block_size])
        q = q[:, rows.shape[1] - queries :]
        return range_attention(q, k, v, own[None, None, None], khat, vhat, spans[None, None, None])[0]

    def summaries(self, rows: Tensor) -> Tensor:
        """q, k, v of whole blocks [B, n s, 3, H, D] -> khat, vhat [B, n, 2, H, D]."""
        q, k, v = wide(rows).unflatten(1, (rows.shape[1] // self.block_size, self.block_size)).unbind(3)
        khat, qhat = ((t.max(2).values if self.pool == "max" else t.mean(2)) for t in (k, q))
        weights = torch.softmax((qhat[:, :, None] * k).sum(-1) * k.shape[-1] ** -0.5, 2)
        return torch.stack([khat, (weights[..., None] * v).sum(2)], 2).to(rows.dtype)
