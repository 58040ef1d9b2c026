"""The HTML page of one or several runs: one file, plots inside as SVG, nothing fetched from anywhere."""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import harness, plots
from bench.record import QUANTITIES, Miss, Record, Result, check_fit, find_misses, memory_ratio
from bench.tables import MODE_TITLES, describe, format_bytes, format_ratio, format_seconds, format_step, summarise

STYLE = """
:root { --text: #1f2328; --quiet: #59636e; --page: #fff; --panel: #f6f8fa; --rule: #d8dee4; --met: #1a7f37;
  --missed: #c62828; --plain: #1f6feb; --0: #1f6feb; --1: #b5552b; --2: #7d5ba6; --3: #2f8f8b; --4: #a07d10;
  --5: #c2407f; --6: #5b7083; --7: #5f8f2f; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --quiet: #9aa5b1; --page: #0d1117; --panel: #161b22;
  --rule: #30363d; --met: #4ac26b; --missed: #ff7b72; --plain: #58a6ff; --0: #58a6ff; --1: #f0883e; --2: #bc8cff;
  --3: #39c5bb; --4: #d9b343; --5: #f778ba; --6: #9fb3c8; --7: #8bc34a; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1240px;
  margin: 0 auto; padding: 1em; }
h1 { margin: 0; } h2 { margin: 1.6em 0 .3em; } h2 small { font-weight: normal; color: var(--quiet); font-size: 60%; }
h3 { margin: 1em 0 .2em; font-size: 100%; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { padding: 3px 8px; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top; }
th { background: var(--panel); white-space: nowrap; cursor: pointer; } th.n { text-align: right; }
th[aria-sort=ascending]::after { content: " ▲"; }
th[aria-sort=descending]::after { content: " ▼"; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
a { color: var(--plain); } small, .quiet { color: var(--quiet); }
b.met { color: var(--met); } b.missed, .failed { color: var(--missed); }
.wide { overflow-x: auto; max-width: 100%; }
.bar { position: sticky; top: 0; background: var(--page); padding: .5em 0; z-index: 1; }
input { font: inherit; color: inherit; background: var(--panel); border: 1px solid var(--rule); border-radius: 6px;
  padding: .35em .6em; width: min(100%, 26em); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 380px), 1fr)); gap: .6em;
  align-items: start; }
figure { margin: 0; background: var(--panel); border-radius: 8px; padding: .5em; min-width: 0; }
figcaption { font-size: 13px; } figcaption span { margin-left: .9em; white-space: nowrap; color: var(--quiet); }
.key { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .3em; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 11.5px; fill: var(--text); }
svg text.quiet { fill: var(--quiet); } .middle { text-anchor: middle; } .end { text-anchor: end; }
.grid { stroke: var(--rule); stroke-width: .7; } .one { stroke: var(--quiet); }
.roof { stroke: var(--quiet); stroke-width: 1.6; fill: none; }
.goal { stroke: var(--text); stroke-width: 2; } .spread { stroke: var(--text); stroke-width: 1; }
rect.met { fill: var(--met); } rect.missed { fill: var(--missed); } rect.plain { fill: var(--plain); }
.line { fill: none; stroke-width: 1.6; }
summary { cursor: pointer; font-weight: 600; margin: .5em 0; }
""" + "".join(
    f".c{i} {{ fill: var(--{i}); }} i.c{i} {{ background: var(--{i}); }}\n"
    f".line.c{i} {{ fill: none; stroke: var(--{i}); }}\n"
    for i in range(plots.COLOURS)
)

# Sorts a table by the column whose header is pressed, by data-v where a cell has one; hides what the filter leaves out.
SCRIPT = """
function key(row, i) { var c = row.cells[i], v = c ? c.dataset.v : undefined;
  return v === undefined ? (c ? c.textContent : "") : v === "" ? null : Number(v); }
function empty(v) { return v === null || v === ""; }
function compare(a, b) { if (a === b) return 0; if (empty(a)) return 2; if (empty(b)) return -2;
  return typeof a === "number" && typeof b === "number" ? (a < b ? -1 : 1) : String(a).localeCompare(String(b)); }
function sort(th) { var up = th.getAttribute("aria-sort") !== "ascending", i = th.cellIndex;
  var table = th.closest("table");
  table.querySelectorAll("th").forEach(function (o) { o.removeAttribute("aria-sort"); });
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  var body = table.tBodies[0], rows = Array.from(body.rows).map(function (r) { return [key(r, i), r]; });
  rows.sort(function (a, b) { var c = compare(a[0], b[0]); return Math.abs(c) === 2 ? c : up ? c : -c; });
  rows.forEach(function (r) { body.appendChild(r[1]); }); }
function filter(words) { var wanted = words.toLowerCase().split(/[\\s,]+/).filter(Boolean);
  document.querySelectorAll("[data-op]").forEach(function (e) { var op = e.dataset.op.toLowerCase();
    e.hidden = wanted.length > 0 && !wanted.some(function (w) { return op.indexOf(w) >= 0; }); }); }
document.querySelectorAll("th").forEach(function (th) { th.tabIndex = 0;
  th.onclick = function () { sort(th); };
  th.onkeydown = function (e) { if (e.key === "Enter" || e.key === " ") { e.preventDefault(); sort(th); } }; });
var box = document.getElementById("filter");
box.oninput = function () { filter(box.value); };
if (box.value) filter(box.value);
"""

