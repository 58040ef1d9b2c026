"""What the tuner would choose for GPUs that are not here: it compiles, spills nothing and is what the model says.

Rooms are found by name: every CUDA target of `seqops/<room>/tune.py` names keys, and each is solved for every preset.

    every run     one key of each kind (a kernel and its storage type), for one preset
    slow          all
"""

import importlib.util
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from seqops.core import choose, launch
from seqops.tune import device as devices
from seqops.tune.target import Target, targets

HAS_NVRTC = importlib.util.find_spec("cupy_backends") is not None
PRESETS = list(devices.PRESETS)
# Beside the presets, a consumer GPU of a generation that none of them has.
DEVICES = [*map(devices.find, PRESETS), replace(devices.find("rtx4090"), name="sm_120", arch=120)]
# Registers. The widest gap is that of softmax_scan's backward march, which takes 83 with 128 threads and 116 with 64.
CLOSE = 33
# Of the recurrent cells: 21 in the mean. Where a thread holds little, the compiler takes between 80 and 200 for nearly
# equal counts of everything, as it starts a step's loads one after the other or all at once; the widest gap is 88.
CLOSE_OF_CELLS = 90
# Of causal convolutions: 25 in the mean. With few taps the compiler takes 48 more or fewer on one architecture than on
# another, for the same counts of everything.
CLOSE_OF_CONVOLUTIONS = 58

TARGETS = [target for target in targets() if target.backend == "cuda"]


def name_of(key: choose.Key) -> str:
    """For test names: without the bars."""
    return f"{key.kernel}-{key.dtype}-" + ",".join(map(str, key.sizes))


def keys() -> Iterator[tuple[Target, choose.Key]]:
    for target in TARGETS:
        yield from ((target, key) for key in [*target.keys()])


def threads_of(problem: Any, solution: Any) -> int:
    """Of a block: chosen, or what follows."""
    return int(solution["threads"] if "threads" in solution else problem.values(solution)["threads"])


def compiled_parameters() -> Iterator[Any]:
    """All keys for all presets; all but one of a kind marked slow, and the presets take turns."""
    kinds: dict[tuple[str, str], int] = {}
    for target, key in keys():
        kind = key.kernel, key.dtype.partition("+")[0]
        first = kind not in kinds
        kinds.setdefault(kind, len(kinds))
        for j, device in enumerate(DEVICES):
            chosen = first and kinds[kind] % len(DEVICES) == j
            # 1,800 of them: what is left differs in constants only.
            marks = () if chosen else pytest.mark.slow
            yield pytest.param(target, key, device, marks=marks, id=f"{name_of(key)}-{device.name}")


@pytest.mark.skipif(not HAS_NVRTC, reason="CuPy is not installed")
@pytest.mark.parametrize(("target", "key", "device"), [*compiled_parameters()])
def test_choice_compiles_as_predicted(target: Target, key: choose.Key, device: devices.Device) -> None:
    """No spills; registers at most those of the model and close to them; shared memory exactly."""
    problem = target.tunable.problem(device, key)
    solution = problem.solve(seconds=math.inf)
    assert solution is not None, problem.explain()
    predicted = problem.values(solution)
    report = target.compile(device, key, solution)
    assert report is not None
    assert not report.stack and not report.spills
    close = CLOSE_OF_CELLS if "exchange" in solution else CLOSE
    close = CLOSE_OF_CONVOLUTIONS if target.op == "causal_conv1d" else close
    assert predicted["registers"] - close <= report.registers <= predicted["registers"]
    assert report.registers <= device.thread_registers(threads_of(problem, solution))
    assert report.shared == predicted["shared"] <= device.shared_per_block


