"""Which series of a file is read, where it holds several, and the line that says so.

Letters: `S` time steps, `N` sensors, `C` channels.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expt.errors import DataError
from expt.jobs.traffic.series import to_sensor_ids

SPEED_KEYS = ("speed", "values", "data")


@dataclass(frozen=True)
class Choice:
    """Which series of a file to read, and when it begins if the file does not say."""

    key: str | None = None
    """Name of an array or frame; None prefers one called speed."""
    channel: int | str | None = None
    """Number of a channel of an array [S, N, C], None is 0; or the name of a table's column."""
    start: str | None = None
    """Time of the first step, ISO 8601, of a file without times."""
    step_minutes: float | None = None
    """Minutes from one step to the next, of a file without times."""


class Arrays(dict[str, npt.NDArray[Any]]):
    """The named arrays; `notes` are lines about what was read of several, and what was left."""

    notes: tuple[str, ...] = ()

    def noted(self, *notes: str) -> Arrays:
        """Add lines."""
        self.notes += notes
        return self


def speed_rank(name: str) -> int | None:
    """Return how surely an array of this name holds speeds, 0 most; None: it does not say so."""
    word = name.rpartition("/")[2].lower()
    if word in SPEED_KEYS:
        return 2 * SPEED_KEYS.index(word)
    is_speed = re.search("speed|velocity", word) and not re.search("limit|free", word)
    return 1 if is_speed else None


def choice_note(read: str, left: Collection[str]) -> tuple[str, ...]:
    """Return a line about which of several was read, none if there was one."""
    return (f"read {read}, left {', '.join(left)}; data.key names another",) if left else ()


def column_note(name: str, count: int) -> str:
    """Return the line about the only column of `count` that was read."""
    return f"read column {name} alone, of {count}; data.channel names another"


def one_channel(arrays: Arrays, name: str, choice: Choice) -> Arrays:
    """Reduce the speeds to the channel, or to the one column, that is to be read.

    Raises `DataError` when there is no such channel.
    """
    speed, channel = arrays["speed"], choice.channel
    if speed.ndim == 3 and speed.shape[2]:
        count = speed.shape[2]
        some = speed[:: max(1, len(speed) // 500)].reshape(-1, count)
        typical = ", ".join(f"{index}: {typical_reading(some[:, index])}" for index in range(count))
        if channel is not None and channel not in range(count):
            raise DataError(
                f"data.channel={channel}: {name} has the channels 0 to {count - 1}, of which a "
                f"typical reading is {typical}"
            )
        arrays["speed"] = speed[:, :, int(channel or 0)]
        if count > 1:
            arrays.noted(
                f"read channel {channel or 0} of {name}, of {count}; a typical reading of each is "
                f"{typical}; data.channel chooses another"
            )
    elif channel is not None:
        ids = [*to_sensor_ids(arrays.get("sensor_ids", np.arange(0)))]
        if speed.ndim != 2 or str(channel) not in ids or speed.shape[1] != len(ids):
            raise DataError(
                f"data.channel={channel}: {name} of shape {speed.shape} has no such channel or "
                "column; leave data.channel out"
            )
        place = ids.index(str(channel))
        arrays["speed"] = speed[:, place : place + 1]
        arrays["sensor_ids"] = np.array(ids[place : place + 1])
        for other in ("adjacency", "locations"):
            arrays.pop(other, None)
        arrays.noted(column_note(str(channel), len(ids)))
    return arrays


def typical_reading(values: npt.NDArray[Any]) -> str:
    """Return the median of what is neither missing nor 0, in three digits."""
    if values.dtype.kind not in "biuf":
        return f"of type {values.dtype}"
    observed = values[np.isfinite(values) & (values != 0)]
    return f"{np.median(observed.astype(np.float64)):.3g}" if observed.size else "missing"
