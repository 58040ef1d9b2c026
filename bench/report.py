"""The HTML page of a run: one file, plots inside as SVG, nothing fetched from anywhere."""

import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import harness
from bench.record import QUANTITIES, Miss, Record, Result, find_misses, memory_ratio
from bench.tables import MODE_TITLES, describe, format_bytes, format_ratio, format_seconds, format_step, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS_COLOUR = "#1f6feb"
TORCH_NN_COLOUR = "#8c959f"
PEER_COLOURS = ("#c9a227", "#7d5ba6", "#2f8f8b", "#b5552b")
MET_COLOUR = "#2a8a4a"
MISSED_COLOUR = "#cf3a3a"
PLAIN_COLOUR = "#1f6feb"

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; max-width: 1100px; margin: 2em auto;
       padding: 0 1em; }
h1 { margin-bottom: 0; } h2 { margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } th, td { padding: 3px 9px; border-bottom: 1px solid #d8dee4; }
th { text-align: left; position: sticky; top: 0; background: #fff; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.met { color: #1a7f37; } .missed, .failed { color: #b3261e; font-weight: 600; }
figure { margin: 1em 0; } svg { max-width: 100%; height: auto; } figcaption, .quiet { color: #59636e; }
.wide { overflow-x: auto; }
"""


def embed(figure: "Figure") -> str:
    """The figure as an `<svg>` element that refers to nothing outside itself."""
    import matplotlib
    from matplotlib import pyplot

    target = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "seqops"}):
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    pyplot.close(figure)
    text = target.getvalue()
    # HTML knows the namespaces of inline SVG; the XML prolog, with its address of a DTD, has no place in it.
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])


def start_plot(rows: int, title: str) -> tuple["Figure", "Axes"]:
    """An empty plot with room for `rows` labelled rows, the first on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10.5, 0.9 + 0.3 * rows), layout="constrained")
    axes.set_title(title, loc="left", fontsize=11)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#d8dee4", linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def plot_ratios(results: Sequence[Result], mode: str) -> str:
    """Bars of peer's time over ours, the spread over rounds, and a line at each goal."""
    from matplotlib.ticker import LogLocator

    rows = [(r, peer) for r in results if r.mode == mode for peer in r.ratios]
    figure, axes = start_plot(len(rows), f"{MODE_TITLES[mode]}: how many times faster than the peer")
    for y, (result, peer) in enumerate(rows):
        ratio, goal = result.ratios[peer], result.goals.get(peer)
        median = ratio["median"]
        colour = PLAIN_COLOUR if goal is None else MET_COLOUR if median >= goal else MISSED_COLOUR
        spread = [[median - ratio["p20"]], [ratio["p80"] - median]]
        axes.barh(y, median, color=colour, height=0.62, xerr=spread, error_kw={"elinewidth": 1, "capsize": 2})
        if goal is not None:
            axes.plot([goal, goal], [y - 0.45, y + 0.45], color="black", linewidth=2)
        end = max(ratio["p80"], goal or 0)
        axes.annotate(format_ratio(median), (end, y), (6, 0), textcoords="offset points", va="center", size=8)
    axes.set_xscale("log")
    axes.axvline(1, color="#59636e", linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.5), max(high * 1.4, 2))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter("")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [f"{result.title}  ({peer})" for result, peer in rows], fontsize=8)
    return embed(figure)


def is_torch_nn(peer: str) -> bool:
    return peer.startswith("nn.") and "," not in peer


def plot_points(
    results: Sequence[Result], mode: str, title: str, field: str, scale: str, label: str, factor: float
) -> str:
    """One row a case, one point a contender. `field` holds contender -> number or contender -> summary."""
    rows = [r for r in results if r.mode == mode and getattr(r, field)]
    names = list(dict.fromkeys(name for r in rows for name in getattr(r, field) if name != harness.OURS))
    # nn.LSTM, nn.GRU and nn.RNN never share a row, and so share a colour; "nn.LSTM, float16" is beside one of them.
    others = [name for name in names if not is_torch_nn(name)]
    colours = dict.fromkeys(names, TORCH_NN_COLOUR) | {harness.OURS: OURS_COLOUR}
    colours |= dict(zip(others, itertools.cycle(PEER_COLOURS)))
    figure, axes = start_plot(len(rows), title)
    labelled = set()
    for y, result in enumerate(rows):
        for name, value in getattr(result, field).items():
            centre = factor * (value["median"] if isinstance(value, dict) else value)
            if isinstance(value, dict):
                axes.plot([factor * value["p20"], factor * value["p80"]], [y, y], color=colours[name], linewidth=2)
            shown = "torch.nn" if is_torch_nn(name) else name.replace("nn.", "torch.nn.")
            marker = {"marker": "o" if name == harness.OURS else "D", "s": 34, "color": colours[name], "zorder": 3}
            axes.scatter([centre], [y], label=None if shown in labelled else shown, **marker)
            labelled.add(shown)
    axes.set_xscale(scale)
    axes.set_xlabel(label)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [result.title for result in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    if scale == "linear":
        axes.set_xlim(left=0)
    axes.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=4, frameon=False)
    return embed(figure)


def make_cells(values: Iterable[str], number_from: int) -> str:
    """Cells of a row; those from index `number_from` on are aligned as numbers. Values are HTML already."""
    return "".join(f"<td{' class=number' if i >= number_from else ''}>{v}</td>" for i, v in enumerate(values))


