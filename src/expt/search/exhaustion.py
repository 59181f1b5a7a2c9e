"""When a search has nothing more to expect: every point was tried, or none of them fits.

Whether anything in a space fits is not known before all of it was predicted, so a search in which
nothing has fitted yet tries in order: what the sampler suggests (`LEAST_SUGGESTIONS`), then the
lightest of that with one setting changed, as long as that makes it lighter. A peak falls with
nearly every setting that has to do with it, whatever the others are, so that this ends at the
lightest point that there is, after a few dozen predictions; and where a small corner of a space
fits, it is the way there.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial

from expt.errors import SearchError
from expt.result import Outcome
from expt.search.space import Space, count_of, same, value_at
from expt.search.trial import (
    CONSTRAINT,
    KIND,
    PREDICTED,
    STARTED,
    Prediction,
    kind_of,
    technique_lines,
)
from expt.units import GIB, MIB, format_bytes

LEAST_SUGGESTIONS = 10
"""Trials, none of which fitted, before the lightest is looked for."""
LEAST_TRIALS = 30
"""Trials, none of which fitted, before nothing is said to fit."""
MOST_VALUES = 5
"""Of a setting, tried in the lightest point: all where there are so few, else spread evenly."""


def all_tried(trials: Sequence[FrozenTrial], space: Space) -> bool:
    """Tell whether every point of a space was suggested."""
    if space.size is None or len(trials) < space.size:
        return False
    points = {
        _point(trial.params)
        for trial in trials
        if len(trial.params) == len(space.distributions)
        and not (trial.state.is_finished() and KIND not in trial.user_attrs)
    }
    return len(points) >= space.size


def nothing_fitted(trials: Sequence[FrozenTrial]) -> bool:
    """Tell whether there is no trial that fits, or may turn out to."""
    return not any(
        trial.user_attrs.get(STARTED)
        if (kind := kind_of(trial)) is None
        else kind.columns.counts and not kind.columns.over
        for trial in trials
    )


def over_budget(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return the trials whose demand is known to exceed the budget.

    One that ran out of memory says only what the allocation that failed would have taken more,
    which is no measure of how heavy it is; it counts where it was predicted.
    """
    return [
        trial
        for trial in trials
        if trial.constraints.get(CONSTRAINT, 0.0) > 0
        and _over(trial)
        and (kind_of(trial) is not Outcome.out_of_memory or PREDICTED in trial.user_attrs)
    ]


def lighter_point(trials: Sequence[FrozenTrial], space: Space) -> dict[str, Any] | None:
    """Return the lightest point seen with one setting changed, None once all of them were tried.

    The values that were lightest so far come first.
    """
    known = over_budget(trials)
    if not known:
        return None
    lightest = min(known, key=lambda trial: (trial.constraints[CONSTRAINT], trial.number))
    tried = {_point(trial.params) for trial in trials}
    changed = [
        (name, value)
        for name, one in space.distributions.items()
        for value in _values(one)
        if _point({**lightest.params, name: value}) not in tried
    ]

    def excess(change: tuple[str, Any]) -> float:
        name, value = change
        seen = [t.constraints[CONSTRAINT] for t in known if same(t.params.get(name), value)]
        return statistics.fmean(seen) if seen else float("inf")

    best = min(changed, key=excess, default=None)
    return None if best is None else {**lightest.params, best[0]: best[1]}


def _values(one: BaseDistribution) -> Sequence[Any]:
    if isinstance(one, FloatDistribution) and one.step is None:
        return one.low, one.high
    count = count_of(one) or 0
    places: Iterable[int] = range(count)
    if count > MOST_VALUES:
        places = (round(place * (count - 1) / (MOST_VALUES - 1)) for place in range(MOST_VALUES))
    return [value_at(one, place) for place in places]


def _point(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in params.items()))


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


def nothing_found(
    study: Study,
    nearest: Nearest,
    adviser: Adviser,
    space: Space,
    seconds: float | None = None,
) -> SearchError:
    """Return the error that says why nothing was found, and what would change that.

    Args:
        study: that has no winner.
        nearest: the trial with the smallest predicted peak.
        adviser: knows the budget.
        space: of the study.
        seconds: the search's limit in time, where that ended it.

    """
    trials = study.get_trials(deepcopy=False)
    failed = [t for t in trials if (kind := kind_of(t)) and kind.columns.trial_state == "FAIL"]
    over = [trial for trial in trials if _over(trial)]
    if not over and failed:
        reasons = "; ".join(dict.fromkeys(str(t.user_attrs.get("error")) for t in failed[-3:]))
        return SearchError(
            f"no trial of {study.study_name} came to a validation figure: {len(failed)} failed, "
            f"the last with: {reasons}"
        )
    budget = adviser.budget_bytes
    if seconds is not None:
        seen = smallest_seen(study, nearest, budget, space)
        return SearchError(
            f"no trial of {study.study_name} came to a validation figure in "
            f"search.time_limit_seconds={seconds:g}{f'; {seen}' if seen else ''}; started again, "
            "the search goes on"
        )
    if budget is None:
        return SearchError(
            f"no trial of {study.study_name} came to a validation figure: memory ran out in "
            f"{len(over)} of them; widen search.space towards what needs less"
        )
    smallest = _smallest(over, nearest, budget, space)
    message = f"nothing fits {format_bytes(budget)} (memory.budget)"
    if smallest is None:
        return SearchError(f"{message}; raise the budget, or widen search.space")
    peak, point, lines = smallest
    message += f": {_words(peak, point)}"
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
    found = _smallest([trial for trial in trials if _over(trial)], nearest, budget_bytes, space)
    return None if found is None else _words(found[0], found[1])


def _words(peak: int, point: Sequence[str]) -> str:
    settings = f", with {' '.join(point)}" if point else ""
    return f"the smallest peak seen is {format_bytes(peak)}{settings}"


def _over(trial: FrozenTrial) -> bool:
    kind = kind_of(trial)
    return kind is not None and kind.columns.over


def _smallest(
    over: list[FrozenTrial], nearest: Nearest, budget_bytes: int, space: Space
) -> tuple[int, list[str], list[str]] | None:
    """Return the smallest peak known, its point, and its settings where this worker has them."""
    best: tuple[int, FrozenTrial] | None = None
    for trial in over:
        known = _needed(trial, budget_bytes)
        if known is not None and (best is None or known < best[0]):
            best = (int(known), trial)
    if best is None:
        if nearest.demand_bytes is None or nearest.demand_bytes <= budget_bytes:
            return None
        return nearest.demand_bytes, [], nearest.lines
    peak, trial = best
    point = [*space.lines(trial.params), *technique_lines(trial)] if trial.params else []
    return peak, point, nearest.lines if nearest.number == trial.number else []


def _needed(trial: FrozenTrial, budget_bytes: int) -> int | None:
    """Return what a trial needs at least, None if all that is known is that it is too much."""
    excess = trial.constraints.get(CONSTRAINT)
    if excess is not None:
        return budget_bytes + round(excess * GIB)
    known = trial.user_attrs.get("demand_bytes") or trial.user_attrs.get("predicted_peak_bytes")
    # A prediction that said it would fit, of a trial that ran out of memory, was wrong.
    return int(known) if known is not None and known > budget_bytes else None