MEGABYTE = 1 << 20
SHORT_MODES = {mode: title.replace("forward + backward", "training step") for mode, title in MODE_TITLES.items()}


@dataclass(frozen=True)
class Cell:
    """One cell of a table: its HTML, and a number that it is sorted by. Without one it is text, sorted as such.

    Attributes:
        note: what the pointer shows.
    """

    text: str
    key: float | None = None
    number: bool = True
    note: str = ""

    @property
    def html(self) -> str:
        if not self.number or self.key is None:
            return f"<td>{self.text}"
        note = f' title="{html.escape(self.note)}"' if self.note else ""
        return f"<td class=n data-v={self.key:.4g}{note}>{self.text}"


def words(text: str) -> Cell:
    return Cell(html.escape(text), number=False)


EMPTY = Cell("")


def make_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[Cell]]]) -> str:
    """Rows are (operator, or "" where the filter leaves them, cells). Columns without an entry are left out.

    HTML closes cells and rows by itself, and numbers need no quotes: a third of the page.
    """
    rows = list(rows)
    used = [i for i in range(len(head)) if any(cells[i].text for _, cells in rows)]
    head, rows = [head[i] for i in used], [(op, [cells[i] for i in used]) for op, cells in rows]
    numbers = [any(cells[i].number and cells[i].key is not None for _, cells in rows) for i in range(len(head))]
    titles = "".join(
        f"<th{' class=n' if is_number else ''}>{html.escape(title)}"
        for title, is_number in zip(head, numbers, strict=True)
    )
    body = ""
    for op, cells in rows:
        body += f'<tr data-op="{html.escape(op)}">' if op else "<tr>"
        body += "".join(cell.html for cell in cells)
    return f'<div class="wide"><table><thead><tr>{titles}</thead><tbody>{body}</tbody></table></div>'


@dataclass(frozen=True)
class Measured:
    """A result and the run that it is of."""

    result: Result
    record: Record

    def rate(self, name: str) -> float:
        """Operations a second."""
        return self.result.gemm_fraction[name] * self.record.rates["gemm"]

    def intensity(self, name: str) -> float:
        """Operations a byte."""
        return self.rate(name) / (self.result.copy_fraction[name] * self.record.rates["copy"])


def merge(records: Sequence[Record]) -> list[Measured]:
    """All results. Of a case that several runs measured, in the same suite, that of the last run given.

    Raises:
        ValueError: runs of different machines, threads or builds of torch.
    """
    found: dict[tuple[str, ...], Measured] = {}
    for record in records:
        check_fit(records[0], record)
        for result in record.results:
            found[record.suite, result.op, result.title, result.mode] = Measured(result, record)
    return list(found.values())


# ---- tables


def describe_seconds(seconds: dict[str, float]) -> Cell:
    spread = f"{format_seconds(seconds['p20'])} to {format_seconds(seconds['p80'])}, {seconds['rounds']} rounds"
    return Cell(format_seconds(seconds["median"]), seconds["median"], note=spread)


def describe_ours(result: Result) -> Cell:
    """With the time by the step, where steps bound it, and the time to stay within."""
    cell = describe_seconds(result.seconds[harness.OURS])
    parts = [f"{format_step(result)} a step"] if result.steps is not None else []
    parts += [f"goal {format_seconds(result.time_goal)}"] if result.time_goal is not None else []
    return Cell(cell.text + (f"<br><small>{'; '.join(parts)}</small>" if parts else ""), cell.key, note=cell.note)


