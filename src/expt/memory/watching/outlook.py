"""When memory that grows will meet its limit, in words for a line that is read in passing.

Nothing is said of memory that does not grow significantly (`expt.memory.diagnosis.trend.judge`):
through any readings there is a line that meets the limit some day.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from expt.memory.diagnosis.trend import FEWEST, SMALLEST_RISE, WINDOW, Reading, forecast, judge
from expt.memory.watching.history import History
from expt.units import format_bytes, format_seconds

OUTLOOK_SECONDS = 10.0
"""Between two forecasts of the line that a run shows: each takes some milliseconds."""


@dataclass(frozen=True)
class Outlook:
    """Where the line through the last readings meets the limit, on the readings' own axis."""

    limit_bytes: int
    at: float
    left: float


def outlook(
    readings: Sequence[Reading], limit_bytes: int, last: Reading | None = None
) -> Outlook | None:
    """Return when the limit is met; None if memory does not grow, or too little is known.

    Args:
        readings: in the order of their steps (or seconds).
        limit_bytes: of a device or a budget; what others hold is taken off.
        last: the newest, if it may not be among them.

    """
    series = [*readings]
    if last is not None and (not series or series[-1] is not last):
        series.append(last)
    if not _rises(series) or judge(series).verdict != "leak":
        return None
    ahead = forecast(series[-WINDOW:], limit_bytes, horizon_steps=1.0)
    if ahead is None or ahead.steps_left is None:
        return None
    return Outlook(limit_bytes, series[-1].step + ahead.steps_left, ahead.steps_left)


def _rises(series: Sequence[Reading]) -> bool:
    """Tell whether a rise that counts is possible at all: the tests need SciPy, which is slow.

    Of a straight rise the middles of the first and the last third are two thirds apart.
    """
    third = len(series) // 3
    if len(series) < FEWEST:
        return False
    first, last = (
        median(reading.allocated_bytes for reading in part)
        for part in (series[: max(third, 1)], series[-max(third, 1) :])
    )
    return last - first > SMALLEST_RISE / 2 * first


def in_words(limit_bytes: int, step: float | None, seconds: float | None) -> str:
    """Return ``reaches 24.00 GiB at step 1,030, in about 4:00 min``."""
    where = "" if step is None else f" at step {round(step):,}"
    when = "" if seconds is None else f" in about {format_seconds(seconds)}"
    comma = "," if where and when else ""
    return f"reaches {format_bytes(limit_bytes)}{where}{comma}{when}"


class LiveLine:
    """The line that a run shows of its memory; the forecast in it is made anew now and then."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self._ahead = ""
        self._next = 0.0

    def words(self, history: History, limit_bytes: int) -> str:
        """Return ``3.10 GiB of 24.00 GiB`` and when it is full; empty before a reading."""
        if history.last is None:
            return ""
        now, step = time.monotonic(), history.last.step
        began, first = self._began = self._began or (now, step)
        if now >= self._next:
            self._next = now + OUTLOOK_SECONDS
            ahead = outlook(history.readings, limit_bytes, history.last)
            self._ahead = ""
            if ahead is not None:
                pace = (now - began) / (step - first) if step > first else None
                seconds = None if pace is None else ahead.left * pace
                self._ahead = f", {in_words(limit_bytes, ahead.at, seconds)}"
        held = format_bytes(history.last.allocated_bytes)
        return f"{held} of {format_bytes(limit_bytes)}{self._ahead}"
