"""Memory, disk and the machine's read bandwidth: the ceilings a latency is read against."""

import sys
import threading
import time
from pathlib import Path

import numpy as np


def peak_rss_mb() -> float:
    """Peak resident memory of this process so far, MB (10^6 bytes)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    except OSError:
        pass
    import resource  # not on Windows; ru_maxrss also counts what was resident before exec, so it comes second

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e6


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
