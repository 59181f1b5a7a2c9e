"""What to say when a search ends without a configuration inside the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from expt.errors import SearchError
from expt.sweep.exhaustion import nothing_fitted
from expt.sweep.space import Space
from expt.sweep.trials import CONSTRAINT, FAILED, KIND, OVER, Prediction
from expt.units import GIB, MIB, format_bytes


class Adviser(Protocol):
    """Knows the budget, and what would make a trial fit."""

    budget_bytes: int | None

    def advise(self, lines: Sequence[str]) -> str | None:
        """Return changes to a trial's settings that would fit, None if there are none."""


@dataclass
class Nearest:
    """The trial with the smallest predicted peak so far."""

    demand_bytes: int | None = None
    lines: list[str] = field(default_factory=list)
    number: int | None = None

    def note(self, trial: Trial, lines: list[str], prediction: Prediction | None) -> None:
        """Take a trial into account."""
        demand = None if prediction is None else prediction.demand_bytes
        if demand is not None and (self.demand_bytes is None or demand < self.demand_bytes):
            self.demand_bytes, self.lines, self.number = demand, lines, trial.number


def nothing_found(study: Study, nearest: Nearest, adviser: Adviser, space: Space) -> SearchError:
    """Return the error that says why nothing was found, and what would change that."""
    trials = study.get_trials(deepcopy=False)
    failed = [trial for trial in trials if trial.user_attrs.get(KIND) in FAILED]
    over = _over(trials)
    if not over and failed:
        reasons = "; ".join(dict.fromkeys(str(t.user_attrs.get("error")) for t in failed[-3:]))
        return SearchError(
            f"no trial of {study.study_name} came to a validation error: {len(failed)} failed, the "
            f"last with: {reasons}"
        )
    budget = adviser.budget_bytes
    if budget is None:
        return SearchError(
            f"no trial of {study.study_name} came to a validation error: memory ran out in "
            f"{len(over)} of them; widen search.space towards what needs less"
        )
    smallest = _smallest(over, nearest, budget)
    message = f"nothing fits {format_bytes(budget)} (memory.budget)"
    if smallest is None:
        return SearchError(f"{message}; raise the budget, or widen search.space")
    peak, params, lines = smallest
    message += f": {_words(peak, params, space)}"
    advice = adviser.advise(lines) if lines else None
    enough = -(-peak // MIB) + 1
    change = f"memory.budget={enough}MiB"
    return SearchError(f"{message}. What would fit: {f'{advice}, or ' if advice else ''}{change}")


def smallest_seen(
    study: Study, nearest: Nearest, budget_bytes: int | None, space: Space
) -> str | None:
    """Return the smallest peak of what did not fit, in words; None where some may still fit."""
    trials = study.get_trials(deepcopy=False)
    if budget_bytes is None or not nothing_fitted(trials):
        return None
    found = _smallest(_over(trials), nearest, budget_bytes)
    return None if found is None else _words(found[0], found[1], space)


def _words(peak: int, params: Mapping[str, object], space: Space) -> str:
    point = f", with {' '.join(space.lines(params))}" if params else ""
    return f"the smallest peak seen is {format_bytes(peak)}{point}"


def _over(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    return [t for t in trials if t.user_attrs.get(KIND) in OVER | {"infeasible_predicted"}]


def _smallest(
    over: list[FrozenTrial], nearest: Nearest, budget_bytes: int
) -> tuple[int, dict[str, object], list[str]] | None:
    """Return the smallest peak known, its point, and its settings where this worker has them."""
    best: tuple[int, dict[str, object], int] | None = None
    for trial in over:
        known = _needed(trial, budget_bytes)
        if known is not None and (best is None or known < best[0]):
            best = (int(known), trial.params, trial.number)
    if best is None:
        if nearest.demand_bytes is None or nearest.demand_bytes <= budget_bytes:
            return None
        return nearest.demand_bytes, {}, nearest.lines
    return best[0], best[1], nearest.lines if nearest.number == best[2] else []


def _needed(trial: FrozenTrial, budget_bytes: int) -> int | None:
    """Return what a trial needs at least, None if all that is known is that it is too much."""
    excess = trial.constraints.get(CONSTRAINT)
    if excess is not None:
        return budget_bytes + round(excess * GIB)
    known = trial.user_attrs.get("demand_bytes") or trial.user_attrs.get("predicted_peak_bytes")
    # A prediction that said it would fit, of a trial that ran out of memory, was wrong.
    return int(known) if known is not None and known > budget_bytes else None
