"""The shipped clips, and that the command which is said to have made them makes them."""

from __future__ import annotations

import json
import os
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import expt
from expt.jobs.video import render

FILES = Path(expt.__file__).parent / "jobs/video/files"
MANIPULATION, TAMPERED = FILES / "manipulation", FILES / "tampered"
COUNTS = {"train": 180, "val": 36, "test": 72}


def needs(package: str) -> None:
    if os.environ.get("EXPT_REQUIRE_EXTRAS") != "1" and find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def decoded(path: Path) -> np.ndarray:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


@cache
def thumbnails(path: Path) -> np.ndarray:
    """Return every fourth pixel of a clip, once it is 16 frames of 96 x 96 pixels."""
    frames = decoded(path)
    assert frames.shape == (16, 96, 96, 3), path
    return frames[:, 2::4, 2::4].astype(np.float32)


@cache
def clips(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Return split -> class -> names."""
    return {
        split.name: {
            label.name: sorted(p.stem for p in label.iterdir()) for label in split.iterdir()
        }
        for split in folder.iterdir()
        if split.is_dir()
    }


def rollout_of(name: str) -> str:
    thing, motion, seed, _, _ = name.split("_")
    return f"{thing}_{motion}_{seed}"


@pytest.mark.parametrize(
    ("folder", "labels"),
    [
        (MANIPULATION, {f"{t}_{m}" for t in render.TRAVEL for m in render.MOTIONS}),
        (TAMPERED, {"original", "tampered"}),
    ],
)
def test_every_split_has_as_many_clips_of_each_class_and_no_rollout_is_in_two(folder, labels):
    found = clips(folder)
    rollouts = {}
    for split, count in COUNTS.items():
        assert {k: len(v) for k, v in found[split].items()} == dict.fromkeys(
            labels, count // len(labels)
        )
        rollouts[split] = {rollout_of(n) for names in found[split].values() for n in names}
    assert set(found) == set(COUNTS)
    assert len(set().union(*rollouts.values())) == sum(map(len, rollouts.values())) == 144


def test_the_label_is_the_direction_and_each_expert_gives_half_of_a_class():
    for labels in clips(MANIPULATION).values():
        for label, names in labels.items():
            for name in names:
                thing, motion, _, way, _ = name.split("_")
                moved = motion if way == "forwards" else {"open": "close", "close": "open"}[motion]
                assert label == f"{thing}_{moved}"
            ways = Counter(name.split("_")[3] for name in names)
            assert ways["forwards"] == ways["backwards"]


def test_one_camera_is_in_a_third_of_the_test_clips_and_nowhere_else():
    cameras = {
        split: Counter(n.split("_")[4] for names in labels.values() for n in names)
        for split, labels in clips(MANIPULATION).items()
    }
    assert cameras["test"]["high"] == 24
    assert set(cameras["train"]) == set(cameras["val"]) == {"left", "front", "right"}
    assert min(cameras["train"].values()) > 40


@pytest.mark.parametrize("folder", [MANIPULATION, TAMPERED])
def test_every_clip_decodes_to_16_frames_of_96_pixels(folder):
    needs("av")
    paths = sorted(folder.rglob("*.mp4"))
    assert len(paths) == 288
    for path in paths:
        if path.parent.name != "original":  # which are files of the other set, see below
            assert thumbnails(path).std() > 20, path
    assert 1_000_000 < sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) < 3_000_000


def test_one_frame_tells_the_object_but_not_which_way_it_moves():
    needs("av")

    def frames_of(split: str, skip: str) -> tuple[np.ndarray, np.ndarray]:
        of_clip = [
            (thumbnails(MANIPULATION / split / label / f"{name}.mp4").reshape(16, -1), label)
            for label, names in clips(MANIPULATION)[split].items()
            for name in names
            if not name.endswith(skip)
        ]
        return np.concatenate([x for x, _ in of_clip]), np.repeat([y for _, y in of_clip], 16)

    known, labels = frames_of("train", skip="nothing")
    asked, truth = frames_of("test", skip="high")
    distance = (known**2).sum(1) - 2 * asked @ known.T
    nearest = labels[distance.argmin(1)]
    thing = [a.split("_")[0] == b.split("_")[0] for a, b in zip(nearest, truth, strict=True)]
    assert np.mean(thing) > 0.95
    assert 0.4 < np.mean(nearest == truth) < 0.6, "a coin for each object"


def test_keypoints_have_a_row_per_frame_and_move_as_the_label_says():
    with np.load(MANIPULATION / "keypoints.npz") as keypoints:
        points = dict(keypoints)
    names = {
        f"{split}/{label}/{name}"
        for split, labels in clips(MANIPULATION).items()
        for label, names in labels.items()
        for name in names
    }
    assert points.keys() == names
    for name, found in points.items():
        assert found.shape == (16, 5, 3), name
        assert found.dtype == np.float32
        handle = found[:, render.KEYPOINTS.index("handle")]
        label = name.split("/")[1]
        # A drawer comes towards the robot when opened, a window goes to the right of it, and a
        # door's handle does the first and goes to the left.
        x, y, _ = handle.T
        along = {"drawer": -y, "window": x, "door": -x - y}[label.split("_")[0]]
        shift = along[-1] - along[0]
        assert abs(shift) > 0.03, name
        assert (shift > 0) == label.endswith("open"), name
        assert np.ptp(found[:, render.KEYPOINTS.index("object")], axis=0).max() < 1e-6


def test_a_tampered_clip_differs_in_its_box_and_span_and_nowhere_else():
    needs("av")
    spans = json.loads((TAMPERED / "spans.json").read_text())["clips"]
    labels = {name: label for s in clips(MANIPULATION).values() for label, ns in s.items()
              for name in ns}  # fmt: skip
    assert set(spans) == {
        f"{s}/tampered/{n}" for s in COUNTS for n in clips(TAMPERED)[s]["tampered"]
    }
    for key in sorted(spans)[::6]:
        split, _, name = key.split("/")
        span = spans[key]
        assert span["donor"] in {n for ns in clips(MANIPULATION)[split].values() for n in ns}
        assert rollout_of(span["donor"]) != rollout_of(name)
        before = decoded(MANIPULATION / split / labels[name] / f"{name}.mp4").astype(int)
        after = decoded(TAMPERED / split / "tampered" / f"{name}.mp4").astype(int)
        difference = np.abs(after - before).mean(-1)
        top, left, height, width = span["box"]
        inside = np.zeros(difference.shape, bool)
        inside[span["first"] : span["last"] + 1, top : top + height, left : left + width] = True
        assert difference[inside].mean() > 15, key
        # What compression moves; and a frame next to the span, in the box, is not changed.
        assert difference[~inside].mean() < 2.5, key


def test_originals_are_the_same_files_as_in_the_other_set():
    where = {name: (split, label) for split, labels in clips(MANIPULATION).items()
             for label, names in labels.items() for name in names}  # fmt: skip
    for split, labels in clips(TAMPERED).items():
        for name in labels["original"]:
            same = MANIPULATION / "/".join(where[name]) / f"{name}.mp4"
            assert (TAMPERED / split / "original" / f"{name}.mp4").read_bytes() == same.read_bytes()


def test_the_command_makes_the_shipped_clip_again(tmp_path):
    needs("av")
    needs("metaworld")
    clip = next(iter(render.clips_of("val")))
    name = f"{clip.split}/{clip.label}/{clip.name}"
    with np.load(MANIPULATION / "keypoints.npz") as keypoints:
        assert np.allclose(clip.keypoints, keypoints[name], atol=1e-3)
    render.encode(tmp_path / "again.mp4", clip.frames)
    shipped = decoded(MANIPULATION / f"{name}.mp4").astype(int)
    # Another OpenGL driver or encoder may differ by a little; another scene differs by 30.
    assert np.abs(decoded(tmp_path / "again.mp4") - shipped).mean() < 4


def test_the_same_frames_are_encoded_to_the_same_bytes(tmp_path):
    needs("av")
    base = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).repeat(8, 0).repeat(8, 1)
    frames = np.stack([np.roll(base, step, 1) for step in range(16)]).astype(np.uint8)
    written = set()
    for number in range(20):
        path = tmp_path / f"{number}.mp4"
        # Other memory to reuse each time: the encoder has read some that it had not written.
        np.random.default_rng(number).bytes(300_000 + number * 977)
        render.encode(path, frames)
        written.add(path.read_bytes())
    assert len(written) == 1


def test_tampering_keeps_what_is_outside_of_the_box_and_the_span():
    rng = np.random.default_rng(0)
    frames = np.full((16, 96, 96, 3), 100, np.uint8)
    donor = np.full((16, 96, 96, 3), 200, np.uint8)
    changed, span = render.tamper(frames, donor, rng)
    top, left, height, width = span["box"]
    steps = slice(span["first"], span["last"] + 1)
    box = changed[steps, top : top + height, left : left + width]
    outside = changed.copy()
    outside[steps, top : top + height, left : left + width] = 100
    assert (outside == 100).all()
    assert 6 <= len(box) <= 10
    assert box[:, height // 2, width // 2].min() > 150, "the middle is the donor's"
    assert box[:, 0, 0].max() <= 101, "and the edge is not seen"
    assert (frames == 100).all(), "the original is left as it was"
