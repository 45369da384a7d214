"""Huge pages behind the weights: which ranges are asked for, and that nothing but the page size changes."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from gemini.runtime import hugepages
from gemini.runtime.hugepages import PAGE, aligned_ranges, use_huge_pages, use_huge_pages_soon

_MAPS = """\
00400000-00c00000 r-xp 00000000 fe:01 1234                       /usr/bin/python3
10100000-10f00000 rw-p 00000000 00:00 0                          [heap]
20000000-20400000 rw-p 00000000 00:00 0
30000000-30100000 rw-p 00000000 00:00 0
40000000-40800000 rw-s 00000000 00:00 0
50000000-50800000 rw-p 00000000 fe:01 99                         /data/weights.bin
60000000-60800000 ---p 00000000 00:00 0
7ffc0000000-7ffc0800000 rw-p 00000000 00:00 0                    [stack]
""".splitlines()


def test_only_whole_pages_of_large_anonymous_writable_mappings() -> None:
    assert aligned_ranges(_MAPS, 2 * PAGE) == [(0x10200000, 6 * PAGE), (0x20000000, 2 * PAGE)]
    assert aligned_ranges(_MAPS, 4 * PAGE) == [(0x10200000, 6 * PAGE)]
    assert aligned_ranges(["", "not a mapping"], 0) == []


@pytest.mark.skipif(sys.platform != "linux", reason="transparent huge pages are Linux's")
def test_contents_survive() -> None:
    array = np.random.default_rng(0).integers(0, 256, 8 * PAGE, np.uint8)
    before = array.copy()
    assert use_huge_pages() % PAGE == 0
    np.testing.assert_array_equal(array, before)


def test_it_may_happen_while_memory_is_written_and_freed() -> None:
    kept = np.zeros(16 * PAGE, np.uint8)
    advice = use_huge_pages_soon(0.0)
    for value in range(1, 20):
        kept[:] = value
        np.ones(8 * PAGE, np.uint8).sum()
    advice.join()
    assert advice.daemon
    assert (kept == 19).all()


def test_a_system_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hugepages.sys, "platform", "darwin")
    assert use_huge_pages() == 0
