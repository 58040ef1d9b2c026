"""Associative recall: how many pairs can a network read, and still name the value of any key?

Networks read pairs of a key and a value, and are then asked for the value of every key, in another order. They learn on
up to 32 pairs and are tested on up to 64. Everything but the mixer of time is the same in all networks.

Run:  python docs/examples/recall.py
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

DIM = 64
HEADS = 2
KEYS = 96
VALUES = 32
BATCH = 32
STEPS = 500
LEARNT = (4, 8, 16, 32)  # pairs in a training sequence
TESTED = (2, 4, 8, 16, 24, 32, 48, 64)
TESTS = 64  # sequences for each number of pairs


def draw_batch(batch: int, pairs: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, 2 P], each twice; values [B, 2 P], VALUES (nothing) in the second half; what to answer there [B, P]."""
    keys = torch.rand(batch, KEYS, generator=random).argsort(1)[:, :pairs]
    values = torch.randint(VALUES, (batch, pairs), generator=random)
    order = torch.rand(batch, pairs, generator=random).argsort(1)
    asked = torch.cat([keys, keys.gather(1, order)], 1)
    return asked, torch.cat([values, torch.full_like(values, VALUES)], 1), values.gather(1, order)


# ---- mixers of time: x [B, T, D] -> [B, T, D], alone or before a state


class Attention(torch.nn.Module):
    """Causal attention: its state is all that it has read."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(DIM, 3 * DIM)
        self.out = torch.nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.project(x).chunk(3, -1))
        T = x.shape[1]
        ranges = torch.stack([torch.zeros(T, dtype=torch.int32), torch.arange(1, T + 1, dtype=torch.int32)])
        return self.out(seqops.range_attention(q, k, v, ranges[None, None, None])[0].flatten(-2))


class LinearAttention(torch.nn.Module):
    """S_t = S_{t-1} + φ(k_t) v_tᵀ, o_t = S_tᵀ φ(q_t), divided by the sum of φ(k) φ(q), with φ = 1 + elu."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(DIM, 3 * DIM)
        self.out = torch.nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in self.project(x).chunk(3, -1))
        q, k = 1 + functional.elu(q), 1 + functional.elu(k)
        o, _ = seqops.linear_attention(q, k, v)
        total = (q * k.cumsum(1)).sum(-1, keepdim=True)
        return self.out((o / total).flatten(-2))


MIXERS: dict[str, Callable[[], torch.nn.Module]] = {
    "attention": Attention,
    "linear attention": LinearAttention,
    "GLA": lambda: seqops.nn.GLA(DIM, HEADS, key_dim=DIM),
    "LaCT": lambda: seqops.nn.LaCT(DIM, HEADS, 16, HEADS, momentum=False),
    "NeuralMemory, linear": lambda: seqops.nn.NeuralMemory(DIM, HEADS, 8, rate=4.0, momentum=False, kernel=1),
    "NeuralMemory, MLP": lambda: seqops.nn.NeuralMemory(DIM, HEADS, 8, 64, rate=4.0, momentum=False, kernel=1),
    "TitansMAG": lambda: seqops.nn.TitansMAG(DIM, HEADS, 8, 8, 0, HEADS, rate=4.0, momentum=False, kernel=1),
}


class Network(torch.nn.Module):
    """A token is a key and a value, each with its embedding; one block of mixer and MLP; scores of values."""

    def __init__(self, mixer: torch.nn.Module) -> None:
        super().__init__()
        self.keys = torch.nn.Embedding(KEYS, DIM)
        self.values = torch.nn.Embedding(VALUES + 1, DIM)
        self.blocks = common.Stack(DIM, [mixer])
        self.head = torch.nn.Linear(DIM, VALUES)

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        y = self.blocks(self.keys(keys) + self.values(values))
        return self.head(y[:, keys.shape[1] // 2 :])


def numbers(state: object) -> int:
    """How many there are in a state."""
    return state[:1].numel() if isinstance(state, Tensor) else sum(map(numbers, state))


def state_size(name: str) -> int:
    """Numbers that a sequence's state holds after 64 tokens; later attention alone holds more."""
    if name == "attention":
        return 2 * 64 * DIM
    if name == "linear attention":
        return HEADS * ((DIM // HEADS) ** 2 + DIM // HEADS)
    return numbers(MIXERS[name]()(torch.zeros(1, 64, DIM))[1])


def solve(name: str, scale: float) -> common.Results:
    """Trains one network; right answers for every number of pairs."""
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(1)
    network = Network(MIXERS[name]())

    def loss(step: int) -> Tensor:
        keys, values, answers = draw_batch(BATCH, LEARNT[step % len(LEARNT)], random)
        return functional.cross_entropy(network(keys, values).flatten(0, 1), answers.flatten())

    training = common.train(network, loss, common.scaled(STEPS, scale))
    right = []
    with torch.inference_mode():
        for pairs in TESTED:
            keys, values, answers = draw_batch(common.scaled(TESTS, scale), pairs, random)
            right.append((network(keys, values).argmax(-1) == answers).double().mean().item())
    return training | {"right": right, "state": state_size(name)}


def run(scale: float) -> common.Results:
    solved = {name: solve(name, scale) for name in MIXERS}
    settings = {"dim": DIM, "heads": HEADS, "keys": KEYS, "values": VALUES, "batch": BATCH, "learnt": LEARNT}
    return {"settings": settings, "pairs": TESTED, "guess": 1 / VALUES, "networks": solved}


def table(results: common.Results) -> str:
    rows = []
    for name, solved in results["networks"].items():
        right = [f"{100 * each:.1f}" for each in solved["right"]]
        rows.append([name, *right, solved["state"], f"{solved['milliseconds']:.0f}"])
    header = ["Right answers in %, by pairs", *map(str, results["pairs"]), "numbers in the state", "step, ms"]
    return common.markdown(header, rows) + "\n\n" + common.footer(results)


def draw(results: common.Results) -> Figure:
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axis = figure.subplots()
    for name, solved in results["networks"].items():
        axis.plot(results["pairs"], [100 * right for right in solved["right"]], marker="o", markersize=3, label=name)
    axis.axvline(max(results["settings"]["learnt"]), color=common.GREY, linewidth=1, linestyle=":")
    axis.axhline(100 * results["guess"], color=common.GREY, linewidth=1, linestyle="--")
    axis.set(xlabel="pairs", ylabel="right answers, %", ylim=(0, 104))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper")
    return figure


if __name__ == "__main__":
    common.main(__file__, run, table, draw)
