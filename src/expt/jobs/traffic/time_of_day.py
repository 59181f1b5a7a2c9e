"""Dates in one column and the time of day in another: made into times.

Letters: `R` rows of a table.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.clock import Times

Column = npt.NDArray[Any]
"""Cells of a column [R]: numbers, or text in an object array."""

_CALLED = re.compile(
    "(start|end|begin)?(time|hour|hr|minute|clock|interval|period|slot)s?"
    "(ofday|slot|interval|period|start|end|ending|beginning)*|hhmm|hhmmss|tod"
)
_HOUR = re.compile("hours?|hr|hourofday")
_MINUTE = re.compile("minutes?|minuteofhour")
_TEXT = re.compile(r"(\d{1,2}):(\d\d)(?::(\d\d)(?:\.\d+)?)?")


def is_clock_column(name: str, column: Column) -> bool:
    """Whether a column is of the time of day: it is called so and whole, or holds 00:05."""
    if column.dtype.kind == "f" and (column != np.round(column)).any():
        return False
    return _CALLED.fullmatch(_word(name)) is not None or _is_text(column)


def with_time_of_day(
    names: Sequence[str], columns: Sequence[Column], times: Times
) -> tuple[Times, list[int], tuple[str, ...]]:
    """Return times [R], the places of the columns that are part of them, and a note.

    Only repeated dates are completed so; other times are returned as they are.

    Raises `DataError` when it is not clear what the column of the time of day says.
    """
    is_date = times == times.astype("datetime64[D]")
    if not is_date.all() or len(np.unique(times)) == len(times):
        return times, [], ()
    clocks = [
        place
        for place, column in enumerate(columns)
        if is_clock_column(names[place], column) and len(np.unique(column.astype(str))) > 1
    ]
    if not clocks:
        return times, [], ()
    hours = [place for place in clocks if _is_number(_HOUR, names[place], columns[place], 23)]
    minutes = [place for place in clocks if _is_number(_MINUTE, names[place], columns[place], 59)]
    used = [place for place in clocks if _is_text(columns[place])][:1]
    if used:
        seconds = _seconds(columns[used[0]])
    elif hours:
        used = [hours[0], *minutes[:1]]
        seconds = columns[hours[0]].astype(np.int64) * 3600
        seconds += sum(columns[place].astype(np.int64) * 60 for place in minutes[:1])
    else:
        listed = ", ".join(names[place] for place in clocks)
        raise DataError(
            f"dates without a time of day are repeated, and it seems to be in {listed}, the first "
            f"{columns[clocks[0]][0]}: expected 00:05, or hours from 0 to 23 in a column `hour`; "
            "or put both in one column of times such as 2012-03-01 00:05:00"
        )
    note = f"the times are the dates with the time of day in {', '.join(names[p] for p in used)}"
    if left := [names[place] for place in clocks if place not in used]:
        note += f", left {', '.join(left)}"
    return times + seconds.astype("timedelta64[s]"), clocks, (note,)


def _word(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def _is_text(column: Column) -> bool:
    return column.dtype.kind in "OSU" and all(_TEXT.fullmatch(str(c).strip()) for c in column)


def _is_number(called: re.Pattern[str], name: str, column: Column, largest: int) -> bool:
    is_called = called.fullmatch(_word(name)) is not None and column.dtype.kind in "iuf"
    return is_called and bool(((column >= 0) & (column <= largest)).all())


def _seconds(column: Column) -> npt.NDArray[np.int64]:
    texts, which = np.unique(column.astype(str), return_inverse=True)
    parts = [(_TEXT.fullmatch(text.strip()) or [""])[0].split(":") for text in texts]
    seconds = np.array(
        [sum(int(float(n)) * f for n, f in zip(p, (3600, 60, 1), strict=False)) for p in parts]
    )
    found: npt.NDArray[np.int64] = seconds[which]
    return found
