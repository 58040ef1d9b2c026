"""What `seqops info` reports: versions, devices, and which backends serve which operator here, with reasons.

`collect` returns plain dictionaries, lists and strings, ready for `json.dumps`; the command line draws them.
"""

import importlib.metadata
import os
import platform
import re

import torch

from seqops.core import backend, launch

# Distributions looked up by name and never imported: CuPy alone takes a second, and `import seqops` loads neither.
_OPTIONAL = {
    "triton": ("triton",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "nvrtc": ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"),
}

_ENVIRONMENT = ("SEQOPS_BACKEND", "SEQOPS_SIMULATE", "SEQOPS_CACHE", "SEQOPS_CPU_ISA", "TRITON_INTERPRET")


def collect(version: str) -> dict[str, dict]:
    """Gather everything that a bug report about speed or a missing backend needs.

    Args:
        version: of seqops, which the caller knows; the metadata of an editable install can be older than the code.

    Returns:
        `versions`: package -> version, or None where it is not installed; `cpu`: model, cores, instruction_set,
        threads, parallel_backend; `gpus`: device -> name, compute_capability, memory_gib; `gpu_kernels`: `launch`
        and `simulator` with None where CUDA kernels work that way, else the reason they do not, and `interpreter`,
        whether Triton's is on; `cache`: folder, files and bytes of compiled kernels; `environment`: the variables that
        are set, of those that change what runs; `operators`: operator -> backend -> None where it works, else the
        reason it does not.
    """
    return {
        "versions": _versions(version),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "instruction_set": torch.ops.seqops.cpu_isa(),
            "threads": torch.get_num_threads(),
            "parallel_backend": parallel_backend(),
        },
        "gpus": _gpus(),
        "gpu_kernels": {
            "launch": launch.reason_missing(),
            "simulator": launch.reason_not_simulated(),
            "interpreter": os.environ.get("TRITON_INTERPRET") == "1",
        },
        "cache": _cache(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "operators": backend.table(),
    }


def _versions(seqops_version: str) -> dict[str, str | None]:
    found = {"seqops": seqops_version, "python": platform.python_version(), "torch": torch.__version__}
    for package, distributions in _OPTIONAL.items():
        found[package] = next(filter(None, map(_version, distributions)), None)
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name, as its maker writes it where the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            named = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.MULTILINE)
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def parallel_backend() -> str:
    """What torch's threads come from: OpenMP, or a pool."""
    named = re.search(r"ATen parallel backend: (.+)", torch.__config__.parallel_info())
    return named[1].strip() if named else "unknown"


def _cache() -> dict[str, str | int]:
    """The folder of compiled kernels, which need not exist yet, and what lies in it."""
    folder = launch.cache_folder()
    sizes = [path.stat().st_size for path in folder.glob("*.*") if path.suffix in (".cubin", ".so")]
    return {"folder": str(folder), "files": len(sizes), "bytes": sum(sizes)}


def _gpus() -> dict[str, dict]:
    devices = {}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices[f"cuda:{index}"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
        }
    return devices
