"""Memory that a process may take: the kernel's word, and the tightest cgroup's."""

from pathlib import Path

import pytest

from gemini.benchmarks.resources import available_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"


def fake(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_what_the_kernel_calls_available(tmp_path: Path) -> None:
    assert available_memory(fake(tmp_path, {"proc/meminfo": MEMINFO})) == 8_000_000 * 1024


def test_no_system_that_says() -> None:
    assert available_memory("/nowhere") is None


def test_v2_group_less_what_it_holds_but_for_cached_files(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/memory.max": "5000000000\n",
        "sys/fs/cgroup/a/memory.current": "3000000000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 2000000000\ninactive_file 800000000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
        "sys/fs/cgroup/a/b/memory.current": "3000000000\n",
    }
    assert available_memory(fake(tmp_path, files)) == 2_800_000_000


def test_v1_group(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "4:memory:/x\n1:cpu:/\n",
        "sys/fs/cgroup/memory/x/memory.limit_in_bytes": "4000000000\n",
        "sys/fs/cgroup/memory/x/memory.usage_in_bytes": "1000000000\n",
        "sys/fs/cgroup/memory/x/memory.stat": "cache 5\ntotal_inactive_file 500000000\n",
    }
    assert available_memory(fake(tmp_path, files)) == 3_500_000_000


@pytest.mark.parametrize("limit", ["max", "", "soup"])
def test_a_group_without_limit(tmp_path: Path, limit: str) -> None:
    files = {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": limit,
        "sys/fs/cgroup/memory.current": "1",
    }
    assert available_memory(fake(tmp_path, files)) == 8_000_000 * 1024


def test_more_held_than_allowed_is_nothing_to_spare(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "1000",
        "sys/fs/cgroup/memory.current": "2000",
    }
    assert available_memory(fake(tmp_path, files)) == 0
