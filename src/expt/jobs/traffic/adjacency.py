"""From a graph file to the matrix of its edge weights: the one entrance is `read_adjacency`.

Letters: `N` sensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.array_pickle import PickledSparse, load_array_pickle
from expt.jobs.traffic.arrays import array_of, opened_npz
from expt.jobs.traffic.series import to_float32, to_sensor_ids
from expt.jobs.traffic.source import checked_suffix, named
from expt.jobs.traffic.sparse import to_dense
from expt.jobs.traffic.tables import is_number
from expt.jobs.traffic.text_table import opened_csv, without_empty_end

Graph = tuple[npt.NDArray[np.float32], tuple[str, ...] | None]
"""Edge weights [N, N], row = from, column = to, and the sensors' ids if the file has them."""


def read_adjacency(path: Path, sensor_ids: Sequence[str] = ()) -> Graph:
    """Read a sensor graph from `.pkl` (DCRNN's), `.csv` or `.npz`.

    In `.pkl` and `.npz` the matrix may be scipy.sparse's. A csv whose header names `sensor_ids` is
    no list of edges.

    Raises `DataError` when the file is absent, damaged, or holds no square matrix of numbers.
    """
    with named(path):
        matrix, found = _READERS[checked_suffix(path, _READERS)](path, sensor_ids)
        adjacency = to_float32(matrix, "adjacency's entries")
        _check_square(adjacency.shape)
        if found is not None and len(set(found)) != len(adjacency):
            raise DataError(
                f"names {len(set(found))} different sensors for a matrix of "
                f"{len(adjacency)}; expected one id per row"
            )
        return adjacency, found


_DIGITS = 3
"""A number of more is no weight that is whole."""


def _check_square(shape: tuple[int, ...], is_list: bool = False) -> None:
    """Refuse another shape, and a list of edges, which may have as many rows as columns."""
    if is_list or len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise DataError(
            f"holds a matrix of shape {shape}; expected N x N. A list of edges "
            "(from, to, cost) must be made into a matrix first"
        )


def _are_edges(cells: npt.NDArray[Any], sensor_ids: Sequence[str]) -> bool:
    """Whether the rows are of edges (from, to, cost): the first two columns are ids.

    Ids as small as weights prove nothing, nor do some in a matrix of all sensors. Without
    ids of text or more than three digits a list is known by its first two columns, which are whole
    and never alike.
    """
    ids = {name for name in sensor_ids if not is_number(name) or len(name) > _DIGITS}
    ends = [{str(cell).strip() for cell in column} for column in cells[:, :2].T]
    are_ids = set.issubset if cells.shape[1] == len(sensor_ids) else set.intersection
    if cells.shape[1] > 2 and any(are_ids(one, ids) for one in ends):
        return True
    if cells.shape[1] != 3:
        return False
    is_whole = all(re.fullmatch(r"-?\d+", cell) for cell in set.union(*ends))
    is_text = all(cell and not is_number(cell) for cell in set.union(*ends))
    is_matrix = all(is_number(cell) and float(cell) == 0 for cell in cells.diagonal())
    is_list = (is_whole or is_text) and bool((cells[:, 0] != cells[:, 1]).all()) and not is_matrix
    return is_list and not (is_whole and len(ids) == len(sensor_ids) > 0)


def _read_pickle(path: Path, _: Sequence[str]) -> tuple[Any, tuple[str, ...] | None]:
    """Read DCRNN's ``[sensor_ids, id_to_index, matrix]``, or the matrix alone; it may be sparse."""
    content = load_array_pickle(path)
    if isinstance(content, np.ndarray | PickledSparse):
        return _dense(content), None
    if (
        not isinstance(content, list | tuple)
        or len(content) != 3
        or not isinstance(content[0], list | tuple | np.ndarray)
        or not isinstance(content[1], dict)
        or not isinstance(content[2], np.ndarray | PickledSparse)
    ):
        found = type(content).__name__
        if isinstance(content, list | tuple):
            found += " of " + ", ".join(type(part).__name__ for part in content[:4])
        raise DataError(
            f"holds a {found}; expected a matrix or [sensor_ids, id_to_index, matrix], as DCRNN's"
        )
    names, id_to_index, matrix = content
    sensor_ids = to_sensor_ids(names)
    rows = dict(zip(to_sensor_ids(id_to_index), map(str, id_to_index.values()), strict=True))
    if rows != {name: str(row) for row, name in enumerate(sensor_ids)}:
        raise DataError(
            "sensor_ids and id_to_index disagree on the order of the matrix's rows; "
            "expected id_to_index[sensor_ids[i]] == i"
        )
    return _dense(matrix), sensor_ids


