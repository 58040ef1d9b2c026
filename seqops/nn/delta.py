"""DeltaAttention: attention whose distant keys are held until they change by more than a threshold."""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import delta_attention, range_attention
from .parts import Projections, append, check_sequence, expect, keep_last
from .streaming import State, Streaming

MODES = ("element", "row")


class DeltaAttention(Streaming):
    """Causal attention in which a distant key is what it was when it last changed by more than a threshold.

        h_t = k_t where |k_t - h_{t-1}| > threshold, else h_{t-1};  h_{-1} = 0
        s_ij = <q_i, k_j> / sqrt(D) where i - j < window or j < sink, else <q_i, h_j> / sqrt(D)
        o_i = sum_{j <= i} softmax_j(s_ij) v_j;  y = W_o o

    It needs no training: weights of plain attention can be loaded, and with threshold 0 it is plain attention. Few
    channels of h change from step to step, which a compressed store can make use of; this module keeps h dense. There
    are no positions. The paper's threshold (0.6 here) and start value h_{-1} could not be confirmed.

    Args:
        dim: channels of x, a multiple of num_heads.
        num_heads: H, heads of dim / num_heads channels.
        threshold: 0 or more.
        window: last steps whose keys are seen as they are, the query's own among them; 0 or more.
        sink: first steps whose keys are seen as they are; 0 or more.
        mode: "element": each channel is held by itself; "row": all channels of a head's key move together.
        device, dtype: of the parameters.

    Shapes: x [B, T, dim] -> y [B, T, dim].

    State: held keys and values of all steps [B, T, H, D], which **grow**; keys of the first `sink` steps and of the
    last `window`.

    Initialisation: torch.nn.Linear's, no biases.

    Raises:
        ValueError: naming the argument, what was expected and what was got.

    Cost: T^2 / 2 products of queries and keys a head, as plain attention.

    "DeltaLLM: a training-free framework exploiting temporal sparsity for efficient edge LLM inference", 2025.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        threshold: float = 0.6,
        window: int = 64,
        sink: int = 4,
        mode: str = "element",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        expect(threshold >= 0, self, "threshold", "a number >= 0", threshold)
        for name, size in (("window", window), ("sink", sink)):
            expect(isinstance(size, int) and size >= 0, self, name, "a whole number >= 0", size)
        expect(mode in MODES, self, "mode", f"one of {', '.join(MODES)}", repr(mode))
        self.dim, self.threshold, self.window, self.sink, self.mode = dim, threshold, window, sink, mode
        self.project = Projections(self, dim, num_heads, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        check_sequence(self, x, self.dim)
        q, k, v = self.project(x)
        if state is None:
            options = {"window": self.window, "sink": self.sink, "mode": self.mode}
            o, _ = delta_attention(q, k, v, self.threshold, **options)
            held = self.hold(k)
            return self.project.join(o), (held, v.clone(), k[:, : self.sink].clone(), keep_last(k, self.window))
        v, held = append(state[1], v), append(state[0], self.hold(k, state[0]))
        sinks, near = append(state[2], k)[:, : self.sink].clone(), append(state[3], k)
        # Keys as they are: the first and the last ones. Between, where no query looks for them, held ones.
        began = held.shape[1] - near.shape[1]
        start = max(began, sinks.shape[1])
        exact = torch.cat([sinks, held[:, sinks.shape[1] : start], near[:, start - began :]], 1)
        i = torch.arange(x.shape[1], device=x.device, dtype=torch.int32) + state[0].shape[1]
        first = (i + 1 - self.window).clamp(min=0)
        middle = first.clamp(max=self.sink)
        seen = torch.stack([torch.zeros_like(i), middle, first, i + 1]).view(1, 1, 2, 2, -1)
        between = torch.stack([middle, first])[None, None, None]
        o, _ = range_attention(q, exact, v, seen, held, v, between)
        return self.project.join(o), (held, v, sinks, keep_last(near, self.window))

    def hold(self, k: Tensor, held: Tensor | None = None) -> Tensor:
        """Held keys of the new steps k [B, T, H, D], after those of all steps before."""
        by_row = self.mode == "row"
        if held is None or held.shape[1] == 0:
            return torch.ops.seqops.held_keys(k, self.threshold, by_row)
        # Two rows before the new ones make the operator, which starts from 0, hold what was held: one that is further
        # from both than the threshold, and the held one.
        last = held[:, -1:].to(k.dtype)
        away = last.detach() + torch.copysign(torch.full_like(last, 2 * self.threshold + 1), last.detach())
        return torch.ops.seqops.held_keys(torch.cat([away, last, k], 1), self.threshold, by_row)[:, 2:]
