"""Small SVG plots as text. Colours, fonts and widths are the page's: see `report.STYLE`.

Each function returns a `<figure>`: a caption with the legend, then the drawing. Contenders are told apart by colour,
ours first; every point names itself when the pointer rests on it.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 38
COLOURS = 8  # classes c0 to c7 of the style sheet


def escape(text: str) -> str:
    return html.escape(text, quote=True)


def number(value: float) -> str:
    """A coordinate with one digit behind the point, where it has one."""
    return f"{value:.1f}".removesuffix(".0")


def ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range of a logarithmic scale: powers of ten, with 2 and 5 where few powers fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    wanted = (1, 2, 5) if math.log10(high / low) < 2.2 else (1,)
    found = [factor * 10.0**power for power in powers for factor in wanted]
    found = [value for value in found if low * 0.999 <= value <= high * 1.001]
    return found[:: max(1, math.ceil(len(found) / 8))]


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis from `low` to `high`, drawn between two coordinates."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)


def scale(values: Iterable[float], start: float, end: float, margin: float = 1.25) -> Scale:
    values = [value for value in values if value > 0] or [1.0]
    return Scale(min(values) / margin, max(values) * margin, start, end)


def colour(names: Sequence[str], name: str) -> str:
    return f"c{names.index(name) % COLOURS}"


def figure(title: str, drawing: Iterable[str], height: float, legend: Iterable[tuple[str, str]] = ()) -> str:
    """A caption and the drawing.

    Args:
        legend: class of the colour, text.
    """
    keys = "".join(f'<span><i class="key {style}"></i>{escape(text)}</span>' for style, text in legend)
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{keys}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {number(height)}" role="img" aria-label="{escape(title)}">'
        f"{''.join(drawing)}</svg></figure>"
    )


def text(x: float, y: float, words: str, anchor: str = "start", style: str = "") -> str:
    classes = " ".join(filter(None, (style, "" if anchor == "start" else anchor)))
    classes = f' class="{classes}"' if classes else ""
    return f'<text x="{number(x)}" y="{number(y)}"{classes}>{escape(words)}</text>'


def line(points: Sequence[tuple[float, float]], style: str) -> str:
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    return f'<polyline points="{path}" class="{style}"/>'


def marker(x: float, y: float, style: str, title: str, square: bool = False) -> str:
    if square:
        shape = f'<rect x="{number(x - 3.5)}" y="{number(y - 3.5)}" width="7" height="7" class="{style}">'
    else:
        shape = f'<circle cx="{number(x)}" cy="{number(y)}" r="4" class="{style}">'
    return f"{shape}<title>{escape(title)}</title></{'rect' if square else 'circle'}>"


def frame(
    x: Scale,
    y: Scale,
    labels: tuple[str, str],
    formats: tuple[Callable[[float], str], Callable[[float], str]],
    x_ticks: Sequence[float] | None = None,
) -> Iterable[str]:
    """Grid, ticks and the names of the axes."""
    across, up = ticks(x.low, x.high) if x_ticks is None else x_ticks, ticks(y.low, y.high)
    path = "".join(f"M{number(x(value))} {number(y.start)}V{number(y.end)}" for value in across)
    path += "".join(f"M{number(x.start)} {number(y(value))}H{number(x.end)}" for value in up)
    yield f'<path d="{path}" class="grid"/>'
    for value in across:
        yield text(x(value), y.start + 14, formats[0](value), "middle")
    for value in up:
        yield text(x.start - 5, y(value) + 4, formats[1](value), "end")
    yield text((x.start + x.end) / 2, y.start + 30, labels[0], "middle", "quiet")
    yield text(x.start + 4, y.end + 10, labels[1], "start", "quiet")


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    labels: tuple[str, str],
    formats: tuple[Callable[[float], str], Callable[[float], str]],
) -> str:
    """Values against length, a line a contender, both axes logarithmic."""
    names = list(series)
    points = [point for of_one in series.values() for point in of_one]
    places = sorted({x for x, _ in points})
    x = scale(places, LEFT, WIDTH - RIGHT)
    y = scale((value for _, value in points), HEIGHT - BOTTOM, TOP)
    drawing = [*frame(x, y, labels, formats, places)]
    for name in reversed(names):  # ours, which is first, on top
        style = colour(names, name)
        placed = [(x(at), y(value)) for at, value in series[name]]
        drawing.append(line(placed, f"line {style}"))
        for (at, value), (left, top) in zip(series[name], placed, strict=True):
            drawing.append(marker(left, top, style, f"{name}, {formats[0](at)}: {formats[1](value)}"))
    return figure(title, drawing, HEIGHT, [(colour(names, name), name) for name in names])


@dataclass(frozen=True)
class Point:
    """One contender in the plot of rates.

    Attributes:
        intensity: operations a byte.
        rate: operations a second.
        note: what the pointer shows.
        square: drawn as a square in place of a circle.
    """

    name: str
    intensity: float
    rate: float
    note: str
    square: bool = False


def format_power(value: float) -> str:
    """With the unit's letter: 2.5k, 30M."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def roofline(title: str, points: Sequence[Point], gemm: float, copy: float) -> str:
    """Operations a byte against operations a second, below what this machine's copy and matrix product allow."""
    names = list(dict.fromkeys(point.name for point in points))
    corner = gemm / copy
    x = scale([*(point.intensity for point in points), corner / 4, corner * 4], LEFT, WIDTH - RIGHT, 1.5)
    y = scale([*(point.rate for point in points), gemm], HEIGHT - BOTTOM, TOP, 1.6)
    drawing = [*frame(x, y, ("operations a byte", "operations a second"), (format_power, format_power))]
    start = max(x.low, y.low / copy)
    roof = [(x(start), y(start * copy)), (x(corner), y(gemm)), (x(x.high), y(gemm))]
    drawing.append(line(roof, "roof"))
    for point in reversed(points):
        style = colour(names, point.name)
        drawing.append(marker(x(point.intensity), y(point.rate), style, point.note, point.square))
    return figure(title, drawing, HEIGHT, [(colour(names, name), name) for name in names])


