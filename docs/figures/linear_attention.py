"""Draws linear_attention.svg, the picture on linear-attention.md: pairs inside of chunks, a state between them.

Run:  python docs/figures/linear_attention.py

Grey that is legible on white and on black, no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE, INK = "#7f8490", "#9aa0ab", "#ffffff"
COLOURS = ("#3f7cc4", "#2f8f83", "#b3752a", "#a4558f")
CHUNKS, SIDE = 4, 1.5


def triangle(axes: Axes, chunk: int) -> None:
    """The pairs of one chunk: queries downwards, keys to the right."""
    x, y = chunk * SIDE, -chunk * SIDE
    axes.add_patch(plt.Polygon([(x, y), (x, y - SIDE), (x + SIDE, y - SIDE)], facecolor=COLOURS[chunk]))
    axes.text(x + SIDE / 3, y - 2 * SIDE / 3, "pairs", color=INK, ha="center", va="center")


def past(axes: Axes, chunk: int) -> None:
    """All keys before a chunk, seen through the state."""
    height = SIDE - 0.12
    axes.add_patch(
        plt.Rectangle((0, -chunk * SIDE - SIDE + 0.06), chunk * SIDE - 0.08, height, facecolor="none", edgecolor=LINE)
    )
    text = f"by way of\n$S_{chunk}$"
    axes.text(chunk * SIDE / 2, -chunk * SIDE - SIDE / 2, text, color=TEXT, ha="center", va="center")


def state(axes: Axes, chunk: int) -> None:
    x, y = CHUNKS * SIDE + 1.3, -chunk * SIDE
    style = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.add_patch(plt.Rectangle((x, y - 0.3), 1.0, 0.6, facecolor=LINE))
    axes.text(x + 0.5, y, f"$S_{chunk}$", color=INK, ha="center", va="center")
    if chunk < CHUNKS:
        axes.annotate("", (x + 0.5, y - SIDE + 0.33), (x + 0.5, y - 0.33), arrowprops=style)
        text = "decay, then add\n$k^T v$ of the chunk"
        axes.text(x + 0.75, y - SIDE / 2, text, color=COLOURS[chunk], ha="left", va="center")


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "seqops", "font.size": 9})
    figure, axes = plt.subplots(figsize=(8.2, 5.2))
    for chunk in range(CHUNKS):
        triangle(axes, chunk)
        if chunk:
            past(axes, chunk)
    for chunk in range(CHUNKS + 1):
        state(axes, chunk)
    axes.text(CHUNKS * SIDE / 2, 0.25, "keys", color=TEXT, ha="center", va="center")
    axes.text(-0.25, -CHUNKS * SIDE / 2, "queries", color=TEXT, ha="center", va="center", rotation=90)
    axes.set(xlim=(-0.5, CHUNKS * SIDE + 4.6), ylim=(-CHUNKS * SIDE - 0.5, 0.6))
    axes.set_aspect("equal")
    axes.axis("off")
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
