"""Demonstrations as episodes, whoever recorded them; every source is read into `Recordings`.

A source is a packed file of states and actions (`read_packed`), a folder that
`expt.jobs.vla.demonstrate` made, or a LeRobot folder (`expt.jobs.vla.lerobot`).

Letters: `T` steps of an episode, `S` values of a state, `A` of an action, `V` cameras, `P` pixels
of a side.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from expt.errors import DataError, first_line, nearest
from expt.files import replace_atomically

Array = npt.NDArray[Any]

STATE_UNIT, ACTION_UNIT = 1e-4, 1e-3
"""Of the integers in a packed file: a tenth of a millimetre, a thousandth of an action."""
OPEN_ARRAYS = 64
"""Memory-mapped files of frames that a process keeps open."""


@dataclass(frozen=True)
class Episode:
    """One demonstration.

    Attributes:
        name: for messages; unique within its recordings.
        task: what it is an example of; parts are divided task by task.
        sentence: what the robot was told.
        state: [T, S] float32, each before the action of its step.
        action: [T, A] float32.
        seed: of a simulator, which decided where things stood; None where there is none.

    """

    name: str
    task: str
    sentence: str
    state: Array
    action: Array
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.action)


class Frames(Protocol):
    """The pictures of recordings, read one step at a time."""

    @property
    def cameras(self) -> Sequence[str]:
        """The cameras that there are pictures of."""

    def read(self, episode: int, step: int, cameras: Sequence[str]) -> Array:
        """Return uint8 [V, 3, P, P], a picture of each camera."""


@dataclass(frozen=True)
class Recordings:
    """Episodes of one robot, and where their pictures are.

    Attributes:
        state_names, action_names: of the values, S and A of them.
        frames: None where there are no pictures.
        frames_per_second: steps in a second.
        notes: what a user should know, a line each.
        origin: goes into the fingerprint: what the pictures depend on.
        pixels: of a side of stored pictures that cannot be scaled any more; None: as asked for.

    """

    episodes: Sequence[Episode]
    state_names: Sequence[str]
    action_names: Sequence[str]
    frames_per_second: float
    frames: Frames | None = None
    notes: Sequence[str] = ()
    origin: str = ""
    pixels: int | None = None

    @property
    def cameras(self) -> Sequence[str]:
        """The cameras that there are pictures of."""
        return () if self.frames is None else self.frames.cameras

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order in which they first appear."""
        return list(dict.fromkeys(episode.task for episode in self.episodes))

    @property
    def sentences(self) -> list[str]:
        """The different sentences, in the order in which they first appear."""
        return list(dict.fromkeys(episode.sentence for episode in self.episodes))

    def digest(self) -> str:
        """Return a hash of all values, names and sentences."""
        found = hashlib.sha256(f"{self.origin} {[*self.state_names, *self.action_names]}".encode())
        for episode in self.episodes:
            found.update(f"{episode.name} {episode.task} {episode.sentence}".encode())
            found.update(np.ascontiguousarray(episode.state).tobytes())
            found.update(np.ascontiguousarray(episode.action).tobytes())
        return found.hexdigest()


def of_tasks(recordings: Recordings, tasks: Sequence[str] | None) -> list[int]:
    """Return the numbers of the episodes of some tasks; None: of all.

    Raises:
        DataError: there is no such task.

    """
    known = recordings.tasks
    for task in tasks or ():
        if task not in known:
            raise DataError(f"data.tasks: no demonstration is of {task!r}; {nearest(task, known)}")
    return [
        n for n, episode in enumerate(recordings.episodes) if not tasks or episode.task in tasks
    ]


def chosen_cameras(recordings: Recordings, cameras: Sequence[str] | None, shown: str) -> list[str]:
    """Return the cameras that are wanted, by their whole names; None: all that there are.

    ``top`` is enough for ``observation.images.top``.

    Raises:
        DataError: there are no pictures of one.

    """
    if cameras is None:
        return list(recordings.cameras)
    found = []
    for camera in cameras:
        whole = [name for name in recordings.cameras if camera in (name, name.rpartition(".")[2])]
        if not whole:
            have = (
                f"; {nearest(camera, recordings.cameras)}"
                if recordings.cameras
                else ": they have states alone. data.cameras=[] trains without pictures"
            )
            raise DataError(
                f"data.cameras: {camera!r} has no images in the demonstrations of {shown}{have}"
            )
        found.append(whole[0])
    return found


def arranged(recordings: Recordings, trained: Mapping[str, Any], shown: str) -> Recordings:
    """Return recordings whose values stand in the order that a model was trained with.

    Args:
        recordings: to predict; where either has numbers for names there is nothing to compare.
        trained: ``state_names`` and ``action_names`` of the training's recordings, if known.
        shown: where the recordings are, for messages.

    Raises:
        DataError: their values have other names.

    """
    places: dict[str, list[int]] = {}
    for kind, names in (("state", recordings.state_names), ("action", recordings.action_names)):
        own, wanted = list(map(str, names)), list(trained.get(f"{kind}_names", names))
        numbers = [str(number) for number in range(len(own))]
        if len(own) != len(wanted) or numbers in (own, wanted):
            continue
        if sorted(own) != sorted(wanted):
            lacking = next(name for name in wanted if wanted.count(name) > own.count(name))
            raise DataError(
                f"{shown}: its {kind}s have no value {lacking!r}, with which the model was "
                f"trained; {nearest(lacking, own)}"
            )
        if own != wanted and len(set(own)) == len(own):
            places[kind] = [own.index(name) for name in wanted]
    if not places:
        return recordings
    return replace(
        recordings,
        episodes=[
            replace(one, **{kind: getattr(one, kind)[:, order] for kind, order in places.items()})
            for one in recordings.episodes
        ],
        state_names=trained["state_names"] if "state" in places else recordings.state_names,
        action_names=trained["action_names"] if "action" in places else recordings.action_names,
    )


