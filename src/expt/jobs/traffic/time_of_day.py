"""Times from several columns: dates, and the time of day as 00:05 or as hours, minutes, seconds.

Letters: `R` rows of a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.clock import Times
from expt.jobs.traffic.table import Column, Table

_TEXT = re.compile(
    r"\s*(?:0 days? )?(\d{1,2}):([0-5]\d)(?::([0-5]\d)(?:\.\d+)?)?(?:\s*([ap])\.?m\.?)?\s*", re.I
)
_PARTS = (("hours", 23, 3600), ("minutes", 59, 60), ("seconds", 59, 1))


def are_dates(times: Times) -> bool:
    """Whether all times are midnight."""
    return bool((times == times.astype("datetime64[D]")).all())


def is_time_of_day(text: object) -> bool:
    """Whether a cell or a name is like 00:05, 00:05:00 or 12:05 AM."""
    return _of_day(str(text)) is not None


def to_times(table: Table, names: Sequence[str]) -> tuple[Times, tuple[str, ...]]:
    """Return the times [R] that these columns make, and notes about them.

    Args:
        table: with the columns.
        names: one column of times; or one of dates, and one of text like 00:05 or up to three of
            whole hours, minutes and seconds.

    Raises:
        DataError: a cell holds anything else.

    """
    times, notes = table.times(names[0])
    if len(names) == 1:
        return times, notes
    if not are_dates(times[~np.isnat(times)]):
        raise DataError(
            f"{names[0]!r} has times of the day, and {', '.join(names[1:])} cannot be added to "
            "them; expected dates there, or that column alone for the times"
        )
    parts = [table[name] for name in names[1:]]
    if len(parts) == 1 and parts[0].dtype.kind in "OSU":
        seconds = _seconds(names[1], parts[0])
    elif len(parts) > len(_PARTS):
        raise DataError(f"a time is made of a date, hours, minutes and seconds, not of {[*names]}")
    else:
        seconds = sum(
            (
                _whole(name, column, *part)
                for name, column, part in zip(names[1:], parts, _PARTS, strict=False)
            ),
            np.zeros(len(times), dtype=np.int64),
        )
    of = ", ".join(names[1:])
    note = f"the times are the dates with the time of day in {of}"
    return times + seconds.astype("timedelta64[s]"), (note, *notes)


def _whole(
    name: str, column: Column, unit: str, largest: int, factor: int
) -> npt.NDArray[np.int64]:
    is_number = column.dtype.kind in "iuf"
    fits = (column >= 0) & (column <= largest) & (column % 1 == 0) if is_number else [False]
    if not np.all(fits):
        row = int(np.argmin(fits))
        raise DataError(
            f"row {row} (counted from 0) of {name!r} is {column[row]}; expected whole {unit} from "
            f"0 to {largest}, or the time of day as text like 00:05"
        )
    return column.astype(np.int64) * factor


def _seconds(name: str, column: Column) -> npt.NDArray[np.int64]:
    import pandas as pd

    which, texts = pd.factorize(column.astype(object))
    seconds = [_of_day(str(text)) for text in texts]
    known = np.array([found is not None for found in seconds] + [False])
    bad = np.flatnonzero(~known[which])
    if bad.size:
        raise DataError(
            f"row {bad[0]} (counted from 0) of {name!r} is {column[bad[0]]!r}; expected a time of "
            "day like 00:05 in every row"
        )
    return np.array([second or 0 for second in seconds], dtype=np.int64)[which]


def _of_day(text: str) -> int | None:
    """Return the seconds of the day that a text like 00:05 says; None for another."""
    match = _TEXT.fullmatch(text)
    if match is None:
        return None
    hour, minute, second = (int(part or 0) for part in match.group(1, 2, 3))
    if match[4] and 1 <= hour <= 12:
        hour = hour % 12 + 12 * (match[4] in "pP")
    elif match[4] or hour > 24:
        return None
    return hour * 3600 + minute * 60 + second
