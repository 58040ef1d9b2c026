"""What every CUDA kernel stands on: launches, barriers over the grid, clusters. First on a GPU, and in the simulator.

The GPU run begins with this file, and shows what it measures.
"""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqops.core import launch

FOLDER = Path(__file__).parent / "kernels"
PRIMITIVES = str(FOLDER / "primitives.cu")
ROUNDS = 50


@pytest.fixture(params=["simulator", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.sanitize])])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Where the tensors of a test lie."""
    if request.param == "simulator":
        if reason := launch._reason_without_compiler():
            pytest.skip(reason)
        monkeypatch.setenv("SEQOPS_SIMULATE", "3")
        monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path_factory.getbasetemp() / "kernels"))
        return "cpu"
    if reason := launch.reason_missing():
        pytest.skip(reason)
    return "cuda"


def require_clusters(device: str) -> None:
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")


def numbers(blocks: int, device: str) -> torch.Tensor:
    return torch.arange(blocks, dtype=torch.float32, device=device) * 100


def two_rows(first: torch.Tensor) -> torch.Tensor:
    return torch.stack((first, torch.full_like(first, torch.nan)))


@pytest.mark.parametrize("n", [1, 128, 1000])
def test_arguments_of_every_kind_arrive(device: str, n: int) -> None:
    kernel = launch.Kernel(PRIMITIVES, "number_off", "Pqf?")
    y = torch.full((n + 1,), torch.nan, device=device)
    kernel({}, -(-n // 128), 128, (y, n, 0.5, True), like=y)
    assert torch.equal(y[:n].cpu(), torch.arange(n) * -0.5)
    assert y[n:].isnan().all()


def test_an_empty_grid_launches_nothing(device: str) -> None:
    kernel = launch.Kernel(PRIMITIVES, "number_off", "Pqf?")
    y = torch.full((4,), torch.nan, device=device)
    kernel({}, 0, 128, (y, 4, 1.0, False), like=y)
    assert y.isnan().all()


def test_grid_barrier(device: str) -> None:
    """As many blocks as fit, which wait for each other in every round."""
    kernel = launch.Kernel(PRIMITIVES, "pass_on_in_grid", "PPq")
    blocks = kernel.resident_blocks({}, 64, torch.empty(0, device=device))
    first = numbers(blocks, device)
    y, arrived = two_rows(first), torch.zeros(1, dtype=torch.int32, device=device)
    kernel({}, blocks, 64, (y, arrived, ROUNDS), like=y, cooperative=True)
    assert torch.equal(y[ROUNDS % 2], first.roll(-ROUNDS) + ROUNDS)


def test_a_cooperative_grid_that_does_not_fit_is_refused(device: str) -> None:
    if device == "cpu":
        pytest.skip("the simulator holds any number of blocks")
    kernel = launch.Kernel(PRIMITIVES, "pass_on_in_grid", "PPq")
    blocks = kernel.resident_blocks({}, 64, torch.empty(0, device=device)) + 1
    y, arrived = two_rows(numbers(blocks, device)), torch.zeros(1, dtype=torch.int32, device=device)
    with pytest.raises(RuntimeError, match=f"a cooperative grid of {blocks} blocks"):
        kernel({}, blocks, 64, (y, arrived, 1), like=y, cooperative=True)


@pytest.mark.parametrize("cluster", [2, 8, 16])
def test_cluster_barrier_and_shared_memory_of_neighbours(device: str, cluster: int) -> None:
    """16 blocks are more than every GPU with clusters promises; the launcher asks for them."""
    require_clusters(device)
    kernel = launch.Kernel(PRIMITIVES, "pass_on_in_cluster", "Pq")
    first = numbers(3 * cluster, device)
    y = first.clone()
    kernel({"CLUSTER": cluster}, 3 * cluster, 64, (y, ROUNDS), like=y, cluster=cluster)
    assert torch.equal(y.view(3, cluster), first.view(3, cluster).roll(-ROUNDS, 1) + ROUNDS)


@pytest.mark.parametrize("cluster", [8, 16])
def test_cooperative_grid_of_clusters(device: str, cluster: int) -> None:
    require_clusters(device)
    kernel = launch.Kernel(PRIMITIVES, "pass_on_in_both", "PPq")
    clusters = 2
    first = numbers(clusters * cluster, device)
    y, arrived = two_rows(first), torch.zeros(1, dtype=torch.int32, device=device)
    arguments = (y, arrived, ROUNDS)
    kernel({"CLUSTER": cluster}, len(first), 64, arguments, like=y, cluster=cluster, cooperative=True)
    expected = first.view(clusters, cluster).roll((-ROUNDS, -ROUNDS), (0, 1)).flatten() + ROUNDS
    assert torch.equal(y[ROUNDS % 2], expected)


@pytest.mark.parametrize("entry", ["cluster_recurrence", "cluster_recurrence_async"])
def test_recurrence_over_a_cluster(device: str, entry: str) -> None:
    """64 units on 4 blocks: by cluster barriers, and by bytes that arrive at an mbarrier."""
    require_clusters(device)
    kernel = launch.Kernel(str(FOLDER / "cluster.cu"), entry, "PPq?")
    r = torch.linalg.qr(torch.randn(64, 64)).Q.contiguous()
    h = torch.randn(64)
    expected = torch.linalg.matrix_power(r.double(), ROUNDS) @ h.double()
    r, h = r.to(device), h.to(device)
    kernel({}, 4, 64, (r, h, ROUNDS, False), like=h, cluster=4)
    torch.testing.assert_close(h.cpu().double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("entry", ["hand_over", "hand_over_named"])
def test_hand_over_between_warps(device: str, entry: str) -> None:
    kernel = launch.Kernel(str(FOLDER / "hand_over.cu"), entry, "PPq?")
    x = torch.randn(ROUNDS, 32, device=device)
    y = torch.full_like(x, torch.nan)
    kernel({}, 1, 64, (x, y, ROUNDS, False), like=x)
    assert torch.equal(y, x.flip(1))


def microseconds(call: Callable[[], object], calls: int = 1000) -> float:
    """Host time of a call, the GPU's own work left out as far as it is shorter."""
    for _ in range(10):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    spent = time.perf_counter() - start
    torch.cuda.synchronize()
    return round(spent / calls * 1e6, 2)


@pytest.mark.gpu
def test_launch_cost(record_property: Callable[[str, object], None]) -> None:
    """Measured, and within what a call of an operator can bear."""
    if reason := launch.reason_missing():
        pytest.skip(reason)
    kernel = launch.Kernel(PRIMITIVES, "number_off", "Pqf?")
    y = torch.empty(128, device="cuda")
    ours = microseconds(lambda: kernel({}, 1, 128, (y, 128, 1.0, False), like=y))
    record_property("launch, µs", ours)
    record_property("torch's own zero_, µs", microseconds(y.zero_))
    assert ours < 100


@pytest.mark.gpu
def test_graph_replays_a_cooperative_launch() -> None:
    """The count of the grid barrier starts anew in each replay, since zeroing it is captured too."""
    if reason := launch.reason_missing():
        pytest.skip(reason)
    kernel = launch.Kernel(PRIMITIVES, "pass_on_in_grid", "PPq")
    first = numbers(8, "cuda")
    y, arrived = two_rows(first), torch.zeros(1, dtype=torch.int32, device="cuda")

    def call() -> None:
        arrived.zero_()
        kernel({}, 8, 64, (y, arrived, 1), like=y, cooperative=True)
        y[0].copy_(y[1])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    y[0] = first
    for _ in range(5):
        graph.replay()
    assert torch.equal(y[0], first.roll(-5) + 5)
