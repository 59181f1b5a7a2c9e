"""Runs from an MLflow store: the children of a run, or what a filter finds in an experiment."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

from expt.errors import ConfigError
from expt.reports.records import RunRecord, RunSet, of_seeds, with_prediction_error
from expt.reports.sources.folders import described, detail_of
from expt.result import Outcome, RunResult, Status
from expt.tracking.metric_tags import metrics_of_tags
from expt.tracking.query import NotThereError, StoredRun, runs_of_experiment, runs_under
from expt.tracking.store import PARENT_TAG
from expt.units import without_gib

RUN_ID = re.compile(r"[0-9a-f]{32}")
STATUSES: dict[str, Status] = {
    "FINISHED": "completed", "FAILED": "failed", "KILLED": "stopped",
}  # fmt: skip
"""From MLflow's word for the end of a run to the one in its ``result.json``."""
STUDY, PARAMETER, SPREAD = "study", "trial.param.", "_spread"
"""Of a trial's run: the tag of its search, how tags of its settings begin, and a metric ends."""


def is_run_id(text: str) -> bool:
    """Tell whether a text can be the id of an MLflow run."""
    return RUN_ID.fullmatch(text) is not None


def runs_by_id(uri: str | None, run_ids: Sequence[str]) -> RunSet:
    """Return the training runs under runs of a tracking store.

    Raises:
        ConfigError: there is no store, no such run, or no training under it.

    """
    try:
        found = [run for run_id in run_ids for run in runs_under(_given(uri), run_id)]
    except NotThereError as error:
        raise ConfigError(f"report.runs: {error}; tracking.uri says where to look") from error
    return _as_set(found, f"MLflow run {', '.join(run_ids)}")


def runs_by_filter(uri: str | None, experiment: str, words: str | None) -> RunSet:
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
    return _as_set(found, f"MLflow experiment {experiment}" + (f", {words}" if words else ""))


def _given(uri: str | None) -> str:
    if uri is None:
        raise ConfigError(
            "these runs are to be read from MLflow, and tracking.uri names no store; give "
            "tracking.uri=..., or folders as report.runs"
        )
    return uri


def _as_set(found: Sequence[StoredRun], source: str) -> RunSet:
    """Keep what is a training, in the order of their starts; the seeds of a trial are one."""
    trainings = {run.run_id: run for run in found if _is_training(run)}
    if not trainings:
        raise ConfigError(
            f"{source}: there is no training run ({len(found)} of other kinds); give another "
            "experiment, filter or run"
        )
    seeds: dict[str, list[RunRecord]] = {}
    for run in trainings.values():
        parent = trainings.get(run.tags.get(PARENT_TAG, ""))
        if parent is not None and _is_trial(parent):
            seeds.setdefault(parent.run_id, []).append(as_record(run))
    parts = {one.run_id for own in seeds.values() for one in own}
    whole = [run for run in trainings.values() if run.run_id not in parts]
    several = len({run.tags.get(STUDY) for run in whole if _is_trial(run)}) > 1
    records = []
    for run in whole:
        record = as_record(run)
        if run.run_id in seeds:
            record = _joined(record, of_seeds(seeds[run.run_id]))
            if "trial.oom_events" not in run.tags:  # else they are of different settings
                record = with_prediction_error(record)
        if several and _is_trial(run):
            record = replace(record, name=f"{run.tags.get(STUDY, run.name)}/{record.name}")
        records.append(record)
    return RunSet(tuple(sorted(records, key=lambda record: record.started)), source)


def _is_training(run: StoredRun) -> bool:
    """Tell a training, or a trial that would have been one, from everything else."""
    if Outcome.parse(run.tags.get("trial.kind")) is Outcome.duplicate:
        return False
    return "model._target_" in run.parameters or _is_trial(run)


def _is_trial(run: StoredRun) -> bool:
    return run.tags.get("kind") == "trial"


def _joined(trial: RunRecord, seeds: RunRecord) -> RunRecord:
    """Return a trial with what only the runs of its seeds know."""
    return replace(
        trial,
        metrics={**seeds.metrics, **trial.metrics},
        described=seeds.described,
        monitor=seeds.monitor,
        fingerprint=seeds.fingerprint,
        settings={**trial.settings, **seeds.settings},
        preset=seeds.preset,
        device=seeds.device,
        budget_bytes=seeds.budget_bytes if trial.budget_bytes is None else trial.budget_bytes,
        detail=trial.detail or seeds.detail,
        partial=seeds.partial,
    )


