"""Train one character-level language model twice, with `seqops.nn.LSTM` and with `torch.nn.LSTM`, side by side.

Run it with `make demo`, or anywhere seqops is installed with `python -m seqops.demo`. The text is the language
reference that every CPython carries as `pydoc_data.topics`, about half a megabyte of English and code. Both models
start from the same weights and see the same batches in turn: their losses agree to rounding, their times differ.
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pydoc_data import topics

import click
import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy

import seqops.nn

BATCH = 16
LENGTH = 128
EMBEDDING = 64
LEARNING_RATE = 4e-3
PROMPT = "The "
TEMPERATURE = 0.7

# Training amplifies rounding: the losses differ by 1e-6 after 50 steps and by 1e-2 after 600 (right half of the
# picture). Without the gradient of one bias they differ by 4e-2 after 50.
EARLY_STEPS = 50
EARLY_DIFFERENCE = 1e-3
LARGEST_DIFFERENCE = 0.1


class LanguageModel(torch.nn.Module):
    """Embedding, two LSTM layers, one linear layer. `lstm_class` is the only difference between the two trainings."""

    def __init__(self, lstm_class: type[torch.nn.Module], characters: int, hidden: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, EMBEDDING)
        self.lstm = lstm_class(EMBEDDING, hidden, num_layers=2, batch_first=True)
        self.output = torch.nn.Linear(hidden, characters)

    def forward(self, text: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Character numbers [B, T] and the state of the text before them -> logits [B, T, characters] and the state."""
        h, state = self.lstm(self.embedding(text), state)
        return self.output(h), state


