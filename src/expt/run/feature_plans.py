"""The plan of a run with the feature cache: training on features, and making them before it.

Their shapes come from the model's `features` on fake tensors: no weight is read, and no row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from expt.config.settings import Settings
from expt.job import DataSet, StreamedDataSet
from expt.memory.planning.predict import Plan, Target, plan
from expt.memory.techniques.techniques import apply
from expt.run.build import build_model
from expt.run.features import ALTERNATING, check, mathematics, mode_of, reduce, without_cache
from expt.training.batches import Examples
from expt.training.features.dataset import with_features
from expt.training.features.feature import Feature, accepted, features_of
from expt.training.features.filling import part_size
from expt.training.features.store import SPLITS, Rows
from expt.units import format_bytes

BUILDING = "feature_cache"
"""Phase of a plan whose peak is in making the features."""


class FeaturePass(nn.Module):
    """A model's features of a batch, as what a plan runs.

    Args:
        model: with all of its parts.
        mode: of the features.
        dtype: `memory.feature_cache_dtype`.
        note: told what the features are.

    """

    def __init__(
        self, model: nn.Module, mode: str, dtype: str, note: Callable[[list[Feature]], None]
    ) -> None:
        super().__init__()
        self.model, self.mode, self.dtype, self.note = model, mode, dtype, note
        self.step = nn.Parameter(torch.zeros(1))  # a plan takes a step; this one costs nothing

    def forward(self, **inputs: Tensor) -> Any:
        """Return the features as they are kept; without inputs, something to step on."""
        if not inputs:
            return self.step.sum()
        count = len(next(iter(inputs.values())))
        model = cast(Any, self.model)
        given = {name: inputs[name] for name in accepted(model, inputs)}
        made = model.features(self.mode, **given)
        found = features_of(made, count, self.dtype)
        self.note(found)
        return {one.name: one.encode(made[one.name]) for one in found}


@dataclass(frozen=True)
class FeaturePlan:
    """What making features takes, and what they are; None where it could not be traced."""

    planned: Plan
    features: list[Feature] | None
    replaced: list[str]

    def data(self, data: DataSet) -> DataSet:
        """Return a data set as training reads it, for a plan."""
        assert self.features is not None
        return with_features(cast(StreamedDataSet, data), self.features, self.replaced)

    def beside(self, training: Plan, data: DataSet, settings: Settings, whole: bool) -> Plan:
        """Return the larger of this plan and that of training, with a note of both.

        Unless `whole`, that of training.
        """
        note = (
            f"{disk_words(self, data, settings)}; training takes "
            f"{format_bytes(training.peak_bytes)}, making the features before it "
            f"{format_bytes(self.planned.peak_bytes)} "
            f"({part_size(data, settings.memory.forward_chunks)} samples at a time: "
            "data.eval_batch_size by memory.forward_chunks)"
        )
        larger = whole and self.planned.demand_bytes > training.demand_bytes
        chosen = self.planned if larger else training
        return replace(chosen, notes=(*chosen.notes, note))


class FeaturePlans:
    """Plans of making features, each traced once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Target, str, int, bool], FeaturePlan] = {}

    def of(
        self,
        settings: Settings,
        data: DataSet,
        target: Target,
        precision: str,
        examples: Examples,
        resident: list[Tensor],
    ) -> FeaturePlan:
        """Return the plan of making the features of this data.

        Raises:
            ConfigError: the model or the data has none to be kept.

        """
        memory = settings.memory
        key = (target, precision, memory.forward_chunks, memory.weight_offload)
        if key not in self._made:
            self._made[key] = _plan(settings, data, target, precision, examples, resident)
        return self._made[key]


