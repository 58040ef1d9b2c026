"""The CPU simulator for CUDA kernels: what it computes is right under every schedule, and planted mistakes are noticed.

The kernels are in tests/kernels. Most take an argument `forget`, which leaves out one synchronisation.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seqops.core import launch

HERE = Path(__file__).parent
KERNELS = HERE / "kernels"
FLAGS = "-g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"

pytestmark = pytest.mark.skipif(
    launch._reason_without_compiler() is not None, reason=str(launch._reason_without_compiler())
)


# A kernel's run under a seed, with its synchronisation left out or not: the result, and what it should be.
Run = Callable[[int, bool], tuple[Tensor, Tensor]]


@pytest.fixture
def seeds(pytestconfig: pytest.Config) -> range:
    """The schedules to try: 0 is in order, and the others are random, with slow warps and blocks."""
    return range(max(4, pytestconfig.getoption("--schedules", default=4)))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQOPS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Simulated:
    """A kernel of tests/kernels as a function of its launch and its arguments."""

    def __init__(self, file: str, entry: str, codes: str, grid: int = 1, block: int = 32, **options: object) -> None:
        self.kernel = launch.Kernel(str(KERNELS / file), entry, codes)
        self.constants = options.pop("constants", {})
        self.launch = {"grid": grid, "block": block} | options

    def __call__(self, seed: int, *arguments: object, **changes: object) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SEQOPS_SIMULATE", str(seed + 1))
            options = self.launch | changes
            self.kernel(self.constants, arguments=arguments, like=torch.empty(0), **options)


scan_rows = Simulated("rows.cu", "scan_rows", "PPPq?", grid=3, block=256)
tile_product = Simulated("tiles.cu", "tile_product", "PPPq?", shared=2 * 24 * 16 * 2, constants={"FORMAT": "bf16"})
tile_product_f16 = Simulated("tiles.cu", "tile_product", "PPPq?", shared=2 * 24 * 16 * 2, constants={"FORMAT": "f16"})
cluster_recurrence = Simulated("cluster.cu", "cluster_recurrence", "PPq?", grid=4, block=64, cluster=4)
cluster_recurrence_async = Simulated("cluster.cu", "cluster_recurrence_async", "PPq?", grid=4, block=64, cluster=4)
grid_recurrence = Simulated("grid.cu", "grid_recurrence", "PPPq?", grid=4, block=64, cooperative=True)
chained_sum = Simulated("grid.cu", "chained_sum", "PPPP?", grid=9)
hand_over = Simulated("hand_over.cu", "hand_over", "PPq?", block=64)
hand_over_named = Simulated("hand_over.cu", "hand_over_named", "PPq?", block=64)


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, torch.nan, dtype=dtype)


def run_scan(seed: int, forget: bool) -> tuple[Tensor, Tensor]:
    a, x = torch.rand(3, 1000), torch.randn(3, 1000)
    expected, state = torch.empty_like(x), torch.zeros(3)
    for t in range(1000):
        state = a[:, t] * state + x[:, t]
        expected[:, t] = state
    h = nan(3, 1000)
    scan_rows(seed, a, x, h, 1000, forget)
    return h, expected


def run_product(kernel: Simulated, dtype: torch.dtype) -> Run:
    def run(seed: int, forget: bool) -> tuple[Tensor, Tensor]:
        a, b, c = torch.randn(16, 64).to(dtype), torch.randn(8, 64).to(dtype), nan(16, 8)
        kernel(seed, a, b, c, 64, forget)
        return c, a.float() @ b.float().T

    return run


def recurrence() -> tuple[Tensor, Tensor, Tensor]:
    r, start = torch.randn(64, 64) * 0.1, torch.randn(64)
    return r, start, (torch.linalg.matrix_power(r.double(), 9) @ start.double()).float()


def run_cluster(kernel: Simulated) -> Run:
    def run(seed: int, forget: bool) -> tuple[Tensor, Tensor]:
        r, h, expected = recurrence()
        kernel(seed, r, h, 9, forget)
        return h, expected

    return run


def run_grid(seed: int, forget: bool) -> tuple[Tensor, Tensor]:
    r, start, expected = recurrence()
    h = torch.stack((start, nan(64)))
    grid_recurrence(seed, r, h, torch.zeros(1, dtype=torch.int32), 9, forget)
    return h[1], expected


def run_chain(seed: int, forget: bool) -> tuple[Tensor, Tensor]:
    x, y = torch.randint(-8, 8, (9, 32)).float(), nan(9, 32)
    chained_sum(seed, x, y, torch.zeros(10, dtype=torch.int32), nan(9), forget)
    return y, x.flatten().cumsum(0).view(9, 32)


def run_hand_over(kernel: Simulated) -> Run:
    def run(seed: int, forget: bool) -> tuple[Tensor, Tensor]:
        x, y = torch.randn(7, 32), nan(7, 32)
        kernel(seed, x, y, 7, forget)
        return y, x.flip(1)

    return run


PLANTED = {
    "no __syncthreads": run_scan,
    "no wait for cp.async": run_product(tile_product, torch.bfloat16),
    "no wait for cp.async, float16": run_product(tile_product_f16, torch.float16),
    "no cluster barrier": run_cluster(cluster_recurrence),
    "no wait for bytes": run_cluster(cluster_recurrence_async),
    "no wait for the grid": run_grid,
    "no ticket": run_chain,
    "no wait for the mbarrier": run_hand_over(hand_over),
    "no named barrier": run_hand_over(hand_over_named),
}


@pytest.mark.parametrize("run", PLANTED.values(), ids=PLANTED)
def test_correct_under_every_schedule(run: Run, seeds: range) -> None:
    results = []
    for seed in seeds:
        torch.manual_seed(0)
        got, expected = run(seed, False)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        results.append(got)
    assert all(torch.equal(got, results[0]) for got in results)


@pytest.mark.parametrize("run", PLANTED.values(), ids=PLANTED)
def test_planted_bug_is_noticed(run: Run, seeds: range) -> None:
    """In at least one of the schedules the result is wrong, or the launch stops with a report."""
    noticed = []
    for seed in seeds:
        torch.manual_seed(0)
        try:
            got, expected = run(seed, True)
        except RuntimeError as error:
            assert " of block (" in str(error) or "no thread can go on" in str(error)
            noticed.append(seed)
        else:
            if not torch.allclose(got, expected, rtol=1e-4, atol=1e-4):
                noticed.append(seed)
    assert noticed


def failure(kernel: Simulated, *arguments: object, seed: int = 0, **changes: object) -> str:
    with pytest.raises(RuntimeError) as caught:
        kernel(seed, *arguments, **changes)
    return str(caught.value)


def line_of(file: str, text: str, occurrence: int = 0) -> str:
    lines = [i + 1 for i, line in enumerate((KERNELS / file).read_text().splitlines()) if text in line]
    return f"{file}:{lines[occurrence]}"


def misuse(entry: str, codes: str, block: int = 32, **options: object) -> Simulated:
    return Simulated("misuse.cu", entry, codes, block=block, **options)


def test_barrier_in_a_branch(seeds: range) -> None:
    x = torch.where(torch.arange(64) < 48, 1.0, -1.0)
    for seed in seeds:
        assert failure(misuse("barrier_in_a_branch", "PP", 64), x, nan(64), seed=seed).splitlines() == [
            "barrier_in_a_branch: no thread can go on:",
            f"  block (0,0,0): 48 threads, 0 to 47, wait for __syncthreads at {line_of('misuse.cu', '__syncthreads')}",
            "  block (0,0,0): 16 threads, 48 to 63, wait for named barrier at "
            + line_of("misuse.cu", "named_barrier_sync"),
        ]
    [first, second] = (line_of("misuse.cu", "__syncthreads", i) for i in (1, 2))
    assert failure(misuse("two_barriers_in_branches", "PP", 64), x, nan(64)) == (
        f"two_barriers_in_branches: thread (48,0,0) of block (0,0,0): __syncthreads at {second}: other threads of this "
        f"block are in the one at {first}"
    )


def test_shuffles_by_part_of_a_warp(seeds: range) -> None:
    x, y = torch.randn(32), nan(32)
    here = line_of("misuse.cu", "__shfl_sync(~0u, p_x[threadIdx.x], 0)")
    for seed in seeds:
        message = failure(misuse("half_a_warp", "PP"), x, y, seed=seed)
        assert f"__shfl_sync at {here}" in message and "exit" in message
    assert "reads a lane that takes no part" in failure(misuse("absent_lane", "PP"), x, y)
    message = failure(misuse("different_shuffles", "PP"), x, y)
    assert "__shfl_sync at " in message and "other lanes of this warp are in __shfl_xor_sync" in message


def test_overruns_name_thread_and_byte() -> None:
    assert failure(misuse("past_dynamic", "P", shared=128), nan(32)) == (
        "past_dynamic: thread (31,0,0) of block (0,0,0): touches byte 128 of 128 bytes of dynamic shared memory"
    )
    assert failure(misuse("past_static", "P"), nan(32)) == (
        "past_static: thread (28,0,0) of block (0,0,0): touches byte 128 of a static shared array of 128 bytes"
    )
    assert failure(misuse("null_pointer", "P"), None) == (
        "null_pointer: thread (0,0,0) of block (0,0,0): touches address 0x0, which is not its memory"
    )
    assert failure(misuse("no_pointer", "P"), nan(32)) == (
        "no_pointer: thread (0,0,0) of block (0,0,0): touches an address that is not aligned to its type, or that no "
        "memory can have"
    )


def test_the_process_goes_on_after_a_failure() -> None:
    """Dropped fibres, protected pages and the signal handler leave nothing behind for the next launch."""
    for _ in range(3):
        failure(misuse("past_dynamic", "P", shared=128), nan(32))
        got, expected = run_scan(1, False)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_shared_memory_that_nobody_wrote_is_nan(seeds: range) -> None:
    for seed in seeds:
        y, z = torch.zeros(64), torch.zeros(32, dtype=torch.float64)
        misuse("never_written", "PP", shared=128)(seed, y, z)
        assert y.isnan().all() and z.isnan().all()


def test_other_misuse() -> None:
    x, y = torch.randn(32), nan(32)
    assert "cp.async at " in failure(misuse("misaligned_copy", "PP"), x, y)
    assert "address not aligned to 16" in failure(misuse("misaligned_copy", "PP"), x, y)
    assert "load_streaming at " in failure(misuse("misaligned_vector", "PP"), x, y)
    here = line_of("misuse.cu", "__trap")
    assert failure(misuse("trap", "P"), y) == f"trap: thread (3,0,0) of block (0,0,0): __trap at {here}: reached"
    assert "the mbarrier is not initialised" in failure(misuse("mbarrier_not_initialised", "P"), y)
    assert "more than 48 KB of static shared memory" in failure(misuse("large_array", "P"), y)


def test_launches_that_a_gpu_refuses() -> None:
    x, y = torch.randn(7, 32), nan(7, 32)
    assert failure(hand_over, x, y, 7, False, block=128).endswith("128 threads, compiled for 64 at most")
    assert failure(hand_over, x, y, 7, False, shared=228 << 10).endswith("of at most 227 KB")
    assert failure(hand_over, x, y, 7, False, cluster=2, grid=2).endswith("that is no CLUSTER_KERNEL")
    assert failure(cluster_recurrence, x, y, 7, False, cluster=2).endswith("clusters of 2, compiled for 4")
    assert failure(cluster_recurrence, x, y, 7, False, grid=6).endswith("grid.x is not a multiple of the cluster size")


def test_deadlock_without_a_cooperative_launch() -> None:
    """The report groups threads by block and by what they wait for, with the line."""
    r, start, _ = recurrence()
    h, arrived = torch.stack((start, nan(64))), torch.zeros(1, dtype=torch.int32)
    here = line_of("grid.cu", "grid_barrier(p_arrived")
    assert failure(grid_recurrence, r, h, arrived, 3, False, cooperative=False).splitlines() == [
        "grid_recurrence: no thread can go on:",
        f"  block (0,0,0): 63 threads, 1 to 63, wait for __syncthreads at {here}",
        f"  block (0,0,0): thread 0 waits for the grid barrier at {here}",
    ]


def test_schedules_differ_by_seed_and_repeat() -> None:
    kernel = Simulated("instructions.cu", "order", "PP", grid=6, block=64)

    def order(seed: int) -> list[int]:
        came = torch.empty(6 * 64, dtype=torch.int32)
        kernel(seed, torch.zeros(1, dtype=torch.int32), came)
        assert sorted(came.tolist()) == list(range(6 * 64))
        return came.tolist()

    orders = [order(seed) for seed in range(6)]
    assert orders[0] == list(range(6 * 64))
    assert len({tuple(o) for o in orders}) == 6
    assert [order(seed) for seed in range(6)] == orders


def test_warp_functions(seeds: range) -> None:
    kernel = Simulated("instructions.cu", "warp_functions", "PP")
    x, lane = torch.randint(-50, 50, (32,), dtype=torch.int32), torch.arange(32)
    wrapped = 0
    for value in x.tolist():
        wrapped ^= value
    votes = sum(1 << i for i in range(32) if x[i] > 0)
    same = torch.ones(32, dtype=torch.int32)
    expected = [
        x[5] * same,
        x[lane // 8 * 8 + (lane + 1) % 8],
        torch.where(lane >= 3, x[(lane - 3).clamp(0)], x),
        torch.where(lane % 8 >= 3, x[(lane - 3).clamp(0)], x),
        torch.where(lane < 29, x[(lane + 3).clamp(max=31)], x),
        torch.where(lane % 8 < 5, x[(lane + 3).clamp(max=31)], x),
        x[lane ^ 17],
        2 * x[lane ^ 1] + 1,
        same * (votes - (1 << 32) if votes >= 1 << 31 else votes),
        0 * same,
        same,
        x.sum() * same,
        x.max() * same,
        x.min() * same,
        wrapped * same,
        torch.where(lane < 16, x[:16].sum(), x[16:].sum()),
    ]
    for seed in seeds:
        got = torch.zeros(len(expected), 32, dtype=torch.int32)
        kernel(seed, x, got)
        for row, (value, want) in enumerate(zip(got, expected, strict=True)):
            assert torch.equal(value, want.to(torch.int32)), row


def test_block_functions(seeds: range) -> None:
    kernel = Simulated("instructions.cu", "block_functions", "PPPP", block=64)
    for seed in seeds:
        words = torch.tensor([5, 3, 50, 0, 0, 7, 0, 64], dtype=torch.int32)
        long, real = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
        votes = torch.zeros(3, 64, dtype=torch.int32)
        kernel(seed, words, long, real, votes)
        assert words.tolist() == [5 + 2016, 63, 0, 4, -1, 42, 11, 0]
        assert long.item() == 2016 << 32 and real.item() == 32
        assert (votes == torch.tensor([[22], [1], [0]])).all()


def test_arithmetic() -> None:
    kernel = Simulated("instructions.cu", "arithmetic", "PPq")
    x = torch.cat((torch.linspace(0.01, 3, 28), torch.tensor([torch.nan, torch.inf, 1e-30, 1e30])))
    i = torch.arange(32)
    ones = torch.tensor([bin(k).count("1") for k in i.tolist()])
    leading = torch.tensor([32 - k.bit_length() for k in i.tolist()])
    first = torch.tensor([(k & -k).bit_length() for k in i.tolist()])
    one = torch.tensor(1.0)
    expected = [
        *(x.exp(), x.exp(), x.log(), x.log1p(), x.tanh(), x.exp2(), x.tanh(), 1 / x, x.rsqrt()),
        *(x.fmax(one), x.fmax(one), x.fmin(one), (x.double() ** 2 + 1).float(), x.isfinite().float(), x),
        (x.double().exp() + x.double().log()).float(),
        *(torch.inf * x, torch.nan * x, 2 * x, (ones + leading + first).float()),
    ]
    got = torch.zeros(len(expected), 32)
    kernel(0, x, got, 32)
    assert torch.equal(got[0, :28], x[:28].view(7, 4).flip(1).flatten())
    for row, (value, want) in enumerate(zip(got[1:], expected[1:], strict=True), 1):
        torch.testing.assert_close(value, want, rtol=1e-6, atol=0, equal_nan=True, msg=lambda m, r=row: f"{r}: {m}")


def test_copies(seeds: range) -> None:
    kernel = Simulated("instructions.cu", "copies", "PP")
    x = torch.randn(32, 4)
    present = torch.arange(4) < (torch.arange(32) % 5)[:, None]
    for seed in seeds:
        y = nan(32, 12)
        kernel(seed, x, y)
        assert torch.equal(y, torch.cat((x, x[:, :2], x[:, :1], torch.where(present, x, 0), x[:, 1:2]), 1))


def test_products_of_other_layouts_and_formats() -> None:
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 8).bfloat16(), nan(16, 8)
    Simulated("tiles.cu", "tile_product_transposed", "PPP", constants={"FORMAT": "bf16"})(1, a, b, c)
    torch.testing.assert_close(c, a.float().T @ b.float(), rtol=1e-5, atol=1e-5)

    a, b, c = torch.randn(16, 8), torch.randn(8, 8), nan(16, 8)
    Simulated("tiles.cu", "tile_product_tf32", "PPP", constants={"TF32": 1})(1, a, b, c)
    short_a, short_b = ((m.view(torch.int32) & ~0x1FFF).view(torch.float32) for m in (a, b))
    torch.testing.assert_close(c, short_a @ short_b.T, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(c, a @ b.T, rtol=1e-5, atol=1e-5)


def test_half_precision_operands() -> None:
    """Every finite float16, subnormals too, times one."""
    bits = torch.arange(-0x8000, 0x8000, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    values = values[values.isfinite()]
    values = torch.cat((values, torch.zeros(-len(values) % (16 * 16)).half())).view(-1, 16, 16)[::5].contiguous()
    eye, c = torch.eye(16).half(), nan(16, 8)
    for a in values[:: len(values) // 8]:
        for half in range(2):
            tile_product_f16(0, a, eye[half * 8 : half * 8 + 8].contiguous(), c, 16, False)
            assert torch.equal(c, a[:, half * 8 : half * 8 + 8].float())


def test_shapes_of_three_dimensions(seeds: range) -> None:
    kernel = Simulated("instructions.cu", "shapes", "P", grid=(2, 3, 2), block=(4, 3, 2))
    for seed in seeds:
        y = torch.zeros(12, 24, dtype=torch.int64)
        kernel(seed, y)
        assert torch.equal(y, torch.arange(12)[:, None] * 1000 + torch.arange(24))


@pytest.mark.parametrize("header", ["ptx.h", "sync.h"])
def test_every_instruction_has_its_twin(header: str) -> None:
    """A function that only one machine has would break kernels on the other."""
    text = (launch.SOURCES / "common" / header).read_text()
    simulated, real = set(), set()
    for section in re.split(r"^#if defined\(SIMULATE\)\n", text, flags=re.MULTILINE)[1:]:
        ours, theirs = re.split(r"^#else\n", section, flags=re.MULTILINE)
        simulated |= {*re.findall(r"^(?:inline )?[\w:]+\*? (\w+)\(.*\{", ours, re.MULTILINE)}
        real |= {*re.findall(r"^__device__ __forceinline__ [\w:]+\*? (\w+)\(", theirs, re.MULTILINE)}
        real |= {*re.findall(r"^DEFINE_MMA\((\w+),", theirs, re.MULTILINE)}
    assert len(simulated) > 10
    assert simulated == real - {"cluster_address"}  # which needs no twin: only instructions take it


SANITIZED = """
import sys, torch
from seqops.core import launch
kernel = launch.Kernel(sys.argv[1], "scan_rows", "PPPq?")
a, x = torch.rand(2, 500), torch.randn(2, 500)
h = torch.empty(2, 500)
kernel({}, 2, 256, (a, x, h, 500, False), like=x)
assert torch.allclose(h[:, :2], torch.stack((x[:, 0], a[:, 1] * x[:, 0] + x[:, 1]), 1))
print("right", flush=True)
kernel({}, 3, 256, (a, x, h, 500, False), like=x)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' runtime is preloaded the Linux way")
def test_sanitizers_see_kernels(tmp_path: Path) -> None:
    """The same kernel under AddressSanitizer and UndefinedBehaviorSanitizer: right, then caught past its tensors."""
    compiler = launch._compiler()

    def runtime(library: str) -> str:
        command = [compiler, f"-print-file-name={library}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    done = subprocess.run(
        [sys.executable, "-c", SANITIZED, str(KERNELS / "rows.cu")],
        cwd=HERE.parent,
        env=os.environ
        | {"SEQOPS_CACHE": str(tmp_path), "SEQOPS_SIMULATE": "2", "CXXFLAGS": FLAGS, "OMP_NUM_THREADS": "1"}
        | {"LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}", "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "right\n", done.stderr
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "rows.cu" in done.stderr


ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
COMPILED = [
    *((file, arch, {}) for file in ("rows.cu", "grid.cu", "misuse.cu", "instructions.cu") for arch in ARCHITECTURES),
    *(("tiles.cu", arch, {"FORMAT": name}) for name in ("bf16", "f16") for arch in ARCHITECTURES),
    *(("tiles.cu", arch, {"TF32": 1}) for arch in ARCHITECTURES),
    # clusters, and mbarriers that wait
    *((file, arch, {}) for file in ("cluster.cu", "hand_over.cu") for arch in ARCHITECTURES[1:]),
]


@pytest.mark.parametrize("file, arch, constants", COMPILED, ids=str)
def test_the_same_sources_compile_for_gpus(file: str, arch: str, constants: dict[str, int | str]) -> None:
    pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    path = launch.compile_offline(str(KERNELS / file), constants, arch)
    assert path.read_bytes()[:4] == b"\x7fELF"
    if shutil.which("cuobjdump") or "triton" in sys.modules:
        assert launch.resources(path)["LOCAL"] == 0
