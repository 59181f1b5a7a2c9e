"""Dates in one column and the time of day in another: made into times.

Letters: `R` rows of a table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.clock import Times, local_clock

Column = npt.NDArray[Any]
"""Cells of a column [R]: numbers, or text in an object array."""
Seconds = npt.NDArray[np.int64]
"""Of the day [R]."""

_CALLED = re.compile(
    "(start|end|begin)?(time|hour|hr|minute|min|second|sec|clock|interval|period|slot)s?"
    "(ofday|ofhour|ofminute|sincemidnight|slot|interval|period|start|end|ending|beginning)*"
    "|hhmm|hhmmss|tod"
)
_HOUR = re.compile("hours?|hr|hourofday")
_MINUTE = re.compile("minutes?|mins?|minuteofhour")
_SECOND = re.compile("seconds?|secs?|secondofminute")
_MINUTE_OF_DAY = re.compile("(minutes?|mins?)(ofday|sincemidnight)")
_SECOND_OF_DAY = re.compile("interval|(seconds?|secs?)(ofday|sincemidnight)?")
_NOON = 43_200
"""Seconds; a day's largest number below it may count something else."""
_TEXT = re.compile(
    r"(?:0 days? )?(\d{1,2}):([0-5]\d)(?::([0-5]\d)(?:\.\d+)?)?(?:\s*([ap])\.?m\.?)?", re.I
)


@dataclass(frozen=True)
class Completed:
    """Times [R] that were made of dates and `used`, the places of the columns with the rest."""

    times: Times
    used: list[int]
    is_exact: bool = True
    """Whether the time of day is known; of hours alone it may not be."""
    notes: tuple[str, ...] = ()


def are_dates(times: Times) -> bool:
    """Whether all times are midnight."""
    return bool((times == times.astype("datetime64[D]")).all())


def is_clock_column(name: str, column: Column) -> bool:
    """Whether a column is of the time of day: it is called so and whole, or holds 00:05."""
    if column.dtype.kind == "f" and (column != np.round(column)).any():
        return False
    return _is_called(_CALLED, name) or _is_text(column)


def with_time_of_day(
    names: Sequence[str],
    columns: Sequence[Column],
    dates: Times,
    is_enough: Callable[[Times], bool],
) -> Completed | None:
    """Return the dates with the time of day that makes times of which `is_enough` is true.

    Where none is, the best known one will do; None: nothing says more than the dates.

    Raises `DataError` when a cell in the column of the time of day holds none.
    """
    days, best = len(np.unique(dates)), None
    for used, seconds, *notes in _times_of_day(names, columns, dates):
        times = dates + seconds.astype("timedelta64[s]")
        if len(np.unique(times)) > days:
            is_exact = len(used) > 1 or not _is_called(_HOUR, names[used[0]])
            of = ", ".join(names[place] for place in used)
            notes.insert(0, f"the times are the dates with the time of day in {of}")
            found = Completed(times, used, is_exact or _is_text(columns[used[0]]), tuple(notes))
            if is_enough(times):
                return found
            best = best or found
    return best


def _times_of_day(
    names: Sequence[str], columns: Sequence[Column], dates: Times
) -> Iterator[tuple[Any, ...]]:
    """Yield places, what they make in seconds, and notes; those that are called so first."""
    texts = [place for place, column in enumerate(columns) if _is_text(column)]
    called = [place for place in texts if _is_called(_CALLED, names[place])]
    for place in called:
        yield [place], _seconds(names[place], columns[place])

    def whole(pattern: re.Pattern[str], largest: int, least: int = 0) -> list[int]:
        return [
            place
            for place, column in enumerate(columns)
            if _is_called(pattern, names[place])
            and _is_whole(column)
            and (column >= 0).all()
            and least <= column.max() <= largest
        ]

    for hour in whole(_HOUR, 23)[:1]:
        parts = [hour, *whole(_MINUTE, 59)[:1]]
        parts += whole(_SECOND, 59)[:1] if len(parts) > 1 else []
        factors = zip(parts, (3600, 60, 1), strict=False)
        yield parts, sum(columns[place].astype(np.int64) * factor for place, factor in factors)
    for place in whole(_MINUTE_OF_DAY, 1439, 60):
        yield [place], columns[place].astype(np.int64) * 60
    for place in whole(_SECOND_OF_DAY, 86_399, _NOON):
        yield [place], columns[place].astype(np.int64)
    for place, column in enumerate(columns):
        if place not in texts and (full := clock_on(column, dates)) is not None:
            yield [place], (full[0] - dates).astype(np.int64), *full[1]
    for place in texts:
        if place not in called and None not in _read(column := columns[place])[1]:
            yield [place], _seconds(names[place], column)


def clock_on(column: Column, dates: Times) -> tuple[Times, tuple[str, ...]] | None:
    """Return a column's full times and notes about them, None unless they are of these dates."""
    import pandas as pd

    if column.dtype.kind not in "OM" or not len(column):
        return None
    try:
        if pd.isna(pd.to_datetime(column[:1], errors="coerce", format="ISO8601")).any():
            return None
        times = pd.DatetimeIndex(pd.to_datetime(column, errors="coerce", format="ISO8601"))
    except (ValueError, TypeError):  # several zones, or no texts
        return None
    clock, notes = local_clock(times)
    days = clock.astype("datetime64[D]") == dates.astype("datetime64[D]")
    return (clock, notes) if days.all() else None


def _is_called(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.fullmatch(re.sub("[^a-z]", "", name.lower())) is not None


def _is_whole(column: Column) -> bool:
    return column.dtype.kind in "iuf" and bool((column == np.round(column)).all())


def _is_text(column: Column) -> bool:
    """Whether the different texts in a column are mostly times of the day."""
    if column.dtype.kind not in "OSU":
        return False
    seconds = _read(column)[1]
    return sum(found is not None for found in seconds) > len(seconds) / 2


def _read(column: Column) -> tuple[npt.NDArray[np.intp], list[int | None]]:
    """Return which of the different texts each row has, -1 for none, and what these are [s]."""
    import pandas as pd

    which, texts = pd.factorize(column.astype(object))
    return which, [_of_day(str(text)) for text in texts]


def _of_day(text: str) -> int | None:
    match = _TEXT.fullmatch(text.strip())
    if match is None:
        return None
    hour, minute, second = (int(part or 0) for part in match.group(1, 2, 3))
    if match[4] and 1 <= hour <= 12:
        hour = hour % 12 + 12 * (match[4] in "pP")
    elif match[4] or hour > 24:
        return None
    return hour * 3600 + minute * 60 + second


def _seconds(name: str, column: Column) -> Seconds:
    which, seconds = _read(column)
    known = np.array([found is not None for found in seconds] + [False])
    bad = np.flatnonzero(~known[which])
    if bad.size:
        raise DataError(
            f"dates without a time of day are repeated, and row {bad[0]} (counted from 0) of "
            f"{name!r}, which has it, is {column[bad[0]]!r}; expected a time of day like "
            f"{column[np.flatnonzero(known[which])[0]]} in every row"
        )
    found: Seconds = np.array([second or 0 for second in seconds], dtype=np.int64)[which]
    return found
