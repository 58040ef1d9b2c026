"""neural_memory: the operators that it is made of, and the public function.

    memory            (q, k, v [B, T, H, D], lr, decay or None, momentum or None [B, T, H], w1, w2 or None, s1 or None,
                      s2 or None, chunk_size, loss, window) -> (o [B, T, H, D], w1, w2, s1, s2)
    memory_forward    the same -> (o, w1, w2, s1, s2, states [B, H, segments, N]): w1 | w2, and with momentum s1 | s2,
                      flat, as every segment of `segment_of(chunk_size)` chunks begins
    memory_backward   (gradients of the five results, each or None, all tensors, states, the options)
                      -> (dq, dk, dv, dlr, ddecay, dmomentum, dw1, dw2, ds1, ds2), each in its argument's dtype
    muon_memory       memory with the optimizer "muon"

A linear memory has w1 [B, H, D, D] alone; the MLP w1 [B, H, F, D] and w2 [B, H, D, F]. What is not there is empty, [0],
among the results. `neural_memory` itself unpacks its lists of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from . import composed_neural_memory as muon
from . import op as room
from . import reference
from .composed_neural_memory import segment_of

ops = torch.ops.seqops

LOSSES = ("l2", "dot")
SCHEMA = (
    "neural_memory(Tensor q, Tensor k, Tensor v, Tensor lr, Tensor[] weights, int chunk_size, *, Tensor? decay=None, "
    "Tensor? momentum=None, Tensor[]? momentum_state=None, str loss='l2', int window=1, str optimizer='gd') "
    "-> (Tensor o, Tensor[] weights, Tensor[] momentum_state)"
)

# ---- checks and shapes of `memory`, for tensors without data


def check_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
    op: str = "memory",
) -> None:
    room.check_sequences(op, q, k, v)
    B, T, H, _ = q.shape
    for name, gate in (("lr", lr), ("decay", decay), ("momentum", momentum)):
        room.check_like(op, name, gate, "[B, T, H]", (B, T, H), q)
    if w2 is not None:
        shape = validate.shape_of(w1)
        validate.expect(w1.ndim == 4, op, "w1", "4 dimensions [B, H, F, D]", f"shape {shape}")
        validate.expect(w1.shape[2] >= 1, op, "w1", "at least 1 hidden channel", f"shape {shape}")
    check_weights(op, "w", w1, w2, q, w1, w2)
    check_weights(op, "s", s1, s2, q, w1, w2)
    room.check_at_least(op, "chunk_size", chunk_size, 1)
    room.check_choice(op, "loss", loss, LOSSES)
    room.check_at_least(op, "window", window, 1)


def check_weights(
    op: str, letter: str, first: Tensor | None, second: Tensor | None, q: Tensor, w1: Tensor, w2: Tensor | None
) -> None:
    """Tensors like w1 and w2, whose own sizes beyond F may be wrong."""
    B, _, H, D = q.shape
    F = D if w2 is None else w1.shape[2]
    room.check_like(op, f"{letter}1", first, f"[B, H, {'D' if w2 is None else 'F'}, D]", (B, H, F, D), q)
    validate.expect(w2 is not None or second is None, op, f"{letter}2", "None without w2", "a tensor")
    room.check_like(op, f"{letter}2", second, "[B, H, D, F]", (B, H, D, F), q)


def check_memory_backward(
    grad_o: Tensor | None,
    grad_w1: Tensor | None,
    grad_w2: Tensor | None,
    grad_s1: Tensor | None,
    grad_s2: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    states: Tensor,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
    op: str = "memory_backward",
) -> None:
    check_memory(q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss=loss, window=window, op=op)
    if grad_o is not None:
        validate.check_device(op, "grad_o", grad_o, "q", q)
        validate.check_type(op, "grad_o", grad_o, (q.dtype,))
        validate.check_shape(op, "grad_o", grad_o, "[B, T, H, D]", q.shape)
    check_weights(op, "grad_w", grad_w1, grad_w2, q, w1, w2)
    check_weights(op, "grad_s", grad_s1, grad_s2, q, w1, w2)
    validate.check_device(op, "states", states, "q", q)
    validate.check_type(op, "states", states, (validate.real_of(q.dtype),))
    shape = states_shape(q, momentum, w1, w2, chunk_size)
    validate.check_shape(op, "states", states, "[B, H, segments, N]", shape)


def states_shape(
    q: Tensor, momentum: Tensor | None, w1: Tensor, w2: Tensor | None, chunk_size: int
) -> tuple[int, int, int, int]:
    B, T, H, D = q.shape
    size = w1.shape[2] * D * (1 if w2 is None else 2) * (1 if momentum is None else 2)
    tokens = chunk_size * segment_of(chunk_size)
    return B, H, (T + tokens - 1) // tokens, size


def memory_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    decay: Tensor | None,
    momentum: Tensor | None,
    w1: Tensor,
    w2: Tensor | None,
    s1: Tensor | None,
    s2: Tensor | None,
    chunk_size: int,
    *,
    loss: str = "l2",
    window: int = 1,
    op: str = "memory",
) -> tuple[Tensor, ...]:
    check_memory(q, k, v, lr, decay, momentum, w1, w2, s1, s2, chunk_size, loss=loss, window=window, op=op)
    real = validate.real_of(q.dtype)
    weights = [q.new_empty(w1.shape, dtype=real), q.new_empty(0 if w2 is None else w2.shape, dtype=real)]
    return (q.new_empty(q.shape), *weights, *map(torch.empty_like, weights))


def memory_forward_shapes(*args: Any, op: str = "memory_forward", **options: Any) -> tuple[Tensor, ...]:
    q, _, _, _, _, momentum, w1, w2, _, _, chunk_size = args
    shapes = memory_shapes(*args, **options, op=op)
    return (*shapes, shapes[1].new_empty(states_shape(q, momentum, w1, w2, chunk_size)))


def memory_backward_shapes(*args: Any, **options: Any) -> tuple[Tensor, ...]:
    check_memory_backward(*args, **options)
    q = args[5]
    nothing = q.new_empty(0, dtype=validate.real_of(q.dtype))
    return tuple(nothing.clone() if t is None else t.new_empty(t.shape) for t in args[5:15])


# ---- the formula of `memory`


def save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    *tensors, ctx.chunk_size, ctx.loss, ctx.window = inputs
    ctx.mark_non_differentiable(outputs[5])
    ctx.save_for_backward(*tensors, outputs[5])


def formula(
    function: Callable[..., Any], ctx: Any, saved: tuple[Any, ...], *gradients: Tensor | None
) -> tuple[Tensor | None, ...]:
    given = list(gradients[:5])
    tensors = saved[:10]
    if tensors[7] is None:  # a linear memory, whose second results are empty
        given[2] = given[4] = None
    if all(gradient is None for gradient in given):
        return (None,) * 13
    found = function(*given, *saved, ctx.chunk_size, loss=ctx.loss, window=ctx.window)
    return (*(None if t is None else gradient for t, gradient in zip(tensors, found, strict=True)), None, None, None)


# ---- registration of `memory`


def in_lists(optimizer: str) -> Callable[..., tuple[Tensor, ...]]:
    """The reference, with the arguments and results of `memory`."""

    def run(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        decay: Tensor | None,
        momentum: Tensor | None,
        w1: Tensor,
        w2: Tensor | None,
        s1: Tensor | None,
        s2: Tensor | None,
        chunk_size: int,
        **options: Any,
    ) -> tuple[Tensor, ...]:
        weights = [w1] if w2 is None else [w1, w2]
        states = None if s1 is None else [s1] if w2 is None else [s1, torch.zeros_like(w2) if s2 is None else s2]
        options |= {"decay": decay, "momentum": momentum, "momentum_state": states, "optimizer": optimizer}
        o, w, s = reference.neural_memory(q, k, v, lr, weights, chunk_size, **options)
        return (o, w[0], w[0].new_zeros(0) if w2 is None else w[1], s[0], s[0].new_zeros(0) if w2 is None else s[1])

    return run


def register_operator(name: str, shapes: Callable[..., Any], check: Callable[..., None]) -> torch._ops.OpOverload:
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, register.vmap_of_batch(operator))
    backend.register_elsewhere(operator)
    backend.provide(name, "cpu", part_of="neural_memory")
    backend.provide_module(name, __package__, check=check, part_of="neural_memory")
    return operator


def register_memory() -> None:
    plain = register_operator("memory", memory_shapes, check_memory)
    training = register_operator("memory_forward", memory_forward_shapes, check_memory)
    recorded = register.register_autograd(training, save=save, backward=partial(formula, ops.memory_backward))
    register.register_training(plain, recorded)
    backward = register_operator("memory_backward", memory_backward_shapes, check_memory_backward)
    register.refuse_second_derivative(backward, plain)
    backend.provide("memory", "reference", in_lists("gd"), check=check_memory, part_of="neural_memory")


register_memory()


# ---- muon_memory: the same arguments and results, made of products and newton_schulz on every backend

MUON_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor lr, Tensor? decay, Tensor? momentum, Tensor w1, Tensor? w2, Tensor? s1, "
    "Tensor? s2, "
)
MUON_OPTIONS = "int chunk_size, *, str loss='l2', int window=1) -> "
MUON_SCHEMAS = (
    f"muon_memory({MUON_ARGUMENTS}{MUON_OPTIONS}(Tensor o, Tensor w1, Tensor w2, Tensor s1, Tensor s2)",
    f"muon_memory_forward({MUON_ARGUMENTS}{MUON_OPTIONS}"
    "(Tensor o, Tensor w1, Tensor w2, Tensor s1, Tensor s2, Tensor states)",
    "muon_memory_backward(Tensor? grad_o, Tensor? grad_w1, Tensor? grad_w2, Tensor? grad_s1, Tensor? grad_s2, "
    f"{MUON_ARGUMENTS}Tensor states, {MUON_OPTIONS}(Tensor dq, Tensor dk, Tensor dv, Tensor dlr, Tensor ddecay, "
    "Tensor dmomentum, Tensor dw1, Tensor dw2, Tensor ds1, Tensor ds2)",
)


def register_muon_operator(
    schema: str, shapes: Callable[..., Any], check: Callable[..., None]
) -> torch._ops.OpOverload:
    backend.library.define(schema)
    name = schema.partition("(")[0]
    operator = getattr(ops, name).default
    torch.library.register_fake(f"seqops::{name}", shapes, lib=backend.library)
    register.register_vmap(operator, register.vmap_of_batch(operator))
    backend.register_elsewhere(operator)
    for each in ("cpu", "triton"):
        backend.provide(name, each, getattr(muon, name), check=check, part_of="neural_memory")
    backend.provide(name, "cuda", partial(refuse_cuda, name), check=check, part_of="neural_memory")
    return operator


def refuse_cuda(name: str, *arguments: Any, **_: Any) -> tuple[Tensor, ...]:
    device = next(t.device.type for t in arguments if isinstance(t, Tensor))
    raise RuntimeError(backend.refusal(name, "cuda", device, "it has no kernel for the optimizer 'muon'"))


def register_muon() -> None:
    checks = [partial(check_memory, op="muon_memory"), partial(check_memory, op="muon_memory_forward")]
    checks.append(partial(check_memory_backward, op="muon_memory_backward"))
    shapes = [partial(memory_shapes, op="muon_memory"), partial(memory_forward_shapes, op="muon_memory_forward")]
    shapes.append(partial(memory_backward_shapes, op="muon_memory_backward"))
    plain, training, backward = (
        register_muon_operator(*each) for each in zip(MUON_SCHEMAS, shapes, checks, strict=True)
    )
    recorded = register.register_autograd(training, save=save, backward=partial(formula, ops.muon_memory_backward))
    register.register_training(plain, recorded)
    register.refuse_second_derivative(backward, plain)
    backend.provide("muon_memory", "reference", in_lists("muon"), check=check_memory, part_of="neural_memory")


register_muon()


# ---- neural_memory, which is made of these


def check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Sequence[Tensor],
    chunk_size: int,
    *,
    decay: Tensor | None = None,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    loss: str = "l2",
    window: int = 1,
    optimizer: str = "gd",
    op: str = "neural_memory",
) -> None:
    room.check_sequences(op, q, k, v)
    B, T, H, D = q.shape
    room.check_like(op, "lr", lr, "[B, T, H]", (B, T, H), q)
    room.check_count(op, "weights", weights, (1, 2))
    shapes = [("[B, H, D, D]", (B, H, D, D))]
    if len(weights) == 2:
        first = weights[0]
        shape = validate.shape_of(first)
        validate.expect(first.ndim == 4, op, "weights[0]", "4 dimensions [B, H, F, D]", f"shape {shape}")
        F = first.shape[2]
        validate.expect(F >= 1, op, "weights[0]", "at least 1 hidden channel", f"shape {shape}")
        shapes = [("[B, H, F, D]", (B, H, F, D)), ("[B, H, D, F]", (B, H, D, F))]
    for i, (weight, (letters, sizes)) in enumerate(zip(weights, shapes, strict=True)):
        room.check_like(op, f"weights[{i}]", weight, letters, sizes, q)
    room.check_at_least(op, "chunk_size", chunk_size, 1)
    room.check_like(op, "decay", decay, "[B, T, H]", (B, T, H), q)
    room.check_like(op, "momentum", momentum, "[B, T, H]", (B, T, H), q)
    if momentum_state is not None:
        room.check_count(op, "momentum_state", momentum_state, (len(weights),))
        for i, (state, (letters, sizes)) in enumerate(zip(momentum_state, shapes, strict=True)):
            room.check_like(op, f"momentum_state[{i}]", state, letters, sizes, q)
    room.check_choice(op, "loss", loss, LOSSES)
    room.check_at_least(op, "window", window, 1)
    room.check_choice(op, "optimizer", optimizer, room.OPTIMIZERS)


def composed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Sequence[Tensor],
    chunk_size: int,
    *,
    decay: Tensor | None = None,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    loss: str = "l2",
    window: int = 1,
    optimizer: str = "gd",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    layers = len(weights)
    missing = [None] * (2 - layers)
    states = [None, None] if momentum_state is None else [*momentum_state, *missing]
    function = ops.memory if optimizer == "gd" else ops.muon_memory
    o, w1, w2, s1, s2 = function(
        q, k, v, lr, decay, momentum, *weights, *missing, *states, chunk_size, loss=loss, window=window
    )
    return o, [w1, w2][:layers], [s1, s2][:layers]


register.register_composite(
    SCHEMA,
    composed,
    reference=reference.neural_memory,
    check=check,
    cast=("q", "k", "v"),
    parts=("memory", "muon_memory"),
)


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    weights: Sequence[Tensor],
    chunk_size: int,
    *,
    decay: Tensor | None = None,
    momentum: Tensor | None = None,
    momentum_state: Sequence[Tensor] | None = None,
    loss: str = "l2",
    window: int = 1,
    optimizer: str = "gd",
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A memory `f` that learns while it reads: its weights take a step down a loss of every token (Titans, TTT, ATLAS).

        S_t = momentum_t S_{t-1} - sum of lr_i u_i over the last `window` tokens of the chunk
        M_t = (1 - decay_t) M_{t-1} + S_t;  o_t = f(M_t; q_t)

    u_i is the gradient of token i's loss by the weights, taken at the weights M that its chunk began with. So tokens of
    a chunk are computed together, while every output has the weights of its own token and sees no later one. Chunks
    count from the first token of a call: pieces cut at multiples of `chunk_size`, with weights and momentum handed on,
    equal the whole.

    Args:
        q, k, v: [B, T, H, D], what is asked, and what to learn: f(k) is to be v. float32, float64, bfloat16 or float16,
            any strides.
        lr: [B, T, H], the rate of each token; a token with 0 teaches nothing.
        weights: M before the first token: [W [B, H, D, D]], a linear memory `f(x) = W x`, or [W1 [B, H, F, D],
            W2 [B, H, D, F]], `f(x) = x + W2 silu(W1 x)`.
        chunk_size: C, at least 1. At 1 every gradient is taken at the weights of the token before.
        decay: [B, T, H], the fraction of M that is forgotten, in [0, 1]; None is 0.
        momentum: [B, T, H], in [0, 1]; None is 0.
        momentum_state: S before the first token, like `weights`; None is zero.
        loss: "l2", `|f(k) - v|^2 / 2` (a loss without the half: pass `2 lr`), or "dot", `-<f(k), v>`.
        window: how many tokens' gradients a step sums (ATLAS's Omega rule), within the chunk.
        optimizer: "gd", or "muon": within a chunk weights only decay, and its last token, if the chunk is complete,
            adds `newton_schulz` of all that the chunk has learnt, each matrix apart.

        Gates, weights and momentum have the dtype of q or, where that has 16 bits, float32.

    Returns:
        o [B, T, H, D] in the dtype of q; the weights and the momentum after the last token, as lists like `weights`, in
        float32, or float64 for float64.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.
        NotImplementedError: in forward-mode differentiation.

    Updates are exact, and so is their derivative, by all tensors. With k of length 1 and no momentum, steps on "l2" are
    stable while the sum of a chunk's rates is below 2.

    Memory: no weights of single tokens. A gradient keeps the inputs, and the weights (with momentum: and the momentum)
    before every 8th chunk, or every 128 tokens where chunks are shorter than 16; chunks are computed again.

    Example:
        >>> q, v = torch.randn(2, 64, 2, 8), torch.randn(2, 64, 2, 8)
        >>> k = torch.nn.functional.normalize(q, dim=-1)
        >>> rate = torch.full((2, 64, 2), 0.1)
        >>> o, weights, momentum = seqops.neural_memory(k, k, v, rate, [torch.zeros(2, 2, 8, 8)], 16)
        >>> o, weights, _ = seqops.neural_memory(k, k, v, rate, weights, 16)  # the piece that follows
        >>> o.shape
        torch.Size([2, 64, 2, 8])

    Behrouz et al., "Titans: learning to memorize at test time", 2024; Sun et al., "Learning to (learn at test time):
    RNNs with expressive hidden states", 2024; Behrouz et al., "ATLAS: learning to optimally memorize the context at
    test time", 2025.
    """
    options = {"momentum_state": momentum_state, "loss": loss, "window": window, "optimizer": optimizer}
    return ops.neural_memory(q, k, v, lr, weights, chunk_size, decay=decay, momentum=momentum, **options)