class Corpus:
    """The text as numbers, the last twentieth kept for validation."""

    def __init__(self) -> None:
        lines = "\n".join(topics.topics[name] for name in sorted(topics.topics)).splitlines(keepends=True)
        # Half of what the drawn tables hold is blanks and bars: easy to predict, and dull to read in a sample.
        text = "".join(line for line in lines if not line.lstrip().startswith(("|", "+")))
        self.alphabet = sorted(set(text))
        self.number = {character: number for number, character in enumerate(self.alphabet)}
        everything = self.encode(text)
        self.training, self.validation = everything.tensor_split([len(everything) * 19 // 20])

    def encode(self, text: str) -> Tensor:
        return torch.tensor([self.number[character] for character in text])

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Random pieces of the training text [BATCH, LENGTH] and the same moved on by one character."""
        generator = torch.Generator().manual_seed(seed)
        offsets = torch.arange(LENGTH + 1)
        while True:
            starts = torch.randint(len(self.training) - LENGTH, (BATCH, 1), generator=generator)
            pieces = self.training[starts + offsets]
            yield pieces[:, :-1], pieces[:, 1:]


class Training:
    """One model on its way: its losses and the seconds that each of its steps took."""

    def __init__(self, name: str, model: LanguageModel, steps: int) -> None:
        self.name, self.model = name, model
        self.optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR
        self.schedule = schedule(self.optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, text: Tensor, following: Tensor) -> None:
        """A whole training step: forward, backward, clipped gradient, Adam."""
        start = time.perf_counter()
        loss = cross_entropy(self.model(text)[0].flatten(0, 1), following.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.seconds.append(time.perf_counter() - start)
        self.losses.append(loss.item())

    def milliseconds(self) -> float:
        """The median step; it does not notice the first, slower steps or another program's burst."""
        return 1e3 * statistics.median(self.seconds)

    def spread(self) -> tuple[float, float]:
        """The milliseconds that a tenth and nine tenths of the steps stayed under."""
        low, high = torch.tensor(self.seconds, dtype=torch.float64).quantile(torch.tensor([0.1, 0.9]).double()).tolist()
        return 1e3 * low, 1e3 * high

    def __str__(self) -> str:
        return f"{self.name}: loss {self.losses[-1]:.4f}, {self.milliseconds():.1f} ms per step"

    @torch.inference_mode()
    def validate(self, text: Tensor) -> float:
        """Mean loss in nats per character on text [N] that no training step has seen, read in rows of 512."""
        rows = text[: len(text) // 512 * 512].view(-1, 512)
        return cross_entropy(self.model(rows[:, :-1])[0].flatten(0, 1), rows[:, 1:].flatten()).item()

    @torch.inference_mode()
    def write(self, corpus: Corpus, characters: int, seed: int) -> Iterator[str]:
        """Generate text one character at a time: each call is one step, the state carries everything before it."""
        generator = torch.Generator().manual_seed(seed)
        logits, state = self.model(corpus.encode(PROMPT)[None])
        for _ in range(characters):
            chances = torch.softmax(logits[:, -1] / TEMPERATURE, dim=-1)
            drawn = torch.multinomial(chances, 1, generator=generator)
            yield corpus.alphabet[drawn.item()]
            logits, state = self.model(drawn, state)


def train(trainings: list[Training], corpus: Corpus, steps: int, seconds: float, seed: int, console: Console) -> None:
    """Give every training the same batch in turn until `steps` are done, `seconds` are over or Ctrl-C is pressed.

    All end with equally many steps.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    progress = Progress(TextColumn("training"), *columns, console=console)
    task = progress.add_task("", total=steps)
    batches = corpus.batches(seed)
    end = time.perf_counter() + seconds
    try:
        with Live(console=console) if console.is_terminal else contextlib.nullcontext() as live:
            for step in range(steps):
                batch = next(batches)
                # Who goes first alternates, so that neither always finds the caches as the other left them.
                for training in trainings if step % 2 == 0 else reversed(trainings):
                    training.step(*batch)
                progress.advance(task)
                if live:
                    live.update(Group(progress, summary(trainings)))
                elif (step + 1) % max(1, steps // 20) == 0:
                    console.print(f"step {step + 1}/{steps}  " + " | ".join(map(str, trainings)))
                if time.perf_counter() > end and step + 1 < steps:
                    console.print(f"stopped after {seconds:g} s, at step {step + 1}: --seconds allows more")
                    break
    except KeyboardInterrupt:
        console.print("\nstopped: going on with the steps that are done")
    done = min(len(training.losses) for training in trainings)
    for training in trainings:
        del training.losses[done:], training.seconds[done:]


def differences(trainings: list[Training]) -> list[float]:
    """How far apart the losses of the first two trainings were, step by step."""
    first, second = (training.losses for training in trainings[:2])
    return [abs(one - other) for one, other in zip(first, second, strict=True)]


def running_mean(values: list[float], window: int = 20) -> list[float]:
    """Each value with those before it, `window` in all."""
    pieces = (values[max(0, end - window) : end] for end in range(1, len(values) + 1))
    return [statistics.fmean(piece) for piece in pieces]


def summary(trainings: list[Training], validation: list[float] | None = None) -> Table:
    """One row a training: last loss, median step, and how many times the slowest's speed that is."""
    table = Table(box=None, pad_edge=False)
    table.add_column("model")
    for name in ("loss", "validation loss", "ms per step", "middle 80 %", "speed"):
        table.add_column(name, justify="right")
    slowest = max(training.milliseconds() for training in trainings)
    for index, training in enumerate(trainings):
        low, high = training.spread()
        table.add_row(
            training.name,
            f"{training.losses[-1]:.4f}",
            f"{validation[index]:.4f}" if validation else "",
            f"{training.milliseconds():.1f}",
            f"{low:.1f} to {high:.1f}",
            f"{slowest / training.milliseconds():.2f}x",
        )
    return table


def draw(trainings: list[Training], path: Path) -> None:
    """Loss over each training's own wall time, and how far apart the losses of equal steps are, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5), width_ratios=(2, 1), layout="constrained")
    for training in trainings:
        wall = torch.tensor(training.seconds).cumsum(0)
        label = f"{training.name}: {training.milliseconds():.0f} ms per step"
        (line,) = left.plot(wall, running_mean(training.losses), label=label)
        left.plot(wall, training.losses, color=line.get_color(), alpha=0.25, linewidth=0.7)
    left.set(xlabel="wall time of this model's steps, s", ylabel="training loss, nats per character", ylim=(0.9, None))
    left.set_title("Loss over wall time, and its running mean over 20 steps")
    left.legend()
    left.grid(alpha=0.3)
    right.semilogy([max(difference, 1e-9) for difference in differences(trainings)], color="tab:gray", linewidth=1)
    right.set(xlabel="step", ylabel="difference of the two losses", ylim=(1e-9, 1))
    right.set_title("How far the two curves are apart")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def write_sample(training: Training, corpus: Corpus, characters: int, seed: int) -> float:
    """Print a sample while it is being generated; the milliseconds per character come back."""
    sys.stdout.write(PROMPT)
    start = time.perf_counter()
    written = 0
    # Ctrl-C ends the sample, not the report that follows it.
    with contextlib.suppress(KeyboardInterrupt):
        for character in training.write(corpus, characters, seed):
            sys.stdout.write(character)
            sys.stdout.flush()
            written += 1
    seconds = time.perf_counter() - start
    sys.stdout.write("\n")
    return 1e3 * seconds / max(written, 1)


@click.command(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--steps", default=600, type=click.IntRange(min=1), help="Training steps of each model.")
@click.option("--hidden", default=256, type=click.IntRange(min=1), help="Units of each LSTM layer.")
@click.option("--seconds", default=150.0, help="Stop training after this time, for machines that are slow or busy.")
@click.option("--characters", default=600, type=click.IntRange(min=1), help="Length of the generated sample.")
@click.option("--seed", default=0, help="Of the weights, the batches and the sample.")
@click.option("--output", default="demo.png", type=click.Path(dir_okay=False, path_type=Path), help="The picture.")
def main(steps: int, hidden: int, seconds: float, characters: int, seed: int, output: Path) -> None:
    """Train a language model with seqops.nn.LSTM and with torch.nn.LSTM, from the same weights, side by side."""
    console = Console(markup=False, highlight=False, soft_wrap=True)
    corpus = Corpus()
    torch.manual_seed(seed)
    theirs = LanguageModel(torch.nn.LSTM, len(corpus.alphabet), hidden)
    ours = LanguageModel(seqops.nn.LSTM, len(corpus.alphabet), hidden)
    ours.load_state_dict(theirs.state_dict())
    parameters = sum(parameter.numel() for parameter in ours.parameters())
    console.print(
        f"{len(corpus.training) + len(corpus.validation):,} characters of Python's language reference in batches of "
        f"{BATCH} x {LENGTH}\n2 LSTM layers of {hidden} units, {parameters:,} parameters, "
        f"{torch.get_num_threads()} threads; Ctrl-C goes on with the steps that are done"
    )

    trainings = [Training("seqops.nn.LSTM", ours, steps), Training("torch.nn.LSTM", theirs, steps)]
    train(trainings, corpus, steps, seconds, seed, console)
    if not trainings[0].losses:
        raise click.Abort

    console.print("\nA sample from seqops.nn.LSTM, one step a character through the carried state:\n")
    pace = write_sample(trainings[0], corpus, characters, seed)

    console.print()
    console.print(summary(trainings, [training.validate(corpus.validation) for training in trainings]))
    largest = max(differences(trainings))
    early = max(differences(trainings)[:EARLY_STEPS])
    console.print(
        f"\nlargest difference of the two loss curves: {largest:.1e}, in the first {EARLY_STEPS} steps {early:.1e}"
    )
    console.print(f"generating with seqops.nn.LSTM: {pace:.2f} ms per character")
    try:
        draw(trainings, output)
    except ModuleNotFoundError as missing:
        console.print(f"no picture: {missing.name} is not installed")
    else:
        console.print(f"loss over wall time: {output.resolve()}")
    if not (early <= EARLY_DIFFERENCE and largest <= LARGEST_DIFFERENCE):
        bounds = f"{EARLY_DIFFERENCE:g} early, {LARGEST_DIFFERENCE:g} in all"
        raise click.ClickException(f"the loss curves differ by more than rounding explains ({bounds})")


if __name__ == "__main__":
    main()
