"""Which way to compute a step fits a limit: the search behind `task=allocate` and `task=cards`.

A way is a set of changes to a configuration. Ways are tried in the order of what they cost, and in
each the largest micro-batch is looked for: fewer, larger micro-batches keep a device busier, which
counted arithmetic does not see. Nothing is trained; `plan` traces a way at a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from expt.memory.planning.predict import Plan
from expt.run.batch_size import Limit, largest

Way = TypeVar("Way", bound=Hashable)


@dataclass(frozen=True)
class Choice(Generic[Way]):
    """A way and a micro-batch, and what they are predicted to need."""

    way: Way
    micro_batch: int
    planned: Plan
    fits: bool


def micro_batches(batch: int, whole_only: bool = False) -> dict[int, int]:
    """Return how many parts of each size make up a step's batch, by size, ascending.

    Sizes are the batch, its half, its quarter and so on; with `whole_only` the batch alone.
    """
    parts = [1]
    while parts[-1] < batch and not whole_only:
        parts.append(min(2 * parts[-1], batch))
    return {-(-batch // count): count for count in reversed(parts)}


def first_that_fits(
    ways: Sequence[Way],
    sizes: Sequence[int],
    plan: Callable[[Way, int], Plan],
    limit: Limit,
) -> Choice[Way]:
    """Return the first way that fits, with its largest micro-batch, or what comes nearest.

    Args:
        ways: the one wanted most first.
        sizes: of a micro-batch, ascending.
        plan: what a way is predicted to need at a size; the same every time.
        limit: what it may take.

    """
    for way in ways:
        if limit.allows(plan(way, sizes[-1])):
            return Choice(way, sizes[-1], plan(way, sizes[-1]), True)
        if not limit.allows(plan(way, sizes[0])):
            continue  # a larger part of the batch does not take less
        best = largest(sizes, partial(plan, way), limit, sizes[-1]).best
        if best is not None:
            return Choice(way, best, plan(way, best), True)
    return least(ways, sizes, plan, limit)


def least(
    ways: Sequence[Way], sizes: Sequence[int], plan: Callable[[Way, int], Plan], limit: Limit
) -> Choice[Way]:
    """Return the way and micro-batch that take least, of a micro-batch's ascending `sizes`.

    That is the smallest, or the whole batch: only parts of it keep the gradients of those before.
    """
    tried = [(way, size) for way in ways for size in dict.fromkeys((sizes[0], sizes[-1]))]
    way, size = min(tried, key=lambda one: limit.demand(plan(*one)))
    planned = plan(way, size)
    return Choice(way, size, planned, limit.allows(planned))
