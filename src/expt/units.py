"""Bytes inside, GiB at the edges: the only place where the two are converted."""

from __future__ import annotations

GIB = 1024**3
MIB = 1024**2


def format_bytes(count: int | None) -> str:
    """Return `count` bytes for a reader: ``0.47 GiB``, ``31.2 MiB``, or ``not measured``."""
    if count is None:
        return "not measured"
    if count >= GIB / 10:
        return f"{count / GIB:.2f} GiB"
    return f"{count / MIB:.1f} MiB"


def format_seconds(seconds: float) -> str:
    """Return a duration for a reader: ``8.2 s``, ``3:07 min``, ``2:05:00 h``."""
    if seconds < 59.95:  # what rounds to 60.0 s is shown as a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h"
