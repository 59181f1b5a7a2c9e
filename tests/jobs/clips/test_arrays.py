"""Clips that are arrays: read like videos, with as many channels as they have."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expt.errors import DataError
from expt.jobs.clips.decode import Probe, is_clip, probe, read_frames
from expt.jobs.clips.inspect import inspect_files
from expt.jobs.deepfake.sequence import FrameSequence
from expt.jobs.video.data import VideoClips
from expt.jobs.video.r3d import R3D
from expt.memory.measuring.budget_ledger import BudgetLedger
from expt.result import load_result

SIZES = {"frames": 4, "pixels": 12, "batch_size": 4, "eval_batch_size": 4, "resize": 14}


def heat_maps(frames: int = 9, channels: int = 5, side: int = 20, seed: int = 0) -> np.ndarray:
    """Frames [n,H,W,C] in which every channel has a spot that moves."""
    places = np.random.default_rng(seed).uniform(0, side, (frames, 2, channels))
    grid = np.arange(side)[:, None]
    across, down = (np.exp(-((grid - places[:, axis, None]) ** 2) / 8) for axis in (0, 1))
    return (255 * across[:, :, None] * down[:, None]).astype(np.uint8)


def write_classes(root: Path, channels: int = 5) -> Path:
    for part in ("train", "val", "test"):
        for number in range(4):
            path = root / part / ("up", "down")[number % 2] / f"{number}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, heat_maps(channels=channels, seed=number))
    return root


def test_frames_are_those_asked_for_and_scaled(tmp_path):
    whole = heat_maps()
    path = tmp_path / "a.npy"
    np.save(path, whole)
    assert is_clip(path)
    assert probe(path) == Probe(9, 20, 20, channels=5)
    assert np.array_equal(read_frames(path, [1, 1, 8]), whole[[1, 1, 8]])
    assert np.array_equal(read_frames(path, [3], 20), whole[[3]])
    half = read_frames(path, range(9), 10)
    means = whole.reshape(9, 10, 2, 10, 2, 5).mean(axis=(2, 4))
    assert half.dtype == np.uint8 and np.abs(half - means).max() <= 0.5
    with pytest.raises(DataError, match="has 9 frames; frame 9 was asked for"):
        read_frames(path, [0, 9])
    larger = read_frames(path, [2], 30)
    assert larger.shape == (1, 30, 30, 5) and abs(larger.mean() - whole[2].mean()) < 1
    np.save(path, whole[:, :10])
    assert read_frames(path, [0], 5).shape == (1, 5, 10, 5)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((3, 4, 5, 2), np.float32),
            r"of uint8, from 0 to 255; it is \[3, 4, 5, 2\] of",
        ),
        (np.zeros((24, 20, 3), np.uint8), r"it is \[24, 20, 3\] of uint8"),
        (np.zeros((9, 3, 20, 24), np.uint8), r"it is \[9, 3, 20, 24\]: channels come last"),
        (np.zeros((0, 4, 5, 2), np.uint8), "cannot be read as an array|holds no frames"),
        (np.array([object()]), "cannot be read as an array"),
    ],
)
def test_what_holds_no_frames_is_named(tmp_path, array, message):
    path = tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(DataError, match=message):
        probe(path)


def whole_file(path: Path) -> bytes:
    np.save(path, heat_maps())
    return path.read_bytes()


def archive(path: Path) -> bytes:
    with path.open("wb") as file:
        np.savez(file, frames=heat_maps())
    return path.read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda path: whole_file(path)[:0],
        lambda path: whole_file(path)[:40],
        lambda path: whole_file(path)[:300],
        lambda path: whole_file(path).replace(b"(9, 20,", b"(9, 20 "),
        lambda path: whole_file(path).replace(b"(9, 20, 20, 5)", b"(9e9, 2, 2, 5)"),
        archive,
        lambda path: archive(path)[:100],
    ],
    ids=["empty", "cut in its header", "cut", "header", "shape", "npz", "npz cut"],
)
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content(path))
    found = inspect_files([path], None)[path]
    assert found.problem is not None and "a.npy cannot be read as an array" in found.problem


def test_scaling_takes_nothing_of_a_budget(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, heat_maps(frames=50, side=60))
    with BudgetLedger(1000) as ledger:
        read_frames(path, range(50), 48)
    assert ledger.peak_bytes == 0


def test_an_array_beside_a_video_of_its_name_is_no_clip(tmp_path):
    for name in ("a.npy", "a.mp4", "b.npy", "c.npy"):
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    assert [is_clip(tmp_path / name) for name in ("a.npy", "a.mp4", "b.npy", "c.npy")] == [
        False, True, True, False,
    ]  # fmt: skip


def test_the_fingerprint_sees_other_values(tmp_path):
    root = write_classes(tmp_path)
    before = VideoClips(str(root), **SIZES).fingerprint()
    assert VideoClips(str(root), **SIZES).fingerprint() == before
    np.save(root / "val/up/0.npy", heat_maps(seed=99))
    assert VideoClips(str(root), **SIZES).fingerprint() != before


def test_a_data_set_of_arrays_needs_no_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    data = VideoClips(str(write_classes(tmp_path)), **SIZES, frame_cache="1MB", flip=0.5)
    first, again = (data.item("train", 0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.inputs["clip"].shape == (5, 4, 12, 12)
    assert torch.equal(first.inputs["clip"], again.inputs["clip"])
    assert data.cache.get(0, [0]) is not None, "the second was read from the cache"
    example = data.example("train", 2)
    assert example.inputs["clip"].shape == (2, 5, 4, 12, 12)
    named = data.model_arguments()
    sizes = {"num_classes": 2, "num_channels": named["num_channels"]}
    for difference in (0.0, 1.0):
        model = R3D(**sizes, width=4, frame_difference=difference)
        assert model(**example.inputs).shape == (2, 2)
    frames = FrameSequence(num_frames=4, num_channels=named["num_channels"], width=4)
    assert frames(**example.inputs).shape == (2, 5)


def test_all_clips_have_as_many_channels(tmp_path):
    root = write_classes(tmp_path)
    np.save(root / "val/up/0.npy", heat_maps(channels=2))
    with pytest.raises(DataError, match=r"same number of channels; train/.* has 5, val/up/0"):
        VideoClips(str(root), **SIZES)


def test_sharpness_is_of_the_mean_over_channels(tmp_path):
    root = write_classes(tmp_path)
    flat = np.full((9, 20, 20, 5), 7, np.uint8)
    flat[:4] = heat_maps()[:4]
    np.save(root / "train/up/0.npy", flat)
    data = VideoClips(str(root), **SIZES, min_sharpness=1.0)
    assert "5 of 108 frames are less sharp" in data.describe()


def test_they_are_trained_on_by_workers_stopped_resumed_and_predicted(expt, home):
    root = write_classes(home / "maps")
    line = (
        "experiment=video", f"data.path={root}", "data.subsets=null", "data.flip=0",
        "data.brightness=0", "data.contrast=0", "data.frames=4", "data.pixels=12", "model.width=4",
        "tracking=none", "trainer.progress=false", "debug=smoke", "hydra.run.dir=run",
        "loader.num_workers=2",
    )  # fmt: skip
    code, out, err = expt(*line, "trainer.max_steps=1", small=False)
    assert code == 0, err
    assert "maps: 2 classes, 4 / 4 / 4 videos" in out
    code, _, err = expt(*line, "trainer.resume=true", small=False)
    assert code == 0, err
    result = load_result(home / "run")
    assert result.steps > 1 and abs(result.memory["prediction_error"]) < 0.2
    code, out, err = expt("task=predict", "predict.run=run", "hydra.run.dir=predicted", small=False)
    assert code == 0, err
