"""Draws the pictures of attention patterns: for each operator of PICTURES a file, which its page shows.

Run:  python docs/figures/attention.py [NAME ...]

A picture shows the weights that an operator implies: o is linear in v, so with v the identity, o is the matrix of
weights. The operator's reference computes it, from queries and keys of one generator. Rows are queries, columns are
keys; the darker a pair, the larger its share of the row's largest weight, and what a query does not see is left empty.

Colours that are legible on white and on black, no background: the picture stands on the page's own in both themes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from seqops.attention import ranges, reference

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

TEXT, LINE, COLOUR = "#7f8490", "#9aa0ab", "#3f7cc4"
T, CHANNELS = 48, 8
# Shares of a row's largest weight: what lies above the last one is drawn opaque.
LEVELS = (0.0, 0.04, 0.1, 0.2, 0.35, 0.55)
Operator = Callable[..., Any]
Part = tuple[Tensor, Tensor]


def weights(operator: Operator, queries: int = T, **options: Any) -> Tensor:
    """[T, T]: the weight of each key in each query's output."""
    generator = seeded(4)

    def drawn() -> Tensor:
        values = torch.zeros(1, queries, 1, queries, dtype=torch.float64)
        values[..., :CHANNELS] = torch.randn(1, queries, 1, CHANNELS, dtype=torch.float64, generator=generator)
        return values

    q, k = drawn(), drawn()
    v = torch.eye(queries, dtype=torch.float64)[None, :, None, :]
    found = operator(q, k, v, **({"scale": 0.5 * CHANNELS**-0.5} | options))
    return (found[0] if isinstance(found, tuple) else found)[0, :, 0]


def squares(chosen: Tensor) -> Outline:
    """The outline of the chosen pairs: one rectangle for each run of a row."""
    points, codes = [], []
    for row, line in enumerate(chosen.tolist()):
        for start, end in runs(line):
            points += [(start, row), (end, row), (end, row + 1), (start, row + 1), (start, row)]
            codes += [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    return Outline(points, codes)


def runs(line: list[bool]) -> Iterator[tuple[int, int]]:
    start = None
    for place, here in enumerate([*line, False]):
        if here and start is None:
            start = place
        elif not here and start is not None:
            yield start, place
            start = None


def draw(axes: Axes, matrix: Tensor, title: str, labels: bool) -> None:
    size = matrix.shape[0]
    share = matrix / matrix.amax(1, keepdim=True).clamp(min=1e-300)
    for level, (least, most) in enumerate(zip(LEVELS, (*LEVELS[1:], 2.0), strict=True)):
        chosen = (share > least) & (share <= most)
        if chosen.any():
            alpha = 0.16 + 0.84 * level / (len(LEVELS) - 1)
            axes.add_patch(PathPatch(squares(chosen), facecolor=COLOUR, alpha=alpha, linewidth=0))
    axes.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[])
    axes.set_aspect("equal")
    axes.set_title(title, color=TEXT, fontsize=9)
    if labels:
        axes.set_ylabel("queries", color=TEXT)
        axes.set_xlabel("keys", color=TEXT)
    axes.patch.set_alpha(0)
    for spine in axes.spines.values():
        spine.set_color(LINE)


def routed(causal: bool) -> Operator:
    """Four clusters, whose centroids lie where the queries and keys have their channels."""
    centroids = torch.zeros(1, 4, T, dtype=torch.float64)
    centroids[..., :CHANNELS] = torch.randn(1, 4, CHANNELS, dtype=torch.float64, generator=seeded(8))
    return partial(reference.routing_attention, centroids=centroids, size=10, causal=causal)


def gathered() -> Operator:
    """Three lists of positions, of which the first two share some."""
    lists = [[0, 3, 6, 9, 12, 15, 18, 21], [12, 14, 16, 18, 20, 22, 24, 26], [30, 31, 36, 37, 42, 43, -1, -1]]
    index = torch.tensor(lists)[None, None]
    return partial(reference.gathered_attention, q_index=index, k_index=index, causal=True)


def prob_sparse(causal: bool) -> Operator:
    samples = torch.randint(0, T, (T, 12), generator=seeded(3))
    return partial(reference.prob_sparse_attention, sample_index=samples, top=12, causal=causal)


