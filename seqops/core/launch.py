"""Compiling the CUDA C++ in csrc/ at first use, and launching it: on a GPU, or for CPU tensors in the simulator.

One call serves both machines:

    kernel = Kernel("scan/linear_scan.cu", "linear_scan_forward", "PPPqqqf?")
    kernel({"THREADS": 128, "S": "bfloat16"}, grid, block, (x, a, h, B, T, C, 0.5, False), like=x)

Constants become -D, so a tile size or a storage type is compiled in; sizes are arguments, so that a new length never
compiles. A GPU gets a cubin from NVRTC, through CuPy's bindings; CPU tensors, if the environment variable
SEQOPS_SIMULATE is set, a library from the C++ compiler. Both lie in one cache folder (SEQOPS_CACHE, else the user's)
under a key of all that they depend on. Nothing here synchronises, and CuPy is imported at the first launch on a GPU.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Constants = Mapping[str, int | str]
Shape = int | Sequence[int]

# In an installed package the sources lie in it, in a checkout beside it.
_PACKAGE = Path(__file__).parent.parent
SOURCES = _PACKAGE / "csrc" if (_PACKAGE / "csrc").is_dir() else _PACKAGE.parent / "csrc"

# seconds to wait for another process that compiles the same, before compiling too
_PATIENCE = 60
_NO_CUPY = "CuPy is not installed (pip install 'seqops[cuda]')"
_RUNTIME = "common/simulator.cpp"
_DIGEST = hashlib.sha256().digest_size
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]+"([^"]+)"', re.MULTILINE)

# attributes of a function: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES and _NON_PORTABLE_CLUSTER_SIZE_ALLOWED
_MAX_SHARED, _LARGE_CLUSTERS = 8, 14
_SHARED_BY_DEFAULT, _CLUSTER_BY_DEFAULT = 48 << 10, 8

# Blocks that the simulated GPU holds at once: few, so that each block of a persistent kernel has several turns.
_SIMULATED_BLOCKS = 4


class Kernel:
    """One kernel of one source, for every set of constants.

    Args:
        source: path below csrc/, or an absolute one.
        entry: the kernel's name.
        codes: one letter an argument: P a tensor or None (a null pointer), q int64, f float32, ? bool.
    """

    def __init__(self, source: str, entry: str, codes: str) -> None:
        self.source = source
        self.entry = entry
        self._arguments = _Arguments(entry, codes)
        self._pointers = [i for i, code in enumerate(codes) if code == "P"]
        self._functions: dict[tuple[Any, ...], _Function] = {}  # by device and constants
        self._simulated: dict[tuple[Any, ...], Callable[..., bytes | None]] = {}

    def __call__(
        self,
        constants: Constants,
        grid: Shape,
        block: Shape,
        arguments: Sequence[Any],
        like: Tensor,
        shared: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
    ) -> None:
        """Launch on the device of `like`, on torch's current stream there. A grid without blocks launches nothing.

        Args:
            grid, block: up to three sizes.
            shared: bytes of dynamic shared memory a block.
            cluster: blocks along x in a cluster, as compiled in by CLUSTER_KERNEL.
            cooperative: all blocks are resident together, so that they may wait for each other.

        Raises:
            RuntimeError: if the kernel does not compile, has no constants compiled while a CUDA graph is captured, does
                not fit on the device, or fails in the simulator.
        """
        grid, block = _three(grid), _three(block)
        if 0 in grid:
            return
        if grid[1] > 65535 or grid[2] > 65535:
            raise RuntimeError(f"{self.entry}: a grid of {grid}: CUDA allows 65535 blocks along y and z")
        address = self._arguments.pack(self._numbers(arguments))
        device = like.device
        if device.type == "cuda":
            index = device.index
            if index == torch.cuda.current_device():
                self._launch(constants, grid, block, address, index, shared, cluster, cooperative)
            else:
                with torch.cuda.device(index):
                    self._launch(constants, grid, block, address, index, shared, cluster, cooperative)
        elif device.type == "cpu":
            self._simulate(constants, grid, block, address, shared, cluster, cooperative)
        else:
            raise RuntimeError(f"{self.entry}: CUDA kernels run on CUDA tensors, not on {device.type}")

    def prepare(
        self, constants: Constants, grid: Shape, block: Shape, arguments: Sequence[Any], like: Tensor, shared: int = 0
    ) -> Callable[[int], None]:
        """A function that launches with the last argument, an int64, and all others as they are given here.

        For loops of launches: it does again only what differs. It holds for the current device, which is that of
        `like`, and for torch's current stream there; the caller keeps the tensors alive.
        """
        grid, block = _three(grid), _three(block)
        if grid[1] > 65535 or grid[2] > 65535:
            raise RuntimeError(f"{self.entry}: a grid of {grid}: CUDA allows 65535 blocks along y and z")
        packed = _Arguments(self.entry, self._arguments.codes)
        if packed.codes[-1] != "q":
            raise ValueError(f"{self.entry}: argument codes: expected q at the end, got {packed.codes!r}")
        address = packed.pack([*self._numbers(arguments), 0])
        last, buffer, offset = struct.Struct("q").pack_into, packed.buffer, packed.format.size - 8
        if like.device.type == "cpu":

            def simulate(value: int, _alive: _Arguments = packed) -> None:
                last(buffer, offset, value)
                self._simulate(constants, grid, block, address, shared, 1, False)

            return simulate
        index = like.device.index
        _make_context_current(index)
        handle = self._function(constants, index, shared, 1).handle
        start, stream = _driver().launchKernel, torch._C._cuda_getCurrentRawStream(index)

        def launch(value: int, _alive: _Arguments = packed) -> None:
            last(buffer, offset, value)
            start(handle, *grid, *block, shared, stream, address, 0)

        return launch

    def resident_blocks(
        self, constants: Constants, block: Shape, like: Tensor, shared: int = 0, cluster: int = 1
    ) -> int:
        """How many blocks the device holds at once: the limit of a cooperative grid, a multiple of `cluster`."""
        if like.device.type != "cuda":
            return max(_SIMULATED_BLOCKS // cluster, 1) * cluster
        index = like.device.index
        with torch.cuda.device(index):
            _make_context_current(index)
            function = self._function(constants, index, shared, cluster)
            return function.resident_blocks(_three(block), shared) // cluster * cluster

    def _numbers(self, arguments: Sequence[Any]) -> list[Any]:
        """Tensors by their addresses."""
        values = list(arguments)
        for i in self._pointers:
            if i < len(values):
                values[i] = 0 if values[i] is None else values[i].data_ptr()
        return values

    def _launch(
        self,
        constants: Constants,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        address: int,
        index: int,
        shared: int,
        cluster: int,
        cooperative: bool,
    ) -> None:
        """Queue the kernel; `index` is the current device."""
        _make_context_current(index)
        driver = _driver()
        function = self._function(constants, index, shared, cluster)
        stream = torch._C._cuda_getCurrentRawStream(index)
        if not cooperative:
            driver.launchKernel(function.handle, *grid, *block, shared, stream, address, 0)
            return
        blocks = grid[0] * grid[1] * grid[2]
        limit = function.resident_blocks(block, shared) // cluster * cluster
        if blocks > limit:
            raise RuntimeError(
                f"{self.entry}: a cooperative grid of {blocks} blocks, and cuda:{index} holds {limit} at once"
            )
        driver.launchCooperativeKernel(function.handle, *grid, *block, shared, stream, address)

    def _function(self, constants: Constants, index: int, shared: int, cluster: int) -> _Function:
        key = (index, *constants.items())
        function = self._functions.get(key)
        if function is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{self.entry}: not compiled yet for these constants, which is impossible while a CUDA graph is "
                    "captured: call once before capturing"
                )
            function = self._functions[key] = _load(self.source, self.entry, constants, index)
        function.allow(shared, cluster)
        return function

    def _simulate(
        self,
        constants: Constants,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        address: int,
        shared: int,
        cluster: int,
        cooperative: bool,
    ) -> None:
        reason = reason_not_simulated()
        if reason is not None:
            raise RuntimeError(f"{self.entry}: on CPU tensors a CUDA kernel needs the simulator: {reason}")
        key = tuple(constants.items())
        entry = self._simulated.get(key)
        if entry is None:
            entry = _open(compile_simulated(self.source, constants), self.entry, self.source)
            self._simulated[key] = entry
        shape = (ctypes.c_uint * 7)(*grid, *block, cluster)
        error = entry(shape, shared, cooperative, int(os.environ["SEQOPS_SIMULATE"]) - 1, address)
        if error:
            raise RuntimeError(f"{self.entry}: {error.decode()}")


def reason_missing() -> str | None:
    """Why no CUDA kernel can be launched on this machine, or None where it can."""
    if importlib.util.find_spec("cupy_backends") is None:
        return _NO_CUPY
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    return _reason_without_nvrtc()


def reason_not_compiled() -> str | None:
    """Why no CUDA kernel can be compiled on this machine, with a GPU or without, or None where it can."""
    return _NO_CUPY if importlib.util.find_spec("cupy_backends") is None else _reason_without_nvrtc()


def reason_not_simulated() -> str | None:
    """Why CUDA kernels do not run on CPU tensors, or None where they do."""
    value = os.environ.get("SEQOPS_SIMULATE", "")
    if value in ("", "0"):
        return "the environment variable SEQOPS_SIMULATE is not set (to 1; to 2, 3, ... for other schedules)"
    if not value.isdecimal():
        return f"SEQOPS_SIMULATE is {value!r}, and should be a number: the schedule's seed plus one"
    return _reason_without_compiler()


@cache
def _reason_without_nvrtc() -> str | None:
    try:
        _nvrtc().getVersion()
    except Exception as error:  # CuPy raises several kinds, by what is missing
        return f"NVRTC does not load ({str(error).splitlines()[0]})"
    return None


@cache
def _reason_without_compiler() -> str | None:
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"the simulator runs on x86-64, not on {platform.machine()}"
    if shutil.which(_compiler()) is None:
        return f"no C++ compiler: {_compiler()} is not on the PATH"
    return None


# ---- compiling


def compile_offline(source: str, constants: Constants, arch: str) -> Path:
    """Path of the cubin in the cache, compiled unless it is there. Needs CuPy and NVRTC, no GPU and no driver.

    Args:
        source: path below csrc/, or an absolute one.
        arch: "sm_80", "sm_90a", ...
    """
    nvrtc = _nvrtc()
    files = _with_includes(source)
    options = [f"-arch={arch}", "-std=c++20", "--device-as-default-execution-space", *_defines(constants)]

    def build() -> bytes:
        headers = [name for name in files if name != source]
        texts, names = [files[name].encode() for name in headers], [name.encode() for name in headers]
        program = nvrtc.createProgram(files[source], source, texts, names)
        try:
            nvrtc.compileProgram(program, tuple(options))
            return _whole_cubin(nvrtc.getCUBIN(program))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program).strip()
            raise RuntimeError(f"{source} does not compile for {arch} with {dict(constants)}:\n{log}") from error
        finally:
            nvrtc.destroyProgram(program)

    return _cached(Path(source).stem, ".cubin", [*_listed(files), *options, f"NVRTC {nvrtc.getVersion()}"], build)


def compile_simulated(source: str, constants: Constants) -> Path:
    """Path of the library that simulates a source, compiled unless it is in the cache.

    The compiler is CXX, else g++, with our flags and CXXFLAGS.
    """
    runtime = _compile_runtime()
    files = _with_includes(source)
    options = [*_flags(), "-DSIMULATE", "-Wno-unknown-pragmas", *_defines(constants)]

    def build() -> bytes:
        # The library names the runtime and looks for it in its own folder.
        files = ["-x", "c++", str(SOURCES / source), "-x", "none", str(runtime), "-Wl,-rpath,$ORIGIN"]
        return _compile([*options, *files], f"{source} does not compile for the simulator with {dict(constants)}")

    return _cached(Path(source).stem, ".so", [*_listed(files), *options, runtime.name, _compiler_version()], build)


def _compile_runtime() -> Path:
    """The simulator itself, a library of its own: its half of the work is compiled once."""
    options = _flags()
    parts = [*_listed(_with_includes(_RUNTIME)), *options, _compiler_version()]
    name = f"simulator-{_key(parts)}.so"

    def build() -> bytes:
        return _compile([*options, str(SOURCES / _RUNTIME), f"-Wl,-soname,{name}"], "the simulator does not compile")

    return _cached("simulator", ".so", parts, build)


def _flags() -> list[str]:
    given = shlex.split(os.environ.get("CXXFLAGS", ""))
    return ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *given]


def _compiler() -> str:
    return os.environ.get("CXX", "g++")


def _compiler_version() -> str:
    return _version_of(_compiler())


@cache
def _version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _compile(options: Sequence[str], what: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "library.so"
        command = [_compiler(), f"-I{SOURCES}", *options, "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{what}:\n{done.stderr.strip()}")
        return target.read_bytes()


def _defines(constants: Constants) -> list[str]:
    return [f"-D{name}={int(v) if isinstance(v, bool) else v}" for name, v in sorted(constants.items())]


def _with_includes(source: str) -> dict[str, str]:
    """Text of a source and of every header of ours that it may include, by path below csrc/."""
    files: dict[str, str] = {}
    wanted = [source]
    while wanted:
        name = wanted.pop()
        if name not in files:
            files[name] = (SOURCES / name).read_text("utf-8")
            wanted += INCLUDE.findall(files[name])
    return files


def _listed(files: Mapping[str, str]) -> list[str]:
    return [part for name in sorted(files) for part in (name, files[name])]


def _whole_cubin(cubin: bytes) -> bytes:
    """CuPy 14 drops a cubin's last byte, taking it for a terminator: pad to the length that the ELF header gives."""
    program_table, section_table = struct.unpack_from("<QQ", cubin, 32)
    program_size, programs, section_size, sections = struct.unpack_from("<HHHH", cubin, 54)
    length = max(program_table + program_size * programs, section_table + section_size * sections)
    return cubin.ljust(length, b"\0")


