"""Handwritten digits, read pixel by pixel: four networks, and how sure they are after each pixel.

The 1797 digits of scikit-learn, 8 by 8 pixels, as sequences of 64 numbers. Networks are causal, so a network names the
digit after every pixel; the answer after the last one counts.

Run:  python docs/examples/digits.py
"""

from __future__ import annotations

from collections.abc import Callable

import common
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import seqops.nn

WIDTH = 64
BLOCKS = 2
BATCH = 64
TESTED = 397  # of the 1797 digits
PIXELS = 64
STEPS = 900
EARLY = 0.2  # weight of the answers after all pixels beside that after the last one

MIXERS: dict[str, Callable[[], torch.nn.Module]] = {
    "LSTM": lambda: seqops.nn.LSTM(WIDTH, WIDTH, batch_first=True),
    "MinGRU": lambda: seqops.nn.MinGRU(WIDTH),
    "S4D": lambda: seqops.nn.S4D(WIDTH, state_size=32),
    "Aaren": lambda: seqops.nn.Aaren(WIDTH, num_heads=4),
}


class Reader(torch.nn.Module):
    """Pixels [B, 64] -> logits [B, 64, 10] of the digit, after each pixel, from the mean of all outputs so far."""

    def __init__(self, mixer: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.pixel = torch.nn.Linear(1, WIDTH)
        self.place = torch.nn.Embedding(PIXELS, WIDTH)  # which pixel this is: Aaren alone could not know
        self.stack = common.Stack(WIDTH, [mixer() for _ in range(BLOCKS)])
        self.digit = torch.nn.Linear(WIDTH, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        y = self.stack(self.pixel(pixels[..., None]) + self.place.weight)
        return self.digit(y.cumsum(1) / torch.arange(1, PIXELS + 1)[:, None])


def solve(mixer: Callable[[], torch.nn.Module], steps: int) -> common.Results:
    """Trains a network; its share of right answers on digits it has not seen, after each pixel."""
    images, digits = (torch.from_numpy(values) for values in load_digits(return_X_y=True))
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(len(digits), generator=random)
    images, digits = images[order].float() / 16, digits[order]
    torch.manual_seed(0)
    network = Reader(mixer)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(TESTED, len(digits), (BATCH,), generator=random)
        logits, digit = network(images[chosen]), digits[chosen, None].expand(-1, PIXELS)
        early = functional.cross_entropy(logits.flatten(0, 1), digit.flatten())
        return functional.cross_entropy(logits[:, -1], digit[:, -1]) + EARLY * early

    training = common.train(network, loss, steps)
    with torch.inference_mode():
        right = network(images[:TESTED]).argmax(-1) == digits[:TESTED, None]  # [TESTED, T]
    return training | {"accuracy": right[:, -1].double().mean().item(), "curve": right.double().mean(0).tolist()}


def run(scale: float) -> common.Results:
    steps = common.scaled(STEPS, scale)
    settings = {"width": WIDTH, "blocks": BLOCKS, "batch": BATCH, "tested": TESTED, "early": EARLY}
    return {"settings": settings, "networks": {name: solve(mixer, steps) for name, mixer in MIXERS.items()}}


def table(results: common.Results) -> str:
    rows = []
    for name, solved in results["networks"].items():
        curve = solved["curve"]
        early = [f"{100 * curve[pixels - 1]:.1f}" for pixels in (16, 32, 48)]
        rows.append([name, f"{100 * solved['accuracy']:.1f}", *early, solved["parameters"]])
    header = ["network", "right, %", "after 16 pixels", "after 32", "after 48", "parameters"]
    return common.markdown(header, rows) + "\n\n" + common.footer(results)


def draw(results: common.Results) -> Figure:
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for name, solved in results["networks"].items():
        axis.plot(range(1, PIXELS + 1), [100 * right for right in solved["curve"]], label=name)
    axis.set(xlabel="pixels read", ylabel="right answers on unseen digits, %", xlim=(1, PIXELS), ylim=(0, 102))
    axis.set_xticks(range(8, PIXELS + 1, 8))
    axis.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    common.main(__file__, run, table, draw)