def _plan(
    settings: Settings,
    data: DataSet,
    target: Target,
    precision: str,
    examples: Examples,
    resident: list[Tensor],
) -> FeaturePlan:
    mode, names = str(mode_of(settings)), examples.input_names()
    whole = min(data.eval_batch_size, data.size("train"))
    size = min(part_size(data, settings.memory.forward_chunks), whole)
    if target == "cuda":
        whole = size  # the others wait on the host
    dtype, replaced, found = settings.memory.feature_cache_dtype, list[str](), list[Feature]()

    def note(features: list[Feature]) -> None:
        found[:] = features

    def model_fn() -> nn.Module:
        model = build_model(settings, data, names)
        cached = check(settings, data, model)
        replaced[:] = cached.feature_inputs(mode)
        return FeaturePass(model, mode, dtype.value, note)

    def evaluation_fn(forward: Callable[..., Any]) -> None:
        batch = examples.batch("train", whole)
        given = batch if size == whole else batch.each(lambda v: v[:size])
        if precision != "fp32":  # as Fabric hands inputs to a model, beside the batch
            half = torch.bfloat16 if precision == "bf16" else torch.float16
            given = given.each(lambda v: v.to(half) if v.is_floating_point() else v)
        forward(**given.inputs)

    planned = plan(
        model_fn,
        lambda: torch.zeros(1),
        lambda parameters: torch.optim.SGD(parameters[-1:], 0.0),
        lambda forward, batch: forward(),
        target=target,
        precision=cast(Any, precision),
        evaluation_fn=evaluation_fn,
        prepare=lambda model: _mathematics_on(model, settings),
        resident=resident,
        holds_outputs=False,
        lengths_vary=False,
    )
    phase = BUILDING if planned.phase == "evaluation" else planned.phase
    return FeaturePlan(replace(planned, phase=phase), list(found) or None, list(replaced))


def _mathematics_on(model: nn.Module, settings: Settings) -> None:
    apply(cast(FeaturePass, model).model, mathematics(settings))


def disk_words(making: FeaturePlan, data: DataSet, settings: Settings) -> str:
    """Return what the features take on disk, for a note."""
    assert making.features is not None
    row = sum(feature.nbytes for feature in making.features)
    splits = SPLITS[:1] if mode_of(settings) == ALTERNATING else SPLITS
    count = sum(data.size(split) for split in splits)
    return (
        f"memory.feature_cache={settings.memory.cached_features}: {count:,} samples of "
        f"{format_bytes(row)} take {format_bytes(count * row)} on disk"
    )


def planned_with_features(
    plan_one: Callable[[Settings, DataSet, Examples | None], Plan],
    making: FeaturePlan,
    settings: Settings,
    data: DataSet,
    examples: Examples,
    whole: bool,
) -> Plan:
    """Return the plan of a training with the feature cache.

    Args:
        plan_one: plans a training of other settings on other data, with its examples.
        making: the plan of making the features.
        settings: with the cache on.
        data: as it was built.
        examples: the data's.
        whole: also what is done before the first step, like making the features.

    """
    if making.features is None:
        note = "memory.feature_cache: the shapes of features are not known; planned live"
        training = plan_one(without_cache(settings), data, examples)
        return replace(training, notes=(*training.notes, note))
    if mode_of(settings) == ALTERNATING:  # an epoch of which is live
        training = plan_one(without_cache(settings), data, examples)
        note = disk_words(making, data, settings)
        return replace(training, notes=(*training.notes, note))
    training = plan_one(settings, making.data(data), None)
    return making.beside(training, data, settings, whole)


class Zeros(Rows):
    """Rows of zeros, for steps that only show what they take."""

    def __init__(self, features: list[Feature]) -> None:
        super().__init__(Path(), features, {})

    def read(self, split: str, index: int) -> dict[str, Tensor]:
        """Return a sample's features, all zero."""
        return {feature.name: feature.zeros(1)[0] for feature in self.features}


def stand_in(
    settings: Settings, data: DataSet, target: Target, precision: str
) -> tuple[DataSet, Callable[[nn.Module], None]]:
    """Return data as training reads them with features of zeros, and what reduces the model.

    Without a cache, and for alternating epochs, the data as they are, and what does nothing.
    """
    mode = mode_of(settings)
    if mode is None or mode == ALTERNATING:
        return data, lambda model: None
    making = FeaturePlans().of(settings, data, target, precision, Examples(data), [])
    if making.features is None:
        return data, lambda model: None
    features = making.features
    streamed = with_features(
        cast(StreamedDataSet, data), features, making.replaced, Zeros(features)
    )
    return streamed, lambda model: reduce(model, mode, features)
