"""The search for what fits: sizes, then how a step is computed, then what is given up.

`task=allocate` asks it about one budget, and `task=cards` about one after the other; a plan is made
once, whatever the budget. Nothing is made smaller while something fits. Among what fits, the least
arithmetic per sample is first, and then the largest micro-batch. What was given up on the way to
the first that fits, and is not needed there, is taken back.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from expt.commands.allocate.measures import Measure, emergency
from expt.commands.allocate.scales import Level, levels, scales
from expt.commands.allocate.variants import Changes, Variants
from expt.config.compose import key
from expt.config.settings import Settings
from expt.errors import ConfigError
from expt.memory.planning.predict import Plan
from expt.run.allocation import Choice, first_that_fits, least
from expt.run.batch_size import Limit
from expt.run.target import arithmetic

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Given:
    """Something that was given up, or tried in vain, where nothing fits.

    `planned` is with it and everything given up before; `refused` says why there is no plan.
    `taken_back` is what a later step made needless.
    """

    measure: Measure
    kept: bool = False
    saved_bytes: int = 0
    planned: Plan | None = None
    refused: str | None = None
    taken_back: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        if self.planned is None:
            return self.measure.as_dict() | {"refused": self.refused}
        return self.measure.as_dict() | {
            "peak_bytes": self.planned.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "kept": self.kept,
            "taken_back": self.taken_back,
        }


@dataclass(frozen=True)
class Found:
    """What fits a limit, or comes nearest, and what was given up for it."""

    choice: Choice[Changes]
    given_up: tuple[Given, ...] = ()


class Allocator:
    """Looks for what fits a limit.

    Args:
        variants: of the command line.
        settings: as they are configured.

    """

    def __init__(self, variants: Variants, settings: Settings) -> None:
        self.variants, self.settings = variants, settings
        self.dimensions = scales(settings)

    def find(self, limit: Limit) -> Found:
        """Return what fits a limit, giving up what must be.

        Raises:
            ConfigError: the configuration itself cannot be planned.

        """
        choice = self.largest(limit)
        if choice.fits:
            return Found(choice)
        found = self._give_up(choice, limit)
        return self._take_back(choice, found, limit) if found.choice.fits else found

    def plan(self, way: Changes, micro_batch: int) -> Plan:
        """Return the plan of a way, with the nearest micro-batch that its batch is made of."""
        variant = self.variants(way)
        if micro_batch not in variant.parts:
            micro_batch = max(
                (n for n in variant.parts if n <= micro_batch), default=min(variant.parts)
            )
        return variant.plan(micro_batch)

    def command(self, choice: Choice[Changes]) -> list[str]:
        """Return the settings to add to the command line for a choice."""
        parts = self.variants(choice.way).parts.get(choice.micro_batch)
        more = [] if parts is None else [f"memory.gradient_accumulation={parts}"]
        lines = {key(line): line for line in (*choice.way, *more)}  # the last of a setting holds
        return list(lines.values())

    def largest(self, limit: Limit, given_up: Changes = ()) -> Choice[Changes]:
        """Return the first way of the largest sizes that fits, or the one that takes least.

        Args:
            limit: what may be taken.
            given_up: changes that all ways have.

        Raises:
            ConfigError: the configuration itself cannot be planned.

        """
        self.variants().plan()
        every = levels(self.dimensions)
        level = first_level(every, lambda level: self._fits(level, given_up, limit))
        if level is not None:
            ways = list(self._ways(level.changes, given_up))
            found = first_that_fits(ways, list(self.variants(ways[0]).parts), self.plan, limit)
            if found.fits:
                return found
        smallest = next(
            ways for level in reversed(every) if (ways := [*self._ways(level.changes, given_up)])
        )
        return least(smallest, list(self.variants(smallest[0]).parts), self.plan, limit)

    def _fits(self, level: Level, given_up: Changes, limit: Limit) -> bool:
        """Tell whether any way fits at a level; the one of most arithmetic needs least."""
        return any(
            self._least(way, limit).fits
            for way in self._ways(level.changes, given_up, most_first=True)
        )

    def _least(self, way: Changes, limit: Limit) -> Choice[Changes]:
        """Return a way with the micro-batch that takes least."""
        return least([way], list(self.variants(way).parts), self.plan, limit)

    def _ways(
        self, level: Changes, given_up: Changes = (), most_first: bool = False
    ) -> Iterator[Changes]:
        """Yield the ways to compute a step at a level, by their arithmetic, the least first."""
        memory = self.settings.memory
        ways: list[Changes] = [()]
        if arithmetic(memory.precision, self.variants.target) == "fp32":
            ways.append(("memory.precision=bf16",))
        if memory.activation_checkpointing is False:
            ways += [(*way, "memory.activation_checkpointing=true") for way in ways]
        ways = list(dict.fromkeys(tuple(one for one in way if one not in given_up) for way in ways))
        for way in reversed(ways) if most_first else ways:
            if self._possible((*level, *way, *given_up)):
                yield (*level, *way, *given_up)

    def _possible(self, way: Changes) -> bool:
        """Tell whether a way can be planned; the configured one must be."""
        try:
            variant = self.variants(way)
            variant.plan(min(variant.parts))
        except Exception as error:  # a user's model may not work in bf16, say
            if not way:
                raise
            if not isinstance(error, ConfigError):
                log.info("no prediction with %s", way, exc_info=True)
            return False
        return True

    def _give_up(self, nearest: Choice[Changes], limit: Limit) -> Found:
        """Give up one thing after the other until it fits."""
        choice = nearest
        steps: dict[Measure, Given] = {}
        left = list(emergency(self.variants(choice.way)))
        gained = True
        while gained and not choice.fits:
            gained = False  # what saves nothing at one peak may save at the next
            for measure in list(left):
                way = (*choice.way, *measure.changes)
                try:
                    tried = self._least(way, limit)
                except Exception as error:  # not for this model; the reason is kept
                    steps[measure] = Given(measure, refused=" ".join(str(error).split())[:300])
                    left.remove(measure)
                    continue
                saved = limit.taken(choice.planned) - limit.taken(tried.planned)
                steps.pop(measure, None)
                steps[measure] = Given(measure, saved > 0, saved, tried.planned)
                if saved > 0:
                    choice, gained = tried, True
                    left.remove(measure)
                if choice.fits:
                    break
        return Found(choice, tuple(steps.values()))

    def _take_back(self, nearest: Choice[Changes], found: Found, limit: Limit) -> Found:
        """Take back what is not needed, and then make sizes as large as they can be."""
        needed = [given for given in found.given_up if given.kept]
        for given in list(needed):
            rest = [other for other in needed if other is not given]
            if self._allowed((*nearest.way, *_changes(rest)), limit):
                needed = rest
        steps = tuple(
            replace(given, kept=False, taken_back=True)
            if given.kept and given not in needed
            else given
            for given in found.given_up
        )
        larger = self.largest(limit, _changes(needed))
        return Found(larger, steps) if larger.fits else found

    def _allowed(self, way: Changes, limit: Limit) -> bool:
        """Tell whether a way fits with any micro-batch."""
        return self._possible(way) and self._least(way, limit).fits


def _changes(given: Sequence[Given]) -> Changes:
    return tuple(line for one in given for line in one.measure.changes)


def first_level(every: Sequence[Level], fits: Callable[[Level], bool]) -> Level | None:
    """Return the first level that fits, if smaller sizes never take more.

    Args:
        every: the ones wanted most first.
        fits: tells whether a level does; asked about few of them.

    """
    best, left = None, list(every)
    while left:
        level = left[len(left) // 2]
        if fits(level):
            best, left = level, left[: len(left) // 2]
        else:
            left = [other for other in left if not other.is_within(level)]
    return best
