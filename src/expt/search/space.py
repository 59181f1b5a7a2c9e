"""`Space`: the settings that a search varies, and how a point of it is written as settings.

Distributions are written in Hydra's sweep grammar and read by hydra-optuna-sweeper's own parser,
so that a file of `conf/search` and ``-m key=interval(0,1)`` on the command line mean the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    ChoiceSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Sweep,
)
from hydra.errors import HydraException
from omegaconf import OmegaConf
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from expt.errors import ConfigError

Check = Callable[[str], str | None]
"""Says what is wrong with the name or the type of one ``key=value``, None if nothing is."""
KEPT = (
    "memory.budget", "memory.plan_file", "memory.on_overflow", "trainer.test", "trainer.resume",
    "trainer.monitor",
)  # fmt: skip
"""Settings that the search itself decides."""
KEPT_GROUPS = ("search", "tracking", "task", "hydra")
FORMS = "choice(a,b), range(1,5), interval(0.0,0.3) or tag(log,interval(1e-4,1e-2))"


@dataclass(frozen=True)
class Space:
    """Distributions by setting, as it is written on the command line."""

    distributions: Mapping[str, BaseDistribution]

    @classmethod
    def parse(cls, entries: Mapping[str, str], check: Check = lambda line: None) -> Space:
        """Read distributions, and let every value that they may give be checked.

        Args:
            entries: setting to distribution, in Hydra's sweep grammar.
            check: see `Check`; gets the ends of an interval and each choice.

        Raises:
            ConfigError: with every problem found.

        """
        if not entries:
            raise ConfigError(
                "search.space is empty, so there is nothing to look for: give settings with a "
                f"distribution, like optimizer.lr=tag(log,interval(1e-4,1e-2)); forms: {FORMS}. "
                "A setting that is given on the command line is taken out of the space"
            )
        found: dict[str, BaseDistribution] = {}
        problems: list[str] = []
        for name, text in entries.items():
            try:
                found[name] = _distribution(name, str(text))
            except ConfigError as error:
                problems += error.problems
                continue
            wrong = [check(line(name, value)) for value in _samples(found[name])]
            problems += list(
                dict.fromkeys(f"search.space: {problem}" for problem in wrong if problem)
            )
        if problems:
            raise ConfigError(problems)
        return cls(found)

    def as_json(self) -> dict[str, Any]:
        """Return plain values that are equal for equal spaces."""
        return {
            name: json.loads(distribution_to_json(one))
            for name, one in sorted(self.distributions.items())
        }

    @cached_property
    def size(self) -> int | None:
        """Return the number of points, None if it is infinite."""
        count = 1
        for one in self.distributions.values():
            values = count_of(one)
            if values is None:
                return None
            count *= values
        return count

    def lines(self, params: Mapping[str, Any]) -> list[str]:
        """Return a point as settings of a command line."""
        return [line(name, params[name]) for name in self.distributions]

    def covering_points(self) -> Iterator[dict[str, Any]]:
        """Yield points that together have every choice, and both ends of what is ordered."""
        ends = {name: _ends(one) for name, one in self.distributions.items()}
        for place in range(max(map(len, ends.values()))):
            yield {name: values[place % len(values)] for name, values in ends.items()}

    def point(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the part of `values` that lies in the space, as the study writes it."""
        found = {}
        for name, value in values.items():
            if name in self.distributions:
                fitting = _fitting(self.distributions[name], value)
                if fitting is not None:
                    found[name] = fitting[0]
        return found


def line(name: str, value: object) -> str:
    """Return a setting as it is written on the command line; a string is one in its grammar."""
    if isinstance(value, bool):
        return f"{name}={str(value).lower()}"
    return f"{name}={'null' if value is None else value}"


def settings_lines(values: Mapping[str, Any]) -> list[str]:
    """Return settings as they are written on the command line."""
    return [line(name, value) for name, value in values.items()]


def typed(value: Any) -> Any:
    """Return what Hydra makes of a value of a point: a list, a dictionary, None, or itself."""
    if not isinstance(value, str):
        return value
    return plain(OverridesParser.create().parse_override(f"x={value}").value())


def plain(value: Any) -> Any:
    """Return a value of Hydra's grammar or of a configuration as plain Python."""
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True, enum_to_str=True)
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, QuotedString):
        return value.text
    return value.name if isinstance(value, Enum) else value


