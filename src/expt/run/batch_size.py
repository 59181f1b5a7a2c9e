"""The largest micro-batch of a configured training that fits a budget, by prediction.

    found = fit(settings, data, "cuda", budget_bytes=2 * 1024**3, batch_size=16)
    found.micro_batch, found.gradient_accumulation, found.planned.peak_bytes

Nothing is trained and no device is touched. `expt.run.batch_size` chooses what to trace.
"""

from __future__ import annotations

import copy
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from omegaconf import DictConfig, OmegaConf

from expt.config.settings import RunContext, Settings
from expt.errors import ConfigError, ExptError
from expt.job import DataSet
from expt.memory.measuring.budget import Budget
from expt.memory.planning.plan import CUDA_MARGIN
from expt.memory.planning.predict import Plan, Target
from expt.result import load_launch
from expt.run.build import build_training_data, smaller_sizes, techniques_of
from expt.run.overflow import too_small_for_weights
from expt.run.planner import Planner, feature_plans, plan_training
from expt.units import format_bytes

MAX_TRACES = 18
"""A search that has not come to its end by then returns the largest size known to fit."""
MARGINS: Mapping[Target, float] = {"cpu": 0.9, "cuda": 1 / (1 + CUDA_MARGIN)}
"""`fit.margin` where it is not given. On CUDA it follows from published runs."""
GUESSES = 8
"""Traces after which what is left is halved, for peaks that are far from a line."""


@dataclass(frozen=True)
class Limit:
    """What a plan may take of a budget: `margin` of it, on CUDA of what is reserved."""

    budget_bytes: int
    margin: float

    @classmethod
    def of(cls, budget_bytes: int, margin: float | None, target: Target) -> Limit:
        """Return the limit with `fit.margin`, or with the device's where it is None."""
        return cls(budget_bytes, MARGINS[target] if margin is None else margin)

    @property
    def allowed_bytes(self) -> int:
        """The most that is allowed."""
        return int(self.budget_bytes * self.margin)

    def taken(self, planned: Plan) -> int:
        """Return what a plan takes inside the limit, or more than it."""
        return planned.within(self.allowed_bytes).demand_bytes

    def demand(self, planned: Plan) -> float:
        """Return the bytes of budget that a plan asks for."""
        return self.taken(planned) / self.margin

    def allows(self, planned: Plan) -> bool:
        """Tell whether a plan fits."""
        return self.taken(planned) <= self.allowed_bytes


@dataclass(frozen=True)
class Search:
    """What a search found: the best size (None: nothing fits), and every plan made on the way.

    `exact` says that the next larger size was traced and does not fit, or that there is none.
    """

    best: int | None
    plans: Mapping[int, Plan]
    exact: bool


def largest(
    sizes: Sequence[int], predict: Callable[[int], Plan], limit: Limit, start: int
) -> Search:
    """Return the largest of `sizes` whose plan is allowed, if larger sizes take more.

    Args:
        sizes: what may be chosen, ascending, not empty.
        predict: traces a size.
        limit: what a plan may take.
        start: where to look first.

    """
    plans: dict[int, Plan] = {}
    low, high = -1, len(sizes)  # positions: what fits and what does not
    at = before = min(bisect_left(sizes, start), len(sizes) - 1)
    fitted: list[bool] = []
    while high - low > 1 and len(plans) < MAX_TRACES:
        size = sizes[at]
        plans[size] = predict(size)
        fitted.append(limit.allows(plans[size]))
        if fitted[-1]:
            low = at
        else:
            high = at
        demands = {size: limit.demand(one) for size, one in plans.items()}
        meeting = _meeting_point(demands, limit.budget_bytes)
        if meeting is None or len(plans) > GUESSES:
            guess = (low + high) // 2
        else:
            guess = bisect_right(sizes, meeting) - 1
        creeping = low >= 0 and high < len(sizes) and fitted[-1] == fitted[-2]
        if creeping and len(plans) <= GUESSES:
            # The line misses on one side: go twice as far, lest it creeps towards the end.
            step = 2 * (at - before)
            guess = min(guess, at + step) if step < 0 else max(guess, at + step)
        before, at = at, min(max(guess, low + 1), high - 1)
    return Search(None if low < 0 else sizes[low], plans, high - low <= 1)


