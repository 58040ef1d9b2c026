"""Compiling kernels at first use, the cache, and launching: against a stub driver, and in the simulator.

No test here needs a GPU: NVRTC compiles for any, and a stub libcuda records what a launch hands over.
"""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import threading
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from seqops.core import launch

HERE = Path(__file__).parent

SCALE = """
#include "common/gpu.h"
#include "room/device.h"

// y = FACTOR x + offset, or 0
KERNEL(scale, THREADS)(const float* p_x, float* p_y, int64_t n, float offset, bool zero) {
  const int64_t i = blockIdx.x * int64_t(THREADS) + threadIdx.x;
  static_assert(THREADS % 32 == 0, "THREADS must be whole warps");
  if (i < n) p_y[i] = zero ? 0.0f : apply(p_x[i], offset);
}
EXPORT(scale)
"""
DEVICE = """
#pragma once
inline float apply(float x, float offset) { return FACTOR * x + offset; }
"""
CODES = "PPqf?"
COUNT = r"""
#include "common/gpu.h"
KERNEL(count, 4)(int64_t* p, int64_t factor, int64_t first) { p[threadIdx.x] = first + factor * threadIdx.x; }
EXPORT(count)
"""
CONSTANTS = {"THREADS": 64, "FACTOR": 3}

needs_nvrtc = pytest.mark.skipif(importlib.util.find_spec("cupy_backends") is None, reason="needs CuPy")
needs_compiler = pytest.mark.skipif(
    launch._reason_without_compiler() is not None, reason=str(launch._reason_without_compiler())
)


def write_sources(folder: Path) -> Path:
    shutil.copytree(launch.SOURCES / "common", folder / "common")
    (folder / "room").mkdir()
    (folder / "room" / "scale.cu").write_text(SCALE)
    (folder / "room" / "count.cu").write_text(COUNT)
    (folder / "room" / "device.h").write_text(DEVICE)
    return folder


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A csrc of our own, with a cache of its own."""
    folder = write_sources(tmp_path / "csrc")
    monkeypatch.setattr(launch, "SOURCES", folder)
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path / "cache"))
    return folder


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for all tests that simulate, since compiling the simulator takes seconds."""
    folder = tmp_path_factory.mktemp("shared")
    write_sources(folder / "csrc")
    return folder


@pytest.fixture
def simulate(shared_folder: Path, monkeypatch: pytest.MonkeyPatch) -> launch.Kernel:
    monkeypatch.setattr(launch, "SOURCES", shared_folder / "csrc")
    monkeypatch.setenv("SEQOPS_CACHE", str(shared_folder / "cache"))
    monkeypatch.setenv("SEQOPS_SIMULATE", "1")
    return launch.Kernel("room/scale.cu", "scale", CODES)


# ---- compiling, and the cache


@needs_nvrtc
def test_everything_that_matters_is_in_the_key(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(constants: dict[str, int | str] = CONSTANTS, arch: str = "sm_90a") -> Path:
        return launch.compile_offline("room/scale.cu", constants, arch)

    first = compiled()
    changed = first.stat().st_mtime_ns
    assert compiled() == first and compiled(dict(reversed(CONSTANTS.items()))) == first
    assert first.stat().st_mtime_ns == changed
    paths = [first, compiled(arch="sm_80"), compiled({"THREADS": 128, "FACTOR": 3}), compiled({**CONSTANTS, "MORE": 1})]

    (sources / "room" / "device.h").write_text(DEVICE + "// edited\n")
    paths.append(compiled())
    (sources / "common" / "sync.h").write_text((sources / "common" / "sync.h").read_text() + "// edited\n")
    paths.append(compiled())
    (sources / "room" / "scale.cu").write_text(SCALE + "// edited\n")
    paths.append(compiled())
    # neither is included
    (sources / "room" / "host.h").write_text("// new\n")
    (sources / "common" / "check.h").write_text("// edited\n")
    assert compiled() == paths[-1]

    real = launch._nvrtc()

    class NextNvrtc:
        def __getattr__(self, name: str) -> object:
            return (99, 9) if name == "version" else getattr(real, name)

        def getVersion(self) -> tuple[int, int]:
            return (99, 9)

    monkeypatch.setattr(launch, "_nvrtc", NextNvrtc)
    paths.append(compiled())
    assert len({*paths}) == len(paths)
    assert sorted(path.name for path in first.parent.iterdir()) == sorted(path.name for path in paths)


@needs_nvrtc
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_file_is_rebuilt_with_a_warning(sources: Path, damage: str) -> None:
    path = launch.compile_offline("room/scale.cu", CONSTANTS, "sm_90a")
    whole = path.read_bytes()
    assert whole[:4] == b"\x7fELF" and hashlib.sha256(whole[:-32]).digest() == whole[-32:]
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:middle], "flipped": flipped, "empty": b""}[damage])
    with pytest.warns(RuntimeWarning, match=rf"{path.name} is damaged: compiled again"):
        assert launch.compile_offline("room/scale.cu", CONSTANTS, "sm_90a") == path
    assert path.read_bytes() == whole
    assert launch.compile_offline("room/scale.cu", CONSTANTS, "sm_90a") == path


