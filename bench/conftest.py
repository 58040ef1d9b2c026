"""Lets `pytest bench` run the suite by itself, with pytest's and pytest-benchmark's own options.

pytest-benchmark's table then shows ours alone, by the block of calls that one round makes; the table above it is the
one that `python -m bench` prints, by the call.
"""

import pytest

from bench import harness, suite, tables


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if suite.find(config) is None:
        config.pluginmanager.register(suite.Suite(harness.load_cases(), harness.Settings()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = suite.find(config).results
    if results:
        terminalreporter.section("interleaved with the peers")
        terminalreporter.write(tables.render(results))
