"""Long tables, a row per time and sensor: recognised, and made wide, a column per sensor.

Letters: `R` rows of the long table, `S` time steps, `N` sensors.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.choice import Arrays, Choice, speed_rank
from expt.jobs.traffic.clock import Times, repeated_hour, repeated_hour_advice
from expt.jobs.traffic.series import to_sensor_ids
from expt.jobs.traffic.time_of_day import Column, is_clock_column
from expt.units import counted

_SENSOR = re.compile(
    "(sensor|station|detector|segment|link|node|site|vds|tmc|counter)s?|"
    "(sensor|station|detector|det|device|segment|seg|link|node|site|vds|tmc|counter|camera|loop|"
    "edge|road|location|section|point|milepost)?(id|ids|code|uid|name|no|nr|number|index|key)"
)
_HARDLY = 1.05
"""Rows per time; several sensors have more, and one detector as many, but for an autumn's hour."""


def sensor_column(names: Sequence[str], columns: Sequence[Column], times: Times) -> int | None:
    """Return which column says whose reading a row is; None if the table is wide.

    It is one that is called so beside one of readings, or, where times are repeated all over, one
    that tells the rows of a time apart.

    Raises `DataError` when one is called so, but the rows are not those of several sensors.
    """
    if len(names) < 2 or not len(times):
        return None
    steps, step = np.unique(times, return_inverse=True)
    is_repeated = len(times) >= 1.5 * len(steps)
    readings = {place for place, name in enumerate(names) if _is_readings(name)}
    called = {}
    for place, column in enumerate(columns):
        if is_sensor_name(names[place]) and _is_label(column):
            beside = readings - {place} or (len(names) == 2 and not names[1 - place].isdigit())
            count = len(_labels(column)[0])
            if (is_repeated or beside) and 0 < count < len(times):
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
    apart = {place: count for place in called if (count := _told_apart(columns[place], step))}
    if called:
        return next(iter(apart or called))
    for place, column in enumerate(columns if is_repeated else ()):
        is_other = place in readings or is_clock_column(names[place], column)
        if not is_other and _is_label(column) and not _absent(column).any():
            count = _told_apart(column, step)
            if 1 < count <= len(times) / 2:
                apart[place] = count
    return min(apart, key=apart.__getitem__, default=None)


def _told_apart(column: Column, step: npt.NDArray[Any]) -> int:
    """Return how many ids there are, 0 where two rows of a time have the same."""
    ids, _, which = _labels(column)
    rows = np.flatnonzero(~_absent(column))
    pairs = np.unique(step[rows] * len(ids) + which)
    return len(ids) if len(pairs) == len(rows) else 0


def is_sensor_name(name: str) -> bool:
    """Whether a column of this name says which sensor a row is of: ``sensor_id``, ``Station``."""
    word = re.sub("[^a-z]", "", name.lower())
    return _SENSOR.fullmatch(word) is not None and re.search(r"\d", name) is None


def _is_readings(name: str) -> bool:
    return speed_rank(name) is not None or name.lower() in ("value", "reading", "measurement")


def _labels(column: Column) -> tuple[list[str], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the different ids as text, where each is first, and which a row has that has one."""
    seen = column[~_absent(column)]
    text = seen if seen.dtype.kind in "iuf" else seen.astype(str)
    ids, first, which = np.unique(text, return_index=True, return_inverse=True)
    return [*to_sensor_ids(ids)], first, which


def _absent(column: Column) -> npt.NDArray[np.bool_]:
    """Which cells are empty."""
    if column.dtype.kind == "f":
        return np.isnan(column)
    empty: npt.NDArray[np.bool_] = np.zeros(len(column), dtype=bool)
    if column.dtype.kind == "O":
        import pandas as pd

        empty = pd.isna(column)
    if column.dtype.kind in "OSU":
        empty = np.where(empty, "", column.astype(object)) == ""
    return empty


def _is_label(column: Column) -> bool:
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
    present = ~_absent(columns[sensors])
    unnamed = len(times) - int(present.sum())
    columns, times = [column[present] for column in columns], times[present]
    unique_times, row = np.unique(times, return_inverse=True)
    found, first, which = _labels(columns[sensors])
    order = np.argsort(first)  # as they come in the file
    labels, column = [found[place] for place in order], np.argsort(order)[which]
    cells, counts = np.unique(row * len(labels) + column, return_counts=True)
    if len(cells) < len(times):
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
    order = np.lexsort((times, column))
    own = np.diff(times[order])[np.diff(column[order]) == 0]
    usual, count = _usual_step(own)
    if np.count_nonzero(own == joint) < count / 2:
        raise DataError(
            f"is a long table (time, sensor, value) of {len(labels):,} sensors whose times differ, "
            f"{len(unique_times):,} in all: those of a sensor are mostly {usual.astype(int)} s "
            f"apart, and those of all {joint.astype(int)} s; resample every sensor to the same "
            "times first"
        )
    speed = np.full((len(unique_times), len(labels)), np.nan)
    speed[row, column] = _numbers(columns[value], names[value])
    left = [name for place, name in enumerate(names) if place not in (sensors, value)]
    note = f"long table: read {names[value]} by {names[sensors]}, a column for each"
    if left:
        note += f", left {', '.join(left)}; data.channel names another"
    notes = [note]
    if unnamed:
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
