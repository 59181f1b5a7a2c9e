"""From a data file to a `Series`: the one entrance is `read_series`.

To read one more format, write a function that returns the named arrays of
`expt.jobs.traffic.arrays` and add its suffix to `_READERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from expt.errors import DataError
from expt.jobs.traffic.arrays import made_times, read_npz
from expt.jobs.traffic.choice import Arrays, Choice
from expt.jobs.traffic.clock import to_clock
from expt.jobs.traffic.series import Series
from expt.jobs.traffic.source import checked_suffix, named


def _read_hdf5(path: Path, choice: Choice) -> Arrays:
    from expt.jobs.traffic.hdf5 import read_hdf5

    return read_hdf5(path, choice)


def _read_csv(path: Path, choice: Choice) -> Arrays:
    from expt.jobs.traffic.tables import read_csv

    return read_csv(path, choice)


def _read_parquet(path: Path, choice: Choice) -> Arrays:
    from expt.jobs.traffic.tables import read_parquet

    return read_parquet(path, choice)


_READERS: dict[str, Callable[[Path, Choice], Arrays]] = {
    ".npz": read_npz,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


_LIKE_TIMES = 10
"""So many more sensors than time steps look like an array [sensors, steps]."""


def read_series(
    path: Path, adjacency_path: Path | None = None, choice: Choice | None = None
) -> Series:
    """Read a speed series, with the graph of `adjacency_path` if one is given, else its own if any.

    Of a file that holds several series `choice` says which.

    The graph is put in the series' order of sensors. A series file that names no sensors is taken
    to be in the graph's order, and takes its names.

    Raises `DataError` when a file is absent, damaged, or not what it should be.
    """
    with named(path):
        choice = choice or Choice()
        arrays = _READERS[checked_suffix(path, _READERS)](path, choice)
        if adjacency_path is not None:
            arrays.pop("adjacency", None)
        series = _to_series(arrays, choice)
    if adjacency_path is None:
        return series

    from expt.jobs.traffic.adjacency import read_adjacency

    adjacency, graph_ids = read_adjacency(
        adjacency_path, series.sensor_ids if "sensor_ids" in arrays else ()
    )
    with named(adjacency_path):
        if graph_ids is None and arrays.is_long:
            raise DataError(
                "names no sensors, and the series is a long table, whose sensors are in no order "
                "of their own: write their ids into the graph, as the first row of a csv, as "
                "sensor_ids of an npz, or as DCRNN's pickle has them"
            )
        if graph_ids is None or "sensor_ids" in arrays:
            return series.with_adjacency(adjacency, graph_ids)
        return dataclasses.replace(series.with_adjacency(adjacency), sensor_ids=graph_ids)


def _to_series(arrays: Arrays, choice: Choice) -> Series:
    speed = arrays["speed"]
    if "timestamps" not in arrays:
        times = made_times(choice, len(speed) if speed.ndim else 0)
        if speed.ndim == 2 and speed.shape[0] < speed.shape[1] / _LIKE_TIMES:
            arrays.noted(
                f"{speed.shape[0]} time steps of {speed.shape[1]:,} sensors: if it is the other "
                "way round, save the array transposed, speed.T"
            )
    elif choice.start is not None or choice.step_minutes is not None:
        raise DataError("has times of its own; leave out data.start and data.step_minutes")
    else:
        times, notes = to_clock(arrays["timestamps"])
        arrays.noted(*notes)
    return Series.from_arrays(
        speed,
        times,
        arrays.get("sensor_ids"),
        arrays.get("adjacency"),
        arrays.get("locations"),
        arrays.notes,
    )
