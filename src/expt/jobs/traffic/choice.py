"""Which series of a file is read, where it holds several, and the line that says so.

`Columns` is a table's description, `data.columns`.

Letters: `S` time steps, `N` sensors, `C` channels.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.series import to_sensor_ids

SPEED_KEYS = ("speed", "values", "data")


@dataclass(frozen=True)
class Columns:
    """What the columns of a table are, as `data.columns` says: each by its name in the file."""

    time: tuple[str, ...] = ()
    """The column of times, or those of dates and of the time of day, or hours, minutes, seconds."""
    sensor: str | None = None
    """The column that says whose reading a row is; None: the table is wide, a column per sensor."""
    value: tuple[str, ...] = ()
    """The readings of a long table; of a wide one its sensors, none named for all other columns."""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Columns:
        """Check the mapping of a configuration, ``{"time": "timestamp", "value": ["773869"]}``.

        Raises `DataError` when it has other keys, lacks one, or names what can be no column.
        """
        keys = {key: _column_names(key, value) for key, value in given.items() if value is not None}
        if unknown := [key for key in keys if key not in ("time", "sensor", "value")]:
            raise DataError(
                f"data.columns has no key {unknown[0]!r}; expected time, sensor and value"
            )
        time, sensor, value = (keys.get(key, ()) for key in ("time", "sensor", "value"))
        if len(sensor) > 1 or (sensor and len(value) > 1):
            raise DataError(
                "data.columns: a long table has one column of sensors and one of readings, got "
                f"sensor={[*sensor]} and value={[*value]}"
            )
        if sensor and not (value and time):
            raise DataError(
                f"data.columns lacks {'value' if time else 'time'}: a long table has a column "
                "each for time, sensor and value"
            )
        named = [*time, *sensor, *value]
        if repeated := [name for name in named if named.count(name) > 1]:
            raise DataError(f"data.columns names {repeated[0]!r} twice; a column is one thing")
        return cls(time, sensor[0] if sensor else None, value)

    def setting(self) -> str:
        """Return the argument of a command line that gives this description, quoted for a shell."""
        parts = {"time": self.time, "sensor": () if self.sensor is None else (self.sensor,)}
        parts["value"] = self.value
        texts = []
        for key, names in parts.items():
            listed = ",".join(_quoted(name) for name in names)
            texts += [f"{key}:{listed if len(names) == 1 else f'[{listed}]'}"] * bool(names)
        return shlex.quote(f"data.columns={{{','.join(texts)}}}")


def _column_names(key: str, value: Any) -> tuple[str, ...]:
    names = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if not all(isinstance(name, str | int) and not isinstance(name, bool) for name in names):
        raise DataError(
            f"data.columns.{key}={value!r}: expected a column's name or a list of names; in quotes "
            'if it is a number with a point or a word like null, "12.5"'
        )
    return tuple(str(name) for name in names)


def _quoted(name: str) -> str:
    """Return a name as Hydra reads it for text or a whole number."""
    if re.fullmatch(r"[A-Za-z_]\w*|[1-9]\d*", name, re.ASCII) and name.lower() not in _WORDS:
        return name
    return '"' + name.replace('"', '\\"') + '"'


_WORDS = ("null", "true", "false", "nan", "inf")
"""Hydra's, which are no text."""


@dataclass(frozen=True)
class Choice:
    """Which series of a file to read, and when it begins if the file does not say."""

    key: str | None = None
    """Name of an array or frame; None prefers one called speed."""
    channel: int | str | None = None
    """Number of a channel of an array [S, N, C], None is 0; or the name of a table's column."""
    start: str | None = None
    """Time of the first step, ISO 8601, of a file without times."""
    step_minutes: float | None = None
    """Minutes from one step to the next, of a file without times."""
    columns: Columns | None = None
    """What the columns of a table are; None: it is guessed."""

    def __post_init__(self) -> None:
        """Refuse a description that says too much or too little beside the other settings."""
        if self.columns is None:
            return
        if self.channel is not None:
            raise DataError(
                f"data.channel={self.channel} and data.columns are not given together: "
                "data.columns.value names the readings"
            )
        if bool(self.columns.time) == (self.start is not None):
            raise DataError(
                "data.columns lacks time, the name of the column of times"
                if self.start is None
                else "data.columns.time and data.start are not given together: one says the times"
            )

    def refuse_columns(self) -> None:
        """Refuse a description of columns where there are none."""
        if self.columns is not None:
            raise DataError(
                "data.columns says what the columns of a table are, in csv, parquet or a frame in "
                "HDF5, and here are arrays: leave it out, data.columns=null; data.key and "
                "data.channel choose one"
            )


