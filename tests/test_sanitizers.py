"""The extension built with AddressSanitizer and UndefinedBehaviorSanitizer, running the cases marked `sanitize`."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import seqops  # noqa: F401  torch.ops.seqops

ROOT = Path(__file__).parent.parent
# Without optimisation the build takes half as long as with a little, and these cases run in seconds all the same.
FLAGS = "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"
BUILD = "import runpy; runpy.run_path('setup.py', run_name='__main__')"
# The kernels of other instruction sets do not run here, and are compiled three times as fast without the checks.
COMPILER = """#!/bin/sh
case "$*" in
  *SEQOPS_ISA={isa}*) ;;
  *SEQOPS_ISA=*) set -- "$@" -fno-sanitize=all ;;
esac
exec {compiler} "$@"
"""
# Not captured (-s): a sanitizer ends the process as soon as it has spoken.
CHECK = """
import sys, pytest, torch, seqops
print(seqops.__file__, torch.ops.seqops.cpu_isa(), flush=True)
sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *sys.argv[1:]]))
"""


def runtime(compiler: str, library: str) -> str:
    command = [compiler, f"-print-file-name={library}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.slow  # compiling everything anew takes three minutes
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' runtime is preloaded the Linux way")
def test_no_access_out_of_bounds_and_no_undefined_behaviour(run_python: Callable[..., str], tmp_path: Path) -> None:
    compiler = os.environ.get("CXX", "g++")
    isa = "baseline" if torch.ops.seqops.cpu_isa() == "baseline" else "avx2"
    wrapper = tmp_path / "compiler"
    wrapper.write_text(COMPILER.format(isa=isa, compiler=compiler))
    wrapper.chmod(0o755)
    folders = ["--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "objects")]
    environment = {"CXX": str(wrapper), "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS, "MAX_JOBS": "2"}
    run_python(BUILD, "build_ext", *folders, **environment)
    [extension] = (tmp_path / "seqops").glob("_C*.so")
    assert b"__asan_report" in extension.read_bytes() and b"__ubsan_handle" in extension.read_bytes()
    shutil.copytree(ROOT / "seqops", tmp_path / "seqops", ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True)
    output = run_python(
        CHECK,
        *("-o", f"pythonpath={tmp_path}", "-m", "sanitize", "-k", "values_and_gradients or number_of_threads"),
        *(str(ROOT / "tests" / name) for name in ("test_rnn.py", "test_scan.py", "test_fft_conv.py")),
        folder=tmp_path,
        PYTHONPATH=str(tmp_path),
        LD_PRELOAD=f"{runtime(compiler, 'libasan.so')} {runtime(compiler, 'libstdc++.so')}",
        # Python and torch leave memory to the end of the process.
        ASAN_OPTIONS="detect_leaks=0",
        UBSAN_OPTIONS="print_stacktrace=1",
        SEQOPS_CPU_ISA=isa,
    )
    assert output.startswith(f"{tmp_path / 'seqops' / '__init__.py'} {isa}\n") and " passed" in output
