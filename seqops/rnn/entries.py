"""The registered recurrent operators as Python functions, for backends whose launchers are written in Python.

A backend gives one function for all forwards and one for all backwards:

    forward(op, train, wx, r, b, initial, lengths, reverse, nonlinearity="tanh")
        h, the final states, and where `train` what the backward reads; `initial` has all states of the cell
    backward(op, dh, dfinal, r, cache, kept, h, initial, lengths, reverse, grad_clip, nonlinearity="tanh", final=...)
        dwx, for the GRU dy of its candidate, and the gradients of the initial states; `dfinal` has all states of the
        cell, `initial` and `final` are h, c and n as far as its backward reads them, else None
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]


def entries(forward: Function, backward: Function) -> dict[str, Function]:
    """By name: the arguments of each are those of its schema."""

    def lstm(
        wx: Tensor, r: Tensor, b: Any = None, h0: Any = None, c0: Any = None, *, train: bool = False, **options: Any
    ) -> Tensors:
        return forward("lstm", train, wx, r, b, (h0, c0), **without_clip(options))

    def gru(wx: Tensor, r: Tensor, b: Any = None, h0: Any = None, *, train: bool = False, **options: Any) -> Tensors:
        return forward("gru", train, wx, r, b, (h0,), **without_clip(options))

    def slstm(
        wx: Tensor,
        r: Tensor,
        b: Any = None,
        h0: Any = None,
        c0: Any = None,
        n0: Any = None,
        m0: Any = None,
        *,
        train: bool = False,
        **options: Any,
    ) -> Tensors:
        return forward("slstm", train, wx, r, b, (h0, c0, n0, m0), **without_clip(options))

    def elman(wx: Tensor, r: Tensor, b: Any = None, h0: Any = None, **options: Any) -> Tensors:
        return forward("elman", False, wx, r, b, (h0,), **without_clip(options))

    def lstm_backward(
        dh: Any, dh_n: Any, dc_n: Any, r: Tensor, p: Tensor, c: Tensor, c0: Any, **options: Any
    ) -> Tensors:
        return backward("lstm", dh, (dh_n, dc_n), r, p, c, None, (None, c0, None), **filled(options))

    def gru_backward(
        dh: Any, dh_n: Any, r: Tensor, p: Tensor, y: Tensor, h: Tensor, h0: Any, **options: Any
    ) -> Tensors:
        return backward("gru", dh, (dh_n,), r, p, y, h, (h0, None, None), **filled(options))

    def slstm_backward(
        dh: Any,
        dh_n: Any,
        dc_n: Any,
        dn_n: Any,
        dm_n: Any,
        r: Tensor,
        cache: Tensor,
        c_n: Tensor,
        n_n: Tensor,
        c0: Any,
        n0: Any,
        **options: Any,
    ) -> Tensors:
        dfinal, final = (dh_n, dc_n, dn_n, dm_n), (None, c_n, n_n)
        return backward("slstm", dh, dfinal, r, cache, None, None, (None, c0, n0), **filled(options), final=final)

    def elman_backward(dh: Any, dh_n: Any, r: Tensor, h: Tensor, **options: Any) -> Tensors:
        return backward("elman", dh, (dh_n,), r, None, None, h, (None, None, None), **filled(options))

    def training(function: Function) -> Function:
        return lambda *args, **options: function(*args, **options, train=True)

    public = {"lstm": lstm, "gru": gru, "slstm": slstm, "elman": elman}
    kept = {f"{op}_forward": training(public[op]) for op in ("lstm", "gru", "slstm")}
    functions = (lstm_backward, gru_backward, slstm_backward, elman_backward)
    return {**public, **kept, **{function.__name__: function for function in functions}}


def filled(options: dict[str, Any]) -> dict[str, Any]:
    return {"lengths": None, "reverse": False, "grad_clip": None, **options}


def without_clip(options: dict[str, Any]) -> dict[str, Any]:
    """A forward has no use for it."""
    return {name: value for name, value in filled(options).items() if name != "grad_clip"}