@dataclass(frozen=True)
class Row:
    """A labelled row of `bars` or `dots`.

    Attributes:
        values: contender -> value; of a bar the one under "".
        low, high: of a bar, its spread.
        goal: of a bar, what to reach.
    """

    label: str
    values: Mapping[str, float] = field(default_factory=dict)
    low: float = 0.0
    high: float = 0.0
    goal: float | None = None

    @property
    def style(self) -> str:
        return "plain" if self.goal is None else "met" if self.values[""] >= self.goal else "missed"


ROW, LETTER = 30, 6.1


def label(row: Row, at: float) -> str:
    """The row's label above its drawing, as far as it fits."""
    most = int((WIDTH - 16) / LETTER)
    short = row.label if len(row.label) <= most else row.label[: most - 1] + "…"
    return text(8, at + 11, short)


def bars(title: str, rows: Sequence[Row], show: Callable[[float], str]) -> str:
    """Bars from 1 on a logarithmic scale, with spread, goal and value."""
    values = [value for row in rows for value in (*row.values.values(), row.low, row.high, row.goal or 1.0)]
    x = scale([*values, 0.5, 2.0], 8, WIDTH - 58, 1.02)
    drawing, one = [], x(1.0)
    for i, row in enumerate(rows):
        at, end = ROW * i, x(row.values[""])
        middle = at + 21
        note = f"{row.label}: {show(row.values[''])}, 20 to 80 %: {row.low:.2f} to {row.high:.2f}"
        drawing.append(label(row, at))
        drawing.append(
            f'<rect x="{number(min(one, end))}" y="{number(middle - 5)}" width="{number(max(abs(end - one), 1))}" '
            f'height="10" class="{row.style}"><title>{escape(note)}</title></rect>'
        )
        drawing.append(line([(x(row.low), middle), (x(row.high), middle)], "spread"))
        if row.goal is not None:
            drawing.append(line([(x(row.goal), middle - 7), (x(row.goal), middle + 7)], "goal"))
        furthest = max(x(row.high), end, one, 0 if row.goal is None else x(row.goal))
        drawing.append(text(furthest + 6, middle + 4, show(row.values[""])))
        drawing.append(line([(one, middle - 7), (one, middle + 7)], "one"))
    return figure(title, drawing, ROW * len(rows) + 4)


def dots(title: str, rows: Sequence[Row], show: Callable[[float], str]) -> str:
    """A point a contender in each row, on a logarithmic scale."""
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    x = scale((value for row in rows for value in row.values.values()), 16, WIDTH - 16)
    height = ROW * len(rows)
    drawing = []
    for value in ticks(x.low, x.high):
        drawing.append(line([(x(value), 0), (x(value), height)], "grid"))
        drawing.append(text(x(value), height + 14, show(value), "middle"))
    for i, row in enumerate(rows):
        drawing.append(label(row, ROW * i))
        for name, value in reversed(row.values.items()):
            if value > 0:
                note = f"{row.label}, {name}: {show(value)}"
                drawing.append(marker(x(value), ROW * i + 21, colour(names, name), note))
    return figure(title, drawing, height + 20, [(colour(names, name), name) for name in names])
