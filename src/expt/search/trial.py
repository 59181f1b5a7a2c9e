"""What became of one trial: `TrialOutcome`, and the names under which the study keeps it.

Every trial of the study has these user attributes (`KIND` first), so that a reader needs nothing
but the study; the same are tags of its run in the tracker, with the prefix ``trial.``:

``kind``                  an `expt.result.Outcome`
``peak_bytes``            measured peak of tensors, None where none was measured
``demand_bytes``          what the budget was compared with: reserved bytes where there are any
``predicted_peak_bytes``  of the plan, and ``interval_bytes``, [low, high]; ``recalled`` if a plan
                          of an earlier trial, which the peak cannot tell from this one, had a part
``techniques``            settings of memory that a plan chose for it, since it would not fit else
``budget_bytes``          the limit, None without one
``seconds``               of training
``run_dir``, ``run_id``   its folder and its run in the tracker
``error``                 one line, where something went wrong
``attempts``              how often it was started, ``retried`` how often since it had failed
``resumed_at``            when it was last started again, in seconds of the epoch
``started``               true once its process was, whatever became of it
``worker``                which process sees to it
``values_by_seed``, ``spread``  with `search.repeats`: each seed's value and their deviation
``preset``                true if `search.presets` put its point first
``duplicate_of``          the number of the trial with the same values

A trial that an earlier study trained (`expt.search.warm_start`) has no ``kind``; instead:

``from``                  where the earlier study is kept, its name, and the trial's number there
                          (without the place, if an earlier version wrote it)
``from_kind``             how it ended there
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.samplers import GridSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from expt.config.search_node import PEAK
from expt.result import Outcome
from expt.search.space import settings_lines
from expt.units import GIB

KIND, WORKER, STARTED, CONSTRAINT = "kind", "worker", "started", "peak_memory"
RETRIED, RESUMED_AT = "retried", "resumed_at"
PREDICTED = "predicted_peak_bytes"
TECHNIQUES = "techniques"
FROM, FROM_KIND = "from", "from_kind"
PRESET = "preset"
EXTRA = ("oom_events", "values_by_seed", "spread")
"""Attributes that some outcomes have, in `TrialOutcome.extra`."""


def kind_of(trial: FrozenTrial | Trial) -> Outcome | None:
    """Return how a trial ended, None if it has not, or was ended by another hand."""
    kind = trial.user_attrs.get(KIND)
    return None if kind is None else Outcome.parse(kind)


def may_go_well(trial: FrozenTrial) -> bool:
    """Tell whether a trial failed, and may not the next time."""
    kind = kind_of(trial)
    return kind is not None and kind.columns.retry


def seen_kind(trial: FrozenTrial) -> Outcome | None:
    """Return how a trial ended, here or in the earlier study that it is from."""
    kind = kind_of(trial)
    if kind is None and FROM_KIND in trial.user_attrs:
        return Outcome.parse(trial.user_attrs[FROM_KIND])
    return kind


def with_techniques(trial: Trial, prediction: Prediction) -> dict[str, Any]:
    """Return the techniques that were chosen for a trial, those of a prediction among them."""
    return {**trial.user_attrs.get(TECHNIQUES, {}), **prediction.techniques}


def technique_lines(trial: FrozenTrial | Trial) -> list[str]:
    """Return the techniques that were chosen for a trial, as settings of a command line."""
    return settings_lines(trial.user_attrs.get(TECHNIQUES, {}))


def stored(study: Study, number: int) -> FrozenTrial:
    """Return a trial as the study's storage has it now."""
    return study.get_trials(deepcopy=False)[number]


@dataclass(frozen=True)
class Prediction:
    """What a plan says about a trial that was not started yet; bytes.

    `interval_bytes` is about `demand_bytes`, what the budget has to allow; its upper end may be
    None. `plan` is the content of ``plan.json``; `refusal` says why the settings contradict each
    other, and then the rest is None. `recalled` says that it was made for another trial that the
    peak cannot tell from this one (`expt.search.plan_cache`). `techniques` are the settings of
    memory that it is the prediction for, as far as they are not the trial's own.
    """

    peak_bytes: int | None = None
    demand_bytes: int | None = None
    interval_bytes: tuple[int, int | None] | None = None
    plan: dict[str, Any] | None = None
    refusal: str | None = None
    advice: str | None = None
    recalled: bool = False
    techniques: dict[str, Any] = field(default_factory=dict)

    def exceeds(self, budget_bytes: int | None) -> bool:
        """Tell whether the peak is over the budget by more than the interval leaves open."""
        if budget_bytes is None or self.interval_bytes is None:
            return False
        return self.interval_bytes[0] > budget_bytes


