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

from expt.errors import DataError, first_line, nearest
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
        numbers = values["task_index"]
        sentence = tasks.get(int(numbers[0]), one.tasks[0] if one.tasks else "")
        several += len(np.unique(numbers)) > 1
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
    part = _in_order(path, one, table.take(rows))
    found: dict[str, Array] = {}
    for key in (STATE, ACTION):
        says = f"meta/info.json says {info.size(key)}: all episodes must be of the same robot"
        found[key] = _numbers(path, one, part, key, info.size(key), says).astype(np.float32)
        if not np.isfinite(found[key]).all():
            raise DataError(f"{path}: {key} of episode {one.number} has values that are no numbers")
    if "timestamp" in part.column_names:
        _check_times(info, path, one, _one_each(path, one, part, "timestamp"))
    found["task_index"] = (
        _one_each(path, one, part, "task_index")
        if "task_index" in part.column_names
        else np.full(one.length, -1)
    )
    return found


def _in_order(path: Path, one: Listed, part: Any) -> Any:
    """Return an episode's rows in the order of its steps, which must all be there."""
    if "frame_index" not in part.column_names:
        return part
    frames = _one_each(path, one, part, "frame_index")
    order = np.argsort(frames, kind="stable")
    wrong = np.flatnonzero(frames[order] != np.arange(one.length))
    if len(wrong):
        raise DataError(
            f"{path}: frame_index of episode {one.number} must go from 0 to {one.length - 1}; "
            f"in the place of {wrong[0]} there is {frames[order][wrong[0]]:g}"
        )
    return part.take(order)


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


def _one_each(path: Path, one: Listed, part: Any, key: str) -> Array:
    """Return a column with one number a step [T]."""
    return _numbers(path, one, part, key, 1, "must have 1")[:, 0]


def _numbers(path: Path, one: Listed, part: Any, key: str, size: int, says: str) -> Array:
    """Return a column of an episode [T, size]; `says` why it has this size."""
    import pyarrow as pa

    column, of = part.column(key), f"{path}: {key} of episode {one.number}"
    if column.null_count:
        step = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{of} has nothing (null) at step {step}; every step must have its values")
    kind = column.type
    while pa.types.is_nested(kind) and hasattr(kind, "value_type"):
        kind = kind.value_type
    if not any(
        is_(kind) for is_ in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    ):
        raise DataError(f"{of} must hold numbers; there is {column.type}")
    try:
        values = _rows(column)
    except ValueError as error:  # lists of lists of different lengths
        raise DataError(f"{of} cannot be read: {first_line(error)}") from error
    others = {len(value) for value in values} - {size}
    if others:
        raise DataError(f"{of} has {min(others)} values, and {says}")
    return np.stack(values)


def _rows(column: Any) -> Sequence[Array]:
    """Return the values of each step, whatever lists they are in."""
    import pyarrow as pa
    from pyarrow import compute

    values = column.combine_chunks()
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(values.type) for kind in kinds):
        return list(values.to_numpy(zero_copy_only=False)[:, None])
    flat = values.flatten()
    if len(values) and len(flat) % len(values) == 0 and pa.types.is_primitive(flat.type):
        size = len(flat) // len(values)
        if compute.all(compute.equal(compute.list_value_length(values), size)).as_py():
            return list(flat.to_numpy(zero_copy_only=False).reshape(len(values), size))
    return [np.ravel(value) for value in values.to_pylist()]


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
