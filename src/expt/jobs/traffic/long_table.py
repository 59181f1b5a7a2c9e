"""Long tables, a row per time and sensor: recognised, and made wide, a column per sensor.

Letters: `R` rows of the long table, `S` time steps, `N` sensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.choice import Arrays, Choice, speed_rank
from expt.jobs.traffic.clock import Times, repeated_hour, repeated_hour_advice
from expt.jobs.traffic.series import to_sensor_ids
from expt.jobs.traffic.time_of_day import (
    Column,
    Completed,
    are_dates,
    is_clock_column,
    with_time_of_day,
)
from expt.units import counted

_SENSOR = re.compile(
    "(sensor|station|detector|segment|link|node|site|vds|tmc|counter)s?|"
    "(sensor|station|detector|det|device|segment|seg|link|node|site|vds|tmc|counter|camera|loop|"
    "edge|road|location|section|point|milepost)?(id|ids|code|uid|name|no|nr|number|index|key)"
)
_HARDLY = 1.05
"""Rows per time; several sensors have more, and one detector as many, but for an autumn's hour."""


@dataclass(frozen=True)
class Layout:
    """What the columns of a table are."""

    times: Times
    """Of the rows [R]."""
    sensors: int | None
    """The column that says whose reading a row is; None if the table is wide."""
    others: list[int]
    """The columns that are no part of the times, `sensors` among them."""
    notes: tuple[str, ...] = ()


def laid_out(
    names: Sequence[str], columns: Sequence[Column], times: Times, channel: int | str | None = None
) -> Layout:
    """Return where the sensors are, and the times, of which the time of day may be in a column.

    Dates are completed only where a sensor has several rows of one. What else is called like a
    time of day is no reading of a wide table, unless it is the `channel`.

    Raises `DataError` when it is not clear where the sensors are, or the time of day.
    """
    everything = [*range(len(names))]
    is_daily = are_dates(times)
    if not is_daily or _is_one_row_each(names, columns, times):
        return Layout(times, sensor_column(names, columns, times, not is_daily), everything)
    is_enough = partial(_is_one_row_each, names, columns)
    found = with_time_of_day(names, columns, times, is_enough) or Completed(times, [], False)
    if not found.is_exact and not is_enough(found.times):
        _ask_for_the_time_of_day(names, columns, found)
    others = [place for place in everything if place not in found.used]
    inner = sensor_column(
        [names[place] for place in others],
        [columns[place] for place in others],
        found.times,
        found.is_exact,
    )
    if inner is not None:
        return Layout(found.times, others[inner], others, found.notes)
    left = [
        place
        for place in others
        if is_clock_column(names[place], columns[place]) and names[place] != str(channel)
    ]
    notes = found.notes
    if left:
        notes += (f"left {', '.join(names[place] for place in left)}, of the time of day",)
    return Layout(found.times, None, [place for place in others if place not in left], notes)


def _is_one_row_each(names: Sequence[str], columns: Sequence[Column], times: Times) -> bool:
    """Whether hardly any sensor, of those that a column is called after, has two rows at a time."""
    step, steps = _numbered(times)
    if len(times) < _HARDLY * len(steps):
        return True
    for place in _called(names, columns):
        which, count = _codes(columns[place])
        pairs = (step * count + which)[which >= 0]
        if 0 < count <= len(times) / 2 and len(pairs) < _HARDLY * len(_numbered(pairs)[1]):
            return True
    return False


def _ask_for_the_time_of_day(
    names: Sequence[str], columns: Sequence[Column], found: Completed
) -> None:
    """Refuse dates that are repeated, where a column of another meaning may complete them."""
    rows, _ = _numbered(found.times)
    sensors = _called(names, columns)
    if sensors:
        which, count = _codes(columns[sensors[0]])
        rows = rows * count + which
    suspects = [
        place
        for place, column in enumerate(columns)
        if place not in (*found.used, *sensors)
        and not _is_readings(names[place])
        and (is_clock_column(names[place], column) or _could_be_sensors(column, rows))
        and _codes(column)[1] > 1
    ]
    if suspects:
        of = "dates and hours" if found.used else "dates without a time of day"
        raise DataError(
            f"{of} are repeated, and it seems to be in "
            f"{', '.join(names[place] for place in suspects)}, the first "
            f"{columns[suspects[0]][0]}: expected 00:05, or hours from 0 to 23 in a column `hour` "
            "and minutes in `minute`; or put all in one column of times such as "
            "2012-03-01 00:05:00. A column that says whose reading a row is must be called "
            "`sensor`; over lanes and the like take the mean first"
        )


