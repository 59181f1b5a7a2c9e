"""Gestures of real people: a recording of joints, drawn as clips, and the joints as keypoints.

UAV-GESTURE (Perera et al., ECCV workshops 2018): 13 gestures of 11 people; the authors' first
split tests on people 13, 14 and 15. The recording is not part of the project.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from clip_learning import spread, trained
from common import markdown

TEST = (13, 14, 15)
VALIDATION = (1,)
LIMBS = (
    (1, 2), (2, 3), (3, 4), (1, 5), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12),
    (12, 13), (1, 0),
)  # fmt: skip
"""Of OpenPose's 18 joints."""
RIGHT, LEFT, BODY = 0, 1, 2
COLOURS = (RIGHT,) * 3 + (LEFT,) * 3 + (BODY,) * 7
"""Of the limbs: the arms, which gestures are made with, in a colour each."""
SIDE, EVERY = 56, 4
"""Pixels of a drawn frame; of the recording's frames, every fourth is drawn."""
SEEDS = (0, 1, 2)


def runs(recording: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    return {f"seed {seed}": partial(_trained, recording, seed) for seed in SEEDS}


def _trained(recording: Path, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        write(recording, Path(folder))
        return trained(
            (
                "experiment=video", "+memory=lite", f"data.path={folder}", "data.frames=24",
                "data.stride=2", "data.pixels=48", "data.clips_per_video=3", "data.load_kpt=true",
                "data.index_cache=null", "model.width=12", "trainer.epochs=40",
                "memory.gradient_accumulation=1", f"trainer.seed={seed}",
            )
        )  # fmt: skip


def write(recording: Path, root: Path) -> None:
    """Draw every sequence as a video, with its joints beside it."""
    import av

    with np.load(recording) as kept:
        points, lengths = kept["points"].astype(np.float32), kept["lengths"]
        labels, people, classes = kept["label"], kept["subject"], kept["classes"]
    joints: dict[str, np.ndarray] = {}
    start = 0
    for number, length in enumerate(lengths):
        sequence = points[start : start + length : EVERY]
        start += length
        person = int(people[number])
        part = "test" if person in TEST else "val" if person in VALIDATION else "train"
        label = f"{int(labels[number]):02d}-{str(classes[labels[number]]).replace(' ', '_')}"
        key = f"{part}/{label}/s{person:02d}_{number:03d}"
        scaled = upright(sequence)
        joints[key] = np.where(scaled > 0, scaled, np.nan)
        path = root / f"{key}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("h264", rate=25)
            stream.height = stream.width = SIDE
            stream.pix_fmt = "yuv420p"
            for frame in scaled:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(drawn(frame))))
            container.mux(stream.encode())
    np.savez_compressed(root / "keypoints.npz", **joints)


def upright(sequence: np.ndarray) -> np.ndarray:
    """Return joints [n,18,2] from 0 to 1 of a square around the person; 0 = not found."""
    found = (sequence > 0).all(axis=-1, keepdims=True)
    kept = np.where(found, sequence, np.nan)
    middle = np.nanmedian(kept.reshape(-1, 2), axis=0)
    height = np.nanpercentile(kept[..., 1], 98) - np.nanpercentile(kept[..., 1], 2)
    placed = (sequence - middle) / max(height, 1.0) / 1.6 + 0.5
    return np.where(found, placed.clip(0.01, 0.99), 0.0).astype(np.float32)


def drawn(joints: np.ndarray) -> np.ndarray:
    """Draw the limbs of one frame, the arms and the rest in a colour each."""
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    for colour, (one, other) in zip(COLOURS, LIMBS, strict=True):
        if joints[one].any() and joints[other].any():
            steps = np.linspace(0, 1, 24)[:, None]
            line = ((1 - steps) * joints[one] + steps * joints[other]) * (SIDE - 2)
            x, y = line.round().astype(int).T
            for shift in (0, 1):
                picture[y + shift, x, colour] = 255
                picture[y, x + shift, colour] = 255
    return picture


def table(rows: Mapping[str, Any]) -> str:
    values = [row["metrics"]["test/accuracy"] for row in rows.values()]
    clips = [row["metrics"]["test/clip_accuracy"] for row in rows.values()]
    text = (
        "UAV-GESTURE's joints, drawn as clips and given as keypoints: 13 gestures, tested on three "
        "people who are in no other part (development; the recording is not shipped).\n\n"
    )
    return text + markdown(("videos", "clips"), [(spread(values), spread(clips))])
