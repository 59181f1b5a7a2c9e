"""How often a run may recover: in one step, in all, and how often for thrashing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from expt.memory.recovery.event import THRASHING
from expt.memory.recovery.ladder import MAX_RELEASES, Move, Skipped
from expt.memory.techniques.techniques import Techniques

if TYPE_CHECKING:
    import torch

ONCE = MAX_RELEASES - 1
"""A count of releases after which there is one more."""


@dataclass
class Attempts:
    """How often one piece of work failed, and was done again after no more than a release."""

    failures: int = 0
    releases: int = 0

    def release_only(self, techniques: Techniques, skipped: str, reason: str) -> Move:
        """Return the rung that changes nothing, or no rung if it was taken too often.

        Args:
            techniques: those in force.
            skipped: the rung that cannot be taken, and
            reason: why.

        """
        self.releases += 1
        if self.releases > MAX_RELEASES:
            return Move(None, None, (Skipped(skipped, reason),))
        return Move("release", techniques, (Skipped(skipped, reason),))


@dataclass(frozen=True)
class Limits:
    """Whether a run may recover, and how often: in one step, and in all.

    Going down because the allocator thrashes is a precaution, not a recovery: `thrashing` is its
    own limit, after which thrashing is left alone, and it never uses up `per_run`.
    """

    enabled: bool = True
    per_step: int = 12
    per_run: int = 100
    thrashing: int = 20

    def forbid(self, attempts: Attempts, events: Sequence[Mapping[str, Any]]) -> str | None:
        """Return why nothing more may be tried, None if something may.

        Args:
            attempts: of the work that failed.
            events: all of the run before, as `OomEvent.as_dict` gives them.

        """
        if not self.enabled:
            return "memory.recover=false, so nothing was tried"
        if len(events) - _thrashes(events) >= self.per_run:
            return f"memory.max_recoveries={self.per_run} is reached"
        if attempts.failures > self.per_step:
            return f"memory.max_recoveries_per_step={self.per_step} is reached"
        return None

    def allow_thrashing(self, events: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether the run may go down once more because the allocator thrashes."""
        return self.enabled and _thrashes(events) < self.thrashing


def _thrashes(events: Sequence[Mapping[str, Any]]) -> int:
    return sum(event["phase"] == THRASHING for event in events)


EVERY_STEPS = 10
"""Steps between two looks, since reading the allocator's statistics takes about 0.1 ms."""
LOOKS = 3
"""Looks in a row that must each show more retries than the one before."""


def retries(device: torch.device) -> int:
    """Return how often the allocator of a CUDA device has had to try again."""
    import torch

    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


class Thrashing:
    """Judges a counter of retries; `retries` reads it."""

    def __init__(self, retries: Callable[[], int]) -> None:
        self._retries = retries
        self._steps = 0
        self._last: int | None = None
        self._grown = 0

    def after_step(self) -> bool:
        """Look when it is time to; return whether the counter grew `LOOKS` times in a row."""
        self._steps += 1
        if self._steps % EVERY_STEPS:
            return False
        count = self._retries()
        grew = self._last is not None and count > self._last
        self._last = count
        self._grown = self._grown + 1 if grew else 0
        if self._grown < LOOKS:
            return False
        self._grown = 0
        return True
