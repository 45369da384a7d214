"""Weights on huge pages: a decode step reads every weight once, and small pages cost a table walk each.

onnxruntime packs weights into memory from malloc, which on most Linux systems ("madvise" in
/sys/kernel/mm/transparent_hugepage/enabled) stays on small pages unless somebody asks. Sources: madvise(2),
MADV_HUGEPAGE and MADV_COLLAPSE (Linux 6.1); proc_pid_maps(5).
"""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from pathlib import Path

PAGE = 1 << 21
DELAY = 1.0  # seconds from opening a session
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
_WRITABLE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *(\[heap\])?$")


def use_huge_pages(minimum: int = 4 * PAGE) -> int:
    """Ask for huge pages behind every anonymous writable mapping of at least ``minimum`` bytes.

    Returns the bytes that the kernel moved onto huge pages at once; 0 where there is nothing to do or the
    system has no such call. It is advice: it never fails, and the contents stay what they were.
    """
    if sys.platform != "linux":
        return 0
    try:
        lines = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace").splitlines()
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for first, size in aligned_ranges(lines, minimum):
        if madvise(first, size, _MADV_HUGEPAGE) == 0 and madvise(first, size, _MADV_COLLAPSE) == 0:
            moved += size
    return moved


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
