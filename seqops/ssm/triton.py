"""Operators of the room under the backend "triton", and a list of their kernels, which the tests compile offline."""

from __future__ import annotations

from typing import Any

from . import triton_conv_ssm
from .triton_conv_ssm import conv_ssm, conv_ssm_backward, conv_ssm_forward

__all__ = ["configurations", "conv_ssm", "conv_ssm_backward", "conv_ssm_forward"]


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    return [*triton_conv_ssm.configurations()]
