"""Builds seqops._C: one module for every torch >= 2.10, every Python >= 3.10 and every x86-64 (or Arm) CPU.

Kernel files (csrc/*/*_kernel.cpp) are compiled once per instruction set, each with its own flags. BuildExtension knows
one set of flags an extension, so `build_extension` compiles those objects first and hands them to the link. CXXFLAGS
and LDFLAGS are honoured, e.g. for sanitizers.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "seqops needs an installed torch to build against:\n"
        "    pip install torch==2.13.0\n"
        "    pip install --no-build-isolation -e ."
    )

# Never -ffast-math: NaN and Inf are part of the contract.
FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"]
# GCC takes the undefined operands in its own AVX-512 headers for a mistake of ours.
FLAGS += ["-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
X86 = {"avx2": ["-mavx2", "-mfma", "-mf16c"], "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}
ISAS = {"baseline": [], **(X86 if platform.machine() in ("x86_64", "AMD64") else {})}
TARGET = [("TORCH_TARGET_VERSION", "0x020a000000000000")]  # 2.10; py_limited_api adds Py_LIMITED_API

EXTRA = shlex.split(os.environ.get("CXXFLAGS", ""))
SOURCES = sorted(set(glob("csrc/**/*.cpp", recursive=True)) - set(glob("csrc/*/simulator.cpp")))
KERNELS = [source for source in SOURCES if source.endswith("_kernel.cpp")]


class Build(BuildExtension):
    def build_extension(self, extension):
        for isa, flags in ISAS.items():
            objects = self.compiler.compile(
                KERNELS,
                output_dir=f"{self.build_temp}/{isa}",  # a folder each: same file names, own ninja log
                macros=[("SEQOPS_ISA", isa)],
                depends=extension.depends,
                extra_postargs={"cxx": FLAGS + flags + EXTRA},
            )
            if not any(flag.startswith("-fsanitize") for flag in EXTRA):  # sanitizers add mergeable symbols of theirs
                check_no_shared_code(objects, isa)
            extension.extra_objects += objects
        super().build_extension(extension)


class Sources(build_py):
    """CUDA kernels are compiled at first use (seqops/core/launch.py): a wheel carries their sources as seqops/csrc, and
    those of CPU kernels too, since a stored choice of the tuner holds for one content of them (seqops/core/choose.py).
    """

    def run(self):
        super().run()
        for source, target in self.cuda_sources().items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode=True):
        return [*super().get_outputs(include_bytecode), *map(str, self.cuda_sources().values())]

    def cuda_sources(self):
        if self.editable_mode:  # they are found in the checkout
            return {}
        names = [*glob("csrc/*/*.cu"), *glob("csrc/*/*.h"), *glob("csrc/*/*_kernel.cpp"), "csrc/common/simulator.cpp"]
        return {name: Path(self.build_lib, "seqops", name) for name in names}


def check_no_shared_code(objects, isa):
    """Fail the build when an object carries weak (mergeable) functions: see the note in csrc/common/isa.h."""
    symbols = subprocess.run(["nm", "-C", "--defined-only", *objects], capture_output=True, text=True, check=True)
    weak = [line for line in symbols.stdout.splitlines() if " W " in line or " V " in line or " u " in line]
    if weak:
        raise RuntimeError(f"{isa} objects define functions that the linker may share:\n" + "\n".join(weak))


setup(
    ext_modules=[
        CppExtension(
            "seqops._C",
            [source for source in SOURCES if source not in KERNELS],
            depends=glob("csrc/**/*.h", recursive=True),
            define_macros=TARGET,
            extra_compile_args={"cxx": FLAGS + EXTRA},
            extra_link_args=shlex.split(os.environ.get("LDFLAGS", "")),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build, "build_py": Sources},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
