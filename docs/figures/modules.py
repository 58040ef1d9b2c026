"""Draws nn/<Class>.svg for every module: which steps of the input reach which steps of the output, and how strongly.

Run:  python docs/figures/modules.py            all modules, and the picture lines of their pages
      python docs/figures/modules.py S4D S5     these

A cell is the size of dy_t/dx_s, over all channels: the module runs the first of its cases in tests/formulas, in
float64, and the sum over channels of squared derivatives is estimated from 8 fixed vectors of signs. White is no
influence at all. The picture needs no background of its own: it holds a light panel, and grey that is legible on
white and on black.
"""

from __future__ import annotations

import base64
import inspect
import re
import struct
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import seqops  # noqa: E402  found once sys.path holds ROOT
from seqops import catalog  # noqa: E402  found once sys.path holds ROOT
from tests.formulas import CASES, Case, output  # noqa: E402  found once sys.path holds ROOT

STEPS, PROBES, DECADES = 24, 8, 4
GREY = "#7f8490"
COLOURS = ("fdf0c4", "f7b85c", "e0654c", "9c2c77", "2d1160")  # from the weakest to the strongest
SIZE, LEFT, TOP = 168, 40, 22  # of the panel, in the picture's units


def case_of(name: str) -> Case:
    """The first case of a module in tests/formulas; those without one have torch.nn's arguments."""
    found = [case for case in CASES if case.module == name]
    if found:
        return found[0]
    options = {"input_size": 8, "hidden_size": 8, "batch_first": True}
    return Case(name, options, formula=lambda module, x: output(module(x)))


def inputs_of(case: Case) -> list[tuple[Any, ...]]:
    """What to try, one row each: a sequence of STEPS steps, else the case's own."""
    own = tuple(t[:1] if isinstance(t, Tensor) and t.ndim > 1 else t for t in case.inputs())
    longer = []
    if case.draw is None:
        torch.manual_seed(1)
        longer = [(torch.randn(1, STEPS, *case.shape[2:], dtype=torch.float64),)]
    return [*longer, own, case.inputs()]


def influence(case: Case) -> Tensor:
    """|dy_t/dx_s| [steps of y, steps of x], relative to the largest."""
    module = case.build()
    problems = []
    for given in inputs_of(case):
        try:
            x, y = run(module, given)
        except (ValueError, RuntimeError, IndexError) as problem:
            problems.append(problem)
            continue
        return jacobian(y, x)
    raise RuntimeError(f"{case}: no input fits: {problems}")


def run(module: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The sequence that goes in, and what comes out. Of a module that reads tokens, their embeddings go in."""
    floating = [t for t in given if isinstance(t, Tensor) and t.is_floating_point()]
    if floating:
        floating[0].requires_grad_()
        return floating[0], output(module(*given))
    embedded: list[Tensor] = []
    embedding = next(each for each in module.modules() if isinstance(each, torch.nn.Embedding))
    hook = embedding.register_forward_hook(lambda _, __, result: embedded.append(result))
    y = output(module(*given))
    hook.remove()
    return embedded[0], y


def jacobian(y: Tensor, x: Tensor) -> Tensor:
    rows = by_step(y)
    signs = torch.randint(0, 2, (PROBES, rows.shape[1]), generator=torch.Generator().manual_seed(0)).double() * 2 - 1
    sizes = []
    for row in rows:
        total = 0.0
        for sign in signs:
            (slope,) = torch.autograd.grad((row * sign).sum(), x, retain_graph=True)
            total = total + by_step(slope).square().sum(1)
        sizes.append((total / PROBES).sqrt())
    sizes = torch.stack(sizes)
    return sizes / sizes.max()


def by_step(x: Tensor) -> Tensor:
    """The first batch row as [steps, values of a step]; the places of a grid [B, X, Y, D] count as steps."""
    return (x[0].flatten(0, 1) if x.ndim == 4 else x[0]).flatten(1)


def colour(value: float) -> bytes:
    """Of a relative influence, by its logarithm."""
    if value <= 0:
        return b"\xff\xff\xff"
    place = 1 + torch.tensor(value).log10().item() / DECADES  # 1 is the largest, 0 is DECADES below it
    place = min(max(place, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    first, second = (bytes.fromhex(COLOURS[low + i]) for i in (0, 1))
    return bytes(round(a + (b - a) * (place - low)) for a, b in zip(first, second, strict=True))


def png(rows: list[bytes], width: int) -> str:
    """A PNG of 8-bit colours, as base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, len(rows), 8, 2, 0, 0, 0)
    body = zlib.compress(b"".join(b"\x00" + row for row in rows), 9)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    return base64.b64encode(whole).decode()


