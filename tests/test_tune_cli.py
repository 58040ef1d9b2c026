"""`seqops tune` on a machine without a GPU: every row of what it does, its texts, its data and its exit codes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result
from terminal import run_in_terminal
from toys import Habits, make_target, make_targets

import seqops
from seqops.cli import main
from seqops.core import launch
from seqops.tune import actions, cli, report, search, timing, words
from seqops.tune import device as devices
from seqops.tune.store import Entry, Listed, Store, shared
from seqops.tune.target import targets

TESTS = Path(__file__).resolve().parent
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")
TOY = ("tune", "toy", "--forward")
QUICK = ("--seconds", "0.05")
HOST = devices.host()


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU, nothing stored, a compiler, and the toys alone."""
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: None)
    give(monkeypatch, Habits())


def give(monkeypatch: pytest.MonkeyPatch, habits: Habits) -> None:
    found = make_targets(habits)
    monkeypatch.setattr(cli, "targets", lambda: found)


def invoke(*arguments: str, **options: Any) -> Result:
    result = CliRunner().invoke(main, arguments, prog_name="seqops", **options)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert not CONTROL.search(result.output), result.output
    return result


def data(*arguments: str, code: int = 0) -> dict[str, Any]:
    result = invoke(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(*arguments: str) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    return re.sub(r"(?s).*^Error: ", "", result.stderr, flags=re.MULTILINE).strip()


# --- shapes and options ----------------------------------------------------------------------------------------------


def test_help_has_the_flags_of_the_operator() -> None:
    plain = invoke("tune", "--help").output
    assert "--heads" not in plain and "Operators: toy, pea. Flags of the shape: seqops tune OP --help" in plain
    for arguments in (("tune", "toy", "--help"), ("tune", "--help", "toy")):
        output = invoke(*arguments).output
        assert re.search(r"Shape of toy:\n +--heads N +Heads\. +\[default: 2; x>=1\]", output), output
        assert "--gate [full|constant]" in output and "--train / --no-train" in output
        assert "--dry-run" in output and "OP]\n  --all" not in output


def test_help_of_the_group_names_the_command() -> None:
    assert re.search(r"^  tune +Find the fastest tile constants", invoke("--help").output, re.MULTILINE)


def test_shape_flags_reach_the_kernel() -> None:
    arguments = ("--device", "h100", "--dim", "32", "--no-train", "--gate=constant", "--batch", "9")
    (result,) = data(*TOY, *arguments)["results"]
    assert result["shape"] == {"heads": 2, "dim": 32, "batch": 9, "time": 128, "gate": "constant", "train": False}
    assert result["key"] == "toy.forward.cuda|bf16|D=32,B<=16"
    assert max(candidate["constants"]["tile"] for candidate in result["candidates"]) == 32


def test_the_operator_may_stand_anywhere() -> None:
    first = data("tune", "--device", "h100", "--dim", "32", "toy")
    assert [result["key"] for result in first["results"]] == [
        "toy.forward.cuda|bf16|D=32,B<=8|train",
        "toy.backward.cuda|bf16|D=32,B<=8|train",
    ]


def test_both_directions_unless_one_is_named() -> None:
    def directions(*arguments: str) -> list[str]:
        found = data("tune", "toy", "--device", "h100", "--dry-run", *arguments)["results"]
        return [result["direction"] for result in found]

    assert directions() == directions("--forward", "--backward") == ["forward", "backward"]
    assert directions("--forward") == ["forward"] and directions("--backward") == ["backward"]


@pytest.mark.parametrize("name", ["float32", "fp32", "torch.float32", "FP32"])
def test_names_of_data_types(name: str) -> None:
    (result,) = data(*TOY, "--device", "h100", "--dtype", name)["results"]
    assert result["dtype"] == "float32" and "|float32|" in result["key"]


def test_top_limits_the_candidates() -> None:
    for top in (1, 3):
        (result,) = data(*TOY, "--device", "h100", "--top", str(top), "--dry-run")["results"]
        assert len(result["candidates"]) == top


def test_seconds_are_shared_by_an_operator_s_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    shares: list[float] = []

    def measure(contenders: list[Any], clock: Any, seconds: float, tell: Any) -> Any:
        shares.append(seconds)
        return [timing.Times([1.0] * 5) for _ in contenders], False

    monkeypatch.setattr(timing, "measure", measure)
    data("tune", "toy", "--device", "cpu", "--seconds", "8")
    assert shares == [4, 4]
    data("tune", "--all", "--device", "cpu", "--seconds", "8")
    assert shares[2:] == [8, 4, 4] or shares[2:] == [4, 4, 8]


def test_a_dry_run_stores_nothing() -> None:
    result = invoke(*TOY, "--device", "h100", "--dry-run")
    assert "not stored: --dry-run" in result.stdout
    assert shared().entries() == [] and not shared().folder.exists()


# --- a device that is not here ---------------------------------------------------------------------------------------


def test_elsewhere_it_solves_compiles_and_stores_as_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Habits(broken={8}, spills={64}))
    result = invoke(*TOY, "--device", "H100", "--top", "6")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    shape = "heads=2 dim=64 batch=4 time=128 gate=full train"
    assert lines[0].rstrip() == f"toy forward, bf16, {shape}, on h100 (preset; no GPU here)"
    assert re.match(r"solved 2 constraints, 2 variables in \d+ ms: optimal, \d+ nodes", lines[1])
    rows = {cells[0]: cells[1:] for line in lines[3:9] if (cells := line.replace("* ", "").split())}
    # registers: model/compiler
    assert rows["1"] == ["64", "1", "88/86", "4", "KB", "11.5", "spills"]
    assert rows["2"] == ["32", "1", "56/54", "2", "KB", "13"]
    assert rows["6"] == ["8", "1", "32", "0.5", "KB", "22", "does", "not", "compile"]
    assert lines[4].startswith("* 2")
    text = result.stdout
    assert "compiled 5 of 6 for sm_90a in " in text and "(registers: model/compiler)" in text
    assert "no spills" not in text
    assert "dropped 1: compile: it spills 16 bytes a thread" in text
    assert re.search(r"dropped 6: compile: toy.cu does not compile for sm_90a:\s*\n    expected a ';'", text)
    assert "not timed: no GPU here" in text
    assert "chosen: 2, the model's best of those that compile" in text
    path = report.home(str(shared().path("h100")))
    assert f"stored as solved: {path} (time it on an h100 to confirm)" in text
    (listed,) = shared().entries("h100")
    assert listed.entry.constants == {"tile": 32, "unroll": 1} and listed.entry.by == "solved"


