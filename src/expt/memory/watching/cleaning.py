"""Tidying up memory between two steps: callbacks, garbage collection, the device's cache.

Nothing is tidied while an exception is being handled: its traceback still holds the tensors, so
that there would be nothing to gain; it is made up for when it is next asked.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expt.memory.watching.gauges import CudaGauge, Gauge

log = logging.getLogger(__name__)

PATIENCE = 16
"""Largest factor on the time between two cleanups, which doubles while they do not help."""


@dataclass(frozen=True)
class Cleanup:
    """One tidying up: when, why, and what it gave back on each device."""

    step: int
    reason: str
    freed_bytes: dict[str, int]


class Cleaner:
    """Tidies up and remembers it.

    Args:
        gauges: read before and after.
        interval: seconds between two cleanups of `when_tight`; doubles while they do not help.

    """

    def __init__(self, gauges: Sequence[Gauge], interval: float) -> None:
        self.callbacks: list[Callable[[], object]] = []
        self.done: list[Cleanup] = []
        self.seconds = 0.0
        self.pending: str | None = None
        """Why to tidy up as soon as no exception is being handled any more."""
        self._gauges = gauges
        self._interval = interval
        self._patience = 1
        self._next = 0.0

    def clean(self, step: int, reason: str) -> Cleanup | None:
        """Call the callbacks, collect garbage, empty the cache; None if it is put off."""
        if sys.exception() is not None:
            self.pending = reason
            return None
        self.pending = None
        began = time.monotonic()
        before = {gauge.name: gauge.read(step) for gauge in self._gauges}
        for callback in self.callbacks:
            try:
                callback()
            except Exception as error:  # a cache that cannot be cleared must not end the training
                log.warning("a cleanup callback failed: %s: %s", type(error).__name__, error)
        gc.collect()
        if any(isinstance(gauge, CudaGauge) for gauge in self._gauges):
            sys.modules["torch"].cuda.empty_cache()
        freed = {}
        for gauge in self._gauges:
            after, earlier = gauge.read(step), before[gauge.name]
            held = (r.reserved_bytes or r.allocated_bytes for r in (earlier, after))
            freed[gauge.name] = next(held) - next(held)
        done = Cleanup(step, reason, freed)
        self.done.append(done)
        self.seconds += time.monotonic() - began
        return done

    def when_tight(self, step: int, tight: str | None) -> None:
        """Clean if memory is tight (`tight` says where) and the last time was long enough ago."""
        now = time.monotonic()
        if tight is None:
            self._patience = 1
        elif now >= self._next:
            self.clean(step, tight)
            self._next = now + self._interval * self._patience
            self._patience = min(2 * self._patience, PATIENCE)
