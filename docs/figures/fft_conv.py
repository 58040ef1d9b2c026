"""Draws fft-conv.svg, the picture on fft-conv.md: how a real sequence is transformed, multiplied, and comes back.

Run:  python docs/figures/fft_conv.py

Grey that is legible on white and on black, no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE, INK = "#7f8490", "#9aa0ab", "#ffffff"
REAL, IMAGINARY, TAPS = "#3f7cc4", "#2f8f83", "#b3752a"
POINTS, WIDTH = 8, 0.42
# Of a block's z^m the angle, in eighths of a turn: of the whole one, of its halves, of theirs, of all points.
ANGLES = [["1/4"], ["1/8", "5/8"], ["1/16", "9/16", "5/16", "13/16"]]


def cells(axes: Axes, x: float, y: float, count: int, colour: str, first: int = 0, height: float = 0.4) -> None:
    for i in range(count):
        box = plt.Rectangle((x + i * WIDTH + 0.02, y), WIDTH - 0.04, height, facecolor=colour, edgecolor="none")
        axes.add_patch(box)
        if first >= 0:
            axes.text(x + (i + 0.5) * WIDTH, y + height / 2 - 0.01, str(first + i), color=INK, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": LINE, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.annotate("", end, start, arrowprops=style)


def say(axes: Axes, x: float, y: float, text: str, **options: str) -> None:
    axes.text(x, y, text, color=TEXT, va="center", **({"ha": "left"} | options))


def draw_fold(axes: Axes) -> None:
    """2n real numbers are n complex ones, since z^n is i."""
    say(axes, 0, 5.0, "1  fold", fontweight="bold")
    cells(axes, 0, 4.1, POINTS, REAL)
    cells(axes, POINTS * WIDTH, 4.1, POINTS, IMAGINARY, POINTS)
    say(axes, 0, 3.75, "times of one channel")
    arrow(axes, (0.5 * POINTS * WIDTH, 3.5), (0.5 * POINTS * WIDTH, 2.75))
    arrow(axes, (1.5 * POINTS * WIDTH, 4.0), (POINTS * WIDTH + 0.1, 2.35))
    cells(axes, 0, 2.3, POINTS, REAL)
    cells(axes, 0, 1.88, POINTS, IMAGINARY, POINTS)
    say(axes, -0.1, 2.5, "re", ha="right")
    say(axes, -0.1, 2.08, "im", ha="right")
    say(axes, 0, 1.45, "$x_t + i\\,x_{t+n}$: modulo $z^n - i$ nothing is lost")
    say(axes, 0, 0.75, "a register holds one number of\n4 to 16 channels, as memory does")


def draw_splits(axes: Axes) -> None:
    """Blocks split where they lie; the taps' values meet them in that order."""
    left = 8.3
    say(axes, left, 5.0, "2  split", fontweight="bold")
    for level, angles in enumerate(ANGLES):
        y, each = 4.1 - 0.95 * level, POINTS // len(angles)
        for block, angle in enumerate(angles):
            x = left + block * each * WIDTH
            box = plt.Rectangle((x + 0.03, y), each * WIDTH - 0.06, 0.5, facecolor=REAL, edgecolor="none")
            axes.add_patch(box)
            axes.text(x + each * WIDTH / 2, y + 0.24, angle, color=INK, ha="center", va="center")
            for child in (0.25, 0.75):
                arrow(axes, (x + each * WIDTH / 2, y - 0.03), (x + child * each * WIDTH, y - 0.4))
    y = 4.1 - 0.95 * len(ANGLES)
    cells(axes, left, y, POINTS, REAL, -1, 0.5)
    say(axes, left, 0.75, "the turn of each block's $z^m$: one\nset of twiddles, no reordering")


def draw_back(axes: Axes) -> None:
    """Point by point, then the same splits undone."""
    left, right = 12.6, 16.6
    y = 4.1 - 0.95 * len(ANGLES)
    say(axes, left, 5.0, "3  multiply, and undo the splits", fontweight="bold")
    say(axes, left - 0.55, y + 0.24, "$\\times$", ha="center")
    cells(axes, left, y, POINTS, TAPS, -1, 0.5)
    say(axes, left, 0.75, "values of the taps: once\nfor all rows of the batch")
    say(axes, right - 0.3, y + 0.24, "=", ha="center")
    for level, angles in enumerate(ANGLES):
        up, each = 4.1 - 0.95 * level, POINTS // len(angles)
        for block in range(len(angles)):
            x = right + block * each * WIDTH
            box = plt.Rectangle((x + 0.03, up), each * WIDTH - 0.06, 0.5, facecolor=IMAGINARY, edgecolor="none")
            axes.add_patch(box)
            for child in (0.25, 0.75):
                arrow(axes, (x + child * each * WIDTH, up - 0.4), (x + each * WIDTH / 2, up - 0.03))
    axes.text(right + POINTS * WIDTH / 2, 4.34, "$y_t + i\\,y_{t+n}$", color=INK, ha="center", va="center")
    cells(axes, right, y, POINTS, IMAGINARY, -1, 0.5)
    say(axes, right, 0.75, "what wraps around lies past\nthe last output")


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "dejavusans"}
    )
    figure, axes = plt.subplots(figsize=(12.5, 3.6))
    draw_fold(axes)
    draw_splits(axes)
    draw_back(axes)
    axes.set(xlim=(-0.6, 20.3), ylim=(0.2, 5.3))
    axes.axis("off")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    target = Path(__file__).with_name("fft-conv.svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
