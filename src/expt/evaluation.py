"""Evaluation of a whole split, with sums kept on the device until the end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from expt.protocols import Batch, DataSet, MemoryMeter, Metrics, Split


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    model: nn.Module,
    data: DataSet,
    split: Split,
    meter: MemoryMeter,
    max_batches: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
) -> Metrics | None:
    """Return the metrics over every sample of `split`, none padded and none dropped.

    `max_batches` cuts it short for smoke tests; the figures are then of those batches only.
    None means that `interrupted` became true on the way.
    """
    metrics = data.metrics()
    model.eval()
    indices = torch.arange(data.size(split), device=fabric.device)
    for number, chunk in enumerate(indices.split(data.eval_batch_size)):
        if max_batches is not None and number >= max_batches:
            break
        if interrupted():
            return None
        with meter.evaluation():
            batch = data.gather(split, chunk)
            metrics.update(model(**batch.inputs), batch)
    model.train()
    return metrics


@torch.no_grad()
def predict(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's prediction for one batch, without gradients."""
    model.eval()
    prediction: Tensor = model(**batch.inputs)
    return prediction
