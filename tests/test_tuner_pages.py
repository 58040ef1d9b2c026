"""The tuner's figures on the pages are those of the files that the benchmarks wrote."""

import json
from pathlib import Path

from bench import tuner
from seqops.tune.target import targets

ROOT = Path(__file__).parent.parent


def test_table_is_that_of_the_file() -> None:
    found = json.loads(tuner.RESULTS.read_text())
    assert tuner.quality_table(found) in (ROOT / "docs" / "tuning.md").read_text()


def test_every_kernel_was_solved() -> None:
    found = json.loads(tuner.RESULTS.read_text())
    assert {target.tunable.name for target in targets()} <= {each["kernel"] for each in found["solves"]}


def test_picture_shows_every_plan(tmp_path: Path) -> None:
    found = json.loads(tuner.RESULTS.read_text())
    tuner.draw(found, tmp_path / "picture.svg")
    drawn = (tmp_path / "picture.svg").read_text()
    points = sum(len(each["candidates"]) + 1 for each in found["quality"]["rows"])
    assert drawn.count("<use ") >= points
    assert (ROOT / "docs" / "figures" / "tuning.svg").read_text().count("<use ") == drawn.count("<use ")
