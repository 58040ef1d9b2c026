"""Forecasting: carbon dioxide over Mauna Loa, 52 weeks ahead, by an Informer, an LSTM, a line and two rules of thumb.

The weekly series that statsmodels carries, 1958 to 2001, missing weeks filled in linearly. A forecaster reads two
years, relative to their last week, and gives the next one. Networks learn on the weeks before 1990, and are tested
on every later one.

Run:  python docs/examples/forecasting.py
"""

from __future__ import annotations

from collections.abc import Callable

import common
import torch
from matplotlib.figure import Figure
from statsmodels.datasets import co2
from torch import Tensor
from torch.nn import functional

import seqops.nn

READ = 104  # weeks
AHEAD = 52
BEGIN_TEST = "1990-01-01"
WIDTH = 32
BATCH = 32
STEPS = 600
PENALTY = 10.0  # of the squared weights of the linear regression
EXAMPLE = 200  # the tested window in the picture

Forecaster = Callable[[Tensor], Tensor]  # weeks [N, READ] relative to the last of them -> [N, AHEAD]


def windows() -> tuple[Tensor, Tensor]:
    """Windows [N, READ + AHEAD] of the series, in ppm: to learn from, and to test on."""
    series = co2.load_pandas().data["co2"].interpolate()
    values = torch.from_numpy(series.to_numpy(copy=True)).float()
    border = int((series.index < BEGIN_TEST).sum())
    # The first week that is tested is the first one after the border; what is read for it lies before.
    return values[:border].unfold(0, READ + AHEAD, 1), values[border - READ :].unfold(0, READ + AHEAD, 1)


def relative(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What is read [N, READ] and what follows [N, AHEAD], less the last week read: the series grows."""
    read, ahead = (rows - rows[:, READ - 1, None]).split([READ, AHEAD], 1)
    return read, ahead


class LSTMForecaster(torch.nn.Module):
    """The state after the last week -> all weeks ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = seqops.nn.LSTM(1, 2 * WIDTH, batch_first=True)
        self.output = torch.nn.Linear(2 * WIDTH, AHEAD)

    def forward(self, weeks: Tensor) -> Tensor:
        return self.output(self.lstm(weeks[..., None])[0][:, -1])


class InformerForecaster(torch.nn.Module):
    """An Informer whose decoder starts from the last year. A factor of READ selects every query: full attention."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.informer = seqops.nn.Informer(1, AHEAD, WIDTH, num_heads=4, known=52, factor=factor, dropout=0.0)

    def forward(self, weeks: Tensor) -> Tensor:
        return self.informer(weeks[..., None])[..., 0]


def learn(network: torch.nn.Module, read: Tensor, ahead: Tensor, steps: int) -> tuple[Forecaster, common.Results]:
    """Trains a network on the mean absolute error; values are divided by their size on the way in, and out."""
    size = ahead.std()
    random = torch.Generator().manual_seed(0)

    def loss(_: int) -> Tensor:
        chosen = torch.randint(len(read), (BATCH,), generator=random)
        return functional.l1_loss(network(read[chosen] / size), ahead[chosen] / size)

    training = common.train(network, loss, steps, rate=2e-3)
    return lambda weeks: network(weeks / size) * size, training


def ridge(read: Tensor, ahead: Tensor, penalty: float) -> Forecaster:
    """Linear regression of every week ahead on all weeks read, weights w held small by penalty · |w|²."""

    def inputs(weeks: Tensor) -> Tensor:
        return functional.pad(weeks.double(), (0, 1), value=1.0)

    x = inputs(read)
    weights = torch.linalg.solve(x.mT @ x + penalty * torch.eye(READ + 1, dtype=x.dtype), x.mT @ ahead.double())
    return lambda weeks: (inputs(weeks) @ weights).float()


def last_year(weeks: Tensor) -> Tensor:
    """The same week a year before, plus what the last year added."""
    return weeks[:, -AHEAD:] + (weeks[:, -1:] - weeks[:, -1 - AHEAD, None])


def the_last_week(weeks: Tensor) -> Tensor:
    return torch.zeros(len(weeks), AHEAD)


NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "Informer, ProbSparse": lambda: InformerForecaster(factor=3),
    "Informer, full attention": lambda: InformerForecaster(factor=READ),
    "LSTM": LSTMForecaster,
}


def run(scale: float) -> common.Results:
    learned, tested = windows()
    read, ahead = relative(learned)
    forecasters: dict[str, tuple[Forecaster, common.Results]] = {}
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        forecasters[name] = learn(make(), read, ahead, common.scaled(STEPS, scale))
    forecasters["linear regression"] = (ridge(read, ahead, PENALTY), {"parameters": (READ + 1) * AHEAD})
    forecasters["last year and its growth"] = (last_year, {"parameters": 0})
    forecasters["the last week again"] = (the_last_week, {"parameters": 0})

    read, ahead = relative(tested)
    solved = {}
    with torch.inference_mode():
        for name, (forecast, training) in forecasters.items():
            given = forecast(read)
            error = (given - ahead).abs()
            shown = given[EXAMPLE].tolist()
            solved[name] = training | {"error": error.mean().item(), "curve": error.mean(0).tolist(), "shown": shown}
    settings = {"read": READ, "ahead": AHEAD, "begin_test": BEGIN_TEST, "batch": BATCH, "penalty": PENALTY}
    counts = {"learned": len(learned), "tested": len(tested)}
    return settings | counts | {"shown": tested[EXAMPLE].tolist(), "forecasters": solved}


def table(results: common.Results) -> str:
    rows = []
    for name, solved in results["forecasters"].items():
        curve = solved["curve"]
        weeks = [f"{curve[week - 1]:.2f}" for week in (1, 13, 26, 52)]
        rows.append([name, f"{solved['error']:.3f}", *weeks, solved["parameters"]])
    header = ["forecaster", "mean error, ppm", "1 week ahead", "13", "26", "52", "parameters"]
    return common.markdown(header, rows) + "\n\n" + common.footer(results)


def draw(results: common.Results) -> Figure:
    figure = Figure(figsize=(9.2, 3.6), layout="constrained")
    example, errors = figure.subplots(1, 2)
    read, ahead, shown = results["read"], results["ahead"], results["shown"]
    weeks = range(1, ahead + 1)
    example.plot(range(1 - ahead, ahead + 1), shown[read - ahead :], color=common.GREY, linewidth=3, label="measured")
    for name, solved in results["forecasters"].items():
        if solved["error"] < 1.5:  # the last week again is off the scale: a table is enough for it
            errors.plot(weeks, solved["curve"], label=name)
            example.plot(weeks, [shown[read - 1] + value for value in solved["shown"]])
    example.axvline(0, color=common.GREY, linewidth=1, linestyle=":")
    example.set(title="one of the tested years", xlabel="weeks ahead", ylabel="carbon dioxide, ppm")
    errors.set(
        title="all tested years", xlabel="weeks ahead", ylabel="mean error, ppm", xlim=(1, ahead), ylim=(0, None)
    )
    measured, lines = example.get_lines()[:1], errors.get_lines()
    figure.legend(handles=[*measured, *lines], loc="outside lower center", ncols=4)
    return figure


if __name__ == "__main__":
    common.main(__file__, run, table, draw)
