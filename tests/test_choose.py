"""What a call asks: keys, buckets, and the order forced, remembered, stored, solved."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from seqops.core import choose
from seqops.tune import csp, store
from seqops.tune.store import Entry

CPU = torch.device("cpu")
KEY = choose.Key(
    "toy.forward.cpu", "float32", (choose.Size("D", 64), choose.bucket("T", 100, (4, 64), 256)), ("train",)
)


class Toy(choose.Tunable):
    """A problem whose best tile is 32, and how often it was asked for."""

    def __init__(self, sources: tuple[Any, ...] = (__file__,), most: int = 32) -> None:
        self.asked = 0

        def problem(device: Any, key: choose.Key) -> csp.Problem:
            self.asked += 1
            p = csp.Problem(str(key))
            tile = p.int("tile", 8, 64, multiple_of=8)
            p.add(tile <= most, "fits")
            p.minimize(-tile)
            return p

        super().__init__("toy.forward.cpu", problem, sources)


@pytest.fixture(autouse=True)
def own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[store.Store]:
    mine = store.Store(folder=tmp_path)
    monkeypatch.setattr(store, "shared", lambda: mine)
    choose.forget()
    yield mine
    choose.forget()


def stored(toy: Toy, tile: int, by: str = "measured", source: str | None = None) -> Entry:
    from seqops import __version__

    return Entry(
        constants={"tile": tile},
        by=by,
        us=2.0 if by == "measured" else None,
        model_us=3.0,
        source=toy.digest if source is None else source,
        seqops=__version__,
    )


def host() -> str:
    from seqops.tune import device

    return device.host().name


def test_keys_are_texts() -> None:
    assert str(KEY) == "toy.forward.cpu|float32|D=64,T>64|train"
    assert KEY["T"] == 256 and KEY["D"] == 64
    with pytest.raises(KeyError, match=re.escape("no size 'B'")):
        KEY["B"]
    assert str(choose.Key("a.b.cpu", "float32", ())) == "a.b.cpu|float32"


@pytest.mark.parametrize(
    ("value", "text", "solved_at"), [(0, "B<=1", 1), (1, "B<=1", 1), (2, "B<=8", 8), (9, "B>8", 32)]
)
def test_buckets(value: int, text: str, solved_at: int) -> None:
    size = choose.bucket("B", value, (1, 8), 32)
    assert (str(size), size.value) == (text, solved_at)


def test_solved_once() -> None:
    toy = Toy()
    assert choose.solution(toy, KEY, CPU) == {"tile": 32}
    assert choose.solution(toy, KEY, CPU) == {"tile": 32}
    assert toy.asked == 1
    choose.forget()
    choose.solution(toy, KEY, CPU)
    assert toy.asked == 2


def test_stored_comes_before_solved(own_store: store.Store) -> None:
    toy = Toy()
    own_store.put(host(), "any", str(KEY), stored(toy, 16))
    assert choose.solution(toy, KEY, CPU) == {"tile": 16}


@pytest.mark.parametrize("entry", [{"source": "0" * 16, "tile": 16}, {"tile": 64}, {"tile": 9}])
def test_stale_and_impossible_entries_are_not_used(own_store: store.Store, entry: dict[str, Any]) -> None:
    toy = Toy()
    own_store.put(host(), "any", str(KEY), stored(toy, **entry))
    if "source" in entry:
        assert choose.solution(toy, KEY, CPU) == {"tile": 32}
    else:
        with pytest.warns(RuntimeWarning, match="tile"):
            assert choose.solution(toy, KEY, CPU) == {"tile": 32}


def test_forced_comes_first() -> None:
    toy, cleared = Toy(), []
    choose.on_forget(lambda: cleared.append(True))
    choose.solution(toy, KEY, CPU)
    before = len(cleared)
    with choose.forced(toy.name, {"tile": 8}):
        assert choose.solution(toy, KEY, CPU) == {"tile": 8} == choose.forced_solution(toy.name)
        with choose.forced(toy.name, {"tile": 24}):
            assert choose.solution(toy, KEY, CPU) == {"tile": 24}
        assert choose.solution(toy, KEY, CPU) == {"tile": 8}
    assert choose.solution(toy, KEY, CPU) == {"tile": 32}
    assert choose.forced_solution(toy.name) is None
    assert len(cleared) == before + 4  # what is remembered elsewhere changes on the way in and out


def test_forced_ends_with_an_error() -> None:
    toy = Toy()
    with pytest.raises(KeyError), choose.forced(toy.name, {"tile": 8}):
        raise KeyError
    assert choose.forced_solution(toy.name) is None


def test_impossible_is_explained() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)toy\.forward\.cpu: nothing fits .* for toy\.forward.*fits: tile <= 4"):
        choose.solution(Toy(most=4), KEY, CPU)


def test_no_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stands still for a while gives the same answer."""
    clock = iter(range(0, 10**6, 100))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    assert choose.solution(Toy(), KEY, CPU) == {"tile": 32}


