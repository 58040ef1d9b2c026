"""What docs/numerics.md says of approximations: the functions of the kernels, seen through cells that show them.

A cell without recurrent weights is a function of its input: Elman's `h` is tanh(wx). Of an LSTM whose state stays at
30, where tanh rounds to 1, `h` is sigmoid(p_o). The last state is float32 also of 16-bit sequences.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import seqops
from seqops.core import launch
from seqops.rnn import cuda_tiles

DOCS = Path(__file__).resolve().parents[1] / "docs"

UNITS = 64
SATURATED = 30.0


@pytest.fixture(params=["simulator", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Where CUDA kernels run."""
    if request.param == "simulator":
        if reason := launch._reason_without_compiler():
            pytest.skip(reason)
        monkeypatch.setenv("SEQOPS_SIMULATE", "1")
        monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
        return "cpu"
    if reason := launch.reason_missing():
        pytest.skip(reason)
    return "cuda"


def tanh(x: Tensor) -> Tensor:
    r = torch.zeros(1, 1, UNITS, UNITS, dtype=x.dtype, device=x.device)
    return seqops.elman(x.view(-1, 1, 1, 1, UNITS), r)[1].flatten()


def sigmoid(x: Tensor) -> Tensor:
    rows = x.numel() // UNITS
    wx = torch.zeros(rows, 1, 4, 1, UNITS, dtype=x.dtype, device=x.device)
    wx[:, :, 0], wx[:, :, 1], wx[:, :, 3] = -torch.inf, torch.inf, x.view(rows, 1, 1, UNITS)  # i = 0, f = 1
    r = torch.zeros(4, 1, UNITS, UNITS, dtype=x.dtype, device=x.device)
    return seqops.lstm(wx, r, c0=torch.full((rows, 1, UNITS), SATURATED, device=x.device))[1].flatten()


def whole(x: Tensor) -> Tensor:
    """As many as fill rows."""
    return x[: x.numel() // UNITS * UNITS]


FUNCTIONS = {"tanh": (tanh, 5, 4e-5), "sigmoid": (sigmoid, 4, 2e-6)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_the_cpu(name: str) -> None:
    function, bound, _ = FUNCTIONS[name]
    points = (torch.linspace(-20, 20, 1 << 18), 0.1 * torch.randn(1 << 16), 1e-3 * torch.randn(1 << 16))
    x = whole(torch.cat(points))
    found, exact = function(x), getattr(torch, name)(x.double())
    spacing = torch.nextafter(exact.float().abs(), torch.tensor(torch.inf)) - exact.float().abs()
    assert ((found - exact).abs() / spacing).max() < bound


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_functions_of_16_bit_storage(name: str, dtype: torch.dtype, device: str) -> None:
    """Every number of that dtype between 2^-10 and 20, of both signs."""
    function, _, bound = FUNCTIONS[name]
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
    x = every[(every.abs() >= 2**-10) & (every.abs() <= 20)]
    x = whole(x[torch.randperm(x.numel())])[: 1 << 13]
    with seqops.backend("cuda"):
        found = function(x.to(device)).cpu()
    exact = getattr(torch, name)(x.double())
    assert ((found - exact).abs() / exact.abs()).max() < bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_saturation_is_exact_and_nan_stays(dtype: torch.dtype, device: str) -> None:
    x = torch.full((UNITS,), torch.nan)
    x[:4] = torch.tensor([-torch.inf, torch.inf, -200, 200])
    for backend, place in (("cpu", "cpu"), ("cuda", device)):
        with seqops.backend(backend):
            found = {name: function(x.to(place, dtype)).cpu() for name, (function, *_) in FUNCTIONS.items()}
        assert found["tanh"][:4].tolist() == [-1, 1, -1, 1], backend
        # The CPU's exponential stops growing at 88.
        assert found["sigmoid"][0] == 0 if backend == "cuda" else 0 < found["sigmoid"][0] < 1e-38, backend
        assert found["sigmoid"][[1, 3]].tolist() == [1, 1] and 0 <= found["sigmoid"][2] < 1e-38, backend
        assert all(values[4:].isnan().all() for values in found.values()), backend


def test_the_page_names_constants_that_there_are() -> None:
    """docs/rnn-gpu.md and docs/numerics.md speak of the kernels' constants by name."""
    known = {name.upper() for name in cuda_tiles.VARIABLES}
    for page in ("rnn-gpu.md", "numerics.md"):
        named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)*)`", (DOCS / page).read_text())) - {"B", "T", "H", "D", "G", "R"}
        assert named - {"CUBLAS_WORKSPACE_CONFIG"} <= known, page
    assert known >= {"EXCHANGE", "K_REGS", "K_SHARED", "DIRECT"}
