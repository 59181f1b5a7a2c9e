"""What a sampler sees of a study: also the trials that ended badly, which Optuna's own skip.

    trial = SeenStudy(study).ask(distributions)

In Optuna 5.0 (`optuna/samplers`), TPE learns from COMPLETE and PRUNED trials, GP, NSGA-II and -III
and CMA-ES from COMPLETE ones, and CMA-ES uses no constraint; nobody learns from FAIL. So a region
that runs out of memory, or crashes, would be suggested again and again. Here those trials get the
figures that such a sampler can read, while it is asked and nowhere else: the study itself holds
nothing that was not measured.

A trial over the budget gets the median error, since it says nothing of the error and its
constraint says the rest; for CMA-ES, which ranks, it is worse than the worst by its excess. A
trial that failed gets the worst error. One that the pruner ended gets what it last reported. A
duplicate is shown as the trial that it repeats.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Container, Mapping, Sequence

from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from expt.sweep.trials import CONSTRAINT, FAILED, KIND
from expt.units import GIB, MIB

COMPLETE_ONLY = (GPSampler, NSGAIISampler, NSGAIIISampler, CmaEsSampler)
UNKNOWN_EXCESS = MIB / GIB
"""Of a trial that ran out of memory, nobody knows by how much; in GiB."""


class SeenStudy(Study):
    """A study whose trials are shown as its sampler can use them.

    Args:
        study: whose state it shares; it is not changed but by `ask`.

    """

    def __init__(self, study: Study) -> None:
        self.__dict__.update(study.__dict__)

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy, None, use_cache)
        found = seen(trials, self.sampler)
        return found if states is None else [trial for trial in found if trial.state in states]


def seen(trials: Sequence[FrozenTrial], sampler: BaseSampler) -> list[FrozenTrial]:
    """Return the trials as a sampler may use them; what it can use as it is, is not copied."""
    if isinstance(sampler, TPESampler):
        numbered = {trial.number: trial for trial in trials}
        return [_as_pruned(trial, _repeated(trial, numbered)) for trial in trials]
    if not isinstance(sampler, COMPLETE_ONLY):
        return list(trials)
    known = [
        trial.values
        for trial in trials
        if trial.state is TrialState.COMPLETE and all(map(math.isfinite, trial.values))
    ]
    if not known:
        return list(trials)
    columns = list(zip(*known, strict=True))
    median, worst = [statistics.median(one) for one in columns], [max(one) for one in columns]
    limited = any(CONSTRAINT in trial.constraints for trial in trials)
    ranks = isinstance(sampler, CmaEsSampler)
    numbered = {trial.number: trial for trial in trials}
    return [
        _as_complete(
            trial,
            _repeated(trial, numbered),
            median,
            worst,
            limited,
            ranks,
        )
        for trial in trials
    ]


def _repeated(trial: FrozenTrial, numbered: Mapping[int, FrozenTrial]) -> FrozenTrial:
    """Return the trial that one repeats, or itself."""
    number = trial.user_attrs.get("duplicate_of")
    return trial if number is None else numbered.get(number, trial)


def _as_pruned(trial: FrozenTrial, first: FrozenTrial) -> FrozenTrial:
    """Let TPE see what failed: as bad as what was pruned before its first epoch.

    `first` is the trial that it repeats, or itself.
    """
    repeats = first is not trial and trial.state is not TrialState.COMPLETE
    if not repeats and trial.state is not TrialState.FAIL:
        return trial
    if trial.user_attrs.get(KIND) is None:
        return trial
    shown = copy.copy(trial)
    pruned = first.state is TrialState.PRUNED
    shown.state = TrialState.PRUNED
    shown.intermediate_values = first.intermediate_values if repeats and pruned else {}
    return shown


def _as_complete(
    trial: FrozenTrial,
    first: FrozenTrial,
    median: list[float],
    worst: list[float],
    limited: bool,
    ranks: bool,
) -> FrozenTrial:
    """Let a sampler that reads COMPLETE trials see one of another kind.

    `first` is the trial that it repeats, or itself.
    """
    complete = trial.state is TrialState.COMPLETE
    if not complete and (not trial.state.is_finished() or trial.user_attrs.get(KIND) is None):
        return trial
    kind = first.user_attrs.get(KIND)
    if not complete and kind is None:
        return trial  # it repeats what nobody here has seen the end of
    excess = trial.constraints.get(CONSTRAINT)
    if excess is None and kind == "oom":
        excess = UNKNOWN_EXCESS
    over = excess is not None and excess > 0
    if complete:
        values = trial.values
    elif over:
        values = median
    elif first.intermediate_values and kind not in FAILED:
        values = [first.intermediate_values[max(first.intermediate_values)]]
    else:
        values = worst
    if over and ranks and excess is not None:
        values = [bad + excess for bad in worst]
    if limited and excess is None:
        excess = 0.0  # GP wants to know it of all trials
    told = excess is None or CONSTRAINT in trial.constraints
    if complete and told and values == trial.values:
        return trial
    shown = copy.copy(trial)
    shown.state, shown.values = TrialState.COMPLETE, values
    if excess is not None and not told:
        shown._system_attrs = dict(trial.system_attrs)
        shown.set_constraint(CONSTRAINT, excess)
    return shown
