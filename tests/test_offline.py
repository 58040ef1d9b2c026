"""Triton kernels compiled for four generations of GPUs, without one: nothing spills, and a block fits into each.

`pytest tests/test_offline.py -rA` lists what every kernel takes. Rooms are found by name: whatever `configurations()`
of `seqops/<room>/triton.py` names is compiled. There are 1,000 kernels, and one takes a second, so

    every run     one of each kind (a kernel and its types), for one architecture
    slow          every kernel, for one architecture: a kind has one for each pass and tile size, and meets all four

CUDA kernels, whose constants the tuner chooses, are compiled in test_tiles.py.
"""

import importlib.util
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from seqops.core import launch

ROOT = Path(__file__).parent.parent

# Shared memory a block may ask for, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_90a": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
ARCHITECTURES = list(SHARED)
REGISTERS_A_THREAD, REGISTERS_A_BLOCK = 255, 65536

HAS_TRITON = importlib.util.find_spec("triton") is not None

Configuration = dict[str, Any]


def rooms() -> list[str]:
    return sorted(path.parent.name for path in (ROOT / "seqops").glob("*/triton.py"))


def listed_in(room: str) -> list[Configuration]:
    return import_module(f"seqops.{room}.triton").configurations()


def listed() -> list[Configuration]:
    """The configurations of all rooms, where the compiler is installed."""
    return [each for room in rooms() for each in listed_in(room)]


def by_kind(
    configurations: list[Configuration], kind: Callable[[Configuration], tuple[Any, ...]]
) -> list[list[Configuration]]:
    kinds: dict[tuple[Any, ...], list[Configuration]] = {}
    for configuration in configurations:
        kinds.setdefault(kind(configuration), []).append(configuration)
    return list(kinds.values())