def test_without_a_compiler_it_says_which_package_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "CuPy is not installed (pip install 'seqops[cuda]')"
    monkeypatch.setattr(launch, "reason_not_compiled", lambda: reason)
    result = invoke(*TOY, "--device", "a100")
    assert result.exit_code == 0 and f"not compiled: {reason}" in result.stdout
    assert "stored as solved" in result.stdout


def test_all_that_compiled_did_not_spill() -> None:
    assert re.search(r"compiled 8 of 8 for sm_89 in \d\.\d s, no spills", invoke(*TOY, "--device", "l4").stdout)


def test_what_was_measured_stays() -> None:
    key, source = "toy.forward.cuda|bf16|D=64,B<=8|train", make_target(backend="cuda").tunable.digest
    shared().put("h100", 90, key, Entry({"tile": 8, "unroll": 1}, "measured", source, us=5.0))
    result = invoke(*TOY, "--device", "h100", "--top", "2")
    assert "not stored: what was measured on 20" in result.stdout
    assert re.search(r"^  - +8 .* stored", result.stdout, re.MULTILINE)
    assert shared().entries()[0].entry.us == 5.0


# --- a device that is here -------------------------------------------------------------------------------------------


def test_the_cpu_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Habits(wrong={4}, sleeps={64: 2e-3, 16: 4e-3, 8: 4e-3}))
    result = invoke(*TOY, "--device", "cpu", "--seconds", "0.3")
    assert result.exit_code == 0
    threads = "1 thread" if HOST.threads == 1 else f"{HOST.threads} threads"
    assert result.stdout.splitlines()[0].rstrip().endswith(f"on {HOST.name}, {threads}")
    assert "measured us" in result.stdout and "compile" not in result.stdout
    assert "dropped 8: check: wrong: 13440 of 13440 values of output 0" in result.stdout
    assert "checked 8 against the reference: 1 failed" in result.stdout
    assert re.search(r"chosen: [23], [\d.]+ x as fast as 1, the model's first choice", result.stdout)
    assert f"stored as measured: {report.home(str(shared().path(HOST.name)))}\n" in re.sub(" +\n", "\n", result.stdout)
    # One plain line for each candidate.
    told = result.stderr.splitlines()
    assert len(told) == 8 and all(re.match(r"toy forward \d/[78]: tile=\d+ unroll=\d: ", line) for line in told)
    assert sum("dropped: wrong" in line for line in told) == 1
    assert sum(bool(re.search(r": [\d.]+ [mu]s, ±[\d.]+%, \d+ runs$", line)) for line in told) == 7
    (listed,) = shared().entries(HOST.name)
    assert listed.entry.by == "measured" and listed.entry.constants["tile"] == 32


def test_json_has_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Habits(sleeps=dict.fromkeys((64, 32, 16, 8, 4), 1e-4)))
    document = data(*TOY, "--device", "cpu", "--top", "3", *QUICK)
    assert set(document) == {"seqops", "device", "results", "interrupted"}
    assert document["seqops"] == seqops.__version__ and document["interrupted"] is False
    assert document["device"]["name"] == HOST.name and document["device"]["torch_device"] == "cpu"
    (result,) = document["results"]
    assert (result["op"], result["direction"], result["kernel"]) == ("toy", "forward", "toy.forward.cpu")
    assert result["solver"].keys() == {"constraints", "variables", "seconds", "nodes"} and result["optimal"]
    for rank, candidate in enumerate(result["candidates"], 1):
        assert candidate["rank"] == rank and candidate["runs"] >= 3 and candidate["us"] > 0
        assert set(candidate["constants"]) == {"tile", "unroll"}
    winner = result["candidates"][result["chosen"]]
    entry = result["entry"]
    assert (entry["constants"], entry["by"], entry["us"]) == (winner["constants"], "measured", winner["us"])
    # What the entry says is what the store holds, which adds the version and the time.
    held = json.loads(Path(result["stored"]).read_text())["entries"][result["key"]]
    assert entry.items() <= held.items() and set(held) - set(entry) == {"seqops", "time"}


def test_every_candidate_that_failed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Habits(wrong={64}, raises={32, 16, 8, 4}))
    result = invoke(*TOY, "--device", "cpu", "--top", "3", *QUICK)
    assert result.exit_code == 1
    assert "dropped 1: check: wrong: 13440 of 13440" in result.stdout
    assert "dropped 2, 3: check: it does not run: the launch with tile 32 failed" in result.stdout
    assert "stored" not in result.stdout and shared().entries() == []
    # only the first gave other values
    assert re.search(r"^ *1 .* wrong *$", result.stdout, re.MULTILINE)
    assert re.search(r"^ *2 .* does not run *$", result.stdout, re.MULTILINE)