def same(one: Any, other: Any) -> bool:
    """Tell whether two plain values are equal; unlike for `==`, NaN is itself, also inside."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other or (one != one and other != other))


def count_of(one: BaseDistribution) -> int | None:
    """Return how many values a distribution has, None if infinitely many."""
    if isinstance(one, CategoricalDistribution):
        return len(one.choices)
    if isinstance(one, IntDistribution):
        return (one.high - one.low) // one.step + 1
    if isinstance(one, FloatDistribution) and one.step is not None:
        return round((one.high - one.low) / one.step) + 1
    return None


def value_at(one: BaseDistribution, index: int) -> Any:
    """Return one of the values that `count_of` counts, in their order from 0."""
    if isinstance(one, CategoricalDistribution):
        return one.choices[index]
    assert isinstance(one, IntDistribution | FloatDistribution) and one.step is not None
    return min(one.low + index * one.step, one.high)


def choices(one: BaseDistribution) -> list[Any] | None:
    """Return all values of a distribution, None if there are infinitely many."""
    count = count_of(one)
    return None if count is None else [value_at(one, index) for index in range(count)]


def _distribution(name: str, text: str) -> BaseDistribution:
    """Read one distribution.

    Raises:
        ConfigError: it cannot be read, is none, or the search itself decides this setting.

    """
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override

    key = name.lstrip("+~")
    if key in KEPT or key.partition(".")[0] in KEPT_GROUPS:
        raise ConfigError(f"search.space: {name} cannot be varied, the search decides it itself")
    try:
        override = _parsed(name, text)
        value = override.value()
        if isinstance(value, Sweep):
            _check_form(f"{name}={text}", value)
        if override.is_choice_sweep():
            return _categorical(f"{name}={text}", map(_choice, override.sweep_iterator()))
        found = create_optuna_distribution_from_override(override)
        if isinstance(value, RangeSweep) and value.tags:
            return _logarithmic(f"{name}={text}", found)
    except ConfigError:
        raise
    except (HydraException, AssertionError, ValueError, NotImplementedError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"search.space: {name}={text} is no distribution ({said}); write {FORMS}"
        ) from error
    if not isinstance(found, BaseDistribution):
        raise ConfigError(
            f"search.space: {name}={text} is a single value, not a distribution; write {FORMS}, or "
            "set it outside of the space"
        )
    return found


def _check_form(written: str, sweep: Sweep) -> None:
    """Refuse what would say nothing, or something else each time that it is read.

    Raises:
        ConfigError: the values are shuffled, or have a tag that a search does not know.

    """
    if isinstance(sweep, ChoiceSweep | RangeSweep) and sweep.shuffle:
        raise ConfigError(
            f"search.space: {written} has another order each time that it is read, by which no "
            "study is found again, and a sampler has an order of its own; leave shuffle out"
        )
    known = set() if isinstance(sweep, ChoiceSweep) else {"log"}
    if unknown := sorted(sweep.tags - known):
        raise ConfigError(
            f"search.space: {written}: the tag {unknown[0]} says nothing of this; write "
            "tag(log,…) of an interval or a range, int(interval(1,8)) for whole numbers, or no tag"
        )


def _logarithmic(written: str, one: BaseDistribution) -> BaseDistribution:
    """Return a range whose small values are drawn as often as its large ones.

    Raises:
        ConfigError: there is none of steps other than 1.

    """
    if not isinstance(one, IntDistribution) or one.step != 1:
        raise ConfigError(
            f"search.space: {written}: only a range in steps of 1 can be drawn by its logarithm; "
            "write tag(log,interval(0.1,0.9)), or list the values with choice(…)"
        )
    return IntDistribution(one.low, one.high, log=True)


def _categorical(written: str, values: Iterable[CategoricalChoiceType]) -> BaseDistribution:
    """Return the choices; equal ones would be one to the study, which finds them by equality.

    Raises:
        ConfigError: two are equal: the same one twice, or like 1 and true.

    """
    found: list[CategoricalChoiceType] = []
    for value in values:
        equal = [one for one in found if same(one, value)]
        if equal:
            both = f"{line('', equal[0])[1:]} and {line('', value)[1:]}"
            raise ConfigError(
                f"search.space: {written} has {both}, which a study cannot tell apart; leave one "
                "out"
            )
        found.append(value)
    return CategoricalDistribution(found)


def _parsed(name: str, text: str) -> Override:
    parser = OverridesParser.create()
    try:
        return parser.parse_override(f"{name}={text}")
    except HydraException:
        # In `choice(...)` there is no null, in a list of values there is.
        inner = re.fullmatch(r"choice\((.*\bnull\b.*)\)", text.strip())
        if inner is None:
            raise
        return parser.parse_override(f"{name}={inner[1]}")


def _choice(value: Any) -> CategoricalChoiceType:
    """Return a choice as the study keeps it: a number, or what gives it on the command line."""
    if isinstance(value, bool | int | float):
        return value
    if not isinstance(value, str | QuotedString):
        return str(Override._get_value_element_as_str(value))
    text = plain(value)
    try:
        override = OverridesParser.create().parse_override(f"x={text}")
        same = not override.is_sweep_override() and plain(override.value()) == text
    except HydraException:
        same = False
    return text if same else str(QuotedString(text, Quote.single).with_quotes())


def _samples(one: BaseDistribution) -> list[Any]:
    """Return values that stand for all that a distribution may give."""
    if isinstance(one, FloatDistribution):
        # Not a round one: 1.0 would pass for an integer.
        return [one.low + (one.high - one.low) * 0.123456789]
    return list(dict.fromkeys(_ends(one)))


def _ends(one: BaseDistribution) -> list[Any]:
    """Return every choice, or the least and the largest value."""
    if isinstance(one, CategoricalDistribution):
        return list(one.choices)
    assert isinstance(one, FloatDistribution | IntDistribution)
    return [one.low, one.high]


def _fitting(one: BaseDistribution, value: Any) -> tuple[Any] | None:
    """Return a composed value as a distribution has it, None if it is not in there."""
    if isinstance(one, CategoricalDistribution):
        same = [choice for choice in one.choices if _equal(typed(choice), plain(value))]
        if value is not None and not isinstance(value, bool):
            same += [choice for choice in one.choices if _written(choice) == _written(value)]
        return (same[0],) if same else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return (value,) if one._contains(value) else None


def _equal(one: Any, other: Any) -> bool:
    """Tell whether two plain values are the same setting: 1 is 1.0, and not True."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _written(value: Any) -> str:
    return line("", value).replace(" ", "").replace("'", "").replace('"', "").lower()
