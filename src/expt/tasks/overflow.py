"""A run that is predicted not to fit: what would, in words for a refusal or as settings."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

import torch

from expt.construction import Settings, smaller_sizes, techniques_of
from expt.errors import ConfigError
from expt.foresight import plan_training, savings
from expt.memory.measuring.device_memory import total_bytes
from expt.memory.planning.planning import Plan, Target
from expt.memory.recovery.ladder import PLANNED_LADDER, adapt, changes
from expt.memory.techniques.techniques import Techniques
from expt.plan_tables import spelled_out
from expt.protocols import DataSet
from expt.schema import Fallback
from expt.tasks.prediction import Predictor
from expt.units import format_bytes

log = logging.getLogger(__name__)

PRECISION = "memory.precision="
"""A change that is not on the ladder: it is other arithmetic."""


@dataclass(frozen=True)
class Limit:
    """What a run may take: its budget, or all that the device has.

    Without a budget, running out of memory is an error that recovery meets on CUDA; on the CPU
    the system ends the process, so what does not fit there must not start.
    """

    bytes: int
    budget: str | None
    """As it was given; None: there is none."""
    device: Target

    @property
    def can_be_met(self) -> bool:
        """Whether a run that takes too much gets an error, instead of its end."""
        return self.budget is not None or self.device == "cuda"

    def __str__(self) -> str:
        size = format_bytes(self.bytes)
        if self.budget is not None:
            return f"memory.budget={self.budget} ({size})"
        return f"the memory of this {'card' if self.device == 'cuda' else 'machine'} ({size})"


@dataclass(frozen=True)
class _Ways:
    """What would make a run fit, in words, None if nothing; else the least peak it came to."""

    words: str | None
    adaptable: bool
    """Whether `memory.on_overflow=adapt` would find it, which knows techniques only."""
    least: int


def limit_of(settings: Settings, budget_bytes: int | None, device: str) -> Limit | None:
    """Return what a run may take, None where that is not known and an error says so in time."""
    target: Target = "cuda" if device == "cuda" else "cpu"
    if budget_bytes is not None:
        return Limit(budget_bytes, str(settings.memory.budget), target)
    if device == "cpu" or (device == "cuda" and torch.cuda.is_available()):
        return Limit(total_bytes(torch.device(device)), None, target)
    return None


def refusal(settings: Settings, data: DataSet, planned: Plan, limit: Limit) -> str:
    """Say that a run does not fit, and what would."""
    message = f"{limit} is predicted to be too small: the peak is {peak_words(planned)}"
    if planned.reserved_bytes is not None:
        message += f", and the limit is of {planned.demand_words}"
        message += f", which are {format_bytes(planned.demand_bytes)}"
    ways = _ways(settings, data, planned, limit.bytes)
    message += f". {_advice(settings, ways)}; or "
    if ways.adaptable:
        message += "memory.on_overflow=adapt to have it chosen, "
    message += "memory.on_overflow=train to try all the same"
    if not limit.can_be_met:
        message += ", with memory.budget=auto for recovery to take part"
    return message


def what_fits(settings: Settings, data: DataSet, planned: Plan, budget_bytes: int) -> str | None:
    """Return the changes that are predicted to fit a budget, None if no technique is."""
    return _ways(settings, data, planned, budget_bytes).words


def adapted(
    settings: Settings, data: DataSet, planned: Plan, limit: Limit
) -> tuple[Settings, Plan]:
    """Return settings that are predicted to fit, and their plan.

    Raises:
        ConfigError: there are none.

    """
    found, least = _descend(settings, data, planned, limit.bytes)
    if found is None:
        ways = _ways(settings, data, planned, limit.bytes, (None, least))
        raise ConfigError(
            f"{limit} is predicted to be too small: the run takes "
            f"{format_bytes(planned.demand_bytes)} ({planned.demand_words}), and nothing is left "
            f"on the ladder that would make it fit. {_advice(settings, ways)}"
        )
    print(f"memory.on_overflow=adapt: going on with {_spelled(settings, found)}")
    settings = replace(settings, memory=replace(settings.memory, **vars(found)))
    return settings, plan_training(settings, data, planned.target)


def remark(settings: Settings, planned: Plan, limit: Limit) -> str:
    """Return how a predicted peak stands to its limit, to end a line with; "" if all is well."""
    over = planned.demand_bytes > limit.bytes
    if limit.budget is None and not over:
        return ""
    if limit.budget is None:
        text = f"; there is no budget, and {limit} is less"
    else:
        text = f"; the budget is {format_bytes(limit.bytes)}" + (", which is less" if over else "")
    if not over:
        return text
    if not limit.can_be_met:
        then = "the system may end it; with memory.budget=auto recovery would take part"
    else:
        memory = settings.memory
        helpers = ["recovery"] if memory.recover else []
        helpers += ["memory.fallback"] if memory.fallback is not Fallback.none else []
        then = ", then ".join(helpers) or "nothing takes over if it fails"
    return f"{text}; the run goes on all the same ({then})"


def peak_words(planned: Plan) -> str:
    """Return a predicted peak with its interval and cause."""
    return spelled_out({**vars(planned), "dominant": planned.dominant})


def _ways(
    settings: Settings,
    data: DataSet,
    planned: Plan,
    limit_bytes: int,
    descended: tuple[Techniques | None, int] | None = None,
) -> _Ways:
    """Return what would make a run fit, each predicted; down the ladder if one is not enough.

    `descended` is what `_descend` returned, where that was done before.
    """
    single = savings(settings, data, planned)
    fitting = [saving for saving in single if saving.demand_bytes <= limit_bytes]
    words = " or ".join(f"{s.change} ({format_bytes(s.demand_bytes)})" for s in fitting) or None
    least = min([planned.demand_bytes, *(saving.demand_bytes for saving in single)])
    if any(not saving.change.startswith(PRECISION) for saving in fitting):
        return _Ways(words, True, least)
    found, reached = descended or _descend(settings, data, planned, limit_bytes)
    spelled = None if found is None else _spelled(settings, found)
    return _Ways(words or spelled, found is not None, min(least, reached))


def _advice(settings: Settings, ways: _Ways) -> str:
    if ways.words is not None:
        return f"What would fit: {ways.words}"
    return (
        f"No technique is predicted to fit: the least they reach is {format_bytes(ways.least)}; "
        f"try {smaller_sizes(settings.memory)}"
    )


def _descend(
    settings: Settings, data: DataSet, planned: Plan, limit_bytes: int
) -> tuple[Techniques | None, int]:
    """Go down the ladder by prediction; return what fits, and the least peak on the way."""
    techniques = techniques_of(settings.memory)
    samples = min(data.batch_size, data.size("train"))
    micro_batch = -(-samples // techniques.gradient_accumulation)
    predict = Predictor(settings, data, planned.target)
    found, moves = adapt(
        techniques,
        micro_batch,
        limit_bytes,
        predict,
        planned.target,
        refuse=predict.refused,
        ladder=PLANNED_LADDER,
    )
    for skipped in moves[-1].skipped if moves else ():
        log.info("%s: %s", skipped.rung, skipped.reason)
    return found, predict.least or planned.demand_bytes


def _spelled(settings: Settings, found: Techniques) -> str:
    changed = changes(techniques_of(settings.memory), found)
    return " ".join(f"memory.{name}={str(value).lower()}" for name, value in changed.items())