class Arrays(dict[str, npt.NDArray[Any]]):
    """The named arrays; `notes` are lines about what was read of several, and what was left."""

    notes: tuple[str, ...] = ()
    is_long: bool = False
    """Whether the sensors come in the order of a long table's rows, which means nothing."""

    def noted(self, *notes: str) -> Arrays:
        """Add lines."""
        self.notes += notes
        return self


def speed_rank(name: str) -> int | None:
    """Return how surely an array of this name holds speeds, 0 most; None: it does not say so."""
    last = name.rpartition("/")[2]
    word = last.lower()
    if word in SPEED_KEYS:
        return 2 * SPEED_KEYS.index(word)
    if not re.search("speed|velocity", word) or _NO_SPEED.search(word):
        return None
    rest = re.sub("speed|velocity|average|avg|mean|km/?h|kmph|kph|mph|m/s|[^a-z]", "", word)
    return 3 if rest else 1


_NO_SPEED = re.compile("limit|free|max|min|std|dev|var|count|number|samples")
"""With these words it is no reading of speed, or not a mean."""


def choice_note(read: str, left: Collection[str]) -> tuple[str, ...]:
    """Return a line about which of several was read, none if there was one."""
    return (f"read {read}, left {', '.join(left)}; data.key names another",) if left else ()


def column_note(name: str, count: int) -> str:
    """Return the line about the only column of `count` that was read."""
    return f"read column {name} alone, of {count}; data.channel names another"


def one_channel(arrays: Arrays, name: str, choice: Choice) -> Arrays:
    """Reduce the speeds to the channel, or to the one column, that is to be read.

    Raises `DataError` when there is no such channel.
    """
    speed, channel = arrays["speed"], choice.channel
    if speed.ndim == 3 and speed.shape[2]:
        count = speed.shape[2]
        some = speed[:: max(1, len(speed) // 500)].reshape(-1, count)
        typical = ", ".join(f"{index}: {typical_reading(some[:, index])}" for index in range(count))
        if channel is not None and channel not in range(count):
            raise DataError(
                f"data.channel={channel}: {name} has the channels 0 to {count - 1}, of which a "
                f"typical reading is {typical}"
            )
        arrays["speed"] = speed[:, :, int(channel or 0)]
        if count > 1:
            arrays.noted(
                f"read channel {channel or 0} of {name}, of {count}; a typical reading of each is "
                f"{typical}; data.channel chooses another"
            )
    elif channel is not None:
        ids = [*to_sensor_ids(arrays.get("sensor_ids", np.arange(0)))]
        if speed.ndim != 2 or str(channel) not in ids or speed.shape[1] != len(ids):
            raise DataError(
                f"data.channel={channel}: {name} of shape {speed.shape} has no such channel or "
                "column; leave data.channel out"
            )
        place = ids.index(str(channel))
        arrays["speed"] = speed[:, place : place + 1]
        arrays["sensor_ids"] = np.array(ids[place : place + 1])
        for other in ("adjacency", "locations"):
            arrays.pop(other, None)
        arrays.noted(column_note(str(channel), len(ids)))
    return arrays


def typical_reading(values: npt.NDArray[Any]) -> str:
    """Return the median of what is neither missing nor 0, in three digits."""
    if values.dtype.kind not in "biuf":
        return f"of type {values.dtype}"
    observed = values[np.isfinite(values) & (values != 0)]
    return f"{np.median(observed.astype(np.float64)):.3g}" if observed.size else "missing"
