"""Lets the C library keep what training frees on the host, instead of giving it back every step.

glibc returns the top of its heap to the system when more than a threshold of it is free, and maps
large blocks from the system one by one; a training step frees and takes the same memory again and
again, and every page is then zeroed anew. The thresholds are `mallopt`'s (its manual page). What
is kept counts in the process's size, not in the bytes that tensors take.

Linux backs such a heap with pages of 4 KiB unless told otherwise, and a step over many megabytes
then spends time on finding them. The heap is therefore grown once, untouched, and offered to the
system for huge pages (`madvise`'s manual page, MADV_HUGEPAGE).
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
"""Free memory at the top of the heap that is kept."""
MAPPED_BYTES = 2**28
"""Blocks from this size up are still mapped, and returned, one by one: a heap would fragment."""
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
MADV_HUGEPAGE = 14
HUGE_PAGE_BYTES = 2 * 1024**2
OFFERED_BYTES = 2**29
"""How far the heap is grown to be offered; what is not touched takes no memory."""
GROWTH_BLOCK = MAPPED_BYTES // 2


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process; return whether that was done.

    Does nothing where the user has set them in the environment, or with another C library.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        library = ctypes.CDLL(None)
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Both: setting one alone ends glibc's own adaptation of the other.
    kept = mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    if not mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES) or not kept:
        return False
    _offer_huge_pages(library)
    return True


def _offer_huge_pages(library: ctypes.CDLL) -> None:
    """Let the system back the heap with huge pages; does nothing where it cannot."""
    library.malloc.restype = ctypes.c_void_p
    library.malloc.argtypes = [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    # Several, each too small to be mapped on its own. Freed, they stay at the top of the heap.
    blocks = [library.malloc(GROWTH_BLOCK) for _ in range(OFFERED_BYTES // GROWTH_BLOCK)]
    for block in blocks:
        library.free(block)
    for start, end in _heap():
        first = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
        length = (end - first) // HUGE_PAGE_BYTES * HUGE_PAGE_BYTES
        if length > 0:
            library.madvise(first, length, MADV_HUGEPAGE)


def _heap() -> list[tuple[int, int]]:
    """Return the addresses of the process's heap; none where the system does not tell."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    found = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*\[heap\]$", maps, re.MULTILINE)
    return [(int(start, 16), int(end, 16)) for start, end in found]
