"""Rounds of exchange between blocks: in the simulator they give the expected number, and a mistake is noticed."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import exchange
from seqops.core import launch

HAS_NVRTC = importlib.util.find_spec("cupy_backends") is not None
ROUNDS = (1, 5)


@pytest.fixture(params=[1, 2, 3], ids=lambda seed: f"schedule {seed}")
def simulate(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if reason := launch._reason_without_compiler():
        pytest.skip(reason)
    monkeypatch.setenv("SEQOPS_SIMULATE", str(request.param))
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))


def run(way: exchange.Way, size: int) -> exchange.Round:
    return exchange.measure_way(way, size, torch.empty(0), rounds=ROUNDS, repeats=1)


@pytest.mark.parametrize("way", exchange.WAYS, ids=lambda way: way.entry)
def test_rounds_are_complete(way: exchange.Way, simulate: None) -> None:
    for size in (128, 256) if way.kind == "block" else (4,) if way.kind == "cluster" else (1, 3):
        found = run(way, size)
        assert found.error is None and found.microseconds is not None
        assert (found.threads if way.kind == "block" else found.blocks) == size


WAY = {way.entry: way for way in exchange.WAYS}
OMISSIONS = {
    "block barrier": ("exchange_block", "    __syncthreads();\n    value", "    value"),
    "cluster barrier": ("exchange_cluster_barrier", "    cluster_barrier();\n    value", "    value"),
    "mbarrier": ("exchange_cluster_async", "    mbarrier_wait(s_full + i % 2, i / 2 % 2);\n", ""),
    "half of the bytes": ("exchange_cluster_async", "CLUSTER * WORDS * sizeof(uint4));", "8 * sizeof(uint4));"),
    "grid barrier": ("exchange_grid_barrier", "    grid_barrier(p_flags, total);\n", ""),
    "a flag too early": ("exchange_grid_flags", "    __syncthreads();\n    if", "    if"),
    "no wait for flags": ("exchange_grid_flags", "wait_for_count(p_flags + k, unsigned(i + 1));", ";"),
    "any tag": ("exchange_grid_packets", "wait_for_packet(p_round + k, load_packet(p_round + k), tag)", "value"),
}


@pytest.mark.parametrize("omission", OMISSIONS)
def test_an_omission_has_no_time(
    omission: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In one of the schedules."""
    if reason := launch._reason_without_compiler():
        pytest.skip(reason)
    entry, there, instead = OMISSIONS[omission]
    text = Path(exchange.SOURCE).read_text()
    begin = text.index(entry)
    assert there in text[begin : text.index("EXPORT(", begin)]
    source = tmp_path / "exchange.cu"
    source.write_text(text[:begin] + text[begin:].replace(there, instead, 1))
    monkeypatch.setattr(exchange, "SOURCE", str(source))
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
    found = []
    for schedule in ("1", "2", "3"):
        monkeypatch.setenv("SEQOPS_SIMULATE", schedule)
        found.append(run(WAY[entry], 128 if entry == "exchange_block" else 4))
    wrong = [each for each in found if each.error]
    assert wrong and all(each.microseconds is None for each in wrong), found


def test_a_kernel_that_does_nothing_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.Kernel, "__call__", lambda *arguments, **options: None)
    for way in exchange.WAYS:
        found = run(way, 128 if way.kind == "block" else 4)
        assert found.error.startswith("RuntimeError: block 0 of ") and found.microseconds is None


def test_a_refused_launch_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a cluster of 16 blocks\nis not granted")

    monkeypatch.setattr(launch.Kernel, "__call__", refuse)
    assert run(exchange.WAYS[1], 16).error == "RuntimeError: a cluster of 16 blocks"


def test_sizes_follow_the_gpu() -> None:
    block, cluster, *_, packets = exchange.WAYS
    assert exchange.sizes_of(block, 20, False) == list(exchange.BLOCK_THREADS)
    assert exchange.sizes_of(cluster, 20, False) == [] and exchange.sizes_of(cluster, 20, True) == [2, 4, 8, 16]
    assert exchange.sizes_of(packets, 20, True) == [2, 8, 16, 20]
    assert exchange.sizes_of(packets, 132, True) == [2, 8, 16, 32, 132]


def test_the_difference_of_two_lengths_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that takes 5 µs, and rounds of 0.25 µs."""
    monkeypatch.setattr(exchange, "check", lambda *arguments: None)
    counts: list[int] = []
    monkeypatch.setattr(launch.Kernel, "__call__", lambda self, *given, **options: counts.append(given[3][-1]))

    def seconds(call: Any, like: torch.Tensor) -> float:
        call()
        return 5e-6 + 0.25e-6 * counts[-1]

    monkeypatch.setattr(exchange, "seconds", seconds)
    found = exchange.measure_way(WAY["exchange_grid_packets"], 4, torch.empty(0))
    assert found.microseconds == pytest.approx(0.25)
    assert counts == list(exchange.ROUNDS) * (1 + exchange.REPEATS)


def test_command_writes_what_it_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, wrong = (
        {"way": "w", "blocks": 2, "threads": 256, "bytes": 768, "microseconds": spent, "error": error}
        for spent, error in ((0.5, None), (None, "RuntimeError: no"))
    )
    monkeypatch.setattr(launch, "reason_missing", lambda: None)
    for rounds, code in (([right], 0), ([right, wrong], 1)):
        document = {"facts": {"l2_hop_us": 0.61}, "rounds": rounds}
        monkeypatch.setattr(exchange, "measure", lambda document=document: document)
        assert exchange.main(["--json", str(tmp_path / "found.json")]) == code
        assert json.loads((tmp_path / "found.json").read_text()) == document
    printed = capsys.readouterr().out
    assert "l2_hop_us = 0.61" in printed and "w, 2 blocks of 256 threads, 768 bytes: 0.500 µs a round" in printed
    assert "768 bytes: RuntimeError: no" in printed


@pytest.mark.skipif(not HAS_NVRTC, reason="needs CuPy")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100", "sm_120"])
def test_it_compiles_for_every_architecture(arch: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without stack, within static shared memory."""
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path))
    clusters = {} if arch == "sm_80" else {"CLUSTER": 16}
    constants = {"THREADS": exchange.THREADS, "WORDS": exchange.WORDS, **clusters}
    used = launch.resources(launch.compile_offline(exchange.SOURCE, constants, arch))
    assert used["STACK"] == used["LOCAL"] == 0 and used["SHARED"] <= 48 << 10
