"""The `seqops` command: what it prints, for people and for programs, and its exit codes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from terminal import run_in_terminal

import seqops
from seqops import catalog
from seqops.cli import main
from seqops.core import backend, info, launch

ROOT = Path(__file__).resolve().parents[1]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def invoke(*arguments: str):
    return CliRunner().invoke(main, arguments, prog_name="seqops")


def test_info_names_versions_devices_and_every_operator():
    result = invoke("info")
    assert result.exit_code == 0, result.output
    gpu = "cuda:0" if torch.cuda.device_count() else "GPUs"
    for expected in (seqops.__version__, torch.__version__, torch.ops.seqops.cpu_isa(), gpu):
        assert expected in result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.output.splitlines() if line.strip()}
    table = backend.table()
    columns = rows["operator"]
    assert columns == list(backend.BACKENDS)
    for operator, reasons in table.items():
        assert rows[operator] == ["yes" if reasons[name] is None else "no" for name in columns]
    for reason in {reason for row in table.values() for reason in row.values() if reason}:
        assert reason in result.output


@pytest.mark.parametrize("module", ["seqops", "seqops.cli"])
def test_without_arguments_it_lists_what_there_is(module):
    """Every operator under its room, every module with paper and operators, every command, in 100 columns."""
    command = [sys.executable, "-m", "seqops"]
    if module == "seqops.cli":
        command = [sys.executable, "-c", "from seqops.cli import main; main()"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not CONTROL.search(result.stdout.replace("\n", ""))
    assert max(map(len, result.stdout.splitlines())) <= 100
    joined = " ".join(result.stdout.split())
    positions = [joined.index(title + " (seqops.*)") for title in catalog.rooms().values()]
    assert positions == sorted(positions)
    for each in catalog.operators():
        assert f" {each.name} {each.summary[:40].rsplit(' ', 1)[0]}" in joined  # cut to a line
    for each in catalog.modules():
        assert f" {each.name} {each.summary}" in joined
        assert f"{each.papers[0]}: {', '.join(each.operators)}" in joined
    for name in main.list_commands(None):
        assert f" seqops {name} " in joined


def test_catalog_is_what_the_code_holds():
    """Nothing is left out, and every entry has a sentence and a paper."""
    operators, modules = catalog.operators(), catalog.modules()
    assert {each.name for each in operators} == set(seqops.__all__) & set(backend.table())
    assert {each.room for each in operators} == set(catalog.rooms())
    assert {"LSTM", "SLSTM"} <= {each.name for each in modules} <= set(seqops.nn.__all__)
    assert next(each for each in modules if each.name == "GRU").operators == ("gru",)
    for each in [*operators, *modules]:
        assert 20 <= len(each.summary) <= 160 and each.summary.endswith("."), each
        assert each.papers, each
    cited = {title for paper, _, _ in catalog.citations() for title in [catalog.key(paper)]}
    assert cited == {catalog.key(paper) for each in [*operators, *modules] for paper in each.papers}


def test_json_is_the_whole_report():
    result = invoke("info", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output) == json.loads(json.dumps(info.collect(seqops.__version__)))


def test_report_says_what_is_in_use(monkeypatch):
    monkeypatch.setenv("SEQOPS_CPU_ISA", "avx2")
    report = info.collect("1.2.3")
    assert report["versions"]["seqops"] == "1.2.3"
    assert report["environment"]["SEQOPS_CPU_ISA"] == "avx2"
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["cpu"]["parallel_backend"] in ("OpenMP", "native thread pool")
    assert len(report["gpus"]) == torch.cuda.device_count()


def test_report_says_how_gpu_kernels_can_run(monkeypatch, tmp_path):
    """The simulator and the interpreter are on where their variables say so, and the cache is the one they name."""
    for name in ("SEQOPS_SIMULATE", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path / "none yet"))
    report = info.collect("1.2.3")
    assert "SEQOPS_SIMULATE is not set" in report["gpu_kernels"]["simulator"]
    assert report["gpu_kernels"]["interpreter"] is False
    assert report["gpu_kernels"]["launch"] == launch.reason_missing()
    assert report["cache"] == {"folder": str(tmp_path / "none yet"), "files": 0, "bytes": 0}
    for name, size in (("a.cubin", 1000), ("b.so", 24), ("a.cubin.lock", 7)):
        (tmp_path / name).write_bytes(bytes(size))
    given = {"SEQOPS_SIMULATE": "2", "SEQOPS_CACHE": str(tmp_path), "TRITON_INTERPRET": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    report = info.collect("1.2.3")
    assert report["gpu_kernels"]["simulator"] == launch.reason_not_simulated()
    assert report["gpu_kernels"]["interpreter"] is True
    assert report["cache"] == {"folder": str(tmp_path), "files": 2, "bytes": 1024}
    assert given.items() <= report["environment"].items()
    shown = invoke("info").output
    assert re.search(r"^Triton interpreter +on", shown, re.MULTILINE)
    assert re.search(rf"^kernel cache +{re.escape(str(tmp_path))}: 2 files, 0\.0 MB", shown, re.MULTILINE)


def test_versions_are_looked_up_without_importing():
    """NVRTC, CuPy and Triton are named, installed or not."""
    code = "import sys; from seqops.core import info; info.collect('1'); print({'cupy', 'triton'} & {*sys.modules})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.strip() == "set()", result.stderr
    assert {"triton", "cupy", "nvrtc"} <= set(info.collect("1.2.3")["versions"])


def test_operators_that_work_on_the_cpu_say_so():
    table = backend.table()
    assert set(table) >= {"lstm", "gru", "slstm", "elman"}
    for row in table.values():
        assert row["cpu"] is None and row["reference"] is None
        assert all(reason is None or len(reason) > 10 for reason in row.values())


@pytest.mark.parametrize("module", ["seqops", "seqops.cli"])
def test_piped_output_is_plain(module):
    """A real process with its output in a pipe: no colours, no cursor movements, no wrapped lines."""
    code = "from seqops.cli import main; main()" if module == "seqops.cli" else None
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", module]
    result = subprocess.run([*command, "info"], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert not CONTROL.search(result.stdout.replace("\n", ""))
    assert re.search(r"^instruction set +\w+", result.stdout, re.MULTILINE)


def test_terminal_output_is_drawn():
    code, written = run_in_terminal([sys.executable, "-m", "seqops", "info"], ROOT)
    assert code == 0, written
    assert "\x1b[" in written and "lstm" in written


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 0, "Modules (seqops.nn.*)"),
        (("--help",), 0, "info"),
        (("--version",), 0, f"seqops, version {seqops.__version__}"),
        (("inof",), 2, "No such command 'inof'"),
        (("info", "--jsno"), 2, "No such option"),
        (("info", "extra"), 2, "unexpected extra argument"),
    ],
)
def test_exit_codes_and_messages(arguments, code, message):
    result = invoke(*arguments)
    assert result.exit_code == code
    assert message in result.output


def test_version_is_the_one_of_the_package():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert seqops.__version__ == declared[1]


def test_importing_seqops_loads_no_command_line():
    heavy = {"click", "rich", "triton", "cupy", "matplotlib"}
    code = f"import sys, seqops, seqops.nn; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
