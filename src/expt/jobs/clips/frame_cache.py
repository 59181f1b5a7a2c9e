"""Decoded frames of small data, kept in memory that all worker processes share.

One file in memory (on a disk where `/dev/shm` has no room) holds the frames of every video, and
a byte for each that says whether they are there, and since which emptying. Two workers may write
the same video at once: they write the same bytes. Whoever empties the cache counts up first, so
that what was read or written in between does not count.

Letters: `n` frames, `H` x `W` pixels, `C` channels.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expt.units import format_bytes

Shape = tuple[int, int, int, int]
"""Of a video: n, H, W and C."""

SHARED = Path("/dev/shm")
ROOM = 0.5
"""Part of the memory that is free now that a cache may take."""
PREFIX = "expt-frames-"
"""Of the file's name; the number of the process that owns it follows."""
HEADER = 8
"""Bytes before the flags: how often the cache was emptied."""


class FrameCache:
    """Frames of videos by their number; empty at first.

    Args:
        shapes: of each video.

    """

    def __init__(self, shapes: Sequence[Shape]) -> None:
        self._shapes = list(shapes)
        sizes = [bytes_of([shape]) for shape in shapes]
        first = HEADER + len(sizes)
        self._offsets = (first + np.cumsum([0, *sizes])).tolist()
        self.bytes = int(self._offsets[-1])
        folder = SHARED if _free(SHARED) > self.bytes else Path(tempfile.gettempdir())
        _collect(folder)
        descriptor, name = tempfile.mkstemp(prefix=f"{PREFIX}{os.getpid()}-", dir=folder)
        os.truncate(descriptor, self.bytes)
        os.close(descriptor)
        self._path = name
        self._remove = weakref.finalize(self, _removed, name)
        self._map()

    def get(self, number: int, wanted: Sequence[int]) -> np.ndarray | None:
        """Return a copy of some of a video's frames, uint8 [T, H, W, C]; None if not there."""
        mark = self._memory[HEADER + number]
        if mark not in self._marks():
            return None
        turned = mark == self._marks()[1]
        found: np.ndarray = self._frames(number, turned)[list(wanted)]
        return found if mark in self._marks() else None

    def put(self, number: int, frames: np.ndarray) -> None:
        """Keep a video's frames; those of another shape than was announced are not kept.

        A video that is turned when it is shown has its two sides exchanged.
        """
        count, height, width, channels = self._shapes[number]
        turned = frames.shape == (count, width, height, channels) and height != width
        if not turned and frames.shape != (count, height, width, channels):
            return
        mark = self._marks()[turned]
        self._frames(number, turned)[:] = frames
        self._memory[HEADER + number] = mark  # of no meaning if it was emptied meanwhile

    def clear(self) -> None:
        """Give the memory back; videos are decoded again."""
        self._memory[:HEADER] = (self._emptied() + 1).to_bytes(HEADER, "little")
        count = len(self._shapes)
        self._memory[HEADER : HEADER + count] = bytes(count)
        page = -(-(HEADER + count) // mmap.PAGESIZE) * mmap.PAGESIZE
        if page < self.bytes and hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):  # a disk without holes keeps them to the end
                self._memory.madvise(mmap.MADV_REMOVE, page)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_memory", "_remove")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map()

    def _map(self) -> None:
        with open(self._path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), self.bytes)

    def _emptied(self) -> int:
        return int.from_bytes(self._memory[:HEADER], "little")

    def _marks(self) -> tuple[int, int]:
        """Return the marks of videos that are there, as they are and turned; 0 is none."""
        first = 1 + 2 * (self._emptied() % 127)
        return first, first + 1

    def _frames(self, number: int, turned: bool) -> np.ndarray:
        frames, height, width, channels = self._shapes[number]
        shape = (frames, *((width, height) if turned else (height, width)), channels)
        flat = np.frombuffer(self._memory, np.uint8, math.prod(shape), self._offsets[number])
        return flat.reshape(shape)


def cache_for(shapes: Sequence[Shape], limit_bytes: int) -> FrameCache | str:
    """Return a cache of all videos, or why there is none."""
    room = min(limit_bytes, int(ROOM * _free_memory()))
    needed = bytes_of(shapes)
    if needed <= room:
        return FrameCache(shapes)
    return f"needs {format_bytes(needed)}, and may have {format_bytes(room)}"


def bytes_of(shapes: Iterable[Shape]) -> int:
    """Return the bytes of the frames of videos."""
    return sum(map(math.prod, shapes))


def has_room(needed: int) -> bool:
    """Tell whether a cache of so many bytes fits."""
    return needed <= ROOM * _free_memory()


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free if folder.is_dir() else 0


def _free_memory() -> int:
    """Return the host memory that can be had without swapping, in bytes."""
    import psutil

    return int(psutil.virtual_memory().available)


def _collect(folder: Path) -> None:
    """Remove what processes left behind that were killed."""
    import psutil

    for file in folder.glob(f"{PREFIX}*"):
        owner = file.name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            with contextlib.suppress(OSError):
                file.unlink()


def _removed(name: str) -> None:
    Path(name).unlink(missing_ok=True)