@pytest.mark.parametrize("preset", PRESETS)
def test_choice_is_resident(preset: str) -> None:
    """As many blocks as the model counts on fit on a multiprocessor, and every problem is solved in few nodes."""
    device = devices.find(preset)
    for target, key in [*keys()][:: 7 + PRESETS.index(preset)]:
        problem = target.tunable.problem(device, key)
        solution = problem.solve(seconds=math.inf)
        assert solution is not None, problem.explain()
        assert problem.statistics.optimal and problem.statistics.nodes < 1000
        predicted = problem.values(solution)
        threads = threads_of(problem, solution)
        resident = device.blocks_resident(threads, predicted["registers"], predicted["shared"])
        # A recurrent cell's blocks are those of a head, one a multiprocessor.
        assert resident >= (1 if "exchange" in solution else solution.get("blocks", 1)), key


@pytest.mark.parametrize("better", ["processors", "bandwidth", "registers_per_processor"])
def test_better_devices_cost_no_more(better: str) -> None:
    device = devices.find("a100")
    improved = replace(device, **{better: getattr(device, better) * 2})
    for target, key in [*keys()][::11]:
        costs = []
        for each in (device, improved):
            problem = target.tunable.problem(each, key)
            solution = problem.solve(seconds=math.inf)
            assert solution is not None
            costs.append(problem.cost(solution))
        assert costs[1] <= costs[0], key


def test_impossible_devices_are_explained() -> None:
    """With too few registers for any block there is no choice, and the constraint that forbids it is named."""
    device = replace(devices.find("a100"), registers_per_processor=1024)
    target, key = next(keys())
    problem = target.tunable.problem(device, key)
    assert problem.solve(seconds=math.inf) is None
    assert "registers fit" in problem.explain()


def test_every_cuda_kernel_is_tuned() -> None:
    """Each entry that a room's launchers name has a target, and each target's constants are its own."""
    rooms = {target.tunable.problem.__module__.rpartition(".")[0] for target in TARGETS}
    assert "seqops.scan" in rooms
    for room in rooms:
        module = importlib.import_module(f"{room}.cuda")
        entries = {each.entry for each in vars(module).values() if isinstance(each, launch.Kernel)}
        mine = [t for t in TARGETS if t.tunable.problem.__module__.startswith(f"{room}.")]
        assert entries == {t.tunable.name.rpartition(".")[0].replace(".", "_") for t in mine}


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.tunable.name)
def test_default_shapes(target: Target) -> None:
    """The shape that the command line starts from has a choice, on every preset or on this machine."""
    shape = {flag.key: flag.default for flag in target.flags}
    machines = [devices.host()] if target.backend == "cpu" else [devices.find(preset) for preset in PRESETS]
    for dtype in target.dtypes:
        for machine in machines:
            key = target.key(shape, dtype, machine)
            problem = target.tunable.problem(machine, key)
            solution = problem.solve(seconds=math.inf)
            assert solution is not None, problem.explain()
            assert problem.check(solution) is None
            assert problem.cost(solution) > 0


# ---- the scans: choices of real size, on the simulator


SIMULATED = """
import contextlib, math, sys, torch
from seqops.core import choose
from seqops.scan import tune
from seqops.tune import device

op, direction, dtype, preset = sys.argv[1:]
found = [t for t in tune.TARGETS if (t.op, t.direction, t.backend) == (op, direction, "cuda")]
shapes = [{"batch": 2, "time": 150, "channels": 64, "gates": "channel", "heads": 4, "dim": 16}]
shapes += [{"batch": 2, "time": 150, "channels": 64, "gates": "head", "heads": 1, "dim": 3}]
for shape in shapes:
    for large in ({"batch": 64, "time": 2048}, {"batch": 1, "time": 1 << 17}):
        with contextlib.ExitStack() as stack:
            for target in found:
                key = target.key({**shape, **large}, dtype, None)
                problem = target.tunable.problem(device.find(preset), key)
                stack.enter_context(choose.forced(target.tunable.name, problem.solve(seconds=math.inf)))
            example = found[0].example(shape, dtype, "cpu")
            for value, expected in zip(example.run(), example.expected(), strict=True):
                torch.testing.assert_close(
                    value.double(), expected, rtol=example.tolerance[0], atol=example.tolerance[1]
                )
print("equal")
"""


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "dtype", "preset"),
    [("linear_scan", "float32", "h200"), ("linear_scan", "bfloat16", "l4"), ("softmax_scan", "float32", "a100")],
)
def test_choices_on_the_simulator(op: str, dtype: str, preset: str, direction: str, run_python: Any) -> None:
    """The constants for real GPUs, chosen for sizes that fill them, give the values of the reference."""
    if shutil.which("g++") is None:
        pytest.skip("the simulator compiles with g++")
    assert "equal" in run_python(SIMULATED, op, direction, dtype, preset, SEQOPS_SIMULATE="1")


