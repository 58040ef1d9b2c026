"""Draws newton_schulz.svg, the picture on newton-schulz.md: what each step does to a singular value.

Run:  python docs/figures/newton_schulz.py

A step takes a singular value s to a s + b s^3 + c s^5, whatever the matrix. Colours are legible on white and on black,
no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from seqops.ttt import LACT_LM_STEPS, MUON_STEPS

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE = "#7f8490", "#9aa0ab"
COLOURS = ("#9db8dc", "#7d9fd0", "#5d87c4", "#3f6fb4", "#1f9e89")


def draw(axes: Axes, steps: tuple[tuple[float, float, float], ...], title: str) -> None:
    start = np.logspace(-3, 0, 400)
    value = start
    for number, (a, b, c) in enumerate(steps):
        value = a * value + b * value**3 + c * value**5
        last = number + 1 == len(steps)
        label = f"{number + 1} step" + "s" * (number > 0)
        axes.plot(start, value, color=COLOURS[number], linewidth=2.2 if last else 1.3, label=label)
    axes.plot((1e-3, 1), (1, 1), color=LINE, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_xscale("log")
    axes.set(xlim=(1e-3, 1), ylim=(0, 1.6))
    axes.set_title(title, color=TEXT, fontsize=10)
    axes.set_xlabel("singular value of X / |X|", color=TEXT)
    axes.tick_params(colors=TEXT, which="both")
    for spine in axes.spines.values():
        spine.set_color(LINE)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 9})
    figure, (muon, lact) = plt.subplots(1, 2, figsize=(8.4, 3.0), sharey=True)
    draw(muon, MUON_STEPS, "MUON_STEPS")
    draw(lact, LACT_LM_STEPS, "LACT_LM_STEPS")
    muon.set_ylabel("after the steps", color=TEXT)
    lact.legend(frameon=False, labelcolor=TEXT, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    target = Path(__file__).with_suffix(".svg")
    figure.savefig(target, transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
