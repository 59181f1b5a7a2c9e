"""The named arrays that every data file is read into, and the NumPy archive that holds just them.

::

    speed [S, N] or [S, N, C] (also called `values` or `data`)
    timestamps [S], and optionally sensor_ids [N], adjacency [N, N], locations [N, 2]

Letters: `S` time steps, `N` sensors, `C` channels.
"""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.npyio import NpzFile

from expt.errors import DataError
from expt.jobs.traffic.choice import (
    SPEED_KEYS,
    Arrays,
    Choice,
    choice_note,
    one_channel,
    speed_rank,
)
from expt.jobs.traffic.clock import to_clock, to_seconds
from expt.jobs.traffic.source import translated

_TIMES = re.compile("times?|time_?stamps?|date_?times?|dates?|index")
"""Names that arrays of times may have been given; with them data.start is not asked for."""
OPTIONAL_KEYS = ("sensor_ids", "adjacency", "locations")


def wanted_keys(available: Collection[str], choice: Choice | None = None) -> dict[str, str]:
    """Return where each array is, ``{"speed": "values", …}``, among the names a file has.

    Raises `DataError` when there are no speeds, or no timestamps.
    """
    choice = choice or Choice()
    found = ", ".join(sorted(available)[:12]) or "nothing"
    ranks = {name: rank for name in available if (rank := speed_rank(name)) is not None}
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    if choice.key is None and len(best) > 1:
        raise DataError(
            f"has several arrays of speeds, {', '.join(best)}; name the one to read, "
            f"data.key={best[0]}"
        )
    speed = choice.key or next(iter(best), None)
    if speed is None:
        raise DataError(
            f"has no speeds; found {found}; expected one of {', '.join(SPEED_KEYS)}, or the name "
            "of another as data.key=NAME"
        )
    if speed not in available:
        raise DataError(f"data.key={speed}: there is no such array; found {found}")
    keys = {"speed": speed, "timestamps": "timestamps"}
    if "timestamps" not in available:
        if choice.start is None:
            if alike := [name for name in available if _TIMES.fullmatch(name.lower())]:
                raise DataError(
                    f"has no timestamps, but {alike[0]}; if these are its times, save them as "
                    f"`timestamps`, one per time step; found {found}"
                )
            raise DataError(
                f"has no timestamps; found {found}; expected `timestamps`, one datetime64 per time "
                "step, or their beginning and distance, like data.start=2018-01-01T00:00 "
                "data.step_minutes=5"
            )
        del keys["timestamps"]
    return keys | {name: name for name in OPTIONAL_KEYS if name in available}


def made_times(choice: Choice, count: int) -> npt.NDArray[np.datetime64]:
    """Return `count` times from `data.start` on, every `data.step_minutes`."""
    if choice.start is None or choice.step_minutes is None:
        raise DataError("data.start and data.step_minutes are given together, or neither")
    start = to_seconds(np.array([choice.start]))[0]
    step = np.timedelta64(round(choice.step_minutes * 60), "s")
    times: npt.NDArray[np.datetime64] = start + np.arange(count) * step
    return times


@contextmanager
def opened_npz(path: Path) -> Iterator[NpzFile]:
    """Open a NumPy archive; nothing pickled is loaded from it."""
    damaged = (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
    )
    with translated(path, "a NumPy archive (.npz)", *damaged), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise DataError("holds a single array; expected an archive, np.savez(path, name=…)")
        with archive:
            yield archive


def read_npz(path: Path, choice: Choice | None = None) -> Arrays:
    """Read the named arrays of a NumPy archive."""
    choice = choice or Choice()
    choice.refuse_columns()
    with opened_npz(path) as archive:
        keys = wanted_keys(archive.files, choice)
        arrays = Arrays({name: array_of(archive, key) for name, key in keys.items()})
        steps = arrays["speed"].shape[:1]
        left = [
            name
            for name in archive.files
            if name not in keys.values() and _header(archive, name)[0][:1] == steps
        ]
    arrays.noted(*choice_note(keys["speed"], left))
    if arrays["speed"].ndim == 1 and {"timestamps", "sensor_ids"} <= arrays.keys():
        arrays = _from_long(arrays, keys["speed"])
    return one_channel(arrays, keys["speed"], choice)


def _from_long(arrays: Arrays, name: str) -> Arrays:
    from expt.jobs.traffic.long_table import to_wide
    from expt.jobs.traffic.table import to_ids

    speed, sensors = arrays["speed"], arrays["sensor_ids"]
    if not speed.shape == sensors.shape == arrays["timestamps"].shape:
        return arrays
    times, notes = to_clock(arrays["timestamps"])
    wide = to_wide(times, to_ids(sensors), speed.astype(np.float64), "sensor_ids")
    note = f"long table: read {name} by sensor_ids, a column for each"
    return wide.noted(*arrays.notes, *notes, note)


def array_of(archive: NpzFile, key: str) -> npt.NDArray[Any]:
    """Return an array of an archive.

    Raises `DataError` when it is of Python objects, which NumPy pickles.
    """
    if _header(archive, key)[1].hasobject:
        raise DataError(
            f"{key} holds Python objects, which are pickled and not read; save it as text, "
            f"{key}.astype(str), or as numbers, {key}.astype(float)"
        )
    return np.asarray(archive[key])


def _header(archive: NpzFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Return an array's shape and type without reading the array; () of what is no array."""
    assert archive.zip is not None
    try:
        with archive.zip.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            read = np.lib.format.read_array_header_1_0
            if version > (1, 0):
                read = np.lib.format.read_array_header_2_0
            shape, _, dtype = read(member)
            return shape, dtype
    except (KeyError, ValueError):
        return (), np.dtype(np.void)
