"""Cases of the modules of seqops.nn: `python -m bench --suite modules`.

Batch 4, width 128. A forward pass and a training step at several lengths, and one step of a sequence, as when text is
written: after 1024 earlier ones, under inference mode. Each is timed beside a layer of causal attention of the same
width in the same rounds: a projection to q, k and v in 4 heads, `torch.nn.functional.scaled_dot_product_attention`,
and an output projection; its step reads keys and values that were kept, in memory made beforehand. It computes
something else, so a ratio says what choosing the one layer or the other costs, and nothing about quality. Modules that
do not map x [B, T, 128] to y of the same shape are timed alone.

Values are compared with the module itself in float64 over 64 steps, which would show a kernel that fails in float32;
that a module is what its paper says is held by tests/test_modules.py.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bench import harness, tables
from bench.harness import FORWARD, INFERENCE, OURS, REFERENCE, TRAINING, Case, Contender
from bench.record import Record

BATCH, WIDTH, HEADS = 4, 128, 4
LENGTHS = (256, 1024, 4096)
SHORT = (256, 1024)
PAST = 1024  # steps before the one that is timed
CHECK_STEPS = 64
TOLERANCE = 5e-4
ATTENTION = "causal attention"

# What in seqops.nn.__all__ is a class and no module of its own.
NO_MODULES = ("Streaming",)


def draw_sequence(length: int) -> tuple[Tensor, ...]:
    return (torch.randn(BATCH, length, WIDTH),)


def draw_grid(length: int) -> tuple[Tensor, ...]:
    """x [B, X, Y, D], a square of about as many nodes."""
    side = math.isqrt(length)
    return (torch.randn(BATCH, side, side, WIDTH),)


def draw_video(length: int) -> tuple[Tensor, ...]:
    """x [B, T, 16, 16, 32]."""
    return (torch.randn(BATCH, length, 16, 16, 32),)


def draw_series(length: int) -> tuple[Tensor, ...]:
    """x [B, T, C] of seven channels."""
    return (torch.randn(BATCH, length, 7),)


def draw_words(length: int) -> tuple[Tensor, ...]:
    """Tokens, their kinds and items [B, T]."""
    token, kind = torch.randint(1, 1000, (BATCH, length)), torch.randint(0, 4, (BATCH, length))
    return token, kind, torch.arange(length).expand(BATCH, -1) // 24 % 50


def draw_tour(length: int) -> tuple[Tensor, ...]:
    """Points [B, T, 2] and the order that is learnt [B, T]."""
    return torch.rand(BATCH, length, 2), torch.stack([torch.randperm(length) for _ in range(BATCH)])


@dataclass(frozen=True)
class Entry:
    """How a module is made and fed.

    Attributes:
        arguments, options: of its constructor.
        lengths: at which it is measured.
        draw: length -> its inputs; what is not a sequence [B, T, 128] has no attention beside it.
        steps: whether it is measured step by step, where it keeps a state.
        keywords: further arguments of the forward.
    """

    arguments: tuple[Any, ...] = (WIDTH,)
    options: Mapping[str, Any] = field(default_factory=dict)
    lengths: Sequence[int] = LENGTHS
    draw: Callable[[int], tuple[Any, ...]] = draw_sequence
    steps: bool = True
    keywords: Mapping[str, Any] = field(default_factory=dict)


RECURRENT = Entry((WIDTH, WIDTH), {"batch_first": True})
OF_HEADS = Entry((WIDTH, HEADS))

# Module -> how it is measured. Every module of seqops.nn is here: a test holds that.
MODULES: dict[str, Entry] = {
    "LSTM": RECURRENT,
    "GRU": RECURRENT,
    "RNN": RECURRENT,
    "SLSTM": Entry((WIDTH, WIDTH), {"batch_first": True, "num_heads": HEADS}),
    # scans
    "Aaren": OF_HEADS,
    "LRU": Entry(),
    "RGLRU": OF_HEADS,
    "GriffinBlock": Entry(),
    "MinGRU": Entry(),
    "MinLSTM": Entry(),
    "HGRN": Entry(),
    "Birdie": Entry(),
    "PLSTM1d": OF_HEADS,
    "PLSTM2d": Entry((WIDTH, HEADS), lengths=SHORT, draw=draw_grid),
    # state spaces
    "S4D": Entry(),
    "S4": Entry(),
    "S5": Entry(),
    "LSSL": Entry(),
    "LMU": Entry((WIDTH, WIDTH, WIDTH)),
    "LMUFormer": Entry((WIDTH, WIDTH, WIDTH)),
    "ConvS5": Entry((32, 64), lengths=(8, 16, 32), draw=draw_video),
    "MegaEMA": Entry(),
    "MegaAttention": Entry((WIDTH, 256)),
    "TCNCA": Entry((WIDTH, 256)),
    # linear attention
    "Mamba2": Entry(),
    "GLA": OF_HEADS,
    "RetNet": OF_HEADS,
    "LightNet": Entry(),
    "LightNetGrid": Entry(lengths=SHORT, draw=draw_grid),
    "PrefixLinearAttention": Entry((WIDTH, HEADS), keywords={"prefix": 32}),
    # attention over patterns
    "Combiner": Entry((WIDTH, HEADS, 64)),
    "RoutingAttention": Entry((WIDTH, HEADS, HEADS // 2, 256, 16, 256)),
    "Longformer": Entry((WIDTH, HEADS, 64), keywords={"global_index": torch.tensor([0])}),
    "Recformer": Entry((1000, WIDTH, HEADS, 2, 32, 4096, 51, 4, 0.0), lengths=SHORT, draw=draw_words),
    "ProbSparseAttention": OF_HEADS,
    "Informer": Entry((7, 24, WIDTH, HEADS), {"dropout": 0.0}, draw=draw_series),
    "BlockDiffusionAttention": Entry((WIDTH, HEADS, 32)),
    "DeltaAttention": Entry((WIDTH, HEADS), lengths=SHORT),
    "PointerNetwork": Entry((2, WIDTH), lengths=(32, 128), draw=draw_tour),
    # networks as states
    "NeuralMemory": OF_HEADS,
    "LaCT": Entry((WIDTH, HEADS, 256)),
    "TTTLinear": Entry((WIDTH, HEADS), lengths=SHORT),
    "TTTMLP": Entry((WIDTH, HEADS), lengths=SHORT),
    "TitansMAC": Entry((WIDTH, HEADS, 64), lengths=SHORT),
    "TitansMAG": Entry((WIDTH, HEADS, 64), lengths=SHORT),
    "TitansMAL": Entry((WIDTH, HEADS, 64), lengths=SHORT),
    "OmegaNet": Entry((WIDTH, HEADS), lengths=SHORT),
    "Atlas": Entry((WIDTH, HEADS), lengths=SHORT),
}


def exported() -> list[str]:
    """The modules of seqops.nn, in the order of its `__all__`."""
    from seqops import nn

    names = [name for name in nn.__all__ if name not in NO_MODULES]
    return [name for name in names if inspect.isclass(getattr(nn, name))]


def missing() -> list[str]:
    """The modules without an entry."""
    return [name for name in exported() if name not in MODULES]


def make_module(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The same initial values at every call."""
    from seqops import nn

    entry = MODULES[name]
    torch.manual_seed(0)
    return getattr(nn, name)(*entry.arguments, **entry.options).to(dtype)