@needs_nvrtc
def test_resources(sources: Path) -> None:
    try:
        launch._cuobjdump()
    except RuntimeError as error:
        pytest.skip(str(error))
    used = launch.resources(launch.compile_offline("room/scale.cu", CONSTANTS, "sm_90a"))
    assert used.keys() == {"REG", "STACK", "SHARED", "LOCAL"}
    assert 0 < used["REG"] < 64 and used["STACK"] == used["LOCAL"] == used["SHARED"] == 0


@needs_nvrtc
def test_compiler_errors_are_readable(sources: Path) -> None:
    with pytest.raises(RuntimeError) as caught:
        launch.compile_offline("room/scale.cu", {"THREADS": 40, "FACTOR": 3}, "sm_90a")
    first, *rest = str(caught.value).splitlines()
    assert first == "room/scale.cu does not compile for sm_90a with {'THREADS': 40, 'FACTOR': 3}:"
    assert 'room/scale.cu(8): error: static assertion failed with "THREADS must be whole warps"' in rest
    assert not [*launch.cache_folder().iterdir()]


@needs_compiler
def test_compiler_errors_of_the_simulator_are_readable(simulate: launch.Kernel) -> None:
    with pytest.raises(RuntimeError) as caught:
        simulate({"THREADS": 40, "FACTOR": 3}, 1, 40, (None, None, 0, 0.0, False), like=torch.empty(1))
    first, *rest = str(caught.value).splitlines()
    assert first == "room/scale.cu does not compile for the simulator with {'THREADS': 40, 'FACTOR': 3}:"
    assert any("scale.cu:8" in line and "THREADS must be whole warps" in line for line in rest)


COMPILE = """
import json, multiprocessing, sys
from pathlib import Path
from seqops.core import launch

launch.SOURCES = Path(sys.argv[1])

def compile(start, answers):
    built, write = [], launch._write
    launch._write = lambda path, content: (built.append(path.name), write(path, content))
    start.wait()
    constants = {"THREADS": 64, "FACTOR": 3}
    cubin = launch.compile_offline("room/scale.cu", constants, "sm_90a")
    simulated = launch.compile_simulated("room/scale.cu", constants)
    answers.put([cubin.name, simulated.name, None not in map(launch._content, (cubin, simulated)), built])

context = multiprocessing.get_context("fork")  # of a process that has imported torch, and not used NVRTC
start, answers = context.Barrier(4), context.Queue()
processes = [context.Process(target=compile, args=(start, answers)) for _ in range(4)]
for process in processes:
    process.start()
print(json.dumps([answers.get(timeout=120) for _ in processes]))
for process in processes:
    process.join()
"""


@needs_nvrtc
@needs_compiler
def test_several_processes_at_once(sources: Path, run_python: Callable[..., str]) -> None:
    """Four processes that want the same files at the same time: one compiles each, all read whole files."""
    answers = json.loads(run_python(COMPILE, str(sources)))
    assert len(answers) == 4
    assert len({tuple(names) for *names, _, _ in answers}) == 1 and all(whole for _, _, whole, _ in answers)
    built = sorted(name for *_, names in answers for name in names)
    assert len(built) == len({*built}) == 3  # the cubin, the simulator, the simulated kernel
    assert sorted(path.name for path in launch.cache_folder().iterdir()) == built


