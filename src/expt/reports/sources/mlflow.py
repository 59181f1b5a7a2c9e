"""Runs from an MLflow store: the children of a run, or what a filter finds in an experiment."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from expt.errors import ConfigError
from expt.reports.records import KIND_STATES, RunRecord, RunSet, State
from expt.reports.sources.folders import OUT_OF_MEMORY
from expt.tracking.query import NotThereError, StoredRun, runs_of_experiment, runs_under

RUN_ID = re.compile(r"[0-9a-f]{32}")
STATUSES: dict[str, State] = {"FINISHED": "completed", "FAILED": "failed", "KILLED": "stopped"}


def is_run_id(text: str) -> bool:
    """Tell whether a text can be the id of an MLflow run."""
    return RUN_ID.fullmatch(text) is not None


def runs_by_id(uri: str | None, run_ids: Sequence[str], metric: str) -> RunSet:
    """Return the training runs under runs of a tracking store.

    Raises:
        ConfigError: there is no store, no such run, or no training under it.

    """
    try:
        found = [run for run_id in run_ids for run in runs_under(_given(uri), run_id)]
    except NotThereError as error:
        raise ConfigError(f"report.runs: {error}; tracking.uri says where to look") from error
    return _as_set(found, f"MLflow run {', '.join(run_ids)}", metric)


def runs_by_filter(uri: str | None, experiment: str, words: str | None, metric: str) -> RunSet:
    """Return the training runs of an experiment.

    Raises:
        ConfigError: there is no store, no such experiment, or no training in it.

    """
    try:
        found = runs_of_experiment(_given(uri), experiment, words or "")
    except NotThereError as error:
        raise ConfigError(
            f"report.experiment={experiment}: {error}; tracking.uri says where to look"
        ) from error
    return _as_set(
        found, f"MLflow experiment {experiment}" + (f", {words}" if words else ""), metric
    )


def _given(uri: str | None) -> str:
    if uri is None:
        raise ConfigError(
            "these runs are to be read from MLflow, and tracking.uri names no store; give "
            "tracking.uri=..., or folders as report.runs"
        )
    return uri


def _as_set(found: Sequence[StoredRun], source: str, metric: str) -> RunSet:
    """Keep what is a training, in the order of their starts."""
    trainings = {run.run_id: run for run in found if _is_training(run)}
    if not trainings:
        raise ConfigError(
            f"{source}: there is no training run ({len(found)} of other kinds); give another "
            "experiment, filter or run"
        )
    records = [as_record(run, metric) for run in trainings.values()]
    return RunSet(tuple(sorted(records, key=lambda record: record.started)), source)


def _is_training(run: StoredRun) -> bool:
    """Tell a training, or a trial that would have been one, from everything else."""
    if run.tags.get("trial.kind") == "duplicate":
        return False
    return "model._target_" in run.parameters or run.tags.get("kind") == "trial"


def as_record(run: StoredRun, metric: str) -> RunRecord:
    """Return what the store knows of a run."""
    state: State = STATUSES.get(run.status, "unfinished")
    detail = "" if state == "completed" else run.tags.get("stop_reason", "")
    if state == "failed" and detail.startswith(OUT_OF_MEMORY):
        state, detail = "out_of_memory", "ran out of memory"
    kind = run.tags.get("trial.kind")
    state = KIND_STATES.get(str(kind), state)
    metrics = {name: value for name, value in run.metrics.items() if math.isfinite(value)}
    number = run.tags.get("trial.number", "")
    preset = run.tags.get("preset")

    def count(name: str) -> int | None:
        value = metrics.get(f"memory/{name}")
        return None if value is None else round(value)

    return RunRecord(
        f"trial {number}" if number else run.name,
        state,
        error=metrics.get(metric) if state in ("completed", "over_budget") else None,
        metrics=metrics,
        settings=run.parameters,
        preset=None if preset == "None" else preset,
        device=run.tags.get("device"),
        predicted_peak_bytes=count("predicted_peak_bytes"),
        peak_allocated_bytes=count("peak_allocated_bytes"),
        peak_reserved_bytes=count("peak_reserved_bytes"),
        prediction_error=metrics.get("memory/prediction_error"),
        budget_bytes=count("budget_bytes"),
        seconds=metrics.get("seconds"),
        started=run.started_seconds,
        run_dir=run.tags.get("run_dir"),
        run_id=run.run_id,
        trial=int(number) if number.isdigit() else None,
        detail=detail,
    )
