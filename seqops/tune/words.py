"""What the words of `seqops tune` stand for: devices, kernels, data types. Others are wrong usage."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import click
import torch

from ..core import launch
from ..core.backend import GPU_BACKENDS, reason_missing
from . import device as devices
from .search import Place
from .target import Target

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp64": "float64",
    "c64": "complex64",
    "c128": "complex128",
}


def nearest(what: str, name: str, known: Sequence[str]) -> str:
    known = list(dict.fromkeys(known))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"no {what} {name!r} to tune; " + (
        f"nearest: {', '.join(near)}" if near else f"there are: {', '.join(known)}"
    )


def find_place(name: str | None) -> Place:
    """The device that is meant, and whether it is here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    presets = ", ".join(devices.PRESETS)
    if name is None and count == 0:
        raise click.UsageError(
            f"no GPU here: --device names the one to solve for ({presets}), and --device cpu times the CPU kernels"
        )
    wanted = "cuda" if name is None else name.strip().lower()
    if wanted in ("cpu", devices.host().name.lower()):
        return Place(devices.of(torch.device("cpu")), "cpu")
    here = re.fullmatch(r"cuda(?::(\d+))?", wanted)
    if here is not None:
        index = int(here[1] or 0)
        if index >= count:
            raise click.UsageError(f"no {name} here: torch finds {count} CUDA devices")
        return make_place(index)
    for index in range(count):
        if is_called(torch.cuda.get_device_name(index), name):
            return make_place(index)
    try:
        return Place(devices.find(name), None, f"no {name} here" if count else "no GPU here")
    except ValueError as error:
        raise click.UsageError(f"{error}; cpu and cuda are what is here") from None


def make_place(index: int) -> Place:
    return Place(devices.of(torch.device("cuda", index)), f"cuda:{index}")


def place_of(target: Target, place: Place) -> Place:
    """The place as the kernels of one backend see it: without what they need, the device might as well be elsewhere."""
    missing = None if place.on_cpu or place.torch_device is None else missing_for(target)
    return place if missing is None else Place(place.device, None, missing)


def missing_for(target: Target) -> str | None:
    """Why its kernel cannot run on the GPU that is here."""
    return launch.reason_missing() if target.backend == "cuda" else reason_missing(target.op, target.backend, "cuda")


def is_called(full: str, name: str) -> bool:
    """Whether a GPU is meant: by its whole name, or a word of it: "NVIDIA H200" by h200, but no L40S by l4."""
    words = re.findall(r"[a-z0-9]+", full.lower().replace("rtx ", "rtx"))
    plain = re.sub(r"[\s_-]+", "", name.lower())
    return plain in words or plain == re.sub(r"[\s_-]+", "", full.lower())


def choose_targets(
    known: Sequence[Target], operator: str | None, directions: Sequence[str], place: Place, backend: str | None
) -> list[Target]:
    """The kernels that are meant; of a GPU's, those of the backend that serves each operator there."""
    kind, name = "the CPU" if place.on_cpu else "a GPU", operator or "any operator"
    of_operator = [target for target in known if operator in (None, target.op)]
    here = [target for target in of_operator if (target.backend == "cpu") == place.on_cpu]
    if not here:
        raise click.UsageError(f"no kernel of {name} can be tuned for {kind}")
    if backend is not None:
        there = list(dict.fromkeys(target.backend for target in here))
        if backend not in there:
            raise click.UsageError(f"--backend: of {name}, {' and '.join(there)} can be tuned on {kind}, not {backend}")
        here = [target for target in here if target.backend == backend]
    elif not place.on_cpu:
        here = [target for target in here if target.backend == serving(target.op, here, place)]
    chosen = [target for target in here if target.direction in directions]
    if not chosen:
        raise click.UsageError(f"no {directions[0]} kernel of {name} can be tuned on {kind}")
    return chosen


def serving(op: str, here: Sequence[Target], place: Place) -> str:
    """The first backend of an operator that can run on the GPU; where none can, or the GPU is not here, the first."""
    mine = {target.backend: target for target in here if target.op == op}
    ordered = [name for name in GPU_BACKENDS if name in mine] or list(mine)
    if place.torch_device is not None:
        ordered = [name for name in ordered if missing_for(mine[name]) is None] or ordered
    return ordered[0]


def match_dtype(target: Target, name: str | None) -> str:
    """The target's own word for a data type."""
    if name is None:
        return target.dtypes[0]
    for own in target.dtypes:
        if full_dtype(own) == full_dtype(name):
            return own
    raise click.UsageError(f"{target.title} takes {', '.join(target.dtypes)}, not {name!r}")


def full_dtype(name: str) -> str:
    plain = name.lower().removeprefix("torch.")
    return DTYPES.get(plain, plain)
