"""Draws scan.svg, the picture on scan.md: how one recurrence is computed by many processors.

Run:  python docs/figures/scan.py

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
TILES, STEPS, TILE = 4, 5, 2.3


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str = "") -> None:
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2 - 0.01, label, color=INK, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = LINE) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.annotate("", end, start, arrowprops=style)


def title(axes: Axes, y: float, head: str, text: str) -> None:
    axes.text(0, y, head, color=TEXT, ha="left", va="center", fontweight="bold")
    axes.text(2.3, y, text, color=TEXT, ha="left", va="center")


def steps(axes: Axes, tile: int, y: float) -> None:
    """A tile's steps, each handing its state to the next."""
    for i in range(STEPS):
        x = tile * (TILE + 0.5) + i * TILE / STEPS
        box(axes, x + 0.04, y, TILE / STEPS - 0.08, 0.42, COLOURS[tile])
        if i:
            arrow(axes, (x - 0.1, y + 0.21), (x + 0.1, y + 0.21), INK)


def draw_tiles(axes: Axes) -> None:
    """Reduce, fold, apply: the state crosses tiles in their order, whoever finishes first."""
    left = [tile * (TILE + 0.5) for tile in range(TILES)]
    title(axes, 5.05, "1  reduce", "every tile by itself, published: what it does to a state, h → A h + X")
    title(axes, 2.95, "2  fold", "oldest first: the state before every tile")
    title(axes, 0.3, "3  apply", "every tile again, from the state before it")
    for tile, x in enumerate(left):
        steps(axes, tile, 4.35)
        arrow(axes, (x + TILE / 2, 4.3), (x + TILE / 2, 3.95))
        box(axes, x + 0.55, 3.5, TILE - 1.1, 0.42, COLOURS[tile], f"$A_{tile}\\;\\;X_{tile}$")
        box(axes, x - 0.1, 1.85, 0.75, 0.5, LINE, f"$c_{tile}$")
        target = left[tile + 1] - 0.12 if tile + 1 < TILES else x + TILE + 0.38
        arrow(axes, (x + 0.67, 2.1), (target, 2.1))
        axes.text((x + 0.67 + target) / 2, 2.3, f"$A_{tile}c_{tile}+X_{tile}$", color=TEXT, ha="center", va="bottom")
        arrow(axes, (x + 0.27, 1.8), (x + 0.27, 1.2))
        steps(axes, tile, 0.72)
    box(axes, left[-1] + TILE + 0.4, 1.85, 0.75, 0.5, LINE, "$h_T$")
    arrow(axes, (0, -0.3), (left[-1] + TILE, -0.3))
    axes.text(left[-1] + TILE + 0.15, -0.3, "time", color=TEXT, ha="left", va="center")


def draw_march(axes: Axes) -> None:
    """The processor's way: rows of memory in their order, the state of all channels in its first cache."""
    axes.text(0, 5.05, "CPU: every step, in memory's order", color=TEXT, ha="left", va="center", fontweight="bold")
    for row in range(5):
        y = 4.2 - row * 0.68
        box(axes, 0.75, y, 3.6, 0.42, COLOURS[0])
        arrow(axes, (0.95, y + 0.21), (4.15, y + 0.21), INK)
        axes.text(0.6, y + 0.21, f"$x_{row}$", color=TEXT, ha="right", va="center")
        if row:
            axes.plot((4.4, 4.55, 0.62, 0.7), (y + 0.89, y + 0.55, y + 0.55, y + 0.3), color=LINE, linewidth=0.8)
    arrow(axes, (2.55, 1.4), (2.55, 1.0))
    arrow(axes, (2.2, 1.0), (2.2, 1.4))
    box(axes, 0.75, 0.52, 3.6, 0.42, LINE, "state of all channels, in L1")
    axes.text(
        0,
        -0.02,
        "A thread takes a row of the batch; with\ntoo few, chunks of time: 1, 2 and 3 again",
        color=TEXT,
        va="center",
    )


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "dejavusans"}
    )
    figure, (tiles, march) = plt.subplots(1, 2, figsize=(11.5, 4.0), width_ratios=(12.6, 5.0))
    draw_tiles(tiles)
    draw_march(march)
    for axes, width in ((tiles, 12.6), (march, 5.0)):
        axes.set(xlim=(-0.2, width - 0.2), ylim=(-0.6, 5.4))
        axes.axis("off")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.03)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
