"""What the examples share: command line, training, the file of results, the table on the page, the look of pictures.

An example is a script `<name>.py` that ends with

    if __name__ == "__main__":
        common.main(__file__, run, table, draw)

`run(scale)` trains and returns numbers, strings, lists and dicts; `table(results)` is Markdown; `draw(results)` is a
Matplotlib figure. `main` writes `<name>.json`, `<name>.svg`, and the table into `<name>.md`, between the lines
`<!-- results -->` and `<!-- end results -->`. Table and picture are made of what the file of results holds alone.

    python docs/examples/digits.py                                      trains, writes all three
    python docs/examples/digits.py --draw                               only redraws, from the results that are there
    python docs/examples/digits.py --steps-scale 0.01 --folder /tmp/x   a short training, written elsewhere
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

import seqops.nn

Results = dict[str, Any]

# ---- networks and training


class Stack(torch.nn.Module):
    """Residual blocks: x + mixer(norm(x)), then x + mlp(norm(x)); a norm at the end. [B, T, width] -> the same."""

    def __init__(self, width: int, mixers: Sequence[torch.nn.Module]) -> None:
        super().__init__()
        self.mixers = torch.nn.ModuleList(mixers)
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(width) for _ in range(2 * len(mixers) + 1)])
        widths = (width, 2 * width)
        self.mlps = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(*widths), torch.nn.GELU(), torch.nn.Linear(*widths[::-1]))
            for _ in mixers
        )

    def forward(self, x: Tensor) -> Tensor:
        for i, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            y = mixer(self.norms[2 * i](x))
            x = x + (y[0] if isinstance(y, tuple) else y)  # causal modules return their state too
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.norms[-1](x)


def scaled(count: int, scale: float, least: int = 2) -> int:
    """`count` steps in a full run, fewer in a short one."""
    return max(least, round(count * scale))


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def train(
    model: torch.nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    rate: float = 3e-3,
    weight_decay: float = 0.01,
    clip: float = 1.0,
    warmup: float = 0.1,
) -> Results:
    """Runs AdamW for `steps` steps on `loss(step)`, and returns what it took.

    Args:
        model: what is trained. `seqops.nn.parameter_groups` says which of its parameters weight decay leaves alone.
        loss: draws the batch of a step and gives its loss.
        steps: how many steps.
        rate: the highest learning rate, reached after the part `warmup` of all steps; from there a cosine leads to 0.
        weight_decay: of AdamW.
        clip: the largest norm of the gradient.
        warmup: part of all steps during which the rate rises linearly.

    Returns:
        `parameters`, `steps`, `seconds` (of the whole loop), `milliseconds` (median step), `loss` (mean over the last
        tenth of the steps).
    """
    optimizer = torch.optim.AdamW(seqops.nn.parameter_groups(model, weight_decay), lr=rate)
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        done = (step - rising) / max(1, steps - rising)
        return (step + 1) / rising if step < rising else (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses, seconds = [], []
    for step in range(steps):
        start = time.perf_counter()
        value = loss(step)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        losses.append(value.item())
        seconds.append(time.perf_counter() - start)
    model.eval()
    return {
        "parameters": parameters(model),
        "steps": steps,
        "seconds": sum(seconds),
        "milliseconds": 1e3 * statistics.median(seconds),
        "loss": statistics.fmean(losses[-max(1, steps // 10) :]),
    }


# ---- results and page


def rounded(value: Any) -> Any:
    """Six digits of every number: enough for a table, and a file that is short."""
    if isinstance(value, dict):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in [header, rule, *rows])


def footer(results: Results) -> str:
    """The line under a table: how long the script took, and on what."""
    machine, took, used = results["machine"], results["seconds"], results["processor_seconds"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    beside = ", while other programs ran on the same cores" if took > 1.25 * used else ""
    return (
        f"The whole script took {used:.0f} s of processor time with {threads} on {machine['processor']}, torch "
        f"{machine['torch']}; {took:.0f} s passed{beside}."
    )


def write_results(page: str, table: str) -> str:
    """The page with a new table between its two markers."""
    pattern = r"(?<=^<!-- results -->\n).*?(?=^<!-- end results -->$)"
    written, count = re.subn(pattern, lambda _: f"\n{table}\n\n", page, flags=re.MULTILINE | re.DOTALL)
    if count != 1:
        raise ValueError(f"expected one pair of <!-- results --> and <!-- end results -->, got {count}")
    return written


def machine() -> Results:
    names = re.findall(r"^model name\s*: (.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return {
        "processor": names[0] if names else platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


# ---- pictures: mid-grey lines and text on no background, legible on light and on dark pages

GREY = "#7f8490"
COLOURS = ("#3f7cc4", "#c4704a", "#2f9a83", "#a86cc1", "#b8901f", "#d0577a", "#5a9bd8", "#7f8490")
STYLE = {
    "svg.hashsalt": "seqops",
    "svg.fonttype": "none",
    "font.size": 10,
    "mathtext.fontset": "dejavusans",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlecolor": GREY,
    "axes.titlesize": 10,
    "axes.prop_cycle": matplotlib.cycler(color=COLOURS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def svg(draw: Callable[[Results], Figure], results: Results) -> str:
    """The picture as text: the same for the same results, but for last digits where Matplotlib solves for a layout."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        buffer = io.StringIO()
        draw(results).savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    # Matplotlib leaves spaces at the ends of lines.
    return "".join(line.rstrip() + "\n" for line in buffer.getvalue().splitlines())


# ---- the command line


def main(
    script: str,
    run: Callable[[float], Results],
    table: Callable[[Results], str],
    draw: Callable[[Results], Figure],
) -> None:
    """Trains, unless told to draw only, and writes results, picture and page."""
    source = Path(script).resolve()
    parser = argparse.ArgumentParser(description=f"Example {source.stem}: trains, then writes results and a picture.")
    parser.add_argument("--draw", action="store_true", help="only redraw, from the results beside the script")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="part of the training to do (default 1)")
    parser.add_argument("--folder", type=Path, default=source.parent, help="where to write (beside the script)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and seqops (default 1)")
    options = parser.parse_args()

    target = options.folder / source.name
    if options.draw:
        results = json.loads(source.with_suffix(".json").read_text())
    else:
        torch.manual_seed(0)
        torch.set_num_threads(options.threads)
        start, used = time.perf_counter(), time.process_time()
        results = run(options.steps_scale)
        spent = {"seconds": time.perf_counter() - start, "processor_seconds": time.process_time() - used}
        results = rounded(results | spent | {"machine": machine()})
        options.folder.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    target.with_suffix(".svg").write_text(svg(draw, results))
    page = source.with_suffix(".md")
    if page.exists():
        target.with_suffix(".md").write_text(write_results(page.read_text(), table(results)))
    print(table(results))
