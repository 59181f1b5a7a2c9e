"""Tables, a row per time step and a column per sensor, or a row per time and sensor.

CSV and parquet; `to_arrays` is also what frames of HDF5 pass through.

Letters: `R` rows, `S` time steps, `N` sensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.choice import Arrays, Choice
from expt.jobs.traffic.clock import local_clock
from expt.jobs.traffic.layout import guessed, is_sensor_name
from expt.jobs.traffic.long_table import to_wide
from expt.jobs.traffic.source import translated
from expt.jobs.traffic.table import Table
from expt.jobs.traffic.text_table import blank_lines, opened_csv, without_empty_end
from expt.jobs.traffic.time_of_day import to_times


def read_csv(path: Path, choice: Choice | None = None) -> Arrays:
    """Read a table with names in its first row; an empty cell is missing.

    What the columns are is said by `choice`, or guessed; ids are read as they are written.
    """
    import pandas as pd

    choice = _of_a_table(choice)
    with opened_csv(path) as file:
        first = blank_lines(file) + 1  # of the rows
        header = pd.read_csv(
            file, header=None, nrows=1, dtype=str, keep_default_na=False, skipinitialspace=True
        )
        given = [str(name).strip() for name in header.iloc[0]]
        names = [*given]
        while len(names) > 1 and not names[-1]:  # of trailing commas
            names.pop()
        _refuse_what_is_no_header(given, choice)
        as_text = dict.fromkeys(_of_sensors(given, choice), str)
        missing: dict[Any, list[str]] = {
            place: _MISSING for place in range(len(given)) if place not in as_text
        }
        file.seek(0)
        try:
            frame = pd.read_csv(
                file, header=None, skiprows=first, low_memory=False, skipinitialspace=True,
                dtype=as_text, keep_default_na=False, na_values=missing,
            )  # fmt: skip
        except pd.errors.EmptyDataError:
            raise DataError("has a header but no rows; expected one row per time step") from None
    frame = without_empty_end(frame, keep=len(names))
    if frame.shape[1] > len(names) and len(given) == frame.shape[1]:
        names = given  # a column without a name, but with cells
    if frame.shape[1] != len(names):
        raise DataError(
            f"the header names {len(names)} columns, {', '.join(map(repr, names[:3]))}, and the "
            f"first row has {frame.shape[1]}; expected a name for each in the first line, and "
            "nothing above it"
        )
    columns = [frame.iloc[:, place].to_numpy() for place in range(len(names))]
    return to_arrays(Table(zip(names, columns, strict=True)), choice)


def read_parquet(path: Path, choice: Choice | None = None) -> Arrays:
    """Read a table, with its index as columns; see `read_csv`."""
    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

    choice = _of_a_table(choice)
    damaged = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
    with translated(path, "parquet", *damaged):
        arrow = pq.read_table(path, partitioning=None)
        frame = arrow.to_pandas(date_as_object=False)
    is_told = choice.columns is not None or isinstance(frame.index, pd.MultiIndex)
    has_times = any(dtype.kind == "M" for dtype in frame.dtypes)
    if isinstance(frame.index, pd.DatetimeIndex) or (
        frame.index.names != [None] and (is_told or not has_times)
    ):
        frame = frame.reset_index()
    names = [str(name) for name in frame.columns]
    columns, zone_notes = {}, {}
    for place, name in enumerate(names):
        column = frame.iloc[:, place]
        if isinstance(column.dtype, pd.DatetimeTZDtype):
            columns[place], zone_notes[name] = local_clock(pd.DatetimeIndex(column))
        elif pd.api.types.is_extension_array_dtype(column.dtype) and column.dtype.kind in "iuf":
            columns[place] = column.to_numpy(np.float64, na_value=np.nan)
        else:
            columns[place] = column.to_numpy()
    for place in _of_sensors(names, choice):  # of whole numbers, an empty cell makes rounded floats
        name = names[place]
        if arrow.column_names.count(name) == 1 and pa.types.is_integer(arrow[name].type):
            columns[place] = np.array(arrow[name].cast(pa.string()).to_pylist(), dtype=object)
    return to_arrays(Table(zip(names, columns.values(), strict=True), zone_notes), choice)


def to_arrays(table: Table, choice: Choice) -> Arrays:
    """Return the speeds of a table, with times and sensors, a long one made wide.

    Raises `DataError` when `choice` names a column that is not there, it is not clear what the
    columns are, or they do not hold what they should.
    """
    columns, notes = (choice.columns, ()) if choice.columns else guessed(table, choice)
    named = [*columns.time, *columns.value]
    named += [] if columns.sensor is None else [columns.sensor]
    for name in named:
        if name not in table:
            raise DataError(
                f"data.columns: there is no column {name!r}; found {', '.join([*table][:12])}"
            )
    times, time_notes = to_times(table, columns.time) if columns.time else (None, ())
    left = [name for name in table if name not in named and name.strip()]
    if columns.sensor is not None and times is not None:
        value, sensor = columns.value[0], columns.sensor
        readings = _numbers(table, [value], times)[:, 0]
        arrays = to_wide(times, table.ids(sensor), readings.astype(np.float64), sensor)
        note = f"long table: read {value} by {sensor}, a column for each"
        if left:
            setting = "data.columns.value" if choice.columns else "data.channel"
            note += f", left {', '.join(left)}; {setting} names another"
        arrays.notes = (*time_notes, note, *arrays.notes)
        return arrays
    names = columns.value or tuple(name for name in table if name not in columns.time)
    arrays = Arrays(speed=_numbers(table, names, times), sensor_ids=np.array(names, dtype=str))
    if times is not None:
        arrays["timestamps"] = times
    if choice.columns and left and columns.value:
        notes = (f"left {', '.join(left)}",)
    return arrays.noted(*time_notes, *notes)


def _of_a_table(choice: Choice | None) -> Choice:
    """Return the choice, which must not be of an array."""
    choice = choice or Choice()
    if choice.key is not None:
        raise DataError(
            f"data.key={choice.key} names one array of several, in npz and HDF5; a table is one: "
            "data.channel=NAME reads one of its columns"
        )
    return choice


def _of_sensors(names: Sequence[str], choice: Choice) -> list[int]:
    """Return the places of the columns whose cells may be ids, which are text."""
    if choice.columns is not None:
        return [place for place, name in enumerate(names) if name == choice.columns.sensor]
    return [
        place
        for place, name in enumerate(names)
        if is_sensor_name(name) or is_sensor_name(name, True)
    ]


def _refuse_what_is_no_header(names: list[str], choice: Choice) -> None:
    import pandas as pd

    for separator in ";\t|":
        if any(separator in name for name in names) and len(names) <= 2:
            raise DataError(
                f"its columns are separated by {separator!r}: the header is {names[0][:40]!r}; "
                "expected commas between columns, and points in numbers"
            )
    is_time = not pd.isna(pd.to_datetime(names[0], errors="coerce", format="ISO8601"))
    if is_time and not is_number(names[0]):
        raise DataError(
            f"has no header: the first row begins with the time {names[0]!r}; expected a header "
            "with the sensor ids, timestamp,773869,767541,…"
        )
    if choice.start is not None and all(map(is_number, names)) and not all(map(str.isdigit, names)):
        raise DataError(
            f"has no header: the first row is of numbers, {', '.join(names[:3])}; expected one "
            "with the sensor ids, 773869,767541,…"
        )


def _numbers(
    table: Table, names: Sequence[str], times: npt.NDArray[np.datetime64] | None
) -> npt.NDArray[np.float64]:
    """Return columns as numbers [R, len(names)], NaN for an empty cell."""
    import pandas as pd

    speeds = np.empty((table.rows, len(names)))
    for position, name in enumerate(names):
        column = pd.Series(table[name])
        if column.dtype.kind in "iufO":
            numbers = pd.to_numeric(column, errors="coerce")
            bad = np.flatnonzero(numbers.isna() & column.notna() & (column != ""))
        else:  # times and truth values would pass as numbers
            bad = np.arange(len(column))
        if bad.size:
            at = f"at {times[bad[0]]}" if times is not None else f"in row {bad[0]}, from 0"
            raise DataError(
                f"column {name!r} holds {column.iloc[bad[0]]!r} {at}, which is not a number; "
                "expected a speed, or an empty cell for missing"
            )
        speeds[:, position] = numbers.to_numpy(dtype=np.float64, na_value=np.nan)
    return speeds


def is_number(text: str) -> bool:
    """Whether the text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


_MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN",
    "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip
"""What stands for a missing reading, as pandas has it."""