def test_a_process_that_hangs_is_not_waited_for(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(launch, "_PATIENCE", 0.2)
    launch.cache_folder().mkdir()
    path = launch.cache_folder() / f"file-{launch._key(['key'])}.bin"
    with FileLock(f"{path}.lock"):
        assert launch._cached("file", ".bin", ["key"], lambda: b"content") == path
    assert launch._content(path) == b"content"


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SEQOPS_CACHE", "/somewhere")
    assert launch.cache_folder() == Path("/somewhere")
    monkeypatch.delenv("SEQOPS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert launch.cache_folder() == Path("/cache/seqops")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert launch.cache_folder() == Path.home() / ".cache" / "seqops"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEQOPS_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match=r"the cache of compiled kernels, .*; SEQOPS_CACHE chooses it"):
        launch._cached("a", ".b", ["c"], lambda: b"")


@needs_nvrtc
def test_architecture() -> None:
    assert launch.architecture((9, 0)) == "sm_90a"
    assert launch.architecture((8, 0)) == "sm_80" and launch.architecture((8, 9)) == "sm_89"
    assert launch.architecture((10, 0)) == "sm_100" and launch.architecture((12, 0)) == "sm_120"
    assert launch.architecture((12, 9)) == "sm_121"  # cubins run on later minor versions
    with pytest.raises(RuntimeError, match=r"does not compile for compute capability 6\.1"):
        launch.architecture((6, 1))


# ---- what is missing


def test_reason_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert launch.reason_missing() == "CuPy is not installed (pip install 'seqops[cuda]')"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_thread", threading.local())
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=r"^CUDA kernels cannot be launched here: CuPy is not installed"):
        launch.Kernel("room/scale.cu", "scale", CODES)(CONSTANTS, 1, 64, (None, None, 0, 0.0, False), like=on_gpu)
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launch.reason_missing() == "torch finds no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def no_library() -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so.13\nand so on")

    monkeypatch.setattr(launch, "_nvrtc", no_library)
    launch._reason_without_nvrtc.cache_clear()
    assert launch.reason_missing() == "NVRTC does not load (CuPy failed to load libnvrtc.so.13)"
    launch._reason_without_nvrtc.cache_clear()


