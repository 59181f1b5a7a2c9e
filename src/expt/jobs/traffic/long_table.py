"""Long tables, a row per time and sensor, made wide: a row per time and a column per sensor.

Letters: `R` rows of the long table, `S` time steps, `N` sensors.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.choice import Arrays
from expt.jobs.traffic.clock import Times, repeated_hour, repeated_hour_advice
from expt.jobs.traffic.table import Ids
from expt.units import counted


def to_wide(times: Times, sensors: Ids, readings: npt.NDArray[np.float64], by: str) -> Arrays:
    """Return the readings with a row per time and a column per sensor, missing ones NaN.

    Args:
        times: of the rows [R].
        sensors: of the rows [R].
        readings: of the rows [R].
        by: name of the column of sensors, for what is said of it.

    Raises:
        DataError: a sensor has two readings at a time, or the sensors have times of their own.

    """
    present = sensors.which >= 0
    column, values, times = sensors.which[present], readings[present], times[present]
    unique_times, row = np.unique(times, return_inverse=True)
    cells, counts = np.unique(row * len(sensors.names) + column, return_counts=True)
    if len(cells) < len(times):
        at, who = divmod(int(cells[counts.argmax()]), len(sensors.names))
        hour = repeated_hour(times[column == who])
        raise DataError(
            f"is a long table (time, sensor, value), in which sensor {sensors.names[who]} has "
            f"{counts.max()} rows at {unique_times[at]}; expected one; "
            + (
                "if the time of day is in another column, name it too, "
                "data.columns.time=[DATE,TIME_OF_DAY]; if a column tells them apart, like a lane, "
                "make one row of them first, with their mean"
                if hour is None
                else repeated_hour_advice(hour)
            )
        )
    joint, _ = _usual_step(np.diff(unique_times))
    sensor, step = np.divmod(np.sort(column * len(unique_times) + row), len(unique_times))
    own = np.diff(unique_times[step])[np.diff(sensor) == 0]
    usual, count = _usual_step(own)
    if np.count_nonzero(own == joint) < count / 2:
        raise DataError(
            f"is a long table (time, sensor, value) of {counted(len(sensors.names), 'sensor')} "
            f"whose times differ, {len(unique_times):,} in all: those of a sensor are mostly "
            f"{usual.astype(int)} s apart, and those of all {joint.astype(int)} s; resample every "
            "sensor to the same times first"
        )
    speed = np.full((len(unique_times), len(sensors.names)), np.nan)
    speed[row, column] = values
    ids = np.array(sensors.names)
    arrays = Arrays(speed=speed, timestamps=unique_times, sensor_ids=ids)
    arrays.is_long = True
    if unnamed := int(np.count_nonzero(~present)):
        arrays.noted(f"{counted(unnamed, 'row')} without a sensor in {by}: left out")
    return arrays


def _usual_step(steps: npt.NDArray[np.timedelta64]) -> tuple[np.timedelta64, int]:
    """Return the most common of the steps between times, and how often it is; 0 of none."""
    found, counts = np.unique(steps, return_counts=True)
    if not found.size:
        return np.timedelta64(0, "s"), 0
    return found[counts.argmax()], int(counts.max())
