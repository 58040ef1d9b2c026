"""The specification of the convolutions, in plain torch.

Letters: B batch, T time, D channels, W taps, S = (W - 1) dilation steps of state, N packed sequences; in fft_conv L
taps and N kernels of a channel.

Float64 stays; every other dtype is computed in float32, and only the outputs are rounded to the storage dtype. All
derivatives come from autograd, of any order. Arguments are not validated here.
"""

import torch
from torch import Tensor


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    dilation: int = 1,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`z_t = bias + sum_j weight[:, W-1-j] * x_{t - j dilation}`, each channel by itself; y is z or silu(z).

    Args:
        x: [B, T, D].
        weight: [D, W]; its last tap meets the current step.
        bias: [D]; None: zeros.
        initial_state: [B, S, D], or [N, S, D] with cu_seqlens: the steps before the first; None: zeros.
        dilation: steps between taps.
        activation: None or "silu".
        cu_seqlens: [N + 1] integers from 0 to T; B = 1. Sequence n is the steps `cu_seqlens[n]:cu_seqlens[n + 1]`.

    Returns:
        `y` [B, T, D] and the last S steps of the state and x one after the other, [B or N, S, D], in the dtype of x.
    """
    precision = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch, _, channels = x.shape
    width = weight.shape[1]
    before = (width - 1) * dilation
    rows = batch if cu_seqlens is None else len(cu_seqlens) - 1
    state = x.new_zeros(rows, before, channels) if initial_state is None else initial_state
    taps = weight.to(precision).unbind(1)

    def run(x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat((state, x), 1)
        steps = x.shape[1]
        z = x.new_zeros(x.shape, dtype=precision)
        z = z if bias is None else z + bias.to(precision)
        for tap, start in zip(taps, range(0, before + 1, dilation), strict=True):
            z = z + tap * joined[:, start : start + steps].to(precision)
        y = z * torch.sigmoid(z) if activation == "silu" else z
        return y.to(x.dtype), joined[:, steps:].clone()

    if cu_seqlens is None:
        return run(x, state)
    edges = cu_seqlens.tolist()
    pieces = [run(x[:, edges[n] : edges[n + 1]], state[n : n + 1]) for n in range(rows)]
    if not pieces:
        return x.new_empty(x.shape), state.clone()
    outputs, states = zip(*pieces, strict=True)
    return torch.cat(outputs, 1), torch.cat(states)


def fft_conv(u: Tensor, k: Tensor, skip: Tensor | None = None) -> Tensor:
    """`y_t = sum_l k_l u_{t-l} + skip u_t`, each channel by itself, as a product with the matrix of all k_{t-s}.

    What is not finite counts as 0, then everything in its reach is NaN: of u_t the outputs t ... t + min(T, L) - 1 (at
    least y_t, where there is a skip), of k_l those from l on, of skip all.

    Args:
        u: [B, T, D].
        k: [D, L], or [D, N, L] for N outputs of a channel.
        skip: [D]; None: zeros.

    Returns:
        [B, T, D] or [B, T, D, N] in the dtype of u.
    """
    precision = torch.float64 if u.dtype == torch.float64 else torch.float32
    steps = u.shape[1]
    taps = (k[:, None] if k.ndim == 2 else k)[..., :steps].to(precision)
    taps = torch.nn.functional.pad(taps, (0, steps - taps.shape[-1]))
    reach = min(steps, k.shape[-1])
    if skip is not None:
        reach = max(reach, 1)
        taps = taps + torch.nn.functional.pad(skip.to(precision)[:, None, None], (0, steps))[..., :steps]
    x = u.to(precision)
    bad_x, bad_taps = ~x.isfinite(), ~taps.isfinite()
    x, taps = torch.where(bad_x, 0, x), torch.where(bad_taps, 0, taps)

    time = torch.arange(steps, device=u.device)
    lag = time[:, None] - time
    matrix = torch.where(lag >= 0, taps[..., lag.clamp(min=0)], 0)  # [D, N, T, T]
    y = torch.einsum("dnts,bsd->btdn", matrix, x)

    within = ((lag >= 0) & (lag < reach)).to(precision)
    reached = torch.einsum("ts,bsd->btd", within, bad_x.to(precision)) > 0
    y = torch.where(reached[..., None] | (bad_taps.cumsum(-1) > 0).permute(2, 0, 1), torch.nan, y).to(u.dtype)
    return y.reshape(*u.shape, *k.shape[1:-1])
