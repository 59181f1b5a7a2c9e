"""A run that is predicted not to fit: what would, in words for a refusal or as settings."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Container
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from expt.config.compose import key
from expt.config.schema import Compile, OnOverflow
from expt.config.settings import RunContext, Settings
from expt.config.stages import combination_problems
from expt.errors import ConfigError, UserError, first_line
from expt.job import DataSet
from expt.memory.measuring.budget import Budget
from expt.memory.measuring.device_memory import total_bytes
from expt.memory.planning.predict import Plan, Target
from expt.memory.recovery.ladder import PLANNED_LADDER, adapt, changes
from expt.memory.techniques.techniques import Techniques
from expt.run.build import build, smaller_sizes, techniques_of
from expt.run.gotchas import gotchas
from expt.run.planner import Planner, plan_training, spelled_out
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


@dataclass(frozen=True)
class _Suggestions:
    """What is predicted to make a run fit, None if nothing is, and the least that was reached."""

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
        shared = settings.trainer.devices if device == "cpu" else 1  # the host is everybody's
        return Limit(total_bytes(torch.device(device)) // shared, None, target)
    return None


def refusal(settings: Settings, data: DataSet, planned: Plan, limit: Limit) -> str:
    """Say that a run does not fit, and what would."""
    message = f"{limit} is predicted to be too small: the peak is {peak_words(planned)}"
    if planned.reserved_bytes is not None:
        message += f", and the limit is of {planned.demand_words}"
        message += f", which are {format_bytes(planned.demand_bytes)}"
    ways = _suggestions(Planner(settings, data, planned.target, planned), limit.bytes)
    message += f". {_advice(settings, ways)}; or "
    if ways.adaptable:
        message += "memory.on_overflow=adapt to have it chosen, "
    message += "memory.on_overflow=train to try all the same"
    if not limit.can_be_met:
        message += ", with memory.budget=auto for recovery to take part"
    return message


def what_fits(settings: Settings, data: DataSet, planned: Plan, budget_bytes: int) -> str | None:
    """Return the changes that are predicted to fit a budget, None if no technique is."""
    return _suggestions(Planner(settings, data, planned.target, planned), budget_bytes).words


def adapted(
    settings: Settings, data: DataSet, planned: Plan, limit: Limit
) -> tuple[Settings, Plan]:
    """Return settings that are predicted to fit, and their plan.

    Raises:
        ConfigError: there are none.

    """
    planner = Planner(settings, data, planned.target, planned)
    found = descend_by_plan(planner, limit.bytes)
    if found is None:
        ways = _suggestions(planner, limit.bytes)
        raise ConfigError(
            f"{limit} is predicted to be too small: the run takes "
            f"{format_bytes(planned.demand_bytes)} ({planned.demand_words}), and nothing is left "
            f"on the ladder that would make it fit. {_advice(settings, ways)}"
        )
    print(f"memory.on_overflow=adapt: going on with {_spelled(settings, found)}")
    settings = replace(settings, memory=replace(settings.memory, **vars(found)))
    return settings, planner.plan(found)


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
        helpers += ["memory.fallback"] if memory.smaller_runs else []
        then = ", then ".join(helpers) or "nothing takes over if it fails"
    return f"{text}; the run goes on all the same ({then})"


def peak_words(planned: Plan) -> str:
    """Return a predicted peak with its interval and cause."""
    words = spelled_out({**vars(planned), "dominant": planned.dominant})
    return f"{words} ({planned.notes[0]})" if planned.stages else words


def _suggestions(planner: Planner, limit_bytes: int) -> _Suggestions:
    """Return what would make a run fit: one change, or else what the ladder comes to."""
    from expt.run.savings import NO_TECHNIQUES, first_that_fits

    change = first_that_fits(planner, limit_bytes)
    words = None if change is None else f"{change.change} ({format_bytes(change.demand_bytes)})"
    if change is not None and not change.change.startswith(NO_TECHNIQUES):
        return _Suggestions(words, True, change.demand_bytes)
    found = descend_by_plan(planner, limit_bytes)
    spelled = None if found is None else _spelled(planner.settings, found)
    least = planner.least_bytes or planner.plan().demand_bytes
    return _Suggestions(words or spelled, found is not None, least)


def _advice(settings: Settings, ways: _Suggestions) -> str:
    if ways.words is not None:
        return f"What would fit: {ways.words}"
    return (
        f"No technique is predicted to fit: the least they reach is {format_bytes(ways.least)}; "
        f"try {smaller_sizes(settings.memory)}"
    )


def descend_by_plan(
    planner: Planner, limit_bytes: int, kept: Container[str] = ()
) -> Techniques | None:
    """Go down the ladder by prediction; return what fits, None if nothing does.

    Args:
        planner: of the run.
        limit_bytes: what the predicted demand must not exceed.
        kept: names of techniques that stay as they are.

    """
    trainer = planner.settings.trainer
    samples = -(-min(planner.data.batch_size, planner.data.size("train")) // trainer.devices)
    offload = ("saved_tensor_offload", "weight_offload")
    sharded = (*offload, "forward_chunks") if trainer.sharded else ()

    def refuse(techniques: Techniques) -> str | None:
        changed = [name for name in changes(planner.now, techniques) if name in kept]
        if changed:
            return f"memory.{changed[0]} is to stay as it is"
        found = combination_problems(
            len(trainer.stages), trainer.sharded, techniques.weight_offload, None
        )
        return found[0] if found else planner.refused(techniques)

    found, moves = adapt(
        planner.now,
        samples,
        limit_bytes,
        planner,
        planner.target,
        refuse=refuse,
        ladder=[rung for rung in PLANNED_LADDER if rung.name not in sharded],
        evaluated=planner.data.eval_batch_size,
    )
    for skipped in moves[-1].skipped if moves else ():
        log.info("%s: %s", skipped.rung, skipped.reason)
    return found


def _spelled(settings: Settings, found: Techniques) -> str:
    changed = changes(techniques_of(settings.memory), found)
    return " ".join(f"memory.{name}={str(value).lower()}" for name, value in changed.items())


def plan_before(
    settings: Settings, data: DataSet, device: str, budget_bytes: int | None
) -> tuple[Settings, Plan | None]:
    """Predict the peak on a device; return the settings to train with, and the plan.

    Raises:
        ConfigError: the run would not fit, and memory.on_overflow does not allow it.
        UserError: the model or the data would refuse the run itself.

    """
    if not settings.memory.plan:
        return settings, None
    target: Target = "cuda" if device == "cuda" else "cpu"
    try:
        planned = _made_before(settings) or plan_training(settings, data, target)
    except UserError:
        raise  # the run itself would be refused with the same words
    except Exception as error:  # whatever a user's model does under fake tensors
        log.info("planning failed", exc_info=True)
        print(f"peak memory not predicted: {first_line(error)}")
        return settings, None
    limit = limit_of(settings, budget_bytes, device)
    kind = "" if planned.method == "trace" else " (estimate)"
    if limit is None:
        print(f"predicted peak{kind}: {peak_words(planned)}")
    else:
        settings, planned = _inside(settings, data, planned, limit)
        print(f"predicted peak{kind}: {peak_words(planned)}{remark(settings, planned, limit)}")
    if settings.memory.plan_file is None:  # a search has its plans made, and a line for none
        for gotcha in gotchas(Planner(settings, data, planned.target, planned)):
            print(gotcha.line())
    settings = _without_capture(settings, planned, budget_bytes)
    if planned.method == "estimate" or any("without values" in note for note in planned.notes):
        print("\n".join(f"note: {note}" for note in planned.notes))
    return settings, planned


def _inside(
    settings: Settings, data: DataSet, planned: Plan, limit: Limit
) -> tuple[Settings, Plan]:
    """Do what `memory.on_overflow` says about a run that is predicted to take more.

    Raises:
        ConfigError: it must not start.

    """
    if planned.demand_bytes <= limit.bytes:
        return settings, planned
    memory = settings.memory
    # A card without a budget raises by itself, and a smaller run takes over only after an error.
    starts = limit.can_be_met and (
        (limit.budget is None and memory.recover) or bool(memory.smaller_runs)
    )
    match memory.on_overflow:
        case OnOverflow.refuse if not starts:
            raise ConfigError(refusal(settings, data, planned, limit))
        case OnOverflow.adapt:
            try:
                return adapted(settings, data, planned, limit)
            except ConfigError:
                if not starts:
                    raise
    return settings, planned


def _without_capture(settings: Settings, planned: Plan, budget_bytes: int | None) -> Settings:
    """Leave steps eager where there is no room for a captured one besides."""
    captured = planned.captured_reserved_bytes
    if settings.trainer.compile is not Compile.auto or captured is None or budget_bytes is None:
        return settings
    if captured <= budget_bytes:
        return settings
    print(
        f"trainer.compile=auto: steps stay eager, since {format_bytes(captured)} would be reserved "
        "with a captured one; trainer.compile=graph tries all the same"
    )
    return replace(settings, trainer=replace(settings.trainer, compile=Compile.off))


def with_techniques(
    cfg: DictConfig, settings: Settings, context: RunContext
) -> tuple[DictConfig, RunContext]:
    """Return both with the techniques that are trained with, for the record and for a resume."""
    changed = {
        name: value
        for name, value in vars(techniques_of(settings.memory)).items()
        if cfg.memory[name] != value
    }
    if not changed:
        return cfg, context
    cfg = copy.deepcopy(cfg)
    for name, value in changed.items():
        cfg.memory[name] = value
    given = [
        line
        for line in context.launch.get("overrides", ())
        if key(line) not in {f"memory.{name}" for name in changed}
    ]
    given += [f"memory.{name}={str(value).lower()}" for name, value in changed.items()]
    return cfg, replace(context, launch={**context.launch, "overrides": given})


def _made_before(settings: Settings) -> Plan | None:
    """Return the plan in `memory.plan_file`, if one is given and can be read."""
    if settings.memory.plan_file is None:
        return None
    try:
        stored = json.loads(Path(settings.memory.plan_file).read_text(encoding="utf-8"))
        return Plan.from_dict(stored)
    except (OSError, ValueError, TypeError, KeyError):
        log.info("%s is not a plan", settings.memory.plan_file, exc_info=True)
        return None


def too_small_for_weights(budget: Budget, settings: Settings, data: DataSet) -> str | None:
    """Return that a budget does not even hold the model's weights, if so."""
    weights = weights_bytes(settings, data)
    if weights is None or weights <= budget.bytes:
        return None
    name = settings.arguments["model"]["_target_"].rpartition(".")[2]
    return (
        f"memory.budget={budget.text} is less than the weights of {name} take by "
        f"themselves: {format_bytes(weights)} ({weights} bytes). Training needs as much again "
        "for gradients, and the optimizer's state; raise the budget, or choose "
        f"{smaller_sizes(settings.memory)}"
    )


def weights_bytes(settings: Settings, data: DataSet) -> int | None:
    """Return what a model's weights take, without allocating them; None if it cannot be told."""
    try:
        with torch.device("meta"):
            model: torch.nn.Module = build(settings, "model", **data.model_arguments())
    except Exception:  # a user's constructor may look at its weights, which are not there
        log.info("the weights cannot be counted without allocating them", exc_info=True)
        return None
    return sum(weight.nbytes for weight in model.parameters())
