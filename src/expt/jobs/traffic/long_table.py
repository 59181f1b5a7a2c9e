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

Column = npt.NDArray[Any]
"""Cells of a column [R]: numbers, or text in an object array."""

_SENSOR = re.compile(
    "(sensor|station|detector|segment|link|node|site|vds|tmc|counter)s?|"
    "(sensor|station|detector|det|device|segment|seg|link|node|site|vds|tmc|counter|camera|loop|"
    "edge|road|location|section|point|milepost)?(id|ids|code|uid|name|no|nr|number|index|key)"
)
_TOO_SPARSE = 50
"""Cells of the wide table for one of the long one; sensors with times of their own make more."""


def sensor_column(names: Sequence[str], columns: Sequence[Column], times: Times) -> int | None:
    """Return which column says whose reading a row is; None if the table is wide.

    It is one that is called so beside one of readings, or, where times are repeated all over, one
    that tells the rows of a time apart.
    """
    if len(names) < 2:
        return None
    steps, step = np.unique(times, return_inverse=True)
    is_repeated = len(times) >= 1.5 * len(steps)
    for place, column in enumerate(columns):
        others = [name for name in names if name != names[place]]
        has_readings = any(_is_readings(name) for name in others) or (
            len(others) == 1 and not others[0].isdigit()
        )
        called = is_sensor_name(names[place]) and (is_repeated or has_readings)
        if called and _is_label(column) and len(_labels(column)[0]) < len(times):
            return place
    for place, column in enumerate(columns if is_repeated else ()):
        if _is_label(column):
            ids, _, which = _labels(column)
            pairs = np.unique(step * len(ids) + which)
            if 1 < len(ids) <= len(times) / 2 and len(pairs) == len(times):
                return place
    return None


def is_sensor_name(name: str) -> bool:
    """Whether a column of this name says which sensor a row is of: ``sensor_id``, ``Station``."""
    word = re.sub("[^a-z]", "", name.lower())
    return _SENSOR.fullmatch(word) is not None and re.search(r"\d", name) is None


def _is_readings(name: str) -> bool:
    return speed_rank(name) is not None or name.lower() in ("value", "reading", "measurement")


def _labels(column: Column) -> tuple[list[str], npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the different ids as text, where each is first, and which every row has."""
    text = column if column.dtype.kind in "iuf" else column.astype(str)
    ids, first, which = np.unique(text, return_index=True, return_inverse=True)
    return [*to_sensor_ids(ids)], first, which


def _is_label(column: Column) -> bool:
    if column.dtype.kind == "f":
        return bool(np.all(column == np.round(column)))
    return column.dtype.kind in "iuOSU"


def to_wide(
    names: Sequence[str], columns: Sequence[Column], times: Times, sensors: int, choice: Choice
) -> Arrays:
    """Return the readings with a row per time and a column per sensor, missing ones NaN.

    Raises `DataError` when it is not clear which column to read, or a sensor has two readings at
    a time.
    """
    value = _value_column(names, columns, sensors, choice.channel)
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
    if len(labels) * len(unique_times) > _TOO_SPARSE * len(times):
        raise DataError(
            f"is a long table (time, sensor, value) of {len(labels):,} sensors whose times differ, "
            f"{len(unique_times):,} in all; resample every sensor to the same times first"
        )
    speed = np.full((len(unique_times), len(labels)), np.nan)
    speed[row, column] = _numbers(columns[value], names[value])
    left = [name for place, name in enumerate(names) if place not in (sensors, value)]
    note = f"long table: read {names[value]} by {names[sensors]}, a column for each"
    if left:
        note += f", left {', '.join(left)}; data.channel names another"
    ids = np.array(labels)
    return Arrays(speed=speed, timestamps=unique_times, sensor_ids=ids).noted(note)


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
