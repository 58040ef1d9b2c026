"""`convert`: a whole model from torch.nn's recurrent modules to ours."""

from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from seqops.nn.rnn import GRU, LSTM, RNN, RNNBase

Module = TypeVar("Module", bound=torch.nn.Module)

CLASSES: dict[type[torch.nn.Module], type[RNNBase]] = {torch.nn.LSTM: LSTM, torch.nn.GRU: GRU, torch.nn.RNN: RNN}

# Caches of torch.nn.RNNBase, which would keep weights alive that are replaced later.
CACHES = ("_flat_weights", "_flat_weight_refs", "_flat_weights_names", "_all_weights")


def replacement(module: torch.nn.Module) -> type[torch.nn.Module] | None:
    """The class for `module` to become, or None."""
    if "forward" in vars(module):
        return None
    kind = type(module)
    if kind in CLASSES:
        return CLASSES[kind]
    # A parametrized module is of a class of its own, which derives from the original and adds a property per weight.
    if parametrize.is_parametrized(module) and kind.__base__ in CLASSES:
        members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
        return type(kind)(kind.__name__, (CLASSES[kind.__base__],), members)
    return None


def convert(model: Module) -> Module:
    """Turns every torch.nn.LSTM, GRU and RNN in `model`, itself included, into the module of seqops.nn, in place.

    The modules stay the same objects, with the same parameters, hooks, options and training flags, and only change
    their class: optimizers, shared modules and references from elsewhere stay valid. Converting again changes nothing.

    Left as they are: classes derived from the three, and modules with a `forward` of their own, since what they add is
    not known; quantized and scripted modules; cells. After the change `isinstance(module, torch.nn.LSTM)` is false.

    Args:
        model: any module.

    Returns:
        `model`.

    Raises:
        TypeError: model is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"convert: model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        kind = replacement(module)
        if kind is not None:
            module.__class__ = kind
            for name in CACHES:
                vars(module).pop(name, None)
            module._name_weights()
    return model
