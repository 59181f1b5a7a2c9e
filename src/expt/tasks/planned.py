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

from expt.construction import RunContext, Settings, build, smaller_sizes, techniques_of
from expt.errors import ConfigError, ExptError
from expt.foresight import plan_training, savings
from expt.memory.ladder import PLANNED_LADDER, adapt, changes
from expt.memory.planning import Plan, Target
from expt.memory.techniques import Techniques
from expt.protocols import DataSet
from expt.schema import Compile, Fallback, OnOverflow
from expt.tasks.fallback import key
from expt.units import format_bytes

log = logging.getLogger(__name__)


def plan_before(
    settings: Settings, data: DataSet, device: str, budget_bytes: int | None
) -> tuple[Settings, Plan | None]:
    """Predict the peak on a device; return the settings to train with, and the plan.

    Raises:
        ConfigError: the run would not fit its budget, and memory.on_overflow does not allow it.

    """
    if not settings.memory.plan:
        return settings, None
    target: Target = "cuda" if device == "cuda" else "cpu"
    try:
        planned = _made_before(settings) or plan_training(settings, data, target)
    except ConfigError:
        raise  # the run itself would be refused with the same words
    except Exception as error:  # whatever a user's model does under fake tensors
        log.info("planning failed", exc_info=True)
        print(f"peak memory not predicted: {type(error).__name__}: {_first_line(error)}")
        return settings, None
    overflow = budget_bytes is not None and planned.demand_bytes > budget_bytes
    smaller_run_wanted = settings.memory.fallback is not Fallback.none
    if overflow and settings.memory.on_overflow is OnOverflow.refuse and not smaller_run_wanted:
        raise ConfigError(_refusal(settings, data, planned, budget_bytes or 0))
    if overflow and settings.memory.on_overflow is OnOverflow.adapt:
        try:
            settings, planned = _adapted(settings, data, planned, budget_bytes or 0)
        except ConfigError:
            if not smaller_run_wanted:
                raise
    kind = "" if planned.method == "trace" else " (estimate)"
    line = f"predicted peak{kind}: {_spelled_out(planned)}"
    if budget_bytes is not None:
        line += f"; the budget is {format_bytes(budget_bytes)}"
        if planned.demand_bytes > budget_bytes:
            then = "memory.fallback takes over if it fails" if smaller_run_wanted else "recovery"
            line += f", which is less; the run goes on all the same ({then})"
    print(line)
    settings = _without_capture(settings, planned, budget_bytes)
    if planned.method == "estimate" or any("without values" in note for note in planned.notes):
        print("\n".join(f"note: {note}" for note in planned.notes))
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


class Predictor:
    """Predicts once per set of techniques; `refused` says why there are none.

    Args:
        settings: the run's.
        data: on the host; None reads it again when it is needed, for a run whose data is on CUDA.
        target: the device to predict for.
        evaluation: also predict evaluation, which recovery makes smaller by itself.

    """

    def __init__(
        self, settings: Settings, data: DataSet | None, target: Target, evaluation: bool = True
    ) -> None:
        self._settings, self._data, self._target = settings, data, target
        self._evaluation = evaluation
        self._known: dict[Techniques, int | None] = {}
        self._refused: dict[Techniques, str] = {}

    def __call__(self, techniques: Techniques) -> int | None:
        """Return the predicted peak in bytes."""
        if not self._settings.memory.plan:
            return None
        if techniques not in self._known:
            try:
                if self._data is None:
                    self._data = build(self._settings, "data")
                found = plan_training(
                    self._settings,
                    self._data,
                    self._target,
                    techniques,
                    evaluation=self._evaluation,
                )
                # Without its activations a peak says nothing about what a technique saves.
                bounded = found.interval_bytes[1] is not None
                self._known[techniques] = found.demand_bytes if bounded else None
            except ConfigError as error:
                self._known[techniques] = None
                self._refused[techniques] = str(error)
            except (ExptError, RuntimeError, TypeError, ValueError, NotImplementedError):
                log.info("no prediction for %s", techniques, exc_info=True)
                self._known[techniques] = None
        return self._known[techniques]

    def refused(self, techniques: Techniques) -> str | None:
        """Return why the model cannot have these techniques, None if it can."""
        self(techniques)
        return self._refused.get(techniques)


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


