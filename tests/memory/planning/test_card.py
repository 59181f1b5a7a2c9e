"""What a card reserves: its limit, what a loop holds, and bounds for what is not modelled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from expt.memory import plan
from expt.memory.planning.allocator import CachingAllocator
from expt.memory.planning.plan import CUDA_MARGIN, Plan
from expt.units import MIB

WORDS, WIDTH = 4000, 32


def words() -> nn.Module:
    return nn.Sequential(nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS))


def planned(rows: int = 64, **arguments) -> Plan:
    return plan(
        words,
        lambda: torch.arange(rows * 32).view(rows, 32) % WORDS,
        lambda weights: torch.optim.Adam(weights, 0.1),
        lambda model, ids: nn.functional.cross_entropy(model(ids).view(-1, WORDS), ids.view(-1)),
        target="cuda",
        **arguments,
    )


def test_free_segments_are_given_back_at_the_limit_and_only_there() -> None:
    for limit, reserved in ((None, 70 * MIB), (70 * MIB, 70 * MIB), (60 * MIB, 50 * MIB)):
        allocator = CachingAllocator(limit)
        allocator.allocate(0, 20 * MIB)
        allocator.allocate(1, 20 * MIB)
        allocator.free(0)
        allocator.allocate(2, 30 * MIB)
        assert allocator.peak_reserved_bytes == reserved
    allocator.allocate(3, 30 * MIB)
    assert allocator.peak_reserved_bytes == 80 * MIB, "more than the limit: it does not fit"
    assert allocator.allocated_bytes == 80 * MIB


def test_a_segment_in_use_is_not_given_back() -> None:
    allocator = CachingAllocator(45 * MIB)
    allocator.allocate(0, 12 * MIB)
    allocator.allocate(1, 18 * MIB)
    allocator.free(0)
    allocator.allocate(2, 6 * MIB)  # a part of the first
    allocator.allocate(3, 16 * MIB)
    assert allocator.reserved_bytes == 46 * MIB


def test_what_the_loop_holds_is_assumed_on_cuda_and_said() -> None:
    unknown = planned()
    held, dropped = planned(holds_outputs=True), planned(holds_outputs=False)
    logits = 64 * 32 * WORDS * 4
    assert unknown.peak_bytes == held.peak_bytes
    assert held.peak_bytes - dropped.peak_bytes == pytest.approx(logits, rel=0.05)
    assert any("holds_outputs=False" in note for note in unknown.notes)
    assert unknown.interval_bytes[0] < dropped.peak_bytes < unknown.peak_bytes
    assert not any("holds_outputs" in note for note in (*held.notes, *dropped.notes))


def test_the_limit_lowers_what_is_reserved_as_far_as_free_segments_go() -> None:
    free = planned()
    assert free.reserved_bytes is not None
    least = free.within(1).reserved_bytes
    assert least is not None
    assert free.peak_bytes < least <= free.reserved_bytes
    assert free.within(None) is free
    given = planned(limit_bytes=least).reserved_bytes
    assert given == free.within(least).reserved_bytes


def test_a_budget_fits_with_the_margin_beside_what_is_reserved() -> None:
    found = planned()
    assert found.reserved_bytes is not None
    least = found.within(1).reserved_bytes
    assert found.fits(int(found.reserved_bytes * (1 + CUDA_MARGIN)) + 1) is True
    assert found.fits(found.peak_bytes) is False
    assert least is not None and found.fits(least - 1) is False
    assert found.margin == CUDA_MARGIN
    assert replace(found, target="cpu", reserved_bytes=None).margin == 0


def test_few_sequences_may_have_other_lengths() -> None:
    def widest(found: Plan) -> float:
        assert found.reserved_interval_bytes and found.reserved_interval_bytes[1]
        return found.reserved_interval_bytes[1] / (found.reserved_bytes or 1)

    few, same = planned(rows=16), planned(rows=16, lengths_vary=False)
    assert few.reserved_bytes == same.reserved_bytes
    assert widest(few) > widest(same)
    assert widest(planned(rows=64)) < widest(planned(rows=64, lengths_vary=True))


def test_convolutions_may_take_workspaces_where_there_is_room() -> None:
    def convolved(**arguments) -> Plan:
        return plan(
            lambda: nn.Conv2d(3, 16, 3, padding=1),
            lambda: torch.randn(64, 3, 64, 64),
            lambda weights: torch.optim.SGD(weights, 0.1),
            lambda model, x: model(x).square().mean(),
            target="cuda",
            **arguments,
        )

    def room(found: Plan) -> int:
        assert found.reserved_interval_bytes and found.reserved_interval_bytes[1]
        return found.reserved_interval_bytes[1] - (found.reserved_bytes or 0)

    operands = 4 * (64 * 64 * 64 * (3 + 16) + 16 * 3 * 9)
    wide = convolved()
    assert room(wide) >= 3 * operands
    tight = convolved(limit_bytes=(wide.reserved_bytes or 0) + MIB)
    assert tight.reserved_bytes == wide.reserved_bytes
    assert room(wide) - room(tight) == pytest.approx(3 * operands - MIB, abs=MIB)


def test_a_plan_for_a_card_goes_into_json_without_its_requests() -> None:
    found = planned()
    stored = found.as_dict()
    assert "requests" not in stored
    assert stored["reserved_interval_bytes"] == list(found.reserved_interval_bytes or ())
    again = Plan.from_dict(stored)
    assert again == found
    assert again.within(1) is again, "what was asked for is not known any more"