def test_keys_share_choices() -> None:
    """Sizes are rounded up: neighbours share a key, and with it the choice and every bit of the result."""
    cuda, tiles = (importlib.import_module(f"seqops.scan.{name}") for name in ("cuda", "tiles"))
    kernel = tiles.Pass("linear_scan.forward", "float+float", 4, 4)
    assert cuda.key_of(kernel, 5, 1000, 100) == cuda.key_of(kernel, 8, 1024, 128)
    assert cuda.key_of(kernel, 5, 1025, 100) != cuda.key_of(kernel, 5, 1024, 100)
    assert str(cuda.key_of(kernel, 1, 1 << 30, 4)).endswith("B<=1,T>131072,L<=1")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.tunable.name)
def test_largest_sizes_have_a_choice(target: Target) -> None:
    """All sizes that have buckets beyond the last one at once: more than any memory holds."""
    key = next(iter([*target.keys()]))
    sizes = [size if size.relation == "=" else choose.Size(size.name, 1 << 18, ">131072") for size in key.sizes]
    problem = target.tunable.problem(devices.find("l4"), key._replace(sizes=tuple(sizes)))
    assert problem.solve(seconds=math.inf) is not None


def test_packed_sequences_count_as_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """4,096 sequences in one row of 65,536 steps: the bytes and the parallel work are the row's, in both backends."""
    cuda = importlib.import_module("seqops.scan.cuda")
    asked = []

    def choice(kernel: Any, like: Any, batch: int, time: int, channels: int) -> dict[str, int]:
        asked.append((batch, time, channels))
        return importlib.import_module("seqops.scan.tiles").simulated(kernel, batch, time, channels)

    monkeypatch.setattr(cuda, "_choose", choice)
    monkeypatch.setattr(cuda.launch.Kernel, "__call__", lambda *args, **options: None)
    edges = torch.arange(0, 65, 8)
    cuda.linear_scan(torch.zeros(1, 64, 4), torch.zeros(1, 64, 4), cu_seqlens=edges)
    assert asked == [(1, 64, 4)]


def test_smaller_members_of_a_bucket_launch() -> None:
    """A choice for 8 lanes serves fewer, with no more shared memory than it was checked for."""
    tiles = importlib.import_module("seqops.scan.tiles")
    kernel = tiles.Pass("linear_scan.forward", "float+float", 1, 1)
    chosen = {"march": 0, "threads": 64, "steps": 4, "blocks": 2, "lanes": 8, "group": 4}
    for channels in range(1, 9):
        found = tiles.launch(kernel, chosen, batch=2, time=100, channels=channels, rows=2)
        assert found.lanes == min(8, tiles.power_of_two_from(channels))
        assert found.shared <= tiles.shared_bytes(kernel, chosen)
        assert found.tiles == -(-100 // (64 // found.lanes * 4))
        assert found.grid == 2 * found.tiles


def test_gates_of_heads_need_whole_heads() -> None:
    tune = importlib.import_module("seqops.scan.tune")
    shape = {"batch": 1, "time": 8, "channels": 100, "gates": "head"}
    with pytest.raises(ValueError, match="--gates head: expected channels that are a multiple of 64, got 100"):
        tune.linear_key("forward", shape, "float32", None)
