"""State-space models: their convolution kernels, and linear ones over frames."""

from . import op, op_conv_ssm, reference, reference_conv_ssm
from .op import cauchy_kernel, ssm_kernel
from .op_conv_ssm import conv_ssm

__all__ = ["cauchy_kernel", "conv_ssm", "ssm_kernel"]

op_conv_ssm.provide_reference(reference_conv_ssm.conv_ssm)
for _name in ("ssm_kernel", "cauchy_kernel"):
    op.provide_reference(_name, getattr(reference, _name))
