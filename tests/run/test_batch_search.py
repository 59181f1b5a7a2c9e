"""The search alone, over made-up peaks: it finds the largest, and it needs few predictions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from expt.memory.planning.allocator import Requests
from expt.memory.planning.predict import Plan
from expt.run.batch_size import MAX_TRACES, Limit, largest
from expt.units import MIB


def plan_of(peak: float, reserved: int | None = None) -> Plan:
    return Plan("cuda", int(peak), reserved, (0, None), "forward", {}, {}, {}, "trace", 0.0)


SHAPES: dict[str, Callable[[int], float]] = {
    "a line": lambda size: 1000 + 70 * size,
    "flat, then a line": lambda size: max(9000, 500 + 70 * size),
    "a jump": lambda size: 1000 + 70 * size + (20_000 if size > 300 else 0),
    "blocks": lambda size: 1000 + 2048 * (size // 29),
    "a bend": lambda size: 1000 + 0.2 * size**2,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("start", [1, 16, 700])
@pytest.mark.parametrize("budget", [10_000, 25_000, 60_000])
def test_it_finds_the_largest_that_fits(shape: str, start: int, budget: int) -> None:
    limit = Limit(budget, 0.9)
    best = max(size for size in range(1, 1025) if SHAPES[shape](size) <= 0.9 * budget)
    traced: list[int] = []

    def predict(size: int) -> Plan:
        traced.append(size)
        return plan_of(SHAPES[shape](size))

    found = largest(range(1, 1025), predict, limit, start)
    assert (found.best, found.exact) == (best, True)
    assert set(found.plans) == set(traced)
    assert len(traced) == len(set(traced)) <= (4 if shape == "a line" else MAX_TRACES)


def test_nothing_fits_and_everything_fits() -> None:
    found = largest(range(1, 100), lambda size: plan_of(1000 + size), Limit(500, 0.9), 16)
    assert found.best is None
    assert 1 in found.plans, "the smallest is known, to say what it takes"
    found = largest([1, 2, 4], lambda size: plan_of(size), Limit(500, 0.9), 4)
    assert (found.best, list(found.plans), found.exact) == (4, [4], True)


def test_the_margin_is_of_what_is_reserved_where_there_is_an_allocator() -> None:
    limit = Limit(1000, 0.9)
    assert limit.allows(plan_of(890, 900))
    assert not limit.allows(plan_of(500, 901))
    assert limit.demand(plan_of(500, 909)) == pytest.approx(1010)
    assert limit.demand(plan_of(900)) == pytest.approx(1000), "where there is none, of the peak"
    assert (Limit.of(1050, None, "cuda").allowed_bytes, Limit.of(10, None, "cpu").margin) == (
        1000, 0.9,
    )  # fmt: skip
    assert Limit.of(1000, 0.5, "cuda").allowed_bytes == 500, "what is given holds everywhere"


def test_free_segments_are_given_back_before_a_plan_does_not_fit() -> None:
    # One segment is free when the next is asked for: 60 MiB are reserved where there is room.
    changes = ((0, 20 * MIB), (1, 20 * MIB), (0, -20 * MIB), (2, 30 * MIB))
    requests = Requests(changes, 0)
    planned = replace(plan_of(50 * MIB, requests.reserved_bytes()), requests=requests)
    assert planned.reserved_bytes == 70 * MIB
    assert Limit(50 * MIB, 1.0).taken(planned) == 50 * MIB
    assert Limit(50 * MIB, 1.0).allows(planned)
    assert not Limit(49 * MIB, 1.0).allows(planned)
