"""Huge pages behind the weights: which ranges are asked for, and that nothing but the page size changes."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from gemini.runtime import hugepages
from gemini.runtime.hugepages import (
    PAGE,
    aligned_ranges,
    filled_ranges,
    trim_heap,
    use_huge_pages,
    use_huge_pages_soon,
)

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


def test_only_pages_that_are_mostly_there() -> None:
    many = PAGE // mmap.PAGESIZE
    full, other_bits = b"\x01" * many, b"\x03" * many
    most = b"\x01" * (many * 7 // 8) + b"\x00" * (many // 8)
    less = b"\x01" * (many * 7 // 8 - 1) + b"\xfe" * (many // 8 + 1)
    there = full + most + less + other_bits + bytes(many)
    assert filled_ranges(0x200000, there) == [(0x200000, 2 * PAGE), (0x200000 + 3 * PAGE, PAGE)]
    assert filled_ranges(0, b"") == []


def resident(array: np.ndarray) -> int:
    """Bytes of the pages that hold an array and are in memory, as /proc/self/pagemap says.

    Not those of its mapping: the kernel joins neighbours, and the next allocation may become one.
    """
    first = array.ctypes.data // mmap.PAGESIZE
    count = (array.ctypes.data + array.nbytes - 1) // mmap.PAGESIZE + 1 - first
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(8 * first)
        entries = np.frombuffer(file.read(8 * count), np.uint64)
    assert len(entries) == count
    return int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="transparent huge pages are Linux's")
def test_memory_that_nobody_has_touched_stays_away() -> None:
    # Not from numpy, which asks for huge pages itself. A page of each huge one is there: the kernel collapses
    # such, but nothing where there is nothing at all.
    sparse = np.frombuffer(mmap.mmap(-1, 32 * PAGE, flags=mmap.MAP_PRIVATE), np.uint8)
    sparse[::PAGE] = 1
    before = resident(sparse)
    use_huge_pages()
    assert resident(sparse) == before


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc gives memory back when asked")
def test_freed_memory_goes_back_to_the_system() -> None:
    # In pieces below the size that malloc maps one by one, with others between that stay.
    pieces = [bytearray(100_000) for _ in range(400)]
    kept = pieces[::2]
    held = resident_of_process()
    del pieces[1::2]
    trim_heap()
    assert all(piece == bytes(100_000) for piece in kept)
    assert held - resident_of_process() > 10_000_000


def resident_of_process() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


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

    def without_trim(_name: None) -> object:
        return object()

    monkeypatch.setattr(hugepages.ctypes, "CDLL", without_trim)
    assert trim_heap() is False
