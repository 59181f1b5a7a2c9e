"""Clips that are arrays: read like videos, with as many channels as they have."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from expt.errors import DataError
from expt.job import Batch
from expt.jobs.clips.decode import Probe, is_clip, probe, read_frames
from expt.jobs.deepfake.sequence import FrameSequence
from expt.jobs.video.data import VideoClips
from expt.jobs.video.r3d import R3D

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
    np.save(path, whole[..., 0])
    assert read_frames(path, [0]).shape == (1, 20, 20, 1)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            np.zeros((3, 4, 5, 2), np.float32),
            r"of uint8, from 0 to 255; it is \[3, 4, 5, 2\] of",
        ),
        (np.zeros((3, 4), np.uint8), r"it is \[3, 4\] of uint8"),
        (np.zeros((0, 4, 5, 2), np.uint8), "cannot be read as an array|holds no frames"),
        (np.array([object()]), "cannot be read as an array"),
    ],
)
def test_what_holds_no_frames_is_named(tmp_path, array, message):
    path = tmp_path / "a.npy"
    np.save(path, array)
    with pytest.raises(DataError, match=message):
        probe(path)


@pytest.mark.parametrize("kept", [0, 40, 300])
def test_a_file_that_was_cut_is_named(tmp_path, kept):
    path = tmp_path / "a.npy"
    np.save(path, heat_maps())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"a.npy cannot be read as an array"):
        probe(path)


def test_a_data_set_of_arrays_needs_no_decoder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    data = VideoClips(str(write_classes(tmp_path)), **SIZES, frame_cache="1MB", flip=0.5)
    first, again = (data.item("train", 0, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.inputs["clip"].shape == (5, 4, 12, 12)
    assert torch.equal(first.inputs["clip"], again.inputs["clip"])  # from the file, the cache
    example = data.example("train", 2)
    assert example.inputs["clip"].shape == (2, 5, 4, 12, 12)
    named = data.model_arguments()
    sizes = {"num_classes": 2, "num_channels": named["num_channels"]}
    for difference in (0.0, 1.0):
        model = R3D(**sizes, width=4, frame_difference=difference)
        assert model(**example.inputs).shape == (2, 2)
    frames = FrameSequence(num_frames=4, num_channels=named["num_channels"], width=4)
    assert frames(**example.inputs).shape == (2, 5)
    assert isinstance(first, Batch)


def test_all_clips_have_as_many_channels(tmp_path):
    root = write_classes(tmp_path)
    np.save(root / "val/up/0.npy", heat_maps(channels=2))
    with pytest.raises(DataError, match=r"as many channels; \w+/\d.npy has 5, up/0.npy has 2"):
        VideoClips(str(root), **SIZES)


def test_sharpness_is_of_the_mean_over_channels(tmp_path):
    root = write_classes(tmp_path)
    flat = np.full((9, 20, 20, 5), 7, np.uint8)
    flat[:4] = heat_maps()[:4]
    np.save(root / "train/up/0.npy", flat)
    data = VideoClips(str(root), **SIZES, min_sharpness=1.0)
    assert "5 of 108 frames are less sharp" in data.describe()
