"""Memory, disk and the machine's read bandwidth: the ceilings a latency is read against."""

import sys
import threading
import time
from pathlib import Path

import numpy as np

from gemini.runtime.threads import cgroup_figures


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, MB (10^6 bytes)."""
    kilobytes = _fields(Path("/proc/self/status")).get("VmHWM:")
    if kilobytes is not None:
        return kilobytes * 1024 / 1e6
    import resource  # not on Windows; ru_maxrss also counts what was resident before exec, so it comes second

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


def available_memory(root: str | Path = "/") -> float | None:
    """Bytes that a process may still take without others being swapped out; None if the system does not say.

    What the kernel calls available, or less where a cgroup or one of its parents allows less. Cached files of
    a cgroup do not count as taken. Sources: proc(5); Linux kernel documentation, cgroup-v2.rst (memory.max).
    ``root`` is for tests, as that of `gemini.runtime.threads.cpu_quota`.
    """
    figures = cgroup_figures(root, "memory", _spare_v2, _spare_v1)
    available = _fields(Path(root) / "proc/meminfo").get("MemAvailable:")
    if available is not None:
        figures.append(1024.0 * available)
    return min(figures, default=None)


def _spare_v2(folder: Path) -> float | None:
    return _spare(folder, "memory.max", "memory.current", "inactive_file")


def _spare_v1(folder: Path) -> float | None:
    return _spare(folder, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _spare(folder: Path, limit: str, current: str, cached: str) -> float | None:
    """A group's limit less what it holds; None without a limit ("max", or a file that cannot be read)."""
    try:
        most, held = (int((folder / name).read_text()) for name in (limit, current))
    except (OSError, ValueError):
        return None
    return max(0.0, float(most - held + _fields(folder / "memory.stat").get(cached, 0)))


def _fields(path: Path) -> dict[str, int]:
    """Lines of a name and a number, whatever follows them."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdigit()}


def last_level_cache() -> int:
    """Bytes of the processor's largest cache; 0 where the system does not say."""
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=0)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files below the folder (or of the one file)."""
    path = Path(folder)
    files = [path] if path.is_file() else [item for item in path.rglob("*") if item.is_file()]
    return sum(item.stat().st_size for item in files)


def read_bandwidth(working_set: int = 86_000_000, threads: int = 2, rounds: int = 7) -> float:
    """Best read bandwidth seen over ``rounds``, GiB/s, when ``threads`` sweep ``working_set`` bytes together.

    Every thread takes dot products of its own float64 array with itself: one read, no write, and numpy lets
    go of the interpreter lock meanwhile. The best round counts, because a ceiling is wanted.
    """
    arrays = [np.ones(max(1, working_set // 8 // threads)) for _ in range(threads)]
    size, best = sum(array.nbytes for array in arrays), 0.0
    for _ in range(rounds):
        barrier = threading.Barrier(threads + 1)
        workers = [threading.Thread(target=_sweep, args=(array, barrier)) for array in arrays]
        for worker in workers:
            worker.start()
        barrier.wait()
        start = time.perf_counter()
        for worker in workers:
            worker.join()
        best = max(best, size / 2**30 / (time.perf_counter() - start))
    return best


def _sweep(array: np.ndarray, barrier: threading.Barrier, block: int = 1 << 16) -> None:
    # Blocks below the size at which BLAS would start threads of its own.
    barrier.wait()
    for start in range(0, array.size, block):
        piece = array[start : start + block]
        np.dot(piece, piece)
