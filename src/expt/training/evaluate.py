"""Evaluation of a whole split, with sums kept on the device until the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from expt.errors import DataError, first_line
from expt.job import Accumulator, Batch, DataSet, Split
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.recovery.recovery import Recovery
from expt.training.batches import Batches, Samples, StoppedWaitingError


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Batches,
    split: Split,
    meter: MemoryMeter,
    max_batches: int | None = None,
    interrupted: Callable[[], bool] = lambda: False,
    recovery: Recovery | None = None,
    accumulator: Callable[[], Accumulator] | None = None,
) -> Accumulator | None:
    """Return the metrics over every sample of `split`, none padded and none dropped.

    `max_batches` cuts it short for smoke tests; the figures are then of those batches only.
    None means that `interrupted` became true on the way. With `recovery`, a batch that runs out
    of memory is done again with half the samples; nothing is counted twice. `accumulator` makes
    another than the data set's own, like `Kept`.

    Raises:
        RecoveryError: not even a single sample can be evaluated.
        DataError: a sample cannot be read.

    """
    data = batches.data
    count = data.size(split)
    if max_batches is not None:
        count = min(count, max_batches * data.eval_batch_size)
    if batches.ranks.count > 1:
        from expt.training.shared_evaluation import evaluate_together

        found = (accumulator or data.accumulator)()
        whole = evaluate_together(model, batches, split, count, meter, interrupted, recovery, found)
        return found if whole else None
    model.eval()
    finished = False
    while not finished:
        run = _Run(model, data, (accumulator or data.accumulator)())
        try:
            finished = run.all_of(batches.evaluation(split, count), meter, interrupted, recovery)
        except StoppedWaitingError:
            return None
        if not finished and not run.counting:
            return None  # interrupted; else the sums are half changed, and it begins again
    model.train()
    return run.accumulator


def figures(metrics: Accumulator) -> dict[str, float]:
    """Return what an accumulator computes as Python's numbers, which checkpoints can hold.

    Raises:
        DataError: a figure is no number.

    """
    found = metrics.compute()
    try:
        return {name: _number(value) for name, value in found.items()}
    except (TypeError, ValueError) as error:
        kinds = {name: type(value).__name__ for name, value in found.items()}
        raise DataError(
            f"{type(metrics).__name__}.compute must return a number by each name: "
            f"{first_line(error)} (found {kinds})"
        ) from error


def _number(value: Any) -> float:
    if (
        isinstance(value, Tensor) and value.numel() != 1
    ):  # what torch raises is a memory error's kin
        raise TypeError(f"a tensor of shape {list(value.shape)}")
    return float(value)


class Kept:
    """An `Accumulator` around the data set's `inner` that keeps the predictions, on the host."""

    def __init__(self, inner: Accumulator) -> None:
        self.inner = inner
        self._parts: list[Tensor] = []

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add a batch to the figures, and keep what was predicted [B, ...]."""
        self.inner.update(prediction, batch)
        kept = prediction.detach()
        self._parts.append((kept.float() if kept.is_floating_point() else kept).cpu())

    def compute(self) -> dict[str, float]:
        """Return the figures."""
        return self.inner.compute()

    @property
    def predictions(self) -> Tensor:
        """All predictions, in the order of the samples."""
        return torch.cat(self._parts)


class _Run:
    """The figures so far, and how far the samples at hand are done."""

    def __init__(self, model: nn.Module, data: DataSet, accumulator: Accumulator) -> None:
        self.model, self.data = model, data
        self.accumulator = accumulator
        self.done = 0
        self.counting = False

    def all_of(
        self,
        batches: Iterator[Samples],
        meter: MemoryMeter,
        interrupted: Callable[[], bool],
        recovery: Recovery | None,
    ) -> bool:
        """Score every sample; return False if it was interrupted, or the sums are half changed."""
        for samples in batches:
            self.done = 0
            meter.take_in(samples.on_host())
            while self.done < len(samples):
                if interrupted():
                    return False
                with meter.evaluation():
                    score = partial(self.score, samples)
                    if recovery is None:
                        score(self.data.eval_batch_size)
                    else:
                        recovery.evaluation(score, self.data.eval_batch_size)
                if self.counting:
                    return False
        if recovery is not None:
            recovery.evaluated()
        return True

    def score(self, samples: Samples, size: int) -> None:
        """Add the next `size` samples to the figures."""
        part = samples[self.done : self.done + size]
        batch = part.batch()
        prediction = self.model(**batch.inputs)
        self.counting = True
        self.accumulator.update(prediction, batch)
        self.counting = False
        self.done += len(part)


@torch.no_grad()
def predict(model: nn.Module, batch: Batch, recovery: Recovery | None = None) -> Tensor:
    """Return the model's prediction for one batch, without gradients.

    With `recovery`, in parts as small as it takes.

    Raises:
        RecoveryError: not even a single sample can be predicted.

    """
    model.eval()
    count, parts = len(batch), list[Tensor]()

    def extend(size: int) -> None:
        start = sum(map(len, parts))
        parts.append(model(**batch.each(lambda value: value[start : start + size]).inputs))

    while sum(map(len, parts)) < count:
        if recovery is None:
            extend(count)
        else:
            recovery.evaluation(extend, count)
    return parts[0] if len(parts) == 1 else torch.cat(parts)