def make_table(head: Sequence[str], rows: Iterable[Sequence[str]], number_from: int) -> str:
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{make_cells(row, number_from)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def describe_seconds(seconds: dict[str, float]) -> str:
    spread = f"{format_seconds(seconds['p20'])} – {format_seconds(seconds['p80'])}, {seconds['rounds']} rounds"
    return f"{format_seconds(seconds['median'])}<br><small class=quiet>{spread}</small>"


def describe_step(result: Result) -> str:
    """By the step, where steps bound the time, and the time to stay within."""
    parts = [f"{format_step(result)} a step"] if result.steps is not None else []
    parts += [f"goal {format_seconds(result.time_goal)}"] if result.time_goal is not None else []
    return f"<br><small class=quiet>{'; '.join(parts)}</small>" if parts else ""


def describe_check(result: Result) -> str:
    name = f"<br><small class=quiet>{html.escape(result.check['name'])}</small>"
    return f"{result.check['error']:.1e} of {result.check['bound']:.1e}{name}"


def make_rows(results: Iterable[Result]) -> Iterable[list[str]]:
    for result in results:
        start = [html.escape(result.title), html.escape(MODE_TITLES[result.mode])]
        if result.error:
            yield [*start, f'<span class="failed">failed, not timed: {html.escape(result.error)}</span>', *[""] * 8]
            continue
        if not result.ratios:
            seconds = result.seconds[harness.OURS]
            shares = [f"{share[harness.OURS]:.1%}" for share in (result.gemm_fraction, result.copy_fraction)]
            ours = describe_seconds(seconds) + describe_step(result)
            yield [*start, "", ours, "", "", "", *shares, "", describe_check(result)]
        for peer, ratio in result.ratios.items():
            goal = result.goals.get(peer)
            style = "" if goal is None else "met" if ratio["median"] >= goal else "missed"
            seconds = [result.seconds[name] for name in (harness.OURS, peer)]
            memory = memory_ratio(result, peer)
            yield [
                *start,
                html.escape(peer),
                describe_seconds(seconds[0]) + describe_step(result),
                describe_seconds(seconds[1]),
                f'<span class="{style}">{format_ratio(ratio["median"])}</span><br>'
                f"<small class=quiet>{ratio['p20']:.2f} – {ratio['p80']:.2f}</small>",
                "" if goal is None else f"{goal:g}x",
                f"{result.gemm_fraction[harness.OURS]:.1%} / {result.gemm_fraction[peer]:.1%}",
                f"{result.copy_fraction[harness.OURS]:.1%} / {result.copy_fraction[peer]:.1%}",
                " / ".join(format_bytes(result.memory[name]) for name in (harness.OURS, peer)) if memory else "",
                describe_check(result),
            ]


def describe_reached(miss: Miss, value: float, text: str = "{:.2f}") -> str:
    return format_seconds(value) if miss.quantity == "seconds" else text.format(value)


def missed_goals(record: Record) -> str:
    """The goals not reached, by how much, and the reason where one is known."""
    rows = [
        [
            html.escape(miss.result.title),
            html.escape(MODE_TITLES[miss.result.mode]),
            html.escape(miss.peer),
            QUANTITIES[miss.quantity],
            f'<span class="missed">{describe_reached(miss, miss.value)}</span>',
            f"{'≤' if miss.quantity in ('memory', 'seconds') else '≥'} {describe_reached(miss, miss.goal, '{:g}')}",
            f"{abs(miss.value / miss.goal - 1):.0%}",
            html.escape(miss.cause or "not known yet"),
        ]
        for miss in find_misses(record)
    ]
    if not rows:
        return "<p>None.</p>"
    return make_table(("case", "mode", "against", "what", "reached", "goal", "short by", "cause"), rows, 8)


def write_html(path: Path, record: Record) -> None:
    """Writes the page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    timed = [result for result in record.results if not result.error]
    plots = []
    for mode in harness.MODES:
        shown = [result for result in timed if result.mode == mode and result.ratios]
        if shown:
            plots.append((f"Ratios, {MODE_TITLES[mode]}", plot_ratios(shown, mode)))
            title = f"{MODE_TITLES[mode]}: time of a call"
            plots.append((title, plot_points(shown, mode, title, "seconds", "log", "milliseconds", 1e3)))
            title = f"{MODE_TITLES[mode]}: share of this machine's float32 matrix product"
            plots.append((title, plot_points(shown, mode, title, "gemm_fraction", "linear", "%", 100)))
    weighed = [result for result in timed if result.memory]
    if weighed:
        title = "peak memory of a training step"
        plots.append((title, plot_points(weighed, harness.TRAINING, title, "memory", "log", "MB", 1 / (1 << 20))))
    figures = "".join(f"<figure aria-label='{html.escape(title)}'>{plot}</figure>" for title, plot in plots)
    head = (
        *("case", "mode", "against", "ours", "peer", "ratio", "goal", "matrix product, ours / peer"),
        *("copy, ours / peer", "memory of a step, ours / peer", "error against float64"),
    )
    environment = ", ".join(f"{key}={value}" for key, value in record.machine["environment"].items()) or "none"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>seqops benchmark</title><style>{STYLE}</style></head><body>
<h1>seqops benchmark</h1>
<p class="quiet">{html.escape(describe(record))}</p>
<p><strong>{html.escape(summarise(record))}.</strong> A ratio is the peer's time over ours, taken inside each round of
interleaved runs; bars show the median and the 20 to 80 % spread, black lines the goals. Every case was compared with
the float64 reference before it was timed. Shares count the operations of the products, and each tensor's bytes once,
against rates measured in the same run. Environment: {html.escape(environment)}.</p>
<h2>Missed goals</h2>{missed_goals(record)}
<h2>Plots</h2>{figures}
<h2>All results</h2>{make_table(head, make_rows(record.results), 3)}
</body></html>
""",
        encoding="utf-8",
    )