def describe_check(result: Result) -> Cell:
    check = result.check
    if not check:
        return EMPTY
    return Cell(f"{check['error']:.1e}", check["error"], note=f"{check['name']}; at most {check['bound']:.1e}")


def share(fractions: dict[str, float], peer: str | None) -> Cell:
    if harness.OURS not in fractions:
        return EMPTY
    shown = [f"{fractions[name]:.1%}" for name in (harness.OURS, peer) if name in fractions]
    return Cell(" / ".join(shown), fractions[harness.OURS])


def roof_fraction(result: Result) -> dict[str, float]:
    """contender -> its rate over the least of what the matrix product and the copy allow at its operations a byte."""
    return {name: max(share, result.copy_fraction[name]) for name, share in result.gemm_fraction.items()}


def goal_class(value: float, goal: float | None) -> str:
    return "" if goal is None else "met" if value >= goal else "missed"


HEAD = (
    *("case", "mode", "against", "ours", "peer", "ratio", "20 to 80 %", "goal", "of the roof, ours / peer"),
    *("matrix product", "copy", "memory of a step, ours / peer", "error against float64"),
)


def result_cells(result: Result, peer: str | None) -> list[Cell]:
    seconds = result.seconds
    start = [words(result.title), words(SHORT_MODES[result.mode]), words(peer or ""), describe_ours(result)]
    fractions = (roof_fraction(result), result.gemm_fraction, result.copy_fraction)
    shares = [share(of, peer) for of in fractions]
    weights = [result.memory[name] for name in (harness.OURS, peer) if name in result.memory]
    memory = Cell(" / ".join(format_bytes(size) for size in weights), weights[0]) if weights else EMPTY
    if peer is None:
        return [*start, EMPTY, EMPTY, EMPTY, EMPTY, *shares, memory, describe_check(result)]
    ratio, goal = result.ratios[peer], result.goals.get(peer)
    style = goal_class(ratio["median"], goal)
    return [
        *start,
        describe_seconds(seconds[peer]),
        Cell(f"<b{f' class={style}' if style else ''}>{format_ratio(ratio['median'])}</b>", ratio["median"]),
        Cell(f"{ratio['p20']:.2f} to {ratio['p80']:.2f}", ratio["p20"]),
        EMPTY if goal is None else Cell(f"{goal:.3g}x", goal),
        *shares,
        memory if memory_ratio(result, peer) or not weights else EMPTY,
        describe_check(result),
    ]


def result_rows(results: Iterable[Result]) -> Iterable[tuple[str, list[Cell]]]:
    for result in results:
        if result.error:
            failed = Cell(f'<span class="failed">failed, not timed: {html.escape(result.error)}</span>', number=False)
            yield "", [words(result.title), words(SHORT_MODES[result.mode]), failed, *[EMPTY] * (len(HEAD) - 3)]
        elif result.seconds:
            for peer in result.ratios or (None,):
                yield "", result_cells(result, peer)


def describe_reached(miss: Miss, value: float, text: str = "{:.2f}") -> str:
    return format_seconds(value) if miss.quantity == "seconds" else text.format(value)


def missed_goals(records: Sequence[Record]) -> str:
    """The goals not reached, by how much, and the reason where one is known."""
    rows = []
    for miss in (miss for record in records for miss in find_misses(record)):
        sign = "≤" if miss.quantity in ("memory", "seconds") else "≥"
        cells = [
            words(miss.result.title),
            words(SHORT_MODES[miss.result.mode]),
            words(miss.peer),
            words(QUANTITIES[miss.quantity]),
            Cell(f'<b class="missed">{describe_reached(miss, miss.value)}</b>', miss.value),
            Cell(f"{sign} {describe_reached(miss, miss.goal, '{:.3g}')}", miss.goal),
            Cell(f"{abs(miss.value / miss.goal - 1):.0%}", abs(miss.value / miss.goal - 1)),
            words(miss.cause or "not known yet"),
        ]
        rows.append((miss.result.op, cells))
    if not rows:
        return "<p>None.</p>"
    return make_table(("case", "mode", "against", "what", "reached", "goal", "short by", "cause"), rows)


