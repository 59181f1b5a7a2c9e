"""Evaluation by several processes: each predicts its share, the first counts them all.

An accumulator may do anything with a prediction and its batch, so that accumulators of parts cannot
be joined. The first process is therefore sent the predictions of the others, a round at a time, and
counts them in the order of the samples: every sample once, in the memory of a single batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from expt.job import Accumulator, Batch, Split
from expt.memory.measuring.meter import MemoryMeter
from expt.memory.recovery.recovery import Recovery
from expt.training.batches import Batches, SharedSamples
from expt.training.ranks import SeveralRanks, Share


@torch.no_grad()
def evaluate_together(
    model: nn.Module,
    batches: Batches,
    split: Split,
    count: int,
    meter: MemoryMeter,
    interrupted: Callable[[], bool],
    recovery: Recovery | None,
    accumulator: Accumulator,
) -> bool:
    """Score the first `count` samples of a split; return False if a signal came in any process.

    In the first process `accumulator` has counted all of them then, in the others none.

    Raises:
        RecoveryError: not even a single sample can be evaluated.
        DataError: a sample cannot be read.

    """
    ranks = cast(SeveralRanks, batches.ranks)
    model.eval()
    for samples in batches.evaluation(split, count):
        assert isinstance(samples, SharedSamples)
        meter.take_in(samples.on_host())
        with meter.evaluation():
            found = _predicted(model, samples, batches, recovery, ranks)
            told = ranks.collect(found, interrupted())
            if told is None:
                return False
            for rank, one in enumerate(told):
                _count(accumulator, one, samples, rank, ranks)
    if recovery is not None:
        recovery.evaluated()
    model.train()
    return True


def _predicted(
    model: nn.Module,
    samples: SharedSamples,
    batches: Batches,
    recovery: Recovery | None,
    ranks: SeveralRanks,
) -> Any:
    """Return this process's predictions, with their batches where the first does not have them."""
    if not samples.share.counts and not ranks.sharded:
        return []
    parts: list[tuple[Tensor, Any]] = []
    done = 0

    def extend(size: int) -> None:
        nonlocal done
        batch = samples.own[done : done + size].batch()
        needed = () if samples.whole is not None else (dict(batch.inputs), batch.target)
        parts.append((model(**batch.inputs), needed))
        done += len(batch)

    while done < len(samples.own):
        if recovery is None:
            extend(batches.data.eval_batch_size)
        else:
            recovery.evaluation(extend, batches.data.eval_batch_size)
    return parts if samples.share.counts else []


def _count(
    accumulator: Accumulator, found: Any, samples: SharedSamples, rank: int, ranks: SeveralRanks
) -> None:
    """Count what one of the processes predicted."""
    start = 0
    if samples.whole is not None:
        start = Share.of(len(samples.whole), rank, ranks.count).start
    for prediction, needed in found:
        if samples.whole is None:
            batch = Batch(*needed)
        else:
            batch = samples.whole[start : start + len(prediction)].batch()
            start += len(prediction)
        accumulator.update(prediction, batch)
