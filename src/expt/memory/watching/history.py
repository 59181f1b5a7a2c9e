"""Readings of a run of any length in bounded room: when it is full, every other one goes."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from contextlib import suppress

from expt.memory.diagnosis.trend import Reading

READINGS_NAME = "memory.csv"
"""In a run's directory."""
COLUMNS = ("allocated_bytes", "reserved_bytes", "other_bytes", "peak_bytes", "total_bytes")


class History:
    """At most `room` readings, evenly spread from the first to the last."""

    def __init__(self, room: int) -> None:
        self.readings: list[Reading] = []
        self.last: Reading | None = None
        self.count = 0
        self._room = room
        self._stride = 1
        self._sum = 0
        self._most = 0

    def add(self, reading: Reading) -> None:
        """Take a reading into the figures, and keep it if it is its turn."""
        if self.count % self._stride == 0:
            if len(self.readings) >= self._room:
                del self.readings[1::2]
                self._stride *= 2
            if self.count % self._stride == 0:
                self.readings.append(reading)
        self.last = reading
        self.count += 1
        self._sum += reading.allocated_bytes
        self._most = max(self._most, reading.allocated_bytes, reading.peak_bytes or 0)

    def statistics(self) -> dict[str, int]:
        """Return count, last, mean and largest bytes allocated; empty without readings."""
        if self.last is None:
            return {}
        return {
            "readings": self.count,
            "allocated_bytes": self.last.allocated_bytes,
            "mean_allocated_bytes": round(self._sum / self.count),
            "peak_allocated_bytes": self._most,
            **(
                {}
                if self.last.reserved_bytes is None
                else {"reserved_bytes": self.last.reserved_bytes}
            ),
        }


def to_csv(*parts: Mapping[str, Sequence[Reading]], clock: str = "step") -> str:
    """Return a table of devices' readings, of one part of a run after the other.

    `clock` names what `Reading.step` counts.
    """
    buffer = io.StringIO()
    table = csv.writer(buffer, lineterminator="\n")
    table.writerow((clock, "device", *COLUMNS))
    for device, readings in (item for part in parts for item in part.items()):
        for reading in readings:
            # Ten digits: six would make one step of many in a long run.
            figures = (getattr(reading, column) for column in COLUMNS)
            table.writerow((f"{reading.step:.10g}", device, *figures))
    return buffer.getvalue()


def from_csv(text: str, until: float) -> dict[str, list[Reading]]:
    """Return what `to_csv` wrote, by device, up to a step; a row that is damaged is left out."""
    found: dict[str, list[Reading]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        with suppress(KeyError, TypeError, ValueError):
            counts = [None if row[column] == "" else int(row[column]) for column in COLUMNS]
            allocated, reserved, other, peak, total = counts
            reading = Reading(float(row["step"]), allocated or 0, reserved, other, peak, total)
            if reading.step <= until:
                found.setdefault(row["device"], []).append(reading)
    return found
