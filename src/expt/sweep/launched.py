"""Trials over a Hydra launcher (``hydra/launcher=submitit_slurm``, ``ray``): a batch at a time.

A launcher returns when all of its jobs have ended, so nothing is seen of an epoch before that:
trials are not pruned, and a batch waits for its slowest. The search's folder must be one that
the machines share.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.plugins.launcher import Launcher

from expt.sweep.endings import Ending, outcome_of
from expt.sweep.running import Job, Stop, combined, setting
from expt.sweep.trials import TrialOutcome

log = logging.getLogger(__name__)

PRUNED_LATE = (
    "note: over hydra/launcher={launcher} epochs are not seen before the end, so search.pruner="
    "{pruner} ends nothing early"
)


class LaunchedTrial:
    """A trial in a batch; it has ended when the batch has."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.outcomes: list[TrialOutcome] = []

    @property
    def next_seed(self) -> int | None:
        """Return the index of the seed to run next, None if there is nothing left to run."""
        good = all(outcome.kind == "complete" for outcome in self.outcomes)
        return len(self.outcomes) if good and len(self.outcomes) < len(self.job.seeds) else None

    def poll(self) -> TrialOutcome | None:
        """Return how it ended, None while its batch was not launched."""
        if not self.outcomes or self.next_seed is not None:
            return None
        return combined(self.outcomes, self.job.seeds)

    def epochs(self) -> list[tuple[int, float]]:
        """Return nothing: it runs elsewhere."""
        return []

    def stop(self, why: Stop) -> None:
        """Do nothing: the launcher ends its jobs itself."""

    def kill(self) -> None:
        """Do nothing: the launcher ends its jobs itself."""


@dataclass
class LauncherRunner:
    """Collects trials and hands them to a launcher together.

    Args:
        launcher: of Hydra, set up.
        folder: of the search.

    """

    launcher: Launcher
    folder: Path
    prunes: bool = False
    _batch: list[LaunchedTrial] = field(default_factory=list)

    def start(self, job: Job) -> LaunchedTrial:
        """Put a trial into the batch."""
        job.prepare()
        trial = LaunchedTrial(job)
        self._batch.append(trial)
        return trial

    def flush(self) -> None:
        """Launch the batch, once per seed, and wait for its end."""
        batch, self._batch = self._batch, []
        while left := [trial for trial in batch if trial.next_seed is not None]:
            lines = [self._lines(trial) for trial in left]
            try:
                returns: Sequence[Any] = self.launcher.launch(lines, left[0].job.number)
            except Exception as error:
                # One job that died takes the others' return values with it; their files stay.
                log.warning("hydra's launcher: %s", " ".join(str(error).split())[:300])
                returns = [None] * len(left)
            for trial, returned in zip(left, returns, strict=True):
                trial.outcomes.append(self._outcome(trial, returned))

    def _lines(self, trial: LaunchedTrial) -> list[str]:
        index = trial.next_seed
        assert index is not None
        subfolder = trial.job.run_folder(index).relative_to(self.folder)
        return [
            *trial.job.run_lines(index),
            setting("hydra.sweep.dir", self.folder),
            f"hydra.sweep.subdir={subfolder}",
        ]

    def _outcome(self, trial: LaunchedTrial, returned: Any) -> TrialOutcome:
        code, said = -9, None
        if returned is not None:
            try:
                value = returned.return_value
                code = int(getattr(value, "exit_code", 0))
                said = getattr(value, "error", None)
            except Exception as error:  # raised again by Hydra, from the job
                code, said = 1, error
        index = trial.next_seed
        assert index is not None
        folder = trial.job.run_folder(index)
        found = outcome_of(folder, Ending(code), trial.job.budget_bytes)
        if said is not None and found.kind in ("refused", "crashed"):
            text = " ".join(str(said).split())[:300]
            return TrialOutcome(found.kind, seconds=found.seconds, error=text, run_id=found.run_id)
        return found
