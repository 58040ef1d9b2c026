"""Draws conv-ssm.svg, the picture on conv-ssm.md: what is in memory while blocks of frames are marched.

Run:  python docs/figures/conv-ssm.py

Grey that is legible on white and on black, no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE, INK = "#7f8490", "#9aa0ab", "#ffffff"
FRAME, STATE, OUTPUT, KEPT = "#3f7cc4", "#2f8f83", "#b3752a", "#a4558f"
BLOCKS, FRAMES, WIDTH, GAP = 3, 4, 0.62, 0.75


def left_of(block: int, frame: int) -> float:
    return 1.7 + block * (FRAMES * WIDTH + GAP) + frame * WIDTH


def box(
    axes: Axes, x: float, y: float, width: float, height: float, colour: str, label: str = "", **how: float
) -> None:
    axes.add_patch(plt.Rectangle((x, y), width, height, facecolor=colour, edgecolor="none", **how))
    axes.text(x + width / 2, y + height / 2 - 0.01, label, color=INK, ha="center", va="center")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = LINE) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.annotate("", end, start, arrowprops=style)


def draw(axes: Axes) -> None:
    rows = {"frames u": (4.1, FRAME), "states x": (2.35, STATE), "outputs y": (0.6, OUTPUT)}
    for label, (y, _) in rows.items():
        axes.text(1.35, y + 0.27, label, color=TEXT, ha="right", va="center", fontweight="bold")
    for block in range(BLOCKS):
        now = block == 1
        for frame in range(FRAMES):
            x, t = left_of(block, frame), block * FRAMES + frame
            for y, colour in rows.values():
                # Of all states only those of the block at work exist.
                if colour != STATE or now:
                    box(axes, x + 0.03, y, WIDTH - 0.06, 0.54, colour, f"${t}$")
                else:
                    axes.add_patch(
                        plt.Rectangle((x + 0.05, y + 0.02), WIDTH - 0.1, 0.5, fill=False, edgecolor=LINE, linestyle=":")
                    )
        middle = left_of(block, 0) + FRAMES * WIDTH / 2
        for top, words in ((4.02, "convolve with $b$, scan with $a$"), (2.27, "convolve with $c$ and $d$")):
            arrow(axes, (middle, top), (middle, top - 1.03))
            if now:
                axes.text(middle + 0.12, top - 0.5, words, color=TEXT, ha="left", va="center")
        last = left_of(block, FRAMES - 1) + WIDTH
        arrow(axes, (last + 0.02, 2.62), (last + GAP - 0.32 if block + 1 < BLOCKS else last + 0.42, 2.62), KEPT)
        if block + 1 < BLOCKS:
            box(axes, last + GAP - 0.31, 2.4, 0.26, 0.44, KEPT)
    start = left_of(0, 0)
    axes.text(start, 5.05, "one block at a time: its states stay in the caches", color=TEXT, ha="left", va="center")
    box(axes, start, -0.42, 0.26, 0.44, KEPT)
    axes.text(
        start + 0.45,
        -0.2,
        "kept for the gradient: the state that enters a block, from which its states are computed again",
        color=TEXT,
        ha="left",
        va="center",
    )


def main() -> None:
    plt.rcParams.update(
        {"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10, "mathtext.fontset": "dejavusans"}
    )
    figure, axes = plt.subplots(figsize=(9.2, 4.2))
    draw(axes)
    axes.set(xlim=(0, left_of(BLOCKS - 1, FRAMES) + 0.6), ylim=(-0.6, 5.4))
    axes.axis("off")
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
