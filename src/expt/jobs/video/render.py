"""Write the two shipped sets of clips: ``python -m expt.jobs.video.render FOLDER``.

``manipulation`` has six classes, which are three pairs of opposite motions (drawer, window and
door, each opened and closed); ``tampered`` has the same clips, and in half of them a region of
some frames comes from another rollout. ``files/README.md`` says what is in the folders, and why
one frame does not tell the class. The same command writes the same bytes again on one machine.
FOLDER should be empty: what lies in it stays.

Needs the extras `sim` and `video`. About four minutes on one core.

Letters: `T` frames, `J` keypoints, `H` and `W` height and width.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.jobs.metaworld import Camera, Rollout, positions, render, roll_out

Array = npt.NDArray[Any]

FRAMES, SIDE, RATE = 16, 96, 16
"""Of a clip: frames, pixels of a side, frames per second when played."""
MOTIONS = ("open", "close")
TRAVEL = {"drawer": 0.2, "window": 0.2, "door": np.pi / 2}
"""From closed, which is 0, to open: metres, metres and radians of the object's joint."""
KEYPOINTS = ("hand", "left_finger", "right_finger", "handle", "object")
BODIES = {"left_finger": "leftpad", "right_finger": "rightpad"}
"""Bodies of the model; `hand` and `handle` are in the observation, `object` is named like it."""

SIDES = {"left": (-50.0, -38.0), "front": (-90.0, -42.0), "right": (-130.0, -38.0)}
"""Cameras of all splits: azimuth and elevation in degrees, each varied by some."""
UNSEEN = {"high": (-90.0, -62.0)}
"""The camera of the last third of the test rollouts, and of no other."""
TARGETS = {
    "drawer": ((0.0, 0.70, 0.10), 1.2),
    "window": ((0.04, 0.70, 0.15), 1.1),
    "door": ((0.0, 0.70, 0.15), 1.5),
}
"""What a camera looks at, and from how far, in metres."""

SPEEDS = {"drawer": (0.2, 0.3), "window": (0.2, 0.25), "door": (0.25, 0.4)}
"""Of the hand, against the expert's own: so slow that a clip has a step for each frame."""
SHARE = (0.2, 0.3)
"""Of the travel, in a clip: so short that its first frame says little about the direction."""
TRIES, STEADY = 50, 0.08
"""Spans tried, and the least share of a clip's motion in each fifth of it (even: 0.2)."""
VISIBLE = 20.0
"""Grey levels by which a tampered region differs from what it replaces, on average at least."""

SPLITS = {"train": 15, "val": 3, "test": 6}
"""Rollouts of each expert; each gives one clip forwards and one backwards."""
UNSEEN_IN_TEST = 2
FIRST_SEED = {"train": 1000, "val": 2000, "test": 3000}


@dataclass(frozen=True)
class Clip:
    """One clip before it is encoded: uint8 [T, H, W, 3] and float32 [T, J, 3] in metres."""

    split: str
    label: str
    name: str
    rollout: str
    camera: str
    frames: Array
    keypoints: Array


def clips_of(split: str) -> Iterator[Clip]:
    """Yield the clips of a split: every rollout forwards from one camera, backwards from another.

    Played backwards, what the opening expert did is a closing: the label is the direction in
    which the object moves. So each class has as many frames of either expert, and at every
    stage of the motion, as its opposite.
    """
    for thing in TRAVEL:
        for motion in MOTIONS:
            for number, rollout in enumerate(_rollouts(split, thing, motion)):
                seen = split != "test" or number < SPLITS[split] - UNSEEN_IN_TEST
                rng = np.random.default_rng([rollout.seed, *map(ord, rollout.task)])
                cameras = rng.permutation(list(SIDES))[:2] if seen else [*UNSEEN] * 2
                for way, camera in zip(("forwards", "backwards"), map(str, cameras), strict=True):
                    reached = motion if way == "forwards" else _opposite(motion)
                    at = _span(rollout, thing, rng)[:: 1 if way == "forwards" else -1]
                    yield Clip(
                        split,
                        f"{thing}_{reached}",
                        f"{thing}_{motion}_{rollout.seed}_{way}_{camera}",
                        f"{thing}_{motion}_{rollout.seed}",
                        camera,
                        render(rollout, _placed(thing, camera, rng), (SIDE, SIDE), at),
                        _keypoints(rollout, thing, at),
                    )


