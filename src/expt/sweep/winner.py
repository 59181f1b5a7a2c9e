"""The best trial inside the budget, those that no other beats, and the counts of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from expt.results import load_result
from expt.search_config import MAE
from expt.sweep.reservation import counts
from expt.sweep.space import typed
from expt.sweep.summary import SweepSummary
from expt.sweep.trials import CONSTRAINT, FAILED, KIND, OVER
from expt.tracking.journal import State
from expt.units import format_bytes

TESTED = "expt.tested"
"""Attribute of the study: trial number to test figures."""


def feasible(trial: FrozenTrial, limited: bool) -> bool:
    """Tell whether a trial was trained to its end, and its peak is known to be in the budget."""
    if trial.state is not TrialState.COMPLETE or trial.user_attrs.get(KIND) == "duplicate":
        return False
    if not math.isfinite(trial.values[0]):
        return False
    excess = trial.constraints.get(CONSTRAINT)
    return not limited or (excess is not None and excess <= 0)


def best_trial(trials: Sequence[FrozenTrial], limited: bool) -> FrozenTrial | None:
    """Return the feasible trial with the smallest error, the first of equals; None if none is."""
    found = [trial for trial in trials if feasible(trial, limited)]
    return min(found, key=lambda trial: (trial.values[0], trial.number), default=None)


def pareto(trials: Sequence[FrozenTrial], limited: bool) -> list[FrozenTrial]:
    """Return the feasible trials that no other beats in error and peak, by rising peak."""
    known = [t for t in trials if feasible(t, limited) and peak_of(t) is not None]
    known.sort(key=lambda trial: (peak_of(trial), trial.values[0], trial.number))
    front: list[FrozenTrial] = []
    for trial in known:
        if not front or trial.values[0] < front[-1].values[0]:
            front.append(trial)
    return front


def peak_of(trial: FrozenTrial) -> int | None:
    """Return the measured peak of a trial in bytes, None if there is none."""
    return trial.user_attrs.get("peak_bytes")


def describe(trial: FrozenTrial, tested: Mapping[str, Any]) -> dict[str, Any]:
    """Return a trial as it stands in ``sweep.json``."""
    attributes = trial.user_attrs
    run_dir = attributes.get("run_dir")
    return {
        "trial": trial.number,
        "params": {name: typed(value) for name, value in trial.params.items()},
        MAE: trial.values[0],
        "peak_allocated_bytes": peak_of(trial),
        "run_id": attributes.get("run_id") or run_id_in(run_dir),
        "run_dir": run_dir,
        "spread": attributes.get("spread"),
        **tested.get(str(trial.number), {}),
    }


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
    kinds = [t.user_attrs.get(KIND) for t in finished]
    untrained = [t.user_attrs.get(KIND) for t in beside]
    tested = study.user_attrs.get(TESTED, {})
    best = best_trial(trials, limited)
    return SweepSummary(
        study=study.study_name,
        n_trials=n_trials,
        finished=len(finished),
        failed=sum(kind in FAILED for kind in kinds),
        pruned=kinds.count("pruned"),
        infeasible_measured=sum(kind in OVER for kind in kinds),
        infeasible_predicted=untrained.count("infeasible_predicted"),
        duplicates=untrained.count("duplicate"),
        refused=untrained.count("refused"),
        running=sum(t.state is TrialState.RUNNING for t in trials),
        seconds=sum(t.user_attrs.get("seconds") or 0.0 for t in finished),
        budget_bytes=budget_bytes,
        storage=storage,
        best=None if best is None else describe(best, tested),
        pareto=[describe(trial, tested) for trial in pareto(trials, limited)],
    )


def told_line(trial: FrozenTrial, is_best: bool) -> str:
    """Return one line about a trial that has just ended."""
    attributes = trial.user_attrs
    kind = attributes.get(KIND, "?")
    line = f"trial {trial.number}: "
    if kind == "infeasible_predicted":
        peak, budget = attributes.get("predicted_peak_bytes"), attributes.get("budget_bytes")
        return f"{line}not started, predicted peak {format_bytes(peak)} of {format_bytes(budget)}"
    if kind == "duplicate":
        return f"{line}not started, the same as trial {attributes.get('duplicate_of')}"
    if trial.state is TrialState.COMPLETE:
        line += f"{MAE} {trial.values[0]:.4f}"
        line += f", peak {format_bytes(peak_of(trial))}, {attributes.get('seconds', 0.0):.1f} s"
        return line + ("  above the budget" if kind in OVER else "  * best" if is_best else "")
    error = attributes.get("error")
    return f"{line}{kind.replace('_', ' ')}{f' ({error})' if error else ''}"
