"""Lets the C library keep what training frees on the host, instead of giving it back every step.

glibc returns the top of its heap to the system when more than a threshold of it is free, and maps
large blocks from the system one by one; a training step frees and takes the same memory again and
again, and every page is then zeroed anew. The thresholds are `mallopt`'s (its manual page). What
is kept counts in the process's size, not in the bytes that tensors take.
"""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30
"""Free memory at the top of the heap that is kept."""
MAPPED_BYTES = 2**28
"""Blocks from this size up are still mapped, and returned, one by one: a heap would fragment."""
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


def keep_freed_memory() -> bool:
    """Raise glibc's thresholds for this process; return whether that was done.

    Does nothing where the user has set them in the environment, or with another C library.
    """
    if any(name in os.environ for name in VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Both: setting one alone ends glibc's own adaptation of the other.
    kept = mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES)) and bool(kept)
