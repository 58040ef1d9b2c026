"""The store of tuned constants: what is kept, the order of sources, and whole files whoever writes."""

import ast
import json
import shutil
import threading
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from stores import DEVICE, KEY, OLD, SOURCE, document, entry, look, plain, put_file, refuse

from seqops.core import launch
from seqops.tune import store
from seqops.tune.store import Store


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The user's, not there yet, and an empty one that stands for the package's."""
    (tmp_path / "shipped").mkdir()
    return tmp_path / "cache" / "tune", tmp_path / "shipped"


@pytest.fixture
def kept(folders: tuple[Path, Path]) -> Store:
    return Store(*folders)


# ---- what goes in comes out


def test_round_trip(kept: Store) -> None:
    assert look(kept) is None
    kept.put(DEVICE, 90, KEY, entry())
    found = look(kept)
    assert found is not None and found.constants == {"ctas": 8, "unit": 4} and found.by == "measured"
    assert (found.us, found.model_us, found.source) == (611.0, 493.0, SOURCE)
    assert found.seqops == __import__("seqops").__version__
    written = datetime.fromisoformat(found.time)
    assert abs(datetime.now(timezone.utc) - written) < timedelta(minutes=1)
    assert look(Store(kept.folder, kept.shipped)) == found
    assert look(kept, device="NVIDIA H100") is None

    content = json.loads(kept.path(DEVICE).read_text())
    assert content["format"] == 1 and content["device"] == DEVICE and content["arch"] == 90
    assert {*content["entries"]} == {KEY}
    kept.put(DEVICE, 90, "another|bf16", entry())
    lines = kept.path(DEVICE).read_text().splitlines()
    assert [line.split(":")[0].strip(' {"') for line in lines] == [
        *("format", "device", "arch", "probe", "entries"),
        *("another|bf16", KEY, "}}"),
    ]
    assert sorted(path.name for path in kept.folder.iterdir()) == ["nvidia-h200.json", "nvidia-h200.json.lock"]


def test_an_answer_is_the_callers_own(kept: Store) -> None:
    kept.put(DEVICE, 90, KEY, entry())
    look(kept).constants["ctas"] = 99  # type: ignore[index, union-attr]
    kept.probe(DEVICE)["x"] = 1.0
    assert look(kept).constants["ctas"] == 8  # type: ignore[union-attr]
    assert kept.probe(DEVICE) == {}


def test_others_writes_are_seen(kept: Store) -> None:
    """What is read is remembered, but not past a change of the file."""
    other = Store(kept.folder, kept.shipped)
    assert look(kept) is None
    other.put(DEVICE, 90, KEY, entry(ctas=4))
    assert look(kept).constants == {"ctas": 4}  # type: ignore[union-attr]
    other.put(DEVICE, 90, KEY, entry(ctas=2))
    assert look(kept).constants == {"ctas": 2}  # type: ignore[union-attr]
    kept.path(DEVICE).unlink()
    assert look(kept) is None


def test_an_unchanged_file_is_read_once(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.put(DEVICE, 90, KEY, entry())
    look(kept)
    monkeypatch.setattr(store, "_parsed", lambda *_: pytest.fail("read again"))
    assert look(kept) is not None


def test_probe(kept: Store) -> None:
    kept.put(DEVICE, 90, KEY, entry())
    kept.put_probe(DEVICE, 90, {"grid_barrier_us": 1.31, "mma_cycles": 33})
    kept.put_probe(DEVICE, 90, {"grid_barrier_us": 1.25})
    assert kept.probe(DEVICE) == {"grid_barrier_us": 1.25, "mma_cycles": 33}
    assert look(kept) is not None
    assert kept.probe("NVIDIA H100") == {}
    assert json.loads(kept.path(DEVICE).read_text())["probe"]["seqops"]


def test_probes_of_one_device_used_in_several_ways(kept: Store) -> None:
    kept.put_probe("AMD EPYC", "cpu", {"barrier_us": 0.5, "fork_us": 3.0}, "avx2/4")
    kept.put_probe("AMD EPYC", "cpu", {"barrier_us": 0.7}, "avx512/4")
    assert kept.probe("AMD EPYC", "avx2/4") == {"barrier_us": 0.5, "fork_us": 3.0}
    assert kept.probe("AMD EPYC", "avx512/4") == {"barrier_us": 0.7}
    assert kept.probe("AMD EPYC", "avx2/8") == {} and kept.probe("AMD EPYC") == {}
    assert kept.probed() == kept.probed("AMD EPYC") == ["AMD EPYC"] and kept.probed(DEVICE) == []


def test_probe_of_the_user_before_the_shipped_one(kept: Store) -> None:
    put_file(kept.shipped, document(probe={"launch_us": 2.5, "seqops": "0.1"}))
    assert kept.probe(DEVICE) == {"launch_us": 2.5}
    kept.put_probe(DEVICE, 90, {"launch_us": 2.0})
    assert kept.probe(DEVICE) == {"launch_us": 2.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda kept: kept.put(DEVICE, 90, KEY, entry("guessed")), "by: expected measured or solved, got 'guessed'"),
        (
            lambda kept: kept.put(DEVICE, 90, KEY, entry(ctas=1.5)),
            f"entries: {KEY}: constants: ctas: expected an integer, got 1.5",
        ),
        (
            lambda kept: kept.put_probe(DEVICE, 90, {"launch_us": float("nan")}),
            "probe: launch_us: expected a positive number, got nan",
        ),
        (
            lambda kept: kept.put_probe(DEVICE, 90, {"launch_us": 0}),
            "probe: launch_us: expected a positive number, got 0",
        ),
    ],
)
def test_what_may_not_be_put(kept: Store, wrong: Callable[[Store], None], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        wrong(kept)
    assert str(caught.value) == message
    assert not kept.folder.exists()


# ---- order


@pytest.mark.parametrize("user", [None, "measured", "solved", "stale", "wrong"])
@pytest.mark.parametrize("shipped", [None, "measured", "solved", "stale", "wrong"])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_order(kept: Store, user: str | None, shipped: str | None) -> None:
    """User measured, shipped measured, user solved; shipped entries that were only solved are as good as the solver."""

    def made(kind: str, ctas: int) -> dict[str, Any]:
        if kind in ("measured", "solved"):
            return plain(kind, ctas=ctas)
        return plain(source=OLD, ctas=ctas) if kind == "stale" else plain(ctas=ctas + 100)

    for folder, kind, ctas in ((kept.folder, user, 1), (kept.shipped, shipped, 2)):
        if kind is not None:
            put_file(folder, document({KEY: made(kind, ctas)}))
    expected = 1 if user == "measured" else 2 if shipped == "measured" else 1 if user == "solved" else None
    found = look(kept)
    assert (found.constants["ctas"] if found else None) == expected


def test_solved_does_not_replace_measured(kept: Store) -> None:
    kept.put(DEVICE, 90, KEY, entry(ctas=1))
    kept.put(DEVICE, 90, KEY, entry("solved", ctas=2))
    assert look(kept).constants == {"ctas": 1}  # type: ignore[union-attr]
    kept.put(DEVICE, 90, KEY, entry("solved", source="f" * 16, ctas=2))  # the kernel has changed since
    assert look(kept) is None
    assert look(kept, source="f" * 16).constants == {"ctas": 2}  # type: ignore[union-attr]
    kept.put(DEVICE, 90, KEY, entry(source="f" * 16, ctas=4))
    assert look(kept, source="f" * 16).constants == {"ctas": 4}  # type: ignore[union-attr]


def test_stale_entries_are_dropped_at_the_next_write(kept: Store) -> None:
    """Those that a look-up met, and those of the kernel that is written; not those of others, nor by the look-up."""
    met, same, other = "gru.forward.cuda|bf16", KEY.replace("256", "512"), "lstm.backward.cuda|bf16"
    path = put_file(kept.folder, document({key: plain(source=OLD) for key in (met, same, other)}))
    before = path.read_bytes()
    assert look(kept, key=met) is None and look(kept) is None
    assert path.read_bytes() == before
    kept.put(DEVICE, 90, KEY, entry())
    assert {*json.loads(path.read_text())["entries"]} == {KEY, other}


# ---- several processes

WORKERS = """
import json, os, signal, sys, time
from pathlib import Path
from seqops.tune import store
from seqops.tune.store import Entry, Store

