"""`seqops tune`: finds the constants of an operator's kernels and stores them.

Results go to the standard output, as tables or with --json as one JSON document; progress goes to the standard error.
Exit codes: 0; 1 every candidate failed, or the file cannot be written; 2 wrong usage; 3 nothing fits the shape; 130
interrupted.
"""

from __future__ import annotations

import io
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from . import actions, report, search
from .progress import Progress
from .store import Store, shared
from .target import Flag, Target, targets
from .words import choose_targets, find_place, match_dtype, nearest, place_of

FAILED, INFEASIBLE, INTERRUPTED = 1, 3, 130
DIRECTIONS = ("forward", "backward")

# What goes with an action that is not tuning, by the names of parameters; with tuning, all but these and --yes.
ACTIONS = {
    "list_devices": ("as_json",),
    "show": ("operator", "forward", "backward", "device_name", "as_json"),
    "clear": ("operator", "forward", "backward", "device_name", "dry_run", "yes", "as_json"),
    "probe": ("device_name", "dry_run", "output", "as_json"),
}


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends the process with the code of the shell, wherever it comes."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)


def make_writable() -> None:
    """What the standard output cannot encode, as in a path, is replaced there instead of ending the command."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


# ---- the shape's flags, which depend on the operator


class TuneCommand(click.Command):
    """Takes the flags of the operator that is on the command line."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with interruptible():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        with interruptible():
            make_writable()
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["operator"] = self._find_operator(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            others = [t.op for t in targets() for flag in t.flags if f"--{flag.name}" == error.option_name]
            if others and ctx.meta["operator"] is None:
                where = f"{error.option_name} is part of a shape: name the operator, as in seqops tune {others[0]}"
                raise click.UsageError(where, ctx) from None
            raise

    def _find_operator(self, args: Sequence[str]) -> str | None:
        """The operator among the arguments, wherever it stands."""
        known = {target.op for target in targets()}
        valued = {name for p in self.params if isinstance(p, click.Option) and not p.is_flag for name in p.opts}
        valued |= {f"--{flag.name}" for target in targets() for flag in target.flags if flag.type is not bool}
        words = [word for word, before in zip(args, ["", *args], strict=False) if before not in valued]
        return next((word for word in words if word in known), None)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        if "shape flags" not in ctx.meta:
            ctx.meta["shape flags"] = [make_option(flag) for flag in flags_of(ctx.meta.get("operator"))]
        own = super().get_params(ctx)
        return [*own[:1], *ctx.meta["shape flags"], *own[1:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        shape = ctx.meta.get("shape flags", [])
        sections = {f"Shape of {ctx.meta.get('operator')}": shape}
        sections["Options"] = [param for param in self.get_params(ctx) if param not in shape]
        for title, params in sections.items():
            options = [param for param in params if isinstance(param, click.Option)]
            rows = [row for option in options if (row := option.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if ctx.meta.get("operator") is None:
            names = ", ".join(dict.fromkeys(target.op for target in targets()))
            formatter.write_paragraph()
            formatter.write_text(f"Operators: {names}. Flags of the shape: seqops tune OP --help")


def flags_of(operator: str | None) -> list[Flag]:
    """Of all kernels of an operator, each name once."""
    found: dict[str, Flag] = {}
    for target in targets():
        if target.op == operator:
            found = {flag.name: flag for flag in target.flags} | found
    return list(found.values())


def make_option(flag: Flag) -> click.Option:
    if flag.type is bool:
        names = [f"--{flag.name}/--no-{flag.name}", flag.key]
        return click.Option(names, default=flag.default, show_default=True, help=flag.help)
    kind: Any = click.IntRange(min=flag.least) if flag.type is int else click.STRING
    if flag.choices:
        kind = click.Choice(flag.choices)
    metavar = "N" if flag.type is int else None
    names = [f"--{flag.name}", flag.key]
    return click.Option(names, type=kind, default=flag.default, show_default=True, help=flag.help, metavar=metavar)


def finite(ctx: click.Context, param: click.Parameter, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter(f"{value} is no number of seconds.", ctx, param)
    return value


def check_together(ctx: click.Context) -> None:
    """Refuses options that mean nothing beside the action."""
    given = [param for param in ctx.command.get_params(ctx) if is_given(ctx, param)]
    names = {str(param.name): param.opts[0] if isinstance(param, click.Option) else "an operator" for param in given}
    actions_given = [names[action] for action in (*ACTIONS, "everything") if action in names]
    if len(actions_given) > 1:
        raise click.UsageError(f"{' and '.join(actions_given)} do not go together")
    action = next((action for action in ACTIONS if action in names), None)
    if action is not None:
        alien = [option for name, option in names.items() if name not in (action, *ACTIONS[action])]
        if alien:
            raise click.UsageError(f"{names[action]} does not take {' and '.join(alien)}")
    elif "yes" in names:
        raise click.UsageError("--yes goes with --clear alone")
    elif "everything" in names and "operator" in names:
        raise click.UsageError("--all takes no operator")
    if "dry_run" in names and "output" in names:
        raise click.UsageError("--dry-run and --output do not go together")


def is_given(ctx: click.Context, param: click.Parameter) -> bool:
    return ctx.get_parameter_source(str(param.name)) is ParameterSource.COMMANDLINE


def is_first_process() -> bool:
    """Under torchrun the first process of a machine works for all."""
    rank = os.environ.get("LOCAL_RANK", "")
    return not rank.isdecimal() or int(rank) == 0


# ---- the command


@click.command("tune", cls=TuneCommand)
@click.argument("operator", metavar="[OP]", required=False)
@click.option("--all", "everything", is_flag=True, help="Every operator, at its default shape.")
@click.option("--forward", is_flag=True, help="Only the forward pass.")
@click.option("--backward", is_flag=True, help="Only the backward pass.")
@click.option("--backend", metavar="NAME", help="cuda, triton or cpu.  [default: the one that serves the device]")
@click.option("--dtype", metavar="TYPE", help="bf16, fp16, fp32, fp64, or torch's name.  [default: the first it has]")
@click.option("--device", "device_name", metavar="NAME", help="GPU by name, cuda, cuda:1, or cpu.  [default: the GPU]")
@click.option(
    "--top",
    default=8,
    type=click.IntRange(1, 1000),
    metavar="N",
    show_default=True,
    help="Candidates of the solver that are tried.",
)
@click.option(
    "--seconds",
    default=30.0,
    type=click.FloatRange(0, min_open=True),
    callback=finite,
    metavar="S",
    show_default=True,
    help="Of timing, for each operator.",
)
@click.option("--dry-run", is_flag=True, help="Store nothing.")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Write to a file in this folder, not to the user's: how the files in seqops/tune/configs are made.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--list-devices", is_flag=True, help="Presets, and what is here.")
@click.option("--show", is_flag=True, help="What is stored, of OP or of all.")
@click.option("--clear", is_flag=True, help="Remove what was stored, of OP or of all; what is shipped stays.")
@click.option("--yes", is_flag=True, help="With --clear: do not ask.")
@click.option("--probe", is_flag=True, help="Measure the latencies of the device, which the models then use.")
@click.pass_context
def tune(
    ctx: click.Context,
    operator: str | None,
    everything: bool,
    forward: bool,
    backward: bool,
    backend: str | None,
    dtype: str | None,
    device_name: str | None,
    top: int,
    seconds: float,
    dry_run: bool,
    output: Path | None,
    as_json: bool,
    list_devices: bool,
    show: bool,
    clear: bool,
    yes: bool,
    probe: bool,
    **shape: Any,
) -> None:
    """Find the fastest tile constants for a kernel and a shape, and store them.

    A solver ranks what fits the device by a model of it. Where the device is here, the best few are compiled, checked
    against the reference, and timed; elsewhere they are compiled if CuPy is installed.
    """
    check_together(ctx)
    if device_name is not None and not device_name.strip():
        raise click.UsageError("--device: expected the name of a GPU, cuda, cuda:1 or cpu, got nothing")
    if operator is not None and operator not in (known := [target.op for target in targets()]):
        raise click.UsageError(nearest("operator", operator, known))
    if not (list_devices or show or clear or is_first_process()):
        return
    directions = [name for name, on in zip(DIRECTIONS, (forward, backward), strict=True) if on]
    store = None if dry_run else shared() if output is None else Store(output, output)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
        warnings.filterwarnings("always", category=RuntimeWarning, module="seqops")
        if list_devices:
            return actions.print_devices(as_json)
        if show:
            return actions.print_entries(targets(), operator, directions, device_name, as_json)
        if clear:
            return actions.remove_entries(operator, directions, device_name, dry_run, yes, as_json)
        if probe:
            ctx.exit(actions.measure_latencies(device_name, store, as_json))
        if operator is None and not everything:
            names = ", ".join(dict.fromkeys(target.op for target in targets()))
            raise click.UsageError(f"name an operator ({names}), or --all")
        place = find_place(device_name)
        chosen = choose_targets(targets(), operator, directions or DIRECTIONS, place, backend)
        # Every data type is looked at before anything is done.
        dtypes = [match_dtype(target, dtype) for target in chosen]
        work = Work(place, top, seconds, store, as_json)
        code = work.run(chosen, dtypes, shape)
    ctx.exit(code)


class Work:
    """The kernels one after the other, and what is printed of each."""

    def __init__(self, place: search.Place, top: int, seconds: float, store: Store | None, as_json: bool) -> None:
        self.place, self.top, self.seconds, self.store, self.as_json = place, top, seconds, store, as_json
        self.outcomes: list[search.Outcome] = []

    def run(self, chosen: Sequence[Target], dtypes: Sequence[str], shape: dict[str, Any]) -> int:
        """The exit code."""
        interrupted = False
        budget = dict.fromkeys((target.op for target in chosen), self.seconds)
        console = report.make_console()
        try:
            for target, dtype in zip(chosen, dtypes, strict=True):
                mine = {flag.key: shape.get(flag.key, flag.default) for flag in target.flags}
                try:
                    target.key(mine, dtype, self.place.device)
                except ValueError as error:  # a shape that the kernel refuses
                    raise click.UsageError(str(error)) from None
                share = budget[target.op] / sum(other.op == target.op for other in chosen)
                place = place_of(target, self.place)
                with Progress() as progress:
                    outcome = search.tune(
                        target,
                        place,
                        mine,
                        dtype,
                        top=self.top,
                        seconds=share,
                        stored=shared(),
                        store=self.store,
                        tell=progress,
                    )
                self.outcomes.append(outcome)
                if not self.as_json:
                    if len(self.outcomes) > 1:
                        console.print()
                    report.draw_outcome(console, outcome, place)
                interrupted = outcome.interrupted
                if interrupted or outcome.lost:
                    break
        except KeyboardInterrupt:  # between two kernels; within one, the outcome tells
            click.echo("interrupted", err=True)
            interrupted = True
        code = INTERRUPTED if interrupted else self.code()
        if self.as_json:
            actions.print_json(
                device=report.place_data(self.place),
                results=[report.outcome_data(outcome) for outcome in self.outcomes],
                interrupted=interrupted,
            )
        return code

    def code(self) -> int:
        if any(o.lost or o.unwritten or (o.candidates and not o.alive) for o in self.outcomes):
            return FAILED
        return INFEASIBLE if any(outcome.explanation is not None for outcome in self.outcomes) else 0
