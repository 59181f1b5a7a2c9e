"""The best trial inside the budget, those that no other beats, and the counts of a study."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from expt.errors import SearchError
from expt.files import write_json
from expt.job import Metric
from expt.result import PLAN_NAME, Outcome, known_fields, load_result
from expt.run.process import LOG_NAME
from expt.search.metric import EARLIER, metric_of
from expt.search.reservation import Reservations, counts
from expt.search.runner import Job, Runner
from expt.search.space import typed
from expt.search.study import DATA
from expt.search.trial import (
    CONSTRAINT,
    FROM,
    KIND,
    RESUMED_AT,
    TECHNIQUES,
    TrialOutcome,
    kind_of,
    technique_lines,
)
from expt.tracking.journal import State
from expt.training.interruption import Interruption, Stopped
from expt.units import format_bytes

FILE_NAME = "sweep.json"


@dataclass
class SweepSummary:
    """The state of a study.

    `finished` counts trained trials in any terminal state; of these are `failed`, `pruned` (by
    the pruner) and `infeasible_measured` (memory ran out, or more than the budget was measured).
    Beside them are those that were never trained: `infeasible_predicted`, `duplicates`,
    `refused`. `seconds` is the time in which some trial was trained, by the clock, and
    `training_seconds` the sum over all of them, which is more where several were at once.

    `metric` describes what trials are compared by, None in the records of earlier versions.
    `best` is None or {`trial`, `params`, ``val/NAME``, `peak_allocated_bytes`, `run_id`}, and with
    them `run_dir`, `spread` (over `search.repeats`, else None), `techniques` (settings that a plan
    chose so that it fits) and ``test/...`` once tested.
    `pareto` is a list of the same, without a better one in both metric and peak, by peak. `run_dir`
    is the folder that it was read or written in.
    """

    study: str
    n_trials: int
    finished: int = 0
    failed: int = 0
    pruned: int = 0
    infeasible_measured: int = 0
    infeasible_predicted: int = 0
    duplicates: int = 0
    refused: int = 0
    running: int = 0
    seconds: float = 0.0
    training_seconds: float = 0.0
    budget_bytes: int | None = None
    storage: str | None = None
    best: dict[str, Any] | None = None
    pareto: list[dict[str, Any]] = field(default_factory=list)
    metric: dict[str, Any] | None = None

    @property
    def run_dir(self) -> Path | None:
        """Where it was read or written; not in the file, so that a folder can be moved."""
        return vars(self).get("_run_dir")

    @run_dir.setter
    def run_dir(self, folder: Path) -> None:
        vars(self)["_run_dir"] = folder

    @property
    def compared_by(self) -> Metric:
        """The metric that trials are compared by."""
        return EARLIER if self.metric is None else Metric.from_dict(self.metric)

    @property
    def best_value(self) -> float | None:
        """The best trial's figure of that metric, None without a best trial."""
        return None if self.best is None else self.best[f"val/{self.compared_by.name}"]

    def save(self, folder: Path) -> None:
        """Write ``sweep.json`` atomically."""
        self.run_dir = folder
        write_json(folder / FILE_NAME, asdict(self), durable=False)

    @classmethod
    def load(cls, folder: Path) -> SweepSummary | None:
        """Return the summary in a sweep's directory, None if there is none that can be read."""
        try:
            stored = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
            summary = cls(**known_fields(cls, stored))
        except (OSError, ValueError, TypeError):
            return None
        summary.run_dir = folder
        return summary


TESTED = "expt.tested"
"""Attribute of the study: trial number to test figures."""


def feasible(trial: FrozenTrial, limited: bool) -> bool:
    """Tell whether a trial was trained to its end, and its peak is known to be in the budget."""
    if trial.state is not TrialState.COMPLETE or kind_of(trial) is Outcome.duplicate:
        return False
    if FROM in trial.user_attrs:
        return False  # another search trained it
    if not math.isfinite(trial.values[0]):
        return False
    excess = trial.constraints.get(CONSTRAINT)
    return not limited or (excess is not None and excess <= 0)


