"""Trials over a Hydra launcher (``hydra/launcher=submitit_slurm``, ``ray``): a batch at a time.

A launcher returns when all of its jobs have ended, so nothing is seen of an epoch before that:
trials are not pruned, and a batch waits for its slowest. The search's folder must be one that
the machines share: what a trial left there is what is believed, since a launcher gives back
nothing at all once one of its jobs was lost.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher

from expt.config.compose import setting
from expt.errors import SearchError
from expt.result import FILE_NAME, Outcome
from expt.search.ending import Ending, outcome_of
from expt.search.reservation import BEAT_SECONDS, beating
from expt.search.runner import Job, Stop, combined
from expt.search.trial import TrialOutcome

log = logging.getLogger(__name__)

SILENT_SECONDS = 180.0
"""A job that has written nothing for so long, after its launcher gave up, is dead."""
LOOK_SECONDS = 1.0
PRUNED_LATE = (
    "note: over hydra/launcher={launcher} epochs are not seen before the end, so search.pruner="
    "{pruner} ends nothing early"
)


UNLIMITED = (
    "note: over hydra/launcher={launcher} search.trial_time_limit_seconds ends nothing; give the "
    "launcher a limit of its own (submitit: hydra.launcher.timeout_min)"
)


class LaunchedTrial:
    """A trial in a batch; it has ended when the batch has."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outcomes: list[TrialOutcome] = []
        self.wanted = True

    @property
    def next_seed(self) -> int | None:
        """Return the index of the seed to run next, None if there is nothing left to run."""
        good = all(outcome.kind is Outcome.completed for outcome in self.outcomes)
        return len(self.outcomes) if good and len(self.outcomes) < len(self.job.seeds) else None

    def poll(self) -> TrialOutcome | None:
        """Return how it ended, None while its batch is to be launched."""
        if self.outcomes and self.next_seed is None:
            return combined(self.outcomes, self.job.seeds)
        return None if self.wanted else TrialOutcome(Outcome.killed, error="it was not launched")

    def epochs(self) -> list[tuple[int, float]]:
        """Return nothing: it runs elsewhere."""
        return []

    def stop(self, why: Stop) -> None:
        """Do as `kill` does: the launcher ends its jobs itself."""
        self.kill()

    def kill(self) -> None:
        """Leave it out of what is launched from now on; what was launched ends by itself."""
        self.wanted = False


@dataclass
class LauncherRunner:
    """Collects trials and hands them to a launcher together.

    Args:
        launcher: of Hydra, set up.
        folder: of the search.
        silent_seconds: see `SILENT_SECONDS`.
        beat: called from a thread now and then while a batch is waited for.

    """

    launcher: Launcher
    folder: Path
    prunes: bool = False
    silent_seconds: float = SILENT_SECONDS
    beat: Callable[[], None] | None = None
    _batch: list[LaunchedTrial] = field(default_factory=list)

    def start(self, job: Job) -> LaunchedTrial:
        """Put a trial into the batch."""
        job.prepare()
        trial = LaunchedTrial(job)
        self._batch.append(trial)
        return trial

    def flush(self) -> None:
        """Launch the batch, once per seed, and wait for its end.

        Raises:
            SearchError: the launcher started none of the jobs; the trials are left to be done.

        """
        batch, self._batch = [trial for trial in self._batch if trial.wanted], []
        if batch:
            with beating(self.beat, BEAT_SECONDS):
                self._launch(batch)

    def _launch(self, batch: Sequence[LaunchedTrial]) -> None:
        while left := [one for one in batch if one.wanted and one.next_seed is not None]:
            folders = [_next_folder(trial) for trial in left]
            before = [_last_written(folder) for folder in folders]
            lines = [self._lines(trial) for trial in left]
            lost = ""
            try:
                returns: Sequence[Any] = self.launcher.launch(lines, left[0].job.number)
            except Exception as error:
                lost = " ".join(str(error).split())[:300] or type(error).__name__
                if [_last_written(folder) for folder in folders] == before:
                    raise SearchError(
                        f"hydra's launcher started none of its jobs: {lost}. Nothing is lost: "
                        "start the same command again when it can"
                    ) from error
                log.warning("hydra's launcher lost a job: %s", lost)
                for folder in folders:
                    self._await(folder)
                returns = [None] * len(left)
            for trial, returned in zip(left, returns, strict=True):
                trial.outcomes.append(self._outcome(trial, returned, lost))

    def _await(self, folder: Path) -> None:
        """Wait for a job that may still run, though its launcher has given up on its batch."""
        while not (folder / FILE_NAME).exists():
            if time.time() - _last_written(folder) > self.silent_seconds:
                return
            time.sleep(LOOK_SECONDS)

    def _lines(self, trial: LaunchedTrial) -> list[str]:
        index = trial.next_seed
        assert index is not None
        subfolder = _next_folder(trial).relative_to(self.folder)
        return [
            *trial.job.run_lines(index),
            setting("hydra.sweep.dir", self.folder),
            f"hydra.sweep.subdir={subfolder}",
        ]

    def _outcome(self, trial: LaunchedTrial, returned: Any, lost: str) -> TrialOutcome:
        code, said = -9, None
        if returned is not None:
            try:
                value = returned.return_value
                code = int(getattr(value, "exit_code", 0))
                said = getattr(value, "error", None)
            except Exception as error:  # raised again by Hydra, from the job
                code, said = 1, error
        job = trial.job
        found = outcome_of(
            _next_folder(trial), Ending(code), job.budget_bytes, job.metric, job.data
        )
        if returned is None and found.kind is Outcome.killed:
            return replace(found, error=f"lost by hydra's launcher: {lost}")
        if said is not None and found.kind in (Outcome.refused, Outcome.failed):
            return replace(found, error=" ".join(str(said).split())[:300])
        return found


def _next_folder(trial: LaunchedTrial) -> Path:
    index = trial.next_seed
    assert index is not None
    return trial.job.run_folder(index)


def _last_written(folder: Path) -> float:
    """Return when anything of a job was last written, in seconds of the epoch; 0 for never."""
    times = [0.0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # renamed while we look
            times.append(path.stat().st_mtime)
    return max(times)
