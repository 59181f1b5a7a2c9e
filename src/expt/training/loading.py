"""Whether a run waits for its samples, and what would help, from what was measured.

A step takes as long as its own work and as the wait for its samples. What a worker needs to read
the samples of a step is measured there; divided by the time of a step it says how many workers
keep up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from expt.config.schema import LoaderConfig, usable_cores
from expt.units import format_bytes

BOUND = 1.1
"""Time of the steps with the wait for samples over the time without, from which it is said."""
MIN_STEPS = 5
"""Fewer steps say nothing: the first ones are slow for other reasons."""


@dataclass
class LoaderFigures:
    """What was seen of reading the training part's samples; seconds are sums.

    The wait for the first samples of an epoch is apart: it is the workers' start.
    """

    steps: int = 0
    waited_seconds: float = 0.0
    step_seconds: float = 0.0
    read_seconds: float = 0.0
    starting_seconds: float = 0.0
    batch_bytes: int = 0
    """Of the largest batch on the host."""
    worker_bytes: int | None = None
    """Host memory of all worker processes at their largest, shared pages counted once."""

    @property
    def ratio(self) -> float | None:
        """Time of the steps with the wait over the time without; None if too few were seen."""
        if self.steps < MIN_STEPS or self.step_seconds <= 0:
            return None
        return 1 + self.waited_seconds / self.step_seconds

    @property
    def bound(self) -> bool:
        """Whether training waits for samples so much that it is worth a line."""
        return self.ratio is not None and self.ratio > BOUND

    @property
    def workers_that_keep_up(self) -> int:
        """How many workers read as fast as steps are done."""
        return max(math.ceil(self.read_seconds / max(self.step_seconds, 1e-9)), 1)

    def since(self, before: LoaderFigures) -> LoaderFigures:
        """Return what was seen after `before`, which was kept then."""
        return LoaderFigures(
            self.steps - before.steps,
            self.waited_seconds - before.waited_seconds,
            self.step_seconds - before.step_seconds,
            self.read_seconds - before.read_seconds,
            self.starting_seconds - before.starting_seconds,
            self.batch_bytes,
            self.worker_bytes,
        )

    def record(self, settings: LoaderConfig) -> dict[str, Any]:
        """Return what ``result.json`` keeps."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "verdict": "bound by the loader" if self.bound else "keeps up",
            "num_workers": settings.num_workers,
            "ahead_bytes": ahead_bytes(settings, self.batch_bytes),
        }

    def verdict(self, settings: LoaderConfig, cheaper: Sequence[str]) -> str | None:
        """Return that training is bound by the loader and what would help; None if it is not.

        Args:
            settings: how samples were read.
            cheaper: settings that make a sample cheaper to read, the best first.

        """
        if not self.bound:
            return None
        share = self.waited_seconds / (self.waited_seconds + self.step_seconds)
        each = f"{1000 * self.step_seconds / self.steps:.0f} ms"
        read = f"{1000 * self.read_seconds / self.steps:.0f} ms"
        advice = self._advice(settings)
        ways = [*([advice] if advice else []), *cheaper]
        return (
            f"bound by the loader: {100 * share:.0f} % of training was spent waiting for samples "
            f"(a step takes {each}, reading its samples {read} of one worker). "
            f"What would help: {', or '.join(ways) or 'faster storage, or smaller files'}"
        )

    def _advice(self, settings: LoaderConfig) -> str | None:
        needed, own, cores = self.workers_that_keep_up, settings.num_workers, usable_cores()
        if own < min(needed, cores):
            return f"loader.num_workers={min(needed, cores)}"
        if own > needed and own > 0:  # they are fast enough on the whole, and late now and then
            return f"loader.prefetch_factor={2 * settings.prefetch_factor}"
        return None


def ahead_bytes(settings: LoaderConfig, batch_bytes: int) -> int:
    """Return the host memory of the batches that workers hold ready."""
    return settings.num_workers * settings.prefetch_factor * batch_bytes


def announcement(settings: LoaderConfig, batch_bytes: int) -> str | None:
    """Return what the workers will hold in host memory, in a line; None without workers."""
    if not settings.num_workers:
        return None
    return (
        f"{settings.num_workers} workers hold up to "
        f"{settings.num_workers * settings.prefetch_factor} batches of {format_bytes(batch_bytes)} "
        f"ready: {format_bytes(ahead_bytes(settings, batch_bytes))} of host memory beside their own"
    )


def memory_of(processes: Sequence[int]) -> int:
    """Return the memory of some processes in bytes, what they share counted once.

    Where the system does not tell what is shared, pages of several count for each.
    """
    import psutil

    total = 0
    for process in processes:
        try:
            found = psutil.Process(process).memory_full_info()
        except (psutil.Error, OSError):
            continue  # it has just ended, or it is not ours
        total += getattr(found, "pss", 0) or found.rss
    return total
