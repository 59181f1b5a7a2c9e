"""What the columns of a table are, where `data.columns` does not say it.

Only what has one sensible reading is guessed. Anything else is refused, with a line of the file's
own names that says it.

Letters: `R` rows of a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.choice import Choice, Columns, column_note, speed_rank
from expt.jobs.traffic.clock import Times, are_plausible, is_called_time
from expt.jobs.traffic.table import Column, Table
from expt.jobs.traffic.time_of_day import are_dates, is_time_of_day, to_times

_KINDS = (
    "sensor|station|detector|det|device|segment|seg|link|node|site|vds|tmc|counter|camera|loop|"
    "edge|road|location|section|point|milepost"
)
_WORDS = "ids?|code|uid|name|no|nr|number|index|key"
_SENSOR = re.compile(
    f"(sensor|station|detector|segment|link|node|site|vds|tmc|counter)s?|({_KINDS})({_WORDS})"
)
_PERHAPS = re.compile(_WORDS)
"""Words that say only that it is some number or name."""
_CALENDAR = re.compile(
    "(start|end|begin)?(time|year|month|week|weekday|day|dow|doy|hour|hr|minute|min|second|sec|"
    "clock|interval|period|slot|step|quarter|holiday|weekend)s?"
    "(of(the)?(year|month|week|day|hour|minute)|sincemidnight|slot|interval|period|start|ending)*"
    "|is(holiday|weekend)"
)
_HOUR, _MINUTE, _SECOND = (
    re.compile(words) for words in ("hours?|hr|hourofday", "minutes?|minuteofhour", "seconds?")
)
_ATTRIBUTE = re.compile(
    f"({_KINDS})?({_WORDS})?|lanes?|dir|direction|route|freeway|district|county"
)
"""Of a place; one value throughout in a column that is called so is no stuck sensor."""
_TELLING = 100
"""Rows from which on the cells of a column tell what it is; a file to forecast may have few."""
_HARDLY = 1.05
"""Rows per time; several sensors have more, and one detector as many, but for an autumn's hour."""
_ALL_OVER = 1.5
"""Rows per time from which on the times are repeated throughout."""


def guessed(table: Table, choice: Choice) -> tuple[Columns, tuple[str, ...]]:
    """Return what the columns are, and notes about what was left.

    Raises `DataError` when there are several sensible readings, or none.
    """
    time, times = _time(table, choice)
    rest = [name for name in table if name not in time]
    wanted = None if choice.channel is None else str(choice.channel)
    if wanted is not None and wanted not in rest:
        raise DataError(
            f"data.channel={wanted}: the table has no such column of readings; found "
            + _listed(rest)
        )
    sensor = None if times is None else _sensor(table, time, times, rest, wanted)
    if sensor is not None:
        value = wanted or _value(table, time, sensor, [name for name in rest if name != sensor])
        return Columns(time, sensor, (value,)), ()
    if wanted is not None:
        return Columns(time, None, (wanted,)), (column_note(wanted, len(rest)),)
    if times is not None:
        _refuse_a_day_per_row(time, times, rest)
    left = [name for name in rest if _is_beside(name, table[name], name == next(iter(table)))]
    left += [name for name in rest if name not in left and _is_of_times(table, name)]
    if len(left) == len(rest):
        left = []
    notes = [f"left {_listed(left)}: times, row numbers, or one value throughout"]
    kept = tuple(name for name in rest if name not in left)
    return Columns(time, None, kept), tuple(notes if any(map(str.strip, left)) else ())