def test_reason_not_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "0"):
        monkeypatch.setenv("SEQOPS_SIMULATE", value)
        assert "SEQOPS_SIMULATE is not set (to 1;" in str(launch.reason_not_simulated())
    monkeypatch.setenv("SEQOPS_SIMULATE", "yes")
    assert launch.reason_not_simulated() == (
        "SEQOPS_SIMULATE is 'yes', and should be a number: the schedule's seed plus one"
    )
    monkeypatch.setenv("SEQOPS_SIMULATE", "2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    launch._reason_without_compiler.cache_clear()
    monkeypatch.setattr(launch.platform, "machine", lambda: "x86_64")
    assert launch.reason_not_simulated() == "no C++ compiler: no-such-compiler is not on the PATH"
    launch._reason_without_compiler.cache_clear()
    monkeypatch.setattr(launch.platform, "machine", lambda: "aarch64")
    assert launch.reason_not_simulated() == "the simulator runs on x86-64, not on aarch64"
    launch._reason_without_compiler.cache_clear()


def test_importing_seqops_imports_neither_compiler(run_python: Callable[..., str]) -> None:
    script = "import sys, seqops, seqops.core.launch; print({'cupy', 'cupy_backends', 'triton'} & {*sys.modules})"
    assert run_python(script) == "set()\n"


# ---- in the simulator


@needs_compiler
def test_simulate_end_to_end(simulate: launch.Kernel) -> None:
    x = torch.randn(1000)
    for constants in (CONSTANTS, {"THREADS": 32, "FACTOR": -2}):
        threads = int(constants["THREADS"])
        y = torch.full((1002,), torch.nan)
        simulate(constants, -(-1000 // threads), threads, (x, y[1:], 1000, 0.5, False), like=x)
        torch.testing.assert_close(y[1:-1], constants["FACTOR"] * x + 0.5)
        assert y[0].isnan() and y[-1].isnan()
    y = torch.ones(1000)
    simulate(CONSTANTS, (16, 1), (64, 1, 1), (x, y, 999, 0.5, True), like=x)
    assert not y[:999].any() and y[999] == 1


@needs_compiler
def test_simulated_errors_name_the_kernel(simulate: launch.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(64)
    with pytest.raises(RuntimeError, match=r"^scale: thread \(0,0,0\) of block \(0,0,0\): touches address 0x0,"):
        simulate(CONSTANTS, 1, 64, (x, None, 64, 0.0, False), like=x)
    with pytest.raises(RuntimeError, match=r"^scale: a block of 128 threads, compiled for 64 at most$"):
        simulate(CONSTANTS, 1, 128, (x, x, 64, 0.0, False), like=x)
    with pytest.raises(RuntimeError, match=r"room/scale.cu has no line EXPORT\(other\), which the simulator needs"):
        launch.Kernel("room/scale.cu", "other", CODES)(CONSTANTS, 1, 64, (x, x, 64, 0.0, False), like=x)
    monkeypatch.delenv("SEQOPS_SIMULATE")
    with pytest.raises(RuntimeError, match=r"^scale: on CPU tensors a CUDA kernel needs the simulator: the "):
        simulate(CONSTANTS, 1, 64, (x, x, 64, 0.0, False), like=x)


def test_empty_grid_launches_nothing(sources: Path) -> None:
    kernel = launch.Kernel("room/scale.cu", "scale", CODES)
    for grid in (0, (0,), (4, 0), (4, 1, 0)):
        kernel(CONSTANTS, grid, 64, (None, None, 0, 0.0, False), like=torch.empty(0))
    assert not launch.cache_folder().exists()


def test_bad_calls(simulate: launch.Kernel) -> None:
    x = torch.randn(64)
    with pytest.raises(ValueError, match=r"argument codes: expected letters of P, q, f and \?, got 'Pd'"):
        launch.Kernel("room/scale.cu", "scale", "Pd")
    with pytest.raises(TypeError, match=r"scale: arguments 'PPqf\?': .* expected 5 items"):
        simulate(CONSTANTS, 1, 64, (x, x, 64), like=x)
    with pytest.raises(TypeError, match=r"scale: arguments 'PPqf\?': required argument is not an integer"):
        simulate(CONSTANTS, 1, 64, (x, x, 64.5, 0.0, False), like=x)
    with pytest.raises(ValueError, match="expected up to three sizes"):
        simulate(CONSTANTS, (1, 1, 1, 2), 64, (x, x, 64, 0.0, False), like=x)
    with pytest.raises(RuntimeError, match=r"^scale: a grid of .*: CUDA allows 65535 blocks along y and z$"):
        simulate(CONSTANTS, (1, 1, 65536), 64, (x, x, 64, 0.0, False), like=x)
    with pytest.raises(RuntimeError, match=r"^scale: CUDA kernels run on CUDA tensors, not on meta$"):
        simulate(CONSTANTS, 1, 64, (x, x, 64, 0.0, False), like=torch.empty(1, device="meta"))


@needs_compiler
def test_threads_do_not_share_arguments(simulate: launch.Kernel) -> None:
    """Launches from several threads at once: each packs into a buffer of its own, the simulator runs one at a time."""
    x = torch.randn(64)
    results = {}

    def work(offset: float) -> None:
        y = torch.empty(64)
        for _ in range(20):
            simulate(CONSTANTS, 1, 64, (x, y, 64, offset, False), like=x)
            results.setdefault(offset, []).append(y.clone())

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for offset, values in results.items():
        assert len(values) == 20
        for y in values:
            torch.testing.assert_close(y, 3 * x + offset)


@needs_compiler
def test_prepared_launches(simulate: launch.Kernel) -> None:
    """The last argument differs from launch to launch; two prepared launches of one kernel share nothing."""
    kernel = launch.Kernel("room/count.cu", "count", "Pqq")
    written = [torch.zeros(4, dtype=torch.int64) for _ in range(2)]
    first, second = (kernel.prepare({}, 1, 4, (t, factor), like=t) for t, factor in zip(written, (1, 100), strict=True))
    for value in (3, -2, 2**40):
        first(value)
        second(value + 1)
        assert written[0].tolist() == [value + i for i in range(4)]
        assert written[1].tolist() == [value + 1 + 100 * i for i in range(4)]
    with pytest.raises(ValueError, match=r"^scale: argument codes: expected q at the end, got 'PPqf\?'$"):
        simulate.prepare(CONSTANTS, 1, 64, (written[0],) * 2, like=written[0])
    with pytest.raises(TypeError, match=r"^count: arguments 'Pqq': .* expected 3 items"):
        kernel.prepare({}, 1, 4, (written[0],), like=written[0])
    with pytest.raises(RuntimeError, match=r"^count: a grid of .*: CUDA allows 65535 blocks along y and z$"):
        kernel.prepare({}, (1, 65536), 4, (written[0], 1), like=written[0])


# ---- on a GPU: against a stub driver

STUB = r"""
#include <cstdint>
#include <cstring>
extern "C" {
struct Seen {
  unsigned launches, cooperative, grid[3], block[3], shared, loads;
  int attributes[8][2];
  unsigned n_attributes;
  uint64_t function, stream;
  unsigned char arguments[5][8], image[4];
  char name[32];
};
Seen seen;
int cuModuleLoadData(void** module, const void* image) {
  std::memcpy(seen.image, image, 4);
  ++seen.loads;
  *module = reinterpret_cast<void*>(0x10 * seen.loads);
  return 0;
}
int cuModuleGetFunction(void** function, void* module, const char* name) {
  std::strncpy(seen.name, name, sizeof seen.name - 1);
  *function = reinterpret_cast<void*>(reinterpret_cast<uint64_t>(module) + 1);
  return 0;
}
int cuFuncSetAttribute(void*, int attribute, int value) {
  seen.attributes[seen.n_attributes][0] = attribute;
  seen.attributes[seen.n_attributes++][1] = value;
  return 0;
}
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int threads, size_t shared) {
  *blocks = shared > 100000 ? 1 : 2048 / threads;
  return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** arguments, void**) {
  const unsigned grid[3] = {gx, gy, gz}, block[3] = {bx, by, bz}, bytes[5] = {8, 8, 8, 4, 1};
  std::memcpy(seen.grid, grid, sizeof grid);
  std::memcpy(seen.block, block, sizeof block);
  seen.shared = shared;
  seen.function = reinterpret_cast<uint64_t>(function);
  seen.stream = reinterpret_cast<uint64_t>(stream);
  for (int i = 0; i < 5; ++i) std::memcpy(seen.arguments[i], arguments[i], bytes[i]);
  ++seen.launches;
  return 0;
}
int cuLaunchCooperativeKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                              unsigned bz, unsigned shared, void* stream, void** arguments) {
  ++seen.cooperative;
  return cuLaunchKernel(function, gx, gy, gz, bx, by, bz, shared, stream, arguments, nullptr);
}
}
"""

ON_STUB = r"""
import ctypes, struct, sys, types
from pathlib import Path
import torch
from seqops.core import launch

launch.SOURCES = Path(sys.argv[1])

class Seen(ctypes.Structure):
    _fields_ = [
        ("launches", ctypes.c_uint), ("cooperative", ctypes.c_uint), ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint), ("loads", ctypes.c_uint),
        ("attributes", ctypes.c_int * 2 * 8), ("n_attributes", ctypes.c_uint), ("function", ctypes.c_uint64),
        ("stream", ctypes.c_uint64), ("arguments", ctypes.c_ubyte * 8 * 5), ("image", ctypes.c_ubyte * 4),
        ("name", ctypes.c_char * 32),
    ]

seen = Seen.in_dll(ctypes.CDLL("libcuda.so.1"), "seen")

# What torch would say on a machine with two GPUs.
class State:
    device, capturing, streams, entered, contexts = 0, False, {0: 0xABCD, 1: 0xEF01}, [], []

class OnDevice:
    def __init__(self, index): self.index = index
    def __enter__(self): self.before, State.device = State.device, self.index; State.entered.append(self.index)
    def __exit__(self, *_): State.device = self.before

torch.cuda.current_device = lambda: State.device
torch.cuda.device = OnDevice
torch.cuda.is_current_stream_capturing = lambda: State.capturing
torch.cuda.get_device_capability = lambda index: ((9, 0), (8, 0))[index]
torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(multi_processor_count=132)
torch._C._cuda_getCurrentRawStream = State.streams.__getitem__
launch._make_context_current = State.contexts.append

class Tensor:
    def __init__(self, address, index=0):
        self.address, self.device = address, torch.device("cuda", index)
    def data_ptr(self): return self.address

def attributes(): return [tuple(seen.attributes[i]) for i in range(seen.n_attributes)]
def raised(call):
    try: call()
    except RuntimeError as error: return str(error)
    raise AssertionError("nothing raised")

kernel = launch.Kernel("room/scale.cu", "scale", "PPqf?")
constants = {"THREADS": 64, "FACTOR": 3}
x, y = Tensor(0x7F0000000000), Tensor(0x7F0000001000)

# a cache miss while a graph is captured
State.capturing = True
assert raised(lambda: kernel(constants, 1, 64, (x, y, 1, 0.5, True), like=x)) == (
    "scale: not compiled yet for these constants, which is impossible while a CUDA graph is captured: call once before "
    "capturing")
assert seen.launches == seen.loads == 0
State.capturing = False

# arguments, grid, block, stream
kernel(constants, (132, 2), 64, (x, y, -2**40, 0.5, True), like=x)
assert (seen.launches, seen.cooperative, seen.loads) == (1, 0, 1)
got = [struct.unpack_from(code, bytes(raw))[0] for code, raw in zip("PPqf?", seen.arguments)]
assert got == [0x7F0000000000, 0x7F0000001000, -2**40, 0.5, True], got
assert (*seen.grid, *seen.block, seen.shared, seen.stream) == (132, 2, 1, 64, 1, 1, 0, 0xABCD)
assert bytes(seen.image) == b"\x7fELF" and seen.name == b"scale" and seen.function == 0x11
assert attributes() == [] and State.entered == [] and set(State.contexts) == {0}

# a hit: while capturing too, nothing is loaded again; None is a null pointer
State.capturing = True
kernel(constants, 1, (16, 2, 2), (None, y, 1, 0.5, False), like=x)
assert (seen.launches, seen.loads) == (2, 1) and bytes(seen.arguments[0]) == bytes(8)
assert [*seen.block] == [16, 2, 2]
State.capturing = False

# other constants, another device: loaded there, and launched on that device's stream
kernel({"THREADS": 128, "FACTOR": 3}, 1, 128, (x, y, 1, 0.5, False), like=x)
assert (seen.loads, seen.function, State.entered) == (2, 0x21, [])
kernel(constants, 1, 64, (x, y, 1, 0.5, False), like=Tensor(0, 1))
assert (seen.loads, seen.function, seen.stream, State.entered, State.device) == (3, 0x31, 0xEF01, [1], 0)
kernel(constants, 1, 64, (x, y, 1, 0.5, False), like=x)
assert (seen.loads, seen.function) == (3, 0x11)

# shared memory above 48 KB is asked for once, and again only when it grows
for shared in (1024, 48 << 10, 65536, 65536, 32768, 200000):
    kernel(constants, 1, 64, (x, y, 1, 0.5, False), like=x, shared=shared)
    assert seen.shared == shared
assert attributes() == [(8, 65536), (8, 200000)]

# clusters above 8 too
for cluster in (8, 16, 16):
    kernel(constants, cluster, 64, (x, y, 1, 0.5, False), like=x, cluster=cluster)
assert attributes()[2:] == [(14, 1)]

# cooperative launches: 2048 threads a multiprocessor
before = seen.launches
State.contexts.clear()
assert kernel.resident_blocks(constants, 64, x) == 132 * 32
assert State.contexts  # a thread that has none may ask
assert kernel.resident_blocks(constants, 64, x, cluster=16) == 132 * 32 // 16 * 16
assert kernel.resident_blocks(constants, 1024, x, shared=200000) == 132
kernel(constants, 132 * 32, 64, (x, y, 1, 0.5, False), like=x, cooperative=True)
assert (seen.cooperative, seen.launches) == (1, before + 1)
assert raised(lambda: kernel(constants, (132, 33), 64, (x, y, 1, 0.5, False), like=x, cooperative=True)) == (
    "scale: a cooperative grid of 4356 blocks, and cuda:0 holds 4224 at once")
kernel(constants, 0, 64, (x, y, 1, 0.5, False), like=x, cooperative=True)
assert (seen.cooperative, seen.launches) == (1, before + 1)

# prepared: compiled and loaded at once, then launched with another last argument, on the stream that was current
kernel = launch.Kernel("room/scale.cu", "scale", "PPqqq")
State.capturing = True
assert "call once before capturing" in raised(lambda: kernel.prepare(constants, 3, 64, (x, y, 7, 8), like=x))
State.capturing = False
loads, before = seen.loads, seen.launches
start = kernel.prepare(constants, (3, 2), 64, (x, None, 7, 8), like=x, shared=65536)
assert (seen.loads, seen.launches) == (loads + 1, before) and attributes()[-1] == (8, 65536)
other = kernel.prepare(constants, 1, 64, (y, y, 9, 10), like=x)
State.capturing = True
for i in (1, 200):
    start(i)
    got = [struct.unpack_from(code, bytes(raw))[0] for code, raw in zip("PPqiB", seen.arguments)]
    assert got == [0x7F0000000000, 0, 7, 8, i], got
    assert (*seen.grid, *seen.block, seen.shared, seen.stream) == (3, 2, 1, 64, 1, 1, 65536, 0xABCD)
    other(i + 1)
    got = [struct.unpack_from(code, bytes(raw))[0] for code, raw in zip("PPqiB", seen.arguments)]
    assert got == [0x7F0000001000, 0x7F0000001000, 9, 10, i + 1], got
assert (seen.loads, seen.launches) == (loads + 1, before + 4)
print("all seen")
"""


@needs_nvrtc
@needs_compiler
def test_launch_on_a_stub_driver(sources: Path, tmp_path: Path, run_python: Callable[..., str]) -> None:
    """What reaches the driver: arguments, sizes, stream, attributes; what a captured graph and a second GPU change."""
    command = [launch._compiler(), "-x", "c++", "-", "-O1", "-shared", "-fPIC", "-o", str(tmp_path / "libcuda.so.1")]
    subprocess.run(command, input=STUB, text=True, check=True)
    assert run_python(ON_STUB, str(sources), LD_LIBRARY_PATH=str(tmp_path)) == "all seen\n"


# ---- packaging


def test_a_wheel_carries_the_sources(tmp_path: Path, run_python: Callable[..., str]) -> None:
    """build_py copies csrc into the package, and launch.py finds it there."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(HERE.parent / name, folder / name)
    for name in ("seqops", "csrc"):
        shutil.copytree(HERE.parent / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    build = "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
    run_python(build, "-q", "build_py", "--build-lib", str(tmp_path / "lib"), folder=folder)
    shutil.rmtree(folder)
    file = tmp_path / "lib" / "seqops" / "core" / "launch.py"
    spec = importlib.util.spec_from_file_location("launch_of_the_wheel", file)
    assert spec is not None and spec.loader is not None
    wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheel)
    assert tmp_path / "lib" / "seqops" / "csrc" == wheel.SOURCES
    kernels = [str(path.relative_to(launch.SOURCES)) for path in launch.SOURCES.rglob("*.cu")]
    for source in ("common/simulator.cpp", *kernels):
        assert wheel._with_includes(source) == launch._with_includes(source)
