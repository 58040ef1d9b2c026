"""The `seqops` command. Nothing else in seqops imports this module, and rich loads only when something is drawn."""

import json
import shutil
import sys
import textwrap
from importlib import import_module

import click

import seqops
from seqops.core import info as core_info

LATER = {"tune": "seqops.tune.cli"}  # command -> its module


class LazyGroup(click.Group):
    """Imports what is in LATER when it is asked for: the other commands do not need it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *LATER})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in LATER:
            return getattr(import_module(LATER[cmd_name]), cmd_name)
        return super().get_command(ctx, cmd_name)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.version_option(seqops.__version__, prog_name="seqops")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Fast sequence operators for PyTorch."""
    if ctx.invoked_subcommand is None:
        click.echo("\n".join(_contents(ctx, min(shutil.get_terminal_size((100, 24)).columns, 100))))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def info(as_json: bool) -> None:
    """Versions, devices, operators x backends, and why a backend is missing."""
    report = core_info.collect(seqops.__version__)
    if as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        _draw(report)


def _contents(ctx: click.Context, width: int) -> list[str]:
    """What there is: operators by room, modules with their papers and operators, commands. Read from the code."""
    from seqops import catalog

    operators, modules = catalog.operators(), catalog.modules()
    lines = [f"seqops {seqops.__version__}: fast sequence operators for PyTorch."]
    for room, title in catalog.rooms().items():
        lines += ["", click.style(f"{title} (seqops.*)", bold=True)]
        lines += _entries([(each.name, each.summary, "") for each in operators if each.room == room], width)
    lines += ["", click.style("Modules (seqops.nn.*), each with its paper and the operators that it runs", bold=True)]
    lines += _entries(
        [(m.name, m.summary, f"{'; '.join(map(str, m.papers[:1]))}: {', '.join(m.operators)}") for m in modules], width
    )
    shown = {name: main.get_command(ctx, name) for name in main.list_commands(ctx)}
    commands = [(f"seqops {name}", command.get_short_help_str(100), "") for name, command in shown.items()]
    lines += ["", click.style("Commands", bold=True)]
    lines += _entries([*commands, ("help(seqops.lstm)", "In Python: formula, arguments, an example.", "")], width)
    return lines


def _entries(rows: list[tuple[str, str, str]], width: int) -> list[str]:
    """Names and, in a column, what they are: a line, or with more to say below it all of it."""
    column = max(len(name) for name, _, _ in rows) + 4
    room = max(width - column, 30)
    lines = []
    for name, text, more in rows:
        shortened = textwrap.shorten(text, room, placeholder=" …", break_on_hyphens=False)
        first, *others = textwrap.wrap(text, room, break_on_hyphens=False) if more else [shortened]
        lines += [f"  {name:<{column - 2}}{first}", *(" " * column + line for line in others)]
        lines += [
            " " * column + click.style(line, dim=True) for line in textwrap.wrap(more, room, break_on_hyphens=False)
        ]
    return lines


def _draw(report: dict[str, dict]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    # A pipe or a file gets the same text without colours and lines, and wide enough that nothing wraps.
    console = Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=240, force_terminal=False)
    box = SIMPLE_HEAD if console.is_terminal else None

    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column()
    for name, version in report["versions"].items():
        facts.add_row(name, version or "not installed")
    for name, value in report["cpu"].items():
        facts.add_row("CPU" if name == "model" else name.replace("_", " "), str(value))
    for device, gpu in report["gpus"].items():
        described = f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB"
        facts.add_row(device, described)
    if not report["gpus"]:
        facts.add_row("GPUs", "none that this torch can use")
    kernels, cache = report["gpu_kernels"], report["cache"]
    facts.add_row("CUDA kernels", kernels["launch"] or "can be launched")
    facts.add_row("CUDA simulator", kernels["simulator"] or "takes CPU tensors")
    facts.add_row("Triton interpreter", "on" if kernels["interpreter"] else "off")
    facts.add_row("kernel cache", f"{cache['folder']}: {cache['files']} files, {cache['bytes'] / (1 << 20):.1f} MB")
    for name, value in report["environment"].items():
        facts.add_row(name, value)
    console.print(facts, highlight=False)
    console.print()

    operators = report["operators"]
    backends = list(dict.fromkeys(name for row in operators.values() for name in row))
    table = Table(box=box, pad_edge=False)
    table.add_column("operator", style="bold")
    for name in backends:
        table.add_column(name)
    reasons: dict[tuple[str, str], list[str]] = {}
    for operator, row in operators.items():
        table.add_row(operator, *("yes" if row[name] is None else "no" for name in backends))
        for name in backends:
            if row[name] is not None:
                reasons.setdefault((name, row[name]), []).append(operator)
    console.print(table, highlight=False)
    if reasons:
        console.print()
    for (name, reason), missing in reasons.items():
        which = "" if len(missing) == len(operators) else f" ({', '.join(missing)})"
        console.print(f"{name}{which}: {reason}", highlight=False)
