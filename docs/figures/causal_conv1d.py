"""Draws causal-conv1d.svg, the picture on causal-conv1d.md: what stays in registers while the taps pass by.

Run:  python docs/figures/causal_conv1d.py

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
TAPS, OUTPUTS, DILATION, STEPS = 3, 4, 2, 14


def box(axes: Axes, x: float, y: float, colour: str, label: str = "", faded: bool = False) -> None:
    alpha = 0.3 if faded else 1.0
    axes.add_patch(plt.Rectangle((x + 0.06, y), 0.88, 0.6, facecolor=colour, edgecolor="none", alpha=alpha))
    axes.text(x + 0.5, y + 0.29, label, color=TEXT if faded else INK, ha="center", va="center", fontsize=9)


def link(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.0}
    axes.annotate("", end, start, arrowprops=style)


def note(axes: Axes, x: float, y: float, text: str, bold: bool = False) -> None:
    axes.text(x, y, text, color=TEXT, ha="left", va="center", fontweight="bold" if bold else "normal")


def draw_class(axes: Axes) -> None:
    """Rows of time, the class that a thread follows, and its outputs."""
    note(axes, 0, 4.95, "One class of a dilation of 2, three taps", bold=True)
    first = (TAPS - 1) * DILATION
    for t in range(-first, STEPS - first):
        x = t + first
        own = t % DILATION == 0
        state = t < 0
        label = f"$x_{{{t}}}$"
        box(axes, x, 3.6, LINE if state else COLOURS[0], label, faded=not own)
    note(axes, 0, 4.45, "state")
    note(axes, first + 0.06, 4.45, "x, a row of all channels each")
    for r in range(OUTPUTS):
        x = first + r * DILATION
        box(axes, x, 1.2, COLOURS[1], f"$z_{{{r * DILATION}}}$")
        for k in range(TAPS):
            link(axes, (x - (TAPS - 1 - k) * DILATION + 0.5, 3.55), (x + 0.5, 1.85), COLOURS[2 + (k % 2)])
    note(
        axes, 0, 0.75, "The outputs of one class stay in registers. Row after row passes by and is loaded once for all"
    )
    note(axes, 0, 0.3, "of them; a tap is loaded once for all outputs. The other class is another run.")


def draw_window(axes: Axes) -> None:
    """The ring of rows in registers, tap by tap."""
    note(axes, 0, 4.95, "What is in registers, tap by tap", bold=True)
    for k in range(TAPS):
        y = 3.6 - k * 1.05
        axes.text(0, y + 0.29, f"tap {k}", color=TEXT, ha="left", va="center")
        for i in range(OUTPUTS):
            row = i if i >= k else i + OUTPUTS
            fresh = k > 0 and i == k - 1
            box(axes, 1.5 + i, y, COLOURS[3] if fresh else COLOURS[0], f"row {row}")
        axes.text(1.6 + OUTPUTS, y + 0.29, f"× $w_{k}$", color=TEXT, ha="left", va="center")
    note(axes, 0, 0.75, "Row k leaves when tap k is done,")
    note(axes, 0, 0.3, "row k + 4 takes its place.")


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "dejavusans"}
    )
    figure, (rows, window) = plt.subplots(1, 2, figsize=(11.5, 3.3), width_ratios=(14.8, 7.2))
    draw_class(rows)
    draw_window(window)
    for axes, width in ((rows, 14.8), (window, 7.2)):
        axes.set(xlim=(-0.2, width - 0.2), ylim=(0, 5.3))
        axes.axis("off")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.03)
    target = Path(__file__).with_name("causal-conv1d.svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
