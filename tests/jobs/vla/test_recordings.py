"""Real recordings, a person's and a robot's, written into LeRobot folders and read from there."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from robots import CAMERA, Shown, write_lerobot

from expt.jobs.vla.data import Demonstrations
from expt.jobs.vla.footage import squeezed

FILES = Path(__file__).parents[4] / "shared" / "data" / "vla"
pytestmark = pytest.mark.skipif(not FILES.is_dir(), reason="the files are not here")
SIZES: dict[str, Any] = {"chunk": 8, "batch_size": 8, "eval_batch_size": 8, "pixels": 48}


def push_t(count: int) -> list[Shown]:
    """Return the first of 206 human demonstrations."""
    with np.load(FILES / "pusht_human.npz") as stored:
        ends = stored["episode_ends"][:count]
        parts = np.split(np.arange(ends[-1]), ends[:-1])
        return [
            Shown(stored["state"][part], stored["action"][part], "push the T onto its place")
            for part in parts
        ]


def g1(count: int) -> list[Shown]:
    """Return the first of 60 episodes of a Unitree G1, at the 6 Hz of its pictures."""
    from PIL import Image

    with np.load(FILES / "g1_bottle_small.npz") as stored:
        stride, lengths = int(stored["frame_stride"]), stored["episode_lengths"]
        state, action = (stored[name].astype(np.float32) for name in ("state", "action"))
        jpeg, offsets = stored["jpeg"].tobytes(), stored["offsets"]
    found, first, frame = [], 0, 0
    for length in lengths[:count]:
        at = np.arange(first, first + length, stride)
        pictures = [
            np.asarray(Image.open(io.BytesIO(jpeg[offsets[n] : offsets[n + 1]])).convert("RGB"))
            for n in range(frame, frame + len(at))
        ]
        found.append(
            Shown(state[at], action[at], "grasp the bottle", np.stack(pictures), fps=30 / stride)
        )
        first, frame = first + length, frame + len(at)
    return found


def test_a_persons_demonstrations(tmp_path):
    folder = write_lerobot(tmp_path / "pusht", "v2.1", push_t(20), pictures=None)
    data = Demonstrations(str(folder), **SIZES)
    assert [len(data.parts[split]) for split in ("train", "val", "test")] == [16, 2, 2]
    assert sum(data.size(split) for split in data.parts) == sum(len(s.state) for s in push_t(20))
    item = data.item("train", 5, torch.Generator())
    episode = data.recordings.episodes[data.parts["train"][0]]
    undone = data.in_own_units(item.target.numpy())
    np.testing.assert_allclose(undone, episode.action[5:13], atol=1e-3)  # pixels


@pytest.mark.parametrize(("version", "pictures"), [("v2.1", "image"), ("v3.0", "video")])
def test_a_robots_recording(tmp_path, version, pictures):
    pytest.importorskip("av")
    shown = g1(6)
    folder = write_lerobot(tmp_path / "g1", version, shown, pictures, fps=6)
    data = Demonstrations(str(folder), **SIZES, cache=str(tmp_path / "cache"))
    assert data.model_arguments()["action_size"] == 26
    number = data.parts["val"][0]
    last = data.size("val") - 1
    seen = data.item("val", last, torch.Generator()).inputs["images"]
    assert seen.shape == (1, 3, 48, 48)
    read = [data.recordings.frames.read(number, step, [CAMERA])[0] for step in (0, last)]
    assert np.array_equal(read[1], seen[0].numpy())
    own = squeezed(shown[number].pictures[[0, last]], 48).astype(float)
    off = [[float(np.abs(picture - other).mean()) for other in own] for picture in read]
    most = 0 if pictures == "image" else 8  # what H.264 leaves of a JPEG this small
    assert off[0][0] <= most and off[1][1] <= most, off
    assert off[0][1] > 2 * off[0][0] and off[1][0] > 2 * off[1][1], off