def write(name, count):
    kept = Store(Path(sys.argv[1]), Path(sys.argv[2]))
    for i in range(count):
        entry = Entry({"ctas": i + 1}, "measured", "9f2c41d07a3be865")
        kept.put("NVIDIA H200", 90, f"lstm.forward.cuda|{name}|{i}", entry)

def read(name, count):
    path, seen = Store(Path(sys.argv[1]), Path(sys.argv[2])).path("NVIDIA H200"), 0
    until = time.monotonic() + 30
    while seen < count and time.monotonic() < until:
        now = len(store._parsed(path, "NVIDIA H200")["entries"])
        assert now >= seen, (now, seen)
        seen = now
        time.sleep(0.005)

def die(name, count):
    real = os.fdopen
    def fdopen(*arguments, **options):
        file = real(*arguments, **options)
        write_all = file.write
        def write(text):
            write_all(text[: len(text) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write = write
        return file
    store.os.fdopen = fdopen
    write(name, count)

codes = {}
for job in sys.argv[3:]:
    kind, name, count = job.split(":")
    process = os.fork()
    if not process:
        {"write": write, "read": read, "die": die}[kind](name, int(count))
        os._exit(0)
    codes[process] = None
for process in codes:
    codes[process] = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
print([*codes.values()])
"""


def exit_codes(run_python: Callable[..., str], kept: Store, *jobs: str) -> list[int]:
    """Of processes that share the folder, each with a job, its name and a count."""
    return json.loads(run_python(WORKERS, str(kept.folder), str(kept.shipped), *jobs, timeout=100).splitlines()[-1])


def test_eight_processes_lose_nothing(kept: Store, run_python: Callable[..., str]) -> None:
    """Fifty writes each, two ranks of the same keys, and a reader that never sees fewer entries than before."""
    kept.put(DEVICE, 90, "first|bf16", entry())
    jobs = [f"write:process {i}:50" for i in (*range(8), 0)]
    assert exit_codes(run_python, kept, *jobs, "read:reader:401") == [0] * 10
    found = {each.key: each.entry.constants for each in kept.entries()}
    expected = {f"lstm.forward.cuda|process {p}|{i}": {"ctas": i + 1} for p in range(8) for i in range(50)}
    assert found == expected | {"first|bf16": {"ctas": 8, "unit": 4}}


def test_writer_killed_in_the_middle(kept: Store, run_python: Callable[..., str]) -> None:
    kept.put(DEVICE, 90, KEY, entry())
    before = kept.path(DEVICE).read_bytes()
    assert exit_codes(run_python, kept, "die:killed:1") == [-9]
    assert kept.path(DEVICE).read_bytes() == before
    (left,) = kept.folder.glob("*.tmp")
    assert 0 < left.stat().st_size < len(before) + 400 and left.read_bytes()[-1:] != b"\n"
    assert look(Store(kept.folder, kept.shipped)) is not None
    kept.put(DEVICE, 90, "other|bf16", entry())  # the lock died with its process
    assert not [*kept.folder.glob("*.tmp")]
    assert len(kept.entries()) == 2


def test_many_threads(kept: Store) -> None:
    def write(name: str) -> None:
        for i in range(10):
            kept.put(DEVICE, 90, f"{name}|{i}", entry())
            assert look(kept, key=f"{name}|{i}") is not None

    threads = [threading.Thread(target=write, args=(f"thread {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Store(kept.folder, kept.shipped).entries()) == 40


# ---- listing and clearing


def filled(kept: Store) -> None:
    for device, arch in ((DEVICE, 90), ("NVIDIA L4", 89)):
        for op in ("lstm.forward.cuda", "lstm.backward.cuda", "slstm.forward.cuda"):
            kept.put(device, arch, f"{op}|bf16|D=64", entry())
    kept.put_probe(DEVICE, 90, {"launch_us": 2.0})
    put_file(kept.shipped, document({"lstm.forward.cuda|bf16|D=64": plain(), "gru.forward.cuda|bf16": plain()}))


def test_entries(kept: Store) -> None:
    filled(kept)
    listed = kept.entries()
    assert [(each.device, each.key.partition("|")[0], each.origin) for each in listed] == [
        (DEVICE, "gru.forward.cuda", "shipped"),
        (DEVICE, "lstm.backward.cuda", "user"),
        (DEVICE, "lstm.forward.cuda", "user"),
        (DEVICE, "lstm.forward.cuda", "shipped"),
        (DEVICE, "slstm.forward.cuda", "user"),
        ("NVIDIA L4", "lstm.backward.cuda", "user"),
        ("NVIDIA L4", "lstm.forward.cuda", "user"),
        ("NVIDIA L4", "slstm.forward.cuda", "user"),
    ]
    assert 0 <= listed[1].age < 60 and listed[0].age is None  # type: ignore[operator]
    assert len(kept.entries(op="lstm")) == 5 and len(kept.entries(op="lstm.forward")) == 3
    assert len(kept.entries("NVIDIA L4", "slstm")) == 1 and kept.entries(op="ls") == []


def test_clear(kept: Store) -> None:
    filled(kept)
    assert kept.clear("lstm.forward") == 2
    assert kept.clear("lstm", device_name="NVIDIA L4") == 1
    assert [each.origin for each in kept.entries(DEVICE)] == ["shipped", "user", "shipped", "user"]
    assert kept.probe(DEVICE) == {"launch_us": 2.0}
    assert kept.clear() == 3
    assert {each.origin for each in kept.entries()} == {"shipped"}
    assert kept.probe(DEVICE) == {} and kept.clear() == 0
    assert not [*kept.folder.glob("*.json")]


def test_clear_that_fails_says_so(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(kept)
    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.raises(OSError, match="Read-only file system"):
        kept.clear("lstm")
    assert len(kept.entries(op="lstm")) == 5


# ---- names, places, and what is never used


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3.json"),
        ("h100", "h100.json"),
        ("AMD EPYC", "amd-epyc.json"),
        ("AMD EPYC 9654 96-Core Processor", "amd-epyc-9654-96-core-processor_269c4cce.json"),
    ],
)
def test_file_names(device: str, name: str) -> None:
    assert store.file_name(device) == name


def test_names_that_are_no_file_names(kept: Store) -> None:
    """Each has a file of its own in the folder, and nothing outside."""
    names = ["../../up", "/", "..", "", "Intel(R) Xeon(R) CPU @ 2.20GHz", "Intel R Xeon R CPU 2.20GHz", "a/b", "a b"]
    # what differs in case or punctuation alone
    names += ["NVIDIA A100-SXM4", "NVIDIA A100 SXM4", "NVIDIA A100  SXM4", "Nvidia A100 SXM4", "h100", "H100", "H 100"]
    names += ["x" * 300, "x" * 299, "日本", "\udc80", "con\0", "CON", ".hidden"]
    for i, name in enumerate(names):
        kept.put(name, 1, KEY, entry(ctas=i + 1))
    files = {path.name for path in kept.folder.iterdir() if path.suffix == ".json"}
    assert len(files) == len(names) and all(len(file) < 120 and file.isascii() for file in files)
    for i, name in enumerate(names):
        assert kept.lookup(name, KEY, SOURCE, lambda _: None).constants == {"ctas": i + 1}  # type: ignore[union-attr]


def test_shared_follows_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path / "one"))
    one = store.shared()
    assert one is store.shared() and one.folder == tmp_path / "one" / "tune" and one.shipped == store.SHIPPED
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path / "two"))
    assert store.shared().folder == tmp_path / "two" / "tune"
    assert Store().folder == launch.cache_folder() / "tune"


PICKLE = """
import builtins, sys
asked = set()
real = builtins.__import__
def record(name, globals=None, locals=None, fromlist=(), level=0):
    if {"pickle", "_pickle", "marshal", "shelve"} & {name, *(fromlist or ())}:
        asked.add((globals or {}).get("__name__", ""))
    return real(name, globals, locals, fromlist, level)
builtins.__import__ = record

from pathlib import Path
import seqops
from seqops.tune.store import Entry, Store
kept = Store(Path(sys.argv[1]), Path(sys.argv[1]) / "shipped")
kept.put("x", 90, "k|f", Entry({"a": 1}, "solved", "s"))
assert kept.lookup("x", "k|f", "s", lambda _: None) and kept.entries() and kept.clear()
assert "torch.serialization" in asked
print([name for name in asked if name.split(".")[0] in ("seqops", "filelock")])
"""


def test_no_pickle(run_python: Callable[..., str], tmp_path: Path) -> None:
    """Nothing in the package asks for it, while torch does; nor for eval."""
    assert run_python(PICKLE, str(tmp_path)).strip() == "[]"
    for path in Path(store.__file__).parent.parent.rglob("*.py"):
        tree = ast.parse(path.read_text())
        names = {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"pickle", "marshal", "shelve"}, path
    called = [node.id for node in ast.walk(ast.parse(Path(store.__file__).read_text())) if isinstance(node, ast.Name)]
    assert not {*called} & {"eval", "exec"}


def test_shipped_files_are_sound() -> None:
    """The folder is there, and every file in it would be read."""
    assert store.SHIPPED.is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for path in store.SHIPPED.glob("*.json"):
            assert path.name == store.file_name(store._parsed(path, None)["device"])


def test_a_wheel_carries_the_shipped_files(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """And a source distribution has them, since the wheel can be built from it."""
    root = Path(__file__).parent.parent
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copyfile(root / name, folder / name)
    for name in ("seqops", "csrc"):
        shutil.copytree(root / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    put_file(folder / "seqops" / "tune" / "configs", document({KEY: plain()}))
    build = "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    run_python(build, "-q", "egg_info", "build_py", "--build-lib", str(tmp_path / "lib"), folder=folder)
    shipped = tmp_path / "lib" / "seqops" / "tune" / "configs"
    assert look(Store(tmp_path / "cache", shipped)) is not None
    assert Path(store.__file__).parent / "configs" == store.SHIPPED and (shipped.parent / "store.py").exists()
    (listed,) = folder.glob("*.egg-info/SOURCES.txt")
    assert "seqops/tune/configs/nvidia-h200.json" in listed.read_text().splitlines()
