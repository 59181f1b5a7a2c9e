"""How often a run may recover: in one step, in all, and how often for thrashing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expt.memory.recovery.footing import MAX_RELEASES
from expt.memory.recovery.ladder import Move, Skipped
from expt.memory.recovery.oom_event import THRASHING
from expt.memory.techniques.techniques import Techniques

ONCE = MAX_RELEASES - 1
"""A count of releases after which there is one more."""


@dataclass
class Trouble:
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

    def forbid(self, trouble: Trouble, events: Sequence[Mapping[str, Any]]) -> str | None:
        """Return why nothing more may be tried, None if something may.

        Args:
            trouble: of the work that failed.
            events: all of the run before, as `OomEvent.as_dict` gives them.

        """
        if not self.enabled:
            return "memory.recover=false, so nothing was tried"
        if len(events) - _thrashes(events) >= self.per_run:
            return f"that was so often in this run already: memory.max_recoveries={self.per_run}"
        if trouble.failures > self.per_step:
            return f"that was so often: memory.max_recoveries_per_step={self.per_step}"
        return None

    def allow_thrashing(self, events: Sequence[Mapping[str, Any]]) -> bool:
        """Tell whether the run may go down once more because the allocator thrashes."""
        return self.enabled and _thrashes(events) < self.thrashing


def _thrashes(events: Sequence[Mapping[str, Any]]) -> int:
    return sum(event["phase"] == THRASHING for event in events)
