"""CUDA's caching allocator, simulated: what it allocates and reserves for a trace of requests.

Requests are rounded up to 512 bytes and served from segments: up to 1 MiB from segments of
2 MiB, below 10 MiB from segments of 20 MiB, larger ones from segments of their own rounded to
2 MiB. The best fitting free block is split if enough is left over, and neighbours merge when
they are freed; segments are kept. Source: torch's c10/cuda/CUDACachingAllocator.cpp and its
documentation of PYTORCH_CUDA_ALLOC_CONF (defaults, one stream).
"""

from __future__ import annotations

import bisect
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
    """Serves requests one by one; the peaks are over everything since it was made."""

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
        self.reserved_bytes += count
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self._segments += 1
        return _Block(count, self._segments, 0)

    def _give(self, block: _Block, small: bool) -> None:
        bisect.insort(self._pools[small], (block.key(), block), key=lambda entry: entry[0])

    def _remove(self, block: _Block, small: bool) -> None:
        pool = self._pools[small]
        del pool[bisect.bisect_left(pool, block.key(), key=lambda entry: entry[0])]
