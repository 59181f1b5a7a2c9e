"""The trials of a search as runs: what its study knows, and what their folders know beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.job import Metric
from expt.reports.records import RunRecord, RunSet, of_seeds, with_prediction_error
from expt.result import Outcome
from expt.search.metric import metric_of
from expt.search.stored import StudyError, load
from expt.search.trial import CONSTRAINT, FROM, kind_of
from expt.search.winner import FILE_NAME, SweepSummary
from expt.units import GIB, counted

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial

NO_FOLDER = "Of {} there is no folder in {}: only what the study knows of them is shown."


def with_study(runs: RunSet, folder: Path) -> RunSet:
    """Return the trials of the study in `folder`, with what is known of the runs they trained.

    Trials that were never started are there too; one that repeats another is left out. Runs from
    elsewhere stay as they are.

    Raises:
        StudyError: the study is not where ``sweep.json`` says.

    """
    summary = SweepSummary.load(folder)
    if summary is None:
        raise StudyError(f"{folder / FILE_NAME} cannot be read")
    return joined(runs, load(summary), summary.budget_bytes, folder)


def joined(runs: RunSet, study: Study, budget_bytes: int | None, folder: Path) -> RunSet:
    """Return the trials of a study that is open, as `with_study` does.

    Raises:
        StudyError: it has no trials.

    """
    metric = metric_of(study)
    home = folder.resolve()
    by_folder = {
        Path(record.run_dir).resolve(): record for record in runs.records if record.run_dir
    }
    records: list[RunRecord] = []
    lost = 0
    space: dict[str, Any] = {}
    parameters: dict[int, dict[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        if kind_of(trial) is Outcome.duplicate or FROM in trial.user_attrs:
            continue
        run = _run_of(trial, by_folder, home)
        records.append(_record(trial, run, budget_bytes, metric))
        lost += run is None and records[-1].outcome.trained
        space |= trial.distributions
        parameters[trial.number] = trial.params
    if not records:
        raise StudyError(f"the study {study.study_name} has no trials yet")
    others = [
        record
        for record in runs.records
        if record.run_dir and not Path(record.run_dir).resolve().is_relative_to(home)
    ]
    return replace(
        runs,
        records=tuple(sorted([*records, *others], key=lambda record: record.started)),
        notes=(
            *runs.notes,
            *([NO_FOLDER.format(counted(lost, "trained trial"), folder)] if lost else []),
        ),
        study=None if others else study.study_name,
        space=space,
        parameters=parameters,
    )


def _run_of(
    trial: FrozenTrial, by_folder: Mapping[Path, RunRecord], home: Path
) -> RunRecord | None:
    """Return the run of a trial, or those of its seeds as one; None where its folder is not there.

    A search's folder may have been moved since the study noted where its trials are.
    """
    noted = trial.user_attrs.get("run_dir")
    if not noted:
        return None
    for folder in (Path(noted).resolve(), home / Path(noted).name):
        if folder in by_folder:
            return by_folder[folder]
        seeds = [
            run
            for path, run in by_folder.items()
            if path.parent == folder and path.name.startswith("seed_")
        ]
        if seeds:
            return replace(of_seeds(seeds), run_dir=str(folder))
    return None


def _record(
    trial: FrozenTrial, run: RunRecord | None, budget_bytes: int | None, metric: Metric
) -> RunRecord:
    """Join a trial and its run; the study decides how it ended, the run knows its figures."""
    attributes: Mapping[str, Any] = trial.user_attrs
    outcome = kind_of(trial) or Outcome.unfinished
    started = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    settings = {name: str(value) for name, value in trial.params.items()}
    base = run or RunRecord(
        f"trial {trial.number}", outcome, settings=settings, monitor=metric.name
    )
    metrics = dict(base.metrics)
    if trial.values:  # what the study was told: with repeats, the mean of seeds
        metrics[f"val/{metric.name}"] = trial.values[0]
    peak = attributes.get("peak_bytes")
    demand = attributes.get("demand_bytes")
    reserved = base.peak_reserved_bytes if demand in (None, peak) else demand
    joint = replace(
        base,
        name=f"trial {trial.number}",
        outcome=outcome,
        metrics=metrics,
        described={metric.name: metric, **base.described},
        settings={**base.settings, **settings},
        predicted_peak_bytes=attributes.get("predicted_peak_bytes", base.predicted_peak_bytes),
        predicted_demand_bytes=_predicted_demand(trial, outcome),
        peak_allocated_bytes=base.peak_allocated_bytes if peak is None else peak,
        peak_reserved_bytes=reserved,
        budget_bytes=attributes.get("budget_bytes", budget_bytes),
        seconds=attributes.get("seconds") or base.seconds,
        started=started,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else base.ended,
        run_id=attributes.get("run_id") or base.run_id,
        trial=trial.number,
        detail=attributes.get("error") or ("" if outcome is Outcome.completed else outcome.words),
    )
    # Of a run that recovered, prediction and peak are of different settings.
    return joint if attributes.get("oom_events") else with_prediction_error(joint)


def _predicted_demand(trial: FrozenTrial, outcome: Outcome) -> int | None:
    """Return the bytes that were compared with the budget, of a trial that never came to its end.

    The study holds them as the excess over the budget.
    """
    budget, excess = trial.user_attrs.get("budget_bytes"), trial.constraints.get(CONSTRAINT)
    unmeasured = outcome in (Outcome.predicted_over, Outcome.out_of_memory)
    if not unmeasured or budget is None or excess is None:
        return None
    return int(budget) + round(excess * GIB)
