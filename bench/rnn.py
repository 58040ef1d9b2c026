"""Cases of the recurrent networks: LSTM, GRU, sLSTM, Elman, on the CPU and on a GPU.

Letters: B batch, T time, H heads, D units of a head.

Two kinds of case, of which `rnn_contenders.py` holds the implementations:

* **Modules** beside torch.nn's, from one `state_dict`, input projection included, `batch_first=True` on both sides.
* **Operators** with several heads or the sLSTM cell, which torch.nn lacks, beside two loops over time in plain PyTorch,
  without input projection on any side. `step loop` is written as the equations are, with one einsum a step and the
  step's input picked by index. `step loop, tuned` is the fastest eager form known to us: weights laid out once for one
  batched product, inputs unbound once. (Indexing costs in the backward pass: the gradient of each step is added to a
  zero tensor of the whole input's size.) Goals are set against the plain one; both are shown.

The CPU's goals were set on processors with AVX2. On later ones, this measures what such a processor would:

    export SEQOPS_CPU_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2

On a GPU peers are cuDNN (torch.nn's modules: bfloat16 ones also in float16, float32 ones also with TF32), our own path
that alternates between product and cell, FlashRNN's kernels where that package is installed, and for the sLSTM the step
loop. There the latency of a step bounds the time, so results are given by the step, beside what a forward step cannot
take less than by estimate.
"""

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec

import torch

from bench.harness import FORWARD, INFERENCE, OURS, REFERENCE, RULER, TRAINING, Case
from bench.rnn_contenders import (
    ALTERNATING,
    FLASHRNN,
    LOOP,
    MODULES,
    TUNED_LOOP,
    Shape,
    alternating,
    build_module,
    build_module_reference,
    build_module_ruler,
    build_operator,
    call_flashrnn,
    call_ours,
    call_reference,
    count_bytes,
    count_flops,
    step_loop,
    tuned_step_loop,
)

# --- the table ------------------------------------------------------------------------------------------------------


def make_case(
    shape: Shape,
    note: str = "",
    forward: float | None = None,
    training: float | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    check_steps: int | None = None,
    causes: Mapping[str, str] | None = None,
) -> Case:
    """A row of the table.

    Args:
        note: what the shape does not say, for the name.
        forward, training: goals for the ratio of times, against torch.nn's module or the plain step loop.
        check_steps: T of the gradient check where the whole length would take too long.
        causes: mode -> why its goal is missed.
    """
    if shape.inputs is None:
        peer, title = LOOP, shape.op
        builders = {
            LOOP: partial(build_operator, shape, step_loop, shape.dtype),
            TUNED_LOOP: partial(build_operator, shape, tuned_step_loop, shape.dtype),
            OURS: partial(build_operator, shape, call_ours, shape.dtype),
            REFERENCE: partial(build_operator, shape, call_reference, torch.float64),
        }
    else:
        peer = title = f"nn.{MODULES[shape.op]}"
        builders = {
            peer: partial(build_module, shape, False),
            OURS: partial(build_module, shape, True),
            REFERENCE: partial(build_module_reference, shape),
        }
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    goals = {FORWARD: forward, TRAINING: training}
    return Case(
        op=shape.op,
        name=" ".join(part for part in (title, precision, sizes, note) if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: count_flops(shape, mode) for mode in modes},
        bytes={mode: count_bytes(shape, mode) for mode in modes},
        modes=modes,
        goals={(peer, mode): goal for mode, goal in goals.items() if goal is not None},
        causes={(peer, mode): cause for mode, cause in (causes or {}).items()},
        check_steps=check_steps,
    )


def module(op: str, batch: int, time: int, units: int, dtype: torch.dtype = torch.float32, **options: object) -> Shape:
    """A module whose input is as wide as its state."""
    return Shape(op, batch, time, units, inputs=units, dtype=dtype, **options)


BFLOAT16 = (
    "Where the processor multiplies bfloat16 itself (AVX512-BF16), torch does so as well as seqops, and both are near "
    "its rate. Without those instructions torch takes 4 to 9 times its float32 time: the goal was set against that."
)
DENSE = (
    "With AVX-512 torch's oneDNN runs the whole layer near this machine's matrix product rate at larger widths, so "
    "little is left to gain; the goal was set on a processor with AVX2. Of our step, the gradients of both weights "
    "still go through torch's BLAS product."
)
ONE_ROW = "With one row both sides stream the weights from the cache once a step."
DENSE_CAUSES = {FORWARD: DENSE, TRAINING: DENSE}
LOOP_CAUSES = {
    mode: "Activations take as long as the product at 64 units a head, and the goal's loop was slower than this one."
    for mode in (FORWARD, TRAINING)
}
BFLOAT16_CAUSES = {FORWARD: BFLOAT16, TRAINING: BFLOAT16}

# Where D is 768 the float64 reference takes tens of seconds for all steps.
LARGE = 32

