"""Character language models that differ in what they see: everything, a window, a block, summaries, clusters.

The text is that of `make demo`. Five small Transformers, equal but for the attention, read the same pieces of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import common
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional

import seqops
from seqops.demo import Corpus

STEPS = 500
VALIDATE_EVERY = 50
BATCH, LENGTH = 8, 256
WIDTH, HEADS, LAYERS = 96, 4, 2
SEEN = 32  # characters of a window, a block, a cluster's ring
CLUSTERS = 8
RATE = 4e-3


class Attention(torch.nn.Module):
    """Heads of causal attention; `pattern` says which keys they see."""

    def __init__(self, pattern: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.pattern = pattern
        self.project = torch.nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = torch.nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        q, k, v = self.project(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        return self.out(self.pattern(q, k, v)[0].flatten(2)), None


def full() -> torch.nn.Module:
    return Attention(lambda q, k, v: seqops.window_attention(q, k, v, -1, 0))


def window() -> torch.nn.Module:
    return Attention(lambda q, k, v: seqops.window_attention(q, k, v, SEEN - 1, 0))


def chunks() -> torch.nn.Module:
    return Attention(lambda q, k, v: seqops.chunked_attention(q, k, v, SEEN, causal=True))


def combiner() -> torch.nn.Module:
    return seqops.nn.Combiner(WIDTH, HEADS, SEEN)


def routing() -> torch.nn.Module:
    return seqops.nn.RoutingAttention(WIDTH, HEADS, HEADS // 2, SEEN, CLUSTERS, SEEN, decay=0.99)


# What a query sees at most in a piece of LENGTH characters, in heads that see most.
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], int]] = {
    "full attention": (full, LENGTH),
    "last 32": (window, SEEN),
    "blocks of 32": (chunks, SEEN),
    "Combiner": (combiner, SEEN + LENGTH // SEEN - 1),
    "RoutingAttention": (routing, SEEN),
}


class Block(torch.nn.Module):
    """x + attention, x + MLP, of normalised x; what the last 3 characters were is mixed in before the attention."""

    def __init__(self, attention: torch.nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.taps = torch.nn.Parameter(torch.eye(4)[3].repeat(WIDTH, 1) + 0.1 * torch.randn(WIDTH, 4))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = seqops.causal_conv1d(self.norms[0](x), self.taps)
        x = x + self.attention(mixed)[0]
        return x + self.mlp(self.norms[1](x))


class LanguageModel(torch.nn.Module):
    def __init__(self, characters: int, attention: Callable[[], torch.nn.Module]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, WIDTH)
        self.position = torch.nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.blocks = torch.nn.Sequential(*(Block(attention()) for _ in range(LAYERS)))
        self.out = torch.nn.Sequential(torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, characters))
        torch.nn.init.normal_(self.embedding.weight, std=0.5)

    def forward(self, text: Tensor) -> Tensor:
        """Character numbers [B, T] -> logits of the next ones [B, T, characters]."""
        return self.out(self.blocks(self.embedding(text) + self.position[: text.shape[1]]))

    def loss(self, pieces: Tensor) -> Tensor:
        """Mean nats a character of pieces [B, T + 1], of all but the first."""
        return functional.cross_entropy(self(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())


@torch.inference_mode()
def bits(model: LanguageModel, text: Tensor, rows: int) -> float:
    """Bits a character on the first `rows` pieces of a text that no training step has seen."""
    model.eval()
    pieces = text.unfold(0, LENGTH + 1, LENGTH)[:rows]
    mean = sum(model.loss(part).item() * len(part) for part in pieces.split(16)) / len(pieces)
    model.train()
    return mean / math.log(2)


def train(name: str, corpus: Corpus, steps: int) -> common.Results:
    torch.manual_seed(0)
    model = LanguageModel(len(corpus.alphabet), MODELS[name][0])
    generator, offsets = torch.Generator().manual_seed(1), torch.arange(LENGTH + 1)
    routed = [module for module in model.modules() if isinstance(module, seqops.nn.RoutingAttention)]
    curve: list[list[float]] = []

    def loss(step: int) -> Tensor:
        if step:  # the optimizer's step is done: now the centroids
            for module in routed:
                module.update_centroids()
        if step % VALIDATE_EVERY == 0:
            curve.append([step, bits(model, corpus.validation, 24)])
        starts = torch.randint(len(corpus.training) - LENGTH, (BATCH, 1), generator=generator)
        return model.loss(corpus.training[starts + offsets])

    spent = common.train(model, loss, steps, RATE)
    curve.append([steps, bits(model, corpus.validation, 24)])
    return spent | {"bits": bits(model, corpus.validation, len(corpus.validation)), "curve": curve}


def run(scale: float) -> common.Results:
    corpus = Corpus()
    steps = common.scaled(STEPS, scale)
    return {
        "settings": {
            "steps": steps,
            "batch": BATCH,
            "length": LENGTH,
            "width": WIDTH,
            "heads": HEADS,
            "layers": LAYERS,
            "training characters": len(corpus.training),
            "validation characters": len(corpus.validation),
        },
        "models": {name: train(name, corpus, steps) for name in MODELS},
    }


def table(results: common.Results) -> str:
    header = ["attention", "keys a query sees", "parameters", "bits a character"]
    rows = [
        [name, MODELS[name][1], f"{each['parameters']:,}", f"{each['bits']:.3f}"]
        for name, each in results["models"].items()
    ]
    settings = results["settings"]
    text = (
        f"{settings['steps']} steps of {settings['batch']} pieces of {settings['length']} characters each; bits on "
        f"{settings['validation characters']:,} characters that no step has seen."
    )
    return f"{common.markdown(header, rows)}\n\n{text} {common.footer(results)}"


def draw(results: common.Results) -> Figure:
    figure, axes = pyplot.subplots(figsize=(7.5, 4.0), layout="constrained")
    for name, each in results["models"].items():
        steps, curve = zip(*each["curve"], strict=True)
        axes.plot(steps, curve, label=f"{name}: {each['bits']:.3f}")
    lowest = min(each["bits"] for each in results["models"].values())
    axes.set(xlabel="training step", ylabel="bits a character, unseen text", ylim=(lowest - 0.15, lowest + 2.2))
    axes.legend(title="after training, on all of it")
    return figure


if __name__ == "__main__":
    common.main(__file__, run, table, draw)
