"""What can be tuned of the room."""

from . import tune_conv_ssm

TARGETS = [*tune_conv_ssm.TARGETS]
