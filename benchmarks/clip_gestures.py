"""Gestures of real people: a recording of joints, as heat maps and as keypoints.

UAV-GESTURE (Perera et al., ECCV workshops 2018): 13 gestures of 11 people; the authors' first
split tests on people 13, 14 and 15. The recording is not part of the project. A joint is a
channel with a spot where it is (Duan et al., "Revisiting Skeleton-based Action Recognition",
CVPR 2022).
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from clip_learning import SEEDS, of_seeds, spread, trained
from common import markdown

TEST = (13, 14, 15)
VALIDATION = 8
"""Of the other people's videos, one in so many is for validation."""
JOINTS = 8
"""Nose, neck, and both arms, which gestures are made with; the first of OpenPose's 18."""
SIDE, SPOT, EVERY = 28, 0.03, 4
"""Pixels of a heat map's side and a spot's deviation in sides; every fourth frame is kept."""


JOBS: dict[str, tuple[str, ...]] = {
    "32 frames": (
        "data.frames=32", "data.clips_per_video=5", "model.stem_kernel=[3,3,3]",
        "model.stem_stride=[2,2,2]", "model.frame_difference=5",
    ),
    # The same network on single frames, whose scores are averaged over eight of a video.
    "single frame": (
        "data.frames=1", "data.clips_per_video=8", "model.stem_kernel=[1,3,3]",
        "model.stem_stride=[1,2,2]", "model.frame_difference=0",
    ),
}  # fmt: skip


def runs(recording: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    return {
        f"{name} seed {seed}": partial(_trained, recording, (*lines, f"trainer.seed={seed}"))
        for seed in SEEDS
        for name, lines in JOBS.items()
    }


def _trained(recording: Path, lines: tuple[str, ...]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write(recording, Path(folder))
        return trained(
            (
                "experiment=video", "+memory=full", f"data.path={folder}", "data.stride=1",
                "data.pixels=24", f"data.resize={SIDE}", "data.brightness=0", "data.contrast=0",
                "data.index_cache=null", "data.subsets=null", "data.load_kpt=true",
                "model.width=12", "model.keypoint_width=64", "model.stem_pool=false",
                "model.dropout=0.3", "trainer.epochs=80",
                "trainer.ema_decay=0.98", "trainer.monitor=loss", *lines,
            )
        )  # fmt: skip


def write(recording: Path, root: Path) -> None:
    """Write every sequence as heat maps, an array each, and its joints as keypoints."""
    joints: dict[str, np.ndarray] = {}
    with np.load(recording) as kept:
        points, lengths = kept["points"].astype(np.float32), kept["lengths"]
        labels, people, classes = kept["label"], kept["subject"], kept["classes"]
    start = 0
    for number, length in enumerate(lengths):
        sequence = points[start : start + length : EVERY]
        start += length
        person = int(people[number])
        part = "test" if person in TEST else "train" if number % VALIDATION else "val"
        label = f"{int(labels[number]):02d}-{str(classes[labels[number]]).replace(' ', '_')}"
        key = f"{part}/{label}/s{person:02d}_{number:03d}"
        joints[key] = upright(sequence)[:, :JOINTS]
        path = root / f"{key}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, heat_maps(joints[key]))
    np.savez_compressed(root / "keypoints.npz", **joints)


def upright(sequence: np.ndarray) -> np.ndarray:
    """Return joints [n,18,2] from 0 to 1 of a square around the person; NaN = not found."""
    found = (sequence > 0).all(axis=-1, keepdims=True)
    kept = np.where(found, sequence, np.nan)
    middle = np.nanmedian(kept.reshape(-1, 2), axis=0)
    height = np.nanpercentile(kept[..., 1], 98) - np.nanpercentile(kept[..., 1], 2)
    placed: np.ndarray = (kept - middle) / max(height, 1.0) / 1.6 + 0.5
    return placed


def heat_maps(joints: np.ndarray) -> np.ndarray:
    """Return a channel for each joint [n,J,2] with a spot of 255, uint8 [n,H,W,J]."""
    places = (np.arange(SIDE) + 0.5) / SIDE
    across, down = (
        np.exp(-((places - joints[..., axis, None]) ** 2) / (2 * SPOT**2)) for axis in (0, 1)
    )
    spots = np.nan_to_num(down[..., :, None] * across[..., None, :])
    return (255 * spots).round().astype(np.uint8).transpose(0, 2, 3, 1)


def table(rows: Mapping[str, Any]) -> str:
    body = []
    for name in JOBS:
        if found := of_seeds(rows, name):
            figures = ("test/accuracy", "test/clip_accuracy")
            minutes = statistics.mean(row["seconds"] for row in found) / 60
            values = (spread([row["metrics"][figure] for row in found]) for figure in figures)
            body.append((name, *values, f"{minutes:.1f} min"))
    text = (
        "UAV-GESTURE's joints as heat maps and as keypoints: 13 gestures, chance 0.08, tested on "
        "three people who are in no other part (development; the recording is not shipped).\n\n"
    )
    return text + markdown(("run", "videos, seeds 0 1 2", "clips", "time"), body)