def _rollouts(split: str, thing: str, motion: str) -> Iterator[Rollout]:
    """Yield as many rollouts as the split has, of the next seeds with which the expert succeeds."""
    found, seed = 0, FIRST_SEED[split]
    while found < SPLITS[split]:
        rng = np.random.default_rng(seed)
        rollout = roll_out(
            f"{thing}-{motion}-v3",
            seed,
            noise=rng.uniform(0.0, 0.3),
            speed=rng.uniform(*SPEEDS[thing]),
            steps=500,
            steps_after_success=30,
        )
        seed += 1
        if rollout.success and abs(np.ptp(rollout.joints[:, -1])) > 0.7 * TRAVEL[thing]:
            found += 1
            yield rollout


def _opposite(motion: str) -> str:
    return MOTIONS[1 - MOTIONS.index(motion)]


def _span(rollout: Rollout, thing: str, rng: np.random.Generator) -> list[int]:
    """Return the steps of `FRAMES` frames in which the object moves by a `SHARE` of its travel.

    Of spans drawn by lot the first without a pause is taken: a door may swing on its own before
    the hand has come. Where there is none, the one that moves most steadily.
    """
    share = np.abs(rollout.joints[:, -1]) / TRAVEL[thing]
    moved = np.maximum.accumulate(np.abs(share - share[0]))
    best: list[int] = []
    steadiest = -1.0
    for _ in range(TRIES):
        length = rng.uniform(*SHARE)
        start = rng.uniform(0.03, moved[-1] - 0.03 - length)
        first, last = np.searchsorted(moved, [start, start + length])
        at = [round(step) for step in np.linspace(first, last, FRAMES)]
        slowest = float(np.diff(moved[at[::3]]).min() / length)
        if slowest > steadiest:
            best, steadiest = at, slowest
        if slowest > STEADY:
            break
    return best


def _placed(thing: str, name: str, rng: np.random.Generator) -> Camera:
    """Return the named camera, a little beside where it usually stands."""
    azimuth, elevation = (SIDES | UNSEEN)[name]
    target, distance = TARGETS[thing]
    x, y, z = np.add(target, rng.uniform(-0.03, 0.03, 3))
    return Camera(
        (x, y, z),
        distance * rng.uniform(0.92, 1.08),
        azimuth + rng.uniform(-8, 8),
        elevation + rng.uniform(-5, 5),
    )


def _keypoints(rollout: Rollout, thing: str, at: Sequence[int]) -> Array:
    """Return [T, J, 3] in the order of `KEYPOINTS`."""
    seen = rollout.observations[list(at)]
    bodies = positions(rollout, [*BODIES.values(), thing], at)
    points = np.stack([seen[:, :3], bodies[:, 0], bodies[:, 1], seen[:, 4:7], bodies[:, 2]], axis=1)
    return points.astype(np.float32)