def pointers(mode: str, lengths: list[int] | None = None) -> Operator:
    """The probabilities themselves, as a matrix that o would be."""
    weight = torch.randn(CHANNELS, dtype=torch.float64, generator=seeded(6))

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        query, key = (x[:, :, 0, :CHANNELS] for x in (q, k))
        given = None if lengths is None else torch.tensor(lengths)
        log_p = reference.pointer_scores(query, key, weight if mode == "additive" else None, mode=mode, lengths=given)
        return log_p.exp().unsqueeze(2)

    return attend


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def of_ranges(make: Callable[[Tensor], Sequence[Part]]) -> Operator:
    """range_attention with the parts (first, end) that `make` gives for the queries."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        return reference.range_attention(q, k, v, ranges.stack(make(torch.arange(q.shape[1]))), scale=scale)

    return attend


def window(i: Tensor) -> Part:
    return (i - 8).clamp(min=0), i + 1


def window_without_sinks(i: Tensor) -> Part:
    return (i - 8).clamp(min=4).minimum(i + 1), i + 1


def sinks(i: Tensor) -> Part:
    return 0 * i, (i + 1).clamp(max=4)


def merged(*sets: Sequence[Callable[[Tensor], Part]]) -> Operator:
    """The attention over two sets of keys, from that over each."""
    first, second = (of_ranges(lambda i, makers=makers: [make(i) for make in makers]) for makers in sets)

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Any:
        return reference.merge_attention(*first(q, k, v, scale), *second(q, k, v, scale))

    return attend


# File -> what stands in it: a title, and an operator of q, k, v and scale.
PICTURES: dict[str, list[tuple[str, Operator]]] = {
    "chunked-attention": [
        ("chunk_size=12", partial(reference.chunked_attention, chunk_size=12)),
        ("chunk_size=12, causal", partial(reference.chunked_attention, chunk_size=12, causal=True)),
        ("T = 48 is not a multiple of 18", partial(reference.chunked_attention, chunk_size=18, causal=True)),
    ],
    "range-attention": [
        ("one part: i - 8 to i", of_ranges(lambda i: [window(i)])),
        ("two parts: 0 to 3 as well", of_ranges(lambda i: [window_without_sinks(i), sinks(i)])),
        ("up to the end of a block of 8", of_ranges(lambda i: [(0 * i, i - i % 8 + 8)])),
    ],
    "window-attention": [
        ("left=8, right=8", partial(reference.window_attention, left=8, right=8)),
        ("left=8, right=0", partial(reference.window_attention, left=8, right=0)),
        (
            "left=6, right=6, global 0 and 24",
            partial(reference.window_attention, left=6, right=6, global_index=torch.tensor([0, 24])),
        ),
        (
            "left=6, right=0, global 0 and 24",
            partial(reference.window_attention, left=6, right=0, global_index=torch.tensor([0, 24])),
        ),
    ],
    "block-diffusion-attention": [
        ("block_size=6, L = 24", partial(reference.block_diffusion_attention, block_size=6)),
        ("block_size=10, a shorter last one", partial(reference.block_diffusion_attention, block_size=10)),
    ],
    "combiner-attention": [
        (name, partial(reference.combiner_attention, block_size=size, pattern=name))
        for name, size in (("fixed", 8), ("logsparse", 2), ("axial", 8))
    ],
    "delta-attention": [
        (f"mode={mode!r}", partial(reference.delta_attention, threshold=threshold, window=8, sink=2, mode=mode))
        for mode, threshold in (("element", 1.0), ("row", 4.0))
    ],
    "gathered-attention": [("three lists, causal", gathered())],
    "routing-attention": [("causal", routed(True)), ("not causal", routed(False))],
    "merge-attention": [
        ("first set: the last 9 keys", of_ranges(lambda i: [window_without_sinks(i)])),
        ("second set: the first 4", of_ranges(lambda i: [sinks(i)])),
        ("merged", merged([window_without_sinks], [sinks])),
    ],
    "pointer-scores": [
        ('mode="additive"', pointers("additive")),
        ('mode="clipped_dot", lengths=[40]', pointers("clipped_dot", [40])),
    ],
    "prob-sparse-attention": [("top=12", prob_sparse(False)), ("top=12, causal", prob_sparse(True))],
}


# Which panel of a picture stands for it where it is not the first one.
OVERVIEW = {
    "merge-attention": 2,
    "chunked-attention": 1,
    "range-attention": 1,
    "window-attention": 3,
    "prob-sparse-attention": 1,
}


def save(figure: plt.Figure, name: str) -> None:
    target = Path(__file__).with_name(f"{name}.svg")
    figure.savefig(target, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


def draw_picture(name: str) -> None:
    panels = PICTURES[name]
    figure, row = plt.subplots(1, len(panels), figsize=(2.75 * len(panels), 3.0), squeeze=False)
    for place, (axes, (title, operator)) in enumerate(zip(row[0], panels, strict=True)):
        draw(axes, weights(operator), title, place == 0)
    figure.tight_layout()
    save(figure, name)


def draw_overview() -> None:
    """The first causal pattern of every operator, for the room's page."""
    columns = 4
    lines = -(-len(PICTURES) // columns)
    figure, grid = plt.subplots(lines, columns, figsize=(2.2 * columns, 2.4 * lines), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, panels) in zip(grid.flat, PICTURES.items(), strict=False):
        axes.axis("on")
        draw(axes, weights(panels[OVERVIEW.get(name, 0)][1]), name.replace("-", " "), False)
    figure.tight_layout()
    save(figure, "attention")


def main(names: list[str]) -> None:
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "seqops", "font.size": 9})
    for name in names or PICTURES:
        draw_picture(name)
    if not names:
        draw_overview()


if __name__ == "__main__":
    main(sys.argv[1:])
