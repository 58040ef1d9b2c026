"""Every Triton kernel of linear attention that may be launched: what the tests compile for all architectures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from . import tiles
from . import triton_kernels as kernels
from . import triton_window as window_kernels
from .tiles import Shape
from .triton_blocks import ALWAYS, APPLY, EACH, INFLOW, INNER, NONE, OUTER, REDUCE, REPAIR, STEP, SUM
from .triton_walks import DEPTH, JOINED, LANES, MET, REACHED, options, state_dtype

TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
HALVES = (torch.bfloat16, torch.float16)
# What is a multiple of 16 where accesses are wide.
WIDE = ("K", "V", *(f"stride_{name}_{letter}" for name in "qkvx" for letter in "bth"))


def configurations() -> list[dict[str, Any]]:
    """Every kernel that may be launched: kernel, types of its run-time arguments, constants, options."""
    every = [*walk_configurations(), *across_configurations(), *small_configurations()]
    known = {(each["kernel"].__name__, str(each["types"]), str(each["constants"])): each for each in every}
    return [*known.values()]


def configuration(
    kernel: Any, constants: dict[str, Any], state: torch.dtype, warps: int, wide: bool | None = None, **pointers: Any
) -> dict[str, Any]:
    """Pointers without a name here are to STATE, or to integers; other arguments are int32, but for the scale.

    wide: whether the launcher takes this kernel for wide accesses, which needs multiples of 16; None: for both.
    """
    types = {name: "*" + TYPES[pointers.get(name, state)] for name in kernel.arg_names if name.startswith("p_")}
    types |= {name: "*i64" for name in ("p_rows", "p_first") if name in types}
    types |= {"p_wrong": "*i32"} if "p_wrong" in types else {}
    sizes = {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
    sizes |= {name: "fp32" for name in ("scale", "scale_rest") if name in sizes}
    found = {"kernel": kernel, "types": types | sizes, "constants": constants, "options": options(warps)}
    pointed = [name for name in types if name.startswith("p_")]
    return found if wide is None else {**found, "divisible": [*pointed, *WIDE] if wide else []}


def kinds() -> Iterator[tuple[torch.dtype, Any, torch.dtype, Shape, bool]]:
    """Sequences, decays, dtype of these, shape, whether accesses are wide."""
    for storage in TYPES:
        state = state_dtype(storage)
        for decay in (NONE, STEP, INNER, OUTER):
            for aligned in (False, True) if storage in HALVES else (False,):
                kind = tiles.Kind(str(storage).removeprefix("torch."), decay in (INNER, OUTER), aligned)
                for gate in dict.fromkeys((state,) if decay is NONE else (storage, state)):
                    for shape in dict.fromkeys((*kind.shapes(), *kind.shapes(single=True))):
                        yield storage, decay, gate, shape, aligned


def walk_configurations() -> Iterator[dict[str, Any]]:
    kernel = kernels.linear_attention_walk
    for storage, decay, gate, shape, aligned in kinds():
        state = state_dtype(storage)
        like = {"p_q": storage, "p_k": storage, "p_v": storage, "p_x": storage, "p_g": gate}
        summed = SUM.value if decay is STEP else EACH.value
        partners = (0,) if decay is NONE else (0, summed)
        forms = [(REDUCE, reverse, 0, False, state, False) for reverse in (False, True) if decay is not OUTER]
        for reverse, partner in itertools.product((False, True), partners):
            for o in dict.fromkeys((storage, state)):
                forms += [(APPLY, reverse, partner, False, o, False)]
                forms += [(INFLOW, reverse, 0, False, o, False)] if decay is NONE else []
            # A window within a chunk, and what the last state's gradient adds.
            forms += [(APPLY, reverse, partner, False, state, True)]
            forms += [(INFLOW, True, partner, True, state, False)] if reverse else []
        for (form, reverse, partner, add, o, narrow), exact in itertools.product(forms, exact_of(shape)):
            constants = {"PASS": form.value, "DECAY": decay.value, "REVERSE": reverse, "ADD": add, "PARTNER": partner}
            constants |= {"EXACT": exact, "NARROW": narrow, **blocks_of(shape)}
            wide = aligned if shape.steps > 16 else None
            yield on(shape, configuration(kernel, constants, state, shape.warps, wide, **like, p_o=o))


def on(shape: Shape, configuration: dict[str, Any]) -> dict[str, Any]:
    return configuration | ({"architectures": shape.architectures} if shape.architectures else {})


def exact_of(shape: Shape) -> tuple[int, ...]:
    return (ALWAYS.value,) if shape.exact else (0, REPAIR.value)


def blocks_of(shape: Shape) -> dict[str, int]:
    return {"BT": shape.steps, "BK": shape.inner, "BV": shape.outer}


def across_configurations() -> Iterator[dict[str, Any]]:
    kernel = window_kernels.linear_attention_across
    for storage, decay, gate, shape, aligned in kinds():
        state = state_dtype(storage)
        like = {"p_q": storage, "p_k": storage, "p_v": storage, "p_x": storage, "p_g": gate}
        partners = (0,) if decay is NONE else (0, SUM.value if decay is STEP else EACH.value)
        for reverse, partner, exact in itertools.product((False, True), partners, exact_of(shape)):
            constants = {"DECAY": decay.value, "REVERSE": reverse, "PARTNER": partner, "EXACT": exact}
            wide = aligned if shape.steps > 16 else None
            yield on(shape, configuration(kernel, constants | blocks_of(shape), state, shape.warps, wide, **like))


def small_configurations() -> Iterator[dict[str, Any]]:
    flags = (False, True)
    for state in (torch.float32, torch.float64):
        for reverse, decays, lanes in itertools.product(flags, flags, JOINED):
            constants = {"REVERSE": reverse, "DECAYS": decays, "BC": lanes}
            yield configuration(kernels.linear_attention_join, constants, state, lanes // 32)
        for width in MET:
            yield configuration(kernels.linear_attention_meet, {"BK": width, "BV": 32}, state, 1)
    for storage in TYPES:
        state = state_dtype(storage)
        for lanes in LANES:
            constants = {"BC": lanes, "DEPTH": DEPTH}
            yield configuration(kernels.linear_attention_decay, constants, state, max(lanes // 32, 1), p_g=storage)
        for reverse, lanes, steps in itertools.product(flags, REACHED, (16, 64)):
            constants = {"REVERSE": reverse, "BT": steps, "BC": lanes}
            yield configuration(window_kernels.linear_attention_reach, constants, state, 1, p_g=storage)