class StoredFrames:
    """Pictures in one memory-mapped array [T, 3, P, P] per episode and camera; see `Frames`.

    Args:
        cameras: their names.
        place: returns the file of an episode's number and a camera.
        make: returns what a file that is absent should hold; several processes may make the
            same at once, since it is put in its place whole. None: a file must be there.

    """

    def __init__(
        self,
        cameras: Sequence[str],
        place: Callable[[int, str], Path],
        make: Callable[[int, str], Array] | None = None,
    ) -> None:
        self.cameras = tuple(cameras)
        self._place, self._make = place, make
        self._open: OrderedDict[tuple[int, str], Array] = OrderedDict()

    def read(self, episode: int, step: int, cameras: Sequence[str]) -> Array:
        """Return uint8 [V, 3, P, P], a picture of each camera.

        Raises:
            DataError: a file is absent or damaged, or cannot be made.

        """
        return np.stack([self._array(episode, camera)[step] for camera in cameras])

    def _array(self, episode: int, camera: str) -> Array:
        key = (episode, camera)
        if key not in self._open:
            path = self._place(episode, camera)
            if self._make is not None and not path.exists():
                keep(path, self._make(episode, camera))
            try:
                self._open[key] = np.load(path, mmap_mode="r")
            except (OSError, ValueError) as error:
                raise DataError(f"{path} cannot be read: {first_line(error)}") from error
            if len(self._open) > OPEN_ARRAYS:
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def __getstate__(self) -> dict[str, Any]:
        # A mapped array would be copied into the pickle whole.
        return {**vars(self), "_open": OrderedDict()}


def keep(path: Path, array: Array) -> None:
    """Put an array in its place whole, whoever else does so at the same time.

    Raises:
        StorageError: the disk refused.

    """
    replace_atomically(path, lambda temporary: save(temporary, array), durable=False)


def save(path: Path, array: Array) -> None:
    """Write an array under exactly this name."""
    with path.open("wb") as file:
        np.save(file, array)


def write_packed(path: Path, recordings: Recordings) -> None:
    """Write states and actions compactly, rounded to `STATE_UNIT` and `ACTION_UNIT`.

    Differences from one step to the next, a value after the other, take half the bytes.
    """
    state, action = (
        np.rint(np.concatenate(values).astype(np.float64) / unit)
        for values, unit in (
            ([episode.state for episode in recordings.episodes], STATE_UNIT),
            ([episode.action for episode in recordings.episodes], ACTION_UNIT),
        )
    )
    arrays = {
        "state_differences": _as_int16(np.diff(state, axis=0, prepend=0.0).T),
        "action": _as_int16(action.T),
        "length": np.array([len(episode) for episode in recordings.episodes]),
        "seed": np.array([-1 if e.seed is None else e.seed for e in recordings.episodes]),
        "name": np.array([episode.name for episode in recordings.episodes]),
        "task": np.array([episode.task for episode in recordings.episodes]),
        "sentence": np.array([episode.sentence for episode in recordings.episodes]),
        "state_names": np.array(recordings.state_names),
        "action_names": np.array(recordings.action_names),
        "frames_per_second": np.array([recordings.frames_per_second]),
    }

    def write(temporary: Path) -> None:
        # np.savez_compressed would write today's date, and so never the same bytes again.
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, array in arrays.items():
                content = io.BytesIO()
                np.save(content, np.ascontiguousarray(array))
                entry = zipfile.ZipInfo(f"{name}.npy")
                archive.writestr(entry, content.getvalue(), zipfile.ZIP_DEFLATED, 9)

    replace_atomically(path, write)


def read_packed(path: Path) -> Recordings:
    """Read what `write_packed` wrote.

    Raises:
        DataError: it is no such file.

    """
    try:
        with np.load(path) as stored:
            arrays = {name: stored[name] for name in stored.files}
        state = np.cumsum(arrays["state_differences"].astype(np.int64), axis=1).T * STATE_UNIT
        action = arrays["action"].T * ACTION_UNIT
        ends = np.cumsum(arrays["length"])[:-1]
        seeds = [None if seed < 0 else int(seed) for seed in arrays["seed"]]
        episodes = [
            Episode(str(name), str(task), str(sentence), s, a, seed)
            for name, task, sentence, s, a, seed in zip(
                arrays["name"],
                arrays["task"],
                arrays["sentence"],
                np.split(state.astype(np.float32), ends),
                np.split(action.astype(np.float32), ends),
                seeds,
                strict=True,
            )
        ]
        return Recordings(
            episodes,
            [str(name) for name in arrays["state_names"]],
            [str(name) for name in arrays["action_names"]],
            float(arrays["frames_per_second"][0]),
        )
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} holds no demonstrations: {first_line(error)}; "
            "python -m expt.jobs.vla.demonstrate makes such files"
        ) from error


def _as_int16(values: Array) -> Array:
    limits = np.iinfo(np.int16)
    if values.min() < limits.min or values.max() > limits.max:
        raise DataError(
            f"values up to {np.abs(values).max():g} do not fit a packed file; keep them in a folder"
        )
    return values.astype(np.int16)
