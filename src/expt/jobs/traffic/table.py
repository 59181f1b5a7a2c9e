"""A table in memory: its columns by their names, and what each is when read as ids or as times.

Letters: `R` rows of a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.clock import Times, to_clock
from expt.jobs.traffic.series import to_sensor_ids

Column = npt.NDArray[Any]
"""Cells [R]: numbers, times, or text in an object array."""


@dataclass(frozen=True)
class Ids:
    """Whose reading each row is."""

    which: npt.NDArray[np.intp]
    """Place in `names` [R]; -1 for an empty cell."""
    names: tuple[str, ...]
    """The different ids as text, as they come."""


class Table(dict[str, Column]):
    """The columns by their names, in the file's order; ids and times of a column are made once.

    Raises `DataError` when two columns have the same name.
    """

    def __init__(
        self,
        columns: Iterable[tuple[str, Column]],
        zone_notes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Take the columns, with the notes of `to_clock` about those that were in a zone."""
        super().__init__()
        for name, column in columns:
            if name in self:
                raise DataError(f"two columns are called {name!r}; expected each name once")
            self[name] = column
        self._zone_notes = zone_notes or {}
        self._ids: dict[str, Ids] = {}
        self._times: dict[str, tuple[Times, tuple[str, ...]]] = {}

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(next(iter(self.values()), ()))

    def ids(self, name: str) -> Ids:
        """Return whose reading each row is, by this column."""
        if name not in self._ids:
            self._ids[name] = to_ids(self[name])
        return self._ids[name]

    def times(self, name: str) -> tuple[Times, tuple[str, ...]]:
        """Return the column's times and a note about their zone; see `to_clock`."""
        if name not in self._times:
            times, notes = to_clock(self[name], repr(name))
            self._times[name] = times, self._zone_notes.get(name, notes)
        return self._times[name]


def to_ids(column: Column) -> Ids:
    """Return the ids in a column; 401.0 is 401 where all are such."""
    import pandas as pd

    which, found = pd.factorize(column.astype(object) if column.dtype.kind in "SU" else column)
    names = [name.strip() for name in to_sensor_ids(np.asarray(found))]
    if all(re.fullmatch(r"(\d+\.0+)?", name) for name in names):
        names = [name.partition(".")[0] for name in names]
    places = {name: at for at, name in enumerate(dict.fromkeys(filter(None, names)))}
    renumbered = np.array([*(places.get(name, -1) for name in names), -1])
    return Ids(renumbered[which], tuple(places))