def _time(table: Table, choice: Choice) -> tuple[tuple[str, ...], Times | None]:
    """Return the columns that make the times, and these; none where `data.start` says them."""
    full: list[str] = []
    dates: list[str] = []
    wrong: list[DataError] = []
    for name in table:
        if _is_of_times(table, name):
            try:
                times, _ = table.times(name)
            except DataError:
                if not full and not dates:
                    raise
                continue  # one beside the times, like that of an inspection
            (dates if are_dates(times) else full).append(name)
    parts = [(date, *clock) for date in dates if not _is_row_each(table, table.times(date)[0])
             for clock in _clocks(table)]  # fmt: skip
    candidates: dict[tuple[str, ...], Times] = {(name,): table.times(name)[0] for name in full}
    for names in parts:
        try:
            candidates[names] = to_times(table, names)[0]
        except DataError as error:
            wrong.append(error)
    sure = [
        names for names in parts if names in candidates and _is_row_each(table, candidates[names])
    ]
    if sure:
        candidates = {n: t for n, t in candidates.items() if n not in parts or n in sure}
    if wrong and not candidates:
        raise wrong[0]
    candidates |= {(name,): table.times(name)[0] for name in dates}
    if not candidates:
        if choice.start is None:
            _refuse_no_times(table)
        return (), None
    for names, times in candidates.items():
        if len(candidates) == 1 or all(_follow(times, others) for others in candidates.values()):
            return names, times
    _ask(
        table,
        "has several columns of times, which differ: "
        + "; ".join(
            f"{' + '.join(names)}, the first {times[0]}" for names, times in candidates.items()
        ),
        next(iter(candidates)),
    )


def _is_of_times(table: Table, name: str) -> bool:
    """Whether a column is of times or dates, by its type, its name and its first cell."""
    import pandas as pd

    column = table[name]
    if column.dtype.kind == "M":
        return True
    if column.dtype.kind in "iuf" and is_called_time(name):
        try:
            return are_plausible(table.times(name)[0])
        except DataError:
            return False
    if column.dtype.kind not in "OSU":
        return False
    first = next((str(cell) for cell in column if not pd.isna(cell)), "")
    if not re.match(r"\s*\d{4}([-/]\d|\d{4}[T ])", first):
        return False
    return not pd.isna(pd.to_datetime(first, errors="coerce", format="ISO8601"))


def _clocks(table: Table) -> list[tuple[str, ...]]:
    """Return the columns of the time of day: text like 00:05, or hours with minutes and seconds."""
    found: list[tuple[str, ...]] = [(name,) for name in table if _is_clock(table[name])]
    parts: list[str] = []
    for pattern in (_HOUR, _MINUTE, _SECOND):
        called = [name for name in table if pattern.fullmatch(_letters(name))]
        if not called or table[called[0]].dtype.kind not in "iuf":
            break
        parts.append(called[0])
    return [*found, tuple(parts)] if parts else found


def _is_clock(column: Column) -> bool:
    if column.dtype.kind not in "OSU":
        return False
    cells = [str(cell) for cell in column[:100]]
    return sum(map(is_time_of_day, cells)) > len(cells) / 2


def _follow(times: Times, others: Times) -> bool:
    """Whether others say nothing more: as far after these throughout, or these rounded down."""
    apart = (others - times).astype(np.int64)
    if (apart == apart[:1]).all() and (apart[:1] >= 0).all():
        return True
    is_coarser = len(np.unique(others)) < len(np.unique(times))
    return is_coarser and any((times.astype(f"M8[{unit}]") == others).all() for unit in "Dhm")


def _is_row_each(table: Table, times: Times) -> bool:
    """Whether hardly any sensor, of those that a column is called after, has two rows at a time."""
    step, count = _codes(times)
    if len(times) < _HARDLY * count:
        return True
    for name in table:
        if is_sensor_name(name):
            ids = table.ids(name)
            pairs = (step * len(ids.names) + ids.which)[ids.which >= 0]
            if 0 < len(ids.names) <= len(times) / 2 and len(pairs) < _HARDLY * _codes(pairs)[1]:
                return True
    return False


