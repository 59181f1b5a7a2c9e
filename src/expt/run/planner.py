"""The plan of a configured training: what `task=plan` prints and every training checks first.

Joins settings, data and model to `expt.memory.plan`, which knows none of them.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from expt.config.schema import Precision, TrainerConfig
from expt.config.settings import Settings
from expt.errors import ConfigError, ExptError, ModelError
from expt.job import Batch, DataSet, is_resident
from expt.memory.planning.predict import Plan, Target, plan
from expt.memory.techniques.freezing import train_only
from expt.memory.techniques.techniques import Techniques, apply
from expt.run.build import build, build_model, build_optimizer, rank_problems, techniques_of
from expt.run.target import allocator_limit, arithmetic
from expt.training.batches import Examples, kept_on_device
from expt.units import format_bytes

if TYPE_CHECKING:
    from expt.memory.planning.blocks import Blocks
    from expt.memory.planning.rank import PlannedRank
    from expt.memory.planning.shared import Shared
    from expt.run.feature_plans import FeaturePlans

log = logging.getLogger(__name__)


def plan_training(
    settings: Settings,
    data: DataSet,
    target: Target,
    techniques: Techniques | None = None,
    precision: Precision | None = None,
    batch_size: int | None = None,
    evaluation: bool = True,
    examples: Examples | None = None,
    shared: Shared | None = None,
    features: FeaturePlans | None = None,
    planning: Callable[..., Plan] = plan,
    stage: int | None = None,
) -> Plan:
    """Predict the peak of a configured training on `target`, evaluation included.

    With `memory.feature_cache`, of training on features, and of making them if that is more.

    `data` stays where it is; nothing is trained and no weight is allocated. The arguments
    up to `batch_size`, which is of the optimizer step, take the place of what is configured;
    `examples` are the data's, where there are any already; `shared` has the parts of other plans
    of the same settings, data and batch, and `features` those of making features; `planning` is
    called with the arguments of `expt.memory.plan`. `stage` is the number of the stage that is
    planned where `trainer.trainable` has several; None: all of them, and the largest counts.

    Raises:
        ConfigError: the model or a technique refuses its settings.
        ModelError: the model does not fit the data.

    """
    stages = settings.trainer.stages
    if len(stages) > 1 and stage is None:
        from expt.run.stages import joined

        return joined(
            [
                plan_training(
                    settings, data, target, techniques, precision, batch_size, evaluation,
                    examples, shared, features, planning, number,
                )
                for number in range(len(stages))
            ],
            stages,
        )  # fmt: skip
    techniques = techniques or techniques_of(settings.memory)
    cached = settings.memory.cached_features is not None
    if cached and not _gives_features(data):
        from expt.run.feature_plans import FeaturePlans, planned_with_features

        def plan_one(settings: Settings, data: DataSet, examples: Examples | None) -> Plan:
            return plan_training(
                settings, data, target, techniques, precision, batch_size, evaluation, examples,
                shared, planning=planning, stage=stage,
            )  # fmt: skip

        examples = examples or Examples(data)
        numbers = arithmetic(precision or settings.memory.precision, target)
        memory = replace(
            settings.memory,
            forward_chunks=techniques.forward_chunks,
            weight_offload=techniques.weight_offload,
        )
        settings = replace(settings, memory=memory)
        making = (features or FeaturePlans()).of(
            settings, data, target, numbers, examples, kept_on_device(data)
        )
        return planned_with_features(plan_one, making, settings, data, examples, evaluation)
    rank = _rank_of(settings.trainer)
    # As the loop takes them.
    samples = rank.share(min(batch_size or data.batch_size, data.size("train")))
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

    limit = settings.trainer.eval_batches
    evaluated = data.size("val")
    if limit is not None:
        evaluated = min(evaluated, limit * data.eval_batch_size)

    def evaluation_fn(forward: Callable[..., Any]) -> None:
        batch = examples.batch("val", min(data.eval_batch_size, rank.share(evaluated)))
        prediction, accumulator = forward(**batch.inputs), data.accumulator()
        accumulator.update(prediction, batch)
        if rank.count > 1:  # the first process counts what the others predict as well
            again = batch.each(rank.received)
            accumulator.update(rank.received(prediction), again)

    traced: list[weakref.ref[nn.Module]] = []  # what is traced is to be gone when it is done

    def optimizer_fn(parameters: list[nn.Parameter]) -> Any:
        model = traced[-1]()
        assert model is not None
        memory = replace(settings.memory, optimizer_in_backward=techniques.optimizer_in_backward)
        return build_optimizer(replace(settings, memory=memory), model)

    def prepare(model: nn.Module) -> None:
        if cached:
            from expt.run.features import mode_of, reduce

            reduce(model, str(mode_of(settings)), cast(Any, data).features)
        if stage is not None and len(stages) > 1:
            train_only(model, stages[stage].patterns)
        if problems := rank_problems(settings, model):
            raise ConfigError(problems)
        apply(model, techniques)
        rank.prepare(model)
        traced.append(weakref.ref(model))

    def model_fn() -> nn.Module:
        return build_model(settings, data, inputs)

    with rank.grouped():
        return rank.noted(
            planning(
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
                holds_outputs=False,
                lengths_vary=False,
                limit_bytes=allocator_limit(settings.memory, target),
                last_backward=rank.last_backward,
                shared=shared,
                keys=_keys(techniques, precision or settings.memory.precision, stage),
            )
        )


def feature_plans(settings: Settings) -> FeaturePlans | None:
    """Return what keeps the plans of making features, None without a feature cache."""
    if settings.memory.cached_features is None:
        return None
    from expt.run.feature_plans import FeaturePlans

    return FeaturePlans()


def _gives_features(data: DataSet) -> bool:
    from expt.training.features.dataset import FeatureData

    return isinstance(data, FeatureData)


class _OnlyRank:
    """The rank of a run in one process, of which there is nothing more to plan."""

    count = 1
    last_backward = staticmethod(nullcontext)
    grouped = staticmethod(nullcontext)

    def share(self, samples: int) -> int:
        return samples

    def prepare(self, model: nn.Module) -> None:
        """Do nothing."""

    def received(self, given: Any) -> Any:
        return given

    def noted(self, planned: Plan) -> Plan:
        return planned


def _rank_of(trainer: TrainerConfig) -> PlannedRank | _OnlyRank:
    if trainer.devices == 1:
        return _OnlyRank()
    from expt.memory.planning.rank import PlannedRank

    return PlannedRank(trainer.devices, trainer.sharded)


def _keys(
    techniques: Techniques, precision: Precision, stage: int | None
) -> tuple[Hashable, Hashable]:
    """Return what training steps depend on, and what evaluation does."""
    steps = techniques
    if not techniques.forward_chunks_in_training:
        steps = replace(techniques, forward_chunks=1)
    evaluation = replace(
        techniques,
        gradient_accumulation=1,
        activation_checkpointing=False,
        optimizer_in_backward=False,
    )
    return (precision, steps, stage), (precision, evaluation)


class Planner:
    """Plans of one configured training with other techniques, each traced once.

    Args:
        settings: the run's.
        data: on the host; None reads it again when it is needed, for a run whose data is on CUDA.
        target: the device to plan for.
        planned: the plan of the settings as they are, if there is one already.
        evaluation: also plan evaluation, which recovery makes smaller by itself.

    Where training goes in stages, `stage` is the number of the one that is planned; None: all.

    """

    stage: int | None = None

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
        self._plans: dict[tuple[Techniques, Precision, int | None], Plan | Exception] = {}
        self._steps: dict[Hashable, tuple[Any, ...]] = {}
        if planned is not None:
            self._plans[self.now, settings.memory.precision, None] = planned

    @cached_property
    def data(self) -> DataSet:
        """The data set, on the host."""
        found: DataSet = build(self.settings, "data") if self._data is None else self._data
        return found

    @cached_property
    def _shared(self) -> Shared:
        from expt.memory.planning.shared import Shared

        return Shared()

    @cached_property
    def _features(self) -> FeaturePlans | None:
        return feature_plans(self.settings)

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
        key = (*self._with(techniques, precision), self.stage)
        several = len(self.settings.trainer.stages) > 1 and self.stage is None
        if key not in self._plans:
            try:
                self._plans[key] = self._of_all(key) if several else self._of_one(key)
            except Exception as error:  # whatever a user's model does under fake tensors
                self._plans[key] = error.with_traceback(None)
        found = self._plans[key]
        if isinstance(found, Exception):
            raise found
        return found

    def _with(
        self, techniques: Techniques | None, precision: Precision | None
    ) -> tuple[Techniques, Precision]:
        return techniques or self.now, precision or self.settings.memory.precision

    def _of_one(self, key: tuple[Techniques, Precision, int | None]) -> Plan:
        techniques, precision, stage = key
        return plan_training(
            self.settings,
            self.data,
            self.target,
            techniques,
            precision,
            evaluation=self._evaluation,
            examples=self._examples,
            shared=self._shared,
            features=self._features,
            planning=partial(self._noted, key),
            stage=stage,
        )

    def _of_all(self, key: tuple[Techniques, Precision, int | None]) -> Plan:
        """Plan all stages; what the largest is made of is kept as that of all."""
        from expt.run.stages import joined, largest

        stages = self.settings.trainer.stages
        keys = [(*key[:2], number) for number in range(len(stages))]
        plans = [self._of_one(own) for own in keys]
        self._steps[key] = self._steps[keys[largest(plans)]]
        return joined(plans, stages)

    def _noted(self, key: Hashable, *step: Any, **settings: Any) -> Plan:
        """Plan a step, and keep what it is made of."""
        self._steps[key] = (*step, settings["prepare"])
        return plan(*step, **settings)

    def parts(self, techniques: Techniques | None = None) -> tuple[Any, ...]:
        """Return what the step is made of that `plan` plans, of the largest stage.

        They are model_fn, batch_fn, optimizer_fn, loss_fn and prepare of `expt.memory.plan`.

        Raises:
            Exception: what `plan` raises.

        """
        key = (*self._with(techniques, None), self.stage)
        planned = self.plan(techniques)
        if key not in self._steps:  # the plan was made elsewhere
            peaks = [stage.demand_bytes for stage in planned.stages]
            of = peaks.index(max(peaks)) if self.stage is None and peaks else self.stage

            def note(*step: Any, **settings: Any) -> Plan:
                self._steps[key] = (*step, settings["prepare"])
                return planned

            plan_training(
                self.settings, self.data, self.target, *key[:2], evaluation=False,
                examples=self._examples, features=self._features, planning=note, stage=of,
            )  # fmt: skip
        return self._steps[key]

    def like(
        self,
        data: Any = None,
        optimizer: Mapping[str, Any] | None = None,
        trainer: TrainerConfig | None = None,
    ) -> Planner:
        """Return a planner of the same run with other data, optimizer or trainer."""
        arguments = {**self.settings.arguments}
        if optimizer is not None:
            arguments["optimizer"] = optimizer
        settings = replace(
            self.settings, arguments=arguments, trainer=trainer or self.settings.trainer
        )
        other = Planner(settings, data or self.data, self.target, evaluation=self._evaluation)
        other.stage = self.stage
        return other

    def blocks(self, techniques: Techniques | None = None) -> Blocks | None:
        """Return what each block of the model takes over time; None where there is no trace.

        Raises:
            Exception: what `plan` raises.

        """
        return plan_training(
            self.settings,
            self.data,
            self.target,
            techniques or self.now,
            evaluation=self._evaluation,
            examples=self._examples,
            features=self._features,
            planning=partial(plan, blocks=True),
        ).blocks

    def operations(self, techniques: Techniques | None = None) -> float:
        """Return the floating-point operations of a training step, for each of its samples.

        Raises:
            Exception: what `plan` raises, or the model on fake tensors.

        """
        from expt.memory.planning.work import count_flops

        model_fn, batch_fn, _, loss_fn, prepare = self.parts(techniques)
        samples = min(self.data.batch_size, self.data.size("train"))
        micro_batch = -(-samples // (techniques or self.now).gradient_accumulation)
        return count_flops(model_fn, batch_fn, loss_fn, prepare) / micro_batch

    def model(self) -> nn.Module:
        """Return the model that is planned, without values, its techniques on it.

        Raises:
            Exception: what `plan` raises.

        """
        from expt.memory.planning.fake import build_fake
        from expt.memory.planning.hybrid import HybridFakeMode

        model_fn, *_, prepare = self.parts()
        model = build_fake(model_fn, HybridFakeMode())
        prepare(model)
        return model

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
        found = self._plans.get((*self._with(techniques, None), self.stage))
        return str(found) if isinstance(found, ConfigError) else None

    @property
    def least_bytes(self) -> int | None:
        """The lowest demand of everything that was planned so far."""
        return min((plan.demand_bytes for *_, plan in self._traced()), default=None)

    @property
    def lightest(self) -> Techniques:
        """The techniques of the lowest demand that was planned so far; else those configured."""
        own = self.settings.memory.precision
        plans = [(plan, found) for found, precision, plan in self._traced() if precision is own]
        return min(plans, key=lambda one: one[0].demand_bytes, default=(None, self.now))[1]

    def _traced(self) -> list[tuple[Techniques, Precision, Plan]]:
        """Return what was planned so far, as far as activations are in it."""
        return [
            (techniques, precision, plan)
            for (techniques, precision, stage), plan in self._plans.items()
            if stage == self.stage and isinstance(plan, Plan)
            if plan.interval_bytes[1] is not None
        ]


def spelled_out(record: Mapping[str, Any]) -> str:
    """Return a predicted peak with its interval and cause."""
    low, high = record["interval_bytes"]
    upper = "an unknown amount" if high is None else format_bytes(high)
    return (
        f"{format_bytes(record['peak_bytes'])} ({format_bytes(low)} to {upper}), in "
        f"{record['phase'].replace('_', ' ')}, mostly {record['dominant'].replace('_', ' ')}"
    )
