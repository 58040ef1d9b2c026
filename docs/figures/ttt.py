"""Draws the pictures of test-time training: ttt.svg, large-chunk-ttt.svg and neural-memory.svg, of those pages.

Run:  python docs/figures/ttt.py

Grey that is legible on white and on black, no background: the pictures stand on the page's own colour in both themes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

TEXT, LINE, INK = "#7f8490", "#9aa0ab", "#ffffff"
KEYS, QUERIES, WEIGHTS, STEP = "#3f7cc4", "#2f8f83", "#b3752a", "#a4558f"


def box(axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.6, height: float = 0.6) -> None:
    """Around (x, y)."""
    axes.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=colour))
    axes.text(x, y, text, color=INK, ha="center", va="center", fontsize=8.5)


def frame(axes: Axes, x: float, y: float, text: str, width: float, height: float) -> None:
    axes.add_patch(
        plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor="none", edgecolor=LINE, linestyle="--")
    )
    axes.text(x, y + height / 2 + 0.17, text, color=TEXT, ha="center", va="center", fontsize=8.5)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = LINE) -> None:
    style = {"arrowstyle": "-|>", "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.1}
    axes.annotate("", end, start, arrowprops=style)


def note(axes: Axes, x: float, y: float, text: str, colour: str = TEXT, **options: str) -> None:
    axes.text(x, y, text, color=colour, va="center", fontsize=8.5, **({"ha": "center"} | options))


def overview(axes: Axes) -> None:
    """Weights pass from chunk to chunk; keys and values change them, queries read them."""
    apart, chunks = 3.6, 3
    for chunk in range(chunks):
        x = chunk * apart
        box(axes, x, 0, f"$W_{chunk}$", WEIGHTS, 1.0)
        arrow(axes, (x + 0.5, 0), (x + apart - 0.5, 0), WEIGHTS)
        box(axes, x + apart / 2, 1.5, f"$k, v$ of chunk {chunk}", KEYS, 2.2)
        arrow(axes, (x + apart / 2, 1.2), (x + apart / 2, 0.08), KEYS)
        note(axes, x + apart / 2 + 0.12, 0.65, "learns", KEYS, ha="left")
        box(axes, x, -1.5, f"$q$ of chunk {chunk}", QUERIES, 1.9)
        arrow(axes, (x, -1.2), (x, -0.33), QUERIES)
        note(axes, x + 0.12, -0.75, "reads", QUERIES, ha="left")
        arrow(axes, (x, -1.8), (x, -2.3), QUERIES)
        note(axes, x, -2.5, f"$o$ of chunk {chunk}", QUERIES)
    box(axes, chunks * apart, 0, f"$W_{chunks}$", WEIGHTS, 1.0)
    note(axes, chunks * apart, -0.6, "returned: the next\ncall begins with it")
    axes.set(xlim=(-1.2, chunks * apart + 1.6), ylim=(-2.8, 2))


def large_chunk(axes: Axes) -> None:
    """One update: three products of the chunk, a pass, three products over time, a pass."""
    columns = (0.0, 2.9, 5.9, 8.8, 11.9, 14.9)
    for y, text, colour in ((1.6, "$K$", KEYS), (0, "$V$", KEYS)):
        box(axes, columns[0], y, text, colour, 1.0)
    for y, text in ((2.2, r"$Y_0 = K w_0^T$"), (1.1, r"$Y_2 = K w_2^T$"), (0, r"$g = V w_1$")):
        box(axes, columns[1], y, text, STEP, 1.8)
        arrow(axes, (columns[0] + 0.5, 1.6 if y else 0), (columns[1] - 0.92, y))
    frame(axes, columns[1], 1.1, "products", 2.1, 3.1)
    for y, text in ((2.2, "lr$_0$ ⊙ $e_0$"), (1.1, "lr$_1$ ⊙ $h$"), (0, "lr$_2$ ⊙ $e_2$")):
        box(axes, columns[2], y, text, LINE, 1.6)
    frame(axes, columns[2], 1.1, "one pass", 1.9, 3.1)
    arrow(axes, (columns[1] + 1.05, 1.1), (columns[2] - 0.97, 1.1))
    for y, text in (
        (2.2, r"$d_0 = (\,\cdot\,)^T K$"),
        (1.1, r"$d_1 = V^T (\,\cdot\,)$"),
        (0, r"$d_2 = (\,\cdot\,)^T K$"),
    ):
        box(axes, columns[3], y, text, STEP, 1.9)
        arrow(axes, (columns[2] + 0.82, y), (columns[3] - 0.97, y))
    frame(axes, columns[3], 1.1, "products over time", 2.2, 3.1)
    box(axes, columns[4], 1.1, "momentum,\nNewton-Schulz,\nadd, row norm", LINE, 2.2, 1.5)
    arrow(axes, (columns[3] + 1.1, 1.1), (columns[4] - 1.12, 1.1))
    box(axes, columns[5], 1.1, "$w$ of the\nnext chunk", WEIGHTS, 1.5, 1.0)
    arrow(axes, (columns[4] + 1.1, 1.1), (columns[5] - 0.77, 1.1), WEIGHTS)
    box(axes, columns[0], -1.9, "$w$", WEIGHTS, 1.0)
    arrow(axes, (columns[0] + 0.35, -1.6), (columns[1] - 0.6, -0.48), WEIGHTS)
    box(axes, columns[0], -2.9, "$Q$", QUERIES, 1.0)
    box(axes, columns[1] + 0.3, -2.4, r"$Q w_0^T,\ Q w_2^T$", STEP, 2.1)
    arrow(axes, (columns[0] + 0.5, -1.95), (columns[1] - 0.77, -2.3), WEIGHTS)
    arrow(axes, (columns[0] + 0.5, -2.85), (columns[1] - 0.77, -2.5), QUERIES)
    box(axes, columns[2] + 0.3, -2.4, "silu(·) ⊙ ·", LINE, 1.6)
    arrow(axes, (columns[1] + 1.35, -2.4), (columns[2] - 0.52, -2.4))
    box(axes, columns[3] + 0.3, -2.4, r"$(\,\cdot\,)\, w_1^T$", STEP, 1.6)
    arrow(axes, (columns[2] + 1.1, -2.4), (columns[3] - 0.52, -2.4))
    note(axes, columns[3] + 2.1, -2.4, "$o$ of the chunk", QUERIES, ha="left")
    arrow(axes, (columns[3] + 1.1, -2.4), (columns[3] + 2.0, -2.4), QUERIES)
    note(axes, -0.9, 1.1, "learn", ha="right")
    note(axes, -0.9, -2.4, "read", ha="right")
    axes.set(xlim=(-2, 15.9), ylim=(-3.4, 3.2))


def dual(axes: Axes) -> None:
    """The weights at token t as what the chunk began with, and a triangle of pairs."""
    side = 3.2
    x, y = 3.4, -side / 2
    box(axes, 0, 0.7, "$W$ before\nthe chunk", WEIGHTS, 1.6, 0.8)
    box(axes, 0, -0.7, "$S$ before\nthe chunk", WEIGHTS, 1.6, 0.8)
    note(axes, 1.55, 0.7, r"$b_t\ (X W^T)$")
    note(axes, 1.55, -0.7, r"$g_t\ (X S^T)$")
    note(axes, 2.6, 0, "+", fontweight="bold")
    axes.add_patch(plt.Polygon([(x, y + side), (x, y), (x + side, y)], facecolor=STEP))
    axes.add_patch(plt.Rectangle((x, y), side, side, facecolor="none", edgecolor=LINE))
    axes.text(
        x + side * 0.34, y + side * 0.3, r"$c_{ti}\ \langle x_t, x_i \rangle$", color=INK, ha="center", va="center"
    )
    note(axes, x + side * 0.7, y + side * 0.72, "left out")
    note(axes, x + side / 2, y + side + 0.25, "tokens $i$ that taught", KEYS)
    note(axes, x - 0.22, 0, "tokens $t$", QUERIES, rotation="vertical")
    note(axes, x + side + 0.35, 0, "×")
    box(axes, x + side + 1.05, 0, r"$-\,\delta_i$", KEYS, 0.8, side)
    arrow(axes, (x + side + 1.55, 0.8), (x + side + 2.5, 0.8), QUERIES)
    note(axes, x + side + 2.6, 0.8, "rows of the next layer,\nor the outputs $o_t$", QUERIES, ha="left")
    arrow(axes, (x + side + 1.55, y + 0.15), (x + side + 2.5, y + 0.15), WEIGHTS)
    note(axes, x + side + 2.6, y + 0.15, "the last row:\n$W$, $S$ of the next chunk", WEIGHTS, ha="left")
    axes.set(xlim=(-1, x + side + 5.6), ylim=(-2, 2.2))


def save(name: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> None:
    figure, axes = plt.subplots(figsize=size)
    draw(axes)
    axes.set_aspect("equal")
    axes.axis("off")
    target = Path(__file__).with_name(name)
    figure.savefig(target, transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(figure)
    # Matplotlib leaves spaces at the ends of lines.
    target.write_text("".join(line.rstrip() + "\n" for line in target.read_text().splitlines()))


def main() -> None:
    plt.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "seqops", "font.size": 9})
    save("ttt.svg", (9, 3.6), overview)
    save("large-chunk-ttt.svg", (11, 4.2), large_chunk)
    save("neural-memory.svg", (9.4, 3.4), dual)


if __name__ == "__main__":
    main()
