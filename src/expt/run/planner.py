"""The plan of a configured training: what `task=plan` prints and every training checks first.

Joins settings, data and model to `expt.memory.plan`, which knows none of them. A change to the
memory settings is predicted like the settings themselves, so that advice is never a rule of
thumb.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from expt.config.schema import Device, Precision, TrainerConfig
from expt.config.settings import Settings
from expt.errors import ConfigError, ExptError, ModelError
from expt.job import Batch, DataSet, is_resident
from expt.memory.measuring.budget import Budget
from expt.memory.planning.predict import Plan, Target, plan
from expt.memory.techniques.techniques import Techniques, apply
from expt.run.build import build, build_model, build_optimizer, techniques_of
from expt.training.batches import Examples, kept_on_device
from expt.units import format_bytes, parse_bytes

log = logging.getLogger(__name__)

MAX_SAVINGS = 3
MIN_SAVING = 0.01
"""Part of the peak that a change must save to be worth a line."""


@dataclass(frozen=True)
class Saving:
    """A change to the command line, the peak it is predicted to have, and `Plan.demand_bytes`."""

    change: str
    peak_bytes: int
    demand_bytes: int


def plan_training(
    settings: Settings,
    data: DataSet,
    target: Target,
    techniques: Techniques | None = None,
    precision: Precision | None = None,
    batch_size: int | None = None,
    evaluation: bool = True,
    examples: Examples | None = None,
) -> Plan:
    """Predict the peak of a configured training on `target`, evaluation included.

    `data` stays where it is; nothing is trained and no weight is allocated. The arguments
    up to `batch_size`, which is of the optimizer step, take the place of what is configured;
    `examples` are the data's, where there are any already.

    Raises:
        ConfigError: the model or a technique refuses its settings.
        ModelError: the model does not fit the data.

    """
    techniques = techniques or techniques_of(settings.memory)
    samples = min(batch_size or data.batch_size, data.size("train"))  # as the loop takes them
    micro_batch = -(-samples // techniques.gradient_accumulation)

    examples = examples or Examples(data)
    inputs = examples.input_names()  # reads a streamed sample, if it must, outside of the trace
    if evaluation and not is_resident(data):
        examples.batch("val", 1)
    # On the CPU the whole batch of a step is device memory, of which a micro-batch is a part.
    whole = samples if target == "cpu" and not is_resident(data) else micro_batch

    def batch_fn() -> tuple[Batch, Tensor]:
        batch = examples.batch("train", whole)
        weight = examples.weight("train", micro_batch, batch)
        return (batch if whole == micro_batch else batch.each(lambda v: v[:micro_batch])), weight

    def loss_fn(forward: Callable[..., Any], batch: tuple[Batch, Tensor]) -> Tensor:
        loss = data.loss(forward(**batch[0].inputs), batch[0])
        if loss.ndim > 0:
            raise ModelError(
                f"{type(data).__name__}.loss returned a tensor of shape {list(loss.shape)}; it "
                "must return the sum over the batch"
            )
        return loss / batch[1]

    def evaluation_fn(forward: Callable[..., Any]) -> None:
        batch = examples.batch("val", min(data.eval_batch_size, data.size("val")))
        data.accumulator().update(forward(**batch.inputs), batch)

    traced: list[weakref.ref[nn.Module]] = []  # what is traced is to be gone when it is done

    def optimizer_fn(parameters: list[nn.Parameter]) -> Any:
        model = traced[-1]()
        assert model is not None
        memory = replace(settings.memory, optimizer_in_backward=techniques.optimizer_in_backward)
        return build_optimizer(replace(settings, memory=memory), model)

    def prepare(model: nn.Module) -> None:
        apply(model, techniques)
        traced.append(weakref.ref(model))

    def model_fn() -> nn.Module:
        return build_model(settings, data, inputs)

    return plan(
        model_fn,
        batch_fn,
        optimizer_fn,
        loss_fn,
        target=target,
        precision=arithmetic(precision or settings.memory.precision, target),
        micro_batches=techniques.gradient_accumulation,
        clip_norm=settings.trainer.gradient_clip_norm,
        evaluation_fn=evaluation_fn if evaluation else None,
        prepare=prepare,
        resident=kept_on_device(data),
        averaged=settings.trainer.ema_decay is not None,
        outputs_held=False,
    )


def arithmetic(precision: Precision, target: Target) -> Literal["fp32", "bf16", "fp16"]:
    """Return the arithmetic that a precision means on a device."""
    if precision is Precision.auto:
        return "bf16" if target == "cuda" else "fp32"
    return cast(Literal["fp32", "bf16", "fp16"], precision.value)


def target_of(trainer: TrainerConfig, asked: str | None) -> Target:
    """Return the device to plan for: the one asked for, the run's, or else CUDA."""
    if asked is not None:
        return cast(Target, asked)
    return "cpu" if trainer.device in (Device.cpu, Device.mps) else "cuda"


def target_remark(trainer: TrainerConfig, asked: str | None) -> str | None:
    """Return that a plan is for a card that nobody named and that is not here, if so."""
    if asked is None and trainer.device is Device.auto and not torch.cuda.is_available():
        return "planned for cuda, which is not here; memory.target=cpu plans for this machine"
    return None


def budget_bytes(value: object, target: Target) -> int | None:
    """Return the bytes of a budget on a device that need not be here.

    Raises:
        ConfigError: a share or `auto` of a card that is not here.

    """
    if value is None:
        return None
    if target == "cpu" or torch.cuda.is_available():
        return Budget.parse(value, torch.device(target)).bytes
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ConfigError(
            f"memory.budget={value} depends on the card, and there is none here; give an amount, "
            "like memory.budget=24GiB, or memory.target=cpu"
        ) from error