def _dense(matrix: npt.NDArray[Any] | PickledSparse) -> npt.NDArray[Any]:
    return to_dense(matrix.parts) if isinstance(matrix, PickledSparse) else matrix


def _read_npz(path: Path, _: Sequence[str]) -> tuple[Any, tuple[str, ...] | None]:
    """Read the key `adjacency`, or the only array, or what `scipy.sparse.save_npz` wrote."""
    with opened_npz(path) as archive:
        if {"format", "shape", "data"} <= set(archive.files):
            return to_dense({name: array_of(archive, name) for name in archive.files}), None
        others = [name for name in archive.files if name != "sensor_ids"]
        key = others[0] if len(others) == 1 else "adjacency"
        if key not in others:
            raise DataError(
                f"has no adjacency; found {', '.join(archive.files) or 'nothing'}; "
                "expected the key `adjacency`"
            )
        ids = array_of(archive, "sensor_ids") if "sensor_ids" in archive.files else None
        return array_of(archive, key), None if ids is None else to_sensor_ids(ids)


def _read_csv(path: Path, sensor_ids: Sequence[str]) -> tuple[Any, tuple[str, ...] | None]:
    """Read N x N numbers, with ids in the first row, the first column, both or neither."""
    import pandas as pd

    with opened_csv(path) as file:
        table = pd.read_csv(
            file, header=None, dtype=str, keep_default_na=False, skipinitialspace=True
        )
        cells = without_empty_end(table, keep=1).to_numpy(object)
    rows, columns = cells.shape
    if columns == 1 and rows > 1 and (found := re.search("[;\t| ]", str(cells[-1, 0]).strip())):
        raise DataError(
            f"its columns are separated by {found[0]!r}: the last row is {cells[-1, 0][:40]!r}; "
            "expected commas between columns, and points in numbers"
        )
    square = rows == columns
    labelled = square and not is_number(cells[0, 0])  # the corner above the index is no number
    has_header = labelled or rows == columns + 1
    has_index = labelled or columns == rows + 1
    matrix = cells[int(has_header) :, int(has_index) :]
    header = tuple(cells[0, int(has_index) :].tolist()) if has_header else ()
    index = tuple(cells[int(has_header) :, 0].tolist()) if has_index else ()
    are_named = bool(sensor_ids) and set(sensor_ids) <= set(header)
    differ = labelled and header != index
    is_list = _are_edges(matrix, sensor_ids) and not are_named and (differ or not labelled)
    is_list |= differ and cells[0, 0].strip() != "" and _are_edges(cells[1:], sensor_ids)
    _check_square(matrix.shape, is_list)
    if differ:
        raise DataError(
            "the header and the first column name different sensors, or in another order, from "
            f"{header[:3]} and {index[:3]}; expected the same ids in both"
        )
    numbers = tuple(map(str, range(len(matrix))))
    if header == numbers and set(sensor_ids) != set(numbers):
        header = ()  # pandas numbered the columns of a matrix without ids
    if index == numbers and set(sensor_ids) != set(numbers):
        index = ()
    return _to_numbers(matrix), header or index or None


def _to_numbers(cells: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    try:
        return cells.astype(np.float64)
    except ValueError:
        row, column = next(at for at, cell in np.ndenumerate(cells) if not is_number(cell))
        raise DataError(
            f"the entry in row {row}, column {column} of the matrix (counted from 0) is "
            f"{cells[row, column]!r}, which is not a number; expected an edge weight"
        ) from None


_READERS: dict[str, Callable[[Path, Sequence[str]], tuple[Any, tuple[str, ...] | None]]] = {
    ".pkl": _read_pickle,
    ".csv": _read_csv,
    ".npz": _read_npz,
}
