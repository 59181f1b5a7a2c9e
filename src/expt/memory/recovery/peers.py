"""What processes that train one model together tell each other when memory runs out in one of them.

A step may only be taken again if all of them take it again, with the same techniques. `Alone` is
for a process without peers; `expt.training.ranks` has the other. No torch at import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class PeerShortageError(RuntimeError):
    """Memory ran out in another process of the same step."""


class Peers(Protocol):
    """The other processes of a step, as `expt.memory.recovery.recovery.Recovery` needs them."""

    alone: bool
    """Whether there are none."""

    def begin(self) -> None:
        """Begin an attempt at a step."""

    def settle(self, outcome: Any, phase: str) -> Any:
        """Return the outcome that all have: a failure, if there is one anywhere.

        Args:
            outcome: of this process, as `expt.memory.recovery.attempt.attempt` gives it; failed
                work holds nothing any more.
            phase: in which it failed, if it did.

        """

    def every(self, value: bool) -> bool:
        """Tell whether this is true in all of them."""

    def first(self, decide: Callable[[], T]) -> T:
        """Return what the first of them decides."""


class Alone:
    """No others."""

    alone = True

    def begin(self) -> None:
        """Do nothing."""

    def settle(self, outcome: Any, phase: str) -> Any:
        """Return the outcome."""
        return outcome

    def every(self, value: bool) -> bool:
        """Return the value."""
        return value

    def first(self, decide: Callable[[], T]) -> T:
        """Decide."""
        return decide()