def sensor_column(
    names: Sequence[str], columns: Sequence[Column], times: Times, is_exact: bool = True
) -> int | None:
    """Return which column says whose reading a row is; None if the table is wide.

    It is one that is called so beside one of readings, or, where exact times are repeated all over,
    one that tells the rows of a time apart.

    Raises `DataError` when one is called so, but the rows are not those of several sensors.
    """
    if len(names) < 2 or not len(times):
        return None
    step, steps = _numbered(times)
    is_repeated = len(times) >= 1.5 * len(steps)
    readings = {place for place, name in enumerate(names) if _is_readings(name)}
    called = {}
    for place in _called(names, columns):
        beside = readings - {place} or (len(names) == 2 and not names[1 - place].isdigit())
        count = _codes(columns[place])[1]
        if (is_repeated or beside) and count > 0:
            called[place] = count
    if called and len(times) < _HARDLY * len(steps):
        place, count = min(called.items(), key=lambda item: item[1])
        if count == 1:
            return place
        raise DataError(
            f"is like a long table (time, sensor, value): {names[place]!r} is called like a column "
            f"of sensors and has {count:,} different values, but hardly any time has two rows. If "
            "all rows are of one sensor, leave that column out; if they are of several, resample "
            "them to the same times first; if it holds readings, call it otherwise"
        )
    if len(called) > 1:
        apart = (place for place in called if _told_apart(columns[place], step))
        return next(apart, next(iter(called)))
    if called or not (is_repeated and is_exact):
        return next(iter(called), None)
    counts = {
        place: _codes(column)[1]
        for place, column in enumerate(columns)
        if place not in readings
        and not is_clock_column(names[place], column)
        and _could_be_sensors(column, step)
    }
    return min(counts, key=counts.__getitem__, default=None)


def _called(names: Sequence[str], columns: Sequence[Column]) -> list[int]:
    """Return the columns that are called after sensors, and do not number the rows."""
    return [
        place
        for place, column in enumerate(columns)
        if is_sensor_name(names[place]) and is_label(column) and _codes(column)[1] < len(column)
    ]


def _could_be_sensors(column: Column, step: npt.NDArray[Any]) -> bool:
    """Whether every row has an id, which tells the rows of a step apart."""
    if not is_label(column):
        return False
    which, count = _codes(column)
    return 1 < count <= len(column) / 2 and bool((which >= 0).all()) and _told_apart(column, step)


def _told_apart(column: Column, step: npt.NDArray[Any]) -> bool:
    """Whether no two rows of a step have the same id."""
    which, count = _codes(column)
    pairs = (step * count + which)[which >= 0]
    return len(_numbered(pairs)[1]) == len(pairs)


def is_sensor_name(name: str) -> bool:
    """Whether a column of this name says which sensor a row is of: ``sensor_id``, ``Station``."""
    word = re.sub("[^a-z]", "", name.lower())
    return _SENSOR.fullmatch(word) is not None and re.search(r"\d", name) is None


def _is_readings(name: str) -> bool:
    return speed_rank(name) is not None or name.lower() in ("value", "reading", "measurement")


def _numbered(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.intp], npt.NDArray[Any]]:
    """Return which of the different values each is, and these as they come; -1 for none."""
    import pandas as pd

    which, found = pd.factorize(values)
    return which, np.asarray(found)


def _codes(column: Column) -> tuple[npt.NDArray[np.intp], int]:
    """Return which id a row has, -1 for an empty cell, and how many there are."""
    which, found = _distinct(column)
    return which, len(found)


def _distinct(column: Column) -> tuple[npt.NDArray[np.intp], list[Any]]:
    """Return which id a row has, -1 for an empty cell, and the ids as they come."""
    if column.dtype.kind not in "OSU":
        which, found = _numbered(column)
        return which, found.tolist()
    which, found = _numbered(column.astype(object))
    empty = [place for place, cell in enumerate(found) if cell in ("", b"")]
    kept = np.delete(np.arange(len(found)), empty)
    renumbered = np.full(len(found) + 1, -1)  # the last for a cell without
    renumbered[kept] = np.arange(len(kept))
    return renumbered[which], found[kept].tolist()


def _labels(column: Column) -> tuple[npt.NDArray[np.intp], list[str]]:
    """Return which sensor a row is of, -1 for none, and these as text; 401.0 is 401."""
    which, found = _distinct(column)
    names = [re.sub(r"^(\d+)\.0+$", r"\1", name) for name in to_sensor_ids(found)]
    ids = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([*(ids[name] for name in names), -1])[which], [*ids]


