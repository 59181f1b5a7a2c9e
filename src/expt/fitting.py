"""The largest micro-batch of a configured training that fits a budget, by prediction.

    found = fit(settings, data, "cuda", budget_bytes=2 * 1024**3, batch_size=16)
    found.micro_batch, found.gradient_accumulation, found.planned.peak_bytes

Nothing is trained and no device is touched. `expt.batch_search` chooses what to trace.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from expt.batch_search import Limit, largest
from expt.construction import Settings, smaller_sizes, techniques_of
from expt.errors import ConfigError, ExptError
from expt.foresight import Saving, plan_training, savings
from expt.memory.planning.planning import Plan, Target
from expt.protocols import DataSet
from expt.units import format_bytes

MAX_SLICES = 32
"""Of an evaluation batch, for advice: a trace takes as long as there are slices."""
LimitedBy = Literal["memory", "fit.max_batch", "the training set", "traces"]


@dataclass(frozen=True)
class Fit:
    """The largest micro-batch that fits, and how a step's batch is made of it.

    `batch_size` is of the optimizer step; `limited_by` says why the micro-batch is no larger.
    """

    micro_batch: int
    gradient_accumulation: int
    batch_size: int
    planned: Plan
    plans: Mapping[int, Plan]
    limited_by: LimitedBy


def fit(
    settings: Settings,
    data: DataSet,
    target: Target,
    budget_bytes: int,
    batch_size: int | None,
) -> Fit:
    """Return the largest micro-batch inside `fit.margin` of a budget.

    Args:
        settings: model, optimizer and techniques as composed.
        data: its own batch size is not looked at.
        target: the device to predict for.
        budget_bytes: the budget.
        batch_size: of the optimizer step, kept by as many micro-batches as it takes; None: as
            large as memory allows, with `memory.gradient_accumulation` as it is.

    Raises:
        ConfigError: not even one sample fits, with what would help; or no prediction.

    """
    limit = Limit(budget_bytes, settings.fit.margin)
    techniques = techniques_of(settings.memory)
    train = data.size("train")

    def parts(micro_batch: int) -> int:
        if batch_size is None or techniques.optimizer_in_backward:
            return techniques.gradient_accumulation
        return -(-batch_size // micro_batch)

    def predict(micro_batch: int) -> Plan:
        count = parts(micro_batch)
        then = replace(techniques, gradient_accumulation=count)
        return predicted(
            lambda: plan_training(settings, data, target, then, batch_size=micro_batch * count)
        )

    most = max(settings.fit.max_batch, batch_size or 0)
    highest = min(most, train)
    if batch_size is None:
        highest = max(highest // techniques.gradient_accumulation, 1)
    search = largest(range(1, highest + 1), predict, limit, batch_size or highest // 8)
    if search.best is None:
        raise ConfigError(_nothing_fits(settings, data, search.plans[1], limit))
    micro_batch = search.best
    count = parts(micro_batch)
    limited_by: LimitedBy
    if micro_batch < highest:
        limited_by = "memory" if search.exact else "traces"
    else:
        limited_by = "the training set" if train <= most else "fit.max_batch"
    whole = batch_size is not None and not techniques.optimizer_in_backward
    return Fit(
        micro_batch=micro_batch,
        gradient_accumulation=count,
        batch_size=batch_size if whole and batch_size else micro_batch * count,
        planned=search.plans[micro_batch],
        plans=dict(sorted(search.plans.items())),
        limited_by=limited_by,
    )


def predicted(make: Callable[[], Plan]) -> Plan:
    """Return a plan.

    Raises:
        ConfigError: it cannot be made, whatever a user's model does under fake tensors.

    """
    try:
        return make()
    except ExptError:
        raise
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")[:200]
        raise ConfigError(
            f"no batch can be found by prediction, since the model cannot be traced: "
            f"{type(error).__name__}: {first}; give data.batch_size and "
            "memory.gradient_accumulation as numbers"
        ) from error


def with_batch_size(settings: Settings, batch_size: int) -> Settings:
    """Return the same settings with a number as `data.batch_size`."""
    data = {**settings.arguments["data"], "batch_size": batch_size}
    return replace(settings, arguments={**settings.arguments, "data": data})


def evaluation_slices(
    settings: Settings, data: DataSet, target: Target, limit: Limit
) -> tuple[int, Plan] | None:
    """Return the fewest slices of an evaluation batch with which one training sample fits."""
    now = techniques_of(settings.memory)
    chunks = 2 * now.forward_chunks
    while chunks <= min(data.eval_batch_size, MAX_SLICES):
        then = replace(now, forward_chunks=chunks, gradient_accumulation=1)
        planned = plan_training(settings, data, target, then, batch_size=1)
        if limit.allows(planned):
            return chunks, planned
        chunks *= 2
    return None


def _nothing_fits(settings: Settings, data: DataSet, smallest: Plan, limit: Limit) -> str:
    """Say how much the least would take, and what would help; every figure counts the same."""
    reserved = smallest.demand_bytes > limit.budget_bytes
    budget = format_bytes(limit.budget_bytes)
    allowed = (
        f"the budget is {budget}"
        if reserved
        else f"fit.margin={limit.margin:g} of the budget ({budget}) is "
        f"{format_bytes(limit.peak_bytes)}"
    )
    counted = smallest.demand_words if reserved else "bytes allocated to tensors"
    message = (
        f"not even a micro-batch of one sample is predicted to fit: on {smallest.target} that is "
        f"{format_bytes(_taken(smallest, reserved))} ({counted}; the peak is in "
        f"{smallest.phase.replace('_', ' ')}), and {allowed}; it takes "
        f"memory.budget={_needed(smallest, limit)}"
    )
    if smallest.phase == "evaluation":
        found = evaluation_slices(settings, data, smallest.target, limit)
        message += (
            f". It is the batch of evaluation, data.eval_batch_size={data.eval_batch_size}, that "
            "is too large; try a smaller one"
        )
        if found is not None:
            message += (
                f", or memory.forward_chunks={found[0]} "
                f"({format_bytes(_taken(found[1], reserved))})"
            )
        return message
    alone = replace(settings, memory=replace(settings.memory, gradient_accumulation=1))
    one = copy.copy(data)
    one.batch_size = 1
    helping = savings(alone, one, smallest)
    ways = [f"{way.change} ({format_bytes(_taken(way, reserved))})" for way in helping]
    ways.append(smaller_sizes(settings.memory))
    return f"{message}. What would help: {', '.join(ways)}"


def _taken(found: Plan | Saving, reserved: bool) -> int:
    """Return what the budget is compared with: what is reserved, or the peak."""
    return found.demand_bytes if reserved else found.peak_bytes


def _needed(planned: Plan, limit: Limit) -> str:
    """Return the budget that a plan asks for, rounded up, as one would write it."""
    return f"{int(limit.demand(planned) / 2**20) + 1}MiB"
