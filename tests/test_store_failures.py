"""The store where something is wrong: bad files, places where nothing can be written, a lock that another holds."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from stores import DEVICE, KEY, document, entry, look, plain, put_file, refuse

from seqops.tune import store
from seqops.tune.store import Store

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """The user's, not there yet, and an empty one that stands for the package's."""
    (tmp_path / "shipped").mkdir()
    return tmp_path / "cache" / "tune", tmp_path / "shipped"


@pytest.fixture
def kept(folders: tuple[Path, Path]) -> Store:
    return Store(*folders)


# ---- bad files

BAD = {
    "empty": ("", "is empty"),
    "truncated": (json.dumps(document({KEY: plain()}))[:-40], "is not JSON"),
    "binary": (b"\xff\xfe\x00\x01", "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "not a number": ('{"format": 1, "probe": {"launch_us": NaN}}', "is not JSON (NaN is no number of JSON)"),
    "a list": ("[]", "expected an object"),
    "foreign format": (document(format=2), "format: expected 1, got 2"),
    "no format": ({"device": DEVICE}, "format: expected 1, got None"),
    "of another device": (document(device="NVIDIA L4"), f"device: expected {DEVICE!r}, got 'NVIDIA L4'"),
    "arch": (document(arch=None), "arch: expected a number or text, got None"),
    "entries": (document(entries=[1]), "entries: expected an object, got [1]"),
    "probe": (document(probe={"launch_us": "2"}), "probe: launch_us: expected a positive number, got '2'"),
    "entry": (document({KEY: 3}), f"entries: {KEY}: expected an object, got 3"),
    "constants": (document({KEY: plain() | {"constants": [8]}}), f"entries: {KEY}: constants: expected an object"),
    "text for a constant": (
        document({KEY: plain(ctas="8")}),  # type: ignore[arg-type]
        f"entries: {KEY}: constants: ctas: expected an integer, got '8'",
    ),
    "bool for a constant": (
        document({KEY: plain(ctas=True)}),
        f"entries: {KEY}: constants: ctas: expected an integer, got True",
    ),
    "by": (document({KEY: plain("guessed")}), f"entries: {KEY}: by: expected measured or solved, got 'guessed'"),
    "us": (document({KEY: plain() | {"us": "1"}}), f"entries: {KEY}: us: expected a number, got '1'"),
    "no source": (
        document({KEY: {"constants": {}, "by": "solved"}}),
        f"entries: {KEY}: source: expected text, got None",
    ),
    "unknown": (document({KEY: plain() | {"colour": 1}}), f"entries: {KEY}: unknown: colour"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("first", ["lookup", "put"])
def test_bad_file_is_renamed_and_begun_again(kept: Store, kind: str, first: str) -> None:
    content, message = BAD[kind]
    path = put_file(kept.folder, content)
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning) as caught:
        if first == "lookup":
            assert look(kept) is None
        kept.put(DEVICE, 90, KEY, entry())
        assert look(kept) is not None
    assert len(caught) == 1
    text = str(caught[0].message)
    assert text.startswith(f"{path}: {message}") and text.endswith(": renamed to nvidia-h200.json.bad, and begun again")
    assert (kept.folder / "nvidia-h200.json.bad").read_bytes() == before
    assert {*json.loads(path.read_text())["entries"]} == {KEY}


@pytest.mark.parametrize("kind", BAD)
def test_bad_shipped_file_is_passed_over(kept: Store, kind: str) -> None:
    """The package is not ours to change."""
    content, message = BAD[kind]
    path = put_file(kept.shipped, content)
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning) as caught:
        assert look(kept) is None
        kept.put(DEVICE, 90, KEY, entry())
        assert look(kept) is not None and kept.probe(DEVICE) == {}
    (only,) = caught
    assert str(only.message).startswith(f"{path}: {message}") and str(only.message).endswith(": passed over")
    assert path.read_bytes() == before and [*kept.shipped.iterdir()] == [path]


def test_a_file_of_another_device_is_not_listed(kept: Store) -> None:
    """Copied by hand under a wrong name, it would be found for a device that nothing was measured on."""
    path = put_file(kept.folder, document({KEY: plain()}), device="NVIDIA L4")
    with pytest.warns(RuntimeWarning) as caught:
        assert kept.entries() == [] and look(kept, device="NVIDIA L4") is None
    (only,) = caught
    message = f"{path}: device: {DEVICE!r} is that of nvidia-h200.json: renamed to nvidia-l4.json.bad, and begun again"
    assert str(only.message) == message


def test_constants_outside_the_problem(kept: Store) -> None:
    """Only they are taken out: what else was measured stays."""
    other = KEY.replace("256", "512")
    path = put_file(kept.folder, document({KEY: plain(ctas=17), other: plain()}, probe={"launch_us": 2.0}))
    before = path.read_bytes()
    with pytest.warns(RuntimeWarning) as caught:
        assert look(kept) is None
        assert look(kept) is None
    (only,) = caught
    wrong = f"{KEY}: ctas: 17 is not in 1..16: taken out; the file as it was is nvidia-h200.json.bad"
    assert str(only.message) == f"{path}: {wrong}"
    assert (kept.folder / "nvidia-h200.json.bad").read_bytes() == before
    assert look(kept, key=other) is not None and kept.probe(DEVICE) == {"launch_us": 2.0}
    assert {*json.loads(path.read_text())["entries"]} == {other}


def test_a_file_repaired_meanwhile_is_not_renamed(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding it bad and getting the lock, another process has begun it again."""
    path = put_file(kept.folder, "")
    real = store._parsed

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(store, "_parsed", real)
        put_file(kept.folder, document({KEY: plain()}))
        raise ValueError("is empty")

    monkeypatch.setattr(store, "_parsed", meanwhile)
    assert look(kept) is not None
    assert path.exists() and not (kept.folder / "nvidia-h200.json.bad").exists()


