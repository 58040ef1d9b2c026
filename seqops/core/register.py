"""Autograd, vmap and autocast for operators whose schema and kernels are registered elsewhere.

The autograd formula goes on the Autograd dispatch key itself: that is faster than torch.library.register_autograd and,
unlike it, works under every torch.func transform. It takes private names of torch, all of them in this file; the
contract tests hold them on every supported torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import custom_function_call_vmap_helper
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from . import backend as backends

Operator = torch._ops.OpOverload

AUTOCAST = {"AutocastCPU": "cpu", "AutocastCUDA": "cuda"}


def _name(op: Operator) -> str:
    return op._schema.name


def gradient_wanted(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    # A dual tensor need not require grad: without the second test forward mode would silently give zeros.
    return (torch.is_grad_enabled() and torch._C._any_requires_grad(*args, **kwargs)) or forward_ad._current_level >= 0


def register_autograd(
    op: Operator,
    *,
    save: Callable[..., None],
    backward: Callable[..., Any],
    jvp: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Put an autograd formula for `op` on the Autograd key. Returns the kernel put there.

    Args:
        save: `save(ctx, inputs, outputs)` keeps what the formulas need with `ctx.save_for_backward` (and, when there is
            a jvp, `ctx.save_for_forward`); `inputs` holds every schema argument, defaults filled in.
        backward: `backward(ctx, saved, *grads)` gives one gradient per schema argument, None where there is none; a
            grad may be None.
        jvp: `jvp(ctx, saved, *tangents)` gives one tangent per output; without it forward mode raises.
    """
    lists = [a.name for a in (*op._schema.arguments, *op._schema.returns) if "List[Tensor]" in str(a.type)]
    if lists:  # autograd.Function does not look into lists: their gradients would be lost in silence
        raise ValueError(f"{op}: lists of tensors {lists}: register a flat operator, and this one as its composite")
    flatten, call = _flat_calls(op)

    def compute(inputs: Sequence[Any]) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return call(*inputs)

    def tangent(ctx: Any, saved: Sequence[Any], *tangents: Any) -> Any:
        if jvp is None:
            public = _name(op).removesuffix("_forward").removesuffix("_backward")
            raise NotImplementedError(
                f"{public} has no forward-mode derivative; use reverse mode (torch.func.grad, vjp, jacrev)"
            )
        return jvp(ctx, saved, *tangents)

    class Formula(torch.autograd.Function):
        """The node of ordinary autograd. (No separate setup_context: it makes every call three times as slow.)"""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.set_materialize_grads(False)
            ctx.backend = backends.current()
            outputs = compute(inputs)
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            # The forward has decided on dtypes: a region of autocast around the backward must not narrow its products.
            with torch._C._DisableAutocast():
                if ctx.backend == backends.current():
                    return backward(ctx, ctx.saved_tensors, *grads)
                with backends.resume(ctx.backend):
                    return backward(ctx, ctx.saved_tensors, *grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return tangent(ctx, ctx.saved_tensors, *tangents)

    class TransformedFormula(Formula):
        """The same inside torch.func transforms. autograd.Function turns gradients off for its methods; the transform
        levels underneath need them on, else grad(grad(f)) gives zeros and jvp(jvp(f)) a wrong number, silently."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return Formula.forward(ctx, *inputs)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            # at this level the saved tensors are constants: strip their own tangents
            saved = [None if t is None else forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors]
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return tangent(ctx, saved, *tangents)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not gradient_wanted(args, kwargs):
            with torch._C._AutoDispatchBelowAutograd():
                return op(*args, **kwargs)
        if not torch._C._are_functorch_transforms_active():
            return Formula.apply(*flatten(args, kwargs))
        # We are inside the dispatcher, at one functorch level, so we behave like a built-in operator: record one node
        # at this level. Formula.apply would enter functorch's own dispatch a second time and fail.
        with enable_single_level_autograd_function():
            return super(torch.autograd.Function, TransformedFormula).apply(*flatten(args, kwargs))

    backends.library.impl(op, _unless_reference(op, kernel), "Autograd")
    return kernel


def register_training(op: Operator, training: Callable[..., Any]) -> None:
    """Where a gradient is wanted, `op` runs `training` and drops what that returns beyond op's own results.

    `training` is the Autograd kernel of an operator that takes the same arguments, also returns what its backward
    reads, and has the formula. Calling it costs less than dispatching that operator.
    """
    results = len(op._schema.returns)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if gradient_wanted(args, kwargs):
            outputs = training(*args, **kwargs)
            return outputs[:results] if results > 1 else outputs[0]
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args, **kwargs)

    backends.library.impl(op, _unless_reference(op, kernel), "Autograd")


def _unless_reference(op: Operator, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A forced reference is recorded operation by operation, so that it has derivatives of every order."""
    op_name = _name(op).partition("::")[2]

    def switch(*args: Any, **kwargs: Any) -> Any:
        if backends.current() == "reference" and backends.reason_missing(op_name, "reference") is None:
            return backends.serve_python(op_name, *args, **kwargs)
        return kernel(*args, **kwargs)

    return switch


def register_composite(
    schema: str,
    function: Callable[..., Any],
    *,
    reference: Callable[..., Any],
    check: Callable[..., None],
    cast: Sequence[str],
    parts: Sequence[str],
) -> Operator:
    """Define an operator that is made of others, from which it has its derivatives, transforms and backends.

    Args:
        schema: of the operator, as `Library.define` takes it.
        function: computes it with the operators `parts`, and with torch's.
        reference: computes it under the forced backend "reference".
        check: called first, with the arguments: raises for those that the operator refuses.
        cast: the arguments that autocast casts.
        parts: the names of the operators that have kernels, among those that `function` calls.
    """
    op_name = schema.partition("(")[0]
    backends.library.define(schema)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        check(*args, **kwargs)
        return backends.serve_composite(op_name, function, *args, **kwargs)

    for key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):
        backends.library.impl(op_name, kernel, key)
    backends.compose(op_name, parts, reference)
    operator = getattr(torch.ops.seqops, op_name).default
    register_autocast(operator, cast)
    return operator