def is_label(column: Column) -> bool:
    """Whether the cells can be ids: text, or whole numbers."""
    if column.dtype.kind == "f":
        return bool(np.all(np.isnan(column) | (column == np.round(column))))
    return column.dtype.kind in "iuOSU"


def to_wide(
    names: Sequence[str], columns: Sequence[Column], times: Times, sensors: int, choice: Choice
) -> Arrays:
    """Return the readings with a row per time and a column per sensor, missing ones NaN.

    Raises `DataError` when it is not clear which column to read, or a sensor has two readings at
    a time.
    """
    value = _value_column(names, columns, sensors, choice.channel)
    which, labels = _labels(columns[sensors])
    present = which >= 0
    column, values, times = which[present], columns[value][present], times[present]
    unique_times, row = np.unique(times, return_inverse=True)
    is_read = np.zeros((len(unique_times), len(labels)), dtype=bool)
    is_read[row, column] = True
    if np.count_nonzero(is_read) < len(times):
        cells, counts = np.unique(row * len(labels) + column, return_counts=True)
        at, who = divmod(int(cells[counts.argmax()]), len(labels))
        hour = repeated_hour(times[column == who])
        raise DataError(
            f"is a long table (time, sensor, value), in which sensor {labels[who]} has "
            f"{counts.max()} rows at {unique_times[at]}; expected one; "
            + (
                "if another column tells them apart, like a lane, take the mean over it first, "
                f"frame.groupby([TIME, {names[sensors]!r}]).mean()"
                if hour is None
                else repeated_hour_advice(hour)
            )
        )
    joint, _ = _usual_step(np.diff(unique_times))
    sensor, step = np.nonzero(is_read.T)
    own = np.diff(unique_times[step])[np.diff(sensor) == 0]
    usual, count = _usual_step(own)
    if np.count_nonzero(own == joint) < count / 2:
        raise DataError(
            f"is a long table (time, sensor, value) of {len(labels):,} sensors whose times differ, "
            f"{len(unique_times):,} in all: those of a sensor are mostly {usual.astype(int)} s "
            f"apart, and those of all {joint.astype(int)} s; resample every sensor to the same "
            "times first"
        )
    speed = np.full((len(unique_times), len(labels)), np.nan)
    speed[row, column] = _numbers(values, names[value])
    left = [name for place, name in enumerate(names) if place not in (sensors, value)]
    note = f"long table: read {names[value]} by {names[sensors]}, a column for each"
    if left:
        note += f", left {', '.join(left)}; data.channel names another"
    notes = [note]
    if unnamed := int(np.count_nonzero(~present)):
        notes.append(f"{counted(unnamed, 'row')} without a sensor in {names[sensors]}: left out")
    ids = np.array(labels)
    return Arrays(speed=speed, timestamps=unique_times, sensor_ids=ids).noted(*notes)


def _usual_step(steps: npt.NDArray[np.timedelta64]) -> tuple[np.timedelta64, int]:
    """Return the most common of the steps between times, and how often it is; 0 of none."""
    found, counts = np.unique(steps, return_counts=True)
    if not found.size:
        return np.timedelta64(0, "s"), 0
    return found[counts.argmax()], int(counts.max())


def _value_column(
    names: Sequence[str], columns: Sequence[Column], sensors: int, channel: int | str | None
) -> int:
    others = [place for place in range(len(names)) if place != sensors]
    if channel is not None:
        named = [place for place in others if names[place] == str(channel)]
        if not named:
            raise DataError(
                f"data.channel={channel}: the long table has no such column of readings; found "
                + ", ".join(names[place] for place in others)
            )
        return named[0]
    ranked = [(rank, p) for p in others if (rank := speed_rank(names[p])) is not None]
    if ranked:
        return min(ranked)[1]
    numeric = [p for p in others if columns[p].dtype.kind in "iuf"]
    called = [p for p in numeric if _is_readings(names[p])]
    for found in (others, called, numeric):
        if len(found) == 1:
            return found[0]
    raise DataError(
        "is a long table (time, sensor, value) with several columns of readings; name the one to "
        f"read, data.channel={names[(numeric or others)[0]]}; found "
        + ", ".join(names[place] for place in others)
    )


def _numbers(column: Column, name: str) -> npt.NDArray[np.float64]:
    try:
        return column.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"is a long table (time, sensor, value), and its column {name!r} holds what is no "
            f"number: {error}; expected a speed, or an empty cell for missing"
        ) from None