def middle(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def overview(sections: dict[str, list[Measured]]) -> str:
    """A row an operator: how many cases and goals, and its ratios."""
    rows = []
    for op, found in sections.items():
        timed = [each.result for each in found if not each.result.error]
        ratios = [ratio["median"] for result in timed for ratio in result.ratios.values()]
        goals = [(r.ratios[peer]["median"], goal) for r in timed for peer, goal in r.goals.items() if peer in r.ratios]
        met = sum(value >= goal for value, goal in goals)
        name = html.escape(op)
        cells = [Cell(f'<a href="#{name}">{name}</a>', number=False), Cell(str(len(found)), len(found))]
        for value in (min(ratios), middle(ratios), max(ratios)) if ratios else ():
            cells.append(Cell(format_ratio(value), value))
        cells += [EMPTY] * (5 - len(cells))
        style = goal_class(met, len(goals)) if goals else ""
        cells.append(Cell(f'<b class="{style}">{met} of {len(goals)}</b>', met / len(goals)) if goals else EMPTY)
        shares = [roof_fraction(result)[harness.OURS] for result in timed if result.gemm_fraction]
        cells.append(Cell(f"{max(shares):.0%}", max(shares)) if shares else EMPTY)
        failed = len(found) - len(timed)
        cells.append(Cell(f'<span class="failed">{failed}</span>', failed) if failed else EMPTY)
        rows.append((op, cells))
    head = ("operator", "measurements", "least ratio", "middle", "largest", "goals met", "best of the roof", "failed")
    return make_table(head, rows)


def module_table(records: Sequence[Record]) -> str:
    """A row a module: its times by length, one step, what it keeps. Empty where no run measured modules."""
    from bench import modules

    found = modules.summaries(record for record in records if record.suite == harness.MODULES)
    if not found:
        return ""
    head, rows = modules.table(found)
    made = []
    for name, row in rows:
        cells = [Cell(text, value, number=i > 0) for i, (text, value) in enumerate(row)]
        cells[0] = Cell(f'<a href="#{html.escape(name)}">{html.escape(name)}</a>', number=False)
        made.append((name, cells))
    text = html.escape(modules.explain(found))
    return f"<h2>Modules</h2><p>{text}</p>{make_table(head, made)}"


# ---- plots


def plot_ratios(results: Sequence[Result]) -> Iterable[str]:
    """Bars of peer's time over ours, a plot a mode; of cases that are not one of several lengths."""
    for mode in harness.MODES:
        rows = [
            plots.Row(
                f"{result.title}  ({peer})".removeprefix(f"{result.op} "),
                {"": ratio["median"]},
                ratio["p20"],
                ratio["p80"],
                result.goals.get(peer),
            )
            for result in results
            if result.mode == mode and result.length is None
            for peer, ratio in result.ratios.items()
        ]
        if rows:
            yield plots.bars(f"{SHORT_MODES[mode]}: times faster than the peer", rows, format_ratio)


def by_length(results: Iterable[Result], field: str) -> dict[str, list[tuple[float, float]]]:
    """contender -> (length, value), ours first."""
    series: dict[str, list[tuple[float, float]]] = {harness.OURS: []}
    for result in results:
        for name, value in getattr(result, field).items() if result.length is not None else ():
            value = value["median"] if isinstance(value, dict) else value / MEGABYTE
            series.setdefault(name, []).append((result.length, value))
    return {name: sorted(points) for name, points in series.items() if points}


def plot_lengths(results: Sequence[Result]) -> Iterable[str]:
    for mode in harness.MODES:
        series = by_length((result for result in results if result.mode == mode), "seconds")
        if any(len(points) > 1 for points in series.values()):
            title = f"{SHORT_MODES[mode]}: time against length"
            yield plots.lines(title, series, ("length", "time"), ("{:g}".format, format_seconds))


def plot_rates(found: Sequence[Measured]) -> Iterable[str]:
    """Rates below the roof of this machine, ours and the peers'; training steps as squares."""
    points = []
    for each in found:
        result = each.result
        for name in sorted(result.gemm_fraction, key=lambda name: name != harness.OURS):
            if result.gemm_fraction[name] > 0 and result.copy_fraction[name] > 0:
                rate = each.rate(name)
                note = f"{name}, {result.title}, {SHORT_MODES[result.mode]}: {rate / 1e9:.3g} GFLOP/s"
                trained = result.mode in harness.WITH_GRADIENTS
                points.append(plots.Point(name, each.intensity(name), rate, note, trained))
    if points:
        points.sort(key=lambda point: point.name != harness.OURS)
        roof = [max(each.record.rates[name] for each in found) for name in ("gemm", "copy")]
        yield plots.roofline("rate below this machine's copy and matrix product", points, *roof)


def plot_memory(results: Sequence[Result]) -> Iterable[str]:
    series = by_length(results, "memory")
    if any(len(points) > 1 for points in series.values()):
        yield plots.lines(
            "memory of a training step against length", series, ("length", "peak"), ("{:g}".format, format_size)
        )
    rows = [
        plots.Row(result.title.removeprefix(f"{result.op} "), order(result.memory))
        for result in results
        if result.memory and result.length is None
    ]
    if rows:
        yield plots.dots("peak memory of a training step", rows, format_size)


def order(values: dict[str, int]) -> dict[str, float]:
    """Ours first, in megabytes."""
    names = dict.fromkeys((harness.OURS, *values))
    return {name: values.get(name, 0) / MEGABYTE for name in names}


def format_size(megabytes: float) -> str:
    return f"{megabytes:.3g} MB"


# ---- the page


def section(op: str, found: Sequence[Measured]) -> str:
    results = [each.result for each in found]
    timed = [each for each in found if not each.result.error and each.result.seconds]
    shown = [each.result for each in timed]
    drawn = [*plot_ratios(shown), *plot_lengths(shown), *plot_rates(timed), *plot_memory(shown)]
    name = html.escape(op)
    return (
        f'<section data-op="{name}" id="{name}"><h2>{name} <small>{len(results)} measurements</small></h2>'
        f'<div class="plots">{"".join(drawn)}</div>'
        f"<details><summary>All results of {name}</summary>{make_table(HEAD, result_rows(results))}</details></section>"
    )


def run_row(record: Record) -> tuple[str, list[Cell]]:
    machine, rates, versions = record.machine, record.rates, record.machine["versions"]
    environment = ", ".join(f"{key}={value}" for key, value in machine["environment"].items()) or "none"
    chosen = [f"{record.suite}, {'quick' if record.settings.get('quick') else 'all rounds'}"]
    changed = " with changes" if record.commit["dirty"] else ""
    return "", [
        words(record.date.replace("T", " ")[:16]),
        words(", ".join(chosen)),
        words(f"{machine.get('gpu', '')} {machine['cpu']}, {machine['cores']} cores".strip()),
        Cell(str(machine["threads"]), machine["threads"]),
        words(f"{machine['seqops_isa']}; torch {machine['torch_isa']}"),
        words(f"torch {versions['torch']}, Python {versions['python']}, seqops {versions['seqops']}"),
        words(f"{record.commit['id'][:10]}{changed}"),
        Cell(f"{rates['gemm'] / 1e9:.0f} GFLOP/s", rates["gemm"]),
        Cell(f"{rates['copy'] / 1e9:.0f} GB/s", rates["copy"]),
        words(environment),
        words(summarise(record)),
    ]


RUN_HEAD = (
    *("date", "suite", "machine", "threads", "instruction sets", "versions", "commit", "matrix product", "copy"),
    *("environment", "result"),
)


def write_html(path: Path, *records: Record) -> None:
    """Writes the page.

    Raises:
        ValueError: runs that do not belong on one page.
    """
    sections: dict[str, list[Measured]] = {}
    for each in merge(records):
        sections.setdefault(each.result.op, []).append(each)
    machine = describe(records[0]).partition("; matrix product")[0].partition("; commit")[0]
    is_module = {result.op for record in records if record.suite == harness.MODULES for result in record.results}
    operators = {op: found for op, found in sections.items() if op not in is_module}
    table = f"<h2>Operators</h2>{overview(operators)}" if operators else ""
    parts = "".join(section(op, found) for op, found in sections.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>seqops benchmark</title><style>{STYLE}</style></head><body>
<h1>seqops benchmark</h1>
<p class="quiet">{html.escape(machine)}</p>
<p>A ratio is the peer's time over ours, taken inside each round of interleaved runs: above 1 ours is faster. Bars show
the median and the 20 to 80 % spread, upright strokes the goals. Every case was compared with the float64 reference
before it was timed. Rates count the operations of the products, and each tensor's bytes once; the roof is this
machine's copy and matrix product, measured in the same run; the share of the roof is the larger one of the shares of
these two. Circles are forward passes, squares have a backward.</p>
<div class="bar"><input id="filter" type="search" placeholder="Show operators named…" aria-label="names to show"></div>
<h2>Runs</h2>{make_table(RUN_HEAD, map(run_row, records))}
{table}{module_table(records)}
<h2>Missed goals</h2><details><summary>Goals not reached, and why</summary>{missed_goals(records)}</details>
{parts}
<script>{SCRIPT}</script>
</body></html>
""",
        encoding="utf-8",
    )
