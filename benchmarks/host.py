"""The machine and the versions that a figure was measured on: figures without them mean nothing."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# The instruction sets that onnxruntime's quantized CPU kernels pick between.
KERNEL_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_tile",
    "asimd", "asimddp", "i8mm", "sve", "bf16",
)  # fmt: skip
PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "tokenizers",
    "torch",
    "transformers",
    "optimum",
    "onnx",
)


def host_facts(threads: int | None = None, provider: str | None = None) -> dict[str, Any]:
    """Versions, processor, kernel instruction sets, cores, memory and commit, ready for JSON.

    threads and provider: what the measured session used, when the caller knows.
    """
    cpu = read_cpuinfo()
    return {
        "gemini_edge": _version("gemini-edge"),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu["model"],
        "instructions": cpu["flags"],
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": threads,
        "provider": provider,
        "own_kernels": own_kernels(),
        "gpu": gpu_name() if provider == "cuda" else None,
        "memory_gib": _memory_gib(),
        "commit": source_commit(),
    }


def read_cpuinfo(path: str | Path = "/proc/cpuinfo") -> dict[str, Any]:
    """Processor name and the kernel flags it has; x86 and Arm spell the same keys differently."""
    fields: dict[str, str] = {}
    try:
        for line in Path(path).read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        pass  # not Linux
    flags = set((fields.get("flags") or fields.get("features") or "").split())
    model = fields.get("model name") or fields.get("hardware") or platform.processor() or "unknown"
    return {"model": model, "flags": [flag for flag in KERNEL_FLAGS if flag in flags]}


def own_kernels() -> str | None:
    """What becomes of the runtime's own kernels here (`kernels.state`); None without onnxruntime."""
    try:
        from gemini.runtime import kernels
    except (ImportError, AttributeError):  # two wheels in one folder can leave an empty package
        return None
    return kernels.state()


def gpu_name() -> str | None:
    """The first GPU and its driver, as nvidia-smi calls them; None where there is no such program."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    name, _, driver = found.strip().partition(", ")
    return f"{name} (driver {driver})" if driver else name or None


def source_commit(root: Path | None = None) -> str | None:
    """Short commit of the source tree, "+changes" if it is dirty; None for an installed package."""
    root = root or Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
