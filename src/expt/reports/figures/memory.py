"""Bytes over the time of a run, one panel a device: in use, its limit, the alarm, the forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expt.memory.diagnosis.trend import Reading
from expt.memory.watching.outlook import Outlook
from expt.reports.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    byte_unit,
    draw,
)
from expt.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME = "watch"
PANEL_INCHES = 2.5
NEAR = 0.3
"""Part of the limit that must have been in use for the axis to reach up to it."""
FURTHER = 1.5
"""How far, in times of what was watched, the axis goes on for a forecast."""


@dataclass(frozen=True)
class Watched:
    """What was seen of one device; the readings' `step` is in seconds."""

    name: str
    readings: Sequence[Reading]
    limit_bytes: int
    alarm: float
    predicted_bytes: int | None = None
    ahead: Outlook | None = None

    @property
    def alarm_bytes(self) -> float:
        """Above which the alarm rings."""
        return self.alarm * self.limit_bytes

    @property
    def most_bytes(self) -> int:
        """The most that was in use, by whomever."""
        return max(max(map(full, self.readings)), *(r.peak_bytes or 0 for r in self.readings))

    @property
    def top_bytes(self) -> float:
        """Where the upright axis ends: above the limit, unless that is far away."""
        near = self.most_bytes >= NEAR * self.limit_bytes
        if near or (self.ahead is not None and self.ahead.at <= self.end_seconds):
            return 1.08 * max(self.limit_bytes, self.most_bytes)
        predicted = min(self.predicted_bytes or 0, self.limit_bytes)
        return 1.3 * max(self.most_bytes, predicted, *(count for _, count in self.forecast()))

    @property
    def end_seconds(self) -> float:
        """Where the time axis ends: with the last reading, or with the forecast if that is near."""
        first, last = self.readings[0].step, self.readings[-1].step
        if self.ahead is None:
            return last
        return min(self.ahead.at, last + (FURTHER - 1) * max(last - first, 1.0))

    def forecast(self) -> list[tuple[float, float]]:
        """Return (seconds, bytes) of the two ends of the forecast's line in the picture."""
        if self.ahead is None:
            return []
        last = self.readings[-1]
        begin, held = last.step, last.allocated_bytes
        room = self.limit_bytes - (last.other_bytes or 0)
        part = (self.end_seconds - begin) / max(self.ahead.left, 1e-9)
        return [(begin, held), (self.end_seconds, held + part * (room - held))]

    @property
    def title(self) -> str:
        """The device and its limit."""
        return f"{self.name}, of {format_bytes(self.limit_bytes)}"

    def lines(self) -> list[tuple[str, str, list[int]]]:
        """Return (name, colour, bytes at every reading) of what was told at all of them."""
        found = [("in use", BLUE, [r.allocated_bytes for r in self.readings])]
        peaks = [r.peak_bytes for r in self.readings]
        if None not in peaks:
            found.append(("peak", PURPLE, [count or 0 for count in peaks]))
        reserved = [r.reserved_bytes for r in self.readings]
        if None not in reserved:
            found.append(("reserved", GREEN, [count or 0 for count in reserved]))
        if any(r.other_bytes for r in self.readings):
            found.append(("with other processes", ORANGE, [full(r) for r in self.readings]))
        return found


def full(reading: Reading) -> int:
    """Return what is not free, whoever has it."""
    own = reading.allocated_bytes if reading.reserved_bytes is None else reading.reserved_bytes
    return own + (reading.other_bytes or 0)


def time_unit(seconds: float) -> tuple[str, float]:
    """Return the unit in which a time axis is read best, and its seconds."""
    for name, length in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return name, length
    return "s", 1.0


def plot_memory(devices: Sequence[Watched], folder: Path) -> list[Path]:
    """Draw what was seen, ``watch.png`` and ``watch.pdf``; nothing of less than two readings."""
    drawn = [device for device in devices if len(device.readings) > 1]
    if not drawn:
        return []
    until = max(device.end_seconds for device in drawn)
    word, length = time_unit(until)

    def onto(figure: Figure) -> None:
        panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0]
        for axes, device in zip(panels, drawn, strict=True):
            _panel(axes, device, length)
            axes.set_xlim(0, until / length)
        panels[-1].set_xlabel(f"time ({word})")

    return draw(folder, NAME, 0.5 + PANEL_INCHES * len(drawn), onto)


def _panel(axes: Axes, device: Watched, length: float) -> None:
    unit, factor = byte_unit([round(device.top_bytes)])
    times = [reading.step / length for reading in device.readings]
    top = device.top_bytes / factor
    for name, colour, counts in device.lines():
        axes.plot(times, [count / factor for count in counts], color=colour, label=name, lw=1.4)
    limit = device.limit_bytes / factor
    levels: list[tuple[str, float, dict[str, Any]]] = [
        ("limit", limit, {"color": RED, "lw": 1.2}),
        (
            f"alarm, {device.alarm:.0%}",
            device.alarm_bytes / factor,
            {"color": RED, "lw": 1, "ls": ":"},
        ),
    ]
    if device.predicted_bytes:
        predicted = device.predicted_bytes / factor
        levels.append(("predicted peak", predicted, {"color": GREY, "lw": 1, "ls": "-."}))
    for name, level, look in levels:
        if level <= top:
            axes.axhline(level, label=name, zorder=1, **look)
    if ends := device.forecast():
        axes.plot(
            [when / length for when, _ in ends], [held / factor for _, held in ends],
            color=BLUE, ls="--", lw=1.2, label="forecast",
        )  # fmt: skip
    axes.set(ylim=(0, top), ylabel=unit)
    axes.grid(True)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    axes.set_title(device.title)
