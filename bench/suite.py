"""The pytest plugin that turns cases into tests and collects their results.

`python -m bench` runs pytest through `run` below. `pytest bench` does the same with pytest's own options, since
`conftest.py` registers the plugin where nobody else has.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import hardware, harness, memory
from bench.record import Result


class Suite:
    """Parametrises `test_speed` with every case in every mode and backend, and measures them.

    Args:
        cases: what to measure, by each backend that the settings' device has for it.
        settings: how much.
        report: called with what happens: `("start", number of measurements)`, `("stage", text)`, `("result", Result)`.
        kernels: (operator, backend, pass) of those that may be measured; None: all. What needs another one is left out.
    """

    def __init__(
        self,
        cases: Sequence[harness.Case],
        settings: harness.Settings,
        report: Callable[[str, Any], None] = lambda event, value: None,
        kernels: Collection[tuple[str, str, str]] | None = None,
    ) -> None:
        self.measurements = [
            (case, mode, backend)
            for case in cases
            for backend in harness.backends_for(case, settings.device)
            for mode in case.modes
            if kernels is None or not hardware.withheld({"op": case.op, "backend": backend, "mode": mode}, kernels)
        ]
        self.settings = settings
        self.report = report
        self.results: list[Result] = []
        self.problems: list[str] = []
        self.checks: dict[tuple[str, str, str | None], harness.Check] = {}
        self.processes = memory.Processes()

    @cached_property
    def rates(self) -> harness.Rates:
        """Measured once, before the first case."""
        self.report("stage", "this machine's matrix product and copy")
        torch.set_num_threads(self.settings.threads)
        return harness.measure_rates(self.settings.device)

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "measurement" in metafunc.fixturenames:
            names = [
                " ".join(filter(None, (case.name, mode, backend))).replace(" ", "-")
                for case, mode, backend in self.measurements
            ]
            metafunc.parametrize("measurement", self.measurements, ids=names)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.report("start", len(session.items))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.problems.append(str(report.longrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A failing call has its text in the result; fixtures and teardown would otherwise fail unseen.
        if report.failed and report.when != "call":
            self.problems.append(report.longreprtext)

    def pytest_internalerror(self, excrepr: Any) -> None:
        self.problems.append(str(excrepr))

    def measure(self, case: harness.Case, mode: str, backend: str | None, benchmark: Any) -> Result:
        """Checks, times and weighs one case in one mode; the result is also kept in `results`.

        Args:
            backend: which one serves ours; None for what torch dispatches to.
            benchmark: pytest-benchmark's fixture.
        """
        title = ", ".join(filter(None, (case.name, mode, backend)))
        has_goals = case.has_goals(backend)
        result = Result(
            case=case.name,
            op=case.op,
            shape=dict(case.shape),
            dtype=str(case.dtype).removeprefix("torch."),
            mode=mode,
            goals={peer: goal for (peer, of), goal in case.goals.items() if of == mode and has_goals},
            causes={peer: cause for (peer, of), cause in case.causes.items() if of == mode},
            backend=backend,
            absent=dict(case.absent),
            copy_goal=case.copy_goals.get(mode) if has_goals else None,
            time_goal=case.time_goals.get(mode) if has_goals else None,
            steps=case.steps if case.is_stepwise else None,
            step_floor=None if mode in harness.WITH_GRADIENTS else case.step_floor,
            length=case.length,
        )
        try:
            rates = self.rates
            self.report("stage", f"{title}: values")
            self.check(result, case)
            if result.error is None and self.settings.device != harness.CPU:
                case = self.leave_out(result, case)
            if result.error is None:
                self.report("stage", f"{title}: time")
                self.time(result, case, benchmark, rates)
                for name, values in case.facts().items() if case.facts else ():
                    getattr(result, name).update(values)
                if mode == harness.TRAINING and self.settings.memory:
                    self.report("stage", f"{title}: memory")
                    for name in (harness.OURS, *case.peers):
                        result.memory[name] = self.weigh(case, name, backend)
        except Exception as error:
            # One broken case must not hide the others; the suite fails at its end all the same.
            result.error = f"{type(error).__name__}: {error}"
        self.results.append(result)
        self.report("result", result)
        return result

    def leave_out(self, result: Result, case: harness.Case) -> harness.Case:
        """The case without the peers that cannot be timed here, which the result names as absent."""
        unfit = harness.find_unfit(case, result.mode, self.settings.device)
        result.absent |= unfit
        builders = {name: builder for name, builder in case.builders.items() if name not in unfit}
        return replace(case, builders=builders)

    def check(self, result: Result, case: harness.Case) -> None:
        found = self.check_once(case, result.mode, result.backend)
        errors, bounds = dict(found.errors), dict(found.bounds)
        for name, other in case.beside.items():
            more = self.check_once(other, result.mode, result.backend)
            errors |= {f"{name}: {of}": error for of, error in more.errors.items()}
            bounds |= {f"{name}: {of}": bound for of, bound in more.bounds.items()}
        worst = max(errors, key=lambda name: errors[name] / (bounds[name] or 1.0))
        result.check = {"name": worst, "error": errors[worst], "bound": bounds[worst]}
        result.error = harness.Check(errors, bounds).message

    def check_once(self, case: harness.Case, mode: str, backend: str | None) -> harness.Check:
        """Of a case that stands beside another one, what was found when it was measured itself, if it was."""
        key = case.name, mode, backend
        if key not in self.checks:
            self.checks[key] = harness.check(case, mode, self.settings.device, backend)
        return self.checks[key]

    def time(self, result: Result, case: harness.Case, benchmark: Any, rates: harness.Rates) -> None:
        times = harness.measure(case, result.mode, benchmark, self.settings, result.backend)
        result.timing = times.timing
        for name, spent in times.seconds.items():
            result.seconds[name] = {**harness.summary(spent), "rounds": len(spent), "calls": times.calls[name]}
            median = result.seconds[name]["median"]
            of = case.beside.get(name, case)
            if result.mode in of.flops:
                result.gemm_fraction[name] = of.flops[result.mode] / median / rates.gemm
                result.copy_fraction[name] = of.bytes[result.mode] / median / rates.copy
            if name != harness.OURS:
                result.ratios[name] = harness.ratio_summary(times.seconds[harness.OURS], spent)

    def weigh(self, case: harness.Case, name: str, backend: str | None) -> int:
        """Bytes that a training step of one contender adds at its peak."""
        if self.settings.device == harness.CPU:
            return self.processes.peak(case, name, self.settings.threads)
        from bench import cuda

        return cuda.peak_memory(case, name, backend if name == harness.OURS else None)


def find(config: pytest.Config) -> Suite | None:
    """The suite that this pytest runs."""
    return next((plugin for plugin in config.pluginmanager.get_plugins() if isinstance(plugin, Suite)), None)


def run(suite: Suite) -> int:
    """Runs pytest over the suite, silently, and returns pytest's exit code: 0 all measured, 1 some failed."""
    arguments = [
        str(Path(__file__).with_name("test_suite.py")),
        # The project's options are for its tests: several processes and markers would disturb the measurement.
        *("--override-ini", "addopts="),
        *("-p", "no:terminal", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:faulthandler", "--capture=no"),
        *("--benchmark-timer=time.perf_counter", "--benchmark-warmup=off", "--benchmark-disable-gc"),
    ]
    return int(pytest.main(arguments, plugins=[suite]))
