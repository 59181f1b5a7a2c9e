"""Genuine and tampered clips as samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from videos import square, write_video

from expt.errors import DataError, ModelError
from expt.job import protocol_problem
from expt.jobs.clips.listing import key_of
from expt.jobs.deepfake.data import FrameSequences

pytest.importorskip("av")
SIZES: dict[str, Any] = {"frames": 4, "pixels": 16, "batch_size": 4, "eval_batch_size": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faces")
    for part in ("train", "val", "test"):
        for number in range(4):
            label = ("original", "tampered")[number % 2]
            write_video(folder / part / label / f"{number}.mp4", square(12, seed=number))
    return folder


def test_the_positive_class_is_one(root):
    assert protocol_problem(FrameSequences) is None
    assert FrameSequences(str(root), **SIZES).classes == ["original", "tampered"]
    assert FrameSequences(str(root), **SIZES, positive="original").classes[1] == "original"


def test_frames_outside_of_the_span_are_genuine(root):
    data = FrameSequences(str(root), **SIZES, stride=3)
    at = next(i for i, v in enumerate(data.parts["val"]) if v.label == "tampered")
    assert data.item("val", at, torch.Generator()).target[2:].tolist() == [1, 1, 1, 1]
    key = data.parts["val"][at].path.relative_to(root).with_suffix("").as_posix()
    (root / "spans.json").write_text(json.dumps({"clips": {key: {"first": 5, "last": 8}}}))
    try:
        marked = FrameSequences(str(root), **SIZES, stride=3).item("val", at, torch.Generator())
        assert marked.target.tolist()[0] == 1
        assert marked.target[2:].tolist() == [0, 0, 1, 0]  # frames 1, 4, 7, 10
        video = next(v for v in data.parts["train"] if v.label == "tampered")
        spans = {key_of(video.path, root): {"first": 5, "last": 8}}
        (root / "spans.json").write_text(json.dumps({"clips": spans}))
        partly = FrameSequences(str(root), **SIZES)
        assert partly.target(video, 0, [0, 1, 2, 3])[0] == 0  # a training clip that misses it
        assert partly.target(video, 0, [4, 5, 6, 7])[0] == 1
        (root / "spans.json").write_text(json.dumps({"clips": {"x": {"first": 5, "last": 8}}}))
        with pytest.raises(DataError, match="names videos that are not there: x"):
            FrameSequences(str(root), **SIZES).item("val", at, torch.Generator())
        (root / "spans.json").write_text("[]")
        with pytest.raises(DataError, match="must be a JSON object"):
            FrameSequences(str(root), **SIZES).item("val", at, torch.Generator())
    finally:
        (root / "spans.json").unlink()


def test_the_loss_is_summed_over_clips(root):
    data = FrameSequences(str(root), **SIZES)
    batch = data.example("train", 4)
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    parts = sum(
        data.loss(logits[i : i + 1], batch.each(lambda v, i=i: v[i : i + 1])) for i in range(4)
    )
    assert torch.allclose(data.loss(logits, batch), parts)
    with pytest.raises(ModelError, match=r"expected \[4, 5\] \[clips, 1 \+ frames\]"):
        data.loss(logits[:, :1], batch)


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (("a", "b", "c"), {}, "needs two classes, genuine and tampered; found a, b, c"),
        (
            ("real", "fake"),
            {},
            "data.positive=tampered: there is no such class; data.positive=real",
        ),
    ],
)
def test_what_is_no_detection_is_refused(tmp_path, names, settings, message):
    for part in ("train", "val", "test"):
        for name in names:
            write_video(tmp_path / part / name / "1.mp4", square(4))
    with pytest.raises(DataError, match=message):
        FrameSequences(str(tmp_path), **SIZES, **settings)


def test_a_part_of_one_class_is_refused(tmp_path):
    for part in ("train", "val", "test"):
        for name in ("original", "tampered") if part != "val" else ("tampered",):
            write_video(tmp_path / part / name / "1.mp4", square(4))
    with pytest.raises(DataError, match="the val part has videos of one class only, tampered"):
        FrameSequences(str(tmp_path), **SIZES)


@pytest.mark.parametrize("layout", FrameSequences.layouts)
def test_a_pattern_of_groups_is_refused_where_the_layout_has_groups(layout):
    found = FrameSequences.problems({"layout": layout, "group_pattern": r"(p\d)"})
    if layout in ("folders", "list"):
        assert found == []
    else:
        assert len(found) == 1 and f"data.layout={layout} says itself" in found[0]
