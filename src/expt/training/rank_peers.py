"""How several processes come to the same decision when memory runs out in one of them.

In every attempt at a step all of them sum the same buckets of gradients, say whether they came as
far as that, step their optimizer if all did, and say whether that went well. One that fails before
does its part of the sums with zeros, so that nobody waits in vain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from torch import nn

from expt.memory.recovery.attempt import Failure, Success, release
from expt.memory.recovery.peers import PeerShortageError
from expt.memory.techniques.gradient_buckets import GradientBuckets
from expt.training.ranks import SeveralRanks

T = TypeVar("T")


class RankPeers:
    """The other processes of a step of several; implements `expt.memory.recovery.peers.Peers`."""

    alone = False

    def __init__(self, ranks: SeveralRanks, weights: list[nn.Parameter]) -> None:
        self._ranks = ranks
        self.sums = GradientBuckets(weights, ranks.begin_sum, self._share)
        self._stage = "begun"

    def begin(self) -> None:
        """Begin an attempt at a step."""
        self._stage = "begun"
        self.sums.begin()

    def settle(self, outcome: Success[T] | Failure, phase: str) -> Success[T] | Failure:
        """Return the outcome that all have; a failure is that of the first process that met one."""
        met = isinstance(outcome, Failure)
        if self._stage == "begun":
            assert met, "a step sums its gradients"
            release(self._ranks.device)  # the zeros need room
            self.sums.abandon()
            self._tell(True, [False] * self.sums.count)
        elif self._stage == "summed":
            if not self._ranks.maximum([float(met)])[0]:
                return outcome
        else:
            met = False  # it was told by another
        self.sums.begin()
        own = None
        if met:
            assert isinstance(outcome, Failure)
            own = replace(outcome, rank=self._ranks.rank, phase=phase)
        failures: list[Failure | None] = self._ranks.gathered(own)
        return next(failure for failure in failures if failure is not None)

    def every(self, value: bool) -> bool:
        """Tell whether this is true in all processes."""
        return not self._ranks.maximum([float(not value)])[0]

    def first(self, decide: Callable[[], T]) -> T:
        """Return what the first process decides."""
        return self._ranks.from_first(decide)

    def _share(self, present: list[bool]) -> list[bool]:
        """Tell which gradients there are here, and that memory was enough so far.

        Raises:
            PeerShortageError: in another process it was not.

        """
        failed, anywhere = self._tell(False, present)
        if failed:
            self._stage = "told"
            raise PeerShortageError("memory ran out in another process")
        self._stage = "summed"
        return anywhere

    def _tell(self, failed: bool, present: list[bool]) -> tuple[bool, list[bool]]:
        found = self._ranks.maximum([float(failed), *map(float, present)])
        return bool(found[0]), [bool(value) for value in found[1:]]