@dataclass(frozen=True)
class TrialOutcome:
    """How one trial ended.

    `value` is the validation's figure of the monitored metric; `demand_bytes` what was measured of
    what the budget limits; `excess_bytes` what an out-of-memory error says was missing, at least.
    """

    kind: Outcome
    value: float | None = None
    peak_bytes: int | None = None
    demand_bytes: int | None = None
    excess_bytes: int | None = None
    seconds: float = 0.0
    error: str | None = None
    run_id: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def constraint(self, prediction: Prediction | None, budget_bytes: int | None) -> float | None:
        """Return by how many GiB the budget is exceeded (negative: not), None if unknown.

        What was measured counts, where a trial ran to its end or was pruned; for one that ran out
        of memory the larger of what was missing and what was predicted.
        """
        if budget_bytes is None:
            return None
        predicted = None if prediction is None else prediction.demand_bytes
        excess = None if predicted is None else predicted - budget_bytes
        if self.kind is Outcome.out_of_memory:
            known = [count for count in (self.excess_bytes, excess) if count is not None]
            return max(known) / GIB if known and max(known) > 0 else None
        if self.demand_bytes is not None:
            excess = self.demand_bytes - budget_bytes
        return None if excess is None else excess / GIB


def tell_study(
    study: Study,
    trial: Trial,
    outcome: TrialOutcome,
    prediction: Prediction | None,
    budget_bytes: int | None,
    objectives: Sequence[str],
    folder: Path,
    copy_of: FrozenTrial | None = None,
) -> None:
    """End a trial in the study; the caller has made sure that it may.

    Args:
        study: that the trial is of.
        trial: to be ended.
        outcome: how it ended.
        prediction: what was predicted of it, None if nothing was.
        budget_bytes: the limit, None without one.
        objectives: what the study compares.
        folder: of the trial.
        copy_of: the trial that it repeats, whose end it takes.

    """
    excess = outcome.constraint(prediction, budget_bytes)
    killed = outcome.kind is Outcome.killed and "SIGKILL" in (outcome.error or "")
    if killed and excess is not None and excess > 0:
        error = f"{outcome.error}; predicted not to fit"
        outcome = replace(outcome, kind=Outcome.out_of_memory, error=error)
    state = TrialState[outcome.kind.columns.trial_state]
    values: list[float] | None = None
    if copy_of is not None:
        state, values = copy_of.state, copy_of.values
        excess = copy_of.constraints.get(CONSTRAINT)
    elif state is TrialState.COMPLETE:
        values = _values(outcome, objectives)
        if values is None:
            state = TrialState.FAIL
            error = "its peak is to be minimised, and was not measured"
            outcome = replace(outcome, kind=Outcome.failed, error=error)
    if state is not TrialState.COMPLETE:
        values = None
    _set_attributes(trial, outcome, prediction, budget_bytes, folder, copy_of)
    if excess is not None:
        _set_constraint(trial, excess)
    _finish(study, trial, state, values)


def _values(outcome: TrialOutcome, objectives: Sequence[str]) -> list[float] | None:
    assert outcome.value is not None
    if PEAK not in objectives:
        return [outcome.value]
    if outcome.peak_bytes is None:
        return None
    return [outcome.value, float(outcome.peak_bytes)]


def _set_attributes(
    trial: Trial,
    outcome: TrialOutcome,
    prediction: Prediction | None,
    budget_bytes: int | None,
    folder: Path,
    copy_of: FrozenTrial | None,
) -> None:
    known: dict[str, Any] = {
        "peak_bytes": outcome.peak_bytes,
        "demand_bytes": outcome.demand_bytes,
        "budget_bytes": budget_bytes,
        "seconds": round(outcome.seconds, 3) or None,
        "error": outcome.error,
        "run_dir": str(folder) if folder.exists() else None,
        "run_id": outcome.run_id,
        "duplicate_of": None if copy_of is None else copy_of.number,
        **dict.fromkeys(EXTRA),
        **outcome.extra,
    }
    if prediction is not None:
        known[PREDICTED] = prediction.peak_bytes
        interval = prediction.interval_bytes
        known["interval_bytes"] = None if interval is None else list(interval)
        known["recalled"] = prediction.recalled or None
        known[TECHNIQUES] = with_techniques(trial, prediction) or None
    for name, value in known.items():
        if trial.user_attrs.get(name) != value:  # also None in the place of what was told before
            trial.set_user_attr(name, value)
    # Last: a trial with a kind has all the rest.
    kind = Outcome.duplicate if copy_of is not None else outcome.kind
    trial.set_user_attr(KIND, kind.value)


def _set_constraint(trial: Trial, excess: float) -> None:
    """Say by how much a trial exceeds the budget.

    Of one that a worker was about to tell when it was killed, Optuna would keep the earlier figure.
    """
    if CONSTRAINT not in trial.constraints:
        trial.set_constraint(CONSTRAINT, excess)
    elif trial.constraints[CONSTRAINT] != excess:
        # Where Optuna keeps what `set_constraint` sets, once only.
        name = f"constraints:{CONSTRAINT}"
        trial.storage.set_trial_system_attr(trial._trial_id, name, excess)


def _finish(study: Study, trial: Trial, state: TrialState, values: list[float] | None) -> None:
    try:
        with warnings.catch_warnings():
            # CMA-ES says at every trial that it does not use constraints.
            warnings.filterwarnings("ignore", "Constraints have been set", UserWarning)
            study.tell(trial, values, state)
    except (RuntimeError, KeyError):
        # The grid's sampler wants to end a loop of Optuna's own; the trial is told by then.
        if not isinstance(study.sampler, GridSampler):
            raise
