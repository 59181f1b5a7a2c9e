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
from expt.protocols import DataSet
from expt.schema import OnOverflow
from expt.tasks.prediction import Predictor
from expt.units import format_bytes

log = logging.getLogger(__name__)


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


def limit_of(settings: Settings, budget_bytes: int | None, target: Target) -> Limit | None:
    """Return what a run may take, None for a card that is not here."""
    if budget_bytes is not None:
        return Limit(budget_bytes, str(settings.memory.budget), target)
    if target == "cuda" and not torch.cuda.is_available():
        return None
    return Limit(total_bytes(torch.device(target)), None, target)


def refusal(settings: Settings, data: DataSet, planned: Plan, limit: Limit) -> str:
    """Say that a run does not fit, and what would."""
    message = f"{limit} is predicted to be too small: the peak is {spelled_out(planned)}"
    if planned.reserved_bytes is not None:
        message += f", and the limit is of {planned.demand_words}"
        message += f", which are {format_bytes(planned.demand_bytes)}"
    fitting = _fitting(settings, data, planned, limit.bytes)
    if isinstance(fitting, str):
        message += f". What would fit: {fitting}; or memory.on_overflow=adapt to have it chosen, "
    else:
        message += f". {_nothing(settings, fitting)}; or "
    message += "memory.on_overflow=train to try all the same"
    if not limit.can_be_met:
        message += ", with memory.budget=100% for recovery to take part"
    return message


def what_fits(settings: Settings, data: DataSet, planned: Plan, budget_bytes: int) -> str | None:
    """Return the changes that are predicted to fit a budget, None if no technique is."""
    found = _fitting(settings, data, planned, budget_bytes)
    return found if isinstance(found, str) else None


def adapted(
    settings: Settings, data: DataSet, planned: Plan, limit: Limit
) -> tuple[Settings, Plan]:
    """Return settings that are predicted to fit, and their plan.

    Raises:
        ConfigError: there are none.

    """
    found, least = _descend(settings, data, planned.target, limit.bytes)
    if found is None:
        raise ConfigError(
            f"{limit} is predicted to be too small: the run takes "
            f"{format_bytes(planned.demand_bytes)} ({planned.demand_words}), and nothing is left "
            f"that would make it fit. {_nothing(settings, least)}"
        )
    print(f"memory.on_overflow=adapt: going on with {_spelled(settings, found)}")
    settings = replace(settings, memory=replace(settings.memory, **vars(found)))
    return settings, plan_training(settings, data, planned.target)


def remark(settings: Settings, planned: Plan, limit: Limit) -> str:
    """Return how a predicted peak stands to its limit, to end a line with; empty: it fits."""
    over = planned.demand_bytes > limit.bytes
    if limit.budget is not None:
        text = f"; the budget is {format_bytes(limit.bytes)}"
    elif over:
        text = f"; there is no budget, and {limit}"
    else:
        return ""
    if not over:
        return text
    takes_over = "memory.fallback takes over if it fails"
    fallback = settings.memory.fallback.value != "none"
    if not limit.can_be_met:
        then = "the system may end it; with memory.budget=100% recovery would take part"
    elif settings.memory.on_overflow is OnOverflow.train or not fallback:
        then = f"recovery{', then ' + takes_over if fallback else ''}"
    else:
        then = takes_over
    less = "which is less" if limit.budget is not None else "is less"
    return f"{text}{',' if limit.budget else ''} {less}; the run goes on all the same ({then})"


def spelled_out(planned: Plan) -> str:
    """Return a predicted peak with its interval and cause."""
    low, high = planned.interval_bytes
    upper = "an unknown amount" if high is None else format_bytes(high)
    return (
        f"{format_bytes(planned.peak_bytes)} ({format_bytes(low)} to {upper}), in "
        f"{planned.phase.replace('_', ' ')}, mostly {planned.dominant.replace('_', ' ')}"
    )


def _fitting(
    settings: Settings, data: DataSet, planned: Plan, limit_bytes: int
) -> str | int | None:
    """Return the changes that fit; else the least peak that techniques reach, if it is known."""
    fitting = [s for s in savings(settings, data, planned) if s.demand_bytes <= limit_bytes]
    if fitting:
        return " or ".join(f"{s.change} ({format_bytes(s.demand_bytes)})" for s in fitting)
    found, least = _descend(settings, data, planned.target, limit_bytes)
    return least if found is None else _spelled(settings, found)


def _nothing(settings: Settings, least: int | None) -> str:
    reached = "" if least is None else f": the least they reach is {format_bytes(least)}"
    return f"No technique is predicted to fit{reached}; try {smaller_sizes(settings.memory)}"


def _descend(
    settings: Settings, data: DataSet, target: Target, limit_bytes: int
) -> tuple[Techniques | None, int | None]:
    """Go down the ladder by prediction; return what fits, and the least peak on the way."""
    techniques = techniques_of(settings.memory)
    samples = min(data.batch_size, data.size("train"))
    micro_batch = -(-samples // techniques.gradient_accumulation)
    predict = Predictor(settings, data, target)
    found, moves = adapt(
        techniques,
        micro_batch,
        limit_bytes,
        predict,
        target,
        refuse=predict.refused,
        ladder=PLANNED_LADDER,
    )
    for skipped in moves[-1].skipped if moves else ():
        log.info("%s: %s", skipped.rung, skipped.reason)
    return found, predict.least


def _spelled(settings: Settings, found: Techniques) -> str:
    changed = changes(techniques_of(settings.memory), found)
    return " ".join(f"memory.{name}={str(value).lower()}" for name, value in changed.items())
