"""Tables, one row per time step and one column per sensor: CSV and parquet.

Letters: `S` time steps, `N` sensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.arrays import Arrays
from expt.jobs.traffic.source import translated

if TYPE_CHECKING:
    import pandas as pd

_EXPECTED_CSV = "expected a first column of times such as 2012-03-01 00:05:00, then one per sensor"


def read_csv(path: Path) -> Arrays:
    """Read times from the first column, sensor ids from the header; an empty cell is missing."""
    import pandas as pd

    with translated(path, "CSV", OSError, ValueError):
        header = pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False)
        names = [str(name) for name in header.iloc[0]]
        _refuse_other_separators(names)
        _refuse_data_as_header(names)
        try:
            frame = pd.read_csv(path, header=None, skiprows=1, low_memory=False)
        except pd.errors.EmptyDataError:
            raise DataError("has a header but no rows; expected one row per time step") from None
    if frame.shape[1] != len(names):
        raise DataError(
            f"the header names {len(names)} columns, the first row has {frame.shape[1]}; "
            f"{_EXPECTED_CSV}"
        )
    times = _parse_times(frame[0], names[0])
    speeds = _numbers(frame.drop(columns=0), names[1:], times)
    return {"speed": speeds, "timestamps": times, "sensor_ids": np.array(names[1:])}


def read_parquet(path: Path) -> Arrays:
    """Read times from the index, else from the first column of times; the rest are sensors."""
    import pandas as pd
    import pyarrow as pa

    damaged = (OSError, ValueError, KeyError, TypeError, pa.ArrowException)
    with translated(path, "parquet", *damaged):
        frame = pd.read_parquet(path, engine="pyarrow")
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
        position = kinds.index("M")
        times = pd.DatetimeIndex(frame.iloc[:, position])
        rest = frame.iloc[:, [column for column in range(len(columns)) if column != position]]
        columns.pop(position)
    clock = times.tz_localize(None).to_numpy().astype("datetime64[s]")
    speeds = _numbers(rest, columns, clock)
    return {"speed": speeds, "timestamps": clock, "sensor_ids": np.array(columns)}


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


def _parse_times(column: pd.Series[Any], name: str) -> npt.NDArray[np.datetime64]:
    """Parse ISO 8601 only: 01/03/2012 is January to some and March to others."""
    import pandas as pd

    if pd.api.types.is_numeric_dtype(column):
        raise DataError(
            f"has no timestamp column: the first, {name!r}, holds numbers, the first "
            f"{column.iloc[0]}; {_EXPECTED_CSV}"
        )
    try:
        times = pd.to_datetime(column, errors="coerce", format="ISO8601")
    except ValueError as error:  # several time zones in one column
        raise DataError(
            f"the times in {name!r} cannot be read: {error}; use local times"
        ) from error
    bad = np.flatnonzero(times.isna())
    if bad.size:
        raise DataError(
            f"has no timestamp column, or a damaged one: row {bad[0]} (counted from 0) of "
            f"{name!r} is {column.iloc[bad[0]]!r}, not a time in ISO 8601; {_EXPECTED_CSV}"
        )
    return times.dt.tz_localize(None).to_numpy().astype("datetime64[s]")


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
