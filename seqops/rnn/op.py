"""Recurrent networks: shapes, gradient formulas, transforms, and the public functions.

    lstm, gru, slstm, elman       the public operators: results only
    lstm_forward, gru_forward, …  the same, also returning what the backward reads; used where a gradient is wanted
    lstm_backward, …              gradients of the input projection and of the initial states

The recurrence gives `dy`, the gradient of the recurrent product of every step; those of the recurrent weights and of
the bias are then one matrix product and one sum, in plain torch.

Letters: B batch, T time, H heads, D units of a head, G gates.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..core import backend, register, validate
from ..core.layout import new_sequence, time_first
from .cells import CACHES, GATES, STATES

ops = torch.ops.seqops

LIKE = {"lstm": "p", "gru": "p", "slstm": "cache", "elman": "h"}  # see backward_like
FINAL_GRADIENTS = ("dh_n", "dc_n", "dn_n", "dm_n")


# ---- checks and shapes, for tensors without data


def check(
    op: str, wx: Tensor, r: Tensor, b: Tensor | None, states: tuple[Tensor | None, ...], options: dict[str, Any]
) -> None:
    gates = GATES[op]
    validate.expect(wx.ndim == 5, op, "wx", "5 dimensions [B, T, G, H, D]", f"shape {validate.shape_of(wx)}")
    validate.expect(
        wx.dtype in validate.STORAGE, op, "wx", "float32, float64, bfloat16 or float16", validate.name_of(wx.dtype)
    )
    words = "gate" if gates == 1 else "gates"
    validate.expect(wx.shape[2] == gates, op, "wx", f"{gates} {words} (dimension 2)", f"shape {validate.shape_of(wx)}")
    batch, time, _, heads, units = wx.shape
    validate.expect(heads >= 1 and units >= 1, op, "wx", "at least 1 head and 1 unit", f"shape {validate.shape_of(wx)}")
    validate.check_device(op, "r", r, "wx", wx)
    validate.check_shape(op, "r", r, "[G, H, D, D]", (gates, heads, units, units))
    validate.expect(r.dtype == wx.dtype, op, "r", f"wx's dtype {validate.name_of(wx.dtype)}", validate.name_of(r.dtype))
    if b is not None:
        validate.check_device(op, "b", b, "wx", wx)
        validate.check_shape(op, "b", b, "[G, H, D]", (gates, heads, units))
        validate.check_dtype(op, "b", b, wx.dtype)
    for name, state in zip(STATES[op], states, strict=True):
        if state is not None:
            validate.check_device(op, name, state, "wx", wx)
            validate.check_shape(op, name, state, "[B, H, D]", (batch, heads, units))
            validate.check_dtype(op, name, state, wx.dtype)
    check_options(op, options, wx, batch, time)


def check_options(op: str, options: dict[str, Any], like: Tensor, batch: int, time: int) -> None:
    check_lengths(op, options.get("lengths"), like, batch, time)
    validate.check_grad_clip(op, options.get("grad_clip"))
    check_nonlinearity(op, options)


def check_nonlinearity(op: str, options: dict[str, Any]) -> None:
    nonlinearity = options.get("nonlinearity", "tanh")
    validate.expect(nonlinearity in ("tanh", "relu"), op, "nonlinearity", "'tanh' or 'relu'", repr(nonlinearity))


def check_lengths(op: str, lengths: Tensor | None, like: Tensor, batch: int, time: int) -> None:
    """`like` is wx, or stands for it in the backward."""
    if lengths is None:
        return
    validate.check_device(op, "lengths", lengths, "wx", like)
    validate.expect(
        lengths.dtype in (torch.int32, torch.int64), op, "lengths", "int32 or int64", validate.name_of(lengths.dtype)
    )
    validate.check_shape(op, "lengths", lengths, "[B]", (batch,))
    if validate.has_data(lengths):
        wrong = ((lengths < 0) | (lengths > time)).nonzero()
        if len(wrong):
            index = int(wrong[0])
            validate.expect(
                False, op, "lengths", f"values in [0, T] = [0, {time}]", f"{int(lengths[index])} at index {index}"
            )


def split(op: str, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """Positional arguments of a forward operator: wx, r, b, states; missing ones are None."""
    wx, r, *rest = args
    b = rest[0] if rest else None
    states = tuple(rest[1:])
    return wx, r, b, states + (None,) * (len(STATES[op]) - len(states))


def check_forward(op: str, *args: Any, **options: Any) -> None:
    """The arguments of a forward operator."""
    check(op, *split(op, args), options)


@cache
def backward_arguments(op: str) -> tuple[str, ...]:
    """Names of the positional arguments."""
    schema = getattr(ops, f"{op}_backward").default._schema.arguments
    return tuple(argument.name for argument in schema if not argument.kwarg_only)


def backward_like(op: str, args: tuple[Any, ...]) -> Tensor:
    """What gives a backward operator dtype, shape and memory order."""
    return args[backward_arguments(op).index(LIKE[op])]


def check_backward(op: str, *args: Any, **options: Any) -> None:
    """The arguments of a backward operator: our own formulas call it, yet it must not crash for others either.

    In the order and the words of check_backward in csrc/rnn/rnn.cpp.
    """
    name, like_name = f"{op}_backward", LIKE[op]
    given = dict(zip(backward_arguments(op), args, strict=False))
    like = given[like_name]
    check_nonlinearity(op, options)
    validate.check_grad_clip(op, options.get("grad_clip"))
    planes = tuple(filter(None, CACHES[op]))
    letters = "[B, T, G, H, D]" if planes else "[B, T, H, D]"
    dimensions, got = len(letters.split()), f"shape {validate.shape_of(like)}"
    validate.expect(like.ndim == dimensions, name, like_name, f"{dimensions} dimensions", got)
    validate.check_type(name, like_name, like, validate.STORAGE)
    (batch, time), (heads, units) = like.shape[:2], like.shape[-2:]
    validate.check_shape(name, like_name, like, letters, (batch, time, *planes, heads, units))
    validate.expect(heads >= 1 and units >= 1, name, like_name, "at least 1 head and 1 unit", got)

    def check_one(argument: str, letters: str, shape: tuple[int, ...]) -> None:
        t = given.get(argument)
        if t is not None:
            validate.check_device(name, argument, t, like_name, like)
            validate.check_shape(name, argument, t, letters, shape)
            validate.check_type(name, argument, t, (like.dtype,))

    check_one("r", "[G, H, D, D]", (GATES[op], heads, units, units))
    for argument in ("dh", "c", "y", "h"):
        check_one(argument, "[B, T, H, D]", (batch, time, heads, units))
    for words, states in (
        ("gradient of a final state", FINAL_GRADIENTS),
        ("initial state", ("h0", "c0", "n0")),
        ("final state", ("c_n", "n_n")),
    ):
        for t in map(given.get, states):
            if t is not None:
                validate.check_device(name, words, t, like_name, like)
                validate.check_shape(name, words, t, "[B, H, D]", (batch, heads, units))
                validate.check_dtype(name, words, t, like.dtype)
    check_lengths(op, options.get("lengths"), like, batch, time)


def check_size(op: str, name: str, t: Tensor) -> None:
    """GPU kernels count steps, and what there is in one step, in 32 bits.

    Args:
        t: [B, T, ..., H, D], called `name`.
    """
    (batch, time), (heads, units), got = t.shape[:2], t.shape[-2:], f"shape {validate.shape_of(t)}"
    validate.expect(time < 2**31, op, name, "fewer than 2^31 steps on a GPU", got)
    validate.expect(batch * heads * units < 2**31, op, name, "B H D below 2^31 on a GPU", got)


def check_for_gpu(op: str, backward: bool, *args: Any, **options: Any) -> None:
    """What the kernels in Python rely on."""
    if backward:
        check_backward(op, *args, **options)
        check_size(f"{op}_backward", LIKE[op], backward_like(op, args))
    else:
        check_forward(op, *args, **options)
        check_size(op, "wx", args[0])


def forward_shapes(op: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    wx, r, b, states = split(op, args)
    check(op, wx, r, b, states, options)
    batch, _, _, heads, units = wx.shape
    real = validate.real_of(wx.dtype)
    final = (wx.new_empty(batch, heads, units, dtype=real) for _ in states)
    return (new_sequence(wx, heads, units), *final)


def training_shapes(op: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    wx = args[0]
    results = forward_shapes(op, *args, **options)
    heads, units = wx.shape[3:]
    caches = (new_sequence(wx, *(() if count is None else (count,)), heads, units) for count in CACHES[op])
    return (*results, *caches)


def backward_shapes(op: str, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    """dwx, for the GRU dy of its candidate, then the gradients of the initial states."""
    check_backward(op, *args, **options)
    like = backward_like(op, args)
    batch, heads, units = like.shape[0], like.shape[-2], like.shape[-1]
    real = validate.real_of(like.dtype)
    states = (like.new_empty(batch, heads, units, dtype=real) for _ in STATES[op])
    dy = (new_sequence(like, heads, units),) if op == "gru" else ()
    return (new_sequence(like, GATES[op], heads, units), *dy, *states)


# ---- gradients of weights and bias

# Where oneDNN multiplies bfloat16 it adds in float32: widening first would only cost time and memory.
NATIVE_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def previous_h(h: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool, time: int) -> Tensor:
    """h [.., T at dim `time`, .., H, D] one step earlier in the order of the recurrence, h0 at the first step."""
    first = torch.zeros_like(h.narrow(time, 0, 1)) if h0 is None else h0.to(h.dtype).unsqueeze(time)
    steps = h.shape[time]
    if not reverse:
        return torch.cat((first, h.narrow(time, 0, steps - 1)), time)
    shifted = torch.cat((h.narrow(time, 1, steps - 1), first), time)
    if lengths is None:
        return shifted
    begins = torch.arange(steps, device=h.device) == lengths[:, None] - 1  # [B, T]
    begins = (begins if time == 1 else begins.t())[:, :, None, None]
    return torch.where(begins, first, shifted)


def product_types(like: Tensor) -> tuple[torch.dtype, dict[str, Any]]:
    """What the factors of dr are stored in, and options of its product: sums are never narrower than float32.

    16-bit factors stay so where the processor multiplies them: their products are exact in float32.
    """
    if like.is_cuda and like.element_size() == 2 and torch.cuda.get_device_capability(like.device) >= (8, 0):
        return like.dtype, {"out_dtype": torch.float32}
    native = NATIVE_BFLOAT16 and like.dtype == torch.bfloat16 and like.device.type == "cpu"
    return (like.dtype if native else validate.real_of(like.dtype)), {}


def weight_gradient(
    dy: tuple[Tensor, ...], h: Tensor, h0: Tensor | None, lengths: Tensor | None, reverse: bool, dtype: torch.dtype
) -> Tensor:
    """dr [G, H, D, D] = sum over rows and steps of dy h_before^T.

    Args:
        dy: [B, T, *, H, D] each, with the gates in order once put side by side.
        h: [B, T, H, D].
    """
    heads, units = h.shape[2:]
    gates = sum(part.shape[2] for part in dy)
    pairs = h.shape[0] * h.shape[1]
    if pairs == 0:
        return h.new_zeros(gates, heads, units, units, dtype=dtype)
    time = 1
    if time_first(h):  # go through memory in order
        time, h, dy = 0, h.transpose(0, 1), tuple(part.transpose(0, 1) for part in dy)
    wide, sums = product_types(h)
    before = previous_h(h, h0, lengths, reverse, time).to(wide).reshape(pairs, heads, units)
    parts = []
    for part in dy:
        part = part.to(wide).reshape(pairs, -1, heads, units)
        if heads == 1:
            parts.append(torch.mm(part.reshape(pairs, -1).t(), before[:, 0], **sums).reshape(-1, 1, units, units))
        else:
            by_head = before.transpose(0, 1)  # [H, N, D]
            parts.extend(torch.bmm(gate.permute(1, 2, 0), by_head, **sums).unsqueeze(0) for gate in part.unbind(1))
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def bias_gradient(dy: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    """db [G, H, D] = sum over rows and steps of dy."""
    parts = [part.sum((0, 1), dtype=validate.real_of(part.dtype)) for part in dy]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)


def keep(ctx: Any, op: str, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...], *needed: Tensor | None) -> None:
    """Save what `gradients` reads (r, h, h0, lengths), then `needed`: what this cell's backward operator reads.

    `inputs` are wx, r, b, the states, then the keywords in the order of the schema.
    """
    _, r, b, *rest = inputs
    states, keywords = rest[: len(STATES[op])], rest[len(STATES[op]) :]
    *ctx.extra, lengths, ctx.reverse, ctx.grad_clip = keywords
    ctx.b_dtype = None if b is None else b.dtype
    ctx.state_dtypes = [None if state is None else state.dtype for state in states]
    ctx.save_for_backward(r, outputs[0], states[0], lengths, *needed)


def options_of(ctx: Any, lengths: Tensor | None) -> dict[str, Any]:
    return {"lengths": lengths, "reverse": ctx.reverse, "grad_clip": ctx.grad_clip}


def gradients(
    ctx: Any,
    saved: tuple[Any, ...],
    dwx: Tensor,
    dy: tuple[Tensor, ...],
    dstates: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...]:
    """One gradient per schema argument. `dy`: gradient of the recurrent product, in parts along the gates."""
    r, h, h0, lengths, *_ = saved
    dr = db = None
    if ctx.needs_input_grad[1]:
        dr = weight_gradient(dy, h, h0, lengths, ctx.reverse, r.dtype)
    if ctx.b_dtype is not None and ctx.needs_input_grad[2]:
        db = bias_gradient(dy, ctx.b_dtype)
    states = (
        None if dtype is None else dstate.to(dtype) for dtype, dstate in zip(ctx.state_dtypes, dstates, strict=True)
    )
    return (dwx, dr, db, *states, *(None for _ in ctx.extra), None, None, None)


# ---- the formulas, a pair for each cell


def lstm_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, _, _, p, c = outputs
    ctx.mark_non_differentiable(p, c)
    keep(ctx, "lstm", inputs, outputs, p, c, inputs[4])


def lstm_formula(ctx: Any, saved: tuple[Any, ...], dh: Any, dh_n: Any, dc_n: Any, *_: Any) -> tuple[Any, ...]:
    r, _, _, lengths, p, c, c0 = saved
    dwx, *dstates = ops.lstm_backward(dh, dh_n, dc_n, r, p, c, c0, **options_of(ctx, lengths))
    return gradients(ctx, saved, dwx, (dwx,), tuple(dstates))


def gru_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, _, p, y = outputs
    ctx.mark_non_differentiable(p, y)
    keep(ctx, "gru", inputs, outputs, p, y)


def gru_formula(ctx: Any, saved: tuple[Any, ...], dh: Any, dh_n: Any, *_: Any) -> tuple[Any, ...]:
    r, h, h0, lengths, p, y = saved
    dwx, dy, dh0 = ops.gru_backward(dh, dh_n, r, p, y, h, h0, **options_of(ctx, lengths))
    # the product's gradient is dwx's but for the candidate, whose product the reset gate scales
    return gradients(ctx, saved, dwx, (dwx[:, :, :2], dy.unsqueeze(2)), (dh0,))


def slstm_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    _, _, c_n, n_n, _, cache = outputs
    ctx.mark_non_differentiable(cache)
    keep(ctx, "slstm", inputs, outputs, cache, c_n, n_n, inputs[4], inputs[5])


def slstm_formula(
    ctx: Any, saved: tuple[Any, ...], dh: Any, dh_n: Any, dc_n: Any, dn_n: Any, dm_n: Any, *_: Any
) -> tuple[Any, ...]:
    r, _, _, lengths, cache, c_n, n_n, c0, n0 = saved
    dwx, *dstates = ops.slstm_backward(
        dh, dh_n, dc_n, dn_n, dm_n, r, cache, c_n, n_n, c0, n0, **options_of(ctx, lengths)
    )
    return gradients(ctx, saved, dwx, (dwx,), tuple(dstates))


def elman_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    keep(ctx, "elman", inputs, outputs)


def elman_formula(ctx: Any, saved: tuple[Any, ...], dh: Any, dh_n: Any) -> tuple[Any, ...]:
    r, h, _, lengths = saved
    (nonlinearity,) = ctx.extra
    dwx, dh0 = ops.elman_backward(dh, dh_n, r, h, nonlinearity=nonlinearity, **options_of(ctx, lengths))
    return gradients(ctx, saved, dwx, (dwx,), (dh0,))


# ---- vmap


def vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """The mapped dimension joins the batch or, where weights are mapped, the heads: both leave the recurrence alone.

    Weights are [G, H, ...], every other tensor is [B, ..., H, D]; lengths [B] cannot differ between heads, so with both
    mapped the operator runs once for each.
    """
    names = [argument.name for argument in op._schema.arguments]
    split_at = sum(not argument.kwarg_only for argument in op._schema.arguments)
    weights = {"r", "b"}

    def call(flat: list[Any]) -> tuple[Tensor, ...]:
        return op(*flat[:split_at], **dict(zip(names[split_at:], flat[split_at:], strict=True)))

    def rule(size: int, in_dims: tuple[int | None, ...], *flat: Any) -> Any:
        mapped = {name for name, dim in zip(names, in_dims, strict=True) if dim is not None}
        if not mapped & weights:

            def join(name: str, value: Any, dim: int | None) -> Any:
                return value if name in weights or not isinstance(value, Tensor) else register.fold(value, dim, size, 0)

            outputs = call([join(*item) for item in zip(names, flat, in_dims, strict=True)])
            return tuple(o.unflatten(0, (size, o.shape[0] // size)) for o in outputs), (0,) * len(outputs)
        if "lengths" not in mapped:

            def join(name: str, value: Any, dim: int | None) -> Any:
                if not isinstance(value, Tensor) or name == "lengths":
                    return value
                heads = 1 if name in weights else value.ndim - (dim is not None) - 2
                return register.fold(value, dim, size, heads)

            outputs = call([join(*item) for item in zip(names, flat, in_dims, strict=True)])
            return tuple(o.unflatten(-2, (size, o.shape[-2] // size)) for o in outputs), tuple(
                o.ndim - 2 for o in outputs
            )
        runs = [
            call([v if dim is None else v.select(dim, i) for v, dim in zip(flat, in_dims, strict=True)])
            for i in range(size)
        ]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])

    return rule


# ---- registration


def provide_reference(op: str, function: Callable[..., tuple[Tensor, ...]]) -> None:
    """Let `function` serve the forced backend "reference", behind the same checks as any kernel."""

    def call(*args: Any, **options: Any) -> tuple[Tensor, ...]:
        check_forward(op, *args, **options)
        return function(*args, **options)

    backend.provide(op, "reference", call)


def register_cell(op: str, save: Callable[..., None], formula: Callable[..., Any]) -> None:
    public, backward = getattr(ops, op).default, getattr(ops, f"{op}_backward").default
    everything = {public: lambda *args, **options: forward_shapes(op, *args, **options)}
    everything[backward] = lambda *args, **options: backward_shapes(op, *args, **options)
    if CACHES[op]:
        training = getattr(ops, f"{op}_forward").default
        everything[training] = lambda *args, **options: training_shapes(op, *args, **options)
        with_formula = register.register_autograd(training, save=save, backward=formula)
        register.register_training(public, with_formula)
    else:
        register.register_autograd(public, save=save, backward=formula)
    register.refuse_second_derivative(backward, public)
    register.register_autocast(public, ("wx", "r"))
    for operator, shapes in everything.items():
        name = operator._schema.name
        torch.library.register_fake(name, shapes, lib=backend.library)
        register.register_vmap(operator, vmap_rule(operator))
        backend.register_elsewhere(operator)
        part_of, short = None if operator is public else op, name.partition("::")[2]
        backend.provide(short, "cpu", part_of=part_of)
        checked = partial(check_for_gpu, op, operator is backward)
        backend.provide_module(short, __package__, check=checked, part_of=part_of)


ops._allow_teams("ATen parallel backend: OpenMP" in torch.__config__.parallel_info())
register_cell("lstm", lstm_save, lstm_formula)
register_cell("gru", gru_save, gru_formula)
register_cell("slstm", slstm_save, slstm_formula)
register_cell("elman", elman_save, elman_formula)


# ---- the input projection of a module: linear, by the tiles of the recurrent product (float32 and float64, CPU only)


def project_shapes(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def project_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def project_formula(ctx: Any, saved: tuple[Any, ...], dy: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, weight = saved
    rows = dy.reshape(-1, dy.shape[-1])
    dx = ops.project(dy, weight.t()) if ctx.needs_input_grad[0] else None
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    dbias = rows.sum(0) if ctx.needs_input_grad[2] else None
    return dx, dweight, dbias


torch.library.register_fake("seqops::project", project_shapes, lib=backend.library)
register.register_autograd(ops.project.default, save=project_save, backward=project_formula)


# ---- public functions


def lstm(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory over a sequence, with a block-diagonal recurrence of H heads.

        p = wx_t + r h_{t-1} + b;  c_t = sigmoid(p_f) c_{t-1} + sigmoid(p_i) tanh(p_g);  h_t = sigmoid(p_o) tanh(c_t)

    Args:
        wx: [B, T, 4, H, D], gates in the order i, f, g, o: the input projection, with the input's bias if there is one.
            float32, float64, bfloat16 or float16, any strides. With H = 1 it is torch.nn.LSTM's, viewed.
        r: [4, H, D, D], dtype of wx: `r[g, h, out, in]` multiplies `h_{t-1}[h, in]`.
        b: [4, H, D], dtype of wx or of the states: bias of the recurrent product; None is zero.
        h0: [B, H, D], dtype of wx or of the states: h before the first step; None is zero.
        c0: [B, H, D], likewise for c.
        lengths: [B] int32 or int64 in [0, T]: row b ends after lengths[b] steps. What lies past it in wx is never read,
            the output there is 0, and the final state is that of the last valid step (of no step: the initial one).
        reverse: run each row from its own end to its beginning.
        grad_clip: clamp each element of the gradient of h that enters a step from the following one to
            [-grad_clip, grad_clip]; the values are not affected.

    Returns:
        h [B, T, H, D] in the dtype of wx, h_n [B, H, D] and c_n [B, H, D] in the dtype of the states: float32, or
        float64 for float64.

    Raises:
        ValueError: naming the argument, what was expected and what was got.
        RuntimeError: if a second derivative is taken, or a forced backend cannot serve the call.

    Memory: where a gradient is wanted, 5 values of wx's dtype per unit and step beyond h (p and c), kept for it.

    Example:
        >>> wx = torch.randn(2, 10, 4, 1, 8, requires_grad=True)  # 2 rows, 10 steps, 4 gates, 1 head of 8 units
        >>> h, h_n, c_n = seqops.lstm(wx, torch.randn(4, 1, 8, 8))
        >>> h.sum().backward()
        >>> h, h_n, c_n = seqops.lstm(wx[:, :1], torch.randn(4, 1, 8, 8), h0=h_n, c0=c_n)  # one step on
        >>> h.shape
        torch.Size([2, 1, 1, 8])

    Hochreiter and Schmidhuber, "Long short-term memory", 1997; Gers et al., "Learning to forget", 2000; heads:
    Pöppel et al., "FlashRNN", 2025.
    """
    return ops.lstm(wx, r, b, h0, c0, lengths=lengths, reverse=reverse, grad_clip=grad_clip)


