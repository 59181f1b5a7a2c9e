"""Make demonstrations: ``python -m expt.jobs.vla.demonstrate``, then ``data=metaworld``.

MetaWorld's scripted experts solve their tasks, seen by one or two cameras or none. Noise is added
to what is applied and not to what is recorded, so that the demonstrations also show how to come
back from where the expert itself would never be (Laskey et al., "DART", CoRL 2017). An episode
that fails is left out, and the next seed takes its place. The same command writes the same values
again on one machine; a command that was ended goes on where it was.

    FOLDER/settings.json                 what the command was told
    FOLDER/TASK/SEED.npz                 state [T, 39], action [T, 4]; without them: it failed
    FOLDER/TASK/SEED.CAMERA.npy          pictures uint8 [T, 3, P, P]

With ``--packed FILE`` states and actions of all are also written into one small file, which is how
``files/metaworld_state.npz`` (``data=metaworld_state``) was made:

    python -m expt.jobs.vla.demonstrate outputs/state --cameras --packed metaworld_state.npz

Needs the extra `sim`. A demonstration takes 0.13 s of one core, and a picture 0.01 s.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from expt.errors import DataError, UserError, first_line
from expt.files import replace_atomically, write_json
from expt.jobs.metaworld import Camera, Rollout, roll_out
from expt.jobs.vla.episodes import Episode, Recordings, StoredFrames, keep, write_packed

TASKS = ("reach-v3", "push-v3", "drawer-open-v3", "button-press-v3")
SENTENCES = {
    "reach-v3": "move the hand to the goal",
    "push-v3": "push the puck to the goal",
    "drawer-open-v3": "open the drawer",
    "button-press-v3": "press the button",
}
VIEWS = {
    "front": Camera((0.0, 0.68, 0.12), 0.95, -90.0, -40.0),
    "side": Camera((0.0, 0.68, 0.12), 0.95, -20.0, -25.0),
}
"""Cameras of our own: MetaWorld's show the table small, and `corner` and `corner2` upside down."""
CAMERAS = tuple(VIEWS)
FOLDER = "outputs/demonstrations/metaworld"
SETTINGS = "settings.json"
FIRST_SEED = 1000
"""Of demonstrations; those below are for `task=rollout`, whose scenes no training has seen."""
NOISE, STEPS, AFTER = 0.1, 200, 10
"""Standard deviation of what is added to an action; the longest episode; steps after success."""
STEPS_PER_SECOND = 80.0
"""Of MetaWorld: 5 steps of 2.5 ms for each action."""
STATE_NAMES = (
    *(
        f"{thing}_{value}{when}"
        for when in ("", "_before")
        for thing, value in (
            *(("hand", axis) for axis in "xyz"),
            ("gripper", "opening"),
            *(("first", f"object_{value}") for value in ("x", "y", "z", "qx", "qy", "qz", "qw")),
            *(("second", f"object_{value}") for value in ("x", "y", "z", "qx", "qy", "qz", "qw")),
        )
    ),
    *(f"goal_{axis}" for axis in "xyz"),
)
ACTION_NAMES = ("x", "y", "z", "gripper")


@dataclass(frozen=True)
class Request:
    """What is to be demonstrated: how often (of each task), and drawn how."""

    tasks: Sequence[str] = TASKS
    episodes: int = 32
    cameras: Sequence[str] = CAMERAS
    pixels: int = 64
    noise: float = NOISE


def sentence_of(task: str) -> str:
    """Return what the robot is told; of a task without a sentence its name in words."""
    return SENTENCES.get(task, task.rpartition("-")[0].replace("-", " ") or task)


def placed(cameras: Sequence[str]) -> tuple[str | Camera, ...]:
    """Return cameras of `VIEWS`, others as MetaWorld names them."""
    return tuple(VIEWS.get(camera, camera) for camera in cameras)


def make(folder: Path, request: Request, told: bool = True) -> Recordings:
    """Make what is missing in a folder, and return all of it.

    Raises:
        ConfigError: an unknown task or camera, or something is not installed.
        DataError: the folder has demonstrations of other settings.
        StorageError: the disk is full.

    """
    _settle(folder, request)
    for task in request.tasks:
        made, seed = 0, FIRST_SEED
        while made < request.episodes:
            if _demonstrated(folder, task, seed, request):
                made += 1
            seed += 1
            if seed - FIRST_SEED >= 10 and made == 0:
                raise DataError(f"the expert of {task} did not succeed in 10 episodes")
        if told:
            print(f"{task}: {made} demonstrations, {seed - FIRST_SEED} episodes", flush=True)
    return read_folder(folder)