CPU_CASES = [
    make_case(module("lstm", 16, 256, 128), forward=1.0, training=1.3, causes=DENSE_CAUSES),
    make_case(module("lstm", 16, 256, 256), forward=1.0, training=1.5, causes=DENSE_CAUSES),
    make_case(module("lstm", 16, 256, 768), forward=1.0, training=1.1, causes=DENSE_CAUSES, check_steps=LARGE),
    make_case(module("lstm", 1, 256, 128), forward=1.2, training=1.3, modes=(FORWARD, TRAINING, INFERENCE)),
    make_case(module("lstm", 1, 256, 768), forward=1.0, training=1.2, causes={TRAINING: ONE_ROW}, check_steps=LARGE),
    make_case(module("lstm", 16, 256, 128, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES),
    make_case(module("lstm", 16, 256, 256, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES),
    make_case(
        module("lstm", 16, 256, 768, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES, check_steps=LARGE
    ),
    make_case(module("lstm", 1, 256, 128, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES),
    make_case(
        module("lstm", 1, 256, 768, torch.bfloat16), forward=4, training=4, causes=BFLOAT16_CAUSES, check_steps=LARGE
    ),
    make_case(module("gru", 1, 256, 128), forward=2.5, training=5),
    make_case(module("gru", 1, 256, 768), forward=2, training=3.5, check_steps=LARGE),
    make_case(module("gru", 16, 256, 256), forward=1.8, training=1.8),
    make_case(Shape("slstm", 16, 256, 64, H=4), forward=10, training=19, causes=LOOP_CAUSES),
    make_case(Shape("gru", 16, 256, 64, H=4), forward=8, training=9, causes=LOOP_CAUSES),
    make_case(Shape("lstm", 16, 256, 64, H=4), forward=8, training=30, causes=LOOP_CAUSES),
    make_case(module("elman", 16, 256, 256)),
    make_case(module("lstm", 4, 64, 32)),
    make_case(module("lstm", 16, 256, 128, layers=2, directions=2, ragged=True), "2 layers both ways, packed"),
    make_case(module("lstm", 1, 1, 256, carried=True), "decode", modes=(FORWARD, INFERENCE)),
    make_case(module("lstm", 1, 1, 768, carried=True), "decode", modes=(FORWARD, INFERENCE)),
]

# --- on a GPU -------------------------------------------------------------------------------------------------------

# Seconds of a forward step of a 16-bit LSTM that no kernel goes below, by estimate from latencies that others measured
# on an H100 at 1.83 GHz: one product after the other, the cell, one exchange of h. Of a range, the lower end.
STEP_FLOORS = {64: 0.16e-6, 128: 0.30e-6, 256: 0.35e-6, 768: 0.8e-6}
NO_FLASHRNN = {} if find_spec("flashrnn") else {FLASHRNN: "the package flashrnn is not installed"}
# Its GRU takes four gates, and it has no float64.
FLASHRNN_CELLS = ("lstm", "slstm", "elman")
# Where seqops has a Triton kernel for all steps.
FEW_UNITS = 128
CHECK_STEPS = 64
# FlashRNN's fused kernels hold heads of so many units in one block, as ours do.
MOST_FLASHRNN_UNITS, FLASHRNN_GOAL = 256, 3.0
SMALL_BATCH = "B16 of ours"


def on_gpu(
    shape: Shape,
    note: str = "",
    milliseconds: Mapping[str, float] | None = None,
    ratio: float | None = None,
    modes: tuple[str, ...] = (FORWARD, TRAINING),
    beside: Mapping[str, Case] | None = None,
    goals: Mapping[tuple[str, str], float] | None = None,
    priority: int = 1,
) -> Case:
    """A row of the table for GPUs.

    Args:
        milliseconds: mode -> the time to stay within.
        ratio: to reach in every mode against torch.nn's module.
        beside, goals, priority: see `harness.Case`.
    """
    goals = dict(goals or {})
    absent: Mapping[str, str] = {}
    if shape.inputs is None:
        title, backends = shape.op, ("cuda", "triton") if shape.D <= FEW_UNITS else ("cuda",)
        build = partial(partial, build_operator, shape)
        builders = {RULER: build(step_loop, shape.dtype)}
        if shape.op == "slstm":
            builders[LOOP] = build(step_loop, shape.dtype)
        if not beside:
            builders[ALTERNATING] = build(call_ours, shape.dtype, within=partial(alternating, shape.op))
            if shape.op in FLASHRNN_CELLS and shape.T > 1:
                absent = NO_FLASHRNN
                if not absent:
                    builders[FLASHRNN] = build(call_flashrnn, shape.dtype)
                    if shape.D <= MOST_FLASHRNN_UNITS:
                        goals |= {(FLASHRNN, mode): FLASHRNN_GOAL for mode in modes}
        builders |= {OURS: build(call_ours, shape.dtype), REFERENCE: build(call_reference, torch.float64)}
    else:
        title, backends = f"nn.{MODULES[shape.op]}", ("cuda",)
        builders = {title: partial(build_module, shape, False)}
        if shape.dtype == torch.bfloat16:
            builders[f"{title}, float16"] = partial(build_module, shape, False, dtype=torch.float16)
        if shape.dtype == torch.float32:
            builders[f"{title}, TF32"] = partial(build_module, shape, False, allow_tf32=True)
        builders |= {
            # The modules of cuDNN do not say what they round, so their error is no bound of ours.
            RULER: partial(build_module_ruler, shape),
            OURS: partial(build_module, shape, True),
            REFERENCE: partial(build_module_reference, shape),
        }
        goals |= {(title, mode): ratio for mode in modes} if ratio else {}
    precision = "" if shape.dtype == torch.float32 else str(shape.dtype).removeprefix("torch.")
    sizes = " ".join(f"{letter}{size}" for letter, size in shape.letters.items())
    is_narrow_lstm = shape.op == "lstm" and shape.dtype.itemsize == 2 and shape.inputs is None
    return Case(
        op=shape.op,
        name=" ".join(part for part in (title, precision, sizes, note, "GPU") if part),
        shape=shape.letters,
        dtype=shape.dtype,
        steps=shape.T,
        builders=builders,
        flops={mode: count_flops(shape, mode) for mode in modes},
        bytes={mode: count_bytes(shape, mode) for mode in modes},
        modes=modes,
        goals=goals,
        check_steps=CHECK_STEPS if TRAINING in modes else None,
        devices=("cuda",),
        absent=absent,
        time_goals={mode: goal / 1e3 for mode, goal in (milliseconds or {}).items()},
        beside=beside or {},
        goal_backends=("cuda",),
        is_stepwise=True,
        step_floor=STEP_FLOORS.get(shape.D) if is_narrow_lstm else None,
        backends=backends,
        priority=priority,
    )


def several(
    op: str, heads: int, units: int, batch: int = 16, dtype: torch.dtype = torch.bfloat16, time: int = 1024
) -> Shape:
    """An operator, without input projection."""
    return Shape(op, batch, time, units, H=heads, dtype=dtype)


def layer(
    op: str, units: int, batch: int = 16, dtype: torch.dtype = torch.bfloat16, time: int = 1024, carried: bool = False
) -> Shape:
    """A module, with it."""
    return Shape(op, batch, time, units, inputs=units, dtype=dtype, carried=carried)


def large_batch(heads: int, units: int) -> Case:
    """Four times the rows take 1.3 times as long at most."""
    small = on_gpu(several("lstm", heads, units))
    goals = {(SMALL_BATCH, mode): 1 / 1.3 for mode in small.modes}
    return on_gpu(several("lstm", heads, units, batch=64), beside={SMALL_BATCH: small}, goals=goals)


FIRST, LATER = 0, 2  # priorities

GPU_CASES = [
    on_gpu(several("lstm", 12, 64), milliseconds={FORWARD: 0.8, TRAINING: 2.5}, priority=FIRST),
    on_gpu(several("lstm", 6, 128), milliseconds={FORWARD: 1.0, TRAINING: 3.0}, priority=FIRST),
    on_gpu(several("lstm", 3, 256), milliseconds={FORWARD: 1.3, TRAINING: 3.8}, priority=FIRST),
    on_gpu(layer("lstm", 768), milliseconds={FORWARD: 1.7, TRAINING: 4.8}, ratio=2.5, priority=FIRST),
    on_gpu(several("lstm", 1, 768), priority=FIRST),
    on_gpu(layer("gru", 512), ratio=3, priority=FIRST),
    on_gpu(layer("gru", 256), ratio=3),
    on_gpu(layer("lstm", 256), ratio=2.5),
    on_gpu(layer("lstm", 512), ratio=2.5),
    *(large_batch(*sizes) for sizes in ((12, 64), (6, 128), (3, 256), (1, 768))),
    *(on_gpu(several(op, 4, 64)) for op in ("slstm", "gru", "elman")),
    *(on_gpu(several(op, 1, 512)) for op in ("slstm", "gru", "elman")),
    on_gpu(several("lstm", 12, 64, dtype=torch.float32), priority=LATER),
    on_gpu(several("slstm", 4, 64, dtype=torch.float32), priority=LATER),
    on_gpu(layer("lstm", 256, dtype=torch.float32), priority=LATER),
    on_gpu(layer("gru", 256, dtype=torch.float32), priority=LATER),
    on_gpu(layer("elman", 512), priority=LATER),
    on_gpu(several("lstm", 12, 64, time=1), "decode", modes=(INFERENCE,), priority=LATER),
    *(
        on_gpu(layer("lstm", 768, batch, time=1, carried=True), "decode", modes=(INFERENCE,), priority=LATER)
        for batch in (1, 16)
    ),
    on_gpu(layer("gru", 512, 1, time=1, carried=True), "decode", modes=(INFERENCE,), priority=LATER),
]

CASES = [*CPU_CASES, *GPU_CASES]
