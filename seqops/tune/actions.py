"""What `seqops tune` does beside tuning: lists devices, shows and removes what is stored, measures latencies."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click
import torch

from seqops import __version__

from ..core import choose
from . import device as devices
from . import report
from .store import Store, shared
from .target import Target
from .words import find_place

FAILED = 1


def print_json(**document: Any) -> None:
    click.echo(json.dumps({"seqops": __version__, **document}, indent=1))


def print_devices(as_json: bool) -> None:
    presets, present = list(devices.PRESETS.values()), devices.present()
    if as_json:
        data = [{"present": gpu not in presets, **facts(gpu)} for gpu in (*presets, *present)]
        return print_json(devices=data)
    report.draw_devices(report.make_console(), presets, present)


def facts(device: Any) -> dict[str, Any]:
    return {name: dict(value) if name == "origin" else value for name, value in vars(device).items()}


def own_name(name: str | None) -> str | None:
    """A device's name in the store: as it is there, or of a preset, or of what is here."""
    stored = {each.device.lower(): each.device for each in shared().entries()}
    if name is None or name.lower() in stored:
        return stored.get((name or "").lower())
    return find_place(name).device.name


def kernels_of(operator: str | None, directions: Sequence[str], device_name: str | None) -> list[str | None]:
    """What the store calls them: an operator, or an operator and a direction; None: everything."""
    if not directions:
        return [operator]
    kernels = [each.key.partition("|")[0] for each in shared().entries(device_name, operator)]
    operators = dict.fromkeys(kernel.partition(".")[0] for kernel in kernels)
    return [f"{op}.{direction}" for op in operators for direction in directions]


def print_entries(
    known: Sequence[Target], operator: str | None, directions: Sequence[str], device_name: str | None, as_json: bool
) -> None:
    now = {target.tunable.name: target.tunable.digest for target in known}
    name = own_name(device_name)
    listed = [each for op in kernels_of(operator, directions, name) for each in shared().entries(name, op)]
    listed.sort(key=lambda each: (each.device, each.key, each.origin != "user"))
    entries = [(each, now.get(each.key.partition("|")[0]) != each.entry.source) for each in listed]
    if as_json:
        return print_json(entries=[report.entry_data(*each) for each in entries])
    if entries:
        report.draw_entries(report.make_console(), entries)
    else:
        click.echo("nothing is stored" + (f" of {operator}" if operator else ""))


def remove_entries(
    operator: str | None, directions: Sequence[str], device_name: str | None, dry: bool, yes: bool, as_json: bool
) -> None:
    """Entries; and where neither an operator nor a direction is named, what was measured of the devices too."""
    name, store = own_name(device_name), shared()
    kernels = kernels_of(operator, directions, name)
    count = sum(each.origin == "user" for op in kernels for each in store.entries(name, op))
    probed = store.probed(name) if kernels == [None] else []
    if not dry and (count or probed) and not yes:
        try:
            agreed = click.confirm(f"Remove {describe_doomed(count, probed, operator)} in {store.folder}?", err=True)
        except click.Abort as abort:
            if isinstance(abort.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise click.UsageError("--clear asks first; where nobody can answer, add --yes") from None
        if not agreed:
            return click.echo("nothing removed", err=True)
    if not dry:
        try:
            count = sum(store.clear(op, name) for op in kernels)
        except (OSError, TimeoutError) as error:
            fail(f"not removed: {error}")
        choose.forget()
    if as_json:
        return print_json(
            removed=0 if dry else count, probes=[] if dry else probed, **({"found": count} if dry else {})
        )
    click.echo(f"{'would remove' if dry else 'removed'} {describe_doomed(count, probed, operator)}")


def describe_doomed(count: int, probed: Sequence[str], operator: str | None) -> str:
    what = f"{count} entr{'y' if count == 1 else 'ies'}" + (f" of {operator}" if operator else "")
    return what + (f" and the latencies of {', '.join(probed)}" if probed else "")


def measure_latencies(device_name: str | None, store: Store | None, as_json: bool) -> int:
    """The exit code."""
    from . import probe

    place = find_place(device_name)
    if place.torch_device is None:
        raise click.UsageError(f"--probe measures what is here: {place.absent}")
    try:
        found = probe.measure(torch.device(place.torch_device))
    except RuntimeError as error:
        fail(f"not measured: {error}")
    path, written = None, True
    if store is not None:
        path = str(store.path(place.device.name))
        written = store.put_probe(place.device.name, place.device.arch, found, place.device.scope)
        choose.forget()
    if as_json:
        unstored = None if written else f"{path} cannot be written"
        print_json(device=report.place_data(place), probe=found, stored=path if written else None, unstored=unstored)
        return 0 if written else FAILED
    console = report.make_console()
    console.print(report.describe_place(place), style="bold")
    before = [report.describe_number(float(getattr(place.device, name, 0))) for name in found]
    columns = [
        ("fact", list(found)),
        ("measured", [report.describe_number(float(value)) for value in found.values()]),
        ("before", before),
        ("from", [place.device.origin.get(name, "") for name in found]),
    ]
    report.draw(console, columns, left=1)
    if path is None:
        console.print("not stored: --dry-run")
    else:
        home = report.home(path)
        console.print(f"stored: {home}" if written else f"kept in memory only: {home} cannot be written")
    return 0 if written else FAILED


def fail(text: str) -> NoReturn:
    click.echo(f"Error: {text}", err=True)
    sys.exit(FAILED)