def read_folder(folder: Path) -> Recordings:
    """Read a folder that `make` filled.

    Raises:
        DataError: it is none, or was not filled to the end.

    """
    request = _request_of(folder)
    episodes, places = [], []
    for task in request.tasks:
        found = sorted(folder.glob(f"{task}/*.npz"), key=lambda path: int(path.stem))
        of_task = [e for path in found if (e := _read(path, task)) is not None]
        if len(of_task) < request.episodes:
            raise DataError(
                f"{folder} has {len(of_task)} of {request.episodes} demonstrations of {task}: "
                "it was not finished; `python -m expt.jobs.vla.demonstrate "
                f"{shlex.quote(str(folder))}` goes on"
            )
        episodes += of_task[: request.episodes]
    places = [folder / e.task / str(e.seed) for e in episodes]
    frames = StoredFrames(request.cameras, _Places(places)) if request.cameras else None
    return Recordings(
        episodes,
        STATE_NAMES,
        ACTION_NAMES,
        STEPS_PER_SECOND,
        frames,
        origin=f"{request.cameras} {request.pixels}",
        pixels=request.pixels,
    )


class _Places:
    """The files of frames; a class, since a worker process gets it."""

    def __init__(self, stems: Sequence[Path]) -> None:
        self._stems = stems

    def __call__(self, episode: int, camera: str) -> Path:
        return self._stems[episode].with_name(f"{self._stems[episode].name}.{camera}.npy")


def _settle(folder: Path, request: Request) -> None:
    """Write down what a folder is for, or check it against what is written."""
    if not (folder / SETTINGS).exists():
        write_json(folder / SETTINGS, asdict(request))
        return
    old = _request_of(folder)
    other = [
        f"{name}={list(was) if isinstance(was, tuple) else was}"
        for name in ("tasks", "cameras", "pixels", "noise")
        if (was := getattr(old, name)) != getattr(request, name)
    ]
    if other:
        raise DataError(
            f"{folder} has demonstrations made with {', '.join(other)}; "
            "give another folder, or remove this one"
        )
    if request.episodes > old.episodes:
        write_json(folder / SETTINGS, asdict(request))


def _request_of(folder: Path) -> Request:
    path = folder / SETTINGS
    try:
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("tasks", "cameras"):
            stored[name] = tuple(stored[name])
        return Request(**stored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} does not say what the folder holds: {first_line(error)}"
        ) from error


def _demonstrated(folder: Path, task: str, seed: int, request: Request) -> bool:
    """Make one episode unless it is there; tell whether it is a success."""
    path = folder / task / f"{seed}.npz"
    if path.exists():
        return _read(path, task) is not None
    rollout = roll_out(
        task, seed, cameras=placed(request.cameras), size=(request.pixels, request.pixels),
        noise=request.noise, steps=STEPS, steps_after_success=AFTER,
    )  # fmt: skip
    if rollout.success:
        for camera, frames in zip(request.cameras, rollout.frames, strict=True):
            pictures = np.ascontiguousarray(frames.transpose(0, 3, 1, 2))
            keep(path.with_name(f"{seed}.{camera}.npy"), pictures)
    replace_atomically(path, lambda at: _write(at, rollout), durable=False)  # last: it is whole
    return rollout.success


def _write(path: Path, rollout: Rollout) -> None:
    with path.open("wb") as file:
        if not rollout.success:
            np.savez(file)
            return
        state = rollout.observations.astype(np.float32)
        np.savez_compressed(file, state=state, action=rollout.intended)


def _read(path: Path, task: str) -> Episode | None:
    """Return an episode, None of a failed one."""
    seed = int(path.stem)
    try:
        with np.load(path) as stored:
            if not stored.files:
                return None
            name = f"{task}/{seed}"
            return Episode(name, task, sentence_of(task), stored["state"], stored["action"], seed)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}; remove it") from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Make what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m expt.jobs.vla.demonstrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(FOLDER), help=f"by default {FOLDER}"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="of MetaWorld's 50")
    parser.add_argument("--episodes", type=int, default=32, help="demonstrations of each task")
    parser.add_argument("--cameras", nargs="*", default=list(CAMERAS), help="none: states alone")
    parser.add_argument("--pixels", type=int, default=64, help="of a side of a picture")
    parser.add_argument("--noise", type=float, default=NOISE, help="added to what is applied")
    parser.add_argument("--packed", type=Path, help="also write states and actions into this file")
    given = parser.parse_args(arguments)
    request = Request(
        tuple(given.tasks), given.episodes, tuple(given.cameras), given.pixels, given.noise
    )
    try:
        made = make(given.folder, request)
        if given.packed is not None:
            write_packed(given.packed, made)
            print(f"{given.packed}: {given.packed.stat().st_size} bytes")
    except UserError as error:
        parser.exit(2, f"{error}\n")


if __name__ == "__main__":
    main()