def refuse_second_derivative(op: Operator, forward: Operator) -> None:
    """For backward operators: differentiating them raises, naming the operator, instead of being silently wrong."""

    def refuse(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{_name(forward)}: second derivatives are not supported; seqops.backend('reference') computes them"
        )

    register_autograd(op, save=lambda ctx, inputs, outputs: None, backward=refuse)


def register_autocast(op: Operator, names: Sequence[str]) -> None:
    """Under autocast, cast the arguments `names` to its dtype (float64 is left alone, as torch does)."""
    positions = {a.name: i for i, a in enumerate(op._schema.arguments) if not a.kwarg_only}
    cast_at = [positions[name] for name in names]

    def kernel_for(key: str, device: str) -> Callable[..., Any]:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, **kwargs: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = list(args)
            for i in cast_at:
                if i >= len(cast) or cast[i] is None:
                    continue
                if cast[i] is not None and cast[i].is_floating_point() and cast[i].dtype != torch.float64:
                    cast[i] = cast[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(keys):
                return op(*cast, **kwargs)

        return kernel

    for key, device in AUTOCAST.items():
        backends.library.impl(op, kernel_for(key, device), key)


def register_vmap(op: Operator, rule: Callable[..., Any]) -> None:
    """Register `rule(size, in_dims, *arguments) -> (outputs, out_dims)`, which gets every schema argument in order.

    (torch.library.register_vmap leaves keyword-only tensors wrapped, and we have some: `lengths`, `cu_seqlens`.)
    """
    flatten, call = _flat_calls(op)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        interpreter = retrieve_current_functorch_interpreter()
        return custom_function_call_vmap_helper(
            interpreter, lambda info, dims, *flat: rule(info.batch_size, dims, *flat), call, *flatten(args, kwargs)
        )

    backends.library.impl(op, kernel, "FuncTorchBatched")


def vmap_of_batch(op: Operator, alone: Sequence[str] = ()) -> Callable[..., Any]:
    """A rule for `register_vmap`: the mapped dimension joins the batch, which every tensor and output has in front.

    Args:
        alone: tensors without a batch, which all rows share. Where one of them is mapped, calls are made one by one.
    """
    names = [argument.name for argument in op._schema.arguments]
    _, call = _flat_calls(op)

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        shared = [name in alone or not isinstance(value, Tensor) for name, value in zip(names, flat, strict=True)]
        pairs = list(zip(flat, in_dims, strict=True))
        if any(dim is not None for (_, dim), apart in zip(pairs, shared, strict=True) if apart):
            runs = [call(*(v if dim is None else v.select(dim, i) for v, dim in pairs)) for i in range(size)]
            single = isinstance(runs[0], Tensor)
            outputs = torch.stack(runs) if single else tuple(map(torch.stack, zip(*runs, strict=True)))
        else:
            joined = (v if apart else fold(v, dim, size, 0) for (v, dim), apart in zip(pairs, shared, strict=True))
            outputs = split(call(*joined), size)
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

    def split(outputs: Any, size: int) -> Any:
        if isinstance(outputs, Tensor):
            return outputs.unflatten(0, (size, outputs.shape[0] // size))
        return tuple(split(output, size) for output in outputs)

    return rule


def fold(value: Tensor, dim: int | None, size: int, into: int) -> Tensor:
    """The mapped dimension `dim` (None: not mapped, so repeated `size` times) joins dimension `into` as its outer part.

    `into` counts the dimensions without the mapped one.
    """
    if dim is None:
        value = value.unsqueeze(into).expand(*value.shape[:into], size, *value.shape[into:])
    else:
        value = value.movedim(dim, into)
    return value.reshape(*value.shape[:into], size * value.shape[into + 1], *value.shape[into + 2 :])


def _flat_calls(op: Operator) -> tuple[Callable[..., tuple[Any, ...]], Callable[..., Any]]:
    """Two functions: all schema arguments of a call in order, and the call of `op` with arguments in that order."""
    arguments = [(a.name, a.kwarg_only, a.default_value) for a in op._schema.arguments]
    keywords = [(name, default) for name, keyword, default in arguments if keyword]
    defaults = [default for _, keyword, default in arguments if not keyword]
    split = len(defaults)

    def flatten(args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The dispatcher leaves out arguments equal to their default: fill them in."""
        return (*args, *defaults[len(args) :], *(kwargs.get(name, default) for name, default in keywords))

    def call(*flat: Any) -> Any:
        if not keywords:
            return op(*flat)
        return op(*flat[:split], **{name: value for (name, _), value in zip(keywords, flat[split:], strict=True)})

    return flatten, call