# ---- where nothing can be written


def in_memory(kept: Store, reason: str) -> None:
    """Puts are remembered by this process, with one warning."""
    with pytest.warns(RuntimeWarning) as caught:
        assert not kept.put(DEVICE, 90, KEY, entry(ctas=1))
        assert not kept.put(DEVICE, 90, KEY, entry("solved", ctas=2))
        assert not kept.put(DEVICE, 90, "gru.forward.cuda|bf16", entry(ctas=4))
        assert not kept.put_probe(DEVICE, 90, {"launch_us": 2.0})
    (only,) = caught
    assert str(only.message).startswith(f"{kept.path(DEVICE)}: cannot be written (") and reason in str(only.message)
    assert str(only.message).endswith("): kept in memory only")
    assert look(kept).constants == {"ctas": 1}  # type: ignore[union-attr]
    assert kept.probe(DEVICE) == {"launch_us": 2.0}
    assert [each.key for each in kept.entries()] == ["gru.forward.cuda|bf16", KEY]
    assert look(Store(kept.folder, kept.shipped)) is None


def test_directory_that_cannot_be_created(kept: Store) -> None:
    kept.folder.parent.parent.mkdir(exist_ok=True)
    kept.folder.parent.write_text("a file")  # works for root too
    in_memory(kept, "")
    assert kept.clear() == 2 and look(kept) is None


