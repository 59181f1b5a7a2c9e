"""What is predicted before a training, and what follows from it: go on, adapt, or refuse.

A plan that cannot be made is said in a line and is never a reason not to train.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from expt.construction import RunContext, Settings, techniques_of
from expt.errors import ConfigError, UserError, first_line
from expt.foresight import plan_training
from expt.memory.planning.planning import Plan, Target
from expt.protocols import DataSet
from expt.schema import Compile, Fallback, OnOverflow
from expt.tasks.fallback import key
from expt.tasks.overflow import Limit, adapted, limit_of, peak_words, refusal, remark
from expt.units import format_bytes

log = logging.getLogger(__name__)


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
        (limit.budget is None and memory.recover) or memory.fallback is not Fallback.none
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
