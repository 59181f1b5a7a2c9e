"""A step that several processes take together: each on its share of the samples.

The losses of all shares are divided by the weight of the whole step, and gradients are summed, not
averaged: loss and weights are those of one process, to rounding, also where shares differ in size.
Without sharding, gradients are summed once, in the last backward pass (`GradientBuckets`). With
it, every backward pass leaves this process's part of the gradients and nothing else; to wait until
the last would take the memory of all gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim import Optimizer

from expt.job import Batch, DataSet
from expt.memory.recovery.recovery import Recovery
from expt.memory.techniques.gradient_buckets import GradientBuckets
from expt.training.batches import Samples, SharedSamples
from expt.training.profiler import StepProfiler
from expt.training.rank_peers import RankPeers
from expt.training.ranks import SeveralRanks


class RankedStep:
    """Does this process's part of a step; a `StepFunction`.

    Args:
        fabric: of this process.
        model: on its device, the same in all processes or sharded among them.
        optimizer: of its weights.
        data: whose loss it is.
        recovery: that the steps run under; gets its peers.
        ranks: the processes.
        profiler: told of phases.
        clip: clips the gradients of all processes by their norm.

    """

    def __init__(
        self,
        fabric: Fabric,
        model: nn.Module,
        optimizer: Optimizer,
        data: DataSet,
        recovery: Recovery,
        ranks: SeveralRanks,
        profiler: StepProfiler,
        clip: Callable[[], None],
    ) -> None:
        self._fabric, self._model, self._optimizer = fabric, model, optimizer
        self._data, self._recovery, self._ranks, self._clip = data, recovery, ranks, clip
        self._profiler = profiler
        self._full = ranks.share(min(data.batch_size, data.size("train"))).largest
        self._sums: GradientBuckets | None = None
        self.regroup()

    def regroup(self) -> None:
        """Sum the gradients of the weights that are trained now."""
        if not self._ranks.sharded:
            peers = RankPeers(self._ranks, list(self._model.parameters()))
            self._recovery.peers, self._sums = peers, peers.sums

    def __call__(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Do the step; return (mean loss of all samples, their weight) on the device."""
        assert isinstance(samples, SharedSamples)
        weight = samples.weight()
        total = torch.zeros((), device=self._fabric.device)
        parts = list(samples.parts(self._recovery.techniques.gradient_accumulation, self._full))
        for number, (part, counts) in enumerate(parts):
            if counts or self._ranks.sharded:
                total += self._backward(part, counts, weight, last=number == len(parts) - 1)
        if self._sums is not None:
            with self._profiler.phase("backward"):
                self._sums.finish()
        self._ranks.sum_(total)
        with self._profiler.phase("optimizer_step"):
            self._clip()
            self._recovery.phase = "optimizer_step"
            self._optimizer.step()
            self._optimizer.zero_grad()
        return total, weight

    def _backward(self, part: Samples, counts: bool, weight: Tensor, last: bool) -> Tensor:
        self._recovery.phase = "forward"
        with self._profiler.phase("batch"):
            batch = part.batch()
        loss = self._loss(batch, weight)
        if not counts:  # only so that this process takes part in what all do
            loss = 0.0 * loss
        self._recovery.phase = "backward"
        summing = nullcontext() if self._sums is None else self._sums.summing(last)
        with self._profiler.phase("backward"), summing:
            self._fabric.backward(loss)
        found: Tensor = loss.detach()
        return found

    def _loss(self, batch: Batch, weight: Tensor) -> Any:
        """Return this part of the loss; what the model returned is not held on to."""
        with self._profiler.phase("forward"):
            outputs = self._model(**batch.inputs)
        with self._profiler.phase("loss"):
            return self._data.loss(outputs, batch) / weight
