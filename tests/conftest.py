"""One thread a process, and memory that nobody wrote is NaN: the fill comes with deterministic algorithms."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests import interpreter

ROOT = Path(__file__).parent.parent

if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.patch_once_a_launch()


@pytest.fixture(autouse=True)
def strict_torch() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Runs a script in a fresh process and returns what it printed; a failure shows the same."""

    def run(script: str, *arguments: str, folder: Path = ROOT, timeout: float = 600, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    return run


IN_RUNG = """
import sys, pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", *sys.argv[1:]]))
"""


@pytest.fixture
def run_rung(run_python: Callable[..., str]) -> Callable[..., str]:
    """Runs the tests of a file that have a mark again in a process of their own: on another backend or instruction set.

    Every one of them must pass, and none be skipped.
    """

    def run(file: str, mark: str, *arguments: str, **environment: str) -> str:
        output = run_python(IN_RUNG, "-m", f"{mark} and not slow and not gpu", *arguments, file, **environment)
        assert " passed" in output and " skipped" not in output, output
        return output

    return run
