"""Every example runs, in a short version, and what is committed of it is what its committed results say."""

import base64
import io
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "common")


def stem(path: Path) -> str:
    return path.stem


def test_there_are_examples():
    assert {"digits", "forecasting", "state_tracking"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=stem)
def test_runs(example, tmp_path):
    """A few steps in a fresh process write results, a picture, and a page with a table, and touch nothing else."""
    before = {path: path.read_bytes() for path in FOLDER.glob(f"{example.stem}.*")}
    command = [sys.executable, example, "--steps-scale", "0.002", "--folder", tmp_path, "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"{example.stem}.{kind}" for kind in ("json", "svg", "md")}
    assert json.loads((tmp_path / f"{example.stem}.json").read_text())["seconds"] > 0
    assert (tmp_path / f"{example.stem}.svg").read_text().rstrip().endswith("</svg>")
    assert results_of(tmp_path / f"{example.stem}.md").strip() == done.stdout.strip()
    assert before == {path: path.read_bytes() for path in FOLDER.glob(f"{example.stem}.*")}


@pytest.mark.parametrize("example", EXAMPLES, ids=stem)
def test_page_and_picture_say_what_the_results_say(example, tmp_path, monkeypatch):
    """`--draw` makes the committed page and picture again. In this process: importing torch would take longer."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [str(example), "--draw", "--folder", str(tmp_path)])
    runpy.run_path(str(example), run_name="__main__")
    page = example.with_suffix(".md")
    assert (tmp_path / page.name).read_text() == page.read_text()
    assert "|" in results_of(page) and f"]({example.stem}.svg)" in page.read_text()
    if sys.version_info >= (3, 11):  # the Matplotlib that is pinned for Python 3.10 writes other elements
        assert same_picture((tmp_path / f"{example.stem}.svg").read_text(), example.with_suffix(".svg").read_text())


def same_picture(one: str, other: str) -> bool:
    """Equal but for the last digits of numbers, which differ between runs of the layout, and the names made of them."""
    (elements, numbers, images), (theirs, their_numbers, their_images) = parts_of(one), parts_of(other)
    return (
        elements == theirs
        and numbers == pytest.approx(their_numbers, abs=1e-3)
        # one of 255 levels: an image is resampled to where the layout puts it
        and all(np.allclose(image, their, rtol=0, atol=1) for image, their in zip(images, their_images, strict=True))
    )


def parts_of(picture: str) -> tuple[str, list[float], list[np.ndarray]]:
    """An SVG's text without numbers, its numbers, and the pixels of its images."""
    encoded = re.findall(r"base64,([^\"]+)", picture)
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))), dtype=float) for each in encoded]
    picture = re.sub(r"base64,[^\"]+", "image", picture)
    names: dict[str, str] = {}
    picture = re.sub(
        r"\b(image|m|p)[0-9a-f]{10}\b", lambda found: names.setdefault(found[0], f"name {len(names)}"), picture
    )
    number = r"(?<![#\w])-?\d+(?:\.\d+)?(?:e-?\d+)?"
    return re.sub(number, "number", picture), [float(each) for each in re.findall(number, picture)], images


def test_another_picture_is_noticed():
    """A moved point, another word, another colour, another image; but not a last digit or the name of a clip path."""
    picture = (FOLDER / "moving_digits.svg").read_text()
    first, second = re.findall(r"base64,[^\"]+", picture)[:2]
    name = re.search(r"#(p[0-9a-f]{10})", picture)[1]
    assert same_picture(picture, picture.replace(name, "p0123456789").replace("79.985385", "79.985386"))
    for old, new in (("79.985385", "79.995385"), ("ahead", "behind"), ("#7f8490", "#7f8491"), (first, second)):
        assert old in picture
        assert not same_picture(picture, picture.replace(old, new, 1))


@pytest.mark.parametrize("example", EXAMPLES, ids=stem)
def test_a_whole_run_takes_under_three_minutes(example):
    """Of the processor: other programs may have run beside it."""
    assert saved(example.stem)["processor_seconds"] < 180


def test_forecasting_says_who_wins():
    errors = {name: solved["error"] for name, solved in saved("forecasting")["forecasters"].items()}
    curves = {name: solved["curve"] for name, solved in saved("forecasting")["forecasters"].items()}
    rules = min(errors[name] for name in ("last year and its growth", "the last week again"))
    networks = [errors[name] for name in errors if "Informer" in name or name == "LSTM"]
    assert errors["linear regression"] < min(networks) <= max(networks) < rules
    wins = [min(curves, key=lambda name: curves[name][week]) for week in range(52)]
    assert wins.count("linear regression") >= 47
    sparse, full = (curves[f"Informer, {kind}"] for kind in ("ProbSparse", "full attention"))
    gap = [some - all_of_them for some, all_of_them in zip(sparse, full, strict=True)]
    assert min(gap[0], gap[-1]) > max(gap[5:-5])


def test_state_tracking_says_who_learns():
    """At tokens like those of training, and far beyond."""
    results = saved("state_tracking")
    seen, far = (
        {(task, mixer): one[place] for task, mixers in results["tasks"].items() for mixer, one in mixers.items()}
        for place in ("seen", "far")
    )
    for (task, mixer), right in far.items():
        guess = results["guess"][task]
        if "LSTM" in mixer:
            assert right > 0.95 < seen[task, mixer]
        elif mixer in ("attention", "scan, gates in (0, 1)") or "arithmetic" in task:
            assert right < guess + 0.03 and seen[task, mixer] < guess + 0.2
    assert seen["parity", "scan, gates in (-1, 1)"] > 0.99 > 0.8 > far["parity", "scan, gates in (-1, 1)"]
    assert seen["sum modulo 5", "scan, gates in (-1, 1)"] < 0.99
    assert min(seen[task, "scan, complex gates"] for task in ("parity", "sum modulo 5")) > 0.99
    turned = results["tasks"]["parity"]["scan, complex gates"]["curve"]
    assert min(turned) < 0.1 and max(turned[turned.index(min(turned)) :]) > 0.8


def saved(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def results_of(page: Path) -> str:
    return re.search(r"^<!-- results -->\n(.*)^<!-- end results -->$", page.read_text(), re.MULTILINE | re.DOTALL)[1]
