"""The input projection of a layer: functional.linear, by the faster of torch's two matrix libraries.

On a CPU torch hands linear to its BLAS (MKL). The same product through oneDNN, which torch also carries and uses for
16-bit, was 1.1 to 1.5 times as fast for the tall inputs of a sequence model, and is half of an LSTM's work.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# oneDNN packs the weight on every call, and the node costs 20 microseconds: below this many products it does not pay.
LEAST_PRODUCTS = 1 << 24

PLAIN = (Tensor, torch.nn.Parameter)  # no fake, wrapped or distributed tensors


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class Projection(torch.autograd.Function):
    """x [..., in] -> x weight^T + bias [..., out], and its gradients; differentiable any number of times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            # with create_graph the product itself is to be recorded, which oneDNN's operator cannot be
            dx = dy @ weight if torch.is_grad_enabled() else onednn_linear(dy, weight.t(), None)
        rows = dy.reshape(-1, dy.shape[-1])
        if ctx.needs_input_grad[1]:
            dweight = rows.t() @ x.reshape(-1, x.shape[-1])
        if ctx.needs_input_grad[2]:
            dbias = rows.sum(0)
        return dx, dweight, dbias


def onednn_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether a plain, eager, float32 product on the CPU is large enough to gain."""
    return (
        x.numel() * weight.shape[0] >= LEAST_PRODUCTS
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """functional.linear(x [..., in], weight [out, in], bias [out]) -> [..., out]."""
    # what is compiled or exported stays linear: compilers know it
    if torch.compiler.is_compiling() or not onednn_serves(x, weight):
        return functional.linear(x, weight, bias)
    return Projection.apply(x, weight, bias)
