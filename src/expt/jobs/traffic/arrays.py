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
from expt.jobs.traffic.clock import Times, local_clock, parsed
from expt.jobs.traffic.source import translated

OPTIONAL_KEYS = ("sensor_ids", "adjacency", "locations")


def wanted_keys(available: Collection[str], choice: Choice | None = None) -> dict[str, str]:
    """Return where each array is, ``{"speed": "values", …}``, among the names a file has.

    Raises `DataError` when there are no speeds, or no timestamps.
    """
    choice = choice or Choice()
    found = ", ".join(sorted(available)[:12]) or "nothing"
    ranks = {name: rank for name in available if (rank := speed_rank(name)) is not None}
    speed = choice.key or min(ranks, key=ranks.__getitem__, default=None)
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
        arrays = _from_long(arrays, keys["speed"], choice)
    return one_channel(arrays, keys["speed"], choice)


def _from_long(arrays: Arrays, name: str, choice: Choice) -> Arrays:
    from expt.jobs.traffic.long_table import to_wide

    speed, sensors = arrays["speed"], arrays["sensor_ids"]
    if not speed.shape == sensors.shape == arrays["timestamps"].shape:
        return arrays
    times, notes = to_clock(arrays["timestamps"])
    wide = to_wide(["sensor_ids", name], [sensors, speed], times, 0, choice)
    return wide.noted(*arrays.notes, *notes)


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


def to_seconds(raw: npt.NDArray[Any]) -> npt.NDArray[np.datetime64]:
    """Return times as ``datetime64[s]``, from times, ISO 8601 text, or whole numbers since 1970.

    Of text with a distance to UTC, what the clock showed there.

    The unit of whole numbers is the one that puts the first between 1980 and 2100; the units are
    a thousandfold apart, so at most one does.
    """
    if raw.dtype.kind == "M":
        return raw.astype("datetime64[s]")
    if raw.dtype.kind in _TEXT:
        return _clock_of_text(raw)[0]
    if raw.dtype.kind == "f" and not (raw[~np.isnan(raw)] % 1).any():
        raw = np.where(np.isnan(raw), _NO_TIME, raw).astype(np.int64)
    if raw.dtype.kind in "iu":
        known = raw[raw != _NO_TIME]
        first = int(known[0]) if known.size else _YEAR_1980
        for unit, per_second in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
            if _YEAR_1980 <= first // per_second < _YEAR_2100:
                return raw.astype(np.int64).astype(f"datetime64[{unit}]").astype("datetime64[s]")
        raise DataError(
            f"timestamps are whole numbers, the first {first}, which is no time between 1980 and "
            "2100 in s, ms, us or ns since 1970; expected datetime64"
        )
    raise DataError(f"timestamps are of type {raw.dtype}; expected datetime64 or ISO 8601 text")


def to_clock(raw: npt.NDArray[Any]) -> tuple[Times, tuple[str, ...]]:
    """Return `to_seconds` of times, and a note about their zone where text names one."""
    return _clock_of_text(raw) if raw.dtype.kind in _TEXT else (to_seconds(raw), ())


def counts_since_1970(name: str, raw: npt.NDArray[Any]) -> bool:
    """Whether a column of numbers is of times, as its name and `to_seconds` say."""
    word = name.lower()
    if not (re.search("time|date|stamp|epoch|unix", word) or word.strip() in ("", "t", "ts")):
        return False
    try:
        times = to_seconds(raw)
    except DataError:
        return False
    seconds = times[~np.isnat(times)].astype(np.int64)
    return bool(((seconds >= _YEAR_1980) & (seconds < _YEAR_2100)).all())


def _clock_of_text(raw: npt.NDArray[Any]) -> tuple[Times, tuple[str, ...]]:
    import pandas as pd

    listed = raw.reshape(-1).tolist()
    texts = pd.Series([t.decode() if isinstance(t, bytes) else str(t) for t in listed], dtype=str)
    times = parsed(texts, "timestamps")
    bad = np.flatnonzero(times.isna())
    if bad.size:
        raise DataError(
            "timestamps are not ISO 8601 text such as 2012-03-01T00:05:00: number "
            f"{bad[0]} (counted from 0) is {texts[bad[0]]!r}"
        )
    clock, notes = local_clock(pd.DatetimeIndex(times))
    return clock.reshape(raw.shape), notes


_TEXT = "SUO"
"""Kinds of arrays of text."""
_NO_TIME = np.iinfo(np.int64).min
"""A missing time as a whole number."""
_YEAR_1980 = int(np.datetime64("1980-01-01", "s").astype(np.int64))
_YEAR_2100 = int(np.datetime64("2100-01-01", "s").astype(np.int64))