# ---- the cache: each file is an ELF file with its SHA-256 behind it, which ELF readers ignore


def cache_folder() -> Path:
    """SEQOPS_CACHE, else `seqops` in the user's cache folder."""
    chosen = os.environ.get("SEQOPS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqops"


def _key(parts: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _cached(stem: str, suffix: str, parts: Sequence[str], build: Callable[[], bytes]) -> Path:
    """Path of the file with the key of `parts`, built unless it is there and whole.

    Several processes that want the same file wait for the one that builds it, but not longer than a minute: whoever
    builds writes the whole file under another name first.
    """
    from filelock import FileLock, Timeout

    path = cache_folder().absolute() / f"{stem}-{_key(parts)}{suffix}"
    if _content(path) is not None:
        return path
    if path.exists():
        warnings.warn(f"{path} is damaged: compiled again", RuntimeWarning, stacklevel=2)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f"{path.name}.lock")
        try:
            with FileLock(lock, timeout=_PATIENCE):
                if _content(path) is None:
                    _write(path, build())
        except Timeout:
            _write(path, build())
        finally:
            lock.unlink(missing_ok=True)  # whoever still waits at the old one finds the file built
    except OSError as error:
        raise RuntimeError(f"the cache of compiled kernels, {path.parent}: {error}; SEQOPS_CACHE chooses it") from error
    return path


def _write(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent)  # on the same file system, so that replacing is atomic
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _content(path: Path) -> bytes | None:
    """What a file of the cache holds, or None if there is none or it is damaged."""
    try:
        whole = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    content, digest = whole[:-_DIGEST], whole[-_DIGEST:]
    return content if hashlib.sha256(content).digest() == digest else None


# ---- arguments


class _Arguments(threading.local):
    """A kernel's arguments, and an array of pointers to them as cuLaunchKernel takes it: one buffer for each thread."""

    def __init__(self, entry: str, codes: str) -> None:
        if not codes or set(codes) - set("Pqf?"):
            raise ValueError(f"{entry}: argument codes: expected letters of P, q, f and ?, got {codes!r}")
        self.entry = entry
        self.codes = codes
        self.format = struct.Struct(codes)
        self.buffer = ctypes.create_string_buffer(self.format.size)
        pointers, offset = [], 0
        for code in codes:
            size = struct.calcsize(code)
            offset = (offset + size - 1) // size * size  # natural alignment, as struct lays it out
            pointers.append(ctypes.addressof(self.buffer) + offset)
            offset += size
        self.pointers = (ctypes.c_void_p * len(pointers))(*pointers)
        self.address = ctypes.addressof(self.pointers)

    def pack(self, values: Sequence[Any]) -> int:
        try:
            self.format.pack_into(self.buffer, 0, *values)
        except struct.error as error:
            raise TypeError(f"{self.entry}: arguments {self.codes!r}: {error}") from error
        return self.address


def _three(shape: Shape) -> tuple[int, int, int]:
    if isinstance(shape, int):
        return shape, 1, 1
    x, y, z, *rest = *shape, 1, 1
    if any(size != 1 for size in rest):
        raise ValueError(f"grid or block: expected up to three sizes, got {tuple(shape)}")
    return x, y, z


# ---- the GPU


class _Function:
    """A loaded kernel on one device."""

    def __init__(self, handle: int, index: int) -> None:
        self.handle = handle
        self._index = index
        self._shared = _SHARED_BY_DEFAULT
        self._cluster = _CLUSTER_BY_DEFAULT
        self._resident: dict[tuple[int, int], int] = {}

    def allow(self, shared: int, cluster: int) -> None:
        """Larger shared memory and clusters have to be asked for, once."""
        if shared > self._shared:
            _driver().funcSetAttribute(self.handle, _MAX_SHARED, shared)
            self._shared = shared
        if cluster > self._cluster:
            _driver().funcSetAttribute(self.handle, _LARGE_CLUSTERS, 1)
            self._cluster = cluster

    def resident_blocks(self, block: tuple[int, int, int], shared: int) -> int:
        threads = block[0] * block[1] * block[2]
        if (threads, shared) not in self._resident:
            each = _driver().occupancyMaxActiveBlocksPerMultiprocessor(self.handle, threads, shared)
            processors = torch.cuda.get_device_properties(self._index).multi_processor_count
            self._resident[threads, shared] = each * processors
        return self._resident[threads, shared]


def _load(source: str, entry: str, constants: Constants, index: int) -> _Function:
    """Compile for the current device, which is `index`, and load. The module lives as long as the process."""
    path = compile_offline(source, constants, architecture(torch.cuda.get_device_capability(index)))
    driver = _driver()
    return _Function(driver.moduleGetFunction(driver.moduleLoadData(path.read_bytes()), entry), index)


def architecture(capability: tuple[int, int]) -> str:
    """The one to compile for: the device's own where NVRTC knows it, else the closest earlier one that runs there.

    Hopper's own instructions (wgmma, setmaxnreg) need sm_90a, which runs on Hopper only.
    """
    major, minor = capability
    if capability == (9, 0):
        return "sm_90a"
    known = [arch for arch in _nvrtc().getSupportedArchs() if arch // 10 == major and arch <= major * 10 + minor]
    if not known:
        raise RuntimeError(f"NVRTC {_nvrtc().getVersion()} does not compile for compute capability {major}.{minor}")
    return f"sm_{max(known)}"


_thread = threading.local()


def _make_context_current(index: int) -> None:
    """A thread that has not used CUDA yet has no context; torch makes it current only where it calls the runtime."""
    if not getattr(_thread, "has_context", False):
        reason = reason_missing()
        if reason is not None:
            raise RuntimeError(f"CUDA kernels cannot be launched here: {reason}")
        from cupy_backends.cuda.api import runtime

        runtime.setDevice(index)
        _thread.has_context = True


@cache
def _driver() -> Any:
    from cupy_backends.cuda.api import driver

    return driver


@cache
def _nvrtc() -> Any:
    from cupy_backends.cuda.libs import nvrtc

    return nvrtc


# ---- the simulator


def _open(path: Path, entry: str, source: str) -> Callable[..., bytes | None]:
    try:
        function = ctypes.CDLL(str(path))[f"simulate_{entry}"]
    except AttributeError as error:
        raise RuntimeError(f"{source} has no line EXPORT({entry}), which the simulator needs") from error
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p]
    return function


# ---- what a cubin uses


def resources(path: Path) -> dict[str, int]:
    """REG (registers a thread), STACK, SHARED (static) and LOCAL bytes: the most that any kernel in the cubin uses.

    Needs cuobjdump: of a CUDA toolkit or of the triton package.
    """
    done = subprocess.run([_cuobjdump(), "-res-usage", str(path)], capture_output=True, text=True, check=True)
    found: dict[str, int] = {}
    for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout):
        found[name] = max(found.get(name, 0), int(value))
    if not found:
        raise RuntimeError(f"cuobjdump finds no kernel in {path}: {done.stdout}{done.stderr}")
    return found


@cache
def _cuobjdump() -> str:
    places = [shutil.which("cuobjdump") or "", os.path.join(os.environ.get("CUDA_HOME", ""), "bin", "cuobjdump")]
    places += [os.path.join(folder, "triton", "backends", "nvidia", "bin", "cuobjdump") for folder in sys.path]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    raise RuntimeError("cuobjdump is neither on the PATH nor in CUDA_HOME nor in the triton package")
