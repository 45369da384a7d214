"""Weights on huge pages: a decode step reads every weight once, and small pages cost a table walk each.

onnxruntime packs weights into memory from malloc, which on most Linux systems ("madvise" in
/sys/kernel/mm/transparent_hugepage/enabled) stays on small pages unless somebody asks. Sources: madvise(2),
MADV_HUGEPAGE and MADV_COLLAPSE (Linux 6.1); proc_pid_maps(5).
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
import threading
from pathlib import Path

PAGE = 1 << 21
DELAY = 1.0  # seconds from opening a session
_FILLED = 0.875  # of a huge page's small ones
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_WRITABLE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *(\[heap\])?$")


def use_huge_pages(minimum: int = 4 * PAGE) -> int:
    """Ask for huge pages behind every anonymous writable mapping of at least ``minimum`` bytes.

    Where most of a page is not there yet, or was given back (`trim_heap`), it stays that way: a huge page
    would be memory that nobody uses. Returns the bytes that the kernel moved onto huge pages at once; 0 where
    there is nothing to do or the system has no such call. It is advice: it never fails, and the contents stay
    what they were.
    """
    if sys.platform != "linux":
        return 0
    try:
        lines = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()
        libc = ctypes.CDLL(None)
        madvise, mincore = libc.madvise, libc.mincore
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    moved = 0
    for first, size in aligned_ranges(lines, minimum):
        there = ctypes.create_string_buffer(size // mmap.PAGESIZE)
        if mincore(first, size, there) != 0:
            continue
        for begin, length in filled_ranges(first, there.raw):
            if madvise(begin, length, _MADV_HUGEPAGE) == 0 and madvise(begin, length, _MADV_COLLAPSE) == 0:
                moved += length
    return moved


def trim_heap() -> bool:
    """Give memory that is allocated from and not in use back to the system; whether any was.

    Opening a session leaves holes where a graph was parsed and weights were packed, a tokenizer where its
    file was: 32 MB for SmolLM2-135M, and it takes 4 ms. Only glibc has the call.
    """
    try:
        return bool(ctypes.CDLL(None).malloc_trim(0))
    except (OSError, AttributeError, TypeError):  # TypeError: Windows has no library of that name
        return False


def use_huge_pages_soon(seconds: float = DELAY) -> threading.Timer:
    """:func:`use_huge_pages` in a thread after so many seconds, which nobody has to wait for.

    The kernel takes 3 to 7 ms for each page of 2 MB on virtual machines: longer, all together, than opening a
    session takes. So first tokens come first, and a process that soon ends never pays. A mapping that is
    freed meanwhile is none of its business, and advice about it fails.
    """
    timer = threading.Timer(seconds, use_huge_pages)
    timer.daemon = True
    timer.start()
    return timer


def aligned_ranges(maps: list[str], minimum: int) -> list[tuple[int, int]]:
    """(address, bytes) of the whole huge pages inside the anonymous mappings that ``maps`` lists."""
    ranges = []
    for line in maps:
        if match := _WRITABLE.match(line):
            start, end = int(match[1], 16), int(match[2], 16)
            first, last = -(-start // PAGE) * PAGE, end // PAGE * PAGE
            if end - start >= minimum and last > first:
                ranges.append((first, last - first))
    return ranges


def filled_ranges(first: int, there: bytes) -> list[tuple[int, int]]:
    """(address, bytes) of huge pages in a row of whose small pages most are there, from mincore's answer."""
    many = PAGE // mmap.PAGESIZE
    ranges: list[tuple[int, int]] = []
    for start in range(0, len(there), many):
        # The lowest bit of each byte says it; the others are reserved.
        if sum(state & 1 for state in there[start : start + many]) < _FILLED * many:
            continue
        address = first + start * mmap.PAGESIZE
        if ranges and sum(ranges[-1]) == address:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + PAGE)
        else:
            ranges.append((address, PAGE))
    return ranges
