"""A pytest plugin for the GPU run: writes down what happens as it happens, so that a process that dies loses one test.

    python -m pytest -m gpu -p bench.watch --watch-file FILE [--watch-shard 1/4] [--watch-first FILE] [--watch-limit 60]

FILE gets one JSON object a line:

| keys | written |
|---|---|
| `begin` | before a test |
| `kernel`: [operator, backend], `test` | before a test calls a backend's function on CUDA tensors for the first time |
| `end`, `outcome`, `seconds`, `message`, `measured` | after it; `measured` is what it gave to `record_property` |
| `uncollected`, `message` | where a file could not be collected or asked to be skipped |

A test that FILE has already begun is left out, so that the same command goes on where a process died. Kinds of tests
take turns, so that a run that is cut off has been to every kernel. A test that runs longer than the limit ends the
process. So does one after which the GPU answers nothing but errors: what followed in the same process would fail
whatever it did.
"""

import faulthandler
import functools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.lines import GOES_ON, MARKER, TRACE, read

MESSAGE_LINES = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("watch")
    group.addoption("--watch-file", type=Path, help="where to write")
    group.addoption("--watch-shard", default="1/1", help="I/N: only the I-th of N parts of the tests")
    group.addoption("--watch-first", type=Path, help="JSON list of tests to begin with")
    group.addoption("--watch-limit", type=float, default=60.0, help="seconds that a test may take")
    group.addoption("--watch-markers", action="store_true", help="print each test's name before it runs")


def pytest_configure(config: pytest.Config) -> None:
    if config.option.watch_file:
        config.pluginmanager.register(Watch(config), "seqops-watch")


class Watch:
    def __init__(self, config: pytest.Config) -> None:
        options = config.option
        self.path: Path = options.watch_file
        self.index, self.shards = (int(part) for part in options.watch_shard.split("/"))
        self.limit: float = options.watch_limit
        self.markers: bool = options.watch_markers
        self.trace = self.path.with_suffix(TRACE).open("w")
        self.begun = {line["begin"] for line in read(self.path) if "begin" in line}
        self.first = json.loads(options.watch_first.read_text()) if options.watch_first else []
        self.test: str | None = None
        self.seen: set[tuple[str, str]] = set()
        self.reports: list[pytest.TestReport] = []

    def write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed or report.skipped:
            self.write(uncollected=report.nodeid, message=last_lines(report.longrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        mine = [
            item
            for item in items
            if item.nodeid not in self.begun and zlib.crc32(item.nodeid.encode()) % self.shards == self.index - 1
        ]
        chosen = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = sorted(in_turn(mine), key=lambda item: item.nodeid not in self.first)

    def pytest_collection_finish(self) -> None:
        watch_backends(self.on_call)

    def on_call(self, operator: str, backend: str) -> None:
        if self.test is not None and (operator, backend) not in self.seen:
            self.seen.add((operator, backend))
            self.write(kernel=[operator, backend], test=self.test)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.test, self.seen, self.reports = item.nodeid, set(), []
        self.write(begin=item.nodeid)
        if self.markers:
            print(f"\n{MARKER}{item.nodeid}", flush=True)
        faulthandler.dump_traceback_later(self.limit, exit=True, file=self.trace)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self.finish()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """What a kernel did wrong shows at the next synchronisation: here, while it is still this test's."""
        result = yield
        synchronize()
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def finish(self) -> None:
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        told = (failed or skipped)[:1]
        self.write(
            end=self.test,
            outcome="failed" if failed else "skipped" if skipped else "passed",
            seconds=round(sum(report.duration for report in self.reports), 3),
            message=last_lines(told[0].longrepr) if told else "",
            measured={key: value for report in self.reports[-1:] for key, value in report.user_properties},
        )
        self.test = None
        if failed:
            try:
                synchronize()
            except RuntimeError as error:
                pytest.exit(f"the GPU no longer works in this process: {error}", GOES_ON)


def in_turn(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """One test of each kind, CUDA before Triton, then a second one of each, ...: a run that is cut off has been to all.

    A kind is a function with the first of its parameters, which names the operator, and Triton or not.
    """
    seen: Counter[tuple[str, bool]] = Counter()
    ranks = {}
    for item in items:
        kind = item.nodeid.split("-")[0], "triton" in item.nodeid
        ranks[item] = seen[kind], kind[1]
        seen[kind] += 1
    return sorted(items, key=ranks.__getitem__)


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def watch_backends(on_call: Callable[[str, str], None]) -> None:
    """Puts a function in front of each GPU backend's functions that tells when one gets CUDA tensors."""
    import seqops  # noqa: F401  (registers the operators)
    from seqops.core import backend

    def watched(operator: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(value, torch.Tensor) and value.is_cuda for value in (*args, *kwargs.values())):
                on_call(operator, name)
            return function(*args, **kwargs)

        return call

    for operator, served in backend._served.items():
        for name, function in served.items():
            if name in ("cuda", "triton") and function is not None:
                served[name] = watched(operator, name, function)


def last_lines(text: Any) -> str:
    if isinstance(text, tuple):  # of a skip: file, line, reason
        text = text[2]
    return "\n".join(str(text).splitlines()[-MESSAGE_LINES:])
