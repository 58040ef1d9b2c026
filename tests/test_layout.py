"""Who may import whom: rooms do not know each other, references know torch only, and so on down the table."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "seqops"
ROOMS = sorted({path.parent.name for path in PACKAGE.glob("*/reference*.py")})
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def allowed(file: str) -> set[str]:
    """The modules that `file` may import from, apart from the standard library; a package stands for all below it."""
    folder, _, name = file.rpartition("/")
    if folder in ROOMS:
        mine = f"seqops.{folder}"
        # A file that serves one operator carries its name: what `op.py` may import, `op_conv_ssm.py` may import, and
        # what `triton_kernels.py` may, `triton_kernels_range_attention_backward.py`.
        kind, operator = name, next((op for op in operators() if re.search(rf"_{op}(_[a-z]+)?\.py$", name)), None)
        if operator is not None:
            kind = re.sub(rf"_{operator}(_[a-z]+)?\.py$", ".py", name)
        packages = {
            "reference.py": {"torch"},
            "op.py": {"torch", "seqops.core", f"{mine}.cells", f"{mine}.reference", f"{mine}.ranges"},
            # Patterns as ranges: what operators made of one kernel hand to it.
            "ranges.py": {"torch"},
            "triton.py": {"torch", "seqops.core", "triton", f"{mine}.tiles"}
            | {f"{mine}.triton_kernels", f"{mine}.triton_blocks", f"{mine}.triton_window"}
            | {f"{mine}.triton_walks", f"{mine}.triton_configurations"}
            | {f"{mine}.triton_tiles", f"{mine}.entries", f"{mine}.cells"},
            "triton_tiles.py": {"seqops.tune.csp", f"{mine}.cells"},
            # Kernels too long for one file: what is compiled, and the functions that they are made of.
            "triton_kernels.py": {"triton", f"{mine}.triton_blocks"},
            "triton_blocks.py": {"triton", f"{mine}.tiles"},
            "triton_window.py": {"triton", f"{mine}.triton_blocks"},
            # Launchers too long for one file: one launch, and what can be launched.
            "triton_walks.py": {"torch", "triton", f"{mine}.tiles"}
            | {f"{mine}.triton_kernels", f"{mine}.triton_blocks", f"{mine}.triton_window"},
            "triton_configurations.py": {"torch", f"{mine}.tiles", f"{mine}.triton_walks"}
            | {f"{mine}.triton_kernels", f"{mine}.triton_blocks", f"{mine}.triton_window"},
            "cuda.py": {"torch", "seqops.core", "cupy", "cupy_backends", "cuda", f"{mine}.tiles"}
            | {f"{mine}.cuda_tiles", f"{mine}.cuda_alternating", f"{mine}.entries", f"{mine}.cells"},
            # What several of them share.
            "entries.py": {"torch"},
            "cells.py": set(),
            # What of it is a subject of its own: the tuner's problem, and what serves where no kernel fits.
            "cuda_tiles.py": {"seqops.tune.csp", f"{mine}.cells"},
            "cuda_alternating.py": {"torch", "seqops.core", f"{mine}.cells"},
            # What the C++ kernels ask, and what can be tuned.
            "cpu.py": {"torch", "seqops.core", "seqops._C", f"{mine}.tiles"},
            "tune.py": {"torch", "seqops.core", "seqops.tune.target", mine},
            "tiles.py": {"seqops.tune.csp", f"{mine}.cells"},
            # How the kernels of several operators are tried.
            "tune_examples.py": {"torch", "seqops.core", "seqops.tune.target"},
            # What is made of torch's operators and ours, for several backends.
            "composed.py": {"torch", "seqops.core", f"{mine}.ranges"},
            "__init__.py": {"seqops.core", mine},
        }
        own = set() if operator is None else {f"{mine}.{kind.removesuffix('.py')}"}
        return packages[kind] | own | {f"{mine}.{each.stem}" for each in beside(file, kind)}
    if file == "core/launch.py":  # CuPy's bindings and torch's own file locks, when a kernel is first compiled
        return {"torch", "seqops.core", "cupy_backends", "cuda", "filelock"}
    if file == "core/choose.py":  # the tuner, when a kernel asks for its constants
        return {"torch", "seqops.core", "seqops.tune"}
    if folder == "core":
        return {"torch", "seqops.core"}
    if folder == "tune/csp":
        return {"seqops.tune.csp"}
    if folder == "tune":
        mine = {"seqops.tune", "seqops.core", "seqops._C", "seqops.__version__"}
        return mine | {"torch", "click", "rich", "cupy_backends", "filelock"}
    if folder == "nn":
        return {"torch", "seqops.nn", *public_operators()}
    if file == "__init__.py":
        return {"torch", "seqops"}
    return {"torch", "seqops", "click", "rich", "matplotlib"}


def operators() -> list[str]:
    """The names of the operators that files are called after."""
    return sorted(name.rpartition(".")[2] for name in public_operators())


def beside(file: str, kind: str) -> Iterator[Path]:
    """Files of one operator in the same room that this one may import: those of a kind that it builds on."""
    below = {
        "__init__.py": (),
        "op.py": ("composed", "op"),
        "cuda.py": ("composed", "cuda", "tiles"),
        "triton.py": ("composed", "triton", "triton_kernels", "triton_configurations", "tiles"),
        "triton_kernels.py": ("triton_blocks",),
        "triton_configurations.py": ("triton", "triton_kernels", "tiles"),
        "tune.py": ("op", "reference", "tiles", "triton", "tune"),
    }
    room = (PACKAGE / file).parent
    for prefix in below.get(kind, ()):
        yield from (path for op in operators() for path in room.glob(f"{prefix}_{op}*.py"))


def public_operators() -> set[str]:
    """What `seqops/__init__.py` takes from the rooms: modules take it there too, since it imports them in turn."""
    rooms = tuple(f"seqops.{room}." for room in ROOMS)
    return {name for name in imports(PACKAGE / "__init__.py") if name.startswith(rooms)}


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names of everything imported anywhere in the file, local imports included."""
    package = ["seqops", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def permitted(name: str, packages: set[str]) -> bool:
    if name.split(".")[0] in sys.stdlib_module_names:
        return True
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("file", FILES)
def test_imports(file: str) -> None:
    packages = allowed(file)
    refused = sorted({name for name in imports(PACKAGE / file) if not permitted(name, packages)})
    assert not refused, f"{file} imports {refused}, and may import {sorted(packages)}"


def test_rooms_are_found() -> None:
    assert "rnn" in ROOMS
    assert {"__init__.py", "rnn/op.py", "rnn/reference.py", "core/backend.py", "nn/__init__.py"} <= {*FILES}
    assert {"scan/op.py", "scan/reference.py", "scan/triton.py", "scan/cuda.py", "scan/tiles.py"} <= {*FILES}


def test_compilers_are_imported_late() -> None:
    """`import seqops` needs torch alone: what imports Triton or CuPy at its top is itself imported by nothing else."""
    late = ("triton", "cupy", "cupy_backends", "cuda", "filelock")
    for file in FILES:
        if file.rpartition("/")[2].startswith(("triton", "cuda", "tune")):
            continue  # found by name, when asked for
        tree = ast.parse((PACKAGE / file).read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
        names |= {f"{node.module or ''}" for node in top if isinstance(node, ast.ImportFrom)}
        names |= {alias.name for node in top if isinstance(node, ast.ImportFrom) and node.level for alias in node.names}
        assert not {name for name in names if name.split(".")[0] in late}, file


def test_kernel_sources_include_only_ours() -> None:
    """Device sources and the headers of their room reach `common/gpu.h` alone, or a compiler at first use would need a
    toolkit."""
    for path in (ROOT / "csrc").rglob("*.cu"):
        seen, reached = {'"common/gpu.h"'}, included(path)
        while new := {name for name in reached if name.startswith(f'"{path.parent.name}/')} - seen:
            seen |= new
            reached |= {name for header in new for name in included(ROOT / "csrc" / header.strip('"'))}
        assert '"common/gpu.h"' in reached <= seen, path


def included(path: Path) -> set[str]:
    return {line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include")}


def test_kernels_use_no_standard_library_templates() -> None:
    """A weak symbol compiled for one instruction set could become the copy that every set runs."""
    kernels = [*(ROOT / "csrc").glob("*/*_kernel.cpp")]
    assert kernels
    for path in kernels:
        assert {header for header in included(path) if header[0] == "<"} <= {
            "<cmath>",
            "<cstdint>",
            "<cstddef>",
            "<cstring>",
        }, path