def _refusal(settings: Settings, data: DataSet, planned: Plan, budget_bytes: int) -> str:
    """Say that a run does not fit, and what would."""
    message = (
        f"memory.budget={settings.memory.budget} ({format_bytes(budget_bytes)}) is predicted to be "
        f"too small: the peak is {_spelled_out(planned)}"
    )
    if planned.reserved_bytes is not None:
        message += f", and the budget is of {planned.demand_words}"
        message += f", which are {format_bytes(planned.demand_bytes)}"
    ways = what_fits(settings, data, planned, budget_bytes)
    if ways is not None:
        message += f". What would fit: {ways}"
    else:
        message += f". No technique is predicted to fit; try {smaller_sizes(settings.memory)}"
    return (
        f"{message}; or memory.on_overflow=adapt to have it chosen, memory.on_overflow=train to "
        "try all the same"
    )


def what_fits(settings: Settings, data: DataSet, planned: Plan, budget_bytes: int) -> str | None:
    """Return the changes that are predicted to fit a budget, None if no technique is."""
    fitting = [s for s in savings(settings, data, planned) if s.demand_bytes <= budget_bytes]
    if fitting:
        return " or ".join(f"{s.change} ({format_bytes(s.demand_bytes)})" for s in fitting)
    found, _ = _descend(settings, data, planned.target, budget_bytes)
    return None if found is None else _spelled(settings, found)


def _adapted(
    settings: Settings, data: DataSet, planned: Plan, budget_bytes: int
) -> tuple[Settings, Plan]:
    """Return settings that are predicted to fit.

    Raises:
        ConfigError: there are none.

    """
    found, reasons = _descend(settings, data, planned.target, budget_bytes)
    if found is None:
        raise ConfigError(
            f"memory.budget={settings.memory.budget}: predicted to take "
            f"{format_bytes(planned.demand_bytes)} ({planned.demand_words}), and nothing is left "
            "that would make it fit: "
            f"{reasons}; try {smaller_sizes(settings.memory)}"
        )
    print(f"memory.on_overflow=adapt: going on with {_spelled(settings, found)}")
    settings = replace(settings, memory=replace(settings.memory, **vars(found)))
    return settings, plan_training(settings, data, planned.target)


def _descend(
    settings: Settings, data: DataSet, target: Target, budget_bytes: int
) -> tuple[Techniques | None, str]:
    """Go down the ladder by prediction; return what fits, or why nothing does."""
    techniques = techniques_of(settings.memory)
    micro_batch = -(-data.batch_size // techniques.gradient_accumulation)
    predict = Predictor(settings, data, target)
    found, moves = adapt(
        techniques,
        micro_batch,
        budget_bytes,
        predict,
        target,
        refuse=predict.refused,
        ladder=PLANNED_LADDER,
    )
    reasons = [f"{s.rung}: {s.reason}" for s in (moves[-1].skipped if moves else ())]
    return found, "; ".join(reasons) or "the peak with other techniques cannot be predicted"


def _spelled_out(planned: Plan) -> str:
    low, high = planned.interval_bytes
    upper = "an unknown amount" if high is None else format_bytes(high)
    return (
        f"{format_bytes(planned.peak_bytes)} ({format_bytes(low)} to {upper}), in "
        f"{planned.phase.replace('_', ' ')}, mostly {planned.dominant.replace('_', ' ')}"
    )


def _spelled(settings: Settings, found: Techniques) -> str:
    changed = changes(techniques_of(settings.memory), found)
    return " ".join(f"memory.{name}={str(value).lower()}" for name, value in changed.items())


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else ""