def encode(path: Path, frames: Array, rate: int = RATE) -> None:
    """Write uint8 [T, H, W, 3] as H.264 in mp4, by one thread and so always the same bytes."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    # With x264's macroblock tree, frames this small give other bytes from one call to the next.
    options = {"crf": "24", "preset": "slow", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(path), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(rate), options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def write_manipulation(folder: Path, clips: Sequence[Clip]) -> None:
    """Write SPLIT/CLASS/NAME.mp4, and keypoints.npz with one [T, J, 3] per clip."""
    for clip in clips:
        encode(folder / clip.split / clip.label / f"{clip.name}.mp4", clip.frames)
    points = {f"{clip.split}/{clip.label}/{clip.name}": clip.keypoints for clip in clips}
    np.savez_compressed(folder / "keypoints.npz", **points)  # type: ignore[arg-type]


def write_tampered(folder: Path, clips: Sequence[Clip]) -> None:
    """Write SPLIT/{original,tampered}/NAME.mp4, and spans.json: what was changed where.

    Of the two clips of a rollout one, drawn by lot, is tampered with.
    """
    spans: dict[str, dict[str, Any]] = {}
    rng = np.random.default_rng(0)
    drawn = {name: bool(rng.integers(2)) for name in dict.fromkeys(c.rollout for c in clips)}
    for clip in clips:
        if drawn[clip.rollout] != ("forwards" in clip.name):
            encode(folder / clip.split / "original" / f"{clip.name}.mp4", clip.frames)
            continue
        donors = [
            other
            for other in clips
            if (other.split, other.camera) == (clip.split, clip.camera)
            and other.name.split("_")[0] != clip.name.split("_")[0]
        ]
        donor = donors[rng.integers(len(donors))]
        frames, span = tamper(clip.frames, donor.frames, rng)
        encode(folder / clip.split / "tampered" / f"{clip.name}.mp4", frames)
        spans[f"{clip.split}/tampered/{clip.name}"] = {**span, "donor": donor.name}
    text = json.dumps({"frames": FRAMES, "side": SIDE, "clips": spans}, indent=1)
    (folder / "spans.json").write_text(text + "\n", encoding="utf-8")


def tamper(frames: Array, donor: Array, rng: np.random.Generator) -> tuple[Array, dict[str, Any]]:
    """Return the frames with a region of `donor` blended in, and which frames and which box.

    The region lies around the middle, where the hand is, fades out over its outer quarter, and
    keeps the donor's own light, somewhat brighter or darker. Of regions drawn by lot the first
    with a mean difference of `VISIBLE` is taken, or the one that differs most: bare table in
    place of bare table would be no tampering.
    """
    best: tuple[Array, dict[str, Any]] | None = None
    most = -1.0
    for _ in range(TRIES):
        length = int(rng.integers(6, 11))
        first = int(rng.integers(1, len(frames) - length))
        height, width = (int(side) for side in rng.integers(32, 45, 2))
        top, left = (
            int(np.clip(SIDE / 2 + rng.uniform(-14, 14) - side / 2, 0, SIDE - side))
            for side in (height, width)
        )
        gain = rng.choice([-1, 1]) * rng.uniform(0.1, 0.2) + 1.0
        box = np.s_[first : first + length, top : top + height, left : left + width]
        mask = np.outer(_fade(height), _fade(width))[..., None]
        region = np.rint(mask * np.clip(donor[box] * gain, 0, 255) + (1 - mask) * frames[box])
        difference = float(np.abs(region - frames[box]).mean())
        if difference > most:
            most, changed = difference, frames.copy()
            changed[box] = region.astype(np.uint8)
            last = first + length - 1
            span = {"first": first, "last": last, "box": [top, left, height, width]}
            best = changed, span
        if difference >= VISIBLE:
            break
    assert best is not None
    return best


def _fade(side: int) -> Array:
    """Return 1 in the middle and a raised cosine down to 0 over each outer quarter."""
    inward = np.minimum(np.arange(side) + 0.5, side - np.arange(side) - 0.5) / (side / 4)
    return np.asarray(0.5 - 0.5 * np.cos(np.pi * np.clip(inward, 0, 1)))


SETS = {"manipulation": write_manipulation, "tampered": write_tampered}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the sets that the command line names, both without --only, into FOLDER."""
    parser = argparse.ArgumentParser(prog="python -m expt.jobs.video.render", description=__doc__)
    parser.add_argument("folder", type=Path, help="a folder of this name is made per set")
    parser.add_argument("--only", choices=[*SETS], help="write one set instead of both")
    given = parser.parse_args(arguments)
    clips = [clip for split in SPLITS for clip in clips_of(split)]
    for name in [given.only] if given.only else SETS:
        SETS[name](given.folder / name, clips)
        paths = [*(given.folder / name).rglob("*.mp4")]
        print(f"{name}: {len(paths)} clips, {sum(path.stat().st_size for path in paths)} bytes")


if __name__ == "__main__":
    main()
