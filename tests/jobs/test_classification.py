"""Figures over videos of several clips, against scikit-learn and by hand."""

from __future__ import annotations

import math
import struct

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

from expt.errors import ModelError
from expt.job import Batch
from expt.jobs.classification import (
    BinaryScores,
    ClassScores,
    binary_metrics,
    class_metrics,
    equal_error_rate,
    plot_confusion,
    plot_roc,
)

N, K, CLIPS, T = 40, 7, 3, 4


def test_accuracy_per_clip_and_per_video():
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(K, (N,), generator=draw)
    logits = torch.randn(N * CLIPS, K, generator=draw)
    logits[torch.arange(N * CLIPS), labels.repeat_interleave(CLIPS)] += 1.0
    video = torch.arange(N).repeat_interleave(CLIPS)
    target = torch.stack([labels[video], video], dim=1)
    members = {"few": torch.arange(N) < 5, "none": torch.zeros(N, dtype=torch.bool)}
    scores = ClassScores(labels, K, members)
    for part in torch.arange(N * CLIPS).split(7):
        scores.update(logits[part], Batch({}, target[part]))
    found = scores.compute()
    mean = logits.softmax(1).view(N, CLIPS, K).mean(1)
    taken = mean.argmax(1)
    assert found["accuracy"] == pytest.approx((taken == labels).float().mean().item())
    assert found["class_accuracy"] == pytest.approx(balanced_accuracy_score(labels, taken))
    top = (mean.topk(5).indices == labels[:, None]).any(1).float().mean().item()
    assert found["top5"] == pytest.approx(top)
    right = (logits.argmax(1) == labels[video]).float()
    assert found["clip_accuracy"] == pytest.approx(right.mean().item())
    assert found["clip_class_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels[video], logits.argmax(1))
    )
    assert found["accuracy_few"] == pytest.approx((taken == labels)[:5].float().mean().item())
    assert "accuracy_none" not in found
    names = {metric.name for metric in class_metrics(["few", "none"])}
    assert set(found) == names - {"accuracy_none"}
    assert scores.confusion().trace() == int((taken == labels).sum())
    with pytest.raises(ModelError, match="expected"):
        scores.update(logits[:, :3], Batch({}, target))


def test_what_is_kept_does_not_grow():
    scores = BinaryScores(N, N * CLIPS, T)
    batch = Batch({}, torch.zeros((10, 2 + T), dtype=torch.int64))
    scores.update(torch.randn(10, 1 + T), batch)
    kept = [value.data_ptr() for value in vars(scores).values() if torch.is_tensor(value)]
    scores.update(torch.randn(10, 1 + T), batch)
    assert [v.data_ptr() for v in vars(scores).values() if torch.is_tensor(v)] == kept


def test_a_detector_s_figures():
    draw = torch.Generator().manual_seed(1)
    labels = (torch.arange(N) % 3 == 0).long()
    video = torch.arange(N).repeat_interleave(CLIPS)
    frames = labels[video][:, None] * (torch.rand(N * CLIPS, T, generator=draw) < 0.5)
    logits = torch.randn(N * CLIPS, 1 + T, generator=draw)
    logits[:, 0] += labels[video]
    logits[:, 1:] += frames
    target = torch.cat([labels[video][:, None], video[:, None], frames.long()], dim=1)
    scores = BinaryScores(N, N * CLIPS, T)
    for part in torch.arange(N * CLIPS).split(11):
        scores.update(logits[part], Batch({}, target[part]))
    found = scores.compute()
    mean = logits[:, 0].sigmoid().view(N, CLIPS).mean(1)
    assert found["auc"] == pytest.approx(roc_auc_score(labels, mean), abs=1e-6)
    assert found["ap"] == pytest.approx(average_precision_score(labels, mean), abs=1e-6)
    assert found["frame_auc"] == pytest.approx(
        roc_auc_score(frames.flatten(), logits[:, 1:].flatten()), abs=1e-6
    )
    assert found["accuracy"] == pytest.approx(((mean > 0.5) == labels.bool()).float().mean().item())
    assert set(found) == {metric.name for metric in binary_metrics()}


def test_the_equal_error_rate_lies_where_the_two_cross():
    assert equal_error_rate(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9])) == 0
    assert equal_error_rate(np.array([0, 1, 0, 1]), np.array([0.1, 0.2, 0.8, 0.9])) == 0.5
    draw = np.random.default_rng(0)
    labels = np.arange(20_000) % 2
    found = equal_error_rate(labels, draw.normal(size=20_000) + 2 * labels)
    assert found == pytest.approx(0.1587, abs=0.01)  # the normal distribution beyond one deviation


def test_one_class_alone_is_chance():
    scores = BinaryScores(4, 4, T)
    scores.update(torch.randn(4, 1 + T), Batch({}, torch.zeros((4, 2 + T), dtype=torch.int64)))
    found = scores.compute()
    assert (found["auc"], found["eer"]) == (0.5, 0.5)


def test_pictures(tmp_path):
    table = np.array([[5, 1], [2, 4]])
    assert plot_confusion(table, ["a", "b"], tmp_path).stat().st_size > 5000
    labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.2, 0.7, 0.6, 0.4, 0.9])
    curve = plot_roc(labels, scores, tmp_path)
    assert curve is not None and curve.stat().st_size > 5000
    assert plot_roc(np.zeros(3), scores[:3], tmp_path) is None


def test_a_confusion_matrix_of_many_classes_is_a_picture_of_the_usual_size(tmp_path):
    names = [f"class {n}" for n in range(400)]
    path = plot_confusion(np.eye(400, dtype=int), names, tmp_path)
    width, height = struct.unpack(">II", path.read_bytes()[16:24])
    assert max(width, height) < 1600


def test_scores_that_are_not_finite_are_no_figures():
    scores = ClassScores(torch.tensor([0, 1]), 2)
    logits = torch.tensor([[float("nan"), 0.0], [0.0, 1.0]])
    scores.update(logits, Batch({}, torch.tensor([[0, 0], [1, 1]])))
    assert math.isnan(scores.compute()["accuracy"])
    binary = BinaryScores(2, 2, 1)
    binary.update(logits, Batch({}, torch.tensor([[0, 0, 0], [1, 1, 1]])))
    assert math.isnan(binary.compute()["auc"])