def test_a_reference_without_memory_is_not_the_candidates_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    toy = make_target()

    def example(*arguments: Any) -> Any:
        def expected() -> None:
            raise MemoryError("4 TB wanted")

        return replace(toy.example(*arguments), expected=expected)

    monkeypatch.setattr(cli, "targets", lambda: [replace(toy, example=example)])
    result = invoke(*TOY, "--device", "cpu", "--top", "2", *QUICK)
    assert result.exit_code == 1 and "wrong" not in result.output and "checked 2" not in result.output
    assert "dropped 1, 2: could not be checked: MemoryError: 4 TB wanted" in result.stdout
    assert re.search(r"^ *1 .* not checked *$", result.stdout, re.MULTILINE)


def test_when_nothing_compiles_the_compiler_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Habits(broken={64, 32, 16, 8, 4}))
    result = invoke(*TOY, "--device", "h100")
    assert result.exit_code == 1
    assert re.search(r"dropped 1, 2, 3, 4, 5, 6, 7, 8: compile: toy.cu does not compile", result.stdout)
    assert "expected a ';'" in result.stdout
    assert data(*TOY, "--device", "h100", code=1)["results"][0]["chosen"] is None


def test_a_long_log_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile(*_: Any) -> None:
        raise RuntimeError("\n".join(f"line {number}" for number in range(40)))

    monkeypatch.setattr(cli, "targets", lambda: [make_target(backend="cuda", compile=compile)])
    output = invoke(*TOY, "--device", "h100").stdout
    assert "line 12" in output and "line 13" not in output and "... and 27 lines more: --json has them" in output