def _meeting_point(demands: Mapping[int, float], budget: float) -> float | None:
    """Return the size at which a line through the known demands meets the budget.

    None where demand does not grow with the size: evaluation has the peak, say.
    """
    known = sorted(demands)
    if len(known) == 1:
        return known[0] * (2 if demands[known[0]] <= budget else 0.5)
    inside = [size for size in known if demands[size] <= budget]
    beyond = [size for size in known if demands[size] > budget]
    if inside and beyond:
        first, second = inside[-1], beyond[0]
    else:
        first, second = known[-2:] if inside else known[:2]
    slope = (demands[second] - demands[first]) / (second - first)
    return None if slope <= 0 else first + (budget - demands[first]) / slope


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
    if settings.trainer.devices > 1:
        raise ConfigError(
            f"trainer.devices={settings.trainer.devices}: what fits is looked for on one device, "
            "and a step of several has as many times the batch; leave trainer.devices out here"
        )
    limit = Limit.of(budget_bytes, settings.fit.margin, target)
    techniques = techniques_of(settings.memory)
    train, features = data.size("train"), feature_plans(settings)

    def parts(micro_batch: int) -> int:
        if batch_size is None or techniques.optimizer_in_backward:
            return techniques.gradient_accumulation
        return -(-batch_size // micro_batch)

    def predict(micro_batch: int) -> Plan:
        count = parts(micro_batch)
        then = replace(techniques, gradient_accumulation=count)
        return predicted(
            lambda: plan_training(
                settings, data, target, then, batch_size=micro_batch * count, features=features
            )
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
    taken, budget = limit.taken(smallest), format_bytes(limit.budget_bytes)
    allowed = (
        f"the budget is {budget}"
        if taken > limit.budget_bytes
        else f"fit.margin={limit.margin:.3g} of the budget ({budget}) is "
        f"{format_bytes(limit.allowed_bytes)}"
    )
    message = (
        f"not even a micro-batch of one sample is predicted to fit: on {smallest.target} that is "
        f"{format_bytes(taken)} ({smallest.demand_words}; the peak is in "
        f"{smallest.phase.replace('_', ' ')}), and {allowed}; it takes "
        f"memory.budget={_needed(smallest, limit)}"
    )
    if smallest.phase in ("evaluation", "feature_cache"):
        found = None
        if smallest.phase == "evaluation":
            found = evaluation_slices(settings, data, smallest.target, limit)
        message += (
            f". It is the batch of evaluation, data.eval_batch_size={data.eval_batch_size}, that "
            "is too large; try a smaller one"
        )
        if found is not None:
            message += (
                f", or memory.forward_chunks={found[0]} ({format_bytes(limit.taken(found[1]))})"
            )
        return message
    from expt.run.savings import savings

    alone = replace(settings, memory=replace(settings.memory, gradient_accumulation=1))
    one = copy.copy(data)
    one.batch_size = 1
    helping = savings(Planner(alone, one, smallest.target, smallest))
    ways = [f"{way.change} ({format_bytes(way.demand_bytes)})" for way in helping]
    ways.append(smaller_sizes(settings.memory))
    return f"{message}. What would help: {', '.join(ways)}"


def _needed(planned: Plan, limit: Limit) -> str:
    """Return the budget that a plan asks for, rounded up, as one would write it."""
    return f"{int(limit.demand(planned) / 2**20) + 1}MiB"


KEY = "data.batch_size"
_GIVEN = re.compile(rf"(\+*{re.escape(KEY)})=(.*)")


def with_batch_found(
    cfg: DictConfig, settings: Settings, context: RunContext, device: torch.device
) -> tuple[DictConfig, Settings, RunContext]:
    """Return all three with a number as the batch size; unchanged if they have one.

    Raises:
        ConfigError: not even one sample fits, or no prediction can be made.

    """
    if not settings.batch_is_auto:
        return cfg, settings, context
    batch_size = _earlier(context.run_dir) or _found(with_batch_size(settings, 1), device)
    cfg = OmegaConf.masked_copy(cfg, list(map(str, cfg)))
    cfg.data = {**cfg.data, "batch_size": batch_size}
    lines = list(_replaced(context.launch.get("overrides", ()), batch_size))
    context = replace(context, launch={**context.launch, "overrides": lines})
    return cfg, with_batch_size(settings, batch_size), context


def _found(settings: Settings, device: torch.device) -> int:
    """Search for the largest batch, and say what was found."""
    data = build_training_data(settings)
    budget = Budget.parse(
        "auto" if settings.memory.budget is None else settings.memory.budget, device
    )
    refusal = too_small_for_weights(budget, settings, data)
    if refusal is not None:
        raise ConfigError(refusal)
    target: Target = "cuda" if device.type == "cuda" else "cpu"
    found = fit(settings, data, target, budget.bytes, batch_size=None)
    print(
        f"data.batch_size=auto: {found.batch_size} (micro-batch {found.micro_batch}, predicted "
        f"peak {format_bytes(found.planned.peak_bytes)}, limited by {found.limited_by})"
    )
    return found.batch_size


def _earlier(run_dir: Path) -> int | None:
    """Return the batch size that the first part of a run was started with, if there is one."""
    launch = load_launch(run_dir)
    given = [_GIVEN.fullmatch(line) for line in (launch or {}).get("overrides", ())]
    numbers = [int(found[2]) for found in given if found and found[2].isdigit()]
    return numbers[-1] if numbers else None


def _replaced(lines: Iterable[str], batch_size: int) -> Iterable[str]:
    """Yield a command line's settings with the number that was found."""
    names = []
    for line in lines:
        found = _GIVEN.fullmatch(line)
        names += [found[1]] if found else []
        if not found:
            yield line
    yield f"{names[-1] if names else KEY}={batch_size}"
