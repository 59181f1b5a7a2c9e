"""Changes to a run from what is seen of it: workers, where clips are normalised, micro-batches.

Only for a data set with ``tune`` (`expt.job.Tunable`). Nothing of it changes what a step computes:
the batch of a step, its samples and their order stay as they are. Every change is told, recorded,
and carried over to a run that is resumed; there are few of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from expt.config.schema import LoaderConfig, usable_cores
from expt.job import DataSet, Tunable
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.techniques import Techniques
from expt.training.batches import Batches
from expt.training.checkpoint import Progress
from expt.training.loading import LoaderFigures
from expt.units import format_bytes

WORKERS, PREPROCESS = "loader.num_workers", "data.preprocess_on"
PARTS = "memory.gradient_accumulation"
MAX_CHANGES = 6
"""In a run."""
IDLE = 0.01
"""Part of the time spent waiting below which a worker may be too many."""
ROOM, CROWDED = 0.45, 0.9
"""Parts of the limit below which micro-batches may double, and above which they are halved."""


@dataclass(frozen=True)
class Change:
    """A setting, its new value, and what was seen."""

    setting: str
    value: Any
    reason: str

    def line(self) -> str:
        """Return it for a reader."""
        return f"tuned: {self.setting}={self.value} from the next epoch on ({self.reason})"


def loader_change(
    seen: LoaderFigures, settings: LoaderConfig, preprocess_on: str | None
) -> Change | None:
    """Return what would read samples faster, or as fast with fewer workers."""
    ratio, cores = seen.ratio, usable_cores()
    if ratio is None:
        return None
    waiting = f"{100 * (ratio - 1) / ratio:.0f} % of the time was spent waiting for samples"
    needed = min(seen.workers_that_keep_up, cores)
    if seen.bound and settings.num_workers < needed:
        return Change(WORKERS, needed, waiting)
    if seen.bound and preprocess_on == "worker":
        return Change(PREPROCESS, "device", waiting)
    if ratio - 1 < IDLE and settings.num_workers > seen.workers_that_keep_up:
        fewer = seen.workers_that_keep_up
        reason = f"{fewer} read as fast as steps are done"
        return Change(WORKERS, fewer, reason)
    return None


def parts_change(
    techniques: Techniques,
    batch_size: int,
    peak_bytes: int | None,
    limit_bytes: int | None,
    exact: bool,
) -> Change | None:
    """Return the number of parts of a batch that uses memory better.

    Args:
        techniques: those in force.
        batch_size: of a step, which stays.
        peak_bytes: measured.
        limit_bytes: the budget; None: there is no limit to go by.
        exact: whether cutting a batch changes nothing; with batch statistics it does.

    """
    if not peak_bytes or not limit_bytes or not exact:
        return None
    parts, share = techniques.gradient_accumulation, peak_bytes / limit_bytes
    seen = f"the peak is {format_bytes(peak_bytes)} of {format_bytes(limit_bytes)}"
    if share < ROOM and parts > 1:
        return Change(PARTS, -(-parts // 2), seen)
    if share > CROWDED and 2 * parts <= batch_size:
        return Change(PARTS, 2 * parts, seen)
    return None


@dataclass
class Tuner:
    """Looks at a run after every epoch, and changes at most one setting of each kind.

    Args:
        data: whose samples are read.
        limit_bytes: the budget; None: there is none, and parts of a batch stay as they are.
        on_parts: called when the parts of a batch change, for what was captured with others.

    """

    data: Tunable
    limit_bytes: int | None
    on_parts: Callable[[], None]

    def __post_init__(self) -> None:
        self._seen = LoaderFigures()

    def after_epoch(self, progress: Progress, batches: Batches, recovery: Recovery) -> None:
        """Change what would help, tell, and keep it in `progress`."""
        seen = batches.figures.since(self._seen)
        if seen.ratio is not None:  # else more epochs are looked at together
            self._seen = replace(batches.figures)
        # On the CPU a peak is of the run's first steps, and none is measured after a change.
        fresh = batches.device.type == "cuda" or all(k["setting"] != PARTS for k in progress.tuned)
        peak = progress.history[-1].get("peak_allocated_bytes") if progress.history else None
        found = [
            loader_change(seen, batches.settings, self.data.preprocess_on),
            parts_change(
                recovery.techniques,
                batches.data.batch_size,
                int(peak) if peak and fresh else None,
                self.limit_bytes,
                exact=not recovery.over_the_batch,
            ),
        ]
        for change in found:
            if change is not None and len(progress.tuned) < MAX_CHANGES:
                progress.tuned.append({**asdict(change), "epoch": progress.epoch})
                print(change.line(), flush=True)
                self._make(change, batches, recovery)

    def restore(self, progress: Progress, batches: Batches) -> None:
        """Make the changes of the run that is resumed; parts of a batch are recovery's to keep."""
        for kept in progress.tuned:
            change = Change(kept["setting"], kept["value"], kept["reason"])
            if change.setting != PARTS:
                self._make(change, batches, None)

    def _make(self, change: Change, batches: Batches, recovery: Recovery | None) -> None:
        if change.setting == PARTS:
            assert recovery is not None
            recovery.set_parts(int(change.value))
            self.on_parts()
            return
        batches.close()
        batches.figures = LoaderFigures()  # what is said at the end is of the settings at the end
        self._seen = LoaderFigures()
        if change.setting == WORKERS:
            batches.settings = replace(batches.settings, num_workers=int(change.value))
        else:
            self.data.preprocess_on = str(change.value)


class NoTuner:
    """Changes nothing."""

    def after_epoch(self, progress: Progress, batches: Batches, recovery: Recovery) -> None:
        """Do nothing."""

    def restore(self, progress: Progress, batches: Batches) -> None:
        """Do nothing."""


def tuner_for(
    data: DataSet, limit_bytes: int | None, on_parts: Callable[[], None], processes: int = 1
) -> Tuner | NoTuner:
    """Return what tunes a run of this data set, if that is wanted.

    Several processes that train together would each see something else.
    """
    if isinstance(data, Tunable) and data.tune and processes > 1:
        print(
            f"data.tune=true: {processes} processes train together, and settings stay as they are"
        )
    elif isinstance(data, Tunable) and data.tune:
        return Tuner(data, limit_bytes, on_parts)
    return NoTuner()
