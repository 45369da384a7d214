"""How many threads this process may really use: the affinity mask and the cgroup's CPU quota.

A container with a quota of 2 CPUs on a 64-core host still shows 64 cores; 64 spinning threads would then be
throttled most of the time. Formats: Linux kernel documentation, cgroup-v2.rst (cpu.max) and sched-bwc.rst
(v1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

FigureOf = Callable[[Path], "float | None"]  # of a cgroup's folder


def usable_threads(root: str | Path = "/") -> int:
    """Threads to start: whole CPUs of the tightest quota, at most those of the affinity mask, at least 1."""
    return thread_count(affinity_count(), cpu_quota(root))


def thread_count(cpus: int, quota: float | None) -> int:
    """Combine a CPU count with a quota in CPUs (None: unlimited). A fraction of a CPU starts no thread."""
    return max(1, cpus if quota is None else min(cpus, int(quota)))


def affinity_count() -> int:
    """CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_quota(root: str | Path = "/") -> float | None:
    """The tightest CPU quota (in CPUs) of this process's cgroup and its parents, or None without one.

    ``root`` is where ``proc/self/cgroup`` and ``sys/fs/cgroup`` are looked up, so that tests can fake them.
    """
    return min(cgroup_figures(root, "cpu", _quota_v2, _quota_v1), default=None)


def cgroup_figures(root: str | Path, controller: str, v2: FigureOf, v1: FigureOf) -> list[float]:
    """What ``v2`` or ``v1`` finds in the folders of this process's cgroup and its parents."""
    base = Path(root)
    found: list[float] = []
    for line in _read(base / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        mounts = base / "sys/fs/cgroup"
        if hierarchy == "0" and not controllers:
            found += _along(mounts, group, v2)
        elif controller in controllers.split(","):
            for mount in (mounts / controllers, mounts / controller):
                found += _along(mount, group, v1)
    return found


def _along(mount: Path, group: str, figure_of: FigureOf) -> list[float]:
    """Figures of a group and all its parents. In a container the group's own path may not be mounted."""
    path = PurePosixPath("/") / group.lstrip("/")
    folders = [mount / str(step).lstrip("/") for step in (path, *path.parents)]
    return [figure for folder in folders if (figure := figure_of(folder)) is not None]


def _quota_v2(folder: Path) -> float | None:
    words = _read(folder / "cpu.max").split()
    return _ratio(*words) if len(words) == 2 else None


def _quota_v1(folder: Path) -> float | None:
    return _ratio(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    """quota / period in CPUs; "max" (v2), -1 (v1) and anything unreadable mean no limit."""
    try:
        used, span = int(quota), int(period)
    except ValueError:
        return None
    return used / span if used > 0 and span > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
