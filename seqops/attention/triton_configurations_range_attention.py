"""Every Triton kernel of attention over ranges that may be launched: what the tests compile for all architectures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from . import tiles
from . import triton_kernels_range_attention as kernels
from . import triton_kernels_range_attention_backward as backward_kernels
from . import triton_kernels_range_attention_bias as bias_kernels
from .triton_blocks import DISTANCE, LAPLACE, NONE, RELU2, SOFTMAX, SQUARE

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
STATES = ("p_bias", "p_lse", "p_delta", "p_dbias", "p_dlse")
INTEGERS = ("p_ranges", "p_ranges2", "p_starts", "p_runs")
KERNELS = {
    "forward": kernels.range_attention_forward,
    "dq": backward_kernels.range_attention_dq,
    "dkv": backward_kernels.range_attention_dkv,
}
# Activation, bias, whether there is a second source: every value of each, and what public operators ask together.
FORMS = (
    (SOFTMAX, NONE, False),
    (SOFTMAX, NONE, True),
    (SOFTMAX, DISTANCE, False),
    (SOFTMAX, SQUARE, False),
    (LAPLACE, NONE, False),
    (RELU2, DISTANCE, False),
)


FORMS = (
    (SOFTMAX, NONE, False),
    (SOFTMAX, NONE, True),
    (SOFTMAX, DISTANCE, False),
    (SOFTMAX, SQUARE, False),
    (LAPLACE, NONE, False),
    (LAPLACE, DISTANCE, False),
    (RELU2, SQUARE, False),
)
# One for each width of blocks, that of models with 64 channels first; 48 is padded in registers, 320 goes in slices.
CHANNELS = (64, 16, 48, 128, 256, 320)


def configurations() -> list[dict[str, Any]]:
    """Kernel, types of run-time arguments, constants, options, and which arguments are multiples of 16."""
    return [*tiled_configurations(), *delta_configurations(), *bias_configurations()]


def tiled_configurations() -> Iterator[dict[str, Any]]:
    for storage, direction in itertools.product(TYPES, tiles.DIRECTIONS):
        kernel = KERNELS[direction]
        dtype = str(storage).removeprefix("torch.")
        for D, form in forms(direction):
            for shape in tiles.shapes(direction, dtype, D, form[1] is not NONE):
                yield configuration(kernel, constants(kernel, storage, D, form, shape), storage, shape)


def forms(direction: str) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """With 64 channels every form, and one of them with every other width."""
    for form in FORMS:
        if not (form[2] and direction == "dkv"):  # a launch is for one source
            yield CHANNELS[0], form
    yield from ((D, FORMS[0]) for D in CHANNELS[1:])


def constants(kernel: Any, storage: torch.dtype, D: int, form: tuple[Any, ...], shape: tiles.Shape) -> dict[str, Any]:
    activation, bias, second = form
    every = {"D": D, "ACTIVATION": activation.value, "SECOND": second, "BIAS": bias.value}
    every |= {"EXACT": storage == torch.float64, "BM": shape.rows, "BN": shape.others, "BD": shape.width}
    return {name: value for name, value in every.items() if name in kernel.arg_names}


def delta_configurations() -> Iterator[dict[str, Any]]:
    from .triton_range_attention import DELTA_ROWS, DELTA_WIDTH

    kernel = backward_kernels.range_attention_delta
    for storage, D, dlse in itertools.product(TYPES, CHANNELS, (False, True)):
        shape = tiles.Shape(DELTA_ROWS, 0, tiles.padded(D, DELTA_WIDTH), 4, 1)
        chosen = {"D": D, "DLSE": dlse, "BM": shape.rows, "BD": shape.width}
        yield configuration(kernel, chosen, storage, shape)


def bias_configurations() -> Iterator[dict[str, Any]]:
    from .triton_range_attention import OUTSIDE_KEYS, OUTSIDE_ROWS

    kernel, other = bias_kernels.range_attention_dbias, bias_kernels.range_attention_dbias_outside
    for storage in TYPES:
        every = [(D, form if form[1] is not NONE else (form[0], DISTANCE, False)) for D, form in forms("dkv")]
        for D, form in dict.fromkeys(every):
            shapes = tiles.bias_shapes(str(storage).removeprefix("torch."), D)
            for shape in shapes:
                yield configuration(kernel, constants(kernel, storage, D, form, shape), storage, shape)
            shape = tiles.Shape(OUTSIDE_ROWS, OUTSIDE_KEYS, shapes[0].width, 4, 1)
            yield configuration(other, constants(other, storage, D, form, shape), storage, shape)


def configuration(kernel: Any, constants: dict[str, Any], storage: torch.dtype, shape: tiles.Shape) -> dict[str, Any]:
    """Pointers without a name above are to the storage dtype; other arguments are int32, but for the scale."""
    from .triton_range_attention import options

    state = torch.float64 if storage == torch.float64 else torch.float32
    types = {name: "*" + TYPES[state if name in STATES else storage] for name in kernel.arg_names if name[:2] == "p_"}
    types |= {name: "*i32" for name in INTEGERS if name in types}
    sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
    sizes |= {name: "fp32" for name in ("scale", "scale_rest") if name in sizes}
    # Integers tell a launch nothing, and the tensors that it reads are aligned.
    found = {"kernel": kernel, "types": types | sizes, "constants": constants}
    found |= {
        "options": options(shape.warps, shape.stages),
        "divisible": [name for name in types if name not in INTEGERS],
    }
    return found | ({"architectures": shape.architectures} if shape.architectures else {})
