"""Operators of the room under the backend "cuda": conv_ssm is composed of torch's convolutions and our linear_scan."""

from .composed_conv_ssm import conv_ssm, conv_ssm_backward, conv_ssm_forward

__all__ = ["conv_ssm", "conv_ssm_backward", "conv_ssm_forward"]
