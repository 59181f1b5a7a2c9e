"""What the allocator handed out, as its events tell."""

from __future__ import annotations

import pytest
import torch

from expt.memory.measuring.allocations import Allocations, can_be_watched

KIB = 1024


def test_the_highest_sum_and_what_is_left_of_it() -> None:
    with Allocations() as found:
        kept = torch.zeros(256)
        for _ in range(3):
            torch.zeros(1024)
    assert found.highest_bytes == 5 * KIB
    assert found.left_bytes == kept.nbytes == KIB


def test_memory_inside_a_kernel_is_seen() -> None:
    mask = torch.ones(1000, dtype=torch.bool)
    with Allocations() as found:
        total = mask.sum()
    assert found.highest_bytes >= 8 * len(mask)
    assert found.left_bytes == total.nbytes


def test_an_error_inside_is_raised_and_the_watch_is_over() -> None:
    with pytest.raises(ValueError, match="mine"), Allocations():
        raise ValueError("mine")
    assert can_be_watched()
    with torch.autograd.profiler.profile():
        assert not can_be_watched()