def _sensor(
    table: Table, time: tuple[str, ...], times: Times, rest: list[str], wanted: str | None
) -> str | None:
    """Return the column that says whose reading a row is; None of a wide table."""
    step, count = _codes(times)
    is_repeated = len(times) >= _ALL_OVER * count
    readings = [name for name in rest if _is_readings(name) or name == wanted]
    beside = bool(readings) or (len(rest) == 2 and not all(map(str.isdigit, rest)))
    if not len(times) or not (is_repeated or beside):
        return None
    labels = [n for n in rest if n not in readings and _are_labels(table[n])]
    called = [name for name in labels if is_sensor_name(name) and table.ids(name).names]
    perhaps = [
        name
        for name in labels
        if name not in called and is_sensor_name(name, True) and not _counts_rows(table[name])
    ]
    if len(times) < _HARDLY * count:
        called = called or (perhaps if readings else [])
        one = [name for name in called if len(table.ids(name).names) == 1]
        if called and not one:
            _ask(
                table,
                f"is like a long table (time, sensor, value): {called[0]!r} is called like a "
                f"column of sensors and has {len(table.ids(called[0]).names):,} different values, "
                "but hardly any time has two rows. If all rows are of one sensor, leave that "
                "column out; if they are of several, resample them to the same times first",
                time,
                value=[name for name in rest if not is_sensor_name(name, True)],
            )
        return one[0] if one else None
    apart = [name for name in called if _tells_apart(table, name, step)]
    others: list[str] = []
    if not apart and is_repeated:
        others = [n for n in labels if n not in called and _tells_apart(table, n, step)]
        clear = [name for name in others if name in perhaps or _is_text(table, name)]
        apart, others = ([], clear) if called else (clear, others)
    which = [table.ids(name).which for name in apart]
    if apart and all(_is_same(which[0], ids) for ids in which[1:]):
        return apart[0]
    if called and not others and not apart:
        return called[0]  # of which `to_wide` says that it has several rows at a time
    found = apart or others
    if not called and not apart and is_repeated and are_dates(times):
        raise DataError(
            f"dates are repeated, and the time of day is not clear; found {_listed(rest)}; "
            "expected 00:05 in a column, or hours from 0 to 23 in `hour` and minutes in `minute`; "
            "or one column of times: pandas.to_datetime(frame[DATE]) + "
            'pandas.to_timedelta(frame[COLUMN], unit="min")'
        )
    if not found:
        return None
    _ask(
        table,
        f"is like a long table (time, sensor, value): {len(times):,} rows have {count:,} different "
        f"times, and it is not clear which column says whose reading a row is: {_listed(found)}",
        time,
        found[:1],
    )


def is_sensor_name(name: str, perhaps: bool = False) -> bool:
    """Whether a column of this name says which sensor a row is of: ``sensor_id``, ``Station``.

    Of names that say only that it is some number or name, like ``id``, `perhaps`.
    """
    word = _letters(name)
    if re.search(r"\d", name):
        return False
    return _SENSOR.fullmatch(word) is not None or (perhaps and _PERHAPS.fullmatch(word) is not None)


def _tells_apart(table: Table, name: str, step: npt.NDArray[np.intp]) -> bool:
    """Whether no two rows of a step have the same id, and ids have several rows."""
    ids = table.ids(name)
    if not 1 < len(ids.names) <= len(step) / 2 or (ids.which < 0).all():
        return False
    pairs = (step * len(ids.names) + ids.which)[ids.which >= 0]
    return len(pairs) == _codes(pairs)[1]


def _is_same(which: npt.NDArray[np.intp], others: npt.NDArray[np.intp]) -> bool:
    """Whether two columns make the same groups of rows."""
    count = len(np.unique(which * (others.max() + 2) + others))
    return count == len(np.unique(which)) == len(np.unique(others))


def _value(table: Table, time: tuple[str, ...], sensor: str, rest: list[str]) -> str:
    """Return the column of readings of a long table."""
    ranks = {name: rank for name in rest if (rank := speed_rank(name)) is not None}
    best = [name for name, rank in ranks.items() if rank == min(ranks.values())]
    numeric = [
        name
        for name in rest
        if table[name].dtype.kind in "iuf" and not _is_beside(name, table[name], not name.strip())
    ]
    called = [name for name in numeric if _is_readings(name)]
    for found in (best, rest, called if not ranks else [], numeric if not ranks else []):
        if len(found) == 1:
            return found[0]
    _ask(
        table,
        "is a long table (time, sensor, value) with several columns of readings: "
        f"{_listed(best or numeric or rest)}; name the one to read, data.channel=NAME",
        time,
        [sensor],
        (best or numeric or rest)[:1],
    )


def _refuse_a_day_per_row(time: Sequence[str], times: Times, rest: list[str]) -> None:
    """Refuse a table whose columns are the times of the day."""
    hours = [[str(hour) for hour in range(first, first + 24)] for first in (0, 1)]
    are_hours = are_dates(times) and [name.strip().lstrip("0") or "0" for name in rest] in hours
    if rest and (are_hours or all(map(is_time_of_day, rest))):
        raise DataError(
            f"has a row per day and a column per time of day, {rest[0]} to {rest[-1]}; expected a "
            f'row per time: frame.melt({time[0]!r}, var_name="time", value_name="speed"), where '
            "the times are like 00:05"
        )


