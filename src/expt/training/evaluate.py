"""Evaluation of a whole split, with sums kept on the device until the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from expt.job import Batch, DataSet, Metrics, Split
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.recovery.recovery import Recovery


@torch.no_grad()
def evaluate(
    fabric: Fabric,
    model: nn.Module,
    data: DataSet,
    split: Split,
    meter: MemoryMeter,
    max_batches: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    recovery: Recovery | None = None,
) -> Metrics | None:
    """Return the metrics over every sample of `split`, none padded and none dropped.

    `max_batches` cuts it short for smoke tests; the figures are then of those batches only.
    None means that `interrupted` became true on the way. With `recovery`, a batch that runs out
    of memory is done again with half the samples; nothing is counted twice.

    Raises:
        RecoveryError: not even a single sample can be evaluated.

    """
    run = _SplitRun(model, data, split)
    model.eval()
    count = data.size(split)
    if max_batches is not None:
        count = min(count, max_batches * data.eval_batch_size)
    indices = torch.arange(count, device=fabric.device)
    while run.done < count:
        if interrupted():
            return None
        with meter.evaluation():
            score = partial(run.score, indices)
            if recovery is None:
                score(data.eval_batch_size)
            elif not recovery.evaluation(score, data.eval_batch_size):
                run.forget_half_counted()
    model.train()
    return run.metrics


class _SplitRun:
    """How far the evaluation of a split has come."""

    def __init__(self, model: nn.Module, data: DataSet, split: Split) -> None:
        self.model, self.data, self.split = model, data, split
        self.metrics = data.metrics()
        self.done = 0
        self._counting = False

    def score(self, indices: Tensor, size: int) -> None:
        """Add the next `size` samples to the metrics."""
        chunk = indices[self.done : self.done + size]
        batch = self.data.gather(self.split, chunk)
        prediction = self.model(**batch.inputs)
        self._counting = True
        self.metrics.update(prediction, batch)
        self._counting = False
        self.done += len(chunk)

    def forget_half_counted(self) -> None:
        """Begin again if the metrics were being changed; a new accumulator is the only undo."""
        if self._counting:
            self.metrics, self.done, self._counting = self.data.metrics(), 0, False


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, recovery: Recovery | None = None) -> Tensor:
    """Return the model's prediction for one batch, without gradients.

    With `recovery`, in parts as small as it takes.

    Raises:
        RecoveryError: not even a single sample can be predicted.

    """
    model.eval()
    count, parts = len(batch.target), list[Tensor]()

    def extend(size: int) -> None:
        start = sum(map(len, parts))
        inputs = {name: value[start : start + size] for name, value in batch.inputs.items()}
        parts.append(model(**inputs))

    while sum(map(len, parts)) < count:
        if recovery is None:
            extend(count)
        else:
            recovery.evaluation(extend, count)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
