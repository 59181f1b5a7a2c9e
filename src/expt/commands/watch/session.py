"""What has been seen so far: histories by device, alarms, forecasts, and how to say it in lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from expt.commands.watch.targets import Look
from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.history import History
from expt.memory.watching.largest import LiveTensor
from expt.memory.watching.outlook import Outlook, in_words, outlook
from expt.reports.figures.memory import Watched, full
from expt.units import counted, format_bytes, format_seconds

ROOM = 1024
"""Readings kept of each device, spread over the whole time."""
FORECAST_SECONDS = 5.0
"""Between two forecasts, which take some milliseconds each."""
SLACK = 0.02
"""How far below the alarm use must fall before it can ring again."""


class Session:
    """Takes looks and keeps them, in bounded room.

    Args:
        alarm: part of a limit above which to warn.

    """

    def __init__(self, alarm: float) -> None:
        self.alarm = alarm
        self.histories: dict[str, History] = {}
        self.last = Look({})
        self.alarms: list[list[str]] = []
        self._ringing: set[str] = set()
        self._ahead: dict[str, Outlook | None] = {}
        self._next_forecast = 0.0
        self._first_step: tuple[float, int] | None = None
        self._step_at = 0.0

    def add(self, look: Look) -> list[list[str]]:
        """Take a look in; return the alarms that are new, each as lines."""
        new = [_own_alarm(alarm) for alarm in look.alarms]
        for name, reading in look.readings.items():
            self.histories.setdefault(name, History(ROOM)).add(reading)
            used = _used(reading)
            if used > self.alarm and name not in self._ringing:
                self._ringing.add(name)
                new.append([self._rung(name, used, reading)])
            elif used <= self.alarm - SLACK:
                self._ringing.discard(name)
        seconds = max((reading.step for reading in look.readings.values()), default=0.0)
        if look.step is not None and (self.last.step is None or look.step != self.last.step):
            self._first_step = self._first_step or (seconds, look.step)
            self._step_at = seconds
        self.last = look
        now = time.monotonic()
        if now >= self._next_forecast:
            self._next_forecast = now + FORECAST_SECONDS
            self._ahead = {name: self._forecast(name) for name in self.histories}
        self.alarms = [*self.alarms, *new][-20:]
        return new

    def _rung(self, name: str, used: float, reading: Reading) -> str:
        return f"alarm: {name} is at {used:.0%} of {format_bytes(reading.total_bytes)}"

    def _forecast(self, name: str) -> Outlook | None:
        history = self.histories[name]
        if history.last is None or not history.last.total_bytes:
            return None
        return outlook(history.readings, history.last.total_bytes, history.last)

    def _step_then(self, seconds_left: float) -> float | None:
        """Return the step that the run will be at so many seconds from now, at its pace so far."""
        if self._first_step is None or self.last.step is None:
            return None
        began, first = self._first_step
        if self._step_at <= began:
            return None
        pace = (self.last.step - first) / (self._step_at - began)
        return self.last.step + pace * seconds_left

    def progress(self) -> str:
        """Return ``step 120 of 1,000, epoch 2``; empty for what is no run."""
        if self.last.step is None:
            return ""
        total, done = self.last.total_steps, self.last.epoch or 0
        of = "" if total is None else f" of {total:,}"
        epoch = done if self.last.step == total else done + 1
        return f"step {self.last.step:,}{of}, epoch {epoch}"

    def words(self) -> list[str]:
        """Return what is in use now, a device a line."""
        return [
            f"{name} {self._device(name, history.last)}"
            for name, history in self.histories.items()
            if history.last is not None
        ]

    def _device(self, name: str, reading: Reading) -> str:
        parts = [f"{format_bytes(reading.allocated_bytes)} of {format_bytes(reading.total_bytes)}"]
        parts[0] += f" ({_used(reading):.0%})"
        if reading.peak_bytes is not None:
            parts.append(f"peak {format_bytes(reading.peak_bytes)}")
        if reading.reserved_bytes is not None:
            parts.append(f"reserved {format_bytes(reading.reserved_bytes)}")
        if reading.other_bytes:
            parts.append(f"others {format_bytes(reading.other_bytes)}")
        if name in self.last.predicted:
            parts.append(f"predicted peak {format_bytes(self.last.predicted[name])}")
        ahead = self._ahead.get(name)
        if ahead is not None:
            parts.append(in_words(ahead.limit_bytes, self._step_then(ahead.left), ahead.left))
        return ", ".join(parts)

    def summary(self) -> list[str]:
        """Return what was seen in all, a device a line."""
        found = []
        for name, history in self.histories.items():
            figures, last = history.statistics(), history.last
            if last is None or not last.total_bytes:
                continue
            most, mean = figures["peak_allocated_bytes"], figures["mean_allocated_bytes"]
            found.append(
                f"{name}: at most {format_bytes(most)} ({most / last.total_bytes:.0%} of "
                f"{format_bytes(last.total_bytes)}), {format_bytes(mean)} on average of "
                f"{counted(history.count, 'reading')} in {format_seconds(last.step)}"
            )
        return found

    def watched(self) -> list[Watched]:
        """Return what is drawn."""
        return [
            Watched(
                name,
                _with_last(history),
                history.last.total_bytes,
                self.alarm,
                self.last.predicted.get(name),
                self._ahead.get(name),
            )
            for name, history in self.histories.items()
            if history.last is not None and history.last.total_bytes
        ]


def _with_last(history: History) -> Sequence[Reading]:
    """Return the readings that are kept, and the newest."""
    kept, last = history.readings, history.last
    return kept if last is None or kept[-1] is last else [*kept, last]


def _used(reading: Reading) -> float:
    return full(reading) / (reading.total_bytes or 1)


def _own_alarm(row: Mapping[str, Any]) -> list[str]:
    """Return an alarm that a run rang itself, with its largest tensors, as lines."""
    try:
        first = (
            f"alarm of the run: {row['device']} was at {row['used_fraction']:.0%} of "
            f"{format_bytes(row['total_bytes'])} at step {row['step']:,}, {row['moment']}"
        )
        rows = [LiveTensor(**tensor) for tensor in row["largest"]]
    except (KeyError, TypeError, ValueError):
        return ["alarm of the run, in a form that cannot be read"]
    return [first, *(f"  {replace(one, shape=tuple(one.shape)).line()}" for one in rows)]