def _is_beside(name: str, column: Column, is_first: bool) -> bool:
    """Whether a column beside the times is no sensor: of the calendar, row numbers, a constant."""
    if _is_clock(column):
        return True
    if _is_readings(name) or not _are_labels(column):
        return False
    if is_first and (not name.strip() or name.startswith("Unnamed")):
        return True  # an index, as pandas writes it
    word = _letters(name)
    if re.search(r"\d", name):
        return False
    if _CALENDAR.fullmatch(word):
        return True
    if len(column) < _TELLING:
        return False
    is_same = bool((column == column[0]).all())
    is_other = column.dtype.kind in "OSU" or _ATTRIBUTE.fullmatch(word) is not None
    return _counts_rows(column) or (is_same and is_other)


def _counts_rows(column: Column) -> bool:
    """Whether whole numbers go up by one from row to row, though they may begin again."""
    import pandas as pd

    for rows in (50, len(column)):
        numbers = pd.to_numeric(pd.Series(column[:rows]), errors="coerce").to_numpy(np.float64)
        begins = np.diff(numbers) != 1
        if len(numbers) < 2 or begins.all() or (numbers[1:][begins] != np.min(numbers)).any():
            return False
    return True


def _are_labels(column: Column) -> bool:
    """Whether the cells can be ids or counts: text, or whole numbers."""
    if column.dtype.kind == "f":
        return bool(np.all(np.isnan(column) | (column == np.round(column))))
    return column.dtype.kind in "iuOSU"


def _is_text(table: Table, name: str) -> bool:
    """Whether a column may name sensors: text that is no time and no number."""
    import pandas as pd

    column = table[name]
    if column.dtype.kind not in "OSU" or _is_clock(column) or _is_of_times(table, name):
        return False
    if _CALENDAR.fullmatch(_letters(name)):
        return False
    return bool(pd.to_numeric(pd.Series(column[:1000]), errors="coerce").isna().any())


def _is_readings(name: str) -> bool:
    called = name.lower() in ("value", "reading", "measurement")
    return called or speed_rank(name) is not None or "speed" in name.lower()


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def _codes(values: npt.NDArray[np.generic]) -> tuple[npt.NDArray[np.intp], int]:
    """Return which of the different values each is, and how many there are."""
    import pandas as pd

    which, found = pd.factorize(values)
    return which, len(found)


def _listed(names: Iterable[str]) -> str:
    shown = [name if name.strip() else "a column without a name" for name in names]
    return ", ".join(shown[:6]) + (", …" if len(shown) > 6 else "")


def _refuse_no_times(table: Table) -> NoReturn:
    """Say what is wrong with a column that is called like times, else what was found."""
    called = [name for name in table if is_called_time(name) and name.strip()]
    for name in called:
        if not _is_clock(table[name]):
            table.times(name)
    problem = (
        f"has no timestamp column; found {_listed(table)}; expected times such as 2012-03-01 "
        "00:05:00, then a column per sensor; of a file without any, data.start and "
        "data.step_minutes"
    )
    if called:
        _ask(table, problem, called[:1])
    raise DataError(problem)


def _ask(
    table: Table,
    problem: str,
    time: Sequence[str],
    sensor: Sequence[str] = (),
    value: Sequence[str] = (),
) -> NoReturn:
    """Refuse, with a ready line of `data.columns`.

    Sensors and readings that are not given are guessed for that; readings alone are of a wide one.
    """
    rest = [name for name in table if name not in time]
    if not (sensor or value):
        sensor = [n for n in rest if is_sensor_name(n)] or [
            n for n in rest if is_sensor_name(n, True)
        ]
        sensor = sensor[:1]
    if sensor and not value:
        others = [name for name in rest if name not in sensor]
        readings = [n for n in others if _is_readings(n)] or [
            n for n in others if table[n].dtype.kind in "iuf"
        ]
        value = sorted(readings, key=lambda n: speed_rank(n) or 0)[:1]
    columns = Columns(tuple(time), sensor[0] if sensor and value else None, tuple(value))
    raise DataError(f"{problem}. Say what the columns are, for example {columns.setting()}")
