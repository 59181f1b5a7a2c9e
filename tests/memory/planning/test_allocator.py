"""The simulated caching allocator: rounding, pools, best fit, split, merge, segments kept."""

from __future__ import annotations

import random

import pytest

from expt.memory.planning.allocator import CachingAllocator, rounded

KIB, MIB = 1024, 1024**2


@pytest.mark.parametrize(("request_", "block"), [(1, 512), (512, 512), (513, 1024), (0, 0)])
def test_requests_are_rounded_up_to_blocks_of_512_bytes(request_, block) -> None:
    assert rounded(request_) == block


@pytest.mark.parametrize(
    ("request_", "allocated", "reserved"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),  # the largest that is small
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),  # a segment of its own
        (11 * MIB, 12 * MIB, 12 * MIB),  # rounded to 2 MiB, and 1 MiB left is not split off
        (2**30 + 1, 2**30 + 512, 2**30 + 2 * MIB),  # more than 1 MiB left is
    ],
)
def test_a_first_request_takes_a_segment_of_its_kind(request_, allocated, reserved) -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, request_)
    assert allocator.reserved_bytes == allocator.peak_reserved_bytes == reserved
    assert allocator.allocated_bytes == allocator.peak_allocated_bytes == allocated


def test_small_requests_share_a_segment_and_large_ones_another() -> None:
    allocator = CachingAllocator()
    for number in range(4):
        allocator.allocate(number, 512 * KIB)
    assert allocator.reserved_bytes == 2 * MIB
    allocator.allocate(4, 512 * KIB)
    assert allocator.reserved_bytes == 4 * MIB
    allocator.allocate(5, 5 * MIB)
    allocator.allocate(6, 5 * MIB)
    assert allocator.reserved_bytes == 24 * MIB


def test_segments_are_kept_and_used_again() -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, 30 * MIB)
    allocator.free(0)
    assert (allocator.allocated_bytes, allocator.reserved_bytes) == (0, 30 * MIB)
    allocator.allocate(1, 12 * MIB)
    allocator.allocate(2, 12 * MIB)
    assert allocator.reserved_bytes == 30 * MIB
    assert allocator.peak_allocated_bytes == 30 * MIB


def test_neighbours_merge_when_they_are_freed_in_any_order() -> None:
    for order in ((0, 1, 2), (2, 1, 0), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1)):
        allocator = CachingAllocator()
        for number in range(3):
            allocator.allocate(number, 4 * MIB)
        for number in order:
            allocator.free(number)
        allocator.allocate(3, 9 * MIB)  # only fits where three became one
        allocator.allocate(4, 9 * MIB)
        assert allocator.reserved_bytes == 20 * MIB, order


def test_the_best_fitting_block_is_taken_and_a_hole_is_fragmentation() -> None:
    allocator = CachingAllocator()
    for number, size in enumerate((40, 20, 10)):
        allocator.allocate(number, size * MIB)
    for number in range(3):
        allocator.free(number)
    allocator.allocate(3, 18 * MIB)  # the 20, not the 40
    allocator.allocate(4, 40 * MIB)
    assert allocator.reserved_bytes == 70 * MIB
    allocator.allocate(5, 12 * MIB)  # 10 and 2 are free, but not together
    assert allocator.reserved_bytes == 82 * MIB


def test_a_remainder_of_a_small_block_is_used_and_one_of_a_large_only_above_1_mib() -> None:
    allocator = CachingAllocator()
    allocator.allocate(0, 9 * MIB)
    allocator.allocate(1, 10 * MIB - 512)  # leaves 1 MiB and 512 bytes
    assert allocator.allocated_bytes == 19 * MIB - 512
    allocator = CachingAllocator()
    allocator.allocate(0, 10 * MIB - 512)
    allocator.allocate(1, 9 * MIB + 512)  # leaves 1 MiB: given along
    assert allocator.allocated_bytes == 20 * MIB


def test_books_balance_over_a_long_random_life() -> None:
    draw = random.Random(0)
    allocator, live, exact, highest = CachingAllocator(), dict[int, int](), 0, 0
    for number in range(3000):
        if live and draw.random() < 0.5:
            gone = draw.choice(list(live))
            allocator.free(gone)
            exact -= live.pop(gone)
        else:
            live[number] = draw.choice((100, 5_000, 700_000, 3_000_000, 15_000_000))
            allocator.allocate(number, live[number])
            exact += live[number]
        highest = max(highest, exact)
        assert exact <= allocator.allocated_bytes <= allocator.reserved_bytes
    assert allocator.peak_allocated_bytes >= highest
    for number in live:
        allocator.free(number)
    assert allocator.allocated_bytes == 0
    free = [block.size for pool in allocator._pools.values() for _, block in pool]
    assert sum(free) == allocator.reserved_bytes
    assert len(free) == allocator._segments, "all of every segment has merged again"
