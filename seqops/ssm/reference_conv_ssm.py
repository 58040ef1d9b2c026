"""The specification of conv_ssm: one loop over time, complex numbers written as their two parts, in plain torch.

Letters: B batch, T time, Y and X pixels, U channels of a frame, P complex channels of the state, kh and kw the sizes of
a kernel, different ones for b, c and d.

Float64 and complex128 stay; every other dtype is computed in float32, and only `y` is rounded to the storage dtype. All
derivatives come from autograd, of any order. Arguments are not validated here.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad


def convolve(frames: Tensor, kernel: Tensor) -> Tensor:
    """`sum_ij frames[y + i - before, x + j - before] @ kernel[i, j]`, zero outside the frame; before = (k - 1) // 2.

    frames [B, Y, X, I], kernel [kh, kw, I, O] -> [B, Y, X, O].
    """
    height, width = kernel.shape[:2]
    rows, columns = frames.shape[1:3]
    above, left = (height - 1) // 2, (width - 1) // 2
    padded = pad(frames, (0, 0, left, width - 1 - left, above, height - 1 - above))
    total = frames.new_zeros(*frames.shape[:3], kernel.shape[3])
    for i in range(height):
        for j in range(width):
            pixels = padded[:, i : i + rows, j : j + columns].flatten(0, 2)
            total = total + (pixels @ kernel[i, j]).view(total.shape)
    return total


def conv_ssm(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`x_t = a x_{t-1} + b * u_t` and `y_t = 2 Re(c * x_t) + d * u_t`, where `*` is `convolve`.

    Args:
        u: [B, T, Y, X, U], real.
        a: [P], complex. Exactly 0 resets, even a state that is infinite or NaN.
        b: [kh, kw, U, P], complex.
        c: [kh, kw, P, U], complex.
        d: [kh, kw, U, U], real; None: zero.
        initial_state: [B, Y, X, P], complex; None: zero.

    Returns:
        `y` [B, T, Y, X, U] in the dtype of u, and the state after the last step [B, Y, X, P], complex.

    Smith, De Mello, Kautz, Linderman and Byeon, "Convolutional state space models for long-range spatiotemporal
    modeling", 2023.
    """
    storage, precision = u.dtype, torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, _, rows, columns, _ = u.shape
    u = u.to(precision)
    resets = a == 0

    def step(x: tuple[Tensor, Tensor], u_t: Tensor) -> tuple[Tensor, Tensor]:
        lost = resets & ~(x[0].isfinite() & x[1].isfinite())
        re, im = (part.masked_fill(lost, 0.0) for part in x)
        return (
            a.real * re - a.imag * im + convolve(u_t, b.real),
            a.real * im + a.imag * re + convolve(u_t, b.imag),
        )

    def read(x: tuple[Tensor, Tensor], u_t: Tensor) -> Tensor:
        y_t = 2 * (convolve(x[0], c.real) - convolve(x[1], c.imag))
        return y_t if d is None else y_t + convolve(u_t, d.to(precision))

    if initial_state is None:
        x = (u.new_zeros(batch, rows, columns, a.shape[0]),) * 2
    else:
        x = (initial_state.real, initial_state.imag)
    outputs = []
    for u_t in u.unbind(1):
        x = step(x, u_t)
        outputs.append(read(x, u_t))
    # New memory: what is returned for T = 0 must not be the caller's own tensor.
    y = torch.stack(outputs, 1) if outputs else u.clone()
    return y.to(storage), torch.complex(*x)
