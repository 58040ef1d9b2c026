"""Draws grid-scan.svg, the picture on grid-scan.md: what one node sends over the grid, by the operator itself.

Run:  python docs/figures/grid_scan.py

Grey that is legible on white and on black, no background: the picture stands on the page's own colour in both themes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.image import AxesImage
from torch import Tensor

import seqops

TEXT, LINE = "#7f8490", "#9aa0ab"
SIDE, SOURCE = 24, (3, 3)


def response(t_rl: float, t_ru: float | None, t_dl: float | None, t_du: float, flip: bool = False) -> Tensor:
    """r + d on the grid [X, Y], of which one node alone has an input, the same for r and d."""
    x = torch.zeros(1, SIDE, SIDE, 1, 1)
    source = tuple(SIDE - 1 - place for place in SOURCE) if flip else SOURCE
    x[0, source[0], source[1]] = 0.5
    gates = [None if gate is None else torch.full((1, SIDE, SIDE, 1), gate) for gate in (t_rl, t_ru, t_dl, t_du)]
    r, d = seqops.grid_scan(x, x, *gates, flip_x=flip, flip_y=flip)
    return (r + d)[0, :, :, 0, 0]


def draw(axes: Axes, values: Tensor, head: str, gates: str) -> AxesImage:
    colours = plt.get_cmap("viridis").copy()
    colours.set_bad(alpha=0)
    shown = values.T.clamp(min=0).masked_fill(values.T < 1e-3, float("nan"))
    image = axes.imshow(shown, cmap=colours, norm=matplotlib.colors.LogNorm(1e-3, 1))
    axes.set_title(head, color=TEXT, fontsize=10, fontweight="bold")
    axes.set_xlabel(gates, color=TEXT, fontsize=9)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color(LINE)
    axes.text(1.0, 1.02, "x", color=TEXT, fontsize=8, ha="right", va="bottom", transform=axes.transAxes)
    axes.text(-0.03, 0.0, "y", color=TEXT, fontsize=8, ha="right", va="bottom", transform=axes.transAxes)
    return image


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "seqops", "svg.fonttype": "path", "font.size": 10})
    figure, axes = plt.subplots(1, 4, figsize=(11.5, 3.3))
    draw(axes[0], response(0.5, 0.5, 0.5, 0.5), "P-mode, evenly", "all gates\n0.5")
    draw(axes[1], response(0.8, 0.8, 0.2, 0.2), "P-mode, along x", "t_rl = t_ru = 0.8\nt_dl = t_du = 0.2")
    draw(axes[2], response(0.85, None, 0.85, 0.85), "D-mode", "t_ru None\nthe others 0.85")
    image = draw(axes[3], response(0.85, None, 0.85, 0.85, flip=True), "D-mode, flipped", "flip_x\nflip_y")
    bar = figure.colorbar(image, ax=axes, shrink=0.78, pad=0.015)
    bar.ax.tick_params(colors=TEXT)
    bar.outline.set_edgecolor(LINE)
    target = Path(__file__).with_name("grid-scan.svg")
    figure.savefig(target, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


if __name__ == "__main__":
    main()
