"""Draws ssm.svg, the picture on ssm.md: a kernel as the product of two tables of powers.

Run:  python docs/figures/ssm.py

Grey that is legible on white and on black, no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE, INK = "#7f8490", "#9aa0ab", "#ffffff"
ANCHORS, TABLE, KERNEL = "#3f7cc4", "#2f8f83", "#b3752a"
ROWS, COLUMNS, MODES, CELL = 4, 6, 3, 0.7


def cells(axes: Axes, x: float, y: float, rows: int, columns: int, colour: str, labels: list[list[str]]) -> None:
    """A table whose upper left corner is (x, y)."""
    for row in range(rows):
        for column in range(columns):
            left, below = x + column * CELL, y - (row + 1) * CELL
            axes.add_patch(plt.Rectangle((left + 0.03, below + 0.03), CELL - 0.06, CELL - 0.06, facecolor=colour))
            text = labels[row][column]
            axes.text(left + CELL / 2, below + CELL / 2 - 0.02, text, color=INK, ha="center", va="center", fontsize=8)


def say(axes: Axes, x: float, y: float, text: str, where: str = "center", bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    axes.text(x, y, text, color=TEXT, ha=where, va="center", fontweight=weight)


def power(step: int, mode: int) -> str:
    return f"$e^{{{step if step > 1 else ''}z_{mode}}}$" if step else "1"


def draw(axes: Axes) -> None:
    top, left = 0.0, 0.0
    anchors = [[f"$c_{n}$" + ("" if j == 0 else power(COLUMNS * j, n)) for n in range(MODES)] for j in range(ROWS)]
    cells(axes, left, top, ROWS, MODES, ANCHORS, anchors)
    say(axes, left + MODES * CELL / 2, top + 0.75, "anchors", bold=True)
    say(axes, left + MODES * CELL / 2, top + 0.35, "every C-th power")
    say(axes, left + MODES * CELL / 2, top - ROWS * CELL - 0.35, "N modes")
    say(axes, left - 0.2, top - ROWS * CELL / 2, "L / C rows", "right")

    left += MODES * CELL + 0.8
    say(axes, left - 0.4, top - ROWS * CELL / 2, "×")
    table = [[power(i, n) for i in range(COLUMNS)] for n in range(MODES)]
    below = top - (ROWS - MODES) * CELL / 2
    cells(axes, left, below, MODES, COLUMNS, TABLE, table)
    say(axes, left + COLUMNS * CELL / 2, top + 0.75, "table", bold=True)
    say(axes, left + COLUMNS * CELL / 2, top + 0.35, "the first C powers")
    say(axes, left + COLUMNS * CELL / 2, top - ROWS * CELL - 0.35, "C columns")

    left += COLUMNS * CELL + 0.8
    say(axes, left - 0.4, top - ROWS * CELL / 2, "=")
    kernel = [[f"$K_{{{COLUMNS * j + i}}}$" for i in range(COLUMNS)] for j in range(ROWS)]
    cells(axes, left, top, ROWS, COLUMNS, KERNEL, kernel)
    say(axes, left + COLUMNS * CELL / 2, top + 0.75, "kernel of a head", bold=True)
    say(axes, left + COLUMNS * CELL / 2, top + 0.35, "real parts, twice")
    say(axes, left + COLUMNS * CELL / 2, top - ROWS * CELL - 0.35, "in memory's order")


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "dejavusans"}
    )
    figure, axes = plt.subplots(figsize=(9.2, 3.0))
    draw(axes)
    axes.set(xlim=(-1.6, 12.4), ylim=(-3.5, 1.1), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