@pytest.mark.parametrize("best", [{"tile": 24}, None])
def test_too_many_nodes(monkeypatch: pytest.MonkeyPatch, best: dict[str, int] | None) -> None:
    """The best so far, which depends on the problem alone; or what happened, in words."""

    def solve(self: csp.Problem, **limits: Any) -> None:
        assert limits == {"seconds": float("inf")}
        raise csp.LimitReached("too many nodes", best)

    monkeypatch.setattr(csp.Problem, "solve", solve)
    if best is not None:
        assert choose.solution(Toy(), KEY, CPU) == best
    else:
        with pytest.raises(RuntimeError, match=r"nothing found on .*: too many nodes"):
            choose.solution(Toy(), KEY, CPU)


def test_forced_blocks_of_threads_may_overlap() -> None:
    first, second = (choose.forced("toy.forward.cpu", {"tile": tile}) for tile in (8, 16))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert choose.forced_solution("toy.forward.cpu") == {"tile": 16}
    second.__exit__(None, None, None)
    assert choose.forced_solution("toy.forward.cpu") is None


def test_forgotten_while_deciding() -> None:
    """An answer that was on its way when the files changed is not remembered."""
    toy = Toy()
    solve, toy.problem = toy.problem, lambda *args: (choose.forget(), solve(*args))[1]
    choose.solution(toy, KEY, CPU)
    choose.solution(toy, KEY, CPU)
    assert toy.asked == 2


def test_nothing_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator's first call solves; it never measures, and it writes nothing."""
    from seqops.tune import timing

    def refuse(*args: Any, **options: Any) -> None:
        raise AssertionError("a call timed something")

    for name in ("measure", "HostClock", "CudaClock"):
        monkeypatch.setattr(timing, name, refuse)
    monkeypatch.setattr(torch.cuda, "Event", refuse)
    monkeypatch.setattr(store.Store, "put", refuse)
    choose.forget()
    wx, r = torch.zeros(2, 5, 4, 1, 8), torch.zeros(4, 1, 8, 8)
    torch.ops.seqops.lstm(wx, r)


def test_digest_follows_sources(tmp_path: Path) -> None:
    """A header that a source includes counts; where the files lie does not."""
    digests = []
    for folder, header in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.h").write_text(f"// {header}")
        (tmp_path / folder / "x.cu").write_text('#include "x.h"\n#include <stdint.h>\n')
        digests.append(Toy((tmp_path / folder / "x.cu",)).digest)
    assert digests[0] == digests[1] != digests[2]
    assert re.fullmatch("[0-9a-f]{16}", digests[0])


def test_digest_reads_bytes(tmp_path: Path, run_python: Any) -> None:
    """Comments may hold any letter, whatever the locale is."""
    code = "from seqops.rnn import cpu; print(cpu.TUNABLES['lstm', 'forward'].digest)"
    texts = [run_python(code, LC_ALL=locale, PYTHONUTF8=utf8) for locale, utf8 in (("C.UTF-8", "1"), ("POSIX", "0"))]
    assert texts[0] == texts[1]


def test_digests_of_rooms_differ() -> None:
    """Each kernel's sources are found, headers of other folders too."""
    from seqops.tune.target import targets

    found = {target.tunable.name: target.tunable.digest for target in targets()}
    assert found["linear_scan.forward.cuda"] != found["softmax_scan.forward.cuda"]
    assert all(re.fullmatch("[0-9a-f]{16}", digest) for digest in found.values())