def triton_parameters() -> Iterator[Any]:
    """Configurations, each with an architecture, all but one of a kind marked slow; so are those that say `seldom`."""
    if not HAS_TRITON:
        return
    # Counted in each room, so that its examples do not depend on the other rooms.
    kinds = [numbered for room in rooms() for numbered in enumerate(by_kind(listed_in(room), triton_kind))]
    for i, members in kinds:
        met = set()
        often = [j for j, configuration in enumerate(members) if not configuration.get("seldom")]
        for j, configuration in enumerate(members):
            example = often[i % len(often)] if often else -1  # of a kind that is slow to compile, none
            among = [each for each in ARCHITECTURES if runs_on(configuration, each)]
            # Where there are fewer configurations than architectures, each is compiled for several.
            for turn in range(-(-len(ARCHITECTURES) // len(members))):
                architecture = among[(i + j - example + turn * len(members)) % len(among)]
                # A thousand seconds of compiling: what is left here differs from what runs in constants only.
                marks = () if j == example and turn == 0 else pytest.mark.slow
                met.add(architecture)
                yield parameter(configuration, architecture, marks)
        for architecture in (each for each in ARCHITECTURES if each not in met):  # where few may be chosen there
            configuration = next(each for each in members if runs_on(each, architecture))
            yield parameter(configuration, architecture, pytest.mark.slow)


def parameter(configuration: Configuration, architecture: str, marks: Any) -> Any:
    return pytest.param(configuration, architecture, marks=marks, id=f"{triton_name(configuration)}-{architecture}")


def runs_on(configuration: Configuration, architecture: str) -> bool:
    """Whether the tuner may choose it there."""
    return int(architecture[3:].rstrip("a")) in configuration.get("architectures", [int(architecture[3:].rstrip("a"))])


def described(constants: dict[str, Any]) -> str:
    return ",".join(f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in constants.items())


def local_accesses(cubin: Path) -> list[str]:
    """Instructions that read or write local memory, by the disassembler that comes with Triton, or else with CUDA."""
    tool: Path | str = "cuobjdump"
    if HAS_TRITON:
        tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / tool
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^.*\b(?:LDL|STL)\b.*$", text, re.MULTILINE)


def check(architecture: str, cubin: Path, shared: int, threads: int) -> None:
    """Nothing in local memory; registers and shared memory of a block as the architecture has them."""
    used = launch.resources(cubin)
    print(f"{used['REG']} registers, {shared} bytes of shared memory, {threads} threads")
    # Now and then ptxas reserves a stack of 8 bytes that no instruction touches.
    if used["STACK"] or used["LOCAL"]:
        assert not local_accesses(cubin)
    assert shared <= SHARED[architecture]
    assert used["REG"] <= REGISTERS_A_THREAD
    # Registers are given out to warps, 8 a thread at a time.
    assert -(-used["REG"] // 8) * 8 * -(-threads // 32) * 32 <= REGISTERS_A_BLOCK


def triton_kind(configuration: Configuration) -> tuple[Any, ...]:
    return configuration["kernel"].__name__, *configuration["types"].values()


def triton_name(configuration: Configuration) -> str:
    types = [t for t in configuration["types"].values() if t.startswith("*") and t != "*i64"]
    kernel, constants = configuration["kernel"].__name__, described(configuration["constants"])
    return f"{kernel}[{','.join(t[1:] for t in types)}]{constants}"


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
@pytest.mark.parametrize(("configuration", "architecture"), [*triton_parameters()])
def test_triton(configuration: Configuration, architecture: str, tmp_path: Path) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, types, constants = (configuration[part] for part in ("kernel", "types", "constants"))
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    assert {*types, *constants} == {*signature}
    # A launch tells which arguments are multiples of 16, and accesses widen: half with it, half without.
    # Of kernels that a launcher takes for aligned tensors only, those arguments that it looked at.
    aligned = types if sum(map(ord, described(constants))) % 2 == 0 else ()
    aligned = configuration.get("divisible", aligned)
    divisible = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible)
    target = GPUTarget("cuda", int(architecture[3:].rstrip("a")), 32)
    compiled = triton.compile(source, target=target, options=configuration["options"])
    path = tmp_path / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    check(architecture, path, compiled.metadata.shared, 32 * compiled.metadata.num_warps)


# ---- the lists themselves


def scan_shapes() -> Iterator[tuple[torch.dtype, torch.dtype, tuple[int, ...], tuple[int, ...]]]:
    """Dtypes of x and a, channels, and shape of a: every pair of dtypes, every pattern of gates, several widths."""
    half, single = (torch.bfloat16, torch.float16), (torch.float32, torch.complex64)
    every = (*half, *single, torch.float64, torch.complex128)
    gates = {x: (*half, torch.float32) for x in half} | {x: (*half, *single) for x in single}
    patterns = [((5,), (2, 70, 5)), ((3, 40), (2, 70, 3, 1)), ((3, 9), (1, 70, 1, 9)), ((90,), (2, 1, 1))]
    patterns += [
        ((2, 3, 4), (2, 70, 1, 3, 1)),
        ((2, 3, 4), (2, 1, 2, 1, 4)),
        ((1,), (1, 1, 1)),
        ((3, 2), (2, 70, 1, 2)),
    ]
    for x, (channels, shape) in itertools.product(every, patterns):
        for a in gates.get(x, every):
            yield x, a, channels, shape


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_scan_launch_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the launchers of the scans ask for is what `configurations()` names: constants and types of pointers."""
    scan = import_module("seqops.scan.triton")

    def key(name: str, types: dict[str, str], constants: dict[str, Any]) -> tuple[Any, ...]:
        return name, *sorted(types.items()), *sorted(constants.items())

    known = {
        key(each["kernel"].__name__, {n: t for n, t in each["types"].items() if n[:2] == "p_"}, each["constants"])
        for each in scan.configurations()
    }
    names = {dtype: f"*{name}" for dtype, name in scan.TYPES.items()} | {torch.int64: "*i64"}
    asked = set()

    def record(kernel: Any, like: torch.Tensor, sizes: tuple[int, ...], arguments: dict[str, Any]) -> None:
        assert {*arguments} == {*kernel.arg_names}
        types = {n: names[scan.real_view(v).dtype] for n, v in arguments.items() if isinstance(v, torch.Tensor)}
        constants = {n: v for n, v in arguments.items() if n.isupper() and n not in ("B", "T")}
        asked.add(key(kernel.__name__, types, constants))

    monkeypatch.setattr(scan, "launch", record)
    edges = torch.tensor([0, 3, 3, 70])
    for steps in (0, 32):
        monkeypatch.setattr(scan, "INTERPRETED_TILE", steps)
        for x_dtype, a_dtype, channels, shape in scan_shapes():
            x, a = torch.zeros(2, 70, *channels, dtype=x_dtype), torch.zeros(shape, dtype=a_dtype)
            h, last = scan.linear_scan(x, a)
            scan.linear_scan_backward(h, last, a, h, last)
            scan.linear_scan_backward(None, last, a, h, None, reverse=True)
            h, last = scan.linear_scan(x[:1], a[:1], cu_seqlens=edges)
            scan.linear_scan_backward(h, None, a[:1], None, last, cu_seqlens=edges)
        for v_dtype, s_dtype, (heads, width) in itertools.product(
            scan.TYPES, scan.TYPES, ((1, 1), (3, 5), (8, 64), (70, 1))
        ):
            if s_dtype != torch.float64 or v_dtype == torch.float64:
                s, v = torch.zeros(2, 70, heads, dtype=s_dtype), torch.zeros(2, 70, heads, width, dtype=v_dtype)
                scan.softmax_scan(s[:1], v[:1], cu_seqlens=edges)
                o, lse, m, u = scan.softmax_scan_forward(s, v)
                scan.softmax_scan_backward(o, None, s, v, o, m, u, lse[:, 0], o[:, 0])
                scan.softmax_scan_backward(None, lse, s, v, o, m, u, None, None)
    assert len(asked) > 300
    assert asked <= known


def test_rooms_are_found() -> None:
    """A room with Triton kernels has a list of them, which is not empty, and no entry twice."""
    assert "scan" in rooms()
    names = [(triton_name(each), *each["types"].values()) for each in listed()] if HAS_TRITON else ["none"]
    assert names and len(names) == len({*names})


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
def test_every_architecture_is_met() -> None:
    """Every run compiles for all four, and so does the slow one for each kind of kernel."""
    assert {p.values[1] for p in triton_parameters() if not p.marks} == {*ARCHITECTURES}
    met: dict[Any, set[str]] = {}
    for each in triton_parameters():
        met.setdefault(triton_kind(each.values[0]), set()).add(each.values[1])
    assert all(architectures == {*ARCHITECTURES} for architectures in met.values())
