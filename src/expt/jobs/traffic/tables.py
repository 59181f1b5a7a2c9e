"""Tables, one row per time step and one column per sensor: CSV and parquet.

Letters: `S` time steps, `N` sensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.arrays import counts_since_1970, to_seconds
from expt.jobs.traffic.choice import Arrays, Choice, column_note, one_channel
from expt.jobs.traffic.clock import Times, local_clock, parsed
from expt.jobs.traffic.long_table import is_label, is_sensor_name, laid_out, to_wide
from expt.jobs.traffic.source import translated
from expt.jobs.traffic.text_table import blank_lines, opened_csv, without_empty_end
from expt.jobs.traffic.time_of_day import Column, clock_on, is_clock_column

if TYPE_CHECKING:
    import pandas as pd

_EXPECTED_CSV = "expected a first column of times such as 2012-03-01 00:05:00, then one per sensor"


def read_csv(path: Path, choice: Choice | None = None) -> Arrays:
    """Read times from the first column, sensor ids from the header; an empty cell is missing.

    A long table, a row per time and sensor, is made wide.
    """
    import pandas as pd

    with opened_csv(path) as file:
        first = blank_lines(file) + 1  # of the rows
        header = pd.read_csv(file, header=None, nrows=1, dtype=str, keep_default_na=False)
        names = [str(name) for name in header.iloc[0]]
        _refuse_other_separators(names)
        _refuse_data_as_header(names)
        while len(names) > 1 and not names[-1].strip():  # of trailing commas
            names.pop()
        file.seek(0)
        try:
            frame = pd.read_csv(file, header=None, skiprows=first, low_memory=False)
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
    place, parsed_times = _time_column(names, frame)
    times, notes = _checked(parsed_times, frame.iloc[:, place], names[place])
    if place and _counts_rows(names[0], frame[0]):
        names, frame, place = names[1:], frame.iloc[:, 1:], place - 1
    rest = frame.drop(columns=frame.columns[place])
    names.pop(place)
    return _arrays(names, rest, times, choice, partial(_as_written, path, first)).noted(*notes)


def _as_written(path: Path, first: int, column: int) -> Column:
    """Return the cells of one column as text, without spaces around."""
    import pandas as pd

    with opened_csv(path) as file:
        cells = pd.read_csv(
            file, header=None, skiprows=first, usecols=[column], dtype=str, keep_default_na=False
        )
    which, texts = pd.factorize(cells[column])
    return np.array([*(text.strip() for text in texts), ""], dtype=object)[which]


def read_parquet(path: Path, choice: Choice | None = None) -> Arrays:
    """Read times from the index, else from a column of times; the rest are sensors.

    A long table, a row per time and sensor, is made wide.
    """
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    damaged = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
    with translated(path, "parquet", *damaged):
        table = pq.read_table(path, partitioning=None)
        frame = table.to_pandas(date_as_object=False)

    def whole_numbers(name: str) -> Column | None:
        """Return a column of these as text, which an empty cell would round to floats."""
        if table.column_names.count(name) != 1 or not pa.types.is_integer(table[name].type):
            return None
        return np.array(table[name].cast(pa.string()).to_pylist(), dtype=object)

    if isinstance(frame.index, pd.DatetimeIndex):
        columns = [str(name) for name in frame.columns]
        clock, notes = local_clock(frame.index)
        return _arrays(columns, frame, clock, choice, whole_numbers).noted(*notes)
    kinds = [getattr(dtype, "kind", "O") for dtype in frame.dtypes]
    if isinstance(frame.index, pd.MultiIndex) or ("M" not in kinds and frame.index.name):
        frame = frame.reset_index()
        kinds = [getattr(dtype, "kind", "O") for dtype in frame.dtypes]
    columns = [str(name) for name in frame.columns]
    if "M" in kinds:
        place, times = kinds.index("M"), frame.iloc[:, kinds.index("M")]
    else:
        place, times = _time_column(columns, frame)
    if times is None:
        raise DataError(
            f"has no timestamp column; found {', '.join(columns[:6])}; expected times as "
            "the index, or a column of them: frame.index = pandas.to_datetime(…)"
        )
    clock, notes = local_clock(pd.DatetimeIndex(times))
    rest = frame.iloc[:, [column for column in range(len(columns)) if column != place]]
    columns.pop(place)
    return _arrays(columns, rest, clock, choice, whole_numbers).noted(*notes)


def _arrays(
    names: list[str],
    frame: pd.DataFrame,
    times: Times,
    choice: Choice | None,
    as_written: Callable[[Any], Column | None],
) -> Arrays:
    """Return a wide table's columns, or a long table made wide.

    `as_written` returns a column as text, by its label, where its numbers may not be the file's.
    """
    choice = choice or Choice()
    if choice.key is not None:
        raise DataError(
            f"data.key={choice.key} names one array of several, in npz and HDF5; a table is one: "
            "data.channel=NAME reads one of its columns"
        )
    columns = [frame.iloc[:, place].to_numpy() for place in range(len(names))]

    def read_as_written(place: int) -> None:
        if is_label(columns[place]) and (text := as_written(frame.columns[place])) is not None:
            columns[place] = text

    for place, name in enumerate(names):
        if is_sensor_name(name):
            read_as_written(place)
    layout = laid_out(names, columns, times, choice.channel)
    times, sensors, notes = layout.times, layout.sensors, layout.notes
    if sensors is not None:
        if not is_sensor_name(names[sensors]):
            read_as_written(sensors)
        kept = layout.others
        names, columns = [names[place] for place in kept], [columns[place] for place in kept]
        return to_wide(names, columns, times, kept.index(sensors), choice).noted(*notes)
    dates = [place for place in layout.others if clock_on(columns[place], times) is not None]
    if dates:
        listed = ", ".join(names[place] for place in dates)
        notes += (f"left {listed}, which has the days of the times",)
    kept = [place for place in layout.others if place not in dates]
    names, frame = [names[place] for place in kept], frame.iloc[:, kept]
    if choice.channel is not None and str(choice.channel) in names:
        place = names.index(str(choice.channel))
        speeds = _numbers(frame.iloc[:, [place]], [names[place]], times)
        arrays = Arrays(speed=speeds, timestamps=times, sensor_ids=np.array([names[place]]))
        return arrays.noted(*notes, column_note(names[place], len(names)))
    speeds = _numbers(frame, names, times)
    arrays = Arrays(speed=speeds, timestamps=times, sensor_ids=np.array(names))
    return one_channel(arrays.noted(*notes), "the table", choice)


def _time_column(names: list[str], frame: pd.DataFrame) -> tuple[int, pd.Series[Any] | None]:
    """Return which column has the times, and these, None if it has none.

    It is the first, but for row numbers, sensor ids and the time of day before it.
    """
    import pandas as pd

    for place, name in enumerate(names):
        column = frame.iloc[:, place]
        if not _is_numeric(column):
            times = _parsed(column)
            if times.notna().all():
                return place, times
        elif counts_since_1970(name, numbers := column.to_numpy()):
            return place, pd.Series(to_seconds(numbers))
        passed = is_sensor_name(name) or _counts_rows(name, column)
        if not (passed or is_clock_column(name, column.to_numpy())):
            break
    return 0, None


def _counts_rows(name: str, column: pd.Series[Any]) -> bool:
    """Whether the column is the number of the row, as pandas and R write in front."""
    if name.strip() or not _is_numeric(column):
        return False
    numbers = column.to_numpy()
    return bool(numbers[0] in (0, 1) and (numbers == np.arange(len(column)) + numbers[0]).all())


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


def _checked(
    times: pd.Series[Any] | None, column: pd.Series[Any], name: str
) -> tuple[Times, tuple[str, ...]]:
    """Return the times on the clock of a column, parsed or to be parsed here, or say what it is."""
    import pandas as pd

    if times is None and _is_numeric(column):
        raise DataError(
            f"has no timestamp column: the first, {name!r}, holds numbers, the first "
            f"{column.iloc[0]}; {_EXPECTED_CSV}"
        )
    if times is None or times.dtype.kind != "M":
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
