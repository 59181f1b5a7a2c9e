"""Columns of an episode in a parquet file of LeRobot, checked: one row for each of its steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from expt.errors import DataError, first_line
from expt.jobs.vla.episodes import Array

STEP = "frame_index"
"""Column with the number of a row's step."""


def in_order(path: Path, episode: int, part: Any) -> Any:
    """Return an episode's rows in the order of its steps, which must all be there."""
    if STEP not in part.column_names:
        return part
    frames = one_each(path, episode, part, STEP)
    order = np.argsort(frames, kind="stable")
    wrong = np.flatnonzero(frames[order] != np.arange(len(part)))
    if len(wrong):
        raise DataError(
            f"{path}: frame_index of episode {episode} must go from 0 to {len(part) - 1}; "
            f"in the place of {wrong[0]} there is {frames[order][wrong[0]]:g}"
        )
    return part.take(order)


def one_each(path: Path, episode: int, part: Any, key: str) -> Array:
    """Return a column with one number a step [T]."""
    return numbers(path, episode, part, key, 1, "must have 1")[:, 0]


def numbers(path: Path, episode: int, part: Any, key: str, size: int, says: str) -> Array:
    """Return a column of an episode [T, size]; `says` why it has this size."""
    import pyarrow as pa

    column, of = part.column(key), f"{path}: {key} of episode {episode}"
    if column.null_count:
        step = int(np.flatnonzero(column.is_null().to_numpy())[0])
        raise DataError(f"{of} has nothing (null) at step {step}; every step must have its values")
    kind = column.type
    while pa.types.is_nested(kind) and hasattr(kind, "value_type"):
        kind = kind.value_type
    if not any(
        is_(kind) for is_ in (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean)
    ):
        raise DataError(f"{of} must hold numbers; there is {column.type}")
    try:
        values = _rows(column)
    except ValueError as error:  # lists of lists of different lengths
        raise DataError(f"{of} cannot be read: {first_line(error)}") from error
    others = {len(value) for value in values} - {size}
    if others:
        raise DataError(f"{of} has {min(others)} values, and {says}")
    return np.stack(values)


def _rows(column: Any) -> Sequence[Array]:
    """Return the values of each step, whatever lists they are in."""
    import pyarrow as pa
    from pyarrow import compute

    values = column.combine_chunks()
    kinds = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    if not any(kind(values.type) for kind in kinds):
        return list(values.to_numpy(zero_copy_only=False)[:, None])
    flat = values.flatten()
    if len(values) and len(flat) % len(values) == 0 and pa.types.is_primitive(flat.type):
        size = len(flat) // len(values)
        if compute.all(compute.equal(compute.list_value_length(values), size)).as_py():
            return list(flat.to_numpy(zero_copy_only=False).reshape(len(values), size))
    return [np.ravel(value) for value in values.to_pylist()]
