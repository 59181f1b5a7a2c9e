"""The plan of a configured training: what `task=plan` prints and every training checks first.

Joins settings, data and model to `expt.memory.plan`, which knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from expt.construction import Settings, build
from expt.memory.checkpointing import checkpoint_activations
from expt.memory.planning import Plan, Target, plan
from expt.protocols import Batch, DataSet
from expt.schema import Precision


def plan_training(settings: Settings, data: DataSet, target: Target) -> Plan:
    """Predict the peak of a configured training on `target`, evaluation included.

    `data` stays where it is; nothing is trained and no weight is allocated.
    """
    accumulation = settings.memory.gradient_accumulation
    micro_batch = -(-data.batch_size // accumulation)

    def batch_fn() -> tuple[Batch, Tensor]:
        indices = torch.arange(micro_batch)
        return data.gather("train", indices), data.weight("train", indices)

    def loss_fn(forward: Callable[..., Any], batch: tuple[Batch, Tensor]) -> Tensor:
        return data.loss(forward(**batch[0].inputs), batch[0]) / batch[1]

    def evaluation_fn(forward: Callable[..., Any]) -> None:
        size = min(data.eval_batch_size, data.size("val"))
        batch = data.gather("val", torch.arange(size))
        data.metrics().update(forward(**batch.inputs), batch)

    def prepare(model: nn.Module) -> None:
        if settings.memory.activation_checkpointing:
            checkpoint_activations(model)

    return plan(
        lambda: build(settings, "model", **data.model_arguments()),
        batch_fn,
        lambda parameters: build(settings, "optimizer", params=parameters),
        loss_fn,
        target=target,
        precision=_precision(settings.memory.precision, target),
        micro_batches=accumulation,
        clip_norm=settings.trainer.gradient_clip_norm,
        evaluation_fn=evaluation_fn,
        prepare=prepare,
    )


def _precision(precision: Precision, target: Target) -> Literal["fp32", "bf16", "fp16"]:
    if precision is Precision.auto:
        return "bf16" if target == "cuda" else "fp32"
    return cast(Literal["fp32", "bf16", "fp16"], precision.value)
