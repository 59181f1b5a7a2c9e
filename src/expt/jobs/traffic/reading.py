"""From a data file to a `Series`: the one entrance is `read_series`.

To read one more format, write a function that returns the named arrays of
`expt.jobs.traffic.arrays` and add its suffix to `_READERS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from expt.jobs.traffic.adjacency import read_adjacency
from expt.jobs.traffic.arrays import Arrays, read_npz, to_seconds
from expt.jobs.traffic.hdf5 import read_hdf5
from expt.jobs.traffic.series import Series
from expt.jobs.traffic.source import checked_suffix, named
from expt.jobs.traffic.tables import read_csv, read_parquet

_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npz": read_npz,
    ".h5": read_hdf5,
    ".hdf5": read_hdf5,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def read_series(path: Path, adjacency_path: Path | None = None) -> Series:
    """Read a speed series, with the graph of `adjacency_path` if one is given, else its own if any.

    The graph is put in the series' order of sensors. A series file that names no sensors is taken
    to be in the graph's order, and takes its names.

    Raises `DataError` when a file is absent, damaged, or not what it should be.
    """
    with named(path):
        arrays = _READERS[checked_suffix(path, _READERS)](path)
        if adjacency_path is not None:
            arrays.pop("adjacency", None)
        series = _to_series(arrays)
    if adjacency_path is None:
        return series

    adjacency, graph_ids = read_adjacency(adjacency_path)
    with named(adjacency_path):
        if graph_ids is None or "sensor_ids" in arrays:
            return series.with_adjacency(adjacency, graph_ids)
        return dataclasses.replace(series.with_adjacency(adjacency), sensor_ids=graph_ids)


def _to_series(arrays: Arrays) -> Series:
    speed = arrays["speed"]
    return Series.from_arrays(
        speed[:, :, 0] if speed.ndim == 3 and speed.shape[2] else speed,
        to_seconds(arrays["timestamps"]),
        arrays.get("sensor_ids"),
        arrays.get("adjacency"),
        arrays.get("locations"),
    )
