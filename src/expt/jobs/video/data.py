"""`VideoClips`: which of some classes a video shows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from expt.job import Batch
from expt.jobs.classification import ClassScores, class_metrics, plot_confusion
from expt.jobs.clips.data import ClipData


class VideoClips(ClipData):
    """Clips of videos of two or more classes; arguments are those of `ClipData`."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.metrics = class_metrics(list(self.subsets))

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of logits [B,K], summed over the clips."""
        return F.cross_entropy(prediction.float(), batch.target[:, 0], reduction="sum")

    def accumulator(self) -> ClassScores:
        """Return an accumulator of accuracy per clip and per video."""
        return ClassScores(self.labels, len(self.classes), self.members())

    def plots(
        self, predict: Callable[[Batch], Tensor], metrics: ClassScores, folder: Path
    ) -> list[Path]:
        """Draw the confusion matrix of the test part."""
        return [plot_confusion(metrics.confusion(), self.classes, folder)]
