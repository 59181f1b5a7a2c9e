"""`FrameSequences`: genuine or tampered, for clips of videos.

Letters: `B` clips, `T` frames.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from expt.drawing import drawn
from expt.errors import DataError
from expt.job import Batch
from expt.jobs.classification import (
    BinaryScores,
    binary_metrics,
    check_frames,
    plot_confusion,
    plot_roc,
)
from expt.jobs.clips.data import ClipData, Layout
from expt.jobs.clips.listing import Video, key_of, named
from expt.jobs.deepfake.layouts import celeb_df, dfdc, faceforensics

SPANS = "spans.json"
"""File beside the videos: of those tampered with in part, the first and last such frame."""


class FrameSequences(ClipData):
    """Clips of genuine and tampered videos; arguments are those of `ClipData`, and one more.

    The positive class is the one named in `positive`, or, where a label file numbers them, 1.

    Args:
        positive: name of the class of tampered videos.
        compression: of FaceForensics++, like ``c23``, where the folder has several.
        frame_loss: weight of the mean loss of single frames beside the clip's.

    """

    metrics = binary_metrics()
    layouts: ClassVar[Mapping[str, Layout]] = {
        **ClipData.layouts,
        "faceforensics": faceforensics,
        "celeb_df": celeb_df,
        "dfdc": dfdc,
    }
    grouped = frozenset({"faceforensics", "celeb_df", "dfdc"})

    def __init__(
        self,
        *args: Any,
        positive: str = "tampered",
        frame_loss: float = 0.5,
        compression: str | None = None,
        **settings: Any,
    ) -> None:
        self.compression = compression
        super().__init__(*args, **settings)
        self.frame_loss = frame_loss
        if len(self.classes) != 2:
            raise DataError(
                f"data.path={self.shown}: a detector needs two classes, genuine and tampered; "
                f"found {', '.join(self.classes)}"
            )
        self.positive = "1" if set(self.classes) == {"0", "1"} else positive
        if self.positive not in self.classes:
            raise DataError(
                f"data.positive={positive}: there is no such class; "
                f"data.positive={self.classes[1]} or {self.classes[0]} says which is tampered"
            )
        self.classes.sort(key=lambda name: name == self.positive)  # the positive one is 1
        for split, videos in self.parts.items():
            if len({video.label for video in videos}) < 2:
                raise DataError(
                    f"data.path={self.shown}: the {split} part has videos of one class only, "
                    f"{videos[0].label}, and AUC needs both"
                )

    def target(self, video: Video, at: int, numbers: Sequence[int]) -> Tensor:
        """Return label and number of the video, and the label of each frame, int64 [2+T]."""
        label = int(video.label == self.positive)
        first, last = self._spans.get(video.path, (0, self._probe(video).frames))
        frames = [label if first <= number <= last else 0 for number in numbers]
        if video.split == "train":  # a clip of it that misses the span is genuine
            label = max(frames)
        return torch.tensor([label, at, *frames])

    def loss(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of clips and, by their weight, of frames, summed over clips."""
        check_frames(prediction, batch)
        logits, target = prediction.float(), batch.target.float()
        clip = F.binary_cross_entropy_with_logits(logits[:, 0], target[:, 0], reduction="sum")
        frames = F.binary_cross_entropy_with_logits(logits[:, 1:], target[:, 2:], reduction="none")
        return clip + self.frame_loss * frames.mean(dim=1).sum()

    def accumulator(self) -> BinaryScores:
        """Return an accumulator of AUC, EER, AP and accuracy."""
        return BinaryScores(len(self.videos), self.evaluated_clips, self.frames)

    def plots(
        self, predict: Callable[[Batch], Tensor], metrics: BinaryScores, folder: Path
    ) -> list[Path]:
        """Draw ROC and confusion matrix of the test part."""
        scores, labels = metrics.by_video()
        table = torch.zeros((2, 2), dtype=torch.int64).numpy()
        for label, taken in zip(labels.astype(int), (scores > 0.5).astype(int), strict=True):
            table[label, taken] += 1
        return drawn(
            lambda: plot_roc(labels, scores, folder),
            lambda: plot_confusion(table, self.classes, folder),
        )

    @cached_property
    def _spans(self) -> dict[Path, tuple[int, int]]:
        """The frames that are tampered with, of videos that are so in part."""
        file = self.root / SPANS
        if not file.is_file():
            return {}
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))["clips"]
            spans = {name: (int(span["first"]), int(span["last"])) for name, span in kept.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{file} must be a JSON object whose `clips` has first and last frame under a "
                f"video's path without suffix: {error}"
            ) from error
        keys = {video.path: key_of(video.path, self.root) for video in self.videos}
        unknown = sorted(spans.keys() - set(keys.values()))
        if unknown and not self.unreadable:
            raise DataError(f"{file} names videos that are not there: {named(unknown)}")
        return {path: spans[key] for path, key in keys.items() if key in spans}
