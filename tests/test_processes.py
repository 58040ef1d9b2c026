"""Threads, forked and spawned workers, and what `import seqops` brings along."""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from cases.rnn import OPERATORS, Case
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import seqops

PACKAGE = Path(seqops.__file__).parent


def shared_cases() -> list[Case]:
    return [
        Case(op, B=B, T=20, H=2, D=D, dtype=dtype, lengths=B > 1)
        for op in OPERATORS
        for B, D in ((1, 33), (5, 16))
        for dtype in (torch.float32, torch.bfloat16)
    ]


def results(case: Case) -> dict[str, Tensor]:
    inputs, function = case.inputs(), getattr(seqops, case.op)
    return cases.evaluate(function, inputs, case.cotangents(function(**inputs)))


@pytest.mark.parametrize("torch_threads", [1, 2])
def test_many_python_threads(torch_threads: int) -> None:
    """Different calls at the same time give the bits of one call after another."""
    torch.set_num_threads(torch_threads)
    expected = {str(case): results(case) for case in shared_cases()}
    with ThreadPoolExecutor(8) as pool:
        for case, got in zip(shared_cases() * 3, pool.map(results, shared_cases() * 3), strict=True):
            cases.assert_same_bits(got, expected[str(case)])


class Sequences(Dataset[Tensor]):
    """Item i is the output of an operator that runs, forward and backward, inside the worker."""

    def __init__(self) -> None:
        self.cases = [Case(op, B=3, T=9, H=2, D=D) for op in OPERATORS for D in (16, 257)]

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> dict[str, Any]:
        got = results(self.cases[index])
        return {"index": index, "h": got["0"], "dwx": got["dwx"]}


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(start: str) -> None:
    """The parent has used its thread pool: a forked child has none of those threads and must not wait for them."""
    torch.set_num_threads(2)
    expected = [Sequences()[index] for index in range(len(Sequences()))]
    loader = DataLoader(Sequences(), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=300)
    for item, want in zip(loader, expected, strict=True):
        assert item["index"] == want["index"]
        assert torch.equal(item["h"], want["h"]) and torch.equal(item["dwx"], want["dwx"])


IMPORT = """
import sys, torch
before = set(sys.modules)
import seqops
added = {name.split(".")[0] for name in set(sys.modules) - before}
foreign = sorted(name for name in added if name not in sys.stdlib_module_names | {"seqops", "torch"})
assert not foreign, foreign
assert not {"triton", "cupy", "seqops.cli"} & (set(sys.modules) - before)
assert {"lstm", "gru", "slstm", "elman", "backend", "nn", "__version__"} <= set(dir(seqops))
print(seqops.__version__)
"""


def test_import_brings_only_torch_and_ourselves(run_python: Callable[..., str]) -> None:
    assert run_python(IMPORT, CUDA_VISIBLE_DEVICES="") == "0.1.0\n"


def test_missing_extension_says_how_to_build_it(run_python: Callable[..., str], tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "seqops", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # an editable install would find the original extension for the copied package
    script = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if '__editable__' not in str(getattr(f, '__module__', ''))]\n"
        "try: import seqops\n"
        "except ImportError as error: print(error)"
    )
    assert run_python(script, folder=tmp_path, PYTHONPATH=str(tmp_path)) == (
        "seqops._C is not built for this Python and torch; "
        "build it with: pip install --no-build-isolation -e .  (or: make build)\n"
    )


FORCED = """
import torch, seqops
from seqops.core import backend
print(backend.current())
wx, r = torch.randn(2, 3, 4, 1, 5), torch.randn(4, 1, 5, 5)
try:
    h = seqops.lstm(wx, r)[0]
    from seqops.rnn import reference
    print(torch.equal(h, reference.lstm(wx, r)[0]))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_backend_from_the_environment(name: str, run_python: Callable[..., str]) -> None:
    """SEQOPS_BACKEND does from outside what `with seqops.backend(name)` does."""
    current, outcome = run_python(FORCED, SEQOPS_BACKEND=name).splitlines()
    assert current == name
    assert outcome == "True" if name == "reference" else outcome.startswith("seqops::lstm: backend 'triton'")
