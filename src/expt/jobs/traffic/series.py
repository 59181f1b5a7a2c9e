"""A speed series in memory: what every data file becomes, checked once.

A `Series` that exists is sound: its constructor checks it, so nothing downstream checks again.
Files are turned into one by `expt.jobs.traffic.reading.read_series`.

Letters: `S` time steps, `N` sensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.clock import order_advice

SECONDS_PER_DAY = 86_400
LARGEST = 1e7
"""No speed, flow or occupancy is larger, in whatever unit; what is, stands for something else."""


@dataclass(frozen=True, eq=False)
class Series:
    """Speeds of `N` sensors over `S` time steps.

    Raises `DataError` when the arrays do not fit each other, or hold what no measurement can.
    """

    values: npt.NDArray[np.float32]
    """Speeds [S, N], in one unit throughout; 0 = missing."""
    timestamps: npt.NDArray[np.datetime64]
    """Local clock times [S], ``datetime64[s]``, strictly increasing; gaps are allowed."""
    sensor_ids: tuple[str, ...]
    """[N], all different."""
    adjacency: npt.NDArray[np.float32] | None = None
    """Edge weights [N, N], row = from, column = to, in the order of `sensor_ids`."""
    locations: npt.NDArray[np.float64] | None = None
    """Latitude and longitude [N, 2]."""
    notes: tuple[str, ...] = ()
    """Lines about what was read of a file with more in it, and what was left."""

    def __post_init__(self) -> None:
        _check_shapes(self)
        _check_timestamps(self.timestamps)
        _check_values(self)
        if self.adjacency is not None:
            _check_adjacency(self.adjacency, len(self.sensor_ids))

    @classmethod
    def from_arrays(
        cls,
        values: npt.ArrayLike,
        timestamps: npt.ArrayLike,
        sensor_ids: Iterable[Any] | None = None,
        adjacency: npt.ArrayLike | None = None,
        locations: npt.ArrayLike | None = None,
        notes: tuple[str, ...] = (),
    ) -> Series:
        """Convert the types, write NaN as 0, and number the sensors if they have no ids.

        `timestamps` are times of any resolution; `values` are numbers of any type.
        """
        speeds = to_float32(values, "speeds")
        if sensor_ids is None:
            sensor_ids = np.arange(speeds.shape[-1] if speeds.ndim else 0)
        return cls(
            values=np.where(np.isnan(speeds), np.float32(0), speeds),
            timestamps=np.asarray(timestamps, dtype="datetime64[s]"),
            sensor_ids=to_sensor_ids(sensor_ids),
            adjacency=None if adjacency is None else to_float32(adjacency, "adjacency"),
            locations=None if locations is None else _to_float64(locations, "locations"),
            notes=notes,
        )

    def with_adjacency(
        self, adjacency: npt.NDArray[np.float32], sensor_ids: Sequence[str] | None = None
    ) -> Series:
        """Return the series with this graph [N, N], reordered from `sensor_ids` to its own order.

        Without `sensor_ids` the graph is taken to be in the series' order; with them it may have
        more sensors, which are left out.
        """
        notes = self.notes
        if sensor_ids is not None:
            _check_adjacency(adjacency, len(sensor_ids))
            position = {name: row for row, name in enumerate(sensor_ids)}
            absent = [name for name in self.sensor_ids if name not in position]
            if absent:
                raise DataError(
                    f"the graph lacks {len(absent)} of the series' {len(self.sensor_ids)} "
                    f"sensors: {_some(absent)}; it has {_some(sensor_ids)}. "
                    "Use the graph that was made for this series"
                )
            order = [position[name] for name in self.sensor_ids]
            adjacency = adjacency[np.ix_(order, order)]
            if left := len(sensor_ids) - len(order):
                notes += (f"left {left} of the graph's {len(sensor_ids)} sensors, of no reading",)
        return dataclasses.replace(self, adjacency=adjacency, notes=notes)

    @property
    def step_seconds(self) -> int:
        """The most common difference between two time steps, so that gaps do not count."""
        steps, counts = np.unique(np.diff(self.timestamps).astype(np.int64), return_counts=True)
        return int(steps[counts.argmax()])

    @property
    def steps_per_day(self) -> int:
        """Time steps in a day, 288 for five-minute data.

        Raises `DataError` when the step does not divide the day.
        """
        step = self.step_seconds
        if SECONDS_PER_DAY % step:
            raise DataError(
                f"a time step of {step} seconds does not divide the day ({SECONDS_PER_DAY} "
                "seconds), so no step has a fixed time of day; resample, to 5 minutes for example"
            )
        return SECONDS_PER_DAY // step

    def fingerprint(self) -> str:
        """Return 16 hexadecimal digits that change with any value, time or sensor id."""
        digest = hashlib.sha256(repr((self.values.shape, self.sensor_ids)).encode())
        digest.update(np.ascontiguousarray(self.values, dtype="<f4").tobytes())
        digest.update(self.timestamps.astype("<i8").tobytes())
        return digest.hexdigest()[:16]


def to_float32(raw: npt.ArrayLike, name: str) -> npt.NDArray[np.float32]:
    """Return numbers as contiguous float32; what float32 cannot hold becomes infinite."""
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(_numeric(raw, name), dtype=np.float32)


def to_sensor_ids(raw: Iterable[Any]) -> tuple[str, ...]:
    """Return ids as text, from text, bytes or whole numbers."""
    names = raw.reshape(-1).tolist() if isinstance(raw, np.ndarray) else raw
    return tuple(_to_sensor_id(name) for name in names)


def _to_sensor_id(raw: Any) -> str:
    if isinstance(raw, bytes):
        return raw.decode("utf-8", errors="replace")
    if isinstance(raw, float) and raw.is_integer():
        return str(int(raw))
    return str(raw)


def _to_float64(raw: npt.ArrayLike, name: str) -> npt.NDArray[np.float64]:
    return np.ascontiguousarray(_numeric(raw, name), dtype=np.float64)


def _numeric(raw: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    array = np.asarray(raw)
    if array.dtype.kind not in "biuf":
        raise DataError(f"the {name} are not numbers but {array.dtype}; expected a float array")
    return array


def _check_shapes(series: Series) -> None:
    values, count = series.values, len(series.sensor_ids)
    if values.ndim != 2:
        long = "; pivot a long table (time, sensor, value) first, give one sensor the shape [S, 1]"
        raise DataError(
            f"the speeds have the shape {values.shape}; expected two axes, time steps x sensors"
            + (long if values.ndim == 1 else "")
        )
    if count == 0 or values.shape[1] == 0:
        raise DataError("there is no sensor; expected at least 1 column of speeds")
    if values.shape[1] != count:
        raise DataError(
            f"{values.shape[1]} columns of speeds but {count} sensor ids; "
            "expected one id per column"
        )
    if series.timestamps.shape != values.shape[:1]:
        raise DataError(
            f"{values.shape[0]} rows of speeds but timestamps of shape {series.timestamps.shape}; "
            "expected one per row"
        )
    if values.shape[0] < 2:
        raise DataError(f"{values.shape[0]} time steps; expected at least 2")
    if len(set(series.sensor_ids)) != count:
        repeated = sorted({name for name in series.sensor_ids if series.sensor_ids.count(name) > 1})
        raise DataError(f"repeated sensor ids: {_some(repeated)}; expected each once")
    if series.locations is not None and series.locations.shape != (count, 2):
        raise DataError(f"locations of shape {series.locations.shape}; expected ({count}, 2)")


def _check_timestamps(timestamps: npt.NDArray[np.datetime64]) -> None:
    absent = np.flatnonzero(np.isnat(timestamps))
    if absent.size:
        raise DataError(f"the timestamp of row {absent[0]} is empty; expected a time in every row")
    falls = np.flatnonzero(np.diff(timestamps) <= np.timedelta64(0, "s"))
    if falls.size:
        row = falls[0] + 1
        raise DataError(
            f"time steps not increasing: row {row} (counted from 0) is {timestamps[row]}, the row "
            f"before it {timestamps[row - 1]}; {order_advice(timestamps)}"
        )


def _check_values(series: Series) -> None:
    values = series.values
    kinds = (
        (~np.isfinite(values), "not finite"),
        (values < 0, "negative"),
        (values > LARGEST, f"above {LARGEST:,.0f}, which nothing measures"),
    )
    for bad, what in kinds:
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise DataError(
                f"{bad.sum()} speeds are {what}, the first {values[row, column]} at sensor "
                f"{series.sensor_ids[column]}, {series.timestamps[row]}; expected speeds of 0 or "
                "more, with 0 or NaN for missing"
            )
    if not values.any():
        raise DataError("all values are missing (0 or NaN); expected some speed above 0")


def _check_adjacency(adjacency: npt.NDArray[np.float32], count: int) -> None:
    if adjacency.shape != (count, count):
        found = adjacency.shape[0] if adjacency.ndim == 2 else None
        size = f"{found} sensors, " if found is not None else ""
        raise DataError(
            "wrong sensor count between series and adjacency: the series has "
            f"{count} sensors, the adjacency {size}shape {adjacency.shape}; "
            f"expected {count} x {count}"
        )
    if not np.isfinite(adjacency).all():
        raise DataError("the adjacency has entries that are not finite; expected edge weights")


def _some(names: Sequence[str], count: int = 3) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown + (", …" if len(names) > count else "")