def draw(name: str, length: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    torch.manual_seed(1)
    inputs = MODULES[name].draw(length)
    return tuple(x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def first(result: Any) -> Tensor:
    """y of what a module returns: y alone, or y and more."""
    return result[0] if isinstance(result, tuple) else result


def learns(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def build(name: str, dtype: torch.dtype, steps: int) -> Contender:
    module, inputs = make_module(name, dtype), draw(name, steps, dtype)
    leaves = learns(module)
    for i, x in enumerate(inputs):
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[f"input {i}"] = x.requires_grad_()
    return Contender(lambda: {"y": first(module(*inputs, **MODULES[name].keywords))}, leaves)


def after_past(module: torch.nn.Module, name: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """An input of one step [B, D], and the state after `PAST` steps, or as many as the module is measured at."""
    (x,) = draw(name, past_of(name) + 1, dtype)
    with torch.no_grad():
        _, state = module(x[:, :-1], **MODULES[name].keywords)
    return x[:, -1].clone(), state


def past_of(name: str) -> int:
    return min(PAST, max(MODULES[name].lengths))


def build_step(name: str, dtype: torch.dtype, steps: int) -> Contender:
    module = make_module(name, dtype).eval()
    x, state = after_past(module, name, dtype)
    if hasattr(module, "step"):
        return Contender(lambda: {"y": module.step(x, state)[0]}, {})
    return Contender(lambda: {"y": module(x[:, None], state)[0][:, 0]}, {})


class CausalAttention(torch.nn.Module):
    """What is commonly put where these modules go."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.out = torch.nn.Linear(WIDTH, WIDTH)

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        return self.out(scaled_dot_product_attention(*self.heads(x), is_causal=True).transpose(1, 2).flatten(2))

    def step(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, D]; keys and values [B, H, T, D / H], the last place of which is for this step."""
        q, keys[:, :, -1:], values[:, :, -1:] = self.heads(x[:, None])
        return self.out(scaled_dot_product_attention(q, keys, values).transpose(1, 2).flatten(2))[:, 0]


def build_attention(mode: str, steps: int) -> Contender:
    torch.manual_seed(0)
    layer, x = CausalAttention(), torch.randn(BATCH, steps, WIDTH, requires_grad=True)
    leaves, gradient = [*layer.parameters(), x], torch.randn(BATCH, steps, WIDTH)

    def run() -> dict[str, Tensor]:
        if mode == TRAINING:
            with torch.enable_grad():
                torch.autograd.grad(layer(x), leaves, gradient)
        else:
            layer(x)
        return {}

    return Contender(run, {})


def build_attention_step(past: int, steps: int) -> Contender:
    torch.manual_seed(0)
    layer, x = CausalAttention(), torch.randn(BATCH, WIDTH)
    keys, values = torch.randn(2, BATCH, HEADS, past + 1, WIDTH // HEADS)

    def run() -> dict[str, Tensor]:
        with torch.inference_mode():
            layer.step(x, keys, values)
        return {}

    return Contender(run, {})


def tensors(state: Any) -> Iterable[Tensor]:
    if isinstance(state, Tensor):
        yield state
    elif state is not None:
        for part in state:
            yield from tensors(part)


def count_parameters(name: str) -> dict[str, dict[str, int]]:
    attention = sum(parameter.numel() for parameter in CausalAttention().parameters())
    found = {OURS: sum(parameter.numel() for parameter in make_module(name).parameters())}
    return {"parameters": found | ({ATTENTION: attention} if is_sequence(name) else {})}


def weigh_state(name: str) -> dict[str, dict[str, int]]:
    """Bytes of a state after the past; of attention the keys and values of as many steps."""
    _, state = after_past(make_module(name).eval(), name, torch.float32)
    found = {OURS: sum(part.numel() * part.itemsize for part in tensors(state))}
    return {"state": found | ({ATTENTION: 2 * BATCH * past_of(name) * WIDTH * 4} if is_sequence(name) else {})}


def is_sequence(name: str) -> bool:
    return MODULES[name].draw is draw_sequence


def is_recurrent(name: str) -> bool:
    """Whether it gives back a state, and says so by its base class or by being one of torch.nn's kinds."""
    from seqops import nn

    return issubclass(getattr(nn, name), nn.Streaming) or name in ("LSTM", "GRU", "RNN", "SLSTM")


def make_cases(name: str) -> list[Case]:
    entry = MODULES[name]
    size = f"D{WIDTH}" if is_sequence(name) else " ".join(f"{value}" for value in entry.arguments)
    shared = {
        "op": name,
        "dtype": torch.float32,
        "flops": {},
        "bytes": {},
        "tolerance": TOLERANCE,
        "check_whole": False,
    }
    made = []
    for length in entry.lengths:
        beside = {(ATTENTION, mode): partial(build_attention, mode) for mode in (FORWARD, TRAINING)}
        made.append(
            Case(
                name=f"{name} B{BATCH} T{length} {size}",
                shape={"B": BATCH, "T": length, "D": WIDTH},
                steps=length,
                builders={
                    OURS: partial(build, name, torch.float32),
                    REFERENCE: partial(build, name, torch.float64),
                },
                yardsticks=beside if is_sequence(name) else {},
                check_steps=CHECK_STEPS,
                length=length,
                facts=partial(count_parameters, name),
                **shared,
            )
        )
    if entry.steps and is_recurrent(name):
        past = past_of(name)
        made.append(
            Case(
                name=f"{name} B{BATCH} T1 {size} one step after {past}",
                shape={"B": BATCH, "T": 1, "D": WIDTH},
                steps=1,
                builders={
                    OURS: partial(build_step, name, torch.float32),
                    REFERENCE: partial(build_step, name, torch.float64),
                },
                yardsticks={(ATTENTION, INFERENCE): partial(build_attention_step, past)} if is_sequence(name) else {},
                modes=(INFERENCE,),
                facts=partial(weigh_state, name),
                **shared,
            )
        )
    return made


def load_cases() -> list[Case]:
    return [case for name in exported() if name in MODULES for case in make_cases(name)]


# ---- what a run found, in a row a module


@dataclass
class Summary:
    """One module of a run.

    Attributes:
        seconds, ratios: (mode, length) -> ours, and attention's time over it; the length of a step is 1.
        state: contender -> bytes.
        parameters: contender -> how many.
    """

    name: str
    record: Record
    seconds: dict[tuple[str, int], float] = field(default_factory=dict)
    ratios: dict[tuple[str, int], float] = field(default_factory=dict)
    state: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)


def summaries(records: Iterable[Record]) -> list[Summary]:
    """Of modules that several runs measured, that of the last one."""
    found: dict[str, Summary] = {}
    for record in records:
        fresh: dict[str, Summary] = {}
        for result in record.results:
            if result.error or OURS not in result.seconds:
                continue
            row = fresh.setdefault(result.op, Summary(result.op, record))
            key = result.mode, result.length or 1
            row.seconds[key] = result.seconds[OURS]["median"]
            if ATTENTION in result.ratios:
                row.ratios[key] = result.ratios[ATTENTION]["median"]
            row.state |= result.state
            row.parameters |= result.parameters
        found |= fresh
    return list(found.values())


Cells = list[tuple[str, float | None]]
STEP = (INFERENCE, 1)


def format_state(size: float) -> str:
    return f"{size / 1024:.3g} kB" if size < 1 << 20 else f"{size / (1 << 20):.3g} MB"


def time_cell(row: Summary, key: tuple[str, int]) -> list[tuple[str, float | None]]:
    """Time, and ratio to attention."""
    spent, ratio = row.seconds.get(key), row.ratios.get(key)
    return [
        ("", None) if spent is None else (tables.format_seconds(spent), spent),
        ("", None) if ratio is None else (tables.format_ratio(ratio), ratio),
    ]


def table(found: Sequence[Summary]) -> tuple[list[str], list[tuple[str, Cells]]]:
    """Head and rows; a cell is its text and the number that it is sorted by."""
    head = ["module"]
    keys = [(mode, length) for mode in (FORWARD, TRAINING) for length in LENGTHS]
    for mode, length in keys:
        head += [f"{'forward' if mode == FORWARD else 'training'}, T = {length}", "ratio"]
    head += ["one step", "ratio", "state", "parameters"]
    rows = []
    for row in found:
        cells: Cells = [(row.name, None)]
        for key in (*keys, STEP):
            cells += time_cell(row, key)
        state = row.state.get(OURS)
        cells.append(("", None) if state is None else (format_state(state), state))
        count = row.parameters.get(OURS)
        cells.append(("", None) if count is None else (f"{count:,}", count))
        rows.append((row.name, cells))
    return head, rows


def explain(found: Sequence[Summary]) -> str:
    """What the numbers are, and of which machine."""
    state = next((row.state[ATTENTION] for row in found if ATTENTION in row.state), None)
    count = next((row.parameters[ATTENTION] for row in found if ATTENTION in row.parameters), None)
    text = (
        f"Batch {BATCH}, width {WIDTH}, float32. Ratios: the time of a layer of causal attention over the module's, in "
        f"the same rounds; above 1 the module is faster. One step: after {PAST} others, or as many as were measured."
    )
    if state is not None and count is not None:
        text += f" Attention keeps {format_state(state)} of keys and values then, and has {count:,} parameters."
    runs = dict.fromkeys(tables.describe(row.record) for row in found)
    return f"{text} {'; '.join(runs)}."


# ---- pages

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "modules.md"
PAGES = ROOT / "docs" / "nn"
END = "<!-- end numbers -->"


def begin(name: str) -> str:
    return f"<!-- numbers: {name} -->"


def markdown(lines: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def overview(found: Sequence[Summary], page: Path = PAGE) -> str:
    """The table of all modules: one line each, times with ratios in parentheses."""
    keys = [(FORWARD, 1024), (FORWARD, 4096), (TRAINING, 1024), STEP]
    head = ["module", "forward, T = 1024", "T = 4096", "training step, T = 1024", "one step", "state", "parameters"]
    lines = [head, ["---", *["---:"] * 6]]
    for row in found:
        cells = [show(row, key) for key in keys]
        state = format_state(row.state[OURS]) if OURS in row.state else ""
        count = f"{row.parameters[OURS]:,}" if OURS in row.parameters else ""
        lines.append([f"`{row.name}`", *cells, state, count])
    return f"{markdown(lines)}\n\n{explain(found)}"


def show(row: Summary, key: tuple[str, int]) -> str:
    (spent, _), (ratio, _) = time_cell(row, key)
    return f"{spent} ({ratio})" if ratio else spent


def numbers(row: Summary) -> str:
    """The block of a module's own page."""
    lengths = sorted({length for _, length in row.seconds if length > 1})
    lines = [["", *(f"T = {length}" for length in lengths)], ["---", *["---:"] * len(lengths)]]
    for mode, title in ((FORWARD, "forward"), (TRAINING, "training step")):
        lines.append([title, *(show(row, (mode, length)) for length in lengths)])
    facts = [f"{row.parameters[OURS]:,} parameters"] if OURS in row.parameters else []
    if STEP in row.seconds:
        facts.append(f"one step {show(row, STEP)}")
    if OURS in row.state:
        facts.append(f"state {format_state(row.state[OURS])}")
    if ATTENTION in row.state:
        facts.append(f"keys and values of attention {format_state(row.state[ATTENTION])}")
    sizes = f"Batch {BATCH}, width {WIDTH}" if is_known_sequence(row.name) else f"Batch {BATCH}"
    ratio = " In parentheses the time of a layer of causal attention over the module's." if row.ratios else ""
    return f"{markdown(lines)}\n\n{'; '.join(facts)}. {sizes}, float32.{ratio} {tables.describe(row.record)}."


def is_known_sequence(name: str) -> bool:
    return name in MODULES and is_sequence(name)


def update_pages(records: Iterable[Record], page: Path = PAGE, pages: Path = PAGES) -> list[Path]:
    """Writes the table into `page`, and into each file of `pages` the numbers of the modules that it has markers for.

    Raises:
        ValueError: a page whose markers are not in pairs.
    """
    found = summaries(record for record in records if record.suite == harness.MODULES)
    tables.check_markdown(page)
    changed = {}
    for path in sorted(pages.glob("*.md")):
        text = before = path.read_text()
        for row in found:
            if begin(row.name) in text:
                head, _, rest = text.partition(begin(row.name))
                _, end, tail = rest.partition(END)
                if not end or "<!-- numbers: " in rest[: rest.index(END)]:
                    raise ValueError(f"{path}: expected a line {END} after {begin(row.name)}")
                text = f"{head}{begin(row.name)}\n\n{numbers(row)}\n\n{END}{tail}"
        if text != before:
            changed[path] = text
    for path, text in changed.items():
        path.write_text(text)
    tables.insert(page, overview(found))
    return [page, *changed]