def as_record(run: StoredRun) -> RunRecord:
    """Return what the store knows of a run."""
    result = as_result(run)
    kind = run.tags.get("trial.kind")
    outcome = result.outcome if run.status in STATUSES else Outcome.unfinished
    metrics = {name: value for name, value in metrics_of(run).items() if math.isfinite(value)}
    number = run.tags.get("trial.number", "")
    preset = run.tags.get("preset")
    suggested = {
        name.removeprefix(PARAMETER): value
        for name, value in run.tags.items()
        if name.startswith(PARAMETER)
    }

    def figure(metric: str, tag: str) -> float | None:
        """Return what was measured; of a trial of several seeds, its tags alone know it."""
        value = metrics.get(metric)
        return float(run.tags[tag]) if value is None and tag in run.tags else value

    def count(name: str, tag: str = "") -> int | None:
        value = figure(f"memory/{name}", tag or f"trial.{name}")
        return None if value is None else round(value)

    peak = count("peak_allocated_bytes", "trial.peak_bytes")
    reserved = count("peak_reserved_bytes", "trial.demand_bytes")
    if "memory/peak_reserved_bytes" not in metrics and reserved == peak:
        reserved = None  # no allocator reserved anything
    return RunRecord(
        f"trial {number}" if number else run.name,
        outcome if kind is None else Outcome.parse(kind),
        metrics=metrics,
        described=described(result),
        monitor=result.monitor,
        fingerprint=result.data_fingerprint,
        settings=run.parameters or suggested,
        preset=None if preset == "None" else preset,
        device=run.tags.get("device"),
        predicted_peak_bytes=count("predicted_peak_bytes"),
        peak_allocated_bytes=peak,
        peak_reserved_bytes=reserved,
        prediction_error=metrics.get("memory/prediction_error"),
        budget_bytes=count("budget_bytes"),
        seconds=figure("seconds", "trial.seconds"),
        started=run.started_seconds,
        run_dir=run.tags.get("run_dir"),
        run_id=run.run_id,
        trial=int(number) if number.isdigit() else None,
        detail=run.tags.get("trial.error", detail_of(result) if run.status in STATUSES else ""),
        partial={
            s: run.tags[f"partial.{s}"] for s in ("val", "test") if run.tags.get(f"partial.{s}")
        },
    )


BEST = ("best/val/", "best_val/")
"""How names of best validations begin, now and in runs of earlier versions."""


def metrics_of(run: StoredRun) -> dict[str, float]:
    """Return a run's figures, those of validation as ``result.json`` has them: the best.

    Of metrics that were not monitored, a store has the last epoch's, which is no other's best.
    """
    monitored = f"val/{_monitor(run)}"
    found = {
        name: value
        for name, value in run.metrics.items()
        if not name.startswith((*BEST, "val/")) or name in (monitored, f"{monitored}{SPREAD}")
    }
    for name, value in run.metrics.items():
        if name.startswith(BEST):
            found[f"val/{name.rpartition('/')[2]}"] = value
    return without_gib(found)


def _monitor(run: StoredRun) -> str:
    """Return the metric that was monitored; a trial of several seeds has the spread of no other."""
    spread = [name for name in run.metrics if name.endswith(SPREAD) and name.startswith("val/")]
    told = spread[0].removeprefix("val/").removesuffix(SPREAD) if spread else RunResult.monitor
    return run.tags.get("monitor", told)


def as_result(run: StoredRun) -> RunResult:
    """Return a stored run as its ``result.json`` has it, as far as the store says.

    Runs of earlier versions do not describe their metrics, and name their data by the series alone.
    """
    result = RunResult(STATUSES.get(run.status, "failed"), run.tags.get("stop_reason", ""))
    result.unit = run.parameters.get("data.unit", result.unit)
    result.metrics = {**metrics_of(run)}
    result.metrics_meta = metrics_of_tags(run.tags)
    result.monitor = _monitor(run)
    if result.metrics_meta:  # else the fingerprint is of another kind
        result.data_fingerprint = run.tags.get("data.fingerprint")
    return result
