"""What may be made smaller: the dimensions that a model's or a data set's YAML names.

    scale: {data.pixels: [224, 168, 112], model.rank: [32, 16, 8]}

Values go from the largest to the smallest. A level takes one of each; levels with fewer steps down
come first, so that a budget is filled before anything is made smaller than it must be.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from expt.config.settings import Settings
from expt.errors import ConfigError, nearest


@dataclass(frozen=True)
class Level:
    """One value of every dimension, as changes to the configuration."""

    changes: tuple[str, ...]
    steps: tuple[int, ...]
    """How far down each dimension is."""

    @property
    def steps_down(self) -> int:
        """How many steps down there are in all."""
        return sum(self.steps)

    def is_within(self, other: Level) -> bool:
        """Tell whether no dimension is further down than in the other level."""
        return all(mine <= its for mine, its in zip(self.steps, other.steps, strict=True))


def scales(settings: Settings) -> dict[str, list[Any]]:
    """Return the dimensions of model and data, from the configured value down.

    Raises:
        ConfigError: a dimension names no setting, or has no values.

    """
    found: dict[str, list[Any]] = {}
    problems = []
    for group in ("model", "data"):
        named = settings.arguments[group].get("scale") or {}
        if not isinstance(named, Mapping):
            raise ConfigError(f"{group}.scale must name settings and their values, got {named!r}")
        for name, values in named.items():
            owner, _, argument = str(name).partition(".")
            known = settings.arguments.get(owner, {})
            if owner not in ("model", "data") or argument not in known:
                candidates = [
                    f"{one}.{argument}"
                    for one in ("model", "data")
                    for argument in settings.arguments[one]
                ]
                problems.append(
                    f"{group}.scale: {name} is no setting of the model or the data; "
                    f"{nearest(str(name), candidates)}"
                )
            elif not isinstance(values, Sequence) or isinstance(values, str) or not values:
                problems.append(f"{group}.scale.{name} must be a list of values, got {values!r}")
            else:
                now, listed = known[argument], list(values)
                start = listed.index(now) if now in listed else -1
                found[str(name)] = listed[start:] if start >= 0 else [now, *_below(now, listed)]
    if problems:
        raise ConfigError(problems)
    return found


def levels(dimensions: Mapping[str, Sequence[Any]]) -> list[Level]:
    """Return the levels, the ones with the fewest steps down first."""
    made = [
        Level(
            tuple(
                f"{name}={json.dumps(values[step])}"
                for (name, values), step in zip(dimensions.items(), steps, strict=True)
                if step
            ),
            steps,
        )
        for steps in itertools.product(*(range(len(values)) for values in dimensions.values()))
    ]
    made.sort(key=lambda level: level.steps_down)
    return made


def _below(now: Any, values: Sequence[Any]) -> list[Any]:
    """Return the values below a configured one that is not among them."""
    if isinstance(now, int | float):
        return [value for value in values if value < now]
    return list(values)