def gru(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit over a sequence, with a block-diagonal recurrence of H heads.

        y = r h_{t-1} + b;  r_t = sigmoid(wx_r + y_r);  z_t = sigmoid(wx_z + y_z);  n_t = tanh(wx_n + r_t y_n)
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    The reset gate acts after the product, as in torch.nn.GRU.

    Args:
        wx: [B, T, 3, H, D], gates in the order r, z, n; otherwise as for `lstm`.
        r: [3, H, D, D].
        b: [3, H, D] or None. (That of n is scaled by the reset gate, so it cannot be put into wx.)
        h0, lengths, reverse, grad_clip: as for `lstm`.

    Returns:
        h [B, T, H, D] in the dtype of wx, and h_n [B, H, D] in the dtype of the states.

    Raises:
        ValueError, RuntimeError: as for `lstm`.

    Memory: where a gradient is wanted, 4 values of wx's dtype per unit and step beyond h (p and y_n), kept for it.

    Example:
        >>> wx = torch.randn(2, 10, 3, 4, 8)  # 2 rows, 10 steps, 3 gates, 4 heads of 8 units
        >>> h, h_n = seqops.gru(wx, torch.randn(3, 4, 8, 8), lengths=torch.tensor([10, 6]))
        >>> h.shape, bool((h[1, 6:] == 0).all())
        (torch.Size([2, 10, 4, 8]), True)

    Cho et al., "Learning phrase representations using RNN encoder-decoder for statistical machine translation", 2014.
    """
    return ops.gru(wx, r, b, h0, lengths=lengths, reverse=reverse, grad_clip=grad_clip)


def slstm(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    n0: Tensor | None = None,
    m0: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """sLSTM over a sequence: an LSTM with exponential input gate, normaliser n and stabiliser m, H heads.

        p = wx_t + r h_{t-1} + b;  l = logsigmoid(p_f) + m_{t-1};  m_t = max(l, p_i)
        i = exp(p_i - m_t);  f = exp(l - m_t);  c_t = f c_{t-1} + i tanh(p_z);  n_t = f n_{t-1} + i
        h_t = sigmoid(p_o) c_t / n_t

    Where l and p_i are both -inf, i = f = 0; where n is 0, c / n is 0 with zero gradient.

    Args:
        wx: [B, T, 4, H, D], gates in the order i, f, z, o; otherwise as for `lstm`.
        r: [4, H, D, D].
        b: [4, H, D] or None.
        h0, c0, n0, m0: [B, H, D], dtype of wx or of the states; None is 0, for m0 it is -inf (nothing seen yet).
        lengths, reverse, grad_clip: as for `lstm`.

    Returns:
        h [B, T, H, D] in the dtype of wx; h_n, c_n, n_n, m_n [B, H, D] in the dtype of the states.

    Raises:
        ValueError, RuntimeError: as for `lstm`.

    Memory: where a gradient is wanted, 7 values of wx's dtype per unit and step beyond h, kept for it.

    Example:
        >>> wx = torch.randn(2, 10, 4, 2, 8)  # 2 rows, 10 steps, 4 gates, 2 heads of 8 units
        >>> h, *state = seqops.slstm(wx, torch.randn(4, 2, 8, 8))
        >>> h, *state = seqops.slstm(wx, torch.randn(4, 2, 8, 8), None, *state)  # the piece that follows
        >>> h.shape
        torch.Size([2, 10, 2, 8])

    Beck et al., "xLSTM: Extended long short-term memory", 2024.
    """
    return ops.slstm(wx, r, b, h0, c0, n0, m0, lengths=lengths, reverse=reverse, grad_clip=grad_clip)


def elman(
    wx: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    h0: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | None = None,
    reverse: bool = False,
    grad_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Elman's simple recurrent network over a sequence, with a block-diagonal recurrence of H heads.

        h_t = tanh(wx_t + r h_{t-1} + b), or max(·, 0) with nonlinearity "relu"

    Args:
        wx: [B, T, 1, H, D]; otherwise as for `lstm`.
        r: [1, H, D, D].
        b: [1, H, D] or None.
        nonlinearity: "tanh" or "relu".
        h0, lengths, reverse, grad_clip: as for `lstm`.

    Returns:
        h [B, T, H, D] in the dtype of wx, and h_n [B, H, D] in the dtype of the states.

    Raises:
        ValueError, RuntimeError: as for `lstm`.

    Memory: nothing beyond h is kept for a gradient.

    Example:
        >>> wx = torch.randn(2, 10, 1, 1, 8)
        >>> h, h_n = seqops.elman(wx, torch.randn(1, 1, 8, 8) / 8, nonlinearity="relu")
        >>> h.shape, bool(h.min() >= 0)
        (torch.Size([2, 10, 1, 8]), True)

    Elman, "Finding structure in time", 1990.
    """
    return ops.elman(wx, r, b, h0, nonlinearity=nonlinearity, lengths=lengths, reverse=reverse, grad_clip=grad_clip)
