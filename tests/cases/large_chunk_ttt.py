"""Cases of large_chunk_ttt."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import common
from .common import LAYOUTS, NARROW, WIDE, Function, pairwise
from .newton_schulz import FLAT
from .ttt import STATES, HeadCase

OPERATORS = ("large_chunk_ttt",)
__all__ = ["OPERATORS", "STATES", "example", "table"]
ORDERS = ("apply_update", "update_apply", "full")
MUON = (("optimizer", "muon"),)


@dataclass(frozen=True, kw_only=True)
class Case(HeadCase):
    F: int = 6
    momentum: str = "gates"  # or "state": also a state before the first chunk; "none"

    def words(self) -> list[str]:
        return [*super().words(), f"F{self.F}", f"momentum_{self.momentum}"]

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype] + [self.real] * 6

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """The momentum's state as m0, m1, m2: see `listed`."""
        generator = self.generator()
        inputs: dict[str, Any] = {name: self.sequence(generator, device, name == "k") for name in "qkv"}
        shapes = ((self.F, self.D), (self.D, self.F), (self.F, self.D))
        for i, shape in enumerate(shapes):
            inputs[f"w{i}"] = self.weight(generator, device, *shape)
        inputs["lr"] = self.gate(generator, device, 0.0, 0.5, 3)
        inputs["chunk_size"] = self.C
        if self.momentum != "none":
            inputs["momentum"] = self.gate(generator, device, 0.2, 1.0)
        if self.momentum == "state":
            inputs |= {f"m{i}": self.weight(generator, device, *shape, size=0.3) for i, shape in enumerate(shapes)}
        return inputs | dict(self.options)

    @property
    def reference(self) -> Function:
        return self.adapted(super().reference)

    def listed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        states = [inputs[name] for name in ("m0", "m1", "m2") if name in inputs]
        others = {name: value for name, value in inputs.items() if name not in ("m0", "m1", "m2")}
        return others | ({"momentum_state": states} if states else {})

    def adapted(self, function: Callable[..., Any]) -> Function:
        return lambda **inputs: tuple(function(**self.listed(inputs)))


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "order": ORDERS,
        "optimizer": ("gd", "muon"),
        "weight_norm": (True, False),
        "momentum": ("none", "gates", "state"),
        "coefficients": (None, FLAT),
        "B": (1, 2),
        "H": (1, 3),
        "D": (1, 5, 8, 16),
        "F": (1, 6, 12, 17),
        "T": (1, 3, 4, 8, 11),
        "C": (1, 4, 5, 64),
        "dtype": (*WIDE, *NARROW),
        "layout": LAYOUTS,
        "wide": (False, True),
    }
    for row in pairwise(factors, seed=20):
        names = ("order", "optimizer", "weight_norm", "coefficients")
        options = tuple((name, row.pop(name)) for name in names)
        yield Case(op, **row, options=tuple(option for option in options if option[1] is not None), marks=("small",))


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    cases = [
        *(
            make("small", "sanitize", "tiny", B=1, momentum=momentum, options=(("order", order), *more))
            for order, momentum, more in (
                ("apply_update", "state", ()),
                ("update_apply", "gates", MUON),
                ("full", "none", (("weight_norm", False),)),
                ("apply_update", "gates", (*MUON, ("weight_norm", False))),
            )
        ),
        *(make("small", "sanitize", B=B, T=T, options=(("order", o),)) for B, T in ((0, 5), (2, 0)) for o in ORDERS),
        *(make("small", "sanitize", B=1, T=T, options=(("order", o),)) for T in (3, 4, 5) for o in ORDERS),
        make(B=1, T=300, H=2, D=64, F=96, C=128),
        make(B=2, T=130, H=1, D=33, F=70, C=64, dtype=torch.bfloat16, wide=True, options=MUON),
        make("slow", B=1, T=2500, H=4, D=128, F=256, C=1024, momentum="state", options=MUON),
        *covering(op),
    ]
    return common.distinct(cases)


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "D": 4, "F": 6, "C": 2, "momentum": "state"} | options))
