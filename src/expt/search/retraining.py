"""`search.retrain`: the best points of a search, trained again with `search.retrain_with`.

Trials are short so that there can be many, and a short training favours what learns fast. The
retraining is a study of its own beside the search's, with the same space less what
`search.retrain_with` sets. Its points are those of the best trials and of the presets, nothing is
suggested, and it goes on, is shared and is recorded as any search is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import HydraContext
from omegaconf import DictConfig
from optuna.study import Study

from expt.config.compose import key, quoted
from expt.config.search_node import SearchConfig
from expt.errors import ConfigError
from expt.search.metric import metric_of
from expt.search.request import Request, request_of
from expt.search.space import settings_lines
from expt.search.winner import feasible, pareto

NAME = "{study}_retrained"
GIVEN_POINTS = {"_target_": "optuna.samplers.RandomSampler", "seed": None}
"""The sampler of a study whose points are all given; it is never asked for one."""
OWN = {"study", "repeats", "presets", "n_jobs", "retry", "test_winner", "trial_time_limit_seconds",
       "plan_time_limit_seconds"}  # fmt: skip
"""Settings of `search` that a retraining may have of its own."""


def retraining_of(
    request: Request, config: DictConfig, arguments: Sequence[str], hydra_context: HydraContext
) -> Request | None:
    """Return the request of a search's retraining, None without one.

    Args:
        request: of the search.
        config: as it was composed.
        arguments: of its command line.
        hydra_context: composes.

    Raises:
        ConfigError: what `search.retrain_with` may not set, or what makes no search.

    """
    node = request.config
    if node.retrain == 0:
        return None
    given = lines_of(node)
    names = {key(line) for line in given}
    kept = [line for line in arguments if key(line) not in names]
    try:
        found = request_of(config, [*kept, *given], GIVEN_POINTS, hydra_context)
    except ConfigError as error:
        raise of_retraining(error) from error
    return replace(found, folder=request.folder.with_name(found.config.study))


def lines_of(node: SearchConfig) -> list[str]:
    """Return the settings of a retraining that its search does not have.

    Raises:
        ConfigError: they are not a retraining's to have.

    """
    lines = [f"{name}={_text(value)}" for name, value in node.retrain_with.items()]
    problems = [problem for line in lines if (problem := _problem(line)) is not None]
    if problems:
        raise ConfigError(problems)
    own: dict[str, Any] = {
        "search.study": NAME.format(study=node.study),
        # What of the search is about short trials, or about which points are suggested.
        "search.pruner": "none", "search.trial_time_limit_seconds": None,
        "search.enqueue": [], "search.warm_start": None,
        "search.retrain": 0, "search.retrain_with": None,
    }  # fmt: skip
    names = {key(line) for line in lines}
    return [*lines, *settings_lines({k: v for k, v in own.items() if k not in names})]


def of_retraining(error: ConfigError) -> ConfigError:
    """Return an error of a retraining that says so."""
    return ConfigError([f"search.retrain_with: {problem}" for problem in error.problems])


def points_to_retrain(study: Study, limited: bool, count: int) -> list[Mapping[str, Any]]:
    """Return the points of the best trials inside the budget, the best first.

    Of a search that compares the peak too, they are those that no other beats.

    Args:
        study: of the search.
        limited: whether it has a budget.
        count: how many at most.

    """
    trials, metric = study.get_trials(deepcopy=False), metric_of(study)
    found = [trial for trial in trials if feasible(trial, limited)]
    if len(study.directions) > 1:
        found = pareto(trials, limited, metric)
    found.sort(key=lambda trial: (metric.cost(trial.values[0]), trial.number))
    return [trial.params for trial in found[:count]]


def _text(value: Any) -> str:
    """Return a value in Hydra's grammar; a text that has a meaning in it, has it."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_text(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if not isinstance(value, str):
        return settings_lines({"x": value})[0].partition("=")[2]
    try:
        OverridesParser.create().parse_override(f"x={value}")
    except HydraException:
        return quoted(value)
    return value


def _problem(line: str) -> str | None:
    """Say why a setting is not a retraining's to have, None if it is."""
    name = key(line)
    group, _, rest = name.partition(".")
    if group == "hydra" or name.startswith("hydra/"):
        return f"search.retrain_with: {name} is Hydra's own; give it on the command line"
    if group in ("task", "tracking") or (group == "search" and rest not in OWN):
        own = ", ".join(f"search.{one}" for one in sorted(OWN))
        return (
            f"search.retrain_with: {name} is the search's to set; a retraining has settings of the "
            f"model, the data, the training and the memory, and {own}"
        )
    if OverridesParser.create().parse_override(line).is_sweep_override():
        return f"search.retrain_with: {line} has several values; a retraining varies nothing else"
    return None
