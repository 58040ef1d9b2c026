"""Cases of neural_memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from seqops.ttt import reference

from . import common
from .common import LAYOUTS, NARROW, WIDE, Function, pairwise
from .ttt import STATES, HeadCase

OPERATORS = ("neural_memory",)
__all__ = ["OPERATORS", "STATES", "example", "table"]
MUON = (("optimizer", "muon"),)


@dataclass(frozen=True, kw_only=True)
class Case(HeadCase):
    F: int | None = 6  # hidden channels of an MLP; None: a linear memory
    gates: str = "both"  # decay and momentum; or "decay", "momentum", "none", "edges": zeros and ones among them
    state: bool = False  # momentum before the first token

    def words(self) -> list[str]:
        kind = "linear" if self.F is None else f"F{self.F}"
        return [*super().words(), kind, f"gates_{self.gates}"] + ["state"] * self.state

    @property
    def layers(self) -> int:
        return 1 if self.F is None else 2

    @property
    def output_dtypes(self) -> list[torch.dtype]:
        return [self.dtype] + [self.real] * (2 * self.layers)

    def inputs(self, device: str = "cpu") -> dict[str, Any]:
        """Weights as w1, w2 and momentum as s1, s2: see `listed`."""
        generator = self.generator()
        inputs: dict[str, Any] = {name: self.sequence(generator, device, name == "k") for name in "qkv"}
        inputs["lr"] = self.gate(generator, device, 0.0, 0.6 / self.C**0.5)
        shapes = [(self.D, self.D)] if self.F is None else [(self.F, self.D), (self.D, self.F)]
        inputs |= {f"w{i + 1}": self.weight(generator, device, *shape) for i, shape in enumerate(shapes)}
        inputs["chunk_size"] = self.C
        if self.gates in ("both", "decay", "edges"):
            inputs["decay"] = self.edged(self.gate(generator, device, 0.0, 0.5))
        if self.gates in ("both", "momentum", "edges"):
            inputs["momentum"] = self.edged(self.gate(generator, device, 0.0, 0.9))
        if self.state:
            inputs |= {f"s{i + 1}": self.weight(generator, device, *shape, size=0.3) for i, shape in enumerate(shapes)}
        return inputs | dict(self.options)

    def edged(self, gate: torch.Tensor) -> torch.Tensor:
        """With "edges": every third is 0, every fifth 1."""
        if self.gates == "edges":
            with torch.no_grad():
                gate[:, ::3] = 0
                gate[:, 1::5] = 1
        return gate

    @property
    def reference(self) -> Function:
        return self.adapted(getattr(reference, self.op))

    def listed(self, inputs: dict[str, Any]) -> dict[str, Any]:
        lists = {"weights": ("w1", "w2"), "momentum_state": ("s1", "s2")}
        found = {name: [inputs[each] for each in of if each in inputs] for name, of in lists.items()}
        others = {name: value for name, value in inputs.items() if name not in ("w1", "w2", "s1", "s2")}
        return others | {name: tensors for name, tensors in found.items() if tensors}

    def adapted(self, function: Callable[..., Any]) -> Function:
        def call(**inputs: Any) -> tuple[torch.Tensor, ...]:
            o, weights, state = function(**self.listed(inputs))
            return (o, *weights, *state)

        return call


def covering(op: str) -> Iterator[Case]:
    """Every pair of shapes and options."""
    factors = {
        "loss": ("l2", "dot"),
        "window": (1, 3, 100),
        "optimizer": ("gd", "muon"),
        "gates": ("none", "decay", "momentum", "both", "edges"),
        "state": (False, True),
        "B": (1, 2),
        "H": (1, 3),
        "D": (1, 5, 8, 16),
        "F": (None, 1, 6, 17),
        "T": (1, 3, 4, 8, 11),
        "C": (1, 4, 5, 64),
        "dtype": (*WIDE, *NARROW),
        "layout": LAYOUTS,
        "wide": (False, True),
    }
    for row in pairwise(factors, seed=21):
        options = tuple((name, row.pop(name)) for name in ("loss", "window", "optimizer"))
        yield Case(op, **row, options=options, marks=("small",))


def table(op: str) -> list[Case]:
    def make(*marks: str, **options: Any) -> Case:
        return Case(op, **options, marks=marks)

    cases = [
        *(
            make("small", "sanitize", "tiny", B=1, F=F, gates=gates, state=state, options=options)
            for F, gates, state, options in (
                (6, "both", True, ()),
                (None, "both", False, (("window", 3),)),
                (6, "none", False, (("loss", "dot"),)),
                (None, "edges", True, (("loss", "dot"), ("window", 100))),
                (6, "edges", True, (("window", 2),)),
                (6, "both", True, MUON),
                (None, "decay", False, (*MUON, ("window", 2))),
            )
        ),
        *(make("small", "sanitize", B=B, T=T, F=F) for B, T in ((0, 5), (2, 0)) for F in (None, 6)),
        *(
            make("small", "sanitize", B=1, T=T, F=F, options=o)
            for T in (3, 4, 5)
            for F in (None, 6)
            for o in ((), MUON)
        ),
        make(B=1, T=70, H=2, D=64, F=256, C=16),
        make(B=1, T=70, H=2, D=64, F=64, C=64, state=True),
        make(B=1, T=130, H=1, D=64, F=None, C=32),
        make(B=1, T=70, H=1, D=33, F=70, C=20, dtype=torch.bfloat16, wide=True),
        # No decay: it takes both matrices, of which each learns by the other, to nothing but rounding errors.
        make("slow", B=2, T=600, H=2, D=64, F=256, C=16, gates="none"),
        make("slow", B=2, T=600, H=2, D=128, F=None, C=64, dtype=torch.float16, state=True),
        *covering(op),
    ]
    return common.distinct(cases)


def example(op: str, **options: Any) -> Case:
    """A small case, its sizes all different."""
    options.pop("reverse", None)
    return Case(op, **({"B": 3, "T": 5, "H": 2, "D": 4, "F": 6, "C": 2, "state": True} | options))
