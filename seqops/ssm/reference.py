"""The specification of ssm_kernel and cauchy_kernel: sums over modes in plain torch, all terms at once.

Letters: H heads, N modes of a head, L length or number of nodes.

The dtypes of the arguments stay. All derivatives come from autograd, of any order. Arguments are not validated here.
"""

import torch
from torch import Tensor


def ssm_kernel(z: Tensor, c: Tensor, length: int) -> Tensor:
    """`K_l = 2 Re sum_n c_n e^{l z_n}`, parts of complex numbers apart; `e^{0 z}` is 1 for every z.

    Args:
        z, c: [H, N], complex.

    Returns:
        K [H, length], real.
    """
    steps = torch.arange(length, device=z.device, dtype=z.real.dtype)

    def times_steps(part: Tensor) -> Tensor:
        """[H, N, length], zero at step 0 even where the part is infinite."""
        return (steps * part.unsqueeze(-1)).masked_fill(steps == 0, 0.0)

    size, phase = times_steps(z.real).exp(), times_steps(z.imag)
    terms = c.real.unsqueeze(-1) * (size * phase.cos()) - c.imag.unsqueeze(-1) * (size * phase.sin())
    return 2 * terms.sum(1)


def cauchy_kernel(v: Tensor, nodes: Tensor, w: Tensor) -> Tensor:
    """`y_l = sum_n v_n / (nodes_l - w_n) + conj(v_n) / (nodes_l - conj(w_n))`; a node with an infinite part has 0.

    Args:
        v, w: [H, N], complex.
        nodes: [L], complex.

    Returns:
        y [H, L], complex. Where a node is a pole, y is infinite in one part or both.
    """
    infinite = nodes.real.isinf() | nodes.imag.isinf()

    def quotients(v: Tensor, w: Tensor) -> Tensor:
        distances = torch.where(infinite, torch.ones_like(v).unsqueeze(-1), nodes - w.unsqueeze(-1))
        return (v.unsqueeze(-1) / distances).sum(1)

    y = quotients(v, w) + quotients(v.conj(), w.conj())
    return torch.where(infinite, torch.zeros_like(y), y)