def test_read_only_directory(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made with a stub, since nothing is read-only for root."""
    with monkeypatch.context() as patched:
        patched.setattr(store.tempfile, "mkstemp", refuse)
        in_memory(kept, "Read-only file system")
    # the disk is back: what was remembered is written with the next
    assert kept.put(DEVICE, 90, "elman.forward.cuda|bf16", entry())
    assert len(Store(kept.folder, kept.shipped).entries()) == 3


def test_replacing_that_fails_leaves_nothing_behind(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.put(DEVICE, 90, "old|bf16", entry())
    before = kept.path(DEVICE).read_bytes()
    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.warns(RuntimeWarning, match="kept in memory only"):
        kept.put(DEVICE, 90, KEY, entry())
    assert look(kept) is not None and look(kept, key="old|bf16") is not None
    assert kept.path(DEVICE).read_bytes() == before
    assert not [*kept.folder.glob("*.tmp")]


def test_content_is_on_disk_before_it_has_the_name(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a power failure could leave an empty file under it."""
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(store.os, name, lambda *a, name=name, real=real: (steps.append(name), real(*a)))
    kept.put(DEVICE, 90, KEY, entry())
    assert steps == ["fsync", "replace"]


def test_bad_file_that_cannot_be_renamed(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put_file(kept.folder, "")
    monkeypatch.setattr(store.os, "replace", refuse)
    with pytest.warns(RuntimeWarning) as caught:
        assert look(kept) is None
        assert look(kept) is None
    (only,) = caught
    assert str(only.message) == f"{path}: is empty: passed over ([Errno 30] Read-only file system)"


def test_a_directory_in_place_of_the_file(kept: Store) -> None:
    kept.path(DEVICE).mkdir(parents=True)
    with pytest.warns(RuntimeWarning) as caught:
        assert look(kept) is None
        kept.put(DEVICE, 90, KEY, entry())
        assert look(kept) is not None
    assert len(caught) == 1


def test_lock_held_by_another(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer gives up after a while; readers do not ask for the lock."""
    from filelock import FileLock

    kept.put(DEVICE, 90, KEY, entry(ctas=1))
    assert store._PATIENCE == 10
    monkeypatch.setattr(store, "_PATIENCE", 0.2)
    with FileLock(kept.folder / "nvidia-h200.json.lock"):
        start = time.monotonic()
        with pytest.warns(RuntimeWarning, match=r"could not be acquired.*kept in memory only"):
            # in another thread, as the lock is this one's
            thread = threading.Thread(target=kept.put, args=(DEVICE, 90, "other|bf16", entry()))
            thread.start()
            thread.join()
        assert 0.2 <= time.monotonic() - start < 5
        assert look(kept).constants == {"ctas": 1}  # type: ignore[union-attr]
        assert look(kept, key="other|bf16") is not None


def test_what_was_measured_later_by_another_stays(kept: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process could not write is older than what another one has written meanwhile."""
    old, new = (replace(entry(ctas=ctas), time=f"2030-01-01T00:00:0{ctas}+00:00") for ctas in (1, 2))
    other = Store(kept.folder, kept.shipped)
    with monkeypatch.context() as patched, pytest.warns(RuntimeWarning, match="kept in memory only"):
        patched.setattr(store.tempfile, "mkstemp", refuse)
        patched.setattr(store, "_now", lambda: old.time)
        kept.put(DEVICE, 90, KEY, old)
        kept.put(DEVICE, 90, "mine|bf16", old)
        kept.put_probe(DEVICE, 90, {"launch_us": 1.0, "l2_hop_us": 0.1})
    monkeypatch.setattr(store, "_now", lambda: new.time)
    other.put(DEVICE, 90, KEY, new)
    other.put_probe(DEVICE, 90, {"launch_us": 2.0})
    for reader in (kept, Store(kept.folder, kept.shipped)):
        assert look(reader).constants == {"ctas": 2}  # type: ignore[union-attr]
        kept.put(DEVICE, 90, "third|bf16", new)
    assert {each.key for each in reader.entries()} == {KEY, "mine|bf16", "third|bf16"}
    assert reader.probe(DEVICE) == {"launch_us": 2.0, "l2_hop_us": 0.1}


@pytest.mark.parametrize("content", ["{", document({KEY: plain(ctas=17)})], ids=["bad file", "impossible constants"])
def test_a_reader_never_waits(kept: Store, content: Any) -> None:
    """An operator's call passes over what is bad while another process has the lock; a later writer repairs it."""
    from filelock import FileLock

    path = put_file(kept.folder, content)
    before = path.read_bytes()
    with FileLock(kept.folder / "nvidia-h200.json.lock"):
        start = time.monotonic()
        with pytest.warns(RuntimeWarning, match="passed over") as caught:
            assert look(kept) is None and look(kept) is None
        assert time.monotonic() - start < 1 and len(caught) == 1
    assert path.read_bytes() == before
    assert kept.put(DEVICE, 90, KEY, entry()) and look(kept) == look(Store(kept.folder, kept.shipped)) is not None


def test_a_reader_does_not_wait_for_a_writer_that_waits(kept: Store) -> None:
    """Nor for another thread of its process, which may wait for ten seconds."""
    from filelock import FileLock

    kept.put(DEVICE, 90, KEY, entry())
    with FileLock(kept.folder / "nvidia-h200.json.lock"):
        writer = threading.Thread(target=kept.put, args=(DEVICE, 90, "other|bf16", entry()))
        writer.start()
        time.sleep(0.1)
        start = time.monotonic()
        assert look(kept) is not None and len(kept.entries()) == 1
        assert time.monotonic() - start < 1 and writer.is_alive()
    writer.join()
    assert len(kept.entries()) == 2


FORKED = """
import os, sys, threading, time
from pathlib import Path
from seqops.tune.store import Store

kept = Store(Path(sys.argv[1]), Path(sys.argv[1]))
held, done = threading.Event(), threading.Event()

def hold():
    with kept._lock:
        held.set()
        done.wait()

threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if child == 0:
    kept.entries()
    os._exit(7)
for _ in range(500):
    ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        break
    time.sleep(0.01)
else:
    os.kill(child, 9)
done.set()
sys.exit(os.waitstatus_to_exitcode(status) if ended else "the child hangs")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_another_thread_has_the_lock(kept: Store) -> None:
    program = [sys.executable, "-W", "ignore", "-c", FORKED, str(kept.folder)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 7, done.stderr