class Planner:
    """Plans of one configured training with other techniques, each traced once.

    Args:
        settings: the run's.
        data: on the host; None reads it again when it is needed, for a run whose data is on CUDA.
        target: the device to plan for.
        planned: the plan of the settings as they are, if there is one already.
        evaluation: also plan evaluation, which recovery makes smaller by itself.

    """

    def __init__(
        self,
        settings: Settings,
        data: DataSet | None,
        target: Target,
        planned: Plan | None = None,
        evaluation: bool = True,
    ) -> None:
        self.settings, self.target = settings, target
        self.now = techniques_of(settings.memory)
        self._data, self._evaluation = data, evaluation
        self._plans: dict[tuple[Techniques, Precision], Plan | Exception] = {}
        if planned is not None:
            self._plans[self.now, settings.memory.precision] = planned

    @cached_property
    def data(self) -> DataSet:
        """The data set, on the host."""
        found: DataSet = build(self.settings, "data") if self._data is None else self._data
        return found

    @cached_property
    def _examples(self) -> Examples:
        """One for all plans, so that a streamed sample is read once."""
        return Examples(self.data)

    def plan(
        self, techniques: Techniques | None = None, precision: Precision | None = None
    ) -> Plan:
        """Return the plan with these in the place of what is configured.

        Raises:
            Exception: what `plan_training` raised for them, every time.

        """
        key = (techniques or self.now, precision or self.settings.memory.precision)
        if key not in self._plans:
            try:
                self._plans[key] = plan_training(
                    self.settings,
                    self.data,
                    self.target,
                    *key,
                    evaluation=self._evaluation,
                    examples=self._examples,
                )
            except Exception as error:  # whatever a user's model does under fake tensors
                self._plans[key] = error.with_traceback(None)
        found = self._plans[key]
        if isinstance(found, Exception):
            raise found
        return found

    def __call__(self, techniques: Techniques) -> int | None:
        """Return `Plan.demand_bytes` with these techniques, None where it cannot be told."""
        if not self.settings.memory.plan:
            return None
        try:
            found = self.plan(techniques)
        except (ExptError, RuntimeError, TypeError, ValueError, NotImplementedError):
            log.info("no prediction for %s", techniques, exc_info=True)
            return None
        # Without its activations a peak says nothing about what a technique saves.
        return found.demand_bytes if found.interval_bytes[1] is not None else None

    def refused(self, techniques: Techniques) -> str | None:
        """Return why the model cannot have these techniques, None if it can."""
        self(techniques)
        found = self._plans.get((techniques, self.settings.memory.precision))
        return str(found) if isinstance(found, ConfigError) else None

    @property
    def least_bytes(self) -> int | None:
        """The lowest demand of everything that was planned so far."""
        plans = [found for found in self._plans.values() if isinstance(found, Plan)]
        return min((p.demand_bytes for p in plans if p.interval_bytes[1] is not None), default=None)

    def savings(self) -> list[Saving]:
        """Return the single changes that would save most."""
        planned = self.plan()
        worth = (1 - MIN_SAVING) * planned.peak_bytes
        found = [saving for saving in self._single_changes() if saving.peak_bytes < worth]
        return sorted(found, key=lambda saving: saving.peak_bytes)[:MAX_SAVINGS]

    def first_that_fits(self, limit_bytes: int) -> Saving | None:
        """Return the cheapest single change that fits; dearer ones are not even planned."""
        return next((s for s in self._single_changes() if s.demand_bytes <= limit_bytes), None)

    def _single_changes(self) -> Iterator[Saving]:
        for change, techniques, precision in self._changes():
            try:
                then = self.plan(techniques, precision)
            except Exception:  # the model may have nothing to apply it to, or not work with it
                log.info("no prediction for %s", change, exc_info=True)
                continue
            yield Saving(change, then.peak_bytes, then.demand_bytes)

    def _changes(self) -> Iterator[tuple[str, Techniques | None, Precision | None]]:
        """Yield single changes, the one that costs least time first."""
        now, memory = self.now, self.settings.memory
        if now.attention_kernel == "math":
            yield "memory.attention_kernel=fused", replace(now, attention_kernel="fused"), None
        parts = 4 * now.gradient_accumulation
        if parts <= self.data.batch_size and not now.optimizer_in_backward:
            change = f"memory.gradient_accumulation={parts}"
            yield change, replace(now, gradient_accumulation=parts), None
        if now.activation_checkpointing is not True:
            change = "memory.activation_checkpointing=true"
            yield change, replace(now, activation_checkpointing=True), None
        if now.forward_chunks == 1:
            change = "memory.forward_chunks=4"
            yield change, replace(now, forward_chunks=4), None
        if arithmetic(memory.precision, self.target) == "fp32":
            yield "memory.precision=bf16", None, Precision.bf16  # other results, so the last


def spelled_out(record: Mapping[str, Any]) -> str:
    """Return a predicted peak with its interval and cause."""
    low, high = record["interval_bytes"]
    upper = "an unknown amount" if high is None else format_bytes(high)
    return (
        f"{format_bytes(record['peak_bytes'])} ({format_bytes(low)} to {upper}), in "
        f"{record['phase'].replace('_', ' ')}, mostly {record['dominant'].replace('_', ' ')}"
    )