def best_trial(trials: Sequence[FrozenTrial], limited: bool, metric: Metric) -> FrozenTrial | None:
    """Return the feasible trial with the best figure, the first of equals; None if none is."""
    found = [trial for trial in trials if feasible(trial, limited)]
    return min(found, key=lambda t: (metric.cost(t.values[0]), t.number), default=None)


def pareto(trials: Sequence[FrozenTrial], limited: bool, metric: Metric) -> list[FrozenTrial]:
    """Return the feasible trials that no other beats in figure and peak, by rising peak."""
    known = [t for t in trials if feasible(t, limited) and peak_of(t) is not None]
    known.sort(key=lambda trial: (peak_of(trial), metric.cost(trial.values[0]), trial.number))
    front: list[FrozenTrial] = []
    for trial in known:
        if not front or metric.better(trial.values[0], front[-1].values[0]):
            front.append(trial)
    return front


def peak_of(trial: FrozenTrial) -> int | None:
    """Return the measured peak of a trial in bytes, None if there is none."""
    return trial.user_attrs.get("peak_bytes")


def describe(trial: FrozenTrial, tested: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """Return a trial as it stands in ``sweep.json``."""
    attributes = trial.user_attrs
    run_dir = attributes.get("run_dir")
    return {
        "trial": trial.number,
        "params": {name: typed(value) for name, value in trial.params.items()},
        f"val/{metric.name}": trial.values[0],
        "peak_allocated_bytes": peak_of(trial),
        "run_id": attributes.get("run_id") or run_id_in(run_dir),
        "run_dir": run_dir,
        "spread": attributes.get("spread"),
        TECHNIQUES: attributes.get(TECHNIQUES, {}),
        **tested.get(str(trial.number), {}),
    }


def settings_of(best: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a trial in ``sweep.json``: its point, and what was chosen for it."""
    return {**best["params"], **best.get(TECHNIQUES, {})}


def run_id_in(run_dir: str | None) -> str | None:
    """Return the tracking id of the run in a folder, if there is one."""
    state = State.load(Path(run_dir)) if run_dir else None
    return state.run_id if state else None


def figures_of_test(folder: Path) -> dict[str, float]:
    """Return the test figures in a run's folder; none if it was not tested."""
    result = load_result(folder)
    metrics = result.metrics if result is not None else {}
    return {
        name: value
        for name, value in metrics.items()
        if name.startswith("test/") and value is not None
    }


def summarize(study: Study, n_trials: int, budget_bytes: int | None, storage: str) -> SweepSummary:
    """Return what ``sweep.json`` says now."""
    trials = study.get_trials(deepcopy=False)
    limited = budget_bytes is not None
    finished = [t for t in trials if t.state.is_finished() and counts(t)]
    beside = [t for t in trials if t.state.is_finished() and not counts(t)]
    kinds = [kind for t in finished if (kind := kind_of(t)) is not None]
    untrained = [kind_of(t) for t in beside]
    tested, metric = study.user_attrs.get(TESTED, {}), metric_of(study)
    best = best_trial(trials, limited, metric)
    return SweepSummary(
        study=study.study_name,
        n_trials=n_trials,
        finished=len(finished),
        failed=sum(kind.columns.trial_state == "FAIL" for kind in kinds),
        pruned=kinds.count(Outcome.pruned),
        infeasible_measured=sum(kind.columns.over for kind in kinds),
        infeasible_predicted=untrained.count(Outcome.predicted_over),
        duplicates=untrained.count(Outcome.duplicate),
        refused=untrained.count(Outcome.refused),
        running=sum(t.state is TrialState.RUNNING for t in trials),
        seconds=wall_seconds(finished),
        training_seconds=sum(t.user_attrs.get("seconds") or 0.0 for t in finished),
        budget_bytes=budget_bytes,
        storage=storage,
        best=None if best is None else describe(best, tested, metric),
        pareto=[describe(trial, tested, metric) for trial in pareto(trials, limited, metric)],
        metric=metric.as_dict(),
    )


def wall_seconds(trials: Sequence[FrozenTrial]) -> float:
    """Return how long some of the trials was under way, by the clock; pauses do not count.

    Of a trial that was gone on with, its last start counts.
    """
    spans = sorted(
        (
            max(t.datetime_start.timestamp(), t.user_attrs.get(RESUMED_AT, 0.0)),
            t.datetime_complete.timestamp(),
        )
        for t in trials
        if t.datetime_start is not None and t.datetime_complete is not None
    )
    total, until = 0.0, -math.inf
    for start, end in spans:
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def told_line(trial: FrozenTrial, is_best: bool, metric: Metric) -> str:
    """Return one line about a trial that has just ended."""
    attributes = trial.user_attrs
    kind = Outcome.parse(attributes.get(KIND))
    line = f"trial {trial.number}: "
    if kind is Outcome.predicted_over:
        peak, budget = attributes.get("predicted_peak_bytes"), attributes.get("budget_bytes")
        return f"{line}not started, predicted peak {format_bytes(peak)} of {format_bytes(budget)}"
    if kind is Outcome.duplicate:
        return f"{line}not started, the same as trial {attributes.get('duplicate_of')}"
    if trial.state is TrialState.COMPLETE:
        line += f"val {metric.label} {metric.text(trial.values[0])}"
        line += f", peak {format_bytes(peak_of(trial))}, {attributes.get('seconds') or 0.0:.1f} s"
        chosen = technique_lines(trial)
        line += f", with {' '.join(chosen)}" if chosen else ""
        return line + ("  above the budget" if kind.columns.over else "  * best" if is_best else "")
    error = attributes.get("error")
    return f"{line}{kind.words}{f' ({error})' if error else ''}"


POLL_SECONDS = 0.05


def run_test(
    study: Study,
    winner: FrozenTrial,
    reservations: Reservations,
    runner: Runner,
    lines: Sequence[str],
    folder: Path,
    seeds: Sequence[int],
) -> None:
    """Test the best weights of the winner's runs, unless a worker already did.

    The figures go into the study, as means over the seeds.

    Raises:
        Stopped: SIGINT or SIGTERM; the next worker tests.
        SearchError: the test went wrong; says why, and how to run it again.

    """
    number = str(winner.number)
    with reservations.locked():
        if number in study.user_attrs.get(TESTED, {}):
            return
        try:
            plan = json.loads((folder / PLAN_NAME).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            plan = None
        metric = metric_of(study)
        job = Job(
            winner.number,
            lines,
            folder,
            seeds,
            plan,
            test=True,
            metric=metric,
            data=study.user_attrs.get(DATA),
        )
        outcome = _run(runner, job)
        runs = [figures_of_test(job.run_folder(index)) for index in range(len(seeds))]
        tested = f"test/{metric.name}"
        if not outcome.kind.trained or not all(tested in run for run in runs):
            raise _untested(winner, outcome, job, tested)
        figures = {
            name: statistics.fmean(run[name] for run in runs)
            for name in runs[0]
            if all(name in run for run in runs)
        }
        if len(runs) > 1:
            figures[f"{tested}_spread"] = statistics.stdev(run[tested] for run in runs)
        study.set_user_attr(TESTED, {**study.user_attrs.get(TESTED, {}), number: figures})


def _untested(winner: FrozenTrial, outcome: TrialOutcome, job: Job, tested: str) -> SearchError:
    if outcome.kind.trained:
        why = f"its run left no {tested}, or one that is not a number"
        if len(job.seeds) > 1:
            why = why.replace("its run", "the run of one of its seeds")
    else:
        why = outcome.kind.words + (f" ({outcome.error})" if outcome.error else "")
    logs = " and ".join(str(job.run_folder(n) / LOG_NAME) for n in range(len(job.seeds)))
    return SearchError(
        f"the best trial, {winner.number}, could not be tested: {why}; its output is in {logs}. "
        "Its validation figure stands, and sweep.json has it. The same command again runs the test "
        "alone, search.test_winner=false does without"
    )


def _run(runner: Runner, job: Job) -> TrialOutcome:
    with Interruption() as interruption:
        running = runner.start(job)
        runner.flush()
        try:
            while (outcome := running.poll()) is None:
                if interruption.received is not None:
                    running.stop("signal")
                time.sleep(POLL_SECONDS)
        finally:
            running.kill()
        if interruption.received is not None:
            raise Stopped(interruption.received)
        return outcome
