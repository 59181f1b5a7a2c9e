"""How the study is told of a trial's end: its state, its figures, its constraint.

tell_study(study, trial, outcome, prediction, budget_bytes, ["val/mae"], folder)
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.samplers import GridSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from expt.search_config import PEAK
from expt.sweep.trials import CONSTRAINT, KIND, PREDICTED, STATES, Prediction, TrialOutcome


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
        objectives: what is minimised.
        folder: of the trial.
        copy_of: the trial that it repeats, whose end it takes.

    """
    excess = outcome.constraint(prediction, budget_bytes)
    killed = outcome.kind == "killed" and "SIGKILL" in (outcome.error or "")
    if killed and excess is not None and excess > 0:
        outcome = replace(outcome, kind="oom", error=f"{outcome.error}; predicted not to fit")
    state = TrialState[STATES.get(outcome.kind, "FAIL")]
    values: list[float] | None = None
    if copy_of is not None:
        state, values = copy_of.state, copy_of.values
        excess = copy_of.constraints.get(CONSTRAINT)
    elif state is TrialState.COMPLETE:
        values = _values(outcome, objectives)
        if values is None:
            state = TrialState.FAIL
            error = "its peak is to be minimised, and was not measured"
            outcome = replace(outcome, kind="crashed", error=error)
    if state is not TrialState.COMPLETE:
        values = None
    _set_attributes(trial, outcome, prediction, budget_bytes, folder, copy_of)
    if excess is not None and CONSTRAINT not in trial.constraints:
        trial.set_constraint(CONSTRAINT, excess)
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
        **outcome.extra,
    }
    if prediction is not None:
        known[PREDICTED] = prediction.peak_bytes
        interval = prediction.interval_bytes
        known["interval_bytes"] = None if interval is None else list(interval)
    for name, value in known.items():
        if value is not None and trial.user_attrs.get(name) != value:
            trial.set_user_attr(name, value)
    # Last: a trial with a kind has all the rest.
    trial.set_user_attr(KIND, "duplicate" if copy_of is not None else outcome.kind)


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
