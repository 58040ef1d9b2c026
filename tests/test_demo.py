"""The demo, shortened: equal losses, plain output in a pipe, what Ctrl-C leaves, and that a wrong model is noticed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from terminal import run_in_terminal

import seqops.nn
from seqops import demo

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--steps", "4", "--hidden", "16", "--characters", "20")


@pytest.fixture(scope="module")
def corpus() -> demo.Corpus:
    return demo.Corpus()


def run(tmp_path: Path, *arguments: str):
    result = CliRunner().invoke(demo.main, [*TINY, "--output", str(tmp_path / "curve.png"), *arguments])
    return result, result.output


def test_piped_run_is_plain_and_leaves_a_picture(tmp_path):
    picture = tmp_path / "curve.png"
    command = [sys.executable, "-m", "seqops.demo", *TINY, "--output", str(picture)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", result.stdout)
    lines = re.findall(r"^step (\d)/4 .*LSTM: loss ([\d.]+), .*LSTM: loss ([\d.]+), ", result.stdout, re.MULTILINE)
    assert [line[0] for line in lines] == ["1", "2", "3", "4"]
    assert all(ours == theirs for _, ours, theirs in lines)
    assert demo.PROMPT in result.stdout
    assert str(picture) in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_agree_to_rounding_and_fall(corpus):
    torch.manual_seed(0)
    theirs = demo.LanguageModel(torch.nn.LSTM, len(corpus.alphabet), 32)
    ours = demo.LanguageModel(seqops.nn.LSTM, len(corpus.alphabet), 32)
    ours.load_state_dict(theirs.state_dict())
    trainings = [demo.Training("ours", ours, 20), demo.Training("theirs", theirs, 20)]
    for _, batch in zip(range(20), corpus.batches(0), strict=False):
        for training in trainings:
            training.step(*batch)
    assert max(demo.differences(trainings)) < 1e-4
    assert trainings[0].losses[-1] < trainings[0].losses[0] - 0.5
    first, second = (training.validate(corpus.validation[:5120]) for training in trainings)
    assert abs(first - second) < 1e-4


def test_batches_move_on_by_one_character_and_repeat_with_the_seed(corpus):
    text, following = next(corpus.batches(3))
    assert text.shape == following.shape == (demo.BATCH, demo.LENGTH)
    assert torch.equal(text[:, 1:], following[:, :-1])
    again, _ = next(corpus.batches(3))
    other, _ = next(corpus.batches(4))
    assert torch.equal(text, again) and not torch.equal(text, other)


def test_text_is_english_and_validation_is_kept_apart(corpus):
    text = "".join(corpus.alphabet[number] for number in corpus.training)
    assert len(text) > 300_000
    assert text.count(" the ") > 1000
    assert len(corpus.validation) == pytest.approx(len(text) / 19, rel=1e-3)


def test_generated_text_is_that_of_the_whole_sequence(corpus):
    """Streaming through the carried state draws from the same distribution as reading the whole text again."""
    torch.manual_seed(1)
    training = demo.Training("ours", demo.LanguageModel(seqops.nn.LSTM, len(corpus.alphabet), 32), 1)
    streamed = "".join(training.write(corpus, 25, seed=5))
    generator = torch.Generator().manual_seed(5)
    text = demo.PROMPT
    with torch.inference_mode():
        for _ in range(25):
            logits, _ = training.model(corpus.encode(text)[None])
            chances = torch.softmax(logits[:, -1] / demo.TEMPERATURE, dim=-1)
            text += corpus.alphabet[torch.multinomial(chances, 1, generator=generator).item()]
    assert text == demo.PROMPT + streamed


@pytest.mark.parametrize("at", [3, 6])
def test_interrupt_ends_with_what_is_done(tmp_path, monkeypatch, at):
    step = demo.Training.step
    calls = []

    def interrupted(self, *batch):
        calls.append(self)
        if len(calls) == at:
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(demo.Training, "step", interrupted)
    result, output = run(tmp_path)
    assert result.exit_code == 0, output
    assert "stopped" in output and "largest difference" in output
    assert (tmp_path / "curve.png").exists()


def test_time_limit_ends_with_what_is_done(tmp_path):
    result, output = run(tmp_path, "--seconds", "0")
    assert result.exit_code == 0, output
    assert "stopped after 0 s, at step 1" in output and "largest difference" in output
    assert (tmp_path / "curve.png").exists()


def test_interrupt_while_writing_still_reports(tmp_path, monkeypatch):
    def interrupted(self, *arguments):
        yield "x"
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Training, "write", interrupted)
    result, output = run(tmp_path)
    assert result.exit_code == 0, output
    assert f"{demo.PROMPT}x\n" in output and "largest difference" in output


def test_interrupt_before_the_first_step_aborts(tmp_path, monkeypatch):
    def interrupted(self, *batch):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Training, "step", interrupted)
    result, _ = run(tmp_path)
    assert result.exit_code == 1
    assert not (tmp_path / "curve.png").exists()


def test_a_wrong_module_is_noticed(tmp_path, monkeypatch):
    class Wrong(seqops.nn.LSTM):
        def forward(self, input, hx=None):
            output, state = super().forward(input, hx)
            return output * 20, state

    monkeypatch.setattr(seqops.nn, "LSTM", Wrong)
    result, output = run(tmp_path)
    assert result.exit_code == 1
    assert "differ by more than rounding" in output


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result, output = run(tmp_path)
    assert result.exit_code == 0
    assert "no picture: matplotlib is not installed" in output


def test_terminal_shows_a_live_bar(tmp_path):
    command = [sys.executable, "-m", "seqops.demo", *TINY, "--output", str(tmp_path / "curve.png")]
    code, written = run_in_terminal(command, ROOT)
    assert code == 0, written
    assert "\x1b[" in written and "4/4" in written and "torch.nn.LSTM" in written
