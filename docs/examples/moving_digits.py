"""Video prediction: a handwritten digit that moves and bounces, continued for ten frames by two recurrent networks.

Frames of 16 by 16 pixels with a digit of scikit-learn, 8 by 8 pixels. Networks learn to predict the next frame; to
continue a film they read their own predictions.

Run:  python docs/examples/moving_digits.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import common
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional

import seqops.nn

SIDE = 16
CONTEXT = 10
AHEAD = 10
BATCH = 8
FRAMES = 14  # of a training film
STEPS = 1200
TESTED = 128  # films
HELD = 397  # digits that are in no training film
SHOWN = (1, 2, 4, 6, 8, 10)
OWN = 0.5  # part of the frames that a network reads as it predicted them itself, late in training


class ConvLSTM(seqops.nn.Streaming):
    """An LSTM whose maps are convolutions, frame after frame: x [B, T, Y, X, U] -> h, and the state (h, c)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gates = torch.nn.Conv2d(2 * dim, 4 * dim, 3, padding=1)
        with torch.no_grad():
            self.gates.bias[dim : 2 * dim].fill_(1.0)  # of the forget gate

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = x.permute(0, 1, 4, 2, 3)
        h, c = (torch.zeros_like(x[:, 0]),) * 2 if state is None else state
        frames = []
        for frame in x.unbind(1):
            i, f, g, o = self.gates(torch.cat([frame, h], 1)).chunk(4, 1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            frames.append(h)
        return torch.stack(frames, 1).permute(0, 1, 3, 4, 2), (h, c)


class Film(torch.nn.Module):
    """Frames [B, T, 16, 16] -> logits of the frames that follow each, and the layers' states.

    A layer works on patches of 2 by 2 pixels, 8 by 8 of them.
    """

    def __init__(self, layers: list[seqops.nn.Streaming], dim: int) -> None:
        super().__init__()
        self.enter = torch.nn.Conv2d(4, dim, 3, padding=1)
        self.layers = torch.nn.ModuleList(layers)
        self.leave = torch.nn.Conv2d(dim, 4, 3, padding=1)

    def forward(self, frames: Tensor, states: tuple[Any, ...] | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        rows = frames.shape[:2]
        patches = functional.pixel_unshuffle(frames.flatten(0, 1)[:, None], 2)
        y = self.enter(patches).permute(0, 2, 3, 1).unflatten(0, rows)
        after = []
        for i, layer in enumerate(self.layers):
            y, state = layer(y, None if states is None else states[i])
            after.append(state)
        logits = functional.pixel_shuffle(self.leave(y.flatten(0, 1).permute(0, 3, 1, 2)), 2)
        return logits[:, 0].unflatten(0, rows), tuple(after)


NETWORKS: dict[str, Callable[[], Film]] = {
    # Time steps for films of tens of frames; the default ones are for hundreds.
    "ConvS5": lambda: Film([seqops.nn.ConvS5(24, 24, norm_groups=8, step_min=0.01, step_max=1.0) for _ in "ab"], 24),
    "ConvLSTM": lambda: Film([ConvLSTM(21) for _ in "ab"], 21),
}


def films(images: Tensor, count: int, T: int, random: torch.Generator) -> Tensor:
    """[count, T, 16, 16]: a digit that moves 1 or 2 pixels a frame along each axis, reflected by the sides."""
    room = SIDE - 8
    shown = images[torch.randint(len(images), (count,), generator=random)]
    places = []
    for _ in range(2):
        start = torch.randint(room + 1, (count, 1), generator=random)
        speed = torch.randint(1, 3, (count, 1), generator=random)
        speed = speed * (2 * torch.randint(2, (count, 1), generator=random) - 1)
        turned = (start + speed * torch.arange(T)) % (2 * room)
        place = torch.minimum(turned, 2 * room - turned)
        places.append((torch.arange(SIDE)[:, None] == place[..., None, None] + torch.arange(8)).float())
    return torch.einsum("ntyi,nij,ntxj->ntyx", places[0], shown, places[1])


def continued(network: Film, context: Tensor) -> Tensor:
    """[B, AHEAD, 16, 16]: the network reads the context, then its own predictions one by one."""
    logits, states = network(context)
    frames = [torch.sigmoid(logits[:, -1:])]
    while len(frames) < AHEAD:
        logits, states = network(frames[-1], states)
        frames.append(torch.sigmoid(logits))
    return torch.cat(frames, 1)


def solve(make: Callable[[], Film], steps: int, images: Tensor, tested: Tensor) -> common.Results:
    random = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    network = make()

    def loss(step: int) -> Tensor:
        frames = films(images, BATCH, FRAMES, random)
        read = frames[:, :-1]
        if step > steps // 2:
            with torch.no_grad():
                own = torch.cat([read[:, :1], torch.sigmoid(network(read)[0][:, :-1])], 1)
            read = torch.where(torch.rand(read.shape[:2], generator=random)[..., None, None] < OWN, own, read)
        return functional.binary_cross_entropy_with_logits(network(read)[0], frames[:, 1:])

    training = common.train(network, loss, steps, weight_decay=0.0)
    with torch.inference_mode():
        predicted = continued(network, tested[:, :CONTEXT])
    return training | {
        "error": errors(predicted, tested),
        "frames": [picture(predicted[0, ahead - 1]) for ahead in SHOWN],
    }


def errors(predicted: Tensor, tested: Tensor) -> list[float]:
    """Mean squared error of each frame ahead, of brightness 0 to 1."""
    return (predicted - tested[:, CONTEXT:]).square().mean((0, 2, 3)).tolist()


def picture(frame: Tensor) -> list[list[float]]:
    return [[round(value, 2) for value in row] for row in frame.tolist()]


def run(scale: float) -> common.Results:
    images = torch.from_numpy(load_digits().images).float() / 16
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    tested = films(images[:HELD], TESTED, CONTEXT + AHEAD, torch.Generator().manual_seed(2))
    images = images[HELD:]
    steps = common.scaled(STEPS, scale)
    mean = films(images, 200, FRAMES, torch.Generator().manual_seed(3)).mean((0, 1))
    baselines = {
        "last frame": errors(tested[:, CONTEXT - 1 : CONTEXT], tested),
        "mean frame": errors(mean.expand(1, 1, -1, -1), tested),
    }
    return {
        "settings": {"context": CONTEXT, "frames": FRAMES, "batch": BATCH, "steps": steps, "films": TESTED},
        "baselines": baselines,
        "truth": [picture(tested[0, CONTEXT - 1 + ahead]) for ahead in SHOWN],
        "networks": {name: solve(make, steps, images, tested) for name, make in NETWORKS.items()},
    }


def table(results: common.Results) -> str:
    rows = []
    for name, solved in results["networks"].items():
        cost = [solved["parameters"], f"{solved['milliseconds']:.0f}", f"{solved['seconds']:.0f}"]
        rows.append([name, *cells(solved["error"]), *cost])
    rows += [[name, *cells(error), "", "", ""] for name, error in results["baselines"].items()]
    header = ["", "1 frame ahead", "2", "5", "10", "parameters", "ms a training step", "s of training"]
    return common.markdown(header, rows) + "\n\n" + common.footer(results)


def cells(error: list[float]) -> list[str]:
    return [f"{1000 * error[ahead - 1]:.1f}" for ahead in (1, 2, 5, 10)]


def draw(results: common.Results) -> Figure:
    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    films_shown = {"truth": results["truth"]} | {name: net["frames"] for name, net in results["networks"].items()}
    axes = upper.subplots(len(films_shown), len(SHOWN))
    for row, (name, frames) in zip(axes, films_shown.items(), strict=True):
        for axis, ahead, frame in zip(row, SHOWN, frames, strict=True):
            axis.imshow(frame, cmap="gray", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            if name == "truth":
                axis.set_title(f"{ahead} ahead")
        row[0].set_ylabel(name)
    axis = lower.subplots()
    curves = {name: net["error"] for name, net in results["networks"].items()} | results["baselines"]
    for name, error in curves.items():
        style = "--" if name in results["baselines"] else "-"
        axis.plot(range(1, AHEAD + 1), [1000 * each for each in error], style, label=name)
    axis.set(xlabel="frames ahead", ylabel="squared error, 1/1000", xlim=(1, AHEAD), ylim=(0, None))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    common.main(__file__, run, table, draw)
