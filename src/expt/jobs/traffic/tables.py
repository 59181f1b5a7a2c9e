"""Tables, one row per time step and one column per sensor: CSV and parquet.

Letters: `S` time steps, `N` sensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.choice import Arrays, Choice, column_note, one_channel
from expt.jobs.traffic.clock import Times, local_clock, parsed
from expt.jobs.traffic.long_table import is_sensor_name, sensor_column, to_wide
from expt.jobs.traffic.source import translated
from expt.jobs.traffic.text_table import blank_lines, opened_csv, without_empty_end
from expt.jobs.traffic.time_of_day import Column, is_clock_column, with_time_of_day

if TYPE_CHECKING:
    import pandas as pd

_EXPECTED_CSV = "expected a first column of times such as 2012-03-01 00:05:00, then one per sensor"


def read_csv(path: Path, choice: Choice | None = None) -> Arrays:
    """Read times from the first column, sensor ids from the header; an empty cell is missing.

    A long table, a row per time and sensor, is made wide.
    """
    import pandas as pd

    with opened_csv(path) as encoding:
        first = blank_lines(path, encoding) + 1  # of the rows
        header = pd.read_csv(
            path, header=None, nrows=1, dtype=str, keep_default_na=False, encoding=encoding
        )
        names = [str(name) for name in header.iloc[0]]
        _refuse_other_separators(names)
        _refuse_data_as_header(names)
        while len(names) > 1 and not names[-1].strip():  # of trailing commas
            names.pop()
        try:
            frame = pd.read_csv(
                path, header=None, skiprows=first, low_memory=False, encoding=encoding
            )
        except pd.errors.EmptyDataError:
            raise DataError("has a header but no rows; expected one row per time step") from None
    frame = without_empty_end(frame, keep=len(names))
    if frame.shape[1] > len(names) and header.shape[1] == frame.shape[1]:
        names = [str(name) for name in header.iloc[0]]  # a column without a name, but with cells
    if frame.shape[1] != len(names):
        raise DataError(
            f"the header names {len(names)} columns, the first row has {frame.shape[1]}; "
            f"{_EXPECTED_CSV}"
        )
    place = _time_column(names, frame)
    clock, notes = _parse_times(frame.iloc[:, place], names[place])
    if place and _counts_rows(names[0], frame[0]):
        names, frame, place = names[1:], frame.iloc[:, 1:], place - 1
    rest = frame.drop(columns=frame.columns[place])
    names.pop(place)
    return _arrays(names, rest, clock, choice, partial(_as_written, path, first)).noted(*notes)


def _as_written(path: Path, first: int, column: int) -> Column:
    """Return the cells of one column as text, without spaces around."""
    import pandas as pd

    with opened_csv(path) as encoding:
        cells = pd.read_csv(
            path, header=None, skiprows=first, usecols=[column], dtype=str, encoding=encoding
        )
    return cells[column].str.strip().to_numpy(object)


def read_parquet(path: Path, choice: Choice | None = None) -> Arrays:
    """Read times from the index, else from the first column of times; the rest are sensors.

    A long table, a row per time and sensor, is made wide.
    """
    import pandas as pd
    import pyarrow as pa

    damaged = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
    with translated(path, "parquet", *damaged):
        frame = pd.read_parquet(path, engine="pyarrow")
    if isinstance(frame.index, pd.MultiIndex):
        frame = frame.reset_index()
    columns = [str(name) for name in frame.columns]
    if isinstance(frame.index, pd.DatetimeIndex):
        times, rest = frame.index, frame
    else:
        kinds = [getattr(dtype, "kind", "O") for dtype in frame.dtypes]
        if "M" not in kinds:
            raise DataError(
                f"has no timestamp column; found {', '.join(columns[:6])}; expected times as "
                "the index, or a column of them: frame.index = pandas.to_datetime(…)"
            )
        position = _finer(frame, kinds.index("M"))
        times = pd.DatetimeIndex(frame.iloc[:, position])
        rest = frame.iloc[:, [column for column in range(len(columns)) if column != position]]
        columns.pop(position)
    clock, notes = local_clock(times)
    return _arrays(columns, rest, clock, choice).noted(*notes)


def _arrays(
    names: list[str],
    frame: pd.DataFrame,
    times: Times,
    choice: Choice | None,
    as_written: Callable[[int], Column] | None = None,
) -> Arrays:
    """Return a wide table's columns, or a long table made wide.

    `as_written` returns a column as text, by its label, where numbers were text in the file.
    """
    choice = choice or Choice()
    if choice.key is not None:
        raise DataError(
            f"data.key={choice.key} names one array of several, in npz and HDF5; a table is one: "
            "data.channel=NAME reads one of its columns"
        )
    columns = [frame.iloc[:, place].to_numpy() for place in range(len(names))]
    times, clocks, notes = with_time_of_day(names, columns, times)
    if clocks:
        rest = [place for place in range(len(names)) if place not in clocks]
        names, frame = [names[place] for place in rest], frame.iloc[:, rest]
        return _arrays(names, frame, times, choice, as_written).noted(*notes)
    sensors = sensor_column(names, columns, times)
    if sensors is not None:
        if as_written is not None and columns[sensors].dtype.kind in "iuf":
            texts = as_written(int(frame.columns[sensors]))
            if any(re.fullmatch(r"0\d+", str(text)) for text in texts):
                columns[sensors] = texts  # 0401 is another id than 401
        return to_wide(names, columns, times, sensors, choice)
    if choice.channel is not None and str(choice.channel) in names:
        place = names.index(str(choice.channel))
        speeds = _numbers(frame.iloc[:, [place]], [names[place]], times)
        arrays = Arrays(speed=speeds, timestamps=times, sensor_ids=np.array([names[place]]))
        return arrays.noted(column_note(names[place], len(names)))
    speeds = _numbers(frame, names, times)
    arrays = Arrays(speed=speeds, timestamps=times, sensor_ids=np.array(names))
    return one_channel(arrays, "the table", choice)


def _time_column(names: list[str], frame: pd.DataFrame) -> int:
    """Return which column has the times: the first, but for row numbers and sensor ids before.

    Of one of dates and one of times it is that of times.
    """
    for place, name in enumerate(names):
        column = frame.iloc[:, place]
        if not _is_numeric(column) and _parsed(column).notna().all():
            return _finer(frame, place)
        passed = is_sensor_name(name) or _counts_rows(name, column)
        if not (passed or is_clock_column(name, column.to_numpy())):
            break
    return 0


def _finer(frame: pd.DataFrame, place: int) -> int:
    """Return the first column after this one of dates that has times, else this one."""
    if _are_dates(frame.iloc[:, place]) and frame.iloc[:, place].duplicated().any():
        for other in range(place + 1, frame.shape[1]):
            column = frame.iloc[:, other]
            if not _is_numeric(column) and _parsed(column).notna().all() and not _are_dates(column):
                return other
    return place


def _are_dates(column: pd.Series[Any]) -> bool:
    times = _parsed(column)
    return times.dtype.kind == "M" and bool((times == times.dt.normalize()).all())


def _counts_rows(name: str, column: pd.Series[Any]) -> bool:
    """Whether the column is the number of the row, as ``frame.to_csv`` writes in front."""
    if name.strip() or not _is_numeric(column):
        return False
    return bool((column.to_numpy() == np.arange(len(column))).all())


def _refuse_other_separators(names: list[str]) -> None:
    for separator in ";\t|":
        if len(names) == 1 and separator in names[0]:
            raise DataError(
                f"its columns are separated by {separator!r}: the header is {names[0][:40]!r}; "
                "expected commas between columns, and points in numbers"
            )


def _refuse_data_as_header(names: list[str]) -> None:
    import pandas as pd

    first_is_time = not pd.isna(pd.to_datetime(names[0], errors="coerce", format="ISO8601"))
    if first_is_time and not is_number(names[0]):
        raise DataError(
            f"has no header: the first row begins with the time {names[0]!r}; expected a header "
            "with the sensor ids, timestamp,773869,767541,…"
        )


def _parse_times(column: pd.Series[Any], name: str) -> tuple[Times, tuple[str, ...]]:
    import pandas as pd

    if _is_numeric(column):
        raise DataError(
            f"has no timestamp column: the first, {name!r}, holds numbers, the first "
            f"{column.iloc[0]}; {_EXPECTED_CSV}"
        )
    times = parsed(column, repr(name))
    bad = np.flatnonzero(times.isna())
    if bad.size:
        raise DataError(
            f"has no timestamp column, or a damaged one: row {bad[0]} (counted from 0) of "
            f"{name!r} is {column.iloc[bad[0]]!r}, not a time in ISO 8601; {_EXPECTED_CSV}"
        )
    return local_clock(pd.DatetimeIndex(times))


def _parsed(column: pd.Series[Any]) -> pd.Series[Any]:
    import pandas as pd

    try:
        return pd.to_datetime(column, errors="coerce", format="ISO8601")
    except ValueError:  # several time zones in one column: times, but not to be read
        return column


def _is_numeric(column: pd.Series[Any]) -> bool:
    import pandas as pd

    return bool(pd.api.types.is_numeric_dtype(column))


def _numbers(
    frame: pd.DataFrame, names: list[str], times: npt.NDArray[np.datetime64]
) -> npt.NDArray[np.float32]:
    import pandas as pd

    speeds = np.empty(frame.shape, dtype=np.float32)
    for position, name in enumerate(names):
        column = frame.iloc[:, position]
        if column.dtype.kind in "iufO":
            numbers = pd.to_numeric(column, errors="coerce")
            bad = np.flatnonzero(numbers.isna() & column.notna())
        else:  # times and truth values would pass as numbers
            bad = np.arange(len(column))
        if bad.size:
            raise DataError(
                f"column {name!r} holds {column.iloc[bad[0]]!r} at {times[bad[0]]}, which is not a "
                "number; expected a speed, or an empty cell for missing"
            )
        with np.errstate(over="ignore"):  # float32 makes it infinite, and Series refuses that
            speeds[:, position] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return speeds


def is_number(text: str) -> bool:
    """Whether the text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True
