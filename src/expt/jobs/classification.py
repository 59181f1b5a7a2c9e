"""Figures of classification over videos that are seen as several clips each.

Scores are summed per video in tensors of a known size on the device, never in a list that grows
with the evaluation. What needs all scores at once (AUC, EER, AP) is computed from them on the host.

Letters: `B` clips, `N` videos of the data set, `K` classes, `T` frames.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from expt.errors import ModelError
from expt.job import Batch, Metric

TOP = 5
MOST_INCHES = 12.0
MOST_NAMES, MOST_COUNTS = 60, 20
"""Classes up to which a confusion matrix has their names, and counts in its cells."""


def class_metrics(subsets: Sequence[str] = ()) -> list[Metric]:
    """Return what `ClassScores` computes, the monitored figure first."""
    per_video = [
        Metric("accuracy", "max", "accuracy", percent=True),
        Metric(f"top{TOP}", "max", f"top-{TOP} accuracy", percent=True),
        Metric("class_accuracy", "max", "mean class accuracy", percent=True),
    ]
    per_clip = [
        Metric(f"clip_{metric.name}", "max", f"{metric.label}, clips", percent=True)
        for metric in per_video
    ]
    named = [
        Metric(f"accuracy_{name}", "max", f"accuracy, {name.replace('_', ' ')}", percent=True)
        for name in subsets
    ]
    return [*per_video, *per_clip, *named, Metric("loss", label="cross-entropy")]


def binary_metrics() -> list[Metric]:
    """Return what `BinaryScores` computes, the monitored figure first."""
    return [
        Metric("auc", "max", "video AUC", digits=4),
        Metric("frame_auc", "max", "frame AUC", digits=4),
        Metric("eer", "min", "equal error rate", percent=True),
        Metric("ap", "max", "average precision", digits=4),
        Metric("accuracy", "max", "accuracy", percent=True),
        Metric("loss", label="cross-entropy"),
    ]


class ClassScores:
    """Accuracy per clip and per video; implements `expt.job.Accumulator`.

    Args:
        labels: class of every video [N]; a batch's target [B,2] has class and number of the video.
        classes: their number K.
        subsets: which videos [N] each has; accuracy is also computed over those.

    """

    def __init__(
        self, labels: Tensor, classes: int, subsets: Mapping[str, Tensor] | None = None
    ) -> None:
        self.labels, self.classes, self.subsets = labels, classes, dict(subsets or {})
        self._scores: Tensor | None = None  # [N, K], sums of probabilities
        self._seen: Tensor | None = None  # [N], clips
        self._clips: Tensor | None = None  # [K, 3]: clips of a class, right ones, right in the top
        self._loss: Tensor | None = None

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add logits [B,K] of clips."""
        if prediction.shape != (len(batch), self.classes):
            raise ModelError(
                f"the model returned {list(prediction.shape)}, expected "
                f"{[len(batch), self.classes]} [clips, classes]"
            )
        logits, label, video = prediction.float(), batch.target[:, 0], batch.target[:, 1]
        if self._scores is None:
            self._scores = logits.new_zeros((len(self.labels), self.classes))
            self._seen = logits.new_zeros(len(self.labels))
            self._clips = logits.new_zeros((self.classes, 3))
            self._loss = logits.new_zeros(())
        assert self._clips is not None and self._loss is not None and self._seen is not None
        self._scores.index_add_(0, video, logits.softmax(dim=1))
        self._seen.index_add_(0, video, torch.ones_like(logits[:, 0]))
        top = logits.topk(min(TOP, self.classes), dim=1).indices == label.unsqueeze(1)
        seen = torch.stack([torch.ones_like(top[:, 0]), top[:, 0], top.any(dim=1)], dim=1)
        self._clips.index_add_(0, label, seen.to(self._clips.dtype))
        self._loss += F.cross_entropy(logits, label, reduction="sum")

    def compute(self) -> dict[str, float]:
        """Return the figures of `class_metrics`; a subset of which no video was seen has none.

        They are NaN where a score is not finite.
        """
        assert self._clips is not None and self._loss is not None, "no batch was added"
        scores, labels, seen = self.by_video()
        if not np.isfinite(scores).all():
            return {metric.name: math.nan for metric in class_metrics(list(self.subsets))}
        order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
        hits = order == labels[:, None]
        clips = self._clips.cpu().double().numpy()
        of_class = clips[clips[:, 0] > 0]
        count = clips[:, 0].sum()
        right = np.bincount(labels, weights=hits[:, 0], minlength=self.classes)
        all_of = np.bincount(labels, minlength=self.classes)
        figures = {
            "accuracy": float(hits[:, 0].mean()),
            f"top{TOP}": float(hits.any(axis=1).mean()),
            "class_accuracy": float((right[all_of > 0] / all_of[all_of > 0]).mean()),
            "clip_accuracy": float(clips[:, 1].sum() / count),
            f"clip_top{TOP}": float(clips[:, 2].sum() / count),
            "clip_class_accuracy": float((of_class[:, 1] / of_class[:, 0]).mean()),
            "loss": float(self._loss) / count,
        }
        for name, members in self.subsets.items():
            chosen = members.numpy()[seen]
            if chosen.any():
                figures[f"accuracy_{name}"] = float(hits[chosen, 0].mean())
        return figures

    def by_video(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return summed scores [n,K], classes [n] and numbers [n] of the videos seen."""
        assert self._scores is not None and self._seen is not None, "no batch was added"
        scores = self._scores.cpu().numpy()
        seen = np.flatnonzero(self._seen.cpu().numpy() > 0)
        return scores[seen], self.labels.numpy()[seen], seen

    def confusion(self) -> np.ndarray:
        """Return how many videos of each class (rows) were taken for each class [K,K]."""
        scores, labels, _ = self.by_video()
        table = np.zeros((self.classes, self.classes), dtype=np.int64)
        np.add.at(table, (labels, scores.argmax(axis=1)), 1)
        return table


class BinaryScores:
    """AUC, EER, AP and accuracy of a detector; implements `expt.job.Accumulator`.

    A prediction [B, 1+T] has the logit of the clip, then one per frame; a target [B, 2+T] has the
    label (1: positive) and number of the video, then the label of each frame.

    Args:
        videos: their number N.
        clips: at most so many are evaluated, for the size of what is kept.
        frames: T.

    """

    def __init__(self, videos: int, clips: int, frames: int) -> None:
        self.videos, self.clips, self.frames = videos, clips, frames
        self._by_video: Tensor | None = None  # [N, 3]: sum of probabilities, clips, label
        self._by_frame: Tensor | None = None  # [clips, T, 2]: logit, label
        self._loss: Tensor | None = None
        self._filled = 0

    def update(self, prediction: Tensor, batch: Batch) -> None:
        """Add logits [B, 1+T] of clips."""
        check_frames(prediction, batch)
        logits, target = prediction.float(), batch.target
        if self._by_video is None:
            self._by_video = logits.new_zeros((self.videos, 3))
            self._by_frame = logits.new_zeros((self.clips, self.frames, 2))
            self._loss = logits.new_zeros(())
        assert self._by_frame is not None and self._loss is not None
        label = target[:, 0].float()
        clip = torch.stack([logits[:, 0].sigmoid(), torch.ones_like(label), label], dim=1)
        self._by_video.index_add_(0, target[:, 1], clip)
        rows = slice(self._filled, self._filled + len(batch))
        self._by_frame[rows, :, 0] = logits[:, 1:]
        self._by_frame[rows, :, 1] = target[:, 2:].float()
        self._filled += len(batch)
        self._loss += F.binary_cross_entropy_with_logits(logits[:, 0], label, reduction="sum")

    def compute(self) -> dict[str, float]:
        """Return the figures of `binary_metrics`; where only one class was seen, AUC is 0.5."""
        from sklearn.metrics import average_precision_score, roc_auc_score

        assert self._loss is not None and self._by_frame is not None, "no batch was added"
        scores, labels = self.by_video()
        frames = self._by_frame[: self._filled].cpu().numpy().reshape(-1, 2)
        if not (np.isfinite(scores).all() and np.isfinite(frames).all()):
            return {metric.name: math.nan for metric in binary_metrics()}
        both = 0 < labels.sum() < len(labels)
        both_frames = 0 < frames[:, 1].sum() < len(frames)
        return {
            "auc": float(roc_auc_score(labels, scores)) if both else 0.5,
            "frame_auc": float(roc_auc_score(frames[:, 1], frames[:, 0])) if both_frames else 0.5,
            "eer": equal_error_rate(labels, scores) if both else 0.5,
            "ap": float(average_precision_score(labels, scores)) if labels.any() else 0.0,
            "accuracy": float(((scores > 0.5) == (labels > 0.5)).mean()),
            "loss": float(self._loss) / max(self._filled, 1),
        }

    def by_video(self) -> tuple[np.ndarray, np.ndarray]:
        """Return mean probability and label of the videos seen."""
        assert self._by_video is not None, "no batch was added"
        sums = self._by_video.cpu().numpy()
        seen = sums[sums[:, 1] > 0]
        return seen[:, 0] / seen[:, 1], np.round(seen[:, 2] / seen[:, 1])


def equal_error_rate(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return the rate at which false alarms are as frequent as misses, between two thresholds."""
    from sklearn.metrics import roc_curve

    false_alarms, hits, _ = roc_curve(labels, scores)
    misses = 1 - hits
    after = int(np.argmax(false_alarms >= misses))
    before = max(after - 1, 0)
    gap_before = misses[before] - false_alarms[before]
    gap_after = false_alarms[after] - misses[after]
    share = gap_before / (gap_before + gap_after) if gap_before + gap_after > 0 else 0.0
    return float(false_alarms[before] + share * (false_alarms[after] - false_alarms[before]))


def check_frames(prediction: Tensor, batch: Batch) -> None:
    """Raise ModelError unless there is a logit for the clip and one for each frame."""
    expected = (len(batch), batch.target.shape[1] - 1)
    if prediction.shape != expected:
        raise ModelError(
            f"the model returned {list(prediction.shape)}, expected {list(expected)} "
            "[clips, 1 + frames]"
        )


def plot_confusion(table: np.ndarray, classes: Sequence[str], folder: Path) -> Path:
    """Draw how many videos of each class were taken for which; many classes go by their numbers."""
    from matplotlib.figure import Figure

    from expt.files import replace_atomically

    size = min(max(4.0, 0.5 * len(classes) + 2.5), MOST_INCHES)
    figure = Figure(figsize=(size + 0.5, size), layout="constrained")
    axes = figure.subplots()
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    number = " (number of the class)"
    if len(classes) <= MOST_NAMES:
        places, number = np.arange(len(classes)), ""
        axes.set_xticks(places, classes, rotation=45, ha="right", fontsize=8, parse_math=False)
        axes.set_yticks(places, classes, fontsize=8, parse_math=False)
    if len(classes) <= MOST_COUNTS:
        for row, column in zip(*np.nonzero(table), strict=True):
            dark = shares[row, column] > 0.5
            axes.text(
                column, row, str(table[row, column]), ha="center", va="center", fontsize=8,
                color="white" if dark else "0.2",
            )  # fmt: skip
    axes.set(xlabel=f"predicted{number}", ylabel=f"true{number}")
    right = np.trace(table) / max(table.sum(), 1)
    axes.set_title(f"Test videos: {100 * right:.1f} % right", fontsize=11, loc="left")
    path = folder / "confusion.png"
    replace_atomically(path, lambda to: figure.savefig(to, format="png", dpi=120))
    return path


def plot_roc(labels: np.ndarray, scores: np.ndarray, folder: Path) -> Path | None:
    """Draw the curve of hits against false alarms; None where only one class was seen."""
    from matplotlib.figure import Figure
    from sklearn.metrics import roc_auc_score, roc_curve

    from expt.files import replace_atomically

    if not 0 < labels.sum() < len(labels):
        return None
    false_alarms, hits, _ = roc_curve(labels, scores)
    rate = equal_error_rate(labels, scores)
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(false_alarms, hits, drawstyle="steps-post")
    axes.plot([0, 1], [0, 1], ":", color="0.6", label="chance")
    axes.plot(rate, 1 - rate, "o", color="tab:red", label=f"equal error rate {100 * rate:.1f} %")
    axes.set(xlabel="false alarms", ylabel="hits", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axes.set_title(f"Test videos: AUC {roc_auc_score(labels, scores):.3f}", fontsize=11, loc="left")
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "roc.png"
    replace_atomically(path, lambda to: figure.savefig(to, format="png", dpi=120))
    return path
