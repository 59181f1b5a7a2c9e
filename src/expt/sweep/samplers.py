"""Which configurations are suggested, and which trials are ended early: Optuna's own classes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from optuna import pruners, samplers
from optuna.exceptions import ExperimentalWarning

from expt.errors import ConfigError, UserError
from expt.search_config import Pruner
from expt.sweep.space import Space, choices

ALLOWED = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*")
FIRST_COMPARED_EPOCH = 2
"""At the end of the first epoch the median of others says little."""
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
        objectives: how many figures are minimised.

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
            f"{name} minimises one figure, and search.objectives has {objectives}; try "
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
        epochs: that a trial trains for at most; the brackets of Hyperband are cut from it.

    """
    if kind is Pruner.median:
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=FIRST_COMPARED_EPOCH)
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
