"""The input projection of a layer: functional.linear, computed by seqops' own product where that is faster.

Torch hands a float32 linear on the CPU to its BLAS, into fresh memory that then costs a page fault for every 4 KB. The
recurrent product's own tiles, into memory backed by huge pages, take less time for the tall inputs of a sequence model;
the projection is half of an LSTM's work.
"""

import torch
from torch import Tensor
from torch.nn import functional

# The weight is packed on every call and the autograd node costs 20 microseconds: with fewer products it does not pay.
LEAST_PRODUCTS = 1 << 24

PLAIN = (Tensor, torch.nn.Parameter)  # no fake, wrapped or distributed tensors


def own_product_serves(x: Tensor, weight: Tensor) -> bool:
    """Whether this is a plain, eager product on the CPU, large enough to gain."""
    return (
        x.numel() * weight.shape[0] >= LEAST_PRODUCTS
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == weight.dtype
        and type(x) in PLAIN
        and type(weight) in PLAIN
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and not torch.jit.is_tracing()
    )


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """functional.linear(x [..., in], weight [out, in], bias [out]) -> [..., out]."""
    # what is compiled or exported stays linear: compilers know it
    if torch.compiler.is_compiling() or not own_product_serves(x, weight):
        return functional.linear(x, weight, bias)
    return torch.ops.seqops.project(x, weight, bias)
