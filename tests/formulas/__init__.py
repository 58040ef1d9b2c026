"""The papers' formulas in plain float64 PyTorch, and the modules of seqops.nn held against them.

One file a family, each with a list `CASES`. A formula takes the module, whose parameters it reads, and the inputs; it
shares no code with the module: loops over time, dense masks, explicit sums.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import seqops


@dataclass(frozen=True)
class Case:
    """A module at a small size.

    Args:
        module: its name in seqops.nn.
        options: arguments of its constructor.
        formula: (module, *inputs) -> y in float64.
        shape: of x [B, T, D] where `draw` is None.
        draw: makes the inputs, a tuple whose floating tensors are float64; x alone where None.
        note: what distinguishes the case from others of the module.
        cuts: places where the sequence is cut into pieces; () for a module without a state.
        steps: whether it also runs step by step.
        grows: whether the state holds all tokens.
        prepare: called with the new module, e.g. to move parameters that start at zero.
        bound16: of the relative error in bfloat16, with its reason beside it where it is not the default.
        compiled: whether this case runs under torch.compile: one case of a module suffices unless its graph differs.
        in16: whether it is compared in bfloat16.
    """

    module: str
    options: dict[str, Any]
    formula: Callable[..., Tensor]
    shape: tuple[int, ...] = (2, 13, 8)
    draw: Callable[[], tuple[Any, ...]] | None = None
    note: str = ""
    cuts: tuple[int, ...] = (1, 6)
    steps: bool = True
    grows: bool = False
    prepare: Callable[[torch.nn.Module], None] | None = None
    bound16: float = 0.05
    compiled: bool = True
    in16: bool = True
    tolerance: float = field(default=1e-9)

    def __str__(self) -> str:
        return "-".join(part.replace(" ", "-") for part in (self.module, self.note) if part)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.nn.Module:
        """In evaluation mode. Small parameters that start equal would hide mistakes: `prepare` moves them."""
        torch.manual_seed(seed)
        module = getattr(seqops.nn, self.module)(**self.options)
        if self.prepare is not None:
            with torch.no_grad():
                self.prepare(module)
        return module.to(dtype).eval()

    def inputs(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> tuple[Any, ...]:
        torch.manual_seed(seed)
        drawn = (torch.randn(self.shape, dtype=torch.float64),) if self.draw is None else self.draw()
        return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for t in drawn)


def output(result: Any) -> Tensor:
    """y of what a module returns: y alone, or (y, state)."""
    return result[0] if isinstance(result, tuple) else result


def jitter(module: torch.nn.Module, scale: float = 0.3) -> None:
    """Moves every parameter: zeros and ones at the start would leave terms of the formula untested."""
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn_like(parameter))


CASES: list[Case] = [
    case
    for found in sorted(pkgutil.iter_modules(__path__), key=lambda each: each.name)
    for case in importlib.import_module(f"{__name__}.{found.name}").CASES
]
