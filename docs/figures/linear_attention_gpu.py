"""Draws linear_attention_gpu.svg, the picture on linear-attention-gpu.md: chunks with states, and a window's blocks.

Run:  python docs/figures/linear_attention_gpu.py

Grey that is legible on white and on black, no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE, INK = "#7f8490", "#9aa0ab", "#ffffff"
BLUE, GREEN, BROWN, PURPLE = "#3f7cc4", "#2f8f83", "#b3752a", "#a4558f"
CHUNKS, SIZE = 4, 1.5
WINDOW = 6  # steps of a block in the right half


def box(axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str = "") -> None:
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="none"))
    axes.text(x + width / 2, y + height / 2 - 0.01, label, color=INK, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.annotate("", end, start, arrowprops=style)


def write(axes: Axes, x: float, y: float, text: str, **options: object) -> None:
    axes.text(x, y, text, color=TEXT, **{"ha": "left", "va": "center", **options})


def draw_chunks(axes: Axes) -> None:
    """Scores of one row: triangles on the diagonal, and the state for all that is left of them."""
    write(axes, 0, 8.0, "A row: chunk by chunk, the state in registers", fontweight="bold")
    for i in range(CHUNKS):
        x, y = i * (SIZE + 0.35), 5.9 - i * (SIZE - 0.1)
        corners = [(x, y + SIZE), (x, y), (x + SIZE, y)]
        axes.add_patch(plt.Polygon(corners, facecolor=BLUE, edgecolor="none"))
        axes.text(x + 0.5, y + 0.42, "$q k^T$", color=INK, ha="center", va="center")
        if i:
            left = i * (SIZE + 0.35) - 0.35
            axes.add_patch(plt.Rectangle((0, y), left, SIZE, facecolor="none", edgecolor=LINE, linestyle=":"))
            write(axes, left / 2, y + SIZE / 2, f"$q S_{i}$", ha="center")
        if i + 1 < CHUNKS:
            box(axes, x + SIZE - 0.1, y - 0.12 + SIZE, 0.62, 0.42, GREEN, f"$S_{i + 1}$")
            arrow(axes, (x + SIZE + 0.21, y - 0.14 + SIZE), (x + SIZE + 0.21, y + 0.2))
    write(axes, 0, 0.75, "keys, in time")
    arrow(axes, (2.3, 0.75), (7.0, 0.75))


def draw_window(axes: Axes) -> None:
    """Two blocks of a window's length: what each step has of its own, and what of the block before."""
    write(axes, 0, 8.0, f"A window of {WINDOW} steps: blocks of {WINDOW}", fontweight="bold")
    step = 0.62
    for block, colour in enumerate((BROWN, BLUE)):
        for i in range(WINDOW):
            box(axes, (block * WINDOW + i) * step + 0.04, 6.6, step - 0.08, 0.5, colour)
    axes.plot((WINDOW * step, WINDOW * step), (0.9, 7.3), color=LINE, linestyle=":", linewidth=1.2)
    write(axes, WINDOW * step / 2, 7.3, "block before", ha="center")
    write(axes, WINDOW * step * 1.5, 7.3, "own block", ha="center")
    for i in range(WINDOW):
        y, edge = 5.6 - i * 0.84, WINDOW * step
        box(axes, edge, y, (i + 1) * step, 0.4, BLUE)
        if i + 1 < WINDOW:
            box(axes, edge - (WINDOW - 1 - i) * step, y, (WINDOW - 1 - i) * step, 0.4, BROWN)
        write(axes, 2 * edge + 0.25, y + 0.2, f"step {i + 1}")
    write(axes, WINDOW * step - 0.1, 0.55, "grows backwards in time", ha="right")
    write(axes, WINDOW * step + 0.1, 0.55, "grows forwards: a row")


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "dejavusans"}
    )
    figure, (chunks, window) = plt.subplots(1, 2, figsize=(11.0, 4.6))
    draw_chunks(chunks)
    draw_window(window)
    for axes in (chunks, window):
        axes.set(xlim=(-0.2, 9.2), ylim=(0.2, 8.4))
        axes.axis("off")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.03)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
