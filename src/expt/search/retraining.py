"""`search.retrain`: the best points of a search, trained again with `search.retrain_with`.

Trials are short so that there can be many, and a short training favours what learns fast. The
retraining is a study of its own in the search's folder, with the same space less what
`search.retrain_with` sets. Its points are those of the best trials and of the presets, nothing is
suggested, and it goes on, is shared and is recorded as any search is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from optuna.study import Study
from optuna.trial import FrozenTrial

from expt.config.compose import key, prepare_arguments
from expt.config.explain import first_lines
from expt.config.search_node import SearchConfig
from expt.errors import ConfigError, UserError
from expt.result import Outcome
from expt.search.metric import metric_of
from expt.search.plan_cache import FOLDER
from expt.search.request import Request, request_of
from expt.search.space import Space
from expt.search.trial import CONSTRAINT, PRESET, kind_of
from expt.search.winner import feasible, pareto

NAME = "{study}_retrained"
GIVEN_POINTS = {"_target_": "optuna.samplers.RandomSampler", "seed": None}
"""The sampler of a study whose points are all given; it is never asked for one."""
OWN = {"study", "repeats", "n_jobs", "retry", "test_winner", "time_limit_seconds",
       "trial_time_limit_seconds", "plan_time_limit_seconds"}  # fmt: skip
"""Settings of `search` that a retraining may have of its own."""
WHERE = "search.retrain_with"


def retraining_of(
    request: Request, config: DictConfig, arguments: Sequence[str], hydra_context: HydraContext
) -> Request:
    """Return the request of a search's retraining.

    Args:
        request: of the search.
        config: as it was composed.
        arguments: of its command line.
        hydra_context: composes.

    Raises:
        ConfigError: what `search.retrain_with` may not set, or what makes no search.
        HydraException: it cannot be read.

    """
    given = lines_of(request.config)
    # Those that choose nothing, `experiment=null`, are none of the lines, and take back a choice.
    names = {key(line) for line in (*request.config.retrain_with, *given)}
    kept = [line for line in arguments if key(line) not in names]
    found = request_of(config, [*kept, *given], GIVEN_POINTS, hydra_context)
    if request.space and not found.space:
        raise ConfigError("it sets all of search.space, and nothing would tell the points apart")
    study = found.config.study
    if study == request.config.study:
        raise ConfigError(f"search.study={study} is the search's own; give it another name")
    if study.startswith(("trial_", "aside_")) or study in ("plots", FOLDER):
        raise ConfigError(f"search.study={study}: this is the name of a folder of the search's")
    return replace(found, folder=request.folder / study)


def lines_of(node: SearchConfig) -> list[str]:
    """Return the settings of a retraining that its search does not have.

    Raises:
        ConfigError: they are not a retraining's to have.
        HydraException: one cannot be read.

    """
    problems = [problem for line in node.retrain_with if (problem := _problem(line)) is not None]
    if problems:
        raise ConfigError(problems)
    lines = prepare_arguments(node.retrain_with)
    names = {key(line) for line in lines}
    own = [
        f"search.study={NAME.format(study=node.study)}",
        # What of the search is about short trials, or about which points are suggested.
        "search.pruner=none", "search.time_limit_seconds=null",
        "search.trial_time_limit_seconds=null", "search.enqueue=[]", "search.warm_start=null",
        "search.retrain=0", f"{WHERE}=[]",
    ]  # fmt: skip
    return [*lines, *(line for line in own if key(line) not in names)]


@contextmanager
def of_retraining() -> Iterator[None]:
    """Say of what goes wrong in here that it is the retraining's.

    Raises:
        ConfigError: `search.retrain_with` was refused.
        UserError: something else that only the user can mend.

    """
    try:
        yield
    except ConfigError as error:
        raise ConfigError([f"{WHERE}: {problem}" for problem in error.problems]) from error
    except UserError as error:
        raise UserError(f"{WHERE}: {error}") from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{WHERE}: {first_lines(error)}") from error


def points_to_retrain(
    study: Study, limited: bool, count: int, space: Space
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the points of the best trials inside the budget, the best first, and those of presets.

    Of a search that compares the peak too, the best are those that no other beats. A preset counts
    as long as it fits, also if it was ended early. No point is there twice.

    Args:
        study: of the search.
        limited: whether it has a budget.
        count: how many of the best, at most.
        space: of the retraining.

    """
    trials, metric = study.get_trials(deepcopy=False), metric_of(study)
    inside = [trial for trial in trials if feasible(trial, limited)]
    ranked = inside if len(study.directions) == 1 else pareto(trials, limited, metric)
    ranked = sorted(ranked, key=lambda trial: (metric.cost(trial.values[0]), trial.number))
    presets = [trial for trial in trials if _is_fitting_preset(trial)]

    def points(chosen: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        return [{name: one.params[name] for name in space.distributions} for one in chosen]

    best = _distinct(points(ranked))[:count]
    return best, _distinct([*best, *points(presets)])[len(best) :]


def _is_fitting_preset(trial: FrozenTrial) -> bool:
    """Tell whether a trial is a preset's, and nothing says that it does not fit or does not work.

    One that was slow to learn, so that a pruner or the limit in time ended it, may be the best.
    """
    ended = (Outcome.completed, Outcome.pruned, Outcome.timeout, Outcome.duplicate)
    over = trial.constraints.get(CONSTRAINT, 0.0) > 0
    return PRESET in trial.user_attrs and kind_of(trial) in ended and not over


def _distinct(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return list({tuple(sorted(point.items())): dict(point) for point in points}.values())


def _problem(line: str) -> str | None:
    """Say why a setting is not a retraining's to have, None if it is."""
    name = key(line)
    group, _, rest = name.partition(".")
    if not line.startswith("~") and "=" not in line:
        return f"{line!r} is no setting; write it as on the command line, like trainer.epochs=30"
    if group == "hydra" or name.startswith("hydra/"):
        return f"{name} is Hydra's own; give it on the command line"
    if group in ("task", "tracking") or (group == "search" and rest not in OWN):
        own = ", ".join(f"search.{one}" for one in sorted(OWN))
        return (
            f"{name} is the search's to set; a retraining has settings of the model, the data, the "
            f"training and the memory, and {own}"
        )
    if OverridesParser.create().parse_override(line).is_sweep_override():
        return f"{line} has several values; a retraining varies nothing else"
    return None
