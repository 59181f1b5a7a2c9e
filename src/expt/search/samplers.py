"""Which configurations are suggested, and which trials are ended early: Optuna's own classes."""

from __future__ import annotations

import copy
import functools
import math
import statistics
import warnings
from collections.abc import Container, Mapping, Sequence
from typing import Any

from hydra.utils import instantiate
from optuna import pruners, samplers
from optuna.exceptions import ExperimentalWarning
from optuna.samplers import (
    BaseSampler,
    CmaEsSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    TPESampler,
)
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from expt.config.search_node import Pruner
from expt.errors import ConfigError, UserError
from expt.result import Outcome
from expt.search.space import Space, choices
from expt.search.trial import CONSTRAINT, seen_kind
from expt.units import GIB, MIB

ALLOWED = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*")
SINGLE_OBJECTIVE = (samplers.CmaEsSampler,)
ONE_SEQUENCE = (samplers.QMCSampler, samplers.GridSampler)
"""Samplers whose workers draw from one sequence, which the seed names."""


def make_sampler(
    node: Mapping[str, Any], space: Space, seed: int, objectives: int = 1
) -> samplers.BaseSampler:
    """Return the sampler that ``hydra/sweeper/sampler=NAME`` chose.

    Args:
        node: its class and arguments; `seed` holds where it has none of its own.
        space: a grid needs it, and all of its distributions discrete.
        seed: of the random numbers.
        objectives: how many figures are compared.

    Raises:
        UserError: it cannot be had, or not with this space or these objectives.

    """
    target = str(node["_target_"])
    name = target.rpartition(".")[2]
    given = {**node, "seed": seed} if "seed" in node and node["seed"] is None else dict(node)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            made = instantiate(given, _execution_whitelist_=ALLOWED, _convert_="all")
            if isinstance(made, functools.partial):
                made = made(_grid(space))
    except ConfigError:
        raise
    except Exception as error:  # Hydra wraps what the constructor raised
        cause = error.__cause__ or error
        if isinstance(cause, ImportError):
            missing = cause.name or str(cause)
            raise UserError(
                f"{name} needs the package {missing}, which is not installed: pip install {missing}"
            ) from error
        raise UserError(f"hydra/sweeper/sampler: {name}: {str(cause).splitlines()[0]}") from error
    if objectives > 1 and isinstance(made, SINGLE_OBJECTIVE):
        raise ConfigError(
            f"{name} compares one figure, and search.objectives has {objectives}; try "
            "hydra/sweeper/sampler=nsgaii or tpe"
        )
    assert isinstance(made, samplers.BaseSampler)
    return made


def seed_of(sampler: samplers.BaseSampler, seed: int, worker: int) -> int:
    """Return the seed of the n-th worker of a study, so that no two draw the same numbers.

    Args:
        sampler: its kind decides whether workers share a sequence.
        seed: of the search.
        worker: 0 for the first, also after a restart.

    """
    return seed if isinstance(sampler, ONE_SEQUENCE) else seed + 7919 * worker


def make_pruner(kind: Pruner, epochs: int) -> pruners.BasePruner:
    """Return a pruner that compares trials at the ends of epochs.

    Args:
        kind: which.
        epochs: that a trial trains for at most; the brackets of Hyperband are cut from it, and the
            median compares in its second half, since before it what is fast early is ahead.

    """
    if kind is Pruner.median:
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=epochs // 2 + 1)
    if kind is Pruner.hyperband:
        return pruners.HyperbandPruner(min_resource=1, max_resource=epochs, reduction_factor=3)
    if kind is Pruner.asha:
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
    return pruners.NopPruner()


def _grid(space: Space) -> dict[str, list[Any]]:
    """Return all values of every setting.

    Raises:
        ConfigError: one has infinitely many.

    """
    found = {name: choices(one) for name, one in space.distributions.items()}
    endless = [name for name, values in found.items() if values is None]
    if endless:
        raise ConfigError(
            "hydra/sweeper/sampler=grid tries every point, and these have infinitely many values: "
            f"{', '.join(endless)}; give them as choice(...) or range(...), or use another sampler"
        )
    return {name: values for name, values in found.items() if values is not None}


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
        found = seen(trials, self.sampler, self.directions)
        return found if states is None else [trial for trial in found if trial.state in states]


def seen(
    trials: Sequence[FrozenTrial], sampler: BaseSampler, directions: Sequence[StudyDirection]
) -> list[FrozenTrial]:
    """Return the trials as a sampler may use them; what it can use as it is, is not copied.

    Args:
        trials: of the study.
        sampler: that is to be asked.
        directions: of the study, one per figure.

    """
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
    signs = [-1.0 if one is StudyDirection.MAXIMIZE else 1.0 for one in directions]
    median = [statistics.median(one) for one in columns]
    worst = [sign * max(sign * v for v in one) for sign, one in zip(signs, columns, strict=True)]
    limited = any(CONSTRAINT in trial.constraints for trial in trials)
    numbered = {trial.number: trial for trial in trials}
    return [
        _as_complete(
            trial,
            _repeated(trial, numbered),
            median,
            worst,
            limited,
            signs if isinstance(sampler, CmaEsSampler) else None,
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
    if seen_kind(trial) is None:
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
    signs: list[float] | None,
) -> FrozenTrial:
    """Let a sampler that reads COMPLETE trials see one of another kind.

    `first` is the trial that it repeats, or itself; `signs` are those of what is worse, for a
    sampler that ranks by the figures alone.
    """
    complete = trial.state is TrialState.COMPLETE
    if not complete and (not trial.state.is_finished() or seen_kind(trial) is None):
        return trial
    kind = seen_kind(first)
    if not complete and kind is None:
        return trial  # it repeats what nobody here has seen the end of
    excess = trial.constraints.get(CONSTRAINT)
    if excess is None and kind is Outcome.out_of_memory:
        excess = UNKNOWN_EXCESS
    over = excess is not None and excess > 0
    if complete:
        values = trial.values
    elif over:
        values = median
    elif first.intermediate_values and not (kind and kind.columns.trial_state == "FAIL"):
        values = [first.intermediate_values[max(first.intermediate_values)]]
    else:
        values = worst
    if over and signs is not None and excess is not None:
        values = [bad + sign * excess for sign, bad in zip(signs, worst, strict=True)]
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
