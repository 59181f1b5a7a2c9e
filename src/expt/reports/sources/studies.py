"""The trials of a search as runs: what its study knows, and what their folders know beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.job import Metric
from expt.reports.records import RunRecord, RunSet
from expt.result import Outcome
from expt.search.metric import metric_of
from expt.search.stored import StudyError, load
from expt.search.trial import CONSTRAINT, FROM, kind_of
from expt.search.winner import FILE_NAME, SweepSummary
from expt.units import GIB

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial


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
    by_folder = {
        str(Path(record.run_dir).resolve()): record for record in runs.records if record.run_dir
    }
    records: list[RunRecord] = []
    space: dict[str, Any] = {}
    parameters: dict[int, dict[str, Any]] = {}
    for trial in study.get_trials(deepcopy=False):
        if kind_of(trial) is Outcome.duplicate or FROM in trial.user_attrs:
            continue
        run_dir = trial.user_attrs.get("run_dir")
        run = by_folder.get(str(Path(run_dir).resolve())) if run_dir else None
        records.append(_record(trial, run, budget_bytes, metric))
        space |= trial.distributions
        parameters[trial.number] = trial.params
    if not records:
        raise StudyError(f"the study {study.study_name} has no trials yet")
    home = folder.resolve()
    others = [
        record
        for record in runs.records
        if record.run_dir and not Path(record.run_dir).resolve().is_relative_to(home)
    ]
    return replace(
        runs,
        records=tuple(sorted([*records, *others], key=lambda record: record.started)),
        study=None if others else study.study_name,
        space=space,
        parameters=parameters,
    )


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
    return replace(
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
        seconds=attributes.get("seconds", base.seconds),
        started=started,
        ended=trial.datetime_complete.timestamp() if trial.datetime_complete else base.ended,
        run_id=attributes.get("run_id", base.run_id),
        trial=trial.number,
        detail=attributes.get("error") or ("" if outcome is Outcome.completed else outcome.words),
    )


def _predicted_demand(trial: FrozenTrial, outcome: Outcome) -> int | None:
    """Return the bytes that were compared with the budget, of a trial that never came to its end.

    The study holds them as the excess over the budget.
    """
    budget, excess = trial.user_attrs.get("budget_bytes"), trial.constraints.get(CONSTRAINT)
    unmeasured = outcome in (Outcome.predicted_over, Outcome.out_of_memory)
    if not unmeasured or budget is None or excess is None:
        return None
    return int(budget) + round(excess * GIB)
