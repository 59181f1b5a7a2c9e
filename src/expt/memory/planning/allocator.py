"""CUDA's caching allocator, simulated: what it allocates and reserves for a trace of requests.

Requests are rounded up to 512 bytes and served from segments: up to 1 MiB from segments of
2 MiB, below 10 MiB from segments of 20 MiB, larger ones from segments of their own rounded to
2 MiB. The best fitting free block is split if enough is left over, and neighbours merge when
they are freed; segments are kept, but those that are wholly free are given back before the
device's limit is passed. Source: torch's c10/cuda/CUDACachingAllocator.cpp and its
documentation of PYTORCH_CUDA_ALLOC_CONF (defaults, one stream).
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

BLOCK = 512
SMALL = 1024**2
SMALL_SEGMENT = 2 * 1024**2
LARGE = 10 * 1024**2
LARGE_SEGMENT = 20 * 1024**2
ROUND_LARGE = 2 * 1024**2


def rounded(request: int) -> int:
    """Return the bytes of the block for a request."""
    return -(-request // BLOCK) * BLOCK


@dataclass(eq=False)
class _Block:
    size: int
    segment: int
    offset: int
    free: bool = True
    before: _Block | None = None
    after: _Block | None = None

    def key(self) -> tuple[int, int, int]:
        return self.size, self.segment, self.offset


@dataclass
class CachingAllocator:
    """Serves requests one by one; the peaks are over everything since it was made.

    `limit_bytes` is what the device has for segments. A request that does not fit even after the
    free ones were given back is served all the same, so that the peak tells what it takes.
    """

    limit_bytes: int | None = None
    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    _pools: dict[bool, list[tuple[tuple[int, int, int], _Block]]] = field(
        default_factory=lambda: {True: [], False: []}
    )
    _used: dict[int, tuple[_Block, bool]] = field(default_factory=dict)
    _segments: int = 0

    def allocate(self, number: int, request: int) -> None:
        """Serve a request, known by `number` until it is freed."""
        size = max(rounded(request), BLOCK)
        small = size <= SMALL
        block = self._take(size, small) or self._new_segment(size, small)
        left = block.size - size
        if left >= BLOCK if small else left > SMALL:
            rest = _Block(left, block.segment, block.offset + size, True, block, block.after)
            if block.after is not None:
                block.after.before = rest
            block.after, block.size = rest, size
            self._give(rest, small)
        block.free = False
        self._used[number] = block, small
        self.allocated_bytes += block.size
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)

    def free(self, number: int) -> None:
        """Give a block back and merge it with free neighbours."""
        block, small = self._used.pop(number)
        self.allocated_bytes -= block.size
        block.free = True
        if (before := block.before) is not None and before.free:
            self._remove(before, small)
            before.size += block.size
            before.after = block.after
            if block.after is not None:
                block.after.before = before
            block = before
        if (after := block.after) is not None and after.free:
            self._remove(after, small)
            block.size += after.size
            block.after = after.after
            if after.after is not None:
                after.after.before = block
        self._give(block, small)

    def _take(self, size: int, small: bool) -> _Block | None:
        pool = self._pools[small]
        at = bisect.bisect_left(pool, (size, -1, -1), key=lambda entry: entry[0])
        return pool.pop(at)[1] if at < len(pool) else None

    def _new_segment(self, size: int, small: bool) -> _Block:
        if small:
            count = SMALL_SEGMENT
        elif size < LARGE:
            count = LARGE_SEGMENT
        else:
            count = -(-size // ROUND_LARGE) * ROUND_LARGE
        if self.limit_bytes is not None and self.reserved_bytes + count > self.limit_bytes:
            self._give_back()
        self.reserved_bytes += count
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._segments += 1
        return _Block(count, self._segments, 0)

    def _give_back(self) -> None:
        """Return the segments that are wholly free to the device."""
        for small, pool in self._pools.items():
            whole = [entry for entry in pool if entry[1].before is entry[1].after is None]
            self.reserved_bytes -= sum(block.size for _, block in whole)
            gone = {id(block) for _, block in whole}
            self._pools[small] = [entry for entry in pool if id(entry[1]) not in gone]

    def _give(self, block: _Block, small: bool) -> None:
        bisect.insort(self._pools[small], (block.key(), block), key=lambda entry: entry[0])

    def _remove(self, block: _Block, small: bool) -> None:
        pool = self._pools[small]
        del pool[bisect.bisect_left(pool, block.key(), key=lambda entry: entry[0])]


def served(changes: Iterable[tuple[int, int]], limit_bytes: int | None = None) -> CachingAllocator:
    """Return the allocator after it served what a trace asked for.

    `changes` are (number of a storage, bytes that it grows or shrinks by) in order.
    """
    allocator = CachingAllocator(limit_bytes)
    live: dict[int, int] = defaultdict(int)
    for number, change in changes:
        if live[number]:
            allocator.free(number)
        live[number] += change
        if live[number]:
            allocator.allocate(number, live[number])
    return allocator


@dataclass(frozen=True)
class Requests:
    """All that a run asks of the allocator, in order, and the bytes of segments beside that."""

    changes: tuple[tuple[int, int], ...]
    beside_bytes: int

    def reserved_bytes(self, limit_bytes: int | None = None) -> int:
        """Return the highest that is reserved, on a device with `limit_bytes` for it.

        More than the limit if the run does not fit.
        """
        left = None if limit_bytes is None else limit_bytes - self.beside_bytes
        return served(self.changes, left).peak_reserved_bytes + self.beside_bytes
