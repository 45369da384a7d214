"""Threads from fake cgroup files and from the affinity mask."""

import os

import pytest

from gemini.runtime.threads import affinity_count, cpu_quota, thread_count, usable_threads


def fake(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cpus", "quota", "threads"),
    [(8, None, 8), (8, 2.0, 2), (8, 2.9, 2), (2, 16.0, 2), (8, 0.3, 1), (1, None, 1)],
)
def test_whole_cpus_of_the_tighter_limit(cpus, quota, threads):
    assert thread_count(cpus, quota) == threads


def test_v2_quota_in_a_container(tmp_path):
    fake(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"})
    assert cpu_quota(tmp_path) == 1.5


def test_v2_takes_the_tightest_of_the_group_and_its_parents(tmp_path):
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
    }
    assert cpu_quota(fake(tmp_path, files)) == 2.0


def test_v2_without_limit(tmp_path):
    fake(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"})
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_v1_quota(tmp_path, mount):
    files = {
        "proc/self/cgroup": "5:memory:/x\n4:cpu,cpuacct:/x\n",
        f"sys/fs/cgroup/{mount}/x/cpu.cfs_quota_us": "300000\n",
        f"sys/fs/cgroup/{mount}/x/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quota(fake(tmp_path, files)) == 3.0


def test_v1_path_of_the_host_falls_back_to_what_the_container_mounts(tmp_path):
    files = {
        "proc/self/cgroup": "4:cpu:/docker/123\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quota(fake(tmp_path, files)) == 2.0


@pytest.mark.parametrize("quota", ["-1", "0", "soup", ""])
def test_v1_without_limit(tmp_path, quota):
    files = {
        "proc/self/cgroup": "4:cpu:/\n",
        "sys/fs/cgroup/cpu/cpu.cfs_quota_us": quota,
        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
    }
    assert cpu_quota(fake(tmp_path, files)) is None


def test_no_cgroup_files_at_all(tmp_path):
    assert cpu_quota(tmp_path) is None
    assert usable_threads(tmp_path) == affinity_count()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the platform has no affinity mask")
def test_the_affinity_mask_counts():
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert affinity_count() == 1
    finally:
        os.sched_setaffinity(0, mask)
