"""What is kept of a search besides the study: ``sweep.json``, a parent run, a run per trial.

A trial's own process records its training; this adds the trial's number, state and prediction,
and closes the run whatever became of the process. Everything is written to journals first and
sent by one thread in the background, so that no trial waits for a tracking server.

The study says how a trial ended, and the tracker says the same, each in its own words: see
`expt.result.OUTCOMES`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from optuna.study import Study
from optuna.trial import FrozenTrial

from expt.config.schema import TrackingConfig
from expt.job import Metric
from expt.search.metric import EARLIER
from expt.search.trial import CONSTRAINT, kind_of
from expt.search.winner import FILE_NAME, SweepSummary, settings_of
from expt.tracking.journal import State, has_ended, is_closed, read_header, read_records
from expt.tracking.tracker import NullTracker, Tracker

if TYPE_CHECKING:
    from expt.tracking.mlflow import DeferredTracker

PREFIX = "trial."
Status = Literal["FINISHED", "FAILED", "KILLED"]
"""Of a run, in the tracker's words."""


class Records:
    """Keeps the records of one worker of a search; several workers may share a folder.

    Args:
        tracking: where runs are recorded.
        folder: of the search, where the parent's journal and ``sweep.json`` are.
        study_name: of the search.
        metric: that trials are compared by.

    """

    def __init__(
        self, tracking: TrackingConfig, folder: Path, study_name: str, metric: Metric = EARLIER
    ) -> None:
        self.tracking, self.folder, self.study_name = tracking, folder, study_name
        self.metric = metric
        self.parent: Tracker = NullTracker()
        self._deliveries = None
        if tracking.uri is not None:
            from expt.tracking.delivery import Deliveries

            self.parent = tracker = self._tracker(folder, None)
            self._deliveries = Deliveries(tracker.target)

    def open(self, parameters: Mapping[str, Any]) -> None:
        """Open the parent run, or go on with it."""
        self.parent.start(
            f"search-{self.study_name}",
            parameters,
            {"kind": "search", "study": self.study_name, "run_dir": str(self.folder)},
        )
        self._send(self.folder)

    def start(self, number: int, folder: Path, own_process: bool = True) -> None:
        """Open a trial's run before its process does; `own_process` will send it.

        One that goes on may have been sent to another store before.
        """
        if self.tracking.uri is None:
            return
        tracker = self._tracker(folder, self.folder)
        if read_header(folder) is None:
            tracker.start(f"{self.study_name}-{number:03d}", {}, self._origin(number, folder))
        else:
            tracker.direct()
        tracker.close()
        if not own_process:
            self._send(folder)

    def told(self, trial: FrozenTrial, folder: Path) -> None:
        """Record how a trial ended, and close its run."""
        if self.tracking.uri is None:
            return
        tracker = self._tracker(folder, self.folder)
        untracked = read_header(folder) is None
        if untracked:  # never started, or without a tracker, so that nobody else says what it was
            name = f"{self.study_name}-{trial.number:03d}"
            tracker.start(name, trial.params, self._origin(trial.number, folder))
        tracker.tags(tags_of(trial))
        figures = {
            "memory/predicted_peak_bytes": trial.user_attrs.get("predicted_peak_bytes"),
            f"constraint/{CONSTRAINT}_gib": trial.constraints.get(CONSTRAINT),
        }
        if trial.values and (untracked or trial.user_attrs.get("values_by_seed")):
            name = f"val/{self.metric.name}"
            figures |= {name: trial.values[0], f"{name}_spread": trial.user_attrs.get("spread")}
        known = {name: float(value) for name, value in figures.items() if value is not None}
        if known:
            tracker.metrics(known, 0)
        kind = kind_of(trial)
        assert kind is not None
        tracker.finish(kind.columns.tracker_status)
        self._send(folder)
        self._send_seeds(folder, kind.columns.tracker_status)

    def reconcile(self, study: Study, folder_of: Any) -> None:
        """Record trials that were told when a worker was killed before it could say so.

        Trials that another store has go to this one as well, with the runs of their seeds.
        """
        if self.tracking.uri is None:
            return
        for trial in study.get_trials(deepcopy=False):
            if not trial.state.is_finished() or kind_of(trial) is None:
                continue
            folder = folder_of(trial.number)
            if not recorded(folder, trial):
                self.told(trial, folder)
                continue
            if not self._arrived(folder):
                self._send(folder)
            self._send_seeds(folder)

    def summary(self, summary: SweepSummary) -> None:
        """Rewrite ``sweep.json``, and tell the parent run how far the search is."""
        summary.save(self.folder)
        figures = {
            name: float(getattr(summary, name))
            for name in ("n_trials", "finished", "failed", "pruned", "infeasible_measured",
                         "infeasible_predicted", "duplicates")
        }  # fmt: skip
        if summary.best is not None:
            name = f"val/{summary.compared_by.name}"
            figures[f"best/{name}"] = float(summary.best[name])
            peak = summary.best["peak_allocated_bytes"]
            if peak is not None:
                figures["best/peak_allocated_bytes"] = float(peak)
        self.parent.metrics(figures, summary.finished)
        self._send(self.folder)

    def close(self, status: Status, summary: SweepSummary) -> None:
        """Close the parent run, with the winner and the files, and send what is left."""
        best = summary.best
        if best is not None:
            self.parent.tags(
                {"best.trial": str(best["trial"]), "best.run_id": str(best["run_id"])}
                | {f"best.{name}": str(value) for name, value in settings_of(best).items()}
            )
            figures = {k: v for k, v in best.items() if k.startswith("test/")}
            if figures:
                self.parent.metrics(figures, summary.finished)
        self.parent.artifact(self.folder / FILE_NAME)
        for page in self.folder.glob("report.html"):
            self.parent.artifact(page)
        for plot in sorted(self.folder.glob("plots/*.png")):
            self.parent.artifact(plot, "plots")
        self.parent.finish(status)
        self._send(self.folder)
        if self._deliveries is not None:
            self._deliveries.close(self.tracking.flush_seconds)

    def _tracker(self, folder: Path, parent: Path | None) -> DeferredTracker:
        from expt.tracking.mlflow import DeferredTracker

        assert self.tracking.uri is not None
        return DeferredTracker(
            uri=self.tracking.uri,
            experiment=self.tracking.experiment,
            directory=folder,
            artifact_root=Path(self.tracking.artifacts) if self.tracking.artifacts else None,
            parent_directory=parent,
            flush_seconds=self.tracking.flush_seconds,
        )

    def _origin(self, number: int, folder: Path) -> dict[str, str]:
        return {
            "kind": "trial",
            "study": self.study_name,
            f"{PREFIX}number": str(number),
            "run_dir": str(folder),
        }

    def _send_seeds(self, folder: Path, status: Status | None = None) -> None:
        """Send the runs of a trial's seeds that this store does not have, after the trial.

        With `status` those that are open are closed first: their processes were killed.
        """
        for seed in sorted(folder.glob("seed_*")):
            if read_header(seed) is None:
                continue
            if status is not None and not has_ended(seed):
                self._tracker(seed, folder).finish(status)
            if not self._arrived(seed):
                self._send(seed)

    def _arrived(self, folder: Path) -> bool:
        """Tell whether the store of this search, not another one, has all of a journal."""
        state = State.load(folder)
        there = (self.parent.uri, self.tracking.experiment)
        return state is not None and (state.uri, state.experiment) == there and is_closed(folder)

    def _send(self, folder: Path) -> None:
        if self._deliveries is not None:
            self._deliveries.add(folder)


def tags_of(trial: FrozenTrial) -> dict[str, str]:
    """Return what a trial's run says about it."""
    known = {
        name: value if isinstance(value, str) else json.dumps(value)
        for name, value in trial.user_attrs.items()
        if value is not None and name not in ("worker", "run_dir", "run_id")
    }
    known |= {"number": str(trial.number), "state": trial.state.name}
    known |= {f"param.{name}": str(value) for name, value in trial.params.items()}
    if CONSTRAINT in trial.constraints:
        known["constraint"] = repr(trial.constraints[CONSTRAINT])
    return {f"{PREFIX}{name}": value for name, value in known.items()}


def recorded(folder: Path, trial: FrozenTrial) -> bool:
    """Tell whether a trial's end is in its journal."""
    if read_header(folder) is None:
        return False
    told = closed = False
    for record in read_records(folder, "start", "tags", "end"):
        if record["kind"] == "tags":
            told = told or record["values"].get(f"{PREFIX}state") == trial.state.name
        elif record["kind"] == "start":
            told = closed = False
        else:
            closed = told
    return closed
