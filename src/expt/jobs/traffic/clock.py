"""Local clocks: time zones, and the hour that occurs twice where clocks go back in autumn.

Letters: `S` time steps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError

if TYPE_CHECKING:
    import pandas as pd

Times = npt.NDArray[np.datetime64]
"""Clock times [S], ``datetime64[s]``."""

_HOUR = 3600
_ZONE = r":\d\d(?:\.\d+)?\s*(?:Z|[+-]\d\d:?(?:\d\d)?)\s*$"
"""The end of a time with its distance to UTC."""
_NIGHT = range(4)
"""Hours of the day in which clocks go back somewhere."""
_SUNDAY = 6


def local_clock(times: pd.DatetimeIndex) -> tuple[Times, tuple[str, ...]]:
    """Return the time on the clock, without the zone, and a note where there was one."""
    clock = times.tz_localize(None).to_numpy().astype("datetime64[s]")
    if times.tz is None:
        return clock, ()
    zone = str(times.tz)
    if zone.upper() in ("UTC", "ETC/UTC", "TZUTC()", "GMT"):
        return clock, (
            "the times are in UTC and are read so: a model sees UTC's time of day and day of the "
            "week; with local ones, times.tz_convert(ZONE), it knows the rush hours better",
        )
    return clock, (f"the times are those of the clock in {zone}",)


def parsed(texts: pd.Series[Any], name: str) -> pd.Series[Any]:
    """Return text as times, on the clocks and in the zone that it says; NaT for what is no time.

    ISO 8601 only: 01/03/2012 is January to some and March to others.

    Args:
        texts: of the times.
        name: of where they come from, for the message.

    Raises:
        DataError: they are in several zones, or only some of them say theirs.

    """
    import pandas as pd

    try:
        return pd.to_datetime(texts, errors="coerce", format="ISO8601")
    except ValueError as error:
        zoned = texts.astype(str).str.contains(_ZONE)
        without = np.flatnonzero(~zoned & texts.notna())
        if zoned.any() and without.size:
            row = int(without[0])
            raise DataError(
                f"the times in {name} cannot be read: some have a zone, like "
                f"{texts[zoned].iloc[0]!r}, and others none, the first {texts.iloc[row]!r} in row "
                f"{row} (counted from 0); write all in the same way"
            ) from error
        raise DataError(
            f"the times in {name} cannot be read: their distance to UTC changes, as where "
            "clocks are changed; write standard time throughout, or all of them in UTC"
        ) from error


def order_advice(times: Times) -> str:
    """Return what to do about times that do not increase."""
    hour = repeated_hour(times)
    if hour is not None:
        return repeated_hour_advice(hour)
    if len(times) >= 1.5 * len(np.unique(times)):
        return (
            f"{len(times):,} rows have {len(np.unique(times)):,} different times, like a long "
            "table (time, sensor, value); expected a row per time and a column per sensor, "
            "frame.pivot(index=TIME, columns=SENSOR, values=SPEED); of rows that are the same "
            "throughout keep one"
        )
    return "sort by time and drop repeated rows"


def repeated_hour_advice(hour: np.datetime64) -> str:
    """Return what to do about an hour that occurs twice."""
    return (
        f"the hour from {hour} on occurs twice, as where clocks go back in autumn, and both are "
        "real: keep all rows and write standard time throughout, "
        'times.tz_convert("Etc/GMT+8").tz_localize(None) for UTC-8; times without a zone are given '
        'theirs before that, times.tz_localize(ZONE, ambiguous="infer")'
    )


def repeated_hour(times: Times) -> np.datetime64 | None:
    """Return the first hour that occurs twice at a change of clocks; None for another fault.

    Its rows follow each other (01:55, 01:00), or are sorted (01:00, 01:00).
    """
    if len(times) < 2:
        return None
    falls = np.flatnonzero(np.diff(times).astype(np.int64) < 0) + 1
    unique, counts = np.unique(times, return_counts=True)
    twice = unique[counts == 2] if counts.max() == 2 else unique[:0]
    begins = times[falls] if falls.size else twice
    if not begins.size or len(unique) < 2:
        return None
    steps, frequent = np.unique(np.diff(unique).astype(np.int64), return_counts=True)
    step = int(steps[frequent.argmax()])
    for day in np.unique(begins.astype("datetime64[D]")):
        today = twice[twice.astype("datetime64[D]") == day]
        back = falls[times[falls].astype("datetime64[D]") == day]
        hours = np.unique(np.concatenate((today, times[back])).astype("datetime64[h]"))
        at_night = (hours[0] - day).astype(int) in _NIGHT and len(hours) == 1
        lengths = (times[back - 1] - times[back]).astype(np.int64)
        one_hour = len(back) <= 1 and (lengths <= _HOUR).all()
        most_of_it = len(today) * step > _HOUR / 2 or (lengths >= _HOUR / 2).any()
        on_sunday = (day.astype(int) + 3) % 7 == _SUNDAY
        if not (at_night and one_hour and most_of_it and (on_sunday or len(today) > 1)):
            return None
    first: np.datetime64 = begins.min().astype("datetime64[h]").astype("datetime64[m]")
    return first
