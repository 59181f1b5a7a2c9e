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
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from expt.sweep.space import Space, choices
from expt.sweep.trials import CONSTRAINT, KIND, OVER, PREDICTED, STARTED, UNTRAINED

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
        trial.user_attrs[KIND] not in UNTRAINED | OVER
        if KIND in trial.user_attrs
        else trial.user_attrs.get(STARTED)
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
        and (
            trial.user_attrs.get(KIND) in ("infeasible_predicted", "infeasible_measured")
            or (trial.user_attrs.get(KIND) == "oom" and PREDICTED in trial.user_attrs)
        )
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
        seen = [t.constraints[CONSTRAINT] for t in known if t.params.get(name) == value]
        return statistics.fmean(seen) if seen else float("inf")

    best = min(changed, key=excess, default=None)
    return None if best is None else {**lightest.params, best[0]: best[1]}


def waiting(trials: Sequence[FrozenTrial]) -> bool:
    """Tell whether a point is to be tried before the sampler is asked again."""
    return any(trial.state is TrialState.WAITING for trial in trials)


def _values(one: BaseDistribution) -> Sequence[Any]:
    if isinstance(one, FloatDistribution) and one.step is None:
        return one.low, one.high
    every = choices(one) or []
    if len(every) <= MOST_VALUES:
        return every
    last = len(every) - 1
    return [every[round(place * last / (MOST_VALUES - 1))] for place in range(MOST_VALUES)]


def _point(params: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, str(value)) for name, value in params.items()))
