"""State-space models: their convolution kernels, and linear ones over frames."""

from . import op_conv_ssm, reference_conv_ssm
from .op_conv_ssm import conv_ssm

__all__ = ["conv_ssm"]

op_conv_ssm.provide_reference(reference_conv_ssm.conv_ssm)
