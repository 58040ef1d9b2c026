"""State tracking: which networks can follow a counter that never rests, and go on where training stopped?

Three tasks whose answer at every token depends on all tokens before it. Networks learn on sequences of 40 tokens and
are tested on 500. Everything but the mixer of time is the same in all networks.

Run:  python docs/examples/state_tracking.py
"""

from __future__ import annotations

from collections.abc import Callable

import common
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

import seqops
import seqops.nn

WIDTH = 64
BLOCKS = 2
BATCH = 32
LENGTH = 40
TESTED = 500
TESTS = 64
BIN = 20  # tokens to a point of the picture

# ---- tasks: tokens [B, T], and the answer after each of them [B, T]


def parity(batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Is the number of ones so far odd?"""
    tokens = torch.randint(2, (batch, length), generator=random)
    return tokens, tokens.cumsum(1) % 2


def sums(batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """The sum of all digits so far, modulo 5."""
    tokens = torch.randint(5, (batch, length), generator=random)
    return tokens, tokens.cumsum(1) % 5


def arithmetic(batch: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A value modulo 5 after additions (tokens 0 to 4: what is added) and products (tokens 5 to 8: times 1 to 4)."""
    tokens = torch.randint(9, (batch, length), generator=random)
    value, values = torch.zeros(batch, dtype=torch.int64), []
    for token in tokens.unbind(1):
        value = torch.where(token < 5, value + token, value * (token - 4)) % 5
        values.append(value)
    return tokens, torch.stack(values, 1)


# name: (how batches are drawn, tokens, answers, training steps)
TASKS = {
    "parity": (parity, 2, 2, 400),
    "sum modulo 5": (sums, 5, 5, 600),
    "arithmetic modulo 5": (arithmetic, 9, 5, 1200),
}


# ---- mixers of time: x [B, T, D] -> [B, T, D], alone or before a state


class RealScan(torch.nn.Module):
    """h_t = a(x_t) h_{t-1} + W x_t, with a = sigmoid, in (0, 1), or a = tanh, in (-1, 1)."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate = gate
        self.project = torch.nn.Linear(WIDTH, 2 * WIDTH)
        self.start = torch.nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gates, inputs = self.project(x).chunk(2, -1)
        return seqops.linear_scan(inputs, self.gate(gates), self.start.expand(len(x), -1))[0]


class ComplexScan(torch.nn.Module):
    """h_t = e^(i θ(x_t)) h_{t-1} + W x_t: states turn by angles that tokens give; half as many, for the same size."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(WIDTH, WIDTH // 2 + WIDTH)
        self.start = torch.nn.Parameter(torch.randn(WIDTH // 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        angles, inputs = self.project(x).split([WIDTH // 2, WIDTH], -1)
        gates = torch.polar(torch.ones_like(angles), torch.pi * angles)
        inputs = torch.view_as_complex(inputs.unflatten(-1, (-1, 2)))
        start = torch.view_as_complex(self.start).expand(len(x), -1)
        h, _ = seqops.linear_scan(inputs, gates, start)
        return torch.view_as_real(h).flatten(-2)


class Attention(torch.nn.Module):
    """Causal attention with 4 heads; positions are left to the causal order, which is the same at every length."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)) for part in self.project(x).chunk(3, -1))
        T = x.shape[1]
        ranges = torch.stack([torch.zeros(T, dtype=torch.int32), torch.arange(1, T + 1, dtype=torch.int32)])
        return seqops.range_attention(q, k, v, ranges[None, None, None])[0].flatten(-2)


MIXERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LSTM": lambda: seqops.nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "sLSTM": lambda: seqops.nn.SLSTM(WIDTH, WIDTH, batch_first=True),
    "scan, gates in (0, 1)": lambda: RealScan(torch.sigmoid),
    "scan, gates in (-1, 1)": lambda: RealScan(torch.tanh),
    "scan, complex gates": ComplexScan,
    "attention": Attention,
}


def solve(task: str, mixer: str, scale: float) -> common.Results:
    """Trains one network on one task; accuracy at every token of sequences it has not seen."""
    draw_batch, tokens, answers, steps = TASKS[task]
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    network = torch.nn.Sequential(
        torch.nn.Embedding(tokens, WIDTH),
        common.Stack(WIDTH, [MIXERS[mixer]() for _ in range(BLOCKS)]),
        torch.nn.Linear(WIDTH, answers),
    )

    def loss(_: int) -> Tensor:
        read, answer = draw_batch(BATCH, LENGTH, random)
        return functional.cross_entropy(network(read).flatten(0, 1), answer.flatten())

    training = common.train(network, loss, common.scaled(steps, scale))
    read, answer = draw_batch(common.scaled(TESTS, scale), TESTED, random)
    with torch.inference_mode():
        right = (network(read).argmax(-1) == answer).double().mean(0)  # [T]
    return training | {
        "seen": right[:LENGTH].mean().item(),
        "far": right[-100:].mean().item(),
        "curve": right.view(-1, BIN).mean(1).tolist(),
    }


def run(scale: float) -> common.Results:
    solved = {task: {mixer: solve(task, mixer, scale) for mixer in MIXERS} for task in TASKS}
    settings = {"width": WIDTH, "blocks": BLOCKS, "batch": BATCH, "length": LENGTH, "tests": TESTS, "tested": TESTED}
    return {"settings": settings, "guess": {task: 1 / TASKS[task][2] for task in TASKS}, "tasks": solved}


def table(results: common.Results) -> str:
    tasks = results["tasks"]
    rows = []
    for mixer in next(iter(tasks.values())):
        cells = [f"{100 * tasks[task][mixer]['seen']:.1f} / {100 * tasks[task][mixer]['far']:.1f}" for task in tasks]
        rows.append([mixer, *cells])
    rows.append(["guessing", *(f"{100 * guess:.1f}" for guess in results["guess"].values())])
    length, tested = results["settings"]["length"], results["settings"]["tested"]
    title = f"Right answers in %, at tokens 1 to {length} / {tested - 99} to {tested}"
    return common.markdown([title, *tasks], rows) + "\n\n" + common.footer(results)


def draw(results: common.Results) -> Figure:
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    axes = figure.subplots(1, len(results["tasks"]), sharey=True)
    for axis, (task, mixers) in zip(axes, results["tasks"].items(), strict=True):
        for mixer, solved in mixers.items():
            places = [BIN * (i + 0.5) for i in range(len(solved["curve"]))]
            axis.plot(places, [100 * right for right in solved["curve"]], label=mixer)
        axis.axvline(results["settings"]["length"], color=common.GREY, linewidth=1, linestyle=":")
        axis.axhline(100 * results["guess"][task], color=common.GREY, linewidth=1, linestyle="--")
        axis.set(title=task, xlabel="token", ylim=(0, 104), xlim=(0, results["settings"]["tested"]))
    axes[0].set_ylabel("right answers, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


if __name__ == "__main__":
    common.main(__file__, run, table, draw)
