"""LeRobot folders, versions 2.0 to 3.0, read without the package of that name.

    meta/info.json                                  version, fps, features
    meta/tasks.jsonl, meta/tasks.parquet            sentences by number (2.x, 3.0)
    meta/episodes.jsonl, meta/episodes/*/*.parquet  the episodes (2.x, 3.0)
    data/…                                          states and actions: a file an episode in 2.x,
                                                    many episodes in a file in 3.0
    videos/…                                        frames: likewise

Where files lie is said by ``data_path`` and ``video_path`` of info.json. Statistics are not read:
what normalises is taken from the training part alone. Format: github.com/huggingface/lerobot,
``src/lerobot/datasets`` (``CODEBASE_VERSION``), Apache-2.0.

Letters: `T` steps of an episode, `S` values of a state, `A` of an action.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expt.errors import DataError, nearest
from expt.jobs.vla.columns import in_order, numbers, one_each
from expt.jobs.vla.episodes import Array, Episode, Recordings
from expt.jobs.vla.footage import Footage, Source
from expt.jobs.vla.lerobot_meta import (
    TIME,
    WHOLE,
    Info,
    Listed,
    entry,
    read_episodes,
    read_info,
    read_table,
    read_tasks,
)

STATE, ACTION = "observation.state", "action"
STEP_TOLERANCE = 0.02
"""By which the time between an episode's steps may differ from 1 / fps."""


def read_lerobot(folder: Path, pixels: int, cache: Path) -> Recordings:
    """Read a folder; pictures are read when they are wanted.

    Args:
        folder: with ``meta/info.json``.
        pixels: of a side that pictures are brought to.
        cache: folder for decoded frames.

    Raises:
        DataError: it is no such folder, of another version, lacks a file, or contradicts itself.

    """
    info = read_info(folder)
    for key in (STATE, ACTION):
        if key not in info.features:
            raise DataError(
                f"{folder}/meta/info.json has no feature {key!r}; {nearest(key, info.features)}"
            )
    tasks = read_tasks(info)
    listed = read_episodes(info)
    if not listed:
        raise DataError(f"{folder}/meta lists no episodes")
    columns = _columns(info, listed)
    episodes, several = [], 0
    for one in listed:
        values = columns[one.number]
        told = values["task_index"]
        sentence = tasks.get(int(told[0]), one.tasks[0] if one.tasks else "")
        several += len(np.unique(told)) > 1
        name = f"episode {one.number}"
        episodes.append(Episode(name, sentence, sentence, values[STATE], values[ACTION]))
    notes = (
        [f"{several} episodes change their sentence on the way; the first one is used"]
        if several
        else []
    )
    return Recordings(
        episodes,
        info.names(STATE),
        info.names(ACTION),
        info.fps,
        _footage(info, listed, pixels, cache),
        notes,
        origin=info.version,
    )


def _place_of_data(info: Info, one: Listed) -> Path:
    where = dict(one.where)
    if info.major == 3:
        where = {
            name: entry(where, f"data/{name}", WHOLE, one.place)
            for name in ("chunk_index", "file_index")
        }
    return info.file("data_path", where)


def _columns(info: Info, listed: Sequence[Listed]) -> dict[int, dict[str, Array]]:
    """Return states, actions and numbers of sentences of every episode."""
    wanted: dict[Path, list[Listed]] = {}
    for one in listed:
        wanted.setdefault(_place_of_data(info, one), []).append(one)
    found = {}
    for path, members in wanted.items():
        table = read_table(path, info)
        lacking = {STATE, ACTION, "episode_index"} - set(table.column_names)
        if lacking:
            raise DataError(f"{path} has no column {', '.join(sorted(lacking))}")
        of_row = table.column("episode_index").to_numpy()
        for one in members:
            found[one.number] = _values(
                info, path, one, table, np.flatnonzero(of_row == one.number)
            )
    return found


def _values(info: Info, path: Path, one: Listed, table: Any, rows: Array) -> dict[str, Array]:
    """Return one episode's values out of its file, checked against what ``meta`` says."""
    if len(rows) != one.length or len(rows) == 0:
        raise DataError(
            f"{path} has {len(rows)} steps of episode {one.number}, and meta lists {one.length}"
        )
    part = in_order(path, one.number, table.take(rows))
    found: dict[str, Array] = {}
    for key in (STATE, ACTION):
        says = f"meta/info.json says {info.size(key)}: all episodes must be of the same robot"
        found[key] = numbers(path, one.number, part, key, info.size(key), says).astype(np.float32)
        if not np.isfinite(found[key]).all():
            raise DataError(f"{path}: {key} of episode {one.number} has values that are no numbers")
    if "timestamp" in part.column_names:
        _check_times(info, path, one, one_each(path, one.number, part, "timestamp"))
    found["task_index"] = (
        one_each(path, one.number, part, "task_index")
        if "task_index" in part.column_names
        else np.full(one.length, -1)
    )
    return found


def _check_times(info: Info, path: Path, one: Listed, times: Array) -> None:
    """Refuse an episode of another rate, or one that lacks time between two steps."""
    if len(times) < 2:
        return
    apart = np.diff(times.astype(np.float64))
    # Times are kept as float32, whose own steps grow along an episode.
    allowed = STEP_TOLERANCE / info.fps + 2 * float(np.spacing(np.float32(np.abs(times).max())))
    says = f"meta/info.json says fps={info.fps:g}, {1 / info.fps:.4g} s"
    usual = float(np.median(apart))
    if not abs(usual - 1 / info.fps) <= allowed:
        raise DataError(
            f"{path}: the steps of episode {one.number} are {usual:.4g} s apart, and {says}: all "
            "episodes must have the same rate"
        )
    gaps = np.flatnonzero(~(np.abs(apart - 1 / info.fps) <= allowed))
    if len(gaps):
        first = int(gaps[0])
        raise DataError(
            f"{path}: steps {first} and {first + 1} of episode {one.number} are "
            f"{apart[first]:.4g} s apart, and {says}; an episode must have no gaps: make it two"
        )


def _footage(info: Info, listed: Sequence[Listed], pixels: int, cache: Path) -> Footage | None:
    """Return where the pictures are; None where there are none."""
    videos, images = info.cameras("video"), info.cameras("image")
    if not videos and not images:
        return None
    sources = []
    for one in listed:
        found = {camera: _video(info, one, camera) for camera in videos}
        place = _place_of_data(info, one)
        found |= {camera: Source(place, 0, one.length, one.number) for camera in images}
        sources.append(found)
    return Footage(sources, videos, pixels, cache, info.fps)


def _video(info: Info, one: Listed, camera: str) -> Source:
    """Return the frames of an episode in a video, which in 3.0 holds many episodes."""
    if info.major == 2:
        path = info.file("video_path", {**one.where, "video_key": camera})
        return Source(path, 0, one.length, one.number)
    prefix = f"videos/{camera}/"
    where = {
        name: entry(one.where, prefix + name, WHOLE, one.place)
        for name in ("chunk_index", "file_index")
    }
    first = round(entry(one.where, f"{prefix}from_timestamp", TIME, one.place) * info.fps)
    path = info.file("video_path", {**where, "video_key": camera})
    return Source(path, first, one.length, one.number)