def picture(name: str, sizes: Tensor) -> str:
    """The SVG: the map, its axes, and what the colours mean."""
    tall, wide = sizes.shape
    cells = [b"".join(colour(value) for value in row) for row in sizes.tolist()]
    right, bottom = LEFT + SIZE, TOP + SIZE
    scale = png([colour(10 ** (-DECADES * i / 63)) for i in range(64)], 1)
    bar, edge = right + 14, f'stroke="{GREY}" stroke-width="0.7"'
    labels = [
        f'<text x="{LEFT}" y="{TOP - 8}" font-weight="bold">{name}</text>',
        f'<text x="{LEFT - 5}" y="{TOP + 9}" text-anchor="end">0</text>',
        f'<text x="{LEFT - 5}" y="{bottom}" text-anchor="end">{tall - 1}</text>',
        f'<text x="{LEFT}" y="{bottom + 13}">0</text>',
        f'<text x="{right}" y="{bottom + 13}" text-anchor="end">{wide - 1}</text>',
        f'<text x="{LEFT + SIZE / 2:g}" y="{bottom + 15}" text-anchor="middle">input step</text>',
        f'<text transform="translate({LEFT - 22} {TOP + SIZE / 2:g}) rotate(-90)" text-anchor="middle">'
        "output step</text>",
        f'<text x="{bar + 16}" y="{TOP + 9}">1</text>',
        f'<text x="{bar + 16}" y="{TOP + 133}">1e-{DECADES}</text>',
        f'<text x="{bar + 16}" y="{bottom}">none</text>',
    ]
    image = 'preserveAspectRatio="none" style="image-rendering:pixelated" href="data:image/png;base64,'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 264 214" width="264" height="214" '
            f'role="img" font-family="sans-serif" font-size="11" fill="{GREY}">',
            f"<title>{name}: influence of input steps on output steps</title>",
            f'<image x="{LEFT}" y="{TOP}" width="{SIZE}" height="{SIZE}" {image}{png(cells, wide)}"/>',
            f'<rect x="{LEFT}" y="{TOP}" width="{SIZE}" height="{SIZE}" fill="none" {edge}/>',
            f'<image x="{bar}" y="{TOP}" width="10" height="133" {image}{scale}"/>',
            f'<rect x="{bar}" y="{bottom - 10}" width="10" height="10" fill="#ffffff" {edge}/>',
            *labels,
            "</svg>\n",
        ]
    )


def draw(name: str) -> str:
    return picture(name, influence(case_of(name)))


def classes() -> list[str]:
    """Modules that a picture is of: those that run an operator."""
    return [each.name for each in catalog.modules()]


def name_in_pages() -> None:
    """Pages of docs/nn that show a class but not its picture get the line, before their first heading or example."""
    for page in sorted((ROOT / "docs" / "nn").glob("*.md")):
        text = page.read_text()
        shown = re.findall(r"^::: seqops\.nn\.(\w+)$", text, re.MULTILINE)
        lines = [
            f"![Influence of every input step on every output step of {name}](../figures/nn/{name}.svg)"
            for name in shown
            if (ROOT / "docs" / "figures" / "nn" / f"{name}.svg").exists() and f"figures/nn/{name}.svg" not in text
        ]
        place = re.search(r"^(## |```|::: )", text, re.MULTILINE)
        if lines and place:
            page.write_text(text[: place.start()] + "\n".join(lines) + "\n\n" + text[place.start() :])


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or classes():
        assert inspect.isclass(getattr(seqops.nn, name))
        (Path(__file__).parent / "nn" / f"{name}.svg").write_text(draw(name))
    name_in_pages()


if __name__ == "__main__":
    main()
