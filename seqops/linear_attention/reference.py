"""The specification of linear attention: one loop over time steps, in plain torch.

Letters: B batch, T time, H heads, K key width, V value width, N packed sequences; S the state [B, H, K, V].

Float64 stays; every other dtype is computed in float32, and only the outputs are rounded to the storage dtype. All
derivatives come from autograd, of any order. Arguments are not validated here.
"""

import math

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`S_t = exp(g_t) S_{t-1} + k_t v_t^T` and `o_t = scale S_t^T q_t`.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        log_decay: g, [H], [B, T, H] or [B, T, H, K]; None: 0. Above 0 it counts as 0; -inf resets: nothing of the state
            before passes, even if that is infinite or NaN.
        initial_state: [B, H, K, V], or [N, H, K, V] with cu_seqlens; None: zeros. Not with a window.
        scale: of the outputs; None: K**-0.5.
        causal: False: every position sees the sum over all of them; without decay and window.
        window: position t sees the positions t - window + 1 to t only.
        cu_seqlens: [N + 1] integers from 0 to T; B = 1. Sequence n is the steps `cu_seqlens[n]:cu_seqlens[n + 1]`.

    Returns:
        `o` [B, T, H, V] in the dtype of v, and the state after the last step, with a window of the last `window` steps,
        [B or N, H, K, V] in the dtype of the arithmetic.

    Katharopoulos et al., "Transformers are RNNs: fast autoregressive transformers with linear attention", 2020; Yang et
    al., "Gated linear attention transformers with hardware-efficient training", 2024.
    """
    precision = torch.float64 if v.dtype == torch.float64 else torch.float32
    storage = v.dtype
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (t.to(precision) for t in (q, k, v))
    batch, steps, heads, key_width = q.shape
    if log_decay is None:
        log_decay = q.new_zeros(heads)
    g = log_decay.to(precision)
    g = g.reshape(*g.shape, *(1 for _ in range(4 - g.ndim))) if g.ndim > 1 else g[:, None]
    g = g.expand(batch, steps, heads, g.shape[-1])

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        if not causal:
            state = state + torch.einsum("bthk,bthv->bhkv", k, v)
            return factor * torch.einsum("bthk,bhkv->bthv", q, state), state
        if window is not None and q.shape[1] > 0:
            states = windowed(k, v, g, window)
            return factor * torch.einsum("bthk,bthkv->bthv", q, states), states[:, -1].clone()
        outputs = []
        for t in range(q.shape[1]):
            state = decayed(g[:, t], state) + outer(k[:, t], v[:, t])
            outputs.append(factor * torch.einsum("bhk,bhkv->bhv", q[:, t], state))
        return torch.stack(outputs, 1) if outputs else v.clone(), state

    # Copies, because what is returned for T = 0 must not be the caller's own tensor.
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    size = (rows, heads, key_width, v.shape[-1])
    state = q.new_zeros(size) if initial_state is None else initial_state.to(precision, copy=True)
    if cu_seqlens is None:
        o, state = run(q, k, v, g, state)
        return o.to(storage), state
    edges = cu_seqlens.tolist()
    # The empty pieces in front stand for no sequence at all, and tie the results to the graph of the arguments.
    outputs, states = [v[:, :0]], [state[:0]]
    for n in range(rows):
        at = slice(edges[n], edges[n + 1])
        o, last = run(q[:, at], k[:, at], v[:, at], g[:, at], state[n : n + 1])
        outputs.append(o)
        states.append(last)
    return torch.cat(outputs, 1).to(storage), torch.cat(states)


def decayed(g: Tensor, state: Tensor) -> Tensor:
    """exp(min(g, 0)) S, g [B, H, 1 or K]; where g is -inf nothing passes, neither NaN nor the gradient of one."""
    reset = (g == -math.inf)[..., None]
    decay = g.clamp(max=0)[..., None].masked_fill(reset, 0.0).exp()
    return (decay * state.masked_fill(reset, 0.0)).masked_fill(reset, 0.0)


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def windowed(k: Tensor, v: Tensor, g: Tensor, window: int) -> Tensor:
    """The states [B, T, H, K, V] of all positions, each begun anew `window` steps before: nothing is subtracted."""
    steps = k.shape[1]

    def late(x: Tensor, lag: int) -> Tensor:
        return torch.cat([torch.zeros_like(x[:, :lag]), x[:, : steps - lag]], 1)

    states = torch.zeros_like(outer(k, v))
    for lag in reversed(range(min(window, steps))):
        states = decayed(late(g, lag), states) + outer(late(k, lag), late(v, lag))
    return states