def test_an_interrupted_run_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"made": 0}

    def before(tile: int) -> None:
        calls["made"] += 1
        if calls["made"] > 150:
            raise KeyboardInterrupt
        time.sleep(4e-4 * (1 + calls["made"] // 2 % 4))  # so uneven that no median settles

    give(monkeypatch, Habits(before=before))
    result = invoke("tune", "toy", "--device", "cpu", "--top", "2", "--seconds", "60", "--json")
    assert result.exit_code == 130
    document = json.loads(result.stdout)
    (outcome,) = document["results"]
    assert document["interrupted"] and outcome["interrupted"] and outcome["direction"] == "forward"
    (listed,) = shared().entries()
    assert listed.entry.by == "measured" and listed.entry.us == outcome["entry"]["us"]


def test_an_interrupt_before_anything_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def before(tile: int) -> None:
        raise KeyboardInterrupt

    give(monkeypatch, Habits(before=before))
    result = invoke("tune", "toy", "--device", "cpu")
    assert result.exit_code == 130
    assert "interrupted: nothing was measured yet" in result.stdout and shared().entries() == []
    assert "toy backward" not in result.stdout


def test_a_broken_gpu_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "_is_lost", lambda torch_device: True)
    give(monkeypatch, Habits(raises={32}))
    (result,) = data("tune", "toy", "--device", "cpu", code=1)["results"]
    assert result["lost"] and result["direction"] == "forward"
    assert result["candidates"][-1]["reason"] == "not tried: 2 broke the CUDA context"


def test_a_damaged_store_is_a_warning() -> None:
    """On the standard error, so that the document stays one."""
    path = shared().path(HOST.name)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    result = invoke(*TOY, "--device", "cpu", "--json", *QUICK)
    assert result.exit_code == 0 and json.loads(result.stdout)["results"][0]["stored"] == str(path)
    assert re.search(rf"^warning: {re.escape(str(path))}: is not JSON", result.stderr, re.MULTILINE), result.stderr


# --- which device ----------------------------------------------------------------------------------------------------


def test_without_a_gpu_a_device_has_to_be_named() -> None:
    assert refused(*TOY) == (
        "no GPU here: --device names the one to solve for (a100, h100, h200, b200, l4, rtx4090), and --device cpu "
        "times the CPU kernels"
    )
    assert refused(*TOY, "--device", "cuda:1") == "no cuda:1 here: torch finds 0 CUDA devices"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Pretends that there is a GPU of a name, on which CUDA kernels can be launched."""

    def pretend(name: str, missing: str | None = None) -> None:
        real = devices.replace(devices.PRESETS["h200"], name=name)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: name)
        monkeypatch.setattr(devices, "of", lambda device: real if device.type == "cuda" else HOST)
        monkeypatch.setattr(launch, "reason_missing", lambda: missing)

    return pretend


@pytest.mark.parametrize("name", [None, "cuda", "cuda:0", "CUDA", "Cuda:0", "h200", "H200", "nvidia h200"])
def test_the_gpu_that_is_here(name: str | None, gpu: Callable[[str], None]) -> None:
    gpu("NVIDIA H200")
    place = words.find_place(name)
    assert (place.device.name, place.torch_device, place.absent) == ("NVIDIA H200", "cuda:0", None)
    assert not place.on_cpu
    assert all(words.find_place(each).on_cpu for each in ("cpu", "CPU", HOST.name, HOST.name.upper()))


def test_another_gpu_than_the_one_that_is_here(gpu: Callable[[str], None]) -> None:
    gpu("NVIDIA H200")
    place = words.find_place("l4")
    assert (place.device.name, place.torch_device, place.absent) == ("l4", None, "no l4 here")
    with pytest.raises(click.UsageError, match="no cuda:1 here: torch finds 1 CUDA devices"):
        words.find_place("cuda:1")


@pytest.mark.parametrize(
    ("full", "name", "same"),
    [
        ("NVIDIA L40S", "l4", False),
        ("NVIDIA GeForce RTX 4090", "rtx4090", True),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090", True),
        ("NVIDIA H100 80GB HBM3", "h100", True),
        ("NVIDIA H100 80GB HBM3", "h200", False),
    ],
)
def test_names_of_gpus(full: str, name: str, same: bool) -> None:
    assert words.is_called(full, name) == same


def test_a_gpu_whose_kernels_cannot_be_launched(gpu: Callable[..., None]) -> None:
    gpu("NVIDIA H200", "CuPy is not installed (pip install 'seqops[cuda]')")
    result = invoke(*TOY)
    assert result.exit_code == 0
    assert "not timed: CuPy is not installed" in result.stdout and "stored as solved" in result.stdout


def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [make_target("toy", backend=name) for name in ("cuda", "triton", "cpu")]
    monkeypatch.setattr(cli, "targets", lambda: [*found, make_target("bean", backend="triton")])


def kernels(*arguments: str) -> list[str]:
    return [result["kernel"] for result in data("tune", *arguments, "--device", "h100", "--dry-run")["results"]]


def test_a_backend_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it is the one that serves the device: the first that exists, where the device is not here."""
    with_triton(monkeypatch)
    assert kernels("toy") == ["toy.forward.cuda"] and kernels("bean") == ["bean.forward.triton"]
    assert kernels("toy", "--backend", "triton") == ["toy.forward.triton"]
    assert kernels("--all") == ["toy.forward.cuda", "bean.forward.triton"]
    assert "toy forward (triton), bf16" in invoke("tune", "toy", "--backend", "triton", "--device", "h100").stdout
    wrong = refused("tune", "toy", "--backend", "cpu", "--device", "h100")
    assert wrong == "--backend: of toy, cuda and triton can be tuned on a GPU, not cpu"


@pytest.mark.parametrize(
    ("no_cuda", "no_triton", "chosen", "absent"),
    [
        (None, None, "cuda", None),
        ("no CuPy", None, "triton", None),
        ("no CuPy", "no Triton", "cuda", "no CuPy"),
    ],
)
def test_the_backend_that_serves_the_gpu_is_tuned(
    no_cuda: str | None,
    no_triton: str | None,
    chosen: str,
    absent: str | None,
    gpu: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu("NVIDIA H200", no_cuda)
    with_triton(monkeypatch)
    monkeypatch.setattr(words, "reason_missing", lambda op, name, device: no_triton)
    place = words.find_place(None)
    (target,) = words.choose_targets(cli.targets(), "toy", ["forward"], place, None)
    assert target.backend == chosen
    seen = words.place_of(target, place)
    assert (seen.absent, seen.torch_device) == (absent, None if absent else "cuda:0")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("tune",), "name an operator (toy, pea), or --all"),
        (("tune", "tooy", "--device", "cpu"), "no operator 'tooy' to tune; nearest: toy"),
        (("tune", "xyz", "--device", "cpu"), "no operator 'xyz' to tune; there are: toy, pea"),
        (
            ("tune", "toy", "--device", "h10"),
            "device: expected one of a100, h100, h200, b200, l4, rtx4090, got 'h10'; nearest: h100, h200, a100; cpu "
            "and cuda are what is here",
        ),
        (("tune", "pea", "--device", "h100"), "no kernel of pea can be tuned for a GPU"),
        (("tune", "pea", "--backward", "--device", "cpu"), "no backward kernel of pea can be tuned on the CPU"),
        (("tune", "toy", "--device", "cpu", "--dtype", "fp61"), "toy forward takes bf16, float32, not 'fp61'"),
        (
            ("tune", "--heads", "3", "--device", "cpu"),
            "--heads is part of a shape: name the operator, as in seqops tune toy",
        ),
        (("tune", "--show", "--clear"), "--show and --clear do not go together"),
        (("tune", "toy", "--all"), "--all takes no operator"),
        (("tune", "toy", "--probe"), "--probe does not take an operator"),
        (("tune", "--list-devices", "--device", "h100"), "--list-devices does not take --device"),
        (("tune", "--probe", "--forward", "--top", "8"), "--probe does not take --forward and --top"),
        (("tune", "--show", "--dry-run"), "--show does not take --dry-run"),
        (("tune", "toy", "--show", "--heads", "3"), "--show does not take --heads"),
        (("tune", "--show", "--output", "there"), "--show does not take --output"),
        (("tune", "--clear", "--yes", "--output", "there"), "--clear does not take --output"),
        (("tune", "toy", "--clear", "--seconds", "3", "--yes"), "--clear does not take --seconds"),
        (("tune", "toy", "--yes"), "--yes goes with --clear alone"),
        (("tune", "toy", "--dry-run", "--output", "there"), "--dry-run and --output do not go together"),
        (("tune", "toy", "--device", ""), "--device: expected the name of a GPU, cuda, cuda:1 or cpu, got nothing"),
        (("tune", "toy", "--device", "CUDA:1"), "no CUDA:1 here: torch finds 0 CUDA devices"),
        (("tune", "toy", "--probe", "--show"), "--show and --probe do not go together"),
        (("tune", "--probe"), "no GPU here: --device names the one to solve for"),
        (("tune", "--probe", "--device", "h100"), "--probe measures what is here: no GPU here"),
    ],
)
def test_wrong_words(arguments: tuple[str, ...], text: str) -> None:
    assert refused(*arguments).startswith(text)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--heds", "3"), ("No such option", "--heds", "--heads")),
        (("--dim", "wide"), ("--dim", "'wide' is not a valid integer")),
        (("--dim", "0"), ("--dim", "0 is not in the range x>=1")),
        (("--gate", "half"), ("--gate", "'half' is not one of 'full', 'constant'")),
        (("--top", "0"), ("--top", "0 is not in the range")),
        (("--seconds", "0"), ("--seconds", "0.0 is not in the range x>0")),
        (("--seconds", "-1"), ("--seconds", "-1.0 is not in the range x>0")),
        (("--seconds", "nan"), ("--seconds", "nan is no number of seconds")),
        (("--seconds", "inf"), ("--seconds", "inf is no number of seconds")),
        (("extra",), ("unexpected extra argument (extra)",)),
    ],
)
def test_wrong_flags(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    text = refused("tune", "toy", "--device", "cpu", *arguments)
    assert all(word in text for word in words), text


def test_a_shape_that_the_kernel_refuses_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    def key(*_: Any) -> None:
        raise ValueError("toy: dim: expected at most 512, got 1024")

    monkeypatch.setattr(cli, "targets", lambda: [make_target(key=key)])
    assert refused("tune", "toy", "--device", "cpu") == "toy: dim: expected at most 512, got 1024"


def test_a_shape_that_nothing_fits_is_explained() -> None:
    result = invoke(*TOY, "--device", "h100", "--dim", "7")
    assert result.exit_code == 3
    assert "infeasible: " in result.stdout and "the tile divides the width" in result.stdout
    (found,) = data(*TOY, "--device", "h100", "--dim", "7", code=3)["results"]
    assert found["candidates"] == [] and found["explanation"].startswith("infeasible")


# --- everything, and files to ship -----------------------------------------------------------------------------------


def test_all_operators_at_their_default_shapes() -> None:
    document = data("tune", "--all", "--device", "cpu", *QUICK)
    assert [result["kernel"] for result in document["results"]] == [
        "toy.forward.cpu",
        "toy.backward.cpu",
        "pea.forward.cpu",
    ]
    assert len(shared().entries()) == 3
    only = data("tune", "--all", "--device", "h100", "--backward", "--dry-run")
    assert [result["kernel"] for result in only["results"]] == ["toy.backward.cuda"]


def test_one_operator_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [make_target("toy", habits=Habits(raises={64, 32, 16, 8, 4})), make_target("pea")]
    monkeypatch.setattr(cli, "targets", lambda: found)
    document = data("tune", "--all", "--device", "cpu", *QUICK, code=1)
    assert [result["by"] for result in document["results"]] == [None, "measured"]


def test_files_to_ship_go_to_a_folder(tmp_path: Path) -> None:
    """They are of the store's form: put into configs/, they serve whoever has stored nothing."""
    folder = tmp_path / "configs"
    (result,) = data(*TOY, "--device", "cpu", "--output", str(folder), *QUICK)["results"]
    assert shared().entries() == []
    assert Path(result["stored"]).parent == folder
    written = [path.name for path in folder.glob("*.json")]
    assert written == [shared().path(HOST.name).name]
    shipped = Store(tmp_path / "none", folder)
    entry = shipped.lookup(HOST.name, result["key"], make_target().tunable.digest, lambda constants: None)
    assert entry is not None and dict(entry.constants) == result["entry"]["constants"]


# --- what is stored --------------------------------------------------------------------------------------------------


def put(device: str, key: str, by: str = "measured", source: str | None = None) -> None:
    name = key.partition("|")[0]
    op, direction, backend = name.split(".")
    digest = source or make_target(op, direction, backend).tunable.digest
    shared().put(device, 90, key, Entry({"tile": 8, "unroll": 1}, by, digest, us=1234.0 if by == "measured" else None))


@pytest.fixture
def filled() -> None:
    put("h100", "toy.forward.cuda|bf16|D=64,B<=8|train")
    put("h100", "toy.backward.cuda|bf16|D=64,B<=8|train", "solved")
    put("l4", "pea.forward.cpu|bf16|D=64,B<=8", source="0" * 16)


def test_show_lists_entries_with_origin_and_age(filled: None) -> None:
    result = invoke("tune", "--show")
    assert result.exit_code == 0
    assert [line.rstrip() for line in result.stdout.splitlines() if line.rstrip() in ("h100", "l4")] == ["h100", "l4"]
    row = r"^toy.forward.cuda\|bf16\|D=64,B<=8\|train +tile=8 unroll=1 +measured +1\.23 ms +user +\d+ s *$"
    assert re.search(row, result.stdout, re.MULTILINE), result.stdout
    # Its kernel is not the present one.
    assert re.search(r"^pea\.forward.* kernel changed: not used *$", result.stdout, re.MULTILINE)
    assert "toy" not in invoke("tune", "--show", "pea").stdout
    assert invoke("tune", "pea", "--show", "--device", "h100").stdout == "nothing is stored of pea\n"
    assert "toy" not in invoke("tune", "--show", "--device", "L4").stdout
    entries = data("tune", "--show", "toy")["entries"]
    assert [(entry["key"].partition("|")[0], entry["by"], entry["origin"]) for entry in entries] == [
        ("toy.backward.cuda", "solved", "user"),
        ("toy.forward.cuda", "measured", "user"),
    ]
    assert not entries[0]["stale"] and entries[0]["age"] >= 0 and entries[1]["us"] == 1234


def test_show_when_there_is_nothing() -> None:
    assert "nothing is stored of toy\n" in invoke("tune", "--show", "toy").stdout


def test_clear_asks_first(filled: None) -> None:
    result = invoke("tune", "--clear", "toy", input="n\n")
    assert result.exit_code == 0 and "nothing removed" in result.stderr
    assert f"Remove 2 entries of toy in {shared().folder}?" in result.stderr
    assert len(shared().entries()) == 3
    assert refused("tune", "--clear", "toy").endswith("--clear asks first; where nobody can answer, add --yes")
    result = invoke("tune", "--clear", "toy", input="y\n")
    assert result.exit_code == 0 and "removed 2 entries of toy\n" in result.stdout
    assert [each.key.partition(".")[0] for each in shared().entries()] == ["pea"]


def test_clear_removes_the_user_s_alone(filled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqops.tune import store

    shipped = tmp_path / "shipped"
    other = Store(shipped, shipped)
    other.put("h100", 90, "toy.forward.cuda|bf16|D=1,B<=8", Entry({"tile": 8}, "measured", "0" * 16))
    mine = Store(shared().folder, shipped)
    monkeypatch.setattr(actions, "shared", lambda: mine)
    expected = {"seqops": seqops.__version__, "removed": 2, "probes": []}
    assert data("tune", "--clear", "--yes", "--device", "h100") == expected
    assert data("tune", "--clear", "--yes")["removed"] == 1
    (left,) = data("tune", "--show")["entries"]
    assert left["origin"] == "shipped" and "shipped" in invoke("tune", "--show").stdout
    assert invoke("tune", "--clear").stdout.rstrip() == "removed 0 entries"
    assert store.SHIPPED.parent.name == "tune"


def test_clear_of_a_direction(filled: None) -> None:
    """And --show of one: the other one's entries are none of its business."""
    assert "toy.forward" not in invoke("tune", "--show", "toy", "--backward").stdout
    assert data("tune", "--clear", "toy", "--backward", "--yes")["removed"] == 1
    assert [each.key.partition("|")[0] for each in shared().entries()] == ["toy.forward.cuda", "pea.forward.cpu"]
    assert data("tune", "--clear", "--forward", "--device", "l4", "--yes")["removed"] == 1
    assert data("tune", "--clear", "--backward", "--yes")["removed"] == 0
    assert [each.key.partition("|")[0] for each in shared().entries()] == ["toy.forward.cuda"]
    assert data("tune", "--clear", "--forward", "--yes")["removed"] == 1


def test_clear_that_is_dry_removes_nothing(filled: None) -> None:
    assert invoke("tune", "--clear", "toy", "--dry-run").stdout == "would remove 2 entries of toy\n"
    found = data("tune", "--clear", "--dry-run", "--yes")
    assert (found["removed"], found["found"], len(shared().entries())) == (0, 3, 3)


def test_clear_asks_before_it_removes_latencies() -> None:
    shared().put_probe("h100", 90, {"launch_us": 2.0})
    result = invoke("tune", "--clear", input="n\n")
    assert "Remove 0 entries and the latencies of h100 in" in result.stderr and shared().probe("h100")
    assert "latencies" not in invoke("tune", "--clear", "toy", "--yes").stdout and shared().probe("h100")
    assert data("tune", "--clear", "--yes")["probes"] == ["h100"] and not shared().probe("h100")


def test_devices_are_listed() -> None:
    output = invoke("tune", "--list-devices").stdout
    for preset in devices.PRESETS.values():
        assert re.search(rf"^{preset.name} +{preset.arch} +{preset.processors} .*preset *$", output, re.MULTILINE)
    assert f"cpu: {HOST.name}" in output and "no GPU here" in output
    listed = data("tune", "--list-devices")["devices"]
    assert [device["name"] for device in listed if not device["present"]] == list(devices.PRESETS)
    assert [device["name"] for device in listed if device["present"]] == [HOST.name]


def test_probing_measures_the_device_that_is_here(gpu: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def measure(on: torch.device) -> dict[str, float]:
        asked.append(on)
        return {"grid_barrier_us": 1.31, "sync_cycles": 30.0}

    stub = SimpleNamespace(measure=measure)
    monkeypatch.setitem(sys.modules, "seqops.tune.probe", stub)
    monkeypatch.setattr(sys.modules["seqops.tune"], "probe", stub, raising=False)
    gpu("NVIDIA H200")
    output = invoke("tune", "--probe", "--dry-run").stdout
    assert re.search(r"^grid_barrier_us +1\.31 +1\.2 +estimate *$", output, re.MULTILINE), output
    assert "not stored: --dry-run" in output and shared().probe("NVIDIA H200") == {}
    document = data("tune", "--probe")
    assert document["probe"] == {"grid_barrier_us": 1.31, "sync_cycles": 30.0}
    assert (document["stored"], document["unstored"]) == (str(shared().path("NVIDIA H200")), None)
    assert shared().probe("NVIDIA H200") == {"grid_barrier_us": 1.31, "sync_cycles": 30.0}
    assert asked == [torch.device("cuda:0")] * 2

    blocked(shared().folder)
    result = invoke("tune", "--probe")
    assert result.exit_code == 1 and "kept in memory only: " in result.stdout and "\nstored" not in result.stdout
    document = data("tune", "--probe", code=1)
    assert document["stored"] is None and document["unstored"].endswith("nvidia-h200.json cannot be written")


def blocked(folder: Path) -> None:
    """Has a file where a folder should be, which stops root too."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


def test_what_cannot_be_stored_is_told() -> None:
    blocked(shared().folder)
    result = invoke(*TOY, "--device", "cpu", *QUICK)
    assert result.exit_code == 1 and re.search(
        r"^kept in memory only: .* cannot be written", result.stdout, re.MULTILINE
    )
    assert "stored as" not in result.stdout and "cannot be written" in result.stderr
    (found,) = data(*TOY, "--device", "cpu", *QUICK, code=1)["results"]
    assert found["stored"] is None and found["unwritten"] and found["chosen"] is not None
    assert invoke(*TOY, "--device", "cpu", "--dry-run", *QUICK).exit_code == 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_only_the_first_process_of_a_machine_works(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, entries in (("1", 0), ("0", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        result = invoke(*TOY, "--device", "cpu", *QUICK)
        assert result.exit_code == 0 and len(shared().entries()) == entries
        assert bool(result.output) == (rank == "0")


def test_no_rank_is_as_good_as_the_first(monkeypatch: pytest.MonkeyPatch, filled: None) -> None:
    monkeypatch.setenv("LOCAL_RANK", "none")
    assert invoke(*TOY, "--device", "cpu", "--dry-run", *QUICK).output
    monkeypatch.setenv("LOCAL_RANK", "3")  # which stops the work alone
    assert "toy.forward" in invoke("tune", "--show").stdout and "h100" in invoke("tune", "--list-devices").stdout
    assert data("tune", "--clear", "toy", "--yes")["removed"] == 2
    assert invoke("tune", "--probe", "--device", "cpu").output == ""


TOYS = """
import sys; sys.path.insert(0, {tests!r})
import toys; toys.install(toys.Habits(wrong={{4}}, spills={{16}}, sleeps={{64: 2e-3, 8: 4e-3}}))
from seqops.cli import main; main(prog_name="seqops")
"""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", TOYS.format(tests=str(TESTS)), *arguments]


def test_piped_output_is_plain() -> None:
    """A real process with its output in pipes: no colours, no cursor movements, no bar, no wrapped lines."""
    arguments = ("tune", "toy", "--device", "cpu", "--seconds", "0.2")
    done = subprocess.run(command(*arguments), cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stdout + done.stderr)
    assert done.stderr.count("\n") == 16 and "stored as measured" in done.stdout


INTERRUPTED = """
import os, signal, sys, time; sys.path.insert(0, {tests!r})
import toys
calls = []
def before(tile):
    calls.append(tile)
    time.sleep(4e-4 * (1 + len(calls) // 2 % 4))
    if len(calls) == 150:
        os.kill(os.getpid(), signal.SIGINT)
toys.install(toys.Habits(before=before))
from seqops.cli import main; main(prog_name="seqops")
"""


def test_a_real_interrupt() -> None:
    """The signal of Ctrl-C, in a process of its own: the code of the shell, and what was measured in the file."""
    words = ["tune", "toy", "--device", "cpu", "--top", "2", "--seconds", "60"]
    program = [sys.executable, "-c", INTERRUPTED.format(tests=str(TESTS)), *words]
    done = subprocess.run(program, cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert re.search(r"^interrupted *$", done.stdout, re.MULTILINE) and "stored as measured" in done.stdout
    assert "Traceback" not in done.stderr and "toy backward" not in done.stdout
    assert [each.key.partition("|")[0] for each in shared().entries()] == ["toy.forward.cpu"]


@pytest.mark.parametrize("words", [("--probe", "--device", "cpu"), ("--list-devices",), ("toy", "--device", "cpu")])
def test_an_interrupt_anywhere(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    from seqops.tune import probe

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probe, "measure", interrupt)
    monkeypatch.setattr(devices, "present", interrupt)
    monkeypatch.setattr(cli, "choose_targets", interrupt)
    result = invoke("tune", *words)
    assert result.exit_code == 130 and result.stderr == "interrupted\n" and result.stdout == ""
    monkeypatch.setattr(cli, "targets", interrupt)  # while the flags are read
    assert invoke("tune", *words).exit_code == 130


def test_an_interrupt_of_the_question(filled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> bool:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise click.Abort from None  # as click does

    monkeypatch.setattr(click, "confirm", ask)
    assert invoke("tune", "--clear").exit_code == 130 and len(shared().entries()) == 3


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        (">&-", "toy --forward --device cpu --seconds 0.05"),
        ("2>&-", "toy --forward --device cpu --seconds 0.05"),
        (">&-", "--list-devices"),
        (">&- 2>&-", "--show"),
    ],
)
def test_closed_outputs(closed: str, words: str) -> None:
    program = ["sh", "-c", f'exec "$@" {closed}', "sh", *command("tune", *words.split())]
    done = subprocess.run(program, cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done.stderr


def test_an_output_that_takes_ascii_alone() -> None:
    program = command("tune", "toy", "--forward", "--device", "cpu", "--seconds", "0.1")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(program, cwd=TESTS.parent, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"measured us +\+- +runs", done.stdout) and ", +-" in done.stderr


@pytest.mark.parametrize("columns", [0, 1, 40, 60])
def test_a_narrow_terminal_loses_nothing(columns: int) -> None:
    """Ranks and constants, and no line is wider than it; a width that cannot be is not believed."""
    arguments = ("tune", "toy", "--forward", "--device", "cpu", "--seconds", "0.1", "--dry-run")
    code, written = run_in_terminal(command(*arguments), TESTS.parent, columns)
    assert code == 0, written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2].rstrip() for line in plain.splitlines()]
    assert max(map(len, lines)) <= (max(columns, 20) if columns else 80)
    text = " ".join(line.strip() for line in lines)
    ranks = r"^(?:[* ] )(\d)  " if columns in (0, 60) else r"^(?:\* )?(\d): "  # the rows of a table, or lines
    assert re.findall(ranks, "\n".join(lines), re.MULTILINE) == list("12345678"), lines
    for name, values in (("tile", (64, 32, 32, 16, 16, 8, 8, 4)), ("unroll", (1, 1, 2, 1, 2, 1, 2, 1))):
        found = [int(value) for value in re.findall(rf"\b{name}[= ](\d+)", text)]
        column = columns == 0 and not found
        assert column or sorted(found) == sorted(values), text


@pytest.mark.parametrize("columns", [80, 200])
def test_terminal_output_is_drawn(columns: int) -> None:
    """With a bar and colours; no line is wider than the terminal, and no number is cut."""
    arguments = ("tune", "toy", "--forward", "--device", "cpu", "--seconds", "0.3")
    code, written = run_in_terminal(command(*arguments), TESTS.parent, columns)
    assert code == 0, written
    assert "\x1b[" in written and re.search(r"timing \d/7", written) and "s left" in written
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2] for line in plain.splitlines()]
    assert max(map(len, lines)) <= columns
    start = next(i for i, line in enumerate(lines) if "measured us" in line)
    rows = lines[start + 1 : start + 9]
    assert [re.match(r"[* ] (\d)  ", row)[1] for row in rows] == list("12345678"), rows
    # rank, tile, unroll; the model's figures where there is room; times, runs and remarks
    assert all(len(row.split()) >= 5 for row in rows) and "…" not in "".join(rows)
    assert ("registers" in lines[start]) == (columns == 200)
    assert rows[7].rstrip().endswith("wrong")


def test_other_commands_do_not_load_the_tuner() -> None:
    code = """
import sys
from seqops.cli import main
try:
    main(["info", "--json"], prog_name="seqops")
except SystemExit:
    pass
print(*sorted(name for name in sys.modules if name.startswith("seqops.tune")), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not {"seqops.tune.cli", "seqops.tune.search", "seqops.tune.csp"} & set(done.stderr.split())


# --- tables ----------------------------------------------------------------------------------------------------------


def make_outcome(names: int, measured: bool) -> search.Outcome:
    """Two candidates with so many constants, of which only the last differs."""
    constants = {f"constant_{number}": 16 for number in range(names)}
    first = search.Candidate(1, constants, 100.0, {"registers": 64, "shared": 4096.0, "step us": 0.5})
    last = f"constant_{names - 1}"
    second = search.Candidate(2, {**constants, last: 8}, 123456.0, {"registers": 64, "shared": 4096.0, "step us": 0.5})
    if measured:
        first.us, first.runs, first.spread = 99.0, 5, 0.002
    return search.Outcome(make_target(), HOST, {}, "bf16", None, candidates=[first, second])


@pytest.mark.parametrize("measured", [False, True])
def test_wide_tables_put_what_is_common_above(measured: bool) -> None:
    every, columns = report.arrange(make_outcome(9, measured), 80)
    assert every == " ".join(f"constant_{number}=16" for number in range(8))
    headings = [heading for heading, _ in columns]
    assert headings[:2] == ["", "constant_8"] and "model us" in headings
    assert ("registers" in headings) and ("measured us" in headings) == measured
    assert sum(max(map(len, [heading, *cells])) + report.GAP for heading, cells in columns) <= 80
    every, columns = report.arrange(make_outcome(9, measured), 200)
    assert every == "" and len(columns) >= 9 + 5


def test_entries_that_are_too_wide_for_a_table_are_paragraphs(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    constants = {"threads": 256, "steps": 16, "blocks": 2, "lanes": 8, "group": 1}
    key = "toy.forward.cuda|bf16|D=64,B<=8|train"
    listed = Listed("h100", key, "user", Entry(constants, "measured", "0" * 16, us=1234.0))
    wide = "threads=256 steps=16 blocks=2 lanes=8 group=1"
    for width, expected in (
        (80, ["h100", key, "    measured 1.23 ms, user, ? old, kernel changed: not used", f"    {wide}"]),
        (200, None),
    ):
        report.draw_entries(Console(width=width, markup=False, highlight=False), [(listed, True)])
        lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
        if expected is not None:
            assert lines == expected
        else:
            assert len(lines) == 3 and key in lines[2] and wide in lines[2]


@pytest.mark.parametrize(
    ("us", "text"), [(0.6123, "0.612 us"), (999.4, "999 us"), (1234.0, "1.23 ms"), (2.5e6, "2.5 s")]
)
def test_times_are_readable(us: float, text: str) -> None:
    assert report.describe_time(us) == text


@pytest.mark.parametrize(("seconds", "text"), [(None, "?"), (5, "5 s"), (200, "3 min"), (7300, "2 h"), (2e5, "2 d")])
def test_ages_are_readable(seconds: float | None, text: str) -> None:
    assert report.describe_age(seconds) == text


# --- the page --------------------------------------------------------------------------------------------------------

PAGE = TESTS.parent / "docs" / "tuning.md"


def section() -> str:
    found = re.search(r"^## Command line\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{PAGE} has no section `Command line`"
    return found[1]


def test_the_page_names_every_option_and_no_other() -> None:
    own = {name for param in cli.tune.params for name in param.opts if name.startswith("--")}
    named = set(re.findall(r"`(--[a-z-]+)", "\n".join(re.findall(r"^\|.*$", section(), re.MULTILINE))))
    shapes = {f"--{flag.name}" for target in targets() for flag in target.flags}
    assert own - named == set() and named - own <= shapes | {"--yes"}
    assert {"--batch", "--time"} <= shapes
    codes = re.findall(r"^\| (\d+) \|", section(), re.MULTILINE)
    assert codes == ["0", str(cli.FAILED), "2", str(cli.INFEASIBLE), str(cli.INTERRUPTED)]


def test_the_page_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first example, which any machine with NVRTC prints: all of it but times, nodes and the user's folder."""
    monkeypatch.undo()
    if launch.reason_not_compiled() is not None:
        pytest.skip(launch.reason_not_compiled())
    example = re.search(r"^```console\n\$ seqops (.*?)\n(.*?)^```$", section(), re.MULTILINE | re.DOTALL)
    with isolated(monkeypatch):
        printed = invoke(*example[1].split()).stdout

    def plain(text: str) -> list[str]:
        text = re.sub(r"[\d.]+ (ms|s)\b|\d+ nodes|as solved: \S+", "*", text)
        return [re.sub(r" +", " ", line).strip() for line in text.strip().splitlines()]

    assert plain(printed) == plain(example[2])


@contextmanager
def isolated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with TemporaryDirectory() as folder:
        monkeypatch.setenv("SEQOPS_CACHE", folder)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        yield
