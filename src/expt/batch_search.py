"""The largest size whose predicted peak fits a budget, found with few predictions.

The peak is close to linear in the batch, so two traces give a line, a third is made where the
line meets the limit, and a fourth at the next larger size shows that it is the largest. A line is
only ever a guess of where to look: what is reported has been traced.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from expt.memory.planning.planning import Plan

MAX_TRACES = 18
"""A search that has not come to its end by then returns the largest size known to fit."""
GUESSES = 8
"""Traces after which what is left is halved, for peaks that are far from a line."""


@dataclass(frozen=True)
class Limit:
    """What a plan may take: its peak a share of the budget, and what is reserved all of it."""

    budget_bytes: int
    margin: float

    @property
    def peak_bytes(self) -> int:
        """The largest peak that is allowed."""
        return int(self.budget_bytes * self.margin)

    def demand(self, planned: Plan) -> float:
        """Return the bytes of budget that a plan asks for."""
        return max(planned.peak_bytes / self.margin, planned.reserved_bytes or 0)

    def allows(self, planned: Plan) -> bool:
        """Tell whether a plan fits."""
        reserved = planned.reserved_bytes or 0
        return planned.peak_bytes <= self.peak_bytes and reserved <= self.budget_bytes


@dataclass(frozen=True)
class Search:
    """What a search found: the best size (None: nothing fits), and every plan made on the way.

    `exact` says that the next larger size was traced and does not fit, or that there is none.
    """

    best: int | None
    plans: Mapping[int, Plan]
    exact: bool


def largest(
    sizes: Sequence[int], predict: Callable[[int], Plan], limit: Limit, start: int
) -> Search:
    """Return the largest of `sizes` whose plan is allowed, if larger sizes take more.

    Args:
        sizes: what may be chosen, ascending, not empty.
        predict: traces a size.
        limit: what a plan may take.
        start: where to look first.

    """
    plans: dict[int, Plan] = {}
    low, high = -1, len(sizes)  # positions: what fits and what does not
    at = before = min(bisect_left(sizes, start), len(sizes) - 1)
    fitted: list[bool] = []
    while high - low > 1 and len(plans) < MAX_TRACES:
        size = sizes[at]
        plans[size] = predict(size)
        fitted.append(limit.allows(plans[size]))
        if fitted[-1]:
            low = at
        else:
            high = at
        demands = {size: limit.demand(one) for size, one in plans.items()}
        meeting = _meeting_point(demands, limit.budget_bytes)
        if meeting is None or len(plans) > GUESSES:
            guess = (low + high) // 2
        else:
            guess = bisect_right(sizes, meeting) - 1
        creeping = low >= 0 and high < len(sizes) and fitted[-1] == fitted[-2]
        if creeping and len(plans) <= GUESSES:
            # The line misses on one side: go twice as far, lest it creeps towards the end.
            step = 2 * (at - before)
            guess = min(guess, at + step) if step < 0 else max(guess, at + step)
        before, at = at, min(max(guess, low + 1), high - 1)
    return Search(None if low < 0 else sizes[low], plans, high - low <= 1)


def _meeting_point(demands: Mapping[int, float], budget: float) -> float | None:
    """Return the size at which a line through the known demands meets the budget.

    None where demand does not grow with the size: evaluation has the peak, say.
    """
    known = sorted(demands)
    if len(known) == 1:
        return known[0] * (2 if demands[known[0]] <= budget else 0.5)
    inside = [size for size in known if demands[size] <= budget]
    beyond = [size for size in known if demands[size] > budget]
    if inside and beyond:
        first, second = inside[-1], beyond[0]
    else:
        first, second = known[-2:] if inside else known[:2]
    slope = (demands[second] - demands[first]) / (second - first)
    return None if slope <= 0 else first + (budget - demands[first]) / slope
